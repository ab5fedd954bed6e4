"""Runs with parameter servers against plain PyTorch: real processes, float64."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.group.secure import connect
from paceline.train.talk import CAPS, Say
from parity.server_case import Model
from support.breadth import more
from support.cli import CLI, dump_and_kill, run_paceline, run_python, show

CASE = Path(__file__).with_name("server_case.py")
SPARSE = Path(__file__).with_name("sparse_case.py")
MISTAKES = Path(__file__).with_name("server_mistakes.py")
ABSOLUTE = 1e-9  # float64; parts of a batch are added in another order than one process adds its rows


def plain(where: Path, *arguments: str) -> dict[str, torch.Tensor]:
    """What plain ``python`` arrives at."""
    out = where / "plain.pt"
    done = run_python(CASE, *arguments, "--out", out, cwd=where, timeout=100)
    assert done.returncode == 0, done.stderr
    found: dict[str, torch.Tensor] = torch.load(out)
    return found


def served(where: Path, strategy: str, n: int, *arguments: str) -> tuple[dict[str, torch.Tensor], str, Path]:
    """What a run arrives at, what it said, and its directory; its ledger is proved and all workers end with the same bits."""
    out, run = where / "served.pt", where / "run"
    shutil.rmtree(run, ignore_errors=True)
    flags = ("-n", str(n), "--strategy", strategy, "--run-dir", run)
    done = run_paceline("run", CASE, *flags, "--", *arguments, "--out", out, cwd=where, timeout=150)
    assert done.returncode == 0, show(done)
    proved = run_paceline("verify", "ledger", run, cwd=where)
    assert proved.returncode == 0, show(proved)
    ends = events(run, "worker-*", "end")
    assert len({end["hash"] for end in ends}) == 1
    found: dict[str, torch.Tensor] = torch.load(out)
    return found, done.stdout, run


def events(run: Path, who: str, kind: str) -> list[dict[str, Any]]:
    files = sorted((run / "events").glob(f"{who}.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [
        ("ps()", ("--accumulate", "3")),
        ("ps(servers=2)", ("--optimizer", "sgd", "--evaluate")),
        ("ps(servers=2, backup=1)", ("--by-hand",)),
        *more(
            ("ps(where=host)", ("--evaluate",)),
            ("ps()", ("--workers", "2")),
            ("ps(backup=2)", ("--accumulate", "2")),
            ("ps(servers=3)", ("--by-hand",)),
        ),
    ],
)
def test_synchronous_servers_do_what_one_process_does(
    strategy: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    want = plain(tmp_path, *arguments)
    got, _, _ = served(tmp_path, strategy, 3, *arguments)
    assert furthest(want, got) <= ABSOLUTE


@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [
        ("ps(staleness=inf, late=dc(0.04))", ("--evaluate", "--workers", "2")),
        ("ps(servers=2, replicas=2)", ("--norm", "--evaluate")),
        *more(("ps(servers=2, staleness=2, late=damp(inverse))", ("--accumulate", "2"))),
        *more(
            ("hogwild()", ()),
            ("ps()", ("--norm",)),
            ("ps(staleness=inf, late=dc(memory=0.95), replicas=2)", ("--norm",)),
            ("ps(staleness=1, late=dc(memory=0.95))", ()),
            ("ps(staleness=inf, late=damp(hinge))", ()),
        ),
    ],
)
def test_one_worker_of_anything_is_the_plain_loop(strategy: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    want = plain(tmp_path, *arguments)
    got, _, _ = served(tmp_path, strategy, 1, *arguments)
    assert furthest(want, got) == 0.0


@pytest.mark.parametrize("optimizer", ["adagrad", *more("sgd")])
def test_rows_of_a_sparse_gradient_are_those_of_the_dense_one(optimizer: str, tmp_path: Path) -> None:
    """Pushed and pulled by row, over three workers and two servers."""
    done = run_python(SPARSE, "dense", optimizer, tmp_path / "plain.pt", cwd=tmp_path, timeout=60)
    assert done.returncode == 0, show(done)
    flags = ("-n", "3", "--strategy", "ps(servers=2)", "--run-dir", tmp_path / "run")
    done = run_paceline("run", SPARSE, *flags, "--", "sparse", optimizer, tmp_path / "out.pt", cwd=tmp_path, timeout=90)
    assert done.returncode == 0, show(done)
    assert furthest(torch.load(tmp_path / "plain.pt"), torch.load(tmp_path / "out.pt")) <= ABSOLUTE


@pytest.mark.long
def test_one_worker_whose_drift_is_taken_whole_is_the_plain_loop(tmp_path: Path) -> None:
    """theta - (theta - phi) is phi up to one rounding."""
    want = plain(tmp_path, "--accumulate", "2", "--evaluate")
    strategy = "async_diloco(every=4, lr=1, momentum=0, servers=2)"
    got, _, _ = served(tmp_path, strategy, 1, "--accumulate", "2", "--evaluate")
    assert furthest(want, got) <= ABSOLUTE


@pytest.mark.parametrize(
    "strategy",
    [
        "async_diloco(every=3, lr=1, momentum=0, delay=1, by_speed=True)",
        "adpsgd()",
        *more("async_easgd(every=3)", "hogwild()"),
    ],
)
def test_workers_that_step_by_themselves_train_every_row_once(strategy: str, tmp_path: Path) -> None:
    """The ledger is proved, all end with the same parameters, and they are better than those of the beginning."""
    got, _, _ = served(tmp_path, strategy, 3, "--epochs", "6", "--evaluate")
    torch.manual_seed(7)  # as the case does
    assert loss_of(got) < loss_of(Model().double().state_dict())


def loss_of(parameters: dict[str, torch.Tensor]) -> float:
    """On the rows that the case trains on."""
    model = Model().double()
    model.load_state_dict(parameters)
    data = torch.Generator().manual_seed(1)
    x = torch.randn(203, 10, dtype=torch.float64, generator=data)
    y = torch.randint(0, 4, (203,), generator=data)
    return float(torch.nn.functional.cross_entropy(model(x), y).detach())


def test_nothing_is_staler_than_the_bound_and_all_is_told(tmp_path: Path) -> None:
    """A tick may be begun `s` ahead of the slowest, so at most 2s + 1 updates of each other worker come in between."""
    _, said, run = served(tmp_path, "ps(staleness=1)", 4, "--pause", "0.003", "--evaluate")
    histogram = events(run, "server-0", "staleness")[-1]["histogram"]
    taus = {int(tau): count for counts in histogram.values() for tau, count in counts.items()}
    assert max(taus) <= 3 * (2 * 1 + 1)
    assert sum(sum(counts.values()) for counts in histogram.values()) == 3 * 7
    assert "staleness, in updates by others" in said


def test_what_all_evaluate_is_one_model(tmp_path: Path) -> None:
    """The rows of the test set are divided among workers that have read the same parameters."""
    got, said, _ = served(tmp_path, "ps(staleness=inf)", 3, "--evaluate", "--epochs", "2")
    model_right = [line for line in said.splitlines() if "epoch 1 right" in line]
    assert len(model_right) == 1

    model = Model().double()
    model.load_state_dict(got)
    data = torch.Generator().manual_seed(1)
    x = torch.randn(203, 10, dtype=torch.float64, generator=data)
    y = torch.randint(0, 4, (203,), generator=data)
    right = float((model(x).argmax(-1) == y).double().mean())
    assert f"right {right:.6f}" in model_right[0]


# ---- mistakes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("case", "strategy", "code", "words"),
    [
        ("in the script", "ddp()", "PL209", "0 servers were started"),
        ("stream", "ps()", "PL305", "can only be walked"),
        ("nan", "ps()", "PL409", "weight is not finite"),
        *more(
            ("schedule", "ps(staleness=inf)", "PL463", "schedule that was not adopted"),
            ("models differ", "ps()", "PL303", "other models"),
            ("scaler", "ps()", "PL463", "GradScaler"),
            ("two optimizers", "hogwild()", "PL463", "several optimizers"),
            ("closure", "ps()", "PL302", "closure"),
        ),
    ],
)
def test_what_cannot_work_is_refused(case: str, strategy: str, code: str, words: str, tmp_path: Path) -> None:
    flags = ("-n", "1", "--run-dir", tmp_path / "run")
    if strategy != "ddp()":
        flags = (*flags, "--strategy", strategy)
    done = run_paceline("run", MISTAKES, *flags, "--", *case.split(), cwd=tmp_path, timeout=60)
    assert done.returncode in (1, 3), show(done)
    assert code in done.stdout + done.stderr, show(done)
    assert words in done.stdout + done.stderr, show(done)


def test_nonsense_from_somebody_who_knows_the_secret_is_refused_and_nothing_else_happens(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--run-dir", str(run), "-n", "2", "--strategy", "ps(staleness=2)")
    script = ("--pause", "0.02", "--epochs", "5", "--out", str(tmp_path / "served.pt"))
    command = (*CLI, "run", str(CASE), *flags, "--", *script)
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            wait_for_updates(run, 5, process)
            secret = bytes.fromhex((run / "secret").read_text())
            entries = json.loads((run / "endpoints.json").read_text())
            address = next(entry["address"] for entry in entries if entry["purpose"] == "parameters")
            for meta in (
                {},
                {"name": "worker-0", "is": "", "handle": "/etc/passwd"},
                {"name": "worker-9", "is": "something else", "handle": ""},
            ):
                with connect(address, secret, "worker-9", caps=CAPS) as connection:
                    connection.send(Say.ATTACH, meta)
                    assert connection.recv().meta["code"] in ("PL462", "PL303")
            said, _ = process.communicate(timeout=100)
        except BaseException:
            dump_and_kill(process.pid)
            raise
    assert process.returncode == 0, said
    assert run_paceline("verify", "ledger", run, cwd=tmp_path).returncode == 0


# ---- losses -------------------------------------------------------------------------------------------------------------
def kill(run: Path, name: str) -> None:
    """SIGKILL to a process of a run."""
    listed = json.loads((run / "processes.json").read_text())
    os.kill(next(entry["pid"] for entry in listed if entry["name"] == name), signal.SIGKILL)


def disturbed(where: Path, strategy: str, victim: str, after: int, *flags: str, also: str = "") -> tuple[str, Path]:
    """A run of three workers in which `victim` is killed when `after` updates were applied; what it said, and its directory.

    Args:
        also: Another victim, some updates later.
    """
    run = where / "run"
    arguments = ("--run-dir", str(run), "-n", "3", "--strategy", strategy, *flags)
    script = ("--pause", "0.02", "--epochs", "8", "--out", str(where / "served.pt"))
    command = (*CLI, "run", str(CASE), *arguments, "--", *script)
    with subprocess.Popen(
        command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            wait_for_updates(run, after, process)
            kill(run, victim)
            if also:
                wait_for_updates(run, after + 4, process)
                kill(run, also)
            said, _ = process.communicate(timeout=120)
        except BaseException:
            dump_and_kill(process.pid)
            raise
    assert process.returncode == 0, said
    proved = run_paceline("verify", "ledger", run, cwd=where)
    assert proved.returncode == 0, show(proved)
    return said, run


def wait_for_updates(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while committed(run) < count:
        assert process.poll() is None, "the run ended before that"
        assert time.monotonic() < deadline, "the run did not come so far"
        time.sleep(0.01)


def committed(run: Path) -> int:
    """Updates in the ledgers of a run so far."""
    lines = [line for file in (run / "ledger").glob("server-*.jsonl") for line in file.read_bytes().split(b"\n")]
    return sum(line.startswith(b'{"k":"c"') for line in lines)


@pytest.mark.parametrize("victim", ["server-1", *more("worker-1", "server-0", "worker-0")])
def test_a_killed_process_changes_nothing(victim: str, tmp_path: Path) -> None:
    """The rows of a killed worker are trained by others; servers take over from the last checkpoint."""
    want = plain(tmp_path, "--epochs", "8")
    said, _ = disturbed(tmp_path, "ps(servers=2)", victim, 20, "--checkpoint", "every=5")
    assert f"{victim} " in said
    assert "SIGKILL" in said
    assert furthest(want, torch.load(tmp_path / "served.pt")) <= ABSOLUTE


def test_asynchronous_workers_do_not_wait_for_a_dead_one(tmp_path: Path) -> None:
    _, run = disturbed(tmp_path, "ps(staleness=1)", "worker-2", 15)
    histogram = events(run, "server-0", "staleness")[-1]["histogram"]
    assert sum(sum(counts.values()) for counts in histogram.values()) == 8 * 7
    assert max(int(tau) for counts in histogram.values() for tau in counts) <= 3 * (2 * 1 + 1)


def test_resumed_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """With another number of workers and of servers."""
    want = plain(tmp_path, "--epochs", "4")
    run = tmp_path / "run"
    flags = ("--run-dir", run, "--checkpoint", "every=7")
    script = ("--epochs", "4", "--out", tmp_path / "served.pt")
    first = ("-n", "2", "--strategy", "ps()", *flags, "--", "--epochs", "2", "--out", tmp_path / "first.pt")
    done = run_paceline("run", CASE, *first, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, show(done)
    again = ("-n", "3", "--strategy", "ps(servers=2)", *flags, "--resume", "auto", "--", *script)
    done = run_paceline("run", CASE, *again, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, show(done)
    proved = run_paceline("verify", "ledger", run, cwd=tmp_path)
    assert proved.returncode == 0, show(proved)
    assert furthest(want, torch.load(tmp_path / "served.pt")) <= ABSOLUTE
