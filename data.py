"""Video files and their annotations -> clips -> one stream of batches from many datasets.

Copy me alone: torch, numpy and av (>= 18) are all I import. The decoder (`decode_clip`) needs numpy and av only.

**The clock.** Frame k of a clip is the frame on screen at `centre + (k - T/2) * stride / fps` seconds, so the keyframe
is frame T/2 and a 12 fps, a 29.97 fps and a variable-rate video give clips of the same duration. Times count from the
first frame of the file; before the first and after the last frame the nearest frame is held. Annotations carry the
time in the ORIGINAL movie: AVA's "0902" is 902 s into the full movie, 2 s into a 15-minute cut (`offset_sec = 900`),
and AVA-Kinetics' "17.010000" is 7.01 s into the clip `ID_000010_000020.mp4`.

**Formats**, as they lie on people's disks (the kind is seen from the file, nothing is converted).
Box tasks, csv without header: AVA, AVA-Kinetics (both can be one file: `cat`), and own data. Boxes are x1,y1,x2,y2 in
[0,1]; a box with several actions has several rows; a row of two columns is a keyframe with nobody in it:
    1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,12,1              video, second, box, action id, person id (may be absent)
    00g-inkLork,5.016949                                       AVA-Kinetics: looked at, no action
    1j20qq1JyX4,0902,0.036,0.098,0.550,0.979,,0.995518         detected persons: action empty or -1, then a SCORE
    _-Z6wFjXtGQ,0902                                           exclusion list
    label { name: "sit"  label_id: 11  label_type: ... }       action list; also  item { name: "sit"  id: 11 }
A movie is any video file under `videos` whose stem is the id; else a clip `ID_START_END` that contains the second.
Clip tasks:
    label,youtube_id,time_start,time_end,split                 Kinetics: header, then  abseiling,0wR5jVB-WPk,417,427,val
    air drumming/x y.mp4 3                                     list: path, number or name (last blank, comma or tab)
    adult+female+singing/0P3XG_vf91c_35.mp4,adult+...,4,0      Moments in Time: class = folder; labels: `name,index`
    [{"id": "78687", "template": "Holding [something]"}]       Something-Something v2; labels: {"Holding something": "0"}
    ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1              UCF101, test lists without number; labels: `1 ApplyEyeMakeup`
    splits/*_test_split1.txt                                   HMDB51: a pattern; rows `file.avi 1` (1 train, 2 test, 0 unused)
    videos/train/                                              a folder per class

**Everything is a pure function of (seed, step)**: which task a step trains, which clips are in it, how they are
cropped. To resume is to start at a step; the number of workers and of processes does not matter.

Shapes: `B` clips, `T,H,W` frames and pixels, `K` boxes in the whole batch, `C` classes.
"""

import csv
import difflib
import functools
import glob
import json
import os
import re
import signal
import tomllib
import typing
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"}
MIN_VISIBLE = 0.2     # a box with less of its area inside the training crop is no supervision any more: dropped
CROP_DRAWS = 10       # draws before the crop is centred on a box instead
REPLACEMENTS = 20     # damaged videos in a row before a training batch is given up


# ------------------------------------------------------------------------------------------------
# Tasks: the [[task]] tables of a recipe
# ------------------------------------------------------------------------------------------------

@dataclass
class Task:
    """One dataset, how its clips are cut, and what training does with it. Paths are relative to the recipe's `root`."""
    name: str
    kind: str                       # "clip" (one class per clip, softmax) | "box" (labels per person, sigmoid)
    train: str = ""                 # annotations: csv, list, json, pattern, or (clips) a folder per class
    val: str = ""
    videos: str = ""                # folder of the videos
    val_videos: str = ""            # "": the same folder
    labels: str = ""                # action list / class list / labels json; "": the names found in `train`
    eval_labels: str = ""           # action list of the classes that are evaluated (AVA: 60 of 80); "": all of `labels`
    exclude_train: str = ""         # keyframes to leave out, `video,second` rows
    exclude_val: str = ""
    train_boxes: str = ""           # detected persons added to the annotated ones
    val_boxes: str = ""             # detected persons to evaluate; "": the annotated boxes (an easier problem)
    train_box_score: float = 0.9    # least score of a detection that is used
    val_box_score: float = 0.8      # a keyframe where none passes keeps its best one
    transfer_iou: float = 0.0       # detections take the labels of the box they overlap by this much (AVA: 0.9), others
                                    # go; 0: labels of the detection file, none = negative
    offset_sec: float = 0.0         # annotation time minus file time: 900 for AVA's 15-minute cuts
    frames: int = 32                # T
    stride: int = 2                 # in frames of the clock below
    fps: float = 25.0               # of the clock, not of the files
    size: int = 224                 # px, side of the square clip
    short_side: list[int] = field(default_factory=lambda: [256, 320])  # px, drawn per clip; evaluation: the first
    fit: str = "crop"               # training: "crop" | "squash" (both sides to `size`: loses no box)
    val_fit: str = ""               # "crop" | "squash" | "full" (whole frame, sides to multiples of 16, one clip at a
                                    # time); "": crop for clip tasks, full for box tasks
    flip: float = 0.5               # probability
    flip_swap: list[list[int]] = field(default_factory=list)  # pairs of labels that a flip exchanges (left, right)
    colour: float = 0.0             # brightness, contrast and saturation each by a factor in [1 - c, 1 + c]
    mixup: float = 0.0              # alpha of Beta(alpha, alpha); clip tasks
    views: list[int] = field(default_factory=lambda: [1, 1])  # evaluation of clip tasks: clips x crops (1 or 3)
    batch: int = 8                  # clips per step over all processes
    weight: float = 1.0             # share of the steps in the schedule "weighted"
    lr_scale: float = 1.0           # times the learning rate
    loss_weight: float = 1.0
    smoothing: float = 0.0          # of the labels of clip tasks
    reduce: str = "sum"             # over classes in the box loss: "sum" | "mean"
    prior: float = 0.0              # initial probability of a box class (bias of the head); 0: bias 0
    dropout: float = 0.0            # before the head
    roi: str = "align-max"          # features of a box: "align-max" | "mean"
    roi_size: int = 7               # bins per side
    context: bool = False           # concatenate the clip's feature to the box's
    bad_share: float = 0.05         # missing or undecodable share of the videos that is tolerated

    def __post_init__(self):
        self.val_fit = self.val_fit or ("full" if self.kind == "box" else "crop")

    @property
    def step_sec(self) -> float:
        """Seconds from one frame of a clip to the next."""
        return self.stride / self.fps


