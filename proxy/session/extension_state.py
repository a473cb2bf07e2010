"""Which pg_background the session's database has: the proxy's, in which version of the API, or the
C extension.

Invariant: it `is_known` only if no command about the extension was executed since the server was
asked: in this session, or in a transaction of any session of the proxy that has ended.
"""

from __future__ import annotations

from collections.abc import Collection

from proxy.api.functions import CATALOGS
from proxy.extension.installed import Installed, api_version
from proxy.session.services import Services


class ExtensionState:
    """
    Attributes:
        is_real: whether calls are left to the C extension.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._api: int | None = None
        self._known_at = -1
        self._is_changing = False
        self.is_real = False

    @property
    def api(self) -> int:
        """The version of the API, as last seen; the configured one before that."""
        return self._api or self._services.runtime.config.api_version

    @property
    def is_known(self) -> bool:
        """Whether the next call will find what was last seen."""
        return self._known_at == self._services.extension_changes and not self._is_changing

    @property
    def possible(self) -> Collection[int]:
        """The versions of the API that the next call may find."""
        return (self.api,) if self.is_known else CATALOGS

    def learn(self, version: bytes | None, *, has_real: bool) -> None:
        """The server has said which version of our extension is installed, and whether the C
        extension is, which counts if the server's is wanted."""
        self.is_real = has_real and self._services.runtime.config.extension == "server"
        self._seen(None if version is None else api_version(version.decode("ascii", "replace")))

    def learn_api(self, extension: Installed | None) -> int:
        """The version of the API, now that a call has seen what is installed."""
        return self._seen(None if extension is None else extension.api)

    def _seen(self, api: int | None) -> int:
        self._known_at = self._services.extension_changes
        self._api = api or self._services.runtime.config.api_version
        return self._api

    def change(self) -> None:
        """A command about the extension was executed; its transaction may still roll back."""
        self._is_changing = True

    def transaction_ended(self) -> None:
        """If it has changed the extension, all sessions look at theirs again."""
        if self._is_changing:
            self._is_changing = False
            self._services.extension_changed()
