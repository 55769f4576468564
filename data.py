"""Video files and their annotations -> clips -> one stream of batches from many datasets.

Copied alone it needs torch, numpy and av (>= 18); the decoder, `decode_clip`, only numpy and av.

**The clock.** Frame k of a clip is what is on screen at `centre + (k - T/2) * stride / fps` sec:
frame T/2 is the keyframe, and clips of 12 fps, 29.97 fps and variable-rate videos last as long.
Files count from their first frame; before it and after the last one the nearest frame is held.
Annotations count in the ORIGINAL movie: AVA's "0902" is second 902 of the movie and second 2 of its
15-minute cut (`offset_sec = 900`), AVA-Kinetics' "17.010000" second 7.01 of `ID_000010_000020`.

**Formats**, as they lie on people's disks; which one it is shows in the file.
Box tasks: csv without header. Boxes are x1,y1,x2,y2 in [0,1]; one row per action of a box:
    1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,12,1      video, second, box, action, person (optional)
    00g-inkLork,5.016949                               AVA-Kinetics: a keyframe without actions
    1j20qq1JyX4,0902,0.036,0.098,0.550,0.979,,0.995518 detected person: action, '' or -1; SCORE
    _-Z6wFjXtGQ,0902                                   exclusion list
    label { name: "sit"  label_id: 11 }                action list; or  item { name: "sit"  id: 11 }
The video is the file under `videos` of that stem, or the clip `ID_START_END` around the second: so
AVA-Kinetics is one task, both csv in one (`cat`), both kinds of video under one folder.
Clip tasks:
    label,youtube_id,time_start,time_end,split            Kinetics: this header, then
    abseiling,0wR5jVB-WPk,417,427,val                     rows; files ID_START_END, in any folder
    air drumming/x y.mp4 3                                list: path, number or name (or , or tab)
    adult+female+singing/0P3XG_vf91c_35.mp4,adult,4,0     Moments in Time: the folder is the class
    [{"id": "78687", "template": "Holding [something]"}]  Something-Something v2
    ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1         UCF101; test lists without the number
    splits/*_test_split1.txt                              HMDB51, a pattern; rows `x.avi 1`
    videos/train/                                         a folder per class
with class lists {"Holding something": "0"} (json), `name,0`, `1 name` or a name per line.

**All data is a pure function of (seed, step)**: the task a step trains, its clips, their crops. To
resume is to start at a step; numbers of workers and of processes change nothing.

Shapes: `B` clips, `T,H,W` frames and pixels, `K` boxes in a batch, `C` classes, `V` views.
"""

import csv
import difflib
import functools
import glob
import heapq
import json
import math
import os
import re
import signal
import tomllib
import typing
import unicodedata
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.format import Flags
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

VIDEO_SUFFIXES = set(  # of files that FFmpeg opens; phones, camcorders, cameras, recorders, the web
    ".mp4 .m4v .mov .qt .mkv .webm .avi .divx .mpg .mpeg .mpe .m1v .m2v .mpv .vob .mod .tod .vro "
    ".ts .mts .m2ts .m2t .tp .trp .flv .f4v .wmv .asf .3gp .3g2 .ogv .ogm .gif .mxf .gxf .dv .rm "
    ".rmvb .nut .amv .mjpg .mjpeg .264 .h264 .avc .265 .h265 .hevc .ivf .y4m .dav .insv".split()
)
MIN_VISIBLE = 0.2  # a box less visible than this in the training crop is no supervision: dropped
CROP_DRAWS = 10  # crops drawn to see a box, before one is centred on a box
IN_A_ROW = 20  # undecodable items in a row before training stops


# ------------------------------------------------------------------------------------------------
# Tasks: the [[task]] tables of a recipe
# ------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """One dataset: its files, how clips are cut, what training does with them.

    Paths are relative to the recipe's `root`.
    """

    name: str
    kind: str  # "clip" (a class per clip) | "box" (labels per person, multi-hot)
    train: str = ""  # annotations, in a format above
    val: str = ""
    videos: str = ""  # folder
    val_videos: str = ""  # "": the same folder
    labels: str = ""  # action or class list; "" (clips): the names in `train`, sorted
    eval_labels: str = ""  # action list of what the mAP counts, AVA: 60 of 80; "": `labels`
    exclude_train: str = ""  # keyframes to leave out
    exclude_val: str = ""
    train_boxes: str = ""  # detected persons, beside the annotated ones
    val_boxes: str = ""  # detected persons to evaluate; "": the annotated boxes (easier)
    train_box_score: float = 0.9  # least score of a detection
    val_box_score: float = 0.8  # a keyframe where none has it keeps its best detection
    transfer_iou: float = 0.0  # detections take the labels of the person they overlap so much
    # (AVA: 0.9), others go; 0: labels of their file, '' = negative
    offset_sec: float = 0.0  # annotation time minus file time; AVA's 15-minute cuts: 900
    frames: int = 32  # T
    stride: int = 2  # in frames of the clock
    fps: float = 25.0  # of the clock, not of the files
    size: int = 224  # px, side of the square clip
    short_side: list[int] = field(default_factory=lambda: [256, 320])  # px; drawn, val: the first
    fit: str = "crop"  # "crop" | "squash" (whole frame to size x size: loses no box)
    val_fit: str = ""  # also "full": whole frame, sides to multiples of 16, clips one by
    # one; "": crop for clip tasks, full for box tasks
    flip: float = 0.5  # probability
    flip_swap: list[list[int]] = field(default_factory=list)  # label pairs that a flip exchanges
    colour: float = 0.0  # brightness, contrast, saturation by factors in [1 - c, 1 + c]
    mixup: float = 0.0  # a of Beta(a, a), clip tasks
    views: list[int] = field(default_factory=lambda: [1, 1])  # val, clip tasks: clips x crops
    batch: int = 8  # clips per step, all processes together
    weight: float = 1.0  # share of the steps in the "weighted" schedule
    lr_scale: float = 1.0  # times the learning rate, at this task's steps
    loss_weight: float = 1.0
    smoothing: float = 0.0  # of the labels, clip tasks
    reduce: str = "sum"  # of the box loss over classes: "sum" | "mean"
    prior: float = 0.0  # first probability of a box class (head bias); 0: no bias
    dropout: float = 0.0  # before the head
    roi: str = "align-max"  # features of a box: "align-max" | "mean"
    roi_size: int = 7  # bins per side
    context: bool = False  # the clip's feature beside the box's
    bad_share: float = 0.05  # of the videos missing or undecodable: tolerated

    def __post_init__(self):
        self.val_fit = self.val_fit or ("full" if self.kind == "box" else "crop")

    @property
    def step_sec(self) -> float:
        """Seconds from one frame of a clip to the next."""
        return self.stride / self.fps


def read_recipe(path: str | Path) -> dict:
    """The tables of a TOML file; ValueError with its path and line if it is none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None


def misfits(kind: type, table: dict) -> dict[str, str]:
    """key -> what is wrong with it, where a table is to become a `kind`."""
    types, found = {f.name: typing.get_origin(f.type) or f.type for f in fields(kind)}, {}
    for key, value in table.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, 1)
            found[key] = f"unknown key {key!r}" + "".join(f", did you mean {n!r}?" for n in near)
        elif type(value) is not types[key] and (types[key], type(value)) != (float, int):
            found[key] = f"{key} = {value!r} is not of type {types[key].__name__}"
    return found


def read_tasks(tables: list[dict], where: str | Path = "recipe") -> list[Task]:
    """`[[task]]` tables -> Tasks; all that is wrong with them in one ValueError."""
    if type(tables) is not list or any(type(table) is not dict for table in tables):
        raise ValueError(f"{where}: task is no list of tables, expected [[task]] for each dataset")
    tasks, problems = [], [] if tables else ["no [[task]] table"]
    for number, table in enumerate(tables, 1):
        found = [f"`{key}` is missing" for key in ("name", "kind") if key not in table]
        found += misfits(Task, table).values()
        if not found:
            task = Task(**table)
            found = [*_impossible(task)]
            found += ["a second task of this name"] * (task.name in [t.name for t in tasks])
            tasks.append(task)
        problems += [f"task {table.get('name', number)!r}: {problem}" for problem in found]
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return tasks


