"""Links behind the optimizer, on simulated peers: the formulas, the degenerate cases, and the known ways to get them wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paceline.exchange.cadence import Every, Pace, Within
from paceline.exchange.chain import Chain, Exchange, chain, optimizer
from paceline.exchange.gossip import Gossip, PushSum
from paceline.exchange.graphs import DIRECTED, UNDIRECTED, Graph, connected, read_edges
from paceline.exchange.link import Message, State
from paceline.exchange.merge import Mean, Median, Trimmed
from paceline.exchange.outer import Elastic, Outer
from paceline.exchange.simulate import Simulation, simulate
from paceline.exchange.strategy import build, check
from paceline.group.memory_wire import MemoryNetwork
from paceline.terms.bucket import Bucket
from paceline.terms.errors import UsageError

CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.05)
SIZES = st.integers(1, 9)


class Peers:
    """Simulated ranks that hold one bucket each and run one link on it, round by round."""

    def __init__(self, link: Any, start: list[Tensor]) -> None:
        self.chain: Chain = chain(optimizer, link)
        self.size, self.values = len(start), [t.clone() for t in start]
        self.bucket = Bucket(0, (), start[0].numel(), start[0].dtype)
        self.states: list[list[State]] = [self.chain.init(self.bucket) for _ in start]
        for value, states in zip(self.values, self.states, strict=True):
            self.chain.begin(value, states)

    def round(self, *, weights: list[float] | None = None, full: bool = False) -> None:
        network = MemoryNetwork(self.size)
        buffers = []
        for rank, value in enumerate(self.values):
            wire = network.wire(rank)
            (buffer,) = wire.cut(wire.allocate(value.numel(), value.dtype, CPU), [value.numel()], [1])
            buffer.tensor.copy_(value)
            header = [weights[rank] if weights else 1.0]
            message = Message(self.bucket, buffer, header, 1.0, rank, self.size, full=full)
            network.spawn(rank, self.chain.exchange_parameters(message, self.states[rank]))
            buffers.append(buffer)
        network.run()
        self.values = [buffer.tensor.clone() for buffer in buffers]

    def step(self, updates: list[Tensor]) -> None:
        self.values = [v - u for v, u in zip(self.values, updates, strict=True)]


def noise(size: int, seed: int, numel: int = 6) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, dtype=torch.float64, generator=g) for _ in range(size)]


def same(size: int) -> list[Tensor]:
    return [torch.arange(6, dtype=torch.float64)] * size


# ---- the outer step -------------------------------------------------------------------------------------------------
@given(st.integers(2, 5), st.integers(0, 10_000), st.floats(0.1, 1.5), st.floats(0, 0.95), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_outer_step_is_that_of_the_paper(size: int, seed: int, lr: float, mu: float, nesterov: bool) -> None:
    """From the anchor, along the drift (anchor minus parameters: the sign), with torch's own SGD as the oracle."""
    peers = Peers(Outer(lr, mu, nesterov), same(size))
    theta = torch.nn.Parameter(peers.values[0].clone())
    oracle = torch.optim.SGD([theta], lr=lr, momentum=mu, nesterov=nesterov and mu > 0)
    weights = [float(1 + r) for r in range(size)]
    for turn in range(4):
        for inner in range(3):
            peers.step(noise(size, seed + 10 * turn + inner))
        drift = [theta.detach() - v for v in peers.values]
        theta.grad = sum((w * d for w, d in zip(weights, drift, strict=True)), torch.zeros(6)) / sum(weights)
        oracle.step()
        peers.round(weights=weights)
        for value in peers.values:
            torch.testing.assert_close(value, theta.detach(), rtol=1e-12, atol=1e-12)
            assert torch.equal(value, peers.values[0])


def test_drift_shrinks_a_loss() -> None:
    """The sign of the drift, seen from outside: on a bowl every round brings all ranks nearer to its bottom."""
    peers = Peers(Outer(0.7, 0.9), [torch.full((6,), 10.0, dtype=torch.float64)] * 3)
    before = 10.0
    for _ in range(3):
        for _ in range(4):
            peers.step([0.02 * v for v in peers.values])
        peers.round()
        assert float(peers.values[0].abs().max()) < before
        before = float(peers.values[0].abs().max())


def test_what_no_rank_has_changed_stays_what_it_was_to_the_bit() -> None:
    start = [torch.tensor([0.1, 1 / 3, 1e-9, 7.7], dtype=torch.float32)] * 3
    peers = Peers(Outer(), start)
    for weights in ([3.0, 5.0, 7.0], [1.0, 1.0, 2.0]):
        peers.round(weights=weights)
    assert all(torch.equal(value, start[0]) for value in peers.values)


