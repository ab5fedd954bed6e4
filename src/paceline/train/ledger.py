"""The ledger: which rows every committed step was made of, append-only, one small line a step and rank.

Each rank writes ``ledger/<name>.jsonl``. Lines, by their ``k``:

* ``c`` commit: ``{"k":"c","s":step,"r":[[loader,epoch,start,rows,local_start,local_rows],...]}``: the step's global batches
  (rows ``start .. start+rows`` of the loader's order in that epoch) and this rank's part of each;
* ``v`` viewed: the same ranges for batches that no gradient was taken of (evaluation);
* ``e`` end of an epoch of a loader: rows, batches, whether it was walked to its end, a fingerprint of the order;
* ``x`` end of the run: steps applied, ranges that were trained on but belong to no step (an accumulation left open).

``verify`` proves offline: every row of a completed epoch exactly once over all ranks, steps without gaps and the same on all
ranks, the same order everywhere. Imports no torch, so that the command line stays quick.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from paceline.terms.errors import FileError

Range = tuple[int, int, int, int, int, int]
"""loader, epoch, first row of the global batch, its rows, first row of this rank's part, its rows."""


class Ledger:
    """Writer of one rank's ledger. A line is handed to the operating system at once, so a killed process loses nothing.

    Args:
        path: File to append to, or None to write nothing.
        on_failure: Told once when a write fails; training goes on.
    """

    def __init__(self, path: Path | None, on_failure: Callable[[OSError], None]) -> None:
        self._fd = -1
        self._on_failure = on_failure
        if path is not None:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                on_failure(error)

    def commit(self, step: int, ranges: Sequence[Range]) -> None:
        """Step `step` was applied; it consumed these batches."""
        self._write('{"k":"c","s":%d,"r":%s}\n' % (step, _compact(ranges)))

    def viewed(self, ranges: Sequence[Range]) -> None:
        """These batches were handed out and no gradient was taken of them."""
        if ranges:
            self._write('{"k":"v","r":%s}\n' % _compact(ranges))

    def epoch_end(self, loader: int, epoch: int, rows: int, batches: int, complete: bool, order: int) -> None:
        """A walk over a loader ended: at its end (`complete`) or by a ``break``."""
        line = {
            "k": "e",
            "l": loader,
            "e": epoch,
            "rows": rows,
            "batches": batches,
            "complete": complete,
            "order": order,
        }
        self._write(json.dumps(line, separators=(",", ":")) + "\n")

    def end(self, step: int, open_ranges: Sequence[Range]) -> None:
        """The run ended with `step` steps applied."""
        self._write('{"k":"x","s":%d,"r":%s}\n' % (step, _compact(open_ranges)))

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, line: str) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, line.encode())
        except OSError as error:
            self.close()
            self._on_failure(error)


def _compact(ranges: Sequence[Range]) -> str:
    return "[" + ",".join("[%d,%d,%d,%d,%d,%d]" % r for r in ranges) + "]"


def verify(run_dir: Path) -> list[str]:
    """Check the ledger of a run; the list of what is wrong, empty when everything is proved.

    Raises:
        FileError: There is no ledger (PL106 as a file), or a line cannot be read (PL603).
    """
    return problems(load(run_dir))


def load(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of every rank, by file name. Raises FileError PL603 for a line that is no JSON object."""
    files = sorted((run_dir / "ledger").glob("*.jsonl"))
    if not files:
        raise FileError(
            "PL603",
            f"{run_dir} has no ledger",
            help="the run wrote none: it had no adopted loader, or it never started.",
        )
    return {file.stem: list(_lines(file)) for file in files}


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    for number, raw in enumerate(file.read_bytes().splitlines(), 1):
        try:
            line = json.loads(raw)
            line["k"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileError("PL603", f"{file.name} line {number} is not a ledger line: {raw[:60]!r}") from error
        yield line


def problems(ledgers: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The proof itself, on lines in memory. Pure."""
    return [*_steps(ledgers), *_orders(ledgers), *_cover(ledgers)]


def _steps(ledgers: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Steps are 1, 2, 3 … on every rank, and of the same global batches."""
    made_of: dict[int, set[str]] = defaultdict(set)
    last: dict[str, int] = {}
    for name, lines in ledgers.items():
        expected = 1
        for line in lines:
            if line["k"] != "c":
                continue
            if line["s"] != expected:
                yield f"{name}: step {line['s']} was committed where step {expected} was expected"
            expected = line["s"] + 1
            made_of[line["s"]].add(str([r[:4] for r in line["r"]]))
        last[name] = expected - 1
    for step, batches in sorted(made_of.items()):
        if len(batches) > 1:
            yield f"step {step}: ranks committed different global batches: {' / '.join(sorted(batches))}"
    if len(set(last.values())) > 1:
        yield "ranks applied different numbers of steps: " + ", ".join(f"{n} {s}" for n, s in sorted(last.items()))


def _orders(ledgers: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    orders: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    for name, lines in ledgers.items():
        for line in lines:
            if line["k"] == "e":
                orders[line["l"], line["e"]][name] = str(
                    (line["rows"], line["batches"], line["complete"], line["order"])
                )
    for (loader, epoch), by_name in sorted(orders.items()):
        if len(set(by_name.values())) > 1:
            said = ", ".join(f"{n} {o}" for n, o in sorted(by_name.items()))
            yield f"loader {loader}, epoch {epoch}: ranks walked different orders: {said}"
        absent = sorted(set(ledgers) - set(by_name))
        if absent:
            yield f"loader {loader}, epoch {epoch}: {', '.join(absent)} did not end it"


def _cover(ledgers: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """The parts of all ranks cover the rows of every completed epoch exactly once."""
    parts: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    totals: dict[tuple[int, int], int] = {}
    for lines in ledgers.values():
        for line in lines:
            for loader, epoch, _, _, start, rows in line.get("r", ()):
                if rows:
                    parts[loader, epoch].append((start, start + rows))
            if line["k"] == "e" and line["complete"]:
                totals[line["l"], line["e"]] = line["rows"]
    for (loader, epoch), total in sorted(totals.items()):
        at = 0
        for start, stop in sorted(parts[loader, epoch]):
            if start > at:
                yield f"loader {loader}, epoch {epoch}: rows {at}..{start - 1} were read by no rank"
            elif start < at:
                yield f"loader {loader}, epoch {epoch}: rows {start}..{min(at, stop) - 1} were read twice"
            at = max(at, stop)
        if at != total:
            yield f"loader {loader}, epoch {epoch}: rows {at}..{total - 1} were read by no rank"
