"""Saving, while training goes on.

1. *Cut*, between two steps: the state is copied into shared memory. This copy is all that training pays for.
2. *Write*: another process makes files of it (``checkpoint_writer``).
3. *Publish*, once every rank has applied the step, which the next completed exchange proves. A step that is undone is discarded.

One checkpoint is in flight. What cannot be written is said within a step, training goes on, and it is tried again.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.terms.errors import AdoptError, FileError
from paceline.terms.event import Event, Sink
from paceline.train import tree as trees
from paceline.train.checkpoint_files import Policy
from paceline.train.checkpoint_writer import Writing
from paceline.train.manifest import FORMAT, VERSION

Right = tuple[int, ...]
"""Attempt and epoch of the group: who has the greater one may publish."""

RETRY = 10.0  # seconds after a failure
PATIENCE = 300.0  # seconds that the end of a run waits for its last checkpoint
HASTE = 0.5  # seconds that the end of a run that has failed waits for it
_ALIGN = 64
_SLACK = 1 << 20  # bytes by which the plan may grow from one checkpoint to the next
_FAREWELL = 5.0
_WARM = 8 << 20
_MADV_POPULATE_WRITE = 23


@dataclass(slots=True)
class Flight:
    """The checkpoint that is being written.

    Attributes:
        stall: Seconds that training stood still for it.
        written: Its data are on the disk.
        told: The writer was told to publish it.
    """

    number: int
    step: int
    stall: float
    written: bool = False
    told: bool = False


class Checkpointer:
    """Saves a job's state by a policy. All ranks have one; the rank that leads writes.

    Args:
        policy: When, and what to keep.
        directory: Where checkpoints go.
        capture: The state, as references.
        right: Who this is, to be compared with whoever publishes later.
        sink: Hears ``save`` for each checkpoint, and a ``notice`` with PL611 when one could not be saved.
        step: The step that the job begins at: nothing is saved before there is more.
    """

    def __init__(
        self,
        policy: Policy,
        directory: Path,
        capture: Callable[[], trees.Tree],
        right: Callable[[], Right],
        sink: Sink,
        step: int = 0,
    ) -> None:
        self._policy, self._directory = policy, directory.absolute()
        self._capture, self._right, self._sink = capture, right, sink
        self._due = False
        self._mark, self._since = step, time.monotonic()
        self._retry = float("inf")
        self._saved = self._begun_at = step
        self._flight: Flight | None = None
        self._writer: Writer | None = None
        self._prepared = False
        self._number = 0

    # ---- between steps --------------------------------------------------------------------------------------------
    def wants(self, step: int) -> bool:
        """At the boundary after `step` the state would be asked for."""
        return self._due or self.due(step) or time.monotonic() >= self._retry or not self._prepared

    def at_boundary(self, step: int, lead: bool, *, able: bool = True) -> None:
        """Called between two steps, `step` of which are done. Everything but a due checkpoint's copy takes microseconds.

        Args:
            able: The state can be had here; else what is due waits for the next boundary.

        Raises:
            AdoptError: PL612, at the first step: the state holds something that cannot be saved.
        """
        self._due = self._is_due(step) or (self._due and lead)
        if not lead:
            self.stand_down()
            return
        self._listen()
        if self._flight is not None and step > self._flight.step:
            self._publish()
        if self._writer is None and not self._prepared:
            self._start()
        if not able:
            return
        if step > self._begun_at and not self._prepared:  # by now optimizers have their state
            self._prepare(self._plan(step))
        if self._due:
            self._save_or_skip(step)
        elif self._writer is not None:
            self._writer.warm()

    def due(self, step: int) -> bool:
        """A checkpoint of this step would be due."""
        if self._policy.steps:
            return step // self._policy.steps > self._mark // self._policy.steps
        return step > self._mark and time.monotonic() - self._since >= self._policy.seconds

    def _is_due(self, step: int) -> bool:
        now, due = time.monotonic(), self.due(step)
        if due or now >= self._retry:
            self._mark, self._since, self._retry = step, now, float("inf")
            return True
        return False

    def _save_or_skip(self, step: int) -> None:
        if self._flight is not None:
            if not self._policy.wait:
                before = self._flight.step
                self._due = False
                self._say(step, f"no checkpoint of step {step}: the one of step {before} is still being written")
                return
            self._wait(PATIENCE)
        self._save(step)

    def _save(self, step: int) -> None:
        """Cut. Nothing is done while memory is being allocated: then it is tried again at the next boundary."""
        if self._writer is not None and self._writer.allocating:
            if not self._policy.wait:
                return
            self._wait(PATIENCE)
        began = time.monotonic()
        try:
            plan = self._plan(step)
        except AdoptError as error:  # at the first step it ends the run, later it must not
            self._due = False
            self._say(step, f"no checkpoint of step {step}: {error.message}", error.code)
            return
        if self._writer is None or not self._writer.holds(plan.nbytes):
            self._prepare(plan)
            return
        self._number, self._due = self._number + 1, False
        self._writer.write(plan, self._number, self._directory, self._policy.keep, self._right())
        self._flight = Flight(self._number, step, time.monotonic() - began)

    def _prepare(self, plan: Plan) -> None:
        """Start the writer if need be, and let it find memory for a state like this one."""
        self._prepared = True
        if self._writer is None:
            self._start()
        if self._writer is not None:
            self._writer.allocate(plan.nbytes)

    def _start(self) -> None:
        try:
            self._writer = Writer()
        except OSError as error:
            self._prepared = True
            self._failed(0, f"no process could be started: {error.strerror}")

    def _plan(self, step: int) -> Plan:
        return Plan.make(self._capture(), step, self._right()[-1])

    def _publish(self) -> None:
        """Every rank has applied the step of what is in flight."""
        if self._flight is not None and not self._flight.told and self._writer is not None:
            self._flight.told = True
            self._writer.tell({"do": "publish", "number": self._flight.number})

    # ---- what the writer says -------------------------------------------------------------------------------------
    def _listen(self, timeout: float = 0.0) -> None:
        if self._writer is None:
            return
        for answer in self._writer.answers(timeout):
            self._hear(answer)
        if self._writer.gone:
            self._give_up("the process that writes it has ended")

    def _give_up(self, why: str) -> None:
        step = self._flight.step if self._flight else 0
        self.stand_down()
        self._failed(step, why)

    def _hear(self, answer: dict[str, Any]) -> None:
        flight = self._flight
        match answer["said"]:
            case "failed" if flight is None or answer["number"] in (0, flight.number):
                self._failed(flight.step if flight else 0, answer["why"])
            case "written" if flight is not None:
                flight.written = True
            case "published" if flight is not None and answer["number"] == flight.number:
                self._saved, self._flight = flight.step, None
                data = {"path": answer["path"], "bytes": answer["bytes"], "stall": flight.stall}
                self._sink(Event("save", flight.step, data))

    def _failed(self, step: int, why: str) -> None:
        self._flight, self._due, self._retry = None, False, time.monotonic() + RETRY
        which = f"the checkpoint of step {step}" if step else "a checkpoint"
        self._say(step, f"{which} could not be saved: {why}; training goes on")

    def _say(self, step: int, message: str, code: str = "PL611") -> None:
        self._sink(Event("notice", step, {"code": code, "message": message}))

    def _wait(self, seconds: float) -> None:
        """Until nothing is in flight, or memory is allocated."""
        deadline = time.monotonic() + seconds
        while self._writer is not None and (self._flight is not None or self._writer.allocating):
            left = deadline - time.monotonic()
            if left <= 0:  # its memory must not be written to while it reads: it ends
                self._give_up(f"it took longer than {seconds:g} s")
                return
            self._listen(left)

    # ---- the end --------------------------------------------------------------------------------------------------
    def finish(self, step: int, lead: bool, whole: bool) -> None:
        """The run ends after `step` steps; `whole`: the state is that of a step's end, and worth a last checkpoint."""
        if lead and whole and step > self._saved:
            self._save_last(step)
        elif lead and self._flight is not None and step > self._flight.step:
            self._publish()
            self._wait(HASTE)
        self.stand_down()

    def _save_last(self, step: int) -> None:
        self._listen()
        self._publish()
        self._wait(PATIENCE)
        self._retry = float("inf")
        for _ in range(2):  # the first may find that there is no memory, or not enough
            if self._saved < step and self._flight is None and self._retry == float("inf"):
                self._save(step)
                self._publish()
                self._wait(PATIENCE)

    def stand_down(self) -> None:
        """Nothing that is in flight will be published; the writer ends. Idempotent."""
        self._flight = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


