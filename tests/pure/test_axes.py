"""Products: how ranks are laid out, what is refused, and that text and value are the same thing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.exchange.axes import Axis, Mesh, mesh
from paceline.exchange.strategy import build
from paceline.terms.errors import UsageError


def lay_out(text: str, size: int, rank: int = 0) -> Mesh:
    exchange = build(text)
    return mesh(exchange.axes, exchange.ranks, size, rank, exchange.text)


@pytest.mark.parametrize(
    "text",
    [
        "fsdp()",
        "fsdp(stage=2)",
        "fsdp(ranks=2) * ddp(ranks=2)",
        "tensor(ranks=2, plan='blocks.*=replicate')",
        "pipeline(ranks=2, schedule='1f1b') * ddp()",
        "pipeline(ranks=2, schedule=gpipe, microbatches=4) * tensor(ranks=2) * local_sgd(every=4)",
        "ddp(ranks=2) * gossip(graph=ring)",
    ],
)
def test_text_and_value_are_the_same(text: str) -> None:
    exchange = build(text)
    assert build(exchange.text).text == exchange.text


def test_1f1b_is_a_word_here() -> None:
    assert build("pipeline(2, schedule=1f1b)").text == build("pipeline(2, schedule='1f1b')").text


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), replicas=st.integers(1, 3))
def test_every_rank_has_a_place_of_its_own(sizes: list[int], replicas: int) -> None:
    """Coordinates are a bijection, left inside; batches are cut once for each reader; groups part all ranks."""
    kinds = ("pipeline", "tensor", "fsdp")
    axes = tuple(Axis(kind, n) for kind, n in zip(kinds, sizes, strict=False))
    size = replicas * math.prod(sizes)
    layouts = [mesh(axes, None, size, rank, "text") for rank in range(size)]
    places = {(m.replica, *(m.where(axis.kind) for axis in axes)) for m in layouts}
    assert len(places) == size
    readers: dict[int, int] = {}
    for m in layouts:
        readers[m.reader] = readers.get(m.reader, 0) + 1
        assert 0 <= m.reader < m.readers
    assert len(set(readers.values())) == 1
    assert sum(m.leads for m in layouts) == layouts[0].readers
    for axis in axes:
        groups = layouts[0].groups(axis.kind)
        assert sorted(rank for group in groups for rank in group) == list(range(size))
        for group in groups:
            assert [layouts[rank].where(axis.kind) for rank in group] == list(range(layouts[0].along(axis.kind)))


def test_neighbours_are_along_the_first_factor() -> None:
    where = [
        (m.where("pipeline"), m.where("tensor"), m.replica)
        for m in (lay_out("pipeline(2) * tensor(2) * ddp()", 8, r) for r in range(8))
    ]
    assert where[:4] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert where[4] == (0, 0, 1)


@pytest.mark.parametrize(
    ("text", "size", "replicas"),
    [("fsdp", 4, 1), ("fsdp(2) * ddp", 4, 2), ("tensor(2)", 2, 1), ("tensor(2) * ddp", 8, 4), ("fsdp(4)", 8, 2)],
)
def test_what_is_left_goes_to_who_has_no_number(text: str, size: int, replicas: int) -> None:
    assert lay_out(text, size).replicas == replicas


@pytest.mark.parametrize(
    ("text", "size", "code"),
    [
        ("tensor(3)", 4, "PL211"),
        ("tensor(2) * ddp(2)", 8, "PL211"),
        ("pipeline(2) * tensor(2)", 2, "PL211"),
        ("fsdp * fsdp(2)", 4, "PL212"),
        ("fsdp * tensor", 4, "PL212"),
        ("pipeline(2) * fsdp(2)", 4, "PL212"),
        ("local_sgd(4) * ddp", 4, "PL204"),
        ("fsdp(2) * ps(staleness=4)", 4, "PL204"),
        ("tensor(2) * ddp(exact=True)", 4, "PL204"),
        ("tensor(2) * ddp(params=shared)", 4, "PL204"),
        ("tensor(2) * then(ddp, after=3, next=local_sgd)", 4, "PL204"),
        ("pipeline(schedule=dapple)", 2, "PL203"),
        ("pipeline(microbatches=0)", 2, "PL203"),
        ("pipeline(cuts=',')", 2, "PL203"),
        ("fsdp(stage=4)", 2, "PL203"),
        ("fsdp(0)", 2, "PL203"),
        ("tensor(plan='a=diagonal')", 2, "PL203"),
        ("tensor(plan=3)", 2, "PL203"),
    ],
)
def test_refused(text: str, size: int, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        lay_out(text, size)
    assert caught.value.code == code
