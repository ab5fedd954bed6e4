"""Chains: links in their order, the mean that every all-reduce leaves, and what they say of themselves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from paceline.exchange.allreduce import ALGORITHMS, AllReduceMean
from paceline.exchange.chain import Chain, chain, optimizer
from paceline.exchange.link import Link, Message, State
from paceline.exchange.recipes import ddp
from paceline.exchange.strategy import build
from paceline.group import collectives
from paceline.group.memory_wire import MemoryNetwork
from paceline.terms.bucket import Bucket

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Note:
    """Notes that it was run, and counts how often."""

    word: str

    def init(self, bucket: Bucket) -> State:
        return {"runs": 0}

    async def __call__(self, message: Message, state: State) -> None:
        state["runs"] += 1
        message.notes.setdefault("words", []).append(self.word)

    def describe(self) -> str:
        return f"note {self.word}"


def run(links: Chain, payloads: list[Tensor], weights: list[float], divisor: float) -> list[Message]:
    """The gradient part of a chain for one bucket on simulated ranks."""
    size = len(payloads)
    network = MemoryNetwork(size)
    messages = []
    for rank, payload in enumerate(payloads):
        wire = network.wire(rank)
        (buffer,) = wire.cut(wire.allocate(payload.numel(), payload.dtype, CPU), [payload.numel()], [2])
        buffer.tensor.copy_(payload)
        bucket = Bucket(0, (), payload.numel(), payload.dtype)
        message = Message(
            bucket, buffer, [weights[rank], 1.0], divisor, rank, size, hosts=[r // 2 for r in range(size)]
        )
        network.spawn(rank, links.exchange_gradients(message, links.init(bucket)))
        messages.append(message)
    network.run()
    return messages


def test_links_run_in_order_on_their_side_of_the_optimizer() -> None:
    links = chain(Note("a"), Note("b"), optimizer, Note("c"))
    bucket = Bucket(0, (), 1, torch.float32)
    states = links.init(bucket)
    wire = MemoryNetwork(1).wire(0)
    (buffer,) = wire.cut(wire.allocate(1, torch.float32, CPU), [1], [1])
    message = Message(bucket, buffer, [1.0])
    for part, words in ((links.exchange_gradients, "ab"), (links.exchange_parameters, "abc")):
        with pytest.raises(StopIteration):
            part(message, states).send(None)
        assert "".join(message.notes["words"]) == words
    assert states == [{"runs": 1}] * 3
    assert links.describe().splitlines() == ["note a", "note b", chain(optimizer).describe(), "note c"]


def test_a_chain_has_one_optimizer() -> None:
    with pytest.raises(ValueError, match="this one has 0"):
        chain(Note("a"))
    with pytest.raises(ValueError, match="this one has 2"):
        chain(optimizer, optimizer)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_leaves_the_weighted_mean_on_all_ranks(algorithm: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    gradients = [torch.randn(101, dtype=torch.float64, generator=generator) for _ in range(size)]
    weights = [float(3 + r) for r in range(size)]
    payloads = [w / 7.0 * g for w, g in zip(weights, gradients, strict=True)]
    messages = run(chain(AllReduceMean(algorithm=algorithm), optimizer), payloads, weights, 7.0)
    mean = sum((w * g for w, g in zip(weights, gradients, strict=True)), torch.zeros(101)) / sum(weights)
    for message in messages:
        torch.testing.assert_close(message.payload, mean, rtol=1e-14, atol=1e-15)
        assert torch.equal(message.payload, messages[0].payload)
        assert message.header == [sum(weights), float(size)]
        assert message.exchanged


def test_the_recipes_algorithms_are_those_of_the_group() -> None:
    assert set(ALGORITHMS) == {"auto", *collectives.ALGORITHMS}


def test_a_weight_of_zero_everywhere_leaves_the_sum() -> None:
    for codec in (None, "bf16"):
        messages = run(ddp(codec=codec).chain, [torch.zeros(8), torch.zeros(8)], [0.0, 0.0], 4.0)
        assert torch.equal(messages[1].payload, torch.zeros(8))
        assert messages[1].header == [0.0, 2.0]


def test_bf16_is_near_the_plain_exchange_and_one_rank_is_the_plain_loop() -> None:
    payloads = [torch.randn(500, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    plain = run(build("ddp()").chain, payloads, [1.0] * 4, 4.0)[0].payload
    coded = run(build("ddp(codec=bf16)").chain, payloads, [1.0] * 4, 4.0)[0].payload
    assert 0 < float((coded - plain).norm() / plain.norm()) < 2**-7
    alone = run(build("ddp(codec=bf16)").chain, payloads[:1], [3.0], 3.0)[0].payload
    assert torch.equal(alone, payloads[0])


def test_links_are_values() -> None:
    link = AllReduceMean(algorithm="ring")
    assert isinstance(link, Link)
    assert link == AllReduceMean(algorithm="ring")
    assert hash(ddp("bf16")) == hash(ddp("bf16"))
    assert link.init(Bucket(0, (), 1, torch.float32)) == {}


DDP = """\
strategy    ddp()
all-reduce
  sends     gradients: one message per bucket, every step
  to        all ranks: the wire's own all-reduce
  when      as soon as backward has filled the bucket: overlaps with backward
  encoded   not at all
  merged    weighted mean; the same bits on every rank
optimizer   the script's own, on every rank, at opt.step()
parameters  private: every rank has its own copy of parameters and optimizer state
buckets     size chosen by placement"""


@pytest.mark.parametrize(
    ("text", "differences"),
    [
        ("ddp()", {}),
        ("ddp(algorithm=ring)", {3: "  to        all ranks: ring all-reduce"}),
        (
            "ddp(params=shared)",
            {8: "parameters  shared: one copy on each host; every rank updates its slice in place at opt.step()"},
        ),
        (
            "ddp(codec=bf16, bucket_mb=4)",
            {
                3: "  to        all ranks: each rank merges one slice of every message and gives it to all",
                5: "  encoded   bf16: 2 bytes an element, 8 bits of precision kept",
                9: "buckets     at most 4 MiB each",
            },
        ),
        (
            "ddp(codec=fp16)",
            {
                3: "  to        all ranks: each rank merges one slice of every message and gives it to all",
                5: "  encoded   fp16: 2 bytes an element, shifted by a power of two per message, 11 bits of precision kept",
            },
        ),
    ],
)
def test_an_exchange_says_what_it_does(text: str, differences: dict[int, str]) -> None:
    expected = DDP.splitlines()
    for line, words in ({0: f"strategy    {text}"} | differences).items():
        expected[line] = words
    assert build(text).describe().splitlines() == expected
