"""Which ranks share a host, and which stand in the same place on different hosts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Crews:
    """Where one rank stands among hosts.

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
