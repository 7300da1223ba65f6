"""Charts: matplotlib figures, saved as files or turned into inline SVG for a page.

For a page, a figure is drawn in placeholder colours. :meth:`Chart.inline` replaces them by ``var(--name)``, so that the
page's style sheet sets the colours, light or dark. Text stays text, in the page's font. Needs matplotlib (the extra
``report``).
"""

from __future__ import annotations

import hashlib
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # no global state, no window

from kvq_calib.files import write_atomically

__all__ = ["DARK", "FONT", "PAGE", "PRINT", "Chart", "Palette"]

#: Font size, in units of the chart.
FONT = 12.0
_SVG = "{http://www.w3.org/2000/svg}"
#: Numbers with more digits than a screen shows.
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")


@dataclass(frozen=True)
class Palette:
    """Colours by purpose.

    Attributes:
        ink, soft, line, panel: colours of the main text, of axes and notes, of the grid, and of the background.
        key, value, other: colours of keys, of values, and of rivals.
        s0, s1, s2, s3, s4, s5, s6, s7: colours of artifacts, in their order.
    """

    ink: str
    soft: str
    line: str
    panel: str
    key: str
    value: str
    other: str
    s0: str
    s1: str
    s2: str
    s3: str
    s4: str
    s5: str
    s6: str
    s7: str

    def of(self, name: str) -> str:
        """The colour called ``name``."""
        colour: str = getattr(self, name)
        return colour


#: For a light background: the light colours of the report's style sheet.
PRINT = Palette(
    "#1a1f24", "#56616c", "#dde2e6", "#ffffff", "#0f6ab4", "#c2570c", "#8a949e",
    "#0b7f77", "#8a3fb0", "#c02450", "#66780a", "#2f55d0", "#a06200", "#37803a", "#7a5648",
)  # fmt: skip
#: For a dark background: the dark colours of the same style sheet.
DARK = Palette(
    "#e6eaee", "#9eabb7", "#2c353e", "#171c22", "#5cb3f5", "#f2a154", "#7d8994",
    "#4bd0c3", "#cb9df2", "#ff8aa6", "#c3d566", "#93b0ff", "#efbf62", "#8fcf80", "#d3ab97",
)  # fmt: skip
_NAMES = [each.name for each in fields(Palette)]
#: Placeholder colours that no chart uses otherwise; :meth:`Chart.inline` replaces them.
PAGE = Palette(*(f"#0a0b{number:02x}" for number in range(len(_NAMES))))
_VARIABLES = {PAGE.of(name): f"var(--{name})" for name in _NAMES}


def _settings(palette: Palette) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "kvq-calib",  # the same figures give the same bytes
        "font.size": FONT,
        "axes.labelsize": FONT,
        "axes.titlesize": FONT,
        "axes.linewidth": 1.0,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.edgecolor": palette.soft,
        "axes.labelcolor": palette.soft,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "text.color": palette.soft,
        "xtick.color": palette.soft,
        "ytick.color": palette.line,
        "ytick.labelcolor": palette.soft,
        "xtick.labelsize": FONT,
        "ytick.labelsize": FONT,
        "xtick.major.size": 4.0,
        "ytick.major.size": 0.0,
        "grid.color": palette.line,
        "path.simplify": False,
    }


