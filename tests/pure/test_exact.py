"""Sums in fixed point: any order, any grouping, the same bits; and how far they are from the truth."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paceline.data.split import share, turns
from paceline.exchange import exact
from paceline.exchange.exact import LIMIT, MOST_SHARDS, fits, fold, mean, total
from paceline.exchange.recipes import ddp
from paceline.exchange.simulate import simulate
from paceline.exchange.strategy import build, threads
from paceline.terms.errors import UsageError


def sums_of(groups: list[list[Tensor]]) -> Tensor:
    """Each group folded by one rank, the ranks' sums added up."""
    every = []
    for group in groups:
        sums = torch.full((2 * group[0].numel(),), math.nan, dtype=torch.float64)
        for number, terms in enumerate(group):
            fold(terms, sums, first=number == 0)
        every.append(sums)
    return torch.stack(every).sum(0)


def terms_of(generator: torch.Generator, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Terms of all magnitudes, each with its counterpart of about the same size and the other sign."""
    scale = 2.0 ** torch.randint(-80, 27, (count, 257), generator=generator).double()
    terms = torch.randn(count, 257, generator=generator, dtype=torch.float64).clamp(-2, 2) * scale
    terms[count // 2 :] -= terms[: count - count // 2].clone()
    assert terms.abs().max() <= LIMIT
    return list(terms.to(dtype))


@given(st.integers(0, 2**32), st.integers(1, MOST_SHARDS), st.sampled_from([torch.float32, torch.float64]), st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_and_any_grouping_give_the_same_bits(
    seed: int, count: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = terms_of(generator, count, dtype)
    want = total(sums_of([terms]))
    order = data.draw(st.permutations(range(count)))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=8))) if count > 1 else []
    groups = [[terms[i] for i in order[a:b]] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    assert torch.equal(total(sums_of(groups)), want)

    truth = [sum(map(Fraction, column), Fraction()) for column in torch.stack(terms).double().T[:20].tolist()]
    for right, got in zip(truth, want.tolist(), strict=False):
        allowed = count * Fraction(2) ** -65 + abs(right) * Fraction(2) ** -53
        assert abs(Fraction(got) - right) <= allowed


def test_gradients_of_usual_size_lose_nothing() -> None:
    terms = [torch.randn(1000) for _ in range(8)]
    want = [math.fsum(column) for column in torch.stack(terms).double().T.tolist()]
    assert total(sums_of([terms])).tolist() == want


def test_c_and_python_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = terms_of(torch.Generator().manual_seed(1), 8, torch.float32)
    with_c = sums_of([terms])
    monkeypatch.setattr(exact, "_kernel", lambda: None)
    assert torch.equal(with_c.view(torch.int64), sums_of([terms]).view(torch.int64))


def test_worst_case_stays_exact() -> None:
    """As many of the largest terms as there may be, and a tail that only the low word holds."""
    term = torch.tensor([LIMIT, -LIMIT, 2.0**-41 + 2.0**-64, 2.0**-20 - 2.0**-44])
    assert total(sums_of([[term] * MOST_SHARDS])).tolist() == (term.double() * MOST_SHARDS).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2 * LIMIT, -2 * LIMIT])
def test_what_cannot_be_summed_is_seen(bad: float) -> None:
    terms = torch.zeros(100_000)
    assert fits(terms)
    assert fits(terms[:0])
    terms[70_000] = bad
    assert not fits(terms)


def test_mean_of_weighted_terms() -> None:
    weights = [1.5, 2.0, 0.25]
    terms = [torch.full((3,), weight / 4 * value) for weight, value in zip(weights, (1.0, 2.0, 4.0), strict=True)]
    assert mean(sums_of([terms]), weights, 4.0).tolist() == pytest.approx([6.5 / 3.75] * 3, rel=1e-15)
    assert mean(sums_of([[torch.ones(2)]]), [0.0], 4.0).tolist() == [1.0, 1.0]


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 70))
def test_shards_do_not_depend_on_the_ranks(count: int, shards: int, size: int) -> None:
    ranks = [turns(count, shards, size, rank) for rank in range(size)]
    own = [turn for rank in ranks for turn in rank if not turn.filler]
    parts = min(shards, count)
    assert [(turn.shard, turn.start, turn.rows) for turn in own] == [(v, *share(count, parts, v)) for v in range(parts)]
    assert all(turn.rows for rank in ranks for turn in rank)
    assert {len(rank) for rank in ranks} == {-(-parts // size)}


def test_simulated_ranks_agree_with_one() -> None:
    shards = [(torch.randn(5), torch.randn(7, 3)) for _ in range(4)]
    start = [torch.zeros(5), torch.zeros(7, 3)]

    def of_one(peer: int, step: int, parameters: list[Tensor]) -> tuple[list[Tensor], float]:
        return [p + g for p, g in zip(parameters, shards[peer], strict=True)], 3.0

    def run(peers: int) -> list[list[Tensor]]:
        sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
        exchange = ddp(exact=True, shards=4)
        return simulate(exchange, peers=peers, steps=3, gradient=of_one, parameters=start, optimizer=sgd).parameters

    peers = run(4)
    assert all(torch.equal(a, b) for peer in peers for a, b in zip(peer, peers[0], strict=True))
    truth = [torch.stack([g[i] for g in shards]).mean(0) for i in (0, 1)]
    factor = -(1 - 0.9**3)
    for got, gradient in zip(peers[0], truth, strict=True):
        assert torch.allclose(got, factor * gradient, atol=1e-6)


@pytest.mark.parametrize(
    "text", ["ddp(exact=True)", "ddp(exact=True, shards=4)", "ddp(bucket_mb=2, exact=True, shards=64)"]
)
def test_text_and_back(text: str) -> None:
    exchange = build(text)
    assert exchange.text == text
    assert build(exchange.text) == exchange
    assert f"cut into {exchange.shards}" in exchange.describe()
    assert threads(text) == 1
    assert threads("ddp()") is None


@pytest.mark.parametrize(
    "arguments",
    [
        "exact=1",
        "exact=True, shards=0",
        "exact=True, shards=65",
        "exact=True, shards=2.0",
        "shards=4",
        "exact=True, codec=bf16",
        "exact=True, algorithm=ring",
    ],
)
def test_what_cannot_be_is_refused(arguments: str) -> None:
    with pytest.raises(UsageError, match="PL203"):
        build(f"ddp({arguments})")
