"""Which pieces of which batches are out with whom: the leases of a parameter server. Pure.

Nobody knows beforehand how many batches a pass has: they are opened one after the other until a worker comes to the end. An
open batch is cut into parts; a part is *free*, *held* (by several workers where copies are made), or *delivered*. A batch of which
nothing is held or delivered is closed up again and waits, whole, to be opened anew. Applied batches are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paceline.exchange.server_protocol import Piece


class Batch:
    """A global batch that is open.

    Attributes:
        holders: For each part, who holds it, and since when.
        delivered: For each part, whether its gradient is there.
        lost: Somebody left the run with a part of it.
    """

    def __init__(self, loader: int, epoch: int, number: int, parts: int, lost: bool = False) -> None:
        self.loader, self.epoch, self.number, self.parts = loader, epoch, number, parts
        self.holders: list[dict[str, float]] = [{} for _ in range(parts)]
        self.delivered = [False] * parts
        self.lost = lost

    @property
    def covered(self) -> bool:
        """Some part is delivered, so the open update needs all of them."""
        return any(self.delivered)

    @property
    def complete(self) -> bool:
        """Every part is delivered."""
        return all(self.delivered)

    def piece(self, part: int) -> Piece:
        """The name of a part."""
        return Piece(self.loader, self.epoch, self.number, part, self.parts)

    def has(self, piece: Piece) -> bool:
        """Whether the piece is a part of it."""
        return (piece.loader, piece.epoch, piece.batch) == (self.loader, self.epoch, self.number)

    def free(self) -> list[int]:
        """Parts that nobody holds and nobody has delivered."""
        return [i for i in range(self.parts) if not self.holders[i] and not self.delivered[i]]

    def missing(self) -> list[int]:
        """Parts that are not delivered."""
        return [i for i in range(self.parts) if not self.delivered[i]]


class Pass:
    """One pass over one loader.

    Attributes:
        opened: Batches below this number were opened.
        total: Number of batches, once somebody has come to the end; `said` tells who.
        open: Batches that are open.
        returned: Batches that wait to be opened again, and whether they were lost with a worker (or else skipped).
        closed: All batches are applied.
    """

    def __init__(self, loader: int, epoch: int) -> None:
        self.loader, self.epoch = loader, epoch
        self.opened = 0
        self.total: int | None = None
        self.said = ""
        self.open: dict[int, Batch] = {}
        self.returned: dict[int, bool] = {}
        self.closed = False

    @property
    def exhausted(self) -> bool:
        """No batch can be opened any more, unless one comes back."""
        return self.total is not None and self.opened >= self.total and not self.returned

    @property
    def delivered(self) -> bool:
        """All batches are delivered, though perhaps not applied."""
        return self.exhausted and all(batch.complete for batch in self.open.values())

    def start(self, number: int, parts: int) -> Batch:
        """Open a batch."""
        batch = self.open[number] = Batch(self.loader, self.epoch, number, parts, self.returned.pop(number, False))
        self.opened = max(self.opened, number + 1)
        return batch

    def trained_from(self, number: int) -> bool:
        """Some batch from `number` on is applied, or partly delivered."""
        unopened = self.open.keys() | self.returned.keys()
        applied = any(n not in unopened for n in range(number, self.opened))
        return applied or any(n >= number and batch.covered for n, batch in self.open.items())


class Pool:
    """All passes, and what each worker holds."""

    def __init__(self) -> None:
        self.passes: dict[tuple[int, int], Pass] = {}
        self.held: dict[str, list[Piece]] = {}

    def course(self, loader: int, epoch: int) -> Pass:
        """The pass, known or new."""
        return self.passes.setdefault((loader, epoch), Pass(loader, epoch))

    def until(self, loader: int, epoch: int) -> list[Pass]:
        """Passes over `loader` up to `epoch` that are not closed, oldest first."""
        known = [
            p for (which, number), p in self.passes.items() if which == loader and number <= epoch and not p.closed
        ]
        return sorted(known, key=lambda p: p.epoch)

    def pending(self, loader: int, epoch: int) -> Iterator[tuple[Pass, int]]:
        """Batches of those passes that were opened and are not applied, in order."""
        for course in self.until(loader, epoch):
            for number in sorted(course.open.keys() | course.returned.keys()):
                yield course, number

    def is_behind(self, course: Pass) -> bool:
        """Whether a later pass over the same loader has begun."""
        later = (p for p in self.passes.values() if p.loader == course.loader and p.epoch > course.epoch)
        return any(p.opened or p.closed for p in later)

    def open_batches(self) -> Iterator[Batch]:
        """Every open batch, in order."""
        for _, course in sorted(self.passes.items()):
            for number in sorted(course.open):
                yield course.open[number]

    def find(self, piece: Piece) -> Batch | None:
        """The open batch that a piece is of, if it is still cut in the same way."""
        course = self.passes.get((piece.loader, piece.epoch))
        batch = course.open.get(piece.batch) if course else None
        return batch if batch and batch.parts == piece.parts and 0 <= piece.part < piece.parts else None

    def holds(self, worker: str, piece: Piece) -> bool:
        """Whether the piece is out with that worker."""
        return piece in self.held.get(worker, ())

    def lend(self, worker: str, batch: Batch, part: int, now: float) -> Piece:
        """Give a part out. The same part may be out with several workers."""
        piece = batch.piece(part)
        batch.holders[part][worker] = now
        self.held.setdefault(worker, []).append(piece)
        return piece

    def take_back(self, worker: str, piece: Piece, *, lost: bool) -> None:
        """A worker does not train a piece that it holds."""
        self.held[worker].remove(piece)
        batch = self.find(piece)
        assert batch is not None, "what is held is open"
        del batch.holders[piece.part][worker]
        batch.lost |= lost
        if not batch.covered and not any(batch.holders):
            course = self.course(batch.loader, batch.epoch)
            del course.open[batch.number]
            course.returned[batch.number] = batch.lost

    def deliver(self, piece: Piece) -> None:
        """The gradient of a piece is there: nobody holds it any more, copies included."""
        batch = self.find(piece)
        assert batch is not None, "what is delivered is open"
        batch.delivered[piece.part] = True
        for worker in batch.holders[piece.part]:
            self.held[worker].remove(piece)
        batch.holders[piece.part].clear()

    def leave(self, worker: str) -> None:
        """All that a worker holds comes back."""
        for piece in list(self.held.get(worker, ())):
            self.take_back(worker, piece, lost=True)
        self.held.pop(worker, None)

    def end(self, course: Pass, batches: int, said: str) -> None:
        """The pass has so many batches: what was given out beyond is withdrawn."""
        course.total, course.said = batches, said
        course.opened = min(course.opened, batches)
        for number in [n for n in course.open if n >= batches]:
            batch = course.open.pop(number)
            for part, holders in enumerate(batch.holders):
                for worker in holders:
                    self.held[worker].remove(batch.piece(part))
        course.returned = {n: lost for n, lost in course.returned.items() if n < batches}

    def opened(self, course: Pass, batches: int) -> None:
        """So many were opened before a checkpoint was gone back to: those that it does not know are lost, and come back."""
        if course.closed:
            return
        most = batches if course.total is None else min(batches, course.total)
        course.returned |= dict.fromkeys(range(course.opened, most), True)
        course.opened = max(course.opened, most)

    def applied(self, pieces: list[Piece]) -> None:
        """These are in an update; every batch that they are of is complete."""
        for piece in pieces:
            self.course(piece.loader, piece.epoch).open.pop(piece.batch, None)

    def closing(self) -> list[Pass]:
        """Passes that have just been finished; each is told once."""
        done = [p for _, p in sorted(self.passes.items()) if not p.closed and p.exhausted and not p.open]
        for course in done:
            course.closed = True
        return done

    def out(self, course: Pass) -> set[str]:
        """Who holds pieces of a pass."""
        return {worker for batch in course.open.values() for holders in batch.holders for worker in holders}

    def state(self) -> list[dict[str, Any]]:
        """As JSON. What is out, or delivered and not applied, counts as not done."""
        return [
            {
                "loader": p.loader,
                "epoch": p.epoch,
                "opened": p.opened,
                "total": p.total,
                "closed": p.closed,
                "left": sorted([*p.open, *(n for n, lost in p.returned.items() if lost)]),
                "skipped": sorted(n for n, lost in p.returned.items() if not lost),
            }
            for _, p in sorted(self.passes.items())
        ]

    @classmethod
    def load(cls, rows: list[dict[str, Any]]) -> Pool:
        """What :meth:`state` has told."""
        pool = cls()
        for row in rows:
            course = pool.course(row["loader"], row["epoch"])
            course.opened, course.total, course.closed = row["opened"], row["total"], row["closed"]
            course.returned = dict.fromkeys(row["left"], True) | dict.fromkeys(row["skipped"], False)
        return pool
