"""The user's object. Under plain ``python`` it changes nothing; launched, it owns three control points and renames none:
where a batch comes from, what ``backward`` means, what ``opt.step()`` means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from paceline.data.feed import Feed
from paceline.data.streams import Streams
from paceline.exchange.chain import Exchange
from paceline.exchange.strategy import build
from paceline.group.wire import Wire
from paceline.place.replicate import Replica
from paceline.terms.activity import Activity, Phase
from paceline.terms.clock import Clock
from paceline.terms.errors import AdoptError, StepError, Stopped
from paceline.terms.event import Event, Sink
from paceline.terms.plan import Place
from paceline.train import adopt as adoption
from paceline.train import state
from paceline.train.counters import Counters
from paceline.train.divided import DividedStep, worthwhile
from paceline.train.ledger import Ledger
from paceline.train.loop import Loop
from paceline.train.plain import Diary, PlainLoader
from paceline.train.step import Stepper


@dataclass(frozen=True, slots=True)
class _Owners:
    """Whose parameters an optimizer has: replicas, how many parameters there were, those that were frozen."""

    replicas: list[Replica]
    count: int
    frozen: list[Tensor]


class Job:
    """This process's part of the job. Made by ``paceline.job()``.

    Args:
        place: Who this process is.
        connect: Opens the wire for a device; called at the first ``adopt``.
        sink: Where events go.
        activity: Where this rank says what it is doing.
    """

    def __init__(self, place: Place, connect: Callable[[torch.device], Wire], sink: Sink, activity: Activity) -> None:
        self._place, self._connect, self._sink, self._activity = place, connect, sink, activity
        self._strategy: str | Exchange = place.plan.strategy
        self._exchange: Exchange | None = None
        self._wire: Wire | None = None
        self._stepper: Stepper | None = None
        self._divided: dict[Optimizer, DividedStep] = {}
        self._owners: dict[Optimizer, _Owners] = {}
        self._models: dict[str, nn.Module] = {}
        self._optimizers: list[Optimizer] = []
        self._kept: dict[str, Any] = {}
        self._streams = Streams(place.rank, place.size, self._share_streams)
        self._num_loaders = 0
        self._counters = Counters()
        self._evaluating = False
        self._diary = Diary(self._printing)
        ledger = Ledger(self._ledger_path(), self._notice_failure)
        self._loop = Loop(place.size, activity, sink, ledger, place.plan.stop_on_nan)
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
        return bool(self._models or self._optimizers or self._num_loaders)

    # ---- adoption -------------------------------------------------------------------------------------------------
    def use_strategy(self, strategy: str | Exchange) -> None:
        """Set the strategy. Raises StepError PL410 after the first ``adopt``, UsageError PL2xx for one that cannot be."""
        if self._wire is not None:
            raise StepError(
                "PL410", "the strategy was set after job.adopt", help="pass it to the first paceline.job() call."
            )
        self._exchange = build(strategy)
        self._strategy = strategy

    def adopt(self, *things: Any) -> Any:
        """Take over models, optimizers, schedulers, gradient scalers and data loaders; return them in the order given.

        Models and optimizers keep their identity; loaders come back as loaders of this rank's rows of each global batch.
        May be called again with more; all ranks make the same calls. One thing is returned as itself, several as a tuple.

        Raises:
            AdoptError: Something cannot be adopted (PL301, PL302, PL304, PL305, PL309), or ranks differ (PL303).
        """
        sorted_things = adoption.sort(things)
        self._refuse_repeats(sorted_things)
        if self._place.plain:
            replaced = self._adopt_plain(sorted_things)
        else:
            with self._activity.during(Phase.EXCHANGE, "adopt"):
                replaced = self._adopt_launched(sorted_things)
            self._activity.adopted()
            self._activity.enter(Phase.COMPUTE)
        result = tuple(replaced.get(id(thing), thing) for thing in things)
        return result[0] if len(result) == 1 else result

    def _refuse_repeats(self, given: adoption.Adopted) -> None:
        for thing in (*given.models, *given.optimizers):
            if any(thing is known for known in (*self._models.values(), *self._optimizers)):
                raise AdoptError("PL309", f"this {type(thing).__name__} was adopted before")

    def _adopt_plain(self, given: adoption.Adopted) -> dict[int, Any]:
        self._register(given)
        for optimizer in given.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._count_step())
        self._num_loaders += len(given.loaders)
        return {id(loader): PlainLoader(loader, self._count_rows) for loader in given.loaders}

    def _count_step(self) -> None:
        self._loop.steps += 1

    def _count_rows(self, rows: int) -> None:
        if torch.is_grad_enabled() and not self._evaluating:
            self._loop.samples += rows

    def _register(self, given: adoption.Adopted) -> None:
        for model in given.models:
            self._models[f"model{len(self._models)}" if self._models else "model"] = model
        self._optimizers += given.optimizers

    def _adopt_launched(self, given: adoption.Adopted) -> dict[int, Any]:
        known = set(self._models)
        self._register(given)
        new = {label: model for label, model in self._models.items() if label not in known}
        if self._wire is None:
            self._wire = self._connect(_device_of(self._models))
            self._emit_plan()
        if self.size > 1:
            adoption.agree(self._wire, new, given.optimizers)
            adoption.start_equal(self._wire, new, given.optimizers)
            self._place_models(new)
        for optimizer in given.optimizers:
            self._own_step(optimizer)
        if given.scalers:
            self._loop.report_nonfinite = False  # overflow is part of a scaler's work
        return {id(loader): self._own_loader(loader) for loader in given.loaders}

    def _emit_plan(self) -> None:
        if self._exchange is None:
            self._exchange = build(self._strategy)
        assert self._wire is not None
        data = {"strategy": self._exchange.text, "wire": self._wire.name, "describe": self._exchange.describe()}
        self._sink(Event("adopt", 0, data))

    def _place_models(self, models: dict[str, nn.Module]) -> None:
        assert self._wire is not None
        assert self._exchange is not None
        if self._stepper is None:
            self._stepper = Stepper(
                self._wire,
                self._exchange,
                self._activity,
                scale=self._loop.scale,
                steps=lambda: self._loop.steps,
                on_verdict=self._loop.on_verdict,
                hosts=self._place.hosts if len(set(self._place.hosts)) > 1 else (),
            )
        for label, model in models.items():
            taken = {p for replica in self._stepper.replicas for p in replica.names}
            params = adoption.trainable(model, taken)
            if params:
                self._stepper.add(model, [(f"{label}.{name}", p) for name, p in params])

    # ---- the optimizer --------------------------------------------------------------------------------------------
    def _own_step(self, optimizer: Optimizer) -> None:
        if self.size > 1:
            self._replicas_of(optimizer)
            self._divide(optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _divide(self, optimizer: Optimizer) -> None:
        assert self._exchange is not None
        assert self._wire is not None
        shared = self._exchange.params == "shared"
        if shared or worthwhile(optimizer, self._wire):
            part, parts = self._place.local_rank, self._place.local_size
            self._divided[optimizer] = DividedStep(
                optimizer, self._wire, self._activity, part=part, parts=parts, shared=shared
            )

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise StepError("PL302", f"{type(optimizer).__name__}.step was given a closure")
        if self._stepper is not None:
            self._stepper.owe(self._replicas_of(optimizer))
        if optimizer in self._divided:
            self._divided[optimizer].before_step()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer in self._divided:
            self._divided[optimizer].after_step()
        if self._stepper is not None:
            for replica in self._replicas_of(optimizer):
                replica.exchanges = 0
        self._loop.commit()

    def _replicas_of(self, optimizer: Optimizer) -> list[Replica]:
        """The replicas that own the optimizer's parameters, looked up anew when the answer may have changed: the
        optimizer was given more parameters, or one that was frozen at adoption needs a gradient now."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._owners.get(optimizer)
        if known is None or known.count != count or any(p.requires_grad for p in known.frozen):
            known = self._owners[optimizer] = self._find_owners(optimizer, count)
        return known.replicas

    def _find_owners(self, optimizer: Optimizer, count: int) -> _Owners:
        """Raises AdoptError PL304 for a parameter that needs a gradient and that nobody owns."""
        replicas = self._stepper.replicas if self._stepper is not None else []
        found: dict[int, Replica] = {}
        frozen: list[Tensor] = []
        for number, group in enumerate(optimizer.param_groups):
            for position, p in enumerate(group["params"]):
                owner = next((r for r in replicas if p in r.names), None)
                if owner is not None:
                    found[id(owner)] = owner
                elif p.requires_grad and self.size > 1:
                    raise AdoptError(
                        "PL304",
                        f"{type(optimizer).__name__}: parameter {position} of group {number}, shape {tuple(p.shape)}, "
                        "needs a gradient and belongs to no adopted model (or was frozen when it was adopted)",
                        help="adopt the module that owns it; parameters to be unfrozen later must need gradients at job.adopt.",
                    )
                elif self.size > 1:
                    frozen.append(p)
        return _Owners(list(found.values()), count, frozen)

    # ---- data -----------------------------------------------------------------------------------------------------
    def _own_loader(self, loader: DataLoader[Any]) -> Feed:
        feed = Feed(
            loader,
            rank=self.rank,
            size=self.size,
            streams=self._streams,
            index=self._num_loaders,
            activity=self._activity,
            before_batch=self._loop.before_batch,
            want_phantom=self._training,
            on_batch=lambda batch: self._loop.on_batch(batch, self._training()),
            on_epoch=self._loop.on_epoch_end,
        )
        self._loop.add_feed(self._num_loaders, feed)
        self._num_loaders += 1
        return feed

    def _training(self) -> bool:
        return torch.is_grad_enabled() and not self._evaluating

    def _share_streams(self, mine: bytes) -> bytes:
        if self._wire is None or self.size == 1:
            return mine
        return self._wire.gather_bytes("first batch", mine if self.rank == 0 else b"")[0]

    # ---- the loop -------------------------------------------------------------------------------------------------
    def epochs(self, n: int) -> Iterator[int]:
        """``range(n)``, with the epoch shown and counters started anew."""
        for epoch in range(n):
            self._loop.before_batch()
            self._loop.epoch = epoch
            self._counters.clear()
            yield epoch
            self._diary.flush(self._loop.clock)
            self._loop.publish()

    def log(self, **values: Any) -> None:
        """Show numbers: any rank, any number of times, never a collective. Tensors are read later, not now.

        Under N ranks what is shown is the mean over ranks, weighted by rows (or by ``job.weight``).
        """
        if self._place.launcher == "paceline":
            self._sink(Event("log", self._loop.steps, {"values": values, "weight": self._loop.log_weight}))
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
        chosen = models or tuple(self._models.values())
        modes = [(module, module.training) for model in chosen for module in model.modules()]
        self._counters.clear()
        was, self._evaluating = self._evaluating, True
        try:
            for model in chosen:
                model.eval()
            with torch.no_grad():
                yield
        finally:
            self._evaluating = was
            for module, training in modes:
                module.training = training
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
            if self._wire is None or self.size == 1:
                return [mine]
            with self._activity.during(Phase.EXCHANGE, tag):
                return [json.loads(raw) for raw in self._wire.gather_bytes(tag, json.dumps(mine).encode())]

        return gather

    # ---- the rest of the surface ----------------------------------------------------------------------------------
    def keep(self, **things: Any) -> None:
        """Anything with ``state_dict`` and ``load_state_dict`` joins the run's state; all ranks start from rank 0's.

        Raises:
            AdoptError: PL301 for a thing without these methods, PL303 when ranks hold different tensors.
        """
        for name, thing in things.items():
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                raise AdoptError(
                    "PL301",
                    f"job.keep({name}=...): a {type(thing).__qualname__} has no state_dict and load_state_dict",
                    help="give it these two methods.",
                )
            if self._wire is not None and self.size > 1:
                adoption.share_kept(self._wire, name, thing)
            self._kept[name] = thing

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
        if self._wire is None or self.size == 1:
            yield True
            return
        tag = f"once {name!r}"
        with self._activity.during(Phase.WAIT if not self.main else self._activity.phase, tag):
            if not self.main:
                self._wire.barrier(tag)
        yield self.main
        if self.main:
            self._wire.barrier(tag)

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
            raise StepError(
                "PL410",
                f"job.step(fn, batch) needs to know which of {len(self._optimizers)} adopted optimizers to step",
                help="say job.step(fn, batch, optimizer=opt).",
            )
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
        if not self._place.plain:
            self._loop.finish()
            whole = error is None or isinstance(error, Stopped)
            self._sink(Event("end", self._loop.steps, self._final_state() if whole else {"ok": False}))
        if self._stepper is not None:
            self._stepper.close()
        if self._wire is not None:
            self._wire.close()

    def _final_state(self) -> dict[str, Any]:
        end: dict[str, Any] = {"ok": True, "samples": self._loop.samples, "epoch": self._loop.epoch}
        if self._models:
            tensors = state.named_state(self._models)
            end["hash"] = state.hash_tensors(tensors)
            if self.main and self._place.run_dir is not None:
                try:
                    state.save(tensors, self._place.run_dir / "model.safetensors")
                except OSError as failure:
                    self._notice_failure(failure)
        return end

    def _ledger_path(self) -> Path | None:
        run_dir = self._place.run_dir
        return None if run_dir is None else run_dir / "ledger" / f"{self._place.name}.jsonl"

    def _notice_failure(self, failure: OSError) -> None:
        self._sink(
            Event(
                "notice", self._loop.steps if hasattr(self, "_loop") else 0, {"code": "PL601", "message": str(failure)}
            )
        )

    @property
    def _printing(self) -> bool:
        return self.main and self._place.launcher != "paceline"


def _device_of(models: dict[str, nn.Module]) -> torch.device:
    devices = {p.device for model in models.values() for p in model.parameters()}
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
