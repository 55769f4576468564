"""predict: what a trained model sees in new videos.

    detections.csv    the scores of persons, as evaluation writes them and ava_eval.py reads them
    clips.csv         video, start, end, label, score: the clip tasks, along the video
    annotated.mp4     the video with boxes that move and their labels; several: annotated/NAME.mp4
    boxes.csv         the persons that `--boxes detect` found
    predict.json      which checkpoint and which boxes; the files that the next run here replaces

With several box (clip) tasks in a model each has a file of its own: detections-TASK.csv.
"""

import argparse
import csv
import dataclasses
import functools
import json
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import ava_eval
import data
from extras import persons, pictures, settings
from extras.annotations import Clock, Mark, place, read_boxes_table
from extras.videos import frame_times

FREE = ("out", "device", "precision", "workers", "threads")  # keys of the recipe that count here
THREE_WAYS = (
    "persons are labelled in boxes: --boxes FILE.csv (video,second,x1,y1,x2,y2,,score), "
    "--boxes detect (torchvision finds them), or --boxes whole (one actor, the whole picture)"
)
RECORD = "predict.json"
SAME_PERSON = 0.1  # overlap (IoU) of two boxes, a second or so apart, from which they are linked
SHOWN = 10  # problems named on the screen
CAPTION = [0.0, 0.0, 0.0, 0.0]  # a box without extent: text in the corner of the picture


@dataclass
class Film:
    """A video, and what is known and predicted of it."""

    video: persons.Video
    clock: Clock
    keyframes: dict[int, "Keyframe"] = field(default_factory=dict)  # by microseconds, of its boxes
    clips: dict[int, list[str]] = field(default_factory=dict)  # best labels, by the clip's middle

    @property
    def name(self) -> str:
        """In every csv."""
        return self.video.name

    @property
    def file(self) -> Path:
        return self.video.file

    @property
    def end_sec(self) -> float:
        return self.clock.end_sec


@dataclass
class Keyframe:
    time_sec: float  # from the first frame of the file
    people: list[data.Person]
    texts: list[list[str]] = field(default_factory=list)  # the lines of each in the annotated video

    def __post_init__(self):
        self.texts = [[] for _ in self.people]

    def add(self, box: tuple[float, float, float, float], score: float) -> None:
        """A person; one whose box is there already, with another action, is the same."""
        for person in self.people:
            if person.box == box:
                person.score = max(person.score, score)
                return
        self.people.append(data.Person(box, set(), score))
        self.texts.append([])


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What a trained model sees in videos: labels of persons (in boxes) and classes of clips, "
        "printed, saved as csv, and drawn into the videos."
    )
    parser.epilog = f"Of the recipe's keys predict takes --{', --'.join(FREE)}."
    parser.add_argument("checkpoint", help="a file, or the folder of a run")
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a file or a folder, or several")
    parser.add_argument(
        "--boxes",
        metavar="FILE | detect | whole",
        help="the persons to label: a csv, found by a detector, or one that fills the picture; "
        "without it the box tasks of the model are left out",
    )
    parser.add_argument(
        "--top", type=int, default=3, help="labels shown of a box or clip (default: 3, at least 1)"
    )
    persons.add_detector_options(parser)


