"""Annotations of clip tasks in other formats than data.py's own, as they lie on people's disks.

    label,youtube_id,time_start,time_end,split            Kinetics: this header, then
    abseiling,0wR5jVB-WPk,417,427,val                     rows; files ID_START_END, in any folder
    adult+female+singing/0P3XG_vf91c_35.mp4,adult+female+singing,4,0    Moments in Time
    [{"id": "78687", "template": "Holding [something]"}]  Something-Something v2
    splits/*_test_split1.txt                              HMDB51, a pattern; rows `x.avi 1`
    video,start,end,label                                 this header: stretches of videos, in sec
    films/long.mp4,12.5,17,pick up                        from the first frame; nothing is cut
What is none of them goes to data.read_list, which also reads UCF101: `ApplyEyeMakeup/v_g08.avi 1`,
or without the number, and a folder per class.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from data import ClipRow, files_of, read_json, read_lines, read_list, to_number


def read_clips(path: str, split: str, folder: str) -> Iterator[ClipRow]:
    """The rows of a split of a clip task, in any format. A data.ClipReader."""
    if Path(path).is_dir():
        yield from read_list(path, split, folder)
    elif "*" in path:
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
            yield from read_list(path, split, folder)


def _kinetics(path: str) -> Iterator[ClipRow]:
    lines = read_lines(path)
    header = next(csv.reader([next(lines)[1]]))
    for where, line in lines:
        row = dict(zip(header, next(csv.reader([line])), strict=False))
        try:
            if not row.get("label"):
                raise ValueError("no label (a test list?)")
            start, end = (int(to_number(row.get(key, ""))) for key in ("time_start", "time_end"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}: {line[:120]}") from None
        yield ClipRow(where, row["label"], f"{row['youtube_id']}_{start:06d}_{end:06d}")


def _stretches(path: str) -> Iterator[ClipRow]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        next(rows)
        for row in rows:
            where = f"{path}:{rows.line_num}"
            try:
                name, start, end, label = row
                start_sec, end_sec = to_number(start), to_number(end)
                if not 0 <= start_sec < end_sec or not label.strip():
                    raise ValueError("expected 0 <= start < end and a label")
            except ValueError as error:
                raise ValueError(f"{where}: {error}: {','.join(row)[:120]}") from None
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
    for number, entry in enumerate(read_json(path, list), 1):
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
