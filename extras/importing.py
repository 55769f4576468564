"""import: own videos and annotations -> a task: what training reads, a split, a recipe.

The road, each step a function:
    sources.find_sources    which files are annotations, of which kind; which are not read
    sources.read_marks      -> Marks, by the readers in annotations.py and annotation_tools.py
    unify_classes           one spelling for each class
    fit_marks               find each video, put times and boxes into it; what does not fit is said
    choose_parts            train, val, test: as the user's files say, or by the hash of the name
    write_task              annotations, classes, problems, recipe: all of them or none
    report                  what there is of each class and video, what was doubtful
"""

import argparse
import csv
import errno
import functools
import hashlib
import io
import itertools
import math
import os
import re
import shlex
import shutil
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from extras import annotations, formats, sources
from extras.annotations import Library, Mark
from extras.recipe import load, make_tasks, read_tasks
from extras.run import write_text
from extras.videos import FrameTimes

PARTS = ("train", "val", "test")
PART_ENDS = (".csv", ".txt", "_boxes.csv")  # of the files of a part
CLIPS_OPENED = 500  # to know their length; the command `check` reads all


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
    """Read the annotations of the videos in the source, write a task into the target. Raises
    ValueError with file and line; then nothing was written."""
    _check_options(options)
    source, target = options.source, options.target
    given, into = options.annotations, options.into
    library = Library(source, options.every_sec, options.first_frame, options.picture_fps)
    if not library.files:
        raise ValueError(f"{source}: no video there, expected files like *.mp4, *.mkv or *.webm")
    notes: list[str] = []
    _refuse_videos(target, library)
    found, others = sources.find_sources(library, given, target)
    if found:
        unit, attributes = options.boxes, options.attribute
        marks = sources.read_marks(found, others, library, given, unit, attributes, notes)
    elif given and given.is_file():
        raise ValueError("; ".join(source.said for source in others[:3]))
    else:
        marks = sources.read_class_folders(library, given, others, notes)
    notes += [source.said for source in others]
    if not marks:
        names = ", ".join(source.name for source in found[:3])
        raise ValueError("; ".join([f"{names}: nothing is annotated", *notes[:3]]))
    problems = library.doubts + library.slow_pictures()
    usable = fit_marks(marks, library, problems)
    usable = open_clips(usable, library, problems)
    boxes = any(len(mark.box) for mark in usable)
    ids = number_classes(unify_classes(usable, problems), boxes)
    if 2 * len(usable) <= len(marks):
        hint = f", with --boxes {options.boxes}" if options.boxes else ""
        hint += "" if usable or given else _other_annotations(found, library)
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{len(usable)} of {len(marks)} rows can be used{hint}: {'; '.join(problems[:3])}{more}"
        )
    if not ids:
        raise ValueError(f"{usable[0].where}: {len(usable)} rows can be used, none has a label")
    notes += [
        f"{name!r} is taken as one class; two actions of a person are two rows with the same box"
        for name in ids
        if re.search("[;|]", name)
    ]
    seed, val_share, group_by = options.seed, options.val_share, options.group_by
    settings = f"seed {seed}, share {val_share:g}, group-by {group_by or 'none'}"
    made_with, before = read_split(target / "split.csv")
    kept = before if made_with == settings else {}
    parts = choose_parts(usable, val_share, seed, group_by, kept, problems, notes)
    moved = [file for file in parts if before.get(file) == "train" != parts[file]]
    if moved:
        notes.append(
            f"the split changed: {len(moved)} videos that were trained validate or test now, runs "
            f"trained before have seen them ({moved[0]}, ...; before: {made_with})"
        )
    task = ImportedTask(usable, parts, ids, library, target)
    problems = sorted(problems + one_sided_classes(task), key=_line_of)
    problems = write_task(task, given, into, notes, problems, settings)
    report(task, notes, problems, into)


def _check_options(options: argparse.Namespace) -> None:
    source, target = options.source, options.target
    given, into = options.annotations, options.into
    if not 0 < options.val_share < 1:
        raise ValueError(f"--val-share {options.val_share:g}, expected a share above 0 and below 1")
    if not options.every_sec >= 0:
        raise ValueError(f"--every-sec {options.every_sec:g}, expected 0 or more seconds")
    if not 0 <= options.picture_fps < math.inf:
        raise ValueError(
            f"--picture-fps {options.picture_fps:g}, expected pictures a second, above 0"
        )
    try:
        re.compile(options.group_by)
    except re.error as error:
        raise ValueError(f"--group-by {options.group_by!r}: {error}") from None
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder, expected one with videos")
    paths = str(source.resolve()) + str(target.resolve())
    if not paths.isprintable() or '"' in paths or "\\" in paths:
        raise ValueError(f"{str(target)!r}: a path that a recipe cannot hold, rename the folder")
    if target.exists() and source.samefile(target):  # also where capitals do not count
        raise ValueError(f"{target}: the folder to write, expected another than that of the videos")
    if into and not into.is_file():
        raise ValueError(f"--into {into}: no such recipe")
    if given and not given.exists():
        raise ValueError(f"--annotations {given}: no such file or folder")