@dataclass
class Chart:
    """A figure with one plot. Its unit is 1/72 inch, and the unit of the inline SVG's view box.

    Attributes:
        title: description for screen readers.
        palette: ``PAGE`` for inline SVG, ``PRINT`` or ``DARK`` for files.
        width, height: size of the figure.
        margins: left, right, top and bottom margin of the plot.
        axes: matplotlib axes to draw on, within :meth:`style`.
    """

    title: str
    palette: Palette
    width: float
    height: float
    margins: tuple[float, float, float, float]
    figure: Figure = field(init=False)
    axes: Any = field(init=False)
    _tips: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        left, right, top, bottom = self.margins
        with self.style():
            self.figure = Figure(figsize=(self.width / 72, self.height / 72), dpi=72)
            self._canvas = FigureCanvasAgg(self.figure)
            w, h = self.width, self.height
            place = (left / w, bottom / h, 1 - (left + right) / w, 1 - (top + bottom) / h)
            self.axes = self.figure.add_axes(place)
            self.axes.margins(0)

    def style(self) -> Any:
        """A context manager that sets the style for drawing."""
        return matplotlib.rc_context(_settings(self.palette))

    @property
    def renderer(self) -> Any:
        """The matplotlib renderer, which measures text."""
        return self._canvas.get_renderer()

    def colour(self, name: str) -> str:
        """The colour called ``name``."""
        return self.palette.of(name)

    def mark(self, artist: Any, name: str, tip: str | None = None) -> None:
        """Give a mark a class for its element on a page, and a text that is shown on hovering."""
        gid = f"{name}.{len(self._tips)}"
        artist.set_gid(gid)
        self._tips[gid] = tip or ""

    def inline(self, class_: str = "") -> str:
        """The chart as an ``<svg>`` element of a page; everything in it is escaped."""
        stream = io.StringIO()
        with self.style():
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(stream, format="svg", metadata=nothing)
        root = ElementTree.fromstring(stream.getvalue())
        _tidy(root, self._tips)
        for name in ("width", "height", "version"):
            root.attrib.pop(name, None)
        root.attrib |= {"role": "img", "class": f"chart {class_}".strip()}
        title = ElementTree.Element("title")
        title.text = self.title
        root.insert(0, title)
        text = re.sub(r"\s*\n\s*", "", ElementTree.tostring(root, encoding="unicode"))
        # Charts of one page must not share identifiers.
        return text.replace("kvq-id-", f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-")

    def save(self, file: str) -> None:
        """Write an ``.svg`` or ``.png`` file atomically."""
        target = io.BytesIO()
        suffix = Path(file).suffix.lower().removeprefix(".")
        metadata: dict[str, Any] = {"Date": None} if suffix == "svg" else {"Software": None}
        with self.style():
            self.figure.savefig(
                target, format=suffix, dpi=144, metadata=metadata, facecolor=self.palette.panel
            )
        write_atomically(file, target.getvalue())


def _tidy(element: ElementTree.Element, tips: dict[str, str]) -> None:
    """Reduce matplotlib's SVG to what a page needs: named marks, and colours as variables."""
    element.tag = element.tag.removeprefix(_SVG)
    for name in list(element.attrib):
        if name.startswith("{"):  # xlink:href
            element.set("href", element.attrib.pop(name))
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":  # the page sets the font family
            element.set("font-size", re.findall(r"[\d.]+px", value)[0])
            if re.match(r"bold|[67]00", value):
                element.set("font-weight", "650")
        elif name:
            element.set(name, _VARIABLES.get(value, value))
    for name in ("d", "x", "y", "transform"):
        if name in element.attrib:
            element.set(name, _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.1f}", element.attrib[name]))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    _identify(element, tips)
    for child in list(element):
        _tidy(child, tips)
        if not _shows(child):
            element.remove(child)


def _identify(element: ElementTree.Element, tips: dict[str, str]) -> None:
    """Turn identifiers of named marks into classes and titles. Keep identifiers that are referred to."""
    identifier = element.attrib.pop("id", None)
    for name in ("href", "clip-path"):
        if name in element.attrib:
            element.set(name, element.attrib[name].replace("#", "#kvq-id-"))
    if identifier in tips:
        element.set("class", identifier.partition(".")[0])
        if tips[identifier]:
            title = ElementTree.Element("title")
            title.text = tips[identifier]
            element.insert(0, title)
    elif identifier is not None and (element.tag in ("clipPath", "path")):
        element.set("id", f"kvq-id-{identifier}")


def _shows(element: ElementTree.Element) -> bool:
    """Whether an element draws something, or defines or describes something that does."""
    if element.tag == "metadata":
        return False
    if element.tag in ("g", "defs"):
        return len(element) > 0
    return not (element.tag == "path" and element.get("fill") == "none" and "stroke" not in element.attrib)
