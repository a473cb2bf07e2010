"""MD5 password authentication (manual, "Password Authentication" and AuthenticationMD5Password).

Whoever has the stored secret can log in: the response is made from it or from the password.
"""

from __future__ import annotations

import hashlib
import re

_SECRET = re.compile(rb"md5[0-9a-f]{32}")


def md5_password(user: bytes, password: bytes, salt: bytes) -> bytes:
    """The text of the PasswordMessage that answers AuthenticationMD5Password (salt: 4 bytes).

    That is ``md5`` and the hexadecimal digits of md5(hex(md5(password + user)) + salt).
    """
    return md5_response_from_secret(md5_secret(user, password), salt)


def md5_secret(user: bytes, password: bytes) -> bytes:
    """The content of pg_authid.rolpassword: ``md5`` and 32 digits, md5(password + user)."""
    return _md5(password + user)


def is_md5_secret(text: bytes) -> bool:
    """Whether PostgreSQL would take this for an MD5 secret."""
    return _SECRET.fullmatch(text) is not None


def md5_response_from_secret(secret: bytes, salt: bytes) -> bytes:
    """The same as `md5_password`, but from the stored secret.

    Raises:
        ValueError: it is not such a secret. The message does not contain it.
    """
    if not is_md5_secret(secret):
        raise ValueError("not an MD5 secret")
    return _md5(secret.removeprefix(b"md5") + salt)


def _md5(data: bytes) -> bytes:
    return b"md5" + hashlib.md5(data, usedforsecurity=False).hexdigest().encode()
