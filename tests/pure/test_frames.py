"""Framing and greeting without a socket: what is sent arrives, and nothing else does."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline.group import keys
from paceline.group.frames import (
    ANY,
    CHECKSUM,
    HEADER,
    MAGIC,
    NO_KEY,
    PIECE,
    TAG,
    VERSION,
    Cap,
    Frame,
    Inbox,
    Meta,
    Outbox,
    decode,
    encode,
    head,
)
from paceline.terms.errors import WireError

KEY, OTHER = bytes(range(32)), bytes(32)
CAPS = {ANY: Cap(1 << 16, 1 << 22), 3: Cap(100), 4: Cap(10, 5)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
METAS = st.dictionaries(st.text(max_size=5).filter(lambda key: key != "buffers"), JSON, max_size=4)
FRAMES = st.tuples(st.integers(5, 255), METAS, st.lists(st.binary(max_size=40), max_size=3))


def stream(frames: Sequence[tuple[int, Meta, Sequence[bytes]]], key: bytes = KEY, step: int = 7) -> bytes:
    """The bytes of frames, as they travel."""
    outbox, sent = Outbox(key), b""
    for kind, meta, buffers in frames:
        outbox.put(kind, meta, [memoryview(buffer) for buffer in buffers])
    while pieces := outbox.pieces():
        sent += bytes(pieces[0][:step])
        outbox.sent(min(step, len(pieces[0])))
    return sent


def feed(inbox: Inbox, data: bytes, rng: random.Random | None = None) -> Iterator[Frame]:
    """The frames that come out when bytes come in, in pieces of any length."""
    at = 0
    while at < len(data):
        want = inbox.want()
        count = min(len(want), len(data) - at, rng.randint(1, 30) if rng else 1 << 30)
        want[:count] = data[at : at + count]
        at += count
        frame = inbox.got(count)
        if frame is not None:
            yield frame


def refusal(data: bytes, caps: Any = CAPS) -> str:
    with pytest.raises(WireError) as refused:
        list(feed(Inbox(KEY, caps), data))
    assert refused.value.code == "PL432"
    return refused.value.message


def until_refused(data: bytes) -> list[Any]:
    """The frames before the refusal, if there is one: a changed length may also make the inbox wait for more."""
    came: list[Any] = []
    with suppress(WireError):
        came.extend((f.kind, f.meta, [bytes(b) for b in f.buffers]) for f in feed(Inbox(KEY, CAPS), data))
    return came


@contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """No more memory than this is taken inside of the block, even for a moment."""
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        yield
        assert tracemalloc.get_traced_memory()[1] - before < nbytes
    finally:
        tracemalloc.stop()


# ---- frames ---------------------------------------------------------------------------------------------------------
@given(st.lists(FRAMES, max_size=4), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_what_is_put_comes_out(frames: list[tuple[int, Meta, list[bytes]]], rng: random.Random) -> None:
    came = [(f.kind, f.meta, [bytes(b) for b in f.buffers]) for f in feed(Inbox(KEY, CAPS), stream(frames), rng)]
    assert came == frames


def test_bulk_goes_where_it_shall_lie() -> None:
    memory = bytearray(3 * PIECE)
    asked = []

    def place(kind: int, meta: Meta, lengths: Sequence[int]) -> list[memoryview]:
        asked.append((kind, meta, list(lengths)))
        return [memoryview(memory)[: lengths[0]], memoryview(memory)[lengths[0] :]]

    bulk = random.Random(1).randbytes(3 * PIECE)
    sent = stream([(9, {"a": 1}, [bulk[:10], bulk[10:]])], step=1 << 16)
    (frame,) = feed(Inbox(KEY, CAPS, place), sent)
    assert memory == bulk
    assert frame.buffers[1].obj is memory
    assert asked == [(9, {"a": 1}, [10, 3 * PIECE - 10])]


def test_urgent_frames_overtake_others_between_frames() -> None:
    outbox, left = Outbox(KEY), []
    for number in range(3):
        outbox.put(9, {"n": number}, [memoryview(bytes(1 << 18))], done=lambda n=number: left.append(n))
    sent = bytes(outbox.pieces()[0])
    outbox.sent(len(sent))
    outbox.put(9, {"n": "urgent"}, urgent=True)
    while pieces := outbox.pieces():
        sent += bytes(pieces[0])
        outbox.sent(len(pieces[0]))
    assert [frame.meta["n"] for frame in feed(Inbox(KEY, CAPS), sent)] == [0, "urgent", 1, 2]
    assert left == [0, 1, 2]


def test_any_flipped_bit_is_refused() -> None:
    """All of a small frame's bits; of each stream, what came before the flip is right, and what is behind it never comes."""
    frames = [(9, {"a": 1}, [b"first"]), (9, {"b": 2}, [b"second", b""]), (7, {}, [])]
    whole = stream(frames)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        came = until_refused(bytes(flipped))
        assert came == frames[: len(came)]
        assert len(came) < 3


