"""Frozen, unused, shared and oddly laid out parameters of a sharded model, and in one process: more habits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.shard_case import ROWS
from peers.shard_habits import Blocks, Result, World, adamw, blocks, habit, loop, state
from peers.shard_models import shares


@habit
def frozen_and_thawed(world: World) -> Result:
    model = blocks()
    model.blocks[0].requires_grad_(False)
    model.first.requires_grad_(False)
    opt = adamw(model)
    world.place(model, opt)
    for step in range(6):
        if step == 3:
            model.blocks[0].requires_grad_(True)
        x, y = world.batch(step)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return state(model)


class Branches(Blocks):
    """Parameters that a step may not use: one block is dead, the other lives when told."""

    alive = True

    def __init__(self, block: Callable[[int], nn.Module], count: int = 3) -> None:
        super().__init__(block, count)
        self.dead = nn.Linear(12, 12)
        self.sometimes = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x * self.sometimes if self.alive else x
        for block in self.blocks[:-1]:
            x = self.step(block, x)
        found: Tensor = self.last(x)
        return found


@habit
def parameters_that_no_rank_uses(world: World) -> Result:
    model = blocks(kind=Branches)
    assert isinstance(model, Branches)
    opt = adamw(model)
    world.place(model, opt)
    for step in range(6):
        model.alive = step % 3 != 2
        x, y = world.batch(step)
        opt.zero_grad(set_to_none=step < 4)
        F.cross_entropy(model(x), y).backward()
        opt.step()
    none = torch.tensor([p.grad is None for p in model.parameters()])
    return {**state(model), "none": none}


@habit
def parameters_that_some_ranks_use(world: World) -> Result:
    model = blocks(kind=Branches)
    assert isinstance(model, Branches)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    world.place(model, opt)
    for step in range(4):
        x, y = world.batch(step)
        first = world.part.start == 0  # the first rank's rows, in one process too
        opt.zero_grad()
        if world.settings is None:
            split = shares(ROWS, world.size)[0].stop if world.size > 1 else ROWS
            model.alive = True
            loss = F.cross_entropy(model(x[:split]), y[:split]) * (split / ROWS)
            model.alive = False
            if split < ROWS:
                loss = loss + F.cross_entropy(model(x[split:]), y[split:]) * ((ROWS - split) / ROWS)
            loss.backward()
        else:
            model.alive = first
            F.cross_entropy(model(x), y).backward()
        opt.step()
    return state(model)


@habit
def blocks_that_share_weights(world: World) -> Result:
    shared = nn.Linear(12, 12)

    def block(i: int) -> nn.Module:
        made = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        if i in (0, 2):
            made[0] = shared
        return made

    torch.manual_seed(9)
    nn.init.normal_(shared.weight)
    nn.init.zeros_(shared.bias)
    model = blocks(block)
    found = loop(world, model)
    assert model.blocks[0][0].weight is model.blocks[2][0].weight  # type: ignore[index]
    return found


@habit
def one_block_used_three_times(world: World) -> Result:
    same = nn.Linear(12, 12)
    torch.manual_seed(9)
    nn.init.normal_(same.weight)
    nn.init.zeros_(same.bias)
    return loop(world, blocks(lambda i: same))


@habit
def a_unit_called_three_times(world: World) -> Result:
    class Again(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in (*self.blocks, *self.blocks, self.blocks[0]):
                x = self.step(block, x)
            found: Tensor = self.last(x)
            return found

    return {f"{s} {k}": v for s in (1, 3) for k, v in loop(world, blocks(kind=Again), stage=s).items()}


@habit
def a_layer_in_another_order(world: World) -> Result:
    """channels_last weights are not contiguous."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)
    )
    return loop(world, net.double().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
