"""Tensors that this rank does not hold: they have a shape, a type and a device, and no values.

An operation on an absent tensor gives an absent tensor, computed on the meta device. So a forward runs through code whose values
are elsewhere, while everything that depends on inputs alone is computed for real. An absent tensor can be *bound* to a real one
that was received; from then on it is that one, wherever the script's code keeps it.

The same class stands in for parameters of other pipeline stages, and for their gradients. Gradients that are held are marked as
:class:`Held`: a norm of either is a :class:`Share`, the part of a number that this rank knows, and is added up over the ranks of
the pipeline when it is read. So ``clip_grad_norm_`` sees the norm of all gradients, of any order, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as tree

from paceline.place.nested import replace, tensors
from paceline.place.torch_private import become
from paceline.terms.errors import StepError

META = torch.device("meta")
_READS = frozenset(
    {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"}
)
_SAVES = frozenset({"__reduce_ex__", "data_ptr", "untyped_storage", "storage", "_typed_storage", "share_memory_"})
_LIKE = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}
    | {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
)
_NORMS = frozenset({"norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "_foreach_norm", "foreach_norm"})
_LAZY = frozenset({"stack", "to", "cpu", "detach", "clone", "float", "double", "cat", "reshape", "view", "unsqueeze"})


class Total(Protocol):
    """Adds a tensor up over the ranks of a pipeline."""

    def __call__(self, mine: Tensor) -> Tensor: ...


class Absent(Tensor):
    """A tensor without values.

    Args:
        meta: Shape, type and whether it needs a gradient.
        home: The device that it claims to be on.
        origin: What to call it in an error.
    """

    meta: Tensor
    origin: str
    bound: Tensor | None
    total: Total | None

    @staticmethod
    def __new__(cls, meta: Tensor, home: torch.device, origin: str, total: Total | None = None) -> Absent:
        made: Absent = Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=home, requires_grad=meta.requires_grad
        )
        made.meta, made.origin, made.bound, made.total = meta, origin, None, total
        return made

    def __init__(self, meta: Tensor, home: torch.device, origin: str, total: Total | None = None) -> None:
        pass

    def bind(self, real: Tensor) -> None:
        """Be `real` from now on."""
        self.bound = real

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Absent({self.origin}, {tuple(self.meta.shape)})"

    def __format__(self, _: str) -> str:
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        copy = Absent(self.meta, self.device, self.origin, self.total)
        copy.__dict__.update({k: v for k, v in self.__dict__.items() if k.startswith("_is")})
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = replace(args, Absent, _now), replace(kwargs or {}, Absent, _now)
        absent = next((a for a in tensors((args, kwargs)) if isinstance(a, Absent)), None)
        if absent is None:
            return func(*args, **kwargs)
        return _on_absent(func, absent, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(func) == "aten.detach.default":
            return Absent(args[0].meta.detach(), args[0].device, args[0].origin, args[0].total)
        if str(func) == "aten.alias.default" or str(func) == "aten.view_as.default":
            return Absent(args[0].meta, args[0].device, args[0].origin, args[0].total)
        raise StepError("PL522", f"{func} needs a tensor that another stage of the pipeline holds")


def stand_in(p: Tensor, origin: str, total: Total | None = None) -> Absent:
    """An absent parameter in the place of `p`."""
    meta = torch.empty_like(p, device=META).detach().requires_grad_(p.requires_grad)
    absent = Absent(meta, p.device, origin, total)
    absent.__dict__["_is_param"] = isinstance(p, nn.Parameter)  # what isinstance(…, nn.Parameter) looks at
    return absent


def vanish(p: nn.Parameter, origin: str, total: Total) -> None:
    """Take the values of a parameter away, whoever refers to it. Raises StepError PL527 where a graph still holds it."""
    p.grad = None
    try:
        become(p, stand_in(p, origin, total))
    except RuntimeError as error:
        raise StepError("PL527", f"parameter {origin!r} cannot be moved to another stage now: {error}") from error


def known(value: Any) -> Any:
    """`value` with every bound tensor in it replaced by what it is bound to."""
    return tree.tree_map_only(Absent, _now, value)


def _now(absent: Absent) -> Tensor:
    return absent if absent.bound is None else absent.bound


def on_meta(func: Callable[..., Any], args: Any, kwargs: Any, meta_of: Callable[[Tensor], Tensor]) -> Any:
    """``func(*args, **kwargs)`` with all tensors replaced by what `meta_of` gives, and with devices replaced by meta."""
    args, kwargs = replace(args, Tensor, meta_of), replace(kwargs, Tensor, meta_of)
    if getattr(func, "__name__", "") in ("to", "type_as"):
        args = tuple(META if isinstance(a, str | torch.device) else a for a in args)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": META}
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def to_meta(t: Tensor) -> Tensor:
    """The meta tensor of an absent or a real one."""
    if isinstance(t, Absent):
        return t.meta
    if t.device == META:
        return t
    return torch.empty_like(t, device=META).detach().requires_grad_(t.requires_grad)


def _on_absent(func: Any, absent: Absent, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(func, name, args)
    if name in _NORMS and absent.total is not None:
        return norms(func, args, kwargs, absent.total)
    if name in _READS:
        raise StepError("PL522", f"the value of {absent.origin} was read, and another stage of the pipeline holds it")
    if name in _SAVES:
        raise StepError("PL526", f"{absent.origin} cannot be saved here: another stage of the pipeline holds it")
    if name in _LIKE:
        return _like(func, name, args, kwargs)
    if name in ("cpu", "cuda", "numpy_T"):
        return absent
    if name.startswith("_foreach_"):
        return _foreach(func, name, args, kwargs)
    if name in ("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "__hash__"):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or _is_iop(name)
    if in_place or kwargs.get("out") is not None:
        return _in_place(func, absent, args, kwargs)
    return wrap(on_meta(func, args, kwargs, to_meta), absent)


def wrap(result: Any, like: Absent) -> Any:
    """Meta tensors of a result as absent ones."""
    return replace(result, Tensor, lambda t: Absent(t, like.device, like.origin, like.total))


def _is_iop(name: str) -> bool:
    return name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")


def _attribute(func: Any, name: str, args: Any) -> Any:
    what = getattr(getattr(func, "__self__", None), "__name__", "")
    absent = args[0]
    if name == "__set__" and what == "data":
        return None
    if name == "__get__" and isinstance(absent, Absent):
        if what == "data":
            return Absent(absent.meta.detach(), absent.device, absent.origin, absent.total)
        if what in ("T", "mT", "H", "mH", "real", "imag"):
            return wrap(on_meta(func, args, {}, to_meta), absent)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args)


def _like(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A new tensor of the shape of an absent one has values."""
    like = args[0]
    stub = torch.empty(0, dtype=like.dtype, device=like.device)
    kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
    if name.startswith("new_"):
        return getattr(stub, name)(*args[1:], **kwargs)
    return func(stub.new_empty(tuple(like.shape)), *args[1:], **kwargs)


