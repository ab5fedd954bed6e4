"""The five promises of the README, each a test."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from tests.support.cli import run_paceline, run_python

PROGRAM = """
import sys, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
import paceline
torch.manual_seed(3)
X, y = torch.randn(103, 8), torch.randint(3, (103,))
model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
train = DataLoader(TensorDataset(X, y), batch_size=16, shuffle=True)
test = DataLoader(TensorDataset(X, y), batch_size=16, sampler=WeightedRandomSampler(torch.rand(103), 50))
job = paceline.job()
model, opt, train, test = job.adopt(model, opt, train, test)
for epoch in job.epochs(3):
    for xb, yb in train:
        opt.zero_grad()
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        opt.step()
        job.log(loss=loss)
    with job.evaluating(model):
        for xb, yb in test:
            job.count(correct=(model(xb).argmax(-1) == yb).sum(), seen=len(yb))
    job.log(accuracy=job.ratio("correct", "seen"))
torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "draw": torch.rand(3)}, sys.argv[1])
"""

ORIGINAL = [
    ("import paceline\n", ""),
    ("job = paceline.job()\n", ""),
    ("model, opt, train, test = job.adopt(model, opt, train, test)\n", ""),
    ("job.epochs(3)", "range(3)"),
    ("        job.log(loss=loss)\n", ""),
    ("    with job.evaluating(model):\n", "    model.eval()\n    with torch.no_grad():\n"),
    (
        "            job.count(correct=(model(xb).argmax(-1) == yb).sum(), seen=len(yb))\n",
        "            (model(xb).argmax(-1) == yb).sum()\n",
    ),
    ('    job.log(accuracy=job.ratio("correct", "seen"))\n', "    model.train()\n"),
]


def test_1_plain_python_is_the_original_program(tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer state, and the next random number."""
    original = PROGRAM
    for new, old in ORIGINAL:
        assert new in original
        original = original.replace(new, old)
    assert "job" not in original
    assert "paceline" not in original
    results = []
    for name, text in (("adopted", PROGRAM), ("original", original)):
        (tmp_path / f"{name}.py").write_text(text)
        done = run_python(f"{name}.py", f"{name}.pt", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / f"{name}.pt"))
    adopted, first = results
    assert torch.equal(adopted["draw"], first["draw"])
    for key, value in first["model"].items():
        assert torch.equal(adopted["model"][key], value), key
    assert str(adopted["opt"]["param_groups"]) == str(first["opt"]["param_groups"])
    for number, values in first["opt"]["state"].items():
        for key, value in values.items():
            assert torch.equal(adopted["opt"]["state"][number][key], value)


def _run(tmp_path: Path, body: str, n: int, *flags: str) -> str:
    script = tmp_path / "script.py"
    script.write_text("import torch, paceline\nfrom torch import nn\n" + textwrap.dedent(body))
    done = run_paceline("run", script, "-n", str(n), *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


GLOBALS = """
    from torch.utils.data import DataLoader, TensorDataset
    job = paceline.job()
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sched = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
    data = DataLoader(TensorDataset(torch.randn(50, 3)), batch_size=12)
    model, opt, sched, data = job.adopt(model, opt, sched, data)
    for epoch in range(2):
        for (x,) in data:
            job.count(rows=len(x))
            opt.zero_grad(); model(x).mean().backward(); opt.step(); sched.step()
    if job.main:
        c = job.clock
        print(f"batches {len(data)} steps {c.step} samples {c.samples} lr {opt.param_groups[0]['lr']:.6f}")
    job.count(one=1 if job.main else 0)
    rows = job.ratio("rows", "one")
    print(f"rows of all ranks {rows:g}")
"""


def test_2_batch_steps_epochs_and_learning_rate_are_global(tmp_path: Path) -> None:
    for n in (1, 3):
        text = _run(tmp_path, GLOBALS, n)
        assert "batches 5 steps 10 samples 100 lr 0.003125" in text
        assert "rows of all ranks 100\n" in text


GRADIENT = """
    from torch.utils.data import DataLoader, TensorDataset
    torch.set_default_dtype(torch.float64)
    job = paceline.job()
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    reference = nn.Linear(3, 1); reference.load_state_dict(model.state_dict())
    X, tokens = torch.randn(23, 3), torch.arange(23.) % 4
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    data = DataLoader(TensorDataset(X, tokens, torch.arange(23)), batch_size=9)
    model, opt, data = job.adopt(model, opt, data)
    for weighted in (False, True):
        model.zero_grad(); reference.zero_grad()
        for batch, (x, t, i) in enumerate(data):
            def loss(m, x, t):
                per_row = m(x).square().squeeze(-1)
                return (per_row * t).sum() / t.sum().clamp(min=1e-300) if weighted else per_row.mean()
            if weighted:
                job.weight(t.sum())
            loss(model, x, t).backward()
            rows = slice(9 * batch, min(9 * batch + 9, 23))
            loss(reference, X[rows], tokens[rows]).backward()
            worst = max((p.grad - q.grad).abs().max() for p, q in zip(model.parameters(), reference.parameters()))
            assert worst < 1e-12, (weighted, batch, worst)
        opt.step()
    print("exact")
"""


def test_3_backward_yields_the_gradient_of_the_global_batch(tmp_path: Path) -> None:
    """Right after each backward: rows and token weights, an uneven tail, accumulated over batches."""
    for n in (2, 4):
        assert "exact" in _run(tmp_path, GRADIENT, n)


NEVER_COLLECTIVE = """
    from torch.utils.data import DataLoader, TensorDataset
    job = paceline.job()
    model, opt = nn.Linear(3, 1), None
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    model, opt, data = job.adopt(model, opt, DataLoader(TensorDataset(torch.randn(24, 3)), batch_size=6))
    for (x,) in data:
        for i in range(job.rank * 5):
            job.log(mine=i); job.count(calls=1); print("word", i)
        opt.zero_grad(); model(x).mean().backward(); opt.step()
    job.count(ranks=1)
    print("calls per rank", job.ratio("calls", "ranks"))
"""


def test_4_log_count_and_print_are_never_collectives(tmp_path: Path) -> None:
    assert "calls per rank 20.0" in _run(tmp_path, NEVER_COLLECTIVE, 3)


def test_5_nothing_that_changes_the_mathematics_is_silent(tmp_path: Path) -> None:
    """Lower precision is asked for and printed; fewer ranks than asked are refused; the batch is never padded."""
    text = _run(tmp_path, GLOBALS, 2, "--strategy", "ddp(codec=bf16)")
    assert "ddp(codec=bf16)" in text
    assert "bf16" in text.replace("ddp(codec=bf16)", "")
    assert "samples 100" in text
    refused = run_paceline("run", tmp_path / "script.py", "-n", "99999", cwd=tmp_path)
    assert refused.returncode == 2
    assert "PL103" in refused.stdout + refused.stderr
