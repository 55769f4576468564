"""check and prepare: every video of a recipe or a folder, once; show: a look at the annotations."""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from data import (
    DecodeError,
    Task,
    _duration_sec,
    _open,
    _video_stream,
    decode_clip,
    list_videos,
    open_task,
    read_recipe,
    read_tasks,
)
from extras.pictures import GREEN, draw_boxes, draw_text, grid, write_png

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
                print(
                    f"video {done} of {len(items)}, {left:.0f} s left ",
                    file=sys.stderr,
                    end=end if done < len(items) else "\n",
                )
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
                raise DecodeError(
                    f"{path}: {damaged} of {number} frames are damaged"
                    if damaged
                    else f"{path}: no frame could be decoded"
                )
        with _open(path) as container:
            stream, _ = _video_stream(container, path)
            rate = stream.average_rate or stream.guessed_rate or 25
            shown = sorted(
                {
                    packet.pts
                    for packet in container.demux(stream)
                    if packet.pts is not None and not packet.is_discard
                }
            )
            start = stream.start_time or 0
            times = np.array([float((pts - start) * stream.time_base) for pts in shown])
            if container.format.name == "avi" or not shown:  # as in _read_from_start
                times = np.arange(max(len(shown), number)) / float(rate)
            promised = _duration_sec(container, stream)
        if times[-1] < 0.9 * promised - 1:
            raise DecodeError(f"{path}: breaks off at {times[-1]:.1f} of {promised:.1f} s")
        width, height = (frame.width, frame.height)[:: -1 if frame.rotation // 90 % 2 else 1]
        return times, float(times[-1] + 1 / rate), width, height
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{path}: {error.strerror or error}") from error


def _splits(recipe: Path) -> list[tuple[Task, Path, str]]:
    tables = read_recipe(recipe)
    tasks = read_tasks(tables.get("task", []), str(recipe))
    return [
        (task, recipe.parent / tables.get("root", "."), split)
        for task in tasks
        for split in ("train", "val")
        if getattr(task, split)
    ]


def check(recipe: Path, workers: int, quick: bool = False) -> bool:
    """Read every annotation and video of a recipe; print counts and what is missing or damaged."""
    wanted, problems = {}, []  # file -> times of its keyframes
    for task, root, split in _splits(recipe):
        try:
            dataset = open_task(replace(task, bad_share=1.0), root, split)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        print(
            f"{task.name} {split}: {len(dataset.classes)} classes, "
            + ", ".join(f"{count} {what}" for what, count in dataset.report.items() if count)
        )
        problems += [
            f"{task.name} {split}: {video} is missing, wanted by {where}"
            for video, where in dataset.missing.items()
        ]
        for item in dataset.items:
            wanted.setdefault(item.path, []).append(item.time_sec)
    for path, found in _walk(lambda path: frame_times(path, not quick), list(wanted), workers):
        if isinstance(found, DecodeError):
            problems.append(str(found))
        elif outside := [t for t in wanted[path] if t < 0 or t >= found[1]]:  # nan, a clip: neither
            problems.append(
                f"{path}: {len(outside)} keyframes are outside its {found[1]:.3f} s, "
                f"the first at {outside[0]:.3f} s"
            )
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
    before, after = (
        sum(path.stat().st_size for path in paths if path.exists()) / 1e6
        for paths in (jobs.values(), jobs)
    )
    print(
        *damaged,
        f"{len(jobs)} videos: {len(todo) - len(damaged)} prepared, "
        f"{len(jobs) - len(todo)} were there, {len(damaged)} damaged; {before:.1f} MB -> "
        f"{after:.1f} MB",
        sep="\n",
    )
    return not damaged


def prepare_video(
    source: Path, target: Path, short_side: int = 320, keyframe_sec: float = 1.0
) -> None:
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
                        encoder = output.add_stream(
                            "libx264", rate=rate, options={"preset": "fast", "crf": "20"}
                        )
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
                    frame = scaler.reformat(
                        frame, encoder.width, encoder.height, "yuv420p", threads=1
                    )
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