def _refuse_videos(target: Path, library: Library) -> None:
    inside = Path(os.path.relpath(target.resolve(), library.folder.resolve()))
    held = [file for file in library.files if Path(file).is_relative_to(inside)]
    if target.is_dir():
        held += filter(data.is_video, os.listdir(target))
    if held:
        raise ValueError(f"{target}: holds videos ({held[0]}), expected a folder to write into")


def _other_annotations(found: list[sources.Source], library: Library) -> str:
    """What may have been meant where no row fits: the classes are folders, or another file."""
    names = ", ".join(source.name for source in found[:3])
    folders = sorted({file.split(os.sep)[0] for file in library.files if os.sep in file})
    if not folders:
        return f" of {names} (--annotations names another file or folder)"
    some = ", ".join(folders[:3])
    return (
        f" of {names} (if the folders {some} are the classes, move it elsewhere; --annotations "
        "names another file or folder)"
    )


def _line_of(problem: str) -> tuple[str, int]:
    """File and line of a problem, to sort by."""
    match = re.match(r"(.+?):(\d+): ", problem)
    return (match[1], int(match[2])) if match else (problem, 0)


# ------------------------------------------------------------------------------------------------
# Classes, times and boxes
# ------------------------------------------------------------------------------------------------


def unify_classes(marks: list[Mark], problems: list[str]) -> list[str]:
    """One spelling where classes differ in case, blanks, - or _: the commonest; -> the classes."""
    spellings: dict[str, dict[str, list[Mark]]] = {}
    for mark in marks:
        # One line of composed letters, whoever wrote it: macOS, a spreadsheet's Alt+Enter.
        mark.label = unicodedata.normalize("NFC", " ".join(mark.label.split()))
        plain = re.sub(r"[\s_-]+", " ", mark.label.casefold()).strip()
        if not plain or re.fullmatch(r"-\d+", mark.label):  # -1 is not 1
            plain = mark.label
        spellings.setdefault(plain, {}).setdefault(mark.label, []).append(mark)
    names = set()
    for same in spellings.values():
        best = max(same, key=lambda label: len(same[label]))
        name = best.replace('"', "'")  # an action list puts it in "
        names.add(name)
        for label, having in same.items():
            if label != best:
                problems.append(
                    f"{having[0].where}: {label!r} ({len(having)} rows) is taken as {best!r}"
                )
            for mark in having:
                mark.label = name
    return sorted(names - {""}, key=lambda name: (name.casefold(), name))


def number_classes(classes: list[str], boxes: bool) -> dict[str, int]:
    """class: id, in order from 1 on. A row of clips may name a class or number it, so that there a
    class called by a number has that one; rows of boxes have numbers alone."""
    ids = {}
    for name in classes:
        if not boxes and re.fullmatch(r"0|[1-9]\d{0,8}", name):
            ids[name] = int(name)
    free = (number for number in itertools.count(1) if number not in ids.values())
    for name in classes:
        if name not in ids:
            ids[name] = next(free)
    return ids


def fit_marks(marks: list[Mark], library: Library, problems: list[str]) -> list[Mark]:
    """The marks that can be used, each with its file, boxes in [0, 1], times in seconds."""
    usable = []
    for mark in marks:
        wrong = mark.wrong or _fit(mark, library)
        if wrong:
            problems.append(f"{mark.where}: {wrong}")
        if mark.file:
            usable.append(mark)
    return usable


def _fit(mark: Mark, library: Library) -> str:
    """Fit one mark; -> what is wrong with it. One that cannot be used is left without file."""
    if len(mark.box) == 0 and not mark.label.strip():
        return "no label"
    file, wrong = library.look(mark.video)
    if not file or mark.is_clip:
        mark.file = file
        return wrong
    clock = library.clock(file)
    if isinstance(clock, str):
        return clock
    if len(mark.box) == 0:
        return _fit_stretch(mark, file, clock)
    if "," in library.videos.name_of(file):
        return f"AVA csv cannot hold the comma in the name of {file!r}: rename it"
    wrong = annotations.place(mark, clock)
    if len(mark.box):
        mark.file = file
    return wrong


