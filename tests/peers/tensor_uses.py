"""What the tests of tensor parallelism do beyond a plain loop, each beside the same on a whole model: numbers that should be zero."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from paceline.place.tensor import TensorParallel
from peers.tensor_case import TIME, WORDS, draws, floats, group, ids, made, optimizer, parity
from support.peers import Peer, outcome


def work(peer: Peer, *, store: str, cases: list[tuple[str, str]], steps: int, names: list[str]) -> dict[str, Any]:
    """A parity for each case, and what the functions named say, all in one group."""
    with group(peer, store) as mesh:
        said = parity(mesh, cases, steps)
        return {"parity": said, **{name: globals()[name](mesh) for name in names}}


def _differences(place: TensorParallel, reference: nn.Module, *, grads: bool = False) -> float:
    theirs = dict(reference.named_parameters())
    pairs = [(place.whole(p.grad if grads else p, like=p), theirs[key]) for key, p in place.held if p.grad is not None]
    return max((a - (b.grad if grads else b)).abs().max().item() for a, b in pairs)


def stages(mesh: DeviceMesh) -> float:
    """Two halves of a model, one of which the ranks do not hold, joined by plain activations."""
    reference, model = made("lm")[0], made("lm")[0]
    place = TensorParallel(mesh)
    place.derive(model)
    first, second = model.blocks
    place.place_modules({"blocks.0": first, "blocks.1": second})
    assert [name for name, _ in place.held][:2] == ["blocks.0.norm1.weight", "blocks.0.norm1.bias"]
    head, whole_head = model.head, reference.head
    place.place_modules({"head": head})  # its weight is tied to a table that another stage holds
    assert dict(place.held)["head.weight"].placements[0].is_shard(0)
    y = floats(0, 32)
    assert torch.allclose(head(y), whole_head(y), rtol=0, atol=1e-12)
    x = torch.randn(2, TIME, 32, dtype=torch.float64, generator=draws(1), requires_grad=True)
    border = first(x)
    assert type(border) is Tensor
    given = border.detach().requires_grad_()
    second(given).pow(2).sum().backward()
    border.backward(given.grad)
    y = x.detach().clone().requires_grad_()
    reference.blocks[1](reference.blocks[0](y)).pow(2).sum().backward()
    return max(_differences(place, reference, grads=True), (x.grad - y.grad).abs().max().item())


def recomputed(mesh: DeviceMesh) -> list[float]:
    """Activation checkpointing, by hand and by Hugging Face."""
    from torch.utils.checkpoint import checkpoint

    class Recomputing(nn.Module):
        def __init__(self, blocks: nn.ModuleList) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    said = []
    reference, model = (Recomputing(made("lm")[0].blocks) for _ in range(2))
    place = TensorParallel(mesh)
    place.place(model)
    for each in (model, reference):
        each(floats(3, TIME, 32)).pow(2).sum().backward()
    said.append(_differences(place, reference, grads=True))
    (reference, loss), (model, _) = made("llama"), made("llama")
    model.activation_checkpointing_enable({"use_reentrant": False})
    place = TensorParallel(mesh)
    place.place(model)
    for each in (model, reference):
        loss(each, 1).backward()
    return [*said, _differences(place, reference, grads=True)]


def split_loss(mesh: DeviceMesh) -> list[float]:
    """The loss over a vocabulary that stays split: no rank holds a whole row; other functions still work."""
    reference, model = (made("gpt2")[0].eval() for _ in range(2))
    place = TensorParallel(mesh, loss_parallel=True)
    place.place(model)
    target = ids(5)
    target[0] = -100
    said = []
    for reduction in ("mean", "sum"):
        losses = []
        for each in (model, reference):
            logits = each(ids(4)).logits
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction))
        losses[0].backward()
        losses[1].backward()
        said += [abs(losses[0].item() - losses[1].item()), _differences(place, reference, grads=True)]
    logits = model(ids(4)).logits
    assert not place.group.whole
    assert torch.equal(logits.argmax(-1), reference(ids(4)).logits.argmax(-1))
    assert place.group.whole
    return said


def masks(mesh: DeviceMesh) -> list[float]:
    """Dropout: what every rank holds whole has the same mask on all; what is split has the mask of one process."""
    (reference, _), (model, _) = made("encoder"), made("encoder")
    place = TensorParallel(mesh)
    place.place(model)
    outs = []
    for each in (model, reference):
        torch.manual_seed(3)
        outs.append(each(floats(0, TIME, 32)))
    state = torch.get_rng_state().clone()
    everywhere = [torch.empty_like(state) for _ in range(mesh.size())]
    dist.all_gather(everywhere, state)
    assert all(torch.equal(each, state) for each in everywhere)
    attention = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True).double()
    x = floats(0, TIME, 32)
    torch.manual_seed(4)
    whole = attention(x, x, x, need_weights=True)
    place = TensorParallel(mesh)
    place.place(attention)
    torch.manual_seed(4)
    got = attention(x, x, x, need_weights=True)
    return [
        (outs[0] - outs[1]).abs().max().item(),
        *((a - b).abs().max().item() for a, b in zip(got, whole, strict=True)),
    ]


def attention_with_dropout(mesh: DeviceMesh) -> float:
    """The kernel's own dropout, in a model that says so: the masks of one process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    outs = []
    for split in (False, True):
        torch.manual_seed(7)
        c = LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, attention_dropout=0.3,
        )  # fmt: skip
        model = LlamaForCausalLM(c).double().train()
        if split:
            TensorParallel(mesh).place(model)
        torch.manual_seed(5)
        outs.append(model(ids(0)).logits)
    return (outs[0] - outs[1]).abs().max().item()


