"""Tests of ava_eval.py."""

import csv
import gzip
import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import AVA_LABELS, SHARED, ava_file, ava_map, ava_random

import ava_eval


def test_ava_constants_of_the_official_code(tmp_path):
    """What the peers' own code prints for ava_random(1000): ActivityNet 82304fa, 3fee089, be7854e
    (these two with -e), SlowFast 287ec00, mmaction2 4d6c9347; Python 3.11, numpy 2.4.6, np.bool,
    np.float, np.NAN and implicit relative imports replaced."""
    truth, found, lines = ava_random(1000)
    upright = [row for row in found if row.split(",")[2] < row.split(",")[4]]  # mmaction2 raises
    for protocol, expected in {
        "official-2020": 0.20752895567578164,
        "official-2019": 0.11814472165677865,
        "official-2018": 0.11442797880428134,
        "slowfast": 0.05509125135513138,
        "mmaction2": 0.15309904675515537,
    }.items():
        result = ava_map(
            tmp_path,
            truth,
            upright if protocol == "mmaction2" else found,
            protocol,
            None if protocol == "official-2020" else lines,
        )
        assert result["mAP"] == pytest.approx(expected, abs=1e-12), protocol


def test_ava_boxes_without_area(tmp_path):
    """Those that end where they begin, in x or in y: dropped, to mmaction2 false positives."""
    truth = ["v,902,0,0,1,1,1", "v,903,0,0,1,1,1"]
    for odd in ("0.5,0,0.5,1", "0,0.5,1,0.5", "0.9,0,0.1,1", "0,0.9,1,0.1"):
        inverted = "0.9" in odd  # mmaction2's own code stops there
        found = ["v,902,0,0,1,1,1,.5", f"v,902,{odd},1,.9", "v,903,0,0,1,1,1,.4"]
        for protocol in ava_eval.PROTOCOLS:
            result = ava_map(tmp_path, truth, found, protocol)
            counts = protocol == "mmaction2" and not inverted
            assert result["mAP"] == pytest.approx(2 / 3 if counts else 1), protocol
            assert result["rows"]["dropped_invalid_box"] == 1 - counts
            assert result["person"] == {"ap": 1.0, "recall": 1.0, "num_gt": 2, "num_det": 2}


def test_ava_keeps_scores_apart_that_float32_does_not(tmp_path):
    """Two keyframes, the worse detection in front by 1e-9: mmaction2 takes both for equal, and
    ranks the later row first."""
    truth = ["v,902,0,0,1,1,1", "v,903,0,0,.1,.1,1"]
    found = ["v,902,.5,.5,1,1,1,0.500000001", "v,903,0,0,.1,.1,1,0.5"]
    assert ava_map(tmp_path, truth, found)["mAP"] == 0.25
    assert ava_map(tmp_path, truth, found, "mmaction2")["mAP"] == 0.5


def test_ava_more_classes_than_keyframes(tmp_path):
    """Each keyframe and class on its own, and every class right but one."""
    classes = {c: f"c{c}" for c in range(1, 9)}
    truth = [f"v,{902 + c % 2},0,0,1,1,{c}" for c in classes]
    found = [f"v,{902 + c % 2},0,0,1,1,{c},.5" for c in classes if c != 3]
    found += [f"v,{903 - c % 2},0,0,1,1,{c},.9" for c in classes if c != 3]
    paths = [ava_file(tmp_path / name, rows) for name, rows in (("g", truth), ("d", found))]
    result = ava_eval.evaluate(*paths, classes)
    assert [one["ap"] for one in result["per_class"]] == [0 if c == 3 else 0.5 for c in classes]


def test_ava_protocols_of_whole_seconds(tmp_path):
    row = "v,902,0,0,1,1,1"
    for protocol, rules in ava_eval.PROTOCOLS.items():
        for odd, found in (("v,902.5,0,0,1,1,1", "v,902.500000"), ("v,903", "a row of 2 columns")):
            for truth, detections in (([row, odd], [row]), ([row], [row, odd])):
                if protocol == "official-2020":
                    assert not rules.whole_seconds
                    assert ava_map(tmp_path, truth, detections, protocol)["mAP"] > 0
                    continue
                name = "g.csv" if odd in truth else "d.csv"
                with pytest.raises(ValueError, match=f"{name}: this protocol knows.*{found}"):
                    ava_map(tmp_path, truth, detections, protocol)


