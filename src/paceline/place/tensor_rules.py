"""Rules for split activations: functions that act on each position, and those that move, name or reduce dims.

Each rule carries a function of torch out on the parts that ranks hold, exactly, or raises NotLocal. Products are in
:mod:`paceline.place.tensor_products`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paceline.place.tensor_split import Layout, NotLocal, Split, rule, splits

Call = Callable[..., Any]

UNARY = """relu relu_ relu6 gelu silu silu_ mish sigmoid sigmoid_ tanh tanh_ hardtanh hardswish hardsigmoid elu elu_ selu celu
leaky_relu leaky_relu_ softplus softsign logsigmoid threshold exp exp_ expm1 log log1p log2 sqrt sqrt_ rsqrt neg neg_ __neg__ abs
__abs__ sin cos tan square square_ sign reciprocal erf floor ceil round trunc frac isnan isinf isfinite logical_not bitwise_not
__invert__ nan_to_num clone detach contiguous float double half bfloat16 int long bool to type type_as cpu cuda alias positive
zeros_like ones_like empty_like full_like data"""

POINTWISE = """add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ rsub __isub__ mul mul_ __mul__ __rmul__ __imul__ multiply
div div_ __truediv__ __rtruediv__ __rdiv__ __itruediv__ true_divide divide pow pow_ __pow__ __rpow__ __ipow__ remainder fmod
__mod__ floor_divide __floordiv__ maximum minimum clamp clamp_ clamp_min clamp_max clip eq ne lt le gt ge __eq__ __ne__ __lt__
__le__ __gt__ __ge__ logical_and logical_or logical_xor __and__ __or__ __xor__ bitwise_and bitwise_or where masked_fill masked_fill_
lerp addcmul addcdiv atan2 prelu subtract float_power square_ xlogy hypot"""


def together(*values: Any) -> tuple[Split, int]:
    """One of the split tensors among `values` and its dim counted from the right; NotLocal unless all are cut alike."""
    found = list(splits(*values))
    first = found[0]
    right = first.cut_dim - first.part.dim()
    for other in found[1:]:
        if other.cut_dim - other.part.dim() != right or other.cuts != first.cuts:
            raise NotLocal("two activations that are split in different ways")
    if first.ranks.trial and len(found) > 1:
        names = tuple(dict.fromkeys(name for each in found for name in each.origins))
        first = Split(first.part, first.cut_dim, first.cuts, first.ranks, names)
    return first, right


def beside(value: Any, split: Split, right: int) -> Any:
    """What stands beside a part in a function that broadcasts: the part of a tensor that has the dim, else the tensor."""
    if isinstance(value, Split):
        return value.part
    if not isinstance(value, Tensor) or (value.dim() == 0 and not value.requires_grad):
        return value
    dim = value.dim() + right
    if dim < 0 or value.shape[dim] == 1:
        return split.ranks.enter(value)
    if value.shape[dim] != split.cuts.total:
        raise NotLocal("shapes that do not fit")
    if split.ranks.trial and value.numel() >= math.prod(split.part.shape) * split.ranks.num:
        raise NotLocal("meets an activation that every rank holds whole")
    return split.ranks.cut(value, dim, split.cuts)


@rule(*UNARY.split())
def unary(func: Call, split: Any, *args: Any, **kwargs: Any) -> Any:
    """Of one tensor, position by position; further arguments only set something."""
    if not isinstance(split, Split):
        args = tuple(each.part if isinstance(each, Split) else each for each in args)
        return func(split, *args, **kwargs)
    if func.__name__ == "__get__":
        return split.like(split.part.detach())
    part = func(split.part, *(each.part if isinstance(each, Split) else each for each in args), **kwargs)
    if part is split.part:
        return split
    return split.like(part) if isinstance(part, Tensor) else part


@rule(*POINTWISE.split())
def pointwise(func: Call, *args: Any, **kwargs: Any) -> Any:
    """Of several tensors, position by position, with broadcasting."""
    split, right = together(*args, *kwargs.values())
    if kwargs.get("out") is not None:
        raise NotLocal("an argument out=")
    into = args[0] if _in_place(func) else None
    if into is not None and not isinstance(into, Split):
        raise NotLocal("a whole tensor is changed in place by a split one")
    mapped = [beside(each, split, right) for each in args]
    named = {key: beside(each, split, right) for key, each in kwargs.items()}
    part = func(*mapped, **named)
    if not isinstance(part, Tensor):
        raise NotLocal(f"{func.__name__} with several results")
    if isinstance(into, Split):
        into.part = part
        return into
    return split.like(part, part.dim() + right)


def _in_place(func: Call) -> bool:
    name = func.__name__
    return (name.startswith("__i") and name != "__invert__") or (name.endswith("_") and not name.endswith("__"))


@rule("glu")
def _glu(func: Call, split: Split, dim: int = -1) -> Any:
    first, second = split.chunk(2, dim)
    return first * torch.sigmoid(second)


# ---- random numbers ---------------------------------------------------------------------------------------------------
@rule("dropout", "dropout_")
def _dropout(
    func: Call, input: Split, p: float = 0.5, training: bool = True, inplace: bool = False, **named: Any
) -> Any:
    """The whole mask is drawn by every rank, from generators that are alike, and cut: the mask of one process."""
    training = named.get("train", training)
    if not training or p == 0.0:
        return input
    return input.like(input.part * mask(input, tuple(input.shape), p))


def mask(split: Split, shape: Sequence[int], p: float) -> Tensor:
    """This rank's part of a dropout mask of the whole `shape`, already divided by the probability to be kept."""
    whole = functional.dropout(torch.ones(shape, dtype=split.part.dtype, device=split.part.device), p)
    return split.cuts.cut(whole, split.cut_dim, split.ranks.rank)


