"""All-reduce as coroutines over messages between two ranks. Pure: each awaits only ``Send``, ``Receive`` and ``Together``.

Each algorithm sums a contiguous 1-D tensor in place and leaves the same bits on all ranks. All are called as
``await algorithm(tensor, rank, size, tag)``; messages of one pair and tag keep their order, so one tag is enough. Empty
messages are not sent: both ends know their length.

Costs are those of the alpha-beta model: a message of ``b`` bytes takes ``alpha + b / beta`` seconds, and a rank sends one
and receives one at a time. ``B`` is the size of the tensor in bytes, ``n`` the number of ranks, ``lg`` the logarithm to
base 2. Additions are not counted.

Sources: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1),
2005 (binomial trees, halving-doubling, the fold of excess ranks); P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", JPDC 69(2), 2009 (the ring, and the lower bound 2 (n-1)/n B/beta).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from paceline.group import tail
from paceline.group.wire import Buffer, Receive, Request, Send, Together
from paceline.terms.errors import UsageError

Algorithm = Callable[[Tensor, int, int, int], Awaitable[None]]
_Span = tuple[int, int]


async def star(tensor: Tensor, rank: int, size: int, tag: int) -> None:
    """Everybody sends to rank 0, which adds in rank order and sends the sum to everybody.

    Cost: ``2 (n-1) (alpha + B/beta)``, all of it on rank 0. The sum is that of a loop over ranks, bit for bit.
    """
    if rank:
        await _send(0, tensor, tag)
        await _receive(0, tensor, tag)
        return
    incoming = torch.empty_like(tensor)
    for other in range(1, size):
        tensor += await _receive(other, incoming, tag)
    for other in range(1, size):
        await _send(other, tensor, tag)


async def ring(tensor: Tensor, rank: int, size: int, tag: int) -> None:
    """Reduce-scatter, then all-gather, around a ring: every rank only ever talks to its two neighbours.

    Cost: ``2 (n-1) alpha + 2 (n-1)/n B/beta``. The bytes are the least possible; the latency grows with n.
    """
    await _ring(tensor, range(size), rank, tag)


async def _ring(tensor: Tensor, members: Sequence[int], place: int, tag: int) -> None:
    """The ring through `members`, of which this rank is number `place`."""
    size = len(members)
    chunks = tensor.tensor_split(size)  # the first is the longest
    incoming = torch.empty_like(chunks[0])
    right, left = members[(place + 1) % size], members[(place - 1) % size]
    for step in range(size - 1):  # afterwards this rank holds the whole sum of chunk place + 1
        target = chunks[(place - step - 1) % size]
        target += await _swap(right, chunks[(place - step) % size], left, incoming[: target.numel()], tag)
    for step in range(size - 1):
        await _swap(right, chunks[(place - step + 1) % size], left, chunks[(place - step) % size], tag)


async def tree(tensor: Tensor, rank: int, size: int, tag: int) -> None:
    """Reduce along a binomial tree to rank 0, then broadcast down the same tree.

    Cost: ``2 ceil(lg n) (alpha + B/beta)``: few messages, each of them the whole tensor.
    """
    incoming = torch.empty_like(tensor)
    distances = [1 << level for level in range((size - 1).bit_length())]
    for distance in distances:
        if rank & distance:
            await _send(rank - distance, tensor, tag)
            break
        if rank + distance < size:
            tensor += await _receive(rank + distance, incoming, tag)
    for distance in reversed(distances):
        if rank & (distance - 1):
            continue
        if rank & distance:
            await _receive(rank - distance, tensor, tag)
        elif rank + distance < size:
            await _send(rank + distance, tensor, tag)


async def halving(tensor: Tensor, rank: int, size: int, tag: int) -> None:
    """Reduce-scatter by recursive halving, all-gather by recursive doubling (Rabenseifner).

    With ``p`` the largest power of two up to n, the ``n - p`` ranks beyond it first fold their tensor into a partner's
    and get the sum back in the end.

    Cost: ``2 lg p alpha + 2 (p-1)/p B/beta``, and ``2 (alpha + B/beta)`` more when ``n > p``.
    """
    power = 1 << (size.bit_length() - 1)
    partner = rank ^ power
    if rank >= power:
        await _send(partner, tensor, tag)
        await _receive(partner, tensor, tag)
        return
    if partner < size:
        tensor += await _receive(partner, torch.empty_like(tensor), tag)
    await _halve_and_double(tensor, rank, power, tag)
    if partner < size:
        await _send(partner, tensor, tag)


async def _halve_and_double(tensor: Tensor, rank: int, power: int, tag: int) -> None:
    incoming = torch.empty_like(tensor[: -(-tensor.numel() // 2)])
    span, history = (0, tensor.numel()), []
    distance = power >> 1
    while distance:
        keep, give = _halves(span, upper=bool(rank & distance))
        history.append((distance, keep, give))
        mine = tensor[slice(*keep)]
        mine += await _swap(rank ^ distance, tensor[slice(*give)], rank ^ distance, incoming[: mine.numel()], tag)
        span, distance = keep, distance >> 1
    for distance, keep, give in reversed(history):
        await _swap(rank ^ distance, tensor[slice(*keep)], rank ^ distance, tensor[slice(*give)], tag)


def _halves(span: _Span, upper: bool) -> tuple[_Span, _Span]:
    """The half of `span` that a rank keeps, and the one that it gives away."""
    start, end = span
    middle = start + (end - start + 1) // 2
    low, high = (start, middle), (middle, end)
    return (high, low) if upper else (low, high)


async def hierarchical(tensor: Tensor, rank: int, size: int, tag: int, hosts: Sequence[int] = ()) -> None:
    """Sum inside each host at its first rank, all-reduce among these leaders around a ring, hand the sum out.

    Cost, with at most ``m`` ranks on each of ``h`` hosts: ``2 (m-1) (alpha' + B/beta')`` inside, where alpha' and beta'
    are those inside a host, and ``2 (h-1) alpha + 2 (h-1)/h B/beta`` between hosts: the link of a host carries what one
    rank would.

    Args:
        hosts: For each rank the index of its host; without it, all are on one.
    """
    where = hosts or [0] * size
    crew = [other for other in range(size) if where[other] == where[rank]]
    leaders = [other for other in range(size) if where.index(where[other]) == other]
    if rank != crew[0]:
        await _send(crew[0], tensor, tag)
        await _receive(crew[0], tensor, tag)
        return
    incoming = torch.empty_like(tensor)
    for other in crew[1:]:
        tensor += await _receive(other, incoming, tag)
    await _ring(tensor, leaders, leaders.index(rank), tag)
    for other in crew[1:]:
        await _send(other, tensor, tag)


# ---- messages -------------------------------------------------------------------------------------------------------
async def _send(to: int, tensor: Tensor, tag: int) -> None:
    if tensor.numel():
        await Send(to, tensor, tag)


async def _receive(source: int, into: Tensor, tag: int) -> Tensor:
    return await Receive(source, into, tag) if into.numel() else into


async def _swap(to: int, tensor: Tensor, source: int, into: Tensor, tag: int) -> Tensor:
    """Send and receive at once: where all ranks sent first, nobody would receive."""
    requests: list[Request[None] | Request[Tensor]] = []
    if tensor.numel():
        requests.append(Send(to, tensor, tag))
    if into.numel():
        requests.append(Receive(source, into, tag))
    if requests:
        await Together(tuple(requests))
    return into


# ---- which one ------------------------------------------------------------------------------------------------------
ALGORITHMS: Mapping[str, Algorithm] = {
    "star": star,
    "tree": tree,
    "halving": halving,
    "ring": ring,
    "hierarchical": hierarchical,
}

NOMINAL_ALPHA, NOMINAL_BETA = 50e-6, 1.5e9
"""Seconds a message and bytes a second that :func:`choose` reckons with: gloo over the loopback of a small machine."""


def cost(
    name: str,
    nbytes: int,
    size: int,
    alpha: float,
    beta: float,
    *,
    hosts: Sequence[int] = (),
    inside: tuple[float, float] | None = None,
) -> float:
    """Seconds that an all-reduce takes by the formula of its algorithm; exact where the tensor can be split evenly.

    Args:
        name: Key of :data:`ALGORITHMS`.
        nbytes: Bytes of the tensor.
        alpha, beta: Seconds a message, and bytes a second.
        hosts: For ``hierarchical``: the host of each rank.
        inside: For ``hierarchical``: alpha and beta inside a host, where they differ.
    """
    whole = alpha + nbytes / beta
    power = 1 << (size.bit_length() - 1)
    match name:
        case "star":
            return 2 * (size - 1) * whole
        case "tree":
            return 2 * (size - 1).bit_length() * whole
        case "halving":
            fold = 2 * whole if size > power else 0.0
            return 2 * (power.bit_length() - 1) * alpha + 2 * (power - 1) / power * nbytes / beta + fold
        case "ring":
            return 2 * (size - 1) * (alpha + nbytes / size / beta)
        case "hierarchical":
            where = hosts or [0] * size
            largest, num_hosts = max(map(where.count, where)), len(set(where))
            near, far = (
                cost("star", nbytes, largest, *(inside or (alpha, beta))),
                cost("ring", nbytes, num_hosts, alpha, beta),
            )
            return near + far
    raise _unknown(name)


def choose(nbytes: int, size: int, hosts: Sequence[int] = ()) -> str:
    """The algorithm for a tensor: ``hierarchical`` when some of several hosts have several ranks, else the cheapest.

    By the formulas that is ``halving`` for any tensor when the number of ranks is a power of two. Otherwise ``ring`` wins
    on long tensors and ``halving`` or ``tree`` on short ones: with six ranks the border is at 160 kB.
    """
    if 1 < len(set(hosts)) < size:
        return "hierarchical"
    return min(("halving", "ring", "tree"), key=lambda name: cost(name, nbytes, size, NOMINAL_ALPHA, NOMINAL_BETA))


async def all_reduce_by(
    name: str,
    buffer: Buffer,
    header: Sequence[float],
    divisor: float | None,
    rank: int,
    size: int,
    hosts: Sequence[int] = (),
    tag: int = 0,
) -> list[float]:
    """What ``await AllReduce(buffer, header, divisor)`` does, by the algorithm of this name, or by ``auto``.

    The header travels behind the payload: in place in a :class:`~paceline.group.tail.TailBuffer`, through one copy of the
    payload elsewhere. Types that cannot hold a header exactly (see ``tail``) send it separately, as float64.

    Result: the headers summed over ranks.
    """
    payload = buffer.tensor
    if name == "auto":
        name = choose(payload.nbytes, size, hosts)
    run = _named(name, hosts)
    if not tail.holds_header(payload.dtype):
        numbers = torch.tensor(header, dtype=torch.float64)
        await run(payload, rank, size, tag)
        await run(numbers, rank, size, tag)
        sums: list[float] = numbers.tolist()
    elif isinstance(buffer, tail.TailBuffer):
        await run(tail.put_header(buffer, header), rank, size, tag)
        sums = tail.take_header(buffer)
    else:
        message = torch.cat((payload, payload.new_tensor(header)))
        await run(message, rank, size, tag)
        payload.copy_(message[: payload.numel()])
        sums = message[payload.numel() :].tolist()
    tail.scale(payload, sums, divisor)
    return sums


def _named(name: str, hosts: Sequence[int]) -> Algorithm:
    if name not in ALGORITHMS:
        raise _unknown(name)
    return partial(hierarchical, hosts=hosts) if name == "hierarchical" else ALGORITHMS[name]


def _unknown(name: str) -> UsageError:
    return UsageError("PL203", f"no all-reduce is called {name!r}; there are auto, {', '.join(ALGORITHMS)}")
