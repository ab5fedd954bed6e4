"""`paceline run -n {1,2,3,4}` computes what `python` computes: 50 steps, float64, batches that nothing divides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from support.breadth import more
from tests.support.cli import run_paceline, run_python

CASE = Path(__file__).parent / "train_case.py"
MODELS = ("mlp", "cnn", "gpt", "hf")
ABSOLUTE = 1e-9  # float64: sums in another order, 50 steps of a smooth loss; observed below 1e-14
RELATIVE32 = 1e-5


CASES = [
    *[("mlp", 1), ("mlp", 4), ("cnn", 3), ("gpt", 3), ("hf", 2)],
    *more(
        ("mlp", 2),
        ("gpt", 2),
        ("hf", 1),
        ("mlp", 3),
        ("cnn", 1),
        ("cnn", 2),
        ("cnn", 4),
        ("gpt", 1),
        ("gpt", 4),
        ("hf", 3),
        ("hf", 4),
    ),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The weights that plain `python` arrives at, by model."""
    out = {}
    for model in MODELS:
        out[model] = tmp_path_factory.mktemp(model)
        done = run_python(CASE, model, "--out", out[model], cwd=out[model], timeout=120)
        assert done.returncode == 0, done.stderr
    return out


def _compare(expected: Path, got: Path) -> None:
    files = sorted(p.name for p in expected.glob("*.pt"))
    assert files == sorted(p.name for p in got.glob("*.pt"))
    for file in files:
        want, have = torch.load(expected / file), torch.load(got / file)
        assert want.keys() == have.keys()
        for name, tensor in want.items():
            if file == "float32.pt":
                scale = float(tensor.abs().max())
                assert (have[name] - tensor).abs().max() <= RELATIVE32 * max(scale, 1e-3), f"{file} {name}"
            else:
                assert (have[name] - tensor).abs().max() <= ABSOLUTE, f"{file} {name}"


def _ends(run: Path) -> list[dict[str, object]]:
    files = sorted((run / "events").glob("worker-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "end"]


@pytest.mark.parametrize(("model", "n"), CASES)
def test_same_parameters_as_one_process(model: str, n: int, expected: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = run_paceline(
        "run", CASE, "-n", str(n), "--run-dir", tmp_path / "run", "--", model, "--out", out, cwd=tmp_path, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _compare(expected[model], out)

    ends = _ends(tmp_path / "run")
    assert len(ends) == n
    assert len({end["hash"] for end in ends}) == 1
    proved = run_paceline("verify", "ledger", tmp_path / "run", cwd=tmp_path)
    assert proved.returncode == 0, proved.stdout + proved.stderr
    hashed = run_paceline("hash", tmp_path / "run", cwd=tmp_path)
    assert str(ends[0]["hash"]) in hashed.stdout
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("strategy", ["ddp()", *more("ddp(params=shared)")])
def test_divided_optimizer_step(strategy: str, tmp_path: Path) -> None:
    """Each rank steps a stretch of the parameters; parameters and the whole optimizer state are those of one process."""
    want, out = tmp_path / "want", tmp_path / "out"
    want.mkdir()
    out.mkdir()
    script = ("wide", "--settings", "clip", "accumulate", "tokens", "--steps", "20")
    plain = run_python(CASE, *script, "--out", want, cwd=tmp_path, timeout=120)
    assert plain.returncode == 0, plain.stderr
    arguments = ("--strategy", strategy, "--run-dir", tmp_path / "run", "--", *script, "--out", out)
    done = run_paceline("run", CASE, "-n", "3", *arguments, cwd=tmp_path, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    _compare(want, out)
    assert len({end["hash"] for end in _ends(tmp_path / "run")}) == 1


@pytest.mark.parametrize(
    ("setting", "strategy"),
    [
        ("clip", "ddp(params='shared')"),
        ("accumulate", "ddp(bucket_mb=0.001)"),
        *more(("accumulate", "ddp(params='shared')"), ("clip", "ddp(bucket_mb=0.001)"), ("clip", "ddp(commit=vote)")),
    ],
)
def test_variants_of_ddp(strategy: str, setting: str, expected: dict[str, Path], tmp_path: Path) -> None:
    """One model alone, so that its buckets are exchanged while backward runs."""
    out = tmp_path / "out"
    out.mkdir()
    arguments = (
        "--strategy",
        strategy,
        "--run-dir",
        tmp_path / "run",
        "--",
        "gpt",
        "--settings",
        setting,
        "--out",
        out,
    )
    # One copy that all write does not bear the loss of a worker: exactly 3, not 1 to 3.
    done = run_paceline("run", CASE, "--workers", "3", *arguments, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    only = tmp_path / "expected"
    only.mkdir()
    shutil.copy(expected["gpt"] / f"{setting}.pt", only)
    _compare(only, out)


@pytest.mark.parametrize("algorithm", ["ring", "tree", *more("star", "halving")])
def test_algorithms_on_the_point_to_point_wire(algorithm: str, expected: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments = ("--wire", "torch", "--strategy", f"ddp(algorithm={algorithm})", "--run-dir", tmp_path / "run")
    script = ("--", "mlp", "--settings", "clip", "--out", out)
    done = run_paceline("run", CASE, "-n", "3", *arguments, *script, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    only = tmp_path / "expected"
    only.mkdir()
    shutil.copy(expected["mlp"] / "clip.pt", only)
    _compare(only, out)
