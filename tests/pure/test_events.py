"""Events are strict JSON, cost little, never end training, and add up to the global values of a run."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.observe.events import EventWriter
from paceline.observe.tail import Ended, Values
from paceline.terms.event import Event


def writer(path: Path | None, **options: Any) -> EventWriter:
    return EventWriter(path, name="worker-0", incarnation="f" * 32, **options)


def strict(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, read the way `jq` reads them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def log(step: int, weight: float = 1.0, **values: Any) -> Event:
    return Event("log", step, {"values": values, "weight": weight})


class OnDevice:
    """Stands for a tensor on a device: reading it waits, so it must not be read in the training loop."""

    def __init__(self, value: float, reads: list[float]) -> None:
        self.value, self.reads, self.shape = value, reads, ()

    def detach(self) -> OnDevice:
        return OnDevice(self.value, self.reads)

    def clone(self) -> OnDevice:
        return OnDevice(self.value, self.reads)

    def item(self) -> float:
        self.reads.append(self.value)
        return self.value


# ---- one line --------------------------------------------------------------------------------------------------------
def test_a_line_begins_with_who_when_and_what(tmp_path: Path) -> None:
    path = tmp_path / "events" / "worker-0.jsonl"
    sink = writer(path)
    sink(Event("step", 7, {"epoch": 2, "samples": 512}))
    sink(log(7, loss=0.5))
    sink.close()
    step, logged = strict(path)
    assert list(step) == ["mono", "wall", "name", "incarnation", "epoch", "step", "kind", "samples"]
    assert (step["name"], step["incarnation"], step["epoch"], step["step"], step["kind"]) == (
        "worker-0",
        "f" * 32,
        2,
        7,
        "step",
    )
    assert logged["epoch"] == 2  # the epoch said last
    assert logged["values"] == {"loss": 0.5}
    assert step["mono"] <= logged["mono"]


def test_what_is_no_json_is_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    sink = writer(path)
    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    odd = {"nan": math.nan, "up": math.inf, "down": [-math.inf], "set": {3}, "type": int, "path": Path("a"), 5: 6}
    sink(Event("notice", 1, {"odd": odd, "cyclic": cyclic, "lone": "\ud800", "kind": "mine"}))
    sink.close()
    (line,) = strict(path)
    assert line["odd"] == {
        "nan": "nan",
        "up": "inf",
        "down": ["-inf"],
        "set": [3],
        "type": "<class 'int'>",
        "path": "a",
        "5": 6,
    }
    assert line["kind"] == "notice"
    assert line["kind_"] == "mine"


def test_a_value_whose_repr_raises_does_not_end_training(tmp_path: Path) -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

        def detach(self) -> None:
            raise RuntimeError("no")

    sink = writer(tmp_path / "e.jsonl")
    sink(log(1, loss=Hostile(), other=1))
    sink.close()
    (line,) = strict(tmp_path / "e.jsonl")
    assert line["values"]["other"] == 1
    assert "Hostile" in line["values"]["loss"]


# ---- tensors ---------------------------------------------------------------------------------------------------------
def test_a_device_is_waited_for_only_at_flush(tmp_path: Path) -> None:
    reads: list[float] = []
    sink = writer(tmp_path / "e.jsonl")
    sink(log(1, loss=OnDevice(0.25, reads)))
    assert reads == []
    sink.flush()
    assert reads == [0.25]
    sink.close()
    assert strict(tmp_path / "e.jsonl")[0]["values"] == {"loss": 0.25}


def test_a_tensor_changed_in_place_after_the_call_was_logged_as_it_was(tmp_path: Path) -> None:
    sink = writer(tmp_path / "e.jsonl")
    running = torch.tensor(1.0, requires_grad=True)
    sink(log(1, running=running, pair=torch.tensor([1, 2]), large=torch.zeros(1000)))
    with torch.no_grad():
        running.add_(41)
    sink.close()
    values = strict(tmp_path / "e.jsonl")[0]["values"]
    assert values == {"running": 1.0, "pair": [1, 2], "large": "Tensor of shape (1000,)"}


# ---- the file --------------------------------------------------------------------------------------------------------
def test_fault_and_end_are_written_at_once_others_with_the_heartbeat(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    sink = writer(path)
    sink(Event("step", 1))
    assert path.read_text() == ""
    sink(Event("fault", 1, {"type": "ValueError"}))
    assert [line["kind"] for line in strict(path)] == ["step", "fault"]
    sink.close()
    sink(Event("step", 2))
    sink.flush()
    assert len(strict(path)) == 2


def test_threads_do_not_lose_or_mix_lines(tmp_path: Path) -> None:
    sink = writer(tmp_path / "e.jsonl")

    def emit(source: int) -> None:
        for n in range(500):
            sink(Event("step", n, {"source": source, "text": "x" * 50}))
            if n % 50 == 0:
                sink.flush()

    threads = [threading.Thread(target=emit, args=(source,)) for source in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    lines = strict(tmp_path / "e.jsonl")
    assert sorted((line["source"], line["step"]) for line in lines) == [(s, n) for s in range(4) for n in range(500)]


def test_a_forked_child_does_not_write_what_its_parent_has_queued(tmp_path: Path) -> None:
    sink = writer(tmp_path / "e.jsonl")
    sink(Event("step", 1))
    child = os.fork()
    if child == 0:
        sink.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    sink.close()
    assert len(strict(tmp_path / "e.jsonl")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_full_disk_is_remembered_and_told_once() -> None:
    told: list[OSError] = []
    sink = writer(Path("/dev/full"), on_failure=told.append)
    for step in range(3):
        sink(Event("step", step))
        sink.flush()
    sink.close()
    assert isinstance(sink.failed, OSError)
    assert told == [sink.failed]
    assert sink.lost == 3


def test_a_directory_that_cannot_be_made_is_no_exception(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = writer(tmp_path / "file" / "e.jsonl")
    sink(Event("end", 1))
    sink.close()
    assert isinstance(sink.failed, OSError)
    assert sink.lost == 1


def test_after_a_torn_write_the_file_goes_on_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = writer(tmp_path / "e.jsonl")
    write: Callable[[int, bytes], int] = os.write
    sink(Event("step", 1))
    sink(Event("step", 2))

    def half(fd: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(fd, bytes(data)[: len(data) - 50])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        sink.flush()
    sink(Event("step", 3))
    sink.close()
    whole, torn, notice, after = (tmp_path / "e.jsonl").read_text().splitlines()
    assert json.loads(whole)["step"] == 1
    with pytest.raises(ValueError, match=r"Unterminated|Expecting|delimiter"):
        json.loads(torn)
    assert json.loads(notice)["lost"] == 1
    assert json.loads(after)["step"] == 3


def test_the_torn_line_of_a_killed_predecessor_swallows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text('{"mono": 1.0, "wa')
    sink = writer(path)
    sink(Event("start"))
    sink.close()
    assert json.loads(path.read_text().splitlines()[1])["kind"] == "start"


# ---- the budget ------------------------------------------------------------------------------------------------------
def test_a_fast_logger_is_merged_by_weight_and_others_are_not(tmp_path: Path) -> None:
    sink = writer(tmp_path / "e.jsonl")
    for step in range(1, 2001):
        sink(log(step, weight=step, loss=float(step)))
        if step % 500 == 0:
            sink(Event("step", step))
    sink.close()
    lines = strict(tmp_path / "e.jsonl")
    logs = [line for line in lines if line["kind"] == "log"]
    assert len(logs) <= 400
    assert sum(line.get("count", 1) for line in logs) == 2000
    assert sum(line["weight"] for line in logs) == sum(range(1, 2001))
    mean = sum(line["weight"] * line["values"]["loss"] for line in logs) / sum(line["weight"] for line in logs)
    assert mean == pytest.approx(sum(s * s for s in range(1, 2001)) / sum(range(1, 2001)))
    assert logs[-1]["step"] == 2000
    assert [line["step"] for line in lines if line["kind"] == "step"] == [500, 1000, 1500, 2000]


def test_a_slow_logger_keeps_every_line(tmp_path: Path) -> None:
    sink = writer(tmp_path / "e.jsonl")
    for step in range(40):
        sink(log(step, loss=step))
    sink.close()
    assert [line["step"] for line in strict(tmp_path / "e.jsonl")] == list(range(40))


def test_merging_keeps_a_nan_and_the_last_text(tmp_path: Path) -> None:
    sink = writer(tmp_path / "e.jsonl")
    for step in range(400):
        sink(log(step, loss=math.nan if step == 3 else 1.0, phase=f"p{step}"))
    sink.close()
    logs = strict(tmp_path / "e.jsonl")
    assert [line["values"]["loss"] for line in logs].count("nan") == 1
    assert logs[-1]["values"]["phase"] == "p399"


# ---- the tail --------------------------------------------------------------------------------------------------------
def line(rank: int, step: int, kind: str = "log", wall: float = 1.0, **data: Any) -> str:
    return json.dumps({"name": f"worker-{rank}", "wall": wall, "step": step, "kind": kind, **data}) + "\n"


def append(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(text)


def test_the_global_value_is_the_weighted_mean_of_the_step_that_all_have_reached(tmp_path: Path) -> None:
    values = Values(tmp_path, 2)
    append(tmp_path / "worker-0.jsonl", line(0, 1, values={"loss": 1.0}, weight=3))
    append(tmp_path / "worker-1.jsonl", line(1, 1, values={"loss": 5.0}, weight=1))
    values.poll()
    assert values.latest() == {"loss": 2.0}
    append(tmp_path / "worker-0.jsonl", line(0, 2, values={"loss": 100.0}, weight=3))
    values.poll()
    assert values.latest() == {"loss": 2.0}  # rank 1 has not said its part of step 2
    append(tmp_path / "worker-1.jsonl", line(1, 2, values={"loss": 0.0}, weight=1))
    values.poll()
    assert values.latest() == {"loss": 75.0}


def test_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    values = Values([tmp_path / "worker-0.jsonl"], 1)
    values.poll()
    assert values.latest() == {}
    text = line(0, 1, values={"loss": 1.5}, weight=1)
    append(tmp_path / "worker-0.jsonl", text[:20])
    values.poll()
    assert values.latest() == {}
    append(tmp_path / "worker-0.jsonl", text[20:])
    values.poll()
    assert values.latest() == {"loss": 1.5}


def test_garbage_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    append(
        tmp_path / "worker-0.jsonl", '{"mono": 1\n[1]\n{"kind":"log","step":"x"}\n\xff\n' + line(0, 1, "end", ok=True)
    )
    values = Values(tmp_path, 1)
    values.drain()
    assert [event["ok"] for event in values.ends] == [True]


def test_faults_notices_and_ends_are_listed(tmp_path: Path) -> None:
    text = line(0, 1, "notice", code="PL409") + line(0, 2, "fault", type="ValueError") + line(0, 2, "end", ok=False)
    append(tmp_path / "worker-0.jsonl", text)
    values = Values(tmp_path, 1)
    values.drain()
    assert (values.notices[0]["code"], values.faults[0]["type"], values.ends[0]["ok"]) == ("PL409", "ValueError", False)


def test_a_nan_is_shown_and_text_is_not(tmp_path: Path) -> None:
    values = Values(tmp_path, 1)
    for step, value in enumerate([0.5, "nan"]):
        append(tmp_path / "worker-0.jsonl", line(0, step, values={"loss": value, "text": "x"}, weight=1))
    values.drain()
    assert math.isnan(values.latest()["loss"])
    assert math.isnan(values.final()["loss"])
    assert "text" not in values.final()


def test_a_rank_that_has_not_been_read_is_waited_for_and_one_that_is_silent_is_not(tmp_path: Path) -> None:
    values = Values(tmp_path, 2)
    append(tmp_path / "worker-1.jsonl", line(1, 0, "start"))
    append(tmp_path / "worker-0.jsonl", line(0, 9, wall=9.0, values={"loss": 3.0}, weight=1))
    values.drain()
    assert values.latest() == {}
    assert values.latest({"worker-0"}) == {"loss": 3.0}  # the other one does not take part
    append(tmp_path / "worker-0.jsonl", line(0, 9, "step", wall=11.5))
    values.drain()
    assert values.latest() == {"loss": 3.0}


@pytest.mark.parametrize("later", [line(1, 10, "step"), line(1, 9, "end")], ids=["goes on", "ended"])
def test_a_rank_that_goes_on_without_a_word_is_not_waited_for(later: str, tmp_path: Path) -> None:
    append(tmp_path / "worker-0.jsonl", line(0, 9, values={"accuracy": 3.0}, weight=1))
    append(tmp_path / "worker-1.jsonl", later)
    values = Values(tmp_path, 2)
    values.drain()
    assert values.latest() == {"accuracy": 3.0}


def test_weights_of_zero_fall_back_to_the_plain_mean(tmp_path: Path) -> None:
    append(
        tmp_path / "worker-0.jsonl", line(0, 1, values={"a": 1.0}, weight=0) + line(0, 1, values={"a": 3.0}, weight=0)
    )
    values = Values(tmp_path, 1)
    values.drain()
    assert values.latest() == {"a": 2.0}


def test_lines_of_different_lengths_are_taken_together_from_cut_to_cut(tmp_path: Path) -> None:
    """The last line of one rank is a merge of two steps, that of the other is one step."""
    lines = [line(0, 1, values={"loss": 7.0}, weight=9), line(0, 3, values={"loss": 1.0}, weight=2, count=2)]
    append(tmp_path / "worker-0.jsonl", "".join(lines))
    append(tmp_path / "worker-1.jsonl", "".join(line(1, step, values={"loss": 4.0}, weight=1) for step in (1, 2, 3)))
    append(tmp_path / "worker-1.jsonl", line(1, 4, values={"loss": 100.0}, weight=1))
    values = Values(tmp_path, 2)
    values.drain()
    assert values.latest() == {"loss": 2.5}


def test_ranks_that_merge_differently_are_never_compared_over_different_steps(tmp_path: Path) -> None:
    """One rank logs 0 and the other 1, so every mean over equal steps is a half."""
    values, shown = Values(tmp_path, 2), 0
    sinks = [
        EventWriter(tmp_path / f"worker-{rank}.jsonl", name=f"worker-{rank}", incarnation="0" * 32) for rank in range(2)
    ]
    for sink in sinks:
        sink(Event("start"))
        sink.flush()
    for step in range(1, 1200):
        for rank, sink in enumerate(sinks):
            about = {"values": {"loss": rank}, "weight": 1.0 + step, "epoch": step // 100}
            sink(Event("log", step, about))
            if step % (173, 211)[rank] == 0:
                sink.flush()
        values.poll()
        if latest := values.latest():
            shown += 1
            assert latest == {"loss": 0.5}, step
    for sink in sinks:
        sink(Event("end", 1199, {"epoch": 11}))
        sink.close()
    assert shown > 100
    assert any("count" in line for line in strict(tmp_path / "worker-0.jsonl"))
    values.drain()
    assert values.final() == {"loss": 0.5}
    last = [line for line in strict(tmp_path / "worker-1.jsonl") if line["kind"] == "log"][-1]
    assert (last["step"], last["epoch"], last.get("count")) == (1199, 11, None)


def test_long_runs_know_their_end_though_not_all_their_steps(tmp_path: Path) -> None:
    append(tmp_path / "worker-0.jsonl", "".join(line(0, n, values={"loss": n}, weight=1) for n in range(5000)))
    values = Values(tmp_path, 1)
    values.drain()
    assert values.final() == {"loss": 4999}


def test_an_epoch_has_ended_when_all_have_left_it(tmp_path: Path) -> None:
    values, both = Values(tmp_path, 2), {"worker-0", "worker-1"}
    for rank in range(2):
        append(tmp_path / f"worker-{rank}.jsonl", line(rank, 1, epoch=0, values={"loss": 1.0 + rank}, weight=1))
        append(tmp_path / f"worker-{rank}.jsonl", line(rank, 2, epoch=0, values={"loss": 5.0 + rank}, weight=1))
    append(tmp_path / "worker-0.jsonl", line(0, 3, epoch=1, values={"loss": 9.0}, weight=1))
    values.poll()
    assert values.ended(both) is None
    append(tmp_path / "worker-1.jsonl", line(1, 3, epoch=1, values={"loss": 9.0}, weight=1))
    append(tmp_path / "worker-2.jsonl", line(2, 0, "start"))  # of one that is still starting
    values.poll()
    assert values.ended(both) == Ended(0, 2, {"loss": 5.5})
    assert values.ended(both) is None
    assert values.last_epoch() == Ended(1, 3, {"loss": 9.0})
    assert values.last_epoch() is None


def test_the_rate_is_that_between_the_first_step_and_the_last(tmp_path: Path) -> None:
    values = Values(tmp_path, 1)
    assert values.rate is None
    for step, mono in ((1, 100.0), (5, 101.0), (21, 102.0)):
        append(tmp_path / "worker-0.jsonl", line(0, step, "step", mono=mono, samples=32 * step))
    values.drain()
    assert values.rate == (10.0, 320.0)


def test_writer_and_tail_agree(tmp_path: Path) -> None:
    for rank in range(2):
        sink = EventWriter(tmp_path / f"worker-{rank}.jsonl", name=f"worker-{rank}", incarnation="0" * 32)
        sink(log(1, weight=rank + 1, loss=torch.tensor(float(rank))))
        sink.close()
    values = Values(tmp_path, 2)
    values.drain()
    assert values.latest() == {"loss": pytest.approx(2 / 3)}
