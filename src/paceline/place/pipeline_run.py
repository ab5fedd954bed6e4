"""Carries out a schedule on this rank: what is computed, sent and received, action by action.

Torch's own stages want all micro-batches of one shape, known beforehand. Here sizes may differ from micro-batch to micro-batch and
from step to step: what a stage sends in a new situation is announced once by a header (shapes, types, which of it needs gradients).

A backward is torch's too: the whole of it by autograd, or its two halves by ``torch.distributed.pipelining``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from paceline.place.pipeline_schedule import Action, Kind, Schedule
from paceline.place.torch_private_split import input_half, weight_half
from paceline.terms.errors import PeerLost

_DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
]
_DIMS = 10
_WORDS = 3 + _DIMS


# ---- messages -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Form:
    """One tensor of a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    def words(self) -> list[int]:
        """As numbers of a header."""
        return [
            len(self.shape),
            _DTYPES.index(self.dtype),
            int(self.needs_grad),
            *self.shape,
            *([0] * (_DIMS - len(self.shape))),
        ]

    @classmethod
    def read(cls, words: Sequence[int]) -> Form:
        """From numbers of a header."""
        return cls(tuple(words[3 : 3 + words[0]]), _DTYPES[words[1]], bool(words[2]))


class Post:
    """Sends and receives between the ranks of a pipeline. Order is kept between two ranks.

    Args:
        group: The ranks of the pipeline, in the order of its stages.
        device: Of what is computed; messages travel through memory of the host where the group cannot carry this device.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = group.rank(), group.size()
        self.wire = torch.device("cpu") if "gloo" in group.name().lower() else device
        self._sent: list[tuple[Any, Tensor]] = []

    def send(self, t: Tensor, rank: int) -> None:
        """Send a copy or the tensor itself; it must not change before :meth:`settle`."""
        t = t.detach().to(self.wire).contiguous()
        if t.numel():
            with _lost():
                self._sent.append((self.group.send([t], rank, 0), t))

    def receive(self, form: Form, rank: int) -> tuple[Any, Tensor]:
        """A receive under way, and its buffer."""
        buffer = torch.empty(form.shape, dtype=form.dtype, device=self.wire)
        with _lost():
            return (self.group.recv([buffer], rank, 0) if buffer.numel() else None), buffer

    def wait(self, under_way: tuple[Any, Tensor]) -> Tensor:
        """What was received."""
        work, buffer = under_way
        if work is not None:
            with _lost():
                work.wait()
        return buffer.to(self.device)

    def announce(self, forms: Sequence[Form], rank: int) -> None:
        """Send a header."""
        self.send(torch.tensor([w for form in forms for w in form.words()], dtype=torch.int64), rank)

    def hear(self, number: int, rank: int) -> list[Form]:
        """Receive a header for so many tensors."""
        words = self.wait(self.receive(Form((number * _WORDS,), torch.int64, False), rank)).tolist()
        return [Form.read(words[i * _WORDS : (i + 1) * _WORDS]) for i in range(number)]

    def settle(self) -> None:
        """Wait until everything has left."""
        with _lost():
            for work, _ in self._sent:
                work.wait()
        self._sent.clear()

    def total(self, mine: Tensor) -> Tensor:
        """The sum over the ranks of the pipeline."""
        whole = mine.detach().to(self.wire, copy=True)
        with _lost():
            self.group.allreduce([whole]).wait()
        return whole.to(mine.device)

    def share(self, t: Tensor, rank: int) -> Tensor:
        """What `rank` has in a tensor of this shape and type, on all ranks."""
        copy = t.detach().to(self.wire, copy=True).contiguous()
        if copy.numel():
            with _lost():
                self.group.broadcast(copy, rank).wait()
        return copy.to(self.device)


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """What torch says when a peer has gone, as :class:`PeerLost` (PL534)."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition("] ")[2] or str(error)
        raise PeerLost(
            "PL534", f"a rank of the pipeline no longer answers: {str(reason).partition('. ')[0]}"
        ) from error


# ---- tensors that come and go ---------------------------------------------------------------------------------------
@dataclass(eq=False)
class Arrival:
    """A received activation; backward leaves its gradient here."""

    value: Tensor
    grad: Tensor | None = None


