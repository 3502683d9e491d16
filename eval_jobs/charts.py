"""Line charts as inline SVG: no script, no font file, colours from the page's style, readable at 360 pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hpc_gen.runtime.progress import format_count

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
MAX_POINTS = 400
MAX_DOTS = 6  # so few measurements are told from the line between them
LOG_ABOVE = 12.0  # largest over smallest value from which the vertical axis is logarithmic

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend and its points (x, y), ascending in x; values that are not finite are gaps."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x` with words for it (an attempt that resumed here)."""

    x: float
    text: str


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels; `log` by the decimal logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (_log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def _log(value: float) -> float:
    return math.log10(max(value, 1e-300))


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`, both included in range."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = []
    while (value := first * step) <= high + step * 1e-9:
        found.append(0.0 if abs(value) < step * 1e-9 else value)
        first += 1
    return found


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], or 1, 2, 5 times them when there are fewer than three."""
    powers = range(math.floor(_log(low)), math.ceil(_log(high)) + 1)
    tens = [10.0**p for p in powers if low <= 10.0**p <= high]
    if len(tens) >= 3:
        step = -(-len(tens) // 5)
        return tens[::step]
    return [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= f * 10.0**p <= high] or [low, high]


def label(value: float) -> str:
    """A tick's text: 0.0002, 1.5, 12k, 3e-5."""
    if value == 0:
        return "0"
    if abs(value) < 9.9e-5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if abs(value) < 10_000:
        return f"{value:.4g}"
    return format_count(value).replace(".0", "")


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each stretch the smallest and the largest value stay, so spikes are seen."""
    if len(points) <= limit:
        return list(points)
    size = -(-2 * len(points) // limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])] or stretch[:1]
        pair = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept += sorted(pair)
    return kept


def _path(points: Sequence[Point], x: _Axis, y: _Axis) -> str:
    """The `d` of a path; a gap starts a new piece."""
    parts, pen = [], "M"
    for at, value in points:
        if not math.isfinite(value) or (y.log and value <= 0):
            pen = "M"
            continue
        parts.append(f"{pen}{x.place(at):.1f} {y.place(value):.1f}")
        pen = "L"
    return "".join(parts)


def _vertical(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    bottom, top = float(HEIGHT - BOTTOM), float(TOP)
    if low > 0 and high / low > LOG_ABOVE:
        return _Axis(low, high, bottom, top, log=True)
    if low > 0 and low < 0.4 * high:
        low = 0.0  # a line that comes near zero is read best with zero in sight
    if low == high:
        low, high = (low - 1, high + 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    return _Axis(low, high + (high - low) * 0.04, bottom, top)


def _axes(x: _Axis, y: _Axis, unit: str, over: str) -> list[str]:
    """Grid, ticks and names of both axes."""
    parts: list[str] = []
    for value in log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high):
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label(value)}</text>')
    for value in ticks(x.low, x.high, wanted=4):
        at, bottom = x.place(value), HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{label(value)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    scale = f"{unit}, log" if y.log else unit
    parts.append(f'<text class="unit" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(over)}</text>')
    parts.append(f'<text class="unit" x="{LEFT}" y="{HEIGHT - 6}">{escape(scale)}</text>')
    return parts


def line_chart(
    title: str, unit: str, series: Sequence[Series], marks: Sequence[Mark] = (), over: str = "images seen"
) -> str:
    """An SVG figure of lines; `unit` names the vertical axis, `over` the other. Empty text when nothing is finite."""
    thinned = [Series(line.name, thin(line.points)) for line in series]
    values = [value for line in thinned for _, value in line.points if math.isfinite(value)]
    places = [at for line in thinned for at, _ in line.points]
    if not values:
        return ""
    y = _vertical(values)
    x = _Axis(0.0, max(*places, 1.0), float(LEFT), float(WIDTH - RIGHT))
    said = "; ".join(f"{line.name} ends at {label(_last(line.points))}" for line in thinned)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)} over {escape(over)}: {escape(said)}">'
    ]
    base = HEIGHT - BOTTOM
    parts += _axes(x, y, unit, over)
    for mark in marks:
        at = x.place(mark.x)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{base}">')
        parts.append(f"<title>{escape(mark.text)}</title></line>")
    for number, line in enumerate(thinned):
        drawn = [point for point in line.points if math.isfinite(point[1])]
        if len(drawn) > 1:
            parts.append(f'<path class="line s{number}" d="{_path(line.points, x, y)}"/>')
        for at, value in drawn if len(drawn) <= MAX_DOTS else []:
            if value > 0 or not y.log:
                parts.append(f'<circle class="dot s{number}" cx="{x.place(at):.1f}" cy="{y.place(value):.1f}" r="3"/>')
    parts.append("</svg>")
    return "".join(parts)


def _last(points: Sequence[Point]) -> float:
    return next((value for _, value in reversed(points) if math.isfinite(value)), math.nan)


@dataclass(frozen=True)
class Spot:
    """A point of a scatter chart; `error`: half the length of its bar; `front`: no other is better in both."""

    x: float
    y: float
    text: str
    error: float | None = None
    front: bool = False


def scatter_chart(title: str, unit: str, over: str, spots: Sequence[Spot]) -> str:
    """An SVG figure of points with error bars; those on the front are joined. Empty text without points."""
    shown = [spot for spot in spots if math.isfinite(spot.x) and math.isfinite(spot.y)]
    if not shown:
        return ""
    bars = [spot.y + sign * (spot.error or 0.0) for spot in shown for sign in (-1, 1)]
    y = _vertical([value for value in bars if value > 0] if min(spot.y for spot in shown) > 0 else bars)
    widest = max(spot.x for spot in shown)
    x = _Axis(0.0, widest * 1.05 or 1.0, float(LEFT), float(WIDTH - RIGHT))
    said = "; ".join(f"{spot.text}: {label(spot.y)} at {label(spot.x)}" for spot in shown if spot.front)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)} over {escape(over)}; not beaten: {escape(said or "none")}">'
    ]
    parts += _axes(x, y, unit, over)
    front = sorted((spot for spot in shown if spot.front), key=lambda spot: (spot.x, spot.y))
    if len(front) > 1:
        parts.append(f'<path class="edge" d="{_path([(spot.x, spot.y) for spot in front], x, y)}"/>')
    for spot in shown:
        at, place = x.place(spot.x), y.place(spot.y)
        if spot.error and (spot.y > spot.error or not y.log):
            low = min(HEIGHT - BOTTOM, y.place(spot.y - spot.error))
            high = max(TOP, y.place(spot.y + spot.error))
            parts.append(f'<line class="error" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        kind = "point front" if spot.front else "point"
        circle = f'<circle class="{kind}" cx="{at:.1f}" cy="{place:.1f}" r="4.5">'
        parts.append(f"{circle}<title>{escape(spot.text)}</title></circle>")
    parts.append("</svg>")
    return "".join(parts)