def test_a_rank_without_weight_does_not_count_whatever_it_holds() -> None:
    peers = Peers(Outer(), same(3))
    ups = noise(3, 1)
    peers.step(ups)
    peers.values[2] = torch.full((6,), float("nan"), dtype=torch.float64)
    peers.round(weights=[1.0, 3.0, 0.0])
    torch.testing.assert_close(peers.values[2], same(1)[0] - (ups[0] + 3 * ups[1]) / 4, rtol=1e-14, atol=1e-14)


def test_the_outer_state_comes_back_from_a_copy() -> None:
    peers, other = Peers(Outer(0.7, 0.9), same(2)), Peers(Outer(0.7, 0.9), same(2))
    peers.step(noise(2, 3))
    peers.round()
    other.values = [v.clone() for v in peers.values]
    other.states = [[{k: v.clone() for k, v in state.items()} for state in states] for states in peers.states]
    for each in (peers, other):
        each.step(noise(2, 4))
        each.round()
    assert torch.equal(peers.values[0], other.values[0])
    fresh = Peers(Outer(0.7, 0.9), peers.values)
    assert set(peers.states[0][0]) == set(fresh.states[0][0]) == {"anchor", "momentum"}


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_a_codec_rounds_the_drift_and_not_the_parameters(codec: str) -> None:
    peers = Peers(build(f"local_sgd(codec={codec})").chain.parameter_links[0], [torch.full((64,), 1000.0)] * 3)
    peers.step([0.001 * torch.randn(64, generator=torch.Generator().manual_seed(r)) for r in range(3)])
    exact = sum(peers.values[1:], peers.values[0].double()) / 3
    peers.round()
    assert torch.equal(peers.values[0], peers.values[2])
    assert float((peers.values[0] - exact).abs().max()) < 1e-3


@pytest.mark.parametrize(("merge", "expected"), [(Median(), 2.5), (Trimmed(0.25), 2.5), (Trimmed(0.0), 26.5)])
def test_robust_merges_bear_a_wild_rank(merge: Any, expected: float) -> None:
    peers = Peers(Outer(merge=merge), [torch.zeros(4, dtype=torch.float64)] * 4)
    peers.values = [torch.full((4,), v, dtype=torch.float64) for v in (1.0, 2.0, 3.0, 100.0)]
    peers.round()
    assert all(torch.equal(v, torch.full((4,), expected, dtype=torch.float64)) for v in peers.values)


# ---- elastic averaging ----------------------------------------------------------------------------------------------
@given(st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_both_elastic_moves_are_from_the_old_values(size: int, seed: int) -> None:
    peers = Peers(Elastic(beta=0.9), same(size))
    centre = peers.values[0].clone()
    for turn in range(3):
        peers.step(noise(size, seed + turn))
        pulls = [0.9 / size * (v - centre) for v in peers.values]
        expected = [v - d for v, d in zip(peers.values, pulls, strict=True)]
        centre = centre + sum(pulls, torch.zeros(6))
        peers.round(weights=[float(r) for r in range(size)])  # rows do not weigh
        for value, want in zip(peers.values, expected, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)
    peers.round(full=True)
    assert all(torch.equal(v, peers.values[0]) for v in peers.values)


# ---- graphs ---------------------------------------------------------------------------------------------------------
@given(SIZES, st.sampled_from([*UNDIRECTED, "0-1 1-2 2-3 3-0"]))
def test_mixing_is_symmetric_doubly_stochastic_and_connected(size: int, name: str) -> None:
    graph = Graph(name)
    rows = graph.mixing(size)
    assert connected(graph.edges(size), size)
    for i, row in enumerate(rows):
        assert abs(sum(row) - 1.0) < 1e-12
        assert min(row) > -1e-12
        assert all(abs(row[j] - rows[j][i]) < 1e-15 for j in range(size))


@given(SIZES, st.integers(0, 20), st.sampled_from([*DIRECTED, "0-1 1-2"]))
def test_pushes_go_to_others_and_reach_everybody_in_the_end(size: int, turn: int, name: str) -> None:
    sends = Graph(name).sends(size, turn)
    assert all(rank not in to and len(set(to)) == len(to) for rank, to in enumerate(sends))
    reached = {0}
    for _ in range(size * 4):
        turn += 1
        reached |= {to for rank, out in enumerate(Graph(name).sends(size, turn)) if rank in reached for to in out}
    assert reached == set(range(size))


def test_the_metropolis_weights_of_a_ring_and_of_the_complete_graph() -> None:
    assert Graph("ring").mixing(5)[0] == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 3])
    assert Graph("complete").mixing(4)[2] == pytest.approx([0.25] * 4)
    assert Graph("exponential").sends(5, 1)[3] == [0]
    assert sorted(Graph("torus").edges(6)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 4), (2, 5), (3, 4), (3, 5), (4, 5)]


