"""The proof that a run lost no row and counted none twice, offline, from its ledger.

1. Steps are 1, 2, 3 ... without a gap, each made of the same global batches wherever it was recorded, and committed by one group:
   no two groups committed the same step.
2. All who were there walked the same order.
3. The parts of all members cover the rows of every completed epoch exactly once. A member that died may have had no time to write
   its last step down: its part then is what the other parts of that step leave open, and nothing else may be open.

Imports no torch, so that the command line stays quick.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.terms.errors import FileError
from paceline.train.attempts import Lines, earlier, joined

Span = tuple[int, int]


def verify(run_dir: Path, *, alive: bool = False) -> list[str]:
    """Check the ledger of a run; the list of what is wrong, empty when everything is proved.

    Args:
        alive: The run goes on: its ranks need not have come equally far.

    Raises:
        FileError: There is no ledger, or a line cannot be read (PL603).
    """
    return problems(load(run_dir), alive=alive)


def load(run_dir: Path) -> Lines:
    """The lines of every process, by file name, of all attempts. Raises FileError PL603 for a line that is no JSON object.

    The last line of a process that was killed may be torn; then it was not written.
    """
    places = [path for path in (*earlier(run_dir), run_dir) if path == run_dir or (path / "ledger").is_dir()]
    return joined([attempt for path in places for attempt in _of(path)])


def _of(run_dir: Path) -> list[Lines]:
    """The ledgers of one attempt; of several, where a server took over from one that had died: its file is ``server-0.2``."""
    files = sorted((run_dir / "ledger").glob("*.jsonl"))
    if not files:
        raise FileError(
            "PL603",
            f"{run_dir} has no ledger",
            help="the run wrote none: it had no adopted loader, or it never started.",
        )
    attempts: dict[int, Lines] = {}
    for file in files:
        name, _, number = file.stem.partition(".")
        attempts.setdefault(int(number or 1), {})[name] = list(_lines(file))
    return [lines for _, lines in sorted(attempts.items())]


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    rows = file.read_bytes().split(b"\n")
    for number, raw in enumerate(rows[:-1], 1):
        try:
            line = json.loads(raw)
            line["k"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileError("PL603", f"{file.name} line {number} is not a ledger line: {raw[:60]!r}") from error
        yield line


@dataclass
class Step:
    """What the ledgers say of one step.

    Attributes:
        batches: Each different list of global batches, as text.
        groups: The epochs of the groups that committed it.
        parts: By process, the rows of each global batch that it had.
    """

    batches: dict[str, list[list[int]]] = field(default_factory=dict)
    groups: set[int] = field(default_factory=set)
    parts: dict[str, list[list[int]]] = field(default_factory=dict)


@dataclass
class Story:
    """All ledgers of a run, put together.

    Attributes:
        steps: By number.
        members: By epoch of the group, the names of its members; empty for a run that is not elastic.
        last: By process, its last step.
        out_of_turn: What is wrong with the order of steps within one file.
        base: The step that the run was resumed from, when that was done elsewhere; ``before``: rows of open passes until then.
    """

    steps: dict[int, Step] = field(default_factory=lambda: defaultdict(Step))
    members: dict[int, list[str]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    out_of_turn: list[str] = field(default_factory=list)
    base: int = 0
    before: list[list[int]] = field(default_factory=list)

    @property
    def newest(self) -> list[str]:
        """Members of the last group."""
        return self.members[max(self.members)] if self.members else list(self.last)

    def stayed(self, name: str) -> bool:
        """It was there at the end. What another one had left open when it was left out, the others have done again."""
        return not self.members or name in self.newest


def problems(ledgers: Lines, *, alive: bool = False) -> list[str]:
    """The proof itself, on lines in memory. Pure."""
    story = _read(ledgers)
    if alive:
        story.last.clear()
    return [*story.out_of_turn, *_steps(story), *_orders(ledgers, story), *_cover(ledgers, story)]


def _read(ledgers: Lines) -> Story:
    story = Story()
    for name, lines in ledgers.items():
        done, group = 0, 0
        for line in lines:
            if line["k"] == "g":
                if line["s"] < done:
                    story.out_of_turn.append(
                        f"{name}: group {line['g']} begins at step {line['s']}, and step {done} was committed"
                    )
                done, group = line["s"], line["g"]
                story.members.setdefault(group, line["members"])
            elif line["k"] == "r":
                done = line["s"]
                if "here" not in line:
                    story.base, story.before = done, line["r"]
            elif line["k"] == "c":
                if line["s"] != done + 1:
                    story.out_of_turn.append(
                        f"{name}: step {line['s']} was committed where step {done + 1} was expected"
                    )
                done = line["s"]
                step = story.steps[done]
                step.batches[str([r[:4] for r in line["r"]])] = line["r"]
                step.groups.add(group)
                step.parts[name] = line["r"]
        story.last[name] = done
    return story


def _steps(story: Story) -> Iterator[str]:
    """Steps have no gap, one content, and one group."""
    for number in range(story.base + 1, max(story.steps, default=0) + 1):
        if number not in story.steps:
            yield f"step {number} was committed by nobody"
            continue
        step = story.steps[number]
        if len(step.batches) > 1:
            yield f"step {number}: ranks committed different global batches: {' / '.join(sorted(step.batches))}"
        if len(step.groups) > 1:
            yield f"step {number} was committed by several groups: {', '.join(map(str, sorted(step.groups)))}"
        strangers = sorted(set(step.parts) - set(story.members.get(min(step.groups), step.parts)))
        if strangers:
            yield f"step {number} was committed by {', '.join(strangers)}, no member of group {min(step.groups)}"
    last = {name: story.last[name] for name in story.newest if name in story.last}
    if len(set(last.values())) > 1:
        yield "ranks applied different numbers of steps: " + ", ".join(f"{n} {s}" for n, s in sorted(last.items()))


def _orders(ledgers: Lines, story: Story) -> Iterator[str]:
    orders: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    for name, lines in ledgers.items():
        for line in lines:
            if line["k"] == "e" and (line["complete"] or story.stayed(name)):
                said = (line["rows"], line["batches"], line["complete"], line["order"])
                orders[line["l"], line["e"]][name] = str(said)
    for (loader, epoch), by_name in sorted(orders.items()):
        if len(set(by_name.values())) > 1:
            told = ", ".join(f"{n} {o}" for n, o in sorted(by_name.items()))
            yield f"loader {loader}, epoch {epoch}: ranks walked different orders: {told}"
        absent = sorted(set(ledgers) - set(by_name))
        if absent and len(story.members) < 2:
            yield f"loader {loader}, epoch {epoch}: {', '.join(absent)} did not end it"


def _cover(ledgers: Lines, story: Story) -> Iterator[str]:
    """The parts of all ranks cover the rows of every completed epoch exactly once."""
    parts: dict[tuple[int, int], list[Span]] = defaultdict(list)
    trained = set()
    for loader, epoch, _, _, start, rows in story.before:
        parts[loader, epoch].append((start, start + rows))
    for step in story.steps.values():
        for place, span in _parts_of(step, story):
            trained.add(place)
            parts[place].append(span)
    totals: dict[tuple[int, int], int] = {}
    for name, lines in ledgers.items():
        for line in lines:
            if line["k"] == "v" or (line["k"] == "x" and story.stayed(name)):
                for loader, epoch, _, _, start, rows in line["r"]:
                    parts[loader, epoch].append((start, start + rows))
            elif line["k"] == "e" and line["complete"]:
                totals[line["l"], line["e"]] = line["rows"]
    for place, total in sorted(totals.items()):
        if (
            place in trained or len(story.members) < 2
        ):  # members come and go in an evaluation: its rows are no part of a step
            yield from _exactly_once(place, parts[place], total)


def _parts_of(step: Step, story: Story) -> Iterator[tuple[tuple[int, int], Span]]:
    """Who had which rows; what a member did not live to write down is what the others leave open."""
    unwritten = set(story.members.get(min(step.groups), ())) - set(step.parts)
    whole = next(iter(step.batches.values()))
    for index, (loader, epoch, first, rows, _, _) in enumerate(whole):
        spans = sorted((p[index][4], p[index][4] + p[index][5]) for p in step.parts.values() if index < len(p))
        spans = [span for span in spans if span[0] < span[1]]
        at = first
        for start, stop in [*spans, (first + rows, first + rows)]:
            if unwritten and at < start:
                yield (loader, epoch), (at, start)
            if start < stop:
                yield (loader, epoch), (start, stop)
            at = max(at, stop)


def _exactly_once(place: tuple[int, int], spans: list[Span], total: int) -> Iterator[str]:
    loader, epoch = place
    at = 0
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if start > at:
            yield f"loader {loader}, epoch {epoch}: rows {at}..{start - 1} were read by no rank"
        elif start < at:
            yield f"loader {loader}, epoch {epoch}: rows {start}..{min(at, stop) - 1} were read twice"
        at = max(at, stop)
    if at != total:
        yield f"loader {loader}, epoch {epoch}: rows {at}..{total - 1} were read by no rank"
