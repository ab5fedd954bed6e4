"""A stream of random numbers beside the process's own, entered and left in some twenty microseconds."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import torch

from paceline.data.generators import RandomState, loaded_numpy

_MT19937_BYTES = 2500  # 624 words and a position


class Lane:
    """Between ``enter`` and ``leave`` the process's global generators draw from this stream; it goes on at each ``enter``."""

    def __init__(self, state: RandomState) -> None:
        self._torch, self._python = state.torch, state.python
        self._numpy = _NumpyLane(state.numpy) if state.numpy is not None else None
        self._outside: tuple[torch.Tensor, tuple[Any, ...]] | None = None

    def enter(self) -> None:
        """Put the process's own stream away and draw from this one."""
        self._outside = (torch.default_generator.get_state(), random.getstate())
        torch.default_generator.set_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.enter()

    def leave(self) -> None:
        """Back to the process's own stream."""
        assert self._outside is not None
        own_torch, own_python = self._outside
        self._torch, self._python = torch.default_generator.get_state(), random.getstate()
        torch.default_generator.set_state(own_torch)
        random.setstate(own_python)
        if self._numpy is not None:
            self._numpy.leave()
        self._outside = None

    def state(self) -> RandomState:
        """Where this stream stands, seen from outside."""
        return RandomState(self._torch, self._python, self._numpy.state if self._numpy is not None else None)


class _NumpyLane:
    """NumPy's part. Copying its state takes 60 microseconds, so its generator is given another engine instead.

    That drops a normal deviate which the outer stream had in store; one of this stream is kept, for it belongs to an
    order. `state` is read anew only where the engine's memory shows that it was used. Needs NumPy 1.24.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._random = loaded_numpy().random
        self._engine = getattr(self._random, state["bit_generator"])()
        self._engine.state = {name: value for name, value in state.items() if name not in ("has_gauss", "gauss")}
        self._outer: Any = None
        self._words = self._read()
        self.state = state

    def enter(self) -> None:
        self._outer = self._random.get_bit_generator()
        self._random.set_bit_generator(self._engine)
        if self.state["has_gauss"]:
            self._random.set_state(self.state)

    def leave(self) -> None:
        words = self._read()
        if words is None or words != self._words or self.state["has_gauss"]:
            self.state = self._random.get_state(legacy=False)
            self._words = words
        self._random.set_bit_generator(self._outer)

    def _read(self) -> bytes | None:
        """The engine's memory; None for an engine whose layout is not known, which is then always taken for used."""
        if type(self._engine).__name__ != "MT19937":
            return None
        return ctypes.string_at(self._engine.ctypes.state_address, _MT19937_BYTES)
