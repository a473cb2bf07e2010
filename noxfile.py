"""Short names for what a change needs: ``nox -l`` lists them, ``nox`` runs the quick ones.

They run the programs of ``.venv``, as installed by ``pip install -e '.[dev]'``; nox itself may be
anywhere. What stands behind ``--`` is passed on: ``nox -s test -- -k cancel``.
"""

from __future__ import annotations

from pathlib import Path

import nox

BIN = Path(__file__).parent / ".venv" / "bin"

# The tests that need no server.
QUICK = (
    *(f"tests/protocol/test_{name}.py" for name in ("auth_md5", "framing", "messages", "scram")),
    *(f"tests/protocol/test_{name}.py" for name in ("sql_errors", "startup_packets")),
    *(f"tests/test_{name}.py" for name in ("commands", "pace", "reference", "speaker")),
    "tests/test_supply_chain.py",
)

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "layers", "quick"]


def run(session: nox.Session, program: str, *arguments: str) -> None:
    """Runs a program of .venv."""
    session.run(str(BIN / program), *arguments, *session.posargs, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff's rules, and the format."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    run(session, "mypy")


@nox.session
def layers(session: nox.Session) -> None:
    """The layers of docs/architecture.md, and no circles of imports."""
    run(session, "lint-imports", "--no-logo")


@nox.session
def quick(session: nox.Session) -> None:
    """The tests that need no server."""
    run(session, "pytest", "-q", *QUICK)


@nox.session
def test(session: nox.Session) -> None:
    """All tests but the slow ones; ``nox -s test -- -m ''`` runs these too."""
    run(session, "pytest")


@nox.session
def docs(session: nox.Session) -> None:
    """Writes the generated pages of docs/ anew, and runs the examples."""
    session.run(str(BIN / "python"), "-m", "proxy.api.reference", external=True)
    run(session, "pytest", "-q", "tests/test_docs.py", "tests/test_reference.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Measures, for a minute."""
    run(session, "python", "-m", "bench", "--quick")