def _impossible(task: Task) -> Iterator[str]:
    box, sides, views = task.kind == "box", task.short_side, task.views
    for allowed, keys in {
        ("clip", "box"): ["kind"],
        ("crop", "squash"): ["fit"],
        ("sum", "mean"): ["reduce"],
        ("crop", "squash", "full"): ["val_fit"],
        ("align-max", "mean"): ["roi"],
    }.items():
        yield from (
            f"{key} = {getattr(task, key)!r} is not one of {', '.join(allowed)}"
            for key in keys
            if getattr(task, key) not in allowed
        )
    for key in "frames stride fps size batch roi_size".split():
        if not getattr(task, key) > 0:
            yield f"{key} = {getattr(task, key)} is not positive"
    for key in "weight lr_scale loss_weight mixup".split():
        if not getattr(task, key) >= 0:
            yield f"{key} = {getattr(task, key)} is negative"
    for key in (
        "flip colour bad_share smoothing dropout prior train_box_score val_box_score transfer_iou"
    ).split():
        if not 0 <= getattr(task, key) <= 1:
            yield f"{key} = {getattr(task, key)} is not in [0, 1]"
    if [type(side) for side in sides] != [int, int] or not 0 < sides[0] <= sides[1]:
        yield f"short_side = {sides} is not two whole numbers, the smaller first"
    elif "crop" in (task.fit, task.val_fit) and sides[0] < task.size:
        yield f"short_side = {sides} is less than the crop, size = {task.size}"
    if [type(count) for count in views] != [int, int] or views[0] < 1 or views[1] not in (1, 3):
        yield f"views = {views} is not [clips, crops] with 1 or 3 crops"
    elif views != [1, 1] and (box or views[1] == 3 and task.val_fit != "crop"):
        yield f'views = {views} is for clip tasks, and 3 crops for val_fit = "crop"'
    if any(
        type(pair) is not list or [type(i) for i in pair] != [int, int] for pair in task.flip_swap
    ):
        yield f"flip_swap = {task.flip_swap} is not a list of pairs of labels"
    for problem, applies in {
        "neither `train` nor `val` is given": not (task.train or task.val),
        "a box task needs `labels`, its action list": box and not task.labels,
        "mixup is for clip tasks": box and task.mixup,
        "person detections are for box tasks": not box and (task.train_boxes or task.val_boxes),
        "transfer_iou needs `train_boxes`": task.transfer_iou and not task.train_boxes,
    }.items():
        if applies:
            yield problem


# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------


class DecodeError(Exception):
    """A video that cannot be read; the message begins with its path."""


def decode_clip(
    path: str | Path,
    times_sec: Sequence[float] | Callable[[float], Sequence[float]],
    short_side: int | None = None,
    size: tuple[int, int] | None = None,
    multiple: int = 1,
) -> np.ndarray:
    """The RGB frames on screen at `times_sec`, upright, in square pixels: uint8 (T, h, w, 3).

    times_sec: seconds from the first frame, in any order; or a function of the video's duration
    that returns them, so that a random place costs no second opening. The result has the video's
    own size, or `size` (h, w), or its aspect at `short_side` px, sides rounded to a `multiple`.
    Raises DecodeError if the video cannot be read or all times lie over a second outside of it.

    These are the frames of the whole video decoded. But decoding starts at the keyframe before the
    first of them, frames that nobody wants and no other refers to are skipped inside the decoder,
    and the wanted ones are scaled as yuv420p, before they become RGB.
    """
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            joined, length_sec = False, None
            if format_is(container, Flags.ts_discont):
                joined, length_sec = _scan_clock(str(path), os.stat(path).st_mtime_ns)
            if callable(times_sec):
                times_sec = times_sec(length_sec or duration_sec(container, stream))
            targets = to_ticks(stream, times_sec)
            canvas = Canvas(len(targets), stream, short_side, size, multiple)
            if can_seek(container, stream) and not joined:
                # libdav1d loses frames with NONREF. Seeks can land late (MPEG-TS, open GOPs).
                skip = stream.codec_context.name not in ("libdav1d", "av1", "libaom-av1")
                for back_sec, skip_here in ((0, skip), (10, False)):
                    back = round(back_sec / stream.time_base)
                    if _read_window(container, stream, targets, back, skip_here, canvas, path):
                        return canvas.video
        with open_video(path) as container:
            _read_from_start(container, video_stream(container, path), targets, canvas, path)
            return canvas.video
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{path}: {error.strerror or error}") from error


def open_video(path: str | Path) -> av.container.InputContainer:
    """Always `with`: one that waits for the garbage collector holds 2 MB and a file descriptor."""
    # `file:`, or the hour in 10:00.mp4 is taken for a protocol. Titles in Latin-1 are no reason to
    # fail.
    return av.open(f"file:{path}", metadata_errors="replace")


def video_stream(container: av.container.InputContainer, path: str | Path) -> av.VideoStream:
    """The stream to decode, ready for one thread. DecodeError if there is none."""
    stream = container.streams.best("video")  # video[0] can be a thumbnail or a smaller rendition
    if stream is None or stream.codec_context is None:
        raise DecodeError(f"{path}: no video stream that can be decoded")
    if stream.disposition & Disposition.attached_pic:
        raise DecodeError(f"{path}: no video, only sound with a cover picture")
    # Set before the first packet, ignored later. Workers are the parallelism; threads would read
    # ahead, and with av.logging.set_level they deadlock (PyAV#751).
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "SLICE"
    return stream


def format_is(container: av.container.InputContainer, flag: Flags) -> bool:
    return bool(container.format.flags & flag.value)


def has_clock(container: av.container.InputContainer) -> bool:
    """False where a frame's time depends on where reading began: raw streams know none, MPEG
    program streams (DVDs) only that of some frames."""
    return container.format.name != "mpeg" and not format_is(container, Flags.no_timestamps)


