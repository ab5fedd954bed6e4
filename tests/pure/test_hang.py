"""The watch recognises what will not go on, and keeps quiet about what is only slow. The time is virtual.

Answers NVIDIA/nccl#1324 ("How to locate the hanging node?"), ray#22567, DeepSpeed#2936 (one rank retried a download for
30 minutes), horovod#2640 (a collective on a subset of ranks), DeepSpeed#1617 ("which rank is slow?").
"""

from __future__ import annotations

import dataclasses
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.observe.hang import Finding, Watch
from paceline.observe.heartbeat import Heartbeat, Lines
from paceline.terms.activity import TIMED, Board, Phase, Snapshot

TICK = 0.1


class Run:
    """Ranks on a virtual clock: what they do is set, time passes, the watch looks on."""

    def __init__(self, size: int, *, after: float | None = None) -> None:
        self.now = 1000.0
        self.watch = Watch(after=after)
        self.exited: dict[int, int] = {}
        self.asleep: set[int] = set()
        self.settled = True
        self.ranks = [
            Snapshot(
                rank=r,
                pid=100 + r,
                phase=Phase.COMPUTE,
                since=self.now,
                step=0,
                epoch=0,
                rows=0,
                beat=self.now,
                adopted=True,
                operation=0,
                what="",
                where="train.py:10 in train",
                waits_for=(),
                spent=dict.fromkeys(TIMED, 0.0),
            )
            for r in range(size)
        ]

    def set(self, rank: int, **changes: Any) -> None:
        self.ranks[rank] = dataclasses.replace(self.ranks[rank], **changes)

    def enter(self, rank: int, phase: Phase, what: str = "", **changes: Any) -> None:
        left = self.ranks[rank]
        spent = dict(left.spent)
        if left.phase in TIMED:
            spent[left.phase] += self.now - left.since
        self.set(rank, phase=phase, what=what, since=self.now, spent=spent, **changes)

    def wait(self, rank: int, what: str, *peers: int, where: str = "train.py:31 in train") -> None:
        self.enter(rank, Phase.WAIT, what, waits_for=peers, where=where)

    def passes(self, seconds: float) -> list[Finding]:
        found = []
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            for r in range(len(self.ranks)):
                if r not in self.asleep and r not in self.exited:
                    self.set(r, beat=self.now)
            found += self.watch.examine(self.ranks, self.exited, self.now, settled=self.settled)
        return found

    def steps(self, count: int, seconds: float) -> list[Finding]:
        """Ordinary training: each step computes, then exchanges."""
        found = []
        for _ in range(count):
            for r in range(len(self.ranks)):
                self.enter(r, Phase.COMPUTE)
            found += self.passes(seconds / 2)
            for r in range(len(self.ranks)):
                self.wait(r, "backward, bucket 1/2")
            found += self.passes(seconds / 2)
            for r in range(len(self.ranks)):
                self.enter(r, Phase.COMPUTE, step=self.ranks[r].step + 1)
        return found


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


def text(finding: Finding) -> str:
    return "\n".join(finding.render())


# ---- PL501 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [(0,), ()])
@pytest.mark.parametrize("process_is_gone", [True, False])
def test_a_rank_that_ended_while_others_wait_for_it_is_fatal(mask: tuple[int, ...], process_is_gone: bool) -> None:
    run = Run(3)
    run.steps(3, 0.2)
    run.enter(0, Phase.FINISHED)
    if process_is_gone:
        run.exited[0] = 0
    run.wait(1, "backward, bucket 1/2", *mask)
    run.wait(2, "backward, bucket 1/2", *mask)
    finding = only(run.passes(2))
    assert (finding.code, finding.fatal) == ("PL501", True)
    assert "rank 0 ended its script after step 3, and ranks 1-2 wait for it in `backward, bucket 1/2`" in text(finding)
    assert "train.py:31 in train" in text(finding)


def test_it_is_recognised_within_a_second() -> None:
    run = Run(2)
    run.steps(3, 0.2)
    run.exited[0] = 0
    run.wait(1, "backward", 0)
    assert run.passes(0.2) == []
    assert only(run.passes(0.8)).code == "PL501"


def test_ranks_that_end_one_after_the_other_are_no_finding() -> None:
    run = Run(2)
    run.steps(3, 0.2)
    run.exited[0] = 0
    assert run.passes(9) == []  # rank 1 still saves a file
    run.exited[1] = 0
    assert run.passes(100) == []


