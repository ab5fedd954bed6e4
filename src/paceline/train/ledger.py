"""The ledger: which rows every committed step was made of, append-only, one small line a step and rank.

Each rank writes ``ledger/<name>.jsonl``. Lines, by their ``k``:

* ``c`` commit: ``{"k":"c","s":step,"r":[[loader,epoch,start,rows,local_start,local_rows],...]}``: the step's global batches
  (rows ``start .. start+rows`` of the loader's order in that epoch) and this rank's part of each;
* ``v`` viewed: the same ranges for batches that no gradient was taken of (evaluation);
* ``e`` end of an epoch of a loader: rows, batches, whether it was walked to its end, a fingerprint of the order;
* ``x`` end of the run: steps applied, ranges that were trained on but belong to no step (an accumulation left open);
* ``g`` group: the members from step ``s`` + 1 on, in an elastic run; its epoch is never used twice;
* ``r`` resumed: the run goes on from a checkpoint of step ``s``, in which these ranges of open passes had been trained on.

``proof`` reads it. Imports no torch, so that the command line stays quick.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

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

    def commit(self, step: int, ranges: Sequence[Range], skipped: bool = False) -> None:
        """Step `step` was applied (or left out, because its gradient was not finite); it consumed these batches."""
        self._write(_commit(step, ranges, skipped))

    def commit_round(self, steps: Sequence[tuple[int, Sequence[Range], bool]]) -> None:
        """All steps of a round, written at once: a process that is killed has written all of them or none."""
        self._write("".join(_commit(*step) for step in steps))

    def group(self, epoch: int, step: int, members: Sequence[str], rank: int) -> None:
        """From step `step` + 1 on this rank is one of these members."""
        line = {"k": "g", "g": epoch, "s": step, "members": list(members), "rank": rank}
        self._write(json.dumps(line, separators=(",", ":")) + "\n")

    def resumed(self, step: int, done: Sequence[Range]) -> None:
        """The run goes on from a checkpoint of `step`, in which these rows of open passes had been trained on."""
        self._write('{"k":"r","s":%d,"r":%s}\n' % (step, _compact(done)))

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


def _commit(step: int, ranges: Sequence[Range], skipped: bool) -> str:
    return '{"k":"c","s":%d,"r":%s%s}\n' % (step, _compact(ranges), ',"skip":1' if skipped else "")


def _compact(ranges: Sequence[Range]) -> str:
    return "[" + ",".join("[%d,%d,%d,%d,%d,%d]" % r for r in ranges) + "]"
