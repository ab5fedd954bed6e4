"""The torch wire between real processes, over gloo on the loopback interface."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch

from paceline.group import roll
from paceline.group.torch_wire import TorchWire
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Request, Send, Together
from paceline.terms.errors import StepError
from support.breadth import more
from support.peers import Mark, Peer, outcome, run_peers
from support.rendezvous import join, rendezvous

CPU = torch.device("cpu")
PROMPTLY = 2.0  # seconds; gloo's own timeout is 30 in these tests


def run(function: Any, size: int, **arguments: Any) -> list[Any]:
    with rendezvous() as server:
        return run_peers(function, size, store=str(server.path), **arguments)


def buffers(wire: TorchWire, dtype: torch.dtype, numels: list[int], header_size: int) -> list[Buffer]:
    region = wire.allocate(sum(numels), dtype, CPU)
    return wire.cut(region, numels, [header_size] * len(numels))


# ---- sums -----------------------------------------------------------------------------------------------------------
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def reduce_buckets(peer: Peer, store: str) -> dict[str, Any]:
    """Three buckets under way at once. Rank r weighs r + 1; its gradient is the element's index plus r."""
    wire = join(peer, store)
    weight, divisor = peer.rank + 1.0, float(peer.size)
    found = {}
    for dtype in DTYPES:
        cut = buffers(wire, getattr(torch, dtype), [5, 0, 1000], 4)
        for buffer in cut:
            buffer.tensor.copy_((torch.arange(buffer.tensor.numel()) % 8 + peer.rank) * weight / divisor)
        header = [weight, 1.0, float(1 << 20), 0.0]
        works = [wire.start(AllReduce(buffer, header, divisor)) for buffer in cut]
        sums = [work.wait() for work in works]
        assert all(work.poll() and work.wait() == s for work, s in zip(works, sums, strict=True))
        found[dtype] = [sums, [buffer.tensor.tolist() for buffer in cut]]
    wire.close()
    return found


@pytest.mark.parametrize("size", [4, *more(2, 3)])
def test_weighted_means_and_headers(size: int) -> None:
    results = run(reduce_buckets, size)
    assert all(result == results[0] for result in results), "ranks hold different bits"
    total = sum(range(1, size + 1))
    shift = sum(r * (r + 1) for r in range(size)) / total
    for dtype, (sums, payloads) in results[0].items():
        assert sums == [[float(total), float(size), float(size << 20), 0.0]] * 3
        for payload, numel in zip(payloads, [5, 0, 1000], strict=True):
            expected = (torch.arange(numel) % 8 + shift).to(getattr(torch, dtype))
            torch.testing.assert_close(torch.tensor(payload, dtype=expected.dtype), expected)


def reduce_without_divisor(peer: Peer, store: str) -> list[Any]:
    wire = join(peer, store)
    found = []
    for weight, divisor in ((0.0, 5.0), (2.0, None), (2.0, 2.0 * peer.size), (1.5, 1.0)):
        (buffer,) = buffers(wire, torch.float32, [3], 1)
        buffer.tensor.fill_(1.0 + peer.rank)
        found.append([wire.start(AllReduce(buffer, [weight], divisor)).wait(), buffer.tensor.tolist()])
    wire.close()
    return found


def test_the_divisor_is_left_out_when_it_changes_nothing() -> None:
    expected = [[[0.0], [3.0] * 3], [[4.0], [3.0] * 3], [[4.0], [3.0] * 3], [[3.0], [1.0] * 3]]
    assert run(reduce_without_divisor, 2) == [expected] * 2


def cut_again(peer: Peer, store: str) -> list[Any]:
    wire = join(peer, store)
    region = wire.allocate(100, torch.float32, CPU)
    first = wire.cut(region, [100], [7])
    second = wire.cut(region, [33, 33, 34], [2, 3, 4])
    for buffer in second:
        buffer.tensor.fill_(1.0)
    sums = [wire.start(AllReduce(buffer, [1.0] * buffer.header_size)).wait() for buffer in second]
    wire.close()
    inside = all(
        buffer.tensor.untyped_storage().data_ptr() == region.tensor.untyped_storage().data_ptr() for buffer in second
    )
    return [[b.key for b in first + second], sums, [b.tensor.sum().item() for b in second], inside]


def test_a_region_can_be_cut_anew() -> None:
    assert run(cut_again, 2) == [[[0, 1, 2, 3], [[2.0] * 2, [2.0] * 3, [2.0] * 4], [66.0, 66.0, 68.0], True]] * 2


