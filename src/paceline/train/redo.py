"""A step that could not be finished is done once more, by the user's own loop going round. Pure.

When a member is lost in the middle of a step, nobody has applied it. The rest of this round of the user's loop then counts for
nothing: ``opt.step()`` and an adopted scheduler's ``step()`` do nothing, and the next batch that the loop asks for is the first
one of that step again, cut among those who are left. Two things keep the user's loop in time:

*fillers*: a script that accumulates calls ``opt.step()`` every k-th round, by a counter of its own. So until it calls it the
loop is given stand-in batches of weight 0, and the k rounds of the step begin where the script's counter does.
*replays*: a script that steps several optimizers in a round (a GAN) may have applied some of them. These are not applied again.
"""

from __future__ import annotations

_UNKNOWN = 1000  # fillers at most, when nobody knows yet how many backwards a step has


class Redo:
    """What the calls of the user's loop mean while a step is being done again.

    Attributes:
        rounds: Whether the loop asks for batches at all; a loop without an adopted loader has no rounds that we see.
        aborted: The rest of this round counts for nothing.
        fills: Whether a script may accumulate, so that fillers are needed.
        skip: The gradient of the open step is not finite: its optimizer step is left out, and the step counts as done.
    """

    def __init__(self) -> None:
        self.rounds = False
        self.fills = True
        self.aborted = False
        self.skip = False
        self._micro = 0  # backwards of the last step; 0: there was none yet
        self._backwards = 0  # of the open step
        self._applied = 0  # steps of this round
        self._replay = self._next_replay = 0
        self._fill = 0
        self._begun = False  # this round, and nothing was done in it yet: a loop may ask several loaders
        self._filler = False

    @property
    def applied(self) -> int:
        """Optimizer steps that this round of the loop has applied."""
        return self._applied

    @property
    def replaying(self) -> bool:
        """What this round does now was applied, and recorded, before."""
        return self._replay > 0

    def backward(self) -> None:
        """A backward of the open step is exchanged."""
        self._backwards += 1
        self._begun = False

    def abort(self) -> bool:
        """The open step is lost. True when the round has applied steps before it, so that its batch is needed once more."""
        self._begun = False
        if not self.aborted:
            self.aborted, self.skip = True, False
            self._next_replay = self._applied + self._replay
            self._fill = max(0, (self._micro or _UNKNOWN) - self._backwards) if self.fills else 0
        return self._next_replay > 0

    def healed(self) -> None:
        """The step was applied by others, and this rank was given the result: the rest of the round counts for nothing."""
        self.aborted, self.skip, self._begun = True, False, False
        self._next_replay = self._fill = 0

    def rewind(self) -> None:
        """Steps of earlier rounds of the loop are undone, and it goes back to the first of them. The rest of this round counts for
        nothing; one that has begun to accumulate is given fillers until its own counter is in time."""
        self.aborted, self.skip, self._begun = True, False, False
        self._next_replay = 0
        self._fill = max(0, (self._micro or _UNKNOWN) - self._backwards) if self.fills and self._backwards else 0

    def step(self) -> bool:
        """An optimizer is about to step. False: it must do nothing."""
        self._begun = False
        if self.aborted:
            self._fill = 0
            self.aborted = self.rounds
            return False
        if self._replay:
            self._replay -= 1
            self._applied += 1
            return False
        return True

    def commit(self) -> None:
        """The open step is done."""
        self._micro, self._backwards = max(1, self._backwards), 0
        self._applied += 1
        self.skip = False

    def next_round(self) -> bool:
        """The loop asks for a batch. True: give it a filler."""
        if self._begun:
            return self._filler
        self._begun, self._filler = True, self.aborted and self._fill > 0
        if self._filler:
            self._fill -= 1
            return True
        if self.aborted:
            self.aborted, self._backwards = False, 0
        self._replay, self._next_replay, self._applied = self._next_replay, 0, 0
        return False
