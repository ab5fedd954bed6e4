"""A model whose layers are shared out over ranks, trained by a loop that does not know it.

1. At its first forward the model is cut (``pipeline_cut``): each rank keeps the parameters of its stages.
2. In training ``model(x)`` returns deferred tensors (``deferred``); all ranks are given the same rows.
3. ``loss.backward()`` carries out the schedule (``pipeline_schedule``, ``pipeline_run``). Each stage runs the model's own forward
   up to its end (``pipeline_walk``). Afterwards ``.grad`` of what this rank holds is what one process would have.
4. Under ``torch.no_grad()`` the model runs at once, and every rank has its outputs.

The policy of random draws: every stage draws for every micro-batch from a stream of its own, given by (seed, pass, micro-batch,
stage); the script's own streams are left as they are. Batch normalisation in training sees one micro-batch at a time, and its
running statistics belong to the stage of its module.

[Note: a short batch] The first batch must have a row for each micro-batch. A later one that has fewer, the last of an epoch, is cut
into fewer micro-batches, which run as fill and drain.

[Note: the first batch] For schedules that begin a backward before all forwards are done, the first batch of each kind of loss runs
as fill and drain, with the loss of the whole batch; the gradients of its parts are compared with it before anything is applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils import _pytree as tree

from paceline.place import pipeline_cut
from paceline.place.absent import Absent, hold, plain
from paceline.place.cut import chain
from paceline.place.deferred import SHARED_NBYTES, Record, Ref
from paceline.place.pipeline_cut import Parts, Sketches
from paceline.place.pipeline_pieces import Batch, dependent, row_dim
from paceline.place.pipeline_run import Form, Post, Runner
from paceline.place.pipeline_schedule import Actions, Schedule, draw, svg, timetable
from paceline.place.pipeline_state import State
from paceline.place.pipeline_walk import Route, gate
from paceline.place.pipeline_work import Setting, StageWork, Trip
from paceline.place.rewire import rewire
from paceline.terms.errors import StepError, UsageError


def _nothing() -> None:
    pass


def _same(t: Tensor) -> Tensor:
    return t


class Pipeline:
    """One model on the ranks of a group.

    Args:
        group: These ranks, in the order of the stages. All of them are given the same batches.
        device: Of this rank.
        schedule: One of ``pipeline_schedule.FORMS``.
        microbatches: Into how many parts each batch is cut; their sizes may differ by one row.
        cuts: Names of the blocks with which the second and later stages begin; found by measurement without it.
        virtual_stages: Stages on each rank, for looped schedules.
        seed: Of random draws inside of stages.
        on_begin, on_end: Called when a backward begins, and when all gradients are there.
        on_cut: Called once when the model has been cut.
        enter, leave: Applied to activations that a stage has received, and to those that it is about to send.
        agree: What all replicas take as measured costs, given what this one has measured.

    Raises:
        UsageError: The schedule does not exist or does not fit the number of micro-batches (PL520).
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        *,
        schedule: str = "gpipe",
        microbatches: int = 4,
        cuts: Sequence[str] | None = None,
        virtual_stages: int = 2,
        seed: int = 0,
        on_begin: Callable[[], None] = _nothing,
        on_end: Callable[[], None] = _nothing,
        on_cut: Callable[[Pipeline], None] = lambda _: None,
        enter: Callable[[Tensor], Tensor] = _same,
        leave: Callable[[Tensor], Tensor] = _same,
        agree: Callable[[list[float]], list[float]] = lambda costs: costs,
    ) -> None:
        if microbatches < 1:
            raise UsageError("PL520", f"microbatches={microbatches}", help="give 1 or more.")
        self.group, self.device, self.microbatches, self.cuts = group, device, microbatches, cuts
        self.schedule = Schedule.of(schedule, group.size(), virtual_stages)
        self._train_actions = self.schedule.train(microbatches)
        self._trained = False
        self.post = Post(group, device)
        self._seed, self._enter, self._leave, self._agree = seed, enter, leave, agree
        self._on_begin, self._on_end, self._on_cut = on_begin, on_end, on_cut
        self._optimizers: list[Optimizer] = []
        self._setting: Setting | None = None
        self._passes = 0
        self._sums_known: set[Hashable] = set()
        self._shapes: dict[Any, Any] = {}
        self._reached: set[str] = set()  # parameters that have a gradient, on whatever rank
        self.watch: Callable[[Trip], None] = lambda _: None  # told of every pass, when it has ended

    # ---- before the cut -----------------------------------------------------------------------------------------------
    def place(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Take over the forward of `model`; it is cut when it is called first."""
        self.model, self.forward = model, model.forward
        self._optimizers = list(optimizers)
        model.forward = self._call

    @property
    def stages(self) -> list[int]:
        """The stages of this rank."""
        return self.schedule.stages_of(self.post.rank)

    @property
    def setting(self) -> Setting:
        """What the cut has decided. Raises StepError PL521 before it."""
        if self._setting is None:
            raise StepError("PL521", "the model has not been cut yet", help="it is cut at its first forward.")
        return self._setting

    @property
    def parts(self) -> Parts:
        """How the model is shared out."""
        return self.setting.parts

    @property
    def held(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of this rank with their original names, each once."""
        found = {name: p for stage in self.stages for name, p in self.setting.held[stage]}
        return list(found.items())

    @property
    def cut_names(self) -> list[str]:
        """Names of the blocks with which the second and later stages begin: as ``cuts`` they give the same cut again."""
        return [self.parts.positions[stage.first] for stage in self.parts.stages[1:]]

    def cut(self, args: Any, kwargs: Any) -> None:
        """Cut the model, along the way of this forward. All ranks call it with the same batch.

        Raises:
            AdoptError: It cannot be cut (PL521), or its rows are not independent (PL532).
        """
        names = chain(self.model, self.cuts or ())
        del self.model.forward
        try:
            if getattr(self.model.forward, "__func__", None) is not getattr(self.forward, "__func__", None):
                self.model.forward = self.forward
            self.sketches = Sketches(self.model, names)
        finally:
            self.model.forward = self._call
        gates = gate(self.model, names)
        batch = Batch.of(args, kwargs, self.microbatches, fewer=True)
        route = self.sketches.route(args, kwargs)
        pipeline_cut.check_length(route, self.schedule.num_stages)
        _row_dims(route, self.sketches.route(*batch.piece(0)))
        costs = self._measured(gates, batch, route.positions)
        parts = pipeline_cut.share_out(self.model, route, self.schedule.num_stages, costs, self.cuts)
        named = dict(self.model.named_parameters())
        gone = pipeline_cut.take_away(self.model, parts, self.stages, self.post.total)
        for optimizer in self._optimizers:
            rewire(optimizer, dict.fromkeys(gone))
            optimizer.register_step_pre_hook(lambda *_: self.unmark())
            optimizer.register_step_post_hook(lambda *_: self._mark_held())
        held = {stage: [(n, named[n]) for n, by in parts.params.items() if stage in by] for stage in self.stages}
        self._setting = Setting(
            self.model,
            self.forward,
            gates,
            parts,
            self.stages,
            held,
            self.device,
            self._seed,
            self._enter,
            self._leave,
        )
        self.state = State(self.model, self.post, self.schedule, parts)
        self._on_cut(self)

    def _measured(self, gates: Any, batch: Batch, positions: Sequence[str]) -> list[float]:
        """Costs of the positions, from the first rank."""
        found = torch.zeros(len(positions) + 1, dtype=torch.float64)
        if self.post.rank == 0:
            buffers = {name: b.clone() for name, b in self.model.named_buffers()}
            costs, worst = pipeline_cut.measure(self.model, self.forward, gates, positions, batch)
            with torch.no_grad():
                for name, b in self.model.named_buffers():
                    b.copy_(buffers[name])
            found = torch.tensor([*costs, worst], dtype=torch.float64)
        numbers = self.post.share(found, 0).tolist()
        if not numbers[-1] <= 1.0:
            raise StepError(
                "PL532",
                f"for {batch.rows} rows the model gives something else than for its {batch.count} pieces put together",
            )
        return self._agree(numbers[:-1])

    # ---- forward ------------------------------------------------------------------------------------------------------
    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model(...)`` does."""
        if self._setting is None:
            self.cut(args, kwargs)
        return self._defer(args, kwargs) if torch.is_grad_enabled() else self._evaluate(args, kwargs)

    def _route(self, args: Any, kwargs: Any) -> Route:
        route = self.sketches.route(args, kwargs)
        leaves, found = tree.tree_leaves(route.output), set(dependent(route.output))
        if any(isinstance(t, Tensor) and i not in found for i, t in enumerate(leaves)):
            route = self.sketches.route(
                args, kwargs, anew=True
            )  # what depends on inputs alone is not the same in each batch
        return route

    def _trip(self, batch: Batch, whole: Route) -> Trip:
        by_size: dict[int, Route] = {}
        for micro, size in enumerate(batch.sizes):
            if size not in by_size:
                by_size[size] = whole if batch.count == 1 else self.sketches.route(*batch.piece(micro))
        self._passes += 1
        key = self.sketches.key(batch.args, batch.kwargs)
        return Trip(
            batch, whole, [by_size[size] for size in batch.sizes], key, self._passes, "outputs", autocast=_autocast()
        )

    def _mode(self, trip: Trip) -> str:
        """Whether something that the model returns is there for a whole batch only."""
        return "ending" if trip.batch.count > 1 and None in _row_dims(trip.whole, trip.routes[0]) else "outputs"

    def _defer(self, args: Any, kwargs: Any) -> Any:
        batch = Batch.of(args, kwargs, self.microbatches, fewer=self._trained)
        whole = self._route(args, kwargs)
        trip = self._trip(batch, whole)
        trip.mode = self._mode(trip)
        leaves, spec = tree.tree_flatten(whole.output)
        deferred = dependent(whole.output)
        metas = [
            leaves[i].meta if isinstance(leaves[i], Absent) else torch.empty_like(leaves[i], device="meta")
            for i in deferred
        ]
        record = Record(self, self.device, metas, trip=trip, shapes=self._shapes)
        for number, i in enumerate(deferred):
            leaves[i] = record.output(number)
        return tree.tree_unflatten(leaves, spec)

    def _evaluate(self, args: Any, kwargs: Any) -> Any:
        batch = Batch.of(args, kwargs, self.microbatches, fewer=True)
        whole = self._route(args, kwargs)
        trip = self._trip(batch, whole)
        trip.mode = self._mode(trip)
        with self._left_alone():
            self._run(trip, self.schedule.forward_only(batch.count), gradients=False)
        leaves, spec = tree.tree_flatten(whole.output)
        places = dependent(whole.output)
        for i, t in zip(places, self._shared([leaves[i].shape for i in places], trip.outputs), strict=True):
            leaves[i] = t
        return tree.tree_unflatten(leaves, spec)

    def _shared(self, shapes: Sequence[Sequence[int]], outputs: Sequence[Tensor] | None) -> list[Tensor]:
        """Outputs of the last stage, on all ranks."""
        last = self._last_rank
        words = [w for t in outputs or () for w in Form((), t.dtype, False).words()[1:2]]
        types = self.post.share(torch.tensor(words or [0] * len(shapes), dtype=torch.int64), last).tolist()
        found = []
        for i, (shape, kind) in enumerate(zip(shapes, types, strict=True)):
            dtype = Form.read([0, kind, 0]).dtype
            found.append(self.post.share(outputs[i] if outputs else torch.empty(tuple(shape), dtype=dtype), last))
        return found

    @property
    def _last_rank(self) -> int:
        return self.schedule.rank_of(self.schedule.num_stages - 1)

    def _run(self, trip: Trip, actions: Actions, *, gradients: bool) -> StageWork:
        work = StageWork(self.setting, trip)
        if not hasattr(self, "runner"):
            self.runner = Runner(self.post, self.schedule, work)
        self.runner.work = work
        with torch.set_grad_enabled(gradients):
            self.runner.run(actions[self.post.rank], gradients=gradients)
        if self._last_rank == self.post.rank:
            work.finish()
        self.watch(trip)
        return work

    # ---- backward -----------------------------------------------------------------------------------------------------
    def backward(self, record: Record, loss: Ref) -> None:
        """Run the schedule for a recorded forward; called by ``loss.backward()``.

        Raises:
            StepError: The loss is no sum over rows, and the schedule needs it to be (PL531).
        """
        trip: Trip = record.trip
        record.trip = None
        record.done = True
        trip.record, trip.loss = record, loss
        kind = (loss, tuple(getattr(node.func, "__name__", "") for node in record.nodes))
        short = trip.batch.count < self.microbatches
        in_parts = not self.schedule.form.whole_loss and trip.batch.count > 1 and not short
        check = in_parts and kind not in self._sums_known
        self._on_begin()
        self.unmark()
        tied = self._set_tied_aside()
        with self._left_alone():
            if in_parts and not check:
                trip.mode = "parts"
            filled = check or short
            actions = self.schedule.fill_and_drain(trip.batch.count) if filled else self._train_actions
            work = self._run(trip, actions, gradients=True)
            fault = work.compare() if check and self._last_rank == self.post.rank else ""
        self._tell(record, trip, fault, tied)
        self._sums_known.add(kind)
        self._add_tied(tied)
        self._trained = True
        self._on_end()
        self.mark()

    def _tell(self, record: Record, trip: Trip, fault: str, before: dict[str, Tensor | None]) -> None:
        """From the last stage to all: numbers that were recorded, and small outputs. From each: who has a gradient."""
        scalars, names = record.scalars(), list(self.parts.params)
        last, held = self.post.rank == self._last_rank, dict(self.held)
        values = [float(trip.values[ref].detach()) for ref in scalars] if last else [0.0] * len(scalars)
        there = [
            float(name in held and (held[name].grad is not None or before.get(name) is not None)) for name in names
        ]
        message = torch.tensor([*values, float(bool(fault)), float(record.kept()), *there], dtype=torch.float64)
        found = self.post.total(message).tolist()
        self._reached = {name for name, count in zip(names, found[len(scalars) + 2 :], strict=True) if count}
        if found[len(scalars)]:
            raise StepError(
                "PL531", fault or f"schedule={self.schedule.name}, and the last stage has found no sum over rows"
            )
        for ref, value in zip(scalars, found, strict=False):
            meta = record.meta(ref)
            record.values[ref] = torch.full(tuple(meta.shape), value, dtype=torch.float64, device=self.device).to(
                meta.dtype
            )
        small = sum(t.numel() * t.element_size() for t in record.leaves) <= SHARED_NBYTES
        if small and found[len(scalars) + 1]:
            outputs = trip.outputs if last else None
            record.outputs = self._shared([t.shape for t in record.leaves], outputs)
        elif record.kept():
            record.outputs = trip.outputs

    def _tied(self) -> list[tuple[str, nn.Parameter | None, list[int]]]:
        """Parameters on several ranks: name, the parameter where this rank holds it, and who does."""
        mine = dict(self.held)
        found = []
        for name, stages in self.parts.params.items():
            ranks = sorted({self.schedule.rank_of(stage) for stage in stages})
            if len(ranks) > 1:
                found.append((name, mine.get(name), ranks))
        return found

    def _set_tied_aside(self) -> dict[str, Tensor | None]:
        """What earlier backwards have left is the same on all holders; only what comes now is added up."""
        before: dict[str, Tensor | None] = {}
        for name, p, _ in self._tied():
            if p is not None:
                before[name], p.grad = p.grad, None
        return before

    def _add_tied(self, before: dict[str, Tensor | None]) -> None:
        """Add up the gradients of tied parameters, in the order of the ranks."""
        for name, p, ranks in self._tied():
            if p is None or name not in self._reached:
                continue
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            form = Form(tuple(grad.shape), grad.dtype, False)
            if self.post.rank == ranks[0]:
                for rank in ranks[1:]:
                    grad = grad + self.post.wait(self.post.receive(form, rank))
                for rank in ranks[1:]:
                    self.post.send(grad, rank)
            else:
                self.post.send(grad, ranks[0])
                grad = self.post.wait(self.post.receive(form, ranks[0]))
            self.post.settle()
            old = before[name]
            p.grad = grad if old is None else old.add_(grad)

    # ---- gradients that others hold -----------------------------------------------------------------------------------
    def mark(self) -> None:
        """Gradients that are held know that there are others; parameters that are not held get a stand-in for theirs."""
        self._mark_held()
        for name, p in self.model.named_parameters():
            if isinstance(p, Absent) and name not in self._reached:
                p.grad = None
            elif isinstance(p, Absent) and p.grad is None:
                p.grad = Absent(p.meta.detach(), self.device, f"the gradient of {name!r}", self.post.total)

    def _mark_held(self) -> None:
        for name, p in self.held:
            if p.grad is not None:
                first = min(self.schedule.rank_of(stage) for stage in self.parts.params[name])
                p.grad = hold(plain(p.grad), self.post.total, counts=first == self.post.rank)

    def unmark(self) -> None:
        """Gradients as ordinary tensors, of the same memory; before anything but the script works on them."""
        for _, p in self.held:
            if p.grad is not None:
                p.grad = plain(p.grad)

    def close(self) -> None:
        """Let go of the group. The model keeps what this rank holds, and has its own forward again."""
        if self._setting is None:  # nothing was ever computed
            return
        self.unmark()
        self.model.__dict__.pop("forward", None)
        if getattr(self.model.forward, "__func__", None) is not getattr(self.forward, "__func__", None):
            self.model.forward = self.forward
        del self.post, self.group, self.state
        self.__dict__.pop("runner", None)

    @contextlib.contextmanager
    def _left_alone(self) -> Iterator[None]:
        """The script's random streams are as before."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    # ---- explanation --------------------------------------------------------------------------------------------------
    def describe(self) -> str:
        """A table of the stages, after the cut."""
        parts, rows = self.parts, [("stage", "rank", "blocks", "parameters", "bytes", "cost", "receives")]
        for stage in parts.stages:
            names = [n for n, by in parts.params.items() if stage.index in by]
            params = dict(self.model.named_parameters())
            blocks = parts.positions[stage.first : stage.last]
            cost = sum(parts.costs[stage.first : stage.last]) / (sum(parts.costs) or 1.0)
            received = self.runner.nbytes.get(stage.index) if hasattr(self, "runner") else None
            rows.append(
                (
                    str(stage.index),
                    str(self.schedule.rank_of(stage.index)),
                    blocks[0] if len(blocks) == 1 else f"{blocks[0]} … {blocks[-1]} ({len(blocks)})",
                    f"{sum(params[n].numel() for n in names):,}",
                    f"{sum(parts.sizes[n] for n in names):,}",
                    f"{cost:.0%}",
                    "" if not received else f"{received:,} bytes for each micro-batch",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        tied = [name for name, _, _ in self._tied()]
        if tied:
            lines.append(f"on several stages, gradients added up: {', '.join(tied)}")
        return "\n".join(lines)

    def draw(self) -> str:
        """The schedule as text: rows are ranks, columns time."""
        return draw(timetable(self._train_actions, self.schedule.num_stages))

    def svg(self) -> str:
        """The schedule as an SVG document."""
        return svg(timetable(self._train_actions, self.schedule.num_stages))


def _row_dims(whole: Route, part: Route) -> list[int | None]:
    """In which dimension outputs have rows. Raises StepError PL533."""
    ours, theirs = tree.tree_leaves(whole.output), tree.tree_leaves(part.output)
    return [row_dim(ours[i].shape, theirs[i].shape, "an output") for i in dependent(whole.output)]


def _autocast() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The script's autocast region at this moment, to be entered again when the stages run."""
    active = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not active:
        return contextlib.nullcontext
    kind = active[0]
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype)