# ---- everything else that is carried --------------------------------------------------------------------------------
def carry(peer: Peer, store: str) -> dict[str, Any]:
    wire = join(peer, store)
    right, left = (peer.rank + 1) % peer.size, (peer.rank - 1) % peer.size
    gathered = wire.start(AllGather(torch.full((2, 3), peer.rank, dtype=torch.bfloat16), "x")).wait()
    nothing = wire.start(AllGather(torch.empty(0, 3))).wait()
    swap = (Send(right, torch.tensor([peer.rank, 7]), 3), Receive(left, torch.empty(2, dtype=torch.int64), 3))
    tensors = [
        torch.tensor(value) for value in (peer.rank == 1, 2.5 + peer.rank, [peer.rank + 1j], [[peer.rank] * 2] * 2)
    ]
    for tensor in (*tensors, torch.empty(0)):
        wire.broadcast(tensor, root=1)
    big = bytes([peer.rank]) * (peer.rank * 100_000)
    found = {
        "gathered": [t.tolist() for t in gathered],
        "nothing": [list(t.shape) for t in nothing],
        "swapped": wire.start(Together(swap)).wait()[1].tolist(),
        "broadcast": [str(tensor.tolist()) for tensor in tensors],
        "small": [raw.decode() for raw in wire.gather_bytes("names", f"rank {peer.rank}".encode())],
        "big": [len(raw) for raw in wire.gather_bytes("big", big)],
        "whole": wire.gather_bytes("big", big)[1] == b"\1" * 100_000,
    }
    wire.barrier("end")
    wire.close()
    return found


@pytest.mark.parametrize("size", [4, *more(2, 3)])
def test_what_else_a_wire_carries(size: int) -> None:
    for rank, found in enumerate(run(carry, size)):
        assert found == {
            "gathered": [[[float(r)] * 3] * 2 for r in range(size)],
            "nothing": [[0, 3]] * size,
            "swapped": [(rank - 1) % size, 7],
            "broadcast": ["True", "3.5", "[(1+1j)]", "[[1, 1], [1, 1]]"],
            "small": [f"rank {r}" for r in range(size)],
            "big": [r * 100_000 for r in range(size)],
            "whole": True,
        }


def say_where(peer: Peer, store: str) -> list[Any]:
    wire = join(peer, store)
    tag = "job.sum('loss') at train.py:7" if peer.rank == 1 else "adopt at train.py:3" * 20
    met = outcome(lambda: wire.gather_bytes(tag, b"x" * 1000 * peer.rank))
    after = outcome(lambda: wire.barrier("both"))
    wire.close()
    return [met, after]


def test_ranks_in_different_calls_name_each_other() -> None:
    for met, after in run(say_where, 3):
        assert (met["error"], met["code"]) == ("StepError", "PL402")
        assert met["message"].startswith("ranks 0, 2 are in 'adopt at train.py:3adopt")
        assert "rank 1 is in \"job.sum('loss') at train.py:7\" (call 2)" in met["message"]
        assert after == {"value": None}


def test_a_frame_shows_tag_and_payload() -> None:
    frame = roll.unpack(roll.pack(3, "tag" * 100, b"payload"))
    assert (frame.operation, frame.inline, frame.complete) == (3, b"payload", True)
    assert frame.tag == ("tag" * 100)[:200]
    assert not roll.unpack(roll.pack(3, "", bytes(roll.FRAME))).complete
    with pytest.raises(StepError, match=r"rank 4 is in 'a' \(call 1\); rank 6 is in 'a' \(call 2\)"):
        roll.check([roll.unpack(roll.pack(number, "a", b"")) for number in (1, 2)], [4, 6])


def refuse(peer: Peer, store: str) -> list[Any]:
    wire = join(peer, store)
    found = [outcome(lambda: wire.allocate_shared(4, torch.float32)), outcome(lambda: wire.start(Request()))]
    found += [outcome(lambda: wire.allocate(1 << 60, torch.float32, CPU))]
    wire.close()
    wire.close()
    return [error["code"] for error in [*found, outcome(lambda: wire.barrier("x"))]]


def test_what_it_cannot_do_it_says() -> None:
    assert run(refuse, 2) == [["PL206", "PL206", "PL405", "PL404"]] * 2


