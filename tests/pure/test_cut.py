"""Where models are cut, and the schedules that stages follow."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paceline.place.cut import Stage, chain, named, partition
from paceline.place.pipeline_schedule import COMPUTE, FORMS, Kind, Schedule, draw, svg, timetable
from paceline.terms.errors import AdoptError, UsageError

COSTS = st.lists(st.integers(0, 20), min_size=1, max_size=8)


@given(costs=COSTS, bytes_=st.lists(st.integers(0, 9), min_size=8, max_size=8), stages=st.integers(1, 4))
def test_no_other_cut_is_better(costs: list[int], bytes_: list[int], stages: int) -> None:
    if stages > len(costs):
        return
    found = partition(costs, bytes_, stages)
    assert [s.index for s in found] == list(range(stages))
    assert found[0].first == 0
    assert found[-1].last == len(costs)
    assert all(a.last == b.first for a, b in pairwise(found))

    def price(starts: tuple[int, ...]) -> tuple[int, int]:
        edges = [0, *starts, len(costs)]
        return max(sum(costs[a:b]) for a, b in pairwise(edges)), sum(bytes_[s] for s in starts)

    best = min(price(starts) for starts in combinations(range(1, len(costs)), stages - 1))
    worst, sent = price(tuple(s.first for s in found[1:]))
    assert worst == best[0]
    assert sent >= best[1]


def test_bytes_decide_between_cuts_that_cost_the_same() -> None:
    assert [s.first for s in partition([0, 4, 0, 4], [0, 9, 9, 1], 2)] == [0, 3]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def test_blocks_are_the_children_of_the_outermost_containers() -> None:
    model = nn.Module()
    model.stem = nn.Conv2d(1, 1, 1)
    model.layers = nn.ModuleList([nn.Sequential(Residual(), Residual()), Residual()])
    model.head = nn.Linear(2, 2)
    assert chain(model) == ["layers.0.0", "layers.0.1", "layers.1"]
    assert chain(Residual()) == ["inner.0", "inner.1"]
    assert chain(nn.Linear(2, 2)) == []


def test_a_named_cut_opens_what_it_is_in() -> None:
    model = nn.ModuleList([Residual(), Residual()])
    assert chain(model, ["1.inner"]) == ["0", "1.inner"]


def test_named_cuts() -> None:
    names = ["a", "b", "c", "d"]
    assert named(names, ["b", "d"], 3) == [Stage(0, 0, 1), Stage(1, 1, 3), Stage(2, 3, 4)]
    for cuts in (["b"], ["b", "e"], ["d", "b"], ["a", "b"], ["b", "b"]):
        with pytest.raises(AdoptError, match="PL521"):
            named(names, cuts, 3)


# ---- schedules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("ranks", "micro"), [(2, 4), (4, 8), (3, 6)])
def test_each_stage_sees_each_micro_batch_once(name: str, ranks: int, micro: int) -> None:
    schedule = Schedule.of(name, ranks, 2)
    for actions in (schedule.train(micro), schedule.fill_and_drain(micro)):
        everything = [a for listed in actions.values() for a in listed]
        assert len(set(everything)) == len(everything)
        wanted = {(stage, m) for stage in range(schedule.num_stages) for m in range(micro)}
        for kinds in ({Kind.FORWARD}, {Kind.BACKWARD, Kind.BACKWARD_INPUT}, {Kind.BACKWARD, Kind.BACKWARD_WEIGHT}):
            assert {(a.stage, a.micro) for a in everything if a.kind in kinds} == wanted
        for rank, listed in actions.items():
            assert {a.stage for a in listed} == set(schedule.stages_of(rank))
    assert all(a.kind not in COMPUTE or a.kind is Kind.FORWARD for a in schedule.forward_only(3)[0])


@pytest.mark.parametrize("name", FORMS)
def test_messages_arrive_in_the_order_in_which_they_are_sent(name: str) -> None:
    schedule = Schedule.of(name, 3, 2)
    actions = schedule.train(6)

    def channel(kind: Kind, step: int, sender: int, receiver: int) -> list[tuple[int, int, int]]:
        sending = [a for a in actions[sender] if a.kind is kind and schedule.rank_of(a.stage + step) == receiver]
        return [(step, a.stage + step, a.micro) for a in sending]

    for sender in range(3):
        for receiver in range(3):
            sent = [
                (
                    1 if a.kind is Kind.SEND_FORWARD else -1,
                    a.stage + (1 if a.kind is Kind.SEND_FORWARD else -1),
                    a.micro,
                )
                for a in actions[sender]
                if a.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
                and schedule.rank_of(a.stage + (1 if a.kind is Kind.SEND_FORWARD else -1)) == receiver
            ]
            received = [
                (1 if a.kind is Kind.RECEIVE_FORWARD else -1, a.stage, a.micro)
                for a in actions[receiver]
                if a.kind in (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD)
                and schedule.rank_of(a.stage - (1 if a.kind is Kind.RECEIVE_FORWARD else -1)) == sender
            ]
            assert sent == received


def test_fewer_idle_steps_with_better_schedules() -> None:
    def idle(name: str) -> int:
        schedule = Schedule.of(name, 4, 2)
        rows = timetable(schedule.train(8), schedule.num_stages)
        stages_each = schedule.num_stages // 4
        return sum(a is None for row in rows.values() for a in row) * 2 // stages_each

    assert idle("zero_bubble") < idle("interleaved") < idle("gpipe")


def test_the_picture() -> None:
    schedule = Schedule.of("1f1b", 2, 2)
    rows = timetable(schedule.train(3), 2)
    assert draw(rows) == (
        "rank 0  0F0 0F1 .   .   0B0 --- 0F2 0B1 --- .   0B2 ---\n"
        "rank 1  .   1F0 1B0 --- 1F1 1B1 --- 1F2 1B2 --- .   .\n"
        "idle 25% of the time, if all stages cost the same"
    )
    picture = svg(rows)
    assert picture.startswith("<svg")
    assert picture.count("<rect") == 12


@pytest.mark.parametrize(
    ("name", "ranks", "virtual", "micro"), [("zigzag", 2, 2, 4), ("interleaved", 2, 0, 4), ("1f1b", 4, 2, 3)]
)
def test_schedules_that_cannot_be(name: str, ranks: int, virtual: int, micro: int) -> None:
    with pytest.raises(UsageError, match="PL520"):
        Schedule.of(name, ranks, virtual).train(micro)
