"""The axes of a model that is split over ranks: inside a replica, before any exchange between replicas. Pure; imports no torch.

    fsdp(stage=3)                  parameters, gradients and optimizer state in pieces; each rank reads rows of its own
    ddp(2)                         whole copies that step together, where something else follows between replicas
    tensor(2)                      layers cut inside; all ranks of the axis read the same rows
    pipeline(2, microbatches=4)    layers in stages; all ranks of the axis read the same rows

A product nests them, left inside, right outside: in ``pipeline(2) * tensor(2) * ddp(2)`` neighbouring ranks are stages of one
pipeline. What stands last may be an exchange between replicas, with its codec, its cadence and its merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from paceline.exchange.arguments import one_of, spell, whole
from paceline.terms.errors import UsageError

Kind = Literal["fsdp", "tensor", "pipeline", "ddp"]

MOST_RANKS = 4096
MOST_MICROBATCHES = 4096
SCHEDULES = ("gpipe", "1f1b", "interleaved", "loopedbfs", "zero_bubble", "interleaved_zero_bubble")
RECOMPUTE = ("none", "auto", "blocks")
PRECISIONS = ("bf16", "fp16")
BUILDS = ("whole", "parts")
HOW = ("column", "row", "vocab", "replicate")


@dataclass(frozen=True, slots=True)
class Axis:
    """One way to split a model.

    Attributes:
        kind: Which.
        ranks: Over how many; None: over those that the other factors leave.
        settings: Of the placement, by name.
        text: Canonical.
        about: What it says of itself in ``describe()``.
    """

    kind: Kind
    ranks: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    about: str = ""

    @property
    def reads(self) -> bool:
        """Each rank of the axis reads rows of its own."""
        return self.kind in ("fsdp", "ddp")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where a rank stands in a product: coordinates, innermost axis first.

    Attributes:
        axes: The axes, each with its number of ranks.
        replicas: How many copies of the model there are.
        rank: Among all.
    """

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]
    replicas: int
    rank: int

    @property
    def inner(self) -> int:
        """Ranks of one replica."""
        return prod(self.sizes)

    @property
    def size(self) -> int:
        """All ranks."""
        return self.inner * self.replicas

    @property
    def replica(self) -> int:
        """Which copy of the model this rank is a part of."""
        return self.rank // self.inner

    def among(self, rank: int, size: int) -> Mesh:
        """The same axes for another rank of another world, of whole replicas."""
        return replace(self, rank=rank, replicas=size // self.inner)

    @property
    def part(self) -> int:
        """Which part of a replica this rank is."""
        return self.rank % self.inner

    def where(self, kind: Kind) -> int:
        """The coordinate along the axis of this kind; 0 where there is none."""
        below = 1
        for axis, size in zip(self.axes, self.sizes, strict=True):
            if axis.kind == kind:
                return self.rank // below % size
            below *= size
        return 0

    def along(self, kind: Kind) -> int:
        """How many ranks the axis of this kind has; 1 where there is none."""
        return next((n for axis, n in zip(self.axes, self.sizes, strict=True) if axis.kind == kind), 1)

    def axis(self, kind: Kind) -> Axis | None:
        """The axis of this kind, where it has more than one rank."""
        return next((a for a, n in zip(self.axes, self.sizes, strict=True) if a.kind == kind and n > 1), None)

    def _places(self) -> Iterator[tuple[Axis, int, int]]:
        """Each axis with its size and the coordinate along it."""
        for axis, size in zip(self.axes, self.sizes, strict=True):
            yield axis, size, self.where(axis.kind)

    @property
    def reading(self) -> int:
        """Into how many parts a replica's share of each batch is cut."""
        return prod(size for axis, size, _ in self._places() if axis.reads)

    @property
    def reader(self) -> int:
        """Which of the parts of each batch this rank reads."""
        number, below = 0, 1
        for axis, size, place in self._places():
            if axis.reads:
                number, below = number + below * place, below * size
        return number + below * self.replica

    @property
    def readers(self) -> int:
        """Into how many parts each batch is cut."""
        return self.reading * self.replicas

    @property
    def leads(self) -> bool:
        """First of the ranks that read the same rows: it counts them."""
        return all(place == 0 for axis, _, place in self._places() if not axis.reads)

    def groups(self, kind: Kind) -> list[list[int]]:
        """All ranks, by groups whose ranks differ in the coordinate along this axis only."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            there = replace(self, rank=rank)
            key = (there.replica, *(place for axis, _, place in there._places() if axis.kind != kind))
            found.setdefault(key, []).append(rank)
        return list(found.values())

    def describe(self) -> str:
        """One line a factor."""
        lines = [
            f"  {axis.kind:<9} {size} ranks: {axis.about}" for axis, size in zip(self.axes, self.sizes, strict=True)
        ]
        lines.append(f"  replicas  {self.replicas}")
        return "\n".join(lines)


def mesh(axes: tuple[Axis, ...], outer: int | None, size: int, rank: int, text: str) -> Mesh:
    """Lay `size` ranks out.

    Args:
        outer: How many replicas the strategy asks for; None: as many as there are.

    Raises:
        UsageError: PL211, the factors do not make `size`.
    """
    given = prod(axis.ranks for axis in axes if axis.ranks is not None)
    given *= outer or 1
    free = sum(axis.ranks is None for axis in axes)
    if size % given or (not free and outer is not None and given != size):
        raise UsageError(
            "PL211",
            f"{text}: its factors make {given} ranks, and {size} {'was' if size == 1 else 'were'} started",
            help=f"start a multiple of {given} with -n, or write other numbers."
            if not outer
            else f"start {given} with -n {given}.",
        )
    rest = size // given
    sizes = tuple(axis.ranks if axis.ranks is not None else rest for axis in axes)
    replicas = outer if outer is not None else (1 if free else rest)
    return Mesh(axes, sizes, replicas, rank)


def refuse_odd(axes: tuple[Axis, ...], text: str) -> None:
    """Raise UsageError PL212 for axes that do not go together."""
    kinds = [axis.kind for axis in axes]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        raise UsageError("PL212", f"{text}: {twice} stands twice", help="one factor of a kind; give it more ranks.")
    if "fsdp" in kinds and "pipeline" in kinds:
        message = (
            f"{text}: a stage whose parameters come and go with every micro-batch would gather them again each time"
        )
        help = "pipeline(k) * tensor(m) * ddp() splits what fsdp would; fsdp(k) * ddp(m) needs no pipeline."
        raise UsageError("PL212", message, help=help)
    if "fsdp" in kinds and "tensor" in kinds:
        message = f"{text}: pieces of parts are not held by this version"
        help = "tensor(k) * ddp(m) splits the large matrices, fsdp(k) * ddp(m) everything."
        raise UsageError("PL212", message, help=help)
    if sum(axis.ranks is None for axis in axes) > 1:
        raise UsageError("PL212", f"{text}: two factors have no number of ranks", help="give one of them its number.")


# ---- the recipes ----------------------------------------------------------------------------------------------------
def _ranks(recipe: str, ranks: object) -> int | None:
    return None if ranks is None else whole(recipe, "ranks", ranks, MOST_RANKS)


def fsdp(
    ranks: int | None = None,
    *,
    stage: int = 3,
    recompute: str = "none",
    precision: str | None = None,
    build: str = "whole",
    offload: bool = False,
) -> Axis:
    """Sharded data parallelism (ZeRO, FSDP): parameters, gradients, optimizer state in pieces.

    Each rank reads its rows of the batch, as with ``ddp()``, and the numbers are the same. Parameters are gathered block by block
    when they are needed; gradients are reduced to the piece that a rank keeps. It wins where the model, its gradient and the
    optimizer's state do not fit on one rank; it costs 1.5 times the bytes of ``ddp()`` (stage 3).
    Rajbhandari et al., 1910.02054; Zhao et al., 2304.11277.

    Args:
        ranks: Over how many; all that the other factors leave by default.
        stage: How long gathered parameters are kept: 3: for the forward of their block, gathered again in backward; 2: from forward to
            the end of backward; 1: until the optimizer steps. Gradients and optimizer state are in pieces in all of them.
        recompute: ``blocks``: activations of each block are computed again in backward; ``auto``: the same where the model has
            blocks.
        precision: ``bf16`` or ``fp16``: compute and reduce in it, keep the pieces as they are. Changes the numbers.
        build: ``parts``: while the script builds its model, each rank keeps its own rows of large parameters only. The start values are
            those of the plain program, bit for bit; what they are cannot be read before ``job.adopt``. For models that are larger than
            one process's memory.
        offload: Pieces, and the optimizer's state, lie in the memory of the processor while an accelerator computes. On processors they
            lie there anyway, and it is refused (PL554).

    Raises:
        UsageError: PL203, an argument has a value that it cannot have.
    """
    whole("fsdp", "stage", stage, 3)
    if not isinstance(offload, bool):
        raise UsageError("PL203", f"fsdp: offload={offload!r} cannot be", help="it is True or False.")
    one_of("fsdp", "recompute", recompute, RECOMPUTE)
    if precision is not None:
        one_of("fsdp", "precision", precision, PRECISIONS)
    one_of("fsdp", "build", build, BUILDS)
    given = {"stage": stage, "recompute": recompute, "precision": precision, "build": build, "offload": offload}
    text = spell(fsdp, ranks=_ranks("fsdp", ranks), **given)
    kept = {3: "for its block", 2: "for one forward and backward", 1: "until the optimizer steps"}[stage]
    about = f"parameters, gradients and optimizer state in pieces; a parameter is gathered {kept}"
    return Axis("fsdp", ranks, given, text, about)


def tensor(ranks: int | None = None, *, plan: str | None = None, loss_parallel: bool = False) -> Axis:
    """Tensor parallelism: every rank computes a part of each layer.

    All ranks of the axis read the same rows. Attention is cut by heads, feed-forward layers by features, vocabularies by words; what
    cannot be cut stays whole, and is listed (``--explain``). It wins inside a host, where an all-reduce for each layer is cheap, and
    for layers too large for one rank. Shoeybi et al., 1909.08053.

    Args:
        ranks: Over how many; all that the other factors leave by default.
        plan: What the derived plan gets wrong, by name patterns: ``"blocks.*.fc=column, head=replicate"``; column, row, vocab,
            replicate.
        loss_parallel: Keep the logits cut by words until the loss.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have.
    """
    if not isinstance(loss_parallel, bool):
        raise UsageError("PL203", f"tensor: loss_parallel={loss_parallel!r} cannot be", help="it is True or False.")
    given = _patterns(plan)
    text = spell(tensor, ranks=_ranks("tensor", ranks), plan=plan, loss_parallel=loss_parallel)
    about = "matrices cut inside their layers"
    return Axis("tensor", ranks, {"plan": given, "loss_parallel": loss_parallel}, text, about)


def _patterns(plan: object) -> dict[str, str]:
    """``"a=row, b.*=column"`` by pattern."""
    if plan is None:
        return {}
    pairs = [part.strip().rpartition("=") for part in plan.split(",")] if isinstance(plan, str) else [("", "", "")]
    wrong = [f"{name}={how}" for name, _, how in pairs if not name.strip() or how.strip() not in HOW]
    if wrong:
        said = f"it is a text such as 'blocks.*.fc=column, head=replicate', of {', '.join(HOW)}."
        raise UsageError("PL203", f"tensor: plan={plan!r} cannot be", help=said)
    return {name.strip(): how.strip() for name, _, how in pairs}


def pipeline(
    ranks: int | None = None,
    *,
    schedule: str = "1f1b",
    microbatches: int | None = None,
    cuts: str | None = None,
    stages: int = 2,
) -> Axis:
    """Pipeline parallelism: layers in stages, batches in micro-batches.

    All ranks of the axis read the same rows. ``loss.backward()`` runs the whole schedule; the loss has its value afterwards. The model
    is cut where measured times balance. It wins across slow links, because only activations at the cuts are sent; it loses the
    time in which stages wait for each other, ``(ranks - 1) / (microbatches + ranks - 1)`` of a step with ``gpipe`` and ``1f1b``.
    Huang et al., 1811.06965; Narayanan et al., 2104.04473; Qi et al., 2401.10241.

    Args:
        ranks: Over how many; all that the other factors leave by default.
        schedule: ``gpipe``: all forwards, then all backwards, and the loss sees the whole batch at once; ``1f1b``: the same in less
            memory; ``interleaved``, ``loopedbfs``, ``zero_bubble``, ``interleaved_zero_bubble``: several stages on each rank, less
            waiting.
        microbatches: Into how many parts each replica's batch is cut; twice the number of ranks by default.
        cuts: Where to cut, as the names of the blocks that begin a stage: ``"blocks.2, blocks.5"``; measured by default.
        stages: On each rank, where the schedule has several.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have.
    """
    schedule = one_of("pipeline", "schedule", schedule, SCHEDULES)
    if microbatches is not None:
        whole("pipeline", "microbatches", microbatches, MOST_MICROBATCHES)
    if not (cuts is None or (isinstance(cuts, str) and all(part.strip() for part in cuts.split(",")))):
        raise UsageError("PL203", f"pipeline: cuts={cuts!r} cannot be", help="a text such as 'blocks.2, blocks.5'.")
    whole("pipeline", "stages", stages, 64)
    given = {"schedule": schedule, "microbatches": microbatches, "cuts": cuts, "stages": stages}
    text = spell(pipeline, ranks=_ranks("pipeline", ranks), **given)
    names = tuple(part.strip() for part in cuts.split(",")) if cuts else None
    about = f"layers in stages, {schedule}" + (f", {microbatches} micro-batches" if microbatches else "")
    return Axis("pipeline", ranks, {**given, "cuts": names}, text, about)


AXES: dict[str, Callable[..., Axis]] = {"fsdp": fsdp, "tensor": tensor, "pipeline": pipeline}