def can_seek(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether a part of the file tells the times of its frames; else it is read from the start."""
    if container.format.name == "avi":  # it knows only the order of decoding, not that of display
        return stream.codec_context.reorder_depth == 0
    return has_clock(container)


def to_ticks(stream: av.VideoStream, times_sec: Sequence[float]) -> list[int]:
    """Seconds from the first frame -> the timestamps of the stream at or before them."""
    # With a grace of half a millisecond (at most half a tick): floats fall short of 151/25 s, and
    # Matroska rounds a frame's own time to milliseconds.
    base = stream.time_base
    exact = np.asarray(times_sec, np.float64) * base.denominator / base.numerator
    whole = np.floor(exact + min(0.5, 0.0005 / float(base)))
    start = stream.start_time or 0
    return [start + int(tick) for tick in whole]


def frame_rate(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction:
    """Frames per second as the file says; 25 where it does not."""
    if format_is(container, Flags.no_timestamps):  # the demuxer says 25 for all of them
        return stream.codec_context.framerate or stream.average_rate or Fraction(25)
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def duration_sec(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Matroska has it for the file only, an interrupted recording not at all: ask the packets."""
    start = stream.start_time or 0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        seconds = container.duration / av.time_base
        if "matroska" in container.format.name:  # counts from 0
            seconds -= float(start * stream.time_base)
        return seconds
    packets, end = 0, start
    for packet in container.demux(stream):
        packets += packet.size > 0
        if packet.pts is not None:
            end = max(end, packet.pts + (packet.duration or 0))
    if format_is(container, Flags.no_timestamps):
        return float(packets / frame_rate(container, stream))
    return float((end - start) * stream.time_base)


class Clock:
    """Gives frames (or packets) in their order ticks that never go back, whatever their stamps.

    What has no stamp is counted. Where recordings were joined (`cat`, a recorder's restart) and the
    stamps start anew, the time goes on one frame later; `jumps` counts these places. The limits of
    MPEG-TS are ffmpeg's own; elsewhere stamps can be in disorder, by fewer frames than a second's.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream):
        broadcast = format_is(container, Flags.ts_discont)  # MPEG-TS, MPEG-PS
        back_sec = 0.1 if broadcast and has_clock(container) else 1
        self.step = 1 / (frame_rate(container, stream) * stream.time_base)  # ticks of a frame
        self.back = back_sec / stream.time_base
        self.ahead = (10 if broadcast else math.inf) / float(stream.time_base)
        self.start = stream.start_time or 0
        self.now: Fraction | int | None = None  # of the newest frame; `newest` never goes back
        self.newest: float = -math.inf
        self.shift: Fraction | int = 0
        self.jumps = 0

    def tick(self, stamp: int | None) -> int:
        if self.now is None:
            self.now = self.start if stamp is None else stamp
        elif stamp is None:
            self.now += self.step
        else:
            moved = stamp + self.shift - self.now
            if moved < -self.back or moved > self.ahead:
                self.shift += self.step - moved
                self.jumps += 1
                moved = self.step
            self.now += moved
        self.newest = max(self.newest, round(self.now))
        return self.newest


@functools.lru_cache(maxsize=4096)
def _scan_clock(path: str, modified_ns: int) -> tuple[bool, float | None]:
    """Whether the clock of an MPEG-TS or -PS starts anew inside of it, and its length in seconds.

    Nothing but all its packets can tell: 2 ms for 10 s of film, 0.2 s for 15 minutes, once a file.
    """
    with open_video(path) as container:
        stream = video_stream(container, path)
        clock, first = Clock(container, stream), None
        for packet in container.demux(stream):
            if packet.size:
                tick = clock.tick(packet.dts)
                first = tick if first is None else first
        if first is None:
            return False, None
        return clock.jumps > 0, float((clock.now + clock.step - first) * stream.time_base)


def _read_window(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    targets: list[int],
    back: int,
    skip: bool,
    canvas: "Canvas",
    path: str | Path,
) -> bool:
    """Decode what the targets need, from the keyframe before `first - back`; False: impossible."""
    start = stream.start_time or 0
    first, last = max(min(targets), start), max(targets)
    try:
        container.seek(first - back, stream=stream)  # in ticks, since a stream is given
    except av.FFmpegError:
        return False  # a format that cannot seek
    packets = []
    for packet in container.demux(stream):  # a few seconds of compressed data, nothing is decoded
        if packet.size:
            packets.append(packet)
        if not packet.size or packet.dts is not None and packet.dts > last:  # dts <= pts
            break
    if container.format.name == "avi" and any(packet.pts != packet.dts for packet in packets):
        return False  # a guess
    # Choosing among packets is exact for B-frames and variable rates, without an index. Those
    # between a keyframe and a cut (discard) are decoded but never on screen.
    shown = sorted({p.pts for p in packets if p.pts is not None and not p.is_discard})
    if not shown or shown[0] > first:
        return False
    _check_inside(targets, start, shown[-1], stream.time_base, path)
    wanted: dict[int, list[int]] = {}  # timestamp -> places in the clip
    for place, target in enumerate(targets):
        stamp = shown[max(bisect_right(shown, target) - 1, 0)]
        wanted.setdefault(stamp, []).append(place)
    return _decode(stream.codec_context, packets, wanted, skip, canvas)


def _decode(
    decoder: av.VideoCodecContext,
    packets: list[av.Packet],
    wanted: dict[int, list[int]],
    skip: bool,
    canvas: "Canvas",
) -> bool:
    """Put the wanted frames into the canvas; False if one did not come out."""
    newest = -math.inf
    for packet in [*packets, None]:  # None empties the decoder
        needed = not skip or packet is None or packet.pts in wanted
        decoder.skip_frame = "DEFAULT" if needed else "NONREF"
        try:
            frames = decoder.decode(packet)
        except av.InvalidDataError:
            return False
        for frame in frames:
            if frame.pts is None or frame.pts <= newest:
                return False  # timestamps that are not in the order of display
            newest = frame.pts
            if newest in wanted:
                canvas.put(wanted.pop(newest), frame)
        if not wanted:
            return True
    return False


def frames_in_order(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, frame) of all frames from the start on: always right, and slow.

    AVI stamps packets in the order of decoding only. So the n-th frame takes the n-th stamp: a gap
    that a recorder left stays where it was. What cannot be decoded before the first frame is left
    out: files that begin inside a group of pictures.
    """
    clock = Clock(container, stream)
    counted = format_is(container, Flags.no_timestamps)
    is_avi = container.format.name == "avi"
    stamps: list[int] = []  # AVI: a heap of those whose frames are still in the decoder
    for packet in container.demux(stream):
        if is_avi and packet.size:
            heapq.heappush(stamps, packet.dts)
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if clock.now is None:
                continue
            raise
        for frame in frames:
            stamp = frame.pts
            if counted:
                stamp = None
            elif is_avi:
                stamp = heapq.heappop(stamps) if stamps else None
            yield clock.tick(stamp), frame
        while len(stamps) > stream.codec_context.reorder_depth:  # of packets without a picture
            heapq.heappop(stamps)


def _read_from_start(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    targets: list[int],
    canvas: "Canvas",
    path: str | Path,
) -> None:
    left = sorted(range(len(targets)), key=targets.__getitem__)  # places in the clip
    shown, since = None, 0
    for now, frame in frames_in_order(container, stream):
        if shown is not None:
            due = [place for place in left if targets[place] < now]
            if due:
                canvas.put(due, shown)
                left = left[len(due) :]
            if not left:
                return
        shown, since = frame, now
    if shown is None:
        raise DecodeError(f"{path}: no frame could be decoded")
    _check_inside(targets, stream.start_time or 0, since, stream.time_base, path)
    canvas.put(left, shown)


def _check_inside(
    targets: list[int], start: int, end: int, time_base: Fraction, path: str | Path
) -> None:
    # Otherwise a wrong offset would make a dataset of stills.
    first, last = min(targets), max(targets)
    if first > end + 1 / time_base or last < start - 1 / time_base:
        raise DecodeError(
            f"{path}: asked for {float((first - start) * time_base):.3f} to "
            f"{float((last - start) * time_base):.3f} s, but the last frame is at "
            f"{float((end - start) * time_base):.3f} s"
        )


class Canvas:
    """Takes the frames of one clip and keeps them scaled, upright and in RGB in one array.

    All frames share its reformatters (a frame's own would build a scaler per frame). There are two:
    scaling planar yuv420p, then converting at equal size, is five times cheaper than one step.
    """

    def __init__(
        self,
        frames: int,
        stream: av.VideoStream,
        short_side: int | None = None,
        size: tuple[int, int] | None = None,
        multiple: int = 1,
    ):
        self.frames, self.short_side, self.size, self.multiple = frames, short_side, size, multiple
        self.pixel_aspect = pixel_aspect(stream)
        self.video: np.ndarray | None = None
        self.scaler, self.converter = VideoReformatter(), VideoReformatter()

    def put(self, places: list[int], frame: av.VideoFrame) -> None:
        transpose, flips = orientation(frame)  # phones film sideways; PyAV leaves it to us
        if self.video is None:
            sides = [frame.height, frame.width * self.pixel_aspect]
            if transpose:
                sides.reverse()
            height, width = self.size or self._fit(sides)
            self.video = np.empty((self.frames, height, width, 3), np.uint8)  # (T, h, w, 3)
        height, width = self.video.shape[1:3]
        if transpose:
            height, width = width, height
        if (height, width) != (frame.height, frame.width):
            frame = self.scaler.reformat(
                frame, width, height, "yuv420p", interpolation="BILINEAR", threads=1
            )
        plane = self.converter.reformat(frame, format="rgb24", threads=1).planes[0]
        image = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : width * 3]
        image = image.reshape(height, width, 3)
        if transpose:
            image = image.swapaxes(0, 1)
        image = image[flips]
        for place in places:
            self.video[place] = image

    def _fit(self, sides: list[float]) -> list[int]:
        scale = self.short_side / min(sides) if self.short_side else 1.0
        return [max(int(s * scale / self.multiple + 0.5), 1) * self.multiple for s in sides]


def orientation(frame: av.VideoFrame) -> tuple[bool, tuple[slice, slice]]:
    """How a stored picture becomes upright: `swapaxes(0, 1)` or not, then `[flips]`.

    From the display matrix, as ffmpeg's autorotation: x' = a x + c y, y' = b x + d y. It may mirror
    (front cameras), which `frame.rotation` cannot say.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, (slice(None), slice(None))
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    transpose = abs(b) > abs(a)
    right, down = (c, b) if transpose else (a, d)
    return transpose, (
        slice(None, None, -1 if down < 0 else 1),
        slice(None, None, -1 if right < 0 else 1),
    )


def pixel_aspect(stream: av.VideoStream) -> float:
    """Width over height of a pixel on screen: DVDs and DV film a wide picture in narrow frames.

    Under 1 % it is what rounding to even sides left, beyond 4 a damaged header: 1.
    """
    aspect = float(stream.sample_aspect_ratio or 1)
    if 0.25 <= aspect <= 4 and abs(aspect - 1) > 0.01:
        return aspect
    return 1.0


# ------------------------------------------------------------------------------------------------
# Annotations
# ------------------------------------------------------------------------------------------------


def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """(`path:line`, text) of every line that is not blank."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.strip()