def whole_and_cut(mesh: DeviceMesh) -> list[float]:
    """Parameters and state go back and forth; an optimizer with state from before goes on."""
    (reference, loss), (model, _) = made("gpt2"), made("gpt2")
    reference.eval(), model.eval()
    optimizers = [optimizer("adamw", each) for each in (model, reference)]
    for each, opt in zip((model, reference), optimizers, strict=True):
        loss(each, 0).backward()
        opt.step()
    place = TensorParallel(mesh)
    place.place(model, optimizers[:1])
    for each, opt in zip((model, reference), optimizers, strict=True):
        opt.zero_grad()
        loss(each, 1).backward()
        opt.step()
    theirs = dict(reference.named_parameters())
    back = [
        (place.whole(place.cut(p, theirs[key].detach()), like=p) - theirs[key]).abs().max().item()
        for key, p in place.held[:3]
    ]
    fused = model.transformer.h[0].attn.c_attn.weight
    state = optimizers[0].state[fused]["exp_avg"]
    assert state.to_local().shape == (32, 96 // mesh.size())
    expected = optimizers[1].state[reference.transformer.h[0].attn.c_attn.weight]["exp_avg"]
    return [_differences(place, reference), *back, (place.whole(state, like=fused) - expected).abs().max().item()]


def overruled(mesh: DeviceMesh) -> list[float]:
    """Plans that waste, and tables cut by features, are still right."""
    said = []
    for name, plan in [
        ("lm", {"blocks.0.*": "replicate", "blocks.1.out": "column", "blocks.1.down": "replicate", "embed": "column"}),
        ("mlp", {"0": "row", "2": "column", "5": "column"}),
        ("bert", {"*.query": "replicate", "*.intermediate.dense": "row"}),
        ("encoder", {"*.linear1": "replicate"}),
    ]:
        (reference, loss), (model, _) = made(name), made(name)
        place = TensorParallel(mesh, plan=plan)
        place.place(model)
        for each in (model, reference):
            torch.manual_seed(2)
            loss(each, 1).backward()
        assert name not in ("lm", "mlp") or "made whole" in place.describe()
        said.append(_differences(place, reference, grads=True))
    return said


def recurrent_and_convolutions(mesh: DeviceMesh) -> list[float]:
    """Layers without a rule stay whole beside others that are split."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
            return self.down(F.gelu(self.up(self.lstm(y)[0][:, -1])))

    said = []
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Mixed().double())
    place = TensorParallel(mesh)
    place.place(models[0])
    assert [key for key, way in place.plan.items() if way.dim is not None] == ["up.weight", "up.bias", "down.weight"]
    for each in models:
        each(floats(0, 3, 4, 4)).pow(2).sum().backward()
    said.append(_differences(place, models[1], grads=True))
    return [*said, (models[0].norm.running_mean - models[1].norm.running_mean).abs().max().item()]


def mistakes(mesh: DeviceMesh) -> list[Any]:
    """A forward that raises leaves everything usable; what would make gradients wrong is refused."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.trick = nn.Linear(8, 16), nn.Linear(16, 8), ""

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            if self.trick == "raise":
                raise ArithmeticError("the user's")
            if self.trick == "function":
                x = Double.apply(x)
            if self.trick == "in place":
                x[:, 0] = 0.0
            if self.trick == "sort":
                x = x.sort(-1)[0]
            return self.down(x)

    model = Odd()
    place = TensorParallel(mesh)
    place.place(model)
    said: list[Any] = []
    for model.trick in ("function", "in place"):
        said.append(outcome(lambda: float(model(torch.ones(2, 8)).sum())).get("code"))
    model.trick = "raise"
    try:
        model(torch.ones(2, 8))
    except ArithmeticError as error:
        said.append(str(error))
    assert torch.overrides._len_torch_function_stack() == 0
    model.trick = "sort"
    model(torch.ones(2, 8)).sum().backward()
    said.append("no rule for sort" in place.describe())
    return said


def parts_by_themselves(mesh: DeviceMesh) -> float:
    """Methods and layers that are called without the model, and a tied head used by hand."""
    (reference, _), (model, _) = made("lm"), made("lm")
    TensorParallel(mesh).place(model)
    with torch.no_grad():
        a, b = (each.norm(each.blocks[0](each.embed(ids(1, 256)))) for each in (model, reference))
    return (a - b).abs().max().item()


def with_full_sharding(mesh: DeviceMesh) -> list[float]:
    """Torch's fully_shard on the other axis of a mesh, on top."""
    from torch.distributed.fsdp import fully_shard

    both = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("shard", "tensor2"))
    said = []
    for name in ("lm", "encoder"):
        (reference, loss), (model, _) = made(name), made(name)
        model.eval(), reference.eval()
        place = TensorParallel(both["tensor2"])
        place.place(model)
        names = [key for key, _ in place.held]
        for block in getattr(model, "blocks", getattr(model, "layers", None)):
            fully_shard(block, mesh=both["shard"])
        fully_shard(model, mesh=both["shard"])
        assert [key for key, _ in model.named_parameters()] == names
        opts = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
        for step in range(3):
            for each, opt in zip((model, reference), opts, strict=True):
                opt.zero_grad()
                loss(each, step).backward()
                opt.step()
        assert isinstance(dict(place.held)[names[0]], DTensor)
        assert len(dict(place.held)[names[0]].placements) == 2
        theirs = dict(reference.named_parameters())
        said += [(place.whole(p) - theirs[key]).abs().max().item() for key, p in place.held]
        said += [
            (place.whole(place.cut(p, theirs[key]), like=p) - theirs[key]).abs().max().item() for key, p in place.held
        ]
        assert all(place.cut(p, theirs[key]).placements == p.placements for key, p in place.held)
    return [max(said)]


