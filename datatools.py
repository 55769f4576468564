"""The commands around the data, and pictures. `python data.py COMMAND` calls them.

    python data.py import SRC DST     own videos and labels -> annotations, a split, a recipe
    python data.py show RECIPE        a picture of annotated keyframes, before any training
    python data.py check RECIPE       every annotation and every video: what is missing or damaged
    python data.py prepare SRC DST    re-encode videos once, so that reading a clip costs a fraction

It stands beside data.py because nobody who learns the method, or copies the loader, needs it.
Pictures (boxes and text on frames, curves, png, mp4) need numpy and av only: hence the bitmap font.
"""
import argparse
import base64
import csv
import functools
import itertools
import math
import os
import random
import re
import signal
import struct
import sys
import time
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from xml.parsers import expat

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from data import (DecodeError, Task, Videos, _duration_sec, _lines, _number, _open, _video_stream,
                  decode_clip, list_videos, open_task, read_classes, read_clips, read_recipe,
                  read_tasks)


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
    "CEhUVFQkBD9EQCA8QEAgfBwgQCAcPEAwQDxEKBAoRBygoKB8RGRUTEQACDZBAAAAfwAAAEE2CAAIBAgQCA==")


@functools.lru_cache(maxsize=1)
def _glyphs() -> np.ndarray:
    columns = np.frombuffer(base64.b64decode(FONT), np.uint8).reshape(95, 5, 1)
    glyphs = columns >> np.arange(8, dtype=np.uint8) & 1
    return np.pad(glyphs.transpose(0, 2, 1).astype(bool), ((0, 0), (1, 0), (0, 1)))  # (95, 9, 6)


def draw_text(picture: np.ndarray, x: int, y: int, text: str, colour: tuple = (0, 0, 0),
              backing: tuple | None = None, size: int = 1) -> None:
    """Write a line into picture (H, W, 3), in place, from its top left corner x, y to the edge.

    A character is 6 x 9 pixels times `size`; what is not ASCII shows as "?".
    """
    codes = np.array([ord(c if " " <= c <= "~" else "?") - 32 for c in text], int)
    ink = _glyphs()[codes].transpose(1, 0, 2).reshape(9, -1).repeat(size, 0).repeat(size, 1)
    area = picture[y:y + len(ink), x:x + ink.shape[1]]
    if backing is not None:
        area[:] = backing
    area[ink[:area.shape[0], :area.shape[1]]] = colour


def draw_boxes(frame: np.ndarray, boxes_norm: np.ndarray, texts: list[list[str]],
               colours: tuple | list[tuple], scale: int = 0) -> np.ndarray:
    """A copy of frame (H, W, 3) uint8 with boxes (K, 4) in [0, 1] and the lines of text of each.

    colours: one, or a list of K. Text is inside the picture, on a dark ground, and clear of earlier
    text where there is room: the same box twice, with true and with predicted labels, shows both.
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
        picture[y1 + line:y1 + line + len(inside), x1 + line:x1 + line + inside.shape[1]] = inside
    taken = np.zeros((height, width), bool)
    for (x1, y1, _, y2), lines, colour in zip(corners, texts, colours, strict=True):
        lines = [text[:width // (6 * size)] for text in lines][:height // (9 * size)]
        h, w = 9 * size * len(lines), 6 * size * max(map(len, lines), default=0)
        x = max(0, min(x1, width - w))
        places = (y1 - h, y2, y1 + line, *range(0, height, 9 * size))
        places = [y for y in places if 0 <= y <= height - h]
        y = next((y for y in places if not taken[y:y + h, x:x + w].any()), places[0])
        taken[y:y + h, x:x + w] = True
        for i, text in enumerate(lines):
            text = text.ljust(w // (6 * size))
            draw_text(picture, x, y + 9 * size * i, text, colour, (25, 25, 25), size)
    return picture


def draw_curves(series: dict[str, tuple[list, list]], title: str = "", width: int = 640,
                height: int = 360) -> np.ndarray:
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
        picture[top + 3:top + 6, x:x + 10] = colour
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
            picture[y - 2:y + 2, x - 2:x + 2] = colour
    return picture


def grid(pictures: list[np.ndarray], columns: int = 0, gap: int = 4) -> np.ndarray:
    """One picture of several, row by row; columns 0: about square."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    width = max(p.shape[1] for p in pictures) + gap
    tops = np.cumsum([gap] + [max(p.shape[0] for p in row) + gap for row in rows])
    sheet = np.full((tops[-1], len(rows[0]) * width + gap, 3), 60, np.uint8)
    for top, row in zip(tops, rows):
        for j, picture in enumerate(row):
            left = gap + j * width
            sheet[top:top + picture.shape[0], left:left + picture.shape[1]] = picture
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
    part.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b""))
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
                    stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001),
                                                  options={"crf": "20", "preset": "veryfast"})
                    stream.height, stream.width = picture.shape[:2]
                    stream.pix_fmt = "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            if stream is None:
                raise ValueError(f"{path}: no frames to write, expected at least one")
            container.mux(stream.encode(None))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# check and prepare: every video of a recipe or a folder, once
