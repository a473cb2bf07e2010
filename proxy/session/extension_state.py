"""Which pg_background the session's database has: ours, in which version of the API, or the C
extension; and which of our names belong to other objects there.

Invariant: it `is_known` only if no command about the extension was executed since the server was
asked: in this session, or in a finished transaction of any session of the proxy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Final

from proxy.api.functions import CATALOGS, FUNCTIONS, VIEWS
from proxy.config.gucs import SESSION_SETTING
from proxy.extension.composites import TYPES, Composites
from proxy.extension.installed import FIND, REALLY, VERSION, Installed, api_version
from proxy.extension.names import ALIKE, is_there
from proxy.extension.texts import sql
from proxy.session.services import Services
from proxy.statements.plan import Plan


def state_query(server_version: int) -> bytes:
    """The query whose row `ExtensionState.learn` gets: our extension's version or NULL, whether the
    server has the C extension, our names that other objects have, the marker's OID and the
    composite types, whether functions in the server reach the proxy; and client_min_messages."""
    return _STATE_QUERY if server_version >= 90600 else _STATE_QUERY_9_5


def _state_query(speaks: str) -> bytes:
    return sql(
        "state",
        version=VERSION,
        find=FIND,
        really=REALLY,
        alike=ALIKE,
        types=TYPES,
        speaks=speaks,
    ).encode()


_STATE_QUERY: Final = _state_query(
    f"pg_catalog.length(pg_catalog.current_setting('{SESSION_SETTING.decode()}', true))"
    " OPERATOR(pg_catalog.>) 0"
)
_STATE_QUERY_9_5: Final = _state_query("false")

BARE_QUERY: Final = b"SELECT %b OR %b" % (
    is_there(chain(*FUNCTIONS.values(), VIEWS.values())),
    REALLY.encode(),
)
"""A query that tells whether the other, ten times as slow, would find anything."""


class ExtensionState:
    """What a session knows about the extension.

    Attributes:
        composites: the composite types, as last seen.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._api: int | None = None
        self._known_at = -1
        self._is_changing = False
        self._has_c_extension = False
        self._speaks = False
        self._has_no_objects = False
        self._alike: Collection[str] = ()
        self.composites = Composites()

    @property
    def api(self) -> int:
        """The version of the API, as last seen; before that, the configured one."""
        return self._api or self._services.runtime.config.api_version

    @property
    def is_known(self) -> bool:
        """Whether the next call will find what was last seen."""
        return self._known_at == self._services.extension_changes and not self._is_changing

    @property
    def has_no_objects(self) -> bool:
        """Whether the database has no objects of our names, as last seen and not changed since."""
        return self.is_known and self._has_no_objects

    @property
    def uses_c_extension(self) -> bool:
        """Whether calls are left to the C extension."""
        is_wanted = self._services.runtime.config.extension == "server"
        return self._has_c_extension and self.is_known and is_wanted

    @property
    def has_functions(self) -> bool:
        """Whether the server has our functions too, and these reach the proxy."""
        return self.is_known and self._speaks and self.composites.marker is not None

    @property
    def possible(self) -> Collection[int]:
        """The API versions that the next call may find."""
        return (self.api,) if self.is_known else CATALOGS

    def may_mean_other_objects(self, plan: Plan) -> bool:
        """Whether a call may mean another object of the database; the server knows. The C
        extension's objects count as others."""
        return (
            not self.is_known
            or self._has_c_extension
            or any(call.function.name in self._alike for call in plan.all_calls)
        )

    def learn(
        self,
        version: bytes | None,
        *,
        has_c_extension: bool,
        alike: Collection[str] = (),
        marker: bytes | None = None,
        types: Mapping[str, int] | None = None,
        speaks: bool = False,
    ) -> None:
        """Note what the server has said: the version of our extension; whether it has the C
        extension, which counts if the configuration prefers it; which of our names other objects
        have; which composite types exist; and whether functions in the server reach the proxy."""
        self._has_c_extension = has_c_extension
        self._has_no_objects = version is None and not (has_c_extension or alike)
        self._alike = frozenset(alike)
        self._speaks = speaks
        self._known_at = self._services.extension_changes
        api = None if version is None else api_version(version.decode("ascii", "replace"))
        self.composites = Composites(marker, self._seen(api), types or {})

    def learn_api(self, extension: Installed | None) -> int:
        """The version of the API, now that a call has seen what is installed."""
        return self._seen(None if extension is None else extension.api)

    def _seen(self, api: int | None) -> int:
        self._api = api or self._services.runtime.config.api_version
        return self._api

    @property
    def is_split(self) -> bool:
        """Whether the client's calls are ours, but those inside the database the C extension's."""
        return self._has_c_extension and self._services.runtime.config.extension == "proxy"

    def forget(self) -> None:
        """A call has found something else than last seen."""
        self._known_at = -1

    def change(self) -> None:
        """Note a command that creates or drops the extension, or an object with one of its names;
        its transaction may still roll back."""
        self._is_changing = True

    def transaction_ended(self) -> None:
        """If it has changed the extension, have all sessions ask again."""
        if self._is_changing:
            self._is_changing = False
            self._services.extension_changed()
