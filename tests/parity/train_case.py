"""A plain PyTorch program, adopted: trains one model under several settings and writes the weights of each.

Run by `python` and by `paceline run`; test_parity compares what they wrote.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline


class Gpt(nn.Module):
    """Two blocks, tied embedding and head."""

    def __init__(self, vocabulary=61, width=24, context=12):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        layer = {"d_model": width, "nhead": 3, "dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**layer, norm_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


class HuggingFace(nn.Module):
    """A transformers model built from its config. GPT-2, because it keeps to its dtype: Llama's norm computes in float32,
    whose rounding would hide what is compared here."""

    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
        self.inner = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    def forward(self, tokens):
        return self.inner(tokens).logits


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


def build(name):
    if name == "mlp":
        return nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 10))
    if name == "wide":  # enough elements for the optimizer's step to be divided between ranks
        return nn.Sequential(nn.Linear(64, 1100), nn.Tanh(), nn.Linear(1100, 1000), nn.Tanh(), nn.Linear(1000, 10))
    if name == "cnn":
        return cnn().to(memory_format=torch.channels_last)
    return Gpt() if name == "gpt" else HuggingFace()


def data(name, dtype, rows=137):
    g = torch.Generator().manual_seed(5)
    if name in ("gpt", "hf"):
        tokens = torch.randint(1, 61, (rows, 12), generator=g)
        lengths = torch.randint(3, 13, (rows,), generator=g)
        return TensorDataset(tokens.where(torch.arange(12) < lengths[:, None], 0))
    shape = (rows, 64) if name in ("mlp", "wide") else (rows, 1, 8, 8)
    return TensorDataset(torch.randn(shape, generator=g).to(dtype), torch.randint(10, (rows,), generator=g))


SETTINGS = {
    "clip": {"optimizer": "sgd", "clip": 0.05},
    "accumulate": {"optimizer": "adamw", "accumulate": 3},
    "tokens": {"optimizer": "rmsprop", "tokens": True},
    "zeros": {"optimizer": "sgd", "set_to_none": False},
    "float32": {"optimizer": "sgd", "dtype": torch.float32},
}


def optimizer_for(name, model):
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest}]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=3e-3, amsgrad=True)
    return torch.optim.RMSprop(groups, lr=1e-3, momentum=0.8)


def loss_of(name, model, batch, job, tokens):
    if name in ("gpt", "hf"):
        x = batch[0]
        target = x[:, 1:]
        per_token = F.cross_entropy(model(x[:, :-1]).transpose(1, 2), target, ignore_index=0, reduction="none")
        if tokens:
            n = (target != 0).sum()
            job.weight(n)
            return per_token.sum() / n
        return per_token.mean()
    x, y = batch
    per_row = F.cross_entropy(model(x), y, reduction="none")
    if tokens:  # rows weighted unequally: the loss is a mean over the sum of their weights
        w = 1.0 + (y % 3).to(per_row.dtype)
        job.weight(w.sum())
        return (per_row * w).sum() / w.sum()
    return per_row.mean()


def train(job, name, steps, optimizer, clip=0.0, accumulate=1, tokens=False, set_to_none=True, dtype=torch.float64):
    torch.manual_seed(11)
    model = build(name).to(dtype)
    model.train(name != "cnn")
    opt = optimizer_for(optimizer, model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=steps)
    loader = DataLoader(data(name, dtype), batch_size=26, shuffle=True)  # 137 rows: five batches and a last one of 7
    model, opt, scheduler, loader = job.adopt(model, opt, scheduler, loader)
    done = batches = 0
    while done < steps:
        for batch in loader:
            loss = loss_of(name, model, batch, job, tokens) / accumulate
            loss.backward()
            batches += 1
            if batches % accumulate:
                continue
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            scheduler.step()
            opt.zero_grad(set_to_none=set_to_none)
            done += 1
            if done == steps:
                break
    return model, opt


def result(model, opt):
    """Weights and the optimizer's whole state, by name."""
    states = opt.state_dict()["state"]
    state = {f"optimizer.{i}.{k}": torch.as_tensor(v) for i, s in states.items() for k, v in s.items() if v is not None}
    return {**model.state_dict(), **state}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=["mlp", "cnn", "gpt", "hf", "wide"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    job = paceline.job()
    for setting in args.settings:
        model, opt = train(job, args.model, args.steps, **SETTINGS[setting])
        got = result(model, opt)  # on all ranks: where a model is split, its parts are put together
        if job.main:
            torch.save(got, args.out / f"{setting}.pt")


if __name__ == "__main__":
    main()