def read_recipe(path: str | Path) -> dict:
    """The tables of a TOML file; ValueError with file and line if it is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:      # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path}: not a TOML file: {error}") from None


def read_tasks(tables: list[dict], where: str = "recipe") -> list[Task]:
    """`[[task]]` tables -> Tasks. Everything that is wrong with them is in the one ValueError."""
    known = {f.name: f.type for f in fields(Task)}
    problems, tasks = [], []
    for number, table in enumerate(tables, 1):
        name = f"task {table.get('name', number)!r}"
        bad = [f"{name}: `{key}` is missing" for key in ("name", "kind") if key not in table]
        values = {}
        for key, value in table.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                bad.append(f"{name}: unknown key `{key}`" + (f", did you mean `{near[0]}`?" if near else ""))
                continue
            kind = typing.get_origin(known[key]) or known[key]
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                bad.append(f"{name}: {key} = {value!r} should be of type {kind.__name__}")
            values[key] = value
        if not bad:
            task = Task(**values)
            bad = [f"{name}: {problem}" for problem in _impossible(task)]
            if task.name in [other.name for other in tasks]:
                bad.append(f"{name}: two tasks of this name")
            tasks.append(task)
        problems += bad
    if not tables:
        problems.append("no [[task]] table")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return tasks


def _impossible(task: Task) -> Iterator[str]:
    for key, allowed in (("kind", ("clip", "box")), ("fit", ("crop", "squash")), ("val_fit", ("crop", "squash", "full")),
                         ("reduce", ("sum", "mean")), ("roi", ("align-max", "mean"))):
        if getattr(task, key) not in allowed:
            yield f"{key} = {getattr(task, key)!r} is not one of {', '.join(allowed)}"
    for key in ("frames", "stride", "fps", "size", "batch", "roi_size"):
        if getattr(task, key) <= 0:
            yield f"{key} = {getattr(task, key)} must be positive"
    for key in ("flip", "colour", "bad_share", "train_box_score", "val_box_score", "transfer_iou", "dropout", "prior",
                "smoothing"):
        if not 0 <= getattr(task, key) <= 1:
            yield f"{key} = {getattr(task, key)} must lie in [0, 1]"
    for key in ("weight", "lr_scale", "loss_weight", "mixup"):
        if not getattr(task, key) >= 0:
            yield f"{key} = {getattr(task, key)} must not be negative"
    if not (task.train or task.val):
        yield "neither `train` nor `val` is given"
    sides = task.short_side
    if [type(side) for side in sides] != [int, int] or not 0 < sides[0] <= sides[1]:
        yield f"short_side = {sides} should be two whole numbers, the smaller first"
    elif "crop" in (task.fit, task.val_fit) and sides[0] < task.size:
        yield f"short_side = {sides} is smaller than the crop, size = {task.size}"
    if [type(count) for count in task.views] != [int, int] or task.views[0] < 1 or task.views[1] not in (1, 3):
        yield f"views = {task.views} should be [clips, crops] with 1 or 3 crops"
    elif task.views != [1, 1] and (task.kind == "box" or task.val_fit != "crop" and task.views[1] > 1):
        yield f"views = {task.views} needs a clip task, and several crops need val_fit = \"crop\""
    if any(len(pair) != 2 or {type(label) for label in pair} != {int} for pair in task.flip_swap):
        yield f"flip_swap = {task.flip_swap} should be a list of pairs of labels"
    if task.kind == "box" and not task.labels:
        yield "a box task needs `labels`, its action list"
    if task.kind == "box" and task.mixup:
        yield "mixup is for clip tasks"
    if task.kind == "clip" and (task.train_boxes or task.val_boxes):
        yield "person detections are for box tasks"
    if task.transfer_iou and not task.train_boxes:
        yield "transfer_iou needs `train_boxes`"


# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------

class DecodeError(Exception):
    """A video that cannot be read. The message begins with its path."""


def decode_clip(path: str | Path, times_sec: Sequence[float] | Callable[[float], Sequence[float]],
                short_side: int | None = None, size: tuple[int, int] | None = None, multiple: int = 1) -> np.ndarray:
    """The RGB frames on screen at `times_sec`, upright: uint8 (T, h, w, 3).

    times_sec: seconds since the first frame, in any order; or a function of the video's duration in seconds that
    returns them, which saves opening the file twice to choose a random place. Size of the result: `size` (h, w);
    or the aspect kept with `short_side` px, each side rounded to a multiple of `multiple`; or the video's own.
    Raises DecodeError if the file cannot be read, or if every time is more than a second outside the video.

    Identical to decoding the whole video and keeping the frames on screen, at a fraction of its cost: only packets
    from the keyframe before the clip are decoded, frames that nothing refers to and nobody wants are skipped inside
    the decoder, and the scaler writes small yuv420p frames before they become RGB.
    """
    canvas = _Canvas(short_side, size, multiple)
    try:
        with _open(path) as container:
            stream, ticks = _video_stream(container, path)
            times_sec = times_sec(_duration_sec(container, stream)) if callable(times_sec) else times_sec
            targets = ticks(times_sec)  # (T,) ints on the stream's own clock
            if not targets:
                raise ValueError("decode_clip: no times given")
            canvas.prepare(len(targets))
            # libdav1d loses wanted frames with NONREF. AVI numbers its B-frames in decoding order: count them instead.
            skip = stream.codec_context.name not in ("libdav1d", "av1", "libaom-av1")
            if container.format.name != "avi":
                far = ticks([10.0])[0] - ticks([0.0])[0]
                for back, skip in ((0, skip), (far, False)):  # a seek may land late (MPEG-TS, open GOPs): go further back
                    if _read_window(container, stream, targets, back, skip, canvas, path):
                        return canvas.video
        with _open(path) as container:
            stream, ticks = _video_stream(container, path)
            _read_from_start(container, stream, targets, canvas, path)
            return canvas.video
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{path}: {error.strerror or error}") from error


def _open(path: str | Path):
    # As a context manager everywhere: a container that waits for the garbage collector holds 2 MB and a descriptor.
    # Titles in other encodings than UTF-8 are no reason to fail.
    return av.open(str(path), metadata_errors="replace")


def _video_stream(container, path: str | Path):
    """The stream to decode and a function from seconds to its timestamps."""
    stream = container.streams.best("video")  # not video[0], which can be a thumbnail or a smaller rendition
    if stream is None or stream.codec_context is None:
        raise DecodeError(f"{path}: no video stream that can be decoded")
    # Both must be set before the first packet. One thread: workers are the parallelism, frame threads only read ahead.
    # (Never call av.logging.set_level with threads on: it deadlocks, PyAV#751.)
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "SLICE"
    start, base = stream.start_time or 0, stream.time_base

    def ticks(times_sec) -> list[int]:
        # rint, not int(): 151/25 s on a 1/12800 clock is 77311.99999999999 in floats.
        scaled = np.asarray(times_sec, np.float64) * base.denominator / base.numerator
        return [start + int(tick) for tick in np.rint(scaled)]

    return stream, ticks


def _duration_sec(container, stream) -> float:
    """Seconds. Matroska has no duration per stream and a broken-off recording none at all: then the packets tell."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / av.time_base
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    return float((max(ends) - (stream.start_time or 0)) * stream.time_base) if ends else 0.0


