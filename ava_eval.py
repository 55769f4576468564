"""AVA mAP: action detections and ground truth in, average precision out. One file, numpy only.

    python ava_eval.py -g ava_val_v2.2.csv -d detections.csv              # table; --json for machines
    result = ava_eval.evaluate("ava_val_v2.2.csv", Rows(...) or path)     # the same object

The metric. A keyframe is a video and a time. On it, the 50 best-scored rows are kept; then, class by
class and best first, each detection looks at the ground-truth box it overlaps most: it is a true
positive if their IoU is at least 0.5 and no better detection has claimed that box, otherwise a false
positive (there is no second choice). All detections of a class are ranked by score over all keyframes;
its average precision (AP) is the area under the precision-recall curve made monotone (VOC, all points).
mAP is the mean over the classes that have ground truth. Five evaluators go by this name:

    protocol        rows per   order within     detections on keyframes      keyframe
                    keyframe   a keyframe       the ground truth lacks       time
    official-2020   50 best    by score         ignored                      microseconds  (default)
    official-2019   50 best    by score         false positives              whole seconds (default: -e)
    official-2018   all        by score         false positives              whole seconds
    slowfast        all        order of file    false positives              whole seconds
    mmaction2       all        by score         ignored                      whole seconds

official-2018 also stands for AlphAction and VideoMAE, slowfast for YOWO. mmaction2 in addition works in
float32, leaves classes nobody detected out of the mean, and counts excluded boxes as missed. On the
validation set they differ by up to 1.6 points of mAP, so no mAP leaves this file without its protocol.
Equal scores are ordered as the official script orders them on this machine (it uses an unstable sort);
"mAP_ties" says how low and how high any other order could bring the number.

Files, all csv without header, plain or .gz; times in seconds, boxes in [0, 1] of the frame:
    ground truth    video_id,time,x1,y1,x2,y2,label[,person_id]    or   video_id,time  (nothing to see)
    detections      video_id,time,x1,y1,x2,y2,label,score
    exclusions      video_id,time        keyframes that count neither way (protocols before 2020)
    label map       item { name: "sit" id: 11 }    or   label { name: "sit" label_id: 11 ... }
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------------------------------------------
# Protocols and classes
# ---------------------------------------------------------------------------------------------------


class Protocol(NamedTuple):
    cap: int                 # rows kept per keyframe, best first; 0 = all
    order: str               # among equal scores of a keyframe: "heap" | "argsort" | "file"
    ignore_unknown: bool     # detections on keyframes the ground truth lacks: ignored, else false positives
    whole_seconds: bool      # keyframes at fractions of a second, or without boxes, cannot be expressed
    sort: bool = True        # match best first, else in the order of the file
    mmaction2: bool = False  # float32; undetected classes out of the mean; excluded boxes are missed


PROTOCOLS = {
    "official-2020": Protocol(50, "heap", True, False),
    "official-2019": Protocol(50, "heap", False, True),
    "official-2018": Protocol(0, "argsort", False, True),
    "slowfast": Protocol(0, "file", False, True, sort=False),
    "mmaction2": Protocol(0, "file", True, True, mmaction2=True),
}

# The 60 evaluated classes of AVA v2.1 and v2.2: id, boxes in the v2.2 training set, name. Counts are
# recovered from the class ratios in YOWO's ava_categories_ratio.json times 332,353 training boxes.
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
AVA_KINDS = {"pose": (1, 14), "object": (15, 63), "person": (64, 80)}  # v2.2's label_type, by id


def read_labelmap(path) -> dict[int, str]:
    """{id: name} of a label map in text-protobuf form, either spelling, any line breaks."""
    classes = {}
    text = Path(path).read_text(encoding="utf-8-sig")
    for number, item in enumerate(re.findall(r"\{((?:[^{}\"]|\"[^\"]*\")*)\}", text), 1):
        name = re.search(r'\bname:\s*"([^"]*)"', item)
        found = re.search(r"\b(?:label_)?id:\s*(\d+)", item)
        if not name or not found or int(found[1]) < 1 or int(found[1]) in classes:
            raise ValueError(f"{path}: item {number}: expected a name and a new id >= 1, found "
                             f"{' '.join(item.split())!r}")
        classes[int(found[1])] = name[1]
    if not classes:
        raise ValueError(f'{path}: no item {{ name: "..." id: N }} in this label map')
    return classes


# ---------------------------------------------------------------------------------------------------
# Rows in memory and on disk
# ---------------------------------------------------------------------------------------------------


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
    score = [None] * len(rows.label) if rows.score is None else np.float64(rows.score).tolist()
    columns = zip(np.asarray(rows.video_id).tolist(), np.float64(rows.time_sec).tolist(),
                  np.float64(rows.boxes).tolist(), np.asarray(rows.label).tolist(), score)
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for video, time, (x1, y1, x2, y2), label, one in columns:
            head = f"{video},{time:04.0f}" if time == int(time) else f"{video},{time:.6f}"
            if label:
                head += f",{x1!r},{y1!r},{x2!r},{y2!r},{label}" + (one is not None) * f",{one!r}"
            file.write(head + "\n")
    partial.replace(path)


@dataclass
class Table:
    """Rows as they are worked on: runs of consecutive rows that share keyframe and box.

    One person's box carries up to 60 or 80 rows, so runs save most of the parsing and of the memory.
    """

    name: str
    keys: dict = field(default_factory=dict)  # (video_id, time in microseconds) -> number, by appearance
    run_key: np.ndarray = ()                  # (R,) number of the keyframe
    run_box: np.ndarray = ()                  # (R, 4)
    run_rows: np.ndarray = ()                 # (R,) rows in the run; 0 = the keyframe alone (2 columns)
    label: np.ndarray = ()                    # (n,) int32
    score: np.ndarray = ()                    # (n,) float64; of ground truth: person id, or 1

    def key(self, video: str, time: float) -> int:
        if not abs(time) < 1e9:
            raise ValueError(f"time {time} is not a number of seconds")
        return self.keys.setdefault((video, round(round(time, 6) * 1e6)), len(self.keys))


def read_table(path, top: int, is_truth: bool = False, widths=(2, 7, 8)) -> Table:
    """Reads a csv in blocks. Raises ValueError with file:line and text of the first five bad rows."""
    table, errors, first, parts, known = Table(str(path)), [], 1, [], {}
    for block in read_blocks(path):
        try:
            parts.append(parse_block(block, table, known, top, is_truth, widths))
        except ValueError:  # something unusual somewhere: line by line, to accept it or to name it
            parts.append(parse_lines(block, table, first, top, is_truth, widths, errors))
        first += block.count(b"\n")
    if errors:
        more = f"\n... and {len(errors) - 5} more such rows" if len(errors) > 5 else ""
        raise ValueError("\n".join(errors[:5]) + more)
    parts = parts or [([], np.empty((0, 4)), [], [], [])]
    types = (np.int32, np.float64, np.int32, np.int32, np.float64)
    table.run_key, table.run_box, table.run_rows, table.label, table.score = (
        np.concatenate([np.asarray(part[k], types[k]) for part in parts]) for k in range(5))
    return table


def read_blocks(path, size: int = 1 << 23):
    """Yields whole lines, `size` bytes at a time: a block and its arrays fit the processor's cache."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        rest = b""
        while chunk := file.read(size):
            chunk = rest + chunk.replace(b"\r\n", b"\n")
            cut = chunk.rfind(b"\n") + 1
            rest = chunk[cut:]
            if cut:
                yield chunk[:cut]
        if rest:
            yield rest + b"\n"


