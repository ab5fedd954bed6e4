"""More cases for the tests of the pipeline: what is refused, and what a loop may do besides training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paceline.place.pipeline import Pipeline
from peers import pipeline_case as case
from support.peers import Peer, outcome

CPU = torch.device("cpu")


def pipe(group: dist.ProcessGroup, model: nn.Module, schedule: str = "gpipe", **settings: Any) -> tuple[Pipeline, Any]:
    """The model on a pipeline, and its optimizer."""
    opt = case.optimizer(model)
    pipeline = Pipeline(group, CPU, schedule=schedule, **{"microbatches": 4, **settings})
    pipeline.place(model, [opt])
    return pipeline, opt


# ---- refusals -------------------------------------------------------------------------------------------------------
class NoChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, case.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


class Reading(nn.Module):
    """Looks at a value between its blocks."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.how == "read" and x.sum() > 1e9:
                x = x / 2
        if self.how == "write":
            y = torch.zeros(x.shape)
            y[:] = x
            return y
        return x


class Dropping(Reading):
    """Leaves out a block when it is told to."""

    drop = False

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if not self.drop or i != 1:
                x = block(x)
        return x


class Mixing(nn.Module):
    """Rows of the batch see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) - x.mean(0)
        return x


class Gram(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x @ x.T


def refusals(peer: Peer, store: str) -> dict[str, Any]:
    """Code by code how a mistake ends. All ranks make the same mistakes."""
    group = case.join(peer, store)
    pipelines: list[Pipeline] = []

    def started(model: nn.Module, schedule: str = "gpipe", **settings: Any) -> tuple[nn.Module, Any]:
        pipeline, opt = pipe(group, model, schedule, **settings)
        pipelines.append(pipeline)
        return model, opt

    x, y = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % case.CLASSES
    mlp, _ = started(case.build("mlp"))

    def loss() -> Any:
        return F.cross_entropy(mlp(x), y)

    def twice() -> None:
        value = loss()
        value.backward()
        value.backward()

    def not_yet() -> None:
        if loss() > 3:
            raise AssertionError

    def gradient_of_loss() -> None:
        torch.autograd.grad(loss(), list(mlp.parameters()))

    def penalty() -> None:
        (loss() + sum(p.pow(2).sum() for p in mlp.parameters())).backward()

    def aliased() -> None:
        out = mlp(x)
        row = out[0]
        out += 1
        row.sum().backward()

    def contrastive(schedule: str) -> Callable[[], None]:
        def run() -> None:
            model, _ = started(case.build("mlp"), schedule)
            case.contrastive("mlp", model, {"x": x})[0].backward()

        return run

    def large() -> None:
        out = mlp(torch.randn(40_000, 8))
        out.mean().backward()
        if peer.rank == 0:
            out.sum(0).tolist()

    def held_on_to() -> None:
        model = nn.Sequential(*(nn.LayerNorm(8) for _ in range(4))).double()
        graph = model(x).sum()
        started(model)[0](x)
        graph.backward()

    def dropped() -> None:
        model, _ = started(Dropping("").double())
        model(x).mean().backward()
        model.drop = True
        model(x).mean().backward()

    return_codes = {
        "a schedule of another name": lambda: Pipeline(group, CPU, schedule="zigzag", microbatches=4),
        "too few micro-batches for 1f1b": lambda: Pipeline(group, CPU, schedule="1f1b", microbatches=1),
        "no micro-batches": lambda: Pipeline(group, CPU, microbatches=0),
        "no chain": lambda: started(NoChain().double())[0](x),
        "a cut that is not there": lambda: started(case.build("mlp"), cuts=["7"])[0](x),
        "reading between blocks": lambda: started(Reading("read").double())[0](x),
        "writing between blocks": lambda: started(Reading("write").double())[0](x),
        "rows that see each other": lambda: started(Mixing().double())[0](x),
        "rows times rows": lambda: started(Gram().double())[0](x),
        "few rows": lambda: mlp(x[:3]),
        "read before backward": lambda: loss().item(),
        "decided before backward": not_yet,
        "read a large output elsewhere": large,
        "twice": twice,
        "two forwards": lambda: (loss() + loss()).backward(),
        "autograd.grad": gradient_of_loss,
        "a penalty": penalty,
        "no number": lambda: mlp(x).backward(),
        "no gradient": lambda: mlp(x).detach().sum().backward(),
        "changed in place": aliased,
        "contrastive, 1f1b": contrastive("1f1b"),
        "contrastive, gpipe": contrastive("gpipe"),
        "saved": lambda: torch.save(mlp.state_dict(), peer.directory / f"{peer.rank}.pt"),
        "somebody holds on": held_on_to,
        "another way": dropped,
    }
    found = {}
    for name, call in return_codes.items():
        result = outcome(lambda call=call: bool(call()) and None)
        found[name] = result.get("code", "")
    case.leave(*(p for p in pipelines if p._setting is not None))
    return found


# ---- what a loop may do besides ---------------------------------------------------------------------------------------
class Checkpointed(case.GPT):
    """Forgets what is inside of blocks and computes it again."""

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def features(peer: Peer, store: str) -> dict[str, Any]:
    """Single things that a loop or a model may do, each compared with one process."""
    group = case.join(peer, store)
    found: dict[str, Any] = {}
    pipelines = []

    def pair(make: Callable[[], nn.Module], schedule: str = "gpipe", **settings: Any) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = make().double()
        reference = copy.deepcopy(model)
        pipeline, opt = pipe(group, model, schedule, **settings)
        pipelines.append(pipeline)
        return pipeline, model, opt, reference, case.optimizer(reference)

    def difference(pipeline: Pipeline, reference: nn.Module) -> float:
        theirs = dict(reference.named_parameters())
        return max((float((p - theirs[n]).detach().abs().max()) for n, p in pipeline.held), default=0.0)

    # activation checkpointing between blocks, also where the backward is cut into halves
    for schedule in ("gpipe", "zero_bubble"):
        pipeline, model, opt, reference, theirs = pair(Checkpointed, schedule)
        case.train("gpt", reference, theirs, 3, rows=[12])
        case.train("gpt", model, opt, 3, rows=[12])
        found[f"checkpointing, {schedule}"] = difference(pipeline, reference)

    # norms of any order, of a list of parameters that was made before the cut, of one of them, of single gradients
    pipeline, model, opt, reference, theirs = pair(case.GPT)
    early, theirs_early = list(model.parameters()), list(reference.parameters())
    given = case.batch("gpt", 0, 12)
    for m in (model, reference):
        case.loss_of("gpt", m, given)[0].backward()
    for order in (1.0, 2.0, 3.0, float("inf")):
        mine = nn.utils.clip_grad_norm_(early, 1e9, norm_type=order)
        found[f"norm {order}"] = abs(float(mine) - float(nn.utils.clip_grad_norm_(theirs_early, 1e9, norm_type=order)))
    found["norm of a block"] = abs(
        float(nn.utils.clip_grad_norm_(model.blocks[0].parameters(), 1e9))
        - float(nn.utils.clip_grad_norm_(reference.blocks[0].parameters(), 1e9))
    )
    by_hand = [sum(p.grad.norm().item() ** 2 for p in m.parameters()) ** 0.5 for m in (model, reference)]
    found["norm by hand"] = abs(by_hand[0] - by_hand[1])
    for m in (model, reference):
        nn.utils.clip_grad_value_(m.parameters(), 1e-3)
    opt.step()
    theirs.step()
    found["clipped by value"] = difference(pipeline, reference)

    # frozen and unused parameters
    def frozen() -> nn.Module:
        model = case.GPT()
        model.unused = nn.Linear(3, 3)
        for p in model.blocks[0].parameters():
            p.requires_grad_(False)
        return model

    for schedule in ("gpipe", "zero_bubble"):
        pipeline, model, opt, reference, theirs = pair(frozen, schedule)
        case.train("gpt", reference, theirs, 3, rows=[12], clip=0.5)
        case.train("gpt", model, opt, 3, rows=[12], clip=0.5)
        found[f"frozen, {schedule}"] = difference(pipeline, reference)

    # the whole state, there and back; state of the optimizer
    pipeline, model, opt, reference, theirs = pair(case.GPT)
    case.train("gpt", reference, theirs, 2, rows=[12])
    case.train("gpt", model, opt, 2, rows=[12])
    mine = {n: {"momentum_buffer": opt.state[p]["momentum_buffer"], "step": 2} for n, p in pipeline.held}
    extras = pipeline.state.extras(mine, everywhere=True)
    found["optimizer's state"] = max(
        float((extras[n]["momentum_buffer"] - theirs.state[p]["momentum_buffer"]).abs().max())
        for n, p in reference.named_parameters()
    ) + sum(extras[n]["step"] != 2 for n in extras)
    torch.manual_seed(9)
    other = case.GPT().double()
    pipeline.state.load(dict(other.named_parameters()) | dict(other.named_buffers()))
    found["loaded"] = difference(pipeline, other)
    found["on the first"] = len(pipeline.state.whole(everywhere=False)) == (len(extras) if peer.rank == 0 else 0)
    found["keys"] = list(model.state_dict()) == list(reference.state_dict())
    found["wrong state"] = outcome(lambda: pipeline.state.load({})).get("code")

    # what was made before backward and is read after it; what is made afterwards
    out = model(given["x"])
    loss = F.cross_entropy(out.flatten(0, 1), given["y"].flatten())
    text = f"{loss:.3f} {out}"
    loss.backward()
    found["printed"] = "known after" in text and f"{loss:.3f}" == f"{loss.item():.3f}"
    found["afterwards"] = (
        out.shape == (12, case.TIME, case.VOCABULARY) and float(out.softmax(-1).sum()) - 12 * case.TIME
    )
    # the script's own streams are untouched, and dropout is the same for the same seed
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    def dropping() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()) for _ in range(4)))

    losses = []
    for _ in range(2):
        pipeline, model, *_ = pair(dropping, seed=3, cuts=["2.0"])
        torch.manual_seed(5)
        value = model(torch.ones(12, 8)).pow(2).mean()
        value.backward()
        losses.append(value.item())
        found["streams"] = torch.equal(torch.rand(3), expected)
    found["dropout repeats"] = losses[0] == losses[1]
    found["text"] = [pipeline.describe(), pipeline.draw(), pipeline.svg()[:4]]

    # running statistics: of micro-batches, on the stage of their module
    def normalising() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)))

    pipeline, model, opt, reference, theirs = pair(normalising)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    model(x).pow(2).mean().backward()
    for part in x.split(3):
        reference(part)
    whole = pipeline.state.whole(everywhere=True)
    found["running statistics"] = max(float((whole[n] - b).abs().max()) for n, b in reference.named_buffers())
    case.leave(*pipelines)
    return found


def side_by_side(peer: Peer, store: str) -> dict[str, Any]:
    """Two pipelines of two ranks each, with hooks on what is sent, and in an autocast region that ends before backward."""
    case.join(peer, store)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, found, told = groups[peer.rank // 2], {}, []
    x, y = case.batch("gpt", 0, 12)["x"], case.batch("gpt", 0, 12)["y"].flatten()

    def step(model: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x).flatten(0, 1), y)
        loss.backward()
        opt.step()
        told.append(loss.item())

    pipelines = []
    for schedule in ("gpipe", "1f1b"):
        torch.manual_seed(peer.rank // 2)
        model = case.GPT().float()
        reference = copy.deepcopy(model)
        sent: list[int] = []
        pipeline, opt = pipe(
            group,
            model,
            schedule,
            enter=lambda t: t / 2,
            leave=lambda t, sent=sent: sent.append(t.element_size()) or t * 2,
            on_begin=lambda: told.append("begin"),
            on_end=lambda: told.append("end"),
            on_cut=lambda p: told.append(len(p.held) > 0),
            agree=lambda costs: [1.0] * len(costs),
        )
        pipelines.append(pipeline)
        step(reference, case.optimizer(reference))
        step(model, opt)
        theirs = dict(reference.named_parameters())
        found[schedule] = max(float((p - theirs[n]).detach().abs().max()) for n, p in pipeline.held)
        found["cut"] = pipeline.cut_names
        expected = told.pop(0)
        *events, loss = told
        found["told"] = (
            events == [True, "begin", "end"] and abs(loss - expected) < 1e-2 and bool(sent) == (peer.rank in (0, 2))
        )
        told.clear()
    del group, groups
    case.leave(*pipelines)
    return found
