"""Rows of a batch: which of them a rank was given, and how they are cut out and collated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import TensorDataset, default_collate, default_convert

from paceline.data.generators import RandomState, seed_all
from paceline.data.split import Cut


@dataclass(frozen=True, slots=True)
class Slice:
    """What one rank was given of one global batch.

    Attributes:
        loader: Index of the adopted loader.
        epoch: Which pass over this loader, from 0: the number of ``iter()`` calls before it.
        batch: Which global batch of the pass, from 0.
        start: Position of the batch's first row in the pass's global order.
        rows: Rows of the global batch.
        local_start, local_rows: This rank's rows, counted from the batch's first row.
        phantom: The rank has no row of its own here. It was given the batch's first row so that its loop goes round as
            everywhere; `local_rows` is 0 and so is the weight of what it computes.
        shard: Which shard of the batch it is, where batches are cut into shards; else -1.
        round, rounds: In which of how many rounds of the loop this batch is worked off.
    """

    loader: int
    epoch: int
    batch: int
    start: int
    rows: int
    local_start: int
    local_rows: int
    phantom: bool = False
    shard: int = -1
    round: int = 0
    rounds: int = 1

    @property
    def last(self) -> bool:
        """Nothing of this batch follows."""
        return self.round == self.rounds - 1


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """How far a pass over a loader came.

    Attributes:
        rows, batches: Global counts.
        complete: Whether the pass ran to its end; False when the loop was left early.
        order: A checksum of the order: of all indices of the global batches so far, in order (of the batches' lengths
            for an iterable data set, which has no indices). Equal on all ranks for equal `batches`.
    """

    loader: int
    epoch: int
    rows: int
    batches: int
    complete: bool
    order: int


# What OwnRows returns instead of a bare batch: rows of the global batch, this rank's start and number, its rows collated.
# A plain tuple, because torch's pinning thread walks tuples and nothing else of ours.
Piece = tuple[int, int, int, Any]


class OwnRows:
    """A ``collate_fn`` that sees a whole global batch and collates this rank's rows only.

    Stands where the batch is known only after it was read. A rank without a row collates the first one, a phantom.

    Args:
        collate: The user's ``collate_fn``.
        cut: This rank's part.
        whole: The batch arrives as one item (``batch_size=None``): it is collated, then cut along dimension 0.
        aside: Makes `collate` draw from a stream that may differ between ranks; what walks the data set may not.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        cut: Cut,
        *,
        whole: bool,
        aside: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._collate = collate
        self._cut = cut
        self._whole = whole
        # torch's own collate functions draw nothing, and entering another stream is not free.
        self._aside = nullcontext if collate in (default_collate, default_convert) else aside
        self._position = 0  # rows that this process has walked: the same number on every rank

    def __call__(self, batch: Any) -> Piece:
        if self._whole:
            with self._aside():
                batch = self._collate(batch)
            rows = count_rows(batch)
            if rows is None:
                return (-1, 0, 0, _describe(batch))
            start, count, end = self._place(rows)
            return (rows, start, count, batch if count == rows else take_rows(batch, start, end))
        start, count, end = self._place(len(batch))
        with self._aside():
            return (len(batch), start, count, self._collate(batch[start:end]))

    def _place(self, rows: int) -> tuple[int, int, int]:
        """Start, number of own rows, and where to stop reading: one row further than nothing for a phantom."""
        start, count = self._cut.of(rows, self._position)
        self._position += rows
        return (start, count, start + count) if count else (0, 0, 1)


def count_rows(batch: Any) -> int | None:
    """The size of dimension 0 that all tensors of `batch` share, or None where there is no such thing."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if not isinstance(batch, (list, tuple)):
        return None
    sizes = {count_rows(item) for item in batch}
    return sizes.pop() if len(sizes) == 1 else None


def take_rows(batch: Any, start: int, end: int) -> Any:
    """Rows `start` to `end` of every tensor in `batch`, as views, in the same containers."""
    if isinstance(batch, torch.Tensor):
        return batch[start:end]
    if isinstance(batch, Mapping):
        return {name: take_rows(item, start, end) for name, item in batch.items()}
    items = [take_rows(item, start, end) for item in batch]
    if hasattr(batch, "_fields"):
        return type(batch)(*items)
    return tuple(items) if isinstance(batch, tuple) else items


def _describe(batch: Any) -> str:
    """What a batch looks like, for the error that refuses it."""
    if isinstance(batch, torch.Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name!r}: {_describe(item)}" for name, item in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__} of ({', '.join(map(_describe, batch))})"
    return f"{type(batch).__name__}"


class Gathered:
    """A :class:`TensorDataset` that is read by the batch: one gather a tensor instead of one view a row and a stack.

    Gives bit for bit what ``default_collate`` makes of the single rows, some forty times faster for 256 small rows.
    """

    def __init__(self, dataset: TensorDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> Any:
        try:
            where = torch.as_tensor(indices)
            return [tensor.index_select(0, where) for tensor in self._dataset.tensors]
        except (IndexError, TypeError, ValueError, RuntimeError):
            # Negative indices, or indices that are no integers: as torch does it, with its own errors.
            return default_collate([self._dataset[index] for index in indices])

    @staticmethod
    def serves(dataset: object, collate: object) -> bool:
        """Whether gathering gives exactly what row by row would."""
        return (
            type(dataset) is TensorDataset
            and collate is default_collate
            and all(
                type(t) is torch.Tensor
                and t.layout is torch.strided
                and t.device.type == "cpu"
                and t.is_contiguous()
                and not t.requires_grad
                and not t.is_quantized
                for t in dataset.tensors
            )
        )


class Seeded:
    """A data set whose rows, and their collation, draw from a stream that belongs to the batch: not to rank or worker.

    Read with a list of a seed and indices; gives the collated batch.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)  # a worker may ask `get_worker_info().dataset` for something

    def __getitems__(self, key: Sequence[int]) -> Any:
        seed, *indices = key
        around = RandomState.take()
        seed_all(seed)
        try:
            many = getattr(self._dataset, "__getitems__", None)
            return self._collate(many(indices) if many else [self._dataset[index] for index in indices])
        finally:
            around.put()


def as_is(batch: Any) -> Any:
    """The ``collate_fn`` of what is collated already."""
    return batch