# ---- what we rely on in gloo -----------------------------------------------------------------------------------------
def wait_twice(peer: Peer, store: str) -> list[Any]:
    """c10d's own collective: rank 1 comes to it only when rank 0 has waited in vain."""
    group, ones = join(peer, store)._groups["cpu"], torch.ones(4)
    said = []
    if peer.rank == 0:
        work = group.allreduce([ones])
        for _ in range(2):
            with pytest.raises(RuntimeError) as refusal:
                work.wait(timedelta(milliseconds=1))
            said.append("imed out" in str(refusal.value) and not work.is_completed())
        peer.mark("in vain")
        work.wait()
    else:
        while not peer.board.stop_requested:
            os.sched_yield()
        group.allreduce([ones]).wait()
    return [said, ones.tolist()]


def test_a_collective_can_be_waited_for_again_after_a_timeout() -> None:
    results = run(wait_twice, 2, on_mark=lambda mark: mark.board.request_stop())
    assert results == [[[True, True], [2.0] * 4], [[], [2.0] * 4]]


# ---- losses ---------------------------------------------------------------------------------------------------------
def lose(peer: Peer, store: str, how: str) -> list[Any]:
    """Rank 1 never comes to the exchange. The others say how it ended for them, and when."""
    wire = join(peer, store)
    (buffer,) = buffers(wire, torch.float32, [1000], 1)
    wire.barrier("together")
    if peer.rank == 1:
        peer.halt("here")
    work: Any = wire.start({"sum": AllReduce(buffer, [1.0]), "message": Receive(1, buffer.tensor)}[how])
    peer.mark("waits")
    ended = outcome(work.wait)
    at = time.monotonic()
    again = [outcome(lambda: wire.barrier("after"))["code"], outcome(work.wait)["code"]]
    wire.close()
    peer.mark("raised")
    return [ended, again, at, time.monotonic() - at]


class Parent:
    """What the test does at the marks: when all others wait, rank 1 gets `number`; then, if asked, the run is aborted."""

    def __init__(self, size: int, number: int, abort: bool, lost: int = 1) -> None:
        self.size, self.number, self.abort, self.lost = size, number, abort, lost
        self.points: list[str] = []
        self.at = 0.0

    def __call__(self, mark: Mark) -> None:
        self.points.append(mark.point)
        if mark.point != "raised" and len(self.points) == self.size:  # rank 1 is here, all others wait
            mark.kill(1, self.number)
            self.at = time.monotonic()
            if self.abort:
                mark.board.abort(self.lost)
        if self.number == signal.SIGSTOP and self.points.count("raised") == self.size - 1:
            mark.kill(1)


@pytest.mark.parametrize(
    ("size", "how", "abort"), [(2, "sum", True), (4, "sum", True), (4, "sum", False), (3, "message", False)]
)
def test_a_killed_peer_is_noticed_by_all(size: int, how: str, abort: bool) -> None:
    """Also without the launcher: who notices cuts its own connections, and so the others notice."""
    parent = Parent(size, signal.SIGKILL, abort)
    results = run(lose, size, how=how, on_mark=parent)
    for ended, again, at, closing in results[:1] + results[2:]:
        assert (ended["error"], ended["code"]) == ("PeerLost", "PL403")
        assert again == ["PL403", "PL403"]
        assert at - parent.at < PROMPTLY
        assert closing < PROMPTLY


@pytest.mark.parametrize(
    ("how", "lost", "error"), [("sum", 1, ("PeerLost", "PL403")), ("message", -1, ("Aborted", "PL404"))]
)
def test_an_abort_frees_those_who_wait_for_a_frozen_peer(how: str, lost: int, error: tuple[str, str]) -> None:
    parent = Parent(3, signal.SIGSTOP, abort=True, lost=lost)
    results = run(lose, 3, how=how, on_mark=parent)
    for ended, _, at, closing in (results[0], results[2]):
        assert (ended["error"], ended["code"]) == error
        assert at - parent.at < PROMPTLY
        assert closing < PROMPTLY


def lose_in_the_middle(peer: Peer, store: str) -> list[Any]:
    """Rank 1 is stopped while it receives far more than sockets hold; only then rank 0 begins to send."""
    wire = join(peer, store)
    big = torch.zeros(40_000_000)
    wire.barrier("together")
    if peer.rank == 1:
        wire.start(Receive(0, big))
        peer.halt("receives")
    while not peer.board.stop_requested:
        os.sched_yield()
    work = wire.start(Send(1, big))
    peer.mark("waits")
    ended = outcome(work.wait)
    at = time.monotonic()
    wire.close()
    closing = time.monotonic() - at
    peer.mark("raised")
    return [ended, at, closing]


