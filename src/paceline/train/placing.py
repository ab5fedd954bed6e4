"""Which placements a model gets on a mesh, and how they tell that a backward begins and ends.

A model is cut inside its layers first (``tensor``), then into pieces (``fsdp``), or into stages whose blocks are cut (``pipeline``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from paceline.exchange.axes import Mesh
from paceline.group.wire import Wire
from paceline.place.torch_private import after_backward
from paceline.place.torch_private_split import guard_split_numbers
from paceline.train import adopt as adoption
from paceline.train.seams import Seams
from paceline.train.split import Placement, Split, watch

if TYPE_CHECKING:
    from paceline.place.pipeline import Pipeline
    from paceline.place.shard import Sharded
    from paceline.place.shard_deferred import Deferred
    from paceline.place.tensor import TensorParallel
    from paceline.train.stages import Staged

Tell = Callable[..., None]
"""Gets a model's label, the text of where everything is, and a drawing."""

Agree = Callable[[list[float]], list[float]]
"""Gets what this rank has measured; all ranks get what rank 0 has."""

Hold = Callable[[str, nn.Module, Sequence[tuple[str, nn.Parameter]]], None]
"""Gets a model's label, the model, and what this rank holds and trains of it, by label and name."""


@dataclass(frozen=True)
class Group:
    """The ranks of one replica, for torch.

    Attributes:
        mesh: With the axes of the strategy as dimensions, by kind; those of one rank are left out.
        device: Of the model.
    """

    mesh: DeviceMesh
    device: torch.device

    def along(self, kind: str) -> DeviceMesh:
        """The dimension of this axis."""
        names = self.mesh.mesh_dim_names or ()
        return self.mesh if len(names) == 1 else self.mesh[kind]


@dataclass
class Placed:
    """One model with what it was split by.

    Attributes:
        parts: In the order in which they were applied.
    """

    label: str
    model: nn.Module
    parts: list[Placement] = field(default_factory=list)
    sharded: Sharded | None = None
    staged: Staged | None = None

    def close(self) -> None:
        """Nothing more is computed."""
        if self.staged is not None:
            self.staged.pipeline.close()

    def stepped(self) -> None:
        """An optimizer has stepped."""
        if self.sharded is not None:
            self.sharded.stepped()


def place(
    layout: Mesh,
    group: Group,
    label: str,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    split: Split,
    agree: Agree,
    tell: Tell,
    hold: Hold,
    seams: Seams,
    shards: Wire | None = None,
    built: Deferred | None = None,
    cuts: Sequence[str] | None = None,
) -> Placed:
    """Split one model in place.

    Args:
        layout: Where this rank stands.
        group: Of this replica.
        optimizers: Made before; those that hold its parameters go on with the parts.
        split: Hears of backwards.
        agree: What rank 0 has measured.
        tell: Hears where everything is.
        hold: Hears what this rank holds of the model, as soon as that is known.
        seams: Learns how parts go together.
        shards: Between the ranks of an ``fsdp`` axis, where they share memory.
        built: What the model was built in, where each rank has its own rows only.
        cuts: Where other replicas have cut it into stages; known where this one joins them.

    Raises:
        AdoptError: PL5xx, the model cannot be split like this.
    """
    placed = Placed(label, model)
    guard_split_numbers()
    if layout.axis("pipeline") is not None:
        return _into_stages(layout, group, placed, optimizers, split, agree, tell, hold, seams, cuts)
    if layout.axis("tensor") is not None:
        tensor = _cut_inside(layout, group, model, optimizers)
        placed.parts.append(tensor)
        seams.tensors.append(tensor)
        step_on_parts(tensor, optimizers)
    if layout.axis("fsdp") is not None:
        placed.sharded = _shard(layout, group, model, optimizers, split, shards, built)
        placed.parts.append(placed.sharded)
    own = placed.parts[-1].held if placed.parts else adoption.trainable(model, set())
    held = [(f"{label}.{name}", p) for name, p in own]
    hold(label, model, held)
    if placed.sharded is None:
        watch(held, _begin_and_end(split))
    tell(label, "\n".join(part.describe() for part in placed.parts))
    return placed


