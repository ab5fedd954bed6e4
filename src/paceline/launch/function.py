"""``paceline.launch(fn, n=4, …)``: one function on several fresh processes, for notebooks, tests and programs.

Nothing is pickled. The function is described by where it can be found (``notebook`` takes it along as source where there is
no such place), arguments and results are JSON. The launcher is the one of ``paceline run``, with a quiet view and without a
run directory.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FunctionType
from typing import Any

from paceline.launch import callee
from paceline.launch.ending import cause
from paceline.launch.local import Launcher, Order, Outcome
from paceline.launch.rundir import RunDirectory
from paceline.launch.servers import strategy_servers
from paceline.launch.tuning import Machine, allow_files, check_processes, choose
from paceline.observe import failure
from paceline.observe.output import Folder, Line
from paceline.terms.activity import Snapshot
from paceline.terms.errors import PacelineError, UsageError
from paceline.terms.plan import Plan


def launch_function(
    fn: Callable[..., Any],
    processes: Sequence[Any],
    n: int | None,
    *,
    strategy: str = "ddp()",
    arguments: Mapping[str, Any],
) -> list[Any]:
    """Run ``fn(**arguments)`` on `n` processes; see :func:`paceline.launch`."""
    from paceline.exchange.strategy import check, threads

    if callee.importing:
        raise UsageError(
            "PL108",
            "paceline.launch was called while a rank imported the script",
            help='put the call under `if __name__ == "__main__":`.',
        )
    n = _count(fn, processes, n)
    check_processes(n)
    described = describe(fn, arguments)
    servers = strategy_servers(check(strategy))
    settings = choose(Machine.here(), n, os.environ, threads=threads(strategy), servers=servers)
    plan = Plan(
        script=f"{fn.__module__}:{fn.__qualname__}",
        processes=n,
        strategy=check(strategy),
        threads=settings.threads,
        settings=settings.given,
        workers_min=n if servers else 0,
        workers_max=n if servers else 0,
    )
    allow_files(n)
    view = _Quiet(n)
    catch = [signal.SIGINT] if threading.current_thread() is threading.main_thread() else []
    with ExitStack() as stack:
        run = None
        if servers:  # their logs lie somewhere, for what is said when one dies
            home = stack.enter_context(tempfile.TemporaryDirectory(prefix="paceline-"))
            run = RunDirectory.create(Path(home) / "run", plan, {})
        outcome = Launcher(Order(plan, True, described), view, run, catch).execute()
    view.close()
    return _results(outcome, n)


def _count(fn: Callable[..., Any], processes: Sequence[Any], n: int | None) -> int:
    """How many. Raises UsageError PL108 where it is not said, or an argument of `fn` has no name."""
    given = (*processes, *([] if n is None else [n]))
    if len(given) == 1 and isinstance(given[0], int):
        return given[0]
    try:
        names = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        names = []
    first = next((value for value in processes if len(given) > 1 or not isinstance(value, int)), None)
    name = getattr(fn, "__name__", "fn")
    shown = f"{names[0] if names else 'x'}={first!r}" if first is not None else "..."
    help = f"paceline.launch({name}, n={n or 4}, {shown})"
    if first is None:
        raise UsageError("PL108", f"paceline.launch({name}) was not told how many processes", help=help)
    raise UsageError(
        "PL108", f"paceline.launch: {first!r} has no name; arguments of {name} are given by name", help=help
    )


def _results(outcome: Outcome, n: int) -> list[Any]:
    if outcome.asked:
        raise KeyboardInterrupt
    if outcome.mistake is not None:
        lines = (outcome.mistake.message, *outcome.mistake.lines)
        raise PacelineError(outcome.mistake.code, "\n  ".join(lines))
    first = cause(outcome.failures)
    if first is not None:
        told = "\n".join(_cause_in_full(failure.render(outcome.failures, n)))
        raise PacelineError(failure.code(first), told.partition("] on ")[2], help=first.get("help"))
    return [outcome.results[number] for number in sorted(outcome.results)]  # who replaces a worker has a higher one


def _cause_in_full(lines: Sequence[str]) -> list[str]:
    """From the line of the cause on, without the help that the error shows itself."""
    start = next((i for i, line in enumerate(lines) if line.startswith("error[")), 0)
    return [line for line in lines[start:] if not line.startswith(("  help:", "  more:"))]


class _Quiet:
    """Shows what the ranks print, and nothing else."""

    def __init__(self, size: int) -> None:
        self._folder = Folder(size)

    def workers(self, count: int, noun: str) -> None:
        """Does not change: such a run is not elastic."""

    def output(self, rank: int, line: str, stream: str) -> None:
        self._folder.feed(rank, line, stream, time.monotonic())

    def say(self, lines: Sequence[str]) -> None:
        print("\n".join(lines), file=sys.stderr)

    def report(self, rank: int, report: Mapping[str, Any]) -> None:
        if report["kind"] == "notice" and report.get("message"):
            print(f"rank {rank}: {report['message']}", file=sys.stderr)

    def beat(self, snapshots: Sequence[Snapshot], now: float) -> None:
        self._show(self._folder.due(now))

    def close(self) -> None:
        self._show(self._folder.flush())

    def _show(self, lines: Sequence[Line]) -> None:
        for line in lines:
            text = f"{line.label} {line.text}" if line.label else line.text
            print(text, file=sys.stderr if line.err else sys.stdout)


# ---- where the function is ------------------------------------------------------------------------------------------
def describe(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank needs to find the function and call it.

    Raises:
        UsageError: PL108, it cannot be found again, or an argument is no JSON value.
    """
    try:
        plain = json.loads(json.dumps(dict(arguments)))
    except (TypeError, ValueError) as error:
        raise UsageError("PL108", f"an argument of {_name(fn)} is no JSON value: {error}") from error
    if not isinstance(fn, FunctionType) or "<" in fn.__qualname__:
        raise UsageError("PL108", f"{_name(fn)} is not a function at the top level of a module")
    return {
        **_where(fn),
        "qualname": fn.__qualname__,
        "arguments": plain,
        "sys_path": [p for p in sys.path if isinstance(p, str)],
    }


def _where(fn: FunctionType) -> dict[str, Any]:
    if fn.__module__ not in ("__main__", callee.MAIN):
        return {"module": _importable(fn, fn.__module__)}
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:  # python -m package.module
        return {"module": main.__spec__.name}  # type: ignore[union-attr]
    file = getattr(main, "__file__", None)
    if file and Path(file).is_file() and not hasattr(main, "get_ipython"):
        return {"path": str(Path(file).absolute())}
    from paceline.launch.notebook import source_of

    return {"source": source_of(fn)}


def _importable(fn: FunctionType, module: str) -> str:
    """The module's name, if the function is what one finds there."""
    found: Any = importlib.import_module(module) if module in sys.modules else None
    for name in fn.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not fn:
        raise UsageError("PL108", f"{module}:{fn.__qualname__} is another object than the function given")
    return module


def _name(fn: object) -> str:
    module, name = getattr(fn, "__module__", "?"), getattr(fn, "__qualname__", type(fn).__name__)
    return f"{module}:{name}"
