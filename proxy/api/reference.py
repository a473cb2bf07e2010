"""Makes the reference pages, ``docs/functions.md`` and ``docs/configuration.md``, and the example
of a configuration file, ``deploy/pg-background-proxy.toml``, from the code.

Invariant: everything about a function or setting comes from `functions` and `config`, and is put
between two markers. ``python -m proxy.api.reference`` in a checkout rewrites all three.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from proxy import config
from proxy.api.functions import DECLARED, RECORD, VIEWS, Function, Parameter
from proxy.config.gucs import GUCS, Guc, Switch

BEGIN: Final = "<!-- Made by python -m proxy.api.reference -->"
END: Final = "<!-- End of what was made -->"

_HEADINGS: Final[Mapping[str, str]] = {
    "listen": "Addresses",
    "passfile": "Logins",
    "allow_from": "Who may connect",
    "admin_users": "Who may administer the proxy",
    "client_tls_sslmode": "TLS to clients",
    "client_login_timeout": "Connections and processes",
    "max_workers": "Jobs",
    "api_version": "The extension",
    "outcome_retention": "Memory and log",
    "admin_listen": "Monitoring",
}
"""The headings of docs/configuration.md, by the first setting below each."""

# Names of settings in help texts, except plain words
_NAMES: Final = re.compile(
    "|".join(
        re.escape(name)
        for name in sorted(
            (*GUCS, *(field.name for field in config.SETTINGS if "_" in field.name)),
            key=len,
            reverse=True,
        )
    )
)


def functions() -> str:
    """The tables of docs/functions.md: functions with all their names, and views."""
    lines = ["| call | returns | |", "| --- | --- | --- |"]
    for function, *others in _by_declaration():
        also = f", also `{'`, `'.join(other.name for other in others)}`" if others else ""
        call = f"`{function.name}({', '.join(map(_parameter, function.parameters))})`{also}"
        lines.append(f"| {call} | {_result(function)} | {function.summary} |")
    lines += ["", "| view | columns | |", "| --- | --- | --- |"]
    for view in VIEWS.values():
        columns = ", ".join(column.name for column in view.columns)
        lines.append(f"| `{view.name}` | `{columns}` | {view.summary} |")
    return "\n".join(lines)


def _by_declaration() -> Iterator[Iterator[Function]]:
    """Groups of functions of one declaration, which differ only in their names."""
    for _, names in groupby(DECLARED, key=lambda function: replace(function, name="")):
        yield names


def _parameter(parameter: Parameter) -> str:
    text = f"{parameter.name} {parameter.type.name}"
    if parameter.required:
        return text
    default = "NULL" if parameter.default is None else str(parameter.default).lower()
    return f"{text} DEFAULT {default}"


def _result(function: Function) -> str:
    if function.columns:
        columns = ", ".join(column.name for column in function.columns)
        text = f"`({columns})`"
    else:
        text = (
            "the job's rows" if function.result_type == RECORD else f"`{function.result_type.name}`"
        )
    return f"rows of {text}" if function.returns_set and function.columns else text


def configuration() -> str:
    """The tables of docs/configuration.md: settings of ``serve``, and of a session."""
    lines: list[str] = []
    for field in config.SETTINGS:
        if field.name in _HEADINGS:
            lines += ["", f"### {_HEADINGS[field.name]}", "", "| setting | default | |"]
            lines.append("| --- | --- | --- |")
        lines.append(_configured(field))
    lines += ["", "### Settings of a session", "", "| setting | default | from | to |"]
    lines.append("| --- | --- | --- | --- |")
    lines += map(_session_setting, GUCS.values())
    return "\n".join(lines).lstrip()


def _configured(field: Field[Any]) -> str:
    setting = field.metadata
    default = f" `{setting['default']}`" if setting["default"] else ""
    help = _NAMES.sub(r"`\g<0>`", setting["help"])
    text = f"{help[0].upper()}{help[1:]}. {setting['more']}".rstrip()
    return f"| `{field.name}` |{default} | {text.replace('|', chr(92) + '|')} |"


def _session_setting(setting: Guc) -> str:
    if isinstance(setting, Switch):
        return f"| `{setting.name}` | `{setting.default}` | `off` | `on` |"
    limits = f"`{_measure(setting, setting.minimum)}` | `{_measure(setting, setting.maximum)}`"
    return f"| `{setting.name}` | `{setting.default}` | {limits} |"


def _measure(setting: Guc, value: int) -> str:
    if setting.unit == "B":
        return setting.show(str(value))
    return f"{value} {setting.unit}".rstrip()


def example() -> str:
    """A configuration file with every setting: the default, commented out, or a placeholder."""
    lines = [
        "# All settings of pg-background-proxy, and their defaults. See docs/configuration.md.",
        "# Read by `pg-background-proxy serve --config FILE`; `pg-background-proxy check --config",
        "# FILE` says what is wrong with it. SIGHUP has it read again.",
    ]
    for field in config.SETTINGS:
        setting = field.metadata
        if field.name in _HEADINGS:
            lines += ["", "", f"# --- {_HEADINGS[field.name]} ".ljust(_WIDTH, "-")]
        help = f"{setting['help'][0].upper()}{setting['help'][1:]}."
        value = setting["default"] or setting["metavar"]
        lines += ["", *(f"# {line}" for line in textwrap.wrap(help, _WIDTH - 2))]
        lines.append(f"#{field.name} = {value if value.isdigit() else json.dumps(value)}")
    return "\n".join((*lines, ""))


_WIDTH: Final = 100

PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "functions.md": functions,
    "configuration.md": configuration,
}


EXAMPLE: Final = Path("deploy") / "pg-background-proxy.toml"


def with_reference(page: str, made: str) -> str:
    """The page with `made` between its markers. Raises ValueError if it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("the page has no markers")
    return f"{before}{begin}\n{made}\n{end}{after}"


def main(checkout: Path) -> None:
    """Rewrites the pages and the example in a checkout."""
    for name, make in PAGES.items():
        page = checkout / "docs" / name
        text = page.read_text(encoding="utf-8")
        page.write_text(with_reference(text, make()), encoding="utf-8")
    (checkout / EXAMPLE).write_text(example(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
