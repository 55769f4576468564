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
from extras import checkpoints, formats, persons, pictures, settings
from extras import job as jobs
from extras.annotations import Mark, place, read_boxes_table
from extras.report import best_labels
from extras.run import write_text
from extras.videos import FrameTimes, frame_times

FREE = ("out", "device", "precision", "workers", "threads")  # keys of the recipe that count here
THREE_WAYS = (
    "say where the persons are: --boxes FILE.csv (video,second,x1,y1,x2,y2,,score), "
    "--boxes detect (torchvision finds them), or --boxes whole (one actor, the whole picture)"
)
RECORD = "predict.json"
SAME_PERSON = 0.2  # overlap (IoU) of two widened boxes from which they are taken for one person's
SHOWN = 10  # problems named on the screen
CAPTION = [0.0, 0.0, 0.0, 0.0]  # a box without extent: text in the corner of the picture


@dataclass
class Film:
    """A video, and what is known and predicted of it."""

    video: persons.Video
    clock: FrameTimes
    movie: str = ""  # AVA-Kinetics: what its boxes call it, if the file is a clip ID_START_END
    start_sec: float = 0.0  # of that clip, in the movie
    keyframes: dict[int, "Keyframe"] = field(default_factory=dict)  # by microseconds, of its boxes
    clips: dict[int, list[str]] = field(default_factory=dict)  # best labels, by the clip's middle

    @property
    def name(self) -> str:
        """In every csv, but for the persons of a clip of a movie."""
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
    people: list[data.Person] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)  # the lines of each in the annotated video

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
    parser.description = """\
What a trained model sees in videos: labels of persons (box tasks) and classes of clips (clip
tasks), printed, saved as csv, and drawn into the videos. The results of an earlier prediction in
the same --out (default: predictions/VIDEO; of several videos predictions/RUN) are replaced, those
of another checkpoint refused."""
    parser.epilog = f"Settings of the recipe that are options too: --{', --'.join(FREE)}"
    parser.add_argument("checkpoint", help="a file, or the folder of a run")
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a file or a folder, or several")
    parser.add_argument(
        "--boxes",
        metavar="FILE|detect|whole",
        help="the persons to label: of a csv, found by a detector, or one that fills the picture "
        "(default: none, the box tasks are left out)",
    )
    parser.add_argument(
        "--every-sec",
        type=float,
        default=1.0,
        metavar="SEC",
        help="from clip to clip, and between looks for persons (default: 1, above 0)",
    )
    parser.add_argument(
        "--top",
        type=int,
        default=3,
        metavar="COUNT",
        help="labels shown of a box or clip; the csv have all (default: 3, at least 1)",
    )
    parser.add_argument(
        "--averaged",
        action="store_true",
        help="with the weights that the recipe's `ema` averaged, not the last step's",
    )
    persons.add_detector_options(parser)


