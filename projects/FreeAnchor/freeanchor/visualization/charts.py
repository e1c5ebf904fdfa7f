"""Charts and tables as html: sharp at every size, in the colours of the page, any writing."""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLORS", "Line", "confusion_table", "line_chart", "number", "table"]

COLORS = (
    *("#3b8fd9", "#e08a00", "#12a37a", "#d4548f"),
    *("#8f6fd6", "#a39a00", "#d9534f", "#6b8e9e"),
)
_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 8, 34
_MOST_POINTS = 101
_MOST_CLASSES = 20  # in a confusion table that can be read


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        name: what the legend says; empty for a line that it leaves out.
        x: (N,) in increasing order.
        y: (N,).
        color: of CSS.
        is_dashed: as the second of two runs.
        width: in pixels.
        note: what the legend says after the name, by default the last value.
    """

    name: str
    x: Sequence[float] | NDArray[Any]
    y: Sequence[float] | NDArray[Any]
    color: str
    is_dashed: bool = False
    width: float = 2
    note: str = ""


def number(value: float | None) -> str:
    """A figure in percent, or a dash for none."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of plain texts whose first column names the row."""
    cells = "".join(f'<th scope="col">{html.escape(x)}</th>' for x in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(x)}</td>" for x in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, y_range: tuple[float, float] | None = None
) -> str:
    """A chart with a legend, which says of each line the last value, or a note.

    Args:
        title: plain text.
        lines: with a point each. Points that are not finite are left out.
        x_label: plain text.
        y_range: by default that of the lines, and zero.

    Returns:
        The html, empty if there is nothing to draw.
    """
    lines = [line for line in map(_finite, lines) if len(line.x)]
    if not lines:
        return ""
    x_range = (
        min(float(np.min(line.x)) for line in lines),
        max(float(np.max(line.x)) for line in lines),
    )
    if y_range is None:
        y_range = (
            min(0.0, *(float(np.min(line.y)) for line in lines)),
            max(float(np.max(line.y)) for line in lines),
        )
    x_ticks, y_ticks = _ticks(*x_range), _ticks(*y_range)
    x_range = (x_range[0], max(x_range[1], x_range[0] + 1e-9))
    y_range = (y_range[0], max(y_range[1], y_range[0] + 1e-9))

    def place(x: Any, y: Any) -> tuple[Any, Any]:
        u = (np.asarray(x) - x_range[0]) / (x_range[1] - x_range[0])
        v = (np.asarray(y) - y_range[0]) / (y_range[1] - y_range[0])
        right = _WIDTH - _LEFT - _RIGHT
        return _LEFT + u * right, _HEIGHT - _BOTTOM - v * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        top = f"{place(x_range[0], tick)[1]:.1f}"
        parts.append(f'<path class="grid-line" d="M{_LEFT} {top}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{top}" dy=".35em" class="end">{tick:g}</text>')
    for tick in x_ticks:
        left = f"{place(tick, y_range[0])[0]:.1f}"
        parts.append(f'<text x="{left}" y="{_HEIGHT - 18}" class="middle">{tick:g}</text>')
    middle = (_LEFT + _WIDTH) // 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 3}" class="middle">{html.escape(x_label)}</text>'
    )
    legend = []
    for line in lines:
        x, y = _thin(line)
        points = " ".join(f"{u:.1f},{v:.1f}" for u, v in zip(*place(x, y)))
        dash = ' stroke-dasharray="6 4"' if line.is_dashed else ""
        name = html.escape(line.name)
        parts.append(
            f'<polyline points="{points}" stroke="{line.color}" stroke-width="{line.width}"{dash}>'
            f"<title>{name}</title></polyline>"
        )
        if line.name:
            note = html.escape(line.note)
            style = f"border-top: 3px {'dashed' if line.is_dashed else 'solid'} {line.color}"
            legend.append(f'<li><i style="{style}"></i>{name} <b>{note}</b></li>')
    label = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{label}</figcaption><svg role="img" '
        f'aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 3))
    while (high - low) / step > 7:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _finite(line: Line) -> Line:
    """A line without the points that a browser would end it at, and what its legend says."""
    x, y = np.asarray(line.x, dtype=np.float64), np.asarray(line.y, dtype=np.float64)
    chosen = np.isfinite(x) & np.isfinite(y)
    return line._replace(x=x[chosen], y=y[chosen], note=line.note or f"{y[-1]:.3g}")


def _thin(line: Line) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most so many points: means of neighbours, which shows the course and not the noise."""
    count = min(len(line.x), _MOST_POINTS)
    parts = zip(np.array_split(np.asarray(line.x), count), np.array_split(line.y, count))
    means = np.array([(x.mean(), y.mean()) for x, y in parts])
    return means[:, 0], means[:, 1]


def confusion_table(counts: NDArray[Any], names: Sequence[str], caption: str) -> str:
    """Objects by class (rows) and by what they were detected as (columns).

    Args:
        counts: (C + 1, C + 1), see :func:`freeanchor.evaluation.confusion`.
        names: of the C classes. Of many, those with the most errors are shown.
        caption: plain text.
    """
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    by_errors = np.argsort(-(errors.sum(axis=0) + errors.sum(axis=1))[:-1], kind="stable")
    chosen = sorted(by_errors[:_MOST_CLASSES])
    text = caption
    if len(chosen) < len(names):
        text += f" The {len(chosen)} of {len(names)} classes with the most errors."
    head = "".join(f'<th scope="col">{html.escape(names[c])}</th>' for c in chosen)
    rows = []
    for r in [*chosen, len(names)]:
        name = "nothing there" if r == len(names) else names[r]
        cells = []
        for c in [*chosen, len(names)]:
            share = counts[r, c] / max(1, counts[r].sum())
            kind = ' class="right"' if r == c else ""
            shown = "" if r == c == len(names) else str(counts[r, c])
            cells.append(f'<td{kind} style="--share: {share:.2f}">{shown}</td>')
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="confusion"><caption>{html.escape(text)}</caption>'
        f'<tr><th scope="col">object</th>{head}<th scope="col">missed</th></tr>'
        f"{''.join(rows)}</table></div>"
    )
