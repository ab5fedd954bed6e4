"""What sharding refuses, when it asks what, and how much memory it takes: for peers of test_shard.py."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from paceline.group.shm_wire import ShmWire
from paceline.place.shard import Sharded, after_sharded_backward
from paceline.place.shard_deferred import Deferred
from peers.shard_case import mesh_of
from peers.shard_habits import Blocks, adamw, blocks, numbers
from peers.shard_models import CASES
from support.peers import Peer, outcome


# ---- refusals -------------------------------------------------------------------------------------------------------
class Scalar(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))


def hooked() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight.register_hook(lambda g: g * 2)
    return model


def mixed() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4).double()})


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x


class Reentrant(Blocks):
    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + checkpoint(block, x, use_reentrant=True)


def refused(peer: Peer, mesh: DeviceMesh) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def ask(name: str, call: Callable[[], Any]) -> None:
        found[name] = outcome(call).get("code")

    def place(model: nn.Module, *optimizers: Any, **settings: Any) -> None:
        Sharded(mesh, factor=lambda: 0.5, **settings).place(model, optimizers)

    flat = DeviceMesh("cpu", [[*range(peer.size)]], _init_backend=False)
    ask("stage", lambda: place(nn.Linear(4, 4), stage=4))
    ask("mesh", lambda: Sharded(flat, factor=lambda: 1.0))
    ask("recompute", lambda: place(nn.Linear(4, 4), recompute="some"))
    ask("offload", lambda: place(nn.Linear(4, 4), offload=True))
    ask("scalar", lambda: place(Scalar()))
    ask("hook", lambda: place(hooked()))
    ask("sparse", lambda: place(nn.Embedding(9, 4, sparse=True)))
    ask("list", lambda: place(nn.ModuleList([nn.Linear(4, 4)])))
    ask("types", lambda: place(Holder(mixed())))
    ask("sums", lambda: place(nn.Linear(4, 4), precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    both = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ask("double", lambda: place(nn.Linear(4, 4).double(), precision=both))
    matrix = nn.Linear(4, 4, bias=False)
    ask("muon", lambda: place(matrix, torch.optim.Muon(matrix.parameters())))
    ask("adafactor", lambda: place(matrix, torch.optim.Adafactor(matrix.parameters())))
    twice = nn.Linear(4, 4)
    ask("first", lambda: place(twice))
    ask("twice", lambda: place(twice))
    model = blocks(kind=Reentrant)
    place(model)
    x, y = numbers(8)(torch.Generator().manual_seed(1), 4)
    ask("reentrant", lambda: F.cross_entropy(model(x.requires_grad_()), y).backward())
    return found


# ---- when -------------------------------------------------------------------------------------------------------------
class Counting(ShmWire):
    """Counts what ranks meet for."""

    met: Counter[str]

    def barrier(self, tag: str) -> None:
        self.__dict__.setdefault("met", Counter())[tag.partition(" of ")[0]] += 1
        super().barrier(tag)


def traffic(peer: Peer, mesh: DeviceMesh) -> dict[str, Any]:
    """By stage: how many gathers and sums two backwards and a step take; and what happens when ranks call other blocks."""
    found: dict[str, Any] = {}
    wire = Counting(peer.arena_fd, peer.rank, peer.size, peer.board, peer.activity)
    try:
        for stage in (1, 2, 3):
            model = blocks()  # 3 blocks and the root
            opt = adamw(model)
            Sharded(mesh, stage=stage, factor=lambda: 0.5, wire=wire).place(model, [opt])
            x, y = numbers(8)(torch.Generator().manual_seed(1), 4)
            for _ in range(2):
                wire.met.clear()
                for _ in range(2):
                    F.cross_entropy(model(x), y).backward()
                opt.step()
                found.setdefault(str(stage), []).append(dict(wire.met))
        model = blocks()
        Sharded(mesh, factor=lambda: 0.5, wire=wire).place(model)
        x = torch.ones(2, 12, dtype=torch.float64)
        found["parted"] = outcome(lambda: float(model.blocks[peer.rank](x).sum())).get("code")
    finally:
        wire.close()
    return found


def order(peer: Peer, mesh: DeviceMesh) -> list[str]:
    """What happens in one backward, in order."""
    said: list[str] = []
    model = blocks()

    def factor() -> float:
        said.append("factor")
        return 0.5

    sharded = Sharded(mesh, factor=factor)
    sharded.place(model)
    (weight,) = [p for name, p in sharded.held if name == "first.weight"]

    def ended() -> None:
        said.append("ended" if weight.grad is not None and model.first.weight is weight else "not yet")

    def begun(g: Tensor) -> None:
        said.append("begun")
        after_sharded_backward(ended)

    for _ in range(2):
        x, y = numbers(8)(torch.Generator().manual_seed(1), 4)
        out = model(x)
        out.register_hook(begun)
        F.cross_entropy(out, y).backward()
        said.append("returned")
        model.zero_grad()
    describe = sharded.describe()
    assert "blocks.2" in describe
    assert "(root)" in describe
    return said


def lower_precision(peer: Peer, mesh: DeviceMesh) -> list[str]:
    """bfloat16 where it was asked for, and only there."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    opt = adamw(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    Sharded(mesh, precision=policy, factor=lambda: 0.5).place(model, [opt])
    out = model(torch.randn(3, 8))
    out.float().square().mean().backward()
    opt.step()
    grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    return [str(t) for t in ({out.dtype} | grads | {p.dtype for p in model.parameters()})]


