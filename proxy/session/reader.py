"""Reads SQL as the session's server does, and decides how to serve each statement.

Invariant: a text is tokenized once. To find out whether a Query or Parse holds a call, the relay
has its statements read; they go with it to the interception, and do not depend on settings that may
have changed since (`depends_on_settings`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Final

from protocol.errors import ProtocolViolation
from protocol.kinds import F
from protocol.messages import Parse
from protocol.values import oids
from proxy.api.functions import CATALOGS
from proxy.config import Config
from proxy.extension import catalogs, commands, ddl, definitions, do_blocks, setting_commands
from proxy.extension.definitions import Definition
from proxy.session.extension_state import ExtensionState
from proxy.session.named import NamedStatements
from proxy.session.prepared import WithCalls
from proxy.session.reported import ReportedSettings
from proxy.sql import lexer
from proxy.sql.lexer import BudgetError, LexError, Token
from proxy.sql.text import raise_block
from proxy.sql.tokens import Tokens
from proxy.statements import by_name, mentions
from proxy.statements.analysis import analyze
from proxy.statements.plan import Plan, Statement, Substitute, substitute
from proxy.statements.reading import depends_on_settings

_MAX_CODE: Final = 2 * lexer.MAX_BYTES
"""Bytes of definitions and DO blocks per text that are analysed."""
_BEGIN_CODE: Final = frozenset(("create", "alter", "do"))
_SHORT: Final = 1024
"""Texts up to this many bytes are remembered."""
_REMEMBERED: Final = 256
"""Number of texts remembered: programs repeat the same few."""


class SqlReader:
    """Reads the SQL of one session.

    Attributes:
        too_long: whether the last text that may hold a call was too long to be read.
    """

    def __init__(
        self,
        reported: ReportedSettings,
        named: NamedStatements,
        extension: ExtensionState,
        config: Callable[[], Config],
        pids: Callable[[], Collection[int]],
    ) -> None:
        """
        Args:
            reported: the settings that affect how SQL is read.
            named: the statements and portals that it may use.
            extension: what the database has.
            config: returns the current configuration.
            pids: returns those of running jobs.
        """
        self._reported = reported
        self._named = named
        self._extension = extension
        self._config = config
        self._pids = pids
        self.too_long = False
        self._code_left = 0

    # Into statements

    def read(self, kind: int, body: bytes) -> list[Statement]:
        """The statements of a Query; a Parse is read as one."""
        sql = text_of(kind, body)
        if not self._named.must_read(sql.lower()):
            return [Statement(sql)]
        self.too_long = False
        self._code_left = _MAX_CODE
        try:
            parts = self._split(sql)
        except LexError as error:
            self.too_long = isinstance(error, BudgetError)
            return [Statement(sql)]
        if any(_makes_objects(sql, part) for part in parts):
            self._extension.change()
        if kind == F.PARSE:
            alone = self._tokens(sql, parts[0].tokens) if len(parts) == 1 else None
            is_kept = not body.startswith(b"\0")
            voids = _voids(body)
            calls = self._known_calls(sql, voids)
            return [
                Statement(sql, tokens=alone, sent=sql, voids=voids, is_kept=is_kept, calls=calls)
            ]
        return [self._statement(sql, part) for part in parts]

    def _split(self, sql: bytes) -> list[lexer.Statement]:
        """Raises LexError, BudgetError."""
        if len(sql) > lexer.MAX_TEXT:
            raise BudgetError("the text is too long")
        conforming = self._is_conforming
        if b"\v" in sql and self.server_version < 160000:
            # Raises LexError if this server does not take it for white space.
            lexer.tokenize(
                sql,
                standard_conforming_strings=conforming,
                encoding=self._encoding,
                vertical_tab=False,
                bounded=True,
            )
        split = _split_short if len(sql) <= _SHORT else _split_text
        return split(sql, conforming, self._encoding)

    def _statement(self, sql: bytes, part: lexer.Statement) -> Statement:
        start, end, tokens = part
        text = sql[start:end]
        if not self._named.must_read(text.lower()):
            return Statement(text, start)
        if start:
            tokens = [Token(kind, at - start, to - start) for kind, at, to in tokens]
        calls = self._known_calls(text)
        return Statement(text, start, self._tokens(text, tokens), sql, calls=calls)

    def _known_calls(
        self, text: bytes, voids: frozenset[int] = frozenset()
    ) -> dict[int, Plan | None]:
        """`Statement.calls`, from memory if a short text was read before in the same way."""
        if len(text) > _SHORT:
            return {}
        return _calls_of_short(text, self._is_conforming, self._encoding, voids)

    def _tokens(self, text: bytes, tokens: list[Token]) -> Tokens:
        return Tokens(text, tokens, self._encoding)

    @property
    def _is_conforming(self) -> bool:
        return self._reported[b"standard_conforming_strings"] != b"off"

    @property
    def _encoding(self) -> str:
        return self._reported[b"client_encoding"].decode("ascii", "replace")

    @property
    def server_version(self) -> int:
        """As in server_version_num, e.g. 150004."""
        match = re.match(rb"(\d+)(?:\.(\d+))?", self._reported[b"server_version"])
        if match is None:
            return 0
        major = int(match[1])
        return major * 10000 + (int(match[2] or 0) * 100 if major < 10 else 0)

    # How to serve them

    def calls(
        self, kind: int, body: bytes, *, settings_may_differ: bool = False
    ) -> list[Statement] | None:
        """The statements of a Query or Parse if one is, or may be, served or changed: that can
        depend on what the server has not said yet."""
        if settings_may_differ and depends_on_settings(text_of(kind, body)):
            return []
        statements = self.read(kind, body)
        return statements if self.has_call(statements) else None

    def has_call(self, statements: Iterable[Statement]) -> bool:
        """Whether one of these is served or changed, in an API version the database may have."""
        possible = self._extension.possible
        return any(
            self._plan(statement, api) is not None for statement in statements for api in possible
        )

    def plan(self, statement: Statement) -> Plan | Substitute | None:
        """How to serve a statement; None if it passes unchanged."""
        return self._plan(statement, self._extension.api)

    def may_call(self, statement: Statement) -> bool:
        """Whether this has a call in some version of the API."""
        return any(isinstance(self._plan(statement, api), Plan) for api in CATALOGS)

    def _plan(self, statement: Statement, api: int) -> Plan | Substitute | None:
        tokens, calls = statement.tokens, statement.calls
        if tokens is None:
            return None
        if not (self._extension.uses_c_extension or statement.is_others):
            if api not in calls:
                calls[api] = analyze(tokens, CATALOGS[api], voids=statement.voids)
            if calls[api] is not None:
                return calls[api]
        if not statement.substitutes:
            statement.substitutes.append(
                self._command(tokens)
                or self._by_name(tokens)
                or self._setting(tokens)
                or self._with_catalogs(statement, tokens)
                or (self._code(tokens) if tokens.keyword(0) in _BEGIN_CODE else None)
            )
        [found] = statement.substitutes
        if found is not None and found.tag is None and self._is_tool:
            return None
        return found

    def _command(self, tokens: Tokens) -> Substitute | None:
        """The substitute for a command about the extension."""
        config = self._config()
        command = commands.parse(tokens) if config.extension == "proxy" else None
        if command is None:
            return None
        return substitute(tokens.sql, self._block(command, tokens.sql), command.tag)

    def _block(self, command: ddl.Command, text: bytes) -> bytes:
        """The block that carries out a command."""
        api = self._config().api_version
        return ddl.block(command, text, api=api, server_version=self.server_version)

    def _code(self, tokens: Tokens) -> Substitute | None:
        """The substitute for a definition or DO block, unless this text had too much code."""
        self._code_left -= min(len(tokens.sql), lexer.MAX_BYTES)
        if self._code_left < 0:
            return None
        return self._do_block(tokens) or self._definition(tokens)

    def _do_block(self, tokens: Tokens) -> Substitute | None:
        """The substitute for a DO block that creates or asks for the extension."""
        plan = self._about_extension(tokens)
        if plan is None or self._analyzed(tokens) is None:
            return plan
        return replace(plan, is_undecided=True)

    def _about_extension(self, tokens: Tokens) -> Substitute | None:
        config = self._config()
        if config.extension != "proxy":
            return None
        return do_blocks.analyze(
            tokens,
            self._block,
            server_version=self.server_version,
            standard_conforming_strings=self._is_conforming,
            with_catalogs=config.catalogs != "off",
        )

    def _by_name(self, tokens: Tokens) -> Substitute | None:
        """The refusal of SQL that uses a statement with a call by name, unless the server can."""
        use = by_name.used(tokens)
        if use is None:
            return None
        if use.is_portal:
            portal = self._named.portal(use.name)
            made = None if portal is None else portal.statement
        else:
            made = self._named.statement(use.name)
        if not isinstance(made, WithCalls) or (made.client_parse is not None and not use.is_portal):
            return None
        return substitute(tokens.sql, raise_block(use.refusal()), b"EXECUTE")

    def _setting(self, tokens: Tokens) -> Substitute | None:
        """The substitute for setting or resetting one of our settings."""
        if self._extension.uses_c_extension:
            return None
        return setting_commands.analyze(
            tokens, self._config().session_defaults, server_version=self.server_version
        )

    def _with_catalogs(self, statement: Statement, tokens: Tokens) -> Substitute | None:
        """The substitute for a catalog query, which is to show our extension and jobs."""
        config = self._config()
        if config.catalogs == "off":
            return None
        jobs = catalogs.Jobs(self._pids(), by_name=statement.is_kept or config.workers > 1)
        return catalogs.analyze(
            tokens,
            server_version=self.server_version,
            jobs=jobs,
            sent=statement.sent,
            has_stand_ins=bool(self._named.statements or self._named.portals),
        )

    def _definition(self, tokens: Tokens) -> Substitute | None:
        """The substitute for a definition that looks for jobs where it does not find them."""
        found = self._analyzed(tokens)
        return None if found is None else found.undecided

    def _analyzed(self, tokens: Tokens) -> Definition | None:
        if self._config().catalogs == "off" or self.server_version < 100000:
            return None
        return definitions.analyze(tokens, standard_conforming_strings=self._is_conforming)

    def decide(
        self, statement: Statement, schema: bytes | None, level: bytes, *, has_c_extension: bool
    ) -> None:
        """Decide about such a definition, given the answer to `VIEW_QUERY`."""
        assert statement.tokens is not None
        found = None if has_c_extension else self._analyzed(statement.tokens)
        plan = self._about_extension(statement.tokens)
        if found is not None:
            rewrites = self._config().catalogs == "definitions"
            told = definitions.notice(schema, rewrites=rewrites)
            if plan is None and rewrites and schema is not None:
                plan = found.with_view(schema)
            elif plan is not None and definitions.wants_notices(level):
                plan = replace(plan, notice=told)
            if plan is None and definitions.wants_notices(level):
                plan = found.with_notice(schema, rewrites=rewrites)
        statement.substitutes[:] = [plan]

    @property
    def _is_tool(self) -> bool:
        """Whether the client is a tool that must see the catalogs as they are."""
        return self._reported[b"application_name"] in catalogs.TOOLS


def _split_text(sql: bytes, conforming: bool, encoding: str) -> list[lexer.Statement]:
    return lexer.split(sql, standard_conforming_strings=conforming, encoding=encoding, bounded=True)


_split_short = functools.lru_cache(_REMEMBERED)(_split_text)


@functools.lru_cache(_REMEMBERED)
def _calls_of_short(
    text: bytes, conforming: bool, encoding: str, voids: frozenset[int]
) -> dict[int, Plan | None]:
    return {}


def _voids(parse: bytes) -> frozenset[int]:
    """The numbers of the parameters of type void."""
    try:
        types = Parse.parse(parse).parameter_types
    except ProtocolViolation:
        return frozenset()
    return frozenset(number for number, oid in enumerate(types, 1) if oid == oids.VOID)


_MAKES_OBJECTS: Final = frozenset((b"create", b"alter", b"drop"))


def _makes_objects(sql: bytes, part: lexer.Statement) -> bool:
    """Whether a statement may create or drop an object with one of our names."""
    start, end, tokens = part
    _, word, word_end = tokens[0]
    first = sql[word:word_end].lower()
    return first in _MAKES_OBJECTS and mentions.FUNCTIONS in sql[start:end].lower()


def text_of(kind: int, body: bytes) -> bytes:
    """The SQL of a Query or Parse; empty if malformed, which the server will report."""
    sql, end, rest = (body.partition(b"\0")[2] if kind == F.PARSE else body).partition(b"\0")
    return b"" if not end or (kind == F.QUERY and rest) else sql
