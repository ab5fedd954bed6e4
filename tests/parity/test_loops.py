"""Loops as people write them compute the same under any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.breadth import more
from tests.parity.loop_cases import CASES
from tests.support.cli import run_paceline, run_python

SCRIPT = Path(__file__).parent / "loop_cases.py"
# float64 throughout but for the two cases that hold float32 parameters: sums in another order, a few dozen steps.
LIMITS = {"scaler_skips_overflow": 2e-6, "mixed_parameters": 2e-6}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    done = run_python(SCRIPT, "--out", out, cwd=out, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("n", [3, *more(1, 2, 4)])
def test_loops_as_people_write_them(n: int, expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run = tmp_path / "run"
    done = run_paceline("run", SCRIPT, "-n", str(n), "--run-dir", run, "--", "--out", out, cwd=tmp_path, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in CASES:
        name = case.__name__
        want, have = torch.load(expected / f"{name}.pt"), torch.load(out / f"{name}.pt")
        assert want.keys() == have.keys()
        for key, value in want.items():
            difference = (have[key].double() - value.double()).abs().max() if value.numel() else torch.tensor(0.0)
            assert difference <= LIMITS.get(name, 1e-9), f"{name}: {key} differs by {difference}"
    proved = run_paceline("verify", "ledger", run, cwd=tmp_path)
    assert proved.returncode == 0, proved.stdout + proved.stderr


@pytest.mark.parametrize(
    "case", ["unused_parameters", "fewer_rows_than_ranks", "gradients_by_hand", "average_of_weights"]
)
def test_one_model_alone(case: str, expected: Path, tmp_path: Path) -> None:
    """Alone, a model's buckets leave while backward runs; after others, ranks agree on the models first."""
    done = run_paceline("run", SCRIPT, "-n", "3", "--", "--cases", case, "--out", tmp_path, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    want, have = torch.load(expected / f"{case}.pt"), torch.load(tmp_path / f"{case}.pt")
    for key, value in want.items():
        assert (have[key].double() - value.double()).abs().max() <= 1e-9, key
