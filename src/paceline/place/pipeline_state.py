"""The whole model's state from its stages, under its original names, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from paceline.place.absent import Absent
from paceline.place.pipeline_cut import Parts
from paceline.place.pipeline_run import Form, Post
from paceline.place.pipeline_schedule import Schedule
from paceline.terms.errors import FileError

Extras = Mapping[str, Mapping[str, Any]]


class State:
    """Gathers and spreads what the stages hold.

    Attributes:
        full: Puts a parameter that is split over other ranks together.
    """

    def __init__(self, model: nn.Module, post: Post, schedule: Schedule, parts: Parts) -> None:
        self._model, self._post, self._schedule, self._parts = model, post, schedule, parts
        self.full: Callable[[Any], Any] = full

    def holders(self, name: str) -> list[int]:
        """Ranks of the pipeline that hold a parameter or whose value of a buffer counts."""
        parts = self._parts
        stages = parts.params[name] if name in parts.params else [parts.buffers[name]]
        return sorted({self._schedule.rank_of(stage) for stage in stages})

    def whole(self, *, everywhere: bool) -> dict[str, Tensor]:
        """All parameters and buffers with full values, on the host. All ranks call it.

        Args:
            everywhere: On all ranks; else only on the first, and others get an empty dictionary.
        """
        found: dict[str, Tensor] = {}
        for name, t in [*self._model.named_parameters(), *self._model.named_buffers()]:
            whole = self._gather(self.full(t), self.holders(name)[0], Form(tuple(t.shape), t.dtype, False), everywhere)
            if whole is not None:
                found[name] = whole
        return found

    def extras(self, mine: Extras, *, everywhere: bool) -> dict[str, dict[str, Any]]:
        """Per parameter a dictionary of tensors and plain values, such as an optimizer's state, of all stages.

        Args:
            mine: For the parameters of this rank, by name.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in self._parts.params:
            owner = self.holders(name)[0]
            here = mine.get(name, {}) if owner == self._post.rank else {}
            plain = {key: full(v) for key, v in here.items()}
            said = self._say({key: _described(v) for key, v in plain.items()}, owner)
            found[name] = {}
            for key, what in said.items():
                if "shape" not in what:
                    found[name][key] = what["value"]
                    continue
                form = Form(tuple(what["shape"]), getattr(torch, what["dtype"]), False)
                whole = self._gather(plain.get(key), owner, form, everywhere)
                if whole is not None:
                    found[name][key] = whole
        return found if everywhere or self._post.rank == 0 else {}

    def _gather(self, mine: Any, owner: int, form: Form, everywhere: bool) -> Tensor | None:
        post = self._post
        if everywhere:
            empty = torch.empty(form.shape, dtype=form.dtype, device=post.device)
            return post.share(mine.detach() if post.rank == owner else empty, owner).cpu()
        if owner == 0:
            return mine.detach().cpu().clone() if post.rank == 0 else None
        if post.rank == owner:
            post.send(mine, 0)
            post.settle()
        return post.wait(post.receive(form, owner)).cpu() if post.rank == 0 else None

    def _say(self, value: Any, owner: int) -> Any:
        """A JSON value of one rank, on all."""
        post = self._post
        data = json.dumps(value).encode() if post.rank == owner else b""
        size = int(post.share(torch.tensor([len(data)]), owner).item())
        buffer = torch.zeros(size, dtype=torch.uint8)
        if post.rank == owner:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return json.loads(bytes(post.share(buffer, owner).cpu().tolist()))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole state. Raises FileError PL610 for one of another model; nothing is changed then."""
        mine = [*self._model.named_parameters(), *self._model.named_buffers()]
        for name, t in mine:
            if name not in state or tuple(state[name].shape) != tuple(t.shape):
                has = tuple(state[name].shape) if name in state else "nothing"
                raise FileError("PL610", f"{name} has shape {tuple(t.shape)} in the model, and the state has {has}")
        with torch.no_grad():
            for name, t in mine:
                if isinstance(t, DTensor):
                    t.copy_(distribute_tensor(state[name].to(t.device), t.device_mesh, t.placements))
                elif not isinstance(t, Absent):
                    t.copy_(state[name])


def full(t: Any) -> Any:
    """A tensor that is split over other ranks, whole."""
    return t.full_tensor().detach() if isinstance(t, DTensor) else t


def _described(v: Any) -> dict[str, Any]:
    if isinstance(v, Tensor):
        return {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")}
    return {"value": v}
