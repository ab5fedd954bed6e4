"""Mistakes with models that are split, each refused with its code, a help line, and no hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import run_paceline, run_python, show

SCRIPT = """
import torch, paceline
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
job = paceline.job(%s)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
opt = torch.optim.SGD(model.parameters(), lr=0.1)
train = DataLoader(TensorDataset(torch.randn(16, 8), torch.randint(4, (16,))), batch_size=8)
%s
for _ in job.epochs(1):
    for x, y in train:
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
%s
"""
TOGETHER = "model, opt, train = job.adopt(model, opt, train)"


def script(directory: Path, strategy: str = "", adopt: str = TOGETHER, end: str = "") -> str:
    (directory / "script.py").write_text(SCRIPT % (strategy, adopt, end))
    return "script.py"


@pytest.mark.parametrize(
    ("strategy", "n", "code", "said"),
    [
        ("tensor(3)", 4, "PL211", "4 were started"),
        ("fsdp(2) * ddp(2)", 2, "PL211", "start 4 with -n 4"),
        ("ddp(2)", 4, "PL211", "2 ranks"),
        ("fsdp * tensor(2)", 4, "PL212", "pieces of parts"),
        ("pipeline(2) * fsdp(2)", 4, "PL212", "needs no pipeline"),
        ("fsdp(2) * ps(staleness=4)", 4, "PL204", "replicas that are split"),
        ("fsdp(2, offload=1)", 2, "PL203", "True or False"),
        ("pipeline(2) * local_sgd(within(0.1))", 4, "PL20", "every=8"),
    ],
)
def test_refused_before_anything_starts(strategy: str, n: int, code: str, said: str, tmp_path: Path) -> None:
    done = run_paceline("run", script(tmp_path), "-n", str(n), "--strategy", strategy, cwd=tmp_path)
    assert done.returncode in (1, 2), show(done)
    assert f"error {code}" in done.stderr or f"error[{code}" in done.stderr, show(done)
    assert said in done.stderr


def test_losses_cannot_be_borne(tmp_path: Path) -> None:
    done = run_paceline("run", script(tmp_path), "--workers", "2:4", "--strategy", "fsdp", cwd=tmp_path)
    assert done.returncode == 2, show(done)
    assert "error PL105" in done.stderr
    assert "--resume auto" in done.stderr
    flags = ("-n", "4", "--workers", "1:4", "--strategy", "fsdp(2) * ddp()")
    done = run_paceline("run", script(tmp_path), *flags, cwd=tmp_path)
    assert done.returncode == 2, show(done)
    assert "give multiples of 2" in done.stderr


def test_the_script_alone_cannot_say_so(tmp_path: Path) -> None:
    """The launcher has prepared other processes than it takes."""
    done = run_paceline("run", script(tmp_path, "'fsdp()'"), "-n", "2", cwd=tmp_path)
    assert done.returncode == 1, show(done)
    assert "error[PL213]" in done.stderr


def test_an_optimizer_that_comes_later(tmp_path: Path) -> None:
    later = "model, train = job.adopt(model, train)\nopt = job.adopt(opt)"
    done = run_paceline("run", script(tmp_path, adopt=later), "-n", "2", "--strategy", "fsdp", cwd=tmp_path)
    assert done.returncode == 1, show(done)
    assert "error[PL510]" in done.stderr


def test_whole_states_and_where_everything_is(tmp_path: Path) -> None:
    """What a script saves by itself, called on all ranks, is that of a model that is not split."""
    end = "state = model.state_dict()\nif job.main: print({k: tuple(v.shape) for k, v in state.items()}, type(state['0.weight']).__name__)"
    for strategy in ("tensor", "pipeline"):
        name = script(tmp_path, end=end)
        done = run_paceline(
            "run", name, "-n", "2", "--strategy", strategy, "--explain", "--run-dir", strategy, cwd=tmp_path
        )
        assert done.returncode == 0, show(done)
        assert "{'0.weight': (8, 8), '0.bias': (8,), '2.weight': (4, 8), '2.bias': (4,)} Tensor" in done.stdout
        explained = (tmp_path / strategy / "explain.txt").read_text()
        assert "bytes" in explained
        assert explained.splitlines()[1].strip() in done.stdout
    assert (tmp_path / "pipeline" / "schedule.svg").read_text().startswith("<svg")
    assert "rank 1" in explained


READS = """
p = model[0].weight
told = [p.detach().sum().item(), float(p.detach().mean()), p.detach().norm().item(), p.grad.norm().item()]
told.append(sum((q.detach() ** 2).sum() for q in model.parameters()).item())
print('read', *(f'{number:.4f}' for number in told))
"""


def test_numbers_of_split_parameters_are_those_of_the_whole(tmp_path: Path) -> None:
    """Torch gives each rank the part that it holds."""
    name = script(tmp_path, end=READS)
    plain = run_python(name, cwd=tmp_path)
    (expected,) = [line for line in plain.stdout.splitlines() if line.startswith("read")]
    for strategy in ("fsdp", "tensor"):
        done = run_paceline("run", name, "-n", "2", "--strategy", strategy, cwd=tmp_path)
        assert done.returncode == 0, show(done)
        assert f"[0-1] {expected}" in done.stdout


def test_a_penalty_on_split_parameters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        (SCRIPT % ("", TOGETHER, "")).replace("(model(x), y)", "(model(x), y).add(model[0].weight.square().sum())")
    )
    for strategy, code in (("fsdp", "PL513"), ("pipeline", "PL528")):
        done = run_paceline("run", "script.py", "-n", "2", "--strategy", strategy, cwd=tmp_path)
        assert done.returncode == 1, show(done)
        assert f"error[{code}]" in done.stderr, show(done)


def test_a_run_that_computes_nothing_ends_well(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text((SCRIPT % ("", TOGETHER, "")).replace("job.epochs(1)", "job.epochs(0)"))
    done = run_paceline("run", "script.py", "-n", "2", "--strategy", "pipeline", "--run-dir", "r", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    assert (tmp_path / "r" / "model.safetensors").exists()
