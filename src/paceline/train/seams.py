"""How the parts of a tensor go together: each placement knows its own. A fused matrix of a tensor-parallel layer, for instance, is cut in
several stretches, which torch's own gathering would put together in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from paceline.place.tensor import TensorParallel
from paceline.terms.errors import AdoptError


class Seams:
    """Puts tensors together, and cuts them.

    Attributes:
        tensors: The placements that cut inside layers.
    """

    def __init__(self) -> None:
        self.tensors: list[TensorParallel] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Seams:
        """A copy of a model has hooks that ask this one."""
        return self

    def _owner(self, like: Tensor) -> TensorParallel | None:
        return next((t for t in self.tensors if any(p is like for _, p in t.held)), None)

    def whole(self, value: Any, like: Tensor) -> Any:
        """All of a parameter, or of a tensor that is held as the parameter `like` is. All ranks that hold parts of it call it."""
        if not isinstance(value, DTensor):
            return value
        owner = self._owner(like)
        together = value.full_tensor() if owner is None else owner.whole(value, like)
        return together.detach()

    def cut(self, p: DTensor, whole: Tensor, name: str) -> DTensor:
        """This rank's part of `whole`, held as `p` is. Raises AdoptError PL610 where it has another shape."""
        if whole.shape != p.shape:
            raise AdoptError("PL610", f"{name!r} has the shape {tuple(whole.shape)}, and {tuple(p.shape)} is held")
        owner = self._owner(p)
        if owner is not None:
            return owner.cut(p, whole.to(p.dtype))
        return distribute_tensor(whole.to(p.dtype), p.device_mesh, p.placements, src_data_rank=None)

    def state(self, tensors: Mapping[str, Any], named: Mapping[str, Tensor], keep: bool) -> dict[str, Any]:
        """A state by name, whole; empty tensors where it is not kept. `named`: the parameters."""
        found = {}
        for name, value in tensors.items():
            together = self.whole(value, named.get(name, value)) if isinstance(value, DTensor) else value
            found[name] = together if keep or not isinstance(value, DTensor) else together.new_empty(0)
        return found
