"""The recipes whose ranks take steps of their own and exchange parameters now and then. No torch is imported.

All ranks are at the same step at all times: each trains on its slice of every global batch. A *round* is the steps between two
exchanges; rounds end with a pass over the data at the latest, so evaluations, exports and checkpoints see one model.
"""

from __future__ import annotations

from typing import Any, Literal

from paceline.exchange.arguments import between, one_of, positive, spell, whole
from paceline.exchange.cadence import MOST, Cadence, Every, cadence_for
from paceline.exchange.chain import Exchange, Rounds, chain, optimizer
from paceline.exchange.codec import Codec
from paceline.exchange.gossip import Gossip, PushSum
from paceline.exchange.graphs import DIRECTED, UNDIRECTED, graph_for
from paceline.exchange.link import Link
from paceline.exchange.merge import Mean, Merge, merge_for
from paceline.exchange.outer import Elastic, Outer
from paceline.terms.errors import UsageError
from paceline.terms.plan import Call

StateOf = Literal["local", "average", "reset"]
STATES = ("local", "average", "reset")
"""What becomes of the optimizer's state at the end of a round."""


def local_sgd(
    every: int | Cadence = 8,
    *,
    merge: Merge | str = "mean",
    codec: Literal["bf16", "fp16"] | Codec | None = None,
    state: StateOf | str = "local",
) -> Exchange:
    """Local SGD: ranks step on their own, and every H steps all go on from the mean.

    Stich, 1805.09767. It sends H times fewer bytes than ``ddp`` and waits H times less often. It wins on slow or uneven links and
    with many steps; it loses where ranks drift apart: large learning rates, large H, unlike data. With ``every=1`` and plain SGD
    it is ``ddp`` to the rounding.

    Args:
        every: Optimizer steps of a round, H; or ``within(0.1)``: as often as leaves the exchange a tenth of the time.
        merge: ``mean``, weighted by rows; ``median`` or ``trimmed(0.25)`` bear a few wild ranks, gather all and weigh none.
        codec: ``bf16`` or ``fp16``: the drift is sent in half the bytes.
        state: Of the optimizer (momentum, Adam's moments): ``local``: every rank keeps its own; ``average``: averaged with every
            round, for as many bytes again; ``reset``: it begins anew.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have.
    """
    cadence, how = cadence_for("local_sgd", every), merge_for("local_sgd", merge, codec)
    text = spell(local_sgd, every=shown(cadence), merge=_text(how), codec=_coded(how), state=_state("local_sgd", state))
    return _exchange(Outer(merge=how), text, Rounds(cadence, state))  # type: ignore[arg-type]


def diloco(
    every: int | Cadence = 100,
    *,
    lr: float = 0.7,
    momentum: float = 0.9,
    nesterov: bool = True,
    fragments: int = 1,
    overlap: int = 0,
    blend: float = 0.0,
    merge: Merge | str = "mean",
    codec: Literal["bf16", "fp16"] | Codec | None = None,
    state: StateOf | str = "local",
) -> Exchange:
    """DiLoCo: local steps, then an outer Nesterov step along the mean drift; in fragments it streams.

    Douillard et al., 2311.08105, with OpenDiLoCo's defaults (H=500 there; an outer step also ends every pass here). With
    `fragments` and `overlap` it is Streaming DiLoCo, 2501.18512: the layers are dealt out to P fragments, one of them is exchanged
    every H/P steps, and travels while `overlap` further steps are taken. It wins on language models over slow links; it loses on
    small problems, where the outer momentum overshoots.

    Args:
        every: Optimizer steps of a round, H; a multiple of `fragments`.
        lr, momentum, nesterov: Of the outer step.
        fragments: P; 1 exchanges everything at once.
        overlap: Steps between sending and applying, below H/P.
        blend: How much of the parameters learned meanwhile is kept, 0 to 1; 0.5 in the paper.
        merge, codec, state: See :func:`local_sgd`. The outer state is the same on all ranks, saved, and given to who joins.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have.
    """
    cadence, how = cadence_for("diloco", every), merge_for("diloco", merge, codec)
    positive("diloco", "lr", lr)
    between("diloco", "momentum", momentum, 0, 0.999)
    if not isinstance(nesterov, bool):
        raise UsageError("PL203", f"diloco: nesterov={nesterov!r} cannot be", help="nesterov is True or False.")
    whole("diloco", "fragments", fragments, 1000)
    whole("diloco", "overlap", overlap, MOST, least=0)
    between("diloco", "blend", blend, 0, 1)
    text = spell(
        diloco,
        every=shown(cadence),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        fragments=fragments,
        overlap=overlap,
        blend=blend,
        merge=_text(how),
        codec=_coded(how),
        state=_state("diloco", state),
    )
    each, level = _streamed(cadence, fragments, overlap, blend), fragments == 1 and not blend
    rounds = Rounds(each, state, fragments, overlap, blend, level)  # type: ignore[arg-type]
    return _exchange(Outer(lr, momentum, nesterov, how), text, rounds)


