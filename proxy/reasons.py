"""Explains failures in log lines and messages.

Invariant: the text is never empty. Many exceptions have none of their own: timeouts, connection
resets that asyncio or uvloop raises itself, an OSError without a number.
"""

from __future__ import annotations

import errno
import os
import re
import ssl
from typing import Final

from protocol.errors import SQLError

_OPENSSL_FILE: Final = re.compile(r" \(_ssl\.c:\d+\)$")

_WITHOUT_TEXT: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (TimeoutError, os.strerror(errno.ETIMEDOUT)),
    (ConnectionResetError, os.strerror(errno.ECONNRESET)),
    (ConnectionRefusedError, os.strerror(errno.ECONNREFUSED)),
    (ConnectionAbortedError, os.strerror(errno.ECONNABORTED)),
    (BrokenPipeError, os.strerror(errno.EPIPE)),
    (ConnectionError, "the connection was lost"),
    (EOFError, "the connection was closed"),
    (MemoryError, os.strerror(errno.ENOMEM)),
)
"""The first match counts."""


def explain(error: BaseException) -> str:
    """The system's text for its errors, without number and file name; otherwise the exception's
    own, without OpenSSL's internals; otherwise that of its class."""
    # SSLErrors that do not come from OpenSSL lack some attributes.
    if verify_message := getattr(error, "verify_message", None):
        return f"certificate verify failed: {verify_message}"
    if isinstance(error, ssl.SSLError) and (reason := getattr(error, "reason", None)):
        return f"TLS: {reason.lower().replace('_', ' ')}"
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror
    elif isinstance(error, EOFError):
        said = ""  # asyncio.IncompleteReadError counts bytes, which tells users nothing
    elif isinstance(error, ssl.SSLError):
        said = " ".join(map(str, error.args))  # str() would show a tuple
    else:
        said = str(error)
    return _OPENSSL_FILE.sub("", said).strip() or _of_class(error)


def cause(error: BaseException) -> str:
    """`explain`, but the DETAIL of an SQLError that has one: the cause is there."""
    said = error.detail or error.message if isinstance(error, SQLError) else ""
    return said or explain(error)


def _of_class(error: BaseException) -> str:
    for kind, words in _WITHOUT_TEXT:
        if isinstance(error, kind):
            return words
    return type(error).__name__