def open_clips(marks: list[Mark], library: Library, problems: list[str]) -> list[Mark]:
    """The marks without those of damaged clips; of very many, CLIPS_OPENED are opened."""
    files = sorted({mark.file for mark in marks if mark.is_clip})
    for i in np.linspace(0, len(files) - 1, min(len(files), CLIPS_OPENED)).astype(int):
        clock = library.clock(files[i])
        if isinstance(clock, str):
            problems.append(clock)
    return [mark for mark in marks if not isinstance(library.clocks.get(mark.file), str)]


def _fit_stretch(mark: Mark, file: str, clock: FrameTimes) -> str:
    stated = f"{mark.time_sec:g} to {mark.end_sec:g} s of {file}, which has {clock.end_sec:.3f} s"
    if not 0 <= mark.time_sec < min(mark.end_sec, clock.end_sec):
        return f"{stated}: left out"
    mark.file = file
    if mark.end_sec > clock.end_sec + 0.5:
        stated += ": cut off"
    else:
        stated = ""
    mark.end_sec = min(mark.end_sec, clock.end_sec)
    return stated


# ------------------------------------------------------------------------------------------------
# The split
# ------------------------------------------------------------------------------------------------


def choose_parts(
    marks: list[Mark],
    share: float,
    seed: int,
    group_by: str,
    kept: dict[str, str],
    problems: list[str],
    notes: list[str],
) -> dict[str, str]:
    """file -> "train", "val" or "test".

    What the user's files say is kept; a video that they put into two parts is not trained. If they
    name no part to validate on, that is the test part, or it is drawn by draw_split from the rest,
    except for videos that `kept` (the last split) names.
    """
    stated = _stated_parts(marks, problems)
    named = set(stated.values())
    if named == {"train", "test"}:
        notes.append("no validation part is named: the test part is validated on")
        stated = {file: part.replace("test", "val") for file, part in stated.items()}
    elif named == {"train"} and all(mark.file in stated for mark in marks):
        stated = {}  # all may be trained; what is validated on is drawn
    classes: dict[str, set[str]] = {}  # of each group of videos that stay together
    groups: dict[str, dict[str, None]] = {}  # its files, in order
    for mark in marks:
        group = group_of(mark.file, group_by)
        classes.setdefault(group, set()).update({mark.label} - {""})
        groups.setdefault(group, {})[mark.file] = None
    if group_by and max(map(len, groups.values())) == 1:
        notes.append(f"--group-by {group_by} finds no two videos that belong together")
    fixed: dict[str, str] = {}
    for group, files in groups.items():
        for part in PARTS:  # a divided group stays so; its rest goes with the first
            if any((stated.get(file) or kept.get(file)) == part for file in files):
                fixed.setdefault(group, part)
    if not stated and fixed:
        notes.append(f"{len(fixed)} of {len(groups)} keep their part in split.csv")
    drawn = draw_split(classes, share, seed, fixed)
    parts = {}
    for group, files in groups.items():
        for file in files:
            parts[file] = stated.get(file) or drawn[group]
    _check_parts(parts, stated, len(groups), problems)
    return parts


def _check_parts(
    parts: dict[str, str], stated: dict[str, str], groups: int, problems: list[str]
) -> None:
    if {"train", "val"} <= set(parts.values()):
        return
    if len(stated) == len(parts):  # then all are validated or tested
        reasons = [problem for problem in problems if ": taken for " in problem]
        raise ValueError(
            f"of {len(parts)} videos none is left to train: "
            f"{'; '.join(reasons[:3]) or 'the files name no train part'}"
        )
    raise ValueError(
        f"{groups} videos (or groups of them) with labels, expected two or more: one to train and "
        "one to validate"
    )


def _stated_parts(marks: list[Mark], problems: list[str]) -> dict[str, str]:
    """file -> the part that the user's files name; of several the one furthest from training."""
    stated: dict[str, str] = {}
    said = set()
    for mark in marks:
        before = stated.get(mark.file, mark.part)
        if mark.part and before and mark.part != before:
            first, last = sorted((mark.part, before), key=PARTS.index)
            if (mark.file, first, last) not in said:
                said.add((mark.file, first, last))
                problems.append(
                    f"{mark.where}: {mark.file} is in {first} and in {last}: taken for {last}"
                )
            stated[mark.file] = last
        elif mark.part:
            stated[mark.file] = mark.part
    return stated