def _read_window(container, stream, targets: list[int], back: int, skip: bool, canvas: "_Canvas", path) -> bool:
    """Decode what the targets need, from the keyframe at or before `first - back`. False if that is not possible."""
    first, last, start = min(targets), max(targets), stream.start_time or 0
    container.seek(max(first, start) - back, stream=stream)  # offset in ticks, because `stream` is given
    packets = []
    for packet in container.demux(stream):  # compressed: a few seconds of it cost nothing
        if packet.size == 0:
            break
        packets.append(packet)
        if packet.dts is not None and packet.dts > last:  # dts <= pts: everything later is shown later
            break
    # Choosing by packet makes variable rates and B-frames exact without an index. Discarded packets (a cut that starts
    # before its edit list) are decoded but never shown.
    shown = sorted({packet.pts for packet in packets if packet.pts is not None and not packet.is_discard})
    if not shown or shown[0] > max(first, start):
        return False
    _check_inside(targets, start, shown[-1], stream.time_base, path)
    wanted: dict[int, list[int]] = {}
    for k, target in enumerate(targets):
        wanted.setdefault(shown[max(bisect_right(shown, target) - 1, 0)], []).append(k)
    decoder, newest = stream.codec_context, None
    for packet in [*packets, None]:  # None empties the decoder
        needed = packet is None or packet.pts in wanted or not skip
        decoder.skip_frame = "DEFAULT" if needed else "NONREF"
        for frame in decoder.decode(packet):
            if frame.pts is None or newest is not None and frame.pts <= newest:
                return False  # timestamps that do not follow the order of display
            newest = frame.pts
            if frame.pts in wanted:
                canvas.put(wanted.pop(frame.pts), frame)
        if not wanted:
            return True
    return False


def _read_from_start(container, stream, targets: list[int], canvas: "_Canvas", path) -> None:
    """Decode everything: always right, and slow. Frames without usable timestamps are counted."""
    rate = stream.average_rate or stream.guessed_rate or 25
    counted = container.format.name == "avi"
    order = sorted(range(len(targets)), key=targets.__getitem__)
    start, now, shown = stream.start_time or 0, None, None
    for number, frame in enumerate(container.decode(stream)):
        if counted or frame.pts is None:
            tick = start + round(number / rate / stream.time_base)
        else:
            tick = frame.pts if now is None else max(now, frame.pts)
        due = [k for k in order if targets[k] < tick] if shown is not None else []
        if due:
            canvas.put(due, shown)
            order = order[len(due):]
            if not order:
                return
        now, shown = tick, frame
    if shown is None:
        raise DecodeError(f"{path}: no frame could be decoded")
    _check_inside(targets, start, now, stream.time_base, path)
    canvas.put(order, shown)


def _check_inside(targets: list[int], start: int, end: int, time_base, path) -> None:
    # Holding the last frame for a clip that lies elsewhere would turn a wrong offset into a dataset of stills.
    second = 1 / time_base
    if min(targets) > end + second or max(targets) < start - second:
        raise DecodeError(f"{path}: asked for {float((min(targets) - start) * time_base):.3f} to "
                          f"{float((max(targets) - start) * time_base):.3f} s of a video that is "
                          f"{float((end - start) * time_base):.3f} s long")


class _Canvas:
    """Takes the frames of one clip, scales them, turns them upright and keeps them in one RGB array.

    Two reformatters of its own: a frame's builds a scaler per frame, and scaling planar yuv420p before the (same-size,
    fast) conversion to RGB is five times cheaper than scaling into packed RGB.
    """

    def __init__(self, short_side: int | None, size: tuple[int, int] | None, multiple: int):
        self.short_side, self.size, self.multiple = short_side, size, multiple
        self.scale, self.colour = VideoReformatter(), VideoReformatter()
        self.video = None

    def prepare(self, frames: int) -> None:
        self.frames = frames

    def put(self, places: list[int], frame: av.VideoFrame) -> None:
        turns = frame.rotation // 90 % 4  # display matrix of phone videos; PyAV does not apply it
        if self.video is None:
            height, width = (frame.height, frame.width)[::-1 if turns % 2 else 1]
            scale = self.short_side / min(height, width) if self.short_side else 1.0
            rounded = [max(round(side * scale / self.multiple), 1) * self.multiple for side in (height, width)]
            self.video = np.empty((self.frames, *(self.size or rounded), 3), np.uint8)  # (T, h, w, 3)
        height, width = self.video.shape[1:3][::-1 if turns % 2 else 1]
        if (height, width) != (frame.height, frame.width):
            frame = self.scale.reformat(frame, width, height, "yuv420p", interpolation="BILINEAR", threads=1)
        plane = self.colour.reformat(frame, format="rgb24", threads=1).planes[0]
        image = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, :width * 3]
        self.video[places] = np.rot90(image.reshape(height, width, 3), turns)


# ------------------------------------------------------------------------------------------------
# Annotations
# ------------------------------------------------------------------------------------------------

def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """(`path:line`, text) of every line that is not blank."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.strip()


def _microseconds(text: str) -> int:
    """A timestamp as a key: "0902", "902" and "902.000000" are the same keyframe."""
    return round(_number(text) * 1e6)


def _number(text: str) -> float:
    if "_" in text or not abs(value := float(text)) < 1e9:  # Python reads 1_0 as 10, and nan compares with nothing
        raise ValueError(f"{text!r} is not a number")
    return value


def read_classes(path: str | Path) -> dict[int, str]:
    """id -> name from an action list (.pbtxt), a labels .json (name -> id) or a text list (`1 name`, `name,1`, `name`)."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if Path(path).suffix == ".json":
        pairs = [(int(number), name) for name, number in json.loads(text).items()]
    elif Path(path).suffix == ".pbtxt":
        pairs = []
        for block in re.findall(r"(?:label|item)\s*\{(.*?)\}", text, re.DOTALL):
            name, number = re.search(r'name:\s*"([^"]*)"', block), re.search(r"\b(?:label_)?id:\s*(\d+)", block)
            if not (name and number):
                raise ValueError(f"{path}: block {{{block.strip()}}} has no name or no id")
            pairs.append((int(number[1]), name[1]))
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = list(enumerate(lines))
        for pattern in (r"(?P<id>\d+)[\s,]+(?P<name>.+)", r"(?P<name>.+?)[\s,]+(?P<id>\d+)"):
            found = [re.fullmatch(pattern, line) for line in lines]
            if all(found):
                pairs = [(int(match["id"]), match["name"]) for match in found]
                break
    classes = dict(pairs)
    if not classes or len(classes) < len(pairs) or len(set(classes.values())) < len(pairs):
        raise ValueError(f"{path}: expected a list of classes, found {len(pairs)} names with {len(classes)} different ids")
    return classes


