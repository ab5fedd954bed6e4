"""What a checkpoint's manifest says: which tensor lies where. Parsed as from a stranger: nothing in it is believed unseen.

A tensor may lie in several *parts*, each a box of its elements, in any files; so it can be saved by as many processes as hold it,
and read by others. The parts of a tensor cover it without overlap, and no two lie in the same bytes. Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.train.state import DTYPES

FORMAT, VERSION = "paceline checkpoint", 1
DATA_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.safetensors")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_DIMS = 32
_MOST_COMPARISONS = 500_000  # of parts with each other; two seconds
_BIG = 1 << 63

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins and ends along each dimension."""


@dataclass(frozen=True, slots=True)
class File:
    """One data file: its name, its bytes, and their sha256."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor's elements, in row-major order, at offset `at` of a file."""

    file: int
    at: int
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(*self.box, strict=True))


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


_SEAL = ',"sha256":"%s"}'


def seal(text: bytes) -> bytes:
    """A JSON object with the sha256 of itself as its last entry."""
    return text[:-1] + (_SEAL % hashlib.sha256(text).hexdigest()).encode()


def unseal(raw: bytes) -> bytes:
    """The object without it. Raises ValueError when a bit has changed."""
    text = raw[: -len(_SEAL % ("0" * 64))] + b"}"
    if seal(text) != raw:
        raise ValueError("its own sha256 is another")
    return text


def parse(raw: bytes) -> tuple[dict[str, Any], list[File], dict[str, Entry]]:
    """The manifest, its files and its tensors, checked in themselves.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: It is none.
    """
    said = json.loads(raw)
    if not isinstance(said, dict) or (said["format"], said["version"]) != (FORMAT, VERSION):
        raise ValueError(f"its format is not {FORMAT!r}, version {VERSION}")
    for name in ("step", "epoch"):
        _number(said[name])
    if not isinstance(said["state"], dict):
        raise TypeError("its state is no object")
    files = [_file(file) for file in said["files"]]
    if len({file.name for file in files}) != len(files):
        raise ValueError("it names a file twice")
    tensors = {str(name): _entry(entry, files) for name, entry in said["tensors"].items()}
    _apart(tensors)
    for name in names(said["state"]):
        if name not in tensors:
            raise ValueError(f"it has no tensor {name[:100]!r}")
    return said, files, tensors


def _number(value: Any, below: int = _BIG) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"{str(value)[:40]} is no count below {below}")
    return value


def _file(said: Mapping[str, Any]) -> File:
    if not DATA_FILE.fullmatch(said["name"]):
        raise ValueError(f"{said['name'][:100]!r} is no name of a file beside the manifest")
    if not _SHA256.fullmatch(said["sha256"]):
        raise ValueError("a sha256 is none")
    return File(said["name"], _number(said["bytes"]), said["sha256"])


def _entry(said: Mapping[str, Any], files: Sequence[File]) -> Entry:
    shape = tuple(_number(n) for n in said["shape"])
    if said["dtype"] not in DTYPES or len(shape) > _MOST_DIMS:
        raise ValueError(f"a tensor of {str(said['dtype'])[:20]!r} with {len(shape)} dimensions")
    parts = tuple(_checked_part(part, shape, DTYPES[said["dtype"]][1], files) for part in said["parts"])
    entry = Entry(said["dtype"], shape, parts)
    covered = sum(math.prod(part.shape) for part in parts)
    if covered != math.prod(shape):
        raise ValueError(f"the parts of a tensor of shape {shape} have {covered} elements")
    return entry


def _checked_part(said: Mapping[str, Any], shape: tuple[int, ...], itemsize: int, files: Sequence[File]) -> Part:
    start = tuple(_number(n) for n in said.get("start", (0,) * len(shape)))
    stop = tuple(_number(n) for n in said.get("stop", shape))
    part = Part(_number(said["file"], len(files)), _number(said["at"]), (start, stop))
    if len(start) != len(shape) or any(not a < b <= n for a, b, n in zip(start, stop, shape, strict=True)):
        raise ValueError(f"{start}..{stop} is no part of a tensor of shape {shape}")
    if part.at + math.prod(part.shape) * itemsize > files[part.file].nbytes:
        raise ValueError(f"a part reaches beyond the end of {files[part.file].name}")
    return part


def _apart(tensors: Mapping[str, Entry]) -> None:
    """No two parts share bytes of a file, and no two parts of a tensor share elements."""
    spans = sorted(
        (part.file, part.at, part.at + math.prod(part.shape) * entry.itemsize)
        for entry in tensors.values()
        for part in entry.parts
    )
    for (file, _, end), (other, start, _) in itertools.pairwise(spans):
        if file == other and start < end:
            raise ValueError("two tensors lie in the same bytes of a file")
    left = _MOST_COMPARISONS
    for entry in tensors.values():
        active: list[Box] = []
        for box in () if _is_grid(entry) else sorted(part.box for part in entry.parts):
            active = [other for other in active if other[1][0] > box[0][0]]
            left -= len(active)
            if left < 0:
                raise ValueError("its tensors are cut too finely")
            if any(meet(box, other) is not None for other in active):
                raise ValueError("two parts of a tensor overlap")
            active.append(box)


def _is_grid(entry: Entry) -> bool:
    """The parts are the cells of a grid, as they are nearly always; then none meets another."""
    cuts = [
        {part.box[0][dim] for part in entry.parts} | {part.box[1][dim] for part in entry.parts}
        for dim in range(len(entry.shape))
    ]
    after = [dict(itertools.pairwise(sorted(cut))) for cut in cuts]
    cells = {part.box[0] for part in entry.parts}
    single = all(
        all(following.get(a) == b for a, b, following in zip(*part.box, after, strict=True)) for part in entry.parts
    )
    return single and len(cells) == len(entry.parts)


def meet(a: Box, b: Box) -> Box | None:
    """What two boxes have in common."""
    start, stop = tuple(map(max, a[0], b[0])), tuple(map(min, a[1], b[1]))
    return (start, stop) if all(i < j for i, j in zip(start, stop, strict=True)) else None


def names(skeleton: Any) -> Iterator[str]:
    """Names of the tensors of a skeleton, each as often as it occurs."""
    stack = [skeleton]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if "$tensor" in value:
                yield str(value["$tensor"])
            else:
                stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


Span = tuple[str, tuple[int, ...], int, int]
"""Type, shape, begin and end of what lies together in a file."""


def spans(tensors: Mapping[str, Entry], file: int) -> set[Span]:
    """What the manifest says of one file."""
    return {
        (entry.dtype, part.shape, part.at, part.at + math.prod(part.shape) * entry.itemsize)
        for entry in tensors.values()
        for part in entry.parts
        if part.file == file
    }
