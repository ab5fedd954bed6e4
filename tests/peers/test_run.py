"""``paceline run`` with a training loop: one wire after the other, ends at step boundaries, early leavers."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.launch.cli import main
from support.background import running
from support.cli import run_command, run_paceline, show

SCRIPT = """
import argparse
import torch, paceline
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--leaves", type=int, default=-1)
parser.add_argument("--spoils", type=int, default=-1)
args = parser.parse_args()
torch.manual_seed(0)
x, y = torch.randn(48, 8), torch.randn(48, 1)
model = torch.nn.Linear(8, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
train = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
job = paceline.job("ddp(codec=bf16)")
model, opt, train = job.adopt(model, opt, train)
for epoch in job.epochs(args.epochs):
    for xb, yb in train:
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(model(xb), yb)
        loss.backward()
        opt.step()
        job.log(loss=loss)
        print("in the loop")
    if job.rank == args.leaves:
        break
if job.rank == args.spoils:
    torch.nn.init.zeros_(model.weight)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text(SCRIPT)
    return "train.py"


def record(tmp_path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "runs" / name / "run.json").read_text())
    return found


def test_shared_memory_leaves_a_proof_and_weights(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    done = run_paceline("run", script, "-n", "2", "--strategy", "ddp", "--name", "a", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    assert "strategy ddp() · wire shm" in done.stdout
    assert "--strategy ddp() overrides the script's ddp(codec=bf16)" in done.stdout + done.stderr
    assert "finished in" in done.stdout.splitlines()[-1]
    kept = record(tmp_path, "a")
    assert (kept["state"], kept["strategy"], kept["wire"]) == ("finished", "ddp()", "shm")
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "ledger", "a"]) == 0
    assert main(["verify", "ledger", "a", "--format", "json"]) == 0
    assert main(["hash", "a"]) == 0
    assert main(["hash", "a/../runs/a/model.safetensors"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[1])["problems"] == []
    assert len(lines[2]) == 64
    ledger = tmp_path / "runs" / "a" / "ledger" / "worker-1.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[1:]))
    assert main(["verify", "ledger", "a"]) == 1
    assert "PL602" in capsys.readouterr().out


def test_c10d_without_an_open_port_of_ours(script: str, tmp_path: Path) -> None:
    done = run_paceline("run", script, "-n", "2", "--wire", "torch", "--name", "a", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    assert "strategy ddp(codec=bf16) · wire torch" in done.stdout
    endpoints = json.loads((tmp_path / "runs" / "a" / "endpoints.json").read_text())
    assert [e["name"] for e in endpoints] == ["worker-0", "worker-1"]
    assert all(e["address"].startswith("127.0.0.1:") for e in endpoints)


def test_one_process_is_a_run_too(script: str, tmp_path: Path) -> None:
    done = run_paceline("run", script, "--name", "a", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    assert record(tmp_path, "a")["wire"] == "solo"


def test_ctrl_c_ends_at_a_step_boundary(script: str, tmp_path: Path) -> None:
    with running(script, "-n", "2", "--name", "a", "--", "--epochs", "100000", cwd=tmp_path) as run:
        run.until("in the loop")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
    assert "stopping at the next step; press again to stop now" in run.text
    assert record(tmp_path, "a")["state"] == "stopped"
    assert (tmp_path / "runs" / "a" / "model.safetensors").is_file()
    assert "error" not in run.text


def test_a_rank_that_leaves_its_loop_is_named(script: str, tmp_path: Path) -> None:
    done = run_paceline("run", script, "-n", "2", "--name", "a", "--", "--leaves", "1", cwd=tmp_path)
    assert done.returncode == 4, show(done)
    assert "error[PL501]: rank 1 ended its script" in done.stderr
    assert record(tmp_path, "a")["state"] == "failed"


def test_ranks_that_end_with_different_parameters_are_named(script: str, tmp_path: Path) -> None:
    done = run_paceline("run", script, "-n", "2", "--", "--spoils", "1", cwd=tmp_path)
    assert done.returncode == 4, show(done)
    assert "error[PL507]: the hashes of the parameters are rank 0: " in done.stderr


def test_torchrun_starts_the_same_script(script: str, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    done = run_command(torchrun, cwd=tmp_path, timeout=120, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, show(done)
    assert "in the loop" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_ranks_with_the_classic_variables_find_each_other(script: str, tmp_path: Path) -> None:
    """As under Kubeflow or a shell script: nobody serves a store, so rank 0 does, on the address given and no other."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    starter = (
        "import os, subprocess, sys\n"
        "def start(rank): return subprocess.Popen([sys.executable, 'train.py'], env={**os.environ, 'RANK': str(rank), 'LOCAL_RANK': str(rank)})\n"
        "sys.exit(max([p.wait() for p in [start(0), start(1)]]))\n"
    )
    environ = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = run_command(
        (sys.executable, "-c", starter), cwd=tmp_path, timeout=120, env=environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, show(done)
    assert os.listdir(tmp_path) == ["train.py"]
