"""Adoption: sort what the user gave, refuse what cannot work, make all ranks start from the same state.

Ranks describe what they hold (names, order, shapes, types, layouts, optimizer settings) in one message; any difference is
named. Then rank 0's parameters, buffers and optimizer state overwrite those of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from paceline.group.wire import Wire
from paceline.terms.errors import AdoptError
from paceline.train.room import refuse_too_large
from paceline.train.state import neutral


@dataclass(frozen=True, slots=True)
class Adopted:
    """What one call of ``adopt`` was given, by kind, each in the order given."""

    models: tuple[nn.Module, ...]
    optimizers: tuple[Optimizer, ...]
    loaders: tuple[DataLoader[Any], ...]
    scalers: tuple[GradScaler, ...]
    schedulers: tuple[LRScheduler, ...]


def sort(things: Sequence[Any]) -> Adopted:
    """Sort by kind.

    Raises:
        AdoptError: PL301 for an unknown kind, PL302 for an optimizer that evaluates the loss itself.
    """
    kinds: dict[type, list[Any]] = {nn.Module: [], Optimizer: [], DataLoader: [], GradScaler: [], LRScheduler: []}
    for position, thing in enumerate(things, 1):
        kinds[_kind(thing, position)].append(thing)
    for optimizer in kinds[Optimizer]:
        if isinstance(optimizer, LBFGS):
            raise AdoptError("PL302", "torch.optim.LBFGS evaluates the loss inside its step")
    chosen = (nn.Module, Optimizer, DataLoader, GradScaler, LRScheduler)
    return Adopted(*(tuple(kinds[kind]) for kind in chosen))


def refuse_repeats(given: Adopted, known: Sequence[Any]) -> None:
    """Raise AdoptError PL309 for a model or an optimizer that was adopted before."""
    for thing in (*given.models, *given.optimizers):
        if any(thing is each for each in known):
            raise AdoptError("PL309", f"this {type(thing).__name__} was adopted before")


def _kind(thing: Any, position: int) -> type:
    if isinstance(thing, ReduceLROnPlateau):
        return LRScheduler
    for kind in (nn.Module, Optimizer, DataLoader, GradScaler, LRScheduler):
        if isinstance(thing, kind):
            return kind
    raise AdoptError(
        "PL301", f"argument {position} of job.adopt is a {type(thing).__module__}.{type(thing).__qualname__}"
    )


def device_of(models: Mapping[str, nn.Module]) -> torch.device:
    """Where the first parameter that is not on the CPU lies."""
    devices = {p.device for model in models.values() for p in model.parameters()}
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def trainable(model: nn.Module, taken: set[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """Parameters that get gradients, each once (tied weights under their first name), without those in `taken`."""
    return [(neutral(n), p) for n, p in model.named_parameters() if p.requires_grad and p not in taken]


# ---- the same on all ranks ------------------------------------------------------------------------------------------
def agree(
    wire: Wire,
    models: Mapping[str, nn.Module],
    optimizers: Sequence[Optimizer],
    loaders: Sequence[DataLoader[Any]] = (),
    parts: int = 1,
) -> None:
    """Compare what ranks hold.

    Args:
        parts: Into how many parts each model will be cut.

    Raises:
        AdoptError: PL303 on every rank, naming the first difference; PL511, there is no room for what training will need.
    """
    refuse_too_large(wire, models, optimizers, parts)
    mine = [*describe(models, optimizers), *map(_loader, loaders)]
    said = [json.loads(raw) for raw in wire.gather_bytes("adopt", json.dumps(mine).encode())]
    for rank, theirs in enumerate(said):
        if theirs != said[0]:
            raise AdoptError("PL303", _difference(said[0], theirs, rank))


def describe(models: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> Iterator[str]:
    index: dict[Tensor, str] = {}
    for label, model in models.items():
        for name, p in model.named_parameters():
            index[p] = f"{label}.{name}"
            kind = "parameter" if p.requires_grad else "frozen parameter"
            yield f"{kind} {label}.{neutral(name)} {tuple(p.shape)} {p.dtype} strides {p.stride()}"
        for name, b in model.named_buffers():
            yield f"buffer {label}.{neutral(name)} {tuple(b.shape)} {b.dtype}"
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            settings = {k: repr(v) for k, v in sorted(group.items()) if k != "params"}
            names = [index.get(p, "?") for p in group["params"]]
            yield f"optimizer {number} {type(optimizer).__qualname__} {settings} on {names}"


def _loader(loader: DataLoader[Any]) -> str:
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    settings = f"batch_size {loader.batch_size}, drop_last {loader.drop_last}, {_length(loader)}"
    data = f"{type(loader.dataset).__qualname__} of {_length(loader.dataset)}"
    return f"loader with {settings}, {type(sampler).__qualname__} over {type(loader.sampler).__qualname__}, {data}"


def _length(thing: Any) -> str:
    try:
        return f"length {len(thing)}"
    except TypeError:
        return "no length"


def warnings(models: Mapping[str, nn.Module]) -> list[str]:
    """What several ranks compute otherwise than one would, with these models: said once, before the first step."""
    modules = [module for model in models.values() for module in model.modules() if module.training]
    said = []
    if any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in modules):
        said.append("batch normalisation uses each rank's own rows; its running statistics are averaged over ranks")
    if any(isinstance(m, _DropoutNd) and m.p > 0 for m in modules):
        said.append("dropout draws from a random stream of its own on each rank")
    return said


def _difference(first: list[str], other: list[str], rank: int) -> str:
    for a, b in zip(first, other, strict=False):
        if a != b:
            return f"rank 0 has {a[:300]!r} where rank {rank} has {b[:300]!r}"
    more, who = (first, 0) if len(first) > len(other) else (other, rank)
    return f"rank {who} has {more[min(len(first), len(other))][:300]!r}, which rank {rank if who == 0 else 0} has not"


def start_equal(wire: Wire, models: Mapping[str, nn.Module], optimizers: Sequence[Optimizer], *, root: int = 0) -> None:
    """Overwrite parameters, buffers and optimizer state with those of rank `root`, but for parameters that are built in parts."""
    with torch.no_grad():
        for tensor in _tensors(models, optimizers):
            if not tensor.is_meta:
                _overwrite(wire, tensor, root)


def _overwrite(wire: Wire, tensor: Tensor, root: int = 0) -> None:
    if tensor.is_contiguous():
        wire.broadcast(tensor, root)
    else:
        dense = tensor.contiguous()
        wire.broadcast(dense, root)
        tensor.copy_(dense)


def _tensors(models: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    seen: set[Tensor] = set()
    for model in models.values():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor not in seen:
                seen.add(tensor)
                yield tensor.detach()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                yield from (v for _, v in sorted(state.items()) if isinstance(v, Tensor))


def check_kept(name: str, thing: Any) -> None:
    """Raise AdoptError PL301 for an object without a state."""
    if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
        message = f"job.keep({name}=...): a {type(thing).__qualname__} has no state_dict and load_state_dict"
        raise AdoptError("PL301", message, help="give it these two methods.")


def share_kept(wire: Wire, name: str, thing: Any) -> None:
    """Overwrite the state of a kept object with that of rank 0. Raises AdoptError PL303 when its tensors differ in kind."""
    state = dict(thing.state_dict())
    tensors = {k: v.detach().clone() for k, v in sorted(state.items()) if isinstance(v, Tensor)}
    kinds = json.dumps([(k, list(v.shape), str(v.dtype)) for k, v in tensors.items()])
    said = wire.gather_bytes(f"keep {name}", kinds.encode())
    for rank, theirs in enumerate(said):
        if theirs != said[0]:
            raise AdoptError("PL303", f"job.keep({name}=...): rank {rank} holds other tensors than rank 0")
    for tensor in tensors.values():
        _overwrite(wire, tensor)
    thing.load_state_dict({**state, **tensors})
