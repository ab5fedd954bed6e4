"""How the rows of a global batch are divided among ranks. Pure arithmetic.

The pieces are contiguous, in the order of the ranks, disjoint, and together the whole batch; no size has to divide
another. Without shares they differ by at most one row, with shares each is less than one row from its exact part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


def share(
    count: int, size: int, rank: int, *, first: int = 0, shares: Sequence[float] | None = None
) -> tuple[int, int]:
    """The piece of `rank` among `count` rows that `size` ranks divide: ``(start, number of rows)``.

    Where there are fewer rows than ranks, the row at position `p` of the epoch goes to rank ``p % size``: a loader of
    single rows, as is usual for evaluation, then keeps all ranks busy in turn instead of rank 0 alone.

    Args:
        first: Position of the batch's first row in the epoch's global order.
        shares: Relative speed of each rank, none negative; a rank with twice the share gets twice the rows.

    Example:
        >>> [share(10, 4, rank) for rank in range(4)]
        [(0, 3), (3, 3), (6, 2), (8, 2)]
    """
    if shares is not None:
        return _by_shares(count, rank, shares)
    if count < size:
        place = (rank - first) % size
        return (place, 1) if place < count else (0, 0)
    base, extra = divmod(count, size)
    return rank * base + min(rank, extra), base + (rank < extra)


def _by_shares(count: int, rank: int, shares: Sequence[float]) -> tuple[int, int]:
    """Cut at the rounded running sums: monotone, so pieces stay disjoint, and the last cut is `count` itself."""
    sums = [0.0, *accumulate(shares)]
    start, end = (int(count * total / sums[-1] + 0.5) for total in sums[rank : rank + 2])
    return start, end - start


@dataclass(frozen=True, slots=True)
class Turn:
    """A rank's part of a batch in one round of its loop, where batches are cut into shards.

    Attributes:
        shard: Which shard it is.
        start, rows: Its rows, counted from the batch's first row.
        filler: It is another round's or another rank's shard, and does not count: all ranks go round equally often.
    """

    shard: int
    start: int
    rows: int
    filler: bool


def turns(count: int, shards: int, size: int, rank: int) -> list[Turn]:
    """What `rank` does in each round of a batch of `count` rows that is cut into `shards` shards.

    The shards depend on `count` and `shards` alone; no shard is empty, so a batch of few rows has fewer. Each rank has
    consecutive ones.

    Example:
        >>> [[turn.shard for turn in turns(100, 8, 3, rank) if not turn.filler] for rank in range(3)]
        [[0, 1, 2], [3, 4, 5], [6, 7]]
    """
    shards = min(shards, count)
    first, end = (-(-place * shards // size) for place in (rank, rank + 1))
    spare = max(first, end - 1) if first < shards else 0
    rounds = [min(first + turn, spare) for turn in range(-(-shards // size))]
    mine = [first + turn < end for turn in range(len(rounds))]
    return [Turn(v, *share(count, shards, v), not own) for v, own in zip(rounds, mine, strict=True)]


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's part in the division.

    Attributes:
        rank, size: Which piece of how many.
        shares: Relative speeds, or None for equal pieces.
        shards: Into how many shards a batch to train on is cut, whatever the number of ranks; 0: into one piece a rank.
    """

    rank: int
    size: int
    shares: tuple[float, ...] | None = None
    shards: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not among {self.size} ranks")
        if self.shares is not None and (
            len(self.shares) != self.size or min(self.shares) < 0 or not 0 < sum(self.shares) < float("inf")
        ):
            raise ValueError(f"shares are {self.size} non-negative numbers with a finite sum, got {self.shares}")

    def of(self, count: int, first: int) -> tuple[int, int]:
        """This rank's ``(start, number of rows)`` of a batch; see :func:`share`."""
        return share(count, self.size, self.rank, first=first, shares=self.shares)
