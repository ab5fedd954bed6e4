"""Models that the tests of placement split, with batches for them: small, in float64, without dropout."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paceline

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """How to make a model, a batch of `rows` rows for a step, and a mean loss over the rows given."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]


def numbers(*shape: int) -> Callable[[torch.Generator, int], Batch]:
    def batch(g: torch.Generator, rows: int) -> Batch:
        return torch.randn(rows, *shape, generator=g, dtype=torch.float64), torch.randint(0, 5, (rows,), generator=g)

    return batch


def words(length: int, vocabulary: int, classes: int = 0) -> Callable[[torch.Generator, int], Batch]:
    def batch(g: torch.Generator, rows: int) -> Batch:
        text = torch.randint(0, vocabulary, (rows, length + 1), generator=g)
        return text[:, :-1], text[:, 0] % classes if classes else text[:, 1:]

    return batch


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out if isinstance(out, Tensor) else out.logits, y)


def predict(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy((out if isinstance(out, Tensor) else out.logits).flatten(0, 1), y.flatten())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 5))


def lm() -> Any:
    path = Path(paceline.__file__).parent / "launch" / "templates" / "lm.py"
    spec = importlib.util.spec_from_file_location("lm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return found


def _hf(kind: str) -> nn.Module:
    import transformers as t

    t.logging.set_verbosity_error()
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        config: Any = t.GPT2Config(
            vocab_size=64,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return t.GPT2LMHeadModel(config)
    if kind == "llama":
        config = t.LlamaConfig(
            vocab_size=64, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=16, **small
        )
        return _in_one_type(t.LlamaForCausalLM(config))
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "bert":
        config = t.BertConfig(
            vocab_size=64, intermediate_size=32, max_position_embeddings=16, num_labels=5, **small, **drops
        )
        return t.BertForSequenceClassification(config)
    config = t.ViTConfig(image_size=16, patch_size=8, intermediate_size=32, num_labels=5, **small, **drops)
    return t.ViTForImageClassification(config)


def _in_one_type(model: nn.Module) -> nn.Module:
    """Llama's norms compute in float32 whatever the model is in; two ways to add up a batch then differ by 1e-8."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(child.weight.shape[0], eps=1e-6))
    return model


CASES = {
    "mlp": Case(mlp, numbers(8), classify),
    "gpt": Case(lambda: lm().GPT(12, 16, 3, 2), words(12, 256), predict),
    "encoder": Case(Encoder, numbers(6, 8), classify),
    "hf_gpt2": Case(lambda: _hf("gpt2"), words(8, 64), predict),
    "hf_llama": Case(lambda: _hf("llama"), words(8, 64), predict),
    "hf_bert": Case(lambda: _hf("bert"), words(8, 64, 5), classify),
    "hf_vit": Case(lambda: _hf("vit"), numbers(3, 16, 16), classify),
}


def build(name: str) -> nn.Module:
    """The model of a case, the same on every call."""
    torch.manual_seed(7)
    return CASES[name].build().double()


def shares(rows: int, size: int) -> list[slice]:
    """Uneven: the first rank has more than half of what is left, and so on; with many ranks the last may have none."""
    parts, low = [], 0
    for rank in range(size):
        high = rows if rank == size - 1 else low + (rows - low + 1) // 2 + (rank == 0)
        parts.append(slice(low, min(high, rows)))
        low = min(high, rows)
    return parts