def group_of(file: str, group_by: str) -> str:
    """Videos of the same group are in the same part.

    group_by: "" each video by itself; a number n: the first n folders; else a regular expression,
    the group is what it finds in the path (or its first parenthesis); without a match, the path.
    """
    path = formats.plain_path(os.path.splitext(file)[0])
    if not group_by:
        return path
    if group_by.isdecimal():
        folders = path.split("/")[:-1]
        return "/".join(folders[: int(group_by)]) or path
    match = re.search(group_by, path)
    if not match:
        return path
    found = match[1] if match.re.groups else match[0]
    return found or path  # a parenthesis may have found nothing


def draw_split(
    classes: dict[str, set[str]], share: float, seed: int, fixed: dict[str, str]
) -> dict[str, str]:
    """video (or group of them) -> "train" or "val"; classes: what each shows.

    1. A number in [0, 1) follows from each name and the seed (place_of). Below `share`: val.
    2. A class that is then not trained: its video with the largest number is.
    3. A class of two videos or more that is then not validated: its video with the smallest number
       is, if each of that one's classes keeps a trained video; else such a one comes back from val.
    Rare classes first. So a video's part does not depend on the others, but where a class would be
    missing in a part. `fixed` videos stay where they are.
    """
    numbers = {name: place_of(name, seed) for name in classes}
    split = _Split(classes, sorted(classes, key=lambda name: (numbers[name], name)))
    for name in split.order:
        split.parts[name] = fixed.get(name) or ("val" if numbers[name] < share else "train")
    free = [name for name in split.order if name not in fixed]
    rarest = sorted(split.shown, key=lambda label: (len(split.shown[label]), label))
    for label in rarest:
        having = [name for name in split.shown[label] if name not in fixed]
        if having and not split.count(label, "train"):
            split.parts[having[-1]] = "train"
    for label in rarest:
        if len(split.shown[label]) > 1 and not split.count(label, "val"):
            having = [name for name in split.shown[label] if name not in fixed]
            if not split.validate_one(having, []):
                split.validate_one(having, free)
    if "val" not in split.parts.values():
        moved = split.validate_one(free, [])
        if not moved and len(free) > 1:
            split.parts[free[0]] = "val"
    return split.parts


class _Split:
    """Videos (or groups of them) by their numbers, their parts, and what they show."""

    def __init__(self, classes: dict[str, set[str]], order: list[str]):
        self.classes, self.order = classes, order
        self.parts: dict[str, str] = {}
        self.shown: dict[str, list[str]] = {}  # class -> its videos
        for name in order:
            for label in classes[name]:
                self.shown.setdefault(label, []).append(name)

    def count(self, label: str, part: str) -> int:
        return sum(self.parts[name] == part for name in self.shown[label])

    def validate_one(self, candidates: list[str], returning: list[str]) -> bool:
        """Move the first candidate to val that leaves no class untrained; was there one?

        For a class that it would leave so, the last of `returning` that can comes back from val.
        """
        for candidate in candidates:
            before = dict(self.parts)
            self.parts[candidate] = "val"
            for label in sorted(self.classes[candidate]):
                if not self.count(label, "train"):
                    self._train_one(label, [name for name in returning if name != candidate])
            if all(self.count(label, "train") for label in self.classes[candidate]):
                return True
            self.parts = before
        return False

    def _train_one(self, label: str, candidates: list[str]) -> None:
        """Move the last candidate to train that leaves no class without validation."""
        for name in reversed(candidates):
            if label not in self.classes[name] or self.parts[name] != "val":
                continue
            if all(self.count(other, "val") > 1 for other in self.classes[name]):
                self.parts[name] = "train"
                return


def place_of(name: str, seed: int) -> float:
    """A number in [0, 1), the same everywhere and for ever."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_table(path: Path) -> list[list[str]]:
    """The rows of a split.csv, also as a spreadsheet saves it; [] if there is none."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    separator = ";" if text.startswith("video;part;") else ","
    return list(csv.reader(text.splitlines(), delimiter=separator))


def read_split(path: Path) -> tuple[str, dict[str, str]]:
    """The settings of the last import, and file -> its part there; "" and {} if there is none."""
    rows = _split_table(path)
    if not rows or rows[0][:2] != ["video", "part"]:
        return "", {}
    parts = {}
    for row in rows[1:]:
        if len(row) != 2 or row[1] not in PARTS:
            raise ValueError(f"{path}: {','.join(row)}, expected a video and train, val or test")
        parts[row[0]] = row[1]
    return "".join(rows[0][2:3]), parts


