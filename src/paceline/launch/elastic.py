"""What the launcher does in an elastic run beyond what it always does: ``muster`` decides, this file's hands do it.

* A death is certified to the coordinator at once, whatever else follows from it.
* A worker that the coordinator has left out, because it gave no sign of life, is killed: frozen or not, it will not be let in
  again, and its place is needed. So is a silent one without which the others are no majority: its death is certain then.
* Losses are kept as failures until the others have agreed on an epoch without the lost ones; then they are history. What
  has not been got over when the run fails is the cause of it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from paceline.launch.child import Child
from paceline.launch.coordination import LEASE, Coordination
from paceline.launch.crew import Crew
from paceline.launch.host import Host
from paceline.launch.layout import replica_ranks
from paceline.launch.muster import Dismiss, GiveUp, Loss, Muster, Standing, Start, Step, Tell
from paceline.launch.servers import Servers
from paceline.observe.failure import Record, signal_name
from paceline.observe.hang import Finding
from paceline.observe.words import RANK, WORKER, ranks, spans, verb
from paceline.terms.activity import Snapshot
from paceline.terms.errors import EXPLANATIONS, UsageError
from paceline.terms.plan import Plan

_REFUSED = ("PL420", "PL421", "PL422", "PL423")  # the coordinator does not let this process take part (any more)
_MISSED = "PL403"  # another of the same replica is lost, or left out; those of other replicas are got over by the worker itself
_ENDED = "PL422"  # one of these: it came too late
_NEVER = -2  # the epoch of a worker that never took part
_FOLLOWS_S = 0.5  # a torn connection is noticed before the end of the process that held it


class Elastic:
    """Keeps an elastic run alive.

    Args:
        plan: With its limits.
        crew: The workers, started.
        coordination: The line to the coordinator, or the parameter servers.
        say: Tells the person at the terminal.
        began: Called with each worker that was started here.

    Attributes:
        noun: What numbers are called, see ``observe.words``.
        given_up: Why the run cannot go on, or empty.
    """

    def __init__(
        self,
        plan: Plan,
        crew: Crew,
        coordination: Coordination | Host | Servers,
        say: Callable[[Sequence[str]], None],
        began: Callable[[Child], None],
    ) -> None:
        self._plan, self._crew, self._coordination = plan, crew, coordination
        self._say, self._began = say, began
        self._joins = isinstance(coordination, Host)
        self._unit = replica_ranks(plan)
        self._muster = Muster(crew.children, plan.workers_min, plan.workers_max, joins=self._joins, unit=self._unit)
        self._unneeded: set[int] = set()  # who came when the run had ended
        self._faults: dict[int, str] = {}  # by number: why it ended, where that ends nobody else
        self._evicted: set[int] = set()
        self._silent: dict[str, float] = {}  # members that gave no sign of life, and since when that is known
        self._waited_for: list[str] = []  # silent members of other launchers, as was said
        self._losses: list[tuple[int, Record]] = []  # with the last epoch of the lost
        self._newest = -1
        self.noun = RANK
        self.given_up = ""

    # -- what is asked
    @property
    def settled(self) -> bool:
        """Those that are left have agreed on what follows from the losses so far."""
        return all(epoch == _NEVER for epoch, _ in self._losses)

    @property
    def causes(self) -> list[Record]:
        """Losses that have not been got over."""
        return [record for _, record in self._losses]

    def taking_part(self, snapshots: Sequence[Snapshot]) -> list[Snapshot]:
        """Without those who are still starting, or leaving."""
        inside = (Standing.MEMBER, Standing.FINISHED)
        return [s for s in snapshots if self._muster.standing(s.rank) in inside]

    def tolerates(self, child: Child, status: int) -> bool:
        """The run goes on after this end, which was not well; see :meth:`bears`. Status 0 in mid-script is a loss like a kill."""
        return status <= 0 or child.number in self._faults or self._replaces(child)

    def _replaces(self, child: Child) -> bool:
        """It was started while the run was under way here, and has not taken part yet."""
        return not self._joins and self._muster.standing(child.number) is Standing.STARTING

    @property
    def _ours(self) -> set[str]:
        return {child.name for child in self._crew.children.values()}

    # -- what happens
    def bears(self, child: Child, fault: Mapping[str, Any]) -> bool:
        """Whether the run goes on after a fault: not after an exception of a script that takes part.

        It does when the coordinator does not let the worker take part, or when one that is still starting fails.
        """
        message = (str(fault.get("message", "")).splitlines() or [""])[0]
        if self._unit > 1 and (fault.get("code") == _MISSED or self._lost_a_mate(child)):
            self._faults[child.number] = "could not go on without the lost worker of its replica"
        elif fault.get("code") in _REFUSED:
            self._faults[child.number] = f"was not let in any more ({message})"
        elif self._replaces(child):
            self._faults[child.number] = f"failed with {fault.get('type')}: {message} (events/{child.name}.jsonl)"
        if fault.get("code") == _ENDED:
            self._unneeded.add(child.number)
        return child.number in self._faults

    def _lost_a_mate(self, child: Child) -> bool:
        """Another worker of its replica was killed, or is just being: then what it says now follows from that."""
        mates = [self._crew.children[n] for n in self._muster.mates(child.number) if n in self._crew.children]
        return any(mate.was_killed(_FOLLOWS_S / len(mates)) for mate in mates)

    def certify(self, child: Child, *, well: bool) -> None:
        """A worker has ended."""
        self._coordination.certify(child.name, child.incarnation, "finished" if well else "died")

    def view(self, child: Child, report: Mapping[str, Any]) -> None:
        """A worker has entered an epoch."""
        child.rank, child.epoch = int(report["rank"]), int(report["epoch"])
        if child.epoch > self._newest:
            self._newest = child.epoch
            self._muster.elsewhere = sum(name not in self._ours for name in report.get("members", ()))
        self._do(self._muster.joined(child.number))
        members = [c for c in self._crew.alive if self._muster.standing(c.number) is Standing.MEMBER]
        if all(c.epoch == self._newest for c in members):
            self._losses = [(epoch, record) for epoch, record in self._losses if epoch >= self._newest]
        if child.rank != child.number:
            self.noun = WORKER
        self._crew.enlist()

    def left_behind(self, ended: Sequence[Snapshot], report: Mapping[str, Any]) -> Finding | None:
        """PL501 when an epoch begins without workers that have ended their scripts, and no loss explains it."""
        members = report.get("members", ())
        gone = [s for s in ended if members and self._crew.children[s.rank].name not in members]
        gone = [s for s in gone if self._muster.standing(s.rank) is not Standing.LEFT]
        if not gone or not self.settled:
            return None
        numbers = [s.rank for s in gone]
        message = (
            f"{ranks(numbers, self.noun)} ended {verb(numbers, 'its', 'their')} script after step "
            f"{spans(s.step for s in gone)}, and {len(members)} of the others went on"
        )
        return Finding("PL501", message, fatal=True)

    def leaves(self, child: Child, why: str, now: float) -> None:
        """A worker says that it leaves the run; at the end of its script that is nothing special."""
        if why == "stopping" and self._muster.standing(child.number) is Standing.MEMBER:
            self._do(self._muster.left(child.number, now))

    def finished(self, child: Child, now: float) -> None:
        """A worker has ended well, and is reaped."""
        if self._muster.standing(child.number) is Standing.LEFT:
            self._crew.release(child)
        self._do(self._muster.finished(child.number, now))

    def lost(self, child: Child, status: int, record: Record, step: int, now: float, *, replace: bool) -> None:
        """A worker was lost, and is reaped."""
        self._crew.release(child)
        if self._muster.standing(child.number) is Standing.LOST:  # with another of its replica
            return
        if child.number in self._unneeded:
            self._do(self._muster.left(child.number, now))
            return
        starting = self._muster.standing(child.number) is Standing.STARTING
        self._losses.append((_NEVER if starting else child.epoch, record))
        self.noun = WORKER
        loss = Loss(self._what(child, status), child.rank, step)
        self._do(self._muster.lost(child.number, loss, now, replace=replace))

    def tick(self, now: float) -> None:
        """Ten times a second."""
        self._coordination.tick(now)
        if self._coordination.status:
            self._heed(self._coordination.status, now)
        self._do(self._muster.tick(now))
        if self._coordination.lost and not self.given_up:
            self._do([GiveUp(self._coordination.lost)])

    def answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """``paceline join`` asks for something.

        Raises:
            UsageError: PL112, there is no room; PL105, nobody knows what it asks for.
        """
        match request:
            case {"do": "start", "count": int(count)} if count > 0:
                return {"names": self._add(count)}
            case {"do": "lend", "count": int(count), "host": str(host)} if count > 0:
                return self._lend(count, host)
        raise UsageError("PL105", f"the launcher does not understand {request}")

    def _lend(self, count: int, host: str) -> Mapping[str, Any]:
        """What a launcher of another machine needs to start so many workers there."""
        self._check_room(count)
        self._say([f"{host} joins with {count} worker{'' if count == 1 else 's'}"])
        assert not isinstance(self._coordination, Host), "only the launcher that has begun a run is asked"
        return {"first": self._muster.lend(), **self._coordination.lend(), "plan": asdict(self._plan)}

    def _add(self, count: int) -> list[str]:
        """Start so many more workers; their names."""
        self._check_room(count)
        starts = self._muster.add(count)
        names = [f"worker-{start.number}" for start in starts]
        self._say([f"{', '.join(names)}: asked for, being started"])
        self._do(starts)
        return names

    def _check_room(self, count: int) -> None:
        room = self._muster.room
        if count % self._unit:
            message = f"{count} more workers were asked for, and a replica of the model is split over {self._unit}"
            raise UsageError("PL112", message, help=f"ask for a multiple of {self._unit}.")
        if count > room:
            message = f"{count} more workers were asked for, and the run has room for {room}"
            raise UsageError("PL112", message, help="the second number of `--workers MIN:MAX` is its limit.")

    # -- what is done
    def _what(self, child: Child, status: int) -> str:
        if child.number in self._evicted:
            return f"gave no sign of life for {LEASE:g} s and was ended"
        if status == 0:
            return "exited with status 0 without finishing its script"
        if status > 0:
            return self._faults.get(child.number, f"ended with exit status {status}")
        return f"was killed by {signal_name(-status)}"

    def _heed(self, status: Mapping[str, Any], now: float) -> None:
        """What the coordinator said last: whom it has left out, who is silent, and who takes part that is not ours."""
        gone, members = status.get("gone", {}), {name for name, _ in status.get("members", ())}
        silent = members & set(status.get("silent", ()))
        silent = silent if silent != members else set()  # if nobody is heard, it is not they who are frozen
        self._silent = {name: self._silent.get(name, now) for name in silent}
        for child in self._crew.alive:
            frozen = now - self._silent.get(child.name, now) > LEASE
            if (gone.get(child.name) == "evicted" or frozen) and child.number not in self._evicted:
                self._evicted.add(child.number)
                child.signal(signal.SIGKILL)
        self._wait_for(sorted(name for name, since in self._silent.items() if now - since > LEASE))
        if status.get("epoch", 0) >= self._newest:
            self._muster.elsewhere = len(members - self._ours - gone.keys())

    def _wait_for(self, silent: Sequence[str]) -> None:
        """Say of whom nothing is heard, who cannot be left out, and whom nobody here can end: of another machine, all of it gone."""
        far = [name for name in silent if name not in self._ours]
        if far and far != self._waited_for:
            many = len(far) > 1
            self._say(
                [
                    f"{', '.join(far)} {'give' if many else 'gives'} no sign of life, and without {'them' if many else 'it'} the others "
                    "are no majority, so the run waits",
                    "  help: mend the network. If that machine is gone for good, end the run and begin it again with `--resume auto`.",
                ]
            )
        self._waited_for = far

    def _do(self, steps: Sequence[Step]) -> None:
        for step in steps:
            match step:
                case Start(number=number):
                    self._start(number)
                case Dismiss(numbers=numbers, now=now):
                    for number in numbers:
                        self._crew.children[number].signal(signal.SIGKILL if now else signal.SIGTERM)
                case GiveUp(why=why):
                    self.given_up = why
                    help = EXPLANATIONS["PL111"].help
                    self._say([f"error[PL111]: {why}; the run ends", f"  help: {help}"])
                case Tell(text=text):
                    self._say([text])

    def _start(self, number: int) -> None:
        try:
            child = self._crew.start_worker(number)
        except UsageError as error:
            self._do(
                self._muster.lost(number, Loss(f"could not be started ({error.message})", -1, 0), time.monotonic())
            )
            return
        self._began(child)
        self._crew.enlist()
