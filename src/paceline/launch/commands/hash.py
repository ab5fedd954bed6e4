"""``paceline hash RUN``: one number for the final parameters; equal parameters, equal numbers, on any machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from paceline.launch.rundir import find
from paceline.terms.errors import FileError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's directory, its name below runs/, or a .safetensors file")


def main(args: argparse.Namespace) -> int:
    """Print the sha256 over names, types, shapes and bytes of the parameters, names sorted."""
    from paceline.train.state import hash_file

    path = Path(args.run) if args.run.endswith(".safetensors") else find(args.run) / "model.safetensors"
    if not path.is_file():
        raise FileError(
            "PL603", f"{path} does not exist", help="a run writes its weights at its end; `run.json` tells its state."
        )
    value = hash_file(path)
    print(json.dumps({"file": str(path), "sha256": value}) if args.format == "json" else value)
    return 0
