"""Messages between two ranks over one connection, each from memory to memory.

Note [messages]: a message belongs to a *channel*, a text that both ends derive from the request; messages of a channel keep
their order. It travels in frames of at most 1 MiB. One of at most EAGER bytes is sent at once, and waits at the other end, up to
EARLY bytes of all channels; beyond that nothing more is read from that rank, and so it cannot send. A longer one is sent when
the other end has said WANT, which it does when it knows where to put it. So no rank ever holds more than that of what it has
not asked for, however far the others are ahead.
"""

from __future__ import annotations

import ctypes
import select
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from paceline.group.frames import PIECE, Cap, Caps, Frame, Meta
from paceline.group.secure import Connection
from paceline.terms.errors import StepError, WireError

DATA, WANT = 16, 17
CAPS: Caps = {DATA: Cap(meta=1024, bulk=PIECE), WANT: Cap(meta=1024)}
EAGER, EARLY = 1 << 16, 1 << 26
_FRAMES = 4  # that are read before it is another rank's turn


class Message:
    """A tensor to send, or to receive into.

    Args:
        tensor: Contiguous, on the CPU.
        done: Called when it has left, or come.
    """

    def __init__(self, tensor: Tensor, done: Callable[[], None]) -> None:
        self.done, self.nbytes, self.kind = done, tensor.nbytes, str(tensor.dtype)
        self._tensor = tensor  # owns the memory
        memory = (ctypes.c_ubyte * self.nbytes).from_address(tensor.data_ptr()) if self.nbytes else bytearray()
        self.view = memoryview(memory).cast("B")


@dataclass(eq=False)
class _Incoming:
    """A message that comes: into `view`, which is that of the message asked for, or memory of its own if nobody had asked."""

    view: memoryview
    kind: str
    message: Message | None
    filled: int = 0

    @property
    def whole(self) -> bool:
        return self.filled == len(self.view)


@dataclass(eq=False)
class _Channel:
    """`held` waits until it is wanted, `wanted` counts what the other end wants; `awaited` has been asked for here, `early` has
    not; `incoming` is in the middle of its frames."""

    held: deque[Message] = field(default_factory=deque)
    wanted: int = 0
    awaited: deque[Message] = field(default_factory=deque)
    early: deque[_Incoming] = field(default_factory=deque)
    incoming: _Incoming | None = None


