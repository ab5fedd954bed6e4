"""Ranks that step on their own, in real processes: degenerate cases equal what they must, float64, 50 steps, to 1e-9.

All strategies run one after the other in the same three processes, each as a job of its own on memory of its own.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from paceline.group import arena
from paceline.group.shm_wire import ShmWire
from paceline.terms.errors import PacelineError
from paceline.terms.plan import Place, Plan
from paceline.train.job import Job
from support.breadth import more
from support.cli import run_paceline, run_python, show
from support.peers import Peer, run_peers

CLOSE = 1e-9  # sums in another order, 50 steps of a smooth loss; observed below 1e-14
SIZE, STEPS = 3, 50
Found = dict[str, Tensor]


class Net(nn.Module):
    """Tied weights, batch normalisation, a frozen parameter, one that never gets a gradient, and buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)
        self.last.weight = self.first.weight
        self.idle = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((2,), 1 / 3), requires_grad=False)
        self.register_buffer("constant", torch.tensor([0.1, 1 / 3]))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        y: Tensor = self.last(torch.tanh(self.norm(self.first(x)) if self.norm.training else self.first(x)))
        return y


def train(job: Job, *, adam: bool, rows: int, norm: bool, steps: int, accumulate: int) -> dict[str, Any]:
    """The loop that a user would write. What ended up where, by name."""
    torch.manual_seed(3)
    net = Net().double()
    net.norm.train(norm)
    opt: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if adam:
        opt = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=7, gamma=0.95)
    g = torch.Generator().manual_seed(7)
    x, y = torch.randn(rows, 12, generator=g).double(), torch.randint(12, (rows,), generator=g)
    loader = DataLoader(TensorDataset(x, y), batch_size=24, shuffle=True)
    net, opt, schedule, loader = job.adopt(net, opt, schedule, loader)
    done = micro = 0
    while done < steps:
        for xb, yb in loader:
            (F.cross_entropy(net(xb), yb) / accumulate).backward()
            micro += 1
            if micro % accumulate:
                continue
            opt.step()
            schedule.step()
            opt.zero_grad()
            done += 1
            if done == steps:
                break
    with job.evaluating(net):
        return {name: tensor.flatten().tolist() for name, tensor in net.state_dict().items()}


def jobs(peer: Peer, runs: list[dict[str, Any]], arenas: list[int]) -> list[dict[str, Any]]:
    """One rank of several jobs, one after the other."""
    found = []
    for run, fd in zip(runs, arenas, strict=True):
        events: list[Any] = []
        place = functools.partial(Place, rank=peer.rank, size=peer.size, local_rank=peer.rank, local_size=peer.size)
        plan = Plan(script="", strategy=run["strategy"])
        wire = ShmWire(fd, peer.rank, peer.size, peer.board, peer.activity)
        job = Job(
            place(hosts=(0,) * peer.size, launcher="paceline", plan=plan),
            lambda _, w=wire: w,
            events.append,
            peer.activity,
        )  # type: ignore[misc]
        result: dict[str, Any] = {}
        failure: BaseException | None = None
        try:
            result["end"] = train(job, **run["script"])
        except PacelineError as error:
            failure, result["error"] = error, f"{error.code} {error.message}"
        job.finish(failure)
        result["rounds"] = [event.data for event in events if event.kind == "round"]
        result["clock"] = [job.clock.step, job.clock.samples]
        found.append(result)
    return found


def script(**given: Any) -> dict[str, Any]:
    return {"adam": False, "rows": 120, "norm": False, "steps": STEPS, "accumulate": 1, **given}


