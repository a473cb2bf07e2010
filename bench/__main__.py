"""``python -m bench [--quick]``: the command line.

Starts a PostgreSQL, the proxy from this checkout and PgBouncer, measures them in turns, prints the
results beside the goals, and writes them to bench/results/ as JSON and pictures.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import psutil

from bench import (
    bulk,
    connecting,
    history,
    launching,
    memory,
    plots,
    report,
    rows,
    scaling,
    select_only,
    sustained,
    watched,
)
from bench.effort import FULL, QUICK, TRIAL, Effort
from bench.harness import FAILURES, Bench, Progress
from bench.results import Results
from bench.targets import Options, Targets, open_targets

FOLDER: Final = Path(__file__).parent / "results"

MEASURES: Final[dict[str, Callable[[Bench], None]]] = {
    "launch": launching.run,
    "history": history.run,
    "rows": rows.run,
    "bulk": bulk.run,
    "pgbench": select_only.run,
    "watched": watched.run,
    "connecting": connecting.run,
    "sustained": sustained.run,
    "memory": memory.run,
    "scaling": scaling.run,
}
MAY_BE_ABSENT: Final = {"scaling"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measures; returns the exit code, which is 1 if something could not be measured."""
    arguments = _parser().parse_args(argv)
    if arguments.report:
        print(report.markdown(Results.load(arguments.report), arguments.report))
        return 0
    # At SIGTERM, stop what we have started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _raise_file_limit()
    effort = TRIAL if arguments.trial else QUICK if arguments.quick else FULL
    options = Options(
        arguments.server_bin, arguments.server, arguments.pgbouncer, tuple(arguments.proxy_option)
    )
    try:
        with open_targets(options) as targets:
            results = measure(targets, effort, arguments.only or list(MEASURES))
    except FAILURES as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{report.terminal(results)}\n")
    save(results, arguments.results)
    return int(any("failed" in note for note in results.notes))


def measure(targets: Targets, effort: Effort, names: Sequence[str]) -> Results:
    """Runs measures; after an interrupt the results so far count."""
    results = Results(about(targets, effort))
    progress = Progress(effort.limit)
    bench = Bench(targets, effort, results, progress)
    if targets.pgbouncer is None:
        bench.skip("PgBouncer was not found: name it with --pgbouncer")
    try:
        for number, name in enumerate(names, start=1):
            bench.measure, progress.step = name, f"{number}/{len(names)}"
            try:
                MEASURES[name](bench)
            except FAILURES as error:
                bench.skip(f"failed: {error}")
    except KeyboardInterrupt:
        bench.skip("interrupted")
    return results


def about(targets: Targets, effort: Effort) -> dict[str, str]:
    """When, where and with what; nothing that identifies the machine."""
    version = targets.server_version
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores,"
        f" {_gibibytes()} GiB",
        "PostgreSQL": f"{version // 10000}.{version % 10000}"
        if version >= 100000
        else f"{version // 10000}.{version // 100 % 100}",
        "Python": platform.python_version(),
        "PgBouncer": _pgbouncer_version(targets),
        "load": f"{os.getloadavg()[0]:.1f}",
        "options": " ".join(targets.options.proxy),
        "effort": effort.name,
    }


def save(results: Results, folder: Path) -> None:
    """Writes the JSON and the pictures."""
    kind = f"{platform.system().lower()}-{os.cpu_count()}cores-{_gibibytes()}gib"
    # A partial run does not replace a full one.
    part = "" if set(results.measures()) >= MEASURES.keys() - MAY_BE_ABSENT else "-part"
    effort = results.about["effort"]
    shorter = "" if effort == FULL.name else f"-{effort}"
    stem = f"{results.about['date']}-{kind}{part}{shorter}"
    results.save(folder / f"{stem}.json")
    print(f"written: {folder / stem}.json")
    try:
        for name in results.measures():
            plots.plot(results, name, folder / f"{stem}-{name}.svg")
    except ImportError:
        print("no plots: pip install -e '.[bench]' brings matplotlib")


def _raise_file_limit() -> None:
    """To the hard limit, for this process and those that it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _gibibytes() -> int:
    return round(int(psutil.virtual_memory().total) / 2**30)


def _pgbouncer_version(targets: Targets) -> str:
    if (program := targets.pgbouncer_program) is None:
        return "not found"
    said = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=10, check=False
    ).stdout
    match = re.search(r"[\d.]+\d", said)
    return match[0] if match else "of unknown version"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="about a minute instead of a quarter")
    effort.add_argument("--trial", action="store_true", help="seconds: whether it runs at all")
    server = parser.add_mutually_exclusive_group()
    server.add_argument(
        "--server-bin",
        type=Path,
        metavar="DIR",
        help="server programs (default: those of the wheel)",
    )
    server.add_argument(
        "--server",
        metavar="URI",
        help="a running server, without TLS; pgbench_* and bench_* tables are made in its database",
    )
    parser.add_argument("--pgbouncer", type=Path, metavar="PATH", help="default: on PATH")
    parser.add_argument(
        *("--proxy-option", "-o"),
        action="append",
        default=[],
        metavar="OPTION",
        help="for `serve`, one word each: -o=--max-workers -o=32; it must log where it listens",
    )
    parser.add_argument("--only", action="append", choices=MEASURES, help="may be given repeatedly")
    parser.add_argument(
        "--results", type=Path, default=FOLDER, metavar="DIR", help="where to write JSON and SVG"
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="print an earlier run as Markdown instead"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
