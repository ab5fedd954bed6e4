"""A bucket: the unit of exchange. A flat, contiguous piece of memory that several parameters' gradients are views of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter lies in its bucket.

    Attributes:
        name: Original, neutral name of the parameter.
        offset: First element, counted in elements of the bucket.
        numel: Number of elements.
        shape: Shape of the parameter.
    """

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The frozen description of one bucket; its memory belongs to the wire that allocated it.

    Attributes:
        index: Position in the order of backward: bucket 0 is full first.
        slots: The parameters, in the order in which backward reaches them.
        numel: Elements in total, padding included.
        dtype: Element type.
    """

    index: int
    slots: tuple[Slot, ...]
    numel: int
    dtype: torch.dtype
