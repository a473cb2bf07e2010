"""The composite types of the extension, as a database has them.

Invariant: results, and fields in them, have the types' OIDs in the database; without the extension
they are anonymous records. `marker` tells one CREATE EXTENSION from another, so that no statement
is executed under a description with types that are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from proxy.api.functions import Column, Type
from proxy.extension.installed import type_name, types

TYPES: Final = (
    "CAST(ARRAY(SELECT pg_catalog.concat(c.relname, ' ', c.reltype)"
    f" {types('m.pronamespace')}) AS pg_catalog.text)"
)
"""An SQL expression, the text of a text[]: names and OIDs of the types; ``m`` is the marker."""


@dataclass(frozen=True, slots=True)
class Composites:
    """
    Attributes:
        marker: the OID of the extension's marker; None without the extension.
        api: the version of its API.
        oids: of the types, by name.
    """

    marker: bytes | None = None
    api: int = 1
    oids: Mapping[str, int] = field(default_factory=dict)

    def resolved(self, type: Type) -> Type:
        """One of our types as the database has it."""
        if not type.columns:
            return type
        columns = (Column(column.name, self.resolved(column.type)) for column in type.columns)
        oid = self.oids.get(type_name(type, self.api), type.oid)
        return replace(type, oid=oid, columns=tuple(columns))
