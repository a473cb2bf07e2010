"""What else a database has under the names of our functions and views: its users' objects.

Invariant: the object that the server finds under a name as written is the one that is meant. Each
call asks whether there is one (`meant_query` in the context), so none is silently ignored. Without
a schema, a name can only mean an object of a role that the session trusts: the lack of the
extension makes no other role's code run in a session.

These queries trust nothing of the session: all names and operators are qualified.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

from proxy.api.functions import FUNCTIONS, VIEWS, Function, is_view
from proxy.extension.installed import MARKER, TAG, is_trusted
from proxy.extension.texts import sql
from proxy.sql.text import literal
from proxy.statements.plan import Call, Plan


class Name(NamedTuple):
    """How a statement names a function or view of ours.

    Attributes:
        function: the one that has this name.
        schema: the qualification, if any, in the client's encoding.
        given: number of arguments.
    """

    function: Function
    schema: bytes | None
    given: int

    @property
    def is_view(self) -> bool:
        return is_view(self.function)


def name_of(call: Call) -> Name:
    return Name(call.function, call.schema, len(call.arguments))


def names_of(plan: Plan) -> list[Name]:
    """The names that a plan calls by, each once."""
    return list(dict.fromkeys(map(name_of, plan.all_calls)))


class Meant(NamedTuple):
    """What the database has under some of the names.

    Attributes:
        others: names that mean an object which is not ours.
        untrusted: names of objects of roles that the session does not trust.
    """

    others: Collection[Name] = ()
    untrusted: Collection[Name] = ()


# The fixed OIDs of pg_proc and pg_class.
_IS_MEMBER: Final = {catalog: sql("is_member", catalog=str(catalog)) for catalog in (1255, 1259)}


def _has_marker(namespace: str) -> str:
    """Whether the extension is in this schema, or pretends to be."""
    return (
        "EXISTS(SELECT 1 FROM pg_catalog.pg_proc m WHERE m.proname OPERATOR(pg_catalog.=)"
        f" '{MARKER}' AND m.pronargs OPERATOR(pg_catalog.=) 0"
        f" AND m.pronamespace OPERATOR(pg_catalog.=) {namespace})"
    )


ALIKE: Final = "CAST(ARRAY({}) AS pg_catalog.text)".format(
    sql(
        "named_alike",
        functions=",".join(FUNCTIONS),
        views=",".join(VIEWS),
        tag=TAG,
        has_marker=_has_marker("o.relnamespace"),
        function_is_member=_IS_MEMBER[1255],
        relation_is_member=_IS_MEMBER[1259],
    )
)
"""An SQL expression, a text[] as text: the names that need `meant_query` first."""

# Made once, except for the names: each call has this query.
_FUNCTION: Final = sql(
    "named_function",
    **{
        word: f"@{{{word}}}"
        for word in ("number", "called", "given", "is_found", "is_meant", "is_member")
    },
    tag=TAG,
).encode()
_RELATION: Final = sql(
    "named_relation",
    **{word: f"@{{{word}}}" for word in ("number", "called", "is_found", "is_meant", "is_member")},
    has_marker=_has_marker("o.relnamespace"),
).encode()


def _is_meant(prefix: str) -> dict[bool, bytes]:
    """Whether an object that was found is meant; by whether its schema is written."""
    own = f"pg_catalog.pg_get_userbyid(o.{prefix}owner) OPERATOR(pg_catalog.=) current_user"
    trusted = f"({own} OR {is_trusted(f'o.{prefix}owner')})"
    written = f"(NOT {_has_marker(f'o.{prefix}namespace')} OR {trusted})"
    return {False: trusted.encode(), True: written.encode()}


_IS_MEANT: Final = {False: _is_meant("pro"), True: _is_meant("rel")}


def is_there(functions: Iterable[Function]) -> bytes:
    """An SQL expression: whether the database may have the extension or anything of these names."""
    names, views = {MARKER}, set[str]()
    for function in functions:
        (views if is_view(function) else names).add(function.name)
    found = _has_any(b"pg_proc", b"proname", names)
    return b"(%b OR %b)" % (found, _has_any(b"pg_class", b"relname", views)) if views else found


def _has_any(catalog: bytes, column: bytes, names: Iterable[str]) -> bytes:
    return (
        b"EXISTS(SELECT 1 FROM pg_catalog.%b o WHERE o.%b OPERATOR(pg_catalog.=)"
        b" ANY (CAST('{%b}' AS pg_catalog.name[])))"
        % (catalog, column, ",".join(sorted(names)).encode())
    )


def meant_query(names: Sequence[Name], *, closely: bool = True) -> bytes:
    """An SQL expression for the text that `parse_meant` reads.

    `closely`: whether to look at owners. Otherwise all objects are taken for others', at a quarter
    of the cost, which is enough where none are expected.
    """
    selects = [_select(number, name, closely=closely) for number, name in enumerate(names)]
    return b"CAST(ARRAY(%b) AS pg_catalog.text)" % b" UNION ALL ".join(selects)


def _select(number: int, name: Name, *, closely: bool) -> bytes:
    if name.schema is None:
        kind = b"table" if name.is_view else b"function"
        is_found = b"pg_catalog.pg_%b_is_visible(o.oid)" % kind
    elif name.schema == b"pg_temp":
        is_found = b"o.@{prefix}namespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()"
    else:
        is_found = (
            b"o.@{prefix}namespace OPERATOR(pg_catalog.=) (SELECT s.oid"
            b" FROM pg_catalog.pg_namespace s WHERE s.nspname OPERATOR(pg_catalog.=)"
            b" CAST(%b AS pg_catalog.name))" % literal(name.schema)
        )
    # The client's text comes last, so that no placeholder is searched for in it.
    words = {
        b"number": b"%d" % number,
        b"called": name.function.name.encode(),
        b"given": b"%d" % name.given,
        b"is_meant": _IS_MEANT[name.is_view][name.schema is not None] if closely else b"'t'",
        b"is_member": _IS_MEMBER[1259 if name.is_view else 1255].encode() if closely else b"false",
        b"is_found": is_found.replace(b"@{prefix}", b"rel" if name.is_view else b"pro"),
    }
    query = _RELATION if name.is_view else _FUNCTION
    for word, text in words.items():
        query = query.replace(b"@{%b}" % word, text)
    return query


def parse_meant(names: Sequence[Name], values: Iterable[str]) -> Meant:
    """From the elements of `meant_query`'s array."""
    found = [value.split() for value in values]
    return Meant(
        *(
            frozenset(names[int(number)] for number, is_meant in found if is_meant == flag)
            for flag in ("t", "f")
        )
    )
