"""The run directory: what everything outside may read of a run, while it is alive and afterwards.

``run.json``, ``plan.toml``, ``processes.json`` and ``endpoints.json`` are the launcher's; each is replaced as a whole, so a
reader never sees half a file. ``events/``, ``ledger/`` and the weights are the ranks' own; ``logs/`` holds their output.

Before anything is started a directory that cannot be written is an error. While the run is alive it is not: what cannot be
written is reported once, and training goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from paceline.launch import plan_file
from paceline.terms.errors import FileError, UsageError
from paceline.terms.plan import Plan
from paceline.train.attempts import EARLIER, earlier

Role = Literal["launcher", "coordinator", "worker", "server"]
State = Literal["starting", "running", "finished", "failed", "stopped", "lost"]
HOME = Path("runs")
KILLED = "the launcher of this run was killed; its state was never written"
_OF_AN_ATTEMPT = (
    "events",
    "ledger",
    "logs",
    "membership.journal",
    "model.safetensors",
    "plan.toml",
    "endpoints.json",
    "processes.json",
    "run.json",  # last: as long as it is there, this is not done
)


@dataclass(frozen=True, slots=True)
class ProcessEntry:
    """One living process of the run, a line of ``processes.json``.

    Attributes:
        name: ``launcher``, ``coordinator`` or ``worker-3``.
        role: What it is there for.
        rank: Of a worker that takes part; in an elastic run it may change.
        pid: Process id on `host`.
        incarnation: New for each process start, 32 hexadecimal digits.
        host: Where the pid means something.
        started: Wall clock, for people.
        ticks: When the kernel says it started: with the pid it names one process for ever.
    """

    name: str
    role: Role
    rank: int | None
    pid: int
    incarnation: str
    host: str
    started: str
    ticks: int


def start_ticks(pid: int) -> int:
    """Clock ticks since boot at which `pid` started, or 0 when there is no such process or it is a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(rest[18])