# ---- state ------------------------------------------------------------------------------------------------------------
def kept(peer: Peer, mesh: DeviceMesh) -> list[bool]:
    """Whole and cut undo each other; names, identity and classes stay; loading overwrites what was gathered."""
    torch.manual_seed(4)
    model = CASES["gpt"].build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kind, ident, names = type(model), id(model), list(model.state_dict())
    sharded = Sharded(mesh, factor=lambda: 0.5, stage=1)
    sharded.place(model)
    same = all(torch.equal(Sharded.whole(p), before[name]) for name, p in model.named_parameters())
    parts = [Sharded.cut(p, before[name]) for name, p in model.named_parameters()]
    back = all(torch.equal(Sharded.whole(c), w) for c, w in zip(parts, before.values(), strict=True))
    text = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        first = model(text)
        sharded.load(lambda name: before[name] * 0.5)
        fresh = CASES["gpt"].build()
        fresh.load_state_dict({**fresh.state_dict(), **{n: t * 0.5 for n, t in before.items()}})
        fresh.head.weight = fresh.embed.weight  # type: ignore[union-attr]
        loaded = torch.allclose(model(text), fresh(text)) and not torch.allclose(model(text), first)
    tied = model.head.weight is model.embed.weight  # type: ignore[union-attr]
    return [
        same,
        back,
        isinstance(model, kind),
        id(model) == ident,
        names == list(model.state_dict()),
        loaded,
        tied,
    ]


# ---- memory -----------------------------------------------------------------------------------------------------------
def wide(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))


def held_nbytes() -> int:
    """Bytes of all tensors that this process holds."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.device.type == "cpu"]
    plain = [getattr(t, "_local_tensor", t) for t in tensors]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in plain}.values())


def memory(peer: Peer, mesh: DeviceMesh, width: int, layers: int) -> dict[str, float]:
    """By stage: bytes of parameters, gradients and state on this rank, in shares of those of one process."""
    found = {}
    for stage in (1, 2, 3):
        before = held_nbytes()
        model = wide(width, layers)
        count = sum(p.numel() for p in model.parameters())
        opt = adamw(model)
        Sharded(mesh, stage=stage, factor=lambda: 1 / peer.size).place(model, [opt])
        model(torch.randn(2, width)).square().mean().backward()
        opt.step()
        found[str(stage)] = (held_nbytes() - before) / (16 * count)
        del model, opt
    return found


def built_in_parts(peer: Peer, mesh: DeviceMesh) -> dict[str, Any]:
    """Every case built in parts, then trained: start values bit for bit, and what was held meanwhile."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        if name.startswith("hf") and peer.size == 2:  # these are tried by make soak
            continue
        torch.manual_seed(5)
        plain = case.build()
        after = torch.get_rng_state()
        torch.manual_seed(5)
        with Deferred(peer.size, peer.rank, large=64) as deferred:
            model = case.build()
        opt = adamw(model)
        drawn = bool(torch.equal(after, torch.get_rng_state()))
        sharded = Sharded(mesh, factor=lambda: 1 / peer.size)
        sharded.place(model, [opt], deferred)
        expected = dict(plain.named_parameters())
        same = all(torch.equal(Sharded.whole(p), expected[n]) for n, p in model.named_parameters())
        g = torch.Generator().manual_seed(1)
        x, y = case.batch(g, 2)
        case.loss(model, x.float() if x.is_floating_point() else x, y).backward()
        opt.step()
        found[name] = [drawn, same]
    before = held_nbytes()
    with Deferred(peer.size, peer.rank) as deferred:
        model = wide(1024, 8)
    found["share"] = (held_nbytes() - before) / sum(p.nbytes for p in model.parameters())
    found["read"] = outcome(lambda: _read(peer)).get("code")
    found["copied"] = _copied(peer)
    return found


def _read(peer: Peer) -> None:
    with Deferred(peer.size, peer.rank):
        layer = nn.Linear(1024, 1024)
        float(layer.weight.norm())


def _copied(peer: Peer) -> bool:
    """Initialisers that read, views, copies and conversions end with the numbers of the plain program."""

    def build() -> nn.Module:
        torch.manual_seed(1)
        layer = nn.Linear(30, 20)
        nn.init.orthogonal_(layer.weight)
        other = copy.deepcopy(layer)
        nn.init.trunc_normal_(other.weight, std=0.5)
        other.weight.data[3].zero_()
        other.weight.data[:, 2:4].mul_(0.5)
        third = nn.Linear(30, 20)
        nn.init.sparse_(third.weight, 0.3)
        fourth = nn.Linear(30, 20)
        nn.init.eye_(fourth.weight)
        fourth.extra = extra = nn.Parameter(torch.empty(20, 7))
        nn.init.normal_(extra)
        start = torch.randn(20, 7)
        fourth.alias = nn.Parameter(start)
        start.mul_(2)
        return nn.ModuleList([layer, other, third, fourth]).double()

    plain = build()
    with Deferred(peer.size, peer.rank, large=64) as deferred:
        model = build()
    deferred.restore((model,))
    low = -(-20 // peer.size) * peer.rank
    part = slice(low, low + -(-20 // peer.size))
    return all(torch.equal(p[part], q[part]) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def limits(peer: Peer, store: str, names: list[str], **arguments: Any) -> dict[str, Any]:
    """Call these functions of this module, one after the other."""
    with mesh_of(peer, store) as mesh:
        return {name: globals()[name](peer, mesh, **arguments) for name in names}
