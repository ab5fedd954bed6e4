"""Inputs for a trial of a model that nobody has described: shapes are read off its first layers.

1. An example that was given: a batch as the loader makes it.
2. A model of the Hugging Face kind says what it reads (``main_input_name``) and how large (``config``).
3. Else the first layer says the type and the width; every required argument of ``forward`` gets the same tensor.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TIMES, SIDES = 2, (8, 4, 16, 1), (32, 28, 8, 64, 224)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def probes(model: nn.Module, example: Any = None) -> Iterator[Call]:
    """Arguments to try, most likely first."""
    if example is not None:
        yield from _from_example(example)
    yield from _from_config(model)
    required = _required(model)
    for tensor in _from_layers(model):
        yield (tensor,) * required, {}


def _from_example(example: Any) -> Iterator[Call]:
    if isinstance(example, dict):
        yield (), example
        yield (example,), {}
    elif isinstance(example, (tuple, list)):
        for count in range(1, len(example) + 1):
            yield tuple(example[:count]), {}
    else:
        yield (example,), {}


def _from_config(model: nn.Module) -> Iterator[Call]:
    config, reads = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(reads, str):
        return
    if reads == "input_ids":
        words = getattr(config, "vocab_size", 100)
        for time in TIMES:
            yield (), {reads: _ids(time, words)}
            yield (), {reads: _ids(time, words), "decoder_input_ids": _ids(time, words)}
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if reads == "pixel_values" and side is not None:
        shape = tuple(side) if isinstance(side, (tuple, list)) else (side, side)
        yield (), {reads: _floats((BATCH, channels, *shape))}


def _ids(time: int, words: int = 100) -> Tensor:
    """Words that differ, above those that mean an end or padding where there are so many."""
    return (3 + torch.arange(BATCH * time).view(BATCH, time)) % max(1, words)


def _floats(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(0.1, 1.0, math.prod(shape)).reshape(tuple(shape)).to(dtype)


def _required(model: nn.Module) -> int:
    """How many arguments ``forward`` needs."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters))


def _from_layers(model: nn.Module) -> Iterator[Tensor]:
    own = [p for p in model.parameters(recurse=False) if p.dim() > 1]
    times = dict.fromkeys([*(size for p in own for size in p.shape[:-1] if size > 1), *TIMES])
    for module in _first_layers(model):
        dtype = next(module.parameters()).dtype
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield from (_ids(time, module.num_embeddings) for time in times)
            return
        if isinstance(module, nn.modules.conv._ConvNd):
            rank = len(module.kernel_size)
            for side in SIDES:
                yield _floats((BATCH, module.in_channels, *(side,) * rank), dtype)
            return
        width = _width(module)
        if width is not None:
            for shape in ((BATCH, width), *((BATCH, time, width) for time in times)):
                yield _floats(shape, dtype)
            return


def _first_layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        holds = isinstance(module, nn.MultiheadAttention) or any(True for _ in module.parameters(recurse=False))
        if holds and (module is not model or not any(True for _ in module.children())):
            yield module


def _width(module: nn.Module) -> int | None:
    for name in ("in_features", "embed_dim", "input_size", "num_features"):
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        return int(shape[-1])
    weight = getattr(module, "weight", None)
    return int(weight.shape[-1]) if isinstance(weight, Tensor) and weight.dim() == 1 else None
