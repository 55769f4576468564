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
keeps boxes without area. On one validation run they differ by up to 1.6 points (--compare shows
it), so no mAP leaves this file without its protocol. Equal scores are ranked as the official script
ranks them on this machine, by an unstable sort; "mAP_ties" tells how far another order could move
the mAP.

Files are csv without header, plain or .gz; times in seconds, boxes in [0, 1] of the frame:
    ground truth    video_id,time,x1,y1,x2,y2,label[,person_id]   or  video_id,time  (nothing there)
    detections      video_id,time,x1,y1,x2,y2,label,score
    exclusions      video_id,time     keyframes that count neither way (protocols before 2020)
    label map       item { name: "sit" id: 11 }   or   label { name: "sit" label_id: 11 ... }
"""

import argparse
import gzip
import heapq
import json
import re
import sys
import zlib
from collections import defaultdict
from csv import reader as csv_reader
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np

# --------------------------------------------------------------------------------------------------
# Protocols and classes
# --------------------------------------------------------------------------------------------------


class Protocol(NamedTuple):
    cap: int                 # rows kept per keyframe, the best; 0 = all
    order: str               # of equal scores on a keyframe: "heap" | "argsort" | "file"
    ignore_unknown: bool     # detections on keyframes the ground truth lacks; else false positives
    whole_seconds: bool      # fractions of a second and keyframes without boxes cannot be expressed
    sort: bool = True        # match the best first, else in the order of the file
    mmaction2: bool = False  # its four other differences (above)


PROTOCOLS = {
    "official-2020": Protocol(50, "heap", True, False),
    "official-2019": Protocol(50, "heap", False, True),
    "official-2018": Protocol(0, "argsort", False, True),
    "slowfast": Protocol(0, "file", False, True, sort=False),
    "mmaction2": Protocol(0, "file", True, True, mmaction2=True),
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
36 519 lift/pick up | 37 668 listen (e.g., to music) |
38 1251 open (e.g., a window, a car door) | 41 1297 play musical instrument |
43 97 point to (an object) | 45 344 pull (an object) | 46 387 push (an object) |
47 533 put down | 48 2146 read | 49 4808 ride (e.g., a bike, a car, a horse) | 51 719 sail boat |
52 222 shoot | 54 2991 smoke | 56 181 take a photo | 57 415 text on/look at a cellphone |
58 249 throw | 59 17133 touch (an object) | 60 137 turn (e.g., a screwdriver) |
61 1993 watch (e.g., TV) | 62 176 work on a computer | 63 777 write |
64 2695 fight/hit (a person) | 65 1073 give/serve (an object) to (a person) |
66 2003 grab (a person) | 67 1187 hand clap | 68 619 hand shake | 69 351 hand wave |
70 1103 hug (a person) | 72 714 kiss (a person) | 73 400 lift (a person) |
74 106816 listen to (a person) | 76 355 push (another person) |
77 1643 sing to (e.g., self, a person, a group) | 78 608 take (an object) from (a person) |
79 110267 talk to (e.g., self, a person, a group) | 80 168148 watch (a person)"""
AVA_ITEMS = [item.split(maxsplit=2) for item in AVA.replace("\n", " ").split(" | ")]
AVA_CLASSES = {int(i): name for i, _, name in AVA_ITEMS}
AVA_TRAIN_COUNTS = {int(i): int(count) for i, count, _ in AVA_ITEMS}
AVA_KINDS = {"pose": (1, 14), "object": (15, 63), "person": (64, 80)}  # label_type of v2.2, by id


def read_labelmap(path) -> dict[int, str]:
    """{id: name} of a label map in text-protobuf form, either spelling, any line breaks."""
    classes = {}
    text = Path(path).read_text(encoding="utf-8-sig")
    for number, item in enumerate(re.findall(r"\{((?:[^{}\"]|\"[^\"]*\")*)\}", text), 1):
        name = re.search(r'\bname:\s*"([^"]*)"', item)
        found = re.search(r"\b(?:label_)?id:\s*(\d+)", item)
        if not name or not found or not 1 <= int(found[1]) < 2**15 or int(found[1]) in classes:
            raise ValueError(f"{path}: item {number}: expected a name and a new id in 1..32767, "
                             f"found {' '.join(item.split())!r}")
        classes[int(found[1])] = name[1]
    if not classes:
        raise ValueError(f'{path}: no item {{ name: "..." id: N }} in this label map')
    return classes


# --------------------------------------------------------------------------------------------------
# Rows in memory and on disk
# --------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Boxes with one label each. A row with label 0 says "keyframe annotated, nothing there"."""

    video_id: np.ndarray               # (n,) str
    time_sec: np.ndarray               # (n,) float64
    boxes: np.ndarray                  # (n, 4) float64 x1, y1, x2, y2
    label: np.ndarray                  # (n,) int, as in the label map
    score: np.ndarray | None = None    # (n,) float64; ground truth needs none


def write_csv(path, rows: Rows) -> None:
    """Writes rows such that reading them gives the same float64 again (shortest exact decimals)."""
    tails = [""] * len(rows.label) if rows.score is None else \
        [f",{score!r}" for score in np.float64(rows.score).tolist()]
    columns = zip(np.asarray(rows.video_id).tolist(), np.float64(rows.time_sec).tolist(),
                  np.float64(rows.boxes).tolist(), np.asarray(rows.label).tolist(), tails)
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for video, time, (x1, y1, x2, y2), label, tail in columns:
            line = f"{video},{time:04.0f}" if time == int(time) else f"{video},{time:.6f}"
            file.write(line + bool(label) * f",{x1!r},{y1!r},{x2!r},{y2!r},{label}{tail}" + "\n")
    partial.replace(path)


