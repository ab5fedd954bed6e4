"""The algorithms of ``group/collectives``: exact sums, equal bits, and the number of messages that their formulas say.

Most tests run on ranks that are coroutines in this process, under a clock that follows the alpha-beta model.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.group import collectives, tail
from paceline.group.collectives import ALGORITHMS, all_reduce_by, choose, cost
from paceline.group.wire import Buffer, Drive, Receive, Region, Request, Send, Together
from paceline.terms.errors import UsageError
from support.peers import Peer, run_peers
from support.rendezvous import join, rendezvous

FLAT = ("star", "tree", "halving", "ring")


# ---- ranks in one process -------------------------------------------------------------------------------------------
@dataclass
class Rank:
    """One coroutine: what it has asked for, and when its two ends of the line are free again."""

    coroutine: Coroutine[Request[Any], Any, Any]
    now: float = 0.0
    asked: Request[Any] | None = None
    open: list[Send | Receive] = field(default_factory=list)
    ended: bool = False
    value: Any = None
    sent: int = 0
    sent_bytes: int = 0

    def resume(self, answer: Any) -> None:
        try:
            self.asked = self.coroutine.send(answer)
            self.open = list(self.asked.requests if isinstance(self.asked, Together) else [self.asked])
        except StopIteration as end:
            self.ended, self.value = True, end.value

    def answer(self) -> Any:
        def result(request: Request[Any]) -> Any:
            return request.into if isinstance(request, Receive) else None

        assert self.asked is not None
        return [result(r) for r in self.asked.requests] if isinstance(self.asked, Together) else result(self.asked)


class Line:
    """Delivers messages between coroutines. A message takes alpha + bytes / beta from when both ends are ready."""

    def __init__(self, coroutines: list[Coroutine[Any, Any, Any]], alpha: float = 1.0, beta: float = 1.0) -> None:
        self.ranks = [Rank(c) for c in coroutines]
        self.alpha, self.beta = alpha, beta

    def run(self) -> list[Any]:
        for rank in self.ranks:
            rank.resume(None)
        while not all(rank.ended for rank in self.ranks):
            assert self._deliver(), "nobody can go on: " + ", ".join(str(r.open) for r in self.ranks if not r.ended)
        return [rank.value for rank in self.ranks]

    @property
    def seconds(self) -> float:
        return max(rank.now for rank in self.ranks)

    def _deliver(self) -> bool:
        """Carry every message for which both sides stand ready, then resume the ranks that have all of theirs."""
        started = [rank.now for rank in self.ranks]
        moved = False
        for source, sender in enumerate(self.ranks):
            for send in [r for r in sender.open if isinstance(r, Send)]:
                receiver = self.ranks[send.to]
                wanted = [
                    r for r in receiver.open if isinstance(r, Receive) and (r.source, r.tag) == (source, send.tag)
                ]
                if wanted:
                    self._carry(sender, send, receiver, wanted[0], max(started[source], started[send.to]))
                    moved = True
        for rank in self.ranks:
            if not rank.ended and not rank.open:
                rank.resume(rank.answer())
        return moved

    def _carry(self, sender: Rank, send: Send, receiver: Rank, receive: Receive, start: float) -> None:
        assert send.tensor.shape == receive.into.shape
        receive.into.copy_(send.tensor)
        sender.open.remove(send)
        receiver.open.remove(receive)
        sender.sent, sender.sent_bytes = sender.sent + 1, sender.sent_bytes + send.tensor.nbytes
        end = start + self.alpha + send.tensor.nbytes / self.beta
        sender.now, receiver.now = max(sender.now, end), max(receiver.now, end)


def run_all(name: str, tensors: list[Tensor], hosts: tuple[int, ...] = (), **model: float) -> Line:
    size = len(tensors)
    algorithm = partial(collectives.hierarchical, hosts=hosts) if name == "hierarchical" else ALGORITHMS[name]
    line = Line([algorithm(tensors[rank], rank, size, 7) for rank in range(size)], **model)  # type: ignore[misc]
    line.run()
    return line


def whole_numbers(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Different on every rank and element; sums of them are exact in every type."""
    return ((torch.arange(numel) * (rank + 3) + rank) % 13).to(dtype)