# ------------------------------------------------------------------------------------------------

def _walk(work: Callable, items: list, workers: int) -> Iterator[tuple]:
    """(item, work(item) or the DecodeError it raised), in order, with progress on stderr."""
    def attempt(item):
        try:
            return work(item)
        except DecodeError as error:
            return error

    start, end = time.monotonic(), "\r" if sys.stderr.isatty() else "\n"
    with ThreadPoolExecutor(workers) as pool:  # threads will do: FFmpeg works outside the GIL
        for done, pair in enumerate(zip(items, pool.map(attempt, items)), 1):
            if end == "\r" or done % 100 == 0:
                left = (time.monotonic() - start) * (len(items) / done - 1)
                print(f"video {done} of {len(items)}, {left:.0f} s left ", file=sys.stderr,
                      end=end if done < len(items) else "\n")
            yield pair


def frame_times(path: str | Path, decode: bool = False) -> tuple[np.ndarray, float, int, int]:
    """Seconds at which each frame is shown, the end of the last one, upright width and height.

    Reads the whole file; decodes its first frame, or (`decode`) all. Raises DecodeError, also for
    frames that come out damaged and for a file that ends long before its header says.
    """
    try:
        with _open(path) as container:
            stream, _ = _video_stream(container, path)
            frame, damaged, number = None, 0, 0
            for number, frame in enumerate(container.decode(stream), 1):
                damaged += decode and frame.is_corrupt
                if not decode:
                    break
            if frame is None or damaged:
                raise DecodeError(f"{path}: {damaged} of {number} frames are damaged" if damaged
                                  else f"{path}: no frame could be decoded")
        with _open(path) as container:
            stream, _ = _video_stream(container, path)
            rate = stream.average_rate or stream.guessed_rate or 25
            shown = sorted({packet.pts for packet in container.demux(stream)
                            if packet.pts is not None and not packet.is_discard})
            start = stream.start_time or 0
            times = np.array([float((pts - start) * stream.time_base) for pts in shown])
            if container.format.name == "avi" or not shown:  # as in _read_from_start
                times = np.arange(max(len(shown), number)) / float(rate)
            promised = _duration_sec(container, stream)
        if times[-1] < 0.9 * promised - 1:
            raise DecodeError(f"{path}: breaks off at {times[-1]:.1f} of {promised:.1f} s")
        width, height = (frame.width, frame.height)[::-1 if frame.rotation // 90 % 2 else 1]
        return times, float(times[-1] + 1 / rate), width, height
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{path}: {error.strerror or error}") from error


def _splits(recipe: Path) -> list[tuple[Task, Path, str]]:
    tables = read_recipe(recipe)
    tasks = read_tasks(tables.get("task", []), str(recipe))
    return [(task, recipe.parent / tables.get("root", "."), split) for task in tasks
            for split in ("train", "val") if getattr(task, split)]


def check(recipe: Path, workers: int, quick: bool = False) -> bool:
    """Read every annotation and video of a recipe; print counts and what is missing or damaged."""
    wanted, problems = {}, []  # file -> times of its keyframes
    for task, root, split in _splits(recipe):
        try:
            dataset = open_task(replace(task, bad_share=1.0), root, split)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        print(f"{task.name} {split}: {len(dataset.classes)} classes, "
              + ", ".join(f"{count} {what}" for what, count in dataset.report.items() if count))
        problems += [f"{task.name} {split}: {video} is missing, wanted by {where}"
                     for video, where in dataset.missing.items()]
        for item in dataset.items:
            wanted.setdefault(item.path, []).append(item.time_sec)
    for path, found in _walk(lambda path: frame_times(path, not quick), list(wanted), workers):
        if isinstance(found, DecodeError):
            problems.append(str(found))
        elif outside := [t for t in wanted[path] if t < 0 or t >= found[1]]:  # nan, a clip: neither
            problems.append(f"{path}: {len(outside)} keyframes are outside its {found[1]:.3f} s, "
                            f"the first at {outside[0]:.3f} s")
    print(*problems, f"{len(wanted)} videos, {len(problems)} problems", sep="\n")
    return not problems


def prepare(source: Path, target: Path, short_side: int, keyframe_sec: float, workers: int) -> bool:
    """prepare_video for each video under source that target has not yet, in the same folders."""
    jobs: dict[Path, Path] = {}
    for name in sorted(list_videos(source)):
        path = (target / name).with_suffix(".mp4")
        if target.resolve() in (source / name).resolve().parents:
            continue
        if path in jobs:
            raise ValueError(f"{jobs[path]} and {source / name} both become {path}: rename one")
        jobs[path] = source / name
    if not jobs:
        raise ValueError(f"{source}: no videos there that are not in {target} already")
    todo = [(video, path) for path, video in jobs.items() if not path.exists()]
    work = functools.partial(prepare_video, short_side=short_side, keyframe_sec=keyframe_sec)
    damaged = [error for _, error in _walk(lambda job: work(*job), todo, workers) if error]
    before, after = (sum(path.stat().st_size for path in paths if path.exists()) / 1e6
                     for paths in (jobs.values(), jobs))
    print(*damaged, f"{len(jobs)} videos: {len(todo) - len(damaged)} prepared, "
          f"{len(jobs) - len(todo)} were there, {len(damaged)} damaged; {before:.1f} MB -> "
          f"{after:.1f} MB", sep="\n")
    return not damaged


def prepare_video(source: Path, target: Path, short_side: int = 320,
                  keyframe_sec: float = 1.0) -> None:
    """Re-encode as H.264 mp4, short side at most short_side px, a key frame every keyframe_sec.

    Each frame keeps its time to the tick, the first its offset, the stream its rotation mark, so
    that decode_clip gives the same frames for the same times. Sound is dropped. Raises DecodeError;
    target appears complete or not at all.
    """
    part, scaler = target.with_name(f"{target.name}.part"), VideoReformatter()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _open(source) as container:
            stream, _ = _video_stream(container, source)
            rate = stream.average_rate or stream.guessed_rate or 25
            base, start = stream.time_base, stream.start_time or 0
            # The header counts a late start in movie_timescale, by default only milliseconds.
            options = {"movflags": "faststart", "movie_timescale": str(base.denominator)}
            with av.open(str(part), "w", format="mp4", options=options) as output:
                encoder, now, key = None, start, start
                for number, frame in enumerate(container.decode(stream)):
                    if encoder is None:
                        encoder = output.add_stream("libx264", rate=rate,
                                                    options={"preset": "fast", "crf": "20"})
                        scale = min(1.0, short_side / min(frame.width, frame.height))
                        encoder.width = 2 * max(round(frame.width * scale / 2), 1)  # yuv420p: even
                        encoder.height = 2 * max(round(frame.height * scale / 2), 1)
                        encoder.pix_fmt, encoder.codec_context.time_base = "yuv420p", base
                        encoder.codec_context.colorspace = frame.colorspace
                        encoder.codec_context.color_range = frame.color_range
                        encoder.codec_context.thread_count = 1
                        if frame.rotation:
                            encoder.set_display_rotation(frame.rotation)
                    # As in _read_from_start; and the first frame is held from the start on.
                    counted = container.format.name == "avi" or frame.pts is None
                    tick = start + round(number / rate / base) if counted else frame.pts
                    now = max(tick, now + 1) if number else start
                    due = not number or (now - key) * base >= keyframe_sec
                    key = now if due else key
                    frame = scaler.reformat(frame, encoder.width, encoder.height, "yuv420p",
                                            threads=1)
                    frame.pts, frame.time_base = now, base
                    frame.pict_type = PictureType.I if due else PictureType.NONE
                    output.mux(encoder.encode(frame))
                if encoder is None:
                    raise DecodeError(f"{source}: no frame could be decoded")
                output.mux(encoder.encode(None))
        part.replace(target)
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{source}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# import and show: own videos and labels -> annotations, a split by video, a recipe, a picture
# ------------------------------------------------------------------------------------------------

@dataclass
class Mark:
    """An action of a person at a time or, without box, of a clip, as the user's file states it."""
    where: str                               # file:line
    video: str                               # as written there
    label: str                               # "": a person without action
    time_sec: float = math.nan               # from the first frame of the video
    box: Sequence[float] = ()                # x1, y1, x2, y2
    size: tuple[float, float] | None = None  # in which the box is measured; None: px of the video
    person: str = ""


def _own_rows(path: Path, unit: str) -> Iterator[Mark]:
    """A csv with the header video,time_sec,x1,y1,x2,y2,label[,person]; boxes in "norm" or "px"."""
    columns = ["video", "time_sec", "x1", "y1", "x2", "y2", "label"]
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}:1: no column {', '.join(missing)}, expected the header "
                             f"{','.join(columns)}[,person]")
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if None in row:
                raise ValueError(f"{where}: {len(row[None])} columns more than the header has; a "
                                 f'label with a comma stands in "..."')
            row = {column: (row[column] or "").strip() for column in rows.fieldnames}
            try:
                time_sec, *box = (_number(row[column]) for column in columns[1:6])
            except ValueError as error:
                raise ValueError(f"{where}: {error}, expected numbers in {', '.join(columns[1:6])}"
                                 ) from None
            yield Mark(where, row["video"], row["label"], time_sec, box,
                       (1, 1) if unit == "norm" else None, row.get("person", ""))


