"""What the pages say is so: their blocks run, their paths and tests exist, their tables are those of the program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from paceline.launch import cli, ending
from paceline.terms.errors import EXPLANATIONS
from support import parity_table
from support.cli import run_command, show

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "<!-- not run: "
FENCE = re.compile(rf"(?P<mark>{re.escape(NOT_RUN)}[^\n]*\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
NAMED = re.compile(r"# (\w+\.py)\n")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    language: str
    text: str
    runs: bool


def _blocks(page: Path) -> list[Block]:
    return [
        Block(page, found["language"], found["text"], not found["mark"]) for found in FENCE.finditer(page.read_text())
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """In order and in one directory. A Python block that begins with ``# NAME.py`` becomes that file for those after it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for number, block in enumerate(block for block in _blocks(page) if block.runs):
        named = NAMED.match(block.text)
        if block.language == "python":
            script = tmp_path / (named[1] if named else f"block{number}.py")
            script.write_text(block.text)
            if named:
                continue
            command: tuple[str, ...] = (sys.executable, str(script))
        elif block.language == "sh":
            command = ("bash", "-euc", block.text)
        else:
            continue
        done = run_command(command, cwd=tmp_path, timeout=240, env={"PATH": path})
        assert done.returncode == 0, show(done)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert not [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:src|tests|bench|docs)/[\w./*-]+)`", text)
    assert not [path for path in paths if not list(ROOT.glob(path.rstrip("/")))]
    rooms = re.findall(r"`((?:launch|train|exchange|place|data|group|observe|terms)/\w*)[\w./]*`", text)
    assert not [room for room in rooms if not list((ROOT / "src" / "paceline").glob(f"{room.rstrip('/')}*"))]
    tests = set(re.findall(r"`(test_\w+)`", text))
    written = {
        name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert not tests - written
    assert not set(re.findall(r"\bPL\d{3}\b", text)) - EXPLANATIONS.keys()


def test_the_readme_names_a_test_for_each_promise() -> None:
    promises = ROOT.joinpath("README.md").read_text().partition("## Five promises")[2].partition("\n## ")[0]
    numbered = re.split(r"^\d\. ", promises, flags=re.M)[1:]
    assert len(numbered) == 5
    assert all(f"`test_{number}_" in text for number, text in enumerate(numbered, start=1))


def test_the_readme_lists_the_commands_and_exit_codes() -> None:
    text = ROOT.joinpath("README.md").read_text()
    commands = dict(re.findall(r"^\| `paceline (\w+)` \| (.+) \|$", text, re.M))
    assert commands == {verb: says for verb, (_, says) in cli.VERBS.items()}
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    known = (
        ending.OK,
        ending.FAILED,
        ending.REFUSED,
        ending.LOST,
        ending.MISTAKE,
        ending.INTERRUPTED,
        ending.TERMINATED,
    )
    assert codes == set(known)


def test_every_strategy_is_described_with_every_argument() -> None:
    import inspect

    from paceline.exchange.recipes import RECIPES

    text = ROOT.joinpath("docs", "strategies.md").read_text()
    for name, recipe in RECIPES.items():
        assert f"## `{name}(" in text
        section = text.partition(f"## `{name}(")[2].partition("\n## ")[0]
        assert not [argument for argument in inspect.signature(recipe).parameters if f"| `{argument}` |" not in section]


@pytest.mark.parametrize("code", sorted(EXPLANATIONS))
def test_every_code_is_explained_by_the_command(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", code]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    entry = EXPLANATIONS[code]
    assert code in shown
    assert " ".join(entry.title.split()) in shown
    assert " ".join(entry.help.split()) in shown


def test_explain_without_a_code_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain"]) == 0
    shown = capsys.readouterr().out
    assert not [code for code in EXPLANATIONS if code not in shown]


def test_make_help_lists_its_targets() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"make (\w+)  ", shown))
    assert listed == {"demo", "test", "table", "soak", "smoke", "bench", "lint", "clean"}


def test_the_table_of_split_models_is_that_of_the_tests() -> None:
    """It is written by the tests themselves: ``make table``."""
    table = json.loads(parity_table.TABLE.read_text())
    assert parity_table.in_readme() == parity_table.rendered(table)
    assert set(table) == set(parity_table.MODELS)
