"""The roll call: how ranks that meet in a small exchange find out whether they are in the same call. Pure.

Every rank shows a frame of fixed length: the number of its call, a hash of the call's tag, the tag itself and, where it
fits, the payload. Because all frames are equally long, ranks in different calls still understand each other, and every
one of them can name all the others.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from paceline.terms.errors import StepError

FRAME = 512
_HEAD = struct.Struct("<Q16sII")  # number of the call, hash of its tag, bytes of the tag shown, bytes of the payload
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Frame:
    """What one rank has shown.

    Attributes:
        operation: How many such calls it has made.
        digest: Hash of the whole tag.
        tag: The tag, shortened to what a person needs.
        nbytes: Length of the payload.
        inline: As much of the payload as the frame holds.
    """

    operation: int
    digest: bytes
    tag: str
    nbytes: int
    inline: bytes

    @property
    def complete(self) -> bool:
        return len(self.inline) == self.nbytes


def pack(operation: int, tag: str, payload: bytes) -> bytes:
    """This rank's frame, FRAME bytes."""
    raw = tag.encode()
    shown = raw[:_SHOWN]
    head = _HEAD.pack(operation, blake2b(raw, digest_size=16).digest(), len(shown), len(payload))
    return (head + shown + payload)[:FRAME].ljust(FRAME, b"\0")


def unpack(data: bytes) -> Frame:
    """Read a frame."""
    operation, digest, shown, nbytes = _HEAD.unpack_from(data)
    start = _HEAD.size + shown
    return Frame(operation, digest, data[_HEAD.size : start].decode(errors="replace"), nbytes, data[start:][:nbytes])


def check(frames: Sequence[Frame], names: Sequence[int]) -> None:
    """Raise StepError PL402, the same on every rank, unless all are in the same call. `names`: the rank of each in messages."""
    if all((f.operation, f.digest) == (frames[0].operation, frames[0].digest) for f in frames):
        return
    where: dict[str, list[int]] = {}
    for rank, frame in zip(names, frames, strict=True):
        where.setdefault(f"{frame.tag!r} (call {frame.operation})", []).append(rank)
    raise StepError("PL402", "; ".join(f"{_ranks(ranks)} in {call}" for call, ranks in where.items()))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
