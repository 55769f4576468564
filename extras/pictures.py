"""Pictures without a drawing library: boxes and text on frames, curves, png, mp4. numpy and av."""

import base64
import functools
import itertools
import math
import struct
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# ------------------------------------------------------------------------------------------------
# Pictures: boxes on frames, curves, png and mp4
# ------------------------------------------------------------------------------------------------

GREEN, AMBER = (90, 220, 120), (255, 190, 60)
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

    A character is 6 x 9 pixels times `size`; what is not ASCII shows as "?".
    """
    codes = np.array([ord(c if " " <= c <= "~" else "?") - 32 for c in text], int)
    ink = _glyphs()[codes].transpose(1, 0, 2).reshape(9, -1).repeat(size, 0).repeat(size, 1)
    area = picture[y : y + len(ink), x : x + ink.shape[1]]
    if backing is not None:
        area[:] = backing
    area[ink[: area.shape[0], : area.shape[1]]] = colour


def draw_boxes(
    frame: np.ndarray,
    boxes_norm: np.ndarray,
    texts: list[list[str]],
    colours: tuple | list[tuple],
    scale: int = 0,
) -> np.ndarray:
    """A copy of frame (H, W, 3) uint8 with boxes (K, 4) in [0, 1] and the lines of text of each.

    colours: one, or a list of K. Text is inside the picture, on a dark ground, and clear of earlier
    text and of small boxes where there is room: the same box twice, with true and with predicted
    labels, shows both.
    The picture is enlarged `scale` times; 0: as often as a small frame needs to be read.
    """
    scale = scale or max(1, 240 // min(frame.shape[:2]))
    picture = frame.repeat(scale, 0).repeat(scale, 1)
    height, width = picture.shape[:2]
    size, line = max(1, min(height, width) // 300), max(1, min(height, width) // 200)
    corners = np.asarray(boxes_norm, float).reshape(-1, 4) * (width, height, width, height)
    corners = np.rint(corners).clip(0, (width, height, width, height)).astype(int)
    if not isinstance(colours, list):
        colours = [colours] * len(corners)
    for (x1, y1, x2, y2), colour in zip(corners, colours, strict=True):
        inside = picture[y1:y2, x1:x2][line:-line, line:-line].copy()
        picture[y1:y2, x1:x2] = colour
        picture[y1 + line : y1 + line + len(inside), x1 + line : x1 + line + inside.shape[1]] = (
            inside
        )
    taken, labels = np.zeros((height, width), bool), []
    for (x1, y1, x2, y2), lines in zip(corners, texts, strict=True):
        lines = [text[: width // (6 * size)] for text in lines][: height // (9 * size)]
        h, w = 9 * size * len(lines), 6 * size * max(map(len, lines), default=0)
        labels.append((lines, h, w))
        area = (x2 - x1) * (y2 - y1)
        if area < 4 * h * w and area < height * width / 4:  # a label in it would hide the person
            taken[y1:y2, x1:x2] = True
    for (x1, y1, _, y2), (lines, h, w), colour in zip(corners, labels, colours, strict=True):
        x = max(0, min(x1, width - w))
        places = (y1 - h, y2, y1 + line, *range(0, height, 9 * size))
        places = [y for y in places if 0 <= y <= height - h]
        y = next((y for y in places if not taken[y : y + h, x : x + w].any()), places[0])
        taken[y : y + h, x : x + w] = True
        for i, text in enumerate(lines):
            text = text.ljust(w // (6 * size))
            draw_text(picture, x, y + 9 * size * i, text, colour, (25, 25, 25), size)
    return picture


def draw_curves(
    series: dict[str, tuple[list, list]], title: str = "", width: int = 640, height: int = 360
) -> np.ndarray:
    """A picture (height, width, 3) of curves, name: (x values, y values), with axes and a legend.

    Values that are not finite are left out.
    """
    picture = np.full((height, width, 3), 255, np.uint8)
    left, right, top, bottom = 56, width - 14, 6, height - 26
    draw_text(picture, left, top, title)
    x = left + 6 * len(title) + 12 * bool(title)
    for name, colour in zip(series, itertools.cycle(CURVES)):  # the legend follows the title
        if x + 6 * len(name) + 14 > width:
            x, top = left, top + 11
        picture[top + 3 : top + 6, x : x + 10] = colour
        draw_text(picture, x + 14, top, name, colour)
        x += 6 * len(name) + 26
    top += 17
    points = [np.array([x, y], float).reshape(2, -1) for x, y in series.values()]
    points = [p[:, np.isfinite(p).all(0)] for p in points]
    every = np.concatenate([*points, np.zeros((2, 0))], axis=1)
    low, high = (every.min(1), every.max(1)) if every.size else np.array([[0, 0], [1, 1]])
    high = np.where(high > low, high, low + np.maximum(abs(low), 1))
    margin = np.array([0, 0.04]) * (high - low)
    low, high = low - margin, high + margin

    def pixels(values: np.ndarray) -> np.ndarray:  # (2, n) data -> (n, 2) column and row
        share = (values.T - low) / (high - low)
        return np.rint([left, bottom] + share * [right - left, top - bottom]).astype(int)

    for axis in (0, 1):
        step = 10.0 ** math.floor(math.log10((high[axis] - low[axis]) / 6))
        step *= next(m for m in (1, 2, 5, 10) if (high[axis] - low[axis]) / (m * step) <= 6)
        for i in range(math.ceil(low[axis] / step), math.floor(high[axis] / step) + 1):
            label = f"{i * step:.4g}"
            x, y = pixels(np.where(np.arange(2) == axis, i * step, low)[:, None])[0]
            if axis == 0:
                picture[top:bottom, x] = 232
                x = min(x - 3 * len(label), width - 6 * len(label))
                draw_text(picture, x, bottom + 5, label)
            else:
                picture[y, left:right] = 232
                draw_text(picture, max(0, left - 4 - 6 * len(label)), y - 4, label)
    picture[top:bottom, left] = picture[bottom, left:right] = 90
    for values, colour in zip(points, itertools.cycle(CURVES)):
        path = pixels(values)
        for start, stop in zip(path, path[1:]):
            x, y = np.rint(np.linspace(start, stop, abs(stop - start).max() + 1)).astype(int).T
            picture[y, x] = picture[y - 1, x] = colour
        for x, y in path if len(path) < 50 else ():
            picture[y - 2 : y + 2, x - 2 : x + 2] = colour
    return picture


def grid(pictures: list[np.ndarray], columns: int = 0, gap: int = 4) -> np.ndarray:
    """One picture of several, row by row; columns 0: about square."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(p.shape[1] for p in pictures) + gap
    tops = np.cumsum([gap] + [max(p.shape[0] for p in row) + gap for row in rows])
    sheet = np.full((tops[-1], len(rows[0]) * width + gap, 3), 60, np.uint8)
    for top, row in zip(tops, rows):
        for j, picture in enumerate(row):
            left = gap + j * width
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """Write picture (H, W, 3) uint8 RGB. The file appears complete or not at all."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        body = kind + body
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    height, width = picture.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    rows = np.pad(picture.reshape(height, -1), [(0, 0), (1, 0)])  # a row begins with 0: no filter
    part = Path(f"{path}.part")
    part.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows.tobytes()))
        + chunk(b"IEND", b"")
    )
    part.replace(path)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float | Fraction) -> None:
    """Encode frames (H, W, 3) uint8 RGB of one size as H.264 mp4; complete or not at all.

    Odd sides are padded by their edge: yuv420p has only even ones.
    """
    part, stream = Path(f"{path}.part"), None
    try:
        with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container:
            for picture in frames:
                odd = [(0, side % 2) for side in picture.shape[:2]]
                picture = np.ascontiguousarray(np.pad(picture, [*odd, (0, 0)], "edge"))
                if stream is None:
                    stream = container.add_stream(
                        "libx264",
                        Fraction(fps).limit_denominator(1001),
                        options={"crf": "20", "preset": "veryfast"},
                    )
                    stream.height, stream.width = picture.shape[:2]
                    stream.pix_fmt = "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            if stream is None:
                raise ValueError(f"{path}: no frames to write, expected at least one")
            container.mux(stream.encode(None))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
