"""Batch normalisation over the rows of all ranks, for the script that asks for it."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch
from torch import Tensor, nn

from paceline.exchange.axes import Kind
from paceline.group.wire import Wire
from paceline.place.sync_batchnorm import convert
from paceline.terms.errors import AdoptError, UsageError
from paceline.train.job import Job
from paceline.train.split_job import SplitJob

M = TypeVar("M", bound=nn.Module)

_REFUSED: dict[Kind, str] = {
    "pipeline": "a pipeline computes one micro-batch after the other",
    "tensor": "the ranks of a tensor-parallel group compute the same rows",
}


def share(job: Job, model: M) -> M:
    """See :func:`paceline.sync_batchnorm`."""
    if job.adopted:
        help = "model = paceline.sync_batchnorm(model), then job.adopt(model, ...)."
        raise AdoptError("PL309", "paceline.sync_batchnorm was called after job.adopt", help=help)
    layout = job.layout if isinstance(job, SplitJob) else None
    for kind, why in _REFUSED.items():
        if layout is not None and layout.axis(kind) is not None:
            raise UsageError("PL212", f"paceline.sync_batchnorm: {why}")
    if job.size > 1:
        convert(model, functools.partial(_table, job), real=lambda: not job._loop.phantom)
    return model


def _table(job: Job, row: Tensor) -> Tensor:
    """The rows of all ranks, in their order. All ranks compute the layer together."""
    mine = row.detach().to(torch.float64).cpu().contiguous()

    def gather(wire: Wire) -> list[bytes]:
        return wire.gather_bytes("batch normalisation", mine.numpy().tobytes())

    said = job.together(gather)
    return torch.stack([torch.frombuffer(bytearray(raw), dtype=torch.float64) for raw in said]).to(row.device)
