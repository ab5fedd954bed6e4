"""The shared-memory wire when something is wrong: every rank hears of it, soon, and by the right name."""

from __future__ import annotations

import gc
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from paceline.group import arena
from paceline.group.shm_wire import ShmWire
from paceline.group.wire import AllGather, AllReduce, Receive, Request, Send
from paceline.terms.activity import Board, Phase, Snapshot
from paceline.terms.errors import PacelineError, PeerLost
from support.peers import Mark, Peer, outcome, run_peers

CPU = torch.device("cpu")
SOON_S = 5.0  # a slice is 20 ms; the rest is for a machine with other things to do


def open_wire(peer: Peer, kernel: Any) -> ShmWire:
    return ShmWire(peer.arena_fd, peer.rank, peer.size, peer.board, peer.activity, kernel=kernel)


def alone(nbytes: int | None = None, **options: Any) -> tuple[ShmWire, int]:
    """A wire of one rank, in this process, and its arena."""
    board, fd = Board.private(1), arena.create(nbytes)
    options = {"kernel": "c"} | options
    return ShmWire(fd, 0, 1, board, board.activity(0), **options), fd


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(PacelineError) as caught:
        call()
    return caught.value.code


# ---- peers that go --------------------------------------------------------------------------------------------------
def wait_for_rank_1(peer: Peer, kernel: str, what: str) -> dict[str, Any] | None:
    """Rank 1 stays behind; the others wait for it in an operation of the kind `what`."""
    wire = open_wire(peer, kernel)
    small, large, half = (
        wire.cut(wire.allocate(numel, dtype, CPU), [numel], [1])[0]
        for numel, dtype in ((100, torch.float32), (100_000, torch.float32), (100, torch.bfloat16))
    )
    wire.barrier("everybody is here")
    if peer.rank == 1:
        if what == "slice":
            wire.start(AllReduce(large, [1.0]))  # it has published its copy, and will never sum its slice
        if what == "close":
            peer.mark("behind")
            wire.close()
        peer.halt("behind")
    waits: dict[str, Callable[[], Any]] = {
        "small": lambda: wire.start(AllReduce(small, [1.0])).wait(),
        "close": lambda: wire.start(AllReduce(small, [1.0])).wait(),
        "slice": lambda: wire.start(AllReduce(large, [1.0])).wait(),
        "half": lambda: wire.start(AllReduce(half, [1.0])).wait(),
        "gather": lambda: wire.start(AllGather(torch.zeros(3), "some tag")).wait(),
        "receive": lambda: wire.start(Receive(1, torch.zeros(3))).wait(),
        "barrier": lambda: wire.barrier("at the end"),
    }
    seen = {**outcome(waits[what]), "at": time.monotonic(), "waits_for": peer.board.read(peer.rank).waits_for}
    wire.close()
    return seen


def until_waiting(mark: Mark, rank: int, deadline_s: float = 30.0) -> None:
    """Return when the board says that `rank` waits for rank 1."""
    end = time.monotonic() + deadline_s
    while mark.board.read(rank).waits_for != (1,):
        assert time.monotonic() < end, f"rank {rank}: {mark.board.read(rank)}"
        os.sched_yield()


@pytest.mark.parametrize(
    ("what", "kernel"),
    [
        ("small", "c"),
        ("small", "pure"),
        ("slice", "c"),
        ("half", "c"),
        ("gather", "c"),
        ("receive", "pure"),
        ("barrier", "pure"),
    ],
)
def test_the_death_of_a_peer_is_noticed(what: str, kernel: str) -> None:
    killed: list[float] = []
    boards: list[Snapshot] = []

    def kill(mark: Mark) -> None:
        until_waiting(mark, 0)
        boards.append(mark.board.read(0))
        killed.append(time.monotonic())
        mark.kill(1)

    size = 3 if what == "small" else 2
    results = run_peers(wait_for_rank_1, size, kernel=kernel, what=what, on_mark=kill)
    assert results[1] is None
    if what == "barrier":
        assert (boards[0].phase, boards[0].what, boards[0].operation) == (Phase.WAIT, "barrier at the end", 2)
    for rank in set(range(size)) - {1}:
        assert (results[rank]["error"], results[rank]["code"]) == ("PeerLost", "PL403")
        assert "rank 1 died" in results[rank]["message"] or "closed" in results[rank]["message"]
        assert killed[0] < results[rank]["at"] < killed[0] + SOON_S
        assert results[rank]["waits_for"] == []


