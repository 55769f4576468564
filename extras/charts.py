"""Figures of comparisons as SVG: dots, intervals, axes with names."""

import html
import math
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17828f", "#8c564b", "#555555")
BLACK, GREY, PALE = "#222222", "#888888", "#dddddd"
FONT_PX, LETTER_PX, LINE_PX = 14, 7.5, 25  # a letter of a sans-serif font is half as wide as high


@dataclass
class Point:
    """A mean and its interval, nan where there is none."""

    x: float
    y: float
    low: float
    high: float
    x_low: float = math.nan
    x_high: float = math.nan


class Drawing:
    """What is drawn so far; x to the right, y down, in px."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.elements: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, wide: float = 1):
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.elements.append(f'<line {ends} stroke="{colour}" stroke-width="{wide}"/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 4, opacity: float = 1):
        self.elements.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" opacity="{opacity}"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start", colour: str = BLACK):
        """y: of the middle of the letters."""
        self.elements.append(
            f'<text x="{x:.1f}" y="{y + FONT_PX / 3:.1f}" text-anchor="{anchor}" fill="{colour}">'
            f"{html.escape(words)}</text>"
        )

    def write(self, path: Path) -> None:
        size = f'width="{self.width:.0f}" height="{self.height:.0f}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" '
            f'font-family="sans-serif" font-size="{FONT_PX}">'
        )
        white = '<rect width="100%" height="100%" fill="white"/>'
        path.write_text("\n".join([head, white, *self.elements, "</svg>\n"]), encoding="utf-8")


def round_numbers(first: float, last: float, most: float) -> list[float]:
    """Numbers for an axis, between its ends, at most so many steps apart."""
    span = last - first
    step = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10):
        if span / (factor * step) <= most:
            step *= factor
            break
    return [number * step for number in range(math.ceil(first / step), math.floor(last / step) + 1)]


def signed(difference: float) -> str:
    return f"{difference:+.3g}" if difference else "0"


class Scale:
    """Values to px along an axis: first and last value, with a margin, to two ends. Where it is
    logarithmic, values that have no logarithm lie at the start."""

    def __init__(self, values: list[float], start_px: float, stop_px: float, log: bool = False):
        self.start_px, self.stop_px = start_px, stop_px
        self.of = math.log2 if log else float
        self.least = 0.0 if log else -math.inf  # greater values have a place
        places = [self.of(value) for value in values if self.least < value < math.inf]
        low, high = min(places, default=0.0), max(places, default=1.0)
        margin = (high - low) * 0.06 or max(abs(low), 1.0) * 0.1
        self.first, self.last = low - margin, high + margin

    def px(self, value: float) -> float:
        if value <= self.least:
            return self.start_px
        share = (self.of(value) - self.first) / (self.last - self.first)
        return self.start_px + share * (self.stop_px - self.start_px)

    def ticks(self) -> list[float]:
        """At most eight steps, each wide enough for its text."""
        most = min(8.0, abs(self.stop_px - self.start_px) / 50)
        return round_numbers(self.first, self.last, most)


def draw_rows(panels: dict[str, list[tuple]], title: str) -> Drawing:
    """panels, side by side on the same scale: name -> (label, values (worlds,), (mean, low, high))
    of each row; all have the same labels. A pale dot for each world, a bar for the interval, a dot
    for the mean; right of the dark line is more than the reference."""
    lines = next(iter(panels.values()))
    wide = 720 if len(panels) == 1 else 150
    left = 24 + LETTER_PX * max((len(label) for label, *_ in lines), default=0)
    top = LINE_PX + 14 if len(panels) == 1 else 2 * LINE_PX + 14  # below the panels' names
    bottom = top + LINE_PX * len(lines)
    right = left + wide * len(panels) + 16 * (len(panels) - 1)
    drawing = Drawing(max(right + 24, LETTER_PX * len(title) + 24), bottom + LINE_PX)
    drawing.text(12, LINE_PX / 2 + 4, title)
    for number, (label, *_) in enumerate(lines):
        drawing.text(12, top + LINE_PX * (number + 0.5), label)
    numbers = [0.0]
    for rows in panels.values():
        for _, values, of_mean in rows:
            numbers += [*values, *of_mean]
    for number, (name, rows) in enumerate(panels.items()):
        start = left + number * (wide + 16)
        if len(panels) > 1:
            drawing.text(start + wide / 2, top - LINE_PX / 2, name, "middle")
        draw_panel(drawing, rows, Scale(numbers, start, start + wide), top, bottom)
    return drawing


def draw_panel(drawing: Drawing, rows: list[tuple], scale: Scale, top: float, bottom: float):
    """One column of `draw_rows`."""
    for value in scale.ticks():
        x = scale.px(value)
        drawing.line(x, top, x, bottom, PALE if value else GREY)
        drawing.text(x, bottom + LINE_PX / 2, signed(value), "middle")
    for number, (_, values, (mean, low, high)) in enumerate(rows):
        y = top + LINE_PX * (number + 0.5)
        for value in values:
            drawing.dot(scale.px(value), y - 8, GREY, 3, opacity=0.5)
        if math.isfinite(low):
            drawing.line(scale.px(low), y, scale.px(high), y, COLOURS[0], 2.5)
        if math.isfinite(mean):
            drawing.dot(scale.px(mean), y, COLOURS[0], 5)


def draw_points(lines: dict[str, list[Point]], title: str, x_name: str, joined: bool) -> Drawing:
    """A dot for each point with bars for its intervals, and a legend.

    joined: the points are differences along x, a line through those of a name. Where all x are
    above 0 and the largest is 8 times the smallest or more, x is logarithmic.
    """
    plane = Plane(lines, x_name, joined)
    plane.drawing.text(12, LINE_PX / 2 + 4, title)
    for number, (name, points) in enumerate(lines.items()):
        plane.draw_name(number, name)
        shift = 0.0
        if joined:  # bars side by side
            shift = 6.0 * number - 3 * (len(lines) - 1)
        before = None
        for point in points:
            if math.isfinite(point.y):
                at = plane.draw_point(number, point, shift)
                if joined and before:
                    plane.drawing.line(*before, *at, COLOURS[number % len(COLOURS)], 1.5)
                before = at
    return plane.drawing


class Plane:
    """Two axes with their names and numbers, on which points are drawn."""

    left, right, top, bottom = 70, 700, LINE_PX + 14, 270

    def __init__(self, lines: dict[str, list[Point]], x_name: str, joined: bool):
        self.joined = joined
        points = [point for of_name in lines.values() for point in of_name]
        named = sorted({point.x for point in points})
        every_x, every_y = list(named), []
        for point in points:
            every_x += [point.x_low, point.x_high]
            every_y += [point.y, point.low, point.high]
        if joined:
            every_y.append(0.0)
        logarithmic = named[0] > 0 and named[-1] >= 8 * named[0]
        self.x = Scale(every_x, self.left, self.right, logarithmic)
        self.y = Scale(every_y, self.bottom, self.top)
        width = self.right + 40 + LETTER_PX * (max(map(len, lines)) + 4)
        height = max(self.bottom + 2 * LINE_PX, self.top + LINE_PX * len(lines)) + 8
        self.drawing = Drawing(width, height)
        middle = (self.left + self.right) / 2
        self.drawing.text(middle, self.bottom + 1.5 * LINE_PX, x_name, "middle")
        self.draw_numbers(named if joined or logarithmic else self.x.ticks())

    def draw_numbers(self, xs: list[float]) -> None:
        """Along both axes, with a pale line for each; a dark one where a difference is 0."""
        for value in xs:
            x = self.x.px(value)
            self.drawing.line(x, self.top, x, self.bottom, PALE)
            self.drawing.text(x, self.bottom + LINE_PX / 2, f"{value:.3g}", "middle")
        for value in self.y.ticks():
            y = self.y.px(value)
            dark = self.joined and not value
            self.drawing.line(self.left, y, self.right, y, GREY if dark else PALE)
            number = signed(value) if self.joined else f"{value:.3g}"
            self.drawing.text(self.left - 8, y, number, "end")

    def draw_name(self, number: int, name: str) -> None:
        y, colour = self.top + LINE_PX * (number + 0.5), COLOURS[number % len(COLOURS)]
        self.drawing.dot(self.right + 24, y, colour)
        words = name if self.joined else f"{number + 1} {name}"  # as draw_point numbers it
        self.drawing.text(self.right + 36, y, words, colour=colour)

    def draw_point(self, number: int, point: Point, shift: float) -> tuple[float, float]:
        """Shifted by so many px to the right -> where it lies."""
        colour = COLOURS[number % len(COLOURS)]
        x, y = self.x.px(point.x) + shift, self.y.px(point.y)
        if math.isfinite(point.low):
            self.drawing.line(x, self.y.px(point.low), x, self.y.px(point.high), colour, 1.5)
        if math.isfinite(point.x_low):
            ends = self.x.px(point.x_low), self.x.px(point.x_high)
            self.drawing.line(ends[0], y, ends[1], y, colour, 1.5)
        self.drawing.dot(x, y, colour)
        if not self.joined:  # by its number, since colours come again
            self.drawing.text(x + 8, y - 12, str(number + 1), colour=colour)
        return x, y
