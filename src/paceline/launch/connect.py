"""Opens the wire that fits the place: who meets whom, and through what.

``paceline run`` on one host hands down what is needed: shared memory for CPU buffers, a rendezvous for c10d else. Ranks that
torchrun, Slurm or MPI have started meet at a TCPStore first, tell each other what host they are on, and share memory with
their neighbours; with several hosts only the leaders talk over the network (``HierarchicalWire``).

Nothing falls back in silence: where memory cannot be shared although it should, every rank learns why, all take the same way
round, and it is said.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from paceline.group.solo_wire import SoloWire
from paceline.group.wire import Wire
from paceline.terms.activity import Activity, Board
from paceline.terms.errors import WireError
from paceline.terms.event import Event, Sink
from paceline.terms.plan import Place

JOIN = timedelta(minutes=5)
"""How long ranks wait for each other at the start."""

_LISTEN = "0A"  # a state in the kernel's table of sockets


def open_wire(place: Place, device: torch.device, activity: Activity, board: Board, sink: Sink) -> Wire:
    """The wire of this rank for buffers on `device`. All ranks call it.

    Raises:
        WireError: The others could not be reached (PL411), memory ran out (PL405), or the wire asked for cannot serve the
            device (PL206).
    """
    if place.size == 1:
        return SoloWire()
    if place.plan.wire == "shm" and device.type != "cpu":
        raise WireError(
            "PL206", f"`--wire shm` cannot hold buffers on {device}", help="leave it out, or use `--wire torch`."
        )
    if place.launcher == "paceline":
        return _on_this_host(place, device, activity, board)
    return _Meeting(place, device, activity, board, sink).wire()


def _on_this_host(place: Place, device: torch.device, activity: Activity, board: Board) -> Wire:
    """Everything is inherited from the launcher."""
    if device.type == "cpu" and place.plan.wire != "torch":
        from paceline.group.shm_wire import ShmWire

        return ShmWire(place.arena_fd, place.rank, place.size, board, activity)
    if not place.store:
        raise WireError("PL206", f"no rendezvous was made for buffers on {device}", help="start with `--wire torch`.")
    from paceline.group.store import UnixStore
    from paceline.group.torch_wire import TorchWire

    store = UnixStore(place.store.removeprefix("unix:"), JOIN)
    return TorchWire(store, place.rank, place.size, board, activity, device=device, hostname="127.0.0.1")


# ---- ranks that somebody else has started ---------------------------------------------------------------------------
class _Meeting:
    """Ranks without a parent in common, at a store.

    Args:
        place: Who this is.
        device: Of the buffers.
        activity, board: This rank's.
        sink: Where it is said when memory cannot be shared.
    """

    def __init__(self, place: Place, device: torch.device, activity: Activity, board: Board, sink: Sink) -> None:
        self._place, self._device, self._activity, self._board, self._sink = place, device, activity, board, sink
        self._store = join_store(place.store, place.rank, place.size)

    def wire(self) -> Wire:
        """Shared memory where all ranks are on one host, c10d where memory is not wanted, both between hosts."""
        hosts = numbered(self._tell_all("host", host_identity()))
        wanted = self._device.type == "cpu" and self._place.plan.wire != "torch"
        arena_fd = self._share_memory(hosts) if wanted and len(set(hosts)) < len(hosts) else -1
        try:
            if arena_fd < 0:
                return self._torch_wire(hosts)
            return self._shm_wire(arena_fd) if len(set(hosts)) == 1 else self._hierarchical_wire(arena_fd, hosts)
        finally:
            self._part()
            if arena_fd >= 0:
                os.close(arena_fd)

    def _tell_all(self, key: str, text: str) -> list[str]:
        """Everybody's text under this key, by rank."""
        self._store.set(f"{key}/{self._place.rank}", text)
        try:
            return [self._store.get(f"{key}/{rank}").decode() for rank in range(self._place.size)]
        except RuntimeError as error:
            raise _unreachable(self._place.store, f"not all of {self._place.size} ranks have come: {error}") from error

    def _part(self) -> None:
        """The store ends with rank 0's last reference to it, so rank 0 goes last."""
        gone, deadline = self._store.add("gone", 1), time.monotonic() + JOIN.total_seconds()
        while self._place.rank == 0 and gone < self._place.size and time.monotonic() < deadline:
            time.sleep(0.002)
            gone = self._store.add("gone", 0)

    def _share_memory(self, hosts: Sequence[int]) -> int:
        """A descriptor of the arena that the ranks of this host share, or -1 on all ranks when one of them has none.

        The first rank of a host makes it and keeps it open until its neighbours have opened theirs.
        """
        from paceline.group import arena

        mine = hosts[self._place.rank]
        leads = hosts.index(mine) == self._place.rank
        fd, trouble = -1, ""
        try:
            if leads:
                fd = arena.create()
                self._store.set(f"arena/{mine}", arena.share_handle(fd))
            else:
                fd = arena.open_handle(self._store.get(f"arena/{mine}").decode())
        except (WireError, OSError, RuntimeError) as error:
            trouble = str(error)
            if leads:
                self._store.set(f"arena/{mine}", "/dev/null/none")
        said = self._tell_all("shares", trouble)
        if not any(said):
            return fd
        if fd >= 0:
            os.close(fd)
        self._say_fallback(next(text for text in said if text))
        return -1

    def _say_fallback(self, why: str) -> None:
        if self._place.plan.wire == "shm":
            self._part()
            raise WireError("PL405", f"`--wire shm` was asked for, and memory cannot be shared: {why}")
        if self._place.rank == 0:
            message = f"memory cannot be shared on a host of this job, so c10d is used, which is slower: {why}"
            print(f"paceline: {message}", file=sys.stderr)
            self._sink(Event("notice", 0, {"message": message}))

    # -- the three wires
    def _torch_wire(self, hosts: Sequence[int]) -> Wire:
        from paceline.group.torch_wire import TorchWire

        place = self._place
        address = "127.0.0.1" if len(set(hosts)) == 1 else ""
        return TorchWire(
            self._store, place.rank, place.size, self._board, self._activity, device=self._device, hostname=address
        )

    def _shm_wire(self, arena_fd: int) -> Wire:
        from paceline.group.shm_wire import ShmWire

        return ShmWire(arena_fd, self._place.rank, self._place.size, self._board, self._activity)

    def _hierarchical_wire(self, arena_fd: int, hosts: Sequence[int]) -> Wire:
        from paceline.group.hierarchical_wire import HierarchicalWire

        place = self._place
        return HierarchicalWire(arena_fd, self._store, place.rank, hosts, self._board, self._activity)


