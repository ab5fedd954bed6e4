"""The tcp wire between real processes, over sockets of every kind."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from paceline.group import roll
from paceline.group.channels import EAGER, EARLY
from paceline.group.lobby import Lobby
from paceline.group.secure import connect
from paceline.group.tcp_wire import TcpWire
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Request, Send, Together
from paceline.terms.activity import Board
from support.meeting import SECRET, elsewhere, enter, join_tcp
from support.peers import Mark, Peer, outcome, run_peers

CPU = torch.device("cpu")
PROMPTLY = 1.0


@contextmanager
def wired(peer: Peer, address: str = "tcp:127.0.0.1:0", **settings: Any) -> Iterator[TcpWire]:
    lobby, addresses = enter(peer, address)
    wire = join_tcp(peer, lobby, addresses, **settings)
    try:
        yield wire
    finally:
        wire.close()
        lobby.close()


def buffers(wire: TcpWire, dtype: torch.dtype, numels: list[int], header_size: int) -> list[Buffer]:
    region = wire.allocate(sum(numels), dtype, CPU)
    return wire.cut(region, numels, [header_size] * len(numels))


# ---- what all wires do ------------------------------------------------------------------------------------------------
PLACES = {2: "unix:@pl-{pid}-{rank}", 3: "tcp:elsewhere:0", 4: "tcp:127.0.0.1:0"}
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def conform(peer: Peer, address: str) -> dict[str, Any]:
    with wired(peer, address) as wire:
        return {
            "sums": reduce_buckets(wire),
            "long": reduce_noise(wire),
            "cut": cut_again(wire),
            "carried": carry(wire),
            "met": say_where(wire),
        }


@cache
def conformance(size: int) -> list[dict[str, Any]]:
    """What each rank has seen, with so many of them: on unix sockets, in TLS, on the loopback."""
    address = PLACES[size].replace("elsewhere", elsewhere()) if size == 3 else PLACES[size]
    return run_peers(conform, size, address=address)


def reduce_buckets(wire: TcpWire) -> dict[str, Any]:
    """Buckets of all lengths under way at once. Rank r weighs r + 1; its gradient is the element's index plus r."""
    found = {}
    weight, divisor = wire.rank + 1.0, float(wire.size)
    for dtype in DTYPES:
        cut = buffers(wire, getattr(torch, dtype), [5, 0, 1, 1000, EAGER], 4)
        for buffer in cut:
            buffer.tensor.copy_((torch.arange(buffer.tensor.numel()) % 8 + wire.rank) * weight / divisor)
        header = [weight, 1.0, float(1 << 20), 0.0]
        works = [wire.start(AllReduce(buffer, header, divisor)) for buffer in cut]
        sums = [work.wait() for work in works]
        assert all(work.poll() and work.wait() == s for work, s in zip(works, sums, strict=True))
        found[dtype] = [sums, [buffer.tensor[:1000].tolist() for buffer in cut]]
    return found


@pytest.mark.parametrize("size", PLACES)
def test_weighted_means_and_headers(size: int) -> None:
    results = [found["sums"] for found in conformance(size)]
    assert all(result == results[0] for result in results), "ranks hold different bits"
    total = sum(range(1, size + 1))
    shift = sum(r * (r + 1) for r in range(size)) / total
    for dtype, (sums, payloads) in results[0].items():
        assert sums == [[float(total), float(size), float(size << 20), 0.0]] * 5
        for payload, numel in zip(payloads, [5, 0, 1, 1000, 1000], strict=True):
            expected = (torch.arange(numel) % 8 + shift).to(getattr(torch, dtype))
            torch.testing.assert_close(torch.tensor(payload, dtype=expected.dtype), expected)


def reduce_noise(wire: TcpWire) -> list[int]:
    """Three long buckets of noise, waited for from the last to the first; a number that depends on every bit."""
    cut = buffers(wire, torch.float32, [700_001, 200_000, 400_001], 2)
    for number, buffer in enumerate(cut):
        noise = torch.Generator().manual_seed(number * 10 + wire.rank)
        buffer.tensor.copy_(torch.randn(buffer.tensor.numel(), generator=noise))
    works = [wire.start(AllReduce(buffer, [1.0, 2.0])) for buffer in cut]
    assert [work.wait() for work in reversed(works)] == [[wire.size, 2.0 * wire.size]] * 3
    return [int((b.tensor.view(torch.int32).long() * (torch.arange(b.tensor.numel()) % 997)).sum()) for b in cut]


