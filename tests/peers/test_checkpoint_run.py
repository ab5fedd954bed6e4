"""Checkpoints of whole runs: whoever dies, the run goes on saving; however it ends, it can be gone on with."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from paceline.launch.commands import checkpoint as command
from paceline.train.checkpoint_files import candidates
from support.background import running
from support.checkpoints import small
from support.cli import run_paceline, show
from tests.peers.test_launch import read

SCRIPT = """
import os, signal, sys, time
import torch, torch.nn.functional as F, paceline
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(7)
x = torch.randn(203, 6)
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 2))
opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
train = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=20, shuffle=True)
first = not os.environ.get("AGAIN")
job = paceline.job()
name = job._place.name
model, opt, train = job.adopt(model, opt, train)
for epoch in job.epochs(int(sys.argv[1])):
    for xb, yb in train:
        opt.zero_grad()
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        time.sleep(0.005)
        if first and name == "worker-0" and job.clock.step == 33:
            os.kill(os.getpid(), signal.SIGKILL)
        if job.main and job.clock.step % 10 == 0:
            print(f"step {job.clock.step}.", flush=True)
if job.main:
    print(f"ended with {job.clock.samples} rows.")
"""


def verified(run: Path, *what: str) -> None:
    for kind in what:
        done = run_paceline("verify", kind, run, cwd=run.parent)
        assert done.returncode == 0, show(done)


def saved(run: Path) -> dict[int, str]:
    """Who has saved which step."""
    lines = [json.loads(line) for file in run.glob("**/events/*.jsonl") for line in file.read_text().splitlines()]
    return {line["step"]: line["name"] for line in lines if line["kind"] == "save"}


@pytest.mark.timeout(240)
def test_the_first_rank_dies_then_the_launcher_and_the_run_is_gone_on_with(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = tmp_path / "run"
    flags = (str(script), "-n", "3", "--run-dir", str(run), "--checkpoint", "every=10,busy=wait", "--resume", "auto")
    with running(*flags, "--", "1000", cwd=tmp_path) as first:
        first.until("step 70.")
        pids = [entry["pid"] for entry in read(run / "processes.json")]  # type: ignore[union-attr, index]
        first.launcher.kill()
        first.launcher.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.02)
    writers = saved(run)
    assert writers.pop(20, "worker-0") == "worker-0"
    assert "worker-1" in writers.values()
    kept = [path.name for path in candidates(run / "checkpoints")]
    assert kept
    verified(run, "checkpoint")
    alone = run_paceline(
        "run", *flags[:1], "--run-dir", run, "--resume", "auto", "--", "9", cwd=tmp_path, env={"AGAIN": "1"}
    )
    assert alone.returncode == 0, show(alone)
    assert f"ended with {9 * 203} rows" in alone.stdout
    verified(run, "ledger", "checkpoint")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_run_that_is_asked_to_end_saves_first(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = tmp_path / "run"
    flags = (str(script), "-n", "2", "--workers", "2", "--run-dir", str(run), "--checkpoint", "every=1h")
    monkeypatch.setenv("AGAIN", "1")
    with running(*flags, "--", "1000", cwd=tmp_path) as training:
        training.until("step 20.")
        began = time.monotonic()
        training.launcher.send_signal(number)
        assert training.end() == code, training.text
        assert time.monotonic() - began < 5.0
    (path,) = candidates(run / "checkpoints")
    state = [json.loads(line) for line in (run / "events" / "worker-0.jsonl").read_text().splitlines()]
    assert path.name == f"step-{next(line['step'] for line in state if line['kind'] == 'end'):08d}"
    verified(run, "checkpoint")
    assert run_paceline("hash", path, cwd=tmp_path).stdout == run_paceline("hash", run, cwd=tmp_path).stdout


# ---- the formats of others ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["torch", "dcp"])
def test_export_and_import(to: str, tmp_path: Path) -> None:
    path = small(tmp_path / "checkpoints")
    done = run_paceline("checkpoint", "export", path, tmp_path / "out", "--to", to, "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    assert "only from sources that you trust" in json.loads(done.stdout)["note"]
    again = run_paceline("checkpoint", "export", path, tmp_path / "out", cwd=tmp_path)
    assert (again.returncode, "PL105" in again.stderr) == (2, True), show(again)
    if to == "dcp":
        assert (tmp_path / "out" / ".metadata").exists()
        return
    found = torch.load(tmp_path / "out", weights_only=True)
    torch.nn.Linear(4, 8).load_state_dict(found["model"])
    done = run_paceline("checkpoint", "import", tmp_path / "out", tmp_path / "back", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    assert "nothing in it was run" in done.stdout
    hashes = [run_paceline("hash", p, cwd=tmp_path).stdout for p in (path, tmp_path / "back" / path.name)]
    assert hashes[0] == hashes[1] != ""


def test_exported_optimizers_are_torchs(tmp_path: Path) -> None:
    """Their state goes into an optimizer of plain torch."""
    from paceline.train import tree as trees
    from paceline.train.tree import Things

    model = torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    models = {"model": model}
    tree = trees.capture(Things(models=models, optimizers={"0": opt}, names=trees.names_of(models)))
    exported = command._as_torch(tree)
    other = torch.optim.AdamW(model.parameters(), lr=0.5)
    other.load_state_dict(exported["optimizers"][0])
    assert other.param_groups[0]["lr"] == 0.1
    assert torch.equal(other.state[model.weight]["exp_avg"], opt.state[model.weight]["exp_avg"])


class Evil:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.trace),)


def test_a_file_that_would_run_something_is_not_imported(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"weight": torch.zeros(2), "evil": Evil(trace)}, tmp_path / "evil.pt")
    (tmp_path / "garbage.pt").write_bytes(b"\x00" * 100)
    torch.save({"a": 1}, tmp_path / "nothing.pt")
    for name in ("evil.pt", "garbage.pt", "nothing.pt"):
        done = run_paceline("checkpoint", "import", tmp_path / name, tmp_path / "out", cwd=tmp_path)
        assert (done.returncode, "PL615" in done.stderr) == (2, True), show(done)
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


def test_weights_of_others_begin_a_run(tmp_path: Path) -> None:
    """A plain state_dict, imported: the model is it, everything else begins afresh."""
    (tmp_path / "train.py").write_text(
        "import torch, paceline\n"
        "model = torch.nn.Linear(4, 2)\n"
        "opt = torch.optim.SGD(model.parameters(), lr=0.0)\n"
        "job = paceline.job()\n"
        "model, opt = job.adopt(model, opt)\n"
        "for _ in range(3):\n"
        "    opt.zero_grad(); model(torch.ones(5, 4)).sum().backward(); opt.step()\n"
    )
    torch.save({"state_dict": torch.nn.Linear(4, 2).state_dict()}, tmp_path / "theirs.pt")
    done = run_paceline("checkpoint", "import", tmp_path / "theirs.pt", tmp_path / "weights", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    flags = ("--resume", "weights", "--checkpoint", "every=1", "--name", "mine")
    done = run_paceline("run", "train.py", "-n", "2", *flags, cwd=tmp_path)
    assert done.returncode == 0, show(done)
    paths = (tmp_path / "weights" / "step-00000000", tmp_path / "runs" / "mine" / "checkpoints" / "step-00000003")
    hashes = [run_paceline("hash", path, cwd=tmp_path).stdout for path in paths]
    assert hashes[0] == hashes[1] != ""
