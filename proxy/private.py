"""Permissions of files with secrets: those that PostgreSQL requires for its private key.

Invariant: a file to which group or others have access is not used. A file owned by root may be
readable by its group, which is how services that do not run as root get secrets.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_OF_ROOT = stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO


def is_exposed(status: os.stat_result) -> bool:
    """Whether others can access such a file; always false on Windows, which has no modes."""
    others = _OTHERS_OF_ROOT if status.st_uid == 0 else _OTHERS
    return os.name == "posix" and bool(status.st_mode & others)


def exposed(path: Path | str) -> str:
    """The error about such a file."""
    return (
        f"{path} has group or world access; chmod 600 {path} (or 640, if root owns it) makes it"
        " private"
    )
