"""A split activation: a tensor of which each rank of the group holds a part, and that looks whole to the user's model.

`Split` shows the whole shape, so head counts and widths that a model has written down stay true, and computes on the
rank's own part. Functions of torch reach `apply` before they reach the tensor: a rule carries the function out on the parts
(``rules``); where none applies, the tensor is made whole first, which is always right, and reported. Autograd sees only
the parts and the four exchanges of :mod:`paceline.place.tensor_wire`, so backward costs nothing extra.

A plain tensor is always whole and equal on all ranks of the group, and so is its gradient.

[Note: segments] A layer that computes queries, keys and values at once has three segments of features. A rank needs its
heads of each, so each segment is cut by itself, and a part is the concatenation of the cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from paceline.terms.errors import StepError


@dataclass(frozen=True, slots=True)
class Layout:
    """How one dim is cut: each segment into `num` parts along it, as torch.chunk does, whose last parts may be shorter.

    Attributes:
        segments: Lengths of the segments; together the whole dim.
        num: Number of ranks.
    """

    segments: tuple[int, ...]
    num: int

    @property
    def total(self) -> int:
        return sum(self.segments)

    @property
    def even(self) -> bool:
        """Every rank holds as much of each segment."""
        return all(length % self.num == 0 for length in self.segments)

    def length(self, rank: int) -> int:
        """Length of this rank's part."""
        return sum(end - start for start, end in self.spans(rank))

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """Where the rank's part of each segment lies in the whole: start and end."""
        spans, offset = [], 0
        for length in self.segments:
            part = -(-length // self.num)
            start, end = min(rank * part, length), min((rank + 1) * part, length)
            spans.append((offset + start, offset + end))
            offset += length
        return spans

    def cut(self, whole: Tensor, dim: int, rank: int) -> Tensor:
        """The rank's part of `whole`: a view with one segment, else a copy."""
        parts = [whole.narrow(dim, start, end - start) for start, end in self.spans(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole from the parts of all ranks."""
        if len(self.segments) == 1:
            return torch.cat(list(parts), dim)
        sizes = [[end - start for start, end in self.spans(rank)] for rank in range(self.num)]
        cuts = [torch.split(part, size, dim) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat([cut[segment] for segment in range(len(self.segments)) for cut in cuts], dim)

    def scaled(self, factor: int) -> Layout | None:
        """Of a dim that is longer by `factor`; None where the cuts would fall elsewhere."""
        if factor > 1 and not self.even:
            return None
        return Layout(tuple(length * factor for length in self.segments), self.num)

    def divided(self, divisor: int) -> Layout | None:
        """Of a dim that is shorter by `divisor`; None where the cuts do not fall between its positions."""
        if self.num * divisor and all(length % (self.num * divisor) == 0 for length in self.segments):
            return Layout(tuple(length // divisor for length in self.segments), self.num)
        return None


class Ranks(Protocol):
    """The ranks of one group, as rules see them; in a trial they are imagined."""

    @property
    def num(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def trial(self) -> bool:
        """Whether a plan is being looked for: then what would be right but wasteful is refused."""

    def enter(self, whole: Tensor) -> Tensor:
        """The same tensor, for computing a part with it: backward sums the gradient over the ranks."""

    def total(self, part: Tensor, *, fresh: bool = False) -> Tensor:
        """Sum over the ranks; backward hands the gradient on as it is. In place where `part` is nobody else's: `fresh`."""

    def largest(self, part: Tensor) -> Tensor:
        """Maximum over the ranks, without a gradient."""

    def cut(self, whole: Tensor, dim: int, layout: Layout) -> Tensor:
        """The own part; backward joins the gradients of all."""

    def join(self, part: Tensor, dim: int, layout: Layout) -> Tensor:
        """The whole; backward cuts its gradient."""

    def made_whole(self, split: Split, why: NotLocal) -> None:
        """Told each time that a split tensor had to be made whole."""


class NotLocal(Exception):
    """This function cannot be carried out on the parts.

    Args:
        reason: In a few words.
        segments: It could with the split dim cut in these segments.
    """

    def __init__(self, reason: str, segments: tuple[int, ...] | None = None) -> None:
        super().__init__(reason)
        self.reason, self.segments = reason, segments


class Split(Tensor):
    """A tensor cut along one dim over the ranks of a group.

    Attributes:
        part: What this rank holds; autograd runs on it.
        cut_dim: The dim that is cut, not negative.
        cuts: How it is cut.
        ranks: The group.
        origins: Names of the parameters whose split made this one so.
    """

    part: Tensor
    cut_dim: int
    cuts: Layout
    ranks: Ranks
    origins: tuple[str, ...]

    @staticmethod
    def __new__(cls, part: Tensor, dim: int, layout: Layout, ranks: Ranks, origins: tuple[str, ...] = ()) -> Split:
        dim = dim % part.dim()
        shape = list(part.shape)
        shape[dim] = layout.total
        made: Split = Tensor._make_wrapper_subclass(
            cls, shape, dtype=part.dtype, device=part.device, requires_grad=part.requires_grad
        )
        made.part, made.cut_dim, made.cuts, made.ranks, made.origins = part, dim, layout, ranks, origins
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return apply(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        _refuse(f"{func} reached an activation that is split over the tensor group")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"Split({tuple(self.shape)}, dim {self.cut_dim} over {self.ranks.num} ranks)"

    def like(self, part: Tensor, dim: int | None = None, layout: Layout | None = None) -> Split:
        """Another part, cut as this one unless said otherwise."""
        return Split(part, self.cut_dim if dim is None else dim, layout or self.cuts, self.ranks, self.origins)

    def whole(self) -> Tensor:
        """The plain tensor (collective)."""
        return self.ranks.join(self.part, self.cut_dim, self.cuts)


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
T = TypeVar("T", bound=Rule)

_NAMES = """shape dtype device ndim layout is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested is_leaf
requires_grad names itemsize nbytes grad grad_fn _version is_mkldnn is_sparse_csr is_complex size dim ndimension numel
nelement stride is_contiguous element_size is_floating_point storage_offset get_device __len__ requires_grad_ __hash__
is_inference is_tensor is_same_size is_signed"""
METADATA = frozenset(_NAMES.split())


def rule(*names: str) -> Callable[[T], T]:
    """Register the function below for functions of torch with these names.

    It is called as ``rule(func, *args, **kwargs)`` where some argument is a `Split`, and raises NotLocal where it does not apply.
    """

    def register(body: T) -> T:
        RULES.update(dict.fromkeys(names, body))
        return body

    return register


def apply(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Carry out ``func(*args, **kwargs)``, which has some `Split` among its arguments.

    Raises:
        StepError: PL544 for what would make the gradient wrong.
    """
    name = func.__name__
    if name in ("__get__", "__set__"):
        name = func.__self__.__name__  # type: ignore[attr-defined]
    if name in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if name == "__set__" or (name == "data" and len(args) > 1):
        _refuse(f"the attribute {name!r} of a split activation is written")
    for split in splits(*args, *kwargs.values()):
        if _grad_fn(split) is not None:
            _refuse("a torch.autograd.Function was applied to a split activation")
    body = RULES.get(name)
    try:
        if body is None:
            raise NotLocal(f"no rule for {name}")
        return body(func, *args, **kwargs)
    except (
        NotLocal,
        TypeError,
        IndexError,
        AttributeError,
        ValueError,
    ) as error:  # then torch says what is wrong, if it is
        why = error if isinstance(error, NotLocal) else NotLocal(f"{name} with unusual arguments")
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")
        if in_place and isinstance(args[0], Split) and not args[0].ranks.trial:
            _refuse(f"{name} changes a split activation in place, and there is no rule for it ({why.reason})")
        return func(*map_splits(args, why), **map_splits(kwargs, why))


def map_splits(value: Any, why: NotLocal) -> Any:
    """The same arguments with whole tensors."""
    if isinstance(value, Split):
        return made_whole(value, why)
    if isinstance(value, (tuple, list)):
        items = [map_splits(item, why) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_splits(item, why) for key, item in value.items()}
    return value


def made_whole(split: Split, why: NotLocal) -> Tensor:
    """The plain tensor of a split one, and told so (collective)."""
    if _grad_fn(split) is not None:
        _refuse("a torch.autograd.Function was applied to a split activation")
    split.ranks.made_whole(split, why)
    return split.whole()


def splits(*values: Any) -> Iterator[Split]:
    """The split tensors among arguments, also in lists and tuples."""
    for value in values:
        if isinstance(value, Split):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from splits(*value)


def _grad_fn(split: Split) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return split.grad_fn


def _refuse(what: str) -> NoReturn:
    raise StepError("PL544", what)
