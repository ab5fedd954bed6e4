"""Tensor parallelism on real processes: unchanged models train as in one process, to rounding in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest

from peers.tensor_case import MODELS
from peers.tensor_uses import work
from support.parity_table import record
from support.peers import run_peers
from support.rendezvous import rendezvous

BOUND = 1e-9
SPLIT = {
    "mlp": 0.91, "lm": 0.98, "separate": 0.9, "encoder": 0.97, "gpt2": 0.98, "llama": 0.99, "bert": 0.97, "vit": 0.86,
}  # fmt: skip
UNUSUAL = [
    "stages", "recomputed", "split_loss", "masks", "attention_with_dropout", "whole_and_cut", "overruled",
    "recurrent_and_convolutions", "parts_by_themselves", "outside_of_the_model", "labels_inside", "lower_precision",
]  # fmt: skip
QUICK = [(name, "adamw") for name in MODELS] + [("mlp", "sgd"), ("gpt2", "sgd"), ("lm", "adamw-foreach")]
FOUR = [("mlp", "sgd"), ("lm", "adamw"), ("llama", "sgd"), ("encoder", "adamw")]

pytestmark = pytest.mark.timeout(400)


def _work(size: int, cases: list[tuple[str, str]], steps: int, names: list[str] | None = None) -> list[dict[str, Any]]:
    with rendezvous() as server:
        return run_peers(work, size, timeout=360, store=str(server.path), cases=cases, steps=steps, names=names or [])


def _check_parity(said: dict[str, Any], size: int) -> None:
    for case, shown in said["parity"].items():
        differences = {key: shown[key] for key in ("loss", "parameters", "state")}
        assert max(differences.values()) < BOUND, (case, differences)
        assert shown["grads"], case
        if size == 2:
            assert shown["split"] >= SPLIT[case.partition("-")[0]], (case, shown["split"])
        for reason in shown["whole"]:
            assert reason.startswith("the model returns its output"), (case, reason)
        record("tensor", case.partition("-")[0], size)


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    """What two ranks say: they start once for all the tests below."""
    return _work(2, QUICK, 6, [*UNUSUAL, "mistakes", "without_values"])


@pytest.mark.parametrize("case", ["-".join(case) for case in QUICK])
def test_a_model_trains_as_in_one_process(two: list[dict[str, Any]], case: str) -> None:
    """Losses, norms of clipped gradients, evaluations, parameters and the optimizer's state; with accumulation and dropout."""
    for said in two:
        _check_parity({"parity": {case: said["parity"][case]}}, 2)


@pytest.mark.long
def test_four_ranks_and_fully_shard_on_another_axis() -> None:
    for said in _work(4, FOUR, 10, ["with_full_sharding"]):
        _check_parity(said, 4)
        assert said["with_full_sharding"][0] < BOUND


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "cases"),
    [
        *((2, [(name, kind) for kind in ("sgd", "adamw", "adamw-foreach")]) for name in MODELS),
        *((4, [(name, kind) for kind in ("sgd", "adamw")]) for name in MODELS),
        (3, [(name, "adamw") for name in ("mlp", "lm", "encoder", "bert", "gpt2")]),
    ],
)
def test_a_model_trains_for_long_as_in_one_process(size: int, cases: list[tuple[str, str]]) -> None:
    for said in _work(size, cases, 30):
        _check_parity(said, size)


@pytest.mark.long
def test_unusual_uses_on_more_ranks() -> None:
    for said in _work(4, [], 0, UNUSUAL):
        assert all(_largest(said[name]) < BOUND for name in UNUSUAL), said


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_uses_give_the_numbers_of_one_process(two: list[dict[str, Any]], name: str) -> None:
    for said in two:
        assert _largest(said[name]) < BOUND, said[name]


def _largest(differences: float | list[float]) -> float:
    return max(differences) if isinstance(differences, list) else differences


def test_the_table_says_where_everything_is(two: list[dict[str, Any]]) -> None:
    table = two[0]["parity"]["lm-adamw"]["table"].splitlines()
    rows = {line.split()[0]: " ".join(line.split()) for line in table}
    assert rows["parameter"] == "parameter shape split bytes per rank exchange, or why it is whole"
    assert rows["embed.weight"] == "embed.weight 256x32 vocab, dim 0 32,768 forward: sum or gathering over words"
    assert rows["blocks.0.qkv.weight"].startswith(
        "blocks.0.qkv.weight 96x32 column, dim 0 in 3 segments 12,288 backward"
    )
    assert rows["blocks.0.out.weight"].startswith("blocks.0.out.weight 32x32 row, dim 1 4,096 forward: sum")
    assert rows["norm.bias"] == "norm.bias 32 whole 256 read whole by layer_norm"
    assert re.search(
        r"^32,768 of 33,344 parameters are split over 2 ranks; each rank holds 16,960$", "\n".join(table), re.M
    )
    assert re.search(r"made whole \d+ times: the output of embed.weight: the model returns its output", table[-1])


def test_mistakes_are_refused(two: list[dict[str, Any]]) -> None:
    """PL544 for a user's autograd Function and for a change in place that nobody foresaw; after an error all is usable."""
    for said in two:
        assert said["mistakes"] == ["PL544", "PL544", "the user's", True]


def test_a_rank_of_two_holds_half(two: list[dict[str, Any]]) -> None:
    for said in two:
        assert 0.5 <= said["without_values"] < 0.51


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
def test_further_families_have_the_gradients_of_one_process(size: int) -> None:
    for said in _work(size, [], 0, ["families"]):
        assert max(said["families"].values()) < BOUND, said["families"]
