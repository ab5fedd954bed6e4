"""The launcher of one host: starts the workers, watches them, and ends them. Never imports torch.

One loop reads the workers' output, their reports, their ends, and our signals; ten times a second it reads the board, shows it,
and asks the observer whether anything is wrong. What to do about an end or a signal is decided by ``ending``; this file only
does it; what an elastic run does about a loss is in ``elastic``. Every way out is bounded in time, and none leaves a process, a socket or a file behind.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from paceline.launch import ending as ends
from paceline.launch.child import Child
from paceline.launch.coordination import Coordination
from paceline.launch.crew import Crew, Order
from paceline.launch.elastic import Elastic
from paceline.launch.ending import Abort, Action, Ending, RequestStop, Say, Signal, Stage
from paceline.launch.host import Host
from paceline.launch.rundir import RunDirectory, State, now_text
from paceline.launch.servers import Servers
from paceline.launch.signals import Signals
from paceline.observe import failure, hang
from paceline.observe.words import RANK
from paceline.terms.activity import Phase, Snapshot

__all__ = ["Launcher", "Order", "Outcome", "View"]

BEAT = 0.1  # seconds between two looks at the board
_MOST_READS = 4096  # of one pipe, once its rank has ended: somebody else may go on writing into it for ever


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended.

    Attributes:
        exit_code: See ``ending``.
        state: The last state of ``run.json``.
        failures: Records of ``observe.failure``, each with ``rank`` and ``name``.
        mistake: What the observer recognised as the reason why no rank could go on, if it did.
        results: What launched functions returned, by rank.
        asked: The signal that asked for the end, or 0.
        noun: What the numbers of the failures are called, see ``observe.words``.
    """

    exit_code: int
    state: State
    failures: tuple[failure.Record, ...]
    mistake: hang.Finding | None
    results: Mapping[int, Any]
    asked: int
    noun: str = RANK


class View(Protocol):
    """Who shows the run to a person. Workers are known by their numbers."""

    def workers(self, count: int, noun: str) -> None:
        """So many live from now on, and this is what their numbers are called."""

    def output(self, rank: int, line: str, stream: str) -> None:
        """A line that a worker has printed to its ``stdout`` or ``stderr``."""

    def say(self, lines: Sequence[str]) -> None:
        """Something the launcher has to say."""

    def report(self, rank: int, report: Mapping[str, Any]) -> None:
        """A worker has reported: ``kind`` is ``adopt``, ``notice``, ``export`` or ``end``."""

    def beat(self, snapshots: Sequence[Snapshot], now: float) -> None:
        """Ten times a second: what every worker is doing."""


