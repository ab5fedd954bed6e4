"""A strategy as text: read with ``ast`` into calls, never evaluated, and printed back the same. Pure; imports no torch.

    ddp(codec=bf16, algorithm=ring)         a call of a recipe; `ddp` alone is `ddp()`
    pipeline(2) * ddp()                     a product: left inside, right outside (``axes``)

Arguments are numbers, strings, True, False, None, inf, lists and tuples of these, words (``bf16``), and calls. A word is the same
as the string of its letters. For all strategies ``parse(str(strategy)) == strategy``; a text that cannot be read raises a
UsageError and nothing else, whatever it holds.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from paceline.exchange.arguments import invoke
from paceline.exchange.axes import AXES, Axis, mesh, refuse_odd
from paceline.exchange.cadence import CADENCES
from paceline.exchange.chain import Exchange
from paceline.exchange.codec import CODECS
from paceline.exchange.merge import MERGES
from paceline.exchange.ps import LATE
from paceline.exchange.recipes import RECIPES, ddp
from paceline.terms.errors import UsageError
from paceline.terms.plan import Call, Product, Strategy, Value

LONGEST = 2000  # characters
DEEPEST = 20  # calls and lists in each other
MOST = 20  # factors
_WORD_1F1B = re.compile(r"(?<![\w'\"])1f1b(?![\w'\"])")  # a word to everybody but Python

_ALL: dict[str, Callable[..., Any]] = {**RECIPES, **AXES}
"""What factors may mean."""

_VALUES: dict[str, Callable[..., Any]] = {**CODECS, **LATE, **MERGES, **CADENCES, **RECIPES}
"""What calls among the arguments of a recipe may mean."""


def parse(text: str) -> Strategy:
    """Read a strategy. Whether its recipes exist is not asked here.

    Raises:
        UsageError: PL202, with the position marked.
    """
    return _Reader(_WORD_1F1B.sub("'1f1b'", re.sub(r"\s", " ", text).strip())).strategy()


def build(strategy: str | Strategy | Exchange) -> Exchange:
    """Call the recipes that are meant.

    Raises:
        UsageError: The text cannot be read (PL202), a recipe does not exist (PL201) or was given what it does not take
            (PL203), or factors do not go together (PL204, PL212).
    """
    if isinstance(strategy, Exchange):
        return strategy
    read = parse(strategy) if isinstance(strategy, str) else strategy
    factors = read.factors if isinstance(read, Product) else (read,)
    made = [invoke(_ALL, _settled(call), code="PL201", noun="strategy") for call in factors]
    return made[0] if len(made) == 1 and isinstance(made[0], Exchange) else _product(made, str(read))


def build_whole(strategy: str | Strategy | Exchange, size: int) -> Exchange:
    """:func:`build`, for processes that were started to hold whole models.

    Raises:
        UsageError: PL213, it splits models over ranks; PL211, it asks for another number of them.
    """
    exchange = build(strategy)
    if exchange.axes and size > 1:
        raise UsageError("PL213", f"{exchange.text} splits the model, and {size} processes were started for whole ones")
    if exchange.ranks is not None and not exchange.axes:
        mesh((), exchange.ranks, size, 0, exchange.text)
    return exchange


def _product(made: Sequence[Exchange | Axis], text: str) -> Exchange:
    """Axes of one replica, and what replicas exchange: the last factor, or gradients.

    Raises:
        UsageError: PL204, an exchange stands where only an axis can; PL212, the axes do not go together.
    """
    inner, last = (made[:-1], made[-1]) if isinstance(made[-1], Exchange) else (made, ddp())
    axes = tuple(_axis(each, text) for each in inner)
    assert isinstance(last, Exchange)
    refuse_odd(axes, text)
    if last.rounds is None and any(axis.kind == "ddp" for axis in axes):
        raise UsageError(
            "PL204", f"{text}: ddp inside replicas that step together is one ddp", help="leave one of them out."
        )
    if last.service is not None or last.shards or last.params != "private" or last.phases or last.votes:
        raise UsageError("PL204", f"{text}: {last.text} cannot be exchanged by replicas that are split")
    shown = [axis.text for axis in axes] + ([last.text] if isinstance(made[-1], Exchange) else [])
    return replace(last, axes=axes, text=" * ".join(shown))


def _axis(factor: Exchange | Axis, text: str) -> Axis:
    """A factor that stands inside another. Raises UsageError PL204 for what is no axis."""
    if isinstance(factor, Axis):
        return factor
    if factor.rounds is not None or factor.service is not None or factor.phases or factor.shards:
        raise UsageError("PL204", f"{text}: {factor.text} stands inside another factor")
    return Axis("ddp", factor.ranks, {"exchange": factor}, factor.text, "whole copies that step together")


def show(strategy: Strategy | Exchange) -> str:
    """Canonical text: arguments by name and in the recipe's order, defaults left out. Equal values, equal texts."""
    return build(strategy).text


