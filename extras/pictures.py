"""Pictures without a drawing library: boxes and text on frames, curves, png, mp4. numpy and av."""

import base64
import functools
import math
import textwrap
import unicodedata
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from extras.charts import round_numbers

# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------

GREEN, AMBER = (90, 220, 120), (255, 190, 60)
DARK, GRID = (25, 25, 25), 232
CURVES = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14))
FONT = (  # ASCII 32-126, 5 x 8 pixels: five bytes a character, one per column, lowest bit on top
    "AAAAAAAAAF8AAAAHAAcAFH8UfxQkKn8qEiMTCGRiNklWIFAAAAcAAAAcIkEAAEEiHAAqHH8cKggIPggIAKBgAAAICAgI"
    "CABgYAAAIBAIBAI+UUlFPgBCf0AAYlFJSUYiQUlJNhgUEn8QJ0VFRTk8SklJMAFxCQUDNklJSTYGSUkpHgA2NgAAALZ2"
    "AAAIFCJBABQUFBQUAEEiFAgCAVEJBj5BXVUefgkJCX5/SUlJNj5BQUEif0FBQT5/SUlJQX8JCQkBPkFJSTp/CAgIfwBB"
    "f0EAIEBBPwF/CBQiQX9AQEBAfwIMAn9/BAgQfz5BQUE+fwkJCQY+QVEhXn8JGSlGJklJSTIBAX8BAT9AQEA/HyBAIB8/"
    "QDhAP2MUCBRjBwhwCAdhUUlFQwB/QUEAAgQIECAAQUF/AAQCAQIEQEBAQEAAAQIEACBUVFR4f0hERDg4REREKDhEREh/"
    "OFRUVBgIfgkBAhikpKR8fwgEBHgARH1AAECAhH0AfxAoRAAAQX9AAHwEGAR4fAgEBHg4REREOPwkJCQYGCQkJPx8CAQE"
    "CEhUVFQkBD9EQCA8QEAgfBwgQCAcPEAwQDxEKBAoRBygoKB8RGRUTEQACDZBAAAAfwAAAEE2CAAIBAgQCA=="
)


@functools.lru_cache(maxsize=1)
def _glyphs() -> np.ndarray:
    columns = np.frombuffer(base64.b64decode(FONT), np.uint8).reshape(95, 5, 1)
    glyphs = columns >> np.arange(8, dtype=np.uint8) & 1
    return np.pad(glyphs.transpose(0, 2, 1).astype(bool), ((0, 0), (1, 0), (0, 1)))  # (95, 9, 6)


def draw_text(
    picture: np.ndarray,
    x: int,
    y: int,
    text: str,
    colour: tuple = (0, 0, 0),
    backing: tuple | None = None,
    size: int = 1,
) -> None:
    """Write a line into picture (H, W, 3), in place, from its top left corner x, y to the edge.

    A character is 6 x 9 pixels times `size`; an accent is left out, what is not ASCII then shows
    as "?".
    """
    ink = _ink(text).repeat(size, 0).repeat(size, 1)
    area = picture[y : y + len(ink), x : x + ink.shape[1]]
    if backing is not None:
        area[:] = backing
    area[ink[: area.shape[0], : area.shape[1]]] = colour


def _ink(text: str) -> np.ndarray:
    """Where a line of text is black: (9, 6 * characters)."""
    codes = []
    for character in unicodedata.normalize("NFD", text):
        if unicodedata.combining(character):
            continue
        codes.append(ord(character if " " <= character <= "~" else "?") - 32)
    return _glyphs()[np.array(codes, int)].transpose(1, 0, 2).reshape(9, -1)


