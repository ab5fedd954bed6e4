"""What a recipe may be given: values are checked here, and spelled the one way that strategy text has for them. Pure."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from paceline.terms.errors import UsageError
from paceline.terms.plan import Call

T = TypeVar("T")


def takes(function: Callable[..., Any]) -> str:
    """``ddp(codec=None, *, algorithm='auto')``: the name and the parameters of a recipe or codec."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return f"{function.__name__}{inspect.Signature(bare)}"


def invoke(table: dict[str, Callable[..., T]], call: Call, *, code: str, noun: str) -> T:
    """Call what `table` has under the name of `call`. Its arguments hold no calls any more.

    Raises:
        UsageError: No such name (`code`), or arguments that it does not take (PL203).
    """
    function = table.get(call.name)
    if function is None:
        raise UsageError(
            code,
            f"there is no {noun} {call.name!r}",
            help=f"{did_you_mean(call.name, table)}known: {', '.join(table)}.",
        )
    try:
        bound = inspect.signature(function).bind(*call.args, **dict(call.kwargs))
    except TypeError as wrong:
        raise UsageError("PL203", f"{call.name}: {wrong}", help=f"it takes {takes(function)}.") from None
    return function(*bound.args, **bound.kwargs)


def one_of(recipe: str, argument: str, value: object, choices: Iterable[Any]) -> Any:
    """`value`, if it is one of `choices`. Raises UsageError PL203."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        said = f"{did_you_mean(value, known)}{argument} is one of {', '.join(known)}."
        raise UsageError("PL203", f"{recipe}: {argument}={value!r} is not known", help=said)
    return value


def positive(recipe: str, argument: str, value: object) -> float:
    """`value`, if it is a finite number above zero. Raises UsageError PL203."""
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise UsageError("PL203", f"{recipe}: {argument}={value!r} cannot be", help=f"{argument} is a number above 0.")
    return value  # type: ignore[return-value]


def between(recipe: str, argument: str, value: object, least: float, most: float) -> float:
    """`value`, if it is a number from `least` to `most`. Raises UsageError PL203."""
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]
        said = f"{argument} is a number from {least:g} to {most:g}."
        raise UsageError("PL203", f"{recipe}: {argument}={value!r} cannot be", help=said)
    return value  # type: ignore[return-value]


def whole(recipe: str, argument: str, value: object, most: int, *, least: int = 1) -> int:
    """`value`, if it is a whole number from `least` to `most`. Raises UsageError PL203."""
    if type(value) is not int or not least <= value <= most:
        said = f"{argument} is a whole number from {least} to {most}."
        raise UsageError("PL203", f"{recipe}: {argument}={value!r} cannot be", help=said)
    return value


def spell(function: Callable[..., Any], **values: object) -> str:
    """Canonical text of a call: arguments by name, in the recipe's order, those at their default left out, words bare."""
    given = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = values[name]
        if value != parameter.default:
            given.append((name, _spelled(value)))
    return str(Call(function.__name__, kwargs=tuple(given)))


def _spelled(value: object) -> object:
    """Words bare; other strings, such as the edges of a graph, quoted."""
    return Call(value, bare=True) if isinstance(value, str) and value.isidentifier() else value


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``did you mean 'ring'? `` or nothing."""
    close = get_close_matches(str(word), list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""
