"""``paceline demo``: two complete examples, written where they can be read and changed, then run on several processes.

1. ``demo/train.py`` reads handwritten digits, ``demo/lm.py`` learns to write Python.
2. Each is run by the ordinary ``paceline run``; there is nothing that the demo can do and a user cannot.
3. The last lines say where the files are and what to try next.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

NEEDS = {"sklearn": "scikit-learn"}  # what the examples import besides torch: module, and package


@dataclass(frozen=True, slots=True)
class Example:
    """One template and how it is run.

    Attributes:
        file: Name of the template, and of its copy.
        says: What happens, in a line.
        quick: The script's arguments under ``--quick``.
    """

    file: str
    says: str
    quick: tuple[str, ...]


EXAMPLES = (
    Example("train.py", "a small network learns to read handwritten digits", ("--epochs", "2")),
    Example("lm.py", "a small GPT learns to write Python", ("--steps", "20", "--sample", "60")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``paceline demo``."""
    parser.add_argument("-n", "--processes", type=int, default=_processes(), help="processes (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where the examples go (default: %(default)s/)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each only")


def main(args: argparse.Namespace) -> int:
    """Write the examples, run them, say what is next. Returns the exit code of the first example that fails, or 0."""
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"paceline demo: the examples need {', '.join(missing)}", file=sys.stderr)
        print("  help: pip install 'paceline[examples]'", file=sys.stderr)
        return 2
    directory: Path = args.dir
    directory.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(EXAMPLES, start=1):
        _say(f"{number}/{len(EXAMPLES)}  {example.says}")
        _say(f"     {_write(example.file, directory)}")
        code = _run(example, directory, args.processes, args.quick)
        if code:
            return code
    _say_what_is_next(directory, args.processes)
    return 0


def _processes() -> int:
    """One a core, at least two: one process would show nothing."""
    return max(2, min(4, len(os.sched_getaffinity(0))))


def _write(file: str, directory: Path) -> str:
    """Copy a template there, unless a file is there already; says which."""
    template = resources.files("paceline.launch") / "templates" / file
    target, text = directory / file, template.read_text("utf-8")
    if not target.exists():
        target.write_text(text, "utf-8")
        return f"wrote {target}"
    if target.read_text("utf-8") == text:
        return f"{target} is there already"
    return f"{target} was changed by you: it stays, and your version is run (delete it to get the example back)"


def _run(example: Example, directory: Path, processes: int, quick: bool) -> int:
    """``paceline run`` in the examples' directory, on this terminal."""
    script = ["--", *example.quick] if quick else []
    arguments = ["run", example.file, "-n", str(processes), *script]
    _say(f"     $ cd {shlex.quote(str(directory))} && paceline {shlex.join(arguments)}")
    return subprocess.call([sys.executable, "-m", "paceline.launch.cli", *arguments], cwd=directory)


def _say_what_is_next(directory: Path, processes: int) -> None:
    _say("")
    _say(
        f"Everything about these runs is in {directory / 'runs'}/: plan, events, the rows each rank trained on, the weights."
    )
    _say("To try next:")
    _say(f"  cd {shlex.quote(str(directory))}")
    _say("  python train.py                                      the same program on one process: the same curve")
    _say(f"  paceline run train.py -n {processes} --strategy 'ddp(codec=bf16)'  half the bytes")
    _say("  less train.py                                        the four lines that it took, numbered")


def _say(line: str) -> None:
    print(line, flush=True)
