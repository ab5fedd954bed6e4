"""A core that is told whole, and goes on elsewhere, decides what it would have decided."""

from __future__ import annotations

import json

import pytest

from paceline.exchange.server_protocol import Event, Instruction
from paceline.exchange.server_whole import hear_core, heard, tell_core, told
from support.breadth import more
from support.serving import Plan, Sim, World

SEEDS = sum(more(3000)) or 200


class Moved(World):
    """Each event is taken by a core that was made from what the one before has told."""

    def serve(self, event: Event, sim: Sim, core: object) -> None:
        if core is not self.core:
            return
        said = json.loads(json.dumps(tell_core(self.core)))
        before, self.core = self.core, hear_core(self.plan.rule, said)
        assert tell_core(self.core) == tell_core(before)
        for other in self.sims.values():
            other.moved = self.core  # type: ignore[attr-defined]
        super().serve(event, sim, self.core)
        self.core, moved = before, self.core
        before.__dict__.update(moved.__dict__)


@pytest.mark.parametrize("first", range(0, SEEDS, 100))
def test_it_decides_the_same(first: int) -> None:
    for seed in range(first, first + 100):
        plan = Plan.draw(seed)
        if len(plan.speeds) < 4:
            assert Moved(plan).run().trace == World(plan).run().trace


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(TypeError, match="World is no state"):
        told([World(Plan())])
    with pytest.raises(KeyError):
        heard({"World": {}})


__all__ = ["Instruction"]