class Videos:
    """The video files under a folder, found by stem (`ID.mkv`, `ID_START_END.mp4`) wherever they lie."""

    def __init__(self, folder: str):
        self.folder = folder

    @functools.cached_property
    def stems(self) -> dict[str, list[str]]:
        stems: dict[str, list[str]] = {}
        for name in sorted(list_videos(self.folder)):
            stems.setdefault(Path(name).stem, []).append(name)
        return stems

    @functools.cached_property
    def clips(self) -> dict[str, list[tuple[float, float, str]]]:
        """Kinetics: id -> (start, end, file) of each of its clips."""
        clips: dict[str, list[tuple[float, float, str]]] = {}
        for stem, names in self.stems.items():
            if match := re.fullmatch(r"(.+)_(\d{6})_(\d{6})", stem):  # greedy: ids contain _ and -
                clips.setdefault(match[1], []).append((float(match[2]), float(match[3]), names[0]))
        return clips

    def at(self, video: str, time_sec: float, offset_sec: float) -> tuple[str, float] | None:
        """(file, seconds into it) of a time in the original movie; of several clips the one that has it most central."""
        if video in self.stems:
            if len(self.stems[video]) > 1:
                raise ValueError(f"{self.folder}: two videos are called {video}: {', '.join(self.stems[video])}")
            return self.stems[video][0], time_sec - offset_sec
        around = [(abs(time_sec - (start + end) / 2), start, name)
                  for start, end, name in self.clips.get(video, ()) if start <= time_sec <= end]
        if not around:
            return None
        _, start, name = min(around)
        return name, time_sec - start

    def clip(self, stem: str, label: str) -> str | None:
        """File of this stem; of several the one in the folder of its class (written with blanks or underscores)."""
        names = self.stems.get(stem, [])
        in_class = [name for name in names if label in (folder := Path(name).parent.name, folder.replace("_", " "))]
        return (in_class or names or [None])[0]


def is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def list_videos(folder: str | Path) -> list[str]:
    """Paths, relative to the folder, of the video files in it and below."""
    return [os.path.relpath(os.path.join(parent, name), folder)
            for parent, _, names in os.walk(folder, followlinks=True)
            for name in names if is_video(name)]


@dataclass
class Person:
    """One box of a keyframe with its labels."""
    box: tuple[float, float, float, float]
    labels: set[int]
    score: float = 1.0


def read_boxes(path: str | Path, classes: int, scored: bool, report: dict) -> dict[tuple[str, int], list[Person]]:
    """(video id, microseconds) -> persons, from an AVA-format csv; `scored`: column 8 is a score, not a person id.

    A keyframe whose row has only two columns has an empty list. Raises ValueError with file, line and text.
    """
    keyframes: dict[tuple[str, int], dict[tuple, Person]] = {}
    for where, line in _lines(path):
        row = [column.strip() for column in line.split(",")]
        try:
            if len(row) not in ((2, 8) if scored else (2, 7, 8)):
                raise ValueError(f"{len(row)} columns, expected " + ("8, the last a score" if scored else "2, 7 or 8"))
            persons = keyframes.setdefault((row[0], _microseconds(row[1])), {})
            report["rows"] = report.get("rows", 0) + 1
            if len(row) == 2:
                continue
            box = tuple(_number(column) for column in row[2:6])
            if min(box) < -0.1 or max(box) > 1.1:
                raise ValueError(f"box {box} is not in [0, 1]")
            label = _number(row[6] or "-1")
            if label != -1 and label not in range(1, classes + 1):
                raise ValueError(f"label {row[6]} is not in 1..{classes}")
            score = _number(row[7]) if scored else 1.0
        except ValueError as error:
            raise ValueError(f"{where}: {error}, in {line!r}") from None
        if box[0] >= box[2] or box[1] >= box[3]:
            report["empty boxes dropped"] = report.get("empty boxes dropped", 0) + 1
            continue
        # One person = the same four numbers and the same person id; rounding the box would merge neighbours.
        who = "" if scored else "".join(row[7:])
        person = persons.setdefault((box, who), Person(box, set(), score))
        person.labels |= {int(label)} - {-1}
        person.score = max(person.score, score)
    return {key: list(persons.values()) for key, persons in keyframes.items()}


def read_clips(path: str, videos: Videos, split: str) -> list[tuple[str, str, str | None]]:
    """(`file:line`, label, video or None where it is missing) of a clip task, in any format above.

    Videos are relative to `videos.folder`, or absolute.
    """
    if os.path.isdir(path):
        names = sorted(list_videos(path))
        if flat := [name for name in names if os.sep not in name]:
            raise ValueError(f"{path}: expected a folder per class, found the video {flat[0]}")
        folder = os.path.abspath(path)
        return [(path, name.split(os.sep)[0], os.path.join(folder, name)) for name in names]
    if "*" in path:
        used, rows = "1" if split == "train" else "2", []
        for file in sorted(glob.glob(path)):
            label = re.sub(r"_test_split\d+$", "", Path(file).stem)
            found = [(where, line.rpartition(" ")) for where, line in _lines(file)]
            rows += [(where, label, videos.clip(Path(name.strip()).stem, label))
                     for where, (name, _, use) in found if use == used]
        return rows
    if path.endswith(".json"):
        rows = []
        for number, entry in enumerate(json.loads(Path(path).read_text(encoding="utf-8")), 1):
            where = f"{path}: entry {number}"
            if not {"id", "template"} <= set(entry):
                raise ValueError(f"{where}: expected \"id\" and \"template\", found {entry}")
            label = entry["template"].replace("[", "").replace("]", "")
            rows.append((where, label, videos.clip(entry["id"], label)))
        return rows
    lines = list(_lines(path))
    header = next(csv.reader([lines[0][1]])) if lines else []
    kinetics = "youtube_id" in header
    rows = []
    for where, line in lines[kinetics:]:
        try:
            label, video = (_kinetics_row(dict(zip(header, next(csv.reader([line])))), videos)
                            if kinetics else _list_row(line, videos))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{where}: {error}, in {line!r}") from None
        rows.append((where, label, video))
    return rows


def _kinetics_row(row: dict[str, str], videos: Videos) -> tuple[str, str | None]:
    if not row.get("label"):
        raise ValueError("no label (is this a test list?)")
    start, end = (int(_number(row[key])) for key in ("time_start", "time_end"))
    stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
    return row["label"], videos.clip(stem, row["label"]) or videos.clip(row["youtube_id"], row["label"])


def _list_row(line: str, videos: Videos) -> tuple[str, str | None]:
    columns = line.split(",")
    if is_video(line) or len(columns) > 2 and is_video(columns[0]):  # UCF101 test, Moments in Time
        name = line if is_video(line) else columns[0]
        label = Path(name).parent.name
    elif match := (re.fullmatch(r"(.+?)[\s,]+(\d+)", line) or re.fullmatch(r"(.+?)\s*[\t,](.+)", line)
                   or re.fullmatch(r"(.+)\s(\S+)", line)):
        name, label = match[1], match[2].strip()
    else:
        raise ValueError("expected `path label`")
    if os.path.isfile(os.path.join(videos.folder, name)):
        return label, name
    return label, videos.clip(Path(name).stem, label)  # moved, or re-encoded under another suffix


# ------------------------------------------------------------------------------------------------
# Datasets
# ------------------------------------------------------------------------------------------------

