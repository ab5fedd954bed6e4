"""An adopted loader: it iterates like the user's own and yields this rank's rows of each global batch.

1. ``iter(feed)`` opens a pass. The data stream is captured if need be, and torch's own iterator is made over this rank's
   loader (`inner`), whose sampler walks the user's (`walk`) or whose collate function cuts (`rows`).
2. ``next()``: may the job stop here? Then the rows are read, with the board saying so; the job is told the batch's
   ``Slice``, and the loop gets the rows as the user's ``collate_fn`` made them.
3. A rank without a row in a batch (fewer rows than ranks) gets a phantom when one is wanted; otherwise the batch passes by.
4. At the end the job is told the ``EpochEnd``. ``commit()``, called after an optimizer step, moves the position.

A few things differ from one process, and must: random augmentation in the main process or in a map-style data set's
workers draws from each rank's own stream; and a loop that evaluates batches with fewer rows than ranks goes round only
where there is a row, which whatever depends on the number of rounds (a nested loop over another loader) will see.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from paceline.data.course import Course
from paceline.data.inner import build, is_walked, refuse
from paceline.data.loop import Hooks, Pass, Reader
from paceline.data.position import Cursor, Origin, Position, Rewind, Sources, length_of
from paceline.data.rows import EpochEnd, Slice
from paceline.data.split import Cut
from paceline.data.streams import Streams
from paceline.data.walk import Walk
from paceline.terms.activity import Activity, Board, Phase


def _nothing(*_: object) -> None:
    return None


def _always() -> bool:
    return True


class Feed(DataLoader[Any]):
    """What ``job.adopt(loader)`` returns. Length, attributes and ``set_epoch`` of samplers are the user's loader's.

    A ``DataLoader`` only so that ``isinstance`` says so: it has no settings of its own, every attribute is looked up in
    the user's loader and set there.

    Args:
        loader: The user's; its batch size is global. Refused with AdoptError (PL305, PL306) where it cannot be divided.
        rank, size: Which rows are read here.
        streams: The job's data stream, shared by all its feeds.
        index: Which of the job's loaders this is.
        activity: Where reading is shown as ``Phase.INPUT``.
        before_pass: Called first in ``iter(feed)``.
        before_batch, want_phantom, on_batch, on_epoch, before_end: See :class:`~paceline.data.loop.Hooks`.
        shares: Relative speeds of all ranks, for unequal pieces.
        shards: Cut batches to train on into so many shards, whatever the number of ranks; the loop gets one after the other.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        rank: int,
        size: int,
        streams: Streams,
        index: int = 0,
        activity: Activity | None = None,
        before_pass: Callable[[], None] = _nothing,
        before_batch: Callable[[], bool | None] = _nothing,
        want_phantom: Callable[[], bool] = _always,
        on_batch: Callable[[Slice], None] = _nothing,
        on_epoch: Callable[[EpochEnd], None] = _nothing,
        before_end: Callable[[], bool] = bool,
        shares: Sequence[float] | None = None,
        shards: int = 0,
    ) -> None:
        # DataLoader's own constructor would make a second set of settings.
        refuse(loader)
        self._loader = loader
        self._cut = Cut(rank, size, tuple(shares) if shares is not None else None, shards)
        self._streams = streams
        self._index = index
        self._activity = activity or Board.private(1).activity(0)
        self._before_pass = before_pass
        self._hooks = Hooks(before_batch, want_phantom, on_batch, on_epoch, before_end)
        self._walked = is_walked(loader)
        self._aligned = False
        self._inner: tuple[DataLoader[Any], Walk | None] | None = None
        self._epoch = -1
        self._course: Course | None = None
        self._origin: Origin | None = None
        self._committed = self._before = self._stepped = Cursor()
        self._resume: Position | None = None
        # Weak: when the loop drops its iterator (`break`), the pass is over, and workers end as torch ends them.
        self._pass: Callable[[], Pass | None] = _nothing

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Pass:  # type: ignore[override]  # torch names its private class as the return type
        self._before_pass()
        self._streams.begin()
        sources = self._sources()
        if not self._aligned:
            sources.align()
            self._aligned = True
        self._report()
        course = self._open(sources)
        with self._activity.during(Phase.INPUT, "starting the loader"):
            new = self._start(course)
        old = self._pass()
        if old is not None and self._loader.persistent_workers:
            old.leave_to(new)
        self._pass = weakref.ref(new)
        return new

    def commit(self) -> None:
        """Say that everything the loop got so far has been trained on: the position moves here, and only here."""
        self.step()
        self.commit_steps()

    def step(self) -> None:
        """Say that everything the loop got so far has been stepped on, which may be undone: the position stays."""
        if self._course is not None:
            self._stepped = self._course.seen

    def commit_steps(self) -> None:
        """Say that these steps count: the position moves to where the last of them was."""
        if self._course is not None:
            self._before, self._committed = self._committed, self._stepped

    @property
    def live(self) -> bool:
        """A loop holds the open pass, and can be given rows of it once more."""
        return self._course is not None and not self._course.ended and self._pass() is not None

    @property
    def trained(self) -> bool:
        """An optimizer step has used rows of the open pass."""
        return self._course is not None and not self._course.ended and self._committed.batch > 0

    def resplit(self, rank: int, size: int, *, again: bool = False, now: bool = True) -> None:
        """Go on as another of another number of ranks: the loop that holds the open pass gets what follows the last commit.

        Args:
            again: What was committed last is given once more.
            now: False: the open pass stays as it was cut, and the next one is cut anew.
        """
        self._cut = Cut(rank, size, shards=self._cut.shards)
        old, course, restored = self._pass(), self._course, self._resume
        self._inner = None
        if old is None or not now or (restored is None and (course is None or course.ended)):
            return
        if restored is None:
            position = Position.from_json(self.state_dict())
            if again:
                position = replace(position, cursor=self._before, ahead=True)
            self.load_state_dict(position.to_json())
        new = self._start(self._open(self._sources()))
        old.leave_to(new)
        self._pass = weakref.ref(new)

    def close(self) -> None:
        """Report a pass that was left early, and let persistent workers end. Called when the job ends.

        By reference count, not by the garbage collector: torch's workers do not hear a collected loader and are waited
        for in vain, five seconds each.
        """
        self._report()
        self._inner = None

    def state_dict(self) -> dict[str, Any]:
        """The committed position, as JSON values. The data stream itself is saved by ``Streams.state_dict``."""
        if self._resume is not None:
            return self._resume.to_json()
        course = self._course
        length, held = length_of(self._loader), tuple(self._sources().read_held())
        if course is None or course.ended or self._pass() is None:
            seen = course.seen if course else Cursor()
            return Position(length, self._epoch, seen, False, False, None, held).to_json()
        ahead = max(course.num_drawn, course.seen.batch) > self._committed.batch
        return Position(length, self._epoch, self._committed, ahead, course.again, self._origin, held).to_json()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved position, with any number of ranks: the next ``iter()`` yields the batch after it.

        Call it after ``Streams.load_state_dict``. What worker processes draw for themselves (augmentation; the order of
        a data set that shuffles while it is walked, if the workers are persistent) begins anew.

        Raises:
            UsageError: The position is not one of this loader (PL308). That its *order* is another one is found by the
                first ``next()`` (StepError, PL308).
        """
        position = Position.from_json(saved)
        position.check(self._loader)
        self._sources().write_held(position.held)
        self._epoch = position.epoch
        self._course = self._inner = None
        self._resume = position if position.begin else None

    def _report(self) -> None:
        """Tell how far an open pass came: another begins. Should it go on nevertheless, its end is told too."""
        course = self._course
        if course is not None and not course.reported:
            course.reported = True
            self._hooks.on_epoch(course.report())

    def _sources(self) -> Sources:
        return Sources(self._loader, self._streams, walked=self._walked)

    def _open(self, sources: Sources) -> Course:
        """The course of a new pass, or of the one to be resumed."""
        resumed, self._resume = self._resume, None
        if resumed is None or resumed.begin is None:
            self._epoch += 1
            self._origin = sources.snapshot()
            self._committed = self._before = self._stepped = Cursor()
            self._course = Course(self._index, self._epoch, again=self._inner is not None)
            return self._course
        self._origin = resumed.begin
        self._committed = self._before = self._stepped = resumed.cursor
        rewind = Rewind(sources, resumed.begin)
        self._course = Course(self._index, self._epoch, resumed.cursor, rewind, resumed.ahead, resumed.again)
        return self._course

    def _start(self, course: Course) -> Pass:
        """Make torch's iterator, and with it the worker processes; catch up where there is no sampler to do it."""
        inner, walk = self._built()
        streams, workers = self._streams, self._loader.num_workers
        counted = self._loader.batch_sampler is None or walk is None
        if walk is not None:
            walk.course = course
            course.seen = course.skip
            return self._pass_over(iter(inner), course, counted=counted)
        # The data set is walked: starting it, torch's base_seed and (without workers) each row draw from the data stream.
        rewind = course.rewind or nullcontext
        with rewind(), streams.drawing():
            new = self._pass_over(iter(inner), course, counted=counted)
            if course.rewind:
                new.catch_up()
        if course.rewind and course.ahead and not workers:
            course.rewind.stay(stream=True, held=True)
        return new

    def _pass_over(self, rows: Iterator[Any], course: Course, *, counted: bool) -> Pass:
        entered = self._streams.drawing if self._walked and not self._loader.num_workers else nullcontext
        reader = Reader(rows, entered, counted, self._load, self._cut.rank)
        return Pass(reader, course, self._hooks, self._activity)

    def _built(self) -> tuple[DataLoader[Any], Walk | None]:
        """This rank's loader: a new one each pass, as its settings may have changed; persistent workers stay."""
        if self._inner is not None:
            return self._inner
        built = build(self._loader, self._cut, self._streams, self._hooks.want_phantom)
        if self._loader.persistent_workers:
            self._inner = built
        return built

    def _load(self, indices: Any) -> Any:
        """Read rows here and now."""
        return self._loader.collate_fn([self._loader.dataset[index] for index in indices])
