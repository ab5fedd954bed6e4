"""``paceline.launch(fn, n)``: fresh processes, JSON in, JSON out, the earliest cause as the error."""

from __future__ import annotations

import importlib
import inspect
import linecache
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import paceline
from paceline.launch.function import describe
from paceline.launch.notebook import source_of
from paceline.terms.errors import PacelineError, UsageError
from support.cli import run_python, show


def here(**extra: Any) -> dict[str, Any]:
    from paceline.launch.session import current

    place = current().place
    return {"rank": place.rank, "size": place.size, "strategy": place.plan.strategy, "run_dir": place.run_dir, **extra}


def fail_on(rank: int) -> None:
    from paceline.launch.session import current

    if current().place.rank == rank:
        raise RuntimeError(f"number {rank} does not want to")
    signal.pause()


def returns_a_set() -> set[int]:
    return {1}


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupts_its_caller() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()


def says(text: str) -> None:
    print(text)


class Shelf:
    @staticmethod
    def double(x: int) -> int:
        return 2 * x


@pytest.mark.smoke
def test_results_come_by_rank_and_arguments_go_as_json() -> None:
    results = paceline.launch(here, 2, strategy="ddp( )", extra=[1, {"a": None}])
    assert results == [
        {"rank": r, "size": 2, "strategy": "ddp()", "run_dir": None, "extra": [1, {"a": None}]} for r in range(2)
    ]


def test_long_arguments_and_results() -> None:
    """Longer than an environment variable and than a pipe."""
    text = "ä" * 300_000
    assert paceline.launch(here, 1, text=text)[0]["text"] == text


def test_a_static_method_is_found_again() -> None:
    assert paceline.launch(Shelf.double, 1, x=21) == [42]


def test_what_is_printed_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """Once where both say it at about the same time, which a busy machine may prevent."""
    paceline.launch(says, 2, text="good morning")
    said = capsys.readouterr().out.splitlines()
    assert said == ["[0-1] good morning"] or sorted(said) == ["[0] good morning", "[1] good morning"]


def test_the_earliest_cause_is_the_error() -> None:
    with pytest.raises(PacelineError, match="number 1 does not want to") as failed:
        paceline.launch(fail_on, 2, rank=1)
    assert failed.value.code == "PL503"
    assert "rank 1" in failed.value.message
    assert "test_function.py" in failed.value.message


def test_a_killed_rank_is_an_error() -> None:
    with pytest.raises(PacelineError, match="SIGKILL") as failed:
        paceline.launch(kills_itself, 1)
    assert failed.value.code == "PL502"


def test_a_result_that_is_no_json_value_is_refused() -> None:
    with pytest.raises(PacelineError, match="returned a set") as failed:
        paceline.launch(returns_a_set, 1)
    assert failed.value.code == "PL108"


def _a_closure() -> Callable[[], int]:
    x = 3
    return lambda: x


REFUSED: dict[str, Callable[[], Any]] = {
    "a lambda": lambda: describe(lambda: 1, {}),
    "a closure": lambda: describe(_a_closure(), {}),
    "a bound method": lambda: describe([].append, {}),
    "an argument that is no JSON value": lambda: describe(here, {"x": object()}),
    "an argument without a name": lambda: paceline.launch(fail_on, "x.pt", n=2),  # type: ignore[arg-type]
    "no number": lambda: paceline.launch(fail_on),
    "no processes": lambda: paceline.launch(here, 0),
    "an unknown strategy": lambda: paceline.launch(here, 1, strategy="dpp()"),
}


