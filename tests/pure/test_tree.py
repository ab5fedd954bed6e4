"""The state tree: what goes into JSON and tensors comes out again, bit for bit, in the objects that are there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.amp.grad_scaler import GradScaler
from torch.optim import lr_scheduler

from paceline.terms.errors import AdoptError, FileError
from paceline.train import tree as trees
from paceline.train.tree import Things, capture, empty, flatten, leaves, restore, unflatten


class Tied(nn.Module):
    """Two layers with one weight, batch statistics, a buffer that a state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.norm(self.first(x).relu()))
        return out


def through_text(tree: Any) -> Any:
    """A tree as another process gets it: the skeleton as text, the tensors as copies."""
    skeleton, tensors = flatten(tree)
    text = json.dumps(skeleton, allow_nan=False)
    got = empty(json.loads(text))
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got[name].copy_(tensor)
    return unflatten(json.loads(text), got)


def test_plain_values_come_back_as_they_were() -> None:
    values = {
        "scalars": [None, True, 0, -(2**70), 1.5, "text", math.inf, -math.inf],
        "nested": {"tuple": (1, (2.0, "x")), "numbers": {1: 2, 3: {"a": ()}}, "dollar": {"$tensor": 1}},
        "bytes": b"\0\xff",
        "empty": {"list": [], "dict": {}},
    }
    assert through_text(values) == values
    assert math.isnan(through_text({"nan": math.nan})["nan"])


@pytest.mark.parametrize("dtype", sorted(trees.KINDS))
def test_every_type_of_tensor_comes_back(dtype: str) -> None:
    kind = trees.KINDS[dtype]
    raw = torch.arange(48, dtype=torch.uint8) % 2
    for tensor in (raw.view(kind), raw.view(kind).reshape(2, -1).t(), raw.view(kind)[:0], raw.view(kind)[0]):
        back = through_text({"t": tensor})["t"]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_one_tensor_under_two_names_travels_once() -> None:
    model = Tied()
    skeleton, tensors = flatten(capture(Things(models={"model": model})))
    assert sum(name.endswith("weight") for name in tensors) == 2  # the tied one, and the norm's
    assert len([name for name, _, _ in leaves(skeleton)]) == len(tensors) + 1


class Odd:
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": {"b": [1, Odd()]}}, "a/b/1 is a .*Odd"),
        ({"a": {1, 2}}, "a is a builtins.set"),
        ({"a": lambda: 1}, "a is a builtins.function"),
        ({"a": torch.eye(2).to_sparse()}, "a is a tensor of torch.float32, torch.sparse_coo"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "a is a tensor of torch.complex128"),
        ({"a": torch.empty(2, device="meta")}, "on meta"),
    ],
)
def test_what_is_no_plain_value_is_named(value: Any, named: str) -> None:
    with pytest.raises(AdoptError, match=named) as caught:
        flatten(value)
    assert caught.value.code == "PL612"


def test_a_tree_that_contains_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(AdoptError, match=r"PL612.*levels deep"):
        flatten(endless)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$tensor": "missing"},
        {"$tuple": 5},
        {"$items": [[1]]},
        {"$items": [[{}, 1]]},
        {"$float": "one"},
        {"$bytes": "\x00"},
        {"$tensor": ["list"]},
    ],
)
def test_a_skeleton_that_is_none_is_refused(skeleton: Any) -> None:
    with pytest.raises(FileError, match="PL613"):
        unflatten(skeleton, {})


def test_a_deep_skeleton_is_refused() -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(FileError, match="levels deep"):
        unflatten(deep, {})


# ---- things ---------------------------------------------------------------------------------------------------------
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, amsgrad=True),
    "adam_fused": lambda p: optim.Adam(p, lr=0.1, fused=True),
    "adam_tensor_lr": lambda p: optim.Adam(p, lr=torch.tensor(0.1)),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "rprop": lambda p: optim.Rprop(p, lr=0.1),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
}