def test_a_wait_for_somebody_else_is_not_blamed_on_the_rank_that_ended() -> None:
    run = Run(3)
    run.steps(3, 0.2)
    run.exited[0] = 0
    run.wait(1, "mix", 2)
    assert run.passes(5) == []


def test_a_stopped_rank_whose_peer_has_ended_is_not_called_a_deadlock() -> None:
    run = Run(2)
    run.steps(3, 0.2)
    run.wait(1, "backward, bucket 2/2", 0)
    run.asleep.add(1)  # SIGSTOP: the answer may have arrived, only nobody reads it
    run.exited[0] = 0
    found = run.passes(30)
    assert only(found).code == "PL504"
    assert not found[0].fatal
    assert "does not respond" in text(found[0])


def test_after_a_failure_the_watch_is_quiet() -> None:
    run = Run(2)
    run.steps(3, 0.2)
    run.exited[0] = 1
    run.wait(1, "backward", 0)
    assert run.passes(100) == []


# ---- PL505 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", ["evaluating", "ratio correct/seen", "once 'download'", "export"])
def test_a_collective_under_if_rank_0_is_fatal_and_recognised(what: str) -> None:
    run = Run(4)
    run.steps(3, 0.2)
    run.wait(0, what, 1, 2, 3, where="train.py:44 in main")
    for rank in (1, 2, 3):
        run.wait(rank, "backward, bucket 1/2", 0)
    finding = only(run.passes(3))
    assert (finding.code, finding.fatal) == ("PL505", True)
    assert f"rank 0 in `{what}`, ranks 1-3 in `backward, bucket 1/2`" in text(finding)
    assert f"rank 0 reached `{what}`, ranks 1-3 did not: a collective call under `if rank == 0`" in text(finding)
    assert "train.py:44 in main" in text(finding)


def test_a_rank_with_one_batch_more_is_recognised() -> None:
    run = Run(3)
    run.steps(3, 0.2)
    run.wait(0, "backward, bucket 1/2")
    run.wait(1, "evaluating")
    run.wait(2, "evaluating")
    assert "loops of different length" in text(only(run.passes(3)))


def test_waits_of_a_moment_in_different_operations_are_ordinary() -> None:
    run = Run(2)
    run.steps(3, 0.2)
    for _ in range(20):
        run.wait(0, "evaluating")
        run.wait(1, "backward, bucket 2/2")
        assert run.passes(0.8) == []
        run.enter(1, Phase.COMPUTE)
        assert run.passes(0.1) == []


def test_different_buckets_of_one_backward_are_the_same_operation() -> None:
    run = Run(2)
    run.steps(3, 0.2)
    run.wait(0, "backward, bucket 1/2")
    run.wait(1, "backward, bucket 2/2")
    assert run.passes(9) == []


def test_one_rank_that_computes_makes_waits_in_different_operations_no_deadlock() -> None:
    run = Run(3)
    run.steps(3, 0.2)
    run.wait(0, "evaluating")
    run.wait(1, "backward")
    assert run.passes(9) == []


def test_a_stopped_rank_is_not_called_a_deadlock() -> None:
    run = Run(3)
    run.steps(3, 0.2)
    run.wait(2, "backward, bucket 2/2")
    run.passes(0.5)
    run.asleep.add(2)
    run.wait(0, "evaluating", 2)
    run.wait(1, "evaluating", 2)
    finding = only(run.passes(30))
    assert (finding.code, finding.fatal) == ("PL504", False)
    assert "rank 2 does not respond: stopped (SIGSTOP, a debugger)" in text(finding)
    assert "no heartbeat for" in text(finding)


def test_slow_steps_make_it_patient() -> None:
    run = Run(2)
    run.steps(4, 8.0)  # a slow network: whole seconds pass between the ends of one exchange
    run.wait(0, "evaluating")
    run.wait(1, "backward, bucket 2/2")
    assert run.passes(12) == []
    assert only(run.passes(8)).code == "PL505"


def test_before_the_first_step_parameters_may_travel_slowly() -> None:
    run = Run(2)
    run.wait(0, "compare models")
    run.wait(1, "broadcast of the parameters")
    assert run.passes(9) == []
    assert only(run.passes(2)).code == "PL505"


def test_a_frozen_machine_is_not_called_a_deadlock() -> None:
    run = Run(2)
    run.steps(3, 0.2)
    run.wait(0, "evaluating")
    run.wait(1, "backward, bucket 2/2")
    run.passes(0.2)
    run.now += 3600  # everything was frozen, the watch too; its first look comes before the ranks have run
    assert run.watch.examine(run.ranks, {}, run.now) == []
    run.enter(1, Phase.COMPUTE)
    assert run.passes(5) == []


