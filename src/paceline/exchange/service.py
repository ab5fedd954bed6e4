"""What a strategy asks of parameter servers: how many, when an update is applied, and what is done about late gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from paceline.exchange.corrections import Delay
from paceline.exchange.outer_step import DelayedNesterov, Elastic, Pairwise
from paceline.exchange.server import Rule


@dataclass(frozen=True, slots=True)
class Service:
    """Servers keep the parameters and step the optimizer; workers lease batches, and push gradients.

    Attributes:
        servers: How many the parameters are divided among.
        copies: Processes that keep the same part: of two either one may die.
        rule: Of the core, see ``exchange.server``.
        delay: How late gradients are corrected, or None.
        one_copy: The parameters lie once, in memory that all workers of the host read; then there is one server.
        own_steps: Workers step their own optimizers; with `one_copy` on the one copy of all, without locks.
        every: So many steps of its own a worker takes before it pushes how far it has come.
        by_speed: Slower workers take fewer: in proportion to their speed, and the fastest takes `every`.
        outer: What the server does with that.
    """

    servers: int = 1
    rule: Rule = field(default_factory=Rule)
    delay: Delay | None = None
    one_copy: bool = False
    own_steps: bool = False
    every: int = 1
    by_speed: bool = False
    outer: DelayedNesterov | Elastic | Pairwise | None = None
    copies: int = 1

    @property
    def processes(self) -> int:
        """Of all servers."""
        return self.servers * self.copies

    def describe(self) -> str:
        """What is sent, with whom, when, how merged, and where the optimizer works."""
        rule, many = self.rule, "a server" if self.servers == 1 else f"{self.servers} servers, each of which has a part"
        if rule.staleness == 0:
            batches = "each global batch is cut into one part for each worker"
            when = "at opt.step(); all wait for the slowest"
            merged = "weighted mean of the parts, in their order: one update for each global batch"
            if rule.backup:
                batches += f", but for {rule.backup}, who do the last parts once more; whoever is first counts"
        else:
            batches = "each worker leases whole global batches; who is faster takes more"
            bound = "without bound" if math.isinf(rule.staleness) else f"at most {rule.staleness:g} ticks ahead"
            when = f"at opt.step(); nobody waits for others, {bound}"
            merged = "each gradient is an update of its own"
            if rule.buffer > 1:
                merged = f"{rule.buffer} gradients make an update: their weighted mean"
        late = []
        if rule.damp.kind != "constant":
            late = [f"  late      counts less, by its age in updates: {rule.damp.kind}"]
        elif self.delay is not None:
            late = [f"  late      {self.delay.describe()}"]
        if self.own_steps:
            return self._describe_own_steps(batches, when)
        where = "; through shared memory on one host"
        if self.one_copy:
            where = "; the parameters lie once, in memory that all workers of this host read"
        return "\n".join(
            (
                "parameter server",
                "  sends     gradients to the server, parameters back, every step",
                f"  to        {many}{where}",
                f"  batches   {batches}",
                f"  when      {when}",
                f"  merged    {merged}",
                *late,
                f"  survival  {self._describe_survival()}",
                "optimizer   the script's own, at the server, with its schedules; workers hold no state of it",
                "gradients   p.grad is the worker's own: clipping acts on each worker's gradient by itself",
            )
        )

    def _describe_survival(self) -> str:
        if self.copies > 1:
            return "each server is two processes: what was acknowledged both have, and either may die"
        return "a server that dies is replaced from the last checkpoint: what was applied since then is trained again"

    def _describe_own_steps(self, batches: str, when: str) -> str:
        if self.one_copy:
            return "\n".join(
                (
                    "hogwild",
                    "  sends     nothing: every worker steps on the one copy of the parameters, without locks",
                    f"  batches   {batches}",
                    "  merged    not at all: what two workers write at once may be lost in part",
                    "optimizer   the script's own, in every worker, each with a state of its own",
                )
            )
        assert self.outer is not None
        often = f"every {self.every} steps of its own, and at the end of a pass"
        if self.by_speed:
            often += "; slower workers take fewer steps, in proportion to their speed"
        return "\n".join(
            (
                "drift server",
                "  sends     how far a worker has come since it read the parameters; the parameters back",
                f"  batches   {batches}",
                f"  when      {often}; {when.partition('; ')[2]}",
                f"  merged    {self.outer.describe()}",
                "optimizer   the script's own, in every worker; its state stays there",
            )
        )

    @property
    def apart(self) -> bool:
        """Each worker has parameters of its own also when it has pushed; what is evaluated is something else."""
        return isinstance(self.outer, Elastic | Pairwise)
