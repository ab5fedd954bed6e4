"""The run on the terminal: what ``local`` hears goes through folding to the screen, and at the end it says how it was."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.launch.local import Outcome
from paceline.observe import failure
from paceline.observe.output import Folder, Line
from paceline.observe.screen import Screen
from paceline.observe.tail import Values
from paceline.observe.words import duration
from paceline.terms.activity import Snapshot
from paceline.terms.plan import Plan


class Console:
    """A :class:`~paceline.launch.local.View` on the terminal.

    Args:
        plan: What runs.
        path: The run directory, as the user would type it.
        as_json: One JSON object a line instead of text for people.
        explain: Say where every parameter is, and what is exchanged.
    """

    def __init__(self, plan: Plan, path: Path, as_json: bool, explain: bool = False) -> None:
        self._plan, self._path, self._explain = plan, path, explain
        self._as_json = as_json
        self._folder = Folder(plan.processes)
        self._values = Values(path / "events", plan.processes)
        self._screen: Screen | None = None
        self._snapshots: Sequence[Snapshot] = ()

    def open(self) -> None:
        """Begin to draw."""
        self._screen = Screen(self._plan.processes, mode="json" if self._as_json else "auto")

    @property
    def screen(self) -> Screen:
        if self._screen is None:
            self.open()
        assert self._screen is not None
        return self._screen

    def workers(self, count: int, noun: str) -> None:
        self.screen.noun = noun
        self._folder.resize(count)

    def output(self, rank: int, line: str, stream: str) -> None:
        self._folder.feed(rank, line, stream, time.monotonic())

    def say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.screen.line(line)

    def report(self, rank: int, report: Mapping[str, Any]) -> None:
        """Notices are folded like output: several ranks may have the same to say."""
        if report["kind"] == "notice" and report.get("message"):
            code = report.get("code")
            text = f"warning[{code}]: {report['message']}" if code else str(report["message"])
            self.output(rank, text, "stderr")
        if report["kind"] == "adopt" and rank == 0:
            self.say([f"strategy {report.get('strategy')} · wire {report.get('wire')}"])
            if report.get("strategy") != "ddp()":  # what differs from the usual is spelled out
                self.say([f"  {line}" for line in str(report.get("describe")).splitlines()])

        if report["kind"] == "place" and self._explain:
            self.say([f"{report['model']}:", *(f"  {line}" for line in report["text"].splitlines())])

    def beat(self, snapshots: Sequence[Snapshot], now: float) -> None:
        self._snapshots = snapshots
        self._show(self._folder.due(now))
        self._values.poll()
        alive = {f"worker-{s.rank}" for s in snapshots if s.adopted}
        if ended := self._values.ended(alive):
            self.screen.epoch(ended.epoch, ended.step, ended.values)
        self.screen.update(snapshots, self._values.latest(alive), now)

    def conclude(self, outcome: Outcome, seconds: float, again: int | None = None) -> None:
        """The last words. `again`: all begin again from the checkpoint of this step."""
        self._show(self._folder.flush())
        self._values.drain()
        values, rate = self._values.final(), self._values.rate
        if outcome.exit_code == 0 and (last := self._values.last_epoch()):
            self.screen.epoch(last.epoch, last.step, last.values)
        data = {
            "state": outcome.state,
            "exit_code": outcome.exit_code,
            "run_dir": str(self._path),
            "seconds": seconds,
            "steps_per_second": rate[0] if rate is not None else None,
            "samples_per_second": rate[1] if rate is not None else None,
            "values": values,
            "failures": list(outcome.failures),
            "mistake": outcome.mistake.code if outcome.mistake is not None else None,
        }
        lines = self._good(outcome, seconds, values) if outcome.exit_code == 0 else self._bad(outcome, seconds)
        if again is not None:
            data["again_from"] = again
            lines = [
                *lines,
                f"a rank took with it what no other has: all begin again from the checkpoint of step {again}",
            ]
        self.screen.finish(lines, data, err=outcome.exit_code != 0)

    def close(self) -> None:
        self.screen.close()

    def _show(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self.screen.line(line.text, line.label or None, line.err)

    def _good(self, outcome: Outcome, seconds: float, values: Mapping[str, float]) -> list[str]:
        steps = max((s.step for s in self._snapshots), default=0)
        parts = [f"{outcome.state} in {duration(seconds)}", *([f"{steps} steps"] if steps else [])]
        if rate := self._values.rate:
            parts.append(f"{rate[1]:.0f} samples/s" if rate[1] else f"{rate[0]:.3g} steps/s")
        return [" · ".join([*parts, *(f"{name} {value:.4g}" for name, value in values.items()), str(self._path)])]

    def _bad(self, outcome: Outcome, seconds: float) -> list[str]:
        """The cause stands last."""
        head = f"{outcome.state} after {duration(seconds)} · {self._path}"
        if outcome.asked:
            own = [f for f in outcome.failures if not f.get("witness") and failure.code(f) not in ("PL403", "PL404")]
            return [*failure.render(own, self._plan.processes, outcome.noun), head]
        if outcome.mistake is not None:
            return [head, *outcome.mistake.render(), f"  more: paceline explain {outcome.mistake.code}"]
        return [head, *failure.render(outcome.failures, self._plan.processes, outcome.noun)]
