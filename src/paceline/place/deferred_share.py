"""The part of a loss that comes from one micro-batch, so that the parts add up to the loss of the whole batch.

The record of a loss is carried out on the rows of one micro-batch. Each value there is one of two kinds:

*rows*: what the whole batch's value has for these rows. Operations that treat rows one by one keep the kind.
*sum*: a part of a number that is a sum over rows. A mean over rows becomes a sum divided by what the whole batch is divided by:
the number of its elements, of its targets that are not ignored, or the sum of its class weights.

Sums may be added, and multiplied by numbers that do not depend on the model. Anything else is no sum over rows: StepError PL531.
The first batch is also computed whole, and compared; so a wrong guess here (which tensors have rows) is refused, not believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as tree

from paceline.place.absent import Absent
from paceline.place.deferred import Node, Record, Ref, call
from paceline.terms.errors import StepError

_ELEMENTWISE = (
    *(
        functional.mse_loss,
        functional.l1_loss,
        functional.smooth_l1_loss,
        functional.huber_loss,
        functional.binary_cross_entropy,
        functional.soft_margin_loss,
    ),
    *(
        functional.binary_cross_entropy_with_logits,
        functional.kl_div,
        functional.poisson_nll_loss,
        functional.hinge_embedding_loss,
    ),
)
_BY_CLASS = (functional.cross_entropy, functional.nll_loss)
_NAMES = {function.__name__: function for function in (*_ELEMENTWISE, *_BY_CLASS)}
_LINEAR = frozenset(
    {"add", "sub", "__add__", "__radd__", "__sub__", "__rsub__", "__iadd__", "__isub__", "add_", "sub_", "rsub"}
)
_SCALED = frozenset(
    {"mul", "div", "__mul__", "__rmul__", "__truediv__", "__imul__", "__itruediv__", "mul_", "div_", "true_divide"}
)
_KEPT = frozenset(
    {"neg", "__neg__", "to", "float", "double", "half", "bfloat16", "contiguous", "clone", "view", "reshape", "squeeze"}
    | {"unsqueeze", "sum", "mean", "stack", "cat", "__getitem__", "flatten", "positive", "type_as", "expand"}
)
_SHAPES = frozenset({"view", "reshape", "expand", "unflatten"})


@dataclass(frozen=True, slots=True)
class Slice:
    """Which rows of a batch: from `low` to `high` of `rows`."""

    low: int
    high: int
    rows: int

    @property
    def portion(self) -> float:
        """The part of the rows."""
        return (self.high - self.low) / self.rows

    def of(self, t: Tensor, dim: int = 0) -> Tensor:
        """These rows of a tensor of the whole batch; several of its entries may belong to a row."""
        each = t.shape[dim] // self.rows
        return t.narrow(dim, self.low * each, (self.high - self.low) * each)

    def has_rows(self, t: Tensor) -> bool:
        """Whether the first dimension of a tensor can be that of the batch."""
        return t.dim() > 0 and t.shape[0] > 0 and t.shape[0] % self.rows == 0


@dataclass(frozen=True, slots=True)
class _Value:
    """A value for some rows; `summed`: it is a part of a sum."""

    value: Any
    summed: bool


def _no_sum(what: str) -> StepError:
    return StepError("PL531", f"the loss is no sum over rows: {what}")


def evaluate(record: Record, outputs: Sequence[tuple[Tensor, bool]], rows: Slice, ref: Ref) -> Tensor:
    """This micro-batch's part of the number `ref`.

    Args:
        outputs: The model's for these rows; whether each is a part of a sum already.
        rows: Which rows these are.

    Raises:
        StepError: It is no sum over rows (PL531).
    """
    known = {Ref(-1, leaf): _Value(t, summed) for leaf, (t, summed) in enumerate(outputs)}
    for i in record.needed([ref]):
        results = _carry_out(record, record.nodes[i], known, rows)
        known |= {Ref(i, leaf): value for leaf, value in enumerate(results)}
    found = known[ref]
    if not found.summed:
        raise _no_sum("it does not add up rows")
    value: Tensor = found.value
    return value


def _carry_out(record: Record, node: Node, known: dict[Ref, _Value], rows: Slice) -> list[_Value]:
    name = getattr(node.func, "__name__", "")
    given = [known[a] for a in tree.tree_leaves((node.args, node.kwargs)) if isinstance(a, Ref)]
    if all(v.summed for v in given):
        return _of_sums(node, name, known, rows)
    if any(v.summed for v in given):
        raise _no_sum(f"{name} of rows and of a sum over rows")
    if name in _NAMES:
        part = mean_loss(node.func, *_whole(record, node, known, rows))
        if part is not None:
            return [_Value(part, True)]
    args, kwargs = tree.tree_map(lambda a: _for_rows(a, known, rows), (node.args, node.kwargs))
    try:
        result = call(node, _fitting(name, args, node, rows), kwargs)
    except RuntimeError as error:
        raise _no_sum(f"{name} does not work on a part of the rows ({error})") from error
    return [
        _classify(name, v, meta, args, record, node, rows)
        for v, meta in zip(tree.tree_leaves(result), node.metas, strict=True)
    ]


def _for_rows(a: Any, known: dict[Ref, _Value], rows: Slice) -> Any:
    if isinstance(a, Ref):
        return known[a].value
    return rows.of(a) if isinstance(a, Tensor) and rows.has_rows(a) else a


def _fitting(name: str, args: Any, node: Node, rows: Slice) -> Any:
    """``x.view(B * T, V)`` names the rows of the whole batch: for a part of it the number is smaller."""
    meta = node.metas[0]
    if name not in _SHAPES or meta is None:
        return args
    sizes = list(args[1:])
    nested = len(sizes) == 1 and isinstance(sizes[0], list | tuple)
    flat = list(sizes[0]) if nested else sizes
    if flat and isinstance(flat[0], int) and flat[0] > 0 and flat[0] % rows.rows == 0 and flat[0] == meta.shape[0]:
        flat[0] = flat[0] // rows.rows * (rows.high - rows.low)
    return (args[0], tuple(flat)) if nested else (args[0], *flat)


def _classify(name: str, v: Any, meta: Tensor | None, args: Any, record: Record, node: Node, rows: Slice) -> _Value:
    if meta is None or not isinstance(v, Tensor):
        return _Value(v, False)
    if v.shape == meta.shape:
        if name == "sum":
            return _Value(v, True)
        if name == "mean":
            first = next(a for a in tree.tree_leaves(node.args) if isinstance(a, Ref))
            return _Value(v * (args[0].numel() / record.meta(first).numel()), True)
        if v.numel() == 0 or rows.portion == 1.0:
            return _Value(v, False)
        raise _no_sum(f"{name} combines rows")
    expected = (meta.shape[0] // rows.rows * (rows.high - rows.low), *meta.shape[1:]) if meta.dim() else ()
    if tuple(v.shape) != tuple(expected):
        raise _no_sum(f"{name} combines rows")
    return _Value(v, False)


def _of_sums(node: Node, name: str, known: dict[Ref, _Value], rows: Slice) -> list[_Value]:
    """Operations on numbers that are sums."""
    if name in _LINEAR:  # a constant is added once, not once for each part
        args, kwargs = tree.tree_map(
            lambda a: (
                known[a].value if isinstance(a, Ref) else a * rows.portion if isinstance(a, Tensor | float | int) else a
            ),
            (node.args, node.kwargs),
        )
        if node.kwargs.get("alpha") is not None:
            raise _no_sum(f"{name} with alpha")
    elif name in _SCALED or name in _KEPT:
        refs = sum(isinstance(a, Ref) for a in tree.tree_leaves((node.args, node.kwargs)))
        under = name in _SCALED and len(node.args) > 1 and isinstance(node.args[1], Ref)
        if name in _SCALED and (refs > 1 or (under and "div" in name)):
            raise _no_sum(f"{name} of two numbers that depend on the model")
        args, kwargs = tree.tree_map_only(Ref, lambda a: known[a].value, (node.args, node.kwargs))
    else:
        raise _no_sum(f"{name} of a sum over rows")
    return [_Value(v, True) for v in tree.tree_leaves(call(node, args, kwargs))]


# ---- losses that are means ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Sizes:
    """A tensor of the whole batch of which only the shape is known."""

    shape: torch.Size


def _whole(record: Record, node: Node, known: dict[Ref, _Value], rows: Slice) -> tuple[Any, Any, Any, Any]:
    """Arguments of a node for these rows, and for the whole batch."""
    by_class = getattr(node.func, "__name__", "") in ("cross_entropy", "nll_loss")
    roles = ("weight", "pos_weight") if by_class else ("pos_weight",)  # per class, not per row
    args = [a if by_class and i == 2 else _for_rows(a, known, rows) for i, a in enumerate(node.args)]
    kwargs = {key: a if key in roles else _for_rows(a, known, rows) for key, a in node.kwargs.items()}
    args_, kwargs_ = tree.tree_map_only(Ref, lambda a: _Sizes(record.meta(a).shape), (node.args, node.kwargs))
    return args, kwargs, args_, kwargs_


def mean_loss(func: Callable[..., Any], args: Any, kwargs: Any, whole_args: Any, whole_kwargs: Any) -> Any:
    """A loss function's value for some rows as a part of its value for the whole batch; None: it is not reduced to a number."""
    try:
        return part_of_mean(func, args, kwargs, divisor(func, whole_args, whole_kwargs))
    except RuntimeError as error:
        if isinstance(error, StepError):
            raise
        raise _no_sum(f"{func.__name__} does not work on a part of the rows ({error})") from error


