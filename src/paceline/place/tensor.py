"""Tensor parallelism: layers of an unchanged model are split over the ranks of a group, which all see the same batch.

1. The plan is derived by trials on the meta device (:mod:`paceline.place.tensor_plan`), the same on every rank; the user may
   overrule it by name patterns.
2. Every parameter becomes a DTensor on the group's mesh, cut or whole; names, identity and classes of the modules stay.
3. While a module of the model runs, functions of torch are watched: a parameter counts as the part that this rank holds, and
   activations that come from it are :class:`Split`: whole to the model, a part in memory. What leaves the outermost
   module is plain again, on every rank. So outside the model, and at the borders of pipeline stages, everything is ordinary.
4. Backward leaves a gradient of the parameter's own kind, complete: what torch clips and steps with.

Random numbers: the ranks of a group have generators in the same state. A mask for a split activation is drawn whole by each
and cut, so a model has the masks that one process draws, and the generators stay in step.

[Note: the order of fused features] Where queries, keys and values come from one weight, a rank holds its heads of each
(note on segments in :mod:`paceline.place.tensor_split`), so ``full_tensor()`` of that DTensor has the rows in another
order. :meth:`TensorParallel.whole` and :meth:`TensorParallel.cut` know the right one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from paceline.place import tensor_products, tensor_rules
from paceline.place.rewire import rewire
from paceline.place.tensor_plan import RETURNED, Plan, Way, derive
from paceline.place.tensor_split import METADATA, NotLocal, Split, apply, made_whole
from paceline.place.tensor_table import table
from paceline.place.tensor_wire import Group
from paceline.terms.errors import StepError

__all__ = ["TensorParallel", "tensor_products", "tensor_rules"]

_BY_POSITION = tuple(
    getattr(torch.optim, name)
    for name in ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop"]
    if hasattr(torch.optim, name)
)


class TensorParallel:
    """One model split inside its layers.

    Args:
        mesh: The ranks of the group: a mesh of one axis, or that axis of a larger mesh.
        plan: By pattern of a parameter's or module's name ("blocks.*.up", "*.qkv.weight"): "column" (cut by outputs), "row" (cut
            by inputs), "vocab" (cut by words), "replicate". What no pattern fits is derived.
        loss_parallel: The model's output keeps its vocabulary split; ``F.cross_entropy`` of it needs no rank to hold whole
            rows. Other functions still work on it, by making it whole.

    Attributes:
        plan: The way of each parameter, once derived.
    """

    def __init__(self, mesh: DeviceMesh, *, plan: Mapping[str, str] | None = None, loss_parallel: bool = False) -> None:
        self.mesh, self.loss_parallel = mesh, loss_parallel
        self.group = Group(mesh.get_group())
        self.plan: Plan = {}
        self._ways: Plan = {}  # the same, with the later names of tied parameters
        self._overrides = dict(plan or {})
        self._roots: list[tuple[str, nn.Module]] = []
        self._copies: list[tuple[str, nn.Module]] = []
        self._paths: dict[int, str] = {}
        self._known: dict[int, tuple[Tensor, str, Way]] = {}
        self._running = threading.local()

    # ---- placing ----------------------------------------------------------------------------------------------------
    def place(self, model: nn.Module, optimizers: Sequence[Optimizer] = (), example: Any = None) -> None:
        """Split `model` in place and let its optimizers go on with the parts. Ranks hold equal parameters before.

        Args:
            example: A batch as the loader makes it, where inputs cannot be guessed from the layers.

        Raises:
            UsageError: PL540 to PL543, see :func:`paceline.place.tensor_plan.derive`.
        """
        self.derive(model, example)
        self.place_modules({"": model}, optimizers)

    def derive(self, model: nn.Module, example: Any = None) -> Plan:
        """Derive the plan of the whole model, which may be on the meta device, without placing anything."""
        self.plan = derive(model, self.group.num, self._overrides, example)
        first = {id(p): name for name, p in model.named_parameters()}
        every = model.named_parameters(remove_duplicate=False)
        self._ways = {name: self.plan[first[id(p)]] for name, p in every}
        return self.plan

    def place_modules(self, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer] = ()) -> None:
        """Split these parts of a model, by their names in the model that the plan was derived from.

        Each may be called by itself: it takes and gives plain tensors, equal on all ranks, and their gradients are too.
        """
        change: dict[nn.Parameter, nn.Parameter] = {}
        for path, root in modules.items():
            for prefix, module in root.named_modules(prefix=path):
                for name, p in list(module._parameters.items()):
                    if p is not None and not isinstance(p, DTensor):
                        if p not in change:
                            change[p] = self._distributed(p, self._ways[_name(prefix, name)])
                        setattr(module, name, change[p])
                self._watch(module, prefix)
            self._roots.append((path, root))
        for optimizer in optimizers:
            rewire(optimizer, change, lambda new, whole: self._part(whole, self._way(new)[1]))

    @property
    def held(self) -> list[tuple[str, nn.Parameter]]:
        """Original names and the DTensor parameters of what was placed, in the model's order; tied ones once."""
        first: dict[int, tuple[str, nn.Parameter]] = {}
        for path, root in self._roots:
            for name, p in root.named_parameters(prefix=path):
                first.setdefault(id(p), (name, p))
        return list(first.values())

    def _distributed(self, p: nn.Parameter, way: Way) -> nn.Parameter:
        return nn.Parameter(self._part(p.detach(), way), requires_grad=p.requires_grad)

    def _part(self, whole: Tensor, way: Way) -> DTensor:
        """A tensor that all ranks have, as they hold it from now on: a copy."""
        local, placement = whole, cast(Placement, Replicate())
        if way.dim is not None:
            local, placement = way.layout(self.group.num).cut(whole, way.dim, self.group.rank), Shard(way.dim)
        local = local.detach().clone(memory_format=torch.contiguous_format)
        stride = torch.empty(whole.shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [placement], run_check=False, shape=whole.shape, stride=stride)

    # ---- whole and part ---------------------------------------------------------------------------------------------
    def whole(self, value: Tensor, like: Tensor | None = None) -> Tensor:
        """The whole tensor, in the order of the user's model (collective over the mesh).

        Args:
            value: A parameter, its gradient, or state of an optimizer that is held as the parameter is.
            like: The parameter, where `value` is something else.
        """
        if not isinstance(value, DTensor):
            return value
        way = self._way(like if like is not None else value)[1]
        if value.device_mesh != self.mesh:  # another room has split it further, along other axes
            value = cast(DTensor, value.detach()).redistribute(placements=self._only_mine(value))
        local = value._local_tensor.detach()
        return local.clone() if way.dim is None else self.group.gathered(local, way.dim, way.layout(self.group.num))

    def cut(self, p: Tensor, whole: Tensor) -> DTensor:
        """`whole`, which has the shape of the whole of `p`, held as `p` is. Every rank passes the same."""
        part = self._part(whole, self._way(p)[1])
        if not isinstance(p, DTensor) or p.device_mesh == self.mesh:
            return part
        mine = self._only_mine(p)
        return DTensor.from_local(
            part._local_tensor, p.device_mesh, mine, run_check=False, shape=part.shape, stride=part.stride()
        ).redistribute(placements=p.placements)

    def _only_mine(self, value: DTensor) -> list[Placement]:
        """Placements of a tensor on a larger mesh, whole along the axes of others."""
        names, mine = value.device_mesh.mesh_dim_names, self.mesh.mesh_dim_names
        assert names is not None
        assert mine is not None
        return [each if name == mine[0] else Replicate() for name, each in zip(names, value.placements, strict=True)]

    def _way(self, p: Tensor) -> tuple[str, Way]:
        """Name and way of a parameter of this mesh.

        Raises:
            StepError: PL544 for another tensor.
        """
        found = self._found(p)
        if found is None:
            raise StepError("PL544", "a DTensor of the tensor group that is no parameter of the model")
        return found[1], found[2]

    def _found(self, p: Tensor) -> tuple[Tensor, str, Way] | None:
        found = self._known.get(id(p))
        if found is not None and found[0] is p:
            return found
        self._known = {}  # another room has put other objects in the place of parameters: unsharded ones
        for path, root in (*self._roots, *self._copies):
            for prefix, module in root.named_modules(prefix=path):
                for name, each in module._parameters.items():
                    if each is not None:
                        full = _name(prefix, name)
                        self._known.setdefault(id(each), (each, full, self._ways[full]))
        return self._known.get(id(p))

    @contextmanager
    def stepping(self, optimizer: Optimizer) -> Iterator[None]:
        """Inside, `optimizer` sees the parts as plain tensors: the same numbers, without DTensor's costs per parameter.

        Does nothing for optimizers that may look at a parameter as a whole; those step on DTensors.
        """
        if type(optimizer) not in _BY_POSITION:
            yield
            return
        held: list[tuple[nn.Parameter, nn.Parameter]] = []
        groups = [list(group["params"]) for group in optimizer.param_groups]
        try:
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [self._undressed(p, held) for p in params]
            for p, plain in held:
                if p in optimizer.state:
                    state = optimizer.state.pop(p)
                    optimizer.state[plain] = {key: _local(value) for key, value in state.items()}
            yield
        finally:
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = params
            for p, plain in held:
                if plain in optimizer.state:
                    state = optimizer.state.pop(plain)
                    optimizer.state[p] = {key: _held_as(value, p, plain) for key, value in state.items()}

    def _undressed(self, p: nn.Parameter, held: list[tuple[nn.Parameter, nn.Parameter]]) -> nn.Parameter:
        if not isinstance(p, DTensor):
            return p
        plain = nn.Parameter(p._local_tensor, requires_grad=p.requires_grad)
        plain.grad = None if p.grad is None else _local(p.grad)
        held.append((p, plain))
        return plain

    # ---- running ----------------------------------------------------------------------------------------------------
    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a user's code outside of the model may use parameters as if they were whole: a penalty on weights, an average."""
        self.group.forget()
        with _Watch(self):
            yield

    def _watch(self, module: nn.Module, path: str) -> None:
        """The outermost module that runs switches the watching on, and off again, also when it raises."""
        module._tensor_path = path  # type: ignore[assignment]
        self._paths[id(module)] = path
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        running = self._running
        if getattr(running, "module", None) is None:
            if id(module) not in self._paths:
                self._take_in(module)
            running.module, running.depth, running.mode = module, 0, _Watch(self)
            self.group.forget()
            running.mode.__enter__()
        if running.module is module:
            running.depth += 1

    def _take_in(self, copied: nn.Module) -> None:
        """A copy of a module, as an average of weights is, has its hooks too, and is held as the original is."""
        self._copies.append((copied._tensor_path, copied))  # type: ignore[arg-type]
        self._paths |= {id(module): path for path, module in copied.named_modules(prefix=str(copied._tensor_path))}

    def __deepcopy__(self, memo: Any) -> TensorParallel:
        return self

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        running = self._running
        if getattr(running, "module", None) is not module:
            return None
        running.depth -= 1
        if running.depth:
            return None
        running.mode.__exit__(None, None, None)
        running.module = running.mode = None
        self.group.forget()
        return None if self.loss_parallel else plain(output)

    def local(self, p: DTensor) -> Tensor:
        """What stands for a parameter while the model runs: its part, as a split tensor if it is cut. Others stay."""
        found = self._found(p)
        if found is None:  # another room's own work on DTensors
            return p
        _, name, way = found
        local = p._local_tensor
        if p.requires_grad and torch.is_grad_enabled():
            local = _Local.apply(p)  # type: ignore[no-untyped-call]
        if way.dim is None:
            return local
        return Split(local, way.dim, way.layout(self.group.num), self.group, (name,))

    # ---- what is told -----------------------------------------------------------------------------------------------
    def describe(self) -> str:
        """The plan as a table; after the first forward also which activations had to be made whole, and why."""
        placed = dict(self.held)
        return table(self.plan, placed, self.group.num, self.group.whole)


