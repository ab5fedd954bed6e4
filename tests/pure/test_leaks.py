"""The leak check sees what it claims to see, and the command helper does not wait for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from support.cli import run_python
from support.leaks import SHM, Traces

SLEEP = "import time; time.sleep(60)"


def test_an_orphan_is_seen_and_ended() -> None:
    before = Traces.now()
    subprocess.run(["sh", "-c", "setsid sleep 61 & true"], check=True)
    after = Traces.now()
    (line,) = after.missing_from(before)
    assert line.startswith("process: ")
    assert "sleep 61" in line
    after.clean_up(before)


def test_a_listening_socket_is_named_with_its_address() -> None:
    before = Traces.now()
    with socket.create_server(("127.0.0.1", 0)) as server:
        (line,) = Traces.now().missing_from(before)
        assert str(server.getsockname()[1]) in line
    assert not Traces.now().missing_from(before)


def test_a_thread_is_named() -> None:
    before, done = Traces.now(), threading.Event()
    thread = threading.Thread(target=done.wait, name="a-pump")
    thread.start()
    assert "thread: a-pump" in Traces.now().missing_from(before)
    done.set()
    thread.join()


def test_files_of_ours_are_seen_and_removed() -> None:
    before = Traces.now()
    (SHM / f"paceline-test-{os.getpid()}").touch()
    made = tempfile.mkdtemp(prefix="paceline-")
    after = Traces.now()
    assert len(after.missing_from(before)) == 2
    after.clean_up(before)
    assert not Path(made).exists()
    assert not Traces.now().missing_from(before)


def test_a_command_that_hangs_is_killed_with_its_children_and_shows_stacks(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SLEEP!r}])\n")
    with pytest.raises(AssertionError, match="not finished after 1 s") as caught:
        run_python("stuck.py", cwd=tmp_path, timeout=1)
    assert "most recent call first" in str(caught.value)
    assert not [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
