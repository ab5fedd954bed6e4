"""The loader that really reads: the user's settings, this rank's rows. And which loaders cannot be split at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, MapDataPipe

from paceline.data.rows import Gathered, OwnRows, Seeded, as_is
from paceline.data.split import Cut
from paceline.data.streams import Aside, Streams
from paceline.data.walk import Walk
from paceline.terms.errors import AdoptError


def refuse(loader: DataLoader[Any]) -> None:
    """Raise AdoptError (PL305, PL306) for a loader whose meaning could not be kept."""
    kind = type(loader)
    if kind.__iter__ is not DataLoader.__iter__ or kind._get_iterator is not DataLoader._get_iterator:
        raise AdoptError(
            "PL305",
            f"{kind.__name__} iterates in a way of its own, which cannot be divided among ranks",
            help="give a plain torch.utils.data.DataLoader; its collate_fn may do what the subclass does.",
        )
    if isinstance(loader.dataset, (IterDataPipe, MapDataPipe)):
        raise AdoptError(
            "PL305",
            f"{type(loader.dataset).__name__} is a data pipe: torch seeds and shards these by itself",
            help="make it a Dataset or an IterableDataset.",
        )
    if not getattr(loader, "in_order", True):
        raise AdoptError(
            "PL306",
            "with in_order=False batches arrive in another order on each rank",
            help="leave in_order at True.",
        )
    for sampler in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        if getattr(sampler, "num_replicas", 1) != 1:
            raise AdoptError(
                "PL306",
                f"{type(sampler).__name__} already gives each rank a part of the data",
                help="use shuffle=True (or a plain sampler) and the global batch size; job.adopt divides each batch.",
            )


def is_walked(loader: DataLoader[Any]) -> bool:
    """Whether the data set is iterated, not indexed."""
    return isinstance(loader.dataset, IterableDataset)


def build(
    loader: DataLoader[Any], cut: Cut, streams: Streams, want_phantom: Callable[[], bool]
) -> tuple[DataLoader[Any], Walk | None]:
    """This rank's own loader, from the user's settings as they are now, and the walk over the sampler in it.

    A data set that is walked has no sampler, so no Walk: workers then have the seeds of plain ``python`` on all ranks
    and walk in step; each collates its own rows.
    """
    batched = loader.batch_sampler is not None
    settings = _settings(loader)
    aside = Aside(cut.rank) if loader.num_workers else streams.resting
    own_rows = OwnRows(loader.collate_fn, cut, whole=not batched, aside=aside)
    if is_walked(loader):
        settings |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last, "generator": loader.generator}
        return DataLoader(loader.dataset, collate_fn=own_rows, **settings), None
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    gathers = batched and not loader.num_workers and Gathered.serves(loader.dataset, loader.collate_fn)
    seeded = bool(cut.shards) and batched and not gathers
    walk = Walk(
        sampler, cut, streams, batched=batched, generator=loader.generator, want_phantom=want_phantom, seeded=seeded
    )
    settings["generator"] = walk.workers
    if not batched:
        return DataLoader(loader.dataset, batch_size=None, sampler=walk, collate_fn=own_rows, **settings), walk
    dataset: Any = loader.dataset
    collate = loader.collate_fn
    if gathers:
        dataset, collate = Gathered(dataset), as_is
    elif seeded:
        dataset, collate = Seeded(dataset, collate), as_is
    return DataLoader(dataset, batch_sampler=walk, collate_fn=collate, **settings), walk


def reader(loader: DataLoader[Any], batches: Iterable[Any] | None = None) -> Any:
    """Reads batches out of turn, with the user's settings: a function of indices, or given `batches` of indices an iterable.

    What is read is what the user's loader would give, whoever reads it and when.
    """
    dataset: Any = loader.dataset
    collate = loader.collate_fn
    if batches is not None:
        settings = _settings(loader) | {"persistent_workers": False}
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **settings)
    if Gathered.serves(dataset, collate):
        return Gathered(dataset).__getitems__
    return lambda indices: collate([dataset[index] for index in indices])


def _settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """What is taken over from the user's loader whatever the kind of its data set."""
    names = ["num_workers", "pin_memory", "timeout", "worker_init_fn"]
    if loader.num_workers:
        names += ["multiprocessing_context", "prefetch_factor", "persistent_workers"]
    settings = {name: getattr(loader, name) for name in names}
    if loader.pin_memory_device:
        settings["pin_memory_device"] = loader.pin_memory_device
    return settings
