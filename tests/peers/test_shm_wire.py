"""The shared-memory wire between real processes: what comes out, bit for bit, with either engine and with both at once."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paceline.group import arena
from paceline.group.lanes import bytes_of
from paceline.group.shm_wire import ShmWire
from paceline.group.sums import slices
from paceline.group.wire import AllGather, AllReduce, Buffer, Drive, Receive, Send, Together
from support.breadth import more
from support.peers import Peer, outcome, run_peers

CPU = torch.device("cpu")
ENGINES = ("c", "pure", "mixed")
NUMELS = (0, 1, 2, 3, 17, 1000, 4096, 4097, 49_157, 150_001)  # beyond what either engine adds at a time
DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8")


def open_wire(peer: Peer, engine: str = "c", arena_fd: int | None = None) -> ShmWire:
    kernel: Any = ("c", "pure")[peer.rank % 2] if engine == "mixed" else engine
    fd = peer.arena_fd if arena_fd is None else arena_fd
    return ShmWire(fd, peer.rank, peer.size, peer.board, peer.activity, kernel=kernel)


@contextmanager
def arenas(count: int) -> Iterator[list[int]]:
    fds = [arena.create() for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def data(seed: int, rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """What `rank` puts into a buffer: everybody can compute everybody's."""
    numbers = torch.randn(numel, generator=torch.Generator().manual_seed(1000 * seed + rank), dtype=torch.float64)
    return (numbers * 10).to(dtype) if dtype.is_floating_point else (numbers * 50).to(torch.int64).to(dtype)


def expected(parts: Sequence[Tensor], scale: float) -> Tensor:
    """((B0 + B1) + B2) + ..., scaled; halves are summed in float32 and rounded once."""
    half = parts[0].dtype in (torch.bfloat16, torch.float16)
    total = parts[0].to(torch.float32) if half else parts[0].clone()
    for part in parts[1:]:
        total += part
    return (total * scale if scale != 1.0 else total).to(parts[0].dtype)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()[:16]


# ---- sums -----------------------------------------------------------------------------------------------------------
def reduce_everything(peer: Peer, fds: list[int]) -> list[list[str]]:
    """Every dtype and size, with each engine in an arena of its own; digests of the results by engine."""
    return [reduce_with(open_wire(peer, engine, fd)) for engine, fd in zip(ENGINES, fds, strict=True)]


def reduce_with(wire: ShmWire) -> list[str]:
    digests = []
    for name in DTYPES:
        dtype = getattr(torch, name)
        region = wire.allocate(sum(NUMELS), dtype, CPU)
        buffers = wire.cut(region, NUMELS, [2] * len(NUMELS))
        for seed, divisor in enumerate([None, float(wire.size), 7.5] if dtype.is_floating_point else [None, None]):
            for buffer in buffers:
                check_sum(wire, buffer, seed + buffer.key, divisor)
            digests.append(digest(region.tensor))
    wire.close()
    return digests


def check_sum(wire: ShmWire, buffer: Buffer, seed: int, divisor: float | None) -> None:
    tensor, size = buffer.tensor, wire.size
    tensor.copy_(data(seed, wire.rank, tensor.numel(), tensor.dtype))
    header = wire.start(AllReduce(buffer, [1.0 + wire.rank, 0.1 * seed], divisor)).wait()
    weights = size * (size + 1) / 2
    parts = [data(seed, rank, tensor.numel(), tensor.dtype) for rank in range(size)]
    assert torch.equal(tensor, expected(parts, 1.0 if divisor is None else divisor / weights)), (buffer, divisor)
    assert header[0] == weights
    assert header[1] == pytest.approx(size * 0.1 * seed)


@pytest.mark.parametrize("size", [4, *more(2, 3)])
def test_sums_are_those_of_rank_order_with_every_engine(size: int) -> None:
    with arenas(len(ENGINES)) as fds:
        results = run_peers(reduce_everything, size, inherit=fds, fds=fds, timeout=120)
    assert all(by_engine == results[0][0] for by_rank in results for by_engine in by_rank)


