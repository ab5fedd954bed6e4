"""``paceline.launch`` with parameter servers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline.terms.errors import PacelineError
from support.breadth import more


def train(epochs: int, fails: bool = False) -> list[float]:
    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=torch.float64)
    model = torch.nn.Linear(8, 1).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, shuffle=True)
    job = paceline.job()
    model, opt, loader = job.adopt(model, opt, loader)
    for _ in job.epochs(epochs):
        for a, b in loader:
            opt.zero_grad()
            F.mse_loss(model(a), b).backward()
            opt.step()
            if fails:
                raise ValueError("as it was told to")
    return [float(value) for value in model.weight.detach().view(-1)]


@pytest.mark.parametrize("strategy", ["ps(servers=2, replicas=2)", *more("ps()", "ps(backup=1)")])
def test_a_function_with_servers_returns_what_one_process_would(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    got = paceline.launch(train, n=2, strategy=strategy, epochs=3)
    want = train(3)
    assert len(got) == 2
    assert all(value == pytest.approx(w, abs=1e-9) for each in got for value, w in zip(each, want, strict=True))
    assert not list(tmp_path.glob("paceline-*")), "it leaves nothing behind"


def test_its_error_is_raised() -> None:
    with pytest.raises(PacelineError, match="as it was told to"):
        paceline.launch(train, n=2, strategy="ps()", epochs=1, fails=True)
