"""Ranks do without torch's compiler until something is compiled, and then have all of it."""

from __future__ import annotations

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
    assert torch.allclose(compiled(x), model(x), atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    optimizer.load_state_dict(state)
    import torch._dynamo.config
    assert torch._dynamo.config.cache_size_limit > 0
    assert sys.modules["torch._dynamo"].__file__
"""


def test_the_compiler_comes_when_it_is_needed_and_computes_the_same(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launched = run_paceline("run", script, "-n", "1", cwd=tmp_path)
    assert launched.returncode == 0, launched.stdout + launched.stderr
