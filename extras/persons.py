"""persons: the boxes of the persons in videos, found by a detector of torchvision.

    video,second,x1,y1,x2,y2,,score    a row per person; corners in [0, 1] of the upright picture
    video,second                       a video in which nobody was found

is what predict (--boxes), a task's val_boxes and ava_eval.py read. The detectors know COCO's
persons. On AVA they find fewer of the annotated ones than the detectors finetuned on AVA by which
published results are measured, and the mAP is lower with them.
"""

import argparse
import csv
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from extras import formats
from extras.videos import frame_times
from extras.weight_files import read_torch

DETECTOR = "fasterrcnn_resnet50_fpn_v2"
ON_A_CPU = "fasterrcnn_mobilenet_v3_large_fpn"
BEFORE = ".before"  # beside the csv while rows are written: its bytes before them
PERSON = 1  # the label of a person in every detector that torchvision trained on COCO
INSTALL = (
    "persons are found by torchvision, made for the torch that is here: pip install torchvision"
)

Detector = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""A picture (h, w, 3) uint8 RGB -> boxes (k, 4) of persons in pixels, scores (k,)."""


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Find the persons in videos and write their boxes as csv: a row per person and look. Videos of which
the csv has rows are skipped, so the same command goes on where it was stopped.

The detectors of torchvision know COCO's persons. On AVA they find fewer of the annotated persons
than the detectors finetuned on AVA that published results stand on; expect a lower mAP."""
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a file or a folder, or several")
    parser.add_argument("boxes", help="the csv to write: video,second,x1,y1,x2,y2,,score")
    add_detector_options(parser)
    parser.add_argument(
        "--every-sec",
        type=float,
        default=1.0,
        metavar="SEC",
        help="from one look at a video to the next (default: 1, above 0)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="where the detector runs (default: auto, the GPU if there is one)",
    )


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """Those that predict has too."""
    group = parser.add_argument_group("person detector")
    group.add_argument(
        "--detector",
        default=DETECTOR,
        metavar="NAME",
        help=f"of torchvision.models.detection (default: {DETECTOR}, COCO AP 46.7; "
        f"{ON_A_CPU}, COCO AP 32.8, takes a tenth of a CPU's time)",
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="of the detector (default: torchvision downloads those trained on COCO, once)",
    )
    group.add_argument(
        "--min-score",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="least score of a person (default: 0.5, from 0 to 1)",
    )


def check_detector_options(options: argparse.Namespace) -> None:
    if not options.every_sec > 0:
        raise ValueError(f"--every-sec {options.every_sec:g}: expected more than 0")
    if not 0 <= options.min_score <= 1:
        raise ValueError(f"--min-score {options.min_score:g}: expected 0 to 1")


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> int:
    """-> 1 if a video could not be read, else 0."""
    check_detector_options(options)
    found = find_videos(options.videos)
    target = Path(options.boxes)
    if target.is_dir() or data.is_video(target.name):
        raise ValueError(f"{target}: expected the csv to write, the last of the words")
    undo(target)
    done = videos_in(target)
    new = [video for video in found if video.name not in done]
    if len(new) < len(found):
        print(
            f"{len(found) - len(new)} of {len(found)} videos have rows in {target} and are "
            "skipped; without that file all would be looked at anew"
        )
    if not new:
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    detector = load_detector(options.detector, options.weights, options.device)
    damaged = 0
    started = time.monotonic()
    for number, video in enumerate(new, 1):
        try:
            rows = find_persons(video, detector, options.every_sec, options.min_score)
        except data.DecodeError as error:
            print(f"left out: {error}", file=sys.stderr)
            damaged += 1
            continue
        append(target, rows)
        seconds = len({row[1] for row in rows if len(row) > 2})
        left = (time.monotonic() - started) * (len(new) / number - 1)
        print(
            f"{video.name}: {sum(len(row) > 2 for row in rows)} persons in {seconds} pictures; "
            f"video {number} of {len(new)}, {left:.0f} s left",
            flush=True,
        )
    if damaged == len(found):
        raise data.DecodeError(f"none of {damaged} videos can be read, nothing was written")
    print(f"boxes of {len(found) - damaged} videos in {target}")
    return 1 if damaged else 0


