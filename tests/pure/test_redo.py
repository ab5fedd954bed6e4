"""A toy loop drives ``Redo`` as the real one does: whatever the moment of an abort, every step is applied once, of its own batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from paceline.train.redo import Redo

BATCHES = 12


class Toy:
    """A loader with a committed position, an accumulator, and an abort at the n-th backward."""

    def __init__(self, abort_at: set[int]) -> None:
        self.redo = Redo()
        self.redo.rounds = True
        self.position = self.committed = self.before = 0
        self.open: list[int] = []
        self.current: int | None = None
        self.applied: list[tuple[str, tuple[int, ...]]] = []
        self.backwards = 0
        self.abort_at = abort_at
        self.rounds = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            if self.redo.next_round():
                self.current = None
                self.rounds += 1
                yield -1
                continue
            if self.position == BATCHES:
                return
            self.current = self.position
            self.position += 1
            self.rounds += 1
            yield self.current

    def backward(self) -> None:
        self.redo.backward()
        self.backwards += 1
        if self.current is not None:
            self.open.append(self.current)
        if self.backwards in self.abort_at:
            again = self.redo.abort()
            self.position = self.before if again else self.committed
            self.committed = self.position
            self.open.clear()

    def step(self, name: str = "") -> None:
        if self.redo.step():
            self.applied.append((name, tuple(dict.fromkeys(self.open))))
            self.open.clear()
            self.redo.commit()
            self.before, self.committed = self.committed, self.position


def plain(toy: Toy) -> None:
    for _ in toy:
        toy.backward()
        toy.step()


def accumulating(k: int) -> Callable[[Toy], None]:
    def run(toy: Toy) -> None:
        for i, _ in enumerate(toy, 1):
            toy.backward()
            if i % k == 0:
                toy.step()

    return run


@pytest.mark.parametrize("at", range(1, BATCHES + 1))
def test_a_plain_step_is_done_again(at: int) -> None:
    toy = Toy({at})
    plain(toy)
    assert toy.applied == [("", (i,)) for i in range(BATCHES)]
    assert toy.rounds == BATCHES + 1


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("at", range(1, BATCHES + 1))
def test_an_accumulated_step_is_done_again_in_time_with_the_counter(k: int, at: int) -> None:
    toy = Toy({at})
    accumulating(k)(toy)
    assert [batches for _, batches in toy.applied] == [tuple(range(i, i + k)) for i in range(0, BATCHES, k)]


def test_two_aborts_in_one_step() -> None:
    toy = Toy({6, 7, 8})
    accumulating(2)(toy)
    assert [batches for _, batches in toy.applied] == [(i, i + 1) for i in range(0, BATCHES, 2)]


@pytest.mark.parametrize("at", range(1, 2 * BATCHES + 1))
def test_of_two_optimizers_none_steps_twice(at: int) -> None:
    toy = Toy({at})
    for _ in toy:
        toy.backward()
        toy.step("D")
        toy.backward()
        toy.step("G")
    names = [name for name, _ in toy.applied]
    assert names == ["D", "G"] * BATCHES


def test_a_step_applied_by_others_is_not_done_again() -> None:
    toy = Toy(set())
    rounds = iter(toy)
    next(rounds)
    toy.backward()
    toy.redo.healed()
    toy.position = toy.committed = 1  # given by the others
    toy.open.clear()
    toy.step()
    assert toy.applied == []
    assert next(rounds) == 1
    toy.backward()
    toy.step()
    assert toy.applied == [("", (1,))]


def test_a_loop_without_a_loader_goes_on_with_its_next_backward() -> None:
    redo = Redo()
    redo.backward()
    redo.abort()
    assert not redo.step()
    redo.backward()
    assert redo.step()


def test_rounds_that_are_undone_count_for_nothing_and_nothing_is_replayed() -> None:
    """Where ranks step on their own, steps that were applied are put back, and done once more."""
    toy = Toy(set())
    rounds = iter(toy)
    for _ in range(2):
        next(rounds)
        toy.backward()
        toy.step()
    toy.redo.rewind()  # inside of the second opt.step()
    assert toy.redo.aborted
    assert not toy.redo.step()  # what else this round of the loop steps
    toy.position = toy.committed = 0
    assert next(rounds) == 0
    assert not toy.redo.aborted
    assert not toy.redo.replaying


def test_a_loop_that_was_accumulating_when_its_steps_were_undone_is_given_fillers() -> None:
    redo = Redo()
    redo.rounds = True
    for _ in range(3):  # a step of three backwards
        assert not redo.next_round()
        redo.backward()
    assert redo.step()
    redo.commit()
    assert not redo.next_round()
    redo.backward()
    redo.rewind()  # at the end of a pass, one backward into the next step
    given = []
    for _ in range(2):
        given.append(redo.next_round())
        redo.backward()
    assert given == [True, True]
    assert not redo.step()
    assert not redo.next_round()
    redo.backward()
