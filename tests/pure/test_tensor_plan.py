"""The plans that tensor parallelism derives, and the rules for split activations, in one process without any exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paceline.place import tensor_products, tensor_rules
from paceline.place.tensor_plan import Plan, derive
from paceline.place.tensor_split import Layout, NotLocal, Split
from paceline.place.tensor_wire import Imagined
from paceline.terms.errors import UsageError
from peers.tensor_case import MODELS, Separate, made

assert tensor_products, tensor_rules  # their rules are registered


def words(plan: Plan) -> dict[str, str]:
    return {name: way.word for name, way in plan.items() if way.dim is not None}


def share(model: nn.Module, plan: Plan) -> float:
    """How much of the parameters is split."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes[name] for name, way in plan.items() if way.dim is not None) / sum(sizes.values())


# ---- plans -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "num", "least"),
    [
        ("mlp", 2, 0.9), ("mlp", 4, 0.9), ("lm", 2, 0.98), ("lm", 4, 0.98), ("separate", 2, 0.9), ("encoder", 2, 0.97),
        ("encoder", 4, 0.97), ("gpt2", 2, 0.98), ("gpt2", 4, 0.98), ("llama", 2, 0.99), ("llama", 4, 0.74), ("bert", 2, 0.97),
        ("bert", 4, 0.97), ("vit", 2, 0.86), ("vit", 4, 0.86),
    ],
)  # fmt: skip
def test_how_much_of_a_model_is_split(name: str, num: int, least: float) -> None:
    model, _ = made(name)
    plan = derive(model, num)
    assert list(plan) == [name for name, _ in model.named_parameters()]
    assert share(model, plan) >= least, plan


def test_the_plan_of_the_example_model() -> None:
    model, _ = made("lm")
    plan = derive(model, 2)
    block = {"qkv.weight": "column", "out.weight": "row", "up.weight": "column", "down.weight": "row"}
    blocks = {f"blocks.{i}.{name}": word for i in range(2) for name, word in block.items()}
    assert words(plan) == {"embed.weight": "vocab", **blocks}
    assert plan["blocks.0.qkv.weight"].segments == (32, 32, 32)
    assert plan["position.weight"].reason == "read whole by getitem"
    assert plan["norm.weight"].reason == "read whole by layer_norm"


def test_the_plans_of_hugging_face_layers() -> None:
    plan = derive(made("gpt2")[0], 2)
    layer = {key.removeprefix("transformer.h.0."): way for key, way in plan.items() if ".h.0." in key}
    assert (layer["attn.c_attn.weight"].dim, layer["attn.c_attn.weight"].segments) == (1, (32, 32, 32))
    assert (layer["attn.c_proj.weight"].dim, layer["mlp.c_fc.weight"].dim, layer["mlp.c_proj.weight"].dim) == (0, 1, 0)
    assert plan["transformer.wte.weight"].word == "vocab"  # 97 words: the last rank has fewer
    plan = derive(made("llama")[0], 2)
    layer = {key.removeprefix("model.layers.0."): way for key, way in plan.items() if ".layers.0." in key}
    columns = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert [layer[f"{key}.weight"].word for key in columns] == ["column"] * 5
    assert [layer[f"{key}.weight"].word for key in ("self_attn.o_proj", "mlp.down_proj")] == ["row", "row"]
    assert plan["lm_head.weight"].word == "vocab"
    plan = derive(made("bert")[0], 2)
    assert (plan["bert.pooler.dense.weight"].word, plan["classifier.weight"].word) == ("column", "row")


def test_fused_features_are_cut_in_the_segments_that_the_model_takes_them_apart_in() -> None:
    plan = derive(nn.Sequential(Separate()), 2)
    assert plan["0.gate_up.weight"].segments == (96, 96)
    assert plan["0.fold.weight"].word == "row"
    assert plan["0.unused.weight"].reason == "the trial did not reach it"


