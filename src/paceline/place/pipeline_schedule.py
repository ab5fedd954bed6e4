"""Which rank does what when: torch's own pipeline schedules, as data.

A schedule of ``torch.distributed.pipelining`` is built for stages that hold nothing; its list of actions per rank, with the sends
and receives that torch adds in an order that cannot deadlock, is what ``pipeline_run`` carries out. The same list is what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import Any

from torch import nn
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _ComputationType

from paceline.terms.errors import UsageError


class Kind(StrEnum):
    """What an action does; the values are torch's."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"


COMPUTE = {Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does: `kind`, for a stage and a micro-batch."""

    kind: Kind
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro}"


Actions = dict[int, list[Action]]


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of schedule.

    Attributes:
        torch_name: Class in ``torch.distributed.pipelining``.
        looped: Several stages on a rank; their number may be chosen.
        v: Stages go back and forth over the ranks, two on each.
        whole_loss: All forwards of the last stage come before its first backward.
    """

    torch_name: str
    looped: bool = False
    v: bool = False
    whole_loss: bool = False


FORMS: Mapping[str, Form] = {
    "gpipe": Form("ScheduleGPipe", whole_loss=True),
    "1f1b": Form("Schedule1F1B"),
    "interleaved": Form("ScheduleInterleaved1F1B", looped=True),
    "loopedbfs": Form("ScheduleLoopedBFS", looped=True, whole_loss=True),
    "interleaved_zero_bubble": Form("ScheduleInterleavedZeroBubble", looped=True),
    "zero_bubble": Form("ScheduleZBVZeroBubble", v=True),
}


@dataclass(eq=False)
class _Outline:
    """What torch's schedules ask of a stage when they are made."""

    stage_index: int
    num_stages: int
    group_rank: int
    group_size: int
    submod: nn.Module
    is_first: bool
    is_last: bool
    stage_index_to_group_rank: dict[int, int]


@dataclass(frozen=True)
class Schedule:
    """A schedule for some number of ranks and micro-batches.

    Attributes:
        name: One of :data:`FORMS`.
        ranks: Of the pipeline.
        num_stages: Over all ranks.
    """

    name: str
    ranks: int
    num_stages: int

    @classmethod
    def of(cls, name: str, ranks: int, virtual_stages: int) -> Schedule:
        """Raises UsageError PL520 for a schedule that does not exist."""
        if name not in FORMS:
            raise UsageError("PL520", f"schedule={name!r}", help=f"schedules are {', '.join(FORMS)}.")
        if virtual_stages < 1:
            raise UsageError("PL520", f"virtual_stages={virtual_stages}", help="give 1 or more.")
        form = FORMS[name]
        return cls(name, ranks, ranks * (virtual_stages if form.looped else 2 if form.v else 1))

    @property
    def form(self) -> Form:
        return FORMS[self.name]

    def rank_of(self, stage: int) -> int:
        """Which rank holds a stage."""
        if self.form.v:
            return stage if stage < self.ranks else self.num_stages - 1 - stage
        return stage % self.ranks

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in the order of the forward."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]

    # ---- actions ----------------------------------------------------------------------------------------------------
    def train(self, micro: int) -> Actions:
        """A training step of `micro` micro-batches. Raises UsageError PL520 where torch's schedule does not work for that number."""
        try:
            order = self._torch_order(micro)
        except (ValueError, AssertionError) as error:
            raise UsageError(
                "PL520", f"schedule {self.name} with {micro} micro-batches on {self.ranks} ranks: {error}"
            ) from None
        return self._with_messages(order)

    def fill_and_drain(self, micro: int) -> Actions:
        """All forwards, then all backwards: for the first batch, whose loss is computed whole."""
        kinds = (_ComputationType.FORWARD, _ComputationType.FULL_BACKWARD)
        return self._with_messages({rank: self._phase(rank, micro, kinds) for rank in range(self.ranks)})

    def forward_only(self, micro: int) -> Actions:
        """For evaluation."""
        kinds = (_ComputationType.FORWARD,)
        return self._with_messages({rank: self._phase(rank, micro, kinds) for rank in range(self.ranks)})

    def _phase(self, rank: int, micro: int, kinds: Sequence[_ComputationType]) -> list[_Action]:
        stages = self.stages_of(rank)
        orders = (stages, stages[::-1])
        return [
            _Action(stage, kind, m)
            for kind, order in zip(kinds, orders, strict=False)
            for stage in order
            for m in range(micro)
        ]

    def _torch_order(self, micro: int) -> dict[int, list[_Action]]:
        cls: Any = getattr(torch_schedules, self.form.torch_name)
        outlines = [self._outline(stage, 0) for stage in self.stages_of(0)]
        single = not (self.form.looped or self.form.v)
        made = cls(outlines[0] if single else outlines, micro, loss_fn=_no_loss)
        order = {rank: [a for a in actions if a is not None] for rank, actions in made.pipeline_order.items()}
        return {rank: _numbered([a for a in actions if a.is_compute_op]) for rank, actions in order.items()}

    def _outline(self, stage: int, rank: int) -> _Outline:
        last = stage == self.num_stages - 1
        return _Outline(stage, self.num_stages, rank, self.ranks, nn.Identity(), stage == 0, last, {})

    def _with_messages(self, order: dict[int, list[_Action]]) -> Actions:
        full = _add_send_recv({rank: list(a) for rank, a in order.items()}, self.rank_of, self.num_stages)
        return {rank: [_ours(a) for a in full[rank]] for rank in sorted(full)}


def _no_loss(*_: Any) -> Any:
    raise AssertionError("the schedule is data here")


def _numbered(actions: list[_Action]) -> list[_Action]:
    """Micro-batches from 0 in the order in which they come. Torch 2.13 numbers the forwards of 1F1B's last rank from 1."""
    counters: dict[tuple[int, Any], Callable[[], int]] = {}
    seen: dict[tuple[int, Any], list[int]] = {}
    for a in actions:
        assert a.microbatch_index is not None
        seen.setdefault((a.stage_index, a.computation_type), []).append(a.microbatch_index)
    shifted = {key for key, numbers in seen.items() if min(numbers) != 0}
    for key in shifted:
        counters[key] = count().__next__
    return [
        a._replace(microbatch_index=counters[a.stage_index, a.computation_type]())
        if (a.stage_index, a.computation_type) in shifted
        else a
        for a in actions
    ]


def _ours(a: _Action) -> Action:
    assert a.microbatch_index is not None
    return Action(Kind(a.computation_type.value), a.stage_index, a.microbatch_index)


# ---- drawing --------------------------------------------------------------------------------------------------------
def timetable(actions: Actions, num_stages: int) -> dict[int, list[Action | None]]:
    """When each rank computes what, if a forward takes one unit of time, and so does each half of a backward.

    A full backward takes two. Messages take none.
    """
    at = dict.fromkeys(actions, 0)
    todo = {rank: [a for a in listed if a.kind in COMPUTE] for rank, listed in actions.items()}
    done: dict[tuple[str, int, int], int] = {}
    rows: dict[int, list[Action | None]] = {rank: [] for rank in actions}
    while any(todo.values()):
        before = sum(map(len, todo.values()))
        for rank, listed in todo.items():
            while listed and (ready := _ready(listed[0], num_stages, done)) is not None:
                a = listed.pop(0)
                start, length = max(at[rank], ready), 2 if a.kind is Kind.BACKWARD else 1
                rows[rank] += [None] * (start - len(rows[rank])) + [a] * length
                at[rank] = start + length
                done[
                    "F" if a.kind is Kind.FORWARD else "W" if a.kind is Kind.BACKWARD_WEIGHT else "B", a.stage, a.micro
                ] = at[rank]
        assert sum(map(len, todo.values())) < before, "a schedule that cannot go on"
    end = max(map(len, rows.values()))
    return {rank: row + [None] * (end - len(row)) for rank, row in rows.items()}


def _ready(a: Action, num_stages: int, done: Mapping[tuple[str, int, int], int]) -> int | None:
    """From when on an action can be done; None: not known yet."""
    if a.kind is Kind.FORWARD:
        return done.get(("F", a.stage - 1, a.micro)) if a.stage else 0
    if a.kind is Kind.BACKWARD_WEIGHT:
        return done.get(("B", a.stage, a.micro))
    if a.stage == num_stages - 1:
        return done.get(("F", a.stage, a.micro))
    return done.get(("B", a.stage + 1, a.micro))


def draw(rows: Mapping[int, Sequence[Action | None]]) -> str:
    """Rows are ranks, columns time. ``0F2``: stage 0, forward of micro-batch 2; B, I, W: backward, its input and weight halves."""
    width = max((len(str(a)) for row in rows.values() for a in row if a), default=1)
    lines = []
    for rank, row in rows.items():
        cells = []
        for before, a in zip([None, *row], row, strict=False):
            again = a is not None and a is before
            cells.append(("-" * width) if again else (str(a) if a else ".").ljust(width))
        lines.append(f"rank {rank}  " + " ".join(cells).rstrip())
    idle = sum(a is None for row in rows.values() for a in row) / max(1, sum(map(len, rows.values())))
    return "\n".join([*lines, f"idle {idle:.0%} of the time, if all stages cost the same"])


_COLORS = {
    Kind.FORWARD: "#9ecae1",
    Kind.BACKWARD: "#a1d99b",
    Kind.BACKWARD_INPUT: "#a1d99b",
    Kind.BACKWARD_WEIGHT: "#fdd0a2",
}


def svg(rows: Mapping[int, Sequence[Action | None]]) -> str:
    """The same picture as an SVG document."""
    cell, height, left = 34, 26, 60
    columns = max(map(len, rows.values()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + columns * cell + 10}" height="{len(rows) * height + 20}" '
        'font-family="sans-serif" font-size="11">'
    ]
    for y, (rank, row) in enumerate(rows.items()):
        top = 10 + y * height
        parts.append(f'<text x="4" y="{top + 16}">rank {rank}</text>')
        x = 0
        while x < len(row):
            a, length = row[x], 1
            while a is not None and x + length < len(row) and row[x + length] is a:
                length += 1
            if a is not None:
                parts.append(
                    f'<rect x="{left + x * cell}" y="{top}" width="{length * cell - 1}" height="{height - 2}" '
                    f'fill="{_COLORS[a.kind]}" stroke="#444"/>'
                    f'<text x="{left + x * cell + length * cell / 2}" y="{top + 16}" text-anchor="middle">{a}</text>'
                )
            x += length
    return "\n".join([*parts, "</svg>"]) + "\n"
