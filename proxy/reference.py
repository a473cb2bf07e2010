"""The reference of the functions in the README, made from the table of functions.

The rule: nothing is said of a function here. ``python -m proxy.reference`` prints it; in the README
it stands between the two markers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Final

from proxy.functions import DECLARED, RECORD, VIEWS, Function, Parameter

BEGIN: Final = "<!-- Made by python -m proxy.reference -->"
END: Final = "<!-- End of what was made -->"


def markdown() -> str:
    """The tables: functions with all their names, and views."""
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
    """Functions that differ in nothing but their names are one declaration."""
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


if __name__ == "__main__":
    print(markdown())
