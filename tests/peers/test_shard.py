"""Sharded data parallelism between real processes: the numbers of one process, whatever the stage, the model and the habits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peers import shard_case, shard_habits
from support.breadth import more
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
    {"name": "mlp", "stage": 3, "opt": "Adafactor"},
    {"name": "mlp", "stage": 1, "opt": "RMSprop", "clip": 0.1},
]


@pytest.mark.parametrize(
    ("size", "cases", "steps", "wire"),
    [
        pytest.param(2, [*grid(OWN, clip=0.5), *WAYS], 10, True, id="own-2-shm"),
        pytest.param(2, grid(HF), 10, True, id="hf-2-shm"),
        pytest.param(4, [*grid(("gpt",)), *WAYS[:1]], 10, False, id="gpt-4-gloo"),
        *more(
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


# ---- habits ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, *more(1, 4)])
@pytest.mark.parametrize("wire", [True, *more(False)])
def test_what_scripts_do_besides(size: int, wire: bool) -> None:
    for found in run(shard_habits.habits, size, wire=wire):
        assert {name: said for name, said in found.items() if said != "same"} == {}
