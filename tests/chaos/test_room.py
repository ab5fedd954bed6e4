"""A model whose full state does not fit a control group's memory: trained in pieces, refused whole, before the first step."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import CLI

LIMIT = 2450  # MiB; four interpreters with torch take some 700 to 950, the whole state on four ranks some 2,800 more

SCRIPT = """
import torch, paceline
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(2048, 2048), nn.ReLU()) for _ in range(12)), nn.Linear(2048, 10))
opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
train = DataLoader(TensorDataset(torch.randn(32, 2048), torch.randint(10, (32,))), batch_size=16)
job = paceline.job()
model, opt, train = job.adopt(model, opt, train)
for _ in job.epochs(1):
    for x, y in train:
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
"""


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group that may use LIMIT MiB, of version 1 or 2."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root, limit = (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    if os.geteuid() != 0:
        pytest.skip("control groups are made by root")
    group = root / f"paceline-test-{secrets.token_hex(4)}"
    group.mkdir()
    try:
        (group / limit).write_text(str(LIMIT << 20))
        yield group
    finally:
        group.rmdir()


def run(group: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "script.py").write_text(SCRIPT)
    command = [*CLI, "run", "script.py", "-n", "4", "--workers", "4", "--run-dir", "r", *arguments]
    inside = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(group), *command]
    return subprocess.run(inside, cwd=directory, capture_output=True, text=True, timeout=150, env=dict(os.environ))


def test_pieces_fit_where_the_whole_does_not(control_group: Path, tmp_path: Path) -> None:
    done = run(control_group, tmp_path, "--strategy", "fsdp(build=parts)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "r" / "model.safetensors").stat().st_size > 200_000_000


def test_the_whole_is_refused_with_the_arithmetic(control_group: Path, tmp_path: Path) -> None:
    done = run(control_group, tmp_path, "--strategy", "ddp")
    assert done.returncode == 1, done.stdout + done.stderr
    said = next(line for line in done.stderr.splitlines() if "error[PL511]" in line)
    for part in ("of parameters on 4 ranks", "for gradients", "for AdamW", "are left"):
        assert part in said
    assert '"kind": "step"' not in (tmp_path / "r" / "events" / "worker-0.jsonl").read_text()
