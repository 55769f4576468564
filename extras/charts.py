"""Figures of comparisons, without a drawing library: dots, intervals, axes with names."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extras import pictures

GREY, PALE = (120, 120, 120), (225, 225, 225)
SIZE = 2  # of letters: 12 x 18 pixels each
LETTER, LINE = 6 * SIZE, 9 * SIZE + 8


@dataclass
class Point:
    """A mean and its interval, nan where there is none."""

    x: float
    y: float
    low: float
    high: float
    x_low: float = math.nan
    x_high: float = math.nan


def colour_of(number: int) -> tuple:
    return pictures.CURVES[number % len(pictures.CURVES)]


def fill(picture, top: float, bottom: float, left: float, right: float, colour) -> None:
    """A rectangle, its ends included."""
    top, bottom, left, right = (round(edge) for edge in (top, bottom, left, right))
    picture[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = colour


def tick_values(low: float, high: float) -> list[float]:
    """Three to seven round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    for factor in (1, 2, 5, 10):
        if (high - low) / (factor * step) <= 6:
            step *= factor
            break
    first, last = math.ceil(low / step), math.floor(high / step)
    return [number * step for number in range(first, last + 1)]


def draw_rows(lines: list[tuple], title: str) -> np.ndarray:
    """lines: (label, values (worlds,), (mean, low, high)). A dot for each world, a bar for the
    interval, a thick mark for the mean; right of the dark line is more than the reference."""
    longest = max((len(label) for label, *_ in lines), default=0)
    left, wide = LETTER * longest + 24, 640
    height = LINE * (len(lines) + 2) + 12
    width = max(left + wide + 24, LETTER * len(title) + 24)
    picture = np.full((height, width, 3), 255, np.uint8)
    pictures.draw_text(picture, 8, 6, title, size=SIZE)
    numbers = [0.0]
    for _, values, of_mean in lines:
        numbers += [number for number in (*values, *of_mean) if math.isfinite(number)]
    first, last = span(numbers)

    def place(value: float) -> float:
        return left + (value - first) / (last - first) * wide

    for value in tick_values(first, last):
        at, text = place(value), f"{value:+.3g}"
        fill(picture, LINE + 8, height - LINE, at, at, PALE if abs(value) > 1e-9 else GREY)
        pictures.draw_text(
            picture, round(at) - LETTER * len(text) // 2, height - LINE + 6, text, size=SIZE
        )
    for i, (label, values, (mean, low, high)) in enumerate(lines):
        y = LINE * (i + 1) + 20
        pictures.draw_text(picture, 8, y - 8, label, size=SIZE)
        if math.isfinite(low):
            fill(picture, y - 1, y + 1, place(low), place(high), colour_of(0))
        if math.isfinite(mean):
            fill(picture, y - 6, y + 6, place(mean) - 2, place(mean) + 2, colour_of(0))
        for value in values:
            fill(picture, y - 11, y - 8, place(value) - 2, place(value) + 1, GREY)
    return picture


def draw_points(lines: dict[str, list[Point]], title: str, x_name: str, joined: bool) -> np.ndarray:
    """A mark for each point with bars for its intervals, and a legend.

    joined: the points are differences along x, a line through those of a name. Where all x are
    above 0 and the largest is 8 times the smallest or more, x is logarithmic.
    """
    plane = Plane(lines, title, x_name, joined)
    for number, name in enumerate(lines):
        shift = 0
        if joined:  # bars side by side
            shift = 6 * number - 3 * (len(lines) - 1)
        plane.draw_name(number, name)
        before = None
        for point in lines[name]:
            if math.isfinite(point.y):
                at = plane.draw_point(number, point, shift)
                if joined and before:
                    draw_line(plane.picture, before, at, colour_of(number))
                before = at
    return plane.picture


