"""The bootstrap of a rank: what ``python -m paceline.launch.worker`` does around the user's script.

1. Take the place out of the environment, so that no child of this process takes it for its own.
2. Tie this process and its children to the life of the launcher.
3. Begin the session: the board, the heartbeat, the events.
4. Run the script as ``python script.py`` would: same ``sys.argv``, same ``sys.path``, a ``__main__`` of its own.
5. End the job, say how it went, exit with the script's status.

torch is imported by the script, or for the seed; never here by itself.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from paceline.launch import session as sessions
from paceline.launch.env import VARIABLE, Handoff
from paceline.launch.later import import_compiler_later
from paceline.launch.session import LaunchedSession
from paceline.terms.activity import Phase
from paceline.terms.errors import Stopped, UsageError
from paceline.terms.event import Event
from paceline.terms.plan import Plan

_PR_SET_PDEATHSIG = 1
_STOPPED = 130  # of a script that was interrupted because the run was asked to stop


def main() -> NoReturn:
    """Be a rank."""
    handoff = Handoff.decode(os.environ.pop(VARIABLE, ""))
    tie_to_launcher(handoff)
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    import_compiler_later()
    session = sessions.begin(handoff)
    sys.exit(Rank(handoff, session).run())


def tie_to_launcher(handoff: Handoff) -> None:
    """See to it that this process and its children do not outlive the launcher, even one that is killed.

    The kernel does it: when the launcher's end of the life line closes, everybody in this process group gets SIGKILL
    (``F_SETSIG``); no thread, and no interpreter that may be busy, is needed. The death signal of the parent is the
    rope for kernels that do not know the first; both together would be none for this process's children: the launcher has threads, the
    signal comes when the first of them is gone, and a rank that dies of it is no reader any more when the pipe closes. A launcher that died before they were tied shows as a closed pipe.
    """
    life = handoff.life_fd
    for fd in (life, handoff.report_fd, handoff.place.board_fd, handoff.place.arena_fd, handoff.place.secret_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)
    try:
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    poll = select.poll()
    poll.register(life, 0)
    if poll.poll(0) or os.getppid() != handoff.launcher_pid:
        os.killpg(0, signal.SIGKILL)


class Rank:
    """Runs what this rank is for, and says how it ended.

    Args:
        handoff: What the launcher left.
        session: Begun.
    """

    def __init__(self, handoff: Handoff, session: LaunchedSession) -> None:
        self._function = _read_function(handoff.function_fd)
        self._session = session
        self._plan = session.place.plan
        self._script = None if self._function else Path(self._plan.script).absolute()

    def run(self) -> int:
        """Returns the exit status of this process."""
        try:
            status = self._attempt()
        finally:
            self._session.close()
        return status

    def _attempt(self) -> int:
        """The board says FINISHED before the wire is closed: who misses this rank then knows why."""
        session = self._session
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see ``child.spawn``
            self._work()
            session.activity.enter(Phase.FINISHED)
            session.finish()
        except Stopped as stopped:
            session.activity.enter(Phase.FINISHED)
            session.finish(stopped)
            return 0
        except SystemExit as error:
            return self._left(error)
        except KeyboardInterrupt as error:
            return self._interrupted(error)
        except BaseException as error:
            return self._failed(error)
        return self._ended_well()

    def _ended_well(self) -> int:
        """Several processes that share nothing are a mistake, and were the slowest way to run the script once."""
        size = self._session.place.size
        if size == 1 or self._function or self._session.adopted:
            return 0
        message = f"the script ended without job.adopt: each of {size} processes ran all of it"
        return self._failed(UsageError("PL102", message))

    def _work(self) -> None:
        if self._plan.seed is not None:
            seed(self._plan.seed)
        if self._function:
            from paceline.launch.callee import call

            self._session.activity.enter(Phase.COMPUTE)
            self._session.result(call(self._function))
            return
        assert self._script is not None
        self._session.begin_building()
        try:
            run_script(self._plan, self._script)
        except SystemExit as error:
            if error.code not in (None, 0):
                raise

    def _left(self, error: SystemExit) -> int:
        """``sys.exit`` with something that means failure; the status is the one that Python would make of it."""
        if not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        self._failed(error)
        return (error.code & 0xFF) or 1 if isinstance(error.code, int) else 1

    def _interrupted(self, error: KeyboardInterrupt) -> int:
        if not self._session.board.stop_requested:
            return self._failed(error)
        self._session.finish(error)
        return _STOPPED

    def _failed(self, error: BaseException) -> int:
        """The record goes out before anything else: what is done afterwards may take long, or fail."""
        from paceline.observe.failure import record

        session = self._session
        session.activity.enter(Phase.FAILED)
        fault = record(error, self._script)
        session.report("fault", **fault)
        session.sink(Event("fault", 0, fault))
        session.finish(error)
        return 1


def _read_function(fd: int) -> dict[str, Any]:
    """What ``paceline.launch`` wants called, or nothing. The descriptor's position is shared by all ranks, so it is not used."""
    if fd < 0:
        return {}
    found: dict[str, Any] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    os.close(fd)
    return found


def run_script(plan: Plan, script: Path) -> None:
    """Execute the file as ``python FILE ARGUMENTS`` would.

    ``__main__`` becomes a module of its own, with a ``__file__`` and no ``__spec__``: so its classes can be pickled, and a
    loader worker that is spawned finds the file again.
    """
    sys.argv = [plan.script, *plan.script_args]
    if not sys.flags.safe_path:
        sys.path[0] = str(script.parent)
    module = ModuleType("__main__")
    module.__dict__.update(__file__=str(script), __builtins__=__builtins__, __cached__=None)
    module.__loader__ = SourceFileLoader("__main__", str(script))
    bootstrap, sys.modules["__main__"] = sys.modules["__main__"], module
    code = compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
    exec(code, module.__dict__)
    del bootstrap  # its functions are on the stack until here


def seed(number: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    import random

    import torch

    random.seed(number)
    torch.manual_seed(number)
    try:
        import numpy
    except ImportError:
        return
    set_seed: Callable[[int], None] = numpy.random.seed
    set_seed(number % 2**32)


if __name__ == "__main__":
    main()
