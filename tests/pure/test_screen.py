"""The screen draws what it should in every width, and nothing that happens to the terminal reaches the run."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest

from paceline.observe.picture import Meter, Strip, headline, region
from paceline.observe.screen import Screen
from paceline.terms.activity import TIMED, Phase, Snapshot


def snapshot(rank: int, phase: Phase = Phase.COMPUTE, **more: Any) -> Snapshot:
    values: dict[str, Any] = {
        "pid": 1,
        "since": 0.0,
        "step": 0,
        "epoch": 0,
        "rows": 0,
        "beat": 0.0,
        "adopted": True,
        "operation": 0,
        "what": "",
        "where": "train.py:31 in train",
        "waits_for": (),
        "spent": dict.fromkeys(TIMED, 0.0),
    }
    return Snapshot(rank=rank, phase=phase, **(values | more))


def shown(strips: Sequence[Strip]) -> list[str]:
    return ["".join(text for text, _ in strip) for strip in strips]


def metered(snapshots: Sequence[Snapshot], now: float) -> Meter:
    """A start, a first step of no rows, and two seconds in which the ranks came from there to what they are."""
    meter = Meter()
    meter.see([snapshot(s.rank, Phase.STARTING) for s in snapshots], now - 9)
    meter.see([snapshot(s.rank, Phase.STARTING, step=min(s.step, 1)) for s in snapshots], now - 2)
    meter.see(snapshots, now)
    return meter


SPENT = {Phase.COMPUTE: 1.0, Phase.EXCHANGE: 0.5, Phase.WAIT: 0.5, Phase.INPUT: 0.0}


# ---- the picture -----------------------------------------------------------------------------------------------------
def test_a_rank_has_a_line_with_shares_phase_and_place() -> None:
    ranks = [
        snapshot(0, Phase.FINISHED, step=20, epoch=3, rows=640, spent=SPENT),
        snapshot(1, Phase.WAIT, since=8.0, what="backward, bucket 1/2", waits_for=(0,), step=20, spent=SPENT),
    ]
    lines = shown(region(ranks, {"loss": 0.31213}, metered(ranks, 10.0), now=10.0, width=120, height=10))
    assert lines[0] == "step 20 · epoch 3 · 320 samples/s · 105 ms/step · loss 0.3121"
    assert lines[1].startswith("rank 0 ████████████▓▓▓▓▓▓░░░░░░  has ended")
    assert "waits 2.0 s for rank 0: backward" in lines[2]
    assert lines[2].rstrip().endswith("train.py:31 in train")


def test_a_short_wait_does_not_flicker() -> None:
    ranks = [snapshot(0, Phase.WAIT, since=9.9, what="backward", spent=SPENT)]
    assert "backward" not in shown(region(ranks, {}, metered(ranks, 10.0), now=10.0, width=120, height=10))[1]


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_no_line_is_too_long_and_no_region_too_high(size: int) -> None:
    phases = list(Phase)
    ranks = [
        snapshot(r, phases[r % 7], since=0.0, what="w" * 50, where="x" * 99, waits_for=(0, 5, 9), spent=SPENT)
        for r in range(size)
    ]
    values = {f"value{n}": math.nan for n in range(9)}
    for width, height in product([1, 2, 5, 9, 20, 39, 40, 41, 60, 80, 200], [1, 2, 3, 40]):
        strips = region(ranks, values, metered(ranks, 2.0), now=2.0, width=width, height=height)
        assert len(strips) <= height, (width, height)
        assert max(map(len, shown(strips))) <= width, (width, height)


def test_many_ranks_share_lines_by_what_they_do() -> None:
    ranks = [
        snapshot(r, Phase.COMPUTE if r == 5 else Phase.WAIT, what=f"backward, bucket {r}/40", spent=SPENT)
        for r in range(32)
    ]
    lines = shown(region(ranks, {}, metered(ranks, 10.0), now=10.0, width=100, height=40))
    assert len(lines) == 3
    assert lines[1].startswith("ranks 0-4,6-31 ")
    assert lines[2].startswith("rank 5 ")


def test_few_lines_hold_all_ranks() -> None:
    ranks = [snapshot(r, list(Phase)[r % 7], spent=SPENT) for r in range(12)]
    lines = shown(region(ranks, {}, metered(ranks, 10.0), now=10.0, width=100, height=4))
    assert len(lines) == 4
    assert "others" in lines[3]


def test_a_screen_without_unicode_has_bars_too() -> None:
    ranks = [snapshot(0, Phase.FINISHED, spent=SPENT)]
    line = shown(region(ranks, {}, metered(ranks, 10.0), now=10.0, width=120, height=10, unicode=False))[1]
    assert "############++++++......" in line


def test_rates_are_not_guessed() -> None:
    meter = Meter()
    meter.see([snapshot(0)], 1.0)
    assert headline(meter.progress(), {}) == "step 0 · epoch 0"


def test_a_rate_begins_with_the_first_step_and_ends_with_the_last() -> None:
    """Neither the start nor a step that is not over is in it."""
    meter = Meter()
    for tenth in range(200):  # four seconds to the first step, then a step every three seconds
        meter.see([snapshot(0, step=max(0, tenth - 10) // 30, rows=max(0, tenth - 10) // 30 * 60)], tenth / 10)
        rate = meter.progress().seconds_per_step
        assert rate == (None if tenth < 70 else pytest.approx(3.0)), tenth
        assert meter.progress().samples_per_second == (None if tenth < 70 else pytest.approx(20.0))
    meter.see([snapshot(0, step=6, rows=360)], 40.0)
    assert meter.progress().seconds_per_step is None  # nothing moves any more


def test_a_replacement_has_a_line_at_once_and_shares_when_it_was_seen_twice() -> None:
    meter = Meter()
    meter.see([snapshot(0), snapshot(1)], 10.0)
    meter.see([snapshot(0), snapshot(5, since=10.5)], 11.0)
    assert meter.shares([5]) == {}
    lines = shown(region([snapshot(0), snapshot(5)], {}, meter, now=11.0, width=100, height=9, noun="worker"))
    assert [line.split("  ")[0] for line in lines[1:]] == ["worker 0 " + "█" * 24, "worker 5"]
    meter.see([snapshot(0), snapshot(5, since=10.5)], 13.5)
    assert meter.shares([5])[Phase.COMPUTE] == 1.0


def test_a_phase_that_is_not_over_counts() -> None:
    meter = Meter()
    for now in (1.0, 2.0, 3.0):
        meter.see([snapshot(0, Phase.INPUT, since=0.0)], now)
    assert meter.shares([0])[Phase.INPUT] == 1.0


# ---- plain and json --------------------------------------------------------------------------------------------------
class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_lines_and_now_and_then_progress() -> None:
    out, err, clock = io.StringIO(), io.StringIO(), Clock()
    screen = Screen(2, out=out, err=err, clock=clock)
    assert screen.mode == "plain"
    screen.line("hello", "[0-1]")
    screen.line("\x1b[31mred\x1b[0m\x1b[2J\x1b]0;title\x07\x1b7 bell\x07", "[0]", err=True)
    for tenth in range(100):
        clock.now = tenth / 10
        ranks = [snapshot(r, step=tenth // 50, rows=tenth) for r in range(2)]
        screen.update(ranks, {"loss": 0.5}, clock.now)
    screen.finish(["done"])
    screen.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "[0-1] hello"
    assert lines[-1] == "done"
    assert [line.split(" · ")[0] for line in lines[1:-1]] == ["step 0", "step 1"]  # no line where nothing has changed
    assert lines[1].endswith("loss 0.5")
    assert err.getvalue() == "[0] \x1b[31mred\x1b[0m bell\n"


def test_an_epoch_that_ends_is_told_but_not_more_than_one_a_second_and_always_the_last() -> None:
    out, clock = io.StringIO(), Clock()
    screen = Screen(1, mode="plain", out=out, clock=clock)
    for tenth in range(25):
        clock.now = tenth / 10
        screen.epoch(tenth, 3 * tenth, {"loss": 0.5})
        screen.update([snapshot(0, step=3 * tenth)], {"loss": 0.5}, clock.now)
    screen.finish(["done"])
    lines = out.getvalue().splitlines()
    assert [line.split(" · ")[:2] for line in lines[:-1]] == [
        [f"epoch {e} done", f"step {3 * e}"] for e in (0, 10, 20, 24)
    ]
    assert all(line.endswith("loss 0.5") for line in lines[:-1])


def test_an_epoch_as_json() -> None:
    out = io.StringIO()
    screen = Screen(1, mode="json", out=out, clock=Clock())
    screen.epoch(4, 30, {"loss": 0.25})
    screen.finish([])
    told = json.loads(out.getvalue().splitlines()[0])
    assert told == {"kind": "epoch", "epoch": 4, "step": 30, "samples_per_second": None, "values": {"loss": 0.25}}


def test_a_silent_run_says_now_and_then_where_it_is() -> None:
    out, clock = io.StringIO(), Clock()
    screen = Screen(2, mode="plain", out=out, clock=clock)
    for second in range(70):
        clock.now = float(second)
        screen.update([snapshot(0, Phase.WAIT), snapshot(1, where="data.py:7 in load")], {}, clock.now)
    assert out.getvalue().splitlines() == ["step 0 · epoch 0 · rank 1 at data.py:7 in load"] * 2


def test_lines_of_progress_come_every_two_to_five_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    screen = Screen(1, mode="plain", out=out, clock=clock)
    times = []
    for tenth in range(6000):
        clock.now = tenth / 10
        before = len(out.getvalue())
        screen.update([snapshot(0, step=tenth)], {}, clock.now)
        if len(out.getvalue()) > before:
            times.append(clock.now)
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) == pytest.approx(2.0, abs=0.11)
    assert max(gaps) == pytest.approx(5.0, abs=0.11)


def test_json_is_strict_and_one_object_a_line() -> None:
    out, clock = io.StringIO(), Clock()
    screen = Screen(1, mode="json", out=out, clock=clock)
    screen.line("hello\nworld", "[0]")
    clock.now = 3.0
    screen.update([snapshot(0, Phase.WAIT, waits_for=(1,))], {"loss": math.nan}, 3.0)
    screen.finish(["done"], {"ok": True})
    objects = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [o["kind"] for o in objects] == ["line", "line", "progress", "summary"]
    assert objects[0] == {"kind": "line", "label": "[0]", "stream": "stdout", "text": "hello"}
    assert objects[2]["values"] == {"loss": "nan"}
    assert objects[2]["ranks"][0]["waits_for"] == [1]
    assert objects[3] == {"kind": "summary", "lines": ["done"], "ok": True}


# ---- terminals that go away ------------------------------------------------------------------------------------------
class Breaking(io.StringIO):
    """A terminal that is gone after some writes."""

    def __init__(self, writes: int, error: Exception, tty: bool = True) -> None:
        super().__init__()
        self.left, self.error, self.tty = writes, error, tty

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)

    def isatty(self) -> bool:
        return self.tty


@pytest.mark.parametrize("mode", ["live", "plain", "json"])
def test_a_terminal_that_goes_away_is_nobodys_failure(mode: Any) -> None:
    gone = (BrokenPipeError(32, "pipe"), OSError(5, "hung up"), ValueError("closed file"), BlockingIOError(11, "full"))
    for error, writes in product(gone, [0, 1, 5]):
        clock, out = Clock(), Breaking(writes, error)
        screen = Screen(2, mode=mode, out=out, err=out, clock=clock)
        for second in range(10):
            clock.now += 1
            screen.line("hello", "[0]", err=bool(second % 2))
            screen.update([snapshot(r, step=second) for r in range(2)], {"loss": 1.0}, clock.now)
        screen.finish(["done"])
        screen.close()
        assert out.left < 0, (error, writes)


def test_a_closed_pipe_does_not_change_the_exit_status() -> None:
    """`paceline run | head -1`: the interpreter's own flush at exit must not fail either."""
    program = (
        "from paceline.observe.screen import Screen\n"
        "s = Screen(1)\n"
        "for n in range(5000): s.line('x' * 100)\n"
        "s.finish(['done']); s.close()\n"
    )
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        os.read(read, 10)
        os.close(read)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors == b""


