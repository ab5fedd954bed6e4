"""The user's object in a run whose replicas are split over ranks: sharded, tensor, pipeline, and their products.

The script is the same. Where it adopts a model and its optimizer, the model is split in place and the optimizer goes on with the
parts (``place``); where it reads batches, ranks of one replica read the same rows, but for those of an ``fsdp`` axis; what is saved,
exported and hashed is the whole model under its original names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from paceline.data.streams import Streams
from paceline.exchange.axes import Mesh, mesh
from paceline.exchange.chain import Exchange
from paceline.exchange.strategy import build
from paceline.group.reunion import Epoch, Reunion
from paceline.group.wire import Wire
from paceline.place.shard_deferred import Deferred
from paceline.terms.activity import Activity
from paceline.terms.errors import AdoptError, Stopped, UsageError
from paceline.terms.event import Event, Sink
from paceline.terms.plan import Place
from paceline.train import adopt as adoption
from paceline.train import placing, state, whole
from paceline.train import tree as trees
from paceline.train.exchanging import Desk
from paceline.train.job import Job
from paceline.train.ledger import Ledger
from paceline.train.loaders import Loaders
from paceline.train.loop import Loop
from paceline.train.owned import OwnedSteps
from paceline.train.peers import Named, Peers
from paceline.train.placing import Group
from paceline.train.room import give_back
from paceline.train.saving import Saving
from paceline.train.seams import Seams
from paceline.train.split import Split
from paceline.train.split_members import SplitHands, SplitMembers
from paceline.train.split_rounds import SplitExchanging, SplitRounds


class Opener(Protocol):
    """Opens smaller groups, see ``launch.groups``."""

    def peers(self, device: torch.device, groups: Sequence[Sequence[int]], wire: Wire) -> Wire:
        """The wire of this rank's group. All ranks call it with the same groups."""

    def replica(self, device: torch.device, layout: Mesh) -> Group:
        """Torch's process group of this rank's replica."""

    def close(self) -> None:
        """Leave it."""


_CUTS = "cuts"
"""In the state that is handed to those who join, by model: names of the blocks with which stages begin."""


def _as_measured(costs: list[float]) -> list[float]:
    return costs


