"""The pipeline between real processes, against the same loop in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.place.pipeline_schedule import FORMS
from peers import pipeline_case, pipeline_cases
from support.breadth import more
from support.cli import run_paceline
from support.parity_table import record
from support.peers import run_peers
from support.rendezvous import rendezvous

STEPS = 30 if more(True) else 10
EXACT = 1e-9
ROUNDED = 2e-6  # of a loss that Hugging Face computes in float32
HUGGING_FACE = ("gpt2", "llama", "bert", "vit")
ALL = ("mlp", "gpt", "encoder", "skips", *HUGGING_FACE)


def run(function: Any, size: int, **arguments: Any) -> list[Any]:
    with rendezvous() as server:
        return run_peers(function, size, store=str(server.path), timeout=120, **arguments)


def check(size: int, *cases: dict[str, Any]) -> None:
    """All of these, on the same processes."""
    results = run(pipeline_case.parities, size, cases=[{"steps": STEPS, **case} for case in cases])
    for number, case in enumerate(cases):
        found = [result[number] for result in results]
        said = f"{case}: {found}"
        assert max(f["params"] for f in found) <= EXACT, said
        assert max(f["whole"] for f in found) <= EXACT, said
        assert max(f["read"] for f in found) <= (ROUNDED if case["name"] in ("gpt2", "llama") else EXACT), said
        assert max(f["evaluation"] for f in found) <= (ROUNDED if case["name"] in ("gpt2", "llama") else EXACT), said
        assert all(f["names"] and f["moved"] > 1e-3 for f in found), said
        assert all(f["stages"] == found[0]["stages"] for f in found), said
        assert any(f["absent"] for f in found), said
        record("pipeline", case["name"], size, case["schedule"])


def test_a_tied_gpt_on_every_schedule_and_a_perceptron() -> None:
    """Batches of three sizes; the number of micro-batches divides only one of them."""
    rows = [12, 7, 13]
    check(2, *({"name": "gpt", "schedule": schedule, "rows": rows} for schedule in FORMS))
    check(
        2,
        *({"name": "mlp", "schedule": schedule, "rows": rows} for schedule in ("gpipe", "zero_bubble", *more(*FORMS))),
    )


@pytest.mark.parametrize("schedule", ["1f1b", *more(*FORMS)])
def test_models_of_others(schedule: str) -> None:
    """Hugging Face models that compute their loss themselves, from tiny configurations."""
    check(2, *({"name": name, "schedule": schedule, "rows": [12, 9]} for name in HUGGING_FACE))


def test_masks_skips_and_dictionaries() -> None:
    check(
        2,
        {"name": "encoder", "schedule": "gpipe"},
        {"name": "encoder", "schedule": "zero_bubble"},
        {"name": "skips", "schedule": "gpipe"},
        {"name": "skips", "schedule": "interleaved", "cuts": ["down.1", "up.0", "up.2"]},
    )


def test_accumulation_clipping_a_scheduler_and_losses_over_tokens() -> None:
    loop = {"accumulate": 3, "clip": 0.2, "rows": [8, 5, 11]}
    check(
        2,
        {"name": "gpt", "schedule": "gpipe", **loop},
        *({"name": "gpt", "schedule": schedule, "loss": "masked", **loop} for schedule in ("gpipe", "1f1b")),
        {"name": "mlp", "schedule": "gpipe", "loss": "contrastive", "clip": 0.2},
        {"name": "gpt", "schedule": "1f1b", "adamw": True},
    )


def test_four_ranks() -> None:
    check(
        4,
        {"name": "gpt", "schedule": "1f1b", "clip": 0.2, "rows": [9, 12]},
        {"name": "skips", "schedule": "gpipe"},
        *more({"name": "mlp", "schedule": "1f1b"}, {"name": "gpt", "schedule": "1f1b", "microbatches": 6}),
    )


if more(True):

    @pytest.mark.parametrize("schedule", FORMS)
    @pytest.mark.parametrize("name", ALL)
    def test_everything(name: str, schedule: str) -> None:
        check(2, {"name": name, "schedule": schedule, "steps": 30, "clip": 0.3, "accumulate": 2, "rows": [12, 8, 7]})


# ---- refusals -------------------------------------------------------------------------------------------------------
REFUSED = {
    "a schedule of another name": "PL520",
    "too few micro-batches for 1f1b": "PL520",
    "no micro-batches": "PL520",
    "no chain": "PL521",
    "a cut that is not there": "PL521",
    "reading between blocks": "PL522",
    "writing between blocks": "PL522",
    "rows that see each other": "PL532",
    "rows times rows": "PL533",
    "few rows": "PL530",
    "read before backward": "PL524",
    "decided before backward": "PL524",
    "read a large output elsewhere": "PL525",
    "twice": "PL529",
    "two forwards": "PL529",
    "autograd.grad": "PL528",
    "a penalty": "PL528",
    "no number": "PL528",
    "no gradient": "PL528",
    "changed in place": "PL528",
    "contrastive, 1f1b": "PL531",
    "contrastive, gpipe": "",
    "saved": "PL526",
    "somebody holds on": "PL527",
    "another way": "PL523",
}


def test_what_is_refused() -> None:
    first, second = run(pipeline_cases.refusals, 2)
    assert first == REFUSED
    last_stage = {"read a large output elsewhere": ""}
    assert second == {**REFUSED, **last_stage, "another way": second["another way"]}
    assert second["another way"] in ("PL523", "PL534")  # PL534: the first rank has said why, and gone


# ---- everything else ------------------------------------------------------------------------------------------------
def test_what_a_loop_may_do_besides() -> None:
    for found in run(pipeline_cases.features, 2):
        described, drawn, picture = found.pop("text")
        assert found.pop("wrong state") == "PL610"
        for what, value in found.items():
            assert value is True if isinstance(value, bool) else abs(value) <= EXACT, what
        assert described.startswith("stage")
        assert drawn.splitlines()[0].startswith("rank 0  0F0")
        assert picture == "<svg"


@pytest.mark.long
def test_two_pipelines_side_by_side() -> None:
    for found in run(pipeline_cases.side_by_side, 4):
        assert found["gpipe"] < 2e-3  # parameters of float32 after a step in bfloat16
        assert found["1f1b"] < 2e-3
        assert found["cut"] == ["blocks.2"]
        assert found["told"]


def test_a_rank_holds_what_its_stages_need(tmp_path: Path) -> None:
    """Parameters, gradients and the state of AdamW: 16 bytes for each parameter of the rank's stages, and next to nothing for others."""
    script = Path(__file__).with_name("stage_memory.py")
    flags = ("-n", "3", "--strategy", "pipeline", "--run-dir", tmp_path / "run")
    done = run_paceline("run", script, *flags, "--", tmp_path, cwd=tmp_path, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert sum(each["mine"] for each in found) == 12 * (512 * 512 + 512)
    for each in found:
        assert each["mine"] <= 6 * (512 * 512 + 512)
        assert each["held"] == pytest.approx(16 * each["mine"], rel=0.15)
