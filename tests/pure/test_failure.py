"""The earliest failure is the cause; it is shown last, at the user's line, with a code and what to do.

Answers MiniGPT-4#237 and ColossalAI#3571 (nobody sees the exception), torch-spyre#3835 (a traceback of another rank
than 0 is lost), ray#23405 (the original error is hidden).
"""

from __future__ import annotations

import json
import runpy
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.observe import failure
from paceline.observe.failure import Record
from paceline.terms.activity import Board, Phase
from paceline.terms.errors import Aborted, PeerLost, StepError, WireError

SCRIPT = """\
import torch
import torch.nn.functional as F

def train(x):
    w = torch.zeros(3, 4)
    return 1 + F.linear(x, w)

def main():
    train(torch.zeros(2, 5))

if __name__ == "__main__":
    main()
"""


def run(path: Path, source: str) -> BaseException:
    """Run a script the way a worker does and return what it raised."""
    path.write_text(source)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except BaseException as raised:
        return raised
    raise AssertionError("the script did not fail")


def recorded(exc: BaseException, script: Path | None = None, **more: Any) -> Record:
    """A record as the launcher gets it: through JSON."""
    made: Record = json.loads(json.dumps(failure.record(exc, script), allow_nan=False))
    return made | more


def raised(exc: BaseException) -> BaseException:
    try:
        raise exc
    except BaseException as caught:
        return caught