def now_text() -> str:
    """The wall clock as ISO 8601 with the zone's offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def default_name(script: str) -> str:
    """``train-20260102-030405-a1b2``."""
    stem = Path(script.partition(":")[0]).stem
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def choose_path(script: str, name: str | None, run_dir: str | None, again: bool = False) -> Path:
    """Where a new run lives: ``--run-dir`` itself, or a name below ``runs/``.

    Args:
        again: A run that has ended there is begun again.

    Raises:
        UsageError: PL105, the name is no name, or a run lives there already.
    """
    if name is not None and (not name or "/" in name or name in (".", "..") or "\0" in name):
        raise UsageError("PL105", f"--name {name!r}: a name is one part of a path", help="use --run-dir for a path.")
    path = Path(run_dir) if run_dir is not None else HOME / (name or default_name(script))
    if (path / "run.json").exists() and not again:
        help = "choose another --name or --run-dir, or remove it; `--resume auto` goes on with it."
        raise UsageError("PL105", f"{path} holds a run already", help=help)
    if again and (launcher := alive_launcher(path)):
        help = f"`paceline stop {path}` ends it."
        raise UsageError("PL105", f"the run of {path} is alive: its launcher is process {launcher}", help=help)
    return path


def alive_launcher(path: Path) -> int:
    """The process of a run's launcher, if it lives on this host; else 0."""
    try:
        entries = json.loads((path / "processes.json").read_bytes())
        for entry in entries:
            here = entry["role"] == "launcher" and entry["host"] == socket.gethostname()
            if here and start_ticks(entry["pid"]) == entry["ticks"] != 0:
                return int(entry["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0


def set_aside(path: Path) -> None:
    """What an earlier attempt at this run has left goes to ``earlier/1``, ``earlier/2`` …; its checkpoints stay."""
    if not (path / "run.json").exists():
        return
    place = path / EARLIER / str(len(earlier(path)) + 1)
    place.mkdir(parents=True)
    (path / "secret").unlink(missing_ok=True)
    for name in _OF_AN_ATTEMPT:
        if (path / name).exists():
            (path / name).rename(place / name)


def find(text: str) -> Path:
    """The directory of the run that `text` names: a path, or a name below ``runs/``. Raises UsageError PL106."""
    for path in (Path(text), HOME / text):
        if (path / "run.json").is_file():
            return path
    raise UsageError("PL106", f"no run at {text} or {HOME / text}", help=_nearby(text))


def look_into(text: str) -> Path:
    """:func:`find` for those who read a run; says so where its ``run.json`` tells of a run that is not alive any more."""
    path = find(text)
    if was_killed(path):
        print(f"note: {path}: {KILLED}", file=sys.stderr)
    return path


def was_killed(path: Path) -> bool:
    """The run's state is that of a living one, and its launcher was on this host and is gone."""
    try:
        launchers = [e for e in json.loads((path / "processes.json").read_bytes()) if e["role"] == "launcher"]
        here = any(entry["host"] == socket.gethostname() for entry in launchers)
        alive = json.loads((path / "run.json").read_bytes()).get("state") in ("starting", "running")
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return here and alive and not alive_launcher(path)


def _nearby(text: str) -> str | None:
    """The runs whose names resemble `text`."""
    import difflib

    known = sorted((p.parent for p in HOME.glob("*/run.json")), key=lambda p: p.stat().st_mtime, reverse=True)
    close = difflib.get_close_matches(text, [path.name for path in known], n=3)
    return f"did you mean {', '.join(close)}?" if close else None


def read_json(path: Path) -> Any:
    """A JSON file of a run. Raises FileError PL603 when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError("PL603", f"{path}: {error}") from error


@dataclass(eq=False)
class RunDirectory:
    """The launcher's side of one run directory.

    Attributes:
        path: Absolute path.
        complain: Told once, when something cannot be written any more.
    """

    path: Path
    complain: Callable[[str], None] = lambda text: None
    _record: dict[str, Any] = field(default_factory=dict)
    _complained: bool = False
    _explained: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(cls, path: Path, plan: Plan, record: dict[str, Any]) -> RunDirectory:
        """Make the directory with everything that is known before the start. Raises FileError PL601."""
        run = cls(path.absolute())
        try:
            set_aside(run.path)
            for name in ("events", "ledger", "logs"):
                (run.path / name).mkdir(parents=True, exist_ok=True)
            run._record = {"state": "starting", "plan": asdict(plan) | {"settings": dict(plan.settings)}, **record}
            run._replace("plan.toml", plan_file.emit(plan))
            run._replace("endpoints.json", "[]\n")
            run._replace("processes.json", "[]\n")
            run._write_record()
        except OSError as error:
            raise FileError("PL601", f"{path} cannot be written: {error.strerror or error}") from error
        return run

    def update(self, **fields: Any) -> None:
        """Change keys of ``run.json``."""
        self._record |= fields
        self._try(self._write_record)

    def processes(self, entries: Sequence[ProcessEntry]) -> None:
        """Who is alive."""
        self._try(lambda: self._replace("processes.json", _lines(asdict(entry) for entry in entries)))

    def endpoints(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Every listening socket of the run."""
        self._try(lambda: self._replace("endpoints.json", _lines(entries)))

    def secret(self, secret: bytes) -> None:
        """Keep the run's secret for ``paceline join``, readable by nobody else. Raises FileError PL601."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            (self.path / "secret").unlink(missing_ok=True)  # of a launcher that was killed
            with open(os.open(self.path / "secret", flags, 0o600), "w") as file:
                file.write(secret.hex() + "\n")
        except OSError as error:
            raise FileError("PL601", f"{self.path} cannot be written: {error.strerror or error}") from error

    def forget_secret(self) -> None:
        """The run has ended."""
        self._try(lambda: (self.path / "secret").unlink(missing_ok=True))

    def open_log(self, name: str) -> int:
        """A descriptor that appends to ``logs/NAME.log``, or -1 when it cannot be had."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(self.path / "logs" / f"{name}.log", flags, 0o644)
        except OSError as error:
            self.failed(error)
            return -1

    def explain(self, model: str, text: str, svg: str) -> None:
        """Where everything of a model is, as ``explain.txt``; the drawing of its pipeline, if there is one, as ``schedule.svg``."""
        self._explained[model] = text
        whole = "\n\n".join(f"{name}\n{told}" for name, told in self._explained.items())
        self._try(lambda: self._replace("explain.txt", whole + "\n"))
        if svg:
            self._try(lambda: self._replace("schedule.svg", svg))

    def failed(self, error: OSError) -> None:
        """A file of the run could not be written. The first time somebody hears of it."""
        if not self._complained:
            self._complained = True
            self.complain(
                f"PL601: {self.path} cannot be written any more ({error.strerror or error}); training goes on"
            )

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.failed(error)

    def _write_record(self) -> None:
        self._replace("run.json", json.dumps(self._record, indent=2, default=str) + "\n")

    def _replace(self, name: str, text: str) -> None:
        """Whole or not at all, for a reader; without fsync, because a record of a dead machine's run is not worth a stall."""
        temporary = self.path / f".{name}.tmp"
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / name)
        except OSError:
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                pass
            raise


def _lines(entries: Any) -> str:
    """A JSON list with one entry a line."""
    body = ",\n".join(f"  {json.dumps(entry, default=str)}" for entry in entries)
    return f"[\n{body}\n]\n" if body else "[]\n"
