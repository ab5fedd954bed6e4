"""Ranks that somebody else has started find each other, their hosts, and the wire that fits."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch

from paceline.group import arena
from paceline.launch import connect
from paceline.terms.errors import WireError
from paceline.terms.event import Event
from paceline.terms.plan import Place, Plan
from support.peers import Peer, outcome, run_peers

CPU = torch.device("cpu")


def meet(peer: Peer, hosts: list[int], port: int, wire: str = "auto", unable: int = -1) -> Any:
    """Open a wire on a pretended host; its name, what everybody said on it, what was noticed, and who listens at the end."""
    host = hosts[peer.rank]
    connect.host_identity = lambda: f"host {host}"
    if peer.rank == unable:
        arena.create = arena.open_handle = _refuse
    store = f"tcp:127.0.0.1:{port}/run/0"
    place = Place(peer.rank, len(hosts), launcher="torchrun", store=store, plan=Plan("", wire=wire))  # type: ignore[arg-type]
    notices: list[Event] = []

    def use() -> Any:
        opened = connect.open_wire(place, CPU, peer.activity, peer.board, notices.append)
        said = opened.gather_bytes("hello", str(peer.rank).encode())
        opened.barrier("goodbye")
        name = opened.name
        opened.close()
        return [name, [raw.decode() for raw in said], [event.data["message"] for event in notices]]

    return outcome(use)


def _refuse(*_: object) -> int:
    raise WireError("PL405", "no memory for anybody")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("hosts", "wire", "name"),
    [
        ([0, 0], "auto", "shm"),
        ([0, 0], "torch", "torch"),
        ([0, 1], "auto", "torch"),
        ([0, 1, 0, 1], "auto", "hierarchical"),
    ],
    ids=["one host", "one host, c10d asked for", "a host each", "two hosts, ranks dealt in turn"],
)
def test_the_wire_that_fits(hosts: list[int], wire: str, name: str, port: int) -> None:
    said = [str(rank) for rank in range(len(hosts))]
    assert run_peers(meet, len(hosts), hosts=hosts, port=port, wire=wire) == [{"value": [name, said, []]}] * len(hosts)


@pytest.mark.parametrize("unable", [0, 1], ids=["the first of the host", "its neighbour"])
def test_who_cannot_share_memory_takes_all_along_and_says_so(unable: int, port: int) -> None:
    first, second = run_peers(meet, 2, hosts=[0, 0], port=port, unable=unable)
    assert first["value"][:2] == second["value"][:2] == ["torch", ["0", "1"]]
    assert "memory cannot be shared" in first["value"][2][0]
    assert "no memory for anybody" in first["value"][2][0]
    assert second["value"][2] == []


def test_shared_memory_that_was_asked_for_is_not_replaced(port: int) -> None:
    results = run_peers(meet, 2, hosts=[0, 0], port=port, wire="shm", unable=1)
    assert [result["code"] for result in results] == ["PL405", "PL405"]


def test_nobody_at_the_address(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "JOIN", timedelta(seconds=1))
    with pytest.raises(WireError, match=f"127.0.0.1:{port}") as refused:
        connect.join_store(f"tcp:127.0.0.1:{port}/x", 1, 2)
    assert refused.value.code == "PL411"


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(WireError, match=f"cannot listen on 127.0.0.1:{port}") as refused:
            connect.join_store(f"tcp:127.0.0.1:{port}/x", 0, 2)
    assert refused.value.code == "PL407"


def serve(peer: Peer, port: int) -> list[str]:
    store = connect.join_store(f"tcp:127.0.0.1:{port}/x", 0, 1)
    store.set("key", "value")
    return sorted(connect.listening())


def test_the_store_listens_on_its_address_only(port: int) -> None:
    """c10d left to itself listens on all interfaces."""
    assert run_peers(serve, 1, port=port) == [[f"127.0.0.1:{port}"]]


def test_listening_sockets_are_seen() -> None:
    before = connect.listening()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("::1", 0), family=socket.AF_INET6) as two:
        expected = {f"127.0.0.1:{one.getsockname()[1]}", f"::1:{two.getsockname()[1]}"}
        assert connect.listening() - before == expected
    assert connect.listening() == before


def test_two_processes_of_this_host_have_one_identity() -> None:
    assert run_peers(identity, 2) == [connect.host_identity()] * 2
    assert connect.numbered(["b", "a", "b"]) == (0, 1, 0)


def identity(peer: Peer) -> str:
    assert os.getpid() == peer.board.read(peer.rank).pid
    return connect.host_identity()
