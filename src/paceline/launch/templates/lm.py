"""A small GPT learns to write Python, one byte at a time, from the sources of Python's own standard library.

    python lm.py                                      one process, 0.8 million parameters
    paceline run lm.py -n 2                           two processes: the same batches, the same curve
    paceline run lm.py -n 2 -- --width 384 --layers 6 --steps 5000    10.8 million parameters, an hour or two

The quality is measured in bits per byte: 8 is noise, a good compressor reaches about 2.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import paceline

NOTHING = -100  # what cross_entropy ignores: there is no byte to predict here


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a byte-level GPT on the standard library.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=12, help="pieces of text per step, over all processes")
    parser.add_argument("--context", type=int, default=64, help="bytes in a piece of text")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=300, metavar="BYTES", help="how much to write at the end")
    parser.add_argument("--save", metavar="FILE", help="write the trained weights there (safetensors)")
    return parser.parse_args()


# -- text


class Pieces(Dataset):
    """A text cut into pieces of `context` bytes; each byte's target is the byte that follows it."""

    def __init__(self, text, context):
        self.text, self.context = text, context

    def __len__(self):
        return math.ceil((len(self.text) - 1) / self.context)

    def __getitem__(self, index):
        start = index * self.context
        piece = self.text[start : start + self.context + 1].long()
        x, y = piece[:-1], piece[1:]
        short = self.context - len(x)  # only the last piece can be
        return F.pad(x, (0, short)), F.pad(y, (0, short), value=NOTHING)


def read_standard_library(num_bytes):
    """Two tensors of bytes, for training and for testing. Whole files go to one or the other, every tenth to the test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = {False: bytearray(), True: bytearray()}
    for number, file in enumerate(files):
        text[number % 10 == 9] += file.read_bytes()
    train, test = (torch.frombuffer(text[part], dtype=torch.uint8) for part in (False, True))
    return train[:num_bytes], test[:100_000]


# -- model


class Block(nn.Module):
    """Attention, then a two-layer network; each adds to what it was given."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x):
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class GPT(nn.Module):
    """Bytes in, scores for the next byte out. Reading and writing share one table of 256 vectors."""

    def __init__(self, context, width, layers, heads):
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.apply(self.initialize)
        self.head.weight = self.embed.weight

    @staticmethod
    def initialize(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, text):
        x = self.embed(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def write(self, prompt, num_bytes, temperature=0.7):
        """Continue `prompt` by `num_bytes`, each drawn from what the model expects."""
        text = torch.tensor([list(prompt.encode())])
        for _ in range(num_bytes):
            scores = self(text[:, -self.context :])[:, -1] / temperature
            text = torch.cat([text, torch.multinomial(scores.softmax(-1), 1)], dim=1)
        return bytes(text[0].tolist()).decode("utf-8", "replace")


# -- training


def loss_of(model, x, y):
    """Mean loss per byte in nats, and the number of bytes it is the mean of."""
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=NOTHING)
    return loss, int((y != NOTHING).sum())


def warm_up_then_cosine(steps, warm_up=20):
    """Factor of the learning rate: up in a straight line, down to a tenth along a cosine."""

    def factor(step):
        if step < warm_up:
            return (step + 1) / warm_up
        progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    return factor


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    train_text, test_text = read_standard_library(args.steps * args.batch_size * args.context)
    train = DataLoader(Pieces(train_text, args.context), batch_size=args.batch_size, shuffle=True)
    test = DataLoader(Pieces(test_text, args.context), batch_size=args.batch_size)
    epochs = math.ceil(args.steps / len(train))  # more than one when the library is shorter than that

    model = GPT(args.context, args.width, args.layers, args.heads)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, warm_up_then_cosine(epochs * len(train)))

    job = paceline.job()
    model, opt, train, test = job.adopt(model, opt, train, test)
    if job.main:
        num_parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{num_parameters:,} parameters, {len(train_text):,} bytes of Python, {epochs * len(train)} steps",
            flush=True,
        )

    for _ in job.epochs(epochs):
        for x, y in train:
            opt.zero_grad()
            loss, num_bytes = loss_of(model, x, y)
            job.weight(num_bytes)  # the loss is a mean over bytes, not over rows
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
            job.log(loss=loss)

        with job.evaluating(model):
            for x, y in test:
                loss, num_bytes = loss_of(model, x, y)
                job.count(bits=loss * num_bytes / math.log(2), bytes=num_bytes)
        job.log(bits_per_byte=job.ratio("bits", "bytes"))

    if job.main:
        print(f"{job.ratio('bits', 'bytes'):.3f} bits per byte on files that it had not seen")
    if job.main and args.sample:
        model.eval()
        print(model.write("def ", args.sample))
    if args.save:
        job.export(args.save)


if __name__ == "__main__":
    main()
