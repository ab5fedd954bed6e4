"""The sentences of docs/architecture.md that no linter knows, read from the sources themselves."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from paceline.terms.errors import EXPLANATIONS

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "paceline"
TEMPLATES = SRC / "launch" / "templates"
FILES = sorted(SRC.rglob("*.py"))
MAX_LINES = 500
TABLE = SRC / "terms" / "explanations.py"  # nobody reads it from end to end
CONVERTS = SRC / "launch" / "commands" / "checkpoint.py"  # is asked for torch's own files, and reads weights only
CODE = re.compile(r"\bPL\d{3}\b")

IMPURE = {"socket", "time", "datetime", "torch.distributed", "asyncio", "selectors", "subprocess", "ssl"}
RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "torch.multiprocessing"}
OBJECT_COLLECTIVES = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}
RUN_THE_USERS_PROGRAM = {SRC / "launch" / "worker.py", SRC / "launch" / "callee.py"}
VAGUE = {"utils", "util", "common", "base", "helpers", "misc"}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def _imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever the statement stands; ``from a import b`` gives a and a.b."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _names(path: Path) -> Iterator[tuple[int, str]]:
    """Every name and attribute that the file uses, dotted as far as it is written, with its line."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield node.lineno, ast.unparse(node)


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_a_house() -> None:
    assert len(FILES) > 20


def test_only_launch_reads_the_environment() -> None:
    reads = {"os.environ", "os.environb", "os.getenv", "os.putenv", "environ", "getenv"}
    found = [
        f"{_short(path)}:{line} {name}"
        for path in FILES
        if not path.is_relative_to(SRC / "launch")
        for line, name in _names(path)
        if name in reads
    ]
    assert not found


def test_a_file_that_calls_itself_pure_imports_no_socket_no_clock_no_torch_distributed() -> None:
    says_so = r"\bpure\b(?! but)"
    pure = [path for path in FILES if re.search(says_so, ast.get_docstring(_tree(path)) or "", re.IGNORECASE)]
    assert pure
    found = [f"{_short(path)} imports {name}" for path in pure for name in _imports(path) if name in IMPURE]
    assert not found


def test_nothing_is_unpickled_or_evaluated() -> None:
    forbidden = {"eval", "exec", "torch.load", "torch.save", "joblib.load", "numpy.load", "np.load"}
    found = [f"{_short(path)} imports {name}" for path in FILES for name in _imports(path) if name in RUNS_CODE]
    found += [
        f"{_short(path)}:{line} {name}"
        for path in FILES
        if path != CONVERTS
        for line, name in _names(path)
        if (name in forbidden and path not in RUN_THE_USERS_PROGRAM) or name.split(".")[-1] in OBJECT_COLLECTIVES
    ]
    assert not found


def test_no_file_has_a_vague_name() -> None:
    assert not [_short(path) for path in FILES if path.stem in VAGUE or path.parent.name in VAGUE]


def test_no_file_is_longer_than_a_person_reads() -> None:
    lengths = {_short(path): len(path.read_text("utf-8").splitlines()) for path in FILES if path != TABLE}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_every_file_opens_with_its_sentence() -> None:
    assert not [_short(path) for path in FILES if path.stat().st_size and not ast.get_docstring(_tree(path))]


@pytest.mark.parametrize("module", ["paceline", "paceline.launch.cli"])
def test_the_door_opens_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_code_is_in_the_table_and_every_entry_is_used() -> None:
    used = {
        code
        for path in FILES
        if path != SRC / "terms" / "errors.py"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for code in CODE.findall(node.value)
    }
    assert not used - EXPLANATIONS.keys(), "raised or reported, and not explained"
    assert not EXPLANATIONS.keys() - used, "explained, and never raised or reported"


def test_every_code_is_explained() -> None:
    assert not [code for code, entry in EXPLANATIONS.items() if not (entry.title and entry.text and entry.help)]
    assert not [code for code in EXPLANATIONS if not CODE.fullmatch(code)]


def test_no_page_and_no_source_names_a_machine_or_leaves_work_for_later() -> None:
    unwanted = re.compile(r"/(root|home|Users|work)/|pypi\.org|pythonhosted|\b(TODO|FIXME|XXX|HACK)\b")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    others = [ROOT / name for name in listed if ROOT / name != Path(__file__) and (ROOT / name).is_file()]
    assert not [_short(path) for path in others if unwanted.search(path.read_text("utf-8"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``pip install .`` would build, made by the same backend."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_everything_that_is_read_at_run_time(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    needed = {_short(path).removeprefix("src/") for path in FILES}
    needed |= {"paceline/py.typed", "paceline/group/kernel.c"}
    assert not needed - inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if not name.startswith("paceline")]


def test_an_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Installed apart from the sources, without its dependencies: those of the tests serve."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    (tmp_path / "where.py").write_text("import paceline; print(paceline.__file__)")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for command in ([sys.executable, "where.py"], [str(site / "bin" / "paceline"), "--version"]):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert str(site) in done.stdout or done.stdout.split()[-1] == _version(wheel)


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_a_clock_that_is_set_anew_changes_nothing() -> None:
    """The wall clock is shown, and never compared: durations are of monotonic clocks."""
    asked = [path.name for path in FILES if "time.time" in path.read_text() or "datetime.now" in path.read_text()]
    assert asked == ["events.py"]
