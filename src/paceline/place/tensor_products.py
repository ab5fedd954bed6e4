"""Rules for split activations: products with weights, attention, tables and the loss over a vocabulary.

A weight that is cut by its output features makes a split activation (a *column*); one cut by its input features uses a split
activation up and sums over the ranks (a *row*). Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paceline.place.tensor_rules import beside, mask, together
from paceline.place.tensor_split import Layout, NotLocal, Split, made_whole, rule

Call = Callable[..., Any]


def whole(value: Any, reason: str) -> Any:
    """The plain tensor; a split one is gathered, and that is reported."""
    return made_whole(value, NotLocal(reason)) if isinstance(value, Split) else value


def _like(value: Any, split: Split, dim: int, layout: Layout) -> Any:
    """The part of a weight or bias that goes with `layout`."""
    if value is None:
        return None
    if isinstance(value, Split):
        return value.part if (value.cut_dim, value.cuts) == (dim, layout) else layout_cut(value, split, dim, layout)
    return split.ranks.cut(value, dim, layout)


def layout_cut(value: Split, split: Split, dim: int, layout: Layout) -> Tensor:
    """A split tensor cut in another way."""
    return split.ranks.cut(whole(value, "two tensors that are split in different ways"), dim, layout)


# ---- layers -----------------------------------------------------------------------------------------------------------
@rule("linear")
def _linear(func: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``input @ weight.T + bias`` for inputs [..., in], weights [out, in]."""
    if isinstance(weight, Split) and weight.cut_dim == 0:
        ranks = weight.ranks
        plain = ranks.enter(whole(input, "a layer that is cut by its outputs reads it"))
        part = func(plain, weight.part, _like(bias, weight, 0, weight.cuts))
        return Split(part, -1, weight.cuts, ranks, weight.origins)
    if isinstance(weight, Split):
        part = _like(input, weight, -1, weight.cuts) if not isinstance(input, Split) else _row_input(input, weight)
        out = weight.ranks.total(func(part, weight.part), fresh=True)
        return out if bias is None else out + whole(bias, "a bias that is split")
    if not isinstance(input, Split):
        return func(input, weight, whole(bias, "a bias that is split"))
    if input.cut_dim == input.part.dim() - 1:
        raise NotLocal("a layer that every rank holds whole reads it")
    enter = input.ranks.enter
    bias = whole(bias, "a bias that is split")
    return input.like(func(input.part, enter(weight), None if bias is None else enter(bias)))


def _row_input(input: Split, weight: Split) -> Tensor:
    if input.cut_dim == input.part.dim() - 1 and input.cuts == weight.cuts:
        return input.part
    return layout_cut(input, weight, input.part.dim() - 1, weight.cuts)


@rule("addmm")
def _addmm(func: Call, bias: Tensor, input: Tensor, weight: Tensor, **kwargs: Any) -> Any:
    """``bias + input @ weight``: how the Conv1D layers of GPT-2 compute; weights [in, out]."""
    if kwargs or bias.dim() != 1:
        raise NotLocal("a product with factors")
    if isinstance(weight, Split) and weight.cut_dim == 1:
        plain = weight.ranks.enter(whole(input, "a layer that is cut by its outputs reads it"))
        part = func(_like(bias, weight, 0, weight.cuts), plain, weight.part)
        return Split(part, 1, weight.cuts, weight.ranks, weight.origins)
    return _matmul(torch.matmul, input, weight) + whole(bias, "a bias that is split")


@rule("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")
def _matmul(func: Call, first: Tensor, second: Tensor) -> Any:
    if func.__name__ == "__rmatmul__":
        first, second = second, first
    rank = max(first.dim(), second.dim())
    if min(first.dim(), second.dim()) < 2:
        raise NotLocal("a product with a vector")
    if not isinstance(first, Split) and not isinstance(second, Split):
        return torch.matmul(first, second)
    inner_a = isinstance(first, Split) and first.cut_dim == first.part.dim() - 1
    inner_b = isinstance(second, Split) and second.cut_dim == second.part.dim() - 2
    outer_b = isinstance(second, Split) and second.cut_dim == second.part.dim() - 1
    if inner_b:
        assert isinstance(second, Split)
        if isinstance(first, Split) and not inner_a:
            raise NotLocal("a product over the split dim")
        part = (
            _row_input(first, second)
            if isinstance(first, Split)
            else second.ranks.cut(first, first.dim() - 1, second.cuts)
        )
        return second.ranks.total(torch.matmul(part, second.part), fresh=True)
    if inner_a:
        raise NotLocal("a product over the split dim")
    if outer_b:
        assert isinstance(second, Split)
        if isinstance(first, Split):
            raise NotLocal("a product of activations that are split in different ways")
        part = torch.matmul(second.ranks.enter(first), second.part)
        return Split(part, -1, second.cuts, second.ranks, second.origins)
    split, right = together(first, second)
    if right == -2:  # rows of the first
        if isinstance(second, Split):
            raise NotLocal("a product of activations that are split in different ways")
        return split.like(torch.matmul(split.part, split.ranks.enter(second)), rank - 2)
    parts = [beside(each, split, right) for each in (first, second)]
    return split.like(torch.matmul(*parts), rank + right)


