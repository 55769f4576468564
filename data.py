"""Video files and their annotations -> clips -> one stream of batches from many datasets.

Copied alone it needs torch, numpy and av (>= 18).

    task = Task("sport", "clip", train="list.txt", videos="videos", frames=16, batch=8)
    stream = Stream({"sport": open_task(task)}, steps=1000)
    for batches in training_batches(stream, 0, 1000):
        for batch in batches:                                    # several with `accumulate`
            video = normalise(batch.video, [0.5] * 3, [0.5] * 3)   # (B, 3, T, H, W), batch.labels

Processes that make batches ahead are a second file's: work=ahead(2), of extras/workers.py.

**The clock.** Frame k of a clip is what is on screen at `centre + (k - T/2) * stride / fps` sec:
frame T/2 is the keyframe, and clips of 12 fps, 29.97 fps and variable-rate videos last as long.
Files count from their first frame; before it and after the last one the nearest frame is held.
Annotations count in the ORIGINAL movie: AVA's "0902" is second 902 of the movie and second 2 of its
15-minute cut (`offset_sec = 900`), AVA-Kinetics' "17.010000" second 7.01 of `ID_000010_000020`.

**Annotations.** Box tasks: csv without header. Boxes are x1,y1,x2,y2 in [0,1]; a row per action:
    1j20qq1JyX4,0902,0.002,0.118,0.714,0.977,12,1      video, second, box, action, person (optional)
    00g-inkLork,5.016949                               AVA-Kinetics: a keyframe without actions
    1j20qq1JyX4,0902,0.036,0.098,0.550,0.979,,0.995518 detected person: action, '' or -1; SCORE
    _-Z6wFjXtGQ,0902                                   exclusion list
    label { name: "sit"  label_id: 11 }                action list; or  item { name: "sit"  id: 11 }
The video is the file under `videos` of that stem, or the clip `ID_START_END` around the second: so
AVA-Kinetics is one task, both csv in one (`cat`), both kinds of video under one folder.
Clip tasks: a folder per class, or a list of paths and class names or numbers:
    air drumming/x y.mp4 3                             or a comma or tab between
with a list of classes: `name,0`, `1 name`, or a name, in each line. UCF101's lists are such; what
else is in use (Kinetics, Moments in Time, Something-Something, HMDB51, spreadsheets), moved videos,
and stretches of long ones: extras/formats.py, a second file, open_task(task, formats=formats).

**All data is a pure function of (seed, step)**: the task a step trains, its clips, their crops. To
resume is to start at a step; numbers of workers and of ranks change nothing.

Shapes: `B` clips, `T,H,W` frames and pixels, `K` boxes in a batch, `C` classes, `V` views.
"""

import contextlib
import csv
import functools
import heapq
import math
import os
import re
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
from av.format import Flags
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

SUFFIXES = set(  # of files that FFmpeg opens; phones, camcorders, cameras, recorders, the web
    "mp4 m4v mov qt mkv webm avi divx mpg mpeg mpe m1v m2v mpv vob mod tod vro ts mts m2ts m2t tp "
    "trp flv f4v wmv asf 3gp 3g2 ogv ogm gif mxf gxf dv rm rmvb nut amv mjpg mjpeg 264 h264 avc "
    "265 h265 hevc ivf y4m dav insv".split()
)
SUFFIX = rf"(?i:\.(?:{'|'.join(SUFFIXES)}))"
MIN_VISIBLE = 0.2  # a box less visible than this in the training crop is no supervision: dropped
CROP_DRAWS = 10  # crops drawn to see a box, before one is centred on a box
IN_A_ROW = 20  # undecodable items in a row before training stops


# ------------------------------------------------------------------------------------------------
# Tasks: the [[task]] tables of a recipe
# ------------------------------------------------------------------------------------------------


def setting(default, help: str, **rules):
    """A field with what `--help` says of it. rules: least, most, above, below (bounds of a number,
    of each number of a list); free=True: a resumed run may change it; group="...": the heading that
    starts here."""
    metadata = {"help": help, **rules}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Task:
    """One dataset: its files, how clips are cut, what training does with them.

    Paths are relative to the recipe's `root`.
    """

    name: str = setting(MISSING, "of the task and its head", group="annotations and videos")
    kind: Literal["clip", "box"] = setting(MISSING, "a class per clip, or actions per person box")
    train: str = setting("", "annotations, in a format of data.py or extras/formats.py")
    val: str = setting("", "the same, to evaluate on", free=True)
    videos: str = setting("", "folder of the videos", free=True)
    val_videos: str = setting("", 'of the validation videos; "": the same folder', free=True)
    labels: str = setting("", 'list of classes; "": the names in `train`, sorted (clips)')
    eval_labels: str = setting("", 'actions of the mAP (AVA: 60 of 80); "": `labels`', free=True)
    exclude_train: str = setting("", "keyframes to leave out")
    exclude_val: str = setting("", "keyframes to leave out", free=True)
    train_boxes: str = setting("", "detected persons, trained beside the annotated ones")
    val_boxes: str = setting("", 'persons to evaluate on; "": the annotated (easier)', free=True)
    train_box_score: float = setting(0.9, "least score of a detection", least=0, most=1)
    val_box_score: float = setting(
        0.8, "the same; a keyframe where none has it keeps its best one", least=0, most=1, free=True
    )
    transfer_iou: float = setting(
        0.0, "detections take the labels of the person they overlap so much (AVA: 0.9), others go; "
        "0: the labels of their file", least=0, most=1)  # fmt: skip
    offset_sec: float = setting(0.0, "annotation time less file time; AVA's 15-minute cuts: 900")
    bad_share: float = setting(
        0.05,
        "of the videos: so many may be missing, and so many undecodable",
        least=0,
        most=1,
        free=True,
    )

    frames: int = setting(32, "of a clip", least=1, group="clips")
    stride: int = setting(2, "between frames, in frames of the clock", least=1)
    fps: float = setting(25.0, "of the clock, not of the files", above=0)
    size: int = setting(224, "px, side of the square clip", least=1)
    short_side: list[int] = setting([256, 320], "px, drawn; evaluation: the first", least=1)
    val_fit: Literal["", "crop", "full"] = setting(
        "", 'evaluation: crop, or full: the whole frame; "": crop for clips, full for boxes',
        free=True)  # fmt: skip
    views: list[int] = setting([1, 1], "evaluated: clips x crops (1 or 3)", least=1, free=True)
    flip: float = setting(0.5, "probability", least=0, most=1)
    flip_swap: list[list[int]] = setting(
        [], "labels that a flip exchanges: action ids; of clips, classes from 0"
    )
    colour: float = setting(0.0, "c: factors in [1 - c, 1 + c] of jitter_colour", least=0, most=1)
    mixup: float = setting(0.0, "a of Beta(a, a), clip tasks; 0: none", least=0)

    batch: int = setting(8, "clips per step, all ranks together", least=1, group="training")
    weight: float = setting(1.0, 'share of the steps in the "weighted" schedule', least=0)
    repeat_rare: float = setting(
        0.0, "t: items with a label that a share s < t of the items have come sqrt(t / s) times as "
        "often (LVIS, arXiv 1908.03195); 0: equally often", least=0, most=1)  # fmt: skip
    lr_scale: float = setting(
        1.0, "of this task's steps; sgd: on its gradients, before the momentum", least=0
    )
    loss_weight: float = setting(1.0, "times the loss", least=0)
    smoothing: float = setting(0.0, "of the labels, clip tasks", least=0, most=1)
    prior: float = setting(0.0, "first probability of an action; 0: a half", least=0, below=1)
    dropout: float = setting(0.0, "before the head", least=0, below=1)
    roi_size: int = setting(7, "bins per side under a box", least=1)

    def __post_init__(self):
        if not self.val_fit:
            self.val_fit = "full" if self.kind == "box" else "crop"

    @property
    def step_sec(self) -> float:
        """Seconds from one frame of a clip to the next."""
        return self.stride / self.fps


