"""What the stages of one rank compute in one pass of a batch through the pipeline, and what the last of them does with the loss.

The last stage works in one of three modes:

*outputs*: it computes the model's outputs for each micro-batch; the loss is computed once, on the outputs put together.
*ending*: it stops after the last block; what the model does then is computed once, for the whole batch. For models that compute
their loss themselves, or anything else that is one number for a batch.
*parts*: it computes outputs and this micro-batch's part of the loss, so that its backward can begin at once.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from paceline.place import deferred_share
from paceline.place.absent import Absent
from paceline.place.deferred import Record, Ref
from paceline.place.deferred_share import Slice
from paceline.place.pipeline_cut import Parts
from paceline.place.pipeline_pieces import Batch, dependent, join, row_dim, split
from paceline.place.pipeline_run import Passage
from paceline.place.pipeline_walk import Gates, Reached, Route, StageWalk
from paceline.terms.errors import StepError

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass
class Setting:
    """What stays the same from pass to pass.

    Attributes:
        model, forward: The user's model, and the forward that it had before.
        gates: Of the model.
        parts: How it is shared out.
        mine: The stages of this rank.
        held: Names and parameters of each of them.
        enter, leave: What is done to activations that are received and sent.
    """

    model: nn.Module
    forward: Callable[..., Any]
    gates: Gates
    parts: Parts
    mine: list[int]
    held: dict[int, list[tuple[str, nn.Parameter]]]
    home: torch.device
    seed: int
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]


@dataclass
class Trip:
    """One batch on its way through the pipeline.

    Attributes:
        batch: Its arguments.
        whole: The route of the whole batch.
        routes: Those of its micro-batches.
        key: The situation; what is announced once for each.
        number: Of the pass, for random draws.
        mode: Of the last stage.
        record, loss: What is done with its outputs; none in evaluation.
        autocast: Enters the script's autocast region.
    """

    batch: Batch
    whole: Route
    routes: list[Route]
    key: Hashable
    number: int
    mode: str
    record: Record | None = None
    loss: Ref | None = None
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    leavings: dict[int, list[Tensor]] = field(default_factory=dict)
    grads: list[list[Tensor | None]] | None = None
    outputs: list[Tensor] | None = None
    values: dict[Ref, Tensor] = field(default_factory=dict)
    portions: list[Tensor] = field(default_factory=list)
    divisors: list[Any] = field(default_factory=list)
    fault: str = ""

    @property
    def training(self) -> bool:
        return self.loss is not None


class StageWork:
    """The work of this rank's stages for one trip."""

    def __init__(self, setting: Setting, trip: Trip) -> None:
        self.setting, self.trip = setting, trip
        self.last = setting.parts.stages[-1].index
        self.end = len(setting.parts.positions)
        if trip.mode == "parts" and self.last in setting.mine and self._sums():
            trip.divisors = self._whole_divisors()

    # ---- the runner's questions -------------------------------------------------------------------------------------
    def inputs(self, stage: int, micro: int) -> tuple[Hashable, int]:
        """See :class:`~paceline.place.pipeline_run.Work`."""
        lo, hi = self.trip.batch.bounds[micro]
        labels = self.trip.routes[micro].crossing(self.setting.parts.stages[stage].first)
        return (stage, hi - lo, self.trip.key, self.trip.training), len(labels)

    def weights(self, stage: int) -> Iterator[nn.Parameter]:
        """Parameters that a stage trains."""
        return (p for _, p in self.setting.held[stage] if p.requires_grad)

    def forward(self, stage: int, micro: int, passage: Passage, received: Sequence[Tensor]) -> None:
        """Run one stage for one micro-batch."""
        trip, setting = self.trip, self.setting
        part, is_last = setting.parts.stages[stage], stage == self.last
        args, kwargs = trip.batch.piece(micro)
        through = is_last and trip.mode != "ending"
        walk = StageWalk(
            setting.gates,
            trip.routes[micro],
            part.first,
            part.last,
            [setting.enter(t) for t in received],
            setting.home,
            through=through,
            losses=self._losses(micro) if through and trip.divisors else None,
        )
        with self.drawing(micro, stage), trip.autocast():
            try:
                output = walk.run(setting.forward, args, kwargs)
                if not through:
                    raise StepError("PL523", "the forward ended before the block with which the next stage begins")
            except Reached:
                output = None
            if through:
                passage.leaving = self._outputs(output, trip.routes[micro])
                if trip.mode == "parts":
                    passage.root = self.part(micro, passage.leaving)
            else:
                passage.leaving = [setting.leave(t) for t in walk.leaving()]
        if is_last:
            trip.leavings[micro] = [t.detach() for t in passage.leaving]

    def before_backward(self, stage: int, micro: int, passage: Passage) -> None:
        """The gradients of what the last stage has left."""
        if self.trip.mode == "parts":
            return
        if self.trip.grads is None:
            self.trip.grads = self.whole_loss()
        grads = self.trip.grads[micro]
        passage.grads = [g for g, t in zip(grads, passage.leaving, strict=True) if t.requires_grad]

    # ---- outputs ----------------------------------------------------------------------------------------------------
    def _outputs(self, output: Any, route: Route) -> list[Tensor]:
        leaves = tree.tree_leaves(output)
        found = [leaves[i] for i in dependent(route.output)]
        for t in found:
            if isinstance(t, Absent):
                raise StepError("PL522", f"the model returns {t.origin}")
        return found

    def _dims(self) -> list[int | None]:
        """In which dimension each of the things that leave the last stage has rows."""
        trip = self.trip
        if self.trip.mode == "ending":
            labels = trip.whole.crossing(self.end)
            pairs = [(trip.whole.metas[x].shape, trip.routes[0].metas[x].shape) for x in labels]
        else:
            pairs = list(zip(_shapes(trip.whole), _shapes(trip.routes[0]), strict=True))
        return [row_dim(whole, part, "an output") for whole, part in pairs]

    def _joined(self) -> list[Tensor]:
        parts = [self.trip.leavings[m] for m in range(self.trip.batch.count)]
        return [join([p[i] for p in parts], dim) for i, dim in enumerate(self._dims())]

    def ending(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """What the model does after its last block, for the whole batch."""
        trip, setting = self.trip, self.setting
        walk = StageWalk(setting.gates, trip.whole, self.end, self.end, joined, setting.home, through=True)
        with self.drawing(-1, self.last), trip.autocast():
            output = walk.run(setting.forward, trip.batch.args, trip.batch.kwargs)
        return self._outputs(output, trip.whole)

    def finish(self) -> None:
        """On the last stage, after all: the whole outputs, and the values of numbers that were recorded."""
        trip = self.trip
        if trip.outputs is None:
            joined = self._joined()
            if trip.mode == "parts":
                joined = self._summed(joined)
            with torch.no_grad():
                trip.outputs = self.ending(joined) if trip.mode == "ending" else joined
        if trip.record is not None and not trip.values:
            assert trip.loss is not None
            with torch.no_grad(), self.drawing(-2, self.last):
                others = [ref for ref in trip.record.scalars() if ref != trip.loss]
                trip.values = trip.record.evaluate(trip.outputs, others)
                trip.values[trip.loss] = torch.stack(trip.portions).sum()

    def _summed(self, joined: list[Tensor]) -> list[Tensor]:
        """Outputs that are parts of a number are added up, not put side by side."""
        count = self.trip.batch.count
        sums = self._sums()
        return [
            torch.stack([self.trip.leavings[m][i] for m in range(count)]).sum(0) if i in sums else t
            for i, t in enumerate(joined)
        ]

    def _sums(self) -> set[int]:
        """Outputs that are one number for a batch."""
        if self.trip.batch.count == 1:
            return set()
        return {i for i, shape in enumerate(_shapes(self.trip.whole)) if not len(shape)}

    # ---- the loss ---------------------------------------------------------------------------------------------------
    def whole_loss(self) -> list[list[Tensor | None]]:
        """The loss of the whole batch; the gradient of what each micro-batch has left."""
        trip = self.trip
        assert trip.record is not None
        assert trip.loss is not None
        needs = [t.is_floating_point() or t.is_complex() for t in trip.leavings[0]]
        joined = [t.detach().requires_grad_(n) for t, n in zip(self._joined(), needs, strict=True)]
        with torch.enable_grad():
            outputs = self.ending(joined) if trip.mode == "ending" else joined
            with self.drawing(-2, self.last), trip.autocast():
                trip.values = trip.record.evaluate(outputs, [*trip.record.scalars(), trip.loss])
            torch.autograd.backward(trip.values[trip.loss].sum())
        trip.values = {ref: t.detach() for ref, t in trip.values.items()}
        trip.outputs = [t.detach() for t in outputs]
        parts = [trip.leavings[m] for m in range(trip.batch.count)]
        columns = [
            split(t.grad, [p[i] for p in parts], dim)
            for i, (t, dim) in enumerate(zip(joined, self._dims(), strict=True))
        ]
        return [[column[m] for column in columns] for m in range(trip.batch.count)]

    def part(self, micro: int, outputs: Sequence[Tensor]) -> Tensor:
        """One micro-batch's part of the loss."""
        trip = self.trip
        assert trip.record is not None
        assert trip.loss is not None
        lo, hi = trip.batch.bounds[micro]
        sums = self._sums()
        given = [(t, i in sums) for i, t in enumerate(outputs)]
        with torch.enable_grad():
            found = deferred_share.evaluate(trip.record, given, Slice(lo, hi, trip.batch.rows), trip.loss).sum()
        trip.portions.append(found.detach())
        return found

    def _losses(self, micro: int) -> Callable[[Any, Any, Any], Any]:
        """Mean losses inside of the model are divided by what the whole batch's would be divided by."""
        divisors = iter(self.trip.divisors)

        def compute(func: Any, args: Any, kwargs: Any) -> Any:
            if deferred_share.is_loss(func) and _any_label(args, kwargs):
                part = deferred_share.part_of_mean(func, args, kwargs, next(divisors))
                if part is not None:
                    return part
            return func(*args, **kwargs)

        return compute

    def _whole_divisors(self) -> list[Any]:
        """By what each loss after the last block is divided for the whole batch, in the order of their calls."""
        trip, setting, found = self.trip, self.setting, []

        def compute(func: Any, args: Any, kwargs: Any) -> Any:
            if deferred_share.is_loss(func) and _any_label(args, kwargs):
                found.append(deferred_share.divisor(func, args, kwargs))
            return func(*args, **kwargs)

        absent = [Absent(trip.whole.metas[x], setting.home, "a block's output") for x in trip.whole.crossing(self.end)]
        walk = StageWalk(
            setting.gates, trip.whole, self.end, self.end, absent, setting.home, through=True, losses=compute
        )
        with torch.no_grad(), self.drawing(-1, self.last), trip.autocast():
            walk.run(setting.forward, trip.batch.args, trip.batch.kwargs)
        return found

    # ---- is the loss a sum over rows? -------------------------------------------------------------------------------
    def compare(self) -> str:
        """What is wrong with computing this loss in parts; empty if nothing is.

        Called after a trip whose loss was computed whole; compares the gradients of what has left the last stage.
        """
        trip = self.trip
        assert trip.grads is not None
        try:
            parts = [self._gradients_of_part(m) for m in range(trip.batch.count)]
        except StepError as error:
            return error.message
        for i, dim in enumerate(self._dims()):
            whole, found = [trip.grads[m][i] for m in range(trip.batch.count)], [p[i] for p in parts]
            if dim is None:  # the same for all micro-batches, so only the sum of its gradients counts
                whole, found = [_sum(whole)], [_sum(found)]
            scale = max((float(t.abs().max()) for t in whole if t is not None), default=0.0)
            for a, b in zip(whole, found, strict=True):
                difference = _difference(a, b)
                if not difference <= scale * _TOLERANCE.get(trip.leavings[0][i].dtype, 2e-2):
                    return f"gradients of up to {scale:.3g} at the outputs differ by {difference:.3g} when it is computed in parts"
        return ""

    def _gradients_of_part(self, micro: int) -> list[Tensor | None]:
        trip = self.trip
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in trip.leavings[micro]]
        outputs: Sequence[Tensor] = leaves
        with torch.enable_grad():
            if trip.mode == "ending":
                outputs = self._ending_of_part(micro, leaves)
            loss = self.part(micro, outputs)
        needing = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(loss, needing, allow_unused=True)) if needing else iter(())
        return [next(found) if t.requires_grad else None for t in leaves]

    def _ending_of_part(self, micro: int, leaves: Sequence[Tensor]) -> list[Tensor]:
        trip, setting = self.trip, self.setting
        if not trip.divisors:
            trip.divisors = self._whole_divisors()
        walk = StageWalk(
            setting.gates,
            trip.routes[micro],
            self.end,
            self.end,
            leaves,
            setting.home,
            through=True,
            losses=self._losses(micro) if trip.divisors else None,
        )
        args, kwargs = trip.batch.piece(micro)
        with self.drawing(-1, self.last), trip.autocast():
            return self._outputs(walk.run(setting.forward, args, kwargs), trip.routes[micro])

    # ---- random draws -----------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def drawing(self, micro: int, stage: int) -> Iterator[None]:
        """Draw from the stream of (seed, pass, micro-batch, stage)."""
        name = f"{self.setting.seed}/{self.trip.number}/{micro}/{stage}"
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1
        torch.default_generator.manual_seed(number)  # torch.manual_seed also prepares devices that are not used: slow
        if self.setting.home.type == "cuda":
            torch.cuda.manual_seed(number)
        yield


def _shapes(route: Route) -> list[torch.Size]:
    leaves = tree.tree_leaves(route.output)
    return [leaves[i].shape for i in dependent(route.output)]


def _any_label(args: Any, kwargs: Any) -> bool:
    return any(isinstance(a, Tensor) and "_label" in a.__dict__ for a in tree.tree_leaves((args, kwargs)))


def _sum(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [t for t in tensors if t is not None]
    return torch.stack(there).sum(0) if there else None


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return float(max((t.abs().max() for t in (a, b) if t is not None), default=torch.zeros(())))
    return float((a - b).abs().max())
