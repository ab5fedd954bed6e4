"""Models larger than one process's memory: while the script builds its model, each rank keeps its own rows of the large parameters.

1. Inside :class:`Deferred` a large parameter that a module registers moves to the meta device; its own rows stay in memory.
2. What the script does to it afterwards (``torch.nn.init``, scaling, filling, copying, converting) is done to a whole tensor in its
   place, of which the own rows are kept. Random numbers are drawn for the whole, so every draw finds the generator where it would be
   in the plain program, and the start values are equal to the plain program's, bit for bit.
3. :class:`paceline.place.shard.Sharded` puts the rows back, unit by unit, just before each is split.

So a process needs memory for its part of the model, one unit, and the largest parameter once more while that is set.

[Note: own rows are enough] An operation may be done to a tensor of which only the own rows are right if each element of its result
depends on the same element of the parameter, on other tensors, and on random numbers: :data:`LOCAL` lists those. Anything else, such as
a norm or a comparison, would read rows that this rank does not have, and is refused.

All ranks must run the script with the generator in the same state; :meth:`Deferred.drawn` tells whether they did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from paceline.place import shard_torch
from paceline.place.shard_units import part_of
from paceline.terms.errors import AdoptError

READERS = tuple(n for n in ("_no_grad_trunc_normal_", "dirac_", "orthogonal_", "sparse_") if hasattr(nn.init, n))
"""Functions of torch.nn.init that do nothing to a tensor on the meta device, because they read what they have written."""

LARGE = 1 << 20
"""Bytes of a parameter from which its rows are divided."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOCAL = _words(
    "uniform_ normal_ random_ bernoulli_ exponential_ log_normal_ cauchy_ geometric_ fill_ zero_ copy_ mul_ add_ sub_ div_ neg_ abs_ "
    "pow_ exp_ log_ sqrt_ rsqrt_ clamp_ clamp_min_ clamp_max_ erfinv_ erf_ eye index_put_ index_fill_ masked_fill_ sin_ cos_ tanh_ "
    "sigmoid_ lerp_ addcmul_ addcdiv_ reciprocal_ round_ floor_ trunc_ sign_ nan_to_num_"
)
VIEWS = _words(
    "view _unsafe_view reshape as_strided select slice narrow transpose t permute expand detach alias unsqueeze squeeze flatten "
    "unflatten diagonal split chunk unbind movedim swapaxes _reshape_alias"
)
COPIES = _words("clone _to_copy")
FRESH = _words(
    "empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full new_empty_strided"
)
FREE = _words("is_same_size _has_compatible_shallow_copy_type is_pinned set_data")


