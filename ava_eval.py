"""AVA mAP: action detections and ground truth in, average precision out. One file, numpy only.

    python ava_eval.py -g ava_val_v2.2.csv -d detections.csv         # a table; --json for machines
    result = ava_eval.evaluate("ava_val_v2.2.csv", Rows(...))        # the same object; or a path

How the number is computed: `score_tables`, in a dozen sentences and their code. Five evaluators
use the name, and differ by up to 1.6 points on one file (--compare), so no mAP leaves this one
without its protocol:

    protocol        rows of a    order within     detections on keyframes    keyframe
                    keyframe     a keyframe       the ground truth lacks     time
    official-2020   50 best      by score         ignored                    microseconds (default)
    official-2019   50 best      by score         false positives            seconds (if given -e)
    official-2018   all          by score         false positives            seconds
    slowfast        all          of the file      false positives            seconds
    mmaction2       all          by score         ignored                    seconds

official-2018 stands for AlphAction and VideoMAE too, slowfast for YOWO. mmaction2 also works in
float32, leaves classes that nobody detected out of the mean, counts excluded boxes as missed and
keeps boxes without area. Equal scores fall as in the original scripts on the same machine.

Files are csv without header, plain or .gz; times in seconds, boxes in [0, 1] of the frame:
    ground truth    video_id,time,x1,y1,x2,y2,label[,person_id]   or  video_id,time  (nothing there)
    detections      video_id,time,x1,y1,x2,y2,label,score
    exclusions      video_id,time     keyframes that count neither way (protocols before 2020)
    label map       item { name: "sit" id: 11 }   or   label { name: "sit" label_id: 11 ... }
Rows whose label the label map lacks are left out and counted.
"""

import argparse
import csv
import gzip
import heapq
import json
import os
import re
import sys
import zlib
from array import array
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np

# ---- Protocols, rows -----------------------------------------------------------------------------

MIN_IOU = 0.5  # of a detection and the box that it may claim


class Protocol(NamedTuple):
    cap: int  # rows kept per keyframe, the best; 0 = all
    order: str  # of the rows of a keyframe: as in the "file", or by score, equal scores as they
    # come out of the reader's "heap", of numpy's "argsort" class by class, or of a "stable" sort
    ignore_unknown: bool  # detections on keyframes the ground truth lacks; else false positives
    whole_seconds: bool  # fractions of a second and keyframes without boxes cannot be expressed
    mmaction2: bool = False  # its four other differences (above)

    @property
    def real(self) -> type:
        return np.float32 if self.mmaction2 else np.float64


PROTOCOLS = {
    "official-2020": Protocol(50, "heap", ignore_unknown=True, whole_seconds=False),
    "official-2019": Protocol(50, "heap", ignore_unknown=False, whole_seconds=True),
    "official-2018": Protocol(0, "argsort", ignore_unknown=False, whole_seconds=True),
    "slowfast": Protocol(0, "file", ignore_unknown=False, whole_seconds=True),
    "mmaction2": Protocol(0, "stable", ignore_unknown=True, whole_seconds=True, mmaction2=True),
}


@dataclass
class Rows:
    """Boxes with one label each. A row with label 0 says "keyframe annotated, nothing there"."""

    video_id: np.ndarray  # (n,) str
    time_sec: np.ndarray  # (n,) float64
    boxes: np.ndarray  # (n, 4) float64 x1, y1, x2, y2
    label: np.ndarray  # (n,) int, as in the label map
    score: np.ndarray | None = None  # (n,) float64; ground truth needs none


class Table(NamedTuple):
    """Rows as they are worked on. A person's box carries up to 80 rows, one after the other: it
    is kept once, which saves most of the parsing and half of the memory."""

    name: str  # for messages
    keys: dict  # (video_id, time in microseconds) -> number of the keyframe; shared by all tables
    box_key: np.ndarray  # (K,) int32 keyframe of each box; "nothing there" is a box without rows
    corners: np.ndarray  # (K, 4) float64
    box: np.ndarray  # (n,) int32 box of each row
    label: np.ndarray  # (n,) int32; when numbered: int16 0 .. C-1, or -1 for other classes
    score: np.ndarray  # (n,) float64; of ground truth the person id, as the official heap has it

    def take(self, rows) -> "Table":
        return self._replace(box=self.box[rows], label=self.label[rows], score=self.score[rows])

    def key(self) -> np.ndarray:
        """(n,) keyframe of each row."""
        return self.box_key[self.box]

    def code(self) -> np.ndarray:
        """(n,) label and keyframe in one number."""
        return self.label.astype(np.int64) * len(self.keys) + self.key()

    def bounds(self) -> dict[int, tuple[int, int]]:
        """{keyframe: (begin, end)}: its rows, where those of each stand together."""
        key = self.key()
        starts = np.flatnonzero(changes(key)).tolist()
        return dict(zip(key[starts].tolist(), pairwise([*starts, len(key)]), strict=True))

    def without_rows(self) -> int:
        """How many boxes stand for "nothing there"."""
        return len(self.box_key) - int(changes(self.box).sum())