def host_identity() -> str:
    """Text that is equal for two processes exactly when they can share memory: one kernel, one view of its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        boot, processes = "", 0
    return json.dumps([socket.gethostname(), boot, processes, os.getuid()])


def own_address(coordinator: str) -> str:
    """Where this process can be reached by whoever reaches the coordinator at this address; a free port."""
    scheme, _, rest = coordinator.partition(":")
    if scheme != "tcp":
        return f"unix:@paceline-{secrets.token_hex(8)}"
    host, _, port = rest.rpartition(":")
    family, _, _, _, there = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing: the kernel says which way it would go
        probe.connect(there)
        mine = probe.getsockname()[0]
    return f"tcp:[{mine}]:0" if family == socket.AF_INET6 else f"tcp:{mine}:0"


def numbered(identities: Sequence[str]) -> tuple[int, ...]:
    """For each rank the index of its host; hosts are numbered as they first appear."""
    known = list(dict.fromkeys(identities))
    return tuple(known.index(identity) for identity in identities)


def join_store(address: str, rank: int, size: int) -> Store:
    """The c10d store at ``tcp:HOST:PORT/PREFIX``, which rank 0 serves, or ``agent:…``, which torchrun's agent serves.

    Rank 0 binds the address itself, and only that: a TCPStore left to itself listens on all interfaces, and serves whoever
    connects.

    Raises:
        WireError: PL411, it cannot be reached in time; PL407, the port cannot be had.
    """
    scheme, _, rest = address.partition(":")
    where, _, prefix = rest.partition("/")
    host, _, port = where.rpartition(":")
    serves = scheme == "tcp" and rank == 0
    listener = _listen(host, int(port)) if serves else None
    try:
        store = TCPStore(
            host,
            int(port),
            size,
            is_master=serves,
            timeout=JOIN,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    except RuntimeError as error:
        raise _unreachable(address, str(error)) from error
    return PrefixStore(f"paceline/{prefix}", store)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, bound = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(bound)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        help = "MASTER_ADDR must be an address of the host of rank 0, and MASTER_PORT free there."
        raise WireError(
            "PL407", f"rank 0 cannot listen on {host}:{port}: {error.strerror or error}", help=help
        ) from error
    return listener


def _unreachable(address: str, why: str) -> WireError:
    return WireError("PL411", f"the rendezvous at {address} failed: {why.splitlines()[0] if why else 'no answer'}")


# ---- what listens ---------------------------------------------------------------------------------------------------
def listening() -> set[str]:
    """The addresses of this process's listening TCP sockets, ``127.0.0.1:41234``."""
    owned = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            owned.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # closed meanwhile
            continue
    rows = [line.split() for table in ("tcp", "tcp6") for line in _lines_of(Path("/proc/self/net", table))]
    return {_address(row[1]) for row in rows if row[3] == _LISTEN and f"socket:[{row[9]}]" in owned}


def _lines_of(table: Path) -> list[str]:
    try:
        return table.read_text().splitlines()[1:]
    except OSError:  # a kernel without IPv6
        return []


def _address(text: str) -> str:
    """The kernel writes addresses as words of 32 bits in its own byte order, and ports as hexadecimal numbers."""
    words, _, port = text.partition(":")
    raw = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return f"{socket.inet_ntop(family, raw)}:{int(port, 16)}"
