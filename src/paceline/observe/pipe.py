"""A text stream that never raises: when nobody reads any more it goes silent."""

from __future__ import annotations

import io
import os
from typing import TextIO


class Pipe:
    """Wraps a stream that may break.

    Args:
        stream: A terminal, a pipe or a file. It stays its owner's; it is not closed here.

    Attributes:
        broken: What ended the stream, or None.
        text: The same as a :class:`io.TextIOBase`, for libraries that want to print to a file.
    """

    def __init__(self, stream: TextIO) -> None:
        self.broken: Exception | None = None
        self._stream = stream
        self.text = _Text(self)

    def say(self, line: str) -> None:
        """Write one line, so that a reader has it at once."""
        self.write(line + "\n")
        self.flush()

    def write(self, text: str) -> None:
        if self.broken is not None:
            return
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode(self.encoding, "replace").decode(self.encoding))
        except BlockingIOError:
            pass  # somebody has made the terminal non-blocking and it is full: what does not fit comes later or not
        except (OSError, ValueError) as failure:
            self._break(failure)

    def flush(self) -> None:
        if self.broken is not None:
            return
        try:
            self._stream.flush()
        except BlockingIOError:
            pass
        except (OSError, ValueError) as failure:
            self._break(failure)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def _break(self, failure: Exception) -> None:
        """Remember, and let the interpreter's own flush at exit go to nowhere instead of failing the process."""
        self.broken = failure
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            pass  # a stream without a descriptor has nothing that could fail at exit


class _Text(io.TextIOBase):
    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def write(self, text: str) -> int:
        self._pipe.write(text)
        return len(text)

    def flush(self) -> None:
        self._pipe.flush()

    def isatty(self) -> bool:
        return self._pipe.isatty()

    def fileno(self) -> int:
        return self._pipe.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._pipe.encoding
