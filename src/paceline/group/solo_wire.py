"""The wire of a single rank: every sum has one term, every gathering one member. What a run with ``-n 1`` exchanges through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from paceline.group.tail import scale
from paceline.group.wire import AllGather, AllReduce, Buffer, Region, Request, Together, Work
from paceline.group.works import All, Done
from paceline.terms.errors import WireError

T = TypeVar("T")


class SoloWire:
    """A :class:`~paceline.group.wire.Wire` between nobody. Results are those of the others with one rank, bit for bit."""

    name = "solo"
    rank = 0
    size = 1
    ordered = False

    def __init__(self) -> None:
        self._keys = 0

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Region:
        try:
            return Region(torch.zeros(numel, dtype=dtype, device=device))
        except RuntimeError as error:
            raise WireError("PL405", f"no memory for {numel} elements of {dtype}: {error}") from error

    def allocate_shared(self, numel: int, dtype: torch.dtype) -> Region:
        return self.allocate(numel, dtype, torch.device("cpu"))

    def cut(self, region: Region, numels: Sequence[int], header_size: Sequence[int]) -> list[Buffer]:
        buffers, at = [], 0
        for key, (numel, size) in enumerate(zip(numels, header_size, strict=True), self._keys):
            buffers.append(Buffer(region.tensor[at : at + numel], size, key))
            at += numel
        self._keys += len(buffers)
        return buffers

    def start(self, request: Request[T]) -> Work[T]:
        return cast("Work[T]", self._start(request))

    def _start(self, request: Request[Any]) -> Work[Any]:
        match request:
            case AllReduce(buffer=buffer, header=header, divisor=divisor):
                scale(buffer.tensor, header, divisor)
                return Done([float(number) for number in header])
            case AllGather(tensor=tensor):
                return Done([tensor.clone()])
            case Together(requests=requests):
                return All([self._start(each) for each in requests])
        raise WireError("PL206", f"a single rank has nobody for a {type(request).__name__}")

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """`tensor` is the only one there is."""

    def gather_bytes(self, tag: str, payload: bytes) -> list[bytes]:
        return [payload]

    def barrier(self, tag: str) -> None:
        """Everybody is here."""

    def close(self) -> None:
        """Nothing is held."""
