"""What sharded data parallelism refuses, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from paceline.place.shard_units import Unit, callable_module
from paceline.terms.errors import AdoptError, UsageError

STAGES = (1, 2, 3)


def request(mesh: DeviceMesh, stage: int, offload: bool) -> None:
    """Raise UsageError PL550 for a stage or a mesh that cannot be, PL554 for offloading where there is nothing to load from."""
    if stage not in STAGES:
        raise UsageError("PL550", f"fsdp(stage={stage!r}): a stage is 1, 2 or 3")
    if mesh.ndim != 1:
        raise UsageError("PL550", f"a model is split over one dimension, and this mesh has {mesh.ndim}")
    if offload and mesh.device_type == "cpu":
        raise UsageError("PL554", "offload=True moves parts to the memory of the CPU, where everything is already")


def model(root: nn.Module, units: Sequence[Unit]) -> None:
    """Raise AdoptError PL551 for what cannot be split, PL552 for trainable parameters of several types in one unit."""
    if not callable_module(root):
        raise AdoptError("PL551", f"a {type(root).__name__} is never called itself, so nothing says when it is needed")
    for name, module in root.named_modules():
        if isinstance(module, FSDPModule) or type(module).__name__ == "DistributedDataParallel":
            raise AdoptError("PL551", f"{_said(name)} is distributed already")
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise AdoptError(
                "PL551", f"the gradient of {_said(name)} is sparse, and only dense ones are summed in parts"
            )
    for name, p in root.named_parameters():
        _parameter(name, p)
    taken: set[nn.Parameter] = set()
    for unit in units:
        mine = {n: p for m in unit.modules for n, p in m.named_parameters() if p not in taken}
        taken.update(mine.values())
        kinds: dict[torch.dtype, str] = {}
        for name, p in mine.items():
            if p.requires_grad:
                kinds.setdefault(p.dtype, name)
        if len(kinds) > 1:
            said = ", ".join(f"{name!r} is {dtype}" for dtype, name in kinds.items())
            raise AdoptError("PL552", f"{unit.name or 'the root'} is gathered as one, but {said}")


def _parameter(name: str, p: nn.Parameter) -> None:
    if isinstance(p, DTensor):
        raise AdoptError("PL551", f"parameter {name!r} is split already")
    if p.dim() == 0:
        raise AdoptError("PL551", f"parameter {name!r} is a single number, which has no rows to split", help=_ONE)
    if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
        raise AdoptError(
            "PL551", f"parameter {name!r} has hooks, which would never run: another takes its place", help=_HOOK
        )


_ONE = "give it the shape (1,)."
_HOOK = "change gradients between backward and step, or use another strategy."


def precision(policy: MixedPrecisionPolicy | None, root: nn.Module) -> MixedPrecisionPolicy:
    """The policy, complete. Raises AdoptError PL553 where it would change more than it says."""
    if policy is None or policy.param_dtype is None:
        return policy or MixedPrecisionPolicy()
    own = {p.dtype for p in root.parameters() if p.requires_grad}
    if policy.reduce_dtype is None:
        raise AdoptError("PL553", f"param_dtype={policy.param_dtype} alone would sum gradients in it, too", help=_SUMS)
    if torch.float64 in own:
        raise AdoptError("PL553", f"the model computes in float64, and param_dtype={policy.param_dtype} would end that")
    return replace(policy, output_dtype=policy.output_dtype)


_SUMS = "say reduce_dtype, for example MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)."


def _said(name: str) -> str:
    return f"module {name!r}" if name else "the model"
