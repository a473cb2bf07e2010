"""The answer to ``/readyz``: whether a client could log in now.

Invariant: one probe of the server runs at a time, and its result is remembered for a moment.
"""

from __future__ import annotations

import asyncio
from typing import Final

from protocol.errors import SQLError
from proxy.admin.source import Source
from proxy.backends.probe import probe
from proxy.log import logger
from proxy.reasons import explain

_MEMORY: Final = 2.0
_MEMORY_OF_FAILURE: Final = 0.5
"""Seconds for which the result of a probe is remembered."""

_TIMEOUT: Final = 2.0
"""Seconds for a server to answer; load balancers do not wait long either."""


class Readiness:
    """The readiness of a source's proxy."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._until = 0.0
        self._reason = ""
        self._looking: asyncio.Task[None] | None = None

    async def reason(self) -> str:
        """Why a client could not log in; "" if it could."""
        if reason := self._source.unready:
            return reason
        loop = asyncio.get_running_loop()
        if loop.time() >= self._until:
            if self._looking is None:
                self._looking = loop.create_task(self._look())
            await asyncio.shield(self._looking)
        return self._reason

    async def _look(self) -> None:
        runtime = self._source.runtime
        try:
            async with asyncio.timeout(_TIMEOUT):
                await probe(runtime.dialer, runtime.config)
            reason = detail = ""
        except TimeoutError:
            reason = detail = "the server does not answer"
        except SQLError as error:
            reason, detail = f"the server takes no logins ({error.sqlstate})", explain(error)
        except OSError as error:
            reason, detail = "the server cannot be reached", explain(error)
        finally:
            self._looking = None
        if reason != self._reason:
            if reason:
                logger.warning("not ready: %s: %s", reason, detail)
            else:
                logger.info("ready again")
        self._reason = reason
        memory = _MEMORY_OF_FAILURE if reason else _MEMORY
        self._until = asyncio.get_running_loop().time() + memory

    def close(self) -> None:
        """Stop probing."""
        if self._looking is not None:
            self._looking.cancel()