# ------------------------------------------------------------------------------------------------
# Writing: all of it or nothing
# ------------------------------------------------------------------------------------------------


@dataclass
class ImportedTask:
    """What is written."""

    marks: list[Mark]
    parts: dict[str, str]  # file -> part
    ids: dict[str, int]  # class -> its number
    library: Library
    target: Path

    @functools.cached_property  # it is asked for at every mark
    def form(self) -> str:
        """Boxes at keyframes, stretches of videos, or whole clips."""
        if any(len(mark.box) for mark in self.marks):
            return "boxes"
        return "clips" if all(mark.is_clip for mark in self.marks) else "stretches"

    @property
    def suffix(self) -> str:
        return "txt" if self.form == "clips" else "csv"

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "-", self.target.resolve().name).strip("-") or "own"

    def of_part(self, part: str) -> list[Mark]:
        return [mark for mark in self.marks if self.parts[mark.file] == part]


def write_task(
    task: ImportedTask,
    given: Path | None,
    into: Path | None,
    notes: list[str],
    problems: list[str],
    settings: str,
) -> list[str]:
    """Write everything beside the target, read it as training will, then put it in its place.

    -> the problems, with that of a recipe which was kept and is not right for what was written.
    """
    target = task.target.resolve()
    texts = {
        "actions.pbtxt": [
            f'label {{ name: "{name}" label_id: {number} }}' for name, number in task.ids.items()
        ],
        "problems.txt": [],
        "split.csv": [_csv_row(["video", "part", settings])],
    }
    for row in sorted(task.parts.items()):
        texts["split.csv"].append(_csv_row(row))
    for part in PARTS:
        texts |= _part_texts(task, part)
    own = [(target / name).resolve() for name in texts]
    if given and given.resolve() in own:
        raise ValueError(f"{given} would be overwritten: take another folder than {target}")
    former = _former_files(target, sorted(texts))
    new = recipe_text(task, texts)
    kept = into or task.target / "recipe.toml"
    if kept.exists():
        problems = [*problems, *_misfits(kept, task, new)]
    texts["problems.txt"] = notes + problems
    draft = target.with_name(f".{target.name}.importing")  # as deep: relative paths are right
    shutil.rmtree(draft, ignore_errors=True)  # of an import that was killed
    draft.mkdir(parents=True)
    try:
        for name, lines in texts.items():
            text = "".join(f"{line}\n" for line in lines)
            (draft / name).write_text(text, encoding="utf-8")
        (draft / "recipe.toml").write_text(new, encoding="utf-8")
        _read_back(draft / "recipe.toml", task)
        recipe = _recipe_with_task(task, texts, into) if into else ""
        target.mkdir(parents=True, exist_ok=True)
        if into or (target / "recipe.toml").exists():
            (draft / "recipe.toml").unlink()
        ready = sorted(draft.iterdir(), key=lambda path: (path.name != "split.csv", path.name))
        for path in ready:  # split.csv first: by it the folder is import's
            _move(path, target / path.name)
        for name in former:
            if name not in texts:  # evaluation, for instance, would go on with old boxes
                (target / name).unlink(missing_ok=True)
        if into:
            write_text(into.resolve(), recipe)
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(str(draft), str(task.target))) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return problems


def _move(path: Path, target: Path) -> None:
    """As a rename, whole or not at all, also where the target is another disk's (a mount)."""
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = target.with_name(f"{target.name}.part")
        shutil.copyfile(path, part)
        part.replace(target)


def _former_files(target: Path, names: list[str]) -> list[str]:
    """What an import before this one wrote of the parts; ValueError if `names` are others' files.

    An import is known by the first line of its split.csv, which has its settings; where that was
    deleted, to draw anew, by its problems and actions.
    """
    rows = _split_table(target / "split.csv")
    first = rows[0] if rows else []
    if first[:2] == ["video", "part"] and "".join(first[2:]).startswith("seed "):
        parts = {row[-1] for row in rows[1:] if row}
        return [f"{part}{end}" for part in parts & set(PARTS) for end in PART_ENDS]
    if not rows and (target / "problems.txt").exists() and (target / "actions.pbtxt").exists():
        return [f"{part}{end}" for part in PARTS for end in PART_ENDS]
    for name in names:
        if (target / name).exists():
            raise ValueError(
                f"{target / name} is there and would be replaced, but this is no folder of an "
                "import: take another one to write"
            )
    return []