def things(model: nn.Module, optimizer: optim.Optimizer, **more: Any) -> Things:
    models = {"model": model}
    return Things(models=models, optimizers={"0": optimizer}, names=trees.names_of(models), **more)


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int, seed: int) -> None:
    data = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=data)).square().mean().backward()
        optimizer.step()


def equal(a: Any, b: Any) -> bool:
    (left, ours), (right, theirs) = flatten(a), flatten(b)
    return left == right and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_an_optimizer_goes_on_in_another_process_as_if_nothing_had_happened(kind: str) -> None:
    torch.manual_seed(1)
    first = Tied()
    before = OPTIMIZERS[kind](first.parameters())
    train(first, before, 3, seed=2)
    saved = through_text(capture(things(first, before)))

    second = Tied()
    after = OPTIMIZERS[kind](second.parameters())
    identities = [p.data_ptr() for p in second.parameters()]
    restore(things(second, after), saved)
    assert [p.data_ptr() for p in second.parameters()] == identities
    assert equal(capture(things(second, after)), capture(things(first, before)))

    train(first, before, 3, seed=5)
    train(second, after, 3, seed=5)
    assert equal(capture(things(second, after)), capture(things(first, before)))


def test_a_state_is_restored_into_the_tensors_that_are_there() -> None:
    model = Tied()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, 2, seed=1)
    saved = through_text(capture(things(model, optimizer)))
    moments = [optimizer.state[p]["exp_avg"].data_ptr() for p in model.parameters()]
    train(model, optimizer, 2, seed=3)
    restore(things(model, optimizer), saved)
    assert [optimizer.state[p]["exp_avg"].data_ptr() for p in model.parameters()] == moments
    assert equal(capture(things(model, optimizer)), saved)