@dataclass
class Item:
    """What is known of one clip before its video is opened."""
    key: tuple[str, int]   # box: (video id, microseconds in the movie); clip: (path as listed, index)
    path: str
    time_sec: float        # of the keyframe, in the file; nan: anywhere (clip tasks)
    label: int             # clip: column of its class; box: -1
    boxes: np.ndarray      # (n, 4) float64, as annotated
    labels: np.ndarray     # (n, C) bool
    scores: np.ndarray     # (n,) float32


class Items(Sequence):
    """All Items of a dataset, kept in columns: worker processes share the pages of an array, while
    a list of objects is copied into every one of them as soon as its reference counts move."""

    def __init__(self, folder: str, rows: list[tuple], classes: int):
        # rows: (key, path, time_sec, label, persons)
        self.folder = folder
        self.names = np.array([os.fsencode(row[0][0]) for row in rows])
        self.stamps = np.array([row[0][1] for row in rows], np.int64)
        self.paths = np.array([os.fsencode(row[1]) for row in rows])
        self.times = np.array([row[2] for row in rows], np.float64)
        self.label = np.array([row[3] for row in rows], np.int64)
        persons = [person for row in rows for person in row[4]]
        self.first = np.cumsum([0] + [len(row[4]) for row in rows])  # persons of item i: first[i]..first[i+1]
        self.boxes = np.array([person.box for person in persons], np.float64).reshape(-1, 4)
        self.scores = np.array([person.score for person in persons], np.float32)
        self.labels = np.zeros((len(persons), classes if persons else 0), bool)
        for n, person in enumerate(persons):
            self.labels[n, [label - 1 for label in person.labels]] = True

    def __len__(self) -> int:
        return len(self.stamps)

    def __getitem__(self, i: int) -> Item:
        n = slice(self.first[i], self.first[i + 1])  # IndexError past the end ends a for loop
        return Item((os.fsdecode(self.names[i]), int(self.stamps[i])),
                    os.path.join(self.folder, os.fsdecode(self.paths[i])), float(self.times[i]),
                    int(self.label[i]), self.boxes[n], self.labels[n], self.scores[n])

    def fingerprint(self) -> int:
        """Changes with any change of the items: a resumed run must see the same."""
        columns = (self.names, self.stamps, self.paths, self.label, self.boxes, self.labels)
        return functools.reduce(lambda crc, column: zlib.crc32(column.tobytes(), crc), columns, 0)


@dataclass
class Sample:
    """One item, decoded: V views (1 in training) and its boxes on the clip as cut."""
    item: Item
    video: np.ndarray | None   # (V, T, H, W, 3) uint8; None: could not be decoded
    boxes: np.ndarray          # (n, 4) float32 in [0, 1] of the clip
    labels: np.ndarray         # (n, C) bool
    kept: np.ndarray           # (n,) rows of item.boxes
    label: int
    mix: float = 1.0           # share of this clip in its mixup


class Dataset:
    """A split of a task, ready to be sampled. `report`: what the readers counted."""

    def __init__(self, task: Task, split: str, classes: list[str], items: Items, report: dict):
        self.task, self.split, self.classes, self.items, self.report = task, split, classes, items, report
        self.videos = len(np.unique(items.paths))
        self.damaged: dict[str, str] = {}   # path -> reason, filled by evaluation_batches

    def __len__(self) -> int:
        return len(self.items)

    def class_counts(self) -> dict[int, int]:
        """Boxes per label id (from 1), or clips per column (from 0)."""
        if self.task.kind == "box":
            return {c + 1: int(n) for c, n in enumerate(self.items.labels.sum(0))}
        return dict(enumerate(np.bincount(self.items.label, minlength=len(self.classes)).tolist()))

    def sample(self, index: int, seed: Sequence[int] | None = None) -> Sample:
        """Decode item `index`: augmented as `seed` says, or (None) all views of the evaluation.

        Raises DecodeError.
        """
        task, item = self.task, self.items[index]
        rng = None if seed is None else np.random.default_rng(seed)
        fit = task.val_fit if rng is None else task.fit
        low, high = task.short_side
        side = low if rng is None else int(rng.integers(low, high + 1))  # before decoding: the scaler jitters for free
        place = 0.5 if rng is None else rng.random()
        clips = task.views[0] if rng is None else 1

        def times(duration_sec: float) -> np.ndarray:
            steps = np.arange(task.frames) * task.step_sec
            if not np.isnan(item.time_sec):
                return item.time_sec - task.frames // 2 * task.step_sec + steps
            room = max(0.0, duration_sec - task.frames * task.step_sec)
            starts = np.linspace(0, room, clips) if clips > 1 else np.array([place * room])
            return (starts[:, None] + steps).ravel()  # all views at once: one decoding

        shape = {"crop": {"short_side": side}, "squash": {"size": (task.size, task.size)},
                 "full": {"short_side": side, "multiple": 16}}[fit]
        video = decode_clip(item.path, times, **shape)
        video = video.reshape(clips, task.frames, *video.shape[1:])  # (V, T, h, w, 3)
        boxes, labels, kept = item.boxes, item.labels, np.arange(len(item.boxes))
        if fit == "crop" and rng is None:
            video, boxes = _fixed_crops(video, boxes, task.size, task.views[1])
        elif fit == "crop":
            video, boxes, kept = random_crop(rng, video, boxes, task.size)
            boxes, labels = boxes[kept], labels[kept]
        label, mix = item.label, 1.0
        if rng is not None:
            if rng.random() < task.flip:
                video, boxes = flip(video, boxes)
                label, labels = _swap(task, label, labels)
            if task.colour:
                video = jitter_colour(rng, video, task.colour)
            mix = rng.beta(task.mixup, task.mixup) if task.mixup else 1.0
        boxes = boxes.clip(0, 1).astype(np.float32)
        return Sample(item, np.ascontiguousarray(video), boxes, labels, kept, label, mix)


def open_task(task: Task, root: str | Path = ".", split: str = "train") -> Dataset:
    """Read the annotations of a task, find its videos, report what is missing.

    Raises FileNotFoundError for a path that does not exist or when more than `bad_share` of the videos is missing,
    ValueError (with file and line) for what cannot be understood.
    """
    who = f"task {task.name!r} ({split})"
    paths = {"annotations": getattr(task, split), "labels": task.labels,
             "videos": task.val_videos if split == "val" and task.val_videos else task.videos,
             "exclude": getattr(task, f"exclude_{split}"), "boxes": getattr(task, f"{split}_boxes")}
    if not paths["annotations"]:
        raise ValueError(f"{who}: `{split}` is not given")
    for key, path in paths.items():
        if path or key == "videos":
            paths[key] = os.path.join(root, path)
            if not (glob.glob(paths[key]) if "*" in path else os.path.exists(paths[key])):
                raise FileNotFoundError(f"{who}: {key} {paths[key]} does not exist")
    report, missing = {"rows": 0}, {}
    read = _read_keyframes if task.kind == "box" else _read_clip_rows
    videos = Videos(paths["videos"])
    rows, classes = read(task, root, split, paths, videos, report, missing)
    items = Items(paths["videos"], rows, len(classes))
    dataset = Dataset(task, split, classes, items, report)
    total = dataset.videos + len(missing)
    report |= {"items": len(items), "videos": dataset.videos, "missing videos": len(missing)}
    if len(missing) > task.bad_share * total:
        name, where = next(iter(missing.items()))
        raise FileNotFoundError(
            f"{who}: {len(missing)} of {total} videos are missing in {paths['videos']}, more than "
            f"bad_share = {task.bad_share}; the first is {name} ({where})")
    if not len(items):
        raise ValueError(f"{who}: no item is left of {paths['annotations']}: {report}")
    if task.kind == "clip" and split == "train" and task.flip:
        _check_mirrored(task, classes)
    return dataset


