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
    reach = max(max(numbers), -min(numbers)) or 1.0

    def place(value: float) -> float:
        return left + wide / 2 + value / reach * (wide / 2 - 8)

    for value in tick_values(-reach, reach):
        at, text = place(value), f"{value:+.3g}"
        fill(picture, LINE + 8, height - LINE, at, at, PALE if value else (90, 90, 90))
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
    """A mark for each point with bars for its intervals; joined: a line through those of a name.

    Where all x are above 0 and the largest is 8 times the smallest or more, x is logarithmic.
    """
    names = list(lines)
    points = [point for of_name in lines.values() for point in of_name]
    legend = LETTER * max((len(name) for name in names), default=0) + 40
    left, right, top, bottom = 110, 810, LINE + 10, 560
    height = max(bottom + 2 * LINE + 14, top + LINE * len(names) + 20)
    picture = np.full((height, right + legend, 3), 255, np.uint8)
    pictures.draw_text(picture, 8, 6, title, size=SIZE)
    xs = [point.x for point in points]
    logarithmic = min(xs) > 0 and max(xs) >= 8 * min(xs)
    scale = math.log2 if logarithmic else float
    x_first, x_last = span([*xs, *(p.x_low for p in points), *(p.x_high for p in points)], scale)
    every_y = [number for p in points for number in (p.y, p.low, p.high)]
    if joined:
        every_y.append(0.0)  # joined points are differences
    y_first, y_last = span(every_y, float)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (scale(x) - x_first) / (x_last - x_first) * (right - left)
        return across, bottom - (y - y_first) / (y_last - y_first) * (bottom - top)

    x_ticks = sorted(set(xs)) if logarithmic or joined else tick_values(x_first, x_last)
    for value in x_ticks:
        at, _ = place(value, y_first)
        fill(picture, top, bottom, at, at, PALE)
        text = f"{value:.3g}"
        pictures.draw_text(
            picture, round(at) - LETTER * len(text) // 2, bottom + 8, text, size=SIZE
        )
    for value in tick_values(y_first, y_last):
        _, at = place(x_ticks[0], value)
        dark = joined and abs(value) < 1e-12
        fill(picture, at, at, left, right, (90, 90, 90) if dark else PALE)
        text = f"{value:+.3g}" if joined else f"{value:.3g}"
        pictures.draw_text(
            picture, max(0, left - 8 - LETTER * len(text)), round(at) - 8, text, size=SIZE
        )
    pictures.draw_text(
        picture, max(8, (left + right - LETTER * len(x_name)) // 2), bottom + LINE + 10, x_name,
        size=SIZE,
    )  # fmt: skip
    for number, name in enumerate(names):
        colour = colour_of(number)
        y = top + LINE * number
        fill(picture, y + 4, y + 12, right + 12, right + 24, colour)
        pictures.draw_text(picture, right + 32, y, name, colour, size=SIZE)
        before = None
        for point in lines[name]:
            if not math.isfinite(point.y):
                continue
            x, y = place(point.x, point.y)
            fill(picture, y - 4, y + 4, x - 4, x + 4, colour)
            if math.isfinite(point.low):
                upper, lower = place(point.x, point.high)[1], place(point.x, point.low)[1]
                fill(picture, upper, lower, x, x, colour)
            if math.isfinite(point.x_low):
                first, last = place(point.x_low, point.y)[0], place(point.x_high, point.y)[0]
                fill(picture, y, y, first, last, colour)
            if joined and before:
                draw_line(picture, before, (x, y), colour)
            before = (x, y)
    return picture


def span(values: list[float], scale) -> tuple[float, float]:
    """The ends of an axis, with a margin; values that are not finite do not count."""
    values = [
        scale(value) for value in values if math.isfinite(value) and (value > 0 or scale is float)
    ]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.06 or max(abs(low), 1.0) * 0.1
    return low - margin, high + margin


def draw_line(picture: np.ndarray, start: tuple, stop: tuple, colour) -> None:
    steps = round(max(abs(stop[0] - start[0]), abs(stop[1] - start[1]))) + 1
    for x, y in np.linspace(start, stop, steps):
        fill(picture, y, y + 1, x, x, colour)


def write(path: Path, picture: np.ndarray) -> None:
    pictures.write_png(path, picture)
