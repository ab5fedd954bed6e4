"""Models, loops and comparisons for the tests of the pipeline. A loop here is what a user writes; nothing in it knows a pipeline."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from paceline.group.store import UnixStore
from paceline.place.absent import Absent
from paceline.place.pipeline import Pipeline
from support.peers import Peer

STORES: list[UnixStore] = []
"""Kept: torch holds only the C++ half of a store that is written in Python."""

ROWS, TIME, CLASSES, VOCABULARY = 12, 6, 5, 31


def join(peer: Peer, store: str) -> dist.ProcessGroup:
    """The group of all peers."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    patience = timedelta(seconds=60)
    STORES.append(UnixStore(store, patience))
    dist.init_process_group("gloo", store=STORES[0], rank=peer.rank, world_size=peer.size, timeout=patience)
    group = dist.group.WORLD
    assert group is not None
    return group


# ---- models ---------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Attention, then a small network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Reading and writing share one table."""

    def __init__(self, width: int = 16, layers: int = 5) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(TIME, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask, and a mean over what is not padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, text: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(self.embed(text), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(x.dtype)
        return self.head((x * kept).sum(1) / kept.sum(1))


class Skips(nn.Module):
    """Tensors of early blocks are used by late ones; the outputs are a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        kept = []
        for layer in self.down:
            x = layer(x).tanh()
            kept.append(x)
        for layer in self.up:
            x = layer(x + kept.pop()).tanh()
        return {"logits": self.head(x), "features": x}


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, CLASSES),
    )


def hugging_face(name: str) -> nn.Module:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "gpt2":
        config = t.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=4,
            n_head=2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
        return t.GPT2LMHeadModel(config)
    if name == "llama":
        return t.LlamaForCausalLM(
            t.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=16, **small)
        )
    if name == "bert":
        config = t.BertConfig(
            vocab_size=VOCABULARY,
            num_labels=CLASSES,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **small,
        )
        return t.BertForSequenceClassification(config)
    config = t.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **small,
    )
    return t.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": perceptron,
    "gpt": GPT,
    "encoder": Encoder,
    "skips": Skips,
    **{name: (lambda name=name: hugging_face(name)) for name in ("gpt2", "llama", "bert", "vit")},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


# ---- batches and losses ---------------------------------------------------------------------------------------------
def batch(name: str, step: int, rows: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    if name in ("mlp", "skips"):
        return {"x": torch.randn(rows, 8, generator=draw), "y": torch.randint(CLASSES, (rows,), generator=draw)}
    if name == "vit":
        x = torch.randn(rows, 1, 8, 8, generator=draw)
        return {"x": x, "y": torch.randint(CLASSES, (rows,), generator=draw)}
    text = torch.randint(VOCABULARY, (rows, TIME), generator=draw)
    lengths = torch.randint(2, TIME + 1, (rows,), generator=draw)
    padding = torch.arange(TIME)[None, :] >= lengths[:, None]
    if name in ("encoder", "bert"):
        return {"x": text, "padding": padding, "y": torch.randint(CLASSES, (rows,), generator=draw)}
    following = torch.roll(text, -1, 1).masked_fill(padding, -100)
    return {"x": text, "padding": padding, "y": following}


def loss_of(name: str, model: nn.Module, given: dict[str, Tensor]) -> tuple[Any, Any]:
    """The loss, and something to look at besides."""
    x, y = given["x"], given["y"]
    if name == "mlp":
        out = model(x)
        return F.cross_entropy(out, y, label_smoothing=0.1) + 1e-2 * out.pow(2).mean(), (out.argmax(-1) == y).sum()
    if name == "skips":
        out = model(x)
        loss = F.cross_entropy(out["logits"], y, weight=torch.linspace(0.5, 2, CLASSES)) / 2
        return loss + 0.1 * out["features"].abs().sum(1).mean(), out["logits"].max()
    if name == "gpt":
        out = model(x)
        return F.cross_entropy(out.flatten(0, 1), y.flatten()), out.mean()
    if name == "encoder":
        out = model(x, given["padding"])
        return F.cross_entropy(out, y), (out.argmax(-1) == y).double().mean()
    if name == "bert":
        out = model(input_ids=x, attention_mask=(~given["padding"]).long(), labels=y)
        return out.loss, (out.logits.argmax(-1) == y).sum()
    if name == "vit":
        out = model(x).logits
        return F.cross_entropy(out, y), (out.argmax(-1) == y).sum()
    out = model(input_ids=x, attention_mask=(~given["padding"]).long(), labels=given["y"], use_cache=False)
    return out.loss, out.logits.mean()


def masked_tokens(name: str, model: nn.Module, given: dict[str, Tensor]) -> tuple[Any, Any]:
    """A mean over tokens that a mask keeps, written out by hand."""
    out, y = model(given["x"]), given["x"]
    keep = (~given["padding"]).double()
    each = F.cross_entropy(out.reshape(-1, VOCABULARY), y.view(-1), reduction="none").view(y.shape[0], -1)
    loss = (each * keep).sum() / keep.sum() + 1e-3 * (out.logsumexp(-1).pow(2) * keep).sum() / keep.sum()
    return loss, ((out.argmax(-1) == y) * keep).sum()


def contrastive(name: str, model: nn.Module, given: dict[str, Tensor]) -> tuple[Any, Any]:
    """Each row is told from all others."""
    z = F.normalize(model(given["x"]), dim=-1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z))), z.sum()


LOSSES = {"own": loss_of, "masked": masked_tokens, "contrastive": contrastive}


# ---- the loop -------------------------------------------------------------------------------------------------------
def train(
    name: str,
    model: nn.Module,
    opt: torch.optim.Optimizer,
    steps: int,
    *,
    accumulate: int = 1,
    clip: float = 0.0,
    rows: list[int],
    loss: str = "own",
) -> list[list[float]]:
    """The user's loop. Returns what it has read: per backward the loss and something else, per step the norm."""
    seen: list[list[float]] = []
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.7)
    number = 0
    for _ in range(steps):
        opt.zero_grad()
        for _ in range(accumulate):
            given = batch(name, number, rows[number % len(rows)])
            number += 1
            value, other = LOSSES[loss](name, model, given)
            (value / accumulate).backward()
            seen.append([value.item(), other.item()])
        if clip:
            seen[-1].append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        opt.step()
        schedule.step()
    return seen


def optimizer(model: nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), 3e-3, eps=1e-4)


