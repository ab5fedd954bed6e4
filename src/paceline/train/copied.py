"""All that one copy of a server tells the next one: a tree of plain values and tensors as bytes, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paceline.exchange.server_numbered import Numbered
from paceline.terms.errors import WireError
from paceline.train import tree as trees
from paceline.train.keeping import Kept
from paceline.train.memory import Memory
from paceline.train.shard import Guest

_ALIGN = 64


def pack(tree: trees.Tree) -> list[memoryview]:
    """A tree as bytes: its skeleton, and its tensors one behind the other. Raises AdoptError PL612 for what is neither."""
    skeleton, tensors = trees.flatten(tree)
    arrays: list[Any] = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors.values()]
    places, at = {}, 0
    for name, array in zip(tensors, arrays, strict=True):
        places[name] = at
        at += -(-array.nbytes // _ALIGN) * _ALIGN
    flat = memoryview(bytearray(at))
    for start, array in zip(places.values(), arrays, strict=True):
        flat[start : start + array.nbytes] = memoryview(array)
    text = json.dumps({"skeleton": skeleton, "places": places}).encode()
    return [memoryview(text), *([flat] if at else [])]


def unpack(buffers: Sequence[memoryview]) -> trees.Tree:
    """The inverse; tensors are copies. Raises WireError PL432: these are no such bytes."""
    try:
        said = json.loads(bytes(buffers[0]))
        flat = torch.frombuffer(buffers[1], dtype=torch.uint8) if len(buffers) > 1 else torch.zeros(0)
        tensors: dict[str, Tensor] = {}
        for name, kind, shape in trees.leaves(said["skeleton"]):
            tensor = torch.empty(shape, dtype=trees.KINDS[kind])
            at, nbytes = said["places"][name], tensor.numel() * tensor.element_size()
            if nbytes:
                tensor.view(-1).view(torch.uint8).copy_(flat[at : at + nbytes])
            tensors.setdefault(name, tensor)
        tree: trees.Tree = trees.unflatten(said["skeleton"], tensors)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise WireError("PL432", f"the state of a server makes no sense: {error!r}"[:300]) from error
    return tree


def tell_guest(guest: Guest) -> dict[str, Any]:
    """What a server knows of a worker. Memory that is shared is named; what is private is told."""
    told = {name: getattr(guest, name) for name in ("name", "handle", "id", "told", "seen", "gone", "pushes", "read")}
    private = None if guest.memory.via else (guest.memory.raw_grads, guest.memory.raw_params, guest.memory.raw_buffers)
    return {**told, "line": guest.line.state(), "via": guest.memory.via, "private": private}


def hear_guest(told: Mapping[str, Any], kept: Kept, numbered: Callable[[], Numbered[Any]]) -> Guest:
    """The inverse. Raises WireError PL411: its memory cannot be mapped."""
    memory = Memory(kept.layout, kept.buffer_layout, handle=told["via"], shared=False)
    if told["private"] is not None:
        for own, theirs in zip((memory.raw_grads, memory.raw_params, memory.raw_buffers), told["private"], strict=True):
            own.copy_(theirs)
    guest = Guest(told["name"], memory, told["handle"], told["id"], numbered())
    guest.line.load(told["line"])
    guest.told, guest.seen, guest.gone, guest.read = told["told"], told["seen"], told["gone"], told["read"]
    guest.pushes = dict(told["pushes"])
    return guest


def frozen(kept: Kept) -> dict[str, Tensor]:
    """Parameters that no gradient reaches: two copies of a server need not have drawn the same."""
    return {name: p.detach() for p, name in kept.names.items() if p not in kept.number}
