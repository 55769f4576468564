"""Annotations as people and their tools write them -> Marks: who does what, when and where.

`read_boxes_table` is the one reader of person boxes: `import` and `predict` take the same files.
"""

import csv
import functools
import io
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

import data
from extras import formats
from extras.videos import FrameTimes, frame_times

NO_VIDEOS = (".csv", ".tsv", ".txt", ".json", ".xml", ".zip", ".jpg", ".jpeg", ".png", ".md")

# ------------------------------------------------------------------------------------------------
# Marks
# ------------------------------------------------------------------------------------------------


@dataclass
class Mark:
    """A statement of a file: an action of a person at a time, of a stretch, or of a whole clip."""

    where: str  # file:line
    video: str  # as written there; formats.Videos.find tells which file that is
    label: str = ""  # "": a person without action
    time_sec: float = math.nan  # from the first frame of the video
    frame: int = -1  # instead of time_sec, counted from 0
    end_sec: float = math.nan  # of a stretch that begins at time_sec
    box: Sequence[float] = ()  # x1, y1, x2, y2
    size: tuple[float, float] | None = None  # in which the box is measured; None: px of the video
    person: str = ""
    score: float = 1.0  # of a person detector
    part: str = ""  # "train", "val" or "test", where the file says so
    wrong: str = ""  # why it cannot be used, if a reader knows
    file: str = ""  # the video, once it is found

    @property
    def is_clip(self) -> bool:
        """Of the whole video: neither a box nor a time."""
        return len(self.box) == 0 and math.isnan(self.time_sec) and self.frame < 0


def place(mark: Mark, clock: FrameTimes) -> str:
    """Turn a frame into its time and put the box into [0, 1], in place; -> what is wrong, or "".

    A mark that cannot be used is left without box; a box over the edge is cut off, and said.
    """
    box, mark.box = np.asarray(mark.box, float), ()
    count = len(clock.times_sec)
    if mark.frame >= count:
        hint = "; --first-frame 1 if they count from 1" if mark.frame == count else ""
        return f"frame {mark.frame} of {mark.video}, which has {count} from 0 on{hint}"
    if mark.frame >= 0:
        mark.time_sec = float(clock.times_sec[mark.frame])
    if not 0 <= mark.time_sec < clock.end_sec:
        return f"time {mark.time_sec:g} s is not within the {clock.end_sec:.3f} s of {mark.video}"
    pixels = np.array([clock.width, clock.height])
    size = pixels if mark.size is None else np.array(mark.size)
    norm = box / [*size, *size]
    inside = norm.clip(0, 1)
    stated = f"box {box.round(3).tolist()} in a picture of {size[0]:g} x {size[1]:g}"
    if ((inside[2:] - inside[:2]) * pixels < 1).any():
        return f"{stated} shows less than a pixel, left out"
    mark.box = inside.tolist()
    if abs(inside - norm).max() > 0.01:
        return f"{stated} reaches over the edge, cut off"
    return ""


# ------------------------------------------------------------------------------------------------
# The videos, found by name and opened once
# ------------------------------------------------------------------------------------------------


