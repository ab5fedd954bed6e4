"""A checkpoint on disk: what its manifest says, whether it is true, and any part of any tensor of it.

    checkpoints/step-00000500/MANIFEST.json + *.safetensors

The manifest (see ``manifest``) holds the state as a skeleton (see ``tree``), a table of its tensors, and a sha256 for each file.
Whatever is read here may be hostile: nothing is unpickled or evaluated, no file outside the directory is opened, no link is
followed, and no memory is taken for more than the files hold. Imports no torch, so that the command line stays quick.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from paceline.terms.errors import FileError, UsageError
from paceline.train.manifest import DATA_FILE, Box, Entry, File, Span, meet, parse, spans, unseal
from paceline.train.state import describe

MANIFEST = "MANIFEST.json"
CHECKPOINTS = "checkpoints"
"""Where they are, below a run's directory."""
TEMPORARY, TRASH = "tmp-", "trash-"

_STEP = re.compile(r"step-(\d{8,18})(?:\.(\d{1,6}))?")
_JSON_CAP = 4 << 20  # bytes, and a 32nd of the data: JSON takes some twenty times its size when it is read
_PIECE = 1 << 20


# ---- names ----------------------------------------------------------------------------------------------------------
def step_name(step: int, again: int = 0) -> str:
    """``step-00000500``; with `again`, another one of the same step."""
    return f"step-{step:08d}" + (f".{again}" if again else "")


