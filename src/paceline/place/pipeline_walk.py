"""How the model's own forward is walked through, stage by stage.

1. The modules between which the model may be cut are *gated*: a call of one of them is seen by the walk that is under way.
   Each such call is a *position*; what the forward does between two of them is *glue*.
2. A :class:`Sketch` walks through the whole forward with absent parameters: which positions there are, what they return, at
   which time each parameter is used, and which tensors live from one time to a later one.
3. A :class:`StageWalk` runs one stage for one micro-batch. Positions of earlier stages are skipped and return absent tensors;
   before the stage's first position the tensors that live across the cut are bound to what was received; where the next stage
   begins, the walk ends.

[Note: labels] Tensors that depend on parameters are labelled (time, number, leaf), where the number counts the glue's operations on
such tensors. Whatever is computed from inputs alone is not counted, so that masks may be made differently for each micro-batch.
Time 2i is the glue before position i, 2i + 1 is position i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils import _pytree as tree

from paceline.place.absent import Absent, known, to_meta
from paceline.place.nested import tensors
from paceline.terms.errors import StepError

Label = tuple[int, int, int]


class Reached(BaseException):
    """The forward has come to where the next stage begins. Not an ``Exception``: the script's code must not catch it."""


@dataclass(eq=False)
class Gates:
    """The gated modules of one copy of the model, and the walk that is under way."""

    names: dict[nn.Module, str]
    walk: Walk | None = None


def gate(model: nn.Module, names: Sequence[str]) -> Gates:
    """Make the calls of these modules visible. Their classes are replaced by subclasses of the same name."""
    gates = Gates({})
    for name in names:
        module = model.get_submodule(name)
        if module not in gates.names:
            gates.names[module] = name
            module.__class__ = _gated(type(module))
        module.__dict__["_gates"] = gates
    return gates


def ungate(gates: Gates) -> None:
    """Undo :func:`gate`."""
    for module in gates.names:
        if module.__dict__.pop("_gates", None) is not None:
            module.__class__ = type(module).__mro__[1]


