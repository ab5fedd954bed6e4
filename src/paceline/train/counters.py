"""Evaluation: named counters that every rank fills for itself and that are added up when all ranks meet anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_FOLD = 256  # tensors kept unread; then they are added up, so that memory stays small


class Counters:
    """Sums by name: local since the last merge, and global."""

    def __init__(self) -> None:
        self._local: dict[str, float] = {}
        self._unread: dict[str, list[Tensor]] = {}
        self._global: dict[str, float] = {}

    def clear(self) -> None:
        """Start from zero."""
        self._local, self._unread, self._global = {}, {}, {}

    def add(self, amounts: Mapping[str, Any]) -> None:
        """Add numbers; tensors of one element are kept as they are and read later, so that no device is waited for."""
        for name, amount in amounts.items():
            if isinstance(amount, Tensor):
                unread = self._unread.setdefault(name, [])
                unread.append(amount.detach())
                if len(unread) >= _FOLD:
                    self._read(name)
            else:
                self._local[name] = self._local.get(name, 0) + amount

    @property
    def settled(self) -> bool:
        """True when nothing was counted since the last merge."""
        return not self._local and not self._unread

    def merge(self, gather: Callable[[dict[str, float]], list[dict[str, float]]]) -> None:
        """Add the counts of all ranks to the global sums."""
        for name in list(self._unread):
            self._read(name)
        for theirs in gather(self._local):
            for name, amount in theirs.items():
                self._global[name] = self._global.get(name, 0) + amount
        self._local = {}

    def ratio(self, part: str, whole: str) -> float:
        """Quotient of two global sums; 0/0 and x/0 are NaN."""
        below = self._global.get(whole, 0)
        return self._global.get(part, 0) / below if below else math.nan

    def _read(self, name: str) -> None:
        total = sum(float(t) for t in self._unread.pop(name))
        self._local[name] = self._local.get(name, 0) + total


@contextmanager
def in_eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, all modules are in ``eval()`` mode; then each is as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
