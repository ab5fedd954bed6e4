"""Which parameters are split, and how: found by trials of the unchanged model, with parameters that have shapes and no values.

1. The model runs on a small batch, its parameters and what comes of them on the meta device, with every layer that could be cut by its outputs (*column*) cut so. Its output is a split activation, followed
   through the model by the very rules that training uses (:mod:`paceline.place.tensor_rules`).
2. A layer that is reached by a split activation uses it up (*row*). An activation that has to be made whole on the way
   means that its layer should not have been split: the reason is kept, the layer is held whole in the next trial.
3. Where an activation could go on if its features were cut in segments (queries, keys and values computed at once), they are.
4. The trials end when one brings no news. Tables and heads over a vocabulary are cut by words.

A model that decides by values of activations, or whose inputs cannot be guessed, needs an example or a plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paceline.place.tensor_probe import Call, probes
from paceline.place.tensor_products import mha_arguments, mha_obstacle
from paceline.place.tensor_rules import tensors
from paceline.place.tensor_split import METADATA, Layout, NotLocal, Split, apply, map_splits
from paceline.place.tensor_wire import Imagined, around_functions
from paceline.terms.errors import PacelineError, UsageError

WORDS = ("column", "row", "vocab", "replicate")
RETURNED = "the model returns its output"
SMALL = 64  # a table or head with less than this part of all parameters is not worth an exchange


@dataclass(frozen=True, slots=True)
class Way:
    """How one parameter is held.

    Attributes:
        word: "column", "row", "vocab" or "replicate".
        dim: The dim that is cut; None: every rank holds all.
        segments: Lengths that the dim consists of, see :class:`Layout`.
        reason: Why it is held whole; empty where it is split.
    """

    word: str
    dim: int | None = None
    segments: tuple[int, ...] = ()
    reason: str = ""

    def layout(self, num: int) -> Layout:
        return Layout(self.segments, num)


Plan = dict[str, Way]


def derive(model: nn.Module, num: int, overrides: Mapping[str, str] | None = None, example: Any = None) -> Plan:
    """A way for each parameter of `model`, by its first name, in the order of ``named_parameters``.

    Args:
        num: Number of ranks.
        overrides: By pattern of a parameter's or its module's name what to do with it; the first that fits counts.
        example: A batch; needed where the inputs cannot be guessed from the layers.

    Raises:
        UsageError: PL540 no trial could be run and nothing is asked for, PL541 nothing can be split by `num`,
            PL542 a pattern that fits nothing or an unknown word, PL543 a split that is asked for is impossible.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    asked = _asked(model, names, overrides or {})
    call, why = _runnable(model, example)
    search = _Search(model, num, names, asked)
    if call is not None:
        search.run(call)
    elif not asked:
        raise UsageError("PL540", f"the inputs of {type(model).__name__} could not be guessed ({why})")
    plan = search.plan(None if call is not None else f"not tried: {why}")
    if not any(way.dim is not None for way in plan.values()):
        raise UsageError("PL541", f"nothing in {type(model).__name__} can be split over {num} ranks: {_reasons(plan)}")
    return plan


def _reasons(plan: Plan) -> str:
    said = dict.fromkeys(f"{name}: {way.reason}" for name, way in plan.items() if name.endswith("weight"))
    lines = list(said)
    return "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")


def _asked(model: nn.Module, names: Mapping[int, str], overrides: Mapping[str, str]) -> dict[str, str]:
    asked: dict[str, str] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    for pattern, word in overrides.items():
        if word not in WORDS:
            raise UsageError(
                "PL542", f"the plan says {word!r} for {pattern!r}", help=f"the words are: {', '.join(WORDS)}."
            )
        found = [
            names[id(p)]
            for name, p in every.items()
            if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
        ]
        if not found:
            raise UsageError("PL542", f"the plan's pattern {pattern!r} fits no parameter and no layer")
        for name in found:
            asked.setdefault(name, word)
    return asked


# ---- one trial --------------------------------------------------------------------------------------------------------
@dataclass
class _Notes:
    """What one trial has shown."""

    ways: Plan = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    segments: dict[str, tuple[int, ...]] = field(default_factory=dict)


class _Ranks(Imagined):
    """Imagined ranks that note what had to be made whole."""

    def __init__(self, num: int, search: _Search) -> None:
        super().__init__(num)
        self._search = search

    def made_whole(self, split: Split, why: NotLocal) -> None:
        self._search.made_whole(split, why)


