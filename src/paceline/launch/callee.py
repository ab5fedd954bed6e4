"""The rank's side of ``paceline.launch``: finds the function again, calls it, and turns its result into JSON."""

from __future__ import annotations

import importlib
import importlib.util
import json
import linecache
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from paceline.terms.errors import UsageError

MAIN = "__mp_main__"  # multiprocessing's name for a script that is imported again, so that its classes pickle both ways
_CELL = "<notebook>"

importing = False
"""True while a rank imports the script of the function; a launch in that moment would start ranks without end."""


def call(function: Mapping[str, Any]) -> str:
    """Call what ``function.describe`` described; its result as JSON.

    Raises:
        UsageError: PL108, the function cannot be found, or its result is no JSON value.
    """
    sys.path[:] = function["sys_path"]
    result = _find(function)(**function["arguments"])
    try:
        return json.dumps(result)
    except (TypeError, ValueError) as error:
        name = function["qualname"]
        raise UsageError(
            "PL108", f"{name} returned a {type(result).__name__}, which is no JSON value: {error}"
        ) from error


def _find(function: Mapping[str, Any]) -> Callable[..., Any]:
    global importing
    importing = True
    try:
        found: Any = _module(function)
    finally:
        importing = False
    for name in function["qualname"].split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


def _module(function: Mapping[str, Any]) -> ModuleType:
    if function.get("source"):
        return _from_source(function["source"])
    if function.get("path"):
        return _from_script(Path(function["path"]))
    return importlib.import_module(function["module"])


def _from_script(path: Path) -> ModuleType:
    """Import the script under another name, so that what stands under ``if __name__ == "__main__"`` is not run."""
    spec = importlib.util.spec_from_file_location(MAIN, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__spec__ = None  # a loader worker that is spawned shall look for the file, not for a module of this name
    sys.modules[MAIN] = sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return module


def _from_source(source: str) -> ModuleType:
    """Execute what was taken from a notebook; tracebacks show its lines."""
    linecache.cache[_CELL] = (len(source), None, source.splitlines(keepends=True), _CELL)
    module = ModuleType(MAIN)
    sys.modules[MAIN] = sys.modules["__main__"] = module
    exec(compile(source, _CELL, "exec", dont_inherit=True), module.__dict__)
    return module
