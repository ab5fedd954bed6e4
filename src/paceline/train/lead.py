"""The lead server: what the core decides becomes entries for all servers; what was applied is written into the ledger."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from paceline.exchange.outer_step import Pairwise
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
    Opened,
    Over,
    Piece,
    Refuse,
    ServerCore,
    Skip,
    Step,
)
from paceline.exchange.server_whole import hear_core, tell_core
from paceline.exchange.service import Service
from paceline.terms.event import Event as Report
from paceline.terms.event import Sink
from paceline.train.ledger import Ledger, Range
from paceline.train.served_state import PieceState, optimizer_trees
from paceline.train.shard import Shard
from paceline.train.talk import Say

_ORIGINS = 64
_TOGETHER = 20.0  # seconds that the first worker waits for the others
_WHOLE = (
    *("_stream", "_members", "_ended", "_group", "samples", "round", "_steps", "_pace", "_done", "_passes", "_origins"),
    *("_after", "_restored", "_orders", "_awaited", "_waiting", "_first", "_between"),
)
_REPORT_EVERY = 1.0  # seconds between two reports of staleness


class Hands(Protocol):
    """See ``serve.Server``."""

    @property
    def shard(self) -> Shard: ...
    def carry_out(self, entry: Mapping[str, Any]) -> None: ...
    def collect(self) -> list[PieceState]: ...
    def afterwards(self, do: Callable[[], None], *, version: int = 0) -> None: ...


class Lead:
    """Decides. See ``serve.Server`` for when its methods are called.

    Args:
        service: What the strategy asks of servers.
        ledger: Opens the file that committed rows go to.
        sink: Where events go.
        stream: The random state that orders are drawn from, for all workers.
        workers: How many the run begins with.

    Attributes:
        done: All workers have ended well.
        now: Seconds, of a clock that all copies of the lead share; set before anything else is called.
        on_boundary: Called between two updates, with the number of those that are applied.
    """

    def __init__(
        self,
        service: Service,
        ledger: Callable[[], Ledger],
        sink: Sink,
        stream: bytes,
        workers: int,
    ) -> None:
        rule = service.rule
        self.core = ServerCore(rule)
        self._open, self._sink, self._stream = ledger, sink, stream
        self._ledger = Ledger(None, lambda error: None)
        self._from: tuple[int, list[Range]] | None = None  # what the ledger goes on from
        self.now = 0.0
        self.on_boundary: Callable[[int], None] = lambda version: None
        self._members: list[str] = []  # in the order in which they came
        self._ended: set[str] = set()
        self._group = 0  # counts who has come and gone
        self._service, self._rule, self.samples, self.round = service, rule, 0, 0
        self._steps = 0  # that workers have taken by themselves
        self._pace: dict[str, tuple[float, float]] = {}  # of each worker: its last push, and batches a second
        self._done: dict[tuple[int, int], list[Range]] = {}  # rows of passes that are not over
        self._passes: dict[int, int] = {}
        self._origins: dict[tuple[int, int], str] = {}
        self._after: dict[str, Any] = {}
        self._restored = False
        self._orders: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._awaited = 0
        self._waiting: list[str] = []
        self._workers, self._first = workers, 0.0
        self._between = False  # all have met, and nobody has asked for a batch since
        self._reported = 0.0

    def begin(self, hands: Hands, others: int) -> None:
        """The server is there. `others`: servers that have not entered yet; no worker begins before they have."""
        self._hands, self._awaited = hands, others

    def answers(self, since: int | None = None) -> None:
        """This copy of the lead keeps the ledger from now on; the one before has kept it up to version `since`."""
        self._ledger = self._open()
        begins = self._from if since is None else (since, [])
        if begins is not None:
            self._ledger.resumed(*begins)

    def close(self, *, ended: bool) -> None:
        """The run is over."""
        if ended:
            self.report(last=True)
            self._ledger.end(self.core.version, ())
        self._ledger.close()

    @property
    def done(self) -> bool:
        """Everybody who came has ended, and somebody well."""
        return bool(self._ended) and not self._members

    # ---- what comes -------------------------------------------------------------------------------------------------
    def entered(self) -> None:
        """Another server is there."""
        self._awaited = max(0, self._awaited - 1)
        self.admit()

    def admit(self) -> None:
        """Let workers in who wait. The first ones begin together; later ones never between two points where all meet."""
        if not self.may_admit(self.now):
            return
        waiting, self._waiting = self._waiting, []
        for name in sorted(waiting, key=lambda name: (len(name), name)):
            self._join(name)

    def may_admit(self, now: float) -> bool:
        """Somebody waits, and may come in."""
        late = bool(self._members) or self.core.version > 0
        early = len(self._waiting) < self._workers and now - self._first < _TOGETHER
        held = self._awaited or (self._members and self._between) or (not late and early)
        return bool(self._waiting) and not held

    def welcome(self) -> dict[str, Any]:
        """What a worker is told at first."""
        return {"stream": base64.b64encode(self._stream).decode()}

    def understand(self, name: str, kind: int, meta: Mapping[str, Any]) -> Callable[[], None]:
        """What is to be done about a message of a worker; nothing is done yet.

        Raises:
            KeyError, TypeError, ValueError: It makes no sense.
        """
        match kind:
            case Say.STEP:
                covers = tuple(Piece(*piece) for piece in meta["covers"])
                step = Step(name, int(meta["seq"]), float(meta["weight"]), covers, bool(meta["finite"]))
                return partial(self._pushed, step)
            case Say.READY:
                return partial(self._ready, name)
            case Say.ASK:
                ask = Ask(name, int(meta["loader"]), int(meta["epoch"]), bool(meta["ahead"]))
                return partial(self._asked, ask, int(meta["round"]))
            case Say.OVER:
                place = int(meta["loader"]), int(meta["epoch"])
                order = int(meta["batches"]), int(meta["rows"]), int(meta["order"])
                return partial(self._over, name, place, order)
            case Say.OPENED:
                opened = Opened(name, int(meta["loader"]), int(meta["epoch"]), int(meta["batches"]))
                return partial(self._take, opened)
            case Say.PASS:
                place = int(meta["loader"]), int(meta["epoch"])
                return partial(self._begins, name, place, str(meta["origin"]), fresh=bool(meta["fresh"]))
            case Say.DRAWN:
                after = json.loads(meta["after"])
                return partial(self._drawn, int(meta["loader"]), after["stream"], after["held"])
            case Say.SKIP:
                return partial(self._take, Skip(name, tuple(Piece(*piece) for piece in meta["pieces"])))
            case Say.MEET:
                return partial(self._meet, Meet(name, str(meta["tag"]), str(meta["note"])), meta["stream"])
            case Say.BYE:
                return partial(self._bye, name)
        raise ValueError("it means nothing here")

    def _bye(self, name: str) -> None:
        self._ended.add(name)
        self._hands.carry_out({"do": "bye", "worker": name})

    def _pushed(self, step: Step) -> None:
        """Measure how fast the worker is: batches a second, half of it what it was before."""
        now = self.now
        since, rate = self._pace.get(step.worker, (now, 0.0))
        fresh = len(step.covers) / (now - since) if now > since else 0.0
        self._pace[step.worker] = now, (fresh + rate) / 2 if rate else fresh
        self._take(step)

    def _every(self, worker: str) -> int:
        """Steps from push to push (DyLU of arXiv 2401.09135): the fastest takes all, others in proportion to their speed."""
        rate = self._pace.get(worker, (0.0, 0.0))[1]
        if not self._service.by_speed or not rate:
            return self._service.every
        fastest = max(self._pace[name][1] for name in self._members if name in self._pace)
        return max(1, int(self._service.every * rate / fastest))

    def _ready(self, name: str) -> None:
        self._waiting.append(name)
        self._first = self._first or self.now
        self.admit()

    def _asked(self, ask: Ask, epoch: int) -> None:
        self.round, self._between = max(self.round, epoch), False
        self.admit()
        self._take(ask)

    def _over(self, name: str, place: tuple[int, int], order: tuple[int, int, int]) -> None:
        self._orders[place] = order
        self._take(Over(name, *place, order[0]))

    def _meet(self, meet: Meet, stream: Mapping[str, Any]) -> None:
        if self._after:
            self._after["stream"] = stream
        self._take(meet)

    def _drawn(self, loader: int, stream: Mapping[str, Any], held: Sequence[Any]) -> None:
        """What the next pass will be drawn from, unless something else is drawn before: for a run that is gone on with."""
        self._after["stream"] = stream
        self._after.setdefault("held", {})[str(loader)] = held

    def _begins(self, name: str, place: tuple[int, int], mine: str, *, fresh: bool) -> None:
        """A pass begins for a worker: its order is drawn from where the first one who came there drew it.

        Who is `fresh` has drawn nothing yet, and in a run that is gone on with does not know where its stream stands.
        """
        self._passes[place[0]] = max(self._passes.get(place[0], 0), place[1])
        held = self._after.get("held", {}).get(str(place[0]))
        if fresh and held is not None and self._restored:
            mine = json.dumps({"stream": self._after["stream"], "held": held})
        origin = self._origins.setdefault(place, mine)
        self._hands.carry_out({"do": "origin", "worker": name, "origin": origin})
        while len(self._origins) > _ORIGINS:
            del self._origins[next(iter(self._origins))]

    def left(self, name: str) -> None:
        """A worker is gone."""
        if name in self._waiting:
            self._waiting.remove(name)
        if name in self._members:
            self._members.remove(name)
            self._group += 1
        self._take(Leave(name))
        self.admit()

    def _join(self, name: str) -> None:
        self._members.append(name)
        self._group += 1
        self._take(Join(name))

    # ---- what is decided ----------------------------------------------------------------------------------------------
    def _take(self, event: Event) -> None:
        if isinstance(event, Step):  # by now schedules have stepped after the last update
            self.on_boundary(self.core.version)
        for instruction in self.core.handle(event, self.now):
            entry = self._entry(instruction)
            if entry is not None:
                self._hands.carry_out(entry)

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
                entry = {"do": "apply", "version": version, "parts": counted, "skip": skip}
                if isinstance(self._service.outer, Pairwise):
                    partner = self._service.outer.partner(parts[0].worker, self._members, version)
                    entry["partner"] = partner
                return entry
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
                self._done.pop((loader, epoch), None)
                _, rows, order = self._orders.get((loader, epoch), (batches, 0, 0))
                self._hands.afterwards(lambda: self._ledger.epoch_end(loader, epoch, rows, batches, True, order))
        return None

    def applied(self, version: int, messages: Sequence[Mapping[str, Any]], *, skip: bool) -> None:
        """An update was applied: write down what it consumed."""
        ranges: list[Range] = [tuple(row) for message in messages for row in message["rows"]]
        self.samples += sum(row[5] for row in ranges)
        self._steps += sum(int(message["steps"]) for message in messages)
        for row in ranges:
            self._done.setdefault((row[0], row[1]), []).append(row)
        self._hands.afterwards(lambda: self._ledger.commit(version, ranges, skipped=skip), version=version)
        if self.now - self._reported > _REPORT_EVERY:
            self._reported = self.now
            self._hands.afterwards(self.report)

    def about(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker that goes on is told."""
        told = {key: entry[key] for key in ("version", "clock", "tau")}
        told["steps"], told["every"] = self._steps, self._every(entry["worker"])
        if entry["seq"] == 0:  # where the others are
            told["passes"] = {str(loader): number - 1 for loader, number in self._passes.items()}
            told["epoch"] = self.round
        return {**told, "samples": self.samples, "group": self._group, "members": self._members}

    # ---- the state --------------------------------------------------------------------------------------------------
    def optimizers(self) -> dict[str, Any]:
        """The optimizers' part of the state, after the last update. Parameters of all servers are in the lead's models then."""
        pieces, shard = self._hands.collect(), self._hands.shard
        return optimizer_trees(shard.kept, shard.groups, pieces)

    def state(self) -> dict[str, Any]:
        """What is done, as JSON."""
        return {
            "core": self.core.state(),
            "samples": self.samples,
            "steps": self._steps,
            "round": self.round,
            "passes": {str(loader): number for loader, number in self._passes.items()},
            "origins": [[*place, origin] for place, origin in self._origins.items()],
            "orders": [[*place, *order] for place, order in self._orders.items()],
            "after": self._after,
            "scheduled": {number: list(done) for number, done in self._hands.shard.scheduled.items()},
            "done": [list(row) for rows in self._done.values() for row in rows],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.core = ServerCore.load(self._rule, dict(state["core"]))
        self.samples, self._steps, self.round = state["samples"], state["steps"], state["round"]
        self._after, self._restored = dict(state["after"]), True
        self._passes = {int(loader): number for loader, number in state["passes"].items()}
        self._origins = {(loader, epoch): origin for loader, epoch, origin in state["origins"]}
        self._orders = {
            (loader, epoch): (batches, rows, order) for loader, epoch, batches, rows, order in state["orders"]
        }
        for row in state["done"]:
            self._done.setdefault((row[0], row[1]), []).append(tuple(row))
        self._from = self.core.version, [row for rows in self._done.values() for row in rows]

    def whole(self) -> dict[str, Any]:
        """All of it, also in the middle of an update, for a second copy."""
        return {
            "core": tell_core(self.core),
            **{name: getattr(self, name) for name in _WHOLE},
            "_ended": sorted(self._ended),
        }

    def take_over(self, whole: Mapping[str, Any]) -> None:
        """Be as the copy that has told this."""
        self.core = hear_core(self._rule, whole["core"])
        for name in _WHOLE:
            setattr(self, name, whole[name])
        self._ended = set(self._ended)

    def report(self, *, last: bool = False) -> None:
        """Say how late updates were, by worker."""
        counts = self.core.histogram
        histogram = {name: {str(tau): n for tau, n in sorted(own.items())} for name, own in sorted(counts.items())}
        self._sink(Report("staleness", self.core.version, {"histogram": histogram}))
        if last and not self._rule.synchronous and self.core.version:
            said = ", ".join(
                f"{name} {_mean(own):.1f} (at most {max(own)})" for name, own in sorted(counts.items()) if own
            )
            message = f"staleness, in updates by others between read and application: {said}"
            self._sink(Report("notice", self.core.version, {"message": message}))


def _mean(histogram: Mapping[int, int]) -> float:
    return sum(tau * n for tau, n in histogram.items()) / max(1, sum(histogram.values()))