def _foreach(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A function of lists: entries that are absent are left out; in place only."""
    if not name.endswith("_"):
        raise StepError("PL522", f"torch.{name} of tensors that other stages of the pipeline hold")
    kept = [i for i, t in enumerate(args[0]) if not isinstance(t, Absent)]
    if kept:
        args = tuple(
            [a[i] for i in kept] if isinstance(a, list | tuple) and len(a) == len(args[0]) else a for a in args
        )
        func(*args, **kwargs)
    return None


def _in_place(func: Any, absent: Absent, args: Any, kwargs: Any) -> Any:
    target = kwargs.get("out") if kwargs.get("out") is not None else args[0]
    if not isinstance(target, Absent):
        raise StepError(
            "PL522",
            f"{absent.origin}, which another stage of the pipeline holds, is written into a tensor that is here",
            help="write the model's forward without assigning into a tensor between its blocks (torch.cat, torch.where).",
        )
    if target.__dict__.get("_is_param") or target.total is not None:  # a parameter, or a gradient: the holder does it
        return target
    on_meta(func, args, kwargs, to_meta)
    return target


# ---- norms over all stages ------------------------------------------------------------------------------------------
class Held(Tensor):
    """A gradient on a rank that holds its parameter. Everything but a norm works on the values.

    Attributes:
        total: Adds up over the pipeline.
        counts: False where another stage holds the same parameter and counts it.
    """

    total: Total
    counts: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _NORMS:
            held = next(a for a in tensors((args, kwargs)) if isinstance(a, Held))
            return norms(func, args, kwargs, held.total)
        if name in ("__get__", "__set__", "__delete__"):
            with torch._C.DisableTorchFunctionSubclass():
                return plain(func(*args))
        result = func(*plain(args), **plain(kwargs))
        in_place = (name.endswith("_") and not name.endswith("__")) or _is_iop(name)
        return args[0] if in_place and isinstance(args[0], Held) else result


def hold(grad: Tensor, total: Total, *, counts: bool) -> Tensor:
    """Mark a gradient as that of a parameter which this rank holds; same memory."""
    if type(grad) is not Tensor:  # a DTensor knows its own norm
        return grad
    held = grad.as_subclass(Held)
    held.total, held.counts = total, counts
    return held


def plain(value: Any) -> Any:
    """`value` with every :class:`Held` in it as an ordinary tensor, of the same memory."""
    return replace(value, Held, lambda t: t.as_subclass(Tensor))


def norms(func: Any, args: Any, kwargs: Any, total: Total) -> Any:
    """What this rank knows of norms: those of gradients that it holds, and zero for others."""
    if args and isinstance(args[0], list | tuple):
        return [norms(_one_norm, (t, *args[1:]), kwargs, total) for t in args[0]]
    grad, *rest = args if args else (kwargs.pop("input", None) if "input" in kwargs else kwargs.pop("x"),)
    if isinstance(grad, Absent):
        simple = len(rest) < 2 and not kwargs.keys() - {"ord", "p", "dtype"}  # of all elements: a number
        shape = () if simple else on_meta(func, (grad, *rest), kwargs, to_meta).shape
        value = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    else:
        value = func(plain(grad), *rest, **kwargs)
        if isinstance(grad, Held) and not grad.counts:
            value = torch.zeros_like(value)
    return Share.of(value, total)


def _one_norm(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t, *args, **kwargs)
    return norm


class Share(Tensor):
    """The part of a number that this rank knows. The number is the sum over the pipeline; reading or using it adds it up."""

    total: Total
    whole: Tensor | None

    @classmethod
    def of(cls, value: Tensor, total: Total) -> Share:
        """This rank's part of what `total` adds up."""
        share = value.detach().as_subclass(cls)
        share.total, share.whole = total, None
        return share

    def resolve(self) -> Tensor:
        """The number, the same on all ranks. All ranks call it."""
        if self.whole is None:
            self.whole = self.total(self.as_subclass(Tensor))
        return self.whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "as_subclass", "size", "dim", "numel") and name != "__set__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        shares = [a for a in tensors((args, kwargs)) if isinstance(a, Share)]
        if name in _LAZY and all(share.whole is None for share in shares):
            return cls.of(func(*_parts(args), **_parts(kwargs)), shares[0].total)
        return func(*replace(args, Share, Share.resolve), **replace(kwargs, Share, Share.resolve))


def _parts(value: Any) -> Any:
    """Shares as what this rank knows; the norm of a gradient that is split inside its layer is known on all its ranks."""
    parts = replace(value, Share, lambda share: share.as_subclass(Tensor))
    return replace(parts, DTensor, lambda number: number.full_tensor())