def _read_keyframes(task, root, split, paths, videos, report, missing) -> tuple[list[tuple], list[str]]:
    names = read_classes(paths["labels"])
    classes = [names.get(number, f"class {number}") for number in range(1, max(names) + 1)]
    keyframes = read_boxes(paths["annotations"], len(classes), False, report)
    excluded = set(read_boxes(paths["exclude"], len(classes), False, {})) if paths["exclude"] else set()
    report["excluded keyframes"] = len(excluded & set(keyframes))
    if paths["boxes"]:
        _add_detections(task, split, keyframes, read_boxes(paths["boxes"], len(classes), True, {}))
    rows = []
    for (video, stamp), persons in sorted(keyframes.items()):
        if not persons or (video, stamp) in excluded:  # nobody in it: nothing to train on, nothing to score
            continue
        found = videos.at(video, stamp / 1e6, task.offset_sec)
        if found is None:
            missing.setdefault(video, f"wanted by {paths['annotations']} at {stamp / 1e6:g} s")
        else:
            rows.append(((video, stamp), *found, -1, persons))
    report["keyframes"] = len(keyframes)
    report["boxes"] = sum(len(row[4]) for row in rows)
    return rows, classes


def _add_detections(task: Task, split: str, keyframes: dict, detected: dict) -> None:
    """Put detected persons into the keyframes: beside the annotated ones to train, in their place to evaluate."""
    movies = {video for video, _ in keyframes}
    least = task.train_box_score if split == "train" else task.val_box_score
    if split == "val":
        for key in keyframes:
            keyframes[key] = []
    for key, persons in detected.items():
        persons = [p for p in persons if p.score >= least] or [max(persons, key=lambda p: p.score, default=None)]
        if key[0] not in movies or persons == [None]:
            continue
        if split == "val":
            keyframes[key] = [replace(person, labels=set()) for person in persons]
        elif task.transfer_iou:
            true = keyframes.get(key, [])
            for person in persons:
                overlaps = [iou(person.box, other.box) for other in true]
                if overlaps and max(overlaps) >= task.transfer_iou:
                    keyframes[key] = keyframes[key] + [replace(person, labels=true[int(np.argmax(overlaps))].labels)]
        else:
            keyframes[key] = keyframes.get(key, []) + persons


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1,y1,x2,y2. (ava_eval.py has its own: each file can be copied alone.)"""
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def _read_clip_rows(task, root, split, paths, videos, report, missing) -> tuple[list[tuple], list[str]]:
    found = read_clips(paths["annotations"], videos, split)
    report["rows"] = len(found)
    if paths["labels"]:
        names = read_classes(paths["labels"])
        ids = sorted(names)
        columns = {str(number): column for column, number in enumerate(ids)}
        columns |= {names[number]: column for column, number in enumerate(ids)}
        classes = [names[number] for number in ids]
    else:  # both splits must agree, so the names are those of `train`
        source = os.path.join(root, task.train) if task.train else paths["annotations"]
        rows = found if source == paths["annotations"] else read_clips(source, videos, "train")
        labels = {label for _, label, _ in rows}
        numbers = all(label.isdecimal() for label in labels)
        classes = [str(n) for n in range(max(map(int, labels)) + 1)] if numbers and labels else sorted(labels)
        columns = {name: column for column, name in enumerate(classes)}
    rows = []
    for index, (where, label, name) in enumerate(found):
        if label not in columns:
            raise ValueError(f"{where}: class {label!r} is not one of the {len(classes)} classes of "
                             f"{paths['labels'] or task.train or paths['annotations']}")
        if name is None:
            missing.setdefault(where, f"a clip of {label!r}")
        else:
            rows.append(((name, index), name, np.nan, columns[label], []))
    return rows, classes


def _check_mirrored(task: Task, classes: list[str]) -> None:
    """A flipped "left to right" is a wrong label: such pairs must be swapped, or flips be off."""
    other = {"left": "right", "right": "left"}
    mirrored = [re.sub(r"\b(left|right)\b", lambda match: other[match[1]], name) for name in classes]
    pairs = [[i, classes.index(name)] for i, name in enumerate(mirrored) if name in classes[i + 1:]]
    if unlisted := [pair for pair in pairs if sorted(pair) not in [sorted(p) for p in task.flip_swap]]:
        i, j = unlisted[0]
        raise ValueError(f"task {task.name!r}: flip = {task.flip} would turn {classes[i]!r} into {classes[j]!r} under "
                         f"the old label: set flip = 0.0 or flip_swap = {pairs}")


# ------------------------------------------------------------------------------------------------
# Transforms: video (V, T, H, W, 3) uint8 and boxes (n, 4) in [0, 1], together
# ------------------------------------------------------------------------------------------------

def crop(video: np.ndarray, boxes: np.ndarray, top: int, left: int, size: int):
    """-> cropped video, boxes on the crop (cut off at its edges), share (n,) of each box that is visible."""
    height, width = video.shape[2:4]
    moved = (boxes * [width, height, width, height] - [left, top, left, top]) / size
    inside = moved.clip(0, 1)
    area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    return video[:, :, top:top + size, left:left + size], inside, area(inside) / area(moved)


def random_crop(rng: np.random.Generator, video: np.ndarray, boxes: np.ndarray, size: int):
    """-> crop that sees at least one box if there are any, all boxes on it, indices of the visible ones.

    At 16:9 a blind crop of 224 from a short side of 256 to 320 sees nothing of 19 % of AVA's boxes.
    """
    height, width = video.shape[2:4]
    for _ in range(CROP_DRAWS):
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        _, inside, share = crop(video, boxes, top, left, size)
        if not len(boxes) or (share >= MIN_VISIBLE).any():
            break
    else:
        x1, y1, x2, y2 = boxes[rng.integers(len(boxes))]
        top = int(np.clip((y1 + y2) / 2 * height - size / 2, 0, height - size))
        left = int(np.clip((x1 + x2) / 2 * width - size / 2, 0, width - size))
        _, inside, share = crop(video, boxes, top, left, size)
    return video[:, :, top:top + size, left:left + size], inside, np.flatnonzero(share >= MIN_VISIBLE)


def _fixed_crops(video: np.ndarray, boxes: np.ndarray, size: int, crops: int):
    """Evaluation: the centre, or start, centre and end of the long side -> (V*crops, T, size, size, 3)."""
    height, width = video.shape[2:4]
    cut = []
    for share in ([0.5] if crops == 1 else [0.0, 0.5, 1.0]):
        top, left = (height - size) * (share if height > width else 0.5), (width - size) * (share if width >= height else 0.5)
        cut.append(crop(video, boxes, round(top), round(left), size))
    return np.stack([view for view, _, _ in cut], 1).reshape(-1, *cut[0][0].shape[1:]), cut[len(cut) // 2][1]


def flip(video: np.ndarray, boxes: np.ndarray):
    """Left becomes right."""
    boxes = boxes.copy()
    boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
    return video[:, :, :, ::-1], boxes


def _swap(task: Task, label: int, labels: np.ndarray) -> tuple[int, np.ndarray]:
    first = 1 if task.kind == "box" else 0  # label ids count from 1, columns from 0
    for i, j in task.flip_swap:
        label = {i: j, j: i}.get(label, label) if task.kind == "clip" else label
        labels = labels.copy()
        labels[:, [i - first, j - first]] = labels[:, [j - first, i - first]]
    return label, labels


def jitter_colour(rng: np.random.Generator, video: np.ndarray, strength: float) -> np.ndarray:
    """Brightness, contrast, saturation: one affine map of RGB, the same for all frames."""
    bright, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    luma = np.array([0.299, 0.587, 0.114])
    turn = bright * contrast * (saturation * np.eye(3) + (1 - saturation) * luma)  # rows: output channels
    grey = bright * (1 - contrast) * (video[:, ::4, ::8, ::8] @ luma).mean()
    return np.rint(video @ turn.T.astype(np.float32) + np.float32(grey)).clip(0, 255).astype(np.uint8)


def normalise(video: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (B, T, H, W, 3), on its device, -> float32 (B, 3, T, H, W), less `mean`, over `std` (RGB, of [0, 1]).

    Without a mean every clip is standardised by itself: less its mean colour, over its standard deviation.
    """
    video = video.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    if len(mean):
        mean, std = (torch.tensor(c, device=video.device).view(3, 1, 1, 1) * 255 for c in (mean, std))
        return video.sub_(mean).div_(std)
    video -= video.mean((2, 3, 4), keepdim=True)
    return video.div_(video.std((1, 2, 3, 4), keepdim=True).clamp_min(1.0))


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """Clips of one task, on the way to the network. In evaluation the V views of an item are
    consecutive: clip b is view b % V of its item."""
    step: int
    task: str
    video: torch.Tensor                 # (B, T, H, W, 3) uint8 RGB
    labels: torch.Tensor                # (B,) int64 | (B, C) float32 after mixup | (K, C) float32 of boxes
    boxes: torch.Tensor | None          # (K, 4) float32 in [0, 1] of the clip
    box_clip: torch.Tensor | None       # (K,) int64: the clip of each box
    keys: list[tuple[str, int]]         # of the B clips, see Item
    scores: torch.Tensor | None         # (K,) float32 of the person detector, 1 for annotated boxes
    boxes_source: np.ndarray | None     # (K, 4) float64 as in the annotation: what detections.csv takes
    valid: torch.Tensor                 # (B,) bool; False: could not be decoded, video is 0 and without boxes

    def _each(self, change: Callable) -> "Batch":
        return replace(self, **{name: change(value) for name, value in vars(self).items()
                                if isinstance(value, torch.Tensor)})

    def to(self, device: torch.device | str) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader, so that the copy to the GPU overlaps with computing."""
        return self._each(torch.Tensor.pin_memory)


def make_batch(step: int, dataset: Dataset, samples: list[Sample], mixup: bool = False) -> Batch:
    """Stack samples. Any of them, not all of them, may have no boxes; damaged ones become zeros."""
    task = dataset.task
    views = next((len(s.video) for s in samples if s.video is not None), 1)
    shape = next((s.video.shape for s in samples if s.video is not None),
                 (views, task.frames, task.size, task.size, 3))
    video = torch.from_numpy(np.concatenate(
        [np.zeros(shape, np.uint8) if s.video is None else s.video for s in samples]))  # (B, T, H, W, 3)
    valid = torch.tensor([s.video is not None for s in samples]).repeat_interleave(views)
    keys = [s.item.key for s in samples for _ in range(views)]
    if task.kind == "box":
        return Batch(
            step, task.name, video,
            labels=torch.from_numpy(np.concatenate([s.labels for s in samples]).astype(np.float32)),
            boxes=torch.from_numpy(np.concatenate([s.boxes for s in samples])),
            box_clip=torch.tensor([b for b, s in enumerate(samples) for _ in s.boxes], dtype=torch.int64),
            keys=keys,
            scores=torch.from_numpy(np.concatenate([s.item.scores[s.kept] for s in samples])),
            boxes_source=np.concatenate([s.item.boxes[s.kept] for s in samples]), valid=valid)
    labels = torch.tensor([s.label for s in samples]).repeat_interleave(views)  # (B,)
    if mixup:
        # The partner is half a batch away: with ranks taking every W-th clip it is the same clip for any W.
        mix = torch.tensor([s.mix for s in samples], dtype=torch.float32)
        hot = torch.nn.functional.one_hot(labels, len(dataset.classes)).float()  # (B, C)
        labels = mix[:, None] * hot + (1 - mix[:, None]) * hot.roll(len(samples) // 2, 0)
        share = mix.view(-1, 1, 1, 1, 1)
        video = (share * video + (1 - share) * video.roll(len(samples) // 2, 0)).round_().to(torch.uint8)
    return Batch(step, task.name, video, labels, None, None, keys, None, None, valid)


# ------------------------------------------------------------------------------------------------
# Many datasets, one stream
# ------------------------------------------------------------------------------------------------

class Stream:
    """Which clips every step trains: a pure function of (seed, step), the same for any number of processes.

    The c-th global batch of a task is positions [cB, (c+1)B) of the endless row of its epochs, each a permutation of
    all items; rank r of W takes every W-th. So every item is seen once before any is seen twice, small datasets wrap
    as often as they need, and no rank ever runs out. Schedules:
    round_robin  the tasks in turn;
    weighted     a permuted multiset with exactly weight/sum(weights) of all steps for each task (PolyViT);
    uniform      a task drawn for each step;
    accumulate   every task at every step, one update for all (the joint objective exactly).
    """

    def __init__(self, datasets: dict[str, Dataset], schedule: str = "round_robin", seed: int = 0, steps: int = 1000):
        self.datasets, self.schedule, self.seed, self.steps = datasets, schedule, seed, steps
        self.names = list(datasets)
        self.damaged: dict[str, int] = {}   # path -> times it was replaced
        count, rng = len(self.names), np.random.default_rng(seed)
        if schedule == "round_robin":
            order = np.arange(steps) % count
        elif schedule == "weighted":
            weights = np.array([dataset.task.weight for dataset in datasets.values()])
            share = weights / weights.sum() * steps
            times = share.astype(int)
            times[np.argsort(times - share, kind="stable")[:steps - times.sum()]] += 1  # largest remainders
            order = rng.permutation(np.repeat(np.arange(count), times))
        elif schedule == "uniform":
            order = rng.integers(count, size=steps)  # a longer run begins like a shorter one
        elif schedule == "accumulate":
            order = np.zeros(steps, int)
        else:
            raise ValueError(f"schedule {schedule!r} is not one of round_robin, weighted, uniform, accumulate")
        self.order = order
        self.turn = np.zeros(steps, int)  # how often the task of this step was trained before
        for number in range(count):
            mine = order == number
            self.turn[mine] = np.arange(mine.sum())

    def tasks_at(self, step: int) -> list[str]:
        """The tasks trained at a step: one, or all of them for "accumulate"."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} of a stream of {self.steps} steps")
        return self.names if self.schedule == "accumulate" else [self.names[self.order[step]]]

    def slots(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[str, int]]:
        """(task, position in the endless row of its epochs) of every clip of a rank at a step."""
        return [(name, int(self.turn[step]) * (batch := self.datasets[name].task.batch) + place)
                for name in self.tasks_at(step) for place in range(rank, self.datasets[name].task.batch, world)]

    def locate(self, task: str, position: int, skip: int = 0) -> tuple[int, int]:
        """(epoch, item index) at a position; `skip`: that many further in the same epoch, round its end."""
        size = len(self.datasets[task])
        epoch, place = divmod(position, size)
        order = _permutation(self.seed, self.names.index(task), epoch, size)
        return epoch, int(order[(place + skip) % size])

    def state(self) -> dict:
        """What must be equal when a run is resumed."""
        return {"seed": self.seed, "schedule": self.schedule, "steps": self.steps if self.schedule == "weighted" else None,
                "tasks": {name: {"items": len(dataset), "fingerprint": dataset.items.fingerprint(),
                                 "batch": dataset.task.batch, "weight": dataset.task.weight}
                          for name, dataset in self.datasets.items()}}

    def __getitem__(self, request: tuple[int, str, list[int]]) -> tuple[str, Batch | None, list]:
        """In a worker: the batch at these positions, and (path, reason) of the videos that had to be replaced."""
        step, name, positions = request
        dataset, samples, damaged = self.datasets[name], [], []
        for position in positions:
            for skip in range(REPLACEMENTS):
                epoch, index = self.locate(name, position, skip)
                try:
                    samples.append(dataset.sample(index, [self.seed, self.names.index(name), epoch, index]))
                    break
                except DecodeError as error:
                    damaged.append((dataset.items[index].path, str(error)))
            else:
                return name, None, damaged
        return name, make_batch(step, dataset, samples, dataset.task.mixup > 0), damaged


