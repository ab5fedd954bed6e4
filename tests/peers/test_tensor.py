"""Tensor parallelism on real processes: the unchanged models train as in one process."""

from __future__ import annotations

import pytest

from support.breadth import more
from support.peers import run_peers
from support.rendezvous import rendezvous

TARGET = "peers.tensor_case:{}"
BOUND = 1e-9
EVERY = ["mlp", "lm", "separate", "encoder", "gpt2", "llama", "bert", "vit"]


@pytest.mark.parametrize(
    ("size", "names", "kinds", "steps"),
    [
        (2, EVERY, ["adamw"], 10),
        *more((2, EVERY, ["sgd", "adamw", "adamw-foreach"], 30), (4, EVERY, ["sgd", "adamw"], 30)),
    ],
)
def test_a_model_trains_as_in_one_process(size: int, names: list[str], kinds: list[str], steps: int) -> None:
    cases = [(name, kind) for name in names for kind in kinds]
    with rendezvous() as server:
        results = run_peers(
            TARGET.format("parity"), size, timeout=170, store=str(server.path), cases=cases, steps=steps
        )
    for said in results:
        for case, facts in said.items():
            print(case, facts)
            assert facts["loss"] < BOUND, (case, facts)
            assert facts["parameters"] < BOUND, (case, facts)
            assert facts["state"] < BOUND, (case, facts)
            assert facts["grads"], (case, facts)
