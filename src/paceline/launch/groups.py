"""Smaller groups in a run: the wire between replicas, and torch's process group of one replica.

torch's own parts (``fully_shard``, DTensor, pipelining) work on a default process group. Here that group is one replica's: other
replicas are none of its business, they are met through our own wire.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh

from paceline.group import arena
from paceline.group.shm_wire import ShmWire
from paceline.group.wire import Wire
from paceline.launch.connect import JOIN, join_store
from paceline.terms.activity import Activity, Board
from paceline.terms.errors import PeerLost, WireError
from paceline.terms.plan import Place

if TYPE_CHECKING:
    from paceline.exchange.axes import Mesh
    from paceline.place.shard_deferred import Deferred
    from paceline.train.placing import Group

_TIMEOUT = timedelta(minutes=30)
"""For torch's own collectives. A rank that is lost ends the run long before, through the launcher."""


class Groups:
    """Opens groups of one process.

    Args:
        place: Who this is.
        board, activity: This rank's.
    """

    def __init__(self, place: Place, board: Board, activity: Activity) -> None:
        self._place, self._board, self._activity = place, board, activity
        self._store: Store | None = None

    def peers(self, device: torch.device, groups: Sequence[Sequence[int]], wire: Wire) -> Wire:
        """The wire of this rank's group. All ranks call it with the same groups.

        Args:
            groups: Ranks, each in one group.
            wire: Of all ranks.
        """
        rank = wire.rank
        number, mine = next((i, list(group)) for i, group in enumerate(groups) if rank in group)
        if isinstance(wire, ShmWire):
            return self._in_memory(mine, wire)
        from paceline.group.torch_wire import TorchWire

        store = PrefixStore(f"peers{number}", self._rendezvous())
        address = "127.0.0.1" if self._one_host else ""
        return TorchWire(
            store,
            mine.index(rank),
            len(mine),
            self._board,
            self._activity,
            device=device,
            timeout=_TIMEOUT,
            prefix=f"peers{number}",
            hostname=address,
            names=mine,
        )

    def _in_memory(self, mine: Sequence[int], wire: ShmWire) -> Wire:
        """The first rank of each group makes an arena, and keeps it open until the others have it."""
        fd = arena.create() if wire.rank == mine[0] else -1
        try:
            handle = arena.share_handle(fd) if fd >= 0 else ""
            said = wire.gather_bytes("wires between replicas", handle.encode())
            if fd < 0:
                fd = self._open(said[mine[0]].decode())
            made = wire.among(fd, mine)
            wire.barrier("wires between replicas")
            return made
        finally:
            if fd >= 0:
                os.close(fd)

    @staticmethod
    def _open(handle: str) -> int:
        try:
            return arena.open_handle(handle)
        except WireError as error:
            if os.path.exists(handle.partition("/fd/")[0]):
                raise
            raise PeerLost("PL403", "the rank that made the memory of a group died") from error

    def replica(self, device: torch.device, layout: Mesh) -> Group:
        """Torch's process group of this rank's replica, with the axes as dimensions of a mesh."""
        from paceline.train.placing import Group

        kind = "cuda" if device.type == "cuda" else "cpu"
        if self._one_host:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        init_process_group(
            backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=PrefixStore(f"replica{self._number(layout)}", self._rendezvous()),
            rank=layout.part,
            world_size=layout.inner,
            timeout=_TIMEOUT,
        )
        axes = [(axis.kind, n) for axis, n in zip(layout.axes, layout.sizes, strict=True) if n > 1]
        names, sizes = [str(name) for name, _ in reversed(axes)], [n for _, n in reversed(axes)]
        mesh = init_device_mesh(kind, tuple(sizes), mesh_dim_names=tuple(names))
        return Group(mesh, device)

    def _number(self, layout: Mesh) -> int:
        """Of this replica: one that takes the place of another has a number of its own."""
        place = self._place
        return place.rank // layout.inner if place.launcher == "paceline" else layout.replica

    def close(self) -> None:
        """Leave torch's group."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def _one_host(self) -> bool:
        return len(set(self._place.hosts)) == 1

    def _rendezvous(self) -> Store:
        """Where ranks find each other."""
        if self._store is None:
            self._store = self._find()
        return self._store

    def _find(self) -> Store:
        place = self._place
        if place.launcher != "paceline":
            return PrefixStore("groups", join_store(place.store, place.rank, place.size))
        if not place.store:
            message = "no rendezvous was made for ranks that split a model"
            raise WireError("PL213", message, help="name the strategy on the command line: --strategy.")
        from paceline.group.store import UnixStore

        return UnixStore(place.store.removeprefix("unix:"), JOIN)


def built_in_parts(place: Place) -> Deferred | None:
    """What the script builds its model in under ``fsdp(build=parts)``; None under anything else."""
    from paceline.exchange.axes import mesh
    from paceline.exchange.strategy import build

    exchange = build(place.plan.strategy)
    layout = mesh(exchange.axes, exchange.ranks, place.size, place.rank, exchange.text)
    axis = layout.axis("fsdp")
    if axis is None or axis.settings["build"] != "parts":
        return None
    from paceline.place.shard_deferred import Deferred

    return Deferred(layout.along("fsdp"), layout.where("fsdp"))
