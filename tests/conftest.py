"""Fixtures: a server of each kind at hand, a proxy in front of it, a fresh database.

``--server embedded`` uses the wheel's PostgreSQL, ``--server debian`` the newest in
/usr/lib/postgresql, ``--server all`` (the default) both, ``--server FOLDER`` the programs in a
folder. ``--workers 2`` runs every proxy as several processes.

Tests whose outcome may depend on the server's version are marked ``every_server``. The others run
on the first server by default; on the further ones they are ``exhaustive``. So are tests that a
module marked ``every_server`` marks ``one_server``. If a test has several cases, every second one
runs there by default, or every n-th with ``turns(n)``. At the end of the session, nothing that it
started may be left.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from proxy.demo.embedded import Cluster, find_system_bin, find_wheel_bin, server_version
from tests.support import api_clients, examples, executors
from tests.support.certificates import Certificates
from tests.support.forks import ForkServer
from tests.support.servers import Connection, Proxy, Server, database, program_environment
from tests.support.upstream_relay import UpstreamRelay, upstream_relay
from tests.support.wire import Monitor

_live_proxies: list[Proxy] = []
_database_number = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--server",
        action="append",
        help="embedded, debian, all (the default: what is at hand), or a folder of server programs",
    )
    parser.addoption("--workers", help="run every proxy with this many processes: N or auto")


def pytest_configure(config: pytest.Config) -> None:
    # An example's time depends on what else the machine does; the test's own limit is enough.
    # CI judges a change by the same examples as the one before; developers get new ones.
    settings.register_profile("ours", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("ours")
    examples.configure(config)
    Cluster.parent = _memory()
    if workers := config.getoption("--workers"):
        Proxy.every += ["--workers", workers]
    if worker := getattr(config, "workerinput", None):
        if not any(".py" in argument for argument in config.args):
            gc.disable()  # until the tests are collected
            _compile_share(worker)
    elif sys.dont_write_bytecode:
        _write_bytecode_elsewhere(config)
    # A terminated session must still take down its servers.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


def _memory() -> Path | None:
    """A file system in memory, if there is one with room for all servers. On ext4, CREATE DATABASE
    takes a fifth of a second of a core, mostly to find inodes for its files."""
    folder = Path("/dev/shm")
    with contextlib.suppress(OSError):
        kind = os.statvfs(folder)
        room = min(kind.f_bavail * kind.f_frsize, psutil.virtual_memory().available)
        if room > 4 << 30 and not kind.f_flag & os.ST_NOEXEC and os.access(folder, os.W_OK):
            return folder
    return None


def _write_bytecode_elsewhere(config: pytest.Config) -> None:
    """Where Python must write no bytecode, keep it for this session only: half of the start of a
    proxy is the compilation of its modules, and the tests start hundreds of proxies."""
    folder = tempfile.mkdtemp(prefix="pgbg-bytecode-")
    config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    # Installed modules have been compiled, but Python will not look where they are.
    for module in list(sys.modules.values()):
        cached = getattr(getattr(module, "__spec__", None), "cached", None)
        if cached and Path(cached).exists():
            link = Path(folder, *Path(cached).parts[1:-2], Path(cached).name)
            link.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # one module under two names
                link.symlink_to(cached)
    # For this process, for those of pytest-xdist, and for what they start.
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = folder
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _compile_share(worker: dict[str, Any]) -> None:
    """Each process of pytest-xdist begins with other test modules than the rest, so that each
    module is compiled, with its assertions rewritten, by one process only."""
    modules = sorted(Path(__file__).parent.rglob("test_*.py"))
    for path in modules[int(worker["workerid"][2:]) :: worker["workercount"]]:
        name = ".".join(path.relative_to(Path(__file__).parents[1]).with_suffix("").parts)
        # The collection will report it.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server" in metafunc.fixturenames:
        folders = _server_folders(*(metafunc.config.getoption("--server") or ["all"]))
        marked = metafunc.definition.get_closest_marker
        everywhere = marked("every_server") and not marked("one_server")
        marks = () if everywhere else _EXHAUSTIVE
        if marks and "not exhaustive" in metafunc.config.getoption("markexpr"):
            folders = folders[:1]  # each process of pytest-xdist would collect the rest in vain
        metafunc.parametrize(
            "server",
            [pytest.param(folder, marks=marks if n else ()) for n, folder in enumerate(folders)],
            ids=[server_id(folder) for folder in folders],
            indirect=True,
            scope="session",
        )


_EXHAUSTIVE: Final = (pytest.mark.exhaustive,)


# The longest files begin first, so that no process is left with one at the end.
_LONGEST: Final = (
    *("test_places", "test_hung_workers", "test_session", "test_takeover", "test_linear"),
    *("test_leaving", "test_room_model", "test_workers", "test_failures", "test_console"),
    *("test_demo", "test_extension", "test_findings", "test_clients", "test_admin_browser"),
    *("test_bystanders", "test_transparent", "test_fuzz", "test_poolers", "test_stale_logins"),
    *("test_encodings_of_jobs", "test_log", "test_at_commit", "test_replicas", "test_soak"),
    *("test_at_commit_model", "test_admin_metrics", "test_hidden_names", "test_bounds"),
    *("test_in_database_waits", "test_reuse", "test_result_types", "test_retries", "test_systemd"),
    *("test_room_of_the_proxy", "test_history_objects", "test_in_database", "test_statements"),
    *("test_proxy_protocol", "test_jobs_life", "test_cookie_api_end", "test_history", "test_load"),
    *("test_jobs_model", "test_result", "test_lexer", "test_do_blocks", "test_upstream"),
)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """All tests of a server together, and of these the longest files first. Tests that need no
    server come before these, since a long one of them would be left at the end."""
    _take_turns(items)
    yield
    servers = {server_id(""): 0}

    def order(item: pytest.Item) -> tuple[int, int]:
        callspec = getattr(item, "callspec", None)
        server = server_id(callspec.params.get("server", "") if callspec else "")
        rank = _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST)
        return servers.setdefault(server, len(servers)), rank

    items.sort(key=order)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is collected stays. Otherwise Python's garbage collector would search it again and
    again, which takes as long as all the rest of the collection."""
    gc.disable()
    yield
    gc.enable()
    gc.freeze()