def changes(*columns) -> np.ndarray:
    """(n,) bool: where a row differs from the one above in some column; the first row does."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


def mark(keyframes, keys: dict) -> np.ndarray:
    """(keyframes,) bool: of all keyframes, those given by number."""
    marked = np.zeros(len(keys), bool)
    marked[keyframes] = True
    return marked


# ---- The metric ----------------------------------------------------------------------------------


class ClassScore(NamedTuple):
    """One class: its average precision and the detections it rests on, by falling score."""

    ap: float  # nan: not in the mean
    positives: int  # boxes in the ground truth
    hit: np.ndarray  # (n,) bool: a true positive
    key: np.ndarray  # (n,) keyframe: whoever draws videos again needs it (extras/versus.py)
    truth_key: np.ndarray  # (positives,) keyframe of each box


class Scored(NamedTuple):
    """Detections scored against the ground truth."""

    classes: list[ClassScore]
    counts: dict  # person, keyframes, rows, ground_truth_rows: as in the result

    @property
    def ap(self) -> np.ndarray:
        """(C,)"""
        return np.array([one.ap for one in self.classes])


def score_tables(truth: Table, det: Table, labels: list, rules: Protocol, exclusions) -> Scored:
    """Average precision of each class, and the counts. labels: sorted ids; exclusions: keyframes.

    The comments between the lines are the whole metric, in the order in which it is computed.
    """
    if rules.whole_seconds:
        refuse_fractions(truth)
        refuse_fractions(det)

    # A keyframe is a video and a time. A row is a box on it with one of the classes; of rows with
    # other classes nothing is taken but that their keyframe was annotated.
    truth, det = number_classes(truth, labels), number_classes(det, labels)

    # The ground truth says which keyframes were annotated. Detections on others are ignored, or
    # are false positives, by the protocol. Excluded keyframes count neither way.
    keys = det.keys
    annotated, excluded = mark(truth.box_key, keys), mark(exclusions, keys)
    ignored = np.zeros(len(keys), bool)
    if rules.ignore_unknown:
        ignored = ~annotated
    if rules.mmaction2:  # to which a keyframe with other classes alone is unknown
        ignored = ~mark(truth.key()[truth.label >= 0], keys)
    boxes = by_keyframe(truth, ~excluded | rules.mmaction2, truth)
    candidates = by_keyframe(det, ~excluded & ~ignored, truth if rules.mmaction2 else det)

    # Of the detections of a keyframe the 50 best are kept, whatever their classes. Boxes without
    # area are dropped.
    ranked, capped = rank(candidates, boxes, rules)

    # From here on every class is alone. On each keyframe its detections choose, the best first. A
    # detection looks at that box of the ground truth which it overlaps most, and at no other. If
    # their intersection over union is at least 0.5 and no better detection has claimed the box, it
    # claims it and is a true positive. If not it is a false positive: there is no second choice,
    # and two detections of one person are one too many.
    hits = match(ranked, boxes, rules)

    # All detections of the class, on all keyframes, are ranked by score. Down to each of them
    # precision is the part that are true positives, recall the part of the boxes that is claimed.
    # Average precision is the area under that curve, made monotone. mAP is its mean over the
    # classes that have boxes (`mean`); a class that nobody detected adds 0.
    classes = score_classes(ranked, hits, boxes, len(labels), rules)

    # What the number rests on.
    rows = count_rows(det, candidates)
    rows["dropped_by_cap"] = capped
    rows["dropped_invalid_box"] = len(candidates.box) - capped - len(hits)
    counts = {
        "person": score_persons(candidates, boxes),
        "keyframes": count_keyframes(annotated, mark(det.box_key, keys), ignored, excluded),
        "rows": rows | {"evaluated": len(hits)},
        "ground_truth_rows": count_rows(truth, boxes) | {"evaluated": len(boxes.box)},
    }
    return Scored(classes, counts)


def refuse_fractions(table: Table) -> None:
    """ValueError if the table has what a protocol of whole seconds cannot express."""
    keys = list(table.keys)
    odd = "a row of 2 columns" if table.without_rows() else ""
    for key in table.box_key.tolist():
        video, time = keys[key]
        if time % 10**6:
            odd = f"{video},{time / 1e6:.6f}"
            break
    if odd:
        raise ValueError(
            f"{table.name}: this protocol knows only whole seconds and rows with boxes, found "
            f"{odd}; official-2020 takes both"
        )


def number_classes(table: Table, labels: list) -> Table:
    """`label` becomes its place among the labels, in 16 bits, which numpy sorts in linear time."""
    others = labels[-1] + 1
    place = np.full(others + 1, -1, np.int16)
    place[labels] = np.arange(len(labels))
    return table._replace(label=place[np.minimum(table.label, others)])


def by_keyframe(table: Table, counted: np.ndarray, first_in: Table) -> Table:
    """The rows of the classes on the keyframes that are counted, (keyframes,) bool: keyframe by
    keyframe, each in the order of the file. The keyframes come in the order in which `first_in` has
    them: so they do in the original scripts, and there that ranks equal scores."""
    box = first_in.box[first_in.label >= 0]
    keyframes, first = np.unique(first_in.box_key[box[changes(box)]], return_index=True)
    turn = np.zeros(len(table.keys), np.int32)
    turn[keyframes] = first
    key = table.key()
    rows = np.flatnonzero(counted[key] & (table.label >= 0))
    return table.take(rows[np.argsort(turn[key[rows]], kind="stable")])


def rank(det: Table, boxes: Table, rules: Protocol) -> tuple[Table, int]:
    """The detections by class, then keyframe, then in the order in which they choose, without what
    the cap leaves out and boxes without area; and how many the cap left out."""
    less = np.less_equal if rules.mmaction2 else np.less
    has_area = less(det.corners[:, :2], det.corners[:, 2:]).all(1)
    if not rules.cap:  # else a box without area takes a place under the cap
        det = det.take(has_area[det.box])
    rows = best_first(det, boxes, rules)
    capped = len(det.box) - len(rows)
    rows = rows[has_area[det.box[rows]]]
    return det.take(rows[np.argsort(det.label[rows], kind="stable")]), capped


def best_first(det: Table, boxes: Table, rules: Protocol) -> np.ndarray:
    """The rows keyframe by keyframe, the best first, without what the cap leaves out. What the
    original does with equal scores is slow, and is repeated only where it matters."""
    if rules.order == "file" or not len(det.box):
        return np.arange(len(det.box))
    cap = rules.cap or None
    kind = "stable" if rules.order == "stable" else None
    falling = -det.score
    bounds = det.bounds()
    rows_of = {}
    for keyframe, (begin, end) in bounds.items():
        score = falling[begin:end]
        rows = score.argsort(kind=kind)
        if cap and cap < len(rows) and score[rows[cap - 1]] == score[rows[cap]]:
            rows_of[keyframe] = original_order(det, begin, end, rules, cap)
        else:
            rows_of[keyframe] = begin + rows[:cap]
    if kind != "stable":
        kept = det.take(np.concatenate(list(rows_of.values())))
        for keyframe in with_equal_scores(kept, boxes):
            rows_of[keyframe] = original_order(det, *bounds[keyframe], rules, cap)
    return np.concatenate(list(rows_of.values()))


def match(det: Table, boxes: Table, rules: Protocol) -> np.ndarray:
    """(n,) bool: which of the ranked detections are true positives."""
    looks_at = most_overlapped(det, boxes, rules)  # (n,)
    looking = np.flatnonzero(looks_at >= 0)
    # the first to look at a box is the best of those that do, and claims it
    claims = np.unique(looks_at[looking], return_index=True)[1]
    hit = np.zeros(len(det.box), bool)
    hit[looking[claims]] = True
    return hit


def most_overlapped(det: Table, boxes: Table, rules: Protocol) -> np.ndarray:
    """(n,) for each detection the row of the box with the largest intersection over union; -1 if
    that is under MIN_IOU. Of equally large ones it is the first in the order of the original."""
    detection, box = same_class_and_keyframe(det.code(), boxes.code())  # (P,) (P,)
    detected = det.corners.astype(rules.real)[det.box[detection]]
    overlap = iou(detected, boxes.corners.astype(rules.real)[boxes.box[box]])
    largest = np.full(len(det.box), MIN_IOU)
    np.fmax.at(largest, detection, overlap)
    chosen = overlap == largest[detection]  # several where they are equal
    detection, box = detection[chosen], box[chosen]
    equal = ~changes(detection)
    turn = original_turn(boxes, boxes.key()[box[equal]], rules)
    order = np.argsort(-turn[box], kind="stable")
    looks_at = np.full(len(det.box), -1)
    looks_at[detection[order]] = box[order]  # where a detection comes again, the last one stays
    return looks_at


def same_class_and_keyframe(det_code, box_code) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a detection and a box with the same code, as two columns of rows."""
    by_code = np.argsort(box_code, kind="stable")
    sorted_code = box_code[by_code]
    first = np.searchsorted(sorted_code, det_code, "left")
    partners = np.searchsorted(sorted_code, det_code, "right") - first  # of each detection
    detection = np.repeat(np.arange(len(det_code)), partners)
    pairs_before = np.cumsum(partners) - partners  # those of the detections before this one
    number = np.arange(len(detection)) - pairs_before[detection]  # 0, 1, .. partners - 1
    return detection, by_code[first[detection] + number]


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(P,) intersection over union of the boxes a[i] and b[i]; (P, 4) each."""
    left, top = np.maximum(a[:, :2], b[:, :2]).T
    right, bottom = np.minimum(a[:, 2:], b[:, 2:]).T
    zero = np.float64(0)  # mmaction2 subtracts in float32 but multiplies in float64
    both = np.maximum(bottom - top, zero) * np.maximum(right - left, zero)
    with np.errstate(invalid="ignore"):  # two boxes without area: nan, which is not >= 0.5
        return both / (area(a) + area(b) - both)


def area(box: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = box.T
    return (y2 - y1) * (x2 - x1)


def score_classes(ranked: Table, hits, boxes: Table, classes: int, rules: Protocol) -> list:
    """A ClassScore for each class, from the ranked detections and which are true positives."""
    result, begin = [], 0
    key, box_key = ranked.key(), boxes.key()
    for c, count in enumerate(np.bincount(ranked.label, minlength=classes).tolist()):
        # Unstable, as in the original scripts, so that equal scores fall as they do there
        score = ranked.score[begin : begin + count].astype(rules.real)
        by_score = begin + np.argsort(score)[::-1]
        hit, truth_key = hits[by_score], box_key[boxes.label == c]
        ap = np.nan
        if len(truth_key) and (count or not rules.mmaction2):
            ap = average_precision(hit, len(truth_key))
        result.append(ClassScore(ap, len(truth_key), hit, key[by_score], truth_key))
        begin += count
    return result


def average_precision(hit: np.ndarray, positives: int) -> float:
    """hit: (n,) bool, by falling score. The area under the curve of precision over recall: a hit
    adds 1 / positives to recall, at a precision that is made monotone, that is the best at this or
    any higher recall; a box that nobody claimed adds 0."""
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    return float(monotone[hit].sum() / positives)


def mean(ap) -> float | None:
    """None if there is nothing to take the mean of."""
    return None if np.isnan(ap).all() else float(np.nanmean(ap))


# ---- Beside the metric: counts, and persons whatever they do -------------------------------------


def count_keyframes(annotated, detected, ignored, excluded) -> dict:
    """Of masks of all keyframes, (keyframes,) bool."""
    masks = {
        "ground_truth": annotated & ~excluded,
        "detected": detected,
        "matched": annotated & detected & ~excluded,
        "ignored": detected & ignored & ~excluded,
        "excluded": excluded & (annotated | detected),
    }
    return {what: int(mask.sum()) for what, mask in masks.items()}


def count_rows(table: Table, counted: Table) -> dict:
    without_box = table.without_rows()
    others = int((table.label < 0).sum())
    return {
        "read": len(table.box) + without_box,
        "without_box": without_box,
        "dropped_by_whitelist": others,
        "on_ignored_or_excluded_keyframes": len(table.box) - others - len(counted.box),
    }


def score_persons(det: Table, boxes: Table) -> dict:
    """The boxes without their labels, each once with its best score. Where few persons are found,
    the person detector or the clock is at fault, and no better classifier helps."""
    det, persons = without_labels(det), without_labels(boxes)
    has_area = (det.corners[:, :2] < det.corners[:, 2:]).all(1)
    det = det.take(has_area[det.box])
    hit = match(det, persons, PROTOCOLS["slowfast"])
    positives = len(persons.box)
    ap = average_precision(hit[np.argsort(-det.score, kind="stable")], max(1, positives))
    recall = int(hit.sum()) / max(1, positives)
    return {"ap": ap, "recall": recall, "num_gt": positives, "num_det": len(hit)}


def without_labels(table: Table) -> Table:
    """Each box of each keyframe once, with its best score; by keyframe, then falling score."""
    starts = np.flatnonzero(changes(table.box))
    best = np.maximum.reduceat(table.score, starts) if len(starts) else table.score
    table = table.take(starts)._replace(label=np.zeros(len(starts), np.int16), score=best)
    keyframe = np.cumsum(changes(table.key()))
    corners = table.corners[table.box].T
    rows = np.lexsort((-best, *corners, keyframe))
    rows = rows[changes(keyframe[rows], *corners[:, rows])]
    return table.take(rows[np.lexsort((-best[rows], keyframe[rows]))])


# ---- Equal scores and equal overlaps, as the original scripts order them -------------------------


def with_equal_scores(det: Table, boxes: Table) -> set[int]:
    """Keyframes where two detections of a class have one score, and the ground truth has the class:
    which of them chooses first decides which is the true positive. det: the best first."""
    code = det.code()
    rows = np.flatnonzero(np.isin(code, boxes.code()))
    rows = rows[np.argsort(det.label[rows], kind="stable")]
    again = ~changes(code[rows], det.score[rows])
    return set(det.key()[rows[again]].tolist())


def original_turn(boxes: Table, keyframes: np.ndarray, rules: Protocol) -> np.ndarray:
    """(n,) numbers that rise as the original orders the boxes of the ground truth; on keyframes
    that are not asked for, as in the file."""
    turn, wanted = np.arange(len(boxes.box)), set(keyframes.tolist())
    if wanted and rules.order in ("heap", "stable"):
        for keyframe, (begin, end) in boxes.bounds().items():
            if keyframe in wanted:
                turn[original_order(boxes, begin, end, rules)] = np.arange(begin, end)
    return turn


def original_order(table: Table, begin: int, end: int, rules: Protocol, cap=None) -> np.ndarray:
    """The rows begin .. end, those of a keyframe, as the protocol's own code orders them. The
    official reader pushes them through a heap that keeps the best `cap`."""
    score, label = table.score[begin:end], table.label[begin:end]
    if rules.order == "stable":
        return begin + np.argsort(-score, kind="stable")
    if rules.order == "argsort":
        order = []
        for c in np.unique(label):
            rows = np.flatnonzero(label == c)
            order.append(rows[np.argsort(score[rows])[::-1]])
        return begin + np.concatenate(order)
    x1, y1, x2, y2 = table.corners[table.box[begin:end]].T.tolist()
    heap, rows_of = [], defaultdict(list)  # rows with the same item are interchangeable
    items = zip(score.tolist(), label.tolist(), y1, x1, y2, x2, strict=True)
    for row, item in enumerate(items, begin):
        rows_of[item].append(row)
        if cap is None or len(heap) < cap:
            heapq.heappush(heap, item)
        elif item[0] > heap[0][0]:
            heapq.heapreplace(heap, item)
    heap.sort(key=lambda item: -item[0])
    return np.array([rows_of[item].pop() for item in heap])


# ---- From files or arrays to mAP -----------------------------------------------------------------


def evaluate(
    groundtruth,
    detections,
    labelmap=None,
    exclusions=None,
    protocol: str | None = None,
    train_counts: dict | None = None,
    thresholds: tuple[int, int] = (10000, 1000),
    compare: bool = False,
) -> dict:
    """AVA mAP of detections (path or Rows) against groundtruth (path or Rows, or a list of them:
    they are pooled, and "parts" has the mAP on each: AVA-Kinetics). Returns what --json prints.

    labelmap: path or {id: name}; None = the 60 classes of AVA. Rows of other classes are left out.
    exclusions: path or Rows. protocol: of PROTOCOLS; None = official-2019 with exclusions,
    official-2020 without. train_counts: {id: annotated boxes in training}; None = those of AVA
    v2.2, if the classes are AVA's. Classes with more than thresholds[0] are "head", with less than
    thresholds[1] "tail". compare: adds the mAP under every protocol. ValueError: with
    file and line where there is one.
    """
    protocol = protocol_of(protocol, exclusions)
    names = classes_of(labelmap)
    labels = sorted(names)
    keys, excluded = {}, []
    parts = load(groundtruth, "ground truth", keys, is_truth=True)
    truth, det = join(parts), join(load(detections, "detections", keys))
    if exclusions is not None:
        excluded = join(load(exclusions, "exclusions", keys, widths=(2,))).box_key

    def score(truth: Table, protocol: str = protocol) -> Scored:
        out = [] if protocol == "official-2020" else excluded
        return score_tables(truth, det, labels, PROTOCOLS[protocol], out)

    scored = score(truth)
    if not scored.counts["ground_truth_rows"]["evaluated"]:
        raise ValueError(
            f"{truth.name}: no row with a class ({shortened(labels)}) to evaluate, labels: "
            f"{shortened(np.unique(truth.label))}"
        )
    groups = groups_of(names, train_counts, thresholds)
    result = {
        "protocol": protocol,
        **mean_over(scored, range(len(labels))),
        "groups": {group: mean_over(scored, members) for group, members in groups.items()},
        "thresholds": list(thresholds),
        **scored.counts,
        "per_class": per_class(scored, names),
        "notes": notes_on(truth, det, scored, names, labelmap is None),
    }
    if len(parts) > 1 and PROTOCOLS[protocol].ignore_unknown:  # else the others' keyframes count
        result["parts"] = {part.name: mean(score(part).ap) for part in parts}
    if compare:
        result["compare"] = by_protocol(lambda protocol: score(truth, protocol))
    return result


def classes_of(labelmap) -> dict[int, str]:
    if labelmap is None:
        return AVA_CLASSES
    names = labelmap if isinstance(labelmap, dict) else read_labelmap(labelmap)
    if min(names, default=0) < 1:
        raise ValueError("the label map needs classes, with numbers from 1")
    if len(names) > np.iinfo(np.int16).max:  # see number_classes
        raise ValueError(f"{len(names)} classes, expected at most {np.iinfo(np.int16).max}")
    return names


def by_protocol(score) -> dict:
    """{protocol: mAP, or why it cannot be expressed}."""
    result = {}
    for protocol in PROTOCOLS:
        try:
            result[protocol] = mean(score(protocol).ap)
        except ValueError as error:
            result[protocol] = str(error)
    return result


def protocol_of(protocol: str | None, exclusions) -> str:
    if protocol is None:
        return "official-2020" if exclusions is None else "official-2019"
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    if exclusions is not None and protocol == "official-2020":
        raise ValueError(
            "official-2020 has no exclusions, its ground truth marks empty keyframes by rows of "
            "2 columns; official-2019 has"
        )
    return protocol


def per_class(scored: Scored, names: dict) -> list[dict]:
    result = []
    for label, one in zip(sorted(names), scored.classes, strict=True):
        about = {
            "id": label,
            "name": names[label],
            "ap": mean(one.ap),
            "num_gt": one.positives,
            "num_det": len(one.hit),
            "recall": float(one.hit.sum() / max(1, one.positives)),
        }
        result.append(about)
    return result


def mean_over(scored: Scored, members) -> dict:
    """mAP of some classes, and how many of them count."""
    ap = scored.ap[list(members)]
    return {"mAP": mean(ap), "classes": int((~np.isnan(ap)).sum())}


# ---- Reading and writing -------------------------------------------------------------------------


def load(source, name: str, keys: dict, is_truth=False, widths=(2, 7, 8)) -> list[Table]:
    """A path or Rows, or each of a list of them, as a table. name: of Rows, in messages."""
    sources = source if isinstance(source, (list, tuple)) else [source]
    if not sources:
        raise ValueError(f"{name}: an empty list, expected one file at least")
    tables = []
    for number, one in enumerate(sources, 1):
        if isinstance(one, Rows):
            part = f"{name} {number}" if len(sources) > 1 else name
            tables.append(read_rows(one, part, keys, is_truth))
        else:
            try:
                tables.append(read_csv(one, keys, is_truth, widths))
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{one}: {error}") from error
    return tables


def join(tables: list[Table]) -> Table:
    """Their rows as one table, in this order."""
    if len(tables) == 1:
        return tables[0]
    boxes, columns = 0, []
    for table in tables:
        columns.append(table._replace(box=table.box + boxes)[2:])
        boxes += len(table.box_key)
    name = " + ".join(table.name for table in tables)
    return Table(name, tables[0].keys, *map(np.concatenate, zip(*columns, strict=True)))


def keyframe_number(keys: dict, video: str, time: float) -> int:
    if not abs(time) < 1e9:
        raise ValueError(f"time {time} is not a number of seconds")
    stamp = int(time) * 10**6 if time.is_integer() else round(round(time, 6) * 1e6)
    return keys.setdefault((video, stamp), len(keys))


def read_csv(path, keys: dict, is_truth: bool, widths: tuple) -> Table:
    """ValueError: file:line and text of the first five bad rows, and how many more there are."""
    box_key, corners, first = array("i"), array("d"), array("q")  # first: row of each box
    label, score = array("i"), array("d")
    label_of = Parsed(parse_label).__getitem__
    # the numbers of annotations are few, those of detections too many to be kept
    number_of = Parsed(parse_number).__getitem__ if is_truth else parse_number
    keyframe = head = None  # what rows share, as texts: video_id and time; video_id to y2
    errors = []
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", errors="backslashreplace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = line.rsplit(",", 2)
                if row[0] != head:  # not one more label of the same box
                    fields = split_row(line, widths)
                    if fields[:2] != keyframe:
                        key = keyframe_number(keys, fields[0].strip(), float(fields[1]))
                        keyframe = fields[:2]
                    sides = fields[2:6] or ["0"] * 4  # of a keyframe with nothing there
                    sides = x1, y1, x2, y2 = list(map(number_of, sides))
                    if is_truth and (x1 > x2 or y1 > y2):
                        raise ValueError("expected x1 <= x2, y1 <= y2")
                    corners.fromlist(sides)
                    box_key.append(key)
                    first.append(len(score))
                    head = row[0] if len(fields) == 8 and '"' not in line else None
                    if len(fields) == 2:
                        continue
                    row = [head, *fields[6:], "1"]
                value = number_of(row[2])
                label.append(label_of(row[1]))
                score.append(value)
            except (ValueError, csv.Error) as error:
                if not line.strip(' ,;"\t\n'):
                    continue  # an empty row, as spreadsheets leave them
                errors.append(bad_row(path, number, line, error) if len(errors) < 5 else "")
                if number == 1:  # then it is usually a file of another kind
                    break
    if errors:
        more = f"\n... and {len(errors) - 5} more such rows" if len(errors) > 5 else ""
        raise ValueError("\n".join(errors[:5]) + more)
    rows_of_box = np.diff(first, append=len(score))
    box = np.repeat(np.arange(len(first), dtype=np.int32), rows_of_box)
    corners = np.asarray(corners).reshape(-1, 4)
    label, score = np.asarray(label), np.asarray(score)
    return Table(str(path), keys, np.asarray(box_key), corners, box, label, score)


def split_row(line: str, widths: tuple) -> list[str]:
    fields = next(csv.reader([line])) if '"' in line else line.split(",")
    if len(fields) not in widths:
        expected = "2" if widths == (2,) else "2, 7 or 8"
        raise ValueError(f"columns: {len(fields)}, expected {expected}")
    return fields


class Parsed(dict):
    """{text: value}: each text is parsed once."""

    def __init__(self, parse):
        self.parse = parse

    def __missing__(self, text: str):
        self[text] = value = self.parse(text)
        return value


def parse_number(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"found {text.strip()}, expected a finite number")
    return number


def parse_label(text: str) -> int:
    label = float(text)
    if not 1 <= label < 2**31 or label != int(label):
        raise ValueError(f"label {text.strip()}, expected a whole number from 1")
    return int(label)


def bad_row(path, number: int, line: str, error: Exception) -> str:
    """One line for people: where, what, the usual cause if it is that, and the text."""
    text, cause = line.rstrip("\n"), ""
    if max(text.count(";"), text.count("\t")) > text.count(","):
        cause = " (columns are separated by commas, numbers have points)"
    elif number == 1 and re.fullmatch(r'[^,]+(,\s*"?[A-Za-z_][^,]*)+', text):
        cause = " (a header row? these files have none)"
    what = str(error).replace("\\n", "")
    return f"{path}:{number}: {what}{cause}: {text[:120]!r}"


def read_rows(rows: Rows, name: str, keys: dict, is_truth: bool) -> Table:
    """ValueError: how many rows are bad, and the first of them, counted from 0."""
    video, time = np.asarray(rows.video_id), np.asarray(rows.time_sec, float)
    corners, label = np.asarray(rows.boxes, float).reshape(-1, 4), np.asarray(rows.label)
    score = np.ones(len(label)) if rows.score is None else np.asarray(rows.score, float)
    if len({len(column) for column in (video, time, corners, label, score)}) > 1:
        raise ValueError(f"{name}: video_id, time_sec, boxes, label, score differ in length")
    if len(video) and not isinstance(video[0], str):  # 1 would be another video than "1"
        raise ValueError(f"{name}: video_id {video[0]!r}, expected text")
    kind = np.asarray(rows.time_sec).dtype
    if kind in (np.float16, np.float32) and (np.isfinite(time) & (time != time.round(6))).any():
        raise ValueError(f"{name}: time_sec in {kind} is another keyframe's, expected float64")
    with np.errstate(invalid="ignore"):  # not a number: refused below
        whole = label.astype(np.int32)
    nothing = label == 0
    new = changes(video, time, *corners.T)
    new |= nothing
    new[1:] |= nothing[:-1]
    starts = np.flatnonzero(new)  # the first row of each box
    video, time, corners = video[starts], time[starts], corners[starts]  # of the boxes

    legal = np.isfinite(corners).all(1)
    if is_truth:
        legal &= (corners[:, :2] <= corners[:, 2:]).all(1)
    legal |= nothing[starts]
    legal &= np.abs(time) < 1e9
    odd = (whole != label) | (whole < 0) | ~np.isfinite(score)
    bad = np.union1d(starts[~legal], np.flatnonzero(odd))
    if len(bad):
        row = bad[0]
        box = np.searchsorted(starts, row, "right") - 1
        order = ", x1 <= x2, y1 <= y2" if is_truth else ""
        raise ValueError(
            f"{name}: {len(bad)} bad rows, expected finite numbers, labels from 0{order}; first "
            f"row {row}: {video[box]},{time[box]},{corners[box].tolist()},{label[row]},{score[row]}"
        )

    moved = changes(video, time)
    number = []  # of each keyframe
    for keyframe in zip(video[moved].tolist(), time[moved].tolist(), strict=True):
        number.append(keyframe_number(keys, *keyframe))
    box_key = np.array(number, np.int32)[np.cumsum(moved) - 1]
    rows_of_box = np.diff(starts, append=len(label))
    box = np.repeat(np.arange(len(starts), dtype=np.int32), rows_of_box)
    table = Table(name, keys, box_key, corners, box, whole, score)
    return table.take(np.flatnonzero(~nothing)) if nothing.any() else table


def write_csv(path, rows: Rows) -> None:
    """Writes rows such that reading them gives the same float64 again (shortest exact decimals),
    times to the microsecond."""
    label = np.asarray(rows.label)
    partial = Path(f"{path}.partial")
    numbers = [np.asarray(rows.boxes, float).reshape(-1, 4).tolist(), label.tolist()]
    if rows.score is not None:
        numbers.append(np.asarray(rows.score, float).tolist())
    keyframes = zip(rows.video_id, np.asarray(rows.time_sec, float).tolist(), strict=True)
    with open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for (video, time), box, *others in zip(keyframes, *numbers, strict=True):
            keyframe = [video, f"{time:04.0f}" if time.is_integer() else f"{time:.6f}"]
            writer.writerow([*keyframe, *box, *others] if others[0] else keyframe)
    partial.replace(path)


def read_labelmap(path) -> dict[int, str]:
    """{id: name} of a label map in text-protobuf form, either spelling, any line breaks."""
    classes = {}
    quoted = "\"[^\"]*\"|'[^']*'"
    text = Path(path).read_text(encoding="utf-8-sig", errors="backslashreplace")
    text = re.sub(rf"({quoted})|#.*", lambda match: match[1] or "", text)  # a class commented out
    for item in re.findall(rf"\{{((?:[^{{}}\"']|{quoted})*)\}}", text):
        name = re.search(rf"\bname\s*:\s*({quoted})", item)
        label = re.search(r"\b(?:label_)?id\s*:\s*([1-9]\d{0,4})\b", re.sub(quoted, "", item))
        if not name or not label or int(label[1]) in classes:
            found = " ".join(item.split())
            raise ValueError(f"{path}: expected a name and a new id in 1..99999, found {found!r}")
        classes[int(label[1])] = name[1][1:-1]
    begun = len(re.findall(r"\b(?:item|label)\s*:?\s*\{", re.sub(quoted, "", text)))
    if not classes or len(classes) < begun:
        raise ValueError(
            f"{path}: {begun} items begin, {len(classes)} are whole; a label map reads "
            'item { name: "sit" id: 11 } item { name: "stand" id: 12 } ...'
        )
    return classes


# ---- Insight: groups of classes, what to know before believing the number ------------------------

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
AVA_CLASSES, AVA_TRAIN_COUNTS = {}, {}
for item in AVA.replace("\n", " ").split(" | "):
    label, count, name = item.split(maxsplit=2)
    AVA_CLASSES[int(label)] = name
    AVA_TRAIN_COUNTS[int(label)] = int(count)
AVA_KINDS = {"pose": (1, 14), "object": (15, 63), "person": (64, 80)}  # label_type of v2.2, by id


def groups_of(names: dict, counts: dict | None, thresholds: tuple) -> dict[str, list[int]]:
    """{group: places of its classes}: by annotated boxes in training, and for AVA by kind."""
    labels = sorted(names)
    groups = {}
    is_ava = 2 * sum(AVA_CLASSES.get(i) == names[i] for i in labels) > len(labels)
    if counts is None and is_ava:
        counts = AVA_TRAIN_COUNTS
    if counts:
        groups = {"head": [], "mid": [], "tail": []}
        head, tail = thresholds
        for c, label in enumerate(labels):
            count = counts.get(label, counts.get(str(label)))  # keys of JSON are strings
            if count is not None:
                group = "mid"
                if count > head:
                    group = "head"
                elif count < tail:
                    group = "tail"
                groups[group].append(c)
    if is_ava:
        for kind, (first, last) in AVA_KINDS.items():
            groups[kind] = [c for c, label in enumerate(labels) if first <= label <= last]
    return groups


def notes_on(truth: Table, det: Table, scored: Scored, names: dict, guessed: bool) -> list[str]:
    """What to know before believing the number, above all why it is 0. guessed: nobody said that
    the classes are AVA's."""
    frames = scored.counts["keyframes"]
    person = scored.counts["person"]
    notes = []
    if frames["matched"] <= 0.5 * max(frames["detected"], frames["ground_truth"]):
        notes.append(
            f"{frames['matched']} of {frames['detected']} detected keyframes occur in the ground "
            f"truth: first detected {first_keyframe(det)}, first in the ground truth "
            f"{first_keyframe(truth)}, which has {frames['ground_truth']}; persons without "
            "detections count as missed"
        )
    if frames["matched"] and person["recall"] < 0.1 and len(det.box):
        seen, true = det.corners[det.box], truth.corners[truth.box]
        notes.append(
            f"{person['recall']:.1%} of the persons are found: detected coordinates span "
            f"{seen.min():g} .. {seen.max():g}, those of the ground truth "
            f"{true.min():g} .. {true.max():g}"
        )
    missing = []
    for label, one in zip(sorted(names), scored.classes, strict=True):
        if not one.positives:
            missing.append(f"{label} {names[label]}")
    if missing:
        notes.append(
            f"{len(missing)} classes have no ground truth and are not in the mean: "
            + shortened(missing)
        )
    largest = max(truth.label.max(), det.label.max(initial=0))
    if guessed and (2 * len(missing) > len(names) or largest > 80):
        others = np.setdiff1d(truth.label, sorted(names)).tolist()
        left_out = f" (left out: {shortened(others)})" if others else ""
        notes.append(
            "no label map was given, so the labels were taken for AVA's: the ground truth has "
            f"{len(names) - len(missing)} of its {len(names)} classes{left_out}, the largest label "
            f"is {largest} (AVA's: 80); classes of one's own need their label map, -l"
        )
    return notes