class Library:
    """The videos of a folder, found by what annotations call them, each opened once."""

    def __init__(
        self, folder: Path, every_sec: float = 1.0, first_frame: int = 0, picture_fps: float = 0.0
    ):
        """every_sec: between keyframes, 0: all; first_frame: its number, where people count;
        picture_fps: pictures extracted of a second of video, 0: each frame."""
        self.folder, self.every_sec, self.first_frame = folder, every_sec, first_frame
        self.picture_fps = picture_fps
        self.doubts: list[str] = []  # of files as a whole
        self.pictures: dict[str, set[int]] = {}  # video -> numbers of annotated pictures, from 0
        self.videos = formats.Videos(folder)
        self.files = [file for files in self.videos.stems.values() for file in files]
        self.clocks: dict[str, FrameTimes | str] = {}
        self.said = time.monotonic()

    def find(self, name: str) -> list[str]:
        return self.videos.find(name)

    @functools.cached_property
    def by_case(self) -> dict[str, str]:
        return {stem.casefold(): files[0] for stem, files in self.videos.stems.items()}

    @functools.cached_property
    def strangers(self) -> dict[str, Path]:
        """stem -> file, of what has no suffix of a video, a text or a picture."""
        files = {}
        for path in sorted(self.folder.rglob("*")):
            known = path.suffix.lower() in NO_VIDEOS or data.is_video(path.name)
            if path.is_file() and not known:
                files[formats.plain_path(path.stem)] = path
        return files

    def look(self, name: str) -> tuple[str, str]:
        """The one file of that name, or "" and what is wrong."""
        files = self.find(name)
        if len(files) == 1:
            return files[0], ""
        if files:
            several = ", ".join(files[:3])
            return "", f"{len(files)} videos are called {name!r}: {several}; give the path"
        stem = PurePosixPath(formats.plain_path(name)).stem
        elsewhere = self.videos.stems.get(stem, [])
        if elsewhere:
            return "", f"no video is {name!r}; {elsewhere[0]} has that name, but in another folder"
        if stem in self.strangers:
            path = self.strangers[stem]
            return "", (
                f"{path} is there, but {path.suffix!r} is no suffix of a video that is known: "
                "rename it, for instance to .mp4 (the content decides how it is read)"
            )
        wrong = f"no video in {self.folder} is called {name!r}"
        alike = self.by_case.get(stem.casefold())
        return "", f"{wrong}, {alike} differs in case" if alike else wrong

    def clock(self, file: str) -> FrameTimes | str:
        """When its frames are shown, and their size; or why it cannot be read."""
        if file not in self.clocks:
            if time.monotonic() > self.said + 5:
                self.said = time.monotonic()
                count = f"{len(self.clocks)} of {len(self.files)} videos opened"
                print(count, file=sys.stderr)
            try:
                self.clocks[file] = frame_times(self.folder / file)
            except data.DecodeError as error:
                self.clocks[file] = f"damaged video {error}"
        return self.clocks[file]

    def clock_of(self, name: str) -> FrameTimes | None:
        """Of the video of that name; None if there is none or several, or it cannot be read."""
        files = self.find(name)
        clock = self.clock(files[0]) if len(files) == 1 else None
        return None if isinstance(clock, str) else clock

    def shown(self, file: str, picture: int) -> int:
        """The frame of a video that a picture shows, both counted from 0."""
        self.pictures.setdefault(file, set()).add(picture)
        clock = self.clock(file) if self.picture_fps and picture >= 0 else ""
        if isinstance(clock, str):
            return picture
        if picture / self.picture_fps >= clock.end_sec:
            return len(clock.times_sec)  # none: said when the mark is placed
        # What `ffmpeg -vf fps=1` takes: the last frame before half a second, before 1.5 s, ...
        until_sec = (picture + 0.5) / self.picture_fps - 1e-6
        return max(int(np.searchsorted(clock.times_sec, until_sec)) - 1, 0)

    def slow_pictures(self) -> list[str]:
        """A sentence for each video whose pictures look extracted at a lower rate than its own:
        numbered one after the other (but for those of nobody) in the first half of its frames."""
        said = []
        for file, numbers in {} if self.picture_fps else self.pictures.items():
            clock, highest = self.clock(file), max(numbers)
            if isinstance(clock, str) or len(numbers) <= 2:
                continue
            # Half, and some more for 15 pictures of 29.97 frames a second.
            if len(numbers) > 0.6 * highest and highest < 0.55 * len(clock.times_sec):
                first, last = min(numbers) + self.first_frame, highest + self.first_frame
                said.append(
                    f"{file}: pictures numbered {first} to {last}, within "
                    f"{clock.times_sec[highest]:.3g} of {clock.end_sec:.1f} s: were they extracted "
                    "at a lower rate? Then --picture-fps with that rate"
                )
        return said

    def keyframes(self, name: str) -> np.ndarray | None:
        """The frames to annotate, one every every_sec; None: each that has a box."""
        clock = self.clock_of(name) if self.every_sec else None
        if clock is None:
            return None
        ticks = np.arange(0, clock.times_sec[-1], self.every_sec) + 1e-6
        return np.unique(np.searchsorted(clock.times_sec, ticks, "right") - 1)


