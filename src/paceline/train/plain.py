"""What a job does under plain ``python``: count, and say now and then how training goes. Nothing else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from paceline.terms.clock import Clock


class PlainLoader:
    """The user's loader, counting rows as they pass. Everything else is the loader's own.

    Args:
        loader: The user's loader; its iterator is used as it is, so every random draw is the original program's.
        count: Told the rows of each batch.
    """

    def __init__(self, loader: DataLoader[Any], count: Callable[[int], None]) -> None:
        self._loader = loader
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        count = self._count
        for batch in self._loader:
            count(_rows(batch))
            yield batch

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # during copying, before __init__ has run
            raise AttributeError(name)
        return getattr(self._loader, name)


def _rows(batch: Any) -> int:
    """Rows of a batch: the first dimension of the first tensor in it; 1 where there is none."""
    while isinstance(batch, (tuple, list, dict)) and batch:
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return int(batch.shape[0]) if isinstance(batch, Tensor) and batch.dim() else 1


class Diary:
    """Prints what ``job.log`` was told, at most once a second and at the end of each epoch.

    Args:
        enabled: Print at all: true on the one rank that has no launcher to show its numbers.
    """

    EVERY = 1.0

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._values: dict[str, Any] = {}
        self._fresh = False
        self._printed = time.monotonic()

    def note(self, values: dict[str, Any], clock: Clock) -> None:
        """Remember the newest values; tensors are read when they are printed."""
        if not self._enabled:
            return
        self._values.update({k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()})
        self._fresh = True
        if time.monotonic() - self._printed >= self.EVERY:
            self.flush(clock)

    def flush(self, clock: Clock) -> None:
        """Print what is new."""
        if self._fresh:
            shown = "  ".join(f"{name} {_show(value)}" for name, value in self._values.items())
            print(f"epoch {clock.epoch}  step {clock.step}  {shown}", file=sys.stderr)
        self._fresh, self._printed = False, time.monotonic()


def _show(value: Any) -> str:
    try:
        return f"{float(value):.5g}"
    except (TypeError, ValueError):
        return str(value)