@pytest.mark.parametrize("size", PLACES)
def test_long_buckets_have_the_same_bits_on_all_ranks(size: int) -> None:
    results = [found["long"] for found in conformance(size)]
    assert results == [results[0]] * size


def cut_again(wire: TcpWire) -> list[Any]:
    region = wire.allocate(100, torch.float32, CPU)
    first = wire.cut(region, [100], [7])
    second = wire.cut(region, [33, 33, 34], [2, 3, 4])
    for buffer in second:
        buffer.tensor.fill_(1.0)
    sums = [wire.start(AllReduce(buffer, [1.0] * buffer.header_size)).wait() for buffer in second]
    return [[b.key - first[0].key for b in first + second], sums, [b.tensor.sum().item() for b in second]]


def test_a_region_can_be_cut_anew() -> None:
    expected = [[0, 1, 2, 3], [[2.0] * 2, [2.0] * 3, [2.0] * 4], [66.0, 66.0, 68.0]]
    assert [found["cut"] for found in conformance(2)] == [expected] * 2


def carry(wire: TcpWire) -> dict[str, Any]:
    rank, right, left = wire.rank, (wire.rank + 1) % wire.size, (wire.rank - 1) % wire.size
    gathered = wire.start(AllGather(torch.full((2, 3), rank, dtype=torch.bfloat16), "x" * 3000)).wait()
    nothing = wire.start(AllGather(torch.empty(0, 3))).wait()
    swap = (Send(right, torch.tensor([rank, 7]), 3), Receive(left, torch.empty(2, dtype=torch.int64), 3))
    empty = (Send(right, torch.empty(0)), Receive(left, torch.empty(0)))
    big = (Send(right, torch.full((300_000,), float(rank))), Receive(left, torch.empty(300_000)))
    tensors = [torch.tensor(value) for value in (rank == 1, 2.5 + rank, [rank + 1j], [[rank] * 2] * 2)]
    for tensor in (*tensors, torch.empty(0)):
        wire.broadcast(tensor, root=1)
    long = bytes([rank]) * (rank * 100_000)
    found = {
        "gathered": [t.tolist() for t in gathered],
        "nothing": [list(t.shape) for t in nothing],
        "swapped": wire.start(Together(swap)).wait()[1].tolist(),
        "empty": wire.start(Together(empty)).wait()[1].tolist(),
        "together": len(wire.start(Together(())).wait()),
        "big": wire.start(Together(big)).wait()[1].unique().tolist(),
        "broadcast": [str(tensor.tolist()) for tensor in tensors],
        "small": [raw.decode() for raw in wire.gather_bytes("names", f"rank {rank}".encode())],
        "long": [len(raw) for raw in wire.gather_bytes("big", long)],
        "whole": wire.gather_bytes("big", long)[1] == b"\1" * 100_000,
    }
    wire.barrier("end")
    return found


@pytest.mark.parametrize("size", PLACES)
def test_what_else_a_wire_carries(size: int) -> None:
    for rank, found in enumerate(conformance(size)):
        assert found["carried"] == {
            "gathered": [[[float(r)] * 3] * 2 for r in range(size)],
            "nothing": [[0, 3]] * size,
            "swapped": [(rank - 1) % size, 7],
            "empty": [],
            "together": 0,
            "big": [float((rank - 1) % size)],
            "broadcast": ["True", "3.5", "[(1+1j)]", "[[1, 1], [1, 1]]"],
            "small": [f"rank {r}" for r in range(size)],
            "long": [r * 100_000 for r in range(size)],
            "whole": True,
        }