def is_loss(func: Callable[..., Any]) -> bool:
    """Whether a function is one of torch's losses that are means or sums."""
    return getattr(func, "__name__", "") in _NAMES


def divisor(func: Callable[..., Any], args: Any, kwargs: Any) -> float | Tensor | None:
    """By what the whole batch's loss is divided; None where it is not reduced to a number."""
    name = getattr(func, "__name__", "")
    names = ("input", "target", "weight") if name in ("cross_entropy", "nll_loss") else ("input", "target")
    known = {**dict(zip(names, args, strict=False)), **kwargs}
    reduction = known.get("reduction", "mean")
    if reduction == "none" or len(args) > 3:
        return None
    if reduction == "sum":
        return 1.0
    given, target, weight = known["input"], known["target"], known.get("weight")
    if name not in ("cross_entropy", "nll_loss"):
        return float(given.shape[0] if reduction == "batchmean" else given.shape.numel())
    if not isinstance(target, Tensor) or isinstance(target, Absent):
        raise _no_sum("its targets depend on the model")
    if target.is_floating_point():  # probabilities
        return float(target.numel() // target.shape[1 if target.dim() > 1 else 0])
    counted: Tensor = target != known.get("ignore_index", -100)
    if not isinstance(weight, Tensor):
        return counted.sum()
    return weight[target.clamp(0, len(weight) - 1)].mul(counted).sum()


def part_of_mean(func: Callable[..., Any], args: Any, kwargs: Any, over: float | Tensor | None) -> Any:
    """The sum that a mean loss is made of for some rows, `over` the whole batch's divisor."""
    if over is None:
        return None
    return func(*args, **{**kwargs, "reduction": "sum"}) / over
