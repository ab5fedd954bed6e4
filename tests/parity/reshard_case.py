"""A plain PyTorch program, adopted: trains digits for two epochs, and may break off in the middle.

With ``--begun`` it writes, before its first step, the parameters and the optimizer's state that all ranks together begin with.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--stop", type=int, default=-1, help="break off after so many steps")
parser.add_argument("--begun", type=Path)
parser.add_argument("--strategy", help="where nobody else says so")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
digits = load_digits()
x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))
opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.StepLR(opt, 5, gamma=0.7)
train = DataLoader(TensorDataset(x[:720], y[:720]), batch_size=60, shuffle=True)
job = paceline.job(args.strategy)
model, opt, schedule, train = job.adopt(model, opt, schedule, train)
begun = False
for _ in job.epochs(2):
    for xb, yb in train:
        opt.zero_grad()
        loss = F.cross_entropy(model(xb), yb)
        if args.begun and not begun:
            state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            names = [name for name, _ in model.named_parameters()]
            for number, kept in opt.state_dict()["state"].items():
                state |= {f"optimizers/0/state/model.{names[number]}/{k}": v.contiguous() for k, v in kept.items()}
            if job.main:
                save_file(state, args.begun)
        begun = True
        loss.backward()
        opt.step()
        schedule.step()
        if job.clock.step == args.stop:
            sys.exit(3)
        job.log(loss=loss)
job.export(args.out)
