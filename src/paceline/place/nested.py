"""Tensors in the arguments of torch's functions: in tuples, lists and dictionaries, and nowhere else.

Pytrees know more containers and take ten times as long, which counts where every operation on a tensor passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def replace(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """`value` with every instance of `kind` in it replaced by what `by` gives."""
    if isinstance(value, kind):
        return by(value)
    given = type(value)
    if given is tuple:
        return tuple([replace(v, kind, by) for v in value])
    if given is list:
        return [replace(v, kind, by) for v in value]
    if given is dict:
        return {key: replace(v, kind, by) for key, v in value.items()} if value else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # what torch.max returns
        return given(*[replace(v, kind, by) for v in value])
    if isinstance(value, tuple):  # torch.Size, torch.return_types
        return value if not any(isinstance(v, kind) for v in value) else given([replace(v, kind, by) for v in value])
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from tensors(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors(v)
