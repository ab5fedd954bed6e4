"""The models and data of the benchmarks: a tiny one where overhead shows, a wide one where bytes show, and a GPT.

Batches are given per process for the two large ones, so that each rank computes the same at every world size.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

TEMPLATES = Path(__file__).parent.parent / "src" / "paceline" / "launch" / "templates"


@dataclass(frozen=True)
class Workload:
    """What is trained, on what, for how long.

    Attributes:
        model, data, loss: Makers, called after the seed was set. `data` is told the number of rows.
        rows: Global batch for a number of processes.
        steps: Steps of an epoch.
        warm_up, timed: Epochs that do not count, and that do.
        bar: Samples per second, against DDP under plain torchrun, should be at least this many times as many.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], Dataset[tuple[Tensor, Tensor]]]
    loss: Callable[[Tensor, Tensor], Tensor]
    rows: Callable[[int], int]
    steps: int
    warm_up: int
    timed: int
    bar: float


@dataclass(frozen=True)
class Task:
    """Something to learn, small enough to be learned many times.

    Attributes:
        model, loss: Makers, as in :class:`Workload`.
        data: Makes what is trained on, and inputs and targets of the test.
        rows: Of a global batch.
        steps: Global batches, all in one pass: a pass ends with a meeting of all, which would hide who waits for whom.
        lr: Of AdamW.
        row_seconds: How long a row takes to compute, at least.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Dataset[tuple[Tensor, Tensor]], Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    rows: int
    steps: int
    lr: float
    row_seconds: float


def _digits(rows: int) -> Dataset[tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return TensorDataset(x[:rows], y[:rows])


def _small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def _wide_mlp() -> nn.Module:
    """25.2 million parameters."""
    widths = (1024, *(2048,) * 6, 1000)
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers[:-1], layers[-1][0])


def _random_rows(rows: int) -> Dataset[tuple[Tensor, Tensor]]:
    return TensorDataset(torch.randn(rows, 1024), torch.randint(1000, (rows,)))


def _gpt() -> nn.Module:
    """10.5 million parameters: the demo's model, larger."""
    return _language_model().GPT(context=64, width=352, layers=7, heads=8)


def _pieces(rows: int) -> Dataset[tuple[Tensor, Tensor]]:
    lm = _language_model()
    text, _ = lm.read_standard_library(rows * 64 + 1)
    return lm.Pieces(text, 64)


def _bytes_loss(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


def _language_model() -> ModuleType:
    """The template, which is a script and no module of the package."""
    if "lm" not in sys.modules:
        spec = importlib.util.spec_from_file_location("lm", TEMPLATES / "lm.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["lm"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["lm"])
    return sys.modules["lm"]


WORKLOADS = {
    "digits": Workload(
        _small_mlp, _digits, F.cross_entropy, rows=lambda n: 256, steps=5, warm_up=10, timed=500, bar=2.0
    ),
    "mlp25m": Workload(
        _wide_mlp, _random_rows, F.cross_entropy, rows=lambda n: 16 * n, steps=5, warm_up=1, timed=4, bar=1.5
    ),
    "gpt10m": Workload(_gpt, _pieces, _bytes_loss, rows=lambda n: 4 * n, steps=5, warm_up=1, timed=4, bar=1.1),
}


# ---- what convergence is measured with ----------------------------------------------------------------------------------
def _divided_digits() -> tuple[Dataset[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """1,500 digits to train on, and 297 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return TensorDataset(x[:1500], y[:1500]), x[1500:], y[1500:]


def _little_gpt() -> nn.Module:
    """0.1 million parameters."""
    return _language_model().GPT(context=32, width=64, layers=2, heads=2)


def _little_text() -> tuple[Dataset[tuple[Tensor, Tensor]], Tensor, Tensor]:
    lm = _language_model()
    text, other = lm.read_standard_library(400 * 16 * 32 + 1)
    test = lm.Pieces(other[: 256 * 32 + 1], 32)
    x, y = zip(*(test[i] for i in range(256)), strict=True)
    return lm.Pieces(text, 32), torch.stack(x), torch.stack(y)


TASKS = {
    "digits": Task(_small_mlp, _divided_digits, F.cross_entropy, 64, steps=400, lr=1e-3, row_seconds=0.25e-3),
    "gpt": Task(_little_gpt, _little_text, _bytes_loss, 16, steps=400, lr=1e-3, row_seconds=2e-3),
}
