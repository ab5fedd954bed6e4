"""The memory wire: results by rank order, virtual time by the stated formulas, and the same trace for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.group import collectives
from paceline.group.memory_wire import MemoryNetwork
from paceline.group.virtual import Elapse, Timeline, Until
from paceline.group.wire import AllGather, AllReduce, Buffer, Drive, Receive, Request, Send, Together
from paceline.terms.activity import Board
from paceline.terms.errors import StepError, WireError

CPU = torch.device("cpu")


def run(network: MemoryNetwork, body: Callable[[int], Awaitable[Any]]) -> list[Any]:
    """`body(rank)` on every peer; the results by rank."""

    async def peer(rank: int) -> Any:
        return await body(rank)

    works = [network.spawn(rank, peer(rank)) for rank in range(network.size)]
    network.run()
    return [work.wait() for work in works]


def buffers(network: MemoryNetwork, numel: int, dtype: torch.dtype = torch.float32, header: int = 1) -> list[Buffer]:
    """One buffer a rank, filled with numbers of that rank."""
    made = []
    for rank in range(network.size):
        wire = network.wire(rank)
        (buffer,) = wire.cut(wire.allocate(numel, dtype, CPU), [numel], [header])
        buffer.tensor.copy_(torch.randn(numel, generator=torch.Generator().manual_seed(rank)))
        made.append(buffer)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_reduce_adds_in_rank_order_and_scales(size: int, dtype: torch.dtype) -> None:
    network = MemoryNetwork(size)
    made = buffers(network, 1000, dtype, header=2)
    wide = torch.promote_types(dtype, torch.float32)
    expected = made[0].tensor.to(wide, copy=True)
    for buffer in made[1:]:
        expected += buffer.tensor
    expected *= 3.0 / (2.0 * size)
    sums = run(network, lambda rank: AllReduce(made[rank], [2.0, float(rank)], divisor=3.0))
    assert all(torch.equal(b.tensor, expected.to(dtype)) for b in made)
    assert sums == [[2.0 * size, sum(range(size))]] * size


def test_a_mean_whose_weights_are_the_divisor_is_not_scaled() -> None:
    network = MemoryNetwork(2)
    made = buffers(network, 10)
    expected = made[0].tensor + made[1].tensor
    run(network, lambda rank: AllReduce(made[rank], [1.5], divisor=3.0))
    assert torch.equal(made[0].tensor, expected)


def test_all_gather_gives_rows_in_rank_order() -> None:
    rows = run(MemoryNetwork(3), lambda rank: AllGather(torch.full((2,), float(rank)), "x"))
    assert all([t.tolist() for t in mine] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]] for mine in rows)


def test_messages_of_one_pair_and_tag_keep_their_order_and_may_be_overwritten() -> None:
    got: list[float] = []

    async def body(rank: int) -> None:
        tensor = torch.zeros(1)
        for number in range(5):
            if rank == 0:
                await Send(1, tensor.fill_(number), tag=number % 2)
            else:
                got.append(float(await Receive(0, tensor, tag=number % 2)))
        if rank == 0:
            tensor.fill_(99.0)

    run(MemoryNetwork(2, jitter=2.0, seed=3), body)
    assert got == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_two_ranks_that_send_to_each_other() -> None:
    def body(rank: int) -> Awaitable[list[Any]]:
        other = 1 - rank
        return Together((Send(other, torch.full((3,), float(rank))), Receive(other, torch.empty(3))))

    network = MemoryNetwork(2, bandwidth=12.0, latency=0.5)
    results = run(network, body)
    assert [float(r[1][0]) for r in results] == [1.0, 0.0]
    assert network.time.now == pytest.approx(1.5)


ALPHA, BETA, NUMEL = 1e-3, 1e6, 4096 - 1  # with the header of one number: 16 KiB, which 2, 4 and 8 ranks split evenly


@pytest.mark.parametrize("name", ["star", "ring", "tree", "halving"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_virtual_time_is_the_formula_of_the_algorithm(name: str, size: int) -> None:
    network = MemoryNetwork(size, bandwidth=BETA, latency=ALPHA)
    made = buffers(network, NUMEL)
    run(network, lambda rank: collectives.all_reduce_by(name, made[rank], [1.0], None, rank, size))
    cost = collectives.cost(name, 4 * (NUMEL + 1), size, ALPHA, BETA)
    assert network.time.now == pytest.approx(cost, rel=1e-9)


def test_the_wires_own_all_reduce_costs_a_ring() -> None:
    network = MemoryNetwork(4, bandwidth=BETA, latency=ALPHA)
    made = buffers(network, 1000)
    run(network, lambda rank: AllReduce(made[rank], [1.0]))
    assert network.time.now == pytest.approx(collectives.cost("ring", 4008, 4, ALPHA, BETA))
    assert network.bytes_sent == pytest.approx(4 * 2 * 3 / 4 * 4008)


def test_pairs_may_differ_and_the_slowest_of_the_ring_counts() -> None:
    network = MemoryNetwork(3, bandwidth=lambda a, b: 100.0 if (a, b) == (1, 2) else 1e9, latency=lambda a, b: 0.0)
    run(network, lambda rank: AllGather(torch.zeros(100)))
    assert network.time.now == pytest.approx(2 * 4.0)


def test_a_way_serves_one_message_at_a_time() -> None:
    async def body(rank: int) -> None:
        if rank:
            await Send(0, torch.zeros(25))
        else:
            await Together((Receive(1, torch.zeros(25)), Receive(2, torch.zeros(25))))

    network = MemoryNetwork(3, bandwidth=100.0, latency=0.0)
    run(network, body)
    assert [(s.rank, s.begin, s.end) for s in network.trace] == [(1, 0.0, 1.0), (2, 1.0, 2.0)]


def test_speeds_stretch_computing() -> None:
    network = MemoryNetwork(2, speeds=[1.0, 0.25])
    run(network, lambda rank: Elapse(1.0))
    assert [s.end for s in network.trace] == [1.0, 4.0]


async def _busy(network: MemoryNetwork, made: list[Buffer], rank: int) -> Tensor:
    async def mix(number: int) -> None:
        await Elapse(0.01 * number)
        await collectives.all_reduce_by("ring", made[rank], [1.0], None, rank, network.size, tag=7)

    for number in range(4):
        await Elapse(0.02)
        await Until([network.spawn(rank, mix(number))])
    return made[rank].tensor


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    def digest(seed: int) -> str:
        network = MemoryNetwork(4, jitter=0.5, seed=seed)
        made = buffers(network, 64)
        tensors = run(network, lambda rank: _busy(network, made, rank))
        said = repr((network.trace, [t.tolist() for t in tensors]))
        return hashlib.sha256(said.encode()).hexdigest()

    assert digest(seed) == digest(seed)
    assert digest(seed) != digest(seed + 1)


def test_who_waits_for_what_will_not_come_is_named() -> None:
    async def body(rank: int) -> None:
        if rank:
            await Receive(0, torch.zeros(1))

    with pytest.raises(StepError, match="rank 1 for a message from rank 0"):
        run(MemoryNetwork(2), body)


def test_different_tensors_under_one_name_are_refused() -> None:
    with pytest.raises(StepError, match="PL402"):
        run(MemoryNetwork(2), lambda rank: AllGather(torch.zeros(rank + 1)))


def test_drives_run_on_it_too() -> None:
    network = MemoryNetwork(2)
    made = buffers(network, 10)
    expected = made[0].tensor + made[1].tensor
    drives = [Drive(network.wire(r), Board.private(2).activity(r)) for r in range(2)]

    async def reduce(rank: int) -> list[float]:
        return await AllReduce(made[rank], [1.0])

    got: list[list[float]] = []
    for rank, drive in enumerate(drives):
        drive.launch(reduce(rank), got.append)
    for drive in drives:
        drive.finish()
    assert got == [[2.0], [2.0]]
    assert torch.equal(made[1].tensor, expected)


def test_a_wait_that_cannot_end_is_an_error() -> None:
    network = MemoryNetwork(2)
    with pytest.raises(StepError, match="PL402"):
        network.wire(0).start(Receive(1, torch.zeros(1))).wait()
    assert Timeline().advance() is False


class _Unknown(Request[None]):
    pass


def test_what_the_memory_wire_does_not_have() -> None:
    wire = MemoryNetwork(2).wire(0)
    calls: list[Callable[[], object]] = [
        lambda: wire.start(_Unknown()),
        lambda: wire.allocate_shared(1, torch.float32),
        lambda: wire.broadcast(torch.zeros(1)),
        lambda: wire.gather_bytes("x", b""),
        lambda: wire.barrier("x"),
    ]
    for call in calls:
        with pytest.raises(WireError, match="PL206"):
            call()
    wire.close()


def test_a_region_is_cut_into_consecutive_buffers() -> None:
    wire = MemoryNetwork(1).wire(0)
    region = wire.allocate(10, torch.float32, CPU)
    first, second = wire.cut(region, [4, 6], [1, 2])
    second.tensor.fill_(1.0)
    assert region.tensor.tolist() == [0.0] * 4 + [1.0] * 6
    assert (first.header_size, second.header_size, second.key - first.key) == (1, 2, 1)
    (whole,) = wire.cut(region, [10], [1])
    assert whole.key == second.key + 1
