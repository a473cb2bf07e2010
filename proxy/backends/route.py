"""How a server was reached, for connections that must go the same way."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.config import Host


@dataclass(frozen=True, slots=True)
class Route:
    """A host, and whether the connection is encrypted."""

    host: Host
    encrypted: bool = False

    def __str__(self) -> str:
        return str(self.host)