def test_edges_are_read_and_give_way_to_a_ring_when_those_left_are_not_connected() -> None:
    assert read_edges("0-1 2-1,1-0") == {(0, 1), (1, 2)}
    assert Graph("0-3 1-3 2-3").edges(3) == Graph("ring").edges(3)
    assert Graph("0-1 1-2").edges(2) == {(0, 1)}


# ---- gossip ---------------------------------------------------------------------------------------------------------
@given(st.integers(1, 7), st.sampled_from(UNDIRECTED), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_gossip_keeps_the_mean_and_comes_to_a_consensus(size: int, name: str, seed: int) -> None:
    peers = Peers(Gossip(Graph(name)), noise(size, seed))
    mean = sum(peers.values, torch.zeros(6)) / size
    spread = max(float((v - mean).abs().max()) for v in peers.values)
    for _ in range(60):
        peers.round(weights=[1.0 + r for r in range(size)])
    torch.testing.assert_close(sum(peers.values, torch.zeros(6)) / size, mean, rtol=1e-10, atol=1e-10)
    assert max(float((v - mean).abs().max()) for v in peers.values) <= 0.05 * spread + 1e-12


@given(st.integers(2, 7), st.sampled_from(DIRECTED), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_push_sum_conserves_mass_and_comes_to_a_consensus(size: int, name: str, seed: int) -> None:
    """Also from unequal masses, as after a member was lost: z goes to the mean weighted by mass."""
    peers = Peers(PushSum(Graph(name)), noise(size, seed))
    for rank, (state,) in enumerate(peers.states):
        state["mass"].fill_(0.5 + rank)
    masses = [float(state["mass"]) for (state,) in peers.states]
    total = sum((w * z for w, z in zip(masses, peers.values, strict=True)), torch.zeros(6))
    for _ in range(60):
        peers.round()
        now = [float(state["mass"]) for (state,) in peers.states]
        assert sum(now) == pytest.approx(sum(masses), rel=1e-12)
        x = sum((w * z for w, z in zip(now, peers.values, strict=True)), torch.zeros(6))
        torch.testing.assert_close(x, total, rtol=1e-10, atol=1e-10)
    for value in peers.values:
        torch.testing.assert_close(value, total / sum(masses), rtol=1e-2, atol=1e-2)
    peers.round(full=True)
    assert [float(state["mass"]) for (state,) in peers.states] == [1.0] * size
    assert all(torch.equal(value, peers.values[0]) for value in peers.values)
    torch.testing.assert_close(peers.values[0], total / sum(masses), rtol=1e-10, atol=1e-10)


def test_push_sum_with_float32_parameters_keeps_its_mass_in_float64() -> None:
    peers = Peers(PushSum(Graph("ring")), [t.float() for t in noise(3, 0)])
    for _ in range(50):
        peers.round()
    assert sum(float(state["mass"]) for (state,) in peers.states) == pytest.approx(3.0, rel=1e-14)
    assert peers.values[0].dtype is torch.float32


# ---- degenerate cases, whole chains ---------------------------------------------------------------------------------
def begin() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((5, 3), (5,), (4, 5), (2, 2))]


def gradient(peer: int, step: int, parameters: list[Tensor], *, weigh: bool = True) -> tuple[list[Tensor], float]:
    generator = torch.Generator().manual_seed(1000 * step + peer)
    grads = [0.3 * p + torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    return grads, float(peer + 1 + step % 3) if weigh else 1.0


EVEN = partial(gradient, weigh=False)
BUCKETS = 100 / 2**20


def run(text: str, peers: int = 4, steps: int = 12, given: Callable[..., Any] = gradient, opt: Any = SGD) -> Simulation:
    exchange: Exchange = build(text)
    return simulate(exchange, peers=peers, steps=steps, gradient=given, parameters=begin(), optimizer=opt)


def distance(a: Simulation, b: Simulation) -> float:
    pairs = zip(a.parameters, b.parameters, strict=True)
    return max(float((x - y).abs().max()) for p, q in pairs for x, y in zip(p, q, strict=True))


EQUAL = [
    ("local_sgd(1)", "ddp()", gradient),
    ("diloco(every=1, lr=1, momentum=0)", "local_sgd(1)", gradient),
    ("diloco(every=6, lr=1, momentum=0)", "local_sgd(6)", gradient),
    ("gossip(complete)", "local_sgd(1)", EVEN),
    ("gossip('0-1 1-2 2-3 3-0')", "gossip(ring)", EVEN),
    ("sgp(complete)", "gossip(complete)", EVEN),
    ("sgp('0-1 1-2 2-3 3-0')", "gossip(ring)", EVEN),
    ("local_sgd(every=3, merge=trimmed(0.0))", "local_sgd(3)", EVEN),
    ("then(ddp(), after=12, next=local_sgd(5))", "ddp()", gradient),
    ("then(local_sgd(5), after=4, next=ddp())", "then(local_sgd(5), after=4, next=local_sgd(1))", gradient),
    ("post_local_sgd(start=6, every=3)", "then(ddp, 6, local_sgd(3))", gradient),
    ("diloco(every=4, fragments=4)", "diloco(every=4, fragments=4, overlap=0)", gradient),
]


@pytest.mark.parametrize(("one", "other", "given"), EQUAL)
def test_degenerate_cases_are_equal(one: str, other: str, given: Callable[..., Any]) -> None:
    assert distance(run(one, given=given), run(other, given=given)) < 1e-12


@pytest.mark.parametrize(
    "text",
    ["local_sgd(3)", "diloco(every=6)", "easgd(every=2)", "gossip()", "sgp()", "diloco(6, fragments=3, overlap=1)"],
)
def test_one_worker_is_the_plain_loop_to_the_bit(text: str) -> None:
    opt = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    assert distance(run(text, peers=1, opt=opt), run("ddp()", peers=1, opt=opt)) == 0.0


@pytest.mark.parametrize("text", ["local_sgd(5)", "diloco(every=5)", "easgd(every=5)", "gossip(ring)", "sgp()"])
def test_at_the_end_all_hold_the_same(text: str) -> None:
    found = run(text, steps=13)
    assert all(torch.equal(a, b) for p in found.parameters for a, b in zip(p, found.parameters[0], strict=True))


def test_eight_times_fewer_rounds_send_eight_times_fewer_bytes() -> None:
    every, eighth = run("local_sgd(1)", steps=16), run("local_sgd(8)", steps=16)
    assert every.bytes_sent == 8 * eighth.bytes_sent
    half = run("local_sgd(8, codec=bf16)", steps=16)
    assert half.bytes_sent < 0.5 * eighth.bytes_sent


# ---- fragments ------------------------------------------------------------------------------------------------------
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_fragments_are_due_in_turn_one_at_a_time(count: int, each: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, each - 1))
    exchange = build(f"diloco(every={count * each}, fragments={count}, overlap={overlap})")
    rounds = exchange.rounds
    assert rounds is not None
    log: list[tuple[str, int, int]] = []
    turn = since = 0
    for step in range(1, 3 * count * each + 1):
        since += 1
        if rounds.sends(since) and (not log or log[-1][0] == "apply"):
            log.append(("send", rounds.fragment(turn), step))
        if rounds.cadence.due(since, Pace()):
            log.append(("apply", rounds.fragment(turn), step))
            turn, since = turn + 1, 0
    applied = [(fragment, step) for what, fragment, step in log if what == "apply"]
    assert [f for f, _ in applied] == [k % count for k in range(len(applied))]
    assert all(step == each * (k + 1) for k, (_, step) in enumerate(applied))
    sent = [(fragment, step) for what, fragment, step in log if what == "send"]
    if overlap:
        assert [
            (f, s + overlap) for f, s in sent
        ] == applied  # sent in the order in which they are applied, none in between


def test_the_drift_is_frozen_when_it_is_sent() -> None:
    """With nothing kept of the overlapped steps, they are thrown away: whatever their gradients, the result is the same."""

    def wild(peer: int, step: int, parameters: list[Tensor]) -> tuple[list[Tensor], float]:
        grads, weight = gradient(peer, step, [torch.zeros_like(p) for p in parameters])
        return [g * (1 + 100 * (step % 4 == 3)) for g in grads], weight

    def tame(peer: int, step: int, parameters: list[Tensor]) -> tuple[list[Tensor], float]:
        return gradient(peer, step, [torch.zeros_like(p) for p in parameters])

    text = "diloco(every=4, overlap=1, lr=1, momentum=0)"
    assert distance(run(text, given=wild, steps=8), run(text, given=tame, steps=8)) == 0.0
    assert distance(run(text, given=wild, steps=8), run(text, given=gradient, steps=8)) > 0


def test_what_is_kept_of_overlapped_steps_flows_into_the_next_drift() -> None:
    kept = run("diloco(every=4, overlap=2, blend=0.5)", steps=12)
    dropped = run("diloco(every=4, overlap=2)", steps=12)
    assert 0 < distance(kept, dropped) < 10


# ---- refused --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("local_sgd(0)", "every=0"),
        ("local_sgd(every=2.5)", "whole number"),
        ("local_sgd(state=kept)", "local, average, reset"),
        ("local_sgd(merge=mode)", "mean, median, trimmed"),
        ("local_sgd(merge=median, codec=bf16)", "only the mean"),
        ("local_sgd(merge=trimmed(0.5))", "below 0.5"),
        ("local_sgd(every=within(2))", "0.001 to 0.999"),
        ("local_sgd(params=shared)", "unexpected keyword argument 'params'"),
        ("local_sgd(exact=True)", "unexpected keyword argument 'exact'"),
        ("diloco(lr=0)", "above 0"),
        ("diloco(momentum=1)", "0 to 0.999"),
        ("diloco(nesterov=1)", "True or False"),
        ("diloco(every=10, fragments=3)", "no multiple"),
        ("diloco(every=12, fragments=3, overlap=4)", "at most 3"),
        ("diloco(every=12, blend=0.5)", "without overlap"),
        ("diloco(every=within(0.1), fragments=2)", "a number of steps"),
        ("easgd(beta=1.5)", "0 to 0.999"),
        ("easgd(alpha=-1)", "above 0"),
        ("gossip(graph=rnig)", "ring, exponential"),
        ("gossip(graph='0-1 2-3')", "not connected"),
        ("gossip(graph='0-2')", "not connected"),
        ("gossip(graph='')", "not known"),
        ("gossip(graph='1-1')", "no edges"),
        ("sgp(graph=torus)", "exponential, ring, complete"),
        ("then(ddp(), after=0, next=local_sgd())", "after=0"),
        ("then(ddp(exact=True), after=5, next=local_sgd())", "cannot be changed"),
        ("then(ddp(params=shared), after=5, next=local_sgd())", "cannot be changed"),
        ("then(bf16, after=5, next=local_sgd())", "is not known"),
        ("then(ddp(), after=5, next=ddp(codec=zip()))", "no value 'zip'"),
        ("post_local_sgd()", "missing a required argument"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(text: str, says: str) -> None:
    with pytest.raises(UsageError, match="PL203") as refused:
        build(text)
    assert says in f"{refused.value.message} {refused.value.help}"


@pytest.mark.parametrize(
    "text",
    [
        "local_sgd()",
        "local_sgd(every=within(0.2, most=50), merge=trimmed(0.2), state=average)",
        "diloco(every=12, fragments=3, overlap=2, blend=0.5, codec=fp16)",
        "easgd(every=4, alpha=0.1)",
        "gossip(graph='0-1 1-2')",
        "then(first=ddp(codec=bf16), after=9, next=then(first=gossip(), after=20, next=diloco(every=7)))",
        "post_local_sgd(start=100)",
    ],
)
def test_texts_come_back(text: str) -> None:
    assert check(text) == text
    assert build(build(text).text) == build(text)
    assert text in build(text).describe()


def test_phases_begin_where_they_are_told_to() -> None:
    exchange = build("then(ddp(), 10, then(local_sgd(2), 20, gossip()))")
    assert [exchange.at(step).text for step in (0, 9, 10, 19, 20)] == [
        "ddp()",
        "ddp()",
        "local_sgd(every=2)",
        "local_sgd(every=2)",
        "gossip()",
    ]


@given(st.floats(0.001, 0.999), st.floats(0, 10), st.floats(0, 10))
def test_the_exchange_takes_no_more_than_its_part(part: float, step: float, exchange: float) -> None:
    cadence = Within(part, most=10**6)
    steps = cadence.steps(Pace(step, exchange))
    assert 1 <= steps <= 10**6
    if step > 1e-6 and steps < 10**6:
        assert exchange <= part * (exchange + steps * step) * (1 + 1e-9) + 1e-12
    assert cadence.due(steps, Pace(step, exchange))
    assert Every(3).due(3, Pace())
    assert not Every(3).due(2, Pace())


def test_the_mean_of_nothing_is_nothing() -> None:
    peers = Peers(Outer(merge=Mean()), same(2))
    peers.step(noise(2, 0))
    peers.round(weights=[0.0, 0.0])
    assert torch.equal(peers.values[0], same(1)[0])
