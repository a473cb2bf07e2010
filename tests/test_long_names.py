"""Names of statements and portals: the server tells them apart by their first 63 bytes, in its own
encoding; so does the proxy where there is a call behind one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import psutil
import pytest

from protocol import messages as m
from tests.conftest import StartProxy
from tests.support.recorder import Frontend, S, Sent, errors, kinds, q, rows
from tests.support.servers import Proxy, Server, database
from tests.test_calls_in_protocol import NATIVE

pytestmark = pytest.mark.every_server

LAUNCH = b"SELECT pg_background_launch('SELECT 1')"
# Around 63 bytes, 4096 (as much as is looked at first) and more; cut within a letter, too.
SIZES = (0, 1, 62, 63, 64, 4090, 5000)


@pytest.fixture(scope="module")
def native(server: Server) -> Iterator[str]:
    """A database with functions of our names; the other one is ``ours_names``."""
    with database(server, "native_names") as name, database(server, "ours_names"):
        with server.connect(dbname=name) as conn:
            conn.execute(NATIVE)
        yield name


def script(name: bytes, other: bytes) -> list[Sent]:
    """Each message that has a name, with the one and with the other."""
    return [
        *(m.Parse(name, LAUNCH, ()), m.Describe(b"S", other), S),
        *(m.Bind(name, other, (), (), ()), m.Describe(b"P", other), m.Execute(other, 0), S),
        *(m.Bind(other, name, (), (), ()), m.Close(b"P", name), m.Execute(other, 0), S),
        *(m.Parse(other, b"SELECT 'other'", ()), S, m.Bind(b"", name, (), (), ())),
        *(m.Execute(b"", 0), m.Close(b"S", other), m.Bind(b"", name, (), (), ()), S),
        *(m.Parse(name, b"SELECT 'plain'", ()), m.Bind(b"", other, (), (), ())),
        *(m.Execute(b"", 0), m.Close(b"S", name), S),
    ]


def answers(frontend: Frontend, messages: list[Sent]) -> object:
    frontend.send(*messages, q("DEALLOCATE ALL"))
    got = frontend.until_ready(messages.count(S) + 1)
    values = [[b"pid" if v and v.isdigit() else v for v in row] for row in rows(got)]
    return kinds(got), values, [(error.sqlstate, error.message) for error in errors(got)]


LETTERS = (
    *(("UTF8", "A"), ("UTF8", "é"), ("UTF8", "ソ")),
    *(("LATIN1", "é"), ("SJIS", "ソ"), ("GBK", "丗")),
)


# By default each letter has every twelfth combination of size and ending, and all have others.
@pytest.mark.parametrize("step", [2 * len(LETTERS), pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("encoding", "letter"), LETTERS)
def test_names_are_the_same_as_for_the_server(
    server: Server, proxy: Proxy, native: str, encoding: str, letter: str, step: int
) -> None:
    codec = {"UTF8": "utf-8", "LATIN1": "latin-1", "SJIS": "cp932", "GBK": "gbk"}[encoding]
    one = letter.encode(codec)
    ends = [b"", b"x", b"y", one, one + b"x"]
    # That many bytes for the client, and for the server; the two may differ.
    counts = [n for size in SIZES for n in {size // len(one), size // len(letter.encode())}]
    all_ends = itertools.product((b"", b"_"), (b"", b"x"), ends)
    combinations = list(itertools.product(counts, all_ends))
    with (
        Frontend(server, database=native, client_encoding=encoding) as direct,
        Frontend(proxy, database="ours_names", client_encoding=encoding) as proxied,
    ):
        first = LETTERS.index((encoding, letter)) % step
        for count, (begin, end, other) in combinations[first::step]:
            messages = script(begin + one * count + end, begin + one * count + other)
            assert answers(proxied, messages) == answers(direct, messages)


def test_no_more_of_a_name_is_kept(start_proxy: StartProxy) -> None:
    """200 statements with names of 100 kB took 19 MB."""
    proxy = start_proxy()
    process = psutil.Process(proxy.pid)
    with Frontend(proxy) as frontend:

        def prepare(first: int) -> None:
            for number in range(first, first + 200):
                name = b"%d" % number + b"x" * 100_000
                for sql in (LAUNCH, b"SELECT set_config('a.b', $1, false)"):
                    assert kinds(frontend.ask(m.Parse(name, sql, ()), S)) == "1Z"
                    name = b"s" + name

        prepare(0)
        before = process.memory_info().rss
        prepare(200)
        assert process.memory_info().rss - before < 8 << 20
