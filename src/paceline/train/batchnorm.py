"""Batch normalisation over the rows of all ranks, for the script that asks for it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from paceline.exchange.axes import Mesh
from paceline.group.wire import Wire
from paceline.place.sync_batchnorm import convert
from paceline.terms.errors import AdoptError, UsageError
from paceline.train.job import Job
from paceline.train.split_job import SplitJob

M = TypeVar("M", bound=nn.Module)


def share(job: Job, model: M) -> M:
    """See :func:`paceline.sync_batchnorm`."""
    if job.adopted:
        help = "model = paceline.sync_batchnorm(model), then job.adopt(model, ...)."
        raise AdoptError("PL309", "paceline.sync_batchnorm was called after job.adopt", help=help)
    layout = job.layout if isinstance(job, SplitJob) else None
    if layout is not None and layout.axis("pipeline") is not None:
        raise UsageError("PL212", "paceline.sync_batchnorm: a pipeline computes one micro-batch after the other")
    if job.size > 1 and (layout is None or layout.readers > 1):
        convert(model, functools.partial(_table, job, layout), real=lambda: not job._loop.phantom)
    return model


def _table(job: Job, layout: Mesh | None, row: Tensor) -> Tensor:
    """The rows of all ranks that read rows of their own, in their order. All ranks compute the layer together."""
    mine = row.detach().to(torch.float64).cpu().contiguous()

    def gather(wire: Wire) -> list[bytes]:
        return wire.gather_bytes("batch normalisation", mine.numpy().tobytes())

    said = job.together(gather)
    if layout is not None:
        said = [raw for rank, raw in enumerate(said) if replace(layout, rank=rank).leads]
    return torch.stack([torch.frombuffer(bytearray(raw), dtype=torch.float64) for raw in said]).to(row.device)
