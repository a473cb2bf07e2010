"""Settings: PostgreSQL's units, libpq's connection strings, and the three places they come from."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from proxy.config import (
    Config,
    ConfigError,
    Host,
    ListenAddress,
    Upstream,
    load,
    parse_listen,
    parse_upstream,
)
from proxy.config.conninfo import parse_conninfo
from proxy.config.gucs import (
    DEFAULT_QUEUE_SIZE,
    MAX_WORKERS,
    WORKER_TIMEOUT,
    Guc,
    parse_memory,
    parse_time_ms,
)
from proxy.config.keepalive import Keepalive
from tests.support.servers import Server

# -- sizes and times ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("64kB", 65536),
        (" 64 kB ", 65536),
        ("1.5kB", 1536),
        ("1e3", 1000),
        (".5MB", 524288),
        ("0x10", 16),
        ("010kB", 8192),
        ("-1", -1),
        ("256MB", 268435456),
        ("1TB", 2**40),
    ],
)
def test_memory_is_read_as_postgresql_reads_it(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("0", 0), ("250", 250), ("1s", 1000), ("5min", 300_000), ("1.5h", 5_400_000), ("900us", 1)],
)
def test_time_is_read_as_postgresql_reads_it(text: str, milliseconds: int) -> None:
    assert parse_time_ms(text) == milliseconds


@pytest.mark.parametrize("text", ["", "kB", "64 kb", "64k", "1 2", "1e999", "nan", "0x", "٣", "1s"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid value"):
        parse_memory(text)


def test_an_unknown_unit_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match='"us", "ms", "s", "min", "h", and "d"'):
        parse_time_ms("5 minutes")


@given(st.integers(0, 2**50))
def test_show_prints_what_can_be_read_back(value: int) -> None:
    size = Guc("size", "0", 0, 2**50, "B")
    time = Guc("time", "0", 0, 2**50, "ms")
    assert size.parse(size.show(str(value))) == value
    assert time.parse(time.show(str(value))) == value


def test_show_prints_the_largest_unit_that_fits() -> None:
    assert DEFAULT_QUEUE_SIZE.show("65536") == "64kB"
    assert DEFAULT_QUEUE_SIZE.show("4097") == "4097B"
    assert WORKER_TIMEOUT.show("300000") == "5min"
    assert WORKER_TIMEOUT.show("0") == "0"
    assert MAX_WORKERS.show(" 16") == "16"


def test_a_setting_out_of_range_is_refused_in_postgresqls_words() -> None:
    with pytest.raises(
        ValueError,
        match=r'^1001 is outside the valid range for parameter "pg_background\.max_workers" '
        r"\(1 \.\. 1000\)$",
    ):
        MAX_WORKERS.parse("1001")
    with pytest.raises(ValueError, match=r"\(4096 B \.\. 268435456 B\)"):
        DEFAULT_QUEUE_SIZE.parse("1GB")
    with pytest.raises(ValueError, match='parameter "pg_background.max_workers": "many"'):
        MAX_WORKERS.parse("many")


def test_the_server_reads_sizes_and_times_as_we_do(server: Server) -> None:
    """temp_file_limit is in kB, deadlock_timeout in ms: what SHOW prints must agree."""
    with server.connect() as conn:
        for text in ("64kB", "1.5MB", "2048", " 3 GB", "0x800", "1e3MB"):
            conn.execute("SELECT set_config('temp_file_limit', %s, false)", [text])
            shown = conn.execute("SHOW temp_file_limit").fetchone()
            size = text if text.endswith("B") else f"{text}kB"
            assert shown == (Guc("temp_file_limit", "0", 0, 2**40, "B").show(size),)
        for text in ("250", "5min", "1.5h", "7200000", "90s"):
            conn.execute("SELECT set_config('deadlock_timeout', %s, false)", [text])
            shown = conn.execute("SHOW deadlock_timeout").fetchone()
            assert shown == (WORKER_TIMEOUT.show(text),)


# -- connection strings ---------------------------------------------------------------------------

CONNINFOS = [
    "",
    "host=localhost port=5432",
    "  host = db1  port =  5433 ",
    "host='a b' port=1",
    r"host='it\'s' password='back\\slash'",
    r"host=a\ b port=''",
    "host= port=5432",
    "host=a\\",
    "host='\\\\'",
    "host=db1,db2 port=5432,5433",
    "host=/run/postgresql",
    "host=first host=second",
    "postgresql://",
    "postgres://db1",
    "postgresql://db1:5433/mydb",
    "postgresql://alice:s%40cret@db1,db2:5433/my%20db?connect_timeout=5&application_name=x",
    "postgresql://[::1]:5433,[2001:db8::1]/",
    "postgresql://%2Frun%2Fpostgresql/db",
    "postgresql:///db?host=/run/postgresql&port=5433",
    "postgresql://alice@/db",
    "postgresql://db1?ssl=true",
]


@pytest.mark.parametrize("text", CONNINFOS)
def test_connection_strings_are_read_as_libpq_reads_them(text: str) -> None:
    # libpq leaves out what is empty.
    ours = {key: value for key, value in parse_conninfo(text).items() if value}
    assert ours == {key: str(value) for key, value in conninfo_to_dict(text).items() if value}


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_what_libpq_quotes_is_read_back(value: str) -> None:
    assert parse_conninfo(make_conninfo(host=value, port=1)) == {"host": value, "port": "1"}


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for prefix in ("", "postgresql://"):
        with contextlib.suppress(ValueError):
            parse_conninfo(prefix + text)


@pytest.mark.parametrize(
    "text",
    [
        "host",
        "host='open",
        "port 5432",
        "postgresql://[::1",
        "postgresql://db%zz",
        "postgresql://db?x",
        "postgresql://[]:1",
        "postgresql://db%00",
    ],
)
def test_a_broken_connection_string_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="connection string|URI"):
        parse_conninfo(text)


# -- upstream and listen --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", (("localhost", 5432),)),
        ("port=5433", (("localhost", 5433),)),
        ("host=a,b", (("a", 5432), ("b", 5432))),
        ("host=a,b port=1,2", (("a", 1), ("b", 2))),
        ("host=a,b port=7", (("a", 7), ("b", 7))),
        ("host=a hostaddr=10.0.0.1", (("a", 5432),)),
        ("host=/run/postgresql", (("/run/postgresql", 5432),)),
        ("postgresql://[::1]:5433", (("::1", 5433),)),
        ("postgresql://a,b:5433", (("a", 5432), ("b", 5433))),
        ("host=a sslmode=prefer target_session_attrs=any", (("a", 5432),)),
    ],
)
def test_upstream(text: str, hosts: tuple[tuple[str, int], ...]) -> None:
    assert tuple((host.name, host.port) for host in parse_upstream(text).hosts) == hosts


def test_a_host_may_have_an_address_of_its_own() -> None:
    assert parse_upstream("host=a hostaddr=10.0.0.1").hosts == (Host("a", 5432, "10.0.0.1"),)
    assert parse_upstream("hostaddr=10.0.0.1").hosts == (Host("10.0.0.1", 5432, "10.0.0.1"),)


def test_how_to_connect_is_read_as_libpq_reads_it() -> None:
    upstream = parse_upstream(
        "host=a sslmode=verify-ca sslrootcert=/ca.pem sslcert=/c.pem sslkey=/k.pem"
        " sslnegotiation=direct target_session_attrs=read-write"
        " keepalives=1 keepalives_idle=30 keepalives_interval=5 keepalives_count=3"
        " tcp_user_timeout=20000"
    )
    assert upstream == Upstream(
        (Host("a", 5432),),
        sslmode="verify-ca",
        sslnegotiation="direct",
        sslrootcert="/ca.pem",
        sslcert="/c.pem",
        sslkey="/k.pem",
        target_session_attrs="read-write",
        keepalive=Keepalive(True, 30, 5, 3, 20000),
    )
    assert parse_upstream("").sslmode == "prefer"
    assert parse_upstream("keepalives=0").keepalive == Keepalive(False)
    assert parse_upstream("sslrootcert=system").sslmode == "verify-full"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port=0", "invalid port number"),
        ("port=70000", "invalid port number"),
        ("port=x", "invalid port number"),
        ("host=a,b port=1,2,3", "3 ports do not match 2 hosts"),
        ("sslmode=maybe", "sslmode=maybe is not supported"),
        ("sslmode=verify-full", "sslmode=verify-full needs sslrootcert"),
        ("sslnegotiation=direct", 'weak sslmode "prefer" may not be used with sslnegotiation'),
        ("sslmode=require sslrootcert=system", 'weak sslmode "require" may not be used with sslr'),
        ("sslkey=x", "sslkey needs sslcert"),
        ("sslcrl=x", '"sslcrl" is not supported'),
        ("keepalives_idle=soon", "keepalives_idle"),
        ("host=a,b hostaddr=10.0.0.1", "2 hosts do not match 1 hostaddr"),
        ("user=alice", '"user" comes from each client'),
        ("postgresql://a/mydb", '"dbname" comes from each client'),
        ("password=secret", "--passfile"),
        ("target_session_attrs=left", "target_session_attrs=left is not supported"),
        ("hots=a", '"hots" is not supported'),
        ("connect_timeout=soon", "invalid value"),
    ],
)
def test_what_the_upstream_cannot_be_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_upstream(text)
    assert "secret" not in str(caught.value)


def test_libpqs_environment_fills_what_the_upstream_does_not_say() -> None:
    environ = {"PGHOST": "/run", "PGPORT": "7", "PGCONNECT_TIMEOUT": "3", "PGUSER": "alice"}
    assert parse_upstream("", environ) == Upstream((Host("/run", 7),), 3.0)
    assert parse_upstream("host=a", environ).hosts == (Host("a", 7),)
    assert parse_upstream("host=a", {"PGHOSTADDR": "10.0.0.1"}).hosts == (Host("a", 5432),)
    with pytest.raises(ValueError, match="sslmode=verify-full"):
        parse_upstream("", {"PGSSLMODE": "verify-full"})


@pytest.mark.parametrize(
    ("text", "address", "printed"),
    [
        ("127.0.0.1:6000", ListenAddress("127.0.0.1", 6000), "127.0.0.1:6000"),
        ("localhost", ListenAddress("localhost", 6543), "localhost:6543"),
        ("*:0", ListenAddress("*", 0), "*:0"),
        (":7", ListenAddress("*", 7), "*:7"),
        ("[::1]:7", ListenAddress("::1", 7), "[::1]:7"),
        ("[::1]", ListenAddress("::1", 6543), "[::1]:6543"),
        ("/run/pg", ListenAddress("/run/pg", 6543), "/run/pg:6543"),
        ("/run/pg:7", ListenAddress("/run/pg", 7), "/run/pg:7"),
        ("/run/a:b", ListenAddress("/run/a:b", 6543), "/run/a:b:6543"),
    ],
)
def test_listen_addresses(text: str, address: ListenAddress, printed: str) -> None:
    assert parse_listen(text) == address
    assert str(address) == printed


@pytest.mark.parametrize("text", ["", "::1", "6543", "a:b", "[::1", "a:70000", "a:-1", "run/pg:1"])
def test_what_is_no_listen_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid address|invalid port"):
        parse_listen(text)


def test_a_unix_socket_is_named_as_postgresql_names_it() -> None:
    assert parse_listen("/run/pg:7").socket_path == Path("/run/pg/.s.PGSQL.7")
    assert parse_listen("localhost:7").socket_path is None


# -- the three places -----------------------------------------------------------------------------


def test_defaults() -> None:
    assert load() == Config()
    assert Config().listen == (ListenAddress("127.0.0.1", 6543),)
    assert Config().default_queue_size == "64kB"
    assert Config().worker_timeout == "0"
    assert Config().shutdown_timeout == 30.0


def test_flags_win_over_the_file_and_the_file_over_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(
        'listen = ["/run/pg", "*:7"]\nupstream = "host=fromfile"\nmax_workers = 3\n'
        'worker_timeout = "1min"\nshutdown_timeout = 1.5\n'
    )
    environ = {"PGHOST": "fromenv", "PGPORT": "7"}
    loaded = load({"max_workers": "4", "worker_timeout": None}, file=file, environ=environ)
    assert loaded.listen == (ListenAddress("/run/pg", 6543), ListenAddress("*", 7))
    assert loaded.upstream.hosts == (Host("fromfile", 7),)
    assert loaded.max_workers == 4
    assert loaded.worker_timeout == "1min"
    assert loaded.shutdown_timeout == 1.5
    assert load({"listen": ["a:1"]}, file=file).listen == (ListenAddress("a", 1),)
    assert load(environ=environ).upstream.hosts == (Host("fromenv", 7),)


def test_the_connection_strings_timeout_holds_unless_the_setting_is_given() -> None:
    assert load({"upstream": "connect_timeout=3"}).connect_timeout == 3.0
    assert (
        load({"upstream": "connect_timeout=3", "connect_timeout": "250ms"}).connect_timeout == 0.25
    )


def test_a_path_in_a_file_is_meant_from_where_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "userlist.txt").write_text("")
    (tmp_path / "proxy.toml").write_text('auth_file = "userlist.txt"')
    assert load(file=tmp_path / "proxy.toml").auth_file == tmp_path / "userlist.txt"


def test_pgpassfile_is_the_default_passfile(tmp_path: Path) -> None:
    passfile = tmp_path / "pass"
    passfile.write_text("")
    assert load(environ={"PGPASSFILE": str(passfile)}).passfile == passfile


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_workrs = 1", '{file}: unknown key "max_workrs"; allowed: listen, upstream, '),
        ("max_workers = 0", "{file}: max_workers: 0 is outside the valid range"),
        ("max_workers = true", "{file}: max_workers: must be a string or a number"),
        ("max_workers = [1]", "{file}: max_workers: must be a string or a number"),
        ("listen = []", "{file}: listen: must be a string or a list of strings"),
        ("[listen]\nhost = 1", "{file}: listen: must be a string or a list of strings"),
        (
            'log_level = "loud"',
            '{file}: log_level: invalid value: "loud" (allowed: debug, info, warning, error)',
        ),
        ('passfile = "/no/such/file"', "{file}: passfile: cannot read /no/such/file: No such"),
        ("shutdown_timeout = -1", '{file}: shutdown_timeout: invalid value: "-1" is negative'),
        ("max_workers 1", "{file}: "),
    ],
)
def test_a_wrong_file_is_answered_with_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(file=file)
    assert str(caught.value).startswith(message.format(file=file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"client_tls_sslmode": "on"},
            '--client-tls-sslmode: invalid value: "on" (allowed: disable, allow',
        ),
        ({"client_tls_sslmode": "require"}, "client_tls_sslmode: require needs client_tls_cert_fi"),
        ({"auth_type": "md5"}, '--auth-type: invalid value: "md5" (allowed: server, plain)'),
        ({"tcp_keepcnt": "-1"}, "--tcp-keepcnt: invalid value"),
        (
            {"upstream": "host=a,b target_session_attrs=primary"},
            "upstream: target_session_attrs=primary needs auth_user",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(flags)
    assert str(caught.value).startswith(message)


def test_the_number_of_workers() -> None:
    assert load().workers == 1
    assert load({"workers": "3"}).workers == 3
    assert load({"workers": "auto"}).workers == len(os.sched_getaffinity(0))
    for text in ("0", "-1", "257", "many", ""):
        with pytest.raises(ConfigError, match="^--workers: "):
            load({"workers": text})


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(ConfigError, match="^--default-queue-size: 1 B is outside"):
        load({"default_queue_size": "1"})