def _take_turns(items: list[pytest.Item]) -> None:
    """On the further servers every second case of a test runs by default, or every n-th with
    ``turns(n)``. The first one moves on, so that each value of one parameter meets each of the
    last."""
    cases: Counter[tuple[Path, str, int]] = Counter()
    for item in items:
        callspec = getattr(item, "callspec", None)
        server = callspec.indices.get("server", 0) if callspec else 0
        if server == 0 or not isinstance(item, pytest.Function):
            continue
        if item.get_closest_marker("slow") or item.get_closest_marker("exhaustive"):
            continue
        marker = item.get_closest_marker("turns")
        (every,) = marker.args if marker else (2,)
        case = (item.path, item.originalname, server)
        if (cases[case] + cases[case] // every) % every:
            item.add_marker(pytest.mark.exhaustive)
        cases[case] += 1


class _WholeFiles(LoadScopeScheduling):  # type: ignore[misc]
    """Lets each process of pytest-xdist have whole files, with one server each.

    By names of tests: ``--dist loadgroup`` of pytest-xdist 3.8 groups nothing with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        server = re.search(r"[\[-](pg\d+)[\]-]", test)
        return f"{file} {server[1]}" if server else file

    def remove_node(self, node: WorkerController) -> str | None:
        """Names the test that killed a process. It is not run again, or that would have no end."""
        work: dict[str, dict[str, bool]] = self.assigned_work[node]
        left = ((u, test) for u in work.values() for test, completed in u.items() if not completed)
        unit, crashed = next(left, ({}, None))
        if crashed is not None:
            unit[crashed] = True
        super().remove_node(node)
        return crashed


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """For pytest-xdist."""
    return _WholeFiles(config, log)


@functools.cache
def server_id(folder: Path | str) -> str:
    """The name of a server in the names of tests."""
    return f"pg{server_version(folder) // 10000}" if isinstance(folder, Path) else "none"


@functools.cache  # This asks programs for their version.
def _server_folders(*kinds: str) -> list[Path]:
    folders: list[Path] = []
    for kind in kinds:
        if kind in ("embedded", "all") and (wheel := find_wheel_bin()):
            folders.append(wheel)
        if kind in ("debian", "all") and (system := find_system_bin()):
            folders.append(system)
        if kind not in ("embedded", "debian", "all"):
            folders.append(Path(kind))
    if not folders:
        raise pytest.UsageError("no PostgreSQL server found: pip install -e '.[dev]' brings one")
    return folders


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No process of ours outlives the session."""
    with ForkServer(program_environment()) as Proxy.forks:
        yield
    deadline = time.monotonic() + 10.0
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"processes left behind: {left}"


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running PostgreSQL server; tests run once for each kind."""
    server = Server(request.param)
    try:
        yield server
        if server.cluster.running:
            left = server.wait_for_no_clients()
            assert not left, f"backends left behind: {left}"
    finally:
        server.close()
    assert not server.cluster.directory.exists()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of an authority of our own."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def tls_server(server: Server, certificates: Certificates) -> Iterator[Server]:
    """A further server like ``server``, with TLS; skipped where PostgreSQL was built without."""
    tls_server = Server(server.bin)
    try:
        tls_server.start_tls(certificates)
        yield tls_server
    finally:
        tls_server.close()


class StartProxy(Protocol):
    """The type of the fixture ``start_proxy``."""

    def __call__(
        self, *options: str, upstream: str | None = None, env: dict[str, str] | None = None
    ) -> Proxy:
        """Starts a proxy; ``upstream``: the server's connection string unless given."""


@pytest.fixture(scope="session")
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy in front of the server, for all tests that need no options of their own."""
    with shared_proxy(upstream_of(server)) as proxy:
        yield proxy


@pytest.fixture
def start_proxy(server: Server) -> Iterator[StartProxy]:
    """Starts further proxies, with options; they end with the test."""
    started: list[Proxy] = []

    def start(
        *options: str, upstream: str | None = None, env: dict[str, str] | None = None
    ) -> Proxy:
        proxy = Proxy(upstream_of(server) if upstream is None else upstream, *options, env=env)
        started.append(proxy)
        _live_proxies.append(proxy)
        return proxy

    yield start
    for proxy in started:
        _live_proxies.remove(proxy)
        proxy.kill()
    for proxy in started:
        assert "Traceback" not in proxy.log, proxy.log


def upstream_of(server: Server) -> str:
    """The server's connection string, as ``--upstream`` takes it."""
    return f"host={server.host} port={server.port}"


@contextlib.contextmanager
def shared_proxy(upstream: str, *options: str) -> Iterator[Proxy]:
    """A proxy for several tests; if one of them fails, its log is shown."""
    with Proxy(upstream, *options) as proxy:
        _live_proxies.append(proxy)
        try:
            yield proxy
        finally:
            _live_proxies.remove(proxy)
        running = proxy.running
        code = proxy.stop() if running else proxy.wait()
        assert running, f"the proxy ended by itself with exit code {code}:\n{proxy.log}"
        assert code == 0, proxy.log
        assert "Traceback" not in proxy.log, proxy.log


@pytest.fixture(scope="module")
def executor_as_before(server: Server) -> Iterator[None]:
    """Drops the role that CREATE EXTENSION makes at the end, if it was not there before."""
    with executors.executor_as_before(server):
        yield


@pytest.fixture(scope="module")
def recording(server: Server) -> Iterator[Proxy]:
    """A proxy that writes the history of all jobs."""
    with shared_proxy(upstream_of(server), "--history", "all") as proxy:
        yield proxy


@pytest.fixture
def relay(server: Server) -> Iterator[UpstreamRelay]:
    """A relay between a proxy and the server, to hold up its logins and requests."""
    with upstream_relay(server) as relay:
        yield relay


@pytest.fixture
def db(server: Server) -> Iterator[str]:
    """The name of a fresh database, for this test alone; every role may create things in it."""
    with database(server, f"test_{next(_database_number)}") as name:
        yield name


@pytest.fixture(scope="module")
def scratch(server: Server) -> Iterator[str]:
    """The name of a database for the tests of one module; every role may create things in it."""
    with database(server, f"scratch_{next(_database_number)}") as name:
        yield name


@pytest.fixture
def conn(proxy: Proxy, scratch: str) -> Iterator[Connection]:
    """A superuser's session through the proxy, in the module's database, autocommit."""
    with proxy.connect(dbname=scratch) as conn:
        yield conn


@pytest.fixture
def observer(server: Server, scratch: str) -> Iterator[Connection]:
    """A superuser's session in the module's database, past the proxy."""
    with server.connect(dbname=scratch) as conn:
        yield conn


@pytest.fixture(
    params=[
        pytest.param(kind, marks=_EXHAUSTIVE if kind in ("psql", "binary") else ())
        for kind in api_clients.KINDS
    ]
)
def client(
    request: pytest.FixtureRequest, proxy: Proxy, scratch: str
) -> Iterator[api_clients.Client]:
    """A superuser's session of each kind of client, through the proxy."""
    yield from api_clients.each_client(request, proxy, scratch)


@pytest.fixture
def gate(observer: Connection) -> Iterator[api_clients.Gate]:
    """A closed gate for jobs, which opens at the end."""
    gate = api_clients.Gate(observer)
    yield gate
    gate.open()


@pytest.fixture
def monitor(server: Server) -> Iterator[Monitor]:
    """Looks at the server's backends."""
    monitor = Monitor(server)
    yield monitor
    monitor.close()


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    """Runs a blocking call in a thread."""
    with ThreadPoolExecutor() as threads:
        yield threads.submit


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Shows with a failed test what the proxies logged last."""
    report = yield
    if report.failed:
        for proxy in _live_proxies:
            report.sections.append(
                (f"log of proxy {proxy.pid}", "\n".join(proxy.log.splitlines()[-40:]))
            )
    return report
