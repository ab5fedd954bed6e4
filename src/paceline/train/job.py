"""The user's object. Under plain ``python`` it changes nothing; launched, it owns three control points and renames none:
where a batch comes from, what ``backward`` means, what ``opt.step()`` means.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paceline.data.streams import Streams
from paceline.exchange.chain import Exchange
from paceline.exchange.strategy import build_whole
from paceline.group.reunion import Epoch, Reunion
from paceline.group.wire import Wire
from paceline.terms.activity import Activity, Phase
from paceline.terms.clock import Clock
from paceline.terms.errors import AdoptError, PeerLost, StepError, Stopped
from paceline.terms.event import Event, Sink
from paceline.terms.plan import Place
from paceline.train import adopt as adoption
from paceline.train import replicas, state
from paceline.train import tree as trees
from paceline.train.counters import Counters, in_eval_mode
from paceline.train.exchanging import Desk, Exchanging
from paceline.train.ledger import Ledger
from paceline.train.loaders import Loaders
from paceline.train.loop import Loop
from paceline.train.members import Hands, Members
from paceline.train.owned import OwnedSteps
from paceline.train.plain import Diary, PlainLoader
from paceline.train.saving import Saving

T = TypeVar("T")


class Job:
    """This process's part of the job. Made by ``paceline.job()``.

    Args:
        place: Who this process is.
        connect: Opens the wire for a device; called at the first ``adopt``.
        sink: Where events go.
        activity: Where this rank says what it is doing.
        reunion: How the members of an elastic run meet; None when the ranks stay as they are.
    """

    def __init__(
        self,
        place: Place,
        connect: Callable[[torch.device], Wire],
        sink: Sink,
        activity: Activity,
        reunion: Reunion | None = None,
    ) -> None:
        self._place, self._connect, self._sink, self._activity = place, connect, sink, activity
        self._exchanges = place.size > 1 or reunion is not None
        self._strategy: str | Exchange = place.plan.strategy
        self._exchange: Exchange | None = None
        self._wire: Wire | None = None
        self._exchanging: Exchanging | None = None
        self._models: dict[str, nn.Module] = {}
        self._optimizers: list[Optimizer] = []
        self._schedulers: list[LRScheduler] = []
        self._scalers: list[GradScaler] = []
        self._kept: dict[str, Any] = {}
        # Whoever may come or go draws from a stream of its own, whatever its rank: its number is never given twice.
        streams = max(2, place.size) if reunion is not None else place.size
        self._streams = Streams(place.rank, streams, self._share_streams)
        self._plain_loaders = 0
        self._counters = Counters()
        self._diary = Diary(self._printing)
        ledger = Ledger(self._ledger_path(), self._notice_failure)
        self._loop = Loop(place.size, activity, sink, ledger, place.plan.stop_on_nan)
        self._loop.exchanges = self._exchanges
        if self._exchanges:
            self._loop.on_look = self._look
        self._saving = Saving(place, self._loop, sink, self._things)
        self._loaders = Loaders(self._loop, self._streams, activity, self._join, self._first_round)
        self._first_epoch = 0
        self._neighbours = tuple(f"worker-{rank}" for rank in range(place.local_size))  # the ranks of this host
        hands = Hands(self._move, lambda: self._exchanging, self._saving.capture, self._restore, self._divide_anew)
        self._members = Members(reunion, place.joins, self._loop, ledger, sink, hands) if reunion is not None else None
        one_host = reunion is not None and reunion.one_host
        self._steps = OwnedSteps(self._loop, activity, self._step_without_loader, self._members, one_host)
        self._loop.on_step_end = lambda: self._saving.step_ended(self.main)
        self._finished = False

    # ---- who am I -------------------------------------------------------------------------------------------------
    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self._place.rank

    @property
    def size(self) -> int:
        """World size: how many processes train together."""
        return self._place.size

    @property
    def main(self) -> bool:
        """True on exactly one rank, and under plain ``python``. For printing and files; never for anything others wait for."""
        return self._place.rank == 0

    @property
    def clock(self) -> Clock:
        """Global steps, samples and epoch: the same on every rank after each step."""
        return self._loop.clock

    @property
    def adopted(self) -> bool:
        """True once anything was adopted."""
        return bool(self._models or self._optimizers or self._loaders.feeds or self._plain_loaders)

    # ---- adoption -------------------------------------------------------------------------------------------------
    def use_strategy(self, strategy: str | Exchange) -> None:
        """Set the strategy. Raises StepError PL410 after the first ``adopt``, UsageError PL2xx for one that cannot be."""
        if self._wire is not None:
            help = "pass it to the first paceline.job() call."
            raise StepError("PL410", "the strategy was set after job.adopt", help=help)
        self._exchange = build_whole(strategy, self.size)
        self._strategy = strategy

    def adopt(self, *things: Any) -> Any:
        """Take over models, optimizers, schedulers, gradient scalers and data loaders; return them in the order given.

        Models and optimizers keep their identity; loaders come back as loaders of this rank's rows of each global batch.
        May be called again with more; all ranks make the same calls. One thing is returned as itself, several as a tuple.

        Raises:
            AdoptError: Something cannot be adopted (PL301, PL302, PL304, PL305, PL309), or ranks differ (PL303).
        """
        sorted_things = adoption.sort(things)
        adoption.refuse_repeats(sorted_things, (*self._models.values(), *self._optimizers))
        if self._place.plain:
            replaced = self._adopt_plain(sorted_things)
        else:
            with self._activity.during(Phase.EXCHANGE, "adopt"):
                replaced = self._adopt_launched(sorted_things)
            self._activity.adopted()
            self._activity.enter(Phase.COMPUTE)
        result = tuple(replaced.get(id(thing), thing) for thing in things)
        return result[0] if len(result) == 1 else result

    def _adopt_plain(self, given: adoption.Adopted) -> dict[int, Any]:
        self._register(given)
        for optimizer in given.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._count_step())
        self._plain_loaders += len(given.loaders)
        return {id(loader): PlainLoader(loader, self._count_rows) for loader in given.loaders}

    def _count_step(self) -> None:
        self._loop.steps += 1

    def _count_rows(self, rows: int) -> None:
        if torch.is_grad_enabled() and not self._loaders.evaluating:
            self._loop.samples += rows

    def _register(self, given: adoption.Adopted) -> None:
        for model in given.models:
            self._models[f"model{len(self._models)}" if self._models else "model"] = model
        self._optimizers += given.optimizers
        self._schedulers += given.schedulers
        self._scalers += given.scalers

    def _adopt_launched(self, given: adoption.Adopted) -> dict[int, Any]:
        known = set(self._models)
        self._register(given)
        new = {label: model for label, model in self._models.items() if label not in known}
        if self._wire is None:
            self._wire = (
                self._connect(adoption.device_of(self._models)) if self._members is None else self._members.begin()
            )
            self._emit_plan()
            self._saving.open(self.together, self._joining)
        self._saving.adopted(new, given)
        if self._exchanges:
            if not self._joining:
                self.together(lambda wire: adoption.agree(wire, new, given.optimizers, given.loaders))
                self.together(lambda wire: adoption.start_equal(wire, new, given.optimizers))
            self._place_models(new)
            if self.main and self.size > 1 and not self._loop.shards:
                for message in adoption.warnings(new):
                    self._sink(Event("notice", 0, {"message": message}))
        for optimizer in given.optimizers:
            assert self._exchange is not None
            self._steps.own(
                optimizer, self._exchanging, self._exchange, self._wire, self._neighbours, self._place.local_rank
            )
        if self._members is not None or self._loop.shards:
            for scheduler in given.schedulers:
                self._steps.own_schedule(scheduler)
        if self._exchanging is not None:
            self._exchanging.own(given)
        if given.scalers and self._loop.shards:
            raise AdoptError("PL451", "exact=True works without a GradScaler, and one was adopted")
        if given.scalers:
            self._loop.report_nonfinite = False  # overflow is part of a scaler's work
        rank, size = (0, 1) if self._joining else (self.rank, self.size)
        return {id(loader): self._loaders.own(loader, rank, size) for loader in given.loaders}

    def _emit_plan(self) -> None:
        if self._exchange is None:
            self._exchange = build_whole(self._strategy, self.size)
        assert self._wire is not None
        data = {"strategy": self._exchange.text, "wire": self._wire.name, "describe": self._exchange.describe()}
        self._sink(Event("adopt", 0, data))
        if self._exchange.shards:
            self._be_exact(self._exchange.shards)

    def _be_exact(self, shards: int) -> None:
        """Nothing may depend on the number of ranks: orders and draws are separate, every shard is computed by one thread."""
        torch.set_num_threads(1)
        self._streams.separate()
        self._loop.cut_into(shards)
        self._exchanges = self._loop.exchanges = True
        self._loop.on_look = self._look

    def _place_models(self, models: dict[str, nn.Module]) -> None:
        assert self._wire is not None
        assert self._exchange is not None
        if self._exchanging is None:
            about = self._activity, self._loop, self._sink, Desk(self._members, self._saving.due, self._things)
            self._exchanging = Exchanging(self._exchange, self._wire, *about, self._place.hosts)
        self._exchanging.place(models)

    def _level(self, *, redo: bool = True) -> None:
        if self._exchanging is not None:
            self._exchanging.close(full=True, redo=redo)

    # ---- data -----------------------------------------------------------------------------------------------------
    def _first_round(self) -> None:
        if self._exchanging is not None:
            self._exchanging.remember_statistics()

    def _share_streams(self, mine: bytes) -> bytes:
        if self._wire is None:
            return mine
        return self.together(lambda wire: wire.gather_bytes("first batch", mine if wire.rank == 0 else b"")[0])

    def together(self, call: Callable[[Wire], T]) -> T:
        """Make a call that all ranks make, with whoever is left when a member is lost in it."""
        while True:
            assert self._wire is not None
            try:
                return call(self._wire)
            except PeerLost:
                if self._members is None:
                    raise
                self._members.lost(in_step=False)

    def _look(self) -> None:
        """Compare the replicas, and heal the one that differs."""
        found = self.together(lambda wire: replicas.look(wire, self._models))
        if found is not None:
            self.together(lambda wire: replicas.heal(wire, found, self._models, self._optimizers))
            if self.rank == found.leader:
                self._saving.notice("PL441", f"step {self._loop.steps}: {found}; healed")

    # ---- members that come and go ---------------------------------------------------------------------------------
    @property
    def _joining(self) -> bool:
        return self._members is not None and self._members.joining

    def _join(self) -> None:
        """The loop begins, or goes on where a checkpoint or the other members are."""
        if self._members is not None:
            self._members.join()
        if self._saving.begin_loop(self.main):
            self._first_epoch = self._loop.passed

    def _step_without_loader(self) -> None:
        self._join()
        if self._exchanging is not None:
            self._exchanging.without_loader()
        if not self._loop.round_open:
            self._saving.step_ended(self.main)

    def _move(self, epoch: Epoch) -> None:
        """Be another rank of another world."""
        self._place, self._neighbours = epoch.place(self._place), epoch.neighbours
        self._wire, self._saving.group = epoch.wire, epoch.number

    # ---- the state ------------------------------------------------------------------------------------------------
    def _things(self) -> trees.Things:
        """All that makes up the state of this job."""
        return trees.Things(
            models=self._models,
            optimizers=trees.numbered(self._optimizers),
            schedulers=trees.numbered(self._schedulers),
            scalers=trees.numbered(self._scalers),
            kept=self._kept,
            feeds=trees.numbered(self._loaders.feeds),
            names=trees.names_of(self._models),
            loop=self._loop,
            streams=self._streams,
            chain=self._exchanging.rounds if self._exchanging is not None and self._loop.local else None,
        )

    def _restore(self, tree: trees.Tree) -> None:
        """Take over a state. Raises AdoptError PL610 for that of another job."""
        trees.restore(self._things(), tree)
        self._first_epoch = self._loop.passed

    def _divide_anew(self, epoch: Epoch) -> None:
        self._steps.rewire(epoch.wire, self._neighbours, self._place.local_rank)

    # ---- the loop -------------------------------------------------------------------------------------------------
    def epochs(self, n: int) -> Iterator[int]:
        """``range(n)``, with the epoch shown and counters started anew."""
        self._join()
        first, self._first_epoch = self._first_epoch, 0
        self._loop.in_epochs = True
        for epoch in range(first, n):
            self._loop.before_batch()
            self._loop.epoch = epoch
            self._counters.clear()
            yield epoch
            self._level()
            self._loop.passed = epoch + 1
            self._diary.flush(self._loop.clock)
            self._loop.publish()

    def log(self, **values: Any) -> None:
        """Show numbers: any rank, any number of times, never a collective. Tensors are read later, not now.

        Under N ranks what is shown is the mean over ranks, weighted by rows (or by ``job.weight``).
        """
        if self._place.launcher == "paceline":
            about = {"weight": self._loop.log_weight, "epoch": self._loop.epoch}
            self._sink(Event("log", self._loop.steps, {"values": values, **about}))
        else:
            self._diary.note(values, self._loop.clock)

    def weight(self, amount: float | Tensor | Literal["sum"]) -> None:
        """Say what the loss of this batch is a mean over, before ``backward``: ``job.weight(num_tokens)``.

        Default: rows. ``job.weight("sum")`` says that the loss is a sum over its rows, so gradients are added up.

        Raises:
            StepError: PL408, not a finite amount of 0 or more.
        """
        self._loop.set_weight(amount if isinstance(amount, str) else float(amount))

    @contextmanager
    def evaluating(self, *models: nn.Module) -> Iterator[None]:
        """Evaluate inside the block: models in ``eval()`` mode, no gradients, counters from zero; restored afterwards.

        At the end of the block the counters of all ranks are added up, so that :meth:`ratio` is the same everywhere.

        Args:
            models: Which models; all adopted ones by default.
        """
        self._level()
        self._counters.clear()
        was, self._loaders.evaluating = self._loaders.evaluating, True
        try:
            with in_eval_mode(models or tuple(self._models.values())), torch.no_grad():
                yield
        finally:
            self._loaders.evaluating = was
        self._counters.merge(self._gather_json("evaluating"))

    def count(self, **amounts: Any) -> None:
        """Add to named counters: any rank, never a collective. A stand-in row (see ``data.feed``) does not count."""
        if not self._loop.phantom:
            self._counters.add(amounts)

    def ratio(self, part: str, whole: str) -> float:
        """``part / whole`` of the counters over all ranks; NaN when `whole` is 0.

        Inside or after ``evaluating`` this is local; counts made since then are added up first, which all ranks must do.
        """
        if not self._counters.settled:
            self._counters.merge(self._gather_json(f"ratio {part}/{whole}"))
        return self._counters.ratio(part, whole)

    def _gather_json(self, tag: str) -> Callable[[dict[str, float]], list[dict[str, float]]]:
        def gather(mine: dict[str, float]) -> list[dict[str, float]]:
            if self._wire is None:
                return [mine]
            with self._activity.during(Phase.EXCHANGE, tag):
                said = self.together(lambda wire: wire.gather_bytes(tag, json.dumps(mine).encode()))
            return [json.loads(raw) for raw in said]

        return gather

    # ---- the rest of the surface ----------------------------------------------------------------------------------
    def keep(self, **things: Any) -> None:
        """Anything with ``state_dict`` and ``load_state_dict`` joins the run's state; all ranks start from rank 0's.

        Raises:
            AdoptError: PL301 for a thing without these methods, PL303 when ranks hold different tensors.
        """
        for name, thing in things.items():
            adoption.check_kept(name, thing)
            if self._wire is not None and not self._joining:
                self.together(functools.partial(adoption.share_kept, name=name, thing=thing))
            self._kept[name] = thing
            self._saving.kept(name, thing)

    def export(self, path: str | Path) -> None:
        """Write the adopted models' weights as safetensors, original names, atomically. One rank writes; any may call.

        Raises:
            FileError: PL601, the file could not be written.
        """
        if self.main:
            state.save(state.named_state(self._models), Path(path))
            self._sink(Event("export", self._loop.steps, {"path": str(path)}))

    @contextmanager
    def once(self, name: str) -> Iterator[bool]:
        """``with job.once("download") as first: if first: …``: one rank does it, the others wait until it is done."""
        if self._wire is None or self._joining:
            yield True
            return
        tag, waited = f"once {name!r}", False
        while not (self.main or waited):
            try:
                with self._activity.during(Phase.WAIT, tag):
                    self._wire.barrier(tag)
                waited = True
            except PeerLost:
                if self._members is None:
                    raise
                self._members.lost(in_step=False)  # perhaps it is this rank's turn now
        yield not waited
        if not waited:
            self.together(lambda wire: wire.barrier(tag))

    def step(self, fn: Callable[[Any], Tensor], batch: Any, optimizer: Optimizer | None = None) -> Tensor:
        """The explicit form of one step: ``loss = fn(batch)``, backward, ``opt.step()``, ``opt.zero_grad()``.

        Args:
            fn: Computes the loss of one batch: a scalar, a mean over rows (or over what it tells ``job.weight``).
            batch: What the adopted loader yielded.
            optimizer: Which of the adopted optimizers; may be left out when there is one.

        Returns:
            This rank's loss, detached.

        Raises:
            StepError: PL410, it was left out and there is not exactly one.
        """
        if optimizer is None and len(self._optimizers) != 1:
            message = f"job.step(fn, batch) needs to know which of {len(self._optimizers)} adopted optimizers to step"
            raise StepError("PL410", message, help="say job.step(fn, batch, optimizer=opt).")
        chosen = optimizer or self._optimizers[0]
        loss = fn(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        chosen.step()
        chosen.zero_grad()
        return loss.detach()

    # ---- the end --------------------------------------------------------------------------------------------------
    def finish(self, error: BaseException | None = None) -> None:
        """The script has ended: write the final weights, say the hash of the parameters, give everything back."""
        if self._finished:
            return
        self._finished = True
        self._diary.flush(self._loop.clock)
        whole = error is None or isinstance(error, Stopped)
        if whole:
            self._level(redo=False)
        self._saving.finish(self.main, whole)
        if not self._place.plain:
            self._loop.finish(whole)
            end = self._saving.last_state(self._named_state(), self.main) if whole else {"ok": False}
            self._sink(Event("end", self._loop.steps, end))
        if self._exchanging is not None:
            self._exchanging.close_down()
        if self._members is not None:
            self._members.close("finished" if whole else "failed")
        if self._wire is not None:
            self._wire.close()

    def _named_state(self) -> dict[str, Tensor]:
        return state.named_state(self._models)

    def _ledger_path(self) -> Path | None:
        run_dir = self._place.run_dir
        return None if run_dir is None else run_dir / "ledger" / f"{self._place.name}.jsonl"

    def _notice_failure(self, failure: OSError) -> None:
        self._sink(Event("notice", 0, {"code": "PL601", "message": str(failure)}))

    @property
    def _printing(self) -> bool:
        return self.main and self._place.launcher != "paceline"
