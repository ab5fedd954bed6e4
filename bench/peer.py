"""One training program for all peers: the same model, data, optimizer and loop, with DDP, with Paceline, or alone.

    torchrun --standalone --nproc-per-node 2 bench/peer.py --peer ddp --workload digits --out result.json
    paceline run bench/peer.py -n 2 -- --peer paceline --workload digits --out result.json

Rank 0 writes samples per second after warm-up, the last loss, and when the first step was done.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from workloads import WORKLOADS, Workload


class Peer:
    """What differs between peers. This one is plain PyTorch on one process."""

    rank, size = 0, 1

    def adopt(self, model: nn.Module, opt: Optimizer, train: DataLoader[Any]) -> tuple[nn.Module, Optimizer, Any]:
        return model, opt, train

    def loader(self, data: Any, rows: int) -> DataLoader[Any]:
        return DataLoader(data, batch_size=rows, shuffle=True)

    def epochs(self, n: int) -> Iterable[int]:
        return range(n)

    def close(self) -> None:
        pass


class Ddp(Peer):
    """DistributedDataParallel as its documentation writes it, on gloo."""

    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def adopt(self, model: nn.Module, opt: Optimizer, train: DataLoader[Any]) -> tuple[nn.Module, Optimizer, Any]:
        return nn.parallel.DistributedDataParallel(model), opt, train

    def loader(self, data: Any, rows: int) -> DataLoader[Any]:
        from torch.utils.data.distributed import DistributedSampler

        self.sampler: DistributedSampler[Any] = DistributedSampler(data)
        return DataLoader(data, batch_size=rows // self.size, sampler=self.sampler)

    def epochs(self, n: int) -> Iterable[int]:
        for epoch in range(n):
            self.sampler.set_epoch(epoch)
            yield epoch

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class Paceline(Peer):
    def __init__(self) -> None:
        import paceline

        self.job = paceline.job()
        self.rank, self.size = self.job.rank, self.job.size

    def adopt(self, model: nn.Module, opt: Optimizer, train: DataLoader[Any]) -> tuple[nn.Module, Optimizer, Any]:
        adopted: tuple[nn.Module, Optimizer, Any] = self.job.adopt(model, opt, train)
        return adopted

    def epochs(self, n: int) -> Iterable[int]:
        return self.job.epochs(n)


PEERS: dict[str, Callable[[], Peer]] = {"plain": Peer, "ddp": Ddp, "paceline": Paceline}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timed", type=int, help="epochs to time")
    parser.add_argument("--rows", type=int, help="of a global batch")
    parser.add_argument("--first-step", action="store_true", help="one step only")
    args = parser.parse_args()

    peer = PEERS[args.peer]()
    result = train(peer, WORKLOADS[args.workload], args.timed, args.first_step, args.rows)
    if peer.rank == 0:
        threads = {"threads": torch.get_num_threads(), "malloc": os.environ.get("MALLOC_MMAP_MAX_")}
        args.out.write_text(json.dumps({**result, **threads, "size": peer.size}))
    peer.close()


def train(
    peer: Peer, work: Workload, timed: int | None, first_step_only: bool, rows: int | None = None
) -> dict[str, Any]:
    """Train `warm_up` epochs, then the timed ones."""
    torch.manual_seed(0)
    rows = rows or work.rows(peer.size)
    train = peer.loader(work.data(rows * work.steps), rows)
    model = work.model()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, opt, train = peer.adopt(model, opt, train)

    timed = timed or work.timed
    result: dict[str, Any] = {}
    began, loss = 0.0, torch.zeros(())
    for epoch in peer.epochs(work.warm_up + timed):
        if epoch == work.warm_up:
            began = time.monotonic()
        for x, y in train:
            loss = step(model, opt, work.loss, x, y)
            if not result:
                result["first_step_at"] = time.monotonic()
                if first_step_only:
                    return result
    seconds = time.monotonic() - began
    result["samples_per_second"] = timed * work.steps * rows / seconds
    result["loss"] = loss.item()
    return result


def step(model: nn.Module, opt: Optimizer, loss_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    opt.zero_grad()
    loss = loss_of(model(x), y)
    loss.backward()
    opt.step()
    return loss


if __name__ == "__main__":
    main()
