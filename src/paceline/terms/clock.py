"""Where training stands, as one small value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """Global counts: the same on every rank after each step; with asynchronous servers, when this worker read the parameters.

    Attributes:
        step: Optimizer steps applied (of the optimizer that stepped most often, when there are several).
        samples: Rows of the global batches whose gradients were exchanged.
        epoch: Passes over the data begun by ``job.epochs``, from 0.
        version: Updates that the parameters of this worker have seen; with servers only.
        staleness: Updates by others between the read and the application of this worker's last gradient; with servers only.
    """

    step: int = 0
    samples: int = 0
    epoch: int = 0
    version: int = 0
    staleness: int = 0
