"""The process that writes checkpoints, killed at every system call that matters, and disks that refuse.

``strace`` injects the faults: it kills the writer at the n-th call, lets calls fail, or makes them slow. Nothing of ours is replaced.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.terms.errors import AdoptError
from paceline.terms.event import Event
from paceline.train.checkpoint import Checkpointer, Plan
from paceline.train.checkpoint_files import Checkpoint, Policy, newest_valid
from paceline.train.state import hash_tensors
from support.checkpoints import small

CALLS = "write,fsync,rename,mkdir,unlink,unlinkat,rmdir,fallocate,ftruncate"
WRITER = [sys.executable, "-m", "paceline.train.checkpoint_writer"]
STRACE = shutil.which("strace")

needs_strace = pytest.mark.skipif(STRACE is None, reason="strace injects the faults")


def tree(step: int, numel: int = 64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(step)
    model = {"weight": torch.randn(numel, generator=g), "bias": torch.randn(3, generator=g)}
    return {"models": {"model": {"state": model, "more": {}}}, "loop": {"steps": step}}


def hash_of(step: int, numel: int = 64) -> str:
    return hash_tensors(tree(step, numel)["models"]["model"]["state"])


class Order:
    """One save as the training process orders it, with a writer of its own."""

    def __init__(self, directory: Path, step: int, *, before: list[str] | None = None, right: tuple[int, int] = (0, 0)):
        plan = Plan.make(tree(step), step, right[-1])
        self.memory_fd = os.memfd_create("test")
        os.ftruncate(self.memory_fd, plan.nbytes)
        import mmap

        plan.copy(mmap.mmap(self.memory_fd, plan.nbytes))
        self._said = {"do": "write", "number": 1, "directory": str(directory), "keep": 2, "right": right}
        self._said |= {"at": plan.at, "bytes": len(plan.text)}
        self.process = subprocess.Popen(
            [*(before or []), *WRITER, str(self.memory_fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(self.memory_fd,),
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            bufsize=0,
        )

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
        except BrokenPipeError:
            pass

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer; nothing when the writer is gone."""
        self.tell(**command)
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 30)[0]
        line = self.process.stdout.readline()
        return json.loads(line) if line else {}

    def write(self) -> dict[str, Any]:
        return self.ask(**self._said)

    def save(self) -> dict[str, Any]:
        """Write and publish."""
        return self.ask(do="publish", number=1) if self.write().get("said") == "written" else {}

    def end(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self.process.wait(30)
        os.close(self.memory_fd)


def save(directory: Path, step: int, **how: Any) -> dict[str, Any]:
    order = Order(directory, step, **how)
    try:
        return order.save()
    finally:
        order.end()


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(("tmp-", "trash-"))]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("step-*"))


# ---- the writer -----------------------------------------------------------------------------------------------------
def test_it_imports_no_torch() -> None:
    code = "import sys, paceline.train.checkpoint_writer; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_writes_publishes_and_keeps_as_many_as_it_should(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        assert save(tmp_path, step)["said"] == "published"
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert json.loads((tmp_path / "LATEST").read_bytes())["name"] == "step-00000003"
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("said", [b"", b'{"do": "end"}\n'])
def test_what_is_not_published_disappears_with_the_training_process(said: bytes, tmp_path: Path) -> None:
    order = Order(tmp_path, 1)
    assert order.write()["said"] == "written"
    assert leftovers(tmp_path)
    assert order.process.stdin is not None
    order.process.stdin.write(said)
    if not said:
        order.process.stdin.close()
    assert order.process.wait(30) == 0
    assert not leftovers(tmp_path)
    assert not names(tmp_path)
    order.end()


def test_an_older_right_publishes_nothing(tmp_path: Path) -> None:
    """Who was frozen while the others went on finds that it has been replaced."""
    old, new = Order(tmp_path, 3, right=(0, 3)), Order(tmp_path, 4, right=(0, 5))
    try:
        assert old.write()["said"] == "written"
        assert new.save()["said"] == "published"
        answer = old.ask(do="publish", number=1)
        assert answer["said"] == "failed"
        assert names(tmp_path) == ["step-00000004"]
    finally:
        old.end()
        new.end()
    assert save(tmp_path, 2, right=(1, 0))["said"] == "published"


def test_the_same_step_again_gets_another_name(tmp_path: Path) -> None:
    save(tmp_path, 5)
    assert Path(save(tmp_path, 5)["path"]).name == "step-00000005.1"


