"""SQL as the session's server reads it, and what is to be done about each statement.

Invariant: a text is split into tokens once. The relay asks whether a Query or Parse holds a call,
and the statements that were read for the answer go with it to the interception. They do not depend
on settings that may have changed in between (`depends_on_settings`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from protocol.kinds import F
from proxy.api.functions import CATALOGS
from proxy.config import Config
from proxy.extension import catalogs, commands, ddl
from proxy.session.extension_state import ExtensionState
from proxy.session.relay import Relay
from proxy.sql import lexer
from proxy.sql.lexer import BudgetError, LexError, Token
from proxy.sql.tokens import Tokens
from proxy.statements.analysis import analyze
from proxy.statements.plan import Plan, Statement, Substitute, substitute
from proxy.statements.reading import depends_on_settings
from proxy.statements.triggers import may_be_ours


class SqlReader:
    """Reads the SQL of one session.

    Attributes:
        too_long: whether the last text that may have held a call was too long to be read.
    """

    def __init__(
        self, relay: Relay, extension: ExtensionState, config: Callable[[], Config]
    ) -> None:
        self._relay = relay
        self._extension = extension
        self._config = config
        self.too_long = False

    # Into statements

    def read(self, kind: int, body: bytes) -> list[Statement]:
        """The statements of a Query; the text of a Parse as one."""
        sql = text_of(kind, body)
        if not may_be_ours(sql.lower()):
            return [Statement(sql)]
        self.too_long = False
        try:
            parts = self._split(sql)
        except LexError as error:
            self.too_long = isinstance(error, BudgetError)
            return [Statement(sql)]
        if kind == F.PARSE:
            alone = self._tokens(sql, parts[0].tokens) if len(parts) == 1 else None
            return [Statement(sql, tokens=alone)]
        return [self._statement(sql, part) for part in parts]

    def _split(self, sql: bytes) -> list[lexer.Statement]:
        """Raises LexError, BudgetError."""
        if len(sql) > lexer.MAX_TEXT:
            raise BudgetError("the text is too long")
        conforming = self._relay.setting(b"standard_conforming_strings") != b"off"
        if b"\v" in sql and self.server_version < 160000:
            # Raises LexError if this server does not take it for white space.
            lexer.tokenize(
                sql,
                standard_conforming_strings=conforming,
                encoding=self._encoding,
                vertical_tab=False,
                bounded=True,
            )
        return lexer.split(
            sql, standard_conforming_strings=conforming, encoding=self._encoding, bounded=True
        )

    def _statement(self, sql: bytes, part: lexer.Statement) -> Statement:
        start, end, tokens = part
        text = sql[start:end]
        if not may_be_ours(text.lower()):
            return Statement(text, start)
        if start:
            tokens = [Token(kind, at - start, to - start) for kind, at, to in tokens]
        return Statement(text, start, self._tokens(text, tokens))

    def _tokens(self, text: bytes, tokens: list[Token]) -> Tokens:
        return Tokens(text, tokens, self._encoding)

    @property
    def _encoding(self) -> str:
        return self._relay.setting(b"client_encoding").decode("ascii", "replace")

    @property
    def server_version(self) -> int:
        """As server_version_num, e.g. 150004."""
        version = self._relay.parameters.get(b"server_version", b"")
        match = re.match(rb"(\d+)(?:\.(\d+))?", version)
        if match is None:
            return 0
        major = int(match[1])
        return major * 10000 + (int(match[2] or 0) * 100 if major < 10 else 0)

    # What to do

    def calls(self, kind: int, body: bytes) -> list[Statement] | None:
        """The statements of a Query or Parse, if one is to be served or changed, or may be: whether
        it is may depend on what the server has not said yet."""
        if self._relay.settings_may_differ and depends_on_settings(text_of(kind, body)):
            return []
        statements = self.read(kind, body)
        return statements if self.has_call(statements) else None

    def has_call(self, statements: Iterable[Statement]) -> bool:
        """Whether one of these is to be served or changed, in a version of the API that the
        database may have."""
        possible = self._extension.possible
        return any(
            self._plan(statement, api) is not None for statement in statements for api in possible
        )

    def plan(self, statement: Statement) -> Plan | Substitute | None:
        """How to serve a statement; None if it passes as it is."""
        return self._plan(statement, self._extension.api)

    def depends_on_api(self, statement: Statement) -> bool:
        """Whether this may be a call that is another with each version of the API, or one that may
        be the C extension's to serve."""
        plans = [self._plan(statement, api) for api in CATALOGS]
        if isinstance(plans[0], Substitute):
            return False
        if self._config().extension == "server":
            return any(plans)
        return plans[0] != plans[1]

    def _plan(self, statement: Statement, api: int) -> Plan | Substitute | None:
        tokens, calls = statement.tokens, statement.calls
        if tokens is None:
            return None
        if not self._extension.is_real:
            if api not in calls:
                calls[api] = analyze(tokens, CATALOGS[api])
            if calls[api] is not None:
                return calls[api]
        if not statement.substitutes:
            statement.substitutes.append(self._command(tokens) or self._with_catalogs(tokens))
        [found] = statement.substitutes
        if found is not None and found.tag is None and self._is_tool:
            return None
        return found

    def _command(self, tokens: Tokens) -> Substitute | None:
        """What does a command about the extension."""
        config = self._config()
        command = commands.parse(tokens) if config.extension == "proxy" else None
        if command is None:
            return None
        block = ddl.block(
            command, tokens.sql, api=config.api_version, server_version=self.server_version
        )
        return substitute(tokens.sql, block, command.tag)

    def _with_catalogs(self, tokens: Tokens) -> Substitute | None:
        """A query that looks into the catalogs, which are to show our extension and jobs."""
        if not self._config().catalogs:
            return None
        return catalogs.analyze(tokens, server_version=self.server_version)

    @property
    def _is_tool(self) -> bool:
        """Whether the client is to see the catalogs as they are."""
        return self._relay.parameters.get(b"application_name") in catalogs.TOOLS


def text_of(kind: int, body: bytes) -> bytes:
    """The SQL of a Query or Parse; none if it is malformed, as the server will say."""
    sql, end, rest = (body.partition(b"\0")[2] if kind == F.PARSE else body).partition(b"\0")
    return b"" if not end or (kind == F.QUERY and rest) else sql