def say_where(wire: TcpWire) -> list[Any]:
    tag = "job.sum('loss') at train.py:7" if wire.rank == 1 else "adopt at train.py:3" * 20
    met = outcome(lambda: wire.gather_bytes(tag, b"x" * 1000 * wire.rank))
    return [met, outcome(lambda: wire.barrier("both"))]


def test_ranks_in_different_calls_name_each_other() -> None:
    for found in conformance(3):
        met, after = found["met"]
        assert (met["error"], met["code"]) == ("StepError", "PL402")
        assert met["message"].startswith("ranks 0, 2 are in 'adopt at train.py:3adopt")
        assert "rank 1 is in \"job.sum('loss') at train.py:7\" (call " in met["message"]
        assert after == {"value": None}


# ---- who is ahead ---------------------------------------------------------------------------------------------------
def run_ahead(peer: Peer) -> list[Any]:
    """Rank 0 begins everything at once; rank 1 asks for it one by one, from the other end."""
    left, numbers = [], list(range(40))
    with wired(peer) as wire:
        for numel in (100, 16_000, 200_000):
            if peer.rank == 0:
                works = [wire.start(Send(1, torch.full((numel,), float(n)), n)) for n in numbers]
                for work in works:
                    work.wait()
            else:
                got = [wire.start(Receive(0, torch.empty(numel), n)).wait()[-1].item() for n in reversed(numbers)]
                assert got == [float(n) for n in reversed(numbers)]
            wire.barrier("next")
            left += [wire._peers[0]._early_nbytes] if peer.rank else []
            wire.barrier("seen")
    return left


def test_messages_may_be_asked_for_in_another_order() -> None:
    """Long ones wait at the sender, short ones at the receiver, who holds nothing in the end but who is in the next call."""
    _, left = run_peers(run_ahead, 2)
    assert max(left) <= roll.FRAME


