"""Rounds: ranks step on their own, and the links behind the optimizer exchange parameters when a round ends.

When a round ends:
1. *Roll*: one small message tells all ranks how many rows each has trained on, and whether all are at the same step of the same
   batches; it carries what is agreed with every backward under ``ddp``: a stop, somebody who waits to join, a checkpoint that is due.
2. *Send*: parameters go into flat buckets, and down the links. With `overlap` 1 and 2 happen some steps earlier.
3. *Commit*: all tell each other a fingerprint of what came out. Who is lost before that has taken no part, for anybody: nothing was
   written yet. Then parameters are written, buffers too, and the books (``Loop``) take the round's rows for trained.

Float buffers (batch normalisation) become the mean weighted by rows whenever all ranks leave with the same parameters; all other
buffers are those of rank 0.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.optim import Optimizer

from paceline.exchange.cadence import Pace
from paceline.exchange.chain import Chain, Exchange, chain, optimizer
from paceline.exchange.chain import Rounds as Plan
from paceline.exchange.link import Message, State
from paceline.exchange.outer import Outer
from paceline.group.wire import AllGather, AllReduce, Buffer, Drive, Request, Send, Together, Wire
from paceline.place.bundle import BUCKET, Packed, as_bytes, from_bytes, pack
from paceline.place.torch_private import after_backward
from paceline.terms.activity import Activity, Phase
from paceline.terms.errors import AdoptError, StepError
from paceline.terms.event import Event, Sink
from paceline.train.loop import Loop
from paceline.train.remembered import Remembered
from paceline.train.replicas import fingerprint

STEPS, STEPS_SQUARED, NONFINITE, STOP, CHANGE, SAVE, MARK, MARK_SQUARED, STEP_S, EXCHANGE_S, ROWS = range(1, 12)
"""Places in the header of the roll; from ROWS on one number for each part."""

_BUFFERS = chain(optimizer, Outer())


@dataclass(frozen=True, slots=True)
class News:
    """What the roll said, the same on all ranks.

    Attributes:
        rows: That all ranks have trained on, by part.
        nonfinite: Steps that some rank has left out.
    """

    rows: tuple[float, ...]
    nonfinite: int
    stop: bool
    change: bool
    save: bool
    pace: Pace


@dataclass(eq=False)
class Member:
    """One adopted model: its parameters to exchange, by neutral name.

    Attributes:
        exchanges: There for whoever asks who owns a parameter.
    """

    model: nn.Module
    names: dict[nn.Parameter, str]
    label: str
    exchanges: int = 0

    def buffers(self) -> list[tuple[str, Tensor]]:
        """All buffers, whether they are saved or not, by name."""
        return [(f"{self.label}:{name}", buffer) for name, buffer in self.model.named_buffers()]


class Rounds:
    """Drives the part of the chain behind the optimizer.

    Args:
        wire: The wire of this job.
        activity: Where to say what this rank does.
        loop: Where this rank stands.
        sink: Hears a ``round`` event for each round.
        change: Tells whether this rank knows of somebody who waits to join.
        save: Tells whether a checkpoint is due here.
        hosts: For each rank the index of its host; empty when all are on one.

    Attributes:
        level: All ranks hold the same parameters but for the steps of the open round.
        remembered: The state of optimizers, which may be averaged, or reset, with a round.
    """

    def __init__(
        self,
        wire: Wire,
        activity: Activity,
        loop: Loop,
        sink: Sink,
        change: Callable[[], bool],
        save: Callable[[], bool],
        hosts: Sequence[int],
    ) -> None:
        self.members: list[Member] = []
        self.remembered = Remembered()
        self.level = True
        self._wire, self._activity, self._loop, self._sink = wire, activity, loop, sink
        self._change, self._save, self._hosts = change, save, hosts
        self._plan, self._chain, self._bucket_bytes = Plan(), _BUFFERS, BUCKET
        self._packed: list[Packed] = []
        self._states: dict[Packed, list[State]] = {}
        self._wanted = False  # a strategy of rounds is in force
        self._roll: Buffer | None = None
        self._turn = 0
        self._since = 0  # steps of the open round
        self._rows = [0.0]  # by part, since it was sent
        self._taken: list[float] = []  # of these, what is on its way
        self._news: News | None = None  # of the exchange that is under way
        self._sent: list[Packed] = []
        self._full = False
        self._weight, self._backwards, self._nonfinite = 0.0, 0, 0
        self._pace = Pace()  # the same on all ranks: it says when rounds end
        self._exchange_s, self._clock = 0.0, time.perf_counter()
        self._nbytes = 0.0
        self._hook: Any = None
        self._drive = self._new_drive()

    # ---- adoption -------------------------------------------------------------------------------------------------
    def add(self, label: str, model: nn.Module, params: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Take part with one more model. All ranks add the same models in the same order, before the first step."""
        self.members.append(Member(model, {p: f"{label}.{name}" for name, p in params}, label))
        if self._hook is not None:
            self.attach(False)
            self.attach(True)
        if self._wanted:
            self.build()

    def use(self, exchange: Exchange) -> None:
        """Be run by this strategy from now on: everything remembered for another one is dropped."""
        assert exchange.rounds is not None
        self._plan, self._chain = exchange.rounds, exchange.chain
        self._bucket_bytes = int(exchange.bucket_mb * 2**20) if exchange.bucket_mb else BUCKET
        self.rest()
        self._wanted = True

    def rest(self) -> None:
        """Be of no use for a while: memory and what links remember are given up."""
        self.drop()
        self._packed, self._states, self._wanted = [], {}, False
        self._turn = self._since = 0
        self._rows = [0.0] * (self._plan.fragments + 1)
        self.level = True

    def build(self) -> None:
        """Get memory for the buckets. All ranks do it together."""
        kept = self._saved()
        self.remembered.forget_memory()
        params = [(name, p) for member in self.members for p, name in member.names.items()]
        floats = [(name, b) for member in self.members for name, b in member.buffers() if b.is_floating_point()]
        fragments = self._plan.fragments
        self._packed = pack(params, self._wire, bucket_bytes=self._bucket_bytes, fragments=fragments) if params else []
        self._packed += pack(floats, self._wire, part=fragments) if floats else []
        self._states = {p: self._chain_of(p).init(p.bucket) for p in self._packed}
        self._put(kept)
        region = self._wire.allocate(1, torch.float64, torch.device("cpu"))
        (self._roll,) = self._wire.cut(region, [1], [ROWS + fragments + 1])

    def rewire(self, wire: Wire, hosts: Sequence[int]) -> None:
        """Exchange through `wire` from now on. What was under way is forgotten."""
        self.drop()
        self._wire, self._hosts = wire, hosts
        self._drive = self._new_drive()
        if self._wanted:
            self.build()

    def attach(self, active: bool) -> None:
        """Hear of backwards, or no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        params = [p for member in self.members for p in member.names]
        if active and params:
            self._hook = register_multi_grad_hook(params, self._on_backward, mode="any")

    def _new_drive(self) -> Drive:
        return Drive(self._wire, self._activity, self._count)

    def _count(self, request: Request[Any]) -> None:
        self._nbytes += nbytes_sent(request, self._wire.size)

    def _chain_of(self, packed: Packed) -> Chain:
        return _BUFFERS if packed.part == self._plan.fragments else self._chain

    # ---- steps ----------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """A step boundary, before the first batch of a round: links that remember parameters begin with these."""
        for packed in self._packed:
            states = self._states[packed]
            if not any(states):
                packed.fill()
                self._chain_of(packed).begin(packed.buffer.tensor, states)

    def _on_backward(self, *_: object) -> None:
        """A backward has reached its first parameter."""
        scale = self._loop.scale()
        self._weight += scale.weight
        self._backwards += 1
        if scale.weight == 0.0:
            self._undo_after_backward()

    def _undo_after_backward(self) -> None:
        """What the backward of a stand-in row adds to the gradients is taken back when it has ended."""
        kept = [(p, p.grad if p.grad is None else p.grad.clone()) for member in self.members for p in member.names]

        def undo() -> None:
            for p, grad in kept:
                p.grad = grad

        after_backward(undo)

    def leaves_out(self, optimizer: Optimizer) -> bool:
        """Whether this rank has nothing to step on: no row of its own, or a gradient that is not finite."""
        if self._loop.leaves_out and not _finite(optimizer):
            self._nonfinite += 1
            self._loop.not_finite()
            self._weight = 0.0
            return True
        if not self._backwards:  # gradients that were set by hand
            self._weight = 1.0
        return self._weight == 0.0

    def stepped(self) -> None:
        """A step was taken, or left out."""
        self._since += 1
        self._rows = [rows + self._weight for rows in self._rows]
        self._weight, self._backwards = 0.0, 0
        if self._plan.sends(self._since) and self._news is None:
            with self._activity.during(Phase.EXCHANGE, "round"):
                self._send(full=False)
        elif self._news is not None:
            self._drive.poll()

    @property
    def due(self) -> bool:
        """The round is over."""
        return self._plan.cadence.due(self._since, self._pace)

    def owes(self, full: bool) -> bool:
        """There is something to exchange."""
        return self._since > 0 or self._news is not None or (full and not self.level)

    @property
    def under_way(self) -> bool:
        """Something was sent, and has not been applied."""
        return self._news is not None

    @property
    def open_steps(self) -> tuple[int, list[float]]:
        """Steps of the open round, and the rows they trained on."""
        return self._since, list(self._rows)

    def keep_steps(self, since: int, rows: list[float]) -> None:
        """These steps are those of the open round."""
        self._since, self._rows = since, rows

    # ---- a round ----------------------------------------------------------------------------------------------------
    def exchange(self, *, full: bool) -> News:
        """End a round. All ranks do it together.

        Args:
            full: All parts at once, and all ranks leave with the same parameters.

        Raises:
            PeerLost: Nothing has changed, but for what links remember.
            StepError: Ranks are not at the same step (PL401), train on different batches (PL412), or came to different
                results (PL440).
        """
        began, rows = time.perf_counter(), self._rows[-1]
        with self._activity.during(Phase.EXCHANGE, "round"):
            if self._news is None:
                self._send(full=full)
            assert self._news is not None
            self._drive.finish()
            others = self._others()
            states = self._averaged() if self._plan.state == "average" else []
            self._agree()
        self._apply(others, states)
        news = self._close(began)
        self._tell(rows, time.perf_counter() - began)
        return news

    def drop(self) -> None:
        """Forget what is under way."""
        self._drive.drop()
        self._news, self._sent, self._taken = None, [], []
        self._nbytes = 0.0

    @property
    def _evens(self) -> bool:
        """This exchange leaves the same parameters on all ranks, but for what they do meanwhile."""
        return self._full or self._plan.level

    def _send(self, *, full: bool) -> None:
        self._full = full
        self._news = self._call_the_roll()
        part = self._plan.fragment(self._turn)
        self._sent = [p for p in self._packed if full or p.part == part or (p.part == self._rest and self._evens)]
        self._taken = list(self._rows)
        size = self._wire.size
        for packed in self._sent:
            total = self._news.rows[packed.part]
            weight, total = (self._rows[packed.part], total) if total > 0 else (1.0, float(size))
            packed.fill()
            message = Message(packed.bucket, packed.buffer, [weight], total / size, self._wire.rank, size)
            message.step, message.hosts, message.full = self._loop.steps, self._hosts, full
            coroutine = self._chain_of(packed).exchange_parameters(message, self._states[packed])
            self._drive.launch(coroutine, label=f"round, bucket {packed.bucket.index + 1}/{len(self._packed)}")

    @property
    def _rest(self) -> int:
        """The part of the buffers."""
        return self._plan.fragments

    def _call_the_roll(self) -> News:
        assert self._roll is not None
        size, steps, mark = self._wire.size, float(self._loop.steps), float(self._loop.mark)
        step_s = (time.perf_counter() - self._clock) / max(1, self._since)
        header = [self._rows[-1], steps, steps * steps, float(self._nonfinite)]
        header += [float(self._stop()), float(self._change()), float(self._save())]
        header += [mark, mark * mark, step_s, self._exchange_s, *self._rows]
        sums: list[float] = self._drive.run(_sum(self._roll, header), "round")
        self._check(sums)
        pace = Pace(sums[STEP_S] / size, sums[EXCHANGE_S] / size)
        stop, change, save = (sums[place] > 0 for place in (STOP, CHANGE, SAVE))
        return News(tuple(sums[ROWS:]), round(sums[NONFINITE]), stop, change, save, pace)

    def _stop(self) -> bool:
        return bool(self._activity.board.stop_requested)

    def _check(self, sums: Sequence[float]) -> None:
        size = self._wire.size
        if abs(size * sums[STEPS_SQUARED] - sums[STEPS] ** 2) >= 0.5:
            counts = [int(raw) for raw in self._wire.gather_bytes("steps", str(self._loop.steps).encode())]
            said = ", ".join(f"rank {r} has applied {c}" for r, c in enumerate(counts))
            raise StepError("PL401", f"ranks do not agree on the number of optimizer steps: {said}")
        if abs(size * sums[MARK_SQUARED] - sums[MARK] ** 2) >= 0.5:
            places = [raw.decode() for raw in self._wire.gather_bytes("batches", self._loop.where().encode())]
            said = ", ".join(f"rank {r} on {place}" for r, place in enumerate(places))
            raise StepError("PL412", f"step {self._loop.steps}: ranks train on different batches: {said}")

    def _others(self) -> tuple[list[Tensor], Tensor] | None:
        """Buffers that cannot be averaged, and what rank 0 has in them."""
        kept = [b for m in self.members for _, b in m.buffers() if not b.is_floating_point() and b.numel()]
        if not (kept and self._evens and self._wire.size > 1):
            return None
        row = as_bytes(kept)
        self._wire.broadcast(row)
        return kept, row

    def _agree(self) -> None:
        """The round counts, for all ranks or for none. Raises StepError PL440."""
        evens = self._evens or self._plan.fragments > 1 or self._plan.overlap > 0
        found = fingerprint(packed.buffer.tensor for packed in self._sent) if evens else []
        said = self._wire.gather_bytes("round", json.dumps(found).encode())
        if len(set(said)) > 1:
            ranks = [r for r, theirs in enumerate(said) if theirs != max(said, key=said.count)]
            message = f"step {self._loop.steps}: ranks came to different parameters from the same exchange: {ranks}"
            raise StepError("PL440", message)

    def _apply(self, others: tuple[list[Tensor], Tensor] | None, states: Sequence[Packed]) -> None:
        with torch.no_grad():
            for packed in (*self._sent, *states) if self._wire.size > 1 else ():
                packed.write(0.0 if self._full or packed.part == self._rest else self._plan.blend)
            if others is not None:
                from_bytes(others[1], others[0])
        if self._plan.state == "reset":
            self.remembered.reset()

    def _close(self, began: float) -> News:
        assert self._news is not None
        news = self._news
        for packed in self._sent:
            self._rows[packed.part] -= self._taken[packed.part]
            self._taken[packed.part] = 0.0
        if not any(p.part == self._rest for p in self._sent) and self._evens:
            self._rows[self._rest] = 0.0
        self._turn, self._since, self._nonfinite = self._turn + 1, 0, 0
        self.level = self._evens
        self._pace, self._clock = news.pace, time.perf_counter()
        self._exchange_s = self._clock - began
        self._news, self._sent = None, []
        return news

    def _tell(self, rows: float, seconds: float) -> None:
        nbytes, self._nbytes = round(self._nbytes), 0.0
        data = {"bytes": nbytes, "seconds": seconds, "weight": rows, "full": self._full}
        self._sink(Event("round", self._loop.steps, data))

    def _averaged(self) -> list[Packed]:
        """The mean over ranks of what optimizers remember, in buckets that were not yet written back."""
        assert self._news is not None
        packs, size, total = self.remembered.packed(self._wire, self._rest), self._wire.size, self._news.rows[-1]
        for packed in packs if size > 1 else ():
            weight, whole = (self._taken[-1], total) if total > 0 else (1.0, float(size))
            packed.fill()
            message = Message(packed.bucket, packed.buffer, [weight], whole / size, self._wire.rank, size)
            self._drive.launch(Outer().merge(message), label="round, state of the optimizer")
        self._drive.finish()
        return packs

    # ---- the state of the chain -------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """What links remember, by the names of parameters: true until the next round ends."""
        rows = [float(rows) for rows in self._rows]
        pace = [self._pace.step, self._pace.exchange]
        return {"turn": self._turn, "level": self.level, "rows": rows, "pace": pace, "links": self._saved()}

    def _saved(self) -> dict[str, Any]:
        links: dict[str, Any] = {}
        for packed in self._packed:
            kind = "buffers" if packed.part == self._rest else type(self._chain.parameter_links[0]).__name__
            for state in self._states[packed]:
                for key, value in state.items():
                    into = links.setdefault(kind, {})
                    if _laid_out(value, packed):
                        into.setdefault(key, {}).update(packed.named(value))
                    else:
                        into.setdefault(key, value)
        return links

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there. What another kind of link remembered is left out. Raises AdoptError PL610."""
        self.drop()
        self._turn, self.level, self._since = saved["turn"], saved["level"], 0
        self._pace = Pace(*saved["pace"])
        rows = [float(rows) for rows in saved["rows"]]
        self._rows = rows if len(rows) == self._rest + 1 else [0.0] * (self._rest + 1)
        self._states = {p: self._chain_of(p).init(p.bucket) for p in self._packed}
        self._weight, self._backwards, self._nonfinite = 0.0, 0, 0
        self._put(saved["links"])

    def _put(self, links: dict[str, Any]) -> None:
        for packed in self._packed:
            kind = "buffers" if packed.part == self._rest else type(self._chain.parameter_links[0]).__name__
            for key, value in links.get(kind, {}).items():
                self._states[packed][0][key] = _flat(value, packed) if isinstance(value, dict) else _copy(value)