def first_keyframe(table: Table) -> str:
    if not len(table.box_key):
        return "none"
    video, time = list(table.keys)[table.box_key[0]]
    return f"{video},{time / 1e6:.9g}"


def shortened(items: list) -> str:
    if not len(items):
        return "none"
    more = ", ..." if len(items) > 5 else ""
    return ", ".join(map(str, items[:5])) + more


# ---- Command line --------------------------------------------------------------------------------


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def report(result: dict) -> str:
    """The table for people: classes by AP, then the means with the counts they rest on."""
    protocol, person = result["protocol"], result["person"]
    lines = [f"{'AP':>6} {'recall':>7} {'boxes':>7} {'detections':>11}   class ({protocol})"]
    for one in sorted(result["per_class"], key=lambda one: 1 if one["ap"] is None else -one["ap"]):
        lines.append(
            f"{points(one['ap']):>6} {points(one['recall']):>7} {one['num_gt']:>7} "
            f"{one['num_det']:>11}   {one['id']} {one['name']}"
        )
    lines.append("")
    means = {f"mAP ({protocol})": result, **result["groups"]}
    for name, one in means.items():
        lines.append(f"{points(one['mAP']):>6} {name}, {one['classes']} classes")
    if "head" in result["groups"]:
        head, tail = result["thresholds"]
        lines.append(f"       (head: over {head} training boxes, tail: under {tail})")
    for name, value in result.get("parts", {}).items():
        lines.append(f"{points(value):>6} {name}")
    lines.append(
        f"{points(person['ap']):>6} boxes without their labels: {points(person['recall'])} % of "
        f"{person['num_gt']} persons found by {person['num_det']} boxes"
    )
    for what in ("keyframes", "rows", "ground_truth_rows"):
        counts = ", ".join(f"{count} {name}" for name, count in result[what].items())
        lines.append(f"{what}: {counts}".replace("_", " "))
    for name, value in result.get("compare", {}).items():
        lines.append(f"{value if isinstance(value, str) else points(value):>6} mAP ({name})")
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
    add("--thresholds", type=int, nargs=2, default=(10000, 1000), metavar=("HEAD", "TAIL"))
    add("--json", action="store_true", help="all figures, unrounded")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    try:
        result = evaluate(**args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(result, indent=1) if as_json else report(result), flush=True)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
