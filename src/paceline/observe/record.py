"""What ended a rank, as a record that can be written to a file, read in another process, and shown to a person.

1. In the rank: :func:`record` takes an exception apart while its frames are alive.
2. In the launcher: :func:`killed` and :func:`exited` make records of ranks that could not speak any more.
3. In the launcher: :func:`paceline.observe.failure.render` finds the cause among all records and shows it last.

The first two are here. Frames of Paceline, torch and the standard library are left out, and counted, as long as one frame of somebody else
remains; a reader wants the own line, and the exception says the rest.
"""

from __future__ import annotations

import linecache
import signal as signals
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from paceline.observe.source import Source
from paceline.observe.words import place
from paceline.terms.activity import Snapshot
from paceline.terms.errors import PacelineError

Record = dict[str, Any]

_FRAMES = 24  # frames kept of a stack: half of them its outermost, half its innermost
_CHAIN = 4  # causes followed
_MEMBERS = 3  # exceptions shown of an exception group
_DEEP = 500  # frames from which a stack is cut before its lines are looked up
_MESSAGE = 8000  # characters of a message


def record(exc: BaseException, script: Path | None) -> Record:
    """An exception as JSON.

    Keys: ``type``, ``message``, ``code`` and ``help`` (None unless Paceline raised it), ``mono``, ``frames`` (outermost
    first, each with ``file``, ``line``, ``function``, ``text``, ``caret`` and ``user``), ``hidden`` (frames left out),
    ``notes``, and ``chain``: what it was raised from, nearest first, each with ``relation`` and the same keys.
    """
    source = Source(script)
    return {"mono": time.monotonic(), **_one(exc, source), "chain": _chain(exc, source)}


def killed(signal: int, mono: float, snapshot: Snapshot | None = None, *, witness: bool = False) -> Record:
    """A rank that a signal ended. ``witness`` says that the launcher sent it, after the cause was known."""
    return {"signal": signal, "mono": mono, "witness": witness, **_last_seen(snapshot)}


def exited(status: int, mono: float, snapshot: Snapshot | None = None, *, witness: bool = False) -> Record:
    """A rank that left no exception and did not finish: `os._exit`, or a library that ends the process. Status 0 says nothing."""
    return {"exit": status, "mono": mono, "witness": witness, **_last_seen(snapshot)}


def signal_name(number: int) -> str:
    """``SIGKILL``, or ``signal 64`` for one without a name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_seen(snapshot: Snapshot | None) -> Record:
    if snapshot is None:
        return {}
    return {
        "step": snapshot.step,
        "where": place(snapshot),
        "what": snapshot.what,
        "phase": snapshot.phase.name.lower(),
    }


def _one(exc: BaseException, source: Source) -> Record:
    """One exception, without what it was raised from."""
    ours = exc if isinstance(exc, PacelineError) else None
    frames, hidden = _frames(exc, source)
    return {
        "type": _type_name(type(exc)),
        "message": ours.message if ours is not None else _message(exc),
        "code": ours.code if ours is not None else None,
        "help": ours.help if ours is not None else None,
        "frames": frames,
        "hidden": hidden,
        "notes": [str(note) for note in getattr(exc, "__notes__", ())],
    }


def _type_name(kind: type[BaseException]) -> str:
    plain = kind.__module__ in ("builtins", "__main__") or issubclass(kind, PacelineError)
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"


def _message(exc: BaseException) -> str:
    try:
        text = str(exc)
    except Exception as failure:
        return f"<its message raised {type(failure).__name__}>"
    return text if len(text) <= _MESSAGE else text[: _MESSAGE // 2] + "\n...\n" + text[-_MESSAGE // 2 :]


def _chain(exc: BaseException, source: Source) -> list[Record]:
    """What `exc` was raised from, nearest first, then the members of a group."""
    found: list[Record] = []
    seen, current = {id(exc)}, exc
    while len(found) < _CHAIN:
        relation = "cause" if current.__cause__ is not None else "context"
        before = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
        if before is None or id(before) in seen:
            break
        seen.add(id(before))
        found.append({"relation": relation, **_one(before, source)})
        current = before
    if isinstance(exc, BaseExceptionGroup):
        found += [{"relation": "member", **_one(e, source)} for e in exc.exceptions[:_MEMBERS]]
    return found


def _frames(exc: BaseException, source: Source) -> tuple[list[Record], int]:
    """The frames that a reader wants, and the number of those left out."""
    depth = sum(1 for _ in traceback.walk_tb(exc.__traceback__))
    stack = [_frame(summary, source) for summary in _walk(exc.__traceback__, depth)]
    kept = [f for f in stack if not source.machinery(f["file"])] or stack
    if len(kept) > _FRAMES:
        kept = kept[: _FRAMES // 2] + kept[-_FRAMES // 2 :]
    place = [_syntax_place(exc)] if isinstance(exc, SyntaxError) and exc.filename else []
    return kept + place, depth - len(kept)


def _walk(tb: TracebackType | None, depth: int) -> list[traceback.FrameSummary]:
    """The stack with its source lines; of a runaway recursion only the two ends are looked up."""
    if depth < _DEEP:
        return list(traceback.extract_tb(tb))
    return [*traceback.extract_tb(tb, _FRAMES), *traceback.extract_tb(tb, -_FRAMES)]


def _frame(summary: traceback.FrameSummary, source: Source) -> Record:
    return {
        "file": summary.filename,
        "line": summary.lineno or 0,
        "function": summary.name,
        "text": summary.line or "",
        "caret": _caret(summary),
        "user": source.mine(summary.filename),
    }


def _caret(summary: traceback.FrameSummary) -> list[int] | None:
    """First and last column of what failed, within the stripped source line; None when it is all of the line."""
    start, end = summary.colno, summary.end_colno
    line = linecache.getline(summary.filename, summary.lineno or 0).rstrip()
    if start is None or end is None or summary.end_lineno != summary.lineno or not line:
        return None
    # Columns are counted in bytes of UTF-8.
    raw = line.encode("utf-8", "replace")
    indent = len(line) - len(line.lstrip())
    first, last = (len(raw[:column].decode("utf-8", "replace")) - indent for column in (start, end))
    return [first, last] if 0 <= first < last and last - first < len(line) - indent else None


def _syntax_place(exc: SyntaxError) -> Record:
    """The place that a SyntaxError speaks of; it is not in its traceback."""
    text = exc.text or ""
    first = (exc.offset or 0) - 1 - (len(text) - len(text.lstrip()))
    last = first + max(1, (exc.end_offset or 0) - (exc.offset or 0))
    caret = [first, last] if first >= 0 and exc.lineno == (exc.end_lineno or exc.lineno) else None
    return {
        "file": exc.filename,
        "line": exc.lineno or 0,
        "function": "<module>",
        "text": text.strip(),
        "caret": caret,
        "user": True,
    }
