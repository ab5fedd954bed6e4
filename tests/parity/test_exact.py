"""`ddp(exact=True)`: the same bits of all parameters and buffers for every number of ranks, and refusals where that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.breadth import more
from tests.support.cli import run_paceline, run_python, show

CASE = Path(__file__).parent / "exact_case.py"
MISTAKES = Path(__file__).parent / "exact_mistakes.py"


def hash_of(
    tmp_path: Path, n: int, *script: str, strategy: str = "ddp(exact=True)", options: tuple[str, ...] = ()
) -> str:
    run = tmp_path / f"run{n}{''.join(options)}"
    arguments = ("--strategy", strategy, *options, "--run-dir", run, "--", *script)
    done = run_paceline("run", CASE, "-n", str(n), *arguments, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, show(done)
    proved = run_paceline("verify", "ledger", run, cwd=tmp_path)
    assert proved.returncode == 0, show(proved)
    return run_paceline("hash", run, cwd=tmp_path).stdout.split()[0]


@pytest.mark.parametrize("script", ["cnn --noisy --tokens weight", *more("mlp")])
def test_one_to_four_ranks(script: str, tmp_path: Path) -> None:
    """A last batch of 3 rows, clipping, a schedule; dropout, batch normalisation, augmentation, weights of any size."""
    assert len({hash_of(tmp_path, n, *script.split()) for n in (1, 2, 3, 4)}) == 1


@pytest.mark.parametrize(
    "script",
    [
        *more("cnn --noisy --workers 2 --epochs 1"),
        *more("cnn --tokens sum --nan"),  # that step is left out by all
        "wide --epochs 1",  # the optimizer's step is divided
    ],
)
def test_one_and_three_ranks(script: str, tmp_path: Path) -> None:
    assert len({hash_of(tmp_path, n, *script.split()) for n in (1, 3)}) == 1


@pytest.mark.long
def test_other_wires_more_ranks_than_shards_and_other_buckets(tmp_path: Path) -> None:
    want = hash_of(tmp_path, 1, "mlp", strategy="ddp(exact=True, shards=3)")
    assert hash_of(tmp_path, 3, "mlp", strategy="ddp(exact=True, shards=3)", options=("--wire", "torch")) == want
    assert hash_of(tmp_path, 5, "mlp", strategy="ddp(bucket_mb=0.001, exact=True, shards=3)") == want


def test_plain_python_stays_as_it_is(tmp_path: Path) -> None:
    done = run_python(CASE, "mlp", cwd=tmp_path, timeout=60)
    assert done.returncode == 0, show(done)
    assert "steps 10 samples 406" in done.stdout


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("accumulates", "PL450", "no optimizer step"),
        ("two backwards", "PL450", "second gradient"),
        ("clears nothing", "PL450", "not cleared"),
        ("leaves", "PL450", "before all shards"),
        ("two optimizers", "PL451", "second one"),
        ("scaler", "PL451", "GradScaler"),
        ("schedule", "PL451", "schedule"),
        ("stream", "PL451", "not cut into shards"),
        ("loaders", "PL451", "different numbers of shards"),
    ],
)
def test_what_would_depend_on_the_ranks_is_refused(case: str, code: str, words: str, tmp_path: Path) -> None:
    arguments = ("-n", "1", "--strategy", "ddp(exact=True)", "--run-dir", tmp_path / "run", "--", case)
    done = run_paceline("run", MISTAKES, *arguments, cwd=tmp_path, timeout=60)
    assert done.returncode == 1, show(done)
    assert f"error[{code}]" in done.stdout + done.stderr, show(done)
    assert words in done.stdout + done.stderr