UNEVEN = {"rows": 127}  # batches of 24, 8 for each rank, and a last one of 7
FEW = {"rows": 122}  # a last one of 2, of which one rank has nothing
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp()", {}),
    "ddp uneven": ("ddp()", UNEVEN),
    "ddp few": ("ddp()", FEW),
    "local 1 few": ("local_sgd(1)", FEW),
    "accumulate few": ("local_sgd(3)", {"accumulate": 2, "steps": 12, "adam": True, **FEW}),
    "ddp 10": ("ddp()", {"steps": 10, "adam": True, **UNEVEN}),
    "ddp accumulate": ("ddp()", {"accumulate": 3, "steps": 12}),
    "local 1": ("local_sgd(1)", {}),
    "local 1 uneven": ("local_sgd(1)", UNEVEN),
    "local accumulate": ("local_sgd(1)", {"accumulate": 3, "steps": 12}),
    "diloco 1": ("diloco(every=1, lr=1, momentum=0)", UNEVEN),
    "complete": ("gossip(complete)", {}),
    "torus": ("gossip(ring)", {}),
    "push complete": ("sgp(graph=complete)", {}),
    "push ring": ("sgp(graph='0-1 1-2 2-0')", {}),
    "then": ("then(ddp(), after=10, next=local_sgd(5))", {"steps": 10, "adam": True, **UNEVEN}),
    "then back": ("then(local_sgd(4), after=6, next=ddp())", {"steps": 14, **UNEVEN}),
    "local 8": ("local_sgd(8)", {"steps": 16, "adam": True}),
    "local 1 bytes": ("local_sgd(1)", {"steps": 16, "adam": True}),
    "average": ("local_sgd(every=4, state=average)", {"adam": True, "norm": True, **UNEVEN}),
    "reset": ("local_sgd(every=4, state=reset)", {"adam": True, **UNEVEN}),
    "streaming": (
        "diloco(every=6, fragments=3, overlap=1, blend=0.5, codec=bf16)",
        {"norm": True, "adam": True, **UNEVEN},
    ),
    "easgd": ("easgd(every=3)", {"norm": True, **UNEVEN}),
    "exponential": ("sgp()", {"norm": True, "adam": True, **UNEVEN}),
    "within": ("local_sgd(every=within(0.2))", {"norm": True, **UNEVEN}),
    "median": ("local_sgd(every=4, merge=median)", UNEVEN),
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """What each rank ended with, by run."""
    arenas = [arena.create() for _ in RUNS]
    try:
        runs = [{"strategy": strategy, "script": script(**given)} for strategy, given in RUNS.values()]
        ranks = run_peers(jobs, SIZE, timeout=100, inherit=arenas, runs=runs, arenas=arenas)
    finally:
        for fd in arenas:
            os.close(fd)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(RUNS)}


def differ(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a["end"].keys() == b["end"].keys()
    pairs = ((torch.tensor(a["end"][name]), torch.tensor(b["end"][name])) for name in a["end"])
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_end_with_the_same(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    ranks = found[name]
    assert not [rank["error"] for rank in ranks if "error" in rank]
    assert all(rank["end"] == ranks[0]["end"] for rank in ranks)
    assert ranks[0]["clock"] == ranks[1]["clock"]
    assert ranks[0]["end"]["frozen"] == torch.full((2,), 1 / 3).double().tolist()
    assert ranks[0]["end"]["constant"] == torch.tensor([0.1, 1 / 3], dtype=torch.float32).double().tolist()
    assert all(torch.tensor(values).isfinite().all() for values in ranks[0]["end"].values())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("local 1", "ddp"),
        ("local 1 uneven", "ddp uneven"),
        ("local 1 few", "ddp few"),
        ("local accumulate", "ddp accumulate"),
        ("diloco 1", "local 1 uneven"),
        ("complete", "local 1"),
        ("torus", "complete"),  # the ring of three is complete
        ("push complete", "complete"),
        ("push ring", "torus"),
        ("then", "ddp 10"),
    ],
)
def test_degenerate_cases_equal_what_they_must(one: str, other: str, found: dict[str, list[dict[str, Any]]]) -> None:
    assert differ(found[one][0], found[other][0]) <= CLOSE


def test_eight_steps_a_round_send_eight_times_fewer_bytes(found: dict[str, list[dict[str, Any]]]) -> None:
    """But for the rounds that end with a pass of five batches."""
    each, eighth = found["local 1 bytes"][0]["rounds"], found["local 8"][0]["rounds"]
    assert len({entry["bytes"] for entry in (*each, *eighth)}) == 1
    assert len(each) == 16
    assert len(eighth) == 4
    assert sum(entry["weight"] for entry in eighth) == sum(entry["weight"] for entry in each) == 16 * 8
    streaming = found["streaming"][0]["rounds"]
    parts = [entry["bytes"] for entry in streaming if not entry["full"]]
    assert max(parts) < min(entry["bytes"] for entry in streaming if entry["full"])


def test_other_policies_give_other_numbers(found: dict[str, list[dict[str, Any]]]) -> None:
    assert differ(found["average"][0], found["reset"][0]) > 1e-6
    assert differ(found["median"][0], found["local 1 uneven"][0]) > 1e-6


