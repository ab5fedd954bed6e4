"""How broad the tests are: `make test` runs the cases that find most, `make soak` all of them."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

LONG = "LONG_TESTS"
"""Variable that `make soak` sets."""


def more(*cases: T) -> list[T]:
    """These cases in `make soak`, none in `make test`."""
    return list(cases) if os.environ.get(LONG) else []