def test_a_trial_leaves_the_model_and_the_generator_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
            self.calls, self.cache = 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.cache = self.layers(x)
            return F.dropout(self.cache)

    model = Counting()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    derive(model, 2, {"layers.0": "column"})
    assert (model.calls, model.cache) == (0, None)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_on_the_meta_device_has_the_same_plan() -> None:
    for name in ("llama", "bert"):  # untied: a model that is moved to meta is no longer tied
        model, _ = made(name)
        plan = derive(model, 2)
        assert derive(model.to("meta"), 2) == plan


def test_a_user_function_and_an_unknown_operation_keep_a_layer_whole() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x / 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / 2

    class Odd(nn.Module):
        def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.first, self.second, self.between = nn.Linear(8, 16), nn.Linear(16, 8), between
            self.third, self.fourth = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fourth(self.third(self.second(self.between(self.first(x)))).relu())

    plan = derive(Odd(Half.apply), 2)
    assert plan["first.weight"].reason == "a torch.autograd.Function is applied to it"
    assert words(plan) == {"second.weight": "column", "second.bias": "column", "third.weight": "row"} or words(plan) == {
        "third.weight": "column", "third.bias": "column", "fourth.weight": "row",
    }  # fmt: skip
    plan = derive(Odd(lambda x: torch.sort(x, -1)[0]), 2)
    assert plan["first.weight"].reason == "no rule for sort"


def test_uneven_heads_keep_their_attention_whole_and_the_network_is_split() -> None:
    model, _ = made("encoder")
    plan = derive(model, 3)
    assert plan["layers.0.self_attn.in_proj_weight"].reason == "4 heads cannot be shared evenly by 3 ranks"
    assert plan["layers.0.linear1.weight"].word == "column"  # 64 features: 22, 22 and 20
    plan = derive(made("llama")[0], 3)
    assert "4 heads cannot be shared evenly by 3 ranks" in plan["model.layers.0.self_attn.q_proj.weight"].reason


# ---- what the user says ------------------------------------------------------------------------------------------------
def test_the_user_overrules_the_plan() -> None:
    model, _ = made("lm")
    plan = derive(model, 2, {"blocks.0.*": "replicate", "embed": "column", "blocks.1.up": "replicate"})
    assert not [name for name in words(plan) if name.startswith("blocks.0.")]
    assert plan["blocks.0.up.weight"].reason == "as the plan says"
    assert (plan["embed.weight"].word, plan["embed.weight"].dim) == ("column", 1)
    assert plan["blocks.1.qkv.weight"].word == "column"