# ---- the record ------------------------------------------------------------------------------------------------------
def test_only_the_users_frames_are_kept(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    made = recorded(run(script, SCRIPT), script)
    assert [(Path(f["file"]).name, f["line"], f["function"]) for f in made["frames"]] == [
        ("test_failure.py", made["frames"][0]["line"], "run"),
        ("train.py", 12, "<module>"),
        ("train.py", 9, "main"),
        ("train.py", 6, "train"),
    ]
    last = made["frames"][-1]
    assert last["user"]
    assert last["text"] == "return 1 + F.linear(x, w)"
    assert last["text"][slice(*last["caret"])] == "F.linear(x, w)"
    assert made["hidden"] > 0
    assert made["type"] == "RuntimeError"
    assert (made["code"], made["help"]) == (None, None)
    assert made["mono"] > 0


def test_carets_count_characters_and_not_bytes(tmp_path: Path) -> None:
    made = recorded(run(tmp_path / "t.py", 'if True:\n    größe = "ä" + str(1 / 0)\n'))
    last = made["frames"][-1]
    assert last["text"][slice(*last["caret"])] == "1 / 0"


def test_without_a_frame_of_the_user_all_are_kept() -> None:
    try:
        json.loads("{")
    except ValueError as exc:
        exc.__traceback__ = exc.__traceback__.tb_next if exc.__traceback__ else None
        made = recorded(exc)
    assert made["frames"][-1]["file"].endswith("decoder.py")
    assert made["hidden"] == 0
    assert made["type"] == "json.decoder.JSONDecodeError"


def test_code_help_and_notes_are_kept() -> None:
    error = StepError("PL401", "ranks disagree", help="step everywhere")
    error.add_note("rank 1 applied 3 steps")
    made = recorded(raised(error))
    assert (made["type"], made["message"], made["code"], made["help"]) == (
        "StepError",
        "ranks disagree",
        "PL401",
        "step everywhere",
    )
    assert made["notes"] == ["rank 1 applied 3 steps"]


def test_causes_are_followed_as_python_does_and_not_for_ever() -> None:
    try:
        try:
            {}["key"]
        except KeyError as before:
            raise ValueError("bad") from before
    except ValueError as exc:
        made = recorded(exc)
        exc.__cause__.__cause__ = exc  # type: ignore[union-attr]
        circular = recorded(exc)
    assert [(link["relation"], link["type"]) for link in made["chain"]] == [("cause", "KeyError")]
    assert len(circular["chain"]) == 1
    silenced = ValueError("bad")
    silenced.__context__, silenced.__suppress_context__ = KeyError("key"), True
    assert recorded(silenced)["chain"] == []


def test_members_of_a_group_are_kept() -> None:
    made = recorded(raised(ExceptionGroup("many", [ValueError(n) for n in range(9)])))
    assert [(link["relation"], link["message"]) for link in made["chain"]] == [
        ("member", "0"),
        ("member", "1"),
        ("member", "2"),
    ]


def test_a_syntax_error_points_at_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("a = 1\nb = = 2\n")
    made = recorded(
        run(tmp_path / "t.py", f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport broken\n"), tmp_path / "t.py"
    )
    last = made["frames"][-1]
    assert (Path(last["file"]).name, last["line"], last["text"]) == ("broken.py", 2, "b = = 2")
    assert last["text"][slice(*last["caret"])] == "="


def test_a_runaway_recursion_is_short(tmp_path: Path) -> None:
    made = recorded(run(tmp_path / "t.py", "def f():\n    f()\nf()\n"))
    assert len(made["frames"]) <= 24
    assert made["hidden"] > 100


def test_an_exception_that_cannot_be_printed_is_recorded() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert recorded(raised(Mute()))["message"] == "<its message raised RuntimeError>"
    assert len(recorded(raised(ValueError("x" * 100_000)))["message"]) < 10_000


# ---- the verdict -----------------------------------------------------------------------------------------------------
def test_the_cause_is_last_with_line_caret_code_help_and_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cause = recorded(run(tmp_path / "train.py", SCRIPT), tmp_path / "train.py", rank=2, mono=5.0)
    witnesses = [recorded(raised(PeerLost("PL403", "rank 2 died")), rank=r, mono=5.0 + r) for r in (0, 1, 3)]
    lines = failure.render([*witnesses, cause], 4)
    assert lines[0] == "ranks 0-1,3 were ended as witnesses"
    assert lines[1] == ""
    assert lines[2].startswith("error[PL503] on rank 2: RuntimeError: ")
    at = lines.index("  train.py:6 in train")
    assert lines[at + 1] == "      return 1 + F.linear(x, w)"
    assert lines[at + 2] == "                 ^^^^^^^^^^^^^^"
    assert lines[-2].startswith("  help: ")
    assert lines[-1] == "  more: paceline explain PL503"


def test_witnesses_that_spoke_first_are_not_the_cause() -> None:
    """The death of a process is seen by its peers before the launcher has its exit status."""
    witness = recorded(raised(PeerLost("PL403", "rank 1 died")), rank=0, mono=1.0)
    echo = recorded(raised(WireError("PL406", "Connection closed by peer")), rank=2, mono=1.1)
    killed = failure.killed(signal.SIGKILL, 1.2) | {"rank": 1}
    ended = failure.killed(signal.SIGTERM, 1.3, witness=True) | {"rank": 3}
    lines = failure.render([witness, echo, killed, ended], 4)
    assert lines[0] == "ranks 0,2-3 were ended as witnesses"
    assert lines[2] == "error[PL502] on rank 1: killed by SIGKILL"
    assert "out-of-memory" in lines[-2]


def test_a_broken_wire_without_another_failure_is_the_cause() -> None:
    echo = recorded(raised(WireError("PL406", "no route to host")), rank=1, mono=1.1)
    witness = recorded(raised(Aborted("PL404", "aborted")), rank=0, mono=1.0)
    assert "error[PL406] on rank 1: WireError: no route to host" in failure.render([witness, echo], 2)


def test_with_witnesses_only_the_first_of_them_speaks() -> None:
    both = [recorded(raised(PeerLost("PL403", "rank 2 died")), rank=r, mono=r) for r in (0, 1)]
    assert failure.render(both, 3)[0] == "rank 1 was ended as a witness"
    assert failure.render(both, 3)[2].startswith("error[PL403] on rank 0")


def test_the_same_failure_on_several_ranks_is_told_once(tmp_path: Path) -> None:
    records = [recorded(run(tmp_path / "t.py", f"raise KeyError({r})"), rank=r, mono=float(r)) for r in range(3)]
    assert failure.render(records, 3)[0] == "error[PL503] on all ranks: KeyError: 0"
    assert failure.render(records[1:], 3)[0] == "error[PL503] on ranks 1-2: KeyError: 1"


def test_another_failure_afterwards_is_one_line(tmp_path: Path) -> None:
    late = recorded(run(tmp_path / "a.py", "x = 1\nraise OSError('late')"), rank=0, mono=4.5)
    early = recorded(run(tmp_path / "b.py", "raise ValueError('early\\nsecond line')"), rank=1, mono=2.0)
    lines = failure.render([late, early], 2)
    assert lines[0].startswith("rank 0 failed 2.5 s later: OSError: late (")
    assert lines[0].endswith("a.py:2)")
    assert lines[2:4] == ["error[PL503] on rank 1: ValueError: early", "  second line"]


def test_causes_of_the_cause_come_before_it(tmp_path: Path) -> None:
    source = "try:\n    {}['k']\nexcept KeyError as e:\n    raise ValueError('bad') from e\n"
    lines = failure.render([recorded(run(tmp_path / "t.py", source), rank=0)], 1)
    assert lines[0] == "KeyError: 'k'"
    assert lines.index("which caused:") < lines.index("error[PL503] on rank 0: ValueError: bad")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "out-of-memory killer"),
        (signal.SIGBUS, "/dev/shm"),
        (signal.SIGSEGV, "Fatal Python error"),
        (63, "dmesg"),
    ],
)
def test_a_killed_process_says_where_it_was_and_what_the_signal_means(number: int, said: str) -> None:
    board = Board.private(2)
    activity = board.activity(1)
    activity.progress(41, 2, 100)
    activity.enter(Phase.COMPUTE)
    activity.beat("train.py:31 in train", time.monotonic_ns())
    lines = failure.render([failure.killed(number, 1.0, board.read(1)) | {"rank": 1}], 2)
    assert lines[0].startswith("error[PL502] on rank 1: killed by ")
    assert "  last seen: step 41 · compute · train.py:31 in train" in lines
    assert said in lines[-2]


