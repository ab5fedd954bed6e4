"""What every benchmark writes down: the machine, all repetitions, medians, and by how much a bar was met or missed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "numpy", "paceline")


@dataclass(frozen=True)
class Bar:
    """A promise about speed: `value` should be at least `at_least` (or at most, where less is better)."""

    name: str
    at_least: float
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.at_least

    def __str__(self) -> str:
        verdict = "met" if self.met else f"MISSED by {(1 - self.value / self.at_least):.1%}"
        return f"{self.name}: {self.value:.3g}x, bar {self.at_least:g}x: {verdict}"


def machine() -> dict[str, Any]:
    """The machine, the versions and the load, so that a number can be read a year later."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "revision": _revision(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def median(values: Sequence[float]) -> float:
    """The median; benchmarks of a shared machine have outliers to one side."""
    return statistics.median(values)


def write(name: str, here: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], bars: Sequence[Bar]) -> Path:
    """Write ``bench/results/<name>.json``.

    Args:
        name: Name of the benchmark.
        here: What :func:`machine` said before it began.
        rows: One a configuration, with all repetitions.
        bars: The promises, met or not.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    judged = [{**asdict(bar), "met": bar.met, "text": str(bar)} for bar in bars]
    after = {"load_after": [round(x, 2) for x in os.getloadavg()]}
    content = {
        "benchmark": name,
        "arguments": sys.argv[1:],
        "machine": {**here, **after},
        "rows": list(rows),
        "bars": judged,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def show(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], bars: Sequence[Bar], path: Path
) -> None:
    """Print a table of `rows`, then what became of each bar."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if rows and isinstance(rows[0].get(column), (int, float)) else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console(width=120)
    console.print(table)
    for bar in bars:
        console.print(f"  {bar}", highlight=False)
    console.print(f"  all repetitions: {path.relative_to(HERE.parent)}", highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _revision() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "no git"
