"""Paceline: write one PyTorch loop; run it with any distributed strategy.

The user's surface is :func:`job` and :func:`launch`; everything else hangs on the :class:`~paceline.train.job.Job` that
``job()`` returns. Nothing here imports torch, so ``paceline --help`` stays quick.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own takes ten milliseconds, in which nobody would mind Ctrl-C
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from torch import nn

    from paceline.exchange.chain import Exchange
    from paceline.terms.errors import PacelineError
    from paceline.train.job import Job

    M = TypeVar("M", bound=nn.Module)

__version__ = "0.1.0"
__all__ = ["PacelineError", "__version__", "job", "launch", "sync_batchnorm"]


def job(strategy: str | Exchange | None = None) -> Job:
    """This process's job: the same object at every call.

    Under plain ``python`` the job changes nothing. Under ``paceline run``, torchrun, Slurm or MPI it joins the others.

    Args:
        strategy: Strategy text or recipe; ``paceline run --strategy`` overrides it, and says so.
    """
    from paceline.launch import session

    return session.current().job(strategy)


def sync_batchnorm(model: M) -> M:
    """Let batch normalisation use the rows of all ranks: the numbers of one process on the whole batch, on any device.

    Call it before ``job.adopt``; returns `model`, whose layers, names and state stay what they are. Under plain ``python`` it changes
    nothing. Each such layer waits for all ranks, in forward and in backward. Losses must be means over rows.

    Raises:
        AdoptError: PL309, it was called after ``job.adopt``.
        UsageError: PL212, the model is split by ``tensor`` or ``pipeline``.
    """
    from paceline.train.batchnorm import share

    return share(job(), model)


def launch(
    fn: Callable[..., Any], *processes: int, n: int | None = None, strategy: str = "ddp()", **arguments: Any
) -> list[Any]:
    """``launch(fn, n=4, path="x.pt")``: run ``fn(path="x.pt")`` on 4 fresh processes and return their results, by rank.

    Args:
        fn: A function at the top level of a module or script. It is found again by name; nothing is pickled.
        processes: `n`, where it is given without its name. Nothing else has none.
        n: Number of processes, on this machine.
        strategy: Strategy text.
        arguments: Of `fn`, by name: JSON values.

    Raises:
        UsageError: The function cannot be launched (PL108), or the number or the strategy is refused.
        PacelineError: A process failed; the message carries the earliest cause.
    """
    from paceline.launch.function import launch_function

    return launch_function(fn, processes, n, strategy=strategy, arguments=arguments)


def __getattr__(name: str) -> Any:
    if name == "PacelineError":
        from paceline.terms.errors import PacelineError

        return PacelineError
    raise AttributeError(f"module 'paceline' has no attribute {name!r}")