def test_ava_persons(tmp_path):
    """Each box once, whatever its labels, by its best score: four of five persons, one twice."""
    boxes = [f"{x / 10},0,{x / 10 + 0.08:.2f},1" for x in range(5)]
    truth = [f"v,{902 + i % 2},{box},{c}" for i, box in enumerate(boxes) for c in (1, 2)]
    found = []
    for i, best in enumerate((0.9, 0.5, 0.8, 0.7)):
        found += [f"v,{902 + i % 2},{boxes[i]},{c},{s}" for c, s in ((1, 0.1), (2, best))]
    near = boxes[0].replace("0.08", "0.075")
    found += [f"v,902,{near},1,0.05", f"v,902,{near},4,0.85"]  # of the first, who is taken
    assert ava_map(tmp_path, truth, found)["person"] == {
        "ap": pytest.approx((1 + 3 * 4 / 5) / 5),  # the second of the first person comes second
        "recall": 0.8,
        "num_gt": 5,
        "num_det": 5,
    }
    found[-1] = f"v,902,{near},4,0.6"  # now it comes fourth
    person = ava_map(tmp_path, truth, found)["person"]
    assert person["ap"] == pytest.approx((3 + 4 / 5) / 5)
    again = [f"v,902,{boxes[0]},1,0.01"]  # elsewhere in the file: one box all the same
    assert ava_map(tmp_path, truth, found + again)["person"] == person


@pytest.mark.parametrize(
    "found, expected",
    [  # official-2020, official-2019, slowfast, mmaction2
        (["v,902,0,0,.5,.5,1,.9", "v,902,0,0,.5,.5,2,.9"], (1, 1, 1, 1)),
        (["v,902,0,0,.5,.5,1,.9"], (0.5, 0.5, 0.5, 1)),  # a class never predicted
        (
            [f"{v},902,0,0,.5,.5,{c},{s}" for v, s in (("v", 0.5), ("w", 0.9)) for c in (1, 2)],
            (1, 0.5, 0.5, 1),
        ),  # a keyframe without truth
        (
            [f"v,902,.6,.6,.9,.9,{c},.9{i:02d}" for i in range(30) for c in (1, 2)]
            + ["v,902,0,0,.5,.5,1,.1", "v,902,0,0,.5,.5,2,.1"],
            (0, 0, 1 / 31, 1 / 31),
        ),  # the cap
        (
            [f"v,902,0,0,.5,.5,{c},{s}" for c in (1, 2) for s in (0.5, 0.9)],
            (1, 1, 0.5, 1),
        ),  # the sort
    ],
)
def test_ava_protocols_differ_where_they_should(tmp_path, found, expected):
    truth = ["v,902,0,0,.5,.5,1", "v,902,0,0,.5,.5,2"]
    assert [
        ava_map(tmp_path, truth, found, name)["mAP"]
        for name in ("official-2020", "official-2019", "slowfast", "mmaction2")
    ] == pytest.approx(expected)


def test_ava_empty_keyframes_and_exclusions(tmp_path):
    truth, empty = ["v,902,0,0,1,1,1"], ["v,903"]
    found = ["v,902.0000001,0,0,1,1,1,.5", "v,0903,0,0,1,1,1,.9", "v,903.5,0,0,1,1,1,.9"]
    assert ava_map(tmp_path, truth, found)["mAP"] == 1
    result = ava_map(tmp_path, truth + empty, found)  # 903 is known to be empty, 903.5 not known
    assert result["mAP"] == 0.5 and result["keyframes"] == {
        "ground_truth": 2,
        "detected": 3,
        "matched": 2,
        "ignored": 1,
        "excluded": 0,
    }
    with pytest.raises(ValueError, match="g.csv: this protocol knows only whole seconds"):
        ava_map(tmp_path, truth + empty, found[:2], "official-2019")
    found = ["v,902,0,0,1,1,1,.5", "v,0903,0,0,1,1,1,.9"]
    assert ava_map(tmp_path, truth, found, "official-2019")["mAP"] == 0.5
    result = ava_map(tmp_path, truth, found, None, empty)
    assert (result["mAP"], result["protocol"]) == (1, "official-2019")
    assert result["keyframes"]["excluded"] == 1
    with pytest.raises(ValueError, match="has no exclusions"):
        ava_map(tmp_path, truth, found, "official-2020", empty)


