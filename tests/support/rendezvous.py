"""A rendezvous for tests of the torch wire, served by the test as the launcher would."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from paceline.group.store import UnixStore
from paceline.group.store_server import StoreServer
from paceline.group.torch_wire import TorchWire
from support.peers import Peer

PATIENCE = timedelta(seconds=30)


@contextmanager
def rendezvous() -> Iterator[StoreServer]:
    """A server inside the block; its path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="pl-") as directory, StoreServer(Path(directory) / "s") as server:
        yield server


def join(peer: Peer, store: str, **settings: Any) -> TorchWire:
    """This peer's wire, on the loopback interface."""
    settings = {"hostname": "127.0.0.1", "timeout": PATIENCE, **settings}
    return TorchWire(UnixStore(store, PATIENCE), peer.rank, peer.size, peer.board, peer.activity, **settings)
