"""Who keeps what: the parameters of a job laid out in flat memory, and that memory divided among servers.

All processes of a run compute the same :class:`Layout` from the same list of parameters. A worker's memory has every parameter
whole and in place, so that the model lives in it; a *run* is a stretch of it that belongs to one server. Pure.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

LINE = 64
"""Bytes: every tensor begins on a cache line."""

SPLIT = 1 << 16
"""Elements below which a parameter is never divided: more messages would cost more than the balance gains."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the job.

    Attributes:
        name: Of the parameter or buffer.
        numel: Elements.
        itemsize: Bytes of each.
        dtype: Its name, as in ``torch.<dtype>``.
        rows: Of a parameter whose gradients are sparse; then it is never divided. 0 for all others.
    """

    name: str
    numel: int
    itemsize: int
    dtype: str
    rows: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements ``start .. stop`` of item number `item`, kept by server `server`."""

    item: int
    start: int
    stop: int
    server: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies.

    Attributes:
        items: In their order.
        offsets: Of each item, in bytes.
        nbytes: Of everything.
        stretches: By item, then by place.
        servers: How many there are.
    """

    items: tuple[Item, ...]
    offsets: tuple[int, ...]
    nbytes: int
    stretches: tuple[Stretch, ...]
    servers: int

    def of(self, server: int) -> list[Stretch]:
        """What one server keeps."""
        return [s for s in self.stretches if s.server == server]

    def runs(self, server: int, without: Container[int] = ()) -> list[tuple[int, int]]:
        """The same as byte ranges ``(begin, end)`` of the memory, neighbours joined (with the gap of alignment between them).

        Args:
            without: Numbers of items to be left out.
        """
        found: list[tuple[int, int]] = []
        for stretch in self.of(server):
            if stretch.item in without:
                continue
            item = self.items[stretch.item]
            begin = self.offsets[stretch.item] + stretch.start * item.itemsize
            end = begin + stretch.numel * item.itemsize
            if found and begin - found[-1][1] < LINE:
                found[-1] = (found[-1][0], end)
            else:
                found.append((begin, end))
        return found

    def nbytes_of(self, server: int) -> int:
        """Bytes that a server keeps of the parameters."""
        return sum(s.numel * self.items[s.item].itemsize for s in self.of(server))


def lay_out(items: Sequence[Item], servers: int, *, split: bool) -> Layout:
    """Give every item its place and its server.

    Whole items, largest first, each to the server that has least so far; with `split`, items larger than an even part are
    divided first, so that the load is even whatever the model is.
    """
    offsets, at = [], 0
    for item in items:
        offsets.append(at)
        at += -(-item.nbytes // LINE) * LINE
    part = max(1, sum(item.nbytes for item in items) // servers)
    cuts = [
        cut
        for number, item in enumerate(items)
        for cut in _cuts(number, item, part, split=split and servers > 1 and not item.rows)
    ]
    load = [0] * servers
    owner: dict[tuple[int, int], int] = {}
    for number, start, stop in sorted(cuts, key=lambda cut: (-(cut[2] - cut[1]) * items[cut[0]].itemsize, cut)):
        server = load.index(min(load))
        owner[number, start] = server
        load[server] += (stop - start) * items[number].itemsize
    stretches = tuple(Stretch(number, start, stop, owner[number, start]) for number, start, stop in cuts)
    return Layout(tuple(items), tuple(offsets), at, stretches, servers)


def _cuts(number: int, item: Item, part: int, *, split: bool) -> Iterator[tuple[int, int, int]]:
    pieces = min(-(-item.nbytes // part), item.numel // SPLIT) if split else 1
    if pieces <= 1:
        yield number, 0, item.numel
        return
    step = -(-item.numel // pieces // 16) * 16
    for start in range(0, item.numel, step):
        yield number, start, min(item.numel, start + step)