class Peer:
    """Another rank, and the messages to and from it. Nothing here waits.

    Args:
        rank: The other one.
        connection: To it; closed with this.
        completed: Where the `done` of completed messages is put.

    Attributes:
        lost: Why the connection ended, when it has.
    """

    def __init__(self, rank: int, connection: Connection, completed: deque[Callable[[], None]]) -> None:
        self.rank, self.connection = rank, connection
        self._completed = completed
        self._channels: dict[str, _Channel] = defaultdict(_Channel)
        self._open: set[Message] = set()
        self._early_nbytes = 0
        self._unsent = False
        self.lost: WireError | None = None

    @property
    def needed(self) -> bool:
        """Whether some message has not arrived, or not left."""
        return bool(self._open)

    @property
    def events(self) -> int:
        """What to wait for, as `epoll` names it."""
        reads = select.EPOLLIN if self._early_nbytes < EARLY else 0
        return reads | (select.EPOLLOUT if self._unsent else 0)

    def send(self, name: str, message: Message) -> None:
        """Send a message on a channel. Raises WireError when it has ended."""
        if self.lost is not None:
            raise self.lost
        self._open.add(message)
        channel = self._channels[name]
        channel.held.append(message)
        self._release(name, channel)

    def receive(self, name: str, message: Message) -> None:
        """Take the next message of a channel. Raises WireError when the connection has ended; StepError
        PL402 when it is one of another size or type."""
        channel = self._channels[name]
        if not channel.early and self.lost is not None:
            raise self.lost
        self._open.add(message)
        if channel.early:
            incoming = channel.early.popleft()
            _match(name, len(incoming.view), incoming.kind, message)
            incoming.message = message
            if incoming.whole:
                self._arrived(incoming)
            return
        channel.awaited.append(message)
        if message.nbytes > EAGER:
            self.connection.post(WANT, {"c": name}, urgent=True)

    def turn(self) -> bool:
        """Move what can be moved; True when there may be more. Raises WireError when the connection has failed."""
        frames = 0
        while frames < _FRAMES and self._early_nbytes < EARLY:
            frame = self.connection.poll(self._place)
            if frame is None:
                break
            self._on_frame(frame)
            frames += 1
        self._unsent = not self.connection.flush()
        return frames == _FRAMES

    # -- out
    def _release(self, name: str, channel: _Channel) -> None:
        """Send those messages that may be sent."""
        held = channel.held
        while held and (held[0].nbytes <= EAGER or channel.wanted):
            message = held.popleft()
            channel.wanted -= message.nbytes > EAGER
            about = {"c": name, "n": message.nbytes, "as": message.kind}
            for at in range(0, message.nbytes or 1, PIECE):
                piece = message.view[at : at + PIECE]
                done = partial(self._complete, message) if at + PIECE >= message.nbytes else None
                self.connection.post(DATA, {**about, "at": at}, [piece] if piece else [], done=done)

    def _complete(self, message: Message) -> None:
        self._open.discard(message)
        self._completed.append(message.done)

    # -- in
    def _on_frame(self, frame: Frame) -> None:
        name = frame.meta.get("c")
        if not isinstance(name, str):
            raise _refused("it belongs to no channel")
        channel = self._channels[name]
        if frame.kind == WANT:
            channel.wanted += 1
            self._release(name, channel)
            return
        incoming = channel.incoming or self._begin(name, channel, frame.meta)
        incoming.filled += sum(map(len, frame.buffers))
        channel.incoming = None if incoming.whole else incoming
        if incoming.whole and incoming.message is not None:
            self._arrived(incoming)

    def _place(self, kind: int, meta: Meta, lengths: Sequence[int]) -> list[memoryview]:
        """Memory for the bulk of a frame of which the meta has come."""
        name = str(meta.get("c"))
        channel = self._channels[name]
        channel.incoming = incoming = channel.incoming or self._begin(name, channel, meta)
        end = incoming.filled + lengths[0]
        if len(lengths) != 1 or meta.get("at") != incoming.filled or end > len(incoming.view):
            raise _refused("it is not the next of its message")
        return [incoming.view[incoming.filled : end]]

    def _begin(self, name: str, channel: _Channel, meta: Meta) -> _Incoming:
        """A message begins to come."""
        nbytes, kind = meta.get("n"), meta.get("as")
        if type(nbytes) is not int or not isinstance(kind, str):
            raise _refused("it belongs to no message")
        if channel.awaited:
            message = channel.awaited.popleft()
            _match(name, nbytes, kind, message)
            return _Incoming(message.view, kind, message)
        if not 0 <= nbytes <= EAGER:
            raise _refused(f"nobody has asked for {nbytes} bytes on channel {name!r}")
        self._early_nbytes += nbytes
        incoming = _Incoming(memoryview(bytearray(nbytes)), kind, None)
        channel.early.append(incoming)
        return incoming

    def _arrived(self, incoming: _Incoming) -> None:
        """A message is whole, and was asked for."""
        message = incoming.message
        assert message is not None
        if incoming.view is not message.view:
            message.view[:] = incoming.view
            self._early_nbytes -= message.nbytes
        self._complete(message)


def _match(name: str, nbytes: int, kind: str, message: Message) -> None:
    if (nbytes, kind) != (message.nbytes, message.kind):
        ours, theirs = f"{message.nbytes} bytes of {message.kind}", f"{nbytes} bytes of {kind}"
        raise StepError("PL402", f"ranks met on channel {name!r} with different tensors: {ours} here, {theirs} there")


def _refused(why: str) -> WireError:
    return WireError("PL432", f"a frame was refused: {why}")