def check(text: str) -> str:
    """Canonical text of `text`. Raises like :func:`build`."""
    return build(text).text


def threads(text: str) -> int | None:
    """How many threads each rank must have under this strategy; None when that is free (or the script decides)."""
    return 1 if text and build(text).shards else None


def splits(text: str) -> bool:
    """Whether replicas of the model have several ranks under this strategy."""
    return bool(text) and bool(build(text).axes)


def _settled(call: Call) -> Call:
    """`call` with words as strings and codecs, merges, cadences and recipes as values in its arguments."""
    args = tuple(_value(v) for v in call.args)
    return Call(call.name, args, tuple((name, _value(v)) for name, v in call.kwargs))


def _value(value: Value) -> Value:
    if not isinstance(value, Call):
        return value
    return value.name if value.bare else invoke(_VALUES, _settled(value), code="PL203", noun="value")


class _Reader:
    """One text on its way to a strategy."""

    def __init__(self, text: str) -> None:
        self._text = text

    def strategy(self) -> Strategy:
        factors = tuple(self._factor(node) for node in self._factors(self._tree()))
        return factors[0] if len(factors) == 1 else Product(factors)

    def _tree(self) -> ast.expr:
        if not self._text:
            raise UsageError("PL202", "the text of the strategy is empty")
        if len(self._text) > LONGEST:
            raise UsageError("PL202", f"the text has {len(self._text)} characters; a strategy has at most {LONGEST}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Python warns of texts that it may refuse one day; we refuse them today
                return ast.parse(self._text, mode="eval").body
        except SyntaxError as wrong:
            raise self._refused((wrong.offset or 1) - 1, wrong.msg) from None
        except (ValueError, RecursionError, MemoryError, Warning) as wrong:
            raise self._refused(0, str(wrong) or "too deep") from None

    def _factors(self, node: ast.expr) -> list[ast.expr]:
        """The operands of ``*``, from left to right. A loop, because a long product is a deep tree."""
        factors: list[ast.expr] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and len(factors) < MOST:
            factors.append(node.right)
            node = node.left
        return [node, *reversed(factors)]

    def _factor(self, node: ast.expr) -> Call:
        match node:
            case ast.Call():
                return self._call(node, 1)
            case ast.Name(id=name):
                return Call(name)
        raise self._refused_at(node, "a recipe is expected here, such as ddp(); recipes are joined by *")

    def _call(self, node: ast.Call, depth: int) -> Call:
        if not isinstance(node.func, ast.Name):
            raise self._refused_at(node.func, "the name of a recipe is expected here")
        args = tuple(self._argument(a, depth) for a in node.args)
        kwargs: dict[str, Value] = {}
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in kwargs:
                raise self._refused_at(keyword, f"{keyword.arg or '**'} cannot stand here")
            kwargs[keyword.arg] = self._argument(keyword.value, depth)
        return Call(node.func.id, args, tuple(kwargs.items()))

    def _argument(self, node: ast.expr, depth: int) -> Value:
        match node:
            case ast.Call() if depth < DEEPEST:
                return self._call(node, depth + 1)
            case ast.Name(id=name) if name != "inf":
                return Call(name, bare=True)
        return self._literal(node, depth)

    def _literal(self, node: ast.expr, depth: int) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.Name(id="inf"):
                return math.inf
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() | ast.Name() as inner):
                number = self._literal(inner, depth)
                if type(number) in (int, float):
                    return -number
            case ast.List(elts=nodes) | ast.Tuple(elts=nodes) if depth < DEEPEST:
                values = [self._literal(n, depth + 1) for n in nodes]
                return values if isinstance(node, ast.List) else tuple(values)
        raise self._refused_at(node, "a number, string, True, False, None, list, tuple, word or call is expected here")

    def _refused_at(self, node: ast.expr | ast.keyword, why: str) -> UsageError:
        before = self._text.encode()[: node.col_offset]
        return self._refused(len(before.decode(errors="replace")), why)

    def _refused(self, column: int, why: str) -> UsageError:
        """The error with the text around `column`, and a caret under it."""
        start = max(0, column - 60)
        shown = "".join(c if c.isprintable() else "?" for c in self._text[start : column + 40])
        return UsageError("PL202", f"{why}\n    {shown}\n    {' ' * (column - start)}^")
