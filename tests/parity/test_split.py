"""A replica split over ranks computes what one process computes: parameters and the whole state of the optimizer, in float64."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.breadth import more
from support.parity_table import record
from tests.support.cli import run_command, run_paceline, run_python

CASE = Path(__file__).parent / "train_case.py"
NORM = Path(__file__).parent / "norm_case.py"
RESHARD = Path(__file__).parent / "reshard_case.py"
STEPS = "30" if more(True) else "8"
SETTINGS = ("accumulate", "tokens", *more("clip", "zeros", "float32"))
ABSOLUTE = (
    1e-9  # float64: sums in another order; seen: 1e-16 for SGD, up to 1e-10 for RMSprop, which divides by small numbers
)
RELATIVE32 = 1e-5

CASES = [
    ("fsdp", 2, "gpt"),
    ("fsdp(2) * ddp(bucket_mb=0.001)", 4, "mlp"),
    ("tensor(2)", 2, "hf"),
    ("pipeline(2, schedule=gpipe)", 2, "gpt"),
    ("pipeline(2, schedule=1f1b, microbatches=3) * ddp(2)", 4, "mlp"),
    ("pipeline(2, microbatches=3) * tensor(2)", 4, "gpt"),
    *more(
        ("fsdp(stage=1)", 2, "mlp"),
        ("tensor(2) * ddp(2)", 4, "mlp"),
        ("fsdp", 4, "gpt"),
        ("fsdp", 3, "hf"),
        ("fsdp(stage=2)", 2, "gpt"),
        ("fsdp(stage=1)", 4, "hf"),
        ("fsdp(recompute=blocks)", 2, "gpt"),
        ("fsdp", 2, "cnn"),
        ("fsdp(2) * ddp", 4, "cnn"),
        ("fsdp(2) * ddp", 4, "gpt"),
        ("tensor(2)", 2, "gpt"),
        ("tensor(2)", 2, "cnn"),
        ("tensor(2) * ddp", 4, "hf"),
        ("pipeline(2)", 2, "hf"),
        ("pipeline(2)", 2, "cnn"),
        ("pipeline(2, schedule=interleaved, microbatches=4)", 2, "mlp"),
        ("pipeline(2, schedule=loopedbfs, microbatches=4)", 2, "mlp"),
        ("pipeline(2, schedule=zero_bubble, microbatches=4)", 2, "mlp"),
        ("pipeline(2, schedule=interleaved_zero_bubble, microbatches=4)", 2, "mlp"),
        ("pipeline(3, microbatches=3)", 3, "mlp"),
        ("pipeline(2, microbatches=3) * ddp", 4, "hf"),
        ("pipeline(2, microbatches=3) * tensor(2)", 4, "mlp"),
    ),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What plain `python` arrives at, by model."""
    out = {}
    for model in dict.fromkeys(model for _, _, model in CASES):
        out[model] = tmp_path_factory.mktemp(model)
        arguments = (model, "--settings", *SETTINGS, "--steps", STEPS, "--out", out[model])
        done = run_python(CASE, *arguments, cwd=out[model], timeout=120)
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("strategy", "n", "model"), CASES)
def test_same_as_one_process(strategy: str, n: int, model: str, expected: dict[str, Path], tmp_path: Path) -> None:
    got = tmp_path / "got"
    got.mkdir()
    arguments = ("--strategy", strategy, "--run-dir", tmp_path / "run", "--", model)
    arguments = (*arguments, "--settings", *SETTINGS, "--steps", STEPS, "--out", got)
    done = run_paceline("run", CASE, "-n", str(n), *arguments, cwd=tmp_path, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in sorted(expected[model].glob("*.pt")):
        want, have = torch.load(file), torch.load(got / file.name)
        assert want.keys() == have.keys()
        for name, tensor in want.items():
            bound = ABSOLUTE * (max(1.0, float(tensor.abs().max())) if name.startswith("optimizer.") else 1.0)
            if file.name == "float32.pt":
                bound = RELATIVE32 * max(float(tensor.abs().max()), 1e-3)
            assert (have[name] - tensor).abs().max() <= bound, f"{file.name} {name}"
    proved = run_paceline("verify", "ledger", tmp_path / "run", cwd=tmp_path)
    assert proved.returncode == 0, proved.stdout + proved.stderr
    shutil.rmtree(tmp_path / "run")
    if model != "cnn":
        record(" * ".join(factor.partition("(")[0].strip() for factor in strategy.split(" * ")), model, n, "")


LOCAL = [
    "pipeline(2) * local_sgd(4)",
    *more("fsdp(2) * local_sgd(4)", "tensor(2) * local_sgd(4)", "ddp(2) * local_sgd(4)"),
]


@pytest.mark.parametrize("strategy", LOCAL)
def test_split_replicas_that_step_on_their_own(strategy: str, tmp_path: Path) -> None:
    """Two replicas of two ranks do what two of one rank do."""
    for name, n in (("local_sgd(4)", 2), (strategy, 4)):
        arguments = ("--strategy", name, "--run-dir", tmp_path / f"run{n}", "--", tmp_path / f"{n}.safetensors")
        done = run_paceline("run", RESHARD, "-n", str(n), *arguments, cwd=tmp_path, timeout=150)
        assert done.returncode == 0, done.stdout + done.stderr
    _same_file(tmp_path / "2.safetensors", tmp_path / "4.safetensors", ABSOLUTE)


def _same_file(one: Path, other: Path, bound: float) -> None:
    want, have = load_file(one), load_file(other)
    assert want.keys() == have.keys()
    for name, tensor in want.items():
        assert (have[name] - tensor).abs().max() <= bound, name


@pytest.mark.parametrize(("strategy", "n"), [("ddp", 3), *more(("fsdp", 2), ("fsdp(2) * ddp", 4))])
def test_batch_normalisation_over_all_rows(strategy: str, n: int, tmp_path: Path) -> None:
    """``paceline.sync_batchnorm``: parameters and running statistics of one process, with fewer rows than ranks in a batch too."""
    plain, out = tmp_path / "plain.safetensors", tmp_path / "out.safetensors"
    done = run_python(NORM, plain, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    done = run_paceline("run", NORM, "-n", str(n), "--strategy", strategy, "--", out, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    _same_file(plain, out, ABSOLUTE)


@pytest.mark.parametrize("strategy", ["pipeline", *more("fsdp", "tensor")])
def test_ranks_that_torchrun_has_started(strategy: str, tmp_path: Path) -> None:
    """The script says how it is split, because nobody else can."""
    plain, out = tmp_path / "plain.safetensors", tmp_path / "out.safetensors"
    done = run_python(RESHARD, plain, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = (RESHARD, out, "--strategy", strategy)
    done = run_command((*torchrun, *map(str, script)), cwd=tmp_path, timeout=120, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    _same_file(plain, out, ABSOLUTE)


# ---- from one placement to another ------------------------------------------------------------------------------------
CHAINS = [
    (("fsdp", 4), ("pipeline(2)", 2), ("ddp", 3)),
    *more(
        (("ddp", 2), ("tensor(2) * ddp", 4), ("fsdp(3)", 3)),
        (("pipeline(3)", 3), ("fsdp(2) * ddp(2)", 4), ("tensor(2)", 2)),
    ),
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: " ".join(s for s, _ in chain))
def test_a_run_goes_on_under_another_strategy(chain: list[tuple[str, int]], tmp_path: Path) -> None:
    """Saved and broken off, gone on with by other ranks that hold other parts: the result is that of one process, and the whole
    state that each began from is, bit by bit, the one that was saved."""
    plain = run_python(RESHARD, tmp_path / "plain.safetensors", cwd=tmp_path, timeout=60)
    assert plain.returncode == 0, plain.stderr
    last = len(chain) - 1
    for number, (strategy, n) in enumerate(chain):
        stop = [] if number == last else ["--stop", str(8 * (number + 1) + 2)]
        arguments = ["--strategy", strategy, "--run-dir", tmp_path / "run", "--checkpoint", "every=4,busy=wait"]
        arguments += ["--resume", "auto"] if number else []
        out = tmp_path / "out.safetensors"
        begun = ["--begun", tmp_path / f"begun{number}.safetensors"]
        done = run_paceline(
            "run",
            RESHARD,
            "-n",
            str(n),
            "--workers",
            str(n),
            *arguments,
            "--",
            out,
            *stop,
            *begun,
            cwd=tmp_path,
            timeout=150,
        )
        assert (done.returncode == 0) == (number == last), done.stdout + done.stderr
        if number:
            saved = sorted((tmp_path / f"kept{number}").glob("step-*"))[-1]
            began = load_file(tmp_path / f"begun{number}.safetensors")
            assert len(began) == 6 * 4  # a parameter, two moments and a count of steps each
            for name, tensor in began.items():
                assert torch.equal(tensor, _saved(saved)[name]), name
        if number < last:
            shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / f"kept{number + 1}")
    _same_file(tmp_path / "plain.safetensors", tmp_path / "out.safetensors", ABSOLUTE)
    proved = run_paceline("verify", "ledger", tmp_path / "run", cwd=tmp_path)
    assert proved.returncode == 0, proved.stdout + proved.stderr


def _saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        found |= load_file(file)
    return found