@rule("einsum")
def _einsum(func: Call, equation: str, *operands: Any) -> Any:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    terms, arrow, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if not arrow or "." in equation:
        raise NotLocal("einsum with an implied form")
    pairs = list(zip(names, operands, strict=True))
    cut = [(term[each.cut_dim], each) for term, each in pairs if isinstance(each, Split)]
    letter, split = cut[0]
    if any(name != letter or each.cuts != split.cuts for name, each in cut):
        raise NotLocal("two activations that are split in different ways")
    if letter not in out and any(letter in term and not isinstance(each, Split) for term, each in pairs):
        raise NotLocal("a product over the split dim")
    parts = []
    for term, each in pairs:
        if isinstance(each, Split):
            parts.append(each.part)
        elif letter in term:
            parts.append(split.ranks.cut(each, term.index(letter), split.cuts))
        else:
            parts.append(split.ranks.enter(each))
    part = func(equation, *parts)
    return split.like(part, out.index(letter)) if letter in out else split.ranks.total(part)


# ---- attention --------------------------------------------------------------------------------------------------------
@rule("scaled_dot_product_attention")
def _attention(
    func: Call,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Each rank attends with its heads. Shapes are [..., heads, time, size]; with enable_gqa, keys have fewer heads."""
    three = (query, key, value)
    found = [each for each in three if isinstance(each, Split)]
    if (
        not found
        or found[0].cut_dim > found[0].part.dim() - 3
        or any(each.dim() != found[0].part.dim() for each in three)
    ):
        raise NotLocal("attention that is split inside its heads")
    split = query if isinstance(query, Split) else found[0]
    origins = tuple(dict.fromkeys(name for each in found for name in each.origins))
    split = Split(split.part, split.cut_dim, split.cuts, split.ranks, origins)
    if any(each.cut_dim != split.cut_dim or not each.cuts.even or len(each.cuts.segments) > 1 for each in found):
        raise NotLocal("attention over unlike parts")
    parts = []
    for each in three:
        layout = (
            split.cuts
            if each.shape[split.cut_dim] == split.cuts.total
            else Layout((each.shape[split.cut_dim],), split.ranks.num)
        )
        if not layout.even:
            raise NotLocal(f"{layout.total} heads cannot be shared evenly by {layout.num} ranks")
        parts.append(each.part if isinstance(each, Split) else split.ranks.cut(each, split.cut_dim, layout))
    right = split.cut_dim - split.part.dim()
    bias = None if attn_mask is None else beside(attn_mask, split, right) if attn_mask.dim() >= -right else attn_mask
    heads = query.shape[split.cut_dim]
    split = split.like(parts[0], None, Layout((heads,), split.ranks.num))
    if dropout_p:
        return split.like(_attend(split, parts, bias, dropout_p, is_causal, scale))
    out = func(*parts, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return split.like(out)


def _attend(
    split: Split, parts: list[Tensor], bias: Tensor | None, p: float, causal: bool, scale: float | None
) -> Tensor:
    """Attention written out, for a dropout mask that is drawn whole: one process draws it for all heads at once."""
    query, key, value = parts
    if key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * math.sqrt(factor)) @ (key.transpose(-2, -1) * math.sqrt(factor))
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype is torch.bool else scores + bias
    shape = list(scores.shape)
    shape[split.cut_dim] = split.cuts.total
    return (scores.softmax(-1) * mask(split, shape, p)) @ value


_MHA = inspect.signature(functional.multi_head_attention_forward)


def mha_arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of ``F.multi_head_attention_forward`` by name, with defaults."""
    bound = _MHA.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def mha_obstacle(a: dict[str, Any], num: int) -> str | None:
    """Why this attention cannot be split by heads over `num` ranks."""
    if a["use_separate_proj_weight"] or a["bias_k"] is not None or a["add_zero_attn"] or a["static_k"] is not None:
        return "attention with keys of another size, or with added ones"
    if a["num_heads"] % num:
        return f"{a['num_heads']} heads cannot be shared evenly by {num} ranks"
    return None


@rule("multi_head_attention_forward")
def _mha(func: Call, *args: Any, **kwargs: Any) -> Any:
    """What ``nn.MultiheadAttention`` calls: inputs [time, batch, width] or [time, width]."""
    a = mha_arguments(*args, **kwargs)
    weight, out_weight = a["in_proj_weight"], a["out_proj_weight"]
    if not (isinstance(weight, Split) and isinstance(out_weight, Split)) or mha_obstacle(a, weight.ranks.num):
        raise NotLocal("attention of which not all weights are split")
    ranks, heads = weight.ranks, a["num_heads"]
    width = weight.cuts.segments[0]
    if weight.cuts.segments != (width,) * 3 or any(isinstance(a[key], Split) for key in ("query", "key", "value")):
        raise NotLocal("attention with an unusual layout")
    wide = a["query"].dim() == 3
    query, key, value = ((each if wide else each.unsqueeze(1)) for each in (a["query"], a["key"], a["value"]))
    q, k, v = _project(query, key, value, weight, a["in_proj_bias"])
    size = width // heads
    split = Split(q, -1, Layout((width,), ranks.num), ranks, weight.origins)
    q, k, v = (each.reshape(each.shape[0], each.shape[1], -1, size).permute(1, 2, 0, 3) for each in (q, k, v))
    bias = _mha_bias(a, query, key, heads, split)
    causal = a["is_causal"] and bias is None
    shape = (q.shape[0], heads, q.shape[2], k.shape[2])
    by_head = Split(q, 1, Layout((heads,), ranks.num), ranks, weight.origins)
    p = a["dropout_p"] if a["training"] else 0.0
    weights = None
    if a["need_weights"] or p:
        scores = (q * size**-0.5) @ k.transpose(-2, -1)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        weights = weights * mask(by_head, shape, p) if p else weights
        out = weights @ v
    else:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    out = out.permute(2, 0, 1, 3).reshape(q.shape[2], q.shape[0], -1)
    out = ranks.total(functional.linear(out, out_weight.part), fresh=True)
    if a["out_proj_bias"] is not None:
        out = out + whole(a["out_proj_bias"], "a bias that is split")
    if not a["need_weights"]:
        return (out if wide else out.squeeze(1)), None
    assert weights is not None
    said = ranks.total(weights.sum(1)) / heads if a["average_attn_weights"] else by_head.like(weights).whole()
    return (out, said) if wide else (out.squeeze(1), said.squeeze(0))


def _project(query: Tensor, key: Tensor, value: Tensor, weight: Split, bias: Any) -> tuple[Tensor, Tensor, Tensor]:
    ranks = weight.ranks
    part = _like(bias, weight, 0, weight.cuts)
    if query is key and key is value:
        q, k, v = functional.linear(ranks.enter(query), weight.part, part).chunk(3, -1)
        return q, k, v
    biases = (None,) * 3 if part is None else part.chunk(3)
    inputs = zip((query, key, value), weight.part.chunk(3), biases, strict=True)
    q, k, v = (functional.linear(ranks.enter(each), w, b) for each, w, b in inputs)
    return q, k, v


def _mha_bias(a: dict[str, Any], query: Tensor, key: Tensor, heads: int, split: Split) -> Tensor | None:
    """Both masks as one number for each score, [batch or 1, heads of this rank or 1, time, time]."""
    total: Tensor | None = None
    if a["attn_mask"] is not None:
        total = _as_bias(a["attn_mask"], query.dtype)
        if total.dim() == 3:
            total = total.view(-1, heads, *total.shape[1:])
            if split.ranks.num > 1:
                total = Layout((heads,), split.ranks.num).cut(total, 1, split.ranks.rank)
    if a["key_padding_mask"] is not None:
        padding = _as_bias(a["key_padding_mask"], query.dtype).view(key.shape[1], 1, 1, key.shape[0])
        total = padding if total is None else total + padding
    return total


def _as_bias(given: Tensor, dtype: torch.dtype) -> Tensor:
    if given.dtype is torch.bool:
        return torch.zeros_like(given, dtype=dtype).masked_fill(given, -math.inf)
    return given.to(dtype)


# ---- vocabularies -----------------------------------------------------------------------------------------------------
@rule("embedding")
def _embedding(
    func: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Each rank looks up the words that it holds, zero for others; the sum over the ranks is the whole answer."""
    if (
        not isinstance(weight, Split)
        or isinstance(input, Split)
        or max_norm is not None
        or scale_grad_by_freq
        or sparse
    ):
        raise NotLocal("a table with settings that need all of it")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.cuts.total
    ranks = weight.ranks
    if weight.cut_dim == 1:
        return Split(func(input, weight.part, padding_idx), -1, weight.cuts, ranks, weight.origins)
    ((start, end),) = weight.cuts.spans(ranks.rank)
    mine = (input >= start) & (input < end)
    local = None if padding_idx is None or not start <= padding_idx < end else padding_idx - start
    found = func((input - start).clamp(0, end - start - 1), weight.part, local)
    return ranks.total(found * mine.unsqueeze(-1), fresh=True)


@rule("cross_entropy")
def _cross_entropy(
    func: Call,
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Of scores [rows, words] split by words and targets [rows]: no rank ever holds a whole row."""
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    if not plain or not isinstance(input, Split) or isinstance(target, Split) or target.is_floating_point():
        raise NotLocal("a loss with settings that need all words")
    if input.part.dim() != 2 or input.cut_dim != 1 or len(input.cuts.segments) > 1:
        raise NotLocal("a loss over scores of another shape")
    ranks, part = input.ranks, input.part
    ((start, end),) = input.cuts.spans(ranks.rank)
    shifted = part - ranks.largest(part.detach().amax(1)).unsqueeze(1)
    mine = (target >= start) & (target < end)
    chosen = shifted.gather(1, (target - start).clamp(0, end - start - 1).unsqueeze(1)).squeeze(1) * mine
    loss = ranks.total(shifted.exp().sum(1)).log() - ranks.total(chosen)
    counts = target != ignore_index
    loss = loss.masked_fill(~counts, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()
