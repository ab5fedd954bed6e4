"""The door: ``paceline VERB …``.

Exit codes, the same for every verb and version:

====  =====================================================================================================
0     all is well
1     the script failed on a rank (``run``), or what was examined is not as it should be (``verify``)
2     refused: the request cannot be carried out as given; nothing was started
3     a process of the run was lost (killed, died in native code, status 0 in mid-script), too few are left
4     no rank failed, but they do not fit together (PL501, PL505, PL507)
130   interrupted (Ctrl-C, ``paceline stop``)
143   terminated (SIGTERM, SIGHUP)
====  =====================================================================================================

Nothing heavy is imported here; each verb is a module with ``add_arguments(parser)`` and ``main(args) -> int``, imported when
it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from paceline import __version__
from paceline.terms.errors import PacelineError, UsageError

VERBS = {
    "run": ("paceline.launch.commands.run", "run a script on several processes"),
    "demo": ("paceline.launch.demo", "write two examples and run them"),
    "explain": ("paceline.launch.commands.explain", "what an error code means, and what to do"),
    "verify": ("paceline.launch.commands.verify", "prove a run's ledger, or its checkpoints"),
    "hash": ("paceline.launch.commands.hash", "the hash of a run's final parameters, or of a checkpoint's"),
    "checkpoint": ("paceline.launch.commands.checkpoint", "to and from the formats of torch.save and DCP"),
    "logs": ("paceline.launch.commands.logs", "what the ranks of a run have printed"),
    "join": ("paceline.launch.commands.join", "add workers to a run that is alive"),
    "chaos": ("paceline.launch.commands.chaos", "a fault drill on a run of one's own"),
    "stop": ("paceline.launch.commands.stop", "end a run at its next step"),
}
_FORMATS = ("text", "json")


class Parser(argparse.ArgumentParser):
    """Refuses like everything else here does, instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        help = f"`{self.prog} --help` shows what there is"
        if message.startswith("unrecognized arguments"):
            wrong = message.partition(": ")[2].split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            help = _did_you_mean(wrong, known) or help
            if self.prog.endswith("run"):
                help += "; arguments of the script go after `--`"
        raise UsageError("PL105", message, help=f"{help}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line and return the exit code. No exception of ours leaves it as a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except PacelineError as error:
        return _refuse(error, _wants_json(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `paceline logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if verb in ("-V", "--version"):
        print(json.dumps({"paceline": __version__}) if _wants_json(arguments) else f"paceline {__version__}")
        return 0
    if verb not in VERBS:
        help = _did_you_mean(verb, VERBS) or f"the verbs are {', '.join(VERBS)}"
        raise UsageError("PL105", f"paceline has no {verb!r}", help=f"{help}.")
    return _run_verb(verb, arguments[1:])


def _run_verb(verb: str, arguments: list[str]) -> int:
    module = importlib.import_module(VERBS[verb][0])
    own, script_args = _split(arguments) if verb in ("run", "join") else (arguments, [])
    parser = Parser(prog=f"paceline {verb}", description=VERBS[verb][1], allow_abbrev=False)
    module.add_arguments(parser)
    parser.add_argument("--format", choices=_FORMATS, default="text", help="for people, or one JSON object a line")
    args = parser.parse_args(own)
    args.script_args = script_args
    code: int = module.main(args)
    sys.stdout.flush()
    return code


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and those of the script: everything after the first ``--``."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _wants_json(arguments: list[str]) -> bool:
    own, _ = _split(arguments)
    return "--format=json" in own or ("--format", "json") in itertools.pairwise(own)


def _did_you_mean(wrong: str, known: Iterable[str]) -> str | None:
    import difflib

    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f"did you mean {close[0]!r}" if close else None


def _refuse(error: PacelineError, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"kind": "error", "code": error.code, "message": error.message, "help": error.help}))
    else:
        print(f"error {error.code}: {error.message}\n  help: {error.help}", file=sys.stderr)
    return 2


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {says}" for verb, (_, says) in VERBS.items())
    return f"""Write one PyTorch loop; run it with any distributed strategy.

usage: paceline VERB [arguments]

{verbs}

  paceline VERB --help   the arguments of a verb
  paceline --version

start here:  paceline demo
your script: paceline run train.py -n 4 -- --its-own arguments"""


if __name__ == "__main__":
    sys.exit(main())
