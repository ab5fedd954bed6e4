"""Parameter servers on one machine, workers on two: TLS, TCP, real processes."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from chaos.test_partition import net
from parity.test_servers import ABSOLUTE, CASE, furthest, plain
from support.cli import CLI, dump_and_kill, run_paceline, show
from support.network import Network

__all__ = ["net"]
EPOCHS = ("--epochs", "14")


@contextmanager
def started(command: list[str], said: Path) -> Iterator[subprocess.Popen[bytes]]:
    with said.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                dump_and_kill(process.pid)
            process.wait()


def test_a_worker_of_another_machine_takes_part(net: Network, tmp_path: Path) -> None:
    """Synchronous, so that it changes nothing but the time."""
    want = plain(tmp_path, *EPOCHS)
    here, there = net.machines
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "served.pt"
    flags = ("-n", "1", "--workers", "1:2", "--strategy", "ps()", "--listen", here.address, "--run-dir", str(a))
    script = ("--", "--pause", "0.08", *EPOCHS, "--out", str(out))
    with started(here.command([*CLI, "run", str(CASE), *flags, *script]), tmp_path / "a.txt") as first:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"--address (\S+)", (tmp_path / "a.txt").read_text())):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        secret = ("--address", found[1], "--secret-file", str(a / "secret"), "-n", "1", "--run-dir", str(b))
        with started(there.command([*CLI, "join", str(CASE), *secret]), tmp_path / "b.txt") as second:
            first.wait(100)
            second.wait(30)
    told = (tmp_path / "a.txt").read_text() + (tmp_path / "b.txt").read_text()
    assert (first.returncode, second.returncode) == (0, 0), told
    proved = run_paceline("verify", "ledger", a, cwd=tmp_path)
    assert proved.returncode == 0, show(proved)
    assert furthest(want, torch.load(out)) <= ABSOLUTE
    lines = [json.loads(line) for line in (a / "events" / "worker-0.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "view" and "worker-100000" in line["members"] for line in lines), told
