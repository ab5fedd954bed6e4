"""The deferred loss: what a model returns under a pipeline, before the pipeline has run.

``model(x)`` gives :class:`Deferred` tensors. They have shapes and types and no values; operations on them are recorded in the
:class:`Record` of this forward. ``loss.backward()`` hands the record to the pipeline, which computes the loss where the outputs
are. Afterwards numbers (the loss, an accuracy) have their values on every rank, and so have outputs that are small; larger ones
only on the last stage. Nothing can be read before.

[Note: in-place] An in-place operation is recorded as a new value of the tensor that it is called on. Another tensor that shares its
memory would not see it: its next use is refused (meta tensors count versions as real ones do).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as tree

from paceline.place.absent import META, Absent, on_meta
from paceline.place.nested import replace, tensors
from paceline.terms.errors import StepError

SHARED_NBYTES = 1 << 20
"""Outputs up to this size are sent to every rank of the pipeline after a backward, if a rank still refers to them."""

_READS = frozenset(
    {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"}
)
_PLAIN = frozenset(
    {"size", "dim", "numel", "stride", "__len__", "is_floating_point", "is_complex", "ndimension", "nelement"}
)
_PLAIN_TOO = frozenset(
    {"element_size", "is_contiguous", "get_device", "__hash__", "is_signed", "storage_offset", "type"}
)


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the record: leaf `leaf` of the result of node `node`; node -1 are the model's outputs."""

    node: int
    leaf: int