# ---- killed ---------------------------------------------------------------------------------------------------------
def counted(tmp_path: Path) -> int:
    """How many calls of those that matter one save makes."""
    directory, log = tmp_path / "counted", tmp_path / "strace.log"
    small(directory, 1)
    small(directory, 2)
    assert STRACE is not None
    save(directory, 3, before=[STRACE, "-f", "-qq", "-o", str(log), "-e", f"trace={CALLS}"])
    return sum(1 for line in log.read_text().splitlines() if re.match(r"\d+ +\w+\(", line))


@needs_strace
@pytest.mark.timeout(600)
def test_killed_at_any_call_the_old_or_the_new_one_is_whole(tmp_path: Path) -> None:
    count = counted(tmp_path)
    assert count >= 20
    outcomes = set()
    assert STRACE is not None
    for point in range(1, count + 1):
        directory = tmp_path / f"at-{point}"
        small(directory, 1)
        kept = small(directory, 2)
        with Checkpoint.open(kept) as old:
            expected = {2: old.hash(), 3: hash_of(3)}
        inject = f"inject={CALLS}:signal=KILL:when={point}"
        save(directory, 3, before=[STRACE, "-f", "-qq", "-o", "/dev/null", "-e", f"trace={CALLS}", "-e", inject])
        found = newest_valid(directory, lambda error: None)
        assert found is not None, f"killed at call {point}"
        with found:
            assert found.hash() == expected[found.step], f"killed at call {point}"
            outcomes.add(found.step)
        assert save(directory, 4)["said"] == "published", f"killed at call {point}"
        assert not leftovers(directory), f"killed at call {point}"
        assert len(names(directory)) >= 2
        shutil.rmtree(directory)
    assert outcomes == {2, 3}


# ---- a disk that refuses --------------------------------------------------------------------------------------------
class Training:
    """A loop that does nothing but save."""

    def __init__(self, directory: Path, policy: str, numel: int = 1 << 16) -> None:
        self.events: list[Event] = []
        self.step, self.directory, self._numel = 0, directory, numel
        policies = Policy.parse(policy)
        self.checkpointer = Checkpointer(policies, directory, self._capture, lambda: (0, 0), self.events.append)

    def _capture(self) -> dict[str, Any]:
        return tree(self.step, self._numel)

    def steps(self, count: int = 1) -> None:
        for _ in range(count):
            self.checkpointer.at_boundary(self.step, True)
            self.step += 1

    def until(self, kind: str, count: int = 1) -> Event:
        """Go on until there was another event of this kind."""
        known, deadline = len(self.of(kind)), time.monotonic() + 30
        while len(self.of(kind)) < known + count:
            assert time.monotonic() < deadline, self.events
            self.steps()
            self.checkpointer._listen(0.02)
        return self.of(kind)[-1]

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    @property
    def pid(self) -> int:
        assert self.checkpointer._writer is not None
        return self.checkpointer._writer._process.pid

    def whole(self) -> None:
        """The newest checkpoint is true, and nothing is left of others once the last one is written."""
        self.checkpointer._publish()
        self.checkpointer._wait(30)
        found = newest_valid(self.directory, lambda error: None)
        assert found is not None
        with found:
            assert found.hash() == hash_of(found.step, self._numel)
        assert not leftovers(self.directory)


@contextmanager
def training(directory: Path, policy: str, **how: Any) -> Iterator[Training]:
    made = Training(directory, policy, **how)
    try:
        yield made
    finally:
        made.checkpointer.stand_down()


@contextmanager
def injected(pid: int, fault: str) -> Iterator[None]:
    """Calls of the process fail, or take long, as strace has it."""
    assert STRACE is not None
    command = [STRACE, "-f", "-p", str(pid), "-o", "/dev/null", "-e", f"inject={fault}"]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(30)
        assert tracer.stderr is not None
        tracer.stderr.close()


FAULTS = {
    "fsync: EIO": ("fsync:error=EIO", "Input/output error"),
    "write: ENOSPC": ("write:error=ENOSPC:when=2", "No space left on device"),
    "fallocate: ENOSPC": ("fallocate:error=ENOSPC", "No space left on device"),
    "mkdir: EROFS": ("mkdir:error=EROFS", "Read-only file system"),
    "rename: EIO": ("rename:error=EIO", "Input/output error"),
    "read back: EIO": ("pread64:error=EIO", "Input/output error"),
}


