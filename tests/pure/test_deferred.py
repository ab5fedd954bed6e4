"""Losses that are recorded before there are values, and their parts; tensors that are not there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paceline.place.absent import Absent, Share, hold, stand_in, vanish
from paceline.place.deferred import Record, Ref
from paceline.place.deferred_share import Slice, evaluate
from paceline.terms.errors import PacelineError, StepError

CPU = torch.device("cpu")
ROWS, TIME, CLASSES = 12, 5, 7


class Immediate:
    """A pipeline of one stage: the outputs are there."""

    def __init__(self, *outputs: Tensor) -> None:
        self.outputs = list(outputs)
        self.loss: Ref | None = None

    def record(self) -> Record:
        metas = [torch.empty_like(t, device="meta").requires_grad_() for t in self.outputs]
        return Record(self, CPU, metas)

    def backward(self, record: Record, loss: Ref) -> None:
        self.loss = loss
        record.done = True
        record.values = record.evaluate(self.outputs, record.scalars())


def outputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- recording ------------------------------------------------------------------------------------------------------
def test_a_recorded_loss_is_the_loss() -> None:
    real, y = outputs(ROWS, CLASSES), torch.arange(ROWS) % CLASSES
    out = Immediate(real).record().output(0)
    assert (out.shape, out.dtype, out.device, out.requires_grad) == (real.shape, real.dtype, CPU, True)

    def loss(out: Tensor) -> tuple[Tensor, Tensor]:
        value = F.cross_entropy(out, y, label_smoothing=0.1) + 1e-2 * out.pow(2).mean()
        value = value / 3
        value += out.T[0].sum()
        return value, (out.argmax(-1) == y).sum()

    found, right = loss(out)
    expected, expected_right = loss(real)
    assert "after loss.backward()" in f"{found:.3f} {right}"
    found.backward()
    assert found.item() == expected.item()
    assert int(right) == int(expected_right)
    assert f"{found:.3f}" == f"{expected.item():.3f}"
    assert float(found * 2) == float(expected * 2)


READS: list[Callable[[Any], Any]] = [lambda t: t.item(), float, bool, lambda t: t.tolist(), lambda t: t.numpy(), int]


@pytest.mark.parametrize("read", READS)
def test_nothing_is_read_before_backward(read: Callable[[Any], Any]) -> None:
    loss = Immediate(outputs(ROWS, CLASSES)).record().output(0).sum()
    with pytest.raises(StepError, match="PL524"):
        read(loss)


def test_a_large_value_is_where_the_outputs_are() -> None:
    pipeline = Immediate(outputs(ROWS, CLASSES))
    record = pipeline.record()
    out = record.output(0)
    out.sum().backward()
    with pytest.raises(StepError, match="PL525"):
        out.softmax(-1).tolist()
    record.outputs = pipeline.outputs
    assert torch.equal(torch.tensor(out.softmax(-1).tolist(), dtype=torch.float64), pipeline.outputs[0].softmax(-1))


def mistakes() -> dict[str, Callable[[Tensor], Any]]:
    weight = torch.ones(CLASSES, dtype=torch.float64, requires_grad=True)

    def aliased(out: Tensor) -> None:
        row = out[0]
        out.mul_(2)
        row.sum()

    return {
        "a tensor that needs a gradient": lambda out: (out * weight).sum(),
        "changed in place under another name": aliased,
        "written into another": lambda out: torch.zeros(ROWS, CLASSES).copy_(out),
        "a hook": lambda out: out.register_hook(print),
        "create_graph": lambda out: out.sum().backward(create_graph=True),
        "setting data": lambda out: setattr(out, "data", torch.zeros(1)),
    }


@pytest.mark.parametrize("name", mistakes())
def test_what_cannot_be_recorded(name: str) -> None:
    with pytest.raises(StepError, match="PL528"):
        mistakes()[name](Immediate(outputs(ROWS, CLASSES)).record().output(0))


def test_one_backward_for_each_forward() -> None:
    first, second = (Immediate(outputs(ROWS, CLASSES)).record().output(0) for _ in range(2))
    with pytest.raises(StepError, match="PL529"):
        first + second
    loss = first.sum()
    loss.backward()
    with pytest.raises(StepError, match="PL529"):
        loss.backward()


# ---- parts ----------------------------------------------------------------------------------------------------------
KEEP = torch.rand(ROWS, TIME, generator=torch.Generator().manual_seed(1)) > 0.4
Y = torch.randint(CLASSES, (ROWS, TIME), generator=torch.Generator().manual_seed(2))
IGNORED = Y.masked_fill(~KEEP, -100)
REAL = outputs(ROWS, TIME, CLASSES).roll(1)
WEIGHT = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)

ADDING: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda o: F.cross_entropy(o.flatten(0, 1), IGNORED.flatten()),
    "classes second": lambda o: F.cross_entropy(o.transpose(1, 2), IGNORED),
    "class weights": lambda o: F.cross_entropy(o.view(-1, CLASSES), IGNORED.view(-1), weight=WEIGHT),
    "weights by position": lambda o: F.cross_entropy(
        o.view(-1, CLASSES), IGNORED.view(-1), WEIGHT, label_smoothing=0.1
    ),
    "smoothing": lambda o: F.cross_entropy(o.reshape(ROWS * TIME, CLASSES), Y.flatten(), label_smoothing=0.2),
    "probabilities": lambda o: F.cross_entropy(o.mean(1), REAL.mean(1).softmax(-1)),
    "likelihood": lambda o: nn.NLLLoss()(o.log_softmax(-1).flatten(0, 1), Y.flatten()),
    "squares": lambda o: F.mse_loss(o, REAL),
    "sum": lambda o: nn.CrossEntropyLoss(reduction="sum")(o.flatten(0, 1), Y.flatten()) / ROWS,
    "binary": lambda o: F.binary_cross_entropy_with_logits(o[..., 0], KEEP.double(), pos_weight=torch.tensor([2.0])),
    "divergence": lambda o: F.kl_div(o.mean(1).log_softmax(-1), REAL.mean(1).softmax(-1), reduction="batchmean"),
    "masked by hand": lambda o: (F.cross_entropy(o.transpose(1, 2), Y, reduction="none") * KEEP).sum() / KEEP.sum(),
    "regularised": lambda o: F.cross_entropy(o.mean(1), Y[:, 0]) + 1e-3 * o.logsumexp(-1).pow(2).mean() + 0.25,
    "one row off": lambda o: 3 - 2 * o.mean(),
    "in place": lambda o: o.sum().mul_(2).div_(4),
    "stacked": lambda o: torch.stack([o.mean(), o.pow(2).mean()]).sum(),
    "picked": lambda o: -o.log_softmax(-1).gather(2, Y[..., None]).squeeze(-1)[:, 1:].mean(),
}
NOT_ADDING: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda o: o.max(),
    "root": lambda o: o.pow(2).mean().sqrt(),
    "product": lambda o: o.mean() * o.pow(2).mean(),
    "ratio": lambda o: o.sum() / o.pow(2).sum(),
    "contrastive": lambda o: F.cross_entropy(o.mean(1) @ o.mean(1).T, torch.arange(ROWS)),
    "variance": lambda o: (o - o.mean(0)).pow(2).mean(),
    "over the batch": lambda o: o.logsumexp(0).sum(),
}


def parts(loss: Callable[[Tensor], Tensor], bounds: list[int]) -> tuple[float, Tensor]:
    """The sum of a loss's parts, and its gradient."""
    record = Immediate(REAL).record()
    deferred = loss(record.output(0))
    ref = deferred.ref  # type: ignore[attr-defined]
    total, grads = 0.0, []
    for low, high in zip([0, *bounds], [*bounds, ROWS], strict=True):
        piece = REAL[low:high].clone().requires_grad_()
        value = evaluate(record, [(piece, False)], Slice(low, high, ROWS), ref)
        value.backward()
        total += value.item()
        grads.append(piece.grad)
    return total, torch.cat([g for g in grads if g is not None])


