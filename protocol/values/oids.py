"""PostgreSQL's built-in types: their OIDs (pg_type.dat) and sizes (pg_type.typlen).

Invariant: these numbers are the same in every server version. User-defined types are not here.
"""

from __future__ import annotations

from typing import Final

BOOL: Final = 16
BYTEA: Final = 17
CHAR: Final = 18
"""The type ``"char"`` of one byte; ``char(n)`` is BPCHAR."""
NAME: Final = 19
INT8: Final = 20
INT2: Final = 21
INT4: Final = 23
REGPROC: Final = 24
TEXT: Final = 25
OID: Final = 26
TID: Final = 27
XID: Final = 28
CID: Final = 29
JSON: Final = 114
XML: Final = 142
PG_NODE_TREE: Final = 194
CIDR: Final = 650
FLOAT4: Final = 700
FLOAT8: Final = 701
UNKNOWN: Final = 705
MACADDR8: Final = 774
MONEY: Final = 790
MACADDR: Final = 829
INET: Final = 869
BPCHAR: Final = 1042
VARCHAR: Final = 1043
DATE: Final = 1082
TIME: Final = 1083
TIMESTAMP: Final = 1114
TIMESTAMPTZ: Final = 1184
INTERVAL: Final = 1186
TIMETZ: Final = 1266
BIT: Final = 1560
VARBIT: Final = 1562
NUMERIC: Final = 1700
REGCLASS: Final = 2205
RECORD: Final = 2249
CSTRING: Final = 2275
VOID: Final = 2278
UUID: Final = 2950
PG_LSN: Final = 3220
JSONB: Final = 3802
XID8: Final = 5069

OIDS: Final[dict[str, int]] = {
    name.lower(): oid for name, oid in tuple(globals().items()) if isinstance(oid, int)
}
"""The same, by name in pg_type: ``OIDS["int4"] == INT4``."""

ARRAYS: Final[dict[int, int]] = {
    143: XML,
    199: JSON,
    271: XID8,
    651: CIDR,
    775: MACADDR8,
    1000: BOOL,
    1001: BYTEA,
    1002: CHAR,
    1003: NAME,
    1005: INT2,
    1007: INT4,
    1009: TEXT,
    1011: XID,
    1012: CID,
    1014: BPCHAR,
    1015: VARCHAR,
    1016: INT8,
    1021: FLOAT4,
    1022: FLOAT8,
    1028: OID,
    1040: MACADDR,
    1041: INET,
    1115: TIMESTAMP,
    1182: DATE,
    1183: TIME,
    1185: TIMESTAMPTZ,
    1187: INTERVAL,
    1231: NUMERIC,
    1270: TIMETZ,
    2951: UUID,
    3221: PG_LSN,
    3807: JSONB,
}
"""From an array type's OID to that of its elements."""

_SIZES: Final = {
    BOOL: 1,
    CHAR: 1,
    NAME: 64,
    INT8: 8,
    INT2: 2,
    INT4: 4,
    REGPROC: 4,
    OID: 4,
    TID: 6,
    XID: 4,
    CID: 4,
    FLOAT4: 4,
    FLOAT8: 8,
    UNKNOWN: -2,
    MACADDR8: 8,
    MONEY: 8,
    MACADDR: 6,
    DATE: 4,
    TIME: 8,
    TIMESTAMP: 8,
    TIMESTAMPTZ: 8,
    INTERVAL: 16,
    TIMETZ: 12,
    REGCLASS: 4,
    CSTRING: -2,
    VOID: 4,
    UUID: 16,
    PG_LSN: 8,
    XID8: 8,
}


def type_size(oid: int) -> int:
    """The type's size in bytes, as in RowDescription (pg_type.typlen).

    -1 is a varlena and -2 a C string. Unknown types count as varlena, as nearly all are; among
    user-defined types only enums (4) are not.
    """
    return _SIZES.get(oid, -1)
