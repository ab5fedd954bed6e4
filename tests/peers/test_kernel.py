"""The C kernel is built once, by whoever comes first, into a place that only its user can write; or its absence is said aloud."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from paceline.group import kernel
from paceline.group.shm_wire import ShmWire
from paceline.terms.errors import WireError
from support.peers import Peer, run_peers


def build(peer: Peer, cache: str) -> str:
    return kernel.load(Path(cache)).path.name


def test_ranks_that_build_at_once_share_one_library(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (name,) = set(run_peers(build, 3, cache=str(cache)))
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]
    assert (cache / name).exists()
    assert cache.stat().st_mode & 0o777 == 0o700
    before = (cache / name).stat().st_mtime_ns
    assert kernel.load(cache).path == cache / name
    assert (cache / name).stat().st_mtime_ns == before


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "some-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    broken = fake_compiler(tmp_path, '[ "$1" = --version ] && exit 0; echo "no such header" >&2; exit 1')
    with pytest.raises(WireError, match="no such header") as caught:
        kernel.load(tmp_path / "cache", [broken])
    assert caught.value.code == "PL206"
    useless = fake_compiler(
        tmp_path, 'while [ "$1" != -o ]; do [ $# = 0 ] && exit 0; shift; done; echo no library > "$2"'
    )
    with pytest.raises(WireError, match="cannot be loaded"):
        kernel.load(tmp_path / "cache", [useless])
    with pytest.raises(WireError, match="no C compiler here"):
        kernel.load(tmp_path / "cache", [str(tmp_path / "none")])


def test_a_directory_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    assert kernel.load(cache).path.parent != cache
    assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    assert kernel.load(tmp_path / "file" / "below").path.name.startswith("kernel-")


def without_compiler(peer: Peer) -> list[object]:
    with warnings.catch_warnings(record=True) as seen:
        wire = ShmWire(peer.arena_fd, peer.rank, peer.size, peer.board, peer.activity)
    answers = wire.gather_bytes("it works", b"%d" % peer.rank)
    wire.close()
    return [[str(each.message) for each in seen], wire.notice, [each.decode() for each in answers]]


def test_without_a_compiler_one_rank_says_so(tmp_path: Path) -> None:
    first, second = run_peers(without_compiler, 2, env={"PATH": os.fspath(tmp_path)})
    notice = "shared memory works without its C kernel, which is slower: the C kernel is not available: there is no C compiler"
    assert first[0][0].startswith(notice)
    assert second[0] == []
    assert first[1] == second[1] == first[0][0]
    assert first[2] == second[2] == ["0", "1"]
