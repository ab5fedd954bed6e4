"""Words that one rank writes and all ranks of a host read, and the bell that wakes whoever sleeps for them.

Every rank has a control page in the arena. One word of it says whom this rank sleeps for. A rank that publishes a word
looks through the control pages and wakes who sleeps for it; a rank that wants to sleep announces it, looks once more at
what it waits for, and then sleeps on its own word, with a timeout. See Note [sleep] in kernel.c.

Two bells ring alike: :class:`Bell` in Python, :class:`KernelBell` in C.

Note [order of stores]: the protocol needs that who sees a word also sees what was stored before it. x86 keeps stores and
loads in order; other processors do it only when told, which Python cannot. There the C kernel is required.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
import time

from paceline.group.arena import PAGE, Span
from paceline.group.kernel import Kernel, WireStruct
from paceline.terms.errors import WireError

ANYBODY, RANK = 1, 2  # sleep words: for anybody, for rank `word - RANK`
SLICE_S = 0.02  # the longest sleep: then the waiting rank looks whether its peers are alive
_SLEEP = 8  # the word of a control page, counted in 64-bit words; its low half is the futex
_FUTEX = {"x86_64": 202, "AMD64": 202, "aarch64": 98}
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_BLINK_S = 0.0001  # where there is no futex: how long between two looks

IN_ORDER = platform.machine() in ("x86_64", "AMD64", "i686", "i386")
"""True where Python's own loads and stores of words can be relied on. See Note [order of stores]."""


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Bell:
    """The bell in Python.

    Args:
        control: The control pages of all ranks, `PAGE` bytes each.
        rank, size: Position among the ranks.

    Raises:
        WireError: The processor reorders stores (PL206).
    """

    def __init__(self, control: Span, rank: int, size: int) -> None:
        if not IN_ORDER and type(self) is Bell:
            raise WireError(
                "PL206",
                f"shared memory without the C kernel needs a processor that keeps stores in order; this is {platform.machine()}",
                help="install a C compiler (gcc or clang), or use `--wire torch`.",
            )
        self.rank, self.size = rank, size
        self._control = control
        self._lock = threading.Lock()
        self._others = tuple(r for r in range(size) if r != rank)
        self._number = _FUTEX.get(platform.machine()) if sys.platform == "linux" else None
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall if self._number else None

    def load(self, span: Span, at: int) -> int:
        """Word number `at` of `span`; what its writer stored before it is seen too."""
        return span.words[at]

    def publish(self, span: Span, at: int, value: int) -> None:
        """Store a word, then wake who sleeps for this rank."""
        span.words[at] = value
        self.ring()

    def ring(self) -> None:
        """Wake who sleeps for this rank."""
        self._fence()
        words = self._control.words
        for other in self._others:
            at = other * PAGE // 8 + _SLEEP
            if words[at] in (ANYBODY, RANK + self.rank):
                words[at] = 0
                self._futex(at, _FUTEX_WAKE, 1, None)

    def arm(self, for_whom: int) -> None:
        """Announce sleep, or with 0 its end. What is waited for must be looked at once more before :meth:`doze`."""
        self._control.words[self.rank * PAGE // 8 + _SLEEP] = for_whom
        self._fence()

    def doze(self, for_whom: int, seconds: float) -> None:
        """Sleep until woken, for `seconds` at most; then the sleep is over."""
        at = self.rank * PAGE // 8 + _SLEEP
        limit = _Time(int(seconds), int(seconds % 1 * 1e9))
        self._futex(at, _FUTEX_WAIT, for_whom, ctypes.byref(limit))
        self._control.words[at] = 0

    def _fence(self) -> None:
        """Let no later load overtake an earlier store, which even x86 permits: taking a lock is an atomic instruction."""
        with self._lock:
            pass

    def _futex(self, at: int, operation: int, value: int, limit: object) -> None:
        if self._syscall is not None:
            self._syscall(
                self._number, ctypes.c_void_p(self._control.address + 8 * at), operation, value, limit, None, 0
            )
        elif operation == _FUTEX_WAIT:
            time.sleep(_BLINK_S)


class KernelBell(Bell):
    """The bell in C: for every processor."""

    def __init__(self, control: Span, rank: int, size: int, kernel: Kernel, wire: WireStruct) -> None:
        super().__init__(control, rank, size)
        self._kernel, self._wire = kernel, ctypes.addressof(wire)

    def load(self, span: Span, at: int) -> int:
        return span.words[at] if IN_ORDER else self._kernel.load(span.address + 8 * at)

    def publish(self, span: Span, at: int, value: int) -> None:
        self._kernel.publish(self._wire, span.address + 8 * at, value)

    def ring(self) -> None:
        self._kernel.ring(self._wire)

    def arm(self, for_whom: int) -> None:
        self._kernel.arm(self._wire, for_whom)

    def doze(self, for_whom: int, seconds: float) -> None:
        self._kernel.doze(self._wire, for_whom, int(seconds * 1e9))
