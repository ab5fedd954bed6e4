"""``paceline join RUN -n 2``: more workers for a run that is alive and elastic.

``paceline join train.py -n 2 --address tcp:HOST:PORT --secret-file FILE`` starts them on this machine for a run on another one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

from paceline.launch.commands.stop import open_launcher
from paceline.launch.env import plan_from_json
from paceline.launch.rundir import choose_path, find, read_json
from paceline.launch.tuning import Machine, check_processes, choose
from paceline.terms.errors import FileError, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="a run's directory, or its name below runs/; with --address, the script")
    add("-n", "--processes", type=int, metavar="N", default=1, help="how many workers (default: 1)")
    add("--address", metavar="tcp:HOST:PORT", help="of a run on another machine, which was started with --listen")
    add("--secret-file", type=Path, metavar="FILE", help="a copy of `secret` in the directory of that run")
    add("--name", help="with --address: what is written here goes to runs/NAME")
    add("--run-dir", metavar="DIR", help="with --address: where everything goes, instead of runs/NAME")


def main(args: argparse.Namespace) -> int:
    """0 when they are being started; with ``--address`` as ``run`` does, when they have ended."""
    if args.processes < 1:
        raise UsageError("PL105", f"-n {args.processes}: a number above 0 is needed")
    return _here(args) if args.address is None else _from_elsewhere(args)


def _here(args: argparse.Namespace) -> int:
    """The launcher of the run starts them."""
    from paceline.launch.control import ask

    run = find(args.run)
    os.close(open_launcher(run))
    connection, answer = ask(_address(run), read_secret(run / "secret"), {"do": "start", "count": args.processes})
    connection.close()
    names = answer["names"]
    if args.format == "json":
        print(json.dumps({"run": str(run), "started": names}))
    else:
        print(f"{run}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} being started")
    return 0


def _from_elsewhere(args: argparse.Namespace) -> int:
    """This process becomes their launcher. The plan is that of the run, but for what belongs to this machine."""
    from paceline.launch.commands.run import Resolved, check_script, execute, first_line, refuse_second_launcher
    from paceline.launch.control import ask
    from paceline.launch.host import Host
    from paceline.launch.servers import strategy_servers

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    refuse_second_launcher()
    check_script(args.run)
    check_processes(args.processes)
    if args.secret_file is None:
        raise UsageError("PL105", "--address needs --secret-file", help="copy `secret` from the directory of the run.")
    path = choose_path(args.run, args.name, args.run_dir)
    secret = read_secret(args.secret_file)
    request = {"do": "lend", "count": args.processes, "host": socket.gethostname()}
    connection, answer = ask(args.address, secret, request)
    theirs = plan_from_json(dict(answer["plan"]))
    advised = choose(Machine.here(), args.processes, os.environ)
    own = {name for name, _ in advised.given} | set(advised.kept) | {"OMP_WAIT_POLICY"}
    asked = {name: value for name, value in theirs.settings if name not in own}
    settings = choose(Machine.here(), args.processes, os.environ, overrides=asked)
    plan = replace(
        theirs,
        script=args.run,
        script_args=tuple(args.script_args) or theirs.script_args,
        processes=args.processes,
        threads=settings.threads,
        settings=settings.given,
        resume="",
    )
    first_line(Resolved(plan, settings), path, args.format == "json")
    addresses = [f"{args.address.rpartition(':')[0]}:{port}" for port in answer["ports"]]
    serves = strategy_servers(theirs.strategy) > 0
    host = Host(connection, secret, addresses, answer["first"], serves=serves)
    return execute(plan, path, args.format == "json", host=host)


def _address(run: Path) -> str:
    """Where its launcher listens."""
    doors = [entry["address"] for entry in read_json(run / "endpoints.json") if entry["purpose"] == "control"]
    if not doors:
        raise UsageError("PL112", f"{run} is not elastic")
    return str(doors[0])


def read_secret(path: Path) -> bytes:
    """The secret that a run keeps for its owner. Raises FileError PL603."""
    try:
        secret = bytes.fromhex(path.read_text())
    except (OSError, ValueError) as error:
        raise FileError("PL603", f"{path}: {error}", help="it is `secret` in the directory of a living run.") from error
    if len(secret) != 32:
        raise FileError("PL603", f"{path} is not the secret of a run: it has {len(secret)} bytes instead of 32")
    return secret