def standing(place: Place, exchange: Exchange) -> Mesh:
    """Where this process stands; where it joins later, with a number that no other has."""
    layout = mesh(exchange.axes, exchange.ranks, place.plan.processes if place.joins else place.size, 0, exchange.text)
    return layout.among(place.rank, max(place.size, (place.rank // layout.inner + 1) * layout.inner))


class SplitJob(Job):
    """See :class:`~paceline.train.job.Job`.

    Args:
        place: Who this process is.
        connect: Opens the wire of all ranks.
        groups: Opens smaller groups.
        built: What the script builds its model in, where each rank keeps its own rows only.
        sink: Where events go.
        activity: Where this process says what it is doing.
        reunion: How the members of an elastic run meet; None where the loss of a rank ends it.
    """

    def __init__(
        self,
        place: Place,
        connect: Callable[[torch.device], Wire],
        groups: Opener,
        built: Deferred | None,
        sink: Sink,
        activity: Activity,
        reunion: Reunion | None = None,
    ) -> None:
        super().__init__(place, connect, sink, activity)
        self._groups, self._built, self._reunion = groups, built, reunion
        self._exchange = build(self._strategy)
        self._mesh = standing(place, self._exchange)
        self._outer: Peers | None = None
        self._cuts: dict[str, list[str]] = {}  # where others have cut their models, when this replica joined them
        self._others: Wire | None = None
        self._device = torch.device("cpu")
        self._split: Split | None = None
        self._replicas: SplitMembers | None = None
        self._between: SplitExchanging | None = None
        self._shards: Wire | None = None
        self._waiting: list[Optimizer] = []
        self._group: Group | None = None
        self._placed: list[placing.Placed] = []
        self._whole: trees.Tree | None = None
        self._last: dict[str, Tensor] | None = None
        self._seams = Seams()
        self._states = whole.States(self._seams)
        self._re_read()

    @property
    def layout(self) -> Mesh:
        """Where this rank stands."""
        return self._mesh

    def _re_read(self) -> None:
        """Batches are cut among the ranks that read rows of their own."""
        layout = self._mesh
        self._exchanges = True
        self._streams = Streams(layout.reader, max(2, layout.readers), self._share_streams)
        ledger = Ledger(self._ledger_path(), self._notice_failure)
        plan = self._place.plan
        self._loop = Loop(layout.readers, self._activity, self._sink, ledger, plan.stop_on_nan)
        self._loop.exchanges = True
        self._saving = Saving(self._place, self._loop, self._sink, self._things, self._captured)
        self._loaders = Loaders(self._loop, self._streams, self._activity, self._join, self._first_round)
        self._loaders.always_in_step = layout.axis("fsdp") is not None
        self._steps = OwnedSteps(self._loop, self._activity, self._step_without_loader, None, False)
        self._loop.on_step_end = self._at_step_end
        if self._reunion is not None:
            hands = SplitHands(self._be_at, self._leave, self._rewire, self._settle, self._tree_to_join)
            about = self._loop, ledger, self._sink, hands, layout
            self._members = self._replicas = SplitMembers(self._reunion, self._place.joins, *about)

    def use_strategy(self, strategy: str | Exchange) -> None:
        """See :meth:`Job.use_strategy`. Raises UsageError PL213 for one that the ranks were not started for."""
        asked = build(strategy)
        if asked.text != build(self._strategy).text:
            raise UsageError("PL213", f"the script asks for {asked.text}, and the run was started for {self._strategy}")

    def _ledger_path(self) -> Path | None:
        """Of the ranks that read the same rows, the first writes down which."""
        layout = getattr(self, "_mesh", None)
        return None if layout is None or not layout.leads else super()._ledger_path()

    # ---- adoption -------------------------------------------------------------------------------------------------
    def _adopt_launched(self, given: adoption.Adopted) -> dict[int, Any]:
        known = set(self._models)
        self._register(given)
        new = {label: model for label, model in self._models.items() if label not in known}
        if self._wire is None:
            self._device = adoption.device_of(self._models)
            self._wire = self._connect(self._device) if self._members is None else self._members.begin()
            self._emit_plan()
            self._saving.open(self.together, self._joining)
            if self._replicas is not None and self._replicas.given is not None:
                self._saving.join(*self._replicas.given)
                self._cuts, self._replicas.given = self._replicas.given[0][_CUTS], None
            self._begin()
        self._saving.adopted(new, given)
        parts = self._mesh.inner // self._mesh.along("ddp")
        if not self._joining:
            self.together(lambda wire: adoption.agree(wire, new, given.optimizers, given.loaders, parts))
            self.together(lambda wire: adoption.start_equal(wire, new, given.optimizers))
        if self._built is not None:
            self.together(self._drawn_alike)
        self._refuse_late(new, given.optimizers)
        for label, model in new.items():
            self._place_split(label, model, given.optimizers)
        if self._built is not None and new:
            self._built.__exit__(None, None, None)
            self._built = None
        give_back()  # whole parameters
        assert self._exchange is not None
        assert self._wire is not None
        later = self._mesh.axis("pipeline") is not None  # what this rank holds is known when the model is cut
        for optimizer in given.optimizers:
            self._waiting.append(optimizer) if later else self._own(optimizer)
        for scheduler in given.schedulers:
            self._steps.own_schedule(scheduler)
        if given.scalers and self._mesh.axis("pipeline") is not None:
            raise AdoptError("PL512", "a GradScaler looks at the gradients of one stage, and others may differ")
        if given.scalers:
            self._loop.report_nonfinite = False
        layout = self._mesh
        return {id(loader): self._loaders.own(loader, layout.reader, layout.readers) for loader in given.loaders}

    def _own(self, optimizer: Optimizer) -> None:
        assert self._exchange is not None
        assert self._wire is not None
        names, part = self._neighbours, self._place.local_rank
        self._steps.own(optimizer, self._between, self._exchange, self._wire, names, part)
        if self._mesh.axis("pipeline") is not None and self._mesh.axis("tensor") is None:
            self._steps.in_bites(optimizer)
        optimizer.register_step_post_hook(self._stepped)
        self._states.of_optimizer(optimizer)

    def _begin(self) -> None:
        """Groups, wires between replicas, and what keeps the books of gradients."""
        assert self._exchange is not None
        assert self._wire is not None
        layout, device = self._mesh, self._device
        self._group = self._groups.replica(device, layout)
        world = wire = self._wire
        peers, rounds = [], None
        if self._members is None:
            self._rewire(world)
        inside = layout.axis("ddp")
        if inside is not None:
            peers.append(
                self._peers(inside.settings["exchange"], self._groups.peers(device, layout.groups("ddp"), world))
            )
        if self._others is not None:
            if self._exchange.rounds is None:
                self._outer = self._peers(self._exchange, self._others)
                peers.append(self._outer)
            else:
                rounds = self._begin_rounds(self._others)
                replicas = [list(range(first, first + layout.inner)) for first in range(0, layout.size, layout.inner)]
                wire = self._groups.peers(device, replicas, world)
        self._split = Split(layout, wire, peers, rounds, self._activity, self._loop, self._wants_state, self._replicas)

    # ---- replicas that come and go --------------------------------------------------------------------------------
    def _be_at(self, epoch: Epoch) -> Mesh:
        self._move(epoch)
        self._mesh = self._mesh.among(epoch.rank, epoch.size)
        return self._mesh

    def _leave(self) -> None:
        """Who of another replica waits for this rank is told."""
        if self._others is not None:
            self._others.close()

    def _rewire(self, world: Wire) -> None:
        """Wires to those of other replicas who hold the same part. All ranks call it."""
        layout = self._mesh
        if layout.axis("fsdp") is not None and world.name == "shm":
            shards = self._groups.peers(self._device, layout.groups("fsdp"), world)
            if self._shards is None:
                self._shards = shards
            else:  # made for those who have just come
                shards.close()
        if layout.replicas > 1 or self._members is not None:  # who is alone now need not stay so
            parts = [list(range(part, layout.size, layout.inner)) for part in range(layout.inner)]
            self._others = self._groups.peers(self._device, parts, world)

    def _settle(self, world: Wire) -> None:
        """Exchange through the new wires."""
        if self._outer is not None and self._others is not None:
            self._outer.rewire(self._others)
        if self._split is not None:
            self._split.rewire(self._mesh, world)

    def _tree_to_join(self) -> trees.Tree:
        """The whole state, and where the models are cut, so that those who join cut theirs alike."""
        staged = {placed.label: placed.staged for placed in self._placed if placed.staged is not None}
        cuts = {label: stages.pipeline.cut_names for label, stages in staged.items() if stages.is_cut}
        return {**self._whole_tree(), _CUTS: cuts}

    def _join(self) -> None:
        """The loop begins: first where the others are, then with this rank's part of what they read."""
        if self._saving.begin_loop(self.main):
            self._first_epoch = self._loop.passed
        if self._members is not None:
            self._members.join()

    def _peers(self, exchange: Exchange, wire: Wire) -> Peers:
        return Peers(wire, exchange, self._activity, lambda: self._loop.steps)

    def _begin_rounds(self, wire: Wire) -> SplitRounds:
        assert self._exchange is not None
        if self._place.plan.checkpoint:
            message = (
                f"{self._exchange.text}: what its rounds remember is in pieces, which a checkpoint cannot hold yet"
            )
            raise UsageError("PL204", message, help="leave --checkpoint out, or use ddp() between replicas.")
        desk = Desk(None, lambda: False, self._things)
        between = SplitExchanging(self._exchange, wire, self._activity, self._loop, self._sink, desk)
        self._exchanging = self._between = between
        return between.own_rounds

    def _drawn_alike(self, wire: Wire) -> None:
        """Raise AdoptError PL303 where ranks have drawn other numbers: their rows do not belong together."""
        assert self._built is not None
        said = wire.gather_bytes("random numbers", self._built.drawn().encode())
        if len(set(said)) > 1:
            other = next(rank for rank, theirs in enumerate(said) if theirs != said[0])
            message = f"rank {other} has built its part of the model with other random numbers than rank 0"
            raise AdoptError(
                "PL303", message, help="seed torch before the model is built: torch.manual_seed(0), or --seed."
            )

    def _refuse_late(self, new: dict[str, nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Raise AdoptError PL510 for an optimizer whose parameters have been split before, or that comes later than its model."""
        mine = {p for model in new.values() for p in model.parameters()}
        for optimizer in optimizers:
            if any(p.requires_grad and p not in mine for group in optimizer.param_groups for p in group["params"]):
                name = type(optimizer).__name__
                raise AdoptError(
                    "PL510", f"{name} has parameters that are not those of a model adopted in the same call"
                )

    def _place_split(self, label: str, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        assert self._split is not None
        assert self._group is not None
        assert self._wire is not None
        if not any(p.requires_grad for p in model.parameters()):
            return
        placed = placing.place(
            self._mesh,
            self._group,
            label,
            model,
            optimizers,
            self._split,
            _as_measured if label in self._cuts else self._agreed,
            self._tell,
            self._hold,
            self._seams,
            self._shards,
            self._built,
            self._cuts.get(label),
        )
        self._placed.append(placed)
        self._states.of_model(model, placed.staged)
        norms = any(isinstance(m, _BatchNorm) for m in model.modules())
        told = adoption.warnings({label: model}) if norms and self._mesh.readers > 1 else []
        if norms and self._mesh.axis("pipeline") is not None:
            told.append("batch normalisation sees one micro-batch at a time, and counts micro-batches")
        for message in told if self.main else ():
            self._sink(Event("notice", 0, {"message": message}))

    def _agreed(self, costs: list[float]) -> list[float]:
        """What rank 0 says."""
        raw = json.dumps(costs if self.main else []).encode()
        agreed: list[float] = json.loads(self.together(lambda wire: wire.gather_bytes("costs of blocks", raw))[0])
        return agreed

    def _hold(self, label: str, model: nn.Module, held: Named) -> None:
        """What this rank holds of a model is known."""
        give_back()
        assert self._split is not None
        self._split.add(model, held)
        if self._between is not None:
            self._between.add(label, model, held)
        waiting, self._waiting = self._waiting, []
        for optimizer in waiting:
            self._own(optimizer)

    def _tell(self, label: str, text: str, svg: str = "") -> None:
        """Where everything is: for ``--explain``, once for each model."""
        if self.main:
            self._sink(Event("place", self._loop.steps, {"model": label, "text": text, "svg": svg}))

    def _emit_plan(self) -> None:
        assert self._exchange is not None
        assert self._wire is not None
        describe = f"strategy    {self._exchange.text}\n{self._mesh.describe()}"
        if self._mesh.replicas > 1:
            rounds = self._exchange.rounds
            lines = self._exchange.chain.describe().splitlines()
            if rounds is None:  # parts are exchanged together, once they are all there
                lines = ["  when      when backward has ended" if x.startswith("  when") else x for x in lines]
            describe += "\n".join(("", "between replicas, part by part", *lines))
            describe += "\n" + rounds.describe() if rounds is not None else ""
        self._sink(Event("adopt", 0, {"strategy": self._exchange.text, "wire": self._wire.name, "describe": describe}))

    # ---- the loop ---------------------------------------------------------------------------------------------------
    def _stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for placed in self._placed:
            placed.stepped()

    def _wants_state(self) -> bool:
        return self._saving.wants()

    def _at_step_end(self) -> None:
        """Between two steps: where a checkpoint is due, all ranks put the whole state together, and the first saves it."""
        assert self._split is not None
        now, self._split.save_now = self._split.save_now, False
        if now:
            self._whole = self._whole_tree()
        self._saving.step_ended(self.main, able=now)
        self._whole = None

    def count(self, **amounts: Any) -> None:
        """See :meth:`Job.count`. Ranks that hold the same rows count them once."""
        if self._mesh.leads:
            super().count(**amounts)

    # ---- the whole state ----------------------------------------------------------------------------------------------
    def _captured(self) -> trees.Tree:
        """What the checkpointer saves: put together at the step boundary."""
        assert self._whole is not None
        return self._whole

    def _whole_tree(self) -> trees.Tree:
        """The state of the job as if it were not split, on rank 0; all ranks of its replica take part."""
        with self._states.in_parts():
            return whole.gather(self._things(), self._placed, self._seams, self.main)

    def export(self, path: str | Path) -> None:
        """See :meth:`Job.export`. The parts are put together, so all ranks call it, at the same place of the script."""
        self.together(lambda wire: wire.gather_bytes(f"export {Path(path).name}", b""))
        tensors = self._named_state()
        if self.main:
            state.save(tensors, Path(path))
            self._sink(Event("export", self._loop.steps, {"path": str(path)}))

    def _named_state(self) -> dict[str, Tensor]:
        """The models' parameters and buffers, whole, on rank 0."""
        if self._last is not None:
            return self._last
        with self._states.in_parts():
            return whole.named(self._models, self._placed, self._seams, self.main)

    # ---- the end ------------------------------------------------------------------------------------------------------
    def finish(self, error: BaseException | None = None) -> None:
        """See :meth:`Job.finish`."""
        if self._finished:
            return
        if self._split is not None and (error is None or isinstance(error, Stopped)):
            self._put_together()
        try:
            super().finish(error)
        finally:
            if self._split is not None:
                self._split.close()
            for placed in self._placed:
                placed.close()
            self._groups.close()

    def _put_together(self) -> None:
        """The last that ranks do together; nobody leaves torch's group while somebody still talks in it."""
        self._level(redo=False)
        leader = None
        while leader != self._place.rank - self._mesh.part:  # another replica may have become the first
            leader, self._last = self._place.rank - self._mesh.part, None
            if self._place.plan.checkpoint:
                self._whole = self._whole_tree()
            self._last = self._named_state()
            self.together(lambda wire: wire.barrier("the end of the run"))
