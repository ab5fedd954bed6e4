"""``paceline checkpoint export|import``: to and from the formats of others, which are not safe to read.

torch.save and torch.distributed.checkpoint (DCP) write pickles: whoever loads one without ``weights_only=True`` runs what is in
it. Paceline's own checkpoints hold none, so these formats live here, in commands of their own, and nothing else reads them.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.launch.rundir import HOME
from paceline.terms.errors import FileError, UsageError
from paceline.train.checkpoint_files import Checkpoint, locate, newest_valid

if TYPE_CHECKING:
    from paceline.train.tree import Tree

_UNSAFE = "what it holds is pickled: load it with weights_only=True, and only from sources that you trust"
_PLACES = ("model", "state_dict", "model_state_dict")  # where others keep the weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["export", "import"], help="out of a checkpoint of Paceline, or into one")
    parser.add_argument("source", type=Path, help="export: a checkpoint or a run; import: a file of torch.save")
    parser.add_argument("out", type=Path, help="what is to be written")
    parser.add_argument("--to", choices=["torch", "dcp"], default="torch", help="export: whose format (default: torch)")


def main(args: argparse.Namespace) -> int:
    """Convert, and say what is to be minded."""
    if args.out.exists() and (args.what == "export" or not args.out.is_dir()):
        raise UsageError("PL105", f"{args.out} exists", help="name a file that does not.")
    written = _import(args.source, args.out) if args.what == "import" else _export(args.source, args.out, args.to)
    note = _UNSAFE if args.what == "export" else "it was read with weights_only=True; nothing in it was run"
    print(json.dumps({"written": str(written), "note": note}) if args.format == "json" else f"{written}\nnote: {note}")
    return 0


# ---- export ---------------------------------------------------------------------------------------------------------
def _export(source: Path, out: Path, to: str) -> Path:
    """Raises FileError PL613, PL614 for a source that is none, PL601 where `out` cannot be written."""
    from paceline.train.resume import read_tree

    with _open(source) as checkpoint:
        tree = read_tree(checkpoint)
    import torch

    try:
        if to == "torch":
            torch.save(_as_torch(tree) | {"paceline": tree}, out)
        else:
            from torch.distributed.checkpoint.state_dict_saver import save

            with warnings.catch_warnings(action="ignore"):  # that there is one process is no news
                save(_as_torch(tree), checkpoint_id=out, no_dist=True)
    except (OSError, RuntimeError) as error:
        raise FileError("PL601", f"{out} could not be written: {error}") from error
    return out


def _open(source: Path) -> Checkpoint:
    path = source if source.exists() else HOME / source
    chosen, directory = locate(path)
    if chosen is None:
        newest = newest_valid(directory, lambda error: None)
        if newest is None:
            raise FileError("PL614", f"{source} is no checkpoint, and no run with a valid one")
        return newest
    found = Checkpoint.open(chosen)
    found.verify()
    return found


def _as_torch(tree: Tree) -> dict[str, Any]:
    """The state_dicts that ``load_state_dict`` of torch takes: one of the model, lists of those of optimizers and schedules."""
    models = {label: model["state"] for label, model in tree.get("models", {}).items()}
    return {
        "model": next(iter(models.values())) if len(models) == 1 else models,
        "optimizers": [_optimizer(o) for o in tree.get("optimizers", {}).values()],
        "schedulers": list(tree.get("schedulers", {}).values()),
    }


def _optimizer(saved: Tree) -> dict[str, Any]:
    """torch counts parameters instead of naming them."""
    index = {name: i for i, name in enumerate(name for group in saved["groups"] for name in group["params"])}
    return {
        "state": {index[name]: entries for name, entries in saved["state"].items()},
        "param_groups": [{**group, "params": [index[n] for n in group["params"]]} for group in saved["groups"]],
    }


# ---- import ---------------------------------------------------------------------------------------------------------
def _import(source: Path, out: Path) -> Path:
    """Raises FileError PL615 for a file that cannot be read without running what is in it, or that holds no state."""
    import torch

    from paceline.train.checkpoint import save_tree

    if not source.is_file():
        raise UsageError("PL105", f"{source} is no file")
    try:
        found = torch.load(source, weights_only=True, map_location="cpu")
    except Exception as error:  # torch names no type: code that it was not to run, no file of its own, and others
        message = f"{source} is no file of torch.save that can be read without running it: {error}"
        raise FileError("PL615", message[:300]) from error
    return save_tree(_tree(found, source), out)


def _tree(found: Any, source: Path) -> Tree:
    """What `export` has written, or the weights of one model, bare or where others keep them."""
    import torch

    if isinstance(found, dict) and isinstance(found.get("paceline"), dict):
        tree: Tree = found["paceline"]
        return tree
    inside = (found.get(place) for place in _PLACES) if isinstance(found, dict) else ()
    for state in (found, *inside):
        if isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values()):
            return {"models": {"model": {"state": dict(state), "more": {}}}}
    raise FileError("PL615", f"{source} holds no state_dict of a model")
