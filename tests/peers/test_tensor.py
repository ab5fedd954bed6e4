"""Tensor parallelism on real processes: unchanged models train as in one process, to rounding in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest

from peers.tensor_case import MODELS, facts, parity
from support.breadth import more
from support.peers import run_peers
from support.rendezvous import rendezvous

BOUND = 1e-9
SPLIT = {
    "mlp": 0.91, "lm": 0.98, "separate": 0.9, "encoder": 0.97, "gpt2": 0.98, "llama": 0.99, "bert": 0.97, "vit": 0.86,
}  # fmt: skip


def _parity(size: int, names: list[str], kinds: list[str], steps: int) -> list[dict[str, Any]]:
    cases = [(name, kind) for name in names for kind in kinds]
    with rendezvous() as server:
        return run_peers(parity, size, timeout=170, store=str(server.path), cases=cases, steps=steps)


@pytest.mark.parametrize(
    ("size", "names", "kinds", "steps"),
    [
        (2, list(MODELS), ["adamw"], 10),
        (2, ["mlp", "gpt2"], ["sgd", "adamw-foreach"], 10),
        (4, ["mlp", "lm", "llama", "encoder"], ["sgd"], 10),
        *more(*((2, [name], ["sgd", "adamw", "adamw-foreach"], 30) for name in MODELS)),
        *more(*((4, [name], ["sgd", "adamw"], 30) for name in MODELS)),
        *more((3, ["mlp", "lm", "encoder", "bert"], ["adamw"], 30)),
    ],
)
def test_a_model_trains_as_in_one_process(size: int, names: list[str], kinds: list[str], steps: int) -> None:
    """Losses, norms of clipped gradients, evaluations, parameters and the optimizer's state; with accumulation and dropout."""
    for said in _parity(size, names, kinds, steps):
        for case, shown in said.items():
            differences = {key: shown[key] for key in ("loss", "parameters", "state")}
            assert max(differences.values()) < BOUND, (case, differences)
            assert shown["grads"], case
            if size == 2:
                assert shown["split"] >= SPLIT[case.partition("-")[0]], (case, shown["split"])
            for reason in shown["whole"]:
                assert reason.startswith("the model returns its output"), (case, reason)


def test_the_table_says_where_everything_is() -> None:
    table = _parity(2, ["lm"], ["sgd"], 3)[0]["lm-sgd"]["table"].splitlines()
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


TWO = [
    "stages", "recomputed", "split_loss", "masks", "attention_with_dropout", "whole_and_cut", "overruled",
    "recurrent_and_convolutions", "parts_by_themselves", "outside_of_the_model",
]  # fmt: skip


@pytest.mark.parametrize("size", [2, *more(4)])
def test_uses_that_are_out_of_the_ordinary_give_the_numbers_of_one_process(size: int) -> None:
    with rendezvous() as server:
        results = run_peers(facts, size, timeout=170, store=str(server.path), names=TWO)
    for said in results:
        for name, differences in said.items():
            assert max(differences if isinstance(differences, list) else [differences]) < BOUND, (name, differences)


def test_mistakes_are_refused_and_memory_falls() -> None:
    """PL544 for a user's autograd Function and for a change in place that nobody foresaw; after an error all is usable."""
    with rendezvous() as server:
        results = run_peers(facts, 2, timeout=90, store=str(server.path), names=["mistakes", "without_values"])
    for said in results:
        assert said["mistakes"] == ["PL544", "PL544", "the user's", True]
        assert said["without_values"] < 0.51


def test_fully_shard_works_on_the_other_axis() -> None:
    with rendezvous() as server:
        results = run_peers(facts, 4, timeout=120, store=str(server.path), names=["with_full_sharding"])
    assert max(said["with_full_sharding"][0] for said in results) < BOUND
