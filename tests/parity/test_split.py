"""A replica split over ranks computes what one process computes: parameters and the whole state of the optimizer, in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from support.breadth import more
from tests.support.cli import run_paceline, run_python

CASE = Path(__file__).parent / "train_case.py"
STEPS = "15"
ABSOLUTE = 1e-9  # float64: sums in another order; seen: 1e-16 for SGD, up to 1e-10 for RMSprop, which divides by small numbers
RELATIVE32 = 1e-5

CASES = [
    ("fsdp", 2, "gpt"),
    ("fsdp(stage=1)", 2, "mlp"),
    ("fsdp(2) * ddp(2)", 4, "mlp"),
    ("fsdp(2) * ddp(codec=None, bucket_mb=0.001)", 4, "hf"),
    *more(
        ("fsdp", 4, "gpt"),
        ("fsdp", 3, "hf"),
        ("fsdp(stage=2)", 2, "gpt"),
        ("fsdp(stage=1)", 4, "hf"),
        ("fsdp(recompute=blocks)", 2, "gpt"),
        ("fsdp", 2, "cnn"),
        ("fsdp(2) * ddp", 4, "cnn"),
        ("fsdp(2) * ddp", 4, "gpt"),
    ),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What plain `python` arrives at, by model."""
    out = {}
    for model in dict.fromkeys(model for _, _, model in CASES):
        out[model] = tmp_path_factory.mktemp(model)
        done = run_python(CASE, model, "--steps", STEPS, "--out", out[model], cwd=out[model], timeout=120)
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("strategy", "n", "model"), CASES)
def test_same_as_one_process(strategy: str, n: int, model: str, expected: dict[str, Path], tmp_path: Path) -> None:
    got = tmp_path / "got"
    got.mkdir()
    arguments = ("--strategy", strategy, "--run-dir", tmp_path / "run", "--", model, "--steps", STEPS, "--out", got)
    done = run_paceline("run", CASE, "-n", str(n), *arguments, cwd=tmp_path, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in sorted(expected[model].glob("*.pt")):
        want, have = torch.load(file), torch.load(got / file.name)
        assert want.keys() == have.keys()
        for name, tensor in want.items():
            bound = ABSOLUTE
            if file.name == "float32.pt":
                bound = RELATIVE32 * max(float(tensor.abs().max()), 1e-3)
            assert (have[name] - tensor).abs().max() <= bound, f"{file.name} {name}"
    proved = run_paceline("verify", "ledger", tmp_path / "run", cwd=tmp_path)
    assert proved.returncode == 0, proved.stdout + proved.stderr
    shutil.rmtree(tmp_path / "run")
