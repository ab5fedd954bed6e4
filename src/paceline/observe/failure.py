"""Which of several failures is the cause, and how all of them are told.

When one rank fails the others fail after it: their wires break, or the launcher ends them. So the earliest failure
that is not a consequence is the cause. Whoever was only a witness is folded into one line; the cause is printed last,
where a terminal leaves the eye, with the source line, the code, the help and the command that explains more.
The records are made by :mod:`paceline.observe.record`, whose functions are offered here too.
"""

from __future__ import annotations

import os
import signal as signals
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paceline.observe.record import Record, exited, killed, record, signal_name
from paceline.observe.words import RANK, duration, ranks, verb
from paceline.terms.errors import EXPLANATIONS

__all__ = ["Record", "code", "exited", "killed", "record", "render", "signal_name"]

_WITNESS = ("PL403", "PL404")  # somebody else was lost, or the run was ended: never a cause while there is another
_ECHO = ("PL406",)  # a collective library that reports an error, as it does when a peer dies
_CHAIN_FRAMES = 1

_SIGNALS = {
    signals.SIGKILL: "most often this is the kernel's out-of-memory killer (`dmesg | grep -i oom`): use a smaller batch, "
    "fewer processes (`-n`), or fewer loader workers.",
    signals.SIGBUS: "a page of memory could not be had: shared memory (`df -h /dev/shm`) or the disk under a mapped file is full.",
    signals.SIGSEGV: "native code read memory that is not its own: an extension or a mismatch of compiled packages. The "
    "rank's output above, from `Fatal Python error` on, names the line that called it.",
    signals.SIGABRT: "native code gave up; its message stands above, in the rank's output.",
    signals.SIGILL: "the processor lacks an instruction that a compiled package needs.",
    signals.SIGTERM: "somebody asked this process to end: a scheduler, a time limit, or `kill`.",
    signals.SIGXCPU: "the limit of CPU time (`ulimit -t`, or the scheduler's) was reached.",
}

_HINTS = (
    (
        "out of memory",
        "the device or the host has too little memory: use a smaller batch, or fewer processes per device.",
    ),
    (
        "DataLoader worker (pid",
        "a loader worker died; when by bus error, shared memory (/dev/shm) is too small for its batches.",
    ),
    ("No space left on device", "a disk (or /dev/shm) is full: `df -h` shows which."),
    ("Too many open files", "raise the limit (`ulimit -n`), or use fewer loader workers."),
    (
        "in DataLoader worker process",
        "the traceback of the loader worker stands in the message: the failure is in the dataset or the collate function.",
    ),
)


def render(failures: Sequence[Record], total: int, noun: str = RANK) -> list[str]:
    """Lines for people: witnesses folded, other failures one line each, the cause last and in full.

    Args:
        failures: Records of :mod:`paceline.observe.record`, each with ``rank`` (and ``name``) added.
        total: Number of ranks of the run.
        noun: What a number is called, see ``words``.
    """
    if not failures:
        return []
    ordered = sorted(failures, key=lambda f: f.get("mono", 0.0))
    causes = [f for f in ordered if not _witness(f, ordered)] or ordered[:1]
    first, *others = _groups(causes)
    witnesses = [f for f in ordered if not any(f is member for group in (first, *others) for member in group)]
    lines = _witness_lines(witnesses, noun)
    for group in reversed(others):
        later = duration(group[0].get("mono", 0.0) - first[0].get("mono", 0.0))
        lines.append(f"{_who(group, noun)} failed {later} later: {_headline(group[0])}{_at(group[0])}")
    return lines + ([""] if lines else []) + _in_full(first, total, noun)


def code(failure: Record) -> str:
    """The stable code of a failure: Paceline's own, PL502 for a signal, PL508 for a false status 0, PL503 for everything else."""
    known = failure.get("code")
    if isinstance(known, str) and known in EXPLANATIONS:
        return known
    return "PL502" if "signal" in failure else "PL508" if failure.get("exit") == 0 else "PL503"


def _witness(failure: Record, all_failures: Sequence[Record]) -> bool:
    if failure.get("witness") or code(failure) in _WITNESS:
        return True
    # The collective library of a survivor complains, too, when its peer dies; alone, its complaint is the cause.
    return code(failure) in _ECHO and any(
        code(other) not in (*_WITNESS, *_ECHO) and not other.get("witness") for other in all_failures
    )


