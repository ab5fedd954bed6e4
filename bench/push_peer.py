"""One worker pushes gradients to a server and pulls the parameters, step after step: with Paceline, with Ray, with gloo.

    paceline run bench/push_peer.py --strategy "ps()" --run-dir DIR -- --peer paceline --mb 16 --out DIR.json
    python bench/push_peer.py --peer gloo --mb 16 --out result.json

The model is `mb` matrices of 1 MiB. Nothing is computed: gradients are constants, set by hand. The server takes a step of torch's
SGD, and the worker has the new parameters in its model before the next step. What they must be in the end is known exactly, and
checked. Written down are the seconds of each step and the CPU seconds that the servers used meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

LR, GRADIENT = 2.0**-4, 2.0**-10  # every parameter is exact in float32 after a thousand steps
SIDE = 512  # of a matrix: 1 MiB of float32
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--mb", type=int, required=True, help="MiB of parameters")
    parser.add_argument("--warm", type=int, default=3, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=20, help="steps that do")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--store", help="of gloo's server: where the two find each other")
    args = parser.parse_args()
    result = PEERS[args.peer](args)
    if args.out:
        args.out.write_text(json.dumps({**result, "mb": args.mb, "threads": torch.get_num_threads()}))


def model_of(mb: int) -> nn.ParameterList:
    return nn.ParameterList(torch.ones(SIDE, SIDE) for _ in range(mb))


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.full_like(p, GRADIENT) for p in model.parameters()]


def timed(
    args: argparse.Namespace,
    model: nn.Module,
    step: Callable[[], None],
    servers: Callable[[], float],
    before: Callable[[], None] = lambda: None,
) -> Result:
    """Take all steps.

    Args:
        step: Pushes and pulls once; this is timed.
        before: What comes before each step; this is not.
        servers: CPU seconds that the servers have used so far.

    Raises:
        AssertionError: The parameters are not what these gradients make of them.
    """
    seconds = []
    used = 0.0
    for number in range(args.warm + args.steps):
        if number == args.warm:
            used = servers()
        before()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    used = servers() - used
    expected = 1.0 - len(seconds) * LR * GRADIENT
    assert all(p.eq(expected).all() for p in model.parameters()), f"a parameter is not {expected}"
    return {"seconds": seconds[args.warm :], "server_cpu": used / args.steps}


def cpu_seconds(*processes: psutil.Process) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)


# ---- Paceline -------------------------------------------------------------------------------------------------------
def paceline_worker(args: argparse.Namespace) -> Result:
    import paceline

    job = paceline.job()
    model = model_of(args.mb)
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(range(args.warm + args.steps), batch_size=1)
    model, opt, loader = job.adopt(model, opt, loader)
    grads = gradients(model)
    batches: Any = iter(loader)
    entries = json.loads((args.out.parent / "run" / "processes.json").read_text())
    servers = [psutil.Process(entry["pid"]) for entry in entries if entry["role"] == "server"]

    def before() -> None:
        next(batches)
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad

    return timed(args, model, opt.step, lambda: cpu_seconds(*servers), before)


# ---- gloo -----------------------------------------------------------------------------------------------------------
def flat_model(mb: int) -> tuple[nn.ParameterList, Tensor, Tensor]:
    """The model, with all parameters and all gradients in one tensor each: one message, and no copy."""
    model, numel = model_of(mb), SIDE * SIDE
    params, grads = torch.ones(mb * numel), torch.full((mb * numel,), GRADIENT)
    for number, p in enumerate(model.parameters()):
        at = slice(number * numel, (number + 1) * numel)
        p.data, p.grad = params[at].view_as(p), grads[at].view_as(p)
    return model, params, grads


def gloo_meet(store: str, rank: int) -> None:
    import torch.distributed as dist

    where = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=where, rank=rank, world_size=2, timeout=timedelta(seconds=120))


def gloo_worker(args: argparse.Namespace) -> Result:
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        told = [
            "--mb",
            str(args.mb),
            "--warm",
            str(args.warm),
            "--steps",
            str(args.steps),
            "--store",
            f"{folder}/store",
        ]
        server = subprocess.Popen([sys.executable, __file__, "--peer", "gloo-server", *told])
        try:
            gloo_meet(f"{folder}/store", 0)
            model, params, grads = flat_model(args.mb)

            def step() -> None:
                dist.send(grads, 1)
                dist.recv(params, 1)

            process = psutil.Process(server.pid)
            result = timed(args, model, step, lambda: cpu_seconds(process))
            server.wait(60)
            dist.destroy_process_group()
        finally:
            server.kill()
            server.wait()
    return result


def gloo_server(args: argparse.Namespace) -> Result:
    import torch.distributed as dist

    gloo_meet(args.store, 1)
    model, params, grads = flat_model(args.mb)
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(args.warm + args.steps):
        dist.recv(grads, 0)
        opt.step()
        dist.send(params, 0)
    time.sleep(0.5)  # so that the worker can read how much CPU this took
    dist.destroy_process_group()
    return {}


# ---- Ray ------------------------------------------------------------------------------------------------------------
def ray_worker(args: argparse.Namespace) -> Result:
    """The parameter server of Ray's documentation, with one message each way. Arrays of NumPy, which Ray does not pickle."""
    import ray

    mb, threads = args.mb, torch.get_num_threads()

    class Server:
        def __init__(self) -> None:
            torch.set_num_threads(threads)
            warnings.simplefilter("ignore")  # gradients lie in memory that cannot be written to
            self.model = nn.ParameterList(torch.ones(SIDE, SIDE) for _ in range(mb))
            self.opt = torch.optim.SGD(self.model.parameters(), lr=LR)

        def process(self) -> int:
            return os.getpid()

        def apply(self, grads: list[Any]) -> list[Any]:
            for p, grad in zip(self.model.parameters(), grads, strict=True):
                p.grad = torch.from_numpy(grad)
            self.opt.step()
            return [p.detach().numpy() for p in self.model.parameters()]

    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            object_store_memory=2 << 30,
            logging_level="error",
        )
        try:
            server = ray.remote(Server).remote()
            model = model_of(mb)
            grads = [grad.numpy() for grad in gradients(model)]

            def step() -> None:
                found = ray.get(server.apply.remote(grads))
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    for p, value in zip(model.parameters(), found, strict=True):
                        p.copy_(torch.from_numpy(value))

            process = psutil.Process(ray.get(server.process.remote()))
            result = timed(args, model, step, lambda: cpu_seconds(process))
            return {**result, "unseen_cpu": unseen(psutil.Process().children(recursive=True))}
        finally:
            family = psutil.Process().children(recursive=True)
            ray.shutdown()
            bury(family)


def unseen(family: list[psutil.Process]) -> float:
    """CPU seconds of what Ray's daemons have started: nobody waits for those, so they count as nobody's."""
    mine = {process.pid for process in psutil.Process().children()}
    return cpu_seconds(*(process for process in family if process.pid not in mine))


def bury(family: list[psutil.Process]) -> None:
    """End what Ray has left behind."""
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


PEERS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "paceline": paceline_worker,
    "gloo": gloo_worker,
    "gloo-server": gloo_server,
    "ray": ray_worker,
}

if __name__ == "__main__":
    main()