def add_caption(picture: np.ndarray, lines: list[str]) -> np.ndarray:
    """The picture below lines of text, which are broken where they are too long."""
    width = picture.shape[1]
    broken = []
    for line in lines:
        broken += textwrap.wrap(line, max(1, (width - 4) // 6)) or [""]
    title = np.full((3 + 10 * len(broken), width, 3), DARK, np.uint8)
    for number, line in enumerate(broken):
        draw_text(title, 2, 2 + 10 * number, line, (255, 255, 255))
    return np.concatenate([title, picture])


# ------------------------------------------------------------------------------------------------
# Boxes
# ------------------------------------------------------------------------------------------------


def draw_boxes(
    frame: np.ndarray,
    boxes_norm: np.ndarray,
    texts: list[list[str]],
    colours: tuple | list[tuple],
) -> np.ndarray:
    """A copy of frame (H, W, 3) uint8 with boxes (K, 4) in [0, 1] and the lines of text of each.

    colours: one, or a list of K. Text is inside the picture, on a dark ground, and clear of earlier
    text and of small boxes where there is room: the same box twice, with true and with predicted
    labels, shows both. A small frame is enlarged as often as the text needs to be read.
    """
    scale = max(1, 240 // min(frame.shape[:2]))
    picture = frame.repeat(scale, 0).repeat(scale, 1)
    height, width = picture.shape[:2]
    size = max(1, min(height, width) // 300)  # of the text
    corners = np.asarray(boxes_norm, float).reshape(-1, 4) * (width, height, width, height)
    corners = np.rint(corners).clip(0, (width, height, width, height)).astype(int)
    if not isinstance(colours, list):
        colours = [colours] * len(corners)
    for box, colour in zip(corners, colours, strict=True):
        _draw_frame(picture, box, colour, max(1, min(height, width) // 200))
    labels = []
    for lines in texts:
        broken = []
        for text in lines:
            broken += textwrap.wrap(text, max(1, width // (6 * size)))
        labels.append(broken[: height // (9 * size)])
    taken = np.zeros((height, width), bool)  # where no text should go
    for (x1, y1, x2, y2), lines in zip(corners, labels, strict=True):
        area = (x2 - x1) * (y2 - y1)
        if area < 4 * _area(lines, size) and area < height * width / 4:
            taken[y1:y2, x1:x2] = True  # a label in it would hide the person
    for box, lines, colour in zip(corners, labels, colours, strict=True):
        _draw_label(picture, box, lines, colour, size, taken)
    return picture


def _draw_frame(picture: np.ndarray, box: np.ndarray, colour: tuple, line: int) -> None:
    x1, y1, x2, y2 = box
    picture[y1:y2, x1 : min(x1 + line, x2)] = colour
    picture[y1:y2, max(x2 - line, x1) : x2] = colour
    picture[y1 : min(y1 + line, y2), x1:x2] = colour
    picture[max(y2 - line, y1) : y2, x1:x2] = colour


def _area(lines: list[str], size: int) -> int:
    return 9 * size * len(lines) * 6 * size * max(map(len, lines), default=0)


def _draw_label(
    picture: np.ndarray, box: np.ndarray, lines: list[str], colour: tuple, size: int, taken
) -> None:
    """Above the box, else below it, else inside, else at the first free height; marked in taken."""
    x1, y1, _, y2 = box
    characters = max(map(len, lines), default=0)
    height, width = 9 * size * len(lines), 6 * size * characters
    bottom = len(picture) - height
    x = max(0, min(x1, picture.shape[1] - width))
    inside = y1 + max(1, min(picture.shape[:2]) // 200)
    places = []
    for y in (y1 - height, y2, inside, *range(0, bottom + 1, 9 * size)):
        if 0 <= y <= bottom:
            places.append(y)
    chosen = places[0]
    for y in places:
        if not taken[y : y + height, x : x + width].any():
            chosen = y
            break
    taken[chosen : chosen + height, x : x + width] = True
    for number, text in enumerate(lines):
        y = chosen + 9 * size * number
        draw_text(picture, x, y, text.ljust(characters), colour, DARK, size)


# ------------------------------------------------------------------------------------------------
# Curves
# ------------------------------------------------------------------------------------------------


def draw_curves(
    series: dict[str, tuple[list, list]], x_name: str = "", y_name: str = ""
) -> np.ndarray:
    """A picture (360, 640, 3) of curves, name: (x values, y values), with axes and a legend.

    Values that are not finite are left out.
    """
    height, width = 360, 640
    picture = np.full((height, width, 3), 255, np.uint8)
    points = []
    for x, y in series.values():
        both = np.array([x, y], float).reshape(2, -1)
        points.append(both[:, np.isfinite(both).all(0)])
    low, high = _limits(points)
    top = _draw_legend(picture, 64, list(series))
    plot = _Plot(picture, (64, top, width - 14, height - 38), low, high)
    plot.draw_axes(x_name, y_name)
    for number, values in enumerate(points):
        plot.draw_line(values, CURVES[number % len(CURVES)])
    return picture


def _limits(points: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest x and y, with a little room above and below."""
    every = np.concatenate([*points, np.zeros((2, 0))], axis=1)
    if not every.size:
        return np.zeros(2), np.ones(2)
    low, high = every.min(1), every.max(1)
    high = np.where(high > low, high, low + np.maximum(abs(low), 1))
    room = np.array([0, 0.04]) * (high - low)
    return low - room, high + room


def _draw_legend(picture: np.ndarray, left: int, names: list[str]) -> int:
    """The names of the curves, in as many lines as they need; -> the height below them."""
    x, top = left, 6
    for number, name in enumerate(names):
        colour = CURVES[number % len(CURVES)]
        if x > left and x + 6 * len(name) + 14 > picture.shape[1]:
            x, top = left, top + 11
        picture[top + 3 : top + 6, x : x + 10] = colour
        draw_text(picture, x + 14, top, name, colour)
        x += 6 * len(name) + 26
    return top + 17


class _Plot:
    """The area of a picture in which curves are drawn, and its scale."""

    def __init__(self, picture: np.ndarray, area: tuple, low: np.ndarray, high: np.ndarray):
        self.picture, self.low, self.high = picture, low, high
        self.left, self.top, self.right, self.bottom = area

    def pixels(self, values: np.ndarray) -> np.ndarray:
        """(2, n) data -> (n, 2) column and row."""
        share = (values.T - self.low) / (self.high - self.low)
        size = [self.right - self.left, self.top - self.bottom]
        return np.rint([self.left, self.bottom] + share * size).astype(int)

    def draw_axes(self, x_name: str, y_name: str) -> None:
        picture = self.picture
        for value in round_numbers(self.low[0], self.high[0], 6):
            x, _ = self.pixels(np.array([[value], [self.low[1]]]))[0]
            text = f"{value:.6g}"
            picture[self.top : self.bottom, x] = GRID
            x = min(x - 3 * len(text), picture.shape[1] - 6 * len(text))
            draw_text(picture, x, self.bottom + 5, text)
        for value in round_numbers(self.low[1], self.high[1], 6):
            _, y = self.pixels(np.array([[self.low[0]], [value]]))[0]
            text = f"{value:.4g}"
            picture[y, self.left : self.right] = GRID
            draw_text(picture, max(12, self.left - 4 - 6 * len(text)), y - 4, text)
        picture[self.top : self.bottom, self.left] = 90
        picture[self.bottom, self.left : self.right] = 90
        middle = (self.left + self.right) // 2
        draw_text(picture, middle - 3 * len(x_name), self.bottom + 18, x_name)
        middle = (self.top + self.bottom) // 2
        ink = np.rot90(_ink(y_name))  # read from below
        area = picture[max(0, middle - len(ink) // 2) :, 1:]
        area[: len(ink), : ink.shape[1]][ink[: len(area)]] = 0

    def draw_line(self, values: np.ndarray, colour: tuple) -> None:
        """Values (2, n); a few of them are marked."""
        path = self.pixels(values)
        for start, stop in zip(path[:-1], path[1:], strict=True):
            count = abs(stop - start).max() + 1
            x, y = np.rint(np.linspace(start, stop, count)).astype(int).T
            self.picture[y, x] = colour
            self.picture[y - 1, x] = colour
        if len(path) < 50:
            for x, y in path:
                self.picture[y - 2 : y + 2, x - 2 : x + 2] = colour


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def grid(pictures: list[np.ndarray]) -> np.ndarray:
    """One picture of several, row by row, about square."""
    columns, gap = math.ceil(math.sqrt(len(pictures))), 4
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(picture.shape[1] for picture in pictures) + gap
    heights = [max(picture.shape[0] for picture in row) + gap for row in rows]
    sheet = np.full((gap + sum(heights), gap + len(rows[0]) * width, 3), 60, np.uint8)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for number, picture in enumerate(row):
            left = gap + number * width
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        top += height
    return sheet


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """Write picture (H, W, 3) uint8 RGB. The file appears complete or not at all."""
    part = Path(f"{path}.part.png")  # av takes the coder by the suffix
    av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24").save(f"file:{part}")
    part.replace(path)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float | Fraction) -> None:
    """Encode frames (H, W, 3) uint8 RGB of one size as H.264 mp4; complete or not at all.

    Odd sides are padded by their edge: yuv420p has only even ones.
    """
    part, stream = Path(f"{path}.part"), None
    options = {"movflags": "faststart"}
    coding = {"crf": "20", "preset": "veryfast"}
    rate = Fraction(fps).limit_denominator(1001)
    try:
        with av.open(f"file:{part}", "w", format="mp4", options=options) as container:
            for picture in frames:
                height, width, _ = picture.shape
                edges = ((0, height % 2), (0, width % 2), (0, 0))
                picture = np.ascontiguousarray(np.pad(picture, edges, "edge"))
                if stream is None:
                    stream = container.add_stream("libx264", rate, options=coding)
                    stream.height, stream.width = picture.shape[:2]
                    stream.pix_fmt = "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            if stream is None:
                raise ValueError(f"{path}: no frames to write, expected at least one")
            container.mux(stream.encode(None))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
