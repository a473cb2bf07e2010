"""Runs the tests that concern the server's version over PostgreSQL 10 to 19; prints what passed.

    python -m tests.all_versions                          # over all of them
    python -m tests.all_versions -v 12 17 -- tests/test_launch.py tests/test_result.py -k "not slow"
    python -m tests.all_versions -v 15 --server /opt/pgsql/bin    # and one that is at hand

Arguments after ``--`` go to pytest, in place of `CONCERNED`. `tests.support.releases` fetches the
servers into ``--cache``, or into a temporary folder that goes at the end. The machine's own psql is
used. For ``tests/test_clients.py``, that means that the tools must not be older than the server, or
the tests that need them are skipped.

Invariant: of the packages only PostgreSQL runs, as another user if we are root; every step has a
limit; and what we started has ended when we end.

Exit code: 0 if nothing failed, 1 if something did, 2 if a server could not be fetched or run.
"""

from __future__ import annotations

import argparse
import contextlib
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

from tests.support import releases

REPOSITORY: Final = Path(__file__).parent.parent
RELEASED: Final = (10, 11, 12, 13, 14, 15, 16, 17, 18)
PREVIEW: Final = 19

# For example, test_commands is not among them: it has no server.
CONCERNED: Final = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("tutorial", "launch", "result", "failures", "transparent", "calls_in_protocol"),
        *("catalogs", "composites", "result_types", "names", "settings_of_sessions"),
        *("output_settings", "cancel_is_kept", "visible_wait", "in_database", "extension"),
    )
)
"""The tests whose outcome may depend on the server's version the most."""

STOP_TIMEOUT: Final = 60.0

OUTCOMES: Final = ("passed", "failed", "expected failure", "skipped")
Outcomes: TypeAlias = "Counter[str]"


@dataclass
class Run:
    """The outcome of the tests over one version."""

    version: str
    seconds: float = 0.0
    files: dict[str, Outcomes] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    trouble: str = ""

    @property
    def total(self) -> Outcomes:
        """The number of tests with each outcome."""
        return sum(self.files.values(), Counter())


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
    """What passed, in Markdown: a line for each version."""
    lines = [
        "| PostgreSQL | passed | failed | expected failures | skipped | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        counts = " | ".join(str(run.total[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {run.version} | {counts} | {run.trouble} |")
    return "\n".join(lines)


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
        *("-v", "--versions"),
        type=int,
        nargs="+",
        metavar="N",
        help=f"{RELEASED[0]} to {PREVIEW}; {PREVIEW} needs mmdebstrap, and root",
    )
    parser.add_argument(
        "--server",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of server programs; alone, no other version is tested",
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


def _programs(arguments: argparse.Namespace, cache: Path) -> list[Path]:
    """The folders of server programs, fetched."""
    versions = arguments.versions
    if versions is None:
        versions = [] if arguments.server else list(RELEASED)
        if not arguments.server:
            if reason := releases.why_no_preview():
                print(f"PostgreSQL {PREVIEW} is left out: {reason}", file=sys.stderr)
            else:
                versions.append(PREVIEW)
    newest = releases.newest_releases([major for major in versions if major != PREVIEW])
    programs = [releases.fetch(release, cache) for release in newest.values()]
    if PREVIEW in versions:
        programs.append(releases.fetch_preview(PREVIEW, cache))
    return [*programs, *(folder.resolve() for folder in arguments.server)]


def _chosen(arguments: Sequence[str]) -> list[str]:
    """Arguments for pytest: `CONCERNED` unless they name files."""
    named = any((REPOSITORY / each.partition("::")[0]).exists() for each in arguments)
    return [*arguments] if named else [*CONCERNED, *arguments]


def main() -> int:
    """Fetches, tests and reports."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _cache(arguments.cache) as cache, ThreadPoolExecutor(max(arguments.jobs, 1)) as pool:
        try:
            programs = _programs(arguments, cache)
            versions = [releases.version(folder) for folder in programs]
        except (OSError, LookupError, ValueError, subprocess.SubprocessError) as error:
            print(error, file=sys.stderr)
            return 2
        chosen = _chosen(arguments.pytest)
        pending = [
            pool.submit(test, version, folder, chosen, arguments.timeout)
            for version, folder in zip(versions, programs, strict=True)
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
