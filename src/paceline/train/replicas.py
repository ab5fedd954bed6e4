"""Are the replicas still equal? Every rank's parameters are hashed now and then; who differs is named, and healed.

A flipped bit (a bad memory cell, a stray pointer) shows nowhere else: the all-reduced gradient is equal everywhere, so a replica
that went its own way stays on it. Meta counted 6 such in 54 days on 16,000 GPUs (*The Llama 3 Herd of Models*, 2024, table 5).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paceline.group.wire import Wire
from paceline.terms.errors import StepError
from paceline.train import adopt

EVERY = 50
"""Steps between two looks."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Findings:
    """What a look has shown, the same on all ranks.

    Attributes:
        culprits: Ranks whose parameters are not those of the majority.
        tensors: Names of the parameters that differ.
        leader: A rank of the majority.
    """

    culprits: tuple[int, ...]
    tensors: tuple[str, ...]
    leader: int

    def __str__(self) -> str:
        who = ", ".join(f"rank {rank}" for rank in self.culprits)
        return f"the parameters of {who} were not those of the others ({', '.join(self.tensors[:3])})"


def fingerprint(parameters: Iterable[Tensor]) -> list[int]:
    """One number a tensor that any single flipped bit changes: the sum of its words, modulo 2^64."""
    return [_sum(p.detach()) for p in parameters]


def _sum(p: Tensor) -> int:
    words = p.contiguous().view(-1)
    if words.numel() * words.element_size() % 8 == 0 and words.data_ptr() % 8 == 0 and not words.is_complex():
        words = words.view(torch.int64)
    else:
        words = torch.view_as_real(words).reshape(-1) if words.is_complex() else words
        words = words.view(_WORDS[words.element_size()])
    return int(words.sum(dtype=torch.int64))


def look(wire: Wire, models: Mapping[str, nn.Module]) -> Findings | None:
    """Compare with all ranks; None when all are equal. A call that all ranks make.

    Raises:
        StepError: PL440, there is no majority: it cannot be told who is right.
    """
    named = {f"{label}.{name}": p for label, model in models.items() for name, p in model.named_parameters()}
    mine = json.dumps(fingerprint(named.values())).encode()
    said = wire.gather_bytes("replicas", mine)
    if len(set(said)) == 1:
        return None
    votes = Counter(said)
    right, count = votes.most_common(1)[0]
    culprits = tuple(rank for rank, theirs in enumerate(said) if theirs != right)
    tensors = _differing(list(named), [json.loads(theirs) for theirs in said])
    if 2 * count <= len(said):
        raise StepError(
            "PL440",
            f"the replicas of {wire.size} ranks have different parameters, and no majority says which are right: "
            f"{', '.join(tensors[:3])}",
        )
    return Findings(culprits, tensors, said.index(right))


def _differing(names: Sequence[str], sums: Sequence[Sequence[int]]) -> tuple[str, ...]:
    return tuple(name for index, name in enumerate(names) if len({each[index] for each in sums}) > 1)


def heal(wire: Wire, findings: Findings, models: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> None:
    """Overwrite parameters, buffers and optimizer state with those of the majority. A call that all ranks make."""
    adopt.start_equal(wire, models, optimizers, root=findings.leader)