# ---- sums -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 7, 64, 129])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("name", FLAT)
def test_every_algorithm_leaves_the_exact_sum_on_every_rank(name: str, size: int, numel: int) -> None:
    tensors = [whole_numbers(rank, numel) for rank in range(size)]
    expected = torch.stack(tensors).sum(0)
    run_all(name, tensors)
    assert all(torch.equal(tensor, expected) for tensor in tensors)


@pytest.mark.parametrize("numel", [0, 1, 5, 64])
@pytest.mark.parametrize("hosts", [(0,), (0, 0), (0, 1), (0, 0, 1), (0, 0, 1, 1), (0, 1, 0, 1), (2, 2, 2, 0, 1, 1)])
def test_hierarchical_serves_any_layout_of_hosts(hosts: tuple[int, ...], numel: int) -> None:
    tensors = [whole_numbers(rank, numel) for rank in range(len(hosts))]
    expected = torch.stack(tensors).sum(0)
    run_all("hierarchical", tensors, hosts)
    assert all(torch.equal(tensor, expected) for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_all_ranks_hold_the_same_bits(name: str, dtype: torch.dtype) -> None:
    noise = torch.Generator().manual_seed(3)
    tensors = [(torch.randn(1001, generator=noise) * 100).to(dtype) for _ in range(6)]
    run_all(name, tensors, (0, 0, 0, 1, 1, 2))
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


# ---- costs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("name", FLAT)
def test_the_clock_of_the_model_shows_what_the_formula_says(name: str, size: int) -> None:
    """An alpha of 3 s and a beta of 2 bytes/s; 16 * 15 * 7 elements are divisible by every size and power in question."""
    tensors = [torch.zeros(1680) for _ in range(size)]
    line = run_all(name, tensors, alpha=3.0, beta=2.0)
    assert line.seconds == pytest.approx(cost(name, tensors[0].nbytes, size, 3.0, 2.0))


@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 0, 0, 1, 1, 1), (0, 1, 2), (0, 0, 0, 0)])
def test_the_cost_of_hierarchical(hosts: tuple[int, ...]) -> None:
    tensors = [torch.zeros(1680) for _ in hosts]
    line = run_all("hierarchical", tensors, hosts, alpha=3.0, beta=2.0)
    assert line.seconds == pytest.approx(cost("hierarchical", tensors[0].nbytes, len(hosts), 3.0, 2.0, hosts=hosts))


def test_memory_inside_hosts_makes_hierarchical_cheaper() -> None:
    hosts = (0, 0, 1, 1)
    slow = cost("hierarchical", 1 << 20, 4, 1e-4, 1e9, hosts=hosts)
    fast = cost("hierarchical", 1 << 20, 4, 1e-4, 1e9, hosts=hosts, inside=(1e-6, 2e10))
    assert fast == pytest.approx(slow - 2 * (1e-4 + (1 << 20) / 1e9) + 2 * (1e-6 + (1 << 20) / 2e10))


