"""import: own videos and labels -> annotations, a split, a recipe."""

import argparse
import csv
import functools
import itertools
import math
import os
import random
import re
import signal
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

import numpy as np

from data import (
    DecodeError,
    Videos,
    _lines,
    _number,
    open_task,
    read_classes,
    read_clips,
)
from extras.videos import _splits, check, frame_times, prepare, show

# ------------------------------------------------------------------------------------------------
# import and show: own videos and labels -> annotations, a split by video, a recipe, a picture
# ------------------------------------------------------------------------------------------------


@dataclass
class Mark:
    """An action of a person at a time or, without box, of a clip, as the user's file states it."""

    where: str  # file:line
    video: str  # as written there
    label: str  # "": a person without action
    time_sec: float = math.nan  # from the first frame of the video
    box: Sequence[float] = ()  # x1, y1, x2, y2
    size: tuple[float, float] | None = None  # in which the box is measured; None: px of the video
    person: str = ""


def _own_rows(path: Path, unit: str) -> Iterator[Mark]:
    """A csv with the header video,time_sec,x1,y1,x2,y2,label[,person]; boxes in "norm" or "px"."""
    columns = ["video", "time_sec", "x1", "y1", "x2", "y2", "label"]
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
            raise ValueError(
                f"{path}:1: no column {', '.join(missing)}, expected the header "
                f"{','.join(columns)}[,person]"
            )
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if None in row:
                raise ValueError(
                    f"{where}: {len(row[None])} columns more than the header has; a "
                    f'label with a comma stands in "..."'
                )
            row = {column: (row[column] or "").strip() for column in rows.fieldnames}
            try:
                time_sec, *box = (_number(row[column]) for column in columns[1:6])
            except ValueError as error:
                raise ValueError(
                    f"{where}: {error}, expected numbers in {', '.join(columns[1:6])}"
                ) from None
            yield Mark(
                where,
                row["video"],
                row["label"],
                time_sec,
                box,
                (1, 1) if unit == "norm" else None,
                row.get("person", ""),
            )


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
            raise ValueError(
                f"{path}:{parser.CurrentLineNumber}: an <image>, so this is CVAT for "
                "images; expected the <track>s of an export as CVAT for video 1.1"
            )
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
                raise ValueError(
                    f"{box['where']}: {error} in a <box>, expected frame, xtl, ytl, xbr and ybr"
                ) from None
        yield (
            source.get("source", path.stem),
            size,
            track.get("label", ""),
            sorted(boxes, key=lambda box: box["frame"]),
        )


def _cvat_rows(
    path: Path, every_sec: float, attributes: Sequence[str], videos: Videos
) -> Iterator[Mark]:
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
            actions = [
                name if value == "true" else value
                for name, value in boxes[i]["actions"]
                if name in (attributes or [name])
                and value.casefold() not in ("", "false", "none", "__undefined__")
            ]
            time_sec = times[frame] if 0 <= frame < len(times) else math.inf
            for action in actions or ["" if boxes[i]["actions"] else label]:
                yield Mark(boxes[i]["where"], video, action, time_sec, corners, size, str(number))
        if boxes and not used:
            yield Mark(boxes[0]["where"], video, "", math.nan, boxes[0]["corners"], size)


@functools.cache
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
    """Where classes differ in case, blanks, - or _, keep the commonest; -> class: first file:line."""
    spellings: dict[str, dict[str, list[Mark]]] = {}
    for mark in marks:
        plain = re.sub(r"[\s_-]+", " ", mark.label.casefold()).strip() or mark.label
        spellings.setdefault(plain, {}).setdefault(mark.label, []).append(mark)
    classes = {}
    for same in spellings.values():
        best = max(same, key=lambda label: len(same[label]))
        problems += [
            f"{found[0].where}: {label!r} ({len(found)} rows) is taken as {best!r}"
            for label, found in same.items()
            if label != best
        ]
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
        free = [
            video
            for video in order
            if video not in chosen
            and (not name or name in classes_of[video])
            and all(left[other] > 1 for other in classes_of[video])
        ]
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


