"""A thread that says, four times a second, which line of the user's script the main thread is in.

It beats from inside the process, so a beat that is late is information too: the process is stopped, or in C code that
holds the interpreter. The same thread writes the events, so that no file is written, and no device waited for, in the
training loop.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from paceline.observe.source import Source
from paceline.observe.words import COMPILING
from paceline.terms.activity import Activity

# Where torch compiles. Importing these modules is not compiling, nor is what runs in others of theirs: every optimizer does.
_COMPILERS = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx")


class Heartbeat:
    """Beats between :meth:`start` and :meth:`stop`.

    Args:
        activity: The rank's page of the board.
        script: The user's script, or None when a function was launched.
        flush: Called after each beat; writes the events. What it raises ends nothing: the next beat tries again.
        interval: Seconds between beats.
    """

    def __init__(
        self, activity: Activity, script: Path | None, flush: Callable[[], None], *, interval: float = 0.25
    ) -> None:
        self._activity = activity
        self._flush = flush
        self._interval = interval
        self._lines = Lines(script)
        self.last_failure: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paceline-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 2.0) -> None:
        """End the thread and wait for it, but not for ever: a flush may hang on a device that has failed."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def beat(self) -> None:
        """One beat, now."""
        seen = time.monotonic_ns()
        self._activity.beat(self._lines.now(threading.main_thread()), seen)

    def _run(self) -> None:
        while not self._over.is_set():
            self.beat()
            try:
                self._flush()
            except Exception as failure:  # the sink keeps its own record; a heart must not stop for a full disk
                self.last_failure = failure
            self._over.wait(self._interval)


class Lines:
    """Finds the line of the user's script that a thread is in."""

    def __init__(self, script: Path | None) -> None:
        self._source = Source(script)

    def now(self, thread: threading.Thread) -> str:
        """``train.py:31 in train``: the deepest frame in the user's code, or nothing when there is none."""
        frame = sys._current_frames().get(thread.ident or 0)
        compiling = False
        while frame is not None:
            if self._source.mine(frame.f_code.co_filename):
                return self._line(frame) + (f" ({COMPILING})" if compiling else "")
            compiling = compiling or (
                "compile" in frame.f_code.co_name and frame.f_globals.get("__name__") in _COMPILERS
            )
            frame = frame.f_back
        return ""

    def _line(self, frame: FrameType) -> str:
        code = frame.f_code
        name = Path(code.co_filename).name
        return f"{name}:{frame.f_lineno}" + ("" if code.co_name == "<module>" else f" in {code.co_name}")
