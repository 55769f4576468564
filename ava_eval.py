"""AVA mAP: action detections and ground truth in, average precision out. One file, numpy only.

    python ava_eval.py -g ava_val_v2.2.csv -d detections.csv         # a table; --json for machines
    result = ava_eval.evaluate("ava_val_v2.2.csv", Rows(...))        # the same object; or a path

The metric. A keyframe is a video and a time. On it, the 50 best-scored rows are kept; then, class
by class and best first, each detection looks at the ground-truth box that it overlaps most. It is a
true positive if their IoU is at least 0.5 and no better detection has claimed that box, otherwise a
false positive; there is no second choice. All detections of a class are ranked by score over all
keyframes; its average precision (AP) is the area under the precision-recall curve made monotone
(VOC, all points). mAP is the mean over classes with ground truth. Five evaluators use this name:

    protocol        rows of a    order within     detections on keyframes    keyframe
                    keyframe     a keyframe       the ground truth lacks     time
    official-2020   50 best      by score         ignored                    microseconds (default)
    official-2019   50 best      by score         false positives            seconds (if given -e)
    official-2018   all          by score         false positives            seconds
    slowfast        all          of the file      false positives            seconds
    mmaction2       all          by score         ignored                    seconds

official-2018 stands for AlphAction and VideoMAE too, slowfast for YOWO. mmaction2 also works in
float32, leaves classes that nobody detected out of the mean, counts excluded boxes as missed and
keeps boxes without area. They differ by up to 1.6 points on one file (--compare), so no mAP leaves
this one without its protocol. Equal scores fall as in the original scripts on the same machine.

Files are csv without header, plain or .gz; times in seconds, boxes in [0, 1] of the frame:
    ground truth    video_id,time,x1,y1,x2,y2,label[,person_id]   or  video_id,time  (nothing there)
    detections      video_id,time,x1,y1,x2,y2,label,score
    exclusions      video_id,time     keyframes that count neither way (protocols before 2020)
    label map       item { name: "sit" id: 11 }   or   label { name: "sit" label_id: 11 ... }
"""

import argparse
import csv
import gzip
import heapq
import json
import re
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np

# --------------------------------------------------------------------------------------------------
# Protocols and classes
# --------------------------------------------------------------------------------------------------


class Protocol(NamedTuple):
    cap: int  # rows kept per keyframe, the best; 0 = all
    order: str  # of matching: "file", or by score, equal ones by "heap|argsort|stable"
    ignore_unknown: bool  # detections on keyframes the ground truth lacks; else false positives
    whole_seconds: bool  # fractions of a second and keyframes without boxes cannot be expressed
    mmaction2: bool = False  # its four other differences (above)


PROTOCOLS = {
    "official-2020": Protocol(50, "heap", True, False),
    "official-2019": Protocol(50, "heap", False, True),
    "official-2018": Protocol(0, "argsort", False, True),
    "slowfast": Protocol(0, "file", False, True),
    "mmaction2": Protocol(0, "stable", True, True, mmaction2=True),
}

# The 60 evaluated classes of AVA v2.1 and v2.2: id, labels in the v2.2 training set, name. Counts
# are the ratios in YOWO's ava_categories_ratio.json times its 332,353 training boxes.
AVA = """
1 8349 bend/bow (at the waist) | 3 2321 crouch/kneel | 4 3267 dance | 5 291 fall down |
6 1124 get up | 7 245 jump/leap | 8 5356 lie/sleep | 9 2117 martial art | 10 3337 run/jog |
11 100323 sit | 12 166357 stand | 13 111 swim | 14 40771 walk | 15 3279 answer phone |
17 80451 carry/hold (an object) | 20 268 climb (e.g., a mountain) |
22 786 close (e.g., a door, a box) | 24 184 cut | 26 342 dress/put on clothing | 27 2335 drink |
28 1188 drive (e.g., a car, a truck) | 29 3025 eat | 30 225 enter | 34 177 hit (an object) |
36 519 lift/pick up | 37 668 listen (e.g., to music) | 38 1251 open (e.g., a window, a car door) |
41 1297 play musical instrument | 43 97 point to (an object) | 45 344 pull (an object) |
46 387 push (an object) | 47 533 put down | 48 2146 read |
49 4808 ride (e.g., a bike, a car, a horse) | 51 719 sail boat | 52 222 shoot | 54 2991 smoke |
56 181 take a photo | 57 415 text on/look at a cellphone | 58 249 throw |
59 17133 touch (an object) | 60 137 turn (e.g., a screwdriver) | 61 1993 watch (e.g., TV) |
62 176 work on a computer | 63 777 write | 64 2695 fight/hit (a person) |
65 1073 give/serve (an object) to (a person) | 66 2003 grab (a person) | 67 1187 hand clap |
68 619 hand shake | 69 351 hand wave | 70 1103 hug (a person) | 72 714 kiss (a person) |
73 400 lift (a person) | 74 106816 listen to (a person) | 76 355 push (another person) |
77 1643 sing to (e.g., self, a person, a group) | 78 608 take (an object) from (a person) |
79 110267 talk to (e.g., self, a person, a group) | 80 168148 watch (a person)"""
AVA_ITEMS = [item.split(maxsplit=2) for item in AVA.replace("\n", " ").split(" | ")]
AVA_CLASSES = {int(i): name for i, _, name in AVA_ITEMS}
AVA_TRAIN_COUNTS = {int(i): int(count) for i, count, _ in AVA_ITEMS}
AVA_KINDS = {"pose": (1, 14), "object": (15, 63), "person": (64, 80)}  # label_type of v2.2, by id