def leave(*pipelines: Pipeline) -> None:
    """Nothing of the group is left when the interpreter ends."""
    for pipeline in pipelines:
        pipeline.close()
    gc.collect()
    dist.destroy_process_group()


def parities(peer: Peer, store: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several cases on the same processes."""
    group = join(peer, store)
    found = [parity(group, **case) for case in cases]
    leave()
    return found


def parity(
    group: dist.ProcessGroup,
    name: str,
    schedule: str,
    steps: int = 6,
    microbatches: int = 4,
    cuts: list[str] | None = None,
    adamw: bool = False,
    **loop: Any,
) -> dict[str, Any]:
    """Train by a pipeline and in one process: the largest differences of parameters, of what was read, of evaluation."""
    loop = {"rows": [ROWS], **loop}
    kind = "adamw" if adamw else "sgd"
    reference = build(name)
    expected = train(name, reference, optimizer(reference, kind), steps, **loop)
    model = build(name)
    opt = optimizer(model, kind)
    pipeline = Pipeline(group, torch.device("cpu"), schedule=schedule, microbatches=microbatches, cuts=cuts)
    pipeline.place(model, [opt])
    modes: list[str] = []
    pipeline.watch = lambda trip: modes.append(trip.mode)
    found = train(name, model, opt, steps, **loop)
    theirs = dict(reference.named_parameters())
    read = [abs(a - b) for mine, other in zip(found, expected, strict=True) for a, b in zip(mine, other, strict=True)]
    begin = dict(build(name).named_parameters())
    result = {
        "moved": max(float((theirs[n] - begin[n]).detach().abs().max()) for n in theirs),
        "modes": modes,
        "params": max((float((p - theirs[n]).detach().abs().max()) for n, p in pipeline.held), default=0.0),
        "read": max(read),
        "held": [n for n, _ in pipeline.held],
        "absent": sum(isinstance(p, Absent) for p in model.parameters()),
        "stages": [[s.first, s.last] for s in pipeline.parts.stages],
        "text": pipeline.describe(),
    }
    given = batch(name, 1000, 7)
    model.eval()
    reference.eval()
    with torch.no_grad():
        result["evaluation"] = abs(float(loss_of(name, model, given)[0]) - float(loss_of(name, reference, given)[0]))
    whole, full = pipeline.state.whole(everywhere=True), reference.state_dict()
    result["whole"] = max(float((whole[n] - t).abs().max()) for n, t in full.items() if n in whole)
    result["names"] = sorted(whole) == sorted(
        {n for n, _ in [*reference.named_parameters(), *reference.named_buffers()]}
    )
    pipeline.close()
    return result
