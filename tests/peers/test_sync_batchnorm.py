"""Batch normalisation over ranks against one process on the whole batch: outputs, gradients, statistics, with uneven rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from paceline.place.shard import Sharded
from paceline.place.sync_batchnorm import convert
from peers.shard_case import mesh_of
from support.breadth import more
from support.peers import Peer, outcome, run_peers
from support.rendezvous import rendezvous

ROWS = 11
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "1d in time": (lambda: nn.BatchNorm1d(5), (5, 3)),
    "2d": (lambda: nn.BatchNorm2d(5, eps=1e-3, momentum=0.3), (5, 3, 2)),
    "3d": (lambda: nn.BatchNorm3d(5), (5, 2, 3, 2)),
    "running mean over all": (lambda: nn.BatchNorm2d(5, momentum=None), (5, 3, 2)),
    "without weights": (lambda: nn.BatchNorm2d(5, affine=False), (5, 3, 2)),
    "without statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (5, 3, 2)),
}


def shares(size: int, empty: bool) -> list[slice]:
    """Uneven shares of the rows; `empty`: the last rank has none."""
    holders = size - empty
    cuts = [ROWS * (r + 1) ** 2 // holders**2 for r in range(holders)] + [ROWS] * empty
    return [slice(low, high) for low, high in zip([0, *cuts], cuts, strict=False)]


def weights(labels: Tensor, by: str) -> Tensor:
    """What each row counts in the loss: all alike, or some more than others."""
    return torch.ones(ROWS, dtype=torch.float64) if by == "rows" else 1.0 + labels.double()


def steps(
    build: Callable[[], nn.Module], shape: tuple[int, ...], part: slice, by: str, group: Any
) -> dict[str, Tensor]:
    """Three steps of a model around a layer, with all that is left of it; `group` None: one process."""
    torch.manual_seed(0)
    layer = build().double()
    first = nn.Linear(shape[0], shape[0]).double()
    model = nn.ModuleDict({"first": first, "norm": layer, "last": nn.Linear(shape[0], 3).double()})
    state: dict[str, float] = {"factor": 1.0, "rows": ROWS}
    if group is not None:
        before = list(model.state_dict())
        given = {"factor": lambda: state["factor"]} if by != "rows" else {}
        assert convert(model, group, real=lambda: state["rows"] > 0, **given) == ["norm"]
        assert list(model.state_dict()) == before
        assert type(layer) is not type(build())
        assert isinstance(layer, type(build()))
    kept: dict[str, Tensor] = {}
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        x = 30 + torch.randn(ROWS, *shape, generator=g, dtype=torch.float64)
        y = torch.randint(0, 3, (ROWS,), generator=g)
        w = weights(y, by)
        rows = len(range(ROWS)[part])
        state["rows"], state["factor"] = rows, float(w[part].sum() / w.sum())
        xs, ys, ws = (x[part], y[part], w[part]) if rows else (x[:1] * float("nan"), y[:1], w[:1])
        model.train(step < 3)
        out = layer(first(xs.movedim(1, -1)).movedim(-1, 1))
        out = out.flatten(2).mean(2) if out.dim() > 2 else out
        loss = (nn.functional.cross_entropy(model["last"](out), ys, reduction="none") * ws).sum() / ws.sum()
        model.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            if group is not None:
                p.grad = p.grad * state["factor"] if rows else torch.zeros_like(p)
                dist.all_reduce(p.grad, group=group)
            kept[f"{step} {name}"] = p.grad.clone()
            p.data.sub_(p.grad, alpha=0.1)
        kept |= {f"{step} {name}": buffer.double().clone() for name, buffer in model.named_buffers()}
    return kept


def compare(peer: Peer, store: str, empty: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    with mesh_of(peer, store) as mesh:
        part = shares(peer.size, empty)[peer.rank]
        for by in ("rows", "weights"):
            for name, (build, shape) in LAYERS.items():
                mine = steps(build, shape, part, by, mesh.get_group())
                plain = steps(build, shape, slice(0, ROWS), by, None)
                assert list(mine) == list(plain)
                found[f"{name} by {by}"] = max(float((mine[k] - plain[k]).abs().max()) for k in plain)
    return found


def run(function: Callable[..., Any], size: int, **arguments: Any) -> list[Any]:
    with rendezvous() as server:
        env = {"GLOO_SOCKET_IFNAME": "lo"}
        return run_peers(function, size, timeout=120, env=env, store=str(server.path), **arguments)


@pytest.mark.parametrize(("size", "empty"), [(3, True), *more((2, False), (4, False), (4, True), (1, False))])
def test_the_numbers_are_those_of_the_whole_batch(size: int, empty: bool) -> None:
    for found in run(compare, size, empty=empty):
        assert {name: worst for name, worst in found.items() if not worst <= 1e-9} == {}


def refuse(peer: Peer, store: str) -> list[Any]:
    with mesh_of(peer, store) as mesh:
        layer = nn.Sequential(nn.BatchNorm1d(4))
        convert(layer, mesh.get_group(), real=lambda: peer.rank == 0)
        one = outcome(lambda: layer(torch.ones(1, 4)))
        weightless = nn.Sequential(nn.BatchNorm1d(4))
        convert(weightless, mesh.get_group(), factor=lambda: float(peer.rank == 0))
        x = torch.randn(3, 4, requires_grad=True)
        zero = outcome(lambda: weightless(x).square().sum().backward())
        return [one.get("code"), zero.get("code")]


def test_what_has_no_variance_or_no_weight_is_refused() -> None:
    assert run(refuse, 2) == [["PL558", None], ["PL558", "PL558"]]


def recomputed(peer: Peer, store: str) -> dict[str, float]:
    """Blocks with batch normalisation, sharded, synchronised, and computed twice: statistics count a batch once."""
    with mesh_of(peer, store) as mesh:
        found = {}
        for recompute in ("none", "blocks"):
            results = []
            for group in (None, mesh.get_group()):
                torch.manual_seed(2)
                blocks = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(3))
                model = nn.Sequential(*blocks).double()
                opt = torch.optim.SGD(model.parameters(), lr=0.1)
                part = slice(0, 8) if group is None else slice(0, 5) if peer.rank == 0 else slice(5, 8)
                if group is not None:
                    convert(model, group)
                    rows = part.stop - part.start
                    Sharded(mesh, recompute=recompute, factor=lambda n=rows: n / 8).place(model, [opt])  # type: ignore[misc]
                for step in range(3):
                    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                    opt.zero_grad()
                    model(x[part]).square().mean().backward()
                    opt.step()
                results.append([Sharded.whole(t).double() for t in (*model.parameters(), *model.buffers())])
            found[recompute] = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
        return found


def test_blocks_that_are_computed_twice_count_once() -> None:
    for found in run(recomputed, 2):
        assert max(found.values()) <= 1e-9, found