def _streamed(cadence: Cadence, fragments: int, overlap: int, blend: float) -> Cadence:
    """When the next fragment is due. One is in flight at a time, so its exchange must be over before the next one's begins."""
    if blend and not overlap:
        said = "without overlap there is nothing to blend: leave it out, or add overlap."
        raise UsageError("PL203", f"diloco: blend={blend!r} without overlap", help=said)
    if not isinstance(cadence, Every):
        if fragments > 1 or overlap:
            raise UsageError("PL203", "diloco: fragments and overlap need a number of steps", help="give every=500.")
        return cadence
    if cadence.steps % fragments:
        said = f"every is a multiple of {fragments}, such as {-(-cadence.steps // fragments) * fragments}."
        raise UsageError("PL203", f"diloco: every={cadence.steps} is no multiple of fragments={fragments}", help=said)
    each = cadence.steps // fragments
    if overlap >= each:
        message = f"diloco: overlap={overlap} is not below every/fragments = {each}: a fragment would still travel when the next is due"
        raise UsageError("PL203", message, help=f"overlap is at most {each - 1}.")
    return Every(each)


def easgd(every: int | Cadence = 10, *, alpha: float | None = None, beta: float = 0.9) -> Exchange:
    """Elastic averaging, synchronous: ranks explore around a centre that they pull, and that pulls them.

    Zhang, Choromanska, LeCun, 1412.6651. It wins where ranks should find different places and the best is between them; it loses
    on bytes against local SGD with the same H. At the end of a pass all ranks go to the centre.

    Args:
        every: Optimizer steps of a round.
        alpha: How far a rank goes to the centre each time; None: ``beta / number of ranks``.
        beta: Below 1, so that the centre does not overshoot.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have.
    """
    cadence = cadence_for("easgd", every)
    if alpha is not None:
        between("easgd", "alpha", positive("easgd", "alpha", alpha), 0, 0.999)
    between("easgd", "beta", positive("easgd", "beta", beta), 0, 0.999)
    text = spell(easgd, every=shown(cadence), alpha=alpha, beta=beta)
    return _exchange(Elastic(alpha, beta), text, Rounds(cadence, level=False))


def gossip(graph: str = "ring", *, every: int | Cadence = 1) -> Exchange:
    """Gossip (D-PSGD): after its step a rank mixes its parameters with its neighbours' on a graph.

    Lian et al., NIPS 2017. Nobody waits for all, and a rank sends to its neighbours only. It wins with many ranks on links that
    make an all-reduce dear; it loses where mixing is slow: on a ring of n ranks it takes some n^2 rounds. Rows do not weigh.

    Args:
        graph: ``ring``, ``exponential``, ``complete``, ``torus``, or edges such as ``'0-1 1-2 2-0'``, connected. Weights are
            Metropolis weights, so the mixing matrix is symmetric and doubly stochastic.
        every: Optimizer steps between two mixings.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have, or the graph is not connected.
    """
    cadence, chosen = cadence_for("gossip", every), graph_for("gossip", graph, UNDIRECTED)
    text = spell(gossip, graph=chosen.name, every=shown(cadence))
    return _exchange(Gossip(chosen), text, Rounds(cadence, level=False))


def sgp(graph: str = "exponential", *, every: int | Cadence = 1) -> Exchange:
    """Stochastic gradient push (push-sum): gossip along directed edges.

    Assran et al., 1811.10792. Parameters and a mass travel together, and the model holds their quotient. It wins as gossip does,
    with half its messages; the exponential graph mixes in some log2 n turns. Rows do not weigh.

    Args:
        graph: ``exponential``, one receiver a turn; ``ring``; ``complete``; or edges, used in both directions, connected.
        every: Optimizer steps between two mixings.

    Raises:
        UsageError: PL203, an argument has a value that it cannot have, or the graph is not connected.
    """
    cadence, chosen = cadence_for("sgp", every), graph_for("sgp", graph, DIRECTED)
    text = spell(sgp, graph=chosen.name, every=shown(cadence))
    return _exchange(PushSum(chosen), text, Rounds(cadence, level=False))


def shown(cadence: Cadence) -> Any:
    """How a strategy text says it."""
    return cadence.steps if isinstance(cadence, Every) else Call(cadence.name, bare=True)


def _exchange(link: Link, text: str, rounds: Rounds) -> Exchange:
    return Exchange(chain(optimizer, link), text=text, rounds=rounds)


def _text(merge: Merge) -> Any:
    return merge.name if merge.name.isidentifier() else Call(merge.name, bare=True)


def _coded(merge: Merge) -> str | None:
    return merge.codec.name if isinstance(merge, Mean) and merge.codec is not None else None


def _state(recipe: str, state: object) -> str:
    return str(one_of(recipe, "state", state, STATES))
