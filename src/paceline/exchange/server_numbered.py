"""What is said over a line that outlives its connections: numbered, and said again where nobody can have heard it. Pure.

A worker speaks with *a server*, which is one process now and another one when that has died. Each side counts what it says and
what it has heard, tells both numbers with every message, and keeps what the other one has not confirmed. Over a new connection
each side says how far it has heard; the other says the rest again. So everything is heard once, in order, whoever dies.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Numbered(Generic[T]):
    """One end of such a line.

    Args:
        keeps: Else nothing is kept, because nobody takes over from the other side.

    Attributes:
        said: Number of the last message that was said, from 1.
        heard: Number of the last message that was heard.
        kept: What was said and not confirmed, in order.

    >>> line = Numbered()
    >>> line.say("push")
    1
    >>> line.hear(1, confirmed=1), line.hear(1, confirmed=1)
    (True, False)
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self._keeps = keeps
        self.said = self.heard = 0
        self.kept: deque[tuple[int, T]] = deque()

    def say(self, what: T) -> int:
        """The number that it bears."""
        self.said += 1
        if self._keeps:
            self.kept.append((self.said, what))
        return self.said

    def hear(self, number: int, confirmed: int) -> bool:
        """Whether a message is new. The other side has heard all up to `confirmed`.

        Raises:
            ValueError: One is missing before it.
        """
        self.confirm(confirmed)
        if number <= self.heard:
            return False
        if number != self.heard + 1:
            raise ValueError(f"message {number} came after message {self.heard}")
        self.heard = number
        return True

    def confirm(self, number: int) -> None:
        """The other side has heard all up to this one."""
        while self.kept and self.kept[0][0] <= number:
            self.kept.popleft()

    def again(self, heard: int) -> list[tuple[int, T]]:
        """What must be said over a new connection to one who has heard so much.

        Raises:
            ValueError: It is no longer known, or was never said.
        """
        self.confirm(heard)
        if heard > self.said or self.said - heard != len(self.kept):
            raise ValueError(f"the other side has heard {heard} of {self.said} messages, {len(self.kept)} are known")
        return list(self.kept)

    def state(self) -> dict[str, Any]:
        """All of it."""
        return {"said": self.said, "heard": self.heard, "kept": list(self.kept)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` told."""
        self.said, self.heard = state["said"], state["heard"]
        self.kept = deque((number, what) for number, what in state["kept"])