def _number(text: str) -> float:
    value = float(text)
    if not -1e9 < value < 1e9 or "_" in text:  # float("1_0") is 10; nan, inf
        raise ValueError(f"{text!r} is not a number")
    return value


def _json(path: str | Path, kind: type) -> dict | list:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if type(content) is not kind:
        raise ValueError(f"{path}: expected a JSON {kind.__name__}, found {type(content).__name__}")
    return content


def read_classes(path: str | Path) -> dict[int, str]:
    """id -> name from an action list (.pbtxt), a .json (name -> id) or a text list of classes."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    if Path(path).suffix == ".pbtxt":
        found = re.findall(r"(?:label|item)\s*\{((?:[^{}\"]|\"[^\"]*\")*)\}", text)
        names = [re.search(r'name:\s*"(.*?)"', block) for block in found]
        ids = [re.search(r"\b(?:label_)?id:\s*(\d+)", block) for block in found]
        pairs = [(int(number[1]), name[1]) for number, name in zip(ids, names) if number and name]
    elif Path(path).suffix == ".json":
        found = _json(path, dict)
        pairs = [(int(i), name) for name, i in found.items() if re.fullmatch(r"\d+", str(i))]
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found = pairs = list(enumerate(lines))
        for pattern in (r"(?P<id>\d+)[\s,]+(?P<name>.+)", r"(?P<name>.+?)[\s,]+(?P<id>\d+)"):
            if all(matches := [re.fullmatch(pattern, line) for line in lines]):
                pairs = [(int(match["id"]), match["name"]) for match in matches]
                break
    classes = dict(pairs)
    if not found or not len(found) == len(classes) == len(set(classes.values())):
        raise ValueError(
            f"{path}: expected a list of classes with a name and a number each, all "
            f"different; found {len(found)} entries, {len(classes)} numbers, "
            f"{len(set(classes.values()))} names"
        )
    return classes


def is_video(name: str) -> bool:
    """By its suffix. What macOS leaves beside each file (`._x.mp4`) and other hidden ones: no."""
    name = os.path.basename(name)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def list_videos(folder: str | Path) -> list[str]:
    """The video files in a folder and below, sorted, as paths relative to it.

    Hidden files and folders and __MACOSX are left out; links are followed, but not in circles.
    """
    return list(_walk_videos(str(folder), "", ()))


def _walk_videos(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    here = os.path.join(os.path.realpath(folder), "")
    if any(path.startswith(here) for path in above):
        return  # a link to a folder that this one lies in
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # none, or one that may not be read, as lost+found
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            yield from _walk_videos(entry.path, f"{prefix}{entry.name}{os.sep}", (*above, here))
        elif is_video(entry.name):
            yield prefix + entry.name


def plain_path(name: str) -> str:
    """One spelling of a path: Windows' \\ becomes /, and an accent and its letter one character,
    where macOS writes two (NFD) and csv files have one (NFC)."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


class Videos:
    """The video files under a folder, wherever they lie in it, by what annotations call them."""

    def __init__(self, folder: str | Path, files: list[str] | None = None):
        """files: paths relative to the folder; None: all that are there, listed when needed."""
        self.folder = str(folder)
        self.given = files
        self.found: dict[str, list[str]] = {}

    @functools.cached_property  # lists with full paths never need it
    def stems(self) -> dict[str, list[str]]:
        """stem -> files; the stem in the spelling of plain_path, the files as they are."""
        stems: dict[str, list[str]] = {}
        for file in list_videos(self.folder) if self.given is None else self.given:
            stem = Path(plain_path(file)).stem
            stems.setdefault(stem, []).append(file)
        return stems

    def find(self, name: str) -> list[str]:
        """The files that `name` can mean: one where all is well, none or several.

        name: a stem, a file name, or a path with or without suffix, relative or of another machine.
        Of several files of this stem those count whose folders, read from the end, agree furthest;
        run/3.mp4 is never walk/3.mp4.
        """
        if name not in self.found:
            self.found[name] = self._find(plain_path(name))
        return self.found[name]

    def _find(self, name: str) -> list[str]:
        *folders, last = name.split("/")
        stem, suffix = os.path.splitext(last)
        if last in self.stems:
            stem, suffix = last, ""
        best, files = (0, False, False), []
        for file in self.stems.get(stem, []):
            plain = plain_path(file)
            *parents, own = plain.split("/")
            agreeing = _common_tail(folders, parents)
            if folders and parents and not agreeing:
                continue
            exact = name == plain or (folders != [] and name == os.path.splitext(plain)[0])
            rank = (agreeing, exact, suffix != "" and own == last)
            if rank > best:
                best, files = rank, []
            if rank == best:
                files.append(file)
        return files

    def name_of(self, file: str) -> str:
        """The shortest name that finds this file alone: its stem, else its path, else with suffix.

        With / in it also on Windows; AVA's csv and ava_eval.py take any name without comma.
        """
        path = plain_path(file)
        for name in (Path(path).stem, os.path.splitext(path)[0]):
            if self.find(name) == [file]:
                return name
        return path

    @functools.cached_property
    def clips(self) -> dict[str, list[tuple[float, float, str]]]:
        """Kinetics: id -> (start, end, file) of its clips. Some ids have several."""
        clips: dict[str, list[tuple[float, float, str]]] = {}
        for stem, names in self.stems.items():
            if match := re.fullmatch(r"(.+)_(\d{6})_(\d{6})", stem):  # greedy: ids contain _
                clips.setdefault(match[1], []).append((float(match[2]), float(match[3]), names[0]))
        return clips

    def at(self, video: str, time_sec: float, offset_sec: float) -> tuple[str, float] | None:
        """(file, seconds into it) of a time in the movie; of several clips the best around it."""
        names = self.find(video)
        if len(names) > 1:
            raise ValueError(f"{self.folder}: several videos are {video}: {', '.join(names)}")
        if names:
            return names[0], time_sec - offset_sec
        around = [
            (abs(time_sec - (start + end) / 2), time_sec - start, name)
            for start, end, name in self.clips.get(video, ())
            if start <= time_sec <= end
        ]
        if not around:
            return None
        _, local_sec, name = min(around)
        return name, local_sec

    def clip(self, stem: str, label: str) -> str | None:
        """The file of this stem; of several, the one in the folder of its class."""
        names = self.stems.get(plain_path(stem), [])
        in_class = [
            name
            for name in names
            if Path(plain_path(name)).parent.name.replace("_", " ") == plain_path(label)
        ]
        return next(iter(in_class or names), None)