class Launcher:
    """One run on this host.

    Args:
        order: What to start.
        view: Who shows it.
        run: Its directory, or None to write nothing.
        catch: Signals that end the run instead of this process.
    """

    def __init__(self, order: Order, view: View, run: RunDirectory | None, catch: Sequence[signal.Signals]) -> None:
        self._crew = Crew(order, run)
        self._view, self._run, self._catch = view, run, catch
        self._watch = hang.Watch(after=order.hang_after)
        self._ending = Ending(joined=order.host is not None)
        self._failures: list[failure.Record] = []
        self._mistake: hang.Finding | None = None
        self._results: dict[int, Any] = {}
        self._hashes: dict[int, str] = {}
        self._have_met = False
        self._order = order
        self._elastic: Elastic | None = None

    def execute(self, started: Callable[[], None] = lambda: None) -> Outcome:
        """Start everything, see it to its end, and leave nothing behind.

        Args:
            started: Called once, when all ranks have been started and the loop has not begun.

        Raises:
            UsageError: PL103, the system does not give the processes; what was started is ended.
        """
        with Signals(self._catch) as signals, self._crew, selectors.DefaultSelector() as self._selector:
            for child in self._crew.children.values():
                self._listen_to(child)
            if self._crew.coordination is not None:
                self._keep(self._crew.coordination)
            self._selector.register(signals, selectors.EVENT_READ, lambda: self._on_signals(signals))
            self._update(state="running")
            started()
            self._loop()
            return self._conclude()

    def _keep(self, coordination: Coordination | Host | Servers) -> None:
        """The run is elastic."""
        self._elastic = Elastic(self._order.plan, self._crew, coordination, self._view.say, self._listen_to)
        coordination.open(self._selector, self._view.say, self._crew.enlist, self._elastic.answer)

    # ---- the loop -------------------------------------------------------------------------------------------------
    def _listen_to(self, child: Child) -> None:
        for fd in child.outputs:
            self._selector.register(fd, selectors.EVENT_READ, lambda fd=fd: self._on_output(child, fd))
        self._selector.register(child.report_fd, selectors.EVENT_READ, lambda: self._on_reports(child))
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_exit(child))

    def _loop(self) -> None:
        next_beat = time.monotonic()
        while self._crew.alive:
            for key, _ in self._selector.select(max(0.0, next_beat - time.monotonic())):
                if self._selector.get_map().get(key.fd) is key:  # not given back by an earlier one of this round
                    key.data()
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + BEAT
                self._beat(now)

    def _beat(self, now: float) -> None:
        snapshots = self._snapshots()
        self._view.beat(snapshots, now)
        self._examine(snapshots, now)
        if not self._have_met and self._elastic is None and all(snapshot.adopted for snapshot in snapshots):
            self._have_met = True
            self._crew.have_met()
        if self._elastic is not None and not self._ending.ours:
            self._elastic.tick(now)
            self._end_if_hopeless(now)
        leaving = [s.rank for s in snapshots if s.phase in (Phase.FINISHED, Phase.FAILED)]
        self._do(self._ending.tick(now, leaving))

    def _examine(self, snapshots: Sequence[Snapshot], now: float) -> None:
        exited = {number: child.status for number, child in self._crew.children.items() if child.status is not None}
        settled = True
        if self._elastic is not None:
            self._watch.noun, settled = self._elastic.noun, self._elastic.settled
            snapshots = self._elastic.taking_part(snapshots)
            exited = {s.rank: exited[s.rank] for s in snapshots if s.rank in exited}
        for finding in self._watch.examine(snapshots, exited, now, settled=settled):
            self._on_finding(finding, now)
        for straggler in self._watch.stragglers():
            self._view.say([straggler.render(self._watch.noun)])

    def _snapshots(self) -> list[Snapshot]:
        return self._crew.snapshots()

    # ---- what happens ---------------------------------------------------------------------------------------------
    def _on_output(self, child: Child, fd: int) -> int:
        """Pass lines on; see ``Child.read_output`` for the number."""
        lines, count = child.read_output(fd, self._log_failed)
        stream = "stdout" if fd == child.outputs[0] else "stderr"
        for line in lines:
            self._view.output(child.number, line, stream)
        if count == 0:
            self._selector.unregister(fd)
        return count

    def _log_failed(self, error: OSError) -> None:
        if self._run is not None:
            self._run.failed(error)

    def _on_reports(self, child: Child) -> int:
        reports, count = child.read_reports()
        for report in reports:
            self._on_report(child, report)
        if count == 0:
            self._selector.unregister(child.report_fd)
        return count

    def _on_report(self, child: Child, report: dict[str, Any]) -> None:
        match report.pop("kind"):
            case "fault" if self._elastic is not None and self._elastic.bears(child, report):
                pass  # its end follows
            case "fault":
                self._failed(child, {**report, "witness": self._ending.interrupted})
                self._do(self._ending.failed(child.number, time.monotonic()))
            case "result":
                self._results[child.number] = report["value"]
            case "listening":
                self._crew.listens(child.name, report["addresses"], report.get("purpose", "gloo"))
            case "view" if self._elastic is not None:
                self._on_view(self._elastic, child, report)
            case "leave" if self._elastic is not None:
                self._elastic.leaves(child, report["why"], time.monotonic())
            case kind:
                self._note(child.number, kind, report)
                self._view.report(child.number, {"kind": kind, **report})

    def _on_view(self, elastic: Elastic, child: Child, report: Mapping[str, Any]) -> None:
        """A worker has entered an epoch. Nobody may have ended its script well by then: all end together."""
        ended = [s for s in self._snapshots() if s.phase is Phase.FINISHED]
        finding = elastic.left_behind(ended, report)
        elastic.view(child, report)
        self._count()
        if finding is not None:
            self._on_finding(finding, time.monotonic())

    def _note(self, number: int, kind: str, report: Mapping[str, Any]) -> None:
        if kind == "end" and report.get("hash"):
            self._hashes[number] = report["hash"]
        if kind == "place" and self._run is not None:
            self._run.explain(report["model"], report["text"], report["svg"])
        if kind == "adopt" and number == 0:
            self._update(**{key: report.get(key) for key in ("strategy", "wire", "describe")})

    def _on_exit(self, child: Child) -> None:
        """A worker has ended. The others are told before anything else is done about it."""
        self._selector.unregister(child.pidfd)
        ours, status, now = self._ending.ours, child.final_status(), time.monotonic()
        well = status == 0 and self._crew.board.read(child.slot).phase is Phase.FINISHED
        if self._elastic is not None:
            self._elastic.certify(child, well=well)
            self._read_out(child.report_fd, partial(self._on_reports, child))  # why, before it is decided what follows
        if self._elastic is None or not self._elastic.tolerates(child, status):
            self._do(self._ending.exited(child.number, now, well=well))
        child.reap()
        self._drain(child)
        child.close()
        if self._elastic is not None and not ours and (well or self._elastic.tolerates(child, status)):
            self._bear(self._elastic, child, status, now, well=well)
        elif not well and not any(f["rank"] == child.number for f in self._failures):
            self._failed(child, self._record(child, status, now, witness=ours))
        self._count()
        self._crew.enlist()

    def _bear(self, elastic: Elastic, child: Child, status: int, now: float, *, well: bool) -> None:
        """A worker has ended, and the run goes on."""
        if well:
            elastic.finished(child, now)
            return
        step = max((snapshot.step for snapshot in self._snapshots()), default=0)
        record = self._named(child, self._record(child, status, now))
        elastic.lost(child, status, record, step, now, replace=self._ending.stage is Stage.RUNNING)
        self._end_if_hopeless(now)

    def _end_if_hopeless(self, now: float) -> None:
        if self._elastic is not None and self._elastic.given_up:
            self._do(self._ending.mistake(now))

    def _record(self, child: Child, status: int, now: float, *, witness: bool = False) -> failure.Record:
        make = failure.killed if status < 0 else failure.exited
        return make(abs(status), now, self._crew.board.read(child.slot), witness=witness)

    def _named(self, child: Child, record: failure.Record) -> failure.Record:
        return {**record, "rank": child.number, "name": child.name}

    def _failed(self, child: Child, record: failure.Record) -> None:
        self._failures.append(self._named(child, record))

    def _count(self) -> None:
        """Say who is left."""
        if self._elastic is not None:
            self._view.workers(len(self._crew.alive), self._elastic.noun)

    def _drain(self, child: Child) -> None:
        """Read what is left in the pipes: their ends may be held open by a process that has left the rank's session."""
        registered = self._selector.get_map()
        sources = [(fd, partial(self._on_output, child, fd)) for fd in child.outputs]
        for fd, read in [*sources, (child.report_fd, partial(self._on_reports, child))]:
            self._read_out(fd, read)
            if fd in registered:
                self._selector.unregister(fd)

    def _read_out(self, fd: int, read: Callable[[], int]) -> None:
        """Read what has come, as long as the descriptor is ours to read."""
        for _ in range(_MOST_READS):
            if fd not in self._selector.get_map() or read() <= 0:
                break

    def _on_finding(self, finding: hang.Finding, now: float) -> None:
        if not finding.fatal:
            self._view.say(finding.render())
        elif not self._ending.ours:
            self._mistake = finding
            self._do(self._ending.mistake(now))

    def _on_signals(self, signals: Signals) -> None:
        for number in signals.taken():
            in_loop = any(snapshot.adopted for snapshot in self._snapshots())
            self._do(self._ending.signalled(number, time.monotonic(), in_loop))

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case RequestStop():
                    self._crew.board.request_stop()
                case Abort(lost=lost):
                    self._crew.board.abort(lost)
                case Signal(number=number, alone=alone, spare=spare):
                    self._crew.signal(number, alone=alone, spare=spare)
                case Say(text=text):
                    self._view.say([text])

    # ---- the end --------------------------------------------------------------------------------------------------
    def _conclude(self) -> Outcome:
        """Name the cause."""
        asked, elastic = self._ending.asked, self._elastic
        if elastic is not None and not asked and (self._failures or elastic.given_up):
            self._failures += elastic.causes
        noun = elastic.noun if elastic is not None else RANK
        if not asked:
            gone = [s.rank for s in self._snapshots() if s.phase is Phase.FINISHED]
            said = ends.left_early(gone, self._failures, noun) if self._failures else ends.differing(self._hashes, noun)
            self._mistake = self._mistake or said
        code = ends.exit_code(asked, self._mistake, self._failures)
        if elastic is not None and elastic.given_up and not asked:
            code = ends.LOST
        states: dict[int, State] = {ends.OK: "finished", ends.LOST: "lost"}
        state: State = "stopped" if asked else states.get(code, "failed")
        self._update(state=state, exit_code=code, ended=now_text())
        return Outcome(code, state, tuple(self._failures), self._mistake, self._results, asked, noun)

    def _update(self, **fields: Any) -> None:
        if self._run is not None:
            self._run.update(**fields)