def special_cases(peer: Peer, engine: str) -> dict[str, Any]:
    wire = open_wire(peer, engine)
    small, large = wire.cut(wire.allocate(40_010, torch.float32, CPU), [10, 40_000], [1, 1])
    seen: dict[str, Any] = {}
    for name, buffer in (("small", small), ("large", large)):
        buffer.tensor.fill_(3.0)
        wire.start(AllReduce(buffer, [0.0], 8.0)).wait()
        seen[f"{name}, weights 0"] = buffer.tensor.unique().tolist()
        for where in (0, -1):  # in the first slice, in the last
            buffer.tensor.fill_(1.0)
            if peer.rank == 1:
                buffer.tensor[where] = float("inf")
            work = wire.start(AllReduce(buffer, [1.0]))
            seen[f"{name}, infinite at {where}"] = (work.wait(), work.nonfinite)
        buffer.tensor.fill_(1.0)
        work = wire.start(AllReduce(buffer, [1.0]))
        assert work.wait() is work.wait()
        assert work.poll()
        seen[f"{name}, finite"] = work.nonfinite
    with pytest.raises(ValueError, match="header has 1 numbers, 2"):
        wire.start(AllReduce(small, [1.0, 2.0]))
    whole = wire.cut(wire.allocate(4, torch.int64, CPU), [4], [1])[0]
    seen["mean of integers"] = outcome(lambda: wire.start(AllReduce(whole, [1.0], 2.0)).wait())["code"]
    wire.close()
    return seen


@pytest.mark.parametrize("engine", ["c", "pure"])
def test_weights_of_zero_and_values_that_are_not_finite(engine: str) -> None:
    first, second = run_peers(special_cases, 2, engine=engine)
    assert first == second
    for name in ("small", "large"):
        assert first[f"{name}, weights 0"] == [6.0]
        assert first[f"{name}, infinite at 0"] == first[f"{name}, infinite at -1"] == [[2.0], True]
        assert first[f"{name}, finite"] is False
    assert first["mean of integers"] == "PL206"


