"""Cuts a model for a pipeline: finds its chain, measures it, shares it out, and takes away what this rank does not hold.

1. A copy of the model without parameters is walked through: positions, what lives between them, who uses which parameter.
2. The first rank measures the forward of each position, and checks that pieces of a batch give what the batch gives.
3. All ranks cut by the same numbers. A parameter belongs to each stage that uses it; elsewhere it becomes absent.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from paceline.place import cut
from paceline.place.absent import Total, stand_in, vanish
from paceline.place.cut import Stage
from paceline.place.pipeline_pieces import Batch, join, row_dim, signature
from paceline.place.pipeline_walk import Gates, Route, Sketch, Walk, gate
from paceline.terms.errors import AdoptError

_REPEATS = 4
_LONG_S = 2.0  # after which a model is not timed once more
_COPIED = 1 << 21  # numbers
_OPTIMIZER_MOVES = 7  # of a parameter and its state through memory, read or written: AdamW's
_ADDING_MOVES = 3
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


class Sketches:
    """Routes of the model by the shapes of its inputs, found with a copy that has no parameters.

    Args:
        model: Before it is cut.
        names: Of the modules between which it may be cut.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        memo: dict[int, Any] = {}
        for name, p in model.named_parameters():
            memo[id(p)] = stand_in(p, f"parameter {name!r}")
        self.model, self.copy = model, copy.deepcopy(model, memo)
        self.gates = gate(self.copy, names)
        self._params = {id(p): name for name, p in self.copy.named_parameters()}
        self._buffers = {id(b): name for name, b in self.copy.named_buffers()}
        self._modules = list(zip(model.modules(), self.copy.modules(), strict=True))
        self._routes: dict[Hashable, Route] = {}

    def key(self, args: Any, kwargs: Any) -> Hashable:
        """What a route depends on."""
        flags = hash(tuple(module.training for module, _ in self._modules))
        return signature(args, kwargs), flags, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def route(self, args: Any, kwargs: Any, *, anew: bool = False) -> Route:
        """The way of ``model(*args, **kwargs)``."""
        key = self.key(args, kwargs)
        if anew or key not in self._routes:
            for ours, theirs in self._modules:
                theirs.training = ours.training
            with torch.random.fork_rng(devices=[]):
                self._routes[key] = Sketch(self.gates, self._params, self._buffers).run(self.copy.forward, args, kwargs)
        return self._routes[key]


