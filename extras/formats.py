"""Annotations in other formats than data.py's own, as they lie on people's disks; and their videos.

    data.open_task(task, root, "train", formats)          # this module

Clip tasks:
    label,youtube_id,time_start,time_end,split            Kinetics: this header, then
    abseiling,0wR5jVB-WPk,417,427,val                     rows; files ID_START_END, in any folder
    adult+female+singing/0P3XG_vf91c_35.mp4,adult+female+singing,4,0    Moments in Time
    [{"id": "78687", "template": "Holding [something]"}]  Something-Something v2
    splits/*_test_split1.txt                              HMDB51, a pattern; rows `x.avi 1`
    video,start,end,label                                 this header: stretches of videos, in sec
    films/long.mp4,12.5,17,pick up                        from the first frame; nothing is cut
    "a, b.mp4";"walk, run"                                lists, whatever separates the columns
Lists of classes: {"name": "0"} or {"0": "name"} (json); a number and a name a line in either order,
whatever separates them, quoted or not, under a header or not.
Videos: moved since the list was written, with another suffix, in another spelling of their name.
"""

import csv
import functools
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import data
from data import (
    HEADER,
    SUFFIX,
    ClipRow,
    files_of,
    is_video,
    list_videos,
    numbered,
    read_lines,
    to_number,
)

NUMBER = r"-?\d*\.?\d+"
PATH_END = re.compile(rf"{SUFFIX}(?=[\s,;]|$)")  # of a video


# ------------------------------------------------------------------------------------------------
# Lists of clips
# ------------------------------------------------------------------------------------------------


def read_clips(path: str, split: str, folder: str) -> Iterator[ClipRow]:
    """The rows of a split of a clip task, in any format. For data.open_task."""
    if Path(path).is_dir():
        yield from data.read_clips(path, split, folder)
    elif "*" in Path(path).name:
        yield from _hmdb51(path, split)
    elif path.endswith(".json"):
        yield from _something(path)
    else:
        _, first = next(read_lines(path), ("", ""))
        if "youtube_id" in first:
            yield from _kinetics(path)
        elif first.replace(" ", "").lower().startswith("video,start,end,label"):
            yield from _stretches(path)
        elif _moments_row(first):
            yield from _moments(path)
        else:
            yield from data.read_clips(path, split, folder, read_row)