def _ava_rows(path: Path, names: dict[int, str]) -> Iterator[Mark]:
    """AVA csv; an action id becomes its name in the action list, if there is one."""
    for where, line in _lines(path):
        row = [column.strip() for column in line.split(",")]
        try:
            if len(row) not in (7, 8):
                raise ValueError(f"{len(row)} columns instead of 7 or 8")
            (time_sec, *box), label = map(_number, row[1:6]), int(row[6] or -1)
        except ValueError as error:
            raise ValueError(f"{where}: {error}: {line}") from None
        name = names.get(label, f"action {label}") if label != -1 else ""
        yield Mark(where, row[0], name, time_sec, box, (1, 1), "".join(row[7:]))


def _cvat_tracks(path: Path) -> Iterator[tuple]:
    """(video, its size as annotated, label, boxes by frame) of the tracks of CVAT for video 1.1."""
    sources, tracks, stack, text = {}, [], [], []
    parser = expat.ParserCreate()  # elements of ElementTree do not know their lines

    def start(tag: str, values: dict[str, str]) -> None:
        if tag == "image":
            raise ValueError(f"{path}:{parser.CurrentLineNumber}: an <image>, so this is CVAT for "
                             "images; expected the <track>s of an export as CVAT for video 1.1")
        if tag == "track":
            tracks.append((values, []))
        elif tag == "box" and stack[-1:] == ["track"]:
            where = f"{path}:{parser.CurrentLineNumber}"
            tracks[-1][1].append(values | {"where": where, "actions": []})
        elif tag == "attribute" and stack[-1:] == ["box"]:
            tracks[-1][1][-1]["actions"].append([values.get("name", ""), ""])
        stack.append(tag)
        text.clear()

    def end(tag: str) -> None:
        stack.pop()
        value, parent = "".join(text).strip(), stack[-1] if stack else ""
        text.clear()
        if tag == "attribute" and parent == "box":
            tracks[-1][1][-1]["actions"][-1][1] = value
        elif tag == "id" and parent in ("task", "job"):
            sources[value] = {}
        elif tag in ("source", "width", "height") and "meta" in stack:
            sources.setdefault(next(reversed(sources), ""), {})[tag] = value  # of the last id

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f"{path}: not XML: {error}") from None
    for track, boxes in tracks:
        source = sources.get(track.get("task_id"), next(reversed(sources.values()), {}))
        size = (float(source["width"]), float(source["height"])) if "width" in source else None
        for box in boxes:
            try:
                box["frame"] = int(box["frame"])
                x1, y1, x2, y2 = (_number(box[x]) for x in ("xtl", "ytl", "xbr", "ybr"))
                turn = math.radians(_number(box.get("rotation", "0")))  # about its centre
                turn = np.abs([[math.cos(turn), math.sin(turn)], [math.sin(turn), math.cos(turn)]])
                centre, half = np.array([x1 + x2, y1 + y2]) / 2, turn @ [x2 - x1, y2 - y1] / 2
                box["corners"] = np.concatenate([centre - half, centre + half])
            except (KeyError, ValueError) as error:
                raise ValueError(f"{box['where']}: {error} in a <box>, expected frame, xtl, ytl, "
                                 "xbr and ybr") from None
        yield (source.get("source", path.stem), size, track.get("label", ""),
               sorted(boxes, key=lambda box: box["frame"]))