def _groups(failures: Sequence[Record]) -> list[list[Record]]:
    """Failures of the same type at the same place are one failure that several ranks ran into, earliest first."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for failure in failures:
        frames = failure.get("frames") or []
        place = (frames[-1]["file"], frames[-1]["line"]) if frames else failure.get("message")
        key = (failure.get("type"), failure.get("signal"), failure.get("exit"), place)
        groups.setdefault(key, []).append(failure)
    return list(groups.values())


def _witness_lines(witnesses: Sequence[Record], noun: str) -> list[str]:
    numbers = [int(f.get("rank", 0)) for f in witnesses]
    if not numbers:
        return []
    return [f"{ranks(numbers, noun)} {verb(numbers, 'was ended as a witness', 'were ended as witnesses')}"]


def _who(group: Sequence[Record], noun: str) -> str:
    return ranks([int(f.get("rank", 0)) for f in group], noun)


def _headline(failure: Record) -> str:
    """What happened, on one line."""
    if "signal" in failure:
        return f"killed by {signal_name(failure['signal'])}"
    if failure.get("exit") == 0:
        return "exited with status 0 without finishing its script"
    if "exit" in failure:
        return f"ended with exit status {failure['exit']} and without an exception"
    message = str(failure.get("message", "")).strip()
    head = message.splitlines()[0] if message else ""
    return f"{failure.get('type', 'failure')}: {head}" if head else str(failure.get("type", "failure"))


def _at(failure: Record) -> str:
    frame = _own_frame(failure)
    where = f"{_short(frame['file'])}:{frame['line']}" if frame else failure.get("where", "")
    return f" ({where})" if where else ""


def _own_frame(failure: Record) -> Record | None:
    """The innermost frame of the user, or the innermost of all."""
    frames: list[Record] = failure.get("frames") or []
    return next((f for f in reversed(frames) if f.get("user")), frames[-1] if frames else None)


def _in_full(group: Sequence[Record], total: int, noun: str) -> list[str]:
    failure = group[0]
    everybody = len(group) == total > 1
    who = f"all {noun}s" if everybody else _who(group, noun)
    lines: list[str] = []
    for link in reversed(failure.get("chain") or []):
        lines += _chain_lines(link)
    lines.append(f"error[{code(failure)}] on {who}: {_headline(failure)}")
    lines += [f"  {line}" for line in str(failure.get("message", "")).strip().splitlines()[1:]]
    lines += _stack(failure.get("frames") or [])
    if failure.get("hidden"):
        lines.append(f"  ({failure['hidden']} frames are not shown)")
    lines += [f"  last seen: {seen}" for seen in [_last_seen(failure)] if seen]
    lines += [f"  note: {line}" for note in failure.get("notes") or [] for line in str(note).splitlines()]
    return [*lines, f"  help: {_help(failure)}", f"  more: paceline explain {code(failure)}"]


def _chain_lines(link: Record) -> list[str]:
    """One exception of the chain, and how it led to the next one below it."""
    leads = {"cause": "which caused:", "member": "which is one member of:"}.get(
        str(link.get("relation")), "and while that was handled:"
    )
    return [_headline(link), *_stack((link.get("frames") or [])[-_CHAIN_FRAMES:]), leads]


def _stack(frames: Sequence[Record]) -> list[str]:
    lines: list[str] = []
    for frame in frames:
        inside = "" if frame.get("function") in (None, "<module>") else f" in {frame['function']}"
        lines.append(f"  {_short(frame['file'])}:{frame['line']}{inside}")
        if frame.get("text"):
            lines.append(f"      {frame['text']}")
            if frame.get("caret"):
                first, last = frame["caret"]
                lines.append(" " * (6 + first) + "^" * (last - first))
    return lines


def _last_seen(failure: Record) -> str:
    if "step" not in failure:
        return ""
    parts = [f"step {failure['step']}", failure.get("phase"), failure.get("what"), failure.get("where")]
    return " · ".join(str(p) for p in parts if p)


def _help(failure: Record) -> str:
    if failure.get("help"):
        return str(failure["help"])
    if "signal" in failure:
        return _SIGNALS.get(failure["signal"], EXPLANATIONS["PL502"].help)
    if failure.get("exit", 0) != 0:
        return "something called `os._exit`, or a library ended the process; its last words stand above."
    message = str(failure.get("message", ""))
    return next((help for part, help in _HINTS if part.lower() in message.lower()), EXPLANATIONS[code(failure)].help)


def _short(file: str) -> str:
    """A path as the user would type it: relative where that is shorter."""
    try:
        relative = os.path.relpath(file, Path.cwd())
    except (OSError, ValueError):
        return file
    return relative if len(relative) < len(file) and not relative.startswith("..") else file
