"""A batch and its pieces: which arguments of the model have rows, and how outputs of micro-batches are put together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree

from paceline.place.absent import Absent
from paceline.terms.errors import StepError


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of the model.

    Attributes:
        args, kwargs: As given.
        rows: Of the first tensor among them; tensors with as many are cut, others go to every micro-batch as they are.
        bounds: First and last row of each micro-batch.
    """

    args: Any
    kwargs: Any
    rows: int
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, args: Any, kwargs: Any, microbatches: int, *, fewer: bool) -> Batch:
        """Cut a call into micro-batches whose sizes differ by one row at most.

        Args:
            fewer: Where there are fewer rows than micro-batches, make fewer of them.

        Raises:
            StepError: There are too few rows (PL530).
        """
        rows = next((a.shape[0] for a in tree.tree_leaves((args, kwargs)) if isinstance(a, Tensor) and a.dim()), 0)
        if rows < 1 or (rows < microbatches and not fewer):
            raise StepError("PL530", f"a batch of {rows} rows, and {microbatches} micro-batches")
        count = min(rows, microbatches)
        base, more = divmod(rows, count)
        ends = [0]
        for i in range(count):
            ends.append(ends[-1] + base + (i < more))
        return cls(args, kwargs, rows, tuple(pairwise(ends)))

    @property
    def count(self) -> int:
        """How many micro-batches."""
        return len(self.bounds)

    @property
    def sizes(self) -> list[int]:
        """Rows of each micro-batch."""
        return [hi - lo for lo, hi in self.bounds]

    def piece(self, micro: int) -> tuple[Any, Any]:
        """Arguments of one micro-batch."""
        lo, hi = self.bounds[micro]

        def rows(t: Tensor) -> Tensor:
            return t[lo:hi] if t.dim() and t.shape[0] == self.rows else t

        if self.count == 1:
            return self.args, self.kwargs
        found: tuple[Any, Any] = tree.tree_map_only(Tensor, rows, (self.args, self.kwargs))
        return found


def signature(args: Any, kwargs: Any) -> Hashable:
    """What the way of a forward may depend on: structure, shapes, types and constants of its arguments."""
    leaves, spec = tree.tree_flatten((args, kwargs))
    return str(spec), tuple(_sign(leaf) for leaf in leaves)


def _sign(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.requires_grad
    if isinstance(leaf, int | float | str | bool | None):
        return type(leaf).__name__, leaf
    return type(leaf).__name__


def dependent(output: Any) -> list[int]:
    """Which leaves of a sketch's output depend on parameters."""
    leaves = tree.tree_leaves(output)
    return [
        i for i, t in enumerate(leaves) if isinstance(t, Tensor) and (isinstance(t, Absent) or "_label" in t.__dict__)
    ]


def row_dim(whole: Sequence[int], part: Sequence[int], what: str) -> int | None:
    """The dimension in which a part of a batch is smaller; None: there is none. Raises StepError PL533 for several."""
    if len(whole) != len(part):
        raise StepError("PL533", f"{what} has {len(whole)} dimensions for a batch and {len(part)} for a part of it")
    dims = [d for d, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]
    if len(dims) > 1:
        raise StepError("PL533", f"{what} has shape {tuple(whole)} for a batch, and {tuple(part)} for a part of it")
    return dims[0] if dims else None


def join(parts: Sequence[Tensor], dim: int | None) -> Tensor:
    """One tensor of the micro-batches' tensors; without a dimension they are all the same."""
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(list(parts), dim)


def split(whole: Tensor | None, parts: Sequence[Tensor], dim: int | None) -> list[Tensor | None]:
    """The gradient of each part, from the gradient of what :func:`join` has made of them."""
    if whole is None:
        return [None] * len(parts)
    if dim is None or len(parts) == 1:
        return [whole, *([None] * (len(parts) - 1))]
    return list(torch.split(whole, [p.shape[dim] for p in parts], dim))
