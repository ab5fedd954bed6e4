"""What a drill is given, and what it hands back."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import Bar, median
from support.disturbed import Wrong
from turns import Others


@dataclass
class Work:
    """One drill's share of the soak.

    Args:
        name: Of the drill.
        home: A directory of its own, kept when something was wrong.
        seed: Of everything random in it.
        seconds: For how long it should begin new repetitions.
        quick: Fewer of them.

    Attributes:
        rows: For the table and the file.
        bars: Its promises.
        wrong: What was wrong; empty when the drill is passed.
    """

    name: str
    home: Path
    seed: int
    seconds: float
    quick: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self._began = time.monotonic()
        self._others = Others()

    @property
    def left(self) -> float:
        """Seconds."""
        return self._began + self.seconds - time.monotonic()

    def repeat(self, full: int, quick: int) -> Iterator[int]:
        """Numbers of repetitions, as many as there is time for, but one at least, and none after something was wrong."""
        for number in range(quick if self.quick else full):
            if self.wrong or (number and self.left <= 0):
                return
            yield number

    def directory(self, number: int) -> Path:
        """For one run."""
        path = self.home / f"{self.name}-{number}"
        path.mkdir(parents=True)
        return path

    @contextmanager
    def judged(self, directory: Path) -> Iterator[None]:
        """What is found wrong in the block is written down, with the place where its run lies; so is what the drill did not foresee."""
        try:
            yield
        except Exception as error:
            said = str(error) if isinstance(error, Wrong) else traceback.format_exc()
            self.wrong.append(f"{said}\nseed {self.seed}, run directory {directory} (kept)")

    # -- results
    def timed(self, what: str, times: Sequence[float], wanted: int, p50: float = 0.0, p99: float = 0.0) -> None:
        """A row of `times` in seconds, and bars that their percentiles must not exceed."""
        if not times:
            return
        middle, high = median(times), percentile(times, 0.99)
        how = f"{what}, {len(times)} of {wanted}, seed {self.seed}"
        self.row(how, middle, p50=middle, p99=high, repetitions=list(times))
        for name, limit, value in (("median", p50, middle), ("99th percentile", p99, high)):
            if limit:
                self.at_most(f"{what}: {name}, s", limit, value)

    def row(self, what: str, value: float, **more: Any) -> None:
        self.rows.append({"drill": self.name, "what": what, "value": value, **more})

    def at_most(self, name: str, limit: float, value: float) -> None:
        self.bars.append(Bar(f"{self.name}: {name}: {value:.3g}, {limit:g} allowed", 1.0, limit / max(value, 1e-9)))

    def all_of(self, name: str, done: int, wanted: int) -> None:
        """Every single one."""
        self.bars.append(Bar(f"{self.name}: {name}: {done} of {wanted}", 1.0, done / max(wanted, 1)))

    def finish(self) -> None:
        """How long it took, and who disturbed."""
        seconds = time.monotonic() - self._began
        self.row(f"{self.name}: seconds", seconds, seed=self.seed, others_cores=self._others.cores())


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * len(ordered)))]