@dataclass(frozen=True)
class Node:
    """One recorded operation; deferred tensors in its arguments are replaced by their :class:`Ref`.

    Attributes:
        metas: The leaves of its result; None where a leaf is no tensor.
        in_place: It changes its first argument; whoever computes it works on a copy.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    metas: list[Tensor | None]
    in_place: bool = False


class Pipeline(Protocol):
    """Who runs the pipeline when backward is called."""

    def backward(self, record: Record, loss: Ref) -> None: ...


@dataclass(eq=False)
class Record:
    """All that was done with the outputs of one forward.

    Attributes:
        leaves: Shapes of the outputs that are deferred.
        done: Backward has run.
        values: What is known of the values since then.
        outputs: The outputs themselves, where they are.
        trip: What the pipeline remembers of the forward.
        large: Deferred tensors that are more than numbers.
        shapes: Of results, remembered from record to record.
    """

    pipeline: Pipeline
    home: torch.device
    leaves: list[Tensor]
    nodes: list[Node] = field(default_factory=list)
    done: bool = False
    values: dict[Ref, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] | None = None
    trip: Any = None
    large: list[weakref.ref[Tensor]] = field(default_factory=list)
    shapes: dict[Any, Any] = field(default_factory=dict)

    def kept(self) -> bool:
        """Whether the script still has a deferred tensor that is more than a number."""
        return any(reference() is not None for reference in self.large)

    def output(self, leaf: int) -> Deferred:
        """The deferred output with this number."""
        meta = self.leaves[leaf].detach().requires_grad_(self.leaves[leaf].requires_grad)
        return Deferred(meta.clone(), self, Ref(-1, leaf))

    def meta(self, ref: Ref) -> Tensor:
        """Shape and type of a value."""
        found = self.leaves[ref.leaf] if ref.node < 0 else self.nodes[ref.node].metas[ref.leaf]
        assert found is not None
        return found

    def scalars(self) -> list[Ref]:
        """Every number that was recorded, in order."""
        return [
            Ref(i, leaf)
            for i, node in enumerate([None, *self.nodes], start=-1)
            for leaf, meta in enumerate(self.leaves if node is None else node.metas)
            if meta is not None and meta.numel() == 1
        ]

    def needed(self, refs: Sequence[Ref]) -> list[int]:
        """The nodes that these values are computed from, in order."""
        wanted: set[int] = set()
        todo = [ref.node for ref in refs]
        while todo:
            node = todo.pop()
            if node >= 0 and node not in wanted:
                wanted.add(node)
                todo += [
                    a.node
                    for a in tree.tree_leaves((self.nodes[node].args, self.nodes[node].kwargs))
                    if isinstance(a, Ref)
                ]
        return sorted(wanted)

    def evaluate(self, outputs: Sequence[Tensor], refs: Sequence[Ref]) -> dict[Ref, Tensor]:
        """The values of `refs`, from the whole outputs."""
        known: dict[Ref, Any] = {Ref(-1, leaf): t for leaf, t in enumerate(outputs)}
        for i in self.needed(refs):
            node = self.nodes[i]
            args, kwargs = tree.tree_map_only(Ref, known.__getitem__, (node.args, node.kwargs))
            result = call(node, args, kwargs)
            known |= {Ref(i, leaf): t for leaf, t in enumerate(tree.tree_leaves(result))}
        return {ref: known[ref] for ref in refs}

    def value(self, ref: Ref) -> Tensor:
        """A value, after backward. Raises StepError PL524 before, PL525 where this rank does not have it."""
        if not self.done:
            raise StepError("PL524", "a value was read that is not computed before loss.backward()")
        if ref not in self.values:
            if self.outputs is None:
                meta = self.meta(ref)
                raise StepError(
                    "PL525",
                    f"a deferred tensor of shape {tuple(meta.shape)} was read on a rank that does not hold the model's outputs",
                )
            with torch.no_grad():
                self.values |= self.evaluate(self.outputs, [ref])
        return self.values[ref]


def call(node: Node, args: Any, kwargs: Any) -> Any:
    """Carry out a node; in-place operations on a copy."""
    if node.in_place:
        copy = args[0].clone()
        result = node.func(copy, *args[1:], **kwargs)
        return copy if result is None else result
    return node.func(*args, **kwargs)


class Deferred(Tensor):
    """A tensor that is known after backward.

    Args:
        meta: Its shape and type, and whether a gradient flows to it.
        record: Of the forward that it comes from.
        ref: Which value of it.
    """

    meta: Tensor
    record: Record
    ref: Ref
    version: int

    @staticmethod
    def __new__(cls, meta: Tensor, record: Record, ref: Ref) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=record.home, requires_grad=False
        )
        made.meta, made.record, made.ref, made.version = meta, record, ref, meta._version
        if meta.numel() > 1:
            record.large.append(weakref.ref(made))
        return made

    def __init__(self, meta: Tensor, record: Record, ref: Ref) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        if self.record.done:
            try:
                return repr(self.record.value(self.ref))
            except StepError:
                return f"Deferred({tuple(self.meta.shape)}, on the last stage only)"
        return f"Deferred({tuple(self.meta.shape)}, known after loss.backward())"

    def __format__(self, spec: str) -> str:
        if self.record.done and self.meta.dim() == 0:
            return format(self.record.value(self.ref).item(), spec)
        return repr(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise StepError("PL528", f"{func} of what a model returns under a pipeline cannot be recorded")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = next(a for a in tensors((args, kwargs)) if isinstance(a, Deferred))
        if name in ("__get__", "__set__", "__delete__"):
            return _attribute(func, name, first, args)
        if name in _PLAIN or name in _PLAIN_TOO:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "backward":
            return _backward(first, args, kwargs)
        if name == "grad":
            raise StepError("PL528", "torch.autograd.grad of a deferred loss", help="call loss.backward() instead.")
        if name in ("register_hook", "retain_grad", "requires_grad_"):
            raise StepError("PL528", f"{name}() on what a model returns under a pipeline")
        if name in _READS:
            return func(first.record.value(first.ref), *args[1:], **kwargs)
        if first.record.done:
            return _after(func, first, args, kwargs)
        return _record(func, name, first.record, args, kwargs)


def _attribute(func: Any, name: str, first: Deferred, args: Any) -> Any:
    what = getattr(getattr(func, "__self__", None), "__name__", "")
    if name == "__set__":
        raise StepError("PL528", f"setting .{what} of what a model returns under a pipeline")
    if what == "requires_grad":
        return first.meta.requires_grad
    if what == "grad_fn":
        return first.meta.grad_fn
    if what == "is_leaf":
        return False
    if what in ("T", "mT", "H", "mH", "real", "imag", "data"):
        step = _getter(what)
        return (
            _after(step, first, (first,), {}) if first.record.done else _record(step, what, first.record, (first,), {})
        )
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args)


@cache
def _getter(what: str) -> Callable[[Tensor], Tensor]:
    def get(t: Tensor) -> Tensor:
        found: Tensor = t.detach() if what == "data" else getattr(t, what)
        return found

    get.__name__ = what
    return get


def _backward(loss: Deferred, args: Any, kwargs: Any) -> None:
    gradient = kwargs.get("gradient", args[1] if len(args) > 1 else None)
    if kwargs.get("inputs") is not None or kwargs.get("create_graph"):
        raise StepError("PL528", "backward(inputs=…) or backward(create_graph=True) of a deferred loss")
    if loss.record.done:
        raise StepError("PL529", "backward was called twice for one forward of the model")
    if loss.meta.numel() != 1 and gradient is None:
        raise StepError("PL528", f"backward of a deferred tensor of shape {tuple(loss.meta.shape)}, which is no number")
    if not loss.meta.requires_grad:
        raise StepError("PL528", "backward of something that does not depend on trained parameters")
    if gradient is not None:
        loss = (loss * gradient).sum()
    loss.record.pipeline.backward(loss.record, loss.ref)


def _after(func: Any, first: Deferred, args: Any, kwargs: Any) -> Any:
    """Operations after backward work on values; on a rank that lacks one, the result lacks it too."""
    try:
        args_, kwargs_ = replace((args, kwargs), Deferred, lambda d: d.record.value(d.ref))
    except StepError as error:
        if error.code != "PL525":
            raise
        return _record(func, getattr(func, "__name__", ""), first.record, args, kwargs)
    with torch.no_grad():
        return func(*args_, **kwargs_)


def _record(func: Any, name: str, record: Record, args: Any, kwargs: Any) -> Any:
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    in_place = in_place or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    if (in_place and not isinstance(args[0], Deferred)) or kwargs.get("out") is not None:
        raise StepError("PL528", "a deferred tensor is written into one that is not")
    for a in tensors((args, kwargs)):
        _check(a, record)
    result = _shaped(record, func, args, kwargs, in_place)
    refs = replace((args, kwargs), Deferred, lambda d: d.ref)
    if in_place:
        target = args[0]
        record.nodes.append(Node(func, refs[0], refs[1], [target.meta], in_place=True))
        target.ref, target.version = Ref(len(record.nodes) - 1, 0), target.meta._version
        return target
    leaves, spec = tree.tree_flatten(result)
    metas = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return result
    record.nodes.append(Node(func, refs[0], refs[1], metas))
    number = len(record.nodes) - 1
    made = [
        Deferred(leaf, record, Ref(number, i)) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)
    ]
    return tree.tree_unflatten(made, spec)


def _shaped(record: Record, func: Any, args: Any, kwargs: Any, in_place: bool) -> Any:
    """The shapes of an operation's result. Those that own their memory are remembered: a meta loss takes milliseconds."""
    key = None if in_place else (func, _sign(args), _sign(kwargs))
    found = record.shapes.get(key)
    if found is not None:
        size, stride, dtype, needs_grad = found
        meta = torch.empty_strided(size, stride, dtype=dtype, device=META, requires_grad=needs_grad)
        return meta.clone() if needs_grad else meta
    result = on_meta(func, args, kwargs, _meta)
    own = isinstance(result, Tensor) and not result._is_view() and all(result is not _meta(t) for t in tensors(args))
    if key is not None and own and "<" not in repr(key[1:]):  # an object in it: it may change
        record.shapes[key] = result.shape, result.stride(), result.dtype, result.requires_grad
    return result


def _sign(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype), value.requires_grad
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(map(_sign, value))
    if isinstance(value, dict):
        return tuple((key, _sign(v)) for key, v in value.items())
    return value if isinstance(value, int | float | bool | str | None) else f"<{type(value).__name__}>"


def _check(a: Tensor, record: Record) -> None:
    if isinstance(a, Deferred):
        if a.record is not record:
            raise StepError(
                "PL529", "a loss is made from two forwards of the model", help="call the model once for each backward."
            )
        if a.version != a.meta._version:
            raise StepError("PL528", "a deferred tensor was changed in place while another one shared its memory")
    elif isinstance(a, Absent):
        raise StepError(
            "PL528",
            f"the loss uses {a.origin}, which another stage of the pipeline holds",
            help="penalties on parameters belong into the optimizer (weight_decay).",
        )
    elif a.requires_grad and not record.done:
        raise StepError("PL528", "the loss depends on a tensor that needs a gradient and does not come from the model")


def _meta(t: Tensor) -> Tensor:
    if isinstance(t, Deferred):
        return t.meta
    return t if t.device == META else torch.empty_like(t, device=META)