def test_a_peer_that_closes_its_wire_is_missed_only_where_it_is_needed() -> None:
    def kill(mark: Mark) -> None:
        if "behind" in seen:
            mark.kill(1)
        seen.append(mark.point)

    seen: list[str] = []
    left = run_peers(wait_for_rank_1, 2, kernel="c", what="close", on_mark=kill)[0]
    assert (left["code"], "rank 1" in left["message"]) == ("PL403", True)
    assert run_peers(close_at_once, 3) == [[0.0, 1.0, 2.0]] * 3


def close_at_once(peer: Peer) -> list[float]:
    """Rank 0 is gone before the others look at what it has given."""
    wire = open_wire(peer, "c")
    work = wire.start(AllGather(torch.tensor([float(peer.rank)]), "last words"))
    while peer.rank != 0 and peer.board.read(0).phase != Phase.FINISHED:
        os.sched_yield()
    numbers = [tensor.item() for tensor in work.wait()]
    wire.close()
    peer.activity.enter(Phase.FINISHED)
    return numbers


@pytest.mark.parametrize(("lost", "error", "code"), [(-1, "Aborted", "PL404"), (2, "PeerLost", "PL403")])
@pytest.mark.parametrize("kernel", ["c", "pure"])
def test_an_abort_ends_every_wait(kernel: str, lost: int, error: str, code: str) -> None:
    aborted: list[float] = []

    def abort(mark: Mark) -> None:
        until_waiting(mark, 0)
        aborted.append(time.monotonic())
        mark.board.abort(lost)
        until_over(mark)
        mark.kill(1)

    def until_over(mark: Mark) -> None:
        while mark.board.read(0).waits_for:
            os.sched_yield()

    seen = run_peers(wait_for_rank_1, 2, kernel=kernel, what="small", on_mark=abort)[0]
    assert (seen["error"], seen["code"]) == (error, code)
    assert ("rank 2" in seen["message"]) == (lost == 2)
    assert seen["at"] < aborted[0] + SOON_S


def interrupted(peer: Peer, kernel: str) -> str:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wire = open_wire(peer, kernel)
    buffer = wire.cut(wire.allocate(8, torch.float32, CPU), [8], [1])[0]
    if peer.rank == 0:
        try:
            wire.start(AllReduce(buffer, [1.0])).wait()
        except KeyboardInterrupt:
            peer.mark("interrupted")
            return "interrupted"
    peer.halt("behind")
    return ""


@pytest.mark.parametrize("kernel", ["c", "pure"])
def test_control_c_ends_a_wait(kernel: str) -> None:
    def interrupt(mark: Mark) -> None:
        if mark.rank == 1:
            until_waiting(mark, 0)
            mark.kill(0, signal.SIGINT)
        else:
            mark.kill(1)

    assert run_peers(interrupted, 2, kernel=kernel, on_mark=interrupt)[0] == "interrupted"


# ---- programs that part ---------------------------------------------------------------------------------------------
def part(peer: Peer, kernel: str) -> list[dict[str, Any]]:
    wire = open_wire(peer, kernel)
    first = peer.rank == 0
    seen = [
        outcome(lambda: wire.barrier("save") if first else wire.gather_bytes("log", b"")),
        outcome(lambda: wire.broadcast(torch.zeros(3 if first else 4))),
        outcome(lambda: wire.start(AllGather(torch.zeros(3 if first else 4), "codes")).wait()),
        outcome(lambda: [each.decode() for each in wire.gather_bytes("fine", b"%d" % peer.rank)]),
    ]
    wire.allocate(1_000 if first else 1_000_000, torch.float32, CPU)
    seen.append(outcome(lambda: wire.barrier("after the buckets")))
    wire.close()
    return seen


