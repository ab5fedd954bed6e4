"""All state of a job as one tree: dictionaries and lists of plain values and tensors, under names that depend on no strategy and
no world size. A checkpoint saves it, a joiner is sent it, a roll-back keeps it.

    models      label -> {"state": name -> tensor, "more": buffers that a state_dict leaves out}
    optimizers  number -> {"kind", "groups": settings, "state": parameter's name -> key -> value, "own": foreign parameters}
    schedulers, scalers, kept   number or name -> state_dict
    loop        steps, samples, epoch
    feeds       number -> position
    streams     the data stream, and this process's own random state
    chain       what links remember between rounds, by the names of parameters

:func:`capture` makes no copies: the tree holds the job's own tensors, and is true until the next step. :func:`restore` writes
into the tensors that are there, so parameters keep their identity; nothing is cast and nothing is left out. :func:`flatten`
parts a tree into a *skeleton*, which is JSON, and its tensors by name; :func:`unflatten` is the inverse.
"""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paceline.data.feed import Feed
from paceline.data.streams import Streams
from paceline.terms.errors import AdoptError, FileError
from paceline.train.loop import Loop
from paceline.train.state import DTYPES, neutral

Tree = dict[str, Any]
T = TypeVar("T")

DEEPEST = 64
"""Levels of a skeleton; more are refused."""

_NAMES = {getattr(torch, spelled): name for name, (spelled, _) in DTYPES.items() if hasattr(torch, spelled)}
KINDS = {name: dtype for dtype, name in _NAMES.items()}


class Remembers(Protocol):
    """What links remember between rounds."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Things:
    """What a job has adopted, or a part of it: the keys are those of the whole.

    Attributes:
        names: What the parameters of all adopted models are called, see :func:`names_of`.
        loop, streams, chain: None leaves them out.
    """

    models: Mapping[str, nn.Module] = field(default_factory=dict)
    optimizers: Mapping[str, Optimizer] = field(default_factory=dict)
    schedulers: Mapping[str, LRScheduler] = field(default_factory=dict)
    scalers: Mapping[str, GradScaler] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)
    feeds: Mapping[str, Feed] = field(default_factory=dict)
    names: Mapping[Tensor, str] = field(default_factory=dict)
    loop: Loop | None = None
    streams: Streams | None = None
    chain: Remembers | None = None

    def without_place(self) -> Things:
        """All but where the loop, its loaders and the streams of random numbers stand."""
        return replace(self, feeds={}, loop=None, streams=None)

    def only(self, models: Mapping[str, nn.Module], chosen: Container[int]) -> Things:
        """These models, the kept objects, and those of the others whose ``id`` is among `chosen`."""

        def pick(things: Mapping[str, T]) -> dict[str, T]:
            return {key: thing for key, thing in things.items() if id(thing) in chosen}

        return Things(
            models=models,
            optimizers=pick(self.optimizers),
            schedulers=pick(self.schedulers),
            scalers=pick(self.scalers),
            kept=self.kept,
            names=self.names,
            loop=self.loop,
        )


def names_of(models: Mapping[str, nn.Module]) -> dict[Tensor, str]:
    """What every parameter is called: its model's label and its neutral name; tied ones have the first of their names."""
    named: dict[Tensor, str] = {}
    for label, model in models.items():
        for name, p in model.named_parameters():
            named.setdefault(p, f"{label}.{neutral(name)}")
    return named


def numbered(things: Sequence[T]) -> dict[str, T]:
    """Things by the order in which they were adopted."""
    return {str(number): thing for number, thing in enumerate(things)}


