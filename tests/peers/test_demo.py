"""``paceline demo``, and its promise: the examples are the same programs under plain ``python``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from paceline.launch import cli, demo, ending
from support.cli import run_paceline, run_python, show

ALL = [example.file for example in demo.EXAMPLES]


def test_the_demo_writes_runs_and_explains(tmp_path: Path) -> None:
    done = run_paceline("demo", "-n", "2", "--quick", cwd=tmp_path, timeout=150)
    assert done.returncode == 0, show(done)
    for file in ALL:
        assert (tmp_path / "demo" / file).read_text() == _template(file)
        assert f"paceline run {file} -n 2" in done.stdout
    runs = [json.loads(path.read_text()) for path in (tmp_path / "demo" / "runs").glob("*/run.json")]
    assert [run["state"] for run in runs] == ["finished"] * len(ALL)
    for said in ("2 processes", "accuracy", "bits_per_byte", "demo/runs/", "To try next"):
        assert said in done.stdout, show(done)


def test_a_changed_example_stays_and_that_is_said(tmp_path: Path) -> None:
    mine = "import sys\nsys.exit('this is my own version')\n"
    (tmp_path / "train.py").write_text(mine)
    done = run_paceline("demo", "-n", "2", "--dir", ".", "--quick", cwd=tmp_path)
    assert done.returncode == 1, show(done)
    assert "train.py is not the example any more" in done.stdout
    assert "this is my own version" in done.stdout + done.stderr
    assert (tmp_path / "train.py").read_text() == mine


def test_without_scikit_learn_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == ending.REFUSED
    said = capsys.readouterr().err
    assert "scikit-learn" in said
    assert "pip install 'paceline[examples]'" in said
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("a file")
    assert cli.main(["demo", "--dir", str(tmp_path / "taken")]) == ending.REFUSED
    assert "PL601" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "arguments", "line"),
    [
        ("train.py", ("--epochs", "3"), "of the digits"),
        ("lm.py", ("--steps", "12", "--width", "32", "--layers", "1", "--sample", "0"), "bits per byte"),
    ],
)
def test_the_examples_give_the_same_result_on_one_process_and_on_two(
    file: str, arguments: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(_template(file))
    alone = run_python(file, *arguments, cwd=tmp_path)
    together = run_paceline("run", file, "-n", "2", "--", *arguments, cwd=tmp_path)
    assert alone.returncode == together.returncode == 0, show(alone) + show(together)
    (expected,) = (text for text in alone.stdout.splitlines() if line in text)
    assert f"[0] {expected}" in together.stdout, show(together)


def _template(file: str) -> str:
    return (Path(demo.__file__).parent / "templates" / file).read_text()