# ---- PL506 -----------------------------------------------------------------------------------------------------------
def test_a_stuck_loader_is_named_with_its_line_and_is_not_fatal() -> None:
    run = Run(3)
    run.steps(3, 0.2)
    run.enter(1, Phase.INPUT, where="train.py:27 in train")
    run.wait(0, "backward", 1)
    run.wait(2, "backward", 1)
    found = run.passes(30)
    finding = only(found)
    assert (finding.code, finding.fatal) == ("PL506", False)
    assert "the data loader of rank 1 has given no batch for 10 s, and all others wait" in text(finding)
    assert "train.py:27 in train" in text(finding)


def test_the_loader_of_a_single_rank_can_be_stuck_too() -> None:
    run = Run(1)
    run.steps(3, 0.2)
    run.enter(0, Phase.INPUT)
    assert only(run.passes(30)).code == "PL506"


def test_a_loader_that_is_slow_in_every_step_is_not_stuck() -> None:
    run = Run(2)
    for _ in range(6):
        run.enter(0, Phase.INPUT)
        run.wait(1, "backward", 0)
        assert run.passes(9) == []
        for r in (0, 1):
            run.enter(r, Phase.COMPUTE, step=run.ranks[r].step + 1)
        assert run.passes(1) == []
    run.enter(0, Phase.INPUT)
    run.wait(1, "backward", 0)
    assert run.passes(100) == []
    assert only(run.passes(110)).code == "PL506"


# ---- PL504 -----------------------------------------------------------------------------------------------------------
def test_a_rank_that_computes_while_the_others_wait_is_named() -> None:
    run = Run(4)
    run.steps(5, 0.2)
    run.enter(2, Phase.COMPUTE, where="data.py:7 in download")
    for rank in (0, 1, 3):
        run.wait(rank, "backward, bucket 1/2", 2)
    finding = only(run.passes(60))
    assert (finding.code, finding.fatal) == ("PL504", False)
    assert finding.message == "nothing has moved for 10 s (a step takes 0.2 s)"
    assert "rank 2, on whom the others wait at data.py:7 in download" in text(finding)
    assert "ranks 0-1,3  wait for 10 s in `backward, bucket 1/2` on rank 2" in text(finding)


def test_waiting_in_the_same_operation_is_the_transport() -> None:
    run = Run(2)
    run.steps(5, 0.2)
    for rank in (0, 1):
        run.wait(rank, "backward, bucket 1/2", 1 - rank)
    finding = only(run.passes(60))
    assert finding.code == "PL504"
    assert "the transport" in text(finding)


def test_a_slow_step_is_no_hang() -> None:
    run = Run(2)
    run.steps(4, 3.0)
    run.wait(0, "backward", 1)
    assert run.passes(55) == []  # less than 20 times the usual 3 s
    assert only(run.passes(10)).code == "PL504"


def test_steps_of_a_minute_are_no_hang() -> None:
    assert Run(2).steps(3, 60.0) == []


def test_the_first_step_may_take_a_minute() -> None:
    run = Run(2)
    run.wait(1, "adopt", 0)
    assert run.passes(55) == []
    assert only(run.passes(10)).code == "PL504"


def test_a_compile_phase_in_the_middle_is_no_hang() -> None:
    run = Run(2)
    run.steps(5, 0.2)
    run.enter(0, Phase.COMPUTE, where="train.py:31 in train (torch.compile)")
    run.wait(1, "backward", 0)
    assert run.passes(50) == []


def test_ranks_that_all_compute_get_a_minute() -> None:
    run = Run(2)
    run.steps(5, 0.2)
    assert run.passes(50) == []
    assert "no rank waits for another" in text(only(run.passes(20)))


def test_any_movement_starts_the_patience_anew_and_a_new_stall_is_told_anew() -> None:
    run = Run(2)
    run.steps(5, 0.2)
    for _ in range(2):
        for moment in range(3):
            run.enter(0, Phase.COMPUTE)
            run.wait(1, f"evaluating, part {moment}", 0)
            assert run.passes(9) == []
        assert only(run.passes(20)).code == "PL504"


def test_the_user_can_ask_for_an_earlier_word() -> None:
    run = Run(2, after=2.0)
    run.steps(5, 0.05)
    run.wait(1, "backward", 0)
    assert only(run.passes(3)).code == "PL504"