def overflow(peer: Peer) -> list[Any]:
    """Rank 0 sends far more short messages than rank 1 may hold unasked; rank 1 asks for none, at first."""
    short, count = torch.zeros(EAGER // 4), 2000
    with wired(peer) as wire:
        if peer.rank == 0:
            works = [wire.start(Send(1, short, tag)) for tag in [1] * count + [2]]
            for work in works:
                work.wait()
            wire.barrier("end")
            return []
        other, last = wire._peers[0], wire.start(Receive(0, short, 2))  # somebody drives meanwhile
        while other._early_nbytes < EARLY:
            time.sleep(0.01)
        time.sleep(0.1)
        peak, begun = other._early_nbytes, last.poll()
        for _ in range(count):
            wire.start(Receive(0, short, 1)).wait()
        last.wait()
        wire.barrier("end")
        return [peak, begun, other._early_nbytes]


def test_whoever_is_behind_holds_a_bounded_amount() -> None:
    peak, begun, left = run_peers(overflow, 2)[1]
    assert EARLY <= peak <= EARLY + EAGER
    assert (begun, left) == (False, 0)


def meanwhile(peer: Peer) -> float:
    """A transfer goes on while the caller computes: after that there is nothing left to wait for."""
    with wired(peer) as wire:
        (buffer,) = buffers(wire, torch.float32, [500_000], 1)
        wire.barrier("go")
        work = wire.start(AllReduce(buffer, [1.0]))
        deadline = time.monotonic() + 20
        while not work.poll() and time.monotonic() < deadline:
            sum(range(1000))
        done = work.poll()
        wire.barrier("end")
        return done


def test_transfers_go_on_while_nobody_waits() -> None:
    assert run_peers(meanwhile, 2) == [True, True]


def differ(peer: Peer) -> list[str]:
    lobby, addresses = enter(peer)
    codes = []
    for epoch, numel in enumerate((10, 100_000), 1):
        wire = join_tcp(peer, lobby, addresses, epoch)
        tensor = torch.zeros(numel + peer.rank)
        codes.append(outcome(lambda wire=wire, tensor=tensor: wire.start(AllGather(tensor, "x")).wait())["code"])
        wire.close()
    lobby.close()
    return codes


def test_ranks_with_different_tensors_do_not_add_them() -> None:
    """Whoever sees it first says so, the other may only see that the connection ends."""
    for codes in zip(*run_peers(differ, 2), strict=True):
        assert "PL402" in codes
        assert set(codes) <= {"PL402", "PL403"}


def refuse(peer: Peer) -> list[Any]:
    with wired(peer) as wire:
        found = [outcome(lambda: wire.allocate_shared(4, torch.float32)), outcome(lambda: wire.start(Request()))]
        found += [outcome(lambda: wire.allocate(1 << 60, torch.float32, CPU))]
        found += [outcome(lambda: wire.allocate(1, torch.float32, torch.device("meta")))]
        with pytest.raises(ValueError, match="contiguous"):
            wire.broadcast(torch.zeros(4, 4).t()[:2])
        wire.barrier("still alive")
        wire.close()
        wire.close()
        return [error["code"] for error in [*found, outcome(lambda: wire.barrier("x"))]]


def test_what_it_cannot_do_it_says() -> None:
    assert run_peers(refuse, 2) == [["PL206", "PL206", "PL405", "PL206", "PL404"]] * 2


# ---- losses ---------------------------------------------------------------------------------------------------------
def lose(peer: Peer, how: str, interrupt: bool) -> list[Any]:
    """Rank 1 never comes to the exchange. The others say how it ended for them, and when."""
    settings: dict[str, Any] = {}
    if interrupt:
        settings = {"interrupted": lambda: peer.board.stop_requested}
    with wired(peer, **settings) as wire:
        (buffer,) = buffers(wire, torch.float32, [1000], 1)
        wire.barrier("together")
        if peer.rank == 1:
            peer.halt("here")
        request: Any = {"sum": AllReduce(buffer, [1.0]), "message": Receive(1, buffer.tensor)}[how]
        peer.mark("waits")
        ended = outcome(lambda: wire.start(request).wait())
        at = time.monotonic()
        again = outcome(lambda: wire.barrier("after"))["code"]
        wire.close()
        peer.mark("raised")
        return [ended, again, at, time.monotonic() - at]


class Parent:
    """What the test does at the marks: when all others wait, rank 1 gets `number`; then what else is asked for."""

    def __init__(self, size: int, number: int, then: str = "") -> None:
        self.size, self.number, self.then = size, number, then
        self.points: list[str] = []
        self.at = 0.0

    def __call__(self, mark: Mark) -> None:
        self.points.append(mark.point)
        if mark.point != "raised" and len(self.points) == self.size:  # rank 1 is here, all others wait
            mark.kill(1, self.number)
            self.at = time.monotonic()
            if self.then == "interrupt":
                mark.board.request_stop()
            elif self.then:
                mark.board.abort(int(self.then))
        if self.number == signal.SIGSTOP and self.points.count("raised") == self.size - 1:
            mark.kill(1)


@pytest.mark.parametrize(("size", "how"), [(2, "message"), (4, "sum")])
def test_a_killed_peer_is_noticed_by_all(size: int, how: str) -> None:
    parent = Parent(size, signal.SIGKILL)
    results = run_peers(lose, size, how=how, interrupt=False, on_mark=parent)
    for ended, again, at, closing in results[:1] + results[2:]:
        assert (ended["error"], ended["code"]) == ("PeerLost", "PL403")
        assert again == "PL403"
        assert at - parent.at < PROMPTLY
        assert closing < PROMPTLY


@pytest.mark.parametrize(
    ("then", "error"),
    [("interrupt", ("PeerLost", "PL403")), ("-1", ("Aborted", "PL404"))],
)
def test_nobody_waits_for_a_frozen_peer_when_the_epoch_is_over(then: str, error: tuple[str, str]) -> None:
    parent = Parent(3, signal.SIGSTOP, then)
    results = run_peers(lose, 3, how="sum", interrupt=True, on_mark=parent)
    for ended, _, at, closing in (results[0], results[2]):
        assert (ended["error"], ended["code"]) == error
        assert at - parent.at < PROMPTLY
        assert closing < PROMPTLY


def lose_in_the_middle(peer: Peer, seconds: float) -> list[Any]:
    """All-reduce again and again, far more than sockets hold at a time, until somebody is gone."""
    with wired(peer) as wire:
        (buffer,) = buffers(wire, torch.float32, [2_000_000], 1)
        wire.barrier("together")
        if peer.rank == 1:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        peer.mark("begins")
        while True:
            ended = outcome(lambda: wire.start(AllReduce(buffer, [1.0])).wait())
            if "error" in ended:
                return [ended["code"], time.monotonic()]


def test_a_peer_that_dies_in_the_middle_of_a_sum() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    seconds = random.Random(seed).uniform(0.05, 0.4)
    began: list[float] = []
    results = run_peers(
        lose_in_the_middle, 3, seconds=seconds, on_mark=lambda m: began.append(m.at) if m.rank == 1 else None
    )
    assert results[1] is None
    for code, at in (results[0], results[2]):
        assert code == "PL403"
        assert at - began[0] - seconds < PROMPTLY


def abort_myself(peer: Peer) -> dict[str, Any]:
    with wired(peer) as wire:
        wire.barrier("together")
        if peer.rank == 1:
            peer.halt("here")
        (buffer,) = buffers(wire, torch.float32, [1000], 1)
        work = wire.start(AllReduce(buffer, [1.0]))
        threading.Timer(0.05, wire.abort).start()
        ended = outcome(work.wait)
        wire.close()
        peer.mark("raised")
        return ended


def test_abort_from_another_thread() -> None:
    def on_mark(mark: Mark) -> None:
        mark.kill(1, signal.SIGSTOP if mark.point == "here" else signal.SIGKILL)

    ended = run_peers(abort_myself, 2, on_mark=on_mark)[0]
    assert (ended["error"], ended["code"]) == ("Aborted", "PL404")


def corrupt(peer: Peer) -> str:
    """A bit flips in a long sum: rank 1 is reached through somebody who does that."""
    lobby, addresses = enter(peer)
    if peer.rank == 1:
        _, host, port = addresses[0].split(":")
        door = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=_flip_one, args=(door, (host, int(port)), 3_000_000))
        thread.start()
        addresses[0] = f"tcp:127.0.0.1:{door.getsockname()[1]}"
    wire = join_tcp(peer, lobby, addresses)
    (buffer,) = buffers(wire, torch.float32, [2_000_000], 1)
    ended = outcome(lambda: wire.start(AllReduce(buffer, [1.0])).wait())
    wire.close()
    lobby.close()
    if peer.rank == 1:
        thread.join()
    return str(ended)