@torch.no_grad()
def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> int:
    """-> 1 if a video could not be read, else 0."""
    persons.check_detector_options(options)
    if options.top < 1:
        raise ValueError(f"--top {options.top}: expected 1 or more")
    state = checkpoints.load(options.checkpoint)
    recipe = use(checkpoints.recipe_of(state, cofinetune.Recipe), overrides)
    box_tasks, clip_tasks = tasks_of(recipe, options.boxes)
    films, damaged = open_films(persons.find_videos(options.videos))
    out = Path(overrides.get("out") or folder_for(options.videos, state["path"]))
    job = jobs.join(recipe)
    if job.size > 1:
        raise ValueError("predict runs as one process, without torchrun")
    if options.boxes == "whole":
        fill_with_whole(films, options.every_sec)
    elif box_tasks and options.boxes != "detect":
        read_boxes(films, options.boxes, {task.offset_sec for task in box_tasks})
    model = checkpoints.model_of(state, cofinetune.Recipe, options.averaged).eval().to(job.device)

    names = [file_of("detections", task, box_tasks) for task in box_tasks]
    names += [file_of("clips", task, clip_tasks) for task in clip_tasks]
    names += [file_of_film(film, films) for film in films]
    if options.boxes == "detect":
        names.append("boxes.csv")
    written = Written(out, options, state, names)  # from here on what was there before is gone
    if options.boxes == "detect":
        damaged += detect(films, options, written.add("boxes.csv"), job.device)
    predict = functools.partial(cofinetune.predictions, model, recipe, job)
    for task in box_tasks:
        classes = state["classes"][task.name]
        found = label_persons(predict, task, classes, films, options.top, len(box_tasks) > 1)
        rows = cofinetune.detection_rows(found, len(classes))
        ava_eval.write_csv(written.add(file_of("detections", task, box_tasks)), rows)
    for task in clip_tasks:
        classes = state["classes"][task.name]
        rows = label_clips(predict, task, classes, films, options, len(clip_tasks) > 1)
        write_rows(written.add(file_of("clips", task, clip_tasks)), rows)
    for film in films:
        if film.keyframes or film.clips:
            damaged += attempt(annotate, film, written.add(file_of_film(film, films)))
    print(written.finish())
    return 1 if damaged else 0


def use(recipe, overrides: dict[str, str]):
    """The recipe of the checkpoint with what was typed of it."""
    if unused := overrides.keys() - set(FREE):
        raise ValueError(
            f"predict takes --{', --'.join(FREE)} of the recipe's keys, not "
            f"--{', --'.join(sorted(unused))}"
        )
    values = {key: settings.value_of(text, type(recipe), key) for key, text in overrides.items()}
    if problems := settings.misfits(type(recipe), values):
        raise ValueError("predict: " + "; ".join(problems.values()))
    return dataclasses.replace(recipe, **values)


def tasks_of(recipe, boxes: str | None) -> tuple[list[data.Task], list[data.Task]]:
    """The box tasks (with `boxes` some, without none) and the clip tasks to predict, one view of
    each clip."""
    tasks = [dataclasses.replace(task, views=[1, 1], bad_share=1.0) for task in recipe.task]
    of_boxes = [task for task in tasks if task.kind == "box"]
    of_clips = [task for task in tasks if task.kind == "clip"]
    names = ", ".join(task.name for task in of_boxes)
    if of_boxes and not boxes:
        if not of_clips:
            raise ValueError(f"the model labels persons (task {names}), {THREE_WAYS}")
        print(f"task {names} labels persons and is left out; to have it, {THREE_WAYS}")
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
            films.append(Film(video, frame_times(video.file)))
        except data.DecodeError as error:
            damaged.append(str(error))
    if not films:
        raise data.DecodeError("; ".join(damaged))
    for problem in damaged:
        print(f"left out: {problem}", file=sys.stderr)
    return films, len(damaged)


def attempt(work: Callable, film: Film, *more) -> bool:
    """Do something with a film, the others come after it; -> was it damaged, and named?"""
    try:
        work(film, *more)
        return False
    except data.DecodeError as error:
        print(f"left out: {error}", file=sys.stderr)
        return True


def folder_for(sources: list[str], checkpoint: str) -> str:
    """Where the predictions go if no --out says it."""
    if len(sources) > 1:  # not the recipe's name, which is "recipe" for all that import writes
        return f"predictions/{Path(checkpoint).resolve().parent.name}"
    source = Path(sources[0]).resolve()
    return f"predictions/{source.name if source.is_dir() else source.stem}"


def file_of(what: str, task: data.Task, tasks: list[data.Task]) -> str:
    return f"{what}-{task.name}.csv" if len(tasks) > 1 else f"{what}.csv"


def file_of_film(film: Film, films: list[Film]) -> str:
    return "annotated.mp4" if len(films) == 1 else f"annotated/{film.name}.mp4"