@pytest.mark.parametrize("bounds", [[4, 8], [5], [1, 2, 11]])
@pytest.mark.parametrize("name", ADDING)
def test_parts_add_up(name: str, bounds: list[int]) -> None:
    whole = REAL.clone().requires_grad_()
    loss = ADDING[name](whole)
    loss.backward()
    total, grad = parts(ADDING[name], bounds)
    assert total == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(grad, whole.grad, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("name", NOT_ADDING)
def test_what_is_no_sum_over_rows(name: str) -> None:
    with pytest.raises(StepError, match="PL531"):
        parts(NOT_ADDING[name], [4, 8])


# ---- what is not there ----------------------------------------------------------------------------------------------
def missing(*shape: int) -> Tensor:
    return Absent(torch.empty(shape, device="meta"), CPU, "something")


def test_shapes_go_on_and_inputs_stay_real() -> None:
    x = missing(3, 4)
    y = F.layer_norm(x @ torch.randn(4, 5), (5,)).relu() + 1
    assert isinstance(y, Absent)
    assert (y.shape, y.device) == ((3, 5), CPU)
    assert type(torch.zeros_like(y)) is Tensor
    assert type(torch.arange(y.shape[1], device=y.device)) is Tensor
    assert isinstance(y.T, Absent)
    assert isinstance(y.to("cpu", torch.float64), Absent)


def test_a_bound_tensor_is_the_real_one() -> None:
    x = missing(2)
    kept = [x]
    x.bind(torch.ones(2))  # type: ignore[attr-defined]
    assert torch.equal(kept[0] * 3, torch.full((2,), 3.0))


@pytest.mark.parametrize("read", READS)
def test_values_that_are_not_there(read: Callable[[Any], Any]) -> None:
    with pytest.raises(StepError, match="PL522"):
        read(missing())


def test_nothing_absent_is_written_saved_or_copied_silently() -> None:
    with pytest.raises(StepError, match="PL522"):
        torch.zeros(2).copy_(missing(2))
    with pytest.raises(StepError, match="PL522"):
        torch.zeros(2)[:] = missing(2)
    with pytest.raises(StepError, match="PL526"):
        missing(2).untyped_storage()
    assert isinstance(copy.deepcopy(missing(2)), Absent)


def test_a_parameter_vanishes_for_everybody_who_refers_to_it() -> None:
    layer = nn.LSTM(2, 3)
    listed = list(layer.parameters())
    vanish(layer.weight_hh_l0, "weight_hh_l0", lambda t: t)
    assert isinstance(listed[1], Absent)
    assert isinstance(listed[1], nn.Parameter)
    assert listed[1].requires_grad
    assert isinstance(layer(torch.randn(4, 2))[0], Absent)
    layer.zero_grad()
    with torch.no_grad():
        listed[1].mul_(2)  # the holder does it


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, float("inf")])
def test_norms_of_gradients_of_which_half_are_elsewhere(order: float) -> None:
    """Two ranks, simulated one after the other: the second knows what the first one has sent."""
    grads = [outputs(3, 2), outputs(4) * 2, outputs(5).neg(), outputs(1)]
    sent: list[Tensor] = []
    found = []
    for rank in (0, 1, 0):  # the first rank is asked again when the second has answered
        other: list[Tensor] = sent[-1:] or [torch.zeros(4, dtype=torch.float64)]

        def total(mine: Tensor, other: list[Tensor] = other) -> Tensor:
            sent.append(mine.clone())
            return mine + other[0]

        params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if i % 2 == rank:
                p.grad = hold(g.clone(), total, counts=True)
            else:
                vanish(p, f"p{i}", total)
                p.grad = Absent(torch.empty_like(g, device="meta"), CPU, f"gradient {i}", total)
        found.append(nn.utils.clip_grad_norm_(params, 0.1, norm_type=order, error_if_nonfinite=False))
    expected = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, order) for g in grads]), order)
    torch.testing.assert_close(found[2], expected)


def test_a_share_is_added_up_when_it_is_used() -> None:
    asked = []

    def total(mine: Tensor) -> Tensor:
        asked.append(mine)
        return mine * 2

    share = Share.of(torch.tensor(3.0), total)
    stacked = torch.stack([share, share.to(CPU)])
    assert not asked
    assert (stacked + 1).tolist() == [7.0, 7.0]
    assert len(asked) == 1


def test_errors_name_what_is_missing() -> None:
    absent = stand_in(nn.Parameter(torch.zeros(2)), "parameter 'head.weight'")
    with pytest.raises(PacelineError, match=r"head\.weight"):
        absent.sum().item()