def test_the_ring_sends_the_least_bytes_evenly() -> None:
    line = run_all("ring", [torch.zeros(1680) for _ in range(5)])
    assert [(rank.sent, rank.sent_bytes) for rank in line.ranks] == [(8, 2 * 4 * 1680 * 4 // 5)] * 5


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_nothing_is_sent_for_nothing(name: str) -> None:
    assert sum(rank.sent for rank in run_all(name, [torch.zeros(0) for _ in range(6)]).ranks) == 0


# ---- choosing -------------------------------------------------------------------------------------------------------
def test_choose_follows_the_formulas() -> None:
    assert [choose(nbytes, 4) for nbytes in (4, 4 << 20)] == ["halving", "halving"]
    assert [choose(nbytes, 3) for nbytes in (4, 4 << 20)] == ["ring", "ring"]
    assert [choose(nbytes, 6) for nbytes in (4, 150_000, 170_000)] == ["halving", "halving", "ring"]
    assert choose(4 << 20, 4, (0, 0, 1, 1)) == "hierarchical"
    assert choose(4 << 20, 3, (0, 1, 2)) == "ring"


@pytest.mark.parametrize("call", [lambda: cost("butterfly", 4, 2, 1.0, 1.0), lambda: run_by("butterfly", 1)])
def test_an_unknown_name_is_refused_with_those_that_exist(call: Any) -> None:
    with pytest.raises(UsageError, match="star, tree, halving, ring, hierarchical"):
        call()


# ---- with headers ---------------------------------------------------------------------------------------------------
def run_by(name: str, size: int, dtype: torch.dtype = torch.float32, with_tail: bool = False) -> list[Any]:
    """Weighted means of rank + 1 with weights rank + 1, through `all_reduce_by`. Returns (payload, sums, sent) by rank."""
    hosts = tuple(rank // 2 for rank in range(size))
    divisor = 2.0
    buffers: list[Buffer] = []
    for rank in range(size):
        region = Region(torch.zeros(10, dtype=dtype))
        buffer = tail.cut(region, [10], [3], 0)[0] if with_tail else Buffer(region.tensor, 3, 0)
        buffer.tensor.fill_((rank + 1) * (rank + 1) / divisor)
        buffers.append(buffer)
    line = Line([
        all_reduce_by(name, buffers[rank], [rank + 1.0, 1.0, rank * 100.0], divisor, rank, size, hosts, 1)
        for rank in range(size)
    ])  # fmt: skip
    sums = line.run()
    return [(b.tensor, s, rank.sent) for b, s, rank in zip(buffers, sums, line.ranks, strict=True)]


@pytest.mark.parametrize("with_tail", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["auto", *sorted(ALGORITHMS)])
def test_the_header_travels_along(name: str, size: int, dtype: torch.dtype, with_tail: bool) -> None:
    weights = [rank + 1.0 for rank in range(size)]
    mean = sum(w * w for w in weights) / sum(weights)
    for payload, sums, _ in run_by(name, size, dtype, with_tail):
        torch.testing.assert_close(payload, torch.full((10,), mean, dtype=dtype))
        assert sums == [sum(weights), float(size), 100.0 * sum(range(size))]


def test_a_header_costs_no_message_where_the_type_can_hold_it() -> None:
    def sent(dtype: torch.dtype) -> list[int]:
        return [count for _, _, count in run_by("ring", 3, dtype)]

    assert sent(torch.float32) == [4, 4, 4]
    assert sent(torch.bfloat16) == [8, 8, 8]


# ---- on a real wire -------------------------------------------------------------------------------------------------
def reduce_by_messages(peer: Peer, store: str, names: list[str]) -> dict[str, Any]:
    wire = join(peer, store)
    drive = Drive(wire, peer.activity)
    found = {}
    for tag, name in enumerate(names):
        (buffer,) = wire.cut(wire.allocate(1001, torch.float32, torch.device("cpu")), [1001], [2])
        buffer.tensor.copy_(whole_numbers(peer.rank, 1001))
        hosts = tuple(rank // 2 for rank in range(peer.size))
        call = all_reduce_by(name, buffer, [2.0, 1.0], None, peer.rank, peer.size, hosts, tag)
        found[name] = [drive.run(call), buffer.tensor.tolist()]
    wire.close()
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_algorithms_on_gloo(size: int) -> None:
    names = ["auto", *ALGORITHMS]
    total = torch.stack([whole_numbers(rank, 1001) for rank in range(size)]).sum(0)
    expected = {name: [[2.0 * size, float(size)], total.tolist()] for name in names}
    with rendezvous() as server:
        assert run_peers(reduce_by_messages, size, store=str(server.path), names=names) == [expected] * size