def import_labels(
    source: Path,
    target: Path,
    annotations: Path | None = None,
    unit: str = "norm",
    val_share: float = 0.2,
    seed: int = 0,
    every_sec: float = 1.0,
    attributes: Sequence[str] = (),
) -> None:
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
    tables, lists = (
        [p for p in there if p.suffix.lower() in suffixes]
        for suffixes in ((".csv", ".xml"), (".txt",))
    )
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
            marks += [
                Mark(where, file and os.path.relpath(source / file, source), label)
                for where, label, _, file in read_clips(str(path), videos, "train")
            ]
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
        raise ValueError(
            "; ".join(
                [
                    f"{len(rows)} of {len(marks)} rows can be used"
                    + f", with --boxes {unit}" * (not clips),
                    *problems[:3],
                ]
            )
        )

    of_video: dict[str, list[Mark]] = {}
    for mark in rows.values():
        of_video.setdefault(mark.video, []).append(mark)
    names_of = {video: {mark.label for mark in found} - {""} for video, found in of_video.items()}
    validation = split_videos(names_of, val_share, seed)
    train, val = (
        {row: mark for row, mark in rows.items() if (mark.video in validation) is part}
        for part in (False, True)
    )
    if not train:
        raise ValueError(
            f"{source}: {len(of_video)} videos with labels, expected two or more: one "
            "to train and one to validate"
        )
    counts = [Counter(mark.label for mark in part.values()) for part in (train, val)]
    problems += [
        f"{where}: {name!r} is only in {'val' if counts[1][name] else 'train'}, "
        f"{sum(name in names for names in names_of.values())} videos have it"
        for name, where in classes.items()
        if not (counts[0][name] and counts[1][name])
    ]
    # Evaluation has no annotated person without action: val.csv gets only their keyframes, and
    # val_boxes.csv all persons, which are then predicted like detected ones.
    idle = {row for row, mark in val.items() if not mark.label}
    suffix = "txt" if clips else "csv"
    items = len({(mark.video, str(mark.time_sec)) for mark in train.values()})
    actions = [f'label {{ name: "{name}" label_id: {number} }}\n' for name, number in ids.items()]
    texts = {
        "actions.pbtxt": actions,
        "problems.txt": [f"{problem}\n" for problem in problems],
        f"train.{suffix}": sorted(train),
        f"val.{suffix}": sorted(
            {",".join(row.split(",")[:2]) + "\n" if row in idle else row for row in val}
        ),
    }
    if idle:
        texts["val_boxes.csv"] = sorted({",".join(row.split(",")[:6]) + ",,1\n" for row in val})
    recipe, steps = target / "recipe.toml", max(200, 30 * items // 8)
    if not (kept := recipe.exists()):
        mirrored = re.search(r"(?<![a-z])(left|right)(?![a-z])", " ".join(ids).casefold())
        texts["recipe.toml"] = [
            RECIPE.format(
                name=re.sub(r"\W+", "-", target.resolve().name),
                kind="clip" if clips else "box",
                items=items,
                steps=steps,
                passes=steps * 8 // items,
                warmup=steps // 20,
                suffix=suffix,
                videos=Path(os.path.relpath(source, target)).as_posix(),
                flip=0.0 if mirrored else 0.5,
                val_boxes='val_boxes = "val_boxes.csv" # all annotated persons, also without action'
                if idle
                else '# val_boxes = "boxes.csv"   # detected persons to evaluate on',
            )
        ]
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
    print(
        *(f"problem: {problem}" for problem in problems[:30]),
        f"{len(of_video) - len(validation)} videos to train, {len(validation)} to validate; "
        f"{len(problems)} problems, all in {target / 'problems.txt'}; "
        f"{recipe} {'was there and is kept' if kept else 'is ready'}",
        sep="\n",
    )


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
    add(
        "--attribute",
        dest="attributes",
        action="append",
        default=[],
        help="CVAT: only this attribute is an action; can be repeated",
    )
    add = commands.add_parser("show", help="a picture of annotated keyframes").add_argument
    add("source", type=Path)
    add("--out", type=Path, default=Path("show.png"))
    add("--count", type=int, default=12, help="keyframes of each part of each task")
    add = commands.add_parser("check", help="read every video of a recipe").add_argument
    add("source", type=Path)
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
