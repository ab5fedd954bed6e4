"""The table of a rendezvous, and the bytes in which it is asked. Pure but for one function that reads a socket.

A request is a header ``magic, op, number of fields, length of the body, milliseconds to wait`` and a body of fields, each
four bytes of length and its bytes; an answer is a status, a length and bytes. Lengths are capped before anything is
allocated: whoever sends nonsense costs himself his connection and us no memory.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

MAX_BODY = 8 << 20
MAX_FIELDS = 4096
MAX_TABLE = 256 << 20
_MAGIC = b"PLs1"
REQUEST = struct.Struct("<4sBHIq")
_ANSWER = struct.Struct("<BI")
_LENGTH = struct.Struct("<I")
_PIECE = 1 << 16


class Op(IntEnum):
    """What can be asked. Keys come first among the fields, then values; numbers are decimal texts, as in c10d."""

    SET = 1
    GET = 2
    WAIT = 3
    CHECK = 4
    ADD = 5
    DELETE = 6
    COMPARE_SET = 7
    COUNT = 8


class Status(IntEnum):
    """How it went."""

    OK = 0
    TIMEOUT = 1
    REFUSED = 2


_ARITY = {Op.SET: 2, Op.GET: 1, Op.ADD: 2, Op.DELETE: 1, Op.COMPARE_SET: 3, Op.COUNT: 0}


class Garbage(Exception):
    """Bytes that are no request or no answer; whoever receives them closes the connection."""


Answer = tuple[Status, bytes]


# ---- bytes ----------------------------------------------------------------------------------------------------------
def pack_request(op: Op, fields: Sequence[bytes], wait_ms: int = 0) -> bytes:
    """One request as bytes. Raises ValueError when it is longer than a server reads."""
    body = b"".join(_LENGTH.pack(len(f)) + f for f in fields)
    if len(body) > MAX_BODY or len(fields) > MAX_FIELDS:
        raise ValueError(
            f"a request of {len(body)} bytes in {len(fields)} fields; {MAX_BODY} and {MAX_FIELDS} are the limits"
        )
    return REQUEST.pack(_MAGIC, op, len(fields), len(body), wait_ms) + body


def pack_answer(answer: Answer) -> bytes:
    """One answer as bytes."""
    status, payload = answer
    return _ANSWER.pack(status, len(payload)) + payload


def read_answer(connection: socket.socket) -> Answer:
    """Block for one answer. Raises ConnectionError at the end of the stream, Garbage for nonsense."""
    status, length = _ANSWER.unpack(_read_exactly(connection, _ANSWER.size))
    if length > MAX_BODY or status not in Status.__members__.values():
        raise Garbage(f"status {status}, length {length}")
    return Status(status), _read_exactly(connection, length)


def _read_exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(min(_PIECE, length - len(data)))
        if not piece:
            raise ConnectionError("the rendezvous closed the connection")
        data += piece
    return bytes(data)


@dataclass(frozen=True, slots=True)
class Request:
    op: Op
    fields: tuple[bytes, ...]
    wait_ms: int

    @staticmethod
    def take(inbox: bytearray) -> Request | None:
        """Remove the first whole request from `inbox`; None while it is incomplete."""
        if not _MAGIC.startswith(inbox[: len(_MAGIC)]):
            raise Garbage("no request")
        if len(inbox) < REQUEST.size:
            return None
        _, op, count, length, wait_ms = REQUEST.unpack_from(inbox)
        if length > MAX_BODY or count > MAX_FIELDS or op not in Op.__members__.values():
            raise Garbage("no request")
        end = REQUEST.size + length
        if len(inbox) < end:
            return None
        fields = tuple(_split(bytes(inbox[REQUEST.size : end])))
        del inbox[:end]
        if len(fields) != count or len(fields) != _ARITY.get(op, count):
            raise Garbage("fields missing")
        return Request(Op(op), fields, wait_ms)


def _split(body: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(body):
        if at + _LENGTH.size > len(body):
            raise Garbage("torn field")
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        if at + length > len(body):
            raise Garbage("torn field")
        yield body[at : at + length]
        at += length


# ---- the table ------------------------------------------------------------------------------------------------------
class Table:
    """Keys and values, without a socket. :meth:`answer` returns None while keys that are waited for are missing."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._nbytes = 0

    def answer(self, op: Op, fields: tuple[bytes, ...]) -> Answer | None:
        match op:
            case Op.SET:
                return self._put(*fields)
            case Op.GET | Op.WAIT if not all(key in self._values for key in fields):
                return None
            case Op.GET:
                return Status.OK, self._values[fields[0]]
            case Op.WAIT:
                return Status.OK, b""
            case Op.CHECK:
                return _yes_or_no(all(key in self._values for key in fields))
            case Op.ADD:
                return self._add(*fields)
            case Op.DELETE:
                return _yes_or_no(self._drop(fields[0]))
            case Op.COMPARE_SET:
                return self._compare_set(*fields)
            case Op.COUNT:
                return Status.OK, b"%d" % len(self._values)

    def _put(self, key: bytes, value: bytes) -> Answer:
        grown = self._nbytes + len(key) + len(value)
        if grown > MAX_TABLE:
            return Status.REFUSED, b"the rendezvous is full"
        self._drop(key)
        self._values[key] = value
        self._nbytes += len(key) + len(value)
        return Status.OK, b""

    def _drop(self, key: bytes) -> bool:
        value = self._values.pop(key, None)
        self._nbytes -= 0 if value is None else len(key) + len(value)
        return value is not None

    def _add(self, key: bytes, amount: bytes) -> Answer:
        try:
            total = b"%d" % (int(self._values.get(key, b"0")) + int(amount))
        except ValueError:
            return Status.REFUSED, b"not a number"
        status, why = self._put(key, total)
        return (status, why) if status else (Status.OK, total)

    def _compare_set(self, key: bytes, expected: bytes, desired: bytes) -> Answer:
        """c10d's rule: a missing key is set only if nothing was expected; otherwise what was expected is returned."""
        held = self._values.get(key)
        if held == expected or (held is None and not expected):
            status, why = self._put(key, desired)
            return (status, why) if status else (Status.OK, desired)
        return Status.OK, expected if held is None else held


def _yes_or_no(truth: bool) -> Answer:
    return Status.OK, b"1" if truth else b"0"