# ---- what goes where ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Plan:
    """A state, and where it lies in the shared memory.

    Attributes:
        tensors: With their offsets.
        text: What the writer is told: the files with their entries, and the manifest.
        at: Offset of the text.
    """

    tensors: list[tuple[int, Tensor]]
    text: bytes
    at: int

    @property
    def nbytes(self) -> int:
        return self.at + len(self.text)

    @classmethod
    def make(cls, tree: trees.Tree, step: int, epoch: int) -> Plan:
        """The models go into ``model.safetensors``, which plain torch can read, everything else into ``state.safetensors``."""
        skeleton, tensors = trees.flatten(tree)
        entries: dict[str, dict[str, Any]] = {}
        placed, at = [], 0
        for name, tensor in tensors.items():
            nbytes = tensor.numel() * tensor.element_size()
            kind, shape = trees.kind_of(tensor), list(tensor.shape)
            entries[name] = {"name": name, "key": name, "dtype": kind, "shape": shape, "at": at, "bytes": nbytes}
            placed.append((at, tensor))
            at = -(-(at + nbytes) // _ALIGN) * _ALIGN
        files = [{"name": "model.safetensors", "entries": list(_exported(skeleton, entries))}]
        if entries:
            files.append({"name": "state.safetensors", "entries": list(entries.values())})
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "epoch": epoch,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "state": _short(skeleton),
        }
        return cls(placed, json.dumps({"files": files, "manifest": manifest}, allow_nan=False).encode(), at)

    def copy(self, memory: mmap.mmap) -> None:
        """Put everything there."""
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        with torch.no_grad():
            for at, tensor in self.tensors:
                nbytes = tensor.numel() * tensor.element_size()
                if nbytes:
                    raw[at : at + nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        memory[self.at : self.nbytes] = self.text


def _exported(skeleton: trees.Tree, entries: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Entries of the models' file, under the names of the exported model; tied tensors are there once for each."""
    models, known = skeleton.get("models", {}), dict(entries)
    for label, model in models.items():
        for name, leaf in model["state"].items():
            if isinstance(leaf, dict) and "$tensor" in leaf:
                key = leaf["$tensor"]
                entry = entries.pop(key, None) or {k: v for k, v in known[key].items() if k != "key"}
                yield {**entry, "name": name if len(models) == 1 else f"{label}.{name}"}


def _short(skeleton: Any) -> Any:
    """A skeleton whose tensors are names only: the table of the manifest has the rest."""
    if isinstance(skeleton, list):
        return [_short(item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if "$tensor" in skeleton:
        return {"$tensor": skeleton["$tensor"]}
    return {key: _short(item) for key, item in skeleton.items()}


def save_tree(tree: trees.Tree, directory: Path, keep: int = 1 << 30) -> Path:
    """Save a state that is no job's, here and now. Raises FileError PL601."""
    plan = Plan.make(tree, tree.get("loop", {}).get("steps", 0), 0)
    memory_fd = os.memfd_create("paceline-checkpoint")
    try:
        os.ftruncate(memory_fd, plan.nbytes)
        plan.copy(mmap.mmap(memory_fd, plan.nbytes))
        writing = Writing(memory_fd, _order(plan, 0, directory.absolute(), keep, (0, 0)))
        try:
            writing.write()
            return writing.publish()
        except OSError as error:
            writing.discard()
            raise FileError("PL601", f"{directory} could not be written: {error.strerror or error}") from error
    finally:
        os.close(memory_fd)


def _order(plan: Plan, number: int, directory: Path, keep: int, right: Right) -> dict[str, Any]:
    """What the writer is told: where the plan lies, and where it goes."""
    place = {"at": plan.at, "bytes": len(plan.text)}
    return {"do": "write", "number": number, "directory": str(directory), "keep": keep, "right": right, **place}


# ---- the writer's process -------------------------------------------------------------------------------------------
class Writer:
    """The process that writes, and the memory shared with it. Raises OSError when the system gives none."""

    def __init__(self) -> None:
        self.allocating = self._held = self._warm = 0
        self._memory: mmap.mmap | None = None
        self._heard = b""
        self.gone = False
        self._memory_fd = os.memfd_create("paceline-checkpoint")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "paceline.train.checkpoint_writer", str(self._memory_fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd=Path(__file__).parents[2],  # where this package is found, wherever the script has gone
                pass_fds=(self._memory_fd,),
            )
        except BaseException:
            os.close(self._memory_fd)
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._answers, False)

    def allocate(self, nbytes: int) -> None:
        """Let it find memory, which takes a while, so that it is there when it is needed."""
        if not self.allocating:
            self.allocating = nbytes + _SLACK
            self.tell({"do": "allocate", "bytes": self.allocating})

    def holds(self, nbytes: int) -> bool:
        """There is memory for so much."""
        return nbytes <= self._held

    def warm(self) -> None:
        """Touch a few more of the pages, so that the first copy need not: about a millisecond."""
        if self._warm < self._held:
            count = min(_WARM, self._held - self._warm)
            try:
                self._mapped().madvise(_MADV_POPULATE_WRITE, self._warm, count)
            except OSError:  # a kernel before 5.14
                count = self._held
            self._warm += count

    def _mapped(self) -> mmap.mmap:
        if self._memory is None:
            self._memory = mmap.mmap(self._memory_fd, self._held)
        return self._memory

    def write(self, plan: Plan, number: int, directory: Path, keep: int, right: Right) -> None:
        """Copy everything, and let it be written."""
        plan.copy(self._mapped())
        self.tell(_order(plan, number, directory, keep, right))

    def tell(self, command: dict[str, Any]) -> None:
        """A line of less than a page: it is written whole, and never blocks."""
        try:
            os.write(self._commands, json.dumps(command).encode() + b"\n")
        except BrokenPipeError:
            self.gone = True

    def answers(self, timeout: float) -> list[dict[str, Any]]:
        """What it has said; wait for that at most so long."""
        if timeout:
            poll = select.poll()
            poll.register(self._answers, select.POLLIN)
            poll.poll(timeout * 1000)
        try:
            raw = os.read(self._answers, 1 << 16)
            self.gone = self.gone or not raw
        except BlockingIOError:
            return []
        *lines, self._heard = (self._heard + raw).split(b"\n")
        found = [json.loads(line) for line in lines]
        for answer in found:
            if answer["said"] == "allocated":
                self._held, self._memory, self._warm, self.allocating = answer["bytes"], None, 0, 0
            elif answer["said"] == "failed" and self.allocating:
                self.allocating = 0
        return found

    def close(self) -> None:
        """Let it discard what it has not published, and end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.tell({"do": "end"})  # closing is not enough: a forked worker of a loader may hold the pipe open
        self._process.stdin.close()
        try:
            self._process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:  # in a disk that does not answer
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        os.close(self._memory_fd)
