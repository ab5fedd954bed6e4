"""The wire of several hosts with several ranks each: shared memory inside a host, c10d between hosts.

An all-reduce goes home, away and back:

1. The ranks of each host sum their buffers in shared memory (``ShmWire``).
2. The host's sum is cut into slices, one for each rank that has a counterpart on every host. Counterparts sum their slice
   over the network (``TorchWire``), in memory that their whole host has mapped.
3. When all slices of a host are there, its ranks copy them into their buffers.

So every host sends and receives what a single rank on it would, over as many connections as the smallest host has ranks.
Messages stay inside a host where they can; they and the small exchanges else go through a c10d group of everybody.

[Note: in step] c10d's collectives must be started in the same order on every rank, but sums in shared memory end in any
order. So an all-reduce takes its next step only when those launched before it have taken theirs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from paceline.group import tail
from paceline.group.shm_wire import KernelChoice, ShmWire
from paceline.group.torch_wire import TorchWire
from paceline.group.wire import AllGather, AllReduce, Buffer, Receive, Region, Request, Send, Together, Work
from paceline.terms.activity import Activity, Board
from paceline.terms.errors import WireError

T = TypeVar("T")
_PATIENCE_S = 5e-3  # how long a rank that waits for one all-reduce looks after the others before it blocks
Steps = Generator[Work[Any], Any, list[float]]


@dataclass(frozen=True, slots=True)
class Crews:
    """Who stands where. Pure.

    Attributes:
        mine: The ranks of this rank's host, in order.
        place: This rank's position among them.
        slices: Into how many slices a host's sum is cut: the number of ranks on the smallest host.
        counterparts: The ranks in the same position on all hosts, if this rank has a slice.
        host: Position of this rank's host, as hosts first appear.
    """

    mine: tuple[int, ...]
    place: int
    slices: int
    counterparts: tuple[int, ...]
    host: int

    @staticmethod
    def of(rank: int, hosts: Sequence[int]) -> Crews:
        """`hosts` holds for each rank the index of its host."""
        names = list(dict.fromkeys(hosts))
        crews = [tuple(r for r, host in enumerate(hosts) if host == name) for name in names]
        host = names.index(hosts[rank])
        place, slices = crews[host].index(rank), min(map(len, crews))
        counterparts = tuple(crew[place] for crew in crews) if place < slices else ()
        return Crews(crews[host], place, slices, counterparts, host)


@dataclass(eq=False)
class _Region(Region):
    """`home` is the region of this host's wire; `shared` the memory that holds slices, one copy a host."""

    home: Region
    shared: Region | None = None


@dataclass(eq=False)
class _Buffer(Buffer):
    """`home` is the buffer of this host's wire; `slices` are pieces of memory that the host has mapped."""

    home: Buffer
    slices: list[Buffer]


class HierarchicalWire:
    """A :class:`~paceline.group.wire.Wire` over hosts, for CPU buffers.

    Args:
        arena_fd: The arena of this host (see ``ShmWire``).
        store: Where all ranks find each other.
        rank: Position among all ranks.
        hosts: For each rank the index of its host.
        board, activity: This rank's.
        kernel: See ``ShmWire``.
        timeout, prefix, hostname, interface: See ``TorchWire``.
    """

    name = "hierarchical"
    ordered = True

    def __init__(
        self,
        arena_fd: int,
        store: Store,
        rank: int,
        hosts: Sequence[int],
        board: Board,
        activity: Activity,
        *,
        kernel: KernelChoice = "auto",
        timeout: timedelta = timedelta(minutes=30),
        prefix: str = "paceline",
        hostname: str = "",
        interface: str = "",
    ) -> None:
        self.rank, self.size = rank, len(hosts)
        self.crews = Crews.of(rank, hosts)
        mine, others = self.crews.mine, self.crews.counterparts
        self._flights: list[_Flight] = []
        self._keys = 0
        self._home = ShmWire(arena_fd, self.crews.place, len(mine), board, activity, kernel=kernel, names=mine)
        self._away: TorchWire | None = None
        settings: dict[str, Any] = {"timeout": timeout, "hostname": hostname, "interface": interface}
        try:
            self._all = TorchWire(store, rank, self.size, board, activity, prefix=f"{prefix}/all", **settings)
            if others:
                settings |= {"prefix": f"{prefix}/slice{self.crews.place}", "names": others}
                self._away = TorchWire(store, self.crews.host, len(others), board, activity, **settings)
        except BaseException:
            self.close()
            raise
