"""Networks that are cut and healed, and a slow one: bar 7, and the partitions of the failure model."""

from __future__ import annotations

from pathlib import Path

from chaos.machines import LEASE, Both, on_both
from drills.work import Work
from support.disturbed import Wrong
from support.network import lacking, network


def links(work: Work) -> None:
    """Cuts of both directions or of one, with the majority on this side or the other; then a link of 1 Mbit/s for one of four."""
    if why := lacking():
        work.row(f"not drilled: {why}", 0)
        return
    cuts, wanted = 0, 2 if work.quick else 10
    for number in work.repeat(wanted, wanted):
        home = work.directory(number)
        with work.judged(home):
            _cuts(home, work, number)
            cuts += 1
    work.all_of("cuts after which the right side went on, and nobody with an old state", cuts, wanted)
    if not work.wrong:
        home = work.directory(wanted)
        with work.judged(home):
            _slow(home, work, 10.0 if work.quick else 60.0)


def _cuts(home: Path, work: Work, number: int) -> None:
    """One cut, longer than a lease, and its healing."""
    outnumbered = number % 3 == 1  # the coordinator's side is the smaller one: all wait
    left, right = (1, 2) if outnumbered else (2, 1)
    sides = ((), (0,), (1,))[(number + number // 3) % 3]
    with network() as net, on_both(net, home, left, right) as both:
        both.left.steps(10)
        net.cut(*sides)
        seconds = LEASE + 1 + 4 * work.draw.random()
        if outnumbered:
            _nobody_commits(both, 2 * LEASE + 2)
        else:
            _one_side_commits(both, seconds)
        net.heal()
        both.left.steps(20, seconds=90)
        if not outnumbered:
            both.trains_on_right(seconds=90)
        both.left.steps(20)
        both.end()


def _one_side_commits(both: Both, seconds: float) -> None:
    ledgers = both.left.ledgers
    both.left.until(lambda: len(ledgers.members) == 2, LEASE + 10, "the majority should go on")
    alone = both.committed(right=True)
    both.left.watch(seconds)
    if both.committed(right=True) != alone or both.committed(right=False) < alone + 10:
        raise Wrong(f"cut at step {alone}: {both.committed(right=False)} here, {both.committed(right=True)} there")


def _nobody_commits(both: Both, seconds: float) -> None:
    """Neither side may: here are too few, and there is no coordinator."""
    both.left.watch(1.0)
    step = both.left.ledgers.step
    both.left.watch(seconds)
    if both.left.ledgers.step > step + 1:
        raise Wrong(f"a side without a majority went from step {step} to {both.left.ledgers.step}")
    if "no majority, so the run waits" not in both.left.said:
        raise Wrong(f"it was not said why nobody goes on\n{both.left.said[-4000:]}")


def _slow(home: Path, work: Work, seconds: float) -> None:
    """1 Mbit/s for one of four, who is not taken for dead."""
    with network() as net, on_both(net, home, 3, 1) as both:
        group, first = both.left.ledgers.group, both.left.ledgers.step
        net.limit(1, "1mbit")
        both.left.watch(seconds)
        both.left.steps(2)
        work.row("steps a second with 1 Mbit/s for one of four", (both.left.ledgers.step - first) / seconds)
        work.all_of("1 Mbit/s for one of four: nobody is left out", int(both.left.ledgers.group == group), 1)
        net.unlimit(1)
        both.end()
