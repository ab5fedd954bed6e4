"""The table of what is split how and proved right: recorded by the tests while they run, printed into the README.

    PARITY_RECORD=found.jsonl LONG_TESTS=1 python -m pytest tests/peers/test_shard.py tests/parity/test_split.py ...
    python tests/support/parity_table.py found.jsonl

A cell holds the numbers of processes for which parameters were those of one process within the bound of the tests; it is empty where
nothing was run, and says so where a combination is refused. What stands in the README is checked against ``tests/parity/table.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests" / "parity" / "table.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
VARIABLE = "PARITY_RECORD"

MODELS = {
    "MLP": ("mlp",),
    "GPT, tied weights": ("gpt", "lm"),
    "`nn.TransformerEncoder`": ("encoder",),
    "GPT-2": ("gpt2", "hf_gpt2", "hf"),
    "Llama": ("llama", "hf_llama"),
    "BERT classifier": ("bert", "hf_bert"),
    "ViT": ("vit", "hf_vit"),
}
COLUMNS = {
    "fsdp": "`fsdp`, three stages",
    "fsdp * ddp": "`fsdp * ddp`",
    "tensor": "`tensor`",
    "tensor * ddp": "`tensor * ddp`",
    "pipeline": "`pipeline`",
    "pipeline * ddp": "`pipeline * ddp`",
    "pipeline * tensor": "`pipeline * tensor`",
}


def record(strategy: str, model: str, size: int, schedule: str = "") -> None:
    """Parity was shown. Does nothing unless a table is being made."""
    if path := os.environ.get(VARIABLE):
        with open(path, "a") as file:
            file.write(json.dumps([strategy, model, size, schedule]) + "\n")


def gathered(lines: list[str]) -> dict[str, dict[str, list[str]]]:
    """Model by column: the sizes, and for pipelines the number of schedules."""
    found: dict[tuple[str, str], set[int]] = {}
    schedules: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        strategy, model, size, schedule = json.loads(line)
        row = next((name for name, words in MODELS.items() if model in words), "")
        found.setdefault((row, strategy), set()).add(size)
        schedules.setdefault((row, strategy), set()).add(schedule)
    table: dict[str, dict[str, list[str]]] = {}
    for row in MODELS:
        table[row] = {}
        for column in COLUMNS:
            cell = [str(size) for size in sorted(found.get((row, column), ()))]
            kinds = {kind for kind in schedules.get((row, column), ()) if kind}
            if column == "pipeline" and kinds:
                cell.append(f"({len(kinds)} schedule{'s' if len(kinds) > 1 else ''})")
            table[row][column] = cell
    return table


def rendered(table: dict[str, dict[str, list[str]]]) -> str:
    """As Markdown."""
    lines = [
        "Numbers of processes for which the tests show the parameters of one process, in float64, within 1e-9 (a loss that Hugging Face",
        "computes in float32: within its rounding); empty: not shown.",
        "",
        "| model | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row, cells in table.items():
        shown = (
            ", ".join(s for s in cells[c] if s.isdigit()) + "".join(f" {s}" for s in cells[c] if not s.isdigit())
            for c in COLUMNS
        )
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def in_readme() -> str:
    """What stands there."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    lines = [line for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    table = gathered(lines)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n{rendered(table)}\n{END}{tail}")


if __name__ == "__main__":
    main()
