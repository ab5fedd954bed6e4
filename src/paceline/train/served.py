"""A worker of a run with parameter servers: what its three control points mean.

*the iterator*    batches are leased from the lead server, one at a time (``data.leased``);
*``backward``*    local;
*``opt.step()``*  the gradient is pushed to the servers that keep the parameters, which step the optimizer; the parameters that come
back are there when it returns. The worker's own optimizer does nothing, and holds no state.

The model's parameters lie in memory that the servers of this host have mapped (``memory``): a push is a small message, and the
answer finds the new parameters in place. To servers of other hosts the same bytes travel behind the messages.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paceline.data.rows import Slice
from paceline.exchange.server import Piece
from paceline.exchange.service import Service
from paceline.group.frames import Frame
from paceline.group.secure import Connection
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import Aborted, AdoptError, PeerLost, StepError
from paceline.terms.plan import Place
from paceline.train.alone import Alone
from paceline.train.keeping import Filled, Kept, hypers, set_hypers
from paceline.train.loop import Loop
from paceline.train.memory import Memory
from paceline.train.reach import refused
from paceline.train.rows import told
from paceline.train.talk import Say
from paceline.train.way import Way

T = TypeVar("T")

_ORIGINS = 64  # passes that servers which begin again may not know


class Served:
    """The worker's half.

    Args:
        place: Who this is, and where the servers are.
        connect: Connects to an address, or raises.
        loop: Where the job stands.
        activity: Where waiting is shown.
        on_view: Told the number of the group and its members, whenever that has changed.
        stream_now: The random state that orders are drawn from, as JSON.
        service: What the strategy asks of servers, once the script has adopted something.

    Attributes:
        version: Of the parameters that this worker has.
        staleness: Updates by others between the read and the application of this worker's last push.
    """

    def __init__(
        self,
        place: Place,
        connect: Callable[[str], Connection],
        loop: Loop,
        activity: Activity,
        on_view: Callable[[int, list[str]], None],
        stream_now: Callable[[], dict[str, Any]],
        service: Callable[[], Service],
    ) -> None:
        self._place, self._open, self._loop, self._activity, self._on_view = place, connect, loop, activity, on_view
        self._stream_now, self._asked = stream_now, service
        self._alone: Alone | None = None  # where workers step by themselves
        self._servers: list[Way] = []
        self._kept: Kept | None = None
        self._memory: Memory | None = None
        self._optimizers: list[Optimizer] = []
        self._hypers: list[Any] = []
        self._hidden: list[tuple[Tensor, Tensor | None]] = []
        self._held: list[tuple[Piece, Slice]] = []  # given to the loop since the last step
        self._factor = 1.0  # of gradients that arrive now, where several backwards make one step
        self._summed = False
        self._passes: dict[int, int] = {}
        self._origins: dict[tuple[int, int], str] = {}  # of passes that may be open
        self._opened: dict[tuple[int, int], int] = {}  # of the same: so many batches
        self._length: dict[int, tuple[int, int, int]] = {}  # of the pass that a loader is in
        self._ended: dict[tuple[int, int], tuple[int, int, int]] = {}  # of passes that this worker is through with
        self._seq = self.version = self.staleness = 0
        self._in_pass, self._fresh = False, True
        self._place_now = (0, 1)
        self._group = -1
        self.stream = b""
        self.first_epoch = 0

    # ---- the beginning --------------------------------------------------------------------------------------------
    def attach(self, kept: Kept) -> None:
        """The loop begins: connect, and let the model live where the servers see it.

        Raises:
            AdoptError: PL303, the servers hold something else.
            PeerLost: PL460, there is no server.
        """
        with self._activity.during(Phase.WAIT, "servers"):
            self._kept = kept
            self._optimizers = kept.optimizers
            self._hypers = [hypers(o) for o in self._optimizers]
            local = all(address.startswith("unix:") for address in self._place.servers)
            if self._asked().one_copy and not local:
                raise AdoptError(
                    "PL463", "one copy of the parameters serves workers of one machine, and this one reaches it by TCP"
                )
            self._memory = Memory(kept.layout, kept.buffer_layout, shared=local)
            kept.move_into(self._memory)
            meta = self._connect()
            self._passes = {int(loader): number for loader, number in meta["passes"].items()}
            self.first_epoch = meta["epoch"]
        for p in kept.params:
            p.register_hook(self._scaled)  # type: ignore[no-untyped-call]

    def _connect(self) -> Mapping[str, Any]:
        """Become a worker of the servers; what the lead says first."""
        assert self._kept is not None
        assert self._memory is not None
        addresses, count = self._place.servers, self._asked().servers
        self._servers = [
            Way(addresses[number::count], self._open, self._check, self._place.name) for number in range(count)
        ]
        meta = {"handle": self._memory.handle, "is": self._kept.description}
        welcomes = [way.attach(meta) for way in self._servers]
        if self._asked().one_copy:
            shared = Memory(self._kept.layout, self._kept.buffer_layout, handle=str(welcomes[0]["handle"]))
            self._kept.move_into(shared)
            shared.close()
        self.stream = base64.b64decode(welcomes[0]["stream"])
        self._send(self._lead, Say.READY, {})
        frame = self._hear(self._lead, Say.GO)
        self._arrived(frame, 0)
        return frame.meta

    def _lasting(self, call: Callable[[], T]) -> T:
        """Make a call; once more, when the servers have died and others have taken over from them."""
        while True:
            try:
                return call()
            except PeerLost:
                self._reconnect()

    def _reconnect(self) -> None:
        """The servers are gone. Wait for those that take over from their last checkpoint; what this worker holds is void."""
        while True:
            for way in self._servers:
                way.close()
            self._held, self._seq, self._summed, self._factor = [], 0, False, 1.0
            try:
                self._connect()
                for (loader, epoch), origin in self._origins.items():
                    self._origin(loader, epoch, origin)
                    self._tell_opened(loader, epoch)
                return
            except PeerLost:  # these have died as well
                continue

    def _tell_opened(self, loader: int, epoch: int) -> None:
        """How far a pass had come: what the checkpoint does not know is trained again, also of a pass that this worker is past."""
        place = {"loader": loader, "epoch": epoch}
        ended = self._ended.get((loader, epoch))
        batches = ended[0] if ended is not None else self._opened.get((loader, epoch), 0)
        self._send(self._lead, Say.OPENED, {**place, "batches": batches})
        if ended is not None:
            self._send(self._lead, Say.OVER, {**place, "batches": batches, "rows": ended[1], "order": ended[2]})

    def _check(self) -> None:
        if self._activity.board.aborted:
            raise Aborted("PL404", f"the run was ended while {self._place.name} waited for a server")

    # ---- batches --------------------------------------------------------------------------------------------------
    @property
    def free(self) -> bool:
        """See ``data.leased.Leases``."""
        return not self._asked().rule.synchronous

    def ask(self, loader: int, epoch: int, ahead: bool = False) -> Piece | None:
        """See ``data.leased.Leases``."""
        meta = {"loader": loader, "epoch": epoch, "ahead": ahead, "round": self._loop.epoch}

        def ask() -> Any:
            self._send(self._lead, Say.ASK, meta)
            return self._hear(self._lead, Say.GRANT).meta["piece"]

        with self._activity.during(Phase.WAIT, "a batch"):
            granted = self._lasting(ask)
        if granted is None:
            return None
        piece = Piece(*granted)
        place = piece.loader, piece.epoch
        if piece.parts:
            self._opened[place] = max(self._opened.get(place, 0), piece.batch + 1)
        return piece

    def over(self, loader: int, epoch: int, batches: int, rows: int, order: int) -> None:
        """See ``data.leased.Leases``."""
        meta = {"loader": loader, "epoch": epoch, "batches": batches, "rows": rows, "order": order}
        self._opened[loader, epoch] = batches
        self._lasting(lambda: self._send(self._lead, Say.OVER, meta))

    def begins(self, loader: int, origin: str) -> tuple[int, str]:
        """See ``data.leased.Leases``. Who comes late begins in the pass that is open."""
        if self._alone is not None and self._memory is not None:
            self._alone.take_up(self._memory)
        self._in_pass = True
        number = self._passes[loader] = self._passes.get(loader, -1) + 1
        first = self._lasting(lambda: self._origin(loader, number, origin))
        self._origins[loader, number] = first
        while len(self._origins) > _ORIGINS:
            for known in (self._opened, self._ended, self._origins):
                known.pop(next(iter(self._origins)), None)
        return number, first

    def drawn(self, loader: int, after: str, length: tuple[int, int, int]) -> None:
        """See ``data.leased.Leases``."""
        self._fresh, self._length[loader] = False, length
        self._lasting(lambda: self._send(self._lead, Say.DRAWN, {"loader": loader, "after": after}))

    def origin(self, loader: int, epoch: int) -> str:
        """See ``data.leased.Leases``."""
        return self._lasting(lambda: self._origin(loader, epoch, ""))

    def _origin(self, loader: int, epoch: int, mine: str) -> str:
        self._send(self._lead, Say.PASS, {"loader": loader, "epoch": epoch, "origin": mine, "fresh": self._fresh})
        origin: str = self._hear(self._lead, Say.ORIGIN).meta["origin"]
        return origin

    def ends(self, loader: int) -> None:
        """See ``data.leased.Leases``."""
        self._flush()
        self._in_pass = False
        if loader in self._length:
            self._ended[loader, self._passes[loader]] = self._length[loader]

    def _flush(self) -> None:
        """Push the steps that were taken since the last push: a round never goes beyond a pass."""
        if self._alone is not None and self._alone.steps:
            with self._activity.during(Phase.EXCHANGE, "push"):
                self._push(self._optimizers[0])

    def given(self, piece: Piece, rows: Slice) -> None:
        """See ``data.leased.Leases``."""
        if self._held and piece.parts > 1:
            self._accumulate()
        self._held.append((piece, rows))
        if self._summed:
            self._factor = rows.local_rows / rows.rows

    def view(self, loader: int) -> tuple[int, int]:
        """See ``data.leased.Leases``."""
        return self.together(f"a pass over loader {loader} without training")

    def _accumulate(self) -> None:
        """A second batch for one step: what has come so far, and what comes, counts by its share of its own global batch."""
        if self._loop.given_weight is not None:
            raise StepError("PL461", "job.weight with several batches in one step")
        if not self._summed:
            assert self._kept is not None
            rows = self._held[-1][1]
            for p in self._kept.params:
                if p.grad is not None:
                    p.grad.mul_(rows.local_rows / rows.rows)
            self._summed = True

    def _scaled(self, grad: Tensor) -> Tensor | None:
        return grad * self._factor if self._summed else None

    # ---- the step -------------------------------------------------------------------------------------------------
    def own(self, optimizer: Optimizer) -> None:
        """Take over one optimizer."""
        if self._asked().own_steps and self._alone is None:
            self._alone = Alone(self._asked())
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise StepError("PL302", f"{type(optimizer).__name__}.step was given a closure")
        if self._alone is not None:
            return
        self._hidden = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
        for p, _ in self._hidden:  # without gradients every optimizer of torch does nothing
            p.grad = None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for p, grad in self._hidden:
            p.grad = grad
        self._hidden = []
        if self._alone is not None and not self._alone.step():
            return
        with self._activity.during(Phase.EXCHANGE, "push"):
            self._push(optimizer)

    def _push(self, optimizer: Optimizer) -> None:
        assert self._kept is not None
        assert self._memory is not None
        number = next(i for i, o in enumerate(self._optimizers) if o is optimizer)
        filled = self._filled(optimizer)
        if filled.wrong:
            raise StepError(
                "PL409", f"{self._place.name}, update {self.version + 1}: the gradient of {filled.wrong} is not finite"
            )
        self._seq += 1
        held, self._held = self._held, []
        weight, summed = self._loop.spend([rows for _, rows in held])
        sparse, rows = told(filled.sparse)
        message: dict[str, Any] = {
            "seq": self._seq,
            "optimizer": number,
            "weight": weight,
            "sum": summed or self._summed,
            "finite": True,
            "steps": self._alone.steps if self._alone is not None else 0,
            "absent": filled.absent,
            "sparse": sparse,
            "covers": [[p.loader, p.epoch, p.batch, p.part, p.parts] for p, _ in held if p.parts],
            "rows": [[r.loader, r.epoch, r.start, r.rows, r.start + r.local_start, r.local_rows] for _, r in held],
        }
        now = hypers(optimizer)
        if now != self._hypers[number] and self._alone is None:
            message["hypers"] = self._hypers[number] = now
        self._summed, self._factor = False, 1.0
        seq = self._seq
        try:
            for server, way in reversed(list(enumerate(self._servers))):  # the lead last: then the others have it
                self._send(way, Say.STEP, message, [*self._kept.pushed(self._memory, server), *rows])
            self._arrived(self._hear(self._lead, Say.GO), seq)
        except PeerLost:  # this gradient is lost; its batch is leased again
            self._reconnect()

    def _filled(self, optimizer: Optimizer) -> Filled:
        """Put there what is pushed."""
        assert self._kept is not None
        assert self._memory is not None
        if self._alone is None:
            return self._kept.fill(self._memory, optimizer)
        wrong = self._alone.fill(self._memory)
        self._kept.fill_buffers(self._memory)
        return Filled([], self._kept.layout.items[int(wrong)].name if wrong else "", {})

    def _arrived(self, frame: Frame, seq: int) -> None:
        """The lead's parameters are there; wait for those of the others."""
        assert self._kept is not None
        assert self._memory is not None
        self._take(frame.meta)
        for way in self._servers[1:]:
            self._hear(way, Say.GO)
        if frame.meta["seq"] != seq:
            raise StepError("PL462", f"the server answered push {frame.meta['seq']}, not {seq}")
        self._kept.read_buffers(self._memory)
        if self._alone is not None:
            self._alone.read(self._memory)

    def _take(self, meta: Mapping[str, Any]) -> None:
        """What the lead says with the parameters."""
        self.version, self.staleness = meta["version"], meta["tau"]
        if self._alone is not None:
            self._alone.total, self._alone.every = meta["steps"], meta["every"]
        self._loop.stand(meta["version"], meta["samples"])
        if meta["group"] != self._group:
            self._group = meta["group"]
            self._on_view(self._group, meta["members"])
        if "hypers" in meta and self._alone is None:
            for optimizer, groups in zip(self._optimizers, meta["hypers"], strict=True):
                set_hypers(optimizer, groups)
            self._hypers = [hypers(o) for o in self._optimizers]

    # ---- schedules ------------------------------------------------------------------------------------------------
    def own_schedule(self, number: int, scheduler: LRScheduler) -> None:
        """A schedule steps where its optimizer does: once for each update, or once for each pass, whoever says so."""
        if self._alone is not None:
            self._alone.own_schedule(number, scheduler, lambda: self._in_pass)
            return

        @functools.wraps(scheduler.step)
        def told(*args: Any, **kwargs: Any) -> None:
            which = f"update {self.version}" if self._in_pass else f"epoch {self._loop.epoch}"
            values = [float(a) for a in (*args, *kwargs.values()) if a is not None]

            def tell() -> None:
                for way in self._servers:
                    self._send(way, Say.SCHEDULE, {"schedule": number, "which": which, "args": values})

            self._lasting(tell)

        scheduler.step = told  # type: ignore[method-assign]

    # ---- all together ---------------------------------------------------------------------------------------------
    def together(self, tag: str) -> tuple[int, int]:
        """Come to a point with all workers, and read the same parameters; which of how many this one is."""
        self.gather(tag, "")
        return self._place_now

    def gather(self, tag: str, note: str) -> list[str]:
        """Exchange notes with all workers, in the order of their ranks; afterwards all have the same parameters.

        Raises:
            StepError: PL402, they have come to another point.
        """

        self._flush()
        if self._alone is not None and self._memory is not None:
            self._alone.put_aside(self._memory)

        def meet() -> Mapping[str, Any]:
            self._send(self._lead, Say.MEET, {"tag": tag, "note": note, "stream": self._stream_now()})
            met = self._hear(self._lead, Say.MET).meta
            self._pull(met["version"])
            return met

        with self._activity.during(Phase.WAIT, tag):
            met = self._lasting(meet)
        self._place_now = met["rank"], met["size"]
        notes: list[str] = met["notes"]
        return notes

    def _pull(self, version: int) -> None:
        assert self._kept is not None
        assert self._memory is not None
        for way in self._servers:
            self._send(way, Say.PULL, {"version": version})
        for way in self._servers:
            self._hear(way, Say.PULLED)
        self._kept.read_buffers(self._memory)
        self.version = version

    # ---- the end --------------------------------------------------------------------------------------------------
    def close(self, *, whole: bool) -> None:
        """The script has ended, well (`whole`) or not. Idempotent."""
        for number, way in enumerate(self._servers):
            way.close(bye=whole and number == 0)
        self._servers.clear()
        if self._memory is not None:
            self._memory.close()

    # ---- messages -------------------------------------------------------------------------------------------------
    @property
    def _lead(self) -> Way:
        return self._servers[0]

    def _send(self, way: Way, kind: Say, meta: Mapping[str, Any], buffers: Sequence[memoryview] = ()) -> None:
        """Raises PeerLost PL460: the server is gone."""
        way.send(kind, meta, buffers)

    def _hear(self, way: Way, kind: Say) -> Frame:
        """Wait for the message of this kind. Fresh parameters may come before it.

        Raises:
            StepError, AdoptError: A server refuses this worker.
            PeerLost: PL460, the server is gone.
        """
        place = (
            self._kept.place_for(self._memory, self._servers.index(way))
            if self._memory is not None and self._kept is not None
            else None
        )
        while True:
            frame = way.hear(place)
            if frame is None:
                self._check()
            elif frame.kind == Say.REFUSE:
                raise refused(frame.meta)
            elif frame.kind == kind:
                return frame
            elif frame.kind == Say.GO:
                self._arrived(frame, self._seq)
            else:
                number = self._servers.index(way)
                raise StepError("PL462", f"server {number} said {frame.kind} where {kind.name} was due")