def task_problems(task: Task) -> list[str]:
    """What is wrong between the settings of a task, each of which is right by itself."""
    box, sides, views, swap = task.kind == "box", task.short_side, task.views, task.flip_swap
    crops = views[-1] if len(views) == 2 else 0
    rules = [
        (task.kind not in ("clip", "box"), f"kind = {task.kind!r} is neither clip nor box"),
        (not (task.train or task.val), "neither `train` nor `val` is given"),
        (box and not task.labels, "a box task needs `labels`, its action list"),
        (box and task.mixup, "mixup is for clip tasks"),
        (not box and task.prior, "prior is for box tasks"),
        (not box and (task.train_boxes or task.val_boxes), "person detections are for box tasks"),
        (task.transfer_iou and not task.train_boxes, "transfer_iou needs `train_boxes`"),
        (len(sides) != 2 or sides[0] > sides[1],
         f"short_side = {sides} is not two numbers, the smaller first"),
        (min(sides, default=0) < task.size,
         f"short_side = {sides} is less than the crop, size = {task.size}"),
        (crops not in (1, 3), f"views = {views} is not [clips, crops] with 1 or 3 crops"),
        (box and views != [1, 1], f"views = {views} is for clip tasks"),
        (crops == 3 and task.val_fit != "crop",
         f'views = {views}: 3 crops are for val_fit = "crop"'),
        (any(not isinstance(pair, list) or len(pair) != 2 for pair in swap),
         f"flip_swap = {swap} is not a list of pairs of labels"),
    ]  # fmt: skip
    return [sentence for wrong, sentence in rules if wrong]


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

    These are the frames of the whole video decoded. But decoding starts at the I-frame before the
    first of them, frames that nobody wants and no other refers to are skipped inside the decoder,
    and the wanted ones are scaled as yuv420p, before they become RGB.
    """
    with open_stream(path) as stream:
        if callable(times_sec):
            times_sec = times_sec(duration_sec(stream))
        targets = to_ticks(stream, times_sec)
        canvas = Canvas(len(targets), stream, short_side, size, multiple)
        if can_seek(stream):
            # libdav1d loses frames with NONREF. Seeks can land late (MPEG-TS, open GOPs).
            skip = stream.codec_context.name not in ("libdav1d", "av1", "libaom-av1")
            for back_sec, skip_here in ((0, skip), (10, False)):
                if _read_window(stream, targets, back_sec, skip_here, canvas):
                    return canvas.video
    with open_stream(path) as stream:
        places = sorted(range(len(targets)), key=targets.__getitem__)
        frames = on_screen(stream, sorted(targets))
        for place, frame in zip(places, frames, strict=True):
            canvas.put([place], frame)
        return canvas.video


@contextlib.contextmanager
def open_stream(path: str | Path) -> Iterator[av.VideoStream]:
    """The video of a file, ready for one thread. What cannot be read in the block: DecodeError."""
    try:
        # `file:`, or the hour in 10:00.mp4 is taken for a protocol. Titles in Latin-1 are no reason
        # to fail. Open files would wait for the garbage collector.
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            stream = container.streams.best("video")  # video[0] can be a thumbnail
            if stream is None or stream.codec_context is None:
                raise DecodeError(f"{path}: no video stream that can be decoded")
            if stream.disposition & Disposition.attached_pic:
                raise DecodeError(f"{path}: no video, only sound with a cover picture")
            # Set before the first packet, ignored later. Workers are the parallelism; threads would
            # read ahead, and with av.logging.set_level they deadlock (PyAV#751).
            stream.codec_context.thread_count = 1
            stream.codec_context.thread_type = "SLICE"
            yield stream
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{path}: {error.strerror or error}") from error


def path_of(stream: av.VideoStream) -> str:
    return stream.container.name.removeprefix("file:")


def format_is(stream: av.VideoStream, flag: Flags) -> bool:
    return bool(stream.container.format.flags & flag.value)


def is_avi(stream: av.VideoStream) -> bool:
    """Its packets tell only the order of decoding, not that of display."""
    return stream.container.format.name == "avi"


def has_clock(stream: av.VideoStream) -> bool:
    """False where a frame's time depends on where reading began: raw streams know none, MPEG
    program streams (DVDs) only that of some frames."""
    return stream.container.format.name != "mpeg" and not format_is(stream, Flags.no_timestamps)


def can_seek(stream: av.VideoStream) -> bool:
    """Whether a part of the file tells the times of its frames; else it is read from the start."""
    if is_avi(stream):
        return stream.codec_context.reorder_depth == 0
    if format_is(stream, Flags.ts_discont) and scan_clock(stream)[0]:
        return False  # recordings joined: its clock starts anew
    return has_clock(stream)


def to_ticks(stream: av.VideoStream, times_sec: Sequence[float]) -> list[int]:
    """Seconds from the first frame -> the timestamps of the stream at or before them."""
    # With a grace of half a millisecond (at most half a tick): floats fall short of 151/25 s, and
    # Matroska rounds a frame's own time to milliseconds.
    base = stream.time_base
    exact = np.asarray(times_sec, np.float64) * base.denominator / base.numerator
    whole = np.floor(exact + min(0.5, 0.0005 / float(base)))
    start = stream.start_time or 0
    return [start + int(tick) for tick in whole]


def frame_rate(stream: av.VideoStream) -> Fraction:
    """Frames per second as the file says; 25 where it does not."""
    if format_is(stream, Flags.no_timestamps):  # the demuxer says 25 for all of them
        return stream.codec_context.framerate or stream.average_rate or Fraction(25)
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def duration_sec(stream: av.VideoStream) -> float:
    """From the first frame to the end of the last one."""
    if not format_is(stream, Flags.ts_discont):
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if stream.container.duration:  # of the file only: Matroska, whose clock counts from 0
            seconds = stream.container.duration / av.time_base
            if "matroska" in stream.container.format.name:
                seconds -= float((stream.start_time or 0) * stream.time_base)
            return seconds
    return scan_clock(stream)[1]  # also of a recording that was interrupted


class Clock:
    """Gives frames (or packets) in their order ticks that never go back, whatever their stamps.

    What has no stamp is counted. Where recordings were joined (`cat`, a recorder's restart) and the
    stamps start anew, the time goes on one frame later; `jumps` counts these places. The limits of
    MPEG-TS are ffmpeg's own; elsewhere stamps can be in disorder, by fewer frames than a second's.
    """

    def __init__(self, stream: av.VideoStream):
        broadcast = format_is(stream, Flags.ts_discont)  # MPEG-TS, MPEG-PS
        back_sec = 0.1 if broadcast and has_clock(stream) else 1
        self.step = 1 / (frame_rate(stream) * stream.time_base)  # ticks of a frame
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


def scan_clock(stream: av.VideoStream) -> tuple[bool, float]:
    """Whether the clock of a file starts anew inside of it, and its length in seconds, by all of
    its packets; of MPEG-TS and -PS nothing else can tell. Once a file in each process."""
    path = path_of(stream)
    return _scan_clock(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _scan_clock(path: str, modified_ns: int) -> tuple[bool, float]:
    """modified_ns: a part of the cache's key, so that a file that was replaced is read anew."""
    with open_stream(path) as stream:
        clock = Clock(stream)
        first = None
        counted = format_is(stream, Flags.no_timestamps)
        for packet in stream.container.demux(stream):
            if packet.size:
                tick = clock.tick(None if counted else packet.dts)
                first = tick if first is None else first
        if first is None:
            return False, 0.0
        return clock.jumps > 0, float((clock.now + clock.step - first) * stream.time_base)


def _read_window(
    stream: av.VideoStream, targets: list[int], back_sec: float, skip: bool, canvas: "Canvas"
) -> bool:
    """Decode what the targets need, from the I-frame `back_sec` before them; False: impossible."""
    start = stream.start_time or 0
    first, last = max(min(targets), start), max(targets)
    try:
        back = round(back_sec / stream.time_base)  # ticks, which `seek` takes of a stream
        stream.container.seek(first - back, stream=stream)
    except av.FFmpegError:
        return False  # a format that cannot seek
    packets = []
    for packet in stream.container.demux(stream):  # a few seconds, nothing is decoded
        if packet.size:
            packets.append(packet)
        if not packet.size or packet.dts is not None and packet.dts > last:  # dts <= pts
            break
    if is_avi(stream) and any(packet.pts != packet.dts for packet in packets):
        return False  # a guess
    # Choosing among packets is exact for B-frames and variable rates, without an index. Those
    # between an I-frame and a cut (discard) are decoded but never on screen.
    shown = sorted({p.pts for p in packets if p.pts is not None and not p.is_discard})
    if not shown or shown[0] > first:
        return False
    _check_inside(stream, targets, shown[-1])
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
    """Put the wanted frames into the canvas; False if one did not come out, or not from an I-frame:
    where each picture renews a part of the last (intra-refresh), only the first frame is whole."""
    newest, whole = -math.inf, False
    for packet in [*packets, None]:  # None empties the decoder
        needed = not skip or packet is None or packet.pts in wanted
        decoder.skip_frame = "DEFAULT" if needed else "NONREF"
        try:
            frames = decoder.decode(packet)
        except av.InvalidDataError:
            if newest == -math.inf:
                return False  # begins inside a group of pictures
            raise
        for frame in frames:
            if frame.pts is None or frame.pts <= newest:
                return False  # timestamps that are not in the order of display
            newest = frame.pts
            whole = whole or frame.pict_type not in (PictureType.P, PictureType.B)
            if newest in wanted:
                if not whole:
                    return False
                canvas.put(wanted.pop(newest), frame)
        if not wanted:
            return True
    return False


def frames_in_order(stream: av.VideoStream) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, frame) of all frames from the start on: always right, and slow.

    AVI stamps packets in the order of decoding only. So the n-th frame takes the n-th stamp: a gap
    that a recorder left stays where it was. What cannot be decoded before the first frame is left
    out: files that begin inside a group of pictures.
    """
    clock = Clock(stream)
    counted = format_is(stream, Flags.no_timestamps)
    stamps: list[int] = []  # AVI: a heap of those whose frames are still in the decoder
    for packet in stream.container.demux(stream):
        if is_avi(stream) and packet.size:
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
            elif is_avi(stream):
                stamp = heapq.heappop(stamps) if stamps else None
            yield clock.tick(stamp), frame
        while len(stamps) > stream.codec_context.reorder_depth:  # of packets without a picture
            heapq.heappop(stamps)


def on_screen(stream: av.VideoStream, targets: list[int]) -> Iterator[av.VideoFrame]:
    """The frame at each of these ticks, which increase, of all frames from the start on."""
    shown, since, number = None, 0, 0
    for now, frame in frames_in_order(stream):
        while shown is not None and targets[number] < now:
            yield shown
            number += 1
            if number == len(targets):
                return
        shown, since = frame, now
    if shown is None:
        raise DecodeError(f"{path_of(stream)}: no frame could be decoded")
    _check_inside(stream, targets, since)
    for _ in targets[number:]:
        yield shown


def _check_inside(stream: av.VideoStream, targets: list[int], end: int) -> None:
    """DecodeError if all lie over a second outside: else a wrong offset trains a set on its first
    and last frames alone."""
    base, start = stream.time_base, stream.start_time or 0
    first, last = min(targets), max(targets)
    if first > end + 1 / base or last < start - 1 / base:
        raise DecodeError(
            f"{path_of(stream)}: asked for {float((first - start) * base):.3f}"
            f" to {float((last - start) * base):.3f} s, but the last frame is at "
            f"{float((end - start) * base):.3f} s"
        )


class Canvas:
    """Takes the frames of one clip and keeps them scaled, upright and in RGB in one array.

    All frames share its reformatters (a frame's own would build a scaler per frame). There are two:
    scaling planar yuv420p, then converting at equal size, takes 0.15 ms where one step takes 0.72
    (320 x 180 to 455 x 256).
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
        fitted = []
        for side in sides:
            units = max(int(side * scale / self.multiple + 0.5), 1)
            fitted.append(units * self.multiple)
        return fitted


def orientation(frame: av.VideoFrame) -> tuple[bool, tuple[slice, slice]]:
    """How a stored picture becomes upright: `swapaxes(0, 1)` or not, then `[flips]`.

    From the display matrix, as ffmpeg's autorotation: x' = a x + c y, y' = b x + d y. It may mirror
    (front cameras), which `frame.rotation` cannot say.
    """
    # Not frame.side_data: it keeps the frame, and the frame it, until the garbage collector comes.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
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


def files_of(path: str | Path) -> list[str]:
    """The file itself, or those of a pattern: `*` in its last part, as folders may hold [1]."""
    folder, name = os.path.split(path)
    if "*" not in name:
        return [str(path)]
    return sorted(map(str, Path(folder).glob(name)))


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """(`path:line`, text) of every line that is not blank, of a file or the files of a pattern."""
    for name in files_of(path):
        with open(name, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise ValueError(f"{name}:{number}: no text (UTF-8 is expected)")
                if line.strip():
                    yield f"{name}:{number}", line.strip()


def to_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1e9 < value < 1e9 or "_" in text:  # float("1_0") is 10; nan, inf
        raise ValueError(f"{text.strip()!r} is not a number")
    return value


def microseconds(time_sec: float) -> int:
    """The time in a keyframe's key, rounded as `%.6f` is, and as ava_eval.py does it: the product
    alone makes another keyframe of half of the times with a seventh decimal 5."""
    return round(round(time_sec, 6) * 1e6)


CLASS_LINES = (  # `1 name` or `1,name`; `name,1`; a name alone
    r"(?P<number>\d+)[ ,]\s*(?P<name>[^,;:\t\"]+)",
    r"(?P<name>[^,;:\t\"]+),(?P<number>\d+)",
    r"(?P<name>[^,;:\t\"]+)",
)
HEADER = r"(?:(?:ids?|index|number|labels?|class(?:es)?|names?|category)[\W_]*)+"


def read_classes(path: str | Path) -> dict[int, str]:
    """number -> name of an action list (.pbtxt), or of a text whose lines are all alike, but
    for a header; names alone count from 0."""
    if Path(path).suffix == ".pbtxt":
        return numbered(path, _pbtxt_classes(path))
    classes, form = [], None
    for where, line in read_lines(path):
        if not classes and re.fullmatch(HEADER, line.lower()):
            continue
        matches = (re.fullmatch(pattern, line) for pattern in CLASS_LINES)
        match = next(filter(None, matches), None)  # of the first pattern that fits
        if match and form is None:
            form = match.re  # all other lines have that of the first
        if match is None or match.re != form:
            raise ValueError(
                f"{where}: expected a name in each line, or `number name` or `name,number` in each "
                f"(extras/formats.py reads more): {line[:120]}"
            )
        number = match.groupdict().get("number", str(len(classes)))
        classes.append((number, match["name"].strip()))
    return numbered(path, classes)


def _pbtxt_classes(path: str | Path) -> list[tuple[str, str]]:
    quoted = "\"[^\"\n]*\"|'[^'\n]*'"
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    text = re.sub(rf"({quoted})|#.*", lambda match: match[1] or "", text)  # a class commented out
    classes = []
    blocks = re.findall(rf"(?:label|item)\s*\{{((?:[^{{}}\"']|{quoted})*)\}}", text)
    begun = len(re.findall(r"\b(?:label|item)\s*\{", re.sub(quoted, "", text)))
    if len(blocks) < begun:
        raise ValueError(f"{path}: {begun} items begin, {len(blocks)} are whole; was it cut off?")
    for block in blocks:
        name = re.search(rf"\bname\s*:\s*({quoted})", block)
        number = re.search(r"\b(?:label_)?id\s*:\s*(\d+)", re.sub(quoted, "", block))
        classes.append((number[1] if number else "", name[1][1:-1] if name else ""))
    return classes


def numbered(path: str | Path, classes: list[tuple[str, str]]) -> dict[int, str]:
    """number -> name of (number, name). ValueError if one is missing or comes twice."""
    names = {}
    for number, name in classes:
        if number.isdecimal():
            names[int(number)] = name
    different = len(set(names.values()))
    if not classes or not len(classes) == len(names) == different:
        raise ValueError(
            f"{path}: expected a list of classes with a name and a number each, all different; "
            f"found {len(classes)} entries, {len(names)} numbers, {different} names"
        )
    return names


def is_video(name: str) -> bool:
    """By its suffix. What macOS leaves beside each file (`._x.mp4`) and other hidden ones: no."""
    name = os.path.basename(name)
    return not name.startswith(".") and os.path.splitext(name)[1][1:].lower() in SUFFIXES


def list_videos(folder: str | Path, above: tuple[str, ...] = ()) -> list[str]:
    """The video files in a folder and below, as paths relative to it, each folder sorted.

    Hidden files and folders and __MACOSX are left out; links are followed, but not in circles
    (above: the real paths of the folders that this one was reached by).
    """
    here = os.path.join(os.path.realpath(folder), "")
    if any(path.startswith(here) for path in above):
        return []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # none, or one that may not be read, as lost+found
        return []
    videos = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            for name in list_videos(entry.path, (*above, here)):
                videos.append(f"{entry.name}{os.sep}{name}")
        elif is_video(entry.name):
            videos.append(entry.name)
    return videos


class Videos:
    """The video files under a folder, wherever they lie in it, by what annotations call them."""

    def __init__(self, folder: str | Path, files: list[str] | None = None):
        """files: paths relative to the folder; None: all that are there, listed when needed."""
        self.folder, self.given = str(folder), files
        self.listed: dict[str, set[str]] = {}  # folder -> names in it

    @functools.cached_property  # lists with full paths never need it
    def stems(self) -> dict[str, list[str]]:
        """stem -> files."""
        stems: dict[str, list[str]] = {}
        for file in list_videos(self.folder) if self.given is None else self.given:
            stems.setdefault(Path(file).stem, []).append(file)
        return stems

    @functools.cached_property
    def clips(self) -> dict[str, list[tuple[float, float, str]]]:
        """Kinetics: id -> (start, end, file) of its clips. Some ids have several."""
        clips: dict[str, list[tuple[float, float, str]]] = {}
        for stem, files in self.stems.items():
            if match := re.fullmatch(r"(.+)_(\d{6})_(\d{6})", stem):  # greedy: ids contain _
                clips.setdefault(match[1], []).append((float(match[2]), float(match[3]), files[0]))
        return clips

    def find(self, name: str) -> list[str]:
        """The files that a path or a stem can mean, with or without its suffix: one where all is
        well, none or several."""
        base = os.path.basename(name)
        stem = os.path.splitext(base)[0] if is_video(base) else base
        files = self.stems.get(stem, [])
        if name in (stem, base):
            return files
        return [file for file in files if name in (file, os.path.splitext(file)[0])]

    def at(self, video: str, time_sec: float, offset_sec: float) -> tuple[str, float] | None:
        """(file, seconds into it) of a time in the movie; of several clips the best around it."""
        files = self.find(video)
        if len(files) > 1:
            raise ValueError(f"{self.folder}: several videos are {video}: {', '.join(files)}")
        if files:
            return files[0], time_sec - offset_sec
        best = None
        for start, end, file in self.clips.get(video, ()):
            off_centre = abs(time_sec - (start + end) / 2)
            if start <= time_sec <= end and (best is None or off_centre < best[0]):
                best = off_centre, file, time_sec - start
        return best and best[1:]

    def clip(self, row: "ClipRow") -> str | None:
        """The file of a row of a clip task."""
        if self.is_there(row.name):
            return row.name
        files = self.find(row.name)
        return files[0] if len(files) == 1 else None

    def is_there(self, path: str) -> bool:
        """Asks each folder once: a disk over the network would not answer for a million files one
        by one."""
        folder, name = os.path.split(path)
        if folder not in self.listed:
            try:
                names = os.listdir(os.path.join(self.folder, folder))
            except OSError:
                names = []
            self.listed[folder] = set(filter(is_video, names))
        return name in self.listed[folder]


@dataclass
class Person:
    """A box of a keyframe with its action ids."""

    box: tuple[float, float, float, float]
    labels: set[int]
    score: float = 1.0
    annotated: bool = True  # or detected


def read_boxes(
    path: str | Path, classes: int, scored: bool = False, report: dict | None = None
) -> dict[tuple[str, int], list[Person]]:
    """(video id, microseconds) -> persons of a csv; `scored`: column 8 is a score, not a person.

    Microseconds, because "0902", "902" and "902.000000" are the same keyframe. One whose only row
    has two columns has no persons. Counts rows in `report`. Raises ValueError with file
    and line, also for annotations where detections are expected.
    """
    keyframes: dict[tuple[str, int], dict[tuple, Person]] = {}
    labelled, real = "", False  # the first row with an action; do such rows have real scores?
    report = {} if report is None else report
    report |= {"rows": 0, "empty boxes dropped": 0}
    for where, line in read_lines(path):
        row = next(csv.reader([line])) if '"' in line else line.split(",")
        try:
            if len(row) not in ((2, 8) if scored else (2, 7, 8)):
                expected = "2 or 8" if scored else "2, 7 or 8"
                raise ValueError(f"{len(row)} columns instead of {expected}, separated by commas")
            key = row[0].strip(), microseconds(to_number(row[1]))
            persons = keyframes.setdefault(key, {})
            report["rows"] += 1
            if len(row) == 2:
                continue
            box, label, score = _box_of_row(row, classes, scored)
        except ValueError as error:
            hint = " (a header? These files have none)" if where.endswith(":1") else ""
            raise ValueError(f"{where}: {error}{hint}: {line[:120]}") from None
        if scored and label != -1:
            labelled, real = labelled or where, real or not row[7].strip().isdecimal()
        if box[0] >= box[2] or box[1] >= box[3]:
            report["empty boxes dropped"] += 1
            continue
        # One person has the same numbers and the same id: rounded boxes would merge neighbours.
        identity = box if scored else (box, *row[7:])
        if identity not in persons:
            persons[identity] = Person(box, set(), score, annotated=not scored)
        person = persons[identity]
        if label != -1:
            person.labels.add(int(label))
        person.score = max(person.score, score)
    if labelled and not real:
        raise ValueError(
            f"{labelled}: an annotation (column 8 of all actions is a whole number, as a "
            "person's id is), expected a detection, whose column 8 is its score"
        )
    return {key: list(persons.values()) for key, persons in keyframes.items()}


def _box_of_row(row: list[str], classes: int, scored: bool) -> tuple[tuple, float, float]:
    """The box, the action (-1: none) and the score of a row. ValueError."""
    box = tuple(map(to_number, row[2:6]))
    if min(box) < -0.1 or max(box) > 1.1:
        raise ValueError("box outside [0, 1]")
    label = to_number(row[6].strip() or "-1")
    if label != -1 and (label != int(label) or not 1 <= label <= classes):
        raise ValueError(f"action {row[6]} is not in 1..{classes}")
    score = to_number(row[7]) if scored else 1.0
    if not 0 <= score <= 1:
        raise ValueError(f"score {row[7]} is not in [0, 1]")
    return box, label, score


class ClipRow(NamedTuple):
    """A row of the annotations of a clip task."""

    where: str  # file:line
    label: str  # name or number of its class
    name: str  # path of its video, relative to the folder of the videos; or only its stem
    start_sec: float = math.nan  # of a stretch of the video; nan: all of it
    end_sec: float = math.nan


def read_row(line: str) -> tuple[str, str]:
    """(path, label) of a line; of a path alone, its folder is the label, as in UCF101's tests."""
    match = re.fullmatch(rf"(.+?{SUFFIX})(?:[ ,\t]\s*(.+))?", line)
    if match is None:  # without a suffix
        match = re.fullmatch(r"([^\s,]+)[ ,\t]\s*(.+)", line)
    name, label = "", ""
    if match:
        name = match[1].replace("\\", "/")
        label = match[2] or os.path.basename(os.path.dirname(name))
    words = label.split()
    # Frames, seconds, boxes, several labels are no class.
    numbers = len(words) > 1 and any(re.fullmatch(r"-?[\d.]+", word) for word in words)
    if not label or numbers or re.search(r"[,;\t\"]|^-?\d*\.\d+$", label):
        raise ValueError(
            "expected `path label`, or a path that names the folder of its class "
            "(extras/formats.py reads more)"
        )
    return name, label


def read_clips(
    path: str, split: str, folder: str, read_row: Callable[[str], tuple[str, str]] = read_row
) -> Iterator[ClipRow]:
    """The rows of a list, or the videos in a folder per class, of a split of a clip task.

    folder: that of the videos. Raises ValueError with file, line and text.
    """
    if os.path.isdir(path):
        there = os.path.relpath(path, folder)
        for name in sorted(list_videos(path)):
            if os.sep not in name:
                raise ValueError(f"{path}: expected a folder per class, found the video {name}")
            yield ClipRow(path, name.split(os.sep)[0], os.path.join(there, name))
        return
    if "*" in os.path.basename(path) or path.endswith(".json"):
        raise ValueError(f"{path}: no list of videos; extras/formats.py reads other formats")
    first = None  # the first line, where it does not name a video
    for number, (where, line) in enumerate(read_lines(path)):
        try:
            name, label = read_row(line)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{where}: {error}: {line[:120]}") from None
        if number == 0 and not is_video(name):
            first = where, line
        if number == 1 and first and is_video(name):
            raise ValueError(f"{first[0]}: not a video (a header? lists have none): {first[1]}")
        yield ClipRow(where, label, name)


# ------------------------------------------------------------------------------------------------
# Transforms: video (..., T, H, W, 3) uint8 together with boxes (n, 4) in [0, 1] of it
# ------------------------------------------------------------------------------------------------


def crop(video: np.ndarray, boxes: np.ndarray, top: int, left: int, size: int) -> tuple:
    """-> the square, the boxes cut off at its edges, how visible (n,) each is: its area inside the
    square, over the largest area of it that such a square could show."""
    height, width = video.shape[-3:-1]
    moved = (boxes * [width, height, width, height] - [left, top, left, top]) / size
    inside = moved.clip(0, 1)
    most = (moved[:, 2:] - moved[:, :2]).clip(max=1)
    visible = np.prod((inside[:, 2:] - inside[:, :2]) / most, 1)
    return video[..., top : top + size, left : left + size, :], inside, visible


def random_crop(rng: np.random.Generator, video: np.ndarray, boxes: np.ndarray, size: int) -> tuple:
    """-> a square that sees one of the boxes at least, all boxes on it, rows of the visible ones.

    One blind crop of 224 from a short side of 256 to 320 sees less than MIN_VISIBLE of 27 % of the
    boxes (20,000 draws of those of ava_val_v2.1.csv, all taken as 16:9).
    """
    height, width = video.shape[-3:-1]
    for draw in range(CROP_DRAWS + 1):
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        if draw == CROP_DRAWS:
            x1, y1, x2, y2 = boxes[rng.integers(len(boxes))]
            top = int(np.clip((y1 + y2) / 2 * height - size / 2, 0, height - size))
            left = int(np.clip((x1 + x2) / 2 * width - size / 2, 0, width - size))
        square, inside, visible = crop(video, boxes, top, left, size)
        kept = np.flatnonzero(visible >= MIN_VISIBLE)
        if len(kept) or not len(boxes):
            break
    return square, inside, kept


def fixed_crops(video: np.ndarray, boxes: np.ndarray, size: int, count: int) -> tuple:
    """-> of each of V clips (V, T, H, W, 3) the central square, or 3 along the long side:
    (V * count, T, size, size, 3); and the boxes on the central one."""
    height, width = video.shape[-3:-1]
    places = [0.0, 0.5, 1.0] if count == 3 else [0.5]
    squares = []
    for place in places:
        down, right = (place, 0.5) if height > width else (0.5, place)
        top = round((height - size) * down)
        left = round((width - size) * right)
        square, inside, _ = crop(video, boxes, top, left, size)
        squares.append(square)
        if place == 0.5:
            central = inside
    video = np.stack(squares, 1)  # (V, count, T, size, size, 3)
    return video.reshape(-1, *video.shape[2:]), central


def flip(video: np.ndarray, boxes: np.ndarray) -> tuple:
    """Left becomes right."""
    x1, y1, x2, y2 = boxes.T
    return video[..., ::-1, :], np.stack([1 - x2, y1, 1 - x1, y2], 1)


def jitter_colour(rng: np.random.Generator, video: np.ndarray, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation as one affine map of RGB, the same for all frames."""
    bright, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    luma = np.array([0.299, 0.587, 0.114])
    turn = bright * contrast * (saturation * np.eye(3) + (1 - saturation) * luma)  # (out, in)
    turn = turn.T.astype(np.float32)
    grey = bright * (1 - contrast) * (video[..., ::4, ::8, ::8, :] @ luma).mean()
    result = np.empty_like(video)
    height, width = video.shape[-3:-1]
    old, new = video.reshape(-1, height * width, 3), result.reshape(-1, height * width, 3)
    for frame, changed in zip(old, new, strict=True):  # one by one they stay in the cache
        pixels = frame.astype(np.float32) @ turn
        pixels += np.float32(grey)
        np.clip(pixels, 0, 255, out=pixels)
        changed[:] = np.rint(pixels, out=pixels)
    return result


def normalise(video: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (B, T, H, W, 3), on its device, -> float32 (B, 3, T, H, W) less `mean`, over `std`.

    mean, std: RGB in [0, 1]; empty: each clip is standardised by its own colour and deviation.
    """
    video = video.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    if len(mean):
        mean, std = torch.tensor([mean, std], device=video.device).mul(255).view(2, 3, 1, 1, 1)
        return video.sub_(mean).div_(std)
    video -= video.mean((2, 3, 4), keepdim=True)
    # On a CPU std() takes 68 ms where this takes 1.6 (2 clips of 32 x 224 x 224, torch 2.13).
    deviation = torch.linalg.vector_norm(video, dim=(1, 2, 3, 4), keepdim=True)
    return video.div_((deviation / (video[0].numel() - 1) ** 0.5).clamp_min(1.0))


# ------------------------------------------------------------------------------------------------
# Datasets: items, each a clip before its video is opened; samples, clips that were
# ------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """A clip before its video is opened."""

    key: tuple[str, int]  # box: (video id, microseconds in the movie); clip: (file, number)
    path: str
    time_sec: float  # of the keyframe in the file; clip: where its stretch begins; nan: anywhere
    label: int  # clip: column of its class
    boxes: np.ndarray  # (n, 4) float64, as annotated
    labels: np.ndarray  # (n, C) bool
    scores: np.ndarray  # (n,) float32, 1 for annotated boxes
    end_sec: float = math.nan  # clip: where its stretch ends


class Items(Sequence):
    """The Items of a dataset as columns: worker processes share the pages of arrays, while objects
    are copied into each of them when their reference counts move (SlowFast#551)."""

    def __init__(self, folder: str, rows: Iterable[tuple], classes: int):
        """rows: (key, file relative to the folder, time_sec, label, persons[, end_sec])"""
        self.folder = folder
        names, stamps, files = [], [], []  # of the items
        times, ends, label = [], [], []
        counts, persons = [], []
        for (name, stamp), file, time_sec, column, people, *end_sec in rows:
            files.append(os.fsencode(file))
            names.append(files[-1] if name == file else os.fsencode(name))
            stamps.append(stamp)
            times.append(time_sec)
            ends.append(end_sec[0] if end_sec else math.nan)
            label.append(column)
            counts.append(len(people))
            persons += people
        self.files = np.array(files)
        self.names = self.files if names == files else np.array(names)
        self.stamps = np.array(stamps, np.int64)
        self.times = np.array(times, np.float64)
        self.ends = np.array(ends, np.float64)
        self.label = np.array(label, np.int64)
        self.first = np.cumsum([0, *counts])  # the boxes of item i begin at first[i]
        self.boxes = np.array([person.box for person in persons], np.float64).reshape(-1, 4)
        self.scores = np.array([person.score for person in persons], np.float32)
        self.annotated = np.array([person.annotated for person in persons], bool)
        self.labels = np.zeros((len(persons), classes), bool)
        for row, person in zip(self.labels, persons, strict=True):
            row[[action - 1 for action in person.labels]] = True

    def __len__(self) -> int:
        return len(self.stamps)

    def __getitem__(self, i: int) -> Item:
        persons = slice(self.first[i], self.first[i + 1])
        return Item(
            key=(os.fsdecode(self.names[i]), int(self.stamps[i])),
            path=os.path.join(self.folder, os.fsdecode(self.files[i])),
            time_sec=float(self.times[i]),
            label=int(self.label[i]),
            boxes=self.boxes[persons],
            labels=self.labels[persons],
            scores=self.scores[persons],
            end_sec=float(self.ends[i]),
        )

    def fingerprint(self) -> int:
        """Another one if any item is another one."""
        crc, persons = 0, (self.boxes, self.scores, self.labels, self.annotated)
        columns = (self.names, self.stamps, self.files, self.times, self.ends, self.label)
        for column in (*columns, self.first, *persons):
            crc = zlib.crc32(column.tobytes(), crc)
        return crc


@dataclass
class Dataset:
    """A split of a task."""

    task: Task
    split: str
    classes: list[str]
    items: Items
    report: dict[str, int]  # what was counted
    missing: dict[str, str] = field(default_factory=dict)  # video -> where it is wanted
    missing_items: int = 0  # clips or keyframes of these
    damaged: dict[str, str] = field(default_factory=dict)  # file -> why it could not be evaluated

    def __post_init__(self):
        self.videos = len(set(self.items.files.tolist()))

    def __len__(self) -> int:
        return len(self.items)

    def class_counts(self) -> dict[int, int]:
        """Annotated boxes per action id (from 1), or clips per column (from 0)."""
        if self.task.kind == "box":
            annotated = self.items.labels[self.items.annotated]
            return dict(enumerate(annotated.sum(0).tolist(), 1))
        return dict(enumerate(np.bincount(self.items.label, minlength=len(self.classes)).tolist()))


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


def training_sample(task: Task, item: Item, rng: np.random.Generator) -> Sample:
    """An item cut and augmented as `rng` draws. Raises DecodeError."""
    place = rng.random()  # of a clip in its video; a keyframe has its own
    side = int(rng.integers(*task.short_side, endpoint=True))  # the decoder scales to it
    video = decode_clip(item.path, clip_times(task, item, [place]), short_side=side)  # (T, h, w, 3)
    video, boxes, kept = random_crop(rng, video, item.boxes, task.size)  # (T, size, size, 3)
    boxes, labels, label = boxes[kept], item.labels[kept], item.label
    if rng.random() < task.flip:
        video, boxes = flip(video, boxes)
        for i, j in task.flip_swap:
            label = {i: j, j: i}.get(label, label)
            if task.kind == "box":
                labels[:, [i - 1, j - 1]] = labels[:, [j - 1, i - 1]]
    if task.colour:
        video = jitter_colour(rng, video, task.colour)
    mix = rng.beta(task.mixup, task.mixup) if task.mixup else 1.0
    return Sample(item, video[None], boxes.astype(np.float32), kept, labels, label, mix)


def evaluation_sample(task: Task, item: Item) -> Sample:
    """An item in all its views: `views` clips over the video x crops. Raises DecodeError."""
    clips, crops = task.views
    places = np.linspace(0, 1, clips) if clips > 1 else [0.5]
    multiple = 16 if task.val_fit == "full" else 1
    times_sec = clip_times(task, item, places)  # all clips of the video in one decoding
    video = decode_clip(item.path, times_sec, task.short_side[0], multiple=multiple)
    video = video.reshape(clips, task.frames, *video.shape[1:])  # (clips, T, h, w, 3)
    boxes = item.boxes
    if task.val_fit == "crop":
        video, boxes = fixed_crops(video, boxes, task.size, crops)  # (V, T, size, size, 3)
    boxes = boxes.clip(0, 1).astype(np.float32)
    return Sample(item, video, boxes, np.arange(len(boxes)), item.labels, item.label)


def no_sample(item: Item) -> Sample:
    """Of an item that cannot be decoded."""
    nothing = np.zeros(0, int)
    boxes, labels = item.boxes[nothing].astype(np.float32), item.labels[nothing]
    return Sample(item, None, boxes, nothing, labels, item.label)


def clip_times(task: Task, item: Item, places: Sequence[float]) -> Sequence[float] | Callable:
    """Seconds of the frames of an item: around its keyframe; or of clips at these places, 0 to 1,
    in its video or the stretch of it, as a function of the video's duration."""
    steps_sec = np.arange(task.frames) * task.step_sec
    if task.kind == "box":  # frame T/2 is the keyframe
        return item.time_sec + steps_sec - task.frames // 2 * task.step_sec

    def times_sec(duration_sec: float) -> np.ndarray:
        start_sec, length_sec = 0.0, duration_sec
        if not math.isnan(item.end_sec):
            start_sec, length_sec = item.time_sec, item.end_sec - item.time_sec
        room_sec = length_sec - task.frames * task.step_sec
        if room_sec < 0:  # a short stretch is in the middle of its clip
            start_sec, room_sec = max(0.0, start_sec + room_sec / 2), 0.0
        starts_sec = start_sec + np.asarray(places) * room_sec
        return (starts_sec[:, None] + steps_sec).ravel()

    return times_sec


def open_task(
    task: Task, root: str | Path = ".", split: str = "train", formats: ModuleType | None = None
) -> Dataset:
    """Read the annotations of a split, find its videos and count what is missing.

    formats: extras/formats.py reads more than this file, by the same names: read_clips,
    read_classes and Videos.
    Raises FileNotFoundError if a path or more than `bad_share` of the videos does not exist,
    ValueError with file and line for what cannot be understood.
    """
    who = f"task {task.name!r} ({split})"
    if problems := task_problems(task):
        raise ValueError(f"{who}: {'; '.join(problems)}")
    videos = task.videos or "."
    if split == "val" and task.val_videos:
        videos = task.val_videos
    paths = {
        "annotations": getattr(task, split),
        "labels": task.labels,
        "names": "" if task.labels else task.train,
        "videos": videos,
        "exclude": getattr(task, f"exclude_{split}"),
        "boxes": getattr(task, f"{split}_boxes"),
    }
    paths = {key: os.path.join(root, path) for key, path in paths.items() if path}
    if "annotations" not in paths:
        raise ValueError(f"{who}: `{split}` is not given")
    for key, path in paths.items():
        for file in files_of(path) or [path]:
            if not os.path.exists(file):
                raise FileNotFoundError(f"{who}: {key} {path} does not exist")
    open_kind = _open_boxes if task.kind == "box" else _open_clips
    dataset = open_kind(task, split, paths, formats or sys.modules[__name__])
    found, missing = dataset.videos, dataset.missing
    dataset.report |= {"items": len(dataset), "videos": found, "missing videos": len(missing)}
    if len(missing) > task.bad_share * (found + len(missing)):
        name, where = next(iter(missing.items()))
        raise FileNotFoundError(
            f"{who}: {len(missing)} of {found + len(missing)} videos are not in "
            f"{paths['videos']}, more than bad_share = {task.bad_share}; "
            f"the first is {name}, wanted by {where}"
        )
    if not len(dataset):
        counted = ", ".join(f"{count} {what}" for what, count in dataset.report.items())
        raise ValueError(f"{who}: {paths['annotations']} has nothing to {split} on: {counted}")
    if split == "train" and task.flip:
        _check_flips(task, dataset.classes)
    return dataset


def _open_boxes(task: Task, split: str, paths: dict[str, str], formats: ModuleType) -> Dataset:
    names = formats.read_classes(paths["labels"])
    if not 1 <= min(names) <= max(names) < 2**15:
        raise ValueError(f"{paths['labels']}: ids {min(names)} to {max(names)}, expected 1..32767")
    classes = [names.get(number, f"class {number}") for number in range(1, max(names) + 1)]
    report: dict[str, int] = {}
    keyframes = read_boxes(paths["annotations"], len(classes), report=report)
    excluded = read_boxes(paths["exclude"], len(classes)) if "exclude" in paths else {}
    report["keyframes"] = len(keyframes)
    report["excluded keyframes"] = len(excluded.keys() & keyframes.keys())
    if "boxes" in paths:
        detected = read_boxes(paths["boxes"], len(classes), scored=True)
        merge = _add_detections if split == "train" else _take_detections
        keyframes = merge(task, keyframes, detected)
    videos = formats.Videos(paths["videos"])
    rows = []
    missing, missing_items = {}, 0
    for (video, stamp), persons in sorted(keyframes.items()):
        # Nobody in it: nothing to train, nothing to score.
        if not persons or (video, stamp) in excluded:
            continue
        place = videos.at(video, stamp / 1e6, task.offset_sec)
        if place is None:
            missing.setdefault(video, f"{paths['annotations']} at {stamp / 1e6:g} s")
            missing_items += 1
        else:
            file, time_sec = place
            rows.append(((video, stamp), file, time_sec, -1, persons))
    report["boxes"] = sum(len(persons) for *_, persons in rows)
    items = Items(paths["videos"], rows, len(classes))
    return Dataset(task, split, classes, items, report, missing, missing_items)


Keyframes = dict[tuple[str, int], list[Person]]


def _add_detections(task: Task, annotated: Keyframes, detected: Keyframes) -> Keyframes:
    """Training: annotated and detected persons, of the movies that have annotations."""
    movies = {video for video, _ in annotated}
    merged = dict(annotated)
    for key, persons in detected.items():
        if key[0] not in movies:
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


def _take_detections(task: Task, annotated: Keyframes, detected: Keyframes) -> Keyframes:
    """Evaluation: the detected persons alone, also of keyframes without annotation, where all of
    them are false positives."""
    movies = {video for video, _ in annotated}
    merged = {}
    for key, persons in detected.items():
        if key[0] not in movies or not persons:
            continue
        good = [person for person in persons if person.score >= task.val_box_score]
        good = good or [max(persons, key=lambda person: person.score)]
        merged[key] = [replace(person, labels=set()) for person in good]
    return merged


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes; in ava_eval.py too, since each file stands alone."""
    sides = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(0.0, sides[0]) * max(0.0, sides[1])
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def _open_clips(task: Task, split: str, paths: dict[str, str], formats: ModuleType) -> Dataset:
    annotations, folder = paths["annotations"], paths["videos"]
    if "labels" in paths:
        source = paths["labels"]
        names = formats.read_classes(source)
    else:  # of `train` for both splits, which must agree
        source = paths.get("names", annotations)
        names = _listed_classes(source, formats.read_clips(source, "train", folder))
    classes = [names[number] for number in sorted(names)]
    if len(classes) == 1:
        raise ValueError(f"{source}: 1 class, expected two at least")
    columns = {name: column for column, name in enumerate(classes)}
    numbers = {}  # a list of classes gives them; without one they are called what the rows say
    if "labels" in paths:
        numbers = {str(number): column for column, number in enumerate(sorted(names))}
    videos = formats.Videos(folder)
    missing, report = {}, {"rows": 0}

    def rows() -> Iterator[tuple]:
        for number, row in enumerate(formats.read_clips(annotations, split, folder)):
            report["rows"] += 1
            column = columns.get(row.label, numbers.get(row.label))
            if column is None:
                raise ValueError(
                    f"{row.where}: {row.label!r} is not one of the {len(classes)} classes of "
                    f"{source}"
                )
            if numbers.get(row.label, column) != column:
                raise ValueError(
                    f"{row.where}: {row.label} is the name of one class of {source} and the number "
                    f"of another, {classes[numbers[row.label]]}; expected names that are no numbers"
                )
            file = videos.clip(row)
            if file is None:
                missing.setdefault(row.name, row.where)
            else:
                yield (file, number), file, row.start_sec, column, (), row.end_sec

    items = Items(folder, rows(), len(classes))
    missing_items = report["rows"] - len(items)
    return Dataset(task, split, classes, items, report, missing, missing_items)


def _listed_classes(path: str, rows: Iterable[ClipRow]) -> dict[int, str]:
    """The classes of a task without a list of them: numbers up to the highest, or sorted names."""
    labels = {row.label for row in rows}
    if not all(re.fullmatch(r"0|[1-9]\d*", label) for label in labels):  # folders 01, 02: names
        return dict(enumerate(sorted(labels)))
    count = max(map(int, labels), default=-1) + 1
    if count > 100_000:
        raise ValueError(
            f"{path}: class number {count - 1}, expected numbers from 0 on; "
            "`labels` can give them names"
        )
    return {number: str(number) for number in range(count)}


def _check_flips(task: Task, classes: list[str]) -> None:
    """A flipped "left to right" is a wrong label, unless it becomes "right to left". ValueError."""
    first = 1 if task.kind == "box" else 0  # number of the first class
    other = {"left": "right", "right": "left"}
    numbers = {name.lower(): number for number, name in enumerate(classes, first)}
    given = [sorted(pair) for pair in task.flip_swap]
    missing = []
    for name, number in numbers.items():
        turned = re.sub("left|right", lambda word: other[word[0]], name)
        partner = numbers.get(turned, number)
        if number < partner and [number, partner] not in given:
            missing.append([number, partner])
        one_sided = turned not in numbers and re.search(r"\b(left|right)\b", name)
        if one_sided and not any(number in pair for pair in given):
            raise ValueError(
                f"task {task.name!r}: flip = {task.flip} mirrors {classes[number - first]!r}, of "
                "which no class is the mirror image: set flip = 0.0, or flip_swap = "
                f"{given + [[number, number]]} if it may be mirrored"
            )
    last = len(classes) + first - 1
    if missing:
        raise ValueError(
            f"task {task.name!r}: flip = {task.flip} mirrors {classes[missing[0][0] - first]!r}: "
            f"set flip = 0.0 or flip_swap = {given + missing}"
        )
    for low, high in given:
        if low < first or high > last:
            raise ValueError(
                f"task {task.name!r}: flip_swap has {[low, high]}, but the labels are "
                f"{first}..{last}"
            )


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Clips of one task. The V views of an item (evaluation) are together: clip b is view b % V."""

    task: str
    video: torch.Tensor  # (B, T, H, W, 3) uint8 RGB
    labels: torch.Tensor  # (B,) int64 | mixup: (B, C) float32 | boxes: (K, C) float32
    boxes: torch.Tensor | None  # (K, 4) float32 in [0, 1] of the clip
    box_clip: torch.Tensor | None  # (K,) int64, the clip of each box
    keys: list[tuple[str, int]]  # of the B clips, see Item
    scores: torch.Tensor | None  # (K,) float32 of the person detector, 1 for annotated boxes
    boxes_source: np.ndarray | None  # (K, 4) float64 as annotated: what a detections csv takes
    valid: torch.Tensor  # (B,) bool; False: not decodable, video 0, no boxes
    damaged: dict[str, str]  # file that could not be decoded -> why

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with every tensor changed."""
        tensors = {key: value for key, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **{key: change(value) for key, value in tensors.items()})

    def to(self, device: torch.device | str) -> "Batch":
        """All but the boxes, with which the model computes on the CPU (model.TaskHead.persons)."""
        moved = self.each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, boxes=self.boxes, box_clip=self.box_clip)

    def pin_memory(self) -> "Batch":
        """In pages that copies to a GPU can read beside its computing."""
        return self.each(torch.Tensor.pin_memory)


def make_batch(
    dataset: Dataset, samples: list[Sample], damaged: dict[str, str], training: bool
) -> Batch:
    """Stack samples; those without video become zeros, those without boxes are welcome."""
    task = dataset.task
    views = 1 if training else math.prod(task.views)
    shape = (views, task.frames, task.size, task.size, 3)
    for sample in samples:
        if sample.video is not None:
            shape = sample.video.shape
    nothing = np.zeros(shape, np.uint8)
    videos = [nothing if sample.video is None else sample.video for sample in samples]
    batch = Batch(
        task.name,
        video=torch.from_numpy(np.concatenate(videos)),
        labels=torch.tensor([s.label for s in samples]).repeat_interleave(views),  # (B,)
        boxes=None,
        box_clip=None,
        keys=[sample.item.key for sample in samples for _ in range(views)],
        scores=None,
        boxes_source=None,
        valid=torch.tensor([s.video is not None for s in samples]).repeat_interleave(views),
        damaged=damaged,
    )
    if task.kind == "box":
        labels = np.concatenate([sample.labels for sample in samples]).astype(np.float32)
        boxes = np.concatenate([sample.boxes for sample in samples])
        scores = np.concatenate([sample.item.scores[sample.kept] for sample in samples])
        counts = torch.tensor([len(sample.boxes) for sample in samples])
        batch.labels = torch.from_numpy(labels)  # (K, C)
        batch.boxes = torch.from_numpy(boxes)  # (K, 4)
        batch.scores = torch.from_numpy(scores)  # (K,)
        batch.box_clip = torch.arange(len(samples)).repeat_interleave(counts)  # (K,)
        batch.boxes_source = np.concatenate([s.item.boxes[s.kept] for s in samples])
    elif training and task.mixup:
        shares = torch.tensor([sample.mix for sample in samples])[:, None].float()  # (B, 1)
        _mix(batch, shares, len(dataset.classes))
    return batch


def _mix(batch: Batch, shares: torch.Tensor, classes: int) -> None:
    """Mix every clip with the one half a batch away: ranks that take every W-th clip mix equal
    pairs for any W."""
    half = len(shares) // 2
    labels = torch.nn.functional.one_hot(batch.labels, classes).float()
    batch.labels = shares * labels + (1 - shares) * labels.roll(half, 0)  # (B, C)
    shares = shares[..., None, None, None]  # (B, 1, 1, 1, 1)
    mixed = shares * batch.video + (1 - shares) * batch.video.roll(half, 0)
    batch.video = mixed.round_().to(torch.uint8)


# ------------------------------------------------------------------------------------------------
# Many datasets, one stream
# ------------------------------------------------------------------------------------------------


class Stream:
    """What every step trains: a pure function of (seed, step), the same for any number of ranks.

    The c-th batch of a task is positions [cB, (c + 1)B) of its endless row of epochs, each epoch a
    permutation of its items; rank r of W takes every W-th. So each item comes once before any comes
    twice (but for repeat_rare), small datasets go round as often as they must, and no rank runs out
    of data. Schedules:
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
        self.datasets, self.schedule = datasets, schedule
        self.seed, self.steps = seed, steps
        self.names = list(datasets)
        # task -> file -> what is wrong with it: another item takes its place
        self.damaged: dict[str, dict[str, str]] = {name: {} for name in datasets}
        self.repeats = {name: repeat_factors(dataset) for name, dataset in datasets.items()}
        self.epochs: dict[tuple[str, int], np.ndarray] = {}  # the last orders that were asked for
        count = len(datasets)
        if schedule == "weighted":
            weights = np.array([dataset.task.weight for dataset in datasets.values()])
            if not weights.sum() > 0:
                raise ValueError("schedule = 'weighted': all weights are 0")
            share = weights / weights.sum() * steps
            times = share.astype(int)
            left = steps - times.sum()
            largest_remainders = np.argsort(times - share, kind="stable")[:left]
            times[largest_remainders] += 1
            rng = random_numbers(seed, "schedule")
            self.numbers = rng.permutation(np.repeat(np.arange(count), times))
        elif schedule in ("round_robin", "accumulate"):
            self.numbers = np.arange(steps) % (1 if schedule == "accumulate" else count)
        else:
            raise ValueError(
                f"schedule = {schedule!r} is not one of round_robin, weighted, accumulate"
            )
        # self.numbers: of each step's task; self.turn: how often that task came before
        self.turn = np.zeros(steps, int)
        for number in range(count):
            mine = self.numbers == number
            self.turn[mine] = np.arange(mine.sum())

    def tasks_at(self, step: int) -> list[str]:
        if self.schedule == "accumulate":
            return self.names
        return [self.names[self.numbers[step]]]

    def positions(self, step: int, task: str, rank: int = 0, ranks: int = 1) -> range:
        """Of a rank's clips in the row of epochs of a task that the step trains."""
        batch = self.datasets[task].task.batch
        first = int(self.turn[step]) * batch
        return range(first + rank, first + batch, ranks)

    def locate(self, task: str, position: int, further: int = 0) -> tuple[int, int]:
        """(epoch, index of the item) at a position, or some places further in the same epoch."""
        size = len(self.datasets[task])
        if self.repeats[task] is not None:
            size = int(self.repeats[task].sum())
        epoch, place = divmod(position, size)
        if (task, epoch) not in self.epochs:  # 19 ms and 6 MB for 800,000 items
            if len(self.epochs) == 2 * len(self.datasets):
                self.epochs.clear()
            self.epochs[task, epoch] = self._order_of(task, epoch, size)
        return epoch, int(self.epochs[task, epoch][(place + further) % size])

    def _order_of(self, task: str, epoch: int, size: int) -> np.ndarray:
        """The items of an epoch, by the task's name: the same beside whatever other tasks."""
        rng = random_numbers(self.seed, "order", task, epoch)
        if self.repeats[task] is None:
            return rng.permutation(size)
        # Systematic sampling: the whole part of a (scaled) repeat for sure, the rest by chance.
        ends = np.cumsum(self.repeats[task]) * (size / self.repeats[task].sum())
        ends[-1] = size
        times = np.diff(np.floor(ends + rng.random()), prepend=0).astype(int)
        return rng.permutation(np.repeat(np.arange(len(times)), times))

    def add_damaged(self, task: str, files: dict[str, str]) -> None:
        """Note files that cannot be decoded, file -> why; ValueError past bad_share.

        One process alone need not call it. With several ranks, each adds what `damaged` of all of
        them holds (run.py does): the share is that of the whole job, and all of them stop at once.
        """
        self.damaged[task] |= files
        if files:
            _check_share(self.datasets[task], self.damaged[task])

    def state(self) -> dict:
        """What a resumed run must find unchanged."""
        tasks = {}
        for name, dataset in self.datasets.items():
            tasks[name] = {
                "items": len(dataset),
                "fingerprint": dataset.items.fingerprint(),
                "batch": dataset.task.batch,
                "weight": dataset.task.weight,
            }
        return {
            "draws": 2,  # raised when the same seed gives other clips than before
            "seed": self.seed,
            "schedule": self.schedule,
            "steps": self.steps if self.schedule == "weighted" else None,
            "tasks": tasks,
        }


def random_numbers(seed: int, *purpose: str | int) -> np.random.Generator:
    """A stream of its own for each purpose. Words count by their crc32, which is the same on every
    machine; so no two purposes that begin with different words coincide."""
    words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in purpose]
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))