class Written:
    """The files of this prediction. Those of an earlier one in the same folder are removed first,
    so that nothing old is taken for a result; other files there are not touched. ValueError for one
    that stands where a result belongs, and for results of another checkpoint."""

    def __init__(self, out: Path, options: argparse.Namespace, state: dict, names: list[str]):
        """names: what will be written, as far as it is known before the work."""
        if (out / "last.pt").exists():
            raise ValueError(
                f"--out {out} is the folder of a run, with its own detections.csv; take another one"
            )
        self.out, self.record = out, out / RECORD
        checkpoint = str(Path(state["path"]).resolve())
        boxes, earlier = Path(options.boxes or "").resolve(), self.earlier(checkpoint)
        kept = [name for name in earlier if (out / name).resolve() == boxes]
        for name in names:
            if (out / name).resolve() == boxes:
                raise ValueError(f"{out / name} is what --boxes reads: take another --out")
            if name not in earlier:
                self.refuse(out / name)
        out.mkdir(parents=True, exist_ok=True)
        for name in set(earlier) - set(kept):
            (out / name).unlink(missing_ok=True)
        self.table = {
            "checkpoint": checkpoint,
            "step": state.get("step"),
            "averaged": options.averaged,
            "videos": options.videos,
            "boxes": options.boxes,
            "files": kept,
        }
        self.results: list[str] = []
        self.save()

    def earlier(self, checkpoint: str) -> list[str]:
        """The files of an earlier prediction here, by this checkpoint."""
        try:
            table = json.loads(self.record.read_text(encoding="utf-8"))
            names, before = table["files"], str(Path(table["checkpoint"]).resolve())
            inside = self.out.resolve()
            names = [name for name in names if inside in (self.out / name).resolve().parents]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{self.record}: not written by predict, take another --out") from None
        if before != checkpoint and any((self.out / name).exists() for name in names):
            raise ValueError(
                f"{self.out} has the results of {before}, not of {checkpoint}: take another --out"
            )
        return names

    def add(self, name: str) -> Path:
        """The path of a file that is about to be written."""
        path = self.out / name
        self.refuse(path)
        self.table["files"].append(name)
        self.results.append(name)
        self.save()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @staticmethod
    def refuse(path: Path) -> None:
        if path.exists():
            raise ValueError(f"{path} was not written by predict: move it, or take another --out")

    def save(self) -> None:
        write_text(self.record, json.dumps(self.table, indent=1) + "\n")

    def finish(self) -> str:
        names = [name for name in self.results if (self.out / name).exists()]
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


def fill_with_whole(films: list[Film], every_sec: float) -> None:
    """One person who fills the picture, all along every film."""
    for film in films:
        for second in persons.regular_times(film.end_sec, every_sec):
            keyframe = film.keyframes[data.microseconds(second)] = Keyframe(second)
            keyframe.add((0.0, 0.0, 1.0, 1.0), 1.0)


def detect(films: list[Film], options: argparse.Namespace, file: Path, device) -> int:
    """Fill the films' keyframes with the persons that a detector finds, and write their boxes into
    a csv; -> how many films were damaged and are taken out of the list."""
    detector = persons.load_detector(options.detector, options.weights, device.type)

    def find(film: Film) -> None:
        rows = persons.find_persons(film.video, detector, options.every_sec, options.min_score)
        persons.append(file, rows)
        for _, second, *box in rows:
            if box:
                x1, y1, x2, y2, _, score = box
                stamp = data.microseconds(float(second))
                keyframe = film.keyframes.setdefault(stamp, Keyframe(float(second)))
                keyframe.add((float(x1), float(y1), float(x2), float(y2)), float(score))

    whole = [film for film in films if not attempt(find, film)]
    damaged = len(films) - len(whole)
    films[:] = whole
    if not any(film.keyframes for film in films):
        raise ValueError("the detector found nobody: a lower --min-score, or --boxes whole")
    return damaged


