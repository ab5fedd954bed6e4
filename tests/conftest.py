"""Every test leaves the machine as it found it: that is checked after each, and the failure names what is left."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `from support...`, here and in the processes that tests start

from support import cli
from support.breadth import LONG
from support.leaks import Traces

GRACE = 5.0  # seconds that processes and threads get to finish what they have begun
PR_SET_CHILD_SUBREAPER = 36


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=250, help="seeds of each simulated test; `make soak` takes more")


def pytest_configure(config: pytest.Config) -> None:
    """Our own temporary directory, orphans that come to us, no core files, stacks on SIGUSR1, threads that wait asleep.

    Under nohup hang-ups are ignored, by whatever a test starts too, which would then rightly not end.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and of a background job interrupts are
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="pl-")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads otherwise spin against other processes
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long belongs to `make soak`."""
    if not os.environ.get(LONG):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ.pop("TMPDIR"), ignore_errors=True)
    tempfile.tempdir = None


@pytest.fixture
def run_paceline() -> Callable[..., object]:
    """``run_paceline("run", script, "-n", "2", cwd=tmp_path, timeout=60) -> CompletedProcess``."""
    return cli.run_paceline


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = Traces.now()
    yield
    leaked = Traces.now().missing_from(before)
    deadline = time.monotonic() + GRACE
    while leaked and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
        leaked = Traces.now().missing_from(before)
    if leaked:
        Traces.now().clean_up(before)
        pytest.fail("left behind:\n  " + "\n  ".join(leaked), pytrace=False)
