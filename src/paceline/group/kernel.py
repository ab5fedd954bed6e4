"""Builds and loads ``kernel.c``, the hot path of the shared-memory wire.

1. The first process to need it compiles it with the C compiler of the machine, into a private directory of the user.
2. Its name there holds a hash of everything that it is made of, so that a new version never meets an old library.
3. Others of the same run wait for the first (a file lock), then load what it made.

There is no compiler at run time on many machines. That is no error: the wire does the same in Python, with the same bits,
and says so.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.terms.errors import WireError

SOURCE = Path(__file__).with_name("kernel.c")
COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden")
_CLONES = "-DPL_CLONES"  # code for three generations of x86, chosen when it is loaded; not every compiler can
_BUILD_SECONDS = 120

_P, _I32, _I64, _D = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double


class BufferStruct(ctypes.Structure):
    """``pl_buffer`` of kernel.c."""

    _fields_ = (
        *((name, _P) for name in ("next", "payload", "sheet", "sums")),
        *((name, _I64) for name in ("payload_stride", "sheet_stride", "low", "high", "count")),
        ("divisor", _D),
        *((name, _I32) for name in ("header_size", "doubles", "weighted", "stage", "peer", "nonfinite")),
    )


class WireStruct(ctypes.Structure):
    """``pl_wire`` of kernel.c."""

    _fields_ = (
        ("first", _P),
        ("control", _P),
        *((name, _I64) for name in ("control_stride", "quick_ns", "crowded_ns")),
        *((name, _I32) for name in ("rank", "size", "shy", "padding")),
    )


@dataclass(frozen=True, slots=True)
class Kernel:
    """The functions of the library. Pointers are addresses; calls release the interpreter lock."""

    path: Path
    load: Callable[[int], int]
    ring: Callable[[int], None]
    publish: Callable[[int, int, int], None]
    arm: Callable[[int, int], None]
    doze: Callable[[int, int, int], int]
    start: Callable[[int, int, float, int], None]
    poll: Callable[[int, int], int]
    serve: Callable[[int], int]
    wait: Callable[[int, int, int], int]
    missing: Callable[[int, int], int]
    fold: Callable[[int, int, int, int, float, float, int], None]


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "load": (_I64, (_P,)),
    "ring": (None, (_P,)),
    "publish": (None, (_P, _P, _I64)),
    "arm": (None, (_P, ctypes.c_uint32)),
    "doze": (_I32, (_P, ctypes.c_uint32, _I64)),
    "start": (None, (_P, _P, _D, _I32)),
    "poll": (_I32, (_P, _P)),
    "serve": (_I32, (_P,)),
    "wait": (_I32, (_P, _P, _I64)),
    "missing": (_I64, (_P, _P)),
    "fold": (None, (_P, _P, _P, _I64, _D, _D, _I32)),
}


def load(cache_dir: Path | None = None, compilers: Sequence[str] = COMPILERS) -> Kernel:
    """The kernel, built if nobody has built it yet.

    Args:
        cache_dir: Where built kernels are kept; by default ``~/.cache/paceline``.
        compilers: Commands to try, in order.

    Raises:
        WireError: No compiler, or it failed, or the result cannot be loaded (PL206); the message says which.
    """
    compiler, version = _find(compilers)
    try:
        return _open(_build(compiler, version, _private(cache_dir or _home() / ".cache" / "paceline")))
    except OSError:  # no home, or one that cannot be written, locked or trusted: a library for this process alone
        with tempfile.TemporaryDirectory(prefix="paceline-kernel-") as temporary:
            return _open(_build(compiler, version, Path(temporary)))


def _find(compilers: Sequence[str]) -> tuple[str, bytes]:
    """The first compiler that answers, and what it says of itself."""
    for name in compilers:
        try:
            answer = subprocess.run([name, "--version"], capture_output=True, timeout=_BUILD_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return name, answer.stdout
    raise _unavailable(f"there is no C compiler here (tried {', '.join(compilers)})")


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home") from error


def _private(directory: Path) -> Path:
    """`directory`, made for this user alone. Raises OSError where somebody else could put a library into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{directory} can be written by others")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"{directory} cannot be written")
    return directory


def _build(compiler: str, version: bytes, directory: Path) -> Path:
    """Path of the library in `directory`; compiled now unless it is there."""
    machine = "-".join((sys.platform, platform.machine(), *platform.libc_ver()))
    made_of = (SOURCE.read_bytes(), version, *(text.encode() for text in (compiler, machine, *_FLAGS)))
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
    library = directory / f"kernel-{key}.so"
    if library.exists():
        return library
    with (directory / f"kernel-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    """Compile next to the library, then rename: whoever sees the name sees a whole file."""
    clones = platform.machine() in ("x86_64", "AMD64") and platform.libc_ver()[0] == "glibc"
    errors = ""
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as temporary:
        made = Path(temporary) / "kernel.so"
        for extra in ((_CLONES,), ()) if clones else ((),):
            command = [compiler, *_FLAGS, *extra, "-o", str(made), str(SOURCE)]
            try:
                result = subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, text=True)
            except (OSError, subprocess.SubprocessError) as error:
                raise _unavailable(f"{compiler} could not be run: {error}") from error
            if result.returncode == 0:
                made.rename(library)
                return
            errors = result.stderr
    raise _unavailable(f"{compiler} could not compile {SOURCE}:\n{errors.strip()}")


def _open(path: Path) -> Kernel:
    try:
        library = ctypes.CDLL(str(path))
        functions = {name: _bind(library, name, *signature) for name, signature in _SIGNATURES.items()}
        layout = _bind(library, "layout", _I64, ())()
    except (OSError, AttributeError) as error:
        raise _unavailable(f"the library {path} cannot be loaded: {error}") from error
    assert layout == ctypes.sizeof(BufferStruct) * 1000 + ctypes.sizeof(WireStruct), "kernel.c and kernel.py differ"
    return Kernel(path=path, **functions)


def _bind(library: ctypes.CDLL, name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
    function = library[f"pl_{name}"]
    function.restype, function.argtypes = result, arguments
    return function


def _unavailable(why: str) -> WireError:
    return WireError("PL206", f"the C kernel is not available: {why}", help="install a C compiler (gcc or clang).")
