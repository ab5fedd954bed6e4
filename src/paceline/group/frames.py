"""Frames: what travels on every connection between Paceline's own processes. Pure.

    header 16 | meta | tag 16 | bulk | checksum 4

* *Header*: magic, version, kind, flags, nbytes of the meta, nbytes of the bulk, big-endian. It is judged, against the cap of
  its kind, before memory is asked for.
* *Meta*: a JSON object. ``buffers`` in it belongs to the framing: the lengths into which the bulk is cut.
* *Tag*: the first 16 bytes of HMAC-SHA256(key, number of the frame | header | meta). Each direction of a connection has a key of
  its own, so a frame cannot be changed, repeated, left out, moved or sent back. Before there is a key it is a checksum.
* *Bulk*: bytes of tensors, sent from where they lie and received into where they shall lie. *Checksum*: CRC-32 of the bulk,
  begun with the tag, so that it belongs to this frame. It finds accidents; forgers are TLS's affair. Inside TLS, which sums every
  byte itself and better, it is that beginning only.

Both halves are without I/O: :class:`Inbox` says where the next bytes go, :class:`Outbox` which bytes are next.
"""

from __future__ import annotations

import hmac
import json
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.terms.errors import WireError

MAGIC, VERSION = 0xB7, 1
HEADER = struct.Struct(">BBBBIQ")
TAG, CHECKSUM = 16, 4
MAX_DEPTH = 32
MAX_BUFFERS = 4096
NO_KEY = bytes(32)
PIECE = 1 << 20  # bytes of the bulk that are moved and summed at a time
_BATCH = 1 << 18  # bytes that are offered to one call of the kernel
_ENCODER = json.JSONEncoder(separators=(",", ":"), sort_keys=True)
_NUMBER = struct.Struct(">Q")
_CHECKSUM = struct.Struct(">I")

Meta = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cap:
    """The largest frame of a kind: bytes of meta, bytes of bulk."""

    meta: int
    bulk: int = 0


Caps = Mapping[int, Cap]
"""By kind; ``ANY`` for all that are not named. Kinds that are neither are refused."""

ANY = -1


@dataclass(frozen=True, slots=True)
class Frame:
    """What has come: its kind, its meta, and its buffers, those that were provided or new ones."""

    kind: int
    meta: Meta
    buffers: Sequence[memoryview] = ()


Place = Callable[[int, Meta, Sequence[int]], Sequence[memoryview]]
"""Provides memory for the buffers of a frame: kind, meta, lengths in; one writable memory of bytes for each length out."""


def encode(meta: Mapping[str, Any]) -> bytes:
    """The JSON of a meta, always the same for equal ones."""
    return _ENCODER.encode(meta).encode()


def decode(data: bytes | bytearray | memoryview) -> Meta:
    """The meta of its JSON. Raises WireError PL432: it is no JSON, no object, or nested deeper than MAX_DEPTH."""
    text = bytes(data)
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        raise _garbage("its meta is no JSON") from None
    if not isinstance(meta, dict):
        raise _garbage("its meta is no object")
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(meta) > MAX_DEPTH:
        raise _garbage(f"its meta is nested deeper than {MAX_DEPTH}")
    return meta


def head(kind: int, meta: Mapping[str, Any], lengths: Sequence[int], key: bytes, number: int) -> bytes:
    """Header, meta and tag of a frame. The meta is JSON, without ``buffers``."""
    assert "buffers" not in meta, "that word belongs to the framing"
    body = encode({**meta, "buffers": list(lengths)} if lengths else meta)
    start = HEADER.pack(MAGIC, VERSION, kind, 0, len(body), sum(lengths)) + body
    return start + _tag(key, number, start)