@dataclass
class Table:
    """Rows as they are worked on: runs of consecutive rows that share keyframe and box.

    A person's box carries up to 80 rows, so runs save most of the parsing and half of the memory.
    """

    name: str
    keys: dict             # (video_id, time in microseconds) -> number, in order of appearance
    run_key: np.ndarray    # (R,) number of the keyframe
    run_box: np.ndarray    # (R, 4)
    run_rows: np.ndarray   # (R,) rows in the run; 0 = the keyframe alone (2 columns, label 0)
    label: np.ndarray      # (n,) int16; after arrange() the class's column, 0 .. C-1
    score: np.ndarray      # (n,) float64; of ground truth: the person id, or 1

    @property
    def begin(self) -> np.ndarray:  # (R,) first row of each run
        return np.cumsum(self.run_rows) - self.run_rows


def number_of(keys: dict, video: str, time: float) -> int:
    if not abs(time) < 1e9:
        raise ValueError(f"time {time} is not a number of seconds")
    return keys.setdefault((video, round(round(time, 6) * 1e6)), len(keys))


def read_table(path, top: int, is_truth: bool, widths: tuple) -> Table:
    """Reads a csv by blocks. ValueError: file:line and text of the first five bad rows."""
    keys, known, errors, line = {}, {}, [], 1
    columns = [[np.empty(shape, kind)] for shape, kind in
               ((0, np.int32), ((0, 4), float), (0, np.int32), (0, np.int16), (0, float))]
    for block in read_blocks(path):
        try:
            parts = parse_block(block, keys, known, top, is_truth, widths)
            rows = len(parts[3])
        except ValueError:  # something unusual somewhere: row by row, to accept it or to name it
            parts = parse_lines(block, keys, f"{path}:{{}}", line, top, is_truth, widths, errors)
            rows = block.count(b"\n")
        line += rows
        for column, part in zip(columns, parts):
            column.append(np.asarray(part, column[0].dtype))
    if errors:
        more = f"\n... and {len(errors) - 5} more such rows" if len(errors) > 5 else ""
        raise ValueError("\n".join(errors[:5]) + more)
    return Table(str(path), keys, *(np.concatenate(columns.pop(0)) for _ in range(5)))


def read_blocks(path, size: int = 1 << 20):
    """Yields whole lines, about a megabyte at a time: what is made of them stays in the cache."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        rest = b""
        while chunk := file.read(size):
            chunk = rest + chunk
            if b"\r" in chunk:  # correct without, but every row would take the slow way
                chunk = chunk.replace(b"\r\n", b"\n")
            cut = chunk.rfind(b"\n") + 1
            rest = chunk[cut:]
            if cut:
                yield chunk[:cut]
        if rest:
            yield rest + b"\n"


def parse_lines(block, keys, where, line, top, is_truth, widths, errors) -> tuple:
    """The plain reader: five columns of a Table, a run per row; what is wrong goes to errors."""
    key, box, rows, label, score = [], [], [], [], []
    for line, text in enumerate(block[:-1].decode(errors="backslashreplace").split("\n"), line):
        try:
            fields = next(csv_reader([text])) if '"' in text else text.split(",") if text else []
            if text.startswith("\ufeff"):
                raise ValueError("a byte-order mark; expected UTF-8 without one")
            if len(fields) not in widths:
                raise ValueError(f"{len(fields)} columns, expected {' or '.join(map(str, widths))}")
            corners = x1, y1, x2, y2 = [float(x) for x in fields[2:6]] or [0.0] * 4
            if not all(map(isfinite, corners)) or is_truth and (x1 > x2 or y1 > y2):
                raise ValueError("expected finite x1,y1,x2,y2" + is_truth * ", x1 <= x2, y1 <= y2")
            number = number_of(keys, fields[0], float(fields[1]))
            if len(fields) > 2:
                one, value = int(fields[6]), float(fields[7]) if len(fields) == 8 else 1.0
                if not 1 <= one <= top:
                    raise ValueError(f"label {one} is outside 1..{top} of the label map")
                if not isfinite(value):
                    raise ValueError(f"score {value}, expected a finite number")
                label.append(one)
                score.append(value)
            key.append(number)
            box.append(corners)
            rows.append(len(fields) > 2)
        except ValueError as error:
            header = " (a header row? these files have none)" if line == 1 else ""
            errors.append(f"{where.format(line)}: {error}{header}: {text[:120]!r}")
    return key, np.reshape(box, (-1, 4)), rows, label, score


def parse_block(block, keys, known, top, is_truth, widths) -> tuple:
    """The fast reader, for a block whose rows all have 7 or all 8 plain columns: the same as
    parse_lines or ValueError. It works on all rows at once through `words`: at every position of
    the block the 8 bytes that begin there, as one integer."""
    width = block[:block.index(b"\n")].count(b",") + 1
    data = np.frombuffer(block, np.uint8)
    stops = np.flatnonzero(data < 45)  # commas, line ends; a blank, quote or "+" spoils the pattern
    if width not in widths or width < 7 or len(stops) % width or block.startswith(b"\xef\xbb\xbf"):
        raise ValueError
    stops = stops.reshape(-1, width)
    if (data[stops] != np.frombuffer(b"," * (width - 1) + b"\n", np.uint8)).any():
        raise ValueError
    start = np.append(0, stops[:-1, -1] + 1)
    comma, stop = stops[:, 5].copy(), stops[:, 6].copy()  # around the label
    size = comma - start
    if size.min() < 16:
        raise ValueError
    words = np.ndarray(len(block) - 7, "<u8", block, strides=1)

    # A run begins where the six columns before the label are not, byte by byte, those above.
    whole = size.max() // 8  # words to compare; one more, which ends at the comma, covers the rest
    heads = np.ndarray(len(block), f"V{8 * whole}", block + bytes(8 * whole), strides=1)[start]
    heads, last = heads.view("<u8").reshape(-1, whole), words[comma - 8]
    differs = (heads[1:] != heads[:-1]) & (np.arange(whole) < size[1:, None] // 8)
    new = np.append(True, (size[1:] != size[:-1]) | (last[1:] != last[:-1]) | differs.any(1))
    runs = np.flatnonzero(new)
    key, box = [], []
    for a, b in zip(start[runs].tolist(), comma[runs].tolist()):
        video, time, *corners = block[a:b].split(b",")
        if (video, time) not in known:
            known[video, time] = number_of(keys, video.decode(), float(time))
        key.append(known[video, time])
        box.append([float(x) for x in corners])
    box = np.array(box)
    if not np.isfinite(box).all() or is_truth and (box[:, :2] > box[:, 2:]).any():
        raise ValueError

    label, bad = digits(words[stop - 8], stop - comma - 1)
    if bad.any() or label.min() < 1 or label.max() > top:
        raise ValueError
    score = parse_scores(block, data, words, stop, stops[:, 7].copy()) if width == 8 \
        else np.ones(len(label))
    return key, box, np.diff(np.append(runs, len(new))), label, score


KEEP = np.array([2**64 - 2**(64 - 8 * count) for count in range(9)], np.uint64)  # the last bytes


def digits(word: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value of the last count (0 .. 8) characters of each word; where they are not all digits."""
    wrong = (count < 0) | (count > 8)
    keep = KEEP[np.where(wrong, 0, count)]
    word = word & keep | ~keep & 0x3030303030303030  # zeros in front
    bad = (word & 0xF0F0F0F0F0F0F0F0 | (word + 0x0606060606060606 & 0xF0F0F0F0F0F0F0F0) >> 4) \
        != 0x3333333333333333
    word = (word & 0x0F0F0F0F0F0F0F0F) * 2561 >> 8              # 10 a + b of neighbouring digits,
    word = (word & 0x00FF00FF00FF00FF) * 6553601 >> 16          # 100 a + b of these pairs,
    word = (word & 0x0000FFFF0000FFFF) * 42949672960001 >> 32   # 10000 a + b
    return word.astype(np.int64), bad | wrong