# ---- shapes -----------------------------------------------------------------------------------------------------------
def _numbers(args: Sequence[Any]) -> list[int]:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else list(args)


@rule("view", "reshape", "unflatten", "flatten", "view_as", "reshape_as")
def _view(func: Call, split: Split, *args: Any, **kwargs: Any) -> Any:
    if func.__name__ == "view" and args and isinstance(args[0], torch.dtype):
        raise NotLocal("a view as another type")
    shape = _new_shape(func.__name__, split, args, kwargs)
    dim, layout, local = refold(split, shape)
    return split.like(split.part.reshape(local), dim, layout)


def _new_shape(name: str, split: Split, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    """The whole shape that is asked for, without -1."""
    old = list(split.shape)
    if name == "flatten":
        start = kwargs.get("start_dim", args[0] if args else 0) % len(old)
        end = kwargs.get("end_dim", args[1] if len(args) > 1 else -1) % len(old)
        return [*old[:start], math.prod(old[start : end + 1]), *old[end + 1 :]]
    if name == "unflatten":
        dim = kwargs.get("dim", args[0] if args else 0) % len(old)
        sizes, total = kwargs.get("sizes", args[-1] if args else ()), old[dim]
        return [*old[:dim], *_filled(list(sizes), total), *old[dim + 1 :]]
    if name.endswith("_as"):
        return list(args[0].shape)
    return _filled(_numbers((*args, *kwargs.values())), math.prod(old))


def _filled(sizes: list[int], total: int) -> list[int]:
    known = math.prod(size for size in sizes if size != -1)
    return [total // max(1, known) if size == -1 else size for size in sizes]


def refold(split: Split, shape: list[int]) -> tuple[int, Layout, list[int]]:
    """Where the cut goes when the whole takes on `shape`: its dim, its layout, and the shape of the part.

    Dims before the cut must stay apart from it. The cut dim may be joined with those after it, and taken apart where
    the pieces of all ranks begin between positions of the first new dim that has more than one.
    """
    old, layout, num = list(split.shape), split.cuts, split.ranks.num
    before = math.prod(old[: split.cut_dim])
    products = [1, *accumulate(shape, lambda a, b: a * b)]
    if before not in products:
        raise NotLocal("the split dim is joined with one before it")
    places = [i for i, product in enumerate(products[:-1]) if product == before]
    if not places:
        raise NotLocal("a view without the split dim")
    dim = next((i for i in places if shape[i] > 1), places[-1])  # the first that is longer than one
    length, total = shape[dim], layout.total
    following = [size for size in shape[dim + 1 :] if size > 1]
    parts = len(layout.segments)
    if parts > 1 and length == parts and len(set(layout.segments)) == 1:
        inner = Split(split.part, split.cut_dim, Layout((layout.segments[0],), num), split.ranks)
        shape = [*shape[:dim], 1, *shape[dim + 1 :]]
        dim, layout, local = _settle(inner.cuts, shape, dim + 1)
        return dim, layout, [*local[: dim - 1], parts, *local[dim:]]
    if (
        split.ranks.trial
        and parts == 1
        and length in (2, 3)
        and total % length == 0
        and math.prod(shape[dim:]) > length
    ):
        room = following[0] if following else 0
        if length < total and room % num == 0 and len(following) > 1:
            raise NotLocal("several segments of features", (total // length,) * length)
    return _settle(layout, shape, dim)


def _settle(layout: Layout, shape: list[int], dim: int) -> tuple[int, Layout, list[int]]:
    length, total = shape[dim], layout.total
    if length == total:
        new: Layout | None = layout
    elif length % total == 0:
        new = layout.scaled(length // total)
    elif total % length == 0:
        new = layout.divided(total // length)
    else:
        new = None
    if new is None:
        raise NotLocal(f"{length} heads cannot be shared evenly by {layout.num} ranks")
    local = list(shape)
    local[dim] = -1
    return dim, new, local


@rule("transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "T", "mT", "unsqueeze", "squeeze")
def _move(func: Call, split: Split, *args: Any, **kwargs: Any) -> Any:
    """Which dim the cut is on afterwards is read off a tensor without memory that has another stride there."""
    name = func.__name__
    if name == "__get__":
        name = func.__self__.__name__  # type: ignore[attr-defined]
    if name == "squeeze" and not args and not kwargs and split.part.shape[split.cut_dim] == 1:
        raise NotLocal("squeeze without a dim")
    part = func(split.part, *args, **kwargs)
    lengths = [2 + i if size != 1 or i == split.cut_dim else 1 for i, size in enumerate(split.part.shape)]
    marker = torch.empty(lengths, device="meta")
    moved = func(marker, *args, **kwargs).shape
    return split.like(part, list(moved).index(2 + split.cut_dim))


@rule("__getitem__")
def _getitem(func: Call, split: Split, index: Any) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(split, Split) or not all(
        isinstance(i, (slice, EllipsisType, type(None))) or (isinstance(i, int) and not isinstance(i, bool))
        for i in items
    ):
        raise NotLocal("an index that is a tensor or a list")
    used = sum(1 for item in items if item is not None and item is not Ellipsis)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = next(i for i, item in enumerate(items) if item is Ellipsis)
    items[at : at + 1] = [slice(None)] * (split.part.dim() - used)
    old = new = 0
    dim, layout = None, split.cuts
    for i, item in enumerate(items):
        if item is None:
            new += 1
            continue
        if old == split.cut_dim:
            if isinstance(item, int):
                raise NotLocal("one position of the split dim")
            dim, (items[i], layout) = new, _sliced(split, item)
        old += 1
        new += not isinstance(item, int)
    return split.like(func(split.part, tuple(items)), dim, layout)


def _sliced(split: Split, item: slice) -> tuple[slice, Layout]:
    """The same slice of the part, where it takes whole segments."""
    start, end, stride = item.indices(split.cuts.total)
    if (start, end, stride) == (0, split.cuts.total, 1):
        return slice(None), split.cuts
    if stride != 1:
        raise NotLocal("a slice of the split dim")
    ends = [0, *accumulate(split.cuts.segments)]
    if start in ends and end in ends:
        first, last = ends.index(start), ends.index(end)
        lengths = [b - a for a, b in split.cuts.spans(split.ranks.rank)]
        return slice(sum(lengths[:first]), sum(lengths[:last])), Layout(
            split.cuts.segments[first:last], split.ranks.num
        )
    cuts = sorted({*ends, start, end})
    raise NotLocal("a slice of the split dim", tuple(b - a for a, b in pairwise(cuts)))


@rule("chunk", "split", "split_with_sizes", "unbind", "tensor_split")
def _pieces(func: Call, split: Split, *args: Any, **kwargs: Any) -> Any:
    position = 0 if func.__name__ == "unbind" else 1
    dim = kwargs.get("dim", args[position] if len(args) > position else 0) % split.part.dim()
    if dim != split.cut_dim:
        at = split.cut_dim - (func.__name__ == "unbind" and dim < split.cut_dim)
        return tuple(split.like(piece, at) for piece in func(split.part, *args, **kwargs))
    if func.__name__ == "unbind":
        raise NotLocal("the positions of the split dim, one by one")
    pieces = [*args[:1], *(value for key, value in kwargs.items() if key != "dim")][0]
    shadow = func(torch.empty(split.cuts.total, device="meta"), pieces)
    sizes = [len(piece) for piece in shadow]
    if tuple(sizes) != split.cuts.segments:
        raise NotLocal("pieces of the split dim", tuple(sizes))
    lengths = [end - start for start, end in split.cuts.spans(split.ranks.rank)]
    parts = zip(torch.split(split.part, lengths, dim), sizes, strict=True)
    return tuple(split.like(part, dim, Layout((size,), split.ranks.num)) for part, size in parts)


@rule("cat", "concat", "concatenate", "stack")
def _cat(func: Call, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    tensors = [each for each in tensors if isinstance(each, Split) or each.numel() or each.dim() != 1]
    split, right = together(tensors)
    if kwargs or any(each.dim() != split.part.dim() for each in tensors):
        raise NotLocal("tensors of different kinds in one")
    stack = func.__name__ == "stack"
    dim = dim % (split.part.dim() + stack)
    if dim == split.cut_dim and not stack:
        raise NotLocal("tensors put one after another along the split dim")
    parts = [beside(each, split, right) for each in tensors]
    return split.like(func(parts, dim), split.cut_dim + (stack and dim <= split.cut_dim))


@rule("expand", "expand_as", "broadcast_to", "repeat")
def _expand(func: Call, split: Split, *args: Any, **kwargs: Any) -> Any:
    sizes = list(args[0].shape) if func.__name__ == "expand_as" else _numbers((*args, *kwargs.values()))
    dim = split.cut_dim + len(sizes) - split.part.dim()
    if func.__name__ == "repeat":
        if dim < 0 or sizes[dim] != 1:
            raise NotLocal("a copy along the split dim")
        return split.like(split.part.repeat(sizes), dim)
    if sizes[dim] not in (-1, split.cuts.total):
        raise NotLocal("a copy along the split dim")
    sizes[dim] = -1
    return split.like(split.part.expand(sizes), dim)


@rule("repeat_interleave")
def _repeat_interleave(func: Call, split: Split, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
    if not isinstance(repeats, int) or dim is None or kwargs:
        raise NotLocal("repeats that are a tensor")
    dim = dim % split.part.dim()
    part = func(split.part, repeats, dim)
    layout = split.cuts.scaled(repeats) if dim == split.cut_dim else split.cuts
    if layout is None:
        raise NotLocal("a copy of parts of unequal length")
    return split.like(part, None, layout)


@rule("pad")
def _pad(func: Call, split: Split, pad: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    if split.cut_dim >= split.part.dim() - len(pad) // 2:
        raise NotLocal("padding of the split dim")
    return split.like(func(split.part, pad, *args, **kwargs))


# ---- along dims -------------------------------------------------------------------------------------------------------
@rule("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "tril", "triu", "normalize")
def _along(func: Call, split: Split, *args: Any, **kwargs: Any) -> Any:
    name = func.__name__
    dims = {"tril": [-1, -2], "triu": [-1, -2]}.get(name) or _dims(
        kwargs.get("dim", args[name == "normalize"] if args else None)
    )
    if split.cut_dim in {dim % split.part.dim() for dim in dims}:
        raise NotLocal(f"{name} along the split dim")
    return split.like(func(split.part, *args, **kwargs))


def _dims(dim: Any) -> list[int]:
    if isinstance(dim, int):
        return [dim]
    if isinstance(dim, (tuple, list)) and all(isinstance(each, int) for each in dim):
        return list(dim)
    raise NotLocal("no dim is named")


REDUCTIONS = "sum mean amax amin max min prod var std logsumexp all any argmax argmin norm"


@rule(*REDUCTIONS.split())
def _reduce(func: Call, split: Split, *args: Any, **kwargs: Any) -> Any:
    name, rank = func.__name__, split.part.dim()
    if name in ("max", "min") and args and isinstance(args[0], Tensor):
        return pointwise(func, split, *args, **kwargs)
    given = kwargs.get("dim", args[0] if args and name != "norm" else None)
    if "axis" in kwargs or given in ((), []) or (name == "norm" and len(args) > 1):
        raise NotLocal(f"{name} with unusual arguments")
    dims = list(range(rank)) if given is None else [dim % rank for dim in _dims(given)]
    if split.cut_dim in dims:
        if name not in ("sum", "mean"):
            raise NotLocal(f"{name} over the split dim")
        rest = {key: value for key, value in kwargs.items() if key != "dim"} | (
            {"keepdim": args[1]} if len(args) > 1 else {}
        )
        total = split.ranks.total(torch.sum(split.part, dims, **rest))
        return total if name == "sum" else total / math.prod(split.shape[dim] for dim in dims)
    out = func(split.part, *args, **kwargs)
    first = out[0] if isinstance(out, tuple) else out
    dim = split.cut_dim if first.dim() == rank else split.cut_dim - sum(each < split.cut_dim for each in dims)
    return type(out)([split.like(each, dim) for each in out]) if isinstance(out, tuple) else split.like(out, dim)


@rule("layer_norm", "rms_norm")
def _norm(func: Call, input: Split, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, Split) or input.cut_dim >= input.part.dim() - len(normalized_shape):
        raise NotLocal(f"{func.__name__} over the split dim")
    rest = [beside(each, input, -input.part.dim()) for each in args]
    named = {key: beside(each, input, -input.part.dim()) for key, each in kwargs.items()}
    return input.like(func(input.part, normalized_shape, *rest, **named))


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
def _new(func: Call, split: Split, *args: Any, **kwargs: Any) -> Any:
    return func(split.part, *args, **kwargs)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
