"""versus: the AVA mAP of two files of detections, its differences, and what they are worth.

Intervals are those of a paired bootstrap over videos: both files are scored on the same draws.
"""

import argparse
import json

import numpy as np

import ava_eval

MIDDLE = (2.5, 97.5)  # percentiles: the middle 95 % of the draws


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Two files of detections against one ground truth: AP of each group of classes and each class, the
difference, and the middle 95 % of it over 1000 draws of the videos. Files as ava_eval.py reads."""
    add = parser.add_argument
    add("ours", help="a csv of detections")
    add("theirs", help="another one")
    add("-g", "--groundtruth", nargs="+", required=True, help="several are pooled (AVA-Kinetics)")
    add("-l", "--labelmap", help="default: the 60 classes of AVA v2.2")
    add("-e", "--exclusions", help="keyframes to leave out; implies official-2019")
    add("--protocol", choices=ava_eval.PROTOCOLS, help="default: official-2020")
    add("--json", action="store_true", help="all figures, unrounded")


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
    files = vars(options)
    as_json = files.pop("json")
    result = compare(**files)
    print(json.dumps(result, indent=1) if as_json else "\n".join(table(result)))


def compare(ours, theirs, groundtruth, labelmap=None, exclusions=None, protocol=None) -> dict:
    """What --json prints; the arguments are those of ava_eval.evaluate. ValueError as there, and
    for a file that detects nothing on any annotated keyframe."""
    protocol = ava_eval.protocol_of(protocol, exclusions)
    names = ava_eval.classes_of(labelmap)
    keys, excluded = {}, []
    truth = ava_eval.join(ava_eval.load(groundtruth, "ground truth", keys, is_truth=True))
    if exclusions is not None:
        excluded = ava_eval.load(exclusions, "exclusions", keys, widths=(2,))[0].box_key
    tables, scored = [], []
    for detections in (ours, theirs):
        tables += ava_eval.load(detections, "detections", keys)
    rules = ava_eval.PROTOCOLS[protocol]
    for det in tables:  # after all are read: masks of keyframes are as long as `keys`
        scored.append(ava_eval.score_tables(truth, det, sorted(names), rules, excluded))
    if not scored[0].counts["ground_truth_rows"]["evaluated"]:
        raise ValueError(f"{truth.name}: no box of any of the {len(names)} classes")
    notes = []
    for det, one in zip(tables, scored, strict=True):
        if not one.counts["keyframes"]["matched"]:  # else an AP of 0 that reads like a result
            raise ValueError(
                f"{det.name}: no keyframe of it is annotated in {truth.name}: its first is "
                f"{ava_eval.first_keyframe(det)}, the first annotated one "
                f"{ava_eval.first_keyframe(truth)}"
            )
        for note in ava_eval.notes_on(truth, det, one, names, labelmap is None):
            notes.append(f"{det.name}: {note}")
    groups = ava_eval.groups_of(names, None, (10000, 1000))
    found = differences(*scored, keys, names, groups)
    ours, theirs = (det.name for det in tables)
    about = {"protocol": protocol, "ours": ours, "theirs": theirs}
    return about | {"differences": found, "notes": notes}


def redraw(
    scored: ava_eval.Scored, keys: dict, replicates: int = 1000, seed: int = 0
) -> np.ndarray:
    """(C, replicates) AP when the videos are drawn again, with replacement: the same draws for the
    same keys. Up to 256 videos are drawn one by one, more (AVA-Kinetics) in 256 groups."""
    videos = {}
    unit_of = np.array([videos.setdefault(video, len(videos)) for video, _ in keys])
    units = min(len(videos), 256)
    unit_of %= units
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(units, np.full(units, 1 / units), replicates).T * 1.0
    ap = np.full((len(scored.classes), replicates), np.nan)
    for c, one in enumerate(scored.classes):
        if not np.isnan(one.ap):
            ap[c] = redraw_class(one, unit_of, drawn)
    return ap


def redraw_class(one: ava_eval.ClassScore, unit_of: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(replicates,) AP of a class. drawn: (units, replicates) how often a unit was drawn."""
    hits, units = np.flatnonzero(one.hit), len(drawn)  # (P,) the true positives
    unit = unit_of[one.key]
    next_hit = np.searchsorted(hits, np.arange(len(unit)))
    seen = np.zeros((len(hits) + 1, units))
    np.add.at(seen, (next_hit, unit), 1)
    seen = np.cumsum(seen[:-1], axis=0)  # (P, units) detections down to it
    boxes = np.bincount(unit_of[one.truth_key], minlength=units)
    ap = np.empty(drawn.shape[1])
    for k in range(0, len(ap), 100):  # a hundred at once: memory
        times = drawn[:, k : k + 100]
        true = times[unit[hits]]  # (P, 100)
        precision = np.cumsum(true, axis=0) / np.maximum(1, seen @ times)
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        with np.errstate(invalid="ignore"):  # 0 / 0: no box of the class drawn
            ap[k : k + 100] = (true * precision).sum(0) / (boxes @ times)
    return ap


def differences(
    one: ava_eval.Scored, other: ava_eval.Scored, keys: dict, names: dict, groups: dict
) -> dict:
    """{group of classes: difference of two runs' mean AP}, with the 95 % interval of a paired
    bootstrap over videos. Classes that one run leaves out of its mean are left out of both."""
    groups = {"all": range(len(names))} | groups
    for c, label in enumerate(sorted(names)):
        groups[f"{label} {names[label]}"] = [c]
    drawn, other_drawn = redraw(one, keys), redraw(other, keys)  # (C, replicates)
    result = {}
    for group, members in groups.items():
        members = [c for c in members if not np.isnan(one.ap[c] + other.ap[c])]
        if not members:
            continue
        difference = drawn[members] - other_drawn[members]
        counted = (~np.isnan(difference)).sum(0)  # a draw can lack a rare class
        counted = np.where(counted, counted, np.nan)
        interval = np.nanpercentile(np.nansum(difference, 0) / counted, MIDDLE).tolist()
        mean, other_mean = float(one.ap[members].mean()), float(other.ap[members].mean())
        result[group] = {
            "ap": mean,
            "other": other_mean,
            "difference": mean - other_mean,
            "interval": interval,
        }
    return result


def table(result: dict) -> list[str]:
    """Lines for people: the groups, then the classes, each by difference; what to know of them."""
    lines = [
        f"{result['ours']} against {result['theirs']} ({result['protocol']}), with the middle 95 % "
        "of 1000 draws of videos"
    ]
    found = result["differences"]
    names = sorted(found, key=lambda name: -found[name]["difference"])
    names.sort(key=lambda name: name[0].isdigit())
    for name in names:
        one = found[name]
        low, high = one["interval"]
        lines.append(
            f"{100 * one['ap']:6.2f} - {100 * one['other']:6.2f} = {100 * one['difference']:+6.2f}"
            f"  [{100 * low:+6.2f}, {100 * high:+6.2f}]  {name}"
        )
    return lines + [f"note: {note}" for note in result["notes"]]
