"""check and prepare: every video of a recipe or a folder, once; show: a look at the annotations."""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.format import Flags
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from data import (
    Clock,
    Dataset,
    DecodeError,
    Item,
    can_seek,
    decode_clip,
    duration_sec,
    format_is,
    frame_rate,
    frames_in_order,
    has_clock,
    is_avi,
    list_videos,
    open_stream,
    open_task,
    orientation,
    pixel_aspect,
)
from extras import formats
from extras.pictures import GREEN, add_caption, draw_boxes, grid, write_png
from extras.recipe import read_tasks, resolve
from extras.report import untrained

SOURCE = "a recipe or the folder that holds it, or a folder of videos"
LONG_SEC = 30  # a video worth a word, if every clip of it decodes all that comes before


def _recipe_in(source: Path) -> Path:
    """The recipe, where a folder has one: what import wrote, or a run."""
    recipe = source / "recipe.toml"
    return recipe if recipe.is_file() else source


def _walk(work: Callable, items: list, workers: int) -> Iterator[tuple]:
    """(item, work(item) or the DecodeError it raised), in order, with progress on stderr."""

    def attempt(item):
        try:
            return work(item)
        except DecodeError as error:
            return error

    start, end = time.monotonic(), "\r" if sys.stderr.isatty() else "\n"
    with ThreadPoolExecutor(workers) as pool:  # threads will do: FFmpeg works outside the GIL
        for done, result in enumerate(pool.map(attempt, items), 1):
            if end == "\r" or done % 100 == 0:
                left = (time.monotonic() - start) * (len(items) / done - 1)
                text = f"video {done} of {len(items)}, {left:.0f} s left "
                print(text, file=sys.stderr, end=end if done < len(items) else "\n")
            yield items[done - 1], result


# ------------------------------------------------------------------------------------------------
# check
# ------------------------------------------------------------------------------------------------


@dataclass
class FrameTimes:
    """When the frames of a video are shown, and their size."""

    times_sec: np.ndarray  # (frames,)
    end_sec: float  # of the last one
    width: int  # upright, in the pixels that are stored: those that annotation tools count
    height: int


def frame_times(path: str | Path, decode: bool = False) -> FrameTimes:
    """Read the whole file, decode its first frame or (`decode`) all. Raises DecodeError, also for
    frames that come out damaged, for a file that ends long before its header says, and for a clock
    that starts anew where `decode_clip` cannot know it.
    """
    with open_stream(path) as stream:
        shown, jumps = _packet_ticks(stream)
        start, base = stream.start_time or 0, stream.time_base
        step_sec = float(1 / frame_rate(stream))
        promised_sec = duration_sec(stream)
        guessed = not has_clock(stream)
        joined = jumps and format_is(stream, Flags.ts_discont)
    if jumps and not joined:
        raise DecodeError(
            f"{path}: its clock starts anew inside of it, as of recordings joined, and what "
            "comes then would never be seen; `prepare` writes it with one clock"
        )
    ticks, width, height = _decoded_ticks(path, decode or joined or guessed or not shown)
    if joined or guessed or not shown:
        shown = ticks
    times = np.array([float((tick - start) * base) for tick in shown])
    if not (joined or guessed) and times[-1] < 0.9 * promised_sec - 1:
        raise DecodeError(f"{path}: breaks off at {times[-1]:.1f} of {promised_sec:.1f} s")
    return FrameTimes(times, float(times[-1] + step_sec), width, height)


def _packet_ticks(stream: av.VideoStream) -> tuple[list[int], int]:
    """The ticks of all frames in their order, without decoding; how often the clock starts anew."""
    clock, shown = Clock(stream), set()
    for packet in stream.container.demux(stream):
        if packet.size:
            clock.tick(packet.dts)
        stamp = packet.dts if is_avi(stream) else packet.pts
        if packet.size and stamp is not None and not packet.is_discard:
            shown.add(stamp)
    return sorted(shown), clock.jumps


def _decoded_ticks(path: str | Path, everything: bool) -> tuple[list[int], int, int]:
    """The ticks of all frames, or of the first; upright width and height."""
    ticks, damaged, frame = [], 0, None
    with open_stream(path) as stream:
        for tick, frame in frames_in_order(stream):
            ticks.append(tick)
            damaged += everything and frame.is_corrupt
            if not everything:
                break
        if frame is None:
            raise DecodeError(f"{path}: no frame could be decoded")
        if damaged:
            raise DecodeError(f"{path}: {damaged} of {len(ticks)} frames are damaged")
        transpose, _ = orientation(frame)
        if transpose:
            return ticks, frame.height, frame.width
        return ticks, frame.width, frame.height


