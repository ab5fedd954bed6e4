"""A run that was begun again: what earlier attempts have left, and their ledgers as one.

    <run>/earlier/1, 2, …     ledger, events, logs and records of the attempts before the present one; its checkpoints are shared

An attempt that was resumed from step s says so in its ledger (line ``r``). Of the attempt before only what had been done by then
counts: the rest was done again. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EARLIER = "earlier"
_APART = 1 << 62  # between the group numbers of two attempts: each counts its own

Lines = dict[str, list[dict[str, Any]]]
"""The lines of a ledger by process."""


def earlier(run_dir: Path) -> list[Path]:
    """What the attempts before the present one have left, oldest first."""
    found = [path for path in (run_dir / EARLIER).glob("*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def joined(attempts: Sequence[Lines]) -> Lines:
    """One ledger of all attempts, oldest first; a process of an earlier one is ``worker-0 of attempt 1``."""
    kept: Lines = {}
    for number, lines in enumerate(attempts, 1):
        start = _start(lines)
        kept = {} if start is None else _until(kept, start, lines)
        if number == len(attempts) and not kept:
            return lines
        before = number - len(attempts)
        for name, own in _in_groups(lines, start or 0).items():
            kept[_named(name, number, before)] = [_moved(line, number, before, goes_on=bool(kept)) for line in own]
    return kept


def _start(lines: Lines) -> int | None:
    """The step that an attempt was resumed from; None when it began afresh."""
    return next((int(line["s"]) for own in lines.values() for line in own if line["k"] == "r"), None)


def _until(kept: Lines, step: int, later: Lines) -> Lines:
    """What had been done by the time that `step` was, and evaluations after it that were not done again."""
    again = {place for own in later.values() for line in own if line["k"] in "ve" for place in _places(line)}
    return {name: list(_until_commit(own, step, again)) for name, own in kept.items()}


def _until_commit(own: list[dict[str, Any]], step: int, again: set[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for line in own:
        if line["k"] == "c" and line["s"] > step:
            return
        if line["k"] in "cgr" or (line["k"] in "ve" and not again.intersection(_places(line))):
            yield line


def _places(line: dict[str, Any]) -> list[tuple[int, int]]:
    """Loader and epoch of each pass that a line speaks of."""
    return [(line["l"], line["e"])] if line["k"] == "e" else [(r[0], r[1]) for r in line["r"]]


def _in_groups(lines: Lines, start: int) -> Lines:
    """An attempt of ranks that stay is a group as well: its members need not have done what the others' have."""
    if any(line["k"] == "g" for own in lines.values() for line in own):
        return lines
    group = {"k": "g", "g": 0, "s": start, "members": sorted(lines)}
    return {name: [group, *own] for name, own in lines.items()}


def _moved(line: dict[str, Any], number: int, before: int, *, goes_on: bool) -> dict[str, Any]:
    """Names that tell attempts apart, numbers of groups that rise, and nothing from elsewhere that stands in this run's ledger."""
    if line["k"] == "g":
        members = [_named(name, number, before) for name in line["members"]]
        return line | {"g": line["g"] + before * _APART, "members": members}
    return line | {"r": [], "here": True} if line["k"] == "r" and goes_on else line


def _named(name: str, number: int, before: int) -> str:
    return f"{name} of attempt {number}" if before else name
