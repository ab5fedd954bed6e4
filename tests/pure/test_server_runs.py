"""Whole runs with parameter servers on virtual time, and what the disciplines are good for. Planted bugs: ``test_server_planted``.

``pytest tests/pure/test_server_runs.py --seeds 20000`` runs more of them; a failure names its plan.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.exchange.server import Damp, Piece, Rule
from support.serving import Plan, World

BLOCK = 250
TIMES = 3  # runs for each of --seeds: they are short


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "block" in metafunc.fixturenames:
        seeds = TIMES * metafunc.config.getoption("--seeds")
        blocks = [range(low, min(low + BLOCK, seeds)) for low in range(0, seeds, BLOCK)]
        metafunc.parametrize("block", blocks, ids=[f"{b.start}-{b.stop - 1}" for b in blocks])


# ---- any run -------------------------------------------------------------------------------------------------------------
def test_every_run_ends_with_every_batch_in_one_update(block: range) -> None:
    updates = sum(simulate(Plan.draw(seed)).version for seed in block)
    assert updates > len(block)


def simulate(plan: Plan) -> World:
    try:
        return World(plan).run()
    except Exception as error:
        raise AssertionError(f"{plan}: {error}") from error


synchronous = st.builds(Rule, backup=st.integers(0, 2))
asynchronous = st.builds(
    Rule,
    st.sampled_from([1, 2, 3, math.inf]),
    buffer=st.integers(1, 3),
    damp=st.sampled_from([Damp(), Damp("inverse"), Damp("hinge", b=1)]),
)
times = st.lists(st.floats(0, 20), max_size=3).map(tuple)
plans = st.builds(
    Plan,
    seed=st.integers(0, 2**32),
    rule=synchronous | asynchronous,
    lengths=st.sampled_from([0, 1, 2, 5, 8]).flatmap(lambda n: st.sampled_from([(n,), (n, n)])),
    epochs=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    ahead=st.integers(0, 3),
    left=st.sampled_from(["step", "last", "carry", "break"]),
    meets=st.booleans(),
    speeds=st.lists(st.sampled_from([0.1, 1.0, 5.0]), min_size=1, max_size=5).map(tuple),
    fixed=st.sampled_from([0.0, 0.3]),
    latency=st.sampled_from([0.0, 0.2, 2.0]),
    jitter=st.sampled_from([0.0, 2.0]),
    kills=times,
    joins=times,
    restarts=st.lists(st.floats(0, 20), max_size=2).map(tuple),
    repeats=st.sampled_from([0.0, 0.5]),
    broken=st.sampled_from([0.0, 0.3]),
    behind=st.booleans(),
    named=st.booleans(),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans)
def test_any_plan_ends_with_every_batch_in_one_update(plan: Plan) -> None:
    World(plan).run()


def test_a_run_with_one_worker_is_the_plain_loop() -> None:
    for rule in (Rule(), Rule(backup=2), Rule(1), Rule(math.inf)):
        world = World(Plan(rule=rule, lengths=(7,), epochs=2, speeds=(1.0,))).run()
        assert [[p.batch for part in u for p in part.covers] for u in world.updates] == [[b] for b in range(7)] * 2
        assert world.core.histogram == {"worker-0": {0: 14}}


def test_whatever_the_speeds_a_synchronous_run_makes_the_same_sums() -> None:
    def sums(seed: int, speeds: tuple[float, ...]) -> list[list[tuple[Piece, ...]]]:
        plan = Plan(seed, lengths=(6, 6), accumulate=2, ahead=1, speeds=speeds, latency=0.0, jitter=2.0)
        return [[part.covers for part in update] for update in World(plan).run().updates]

    assert len({str(sums(seed, speeds)) for seed in range(10) for speeds in ((1, 1, 1), (9, 1, 0.1))}) == 1


# ---- what they are good for -----------------------------------------------------------------------------------------------
def throughput(rule: Rule, speeds: tuple[float, ...]) -> float:
    """Global batches a second, of a worker that needs one for a batch."""
    world = World(Plan(rule=rule, lengths=(200,), epochs=1, speeds=speeds, fixed=0.0, latency=0.0, jitter=0.0)).run()
    last = [time for time, _ in world.progress]
    return len(last) / last[-1]


def test_one_slow_worker_of_four_costs_a_synchronous_run_all_and_an_asynchronous_one_its_own_part() -> None:
    slow = (4.0, 1.0, 1.0, 1.0)
    rules = {
        "staleness=0": Rule(),
        "staleness=0, backup=1": Rule(backup=1),
        "staleness=1": Rule(1),
        "staleness=4": Rule(4),
        "staleness=inf": Rule(math.inf),
    }
    got = {name: throughput(rule, slow) for name, rule in rules.items()}
    for name, rate in got.items():
        print(f"{name:24}{rate:6.2f} batches a second")
    assert got["staleness=0"] == pytest.approx(1, rel=0.05)
    assert got["staleness=inf"] == pytest.approx(3.25, rel=0.05)
    assert got["staleness=4"] == pytest.approx(3.25, rel=0.05)
    assert got["staleness=0, backup=1"] > 2.5, "three parts each, and the slow one is always copied"
