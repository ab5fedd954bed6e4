"""Ranks do without torch's compiler until something is compiled, and then have all of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from support.cli import run_paceline

SCRIPT = """
    import sys

    import torch

    import paceline

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    job = paceline.job()
    model, optimizer = job.adopt(model, optimizer)
    x = torch.ones(8, 4, dtype=torch.float64)

    def train(forward):
        optimizer.zero_grad()
        forward(x).pow(2).mean().backward()
        optimizer.step()

    train(model)
    assert not any(name.startswith("torch._dynamo.") for name in sys.modules), "nothing was compiled"
    state = optimizer.state_dict()
    compiled = torch.compile(model, backend="eager")
    train(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    optimizer.load_state_dict(state)
    import torch._dynamo.config
    assert torch._dynamo.config.cache_size_limit > 0
    assert sys.modules["torch._dynamo"].__file__
    torch.compile(optimizer.step, backend="eager")()
    if job.main:
        print("weight", model[0].weight[0, 0].item())
"""


def test_the_compiler_comes_when_it_is_needed_and_computes_the_same(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launched = run_paceline("run", script, "-n", "1", cwd=tmp_path)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    plain = script.read_text().replace("assert not any(name", "assert True or not any(name")
    script.write_text(plain)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (number,) = [line.split("weight ")[1] for line in done.stdout.splitlines() if "weight " in line]
    assert f"weight {number}" in launched.stdout
