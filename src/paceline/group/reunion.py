"""A group that changes: its members meet through the coordinator, and open a new wire for each epoch.

1. Whoever misses a member, or comes to a step boundary while others wait to join, leaves its wire and asks to meet.
2. Each says what it has to offer: how many steps it has applied, what host it is on; the first of the new view makes the
   memory that all of a host share.
3. When all have said so, all of them open the wire of the new epoch: shared memory on one host, TCP between hosts. Nothing of
   an older wire can reach it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from paceline.group import arena
from paceline.group.solo_wire import SoloWire
from paceline.group.wire import Wire
from paceline.terms.activity import Activity, Board, Phase
from paceline.terms.errors import Aborted, PeerLost, WireError
from paceline.terms.plan import Place

if TYPE_CHECKING:
    from paceline.group.lobby import Lobby


class ViewLike(Protocol):
    """See ``group.view.View``."""

    @property
    def epoch(self) -> int: ...
    @property
    def members(self) -> Sequence[Any]: ...


class MeetingLike(Protocol):
    """See ``group.member.Meeting``."""

    @property
    def view(self) -> ViewLike: ...
    @property
    def reports(self) -> Sequence[dict[str, Any]]: ...


class Membership(Protocol):
    """What is needed of ``group.member.Member``."""

    @property
    def pending(self) -> bool: ...
    @property
    def name(self) -> str: ...
    def meet(
        self, report: Callable[[ViewLike], dict[str, Any]], check: Callable[[], None] | None = None
    ) -> MeetingLike: ...
    def at_boundary(self, step: int) -> None: ...
    def evicted(self) -> frozenset[int]: ...
    def leave(self, why: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Epoch:
    """The group from now until it changes again.

    Attributes:
        number: Never used before.
        rank: Of this process.
        names: Of all members, in the order of their ranks.
        hosts: For each rank the index of its host, numbered as they first appear.
        applied: For each rank how many steps it has applied; -1 for one that has just come.
        wire: Between these members only.
    """

    number: int
    rank: int
    names: tuple[str, ...]
    hosts: tuple[int, ...]
    applied: tuple[int, ...]
    wire: Wire

    @property
    def size(self) -> int:
        """World size."""
        return len(self.names)

    @property
    def neighbours(self) -> tuple[str, ...]:
        """Names of the members of this process's host."""
        mine = self.hosts[self.rank]
        return tuple(name for name, host in zip(self.names, self.hosts, strict=True) if host == mine)

    def place(self, before: Place) -> Place:
        """Where this process stands now."""
        mine = self.hosts[self.rank]
        return replace(
            before,
            rank=self.rank,
            size=self.size,
            hosts=self.hosts,
            local_rank=self.hosts[: self.rank].count(mine),
            local_size=self.hosts.count(mine),
        )

    @property
    def leader(self) -> int:
        """The first of those who have come furthest: whoever is behind gets its state."""
        return self.applied.index(max(self.applied))


