"""The lead server: what the core decides becomes entries for all servers; what was applied is written into the ledger."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.exchange.server import (
    Apply,
    Ask,
    Closed,
    Drop,
    Event,
    Go,
    Grant,
    Instruction,
    Join,
    Keep,
    Leave,
    Meet,
    Met,
    Over,
    Piece,
    Refuse,
    Rule,
    ServerCore,
    Skip,
    Step,
)
from paceline.terms.errors import StepError
from paceline.terms.event import Event as Report
from paceline.terms.event import Sink
from paceline.train.ledger import Ledger
from paceline.train.shard import Shard
from paceline.train.talk import Say

_ORIGINS = 64
_TOGETHER = 20.0  # seconds that the first worker waits for the others
_REPORT_EVERY = 1.0  # seconds between two reports of staleness


class Lead:
    """Decides. See ``serve.Server`` for when its methods are called.

    Args:
        rule: Of the strategy.
        ledger: Where committed rows go.
        sink: Where events go.
        stream: The random state that orders are drawn from, for all workers.
        workers: How many the run begins with.
        on_update: Called after each update, with its version.

    Attributes:
        done: All workers have ended well.
    """

    def __init__(
        self,
        rule: Rule,
        ledger: Ledger,
        sink: Sink,
        stream: bytes,
        workers: int,
        on_update: Callable[[int], None] = lambda version: None,
    ) -> None:
        self.core = ServerCore(rule)
        self._ledger, self._sink, self._stream, self._on_update = ledger, sink, stream, on_update
        self._members: list[str] = []  # in the order in which they came
        self._ended: set[str] = set()
        self._group = 0  # counts who has come and gone
        self._samples, self.round = 0, 0
        self._passes: dict[int, int] = {}
        self._origins: dict[tuple[int, int], str] = {}
        self._orders: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._awaited = 0
        self._waiting: list[str] = []
        self._workers, self._first = workers, 0.0
        self._between = False  # all have met, and nobody has asked for a batch since
        self._reported = 0.0
        self._carry_out: Callable[[Mapping[str, Any]], None] = lambda entry: None

    def begin(self, shard: Shard, carry_out: Callable[[Mapping[str, Any]], None], others: int) -> None:
        """The server is there. `others`: servers that have not entered yet; no worker begins before they have."""
        self._shard, self._carry_out, self._awaited = shard, carry_out, others

    @property
    def done(self) -> bool:
        """Everybody who came has ended, and somebody well."""
        return bool(self._ended) and not self._members

    # ---- what comes -------------------------------------------------------------------------------------------------
    def entered(self) -> None:
        """Another server is there."""
        self._awaited -= 1
        self.admit()

    def admit(self) -> None:
        """Let workers in who wait. The first ones begin together; later ones never between two points where all meet."""
        late = bool(self._members) or self.core.version > 0
        early = len(self._waiting) < self._workers and time.monotonic() - self._first < _TOGETHER
        if self._awaited or (self._members and self._between) or (not late and early):
            return
        waiting, self._waiting = self._waiting, []
        for name in sorted(waiting, key=lambda name: (len(name), name)):
            self._join(name)

    def welcome(self) -> dict[str, Any]:
        """What a worker is told at first."""
        return {"stream": base64.b64encode(self._stream).decode()}

    def hear(self, name: str, kind: int, meta: Mapping[str, Any]) -> None:
        """A message of a worker. Raises StepError PL462 for one that means nothing."""
        match kind:
            case Say.READY:
                self._waiting.append(name)
                self._first = self._first or time.monotonic()
                self.admit()
            case Say.ASK:
                self.round, self._between = max(self.round, int(meta["round"])), False
                self.admit()
                self._take(Ask(name, int(meta["loader"]), int(meta["epoch"]), bool(meta["ahead"])))
            case Say.OVER:
                place = int(meta["loader"]), int(meta["epoch"])
                self._orders[place] = int(meta["batches"]), int(meta["rows"]), int(meta["order"])
                self._take(Over(name, *place, int(meta["batches"])))
            case Say.PASS:
                place = int(meta["loader"]), int(meta["epoch"])
                self._passes[place[0]] = max(self._passes.get(place[0], 0), place[1])
                origin = self._origins.setdefault(place, str(meta["origin"]))
                self._carry_out({"do": "origin", "worker": name, "origin": origin})
                self._forget_origins()
            case Say.SKIP:
                self._take(Skip(name, tuple(Piece(*piece) for piece in meta["pieces"])))
            case Say.MEET:
                self._take(Meet(name, str(meta["tag"]), str(meta["note"])))
            case Say.BYE:
                self._ended.add(name)
            case _:
                raise StepError("PL462", f"{name} said {kind}, which means nothing here")

    def _forget_origins(self) -> None:
        """Of passes that are over long since."""
        while len(self._origins) > _ORIGINS:
            del self._origins[next(iter(self._origins))]

    def step(self, name: str, meta: Mapping[str, Any]) -> None:
        """A push has come."""
        covers = tuple(Piece(*piece) for piece in meta["covers"])
        self._take(Step(name, int(meta["seq"]), float(meta["weight"]), covers, bool(meta["finite"])))

    def left(self, name: str) -> None:
        """A worker is gone."""
        if name in self._waiting:
            self._waiting.remove(name)
        if name in self._members:
            self._members.remove(name)
            self._group += 1
        self._take(Leave(name))

    def _join(self, name: str) -> None:
        self._members.append(name)
        self._group += 1
        self._take(Join(name))

    # ---- what is decided ----------------------------------------------------------------------------------------------
    def _take(self, event: Event) -> None:
        for instruction in self.core.handle(event, time.monotonic()):
            entry = self._entry(instruction)
            if entry is not None:
                self._carry_out(entry)

    def _entry(self, instruction: Instruction) -> dict[str, Any] | None:
        match instruction:
            case Grant(worker, piece):
                told = None if piece is None else [piece.loader, piece.epoch, piece.batch, piece.part, piece.parts]
                return {"do": "grant", "worker": worker, "piece": told}
            case Keep(worker, seq):
                return {"do": "keep", "worker": worker, "seq": seq}
            case Drop(worker, seq):
                return {"do": "drop", "worker": worker, "seq": seq}
            case Apply(version=version, parts=parts, skip=skip):
                counted = [[part.worker, part.seq, part.scale] for part in parts]
                return {"do": "apply", "version": version, "parts": counted, "skip": skip}
            case Go(worker=worker, seq=seq, version=version, clock=clock, tau=tau):
                return {"do": "go", "worker": worker, "seq": seq, "version": version, "clock": clock, "tau": tau}
            case Met(worker=worker, notes=notes):
                self._between = True
                names = [name for name, _ in notes]
                place = {"rank": names.index(worker), "size": len(names), "version": self.core.version}
                return {"do": "met", "worker": worker, "notes": [note for _, note in notes], **place}
            case Refuse(worker, code, message):
                return {"do": "refuse", "worker": worker, "code": code, "message": message}
            case Closed(loader, epoch, batches):
                _, rows, order = self._orders.get((loader, epoch), (batches, 0, 0))
                self._ledger.epoch_end(loader, epoch, rows, batches, True, order)
        return None

    def applied(self, version: int, messages: Sequence[Mapping[str, Any]], *, skip: bool) -> None:
        """An update was applied: write down what it consumed."""
        ranges = [tuple(row) for message in messages for row in message["rows"]]
        self._samples += sum(row[5] for row in ranges)
        self._ledger.commit(version, ranges, skipped=skip)
        self._on_update(version)
        now = time.monotonic()
        if now - self._reported > _REPORT_EVERY:
            self._reported = now
            self.report()

    def about(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker that goes on is told."""
        told = {key: entry[key] for key in ("version", "clock", "tau")}
        if entry["seq"] == 0:  # where the others are
            told["passes"] = {str(loader): number - 1 for loader, number in self._passes.items()}
            told["epoch"] = self.round
        return {**told, "samples": self._samples, "group": self._group, "members": self._members}

    def report(self) -> None:
        """Say how late updates were, by worker."""
        histogram = {name: {str(tau): n for tau, n in counts.items()} for name, counts in self.core.histogram.items()}
        self._sink(Report("staleness", self.core.version, {"histogram": histogram}))
