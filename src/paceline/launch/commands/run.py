"""``paceline run SCRIPT -n 4``: decide the plan, make the run directory, start, show, and say how it ended."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline import __version__
from paceline.launch import env, plan_file, tuning
from paceline.launch.ending import LOST
from paceline.launch.layout import lay_out, outlives_ranks, replica_ranks
from paceline.launch.muster import MOST_WORKERS
from paceline.launch.rundir import HOME, RunDirectory, choose_path, now_text
from paceline.launch.servers import strategy_servers
from paceline.launch.tuning import Machine, Settings, allow_files, check_processes, choose
from paceline.observe.pipe import Pipe
from paceline.terms.errors import PacelineError, UsageError
from paceline.terms.plan import Plan
from paceline.train.checkpoint_files import CHECKPOINTS, Policy, candidates, step_of

if TYPE_CHECKING:
    from paceline.launch.console import Console
    from paceline.launch.host import Host
    from paceline.launch.local import Outcome

_DEFAULT = "ddp()"

_SERVERS_SAVE = "every=30s"
_SHARED = "params=shared"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("script", nargs="?", help="the training script; its own arguments go after --")
    add("-n", "--processes", type=int, metavar="N", help="how many processes (default: 1)")
    add(
        "--workers",
        metavar="MIN:MAX",
        help="go on when workers are lost or join; N alone: exactly N, and no loss is borne",
    )
    add(
        "--listen",
        metavar="HOST[:PORT]",
        help="let workers of other machines join; encrypted (default: this machine only)",
    )
    add("--strategy", metavar="TEXT", help="e.g. 'ddp(codec=bf16)'; stronger than the script's own")
    add("--seed", type=int, help="seed torch, NumPy and random before the script starts")
    add("--name", help="of the run: runs/NAME")
    add("--run-dir", metavar="DIR", help="where everything of this run goes, instead of runs/NAME")
    add("--threads", type=int, metavar="T", help="threads of each process (default: its share of the cores)")
    add("--wire", choices=["auto", "shm", "tcp", "torch"], help="what the processes exchange through (default: auto)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="environment of each process; may be repeated")
    add("--checkpoint", metavar="WHEN", help="save every=500 (steps) or every=5min; then ,keep=3 ,busy=wait")
    add("--resume", metavar="auto|PATH", help="go on from this run's newest checkpoint, or from that of another run")
    add("--stop-on-nan", action="store_true", default=None, help="end the run when a gradient is not finite")
    add("--hang-after", type=float, metavar="SECONDS", help="report a standstill after so long")
    add("--explain", action="store_true", help="show where every parameter is, what is exchanged and when")
    add("--plan", type=Path, metavar="FILE", help="repeat the run of a plan.toml; flags given here are stronger")
    if "-h" in sys.argv or "--help" in sys.argv:
        from paceline.exchange.recipes import summaries

        parser.epilog = f"strategies: {', '.join(sorted(summaries()))}"


def main(args: argparse.Namespace) -> int:
    """Run, and return the exit code of ``cli``."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, the kernel forgets how processes ended
    refuse_second_launcher()
    resolved = resolve(args)
    path = choose_path(resolved.plan.script, args.name, args.run_dir, again=resolved.plan.resume == "auto")
    first_line(resolved, path, args.format == "json")
    more = {"hang_after": args.hang_after, "listen": args.listen or "", "explain": args.explain}
    return execute(resolved.plan, path, args.format == "json", **more)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A plan with what it was made of.

    Attributes:
        plan: ``strategy`` is empty when the script decides.
        settings: What every rank is given, and what was left as it was.
    """

    plan: Plan
    settings: Settings


def resolve(args: argparse.Namespace) -> Resolved:
    """Flags, then the plan file, then the defaults, checked.

    Raises:
        UsageError: PL101, PL103, PL105, PL110 or PL2xx.
    """
    base = plan_file.read(args.plan) if args.plan is not None else Plan(script="", strategy="")
    wire, strategy = args.wire or base.wire, args.strategy or base.strategy
    able = wire != "torch" and not tuning.has_accelerator() and _SHARED not in strategy.replace(" ", "")
    able = able and check_layout(strategy, args, base)
    processes, least, most = workers(args.processes, args.workers, base, args.plan is not None, able)
    if least and strategy:
        least = max(least, replica_ranks(replace(base, strategy=strategy, processes=processes)))
    flags = {
        "script": args.script,
        "script_args": tuple(args.script_args) or None,
        "processes": processes,
        "workers_min": least,
        "workers_max": most,
        "strategy": args.strategy,
        "seed": args.seed,
        "wire": args.wire,
        "stop_on_nan": args.stop_on_nan,
        "checkpoint": args.checkpoint,
        "resume": args.resume,
    }
    plan = replace(base, **{name: value for name, value in flags.items() if value is not None})
    if not plan.script:
        raise UsageError("PL101", "no script was given", help="`paceline run train.py -n 4`, or `--plan FILE`.")
    check_script(plan.script)
    check_processes(plan.processes)
    plan = _check_state(plan)
    if plan.elastic and plan.wire == "torch":
        raise UsageError(
            "PL105", "--wire torch bears no loss", help="give `--workers N`, exactly N, or leave --wire out."
        )
    if plan.wire == "tcp" and plan.processes > 1 and not plan.elastic:
        raise UsageError(
            "PL105", "--wire tcp is for elastic runs", help="give `--workers MIN:MAX`, or leave --wire out."
        )
    if args.listen is not None and not plan.elastic:
        raise UsageError("PL105", "--listen lets workers join", help="give `--workers MIN:MAX` too.")
    _check_numbers(args)
    if plan.strategy:
        from paceline.exchange.strategy import check, threads

        plan = replace(plan, strategy=check(plan.strategy))
        if strategy_servers(plan.strategy) and not plan.elastic:  # servers bear the loss of a worker in any case
            plan = replace(plan, workers_min=plan.processes, workers_max=plan.processes)
        if strategy_servers(plan.strategy) and not plan.checkpoint:  # what a server keeps must be somewhere else too
            plan = replace(plan, checkpoint=_SERVERS_SAVE)
        args.threads = threads(plan.strategy) or args.threads
    overrides = dict(plan.settings) | _assignments(args.set)
    if args.threads is not None:
        overrides.pop("OMP_NUM_THREADS", None)
    servers, lean = strategy_servers(plan.strategy), in_pieces(plan.strategy)
    settings = choose(
        Machine.here(),
        plan.processes,
        os.environ,
        threads=args.threads,
        overrides=overrides,
        servers=servers,
        lean=lean,
    )
    return Resolved(replace(plan, threads=settings.threads, settings=settings.given), settings)


def workers(
    processes: int | None, text: str | None, base: Plan, repeats: bool, able: bool = True
) -> tuple[int, int, int]:
    """How many to begin with, and the limits of an elastic run or 0, 0.

    Args:
        processes: ``-n``.
        text: ``--workers``.
        base: The plan that these flags are stronger than.
        repeats: It comes from a file, so its limits were chosen.
        able: A loss can be borne; then it is, unless ``--workers N`` says otherwise.

    Raises:
        UsageError: PL105, the numbers contradict each other, or there are too many for an elastic run.
    """
    if text is not None:
        least, most = _limits(text)
        count = processes if processes is not None else most
        if not least <= count <= most:
            raise UsageError("PL105", f"-n {count} is not within --workers {text}")
        exact = ":" not in text or most == 1
    else:
        count = processes if processes is not None else base.processes
        least, most = (min(base.workers_min, count), max(base.workers_max, count)) if base.elastic else (1, count)
        exact = not (base.elastic if repeats else able and 1 < count <= MOST_WORKERS)
    if exact:
        return count, 0, 0
    if most > MOST_WORKERS:
        message = f"an elastic run has at most {MOST_WORKERS} workers on one machine, and {most} were asked for"
        raise UsageError("PL105", message, help="`--workers N` starts exactly N, and bears no loss.")
    return count, least, most


def in_pieces(strategy: str) -> bool:
    """Whether models are cut into pieces, because memory is short."""
    if not strategy:
        return False
    from paceline.exchange.strategy import build

    return any(axis.kind == "fsdp" for axis in build(strategy).axes)


def check_layout(strategy: str, args: argparse.Namespace, base: Plan) -> bool:
    """Whether a loss can be borne, as far as the strategy has a say; its factors must fit the number of processes.

    Raises:
        UsageError: PL211, they do not; PL105, losses are to be borne, and cannot be.
    """
    if not strategy:
        return True
    from paceline.exchange.axes import mesh
    from paceline.exchange.strategy import build

    exchange, count = build(strategy), args.processes or base.processes
    if args.workers is not None and args.processes is None:
        count = _limits(args.workers)[1]
    if not exchange.axes:
        if exchange.ranks is not None:
            mesh((), exchange.ranks, count, 0, exchange.text)
        return True
    found = lay_out(strategy, count)
    assert found is not None
    most = _limits(args.workers)[1] if args.workers is not None else count
    borne = outlives_ranks(strategy, max(count, most)) and (args.wire or base.wire) != "tcp"
    if args.workers is None or ":" not in args.workers:
        return borne
    if not borne:
        message = f"--workers {args.workers}: under {exchange.text} on {count} ranks a loss ends the run"
        why = "a rank holds what no other has" if found.replicas == 1 else "its replicas cannot be built anew"
        raise UsageError("PL105", f"{message}: {why}", help="use -n N with --checkpoint, and go on with --resume auto.")
    if any(limit % found.inner for limit in _limits(args.workers)):
        message = f"--workers {args.workers}: a replica of {exchange.text} has {found.inner} ranks"
        raise UsageError("PL105", message, help=f"give multiples of {found.inner}.")
    if args.listen is not None:
        raise UsageError("PL105", f"--listen: the ranks of {exchange.text} are of one machine")
    return True


def _limits(text: str) -> tuple[int, int]:
    first, colon, second = text.partition(":")
    if not first.isdecimal() or (colon and not second.isdecimal()):
        raise UsageError("PL105", f"--workers {text}: this is neither MIN:MAX nor N")
    least, most = int(first), int(second if colon else first)
    if not 1 <= least <= most:
        raise UsageError("PL105", f"--workers {text}: MIN is at least 1, and not above MAX")
    return least, most


def _check_state(plan: Plan) -> Plan:
    """What is saved and resumed; a path is one of this directory, wherever the script goes. Raises UsageError PL105, PL106."""
    if plan.checkpoint:
        Policy.parse(plan.checkpoint)
    if plan.resume in ("", "auto"):
        return plan
    path = next((p for p in (Path(plan.resume), HOME / plan.resume) if p.is_dir()), None)
    if path is None:
        raise UsageError("PL106", f"--resume {plan.resume}: no checkpoint and no run is there")
    return replace(plan, resume=str(path.absolute()))


def check_script(script: str) -> None:
    path = Path(script)
    try:
        source = path.read_bytes()
    except OSError as error:
        import difflib

        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        close = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, near, n=1)]
        help = f"did you mean {close[0]}?" if close else None
        raise UsageError("PL101", f"{script}: {error.strerror}", help=help) from error
    try:
        compile(source, script, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UsageError("PL110", f"{script}{line}: {getattr(error, 'msg', error)}") from error


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value in (("--threads", args.threads), ("--hang-after", args.hang_after)):
        if value is not None and not value > 0:
            raise UsageError("PL105", f"{name} {value}: a number above 0 is needed")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UsageError("PL105", f"--seed {args.seed}: a number from 0 to 2**63 - 1 is needed")


def _assignments(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError("PL105", f"--set {text}: this is not KEY=VALUE")
        found[name] = value
    return found


def refuse_second_launcher() -> None:
    """``srun -n 4 paceline run -n 2`` would be four worlds of two that know nothing of each other."""
    place = env.place(os.environ)
    if place.size > 1:
        raise UsageError(
            "PL104",
            f"this is already process {place.rank} of {place.size} of {place.launcher}",
            help="start the script itself there, `python train.py`: it joins the others; or use `paceline run` alone.",
        )


def first_line(resolved: Resolved, path: Path, as_json: bool) -> None:
    """Before anything slow. What is not usual about the ranks' environment is said too: it changes how they run."""
    if as_json:
        return
    out, plan = Pipe(sys.stdout), resolved.plan
    strategy = plan.strategy or f"{_DEFAULT} unless the script says otherwise"
    count = f"{plan.processes} process{'es' if plan.processes > 1 else ''}"
    count += f" of {plan.workers_min} to {plan.workers_max}" if plan.elastic else ""
    out.say(f"paceline {__version__} · {plan.script} · {count} · {strategy} · {path}")
    out.say(f"settings: {resolved.settings} (change with --set KEY=VALUE)")


