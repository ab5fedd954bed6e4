"""A model in stages on several ranks: its state under original names, and that of its optimizers.

Which names there are, which of them are tied, and in which order optimizers have them, is noted before the model is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from paceline.place.pipeline import Pipeline
from paceline.train.seams import Seams
from paceline.train.state import neutral


class Staged:
    """One model with its pipeline.

    Args:
        label: Of the model.
        model: Whole still.
        optimizers: Of the script; those that hold its parameters count.
        pipeline: What will cut it.
        seams: How parts of its parameters go together.
    """

    def __init__(
        self, label: str, model: nn.Module, optimizers: Sequence[Optimizer], pipeline: Pipeline, seams: Seams
    ) -> None:
        self.label, self.pipeline, self.seams, self.is_cut = label, pipeline, seams, False
        self._model = model
        first: dict[Tensor, str] = {}
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._first = {name: first.setdefault(t, name) for name, t in tensors}
        self._saved = list(model.state_dict())
        self._orders = {o: [[first.get(p, "?") for p in g["params"]] for g in o.param_groups] for o in optimizers}

    def __deepcopy__(self, memo: dict[int, Any]) -> Staged:
        """A copy of the model has hooks that ask this one."""
        return self

    def cut(self) -> None:
        """The model has been cut."""
        self.is_cut = True
        self.pipeline.state.full = lambda t: self.seams.whole(t, t)

    def owns(self, optimizer: Optimizer) -> bool:
        """All its parameters are of this model."""
        return all(name != "?" for names in self._orders.get(optimizer, [["?"]]) for name in names)

    # ---- out --------------------------------------------------------------------------------------------------------
    def model_state(self, *, everywhere: bool) -> dict[str, Tensor]:
        """What ``model.state_dict()`` of the whole model would hold. All ranks of the replica call it.

        Args:
            everywhere: On all ranks; else only on the first, and nothing on others.
        """
        found = self.pipeline.state.whole(everywhere=everywhere)
        return {name: found[self._first[name]] for name in self._saved if found}

    def tree_of_model(self) -> dict[str, Any]:
        """The model's part of the job's state, on the first rank of the pipeline."""
        found = self.pipeline.state.whole(everywhere=False)
        state = {neutral(name): found[self._first[name]] for name in self._saved if found}
        more = {
            neutral(n): found[self._first[n]]
            for n, _ in self._model.named_buffers()
            if found and neutral(n) not in state
        }
        return {"state": state, "more": more}

    def _states(self, optimizer: Optimizer, *, everywhere: bool) -> dict[str, dict[str, Any]]:
        mine = {
            name: {key: self.seams.whole(value, p) for key, value in optimizer.state[p].items()}
            for name, p in self.pipeline.held
            if p in optimizer.state
        }
        found = self.pipeline.state.extras(mine, everywhere=everywhere)
        return {name: state for name, state in found.items() if state}

    def tree_of_optimizer(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's part of the job's state, on the first rank of the pipeline."""
        states = self._states(optimizer, everywhere=False)
        groups = [
            {**group, "params": [self._called(name) for name in names]}
            for group, names in zip(optimizer.param_groups, self._orders[optimizer], strict=True)
        ]
        return {
            "kind": type(optimizer).__qualname__,
            "groups": groups,
            "state": {self._called(name): state for name, state in states.items()},
            "own": {},
        }

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What ``optimizer.state_dict()`` of the whole model would hold. All ranks of the replica call it."""
        states = self._states(optimizer, everywhere=True)
        numbers = self._numbers(optimizer)
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [numbers[name] for name in names]}
            for group, names in zip(optimizer.param_groups, self._orders[optimizer], strict=True)
        ]
        return {"state": {numbers[name]: state for name, state in states.items()}, "param_groups": groups}

    def _numbers(self, optimizer: Optimizer) -> dict[str, int]:
        names = dict.fromkeys(name for group in self._orders[optimizer] for name in group)
        return {name: number for number, name in enumerate(names)}

    def _called(self, name: str) -> str:
        return f"{self.label}.{neutral(name)}"

    # ---- in ---------------------------------------------------------------------------------------------------------
    def part_of(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of a whole optimizer state what this rank's parameters need, as ``load_state_dict`` takes it."""
        numbers = self._numbers(optimizer)
        mine = {name for name, _ in self.pipeline.held}
        groups, kept, place = [], {}, 0
        for group, names in zip(state["param_groups"], self._orders[optimizer], strict=True):
            here = [name for name in names if name in mine]
            groups.append({**group, "params": list(range(place, place + len(here)))})
            for number, name in enumerate(here, place):
                if numbers[name] in state["state"]:
                    kept[number] = state["state"][numbers[name]]
            place += len(here)
        return {**state, "state": kept, "param_groups": groups}
