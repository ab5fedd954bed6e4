"""``paceline stop RUN``: what Ctrl-C would do at its terminal, from anywhere on its machine."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
from pathlib import Path

from paceline.launch.rundir import KILLED, find, read_json, start_ticks
from paceline.terms.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's directory, or its name below runs/")
    parser.add_argument("--now", action="store_true", help="do not wait for the end of the step")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="how long to wait for the end (default: as long as it takes)"
    )


def main(args: argparse.Namespace) -> int:
    """0 when the run has ended, 1 when it still ends after the timeout."""
    run = find(args.run)
    pidfd = open_launcher(run)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGINT)
        if args.now:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        ended = _has_ended(pidfd, args.timeout)
    finally:
        os.close(pidfd)
    state = read_json(run / "run.json")["state"] if ended else "stopping"
    if args.format == "json":
        print(json.dumps({"run": str(run), "ended": ended, "state": state}))
    else:
        print(f"{run}: {state}" + ("" if ended else f" (still ending after {args.timeout:g} s)"))
    return 0 if ended else 1


def open_launcher(run: Path) -> int:
    """A descriptor of the launcher's process, made sure to be the one that was recorded, not a successor of its number."""
    entries = [entry for entry in read_json(run / "processes.json") if entry["role"] == "launcher"]
    if not entries:
        raise UsageError("PL109", f"{run} has ended: {read_json(run / 'run.json').get('state')}")
    launcher = entries[0]
    if launcher["host"] != socket.gethostname():
        raise UsageError("PL109", f"{run} was started on {launcher['host']}", help="give this command there.")
    killed = UsageError("PL109", f"{run}: {KILLED}", help=f"`paceline logs {run}` shows what its ranks have printed.")
    try:
        pidfd = os.pidfd_open(launcher["pid"])
    except ProcessLookupError:
        raise killed from None
    if start_ticks(launcher["pid"]) != launcher["ticks"]:  # the number is another process's by now
        os.close(pidfd)
        raise killed
    return pidfd


def _has_ended(pidfd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))