@pytest.mark.parametrize(
    ("code", "overrides", "says"),
    [
        ("PL542", {"blocks.*.ups": "column"}, "fits no parameter"),
        ("PL542", {"blocks.*.up": "columns"}, "'columns'"),
        ("PL543", {"norm": "column"}, "norm.weight cannot be split as 'column'"),
        ("PL543", {"position": "vocab"}, "read whole by getitem"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(code: str, overrides: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        derive(made("lm")[0], 2, overrides)
    assert caught.value.code == code


def test_a_dim_that_is_too_short_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(UsageError, match="too short for 4 ranks") as caught:
        derive(model, 4, {"2": "column"})
    assert caught.value.code == "PL543"


@pytest.mark.parametrize("num", [3, 64])
def test_a_model_of_which_nothing_can_be_split_is_refused(num: int) -> None:
    """Uneven heads; more ranks than any dim is long."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 4)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.attend(x, x, x)[0])

    with pytest.raises(UsageError, match=f"4 heads cannot be shared evenly by {num} ranks") as caught:
        derive(Attention(), num)
    assert caught.value.code == "PL541"


class Deciding(nn.Module):
    """Its forward looks at what a layer has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        return self.down(y) if bool(y.sum() > 0) else x


def test_a_model_that_cannot_be_tried_needs_a_plan() -> None:
    with pytest.raises(UsageError, match="Deciding could not be guessed") as caught:
        derive(Deciding(), 2)
    assert caught.value.code == "PL540"
    plan = derive(Deciding(), 2, {"up": "column", "down": "row"})
    assert words(plan) == {"up.weight": "column", "up.bias": "column", "down.weight": "row"}


def test_a_model_may_look_at_its_inputs() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, words: Tensor) -> Tensor:
            self.seen.add_(1)
            mask = words != 0
            y = self.table(words) * mask.unsqueeze(-1)
            return self.down(self.up(y).relu()) if mask.any().item() else y

    model = Looking()
    assert words(derive(model, 2))["up.weight"] == "column"
    assert model.seen == 0


def test_an_example_shows_what_the_model_reads() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return self.down(self.up(given["x"] * given["y"]))

    with pytest.raises(UsageError):
        derive(Two(), 2)
    plan = derive(Two(), 2, example={"x": torch.ones(3, 8), "y": torch.ones(3, 1)})
    assert plan["up.weight"].word == "column"


# ---- rules -------------------------------------------------------------------------------------------------------------
class _Rank(Imagined):
    """One of several ranks; what needs an exchange is not a rule for the parts alone."""

    trial = False

    def __init__(self, num: int, rank: int) -> None:
        super().__init__(num)
        self.rank = rank

    def join(self, part: Tensor, dim: int, layout: Layout) -> Tensor:
        raise NotLocal("an exchange")

    def total(self, part: Tensor, *, fresh: bool = False) -> Tensor:
        raise NotLocal("an exchange")


def on_parts(function: Callable[..., Any], whole: Tensor, dim: int, layout: Layout) -> Any:
    """The function's value, put together from those of the ranks."""
    values = []
    for rank in range(layout.num):
        split = Split(layout.cut(whole, dim, rank), dim, layout, _Rank(layout.num, rank))
        values.append(function(split))
    if isinstance(values[0], (tuple, list)):
        return [_joined([value[i] for value in values]) for i in range(len(values[0]))]
    return _joined(values)


def _joined(values: list[Any]) -> Tensor:
    assert all(isinstance(value, Split) for value in values)
    whole = values[0].cuts.join([value.part for value in values], values[0].cut_dim)
    assert whole.shape == values[0].shape
    return whole


X = torch.randn(2, 3, 12, 8, dtype=torch.float64)
CASES: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: 1 + x * 2 - torch.ones(8),
    "with a tensor that has the dim": lambda x: x * torch.arange(96.0).view(12, 8),
    "with one per position of the dim": lambda x: x + torch.arange(12.0).unsqueeze(1),
    "compare": lambda x: torch.where(x > 0, x, -x),
    "in place": lambda x: x.clone().mul_(2).add_(1),
    "activations": lambda x: F.gelu(F.silu(x).tanh()),
    "transpose": lambda x: x.transpose(1, 2).transpose(-1, 0),
    "permute": lambda x: x.permute(3, 2, 0, 1),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1),
    "fold in": lambda x: x.flatten(2),
    "fold out": lambda x: x.reshape(2, 3, 4, 3, 8),
    "fold out with minus one": lambda x: x.view(2, 3, -1, 3, 8),
    "fold other dims": lambda x: x.flatten(0, 1).view(2, 3, 12, 2, 4),
    "unflatten": lambda x: x.unflatten(-1, (2, 4)).unflatten(2, (4, 3)),
    "index": lambda x: x[:, 1, :, ::2],
    "index with a new dim": lambda x: x[..., None, :4],
    "index of all": lambda x: x[:, :, :],
    "halves of another dim": lambda x: x.chunk(2, -1),
    "unbind another dim": lambda x: x.unbind(1),
    "cat": lambda x: torch.cat((-x[..., 4:], x[..., :4]), dim=-1),
    "stack": lambda x: torch.stack([x, x], dim=1),
    "expand": lambda x: x[:, :, :, None].expand(2, 3, 12, 5, 8).reshape(2, 3, 60, 8),
    "repeat": lambda x: x.repeat(2, 1, 1, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=2),
    "softmax": lambda x: x.softmax(-1) + F.softmax(x, dim=1),
    "mean": lambda x: x.mean(-1, keepdim=True) + x.sum((0, 1)),
    "var": lambda x: x.var(-1, True) + x.std(dim=-1, keepdim=False) + x.norm(dim=-1),
    "type by name": lambda x: x.type(torch.float32).type_as(x),
    "folds over dims of one": lambda x: x.unsqueeze(2).reshape(2, 1, 3, 1, 12, 8).view(2, 3, 1, 12, 8).squeeze(2),
    "chunks by name": lambda x: x.chunk(dim=1, chunks=3),
    "max": lambda x: x.max(dim=1)[0],
    "layer norm": lambda x: F.layer_norm(x, (8,), torch.arange(8.0, dtype=x.dtype), torch.ones(8, dtype=x.dtype)),
    "pad": lambda x: F.pad(x, (1, 2)),
    "matmul": lambda x: x @ x.transpose(-1, -2).softmax(-1)[..., :8].contiguous() if x.dim() < 4 else x @ torch.eye(8, dtype=x.dtype),
    "einsum": lambda x: torch.einsum("abcd,abce->acde", x, x),
    "linear": lambda x: F.linear(x, torch.ones(5, 8, dtype=x.dtype), torch.ones(5, dtype=x.dtype)),
    "type": lambda x: x.float().double().to(torch.float32),
    "tril": lambda x: x.transpose(1, 2).tril(),
    "zeros": lambda x: torch.zeros_like(x) + x,
}  # fmt: skip


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_rule_says_what_the_function_says(case: str, num: int) -> None:
    function = CASES[case]
    expected, got = function(X), on_parts(function, X, 2, Layout((12,), num))
    if not isinstance(expected, (tuple, list)):
        expected, got = [expected], [got]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(expected, got, strict=True))