class _Arrive(torch.autograd.Function):
    """The received tensor as one that was computed here: it may be changed in place, and its gradient is caught."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrival: Arrival) -> Tensor:
        ctx.arrival = arrival
        return arrival.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        arrival = ctx.arrival
        arrival.grad = grads[0] if arrival.grad is None else arrival.grad + grads[0]
        return torch.zeros(()), None


class _Root(torch.autograd.Function):
    """One number whose backward begins with the gradients of all tensors that a stage has sent."""

    @staticmethod
    def forward(ctx: Any, passage: Passage, *leaving: Tensor) -> Tensor:
        ctx.passage = passage
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        grads = ctx.passage.grads
        return None, *grads


@dataclass(eq=False)
class Passage:
    """One stage's work for one micro-batch, between its forward and its backward.

    Attributes:
        arrivals: What was received and needs a gradient, at its place; None where it needs none.
        anchors: What torch's half backwards take for the inputs.
        leaving: What the forward has left for the next stage; for the last one, what the loss is computed from.
        root: Where backward begins; None where nothing needs a gradient.
        grads: Of those of `leaving` that need one, set before backward.
    """

    arrivals: list[Arrival | None] = field(default_factory=list)
    anchors: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    root: Tensor | None = None
    grads: list[Tensor | None] = field(default_factory=list)
    halves: Any = None

    def arrive(self, values: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
        """Received tensors as the forward may use them."""
        found: list[Tensor] = []
        for value, needed in zip(values, needs_grad, strict=True):
            arrival = Arrival(value) if needed else None
            self.arrivals.append(arrival)
            if arrival is None:
                found.append(value)
            else:
                anchor = torch.zeros((), requires_grad=True)
                self.anchors.append(anchor)
                found.append(_Arrive.apply(anchor, arrival))  # type: ignore[no-untyped-call]
        return found

    def tie(self) -> None:
        """Make the root of what leaves."""
        needing = [t for t in self.leaving if t.requires_grad]
        self.root = _Root.apply(self, *needing) if needing else None  # type: ignore[no-untyped-call]


class Work(Protocol):
    """What the stages of this rank compute."""

    def inputs(self, stage: int, micro: int) -> tuple[Hashable, int]:
        """The situation of what `stage` receives, and how many tensors that is."""

    def forward(self, stage: int, micro: int, passage: Passage, received: Sequence[Tensor]) -> None:
        """Fill ``passage.leaving`` and, for the last stage in parts, ``passage.root``."""

    def before_backward(self, stage: int, micro: int, passage: Passage) -> None:
        """For the last stage: set the gradients of what has left."""

    def weights(self, stage: int) -> Iterator[torch.nn.Parameter]:
        """Parameters that this stage holds and trains."""


class Runner:
    """Carries out schedules of one pipeline on this rank.

    Args:
        post: Its messages.
        schedule: Which rank holds which stage.
        work: What stages compute.
    """

    def __init__(self, post: Post, schedule: Schedule, work: Work) -> None:
        self.post, self.schedule, self.work = post, schedule, work
        self._forms: dict[Hashable, list[Form]] = {}
        self.nbytes: dict[int, int] = {}  # by stage, what it receives for one micro-batch

    def run(self, actions: Sequence[Action], *, gradients: bool) -> None:
        """Do what the schedule says. All ranks of the pipeline call it with their part of the same schedule."""
        self.passages: dict[tuple[int, int], Passage] = {}
        self._gradients = gradients
        self._incoming: dict[tuple[Kind, int, int], tuple[list[Form], list[Any]]] = {}
        self._local: dict[tuple[Kind, int, int], list[Tensor | None]] = {}
        steps = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward_input,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.SEND_FORWARD: self._send_forward,
            Kind.RECEIVE_FORWARD: self._receive_forward,
            Kind.SEND_BACKWARD: self._send_backward,
            Kind.RECEIVE_BACKWARD: self._receive_backward,
        }
        for action in actions:
            steps[action.kind](action.stage, action.micro)
        self.post.settle()
        self.passages.clear()

    # ---- forward ----------------------------------------------------------------------------------------------------
    def _receive_forward(self, stage: int, micro: int) -> None:
        situation, number = self.work.inputs(stage, micro)
        rank = self.schedule.rank_of(stage - 1)
        if situation not in self._forms:
            self._forms[situation] = self.post.hear(number, rank)
        forms = self._forms[situation]
        self.nbytes[stage] = sum(torch.Size(f.shape).numel() * f.dtype.itemsize for f in forms)
        self._incoming[Kind.FORWARD, stage, micro] = forms, [self.post.receive(form, rank) for form in forms]

    def _forward(self, stage: int, micro: int) -> None:
        passage = self.passages[stage, micro] = Passage()
        received: list[Tensor] = []
        if stage:
            local = self._local.pop((Kind.FORWARD, stage, micro), None)
            if local is not None:
                values, needs = (
                    [t.detach() for t in local if t is not None],
                    [bool(t is not None and t.requires_grad) for t in local],
                )
            else:
                forms, under_way = self._incoming.pop((Kind.FORWARD, stage, micro))
                values, needs = [self.post.wait(w) for w in under_way], [f.needs_grad for f in forms]
            received = passage.arrive(values, [self._gradients and needed for needed in needs])
        self.work.forward(stage, micro, passage, received)
        if self._gradients and passage.root is None:
            passage.tie()
        if not self._last(stage) and self.schedule.rank_of(stage + 1) == self.post.rank:
            self._local[Kind.FORWARD, stage + 1, micro] = list(passage.leaving)

    def _send_forward(self, stage: int, micro: int) -> None:
        leaving, rank = self.passages[stage, micro].leaving, self.schedule.rank_of(stage + 1)
        situation, _ = self.work.inputs(stage + 1, micro)
        if situation not in self._forms:
            self._forms[situation] = [Form(tuple(t.shape), t.dtype, t.requires_grad) for t in leaving]
            self.post.announce(self._forms[situation], rank)
        for t in leaving:
            self.post.send(t, rank)
        if not self._gradients:
            del self.passages[stage, micro]

    # ---- backward ---------------------------------------------------------------------------------------------------
    def _receive_backward(self, stage: int, micro: int) -> None:
        situation, _ = self.work.inputs(stage + 1, micro)
        rank = self.schedule.rank_of(stage + 1)
        forms = [form for form in self._forms[situation] if form.needs_grad]
        self._incoming[Kind.BACKWARD, stage, micro] = forms, [self.post.receive(form, rank) for form in forms]

    def _begin_backward(self, stage: int, micro: int) -> Passage:
        passage = self.passages[stage, micro]
        if self._last(stage):
            self.work.before_backward(stage, micro, passage)
        elif (Kind.BACKWARD, stage, micro) in self._local:
            passage.grads = self._local.pop((Kind.BACKWARD, stage, micro))
        else:
            _, under_way = self._incoming.pop((Kind.BACKWARD, stage, micro))
            passage.grads = [self.post.wait(w) for w in under_way]
        return passage

    def _backward(self, stage: int, micro: int) -> None:
        passage = self._begin_backward(stage, micro)
        if passage.root is not None:
            torch.autograd.backward(passage.root)
        self._hand_back(stage, micro, passage)
        self._forget(stage, micro)

    def _backward_input(self, stage: int, micro: int) -> None:
        passage = self._begin_backward(stage, micro)
        if passage.root is not None and passage.anchors:
            passage.halves = input_half(passage.root, passage.anchors, list(self.work.weights(stage)))
        self._hand_back(stage, micro, passage)

    def _backward_weight(self, stage: int, micro: int) -> None:
        passage = self.passages[stage, micro]
        if passage.halves is not None:
            weight_half(passage.halves, list(self.work.weights(stage)))
        elif passage.root is not None:
            torch.autograd.backward(passage.root)
        self._forget(stage, micro)

    def _hand_back(self, stage: int, micro: int, passage: Passage) -> None:
        """Gradients for the stage before; a tensor that no gradient has reached gets zeros."""
        grads: list[Tensor | None] = [
            torch.zeros_like(a.value) if a.grad is None else a.grad for a in passage.arrivals if a is not None
        ]
        for a in passage.arrivals:
            if a is not None:
                a.grad = None
        if stage and self.schedule.rank_of(stage - 1) == self.post.rank:
            self._local[Kind.BACKWARD, stage - 1, micro] = grads
        else:
            self._outgoing = grads

    def _send_backward(self, stage: int, micro: int) -> None:
        for grad in self._outgoing:
            assert grad is not None
            self.post.send(grad, self.schedule.rank_of(stage - 1))
        self._outgoing = []

    def _forget(self, stage: int, micro: int) -> None:
        """Free the graph, but keep what has left: the loss may want it."""
        passage = self.passages[stage, micro]
        passage.root, passage.halves, passage.grads, passage.arrivals = None, None, [], []
        if not self._last(stage):
            passage.leaving = []

    def _last(self, stage: int) -> bool:
        return stage == self.schedule.num_stages - 1