# ------------------------------------------------------------------------------------------------
# Text and numbers
# ------------------------------------------------------------------------------------------------


def decode_text(name: str, content: bytes) -> str:
    """UTF-8, with or without BOM, or UTF-16 with one (Excel's "Unicode text")."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {error.start} is not UTF-8: save the file as UTF-8"
        ) from None


def read_number(text: str) -> float:
    """A finite number; a decimal comma is one where columns are parted by something else."""
    return data.to_number(text.replace(",", "."))


def read_whole(text: str) -> int:
    """12 or, as spreadsheets write it, 12.0."""
    value = read_number(text)
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def read_seconds(text: str) -> float:
    """Seconds, or hours:minutes:seconds, or minutes:seconds."""
    if text.count(":") > 2:
        raise ValueError(f"{text!r} is a time code with frames (SMPTE), not hours:minutes:seconds")
    if ":" in text and "-" in text:  # -0:05 would be 5 s
        raise ValueError(f"{text!r} is not a time")
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + read_number(part)
    return seconds


# ------------------------------------------------------------------------------------------------
# Tables: csv with comma, semicolon or tab
# ------------------------------------------------------------------------------------------------

COLUMNS = {  # what a column is called: lower case, everything but letters and digits as _. Where a
    # file has several of these, the first here counts.
    "video": "video video_id video_name file filename file_name path media_file media_file_name",
    "time": "time time_sec time_s timestamp second seconds sec t",
    "frame": "frame frame_id frame_number frame_index frame_no",
    "x1": "x1 xmin x_min left xtl x",
    "y1": "y1 ymin y_min top ytl y",
    "x2": "x2 xmax x_max right xbr",
    "y2": "y2 ymax y_max bottom ybr",
    "width": "width w box_width",
    "height": "height h box_height",
    "label": "action behavior behaviour activity label labels class_name classname class category",
    "person": "person person_id track track_id actor subject id",
    "score": "score confidence conf",
    "start": "start start_sec start_s start_time time_start begin begin_sec onset",
    "end": "end end_sec end_s end_time time_end stop stop_s stop_sec stop_time offset",
    "part": "split part subset",
}
BOX = ("x1", "y1", "x2", "y2")


@dataclass
class Table:
    """The rows of a file, and which column is which."""

    name: str
    header: list[str]  # as written; [] where the file has none
    columns: dict[str, int]  # key of COLUMNS -> column
    rows: list[tuple[str, list[str]]]  # `file:line`, cells

    def lacks(self, *keys: str) -> str:
        """The sentence about the columns that are missing, or ""."""
        missing = [key for key in keys if key not in self.columns]
        if not missing:
            return ""
        return (
            f"{self.name}:1: no column {', '.join(missing)}, found the header "
            f"{','.join(self.header)}"
        )


def read_table(name: str, content: bytes) -> Table:
    """Rows without the empty ones; whatever parts the columns."""
    text = decode_text(name, content)
    first = next((line for line in text.splitlines() if line.strip()), "")
    mark = re.fullmatch(r"sep=(.)", first.strip())  # Excel's
    separator = mark[1] if mark else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    rows = []
    try:
        for cells in reader:
            for cell in cells:
                swallowed = cell.splitlines()[1:]
                if any(line.count(separator) >= first.count(separator) > 0 for line in swallowed):
                    where = f"{name}:{reader.line_num - cell.count(chr(10))}"
                    raise ValueError(f'{where}: a " that no other one closes in its row')
            cells = [cell.strip() for cell in cells]
            if any(cells) and not cells[0].startswith("sep="):
                rows.append((f"{name}:{reader.line_num}", cells))
    except csv.Error as error:
        raise ValueError(f"{name}:{reader.line_num}: {error}") from None
    columns = _header_columns(rows[0][1]) if rows else {}
    header = rows.pop(0)[1] if columns else []
    return Table(name, header, columns, rows)


def _header_columns(cells: list[str]) -> dict[str, int]:
    """key -> column, of a first row that is a header; {} where it is none."""
    columns: dict[str, int] = {}
    ranks: dict[str, int] = {}
    for number, cell in enumerate(cells):
        plain = re.sub(r"[^a-z0-9]+", "_", cell.casefold()).strip("_")
        if re.fullmatch(r"[\d_]+", plain):
            return {}  # a number: a row
        for key, names in COLUMNS.items():
            if plain not in names.split():
                continue
            rank = names.split().index(plain)
            if rank < ranks.get(key, len(names)):
                columns[key], ranks[key] = number, rank
    if "x2" in columns:  # then "width" and "height" are those of the picture
        columns.pop("width", None)
        columns.pop("height", None)
    return columns


def read_boxes_table(
    path: str | Path, unit: str = "", first_frame: int = 0, content: bytes | None = None
) -> tuple[list[Mark], str]:
    """Person boxes of a csv, and a sentence about how they were taken.

    With a header, in any order and spelling of COLUMNS: video, time_sec or frame, x1, y1, x2, y2
    (or x, y, width, height), and label, person, score, split where there are. Without:
        video,time_sec,x1,y1,x2,y2                      a person
        video,time_sec,x1,y1,x2,y2,label                "" or -1: a person without action
        video,time_sec,x1,y1,x2,y2,label,person         AVA's annotations
        video,time_sec,x1,y1,x2,y2,,score               a detector's
        video,time_sec                                  AVA-Kinetics, a keyframe of nobody: no mark
    Videos by name, with or without folders and suffix. unit: "px", "norm" or "": pixels if any
    value is above 2 (boxes in [0, 1] reach a little over the edge). first_frame: the number of a
    video's first frame in a frame column. content: the file's bytes, if they are at hand. `place`
    fits a mark to its video. Raises ValueError with file and line.
    """
    table = read_table(str(path), Path(path).read_bytes() if content is None else content)
    if not table.rows:
        raise ValueError(f"{path}: no rows")
    if table.header:
        marks = _boxes_by_header(table, first_frame)
    else:
        marks = _boxes_by_position(table)
    if not marks:
        raise ValueError(f"{path}: no rows with a box")
    _refuse_widths(marks)
    largest = max(max(mark.box) for mark in marks)
    taken = unit or ("px" if largest > 2 else "norm")
    for mark in marks:
        mark.size = (1.0, 1.0) if taken == "norm" else None
    what = "pixels" if taken == "px" else "shares of width and height"
    return marks, f"{path}: {len(marks)} boxes in {what}, up to {largest:g}"


def _boxes_by_header(table: Table, first_frame: int) -> list[Mark]:
    columns = table.columns
    if "person" in columns and table.header[columns["person"]].casefold() == "id":
        ids = [cells[columns["person"] :][:1] for _, cells in table.rows]
        if len(set(map(tuple, ids))) == len(ids) > 1:  # it counts the rows
            columns.pop("person")
    clock = "frame" if "frame" in columns and "time" not in columns else "time"
    corners = ("x1", "y1", "width", "height") if "width" in columns else BOX
    if lacking := table.lacks("video", clock, *corners):
        expected = "expected video,time_sec (or frame),x1,y1,x2,y2,label"
        raise ValueError(f"{lacking}, {expected}")
    marks = []
    for where, cells in table.rows:
        row = _row_by_name(table, where, cells)
        mark = Mark(where, row["video"], row.get("label", ""))
        if mark.label == "-1":  # AVA's: no action
            mark.label = ""
        try:
            if clock == "frame":
                mark.frame = read_whole(row["frame"]) - first_frame
                if mark.frame < 0:
                    raise ValueError(f"frame {row['frame']}, the first is {first_frame}")
            else:
                mark.time_sec = read_seconds(row["time"])
            mark.box = [read_number(row[key]) for key in corners]
            mark.score = read_number(row.get("score") or "1")
        except ValueError as error:
            raise ValueError(
                f"{where}: {error}, expected numbers in {clock}, {', '.join(corners)}"
            ) from None
        if "width" in columns:
            x, y, width, height = mark.box
            mark.box = [x, y, x + width, y + height]
        mark.person = row.get("person", "")
        mark.part = row.get("part", "")
        marks.append(mark)
    return marks


def read_clip_table(name: str, content: bytes) -> list[Mark]:
    """Rows with the header video,label, or video,start,end,label: a clip without cutting files."""
    table = read_table(name, content)
    if lacking := table.lacks("video", "label"):
        raise ValueError(f"{lacking}, expected video,label or video,start,end,label")
    if not table.rows:
        raise ValueError(f"{name}: no rows")
    marks = []
    for where, cells in table.rows:
        row = _row_by_name(table, where, cells)
        mark = Mark(where, row["video"], row["label"], part=row.get("part", ""))
        if "start" in row and "end" in row:
            try:
                mark.time_sec = read_seconds(row["start"])
                mark.end_sec = read_seconds(row["end"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}, expected seconds in start and end") from None
        marks.append(mark)
    return marks


def _row_by_name(table: Table, where: str, cells: list[str]) -> dict[str, str]:
    """key of COLUMNS -> cell."""
    more = [cell for cell in cells[len(table.header) :] if cell]
    if more:
        raise ValueError(
            f"{where}: {len(cells) - len(table.header)} columns more than the header has; a text "
            f'with the separator in it stands in "..."'
        )
    return {
        key: cells[number] if number < len(cells) else "" for key, number in table.columns.items()
    }


def _boxes_by_position(table: Table) -> list[Mark]:
    marks = []
    for where, cells in table.rows:
        if len(cells) == 2:
            continue
        try:
            if not 6 <= len(cells) <= 8:
                raise ValueError(f"{len(cells)} columns, expected 6 to 8")
            box = [read_number(cell) for cell in cells[2:6]]
            mark = Mark(where, cells[0], time_sec=read_seconds(cells[1]), box=box)
        except ValueError as error:
            raise ValueError(
                f"{where}: {error}: {','.join(cells)}; expected video,time_sec,x1,y1,x2,y2"
                "[,label[,person or score]]"
            ) from None
        if len(cells) > 6:
            mark.label = cells[6]
        if len(cells) > 7:
            mark.person = cells[7]
        if mark.label == "-1":
            mark.label = ""
        marks.append(mark)
    if all(_is_share(mark.person) and not mark.label for mark in marks):  # a detector's
        for mark in marks:
            mark.score, mark.person = read_number(mark.person), ""
    return marks


def _is_share(text: str) -> bool:
    try:
        return 0 <= read_number(text) <= 1
    except ValueError:
        return False


def _refuse_widths(marks: list[Mark]) -> None:
    """x, y, width, height without a header that says so: corners in the wrong order, mostly."""
    wrong = [mark for mark in marks if mark.box[2] <= mark.box[0] or mark.box[3] <= mark.box[1]]
    if len(wrong) > 0.2 * len(marks):
        raise ValueError(
            f"{wrong[0].where}: x2 <= x1 or y2 <= y1 in {len(wrong)} of {len(marks)} boxes, "
            f"here {list(wrong[0].box)}, expected corners x1,y1,x2,y2; for others the header "
            "video,time_sec,x,y,width,height"
        )