@functools.lru_cache(maxsize=32)  # 6 MB and 40 ms for 800 000 items
def _permutation(seed: int, task: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, task, epoch]).permutation(size)


def training_batches(stream: Stream, start: int, stop: int, rank: int = 0, world: int = 1, workers: int = 1,
                     micro: int = 1) -> Iterator[list[Batch]]:
    """The micro-batches of steps start..stop-1, a list per step; with "accumulate" those of every task.

    One pool of workers for all tasks, each making whole micro-batches ahead of time; 0 workers: made here. Damaged
    videos are replaced by the next item of their epoch and counted in `stream.damaged`; more than `bad_share` of the
    videos of a task is a ValueError.
    """
    for name, dataset in stream.datasets.items():
        unit = world * micro * (2 if dataset.task.mixup else 1)
        if dataset.task.batch % unit:
            raise ValueError(f"task {name!r}: batch = {dataset.task.batch} is not a multiple of {unit} = {world} processes"
                             f" x {micro} micro-batches" + (" x 2 for mixup" if dataset.task.mixup else ""))

    def requests() -> Iterator[tuple[int, str, list[int]]]:
        for step in range(start, stop):
            slots = stream.slots(step, rank, world)
            for name in stream.tasks_at(step):
                mine = [position for task, position in slots if task == name]
                yield from ((step, name, mine[part::micro]) for part in range(micro))

    batches: list[Batch] = []
    bad: dict[str, set[str]] = {name: set() for name in stream.names}
    for name, batch, damaged in _load(stream, requests(), workers):
        for path, reason in damaged:
            stream.damaged[path] = stream.damaged.get(path, 0) + 1
            bad[name].add(path)
            _check_share(stream.datasets[name], bad[name], reason, batch is None)
        if batches and batch.step != batches[0].step:
            yield batches
            batches = []
        batches.append(batch)
    if batches:
        yield batches


