"""Starts the HTTP server, if ``admin_listen`` is set.

Invariant: nothing of the extra ``admin`` is imported otherwise.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from proxy.admin.figures import measure_lag
from proxy.admin.source import Source
from proxy.config import ConfigError
from proxy.log import logger

if TYPE_CHECKING:
    from proxy.admin.site import Site


class Admin:
    """Serves HTTP from `start` to `close`, if admin_listen is set.

    Args:
        source: provides figures and jobs.

    Raises:
        ConfigError: from the constructor: the extra is missing, or the certificate is unusable.
    """

    def __init__(self, source: Source) -> None:
        self._site: Site | None = None
        self._lag: asyncio.Task[None] | None = None
        self._has_watchers = bool(source.runtime.config.watchers)
        if source.runtime.config.admin_listen is None:
            return
        try:
            from proxy.admin.site import Site
        except ImportError as error:
            raise ConfigError(
                f"admin_listen: needs the extra admin ({error}): pip install"
                " 'pg-background-proxy[admin]'"
            ) from None
        self._site = Site(source)

    async def start(self, sockets: Iterable[socket.socket]) -> None:
        """Serve on these sockets."""
        if self._site is None:
            return
        self._lag = asyncio.get_running_loop().create_task(measure_lag())
        await self._site.serve(sockets)
        if not self._has_watchers:
            logger.info("nobody may see the jobs page: admin_users and stats_users are empty")

    async def close(self) -> None:
        """Stop serving."""
        if self._lag is not None:
            self._lag.cancel()
        if self._site is not None:
            await self._site.close()
