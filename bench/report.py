"""The results of a run as text: ratios for the terminal, tables for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from bench import goals
from bench.results import (
    DIRECT,
    EXTENSION,
    PGBOUNCER,
    PLAIN,
    YARDSTICKS,
    Metric,
    Results,
    Spread,
)

_NONE: Final = "–"
_PROXY_OVER: Final = {
    DIRECT: "÷ direct",
    PGBOUNCER: "÷ PgBouncer",
    EXTENSION: "÷ extension",
    PLAIN: "÷ all off",
}


def terminal(results: Results) -> str:
    """Every measured row: medians, ratios with their range, goals."""
    blocks = [_about(results)]
    for measure in results.measures():
        targets = results.targets(measure)
        over = [text for target, text in _PROXY_OVER.items() if target in targets]
        head = (f"{measure}{_yardstick(measure)}", "", *targets, *over, "goal", "")
        rows = [_row(results, *row) for row in results.rows(measure)]
        blocks.append(_aligned(head, rows))
    if results.notes:
        blocks.append("\n".join(f"note: {note}" for note in results.notes))
    return "\n\n".join(blocks)


def markdown(results: Results, path: Path) -> str:
    """The goals; then, folded away, the table of each measure, with a line for each case, and its
    picture.

    The text is for a page in docs/. The pictures are beside the JSON file at ``path``, which is
    relative to the top of the repository.
    """
    lines = [f"{_about(results)}.", "", *_goal_table(results)]
    lines += ["", "<details>", "<summary>All measurements</summary>"]
    for measure in results.measures():
        picture = path.with_name(f"{path.stem}-{measure}.svg")
        lines += ["", *_case_table(results, measure), "", f"![{measure}](../{picture.as_posix()})"]
    if results.notes:
        lines += ["", *(f"- {note}" for note in results.notes)]
    return "\n".join([*lines, "", "</details>"])


def _about(results: Results) -> str:
    about = results.about
    return (
        f"{about['date']}, {about['machine']}, PostgreSQL {about['PostgreSQL']},"
        f" Python {about['Python']}, PgBouncer {about['PgBouncer']}"
        f"; {about['effort']} run, load average before it {about['load']}"
        f"{'; proxy with ' + about['options'] if about['options'] else ''}"
    )


def _row(results: Results, measure: str, case: str, metric: Metric) -> list[str]:
    verdict = goals.verdict(results, measure, case, metric)
    targets = results.targets(measure)
    over = [target for target in _PROXY_OVER if target in targets]
    return [
        case,
        str(metric),
        *(_number(results.median(measure, case, metric, target)) for target in targets),
        *(_ratio(results.ratio(measure, case, metric, target)) for target in over),
        "" if verdict is None else str(verdict.goal),
        "" if verdict is None else _said(verdict),
    ]


def _goal_table(results: Results) -> Iterator[str]:
    yield "| the proxy | median (range over the rounds) | goal | |"
    yield "| --- | --- | --- | --- |"
    for verdict in goals.verdicts(results):
        found = _ratio(verdict.found)
        label = f"{verdict.case}: {verdict.goal.metric.name}"
        yield f"| {label} | {found} | {verdict.goal} | {_said(verdict)} |"


def _case_table(results: Results, measure: str) -> Iterator[str]:
    rows = list(results.rows(measure))
    cases = list(dict.fromkeys(case for _, case, _ in rows))
    metrics = list(dict.fromkeys(metric for _, _, metric in rows))
    targets = results.targets(measure)
    yield f"**{measure}**: {' · '.join(targets)}{_yardstick(measure)}"
    yield ""
    head = ["", *map(str, metrics)]
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    for case in cases:
        cells = [
            " · ".join(_number(results.median(measure, case, m, target)) for target in targets)
            for m in metrics
        ]
        yield f"| {case} | {' | '.join(cells)} |"


def _yardstick(measure: str) -> str:
    return f" ({YARDSTICKS[measure]})" if measure in YARDSTICKS else ""


def _said(verdict: goals.Verdict) -> str:
    return {True: "met", False: "**not met**", None: "not measured"}[verdict.met]


def _number(value: float | None) -> str:
    if value is None:
        return _NONE
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return _NONE
    median = _number(spread.median)
    if spread.low == spread.high:
        return median
    return f"{median} ({_number(spread.low)}–{_number(spread.high)})"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Texts aligned left, numbers right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            text.ljust(width) if number < 2 or number >= len(row) - 2 else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).replace("**", "").rstrip())
    return "\n".join(lines)
