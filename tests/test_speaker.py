"""Which function has raised a message: read from the first line of CONTEXT, in every language.

The lines are those that the server's own translations give, where Debian's server has them.
"""

from __future__ import annotations

import gettext
import re
from pathlib import Path

import pytest

from protocol.messages import NoticeResponse
from proxy.extension.questions import Message, NotOursError

pytestmark = pytest.mark.every_server

_ENGLISH = "PL/pgSQL function %s line %d at %s"
_CATALOGS = sorted(Path("/usr/share/locale").glob("*/LC_MESSAGES/plpgsql-*.mo"))


def _formats() -> dict[str, str]:
    formats = {"en": _ENGLISH}
    for path in _CATALOGS:
        with path.open("rb") as file:
            translated = gettext.GNUTranslations(file).gettext(_ENGLISH)
        formats[path.parts[-3]] = translated
    return formats


FORMATS = _formats()

SCHEMAS = {
    "ext": b"ext",
    "_e1": b"_e1",
    '"Ext"': b"Ext",
    '"a.b ""c"""': b'a.b "c"',
    '"é"': b"\xc3\xa9",
}

# What an attacker can call a schema and a function, as the server quotes it.
HOSTILE = [
    f"{schema}{name}()"
    for schema in ("", "mallory.", '"ext._pg_background_say()".', '"x ""ext".', '"x "".')
    for name in (
        '"ext._pg_background_say()"',
        '"ext._pg_background_say() "',
        '" ext._pg_background_say()"',
        '"x ext._pg_background_say() y"',
        '""" ext._pg_background_say()"" "',
        '"ext._pg_background_say()"" x"',
        '"""ext"".""_pg_background_say""()"',
        "x_pg_background_say",
        "_pg_background_say2",
        '"_pg_background_say()"',
        '"»ext._pg_background_say()«"',
        "\"' ext._pg_background_say() '\"",
    )
    if schema or name.startswith('"')
]


def _line(language: str, signature: str) -> str:
    places = iter((signature, "3", "RAISE"))
    numbered = {"1": signature, "2": "3", "3": "RAISE"}
    return re.sub(
        r"%(?:(\d)\$)?[sd]",
        lambda match: numbered[match[1]] if match[1] else next(places),
        FORMATS[language],
    )


def _message(context: str, **fields: str) -> Message:
    text = {"S": "INFO", "V": "INFO", "C": "00000", "R": "exec_stmt_raise", "W": context, **fields}
    text["M"] = f"{'0' * 32} {'1' * 32} next 1"
    return Message.parse(NoticeResponse({code: value.encode() for code, value in text.items()}))


@pytest.mark.parametrize("language", FORMATS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_our_function_speaks(language: str, schema: str) -> None:
    for name in ("_pg_background_say", '"_pg_background_say"'):
        line = _line(language, f"{schema}.{name}()")
        for context in (line, f'{line}\nSQL statement "SELECT 1"'):
            assert _message(context).schema == SCHEMAS[schema]


@pytest.mark.parametrize("language", FORMATS)
def test_no_other_function_does(language: str) -> None:
    for signature in HOSTILE:
        for context in (
            _line(language, signature),
            f"{_line(language, signature)}\n{_line(language, 'ext._pg_background_say()')}",
        ):
            try:
                message = _message(context)
            except NotOursError:
                continue
            assert message.schema != b"ext", context


@pytest.mark.parametrize(
    "fields",
    [
        {"V": "NOTICE"},
        {"V": "WARNING"},
        {"R": "dblink_res_error"},
        {"R": "pgfdw_report_error"},
        {"R": "do_util_elog"},
        {"R": "PLy_output"},
        {"R": ""},
    ],
)
def test_only_raise_info_speaks(fields: dict[str, str]) -> None:
    with pytest.raises(NotOursError):
        _message(_line("en", "ext._pg_background_say()"), **fields)
