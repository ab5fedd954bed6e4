"""Sharded data parallelism between real processes: the numbers of one process, whatever the stage, the model and the habits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from paceline.place.shard_units import units_of
from peers import shard_case, shard_habits, shard_limits, shard_models
from support.breadth import more
from support.parity_table import record
from support.peers import run_peers
from support.rendezvous import rendezvous

TOLERANCE = 1e-9


def run(function: Callable[..., Any], size: int, **arguments: Any) -> list[Any]:
    with rendezvous() as server:
        env = {"GLOO_SOCKET_IFNAME": "lo"}
        return run_peers(function, size, timeout=170, env=env, store=str(server.path), **arguments)


# ---- parity ---------------------------------------------------------------------------------------------------------
def grid(models: tuple[str, ...], **settings: Any) -> list[dict[str, Any]]:
    return [{"name": name, "stage": stage, **settings} for name in models for stage in (1, 2, 3)]


OWN = ("mlp", "gpt", "encoder")
HF = ("hf_gpt2", "hf_llama", "hf_bert", "hf_vit")
WAYS = [
    {"name": "gpt", "stage": 3, "opt": "sgd", "clip": 0.5, "accumulate": 3},
    {"name": "gpt", "stage": 1, "opt": "fused", "clip": 0.5, "accumulate": 2},
    {"name": "gpt", "stage": 2, "recompute": "blocks"},
    {"name": "encoder", "stage": 3, "recompute": "blocks", "opt": "sgd"},
    {"name": "mlp", "stage": 3, "opt": "own"},
    {"name": "mlp", "stage": 1, "opt": "RMSprop", "clip": 0.1},
]


@pytest.mark.parametrize(
    ("size", "cases", "steps", "wire"),
    [
        pytest.param(2, [*grid(OWN, clip=0.5), *WAYS], 10, True, id="own-2-shm"),
        pytest.param(2, grid(HF), 10, True, id="hf-2-shm"),
        *more(
            pytest.param(4, [*grid(("gpt",)), *WAYS[:1]], 10, False, id="gpt-4-gloo"),
            pytest.param(2, [*grid(OWN + HF, clip=0.5), *WAYS], 30, False, id="all-2-gloo"),
            pytest.param(4, [*grid(OWN + HF, clip=0.5), *WAYS], 30, True, id="all-4-shm"),
            pytest.param(3, [*grid(OWN + HF, opt="sgd"), *WAYS], 30, True, id="all-3-shm"),
            pytest.param(1, [*grid(OWN), *WAYS], 30, False, id="all-1"),
        ),
    ],
)
def test_parameters_are_those_of_one_process(size: int, cases: list[dict[str, Any]], steps: int, wire: bool) -> None:
    for found in run(shard_case.compare, size, cases=cases, steps=steps, wire=wire):
        assert {case: worst for case, worst in found.items() if not max(worst) <= TOLERANCE} == {}
    for case in cases:
        record("fsdp", case["name"], size)


# ---- habits ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, *more(1, 4)])
@pytest.mark.parametrize("wire", [True, *more(False)])
def test_what_scripts_do_besides(size: int, wire: bool) -> None:
    for found in run(shard_habits.habits, size, wire=wire):
        assert {name: said for name, said in found.items() if said != "same"} == {}


# ---- units ----------------------------------------------------------------------------------------------------------
class Branching(nn.Module):
    """No list of blocks: two big branches, one of them a chain, and a table that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 500)
        self.left = nn.Sequential(nn.Linear(500, 500), nn.ReLU(), nn.Conv1d(500, 300, 1), nn.Linear(500, 500))
        self.right = nn.Linear(500, 600)
        self.attention = nn.MultiheadAttention(500, 2)
        self.small = nn.Linear(5, 5)


