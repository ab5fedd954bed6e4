"""The rendezvous: its table, what it does with nonsense, and that it serves c10d."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import PrefixStore

from paceline.group.store import UnixStore
from paceline.group.store_server import StoreServer
from paceline.group.store_table import MAX_BODY, MAX_TABLE, Garbage, Op, Request, Status, Table, pack_request
from paceline.terms.errors import WireError

SOON = timedelta(seconds=20)


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pl-") as directory:
        yield Path(directory) / "d" / "s"


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(SOON.total_seconds())
    connection.connect(str(path))
    return connection


# ---- the table ------------------------------------------------------------------------------------------------------
def test_the_table() -> None:
    table = Table()
    assert table.answer(Op.GET, (b"k",)) is None
    assert table.answer(Op.SET, (b"k", b"v")) == (Status.OK, b"")
    assert table.answer(Op.GET, (b"k",)) == (Status.OK, b"v")
    assert table.answer(Op.WAIT, (b"k", b"other")) is None
    assert table.answer(Op.CHECK, (b"k",)) == (Status.OK, b"1")
    assert table.answer(Op.CHECK, (b"k", b"other")) == (Status.OK, b"0")
    assert [table.answer(Op.ADD, (b"n", amount)) for amount in (b"3", b"-5")] == [(Status.OK, b"3"), (Status.OK, b"-2")]
    assert table.answer(Op.ADD, (b"k", b"1")) == (Status.REFUSED, b"not a number")
    assert table.answer(Op.COUNT, ()) == (Status.OK, b"2")
    assert [table.answer(Op.DELETE, (b"k",)) for _ in range(2)] == [(Status.OK, b"1"), (Status.OK, b"0")]


def test_compare_set_follows_c10d() -> None:
    table = Table()
    steps = [((b"", b"a"), b"a"), ((b"x", b"b"), b"a"), ((b"a", b"b"), b"b")]
    assert [table.answer(Op.COMPARE_SET, (b"k", *pair)) for pair, _ in steps] == [
        (Status.OK, said) for _, said in steps
    ]
    assert table.answer(Op.COMPARE_SET, (b"none", b"x", b"y")) == (Status.OK, b"x")
    assert table.answer(Op.CHECK, (b"none",)) == (Status.OK, b"0")


def test_the_table_has_an_end() -> None:
    table, value = Table(), bytes(MAX_BODY)
    answers = [table.answer(Op.SET, (b"%d" % i, value)) for i in range(MAX_TABLE // MAX_BODY + 1)]
    assert [answer[0] for answer in answers if answer is not None].count(Status.REFUSED) >= 1
    assert table.answer(Op.DELETE, (b"0",)) == (Status.OK, b"1")
    assert table.answer(Op.SET, (b"again", value)) == (Status.OK, b"")


# ---- bytes ----------------------------------------------------------------------------------------------------------
@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(0, 10**9))
def test_a_request_comes_back_as_it_went(fields: list[bytes], wait_ms: int) -> None:
    raw = bytearray(pack_request(Op.WAIT, fields, wait_ms))
    for cut in range(0, len(raw), 7):
        assert Request.take(raw[:cut]) is None
    inbox = raw + raw
    assert Request.take(inbox) == Request.take(inbox) == Request(Op.WAIT, tuple(fields), wait_ms)
    assert not inbox


@given(st.binary(max_size=200))
def test_nonsense_is_incomplete_or_garbage(data: bytes) -> None:
    try:
        assert Request.take(bytearray(data)) is None
    except Garbage:
        pass


def test_lengths_are_capped_before_anything_is_read() -> None:
    head = struct.Struct("<4sBHIq")
    for bad in (
        head.pack(b"PLs1", Op.SET, 2, MAX_BODY + 1, 0),
        head.pack(b"PLs1", Op.SET, 5000, 8, 0),
        head.pack(b"PLs1", 99, 0, 0, 0),
        head.pack(b"PLs1", Op.GET, 1, 8, 0) + struct.pack("<I", 1 << 31) + b"xxxx",
        head.pack(b"PLs1", Op.SET, 1, 4, 0) + struct.pack("<I", 0),
        b"GET / HTTP/1.1\r\n",
    ):
        with pytest.raises(Garbage):
            Request.take(bytearray(bad))
    with pytest.raises(ValueError, match="limits"):
        pack_request(Op.SET, [b"k", bytes(MAX_BODY)])


# ---- served ---------------------------------------------------------------------------------------------------------
def test_it_serves_c10d(path: Path) -> None:
    with StoreServer(path), closing(UnixStore(path, SOON)) as first, closing(UnixStore(path, SOON)) as second:
        here, there = PrefixStore("p", first), PrefixStore("p", second)
        here.set("k", "v")
        here.set("big", "x" * 3_000_000)
        assert there.get("k") == b"v"
        assert len(there.get("big")) == 3_000_000
        assert (here.add("n", 2), there.add("n", -5)) == (2, -3)
        assert [there.check(keys) for keys in (["k", "n"], ["k", "none"])] == [True, False]
        assert there.compare_set("c", "", "x") == b"x"
        assert (first.num_keys(), there.delete_key("k"), here.delete_key("k")) == (4, True, False)
        with closing(first.clone()) as third:
            assert third.get("p/n") == b"-3"


def test_a_get_waits_for_its_key(path: Path) -> None:
    with StoreServer(path), closing(UnixStore(path, SOON)) as first, closing(UnixStore(path, SOON)) as second:
        found: list[bytes] = []
        waiting = threading.Thread(target=lambda: found.append(first.get("later")))
        waiting.start()
        second.set("later", "now")
        waiting.join(SOON.total_seconds())
        assert found == [b"now"]


def test_a_get_ends_at_its_deadline(path: Path) -> None:
    with StoreServer(path), closing(UnixStore(path, timedelta(milliseconds=30))) as store:
        for call in (
            lambda: store.get("never"),
            lambda: store.wait(["a", "b"]),
            lambda: PrefixStore("p", store).get("x"),
        ):
            with pytest.raises(WireError, match=r"PL411: after 0\.03 s nobody has published"):
                call()
        store.set("still", "works")
        assert store.get("still") == b"works"


def test_those_who_wait_are_told_when_the_server_closes(path: Path) -> None:
    server = StoreServer(path)
    with closing(UnixStore(path, SOON)) as store:
        errors: list[str] = []

        def wait() -> None:
            try:
                store.get("never")
            except WireError as error:
                errors.append(error.code)

        waiting = threading.Thread(target=wait)
        waiting.start()
        server.close()
        server.close()
        waiting.join(SOON.total_seconds())
        assert errors == ["PL411"]
        with pytest.raises(WireError, match="PL411"):
            store.set("k", "v")
    with pytest.raises(WireError, match="no rendezvous answers"):
        UnixStore(path)
    assert not path.exists()


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"PLs1" + b"\xff" * 100_000])
def test_garbage_closes_its_own_connection_only(path: Path, junk: bytes) -> None:
    with StoreServer(path), closing(UnixStore(path, SOON)) as store, connect(path) as stranger:
        try:
            stranger.sendall(junk)
            assert stranger.recv(1) == b""
        except ConnectionError:
            pass
        store.set("k", "v")
        assert store.get("k") == b"v"


def test_a_long_wait_or_an_unfinished_request_disturbs_nobody(path: Path) -> None:
    with StoreServer(path), closing(UnixStore(path, SOON)) as store, connect(path) as slow, connect(path) as patient:
        slow.sendall(pack_request(Op.SET, [b"k", b"x" * 1000])[:500])
        patient.sendall(pack_request(Op.GET, [b"never"], (1 << 63) - 1))
        store.set("k", "v")
        assert store.get("k") == b"v"


def test_the_door_is_ours_alone(path: Path) -> None:
    with StoreServer(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(WireError, match=r"PL407.*open to other users"):
        StoreServer(path)


def test_another_user_is_not_served(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says who connects; here it is the server who believes to be somebody else."""
    with StoreServer(path):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with connect(path) as stranger:
            assert stranger.recv(1) == b""


def test_the_server_needs_no_torch() -> None:
    code = "import sys, paceline.group.store_server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
