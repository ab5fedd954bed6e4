"""Where processes of a test meet: on the tcp wire, through a lobby each, of which they tell each other through files."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest

from paceline.group.lines import is_local
from paceline.group.lobby import Lobby
from paceline.group.tcp_wire import TcpWire
from support.peers import Peer

SECRET = bytes(range(32))
_PATIENCE_S = 30.0


def elsewhere() -> str:
    """An address of this machine that is not the loopback's; without one the test is skipped."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("203.0.113.1", 9))  # nothing is sent
        found = str(probe.getsockname()[0])
        if not is_local(socket.AF_INET, (found, 0)):
            return found
    pytest.skip("this machine has no address but the loopback's")


def enter(peer: Peer, address: str = "tcp:127.0.0.1:0") -> tuple[Lobby, list[str]]:
    """This peer's lobby, and everybody's address."""
    lobby = Lobby(address.format(rank=peer.rank, pid=os.getpid()), SECRET)
    mine = peer.directory / f"address{peer.rank}"
    mine.with_suffix(".new").write_text(lobby.address)
    mine.with_suffix(".new").rename(mine)
    deadline = time.monotonic() + _PATIENCE_S
    files = [peer.directory / f"address{rank}" for rank in range(peer.size)]
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "not all have come"
        time.sleep(0.002)
    return lobby, [file.read_text() for file in files]


def join_tcp(peer: Peer, lobby: Lobby, addresses: Sequence[str], epoch: int = 1, **settings: Any) -> TcpWire:
    """This peer's wire."""
    return TcpWire(addresses, peer.rank, SECRET, epoch, lobby, peer.activity, **settings)
