"""From the text form of a value to its binary form.

Invariant: no value is better than a wrong one. A type that is not converted raises `NoBinaryForm`,
text that is not understood raises `ProtocolViolation`.

`oids` has the types, their arrays and sizes; `scalars`, `datetimes` and `arrays` convert values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from protocol.values import datetimes, oids, scalars
from protocol.values.arrays import Array, parse_array

_CONVERSIONS: Final[dict[int, Callable[[bytes], bytes]]] = {
    oids.BOOL: scalars.bool_,
    oids.BPCHAR: scalars.raw,
    oids.BYTEA: scalars.bytea,
    oids.CHAR: scalars.char,
    oids.CID: scalars.integer("cid", "I"),
    oids.CIDR: scalars.network("cidr"),
    oids.DATE: datetimes.date,
    oids.FLOAT4: scalars.float_("float4", "f"),
    oids.FLOAT8: scalars.float_("float8", "d"),
    oids.INET: scalars.network("inet"),
    oids.INT2: scalars.integer("int2", "h"),
    oids.INT4: scalars.integer("int4", "i"),
    oids.INT8: scalars.integer("int8", "q"),
    oids.INTERVAL: datetimes.interval,
    oids.JSON: scalars.raw,
    oids.JSONB: scalars.jsonb,
    oids.MACADDR: scalars.macaddr("macaddr", 6),
    oids.MACADDR8: scalars.macaddr("macaddr8", 8),
    oids.NAME: scalars.raw,
    oids.NUMERIC: scalars.numeric,
    oids.OID: scalars.integer("oid", "I"),
    oids.PG_LSN: scalars.pg_lsn,
    oids.TEXT: scalars.raw,
    oids.TIME: datetimes.time,
    oids.TIMESTAMP: datetimes.timestamp,
    oids.TIMESTAMPTZ: datetimes.timestamptz,
    oids.TIMETZ: datetimes.timetz,
    oids.UNKNOWN: scalars.raw,
    oids.UUID: scalars.uuid,
    oids.VARCHAR: scalars.raw,
    oids.VOID: scalars.void,
    oids.XID: scalars.integer("xid", "I"),
    oids.XID8: scalars.integer("xid8", "Q"),
    oids.XML: scalars.raw,
}


class NoBinaryForm(LookupError):  # noqa: N818 (it says what is the matter)
    """Values of the type `type_oid` cannot be converted."""

    def __init__(self, type_oid: int) -> None:
        super().__init__(type_oid)
        self.type_oid = type_oid

    def __str__(self) -> str:
        return f"no binary form of type {self.type_oid} is known here"


def has_binary_form(type_oid: int) -> bool:
    """Whether `to_binary` converts this type."""
    return type_oid in _CONVERSIONS or type_oid in oids.ARRAYS


def to_binary(type_oid: int, text: bytes) -> bytes:
    """The binary form of a value, from its text form as PostgreSQL writes it.

    The session must have DateStyle ISO and IntervalStyle postgres. Characters keep their encoding.
    Arrays of these types, of any dimensions, are converted too.

    Raises:
        NoBinaryForm: the type is not converted here.
        ProtocolViolation: the text is malformed, or of another style.
    """
    convert = _CONVERSIONS.get(type_oid)
    if convert is not None:
        return convert(text)
    element_oid = oids.ARRAYS.get(type_oid)
    if element_oid is None:
        raise NoBinaryForm(type_oid)
    return Array.parse(text).to_binary(element_oid, _CONVERSIONS[element_oid])


__all__ = ["NoBinaryForm", "has_binary_form", "parse_array", "to_binary"]
