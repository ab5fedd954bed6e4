"""The state of a run with servers, put together and taken apart: in a checkpoint nothing shows how many servers there were.

Each server knows its pieces of the parameters and the optimizer's state for them. The lead collects the others' between two
updates and makes the tree of ``tree``, with whole tensors under neutral names, and a part of its own, ``served``: which batches are
applied, and from which random states the orders of open passes are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from paceline.train.keeping import Kept

PieceState = dict[str, Any]
"""One piece: optimizer, item, start, stop; and the optimizer's state, tensors and numbers by key."""


def pieces_of(
    number: int, optimizer: Optimizer, pieces: Sequence[tuple[int, int, int, Tensor, Mapping[str, Any]]]
) -> list[PieceState]:
    """The state of one optimizer for the pieces (item, start, stop, parameter, what else there is) that this server has."""
    found = []
    for item, start, stop, param, more in pieces:
        state = optimizer.state.get(param, {})
        found.append({"optimizer": number, "item": item, "start": start, "stop": stop, "state": {**state, **more}})
    return found


def flatten(pieces: Sequence[PieceState]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """As JSON, and the tensors in the order in which they are named there; for a message between servers."""
    told, tensors = [], []
    for piece in pieces:
        state: dict[str, Any] = {}
        for key, value in sorted(piece["state"].items()):  # as JSON has them on the other side
            if isinstance(value, Tensor):
                state[key] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
                tensors.append(value.detach().contiguous())
            else:
                state[key] = value
        told.append({**piece, "state": state})
    return told, tensors


def unflatten(told: Sequence[Mapping[str, Any]], buffers: Sequence[memoryview]) -> list[PieceState]:
    """The inverse; tensors are copies."""
    following = iter(buffers)
    found = []
    for piece in told:
        state: dict[str, Any] = {}
        for key, value in sorted(piece["state"].items()):
            if isinstance(value, dict):
                raw = torch.frombuffer(bytearray(next(following)), dtype=getattr(torch, value["dtype"]))
                state[key] = raw.view(value["shape"])
            else:
                state[key] = value
        found.append({**piece, "state": state})
    return found


def optimizer_trees(
    kept: Kept, groups: Sequence[Sequence[Sequence[str]]], pieces: Sequence[PieceState]
) -> dict[str, Any]:
    """The optimizers' part of the tree.

    Args:
        groups: For each optimizer and group the names of its parameters.
        pieces: Of all servers.
    """
    trees: dict[str, Any] = {}
    for number, optimizer in enumerate(kept.optimizers):
        mine = [piece for piece in pieces if piece["optimizer"] == number]
        state: dict[str, dict[str, Any]] = {}
        for piece in sorted(mine, key=lambda p: (p["item"], p["start"])):
            item = kept.layout.items[piece["item"]]
            whole = state.setdefault(item.name, {})
            for key, value in piece["state"].items():
                if not isinstance(value, Tensor) or value.numel() != piece["stop"] - piece["start"] or not value.dim():
                    whole[key] = value
                    continue
                if key not in whole:
                    whole[key] = torch.empty(kept.params[piece["item"]].shape, dtype=value.dtype)
                whole[key].view(-1)[piece["start"] : piece["stop"]] = value.reshape(-1)
        trees[str(number)] = {
            "kind": type(optimizer).__qualname__,
            "groups": [
                {**group, "params": called}
                for group, called in zip(optimizer.param_groups, groups[number], strict=True)
            ],
            "state": {name: entries for name, entries in state.items() if entries},
            "own": {},
        }
    return trees


def cut_state(state: Mapping[str, Any], start: int, stop: int, numel: int) -> dict[str, Any]:
    """The state of a whole parameter for a piece of it."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        divided = isinstance(value, Tensor) and value.dim() > 0 and value.numel() == numel and stop - start < numel
        found[key] = value.reshape(-1)[start:stop].clone() if divided else value
    return found
