"""``paceline explain [CODE]``: the table of errors, or one entry of it at length."""

from __future__ import annotations

import argparse
import json
import textwrap

from paceline.terms.errors import EXPLANATIONS, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", nargs="?", help="a code such as PL203; without it, all of them in a line each")


def main(args: argparse.Namespace) -> int:
    chosen = EXPLANATIONS if args.code is None else {_known(args.code): EXPLANATIONS[_known(args.code)]}
    for code, entry in chosen.items():
        if args.format == "json":
            print(json.dumps({"code": code, "title": entry.title, "text": entry.text, "help": entry.help}))
        elif args.code is None:
            print(f"{code}  {entry.title}")
        else:
            print(f"{code}: {entry.title}\n\n{textwrap.fill(entry.text, 100)}\n\nhelp: {entry.help}")
    return 0


def _known(text: str) -> str:
    code = text.upper() if text.upper().startswith("PL") else f"PL{text}"
    if code not in EXPLANATIONS:
        raise UsageError("PL107", f"{text!r} is no error code")
    return code