def test_ava_cap(tmp_path):
    """Follows the whitelist, counts invalid boxes, of equal scores keeps the largest tuples."""
    found = [f"v,902,0,0,1,1,{label},.{n:03d}" for n in range(60) for label in (1, 3)] + [
        "v,902,1,1,0,0,1,.99",
        "w,902,0,0,1,1,1,.5",
    ]
    assert ava_map(tmp_path, ["v,902,0,0,1,1,1"], found)["rows"] == {
        "read": 122,
        "without_box": 0,
        "dropped_by_whitelist": 60,
        "dropped_by_cap": 11,
        "on_ignored_or_excluded_keyframes": 1,
        "dropped_invalid_box": 1,
        "evaluated": 49,
    }
    rng = np.random.default_rng(0)
    truth = ava_eval.Rows(np.array(["v"]), [902], [[0, 0, 1, 1.0]], np.array([1]))
    for case in range(60):
        n = int(rng.integers(40, 200))
        ties = (8, 128, 512)[case % 3]  # all are equal to some, or hardly any
        score, label = rng.integers(1, ties, n) / ties, rng.permutation(n) % 100 + 1
        box = np.tile([0, 0, 1, 1.0], (n, 1))
        rows = ava_eval.Rows(np.full(n, "v"), np.full(n, 902), box, label, score)
        result = ava_eval.evaluate(truth, rows, {i: f"c{i}" for i in range(1, 101)})
        cut = np.sort(score)[::-1][:50][-1]
        first = np.flatnonzero(score >= cut)[:50]  # the reader's heap in closed form
        tied = np.sort(label[first[score[first] == cut]])[::-1][: 50 - np.sum(score > cut)]
        kept = np.bincount(np.append(label[score > cut], tied), minlength=101)[1:]
        assert [one["num_det"] for one in result["per_class"]] == kept.tolist()


def test_ava_cap_at_its_edge(tmp_path):
    """50 rows on a keyframe, one less, one more: all are kept but the worst of 51."""
    for n in (49, 50, 51):
        found = [f"v,902,0,0,1,1,1,.{i + 10}" for i in range(n)] + ["w,902,0,0,1,1,1,.5"]
        result = ava_map(tmp_path, ["v,902,0,0,1,1,1", "w,902,0,0,1,1,1"], found)
        assert result["rows"]["dropped_by_cap"] == max(0, n - 50)
        assert result["rows"]["evaluated"] == min(n, 50) + 1


@pytest.mark.parametrize("before", [0, 1, 3])
def test_ava_equal_overlaps_fall_to_the_higher_person_id(tmp_path, before):
    """As in the official script and in mmaction2, wherever in the files the keyframe stands. The
    first detection is as near to both boxes; the second finds one, and only if it is free."""
    rest = [f"u,{902 + i},0,0,1,1,1" for i in range(before)]
    for ids, ap in (((1, 2), 1), ((2, 1), 0.5)):
        truth = ["v,902,0,0,.01,.01,1,0"]  # far from both
        truth += [f"v,902,0,0,.75,1,1,{ids[0]}", f"v,902,.25,0,1,1,1,{ids[1]}"]
        found = ["v,902,.125,0,.875,1,1,.9", "v,902,0,0,.75,1,1,.8"]
        found += [f"{row},.95" for row in rest]
        for protocol in ("official-2020", "official-2019", "mmaction2"):
            result = ava_map(tmp_path, rest + truth, found, protocol)
            assert result["mAP"] == pytest.approx((before + 2 * ap) / (before + 3))


