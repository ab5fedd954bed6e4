"""How many bytes of tensors this rank holds when it has trained; for test_pipeline.py."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline.place.absent import Absent

model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(12)))
opt = torch.optim.AdamW(model.parameters())
train = DataLoader(TensorDataset(torch.randn(18, 512)), batch_size=6)
job = paceline.job()
model, opt, train = job.adopt(model, opt, train)
for _ in job.epochs(1):
    for (x,) in train:
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
gc.collect()
tensors = [
    t for t in gc.get_objects() if isinstance(t, Tensor) and not isinstance(t, Absent) and t.device.type == "cpu"
]
held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
mine = sum(p.numel() for p in model.parameters() if not isinstance(p, Absent))
Path(sys.argv[1], f"{job.rank}.json").write_text(json.dumps({"held": held, "mine": mine}))
