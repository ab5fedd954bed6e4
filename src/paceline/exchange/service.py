"""What a strategy asks of parameter servers: how many, when an update is applied, and what is done about late gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from paceline.exchange.corrections import Delay
from paceline.exchange.server import Rule


@dataclass(frozen=True, slots=True)
class Service:
    """Servers keep the parameters and step the optimizer; workers lease batches, and push gradients.

    Attributes:
        servers: How many processes the parameters are divided among.
        rule: Of the core, see ``exchange.server``.
        delay: How late gradients are corrected, or None.
    """

    servers: int = 1
    rule: Rule = field(default_factory=Rule)
    delay: Delay | None = None

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
        return "\n".join(
            (
                "parameter server",
                "  sends     gradients to the server, parameters back, every step",
                f"  to        {many}; through shared memory on one host",
                f"  batches   {batches}",
                f"  when      {when}",
                f"  merged    {merged}",
                *late,
                "optimizer   the script's own, at the server, with its schedules; workers hold no state of it",
                "gradients   p.grad is the worker's own: clipping acts on each worker's gradient by itself",
            )
        )
