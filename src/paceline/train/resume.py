"""Going on from a checkpoint: the first rank chooses and verifies it, all read it, each thing is restored when it is adopted.

Models and optimizers are restored at once, so that a script can look at them. Positions of loaders and the data stream wait
until the loop begins: what a script draws for itself before that does not change the order of its data.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from paceline.terms.errors import FileError, PacelineError
from paceline.train import tree as trees
from paceline.train.checkpoint_files import CHECKPOINTS, Checkpoint, candidates, locate, newest_valid
from paceline.train.manifest import names
from paceline.train.tree import Things

_SECTIONS = ("models", "optimizers", "schedulers", "scalers", "kept")

Gather = Callable[[bytes], list[bytes]]
Say = Callable[[str, str], None]
"""Told a code and a message."""


def choose(text: str, run_dir: Path, rank: int, gather: Gather, say: Say) -> Checkpoint | None:
    """What to go on from, the same on all ranks; a collective.

    Args:
        text: ``auto``: the newest valid checkpoint of this run, or None where there is none. Else a checkpoint, or a run.
        say: Hears of checkpoints that were passed over.

    Raises:
        FileError: On all ranks, PL614 when there is none, PL613 for a damaged one, or one that a rank cannot read.
    """
    found: Checkpoint | None = None
    said: dict[str, Any] = {}
    if rank == 0:
        try:
            found = _newest_here(run_dir, say) if text == "auto" else _named(Path(text), say)
            said = {"path": str(found.path.absolute()), "digest": found.digest} if found is not None else {}
        except FileError as error:
            said = {"code": error.code, "message": error.message}
    said = json.loads(gather(json.dumps(said).encode())[0])
    if "code" in said:
        raise FileError(said["code"], said["message"])
    if rank and said:
        found = Checkpoint.open(Path(said["path"]))
        if found.digest != said["digest"]:
            found.close()
            raise FileError("PL613", f"{said['path']}: rank {rank} sees another checkpoint there than rank 0")
    return found


def _newest_here(run_dir: Path, say: Say) -> Checkpoint | None:
    """The newest valid one of this run. Damaged ones lose their names, so that they are not counted among those to be kept."""
    damaged: list[FileError] = []
    directory = run_dir / CHECKPOINTS
    found = newest_valid(directory, damaged.append)
    for path, error in zip(candidates(directory), damaged, strict=False):
        say("PL613", f"{error.message}; an older one is used")
        try:
            path.rename(path.with_name(f"bad-{path.name}"))
        except OSError:
            pass
    if found is None:
        say("PL614", f"{directory} has no valid checkpoint: training starts afresh")
    return found


def _named(path: Path, say: Say) -> Checkpoint:
    chosen, directory = locate(path)
    if chosen is not None:
        found = Checkpoint.open(chosen)
        found.verify()
        return found
    newest = newest_valid(directory, lambda error: say("PL613", f"{error.message}; an older one is used"))
    if newest is None:
        raise FileError("PL614", f"{path} is no checkpoint, and no run with a valid one")
    return newest


class Source(Protocol):
    """Where a state comes from."""

    @property
    def called(self) -> object:
        """For messages."""

    @property
    def state(self) -> dict[str, Any]:
        """Its skeleton, see ``tree.flatten``."""

    def read(self, name: str) -> Tensor:
        """One of its tensors, which the caller may keep."""

    def close(self) -> None:
        """Give everything back. Idempotent."""


class FromDisk:
    """A checkpoint.

    Args:
        checkpoint: Verified.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.called: object = checkpoint.path
        self.state: dict[str, Any] = checkpoint.said["state"]

    def read(self, name: str) -> Tensor:
        """See :class:`Source`."""
        return read_tensor(self._checkpoint, name)

    def close(self) -> None:
        """See :class:`Source`."""
        self._checkpoint.close()


class FromOthers:
    """What the other members of a run have given."""

    def __init__(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.called: object = "what the others have given"
        self.state, self._tensors = state, dict(tensors)

    def read(self, name: str) -> Tensor:
        """See :class:`Source`."""
        return self._tensors[name].clone()

    def close(self) -> None:
        """See :class:`Source`."""
        self._tensors.clear()


class Resume:
    """A state that a job goes on from.

    Args:
        source: Where it comes from. It is closed by :meth:`begin_loop`.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._state: dict[str, Any] = source.state
        self._left = {kind: set(self._state.get(kind, {})) for kind in _SECTIONS}

    def close(self) -> None:
        """Give its files back. Idempotent."""
        self._source.close()

    def restore(self, things: Things) -> None:
        """Restore what has been adopted. A whole section that the checkpoint lacks (an import) leaves its things as they are.

        Raises:
            AdoptError: PL610, they are others than those that were saved.
            FileError: PL613, the checkpoint does not hold what a job saves.
        """
        there: dict[str, Any] = {kind: getattr(things, kind) if self._state.get(kind) else {} for kind in _SECTIONS}
        for kind, chosen in there.items():
            self._left[kind] -= set(chosen)
        self._restore(replace(things, **there, loop=things.loop if "loop" in self._state else None))

    def begin_loop(self, things: Things) -> list[str]:
        """The loop begins: streams and positions. Returns what was saved and has not been adopted."""
        streams = things.streams if "streams" in self._state else None
        feeds = things.feeds if self._state.get("feeds") else {}
        chain = things.chain if "chain" in self._state else None
        if "chain" in self._state and chain is None:
            self._left.setdefault("chain of links", {"state"})
        self._restore(Things(feeds=feeds, streams=streams, chain=chain))
        self.close()
        return [f"{kind} {name}" for kind, left in self._left.items() for name in sorted(left)]

    def _restore(self, things: Things) -> None:
        kinds = (*_SECTIONS, "feeds")
        wanted: dict[str, Any] = {
            kind: {key: self._state[kind][key] for key in getattr(things, kind) if key in self._state[kind]}
            for kind in kinds
            if getattr(things, kind)
        }
        wanted |= {
            kind: self._state[kind] for kind in ("loop", "streams", "chain") if getattr(things, kind) is not None
        }
        try:
            tensors = {name: self._source.read(name) for name in set(names(wanted))}
            trees.restore(things, trees.unflatten(wanted, tensors))
        except PacelineError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            message = f"{self._source.called} does not hold what a job saves: {error!r}"
            raise FileError("PL613", message[:300]) from error


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of a checkpoint, in fresh memory."""
    entry = checkpoint.tensors[name]
    tensor = torch.empty(entry.shape, dtype=trees.KINDS[entry.dtype])
    if entry.nbytes:
        memory = (ctypes.c_char * entry.nbytes).from_address(tensor.data_ptr())
        checkpoint.read_into(name, memoryview(memory).cast("B"))
    return tensor


def read_tree(checkpoint: Checkpoint) -> trees.Tree:
    """All of a checkpoint's state."""
    state = checkpoint.said["state"]
    tree: trees.Tree = trees.unflatten(state, {name: read_tensor(checkpoint, name) for name in set(names(state))})
    return tree