def step_of(name: str) -> tuple[int, int] | None:
    """Step and `again` of a checkpoint's name; None for other names."""
    found = _STEP.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def candidates(directory: Path) -> list[Path]:
    """What is named as a checkpoint in `directory`, newest first; links are not."""
    try:
        with os.scandir(directory) as entries:
            found = [(step, e.name) for e in entries if (step := step_of(e.name)) and e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileError("PL613", f"{directory}: {error.strerror}") from error
    return [directory / name for _, name in sorted(found, reverse=True)]


def newest_valid(directory: Path, complain: Callable[[FileError], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, opened; `complain` hears of those that are not. None where there is none."""
    for path in candidates(directory):
        try:
            found = Checkpoint.open(path)
        except FileError as error:
            complain(error)
            continue
        try:
            found.verify()
        except FileError as error:
            found.close()
            complain(error)
        else:
            return found
    return None


def locate(path: Path) -> tuple[Path | None, Path]:
    """What a person may have meant: a checkpoint, or the directory that holds a run's.

    Returns:
        The checkpoint or None, and the directory of checkpoints.
    """
    if (path / MANIFEST).exists() or step_of(path.name):
        return path, path.parent
    return None, path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path


# ---- when to save ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Policy:
    """When to save and what to keep, as ``--checkpoint`` says it: ``every=500``, ``every=5min,keep=3,busy=wait``.

    Attributes:
        steps, seconds: How often; one of them is 0.
        keep: How many checkpoints stay.
        wait: When a checkpoint is due and the one before is still being written, training waits; else this one is left out.
    """

    steps: int = 0
    seconds: float = 0.0
    keep: int = 2
    wait: bool = False

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Raises UsageError PL105 for a text that says nothing of the kind."""
        help = "write every=500 (steps), every=30s or every=5min; then, if need be, keep=3 and busy=wait."
        found = dict(part.strip().partition("=")[::2] for part in text.split(","))
        every = re.fullmatch(r"(\d{1,12})(s|min|h|)", found.pop("every", ""))
        keep, busy = found.pop("keep", "2"), found.pop("busy", "skip")
        if every is None or not int(every[1]) or found or busy not in ("skip", "wait"):
            raise UsageError("PL105", f"--checkpoint {text}: this is not understood", help=help)
        if not re.fullmatch(r"\d{1,6}", keep) or int(keep) < 1:
            raise UsageError("PL105", f"--checkpoint {text}: keep at least 1", help=help)
        number, unit = int(every[1]), every[2]
        if not unit:
            return cls(steps=number, keep=int(keep), wait=busy == "wait")
        return cls(seconds=number * {"s": 1.0, "min": 60.0, "h": 3600.0}[unit], keep=int(keep), wait=busy == "wait")


# ---- reading --------------------------------------------------------------------------------------------------------
class Checkpoint:
    """A checkpoint that was opened. Its files stay open, so what :meth:`verify` has seen is what is read afterwards.

    Attributes:
        path: Where it lies.
        said: The manifest.
        digest: sha256 of the manifest: two checkpoints with the same one are the same.
    """

    def __init__(self, path: Path, said: dict[str, Any], files: list[File], tensors: dict[str, Entry]) -> None:
        self.path, self.said, self.files, self.tensors = path, said, files, tensors
        self.digest = ""
        self._fds: list[int] = []

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest, and open the files that it names.

        Raises:
            FileError: PL613, there is no checkpoint, or it contradicts itself or its files' lengths.
        """
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise FileError("PL613", f"{path}: {error.strerror}") from error
        fds: list[int] = []
        try:
            raw = _read_small(directory, path)
            said, files, tensors = parse(unseal(raw))
            found = cls(path, said, files, tensors)
            for file in files:
                fds.append(_open_regular(directory, file.name))
                held = os.fstat(fds[-1]).st_size
                if held != file.nbytes:
                    raise ValueError(f"{file.name} has {held} bytes instead of {file.nbytes}")
                _check_header(fds[-1], file, spans(tensors, len(fds) - 1))
        except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            for fd in fds:
                os.close(fd)
            raise FileError("PL613", f"{path}: {_told(error)}") from error
        finally:
            os.close(directory)
        found.digest, found._fds = hashlib.sha256(raw).hexdigest(), fds
        return found

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close its files. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    @property
    def step(self) -> int:
        """The number of optimizer steps that it was saved after."""
        return int(self.said["step"])

    def damage(self) -> Iterator[str]:
        """Read all of it; what is not as it was saved."""
        for file, fd in zip(self.files, self._fds, strict=True):
            digest = hashlib.sha256()
            for piece in self._pieces(fd, 0, file.nbytes):
                digest.update(piece)
            if digest.hexdigest() != file.sha256:
                yield f"{self.path / file.name}: its bytes are not those that were saved"

    def verify(self) -> None:
        """Read all of it. Raises FileError PL613 naming the first file that is not what was saved."""
        for problem in self.damage():
            raise FileError("PL613", problem)

    def hash(self) -> str:
        """The hash of the parameters, equal to that of the live models: see ``state.hash_tensors``."""
        digest = hashlib.sha256()
        for name, key in sorted(self._parameters()):
            entry = self.tensors[key]
            describe(digest, name, entry.dtype, entry.shape)
            if len(entry.parts) == 1:
                for piece in self._pieces(self._fds[entry.parts[0].file], entry.parts[0].at, entry.nbytes):
                    digest.update(piece)
            else:
                digest.update(self.read(key))
        return digest.hexdigest()

    def _parameters(self) -> Iterator[tuple[str, str]]:
        """Every tensor of the models' state by the name it is exported under, and its key in the table."""
        models = self.said["state"].get("models", {})
        try:
            for label, model in models.items():
                for name, leaf in model["state"].items():
                    if isinstance(leaf, dict) and "$tensor" in leaf:
                        yield (name if len(models) == 1 else f"{label}.{name}"), leaf["$tensor"]
        except (AttributeError, TypeError, KeyError) as error:
            raise FileError("PL613", f"{self.path}: its models cannot be read: {error!r}"[:300]) from error

    def read(self, name: str, box: Box | None = None) -> bytearray:
        """The elements of a tensor, or of a box of it, in row-major order."""
        entry = self.tensors[name]
        start, stop = box or ((0,) * len(entry.shape), entry.shape)
        into = bytearray(math.prod(b - a for a, b in zip(start, stop, strict=True)) * entry.itemsize)
        self.read_into(name, memoryview(into), (start, stop))
        return into

    def read_into(self, name: str, into: memoryview, box: Box | None = None) -> None:
        """Read into memory: as many bytes as the elements have. Raises FileError PL613 when the file ends before."""
        entry = self.tensors[name]
        wanted = box or ((0,) * len(entry.shape), entry.shape)
        shape = tuple(b - a for a, b in zip(*wanted, strict=True))
        for part in entry.parts:
            common = meet(part.box, wanted)
            if common is None:
                continue
            for source, target, count in _runs(common, part.box[0], part.shape, wanted[0], shape):
                at, size = part.at + source * entry.itemsize, count * entry.itemsize
                self._read_exactly(part.file, into[target * entry.itemsize :][:size], at)

    def _read_exactly(self, file: int, into: memoryview, at: int) -> None:
        while into:
            count = os.preadv(self._fds[file], [into], at)
            if not count:
                raise FileError("PL613", f"{self.path / self.files[file].name} has become shorter")
            into, at = into[count:], at + count

    def _pieces(self, fd: int, at: int, nbytes: int) -> Iterator[bytes]:
        while nbytes:
            piece = os.pread(fd, min(nbytes, _PIECE), at)
            if not piece:
                raise FileError("PL613", f"{self.path}: a file has become shorter")
            yield piece
            at, nbytes = at + len(piece), nbytes - len(piece)


def _runs(
    common: Box, source: Sequence[int], source_shape: Sequence[int], target: Sequence[int], target_shape: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """The stretches of a box that lie together in two row-major arrays: offsets in both, and their length.

    Args:
        common: The box, in coordinates of the whole tensor.
        source, target: Where the arrays begin, in the same coordinates.
    """
    start, stop = common
    shape = [b - a for a, b in zip(start, stop, strict=True)]
    inner = len(shape)  # dimensions from here on lie together
    while inner and (inner == len(shape) or shape[inner] == source_shape[inner] == target_shape[inner]):
        inner -= 1
    length = math.prod(shape[inner:])
    for index in itertools.product(*(range(a, b) for a, b in zip(start[:inner], stop[:inner], strict=True))):
        at = (*index, *start[inner:])
        yield _offset(at, source, source_shape), _offset(at, target, target_shape), length


def _offset(at: Sequence[int], origin: Sequence[int], shape: Sequence[int]) -> int:
    offset = 0
    for i, o, n in zip(at, origin, shape, strict=True):
        offset = offset * n + i - o
    return offset


def _read_small(directory: int, path: Path) -> bytes:
    """The manifest. Its size is bounded by that of the data, and so is the memory that reading it takes."""
    fd = _open_regular(directory, MANIFEST)
    try:
        data = sum(
            entry.stat(follow_symlinks=False).st_size
            for entry in os.scandir(directory)
            if DATA_FILE.fullmatch(entry.name)
        )
        size = os.fstat(fd).st_size
        if size > _JSON_CAP + data // 32:
            raise ValueError(f"a manifest of {size} bytes for {data} bytes of data")
        return b"".join(iter(lambda: os.read(fd, _PIECE), b""))
    finally:
        os.close(fd)


def _check_header(fd: int, file: File, wanted: set[Span]) -> None:
    """The file is one of safetensors, and whoever reads it as such finds the same tensors where the manifest has them."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if file.nbytes < 8 or length > min(_JSON_CAP + file.nbytes // 32, file.nbytes - 8):
        raise ValueError(f"{file.name} is no safetensors file")
    said = json.loads(os.pread(fd, length, 8))
    base = 8 + length
    there = {
        (entry["dtype"], tuple(entry["shape"]), base + entry["data_offsets"][0], base + entry["data_offsets"][1])
        for name, entry in said.items()
        if name != "__metadata__"
    }
    if not wanted <= there:
        raise ValueError(f"{file.name} and the manifest contradict each other")


def _open_regular(directory: int, name: str) -> int:
    """Open a file of the directory, which must be a file: no link, no pipe, no device."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{name} is no regular file")
    return fd


def _told(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if isinstance(error, RecursionError):
        return "its manifest is nested too deeply"
    if isinstance(error, KeyError):
        return f"its manifest has no {str(error.args[0])[:60]!r}"
    return f"its manifest cannot be believed: {error}"[:300]
