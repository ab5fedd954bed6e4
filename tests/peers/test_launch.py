"""The launcher with real processes. Scripts that need no torch, except where the loop itself is the subject (``test_run``)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from paceline.launch.rundir import start_ticks
from support.background import PATIENCE, running
from support.cli import CLI, run_paceline, show

RANK = "from paceline.launch.session import current; place = current().place; rank = place.rank\n"


def write(folder: Path, text: str, name: str = "script.py") -> str:
    (folder / name).write_text(text)
    return name


def read(path: Path) -> object:
    return json.loads(path.read_text())


def gone(pids: list[int]) -> bool:
    """None of the processes lives any more, at the latest after some seconds. A zombie does not live."""
    deadline = time.monotonic() + 5
    while any(start_ticks(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=0.05)
    return True


# ---- a run that ends well -------------------------------------------------------------------------------------------
@pytest.mark.smoke
def test_a_script_runs_as_under_plain_python(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", "answer = 42\n", "neighbour.py")
    script = write(
        tmp_path / "deep",
        "import os, sys, neighbour\n"
        "print(__name__, sys.argv, __file__, os.getcwd(), neighbour.answer, __spec__, sys.stdin.read() == '')\n",
    )
    done = run_paceline("run", f"deep/{script}", "--name", "first", "--", "--lr", "0.1", "-n", "7", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    expected = ["deep/script.py", "--lr", "0.1", "-n", "7"]
    assert f"__main__ {expected} {tmp_path}/deep/script.py {tmp_path} 42 None True\n" in done.stdout
    run = tmp_path / "runs" / "first"
    record = read(run / "run.json")
    assert isinstance(record, dict)
    assert (record["state"], record["exit_code"], record["plan"]["processes"]) == ("finished", 0, 1)
    assert record["versions"]["torch"]
    assert read(run / "processes.json") == []
    assert read(run / "endpoints.json") == []
    assert (run / "logs" / "worker-0.log").read_text().startswith("__main__")
    start = json.loads((run / "events" / "worker-0.jsonl").read_text().splitlines()[0])
    assert (start["kind"], start["name"]) == ("start", "worker-0")


def test_ranks_get_their_place_and_no_child_of_theirs_does(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        RANK + "import os, subprocess, sys\n"
        "assert 'PACELINE_PLACE' not in os.environ\n"
        "assert os.environ['FLAVOUR'] == 'mint' and os.environ['OMP_NUM_THREADS'] == '3', os.environ\n"
        "child = 'from paceline.launch.session import current; print(current().place.plain)'\n"
        "inside = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True).stdout.strip()\n"
        "maps = open(f'/proc/{os.getppid()}/maps').read()\n"
        "print(f'place {rank} of {place.size}, child {inside}, launcher with torch: {\"libtorch\" in maps}')\n",
    )
    done = run_paceline("run", script, "-n", "2", "--threads", "3", "--set", "FLAVOUR=mint", cwd=tmp_path)
    assert "[0] place 0 of 2, child True, launcher with torch: False" in done.stdout, show(done)
    assert "[1] place 1 of 2, child True, launcher with torch: False" in done.stdout


def test_equal_lines_are_folded_and_the_logs_keep_all(tmp_path: Path) -> None:
    together = (
        "from pathlib import Path\n"
        "Path(f'here.{rank}').touch()\n"
        "while len(list(Path('.').glob('here.[0-2]'))) < 3: pass\n"  # lines are folded that come at the same time
    )
    script = write(tmp_path, RANK + together + "print('all of us'); print('only', rank)\n")
    done = run_paceline("run", script, "-n", "3", "--run-dir", "here", cwd=tmp_path)
    assert "[0-2] all of us\n" in done.stdout, show(done)
    assert "[1] only 1\n" in done.stdout
    logs = run_paceline("logs", "here", cwd=tmp_path)
    assert logs.stdout == "".join(f"[{r}] all of us\n[{r}] only {r}\n" for r in range(3))
    last = run_paceline("logs", "here", "--rank", "2", "--tail", "1", "--format", "json", cwd=tmp_path)
    assert json.loads(last.stdout) == {"rank": 2, "line": "only 2"}


def test_json_is_one_object_a_line(tmp_path: Path) -> None:
    script = write(tmp_path, "print('hello')\n")
    done = run_paceline("run", script, "--format", "json", cwd=tmp_path)
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"kind": "line", "label": None, "stream": "stdout", "text": "hello"} in objects, show(done)
    assert (objects[-1]["kind"], objects[-1]["state"], objects[-1]["exit_code"]) == ("summary", "finished", 0)


def test_a_plan_runs_again(tmp_path: Path) -> None:
    script = write(tmp_path, "import os, sys, random; print(sys.argv[1:], os.environ['FLAVOUR'], random.random())\n")
    first = run_paceline(
        "run", script, "--seed", "5", "--set", "FLAVOUR=a b", "--name", "one", "--", "x y", 'q"', cwd=tmp_path
    )
    line = next(line for line in first.stdout.splitlines() if line.startswith("['x y', 'q\"'] a b"))
    again = run_paceline("run", "--plan", "runs/one/plan.toml", "--name", "two", cwd=tmp_path)
    assert line in again.stdout.splitlines(), show(again)
    one, two = (read(tmp_path / "runs" / name / "run.json") for name in ("one", "two"))
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    assert one["plan"] == two["plan"]


def test_main_can_be_pickled_for_children_that_are_spawned(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import multiprocessing\n"
        "def double(x): return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(double, [21]))\n",
    )
    done = run_paceline("run", script, cwd=tmp_path)
    assert "[42]\n" in done.stdout, show(done)


def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "full"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "worker-0.log").symlink_to("/dev/full")
    (run / "events" / "worker-0.jsonl").mkdir(parents=True)  # cannot be opened as a file
    script = write(tmp_path, "for i in range(50): print('line', i)\n")
    done = run_paceline("run", script, "--run-dir", "full", cwd=tmp_path)
    assert done.returncode == 0, show(done)
    assert "line 49\n" in done.stdout
    told = done.stdout + done.stderr
    assert told.count("cannot be written any more (No space left on device)") == 1
    assert told.count("the events of worker-0 cannot be written") == 1


def test_last_words_are_not_lost_however_long(tmp_path: Path) -> None:
    """A pipe that was full when the rank ended is read to its end, also where a line is longer than one read."""
    script = write(tmp_path, "import os, sys\nsys.stdout.write('x' * 300_000 + ' the end')\n")
    done = run_paceline("run", script, cwd=tmp_path)
    assert "x the end\n" in done.stdout


# ---- a run that fails -----------------------------------------------------------------------------------------------
def test_an_exception_is_the_cause_and_stands_last(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        RANK + "import signal\ndef divide(x):\n    return 1 / x\nif rank == 1: divide(0)\nsignal.pause()\n",
    )
    done = run_paceline("run", script, "-n", "3", "--run-dir", "r", cwd=tmp_path)
    assert done.returncode == 1, show(done)
    assert "error[PL503] on rank 1: ZeroDivisionError: division by zero" in done.stderr
    assert "script.py:4 in divide\n      return 1 / x" in done.stderr
    assert done.stderr.rstrip().endswith("more: paceline explain PL503")
    assert "Traceback" not in done.stderr
    faults = [json.loads(line) for line in (tmp_path / "r" / "events" / "worker-1.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in faults][-1] == "fault"


STATUS = {
    "sys.exit(3)": ("import sys; sys.exit(3)", 1, "SystemExit: 3"),
    "sys.exit(text)": ("import sys; sys.exit('no data')", 1, "no data"),
    "sys.exit(0)": ("import sys; sys.exit(0)", 0, "finished"),
    "os._exit(7)": ("import os; os._exit(7)", 1, "ended with exit status 7"),
    "os._exit(0)": ("import os; os._exit(0)", 3, "exited with status 0 without finishing its script"),
    "a native crash": ("import ctypes; ctypes.string_at(0)", 3, "killed by SIGSEGV"),
    "kill -9": ("import os; os.kill(os.getpid(), 9)", 3, "error[PL502] on rank 0: killed by SIGKILL"),
    "an interrupt of its own": ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
    "a broken import": ("import no_such_module", 1, "No module named 'no_such_module'"),
}


@pytest.mark.parametrize(("script", "code", "said"), STATUS.values(), ids=STATUS.keys())
def test_ends_of_one_process(script: str, code: int, said: str, tmp_path: Path) -> None:
    done = run_paceline("run", write(tmp_path, script + "\n"), "--run-dir", "r", cwd=tmp_path)
    assert done.returncode == code, show(done)
    assert said in done.stdout + done.stderr
    state = {0: "finished", 1: "failed", 3: "lost"}[code]
    record = read(tmp_path / "r" / "run.json")
    assert isinstance(record, dict)
    assert (record["state"], record["exit_code"]) == (state, code)


@pytest.mark.smoke
def test_a_killed_rank_ends_the_run_within_two_seconds(tmp_path: Path) -> None:
    script = write(tmp_path, RANK + "import signal; print(f'up {rank}.'); signal.pause()\n")
    with running(script, "--workers", "3", "--run-dir", "r", cwd=tmp_path) as run:
        for _ in range(3):
            run.until("up ")
        entries = read(tmp_path / "r" / "processes.json")
        assert isinstance(entries, list)
        assert [(e["name"], e["role"]) for e in entries] == [("launcher", "launcher")] + [
            (f"worker-{r}", "worker") for r in range(3)
        ]
        pids = [e["pid"] for e in entries]
        os.kill(pids[2], signal.SIGKILL)
        killed = time.monotonic()
        assert run.end() == 3, run.text
        assert time.monotonic() - killed < 2.0
    assert "error[PL502] on rank 1: killed by SIGKILL" in run.text
    assert "ranks 0,2 were ended as witnesses" in run.text
    assert gone(pids)


def test_status_0_in_mid_script_is_the_cause(tmp_path: Path) -> None:
    """Others that miss the rank are witnesses."""
    script = write(tmp_path, RANK + "import os, signal\nif rank == 1: os._exit(0)\nsignal.pause()\n")
    done = run_paceline("run", script, "--workers", "2", "--run-dir", "r", cwd=tmp_path)
    assert done.returncode == 3, show(done)
    assert "error[PL508] on rank 1: exited with status 0 without finishing its script" in done.stderr
    assert "rank 0 was ended as a witness" in done.stderr


def test_a_script_that_shares_nothing_is_refused(tmp_path: Path) -> None:
    done = run_paceline("run", write(tmp_path, "print('the whole program')\n"), "-n", "2", cwd=tmp_path)
    assert done.returncode == 1, show(done)
    assert "error[PL102]" in done.stderr


# ---- a run that is ended --------------------------------------------------------------------------------------------
WAITS = "import signal\nprint('ready')\ntry: signal.pause()\nfinally: print('finally')\n"
STUBBORN = (
    "import signal\nfor s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n"
    "print('ready')\nwhile True: signal.pause()\n"
)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)], ids=["INT", "TERM", "HUP"]
)
def test_a_signal_to_the_launcher(number: int, code: int, tmp_path: Path) -> None:
    with running(write(tmp_path, WAITS), "-n", "2", "--run-dir", "r", cwd=tmp_path) as run:
        run.until("[0-1] ready")
        run.launcher.send_signal(number)
        assert run.end() == code, run.text
    assert "[0-1] finally" in run.text
    assert "stopped after" in run.said[-1]
    record = read(tmp_path / "r" / "run.json")
    assert isinstance(record, dict)
    assert (record["state"], record["exit_code"]) == ("stopped", code)


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6])
def test_ctrl_c_while_it_starts(moment: float, tmp_path: Path) -> None:
    """The whole process group gets it, as from a terminal, at whatever a fresh process does at that time."""
    script = write(tmp_path, "import torch, signal\nprint('ready')\nsignal.pause()\n")
    command = [*CLI, "run", script, "-n", "2", "--run-dir", "r"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    if "paceline" not in text and not (tmp_path / "r").exists():
        return  # the interpreter itself was starting: it is Python that was interrupted
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "error[" not in text
    if (tmp_path / "r" / "run.json").exists():
        record = read(tmp_path / "r" / "run.json")
        assert isinstance(record, dict)
        assert (record["state"], record["exit_code"]) == ("stopped", 130)
        assert text.splitlines()[-1].endswith("· r") or text.splitlines()[-1] == "interrupted"


def test_what_an_interrupted_import_fails_with_is_nobodys_failure(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        RANK + "import signal\nprint('ready')\ntry: signal.pause()\n"
        "except KeyboardInterrupt: raise RecursionError('of numpy') from None\n",
    )
    with running(script, "-n", "2", cwd=tmp_path) as run:
        run.until("[0-1] ready")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
    assert "error[" not in run.text


def test_three_times_ctrl_c_ends_what_does_not_want_to(tmp_path: Path) -> None:
    with running(write(tmp_path, STUBBORN), "-n", "2", cwd=tmp_path) as run:
        run.until("[0-1] ready")
        began = time.monotonic()
        run.launcher.send_signal(signal.SIGINT)
        run.until("stopping: ")
        run.launcher.send_signal(signal.SIGINT)
        run.until("stopping now")
        run.launcher.send_signal(signal.SIGINT)
        assert run.end() == 130, run.text
        assert time.monotonic() - began < 5


def test_once_is_enough_for_what_does_not_want_to_but_takes_longer(tmp_path: Path) -> None:
    with running(write(tmp_path, STUBBORN), cwd=tmp_path) as run:
        run.until("ready")
        run.launcher.send_signal(signal.SIGTERM)
        assert run.end() == 143, run.text


def test_stop_from_elsewhere(tmp_path: Path) -> None:
    with running(write(tmp_path, WAITS), "--name", "mine", cwd=tmp_path) as run:
        run.until("ready")
        done = run_paceline("stop", "mine", "--timeout", "20", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "runs/mine: stopped\n"), show(done)
        assert run.end() == 130
    again = run_paceline("stop", "mine", cwd=tmp_path)
    assert again.returncode == 2
    assert "error PL109" in again.stderr


def test_stop_does_not_hit_a_stranger(tmp_path: Path) -> None:
    """A recorded number that another process has by now is left alone."""
    run = tmp_path / "dead"
    run.mkdir()
    (run / "run.json").write_text('{"state": "running"}')
    entry = {"role": "launcher", "pid": os.getpid(), "ticks": 1, "host": os.uname().nodename}
    (run / "processes.json").write_text(json.dumps([entry]))
    done = run_paceline("stop", "dead", cwd=tmp_path)
    assert done.returncode == 2
    assert "the launcher of this run was killed; its state was never written" in done.stderr


def test_nobody_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """Neither ranks nor their children, be they busy, stopped or deaf."""
    script = write(
        tmp_path,
        RANK + "import os, signal, subprocess, sys\n"
        "for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "print(f'pids {os.getpid()} {child.pid}.')\n"
        "if rank: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "while True: pass\n",
    )
    with running(script, "-n", "2", cwd=tmp_path) as run:
        lines = [run.until("pids ") for _ in range(2)]
        pids = [int(word.rstrip(".")) for line in lines for word in line.split()[2:4]]
        run.launcher.kill()
        run.launcher.wait()
        assert gone(pids)


def test_whoever_reads_of_a_launcher_that_was_killed_is_told(tmp_path: Path) -> None:
    with running(write(tmp_path, WAITS), "--name", "mine", cwd=tmp_path) as run:
        run.until("ready")
        assert "note:" not in run_paceline("logs", "mine", cwd=tmp_path).stderr
        run.launcher.kill()
        run.launcher.wait()
    told = "runs/mine: the launcher of this run was killed; its state was never written"
    for verb, code in ((("stop",), 2), (("logs",), 0), (("hash",), 2)):
        done = run_paceline(*verb, "mine", cwd=tmp_path)
        assert (done.returncode, told in done.stderr) == (code, True), show(done)
    assert "what its ranks have printed" in run_paceline("stop", "mine", cwd=tmp_path).stderr


def test_children_of_a_rank_end_with_it(tmp_path: Path) -> None:
    """Also one that has left the rank's process group, and holds its output open."""
    script = write(
        tmp_path,
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], process_group=0)\n"
        "print('child', child.pid)\n",
    )
    done = run_paceline("run", script, cwd=tmp_path)
    assert done.returncode == 0, show(done)
    pid = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("child "))
    assert gone([pid])


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    """`paceline run … | head`"""
    script = write(tmp_path, "for i in range(2000): print('line', i)\nopen('done', 'w').write('yes')\n")
    process = subprocess.Popen([*CLI, "run", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE) == 0
    assert (tmp_path / "done").read_text() == "yes"
