"""Messages between replicas through the database, where others can read and send too.

Invariant: without the secret, nobody can make a message, or learn more than its length, sender and
recipients. HMAC-SHA256 proves a message with all that precedes the proof; the text is enciphered by
SHAKE-256 of a key, the sender and the number, a pair that no other message has. Recipients are
addressed by name. Each connection has a new name, so a recorded message is for no later connection;
those present at the time know its number (`replica_link`).

A payload is base64 of: the sender, its number (8 bytes), the number of recipients (1), these,
whether more follows (1), the text, and the proof.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final, NamedTuple

NAME: Final = 16
"""Bytes of a member's name: its group (`GROUP`) and a random number."""

GROUP: Final = 8

MAX_RECIPIENTS: Final = 64
PIECE: Final = 4_700
"""Bytes of text in one message; a payload must be shorter than 8,000 bytes of base64."""

VERSION: Final = b"2"
"""Version of the messages (`workers.messages`): those of other versions go elsewhere."""

_PROOF: Final = hashlib.sha256().digest_size


class Sealed(NamedTuple):
    """An opened message. `text` may be a piece, with `more` to follow."""

    sender: bytes
    number: int
    recipients: tuple[bytes, ...]
    more: bool
    text: bytes


class Seal:
    """Seals and opens messages, with the secret.

    Attributes:
        channel: where members listen; nobody else can guess it.
        prefix: how the application_name of members begins; the name follows in hexadecimal digits.
    """

    def __init__(self, secret: bytes) -> None:
        def derived(purpose: bytes) -> bytes:
            return hmac.digest(secret, b"pg_background_proxy %b %b" % (VERSION, purpose), "sha256")

        self._prove = derived(b"prove")
        self._encipher = derived(b"encipher")
        self.channel = f"pgbg_{derived(b'channel').hex()[:32]}"
        self.prefix = f"pg-background-proxy:{derived(b'prefix').hex()[:10]}:"

    def close(
        self, sender: bytes, number: int, recipients: Sequence[bytes], text: bytes, *, more: bool
    ) -> str:
        """A payload for NOTIFY."""
        head = b"".join(
            (sender, number.to_bytes(8, "big"), bytes((len(recipients),)), *recipients)
        ) + bytes((more,))
        sealed = head + self._xor(sender, number, text)
        return base64.b64encode(sealed + hmac.digest(self._prove, sealed, "sha256")).decode()

    def open(self, payload: bytes) -> Sealed:
        """The message in a payload. Raises ValueError if it was made without the secret."""
        try:
            data = base64.b64decode(payload, validate=True)
        except binascii.Error:
            raise ValueError("not base64") from None
        sealed, proof = data[:-_PROOF], data[-_PROOF:]
        if not hmac.compare_digest(hmac.digest(self._prove, sealed, "sha256"), proof):
            raise ValueError("no proof")
        sender, number = sealed[:NAME], int.from_bytes(sealed[NAME : NAME + 8], "big")
        begin = NAME + 9
        end = begin + NAME * sealed[begin - 1]
        recipients = tuple(sealed[at : at + NAME] for at in range(begin, end, NAME))
        text = self._xor(sender, number, sealed[end + 1 :])
        return Sealed(sender, number, recipients, bool(sealed[end]), text)

    def _xor(self, sender: bytes, number: int, text: bytes) -> bytes:
        key = self._encipher + sender + number.to_bytes(8, "big")
        stream = hashlib.shake_256(key).digest(len(text))
        mixed = int.from_bytes(text, "big") ^ int.from_bytes(stream, "big")
        return mixed.to_bytes(len(text), "big")


def new_name(group: bytes) -> bytes:
    """A random name for a member."""
    return group + secrets.token_bytes(NAME - GROUP)
