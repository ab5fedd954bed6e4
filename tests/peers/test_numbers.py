"""Numbers that go wrong: a gradient that is not finite, a bit that flips in one replica."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import run_paceline

SCRIPT = """
import sys, torch, paceline
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
x = torch.arange(240.0).reshape(240, 1) / 240
if "poison" in sys.argv:
    x[57] = float("nan")
model = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
train = DataLoader(TensorDataset(x, 2 * x), batch_size=6)
job = paceline.job()
model, opt, train = job.adopt(model, opt, train)
for epoch in job.epochs(3):
    for a, b in train:
        opt.zero_grad()
        ((model(a) - b) ** 2).mean().backward()
        opt.step()
        if "flip" in sys.argv and job.clock.step == 33 and job.rank == job.size - 1:
            model[0].weight.data.view(torch.int32)[1] ^= 1 << 20
"""


def run(tmp_path: Path, n: int, *arguments: str) -> tuple[int, str, list[dict[str, object]]]:
    (tmp_path / "train.py").write_text(SCRIPT)
    done = run_paceline("run", "train.py", "-n", str(n), "--run-dir", "run", "--", *arguments, cwd=tmp_path)
    events = [
        json.loads(line)
        for file in (tmp_path / "run" / "events").glob("worker-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    return done.returncode, done.stdout + done.stderr, events


def test_all_ranks_leave_out_the_same_step(tmp_path: Path) -> None:
    status, said, events = run(tmp_path, 3, "poison")
    assert status == 0, said
    assert len({event["hash"] for event in events if event["kind"] == "end"}) == 1
    assert "nan" not in said.lower().replace("not finite", "")
    notices = [event for event in events if event.get("code") == "PL409"]
    assert len(notices) == 3  # one an epoch, by the rank that has the row
    assert all(
        "rows 56..57" in str(notice["message"]) and "leaves this step out" in str(notice["message"])
        for notice in notices
    )
    proved = run_paceline("verify", "ledger", "run", cwd=tmp_path)
    assert proved.returncode == 0, proved.stdout


def test_a_flipped_bit_is_found_and_healed(tmp_path: Path) -> None:
    status, said, events = run(tmp_path, 3, "flip")
    assert status == 0, said
    assert len({event["hash"] for event in events if event["kind"] == "end"}) == 1
    (notice,) = [event for event in events if event.get("code") == "PL441"]
    assert "rank 2" in str(notice["message"])
    assert notice["step"] == 50
    assert "PL441" in said


@pytest.mark.parametrize("n", [2])
def test_two_replicas_cannot_say_who_is_right(tmp_path: Path, n: int) -> None:
    status, said, _ = run(tmp_path, n, "flip")
    assert status == 1
    assert "PL440" in said


VOTE = """
import sys
from dataclasses import dataclass, replace

import torch

import paceline
from paceline.exchange.allreduce import AllReduceMean
from paceline.exchange.chain import chain, optimizer
from paceline.exchange.strategy import build
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Odd:
    # a link that is not the same on all ranks

    def init(self, bucket):
        return {}

    async def __call__(self, message, state):
        if message.rank == 2 and message.step == 4:
            message.payload[0] += 1e-7

    def describe(self):
        return "odd"


exchange = build("ddp(commit=vote)")
if "odd" in sys.argv:
    exchange = replace(exchange, chain=chain(AllReduceMean(), Odd(), optimizer))
torch.manual_seed(0)
x = torch.rand(240, 4)
model = torch.nn.Linear(4, 3)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
job = paceline.job(exchange)
model, opt, train = job.adopt(model, opt, DataLoader(TensorDataset(x, x[:, :3]), batch_size=6))
for epoch in job.epochs(1):
    for a, b in train:
        opt.zero_grad()
        ((model(a) - b) ** 2).mean().backward()
        opt.step()
"""


@pytest.mark.parametrize("odd", [False, True])
def test_all_vote_before_they_step(odd: bool, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(VOTE)
    script = ["--", "odd"] if odd else []
    done = run_paceline("run", "train.py", "-n", "3", "--run-dir", "run", *script, cwd=tmp_path)
    assert (done.returncode != 0) == odd, done.stdout + done.stderr
    assert ("error[PL442]" in done.stderr) == odd
    assert ("step 5: rank 2 has come to another gradient" in done.stderr) == odd