def _flip_one(door: socket.socket, address: tuple[str, int], at: int) -> None:
    client, _ = door.accept()
    with door, client, socket.create_connection(address) as server:
        ways, seen = {client: server, server: client}, 0
        while ways:
            for end in select.select(list(ways), [], [])[0]:
                try:
                    data = bytearray(end.recv(1 << 16))
                    if end is client and seen <= at < seen + len(data):
                        data[at - seen] ^= 4
                    seen += len(data) if end is client else 0
                    ways[end].sendall(data)
                except OSError:
                    data = bytearray()
                if not data:
                    return


def test_a_flipped_bit_ends_the_exchange_and_not_the_process() -> None:
    results = run_peers(corrupt, 2)
    assert all("'PL403'" in said for said in results)
    assert "damaged on the way" in results[0]


# ---- epochs ---------------------------------------------------------------------------------------------------------
def change_epochs(peer: Peer) -> list[Any]:
    """Ten epochs in the same lobbies; what this process holds after each."""
    lobby, addresses = enter(peer)
    counts = []
    for epoch in range(1, 11):
        wire = join_tcp(peer, lobby, addresses, epoch)
        (buffer,) = buffers(wire, torch.float32, [1000], 1)
        work = wire.start(AllReduce(buffer, [1.0]))
        wire.barrier("go")
        work.wait()
        wire.close()
        del wire
        counts.append([len(os.listdir("/proc/self/fd")), threading.active_count()])
    lobby.close()
    return counts


def test_epochs_follow_each_other_and_leave_nothing() -> None:
    for counts in run_peers(change_epochs, 3):
        (first, threads), (last, _) = counts[0], counts[-1]
        assert last <= first  # after the first, others may be here for the second
        assert {number for _, number in counts} == {threads}