def _cvat_rows(path: Path, every_sec: float, attributes: Sequence[str],
               videos: Videos) -> Iterator[Mark]:
    """CVAT's tracks at a keyframe every every_sec of the video, or (0) at each frame with a box.

    Between two boxes CVAT interpolates. The actions of a box are its attributes (or those among
    `attributes`): a ticked checkbox by its name, another value, unless "" or "none", by itself; a
    box without attributes has the label of its track.
    """
    for number, (video, size, label, boxes) in enumerate(_cvat_tracks(path)):
        frames, found, used = [box["frame"] for box in boxes], _look(videos, video)[1], 0
        times, grid = (), frames
        if not isinstance(found, str):
            times = found[0]
            if every_sec:
                ticks = np.arange(0, times[-1], every_sec) + 1e-6
                grid = np.unique(np.searchsorted(times, ticks, "right") - 1)
        for frame in grid:
            i = bisect_right(frames, frame) - 1
            if not frames or i < 0 or frame > frames[-1] or boxes[i].get("outside") == "1":
                continue
            corners, used = boxes[i]["corners"], used + 1
            if frame > frames[i] and boxes[i + 1].get("outside") != "1":
                share = (frame - frames[i]) / (frames[i + 1] - frames[i])
                corners = corners + share * (boxes[i + 1]["corners"] - corners)
            actions = [name if value == "true" else value for name, value in boxes[i]["actions"]
                       if name in (attributes or [name])
                       and value.casefold() not in ("", "false", "none", "__undefined__")]
            time_sec = times[frame] if 0 <= frame < len(times) else math.inf
            for action in actions or ["" if boxes[i]["actions"] else label]:
                yield Mark(boxes[i]["where"], video, action, time_sec, corners, size, str(number))
        if boxes and not used:
            yield Mark(boxes[0]["where"], video, "", math.nan, boxes[0]["corners"], size)