def read_boxes(films: list[Film], file: str | Path, offsets: set[float]) -> None:
    """Fill the films' keyframes from a csv; what is left out is named on the screen.

    offsets: annotation time minus file time of the model's tasks. Rows that all lie outside of
    their video, but inside once an offset is taken off, count from the start of the movie.
    """
    if not Path(file).exists():
        raise ValueError(f"--boxes {file}: no such file (nor one of the words detect, whole)")
    marks, sentence = read_boxes_table(file)
    print(sentence)
    by_film, others = sort_marks(films, marks)
    if not any(by_film.values()):
        names = some([film.name for film in films])
        raise ValueError(f"{file}: no box of {names}, these are of {some(list(others))}")
    problems = []
    if others:
        count = sum(others.values())
        problems.append(f"{file}: {count} boxes of other videos, left out: {some(list(others))}")
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
                stamp = data.microseconds(mark.time_sec + shift)
                keyframe = film.keyframes.setdefault(stamp, Keyframe(mark.time_sec))
                keyframe.add(tuple(mark.box), mark.score)
    if not any(film.keyframes for film in films):
        raise ValueError(f"none of {len(marks)} boxes can be used: {'; '.join(problems[:3])}")
    without = [film.name for film in films if not film.keyframes]
    if without:
        problems.append(f"{file}: no box of {some(without)}")
    for problem in problems[:SHOWN]:
        print(problem, file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more", file=sys.stderr)


def sort_marks(
    films: list[Film], marks: list[Mark]
) -> tuple[dict[str, list[Mark]], dict[str, int]]:
    """The boxes of each film, by its name; how many there are of every other video."""
    listed = {film.video.listed: film for film in films}
    videos = formats.Videos("", list(listed))
    by_film: dict[str, list[Mark]] = {film.name: [] for film in films}
    others: dict[str, int] = {}
    for mark in marks:
        files = videos.find(mark.video)
        clip = None if files else videos.at(mark.video, mark.time_sec, 0)
        if clip:
            file, second = clip
            listed[file].movie, listed[file].start_sec = mark.video, mark.time_sec - second
            files = [file]
        if len(files) == 1:
            by_film[listed[files[0]].name].append(mark)
        else:
            others[mark.video] = others.get(mark.video, 0) + 1
    return by_film, others


def offset_of(film: Film, marks: list[Mark], offsets: set[float]) -> float:
    """Seconds from the start of the movie to that of its file, if the boxes count in the movie."""
    if film.movie:
        return film.start_sec
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
    predict: Callable,
    task: data.Task,
    classes: list[str],
    films: list[Film],
    top: int,
    several: bool,
) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """(video, microseconds) -> boxes (k, 4), scores (k, C); the best are printed and drawn.

    predict: a dataset -> its (batch, logits), as the method's evaluation does it. several: the
    lines at a box name their task.
    """
    rows, keyframes = [], {}
    for film in films:
        for stamp, keyframe in film.keyframes.items():
            key = (film.movie or film.name, stamp)
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
                keyframe.texts[box].extend(lines_of(task, labels, several))
                where = f"{film.file.name}  {keyframe.time_sec:.3f} s"
                print(f"{where}  {task.name}  box {box}:  {', '.join(labels)}")
    return found


