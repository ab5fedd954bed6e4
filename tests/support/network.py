"""Two pretended machines with a router between them, made of network namespaces; needs root, `ip`, `tc` and `unshare`.

Each machine has a network and a host name of its own, so its processes share no memory with those of the other. The router forwards
packets, or does not: then they vanish, as in a cut cable behind a switch, and nobody is told.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

TOOLS = ("ip", "tc", "unshare", "sh", "hostname")
_SIDES = ("left", "right")


def lacking() -> str:
    """Why there can be no such network here, or nothing. Only a user who is not root may be content with it."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"there is no {missing[0]}" if missing else ""


@dataclass(frozen=True)
class Machine:
    """One of the two.

    Attributes:
        name: Of its namespace, and its host name.
        address: Where the other one reaches it.
    """

    name: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` on this machine; it replaces the processes before it, so the process started is that of `command`."""
        named = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", named, self.name, *command]


@dataclass(frozen=True)
class Network:
    """Two machines, and what lies between them.

    Attributes:
        machines: Both.
        router: Its namespace.
    """

    machines: tuple[Machine, Machine]
    router: str

    def cut(self, *sides: int) -> None:
        """Forward nothing that comes from these machines; from none of them without an argument."""
        for side in sides or (0, 1):
            self._forward(side, False)

    def heal(self) -> None:
        for side in (0, 1):
            self._forward(side, True)

    def limit(self, side: int, rate: str) -> None:
        """Let no more than `rate` (``1mbit``) through to and from this machine."""
        for namespace, device in ((self.router, _SIDES[side]), (self.machines[side].name, "net0")):
            shape = ("tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
            _call("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", device, "root", *shape)

    def unlimit(self, side: int) -> None:
        for namespace, device in ((self.router, _SIDES[side]), (self.machines[side].name, "net0")):
            _call("ip", "netns", "exec", namespace, "tc", "qdisc", "del", "dev", device, "root")

    def _forward(self, side: int, on: bool) -> None:
        file = f"/proc/sys/net/ipv4/conf/{_SIDES[side]}/forwarding"
        _call("ip", "netns", "exec", self.router, "sh", "-c", f"echo {int(on)} > {file}")


@contextmanager
def network() -> Iterator[Network]:
    """Everything is gone afterwards, whatever happened.

    Raises:
        RuntimeError: It cannot be made; the message says why.
    """
    if why := lacking():
        raise RuntimeError(why)
    base = f"paceline-{os.getpid()}"
    router = f"{base}-router"
    machines = tuple(Machine(f"{base}-{side}", f"10.213.{at}.2") for at, side in enumerate(_SIDES, 1))
    made = Network((machines[0], machines[1]), router)
    try:
        _call("ip", "netns", "add", router)
        for side, machine in zip(_SIDES, machines, strict=True):
            _attach(router, side, machine)
        made.heal()
        yield made
    finally:
        for name in (router, *(machine.name for machine in machines)):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _attach(router: str, side: str, machine: Machine) -> None:
    gateway = machine.address.rpartition(".")[0] + ".1"
    _call("ip", "netns", "add", machine.name)
    _call("ip", "link", "add", "net0", "netns", machine.name, "type", "veth", "peer", "name", side, "netns", router)
    for namespace, device, address in ((machine.name, "net0", machine.address), (router, side, gateway)):
        _call("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", device)
        _call("ip", "-n", namespace, "link", "set", "dev", device, "up")
    _call("ip", "-n", machine.name, "link", "set", "dev", "lo", "up")
    _call("ip", "-n", machine.name, "route", "add", "default", "via", gateway)


def _call(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