def test_ava_leaves_other_classes_out_and_counts_them(tmp_path):
    """A label map of fewer classes than the files hold, the poses say: rows of the others count
    neither as boxes nor as detections, though a keyframe that has only them was annotated."""
    truth = ["v,902,0,0,1,1,1", "v,902,0,0,1,1,59", "v,903,0,0,1,1,80", "v,904"]
    found = ["v,902,0,0,1,1,1,.5", "v,903,0,0,1,1,1,.9", "v,903,0,0,1,1,80,.8", "w,1,0,0,1,1,1,1"]
    result = ava_eval.evaluate(
        ava_file(tmp_path / "g.csv", truth), ava_file(tmp_path / "d.csv", found), {1: "bend"}
    )
    assert result["mAP"] == 0.5
    assert result["per_class"] == [
        {"id": 1, "name": "bend", "ap": 0.5, "num_gt": 1, "num_det": 2, "recall": 1.0}
    ]
    assert result["ground_truth_rows"] == {
        "read": 4,
        "without_box": 1,
        "dropped_by_whitelist": 2,
        "on_ignored_or_excluded_keyframes": 0,
        "evaluated": 1,
    }
    assert result["rows"] == {
        "read": 4,
        "without_box": 0,
        "dropped_by_whitelist": 1,
        "on_ignored_or_excluded_keyframes": 1,
        "dropped_by_cap": 0,
        "dropped_invalid_box": 0,
        "evaluated": 2,
    }
    map14 = ava_file(tmp_path / "pose", ['item { name: "bend" id: 1 }'])
    files = ["-g", str(tmp_path / "g.csv"), "-d", str(tmp_path / "d.csv"), "-l", map14]
    assert ava_eval.main(files) == 0
    with pytest.raises(ValueError, match=r"g.csv: no row with a class \(7\).*labels: 1, 59, 80"):
        ava_eval.evaluate(tmp_path / "g.csv", tmp_path / "d.csv", {7: "ride"})
    assert ava_eval.evaluate(tmp_path / "g.csv", tmp_path / "d.csv", {1: "bend"}) == result
    for names in ({}, {0: "x"}, {-1: "x", 2: "y"}):
        with pytest.raises(ValueError, match="classes, with numbers from 1"):
            ava_eval.evaluate(tmp_path / "g.csv", tmp_path / "d.csv", names)


def test_ava_says_when_it_took_the_classes_for_avas(tmp_path):
    def note(labels):
        path = ava_file(tmp_path / "g.csv", [f"v,902,0,0,1,1,{label}" for label in labels])
        notes = ava_eval.evaluate(path, path)["notes"]
        return "".join(note for note in notes if "label map" in note)

    assert "3 of its 60 classes (left out: 2), the largest label is 4" in note([1, 2, 3, 4])
    assert "own need their label map, -l" in note([*ava_eval.AVA_CLASSES, 81])
    assert note([*range(1, 81)]) == note(list(ava_eval.AVA_CLASSES)[:30]) == ""
    assert note(list(ava_eval.AVA_CLASSES)[:29])
    path = tmp_path / "g.csv"
    assert "label map" not in str(ava_eval.evaluate(path, path, {1: "a"})["notes"])


def test_ava_reads_runs_as_it_reads_rows(tmp_path):
    """A part of the file at once, or, since every field is quoted, row by row; to the last bit."""
    rng = random.Random(0)
    forms = ["{:.6f}", "{:.4f}", "{!r}", "{:.9g}", "{:.15f}", "{:.16f}", "{:.20f}"]
    texts = [rng.choice(forms).format(rng.random() ** rng.choice([1, 9])) for _ in range(4000)]
    texts += ["1", "0", "0.", ".5", "-0.25", "1e-5", "9.5", "12.5", "0.0000000000000001"]
    rows = [
        [
            "video_0",
            "0902",
            f"0.1{i // 70 % 10}",
            "0.2",
            "0.3",
            f"0.{4 + i // 90 % 5}",
            str(i % 80 + 1),
            text,
        ]
        for i, text in enumerate(texts)
    ]
    tables = []
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        with open(tmp_path / "d.csv", "w") as file:
            csv.writer(file, quoting=quoting, lineterminator="\n").writerows(rows)
        tables += ava_eval.load(tmp_path / "d.csv", "", keys := {})
        assert keys == {("video_0", 902 * 10**6): 0}
    fast, slow = tables
    assert len(fast.box_key) < 110 and len(slow.box_key) == len(rows)
    assert fast.score.tolist() == slow.score.tolist() == [float(text) for text in texts]
    assert fast.label.tolist() == slow.label.tolist() == [int(row[6]) for row in rows]
    boxes = [[*map(float, row[2:6])] for row in rows]
    assert (fast.corners[fast.box] == boxes).all() and (slow.corners[slow.box] == boxes).all()


AVA_GOOD = "v,902,0.1,0.2,0.3,0.4,1,0.5"