def test_a_line_that_was_seen_in_another_phase_is_not_said() -> None:
    board = Board.private(1)
    activity = board.activity(0)
    activity.beat("train.py:23", time.monotonic_ns())  # job.adopt
    activity.enter(Phase.COMPUTE)
    activity.progress(3, 0, 100)
    lines = failure.render([failure.killed(9, 1.0, board.read(0)) | {"rank": 0}], 1)
    assert "  last seen: step 3 · compute" in lines


def test_an_exit_without_an_exception_is_told() -> None:
    lines = failure.render([failure.exited(3, 1.0) | {"rank": 0}], 1)
    assert lines[0] == "error[PL503] on rank 0: ended with exit status 3 and without an exception"
    assert "os._exit" in lines[1]


def test_status_0_in_mid_script_is_the_cause() -> None:
    witness = recorded(raised(PeerLost("PL403", "rank 1 died")), rank=0, mono=0.5)
    lines = failure.render([witness, failure.exited(0, 1.0) | {"rank": 1}], 2)
    assert lines[0] == "rank 0 was ended as a witness"
    assert lines[2] == "error[PL508] on rank 1: exited with status 0 without finishing its script"
    assert "sys.exit()" in lines[-2]


@pytest.mark.parametrize(
    ("message", "said"),
    [("CUDA out of memory. Tried", "smaller batch"), ("Caught IndexError in DataLoader worker process 0.", "dataset")],
)
def test_common_messages_have_help(message: str, said: str) -> None:
    assert said in failure.render([recorded(raised(RuntimeError(message)), rank=0)], 1)[-2]


def test_nothing_failed_nothing_said() -> None:
    assert failure.render([], 4) == []


def test_once_ranks_have_moved_the_word_is_worker() -> None:
    board = Board.private(2)
    died = failure.killed(signal.SIGKILL, 5.0, board.read(0)) | {"rank": 4}
    missed = recorded(PeerLost("PL403", "rank 1 was lost")) | {"rank": 7, "mono": 6.0}
    lines = failure.render([died, missed], 4, "worker")
    assert lines[0] == "worker 7 was ended as a witness"
    assert lines[2] == "error[PL502] on worker 4: killed by SIGKILL"
    assert failure.render([died, died | {"rank": 5}], 2, "worker")[0].startswith("error[PL502] on all workers")
