"""What follows from the secret of a job: proofs, the keys of a connection, and the certificate of its TLS. Pure.

The secret is 32 random bytes that the launcher makes and hands only to the job's processes. It never travels.

Note [greeting]: two sides prove to each other that they know the secret, in four messages.

    client   HELLO      nonce, role, about                      at most 4 KiB, whoever sends it
    server   CHALLENGE  nonce
    client   PROOF      HMAC(proof key of the client, transcript)
    server   WELCOME    HMAC(proof key of the server, transcript | answer), answer = role, about, reason to refuse

Four keys, two for proofs and two for frames (see ``frames``), come out of HKDF-SHA256 (RFC 5869): the salt is both nonces, the
information a label and the transcript, which is the SHA-256 of version, HELLO and CHALLENGE. So a proof fits one connection,
one direction, one job: it cannot be replayed, sent back, or used for another role. The client proves first, and whoever cannot
gets the same 34 bytes whatever was wrong. What a server says of itself, it says after that.

Note [certificate]: TLS needs an authority that both sides trust, and the secret is one. Its Ed25519 key is derived from the
secret, and the certificate from the key (RFC 8032, RFC 5280, RFC 8410), without a random number or a date: each process of a job
makes the same one for itself, shows it, and accepts no other. No file travels, and none is written. Python cannot make
certificates and OpenSSL's program need not be there, so the few lines of arithmetic are here. They run once, at the start.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from hashlib import sha256, sha512
from typing import Any

from paceline.group.frames import VERSION, Cap, Frame, Meta, encode
from paceline.terms.errors import WireError

HELLO, CHALLENGE, PROOF, WELCOME, REFUSED = 1, 2, 3, 4, 5
GREETING = {kind: Cap(4000) for kind in (HELLO, CHALLENGE, PROOF, WELCOME)} | {REFUSED: Cap(2)}
"""What may come before the other side has proved anything."""

SECRET = 32
_NONCE = 32

Message = tuple[int, Meta]
Admit = Callable[[str, Meta], str]
"""Role and about of a client that has proved itself in, a reason to refuse it out; empty when it is welcome."""


@dataclass(frozen=True, slots=True)
class Session:
    """Two sides that know each other.

    Attributes:
        role, about: What the other side says of itself; it knows the secret.
        send_key, receive_key: Of frames.
        refused: Why the server does not want this client, though it knows the secret; empty when it does.
        last: The server's last message, still to be sent.
    """

    role: str
    about: Meta
    send_key: bytes
    receive_key: bytes
    refused: str = ""
    last: Message | None = None


def greet(secret: bytes, role: str, about: Mapping[str, Any], nonce: bytes) -> Generator[Message, Frame, Session]:
    """The client's side: yields messages, is sent frames. See Note [greeting].

    Raises:
        WireError: The other side refuses, or cannot prove that it knows the secret (PL430), or says why it does not want this
            client (PL436).
    """
    hello = {"nonce": nonce.hex(), "role": role, "about": dict(about)}
    challenge = _expect(CHALLENGE, (yield HELLO, hello))
    keys = _Keys(secret, hello, challenge)
    welcome = _expect(WELCOME, (yield PROOF, {"proof": keys.client_proof()}))
    proof, answer = welcome.pop("proof", None), welcome
    if not _equal(proof, keys.server_proof(answer)):
        raise _unproved("it could not prove that it knows the secret")
    their_role, their_about, refused = _introduction(answer)
    if refused:
        raise WireError("PL436", f"the {their_role or 'other side'} does not want this connection: {refused}")
    return Session(their_role, their_about, keys.from_client, keys.from_server)


def answer(
    secret: bytes, role: str, about: Mapping[str, Any], nonce: bytes, admit: Admit
) -> Generator[Message | None, Frame, Session]:
    """The server's side: the first thing it yields is None, since the client begins. Raises WireError PL430."""
    hello = _expect(HELLO, (yield None))
    their_role, their_about, _ = _introduction(hello)
    challenge = {"nonce": nonce.hex()}
    keys = _Keys(secret, hello, challenge)
    proof = _expect(PROOF, (yield CHALLENGE, challenge))
    if not _equal(proof.get("proof"), keys.client_proof()):
        raise _unproved("it could not prove that it knows the secret")
    refused = admit(their_role, their_about)
    said: Meta = {"role": role, "about": dict(about), "refused": refused}
    last = (WELCOME, {**said, "proof": keys.server_proof(said)})
    return Session(their_role, their_about, keys.from_server, keys.from_client, refused, last)


class _Keys:
    """The keys of one connection. Raises WireError PL430 where a nonce is none, or both sides' are the same."""

    def __init__(self, secret: bytes, hello: Meta, challenge: Meta) -> None:
        assert len(secret) == SECRET, "the secret of a job has 32 bytes"
        nonces = [_nonce(hello), _nonce(challenge)]
        if nonces[0] == nonces[1]:
            raise _unproved("it sent back what it was sent")
        parts = (bytes([VERSION]), encode(hello), encode(challenge))
        self._transcript = sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()
        self._extracted = hmac.digest(b"".join(nonces), secret, "sha256")
        self.from_client, self.from_server = self._key("frames of the client"), self._key("frames of the server")

    def client_proof(self) -> str:
        return hmac.digest(self._key("proof of the client"), self._transcript, "sha256").hex()

    def server_proof(self, said: Meta) -> str:
        return hmac.digest(self._key("proof of the server"), self._transcript + encode(said), "sha256").hex()

    def _key(self, label: str) -> bytes:
        return _expand(self._extracted, b"paceline " + label.encode() + self._transcript)


