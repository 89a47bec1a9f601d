"""Line charts as small SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.report.text import html_text

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36
COLOURS = 8
"""that the style sheet has; further lines take them again, dashed"""


@dataclass(frozen=True)
class Line:
    """A curve, with a band where one is told. All of one length N; None where nothing is known.

    Attributes:
        name: in the legend.
        number: of its colour; the same thing has the same number in all charts of a section.
        x_N, y_N: the points.
        low_N, high_N: the band.
        notes_N: what a point says beside its numbers, such as the step it was measured at.
    """

    name: str
    number: int
    x_N: Sequence[float]
    y_N: Sequence[float | None]
    low_N: Sequence[float | None] = ()
    high_N: Sequence[float | None] = ()
    notes_N: Sequence[str] = ()

    @property
    def colour(self) -> str:
        """Classes of its SVG elements."""
        return f"c{self.number % COLOURS}" + (" dashed" if self.number >= COLOURS else "")


@dataclass(frozen=True)
class Chart:
    """Lines on common axes.

    Attributes:
        title: what is drawn upwards.
        x_label: what is drawn to the right.
        lines: the curves.
        x_scale: ``"linear"``, ``"log2"`` or ``"sqrt"``.
        x_kind: charts of one title with several kinds of x are shown one at a time.
    """

    title: str
    x_label: str
    lines: Sequence[Line]
    x_scale: str = "linear"
    x_kind: str = ""

    def svg(self) -> str:
        """The chart as an SVG element; every text in it is escaped."""
        forward = SCALES[self.x_scale]
        xs = [forward(x) for line in self.lines for x in line.x_N]
        ys = [y for line in self.lines for values in (line.y_N, line.low_N, line.high_N) for y in values]
        x_range, y_range = _range(xs), _range([y for y in ys if y is not None], pad=0.05)

        def place(x: float, y: float) -> tuple[float, float]:
            right = (forward(x) - x_range[0]) / (x_range[1] - x_range[0])
            up = (y - y_range[0]) / (y_range[1] - y_range[0])
            return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

        body = [*self._grid(place, x_range, y_range), *(part for line in self.lines for part in _drawn(line, place))]
        names = ", ".join(dict.fromkeys(line.name for line in self.lines))
        label = html_text(f"{self.title} against {self.x_label}: {names}")
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'

    def _grid(
        self,
        place: Callable[[float, float], tuple[float, float]],
        x_range: tuple[float, float],
        y_range: tuple[float, float],
    ) -> list[str]:
        parts = []
        for tick in ticks(*y_range):
            _, y = place(self._x_of(x_range[0]), tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
        for tick in self._x_ticks(x_range):
            x, _ = place(tick, y_range[0])
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{short(tick)}</text>')
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html_text(self.x_label)}</text>'
        )
        return parts

    def _x_of(self, scaled: float) -> float:
        return {"linear": scaled, "log2": 2.0**scaled, "sqrt": scaled**2}[self.x_scale]

    def _x_ticks(self, x_range: tuple[float, float]) -> list[float]:
        if self.x_scale == "linear":
            return ticks(*x_range)
        if self.x_scale == "log2":
            return [2.0**power for power in range(math.ceil(x_range[0]), math.floor(x_range[1]) + 1)]
        return [round(tick**2, 10) for tick in ticks(*x_range)]


SCALES: dict[str, Callable[[float], float]] = {
    "linear": float,
    "log2": math.log2,
    "sqrt": lambda x: math.sqrt(max(0.0, x)),  # a sampled KL may come out a little below 0
}


def _range(values: Sequence[float], pad: float = 0.0) -> tuple[float, float]:
    """From a little below the lowest to a little above the highest, and not below 0 where no value is."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = pad * (high - low)
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        margin = max(0.5, abs(high) / 2)
    return (max(0.0, low - margin) if low >= 0 and pad else low - margin), high + margin


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from ``low`` to ``high``, some ``about`` of them.

    Example:
        >>> ticks(0, 1)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((size * power for size in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters.

    Example:
        >>> short(20000), short(0.25), short(1234.5)
        ('20k', '0.25', '1.23k')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}".replace("-", "\u2212")


def _drawn(line: Line, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    points = [(place(x, y), i) for i, (x, y) in enumerate(zip(line.x_N, line.y_N, strict=True)) if y is not None]
    if not points:
        return []
    parts = []
    if len(line.low_N):
        band = [
            (place(x, low), place(x, high))
            for x, low, high in zip(line.x_N, line.low_N, line.high_N, strict=True)
            if low is not None and high is not None
        ]
        corners = [high for _, high in band] + [low for low, _ in band[::-1]]
        if len(band) > 1:
            parts.append(f'<polygon class="band" points="{_points(corners)}"/>')
        parts += [  # a lone interval stands as a bar
            f'<line class="bar" x1="{x:.1f}" y1="{y0:.1f}" x2="{x:.1f}" y2="{y1:.1f}"/>'
            for (x, y0), (_, y1) in (band if len(band) == 1 else [])
        ]
    if len(points) > 1:
        parts.append(f'<polyline class="line" points="{_points([point for point, _ in points])}"/>')
    radius = 2.2 if len(points) <= 24 else 0
    for (x, y), i in points:
        dot = f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' if radius else ""
        tip = html_text(_told(line, i))
        parts.append(f'{dot}<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="7" data-tip="{tip}"/>')
    return [f'<g class="{line.colour}" data-line="{line.number}">', *parts, "</g>"]


def _told(line: Line, i: int) -> str:
    """A point in words; where its line has intervals and it has none, without the number."""
    value = f": {line.y_N[i]:.3g}"
    if len(line.low_N):
        low, high = line.low_N[i], line.high_N[i]
        value = "" if low is None or high is None else f"{value} [{low:.3g}, {high:.3g}]"
    note = f" · {line.notes_N[i]}" if len(line.notes_N) else ""
    return f"{line.name}{value} at {short(line.x_N[i])}{note}"


def _points(corners: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