def _record(plan: Plan) -> dict[str, Any]:
    machine = Machine.here()
    return {
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "seed": plan.seed,
        "versions": {"paceline": __version__, "python": sys.version.split()[0]},
        "machine": {"host": socket.gethostname(), "cores": machine.cores, "memory": machine.memory},
        "started": now_text(),
    }


def execute(
    plan: Plan,
    path: Path,
    as_json: bool,
    *,
    hang_after: float | None = None,
    listen: str = "",
    host: Host | None = None,
    explain: bool = False,
) -> int:
    """Start, and say how it ended; the exit code. See ``crew.Order`` for the arguments.

    A rank of the only replica of a split model takes with it what nobody else has. Where checkpoints are made, all begin again from the
    newest one, as often as there is one that is newer than the one before.

    Raises:
        PacelineError: Nothing could be started.
    """
    saved = newest_step(path) if plan.resume == "auto" else 0
    while True:
        outcome = _attempt(plan, path, as_json, hang_after, listen, host, explain, saved)
        if outcome.exit_code != LOST or (newest := again_from(plan, path, saved)) is None:
            return outcome.exit_code
        plan, saved = replace(plan, resume="auto"), newest


def again_from(plan: Plan, path: Path, saved: int) -> int | None:
    """The step from which a run that has lost a rank begins again by itself; None where it does not.

    Args:
        saved: The newest checkpoint when it began.
    """
    if not plan.checkpoint or not plan.strategy or plan.elastic or lay_out(plan.strategy, plan.processes) is None:
        return None
    newest = newest_step(path)
    return newest if newest > saved else None


