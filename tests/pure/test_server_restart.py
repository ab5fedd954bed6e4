"""A server that begins again from a checkpoint, while its workers are further than that."""

from __future__ import annotations

import math

import pytest

from paceline.exchange.server import Apply, Ask, Closed, Go, Grant, Join, Opened, Over, Rule, ServerCore, Step


def grants(core: ServerCore, epoch: int) -> list[tuple[int, int]]:
    """One worker to the end of a pass: pass and batch of what it trains."""
    found: list[tuple[int, int]] = []
    while True:
        (grant,) = (m for m in core.handle(Ask("w", 0, epoch), 0.0) if isinstance(m, Grant))
        if grant.piece is None:
            return found
        if grant.piece.batch >= 4:
            core.handle(Over("w", 0, grant.piece.epoch, 4), 0.0)
            continue
        found.append((grant.piece.epoch, grant.piece.batch))
        out = core.handle(Step("w", core.desk.workers["w"].seq + 1, 1.0, (grant.piece,)), 0.0)
        assert any(isinstance(m, Apply) for m in out)
        assert any(isinstance(m, Go) and m.applied for m in out)


@pytest.mark.parametrize("staleness", [0, math.inf])
def test_what_was_trained_since_the_checkpoint_comes_back_also_of_a_pass_that_is_left(staleness: float) -> None:
    before = ServerCore(Rule(staleness))
    before.handle(Join("w"), 0.0)
    before.handle(Ask("w", 0, 0), 0.0)
    core = ServerCore.load(Rule(staleness), before.state())  # batch 0 is out, nothing is applied
    core.handle(Join("w"), 0.0)
    core.handle(Opened("w", 0, 0, 4), 0.0)
    core.handle(Over("w", 0, 0, 4), 0.0)
    core.handle(Opened("w", 0, 1, 2), 0.0)
    assert grants(core, 1) == [(epoch, batch) for epoch in (0, 1) for batch in range(4)]
    assert all(course.closed for course in core.desk.pool.passes.values())


def test_a_pass_that_is_closed_stays_so() -> None:
    core = ServerCore(Rule(math.inf))
    core.handle(Join("w"), 0.0)
    assert grants(core, 0) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    core.handle(Opened("w", 0, 0, 4), 0.0)
    assert not [m for m in core.handle(Ask("w", 0, 0), 0.0) if isinstance(m, Closed)]
    assert grants(core, 0) == []
