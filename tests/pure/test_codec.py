"""Codecs: what they lose is bounded, what is not finite stays so, and all ranks hold the same bits afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paceline.exchange.codec import CODECS, Codec
from paceline.exchange.coded import coded_mean
from paceline.exchange.link import Message
from paceline.group.memory_wire import MemoryNetwork
from paceline.terms.bucket import Bucket

LARGE = float(torch.tensor(3.4e38))
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def roundtrip(codec: Codec, x: Tensor) -> Tensor:
    code = torch.zeros(codec.nbytes(x.numel()), dtype=torch.uint8)
    codec.encode(x, code)
    out = torch.empty_like(x)
    codec.decode(code, out)
    return out


def exchange(
    codec: Codec, payloads: list[Tensor], weights: list[float], divisor: float
) -> tuple[list[Tensor], list[list[float]]]:
    """The coded mean on simulated ranks: payloads and headers afterwards. Headers are [weight, 1]."""
    network, size = MemoryNetwork(len(payloads)), len(payloads)
    messages = []
    for rank, payload in enumerate(payloads):
        wire = network.wire(rank)
        (buffer,) = wire.cut(wire.allocate(payload.numel(), payload.dtype, payload.device), [payload.numel()], [2])
        buffer.tensor.copy_(payload)
        bucket = Bucket(0, (), payload.numel(), payload.dtype)
        messages.append(Message(bucket, buffer, [weights[rank], 1.0], divisor, rank, size))
    headers = [network.spawn(m.rank, coded_mean(m, codec)) for m in messages]
    network.run()
    return [m.payload for m in messages], [h.wait() for h in headers]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exponent", [-100, -30, -8, 0, 8, 30, 100])
def test_what_a_cast_loses_is_bounded(dtype: torch.dtype, exponent: int) -> None:
    x = torch.ldexp(
        torch.randn(4001, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor(exponent)
    )
    x = x.to(dtype)
    x = x[torch.isfinite(x) & (x.abs() >= torch.finfo(dtype).tiny)]
    if not x.numel():
        return
    exact, largest = x.double(), x.double().abs().max()
    bf16 = (roundtrip(CODECS["bf16"](), x).double() - exact).abs()
    fp16 = (roundtrip(CODECS["fp16"](), x).double() - exact).abs()
    assert bool((bf16 <= 2**-8 * exact.abs()).all())
    assert bool((fp16 <= 2**-11 * torch.maximum(exact.abs(), 2**-28 * largest)).all())


def test_sixteen_bits_of_the_same_type_lose_nothing() -> None:
    x = torch.randn(100)
    assert torch.equal(roundtrip(CODECS["bf16"](), x.bfloat16()), x.bfloat16())
    assert torch.equal(roundtrip(CODECS["fp16"](), x.half()), x.half())


@given(st.lists(st.floats(-LARGE, LARGE, width=32), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_fp16_never_makes_infinity(numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    out = roundtrip(CODECS["fp16"](), x)
    assert bool(torch.isfinite(out).all())
    assert float((out.double() - x.double()).abs().max()) <= max(2**-11 * float(x.abs().max()), 2**-140)


def test_what_fp16_could_not_hold_arrives_all_the_same() -> None:
    x = torch.tensor([3e38, -1e38, 7e4, 1.0])
    assert float(roundtrip(CODECS["fp16"](), x)[0]) == pytest.approx(3e38, rel=2**-11)
    huge = torch.tensor([1e300, -2e299], dtype=torch.float64)
    torch.testing.assert_close(roundtrip(CODECS["fp16"](), huge), huge, rtol=2**-11, atol=0)
    tiny = torch.tensor([1e-30, -3e-31])
    torch.testing.assert_close(roundtrip(CODECS["fp16"](), tiny), tiny, rtol=2**-11, atol=0)
    assert torch.equal(roundtrip(CODECS["fp16"](), torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_infinity_and_nan_are_not_hidden(name: str) -> None:
    x = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    torch.testing.assert_close(roundtrip(CODECS[name](), x), x, rtol=2**-8, atol=0, equal_nan=True)
    mine, yours = torch.ones(40), torch.ones(40)
    yours[7] = math.nan
    yours[30] = math.inf
    for payload in exchange(CODECS[name](), [mine, yours], [1.0, 1.0], 2.0)[0]:
        assert torch.equal(torch.isfinite(payload).logical_not().nonzero().flatten(), torch.tensor([7, 30]))


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("name", sorted(CODECS))
def test_the_coded_mean_is_near_the_mean_and_the_same_everywhere(name: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = [float(r + 1) for r in range(size)]
    gradients = [torch.randn(1003, generator=generator) * 10.0**r for r in range(size)]
    divisor = 5.0
    payloads = [w / divisor * g for w, g in zip(weights, gradients, strict=True)]
    found, headers = exchange(CODECS[name](), payloads, weights, divisor)

    exact = sum((p.double() for p in payloads), torch.zeros(1003, dtype=torch.float64)) * divisor / sum(weights)
    spread = sum((p.double().abs() for p in payloads), torch.zeros(1003, dtype=torch.float64)) * divisor / sum(weights)
    unit = {"bf16": 2**-8, "fp16": 2**-11}[name]
    assert bool(((found[0] - exact).abs() <= 1.01 * unit * (spread + exact.abs()) + 1e-6).all())
    assert all(torch.equal(found[0], other) for other in found)
    assert headers == [[sum(weights), float(size)]] * size


def test_fp16_sums_beyond_its_range() -> None:
    payloads = [torch.full((33,), 6e4) for _ in range(4)]
    found, _ = exchange(CODECS["fp16"](), payloads, [1.0] * 4, 1.0)
    torch.testing.assert_close(found[0], torch.full((33,), 6e4), rtol=2**-10, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_payloads_of_every_type_and_shorter_than_the_group(dtype: torch.dtype) -> None:
    payloads = [torch.tensor([1.0 + r, -2.0], dtype=dtype) for r in range(5)]
    found, headers = exchange(CODECS["bf16"](), payloads, [0.0, 1.0, 1.0, 0.0, 2.0], 4.0)
    assert all(torch.equal(p, torch.tensor([15.0, -10.0], dtype=dtype)) for p in found)
    assert headers[0] == [4.0, 5.0]


@pytest.mark.parametrize("name", sorted(CODECS))
def test_half_the_bytes_of_float32_travel(name: str) -> None:
    size, numel = 4, 40_000
    network = MemoryNetwork(size)
    for rank in range(size):
        wire = network.wire(rank)
        (buffer,) = wire.cut(wire.allocate(numel, torch.float32, torch.device("cpu")), [numel], [1])
        message = Message(Bucket(0, (), numel, torch.float32), buffer, [1.0], 4.0, rank, size)
        network.spawn(rank, coded_mean(message, CODECS[name]()))
    network.run()
    plain = size * 2 * (size - 1) / size * 4 * numel
    assert network.bytes_sent / plain == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_codecs_say_what_they_do(name: str) -> None:
    codec = CODECS[name]()
    assert codec.name == name
    assert codec.describe().startswith(f"{name}: 2 bytes")
    assert isinstance(codec, Codec)
