"""The whole state of a server's core as JSON, also in the middle of an update: for a second copy of the server. Pure.

``ServerCore.state`` tells what is done, for a checkpoint; this tells in addition what is out with whom, and who waits for what. Only
the classes named here are told and made, each by its attributes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import fields, is_dataclass
from typing import Any

from paceline.exchange.server import ServerCore
from paceline.exchange.server_bound import Asynchronous
from paceline.exchange.server_desk import Desk, Worker
from paceline.exchange.server_pool import Batch, Pass, Pool
from paceline.exchange.server_protocol import Ask, Go, Meet, Part, Piece, Step
from paceline.exchange.server_rule import Rule
from paceline.exchange.server_together import Synchronous

_KINDS = {kind.__name__: kind for kind in (Ask, Batch, Go, Meet, Part, Pass, Piece, Pool, Step, Worker)}
_ELSEWHERE = ("rule", "out", "now", "desk")  # attributes that are not state, or are told once


def told(value: Any) -> Any:
    """A value as JSON: plain values, lists, tuples, sets, dictionaries, and what is named above.

    >>> heard(told({1: ("a", {2.5})}))
    {1: ('a', {2.5})}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {"dict": [[told(key), told(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple, deque)):
        return {type(value).__name__: [told(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [told(item) for item in sorted(value)]}
    kind = type(value).__name__
    if kind not in _KINDS:
        raise TypeError(f"{kind} is no state of a server")
    return {kind: {name: told(getattr(value, name)) for name in _attributes(value)}}


def _attributes(value: Any) -> list[str]:
    return [field.name for field in fields(value)] if is_dataclass(value) else list(vars(value))


def heard(said: Any) -> Any:
    """The inverse. Raises ValueError, TypeError or KeyError for what :func:`told` did not tell."""
    if not isinstance(said, dict):
        return said
    ((kind, inside),) = said.items()
    match kind:
        case "dict":
            return {heard(key): heard(item) for key, item in inside}
        case "list":
            return [heard(item) for item in inside]
        case "tuple":
            return tuple(heard(item) for item in inside)
        case "deque":
            return deque(heard(item) for item in inside)
        case "set":
            return {heard(item) for item in inside}
    made: Any = object.__new__(_KINDS[kind])
    for name, item in inside.items():
        object.__setattr__(made, name, heard(item))
    return made


def _inside(thing: Any) -> dict[str, Any]:
    return {name: told(value) for name, value in vars(thing).items() if name not in _ELSEWHERE}


def _put(thing: Any, said: dict[str, Any]) -> None:
    for name, value in said.items():
        setattr(thing, name, heard(value))


def tell_core(core: ServerCore) -> dict[str, Any]:
    """All that a core knows."""
    discipline: Any = core.discipline
    assert isinstance(core.desk, Desk)
    assert isinstance(discipline, Synchronous | Asynchronous)
    return {"desk": _inside(core.desk), "discipline": _inside(discipline), "turns": core._turns}


def hear_core(rule: Rule, said: dict[str, Any], kind: type[ServerCore] = ServerCore) -> ServerCore:
    """A core that knows the same, and goes on as the other one would."""
    core = kind(rule)
    _put(core.desk, said["desk"])
    _put(core.discipline, said["discipline"])
    core._turns = said["turns"]
    return core
