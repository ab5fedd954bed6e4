"""A plan as text. ``plan.toml`` is written here, read by ``tomllib``, and taken back by ``paceline run --plan``.

An empty strategy means that the command line named none; then the script decides, and the key is left out.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from paceline.terms.errors import UsageError
from paceline.terms.plan import Plan

_HEAD = "# The plan of a Paceline run. `paceline run --plan FILE` runs it again; flags given beside it win.\n"
_BARE = re.compile("[A-Za-z0-9_-]+")
_KINDS: dict[str, type] = {
    "script": str,
    "script_args": list,
    "processes": int,
    "strategy": str,
    "seed": int,
    "threads": int,
    "wire": str,
    "stop_on_nan": bool,
    "settings": dict,
    "workers_min": int,
    "workers_max": int,
    "checkpoint": str,
    "resume": str,
}
_LEFT_OUT = ("strategy", "workers_min", "workers_max", "checkpoint", "resume")  # where they are empty or 0


def emit(plan: Plan) -> str:
    """The plan as TOML. ``parse(emit(plan)) == plan`` up to keys that are left out because they say nothing."""
    lines = []
    for f in fields(plan):
        value = getattr(plan, f.name)
        if f.name != "settings" and value is not None and not (f.name in _LEFT_OUT and not value):
            lines.append(f"{f.name} = {_value(value)}\n")
    lines.append("\n[settings]\n")
    lines += [f"{name if _BARE.fullmatch(name) else _text(name)} = {_text(value)}\n" for name, value in plan.settings]
    return _HEAD + "".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    assert isinstance(value, int)
    return str(value)


def _text(text: str) -> str:
    """A basic string. TOML wants every control character but tab escaped, and knows the escapes of JSON for five of them."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    safe = (escapes.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c) for c in text)
    return f'"{"".join(safe)}"'


def read(path: Path) -> Plan:
    """The plan in the file.

    Raises:
        UsageError: PL105, the file cannot be read or is no plan.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("PL105", f"--plan {path}: {error}", help="give a plan.toml that a run has written.") from error


def parse(text: str) -> Plan:
    """The plan in the text. Raises UsageError PL105 for keys or values that a plan cannot have."""
    raw = tomllib.loads(text)
    for key, value in raw.items():
        if key not in _KINDS:
            raise UsageError("PL105", f"a plan has no {key!r}", help=f"it has {', '.join(_KINDS)}.")
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool) != (_KINDS[key] is bool):
            raise UsageError("PL105", f"{key} = {value!r} in a plan is not a {_name(_KINDS[key])}")
    if "script" not in raw:
        raise UsageError("PL105", "a plan without a script")
    settings = {str(k): str(v) for k, v in raw.pop("settings", {}).items()}
    args = tuple(map(str, raw.pop("script_args", ())))
    return Plan(**{"strategy": "", **raw}, script_args=args, settings=tuple(settings.items()))


def _name(kind: type) -> str:
    names = {str: "text", int: "whole number", bool: "true or false", list: "list", dict: "table"}
    return names[kind]
