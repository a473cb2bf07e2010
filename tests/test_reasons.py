"""Whatever fails, the log and the client are told why: a message never ends where the reason
should stand."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from protocol.startup import CancelRequest, SSLRequest
from proxy.reasons import explain
from tests.conftest import StartProxy
from tests.support.listening import listening
from tests.test_tls import STARTUP, raw, rest
from tests.test_upstream import refused


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "Connection timed out"),
        (ConnectionResetError(), "Connection reset by peer"),
        (ConnectionRefusedError(), "Connection refused"),
        (ConnectionAbortedError(), "Software caused connection abort"),
        (BrokenPipeError(), "Broken pipe"),
        (ConnectionError(), "the connection was lost"),
        (asyncio.IncompleteReadError(b"", 1), "the connection was closed"),
        (EOFError(), "the connection was closed"),
        (MemoryError(), "Cannot allocate memory"),
        (OSError(), "OSError"),
        (OSError(errno.ENOSPC, "No space left on device", "/log"), "No space left on device"),
        (OSError("it is no regular file"), "it is no regular file"),
        (ssl.SSLError(), "SSLError"),
        (ssl.SSLError("no words from OpenSSL"), "no words from OpenSSL"),
        (ssl.SSLZeroReturnError(), "SSLZeroReturnError"),
        (ssl.SSLError(1, "[SSL] unknown error (_ssl.c:1007)"), "[SSL] unknown error"),
        (ValueError("no number"), "no number"),
        (ValueError(" "), "ValueError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_exception_is_never_without_words(error: Exception, words: str) -> None:
    assert explain(error) == words


@pytest.fixture
def impolite() -> Iterator[Callable[[bytes, bool], int]]:
    """Starts a server that hangs up on whoever has said something; its port.

    Its arguments: what it answers to an SSLRequest, and whether it resets the connection.
    """
    with ExitStack() as stop:

        def start(answer: bytes, reset: bool) -> int:
            def serve(connection: socket.socket) -> None:
                if connection.recv(1000) == SSLRequest().serialize() and answer:
                    connection.sendall(answer)
                    connection.recv(1000)
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

            return stop.enter_context(listening(serve))

        yield start


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("params", "answer"),
    [
        ("sslmode=prefer", b""),
        ("sslmode=require", b""),
        ("sslmode=require", b"S"),
        ("sslmode=require sslnegotiation=direct", b""),
    ],
)
def test_a_server_that_hangs_up_at_the_start(
    impolite: Callable[[bytes, bool], int], params: str, answer: bytes, reset: bool
) -> None:
    port = impolite(answer, reset)
    start, _, reason = refused(f"host=127.0.0.1 port={port} {params}").rpartition(": ")
    assert f"127.0.0.1:{port}" in start
    assert any(character.isalpha() for character in reason)


@pytest.mark.parametrize("reset", [False, True])
def test_a_server_that_hangs_up_in_the_startup(
    impolite: Callable[[bytes, bool], int], start_proxy: StartProxy, reset: bool
) -> None:
    upstream = f"host=127.0.0.1 port={impolite(b'', reset)} sslmode=disable"
    proxy = start_proxy("--log-level", "debug", upstream=upstream)
    with raw(proxy, STARTUP.serialize()) as connection:
        rest(connection)
    proxy.wait_for_log(r"DEBUG:  session ended: \w")


def test_a_cancel_request_that_cannot_be_passed_on(start_proxy: StartProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = f"host=127.0.0.1 port={silent.getsockname()[1]} sslmode=disable"
        proxy = start_proxy("--connect-timeout", "300ms", upstream=upstream)
        with raw(proxy, CancelRequest(1, b"key!").serialize()) as connection:
            rest(connection)
        proxy.wait_for_log(r"WARNING:  could not pass on a cancel request: \w")
