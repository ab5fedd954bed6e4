"""What workers tell the parameter server's core, and what the core tells its shell to do: events and instructions. Pure.

A worker's life, as the core sees it:

1. **Join**. It is answered by a ``Go`` of seq 0: the parameters of the newest version.
2. **Ask** for a piece of a batch. Answered by one ``Grant``, at once or later. No piece: there is none now. After an answer to
   an Ask with ``ahead`` the worker asks once more when it holds nothing; after any other the pass is over for it.
3. A piece beyond the end of the pass: **Over**, which has no answer; the worker asks again.
4. **Step**: a gradient was pushed. Answered by one ``Go``, at once or later. Neither applied nor kept: the loop goes round once
   more, and up to its next Step the worker asks for each batch, though it may have looked some ahead. These it leaves aside: it
   still holds them, and it is granted them again where they are due. (Or it gives them back: **Skip**.)
5. **Meet** all other workers. Answered by ``Met``. Who joins must come to the same meetings as all others. **Leave** has no
   answer.

A ``Go`` of a seq that has been answered is a *refresh*: it comes before a ``Grant`` or a ``Met`` where the parameters that the
worker has are too old to begin with, and never while it holds pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """One part of one global batch, which exactly one update counts.

    Attributes:
        loader: Which adopted loader, from 0.
        epoch: Number of the pass over it, from 0.
        batch: Number of the global batch in the pass, from 0.
        part: Which part, from 0.
        parts: Into how many the batch was cut. 0: a *filler*; the rows of any batch stand in, and it counts nothing.
    """

    loader: int
    epoch: int
    batch: int
    part: int
    parts: int


# ---- events ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Join:
    """A worker is there. Its name was never used before."""

    worker: str


@dataclass(frozen=True, slots=True)
class Leave:
    """A worker has ended, or its connection has."""

    worker: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A worker wants its next piece.

    Attributes:
        ahead: It holds pieces and looks ahead: the answer comes at once, and tells only what there is now.
    """

    worker: str
    loader: int
    epoch: int
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A worker has pushed its gradient, and waits.

    Attributes:
        seq: Counts the worker's steps, from 1. The same one again is answered again.
        weight: How many loss terms its gradient is a mean over.
        covers: The pieces that it is of, with or without fillers; none where the script has no adopted loader.
        finite: Whether all its elements are.
    """

    worker: str
    seq: int
    weight: float
    covers: tuple[Piece, ...] = ()
    finite: bool = True


@dataclass(frozen=True, slots=True)
class Over:
    """A worker has come to the end of a pass, and found how many global batches it has."""

    worker: str
    loader: int
    epoch: int
    batches: int


@dataclass(frozen=True, slots=True)
class Meet:
    """A worker waits for all others at a point of the program, and tells them something."""

    worker: str
    tag: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Skip:
    """A worker gives pieces back untrained: its loop was left."""

    worker: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """A worker of a server that has begun again from a checkpoint knows how far a pass had come: so many batches were opened."""

    worker: str
    loader: int
    epoch: int
    batches: int


Event: TypeAlias = Join | Leave | Ask | Step | Over | Meet | Skip | Opened


# ---- instructions ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to an Ask. The piece may be of an earlier pass than asked for: its holder died when all had left that pass."""

    worker: str
    piece: Piece | None


@dataclass(frozen=True, slots=True)
class Keep:
    """Copy this push aside: it will be applied later, and the worker overwrites it before."""

    worker: str
    seq: int


@dataclass(frozen=True, slots=True)
class Part:
    """One push in an update.

    Attributes:
        scale: Factor for its age (``Rule.damp``).
        weight: As in the Step.
        read: Version of the parameters that it was computed with.
    """

    worker: str
    seq: int
    scale: float
    weight: float
    read: int
    covers: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """Take one optimizer step with ``sum(scale * weight * gradient) / sum(weight)``, in the order of `parts`.

    Attributes:
        version: Of the parameters after it; counts from 1 without gaps.
        skip: Leave the step out, because a gradient is not finite. The version and the pieces count all the same.
        blame: Whose gradient it was.
    """

    version: int
    parts: tuple[Part, ...]
    skip: bool = False
    blame: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Go:
    """The answer to a Step (also to a Join, as seq 0): send parameters of `version`; the worker may go on.

    Attributes:
        version: The newest, but for the answer to a repeated Step, which is the same again.
        clock: The worker's, see ``exchange/server_bound.py``; synchronous: the version.
        applied: The update with this push is in `version`. False: the step is not done, unless `kept`.
        tau: Updates between what this push was computed with and its own.
        kept: The push will be in a later update (``Rule.buffer``).
    """

    worker: str
    seq: int
    version: int
    clock: int
    applied: bool
    tau: int
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Drop:
    """This push is not needed."""

    worker: str
    seq: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The worker ends with this error. For the core it has left."""

    worker: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Met:
    """Everybody has come; what they said, in order of their names."""

    worker: str
    tag: str
    notes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Closed:
    """Every batch of this pass is in an update."""

    loader: int
    epoch: int
    batches: int


Instruction: TypeAlias = Grant | Keep | Apply | Go | Drop | Refuse | Met | Closed
