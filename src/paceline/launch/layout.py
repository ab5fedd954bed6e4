"""How the processes of a run make replicas of the model, as far as the launcher must know: how many hold one, and whether replicas may
come and go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.terms.plan import Plan

if TYPE_CHECKING:
    from paceline.exchange.axes import Mesh


def replica_ranks(plan: Plan) -> int:
    """How many processes hold one replica of the model: with one of them all of it is lost."""
    if not plan.strategy:
        return 1
    found = lay_out(plan.strategy, plan.processes)
    return found.inner if found is not None else 1


def lay_out(strategy: str, processes: int) -> Mesh | None:
    """Where the first of so many ranks stands; None where each holds a whole model.

    Raises:
        UsageError: PL2xx, the strategy cannot be, or does not fit.
    """
    from paceline.exchange.axes import mesh
    from paceline.exchange.strategy import build

    exchange = build(strategy)
    if not exchange.axes:
        return None
    return mesh(exchange.axes, exchange.ranks, processes, 0, exchange.text)


def outlives_ranks(strategy: str, processes: int) -> bool:
    """Whether a run whose models are split goes on when a rank is lost: other replicas hold the same, and step together with it."""
    from paceline.exchange.strategy import build

    found = lay_out(strategy, processes)
    if found is None or found.replicas == 1:
        return False
    parts = any(axis.settings.get("build") == "parts" for axis in found.axes)  # whoever joins is given a whole model
    return build(strategy).rounds is None and not parts
