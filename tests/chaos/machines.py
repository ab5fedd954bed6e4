"""A run on two pretended machines: begun on the left one, joined from the right one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chaos.drill import CASE
from support.disturbed import Disturbed, Wrong, disturbed, prove
from support.network import Network

LEASE = 5.0
"""Seconds without a sign of life after which a member is left out."""

PACE = 0.0005
"""Seconds that a row takes: who starts needs the processor more than who trains."""


@dataclass(frozen=True)
class Both:
    """The two launchers, and their network.

    Attributes:
        left: Began the run; its ledgers are those of both.
        right: Joined it.
        hashed: Where the workers write hashes.
    """

    net: Network
    left: Disturbed
    right: Disturbed
    hashed: Path

    def committed(self, *, right: bool) -> int:
        """The last step that a worker of one machine has committed."""
        self.left.ledgers.read()
        there = [step for name, (step, _) in self.left.ledgers.last.items() if is_right(name) == right]
        return max(there, default=0)

    def trains_on_right(self, seconds: float = 60) -> float:
        """Wait until a worker of the right machine takes part in what is committed."""
        self.left.ledgers.read()
        group = self.left.ledgers.group

        def there() -> bool:
            ledgers = self.left.ledgers
            return ledgers.group > group and any(map(is_right, ledgers.members))

        try:
            return self.left.until(there, seconds, "a worker of the other machine should take part again")
        except Wrong as wrong:
            raise Wrong(f"{wrong}\n-- the other machine\n{self.right.said[-4000:]}") from None

    def end(self) -> int:
        """Ctrl-C on the left machine ends all of it. The proof; steps whose hashes were compared."""
        self.left.end(seconds=60)
        self.right.process.wait(30)
        return self.prove()

    def prove(self) -> int:
        return prove(self.left.directory, self.right.directory, hashed=self.hashed)


def is_right(name: str) -> bool:
    """Whether a worker was started by the launcher that joined: its number is from another block."""
    return int(name.rpartition("-")[2]) >= 100_000


@contextmanager
def on_both(net: Network, home: Path, left: int, right: int, *script: str) -> Iterator[Both]:
    """So many workers on each machine; the block begins when all of them train."""
    begins, joins = net.machines
    a, b, hashed = home / "left", home / "right", home / "hashes"
    limits = ("-n", str(left), "--workers", f"1:{left + right}", "--listen", begins.address)
    told = ("--", "--epochs", "100000", "--pace", str(PACE), "--hashes", str(hashed), *script)
    with disturbed(a, CASE, *limits, *told, wrap=begins.command, ledgers=[b]) as run:
        run.until(lambda: "--address" in run.said and (a / "secret").exists(), 60, "an address should be said")
        secret = ("--address", _address(run), "--secret-file", a / "secret", "-n", str(right))
        with disturbed(b, CASE, *secret, verb="join", wrap=joins.command) as guest:
            run.members(count=left + right)
            yield Both(net, run, guest, hashed)


def _address(run: Disturbed) -> str:
    found = re.search(r"--address (\S+)", run.said)
    if found is None:
        raise Wrong(f"no address was said\n{run.said}")
    return found[1]