def label_clips(
    predict: Callable,
    task: data.Task,
    classes: list[str],
    films: list[Film],
    options: argparse.Namespace,
    several: bool,
) -> list[list]:
    """Rows of clips.csv: a clip every every_sec, from its first frame to its last, every class.

    A clip that would begin before its film or end after it is moved inside, as far as it fits.
    """
    rows, stretches = [], {}
    length_sec = task.frames * task.step_sec
    for film in films:
        for second in persons.regular_times(film.end_sec, options.every_sec):
            key = (film.name, data.microseconds(second))
            first = second - task.frames // 2 * task.step_sec
            start = max(0.0, min(first, film.end_sec - length_sec))
            rows.append((key, str(film.file), start, 0, [], start + length_sec))
            stretches[key] = film, second, start
    table = []
    for batch, logits in predict(dataset_of(task, classes, rows)):
        scores = logits.softmax(1).cpu().numpy()  # (B, C)
        for key, row, valid in zip(batch.keys, scores, batch.valid, strict=True):
            if not valid:
                continue
            film, second, start = stretches[key]
            labels = best_labels(classes, row, options.top)
            film.clips.setdefault(key[1], []).extend(lines_of(task, labels, several))
            print(f"{film.file.name}  {second:.3f} s  {task.name}:  {', '.join(labels)}")
            end = min(film.end_sec, start + length_sec)
            for label, score in zip(classes, row, strict=True):
                table.append([film.name, f"{start:.3f}", f"{end:.3f}", label, f"{score:.6f}"])
    return table


def lines_of(task: data.Task, labels: list[str], several: bool) -> list[str]:
    """What is drawn: a label a line or, where several tasks speak, a task a line."""
    return [f"{task.name}: {', '.join(labels)}"] if several else labels


def dataset_of(task: data.Task, classes: list[str], rows: list[tuple]) -> data.Dataset:
    return data.Dataset(task, "val", classes, data.Items("", rows, len(classes)), {})


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
    """The boxes of keyframes, and between them.

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
        gaps = np.diff(self.times)
        step_sec = np.sort(gaps)[(len(gaps) - 1) // 2] if len(gaps) else 1.0  # the lower median
        self.half_sec = step_sec / 2
        self.links: list[dict[int, int]] = []  # from the boxes of a keyframe to those of the next
        for i, gap in enumerate(gaps):
            near = gap <= 1.5 * step_sec
            self.links.append(link(self.boxes[i], self.boxes[i + 1]) if near else {})

    def at(self, second: float) -> tuple[list[np.ndarray], list[list[str]]]:
        """The boxes on screen at this time and the lines of text of each."""
        after = bisect_right(self.times, second)
        before = after - 1
        links = self.links[before] if 0 < after < len(self.times) else {}
        boxes, texts = [], []
        for i, j in links.items():
            share = (second - self.times[before]) / (self.times[after] - self.times[before])
            start, end = self.boxes[before][i], self.boxes[after][j]
            boxes.append(start + share * (end - start))
            nearer, place = (before, i) if share <= 0.5 else (after, j)
            texts.append(self.keyframes[nearer].texts[place])
        alone = []  # (keyframe, rows that are linked to the other side)
        if before >= 0 and second - self.times[before] < self.half_sec:
            alone.append((before, links.keys()))
        if after < len(self.times) and self.times[after] - second <= self.half_sec:
            alone.append((after, links.values()))
        for number, linked in alone:
            for i, box in enumerate(self.boxes[number]):
                if i not in linked:
                    boxes.append(box)
                    texts.append(self.keyframes[number].texts[i])
        return boxes, texts


def link(one: np.ndarray, other: np.ndarray) -> dict[int, int]:
    """Row of `one` -> row of `other`, boxes (n, 4) and (m, 4): the best overlaps first, each box
    once. Boxes count at twice their sides, since a walker leaves his own within a second."""
    overlaps = []
    for i, box in enumerate(map(widen, one)):
        for j, candidate in enumerate(map(widen, other)):
            overlap = data.iou(box, candidate)
            if overlap >= SAME_PERSON:
                overlaps.append((overlap, i, j))
    links: dict[int, int] = {}
    for _, i, j in sorted(overlaps, reverse=True):
        if i not in links and j not in links.values():
            links[i] = j
    return dict(sorted(links.items()))


def widen(box: np.ndarray) -> np.ndarray:
    margin = (box[2:] - box[:2]) / 2
    return np.concatenate([box[:2] - margin, box[2:] + margin])
