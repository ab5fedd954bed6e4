"""What users get wrong, and what happens to them: every run ends by itself, says the cause, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support.breadth import more
from tests.support.cli import CLI, run_command, run_paceline

PRELUDE = """
import os, signal, sys, torch, paceline
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
torch.manual_seed(0)
job = paceline.job()
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
opt = torch.optim.SGD(model.parameters(), lr=0.1)
data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(2, (64,))), batch_size=8, shuffle=True)
def step(x, y):
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(body: str) -> Path:
        script = tmp_path / "script.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        return script

    return write


def run(script: Path, *flags: str, n: int = 3, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return run_paceline("run", script, "-n", str(n), *flags, cwd=script.parent, timeout=timeout)


def line_of(script: Path, text: str) -> int:
    return next(i for i, line in enumerate(script.read_text().splitlines(), 1) if text in line)


def test_exception_on_one_rank(write: Callable[[str], Path]) -> None:
    script = write("""
        model, opt, data = job.adopt(model, opt, data)
        for i, (x, y) in enumerate(data):
            if job.rank == 1 and i == 3:
                raise KeyError("the one that matters")
            step(x, y)
    """)
    done = run(script)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "PL503" in text
    assert "the one that matters" in text
    assert (
        f"script.py:{line_of(script, 'raise KeyError')}" in text or f"line {line_of(script, 'raise KeyError')}" in text
    )
    assert "PL403" not in text.split("the one that matters")[-1], "the cause comes last, witnesses before it"


def test_killed_rank_ends_the_run(write: Callable[[str], Path]) -> None:
    script = write("""
        model, opt, data = job.adopt(model, opt, data)
        for epoch in job.epochs(1000):
            for i, (x, y) in enumerate(data):
                if job.rank == 2 and epoch == 1 and i == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                step(x, y)
    """)
    done = run(script, "--workers", "3")
    text = done.stdout + done.stderr
    assert done.returncode == 3, text
    assert "PL502" in text
    assert "rank 2" in text


def test_rank_that_leaves_early(write: Callable[[str], Path]) -> None:
    script = write("""
        model, opt, data = job.adopt(model, opt, data)
        for i, (x, y) in enumerate(data):
            if job.rank == 0 and i == 4:
                break
            step(x, y)
    """)
    done = run(script)
    text = done.stdout + done.stderr
    assert done.returncode == 4, text
    assert "PL501" in text


def test_optimizer_steps_on_rank_0_only(write: Callable[[str], Path]) -> None:
    script = write("""
        model, opt, data = job.adopt(model, opt, data)
        for x, y in data:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if job.main:
                opt.step()
    """)
    done = run(script)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "PL401" in text
    assert "rank 0 has applied 1" in text


def test_collective_on_rank_0_only(write: Callable[[str], Path]) -> None:
    script = write("""
        model, opt, data = job.adopt(model, opt, data)
        for i, (x, y) in enumerate(data):
            step(x, y)
            if job.main and i == 2:
                with job.evaluating(model):
                    pass
    """)
    done = run(script)
    text = done.stdout + done.stderr
    assert done.returncode == 4, text
    assert "PL505" in text
    assert "evaluating" in text
    assert "backward" in text


def test_two_different_collectives(write: Callable[[str], Path]) -> None:
    script = write("""
        model, opt, data = job.adopt(model, opt, data)
        job.count(a=1, b=2)
        if job.rank == 1:
            job.ratio("b", "a")
        else:
            job.ratio("a", "b")
    """)
    done = run(script)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "PL402" in text
    assert "ratio b/a" in text


@pytest.mark.parametrize(
    "difference",
    [
        "if job.rank == 1: model.add_module('extra', nn.Linear(2, 2))",
        *more(
            "model = nn.Sequential(*reversed([nn.Linear(4, 4), nn.Linear(4, 4, bias=job.rank != 2)]))",
            "opt = torch.optim.SGD(model.parameters(), lr=0.1 + job.rank)",
        ),
    ],
)
def test_different_models(write: Callable[[str], Path], difference: str) -> None:
    script = write(
        f"{difference}\njob.adopt(model, torch.optim.SGD(model.parameters(), 0.1) if 'opt' not in {difference!r} else opt)"
    )
    done = run(script)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "PL303" in text


def test_script_that_never_adopts(write: Callable[[str], Path]) -> None:
    done = run(write("print('hello')"), n=2)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "PL102" in text


def test_loader_that_raises(write: Callable[[str], Path]) -> None:
    script = write("""
        class Bad(Dataset):
            def __len__(self): return 64
            def __getitem__(self, i):
                if i == 33: raise IndexError("augmentation went out of range")
                return torch.randn(4), i % 2
        data = DataLoader(Bad(), batch_size=8)
        model, opt, data = job.adopt(model, opt, data)
        for x, y in data:
            step(x, y)
    """)
    done = run(script)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "augmentation went out of range" in text
    assert "PL307" in text


def test_nan_is_reported_with_step_and_rows_and_goes_on(write: Callable[[str], Path]) -> None:
    script = write("""
        X = torch.randn(64, 4); X[19] = float("nan")
        data = DataLoader(TensorDataset(X, torch.randint(2, (64,))), batch_size=8)
        model, opt, data = job.adopt(model, opt, data)
        for x, y in data:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if all(torch.isfinite(p.grad).all() for p in model.parameters()):
                opt.step()
            opt.zero_grad()
        print("steps", job.clock.step)
    """)
    done = run(script)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "PL409" in text
    assert "step 3" in text
    assert "19" in text
    assert "steps 7" in text

    stopped = run(script, "--stop-on-nan")
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "PL409" in stopped.stdout + stopped.stderr


def test_parameter_that_is_unfrozen_later_is_refused(write: Callable[[str], Path]) -> None:
    """Its gradient would stay this rank's own, and nobody would know."""
    script = write("""
        model[0].requires_grad_(False)
        model, opt, data = job.adopt(model, opt, data)
        for i, (x, y) in enumerate(data):
            if i == 3:
                model[0].requires_grad_(True)
            step(x, y)
    """)
    done = run(script, n=2)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PL304" in done.stdout + done.stderr


def test_closure_and_lbfgs_are_refused(write: Callable[[str], Path]) -> None:
    script = write("""
        from paceline import PacelineError
        try:
            job.adopt(torch.optim.LBFGS(model.parameters()))
        except PacelineError as e:
            print("adopt", e.code)
        model, opt, data = job.adopt(model, opt, data)
        def closure():
            opt.zero_grad(); loss = model(torch.randn(2, 4)).sum(); loss.backward(); return loss
        try:
            opt.step(closure)
        except PacelineError as e:
            print("step", e.code)
        for thing, other in [(3, None), (model, None), (torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), None)]:
            try:
                job.adopt(thing)
            except PacelineError as e:
                print("thing", e.code)
    """)
    done = run(script, n=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("adopt PL302", "step PL302", "thing PL301", "thing PL309", "thing PL304"):
        assert said in done.stdout, (said, done.stdout)


@pytest.mark.parametrize(
    ("flags", "code", "hint"),
    [
        (("--strategy", "dpp()"), "PL201", "ddp"),
        (("--strategy", "ddp("), "PL202", "^"),
        (("--strategy", "ddp(codek=bf16)"), "PL203", "codec"),
        (("--strategy", "ddp() * ddp()"), "PL204", ""),
        (("-n", "0"), "PL103", ""),
        (("-n", "100000"), "PL103", ""),
        (("--wire", "pigeon"), "PL105", "shm"),
    ],
)
def test_refused_before_anything_starts(
    write: Callable[[str], Path], flags: tuple[str, ...], code: str, hint: str
) -> None:
    script = write("print('started')")
    done = run_paceline("run", script, "-n", "2", *flags, cwd=script.parent, timeout=20)
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    assert code in text
    assert hint in text
    assert "started" not in text


def test_missing_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    done = run_paceline("run", "trian.py", "-n", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "PL101" in done.stdout + done.stderr
    assert "train.py" in done.stdout + done.stderr, "did you mean"


def test_full_disk_under_the_run_directory(write: Callable[[str], Path], tmp_path: Path) -> None:
    """Training goes on without its files, and says so once."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], check=True)
    try:
        script = write("""
            model, opt, data = job.adopt(model, opt, data)
            for _ in job.epochs(150):
                for x, y in data:
                    step(x, y)
                    job.log(loss=1.0)
            print("steps", job.clock.step)
        """)
        done = run(script, "--run-dir", str(mount / "run"), n=2)
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
    text = done.stdout + done.stderr
    assert "steps 1200" in text, text
    assert "PL601" in text
    assert "Traceback" not in text
    assert done.returncode == 0


def test_unwritable_run_directory_is_refused(write: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(write("print('started')"), "--run-dir", str(tmp_path / "file" / "run"), n=2)
    assert done.returncode == 2
    assert "PL601" in done.stdout + done.stderr


def test_shared_memory_exhaustion(write: Callable[[str], Path]) -> None:
    script = write("""
        model = nn.Linear(4096, 4096)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        job.adopt(model, opt)
    """)
    limited = f"ulimit -f 4096; exec {' '.join(CLI)} run {script} -n 2"  # in KiB: no file, named or not, beyond 4 MiB
    done = run_command(("bash", "-c", limited), cwd=script.parent, timeout=60)
    text = done.stdout + done.stderr
    assert done.returncode in (1, 2), text
    assert "PL405" in text


def test_descriptor_exhaustion(write: Callable[[str], Path]) -> None:
    """No descriptors are left for the sockets of the point-to-point wire."""
    script = write("""
        import resource
        if job.rank == 0:
            used = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, used + 2))
        model, opt, data = job.adopt(model, opt, data)
    """)
    done = run(script, "--wire", "torch", n=2)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "PL407" in text


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_the_launcher_leaves_nothing(write: Callable[[str], Path], sig: signal.Signals, tmp_path: Path) -> None:
    script = write("""
        model, opt, data = job.adopt(model, opt, data)
        for epoch in job.epochs(10**9):
            for x, y in data:
                step(x, y)
            if epoch == 0:
                print("first epoch done", flush=True)
    """)
    process = subprocess.Popen(
        [*CLI, "run", str(script), "-n", "2", "--run-dir", str(tmp_path / "run")],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "first epoch done" in line:
                break
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.send_signal(sig)
        process.stdout.read()
        status = process.wait(timeout=15)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sig]
    if sig != signal.SIGKILL:
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["state"] == "stopped"
        proved = run_paceline("verify", "ledger", tmp_path / "run", cwd=tmp_path)
        assert proved.returncode == 0, proved.stdout