@torch.no_grad()
def run(options: argparse.Namespace, overrides: dict[str, str], method) -> int:
    """-> 1 if a video could not be read, else 0."""
    persons.check_detector_options(options)
    if options.top < 1:
        raise ValueError(f"--top {options.top}: expected 1 or more")
    state = method.load(options.checkpoint)
    recipe = use(method.recipe_of(state), overrides, method)
    box_tasks, clip_tasks = tasks_of(recipe, options.boxes)
    films, damaged = open_films(persons.find_videos(options.videos))
    out = Path(overrides.get("out") or folder_for(options.videos, recipe))
    job = method.setup(recipe)
    if job.size > 1:
        raise ValueError("predict runs as one process, without torchrun")

    written = Written(out, options, state)
    if box_tasks:
        find_boxes(films, box_tasks, options, written, job.device)
    model = method.model_of(state).eval().to(job.device)
    predict = functools.partial(method.predictions, model, recipe, job)
    for task in box_tasks:
        found = label_persons(predict, task, state["classes"][task.name], films, options.top)
        rows = method.detection_rows(found, len(state["classes"][task.name]))
        ava_eval.write_csv(written.add(several("detections", task, box_tasks)), rows)
    titled = len(clip_tasks) > 1
    for task in clip_tasks:
        classes = state["classes"][task.name]
        rows = label_clips(predict, task, classes, films, options.every_sec, options.top, titled)
        write_rows(written.add(several("clips", task, clip_tasks)), rows)
    for film in films:
        if film.keyframes or film.clips:
            name = "annotated.mp4" if len(films) == 1 else f"annotated/{film.name}.mp4"
            annotate(film, written.add(name))
    print(written.finish())
    return 1 if damaged else 0


def use(recipe, overrides: dict[str, str], method):
    """The recipe of the checkpoint with what was typed of it."""
    if unused := overrides.keys() - set(FREE):
        raise ValueError(
            f"predict takes --{', --'.join(FREE)} of the recipe's keys, not "
            f"--{', --'.join(sorted(unused))}"
        )
    values = {key: method._value(text, method.Recipe, key) for key, text in overrides.items()}
    problems = [*settings.misfits(method.Recipe, values).values()]
    if not problems:
        recipe = dataclasses.replace(recipe, **values)
        problems = method.out_of_range(recipe)
    if problems:
        raise ValueError("predict: " + "; ".join(problems))
    return recipe


def tasks_of(recipe, boxes: str | None) -> tuple[list[data.Task], list[data.Task]]:
    """The box tasks and the clip tasks to predict, one view of each clip."""
    tasks = [dataclasses.replace(task, views=[1, 1], bad_share=1.0) for task in recipe.task]
    of_boxes = [task for task in tasks if task.kind == "box"]
    of_clips = [task for task in tasks if task.kind == "clip"]
    names = ", ".join(task.name for task in of_boxes)
    if of_boxes and not boxes:
        if not of_clips:
            raise ValueError(f"the model labels persons ({names}); {THREE_WAYS}")
        print(f"{names} left out; {THREE_WAYS}")
        return [], of_clips
    if boxes and not of_boxes:
        names = ", ".join(task.name for task in of_clips)
        raise ValueError(f"the model has clip tasks only ({names}), which need no --boxes")
    return of_boxes, of_clips


def open_films(found: list[persons.Video]) -> tuple[list[Film], int]:
    """The videos that can be read, and how many cannot, named on the screen."""
    films, damaged = [], []
    for video in found:
        try:
            films.append(Film(video, Clock(*frame_times(video.file))))
        except data.DecodeError as error:
            damaged.append(str(error))
    if not films:
        raise data.DecodeError("; ".join(damaged))
    for problem in damaged:
        print(f"left out: {problem}", file=sys.stderr)
    return films, len(damaged)


def folder_for(sources: list[str], recipe) -> str:
    """Where the predictions go if no --out says it."""
    if len(sources) > 1:
        return f"predictions/{recipe.name}"
    source = Path(sources[0]).resolve()
    return f"predictions/{source.name if source.is_dir() else source.stem}"


def several(what: str, task: data.Task, tasks: list[data.Task]) -> str:
    return f"{what}-{task.name}.csv" if len(tasks) > 1 else f"{what}.csv"