def _misfits(kept: Path, task: ImportedTask, new: str) -> list[str]:
    """A sentence if a recipe that is kept has the task otherwise than it is now; or nothing.

    new: the text of a recipe of its own. val_boxes that import does not write are the user's.
    """

    def full(root: Path, path: str) -> str:
        return os.path.realpath(root / path) if path else ""

    (meant,), _ = make_tasks(tomllib.loads(new)["task"])
    folder = task.target.resolve()
    for there, root in read_tasks(kept):
        if there.name != meant.name and full(root, there.train) != full(folder, meant.train):
            continue
        wrong = []
        for key in ("kind", "train", "val", "labels", "videos", "val_boxes"):
            before, now = getattr(there, key), getattr(meant, key)
            if key == "kind":
                same = before == now
            else:
                same = full(root, before) == full(folder, now)
            if key == "val_boxes":
                same |= full(root, before) not in ("", full(folder, "val_boxes.csv"))
            if not same:
                wrong.append(f"{key} = {before!r}, now {now!r}")
        if wrong:
            return [
                f"{kept} was kept and does not fit what was written: {'; '.join(wrong)} (change "
                "it, or delete the recipe and import again)"
            ]
        return []
    own = kept == task.target / "recipe.toml"
    return [f"{kept} was kept and has no task {meant.name!r}"] if own else []


