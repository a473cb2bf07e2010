"""to_binary gives what a real server sends; OIDs and sizes are those of its catalog."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from protocol.scram import ScramSecret
from protocol.values import to_binary
from protocol.values.oids import ARRAYS, OIDS, type_size
from tests.support.servers import Server

pytestmark = pytest.mark.every_server

TYPES: dict[str, tuple[str, ...]] = {
    "bool": ("true", "false"),
    "int2": ("0", "-32768", "32767"),
    "int4": ("0", "1", "-2147483648", "2147483647"),
    "int8": ("0", "-9223372036854775808", "9223372036854775807"),
    "oid": ("0", "4294967295"),
    "xid": ("0", "4294967295"),
    "cid": ("0", "4294967295"),
    "xid8": ("0", "18446744073709551615"),
    "float4": (
        *("0", "-0", "1", "-1.5", "1e-45", "3.4028235e38", "1.1754944e-38", "0.1", "16777216"),
        *("1e10", "123456.789", "NaN", "Infinity", "-Infinity", "33554430", "9.5367432e-07"),
    ),
    "float8": (
        *("0", "-0", "1", "-1.5", "5e-324", "1.7976931348623157e308", "0.1", "1e22", "1e-7"),
        *("123456789.123456789", "NaN", "Infinity", "-Infinity", "2.2250738585072014e-308"),
    ),
    "numeric": (
        *("0", "0.00", "-0.0", "1", "-1", "10", "10000", "9999", "9999.9999", "1.10", "100000000"),
        *("0.1", "0.0001", "0.00001", "0.00000000000001", "-0.00012300", "12345.678900", "1e100"),
        *("1e-100", "123456789012345678901234567890.123456789012345678901234567890", "NaN"),
        *("10000.0001", "1000000000000.0000000000001", "0.10000", "99990000", "1" * 5000),
    ),
    "text": ("", "a", "caf\u00e9 \u2603", "NULL", 'a "quoted" \\ word', "{a,b}", " padded ", "\n"),
    "varchar": ("", "a"),
    "bpchar": ("", "a", "a  "),
    "name": ("", "a name"),
    '"char"': ("", "a", "\\"),
    "json": ('{"a": [1, null]}', "1"),
    "jsonb": ('{"a": [1, null]}', "1"),
    "xml": ("<a>b</a>", "<?xml version='1.0' encoding='latin1'?><a/>", "text"),
    "bytea": ("", "\\x00ff", "\\x5c", "plain", "\\x27", "\\x" + "00010aff" * 100),
    "uuid": ("00000000-0000-0000-0000-000000000000", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    "date": (
        *("2000-01-01", "1999-12-31", "2024-02-29", "1900-03-01", "0001-01-01", "9999-12-31"),
        *("0001-12-31 BC", "0044-03-15 BC", "4713-01-01 BC", "5874897-12-31", "infinity"),
        *("-infinity", "0005-02-29 BC", "10000-01-01", "1600-02-29"),
    ),
    "timestamp": (
        *("2000-01-01 00:00:00", "2024-02-29 23:59:59.999999", "1999-12-31 23:59:59.5"),
        *("0001-01-01 00:00:00", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999"),
        *("infinity", "-infinity", "1970-01-01 00:00:00.000001", "0044-03-15 12:00:00.1 BC"),
    ),
    "timestamptz": (
        *("2000-01-01 00:00:00+00", "2024-02-29 23:59:59.999999+05:30", "infinity", "-infinity"),
        *("1800-01-01 00:00:00+00", "0044-03-15 12:00:00.1-08 BC", "294276-12-31 00:00:00+00"),
        *("2024-07-01 12:00:00-03:30", "4713-01-02 00:00:00+00 BC"),
    ),
    "time": ("00:00:00", "23:59:59.999999", "24:00:00", "12:34:56.7"),
    "timetz": ("00:00:00+00", "23:59:59.999999-12:30", "12:34:56.7+05:45:30", "24:00:00-15:59"),
    "interval": (
        *("0", "1 year", "-1 year", "1 year 1 mon 1 day 01:02:03.000004", "2 years -3 mons"),
        *("-1 days +02:03:04", "1 day -00:00:01", "-00:00:00.5", "99 hours", "13 mons 40 days"),
        *("2562047788 hours", "-2562047788 hours", "-178000000 years", "-1 mons -1 days -1 us"),
        *("2147483647 days", "-2147483648 days", "2 mons", "1 mon", "2 days", "-2 years 1 sec"),
    ),
    "pg_lsn": ("0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"),
    "inet": (
        *("127.0.0.1", "10.1.2.3/8", "0.0.0.0/0", "255.255.255.255", "::1", "::", "::/0"),
        *(
            "fe80::1/64",
            "2001:db8::ff00:42:8329",
            "::ffff:1.2.3.4",
            "::1.2.3.4/96",
            "1:2:3:4:5:6:7:8",
        ),
    ),
    "cidr": ("10.0.0.0/8", "192.168.100.128/25", "::/0", "2001:db8::/32", "1.2.3.4", "::1"),
    "macaddr": ("08:00:2b:01:02:03", "ff:ff:ff:ff:ff:ff"),
    "macaddr8": ("08:00:2b:01:02:03:04:05",),
}
LATER = {  # since which version the server has it
    "xid8": 130000,
    "macaddr8": 100000,
}
SINCE_14 = ("Infinity", "-Infinity")
SINCE_17 = ("infinity", "-infinity")
ARRAY_LITERALS = (
    "'{}'::int4[]",
    "'{1,NULL,3}'::int4[]",
    "'[2:3]={1,2}'::int4[]",
    "'[-2:-1][0:2]={{1,2,3},{4,5,6}}'::int8[]",
    "'{{{{{{1}}}}}}'::int2[]",
    "ARRAY['', 'a b', 'NULL', 'null', NULL, '\"', '\\', '{', '}', ',', ' ', E'\\n']::text[]",
    "ARRAY[ARRAY['a', NULL], ARRAY['c,d', '']]::varchar[]",
    "ARRAY['\\x', '\\x5c22']::bytea[]",
    "ARRAY[]::text[]",
)
TIME_ZONES = ("UTC", "Asia/Kolkata", "America/St_Johns", "Europe/Amsterdam", "Pacific/Auckland")


@pytest.fixture
def conn(server: Server) -> Iterator[psycopg.Connection]:
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("SET client_encoding = 'UTF8'")
        yield conn


def both_forms(conn: psycopg.Connection, sql: str) -> tuple[int, bytes, bytes]:
    """Type OID, text form and binary form of the value of an expression."""
    results = [
        conn.pgconn.exec_params(f"SELECT {sql}".encode(), None, result_format=form)
        for form in (0, 1)
    ]
    for result in results:
        assert result.status == psycopg.pq.ExecStatus.TUPLES_OK, result.error_message.decode()
    text, binary = (result.get_value(0, 0) for result in results)
    assert text is not None
    assert binary is not None
    return results[0].ftype(0), text, binary


def literals(server: Server, type_name: str) -> list[str]:
    if server.version < LATER.get(type_name, 0):
        return []
    extra = []
    if type_name == "numeric" and server.version >= 140000:
        extra = list(SINCE_14)
    if type_name == "interval" and server.version >= 170000:
        extra = list(SINCE_17)
    quoted = [text.replace("'", "''") for text in (*TYPES[type_name], *extra)]
    return [f"'{text}'::{type_name}" for text in quoted]


def has_xml(conn: psycopg.Connection) -> bool:
    try:
        conn.execute("SELECT '<a/>'::xml")
    except psycopg.errors.FeatureNotSupported:
        return False
    return True


@pytest.mark.parametrize("type_name", TYPES)
def test_the_binary_form_is_the_servers(
    server: Server, conn: psycopg.Connection, type_name: str
) -> None:
    if type_name == "xml" and not has_xml(conn):
        return
    for literal in literals(server, type_name):
        oid, text, binary = both_forms(conn, literal)
        assert oid == OIDS[type_name.strip('"')]
        assert to_binary(oid, text) == binary, (literal[:80], text[:80])


@pytest.mark.parametrize("type_name", TYPES)
def test_so_is_that_of_an_array(server: Server, conn: psycopg.Connection, type_name: str) -> None:
    if type_name == "xml" and not has_xml(conn):
        return
    if values := literals(server, type_name):
        oid, text, binary = both_forms(conn, f"ARRAY[{','.join(values)}, NULL]")
        assert ARRAYS[oid] == OIDS[type_name.strip('"')]
        assert to_binary(oid, text) == binary


@pytest.mark.parametrize("literal", ARRAY_LITERALS)
def test_arrays_of_every_shape(conn: psycopg.Connection, literal: str) -> None:
    oid, text, binary = both_forms(conn, literal)
    assert to_binary(oid, text) == binary


@pytest.mark.parametrize("zone", TIME_ZONES)
def test_timestamps_in_every_time_zone(server: Server, conn: psycopg.Connection, zone: str) -> None:
    conn.execute(f"SET TimeZone = '{zone}'")
    for literal in literals(server, "timestamptz"):
        oid, text, binary = both_forms(conn, literal)
        assert to_binary(oid, text) == binary, text


def test_bytea_in_the_escape_form(conn: psycopg.Connection) -> None:
    conn.execute("SET bytea_output = 'escape'")
    every_byte = "".join(f"{byte:02x}" for byte in range(256))
    oid, text, binary = both_forms(conn, f"'\\x{every_byte}'::bytea")
    assert to_binary(oid, text) == binary == bytes(range(256))


def test_every_byte_of_the_char_type(conn: psycopg.Connection) -> None:
    conn.execute("SET client_encoding = 'SQL_ASCII'")
    for byte in (0, 1, 32, 92, 127, *range(128, 256)):
        oid, text, binary = both_forms(conn, f'({byte - 256 if byte > 127 else byte})::"char"')
        assert to_binary(oid, text) == binary == bytes((byte,))


def test_random_floats_and_numerics(conn: psycopg.Connection) -> None:
    for expression in (
        "(random() * 10 ^ (random() * 60 - 30))::float4",
        "(random() * 10 ^ (random() * 60 - 30))::float8",
        "(random() * 10 ^ (random() * 60 - 30))::numeric * random()::numeric",
        "timestamp '2000-01-01' + random() * interval '200000 years'",
        "(random() - 0.5) * interval '1000 years 1000 months 1000 days 1000 hours'",
    ):
        conn.execute(f"CREATE TEMPORARY TABLE r AS SELECT {expression} FROM generate_series(1,300)")
        oid, text, binary = both_forms(conn, "(SELECT array_agg(r.*::text) FROM r)")
        column = conn.execute("SELECT * FROM r LIMIT 0").description
        assert column
        kind = conn.execute("SELECT format_type(%s, NULL)", (column[0].type_code,)).fetchone()
        assert kind
        oid, text, binary = both_forms(conn, f"(SELECT array_agg(v) FROM r AS r(v))::{kind[0]}[]")
        assert to_binary(oid, text) == binary
        conn.execute("DROP TABLE r")


def test_void_has_no_bytes_in_either_form(conn: psycopg.Connection) -> None:
    oid, text, binary = both_forms(conn, "pg_sleep(0)")
    assert (oid, text, binary) == (OIDS["void"], b"", b"")
    assert to_binary(oid, text) == binary


def test_oids_and_sizes_are_the_catalogs(conn: psycopg.Connection) -> None:
    catalog = {
        oid: (name, size, element)
        for oid, name, size, element in conn.execute(
            "SELECT oid::int8, typname, typlen, CASE WHEN typlen = -1 THEN typelem::int8 ELSE 0 END"
            " FROM pg_catalog.pg_type"
        )
    }
    known = {oid: name for name, oid in OIDS.items() if oid in catalog}
    assert len(known) >= len(OIDS) - 2
    for oid, name in known.items():
        assert catalog[oid][:2] == (name, type_size(oid))
    for oid, element in ARRAYS.items():
        if oid in catalog:
            assert catalog[oid][2] == element
            assert type_size(oid) == -1


@pytest.mark.parametrize(
    "password",
    [
        *(
            "pencil",
            "a\u00a0b",
            "I\u00adX",
            "\u00aa",
            "\u2168",
            "e\u0301",
            "\u00ad",
            "\u0627\u00aa",
        ),
        *("\u00aa\x07", "\u00aa\u0221", "\u0627\u0661\u0628", "caf\u00e9\u1680\u200b", "\u0340"),
        *("\u00e9\ue000", "\ufb01", "\u2003\u00e9", "\U0001f600", "\u00e9\ufffd", "\u0627a"),
    ],
)
def test_passwords_are_prepared_as_the_server_does(
    server: Server, conn: psycopg.Connection, password: str
) -> None:
    if server.version < 100000:
        return
    with conn.transaction(force_rollback=True):
        conn.execute("SET LOCAL password_encryption = 'scram-sha-256'")
        conn.execute(f"CREATE ROLE prepared PASSWORD '{password}'")
        row = conn.execute(
            "SELECT rolpassword FROM pg_authid WHERE rolname = 'prepared'"
        ).fetchone()
    assert row
    secret = ScramSecret.parse(row[0])
    expected = ScramSecret.from_password(
        password.encode(), salt=secret.salt, iterations=secret.iterations
    )
    assert secret == expected