def check_boxes(box: np.ndarray, is_truth: bool) -> None:
    if not np.isfinite(box).all() or is_truth and (box[:, :2] > box[:, 2:]).any():
        raise ValueError("expected finite x1,y1,x2,y2" + is_truth * " with x1 <= x2 and y1 <= y2")


def parse_lines(block, table, first, top, is_truth, widths, errors) -> tuple:
    """The plain reader: five columns of a Table, one run per row; what is wrong goes to errors."""
    key, box, rows, label, score = [], [], [], [], []
    for number, line in enumerate(block[:-1].split(b"\n"), first):
        try:
            text = line.decode()
            fields = next(csv_reader([text]), []) if '"' in text else text.split(",")
            if text.startswith("\ufeff"):
                raise ValueError("a byte-order mark: save the file as UTF-8 without one")
            if len(fields) not in widths:
                raise ValueError(f"{len(fields) if text else 0} columns, expected "
                                 f"{' or '.join(map(str, widths))}")
            corners = [float(x) for x in fields[2:6]] or [0.0] * 4
            check_boxes(np.array([corners]), is_truth)
            if len(fields) > 2:
                one, value = int(fields[6]), float(fields[7]) if len(fields) == 8 else 1.0
                if not 1 <= one <= top:
                    raise ValueError(f"label {one} is outside 1..{top} of the label map")
                if not np.isfinite(value):
                    raise ValueError(f"score {value}")
                label.append(one)
                score.append(value)
            key.append(table.key(fields[0], float(fields[1])))
            box.append(corners)
            rows.append(len(fields) > 2)
        except ValueError as error:
            header = " (a header row? these files have none)" if number == 1 else ""
            errors.append(f"{table.name}:{number}: {error}{header} in {line[:120]!r}")
    return key, np.reshape(box, (-1, 4)), rows, label, score