@pytest.mark.parametrize(
    "what, row, message",
    [
        ("d", "v,902,0.1,0.2,0.3,0.4,1,nan", "found nan, expected a finite"),
        ("d", f"{AVA_GOOD},7", "columns: 9"),
        ("d", "v,902,0.1,0.2,0.3,0.4,1,inf", "found inf, expected a finite"),
        ("d", "v,902,0.1,0.2", "columns: 4, expected 2, 7 or 8"),
        ("d", "v;902;0,1;0,2;0,3;0,4;1;0,5", "separated by commas"),
        ("d", "v\t902\t0.1\t0.2\t0.3\t0.4\t1\t0.5", "separated by commas"),
        ("d", "v,902,0.1,x,0.3,0.4,1,0.5", "'x'"),
        ("d", "v,902,0.1,0.2,0.3,0.4,0,0.5", "label 0"),
        ("d", "v,902,0,nan,1,1,1,0.5", "finite"),
        ("d", "v,902,0.1,0.2,0.3,0.4,x00000001,0.5", "'x00000001'"),
        ("d", "v,902,0.1,0.2,0.3,0.4,1.5,0.5", "label 1.5"),
        ("d", "v,902,0.1,0.2,0.3,0.4,-1,0.5", "label -1"),
        ("d", "v,902,0.1,0.2,0.3,0.4,nan,0.5", "label nan"),
        ("d", "v,902,0.1,0.2,0.3,0.4,2147483648,0.5", "label 2147483648"),
        ("d", "v,1e9,0.1,0.2,0.3,0.4,1,0.5", "time 1000000000.0"),
        ("d", "v,nan,0,0,1,1,1,0.5", "time nan"),
        ("g", "v,902,0.4,0.2,0.3,0.4,1,0", "x1 <= x2"),
        ("g", "v,902,0,0,1,1,80,3_", "'3_'"),
        ("first", "video_id,time,x1,y1,x2,y2,label,score", "header row"),
        ("first", "v,nan,0.1,0.2,0.3,0.4,1,0.5", "time nan"),
        ("first", '"Video_ID","Time","X1","Y1","X2","Y2","Label","Score"', "header row"),
        ("first", 'item { name: "sit" id: 11 }', "columns: 1"),
        ("first", "v;902;0,1;0,2;0,3;0,4;1;0,5", "separated by commas"),
    ],
)
def test_ava_names_bad_rows(tmp_path, capsys, what, row, message):
    rows = [row] + [AVA_GOOD] * 3 if what == "first" else [AVA_GOOD] * 3 + [row] * 7
    files = {
        name: ava_file(tmp_path / f"{name}.csv", rows if name == what else [AVA_GOOD])
        for name in "gd"
    }
    if what == "first":
        ava_file(tmp_path / "d.csv", rows)
    assert ava_eval.main(["-g", files["g"], "-d", files["d"]]) == 2
    where = f"{files['g' if what == 'g' else 'd']}:{1 if what == 'first' else 4}: "
    error = capsys.readouterr().err
    assert error.startswith(f"error: {where}") and message in error and repr(row) in error
    assert what == "first" or "and 2 more such rows" in error and error.count("\n") == 6
    if what != "first":
        ava_file(tmp_path / f"{what}.csv", rows[:8])  # five of them
        assert ava_eval.main(["-g", files["g"], "-d", files["d"]]) == 2
        assert "more such" not in capsys.readouterr().err
    assert what != "first" or error.count("\n") == 1  # one sentence
    assert ("header" in error) == ("video_id" in row.lower())  # the hint only where it is one


def test_ava_names_bad_arrays():
    good = ava_eval.Rows(np.array(["v"]), [902], [[0, 0, 1, 1.0]], np.array([1]), np.array([0.5]))
    assert ava_eval.evaluate(good, good)["mAP"] == 1
    for name, value in {
        "time_sec": [np.inf],
        "boxes": [[0, 0, np.nan, 1]],
        "label": np.array([1.5]),
        "score": np.array([np.inf]),
    }.items():
        bad = ava_eval.Rows(**vars(good) | {name: value})
        with pytest.raises(ValueError, match="detections: 1 bad rows.* row 0: v,"):
            ava_eval.evaluate(good, bad)
    for label in (-1, 2**31):
        bad = ava_eval.Rows(**vars(good) | {"label": np.array([label])})
        with pytest.raises(ValueError, match="detections: 1 bad rows"):
            ava_eval.evaluate(good, bad)
    for box in ([0.9, 0, 0.1, 1], [0, 0.9, 1, 0.1]):  # of a detector, that is only dropped
        bad = ava_eval.Rows(**vars(good) | {"boxes": [box]})
        assert ava_eval.evaluate(good, bad)["mAP"] == 0
        with pytest.raises(ValueError, match="ground truth: 1 bad rows.* x1 <= x2"):
            ava_eval.evaluate(bad, good)
    line = ava_eval.Rows(**vars(good) | {"boxes": [[0.5, 0, 0.5, 1]]})  # allowed, never found
    assert ava_eval.evaluate(line, good)["mAP"] == 0
    short = ava_eval.Rows(**vars(good) | {"label": np.array([1, 1])})
    with pytest.raises(ValueError, match="differ in length"):
        ava_eval.evaluate(good, short)
    half = np.array([902.1], np.float32)
    for other, message in (
        ({"video_id": np.array([1])}, r"video_id .*1.*, expected text"),
        ({"video_id": [b"v"]}, r"video_id .*b'v'.*, expected text"),
        ({"time_sec": half}, "time_sec .*, expected float64"),
    ):
        with pytest.raises(ValueError, match=f"detections: {message}"):
            ava_eval.evaluate(good, ava_eval.Rows(**vars(good) | other))
    for time in (902, 902.5):  # which float32 holds
        exact = ava_eval.Rows(**vars(good) | {"time_sec": np.array([time], np.float32)})
        assert ava_eval.evaluate(exact, exact)["mAP"] == 1


