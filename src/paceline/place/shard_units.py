"""Which parts of a model are gathered together: the blocks of its lists, else pieces of balanced size; the rest goes with the root.

1. A list of blocks is a ``ModuleList`` or ``Sequential`` whose children with parameters are of one class. Each child of a
   ``ModuleList`` is a unit; neighbours of a ``Sequential`` share one until it has :data:`SMALL` bytes.
2. Lists within blocks are left alone, unless a block holds more than a quarter of the model (stages of blocks).
3. A model without such a list is cut along its children, largest first, at an eighth of its bytes.
4. What shares a parameter with something outside of it stays with the root, so that tied weights are one.

[Note: only what is called] A unit is gathered when its ``forward`` is called. Modules whose weights are read by others, such as the
last projection in ``nn.MultiheadAttention`` or an embedding that is the head as well, must not be units of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

SMALL = 1 << 20
"""Bytes below which neighbours are gathered together."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Modules that are gathered together.

    Attributes:
        name: Dotted name of the first module; empty for the root.
        modules: One, or neighbours in a ``Sequential``.
        block: Whether it is one of a list of blocks.
    """

    name: str
    modules: tuple[nn.Module, ...]
    block: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all its parameters."""
        return sum(p.nbytes for p in dict.fromkeys(p for m in self.modules for p in m.parameters()))


def units_of(model: nn.Module, small: int = SMALL) -> list[Unit]:
    """Units below the root, in the order of registration; disjoint, and none holds a tied parameter of another."""
    alone = _Alone(model)
    total = _nbytes(model)
    units = list(_lists(model, "", total, small, alone))
    return units or list(_pieces(model, "", max(small, total // 8), alone))


def _lists(module: nn.Module, name: str, total: int, small: int, alone: _Alone) -> Iterator[Unit]:
    blocks = _blocks(module)
    if not blocks:
        for key, child in module.named_children():
            yield from _lists(child, f"{name}{key}.", total, small, alone)
        return
    named = [(f"{name}{key}", block) for key, block in blocks]
    for group in _neighbours(named, small if isinstance(module, nn.Sequential) else 0):
        first = group[0][0]
        inner = []
        if 4 * sum(_nbytes(b) for _, b in group) > total:
            inner = [u for key, b in group for u in _lists(b, f"{key}.", total, small, alone)]
            inner = inner if all(composite(m) for u in inner for m in u.modules) else []
        if inner:
            yield from inner
        elif all(alone(b) for _, b in group):
            yield Unit(first, tuple(b for _, b in group), True)


def _blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a list of blocks, else nothing."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    blocks = [(key, child) for key, child in module.named_children() if _nbytes(child)]
    alike = len({type(child) for _, child in blocks}) == 1
    return blocks if len(blocks) > 1 and alike and all(callable_module(b) for _, b in blocks) else []


def _pieces(module: nn.Module, name: str, bound: int, alone: _Alone) -> Iterator[Unit]:
    if isinstance(module, nn.Sequential):
        named = [(f"{name}{key}", child) for key, child in module.named_children() if _nbytes(child)]
        for group in _neighbours(named, bound):
            if len(group) == 1 and _nbytes(group[0][1]) > bound and _splits(group[0][1]):
                yield from _pieces(group[0][1], f"{group[0][0]}.", bound, alone)
            elif sum(_nbytes(m) for _, m in group) >= bound // 2 and all(alone(m) for _, m in group):
                yield Unit(group[0][0], tuple(m for _, m in group), False)
        return
    for key, child in module.named_children():
        size = _nbytes(child)
        if size > bound and _splits(child):
            yield from _pieces(child, f"{name}{key}.", bound, alone)
        elif 2 * size >= bound and alone(child) and callable_module(child) and not _read_by_others(child):
            yield Unit(f"{name}{key}", (child,), False)


def _neighbours(named: Sequence[tuple[str, nn.Module]], small: int) -> Iterator[list[tuple[str, nn.Module]]]:
    """Consecutive modules in groups: a group is closed when it has reached `small` bytes or would pass it."""
    group: list[tuple[str, nn.Module]] = []
    used = 0
    for key, module in named:
        size = _nbytes(module)
        if group and used + size > small:
            yield group
            group, used = [], 0
        group.append((key, module))
        used += size
    if group:
        yield group


class _Alone:
    """Whether a module shares no parameter, and no module, with the rest of the model."""

    def __init__(self, model: nn.Module) -> None:
        self._uses = Counter(p for _, m in model.named_modules(remove_duplicate=False) for p in _own(m))

    def __call__(self, module: nn.Module) -> bool:
        inside = Counter(p for _, m in module.named_modules(remove_duplicate=False) for p in _own(m))
        return all(self._uses[p] == count for p, count in inside.items())


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def callable_module(module: nn.Module) -> bool:
    """Whether the module has a ``forward`` of its own: ``ModuleList`` and ``ModuleDict`` have not."""
    return type(module).forward is not nn.Module.forward


def composite(module: nn.Module) -> bool:
    """Whether the module is made of others."""
    return any(True for _ in module.children())


def _splits(module: nn.Module) -> bool:
    return composite(module) and not isinstance(module, nn.MultiheadAttention)


def _read_by_others(module: nn.Module) -> bool:
    """Projections of ``nn.MultiheadAttention``, and tables of vectors, whose weight is often the head's as well."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear | nn.Embedding | nn.EmbeddingBag)


def _nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def part_of(rows: int, size: int, rank: int) -> tuple[int, int]:
    """First row, and number of rows, of rank's part of a dimension: equal parts, the last ones shorter or empty."""
    each = -(-rows // size)
    low = min(rank * each, rows)
    return low, min(each, rows - low)