@functools.lru_cache(maxsize=None)
def _look(videos: Videos, name: str) -> tuple[str, tuple | str]:
    """The stem of the video that a file calls `name`; its frame_times, or what is wrong with it."""
    stem = name if name in videos.stems else Path(name).stem
    files = videos.stems.get(stem, [])
    if len(files) != 1:
        return stem, f"{len(files)} videos are called {stem!r} in {videos.folder}, expected one"
    if "," in stem:
        return stem, f"AVA csv cannot hold the comma in the name of {files[0]!r}: rename it"
    try:
        return stem, frame_times(os.path.join(videos.folder, files[0]))
    except DecodeError as error:
        return stem, f"damaged video {error}"


def _fit(mark: Mark, videos: Videos) -> str:
    """Name the mark's video by its stem and put its box into [0, 1]; -> what is wrong with it.

    A mark that cannot be used is left without box.
    """
    box, mark.box = np.asarray(mark.box), ()
    mark.video, found = _look(videos, mark.video)
    if isinstance(found, str):
        return found
    _, end, *pixels = found
    if math.isnan(mark.time_sec):
        return "no keyframe falls on this track, a smaller --every-sec would find one"
    if not 0 <= mark.time_sec < end:
        return f"time {mark.time_sec:g} s is not within the {end:.3f} s of {mark.video}"
    size = mark.size or tuple(pixels)
    norm = box / [*size, *size]
    inside = norm.clip(0, 1)
    stated = f"box {box.round(3).tolist()} in a picture of {size[0]:g} x {size[1]:g}"
    if ((inside[2:] - inside[:2]) * pixels < 1).any():
        return f"{stated} shows less than a pixel, left out"
    mark.box = inside.tolist()
    return f"{stated} reaches over the edge, cut off" if abs(inside - norm).max() > 0.01 else ""


