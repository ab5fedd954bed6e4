"""Parameter servers: a push and a pull against Ray and against gloo, and what four asynchronous workers keep of their speed.

    python bench/ps_bench.py [--quick] [--rounds 5] [--mb 1 16 100] [--peer gloo ray] [--no-crowd] [--crowd-rows 4]

1. One worker, one host: seconds of an ``opt.step()`` that sends gradients of 1, 16 and 100 MiB to one or to two servers, which step
   torch's SGD, and brings the parameters back. A Ray actor and a pair of gloo processes do the same in turn with it. All have one
   thread a process. The servers' CPU time for each MiB is measured too.
2. Four workers of ``ps(staleness=inf)`` and four processes that know nothing of each other train the same GPT, with the same batch
   for each step of each; what counts are the samples per second of all four.

Ray is not among the dependencies: ``pip install ray`` in this environment; without it its rows say so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from launchers import end, execute
from paceline.launch import tuning
from report import Bar, machine, median, show, write
from turns import Others, Result, counting, quiet, take_turns

HERE = Path(__file__).parent
ONE_SERVER, TWO_SERVERS = "paceline, 1 server", "paceline, 2 servers"
STRATEGIES = {ONE_SERVER: "ps()", TWO_SERVERS: "ps(servers=2)"}
BARS = {"ray": 5.0, "gloo": 2.0}
CROWD, CROWD_BAR, SHORTEST_STEP = 4, 0.9, 0.05
STEPS = {1: 200, 16: 60, 100: 20}  # the clock of CPU time ticks a hundred times a second
CLI = (sys.executable, "-m", "paceline.launch.cli", "run")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--mb", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--peer", nargs="*", choices=BARS, default=list(BARS), help="against whom")
    parser.add_argument("--crowd", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--crowd-rows", type=int, default=4, help="rows of a step of one of the four workers")
    args = parser.parse_args(argv)
    rounds = args.rounds or (2 if args.quick else 5)
    here = machine()
    rows: list[Result] = []
    bars: list[Bar] = []
    for mb in args.mb:
        _pushes(mb, args.peer, rounds, rows, bars)
        write("ps", here, rows, bars)  # each time: whoever ends it early keeps what was measured
    if args.crowd:
        _crowd(rounds, args.crowd_rows, rows, bars)
    columns = ("what", "peer", "value", "ratio", "server CPU ms/MiB", "quiet runs", "note")
    show("Parameter servers", rows, columns, bars, write("ps", here, rows, bars))
    return 0


# ---- pushes ---------------------------------------------------------------------------------------------------------
def _pushes(mb: int, against: Sequence[str], rounds: int, rows: list[Result], bars: list[Bar]) -> None:
    what = f"ms for a push and a pull of {mb} MiB"
    missing = [peer for peer in against if importlib.util.find_spec({"gloo": "torch"}.get(peer, peer)) is None]
    peers = [*STRATEGIES, *(peer for peer in against if peer not in missing)]
    measured = take_turns(rounds, *(partial(_push, peer, mb) for peer in peers))
    chosen = dict(zip(peers, counting(*measured), strict=True))
    times = {peer: median([r["step"] for r in runs]) for peer, runs in chosen.items()}
    for peer, results in zip(peers, measured, strict=True):
        cpu = median([r["server_cpu"] for r in chosen[peer]]) / mb
        row = {"what": what, "peer": peer, "value": 1e3 * times[peer], "ratio": times[peer] / times[ONE_SERVER]}
        row |= {"server CPU ms/MiB": 1e3 * cpu, "quiet runs": f"{len(quiet(results))} of {len(results)}"}
        rows.append({**row, "repetitions": results})
    rows += [{"what": what, "peer": peer, "note": "not installed here"} for peer in missing]
    bars += [
        Bar(f"{mb} MiB, {ours} against {peer}", BARS[peer], times[peer] / times[ours])
        for peer in peers[len(STRATEGIES) :]
        for ours in STRATEGIES
    ]


def _push(peer: str, mb: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        out = Path(name) / "result.json"
        program = str(HERE / "push_peer.py")
        told = ["--mb", str(mb), "--steps", str(STEPS.get(mb, 20)), "--out", str(out)]
        command = [sys.executable, program, "--peer", peer, *told]
        if peer in STRATEGIES:
            flags = ["-n", "1", "--threads", "1", "--run-dir", str(Path(name) / "run"), "--strategy", STRATEGIES[peer]]
            command = [*CLI, program, *flags, "--", "--peer", "paceline", *told]
        result = execute(command, _environment(1), out, timeout=300)
    result["step"] = median(result["seconds"])
    unseen = result.get("unseen_cpu", 0.0) / (time.monotonic() - result["started_at"])
    result["others_cores"] = round(max(0.0, result["others_cores"] - unseen), 2)
    print(
        f"{mb} MiB {peer}: {1e3 * result['step']:.2f} ms, others used {result['others_cores']} cores", file=sys.stderr
    )
    return result


def _environment(processes: int) -> dict[str, str]:
    """One thread each, and the other settings that our launcher would give; the same for all peers."""
    ours = dict(tuning.choose(tuning.Machine.here(), processes, {}, threads=1).given)
    return {**os.environ, **ours, "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "lo"}


# ---- a crowd --------------------------------------------------------------------------------------------------------
def _crowd(rounds: int, batch: int, rows: list[Result], bars: list[Bar]) -> None:
    turns = {"uncoordinated processes": _alone, "ps(staleness=inf)": _served}
    measured = take_turns(rounds, *(partial(turn, str(batch)) for turn in turns.values()))
    speeds = [median([r["samples_per_second"] for r in runs]) for runs in counting(*measured)]
    for peer, results, speed in zip(turns, measured, speeds, strict=True):
        row = {
            "what": f"gpt10m, {CROWD} workers, {batch} rows a step: samples per second",
            "peer": peer,
            "value": speed,
        }
        row |= {"ratio": speed / speeds[0], "quiet runs": f"{len(quiet(results))} of {len(results)}"}
        step = median([r["step_seconds"] for r in results])
        short = f", less than the {1e3 * SHORTEST_STEP:g} ms meant" if step < SHORTEST_STEP else ""
        rows.append({**row, "note": f"{1e3 * step:.0f} ms a step{short}", "repetitions": results})
    bars.append(
        Bar(f"gpt10m, {CROWD} workers: ps(staleness=inf) against processes alone", CROWD_BAR, speeds[1] / speeds[0])
    )


def _served(batch: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        out = Path(name) / "result.json"
        flags = ["-n", str(CROWD), "--threads", "1", "--run-dir", str(Path(name) / "run")]
        told = ["--peer", "paceline", "--workers", str(CROWD), "--rows", batch, "--out", str(out)]
        command = [*CLI, str(HERE / "crowd_peer.py"), *flags, "--strategy", "ps(staleness=inf)", "--", *told]
        return _said(execute(command, _environment(CROWD), out, timeout=400))


def _alone(batch: str) -> Result:
    """All begin to count at the same moment."""
    others = Others()
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        outs = [Path(name) / f"{number}.json" for number in range(CROWD)]
        program = [sys.executable, str(HERE / "crowd_peer.py"), "--peer", "plain", "--rows", batch, "--out"]
        crowd = []
        for out in outs:
            process = subprocess.Popen(
                [*program, str(out)],
                env=_environment(CROWD),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(end, process)
            crowd.append(process)
        for process in crowd:
            assert process.stdout is not None
            process.stdout.readline()
        for process in crowd:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in crowd:
            process.wait(timeout=400)
        found = [json.loads(out.read_text()) for out in outs]
    speed = sum(each["samples_per_second"] for each in found)
    step = median([each["step_seconds"] for each in found])
    return _said({"samples_per_second": speed, "step_seconds": step, "others_cores": others.cores()})


def _said(result: Result) -> Result:
    print(f"crowd: {result['samples_per_second']:.1f}/s, others used {result['others_cores']} cores", file=sys.stderr)
    return result


if __name__ == "__main__":
    sys.exit(main())