def test_new_state_is_laid_out_as_its_parameter_is() -> None:
    first = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    optimizer = optim.SGD(first.parameters(), lr=0.1, momentum=0.9)
    first(torch.randn(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    saved = through_text(capture(things(first, optimizer)))
    second = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    other = optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    restore(things(second, other), saved)
    assert other.state[second.weight]["momentum_buffer"].stride() == second.weight.stride()
    assert equal(capture(things(second, other)), saved)


def test_a_parameter_of_no_model_is_saved_by_its_place() -> None:
    scale = nn.Parameter(torch.tensor([2.0]))
    model = nn.Linear(2, 2)
    optimizer = optim.SGD([{"params": model.parameters()}, {"params": [scale], "lr": 0.5}], lr=0.1)
    saved = through_text(capture(things(model, optimizer)))
    with torch.no_grad():
        scale.zero_()
    optimizer.param_groups[1]["lr"] = 7.0
    restore(things(model, optimizer), saved)
    assert (scale.item(), optimizer.param_groups[1]["lr"]) == (2.0, 0.5)


SCHEDULES: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, 3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_a_schedule_goes_on(kind: str) -> None:
    def make() -> tuple[optim.Optimizer, Any, Things]:
        model = nn.Linear(2, 2)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = SCHEDULES[kind](optimizer)
        schedule.step = schedule.step  # as the job does, to hold a schedule while a step is done again
        return optimizer, schedule, things(model, optimizer, schedulers={"0": schedule})

    def rates(optimizer: optim.Optimizer, schedule: Any) -> list[float]:
        found = []
        for _ in range(4):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    (first, schedule, whole), (second, other, new) = make(), make()
    rates(first, schedule)
    restore(new, through_text(capture(whole)))
    assert type(getattr(other, "milestones", 0)) is type(getattr(schedule, "milestones", 0))
    second.step()
    assert rates(second, other) == rates(first, schedule)


def test_plateau_scaler_and_kept_objects_go_on() -> None:
    class Average:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {"mean": torch.zeros(2), "count": 0, "seen": []}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    def make() -> Things:
        model = nn.Linear(2, 2)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        plateau, scaler = lr_scheduler.ReduceLROnPlateau(optimizer), GradScaler("cpu", init_scale=8.0)
        kept = {"average": Average(), "ema": nn.Linear(2, 2)}
        return things(model, optimizer, schedulers={"0": plateau}, scalers={"0": scaler}, kept=kept)

    first, second = make(), make()
    for _ in range(30):
        first.schedulers["0"].step(1.0)  # type: ignore[call-arg]
    first.kept["average"].state = {"mean": torch.tensor([1.0, 2.0]), "count": 3, "seen": [4, 5]}
    first.scalers["0"].load_state_dict(first.scalers["0"].state_dict() | {"scale": 4.0, "_growth_tracker": 7})
    assert not equal(capture(first), capture(second))
    restore(second, through_text(capture(first)))
    assert equal(capture(first), capture(second))
    assert second.schedulers["0"].num_bad_epochs == first.schedulers["0"].num_bad_epochs > 0  # type: ignore[attr-defined]


def test_a_compiled_model_has_the_names_of_the_plain_one() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    restore(Things(models={"model": compiled}), through_text(capture(Things(models={"model": plain}))))
    assert equal(capture(Things(models={"model": compiled})), capture(Things(models={"model": plain})))


# ---- what does not fit ----------------------------------------------------------------------------------------------
def adam(model: nn.Module) -> optim.Optimizer:
    return optim.Adam(model.parameters())


MISFITS: dict[str, tuple[Callable[[], Things], str]] = {
    "shape": (lambda: things(m := nn.Linear(4, 3), adam(m)), r"'weight'.*\(3, 4\) float32, and was \(4, 4\) float32"),
    "type": (lambda: things(m := nn.Linear(4, 4).half(), adam(m)), r"'weight'.*float16, and was \(4, 4\) float32"),
    "missing": (
        lambda: things(m := nn.Linear(4, 4, bias=False), adam(m)),
        "it has 'bias', which model 'model' has not",
    ),
    "more": (lambda: things(m := nn.BatchNorm1d(4), adam(m)), "it has no 'running_mean' of model 'model'"),
    "kind": (lambda: things(m := nn.Linear(4, 4), optim.SGD(m.parameters())), "optimizer 0 is SGD, and was Adam"),
    "groups": (
        lambda: things(m := nn.Linear(4, 4), optim.Adam([{"params": [p]} for p in m.parameters()])),
        "has 2 groups of parameters, and had 1",
    ),
    "order": (
        lambda: things(m := nn.Linear(4, 4), optim.Adam([m.bias, m.weight])),
        "has 'model.bias' where 'model.weight' was",
    ),
    "fewer": (lambda: things(m := nn.Linear(4, 4), optim.Adam([m.weight])), "has 1 parameters, and had 2"),
    "models": (lambda: Things(models={"model1": nn.Linear(4, 4)}), "no 'model1' among its models, but model"),
    "kept": (lambda: Things(kept={"ema": nn.Linear(1, 1)}), "no 'ema' among its kept, but nothing"),
}


@pytest.mark.parametrize("case", sorted(MISFITS))
def test_the_first_difference_is_named(case: str) -> None:
    model = nn.Linear(4, 4)
    saved = through_text(capture(things(model, adam(model))))
    make, said = MISFITS[case]
    with pytest.raises(AdoptError, match=said) as caught:
        restore(make(), saved)
    assert caught.value.code == "PL610"


def test_a_kept_object_that_complains_is_named() -> None:
    class Picky:
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("b")

    with pytest.raises(AdoptError, match=r"PL610.*'picky' does not take its state: 'b'"):
        restore(Things(kept={"picky": Picky()}), {"kept": {"picky": {"a": 1}}})


def test_state_of_no_parameter_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = adam(model)
    optimizer.state[torch.zeros(1)] = {"x": 1}
    with pytest.raises(AdoptError, match="PL612"):
        capture(things(model, optimizer))
