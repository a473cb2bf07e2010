"""The files with passwords and secrets: passfile and auth_file.

Invariant: a file is read again when it has changed; if an auth_file becomes malformed, its previous
content stays in use. Names, passwords and secrets are bytes, as in the files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

from proxy import private
from proxy.auth.secret import Secret, parse_secret
from proxy.log import logger
from proxy.reasons import explain

T = TypeVar("T")


class _WatchedFile(ABC, Generic[T]):
    """The content of a file, read again after a change. Each access costs one stat().

    A file that cannot be used counts as empty, which is logged once for each change.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stat()
        self._content = self._load()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._path)!r})"

    def content(self) -> T:
        """The current content; the previous one if the file has become malformed."""
        stamp = self._stat()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._content = self._load()
            except ValueError as error:
                logger.error("%s; its previous content stays in use", error)
        return self._content

    def _stat(self) -> tuple[int, ...] | None:
        """A value that changes with the file; includes the mode, since chmod can make it usable."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns

    def _load(self) -> T:
        try:
            self._check(self._path.stat())
            data = self._path.read_bytes()
        except OSError as error:
            logger.warning("ignoring %s: %s", self._path, explain(error))
            data = b""
        return self._parse(data)

    def _check(self, status: os.stat_result) -> None:
        """Raises OSError if the file counts as empty, ValueError if it counts as malformed."""
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file")

    @abstractmethod
    def _parse(self, data: bytes) -> T:
        """Raises ValueError, with path and line, if the content is malformed."""


@dataclass(frozen=True, slots=True)
class PassFileEntry:
    """A line of a passfile. None is the wildcard ``*``."""

    host: bytes | None
    port: bytes | None
    database: bytes | None
    user: bytes | None
    password: bytes = field(repr=False)


_PASSFILE_LINE: Final = re.compile(
    rb"%b:%b:%b:%b:((?:[^\\:]|\\.|\\\Z)*)" % ((rb"((?:[^\\:]|\\.)*)",) * 4)
)


def parse_passfile(data: bytes) -> tuple[PassFileEntry, ...]:
    """Reads lines ``host:port:database:user:password`` (manual, "The Password File").

    A backslash makes the next character literal. As in libpq, comments (``#``) and malformed lines
    are skipped, and a further colon ends the password.
    """
    entries = []
    for line in data.split(b"\n"):
        line = line.rstrip(b"\r")
        match = _PASSFILE_LINE.match(line)
        if match is None or line.startswith(b"#") or b"\0" in line:
            continue
        *patterns, password = match.groups()
        host, port, database, user = (
            None if pattern == b"*" else _unescape(pattern) for pattern in patterns
        )
        entries.append(PassFileEntry(host, port, database, user, _unescape(password)))
    return tuple(entries)


def _unescape(text: bytes) -> bytes:
    return re.sub(rb"\\(.)", rb"\1", text)


class PassFile(_WatchedFile[tuple[PassFileEntry, ...]]):
    """A file of passwords in the format of libpq's ``.pgpass``.

    It is ignored, with a warning, while group or others have access to it.
    """

    def lookup(self, host: str, port: int, database: bytes, user: bytes) -> bytes | None:
        """The password of the first matching line; None if there is none, or it is empty.

        A `host` that is the directory of a Unix socket also matches lines for ``localhost``; in
        libpq only the default directory does.
        """
        hosts = {None, os.fsencode(host)}
        if not host or host.startswith(("/", "@")):
            hosts.add(b"localhost")
        ports = (None, b"%d" % port)
        for entry in self.content():
            if (
                entry.host in hosts
                and entry.port in ports
                and entry.database in (None, database)
                and entry.user in (None, user)
            ):
                return entry.password or None
        return None

    def _check(self, status: os.stat_result) -> None:
        super()._check(status)
        if private.is_exposed(status):
            raise PermissionError(
                errno.EPERM,
                "group or others have access to it; chmod 0600 (or 0640, if root owns it) makes it"
                " private",
            )

    def _parse(self, data: bytes) -> tuple[PassFileEntry, ...]:
        return parse_passfile(data)


_AUTH_FILE_LINE: Final = re.compile(rb'"((?:[^"]|"")*)"[ \t]+"((?:[^"]|"")*)"(?:[ \t].*)?')


def parse_auth_file(data: bytes) -> dict[bytes, Secret]:
    """Reads lines ``"user" "secret"`` (PgBouncer, "Authentication file format").

    Quotes within are doubled; lines that begin with ``;`` are comments; text after the second field
    is ignored. If a user comes twice, the last line counts.

    Raises:
        ValueError: with the line's number, but nothing of its content.
    """
    secrets: dict[bytes, Secret] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.strip()
        if not line or line.startswith(b";"):
            continue
        match = _AUTH_FILE_LINE.fullmatch(line)
        if match is None or b"\0" in line:
            raise ValueError(f'line {number} is not of the form "user" "secret"')
        user, secret = (text.replace(b'""', b'"') for text in match.groups())
        try:
            secrets[user] = parse_secret(secret)
        except ValueError:
            raise ValueError(f"line {number} has a malformed SCRAM-SHA-256 secret") from None
    return secrets


class AuthFile(_WatchedFile[dict[bytes, Secret]]):
    """A file of passwords and secrets in the format of PgBouncer's ``auth_file``.

    Raises:
        ValueError: it is malformed (the message names file and line), or others have access to it.
            If this is due to a later change, it is logged, and the previous content stays in use.
    """

    def lookup(self, user: bytes) -> Secret | None:
        """The role's secret, if the file has one."""
        return self.content().get(user)

    def _check(self, status: os.stat_result) -> None:
        super()._check(status)
        if private.is_exposed(status):
            raise ValueError(private.exposed(self._path))

    def _parse(self, data: bytes) -> dict[bytes, Secret]:
        try:
            return parse_auth_file(data)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None
