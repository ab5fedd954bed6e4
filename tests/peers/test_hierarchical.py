"""The wire of several hosts. Hosts are pretended: each has an arena of its own, and no rank touches that of another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from paceline.group import arena
from paceline.group.crews import Crews
from paceline.group.hierarchical_wire import HierarchicalWire
from paceline.group.store import UnixStore
from paceline.group.wire import AllGather, AllReduce, Buffer, Drive, Receive, Send, Together
from support.peers import Mark, Peer, outcome, run_peers
from support.rendezvous import PATIENCE, rendezvous

CPU = torch.device("cpu")
NUMELS = [5, 0, 1, 1000, 70_001]
DTYPES = ["float32", "float64", "bfloat16"]
LAYOUTS = [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 1), (7, 2, 2)]


def run(function: Any, hosts: Sequence[int], **arguments: Any) -> list[Any]:
    arenas = {host: arena.create() for host in dict.fromkeys(hosts)}
    try:
        with rendezvous() as server:
            fds = [arenas[host] for host in hosts]
            settings = {"store": str(server.path), "hosts": hosts, "fds": fds, "inherit": list(arenas.values())}
            return run_peers(function, len(hosts), **settings, **arguments)
    finally:
        for fd in arenas.values():
            os.close(fd)


def join(peer: Peer, store: str, hosts: list[int], fds: list[int]) -> HierarchicalWire:
    return HierarchicalWire(
        fds[peer.rank],
        UnixStore(store, PATIENCE),
        peer.rank,
        hosts,
        peer.board,
        peer.activity,
        timeout=PATIENCE,
        hostname="127.0.0.1",
    )


# ---- who stands where -----------------------------------------------------------------------------------------------
def test_crews() -> None:
    assert [Crews.of(rank, (4, 4, 9, 9)) for rank in (1, 2)] == [
        Crews(mine=(0, 1), place=1, slices=2, counterparts=(1, 3), host=0),
        Crews(mine=(2, 3), place=0, slices=2, counterparts=(0, 2), host=1),
    ]
    uneven = [Crews.of(rank, (0, 1, 0, 0)) for rank in range(4)]
    assert [crews.counterparts for crews in uneven] == [(0, 1), (0, 1), (), ()]
    assert {crews.slices for crews in uneven} == {1}


# ---- sums -----------------------------------------------------------------------------------------------------------
def reduce_buckets(peer: Peer, store: str, hosts: list[int], fds: list[int]) -> dict[str, Any]:
    """Rank r weighs r + 1; its gradient is the element's index modulo 8, plus r. Twice over the same buffers."""
    wire = join(peer, store, hosts, fds)
    weight, divisor = peer.rank + 1.0, float(peer.size)
    found: dict[str, Any] = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        cut = wire.cut(wire.allocate(sum(NUMELS), dtype, CPU), NUMELS, [3] * len(NUMELS))
        for turn in range(2):
            for buffer in cut:
                gradient = torch.arange(buffer.tensor.numel(), dtype=torch.float64) % 8 + peer.rank + turn
                buffer.tensor.copy_(gradient * weight / divisor)
            works = [wire.start(AllReduce(buffer, [weight, 1.0, float(turn)], divisor)) for buffer in cut]
            if peer.rank % 2:  # this rank looks at them in another order than the others
                works[4].poll()
                works[1].wait()
            found[f"{name} {turn}"] = [[work.wait() for work in works], [describe(buffer) for buffer in cut]]
    wire.close()
    return found


def describe(buffer: Buffer) -> list[Any]:
    """The sum, and a hash of every bit."""
    raw = buffer.tensor.view(torch.uint8).to(torch.int64)
    return [buffer.tensor.double().sum().item(), int((raw * (torch.arange(raw.numel()) % 8191 + 1)).sum())]


@pytest.mark.parametrize("hosts", LAYOUTS)
def test_weighted_means_and_headers(hosts: tuple[int, ...]) -> None:
    size = len(hosts)
    results = run(reduce_buckets, hosts)
    assert all(result == results[0] for result in results), "ranks hold different bits"
    total = sum(range(1, size + 1))
    for name in DTYPES:
        for turn in range(2):
            sums, described = results[0][f"{name} {turn}"]
            assert sums == [[float(total), float(size), float(size * turn)]] * len(NUMELS)
            shift = sum(r * (r + 1) for r in range(size)) / total + turn
            tolerance = {"float32": 1e-6, "float64": 1e-12, "bfloat16": 2e-2}[name]
            for numel, (found, _) in zip(NUMELS, described, strict=True):
                expected = (torch.arange(numel, dtype=torch.float64) % 8 + shift).sum().item()
                assert found == pytest.approx(expected, rel=tolerance)