# ---- out of the job -------------------------------------------------------------------------------------------------
def capture(things: Things) -> Tree:
    """The state of `things`, as references. Raises AdoptError PL612 for state that belongs to no parameter."""
    tree: Tree = {
        "models": {label: _model(model) for label, model in things.models.items()},
        "optimizers": {key: _optimizer(key, o, things.names) for key, o in things.optimizers.items()},
        "schedulers": {key: _schedule(scheduler) for key, scheduler in things.schedulers.items()},
        "scalers": {key: scaler.state_dict() for key, scaler in things.scalers.items()},
        "kept": {name: dict(thing.state_dict()) for name, thing in things.kept.items()},
        "feeds": {key: feed.state_dict() for key, feed in things.feeds.items()},
    }
    if things.loop is not None:
        tree["loop"] = things.loop.state_dict()
    if things.streams is not None:
        tree["streams"] = things.streams.state_dict()
    if things.chain is not None:
        tree["chain"] = things.chain.state_dict()
    return tree


def _model(model: nn.Module) -> Tree:
    state = {neutral(name): value for name, value in model.state_dict().items()}
    return {"state": state, "more": {name: b for name, b in _buffers(model) if name not in state}}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((neutral(name), buffer) for name, buffer in model.named_buffers())


def _optimizer(key: str, optimizer: Optimizer, names: Mapping[Tensor, str]) -> Tree:
    called = _called(key, optimizer, names)
    for owner in optimizer.state:
        if owner not in called:
            raise AdoptError("PL612", f"{type(optimizer).__name__} keeps state that belongs to none of its parameters")
    return {
        "kind": type(optimizer).__qualname__,
        "groups": [{**group, "params": [called[p] for p in group["params"]]} for group in optimizer.param_groups],
        "state": {name: dict(optimizer.state[p]) for p, name in called.items() if p in optimizer.state},
        "own": {name: p.detach() for p, name in called.items() if p not in names},
    }


