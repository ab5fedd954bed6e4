"""The coordinator's journal: records that are on the disk before anybody hears of them.

A record is a line: eight hexadecimal digits of a CRC-32, a space, JSON. A crash can cut off what was being written and was
announced to nobody: that *torn tail* is removed when the file is opened. A bad line with good ones behind it is no such thing but a
disk that lies, and is refused, because the epochs lost there would be given out again.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paceline.terms.errors import FileError

Record = dict[str, Any]


def encode(record: Record) -> bytes:
    """The line of a record."""
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode(data: bytes) -> tuple[list[Record], int]:
    """The records of a journal's bytes and the length of what they fill; what is behind it is a torn tail.

    Raises:
        ValueError: A line is damaged and a good one comes behind it; the message names the line.
    """
    records: list[Record] = []
    length, damaged = 0, 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        record = _record(line)
        if record is None:
            damaged = damaged or number
            if any(
                _record(line[at:]) is not None for at in range(1, len(line))
            ):  # the end of the line is what was damaged
                raise ValueError(f"line {damaged} is damaged, and holds a good one")
        elif damaged:
            raise ValueError(f"line {damaged} is damaged, and line {number} is not")
        else:
            records.append(record)
            length += len(line)
    return records, length


def _record(line: bytes) -> Record | None:
    checksum, _, body = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
        return None
    record = json.loads(body)
    return record if isinstance(record, dict) else None


class Journal:
    """The file, held by one process at a time.

    Args:
        path: Made where it is missing.

    Attributes:
        records: What was in it when it was opened.
        torn: Whether a tail was removed.

    Raises:
        FileError: Another process holds it (PL424), it is damaged (PL425) or cannot be had (PL601).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FileError("PL601", f"no journal at {path}: {error.strerror}") from error
        try:
            self.records, self.torn = self._open()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, records: Iterable[Record]) -> None:
        """Write records; they are durable when this returns. Raises FileError PL601, and the caller must end then."""
        data = b"".join(map(encode, records))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fdatasync(self._fd)
        except OSError as error:
            raise FileError("PL601", f"cannot write the journal {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> tuple[list[Record], bool]:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError("PL424", f"another coordinator holds {self._path}") from None
        data = self._path.read_bytes()
        try:
            records, length = decode(data)
        except ValueError as error:
            raise FileError("PL425", f"{self._path}: {error}") from error
        if length < len(data):
            os.ftruncate(self._fd, length)
        os.fsync(self._fd)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return records, length < len(data)
