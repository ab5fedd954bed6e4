"""Flat memory in which a model lives, shared with the servers of this host, or private.

    gradients | parameters | buffers

each laid out by ``shards.Layout``. A worker's model has its parameters *in* this memory, so that a server of the same host writes
them there and nothing is copied again; gradients are put there before a push.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Container, Sequence

import torch
from torch import Tensor

from paceline.group.arena import create, open_handle, share_handle
from paceline.terms.errors import WireError
from paceline.train.shards import Item, Layout


class Memory:
    """The three areas.

    Args:
        params: Layout of gradients and of parameters.
        buffers: Layout of buffers.
        handle: Of another process's memory (:attr:`handle` there), to be mapped; None makes new memory.
        shared: New memory can be mapped by others.

    Attributes:
        grads, params, buffers: Each item as a flat tensor of its own type.
        raw_grads, raw_params, raw_buffers: Each area as bytes.
        handle: For others to map it; empty when it is private, or is theirs.
        shared: It is another process's.

    Raises:
        WireError: PL405, there is not so much memory; PL411, the other process's cannot be mapped.
    """

    def __init__(self, params: Layout, buffers: Layout, *, handle: str = "", shared: bool = True) -> None:
        self._layout = params
        sizes = (params.nbytes, params.nbytes, buffers.nbytes)
        nbytes = max(sum(sizes), mmap.PAGESIZE)
        self.handle = ""
        self._fd, self.shared = -1, bool(handle)
        if handle:
            self._fd = open_handle(handle)
            if os.fstat(self._fd).st_size < nbytes:
                os.close(self._fd)
                raise WireError("PL411", f"the memory at {handle} is smaller than {nbytes} bytes")
        elif shared:
            self._fd = create(nbytes)
            self.handle = share_handle(self._fd)
            _commit(self._fd, nbytes)
        if self._fd >= 0:
            raw = torch.frombuffer(mmap.mmap(self._fd, nbytes), dtype=torch.uint8)
        else:
            raw = torch.zeros(nbytes, dtype=torch.uint8)
        at = 0
        areas = []
        for size in sizes:
            areas.append(raw[at : at + size])
            at += size
        self.raw_grads, self.raw_params, self.raw_buffers = areas
        self.grads = views(self.raw_grads, params)
        self.params = views(self.raw_params, params)
        self.buffers = views(self.raw_buffers, buffers)

    @property
    def via(self) -> str:
        """For others to map what this process has mapped, as long as this is open; empty where nothing is mapped."""
        return share_handle(self._fd) if self._fd >= 0 else ""

    def is_at(self, handle: str) -> bool:
        """Whether `handle` still leads to this memory: the process that named it so lives."""
        try:
            there, here = os.stat(handle), os.fstat(self._fd)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def like_params(self, raw: Tensor) -> list[Tensor]:
        """Each parameter in a copy of the parameters' area."""
        return views(raw, self._layout)

    def close(self) -> None:
        """Give the descriptor back; what is mapped lives as long as its tensors. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def views(raw: Tensor, layout: Layout) -> list[Tensor]:
    """Each item of `layout` in these bytes, flat."""
    found = []
    for item, offset in zip(layout.items, layout.offsets, strict=True):
        found.append(raw[offset : offset + item.nbytes].view(getattr(torch, item.dtype)))
    return found


def items(named: Sequence[tuple[str, Tensor]], sparse: Container[Tensor] = ()) -> list[Item]:
    """What the layout needs to know of these tensors; the gradients of some are sparse."""
    return [
        Item(name, t.numel(), t.element_size(), str(t.dtype).removeprefix("torch."), len(t) if t in sparse else 0)
        for name, t in named
    ]


def _commit(fd: int, nbytes: int) -> None:
    """Ask for the pages in a call that can fail: a store that finds none would end the process."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        os.close(fd)
        message = f"{nbytes / 2**20:.0f} MiB of shared memory could not be had: {error.strerror}"
        raise WireError("PL405", message) from error