class Written:
    """The files of this prediction. Those of an earlier one in the same folder are removed first,
    so that nothing old is taken for a result; other files there are not touched."""

    def __init__(self, out: Path, options: argparse.Namespace, state: dict):
        if (out / "last.pt").exists():
            raise ValueError(
                f"--out {out} is the folder of a run, with its own detections.csv; take another one"
            )
        self.out, self.record = out, out / RECORD
        out.mkdir(parents=True, exist_ok=True)
        for name in self.earlier():
            (out / name).unlink(missing_ok=True)
        self.table = {
            "checkpoint": str(options.checkpoint),
            "step": state.get("step"),
            "videos": options.videos,
            "boxes": options.boxes,
            "files": [],
        }
        self.save()

    def earlier(self) -> list[str]:
        try:
            names = json.loads(self.record.read_text(encoding="utf-8"))["files"]
            inside = self.out.resolve()
            return [name for name in names if inside in (self.out / name).resolve().parents]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{self.record}: not written by predict, take another --out") from None

    def add(self, name: str) -> Path:
        """The path of a file that is about to be written."""
        self.table["files"].append(name)
        self.save()
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self) -> None:
        part = self.record.with_name(RECORD + ".part")
        part.write_text(json.dumps(self.table, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.record)

    def finish(self) -> str:
        names = self.table["files"]
        shown = [name for name in names if "/" not in name]
        films = len(names) - len(shown)
        if films:
            shown.append(f"annotated/ ({films} videos)")
        return f"in {self.out}: {', '.join(shown)}"


def write_rows(path: Path, rows: list[list]) -> None:
    """A csv with a header, complete or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["video", "start", "end", "label", "score"])
            table.writerows(rows)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# Boxes
# ------------------------------------------------------------------------------------------------


def find_boxes(
    films: list[Film],
    tasks: list[data.Task],
    options: argparse.Namespace,
    written: Written,
    device: torch.device,
) -> None:
    """Fill the films' keyframes with persons."""
    if options.boxes == "whole":
        for film in films:
            for second in persons.regular_times(film.end_sec, options.every_sec):
                person = data.Person((0.0, 0.0, 1.0, 1.0), set())
                film.keyframes[stamp_of(second)] = Keyframe(second, [person])
        return
    file = options.boxes
    if file == "detect":
        file = written.add("boxes.csv")
        somebody = False
        detector = persons.load_detector(options.detector, options.weights, device.type)
        for film in films:
            rows = persons.find_persons(film.video, detector, options.every_sec, options.min_score)
            persons.append(file, rows)
            somebody = somebody or len(rows[0]) > 2
        if not somebody:
            raise ValueError("the detector found nobody: a lower --min-score, or --boxes whole")
    read_boxes(films, file, {task.offset_sec for task in tasks})


def stamp_of(second: float) -> int:
    return round(second * 1e6)


def read_boxes(films: list[Film], file: str | Path, offsets: set[float]) -> None:
    """Fill the films' keyframes from a csv; what is left out is named on the screen.

    offsets: annotation time minus file time of the model's tasks. Rows that all lie outside of
    their video, but inside once an offset is taken off, count from the start of the movie.
    """
    marks, sentence = read_boxes_table(file)
    print(sentence)
    by_film, others = sort_marks(films, marks)
    if not any(by_film.values()):
        names = some([film.name for film in films])
        raise ValueError(f"{file}: no box of {names}, these are of {some(others)}")
    problems = []
    for film in films:
        shift = offset_of(film, by_film[film.name], offsets)
        for mark in by_film[film.name]:
            mark.time_sec -= shift
            problem = place(mark, film.clock)
            if not 0 <= mark.score <= 1:
                problem, mark.box = f"score {mark.score:g} is not in [0, 1], left out", ()
            if problem:
                problems.append(f"{mark.where}: {problem}")
            if len(mark.box):
                stamp = stamp_of(mark.time_sec + shift)
                keyframe = film.keyframes.setdefault(stamp, Keyframe(mark.time_sec, []))
                keyframe.add(tuple(mark.box), mark.score)
    if not any(film.keyframes for film in films):
        raise ValueError(f"none of {len(marks)} boxes can be used: {'; '.join(problems[:3])}")
    without = [film.name for film in films if not film.keyframes]
    if without:
        problems.append(f"{file}: no box of {some(without)}")
    print(*problems[:SHOWN], sep="\n", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more", file=sys.stderr)


def sort_marks(films: list[Film], marks: list[Mark]) -> tuple[dict[str, list[Mark]], list[str]]:
    """The boxes of each film, by its name; and what the videos of the others are called."""
    names = {film.video.listed: film.name for film in films}
    videos = data.Videos("", list(names))
    by_film: dict[str, list[Mark]] = {film.name: [] for film in films}
    others: dict[str, None] = {}
    for mark in marks:
        found = videos.find(mark.video)
        if len(found) == 1:
            by_film[names[found[0]]].append(mark)
        else:
            others[mark.video] = None
    return by_film, list(others)


def offset_of(film: Film, marks: list[Mark], offsets: set[float]) -> float:
    """Seconds from the start of the movie to that of its file, if the boxes count in the movie."""
    for offset in (0.0, *sorted(offsets)):
        if any(0 <= mark.time_sec - offset < film.end_sec for mark in marks):
            if offset:
                print(f"{film.name}: the seconds of its boxes are of the movie, less {offset:g} s")
            return offset
    return 0.0


def some(names: list[str]) -> str:
    text = ", ".join(repr(name) for name in names[:5])
    return f"{text} and {len(names) - 5} more" if len(names) > 5 else text


# ------------------------------------------------------------------------------------------------
# Predictions
# ------------------------------------------------------------------------------------------------


def label_persons(
    predict: Callable, task: data.Task, classes: list[str], films: list[Film], top: int
) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """(video, microseconds) -> boxes (k, 4), scores (k, C); printed, and written at the boxes.

    predict: a dataset -> its (batch, logits), as the method's evaluation does it.
    """
    rows, keyframes = [], {}
    for film in films:
        for stamp, keyframe in film.keyframes.items():
            key = (film.name, stamp)
            rows.append((key, str(film.file), keyframe.time_sec, 0, keyframe.people))
            keyframes[key] = film, keyframe
    found = {}
    for batch, logits in predict(dataset_of(task, classes, rows)):
        scores = (logits.sigmoid() * batch.scores[:, None]).cpu().numpy()  # (K, C)
        owner = batch.box_clip.numpy()
        for clip, key in enumerate(batch.keys):
            if not batch.valid[clip]:
                continue
            mine = owner == clip
            found[key] = batch.boxes_source[mine], scores[mine]
            film, keyframe = keyframes[key]
            for box, row in enumerate(scores[mine]):
                labels = best_labels(classes, row, top)
                keyframe.texts[box].extend(labels)
                where = f"{film.file.name}  {keyframe.time_sec:.3f} s"
                print(f"{where}  {task.name}  box {box}:  {', '.join(labels)}")
    return found


def label_clips(
    predict: Callable,
    task: data.Task,
    classes: list[str],
    films: list[Film],
    every_sec: float,
    top: int,
    titled: bool,
) -> list[list]:
    """Rows of clips.csv: a clip every every_sec, from its first frame to its last, every class.

    titled: in the annotated video the task's name stands before its labels.
    """
    rows, middles = [], {}
    for film in films:
        for second in persons.regular_times(film.end_sec, every_sec):
            key = (film.name, stamp_of(second))
            rows.append((key, str(film.file), second, 0, []))
            middles[key] = film, second
    table = []
    for batch, logits in predict(dataset_of(task, classes, rows)):
        scores = logits.softmax(1).cpu().numpy()  # (B, C)
        for key, row, valid in zip(batch.keys, scores, batch.valid, strict=True):
            if not valid:
                continue
            film, second = middles[key]
            labels = best_labels(classes, row, top)
            line = f"{task.name}: {', '.join(labels)}"
            film.clips.setdefault(key[1], []).extend([line] if titled else labels)
            print(f"{film.file.name}  {second:.3f} s  {task.name}:  {', '.join(labels)}")
            first = second - task.frames // 2 * task.step_sec
            start = max(0.0, first)
            end = min(film.end_sec, first + task.frames * task.step_sec)
            for label, score in zip(classes, row, strict=True):
                table.append([film.name, f"{start:.3f}", f"{end:.3f}", label, f"{score:.6f}"])
    return table


def dataset_of(task: data.Task, classes: list[str], rows: list[tuple]) -> data.Dataset:
    return data.Dataset(task, "val", classes, data.Items("", rows, len(classes)), {})


def best_labels(classes: list[str], scores: np.ndarray, top: int) -> list[str]:
    return [f"{classes[c]} {scores[c]:.2f}" for c in np.argsort(-scores)[:top]]


# ------------------------------------------------------------------------------------------------
# The annotated video
# ------------------------------------------------------------------------------------------------


def annotate(film: Film, path: Path) -> None:
    """Write the film with its boxes and labels. One pass over it, one picture in memory."""
    rate = Fraction(len(film.clock.times_sec) / film.end_sec).limit_denominator(1001)
    times = np.arange(max(1, round(film.end_sec * rate))) / float(rate)
    motion = Motion(list(film.keyframes.values()))
    middles = sorted(film.clips)
    turns = (np.array(middles[1:]) + middles[:-1]) / 2e6  # seconds at which the next clip is nearer

    def drawn() -> Iterator[np.ndarray]:
        for second, picture in zip(times, persons.watch(film.file, times), strict=True):
            boxes, texts = motion.at(second)
            colours = [pictures.AMBER] * len(boxes)
            if middles:
                nearest = middles[bisect_right(turns, second)]
                boxes, texts = [CAPTION, *boxes], [film.clips[nearest], *texts]
                colours = [pictures.GREEN, *colours]
            yield pictures.draw_boxes(picture, np.array(boxes), texts, colours)

    pictures.write_video(path, drawn(), rate)


class Motion:
    """The boxes of keyframes between them.

    Boxes of neighbouring keyframes that overlap are one person's: between the two moments the box
    goes straight from one to the other. A box without such a neighbour on one side stands still
    there for half a step, the usual time from keyframe to keyframe.
    """

    def __init__(self, keyframes: list[Keyframe]):
        self.keyframes = sorted(keyframes, key=lambda keyframe: keyframe.time_sec)
        self.times = [keyframe.time_sec for keyframe in self.keyframes]
        self.boxes = []  # (k, 4) of each keyframe
        for keyframe in self.keyframes:
            self.boxes.append(np.array([person.box for person in keyframe.people]).reshape(-1, 4))
        gaps = sorted(np.diff(self.times))
        self.half_sec = (gaps[(len(gaps) - 1) // 2] if gaps else 1.0) / 2
        self.links = []  # from the boxes of a keyframe to those of the next
        for i, gap in enumerate(np.diff(self.times)):
            near = gap <= 3 * self.half_sec
            self.links.append(link(self.boxes[i], self.boxes[i + 1]) if near else {})

    def at(self, second: float) -> tuple[list[np.ndarray], list[list[str]]]:
        """The boxes on screen at this time and the lines of text of each."""
        after = bisect_right(self.times, second)
        links = self.links[after - 1] if 0 < after < len(self.times) else {}
        boxes, texts = [], []
        if after > 0:
            since = second - self.times[after - 1]
            for i, box in enumerate(self.boxes[after - 1]):
                lines = self.keyframes[after - 1].texts[i]
                if i in links:
                    share = since / (self.times[after] - self.times[after - 1])
                    box = box + share * (self.boxes[after][links[i]] - box)
                    lines = self.keyframes[after].texts[links[i]] if share > 0.5 else lines
                elif since >= self.half_sec:
                    continue
                boxes.append(box)
                texts.append(lines)
        if after < len(self.times) and self.times[after] - second <= self.half_sec:
            for i, box in enumerate(self.boxes[after]):
                if i not in links.values():
                    boxes.append(box)
                    texts.append(self.keyframes[after].texts[i])
        return boxes, texts


def link(one: np.ndarray, other: np.ndarray) -> dict[int, int]:
    """Row of `one` -> row of `other`, boxes (n, 4) and (m, 4): the best overlaps first, each box
    once."""
    overlaps = []
    for i, box in enumerate(one):
        for j, candidate in enumerate(other):
            overlap = data.iou(box, candidate)
            if overlap >= SAME_PERSON:
                overlaps.append((-overlap, i, j))
    links = {}
    for _, i, j in sorted(overlaps):
        if i not in links and j not in links.values():
            links[i] = j
    return links