def _one_spelling(marks: list[Mark], problems: list[str]) -> dict[str, str]:
    """Where classes differ in case, blanks, - or _, keep the commonest; -> class: first file:line.
    """
    spellings: dict[str, dict[str, list[Mark]]] = {}
    for mark in marks:
        plain = re.sub(r"[\s_-]+", " ", mark.label.casefold()).strip() or mark.label
        spellings.setdefault(plain, {}).setdefault(mark.label, []).append(mark)
    classes = {}
    for same in spellings.values():
        best = max(same, key=lambda label: len(same[label]))
        problems += [f"{found[0].where}: {label!r} ({len(found)} rows) is taken as {best!r}"
                     for label, found in same.items() if label != best]
        for mark in itertools.chain(*same.values()):
            mark.label = best.replace('"', "'")  # an action list puts them in "
            classes.setdefault(mark.label, mark.where)
    classes.pop("", None)
    return dict(sorted(classes.items(), key=lambda item: item[0].casefold()))


def split_videos(classes_of: dict[str, set[str]], share: float, seed: int) -> set[str]:
    """About `share` of the videos, for validation.

    Drawn so that a class of two or more videos is in both parts where that can be, and a class of
    one video is trained.
    """
    order = sorted(classes_of)
    random.Random(seed).shuffle(order)
    left = Counter(name for names in classes_of.values() for name in names)  # training videos
    wanted, chosen = {name for name in left if left[name] > 1}, set()
    rarest = sorted(wanted, key=lambda name: (left[name], name))
    for name in [*rarest, *[""] * len(order)]:  # first what each class needs, then any
        if name == "" and len(chosen) >= max(1, round(share * len(order))):
            break
        if name and name not in wanted:
            continue
        free = [video for video in order if video not in chosen
                and (not name or name in classes_of[video])
                and all(left[other] > 1 for other in classes_of[video])]
        if free:
            best = max(free, key=lambda video: len(classes_of[video] & wanted))
            chosen.add(best)
            left.subtract(classes_of[best])
            wanted -= classes_of[best]
    return chosen or set(order[:1])


RECIPE = """\
root = "."                  # of the paths below; itself relative to this file
out = "runs/{name}"
steps = {steps}                 # {passes} passes over {items} training items
optimiser = "adamw"
lr = 0.0005
weight_decay = 0.05
warmup = {warmup}
# init = "checkpoint.pth"   # pretrained weights, best for few videos; then lr = 0.0001,
                            # layer_decay = 0.75 and the frames and stride of those weights
[model]
arch = "S"                  # tiny, small, S, B, L, H
frames = 16

[[task]]
name = "{name}"
kind = "{kind}"
train = "train.{suffix}"
val = "val.{suffix}"
labels = "actions.pbtxt"
videos = "{videos}"
{val_boxes}
frames = 16                 # of a clip,
stride = 4                  # in 1/25 s: 2.56 s around a keyframe
flip = {flip}                  # 0.0 where left and right matter
batch = 8

# Further tables train with this one, each with its own head: co-finetuning. For instance
# [[task]]
# name = "kinetics400"
# kind = "clip"
# train = "kinetics400/train.csv"   # or a list of `path label`, or a folder per class
# val = "kinetics400/val.csv"
# videos = "kinetics400/videos"
# frames = 16
# stride = 4
"""


