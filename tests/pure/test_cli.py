"""The command line without a run: quick, stable exit codes, no traceback of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paceline import __version__
from paceline.launch.cli import VERBS, main
from paceline.terms.errors import EXPLANATIONS
from support.cli import run_paceline, run_python

HEAVY = ("torch", "rich", "numpy", "psutil")


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules that a command line imports."""
    program = (
        "import sys; from paceline.launch.cli import main; code = main(sys.argv[1:]); "
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.smoke
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["explain"], ["run", "--help"], ["logs", "--help"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    assert not imported_by(*arguments) & set(HEAVY)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_few_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "--format" in shown
    flags = [line for line in shown.splitlines() if line.startswith("  -") and "--help" not in line]
    assert len(flags) <= (17 if verb == "run" else 12)


def test_run_s_help_lists_the_strategies() -> None:
    done = run_paceline("run", "--help", cwd=Path("/"))
    assert "ddp" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"paceline {__version__}\n"
    assert main(["--version", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"paceline": __version__}


def test_every_code_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == list(EXPLANATIONS)
    assert main(["explain", "pl203"]) == 0
    assert EXPLANATIONS["PL203"].help in capsys.readouterr().out
    assert main(["explain", "PL203", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["code"] == "PL203"


REFUSALS = {
    "a wrong verb": (["rnu"], "PL105", "did you mean 'run'"),
    "a wrong flag": (["run", "x.py", "--stratgy", "ddp"], "PL105", "did you mean '--strategy'"),
    "a flag of the script": (["run", "x.py", "--epochs", "3"], "PL105", "after `--`"),
    "no script": (["run"], "PL101", "train.py"),
    "a missing script": (["run", "nowhere.py"], "PL101", "help"),
    "a script with another name": (["run", "okk.py"], "PL101", "did you mean ok.py?"),
    "a directory": (["run", "."], "PL101", "help"),
    "broken Python": (["run", "broken.py"], "PL110", "line 1"),
    "no processes": (["run", "ok.py", "-n", "0"], "PL103", "1 to"),
    "too many processes": (["run", "ok.py", "-n", "100000"], "PL103", "100000"),
    "half a process": (["run", "ok.py", "-n", "1.5"], "PL105", "1.5"),
    "an unknown strategy": (["run", "ok.py", "--strategy", "dpp()"], "PL201", "dpp"),
    "no strategy at all": (["run", "ok.py", "--strategy", "ddp("], "PL202", "ddp("),
    "an unknown wire": (["run", "ok.py", "--wire", "tin"], "PL105", "tin"),
    "a setting without a value": (["run", "ok.py", "--set", "X"], "PL105", "KEY=VALUE"),
    "a name that is a path": (["run", "ok.py", "--name", "a/b"], "PL105", "--run-dir"),
    "no time at all": (["run", "ok.py", "--hang-after", "0"], "PL105", "--hang-after"),
    "a negative seed": (["run", "ok.py", "--seed", "-1"], "PL105", "--seed"),
    "no such plan": (["run", "--plan", "nowhere.toml"], "PL105", "nowhere.toml"),
    "a run that exists": (["run", "ok.py", "--run-dir", "old"], "PL105", "holds a run"),
    "a run directory that cannot be": (["run", "ok.py", "--run-dir", "ok.py/run"], "PL601", "ok.py"),
    "an unknown code": (["explain", "PL999"], "PL107", "PL999"),
    "no such run": (["logs", "nothing"], "PL106", "nothing"),
    "no such run to verify": (["verify", "ledger", "nothing"], "PL106", "nothing"),
    "a run without weights": (["hash", "old"], "PL603", "model.safetensors"),
    "nothing to stop": (["stop", "old"], "PL109", "old"),
}


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a script, a broken one, and a run that has ended."""
    (tmp_path / "ok.py").write_text("print('never run')\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text('{"state": "finished"}')
    (tmp_path / "old" / "processes.json").write_text("[]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "code", "part"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_have_a_code_and_help(
    arguments: list[str], code: str, part: str, somewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error {code}: ")
    assert "\n  help: " in told
    assert part in told
    assert not (somewhere / "runs").exists()


def test_refusals_as_json(somewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.py", "--format", "json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["code"]) == ("error", "PL101")
    assert told["help"]


def test_a_second_launcher_is_refused(somewhere: Path) -> None:
    """`srun -n 4 paceline run -n 2` would be four worlds (Lightning#20391)."""
    inside = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    done = run_paceline("run", "ok.py", cwd=somewhere, env=inside)
    assert done.returncode == 2
    assert "error PL104" in done.stderr


def test_a_name_that_resembles_a_run_is_corrected(somewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = somewhere / "runs" / "digits"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    assert main(["logs", "digit"]) == 2
    assert "did you mean digits?" in capsys.readouterr().err
    assert main(["hash", "nope"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_the_reader_may_leave_first() -> None:
    """`paceline explain | head -1` ends quietly."""
    program = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-m', 'paceline.launch.cli', 'explain'], stdout=subprocess.PIPE); p.stdout.close(); sys.exit(p.wait())"
    done = run_python("-c", program, cwd=Path("/"))
    assert (done.returncode, done.stderr) == (0, "")
