"""A keyed permutation: a shuffled order that can be computed at any index and needs no memory.

1. The numbers below `n` are written as pairs (left, right) of a grid that is just large enough.
2. Each round adds a keyed hash of one half to the other, modulo that half's range; a round can be undone, so the
   whole is a bijection of the grid (a Feistel network).
3. A result outside of ``[0, n)`` is permuted again until it falls inside (cycle walking); the grid has fewer than
   ``2 * sqrt(n)`` such cells, so this is rare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from hashlib import blake2b
from math import isqrt

from torch.utils.data import Sampler

_ROUNDS = 4  # of two half-rounds each; four are the classical bound against a distinguisher, small grids need them
_MASK = (1 << 64) - 1


class KeyedPermutation:
    """A bijection of ``[0, n)`` chosen by `key`; ``permutation[i]`` costs a few microseconds at any `i`.

    Args:
        n: Number of elements.
        key: Any integer; it is hashed, so neighbouring keys give unrelated orders.

    Example:
        >>> sorted(KeyedPermutation(5, key=7)) == [0, 1, 2, 3, 4]
        True
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 0:
            raise ValueError(f"n is the number of elements, got {n}")
        self._n = n
        self._left = isqrt(max(n - 1, 0)) + 1
        self._right = -(-n // self._left) or 1
        self._keys = tuple(_round_keys(key))

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> int:
        if not -self._n <= index < self._n:
            raise IndexError(f"index {index} is outside of a permutation of {self._n}")
        cell = self._permute(index % self._n)
        while cell >= self._n:
            cell = self._permute(cell)
        return cell

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(self._n))

    def _permute(self, cell: int) -> int:
        num_left, num_right = self._left, self._right
        right, left = divmod(cell, num_left)
        for to_left, to_right in self._keys:
            left = (left + _mix(right ^ to_left)) % num_left
            right = (right + _mix(left ^ to_right)) % num_right
        return right * num_left + left


class KeyedSampler(Sampler[int]):
    """Shuffled indices without a list of them: for data sets too large to enumerate, and for orders that must be known.

    The order is a function of (`seed`, epoch) and draws nothing from any generator. Each pass moves on to the next
    epoch by itself; ``set_epoch`` says which one the next pass is.

    Args:
        data: A data set with a length, or a number of rows.
        seed: Names the sequence of orders.

    Example:
        >>> sampler = KeyedSampler(1000, seed=0)
        >>> first, second = list(sampler), list(sampler)
        >>> sampler.set_epoch(0)
        >>> first != second and list(sampler) == first
        True
    """

    def __init__(self, data: Sized | int, seed: int = 0) -> None:
        self._data = data
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be the one of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._data if isinstance(self._data, int) else len(self._data)

    def __iter__(self) -> Iterator[int]:
        # A generator: an iterator that is made and never read (torch makes one when it starts workers) is no pass.
        order = KeyedPermutation(len(self), _hash(self.seed, self.epoch))
        self.epoch += 1
        yield from order


def _round_keys(key: int) -> Iterator[tuple[int, int]]:
    for number in range(_ROUNDS):
        yield _hash(key, 2 * number), _hash(key, 2 * number + 1)


def _hash(*words: int) -> int:
    """64 bits that depend on all of `words`."""
    return int.from_bytes(blake2b(repr(words).encode(), digest_size=8).digest(), "little")


def _mix(word: int) -> int:
    """Scatter 64 bits (the finaliser of SplitMix64, one multiplication less) and keep the upper half."""
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    return ((word ^ word >> 27) * 0x94D049BB133111EB & _MASK) >> 32