def cut_again(peer: Peer, store: str, hosts: list[int], fds: list[int]) -> list[Any]:
    wire = join(peer, store, hosts, fds)
    drive = Drive(wire, peer.activity)
    region = wire.allocate(100, torch.float32, CPU)
    found: list[Any] = []
    for numels in ([100], [30, 70], [33, 33, 34]):
        buffers = wire.cut(region, numels, [2 + len(numels)] * len(numels))
        for buffer in buffers:
            buffer.tensor.fill_(1.0 + peer.rank)
        sums: list[list[float]] = []
        for buffer in buffers:
            drive.launch(reduce(buffer), sums.append)
            drive.poll()
        drive.finish()
        found.append([sums, [buffer.tensor.unique().tolist() for buffer in buffers]])
    wire.close()
    return found


async def reduce(buffer: Buffer) -> list[float]:
    return await AllReduce(buffer, [1.0] * buffer.header_size)


def test_a_region_can_be_cut_anew_and_driven() -> None:
    expected = [[[[4.0] * (2 + count)] * count, [[10.0]] * count] for count in (1, 2, 3)]
    assert run(cut_again, (0, 0, 1, 1)) == [expected] * 4


# ---- everything else ------------------------------------------------------------------------------------------------
def carry(peer: Peer, store: str, hosts: list[int], fds: list[int]) -> dict[str, Any]:
    wire = join(peer, store, hosts, fds)
    others = [other for other in range(peer.size) if other != peer.rank]
    sends = [Send(other, torch.tensor([peer.rank, other]), 5) for other in others]
    receives = [Receive(other, torch.empty(2, dtype=torch.int64), 5) for other in others]
    tensors = [torch.tensor([float(peer.rank)] * 3) for _ in others]
    for root, tensor in enumerate(tensors):
        wire.broadcast(tensor, root)
    found = {
        "received": [t.tolist() for t in wire.start(Together((*sends, *receives))).wait()[len(others) :]],
        "gathered": [t.item() for t in wire.start(AllGather(torch.tensor(peer.rank), "who")).wait()],
        "broadcast": [tensor.unique().tolist() for tensor in tensors],
        "bytes": [raw.decode() for raw in wire.gather_bytes("names", f"rank {peer.rank}".encode())],
        "parted": outcome(lambda: wire.barrier("here" if peer.rank else "there"))["code"],
        "shared": outcome(lambda: wire.allocate_shared(4, torch.float32))["code"],
        "cuda": outcome(lambda: wire.allocate(4, torch.float32, torch.device("cuda")))["code"],
    }
    wire.barrier("end")
    wire.close()
    wire.close()
    return found


@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 0, 1)])
def test_what_else_it_carries(hosts: tuple[int, ...]) -> None:
    size = len(hosts)
    for rank, found in enumerate(run(carry, hosts)):
        assert found == {
            "received": [[other, rank] for other in range(size) if other != rank],
            "gathered": list(range(size)),
            "broadcast": [[float(root)] for root in range(size - 1)],
            "bytes": [f"rank {r}" for r in range(size)],
            "parted": "PL402",
            "shared": "PL206",
            "cuda": "PL206",
        }


# ---- losses ---------------------------------------------------------------------------------------------------------
def lose(peer: Peer, store: str, hosts: list[int], fds: list[int]) -> list[Any]:
    wire = join(peer, store, hosts, fds)
    (buffer,) = wire.cut(wire.allocate(1000, torch.float32, CPU), [1000], [1])
    wire.barrier("together")
    if peer.rank == 1:
        peer.halt("here")
    work = wire.start(AllReduce(buffer, [1.0]))
    peer.mark("waits")
    ended = outcome(work.wait)
    at = time.monotonic()
    wire.close()
    return [ended, at]


@pytest.mark.parametrize("abort", [True, False])
def test_a_killed_peer_is_noticed_on_all_hosts(abort: bool) -> None:
    points: list[str] = []
    killed: list[float] = []

    def on_mark(mark: Mark) -> None:
        points.append(mark.point)
        if len(points) == 4:
            mark.kill(1, signal.SIGKILL)
            killed.append(time.monotonic())
            if abort:
                mark.board.abort(1)

    results = run(lose, (0, 0, 1, 1), on_mark=on_mark)
    for ended, at in (results[0], results[2], results[3]):
        assert (ended["error"], ended["code"]) == ("PeerLost", "PL403")
        assert at - killed[0] < 2.0
