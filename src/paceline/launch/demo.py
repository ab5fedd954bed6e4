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

from paceline.terms.errors import FileError

REFUSED = 2
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
        return REFUSED
    demo = Demo(args.dir, args.processes, args.quick, as_json=args.format == "json")
    return demo.run()


def _processes() -> int:
    """One a core, at least two: one process would show nothing."""
    return max(2, min(4, len(os.sched_getaffinity(0))))


@dataclass(frozen=True, slots=True)
class Demo:
    """The examples in their directory.

    Attributes:
        directory: Where they are written and run.
        processes: How many.
        quick: A few steps only.
        as_json: Nothing on standard output but the lines of the runs.
    """

    directory: Path
    processes: int
    quick: bool
    as_json: bool

    def run(self) -> int:
        """Returns the exit code of the first example that fails, or 0."""
        self._write_all()
        for number, example in enumerate(EXAMPLES, start=1):
            self._say(f"\n{number}/{len(EXAMPLES)}  {example.says}")
            code = self._run(example)
            if code:
                return code
        self._say_what_is_next()
        return 0

    def _write_all(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for example in EXAMPLES:
                self._say(self._write(example.file))
        except OSError as error:
            raise FileError(
                "PL601", f"{error.filename}: {error.strerror}", help="choose another place with --dir."
            ) from error

    def _write(self, file: str) -> str:
        """Copy a template, unless a file is there already; says which."""
        template = resources.files("paceline.launch") / "templates" / file
        target, text = self.directory / file, template.read_text("utf-8")
        if not target.exists():
            target.write_text(text, "utf-8")
            return f"wrote {target}"
        if target.read_text("utf-8") == text:
            return f"{target} is there already"
        return (
            f"{target} is not the example any more: it stays, and is run as it is (delete it to get the example back)"
        )

    def _run(self, example: Example) -> int:
        """``paceline run`` in the examples' directory, on this terminal."""
        arguments = ["run", example.file, "-n", str(self.processes)]
        if self.as_json:
            arguments += ["--format", "json"]
        if self.quick:
            arguments += ["--", *example.quick]
        self._say(f"$ cd {shlex.quote(str(self.directory))} && paceline {shlex.join(arguments)}")
        return subprocess.call([sys.executable, "-m", "paceline", *arguments], cwd=self.directory)

    def _say_what_is_next(self) -> None:
        runs, directory = self.directory / "runs", shlex.quote(str(self.directory))
        self._say(f"""
Everything about these runs is in {runs}/: the plan, the events, the rows that each rank trained on, the weights.
To try next, in {directory}/:
  less train.py                                               the four lines that it took, numbered
  python train.py                                             the same program on one process: the same curve
  paceline run train.py -n {self.processes} --strategy 'ddp(codec=bf16)'     half the bytes
  paceline verify ledger runs/NAME                            every row of every epoch exactly once""")

    def _say(self, text: str) -> None:
        if not self.as_json:
            print(text, flush=True)
