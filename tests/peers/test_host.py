"""A launcher that has joined a run: the run has ended when the connection with the first launcher has, and the coordinator is gone too."""

from __future__ import annotations

import os
import queue
import secrets
import selectors
import time
from collections.abc import Callable
from pathlib import Path

from paceline.group.secure import Connection, Listener, connect
from paceline.launch.host import Host
from support.coordination import Coordination

PATIENCE = 30.0
FAREWELL = 10.0  # seconds after which a run whose launcher and coordinator are gone has ended


def test_a_cut_link_is_not_the_end_of_the_run(tmp_path: Path) -> None:
    came: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    door = f"unix:@paceline-test-{secrets.token_hex(8)}"
    with Coordination(tmp_path) as job, selectors.DefaultSelector() as selector:
        secret = os.pread(job.orders["secret_fd"], 100, 0)
        with (
            Listener(door, secret, "launcher", came.put),
            Host(connect(door, secret, "join"), secret, (job.address,), 100_000) as host,
        ):
            host.open(selector, print, lambda: None, lambda request: {})
            came.get(timeout=PATIENCE).close()
            while selector.get_map():
                for key, _ in selector.select(PATIENCE):
                    key.data()
            ended = time.monotonic()

            def until(what: Callable[[], bool]) -> None:
                while not what():
                    assert time.monotonic() < ended + PATIENCE
                    host.tick(time.monotonic())

            until(lambda: host._line.heard > ended)
            host.tick(host._line.heard + FAREWELL)
            assert host.lost == ""
            job.kill()
            host.tick(time.monotonic() + FAREWELL + 1)
            assert "is gone" in host.lost