def check(source: Path, workers: int, kind: type, quick: bool = False) -> bool:
    """Read a recipe (of class `kind`) with every annotation and video, or every video of a folder;
    print counts and what is wrong, missing, damaged or in the wrong place. True: nothing is."""
    source, problems = _recipe_in(source), []
    if source.is_dir():
        wanted = {str(source / name): [] for name in sorted(list_videos(source))}
        if not wanted:
            raise ValueError(f"{source}: no videos there")
    else:
        recipe, problems = resolve(kind, str(source))
        wanted = _read_annotations(recipe, problems)

    slow = []  # long, and without a way to seek

    def read(path: str) -> float:
        clock = frame_times(path, not quick)
        end_sec = clock.end_sec
        with open_stream(path) as stream:
            header_sec = duration_sec(stream)
            seekable = can_seek(stream)
        middle = clock.times_sec[len(clock.times_sec) // 2]
        decode_clip(path, [middle], short_side=64)  # as training does: by a seek
        if end_sec > 1.1 * header_sec + 1:
            raise DecodeError(
                f"{path}: lasts {end_sec:.1f} s, its header says {header_sec:.1f} s, and from "
                "what is after that no clip would be cut; `prepare` writes it with a true header"
            )
        if end_sec > LONG_SEC and not seekable:
            slow.append(path)
        return end_sec

    for path, result in _walk(read, list(wanted), workers):
        if isinstance(result, DecodeError):
            problems.append(str(result))
            continue
        outside = [t for t in wanted[path] if t < 0 or t >= result]  # nan, a clip: neither
        if outside:
            problems.append(
                f"{path}: {len(outside)} keyframes are outside its {result:.3f} s, "
                f"the first at {outside[0]:.3f} s"
            )
    if slow:
        print(
            f"{len(slow)} long videos are decoded from their start for every clip, since their "
            f"format cannot tell times otherwise; `prepare` makes them quick; the first is "
            f"{min(slow)}"
        )
    print(*problems, f"{len(wanted)} videos, {len(problems)} problems", sep="\n")
    return not problems


def _identity(path: str) -> tuple | str:
    """The same for a file by all its names: links, capitals where the disk knows none."""
    try:
        found = os.stat(path)
    except OSError:
        return path
    return found.st_dev, found.st_ino


def _read_annotations(recipe, problems: list[str]) -> dict[str, list[float]]:
    """The videos of all tasks -> the times of their keyframes. Tasks that `problems` names already
    are not read."""
    wanted: dict[str, list[float]] = {}
    trained: dict[str, dict] = {}  # task -> files
    splits, said = [], "\n".join(problems)
    for task in recipe.task:
        if f"task {task.name}: " not in said and f"task {task.name!r}: " not in said:
            splits += [(task, split) for split in ("train", "val") if getattr(task, split)]
    for task, split in splits:
        try:
            dataset = open_task(replace(task, bad_share=1.0), recipe.root, split, formats)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        counts = [f"{count} {what}" for what, count in dataset.report.items() if count]
        print(f"{task.name} {split}: {len(dataset.classes)} classes, " + ", ".join(counts))
        for video, where in dataset.missing.items():
            problems.append(f"{task.name} {split}: {video} is missing, wanted by {where}")
        paths = dict.fromkeys(item.path for item in dataset.items)
        files = {_identity(path): path for path in paths}
        if empty := dataset.report.get("empty boxes dropped"):
            problems.append(
                f"{os.path.join(recipe.root, getattr(task, split))}: {empty} boxes are empty, "
                "expected x1 < x2 and y1 < y2 (are x and y swapped?)"
            )
        if split == "train":
            trained[task.name] = files
            one = replace(recipe, task=[task])
            classes, counts = {task.name: dataset.classes}, {task.name: dataset.class_counts()}
            for line in untrained(one, classes, counts):
                print(line)
        both = files.keys() & trained.get(task.name, {}).keys() if split == "val" else ()
        if both:
            problems.append(
                f"{task.name}: {len(both)} of the {len(files)} videos to validate on are trained "
                f"on too, the first is {min(files[same] for same in both)}"
            )
        for item in dataset.items:
            wanted.setdefault(item.path, []).append(item.time_sec)
    return wanted


# ------------------------------------------------------------------------------------------------
# prepare
# ------------------------------------------------------------------------------------------------


def prepare(source: Path, target: Path, short_side: int, keyframe_sec: float, workers: int) -> bool:
    """prepare_video for each video under source that target has not yet, in the same folders.

    Prints what could not be prepared and goes on. True: nothing. ValueError or OSError if the
    source is no folder with videos, or the target none to write into.
    """
    if not source.is_dir():
        what = "a file" if source.exists() else "not there"
        raise ValueError(f"{source}: {what}, expected a folder of videos")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: a file, expected the folder to write")
    jobs: dict[Path, Path] = {}
    problems: list[str] = []
    for name in sorted(list_videos(source)):
        video, path = source / name, (target / name).with_suffix(".mp4")
        if target.resolve() in video.resolve().parents:
            continue
        if path in jobs:
            problems.append(f"{video}: {jobs[path]} becomes {path} too: rename one")
        else:
            jobs[path] = video
    if not jobs:
        raise ValueError(f"{source}: no videos there that are not in {target} already")

    def work(path: Path) -> None:
        prepare_video(jobs[path], path, short_side, keyframe_sec)

    todo = [path for path in jobs if not os.path.exists(path)]
    if todo:  # else each of its videos would be blamed
        target.mkdir(parents=True, exist_ok=True)
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{target}: nothing can be written into this folder")
    prepared = 0
    for _, error in _walk(work, todo, workers):
        if error is None:
            prepared += 1
        else:
            problems.append(str(error))
    print(
        *problems,
        f"{len(jobs)} videos: {prepared} prepared, {len(jobs) - len(todo)} were there, "
        f"{len(problems)} left out; {_megabytes(jobs.values()):.1f} MB -> "
        f"{_megabytes(jobs):.1f} MB",
        sep="\n",
    )
    return not problems


def _megabytes(paths: Iterable[Path]) -> float:
    return sum(os.path.getsize(path) for path in paths if os.path.exists(path)) / 1e6


def prepare_video(
    source: Path, target: Path, short_side: int = 320, keyframe_sec: float = 1.0
) -> None:
    """Re-encode as H.264 mp4, short side at most short_side px, a key frame every keyframe_sec.

    Each frame keeps its time to the tick, the first its offset, the stream its display matrix, so
    that decode_clip gives the same frames for the same times. Pixels become square, sound is
    dropped. Raises DecodeError; target appears complete or not at all.
    """
    # Short, whatever the name: with a suffix more, a long one would be over 255 bytes. By process:
    # two may prepare the same folder.
    name = hashlib.sha1(os.fsencode(target.name)).hexdigest()[:16]
    part = target.with_name(f".{name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _encode(source, part, short_side, keyframe_sec)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{source}: {error.strerror or error}") from error


def _encode(source: Path, target: Path, short_side: int, keyframe_sec: float) -> None:
    scaler, encoder, key = VideoReformatter(), None, 0
    with open_stream(source) as stream:
        rate, base = frame_rate(stream), stream.time_base
        # The header counts a late start in movie_timescale, by default only milliseconds.
        options = {"movflags": "faststart", "movie_timescale": str(base.denominator)}
        with av.open(f"file:{target}", "w", format="mp4", options=options) as output:
            now = stream.start_time or 0  # from there on the first frame is held
            for tick, frame in frames_in_order(stream):
                if encoder is None:
                    encoder = _add_encoder(
                        output, frame, rate, base, pixel_aspect(stream), short_side
                    )
                    due = True
                else:
                    now = max(tick, now + 1)
                    due = (now - key) * base >= keyframe_sec
                if due:
                    key = now
                frame = scaler.reformat(frame, encoder.width, encoder.height, "yuv420p", threads=1)
                frame.pts, frame.time_base = now, base
                frame.pict_type = PictureType.I if due else PictureType.NONE
                output.mux(encoder.encode(frame))
            if encoder is None:
                raise DecodeError(f"{source}: no frame could be decoded")
            output.mux(encoder.encode(None))


def _add_encoder(
    output: av.container.OutputContainer,
    frame: av.VideoFrame,
    rate: Fraction,
    base: Fraction,
    aspect: float,
    short_side: int,
) -> av.VideoStream:
    # Made for decoding: no arithmetic coding, no deblocking, and seven of eight frames such that no
    # other needs them, so that those between the frames of a clip are skipped. A clip of the
    # result takes half the CPU time of one with x264's own choices, for a third more bytes.
    options = {
        "preset": "fast",
        "crf": "20",
        "tune": "fastdecode",
        "x264-params": "bframes=7:b-adapt=0:b-pyramid=none",
    }
    encoder = output.add_stream("libx264", rate=rate, options=options)
    width, height = frame.width * aspect, frame.height
    scale = min(1.0, short_side / min(width, height))
    encoder.width = 2 * max(round(width * scale / 2), 1)  # yuv420p: even
    encoder.height = 2 * max(round(height * scale / 2), 1)
    encoder.pix_fmt = "yuv420p"
    context = encoder.codec_context
    context.time_base, context.thread_count = base, 1
    context.colorspace, context.color_range = frame.colorspace, frame.color_range
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        numbers = np.frombuffer(matrix, np.int32).tolist()
        numbers[6:8] = 0, 0  # a shift in px of the old size, which players do without
        encoder.set_display_matrix(numbers)
    return encoder


# ------------------------------------------------------------------------------------------------
# show
# ------------------------------------------------------------------------------------------------


def show(source: Path, out: Path, count: int) -> None:
    """A picture of some keyframes (middles of clips) of every task, read as training reads them; or
    of the middles of some videos of a folder."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: expected FILE.png")
    source = _recipe_in(source)
    if source.is_dir():
        wanted = _from_folder(source, count)
    else:
        wanted = _from_tasks(source, count)
    pictures = []
    for path, times, boxes, names, caption in wanted:
        try:
            frame = decode_clip(path, times, short_side=240)[0]
        except DecodeError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        pictures.append(add_caption(draw_boxes(frame, boxes, names, GREEN), caption))
    if not pictures:
        raise ValueError(f"{source}: no video of it can be decoded")
    write_png(out, grid(pictures))
    print(f"{len(pictures)} pictures in {out}")


def _middle(duration: float) -> list[float]:
    return [duration / 2]


def _spread(length: int, count: int) -> list[int]:
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def _from_folder(folder: Path, count: int) -> Iterator[tuple]:
    names = sorted(list_videos(folder))
    if not names:
        raise ValueError(f"{folder}: no videos there")
    for index in _spread(len(names), count):
        yield folder / names[index], _middle, [], [], [names[index]]


def _from_tasks(recipe: Path, count: int) -> Iterator[tuple]:
    for task, root in read_tasks(recipe):
        for split in ("train", "val"):
            if not getattr(task, split):
                continue
            dataset = open_task(task, root, split, formats)
            for index in _spread(len(dataset), count):
                yield _annotated(dataset, dataset.items[index])


def _annotated(dataset: Dataset, item: Item) -> tuple:
    """(path, times, boxes, their names, lines of the caption) of an item."""
    caption = [f"{dataset.task.name} {dataset.split}", Path(item.key[0]).name]
    if dataset.task.kind == "clip":
        middle = _middle
        if not np.isnan(item.end_sec):  # a stretch
            middle = [(item.time_sec + item.end_sec) / 2]
            caption[1] += f" {item.time_sec:.3f} to {item.end_sec:.3f} s"
        return item.path, middle, [[0, 0, 1, 1]], [[dataset.classes[item.label]]], caption
    names = []
    for row in item.labels:
        names.append([dataset.classes[column] for column in row.nonzero()[0]] or ["-"])
    caption[1] += f" {item.time_sec:.3f} s"
    return item.path, [item.time_sec], item.boxes, names, caption


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------


def _add_workers(parser: argparse.ArgumentParser) -> None:
    text = "videos read at a time, 1 or more (default: the machine's cores)"
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=text)


def _refuse_less_than(least: float, options: argparse.Namespace, *keys: str) -> None:
    for key in keys:
        value = getattr(options, key)
        if not value >= least:
            raise ValueError(f"--{key.replace('_', '-')} {value}, expected {least} or more")


def add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Read every annotation and video of a recipe, or every video of a folder."
    parser.add_argument("source", type=Path, help=SOURCE)
    parser.add_argument("--quick", action="store_true", help="decode only a few frames of a video")
    _add_workers(parser)


def run_check(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> int:
    _refuse_less_than(1, options, "workers")
    checked = check(options.source, options.workers, cofinetune.Recipe, options.quick)
    return 0 if checked else 1


def add_prepare_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Re-encode videos once, so that training reads them quickly."
    parser.add_argument("source", type=Path, help="a folder of videos, at any depth")
    parser.add_argument(
        "target", type=Path, help="the folder to write, in the same folders; what is there stays"
    )
    parser.add_argument(
        "--short-side",
        type=int,
        default=320,
        help="px, 2 or more (default 320); smaller videos keep their size",
    )
    parser.add_argument(
        "--keyframe-sec",
        type=float,
        default=1.0,
        help="seconds between key frames, 0 or more (default 1)",
    )
    _add_workers(parser)


def run_prepare(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> int:
    _refuse_less_than(1, options, "workers")
    _refuse_less_than(2, options, "short_side")
    _refuse_less_than(0, options, "keyframe_sec")
    done = prepare(
        options.source, options.target, options.short_side, options.keyframe_sec, options.workers
    )
    return 0 if done else 1


def add_show_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "A picture of annotated keyframes, as training reads them."
    parser.add_argument("source", type=Path, help=SOURCE)
    parser.add_argument(
        "--out", type=Path, default=Path("show.png"), help="the picture (default show.png)"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=12,
        help="keyframes of each part of each task, 1 or more (default 12)",
    )


def run_show(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> int:
    _refuse_less_than(1, options, "count")
    show(options.source, options.out, options.count)
    return 0


COMMANDS = {
    "check": (add_check_options, run_check),
    "prepare": (add_prepare_options, run_prepare),
    "show": (add_show_options, run_show),
}