def videos_in(boxes: Path) -> set[str]:
    """The videos that a csv of boxes has rows of. ValueError if it has others than detections:
    annotations must not be mixed with them."""
    if not boxes.exists():
        return set()
    names = set()
    with open(boxes, newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if row and not is_detection(row):
                raise ValueError(
                    f"{boxes}:{number}: expected a detection, video,second,x1,y1,x2,y2,,score, "
                    f"found {','.join(row)[:120]!r}: name another csv to write"
                )
            names |= set(row[:1])
    return names


def is_detection(row: list[str]) -> bool:
    """As `find_persons` makes them; a header is none, nor is a row with a label."""
    try:
        list(map(float, row[1:6] + row[7:]))
    except ValueError:
        return False
    return len(row) in (2, 8) and not any(row[6:7])


def append(boxes: Path, rows: list[list]) -> None:
    """Add the rows of a video to the csv: all of them or none. If the process is killed within,
    a file beside the csv knows its length before, and `undo` cuts off what is incomplete."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    new = text.getvalue().encode()
    with open(boxes, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                new = b"\n" + new
        before = boxes.with_name(boxes.name + BEFORE)
        before.write_text(f"{size}\n")
        try:
            while new:
                new = new[os.write(file.fileno(), new) :]
        except BaseException:
            undo(boxes)
            raise
        before.unlink()


def undo(boxes: Path) -> None:
    """Cut off what an `append` that did not end left in the csv."""
    before = boxes.with_name(boxes.name + BEFORE)
    if not before.exists():
        return
    text = before.read_text()
    if text.endswith("\n") and boxes.exists():  # else it was killed before it wrote a row
        os.truncate(boxes, min(int(text), boxes.stat().st_size))
    before.unlink()


# ------------------------------------------------------------------------------------------------
# Videos
# ------------------------------------------------------------------------------------------------


@dataclass
class Video:
    name: str  # as import names it: of the file without suffix; where several share one, a path
    file: Path
    listed: str  # its path from the folder that was named


def find_videos(sources: Sequence[str]) -> list[Video]:
    """The videos that are named or lie in a named folder. Raises ValueError, OSError."""
    files: dict[str, Path] = {}
    for source in map(Path, sources):
        if source.is_dir():
            inside = {name: source / name for name in data.list_videos(source)}
            if not inside:
                raise ValueError(f"{source}: no video in this folder")
        elif source.is_file():
            inside = {source.name: source}
        else:
            raise FileNotFoundError(f"{source}: no such video")
        for listed, file in inside.items():
            if files.setdefault(listed, file) != file:
                raise ValueError(f"{files[listed]} and {file} have the same name: one at a time")
    names = formats.Videos("", list(files))
    return [Video(names.name_of(listed), file, listed) for listed, file in files.items()]


def regular_times(end_sec: float, every_sec: float) -> np.ndarray:
    """The middles of the every_sec long pieces of a video."""
    return np.arange(min(every_sec, end_sec) / 2, end_sec, every_sec)


def watch(path: str | Path, times_sec: Sequence[float]) -> Iterator[np.ndarray]:
    """decode_clip(path, times_sec), picture by picture: (h, w, 3) uint8 RGB, upright.

    The times increase. The video is decoded once, from its start to the last of them, and one
    picture is in memory. Raises DecodeError.
    """
    with data.open_stream(path) as stream:
        canvas = data.Canvas(1, stream)
        for frame in data.on_screen(stream, data.to_ticks(stream, times_sec)):
            canvas.put([0], frame)
            yield canvas.video[0].copy()


# ------------------------------------------------------------------------------------------------
# Detection
# ------------------------------------------------------------------------------------------------


def find_persons(
    video: Video, detector: Detector, every_sec: float, min_score: float
) -> list[list]:
    """The rows of a video: [name, second, x1, y1, x2, y2, "", score], or [name, second] if nobody
    is in it. Raises DecodeError."""
    times = regular_times(frame_times(video.file).end_sec, every_sec).round(6)
    rows = []
    progress = Progress(video.name, len(times))
    for second, picture in zip(times, watch(video.file, times), strict=True):
        height, width = picture.shape[:2]
        boxes, scores = detector(picture)
        for box, score in zip(boxes, scores, strict=True):
            x1, y1, x2, y2 = (np.asarray(box) / [width, height, width, height]).clip(0, 1)
            if score >= min_score and (x2 - x1) * width >= 1 and (y2 - y1) * height >= 1:
                corners = [f"{x:.4f}" for x in (x1, y1, x2, y2)]
                rows.append([video.name, f"{second:.10g}", *corners, "", f"{score:.4f}"])
        progress.step()
    progress.end()
    return rows or [[video.name, f"{times[0]:.10g}"]]


class Progress:
    """A line on a terminal that counts pictures; in a log file a line each half a minute."""

    def __init__(self, name: str, count: int):
        self.name, self.count, self.done = name, count, 0
        self.started = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 30) or self.done == self.count:
            return
        self.shown = now
        left = (now - self.started) * (self.count / self.done - 1)
        text = f"{self.name}: picture {self.done} of {self.count}, {left:.0f} s left"
        print(text, file=sys.stderr, end=" \r" if self.terminal else "\n", flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\x1b[2K", file=sys.stderr, end="\r", flush=True)


def load_detector(name: str, weights: str | None, device: str) -> Detector:
    """A detector of torchvision.models.detection with COCO's weights, or those of a file.

    Raises ValueError with one sentence where torchvision, the name or the weights fail.
    """
    try:
        from torchvision.models import detection, get_model, get_model_weights, list_models
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise ValueError(f"{INSTALL} ({error})") from None
    names = list_models(module=detection)
    if name not in names:
        raise ValueError(f"--detector {name} is not one of {', '.join(names)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if weights:
        state = read_weights(weights)
        network = get_model(name, weights=None, weights_backbone=None, **classes_of(state))
        check_fit(state, network.state_dict(), f"--weights {weights}: not those of a {name}")
        network.load_state_dict(state)
    else:
        url = get_model_weights(name).DEFAULT.url
        try:
            network = get_model(name, weights="DEFAULT")
        except (OSError, RuntimeError) as error:  # no network; a download that was cut
            raise ValueError(
                f"the weights of {name} could not be downloaded ({error}): fetch {url} on another "
                "machine and name the file, --weights FILE"
            ) from None
    if device == "cpu" and name == DETECTOR:
        print(f"on a CPU this takes seconds a picture; --detector {ON_A_CPU} is faster")
    network = network.eval().to(device)

    @torch.inference_mode()
    def detector(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image = torch.from_numpy(picture).to(device).permute(2, 0, 1) / 255  # (3, h, w)
        found = network([image])[0]
        person = found["labels"] == PERSON
        return found["boxes"][person].cpu().numpy(), found["scores"][person].cpu().numpy()

    return detector


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """A state dict, also one inside a training script's checkpoint ("model"). ValueError."""
    state = read_torch(path)
    state = state.get("model", state)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"--weights {path}: expected a state dict of the detector")
    return state


def check_fit(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], wrong: str) -> None:
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in wanted]
    changed = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    for what, names in (("lacks", missing), ("has", unknown), ("has another shape of", changed)):
        if names:
            raise ValueError(f"{wrong}, it {what} {names[0]} and {len(names) - 1} others")


def classes_of(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """Of a Faster R-CNN the number of classes, since own ones may know persons only."""
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    return {} if scores is None else {"num_classes": len(scores)}
