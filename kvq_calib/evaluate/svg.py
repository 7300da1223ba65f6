"""Charts as inline SVG: no script, no font, no colour of their own, so that the page's style sheet rules them.

A chart names what a mark means by a class (``key``, ``value``, ``s0`` to ``s7``); the style sheet gives the class a
colour for light and for dark. Text that comes from outside is escaped by markupsafe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

from kvq_calib.evaluate import pareto

__all__ = [
    "Axis",
    "Chart",
    "Point",
    "density",
    "element",
    "frontier",
    "grouped_bars",
    "lines",
    "on_frontier",
    "plain",
]

Format = Callable[[float], str]

#: A character's mean width in parts of its height; what fits is judged by it.
_CHARACTER = 0.56
_FONT = 12.0


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An element of SVG; text and values are escaped, numbers are shortened to what a screen can show.

    Args:
        children: elements, or anything else as text.
        attributes: ``_`` stands for ``-``, and ``class_`` for ``class``; ``None`` leaves one out.
    """
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value) if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup(f"<{name}{text}>{inside}</{name}>") if children else Markup(f"<{name}{text}/>")


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def plain(value: float) -> str:
    """A number as people write it, not in powers of ten."""
    return f"{value:.9f}".rstrip("0").rstrip(".") or "0"


@dataclass(frozen=True)
class Axis:
    """Where values stand.

    Attributes:
        low, high: ends, ``low < high``; positive where ``log``.
        label: with its unit.
        log: logarithmic.
        format: of tick labels.
        ticks: where; round values if ``None``.
    """

    low: float
    high: float
    label: str = ""
    log: bool = False
    format: Format = plain
    ticks: tuple[float, ...] | None = None

    @classmethod
    def around(cls, values: Sequence[float], label: str, *, log: bool = False, pad: float = 0.08) -> Axis:
        """An axis with some air around all values; a single value stands in the middle."""
        points = [math.log(value) for value in values] if log else list(values)
        low, high = min(points), max(points)
        air = pad * (high - low) or (0.7 if log else 0.5)
        low, high = low - air, high + air
        return cls(math.exp(low), math.exp(high), label, log=True) if log else cls(low, high, label)

    @classmethod
    def from_zero(cls, values: Iterable[float], label: str) -> Axis:
        """A linear axis that begins at 0, for bars."""
        high = max(values, default=0.0)
        return cls(0.0, 1.08 * high if high > 0 else 1.0, label)

    def place(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marks(self, most: int = 6) -> list[float]:
        """Ticks at round values: 1, 2 or 5 times a power of ten."""
        if self.ticks is not None:
            return [tick for tick in self.ticks if self.low <= tick <= self.high]
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1,)):
                found = [
                    step * 10.0**power
                    for power in range(first, last + 1)
                    for step in steps
                    if self.low <= step * 10.0**power <= self.high
                ]
                if len(found) <= most + 2:
                    break
            return found
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        # Rounded, because 3 * 0.1 is not 0.3.
        first = math.ceil(self.low / step - 1e-9)
        return [float(f"{n * step:.12g}") for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass
class Chart:
    """A plot: axes, and marks placed by value.

    Attributes:
        title: for those who cannot see it.
        x, y: axes.
        width, height: in units of the view box; a screen scales them.
        left, right, top, bottom: margins; the left one is wide enough for the ticks if ``None``.
        grid: whether ticks of ``y`` (and of a logarithmic ``x``) have lines.
    """

    title: str
    x: Axis
    y: Axis
    width: float = 860.0
    height: float = 320.0
    left: float | None = None
    right: float = 18.0
    top: float = 14.0
    bottom: float = 46.0
    grid: bool = True
    marks: list[Markup] = field(default_factory=list)
    start: float = field(init=False)

    def __post_init__(self) -> None:
        longest = max((len(self.y.format(tick)) for tick in self._y_ticks()), default=0)
        self.start = 36 + _CHARACTER * _FONT * max(longest, 4) if self.left is None else self.left

    def _y_ticks(self) -> list[float]:
        return self.y.marks(6 if self.height > 150 else 3)

    def px(self, value: float) -> float:
        """Horizontal place of a value."""
        return self.start + self.x.place(value) * (self.width - self.start - self.right)

    def py(self, value: float) -> float:
        """Vertical place of a value."""
        return self.height - self.bottom - self.y.place(value) * (self.height - self.top - self.bottom)

    def add(self, name: str, *children: object, **attributes: object) -> None:
        """Add a mark."""
        self.marks.append(element(name, *children, **attributes))

    def line(self, points: Iterable[tuple[float, float]], class_: str) -> None:
        """Add a line through values."""
        self.add("path", d=_path((self.px(x), self.py(y)) for x, y in points), class_=f"line {class_}")

    def upright(self, x: float, text: str) -> None:
        """Add a vertical line with a name at its upper end."""
        if self.x.low <= x <= self.x.high:
            at = self.px(x)
            self.add("line", x1=at, x2=at, y1=self.top, y2=self.height - self.bottom, class_="rule")
            beside = (at + 6, "note") if at < self.width / 2 else (at - 6, "note end")
            self.add("text", text, x=beside[0], y=self.top + 10, class_=beside[1])

    def _axes(self) -> list[Markup]:
        bottom, right = self.height - self.bottom, self.width - self.right
        parts = []
        for value in self._y_ticks():
            at = self.py(value)
            if self.grid:
                parts.append(element("line", x1=self.start, x2=right, y1=at, y2=at, class_="grid"))
            parts.append(element("text", self.y.format(value), x=self.start - 8, y=at + 4, class_="tick end"))
        for value in self.x.marks(10):
            at = self.px(value)
            parts.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(element("text", self.x.format(value), x=at, y=bottom + 18, class_="tick middle"))
        parts.append(element("line", x1=self.start, x2=right, y1=bottom, y2=bottom, class_="axis"))
        if self.x.label:
            middle = (self.start + right) / 2
            parts.append(element("text", self.x.label, x=middle, y=self.height - 8, class_="label middle"))
        if self.y.label:
            middle = (self.top + bottom) / 2
            turn = f"rotate(-90 14 {_number(middle)})"
            parts.append(
                element("text", self.y.label, x=14.0, y=middle, transform=turn, class_="label middle")
            )
        return parts

    def render(self, class_: str = "") -> Markup:
        """The finished ``<svg>``."""
        return element(
            "svg",
            element("title", self.title),
            *self._axes(),
            *self.marks,
            viewBox=f"0 0 {_number(self.width)} {_number(self.height)}",
            role="img",
            class_=f"chart {class_}".strip(),
        )


@dataclass(frozen=True)
class Point:
    """A measured point of the frontier chart.

    Attributes:
        name: of what was measured.
        bits: per element.
        kl: nats per token, positive.
        tip: shown when pointed at.
        class_: of its mark.
        own: whether it is one of the report's artifacts, and not only beside them.
    """

    name: str
    bits: float
    kl: float
    tip: str
    class_: str = "other"
    own: bool = False


def on_frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in bits and divergence, by rising bits."""
    return pareto.frontier(points, lambda point: (point.bits, point.kl))


def frontier(points: Sequence[Point], title: str, x_label: str, y_label: str) -> Markup:
    """Divergence against bits, with the frontier drawn: down and left is better."""
    chart = Chart(
        title,
        Axis.around([p.bits for p in points], x_label, pad=0.12),
        Axis.around([p.kl for p in points], y_label, log=True, pad=0.14),
        height=440.0,
    )
    # Steps: between two points nothing was measured, so the better of both is not promised.
    edge: list[tuple[float, float]] = []
    for point in on_frontier(points):
        edge += [(point.bits, edge[-1][1]), (point.bits, point.kl)] if edge else [(point.bits, point.kl)]
    if len(edge) > 1:
        chart.line(edge, "edge")
    hint = "↙ fewer bits, closer to the unquantized model"
    floor = chart.height - chart.bottom
    chart.add("text", hint, x=chart.start + 10, y=floor - 10, class_="note")
    taken = [(chart.start, floor - 22, chart.start + _width(hint), floor)]
    taken += [_around(chart.px(p.bits), chart.py(p.kl), 8.0) for p in points]
    corners = [(chart.px(bits), chart.py(kl)) for bits, kl in edge]
    drawn = [
        (min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])) for a, b in pairwise(corners)
    ]
    for point in sorted(points, key=lambda p: not p.own):
        x, y = chart.px(point.bits), chart.py(point.kl)
        spot = _label_spot(point.name, x, y, taken + drawn, chart) or _label_spot(
            point.name, x, y, taken, chart
        )
        if spot is not None:
            left, base, right, far = spot
            taken.append((left, base - _FONT, right, base + 3))
            if far:
                chart.add("line", x1=x, y1=y, x2=min(max(x, left), right), y2=base - 4, class_="leader")
            chart.add("text", point.name, x=left, y=base, class_="name own" if point.own else "name")
    for point in sorted(points, key=lambda p: p.own):  # ours are drawn over the others
        chart.add(
            "circle",
            element("title", point.tip),
            cx=chart.px(point.bits),
            cy=chart.py(point.kl),
            r=6.5 if point.own else 5.0,
            class_=f"point {'own' if point.own else 'beside'} {point.class_}",
        )
    return chart.render()


_Box = tuple[float, float, float, float]


def _around(x: float, y: float, reach: float) -> _Box:
    return x - reach, y - reach, x + reach, y + reach


def _width(text: str) -> float:
    return _CHARACTER * (_FONT + 1) * len(text)


def _label_spot(
    text: str, x: float, y: float, taken: Sequence[_Box], chart: Chart
) -> tuple[float, float, float, bool] | None:
    """Where a point's name covers nothing: left, base line, right, and whether it is so far off that it needs a line.

    ``None`` where there is no such place; the table below the chart has every name.
    """
    width = _width(text)
    near = [(11.0, 4.0), (-11.0 - width, 4.0)]
    for up in (-9.0, 18.0):
        near += [(9.0, up), (-9.0 - width, up)]
    near += [(-width / 2, -12.0), (-width / 2, 22.0)]
    far = [
        (side, up)
        for up in (-26.0, 34.0, -42.0, 50.0, -58.0, 66.0)
        for side in (12.0, -12.0 - width, -width / 2)
    ]
    far += [(side, up) for side in (34.0, -34.0 - width) for up in (4.0, -18.0, 26.0)]
    for number, (dx, dy) in enumerate(near + far):
        left, base = x + dx, y + dy
        box = (left, base - _FONT, left + width, base + 3)
        inside = (
            left > chart.start
            and box[2] < chart.width
            and box[1] > 0
            and box[3] < chart.height - chart.bottom
        )
        if inside and not any(
            box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
        ):
            return left, base, left + width, number >= len(near)
    return None


def grouped_bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    tip: Callable[[str, str, float], str],
    height: float = 240.0,
) -> Markup:
    """A bar per group and series, from 0.

    Args:
        groups: names under the groups; some are left out where there is no room.
        series: name, class and one value per group.
        tip: text shown for (group, series, value).
    """
    values = [value for _, _, own in series for value in own]
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(groups) / step <= 24)
    ticks = tuple(float(n) for n in range(0, len(groups), every))
    chart = Chart(
        title,
        Axis(-0.5, len(groups) - 0.5, x_label, ticks=ticks, format=lambda value: groups[int(value)]),
        Axis.from_zero(values, y_label),
        height=height,
        left=80.0,  # so that the groups of charts under each other stand under each other
    )
    room = chart.px(1) - chart.px(0)
    thick = 0.8 * room / len(series)
    floor = chart.py(0)
    for place, (name, class_, own) in enumerate(series):
        for index, value in enumerate(own):
            top = chart.py(value)
            chart.add(
                "rect",
                element("title", tip(groups[index], name, value)),
                x=chart.px(index) - 0.4 * room + place * thick,
                y=top,
                width=0.92 * thick,
                height=floor - top,
                class_=f"bar {class_}",
            )
    return chart.render()


def lines(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    *,
    height: float = 320.0,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Named lines; each name stands at the end of its line, pushed apart where they would meet.

    Args:
        series: name, class and values of each line.
        marks: vertical lines: value of ``x`` and name.
    """
    longest = max(len(name) for name, _, _ in series)
    chart = Chart(title, x, y, height=height, right=20 + _CHARACTER * (_FONT + 2) * longest)
    for value, name in marks:
        chart.upright(value, name)
    ends = []
    for name, class_, points in series:
        chart.line(points, class_)
        ends.append((chart.py(points[-1][1]), chart.px(points[-1][0]), name, class_))
    lowest = -math.inf
    for at, right, name, class_ in sorted(ends):
        lowest = max(at + 4, lowest + 15)
        chart.add("text", name, x=right + 8, y=lowest, class_=f"name ink {class_}")
    return chart.render()


def density(
    title: str,
    levels: Sequence[float],
    weights: Sequence[float],
    counts: Sequence[float],
    class_: str,
    *,
    width: float = 280.0,
    height: float = 130.0,
    axis: bool = True,
) -> Markup:
    """Levels of a codebook over the distribution that they serve, on the normalised range.

    The area is the weighted distribution, the thin line the unweighted one, both scaled to one height; peaks at the ends
    of the range are cut off.
    """
    bottom = 22.0 if axis else 6.0
    chart = Chart(
        title,
        Axis(-1.04, 1.04, ticks=(-1.0, -0.5, 0.0, 0.5, 1.0) if axis else ()),
        Axis(0.0, 1.06, ticks=()),
        width=width,
        height=height,
        left=4.0,
        right=4.0,
        top=4.0,
        bottom=bottom,
        grid=False,
    )
    bins = len(weights)
    middles = [(2 * n + 1) / bins - 1 for n in range(bins)]
    for values, kind in ((weights, "area"), (counts, "plain")):
        # Thresholds that follow a token put some number at an end each time: those peaks would flatten the rest.
        tallest = max(values[2:-2]) or 1.0
        outline = [
            (middle, min(value / tallest, 1.06)) for middle, value in zip(middles, values, strict=True)
        ]
        if kind == "area":
            outline = [(middles[0], 0.0), *outline, (middles[-1], 0.0)]
        chart.add("path", d=_path((chart.px(x), chart.py(y)) for x, y in outline), class_=f"{kind} {class_}")
    for level in levels:
        at = chart.px(level)
        many = " many" if len(levels) > 16 else ""
        chart.add("line", x1=at, x2=at, y1=chart.py(0), y2=chart.py(1.0), class_=f"level{many}")
        chart.add("line", x1=at, x2=at, y1=chart.py(0), y2=chart.py(0.12), class_="foot")
    return chart.render("small")
