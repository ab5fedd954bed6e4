"""Checkpoints made to order: cut among any number of files, damaged in any way."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.train import tree as trees
from paceline.train.checkpoint import save_tree
from paceline.train.checkpoint_writer import Writing
from paceline.train.manifest import FORMAT, VERSION, Box

Shards = Sequence[Mapping[str, tuple[Tensor, Box, tuple[int, ...]]]]
"""What each process holds: by name the elements, their box, and the shape of the whole tensor."""


def write_shards(directory: Path, shards: Shards, state: Any, step: int = 1) -> Path:
    """A checkpoint with one file for each process."""
    files, at = [], 0
    placed: list[tuple[int, bytes]] = []
    for number, shard in enumerate(shards):
        entries = []
        for name, (tensor, (start, stop), whole) in shard.items():
            raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
            kind = trees.kind_of(tensor)
            entry = {"name": name, "key": name, "dtype": kind, "shape": list(tensor.shape), "at": at, "bytes": len(raw)}
            entries.append(entry | {"start": list(start), "stop": list(stop), "of": list(whole)})
            placed.append((at, raw))
            at += len(raw)
        files.append({"name": f"shard-{number}.safetensors", "entries": entries})
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "epoch": 0, "state": state}
    text = json.dumps({"files": files, "manifest": manifest}).encode()
    memory_fd = os.memfd_create("test")
    try:
        os.ftruncate(memory_fd, at + len(text))
        with mmap.mmap(memory_fd, at + len(text)) as memory:
            for start, raw in [*placed, (at, text)]:
                memory[start : start + len(raw)] = raw
        order = {"directory": str(directory), "number": 0, "keep": 99, "right": [0, 0], "at": at, "bytes": len(text)}
        writing = Writing(memory_fd, order)
        writing.write()
        return writing.publish()
    finally:
        os.close(memory_fd)


def small(directory: Path, step: int = 5, seed: int = 0) -> Path:
    """A checkpoint of a model of two tensors and some state."""
    g = torch.Generator().manual_seed(seed + step)
    model = {"weight": torch.randn(8, 4, generator=g), "bias": torch.randn(8, generator=g)}
    tree = {
        "models": {"model": {"state": model, "more": {}}},
        "kept": {"average": {"mean": torch.randn(3, 5, generator=g), "count": 3}},
        "loop": {"steps": step, "samples": 80, "epoch": 0, "passed": 0},
    }
    return save_tree(tree, directory)
