"""Is there room for what training will need? Asked before anything is allocated, because a process that runs out of memory later is
killed without a word.

Counted is only what is certain: a gradient for each parameter that is trained, and the state of torch's own optimizers. Activations
come on top. So a run that is refused could not have ended well, and one that is not may still be too large.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn, optim
from torch.optim import Optimizer

from paceline.group.arena import available_memory
from paceline.group.wire import Wire
from paceline.terms.errors import AdoptError
from paceline.train.divided import worthwhile

_TENSORS = {
    optim.Adam: 2,
    optim.AdamW: 2,
    optim.NAdam: 2,
    optim.RAdam: 2,
    optim.Adamax: 2,
    optim.Adadelta: 2,
    optim.Adagrad: 1,
}


def refuse_too_large(
    wire: Wire, models: Mapping[str, nn.Module], optimizers: Sequence[Optimizer], parts: int = 1
) -> None:
    """Compare what is needed with what this machine, or this control group, has left. Before ranks allocate anything.

    Args:
        parts: Into how many parts parameters, gradients and optimizer state are cut.

    Raises:
        AdoptError: PL511, with the arithmetic.
    """
    copies = wire.size if wire.name == "shm" else 1  # ranks of this host
    params = {p for model in models.values() for p in model.parameters() if p.requires_grad and p.device.type == "cpu"}
    gradients = sum(p.nbytes for p in params if p.grad is None) * copies // parts
    state, said = 0, []
    for optimizer in optimizers:
        nbytes, each = _state_of(optimizer, params)
        times = 1 if parts == 1 and copies > 1 and worthwhile(optimizer, wire) else copies
        state += nbytes * times // parts
        if nbytes:
            said.append(f"{_gib(nbytes * times // parts)} for {type(optimizer).__name__} ({each:g} per parameter)")
    freed = sum(p.nbytes for p in params) * copies * (parts - 1) // parts
    need, room = gradients + state - freed, available_memory()
    if need > room:
        whole = sum(p.nbytes for p in params)
        message = (
            f"{_gib(whole)} of parameters on {copies} {'rank' if copies == 1 else 'ranks'} of this machine need "
            f"{_gib(gradients)} for gradients" + "".join(f" + {text}" for text in said)
        )
        message += f" - {_gib(freed)} that splitting frees" if freed else ""
        raise AdoptError("PL511", f"{message} = {_gib(need)} more, and {_gib(room)} are left")


def give_back() -> None:
    """Return freed memory to the system. The allocator keeps it otherwise: our launcher tells it to, because of speed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _state_of(optimizer: Optimizer, params: set[nn.Parameter]) -> tuple[int, float]:
    """Bytes that the first step will add, and how many tensors that is for a parameter."""
    total, whole = 0, 0
    for group in optimizer.param_groups:
        mine = [p for p in group["params"] if p in params and not optimizer.state.get(p)]
        whole += sum(p.nbytes for p in mine)
        total += sum(p.nbytes for p in mine) * _tensors(optimizer, group)
    return total, total / whole if whole else 0.0


def _tensors(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    if type(optimizer) is optim.SGD:
        return int(group["momentum"] > 0)
    if type(optimizer) is optim.RMSprop:
        return 1 + int(group["momentum"] > 0) + int(group["centered"])
    return _TENSORS.get(type(optimizer), 0) + int(bool(group.get("amsgrad")))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"