class _Watch(TorchFunctionMode):
    """While it is on, parameters of the model are their parts, and functions of split activations go by the rules."""

    def __init__(self, place: TensorParallel) -> None:
        super().__init__()
        self._place, self._mesh = place, place.mesh

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        split = False
        for each in args:
            kind = type(each)
            if kind is Tensor or kind is int:
                continue
            if isinstance(each, (DTensor, tuple, list)):
                return self._with_parameters(func, args, kwargs)
            split = split or kind is Split
        for each in kwargs.values():
            if isinstance(each, (DTensor, tuple, list)):
                return self._with_parameters(func, args, kwargs)
            split = split or isinstance(each, Split)
        return apply(func, args, kwargs) if split else func(*args, **kwargs)

    def _with_parameters(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        name = func.__name__
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__  # type: ignore[attr-defined]
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found: list[Split] = []
        args = self._resolved(args, found)
        kwargs = {key: self._resolved(each, found) for key, each in kwargs.items()}
        return apply(func, args, kwargs) if found else func(*args, **kwargs)

    def _resolved(self, value: Any, found: list[Split]) -> Any:
        if isinstance(value, DTensor):
            if value.device_mesh != self._mesh:
                return value
            value = self._place.local(value)
        if isinstance(value, Split):
            found.append(value)
        elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items = [self._resolved(each, found) for each in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


class _Local(torch.autograd.Function):
    """A parameter's part; its gradient is a DTensor held as the parameter is."""

    @staticmethod
    def forward(ctx: Any, p: DTensor) -> Tensor:
        ctx.p = p
        return p._local_tensor.view_as(p._local_tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _as(grad, ctx.p)


def _as(local: Tensor, p: Any) -> DTensor:
    made: DTensor = DTensor(local, copy(p._spec), requires_grad=False)  # type: ignore[no-untyped-call]
    return made


def _name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _local(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


def _held_as(value: Any, p: nn.Parameter, plain: nn.Parameter) -> Any:
    same = isinstance(value, Tensor) and value.dim() > 0 and value.shape == plain.shape
    return _as(value, p) if same else value


def plain(output: Any) -> Any:
    """What a model returned, with whole tensors. Objects of unknown types are left: what is split in them stays usable."""
    if isinstance(output, Split):
        return made_whole(output, NotLocal(RETURNED))
    if isinstance(output, dict):
        for key, each in list(output.items()):
            if (new := plain(each)) is not each:
                output[key] = new
        return output
    if isinstance(output, (tuple, list)) and not isinstance(output, torch.Size):
        items = [plain(each) for each in output]
        if all(new is old for new, old in zip(items, output, strict=True)):
            return output
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if is_dataclass(output) and not isinstance(output, type):
        for key, each in list(vars(output).items()):
            if (new := plain(each)) is not each:
                setattr(output, key, new)
    return output
