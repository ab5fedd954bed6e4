"""The same training program with its model split by hand, from torch's own parts, as their documentation writes it.

    torchrun --standalone --nproc-per-node 2 bench/split_peer.py --how fsdp --workload gpt10m --out result.json

`bench/peer.py` under ``paceline run --strategy fsdp`` is the other side: the same model, data, optimizer, batches and number of steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from workloads import WORKLOADS, Workload

MICROBATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--how", choices=["fsdp", "hsdp", "tensor", "tensor_ddp", "gpipe", "1f1b"], required=True)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--rows", type=int, required=True, help="of a global batch")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    work = WORKLOADS[args.workload]
    runner = _pipeline if args.how in ("gpipe", "1f1b") else _alike
    result = runner(args.how, work, args.rows)
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps({**result, "size": dist.get_world_size()}))
    dist.barrier()
    dist.destroy_process_group()


# ---- every rank runs the loop ---------------------------------------------------------------------------------------
def _alike(how: str, work: Workload, rows: int) -> dict[str, Any]:
    size = dist.get_world_size()
    shape, names = {
        "fsdp": ((size,), ("shard",)),
        "hsdp": ((size // 2, 2), ("replicate", "shard")),
        "tensor": ((size,), ("tensor",)),
        "tensor_ddp": ((size // 2, 2), ("replicate", "tensor")),
    }[how]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    data = work.data(rows * work.steps)
    model = work.model()
    if how in ("fsdp", "hsdp"):
        readers, mine = size, dist.get_rank()
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        readers, mine = (1, 0) if how == "tensor" else (size // 2, mesh.get_local_rank("replicate"))
        _tensor_parallel(model, mesh["tensor"] if how == "tensor_ddp" else mesh)
    replicate = mesh.get_group("replicate") if how == "tensor_ddp" else None
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = _loader(data, rows, readers, mine)

    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = work.loss(model(x), y)
        loss.backward()
        if replicate is not None:
            for p in model.parameters():
                assert p.grad is not None
                local: Any = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                dist.all_reduce(local, dist.ReduceOp.AVG, group=replicate)
        opt.step()
        return loss

    return _timed(work, rows, loader, step)


def _blocks(model: nn.Module) -> list[nn.Module]:
    found: Any = getattr(model, "blocks", None)
    return list(found) if found is not None else list(model.children())


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Attention by heads is the reader's own work with a fused qkv; here feed-forward layers and the vocabulary are split."""
    if not hasattr(model, "blocks"):
        for i, pair in enumerate(_blocks(model)):
            for name, child in pair.named_modules():
                if isinstance(child, nn.Linear):
                    way = ColwiseParallel() if i % 2 == 0 else RowwiseParallel()
                    parallelize_module(pair, mesh, {name: way}) if name else None
        return
    for block in _blocks(model):
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _loader(data: Any, rows: int, readers: int, mine: int) -> DataLoader[Any]:
    from torch.utils.data.distributed import DistributedSampler

    sampler: Any = DistributedSampler(data, num_replicas=readers, rank=mine)
    return DataLoader(data, batch_size=rows // readers, sampler=sampler)


# ---- stages by hand -------------------------------------------------------------------------------------------------
class _Gpt(nn.Module):
    """A stage of the demo's model."""

    def __init__(self, model: Any, low: int, high: int) -> None:
        super().__init__()
        self.first, self.last = low == 0, high == len(model.blocks)
        self.blocks = nn.ModuleList(model.blocks[low:high])
        if self.first:
            self.embed, self.position = model.embed, model.position
        if self.last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.embed(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.last else x  # type: ignore[no-any-return]


def _stage(model: Any, rank: int, size: int) -> nn.Module:
    if hasattr(model, "blocks"):
        per = -(-len(model.blocks) // size)
        return _Gpt(model, rank * per, min((rank + 1) * per, len(model.blocks)))
    per = -(-len(model) // size)
    return nn.Sequential(*list(model)[rank * per : (rank + 1) * per])


def _pipeline(how: str, work: Workload, rows: int) -> dict[str, Any]:
    """Tied weights of first and last stage are kept in step by one sum of their gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    data = work.data(rows * work.steps)
    model: Any = work.model()
    tied = getattr(model, "embed", None)
    part = _stage(model, rank, size)
    stage = PipelineStage(part, rank, size, torch.device("cpu"))
    kind: Any = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[how]
    schedule = kind(stage, n_microbatches=MICROBATCHES, loss_fn=work.loss)
    opt = torch.optim.AdamW(part.parameters(), lr=1e-3)
    ends = dist.new_group([0, size - 1])

    def step(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(x)
        elif rank == size - 1:
            schedule.step(target=y, losses=losses)
        else:
            schedule.step()
        if tied is not None and rank in (0, size - 1):
            dist.all_reduce(tied.weight.grad, group=ends)
        opt.step()
        loss = torch.stack(losses).mean() if losses else torch.zeros(())
        dist.broadcast(loss, size - 1)
        return loss

    return _timed(work, rows, _loader(data, rows, 1, 0), step)


# ---- the clock --------------------------------------------------------------------------------------------------------
def _timed(
    work: Workload, rows: int, loader: DataLoader[Any], step: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    began, loss = 0.0, torch.zeros(())
    for epoch in range(work.warm_up + work.timed):
        sampler: Any = loader.sampler
        sampler.set_epoch(epoch)
        if epoch == work.warm_up:
            began = time.monotonic()
        for x, y in loader:
            loss = step(x, y)
    seconds = time.monotonic() - began
    return {"samples_per_second": work.timed * work.steps * rows / seconds, "loss": float(loss)}


if __name__ == "__main__":
    main()
