"""Where to cut a model into stages: which of its modules may begin one, and how many of them each stage gets.

Pure arithmetic over names and numbers; what a block costs is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from paceline.terms.errors import AdoptError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage computes: the positions ``first … last`` of the chain, and what the model does after each.

    Attributes:
        index: From 0, in the order of the forward.
        first, last: Positions; `last` is not part of it.
    """

    index: int
    first: int
    last: int


def chain(model: nn.Module, cuts: Sequence[str] = ()) -> list[str]:
    """Names of the modules between which the model may be cut: the children of its outermost containers.

    A container in a container is opened too. What is inside a block that is no container stays together, unless the model
    has no container at all outside of blocks.

    Args:
        cuts: Names that must be among them: whatever they are inside of is opened.
    """
    found: list[str] = []

    def walk(name: str, module: nn.Module, inside: bool) -> None:
        inside = inside or name in cuts
        opened = isinstance(module, CONTAINERS) and len(module) > 0 and name not in cuts
        opened = opened or any(c.startswith(f"{name}.") for c in cuts if name)
        if inside and not opened:
            found.append(name)
            return
        for key, child in module.named_children():
            walk(f"{name}.{key}" if name else key, child, opened)

    walk("", model, False)
    return found


def partition(costs: Sequence[float], nbytes: Sequence[float], stages: int) -> list[Stage]:
    """Contiguous stages whose dearest one is as cheap as possible; among those, with the fewest bytes sent.

    Exact dynamic programming over (stages used, positions covered), O(stages * positions²).

    Args:
        costs: Of each position, in any unit.
        nbytes: Sent when a stage ends before position i; entry 0 is not used.
        stages: At most as many as positions.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    n = len(costs)
    best: list[dict[int, tuple[float, float, tuple[int, ...]]]] = [{0: (0.0, 0.0, ())}]
    for _ in range(stages):
        step: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(1, n + 1):
            ways = [
                (max(worst, total[end] - total[start]), sent + (nbytes[start] if start else 0.0), (*cuts, start))
                for start, (worst, sent, cuts) in best[-1].items()
                if start < end
            ]
            if ways:
                step[end] = min(ways)
        best.append(step)
    starts = [*best[stages][n][2], n]
    return [Stage(i, starts[i], starts[i + 1]) for i in range(stages)]


def named(positions: Sequence[str], cuts: Sequence[str], stages: int) -> list[Stage]:
    """Stages that begin at the positions with these names, and a first one before them. Raises AdoptError PL521."""
    if len(cuts) != stages - 1:
        raise AdoptError("PL521", f"{stages} stages need {stages - 1} cuts, and {len(cuts)} are named")
    missing = [name for name in cuts if name not in positions]
    if missing:
        raise AdoptError("PL521", f"the forward does not pass through {missing[0]!r} outside of other blocks")
    starts = [0, *(list(positions).index(name) for name in cuts), len(positions)]
    if sorted(set(starts)) != starts:
        raise AdoptError("PL521", f"the forward reaches {', '.join(cuts)} in another order, or at its very beginning")
    return [Stage(i, starts[i], starts[i + 1]) for i in range(stages)]
