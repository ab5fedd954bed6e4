"""Servers with a second copy: processes are killed, and nothing that was acknowledged is lost or done twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from paceline.group.secure import Listener, connect
from paceline.terms.errors import PeerLost
from paceline.train.pair import ask_for_state
from paceline.train.talk import CAPS
from parity.test_servers import ABSOLUTE, disturbed, events, furthest, plain
from support.breadth import more
from support.cli import run_paceline, show
from support.falling import Counting


@pytest.mark.parametrize("seed", [1, *more(2, 3, 4)])
def test_the_counter_is_what_was_acknowledged(seed: int, tmp_path: Path) -> None:
    """Both copies of the lead are killed one after the other, and one of the other server."""
    rng = random.Random(seed)
    with Counting(tmp_path, "ps(servers=2, staleness=inf, replicas=2)", 2) as run:
        for name in ("server-0", rng.choice(("server-1", "server-3")), "server-2"):
            run.kill_and_wait(name, rng)
        acknowledged, values, slowest = run.end()
    assert values == [acknowledged]
    assert "goes on with all that was acknowledged" in run.said
    assert slowest[-1] < 10.0, "a worker waited for a copy to start"


@pytest.mark.parametrize("victim", ["server-0", *more("server-1", "server-2", "server-3")])
def test_a_killed_copy_changes_nothing(victim: str, tmp_path: Path) -> None:
    """The ledger is proved, and no checkpoint is needed."""
    want = plain(tmp_path, "--epochs", "8")
    said, _ = disturbed(tmp_path, "ps(servers=2, replicas=2)", victim, 20, "--checkpoint", "every=1000")
    assert f"{victim} was killed by SIGKILL" in said
    assert "started again" not in said
    assert furthest(want, torch.load(tmp_path / "served.pt")) <= ABSOLUTE


@pytest.mark.long
def test_when_both_copies_die_all_begin_again_from_the_checkpoint(tmp_path: Path) -> None:
    """The second one falls while the new copy of the first is starting."""
    want = plain(tmp_path, "--epochs", "8")
    said, _ = disturbed(tmp_path, "ps(replicas=2)", "server-0", 20, "--checkpoint", "every=5", also="server-1")
    assert "server-0 was killed by SIGKILL; server-1 goes on" in said
    assert "server-1 was killed by SIGKILL; servers are started again from the newest checkpoint" in said
    assert furthest(want, torch.load(tmp_path / "served.pt")) <= ABSOLUTE


def test_a_copy_that_cannot_get_the_state_ends() -> None:
    secret = b"s" * 32
    with Listener("unix:@paceline-copies", secret, "server", lambda connection: connection.close(), caps=CAPS):
        connection = connect("unix:@paceline-copies", secret, "server", caps=CAPS)
        with pytest.raises(PeerLost) as raised:
            ask_for_state(connection, "what it has", "server 0", lambda: None)
    assert raised.value.code == "PL465"


@pytest.mark.long
def test_copies_that_come_apart_are_found(tmp_path: Path) -> None:
    """After 256 updates; the run goes on with the first one's parameters."""
    flags = ("-n", "1", "--strategy", "ps(staleness=inf, replicas=2)", "--run-dir", tmp_path / "run")
    done = run_paceline("run", Path(__file__).with_name("uneven_case.py"), *flags, cwd=tmp_path, timeout=90)
    assert done.returncode == 0, show(done)
    assert "had different parameters at update 256" in done.stdout, show(done)
    notices = events(tmp_path / "run", "server-0", "notice")
    assert "PL466" in [notice.get("code") for notice in notices]
