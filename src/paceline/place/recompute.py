"""Recomputing activations: blocks keep their inputs only, and run once more in backward (Chen et al. 2016, arXiv:1604.06174).

Costs one more forward of each block, saves what the block would have kept. Random draws are repeated exactly, and statistics of batch
normalisation count a batch once, so the numbers are those of the plain run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from paceline.terms.errors import UsageError

Recompute = Literal["auto", "blocks", "none"]
LARGE = 1 << 30
"""Bytes of a model's parameters from which `auto` recomputes its blocks."""


def wanted(how: str, model: nn.Module) -> bool:
    """Whether the blocks of this model are recomputed. Raises UsageError PL550 for a word that is none of :data:`Recompute`."""
    if how not in get_args(Recompute):
        raise UsageError("PL550", f"recompute={how!r}: it is one of {', '.join(get_args(Recompute))}")
    return how == "blocks" or (how == "auto" and sum(p.nbytes for p in model.parameters()) >= LARGE)


def recompute(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Let `blocks` of `model` compute their activations anew in backward; names and classes stay as they are.

    Models of Hugging Face do it themselves: they know what else must change (their caches of keys and values).
    """
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if callable(enable) and getattr(model, "supports_gradient_checkpointing", False):
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    for block in blocks:
        block.forward = _twice(block, block.forward)


def _twice(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    @wraps(forward)
    def forward_again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward_again


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second run leaves running statistics as the first one has left them."""
    norms = [m for m in block.modules() if isinstance(m, _NormBase)]
    before = [(b, b.clone()) for m in norms for b in m.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # its version stays, because backward may check it