def parse_scores(block, data, words, comma, end) -> np.ndarray:
    """float() of the text between comma and end, to the last bit.

    "d.ddd" with up to 16 decimals is an integer below 2^53 over a power of ten that float64 holds
    exactly; such a quotient is rounded once, correctly (Clinger 1990). The rest goes to float().
    """
    count = end - comma - 3
    if (count == count[0]).all():
        count = count[:1]  # as "%.6f" writes them: one number that serves all rows
    plain = (data[np.minimum(comma + 2, end)] == 46) & (count >= 1) & (count <= 16)
    count = np.clip(count, 0, 16)
    value, bad = digits(words[end - 8], np.minimum(count, 8))
    if count.max() > 8:
        high, bad_high = digits(words[end - 16], np.maximum(count, 8) - 8)
        value, bad = value + high * 10**8, bad | bad_high
    first, power = data[comma + 1].astype(np.int64) - 48, 10 ** np.arange(17)
    value += first * power[count]
    plain &= ~bad & (first >= 0) & (first <= 9) & (value < 2**53)
    score = value / power.astype(float)[count]
    for i in np.flatnonzero(~plain).tolist():
        score[i] = float(block[comma[i] + 1:end[i]])
    if not np.isfinite(score).all():
        raise ValueError
    return score


def table_of_rows(rows: Rows, name: str, top: int, is_truth: bool) -> Table:
    """The same from arrays. Raises ValueError naming the first five bad rows, counted from 0."""
    video, time = np.asarray(rows.video_id), np.asarray(rows.time_sec, float)
    label, box = np.asarray(rows.label), np.asarray(rows.boxes, float).reshape(-1, 4)
    score = np.ones(len(label)) if rows.score is None else np.asarray(rows.score, float)
    if len(set(map(len, (video, time, label, box, score)))) > 1:
        raise ValueError(f"{name}: {len(video)} video_id, {len(time)} time_sec, {len(box)} boxes, "
                         f"{len(label)} label, {len(score)} score: expected equal numbers")
    some = label != 0
    moved = np.append(True, (time[1:] != time[:-1]) | (video[1:] != video[:-1]))[:len(label)]
    new = moved[1:] | ~some[1:] | ~some[:-1]
    new |= (box[1:] != box[:-1]).view(np.uint32)[:, 0] != 0  # any of the four, without a slow any()
    new = np.append(True, new)[:len(label)]
    runs, keys = np.flatnonzero(new), {}
    a, b = box[runs, :2], box[runs, 2:]
    legal = np.isfinite(a + b).all(1) & (np.logical_not(is_truth) | (a <= b).all(1)) | ~some[runs]
    bad = np.union1d(runs[~(legal & (np.abs(time[runs]) < 1e9))],
                     np.flatnonzero((label < 0) | (label > top) | ~np.isfinite(score)))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} bad rows, expected finite numbers, label 0..{top}"
                         + is_truth * ", x1 <= x2, y1 <= y2" + "".join(
                             f"\n{i}: {video[i]},{time[i]},{box[i].tolist()},{label[i]},{score[i]}"
                             for i in bad[:5]))
    key = [number_of(keys, v, t) for v, t in zip(video[moved].tolist(), time[moved].tolist())]
    return Table(name, keys, np.array(key, np.int32)[np.cumsum(moved[runs]) - 1], box[runs],
                 np.diff(np.append(runs, len(label))) * some[runs], label[some].astype(np.int16),
                 score[some])


def load(source, name: str, top: int, is_truth: bool = False, widths: tuple = (2, 7, 8)) -> Table:
    """A path (which names itself in errors) or Rows as a Table. top: the largest label allowed."""
    if isinstance(source, Rows):
        return table_of_rows(source, name, top, is_truth)
    return source if isinstance(source, Table) else read_table(source, top, is_truth, widths)


