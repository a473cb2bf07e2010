"""SQL's LIKE, as the server matches it.

Invariant: for each stretch between two ``%``, time is linear in the text. A stretch is taken at the
first place where it matches, since the ``%`` before it matches what was skipped.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import INVALID_ESCAPE_SEQUENCE, SQLError

_ONE: Final = ""
"""Any character, as an element of a stretch."""

_Stretch = list[str]


def like(text: bytes, pattern: bytes, codec: str = "utf-8") -> bool:
    r"""Whether LIKE matches: ``%``, ``_``, and ``\`` before a literal character.

    Args:
        text: must match as a whole.
        pattern: the pattern.
        codec: Python's name of their encoding; ``_`` is one character of it.

    Raises SQLError 22025 if matching reaches an escape character at the end of the pattern.
    """
    subject = text.decode(codec, "surrogateescape")
    stretches, is_cut = _stretches(pattern.decode(codec, "surrogateescape"))
    # Where the run of % and _ before `at` begins
    wild = at = 0
    for number, stretch in enumerate(stretches):
        if number == 0:
            found = 0 if _stands_at(subject, stretch, 0) else -1
        elif number == len(stretches) - 1 and not is_cut:
            start = len(subject) - len(stretch)
            return start >= at and _stands_at(subject, stretch, start)
        else:
            found = _find(subject, stretch, at)
        if found < 0:
            return False
        at = found + len(stretch)
        if number == 0 or any(stretch):
            wild = at
    if is_cut:
        # After a % the server looks beyond all _ for the next literal character.
        ahead = len(stretches) > 1 and not any(stretches[-1]) and wild < len(subject)
        if at < len(subject) or ahead:
            raise SQLError(
                INVALID_ESCAPE_SEQUENCE, "LIKE pattern must not end with escape character"
            )
        return False
    return at == len(subject)


def _stretches(pattern: str) -> tuple[list[_Stretch], bool]:
    """The stretches between the ``%`` of a pattern, and whether it ends in an escape character."""
    stretches: list[_Stretch] = [[]]
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            escaped = next(characters, None)
            if escaped is None:
                return stretches, True
            stretches[-1].append(escaped)
        elif character == "%":
            stretches.append([])
        else:
            stretches[-1].append(_ONE if character == "_" else character)
    return stretches, False


def _stands_at(text: str, stretch: _Stretch, start: int) -> bool:
    """Whether the stretch matches there."""
    part = text[start : start + len(stretch)]
    return len(part) == len(stretch) and all(
        wanted in (_ONE, character) for wanted, character in zip(stretch, part, strict=True)
    )


def _find(text: str, stretch: _Stretch, start: int) -> int:
    """The first match of the stretch from ``start`` on; -1 if there is none."""
    if len(stretch) > len(text) - start:
        return -1
    if _ONE not in stretch:
        return text.find("".join(stretch), start)
    # Bit i of the state: the text so far ends with the first i + 1 characters of the stretch.
    anything = sum(1 << at for at, wanted in enumerate(stretch) if wanted == _ONE)
    fits: dict[str, int] = {}
    for at, wanted in enumerate(stretch):
        if wanted != _ONE:
            fits[wanted] = fits.get(wanted, anything) | 1 << at
    whole = 1 << (len(stretch) - 1)
    state = 0
    for at in range(start, len(text)):
        state = (state << 1 | 1) & fits.get(text[at], anything)
        if state & whole:
            return at - len(stretch) + 1
    return -1