@pytest.mark.parametrize("kernel", ["c", "pure"])
def test_ranks_in_different_places_all_hear_of_it(kernel: str) -> None:
    for tags, shapes, tensors, fine, memory in run_peers(part, 3, kernel=kernel):
        assert {each["code"] for each in (tags, shapes, tensors, memory)} == {"PL402"}
        assert {each["error"] for each in (tags, shapes, tensors, memory)} == {"StepError"}
        assert "rank 0 in 'barrier save' (operation 1)" in tags["message"]
        assert "ranks 1, 2 in 'log' (operation 1)" in tags["message"]
        assert "(3,) from rank 0" in shapes["message"]
        assert "(4,) from rank 0" in shapes["message"]
        assert "'gather codes'" in tensors["message"]
        assert "allocated different buffers before 'barrier after the buckets'" in memory["message"]
        assert fine["value"] == ["0", "1", "2"]


# ---- calls at the wrong moment, alone -------------------------------------------------------------------------------
def test_buffers_that_are_gone_or_under_way() -> None:
    board, fd = Board.private(2), arena.create()
    wire = ShmWire(fd, 0, 2, board, board.activity(0))
    region = wire.allocate(100, torch.float32, CPU)
    old = wire.cut(region, [60, 40], [1, 1])
    new = wire.cut(region, [100], [1])
    assert code_of(lambda: wire.start(AllReduce(old[0], [1.0]))) == "PL410"
    wire.start(AllReduce(new[0], [1.0]))
    assert code_of(lambda: wire.start(AllReduce(new[0], [1.0]))) == "PL410"
    assert code_of(lambda: wire.cut(region, [100], [1])) == "PL410"
    with pytest.raises(ValueError, match="101 elements do not fit into 100"):
        wire.cut(wire.allocate(100, torch.float32, CPU), [101], [1])
    wire.close()
    os.close(fd)


def test_what_it_does_not_know() -> None:
    wire, fd = alone()

    class Pray(Request[None]):
        pass

    assert code_of(lambda: wire.start(Pray())) == "PL206"
    assert code_of(lambda: wire.allocate(1, torch.float32, torch.device("meta"))) == "PL206"
    assert code_of(lambda: wire.start(AllGather(torch.zeros(1, device="meta")))) == "PL206"
    assert code_of(lambda: wire.start(Send(0, torch.zeros(1, device="meta")))) == "PL206"
    with pytest.raises(ValueError, match="contiguous"):
        wire.broadcast(torch.zeros(3, 3).T)
    for number in range(510):
        wire.start(AllGather(torch.zeros(1), str(number))).wait()
    assert code_of(lambda: [wire.start(AllGather(torch.zeros(1), str(n))).wait() for n in range(510, 520)]) == "PL206"
    wire.close()
    os.close(fd)


def test_an_arena_is_joined_once_and_by_ranks_of_one_size() -> None:
    board, fd = Board.private(3), arena.create()
    wire = ShmWire(fd, 1, 2, board, board.activity(1))
    assert code_of(lambda: ShmWire(fd, 1, 2, board, board.activity(1))) == "PL411"
    assert code_of(lambda: ShmWire(fd, 0, 3, board, board.activity(0))) == "PL411"
    wire.close()
    os.close(fd)


def test_ranks_are_called_by_their_names_on_the_board() -> None:
    board, fd = Board.private(4), arena.create()
    left, right = (ShmWire(fd, r, 2, board, board.activity(r + 2), names=(2, 3)) for r in (0, 1))
    right.close()
    with pytest.raises(PeerLost, match="rank 3 closed its wire while rank 2 waited"):
        left.barrier("together")
    left.close()
    os.close(fd)


def test_two_wires_in_one_process_need_no_waiting() -> None:
    """Starting and polling is enough; what is done is forgotten."""
    board, fd = Board.private(2), arena.create()
    wires = [ShmWire(fd, r, 2, board, board.activity(r), kernel="c") for r in (0, 1)]
    for dtype in (torch.float32, torch.bfloat16):
        buffers = [wire.cut(wire.allocate(1000, dtype, CPU), [1000], [1])[0] for wire in wires]
        for _ in range(3):
            works = []
            for wire, buffer in zip(wires, buffers, strict=True):
                buffer.tensor.fill_(wire.rank + 1)
                works.append(wire.start(AllReduce(buffer, [1.0])))
            assert [work.poll() for work in works] == [False, True]
            assert [work.poll() for work in works] == [True, True]
            assert all(buffer.tensor.eq(3).all() for buffer in buffers)
    for wire in wires:
        wire.close()
    os.close(fd)


