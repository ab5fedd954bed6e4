"""``paceline chaos RUN --kill 10s --stop 20s --for 5min``: a fault drill on a run of one's own that is alive, with a report.

Workers of this machine are killed (SIGKILL) and frozen (SIGSTOP) at random moments; what happened then is read from the run's
ledgers. The seed fixes the moments and whose turn it is, by position among those who are alive.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.launch.rundir import alive_launcher, find, read_json, start_ticks
from paceline.terms.errors import UsageError

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_LOOK = 0.005  # seconds between two looks at the ledgers
_CALM = 3.0  # seconds at the beginning in which the undisturbed rate is measured
_GIVE_UP = 60.0  # seconds after a fault without a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="a run's directory, or its name below runs/; it must be alive and elastic")
    add("--kill", type=seconds, metavar="TIME", help="kill a worker about every TIME: 10s, 2min")
    add("--stop", type=seconds, metavar="TIME", help="freeze a worker about every TIME")
    add("--for", dest="duration", type=seconds, metavar="TIME", default=60.0, help="how long (default: 60s)")
    add("--seed", type=int, default=0, help="of the moments and the victims (default: 0)")


def seconds(text: str) -> float:
    """``10s``, ``1.5min``, ``2h`` in seconds. Raises UsageError PL105."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text)
    if match is None or not float(match[1]):
        raise UsageError("PL105", f"{text!r} is no time", help="a time is a number with s, min or h: `10s`.")
    return float(match[1]) * _UNITS[match[2]]


def main(args: argparse.Namespace) -> int:
    """0 when the run has survived and its ledger proves every row, 1 when not."""
    run = find(args.run)
    if not alive_launcher(run):
        raise UsageError("PL109", f"{run} is not alive", help="start it, and run the drill while it trains.")
    if not read_json(run / "run.json").get("plan", {}).get("workers_max"):
        raise UsageError("PL105", f"{run} is not elastic", help="start it with `--workers MIN:MAX`.")
    wanted = {signal.SIGKILL: args.kill, signal.SIGSTOP: args.stop}
    if not any(wanted.values()):
        raise UsageError("PL105", "no fault was asked for", help="give `--kill TIME` or `--stop TIME`.")
    drill = Drill(run, args.seed)
    drill.execute({number: every for number, every in wanted.items() if every}, args.duration)
    report = drill.report()
    print(json.dumps(report) if args.format == "json" else _text(report))
    return 0 if report["ok"] else 1


@dataclass
class Fault:
    """One of them.

    Attributes:
        recovered: Seconds until those who were left had committed another step as a new group; None: not in sight.
    """

    at: float
    kind: str
    worker: str
    recovered: float | None = None


@dataclass
class Drill:
    """Disturbs a run, and watches it.

    Args:
        run: Its directory.
        seed: Of everything random.
    """

    run: Path
    seed: int
    faults: list[Fault] = field(default_factory=list)
    calm_rate: float = 0.0
    steps: int = 0
    took: float = 0.0

    def execute(self, every: dict[signal.Signals, float], duration: float) -> None:
        """Faults of each kind at exponentially distributed intervals with the given means, for `duration` seconds."""
        draw = random.Random(self.seed)
        before, began = newest_step(self.run), time.monotonic()
        while time.monotonic() < began + min(_CALM, duration / 4) and alive_launcher(self.run):
            time.sleep(_LOOK)
        self.calm_rate = (newest_step(self.run) - before) / (time.monotonic() - began)
        first, began = newest_step(self.run), time.monotonic()
        due = {number: began + draw.expovariate(1 / mean) for number, mean in every.items()}
        while alive_launcher(self.run):
            number = min(due, key=lambda kind: due[kind])
            if due[number] > began + duration:
                break
            time.sleep(max(0.0, due[number] - time.monotonic()))
            self._fault(number, draw)
            due[number] = time.monotonic() + draw.expovariate(1 / every[number])
        time.sleep(max(0.0, began + duration - time.monotonic()))
        self.took = time.monotonic() - began
        self.steps = newest_step(self.run) - first

    def _fault(self, number: signal.Signals, draw: random.Random) -> None:
        victims = sorted(_workers(self.run), key=lambda entry: int(entry["name"].rpartition("-")[2]))
        if not victims:
            return
        victim = draw.choice(victims)
        group = newest_group(self.run)
        fault = Fault(time.monotonic(), number.name, victim["name"])
        try:
            os.kill(victim["pid"], number)
        except ProcessLookupError:
            return
        self.faults.append(fault)
        while time.monotonic() < fault.at + _GIVE_UP and alive_launcher(self.run):
            if newest_group(self.run) > group:
                fault.recovered = time.monotonic() - fault.at
                return
            time.sleep(_LOOK)

    def report(self) -> dict[str, Any]:
        """What the drill has shown; `ok`: the run lives, or has ended well, and no row was lost or doubled."""
        from paceline.train.proof import verify

        alive = bool(alive_launcher(self.run))
        problems = verify(self.run, alive=alive)
        times = sorted(fault.recovered for fault in self.faults if fault.recovered is not None)
        rate = self.steps / self.took if self.took else 0.0
        code = read_json(self.run / "run.json").get("exit_code")
        return {
            "run": str(self.run),
            "seed": self.seed,
            "seconds": round(self.took, 1),
            "faults": {
                kind: sum(f.kind == kind for f in self.faults) for kind in sorted({f.kind for f in self.faults})
            },
            "steps": self.steps,
            "steps per second, calm": round(self.calm_rate, 2),
            "steps per second, drill": round(rate, 2),
            "recovery p50": round(statistics.median(times), 3) if times else None,
            "recovery p99": round(times[min(len(times) - 1, round(0.99 * len(times)))], 3) if times else None,
            "ledger": problems or "every row once, no step twice",
            "alive": alive,
            "ok": not problems and (alive or code == 0),
        }


def _text(report: dict[str, Any]) -> str:
    return "\n".join(f"{name:<24} {value}" for name, value in report.items())


def _workers(run: Path) -> list[dict[str, Any]]:
    """Workers of this machine that are what ``processes.json`` says they are."""
    entries = [entry for entry in read_json(run / "processes.json") if entry["role"] == "worker"]
    return [entry for entry in entries if start_ticks(entry["pid"]) == entry["ticks"]]


def _ends(run: Path) -> Iterator[list[dict[str, Any]]]:
    """The last lines of each ledger."""
    for file in (run / "ledger").glob("*.jsonl"):
        with file.open("rb") as ledger:
            ledger.seek(max(0, file.stat().st_size - 8192))
            whole = ledger.read().split(b"\n")
        yield [json.loads(raw) for raw in whole[1 if len(whole) > 2 else 0 : -1] if raw.startswith(b"{")]


def newest_step(run: Path) -> int:
    """The last step that somebody has committed."""
    return max((line["s"] for lines in _ends(run) for line in lines if line["k"] in ("c", "g")), default=0)


def newest_group(run: Path) -> int:
    """The newest group that was seen committing a step."""
    newest = 0
    for lines in _ends(run):
        group = 0
        for line in lines:
            group = line["g"] if line["k"] == "g" else group
            newest = max(newest, group if line["k"] == "c" else 0)
    return newest