def read_labelmap(path) -> dict[int, str]:
    """{id: name} of a label map in text-protobuf form, either spelling, any line breaks."""
    classes, text = {}, Path(path).read_text(encoding="utf-8-sig")
    for number, item in enumerate(re.findall(r"\{((?:[^{}\"]|\"[^\"]*\")*)\}", text), 1):
        name = re.search(r'\bname:\s*"([^"]*)"', item)
        found = re.search(r"\b(?:label_)?id:\s*(\d+)", item)
        if not name or not found or not 1 <= int(found[1]) < 2**15 or int(found[1]) in classes:
            raise ValueError(
                f"{path}: item {number}: expected a name and a new id in 1..32767, "
                f"found {' '.join(item.split())!r}"
            )
        classes[int(found[1])] = name[1]
    begun = len(re.findall(r"\b(?:item|label)\s*\{", re.sub('"[^"]*"', "", text)))
    if not classes or len(classes) < begun:
        raise ValueError(
            f'{path}: {begun} items begin, {len(classes)} are whole: item {{ name: "..." id: N }}'
        )
    return classes


# --------------------------------------------------------------------------------------------------
# Rows in memory and on disk
# --------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Boxes with one label each. A row with label 0 says "keyframe annotated, nothing there"."""

    video_id: np.ndarray  # (n,) str
    time_sec: np.ndarray  # (n,) float64
    boxes: np.ndarray  # (n, 4) float64 x1, y1, x2, y2
    label: np.ndarray  # (n,) int, as in the label map
    score: np.ndarray | None = None  # (n,) float64; ground truth needs none


def write_csv(path, rows: Rows) -> None:
    """Writes rows such that reading them gives the same float64 again (shortest exact decimals),
    times to the microsecond."""
    columns = [
        np.asarray(rows.video_id),
        np.float64(rows.time_sec),
        np.float64(rows.boxes),
        np.asarray(rows.label),
    ] + [np.float64(rows.score)] * (rows.score is not None)
    with open(f"{path}.partial", "w", encoding="utf-8", newline="\n") as file:
        for video, time, box, label, *score in zip(*(column.tolist() for column in columns)):
            stamp = f"{time:04.0f}" if time == int(time) else f"{time:.6f}"
            numbers = [*box, label, *score] if label else []
            file.write(",".join([video, stamp, *map(repr, numbers)]) + "\n")
    Path(file.name).replace(path)


class Table(NamedTuple):
    """Rows as they are worked on. Consecutive rows with one keyframe and one box are a run: a
    person's box carries up to 80 rows, so runs save most of the parsing and half of the memory."""

    name: str
    keys: dict  # (video_id, time in microseconds) -> number; shared by all tables
    key: np.ndarray  # (R,) int32 number of each run's keyframe; when selected: in evaluation
    box: np.ndarray  # (R, 4)
    run: np.ndarray  # (n,) int32 run of each row; none belongs to a keyframe without boxes
    label: np.ndarray  # (n,) int16; when selected: column of the class, 0 .. C-1
    score: np.ndarray  # (n,) float64; of ground truth: the person id, or 1

    def take(self, rows) -> "Table":
        return self._replace(run=self.run[rows], label=self.label[rows], score=self.score[rows])

    def code(self) -> np.ndarray:
        """(n,) label and keyframe in one number."""
        return self.label.astype(np.int64) * len(self.keys) + self.key[self.run]


def load(source, name: str, top: int, keys: dict, is_truth=False, widths=(2, 7, 8)) -> Table:
    """Path or Rows, or a list of them, as one Table. top: the largest label that is allowed."""
    sources = source if isinstance(source, (list, tuple)) else [source]
    columns = [
        [np.empty(shape, kind)]
        for shape, kind in (
            (0, np.int32),
            ((0, 4), float),
            (0, np.int32),
            (0, np.int16),
            (0, float),
        )
    ]
    for one in sources:
        for part in (
            [parse_rows(one, name, keys, top, is_truth)]
            if isinstance(one, Rows)
            else parse_csv(one, keys, top, is_truth, widths)
        ):
            for column, values in zip(columns, part):
                column.append(np.asarray(values, column[0].dtype))
    name = " + ".join(name if isinstance(one, Rows) else str(one) for one in sources)
    key, box, size, label, score = (np.concatenate(columns.pop(0)) for _ in range(5))
    run = np.repeat(np.arange(len(key), dtype=np.int32), size)
    return Table(name, keys, key, box, run, label, score)


def number_of(keys: dict, video: str, time: float) -> int:
    if not abs(time) < 1e9:
        raise ValueError(f"time {time} is not a number of seconds")
    stamp = int(time) * 10**6 if time.is_integer() else round(round(time, 6) * 1e6)
    return keys.setdefault((video, stamp), len(keys))


