"""Gradients that touch few rows (``nn.Embedding(sparse=True)``): pushed and pulled by row.

A worker puts the values of the rows that its gradient has where they belong in its memory, and tells their numbers behind the
push. The server makes a sparse gradient of them for the optimizer, remembers in which version each row has changed last, and
answers a worker with the rows that have changed since it was answered before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Rows = Mapping[int, Tensor]
"""For each item that has a sparse gradient in a push, the numbers of its rows."""


def sparse_parameters(models: Mapping[str, nn.Module]) -> set[Tensor]:
    """Parameters of layers that give sparse gradients."""
    layers = (m for model in models.values() for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    return {layer.weight for layer in layers if layer.sparse}


def put_rows(grad: Tensor, flat: Tensor) -> tuple[Tensor, bool]:
    """Put a sparse gradient into its place; the numbers of its rows, and whether all of it is finite."""
    grad = grad.coalesce()
    rows, values = grad.indices()[0], grad.values()
    flat.view(grad.shape).index_copy_(0, rows, values)
    return rows, bool(torch.isfinite(values.sum()))


def told(rows: Rows) -> tuple[list[list[int]], list[memoryview]]:
    """For a message: item and number of rows, and the bulk behind it."""
    arrays: list[Any] = [numbers.contiguous().numpy() for numbers in rows.values() if numbers.numel()]
    return [[item, numbers.numel()] for item, numbers in rows.items()], [memoryview(array) for array in arrays]


def heard(said: Sequence[Sequence[int]], buffers: Sequence[memoryview]) -> dict[int, Tensor]:
    """The inverse. Raises ValueError for what does not fit."""
    following, found = iter(buffers), {}
    for item, count in said:
        raw = bytearray(next(following)) if count else bytearray()
        if len(raw) != 8 * count:
            raise ValueError(f"{len(raw)} bytes for {count} rows")
        found[int(item)] = torch.frombuffer(raw, dtype=torch.int64) if count else torch.zeros(0, dtype=torch.int64)
    return found


def sparse_sum(shape: Sequence[int], parts: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The sum of gradients given as rows, the memory in which their values lie, and a factor."""
    rows = torch.cat([rows for rows, _, _ in parts])
    values = torch.cat([dense[rows] if scale == 1.0 else dense[rows] * scale for rows, dense, scale in parts])
    total = torch.sparse_coo_tensor(rows[None], values, tuple(shape), check_invariants=False)
    return total.coalesce()


def dense_rows(shape: Sequence[int], rows: Tensor, dense: Tensor) -> Tensor:
    """The same as a whole tensor; what the memory holds in other rows is of an earlier push."""
    whole = torch.zeros(tuple(shape), dtype=dense.dtype)
    return whole.index_copy_(0, rows, dense[rows])


class Touched:
    """When each row of some parameters has changed last.

    Args:
        counts: Rows by item.
    """

    def __init__(self, counts: Mapping[int, int]) -> None:
        self.versions = {item: torch.zeros(count, dtype=torch.int64) for item, count in counts.items()}

    def note(self, item: int, grad: Tensor | None, version: int) -> None:
        """An update with this gradient makes `version`."""
        if item in self.versions and grad is not None:
            rows = grad.indices()[0] if grad.is_sparse else slice(None)
            self.versions[item][rows] = version

    def since(self, item: int, version: int) -> Tensor:
        """Rows that have changed after `version`."""
        return (self.versions[item] > version).nonzero()[:, 0]