@pytest.mark.parametrize("abort", [True, False])
def test_a_loss_in_the_middle_of_a_message(abort: bool) -> None:
    """gloo alone would wait for its timeout here: see [Note: gloo loses operations]."""
    happened = []

    def on_mark(mark: Mark) -> None:
        if mark.point == "receives":
            mark.kill(1, signal.SIGSTOP)
            mark.board.request_stop()
        elif mark.point == "waits":
            happened.append(time.monotonic())
            if abort:
                mark.board.abort(lost=1)
            else:
                mark.kill(1)
        elif abort:
            mark.kill(1)

    ended, at, closing = run(lose_in_the_middle, 2, on_mark=on_mark)[0]
    assert (ended["error"], ended["code"]) == ("PeerLost", "PL403")
    assert at - happened[0] < PROMPTLY
    assert closing < PROMPTLY


def abort_myself(peer: Peer, store: str) -> dict[str, Any]:
    wire = join(peer, store)
    wire.barrier("together")
    if peer.rank == 1:
        peer.halt("here")
    (buffer,) = buffers(wire, torch.float32, [1000], 1)
    work = wire.start(AllReduce(buffer, [1.0]))
    other = threading.Thread(target=wire.abort)
    other.start()
    ended = outcome(work.wait)
    other.join()
    wire.close()
    peer.mark("raised")
    return ended


def test_abort_from_another_thread() -> None:
    def on_mark(mark: Mark) -> None:
        mark.kill(1, signal.SIGSTOP if mark.point == "here" else signal.SIGKILL)

    ended = run(abort_myself, 2, on_mark=on_mark)[0]
    assert (ended["error"], ended["code"]) == ("Aborted", "PL404")


def wait_for_nobody(peer: Peer, store: str) -> dict[str, Any]:
    peer.mark("joins")
    return outcome(lambda: join(peer, store, prefix=f"alone{peer.rank}"))


def test_joining_ends_with_the_rendezvous() -> None:
    """Nobody else comes to these prefixes, and the launcher closes the store."""
    marks: list[Mark] = []
    with rendezvous() as server:

        def on_mark(mark: Mark) -> None:
            marks.append(mark)
            if len(marks) == 2:
                server.close()

        ended = run_peers(wait_for_nobody, 2, store=str(server.path), on_mark=on_mark)
    assert [e["code"] for e in ended] == ["PL411", "PL411"]


# ---- doors and leaks ------------------------------------------------------------------------------------------------
def listening() -> list[str]:
    return [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]


def open_doors(peer: Peer, store: str) -> list[list[str]]:
    found = []
    for prefix, address in (("a", {"hostname": "127.0.0.1"}), ("b", {"hostname": "", "interface": "lo"})):
        wire = join(peer, store, prefix=prefix, **address)
        wire.barrier("open")
        found.append(listening())
        peer.mark("open")
        wire.barrier("seen")
        wire.close()
    return found


def test_only_gloo_listens_and_only_on_the_loopback() -> None:
    before, launcher = listening(), []
    assert run(open_doors, 3, on_mark=lambda mark: launcher.append(listening())) == [[["127.0.0.1"]] * 2] * 3
    assert launcher == [before] * 6


def come_and_go(peer: Peer, store: str) -> list[Any]:
    """Wires that have been used for everything, one after the other; what this process holds after each."""
    counts = []
    for number in range(4):
        wire = join(peer, store, prefix=f"turn{number}")
        (buffer,) = buffers(wire, torch.float32, [1000], 1)
        work = wire.start(AllReduce(buffer, [1.0]))
        wire.barrier("go")
        work.wait()
        swap = (Send(1 - peer.rank, torch.zeros(3)), Receive(1 - peer.rank, torch.zeros(3)))
        wire.start(Together(swap)).wait()
        wire.close()
        del wire
        counts.append([len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))])
    return counts


def test_close_gives_back_descriptors_and_threads() -> None:
    for counts in run(come_and_go, 2):
        assert counts == [counts[0]] * 4


def leave_in_the_middle(peer: Peer, store: str) -> float:
    wire = join(peer, store)
    (buffer,) = buffers(wire, torch.float32, [1000], 1)
    wire.barrier("go")
    if peer.rank == 0:
        wire.start(AllReduce(buffer, [1.0]))
    begin = time.monotonic()
    wire.close()
    return time.monotonic() - begin


def test_close_waits_for_nobody() -> None:
    assert max(run(leave_in_the_middle, 2)) < PROMPTLY