class _Rows:
    """What this rank keeps of a parameter: its layout, and its own rows."""

    def __init__(self, like: Tensor, rows: Tensor, low: int) -> None:
        self.shape, self.stride, self.dtype = like.shape, like.stride(), like.dtype
        self.storage = like.untyped_storage()  # keeps its address from being used for another
        self.rows, self.low = rows, low

    def whole(self) -> Tensor:
        """A whole tensor in which the own rows are right and the others are anything."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        made[self.low : self.low + self.rows.shape[0]].copy_(self.rows)
        return made

    def keep(self, whole: Tensor) -> None:
        self.rows = whole[self.low : self.low + self.rows.shape[0]].clone()


class Deferred(TorchDispatchMode):
    """Inside ``with Deferred(size, rank) as deferred:`` large parameters are kept in rows.

    Args:
        size, rank: Of the mesh that the model will be split over.
        large: Bytes from which a parameter is.

    Raises:
        AdoptError: PL557 where the script reads the values of such a parameter.
    """

    def __init__(self, size: int, rank: int, large: int = LARGE) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.rank, self.large = size, rank, large
        self._kept: dict[int, _Rows] = {}
        self._handle: Any = None
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Deferred:
        self._handle = register_module_parameter_registration_hook(self._registered)
        for name in READERS:
            self._originals[name] = getattr(nn.init, name)
            setattr(nn.init, name, self._on_whole(self._originals[name]))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *problem: Any) -> None:
        self._handle.remove()
        while self._originals:
            setattr(nn.init, *self._originals.popitem())
        super().__exit__(*problem)  # type: ignore[no-untyped-call]

    @staticmethod
    def drawn() -> str:
        """Hash of the generator's state. Ranks that differ have drawn other numbers, and must not put their rows together."""
        return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()

    def _registered(self, module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        """A module takes a parameter: from here on only its rows exist. It stays the same object for whoever else holds it."""
        if p is None or p.nbytes < self.large or p.dim() == 0 or p.device.type != "cpu" or type(p) is not nn.Parameter:
            return
        if shard_torch.aliased(p):  # whoever holds the same memory would see what happens to it: it stays whole
            return
        with _disable_current_modes(), torch.no_grad():
            low, count = part_of(p.shape[0], self.size, self.rank)
            rows = p.detach()[low : low + count].clone()
            made = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
            try:
                torch.utils.swap_tensors(p, made)  # type: ignore[no-untyped-call]
            except (
                RuntimeError
            ):  # something else refers to its memory, and would see what happens to it: it stays whole
                return
            self._keep(p, rows, low)

    def _keep(self, meta: Tensor, rows: Tensor, low: int) -> None:
        self._kept[meta.untyped_storage()._cdata] = _Rows(meta, rows, low)

    def _of(self, tensor: Any) -> _Rows | None:
        if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
            return None
        rows = self._kept.get(tensor.untyped_storage()._cdata)
        if rows is not None and rows.dtype is not tensor.dtype:
            raise AdoptError("PL557", f"the script looks at numbers of {rows.dtype} as if they were {tensor.dtype}")
        return rows

    # ---- what the script does to them -----------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if not any(self._of(a) is not None for a in tree_flatten((args, kwargs))[0]):
            return func(*args, **kwargs)
        if name in VIEWS or name in FREE:
            return func(*args, **kwargs)
        if name in FRESH:
            return func(*args, **{**kwargs, "device": kwargs.get("device") or "cpu"})
        if name in COPIES:
            return self._copy(func, args, kwargs)
        if name in LOCAL:
            return self._in_place(func, args, kwargs)
        raise AdoptError("PL557", f"the script reads a large parameter ({name}) while the model is built in parts")

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do it to whole tensors, and keep the own rows of the first."""
        target = kwargs.get("out", args[0])
        wholes: dict[int, Tensor] = {}

        def real(a: Any) -> Any:
            rows = self._of(a)
            if rows is None:
                return a
            base = wholes.setdefault(a.untyped_storage()._cdata, rows.whole())
            return base.as_strided(a.shape, a.stride(), a.storage_offset())

        done = tree_map(real, (args, kwargs))
        others = [r for a in tree_flatten((args[1:], kwargs))[0] if (r := self._of(a)) is not None]
        rows = self._of(target)
        if rows is None or any((o.shape, o.low) != (rows.shape, rows.low) for o in others):
            raise AdoptError("PL557", "the script computes one tensor from a large parameter of another shape")
        func(*done[0], **done[1])
        rows.keep(wholes[target.untyped_storage()._cdata])
        return target

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A copy, perhaps in another type or layout: in rows as well, on the meta device."""
        if torch.device(kwargs.get("device") or "cpu").type not in ("cpu", "meta"):
            raise AdoptError("PL557", f"the model is moved to {kwargs['device']} while it is built in parts")
        rows = self._of(args[0])
        assert rows is not None
        if (args[0].shape, args[0].stride(), args[0].storage_offset()) != (rows.shape, rows.stride, 0):
            raise AdoptError("PL557", "the script copies a part of a large parameter while the model is built in parts")
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        made = func(args[0], **kwargs)
        self._keep(made, rows.rows.to(made.dtype, copy=True), rows.low)
        return made

    def _on_whole(self, initialise: Callable[..., Any]) -> Callable[..., Any]:
        """The function of torch.nn.init, done to a whole tensor in the place of one that is kept in rows."""

        @wraps(initialise)
        def to_rows(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = self._of(tensor)
            if rows is None:
                return initialise(tensor, *args, **kwargs)
            whole = rows.whole()
            initialise(whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()), *args, **kwargs)
            rows.keep(whole)
            return tensor

        return to_rows

    # ---- afterwards -----------------------------------------------------------------------------------------------
    def restore(self, modules: tuple[nn.Module, ...]) -> None:
        """Give these modules real parameters again, in which the own rows are right; their rows are forgotten here."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in [m for each in modules for m in each.modules()]:
            for key, p in module._parameters.items():
                if p is not None and p not in made and self._of(p) is not None:
                    made[p] = self._restored(p)
                if p is not None and p in made:
                    module._parameters[key] = made[p]

    def _restored(self, p: nn.Parameter) -> nn.Parameter:
        rows = self._kept.pop(p.untyped_storage()._cdata)
        return nn.Parameter(rows.whole(), requires_grad=p.requires_grad)

    def holds(self, p: Tensor) -> bool:
        """Whether a parameter is kept in rows."""
        return self._of(p) is not None