# ---- many at once ---------------------------------------------------------------------------------------------------
def storm(peer: Peer, fds: list[int], seed: int) -> str:
    """Random buffers, started and awaited in an order that differs between ranks, cut anew in between, with each engine."""
    total = hashlib.sha256()
    for engine, fd in zip(ENGINES, fds, strict=True):
        wire, shared = open_wire(peer, engine, fd), random.Random(seed)
        regions = [wire.allocate(120_000, dtype, CPU) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
        for turn in range(6):
            buffers = [b for region in regions for b in cut_at_random(wire, region, shared)]
            for step in range(3):
                own = random.Random(f"{seed} {peer.rank} {turn} {step}")
                one_step(wire, buffers, 10 * turn + step, own)
                for buffer in buffers:
                    total.update(bytes_of(buffer.tensor))
        wire.close()
    return total.hexdigest()


def cut_at_random(wire: ShmWire, region: Any, shared: random.Random) -> list[Buffer]:
    numels = [shared.choice((0, 1, 5, 700, 9_000, 25_000)) for _ in range(4)]
    return wire.cut(region, numels, [1 + shared.randrange(3) for _ in numels])


def one_step(wire: ShmWire, buffers: list[Buffer], seed: int, own: random.Random) -> None:
    works = []
    for buffer in own.sample(buffers, len(buffers)):
        buffer.tensor.copy_(data(seed + buffer.key, wire.rank, buffer.tensor.numel(), buffer.tensor.dtype))
        request: Any = AllReduce(buffer, [1.0] * buffer.header_size, float(wire.size))
        works.append((wire.start(request), buffer))
        if own.random() < 0.3:
            own.choice(works)[0].poll()
    letters = [
        wire.start(AllGather(torch.full((own_tag + 1,), float(wire.rank)), f"letter {own_tag}"))
        for own_tag in own.sample(range(4), 4)
    ]
    for work, buffer in own.sample(works, len(works)):
        assert work.wait() == [float(wire.size)] * buffer.header_size
    for letter in letters:
        assert [t[0].item() for t in letter.wait()] == list(range(wire.size))
    for buffer in buffers:
        parts = [data(seed + buffer.key, r, buffer.tensor.numel(), buffer.tensor.dtype) for r in range(wire.size)]
        assert torch.equal(buffer.tensor, expected(parts, 1.0))


@pytest.mark.parametrize("size", [4, *more(2, 3)])
def test_a_storm_of_buffers_in_any_order(size: int) -> None:
    with arenas(len(ENGINES)) as fds:
        assert len(set(run_peers(storm, size, inherit=fds, fds=fds, seed=size, timeout=120))) == 1


def drive(peer: Peer) -> list[list[float]]:
    wire = open_wire(peer)
    buffers = wire.cut(wire.allocate(90_000, torch.float32, CPU), [40_000, 10, 49_990], [1, 1, 1])

    async def twice(buffer: Buffer) -> float:
        buffer.tensor.fill_(peer.rank + 1.0)
        await AllReduce(buffer, [1.0], 2.0)
        everybody = await AllGather(buffer.tensor[:1], f"bucket {buffer.key}")
        (weight,) = await AllReduce(buffer, [2.0])
        return weight + sum(t.item() for t in everybody)

    driver, results = Drive(wire, peer.activity), []
    for buffer in buffers:
        driver.launch(twice(buffer), results.append, f"bucket {buffer.key}")
        driver.poll()
    driver.finish()
    wire.close()
    return [results, [buffer.tensor.mean().item() for buffer in buffers]]


def test_links_run_on_it() -> None:
    mean = (1.0 + 2.0) * 2.0 / 2.0
    assert run_peers(drive, 2) == [[[4.0 + 2 * mean] * 3, [2 * mean] * 3]] * 2


# ---- messages -------------------------------------------------------------------------------------------------------
def talk(peer: Peer, fds: list[int]) -> None:
    for engine, fd in zip(ENGINES, fds, strict=True):
        wire = open_wire(peer, engine, fd)
        wire.barrier("begin")
        for length in (0, 1, 1000, 3_300_000):
            payloads = [bytes([rank]) * (length * (rank + 1) // 2) for rank in range(peer.size)]
            assert wire.gather_bytes(f"of {length}", payloads[peer.rank]) == payloads
        for numel, dtype in ((0, torch.float32), (1, torch.bool), (33, torch.bfloat16), (700_000, torch.float64)):
            for root in range(peer.size):
                tensor = data(3, peer.rank, numel, torch.float64).to(dtype)
                wire.broadcast(tensor, root)
                assert torch.equal(tensor, data(3, root, numel, torch.float64).to(dtype))
        for numel in (3, 40_000, 5):  # one tag, growing and shrinking, two under way at once
            works = [wire.start(AllGather(data(s, peer.rank, numel, torch.float32), "same")) for s in (1, 2)]
            for seed, work in reversed(list(zip((1, 2), works, strict=True))):
                for rank, tensor in enumerate(work.wait()):
                    assert torch.equal(tensor, data(seed, rank, numel, torch.float32))
        pass_around(wire, peer)
        assert wire.allocate_shared(10, torch.float32).tensor.data_ptr() % 64 == 0
        shared = wire.allocate_shared(peer.size, torch.int64).tensor
        shared[peer.rank] = peer.rank + 1
        wire.barrier("written")
        assert shared.tolist() == list(range(1, peer.size + 1))
        wire.close()


def pass_around(wire: ShmWire, peer: Peer) -> None:
    """Everybody sends five messages of each of two tags to the right before it receives; they arrive in order."""
    right, left = (peer.rank + 1) % peer.size, (peer.rank - 1) % peer.size
    sends = [Send(right, data(i, peer.rank, 9_000, torch.float32), tag) for i in range(5) for tag in (0, 1)]
    receives = [Receive(left, torch.empty(9_000), tag) for _ in range(5) for tag in (0, 1)]
    received = wire.start(Together((*sends, *receives))).wait()[len(sends) :]
    for number, tensor in enumerate(received):
        assert torch.equal(tensor, data(number // 2, left, 9_000, torch.float32))


@pytest.mark.parametrize("size", [2, 3])
def test_messages_of_every_length_arrive(size: int) -> None:
    with arenas(len(ENGINES)) as fds:
        run_peers(talk, size, inherit=fds, fds=fds)


# ---- borders --------------------------------------------------------------------------------------------------------
@given(st.integers(0, 5000), st.integers(0, 3000), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 9))
def test_slices_cover_each_element_once(first: int, numel: int, itemsize: int, size: int) -> None:
    parts = slices(first * itemsize, numel, itemsize, size)
    assert [i for low, high in parts for i in range(low, high)] == list(range(numel))
    assert all((first + low) * itemsize % 64 == 0 for low, _ in parts if 0 < low < numel)