def step_on_parts(tensor: TensorParallel, optimizers: Sequence[Optimizer]) -> None:
    """Optimizers step on local parts as plain tensors, which is the same and quicker."""
    open_ones: dict[Optimizer, ExitStack] = {}

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stack = open_ones[optimizer] = ExitStack()
        stack.enter_context(tensor.stepping(optimizer))

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        open_ones.pop(optimizer).close()

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def _into_stages(
    layout: Mesh,
    group: Group,
    placed: Placed,
    optimizers: Sequence[Optimizer],
    split: Split,
    agree: Agree,
    tell: Tell,
    hold: Hold,
    seams: Seams,
    cuts: Sequence[str] | None,
) -> Placed:
    """The model is cut at its first forward; what this rank holds is known then."""
    from paceline.place.pipeline import Pipeline
    from paceline.train.stages import Staged

    axis = layout.axis("pipeline")
    assert axis is not None
    label, model = placed.label, placed.model
    inside = _derived(layout, group, model)

    def on_cut(pipeline: Pipeline) -> None:
        staged.cut()
        if inside is not None:
            _cut_blocks(pipeline, inside, optimizers)
            seams.tensors.append(inside)
            step_on_parts(inside, optimizers)
        hold(label, model, [(f"{label}.{name}", p) for name, p in pipeline.held if p.requires_grad])

    def begin() -> None:
        pipeline.unmark()
        split.begin()

    def end() -> None:
        split.end()
        if not told:
            told.append(True)
            tell(label, f"{pipeline.describe()}\n{pipeline.draw()}", pipeline.svg())

    told: list[bool] = []
    settings = axis.settings
    ranks = layout.along("pipeline")
    pipeline = Pipeline(
        group.along("pipeline").get_group(),
        group.device,
        schedule=settings["schedule"],
        microbatches=settings["microbatches"] or 2 * ranks,
        cuts=cuts or settings["cuts"],
        virtual_stages=settings["stages"],
        seed=torch.initial_seed() % 2**32 + layout.replica,
        on_begin=begin,
        on_end=end,
        on_cut=on_cut,
        agree=agree,
    )
    placed.staged = staged = Staged(label, model, optimizers, pipeline, seams)
    pipeline.place(model, optimizers)
    return placed


def _derived(layout: Mesh, group: Group, model: nn.Module) -> TensorParallel | None:
    """The plan by which the blocks of stages will be cut inside, found while the model is whole."""
    if layout.axis("tensor") is None:
        return None
    tensor = _tensor_parallel(layout, group)
    tensor.derive(model)
    return tensor


def _cut_blocks(pipeline: Pipeline, tensor: TensorParallel, optimizers: Sequence[Optimizer]) -> None:
    """Cut the blocks of this rank's stages inside. What is outside of blocks stays whole on every rank that uses it."""
    mine = [stage for stage in pipeline.parts.stages if stage.index in pipeline.stages]
    names = [name for stage in mine for name in pipeline.parts.positions[stage.first : stage.last]]
    tensor.place_modules({name: pipeline.model.get_submodule(name) for name in names}, optimizers)
    now = dict(pipeline.model.named_parameters())
    held = pipeline.setting.held
    for stage, there in held.items():
        held[stage] = [(name, now[name]) for name, _ in there]


def _begin_and_end(split: Split) -> Callable[[], None]:
    def begin() -> None:
        if not split.begun:
            split.begin()
            after_backward(split.end)

    return begin


def _cut_inside(layout: Mesh, group: Group, model: nn.Module, optimizers: Sequence[Optimizer]) -> TensorParallel:
    tensor = _tensor_parallel(layout, group)
    tensor.place(model, optimizers)
    return tensor


def _tensor_parallel(layout: Mesh, group: Group) -> TensorParallel:
    from paceline.place.tensor import TensorParallel

    axis = layout.axis("tensor")
    assert axis is not None
    return TensorParallel(group.along("tensor"), **axis.settings)


def _shard(
    layout: Mesh,
    group: Group,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    split: Split,
    shards: Wire | None,
    built: Deferred | None,
) -> Sharded:
    from paceline.place.shard import Sharded, after_sharded_backward

    axis = layout.axis("fsdp")
    assert axis is not None

    def factor() -> float:
        if not split.begun:
            split.begin()
            after_sharded_backward(split.end)
        return split.factor()

    sharded = Sharded(
        group.along("fsdp"),
        stage=axis.settings["stage"],
        recompute=axis.settings["recompute"],
        precision=_policy(axis.settings["precision"]),
        offload=axis.settings["offload"],
        factor=factor,
        wire=shards,
    )
    sharded.place(model, optimizers, built)
    return sharded


def _policy(precision: str | None) -> MixedPrecisionPolicy | None:
    if precision is None:
        return None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