class Timed(Walk):
    """A forward of the whole model that measures each position."""

    def __init__(self, gates: Gates) -> None:
        super().__init__(gates)
        self.marks = [time.perf_counter()]

    def visit(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.marks.append(time.perf_counter())
        self.inside = True
        try:
            return call(*args, **kwargs)
        finally:
            self.inside = False
            self.passed()

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def label(self, result: Any) -> None:
        pass

    def costs(self) -> list[float]:
        """Seconds of each position with the code after it; the first with what comes before it."""
        marks = [*self.marks, time.perf_counter()]
        spans = [b - a for a, b in pairwise(marks)]
        return [spans[0] + spans[1], *spans[2:]] if len(spans) > 1 else spans


def measure(
    model: nn.Module, forward: Callable[..., Any], gates: Gates, positions: Sequence[str], batch: Batch
) -> tuple[list[float], float]:
    """Seconds of each position for a step, and how much the pieces of a batch differ from it.

    Forwards in evaluation mode are timed, piece by piece as the pipeline will compute them, several times: the least counts, as
    whatever else the machine does only adds to it. A backward takes two forwards, at the first position, whose inputs need no gradient, one;
    what parameters cost comes on top (:func:`upkeep`).
    The difference is relative to the largest output, over the tolerance of its type: up to 1 is rounding.
    """
    began = time.perf_counter()
    training = [module.training for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole = tree.tree_leaves(forward(*batch.args, **batch.kwargs))
            parts, costs = _timed(forward, gates, batch)
            for _ in range(_REPEATS):
                if time.perf_counter() - began > _LONG_S:
                    break
                costs = [min(pair) for pair in zip(costs, _timed(forward, gates, batch)[1], strict=True)]
    finally:
        for module, flag in zip(model.modules(), training, strict=True):
            module.training = flag
    worst = 0.0
    for i, t in enumerate(whole):
        if isinstance(t, Tensor) and t.is_floating_point() and t.dim() and batch.count > 1:
            worst = max(worst, _difference(t, [part[i] for part in parts]))
    extra = upkeep(model, positions, batch.count)
    return [(3 if i else 2) * cost + more for i, (cost, more) in enumerate(zip(costs, extra, strict=True))], worst


def _timed(forward: Callable[..., Any], gates: Gates, batch: Batch) -> tuple[list[list[Any]], list[float]]:
    """Outputs of each piece, and the seconds of each position for all of them."""
    outputs, spans = [], []
    for args, kwargs in map(batch.piece, range(batch.count)):
        timed = Timed(gates)
        outputs.append(tree.tree_leaves(timed.run(forward, args, kwargs)))
        spans.append(timed.costs())
    return outputs, [sum(span) for span in zip(*spans, strict=True)]


def upkeep(model: nn.Module, positions: Sequence[str], count: int) -> list[float]:
    """Seconds that the parameters of each position cost in a step of `count` micro-batches, whatever the batch is.

    Gradients of all micro-batches but the first are added up, and an optimizer reads and writes parameters and its state: so many
    times a parameter moves through memory, whose speed is measured. Nothing is said of accelerators.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.device.type == "cpu"}
    if not trained:
        return [0.0] * len(positions)
    example = max(trained.values(), key=Tensor.numel).detach().flatten()[:_COPIED]
    room, copies = torch.empty_like(example), []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        room.copy_(example)
        copies.append(time.perf_counter() - began)
    moves = _OPTIMIZER_MOVES + _ADDING_MOVES * (count - 1)
    per_byte = min(copies) / (2 * example.nbytes) * moves
    return [
        per_byte * sum(p.nbytes for name, p in trained.items() if f"{name}.".startswith(f"{position}."))
        for position in positions
    ]


def _difference(whole: Tensor, parts: Sequence[Tensor]) -> float:
    dim = row_dim(whole.shape, parts[0].shape, "an output")
    if dim is None:
        return 0.0
    joined = join(parts, dim)
    if joined.shape != whole.shape:
        return float("inf")
    scale = float(whole.abs().max()) or 1.0
    return float((joined - whole).abs().max()) / scale / _TOLERANCE.get(whole.dtype, 1e-3)


@dataclass
class Parts:
    """How a model is shared out.

    Attributes:
        stages: In order.
        positions: Names of the blocks.
        costs: Seconds of each of them.
        params: By name (the first, where one is tied) the stages that use it.
        buffers: By name the stage whose value counts.
        sizes: By name the bytes of each parameter.
    """

    stages: list[Stage]
    positions: list[str]
    costs: list[float]
    params: dict[str, list[int]] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def at(self, moment: int) -> int:
        """The stage that computes at this time of a route."""
        position = moment // 2 if moment % 2 else max(0, moment // 2 - 1)
        return next((s.index for s in self.stages if s.first <= position < s.last), self.stages[-1].index)

    def owner(self, name: str) -> int:
        """The stage of the block that a module or parameter is part of; the first stage where it is outside of blocks."""
        for position, block in enumerate(self.positions):
            if name == block or name.startswith(f"{block}."):
                return self.at(2 * position + 1)
        return 0


def share_out(
    model: nn.Module,
    route: Route,
    num_stages: int,
    costs: Sequence[float],
    cuts: Sequence[str] | None,
) -> Parts:
    """Decide the stages and who holds what. Pure: all ranks decide the same. Raises AdoptError PL521."""
    positions = route.positions
    check_length(route, num_stages)
    if cuts is not None:
        stages = cut.named(positions, cuts, num_stages)
    else:
        nbytes = [0.0] + [_nbytes(route, i) for i in range(1, len(positions))]
        stages = cut.partition(costs, nbytes, num_stages)
    parts = Parts(stages, positions, list(costs))
    for name, p in model.named_parameters():
        times = route.params.get(name)
        parts.params[name] = sorted({parts.at(t) for t in times}) if times else [parts.owner(name)]
        parts.sizes[name] = p.numel() * p.element_size()
    for name, _ in model.named_buffers():
        times = route.buffers.get(name)
        parts.buffers[name] = min(parts.at(t) for t in times) if times else parts.owner(name)
    return parts


def check_length(route: Route, num_stages: int) -> None:
    """Raises AdoptError PL521 where there are fewer blocks than stages."""
    positions = route.positions
    if len(positions) < num_stages:
        found = f"{len(positions)} blocks ({', '.join(positions[:8])})" if positions else "no chain of blocks"
        raise AdoptError("PL521", f"{num_stages} stages, and the model's forward has {found}")


def _nbytes(route: Route, position: int) -> float:
    return float(
        sum(route.metas[label].numel() * route.metas[label].element_size() for label in route.crossing(position))
    )


def take_away(model: nn.Module, parts: Parts, mine: Sequence[int], total: Total) -> list[nn.Parameter]:
    """Make absent what none of this rank's stages uses; which parameters that were."""
    torch.clear_autocast_cache()  # it knows parameters, by references that would forbid to take them away
    gone = []
    for name, p in list(model.named_parameters()):
        if not set(parts.params[name]) & set(mine):
            vanish(p, name, total)
            gone.append(p)
    return gone
