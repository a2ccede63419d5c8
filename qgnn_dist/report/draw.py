# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: small, of one size that a phone shows in full, in the page's colours by class names.

Colours, fonts and dashes are the style sheet's (page.css), so that light, dark and print need no other picture. All
text goes through `escape`. Coordinates have one decimal.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from ..memory import byte_size
from .blocks import Plot
from .curves import Chart, Heat

__all__ = ["figure", "heat_map", "histogram", "matrix", "plot_of", "ticks"]

WIDTH, HEIGHT = 320, 200
TOP, RIGHT, BOTTOM = 10, 12, 38
CHARACTER = 7.0
"""Width of a digit of the axes' text."""
MOST_BARS = 16
"""Codes of a histogram whose bars stand apart."""
DOTTED = 3
"""Lines of fewer points show them."""


def figure(value: float | None, unit: str) -> str:
    """A value as people read it.

    Numbers and their units stay on one line.

    >>> [figure(0.9154, "share"), figure(0.0421, "seconds"), figure(1536, "bytes"), figure(None, "number")]
    ['91.5\\xa0%', '42.1\\xa0ms', '1.5\\xa0KiB', '–']
    """
    if value is None:
        return "–"
    if unit == "share":
        return f"{100 * value:.2g}\xa0%" if 0 < abs(value) < 0.01 else f"{100 * value:.1f}\xa0%"
    if unit == "seconds":
        return f"{1000 * value:.3g}\xa0ms" if 0 < abs(value) < 1 else f"{value:.3g}\xa0s"
    if unit == "bytes":
        return byte_size(value).replace(" ", "\xa0")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers from at most `low` on to at least `high`, some `most` of them.

    >>> ticks(0.13, 0.91), ticks(1, 60, whole=True), ticks(3, 3)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 20.0, 40.0, 60.0], [2.0, 2.5, 3.0, 3.5, 4.0])
    """
    if not high > low:
        step = 1.0 if whole or low == 0 else abs(low) / 2
        low, high = low - step / 2, high + step / 2
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= most)
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def _axis_words(values: Sequence[float], unit: str) -> list[str]:
    """Labels of one axis: one unit for all, and digits enough to tell shares apart.

    >>> _axis_words([0.78, 0.80], "share"), _axis_words([0.7816, 0.7817], "share")
    (['78 %', '80 %'], ['78.16 %', '78.17 %'])
    """
    top = max(map(abs, values), default=0.0)
    if unit == "share":
        step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
        digits = max(0, -math.floor(math.log10(100 * step) + 1e-9))
        return [f"{100 * v:.{digits}f} %" for v in values]
    if unit == "seconds" and top < 1:
        return [f"{1000 * v:g} ms" for v in values]
    if unit == "seconds":
        return [f"{v:g} s" for v in values]
    if unit == "bytes":
        size = next((s for s in (1 << 30, 1 << 20, 1 << 10) if top >= s), 1)
        word = {1 << 30: "GiB", 1 << 20: "MiB", 1 << 10: "KiB", 1: "B"}[size]
        return [f"{v / size:.3g} {word}" if v else "0" for v in values]
    return [f"{v:.6g}" for v in values]


def _byte_ticks(low: float, high: float) -> list[float]:
    size = next((s for s in (1 << 30, 1 << 20, 1 << 10) if high >= s), 1)
    return [v * size for v in ticks(low / size, high / size)]


def line_chart(chart: Chart) -> Markup:
    """Lines with axes, and the best epoch marked; hovering is the page script's."""
    points = [y for one in chart.series for y in one.y if y is not None and (not chart.log or y > 0)]
    xs = [x for one in chart.series for x in one.x]
    if not points:
        return Markup("")
    low, high = min(points), max(points)
    log = chart.log and low > 0
    if log:
        y_ticks = [10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high) - 1e-9) + 1)]
        y_ticks = y_ticks if len(y_ticks) > 1 else [y_ticks[0], 10 * y_ticks[0]]
    elif chart.unit == "bytes":
        y_ticks = _byte_ticks(0, high)
    else:
        y_ticks = ticks(0 if chart.unit == "seconds" else low, high)
    words = _axis_words(y_ticks[::-(-len(y_ticks) // 6)], chart.unit)
    shown = y_ticks[::-(-len(y_ticks) // 6)]
    left = 10 + CHARACTER * max(map(len, words))
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 1, last + 1

    def at_x(x: float) -> float:
        return left + (WIDTH - RIGHT - left) * (x - first) / (last - first)

    def at_y(y: float) -> float:
        place = (math.log10(y / y_ticks[0]) / math.log10(y_ticks[-1] / y_ticks[0]) if log else
                 (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))
        return TOP + (HEIGHT - BOTTOM - TOP) * (1 - place)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="plot" data-chart="{escape(chart.id)}" '
             f'data-x="{first:g} {last:g} {left:.1f} {WIDTH - RIGHT}" aria-label="{escape(chart.title)}">']
    for value, word in zip(shown, words):
        parts.append(f'<path class="grid" d="M{left:.1f} {at_y(value):.1f}H{WIDTH - RIGHT}"/>'
                     f'<text class="tick end" x="{left - 5:.1f}" y="{at_y(value) + 3.5:.1f}">{escape(word)}</text>')
    x_ticks = [value for value in ticks(first, last, 6, whole=chart.whole) if first <= value <= last]
    parts += [f'<text class="tick mid" x="{at_x(value):.1f}" y="{HEIGHT - BOTTOM + 15}">{value:g}</text>'
              for value in x_ticks]
    parts.append(f'<text class="tick mid" x="{(left + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 5}">'
                 f'{escape(chart.x_name)}</text>')
    if y_ticks[0] < 0 < y_ticks[-1] and not log:
        parts.append(f'<path class="zero" d="M{left:.1f} {at_y(0):.1f}H{WIDTH - RIGHT}"/>')
    if chart.best:
        parts.append(f'<path class="best" d="M{at_x(chart.best):.1f} {TOP}V{HEIGHT - BOTTOM}">'
                     f'<title>best epoch, {chart.best}</title></path>')
    for one in chart.series:
        places = [None if y is None or (log and y <= 0) else (at_x(x), at_y(y)) for x, y in zip(one.x, one.y)]
        parts.append(f'<path class="line c{one.colour} dash{one.dash}" data-run="{one.run}" d="{_path(places)}"/>')
        if one.dash < 2 and (chart.dots or len(one.x) < DOTTED):
            parts += [f'<circle class="dot c{one.colour}" data-run="{one.run}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" '
                      'r="2.6"/>' for p in places if p is not None]
    parts.append(f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg>')
    return Markup("".join(parts))


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """Lines through the points, with gaps where there is none."""
    words, pen_up = [], True
    for place in places:
        if place is None:
            pen_up = True
            continue
        words.append(f"{'M' if pen_up else 'L'}{place[0]:.1f} {place[1]:.1f}")
        pen_up = False
    return "".join(words)


def plot_of(chart: Chart, compared: bool, note: str = "") -> Plot:
    """A chart as a block of the page. Args: compared: colours are runs, so that a single line has a legend, too."""
    legend = [(one.name, one.colour, one.dash) for one in chart.series] if compared or len(chart.series) > 1 else []
    return Plot(chart.title, line_chart(chart), note or chart.note, legend)


def heat_map(heat: Heat) -> Markup:
    """Cells whose strength is |value| over the largest; negative ones have another colour."""
    rows, columns = len(heat.rows), len(heat.columns)
    top = max((abs(v) for row in heat.values for v in row), default=0.0) or 1.0
    left, right = 10 + CHARACTER * max(max(map(len, heat.rows)), 2) + 12, RIGHT
    width, height = (WIDTH - left - right) / columns, (HEIGHT - BOTTOM - TOP) / rows
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="plot" aria-label="{escape(heat.title)}">'
             f'<text class="tick mid" transform="translate(9 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)">'
             f'{escape(heat.y_name)}</text>']
    every = max(1, -(-rows // 10))
    for row, name in enumerate(heat.rows):
        y = TOP + height * row
        if row % every == 0:
            parts.append(f'<text class="tick end" x="{left - 5:.1f}" y="{y + height / 2 + 3.5:.1f}">{escape(name)}'
                         '</text>')
        for column, value in enumerate(heat.values[row]):
            tip = f"{heat.x_name} {heat.columns[column]}, {heat.y_name.split()[0]} {name}: {figure(value, heat.unit)}"
            parts.append(f'<rect class="{"hot" if value >= 0 else "cold"}" x="{left + width * column:.1f}" y="{y:.1f}" '
                         f'width="{width + 0.15:.1f}" height="{height + 0.15:.1f}" '
                         f'fill-opacity="{abs(value) / top:.2f}" data-tip="{escape(tip)}"/>')
    step = max(1, -(-columns // 6))
    parts += [f'<text class="tick mid" x="{left + width * (at + 0.5):.1f}" y="{HEIGHT - BOTTOM + 15}">'
              f'{heat.columns[at]}</text>' for at in range(0, columns, step)]
    parts.append(f'<text class="tick mid" x="{(left + WIDTH - right) / 2:.1f}" y="{HEIGHT - 5}">'
                 f'{escape(heat.x_name)}</text></svg>')
    return Markup("".join(parts))


def matrix(title: str, values: Sequence[Sequence[int]], x_name: str, y_name: str, tips: Sequence[Sequence[str]], *,
           by_row: bool) -> Markup:
    """A square table of counts: rows by columns, each cell as strong as its share of its row, or of the largest.

    With `by_row` the diagonal has another colour: there it is what is right.
    """
    size = len(values)
    left, top, edge = 36.0, 6.0, 278.0
    cell = edge / size
    largest = max((v for row in values for v in row), default=0) or 1
    parts = [f'<svg viewBox="0 0 {WIDTH} {WIDTH}" role="img" class="plot square" aria-label="{escape(title)}">'
             f'<text class="tick mid" transform="translate(9 {top + edge / 2:.0f}) rotate(-90)">{escape(y_name)}</text>'
             f'<text class="tick mid" x="{left + edge / 2:.0f}" y="{WIDTH - 3}">{escape(x_name)}</text>'
             f'<rect class="frame" x="{left}" y="{top}" width="{edge}" height="{edge}"/>']
    every = max(1, -(-size // 20))
    for row, counts in enumerate(values):
        whole = (sum(counts) if by_row else largest) or 1
        y = top + cell * row
        if row % every == 0:
            parts.append(
                f'<text class="tick end" x="{left - 4}" y="{y + cell / 2 + 3.5:.1f}">{row}</text>'
                f'<text class="tick mid" x="{left + cell * (row + 0.5):.1f}" y="{top + edge + 12}">{row}</text>')
        for column, count in enumerate(counts):
            if count == 0:
                continue
            share = count / whole
            kind = "hot" if not by_row or row == column else "cold"
            x = left + cell * column
            parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" '
                         f'fill-opacity="{0.06 + 0.94 * share:.2f}" data-tip="{escape(tips[row][column])}"/>')
            if size <= 12:
                strong = " strong" if share > 0.5 else ""
                parts.append(f'<text class="count mid{strong}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 3.5:.1f}">'
                             f'{_short(count)}</text>')
    return Markup("".join(parts) + "</svg>")


def _short(count: int) -> str:
    """Four characters at most, nearly.

    >>> _short(987), _short(12_345), _short(2_500_000)
    ('987', '12k', '2.5M')
    """
    for size, word in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2g}{word}" if count < 10 * size else f"{count / size:.0f}{word}"
    return str(count)


def histogram(title: str, counts: Sequence[int]) -> Markup:
    """Shares of the codes 0, 1, …, a bar each."""
    width, height, left, bottom = 150, 92, 6, 16
    whole, top = sum(counts) or 1, max(counts) or 1
    step = (width - 2 * left) / len(counts)
    gap = 2.0
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" class="small" aria-label="{escape(title)}">'
             f'<path class="zero" d="M{left} {height - bottom}H{width - left}"/>']
    if len(counts) > MOST_BARS:
        steps = "".join(f"V{height - bottom - (height - bottom - 14) * count / top:.1f}h{step:.3f}" for count in counts)
        parts.append(f'<path class="bar" d="M{left} {height - bottom}{steps}V{height - bottom}Z"/>')
    for code, count in enumerate(counts) if len(counts) <= MOST_BARS else ():
        tall = (height - bottom - 14) * count / top
        tip = f"code {code}: {100 * count / whole:.2f} % of {whole:,}"
        parts.append(f'<rect class="bar" x="{left + step * code + gap / 2:.2f}" y="{height - bottom - tall:.1f}" '
                     f'width="{max(step - gap, 0.5):.2f}" height="{tall:.1f}" data-tip="{escape(tip)}"/>')
        if len(counts) <= 4:
            parts.append(f'<text class="tick mid" x="{left + step * (code + 0.5):.1f}" '
                         f'y="{height - bottom - tall - 3:.1f}">{100 * count / whole:.0f} %</text>')
    last = len(counts) - 1
    for code in range(len(counts)) if last < MOST_BARS else (0, last):
        x, anchor = left + step * (code + 0.5), "mid"
        if last >= MOST_BARS and code:
            x, anchor = width - left, "end"
        parts.append(f'<text class="tick {anchor}" x="{x:.1f}" y="{height - 3}">{code}</text>')
    return Markup("".join(parts) + "</svg>")