@needs_strace
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_training_goes_on_and_the_old_one_stays(fault: str, tmp_path: Path) -> None:
    inject, told = FAULTS[fault]
    with training(tmp_path, "every=2,busy=wait") as loop:
        loop.until("save", 3)
        before = len(loop.of("save"))
        with injected(loop.pid, inject):
            notice = loop.until("notice")
            assert notice.data["code"] == "PL611"
            assert told in notice.data["message"]
            assert "training goes on" in notice.data["message"]
        assert len(loop.of("save")) - before <= 1
        assert names(tmp_path)
        loop.until("save", 2)
        loop.whole()


@needs_strace
def test_a_slow_disk_does_not_stop_training(tmp_path: Path) -> None:
    with training(tmp_path, "every=3") as loop:
        loop.until("save")
        with injected(loop.pid, "fsync:delay_enter=1000000:when=1+"):
            longest, deadline = 0.0, time.monotonic() + 20
            while not loop.of("notice") and time.monotonic() < deadline:
                began = time.monotonic()
                loop.steps()
                longest = max(longest, time.monotonic() - began)
                time.sleep(0.01)  # what a step takes
            assert "still being written" in loop.of("notice")[0].data["message"]
            assert longest < 0.5
        loop.until("save")
        loop.whole()


def test_a_killed_writer_is_replaced(tmp_path: Path) -> None:
    with training(tmp_path, "every=1,busy=wait") as loop:
        loop.until("save")
        os.kill(loop.pid, signal.SIGKILL)
        assert "has ended" in loop.until("notice").data["message"]
        loop.until("save", 2)
        loop.whole()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(directory)]
    if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk(tmpfs: Path) -> None:
    """Nothing of the new one is left, the old one is valid, an alert comes, and when there is space again it succeeds by itself."""
    with training(tmpfs / "checkpoints", "every=2,busy=wait,keep=1", numel=1 << 20) as loop:
        loop.until("save", 2)
        with (tmpfs / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, 30 << 20)
        notice = loop.until("notice")
        assert "No space left" in notice.data["message"]
        loop.whole()
        step = loop.of("save")[-1].step
        (tmpfs / "ballast").unlink()
        assert loop.until("save").step > step
        loop.whole()


# ---- when, and the end ----------------------------------------------------------------------------------------------
def test_nothing_is_published_before_the_next_step(tmp_path: Path) -> None:
    with training(tmp_path, "every=5,busy=wait") as loop:
        loop.steps(6)
        deadline = time.monotonic() + 30
        while not (loop.checkpointer._flight and loop.checkpointer._flight.written):
            assert time.monotonic() < deadline
            loop.checkpointer._listen(0.05)
        assert not names(tmp_path)
        assert leftovers(tmp_path)
        loop.steps()
        assert loop.until("save").step == 5


def test_a_step_that_is_undone_is_not_published(tmp_path: Path) -> None:
    with training(tmp_path, "every=5,busy=wait") as loop:
        loop.steps(6)
        loop.checkpointer.at_boundary(5, False)  # another rank leads now
    assert not names(tmp_path)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(("whole", "saved"), [(True, [7]), (False, [])])
def test_the_last_one(whole: bool, saved: list[int], tmp_path: Path) -> None:
    with training(tmp_path, "every=1000") as loop:
        loop.steps(7)
        loop.checkpointer.finish(7, True, whole)
        assert [event.step for event in loop.of("save")] == saved
        assert not leftovers(tmp_path) if tmp_path.exists() else True


def test_a_state_that_grows_is_saved_all_the_same(tmp_path: Path) -> None:
    with training(tmp_path, "every=1,busy=wait") as loop:
        loop.until("save")
        loop._numel = 4 << 20
        loop.until("save", 2)
        loop.whole()


def test_by_the_clock(tmp_path: Path) -> None:
    with training(tmp_path, "every=1s") as loop:
        began = time.monotonic()
        loop.until("save", 2)
        assert time.monotonic() - began >= 2.0


def test_what_cannot_be_saved_ends_the_run_at_once_or_not_at_all(tmp_path: Path) -> None:
    with training(tmp_path, "every=1,busy=wait") as loop:
        whole = loop.checkpointer._capture
        loop.checkpointer._capture = lambda: {"kept": {"odd": {1, 2}}}
        with pytest.raises(AdoptError, match=r"kept/odd is a builtins\.set"):
            loop.steps(2)
        loop.checkpointer._capture = whole
        loop.until("save")
        loop.checkpointer._capture = lambda: {"kept": {"odd": {1, 2}}}
        assert loop.until("notice").data["code"] == "PL612"
        loop.checkpointer._capture = whole
        loop.until("save")
        loop.whole()