def pool(tables: list[Table]) -> Table:
    """All their rows as of one file."""
    keys, run_key = {}, []
    for table in tables:
        numbers = np.array([keys.setdefault(key, len(keys)) for key in table.keys], np.int32)
        run_key.append(numbers[table.run_key])
    return Table(" + ".join(table.name for table in tables), keys, np.concatenate(run_key), *(
        np.concatenate([getattr(table, column) for table in tables])
        for column in ("run_box", "run_rows", "label", "score")))


# --------------------------------------------------------------------------------------------------
# The rows that count, in the order in which they are matched
# --------------------------------------------------------------------------------------------------


def arrange(table: Table, key: np.ndarray, column: np.ndarray) -> Table:
    """The same rows, keyframe by keyframe, those of one keyframe in the order of the file.

    key: new number of each keyframe, column: that of each label; they replace the old ones.
    """
    used = np.flatnonzero(table.run_rows)
    by = used[np.argsort(key[table.run_key[used]], kind="stable")]
    run_rows, label, score = table.run_rows[by], column[table.label], table.score
    if (by != used).any():
        shift = table.begin[by] - (np.cumsum(run_rows) - run_rows)
        rows = np.arange(len(label), dtype=np.int32) + np.repeat(shift.astype(np.int32), run_rows)
        label, score = label[rows], score[rows]
    return Table(table.name, table.keys, key[table.run_key[by]], table.run_box[by], run_rows, label,
                 score)