def _laid_out(value: Any, packed: Packed) -> bool:
    return isinstance(value, Tensor) and value.shape == packed.buffer.tensor.shape


def _flat(named: dict[str, Tensor], packed: Packed) -> Tensor:
    flat = torch.zeros_like(packed.buffer.tensor)
    for name, view in packed.named(flat).items():
        value = named.get(name)
        if value is None or value.shape != view.shape:
            raise AdoptError("PL610", f"it remembers nothing for {name!r}, or for another shape of it")
        view.copy_(value)
    return flat


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _finite(optimizer: Optimizer) -> bool:
    """Is the gradient finite? Looked up in one small one that backward reaches early: NaN spreads."""
    grads = [p.grad for group in reversed(optimizer.param_groups) for p in reversed(group["params"])]
    some = [g for g in grads if g is not None and not g.is_cuda][:4]
    return not some or math.isfinite(float(min(some, key=Tensor.numel).sum()))


def nbytes_sent(request: Request[Any], size: int) -> float:
    """Bytes that a rank sends for a request: a ring's for a sum, to everybody for a gathering."""
    match request:
        case AllReduce(buffer=buffer, header=header):
            return 2 * (size - 1) / size * (buffer.tensor.nbytes + 8 * len(header))
        case AllGather(tensor=tensor):
            return float((size - 1) * tensor.nbytes)
        case Send(tensor=tensor):
            return float(tensor.nbytes)
        case Together(requests=requests):
            return sum(nbytes_sent(each, size) for each in requests)
    return 0.0


async def _sum(buffer: Buffer, header: Sequence[float]) -> list[float]:
    return await AllReduce(buffer, header)
