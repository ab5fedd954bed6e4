"""A run that is stopped in the middle of an epoch and resumed, with any number of processes, ends where the undisturbed one ends."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from paceline.train.checkpoint_files import Checkpoint, candidates
from support.breadth import more
from support.cli import run_paceline, run_python, show

CASE = Path(__file__).parent / "resume_case.py"
CLOSE = 1e-9  # float64: sums in another order, 42 steps of a smooth loss


def _run(tmp_path: Path, n: int, *flags: str | Path, script: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    arguments = ("run", CASE, "-n", str(n), *flags, "--", "--out", out, *script)
    done = run_paceline(*arguments, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, show(done)
    return done


def _expected(where: Path, *script: str) -> dict[str, torch.Tensor]:
    done = run_python(CASE, "--out", where, *script, cwd=where, timeout=100)
    assert done.returncode == 0, done.stderr
    return torch.load(where / "end.pt")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return _expected(tmp_path_factory.mktemp("plain"))


def _compare(expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    got = torch.load(tmp_path / "out" / "end.pt")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= CLOSE, name


def _stopped_at(tmp_path: Path, n: int, step: int, *flags: str, script: tuple[str, ...] = ()) -> Path:
    """A run that ends after so many steps; its last checkpoint. Several ranks agree to stop with the step after the request."""
    run, asked = tmp_path / "run", str(step - (n > 1))
    _run(tmp_path, n, "--run-dir", run, "--checkpoint", "every=1000", *flags, script=("--stop", asked, *script))
    path = run / "checkpoints" / f"step-{step:08d}"
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        assert checkpoint.step == step
    return path


@pytest.mark.parametrize(("before", "after"), [(3, 2), *more((1, 3), (1, 1), (2, 1), (2, 2), (2, 3))])
def test_stopped_and_resumed_is_as_if_nothing_had_happened(
    before: int, after: int, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = _stopped_at(tmp_path, before, 17)
    other = tmp_path / "other"
    _run(tmp_path, after, "--run-dir", other, "--resume", path)
    _compare(expected, tmp_path)
    proved = run_paceline("verify", "ledger", other, cwd=tmp_path)
    assert proved.returncode == 0, show(proved)


@pytest.mark.long
@pytest.mark.parametrize("step", [2, 6, 12, 18, 41])
def test_any_step_will_do(step: int, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """An early one, the last of an epoch, the one before the last; in place, as a scheduler of jobs repeats a command."""
    _stopped_at(tmp_path, 2, step)
    run = tmp_path / "run"
    done = _run(tmp_path, 2, "--run-dir", run, "--checkpoint", "every=10,keep=3,busy=wait", "--resume", "auto")
    _compare(expected, tmp_path)
    assert "PL61" not in done.stderr, show(done)
    assert (run / "earlier" / "1" / "run.json").exists()
    for what in ("ledger", "checkpoint"):
        proved = run_paceline("verify", what, run, cwd=tmp_path)
        assert proved.returncode == 0, show(proved)
    assert 1 <= len(list((run / "checkpoints").glob("step-*"))) <= 3
    newest = run_paceline("hash", run / "checkpoints" / "step-00000042", cwd=tmp_path)
    assert newest.stdout == run_paceline("hash", run, cwd=tmp_path).stdout


@pytest.mark.long
def test_the_end_can_be_resumed_too(expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for resumed in (False, True):
        done = _run(
            tmp_path, 2, "--run-dir", run, "--checkpoint", "every=1000", *(["--resume", "auto"] if resumed else [])
        )
        assert "PL61" not in done.stderr, show(done)
        _compare(expected, tmp_path)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000042"]


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--strategy", "ddp(params=shared)")])
def test_where_the_optimizers_step_is_divided(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Each rank steps a stretch; the state is saved whole, and divided anew among another number."""
    script = ("--width", "90000")
    plain = tmp_path / "plain"
    plain.mkdir()
    want = _expected(plain, *script)
    path = _stopped_at(tmp_path, 2, 8, *flags, script=script)
    _run(tmp_path, 3, "--run-dir", tmp_path / "other", "--resume", path, *flags, script=script)
    _compare(want, tmp_path)


@pytest.mark.long
def test_with_accumulation(tmp_path: Path) -> None:
    script = ("--accumulate", "2")
    plain = tmp_path / "plain"
    plain.mkdir()
    want = _expected(plain, *script)
    run = tmp_path / "run"
    _run(tmp_path, 2, "--run-dir", run, "--checkpoint", "every=1000", script=("--stop", "10", *script))
    (path,) = candidates(run / "checkpoints")  # it ends in the middle of a step, and so after the one before
    assert path.name == "step-00000010"
    _run(tmp_path, 3, "--run-dir", tmp_path / "other", "--resume", path, script=script)
    _compare(want, tmp_path)


def test_a_damaged_checkpoint_is_passed_over_and_said(expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = _stopped_at(tmp_path, 2, 9)
    run = tmp_path / "run"
    _run(tmp_path, 1, "--run-dir", run, "--checkpoint", "every=1000", "--resume", "auto", script=("--stop", "20"))
    newest = path.with_name("step-00000020")
    raw = bytearray((newest / "state.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 4
    (newest / "state.safetensors").write_bytes(raw)
    checked = run_paceline("verify", "checkpoint", run, "--format", "json", cwd=tmp_path)
    assert checked.returncode == 1, show(checked)
    assert [json.loads(line)["verified"] for line in checked.stdout.splitlines()] == [False, True]
    done = _run(tmp_path, 2, "--run-dir", run, "--checkpoint", "every=1000", "--resume", "auto")
    assert "PL613" in done.stderr, show(done)
    assert "step-00000020/state.safetensors" in done.stderr
    _compare(expected, tmp_path)
    assert newest.with_name("bad-step-00000020").is_dir()
    proved = run_paceline("verify", "ledger", run, cwd=tmp_path)
    assert proved.returncode == 0, show(proved)


def test_the_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    path = _stopped_at(tmp_path, 1, 3)
    out = ("--", "--out", tmp_path / "out")
    wider = run_paceline("run", CASE, "-n", "2", "--resume", path, *out, "--width", "34", cwd=tmp_path)
    assert wider.returncode == 1, show(wider)
    assert "PL610" in wider.stdout + wider.stderr
    assert "'0.weight' of model 'model' is (34, 8) float64, and was (33, 8) float64" in wider.stdout + wider.stderr


def test_what_is_not_there_is_refused_or_said(tmp_path: Path) -> None:
    out = ("--", "--out", tmp_path / "out", "--stop", "2")
    (tmp_path / "empty").mkdir()
    nothing = run_paceline("run", CASE, "--resume", "nowhere", *out, cwd=tmp_path)
    assert (nothing.returncode, "PL106" in nothing.stderr) == (2, True), show(nothing)
    empty = run_paceline("run", CASE, "-n", "2", "--resume", tmp_path / "empty", *out, cwd=tmp_path)
    assert (empty.returncode, "PL614" in empty.stdout + empty.stderr) == (1, True), show(empty)
    fresh = run_paceline("run", CASE, "-n", "2", "--name", "fresh", "--resume", "auto", *out, cwd=tmp_path)
    assert fresh.returncode == 0, show(fresh)
    assert "PL614" in fresh.stderr, show(fresh)
    again = run_paceline("run", CASE, "--name", "fresh", *out, cwd=tmp_path)
    assert (again.returncode, "holds a run already" in again.stderr) == (2, True), show(again)
