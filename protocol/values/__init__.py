"""From the text form of a value to its binary form.

Invariant: a wrong value is worse than an error. A type that we do not convert raises
`NoBinaryForm`, text that we do not understand raises `ProtocolViolation`.

`oids` has the types, their arrays and sizes; `scalars`, `datetimes` and `arrays` the conversions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from protocol.values import datetimes, scalars
from protocol.values.arrays import Array, parse_array
from protocol.values.oids import (
    ARRAYS,
    BIT,
    BOOL,
    BPCHAR,
    BYTEA,
    CHAR,
    CID,
    CIDR,
    DATE,
    FLOAT4,
    FLOAT8,
    INET,
    INT2,
    INT4,
    INT8,
    INTERVAL,
    JSON,
    JSONB,
    MACADDR,
    MACADDR8,
    MONEY,
    NAME,
    NUMERIC,
    OID,
    OIDS,
    PG_LSN,
    RECORD,
    REGCLASS,
    REGPROC,
    TEXT,
    TID,
    TIME,
    TIMESTAMP,
    TIMESTAMPTZ,
    TIMETZ,
    UNKNOWN,
    UUID,
    VARBIT,
    VARCHAR,
    VOID,
    XID,
    XID8,
    XML,
    type_size,
)

_CONVERSIONS: Final[dict[int, Callable[[bytes], bytes]]] = {
    BOOL: scalars.bool_,
    BPCHAR: scalars.raw,
    BYTEA: scalars.bytea,
    CHAR: scalars.char,
    CID: scalars.integer("cid", "I"),
    CIDR: scalars.cidr,
    DATE: datetimes.date,
    FLOAT4: scalars.float_("float4", "f"),
    FLOAT8: scalars.float_("float8", "d"),
    INET: scalars.inet,
    INT2: scalars.integer("int2", "h"),
    INT4: scalars.integer("int4", "i"),
    INT8: scalars.integer("int8", "q"),
    INTERVAL: datetimes.interval,
    JSON: scalars.raw,
    JSONB: scalars.jsonb,
    MACADDR: scalars.macaddr,
    MACADDR8: scalars.macaddr8,
    NAME: scalars.raw,
    NUMERIC: scalars.numeric,
    OID: scalars.integer("oid", "I"),
    PG_LSN: scalars.pg_lsn,
    TEXT: scalars.raw,
    TIME: datetimes.time,
    TIMESTAMP: datetimes.timestamp,
    TIMESTAMPTZ: datetimes.timestamptz,
    TIMETZ: datetimes.timetz,
    UNKNOWN: scalars.raw,
    UUID: scalars.uuid,
    VARCHAR: scalars.raw,
    VOID: scalars.void,
    XID: scalars.integer("xid", "I"),
    XID8: scalars.integer("xid8", "Q"),
    XML: scalars.raw,
}


class NoBinaryForm(LookupError):  # noqa: N818 (it says what is the matter)
    """We cannot convert values of the type `type_oid`."""

    def __init__(self, type_oid: int) -> None:
        super().__init__(type_oid)
        self.type_oid = type_oid

    def __str__(self) -> str:
        return f"no binary form of type {self.type_oid} is known here"


def to_binary(type_oid: int, text: bytes) -> bytes:
    """The binary form of a value, from its text form as PostgreSQL writes it.

    The text must come from a session with DateStyle ISO and IntervalStyle postgres. Characters keep
    their encoding. Arrays of these types, of any dimensions, are converted too.

    Raises:
        NoBinaryForm: we do not convert this type.
        ProtocolViolation: the text is malformed, or of another style.
    """
    convert = _CONVERSIONS.get(type_oid)
    if convert is not None:
        return convert(text)
    element_oid = ARRAYS.get(type_oid)
    if element_oid is None:
        raise NoBinaryForm(type_oid)
    return Array.parse(text).to_binary(element_oid, _CONVERSIONS[element_oid])


__all__ = [
    "ARRAYS",
    "BIT",
    "BOOL",
    "BPCHAR",
    "BYTEA",
    "CHAR",
    "CID",
    "CIDR",
    "DATE",
    "FLOAT4",
    "FLOAT8",
    "INET",
    "INT2",
    "INT4",
    "INT8",
    "INTERVAL",
    "JSON",
    "JSONB",
    "MACADDR",
    "MACADDR8",
    "MONEY",
    "NAME",
    "NUMERIC",
    "OID",
    "OIDS",
    "PG_LSN",
    "RECORD",
    "REGCLASS",
    "REGPROC",
    "TEXT",
    "TID",
    "TIME",
    "TIMESTAMP",
    "TIMESTAMPTZ",
    "TIMETZ",
    "UNKNOWN",
    "UUID",
    "VARBIT",
    "VARCHAR",
    "VOID",
    "XID",
    "XID8",
    "XML",
    "NoBinaryForm",
    "parse_array",
    "to_binary",
    "type_size",
]
