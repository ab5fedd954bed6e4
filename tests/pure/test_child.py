"""Bytes from a pipe as lines, however they are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.launch.child import Lines


@given(st.lists(st.text("ab\näß", max_size=8)), st.randoms(use_true_random=False))
def test_lines_do_not_depend_on_how_the_bytes_come(texts: list[str], random: object) -> None:
    data = "".join(texts).encode()
    cuts = sorted(random.randrange(len(data) + 1) for _ in range(3))  # type: ignore[attr-defined]
    lines = Lines(None)
    found: list[str] = []
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if begin < end:
            found += lines.feed(data[begin:end])
    found += lines.rest()
    expected = data.decode().split("\n")
    assert found == (expected if expected[-1] else expected[:-1])


def test_a_line_without_an_end_is_cut() -> None:
    lines = Lines(10)
    assert lines.feed(b"x" * 8) == []
    assert lines.feed(b"y" * 8) == ["x" * 8 + "y" * 8]
    assert lines.feed(b"z\n") == ["z"]


def test_bytes_that_are_no_text_are_shown_all_the_same() -> None:
    assert Lines(None).feed(b"a\xffb\n") == ["a�b"]
