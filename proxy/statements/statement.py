"""A statement of the client's, from the relay, which sees it first, to the interception."""

from __future__ import annotations

from dataclasses import dataclass, field

from proxy.sql.tokens import Tokens
from proxy.statements.plan import Plan, Substitute


@dataclass(slots=True, eq=False)
class Statement:
    """One statement of a Query, from its first token to its last; or the whole text of a Parse.

    Attributes:
        text: in the client's encoding.
        offset: where it begins in the message's text, in bytes.
        tokens: None if it mentions nothing of ours, or cannot be read: then it passes as it is.
        calls: how to serve the calls in it, by version of the API, as far as that was asked.
        substitutes: what else takes its place, once that was asked.
    """

    text: bytes
    offset: int = 0
    tokens: Tokens | None = None
    calls: dict[int, Plan | None] = field(default_factory=dict)
    substitutes: list[Substitute | None] = field(default_factory=list)