def test_a_large_run_has_a_short_table() -> None:
    run = Run(64)
    run.steps(3, 0.2)
    for rank in range(64):
        if rank % 2:
            run.wait(rank, "backward", 0)
    finding = only(run.passes(20))
    assert len(finding.lines) <= 19
    assert "and 17 more" in text(finding)


# ---- ranks that change -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("told", ["by the launcher", "on the board"])
def test_a_regroup_is_no_hang(told: str) -> None:
    """One waits for the dead one, another has noticed and waits for the coordinator, which is down."""
    run = Run(3)
    run.steps(3, 0.2)
    run.settled = told == "on the board"
    run.wait(0, "regroup")
    run.wait(1, "backward, bucket 1/2")
    run.wait(2, "regroup" if told == "on the board" else "backward, bucket 1/2", 1)
    assert run.passes(55) == []
    found = only(run.passes(10))
    assert (found.code, found.fatal) == ("PL504", False)
    assert "cannot agree on who is left" in text(found)


def test_one_that_has_ended_is_not_missed_before_the_others_have_regrouped() -> None:
    run = Run(3)
    run.steps(3, 0.2)
    run.settled = False
    run.enter(0, Phase.FINISHED)
    run.wait(1, "backward, bucket 1/2", 0)
    run.wait(2, "backward, bucket 1/2", 0)
    assert run.passes(5) == []
    run.settled = True
    assert only(run.passes(1)).code == "PL501"


def test_ranks_that_come_and_go_are_followed() -> None:
    """A replacement has another number, and a page that begins anew; the word is no longer rank."""
    run = Run(3)
    run.steps(3, 0.2)
    run.watch.noun = "worker"
    run.ranks[1] = dataclasses.replace(run.ranks[1], rank=7, step=run.ranks[0].step, spent=dict.fromkeys(TIMED, 0.0))
    assert run.steps(3, 0.2) == []
    run.wait(0, "all_gather")
    run.wait(1, "backward, bucket 1/2")
    run.wait(2, "backward, bucket 1/2")
    found = only(run.passes(3))
    assert found.message.startswith("workers wait for each other in different operations: worker 0 in `all_gather`")
    assert "workers 2,7" in text(found)


# ---- stragglers ------------------------------------------------------------------------------------------------------
def uneven(run: Run, steps: int, busy: list[float], phase: Phase = Phase.COMPUTE) -> None:
    """Steps of one second, in which rank r is busy for ``busy[r]`` and then waits."""
    for _ in range(steps):
        for r in range(len(busy)):
            run.enter(r, phase if busy[r] == max(busy) else Phase.COMPUTE)
        for tenth in range(10):
            for r, part in enumerate(busy):
                if tenth == round(10 * part):
                    run.wait(r, "backward")
            run.passes(TICK)
        for r in range(len(busy)):
            run.set(r, step=run.ranks[r].step + 1)


def test_the_rank_that_holds_up_the_others_is_named_once() -> None:
    run = Run(4)
    uneven(run, 12, [0.4, 0.4, 0.9, 0.4])
    (slow,) = run.watch.stragglers()
    assert slow.rank == 2
    assert not slow.reading
    assert str(slow).startswith("rank 2 is slow: it computes 9")
    uneven(run, 12, [0.4, 0.4, 0.9, 0.4])
    assert run.watch.stragglers() == []
    uneven(run, 15, [0.4, 0.4, 0.4, 0.4])
    uneven(run, 15, [0.4, 0.4, 0.9, 0.4])
    assert [s.rank for s in run.watch.stragglers()] == [2]


def test_a_rank_with_a_slow_loader_is_said_to_read() -> None:
    run = Run(2)
    uneven(run, 12, [0.3, 0.9], Phase.INPUT)
    (slow,) = run.watch.stragglers()
    assert (slow.rank, slow.reading) == (1, True)


def test_a_straggler_is_sought_anew_among_other_ranks() -> None:
    """What was spent before says nothing of one that has just come."""
    run = Run(4)
    uneven(run, 4, [0.4, 0.4, 0.9, 0.4])
    spent = dict.fromkeys(TIMED, 0.0) | {Phase.COMPUTE: 500.0}
    run.ranks[1] = dataclasses.replace(run.ranks[1], rank=4, spent=spent)
    uneven(run, 4, [0.4, 0.4, 0.9, 0.4])
    assert run.watch.stragglers() == []
    uneven(run, 9, [0.4, 0.4, 0.9, 0.4])
    (slow,) = run.watch.stragglers()
    assert slow.render("worker").startswith("worker 2 is slow")