def _kinetics(path: str) -> Iterator[ClipRow]:
    lines = read_lines(path)
    header = next(csv.reader([next(lines)[1]]))
    for where, line in lines:
        row = dict(zip(header, next(csv.reader([line])), strict=False))
        try:
            if not row.get("label"):
                raise ValueError("no label (a test list?)")
            if not row.get("youtube_id"):
                raise ValueError("no youtube_id")
            start, end = (int(to_number(row.get(key, ""))) for key in ("time_start", "time_end"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}: {line[:120]}") from None
        yield ClipRow(where, row["label"], f"{row['youtube_id']}_{start:06d}_{end:06d}")


def _stretches(path: str) -> Iterator[ClipRow]:
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if number == 1 or not line.strip():
                continue
            try:
                row = next(csv.reader([line], strict=True))
                name, start, end, label = row
                start_sec, end_sec = to_number(start), to_number(end)
                if not 0 <= start_sec < end_sec or not label.strip():
                    raise ValueError("expected 0 <= start < end and a label")
            except (ValueError, csv.Error) as error:
                raise ValueError(f"{where}: {error}: {line.strip()[:120]}") from None
            yield ClipRow(where, label.strip(), name, start_sec, end_sec)


def _moments_row(line: str) -> re.Match | None:
    """Path, its folder, annotators for and against."""
    return re.fullmatch(r"(?P<path>(?P<label>[^/,]+)/[^/]+),(?P=label),\d+,\d+", line)


def _moments(path: str) -> Iterator[ClipRow]:
    for where, line in read_lines(path):
        row = _moments_row(line)
        if row is None:
            raise ValueError(
                f"{where}: expected `class/file,class,count,count` as above: {line[:120]}"
            )
        yield ClipRow(where, row["label"], row["path"])


def _something(path: str) -> Iterator[ClipRow]:
    for number, entry in enumerate(_read_json(path, list), 1):
        where = f"{path}: entry {number}"
        entry = entry if isinstance(entry, dict) else {}
        name, template = entry.get("id"), entry.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise ValueError(f"{where} has no id or no template: {entry}")
        yield ClipRow(where, re.sub(r"[\[\]]", "", template), name)


def _hmdb51(pattern: str, split: str) -> Iterator[ClipRow]:
    part = "1" if split == "train" else "2"  # 0: unused
    for path in files_of(pattern):
        label = re.sub(r"_test_split\d+$", "", Path(path).stem)
        for where, line in read_lines(path):
            name, _, number = line.rpartition(" ")
            if number not in ("0", "1", "2"):
                raise ValueError(f"{where}: expected `file.avi 0`, 1 or 2: {line[:120]}")
            if number == part:
                yield ClipRow(where, label, name.strip())


def read_row(line: str) -> tuple[str, str]:
    """(path, label) of a row; of a path alone, its folder is the label, as in UCF101's tests."""
    if '"' in line:  # in quotes, whatever separates the two columns
        rows = [next(csv.reader([line], delimiter=mark)) for mark in ",;\t "]
        name, label = next((row for row in rows if len(row) == 2), ("", ""))
    elif suffix := PATH_END.search(line):
        name, rest = line[: suffix.end()], line[suffix.end() :]
        label = rest.lstrip(" \t,;")
        _check_label(rest[: len(rest) - len(label)], label)
        label = label or Path(name.replace("\\", "/")).parent.name
    else:
        # Without a suffix: a number after blank or comma; or a name after comma or tab; or after a
        # blank.
        match = (
            re.fullmatch(r"(.+?)[\s,;]+(\d+(?:\.0+)?)", line)
            or re.fullmatch(r"([^\t,;]+)[\t,;](.+)", line)
            or re.fullmatch(r"([^\t,;]+)\s(\S+)", line)
        )
        name, label = match.groups() if match else ("", "")
        if re.search(rf"[\s,;]{NUMBER}$", name) or re.search(r"[\t,;]", label):
            raise ValueError("expected `path label`, found more columns")
    if not name or not label:
        raise ValueError("expected `path label`, or a path that names the folder of its class")
    if ".0" in label:
        label = re.sub(r"^(\d+)\.0+$", r"\1", label)  # a spreadsheet's whole number
    return name.strip().replace("\\", "/"), label.strip()


def _check_label(mark: str, label: str) -> None:
    """ValueError for what looks like several columns (frames, seconds, boxes, labels). A label can
    have several words though: "pick up", "stand, up"."""
    if not re.search(r"[\s,;]", label):
        return
    several = bool(re.search(r"[;\t]|,\S", label)) or "," in label and mark == ", "
    numbers = [bool(re.fullmatch(NUMBER, word)) for word in label.split()]
    if len(numbers) > 1:
        several |= all(numbers)
        several |= mark.isspace() and "\t" not in mark and (numbers[0] or numbers[-1])
    if several:
        raise ValueError(
            f"expected `path label`, found more columns: {label!r} (quotes make one label of it)"
        )


# ------------------------------------------------------------------------------------------------
# Lists of classes
# ------------------------------------------------------------------------------------------------


def read_classes(path: str | Path) -> dict[int, str]:
    """number -> name, of an action list (.pbtxt), a .json or a text. For data.open_task."""
    suffix = Path(path).suffix
    if suffix == ".pbtxt":
        return data.read_classes(path)
    if suffix == ".json":
        classes = list(_read_json(path, dict).items())
        if not all(name.isdecimal() for name, _ in classes):
            classes = [(number, name) for name, number in classes]
    else:
        classes = _text_classes(path)
    plain = []
    for number, name in classes:
        # SlowFast's class lists quote names of two words, spreadsheets all of them.
        plain.append((str(number), str(name).replace('"', "").strip()))
    return numbered(path, plain)


def _read_json(path: str | Path, kind: type) -> dict | list:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if type(content) is not kind:
        raise ValueError(f"{path}: expected a JSON {kind.__name__}, found {type(content).__name__}")
    return content


def _text_classes(path: str | Path) -> list[tuple[str, str]]:
    lines = [(where, line.replace('"', "")) for where, line in read_lines(path)]
    headed = bool(lines) and re.fullmatch(HEADER, lines[0][1].lower()) is not None
    if headed and len(re.split(r"[,;\t]", lines[0][1])) > 2:
        raise ValueError(f"{lines[0][0]}: expected a number and a name a line: {lines[0][1]}")
    lines = lines[headed:]
    for pattern in (
        r"(?P<number>\d+)(?:\.0)?[\s,:;]+(?P<name>.+)",
        r"(?P<name>.+?)[\s,:;]+(?P<number>\d+)(?:\.0)?",
    ):
        matches = [re.fullmatch(pattern, line) for _, line in lines]
        count = sum(match is not None for match in matches)
        if count and count == len(lines):
            return [(match["number"], match["name"]) for match in matches]
        if count > len(lines) / 2:  # not a list of bare names, of which few hold a number
            where, line = lines[matches.index(None)]
            raise ValueError(f"{where}: no number and name, as {count} other lines have: {line}")
    return [(str(number), line) for number, (_, line) in enumerate(lines)]


# ------------------------------------------------------------------------------------------------
# Videos
# ------------------------------------------------------------------------------------------------


def plain_path(name: str) -> str:
    """One spelling of a path: Windows' \\ becomes /, and an accent and its letter one character,
    where macOS writes two (NFD) and csv files have one (NFC)."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


class Videos(data.Videos):
    """The video files under a folder, by the names that people's annotations have for them."""

    def __init__(self, folder: str | Path, files: list[str] | None = None):
        super().__init__(folder, files)
        self.found: dict[str, list[str]] = {}

    @functools.cached_property
    def stems(self) -> dict[str, list[str]]:
        """stem -> files; the stem in the spelling of plain_path, the files as they are."""
        stems: dict[str, list[str]] = {}
        for file in list_videos(self.folder) if self.given is None else self.given:
            stem, _ = os.path.splitext(plain_path(file).rpartition("/")[2])
            stems.setdefault(stem, []).append(file)
        return stems

    @functools.cached_property
    def by_folder(self) -> dict[tuple[str, str], list[str]]:
        """(name of the folder, stem) -> files: of 0001/rgb.mp4, 0002/rgb.mp4, ... those of one."""
        files: dict[tuple[str, str], list[str]] = {}
        for stem, of_stem in self.stems.items():
            for file in of_stem:
                folder = plain_path(file).split("/")[-2:-1]
                files.setdefault(("".join(folder).replace("_", " "), stem), []).append(file)
        return files

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
        candidates = self.stems.get(stem, [])
        if folders:
            candidates = self.by_folder.get((folders[-1].replace("_", " "), stem), [])
            candidates = candidates + self.by_folder.get(("", stem), [])
        for file in candidates:
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

    def clip(self, row: ClipRow) -> str | None:
        """The file of a row of a clip task, also if it was moved or has another suffix. But
        run/0003.mp4 is not walk/0003.mp4."""
        if self.is_there(row.name):
            return row.name
        parent, base = os.path.split(row.name)
        stem = os.path.splitext(base)[0] if is_video(base) else base
        file, folder = self._of_class(stem, row.label), os.path.basename(parent)
        if file is None and (kinetics := re.fullmatch(r"(.+)_\d{6}_\d{6}", stem)):
            file = self._of_class(kinetics[1], row.label)  # clips under their bare id
        if folder and file and Path(file).parent.name not in (folder, row.label, ""):
            file = None
        if file is None:
            files = self.find(row.name)
            file = files[0] if len(files) == 1 else None
        return file

    def _of_class(self, stem: str, label: str) -> str | None:
        """The file of this stem; of several, the one in the folder of its class."""
        files = self.stems.get(plain_path(stem), [])
        if len(files) > 1:
            folder = plain_path(label).replace("_", " ")
            files = self.by_folder.get((folder, plain_path(stem)), [])[:1]
        return files[0] if files else None


def _common_tail(one: list[str], other: list[str]) -> int:
    """How many of the last words of two lists agree."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count