class Stages(nn.Module):
    """Few stages of many blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(self.stage() for _ in range(2))

    @staticmethod
    def stage() -> nn.Module:
        return nn.Sequential(*(nn.TransformerEncoderLayer(64, 2, 64) for _ in range(3)))


def names(model: nn.Module, small: int = 1000) -> list[str]:
    return [unit.name for unit in units_of(model, small)]


def test_units_are_blocks_else_pieces() -> None:
    assert names(shard_models.build("gpt")) == ["blocks.0", "blocks.1", "blocks.2"]
    assert names(shard_models.build("hf_bert")) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert names(Stages()) == [f"stages.{s}.{i}" for s in range(2) for i in range(3)]
    assert names(nn.Sequential(*(nn.Linear(10, 10) for _ in range(5))), 1000) == ["0", "2", "4"]
    assert names(Branching()) == ["left.0", "left.2", "left.3", "right", "attention"]
    assert names(nn.Linear(4, 4)) == []


# ---- refusals -------------------------------------------------------------------------------------------------------
Limits = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def limits() -> Limits:
    """What two ranks found, by the name of the function."""
    names = ["refused", "order", "lower_precision", "kept", "traffic"]
    found = run(shard_limits.limits, 2, names=names)
    return lambda name: [each[name] for each in found]


def test_what_cannot_be_split_is_refused(limits: Limits) -> None:
    expected = {
        "stage": "PL550",
        "mesh": "PL550",
        "recompute": "PL550",
        "offload": "PL554",
        "scalar": "PL551",
        "hook": "PL551",
        "sparse": "PL551",
        "list": "PL551",
        "types": "PL552",
        "sums": "PL553",
        "double": "PL553",
        "muon": "PL555",
        "adafactor": "PL555",
        "first": None,
        "twice": "PL551",
        "reentrant": "PL556",
    }
    assert limits("refused") == [expected, expected]


def test_ranks_that_call_other_blocks_are_told(limits: Limits) -> None:
    assert [found["parted"] for found in limits("traffic")] == ["PL402", "PL402"]


# ---- when, and how much ---------------------------------------------------------------------------------------------
def test_a_stage_says_how_often_parameters_are_gathered(limits: Limits) -> None:
    """Two backwards, one step, three blocks and the root, which stays gathered from forward to backward in every stage."""
    rest = {"gradients": 8, "parameters with a gradient": 2}
    for found in limits("traffic"):
        for stage, gathers in (("1", 4), ("2", 8), ("3", 14)):
            assert found[stage] == [{"parameters": gathers, **rest}] * 2


def test_the_factor_is_asked_once_and_the_end_is_the_end(limits: Limits) -> None:
    for said in limits("order"):
        assert said == ["begun", "factor", "ended", "returned"] * 2


def test_lower_precision_is_where_it_was_asked_for(limits: Limits) -> None:
    for said in limits("lower_precision"):
        assert sorted(said) == ["torch.bfloat16", "torch.float32"]


def test_state_goes_whole_and_comes_back(limits: Limits) -> None:
    assert limits("kept") == [[True] * 7] * 2


@pytest.mark.parametrize(("width", "layers"), [(512, 12), *more((2048, 12))])
def test_memory_falls_as_the_number_of_ranks(width: int, layers: int) -> None:
    """Parameters, gradients and the state of AdamW: 16 bytes for each parameter, over four ranks."""
    for found in run(shard_limits.limits, 4, names=["memory"], width=width, layers=layers):
        for share in found["memory"].values():
            assert share == pytest.approx(1 / 4, rel=0.15)


@pytest.mark.parametrize("size", [2, *more(3, 4)])
def test_a_model_built_in_parts_starts_with_the_same_numbers(size: int) -> None:
    for each in run(shard_limits.limits, size, names=["built_in_parts"]):
        found = each["built_in_parts"]
        assert found.pop("share") == pytest.approx(1 / size, rel=0.15)
        assert found.pop("read") == "PL557"
        assert found.pop("copied")
        assert all(found.values()), found
        assert all(all(each) for each in found.values()), found
