"""The command line: ``pg-background-proxy serve``, ``check`` and ``demo``.

Exit codes: 0 after a clean stop; 1 for a failure at run time, such as a port in use or a required
server that is unreachable at the start; 2 for a wrong option or configuration. A failure is one
line on stderr, never a traceback.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from proxy import __version__, config, log
from proxy.loop import has_uvloop, run
from proxy.net.descriptors import raise_limit
from proxy.reasons import explain

PROGRAM: Final = "pg-background-proxy"

_DESCRIPTION: Final = """\
The pg_background functions for any PostgreSQL server: a proxy between client and server that runs
the SQL given to pg_background_launch() on connections of its own, and passes on everything else.
"""

_EPILOG: Final = f"""\
examples:
  {PROGRAM} demo
      a PostgreSQL in a temporary folder, the proxy before it, and a guided tour
  {PROGRAM} serve --upstream "host=db.example.org port=5432"
      the proxy on 127.0.0.1:6543, before a server of yours
  {PROGRAM} check --upstream "host=db.example.org port=5432" --role alice --database mydb
      whether that would work, and what to do if not
  psql -h 127.0.0.1 -p 6543 -U alice mydb
      then: SELECT pg_background_launch('VACUUM big_table');
"""

_SERVE_EPILOG: Final = f"""\
Every option but --config may stand in the file, with underscores:

  listen = ["127.0.0.1:6543", "/run/pg-background-proxy:6543"]
  upstream = "host=db1,db2 port=5432"
  passfile = "/etc/pg-background-proxy/passfile"
  max_workers = 8

Flags win over the file, the file over PGHOST, PGPORT and PGPASSFILE.

Clients log in to the server through the proxy, with their own role and password. A side backend,
the connection on which a job runs, logs in as the same role: without a password where the server
trusts it, with the client's password if the server asked for it in clear text, else with what
--passfile or --auth-file has for the role, or what --auth-query finds. With --auth-type plain the
proxy asks for the password and logs in both with it: all that a managed server needs.

TLS: --client-tls-sslmode and its files towards clients; sslmode, sslrootcert, sslcert, sslkey in
--upstream towards the server.

SIGTERM or SIGINT: no new clients; running sessions and jobs have --shutdown-timeout to end. A
second signal ends them at once. SIGHUP: the configuration and its files are read again. Exit codes:
0 clean stop, 1 failure at run time, 2 wrong option or configuration.

With --workers, that many processes serve the clients; a new client goes to the one with the fewest.
A supervisor, the process that was started, listens, restarts one that dies and passes signals on.

examples:
  {PROGRAM} serve --upstream "host=127.0.0.1 port=5432"
  {PROGRAM} serve --upstream postgresql://db1,db2:5433 --listen '*:6543' --auth-file userlist.txt
  {PROGRAM} serve --config /etc/pg-background-proxy.toml --log-level debug
"""


_CHECK_EPILOG: Final = f"""\
Each line begins with ok; with note, for what may be as it is meant to be; or with no, and says then
what to do about it. Exit codes: 0 if no line says no, 1 if one does, 2 for a wrong option.

  configuration  whether serve could start with it; all that is wrong is said at once
  server         whether it can be reached, and whether by TLS
  replicas       with --replica-secret-file: whether they can ask each other about their jobs
  session        whether it lets the role in, and what it asks for (pg_hba.conf)
  extension      whether the database has what CREATE EXTENSION makes, of this version of the proxy
  connections    how many the server has left for the role
  jobs           whether a job of the role can log in, and with what
  launch         whether the role may launch jobs; one is launched, and runs SELECT 1

The role's password is taken from PGPASSWORD, else from --passfile or --auth-file. The options of
serve are options of check: give the same ones.

examples:
  {PROGRAM} check --config /etc/pg-background-proxy.toml --role alice --database app
  PGPASSWORD=secret {PROGRAM} check --upstream host=db.example.org --role alice --database app
"""  # noqa: S608 - no SQL


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    arguments = vars(_parser().parse_args(argv))
    command: Callable[[dict[str, Any]], int] = arguments.pop("command")
    try:
        return command(arguments)
    except config.ConfigError as error:
        return _fail(2, str(error))
    except OSError as error:
        return _fail(1, str(error) or explain(error))
    except KeyboardInterrupt:
        return 130


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        help="run the proxy",
        description="Runs the proxy until it is told to stop. Logs to stderr.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve.set_defaults(command=_serve)
    _add_settings(serve)

    check = commands.add_parser(
        "check",
        help="see whether a configuration and the server are fit for each other",
        description="Reads the configuration that serve would read, logs in to the server as a"
        " client does, launches a job, and says in one line each what is well and what is not.",
        epilog=_CHECK_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.set_defaults(command=_check)
    check.add_argument(
        "--role", help="log in as this role (default: PGUSER, else the operating system's user)"
    )
    check.add_argument(
        "--database", help="in this database (default: PGDATABASE, else the role's name)"
    )
    _add_settings(check)

    demo = commands.add_parser(
        "demo",
        help="try it: a server in a temporary folder, the proxy, and a guided tour",
        description="Starts a PostgreSQL in a temporary folder and the proxy before it, shows in a"
        " short tour what the functions do, and stays up until Ctrl-C. Leaves nothing behind.",
        allow_abbrev=False,
    )
    demo.set_defaults(command=_demo)
    demo.add_argument(
        "--once", action="store_true", help="end after the tour; exit code 1 if a step failed"
    )
    return parser


def _add_settings(parser: _Parser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file with these settings"
    )
    for field in config.SETTINGS:
        setting = field.metadata
        default = f" (default: {setting['default']})" if setting["default"] else ""
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            action="append" if setting["many"] else "store",
            metavar=setting["metavar"],
            help=f"{setting['help']}{default}".replace("%", "%%"),
        )


def _serve(arguments: dict[str, Any]) -> int:
    file = arguments.pop("config")
    given = functools.partial(config.collect, arguments, file=file, environ=os.environ)
    settings = functools.partial(config.load, arguments, file=file, environ=os.environ)
    first = settings()
    if first.workers > 1:
        from proxy.workers.supervisor import Supervisor

        log.configure(first.log_level, first.log_format, who="supervisor")
        _prepare()
        return run(Supervisor(given).run())
    from proxy.server import serve

    log.configure(first.log_level, first.log_format)
    _prepare()
    if first.replica_secret_file is None:
        return run(serve(first, settings))
    from proxy.workers.replicas import linked

    return run(serve(first, settings, linked))


def _prepare() -> None:
    """Prepare the process, once it can log."""
    raise_limit()
    if not has_uvloop():
        log.logger.info("running on asyncio's own event loop: uvloop is not installed")


def _check(arguments: dict[str, Any]) -> int:
    from proxy import doctor

    role, database, file = (arguments.pop(name) for name in ("role", "database", "config"))
    return doctor.check(
        *(arguments, file),
        role=role,
        database=database,
        environ=os.environ,
        run=run,
        write=functools.partial(print, flush=True),
    )


def _demo(arguments: dict[str, Any]) -> int:
    from proxy.demo import tour

    try:
        return tour.main(once=arguments["once"])
    except tour.DemoError as error:
        return _fail(1, str(error))


def _fail(code: int, message: str) -> int:
    if log.is_json():
        log.logger.critical("%s", message)
        log.flush()
        return code
    log.flush()
    print(f"{PROGRAM}: error: {log.printable(message)}", file=sys.stderr)
    return code