def test_frames_come_in_their_order_once_and_from_the_other_side() -> None:
    first, second = stream([(9, {"n": 1}, [b"x"])]), stream([(9, {"n": 1}, [b"x"]), (9, {"n": 2}, [])])
    second = second[len(first) :]
    assert "tag" in refusal(first + first)
    assert "tag" in refusal(second)
    assert "tag" in refusal(stream([(9, {}, [])], OTHER))
    assert [f.meta["n"] for f in feed(Inbox(KEY, CAPS), first + second)] == [1, 2]


@pytest.mark.parametrize("end", ["meta", "bulk"])
@pytest.mark.parametrize("nbytes", [1 << 23, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_an_oversize_frame_is_refused_from_its_header(end: str, nbytes: int) -> None:
    sizes = (min(nbytes, (1 << 32) - 1), 0) if end == "meta" else (2, nbytes)
    inbox = Inbox(KEY, CAPS, place=lambda *_: pytest.fail("asked for memory"))
    with at_most(1 << 14), pytest.raises(WireError, match="may have"):
        list(feed(inbox, HEADER.pack(MAGIC, VERSION, 9, 0, *sizes)))


def test_caps_are_those_of_the_kind() -> None:
    assert "may have" in refusal(head(3, {}, [1], KEY, 0))
    assert "may have" in refusal(head(4, {"a": "0123456789"}, [], KEY, 0))
    assert "may have" in refusal(head(4, {}, [6], KEY, 0))
    assert "no place" in refusal(head(5, {}, [], KEY, 0), {4: Cap(10)})
    for start in ((MAGIC + 1, VERSION, 9, 0), (MAGIC, VERSION + 1, 9, 0), (MAGIC, VERSION, 9, 1)):
        assert "begin" in refusal(HEADER.pack(*start, 2, 0))


def signed(body: bytes, bulk: int = 0) -> bytes:
    """A frame with any bytes as its meta, and a right tag."""
    return head(9, _Raw(body), [bulk] if bulk else [], KEY, 0)


class _Raw(dict[str, Any]):
    """Stands for bytes where a meta is expected."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.body = body


@pytest.fixture(autouse=True)
def _raw_metas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "paceline.group.frames.encode", lambda meta: meta.body if isinstance(meta, _Raw) else encode(meta)
    )


def test_a_meta_is_an_object_of_bounded_depth() -> None:
    deep = b'{"a":' * 33 + b"1" + b"}" * 33
    assert decode(deep[5:-1])
    for body in (b"", b"{", b"[]", b"1", b"nul", b'"a"', b"\xff\xfe", b'{"a":1}}', b"1" * 5000, b'{"a":' + b"9" * 5000):
        assert "JSON" in refusal(signed(body)) or "object" in refusal(signed(body))
    for body in (deep, b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}", b"[" * 60_000, b'{"a":' * 10_000):
        with at_most(1 << 24):
            assert "nested" in refusal(signed(body)) or "JSON" in refusal(signed(body))
    assert decode(b'{"a":[[[]]]}' + b" " * 9) == {"a": [[[]]]}
    text = {"a": "[{" * 1000}
    assert decode(encode(text)) == text


@pytest.mark.parametrize(
    "told", [b"[4]", b"[6]", b"[-1,6]", b"[5.0]", b"[true,4]", b"5", b"{}", b"null", b"[[5]]", b"[]"]
)
def test_the_lengths_are_those_of_the_bulk(told: bytes) -> None:
    body = b'{"buffers":' + told + b"}"
    start = HEADER.pack(MAGIC, VERSION, 9, 0, len(body), 5) + body
    from paceline.group import frames

    assert "lengths" in refusal(start + frames._tag(KEY, 0, start) + bytes(5 + CHECKSUM))


def test_too_many_buffers_are_refused() -> None:
    assert "lengths" in refusal(head(9, {}, [0] * 5000, KEY, 0))


@given(st.binary(max_size=200), st.sampled_from([b"", HEADER.pack(MAGIC, VERSION, 9, 0, 30, 0), b"GET / HTTP/1.1\r\n"]))
@settings(deadline=None)
@example(b"\0" * (30 + TAG), HEADER.pack(MAGIC, VERSION, 9, 0, 30, 0))
def test_garbage_is_refused_or_waited_for(data: bytes, start: bytes) -> None:
    assert until_refused(start + data) == []


# ---- the greeting ---------------------------------------------------------------------------------------------------
SECRET = bytes(range(32))
Talk = Generator[Any, Frame, keys.Session]


def client(secret: bytes = SECRET, nonce: bytes = b"c" * 32) -> Talk:
    return keys.greet(secret, "worker", {"name": "worker-1"}, nonce)


def server(secret: bytes = SECRET, nonce: bytes = b"s" * 32, refuse: str = "") -> Talk:
    return keys.answer(secret, "coordinator", {"epoch": 3}, nonce, lambda role, about: refuse)


def meet(one: Talk, other: Talk, tamper: Any = lambda number, message: message) -> tuple[Any, Any]:
    """Let two sides talk; their sessions or errors. `tamper` sees each message on its way."""
    ends: list[Any] = [None, None]
    talks, message, number = (one, other), next(one), 0
    next(other)
    while message is not None:
        number += 1
        kind, meta = tamper(number, message)
        to = number % 2
        message = None
        try:
            message = talks[to].send(Frame(kind, decode(encode(meta))))
        except StopIteration as end:
            ends[to] = end.value
            message = end.value.last
        except WireError as error:
            ends[to] = error
            if ends[1 - to] is None:
                message = (keys.REFUSED, {})
    return ends[0], ends[1]


def test_two_sides_that_know_the_secret_get_the_same_keys() -> None:
    mine, theirs = meet(client(), server())
    assert (mine.role, mine.about, theirs.role, theirs.about) == (
        "coordinator",
        {"epoch": 3},
        "worker",
        {"name": "worker-1"},
    )
    assert mine.send_key == theirs.receive_key != mine.receive_key == theirs.send_key
    again, _ = meet(client(nonce=b"d" * 32), server())
    assert not {again.send_key, again.receive_key} & {mine.send_key, mine.receive_key}


def test_a_reason_to_refuse_is_told_only_to_who_knows_the_secret() -> None:
    mine, theirs = meet(client(), server(refuse="epoch 2 is over"))
    assert (mine.code, theirs.refused) == ("PL436", "epoch 2 is over")
    assert "epoch 2 is over" in mine.message
    mine, theirs = meet(client(secret=bytes(32)), server(refuse="epoch 2 is over"))
    assert (mine.code, theirs.code) == ("PL430", "PL430")
    assert "epoch" not in mine.message


@given(st.integers(1, 4), st.sampled_from(["nonce", "role", "about", "proof", "refused", "more", "kind"]), JSON)
@settings(deadline=None, max_examples=300)
def test_no_message_can_be_changed(number: int, field: str, value: Any) -> None:
    """Whoever sits between the two and changes anything: at least one of them notices, and neither is fooled."""
    changed = []

    def tamper(at: int, message: tuple[int, Meta]) -> tuple[int, Meta]:
        kind, meta = message
        if at == number and field == "kind":
            changed.append(True)
            return kind % 5 + 1, meta
        if at == number and meta.get(field, "missing") != value:
            changed.append(True)
            return kind, {**meta, field: value}
        return message

    mine, theirs = meet(client(), server(), tamper)
    if changed and not (number == 3 and field != "proof") and not (number == 2 and field not in ("nonce", "kind")):
        assert isinstance(mine, WireError) or isinstance(theirs, WireError)
    for end in (mine, theirs):
        assert isinstance(end, WireError) or end.about in ({"epoch": 3}, {"name": "worker-1"})


def test_what_is_sent_back_proves_nothing() -> None:
    """A server that only repeats what the client says; a client that repeats what the server says; nonces that are equal."""
    talk = client()
    kind, hello = next(talk)
    for echo in (Frame(keys.CHALLENGE, {"nonce": hello["nonce"]}), Frame(kind, hello), Frame(keys.PROOF, hello)):
        talk = client()
        next(talk)
        with pytest.raises(WireError, match="PL430"):
            talk.send(echo)
    talk = client()
    next(talk)
    _, proof = talk.send(Frame(keys.CHALLENGE, {"nonce": "00" * 32}))
    with pytest.raises(WireError, match="PL430"):
        talk.send(Frame(keys.WELCOME, {"role": "x", "about": {}, **proof}))


def test_a_recorded_session_opens_nothing() -> None:
    recorded: list[tuple[int, Meta]] = []

    def record(number: int, message: tuple[int, Meta]) -> tuple[int, Meta]:
        recorded.append(message)
        return message

    meet(client(), server(), record)
    talk = server(nonce=b"t" * 32)
    next(talk)
    talk.send(Frame(*recorded[0]))
    with pytest.raises(WireError, match="PL430"):
        talk.send(Frame(*recorded[2]))


@pytest.mark.parametrize("nonce", [None, "", "00" * 31, "zz" * 32, 7, "é" * 64], ids=range(6))
def test_a_nonce_is_32_bytes(nonce: Any) -> None:
    talk = server()
    next(talk)
    with pytest.raises(WireError, match="PL430"):
        talk.send(Frame(keys.HELLO, {"role": "worker", "about": {}, "nonce": nonce}))


# ---- the certificate ------------------------------------------------------------------------------------------------
def test_ed25519_as_in_rfc_8032() -> None:
    seed = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
    public = keys._public(seed)
    assert public.hex() == "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
    signature = "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
    signature += "4a7c15e9716ed28dc027beceea1ec40a"
    assert keys._sign(seed, public, bytes.fromhex("af82")).hex() == signature


def test_the_certificate_follows_from_the_secret() -> None:
    made, pem = keys.certificate(SECRET)
    assert (made, pem) == keys.certificate(SECRET)
    assert keys.certificate(bytes(32))[0] != made
    assert SECRET not in made
    assert NO_KEY not in made
