"""Any value as strict JSON: what `jq` and every other language reads back.

Two moments matter. :func:`hold` runs in the training loop when an event is emitted: it keeps what may not change or
live on, and never waits for a device. :func:`plain` runs later, in the heartbeat's thread, and may wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SMALL = 64  # elements of a tensor that are written out; of a larger one only the shape
_TEXT = 500  # characters of a repr
_DEPTH = 8


def hold(value: Any) -> Any:
    """`value`, safe to convert later: copied, without its autograd graph. Costs about a microsecond.

    A tensor on the CPU is converted here: nothing has to be waited for, and the user may change it in place after the
    call. One on a device is detached and cloned, which is queued on the device and not waited for; it is read on
    the default stream, so a value that is computed on another CUDA stream should be logged after that was joined.
    """
    try:
        return _hold(value)
    except Exception as failure:
        return f"<{type(value).__name__}: {type(failure).__name__} while it was kept>"


def _hold(value: Any) -> Any:
    kind = type(value)
    if kind is float or kind is int or kind is str or kind is bool or value is None:
        return value
    if isinstance(value, Mapping):
        return {k: hold(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [hold(v) for v in value] if value and hasattr(value[0], "detach") else list(value)
    if hasattr(value, "detach"):
        detached = value.detach()
        if getattr(detached, "is_cpu", False):
            return plain(detached)
        return detached.clone() if hasattr(detached, "clone") else detached
    return plain(value) if kind.__module__ == "numpy" else value


def plain(value: Any, depth: int = _DEPTH) -> Any:
    """`value` as JSON: NaN and infinities as the strings ``nan``, ``inf``, ``-inf``, strangers as their repr."""
    try:
        return _plain(value, depth)
    except Exception as failure:
        return f"<{type(value).__name__}: {type(failure).__name__} while it was converted>"


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if depth > 0 and isinstance(value, Mapping):
        return {str(k): plain(v, depth - 1) for k, v in value.items()}
    if depth > 0 and isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v, depth - 1) for v in value]
    if isinstance(value, Path):
        return str(value)
    return _tensor(value, depth) if depth > 0 else _repr(value)


def _tensor(value: Any, depth: int) -> Any:
    """Numbers of anything tensor-like, else the repr."""
    size = _numel(value)
    if size is not None and size > _SMALL:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    for convert in ("item", "tolist") if size == 1 or size is None else ("tolist",):
        method = getattr(value, convert, None)
        if callable(method):
            return plain(method(), depth - 1)
    return _repr(value)


def _numel(value: Any) -> int | None:
    """Number of elements of something that has a shape."""
    shape = getattr(value, "shape", None)
    return math.prod(shape) if shape is not None else None


def _repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _TEXT else text[:_TEXT] + "..."


def number(value: Any) -> float | None:
    """A number that :func:`plain` wrote, as a float again; None for anything else."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, (int, float)):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None
