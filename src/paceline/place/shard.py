"""Sharded data parallelism: every rank holds a part of each parameter, of its gradient and of the optimizer's state.

1. ``place`` cuts the model into units (``shard_units``), gives them to torch's ``fully_shard``, and lets the optimizers go on with
   the parts (``rewire``). Model, optimizers, names and classes stay what they are for the script.
2. A unit is gathered when its forward begins. When it is freed again is the stage: after forward, and gathered once more for
   backward (3); after backward (2); after the optimizer's step (1).
3. In backward each unit's gradients are multiplied by this rank's factor and summed: every rank gets its part of the sum.
4. When backward has ended, parameters that no rank has used get back the None that they had.
5. After the step every unit is freed, so that nobody computes with what was gathered before it.

The method is ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), the mechanism PyTorch FSDP (Zhao et al. 2023, arXiv:2304.11277).
Gradients and the optimizer's state are split in all stages.

[Note: what the script sees] Between calls of the model its modules hold the parts, even where the whole is still in memory: what the
script clips, zeroes or reads must be what the optimizer steps on. ``fully_shard`` alone would show whatever is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from paceline.group.wire import Wire
from paceline.place import shard_check, shard_step, shard_torch
from paceline.place import shard_comm as comms
from paceline.place.recompute import recompute, wanted
from paceline.place.rewire import rewire
from paceline.place.shard_deferred import Deferred
from paceline.place.shard_torch import after_sharded_backward
from paceline.place.shard_units import Unit, composite, part_of, units_of
from paceline.terms.errors import StepError

__all__ = ["Sharded", "after_sharded_backward"]


class Sharded:
    """One model, split over the ranks of a mesh.

    Args:
        mesh: One dimension; the ranks that share one copy of the model.
        stage: 1, 2 or 3; see above.
        recompute: ``blocks``: activations of blocks are computed again in backward; ``none``; ``auto``: for large models.
        precision: In which type the model computes, and in which gradients are summed. None: in its own.
        offload: Keep the parts in the memory of the CPU.
        factor: How this rank's gradient enters the sum: its rows, divided by those of the global batch. Asked once in each backward,
            when the first unit has its gradients; on a mesh of one rank too. Zero erases the payload, even where it holds NaN.
        wire: What joins exactly these ranks, with memory that they share. None: torch's collectives on the mesh's group.

    Attributes:
        held: Names and parts of the parameters that get gradients, tied ones under their first name.
        units: What is gathered together; the root comes last.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        stage: int = 3,
        recompute: str = "auto",
        precision: MixedPrecisionPolicy | None = None,
        offload: bool = False,
        factor: Callable[[], float],
        wire: Wire | None = None,
    ) -> None:
        shard_check.request(mesh, stage, offload)
        self.mesh, self.stage = mesh, stage
        self.held: list[tuple[str, nn.Parameter]] = []
        self._params: list[tuple[str, nn.Parameter]] = []
        self.units: list[Unit] = []
        self._recompute, self._precision, self._offload = recompute, precision, offload
        self._ask = factor
        shares = wire is not None and mesh.size() > 1
        self._comm: comms.Comm = comms.WireComm(wire) if shares and wire else comms.TorchComm(mesh.get_group())
        self._steps: list[shard_step.LocalStep] = []
        self._recomputed: tuple[nn.Module, ...] = ()
        self._running = 0  # calls of units that have begun and not ended
        self._open: int | None = None  # the backward that runs
        self._factor: float | None = None
        self._had: list[bool] = []
        self._arrived: list[bool] = []

    # ---- placement --------------------------------------------------------------------------------------------------
    def place(self, model: nn.Module, optimizers: Sequence[Optimizer] = (), deferred: Deferred | None = None) -> None:
        """Split `model` where it is, and let `optimizers` go on with its parts. All ranks call it together.

        Args:
            deferred: What the model was built in, where it is larger than this process's memory.

        Raises:
            AdoptError: PL551 for a parameter that cannot be split, PL552 for types that cannot be gathered together, PL553 for a
                precision that changes more than was asked for, PL555 for an optimizer that needs whole parameters.
            UsageError: PL550 for an unknown word for `recompute`.
        """
        again = wanted(self._recompute, model)
        policy = shard_check.precision(self._precision, model)
        for optimizer in optimizers:
            shard_step.check(optimizer)
        inner = units_of(model)
        self.units = [*inner, Unit("", (model,), False)]
        shard_check.model(model, self.units)
        before = dict(model.named_parameters(remove_duplicate=False))
        for p in before.values():
            if not p.is_contiguous() and not p.is_meta:
                p.data = p.data.contiguous()
        if again:
            self._recomputed = tuple(m for u in inner if u.block for m in u.modules if composite(m))
            recompute(model, self._recomputed)
        for unit in self.units:
            if deferred is not None:
                deferred.restore(unit.modules)
            self._split(unit, policy)
        self._root = model
        shard_torch.initialise(model)
        self._prepare(model)
        after = dict(model.named_parameters(remove_duplicate=False))
        change: dict[nn.Parameter, nn.Parameter | None] = {old: after[name] for name, old in before.items()}
        for optimizer in optimizers:
            rewire(optimizer, change, lambda p, whole: self.cut(p, whole))
            mine = [p for p in dict.fromkeys(after.values()) if p.requires_grad]
            self._steps.append(shard_step.LocalStep(optimizer, mine, self.stepped))

    def _split(self, unit: Unit, policy: MixedPrecisionPolicy) -> None:
        name = unit.name or "the root"
        for module in unit.modules:
            module.register_forward_hook(_own_views)
        # A root stays gathered between forward and backward, which begins with it; torch's default (None) says so.
        free = None if self.stage == 3 else False
        offload = CPUOffloadPolicy() if self._offload else OffloadPolicy()
        given: Any = unit.modules[0] if len(unit.modules) == 1 else list(unit.modules)
        fully_shard(given, mesh=self.mesh, reshard_after_forward=free, mp_policy=policy, offload_policy=offload)
        head = cast(FSDPModule, unit.modules[0])
        head.set_gradient_divide_factor(1.0)
        head.set_force_sum_reduction_for_comms(True)
        head.set_reduce_scatter_unused_params(True, recurse=False)
        head.set_reshard_after_backward(self.stage != 1, recurse=False)
        head.set_custom_reduce_scatter(self._comm.reduce(name, self._current_factor))  # type: ignore[arg-type]
        if (gather := self._comm.gather(name)) is not None:
            head.set_custom_all_gather(gather)  # type: ignore[arg-type]
        if self.mesh.size() == 1:  # nothing is gathered or summed, but weighed
            head.set_all_reduce_hook(lambda payload: comms.weigh(payload, self._current_factor()))
        for module in unit.modules:
            module.register_forward_pre_hook(self._before_forward, prepend=True)
            module.register_forward_hook(self._after_forward, always_call=True)

    def _prepare(self, model: nn.Module) -> None:
        """Gather each unit once: what backward accumulates into exists from then on, and can say that a gradient came."""
        self._comm.reserve(max(_gathered_nbytes(unit, self.mesh.size()) for unit in self.units))
        self._params = list(model.named_parameters())
        self.held = [(name, p) for name, p in self._params if p.requires_grad]
        index = {p: i for i, (_, p) in enumerate(self._params)}
        self._arrived = [False] * len(self._params)
        for unit in self.units:
            head = cast(FSDPModule, unit.modules[0])
            head.unshard()
            for part, leaf in shard_torch.leaves(unit.modules[0]):
                leaf.requires_grad_(True)  # one that is frozen may thaw
                leaf.register_post_accumulate_grad_hook(self._marker(index[part]))  # type: ignore[no-untyped-call]
                leaf.requires_grad_(part.requires_grad)
            head.reshard()

    def _marker(self, i: int) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            self._arrived[i] = True

        return arrived

    # ---- forward ----------------------------------------------------------------------------------------------------
    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self._running == 0 and shard_torch.graph() == -1:
            self._recover()
        self._running += 1
        shard_torch.show_whole(module)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running -= 1
        if self._running or shard_torch.graph() != -1:
            return
        self._show_shards()
        if torch.is_grad_enabled():
            for tensor in shard_torch.grad_tensors(output):
                tensor.register_hook(self._begin)  # type: ignore[no-untyped-call]

    def _recover(self) -> None:
        """A forward or a backward before this one has failed; torch keeps what it had begun."""
        if self._open is not None or shard_torch.broken(self._root):
            self._open = self._factor = None
            cast(FSDPModule, self._root).reset_iter_state()
            for unit in self.units:
                for _, leaf in shard_torch.leaves(unit.modules[0]):
                    leaf.grad = None  # never summed

    def _show_shards(self) -> None:
        for unit in self.units:
            shard_torch.show_shards(unit.modules[0])

    # ---- backward ---------------------------------------------------------------------------------------------------
    def _begin(self, gradient: Tensor | None = None) -> None:
        """A backward has reached this model."""
        if self._open is not None:
            return
        self._open = shard_torch.graph()
        self._had = [p.grad is not None for _, p in self._params]
        self._arrived[:] = [False] * len(self._params)
        for unit in self.units:
            shard_torch.show_whole(unit.modules[0])  # for blocks that are computed again
        for step in self._steps:
            step.be_last()
        shard_torch.closing(self._close)

    def _current_factor(self) -> float:
        self._begin()
        if shard_torch.graph() != self._open:
            raise StepError(
                "PL556",
                "a backward pass runs inside another one, so gradients of a sharded model are summed before they are complete",
                help="this happens with reentrant activation checkpointing: use torch.utils.checkpoint(..., use_reentrant=False).",
            )
        if self._factor is None:
            self._factor = self._ask()
        return self._factor

    def _close(self) -> None:
        """Every unit's gradients are summed. Those that no rank has computed are none."""
        self._open = self._factor = None
        self._show_shards()
        for unit in self.units:
            for part, leaf in shard_torch.leaves(unit.modules[0]):
                if leaf.grad is not None:
                    name = next(name for name, p in self._params if p is part)
                    raise StepError("PL556", f"a gradient of {name!r} came after those of its unit had been summed")
        used = torch.tensor(self._arrived, dtype=torch.float32, device=self.mesh.device_type)
        if self.mesh.size() > 1:
            used = self._comm.count(used)
        for (_, p), had, ranks in zip(self._params, self._had, used.tolist(), strict=True):
            if not had and ranks == 0:
                p.grad = None

    def stepped(self) -> None:
        """After ``opt.step()``: free what was gathered before it. Runs by itself after a step with hooks."""
        for unit in self.units:
            cast(FSDPModule, unit.modules[0]).reshard()

    def stepping(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Around a step without hooks: see :mod:`paceline.place.shard_step`. Raises KeyError for another optimizer."""
        for step in self._steps:
            if step.optimizer is optimizer:
                return step.stepping()
        raise KeyError("this optimizer was not placed with the model")

    # ---- state ------------------------------------------------------------------------------------------------------
    @staticmethod
    def whole(tensor: Tensor) -> Tensor:
        """All of a parameter, a gradient or a tensor of the optimizer's state. All ranks of the mesh call it together."""
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        with torch.no_grad():
            whole: Tensor = tensor.full_tensor()
            return whole.detach()

    @staticmethod
    def cut(p: Tensor, whole: Tensor) -> Tensor:
        """This rank's part of `whole`, split as `p` is. Speaks with nobody; ``whole`` is not shared."""
        if not isinstance(p, DTensor):
            return whole
        assert whole.shape == p.shape, f"{tuple(whole.shape)} is not {tuple(p.shape)}"
        low, rows = part_of(p.shape[0], p.device_mesh.size(), p.device_mesh.get_local_rank())
        return shard_step.split_like(p, whole.detach()[low : low + rows].clone(memory_format=torch.contiguous_format))

    def load(self, name_to_whole: Callable[[str], Tensor]) -> None:
        """Overwrite all parameters, one after the other, with what `name_to_whole` gives for their names. Speaks with nobody."""
        with torch.no_grad():
            for name, p in self._root.named_parameters():
                assert isinstance(p, DTensor)
                part = self.cut(p, name_to_whole(name).to(dtype=p.dtype))
                assert isinstance(part, DTensor)
                shard_torch.local(p).copy_(shard_torch.local(part))
        self.stepped()

    def describe(self) -> str:
        """A table: for each unit its parameters, their bytes whole and on this rank, and how often they travel in a step."""
        gathers = {3: "forward, backward", 2: "forward", 1: "once a step"}[self.stage]
        rows = [("unit", "parameters", "bytes", "bytes per rank", "gathered", "gradients summed")]
        for unit in self.units:
            params = shard_torch.parts(unit.modules[0])
            if not params:
                continue
            held = sum(shard_torch.local(p).nbytes for p in params if isinstance(p, DTensor))
            last = "forward" if unit is self.units[-1] and self.stage == 3 else gathers
            count = sum(p.numel() for p in params)
            whole = sum(p.numel() * p.element_size() for p in params)
            rows.append((unit.name or "(root)", f"{count:,}", f"{whole:,}", f"{held:,}", last, "each backward"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        again = f"activations are computed again in {len(self._recomputed)} blocks" if self._recomputed else ""
        return "\n".join([*lines, *([again] if again else [])])


def _own_views(module: nn.Module, args: Any, output: Any) -> Any:
    return shard_torch.own_views(output) if torch.is_grad_enabled() else output


def _gathered_nbytes(unit: Unit, size: int) -> int:
    parts = shard_torch.parts(unit.modules[0])
    return sum(size * part_of(p.shape[0], size, 0)[1] * p.shape[1:].numel() * p.element_size() for p in parts)
