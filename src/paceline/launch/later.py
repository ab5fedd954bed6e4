"""torch's compiler, imported when something is compiled.

Every optimizer of torch imports ``torch._dynamo`` when it is made, only to say that a compiler is to leave it alone: more than a second
of each process's start, half of all that it computes before its first step. While nothing has been compiled there is nobody to say it
to. So a module stands there in its place that answers these two calls itself, and becomes the real one as soon as anything else of it
is asked for: ``torch.compile``, a submodule, a configuration.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"


def import_compiler_later() -> None:
    """Let ``torch._dynamo`` be imported when it is needed. Before torch is imported; nothing happens when it is there."""
    if _NAME not in sys.modules:
        sys.modules[_NAME] = _Later(_NAME)


class _Later(ModuleType):
    """What is to be told to a compiler is kept until there is one."""

    def graph_break(self, msg: str = "") -> None:
        """Where nothing is compiled this does nothing."""

    def disable(self, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the real one from the moment it is there."""
        if fn is None or sys.modules.get(_NAME) is not self:
            return _real().disable(fn, *args, **kwargs)
        found: list[Callable[..., Any]] = []

        @functools.wraps(fn)
        def alone(*given: Any, **named: Any) -> Any:
            if not found and sys.modules.get(_NAME) is not self:
                found.append(_real().disable(fn, *args, **kwargs))
            return (found[0] if found else fn)(*given, **named)

        return alone

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # whoever looks at all modules
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        return getattr(_real(), name)


def _real() -> Any:
    """The real module."""
    if isinstance(sys.modules.get(_NAME), _Later):
        del sys.modules[_NAME]
    return importlib.import_module(_NAME)
