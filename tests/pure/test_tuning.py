"""What every rank is given, and how many there may be."""

from __future__ import annotations

import resource

import pytest

from paceline.launch.tuning import Machine, check_processes, choose
from paceline.terms.errors import UsageError

GIB = 1 << 30
BOX = Machine(cores=8, memory=64 * GIB, glibc=True)


def test_ranks_share_the_cores() -> None:
    assert choose(BOX, 2, {}).threads == 4
    assert choose(BOX, 3, {}).threads == 2
    assert choose(BOX, 16, {}).threads == 1
    assert dict(choose(BOX, 2, {}).given)["OMP_NUM_THREADS"] == "4"


def test_threads_that_outnumber_the_cores_sleep_while_they_wait() -> None:
    assert "OMP_WAIT_POLICY" not in dict(choose(BOX, 2, {}).given)
    assert "OMP_WAIT_POLICY" not in dict(choose(BOX, 16, {}).given)  # one thread waits for nobody
    assert dict(choose(BOX, 4, {}, threads=4).given)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert dict(choose(BOX, 2, {}, servers=1).given)["OMP_WAIT_POLICY"] == "PASSIVE"  # or they keep a server waiting
    assert choose(BOX, 2, {}, servers=1).threads == 4


def test_the_user_s_environment_is_left_alone_and_said() -> None:
    settings = choose(BOX, 2, {"OMP_NUM_THREADS": "3", "MALLOC_TOP_PAD_": "1", "HOME": "/"})
    assert settings.threads == 3
    assert settings.kept == ("OMP_NUM_THREADS", "MALLOC_TOP_PAD_")
    assert not {"OMP_NUM_THREADS", "MALLOC_TOP_PAD_"} & dict(settings.given).keys()
    assert "left as you set it: OMP_NUM_THREADS MALLOC_TOP_PAD_" in str(settings)


def test_flags_are_stronger_than_the_environment() -> None:
    environ = {"OMP_NUM_THREADS": "3"}
    assert dict(choose(BOX, 2, environ, threads=5).given)["OMP_NUM_THREADS"] == "5"
    settings = choose(BOX, 2, environ, overrides={"OMP_NUM_THREADS": "6", "FOO": "bar"})
    assert (settings.threads, dict(settings.given)["FOO"]) == (6, "bar")
    assert dict(choose(BOX, 2, {}, overrides={"MALLOC_MMAP_MAX_": "65536"}).given)["MALLOC_MMAP_MAX_"] == "65536"


def test_what_the_heap_may_keep_is_bounded() -> None:
    assert dict(choose(BOX, 2, {}).given)["MALLOC_TRIM_THRESHOLD_"] == str(GIB)
    small = Machine(cores=2, memory=4 * GIB, glibc=True)
    assert int(dict(choose(small, 4, {}).given)["MALLOC_TRIM_THRESHOLD_"]) == GIB // 8
    other = Machine(cores=2, memory=4 * GIB, glibc=False)
    assert not [name for name, _ in choose(other, 4, {}).given if name.startswith("MALLOC")]


@pytest.mark.parametrize("processes", [0, -1, 1025, 10**9])
def test_impossible_numbers_are_refused(processes: int) -> None:
    with pytest.raises(UsageError) as refused:
        check_processes(processes)
    assert refused.value.code == "PL103"
    assert str(processes) in refused.value.message


def test_the_limit_of_files_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (256, 256), resource.RLIMIT_NPROC: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    check_processes(32)
    with pytest.raises(UsageError, match="256 files"):
        check_processes(33)