@pytest.mark.parametrize("attempt", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_launched_is_refused_before_anything_starts(attempt: Callable[[], Any]) -> None:
    with pytest.raises(UsageError) as refused:
        attempt()
    assert refused.value.code in ("PL103", "PL108", "PL201")


def test_how_it_is_called_is_told() -> None:
    with pytest.raises(UsageError, match="arguments of fail_on are given by name") as refused:
        paceline.launch(fail_on, "x.pt", n=2)  # type: ignore[arg-type]
    assert refused.value.help == "paceline.launch(fail_on, n=2, rank='x.pt')"
    for launch in (paceline.launch, importlib.import_module("paceline.launch")):
        assert list(inspect.signature(launch).parameters) == ["fn", "processes", "n", "strategy", "arguments"]  # type: ignore[arg-type]
        assert 'launch(fn, n=4, path="x.pt")' in str(launch.__doc__)


def test_ctrl_c_ends_the_ranks_and_is_passed_on() -> None:
    """The ranks are in the middle of a call; the caller gets its KeyboardInterrupt, and nobody is left."""
    with pytest.raises(KeyboardInterrupt):
        paceline.launch(interrupts_its_caller, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- functions of a script ------------------------------------------------------------------------------------------
SCRIPT = """
import multiprocessing, paceline

def triple(x):
    return 3 * x

def from_a_pool(x):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(triple, [x])

print("imported as", __name__)
{guard}print("result", paceline.launch(from_a_pool, 2, x=5))
"""


def test_a_function_of_a_script(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(SCRIPT.format(guard='if __name__ == "__main__": '))
    done = run_python("main.py", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    assert "imported as __main__\n" in done.stdout
    assert "imported as __mp_main__" in done.stdout
    assert "result [[15], [15]]\n" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_script_without_a_guard_does_not_start_ranks_without_end(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(SCRIPT.format(guard=""))
    done = run_python("main.py", cwd=tmp_path)
    assert done.returncode == 1, show(done)
    assert "PL108" in done.stderr
    assert 'if __name__ == "__main__"' in done.stderr


def test_a_module_run_with_dash_m(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "main.py").write_text(SCRIPT.format(guard='if __name__ == "__main__": '))
    done = run_python("-m", "package.main", cwd=tmp_path)
    assert "result [[15], [15]]\n" in done.stdout, show(done)


def test_from_a_thread_that_is_not_the_first() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(paceline.launch(Shelf.double, 1, x=4)))
    thread.start()
    thread.join(60)
    assert results == [[8]]


# ---- functions of a notebook ----------------------------------------------------------------------------------------
CELL = """
import json as j
from collections import Counter
LIMIT = {"most": 3}
class Base:
    def most(self): return LIMIT["most"]
class Counting(Base):
    def count(self, text): return Counter(text).most_common(self.most())
def helper(text): return Counting().count(text)
def work(text, times=LIMIT["most"]):
    model = j.dumps(helper(text))
    return model * times
def recursive(k): return 1 if k == 0 else k * recursive(k - 1)
def outer():
    x = 1
    def inner(): return x
    return inner
handle = open("/dev/null")
def uses_a_handle(): return handle.read()
model = object()
def has_a_local_of_that_name():
    model = 1
    return model
"""


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A ``__main__`` without a file, as a kernel has it, in which a cell was run."""
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    name = "<ipython-input-1>"
    monkeypatch.setitem(linecache.cache, name, (len(CELL), None, CELL.splitlines(keepends=True), name))
    exec(compile(CELL, name, "exec"), main.__dict__)
    yield main.__dict__
    main.__dict__["handle"].close()


def test_a_cell_s_function_takes_along_what_it_uses(notebook: dict[str, Any]) -> None:
    expected = notebook["work"]("abracadabra")
    assert paceline.launch(notebook["work"], 1, text="abracadabra") == [expected]
    assert paceline.launch(notebook["recursive"], 1, k=5) == [120]
    assert paceline.launch(notebook["has_a_local_of_that_name"], 1) == [1]


def test_a_cell_s_function_that_cannot_travel_is_refused(notebook: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="uses handle, a TextIOWrapper of this process"):
        source_of(notebook["uses_a_handle"])
    inner = notebook["outer"]()
    assert isinstance(inner, FunctionType)
    with pytest.raises(UsageError, match="uses variables of a function around it: x"):
        source_of(inner)


def test_a_prompt_has_no_source_to_take_along() -> None:
    text = "import paceline\ndef f(): return 1\n\npaceline.launch(f, 1)\n"
    done = subprocess.run([sys.executable, "-i"], input=text, capture_output=True, text=True, timeout=60)
    assert "PL108: f: the source of f is not known" in done.stderr