def test_ava_counts_lines_over_blocks(tmp_path):
    path = ava_file(tmp_path / "d.csv", [AVA_GOOD] * 50_000 + ["v,902,0.1,0.2,0.3,0.4,1,"])
    with pytest.raises(ValueError, match="d.csv:50001: "):
        ava_eval.evaluate(path, path)


def test_ava_files_in_other_clothes(tmp_path):
    truth, found, _ = ava_random(3)
    plain = ava_map(tmp_path, truth, found)
    quoted = "\n".join(f'"{row[:2]}"{row[2:]}' for row in found) + "\n"
    for name, text in (
        ("crlf.csv", "\r\n".join(found)),
        ("quoted.csv", quoted),
        ("mark.csv", "\ufeff" + "\n".join(found)),  # as spreadsheets begin UTF-8
        ("empty_rows.csv", "\n".join([*found, "", ",,,,,,,", "  ", ""])),
    ):
        (tmp_path / name).write_bytes(text.encode())
        assert ava_eval.evaluate(tmp_path / "g.csv", tmp_path / name, AVA_LABELS) == plain
    (tmp_path / "d.csv.gz").write_bytes(packed := gzip.compress("\n".join(found).encode()))
    assert ava_eval.evaluate(tmp_path / "g.csv", tmp_path / "d.csv.gz", AVA_LABELS) == plain
    (tmp_path / "cut.csv.gz").write_bytes(packed[:-20])
    (tmp_path / "plain.csv.gz").write_text("\n".join(found))
    for name in ("cut.csv.gz", "plain.csv.gz"):
        with pytest.raises(ValueError, match=f"{name}: "):
            ava_eval.evaluate(tmp_path / "g.csv", tmp_path / name, AVA_LABELS)
    for text in (
        'item {\n  name: "a"\n  id: 1\n}\nitem {\n  name: "b {"\n  id: 2\n}',
        'label { name: "a" label_id: 1 type: X } label { label_id: 2 name: "b {" }',
        "item {\r\n  id: 1\r\n  name: 'a'\r\n}\r\nitem: { name : 'b {' id : 2 }",
        '# don\'t\nitem { name: "a" id: 1 }  # {\n#item {\n# name: "c"\n# id: 3\n#}\n'
        'item { name: "b {" id: 2 }',
    ):
        assert ava_eval.read_labelmap(ava_file(tmp_path / "map", [text])) == {1: "a", 2: "b {"}
    text = 'item { name: "# id: 3" id: 1 }'
    assert ava_eval.read_labelmap(ava_file(tmp_path / "map", [text])) == {1: "# id: 3"}
    for text, message in (
        ("item { id: 1 }", "map: expected a name and a new id"),
        ('item { id: 1 name: "a" } item { id: 1 name: "b" }', "map: expected a name and a new id"),
        ('item { id: 0 name: "a" }', "map: expected a name and a new id"),
        ('{"1": "sit"}', "map: expected a name and a new id"),
        ("sit\nstand", 'a label map reads item { name: "sit" id: 11 }'),
        ('item { name: "a" id: 1\nitem { name: "b" id: 2 }', "2 items begin, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ava_eval.read_labelmap(ava_file(tmp_path / "map", [text]))


def test_ava_arrays_and_files_agree(tmp_path):
    rng, n = np.random.default_rng(0), 3000
    corner = rng.random((n, 2), np.float32) / 2
    rows = ava_eval.Rows(
        rng.choice(["a", "b-c", "d, e", 'f"g'], n),
        902 + rng.integers(0, 30, n) / 3,
        np.hstack((corner, corner + 0.3)),
        rng.choice([1, 11, 12], n),
        rng.random(n, np.float32),
    )
    truth = ava_eval.Rows(
        rows.video_id[:200],
        rows.time_sec[:200],
        rows.boxes[:200] + 0.01,
        np.where(np.arange(200) % 9, rows.label[:200], 0),
    )  # some are empty
    ava_eval.write_csv(tmp_path / "d.csv", rows)
    ava_eval.write_csv(tmp_path / "g.csv", truth)
    memory = ava_eval.evaluate(truth, rows)
    assert memory == ava_eval.evaluate(tmp_path / "g.csv", tmp_path / "d.csv") and memory["mAP"] > 0
    rows.score[7] = np.nan
    with pytest.raises(ValueError, match="detections: 1 bad rows.* row 7: "):
        ava_eval.evaluate(truth, rows)


def test_ava_kinetics_counts_and_parts(tmp_path):
    path = SHARED / "ava_kinetics" / "kinetics_val_v1.0.csv"
    if not path.exists():
        pytest.skip("needs shared/data/ava_kinetics/kinetics_val_v1.0.csv")
    (truth,) = ava_eval.load(path, "", {}, True)
    assert (len(truth.keys), len(truth.label)) == (31272, 65172)
    assert len(np.setdiff1d(np.arange(len(truth.box_key)), truth.box)) == 8673  # of 2 columns
    boxes = [line for line in path.read_text().splitlines() if line.count(",") > 2]
    other = ava_file(tmp_path / "ava.csv", ["zz,0902,0,0,1,1,12", "zz,0903,0,0,1,1,80"])
    found = ava_file(tmp_path / "d.csv", boxes + ["zz,902,0,0,1,1,12,0.3"])
    result = ava_eval.evaluate([path, other], found)
    counts = {one["id"]: one["num_gt"] for one in result["per_class"]}
    assert (sum(counts.values()), counts[30], counts[52]) == (64497 + 2, 0, 1)
    assert result["classes"] == 59 and result["rows"]["dropped_by_whitelist"] == 65172 - 64497
    assert result["parts"] == {str(path): 1.0, other: 0.5}  # the pooled mAP is not their mean:
    assert result["mAP"] == pytest.approx(1 - 1 / 3935 / 59)


def test_ava_pools_parts(tmp_path):
    """One mAP over all keyframes, and one for each part, paths or arrays; where the protocol counts
    detections elsewhere as false positives a part alone has no mAP."""
    truth, found, _ = ava_random(3)
    whole = ava_map(tmp_path, truth, found)
    assert "parts" not in whole
    aps = []
    for end, video in (("1", "v0"), ("2", ("v1", "v2"))):
        part = [row for row in truth if row.startswith(video)]
        aps.append(ava_map(tmp_path, part, found)["mAP"])
        ava_file(tmp_path / f"g{end}.csv", part)
    paths = [str(tmp_path / "g1.csv"), str(tmp_path / "g2.csv")]
    for protocol in ("official-2020", "official-2019"):
        single = ava_map(tmp_path, truth, found, protocol)
        pooled = ava_eval.evaluate(paths, tmp_path / "d.csv", AVA_LABELS, None, protocol)
        parts = pooled.pop("parts", {})
        assert pooled == single
        assert parts == (dict(zip(paths, aps, strict=True)) if protocol != "official-2019" else {})
    rows = []
    for path in paths:
        (table,) = ava_eval.load(path, "", {}, is_truth=True)
        keys = [list(table.keys)[key] for key in table.key()]
        video, time = np.array([key[0] for key in keys]), [key[1] / 1e6 for key in keys]
        rows.append(ava_eval.Rows(video, time, table.corners[table.box], table.label, table.score))
    pooled = ava_eval.evaluate(rows, tmp_path / "d.csv", AVA_LABELS)
    assert pooled["mAP"] == whole["mAP"]
    assert pooled["parts"] == {"ground truth 1": aps[0], "ground truth 2": aps[1]}


def test_ava_groups(tmp_path):
    path = ava_file(tmp_path / "g.csv", [f"v,902,0,0,1,1,{c}" for c in (12, 15, 13)])
    groups = ava_eval.evaluate(path, path)["groups"]
    assert {name: one["classes"] for name, one in groups.items()} == {
        "head": 1,
        "mid": 1,
        "tail": 1,
        "pose": 2,
        "object": 1,
        "person": 0,
    }
    path = ava_file(tmp_path / "g.csv", [f"v,902,0,0,1,1,{c}" for c in range(1, 81)])
    result = ava_eval.evaluate(path, path)
    assert [one["classes"] for one in result["groups"].values()] == [8, 23, 29, 13, 32, 15]
    assert result["thresholds"] == [10000, 1000]
    path = ava_file(tmp_path / "g.csv", [f"v,902,0,0,1,1,{c}" for c in (12, 15, 13)])
    everything = ava_eval.groups_of(ava_eval.AVA_CLASSES, None, (10000, 1000))
    assert [len(members) for members in everything.values()] == [8, 23, 29, 13, 32, 15]
    assert sum(ava_eval.AVA_TRAIN_COUNTS.values()) == 861254
    own = {i: f"demo {i}" for i in range(1, 21)}  # other actions: not AVA's counts, nor its kinds
    assert ava_eval.evaluate(path, path, own)["groups"] == {}
    for limits in ((30, 10), (49, 20), (30, 6)):
        result = ava_eval.evaluate(
            path, path, own, train_counts={"12": 50, "13": 5, "15": 20}, thresholds=limits
        )
        assert result["groups"] == {x: {"mAP": 1.0, "classes": 1} for x in ("head", "mid", "tail")}


def test_ava_says_why_it_is_zero(tmp_path):
    truth = ["v,902,0.1,0.1,0.9,0.9,1"]
    assert ava_map(tmp_path, truth, ["v.mp4,902,0.1,0.1,0.9,0.9,1,1"])["notes"][0] == (
        "0 of 1 detected keyframes occur in the ground truth: first detected v.mp4,902, first in "
        "the ground truth v,902, which has 1; persons without detections count as missed"
    )
    result = ava_map(tmp_path, truth, ["v,902,40,40,300,300,1,1"])
    assert result["person"]["recall"] == 0 and "span 40 .. 300" in result["notes"][0]
    wrong = ava_map(
        tmp_path,
        truth,
        [
            f"v,902,0.1,0.1,{x},2,{s}"
            for x, s in (("0.9,0.9", 0.1), ("0.9,0.9", 0.8), ("0.2,0.2", 0.5))
        ],
    )
    assert wrong["mAP"] == 0  # but the box is there
    assert wrong["person"] == {"ap": 1.0, "recall": 1.0, "num_gt": 1, "num_det": 2}
    with pytest.raises(ValueError, match=r"no row with a class \(1, 2, 4\) to evaluate, labels: 3"):
        ava_map(tmp_path, ["v,902,0,0,1,1,3"], [])
    assert ava_map(tmp_path, truth, [])["mAP"] == 0


def test_ava_an_empty_list_is_no_file():
    with pytest.raises(ValueError, match="ground truth: an empty list, expected one file at least"):
        ava_eval.evaluate([], "d.csv")


def test_ava_alone_in_an_empty_folder(tmp_path, capsys):
    shutil.copy(ava_eval.__file__, tmp_path)
    (tmp_path / "g.csv").write_text("v,903\nv,902,0,0,1,1,12")  # the last line may lack its end
    ava_file(tmp_path / "d.csv", ["v,902,0,0,1,1,12,0.5"])
    command = [sys.executable, "ava_eval.py", "-g", "g.csv", "-d", "d.csv", "--json", "--compare"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert result["protocol"] == "official-2020" and result["mAP"] == 1 and "parts" not in result
    assert result["per_class"][10] == {
        "id": 12,
        "name": "stand",
        "ap": 1.0,
        "num_gt": 1,
        "num_det": 1,
        "recall": 1.0,
    }
    assert list(result["compare"]) == list(ava_eval.PROTOCOLS)
    assert result["compare"]["official-2020"] == 1 and "2 columns" in result["compare"]["slowfast"]
    files = ["-g", str(tmp_path / "g.csv"), "-d", str(tmp_path / "d.csv")]
    for flags in ([], ["--compare"]):
        assert ava_eval.main(files + flags) == 0
        shown = capsys.readouterr().out
        assert "100.00 mAP (official-2020), 1 classes" in shown
        assert shown.count("100.00 mAP (official-2020)") == 1 + len(flags)
    assert ava_eval.main([*files, "-l", "missing.pbtxt"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
