"""``paceline.launch(fn, n=4, path="x.pt")`` runs ``fn(path="x.pt")`` on 4 fresh processes and returns their results, by rank.

`fn` is a function at the top level of a module or script, and its arguments are JSON values, given by name. This is also the
package of all that starts processes: where am I, who starts me. The door (``cli``), the launcher (``local``), the bootstrap of a rank (``worker``).

The only room that reads the environment, and the only one that imports the observer.

Note [two things, one name]: ``paceline.launch(fn, n=4)`` is a function, and this package is ``paceline.launch``. Python puts
a package into its parent under its name as soon as anything of it is imported, over the function. So the package can be
called, and does what the function does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Launch(ModuleType):
    """This package. See Note [two things, one name]."""

    def __call__(
        self, fn: Callable[..., Any], *processes: int, n: int | None = None, strategy: str = "ddp()", **arguments: Any
    ) -> list[Any]:
        """See the function ``launch`` in ``paceline/__init__.py``."""
        from paceline.launch.function import launch_function

        return launch_function(fn, processes, n, strategy=strategy, arguments=arguments)


sys.modules[__name__].__class__ = _Launch