def test_characters_that_the_terminal_does_not_have_are_replaced() -> None:
    raw = io.BytesIO()
    screen = Screen(1, mode="plain", out=io.TextIOWrapper(raw, encoding="ascii"))
    screen.line("größe █")
    screen.close()
    assert raw.getvalue() == b"gr??e ?\n"


# ---- live ------------------------------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "20")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_auto_is_live_on_a_terminal_and_plain_on_a_dumb_one(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Screen(1, out=terminal).mode == "live"
    monkeypatch.setenv("TERM", "dumb")
    assert Screen(1, out=terminal).mode == "plain"


def test_lines_stand_above_the_region_whole_and_the_region_goes_at_the_end(terminal: Terminal) -> None:
    clock = Clock()
    screen = Screen(1, mode="live", out=terminal, clock=clock)
    clock.now = 1.0
    screen.update([snapshot(0)], {"loss": 0.5}, 1.0)
    assert "loss 0.5" in terminal.getvalue()
    before = len(terminal.getvalue())
    screen.line("[not markup] " + "long " * 50, "[0]")
    assert len(terminal.getvalue()) == before  # it comes with the next drawing
    clock.now = 2.0
    screen.update([snapshot(0, step=7)], {"loss": 0.25}, 2.0)
    drawn = terminal.getvalue()[before:]
    assert "\x1b[36m[0]\x1b[0m [not markup] " + "long " * 50 in drawn
    assert drawn.index("not markup") < drawn.index("loss 0.25")
    screen.finish(["done"])
    screen.close()
    screen.close()
    end = terminal.getvalue()
    assert end.rstrip().endswith("done")
    assert end.count("\x1b[?25l") == end.count("\x1b[?25h")  # the cursor is shown again


def test_many_updates_are_few_drawings(terminal: Terminal) -> None:
    clock = Clock()
    screen = Screen(1, mode="live", out=terminal, clock=clock)
    for milli in range(1000):
        clock.now = milli / 1000
        screen.update([snapshot(0, step=milli)], {}, clock.now)
    screen.close()
    assert 5 <= terminal.getvalue().count("epoch 0") <= 12


def test_trouble_with_the_picture_turns_to_plain_lines(terminal: Terminal) -> None:
    clock = Clock()
    screen = Screen(1, mode="live", out=terminal, clock=clock)
    clock.now = 1.0
    screen.update([snapshot(0)], {"loss": "no number"}, 1.0)  # type: ignore[dict-item]
    screen.line("still here", "[0]")
    screen.finish(["done"])
    screen.close()
    assert screen.mode == "plain"
    assert "the live view failed (ValueError" in terminal.getvalue()
    assert terminal.getvalue().splitlines()[-2:] == ["[0] still here", "done"]


def test_rich_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, paceline.observe.screen as s; s.Screen(1).line('x'); assert 'rich' not in sys.modules and 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