@pytest.fixture
def lobby() -> Iterator[Lobby]:
    lobby = Lobby("unix:@pl-test-lobby", SECRET)
    yield lobby
    lobby.close()


def knock(lobby: Lobby, **about: Any) -> str:
    """Come into the lobby; how that ends."""
    ended = outcome(lambda: connect(lobby.address, SECRET, about.pop("role", "peer"), about=about))
    if "value" in ended:
        ended.pop("value").close()
    return str(ended.get("message", ""))


def test_connections_of_another_epoch_are_refused(lobby: Lobby) -> None:
    lobby.open(5)
    whom: dict[str, Any] = {"from": 1, "to": 0}
    assert "epoch 4 is over, and epoch 5 has begun" in knock(lobby, epoch=4, **whom)
    for about in (
        {},
        {"epoch": 5},
        {"epoch": "5", **whom},
        {"epoch": 5, **whom, "role": "worker"},
        {"epoch": True, **whom},
    ):
        assert "no member" in knock(lobby, **about)
    assert [knock(lobby, epoch=number, **whom) for number in (5, 5, 6)] == [""] * 3
    for epoch in (5, 6):
        connection = lobby.take(epoch, 1, 0, 5.0)
        assert connection is not None
        connection.close()
    assert lobby.take(6, 2, 0, 0.01) is None
    assert "connected already" in knock(lobby, epoch=6, **whom)
    lobby.open(7)
    assert "over" in knock(lobby, epoch=6, **whom)
    assert knock(lobby, epoch=8, **whom) == ""  # waits; closed with the lobby


def test_an_epoch_without_the_others_does_not_begin(lobby: Lobby) -> None:
    activity = Board.private(2).activity(0)
    begin = time.monotonic()
    ended = outcome(lambda: TcpWire([lobby.address, "unix:@pl-nobody"], 0, SECRET, 1, lobby, activity, join=0.1))
    assert (ended["error"], ended["code"]) == ("PeerLost", "PL403")
    ended = outcome(lambda: TcpWire(["unix:@pl-nobody", lobby.address], 1, SECRET, 1, lobby, activity))
    assert (ended["error"], ended["code"]) == ("PeerLost", "PL403")
    addresses = [lobby.address, "unix:@pl-nobody"]
    ended = outcome(lambda: TcpWire(addresses, 0, SECRET, 1, lobby, activity, evicted=lambda: [1]))
    assert (ended["code"], "no longer a member" in ended["message"]) == ("PL403", True)
    activity.board.abort()
    assert outcome(lambda: TcpWire(addresses, 0, SECRET, 1, lobby, activity))["code"] == "PL404"
    assert time.monotonic() - begin < 5.0


# ---- nothing becomes code -------------------------------------------------------------------------------------------
SUSPECT = {"exec", "compile", "marshal.loads", "marshal.load", "pickle.find_class", "code.__new__", "os.system"}


def watched(peer: Peer) -> list[str]:
    """Everything the wire does, once to load what is loaded late, then watched by the interpreter itself."""
    happened: list[str] = []
    watching = threading.Event()

    def hook(event: str, args: Any) -> None:
        if watching.is_set() and (event in SUSPECT or event.startswith("subprocess")):
            happened.append(event)

    sys.addaudithook(hook)
    lobby, addresses = enter(peer)
    for epoch in (1, 2):
        wire = join_tcp(peer, lobby, addresses, epoch)
        (buffer,) = buffers(wire, torch.float32, [100_000], 1)
        wire.start(AllReduce(buffer, [1.0])).wait()
        wire.start(AllGather(torch.ones(3))).wait()
        wire.broadcast(buffer.tensor)
        wire.gather_bytes("names", b"x" * 2000)
        wire.close()
        watching.set()
    eval("1")  # the hook works
    lobby.close()
    return happened


def test_nothing_that_comes_over_the_wire_is_run() -> None:
    assert run_peers(watched, 2) == [["compile", "exec"]] * 2