def test_even_ranks_and_a_rank_that_evaluates_alone_are_no_stragglers() -> None:
    run = Run(3)
    uneven(run, 12, [0.8, 0.7, 0.8])
    assert run.watch.stragglers() == []
    run.enter(0, Phase.COMPUTE)
    for rank in (1, 2):
        run.wait(rank, "evaluating", 0)
    run.passes(30)
    assert run.watch.stragglers() == []


# ---- the heartbeat ---------------------------------------------------------------------------------------------------
class Held:
    """A thread that stands still inside of a function of a module, until it is let go."""

    def __init__(self, function: Callable[[Callable[[], None]], None]) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=function, args=(self._stand,))

    def _stand(self) -> None:
        self.inside.set()
        assert self.go.wait(30)

    def __enter__(self) -> threading.Thread:
        self.thread.start()
        assert self.inside.wait(30)
        return self.thread

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self.thread.join()


def module(path: Path, source: str, name: str = "user") -> types.ModuleType:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    made = types.ModuleType(name)
    exec(compile(source, str(path), "exec"), made.__dict__)
    return made


def test_the_line_is_the_deepest_of_the_users_code(tmp_path: Path) -> None:
    library = module(tmp_path / "lib" / "site-packages" / "lib.py", "def call(stand):\n    stand()\n")
    helper = module(tmp_path / "helper.py", "def load(stand):\n\n    call(stand)\n")
    helper.__dict__["call"] = library.call
    script = module(tmp_path / "train.py", "def train(stand):\n    load(stand)\n")
    script.__dict__["load"] = helper.load
    with Held(script.train) as thread:
        assert Lines(tmp_path / "train.py").now(thread) == "helper.py:3 in load"
        assert Lines(tmp_path / "else" / "where.py").now(thread) == ""


def test_a_script_that_is_a_link_and_the_files_beside_both_are_the_users(tmp_path: Path) -> None:
    target = module(tmp_path / "store" / "real.py", "def f(stand):\n    stand()\n")
    (tmp_path / "train.py").symlink_to(tmp_path / "store" / "real.py")
    helper = module(tmp_path / "helper.py", "def g(stand):\n    stand()\n")
    with Held(target.f) as thread:
        assert Lines(tmp_path / "train.py").now(thread) == "real.py:2 in f"
    with Held(helper.g) as thread:
        assert Lines(tmp_path / "train.py").now(thread) == "helper.py:2 in g"


@pytest.mark.parametrize(
    ("room", "function", "said"),
    [
        ("torch._dynamo.convert_frame", "_compile", " (torch.compile)"),
        ("torch._inductor.compile_fx", "compile_fx", " (torch.compile)"),
        ("torch._dynamo.convert_frame", "module_level", ""),  # it is imported, as the first optimizer does
        ("torch._dynamo.eval_frame", "compile_wrapper", ""),  # it stands around every call of an optimizer
    ],
)
def test_the_compiler_is_recognised(room: str, function: str, said: str, tmp_path: Path) -> None:
    theirs = module(tmp_path / "site-packages" / "i.py", f"def {function}(stand):\n    stand()\n", room)
    script = module(tmp_path / "train.py", "def train(stand):\n    f(stand)\n")
    script.__dict__["f"] = vars(theirs)[function]
    with Held(script.train) as thread:
        assert Lines(tmp_path / "train.py").now(thread) == f"train.py:2 in train{said}"


def test_the_compiler_of_this_torch_is_recognised(tmp_path: Path) -> None:
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        seen.append(Lines(tmp_path / "train.py").now(threading.current_thread()))
        return graph.forward

    script = module(tmp_path / "train.py", "def train(f, x):\n    return f(x)\n")
    script.train(torch.compile(lambda x: x + 1, backend=look), torch.zeros(1))
    assert seen == ["train.py:2 in train (torch.compile)"]


def test_the_heart_beats_flushes_survives_a_failing_flush_and_stops() -> None:
    board = Board.private(1)
    flushes, twice = [], threading.Event()

    def flush() -> None:
        flushes.append(board.read(0).beat)
        if len(flushes) >= 2:
            twice.set()
        raise OSError("disk")

    heart = Heartbeat(board.activity(0), Path(__file__), flush, interval=0.001)
    heart.start()
    assert twice.wait(30)
    heart.stop()
    assert 0 < flushes[0] < flushes[1]
    assert "test_hang.py" in board.read(0).where
    assert isinstance(heart.last_failure, OSError)
    assert not [t for t in threading.enumerate() if t.name == "paceline-heartbeat"]
