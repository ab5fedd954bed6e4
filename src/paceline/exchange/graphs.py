"""Who exchanges with whom: graphs of ranks and the weights of mixing over them. Pure.

*Undirected* graphs serve gossip: Metropolis weights make the mixing matrix symmetric and doubly stochastic whatever the degrees
(Xiao and Boyd, 2004). *Directed* ones serve push-sum: what a rank sends out adds up to what it had, and that is all there is to ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paceline.terms.errors import UsageError

Edge = tuple[int, int]

UNDIRECTED = ("ring", "exponential", "complete", "torus")
DIRECTED = ("exponential", "ring", "complete")


@dataclass(frozen=True, slots=True)
class Graph:
    """A kind of graph, for any number of ranks.

    Attributes:
        name: One of :data:`UNDIRECTED`, or the text of given edges, ``0-1 1-2``.
    """

    name: str

    def edges(self, size: int) -> frozenset[Edge]:
        """Undirected edges ``(a, b)``, a < b, among `size` ranks. Given edges that no longer connect all give way to a ring."""
        if self.name not in UNDIRECTED:
            given = frozenset(edge for edge in read_edges(self.name) if max(edge) < size)
            return given if connected(given, size) else Graph("ring").edges(size)
        if self.name == "torus":
            pairs = list(_torus(size))
        elif self.name == "complete":
            pairs = [(i, j) for i in range(size) for j in range(size)]
        else:
            hops = (size - 1).bit_length() if self.name == "exponential" else 1
            pairs = [(i, i + (1 << k)) for i in range(size) for k in range(hops)]
        return frozenset((min(a, b % size), max(a, b % size)) for a, b in pairs if a != b % size)

    def mixing(self, size: int) -> list[list[float]]:
        """Metropolis weights: ``W[i][j] = 1 / (1 + max(deg i, deg j))`` for neighbours, the rest stays with oneself."""
        edges = self.edges(size)
        degree = [sum(rank in edge for edge in edges) for rank in range(size)]
        rows = [[0.0] * size for _ in range(size)]
        for a, b in edges:
            rows[a][b] = rows[b][a] = 1.0 / (1 + max(degree[a], degree[b]))
        for rank, row in enumerate(rows):
            row[rank] = 1.0 - sum(row)
        return rows

    def sends(self, size: int, turn: int) -> list[list[int]]:
        """For each rank to whom it pushes in this turn, itself left out; each of them, and itself, gets an equal part.

        ``exponential`` has one receiver a turn, ``i + 2^(turn mod ceil(log2 n))``: Assran et al., ICML 2019. Given edges are
        used in both directions.
        """
        if self.name == "exponential":
            hops = max(1, (size - 1).bit_length())
            return [[to] if (to := (i + (1 << turn % hops)) % size) != i else [] for i in range(size)]
        if self.name == "ring":
            return [[(i + 1) % size] if size > 1 else [] for i in range(size)]
        edges = self.edges(size)
        return [sorted(b if a == i else a for a, b in edges if i in (a, b)) for i in range(size)]


def _torus(size: int) -> Iterable[Edge]:
    """A grid whose rows and columns are rings: as square as `size` allows, a ring where it is prime."""
    rows = max(n for n in range(1, int(size**0.5) + 1) if size % n == 0)
    columns = size // rows
    for rank in range(size):
        row, column = divmod(rank, columns)
        yield rank, row * columns + (column + 1) % columns
        yield rank, (row + 1) % rows * columns + column


def read_edges(text: str) -> frozenset[Edge]:
    """``0-1 1-2`` as edges. Raises ValueError for anything else."""
    if not re.fullmatch(r"\s*\d{1,4}-\d{1,4}([\s,]+\d{1,4}-\d{1,4})*\s*", text):
        raise ValueError(text)
    pairs = ((int(a), int(b)) for a, b in re.findall(r"(\d+)-(\d+)", text))
    return frozenset((min(a, b), max(a, b)) for a, b in pairs if a != b)


def connected(edges: Iterable[Edge], size: int) -> bool:
    """Whether all of `size` ranks can be reached from the first."""
    edges, seen, queue = list(edges), {0}, [0]
    while queue:
        here = queue.pop()
        for edge in edges:
            if here in edge:
                there = edge[0] if edge[1] == here else edge[1]
                if there not in seen:
                    seen.add(there)
                    queue.append(there)
    return len(seen) == size


def graph_for(recipe: str, graph: object, known: Sequence[str]) -> Graph:
    """The graph that was asked for. Raises UsageError PL203."""
    if isinstance(graph, str) and graph in known:
        return Graph(graph)
    said = f"graph is one of {', '.join(known)}, or edges such as '0-1 1-2 2-0'."
    try:
        edges = read_edges(graph) if isinstance(graph, str) else frozenset()
    except ValueError:
        raise UsageError("PL203", f"{recipe}: graph={graph!r} is not known", help=said) from None
    ranks = {rank for edge in edges for rank in edge}
    if not ranks:
        raise UsageError("PL203", f"{recipe}: graph={graph!r} has no edges", help=said)
    if not connected(edges, max(ranks) + 1):
        message = f"{recipe}: graph={graph!r} is not connected: some ranks would never hear of the others"
        raise UsageError("PL203", message, help=said)
    return Graph(" ".join(f"{a}-{b}" for a, b in sorted(edges)))
