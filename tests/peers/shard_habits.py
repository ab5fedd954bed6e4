"""What scripts do besides the plain loop, with a sharded model and in one process: for peers of test_shard.py."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from paceline.place.shard import Sharded
from peers.shard_case import ROWS, mesh_of, wire_of
from peers.shard_models import CASES, build, numbers, shares, words
from support.peers import Peer


@dataclass
class World:
    """Where a habit runs: sharded over a mesh, or in one process on the whole batch."""

    part: slice
    settings: dict[str, Any] | None
    share: float = 1.0
    size: int = 1
    placed: list[Sharded] = field(default_factory=list)

    def place(self, model: nn.Module, *optimizers: Optimizer, **more: Any) -> None:
        if self.settings is not None:
            sharded = Sharded(factor=lambda: self.share, **{**self.settings, **more})
            sharded.place(model, optimizers)
            self.placed.append(sharded)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = numbers(8)(torch.Generator().manual_seed(step), ROWS)
        return (x[self.part], y[self.part]) if self.share else (x[:1], y[:1])

    def text(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = words(12, 256)(torch.Generator().manual_seed(step), ROWS)
        return (x[self.part], y[self.part]) if self.share else (x[:1], y[:1])


Result = dict[str, Any]
HABITS: dict[str, Callable[[World], Result]] = {}


def habit(function: Callable[[World], Result]) -> Callable[[World], Result]:
    HABITS[function.__name__] = function
    return function


def state(model: nn.Module) -> Result:
    return {name: Sharded.whole(p.detach()) for name, p in model.named_parameters()}


class Blocks(nn.Module):
    """A chain of residual blocks."""

    def __init__(self, block: Callable[[int], nn.Module], count: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.blocks = nn.ModuleList(block(i) for i in range(count))
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.step(block, x)
        found: Tensor = self.last(x)
        return found

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + torch.tanh(block(x))


def blocks(block: Callable[[int], nn.Module] | None = None, kind: type[Blocks] = Blocks) -> Blocks:
    torch.manual_seed(3)
    return kind(block or (lambda i: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)))).double()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def loop(world: World, model: nn.Module, steps: int = 4, **settings: Any) -> Result:
    opt = adamw(model)
    world.place(model, opt, **settings)
    for step in range(steps):
        x, y = world.batch(step)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return state(model)


# ---- where gradients are cleared, and when --------------------------------------------------------------------------
@habit
def zero_grad_of_the_model_after_forward(world: World) -> Result:
    model = blocks()
    opt = adamw(model)
    world.place(model, opt, stage=1)
    for step in range(4):
        x, y = world.batch(step)
        loss = F.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()
        opt.step()
    return state(model)


@habit
def clearing_by_hand_after_forward(world: World) -> Result:
    model = blocks()
    opt = adamw(model)
    world.place(model, opt, stage=2)
    for step in range(4):
        x, y = world.batch(step)
        loss = F.cross_entropy(model(x), y)
        for p in model.parameters():
            p.grad = None
        loss.backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.clamp_(-0.01, 0.01)
        opt.step()
    return state(model)


@habit
def evaluation_between_backward_and_step(world: World) -> Result:
    seen: Result = {}
    for stage in (1, 2, 3):
        model = blocks()
        opt = adamw(model)
        world.place(model, opt, stage=stage)
        for step in range(4):
            x, y = world.batch(step)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                model.eval()
                model(x)
                model.train()
            opt.step()
            with torch.no_grad():  # with the parameters after the step
                seen[f"{stage} {step}"] = model(torch.ones(1, 8, dtype=torch.float64)).clone()
        seen |= {f"{stage} {k}": v for k, v in state(model).items()}
    return seen


# ---- graphs -----------------------------------------------------------------------------------------------------------
@habit
def two_forwards_one_backward(world: World) -> Result:
    model = blocks()
    opt = adamw(model)
    world.place(model, opt)
    for step in range(4):
        (x, y), (z, _) = world.batch(step), world.batch(step + 50)
        opt.zero_grad()
        (F.cross_entropy(model(x), y) + F.cross_entropy(model(z), y)).backward()
        opt.step()
    return state(model)


@habit
def two_backwards_of_one_forward(world: World) -> Result:
    model = blocks()
    opt = adamw(model)
    world.place(model, opt)
    for step in range(4):
        x, y = world.batch(step)
        opt.zero_grad()
        out = model(x)
        F.cross_entropy(out, y).backward(retain_graph=True)
        out.square().mean().backward()
        opt.step()
    return state(model)


@habit
def generator_and_critic(world: World) -> Result:
    torch.manual_seed(5)
    g = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    d = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    opt_g, opt_d = adamw(g), adamw(d)
    world.place(g, opt_g)
    world.place(d, opt_d, stage=2)
    for step in range(4):
        x, _ = world.batch(step)
        fake = g(x)
        opt_d.zero_grad()
        (F.softplus(-d(x)).mean() + F.softplus(d(fake.detach())).mean()).backward()
        opt_d.step()
        opt_g.zero_grad()
        F.softplus(-d(fake)).mean().backward()
        opt_g.step()
    return {**{f"g.{k}": v for k, v in state(g).items()}, **{f"d.{k}": v for k, v in state(d).items()}}


class Checkpointed(Blocks):
    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + torch.tanh(checkpoint(block, x, use_reentrant=False))


@habit
def checkpoints_of_the_script(world: World) -> Result:
    found: Result = {}
    for stage in (1, 2, 3):
        found |= {f"{stage} {k}": v for k, v in loop(world, blocks(kind=Checkpointed), stage=stage).items()}
    return found


class Views(Blocks):
    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        y = block(x)
        y += x
        return y


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.a(x).view(-1, 12)
        return found


@habit
def blocks_that_return_views(world: World) -> Result:
    return loop(world, blocks(lambda i: Reshaped(), Views))


@habit
def recomputed_with_dropout_keeps_its_draws(world: World) -> Result:
    def drop(i: int) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5))

    def train(recompute: str) -> Result:
        model = blocks(drop)
        opt = adamw(model)
        sharded = world.settings and Sharded(factor=lambda: world.share, **world.settings, recompute=recompute)
        if sharded:
            sharded.place(model, [opt])
        torch.manual_seed(11)
        for step in range(3):
            x, y = world.batch(step)
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        return state(model)

    kept, again = train("none"), train("blocks")
    return {name: kept[name] - again[name] for name in kept}


# ---- optimizers -----------------------------------------------------------------------------------------------------------
@habit
def state_from_before(world: World) -> Result:
    """An optimizer that has stepped before it is sharded, with hooks of the script, and a schedule."""
    model = blocks()
    opt = adamw(model)
    x, y = numbers(8)(torch.Generator().manual_seed(77), ROWS)
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    opt.zero_grad()
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1 / (n + 1))
    norms: list[Tensor] = []

    def look(optimizer: Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([Sharded.whole(g).norm() for g in grads if g is not None]).norm())

    opt.register_step_pre_hook(look)
    opt.register_step_post_hook(look)
    world.place(model, opt)
    opt.register_step_pre_hook(look)
    opt.register_step_post_hook(look)
    for step in range(3):
        xb, yb = world.batch(step)
        opt.zero_grad()
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        schedule.step()
    moments = {
        f"{key}.{i}": Sharded.whole(value)
        for i, entry in opt.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return {**state(model), **moments, "norms": torch.stack(norms)}


@habit
def scaled_losses(world: World) -> Result:
    model = blocks()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    world.place(model, opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    for step in range(5):
        x, y = world.batch(step)
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if step == 2:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(opt)
        scaler.update()
    return {**state(model), "scale": torch.tensor(scaler.get_scale())}


@habit
def a_step_with_a_closure(world: World) -> Result:
    model = blocks()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    world.place(model, opt, stage=1)
    for step in range(3):
        x, y = world.batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return float(loss)

        opt.step(closure) if step else opt.step(closure=closure)
    return state(model)


@habit
def after_a_failed_step(world: World) -> Result:
    class Fragile(Blocks):
        fails = ""

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = self.step(self.blocks[0], x)
            if self.fails == "forward":
                raise ArithmeticError("forward")
            found: Tensor = self.last(self.step(self.blocks[1], x))
            if self.fails == "backward" and found.requires_grad:
                x.register_hook(self.fail)
            return found

        def fail(self, g: Tensor) -> None:
            raise ArithmeticError("backward")

    found: Result = {}
    for stage in (1, 3):
        model = blocks(kind=Fragile)
        assert isinstance(model, Fragile)
        opt = adamw(model)
        world.place(model, opt, stage=stage)
        for step in range(6):
            model.fails = ("", "forward", "", "backward", "", "")[step]
            x, y = world.batch(step)
            try:
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                opt.step()
            except ArithmeticError:
                pass
        found |= {f"{stage} {k}": v for k, v in state(model).items()}
    return found


@habit
def parts_of_the_model_called_alone(world: World) -> Result:
    found: Result = {}
    for stage in (1, 2, 3):
        model = blocks()
        opt = adamw(model)
        world.place(model, opt, stage=stage)
        for step in range(3):
            x, y = world.batch(step)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            with torch.no_grad():
                found[f"{stage} block {step}"] = model.blocks[1](torch.ones(1, 12, dtype=torch.float64)).clone()
            loss.backward()
            opt.step()
        found |= {f"{stage} {k}": v for k, v in state(model).items()}
    return found


@habit
def writing_text_between_steps(world: World) -> Result:
    model: Any = build("gpt")
    opt = adamw(model)
    world.place(model, opt)
    for step in range(3):
        x, y = world.text(step)
        opt.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        opt.step()
    model.eval()
    torch.manual_seed(1)
    text = model.write("def ", 20)
    return {**state(model), "text": torch.tensor(list(text.encode()))}


@habit
def evaluating_an_encoder(world: World) -> Result:
    """Torch's encoder looks at its first layer's weights before it calls it."""
    model = build("encoder")
    opt = adamw(model)
    world.place(model, opt)
    x, y = CASES["encoder"].batch(torch.Generator().manual_seed(5), ROWS)
    found: Result = {}
    for step in range(2):
        opt.zero_grad()
        part = world.part if world.share else slice(0, 1)
        CASES["encoder"].loss(model, x[part], y[part]).backward()
        opt.step()
        model.eval()
        with torch.no_grad():
            found[str(step)] = model(x).clone()
        model.train()
    return {**found, **state(model)}


def habits(peer: Peer, store: str, wire: bool) -> dict[str, str]:
    """For each habit: "same", or what differs from one process, or the error."""
    importlib.import_module("peers.shard_habits_parameters")
    found = {}
    with mesh_of(peer, store) as mesh, wire_of(peer, wire) as shared:
        part = shares(ROWS, peer.size)[peer.rank]
        share = len(range(*part.indices(ROWS))) / ROWS
        for name, function in HABITS.items():
            plain = World(slice(0, ROWS), None, size=peer.size)
            split = World(part, {"mesh": mesh, "wire": shared}, share, size=peer.size)
            try:
                found[name] = _differ(function(plain), function(split))
            except Exception:
                found[name] = traceback.format_exc()
                break  # the others may be elsewhere now
    return found


def _differ(plain: Result, split: Result) -> str:
    if list(plain) != list(split):
        return f"{list(plain)} is not {list(split)}"
    worst = {k: float((split[k].double() - plain[k].double()).abs().max()) for k in plain if plain[k].numel()}
    bad = {k: v for k, v in worst.items() if not v <= 1e-9}
    return str(bad) if bad else "same"