def apply_cap(keep, start, count, score, cap: int) -> list[int]:
    """Clears keep below the cap-th best kept score of each keyframe (rows start .. start + count).
    Returns the keyframes left with more than cap rows: those where the cut meets equal scores."""
    crowded = []
    width = np.where(count > cap, -(-count // 32) * 32, 0)  # keyframes of like size: one matrix
    for wide in np.unique(width[width > 0]).tolist():
        frames = np.flatnonzero(width == wide)
        for chunk in np.array_split(frames, len(frames) * wide // 2**17 + 1):
            rows = start[chunk, None] + np.arange(wide)
            inside = np.arange(wide) < count[chunk, None]
            inside &= keep[np.minimum(rows, len(keep) - 1)]
            padded = np.where(inside, score[np.minimum(rows, len(keep) - 1)], -np.inf)
            best = np.partition(padded, wide - cap, axis=1)[:, wide - cap, None]
            keep[rows[inside & (padded < best)]] = False
            crowded.append(chunk[(inside & (padded >= best)).sum(1) > cap])
    return np.concatenate(crowded).tolist() if crowded else []


def heap_order(table: Table, begin: np.ndarray, rows, cap: int) -> list[int]:
    """Rows of one keyframe in the order of the official reader, which keeps the best cap (0 = all)
    in a heap of (score, label, y1, x1, y2, x2): it settles which of equal scores stay, go first."""
    heap, equals = [], defaultdict(list)
    boxes = table.run_box[np.searchsorted(begin, rows, "right") - 1].tolist()
    items = zip(table.score[rows].tolist(), table.label[rows].tolist(), boxes)
    for row, (score, label, (x1, y1, x2, y2)) in zip(rows.tolist(), items):
        item = (score, label, y1, x1, y2, x2)
        equals[item].append(row)  # interchangeable
        if not cap or len(heap) < cap:
            heapq.heappush(heap, item)
        elif item[0] > heap[0][0]:
            heapq.heapreplace(heap, item)
    return [equals[item].pop() for item in sorted(heap, key=lambda item: -item[0])]


class Ranked(NamedTuple):
    """Detections that count: class by class, keyframe by keyframe, in matching order."""

    column: np.ndarray     # (n,) class, 0 .. C-1
    key: np.ndarray        # (n,) number of the keyframe
    score: np.ndarray      # (n,)
    run: np.ndarray        # (n,) the box is run_box[run]
    run_box: np.ndarray    # (R, 4)
    capped: int            # rows that the cap left out


def rank(det: Table, keep: np.ndarray, truth: Table, frames: int, rules: Protocol) -> Ranked:
    """Of the rows to keep, those that the cap leaves and whose box is valid, sorted."""
    begin, kept = det.begin, np.count_nonzero(keep)
    count = np.bincount(det.run_key, det.run_rows, frames).astype(int)
    start = np.cumsum(count) - count

    def by_heap(frame: int) -> list[int]:
        return heap_order(det, begin, start[frame] + np.flatnonzero(
            wanted[start[frame]:start[frame] + count[frame]]), rules.cap)

    if rules.cap:
        wanted = keep.copy()
        for frame in apply_cap(keep, start, count, det.score, rules.cap):
            keep[start[frame]:start[frame] + count[frame]] = False
            keep[by_heap(frame)] = True
    capped = kept - np.count_nonzero(keep)
    ordered = np.less_equal if rules.mmaction2 else np.less
    keep &= np.repeat(ordered(det.run_box[:, :2], det.run_box[:, 2:]).all(1), det.run_rows)
    rows = np.flatnonzero(keep)
    run = np.searchsorted(begin, rows, "right") - 1
    group = det.label[rows].astype(np.int64) * frames + det.run_key[run]
    place = np.arange(len(rows))
    if rules.sort:
        best_first = np.argsort(-det.score[rows])
        place[best_first] = np.arange(len(rows))
    by = np.sort(group * len(rows) + place) % max(1, len(rows))  # far faster than an indirect sort
    by = best_first[by] if rules.sort else by
    rows, run, group = rows[by], run[by], group[by]
    score = det.score[rows]

    # Of equal scores of a class on a keyframe that has such a box, it matters which comes first.
    code = np.repeat(truth.run_key, truth.run_rows) + truth.label.astype(np.int64) * frames
    equal = np.flatnonzero((group[1:] == group[:-1]) & (score[1:] == score[:-1]))
    equal = equal[np.isin(group[equal], code)]
    if rules.sort and len(equal):
        tied = np.union1d(equal, equal + 1)
        place = {row: row for row in rows[tied].tolist()}
        if rules.order == "heap":
            for frame in np.unique(det.run_key[run[tied]]).tolist():
                place.update((row, n) for n, row in enumerate(by_heap(frame)))
        elif rules.order == "argsort":
            for one in np.unique(group[tied]).tolist():
                order = np.sort(rows[slice(*np.searchsorted(group, (one, one + 1)))])
                order = order[np.argsort(det.score[order])[::-1]]
                place.update((row, n) for n, row in enumerate(order.tolist()))
        by = np.lexsort(([place[row] for row in rows[tied].tolist()], -score[tied], group[tied]))
        rows[tied], run[tied] = rows[tied][by], run[tied][by]
    return Ranked(det.label[rows], det.run_key[run], score, run, det.run_box, int(capped))


# --------------------------------------------------------------------------------------------------
# Matching and average precision
# --------------------------------------------------------------------------------------------------


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(P,) intersection over union of boxes a[i] and b[i]; (P, 4) each."""
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    zero = np.float64(0)  # mmaction2 subtracts in float32 but multiplies in float64
    both = np.maximum(height, zero) * np.maximum(width, zero)
    area_a, area_b = ((x[:, 3] - x[:, 1]) * (x[:, 2] - x[:, 0]) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return both / (area_a + area_b - both)


def match(det: Ranked, truth: Table, frames: int, rules: Protocol) -> np.ndarray:
    """(n,) bool: which detections are true positives."""
    run = np.repeat(np.arange(len(truth.run_key)), truth.run_rows)
    code = truth.label.astype(np.int64) * frames + truth.run_key[run]
    by = np.argsort(code, kind="stable")
    want = det.column.astype(np.int64) * frames + det.key
    first = np.searchsorted(code[by], want)
    count = np.searchsorted(code[by], want, "right") - first
    seen = np.flatnonzero(count)
    first, count = first[seen], count[seen]
    begin = np.cumsum(count) - count
    d = np.repeat(np.arange(len(seen)), count)                  # (P,) pairs of a detection ...
    g = by[np.arange(len(d)) + np.repeat(first - begin, count)]  # ... with each box of its class
    real = np.float32 if rules.mmaction2 else np.float64
    overlap = iou(det.run_box.astype(real)[det.run[seen[d]]], truth.run_box.astype(real)[run[g]])
    best = np.maximum.reduceat(overlap, begin) if len(d) else overlap
    best = np.flatnonzero((overlap == best[d]) & (overlap >= 0.5))
    d, g = d[best], g[best]                                     # one pair a detection, but for ties
    place = np.arange(len(run))
    for frame in np.unique(truth.run_key[run[g[1:][d[1:] == d[:-1]]]]).tolist():
        rows = np.flatnonzero((truth.run_key[run] == frame) & (truth.label >= 0))
        if rules.order == "heap":
            place[heap_order(truth, truth.begin, rows, 0)] = rows
        elif rules.mmaction2:
            place[rows[np.argsort(-truth.score[rows], kind="stable")]] = rows
    by = np.lexsort((place[g], d))
    d, g = d[by], g[by]
    chosen = np.flatnonzero(np.append(True, d[1:] != d[:-1])[:len(d)])[::-1]
    owner = np.full(len(run), -1)
    owner[g[chosen]] = seen[d[chosen]]  # the last to write stays: the best of those that chose it
    hit = np.zeros(len(want), bool)
    hit[owner[owner >= 0]] = True
    return hit


def curve(hit: np.ndarray, positives: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall down to each detection, which come by falling score."""
    found = np.cumsum(hit)
    return found / np.arange(1, len(found) + 1), found / positives


def reorder_ties(score: np.ndarray, hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """hit with the false positives first among equal scores, and with the true positives first."""
    first = np.flatnonzero(np.append(True, score[1:] != score[:-1]))
    size, hits = np.diff(np.append(first, len(score))), np.add.reduceat(hit, first, dtype=int)
    at = np.arange(len(score)) - np.repeat(first, size)
    return at >= np.repeat(size - hits, size), at < np.repeat(hits, size)


def average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the curve where precision is the best at this or any higher recall (VOC)."""
    recall = np.concatenate(([0], recall, [1]))
    precision = np.concatenate(([0], precision, [0]))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    step = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[step] - recall[step - 1]) * precision[step]))


def mean(ap) -> float | None:
    return None if np.isnan(ap).all() else float(np.nanmean(ap))


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """One table of detections scored against one ground truth."""

    ap: np.ndarray          # (3, C) nan = not in the mean; [1:] = worst, best order of equal scores
    positives: np.ndarray   # (C,) ground-truth boxes
    classes: list           # C times: score (falling), hit, keyframe; of its boxes the keyframe
    videos: list[str]       # of each keyframe
    keyframes: dict
    rows: dict
    person: dict


def score_tables(truth: Table, det: Table, labels: list, rules: Protocol, excluded: set) -> Scored:
    """AP of each class (labels: sorted ids) with the detections it rests on, and the counts."""
    for table in (truth, det) if rules.whole_seconds else ():
        odd = next((key for key in table.keys if key[1] % 10**6), None)
        if odd or not table.run_rows.all():
            what = f"{odd[0]},{odd[1] / 1e6:.6f}" if odd else "a row of 2 columns"
            raise ValueError(f"{table.name}: this protocol knows only whole seconds and rows with "
                             f"boxes, found {what}; official-2020 takes both")
    column = np.full(max(labels) + 1, -1, np.int16)
    column[labels] = np.arange(len(labels))

    # Keyframes are numbered in the order of their first evaluated row: so equal scores are ranked.
    lead, other = (truth, det) if rules.mmaction2 else (det, truth)
    run = np.flatnonzero(lead.run_rows)
    run = run[np.logical_or.reduceat(column[lead.label] >= 0, lead.begin[run])] if len(run) else run
    lead_keys = list(lead.keys)
    seen = dict.fromkeys(lead_keys[i] for i in lead.run_key[run].tolist())
    number = {key: n for n, key in enumerate({**seen, **lead.keys, **other.keys})}
    known = seen if rules.mmaction2 else truth.keys  # mmaction2: foreign labels alone do not count
    evaluated = np.array([key not in excluded and (key in known or not rules.ignore_unknown)
                          for key in number], bool)
    boxes, answer = (arrange(table, np.array([number[key] for key in table.keys], np.int32), column)
                     for table in (det, truth))

    here, listed = np.repeat(evaluated[boxes.run_key], boxes.run_rows), boxes.label >= 0
    keep, frames = here & listed, len(number)
    counts = answer.label >= 0
    if not rules.mmaction2:
        counts &= np.repeat(evaluated[answer.run_key], answer.run_rows)
    positives = np.bincount(answer.label[counts], minlength=len(labels))
    person = score_persons(boxes, keep, answer, counts, frames)
    lone, candidates = np.count_nonzero(det.run_rows == 0), np.count_nonzero(keep)
    rows = {"read": len(keep) + lone, "without_box": lone, "dropped_by_whitelist": np.sum(~listed),
            "on_ignored_or_excluded_keyframes": np.sum(~here & listed)}
    ranked = rank(boxes, keep, answer, frames, rules)  # clears keep where a row is dropped
    rows |= {"dropped_by_cap": ranked.capped, "evaluated": len(ranked.key),
             "dropped_invalid_box": candidates - ranked.capped - len(ranked.key)}
    hit = match(ranked, answer, frames, rules)
    bounds = np.searchsorted(ranked.column, np.arange(len(labels) + 1))
    box_key = np.repeat(answer.run_key, answer.run_rows)
    classes, ap = [], np.full((3, len(labels)), np.nan)
    for c, (a, b) in enumerate(zip(bounds[:-1], bounds[1:])):
        score = ranked.score[a:b].astype(np.float32 if rules.mmaction2 else float)
        order = np.argsort(score)[::-1]  # unstable: equal scores as in the official script
        score, found = score[order], hit[a:b][order]
        classes.append((score, found, ranked.key[a:b][order],
                        box_key[counts & (answer.label == c)]))
        if positives[c] and (b > a or not rules.mmaction2):
            ap[:, c] = average_precision(*curve(found, positives[c]))
            if ((score[1:] == score[:-1]) & (found[1:] != found[:-1])).any():
                ap[1:, c] = [average_precision(*curve(tied, positives[c]))
                             for tied in reorder_ties(score, found)]
    return Scored(
        ap, positives, classes, [video for video, _ in number],
        {"ground_truth": len(truth.keys.keys() - excluded), "detected": len(det.keys),
         "matched": len((truth.keys.keys() & det.keys.keys()) - excluded),
         "ignored": len(det.keys.keys() - known.keys() - excluded) * rules.ignore_unknown,
         "excluded": len(excluded & (truth.keys.keys() | det.keys.keys()))},
        {name: int(n) for name, n in rows.items()}, person)


def score_persons(det: Table, keep, truth: Table, counts, frames: int) -> dict:
    """The boxes without their labels, each once with its best score. Where few persons are found,
    the person detector or the clock is at fault, and no better classifier helps."""
    def distinct(table: Table, keep) -> Table:
        score = np.where(keep, table.score, -np.inf)
        best = np.maximum.reduceat(score, table.begin) if len(score) else score
        by = np.lexsort((best, *table.run_box.T, table.run_key))
        by = by[best[by] > -np.inf]
        key, box = table.run_key[by], table.run_box[by]
        last = np.append((key[1:] != key[:-1]) | (box[1:] != box[:-1]).any(1), True)[:len(by)]
        one = np.ones(np.count_nonzero(last), int)
        return Table("", {}, key[last], box[last], one, one - 1, best[by][last])

    rules = Protocol(0, "file", True, False)
    persons, found = distinct(truth, counts), distinct(det, keep)
    boxes = rank(found, np.ones(len(found.label), bool), persons, frames, rules)
    hit = match(boxes, persons, frames, rules)
    positives = max(1, len(persons.label))
    return {"ap": average_precision(*curve(hit[np.argsort(boxes.score)[::-1]], positives)),
            "recall": int(hit.sum()) / positives,
            "num_gt": len(persons.label), "num_det": len(hit)}


def bootstrap(runs: list[Scored], replicates: int, seed: int) -> list[np.ndarray]:
    """(C, replicates) AP of each run when videos are drawn again, with replacement: the same draws
    for all runs. Up to 256 videos are drawn one by one, more (AVA-Kinetics) in 256 groups."""
    videos = dict.fromkeys(video for run in runs for video in run.videos)
    unit, units, result = {v: n % 256 for n, v in enumerate(videos)}, min(len(videos), 256), []
    drawn = np.random.default_rng(seed).multinomial(units, [1 / units] * units, replicates).T * 1.0
    for run in runs:
        ap = np.full((len(run.positives), replicates), np.nan)
        unit_of_key = np.array([unit[video] for video in run.videos])
        for c in np.flatnonzero(~np.isnan(run.ap[0])).tolist():
            _, hit, key, box_key = run.classes[c]
            at, of_row = np.flatnonzero(hit), unit_of_key[key]                # (P,) true positives
            rows = np.zeros((len(at) + 1, units))
            np.add.at(rows, (np.searchsorted(at, np.arange(len(hit))), of_row), 1)
            rows = np.cumsum(rows[:-1], axis=0)               # (P, units) detections down to each
            boxes = np.bincount(unit_of_key[box_key], minlength=units)
            for k in range(0, replicates, 100):
                times = drawn[:, k:k + 100]                   # (units, 100) how often each is drawn
                with np.errstate(invalid="ignore"):           # 0 / 0 where none of a class is drawn
                    precision = np.cumsum(times[of_row[at]], axis=0) / (rows @ times)
                    precision = np.maximum.accumulate(np.nan_to_num(precision)[::-1], axis=0)[::-1]
                    ap[c, k:k + 100] = (times[of_row[at]] * precision).sum(0) / (boxes @ times)
        result.append(ap)
    return result


def differences(run: Scored, other: Scored, groups: dict, replicates: int, seed: int) -> dict:
    """{group of classes: difference run - other of its mean AP}, with the 95 % interval of a paired
    bootstrap over videos. Classes that one run leaves out of its mean are left out of both."""
    ours, theirs = bootstrap([run, other], replicates, seed)
    both, result = ~np.isnan(run.ap[0] + other.ap[0]), {}
    for group, members in groups.items():
        if members := [c for c in members if both[c]]:
            delta = np.array([[one[c] for c in members] for one in (ours, theirs)])
            count = (~np.isnan(delta)).sum(1)                 # a draw can lack a rare class
            delta = np.subtract(*np.nansum(delta, 1) / np.where(count, count, np.nan))
            a, b = run.ap[0, members].mean(), other.ap[0, members].mean()
            result[group] = {"ap": a, "other": b, "difference": a - b,
                             "interval": np.nanpercentile(delta, (2.5, 97.5)).tolist()}
    return result


def groups_of(names: dict, counts: dict | None, thresholds: tuple) -> dict[str, list[int]]:
    """{group: columns of its classes}: by boxes in training, and for AVA by kind of action."""
    labels, groups = sorted(names), {}
    is_ava = 2 * sum(AVA_CLASSES.get(i) == names[i] for i in labels) > len(labels)
    counts = AVA_TRAIN_COUNTS if counts is None and is_ava else counts or {}
    if counts:
        frequency = [counts.get(i, counts.get(str(i))) for i in labels]  # keys of JSON are strings
        groups = {"head": [], "mid": [], "tail": []}
        for c, n in enumerate(frequency):
            if n is not None:
                at = "head" if n > thresholds[0] else "mid" if n >= thresholds[1] else "tail"
                groups[at].append(c)
    for kind, (first, last) in AVA_KINDS.items() if is_ava else ():
        groups[kind] = [c for c, i in enumerate(labels) if first <= i <= last]
    return groups


def notes_on(truth: Table, det: Table, scored: Scored, names: dict) -> list[str]:
    """What to know before believing the number, above all why it is 0."""
    frames, person, notes = scored.keyframes, scored.person, []
    if frames["matched"] <= 0.5 * frames["detected"]:
        d, t = (next((f"{video},{us / 1e6:.9g}" for video, us in x.keys), "none")
                for x in (det, truth))
        notes.append(f"{frames['matched']} of {frames['detected']} detected keyframes occur in the "
                     f"ground truth: first detected {d}, first in the ground truth {t}")
    elif frames["matched"] < 0.5 * frames["ground_truth"]:
        notes.append(f"{frames['matched']} of {frames['ground_truth']} keyframes of the ground "
                     "truth have detections; the persons on the others count as missed")
    if frames["matched"] and person["recall"] < 0.1:
        d, t = (f"{x.run_box.min():g} .. {x.run_box.max():g}" for x in (det, truth))
        notes.append(f"{person['recall']:.1%} of the persons are found: detected coordinates span "
                     f"{d}, those of the ground truth {t}")
    if none := [f"{i} {names[i]}" for i, n in zip(sorted(names), scored.positives) if not n]:
        notes.append(f"{len(none)} classes have no ground truth and are not in the mean: "
                     + ", ".join(none[:5]) + ", ..." * (len(none) > 5))
    return notes


def evaluate(groundtruth, detections, labelmap=None, exclusions=None, protocol: str | None = None,
             train_counts=None, thresholds: tuple = (10000, 1000), versus=None,
             replicates: int = 1000, seed: int = 0, curves=None) -> dict:
    """AVA mAP of detections (path or Rows) against groundtruth (path or Rows, or a list of them:
    they are pooled, and "parts" has the mAP on each: AVA-Kinetics). Returns what --json prints.

    labelmap: path or {id: name}; None = the 60 classes of AVA. exclusions: path or Rows. protocol:
    of PROTOCOLS; None = official-2019 with exclusions, official-2020 without. train_counts: {id:
    rows in training} or a training csv; None = AVA v2.2, if the classes are AVA's. Classes with
    more than thresholds[0] are "head", with less than thresholds[1] "tail". versus: detections of a
    second run, compared with on resampled videos. curves: .npz for precision-recall curves.
    Raises ValueError, with file and line where there is one.
    """
    protocol = protocol or ("official-2020" if exclusions is None else "official-2019")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if exclusions is not None and protocol == "official-2020":
        raise ValueError("official-2020 has no exclusions, its ground truth marks empty keyframes "
                         "by rows of 2 columns; official-2019 has")
    names = AVA_CLASSES if labelmap is None else labelmap if isinstance(labelmap, dict) \
        else read_labelmap(labelmap)
    labels, top, rules = sorted(names), max(names), PROTOCOLS[protocol]
    truths = [load(source, "ground truth", top, True) for source in
              (groundtruth if isinstance(groundtruth, (list, tuple)) else [groundtruth])]
    if len(truths) > 1 and not rules.ignore_unknown:
        raise ValueError(f"{protocol} takes one ground truth: it counts a detection on any other "
                         "keyframe as false; official-2020 takes several")
    truth = pool(truths) if len(truths) > 1 else truths[0]
    det = load(detections, "detections", top)
    excluded = set() if exclusions is None else \
        set(load(exclusions, "exclusions", top, False, (2,)).keys)
    if train_counts is not None and not isinstance(train_counts, dict):
        count = np.bincount(load(train_counts, "training", top, True).label, minlength=top + 1)
        train_counts = {i: int(count[i]) for i in labels}

    def mean_ap(one: Scored) -> float | None:
        by_id = np.full(top, np.nan)  # summed by id like the official script, to the last bit
        by_id[np.array(labels) - 1] = one.ap[0]
        return mean(by_id)

    scored = score_tables(truth, det, labels, rules, excluded)
    if not scored.positives.any():
        raise ValueError(f"{truth.name}: no row has a class of the label map")
    groups = groups_of(names, train_counts, thresholds)
    result = {
        "protocol": protocol, "mAP": mean_ap(scored),
        "mAP_ties": [mean(scored.ap[1]), mean(scored.ap[2])],
        "classes": int(np.sum(~np.isnan(scored.ap[0]))), "groups": {
            group: {"mAP": mean(scored.ap[0, members]),
                    "classes": int(np.sum(~np.isnan(scored.ap[0, members])))}
            for group, members in groups.items()},
        "thresholds": list(thresholds), "person": scored.person, "keyframes": scored.keyframes,
        "rows": scored.rows, "per_class": [
            {"id": i, "name": names[i], "ap": mean(scored.ap[0, c]),
             "num_gt": int(scored.positives[c]), "num_det": len(scored.classes[c][1]),
             "recall": int(scored.classes[c][1].sum()) / max(1, int(scored.positives[c]))}
            for c, i in enumerate(labels)],
        "notes": notes_on(truth, det, scored, names)}
    if len(truths) > 1:
        result["parts"] = {part.name: mean_ap(score_tables(part, det, labels, rules, excluded))
                           for part in truths}
    if versus is not None:
        second = load(versus, "second detections", top)
        groups = {"all": range(len(labels)), **groups,
                  **{f"{i} {names[i]}": [c] for c, i in enumerate(labels)}}
        theirs = score_tables(truth, second, labels, rules, excluded)
        result["versus"] = {"other": second.name, "replicates": replicates, "differences":
                            differences(scored, theirs, groups, replicates, seed)}
    if curves is not None:  # arrays ID_score, ID_precision, ID_recall
        lines = {i: (scored.classes[c][0], *curve(scored.classes[c][1], scored.positives[c]))
                 for c, i in enumerate(labels) if scored.positives[c]}
        np.savez_compressed(curves, **{f"{i}_{name}": line[k] for i, line in lines.items()
                                       for k, name in enumerate(("score", "precision", "recall"))})
    return result


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def points(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.2f}"


def report(result: dict) -> str:
    """The table for people: classes by AP, then the means with the counts they rest on."""
    protocol, person = result["protocol"], result["person"]
    lines = [f"{'AP':>6} {'recall':>7} {'boxes':>7} {'detections':>11}   class ({protocol})"]
    for one in sorted(result["per_class"], key=lambda one: -1 if one["ap"] is None else -one["ap"]):
        lines.append(f"{points(one['ap']):>6} {points(one['recall']):>7} {one['num_gt']:>7} "
                     f"{one['num_det']:>11}   {one['id']} {one['name']}")
    low, high = map(points, result["mAP_ties"])
    ties = f"; equal scores in another order: {low} to {high}" * (low != high)
    lines += ["", f"{points(result['mAP']):>6} mAP ({protocol}), {result['classes']} classes{ties}"]
    for group, part in result["groups"].items():
        limit = {"head": " with over {0} training boxes", "tail": " with under {1}"}.get(group, "")
        lines.append(f"{points(part['mAP']):>6} {group}, {part['classes']} classes"
                     + limit.format(*result["thresholds"]))
    lines += [f"{points(value):>6} {name}" for name, value in result.get("parts", {}).items()]
    lines.append(f"{points(person['ap']):>6} boxes without their labels: {points(person['recall'])}"
                 f" % of {person['num_gt']} persons found by {person['num_det']} boxes")
    for what in ("keyframes", "rows"):
        lines.append(f"{what}: " + ", ".join(f"{n} {key.replace('_', ' ')}"
                                             for key, n in result[what].items()))
    if "versus" in result:
        other = result["versus"]
        lines.append(f"\nagainst {other['other']} ({protocol}), with the middle 95 % of "
                     f"{other['replicates']} draws of videos")
        for name, one in sorted(other["differences"].items(),
                                key=lambda item: (item[0][0].isdigit(), -item[1]["difference"])):
            low, high = (points(x, "+") for x in one["interval"])
            lines.append(f"{points(one['ap']):>6} - {points(one['other']):>6} = "
                         f"{points(one['difference'], '+'):>6}  [{low:>6}, {high:>6}]  {name}")
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def compare(truths: list[Table], det: Table, labelmap, exclusions) -> dict:
    """{protocol: its mAP, or why it has none}, without and with the exclusions."""
    result = {}
    for excluded in (None,) if exclusions is None else (None, exclusions):
        for protocol in PROTOCOLS:
            name = protocol + " -e" * (excluded is not None)
            try:
                result[name] = evaluate(truths, det, labelmap, excluded, protocol)["mAP"]
            except ValueError as error:
                result[name] = str(error)
    return result


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
    add("--replicates", type=int, default=1000, help="draws of videos for --versus")
    add("--seed", type=int, default=0, help="of these draws")
    add("--train-csv", help="group classes by their rows here; default: counts of AVA v2.2")
    add("--thresholds", type=int, nargs=2, default=(10000, 1000), metavar=("HEAD", "TAIL"))
    add("--curves", metavar="NPZ", help="write precision-recall curves")
    add("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.compare:
            top = max(read_labelmap(args.labelmap) if args.labelmap else AVA_CLASSES)
            result = compare([load(path, "", top, True) for path in args.groundtruth],
                             load(args.detections, "", top), args.labelmap, args.exclusions)
            text = "\n".join(f"{name:<17} {value if isinstance(value, str) else points(value)}"
                             for name, value in result.items())
        else:
            result = evaluate(args.groundtruth, args.detections, args.labelmap, args.exclusions,
                              args.protocol, args.train_csv, args.thresholds, args.versus,
                              args.replicates, args.seed, args.curves)
            text = report(result)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1) if args.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