# ---- one worker -----------------------------------------------------------------------------------------------------
CASE = Path(__file__).parent / "rounds_case.py"


def test_one_worker_of_anything_is_the_plain_loop_to_the_bit(tmp_path: Path) -> None:
    """All of them in turn, in a run that others may join at any time."""
    recipes = [
        "diloco(every=6)",
        "easgd(every=4)",
        "gossip()",
        "sgp()",
        "diloco(every=6, fragments=3, overlap=1, blend=0.5)",
    ]
    text = "local_sgd(4)"
    for number, recipe in enumerate(recipes, 1):
        text = f"then({text}, after={9 * number}, next={recipe})"
    want, have = tmp_path / "want", tmp_path / "have"
    want.mkdir()
    have.mkdir()
    plain = run_python(CASE, "--norm", "--out", want, cwd=tmp_path, timeout=60)
    assert plain.returncode == 0, plain.stderr
    flags = ("-n", "1", "--workers", "1:2", "--run-dir", tmp_path / "run", "--strategy", text)
    done = run_paceline("run", CASE, *flags, "--", "--norm", "--out", have, cwd=tmp_path, timeout=90)
    assert done.returncode == 0, show(done)
    a, b = torch.load(want / "end.pt"), torch.load(have / "end.pt")
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- what cannot be ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mistake", "code"), [("scaler", "PL210"), *more(("sum", "PL408"), ("uneven", "PL412"))])
def test_mistakes_are_told(mistake: str, code: str, tmp_path: Path) -> None:
    flags = ("--workers", "2", "--strategy", "local_sgd(3)", "--run-dir", tmp_path / "run")
    done = run_paceline("run", CASE.with_name("rounds_mistakes.py"), *flags, "--", mistake, cwd=tmp_path, timeout=60)
    assert done.returncode != 0
    assert code in done.stdout + done.stderr, show(done)


def test_a_rank_whose_gradient_is_not_finite_leaves_out_its_own_step(tmp_path: Path) -> None:
    flags = ("--workers", "2", "--strategy", "local_sgd(3)", "--run-dir", tmp_path / "run")
    script = ("--", "--epochs", "2", "--poison", "4", "--out", tmp_path)
    done = run_paceline("run", CASE, *flags, *script, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, show(done)
    assert "PL409" in done.stdout + done.stderr, show(done)
    assert all(torch.isfinite(tensor).all() for tensor in torch.load(tmp_path / "end.pt").values())
    proved = run_paceline("verify", "ledger", tmp_path / "run", cwd=tmp_path)
    assert proved.returncode == 0, show(proved)


# ---- checkpoints ------------------------------------------------------------------------------------------------------
def _end(tmp_path: Path, strategy: str, name: str, *flags: str | Path) -> dict[str, Tensor]:
    out = tmp_path / name / "out"
    out.mkdir(parents=True)
    arguments = (
        "run",
        CASE,
        "--strategy",
        strategy,
        "--run-dir",
        tmp_path / name / "run",
        *flags,
        "--",
        "--out",
        out,
        "--norm",
    )
    done = run_paceline(*arguments, cwd=tmp_path, timeout=90)
    assert done.returncode == 0, show(done)
    proved = run_paceline("verify", "ledger", tmp_path / name / "run", cwd=tmp_path)
    assert proved.returncode == 0, show(proved)
    end: dict[str, Tensor] = torch.load(out / "end.pt")
    return end


@pytest.mark.parametrize("strategy", ["diloco(every=4)", *more("gossip()")])
def test_a_resumed_run_ends_where_the_undisturbed_one_does(strategy: str, tmp_path: Path) -> None:
    """From the middle of a pass, with the outer momentum; then with another number of workers."""
    often = ("--checkpoint", "every=10,keep=20,busy=wait")  # which is a full round each time
    whole = _end(tmp_path, strategy, "whole", "--workers", "2", *often)
    saved = tmp_path / "whole" / "run" / "checkpoints" / "step-00000010"
    resumed = _end(tmp_path, strategy, "resumed", "--workers", "2", "--resume", saved, *often)
    for name in whole.keys() - {"seen"}:
        assert (whole[name] - resumed[name]).abs().max() <= CLOSE, name
    for name in more(strategy):
        other = _end(tmp_path, name, "other", "--workers", "3", "--resume", saved)
        assert (whole["0.weight"] - other["0.weight"]).abs().max() < 0.1
