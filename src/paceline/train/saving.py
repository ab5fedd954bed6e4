"""What a job leaves on the disk and begins from: checkpoints, the final weights, and the state that it goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from paceline.group.wire import Wire
from paceline.terms.event import Event, Sink
from paceline.terms.plan import Place
from paceline.train import state
from paceline.train import tree as trees
from paceline.train.adopt import Adopted
from paceline.train.attempts import earlier
from paceline.train.checkpoint import Checkpointer
from paceline.train.checkpoint_files import CHECKPOINTS, Checkpoint, Policy
from paceline.train.loop import Loop
from paceline.train.resume import FromDisk, FromOthers, Resume, choose


class Saving:
    """The disk's part in a job.

    Args:
        place: Names the run directory and the plan.
        loop: Where the job stands.
        sink: Where events go.
        things: All that makes up the state of the job now.
        captured: Gives the state to be saved; None: that of `things`, where it is.

    Attributes:
        group: The epoch of the group that this process is a member of; a checkpoint carries it.
    """

    def __init__(
        self,
        place: Place,
        loop: Loop,
        sink: Sink,
        things: Callable[[], trees.Things],
        captured: Callable[[], trees.Tree] | None = None,
    ) -> None:
        self.group = 0
        self._captured = captured
        self._run_dir, self._plan = place.run_dir, place.plan
        self._loop, self._sink, self._things = loop, sink, things
        self._checkpointer: Checkpointer | None = None
        self._resume: Resume | None = None
        self._joins = False

    def capture(self) -> trees.Tree:
        """The state, as references: true until the next step."""
        return trees.capture(self._things())

    def open(self, together: Callable[[Callable[[Wire], Any]], Any], joining: bool) -> None:
        """Find what to go on from, and begin to save.

        Args:
            together: Makes a call that all ranks make.
            joining: The others give the state, not the disk.
        """
        run_dir, plan = self._run_dir, self._plan
        if run_dir is None:
            return
        found: Checkpoint | None = None
        if plan.resume and not joining:
            found = together(
                lambda wire: choose(plan.resume, run_dir, wire.rank, partial(wire.gather_bytes, "resume"), self.notice)
            )
            self._resume = Resume(FromDisk(found)) if found is not None else None
        if plan.checkpoint:
            attempt = len(earlier(run_dir))
            self._checkpointer = Checkpointer(
                Policy.parse(plan.checkpoint),
                run_dir / CHECKPOINTS,
                self._captured or self.capture,
                right=lambda: (attempt, self.group),
                sink=self._sink,
                step=found.step if found is not None else 0,
            )

    def join(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what the other members have given."""
        self._resume, self._joins = Resume(FromOthers(state, tensors)), True

    def adopted(self, new: Mapping[str, nn.Module], given: Adopted) -> None:
        """What is adopted now gets the state that it was saved with."""
        if self._resume is not None:
            chosen = {id(thing) for kind in (given.optimizers, given.schedulers, given.scalers) for thing in kind}
            self._resume.restore(self._things().only(new, chosen))

    def kept(self, name: str, thing: Any) -> None:
        """The same for an object that was given to ``job.keep``."""
        if self._resume is not None:
            self._resume.restore(trees.Things(kept={name: thing}))

    def begin_loop(self, main: bool) -> bool:
        """The loop begins. True: it goes on where a checkpoint was."""
        resume, self._resume = self._resume, None
        if resume is None:
            return False
        left = resume.begin_loop(self._things())
        if not self._joins:
            self._loop.resumed()
        if left and main:
            self.notice("PL610", f"the checkpoint holds {', '.join(left)}, which the script has not adopted")
        return True

    def due(self) -> bool:
        """A checkpoint of the present step is due."""
        return self._checkpointer is not None and self._checkpointer.due(self._loop.steps)

    def wants(self) -> bool:
        """The state is asked for after the step that is under way."""
        return self._checkpointer is not None and self._checkpointer.wants(self._loop.steps + 1)

    def step_ended(self, main: bool, *, able: bool = True) -> None:
        """Between two steps. `able`: the state can be had."""
        if self._checkpointer is not None:
            self._checkpointer.at_boundary(self._loop.steps, main, able=able)

    def finish(self, main: bool, whole: bool) -> None:
        """The script has ended, well (`whole`) or not."""
        if self._checkpointer is not None:
            self._checkpointer.finish(self._loop.steps, main, whole)
        if self._resume is not None:
            self._resume.close()

    def last_state(self, tensors: Mapping[str, Tensor], main: bool) -> dict[str, Any]:
        """Write the final weights, and say what there is to say about the end."""
        end: dict[str, Any] = {"ok": True, "samples": self._loop.samples, "epoch": self._loop.epoch}
        if tensors:
            end["hash"] = state.hash_tensors(tensors)
            if main and self._run_dir is not None:
                try:
                    state.save(tensors, self._run_dir / "model.safetensors")
                except OSError as failure:
                    self.notice("PL601", str(failure))
        return end

    def notice(self, code: str, message: str) -> None:
        """Tell the person at the terminal."""
        self._sink(Event("notice", self._loop.steps, {"code": code, "message": message}))
