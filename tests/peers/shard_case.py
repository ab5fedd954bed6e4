"""Trains a sharded model in a few ways, and compares it with one process: functions for the peers of test_shard.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from paceline.group.shm_wire import ShmWire
from paceline.group.store import UnixStore
from paceline.place.shard import Sharded
from peers.shard_models import CASES, build, shares
from support.peers import Peer

ROWS = 7  # of the global batch: divides by no number of ranks


@contextmanager
def mesh_of(peer: Peer, store: str) -> Iterator[DeviceMesh]:
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", store=UnixStore(store, patience), rank=peer.rank, world_size=peer.size, timeout=patience
    )
    try:
        yield init_device_mesh("cpu", (peer.size,), mesh_dim_names=("shard",))
    finally:
        dist.destroy_process_group()


@contextmanager
def wire_of(peer: Peer, wanted: bool) -> Iterator[ShmWire | None]:
    wire = ShmWire(peer.arena_fd, peer.rank, peer.size, peer.board, peer.activity) if wanted else None
    try:
        yield wire
    finally:
        if wire is not None:
            wire.close()


class Lars(torch.optim.Optimizer):
    """An optimizer of a script, not element by element: each step is as long as its parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    ratio = p.norm() / (p.grad.norm() + 1e-3)
                    p.sub_(p.grad * ratio * group["lr"])


def optimizer_of(name: str, model: nn.Module) -> Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    if name == "own":
        return Lars(groups, lr=0.05)
    if name == "fused":
        return torch.optim.AdamW(groups, lr=1e-2, fused=True)
    kind: Any = getattr(torch.optim, name)
    return kind(groups, lr=1e-2)


def train(
    name: str, opt: str, steps: int, part: slice, sharded: dict[str, Any] | None, clip: float, accumulate: int
) -> tuple[nn.Module, list[float]]:
    """A few steps of a case on the rows `part` of each global batch; sharded as the settings say, or whole.

    Returns the model, and the norms of the gradient.
    """
    case, model = CASES[name], build(name)
    optimizer = optimizer_of(opt, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    rows = len(range(*part.indices(ROWS)))
    if sharded is not None:
        Sharded(factor=lambda: rows / ROWS / accumulate, **sharded).place(model, [optimizer])
    norms = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for micro in range(accumulate):
            x, y = case.batch(torch.Generator().manual_seed(100 * step + micro), ROWS)
            mine = (x[part], y[part]) if rows else (x[:1], y[:1])
            loss = case.loss(model, *mine)
            if not rows:
                loss = loss * float("nan")
            (loss if sharded is not None else loss / accumulate).backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            norms.append(float(norm))
        optimizer.step()
        schedule.step()
    return model, norms


def compare(
    peer: Peer, store: str, cases: list[dict[str, Any]], steps: int, wire: bool = False
) -> dict[str, list[float]]:
    """For each case the largest difference of a parameter, and of a gradient's norm, from one process."""
    found = {}
    with mesh_of(peer, store) as mesh, wire_of(peer, wire) as shared:
        for case in cases:
            settings = {"clip": 0.0, "accumulate": 1, "opt": "AdamW", **case}
            name, opt, clip, accumulate = (settings.pop(k) for k in ("name", "opt", "clip", "accumulate"))
            part = shares(ROWS, peer.size)[peer.rank]
            mine, norms = train(name, opt, steps, part, {"mesh": mesh, "wire": shared, **settings}, clip, accumulate)
            plain, expected = train(name, opt, steps, slice(0, ROWS), None, clip, accumulate)
            found[str(case)] = [
                differ(mine, plain),
                max((abs(a - b) for a, b in zip(norms, expected, strict=True)), default=0),
            ]
    return found


def differ(mine: nn.Module, plain: nn.Module) -> float:
    expected = dict(plain.named_parameters())
    names = [name for name, _ in mine.named_parameters()]
    assert names == list(expected)
    assert list(mine.state_dict()) == list(plain.state_dict())
    return max(float((Sharded.whole(p) - expected[name]).detach().abs().max()) for name, p in mine.named_parameters())
