"""A function of a notebook as a module of its own: its source, and what it uses of its surroundings.

Such a function has no file that a fresh interpreter could import. So its source is taken along, and with it every global
name that it uses: modules and their members as imports, JSON values as literals, functions and classes of the notebook with
their own sources. Anything else belongs to the notebook's process alone, and is refused by name.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import symtable
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from paceline.terms.errors import UsageError

_OURS = ("__main__", "__mp_main__")


def source_of(fn: FunctionType) -> str:
    """Text of a module in which `fn` is defined and can be called.

    Raises:
        UsageError: PL108, it has free variables, no source, or uses something that cannot be taken along.
    """
    return "\n\n".join(_Module(fn).parts.values()) + "\n"


class _Module:
    """The definitions that a function needs, each after those that it needs itself.

    Args:
        root: The function.
    """

    def __init__(self, root: FunctionType) -> None:
        self.parts: dict[str, str] = {}
        self._root = root
        self._under_way: set[str] = set()
        self._add(root.__name__, root)

    def _add(self, name: str, thing: Any) -> None:
        if name in self.parts or name in self._under_way:
            return
        if isinstance(thing, ModuleType):
            self.parts[name] = f"import {thing.__name__} as {name}"
        elif _is_elsewhere(thing):
            self.parts[name] = f"from {thing.__module__} import {thing.__qualname__} as {name}"
        elif isinstance(thing, (FunctionType, type)):
            self._define(name, thing)
        else:
            self.parts[name] = f"{name} = {self._literal(name, thing)}"

    def _define(self, name: str, thing: FunctionType | type) -> None:
        source = self._source(thing)
        self._under_way.add(name)
        for used in _used(source):
            if used in self._root.__globals__ and not hasattr(builtins, used):
                self._add(used, self._root.__globals__[used])
        self.parts[name] = source

    def _source(self, thing: FunctionType | type) -> str:
        if isinstance(thing, FunctionType) and thing.__closure__:
            names = ", ".join(thing.__code__.co_freevars)
            raise self._refused(f"{thing.__qualname__} uses variables of a function around it: {names}")
        try:
            source = inspect.getsource(thing) if isinstance(thing, FunctionType) else _class_source(thing)
        except (OSError, TypeError, SyntaxError) as error:
            raise self._refused(f"the source of {thing.__qualname__} is not known") from error
        return textwrap.dedent(source)

    def _literal(self, name: str, value: Any) -> str:
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise self._refused(f"it uses {name}, a {type(value).__name__} of this process") from None
        return repr(value)

    def _refused(self, why: str) -> UsageError:
        help = "pass what it needs as arguments, make it inside the function, or put the function into a file."
        return UsageError("PL108", f"{self._root.__qualname__}: {why}", help=help)


def _is_elsewhere(thing: Any) -> bool:
    """`thing` is what an importable module has under its name."""
    module = inspect.getmodule(thing)
    there = module is not None and getattr(thing, "__module__", None) not in (*_OURS, None)
    return there and getattr(module, getattr(thing, "__qualname__", ""), None) is thing


def _class_source(thing: type) -> str:
    """``inspect`` looks for a class in its module's file; a notebook's class is where its methods are."""
    method = next(m for m in (*vars(thing).values(), None) if isinstance(m, FunctionType) or m is None)
    if method is None:
        raise OSError("a class without methods leaves no trace of its source")
    text = "".join(inspect.findsource(method)[0])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == thing.__name__:
            return ast.unparse(node)
    raise OSError("not found")


def _used(source: str) -> Iterator[str]:
    """Names that the source takes from outside: in its head (bases, defaults, decorators) and, as globals, in its body."""
    table = symtable.symtable(source, "<notebook>", "exec")
    yield from (symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced())
    yield from _globals(table)


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    for child in table.get_children():
        yield from (symbol.get_name() for symbol in child.get_symbols() if symbol.is_global())
        yield from _globals(child)
