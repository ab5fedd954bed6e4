"""What several ranks print is folded to one line, in order, on a virtual clock."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.observe.output import Folder
from paceline.observe.words import spans


def pairs(lines: object) -> list[tuple[str, str]]:
    return [(label, text) for label, text in lines]  # type: ignore[attr-defined]


def test_a_line_of_all_ranks_is_shown_once_and_at_once() -> None:
    folder = Folder(3)
    for rank in range(3):
        folder.feed(rank, "epoch 1", "stdout", 0.0)
    assert pairs(folder.due(0.0)) == [("[0-2]", "epoch 1")]
    assert pairs(folder.due(9.0)) == []


def test_a_line_of_some_ranks_waits_for_the_window() -> None:
    folder = Folder(4)
    folder.feed(2, "hello", "stdout", 0.0)
    folder.feed(0, "hello", "stdout", 0.1)
    assert pairs(folder.due(0.14)) == []
    assert pairs(folder.due(0.15)) == [("[0,2]", "hello")]
    folder.feed(1, "hello", "stdout", 0.16)
    assert pairs(folder.due(0.5)) == [("[1]", "hello")]


def test_fewer_ranks_make_a_whole_line_sooner_and_labels_stay() -> None:
    folder = Folder(1)
    folder.feed(0, "alone", "stdout", 0.0)
    assert pairs(folder.due(0.0)) == [("", "alone")]
    folder.resize(3)
    for rank in (0, 4):
        folder.feed(rank, "hello", "stdout", 0.0)
    assert pairs(folder.due(0.0)) == []
    folder.resize(2)
    assert pairs(folder.due(0.0)) == [("[0,4]", "hello")]
    folder.resize(1)
    folder.feed(4, "the last", "stdout", 1.0)
    assert pairs(folder.due(1.0)) == [("[4]", "the last")]


def test_different_streams_are_different_lines() -> None:
    folder = Folder(2)
    folder.feed(0, "a", "stdout", 0.0)
    folder.feed(1, "a", "stderr", 0.0)
    assert [(line.label, line.text, line.err) for line in folder.flush()] == [("[0]", "a", False), ("[1]", "a", True)]


def test_a_rank_does_not_overtake_itself() -> None:
    folder = Folder(2)
    for text in ("a", "b", "a"):
        folder.feed(0, text, "stdout", 0.0)
    for text in ("b", "a"):
        folder.feed(1, text, "stdout", 0.0)
    assert pairs(folder.flush()) == [("[0]", "a"), ("[0-1]", "b"), ("[0-1]", "a")]


def test_the_same_line_twice_of_one_rank_is_two_lines() -> None:
    folder = Folder(2)
    for rank in (0, 0, 1, 1):
        folder.feed(rank, "x", "stdout", 0.0)
    assert pairs(folder.due(0.0)) == [("[0-1]", "x"), ("[0-1]", "x")]


def test_one_rank_has_no_label_and_does_not_wait() -> None:
    folder = Folder(1)
    folder.feed(0, "x\n", "stdout", 0.0)
    assert pairs(folder.due(0.0)) == [("", "x")]


def test_a_progress_bar_shows_what_stood_last() -> None:
    folder = Folder(1)
    folder.feed(0, "\r 10%|#   \r 50%|##  \r", "stderr", 0.0)
    folder.feed(0, "dos line\r", "stdout", 0.0)
    folder.feed(0, "", "stdout", 0.0)
    assert [line.text for line in folder.flush()] == [" 50%|##  ", "dos line", ""]


def test_a_flood_of_equal_lines_costs_no_more_than_its_lines() -> None:
    folder = Folder(2)
    for _ in range(20_000):
        folder.feed(0, ".", "stdout", 0.0)
    for _ in range(20_000):
        folder.feed(1, ".", "stdout", 0.0)
    lines = folder.flush()
    assert sum(2 if line.label == "[0-1]" else 1 for line in lines) == 40_000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.floats(0, 0.1)), max_size=60))
def test_no_line_is_lost_doubled_or_out_of_order(prints: list[tuple[int, str, float]]) -> None:
    folder, now, shown = Folder(4), 0.0, []
    for rank, text, later in prints:
        now += later
        folder.feed(rank, text, "stdout", now)
        shown += folder.due(now)
    shown += folder.flush()
    for rank in range(4):
        seen = [line.text for line in shown if rank in members(line.label)]
        assert seen == [text for r, text, _ in prints if r == rank]


def members(label: str) -> set[int]:
    found: set[int] = set()
    for part in label.strip("[]").split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_spans() -> None:
    assert spans([]) == ""
    assert spans([3]) == "3"
    assert spans([7, 0, 1, 2, 5, 6, 9]) == "0-2,5-7,9"