class Plane:
    """Two axes with their names and numbers, on which points are drawn."""

    left, right, bottom = 110, 810, 560
    top = LINE + 10

    def __init__(self, lines: dict[str, list[Point]], title: str, x_name: str, joined: bool):
        self.joined = joined
        points = [point for of_name in lines.values() for point in of_name]
        xs = sorted({point.x for point in points})
        logarithmic = xs[0] > 0 and xs[-1] >= 8 * xs[0]
        self.scale = math.log2 if logarithmic else float
        every_x, every_y = list(xs), []
        for point in points:
            every_x += [point.x_low, point.x_high]
            every_y += [point.y, point.low, point.high]
        if joined:
            every_y.append(0.0)
        self.x_first, self.x_last = span([self.scale(x) for x in every_x if math.isfinite(x)])
        self.y_first, self.y_last = span([y for y in every_y if math.isfinite(y)])
        longest = max(map(len, lines))
        height = max(self.bottom + 2 * LINE + 14, self.top + LINE * len(lines) + 20)
        width = max(self.right + LETTER * (longest + 6), LETTER * len(title) + 24)
        self.picture = np.full((height, width, 3), 255, np.uint8)
        self.write(8, 6, title)
        self.write((self.left + self.right) // 2 - LETTER * len(x_name) // 2, height - LINE, x_name)
        named = joined or logarithmic
        self.draw_numbers(xs if named else tick_values(self.x_first, self.x_last))

    def write(self, x: float, y: float, text: str, colour: tuple = (0, 0, 0)) -> None:
        pictures.draw_text(self.picture, max(0, round(x)), round(y), text, colour, size=SIZE)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (self.scale(x) - self.x_first) / (self.x_last - self.x_first)
        up = (y - self.y_first) / (self.y_last - self.y_first)
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )

    def draw_numbers(self, xs: list[float]) -> None:
        """Along both axes, with a pale line for each; a dark one where a difference is 0."""
        for value in xs:
            at, _ = self.place(value, self.y_first)
            fill(self.picture, self.top, self.bottom, at, at, PALE)
            text = f"{value:.3g}"
            self.write(at - LETTER * len(text) / 2, self.bottom + 8, text)
        for value in tick_values(self.y_first, self.y_last):
            _, at = self.place(xs[0], value)
            zero = self.joined and abs(value) < 1e-9
            fill(self.picture, at, at, self.left, self.right, GREY if zero else PALE)
            text = f"{value:+.3g}" if self.joined else f"{value:.3g}"
            self.write(self.left - 8 - LETTER * len(text), at - 8, text)

    def draw_name(self, number: int, name: str) -> None:
        y = self.top + LINE * number
        fill(self.picture, y + 4, y + 12, self.right + 12, self.right + 24, colour_of(number))
        self.write(self.right + 32, y, f"{number + 1} {name}", colour_of(number))

    def draw_point(self, number: int, point: Point, shift: float) -> tuple[float, float]:
        """Shifted by so many pixels to the right -> where it lies."""
        colour = colour_of(number)
        x, y = self.place(point.x, point.y)
        x += shift
        fill(self.picture, y - 4, y + 4, x - 4, x + 4, colour)
        if math.isfinite(point.low):
            upper, lower = self.place(point.x, point.high)[1], self.place(point.x, point.low)[1]
            fill(self.picture, upper, lower, x, x + 1, colour)
        if math.isfinite(point.x_low):
            first, last = self.place(point.x_low, point.y)[0], self.place(point.x_high, point.y)[0]
            fill(self.picture, y, y + 1, first, last, colour)
        if not self.joined:  # by its number, since colours come again
            self.write(x + 8, y - 24, str(number + 1), colour)
        return x, y


def span(values: list[float]) -> tuple[float, float]:
    """The ends of an axis: the values, with a margin."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.06 or max(abs(low), 1.0) * 0.1
    return low - margin, high + margin


def draw_line(picture: np.ndarray, start: tuple, stop: tuple, colour) -> None:
    steps = round(max(abs(stop[0] - start[0]), abs(stop[1] - start[1]))) + 1
    for x, y in np.linspace(start, stop, steps):
        fill(picture, y, y + 1, x, x, colour)


def write(path: Path, picture: np.ndarray) -> None:
    pictures.write_png(path, picture)