def import_labels(source: Path, target: Path, annotations: Path | None = None, unit: str = "norm",
                  val_share: float = 0.2, seed: int = 0, every_sec: float = 1.0,
                  attributes: Sequence[str] = ()) -> None:
    """Write annotations, action list, problems.txt and recipe.toml into target; read source only.

    source holds videos, at any depth, and annotations, unless they are given. What is
    doubtful is printed with file and line, what is unusable left out. An existing recipe is kept.
    """
    videos, marks, problems = Videos(str(source)), [], []
    if not videos.stems:
        raise ValueError(f"{source}: no video there, expected files like *.mp4, *.mkv or *.webm")
    if source.resolve() == target.resolve():
        raise ValueError(f"{target}: the folder to write, expected another than that of the videos")
    there = sorted(source.iterdir())
    tables, lists = ([p for p in there if p.suffix.lower() in suffixes]
                     for suffixes in ((".csv", ".xml"), (".txt",)))
    for path in [annotations] if annotations else tables or lists or [source]:
        try:
            if path.is_file() and path.suffix.lower() != ".xml":  # which states its encoding
                path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8") from None
        first = [] if path.is_dir() else next(_lines(path), ("", ""))[1].split(",")
        if path.suffix.lower() == ".xml":
            marks += _cvat_rows(path, every_sec, attributes, videos)
        elif "video" in first or "time_sec" in first:
            marks += _own_rows(path, unit)
        elif len(first) in (7, 8):
            actions = [p for p in there if p.suffix == ".pbtxt"]
            marks += _ava_rows(path, read_classes(actions[0]) if actions else {})
        else:
            marks += [Mark(where, file and os.path.relpath(source / file, source), label)
                      for where, label, _, file in read_clips(str(path), videos, "train")]
    clips = all(not len(mark.box) for mark in marks)
    classes = _one_spelling(marks, problems)
    ids, persons, rows = {name: number for number, name in enumerate(classes, 1)}, {}, {}
    for mark in marks:
        wrong = _fit(mark, videos) if len(mark.box) else "" if mark.video else "no such video"
        problems += [f"{mark.where}: {wrong}"] if wrong else []
        if clips and mark.video:
            rows[f"{mark.video} {ids[mark.label]}\n"] = mark
        elif len(mark.box):
            row = [mark.video, *(f"{x:.6f}" for x in (mark.time_sec, *mark.box))]
            row.append(str(ids.get(mark.label, -1)))
            if mark.person:  # AVA's are whole numbers
                row.append(str(persons.setdefault((mark.video, mark.person), len(persons))))
            rows[",".join(row) + "\n"] = mark
    if len(rows) <= len(marks) / 2:
        raise ValueError("; ".join([f"{len(rows)} of {len(marks)} rows can be used"
                                    + f", with --boxes {unit}" * (not clips), *problems[:3]]))

    of_video: dict[str, list[Mark]] = {}
    for mark in rows.values():
        of_video.setdefault(mark.video, []).append(mark)
    names_of = {video: {mark.label for mark in found} - {""} for video, found in of_video.items()}
    validation = split_videos(names_of, val_share, seed)
    train, val = ({row: mark for row, mark in rows.items() if (mark.video in validation) is part}
                  for part in (False, True))
    if not train:
        raise ValueError(f"{source}: {len(of_video)} videos with labels, expected two or more: one "
                         "to train and one to validate")
    counts = [Counter(mark.label for mark in part.values()) for part in (train, val)]
    problems += [f"{where}: {name!r} is only in {'val' if counts[1][name] else 'train'}, "
                 f"{sum(name in names for names in names_of.values())} videos have it"
                 for name, where in classes.items() if not (counts[0][name] and counts[1][name])]
    # Evaluation has no annotated person without action: val.csv gets only their keyframes, and
    # val_boxes.csv all persons, which are then predicted like detected ones.
    idle = {row for row, mark in val.items() if not mark.label}
    suffix = "txt" if clips else "csv"
    items = len({(mark.video, str(mark.time_sec)) for mark in train.values()})
    actions = [f'label {{ name: "{name}" label_id: {number} }}\n' for name, number in ids.items()]
    texts = {"actions.pbtxt": actions, "problems.txt": [f"{problem}\n" for problem in problems],
             f"train.{suffix}": sorted(train),
             f"val.{suffix}": sorted({",".join(row.split(",")[:2]) + "\n" if row in idle else row
                                      for row in val})}
    if idle:
        texts["val_boxes.csv"] = sorted({",".join(row.split(",")[:6]) + ",,1\n" for row in val})
    recipe, steps = target / "recipe.toml", max(200, 30 * items // 8)
    if not (kept := recipe.exists()):
        mirrored = re.search(r"(?<![a-z])(left|right)(?![a-z])", " ".join(ids).casefold())
        texts["recipe.toml"] = [RECIPE.format(
            name=re.sub(r"\W+", "-", target.resolve().name), kind="clip" if clips else "box",
            items=items, steps=steps, passes=steps * 8 // items, warmup=steps // 20, suffix=suffix,
            videos=Path(os.path.relpath(source, target)).as_posix(), flip=0.0 if mirrored else 0.5,
            val_boxes='val_boxes = "val_boxes.csv" # all annotated persons, also without action'
            if idle else '# val_boxes = "boxes.csv"   # detected persons to evaluate on')]
    if annotations and annotations.resolve() in [(target / name).resolve() for name in texts]:
        raise ValueError(f"{annotations} would be overwritten: take another folder than {target}")
    target.mkdir(parents=True, exist_ok=True)
    for name, lines in texts.items():
        (target / name).write_text("".join(lines), encoding="utf-8")
    for task, root, part in _splits(recipe):  # read what was written as training will
        open_task(task, root, part)

    print(f"{'class':32} {'id':>4} {'train':>9} {'val':>6}  {'clips' if clips else 'boxes'}")
    for name, number in ids.items():
        print(f"{name[:32]:32} {number:4} {counts[0][name]:9} {counts[1][name]:6}")
    for video, found in sorted(of_video.items()) if not clips else ():
        if video == min(of_video):
            print(f"\n{'video':32} {'part':>4} {'keyframes':>9} {'boxes':>6}")
        keys, boxes = {m.time_sec for m in found}, {(m.time_sec, *m.box) for m in found}
        part = "val" if video in validation else ""
        print(f"{video[:32]:32} {part:>4} {len(keys):9} {len(boxes):6}")
    print(*(f"problem: {problem}" for problem in problems[:30]),
          f"{len(of_video) - len(validation)} videos to train, {len(validation)} to validate; "
          f"{len(problems)} problems, all in {target / 'problems.txt'}; "
          f"{recipe} {'was there and is kept' if kept else 'is ready'}", sep="\n")


def show(recipe: Path, out: Path, count: int) -> None:
    """A picture of some keyframes (middles of clips) of every task, read as training reads them."""
    pictures = []
    for task, root, split in _splits(recipe):
        dataset = open_task(task, root, split)
        for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
            item = dataset.items[index]
            names = [[dataset.classes[c] for c in row.nonzero()[0]] or ["-"] for row in item.labels]
            boxes, times, text = item.boxes, [item.time_sec], f"{item.time_sec:.3f} s"
            if task.kind == "clip":
                boxes, names = [[0, 0, 1, 1]], [[dataset.classes[item.label]]]
                times, text = (lambda duration_sec: [duration_sec / 2]), ""
            try:
                frame = decode_clip(item.path, times, short_side=240)[0]
            except DecodeError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            caption = np.full((12, frame.shape[1], 3), 25, np.uint8)
            draw_text(caption, 2, 1, f"{split} {Path(item.path).stem} {text}", (255, 255, 255))
            pictures.append(np.concatenate([caption, draw_boxes(frame, boxes, names, GREEN)]))
    if not pictures:
        raise ValueError(f"{recipe}: no video of it can be decoded")
    write_png(out, grid(pictures))
    print(f"{len(pictures)} pictures in {out}")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data.py", description="Tools for videos and labels.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="own videos and labels -> a recipe").add_argument
    add("source", type=Path, help="videos, with csv, CVAT xml or lists, or in a folder per class")
    add("target", type=Path, help="folder to write")
    add("--annotations", type=Path, help="file, if not in source")
    add("--boxes", dest="unit", choices=["norm", "px"], default="norm", help="of a csv with header")
    add("--val-share", type=float, default=0.2, help="share of the videos to validate on")
    add("--seed", type=int, default=0, help="of the split")
    add("--every-sec", type=float, default=1.0, help="CVAT: between keyframes; 0: every box")
    add("--attribute", dest="attributes", action="append", default=[],
        help="CVAT: only this attribute is an action; can be repeated")
    add = commands.add_parser("show", help="a picture of annotated keyframes").add_argument
    add("recipe", type=Path)
    add("--out", type=Path, default=Path("show.png"))
    add("--count", type=int, default=12, help="keyframes of each part of each task")
    add = commands.add_parser("check", help="read every video of a recipe").add_argument
    add("recipe", type=Path)
    add("--quick", action="store_true", help="decode only the first frame of each video")
    add("--workers", type=int, default=os.cpu_count())
    add = commands.add_parser("prepare", help="re-encode videos for quick reading").add_argument
    add("source", type=Path)
    add("target", type=Path)
    add("--short-side", type=int, default=320, help="px; smaller videos keep their size")
    add("--keyframe-sec", type=float, default=1.0)
    add("--workers", type=int, default=os.cpu_count())
    options = vars(parser.parse_args(arguments))
    command = {"import": import_labels, "show": show, "check": check, "prepare": prepare}
    try:
        for key in ("count", "workers", "short_side"):
            if options.get(key, 1) < 1:
                raise ValueError(f"--{key.replace('_', '-')} {options[key]}, expected 1 or more")
        return 1 if command[options.pop("command")](**options) is False else 0
    except (ValueError, OSError, csv.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on or starts again", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