def newest_step(path: Path) -> int:
    """Of the newest checkpoint of a run; 0 where it has none."""
    found = candidates(path / CHECKPOINTS)
    return max((place[0] for path in found if (place := step_of(path.name))), default=0)


def _attempt(
    plan: Plan,
    path: Path,
    as_json: bool,
    hang_after: float | None,
    listen: str,
    host: Host | None,
    explain: bool,
    saved: int,
) -> Outcome:
    """Make the directory, start, show, and say how it ended."""
    from paceline.launch.console import Console
    from paceline.launch.local import Launcher, Order
    from paceline.launch.signals import ALL

    began = time.monotonic()
    console = Console(plan, path, as_json, explain)
    allow_files(max(plan.processes, plan.workers_max))
    run = RunDirectory.create(path, plan, _record(plan))
    run.complain = lambda text: console.say([text])
    order = Order(plan, bool(plan.strategy), hang_after=hang_after, listen=listen, host=host)
    launcher = Launcher(order, console, run, ALL)
    try:
        outcome = launcher.execute(started=lambda: _after_start(run, console))
    except PacelineError:
        run.update(state="failed", exit_code=2, ended=now_text())
        raise
    except KeyboardInterrupt:  # before the launcher catches signals
        run.update(state="stopped", exit_code=130, ended=now_text())
        raise
    else:
        newest = again_from(plan, path, saved) if outcome.exit_code == LOST else None
        console.conclude(outcome, time.monotonic() - began, newest)
    finally:
        console.close()
    return outcome


def _after_start(run: RunDirectory, console: Console) -> None:
    """What is slow to find out, and to load, while the ranks are starting."""
    import platform
    from importlib.metadata import version

    versions = {"paceline": __version__, "python": platform.python_version(), "torch": version("torch")}
    run.update(versions=versions, platform=platform.platform())
    console.open()