def _gated(cls: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        gates = self.__dict__.get("_gates")
        if gates is None or gates.walk is None or gates.walk.inside:
            return cls.__call__(self, *args, **kwargs)
        return gates.walk.visit(self, lambda *a, **k: cls.__call__(self, *a, **k), args, kwargs)

    return type(
        cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )


# ---- what a sketch finds --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Returned:
    """What a position returns: a structure whose leaves are shapes, numbers of arguments, or constants."""

    spec: Any
    leaves: list[tuple[str, Any]]


@dataclass
class Route:
    """The way of the forward for one shape of inputs.

    Attributes:
        positions: The gated modules in the order of their calls.
        returned: What each of them returns.
        born, used: The first and last time of each labelled tensor.
        params, buffers: By name the times at which it is used.
        output: What the model returns, with absent leaves.
    """

    positions: list[str] = field(default_factory=list)
    returned: list[Returned] = field(default_factory=list)
    born: dict[Label, int] = field(default_factory=dict)
    used: dict[Label, int] = field(default_factory=dict)
    metas: dict[Label, Tensor] = field(default_factory=dict)
    params: dict[str, set[int]] = field(default_factory=dict)
    buffers: dict[str, set[int]] = field(default_factory=dict)
    output: Any = None

    def crossing(self, position: int) -> list[Label]:
        """What lives across a cut before `position`; the number of positions: across the end of the last one."""
        end = 2 * position - 1 if position == len(self.positions) else 2 * position
        return sorted(label for label, born in self.born.items() if born <= end < self.used.get(label, -1))


class Walk(TorchFunctionMode):
    """A forward that is walked through. Entered as a context around the model's own forward."""

    def __init__(self, gates: Gates) -> None:
        super().__init__()
        self.gates = gates
        self.position, self.number = 0, 0
        self.inside = False
        self.objects: dict[Label, Tensor] = {}

    def __enter__(self) -> Walk:
        self.gates.walk = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self.gates.walk = None
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Walk through ``forward(*args, **kwargs)``."""
        with self:
            return forward(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return self.attribute(func, args, kwargs)
        result = self.compute(func, args, kwargs)
        if not self.inside and self.depends(args, kwargs):
            self.label(result)
        return result

    def attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Tensors that come from attributes (``x.T``, ``p.data``) depend on what the tensor depends on."""
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not self.inside and self.depends(args, kwargs):
            self.label(result)
        return result

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def depends(self, args: Any, kwargs: Any) -> bool:
        """Whether one of the arguments depends on parameters."""
        return any("_label" in a.__dict__ or isinstance(a, nn.Parameter) for a in tensors((args, kwargs)))

    def label(self, result: Any) -> None:
        """Number the tensors of a result."""
        made = list(tensors(result))
        for leaf, t in enumerate(made):
            self.name(t, (2 * self.position, self.number, leaf))
        self.number += bool(made)

    def name(self, t: Tensor, label: Label) -> None:
        """`t` is known under this label from now on."""
        t.__dict__["_label"] = label
        self.objects[label] = t

    def visit(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def passed(self) -> None:
        """A position is behind us."""
        self.position += 1
        self.number = 0


class Sketch(Walk):
    """A walk through a copy of the model whose parameters are all absent.

    Args:
        params, buffers: Names by identity, of that copy.
    """

    def __init__(self, gates: Gates, params: Mapping[int, str], buffers: Mapping[int, str]) -> None:
        super().__init__(gates)
        self.route = Route()
        self._params, self._buffers = params, buffers

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Route:
        """The route of this forward."""
        output = super().run(forward, args, kwargs)
        self._use(tree.tree_leaves(output), 2 * self.position + 1)
        self.route.output = output
        return self.route

    @property
    def _time(self) -> int:
        return 2 * self.position + self.inside

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._use(tensors((args, kwargs)), self._time)
        return func(*args, **kwargs)

    def _use(self, values: Iterable[Any], time: int) -> None:
        for a in values:
            if not isinstance(a, Tensor):
                continue
            label = a.__dict__.get("_label")
            if label is not None:
                self.route.used[label] = time
            if id(a) in self._params:
                self.route.params.setdefault(self._params[id(a)], set()).add(time)
            elif id(a) in self._buffers:
                self.route.buffers.setdefault(self._buffers[id(a)], set()).add(time)

    def name(self, t: Tensor, label: Label) -> None:
        super().name(t, label)
        self.route.born[label] = label[0]
        self.route.metas[label] = to_meta(t)

    def visit(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.inside = True
        self._use(tree.tree_leaves((args, kwargs)), self._time)
        try:
            result = call(*args, **kwargs)
        finally:
            self.inside = False
        self.route.positions.append(self.gates.names[module])
        self._use(tree.tree_leaves(result), 2 * self.position + 1)
        self.route.returned.append(self._returned(result, tree.tree_leaves((args, kwargs))))
        self.passed()
        return result

    def _returned(self, result: Any, given: list[Any]) -> Returned:
        """Record what a position returns, and label it."""
        leaves, spec = tree.tree_flatten(result)
        found: list[tuple[str, Any]] = []
        for number, leaf in enumerate(leaves):
            same = next((i for i, a in enumerate(given) if a is leaf), None)
            if not isinstance(leaf, Tensor):
                found.append(("constant", leaf) if same is None else ("argument", same))
            elif same is not None and "_label" not in leaf.__dict__:
                found.append(("argument", same))
            else:
                found.append(("tensor", to_meta(leaf)))
                self.name(leaf, (2 * self.position + 1, 0, number))
        return Returned(spec, found)


class StageWalk(Walk):
    """One stage's part of a forward.

    Args:
        route: That of the inputs' shapes.
        first, last: The positions to compute; at `last` the walk ends by :class:`Reached`, unless `through`.
        received: What lives across the cut before `first`.
        home: Where absent tensors claim to be.
        through: Go on to the end of the forward.
        losses: How to compute mean losses in the glue of a part of the batch; see ``deferred_share``.
    """

    def __init__(
        self,
        gates: Gates,
        route: Route,
        first: int,
        last: int,
        received: Sequence[Tensor],
        home: torch.device,
        *,
        through: bool = False,
        losses: Callable[[Any, Any, Any], Any] | None = None,
    ) -> None:
        super().__init__(gates)
        self._route, self._first, self._last, self._through = route, first, last, through
        self._received, self._home, self._losses = received, home, losses
        self._bound = first == 0

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._losses is not None:
            return self._losses(func, args, kwargs)
        return func(*args, **kwargs)

    def visit(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._check(module)
        if self.position == self._last and not self._through:
            raise Reached
        skipped = self.position < self._first
        result = self._skip(args, kwargs) if skipped else self._compute(call, args, kwargs)
        self.passed()
        if self.position == self._last == len(self._route.positions):
            if not self._bound:
                self._bind()
            if not self._through:
                raise Reached
        return result

    def _check(self, module: nn.Module) -> None:
        name, positions = self.gates.names[module], self._route.positions
        if self.position >= len(positions) or positions[self.position] != name:
            raise StepError(
                "PL523",
                f"the forward called {name!r} as block {self.position + 1}, where it had called "
                f"{positions[self.position] if self.position < len(positions) else 'no block'!r} before",
            )

    def _skip(self, args: Any, kwargs: Any) -> Any:
        """What the position returns, computed by another stage."""
        returned, given = self._route.returned[self.position], tree.tree_leaves((args, kwargs))
        leaves: list[Any] = []
        for number, (kind, value) in enumerate(returned.leaves):
            if kind == "argument":
                leaves.append(given[value])
            elif kind == "constant":
                leaves.append(value)
            else:
                absent = Absent(value, self._home, f"the output of {self._route.positions[self.position]!r}")
                self.name(absent, (2 * self.position + 1, 0, number))
                leaves.append(absent)
        return tree.tree_unflatten(leaves, returned.spec)

    def _compute(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self._bound:
            self._bind()
        args, kwargs = known((args, kwargs))
        for a in tree.tree_leaves((args, kwargs)):
            if isinstance(a, Absent):
                raise StepError("PL522", f"{self._route.positions[self.position]!r} is given {a.origin}")
        self.inside = True
        try:
            with _pop_mode_temporarily():
                result = call(*args, **kwargs)
        finally:
            self.inside = False
        for number, (leaf, (kind, _)) in enumerate(
            zip(tree.tree_leaves(result), self._route.returned[self.position].leaves, strict=True)
        ):
            if kind == "tensor":
                self.name(leaf, (2 * self.position + 1, 0, number))
        return result

    def _bind(self) -> None:
        self._bound = True
        for label, t in zip(self._route.crossing(self._first), self._received, strict=True):
            absent = self.objects.get(label)
            if not isinstance(absent, Absent):
                raise StepError("PL523", f"the forward took another way than before: no tensor {label} is missing here")
            absent.bind(t)

    def leaving(self) -> list[Tensor]:
        """What lives across the end of this stage."""
        labels = self._route.crossing(self._last)
        missing = next((label for label in labels if label not in self.objects), None)
        if missing is not None:
            raise StepError("PL523", f"the forward took another way than before: there is no tensor {missing}")
        found = [known(self.objects[label]) for label in labels]
        for t in found:
            if isinstance(t, Absent):
                raise StepError("PL522", f"{t.origin} is needed after it was left behind")
        return found