def _common_tail(one: list[str], other: list[str]) -> int:
    """How many of the last words of two lists agree."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count


@dataclass
class Person:
    """A box of a keyframe with its action ids."""

    box: tuple[float, float, float, float]
    labels: set[int]
    score: float = 1.0


def read_boxes(
    path: str | Path, classes: int, scored: bool, report: dict
) -> dict[tuple[str, int], list[Person]]:
    """(video id, microseconds) -> persons of a csv; `scored`: column 8 is a score, not a person.

    Microseconds, because "0902", "902" and "902.000000" are the same keyframe. One whose only row
    has two columns has no persons. Counts rows in `report`. Raises ValueError with file and line.
    """
    keyframes: dict[tuple[str, int], dict[tuple, Person]] = {}
    report |= {"rows": 0, "empty boxes dropped": 0}
    actions = range(1, classes + 1)
    for where, line in _lines(path):
        row = line.split(",")
        try:
            if len(row) not in ((2, 8) if scored else (2, 7, 8)):
                raise ValueError(f"{len(row)} columns instead of 2, {'' if scored else '7 '}or 8")
            key = row[0].strip(), round(_number(row[1]) * 1e6)
            persons = keyframes.setdefault(key, {})
            report["rows"] += 1
            if len(row) == 2:
                continue
            x1, y1, x2, y2 = box = tuple(map(_number, row[2:6]))
            if min(box) < -0.1 or max(box) > 1.1:
                raise ValueError("box outside [0, 1]")
            label = _number(row[6].strip() or "-1")
            if label != -1 and label not in actions:
                raise ValueError(f"action {row[6]} is not in 1..{classes}")
            score = _number(row[7]) if scored else 1.0
            if not 0 <= score <= 1:
                raise ValueError(f"score {row[7]} is not in [0, 1]")
        except ValueError as error:
            raise ValueError(f"{where}: {error}: {line}") from None
        if x1 >= x2 or y1 >= y2:
            report["empty boxes dropped"] += 1
            continue
        # One person has the same numbers and the same id: rounded boxes would merge neighbours.
        key = box if scored else (box, *row[7:])
        person = persons.get(key) or persons.setdefault(key, Person(box, set(), score))
        if label != -1:
            person.labels.add(int(label))
        person.score = max(person.score, score)
    return {key: list(persons.values()) for key, persons in keyframes.items()}


def read_clips(path: str, videos: Videos, split: str) -> list[tuple[str, str, str, str | None]]:
    """(`file:line`, class, name as listed, file or None if missing) of each row of a clip task.

    Files are absolute or relative to `videos.folder`. Raises ValueError with file, line and text.
    """
    if os.path.isdir(path):
        names, folder = sorted(list_videos(path)), os.path.relpath(path, videos.folder)
        if flat := [name for name in names if os.sep not in name]:
            raise ValueError(f"{path}: expected a folder per class, found the video {flat[0]}")
        return [(path, name.split(os.sep)[0], name, os.path.join(folder, name)) for name in names]
    if "*" in path:
        rows, use = [], " 1" if split == "train" else " 2"
        for file in sorted(glob.glob(path)):
            label = re.sub(r"_test_split\d+$", "", Path(file).stem)
            rows += [
                (where, label, line[:-2], videos.clip(Path(line[:-2].strip()).stem, label))
                for where, line in _lines(file)
                if line.endswith(use)
            ]
        return rows
    if path.endswith(".json"):
        rows = []
        for number, entry in enumerate(_json(path, list), 1):
            fields = [entry.get(key) for key in ("id", "template")] if type(entry) is dict else [0]
            if [type(text) for text in fields] != [str, str]:
                raise ValueError(f"{path}: entry {number} has no id or no template: {entry}")
            label = re.sub(r"[\[\]]", "", entry["template"])
            file = videos.clip(entry["id"], label)
            rows.append((f"{path}: entry {number}", label, entry["id"], file))
        return rows
    lines = list(_lines(path))
    header = next(csv.reader([lines[0][1]])) if lines else []
    kinetics, rows = "youtube_id" in header, []
    for where, line in lines[1:] if kinetics else lines:
        try:
            if kinetics:
                row = _kinetics_row(dict(zip(header, next(csv.reader([line])))), videos)
            else:
                row = _list_row(line, videos)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{where}: {error}: {line[:120]}") from None
        rows.append((where, *row))
    if len(rows) > 1 and rows[0][3] is None and not is_video(rows[0][2]) and is_video(rows[1][2]):
        raise ValueError(f"{rows[0][0]}: not a video (a header? lists have none): {lines[0][1]}")
    return rows


def _kinetics_row(row: dict[str, str], videos: Videos) -> tuple[str, str, str | None]:
    label, name = row.get("label"), row.get("youtube_id")
    if not label:
        raise ValueError("no label (a test list?)")
    start, end = (int(_number(row.get(key, ""))) for key in ("time_start", "time_end"))
    stem = f"{name}_{start:06d}_{end:06d}"
    return label, stem, videos.clip(stem, label) or videos.clip(name, label)


def _list_row(line: str, videos: Videos) -> tuple[str, str, str | None]:
    first, suffixes = line.split(",")[0], "|".join(map(re.escape, VIDEO_SUFFIXES))
    if is_video(line) or is_video(first) and re.search(r",.+,\d+,\d+$", line):  # UCF101, Moments
        name = line if is_video(line) else first
        label = Path(name).parent.name
        if not label:
            raise ValueError("expected `path label`, or a path that names the folder of its class")
    else:
        # What follows the suffix of the video; or, without one, a number after blank or comma; or a
        # name after the last comma or tab; or after a blank.
        match = (
            re.fullmatch(rf"(?i)(.+?(?:{suffixes}))[\s,]+(.+)", line)
            or re.fullmatch(r"(.+?)[\s,]+(\d+)", line)
            or re.fullmatch(r"(.+)[\t,](.+)", line)
            or re.fullmatch(r"(.+)\s(\S+)", line)
        )
        if not match:
            raise ValueError("expected `path label`")
        name, label = match[1].strip(), match[2].strip()
    if os.path.isfile(os.path.join(videos.folder, name)):
        return label, name, name
    # Moved, or has another suffix. But run/0003.mp4 is not walk/0003.mp4.
    found, folder = videos.clip(Path(name).stem, label), Path(name).parent.name
    same = not folder or found and Path(found).parent.name in (folder, label, "")
    return label, name, found if same else None


# ------------------------------------------------------------------------------------------------
# Transforms: video (V, T, H, W, 3) uint8 together with boxes (n, 4) in [0, 1] of it
# ------------------------------------------------------------------------------------------------


def crop(video: np.ndarray, boxes: np.ndarray, top: int, left: int, size: int) -> tuple:
    """-> the square, boxes cut off at its edges, share (n,) of each box's area that is inside."""
    height, width = video.shape[2:4]
    moved = (boxes * [width, height, width, height] - [left, top, left, top]) / size
    inside = moved.clip(0, 1)
    share = np.prod(inside[:, 2:] - inside[:, :2], 1) / np.prod(moved[:, 2:] - moved[:, :2], 1)
    return video[:, :, top : top + size, left : left + size], inside, share


def random_crop(rng: np.random.Generator, video: np.ndarray, boxes: np.ndarray, size: int) -> tuple:
    """-> a square that sees one of the boxes at least, all boxes on it, rows of the visible ones.

    Blind crops of 224 from short sides of 256 to 320 see nothing of 19 % of AVA's boxes at 16:9.
    """
    height, width = video.shape[2:4]
    for draw in range(CROP_DRAWS + 1):
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        if draw == CROP_DRAWS:
            x1, y1, x2, y2 = boxes[rng.integers(len(boxes))]
            top = int(np.clip((y1 + y2) / 2 * height - size / 2, 0, height - size))
            left = int(np.clip((x1 + x2) / 2 * width - size / 2, 0, width - size))
        square, inside, share = crop(video, boxes, top, left, size)
        visible = np.flatnonzero(share >= MIN_VISIBLE)
        if len(visible) or not len(boxes):
            break
    return square, inside, visible


