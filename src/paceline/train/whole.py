"""The state of a job whose replicas are split, put together: original names, full tensors.

Every rank of a replica takes part, in the same order; what was put together is kept on rank 0 only, one tensor after the other, so
that no other rank ever holds more than one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from paceline.train import tree as trees
from paceline.train.placing import Placed
from paceline.train.seams import Seams
from paceline.train.stages import Staged
from paceline.train.state import neutral


def gather(things: trees.Things, placed: Sequence[Placed], seams: Seams, keep: bool) -> trees.Tree:
    """The state of `things` as if nothing were split.

    Args:
        seams: How parts go together.
        keep: This rank is to have the result; the others get empty tensors in its place.
    """
    staged = {p.label: p.staged for p in placed if p.staged is not None and p.staged.is_cut}
    owners = {key: _owner(staged.values(), optimizer) for key, optimizer in things.optimizers.items()}
    rest = replace(
        things,
        models={label: model for label, model in things.models.items() if label not in staged},
        optimizers={key: optimizer for key, optimizer in things.optimizers.items() if owners[key] is None},
    )
    tree = trees.capture(rest)
    named = {name: p for p, name in things.names.items()}
    for label, model in rest.models.items():
        params = {neutral(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        tree["models"][label]["state"] = seams.state(tree["models"][label]["state"], params, keep)
    for saved in tree["optimizers"].values():
        states = saved["state"]
        saved["state"] = {
            name: seams.state(kept, dict.fromkeys(kept, named[name]), keep) for name, kept in states.items()
        }
    models = {label: stages.tree_of_model() for label, stages in staged.items()}
    optimizers = {k: o.tree_of_optimizer(things.optimizers[k]) for k, o in owners.items() if o is not None}
    tree["models"] = {label: models.get(label) or tree["models"][label] for label in things.models}
    tree["optimizers"] = {key: optimizers.get(key) or tree["optimizers"][key] for key in things.optimizers}
    return tree


def _owner(staged: Iterable[Staged], optimizer: Optimizer) -> Staged | None:
    return next((stages for stages in staged if stages.owns(optimizer)), None)


def _of_model(model: nn.Module, seams: Seams, keep: bool) -> dict[str, Any]:
    params = dict(model.named_parameters(remove_duplicate=False))
    return seams.state(model.state_dict(), params, keep)


def named(models: Mapping[str, nn.Module], placed: Sequence[Placed], seams: Seams, keep: bool) -> dict[str, Tensor]:
    """Parameters and persistent buffers of all models, whole, by neutral name; nothing where they are not kept."""
    staged = {p.label: p.staged for p in placed if p.staged is not None and p.staged.is_cut}
    found: dict[str, Tensor] = {}
    for label, model in models.items():
        stages = staged.get(label)
        with torch.no_grad():
            state = stages.model_state(everywhere=False) if stages is not None else _of_model(model, seams, keep)
        prefix = "" if len(models) == 1 else f"{label}."
        found |= {prefix + neutral(n): t.detach() for n, t in state.items() if isinstance(t, Tensor)} if keep else {}
    return found


# ---- what the script asks for ---------------------------------------------------------------------------------------
class States:
    """``state_dict`` and ``load_state_dict`` of models and optimizers that are split: whole tensors, as if they were not.

    Putting parts together takes all ranks of a replica, so all of them make these calls, at the same place of the script.
    """

    def __init__(self, seams: Seams) -> None:
        self._seams = seams
        self._parts = False
        self._staged: list[Staged] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> States:
        """A copy of a model has hooks that ask this one."""
        return self

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Inside, states are given as they are held."""
        self._parts = True
        try:
            yield
        finally:
            self._parts = False

    def of_model(self, model: nn.Module, staged: Staged | None) -> None:
        """Give whole states of this model."""
        if staged is not None:
            self._staged.append(staged)
        after: Any = partial(self._after_model, staged)  # torch marks it, which a method does not allow
        hooked: Any = model
        hooked.register_state_dict_post_hook(after)
        hooked.register_load_state_dict_pre_hook(partial(self._before_load))

    def of_optimizer(self, optimizer: Optimizer) -> None:
        """Give whole states of this optimizer."""
        optimizer.register_state_dict_post_hook(self._after_optimizer)
        optimizer.register_load_state_dict_pre_hook(self._before_load_optimizer)

    def _after_model(
        self, staged: Staged | None, module: nn.Module, state: dict[str, Any], prefix: str, about: dict[str, Any]
    ) -> None:
        if self._parts:
            return
        if staged is not None and staged.is_cut:
            found = staged.model_state(everywhere=True)
            state.update({prefix + name: t for name, t in found.items()})
        else:
            params = {prefix + name: p for name, p in module.named_parameters(remove_duplicate=False)}
            state.update(self._seams.state(state, params, True))

    def _after_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        if self._parts:
            return None
        stages = _owner((s for s in self._staged if s.is_cut), optimizer)
        if stages is not None:
            return stages.optimizer_state(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        named = dict(zip(numbers, params, strict=True))
        found = {}
        for number, kept in state["state"].items():
            like: dict[str, Tensor] = {key: named[number] for key in kept}
            found[number] = self._seams.state(kept, like, True)
        return {**state, "state": found}

    def _before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, p in (*module.named_parameters(), *module.named_buffers()):
            given = state.get(prefix + name)
            if isinstance(p, DTensor) and isinstance(given, Tensor) and not isinstance(given, DTensor):
                state[prefix + name] = self._seams.cut(p, given, name)

    def _before_load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        stages = _owner((s for s in self._staged if s.is_cut), optimizer)
        state = stages.part_of(optimizer, state) if stages is not None else state
        params = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        cut = dict(state["state"])
        for number, p in zip(numbers, params, strict=False):
            if isinstance(p, DTensor) and number in cut:
                kept = cut[number].items()
                cut[number] = {key: self._seams.cut(p, v, key) if _like(p, v) else v for key, v in kept}
        return {**state, "state": cut}


def _like(p: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DTensor) and value.dim() > 0 and value.shape == p.shape