def _check_share(dataset: Dataset, bad: set[str], reason: str, stuck: bool = False) -> None:
    task = dataset.task
    if stuck or len(bad) > task.bad_share * dataset.videos:
        raise ValueError(f"task {task.name!r} ({dataset.split}): {len(bad)} of {dataset.videos} videos cannot be decoded, "
                         f"more than bad_share = {task.bad_share}; the last: {reason}")


class _Evaluation:
    """The whole of a split in order, for a worker."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> tuple[Batch, list[tuple[str, str]]]:
        samples, damaged = [], []
        for index in indices:
            try:
                samples.append(self.dataset.sample(index))
            except DecodeError as error:
                item = self.dataset.items[index]
                none = np.zeros(0, np.int64)
                samples.append(Sample(item, None, np.zeros((0, 4), np.float32), item.labels[none], none, item.label))
                damaged.append((item.path, str(error)))
        return make_batch(-1, self.dataset, samples), damaged


def evaluation_batches(dataset: Dataset, batch: int, rank: int = 0, world: int = 1, workers: int = 1) -> Iterator[Batch]:
    """Items rank, rank + world, ... once each, with all their views; nothing is padded, repeated or replaced.

    `batch` counts clips, so an item with V views takes V of them; "full" clips differ in size and come one by one.
    What cannot be decoded is masked in `valid` and noted in `dataset.damaged`, past `bad_share` it is a ValueError.
    """
    task = dataset.task
    items = 1 if task.val_fit == "full" else max(1, batch // (task.views[0] * task.views[1]))
    mine = range(rank, len(dataset), world)
    requests = (list(mine[first:first + items]) for first in range(0, len(mine), items))
    for made, damaged in _load(_Evaluation(dataset), requests, workers):
        for path, reason in damaged:
            dataset.damaged[path] = reason
            _check_share(dataset, set(dataset.damaged), reason)
        yield made


def _load(source, requests: Iterator, workers: int) -> Iterator:
    """source[request] for each request, in order, made ahead by a pool of processes."""
    return iter(torch.utils.data.DataLoader(
        source, batch_size=None, sampler=requests, num_workers=workers, worker_init_fn=_start_worker,
        collate_fn=_unchanged, pin_memory=torch.cuda.is_available()))


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains: one message, not many


def _unchanged(value):
    return value
