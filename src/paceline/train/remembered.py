"""What optimizers remember for each element (momentum, Adam's moments), as buckets: for rounds that average it, or begin it anew."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from paceline.group.wire import Wire
from paceline.place.bundle import Named, Packed, pack


class Remembered:
    """The state of a job's optimizers.

    Attributes:
        optimizers: In the order of adoption.
    """

    def __init__(self) -> None:
        self.optimizers: list[Optimizer] = []
        self._packed: list[Packed] = []

    def forget_memory(self) -> None:
        """The wire has changed."""
        self._packed = []

    def packed(self, wire: Wire, part: int) -> list[Packed]:
        """Buckets of all that every rank remembers; a call that all ranks make. The same memory as in the round before, where
        the names are the same."""
        mine = {name: t for number, o in enumerate(self.optimizers) for name, t in _remembered(number, o)}
        said = [set(json.loads(raw)) for raw in wire.gather_bytes("state", json.dumps(list(mine)).encode())]
        named: Sequence[Named] = [(name, t) for name, t in mine.items() if all(name in theirs for theirs in said)]
        there = [slot.name for packed in self._packed for slot in packed.bucket.slots]
        if sorted(there) != sorted(name for name, _ in named):
            self._packed = pack(named, wire, part=part) if named else []
        for packed in self._packed:
            packed.tensors = [mine[slot.name] for slot in packed.bucket.slots]
        return self._packed

    def reset(self) -> None:
        """Begin anew."""
        for optimizer in self.optimizers:
            optimizer.state.clear()


def _remembered(number: int, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Floating-point tensors of an optimizer's state that have the shape of their parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        (f"{number}.{place}.{key}", value)
        for place, p in enumerate(params)
        for key, value in sorted(optimizer.state.get(p, {}).items())
        if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point()
    ]