def outside_of_the_model(mesh: DeviceMesh) -> list[float]:
    """A penalty on weights, an average of them, a copy of the model that is run, words written by a model with a cache."""
    from copy import deepcopy

    (reference, loss), (model, _) = made("lm"), made("lm")
    place = TensorParallel(mesh)
    place.place(model)
    for each in (model, reference):
        with place.watching():
            penalty = sum(p.pow(2).sum() + p.abs().max() for p in each.parameters())
            (loss(each, 0) + 0.1 * penalty).backward()
    said = [_differences(place, reference, grads=True)]
    average = deepcopy(model)
    with torch.no_grad(), place.watching():
        for p, other in zip(average.parameters(), reference.parameters(), strict=True):
            p.mul_(0.5)
            assert other.shape == p.shape
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.5)
        said.append((average(ids(0, 256)) - reference(ids(0, 256))).abs().max().item())
    words = []
    for split in (False, True):
        model = made("gpt2")[0].eval()
        if split:
            TensorParallel(mesh).place(model)
        words.append(model.generate(ids(0), max_new_tokens=6, do_sample=False))
    assert torch.equal(*words)
    return said


def without_values(mesh: DeviceMesh) -> float:
    """A model on the meta device is placed there; its parts get their values later."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reference, _ = made("llama")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**reference.config.to_diff_dict()))
    model = model.double()
    place = TensorParallel(mesh)
    place.place(model)
    assert all(p.is_meta and isinstance(p, DTensor) for p in model.parameters())
    bytes_here = sum(p.to_local().numel() for p in model.parameters())
    return bytes_here / sum(p.numel() for p in reference.parameters())


def families(mesh: DeviceMesh) -> dict[str, float]:
    """Gradients of further Hugging Face families, and of attention written out, in float64."""
    import transformers as T

    c: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    d: dict[str, Any] = {"vocab_size": WORDS, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
    configs: dict[str, Any] = {
        "Qwen3ForCausalLM": T.Qwen3Config(**c, num_key_value_heads=2, head_dim=8),
        "Phi3ForCausalLM": T.Phi3Config(**c, num_key_value_heads=2),
        "GPTNeoXForCausalLM": T.GPTNeoXConfig(**c),
        "Gemma2ForCausalLM": T.Gemma2Config(**c, num_key_value_heads=2, head_dim=8),
        "RobertaForMaskedLM": T.RobertaConfig(**{**c, "pad_token_id": 1}),
        "LlamaForCausalLM": T.LlamaConfig(**c, attn_implementation="eager", attention_dropout=0.2),
        "T5ForConditionalGeneration": T.T5Config(**d, d_ff=64, num_layers=2, num_heads=4, d_kv=8),
        "BartForConditionalGeneration": T.BartConfig(
            **d, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64,
        ),
    }  # fmt: skip
    said = {}
    for name, config in configs.items():
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(getattr(T, name)(config).double().train())
        place = TensorParallel(mesh)
        place.place(models[0])
        more = {"decoder_input_ids": ids(1)} if config.is_encoder_decoder else {}
        for each in models:
            torch.manual_seed(1)
            each(input_ids=ids(0), **more).logits.pow(2).mean().backward()
        said[name] = _differences(place, models[1], grads=True)
    return said


def labels_inside(mesh: DeviceMesh) -> float:
    """The loss that a Hugging Face model computes itself, in float32: over a vocabulary that stays split."""
    reference, model = (made("gpt2")[0].eval() for _ in range(2))
    place = TensorParallel(mesh)
    place.place(model)
    for each in (model, reference):
        each(input_ids=ids(0), labels=ids(0)).loss.backward()
    apart = _differences(place, reference, grads=True)
    return apart if apart > 1e-7 else 0.0  # what is in float32 on both sides is equal to its rounding


def lower_precision(mesh: DeviceMesh) -> float:
    """Under autocast products are in bfloat16, on the parts as on the whole."""
    (reference, loss), (model, _) = made("lm"), made("lm")
    reference.float(), model.float()
    TensorParallel(mesh).place(model)
    losses = []
    for each in (model, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(loss(each, 0))
        losses[-1].backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())
    apart = abs(losses[0].item() - losses[1].item())
    return apart if apart > 5e-3 else 0.0
