"""``paceline hash RUN|CHECKPOINT``: one number for the parameters; equal parameters, equal numbers, on any machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from paceline.launch.rundir import look_into
from paceline.terms.errors import FileError
from paceline.train.checkpoint_files import Checkpoint, locate
from paceline.train.state import hash_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's directory, its name below runs/, a checkpoint, or a .safetensors file")


def main(args: argparse.Namespace) -> int:
    """Print the sha256 over names, types, shapes and bytes of the parameters, names sorted."""
    chosen, _ = locate(Path(args.run))
    path = chosen or (
        Path(args.run) if args.run.endswith(".safetensors") else look_into(args.run) / "model.safetensors"
    )
    value = _of_checkpoint(path) if chosen is not None else _of_file(path)
    print(json.dumps({"file": str(path), "sha256": value}) if args.format == "json" else value)
    return 0


def _of_checkpoint(path: Path) -> str:
    """The files are verified first: a hash of damaged parameters would be believed."""
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        return checkpoint.hash()


def _of_file(path: Path) -> str:
    if not path.is_file():
        raise FileError(
            "PL603", f"{path} does not exist", help="a run writes its weights at its end; `run.json` tells its state."
        )
    return hash_file(path)