def _called(key: str, optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """What each of its parameters is called; those of no adopted model by their place."""
    return {
        p: names.get(p, f"optimizer {key}, group {number}, parameter {place}")
        for number, group in enumerate(optimizer.param_groups)
        for place, p in enumerate(group["params"])
    }


def _schedule(scheduler: LRScheduler) -> Tree:
    """Without ``step``, which the job has put there."""
    return {key: value for key, value in scheduler.state_dict().items() if key != "step"}


# ---- into the job ---------------------------------------------------------------------------------------------------
def restore(things: Things, tree: Tree) -> None:
    """Make `things` what they were when `tree` was captured. The tree's tensors may be kept by them afterwards.

    Raises:
        AdoptError: PL610, they are others than those; the message names the first difference. What had been restored
            before it stays so.
    """
    for label, model in things.models.items():
        _restore_model(model, _part(tree, "models", label), f"model {label!r}")
    for key, optimizer in things.optimizers.items():
        _restore_optimizer(key, optimizer, _part(tree, "optimizers", key), things.names)
    for key, scheduler in things.schedulers.items():
        _restore_schedule(scheduler, _part(tree, "schedulers", key))
    for key, scaler in things.scalers.items():
        _load(f"gradient scaler {key}", scaler, _part(tree, "scalers", key))
    for name, thing in things.kept.items():
        _restore_kept(name, thing, _part(tree, "kept", name))
    if things.loop is not None:
        things.loop.load_state_dict(tree["loop"])
    if things.streams is not None:
        things.streams.load_state_dict(tree["streams"])
    if things.chain is not None and "chain" in tree:
        things.chain.load_state_dict(tree["chain"])
    for key, feed in things.feeds.items():
        feed.load_state_dict(_part(tree, "feeds", key))


def _part(tree: Tree, kind: str, key: str) -> Any:
    try:
        return tree[kind][key]
    except KeyError:
        there = ", ".join(tree.get(kind, ())) or "nothing"
        raise AdoptError("PL610", f"it has no {key!r} among its {kind}, but {there}") from None


def _restore_model(model: nn.Module, saved: Tree, called: str) -> None:
    now = {neutral(name): (name, value) for name, value in model.state_dict().items()}
    _alike(called, {name: value for name, (_, value) in now.items()}, saved["state"], closed=True)
    _load(called, model, {now[name][0]: value for name, value in saved["state"].items()})
    buffers = dict(_buffers(model))
    _alike(called, buffers, saved["more"], closed=False)
    with torch.no_grad():
        for name, value in saved["more"].items():
            if name in buffers:
                buffers[name].copy_(value)


def _alike(called: str, now: Mapping[str, Any], saved: Mapping[str, Any], *, closed: bool) -> None:
    """Raise PL610 for the first tensor of another shape or type; `closed`: or that only one side has."""
    if closed and now.keys() != saved.keys():
        missing, more = [k for k in saved if k not in now], [k for k in now if k not in saved]
        what = f"it has {missing[0]!r}, which {called} has not" if missing else f"it has no {more[0]!r} of {called}"
        raise AdoptError("PL610", what)
    for name, value in saved.items():
        here = now.get(name)
        if isinstance(here, Tensor) and isinstance(value, Tensor) and not _same_kind(here, value):
            raise AdoptError("PL610", f"{name!r} of {called} is {_show(here)}, and was {_show(value)}")


def _same_kind(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _show(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _load(called: str, thing: Any, state: Any) -> None:
    """``load_state_dict``, with the thing's own complaint told as ours."""
    try:
        thing.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise AdoptError("PL610", f"{called} does not take its state: {error}") from error


def _restore_kept(name: str, thing: Any, saved: Any) -> None:
    called = f"the kept object {name!r}"
    if isinstance(thing, nn.Module):
        _alike(called, thing.state_dict(), saved, closed=True)
    _load(called, thing, saved)


def _restore_schedule(scheduler: LRScheduler, saved: Tree) -> None:
    now = scheduler.state_dict()
    _load(type(scheduler).__name__, scheduler, {key: _as_before(now.get(key), value) for key, value in saved.items()})


def _as_before(now: Any, value: Any) -> Any:
    """A dictionary of the kind that was there (a ``Counter`` of milestones)."""
    return type(now)(value) if isinstance(now, dict) and type(now) is not dict and isinstance(value, dict) else value


def _restore_optimizer(key: str, optimizer: Optimizer, saved: Tree, names: Mapping[Tensor, str]) -> None:
    kind, called = type(optimizer).__qualname__, _called(key, optimizer, names)
    if kind != saved["kind"]:
        raise AdoptError("PL610", f"optimizer {key} is {kind}, and was {saved['kind']}")
    _same_groups(f"{kind} (optimizer {key})", [[called[p] for p in g["params"]] for g in optimizer.param_groups], saved)
    of = {name: p for p, name in called.items()}
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    with torch.no_grad():
        for name, entries in saved["state"].items():
            now = optimizer.state.get(of[name], {})
            on_device = _steps_on_device(optimizer, of[name])
            state[of[name]] = {k: _into(now.get(k), v, of[name], k != "step" or on_device) for k, v in entries.items()}
        for name, value in saved["own"].items():
            _alike(kind, {name: of.get(name)}, {name: value}, closed=False)
            of[name].copy_(value)
        for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
            for k, v in settings.items():
                if k != "params":
                    group[k] = _into(group.get(k), v, None, False)
    optimizer.state = state  # another object: who keeps it divided between ranks takes it over anew


def _same_groups(called: str, groups: list[list[str]], saved: Tree) -> None:
    was = [group["params"] for group in saved["groups"]]
    if len(groups) != len(was):
        raise AdoptError("PL610", f"{called} has {len(groups)} groups of parameters, and had {len(was)}")
    for number, (now, then) in enumerate(zip(groups, was, strict=True)):
        if now != then:
            first = next((pair for pair in zip(now, then, strict=False) if pair[0] != pair[1]), None)
            what = f"{first[0]!r} where {first[1]!r} was" if first else f"{len(now)} parameters, and had {len(then)}"
            raise AdoptError("PL610", f"group {number} of {called} has {what}")


def _steps_on_device(optimizer: Optimizer, p: Tensor) -> bool:
    """Optimizers count their steps on the device only where they are told that they may not look."""
    group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
    return bool(group.get("capturable") or group.get("fused"))


def _into(now: Any, value: Any, owner: Tensor | None, with_owner: bool) -> Any:
    """`value`, in the tensor that is there; else in a new one, laid out in memory as its parameter is, and beside it."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(now, Tensor) and _same_kind(now, value):
        return now.copy_(value)
    if owner is None or not with_owner:
        return value
    if value.shape == owner.shape:
        return torch.empty_like(owner, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(owner.device)


# ---- skeleton and tensors -------------------------------------------------------------------------------------------
def flatten(tree: Tree) -> tuple[Tree, dict[str, Tensor]]:
    """Part a tree into a skeleton of JSON values and its tensors by name; what is one tensor in the job is one here.

    Raises:
        AdoptError: PL612, something in it is neither a plain value nor a dense tensor; the message names it.
    """
    flat = _Flat()
    skeleton: Tree = flat.walk(tree, "")
    return skeleton, flat.tensors


class _Flat:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[Any, str] = {}

    def walk(self, value: Any, path: str) -> Any:
        if path.count("/") > DEEPEST - 2:
            raise AdoptError("PL612", f"{path[1:61]}... is nested more than {DEEPEST} levels deep")
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, Tensor):
            return self._leaf(value.detach(), path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, (list, tuple)):
            items = [self.walk(item, f"{path}/{number}") for number, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, (bytes, bytearray)):
            return {"$bytes": base64.b64encode(value).decode()}
        raise AdoptError("PL612", f"{path[1:]} is a {type(value).__module__}.{type(value).__qualname__}")

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self.walk(item, f"{path}/{key}") for key, item in value.items()}
        pairs = ((self.walk(key, f"{path}/(key)"), self.walk(item, f"{path}/{key}")) for key, item in value.items())
        return {"$items": [list(pair) for pair in pairs]}

    def _leaf(self, tensor: Tensor, path: str) -> Tree:
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise AdoptError("PL612", f"{path[1:]} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}")
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else path
        name = self._known.setdefault(same, path[1:])
        if name == path[1:]:
            while name in self.tensors:
                name += "~"
            self._known[same] = name
            self.tensors[name] = tensor
        return {"$tensor": name, "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree again. Raises FileError PL613 for a skeleton that is none."""
    try:
        return _grow(skeleton, tensors, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError("PL613", f"its state cannot be read: {error!r}"[:300]) from error


def _grow(value: Any, tensors: Mapping[str, Tensor], depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if isinstance(value, list):
        return [_grow(item, tensors, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value), ""):
        case "$tensor":
            return tensors[value["$tensor"]]
        case "$float":
            return float(value["$float"])
        case "$tuple":
            return tuple(_grow(item, tensors, depth + 1) for item in value["$tuple"])
        case "$items":
            return {_grow(key, tensors, depth + 1): _grow(item, tensors, depth + 1) for key, item in value["$items"]}
        case "$bytes":
            return base64.b64decode(value["$bytes"], validate=True)
    return {key: _grow(item, tensors, depth + 1) for key, item in value.items()}


def kind_of(tensor: Tensor) -> str:
    """safetensors' name of its type."""
    return _NAMES[tensor.dtype]


def leaves(skeleton: Any) -> Iterator[tuple[str, str, list[int]]]:
    """Name, type and shape of every tensor of a skeleton, each as often as it occurs."""
    stack = [skeleton]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if "$tensor" in value:
                yield value["$tensor"], value["dtype"], value["shape"]
            else:
                stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def empty(skeleton: Tree) -> dict[str, Tensor]:
    """Memory for the tensors of a skeleton, on the CPU."""
    return {name: torch.empty(shape, dtype=KINDS[dtype]) for name, dtype, shape in leaves(skeleton)}
