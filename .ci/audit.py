"""Runs pip-audit and judges its report: a known vulnerability is a failure, a missing one is not.

If the service cannot be reached, or does not know a package (like a mirror without advisories), the
check reports that and goes on, because it must work without a network.

    python3 .ci/audit.py pip-audit --path .venv/lib/python3.13/site-packages
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT = 300


def main(program: str, *arguments: str) -> int:
    """Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        try:
            done = subprocess.run(  # noqa: S603 - it is what .ci/run has installed
                [
                    program,
                    "--progress-spinner=off",
                    "--format=json",
                    f"--output={report}",
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
            packages = json.loads(report.read_text())["dependencies"]
        except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
            print(f"not audited: {type(error).__name__}; pip-audit could not ask")
            return 0
    vulnerable = [package for package in packages if package.get("vulns")]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    for package in vulnerable:
        for found in package["vulns"]:
            fixed = ", ".join(found.get("fix_versions", [])) or "no version"
            print(f"{package['name']} {package['version']}: {found['id']}, mended in {fixed}")
    print(f"{len(packages) - len(skipped)} packages audited, {len(vulnerable)} vulnerable")
    if skipped:
        print(f"not audited, unknown to the service: {', '.join(skipped)}")
    # pip-audit also fails if it could not ask about some packages.
    if done.returncode and not vulnerable:
        print(f"pip-audit ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
