"""The process that writes checkpoints: ``python -m paceline.train.checkpoint_writer``. It imports no torch, and when it dies or
hangs, training goes on.

The training process copies its state into memory that both have mapped, and says what lies where. Here it becomes files:

1. ``tmp-<step>-<epoch>-<nonce>/``, after a look at the free space; each file is allocated in full, written, hashed, fsynced; then
   the directory.
2. Only when the training process says that all ranks have applied the step: the manifest, written beside its name, fsynced,
   renamed, the directory fsynced. The directory gets its name, and the one around it is fsynced. That is the commit.
3. The new checkpoint is read again from the disk; only then are older ones removed.

Whatever fails, what was written of this checkpoint is removed, and the training process is told why. The end of its pipe means
that the training process is gone: nothing more is published.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import secrets
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from paceline.terms.errors import FileError
from paceline.train import checkpoint_files as files
from paceline.train.manifest import seal
from paceline.train.state import DTYPES

LATEST = "LATEST"
_HEADROOM = 16 << 20  # bytes that are to be free beyond what is written
_PIECE = 4 << 20
_NICE = 10


class Refused(Exception):
    """It is not to be published: the training process ends, or somebody with a newer right has published since."""


def main() -> None:
    """Serve the process at the other end of descriptors 0 (what it says) and 1 (what it hears); argv: the shared memory."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it goes when the training process goes
    os.nice(_NICE)
    serve(Inbox(0), 1, int(sys.argv[1]))


class Inbox:
    """Commands, one JSON object a line. Not text but what it means is looked at: an end may come while something is written."""

    def __init__(self, fd: int) -> None:
        self._fd, self._rest, self._queue = fd, b"", list[dict[str, Any]]()
        self._over = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def next(self) -> dict[str, Any] | None:
        """The next command; None at the end."""
        while not self._queue and not self._over:
            self._receive()
        return self._queue.pop(0) if self._queue else None

    @property
    def over(self) -> bool:
        """The end has come, behind whatever is still waiting."""
        while not self._over and self._poll.poll(0):
            self._receive()
        return self._over

    def _receive(self) -> None:
        raw = os.read(self._fd, 1 << 16)
        *lines, self._rest = (self._rest + raw).split(b"\n")
        self._queue += [said for line in lines if (said := json.loads(line))["do"] != "end"]
        self._over = not raw or any(json.loads(line)["do"] == "end" for line in lines)


def serve(inbox: Inbox, answers: int, memory_fd: int) -> None:
    """Carry out commands until they end. What is not published by then is discarded."""
    writing: Writing | None = None
    while (said := inbox.next()) is not None:
        began = time.monotonic()
        try:
            match said["do"]:
                case "allocate":
                    os.ftruncate(memory_fd, said["bytes"])
                    os.posix_fallocate(memory_fd, 0, said["bytes"])
                    answer = {"said": "allocated", "bytes": said["bytes"]}
                case "write":
                    writing = Writing(memory_fd, said, lambda: inbox.over)
                    writing.write()
                    answer = {"said": "written"}
                case "publish" if writing is not None and writing.number == said["number"]:
                    answer = {"said": "published", "path": str(writing.publish()), "bytes": writing.nbytes}
                    writing = None
                case _:
                    continue
        except (OSError, Refused, FileError) as error:
            answer = {"said": "failed", "why": _told(error)}
            _discard(writing)
            writing = None
        answer |= {"number": said.get("number", 0), "seconds": time.monotonic() - began}
        try:
            os.write(answers, json.dumps(answer).encode() + b"\n")
        except BrokenPipeError:
            break
    _discard(writing)


def _discard(writing: Writing | None) -> None:
    if writing is not None:
        writing.discard()


def _told(error: Exception) -> str:
    if isinstance(error, FileError):
        return error.message
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)