class _Search:
    """Trials until nothing new is learned."""

    def __init__(self, model: nn.Module, num: int, names: Mapping[int, str], asked: Mapping[str, str]) -> None:
        self.model, self.num, self.names, self.asked = model, num, names, asked
        self.params = dict(model.named_parameters())
        self.total = sum(p.numel() for p in self.params.values())
        self.ranks = _Ranks(num, self)
        self.notes = _Notes()
        self.known: dict[str, tuple[str, str]] = {}  # name: word and reason, from earlier trials
        self.segments: dict[str, tuple[int, ...]] = {}
        every = [names[id(p)] for _, p in model.named_parameters(remove_duplicate=False)]
        self.tied = {name for name in every if every.count(name) > 1} if len(every) > len(self.params) else set()

    def run(self, call: Call) -> None:
        while True:
            self.notes = _Notes()
            try:
                _forward(self.model, call, _Watch(self.model, self), self._returned)
            except PacelineError:
                raise
            except Exception as error:
                raise UsageError("PL540", f"a trial of {type(self.model).__name__} failed ({_said(error)})") from error
            if not self._learn():
                return

    def plan(self, untried: str | None) -> Plan:
        """What the last trial used; a parameter that it did not reach is held whole."""
        if untried is not None:
            self._by_type()
        reason = untried or "the trial did not reach it"
        plan = {name: self.notes.ways.get(name) or Way("replicate", reason=reason) for name in self.params}
        self._refuse_unanswered(plan)
        return plan

    def _refuse_unanswered(self, plan: Plan) -> None:
        """Raise UsageError PL543 for a split that was asked for and is not there. A layer's bias goes with its weight."""
        layers = {name.rpartition(".")[0] for name, p in self.params.items() if p.dim() > 1}
        for name, word in self.asked.items():
            alone = self.params[name].dim() > 1 or name.rpartition(".")[0] not in layers
            if word != "replicate" and alone and plan[name].dim is None:
                raise UsageError("PL543", f"{name} cannot be split as {word!r}: {plan[name].reason}")

    def _learn(self) -> bool:
        notes = self.notes
        if notes.segments:  # what failed may have failed for want of these
            self.segments |= notes.segments
            return True
        news = False
        for name, way in notes.ways.items():
            if (
                way.word != "column"
                or name in self.asked
                or name in self.known
                or way.reason
                or not _is_weight(self.params[name])
            ):
                continue
            reason = notes.failed.get(name)
            if reason is None and name in notes.used:
                continue
            news = True
            if reason in (None, RETURNED) and self._large_head(name, way):
                self.known[name] = ("vocab", "")
            else:
                self.known[name] = ("replicate", reason or "no layer that could be split reads its output")
        return news

    def _large_head(self, name: str, way: Way) -> bool:
        shape = self.params[name].shape
        assert way.dim is not None
        return shape[way.dim] >= 2 * shape[1 - way.dim] and self.params[name].numel() * SMALL >= self.total

    # ---- what the trial tells --------------------------------------------------------------------------------------
    def _returned(self, output: Any) -> None:
        for each in tensors(output):
            if isinstance(each, Split):
                self.made_whole(each, NotLocal(RETURNED))

    def made_whole(self, split: Split, why: NotLocal) -> None:
        for name in split.origins:
            way = self.notes.ways[name]
            if way.word == "vocab" or name in self.asked:
                continue
            new = _finer(self.notes.segments.get(name, way.segments), why.segments)
            if len(new) > len(way.segments) and all(length % self.num == 0 for length in new):
                self.notes.segments[name] = new
            elif why.reason == RETURNED:
                self.notes.failed.setdefault(name, RETURNED)
            elif self.notes.failed.get(name, RETURNED) == RETURNED:
                self.notes.failed[name] = why.reason

    def decide(self, function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A layer is about to run: how its parameters are held, unless that is known by now."""
        if function == "linear":
            self._linear(*args, **kwargs)
        elif function == "addmm":
            self._addmm(*args, **kwargs)
        elif function == "embedding":
            self._embedding(*args, **kwargs)
        elif function == "multi_head_attention_forward":
            self._attention(mha_arguments(*args, **kwargs))

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> None:
        self._layer(input, weight, bias, 0)

    def _addmm(self, bias: Any, input: Any, weight: Any, **kwargs: Any) -> None:
        self._layer(input, weight, bias, 1)

    def _layer(self, input: Any, weight: Any, bias: Any, out: int) -> None:
        name = self.names.get(id(weight))
        if name is None or name in self.notes.ways:
            return
        uses_up = isinstance(input, Split) and input.cut_dim == input.part.dim() - 1
        word, reason = self._wanted(name, "row" if uses_up else "column")
        length, width = weight.shape[out], weight.shape[1 - out]
        if word == "replicate":
            self._hold(reason, weight, bias)
        elif word == "row":
            if uses_up:
                self.notes.used.update(input.origins)
            segments = input.cuts.segments if uses_up else (width,)
            self._cut(name, weight, Way("row", 1 - out, segments))
            self._hold("added after the sum", bias)
        else:
            segments = self.segments.get(name, (length,))
            self._cut(name, weight, Way(word, out, segments))
            if (bias_name := self.names.get(id(bias))) is not None:
                self._cut(bias_name, bias, Way(word, 0, segments))

    def _wanted(self, name: str, else_: str) -> tuple[str, str]:
        if name in self.asked:
            return self.asked[name], "as the plan says"
        return self.known.get(name, (else_, ""))

    def _cut(self, name: str, p: Tensor, way: Way) -> None:
        assert way.dim is not None
        layout = way.layout(self.num)
        if any(layout.length(rank) == 0 for rank in range(self.num)):
            if name in self.asked:
                raise UsageError(
                    "PL543",
                    f"{name} {tuple(p.shape)} cannot be split as {way.word!r}: dim {way.dim} is too short for {self.num} ranks",
                )
            self.notes.ways[name] = Way("replicate", reason=f"too short for {self.num} ranks")
            return
        self.notes.ways[name] = way

    def _hold(self, reason: str, *params: Any) -> None:
        for p in params:
            if (name := self.names.get(id(p))) is not None:
                self.notes.ways.setdefault(name, Way("replicate", reason=reason))

    def _embedding(
        self, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **more: Any
    ) -> None:
        name = self.names.get(id(weight))
        if name is None or name in self.notes.ways:
            return
        word, reason = self._wanted(name, "vocab")
        if (
            max_norm is not None
            or any(rest[1:])
            or any(more.get(key) for key in ("max_norm", "scale_grad_by_freq", "sparse"))
        ):
            word, reason = "replicate", "a table with settings that need all of it"
        elif name not in self.asked and name not in self.tied and weight.numel() * SMALL < self.total:
            word, reason = "replicate", "a small table"
        if word == "replicate":
            self._hold(reason, weight)
        else:
            dim = 1 if word == "column" else 0
            self._cut(name, weight, Way(word, dim, (weight.shape[dim],)))

    def _attention(self, a: Mapping[str, Any]) -> None:
        weights = [a["in_proj_weight"], a["out_proj_weight"]]
        found = [self.names.get(id(weight)) for weight in weights]
        first, second = found
        if first is None or second is None or first in self.notes.ways or second in self.notes.ways:
            return
        every = (*weights, a["in_proj_bias"], a["out_proj_bias"])
        reason = mha_obstacle(dict(a), self.num)
        if any(isinstance(a[key], Split) for key in ("query", "key", "value")):
            reason = "attention that reads a split activation"
        for name in (first, second):
            if self._wanted(name, "")[0] == "replicate":
                reason = self._wanted(name, "")[1]
            elif reason is not None and name in self.asked:
                raise UsageError("PL543", f"{name} cannot be split: {reason}")
        if reason is not None:
            self._hold(reason, *every)
            return
        segments = (weights[0].shape[1],) * 3
        self._cut(first, weights[0], Way("column", 0, segments))
        self._cut(second, weights[1], Way("row", 1, segments[:1]))
        self.notes.used.add(first)
        if (bias := self.names.get(id(a["in_proj_bias"]))) is not None:
            self._cut(bias, a["in_proj_bias"], Way("column", 0, segments))
        self._hold("added after the sum", a["out_proj_bias"])

    def resolve(self, value: Tensor, function: str) -> Tensor | None:
        """What stands for a parameter in the trial; None for other tensors."""
        name = self.names.get(id(value))
        if name is None:
            return None
        way = self.notes.ways.get(name)
        if way is None:
            way = self.notes.ways[name] = Way("replicate", reason=f"read whole by {function.strip('_')}")
        meta = torch.empty_like(value, device="meta", requires_grad=False)
        if way.dim is None:
            return meta
        layout = way.layout(self.num)
        return Split(layout.cut(meta, way.dim, 0), way.dim, layout, self.ranks, (name,))

    # ---- without a trial -------------------------------------------------------------------------------------------
    def _by_type(self) -> None:
        """Only what the plan asks for, on layers whose type says how they are laid out."""
        for path, module in self.model.named_modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            name = self.names.get(id(weight))
            if name is None or self.asked.get(name, "replicate") == "replicate":
                continue
            shadow = torch.empty(0, device="meta")
            if isinstance(module, nn.Linear):
                self._layer(shadow, weight, bias, 0)
            elif isinstance(module, nn.Embedding):
                self._embedding(shadow, weight, None, module.max_norm, None, module.scale_grad_by_freq, module.sparse)
            elif type(module).__name__ == "Conv1D":
                self._layer(shadow, weight, bias, 1)
            else:
                raise UsageError("PL543", f"{path} is a {type(module).__name__}, and there is no rule to split it")


def _finer(old: tuple[int, ...], new: tuple[int, ...] | None) -> tuple[int, ...]:
    """Segments with the boundaries of both; those of before where they are of another dim."""
    if new is None or sum(old) != sum(new):
        return old
    ends = sorted({0, *accumulate(old), *accumulate(new)})
    return tuple(end - start for start, end in pairwise(ends))


def _is_weight(p: Tensor) -> bool:
    return p.dim() > 1


class _Watch(TorchFunctionMode):
    """Follows split activations through one run.

    Parameters are on the meta device; what does not come of them (inputs, masks, positions) has values, so a model may look at
    these. Where both meet the result is on the meta device. Buffers are copies.
    """

    def __init__(self, model: nn.Module, search: _Search | None) -> None:
        super().__init__()
        self._search = search
        self._copies = {id(p): p.detach().to("meta") for p in model.parameters()}
        self._copies |= {id(b): b.detach().clone() if b.is_meta else b.detach().cpu().clone() for b in model.buffers()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        label = func.__self__.__name__ if name in ("__get__", "__set__") else name  # type: ignore[attr-defined]
        if label in METADATA:
            return func(*args, **kwargs)
        if name in ("to", "cpu", "cuda"):
            args, kwargs = _nowhere(args, kwargs)
            func = torch.Tensor.to
            if not args[1:] and not kwargs:
                return self._resolved(args[0], name)
        if self._search is not None:
            self._search.decide(name, args, kwargs)
        args, kwargs = self._resolved(args, name), self._resolved(kwargs, name)
        given = list(tensors((args, kwargs)))
        if not given and "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "meta":
            kwargs = {**kwargs, "device": "cpu"}  # made beside an activation, as positions and masks are: with values
        if any(each.is_meta for each in given):
            args, kwargs = _on_meta(args), _on_meta(kwargs)
        if any(isinstance(each, Split) for each in given):
            return apply(func, args, kwargs)
        return func(*args, **kwargs)

    def _resolved(self, value: Any, function: str) -> Any:
        def one(each: Tensor) -> Tensor:
            found = self._search.resolve(each, function) if self._search is not None else None
            if found is None:
                found = self._copies.get(id(each), each)
            return found if found.is_meta or found.is_cpu else found.cpu()

        return _mapped(value, one)


def _on_meta(value: Any) -> Any:
    return _mapped(value, lambda each: each if each.is_meta else each.to("meta"))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, Split) else change(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        items = [_mapped(each, change) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    return value


def _nowhere(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Arguments of ``Tensor.to`` without a device."""
    rest = [each for each in args[1:] if not isinstance(each, (str, int, torch.device))]
    rest = [each.dtype if isinstance(each, Tensor) else each for each in rest]
    rest = [each for each in rest if isinstance(each, torch.dtype)]
    return (args[0], *rest), {key: each for key, each in kwargs.items() if key == "dtype" and each is not None}


# ---- running without values --------------------------------------------------------------------------------------------
def _runnable(model: nn.Module, example: Any) -> tuple[Call | None, str]:
    """The first probe that the model runs with; else why the first did not."""
    why = ""
    for call in probes(model, example):
        try:
            _forward(model, call, _Watch(model, None), lambda output: None)
            return call, ""
        except PacelineError:
            raise
        except Exception as error:
            why = why or _said(error)
    return None, why or "no layer says what it reads"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _forward(model: nn.Module, call: Call, watch: _Watch, returned: Callable[[Any], None]) -> None:
    args, kwargs = call
    with _untouched(model), warnings.catch_warnings(), torch.no_grad(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.enter_context(around_functions(_whole_for_function))
        stack.enter_context(watch)
        returned(model(*args, **kwargs))


def _whole_for_function(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A user's own autograd Function works below what rules can see."""
    return tuple(map_splits(each, NotLocal("a torch.autograd.Function is applied to it")) for each in args)


@contextmanager
def _untouched(model: nn.Module) -> Any:
    """What a run changes in the modules' attributes, and the generator, are as before afterwards."""
    kept = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    random = torch.get_rng_state()
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        torch.set_rng_state(random)