def changes(*columns) -> np.ndarray:
    """(n,) bool: where a row differs from the one above in some column; the first row does."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return new


def parse_rows(rows: Rows, name: str, keys: dict, top: int, is_truth: bool) -> tuple:
    """Arrays as parse_csv yields them. ValueError: the first five bad rows, counted from 0."""
    video, time = np.asarray(rows.video_id), np.asarray(rows.time_sec, float)
    label, box = np.asarray(rows.label), np.asarray(rows.boxes, float).reshape(-1, 4)
    score = np.ones(len(label)) if rows.score is None else np.asarray(rows.score, float)
    if len({len(column) for column in (video, time, label, box, score)}) > 1:
        raise ValueError(f"{name}: video_id, time_sec, boxes, label, score differ in length")
    lone = label == 0
    moved = changes(time, video)
    other = np.not_equal(box[1:], box[:-1], order="C").view(np.uint32)[:, 0]  # 4 bools as one, fast
    runs = np.flatnonzero(moved | lone | changes(lone) | np.append(True, other > 0)[: len(box)])
    a, b = box[runs, :2], box[runs, 2:]
    legal = lone[runs] | np.isfinite(a + b).all(1) & ((a <= b).all(1) | (not is_truth))
    bad = np.union1d(
        runs[~(legal & (np.abs(time[runs]) < 1e9))],
        np.flatnonzero((label < 0) | (label > top) | ~np.isfinite(score)),
    )
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} bad rows, expected finite numbers, label 0..{top}"
            + is_truth * ", x1 <= x2, y1 <= y2"
            + "".join(
                f"\n{i}: {video[i]},{time[i]},{box[i].tolist()},{label[i]},{score[i]}"
                for i in bad[:5]
            )
        )
    key = [number_of(keys, v, t) for v, t in zip(video[moved].tolist(), time[moved].tolist())]
    size = np.diff(np.append(runs, len(label))) * ~lone[runs]
    some = ~lone if lone.any() else slice(None)
    return np.array(key, int)[np.cumsum(moved[runs]) - 1], box[runs], size, label[some], score[some]


def parse_csv(path, keys: dict, top: int, is_truth: bool, widths: tuple):
    """Yields block by block: keyframe, box and number of rows of each run; label and score of each
    row. ValueError: file:line and text of the first five bad rows."""
    errors, line = [], 1
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        while block := file.read(1 << 20):  # what is made of a megabyte stays in the cache
            block += file.readline()
            if b"\r" in block or block[-1:] != b"\n":
                block = block.replace(b"\r\n", b"\n").removesuffix(b"\n") + b"\n"
            try:
                yield (part := parse_block(block, keys, top, is_truth, widths))
                line += len(part[3])
            except ValueError:  # something unusual somewhere: row by row, to accept or to name it
                yield parse_lines(block, line, path, keys, top, is_truth, widths, errors)
                line += block.count(b"\n")
    if errors:
        more = f"\n... and {len(errors) - 5} more such rows" if len(errors) > 5 else ""
        raise ValueError("\n".join(errors[:5]) + more)


def parse_lines(block, line, path, keys, top, is_truth, widths, errors) -> tuple:
    """The plain reader, a run per row; what is wrong goes to errors."""
    key, box, size, label, score = [], [], [], [], []
    for line, text in enumerate(block[:-1].decode(errors="backslashreplace").split("\n"), line):
        try:
            fields = next(csv.reader([text]))
            if text.startswith("\ufeff"):
                raise ValueError("a byte-order mark; expected UTF-8 without one")
            if len(fields) not in widths:
                raise ValueError(f"{len(fields)} columns, expected {' or '.join(map(str, widths))}")
            corners = x1, y1, x2, y2 = [float(x) for x in fields[2:6]] or [0.0] * 4
            if not all(map(isfinite, corners)) or is_truth and (x1 > x2 or y1 > y2):
                raise ValueError("expected finite x1,y1,x2,y2" + is_truth * ", x1 <= x2, y1 <= y2")
            kind, value = int((fields + ["0"] * 5)[6]), float((fields + ["1"] * 6)[7])
            if len(fields) > 2 and not 1 <= kind <= top:
                raise ValueError(f"label {kind} is outside 1..{top} of the label map")
            if not isfinite(value):
                raise ValueError(f"score {value}, expected a finite number")
            key.append(number_of(keys, fields[0].strip(), float(fields[1])))
            box.append(corners)
            size.append(len(fields) > 2)
            label += [kind] * size[-1]
            score += [value] * size[-1]
        except (ValueError, csv.Error) as error:
            header = " (a header row? these files have none)" if line == 1 else ""
            errors.append(f"{path}:{line}: {error}{header}: {text[:120]!r}")
    return key, np.reshape(box, (-1, 4)), size, label, score


def parse_block(block, keys, top, is_truth, widths) -> tuple:
    """The fast reader, for a block whose rows all have 7 or all 8 plain columns: the same as
    parse_lines or ValueError."""
    width = block[: block.index(b"\n")].count(b",") + 1
    data = np.frombuffer(block, np.uint8)
    stops = np.flatnonzero(data < 45)  # commas, line ends; a blank, quote or "+" spoils the pattern
    if width not in widths or width < 7 or len(stops) % width or block.startswith(b"\xef\xbb\xbf"):
        raise ValueError
    stops = stops.reshape(-1, width)
    if (data[stops] != np.frombuffer(b"," * (width - 1) + b"\n", np.uint8)).any():
        raise ValueError
    start = np.append(0, stops[:-1, -1] + 1)
    size = stops[:, 5] - start
    same = size[1:] == size[:-1]  # a run goes on while the bytes before the label stay the same
    words = np.ndarray(len(block) + 1, "<u8", bytes(8) + block, strides=1)  # the 8 bytes before i
    for k in range(8, size.max() + 8, 8):
        word = words[start + np.minimum(k, size)]
        same &= word[1:] == word[:-1]
    runs = np.append(0, np.flatnonzero(~same) + 1)
    heads = [block[a:b] for a, b in zip(start[runs].tolist(), stops[runs, 1].tolist())]
    key = [
        number_of(keys, video.decode(), float(time))
        for video, time in (head.split(b",") for head in heads)
    ]
    box = parse_numbers(block, stops[runs, 1:5].ravel(), stops[runs, 2:6].ravel()).reshape(-1, 4)
    label = parse_numbers(block, stops[:, 5], stops[:, 6], int)
    score = np.ones(len(label)) if width == 7 else parse_numbers(block, stops[:, 6], stops[:, 7])
    if (
        label.min() < 1
        or label.max() > top
        or not np.isfinite(score).all()
        or not np.isfinite(box).all()
        or is_truth
        and (box[:, :2] > box[:, 2:]).any()
    ):
        raise ValueError
    return key, box, np.diff(np.append(runs, len(label))), label, score


def parse_numbers(block, comma, end, kind=float) -> np.ndarray:
    """kind() of the texts between comma and end, as float64, to the last bit: up to 15 digits are a
    whole number that float64 holds, and its quotient by such a power of ten, for d.ddd, is rounded
    once, correctly (Clinger 1990). Texts of one length are read together; the rest by kind()."""
    data, value = np.frombuffer(block, np.uint8), np.empty(len(comma))
    forms = 2 * (end - comma - 1) + (data[np.minimum(comma + 2, end)] == 46) * (kind is float)
    for form in np.unique(forms).tolist():
        rows, (size, dotted) = np.flatnonzero(forms == form), divmod(form, 2)
        digits = data[comma[rows, None] + 1 + np.arange(min(size, 15 + dotted))] - np.uint8(48)
        digits = np.delete(digits, 1, 1) if dotted else digits  # (n, places)
        power = 10.0 ** np.arange(digits.shape[1])[::-1]
        value[rows] = digits @ power / (power[0] if dotted else 1)
        rows = rows[(digits > 9).any(1) | (size > 15 + dotted) | (size == 0)]
        value[rows] = [
            kind(block[a + 1 : b]) for a, b in zip(comma[rows].tolist(), end[rows].tolist())
        ]
    return value


# --------------------------------------------------------------------------------------------------
# Matching and scoring
# --------------------------------------------------------------------------------------------------


def in_order(table: Table, a: int, b: int, rules: Protocol, cap: int | None = None):
    """Rows a .. b, a keyframe, in the order in which the protocol's own code takes those of a
    class. The official reader keeps the best cap (None: all) of them in a heap."""
    score, label = table.score[a:b], table.label[a:b]
    if rules.order == "stable":
        return a + np.argsort(-score, kind="stable")
    if rules.order == "argsort":
        rows = [np.flatnonzero(label == c) for c in np.unique(label)]
        return a + np.concatenate([one[np.argsort(score[one])[::-1]] for one in rows])
    heap, rows = [], defaultdict(list)
    corners = table.box[table.run[a:b]][:, [1, 0, 3, 2]]
    for row, item in enumerate(zip(score.tolist(), label.tolist(), *corners.T.tolist()), a):
        rows[item].append(row)  # interchangeable
        if not cap or len(heap) < cap:
            heapq.heappush(heap, item)
        elif item[0] > heap[0][0]:
            heapq.heapreplace(heap, item)
    return np.array([rows[item].pop() for item in sorted(heap, key=lambda item: -item[0])], int)


def rank(det: Table, truth: Table, rules: Protocol, exact=()) -> tuple[Table, int]:
    """Detections by class, then keyframe, in matching order, without what the cap leaves out and
    boxes without area; and how many the cap left out. Equal scores take their exact order only
    where it can change the result: found first, then ranked again with these frames in `exact`."""
    every, rows, cap = det, [], rules.cap or None
    less = np.less_equal if rules.mmaction2 else np.less
    legal = less(det.box[:, :2], det.box[:, 2:]).all(1)
    if not cap:
        det = det.take(legal[det.run])
    bounds = np.searchsorted(det.key[det.run], np.arange(len(det.keys) + 1)).tolist()
    kind = "stable" if rules.order == "stable" else None
    for frame, (a, b) in enumerate(zip(bounds, bounds[1:])) if rules.order != "file" else ():
        by = a + np.argsort(-det.score[a:b], kind=kind)
        tied = cap and b - a > cap and np.equal(*det.score[by[cap - 1 : cap + 1]])
        rows.append(in_order(det, a, b, rules, cap) if tied or frame in exact else by[:cap])
    rows = np.concatenate(rows) if rows else np.arange(len(det.run))
    capped, rows = len(det.run) - len(rows), rows[legal[det.run[rows]]]
    det = det.take(rows[np.argsort(det.label[rows], kind="stable")])
    if rules.order in ("heap", "argsort") and not exact:
        code = det.code()
        equal = code[~changes(code, det.score)]
        equal = equal[np.isin(equal, truth.code())]
        if len(equal):
            return rank(every, truth, rules, {*(equal % len(det.keys)).tolist()})
    return det, capped


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(P,) intersection over union of boxes a[i] and b[i]; (P, 4) each."""
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    zero = np.float64(0)  # mmaction2 subtracts in float32 but multiplies in float64
    both = np.maximum(height, zero) * np.maximum(width, zero)
    area_a, area_b = ((x[:, 3] - x[:, 1]) * (x[:, 2] - x[:, 0]) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return both / (area_a + area_b - both)


def match(det: Table, truth: Table, rules: Protocol) -> np.ndarray:
    """(n,) bool: which of the ranked detections are true positives."""
    code, want = truth.code(), det.code()
    by = np.argsort(code, kind="stable")
    first, last = (np.searchsorted(code[by], want, side) for side in ("left", "right"))
    seen = np.flatnonzero(last > first)
    first, count = first[seen], (last - first)[seen]
    begin = np.cumsum(count) - count
    d = np.repeat(np.arange(len(seen)), count)  # (P,) pairs of a detection ...
    g = by[np.arange(len(d)) + np.repeat(first - begin, count)]  # ... with each box of its class
    real = np.float32 if rules.mmaction2 else np.float64
    overlap = iou(det.box.astype(real)[det.run[seen[d]]], truth.box.astype(real)[truth.run[g]])
    best = np.flatnonzero((overlap == np.maximum.reduceat(overlap, begin)[d]) & (overlap >= 0.5))
    d, g = d[best], g[best]  # one pair a detection, but for ...
    new, reader = changes(d), np.arange(len(code))
    if rules.order in ("heap", "stable"):  # ... ties: the reader's first
        frames = truth.key[truth.run]
        for frame in np.unique(frames[g[~new]]).tolist():
            a, b = np.searchsorted(frames, (frame, frame + 1))
            reader[a:b] = in_order(truth, a, b, rules)
    g = reader[np.minimum.reduceat(np.argsort(reader)[g], np.flatnonzero(new))]
    hit = np.zeros(len(want), bool)
    hit[seen[d[new]][np.unique(g, return_index=True)[1]]] = True  # the best of those that chose it
    return hit


def average_precision(hit: np.ndarray, positives: int) -> float:
    """Area under the curve where precision is the best at this or any higher recall (VOC). hit:
    (n,) bool, by falling score. Recall grows by 1 / positives at each hit."""
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    return float(np.maximum.accumulate(precision[::-1])[::-1][hit].sum() / positives)


def mean(ap) -> float | None:
    return None if np.isnan(ap).all() else float(np.nanmean(ap))


class Scored(NamedTuple):
    """One table of detections scored against one ground truth."""

    ap: np.ndarray  # (C,) nan = not in the mean
    positives: np.ndarray  # (C,) ground-truth boxes
    classes: list  # C times: score (falling), hit, keyframe; of its boxes the keyframe
    counts: dict  # person, keyframes, rows: as in the result


def score_tables(truth: Table, det: Table, labels: list, rules: Protocol, excluded) -> Scored:
    """AP of each class (labels: sorted ids) with the detections it rests on, and the counts."""
    keys, frames = list(det.keys), len(det.keys)
    for table in (truth, det) if rules.whole_seconds else ():
        odd = [keys[k] for k in table.key.tolist() if keys[k][1] % 10**6][:1]
        if odd or changes(table.run).sum() < len(table.key):
            what = f"{odd[0][0]},{odd[0][1] / 1e6:.6f}" if odd else "a row of 2 columns"
            raise ValueError(
                f"{table.name}: this protocol knows only whole seconds and rows with "
                f"boxes, found {what}; official-2020 takes both"
            )
    column = np.full(2**15, -1, np.int16)
    column[labels] = np.arange(len(labels))

    # Keyframes are evaluated in the order of their first row: so equal scores are ranked.
    lead = truth if rules.mmaction2 else det
    runs = np.flatnonzero(np.bincount(lead.run[column[lead.label] >= 0]))[::-1]
    first = np.full(frames, 2**31)
    first[lead.key[runs]] = runs  # the last to write stays
    order = np.argsort(first, kind="stable")
    in_truth, in_det, out = (
        np.bincount(key, minlength=frames) > 0 for key in (truth.key, det.key, excluded)
    )
    known = first < 2**31 if rules.mmaction2 else in_truth  # foreign labels alone do not count
    evaluated = ~out & (known | (not rules.ignore_unknown))

    def select(table: Table, evaluated: np.ndarray) -> Table:
        """Its rows that count, keyframe by keyframe, each in the order of the file."""
        key = np.where(evaluated, np.argsort(order), -1).astype(np.int32)[table.key]
        frame, kind = key[table.run], column[table.label]
        rows = np.flatnonzero((kind >= 0) & (frame >= 0))
        rows = rows[np.argsort(frame[rows], kind="stable")]
        return table._replace(key=key, label=kind).take(rows)

    boxes, answer = select(det, evaluated), select(truth, evaluated | rules.mmaction2)
    positives = np.bincount(answer.label, minlength=len(labels))
    ranked, capped = rank(boxes, answer, rules)
    hits = match(ranked, answer, rules)
    bounds = np.searchsorted(ranked.label, np.arange(len(labels) + 1))
    classes, ap = [], np.full(len(labels), np.nan)
    for c, (a, b) in enumerate(zip(bounds[:-1], bounds[1:])):
        score = ranked.score[a:b].astype(np.float32 if rules.mmaction2 else float)
        by = np.argsort(score)[::-1]  # unstable: equal scores as in the official script
        hit = hits[a:b][by]
        classes.append(
            (
                score[by],
                hit,
                order[ranked.key[ranked.run[a:b][by]]],
                order[answer.key[answer.run[answer.label == c]]],
            )
        )
        if positives[c] and (b > a or not rules.mmaction2):
            ap[c] = average_precision(hit, positives[c])
    lone = len(det.key) - int(changes(det.run).sum())
    listed = int(np.sum(column[det.label] >= 0))
    keyframes = {
        "ground_truth": in_truth & ~out,
        "detected": in_det,
        "matched": in_truth & in_det & ~out,
        "ignored": in_det & ~known & ~out & rules.ignore_unknown,
        "excluded": out & (in_truth | in_det),
    }
    return Scored(
        ap,
        positives,
        classes,
        {
            "person": score_persons(boxes, answer),
            "keyframes": {what: int(some.sum()) for what, some in keyframes.items()},
            "rows": {
                "read": len(det.label) + lone,
                "without_box": lone,
                "dropped_by_whitelist": len(det.label) - listed,
                "on_ignored_or_excluded_keyframes": listed - len(boxes.run),
                "dropped_by_cap": capped,
                "dropped_invalid_box": len(boxes.run) - capped - len(hits),
                "evaluated": len(hits),
            },
        },
    )


def score_persons(det: Table, truth: Table) -> dict:
    """The boxes without their labels, each once with its best score. Where few persons are found,
    the person detector or the clock is at fault, and no better classifier helps."""

    def distinct(table: Table) -> Table:
        first = np.flatnonzero(changes(table.run))
        best = np.maximum.reduceat(table.score, first)
        one = table.take(first)._replace(label=np.zeros(len(first), int), score=best)
        one = one.take(np.lexsort((-best, *one.box[one.run].T, one.code())))
        one = one.take(changes(one.code(), *one.box[one.run].T))
        return one.take(np.lexsort((-one.score, one.code())))

    rules, persons = PROTOCOLS["slowfast"], distinct(truth)
    found, n = rank(distinct(det), persons, rules)[0], len(persons.run)
    hit = match(found, persons, rules)
    ap = average_precision(hit[np.argsort(-found.score, kind="stable")], max(1, n))
    return {"ap": ap, "recall": int(hit.sum()) / max(1, n), "num_gt": n, "num_det": len(hit)}


def evaluate(
    groundtruth,
    detections,
    labelmap=None,
    exclusions=None,
    protocol: str | None = None,
    train_counts=None,
    thresholds: tuple = (10000, 1000),
    versus=None,
    curves=None,
    compare: bool = False,
    top: int = 0,
) -> dict:
    """AVA mAP of detections (path or Rows) against groundtruth (path or Rows, or a list of them:
    they are pooled, and "parts" has the mAP on each: AVA-Kinetics). Returns what --json prints.

    labelmap: path or {id: name}; None = the 60 classes of AVA. exclusions: path or Rows. protocol:
    of PROTOCOLS; None = official-2019 with exclusions, official-2020 without. train_counts: {id:
    boxes in training}; None = those of AVA v2.2, if the classes are AVA's. Classes with more
    than thresholds[0] are "head", with less than thresholds[1] "tail". versus: detections of a
    second run. curves: .csv or .npz to be written. compare: adds the mAP under every protocol.
    top: largest label of the files, where the label map, a choice of classes, has a smaller one.
    Raises ValueError, with file and line where there is one.
    """
    protocol = protocol or ("official-2020" if exclusions is None else "official-2019")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if exclusions is not None and protocol == "official-2020":
        raise ValueError(
            "official-2020 has no exclusions, its ground truth marks empty keyframes "
            "by rows of 2 columns; official-2019 has"
        )
    if curves is not None and not (
        Path(curves).suffix in (".csv", ".npz") and Path(curves).parent.is_dir()
    ):
        raise ValueError(f"{curves}: expected a file .csv or .npz in a folder that exists")
    names = AVA_CLASSES if labelmap is None else labelmap
    names = names if isinstance(names, dict) else read_labelmap(names)
    labels, top, keys = sorted(names), max(top, *names), {}
    truth = load(groundtruth, "ground truth", top, keys, True)
    det = load(detections, "detections", top, keys)
    excluded = load([] if exclusions is None else exclusions, "exclusions", top, keys, widths=(2,))

    def score(truth: Table, det: Table) -> Scored:
        return score_tables(truth, det, labels, PROTOCOLS[protocol], excluded.key)

    scored = score(truth, det)
    if not scored.positives.any():
        raise ValueError(f"{truth.name}: no row has a class of the label map")
    groups = groups_of(names, train_counts, thresholds)
    some = ~np.isnan(scored.ap)
    result = {
        "protocol": protocol,
        "mAP": mean(scored.ap),
        "classes": int(some.sum()),
        "groups": {
            group: {"mAP": mean(scored.ap[c]), "classes": int(some[c].sum())}
            for group, c in groups.items()
        },
        "thresholds": list(thresholds),
        **scored.counts,
        "per_class": [
            {
                "id": i,
                "name": names[i],
                "ap": mean(ap),
                "num_gt": int(n),
                "num_det": len(hit),
                "recall": float(hit.sum() / max(1, n)),
            }
            for i, ap, n, (_, hit, *_) in zip(labels, scored.ap, scored.positives, scored.classes)
        ],
        "notes": notes_on(truth, det, scored, names),
    }
    several = isinstance(groundtruth, (list, tuple)) and len(groundtruth) > 1
    if several and PROTOCOLS[protocol].ignore_unknown:  # else the others' keyframes would count
        parts = [load(part, f"part {n}", top, keys, True) for n, part in enumerate(groundtruth, 1)]
        result["parts"] = {part.name: mean(score(part, det).ap) for part in parts}
    if versus is not None:
        second = load(versus, "second detections", top, keys)
        result["versus"] = {
            "other": second.name,
            "differences": differences(
                [score(truth, det), score(truth, second)],
                keys,
                {
                    "all": range(len(labels)),
                    **groups,
                    **{f"{i} {names[i]}": [c] for c, i in enumerate(labels)},
                },
            ),
        }
    if compare:
        result["compare"] = {}
        for name, rules in PROTOCOLS.items():
            out = excluded.key[:0] if name == "official-2020" else excluded.key
            try:
                result["compare"][name] = mean(score_tables(truth, det, labels, rules, out).ap)
            except ValueError as error:  # what this protocol cannot express
                result["compare"][name] = str(error)
    if curves is not None:
        write_curves(curves, labels, scored)
    return result


# --------------------------------------------------------------------------------------------------
# Insight
# --------------------------------------------------------------------------------------------------


def bootstrap(runs: list[Scored], keys: dict, replicates: int = 1000, seed: int = 0) -> np.ndarray:
    """(runs, C, replicates) AP when the videos are drawn again, with replacement: the same draws
    for all runs. Up to 256 videos are drawn one by one, more (AVA-Kinetics) in 256 groups."""
    videos = {video: n for n, video in enumerate(dict.fromkeys(video for video, _ in keys))}
    units = min(len(videos), 256)
    unit_of = np.array([videos[video] % units for video, _ in keys])
    drawn = np.random.default_rng(seed).multinomial(units, [1 / units] * units, replicates).T * 1.0
    ap = np.full((len(runs), len(runs[0].ap), replicates), np.nan)
    for run, result in zip(runs, ap):
        for c in np.flatnonzero(~np.isnan(run.ap)).tolist():
            _, hit, key, box_key = run.classes[c]
            at, unit = np.flatnonzero(hit), unit_of[key]  # (P,) the true positives
            seen = np.zeros((len(at) + 1, units))
            np.add.at(seen, (np.searchsorted(at, np.arange(len(hit))), unit), 1)
            seen = np.cumsum(seen[:-1], axis=0)  # (P, units) detections down to it
            boxes = np.bincount(unit_of[box_key], minlength=units)
            for k in range(0, replicates, 100):
                times = drawn[:, k : k + 100]  # (units, 100) how often drawn
                true = times[unit[at]]
                precision = np.cumsum(true, axis=0) / np.maximum(1, seen @ times)
                precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
                with np.errstate(invalid="ignore"):  # 0 / 0: no box of the class drawn
                    result[c, k : k + 100] = (true * precision).sum(0) / (boxes @ times)
    return ap


def differences(runs: list[Scored], keys: dict, groups: dict) -> dict:
    """{group of classes: difference of two runs' mean AP}, with the 95 % interval of a paired
    bootstrap over videos. Classes that one run leaves out of its mean are left out of both."""
    drawn, result = bootstrap(runs, keys), {}
    for group, members in groups.items():
        members = [c for c in members if not np.isnan(runs[0].ap[c] + runs[1].ap[c])]
        if members:
            count = (~np.isnan(drawn[0, members])).sum(0)  # a draw can lack a rare class
            means = np.nansum(drawn[:, members], 1) / np.where(count, count, np.nan)
            a, b = (float(run.ap[members].mean()) for run in runs)
            result[group] = {
                "ap": a,
                "other": b,
                "difference": a - b,
                "interval": np.nanpercentile(means[0] - means[1], (2.5, 97.5)).tolist(),
            }
    return result


def groups_of(names: dict, counts: dict | None, thresholds: tuple) -> dict[str, list[int]]:
    """{group: columns of its classes}: by boxes in training, and for AVA by kind of action."""
    labels, groups = sorted(names), {}
    is_ava = 2 * sum(AVA_CLASSES.get(i) == names[i] for i in labels) > len(labels)
    counts = AVA_TRAIN_COUNTS if counts is None and is_ava else counts or {}
    counts = {int(i): n for i, n in counts.items()}  # keys of JSON are strings
    (head, tail), inf = thresholds, float("inf")
    if counts:
        for group, low, high in ("head", head + 1, inf), ("mid", tail, head), ("tail", 0, tail - 1):
            groups[group] = [c for c, i in enumerate(labels) if low <= counts.get(i, -1) <= high]
    for kind, (first, last) in AVA_KINDS.items() if is_ava else ():
        groups[kind] = [c for c, i in enumerate(labels) if first <= i <= last]
    return groups


def notes_on(truth: Table, det: Table, scored: Scored, names: dict) -> list[str]:
    """What to know before believing the number, above all why it is 0."""
    frames, person = scored.counts["keyframes"], scored.counts["person"]
    keys, notes = list(det.keys), []
    if frames["matched"] <= 0.5 * max(frames["detected"], frames["ground_truth"]):
        d, t = (
            f"{keys[x.key[0]][0]},{keys[x.key[0]][1] / 1e6:.9g}" if len(x.key) else "none"
            for x in (det, truth)
        )
        notes.append(
            f"{frames['matched']} of {frames['detected']} detected keyframes occur in the "
            f"ground truth: first detected {d}, first in the ground truth {t}, which has "
            f"{frames['ground_truth']}; persons without detections count as missed"
        )
    if frames["matched"] and person["recall"] < 0.1 and len(det.label):
        d, t = (f"{x.box[x.run].min():g} .. {x.box[x.run].max():g}" for x in (det, truth))
        notes.append(
            f"{person['recall']:.1%} of the persons are found: detected coordinates span "
            f"{d}, those of the ground truth {t}"
        )
    if none := [f"{i} {names[i]}" for i, n in zip(sorted(names), scored.positives) if not n]:
        notes.append(
            f"{len(none)} classes have no ground truth and are not in the mean: "
            + ", ".join(none[:5])
            + ", ..." * (len(none) > 5)
        )
    return notes


def write_curves(path, labels: list, scored: Scored) -> None:
    """Columns id, score, precision, recall, a row per detection: csv with a header, or npz."""
    parts = [
        (
            np.full(len(hit), i),
            score,
            np.cumsum(hit) / np.arange(1, len(hit) + 1),
            np.cumsum(hit) / n,
        )
        for i, n, (score, hit, *_) in zip(labels, scored.positives, scored.classes)
        if n
    ]
    columns = dict(zip(("id", "score", "precision", "recall"), map(np.concatenate, zip(*parts))))
    if Path(path).suffix == ".npz":
        np.savez_compressed(path, **columns)
    else:
        np.savetxt(
            path,
            np.column_stack(list(columns.values())),
            ["%d"] + ["%.9g"] * 3,
            ",",
            header=",".join(columns),
            comments="",
        )


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def points(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.2f}"


def report(result: dict) -> str:
    """The table for people: classes by AP, then the means with the counts they rest on."""
    protocol, person = result["protocol"], result["person"]
    lines = [f"{'AP':>6} {'recall':>7} {'boxes':>7} {'detections':>11}   class ({protocol})"]
    for one in sorted(result["per_class"], key=lambda one: 1 if one["ap"] is None else -one["ap"]):
        lines.append(
            f"{points(one['ap']):>6} {points(one['recall']):>7} {one['num_gt']:>7} "
            f"{one['num_det']:>11}   {one['id']} {one['name']}"
        )
    means = {f"mAP ({protocol})": result} | result["groups"]
    lines += [
        "",
        *(
            f"{points(one['mAP']):>6} {name}, {one['classes']} classes"
            for name, one in means.items()
        ),
    ]
    if "head" in result["groups"]:
        lines.append(
            "       (head: over {} training boxes, tail: under {})".format(*result["thresholds"])
        )
    lines += [f"{points(value):>6} {name}" for name, value in result.get("parts", {}).items()]
    lines.append(
        f"{points(person['ap']):>6} boxes without their labels: {points(person['recall'])}"
        f" % of {person['num_gt']} persons found by {person['num_det']} boxes"
    )
    lines += [
        f"{what}: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in result[what].items())
        for what in ("keyframes", "rows")
    ]
    lines += [
        f"{value if isinstance(value, str) else points(value):>6} mAP ({name})"
        for name, value in result.get("compare", {}).items()
    ]
    if "versus" in result:
        lines.append(
            f"\nagainst {result['versus']['other']} ({protocol}), with the middle 95 % of "
            "1000 draws of videos"
        )
        for name, one in sorted(
            result["versus"]["differences"].items(),
            key=lambda item: (item[0][0].isdigit(), -item[1]["difference"]),
        ):
            low, high = (points(x, "+") for x in one["interval"])
            lines.append(
                f"{points(one['ap']):>6} - {points(one['other']):>6} = "
                f"{points(one['difference'], '+'):>6}  [{low:>6}, {high:>6}]  {name}"
            )
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="AVA mAP of a csv of detections.")
    add = parser.add_argument
    add("-g", "--groundtruth", nargs="+", required=True, help="several are pooled (AVA-Kinetics)")
    add("-d", "--detections", required=True)
    add("-l", "--labelmap", help="default: the 60 classes of AVA v2.2")
    add("-e", "--exclusions", help="keyframes to leave out; implies official-2019")
    add("--protocol", choices=PROTOCOLS, help="default: official-2020")
    add("--compare", action="store_true", help="the mAP under every protocol")
    add("--versus", metavar="CSV", help="detections of a second run: differences with intervals")
    add("--thresholds", type=int, nargs=2, default=(10000, 1000), metavar=("HEAD", "TAIL"))
    add("--curves", metavar="FILE", help="write precision-recall curves: .csv or .npz")
    add("--json", action="store_true")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    try:
        result = evaluate(**args)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if as_json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
