"""What the tests of tensor parallelism run on each rank: models, loops, and the same loop on a whole model beside it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import paceline
from paceline.group.store import UnixStore
from paceline.place.tensor import TensorParallel
from support.peers import Peer

Loss = Callable[[nn.Module, int], Tensor]
ROWS, TIME, WORDS = 4, 8, 96


@contextmanager
def group(peer: Peer, store: str) -> Iterator[DeviceMesh]:
    """A gloo group of all peers, as a mesh of one axis."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)
    store = UnixStore(store, patience)
    dist.init_process_group("gloo", store=store, rank=peer.rank, world_size=peer.size, timeout=patience)
    try:
        yield init_device_mesh("cpu", (peer.size,), mesh_dim_names=("tensor",))
    finally:
        dist.destroy_process_group()


# ---- models and their losses, in float64 -------------------------------------------------------------------------------
def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def ids(seed: int, words: int = WORDS) -> Tensor:
    return torch.randint(0, words, (ROWS, TIME), generator=draws(seed))


def labels(seed: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (ROWS,), generator=draws(seed + 500))


def floats(seed: int, *shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=draws(seed), dtype=torch.float64)


def lm_module() -> Any:
    path = Path(paceline.__file__).parent / "launch" / "templates" / "lm.py"
    spec = importlib.util.spec_from_file_location("lm_template", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mlp(width: int = 48) -> tuple[nn.Module, Loss]:
    layers = [nn.Linear(16, width), nn.GELU(), nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 5)]
    return nn.Sequential(*layers), lambda m, i: F.cross_entropy(m(floats(i, 16)), labels(i, 5))


def lm() -> tuple[nn.Module, Loss]:
    def loss(m: nn.Module, i: int) -> Tensor:
        return F.cross_entropy(m(ids(i, 256)).flatten(0, 1), ids(i + 1, 256).flatten())

    return lm_module().GPT(TIME, 32, 2, 4), loss


class Separate(nn.Module):
    """Attention with separate projections, head counts written down, a scale learned per head and a gated network."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q, self.k, self.v, self.merge = (nn.Linear(width, width) for _ in range(4))
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.gate_up, self.fold = nn.Linear(width, 6 * width), nn.Linear(3 * width, width)
        self.norm, self.per_head = nn.LayerNorm(width), nn.LayerNorm(self.size)
        self.unused = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (f(x).view(b, t, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = self.per_head(q) * self.temperature
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / self.size**0.5
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, t, w)
        x = x + self.merge(y)
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.fold(F.silu(gate) * up)


def separate() -> tuple[nn.Module, Loss]:
    model = nn.Sequential(Separate(), Separate())
    model[0].norm.weight.requires_grad_(False)
    model[1].q.weight.requires_grad_(False)
    return model, lambda m, i: m(floats(i, TIME, 32)).pow(2).mean()


def encoder() -> tuple[nn.Module, Loss]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
    padding = torch.zeros(ROWS, TIME, dtype=torch.bool)
    padding[:, -1] = True
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, lambda m, i: m(floats(i, TIME, 32), src_key_padding_mask=padding).pow(2).mean()


def gpt2() -> tuple[nn.Module, Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    c = GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(c), lambda m, i: F.cross_entropy(m(ids(i)).logits.flatten(0, 1), ids(i + 1).flatten())


def llama() -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(c), lambda m, i: F.cross_entropy(m(ids(i)).logits.flatten(0, 1), ids(i + 1).flatten())


def bert() -> tuple[nn.Module, Loss]:
    from transformers import BertConfig, BertForSequenceClassification

    c = BertConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=3, max_position_embeddings=32,
    )  # fmt: skip
    mask = torch.ones(ROWS, TIME, dtype=torch.long)
    mask[0, 5:] = 0
    return BertForSequenceClassification(c), lambda m, i: m(ids(i), attention_mask=mask, labels=labels(i, 3)).loss


def vit() -> tuple[nn.Module, Loss]:
    from transformers import ViTConfig, ViTForImageClassification

    c = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(c), lambda m, i: F.cross_entropy(m(floats(i, 3, 16, 16)).logits, labels(i, 3))


MODELS: dict[str, Callable[[], tuple[nn.Module, Loss]]] = {
    "mlp": mlp, "lm": lm, "separate": separate, "encoder": encoder, "gpt2": gpt2, "llama": llama, "bert": bert, "vit": vit,
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Loss]:
    torch.manual_seed(7)
    model, loss = MODELS[name]()
    return model.double().train(), loss


def optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(params, lr=1e-3, foreach=kind == "adamw-foreach")


# ---- what ranks do -----------------------------------------------------------------------------------------------------
def loop(
    model: nn.Module, opt: torch.optim.Optimizer, loss: Loss, steps: int, place: TensorParallel | None
) -> list[float]:
    """Accumulation over two batches, clipping, an evaluation after each third step; losses and gradient norms."""
    torch.manual_seed(11)
    said = []
    for step in range(steps):
        opt.zero_grad()
        for half in range(2):
            (loss(model, 2 * step + half) / 2).backward()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        said.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        if place is not None and step % 2:
            with place.stepping(opt):
                opt.step()
        else:
            opt.step()
        if step % 3 == 2:
            model.eval()
            with torch.no_grad():
                said.append(float(loss(model, 10_000 + step)))
            model.train()
    return said


def parity(mesh: DeviceMesh, cases: list[tuple[str, str]], steps: int) -> dict[str, Any]:
    """For each model and optimizer: the largest difference of losses, parameters and optimizer state, and what was split."""
    said = {}
    for name, kind in cases:
        reference, loss = made(name)
        model, _ = made(name)
        opt, opt_reference = optimizer(kind, model), optimizer(kind, reference)
        place = TensorParallel(mesh)
        place.place(model, [opt])
        expected = loop(reference, opt_reference, loss, steps, None)
        got = loop(model, opt, loss, steps, place)
        theirs = dict(reference.named_parameters())
        assert [name for name, _ in place.held] == list(theirs)
        assert list(model.state_dict()) == list(reference.state_dict())
        apart = [(place.whole(p) - theirs[key]).abs().max().item() for key, p in place.held]
        state = [
            (place.whole(mine, like=p) - opt_reference.state[theirs[key]][what]).abs().max().item()
            for key, p in place.held
            for what, mine in opt.state.get(p, {}).items()
        ]
        grads = all(p.grad is None or p.grad.placements == p.placements for _, p in place.held)
        split = sum(p.numel() for key, p in place.held if place.plan[key].dim is not None)
        said[f"{name}-{kind}"] = {
            "loss": max(abs(a - b) for a, b in zip(got, expected, strict=True)),
            "parameters": max(apart),
            "state": max(state, default=0.0),
            "grads": grads,
            "split": split / sum(p.numel() for p in theirs.values()),
            "whole": [f"{reason}: {origins}" for reason, origins in place.group.whole],
            "table": place.describe(),
        }
    return said