class Inbox:
    """Takes frames apart. Never asks for more bytes than belong to the frame that it is in.

    Args:
        key: Of the other side's tags.
        caps: What may come.
        place: Provides memory for bulk; without it new memory is made. May be changed.
        sums: Whether the checksum is that of the bulk; the other side does the same.
    """

    def __init__(self, key: bytes, caps: Caps, place: Place | None = None, sums: bool = True) -> None:
        self._key, self._caps, self.place, self._sums = key, caps, place, sums
        self._steps = self._run()
        self._filled = 0
        self._view = self._next_view()

    def want(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._view[self._filled :]

    def got(self, count: int) -> Frame | None:
        """`count` bytes are where they were wanted. The frame, if that was its end.

        Raises:
            WireError: This is no frame, or not the one that follows, or larger than its kind may be (PL432).
        """
        self._filled += count
        if self._filled < len(self._view):
            return None
        step = next(self._steps)
        self._filled = 0
        if isinstance(step, memoryview):
            self._view = step
            return None
        self._view = self._next_view()
        return step

    def _next_view(self) -> memoryview:
        step = next(self._steps)
        assert isinstance(step, memoryview)
        return step

    def _run(self) -> Generator[memoryview | Frame, None, None]:
        number = 0
        start = bytearray(HEADER.size)
        while True:
            yield memoryview(start)
            kind, meta_nbytes, bulk_nbytes = judge(start, self._caps)
            rest = bytearray(meta_nbytes + TAG)
            yield memoryview(rest)
            tag = _tag(self._key, number, bytes(start) + rest[:meta_nbytes])
            if not hmac.compare_digest(tag, bytes(rest[meta_nbytes:])):
                raise _garbage("its tag is wrong")
            meta = decode(rest[:meta_nbytes])
            lengths = _lengths(meta, bulk_nbytes)
            buffers = (self.place or _new_memory)(kind, meta, lengths) if lengths else ()
            if lengths:
                yield from self._bulk(buffers, tag)
            number += 1
            yield Frame(kind, meta, buffers)

    def _bulk(self, buffers: Sequence[memoryview], tag: bytes) -> Iterator[memoryview]:
        checksum = _begin(tag)
        for buffer in buffers:
            for piece in _pieces(buffer):
                yield piece
                checksum = zlib.crc32(piece, checksum) if self._sums else checksum
        told = bytearray(CHECKSUM)
        yield memoryview(told)
        if told != _CHECKSUM.pack(checksum):
            raise _garbage("its bulk has been damaged on the way")


class Outbox:
    """Puts frames together. They leave in the order in which they were put, urgent ones first.

    Args:
        key: Of this side's tags.
        sums: See :class:`Inbox`.
    """

    def __init__(self, key: bytes, sums: bool = True) -> None:
        self._key, self._number, self._sums = key, 0, sums
        self._urgent: deque[_Parcel] = deque()
        self._later: deque[_Parcel] = deque()
        self._open: Iterator[_Piece] = iter(())
        self._ready: deque[_Piece] = deque()

    def put(
        self,
        kind: int,
        meta: Mapping[str, Any],
        buffers: Sequence[memoryview] = (),
        *,
        urgent: bool = False,
        done: Callable[[], None] | None = None,
    ) -> None:
        """Queue a frame. `buffers` hold bytes and stay as they are until `done`, which is called when all of it is sent."""
        (self._urgent if urgent else self._later).append((kind, meta, buffers, done))

    def __len__(self) -> int:
        """How many frames have not left, at most one too few."""
        return len(self._urgent) + len(self._later) + bool(self._ready)

    def pieces(self) -> list[memoryview]:
        """What to send next; empty when there is nothing. The same again, and perhaps more, until some of it is sent."""
        nbytes = sum(len(view) for view, _ in self._ready)
        while nbytes < _BATCH and (piece := self._next()) is not None:
            self._ready.append(piece)
            nbytes += len(piece[0])
        return [view for view, _ in self._ready]

    def sent(self, count: int) -> None:
        """The first `count` bytes of :meth:`pieces` are sent."""
        while count:
            view, done = self._ready.popleft()
            if count < len(view):
                self._ready.appendleft((view[count:], done))
                return
            count -= len(view)
            if done is not None:
                done()

    def _next(self) -> _Piece | None:
        while (piece := next(self._open, None)) is None:
            queue = self._urgent or self._later
            if not queue:
                return None
            self._open = self._frame(*queue.popleft())
        return piece

    def _frame(
        self, kind: int, meta: Mapping[str, Any], buffers: Sequence[memoryview], done: Callable[[], None] | None
    ) -> Iterator[_Piece]:
        start = head(kind, meta, [len(buffer) for buffer in buffers], self._key, self._number)
        self._number += 1
        if not buffers:
            yield memoryview(start), done
            return
        yield memoryview(start), None
        checksum = _begin(start[-TAG:])
        for buffer in buffers:
            for piece in _pieces(buffer):
                checksum = zlib.crc32(piece, checksum) if self._sums else checksum
                yield piece, None
        yield memoryview(_CHECKSUM.pack(checksum)), done


_Parcel = tuple[int, Mapping[str, Any], Sequence[memoryview], Callable[[], None] | None]
_Piece = tuple[memoryview, Callable[[], None] | None]


def judge(start: bytes | bytearray, caps: Caps) -> tuple[int, int, int]:
    """Kind, nbytes of meta and nbytes of bulk of a header. Raises WireError PL432."""
    magic, version, kind, flags, meta_nbytes, bulk_nbytes = HEADER.unpack(start)
    if (magic, version, flags) != (MAGIC, VERSION, 0):
        raise _garbage("it does not begin like one")
    cap = caps.get(kind, caps.get(ANY))
    if cap is None:
        raise _garbage(f"kind {kind} has no place here")
    if meta_nbytes > cap.meta or bulk_nbytes > cap.bulk:
        raise _garbage(
            f"{meta_nbytes} + {bulk_nbytes} bytes are more than kind {kind} may have, {cap.meta} + {cap.bulk}"
        )
    return kind, meta_nbytes, bulk_nbytes


def _lengths(meta: Meta, nbytes: int) -> list[int]:
    """Take the lengths of the buffers out of a meta."""
    lengths = meta.pop("buffers", [])
    if not isinstance(lengths, list) or len(lengths) > MAX_BUFFERS:
        raise _garbage("its lengths are no list, or too long a one")
    if not all(type(length) is int and length >= 0 for length in lengths) or sum(lengths) != nbytes:
        raise _garbage("its lengths are not those of its bulk")
    return lengths


def _tag(key: bytes, number: int, start: bytes | bytearray) -> bytes:
    return hmac.digest(key, _NUMBER.pack(number) + start, "sha256")[:TAG]


def _begin(tag: bytes) -> int:
    return int(_CHECKSUM.unpack(tag[:CHECKSUM])[0])


def _pieces(buffer: memoryview) -> Iterator[memoryview]:
    for at in range(0, len(buffer), PIECE):
        yield buffer[at : at + PIECE]


def _new_memory(kind: int, meta: Meta, lengths: Sequence[int]) -> list[memoryview]:
    return [memoryview(bytearray(length)) for length in lengths]


def _depth(value: Any) -> int:
    """How deep objects and lists are nested."""
    deepest, inside = 0, [value]
    while inside := [each for each in inside if isinstance(each, (dict, list))]:
        deepest += 1
        inside = [each for outer in inside for each in (outer.values() if isinstance(outer, dict) else outer)]
    return deepest


def _garbage(why: str) -> WireError:
    return WireError("PL432", f"a frame was refused: {why}")