# ---- memory ---------------------------------------------------------------------------------------------------------
def test_an_arena_that_is_too_small() -> None:
    wire, fd = alone(8 << 20)
    assert code_of(lambda: wire.allocate(1 << 20, torch.float32, CPU)) == "PL405"
    assert code_of(lambda: wire.start(AllGather(torch.zeros(1 << 20)))) == "PL405"
    assert wire.gather_bytes("goes on", b"x" * 3_000_000) == [b"x" * 3_000_000]
    wire.close()
    os.close(fd)
    tiny, board = arena.create(1 << 12), Board.private(1)
    assert code_of(lambda: ShmWire(tiny, 0, 1, board, board.activity(0))) == "PL405"
    os.close(tiny)


def test_a_machine_that_is_too_small() -> None:
    wire, fd = alone()
    nbytes = psutil.virtual_memory().total + (1 << 30)
    assert code_of(lambda: wire.allocate(nbytes // 4, torch.float32, CPU)) == "PL405"
    assert wire.allocate(10, torch.float32, CPU).tensor.tolist() == [0.0] * 10
    wire.close()
    os.close(fd)


def limited(peer: Peer) -> list[str]:
    """The system refuses pages beyond a limit: in the heap by the rule for file sizes, whoever is asked."""
    wire = open_wire(peer, "c")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    refused = [outcome(lambda: wire.gather_bytes("all", b"some"))["code"]]
    refused.append(outcome(lambda: wire.start(AllGather(torch.zeros(9))))["code"])
    refused.append(outcome(lambda: os.close(arena.create(1 << 30)))["code"])
    os.close(arena.create(1 << 19))
    return refused


def test_a_limit_of_the_system_is_an_error_and_no_signal() -> None:
    assert run_peers(limited, 1) == [["PL405", "PL405", "PL405"]]


# ---- coming and going -----------------------------------------------------------------------------------------------
def use_and_close(kernel: Any) -> None:
    wire, fd = alone(kernel=kernel)
    buffer = wire.cut(wire.allocate(100_000, torch.float32, CPU), [100_000], [1])[0]
    tensor = buffer.tensor.fill_(2.0)
    work = wire.start(AllReduce(buffer, [1.0], 3.0))
    work.wait()
    wire.close()
    wire.close()
    assert (work.poll(), work.wait()) == (True, [1.0])
    assert code_of(lambda: wire.start(AllReduce(buffer, [1.0]))) == "PL410"
    assert code_of(lambda: wire.barrier("no more")) == "PL410"
    os.close(fd)
    assert tensor.add_(1.0).sum() == 700_000.0


@pytest.mark.parametrize("kernel", ["c", "pure"])
def test_close_gives_everything_back_but_tensors(kernel: str) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    use_and_close(kernel)
    gc.collect()  # the exceptions that the test caught hold frames
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def join_by_handle(peer: Peer) -> list[int]:
    """Ranks without a common parent: rank 0 makes an arena and tells the others where it is."""
    wire = open_wire(peer, "c")
    fd = arena.create() if peer.rank == 0 else -1
    handle = wire.gather_bytes("handle", arena.share_handle(fd).encode())[0].decode()
    if peer.rank != 0:
        fd = arena.open_handle(handle)
    second = ShmWire(fd, peer.rank, peer.size, peer.board, peer.activity)
    pids = [int(pid) for pid in second.gather_bytes("pids", b"%d" % os.getpid())]
    second.close()
    wire.close()
    return pids


def test_an_arena_can_be_opened_by_its_handle() -> None:
    first, second = run_peers(join_by_handle, 2)
    assert first == second
    assert len(set(first)) == 2
    assert code_of(lambda: arena.open_handle("/proc/1/fd/987654")) == "PL411"
