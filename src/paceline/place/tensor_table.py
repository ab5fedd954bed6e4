"""The plan of a tensor-parallel model as a table that people read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from paceline.place.tensor_plan import Plan, Way

_SAID = {
    "column": "backward: sum of its input's gradient",
    "row": "forward: sum of its output",
    "vocab": "forward: sum or gathering over words",
}


def table(
    plan: Plan, params: Mapping[str, nn.Parameter], num: int, whole: Mapping[tuple[str, tuple[str, ...]], int]
) -> str:
    """One line for each parameter, a summary, and what had to be made whole while the model ran.

    Args:
        params: The parameters that are here, by name; their shapes are whole.
        num: Ranks of the group.
        whole: For each reason and origin how often.
    """
    rows = [("parameter", "shape", "split", "bytes per rank", "exchange, or why it is whole")]
    total = mine = cut = 0
    for name, p in params.items():
        way = plan.get(name) or Way("replicate", reason="tied")
        part = p.numel()
        if way.dim is not None:
            part = part // p.shape[way.dim] * way.layout(num).length(0)
            cut += p.numel()
        total, mine = total + p.numel(), mine + part
        rows.append((name, _shape(p), _split(way), f"{part * p.element_size():,}", way.reason or _SAID[way.word]))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
    ]
    lines.append(f"{cut:,} of {total:,} parameters are split over {num} ranks; each rank holds {mine:,}")
    for (reason, origins), count in whole.items():
        lines.append(f"made whole {count} times: the output of {', '.join(origins)}: {reason}")
    return "\n".join(lines)


def _shape(p: nn.Parameter) -> str:
    return "x".join(str(size) for size in p.shape) or "scalar"


def _split(way: Way) -> str:
    if way.dim is None:
        return "whole"
    segments = f" in {len(way.segments)} segments" if len(way.segments) > 1 else ""
    return f"{way.word}, dim {way.dim}{segments}"