def _csv_row(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def _part_texts(task: ImportedTask, part: str) -> dict[str, list[str]]:
    """The annotations of a part; {} if it has none.

    Evaluation knows no annotated person without action: val.csv gets only their keyframes, and
    val_boxes.csv all persons, which are then predicted like detected ones.
    """
    marks = task.of_part(part)
    if not marks:
        return {}
    if task.form == "clips":
        rows = {f"{mark.file} {task.ids[mark.label]}" for mark in marks}
        return {f"{part}.txt": sorted(rows)}
    if task.form == "stretches":
        rows = {_stretch_row(mark) for mark in marks}
        return {f"{part}.csv": ["video,start,end,label", *sorted(rows)]}
    rows, keyframes, boxes = set(), set(), set()
    persons: dict[tuple[str, str], int] = {}
    for mark in marks:
        video = task.library.videos.name_of(mark.file)
        when = f"{video},{mark.time_sec:.6f}"
        box = ",".join(f"{x:.6f}" for x in mark.box)
        number = ""
        if mark.person:  # AVA's are whole numbers
            number = f",{persons.setdefault((video, mark.person), len(persons))}"
        boxes.add(f"{when},{box},,1")
        if mark.label or part == "train":
            rows.add(f"{when},{box},{task.ids.get(mark.label, -1)}{number}")
        else:
            keyframes.add(when)
    texts = {f"{part}.csv": sorted(rows | keyframes)}
    if keyframes:
        texts[f"{part}_boxes.csv"] = sorted(boxes)
    return texts


def _stretch_row(mark: Mark) -> str:
    return _csv_row([mark.file, f"{mark.time_sec:.6f}", f"{mark.end_sec:.6f}", mark.label])


def _read_back(recipe: Path, task: ImportedTask) -> None:
    """Read what was written as training will; ValueError if it is not what was meant."""
    ((opened, root),) = read_tasks(recipe)
    for part in ("train", "val"):
        dataset = data.open_task(opened, root, part, formats)
        meant = {os.path.join(task.library.folder, mark.file) for mark in task.of_part(part)}
        read = {os.path.realpath(item.path) for item in dataset.items}
        lost = {os.path.realpath(path) for path in meant} - read
        if lost:
            raise ValueError(f"{sorted(lost)[0]}: training would not find it; rename it")


# ------------------------------------------------------------------------------------------------
# The recipe
# ------------------------------------------------------------------------------------------------

RECIPE = """\
# python cofinetune.py train --recipe {recipe}
# Every key below is an option too: --lr 0.0001, --task.{name}.batch 16, --model.arch B
# On a CPU, to see it work:
#   --model.arch tiny --task.{name}.size 64 --task.{name}.short_side "[64, 64]" --steps 60
root = "."                  # of the paths below; itself relative to this file
out = "runs/{name}"
steps = {steps}                 # {passes} passes over {items} training items
optimiser = "adamw"
lr = 0.0005
weight_decay = 0.05
warmup = {warmup}
# init = "checkpoint.pth"   # pretrained weights; then lr = 0.0001, layer_decay = 0.75
                            # and the frames and stride of those weights

[model]
arch = "S"                  # tiny, small, S, B, L, H
frames = {frames}
"""

TASK = """
[[task]]
name = "{name}"
kind = "{kind}"
train = "{folder}train.{suffix}"
val = "{folder}val.{suffix}"
labels = "{folder}actions.pbtxt"
videos = "{videos}"
{lines}batch = 8
flip = {flip}                  # 0.0 where left and right matter
"""

FURTHER = """
# Further tables train with this one, each with its own head: co-finetuning. Own ones are added by
#   python cofinetune.py import MORE_VIDEOS more --into {recipe}
# Public ones are written by hand, for instance
# [[task]]
# name = "kinetics400"
# kind = "clip"
# train = "kinetics400/train.csv"   # or a list of `path label`, or a folder per class
# val = "kinetics400/val.csv"
# videos = "kinetics400/videos"
"""


def recipe_text(task: ImportedTask, texts: dict[str, list[str]]) -> str:
    """A recipe of its own for the task."""
    length = clip_length(task)
    items = len({(mark.file, mark.time_sec) for mark in task.of_part("train")})
    steps = max(200, 30 * items // 8)
    recipe = task.target / "recipe.toml"
    return (
        RECIPE.format(
            recipe=recipe,
            name=task.name,
            steps=steps,
            passes=steps * 8 // items,
            items=items,
            warmup=steps // 20,
            frames=length["frames"],
        )
        + _task_text(task, texts, task.target, length)
        + FURTHER.format(recipe=recipe)
    )


def _task_text(task: ImportedTask, texts: dict[str, list[str]], root: Path, values: dict) -> str:
    """The [[task]] table; root: the folder that its paths are relative to."""
    lines = "".join(f"{key} = {value}\n" for key, value in values.items())
    if task.form == "boxes":
        boxes = '# val_boxes = "boxes.csv"   # detected persons to evaluate on\n'
        if "val_boxes.csv" in texts:
            boxes = 'val_boxes = "{folder}val_boxes.csv" # all annotated persons, also idle ones\n'
        lines = boxes + lines
    folder = Path(os.path.relpath(task.target.resolve(), root.resolve())).as_posix()
    folder = "" if folder == "." else f"{folder}/"
    names = " ".join(task.ids).casefold()
    mirrored = re.search(r"(?<![a-z])(left|right)(?![a-z])", names)
    videos = os.path.relpath(task.library.folder.resolve(), root.resolve())
    return TASK.format(
        name=task.name,
        kind="box" if task.form == "boxes" else "clip",
        folder=folder,
        suffix=task.suffix,
        videos=Path(videos).as_posix(),
        lines=lines.format(folder=folder),
        flip="0.0" if mirrored else "0.5",
    )


def _recipe_with_task(task: ImportedTask, texts: dict[str, list[str]], into: Path) -> str:
    """The text of the recipe `into` with the task at its end, or as it is if it has it already."""
    text = into.read_text(encoding="utf-8-sig")  # some editors' UTF-8 begins with a mark
    table = load(into)
    others = table["task"]
    root = into.resolve().parent / table.get("root", ".")  # of a link, where it leads
    values = clip_length(task)
    for key in ("frames", "stride", "fps", "size", "short_side"):  # one encoder sees all tasks
        if others and key in others[0]:
            values[key] = others[0][key]
    added = _task_text(task, texts, root, values)
    (new,) = tomllib.loads(added)["task"]
    for other in others:
        if other.get("name") != task.name:
            continue
        if other.get("train") == new["train"]:
            return text
        raise ValueError(f"{into} has a task {task.name!r} already: take another folder to write")
    text = f"{text.rstrip()}\n{added}"
    _, problems = make_tasks(tomllib.loads(text)["task"])
    if problems:
        raise ValueError(f"{into}: {'; '.join(problems)}")
    return text


def clip_length(task: ImportedTask) -> dict[str, int]:
    """frames and stride (in 1/25 s) that fit: 16 x 4, 2.56 s, or as long as most clips are."""
    if task.form == "boxes":
        return {"frames": 16, "stride": 4}
    seconds = []
    for mark in task.marks:
        clock = task.library.clocks.get(mark.file)
        if task.form == "stretches":
            seconds.append(mark.end_sec - mark.time_sec)
        elif isinstance(clock, FrameTimes):
            seconds.append(clock.end_sec)
    ticks = int(25 * np.quantile(seconds, 0.1)) if seconds else 64
    frames = 16 if ticks >= 16 else 8
    return {"frames": frames, "stride": min(max(ticks // frames, 1), 4)}


# ------------------------------------------------------------------------------------------------
# What is said
# ------------------------------------------------------------------------------------------------


def class_counts(task: ImportedTask, part: str) -> Counter:
    return Counter(mark.label for mark in task.of_part(part))


def one_sided_classes(task: ImportedTask) -> list[str]:
    """Sentences on classes that are not trained or not validated."""
    train, val = class_counts(task, "train"), class_counts(task, "val")
    said = []
    for name in task.ids:
        if not (train[name] and val[name]):
            having = [mark for mark in task.marks if mark.label == name]
            where = "train" if train[name] else "val" if val[name] else "test"
            videos = len({mark.file for mark in having})
            said.append(f"{having[0].where}: {name!r} is only in {where}, {videos} videos have it")
    return said


def report(task: ImportedTask, notes: list[str], problems: list[str], into: Path | None) -> None:
    train, val = class_counts(task, "train"), class_counts(task, "val")
    print(f"{'class':32} {'id':>4} {'train':>9} {'val':>6}  {task.form}")
    for name, number in task.ids.items():
        print(f"{name[:32]:32} {number:4} {train[name]:9} {val[name]:6}")
    if task.form == "boxes":
        _report_videos(task)
    for note in notes:
        print(f"note: {note}")
    for problem in problems[:30]:
        print(f"problem: {problem}")
    counts = Counter(task.parts.values())
    test = f", {counts['test']} to test (test.{task.suffix})" if counts["test"] else ""
    recipe = into or task.target / "recipe.toml"
    if into:
        print(f"{into} has {len(read_tasks(into))} tasks, which share its steps")
    print(
        f"{counts['train']} videos to train, {counts['val']} to validate{test}; "
        f"{len(problems)} problems, all in {task.target / 'problems.txt'}\n"
        f"next:\n  python cofinetune.py show {shlex.quote(str(recipe))}\n"
        f"  python cofinetune.py train --recipe {shlex.quote(str(recipe))}"
    )


def _report_videos(task: ImportedTask) -> None:
    print(f"\n{'video':32} {'part':>5} {'keyframes':>9} {'boxes':>6}")
    files = sorted(task.parts)
    for file in files[:40]:
        marks = [mark for mark in task.marks if mark.file == file]
        keyframes = {mark.time_sec for mark in marks}
        boxes = {(mark.time_sec, *mark.box) for mark in marks}
        name = task.library.videos.name_of(file)
        print(f"{name[-32:]:32} {task.parts[file]:>5} {len(keyframes):9} {len(boxes):6}")
    if len(files) > 40:
        print(f"and {len(files) - 40} more videos")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Own videos and annotations -> a task: annotations, split and recipe."
    parser.add_argument("source", type=Path, help="folder of videos, with annotations or classes")
    parser.add_argument("target", type=Path, help="folder to write; the videos stay where they are")
    add = parser.add_argument_group("annotations").add_argument
    add("--annotations", type=Path, help="file, zip or folder (default: those in source)")
    add(
        "--boxes",
        choices=["norm", "px"],
        default="",
        help="of tables: in [0, 1] or pixels (default: pixels if any value is above 2)",
    )
    add(
        "--every-sec",
        type=float,
        default=1.0,
        help="tracks and annotated frames: seconds from keyframe to keyframe; 0: all (default: 1)",
    )
    add(
        "--attribute",
        action="append",
        default=[],
        help="CVAT: this attribute is an action, others are not (can be repeated; default: "
        "checkboxes and selections)",
    )
    add(
        "--first-frame",
        type=int,
        choices=[0, 1],
        default=0,
        help="number of a video's first frame in a frame column and in names of pictures "
        "(default: 0)",
    )
    add(
        "--picture-fps",
        type=float,
        default=0.0,
        help="of annotated pictures, extracted as by ffmpeg -vf fps=RATE, which counts from 1: "
        "--first-frame 1 (default: each frame is a picture)",
    )
    add = parser.add_argument_group("split").add_argument
    add(
        "--val-share",
        type=float,
        default=0.2,
        help="of the videos, above 0, below 1 (default: 0.2)",
    )
    add("--seed", type=int, default=0, help="of the split (default: 0)")
    add(
        "--group-by",
        default="",
        help="what must stay together: a number of folders, or a regular expression on the path, "
        r"such as '_g(\d+)_' (default: each video by itself)",
    )
    add = parser.add_argument_group("recipe").add_argument
    add("--into", type=Path, help="recipe that gets the task (default: a new one in target)")