def fixed_crops(video: np.ndarray, boxes: np.ndarray, size: int, count: int) -> tuple:
    """-> the central square, or 3 along the long side, of each view: (V * count, T, size, size, 3);
    and the boxes on the central one."""
    height, width = video.shape[2:4]
    cuts = []
    for place in ([0.5], [0.0, 0.5, 1.0])[count == 3]:
        top = round((height - size) * (place if height > width else 0.5))
        left = round((width - size) * (place if height <= width else 0.5))
        cuts.append(crop(video, boxes, top, left, size))
    squares = np.stack([square for square, _, _ in cuts], 1)  # (V, count, T, size, size, 3)
    return squares.reshape(-1, *squares.shape[2:]), cuts[count // 2][1]


def flip(video: np.ndarray, boxes: np.ndarray) -> tuple:
    """Left becomes right."""
    x1, y1, x2, y2 = boxes.T
    return video[:, :, :, ::-1], np.stack([1 - x2, y1, 1 - x1, y2], 1)


def jitter_colour(rng: np.random.Generator, video: np.ndarray, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation as one affine map of RGB, the same for all frames."""
    bright, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    luma = np.array([0.299, 0.587, 0.114])
    turn = bright * contrast * (saturation * np.eye(3) + (1 - saturation) * luma)  # (out, in)
    grey = bright * (1 - contrast) * (video[:, ::4, ::8, ::8] @ luma).mean()
    flat = video.reshape(-1, 3).astype(np.float32) @ turn.T.astype(np.float32) + np.float32(grey)
    return np.rint(flat.clip(0, 255)).astype(np.uint8).reshape(video.shape)


def normalise(video: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (B, T, H, W, 3), on its device, -> float32 (B, 3, T, H, W) less `mean`, over `std`.

    mean, std: RGB in [0, 1]; empty: each clip is standardised by its own colour and deviation.
    """
    video = video.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    if len(mean):
        mean, std = torch.tensor([mean, std], device=video.device).mul(255).view(2, 3, 1, 1, 1)
        return video.sub_(mean).div_(std)
    video -= video.mean((2, 3, 4), keepdim=True)
    # Five times as fast as std().
    deviation = torch.linalg.vector_norm(video, dim=(1, 2, 3, 4), keepdim=True)
    return video.div_((deviation / (video[0].numel() - 1) ** 0.5).clamp_min(1.0))


# ------------------------------------------------------------------------------------------------
# Datasets
# ------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """A clip before its video is opened."""

    key: tuple[str, int]  # box: (video id, microseconds in the movie); clip: (file, number)
    path: str
    time_sec: float  # of the keyframe in the file; nan: anywhere (clip tasks)
    label: int  # clip: column of its class
    boxes: np.ndarray  # (n, 4) float64, as annotated
    labels: np.ndarray  # (n, C) bool
    scores: np.ndarray  # (n,) float32, 1 for annotated boxes


class Items(Sequence):
    """The Items of a dataset as columns: worker processes share the pages of arrays, while objects
    are copied into each of them when their reference counts move (SlowFast#551)."""

    def __init__(self, folder: str, rows: list[tuple], classes: int):
        """rows: (key, file relative to the folder, time_sec, label, persons)"""
        self.folder = folder
        self.names = np.array([os.fsencode(row[0][0]) for row in rows])
        self.stamps = np.array([row[0][1] for row in rows], np.int64)
        self.files = np.array([os.fsencode(row[1]) for row in rows])
        self.times = np.array([row[2] for row in rows], np.float64)
        self.label = np.array([row[3] for row in rows], np.int64)
        self.first = np.cumsum([0, *(len(row[4]) for row in rows)])  # item i from first[i]
        persons = [person for row in rows for person in row[4]]
        self.boxes = np.array([person.box for person in persons], np.float64).reshape(-1, 4)
        self.scores = np.array([person.score for person in persons], np.float32)
        self.labels = np.zeros((len(persons), classes), bool)
        for n, person in enumerate(persons):
            self.labels[n, [label - 1 for label in person.labels]] = True

    def __len__(self) -> int:
        return len(self.stamps)

    def __getitem__(self, i: int) -> Item:
        n = slice(self.first[i], self.first[i + 1])
        return Item(
            (os.fsdecode(self.names[i]), int(self.stamps[i])),
            os.path.join(self.folder, os.fsdecode(self.files[i])),
            float(self.times[i]),
            int(self.label[i]),
            self.boxes[n],
            self.labels[n],
            self.scores[n],
        )

    def fingerprint(self) -> int:
        """Another one if any item is another one."""
        columns = [column for column in vars(self).values() if isinstance(column, np.ndarray)]
        return functools.reduce(lambda crc, column: zlib.crc32(column.tobytes(), crc), columns, 0)


@dataclass
class Sample:
    """An item, decoded and cut."""

    item: Item
    video: np.ndarray | None  # (V, T, H, W, 3) uint8, V = 1 in training; None: not decodable
    boxes: np.ndarray  # (n, 4) float32 in [0, 1] of the clip
    kept: np.ndarray  # (n,) their rows in the item
    labels: np.ndarray  # (n, C) bool
    label: int
    mix: float = 1.0  # share of this clip in its mixup


class Dataset:
    """A split of a task. `report`: what was counted; `missing`: video -> where it is wanted;
    `damaged`: file -> what is wrong with it, as found by evaluation_batches."""

    def __init__(
        self,
        task: Task,
        split: str,
        classes: list[str],
        items: Items,
        report: dict,
        missing: dict[str, str] | None = None,
    ):
        self.task, self.split, self.classes = task, split, classes
        self.items, self.report, self.missing = items, report, missing or {}
        self.videos = len(np.unique(items.files))
        self.damaged: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.items)

    def class_counts(self) -> dict[int, int]:
        """Boxes per action id (from 1), or clips per column (from 0)."""
        if self.task.kind == "box":
            return dict(enumerate(self.items.labels.sum(0).tolist(), 1))
        return dict(enumerate(np.bincount(self.items.label, minlength=len(self.classes)).tolist()))

    def sample(self, index: int, seed: Sequence[int] | None = None) -> Sample:
        """Item `index`, cut and augmented as `seed` draws; None: in all views of the evaluation.

        Raises DecodeError.
        """
        task, item = self.task, self.items[index]
        rng = None if seed is None else np.random.default_rng(seed)
        fit, clips, place, side = task.val_fit, task.views[0], 0.5, task.short_side[0]
        if rng:
            fit, clips, place = task.fit, 1, rng.random()
            side = int(rng.integers(side, task.short_side[1], endpoint=True))  # the decoder scales

        def times_sec(duration_sec: float) -> np.ndarray:
            steps = np.arange(task.frames) * task.step_sec
            if not math.isnan(item.time_sec):
                return item.time_sec + steps - task.frames // 2 * task.step_sec
            room = max(0.0, duration_sec - task.frames * task.step_sec)
            starts = np.linspace(0, room, clips) if clips > 1 else np.array([place * room])
            return (starts[:, None] + steps).ravel()  # all clips of a video in one decoding

        video = decode_clip(
            item.path,
            times_sec,
            **{
                "crop": dict(short_side=side),
                "squash": dict(size=(task.size, task.size)),
                "full": dict(short_side=side, multiple=16),
            }[fit],
        )
        video = video.reshape(clips, task.frames, *video.shape[1:])  # (V, T, h, w, 3)
        boxes, kept = item.boxes, np.arange(len(item.boxes))
        if fit == "crop" and rng:
            video, boxes, kept = random_crop(rng, video, boxes, task.size)
        elif fit == "crop":
            video, boxes = fixed_crops(video, boxes, task.size, task.views[1])
        boxes, labels, label = boxes[kept].clip(0, 1), item.labels[kept], item.label
        if rng and rng.random() < task.flip:
            video, boxes = flip(video, boxes)
            for i, j in task.flip_swap:
                label = {i: j, j: i}.get(label, label)
                if task.kind == "box":
                    labels[:, [i - 1, j - 1]] = labels[:, [j - 1, i - 1]]
        if rng and task.colour:
            video = jitter_colour(rng, video, task.colour)
        mix = rng.beta(task.mixup, task.mixup) if rng and task.mixup else 1.0
        return Sample(item, video, boxes.astype(np.float32), kept, labels, label, mix)


def open_task(task: Task, root: str | Path = ".", split: str = "train") -> Dataset:
    """Read the annotations of a split, find its videos and count what is missing.

    Raises FileNotFoundError if a path or more than `bad_share` of the videos does not exist,
    ValueError with file and line for what cannot be understood.
    """
    who = f"task {task.name!r} ({split})"
    paths = {
        "annotations": getattr(task, split),
        "labels": task.labels,
        "names": "" if task.labels else task.train,
        "videos": split == "val" and task.val_videos or task.videos or ".",
        "exclude": getattr(task, f"exclude_{split}"),
        "boxes": getattr(task, f"{split}_boxes"),
    }
    paths = {key: os.path.join(root, path) for key, path in paths.items() if path}
    if "annotations" not in paths:
        raise ValueError(f"{who}: `{split}` is not given")
    for key, path in paths.items():
        if not (glob.glob(path) if "*" in path else os.path.exists(path)):
            raise FileNotFoundError(f"{who}: {key} {path} does not exist")
    report, missing = {}, {}
    read = _read_box_task if task.kind == "box" else _read_clip_task
    rows, classes = read(task, split, paths, Videos(paths["videos"]), report, missing)
    items = Items(paths["videos"], rows, len(classes))
    dataset = Dataset(task, split, classes, items, report, missing)
    report |= {"items": len(rows), "videos": dataset.videos, "missing videos": len(missing)}
    if len(missing) > task.bad_share * (dataset.videos + len(missing)):
        name, where = next(iter(missing.items()))
        raise FileNotFoundError(
            f"{who}: {len(missing)} of {dataset.videos + len(missing)} videos are not in "
            f"{paths['videos']}, more than bad_share = {task.bad_share}; "
            f"the first is {name}, wanted by {where}"
        )
    if not rows:
        raise ValueError(f"{who}: {paths['annotations']} has nothing to {split} on: {report}")
    if split == "train" and task.flip:
        _check_flips(task, classes)
    return dataset


def _check_flips(task: Task, classes: list[str]) -> None:
    """A flipped "left to right" is a wrong label, unless it becomes "right to left"."""
    first, other = int(task.kind == "box"), {"left": "right", "right": "left"}
    turned = [re.sub("|".join(other), lambda word: other[word[0]], name) for name in classes]
    pairs = [
        [i, j]
        for i, name in enumerate(turned, first)
        if name in classes and (j := classes.index(name) + first) > i
    ]
    given = [sorted(pair) for pair in task.flip_swap]
    if any(pair not in given for pair in pairs):
        raise ValueError(
            f"task {task.name!r}: flip = {task.flip} mirrors "
            f"{classes[pairs[0][0] - first]!r}: set flip = 0.0 or flip_swap = {pairs}"
        )
    if wrong := [pair for pair in given if not first <= pair[0] <= pair[1] < len(classes) + first]:
        raise ValueError(
            f"task {task.name!r}: flip_swap has {wrong[0]}, but the labels are "
            f"{first}..{len(classes) + first - 1}"
        )


def _read_box_task(
    task: Task, split: str, paths: dict, videos: Videos, report: dict, missing: dict
) -> tuple[list[tuple], list[str]]:
    names = read_classes(paths["labels"])
    if not 1 <= min(names) <= max(names) < 2**15:
        raise ValueError(f"{paths['labels']}: ids {min(names)} to {max(names)}, expected 1..32767")
    classes = [names.get(number, f"class {number}") for number in range(1, max(names) + 1)]
    keyframes = read_boxes(paths["annotations"], len(classes), False, report)
    report["keyframes"] = len(keyframes)
    excluded = read_boxes(paths["exclude"], len(classes), False, {}) if "exclude" in paths else {}
    report["excluded keyframes"] = len(excluded.keys() & keyframes.keys())
    if "boxes" in paths:
        detected = read_boxes(paths["boxes"], len(classes), True, {})
        keyframes = _with_detections(task, split, keyframes, detected)
    rows = []
    for (video, stamp), persons in sorted(keyframes.items()):
        # Nobody in it: nothing to train, nothing to score.
        if not persons or (video, stamp) in excluded:
            continue
        if found := videos.at(video, stamp / 1e6, task.offset_sec):
            rows.append(((video, stamp), *found, -1, persons))
        else:
            missing.setdefault(video, f"{paths['annotations']} at {stamp / 1e6:g} s")
    report["boxes"] = sum(len(row[4]) for row in rows)
    return rows, classes


def _with_detections(task: Task, split: str, annotated: dict, detected: dict) -> dict:
    """Keyframes with annotated and detected persons (train), or with the detected alone (val; also
    keyframes without annotation, where all of them are false positives)."""
    movies = {video for video, _ in annotated}
    merged = dict(annotated) if split == "train" else {}
    for key, persons in detected.items():
        if key[0] not in movies or not persons:
            continue
        if split == "val":
            good = [p for p in persons if p.score >= task.val_box_score]
            good = good or [max(persons, key=lambda person: person.score)]
            merged[key] = [replace(person, labels=set()) for person in good]
            continue
        true = annotated.get(key, [])
        for person in persons:
            if person.score < task.train_box_score:
                continue
            if task.transfer_iou:
                best = max(true, key=lambda other: iou(person.box, other.box), default=None)
                if best is None or iou(person.box, best.box) < task.transfer_iou:
                    continue
                person = replace(person, labels=best.labels)
            merged[key] = [*merged.get(key, []), person]
    return merged


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes; in ava_eval.py too, since each file stands alone."""
    sides = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(0.0, sides[0]) * max(0.0, sides[1])
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def _read_clip_task(
    task: Task, split: str, paths: dict, videos: Videos, report: dict, missing: dict
) -> tuple[list[tuple], list[str]]:
    found = read_clips(paths["annotations"], videos, split)
    report["rows"] = len(found)
    if "labels" in paths:
        names = read_classes(paths["labels"])
    else:  # of `train` for both splits, which must agree
        other = split == "val" and "names" in paths
        train = read_clips(paths["names"], videos, "train") if other else found
        listed = {label for _, label, _, _ in train}
        if all(label.isdecimal() for label in listed):
            count = max(map(int, listed), default=-1) + 1
            if count > 100_000:
                raise ValueError(
                    f"{paths['annotations']}: class number {count - 1}, expected "
                    "numbers from 0 on; `labels` can give them names"
                )
            names = {n: str(n) for n in range(count)}
        else:
            names = dict(enumerate(sorted(listed)))
    classes = [names[number] for number in sorted(names)]
    columns = {str(number): column for column, number in enumerate(sorted(names))}
    columns |= {name: column for column, name in enumerate(classes)}
    rows = []
    for number, (where, label, name, file) in enumerate(found):
        if label not in columns:
            raise ValueError(
                f"{where}: {label!r} is not one of the {len(classes)} classes of "
                + (paths.get("labels") or paths.get("names", paths["annotations"]))
            )
        if file is None:
            missing[name] = where
        else:
            rows.append(((file, number), file, math.nan, columns[label], []))
    return rows, classes


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Clips of one task. The V views of an item (evaluation) are together: clip b is view b % V."""

    step: int
    task: str
    video: torch.Tensor  # (B, T, H, W, 3) uint8 RGB
    labels: torch.Tensor  # (B,) int64 | mixup: (B, C) float32 | boxes: (K, C) float32
    boxes: torch.Tensor | None  # (K, 4) float32 in [0, 1] of the clip
    box_clip: torch.Tensor | None  # (K,) int64, the clip of each box
    keys: list[tuple[str, int]]  # of the B clips, see Item
    scores: torch.Tensor | None  # (K,) float32 of the person detector, 1 for annotated boxes
    boxes_source: np.ndarray | None  # (K, 4) float64 as annotated: what a detections csv takes
    valid: torch.Tensor  # (B,) bool; False: not decodable, video 0, no boxes

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            **{
                name: change(value)
                for name, value in vars(self).items()
                if isinstance(value, torch.Tensor)
            },
        )

    def to(self, device: torch.device | str) -> "Batch":
        """All but the boxes, with which the model computes on the CPU (model.TaskHead.persons)."""
        moved = self.each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, boxes=self.boxes, box_clip=self.box_clip)

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader, so that copies to the GPU run beside its computing."""
        return self.each(torch.Tensor.pin_memory)


def make_batch(step: int, dataset: Dataset, samples: list[Sample], mixup: bool = False) -> Batch:
    """Stack samples; those without video become zeros, those without boxes are welcome."""
    task = dataset.task
    shape = next(
        (s.video.shape for s in samples if s.video is not None),
        (math.prod(task.views), task.frames, task.size, task.size, 3),
    )
    video = torch.from_numpy(
        np.concatenate([np.zeros(shape, np.uint8) if s.video is None else s.video for s in samples])
    )
    keys = [s.item.key for s in samples for _ in range(shape[0])]
    valid = torch.tensor([s.video is not None for s in samples]).repeat_interleave(shape[0])
    if task.kind == "box":
        return Batch(
            step,
            task.name,
            video,
            labels=torch.from_numpy(np.concatenate([s.labels for s in samples]).astype(np.float32)),
            boxes=torch.from_numpy(np.concatenate([s.boxes for s in samples])),
            box_clip=torch.tensor([b for b, s in enumerate(samples) for _ in s.boxes]).long(),
            scores=torch.from_numpy(np.concatenate([s.item.scores[s.kept] for s in samples])),
            boxes_source=np.concatenate([s.item.boxes[s.kept] for s in samples]),
            keys=keys,
            valid=valid,
        )
    labels = torch.tensor([s.label for s in samples]).repeat_interleave(shape[0])  # (B,)
    if mixup:
        # With the clip half a batch away: ranks taking every W-th clip mix equal pairs for any W.
        half, share = len(samples) // 2, torch.tensor([s.mix for s in samples])[:, None].float()
        labels = torch.nn.functional.one_hot(labels, len(dataset.classes)).float()
        labels = share * labels + (1 - share) * labels.roll(half, 0)  # (B, C)
        share = share[..., None, None, None]
        video = (share * video + (1 - share) * video.roll(half, 0)).round_().to(torch.uint8)
    return Batch(step, task.name, video, labels, None, None, keys, None, None, valid)


# ------------------------------------------------------------------------------------------------
# Many datasets, one stream
# ------------------------------------------------------------------------------------------------


class Stream:
    """What every step trains: a pure function of (seed, step), the same for any number of ranks.

    The c-th batch of a task is positions [cB, (c + 1)B) of its endless row of epochs, each epoch a
    permutation of its items; rank r of W takes every W-th. So each item comes once before any comes
    twice, small datasets go round as often as they must, and no rank runs out of data. Schedules:
    round_robin  the tasks in turn
    weighted     in a random order with exactly weight / sum(weights) of all steps each (PolyViT's)
    accumulate   all of them at each step, for one update: the joint objective exactly
    """

    def __init__(
        self,
        datasets: dict[str, Dataset],
        schedule: str = "round_robin",
        seed: int = 0,
        steps: int = 1000,
    ):
        self.datasets, self.schedule, self.seed, self.steps = datasets, schedule, seed, steps
        self.names = list(datasets)
        self.damaged: dict[str, int] = {}  # file -> times another item took its place
        rng, count = np.random.default_rng(seed), len(datasets)
        if schedule == "weighted":
            weights = np.array([dataset.task.weight for dataset in datasets.values()])
            share = weights / weights.sum() * steps
            times = share.astype(int)
            times[np.argsort(times - share, kind="stable")[: steps - times.sum()]] += 1
            self.order = rng.permutation(np.repeat(np.arange(count), times))
        elif schedule in ("round_robin", "accumulate"):
            self.order = np.arange(steps) % (1 if schedule == "accumulate" else count)
        else:
            raise ValueError(
                f"schedule = {schedule!r} is not one of round_robin, weighted, accumulate"
            )
        self.turn = np.zeros(steps, int)  # how often the task of a step came before
        for number in range(count):
            self.turn[self.order == number] = np.arange((self.order == number).sum())

    def tasks_at(self, step: int) -> list[str]:
        return self.names if self.schedule == "accumulate" else [self.names[self.order[step]]]

    def slots(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[str, int]]:
        """(task, position in its row of epochs) of each clip of a rank."""
        return [
            (name, int(self.turn[step]) * self.datasets[name].task.batch + place)
            for name in self.tasks_at(step)
            for place in range(rank, self.datasets[name].task.batch, world)
        ]

    def locate(self, name: str, position: int, further: int = 0) -> tuple[int, int]:
        """(epoch, index of the item) at a position, or some places further in the same epoch."""
        size = len(self.datasets[name])
        epoch, place = divmod(position, size)
        order = _permutation(self.seed, self.names.index(name), epoch, size)
        return epoch, int(order[(place + further) % size])

    def state(self) -> dict:
        """What a resumed run must find unchanged."""
        return {
            "seed": self.seed,
            "schedule": self.schedule,
            "steps": self.steps if self.schedule == "weighted" else None,
            "tasks": {
                name: {
                    "items": len(dataset),
                    "fingerprint": dataset.items.fingerprint(),
                    "batch": dataset.task.batch,
                    "weight": dataset.task.weight,
                }
                for name, dataset in self.datasets.items()
            },
        }

    def __getitem__(self, request: tuple[int, str, list[int]]) -> tuple[str, Batch | None, list]:
        """(task, batch, [(file, reason)] of what had to be replaced), made in a worker."""
        step, name, positions = request
        dataset, samples, damaged = self.datasets[name], [], []
        for position in positions:
            for further in range(IN_A_ROW):
                epoch, index = self.locate(name, position, further)
                seed = [self.seed, self.names.index(name), epoch, index]
                try:
                    samples.append(dataset.sample(index, seed))
                    break
                except DecodeError as error:
                    damaged.append((dataset.items[index].path, str(error)))
            else:
                return name, None, damaged
        return name, make_batch(step, dataset, samples, dataset.task.mixup > 0), damaged


@functools.lru_cache(maxsize=32)  # 40 ms and 6 MB for 800 000 items
def _permutation(seed: int, task: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, task, epoch]).permutation(size)


def training_batches(
    stream: Stream,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 1,
    micro: int = 1,
) -> Iterator[list[Batch]]:
    """For each step from start to stop - 1 the list of its micro-batches, of all its tasks.

    One pool of workers makes them ahead of time, each a whole micro-batch; 0 workers: made here.
    An undecodable item is replaced by the next of its epoch and counted in `stream.damaged`;
    ValueError when that befalls more than `bad_share` of a task's videos.
    """
    for name, dataset in stream.datasets.items():
        unit = world * micro * (2 if dataset.task.mixup else 1)
        if dataset.task.batch % unit:
            raise ValueError(
                f"task {name!r}: batch = {dataset.task.batch} is no multiple of {unit} = {world} "
                f"processes x {micro} micro-batches" + " x 2 for mixup" * (dataset.task.mixup > 0)
            )

    def requests() -> Iterator[tuple[int, str, list[int]]]:
        for step in range(start, stop):
            for name in stream.tasks_at(step):
                mine = [place for task, place in stream.slots(step, rank, world) if task == name]
                yield from ((step, name, mine[part::micro]) for part in range(micro))

    bad: dict[str, set[str]] = {name: set() for name in stream.names}
    batches = []
    for name, batch, damaged in _load(stream, requests(), workers):
        for path, reason in damaged:
            stream.damaged[path] = stream.damaged.get(path, 0) + 1
            bad[name].add(path)
            _check_share(stream.datasets[name], len(bad[name]), reason, stuck=batch is None)
        batches.append(batch)
        if len(batches) == micro * len(stream.tasks_at(batch.step)):
            yield batches
            batches = []


def evaluation_batches(
    dataset: Dataset, batch: int, rank: int = 0, world: int = 1, workers: int = 1
) -> Iterator[Batch]:
    """Items rank, rank + world, ... with all their views, each once: nothing is padded or replaced.

    `batch` counts clips, an item is V of them; "full" clips differ in size and come alone. What
    cannot be decoded is masked in `valid` and noted in `dataset.damaged`; past `bad_share` it is a
    ValueError.
    """
    task, mine = dataset.task, range(rank, len(dataset), world)
    items = 1 if task.val_fit == "full" else max(1, batch // math.prod(task.views))
    requests = (mine[first : first + items] for first in range(0, len(mine), items))
    for made, damaged in _load(_Evaluation(dataset), requests, workers):
        for path, reason in damaged:
            dataset.damaged[path] = reason
            _check_share(dataset, len(dataset.damaged), reason)
        yield made


class _Evaluation:
    """The items of a dataset as batches, made in a worker."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, indices: range) -> tuple[Batch, list]:
        samples, damaged, nothing = [], [], np.zeros(0, int)
        for index in indices:
            try:
                samples.append(self.dataset.sample(index))
            except DecodeError as error:
                item = self.dataset.items[index]
                samples.append(
                    Sample(
                        item,
                        None,
                        np.zeros((0, 4), np.float32),
                        nothing,
                        item.labels[nothing],
                        item.label,
                    )
                )
                damaged.append((item.path, str(error)))
        return make_batch(-1, self.dataset, samples), damaged


def _check_share(dataset: Dataset, bad: int, reason: str, stuck: bool = False) -> None:
    task = dataset.task
    if stuck or bad > task.bad_share * dataset.videos:
        raise ValueError(
            f"task {task.name!r} ({dataset.split}): {bad} of {dataset.videos} videos "
            f"cannot be decoded, bad_share = {task.bad_share}; the last is {reason}"
        )


def _load(source, requests: Iterator, workers: int) -> Iterator:
    """source[request] of each request, in order, made ahead by a pool of processes."""
    return iter(
        torch.utils.data.DataLoader(
            source,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_initialized(),
        )
    )


def _start_worker(number: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # both are the training process's affair
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(value):
    return value
