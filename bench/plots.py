"""A picture of each measure, as SVG: bars for the medians, a line from lowest to highest round."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.results import (
    ALONE,
    DIRECT,
    EXTENSION,
    PGBOUNCER,
    PLAIN,
    PROXY,
    YARDSTICKS,
    Metric,
    Results,
    Spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = {
    DIRECT: "#8a8a8a",
    PROXY: "#d1495b",
    ALONE: "#e8a2ab",
    PLAIN: "#e8a2ab",
    PGBOUNCER: "#30638e",
    EXTENSION: "#edae49",
}
_STYLE: Final[Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bench",  # and the same numbers make the same file
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
}
_ROW: Final = 0.2
_PANEL: Final = 3.2
_LABELS: Final = 2.6


def plot(results: Results, measure: str, path: Path) -> None:
    """Writes a picture with a panel for each metric.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = list(results.rows(measure))
    cases = list(dict.fromkeys(case for _, case, _ in rows))
    metrics = list(dict.fromkeys(metric for _, _, metric in rows))
    targets = results.targets(measure)
    with mpl.rc_context(_STYLE):
        height = 1.2 + _ROW * len(cases) * (len(targets) + 1)
        figure = Figure(figsize=(_LABELS + _PANEL * len(metrics), height), layout="constrained")
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            _bars(panel, results, measure, metric, cases, targets)
        panels[0].set_yticks(range(len(cases)), cases)
        panels[0].invert_yaxis()
        figure.suptitle(YARDSTICKS.get(measure, measure), x=0.01, ha="left", fontsize="medium")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(targets))
        figure.savefig(path, format="svg", metadata={"Date": None})
    # matplotlib leaves spaces at the ends of lines, which git complains about.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))


def _bars(
    panel: Axes,
    results: Results,
    measure: str,
    metric: Metric,
    cases: list[str],
    targets: list[str],
) -> None:
    thickness = 0.8 / len(targets)
    for number, target in enumerate(targets):
        offset = (number - (len(targets) - 1) / 2) * thickness
        found = [results.find(measure, case, metric, target) for case in cases]
        spreads = [Spread.of(list(s.values.values())) if s else Spread(0, 0, 0) for s in found]
        panel.barh(
            [at + offset for at in range(len(cases))],
            [spread.median for spread in spreads],
            thickness,
            xerr=[
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ],
            error_kw={"elinewidth": 0.8},
            color=COLOURS[target],
            label=target,
        )
    panel.set_xlim(left=0)
    panel.set_xlabel(str(metric))
