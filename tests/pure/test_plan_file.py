"""A plan survives its own text."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.launch.plan_file import emit, parse
from paceline.terms.errors import UsageError
from paceline.terms.plan import Plan

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    st.builds(
        Plan,
        script=TEXT,
        script_args=st.lists(TEXT, max_size=3).map(tuple),
        processes=st.integers(1, 99),
        strategy=TEXT,
        seed=st.none() | st.integers(0, 2**63 - 1),
        threads=st.integers(1, 99),
        wire=st.sampled_from(["auto", "shm", "torch"]),
        stop_on_nan=st.booleans(),
        workers_min=st.integers(0, 9),
        workers_max=st.integers(0, 9),
        checkpoint=TEXT,
        resume=TEXT,
        settings=st.dictionaries(TEXT.filter(bool), TEXT, max_size=3).map(lambda d: tuple(d.items())),
    )
)
def test_round_trip(plan: Plan) -> None:
    assert parse(emit(plan)) == plan


def test_it_reads_like_what_a_person_would_write() -> None:
    text = emit(Plan("train.py", ("--lr", "0.1"), 4, "ddp()", settings=(("OMP_NUM_THREADS", "1"),)))
    assert 'script_args = ["--lr", "0.1"]' in text
    assert 'strategy = "ddp()"' in text
    assert 'OMP_NUM_THREADS = "1"' in text
    assert tomllib.loads(text)["processes"] == 4


@pytest.mark.parametrize(
    "text",
    ["", "script = 3", 'script = "a"\nprocesses = "two"', 'script = "a"\nnodes = 2', 'script = "a"\nprocesses = true'],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert refused.value.code == "PL105"
