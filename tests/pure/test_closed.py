"""The closed wire, read from the sources: nothing that comes from outside can become code, and doors are in known places.

What happens at run time is watched by an audit hook in ``tests/peers/test_tcp_wire.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

SRC = Path(__file__).parents[2] / "src" / "paceline"
FILES = sorted(SRC.rglob("*.py"))
TREES = {str(path.relative_to(SRC)): ast.parse(path.read_text("utf-8")) for path in FILES}

MAKE_OBJECTS = {  # modules whose loading side makes any object, and so runs code
    *("pickle", "_pickle", "pickletools", "copyreg", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle"),
    *("marshal", "shelve", "dbm", "yaml", "xmlrpc", "code", "codeop", "multiprocessing", "concurrent.futures.process"),
    *("torch.multiprocessing", "torch.distributed.rpc", "torch.distributed.checkpoint", "torch.package"),
}
EVALUATE = {"eval", "exec", "compile", "__import__", "execfile"}
LOAD = {"torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load", "runpy.run_path", "runpy.run_module"}
OF_OBJECTS = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "send_obj", "recv_obj"),
}
ON_PURPOSE = {  # what stands where, and why
    **{("launch/worker.py", what): "the user's script" for what in ("exec", "compile")},
    **{("launch/callee.py", what): "the user's notebook cell" for what in ("exec", "compile")},
    ("launch/commands/run.py", "compile"): "a syntax check; nothing is run",
    ("launch/commands/checkpoint.py", "torch.load"): "the command that imports files, with weights_only",
    ("launch/commands/checkpoint.py", "torch.distributed.checkpoint"): "the command that exports; nothing is loaded",
}
MAY_LISTEN = {
    "group/lines.py": "behind the greeting of secure.py",
    "group/store_server.py": "a unix socket of the same user, for c10d's rendezvous of a run on one host",
    "launch/connect.py": "the address of rank 0, given to c10d by torchrun, Slurm or MPI",
}


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name and attribute, dotted as far as it is written, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield node.lineno, ast.unparse(node)


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_nothing_is_imported_that_makes_any_object() -> None:
    found = {
        (name, bad)
        for name, tree in TREES.items()
        for module in imports(tree)
        for bad in MAKE_OBJECTS
        if module == bad or module.startswith(bad + ".")
    }
    assert not found - ON_PURPOSE.keys()


def test_nothing_is_evaluated() -> None:
    found = {
        (name, what): line
        for name, tree in TREES.items()
        for line, what in names(tree)
        if what in EVALUATE or what in LOAD
    }
    assert not found.keys() - ON_PURPOSE.keys()


def test_torch_loads_weights_only() -> None:
    loads = [call for tree in TREES.values() for call in calls(tree) if ast.unparse(call.func) == "torch.load"]
    for call in loads:
        assert [ast.unparse(k.value) for k in call.keywords if k.arg == "weights_only"] == ["True"]


def test_no_object_collectives() -> None:
    found = [
        f"{name}:{line} {what}"
        for name, tree in TREES.items()
        for line, what in names(tree)
        if what.split(".")[-1] in OF_OBJECTS
    ]
    assert not found


def test_no_shell() -> None:
    found = [
        f"{name}:{call.lineno}"
        for name, tree in TREES.items()
        for call in calls(tree)
        if ast.unparse(call.func) in ("os.system", "os.popen") or any(k.arg == "shell" for k in call.keywords)
    ]
    assert not found


def test_who_listens() -> None:
    """A socket that listens is made in few places, and each says why nobody else gets in."""
    found = {
        name
        for name, tree in TREES.items()
        for call in calls(tree)
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("listen", "create_server", "start_server")
    }
    assert found == set(MAY_LISTEN)


def test_secrets_are_compared_in_constant_time() -> None:
    """The greeting and the frames compare what came with what is right only through ``hmac.compare_digest``."""
    for name in ("group/keys.py", "group/frames.py"):
        compared = [
            ast.unparse(node)
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.Compare) and any(word in ast.unparse(node) for word in ("proof", "tag", "key"))
        ]
        assert not [text for text in compared if "keys" not in text]
        assert any(ast.unparse(call.func) == "hmac.compare_digest" for call in calls(TREES[name]))