def _expand(key: bytes, information: bytes) -> bytes:
    """The first block of HKDF-Expand."""
    return hmac.digest(key, information + b"\x01", "sha256")


def _expect(kind: int, frame: Frame) -> Meta:
    if frame.kind == REFUSED:
        raise _unproved("it refuses this process")
    if frame.kind != kind:
        raise _unproved("it does not keep to the greeting")
    return frame.meta


def _introduction(meta: Meta) -> tuple[str, Meta, str]:
    role, about, refused = meta.get("role"), meta.get("about"), meta.get("refused", "")
    if not isinstance(role, str) or not isinstance(about, dict) or not isinstance(refused, str):
        raise _unproved("it does not introduce itself")
    return role, about, refused


def _nonce(meta: Meta) -> bytes:
    text = meta.get("nonce")
    try:
        nonce = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        nonce = b""
    if len(nonce) != _NONCE:
        raise _unproved("it sent no nonce")
    return nonce


def _equal(told: Any, proof: str) -> bool:
    return isinstance(told, str) and told.isascii() and hmac.compare_digest(told, proof)


def _unproved(why: str) -> WireError:
    return WireError("PL430", f"the other side was not recognised: {why}")


# ---- the certificate, see Note [certificate] ------------------------------------------------------------------------
def certificate(secret: bytes) -> tuple[bytes, str]:
    """The job's certificate: as DER, and together with its private key as PEM."""
    seed = _expand(hmac.digest(b"paceline tls", secret, "sha256"), b"paceline certificate")
    public = _public(seed)
    algorithm = _der(0x30, _OID_ED25519)
    name = _der(0x30, _der(0x31, _der(0x30, _OID_COMMON_NAME, _der(0x0C, b"paceline job"))))
    signed = _der(
        0x30,
        _der(0xA0, _der(0x02, b"\x02")),  # version 3
        _der(0x02, b"\x01" + sha256(public).digest()[:15]),  # serial number
        algorithm,
        name,
        _der(0x30, _der(0x17, b"000101000000Z"), _der(0x18, b"99991231235959Z")),  # clocks may be wrong
        name,
        _der(0x30, algorithm, _der(0x03, b"\0" + public)),
        _der(0xA3, _der(0x30, _der(0x30, _OID_CONSTRAINTS, _der(0x01, b"\xff"), _der(0x04, _der(0x30, _TRUE))))),
    )
    made = _der(0x30, signed, algorithm, _der(0x03, b"\0" + _sign(seed, public, signed)))
    key = _der(0x30, _der(0x02, b"\0"), algorithm, _der(0x04, _der(0x04, seed)))
    return made, _pem("CERTIFICATE", made) + _pem("PRIVATE KEY", key)


def _der(tag: int, *content: bytes) -> bytes:
    body = b"".join(content)
    size = len(body)
    length = bytes([size]) if size < 0x80 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + body


_OID_ED25519 = _der(0x06, b"\x2b\x65\x70")
_OID_COMMON_NAME = _der(0x06, b"\x55\x04\x03")
_OID_CONSTRAINTS = _der(0x06, b"\x55\x1d\x13")
_TRUE = _der(0x01, b"\xff")


def _pem(what: str, der: bytes) -> str:
    return f"-----BEGIN {what}-----\n{base64.encodebytes(der).decode()}-----END {what}-----\n"


# ---- Ed25519 as in RFC 8032 §5.1, in extended coordinates -----------------------------------------------------------
_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_ORDER = 2**252 + 27742317777372353535851937790883648493
_BASE_X = 15112221349535400772501151409588531511454012693041857206046113283949847762202
_BASE_Y = 4 * pow(5, -1, _P) % _P
_Point = tuple[int, int, int, int]


def _add(a: _Point, b: _Point) -> _Point:
    e = (a[1] - a[0]) * (b[1] - b[0]) % _P
    f = (a[1] + a[0]) * (b[1] + b[0]) % _P
    g, h = 2 * a[3] * b[3] * _D % _P, 2 * a[2] * b[2] % _P
    return (f - e) * (h - g) % _P, (h + g) * (f + e) % _P, (h - g) * (h + g) % _P, (f - e) * (f + e) % _P


def _times_base(number: int) -> bytes:
    """`number` times the base point, compressed."""
    total, power = (0, 1, 1, 0), (_BASE_X, _BASE_Y, 1, _BASE_X * _BASE_Y % _P)
    while number:
        if number & 1:
            total = _add(total, power)
        power, number = _add(power, power), number >> 1
    inverse = pow(total[2], -1, _P)
    x, y = total[0] * inverse % _P, total[1] * inverse % _P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _scalar(seed: bytes) -> tuple[int, bytes]:
    digest = sha512(seed).digest()
    clamped = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | 1 << 254
    return clamped, digest[32:]


def _public(seed: bytes) -> bytes:
    return _times_base(_scalar(seed)[0])


def _sign(seed: bytes, public: bytes, message: bytes) -> bytes:
    scalar, prefix = _scalar(seed)
    number = int.from_bytes(sha512(prefix + message).digest(), "little") % _ORDER
    point = _times_base(number)
    challenge = int.from_bytes(sha512(point + public + message).digest(), "little") % _ORDER
    return point + ((number + challenge * scalar) % _ORDER).to_bytes(32, "little")
