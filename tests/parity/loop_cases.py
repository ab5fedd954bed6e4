"""Loops as people write them, each a plain PyTorch program in a function; what they arrive at must not depend on the launcher.

Every case returns tensors and numbers that plain `python` and `paceline run` must agree on.
"""

import argparse
import copy
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

ROWS, WIDTH = 45, 6


def rows(n=ROWS, seed=3):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, WIDTH, generator=g), torch.randint(4, (n,), generator=g))


def loader(batch=11, n=ROWS, **kwargs):
    return DataLoader(rows(n), batch_size=batch, shuffle=True, **kwargs)


def net(*sizes):
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def weights(*models):
    return {f"{i}.{k}": v.detach().clone() for i, m in enumerate(models) for k, v in m.state_dict().items()}


def two_players(job):
    """A GAN-like pair: several backwards a step, gradients of one that flow through the other."""
    g, d = net(WIDTH, 8, WIDTH), net(WIDTH, 8, 1)
    opt_g = torch.optim.Adam(g.parameters(), lr=1e-2, betas=(0.5, 0.9))
    opt_d = torch.optim.SGD(d.parameters(), lr=1e-2, momentum=0.9)
    data = loader()
    opt_d, g, data, d, opt_g = job.adopt(opt_d, g, data, d, opt_g)
    for _ in job.epochs(3):
        for x, _ in data:
            opt_d.zero_grad()
            F.softplus(-d(x)).mean().backward()
            F.softplus(d(g(x.flip(1)).detach())).mean().backward()
            opt_d.step()
            opt_g.zero_grad()
            F.softplus(-d(g(x.flip(1)))).mean().backward()
            opt_g.step()
    return weights(g, d)


class Routed(nn.Module):
    """Experts that see only some rows, a part used in odd steps only, a frozen part, a part never used."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))
        self.odd = nn.Linear(WIDTH, 4)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.never = nn.Linear(2, 2)

    def forward(self, x, y, step):
        x = self.frozen(x)
        out = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            mask = y % 3 == i
            if mask.any():
                out = out.index_put((mask,), expert(x[mask]))
        return out + self.odd(x) if step % 2 else out


def unused_parameters(job):
    model = Routed()
    opt = torch.optim.AdamW(
        model.parameters(), lr=1e-2, weight_decay=0.1
    )  # decay shows a step that should not have been
    data = loader(batch=4)
    model, opt, data = job.adopt(model, opt, data)
    step = 0
    for _ in job.epochs(3):
        for x, y in data:
            opt.zero_grad()
            F.cross_entropy(model(x, y, step), y).backward()
            opt.step()
            step += 1
    return {**weights(model), "never has a gradient": torch.tensor(model.never.weight.grad is not None)}


def gradients_by_hand(job):
    """`autograd.grad` and an assignment: no backward ever reaches a hook."""
    model = net(WIDTH, 8, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    data = loader()
    model, opt, data = job.adopt(model, opt, data)
    for x, y in data:
        params = list(model.parameters())
        for p, g in zip(params, torch.autograd.grad(F.cross_entropy(model(x), y), params), strict=True):
            p.grad = g
        opt.step()
        opt.zero_grad()
    return weights(model)


def scaler_skips_overflow(job):
    model = net(WIDTH, 8, 4).float()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    data = loader(batch=8)
    model, opt, data, scaler = job.adopt(model, opt, data, scaler)
    for i, (x, y) in enumerate(data):
        opt.zero_grad()
        loss = F.cross_entropy(model(x.float()), y)
        if i == 2:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(opt)
        scaler.update()
    return {"scale": torch.tensor(scaler.get_scale()), **{k: v.double() for k, v in weights(model).items()}}


def plateau_on_a_ratio(job):
    model = net(WIDTH, 8, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, mode="max", patience=0)
    data, test = loader(), DataLoader(rows(17, seed=9), batch_size=5)
    model, opt, plateau, data, test = job.adopt(model, opt, plateau, data, test)
    seen = []
    for _ in job.epochs(4):
        for x, y in data:
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
            job.count(trained=len(x))
        with job.evaluating(model):
            for x, y in test:
                job.count(correct=(model(x).argmax(-1) == y).sum(), seen=len(y))
        seen.append(job.ratio("correct", "seen"))
        plateau.step(seen[-1])
    return {"ratios": torch.tensor(seen), "lr": torch.tensor(opt.param_groups[0]["lr"]), **weights(model)}


def average_of_weights(job):
    """An EMA by deepcopy, kept."""
    model = net(WIDTH, 8, 4)
    opt = torch.optim.Adagrad(model.parameters(), lr=0.1)
    model, opt, data = job.adopt(model, opt, loader())
    ema = copy.deepcopy(model)
    job.keep(ema=ema)
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        with torch.no_grad():
            for e, p in zip(ema.parameters(), model.parameters(), strict=True):
                e.lerp_(p, 0.3)
    return weights(model, ema)


def compiled(job):
    model = torch.compile(net(WIDTH, 8, 4), backend="aot_eager")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    same, opt, data = job.adopt(model, opt, loader(batch=12, n=36))
    assert same is model
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return weights(model)


def explicit_steps(job):
    model = net(WIDTH, 8, 4)
    model, opt, data = job.adopt(model, torch.optim.Adam(model.parameters(), lr=1e-2), loader())
    for batch in data:
        job.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch, optimizer=opt)
    return weights(model)


def sums_instead_of_means(job):
    model = net(WIDTH, 8, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    model, opt, data = job.adopt(model, opt, loader())
    for x, y in data:
        opt.zero_grad()
        job.weight("sum")
        F.cross_entropy(model(x), y, reduction="sum").backward()
        opt.step()
    return weights(model)


def fewer_rows_than_ranks(job):
    """Batches of 3 and a last one of 1: with four ranks some have nothing, and must not be felt."""
    model = net(WIDTH, 8, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, opt, data = job.adopt(model, opt, loader(batch=3, n=13))
    before = job.clock
    for _ in job.epochs(2):
        for x, y in data:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            job.count(rows=len(x), one=1 if len(x) else 0)
    clock = [job.clock.step - before.step, job.clock.samples - before.samples]
    return {"clock": torch.tensor(clock), **weights(model)}


class Odd(nn.Module):
    """Parameters of several types and shapes: two dtypes, no dimension, no element."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(WIDTH, 8, dtype=torch.float32)
        self.wide = nn.Linear(8, 4, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.empty = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))

    def forward(self, x):
        return self.wide(self.narrow(x.float()).double()) * self.scale + self.empty.sum()


def mixed_parameters(job):
    model = Odd()
    a = torch.optim.SGD([model.scale, model.empty], lr=0.1)
    b = torch.optim.SGD([*model.narrow.parameters(), *model.wide.parameters()], lr=0.1, momentum=0.9)
    model, a, b, data = job.adopt(model, a, b, loader())
    for x, y in data:
        model.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        (0.5 * loss).backward()
        a.step()
        b.step()
    return {k: v.double() for k, v in weights(model).items()}


CASES = [
    two_players,
    unused_parameters,
    gradients_by_hand,
    scaler_skips_overflow,
    plateau_on_a_ratio,
    average_of_weights,
    compiled,
    explicit_steps,
    sums_instead_of_means,
    fewer_rows_than_ranks,
    mixed_parameters,
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", default=[c.__name__ for c in CASES])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    job = paceline.job()
    for case in CASES:
        if case.__name__ in args.cases:
            torch.manual_seed(7)
            result = case(job)
            if job.main:
                torch.save(result, args.out / f"{case.__name__}.pt")


if __name__ == "__main__":
    main()
