"""What ``opt.step()`` means: the exchange that is owed comes first, the work is divided where that pays, and a step that the group
has lost, or whose gradient is not finite, does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paceline.exchange.chain import Exchange
from paceline.group.solo_wire import SoloWire
from paceline.group.wire import Wire
from paceline.place.replicate import Replica
from paceline.terms.activity import Activity
from paceline.terms.errors import AdoptError, StepError, UsageError
from paceline.train.divided import DividedStep, worthwhile
from paceline.train.exchanging import Exchanging
from paceline.train.loop import Loop
from paceline.train.members import Members
from paceline.train.rounds import Member


@dataclass(frozen=True, slots=True)
class _Owners:
    """Whose parameters an optimizer has: replicas, how many parameters there were, those that were frozen."""

    replicas: list[Replica | Member]
    count: int
    frozen: list[Tensor]


class OwnedSteps:
    """The optimizers and schedules of a launched job.

    Args:
        loop: Where the job stands.
        activity: Where waiting is shown.
        before: Called first in each step of a loop that has no adopted loader.
        members: Of an elastic run; told when one is lost while an optimizer steps.
        one_host: Members of an elastic run will always share memory.
    """

    def __init__(
        self,
        loop: Loop,
        activity: Activity,
        before: Callable[[], None],
        members: Members | None,
        one_host: bool,
    ) -> None:
        self._one_host = one_host
        self._loop, self._activity, self._before = loop, activity, before
        self._on_lost = members.lost_in_optimizer if members is not None else None
        self._exchanging: Exchanging | None = None
        self._divided: dict[Optimizer, DividedStep] = {}
        self._owners: dict[Optimizer, _Owners] = {}
        self._scheduled: list[Optimizer] = []  # those whose schedule was adopted
        self._left_out = False
        self._idle = False  # this rank has nothing to step on, and counts the step
        self._hidden: list[tuple[nn.Parameter, Tensor | None]] = []

    def own(
        self,
        optimizer: Optimizer,
        exchanging: Exchanging | None,
        exchange: Exchange,
        wire: Wire,
        names: Sequence[str],
        part: int,
    ) -> None:
        """Take over one optimizer.

        Args:
            exchanging: Exchanges gradients or parameters; None where there is nobody to exchange with.
            names, part: The ranks of this host, and which of them this is.

        Raises:
            AdoptError: PL304, it has parameters that nobody adopted; PL451, it is the second one where batches come in shards.
            UsageError: PL205, PL208, it cannot be shared; PL209, the strategy needs servers.
        """
        self._exchanging = exchanging
        if exchange.service is not None:
            raise UsageError("PL209", f"{exchange.text}, and 0 servers were started")
        if exchange.shards and self._owners:
            raise AdoptError("PL451", "exact=True works with one optimizer, and a second one was adopted")
        if exchanging is not None:
            self._replicas_of(optimizer)
            if not exchanging.local:  # a rank that steps on its own steps on all of it
                self._divide(optimizer, exchange, wire, names, part)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def in_bites(self, optimizer: Optimizer) -> None:
        """Let an optimizer whose parameters no other rank has step in bites that fit the cache, where that changes nothing but its time."""
        if worthwhile(optimizer, SoloWire(), elastic=True):
            self._divided[optimizer] = DividedStep(
                optimizer, SoloWire(), self._activity, names=("alone",), part=0, shared=True
            )

    def _divide(self, optimizer: Optimizer, exchange: Exchange, wire: Wire, names: Sequence[str], part: int) -> None:
        shared, elastic = exchange.params == "shared", self._on_lost is not None
        if shared and elastic:
            message = "params=shared keeps one copy, which a worker that is lost could leave half written"
            raise UsageError("PL208", message)
        if elastic and not self._one_host:
            return
        if shared or worthwhile(optimizer, wire, elastic=elastic):
            self._divided[optimizer] = DividedStep(
                optimizer, wire, self._activity, names=names, part=part, shared=shared, on_lost=self._on_lost
            )

    def rewire(self, wire: Wire, names: Sequence[str], part: int) -> None:
        """The ranks have changed."""
        for divided in self._divided.values():
            divided.rewire(wire, names, part)

    def own_schedule(self, scheduler: LRScheduler) -> None:
        """A schedule stands still while a step is done again, or goes on with its next shard."""
        step, redo, loop = scheduler.step, self._loop.redo, self._loop
        self._scheduled.append(scheduler.optimizer)

        @functools.wraps(step)
        def unless_lost(*args: Any, **kwargs: Any) -> None:
            if not (redo.aborted or loop.mid_step):
                step(*args, **kwargs)

        scheduler.step = unless_lost  # type: ignore[method-assign]

    # ---- the step -------------------------------------------------------------------------------------------------
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise StepError("PL302", f"{type(optimizer).__name__}.step was given a closure")
        redo = self._loop.redo
        if not redo.rounds:  # no loader tells where steps end
            self._before()
        self._idle = False
        if not redo.aborted and self._exchanging is not None:
            self._prepare(optimizer, self._exchanging)
        if self._loop.shards:
            self._check_schedule(optimizer)
        self._left_out = not redo.step() or redo.skip or self._idle or self._loop.mid_step
        if self._left_out:
            self._hidden = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
            for p, _ in self._hidden:  # without gradients every optimizer of torch does nothing
                p.grad = None
        elif optimizer in self._divided:
            self._divided[optimizer].before_step()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._left_out:
            for p, grad in self._hidden:
                p.grad = grad
            self._hidden.clear()
        elif optimizer in self._divided:
            self._divided[optimizer].after_step()
        if self._exchanging is not None:
            for replica in self._replicas_of(optimizer):
                replica.exchanges = 0
        self._loop.stepped()
        if not self._left_out or self._loop.redo.skip or self._idle:
            self._loop.commit()
            if self._exchanging is not None and self._exchanging.local:
                self._exchanging.stepped()

    def _prepare(self, optimizer: Optimizer, exchanging: Exchanging) -> None:
        """The gradient that all ranks share is exchanged, or this rank's own looked at."""
        if self._loop.local and exchanging.rounds is not None:
            self._replicas_of(optimizer)
            self._idle = exchanging.rounds.leaves_out(optimizer)
        elif exchanging.stepper is not None:
            exchanging.stepper.owe([r for r in self._replicas_of(optimizer) if isinstance(r, Replica)])

    def _check_schedule(self, optimizer: Optimizer) -> None:
        """Raise StepError PL451 for a schedule that we do not hold back between shards. Torch marks the step that it counts."""
        if hasattr(optimizer.step, "_wrapped_by_lr_sched") and not any(o is optimizer for o in self._scheduled):
            raise StepError("PL451", "exact=True: the learning rate has a schedule that was not adopted")

    # ---- whose parameters -------------------------------------------------------------------------------------------
    def _replicas_of(self, optimizer: Optimizer) -> list[Replica | Member]:
        """The replicas that own the optimizer's parameters, looked up anew when the answer may have changed: the
        optimizer was given more parameters, or one that was frozen at adoption needs a gradient now."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._owners.get(optimizer)
        if known is None or known.count != count or any(p.requires_grad for p in known.frozen):
            known = self._owners[optimizer] = self._find_owners(optimizer, count)
        return known.replicas

    def _find_owners(self, optimizer: Optimizer, count: int) -> _Owners:
        """Raises AdoptError PL304 for a parameter that needs a gradient and that nobody owns."""
        assert self._exchanging is not None
        found: dict[int, Replica | Member] = {}
        frozen: list[Tensor] = []
        for number, group in enumerate(optimizer.param_groups):
            for position, p in enumerate(group["params"]):
                owner = next((r for r in self._exchanging.owners if p in r.names), None)
                if owner is not None:
                    found[id(owner)] = owner
                elif p.requires_grad:
                    raise AdoptError(
                        "PL304",
                        f"{type(optimizer).__name__}: parameter {position} of group {number}, shape {tuple(p.shape)}, "
                        "needs a gradient and belongs to no adopted model (or was frozen when it was adopted)",
                        help="adopt the module that owns it; parameters to be unfrozen later must need gradients at job.adopt.",
                    )
                else:
                    frozen.append(p)
        return _Owners(list(found.values()), count, frozen)