def parse_block(block, table, known, top, is_truth, widths) -> tuple:
    """The fast reader, for blocks of rows of one width (7 or 8): same result as parse_lines, or ValueError.

    Works on all rows at once through `words`, the 8 bytes that begin at every position as one integer.
    """
    width = block[:block.index(b"\n")].count(b",") + 1
    data = np.frombuffer(block, np.uint8)
    stops = np.flatnonzero(data < 45)  # commas and line ends; blanks, quotes, "+" spoil the pattern
    if width not in widths[-2:] or width < 7 or len(stops) % width:
        raise ValueError
    stops = stops.reshape(-1, width)
    if (data[stops] != np.frombuffer(b"," * (width - 1) + b"\n", np.uint8)).any() or stops[0, 5] < 16:
        raise ValueError
    words = np.ndarray(len(block) - 7, "<u8", block, strides=1)

    # Runs: a row whose first six columns are, byte for byte, those of the row before costs nothing more.
    start, end = np.append(0, stops[:-1, -1] + 1), stops[:, 5].copy()
    size = end - start
    if size.min() < 8:
        raise ValueError
    new = np.ones(len(size), bool)
    new[1:] = size[1:] != size[:-1]
    for k in range(0, size.max(), 8):
        word = words[start + np.minimum(k, size - 8)]
        new[1:] |= word[1:] != word[:-1]
    runs = np.flatnonzero(new)
    key, box = [], []
    for a, b in zip(start[runs].tolist(), end[runs].tolist()):
        video, time, *corners = block[a:b].split(b",")
        if (video, time) not in known:
            known[video, time] = table.key(video.decode(), float(time))
        key.append(known[video, time])
        box.append(list(map(float, corners)))
    check_boxes(box := np.array(box), is_truth)

    comma = stops[:, 6].copy()
    label, bad = digits(words[comma - 8], comma - end - 1)
    if bad.any() or label.min() < 1 or label.max() > top:
        raise ValueError
    score = parse_scores(block, data, words, comma, stops[:, 7].copy()) if width == 8 \
        else np.ones(len(label))
    return key, box, np.diff(np.append(runs, len(new))), label.astype(np.int32), score


ZEROS = np.uint64(0x3030303030303030)  # "00000000"
KEEP = np.array([2**64 - 2**(64 - 8 * count) for count in range(9)], np.uint64)  # the last bytes


def digits(word: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value of the last count (0..8) characters of each word, and where they are not all digits."""
    bad = (count < 0) | (count > 8)
    keep = KEEP[np.where(bad, 0, count)]
    word = word & keep | ZEROS & ~keep
    bad |= (word & 0xF0F0F0F0F0F0F0F0 | (word + 0x0606060606060606) >> 4 & 0x0F0F0F0F0F0F0F0F) \
        != 0x3333333333333333
    word = (word & 0x0F0F0F0F0F0F0F0F) * 2561 >> 8              # pairs of digits: 10 a + b
    word = (word & 0x00FF00FF00FF00FF) * 6553601 >> 16          # of pairs: 100 a + b
    word = (word & 0x0000FFFF0000FFFF) * 42949672960001 >> 32   # 10000 a + b
    return word.astype(np.int64), bad


def parse_scores(block, data, words, comma, end) -> np.ndarray:
    """float() of the text between comma and end, to the last bit.

    "d.ddd" with up to 16 decimals is an integer below 2^53 over a power of ten that float64 holds
    exactly, and such a quotient is rounded once, correctly (Clinger 1990). The rest goes to float().
    """
    decimals = end - comma - 3
    plain = (data[np.minimum(comma + 2, end)] == 46) & (decimals >= 0) & (decimals <= 16)
    decimals = np.where(plain, decimals, 0)
    value, bad = digits(words[end - 8], np.minimum(decimals, 8))
    if decimals.max() > 8:
        high, bad_high = digits(words[end - 16], np.maximum(decimals, 8) - 8)
        value, bad = value + high * 10**8, bad | bad_high
    whole = data[comma + 1].astype(np.int64) - 48
    power = 10 ** np.arange(17)
    value += whole * power[decimals]
    plain &= ~bad & (whole >= 0) & (whole <= 9) & (value < 2**53)
    score = value / power.astype(float)[decimals]
    for i in np.flatnonzero(~plain).tolist():
        score[i] = float(block[comma[i] + 1:end[i]])
    if not np.isfinite(score).all():
        raise ValueError
    return score
