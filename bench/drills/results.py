"""Numbers that go wrong, and numbers that must not: bars 29 and 4."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from chaos.drill import CASE
from drills.work import Work
from support.cli import run_paceline
from support.disturbed import Disturbed, Wrong, disturbed, events, hashes, prove

LOOK_EVERY = 50
"""Steps after which replicas are compared, see ``train.replicas``."""

EXACT = ("--strategy", "ddp(exact=True)")


def numbers(work: Work) -> None:
    """A row that is not a number makes all leave out the same step; a flipped bit is found, named and healed."""
    wanted = 3 if work.quick else 20
    for number in work.repeat(2, 2):
        home = work.directory(number)
        with work.judged(home):
            if number == 0:
                work.all_of(
                    "steps with a NaN that all have left out, with equal parameters", _nan(home, wanted), wanted
                )
            else:
                found, healed = _flips(home, wanted, work.seed)
                work.all_of("flipped bits whose worker was named within 50 steps", found, wanted)
                work.all_of("flipped bits that were healed", healed, wanted)


def _nan(home: Path, wanted: int) -> int:
    """One row is no number, so each epoch has one such step. How many of them all three have left out."""
    script = ("--", "--epochs", str(wanted), "--nan", "700", "--hashes", str(home / "hashes"))
    with disturbed(home / "run", CASE, "-n", "3", "--workers", "1:3", *script) as run:
        run.ended(0, 120)
    prove(home / "run", hashed=home / "hashes")
    skipped = [_skipped(file) for file in (home / "run" / "ledger").glob("*.jsonl")]
    if len(skipped) != 3 or any(steps != skipped[0] for steps in skipped):
        raise Wrong(f"ranks left out different steps: {skipped}")
    return len(skipped[0])


def _skipped(ledger: Path) -> list[int]:
    lines = [json.loads(raw) for raw in ledger.read_bytes().split(b"\n")[:-1]]
    return [line["s"] for line in lines if line.get("skip")]


def _flips(home: Path, wanted: int, seed: int) -> tuple[int, int]:
    """One bit of one of three is flipped every 75 steps. How many were named within 50 steps, and how many were healed."""
    every = LOOK_EVERY * 3 // 2
    epochs = every * (wanted + 1) // 15
    script = ("--epochs", str(epochs), "--flip-every", str(every), "--flip-seed", str(seed))
    with disturbed(
        home / "run", CASE, "-n", "3", "--workers", "1:3", "--", *script, "--hashes", str(home / "hashes")
    ) as run:
        run.ended(0, 180)
    prove(home / "run")
    notices = [event for event in events(home / "run", "notice") if event.get("code") == "PL441"]
    flipped = [tuple(map(int, line.split())) for file in (home / "hashes").glob("flips-*") for line in _lines(file)]
    named = healed = 0
    after = hashes(home / "hashes")
    for step, rank in sorted(flipped)[:wanted]:
        named += any(0 <= n["step"] - step <= LOOK_EVERY and f"rank {rank}" in n["message"] for n in notices)
        healed += len(after.get(step + LOOK_EVERY + 1, ())) == 1
    return named, healed


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def exact(work: Work) -> None:
    """Exact sums: the last parameters of a run with losses and joins are those of undisturbed runs of four and of one, bit for bit."""
    wanted, equal, seeds = (1 if work.quick else 10), 0, 0
    for number in work.repeat(wanted, wanted):
        home = work.directory(number)
        seeds += 1
        with work.judged(home):
            steps = ("--", "--epochs", "20" if work.quick else "60", "--seed", str(work.seed + number))
            found = {size: _undisturbed(home, size, *steps) for size in (4, 1)}
            found[0] = _disturbed(home, work, *steps, "--pace", "0.001")
            if len(set(found.values())) > 1:
                raise Wrong(f"hashes of 4 workers, of 1, and of the run with faults: {found}")
            equal += 1
    work.all_of("seeds whose final hash is that of undisturbed runs of 4 and of 1", equal, seeds)


def _undisturbed(home: Path, size: int, *arguments: str) -> str:
    with disturbed(home / f"n{size}", CASE, "-n", str(size), *EXACT, *arguments) as run:
        run.ended(0, 180)
    return _hash(home / f"n{size}")


def _disturbed(home: Path, work: Work, *arguments: str) -> str:
    """Five faults, of 1 to 5 workers."""
    with disturbed(home / "faults", CASE, "-n", "3", "--workers", "1:5", *EXACT, *arguments) as run:
        run.members(count=3)
        for _ in range(2 if work.quick else 5):
            run.steps(work.draw.randrange(5, 40))
            _fault(run, work)
        run.ended(0, 240)
    prove(home / "faults")
    return _hash(home / "faults")


def _fault(run: Disturbed, work: Work) -> None:
    members = sorted(run.workers().keys() & set(run.ledgers.members))
    if len(members) > 1 and work.draw.random() < 0.6:
        group = run.ledgers.group
        os.kill(run.workers()[work.draw.choice(members)], signal.SIGKILL)
        run.until(lambda: run.ledgers.group > group, 60, "the others should go on")
    elif len(run.workers()) < 5:
        run_paceline("join", run.directory, cwd=run.directory.parent)


def _hash(directory: Path) -> str:
    done = run_paceline("hash", directory, cwd=directory.parent)
    if done.returncode:
        raise Wrong(f"paceline hash {directory}: {done.stdout}{done.stderr}")
    return done.stdout.split()[0]