class Writing:
    """One checkpoint on its way.

    Args:
        memory_fd: The shared memory.
        said: ``directory``, ``number``, ``keep``, ``right`` (attempt and epoch), and where in memory the plan lies: what
            goes into which file, and the manifest up to the tensors.
        over: Whether the training process is gone, so that there is no need to go on.
    """

    def __init__(self, memory_fd: int, said: dict[str, Any], over: Callable[[], bool] = lambda: False) -> None:
        self.number: int = said["number"]
        self._over = over
        self._root, self._keep, self._right = Path(said["directory"]), said["keep"], tuple(said["right"])
        size = os.fstat(memory_fd).st_size
        # Not closed by hand: where writing fails, the traceback still holds views of it.
        self._memory = mmap.mmap(memory_fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        plan = json.loads(self._memory[said["at"] : said["at"] + said["bytes"]])
        self._plan: list[dict[str, Any]] = plan["files"]
        self._manifest: dict[str, Any] = plan["manifest"] | {"files": [], "tensors": {}}
        step, right = self._manifest["step"], ".".join(map(str, self._right))
        self._temporary = self._root / f"{files.TEMPORARY}{step}-{right}-{secrets.token_hex(4)}"
        self.nbytes = 0

    # ---- data -----------------------------------------------------------------------------------------------------
    def write(self) -> None:
        """All data files, durable, under a temporary name."""
        self._root.mkdir(parents=True, exist_ok=True)
        for path in _leftovers(self._root, self._right):
            shutil.rmtree(path, ignore_errors=True)
        self._check_space()
        self._temporary.mkdir()
        for number, file in enumerate(self._plan):
            self._write_file(number, file, memoryview(self._memory))
        _sync(self._temporary)

    def _check_space(self) -> None:
        """ENOSPC before anything is written, rather than after most of it was."""
        needed = sum(entry["bytes"] for file in self._plan for entry in file["entries"]) + _HEADROOM
        there = os.statvfs(self._root)
        if there.f_bavail * there.f_frsize < needed:
            free = there.f_bavail * there.f_frsize
            why = f"{os.strerror(errno.ENOSPC)}: {free >> 20} MiB are free, {needed >> 20} MiB are needed"
            raise OSError(errno.ENOSPC, why, str(self._root))

    def _write_file(self, number: int, file: dict[str, Any], memory: memoryview) -> None:
        entries = sorted(file["entries"], key=lambda entry: -DTYPES[entry["dtype"]][1])
        header = _header(entries)
        total = len(header) + sum(entry["bytes"] for entry in entries)
        digest = hashlib.sha256()
        fd = os.open(self._temporary / file["name"], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(fd, 0, total)
            for piece in (memoryview(header), *(memory[e["at"] : e["at"] + e["bytes"]] for e in entries)):
                for start in range(0, len(piece), _PIECE):
                    if self._over():
                        raise Refused("the training process has ended")
                    digest.update(piece[start : start + _PIECE])
                    _write_all(fd, piece[start : start + _PIECE])
            os.fsync(fd)
        finally:
            os.close(fd)
        at = len(header)
        for entry in entries:
            self._enter(number, at, entry)
            at += entry["bytes"]
        self._manifest["files"].append({"name": file["name"], "bytes": total, "sha256": digest.hexdigest()})
        self.nbytes += total

    def _enter(self, number: int, at: int, entry: dict[str, Any]) -> None:
        """Note in the manifest where a tensor, or a part of one, lies; a copy under another name is not noted."""
        if "key" not in entry:
            return
        whole = entry.get("of", entry["shape"])
        tensor = self._manifest["tensors"].setdefault(
            entry["key"], {"dtype": entry["dtype"], "shape": whole, "parts": []}
        )
        if entry["bytes"]:
            box = {"start": entry["start"], "stop": entry["stop"]} if "start" in entry else {}
            tensor["parts"].append({"file": number, "at": at, **box})

    # ---- publication ----------------------------------------------------------------------------------------------
    def publish(self) -> Path:
        """Give it its name; the commit. Raises Refused when somebody newer has published."""
        if (newer := _right_of(self._root)) > self._right:
            raise Refused(f"epoch {newer[-1]} has published a checkpoint, this one is of epoch {self._right[-1]}")
        manifest = json.dumps(self._manifest, allow_nan=False).encode()
        _replace(self._temporary / files.MANIFEST, seal(manifest))
        _sync(self._temporary)
        path = self._named()
        self._temporary.rename(path)
        _sync(self._root)
        hint = {"name": path.name, "step": self._manifest["step"], "right": self._right}
        _replace(self._root / LATEST, json.dumps(hint).encode() + b"\n")
        self._prune(path)
        return path

    def _named(self) -> Path:
        """A name that is free: what lies under this step's may be damaged, and is left alone."""
        again = 0
        while (path := self._root / files.step_name(self._manifest["step"], again)).exists():
            again += 1
        return path

    def _prune(self, new: Path) -> None:
        """Remove the oldest, but for those to be kept, once the new one was read from the disk."""
        older = [path for path in files.candidates(self._root) if path != new][self._keep - 1 :]
        if not older:
            return
        _forget_cache(new)
        with files.Checkpoint.open(new) as checkpoint:
            checkpoint.verify()
        for path in older:
            trash = path.with_name(f"{files.TRASH}{path.name}-{secrets.token_hex(4)}")
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._temporary, ignore_errors=True)


def _header(entries: Sequence[dict[str, Any]]) -> bytes:
    """What a safetensors file begins with; the data that follow are aligned."""
    said, at = {}, 0
    for entry in entries:
        end = at + entry["bytes"]
        said[entry["name"]] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [at, end]}
        at = end
    raw = json.dumps(said, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _replace(path: Path, raw: bytes) -> None:
    """A file whole and durable, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        _write_all(fd, memoryview(raw))
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _forget_cache(directory: Path) -> None:
    """What is read next comes from the disk, not from memory."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _right_of(root: Path) -> tuple[int, ...]:
    """Who has published last."""
    try:
        return tuple(int(n) for n in json.loads((root / LATEST).read_bytes())["right"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _leftovers(root: Path, right: tuple[int, ...]) -> Iterator[Path]:
    """What writers that are gone have left behind."""
    for path in root.iterdir():
        owner = path.name.split("-")[2:3] if path.name.startswith(files.TEMPORARY) else []
        if path.name.startswith(files.TRASH) or (owner and _numbers(owner[0]) <= right):
            yield path


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) if n.isdecimal() else 0 for n in text.split("."))


if __name__ == "__main__":
    main()