SEGMENTS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda x: x.chunk(3, dim=-1),
    "split": lambda x: x.split(8, dim=-1),
    "slices": lambda x: [x[..., :8], x[..., 8:], x[..., 8:16]],
    "view": lambda x: x.view(2, 5, 3, 4, 2).permute(2, 0, 3, 1, 4),
    "view and unbind": lambda x: x.view(2, 5, 3, 4, 2).unbind(2),
    "pointwise": lambda x: x * torch.arange(24.0),
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments_are_taken_apart(case: str) -> None:
    x, function = torch.randn(2, 5, 24), SEGMENTS[case]
    expected, got = function(x), on_parts(function, x, 2, Layout((8, 8, 8), 2))
    if not isinstance(expected, (tuple, list)):
        expected, got = [expected], [got]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "sort": lambda x: x.sort(2),
    "softmax over it": lambda x: x.softmax(2),
    "norm over it": lambda x: F.layer_norm(x, (12, 8)),
    "one position": lambda x: x[:, :, 3],
    "some positions": lambda x: x[:, :, 3:7],
    "joined with one before": lambda x: x.flatten(0, 2),
    "uneven fold": lambda x: x.view(2, 3, 3, 4, 8),
    "mean of no dims": lambda x: x.mean(()),
    "an axis by its other name": lambda x: x.sum(axis=2),
    "positions that are true": lambda x: torch.where(x > 0),
    "flipped": lambda x: x.flip(0, 2),
    "chosen positions": lambda x: x[:, :, torch.tensor([0, 1])],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_rule_covers_is_made_whole(case: str) -> None:
    with pytest.raises(NotLocal, match="an exchange"):
        on_parts(REFUSED[case], X, 2, Layout((12,), 2))


def test_layouts() -> None:
    uneven = Layout((97,), 4)
    assert [uneven.length(rank) for rank in range(4)] == [25, 25, 25, 22]
    whole = torch.arange(97)
    assert torch.equal(uneven.join([uneven.cut(whole, 0, rank) for rank in range(4)], 0), whole)
    assert uneven.scaled(2) is None
    fused = Layout((4, 8), 2)
    whole = torch.arange(12)
    assert fused.cut(whole, 0, 1).tolist() == [2, 3, 8, 9, 10, 11]
    assert torch.equal(fused.join([fused.cut(whole, 0, rank) for rank in range(2)], 0), whole)
    assert fused.divided(2) == Layout((2, 4), 2)
    assert fused.divided(4) is None
    assert fused.scaled(3) == Layout((12, 24), 2)


def test_every_model_of_the_parity_test_has_a_plan_that_ranks_agree_on() -> None:
    for name in MODELS:
        assert derive(made(name)[0], 2) == derive(made(name)[0], 2)
