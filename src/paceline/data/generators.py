"""Random states as values: of this process, and of the generators that a loader carries with it.

Under plain ``python`` an order may be drawn from any of torch's, Python's and NumPy's global generators, or from an
object that the loader, its sampler or its data set holds. All of them can be read, written and turned into JSON here.
NumPy is looked at only where the program has loaded it.
"""

from __future__ import annotations

import random
import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class RandomState:
    """The state of the process's three global generators at one moment; `numpy` is None where it is not loaded."""

    torch: torch.Tensor
    python: tuple[Any, ...]
    numpy: dict[str, Any] | None

    @classmethod
    def take(cls) -> RandomState:
        """The state now."""
        numpy = loaded_numpy()
        return cls(
            torch.default_generator.get_state(),
            random.getstate(),
            numpy.random.get_state(legacy=False) if numpy else None,
        )

    def put(self) -> None:
        """Make this the state of the process."""
        torch.default_generator.set_state(self.torch)
        random.setstate(self.python)
        if self.numpy is not None and (numpy := loaded_numpy()):
            numpy.random.set_state(self.numpy)

    def to_json(self) -> dict[str, Any]:
        """About 14 kB of JSON values."""
        return {"torch": _tensor_text(self.torch), "python": _python_json(self.python), "numpy": _encode(self.numpy)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RandomState:
        """The inverse of :meth:`to_json`."""
        numpy = _decode(value["numpy"]) if loaded_numpy() else None
        return cls(_text_tensor(value["torch"]), _json_python(value["python"]), numpy)


def seed_all(seed: int) -> None:
    """Seed all generators of the process, on every device, from one integer; each gets its own derivation of it."""
    torch.manual_seed(derive(seed, "torch"))
    random.seed(derive(seed, "python"))
    if numpy := loaded_numpy():
        numpy.random.seed(derive(seed, "numpy") & 0xFFFFFFFF)


def read_device() -> str | None:
    """The state of the current accelerator's generator, as text; None where the program uses none."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return _tensor_text(torch.cuda.get_rng_state()) if used else None


def write_device(state: str | None) -> None:
    """Set what :func:`read_device` gave, where there is an accelerator."""
    if state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_text_tensor(state))


def derive(*words: object) -> int:
    """A non-negative 63-bit number that depends on all of `words` and on nothing else."""
    return int.from_bytes(blake2b(repr(words).encode(), digest_size=8).digest(), "little") >> 1


def held_generators(holders: Iterable[object]) -> list[Any]:
    """What in the attributes of `holders` decides about an order: generators, and samplers that count epochs.

    A sampler counts epochs when it has ``set_epoch`` and an integer ``epoch``, as torch's own convention has it.
    """
    found: dict[int, Any] = {}
    for holder in holders:
        for value in (holder, *getattr(holder, "__dict__", {}).values()):
            if _kind(value):
                found[id(value)] = value
    return list(found.values())


def read(generator: Any) -> Any:
    """The state of one of :func:`held_generators`, as JSON values."""
    match _kind(generator):
        case "torch":
            return _tensor_text(generator.get_state())
        case "python":
            return _python_json(generator.getstate())
        case "numpy":
            return _encode(generator.bit_generator.state)
        case "legacy numpy":
            return _encode(generator.get_state(legacy=False))
        case _:
            return generator.epoch


def write(generator: Any, state: Any) -> None:
    """Set what :func:`read` gave."""
    match _kind(generator):
        case "torch":
            generator.set_state(_text_tensor(state))
        case "python":
            generator.setstate(_json_python(state))
        case "numpy":
            generator.bit_generator.state = _decode(state)
        case "legacy numpy":
            generator.set_state(_decode(state))
        case _ if generator.epoch != state:
            generator.set_epoch(state)


def _kind(value: object) -> str:
    """Which sort of generator `value` is; empty for none."""
    if isinstance(value, torch.Generator):
        return "torch" if value.device.type == "cpu" else ""
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return "python"
    if numpy := loaded_numpy():
        if isinstance(value, numpy.random.Generator):
            return "numpy"
        if isinstance(value, numpy.random.RandomState):
            return "legacy numpy"
    counts = callable(getattr(value, "set_epoch", None)) and isinstance(getattr(value, "epoch", None), int)
    return "epoch" if counts else ""


def loaded_numpy() -> Any:
    """NumPy if the program has loaded it, or None."""
    return sys.modules.get("numpy")


def _tensor_text(state: torch.Tensor) -> str:
    return b64encode(bytes(state.tolist())).decode()


def _text_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(b64decode(text)), dtype=torch.uint8)


def _python_json(state: tuple[Any, ...]) -> list[Any]:
    version, words, gauss = state
    return [version, b64encode(array("I", words).tobytes()).decode(), gauss]


def _json_python(value: list[Any]) -> tuple[Any, ...]:
    version, text, gauss = value
    return version, tuple(array("I", b64decode(text))), gauss


def _encode(value: Any) -> Any:
    """NumPy's state dictionaries as JSON: arrays become objects with a type and their bytes."""
    if isinstance(value, dict):
        return {name: _encode(item) for name, item in value.items()}
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):
        return {"dtype": str(value.dtype), "bytes": b64encode(value.tobytes()).decode()}
    return value


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "bytes"}:
        return loaded_numpy().frombuffer(bytearray(b64decode(value["bytes"])), dtype=value["dtype"])
    return {name: _decode(item) for name, item in value.items()}