class Reunion:
    """This process's way from epoch to epoch.

    Args:
        member: Its connection to the coordinator.
        host: Text that is equal for processes that can share memory.
        slot: Its page on the board.
        pages: Text that is equal for processes with the same board.
        board, activity: Read and written while waiting.
        lobby, secret: Where members of other hosts reach this process, and what both know; None: there are no other hosts.
        always_tcp: Do not share memory.
    """

    def __init__(
        self,
        member: Membership,
        host: str,
        slot: int,
        pages: str,
        board: Board,
        activity: Activity,
        *,
        lobby: Lobby | None = None,
        secret: bytes = b"",
        always_tcp: bool = False,
    ) -> None:
        self.member = member
        self._host, self._slot, self._pages, self._board, self._activity = host, slot, pages, board, activity
        self._lobby, self._secret, self._always_tcp = lobby, secret, always_tcp
        self._arena = -1

    @property
    def one_host(self) -> bool:
        """All members will always share memory."""
        return self._lobby is None

    def meet(self, applied: int) -> Epoch:
        """Wait for the others and open the wire of the next epoch.

        Args:
            applied: Steps that this process has applied, -1 when it has just come.

        Raises:
            Aborted: The run is being ended (PL404).
            WireError: This process is no longer a member (PL42x), or the wire could not be opened (PL405, PL411).
        """
        while True:
            try:
                with self._activity.during(Phase.WAIT, "regroup"):
                    met = self.member.meet(lambda view: self._report(view, applied), self._check)
                return self._open(met)
            except PeerLost:  # in the opening of the wire: another epoch follows
                self._check()
            finally:
                self._drop_arena()

    def _check(self) -> None:
        if self._board.aborted:
            raise Aborted("PL404", f"the run was ended while {self.member.name} waited for the others")

    def _report(self, view: ViewLike, applied: int) -> dict[str, Any]:
        self._drop_arena()
        said: dict[str, Any] = {"applied": applied, "host": self._host, "slot": self._slot, "pages": self._pages}
        if self._lobby is not None:
            said["lobby"] = self._lobby.address
        if view.members[0].name == self.member.name and len(view.members) > 1:
            self._arena = arena.create()
            said["arena"] = arena.share_handle(self._arena)
        return said

    def _open(self, met: MeetingLike) -> Epoch:
        names = tuple(m.name for m in met.view.members)
        rank = names.index(self.member.name)
        hosts = [said["host"] for said in met.reports]
        known = list(dict.fromkeys(hosts))
        applied = tuple(int(said["applied"]) for said in met.reports)
        numbers = tuple(known.index(host) for host in hosts)
        return Epoch(met.view.epoch, rank, names, numbers, applied, self._wire(met, rank, hosts))

    def _wire(self, met: MeetingLike, rank: int, hosts: Sequence[str]) -> Wire:
        size = len(hosts)
        if size == 1:
            return SoloWire()
        one_board = len({said["pages"] for said in met.reports}) == 1
        names = [int(said["slot"]) for said in met.reports] if one_board else list(range(size))
        if len(set(hosts)) > 1 or self._always_tcp:
            return self._tcp_wire(met, rank, hosts, names)
        from paceline.group.shm_wire import ShmWire

        fd = self._arena if rank == 0 else self._open_arena(met.reports[0]["arena"])
        try:
            evicted = self.member.evicted
            wire = ShmWire(fd, rank, size, self._board, self._activity, names=names, evicted=evicted)
            wire.barrier("epoch begins")  # until all have opened the memory its maker keeps it
            return wire
        finally:
            if rank:
                os.close(fd)

    def _tcp_wire(self, met: MeetingLike, rank: int, hosts: Sequence[str], names: Sequence[int]) -> Wire:
        """Raises WireError PL411 where members of several hosts have no address to reach each other at."""
        addresses = [said.get("lobby") for said in met.reports]
        if self._lobby is None or None in addresses:
            raise WireError(
                "PL411",
                "the members are on several hosts, and the run was not started for that",
                help="start it with `--listen HOST`, an address of this machine that the others reach.",
            )
        from paceline.group.tcp_wire import TcpWire

        known = list(dict.fromkeys(hosts))
        return TcpWire(
            [str(address) for address in addresses],
            rank,
            self._secret,
            met.view.epoch,
            self._lobby,
            self._activity,
            names=names,
            hosts=[known.index(host) for host in hosts],
            evicted=self.member.evicted,
        )

    def _open_arena(self, handle: str) -> int:
        try:
            return arena.open_handle(handle)
        except WireError as error:
            if os.path.exists(handle.partition("/fd/")[0]):
                raise
            raise PeerLost("PL403", "the member that made the memory of this epoch died") from error

    def _drop_arena(self) -> None:
        if self._arena >= 0:
            os.close(self._arena)
            self._arena = -1