def repeat_factors(dataset: Dataset) -> np.ndarray | None:
    """Repeats of each item in an epoch (task.repeat_rare), before they are scaled to a whole number
    of places in all; None: once."""
    threshold, items = dataset.task.repeat_rare, dataset.items
    if not threshold:
        return None
    if dataset.task.kind == "clip":
        count = np.bincount(items.label, minlength=len(dataset.classes))  # (C,)
        return rarity(count / len(items), threshold)[items.label]
    shown = np.logical_or.reduceat(items.labels, items.first[:-1])  # (items, C)
    return np.where(shown, rarity(shown.mean(0), threshold), 1).max(1)  # by the rarest label


def rarity(share: np.ndarray, threshold: float) -> np.ndarray:
    return np.sqrt(threshold / share.clip(min=1e-9)).clip(min=1)  # (C,)


def one_by_one(make: Callable, requests: Iterable, largest: int = 0, kept: int = 1) -> Iterator:
    """make(request) of each request, in this process, when it is asked for.

    `ahead(2)` of extras/workers.py does the same ahead of time by two processes, and checks that
    they have room for answers of `largest` bytes, of which the loop keeps `kept` at once.
    """
    return map(make, requests)


def training_batches(
    stream: Stream,
    start: int,
    stop: int,
    rank: int = 0,
    ranks: int = 1,
    micro: int = 1,
    work: Callable = one_by_one,
) -> Iterator[list[Batch]]:
    """For each step from start to stop - 1 the list of its micro-batches, of all its tasks.

    rank, ranks: this process among those that share a batch. micro: pieces in which this rank's
    part of a batch comes. work: who makes them, one_by_one or ahead(n) of extras/workers.py.
    An undecodable item is replaced by the next of its epoch and noted in `stream.damaged`;
    ValueError when that befalls more than `bad_share` of a task's videos (with several ranks: by
    Stream.add_damaged).
    """
    largest = 0  # bytes of a micro-batch
    for name, dataset in stream.datasets.items():
        task = dataset.task
        unit, product = ranks * micro, f"{ranks} processes x {micro} micro-batches"
        if task.mixup:
            unit, product = 2 * unit, f"{product} x 2 for mixup"
        if task.batch % unit:
            raise ValueError(
                f"task {name!r}: batch = {task.batch} is no multiple of {unit} = {product}"
            )
        largest = max(largest, task.batch // ranks // micro * task.frames * task.size**2 * 3)

    def requests() -> Iterator[tuple[str, range]]:
        for step in range(start, stop):
            for task in stream.tasks_at(step):
                mine = stream.positions(step, task, rank, ranks)
                for part in range(micro):
                    yield task, mine[part::micro]

    make = functools.partial(_training_batch, stream)
    tasks_of_a_step = len(stream.names) if stream.schedule == "accumulate" else 1
    kept = micro * tasks_of_a_step
    batches = []
    for batch in work(make, requests(), largest, kept):
        if ranks == 1:
            stream.add_damaged(batch.task, batch.damaged)
        else:  # of this rank alone, so their share says nothing yet
            stream.damaged[batch.task] |= batch.damaged
        if not batch.valid.all():
            *_, reason = batch.damaged.values()
            raise ValueError(f"task {batch.task!r}: {IN_A_ROW} videos in a row fail; {reason}")
        batches.append(batch)
        if len(batches) == kept:
            yield batches
            batches = []


def _training_batch(stream: Stream, request: tuple[str, range]) -> Batch:
    """The batch of a task at these positions; not valid where IN_A_ROW items fail."""
    task, positions = request
    dataset = stream.datasets[task]
    samples, damaged = [], {}
    for position in positions:
        for further in range(IN_A_ROW):
            _, index = stream.locate(task, position, further)
            item = dataset.items[index]
            # By the place, not the item: one that stands in for another is not shown twice alike.
            rng = random_numbers(stream.seed, "augmentation", task, position)
            try:
                samples.append(training_sample(dataset.task, item, rng))
                break
            except DecodeError as error:
                damaged[item.path] = str(error)
        else:
            samples.append(no_sample(item))
    return make_batch(dataset, samples, damaged, training=True)


def evaluation_batches(
    dataset: Dataset, batch: int, rank: int = 0, ranks: int = 1, work: Callable = one_by_one
) -> Iterator[Batch]:
    """Items rank, rank + ranks, ... with all their views, each once: nothing is padded or replaced.

    `batch` counts clips, an item is V of them; "full" clips differ in size and come alone. What
    cannot be decoded is masked in `valid` and noted in `dataset.damaged`; past `bad_share` it is a
    ValueError.
    """
    task, mine = dataset.task, range(rank, len(dataset), ranks)
    views = math.prod(task.views)
    items = 1 if task.val_fit == "full" else max(1, batch // views)
    side = task.short_side[0] * 2 if task.val_fit == "full" else task.size  # most frames are less
    largest = items * views * task.frames * side**2 * 3  # bytes
    requests = (mine[first : first + items] for first in range(0, len(mine), items))
    for made in work(functools.partial(_evaluation_batch, dataset), requests, largest):
        dataset.damaged |= made.damaged
        _check_share(dataset, dataset.damaged)
        yield made


def _evaluation_batch(dataset: Dataset, indices: range) -> Batch:
    samples, damaged = [], {}
    for index in indices:
        item = dataset.items[index]
        try:
            samples.append(evaluation_sample(dataset.task, item))
        except DecodeError as error:
            damaged[item.path] = str(error)
            samples.append(no_sample(item))
    return make_batch(dataset, samples, damaged, training=False)


def _check_share(dataset: Dataset, damaged: dict[str, str]) -> None:
    task = dataset.task
    if len(damaged) > task.bad_share * dataset.videos:
        *_, reason = damaged.values()
        raise ValueError(
            f"task {task.name!r} ({dataset.split}): {reason}; like it {len(damaged)} of "
            f"{dataset.videos} videos cannot be used, more than bad_share = {task.bad_share}"
        )
