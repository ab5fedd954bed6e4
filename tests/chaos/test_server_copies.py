"""Servers with a second copy: processes are killed, and nothing that was acknowledged is lost or done twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from parity.test_servers import ABSOLUTE, disturbed, furthest, plain
from support.breadth import more
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
