"""State as names and raw tensors: export to safetensors, and the hash that says whether two models are the same.

The hash of a model is the sha256 over its entries, sorted by name: name, dtype, shape, raw little-endian bytes. It is the
same whether computed from the live model or from the file, on any machine, at any world size. Importing this file imports no
torch, so that ``paceline hash`` stays quick.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.terms.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor, nn

_HEADER_CAP = 100 << 20
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
"""safetensors' names of types: torch's name, and bytes of one element."""


def neutral(name: str) -> str:
    """A parameter's original name: without what ``torch.compile`` puts in front."""
    return name.replace("_orig_mod.", "")


def named_state(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of all models by neutral name; several models are told apart by a prefix."""
    single = len(models) == 1
    return {
        neutral(name) if single else f"{prefix}.{neutral(name)}": tensor.detach()
        for prefix, model in models.items()
        for name, tensor in model.state_dict().items()
        if hasattr(tensor, "detach")
    }


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The hash of tensors in memory; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        describe(digest, name, _dtype_name(tensor.dtype), tuple(tensor.shape))
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes:
            digest.update(memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """The hash of a safetensors file, read without torch.

    Raises:
        FileError: PL603, the file is truncated or not in the format.
    """
    try:
        with path.open("rb") as file:
            entries, start = _read_header(file.read(8), file, path)
            digest = hashlib.sha256()
            for name in sorted(entries):
                entry = entries[name]
                begin, end = entry["data_offsets"]
                describe(digest, name, entry["dtype"], tuple(entry["shape"]))
                file.seek(start + begin)
                _digest_exactly(digest, file, end - begin, path)
            return digest.hexdigest()
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError("PL603", f"{path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise FileError("PL603", f"{path} is not a safetensors file: {error}") from error


def _read_header(prefix: bytes, file: Any, path: Path) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", prefix)
    if length > min(_HEADER_CAP, path.stat().st_size):
        raise FileError("PL603", f"{path} claims a header of {length} bytes")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _digest_exactly(digest: Any, file: Any, nbytes: int, path: Path) -> None:
    while nbytes > 0:
        piece = file.read(min(nbytes, 1 << 20))
        if not piece:
            raise FileError("PL603", f"{path} is truncated: {nbytes} bytes are missing")
        digest.update(piece)
        nbytes -= len(piece)


def describe(digest: Any, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    digest.update(json.dumps([name, dtype, shape]).encode())


def _dtype_name(dtype: Any) -> str:
    spelled = str(dtype).removeprefix("torch.")
    return next((name for name, (theirs, _) in DTYPES.items() if theirs == spelled), str(dtype))


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all: temporary file, fsync, rename.

    Raises:
        FileError: PL601, the file could not be written.
    """
    from safetensors.torch import save_file

    separate = dict(_separate(tensors))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(separate, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:  # safetensors raises its own type for a full disk
        temporary.unlink(missing_ok=True)
        raise FileError("PL601", f"{path} could not be written: {error}") from error


def _separate(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Tied tensors are written once under each name, so that plain ``load_state_dict`` finds all of them."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        yield name, tensor.contiguous() if alone else tensor.contiguous().clone()
