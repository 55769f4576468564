"""Tests of data.py."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ENVIRONMENT,
    HERE,
    data_batches,
    data_same,
    data_stream,
    data_tasks,
    open_written,
    run_python,
    write_lines,
    write_movie,
)

import ava_eval
import data
from extras import formats, recipe
from extras.workers import ahead

pytest_plugins = ["helpers"]  # its fixtures


def data_sample(dataset, index, seed=None):
    """An item as it is trained, or (None) evaluated."""
    if seed is None:
        return data.evaluation_sample(dataset.task, dataset.items[index])
    rng = np.random.default_rng([seed])
    return data.training_sample(dataset.task, dataset.items[index], rng)


# annotations ----------------------------------------------------------------------------------


def test_data_box_rows(tmp_path):
    path, report = tmp_path / "ava.csv", {}
    write_lines(
        path,
        "a-_b,0902,0.1,0.2,0.30,0.4,12,1",
        "a-_b,902,0.1,0.2,0.3,0.4,80,1",
        "a-_b,902.000000,0.1,0.2,0.3,0.4,7,2",
        "a-_b,0902,0.101,0.2,0.3,0.4,-1,3",
        "c,5.016949",
        "c,5.016949,0,0,1,1,3",
        "d,1",
        "d,2,0.5,0.1,0.5,0.2,1",
    )
    found = {
        key: [(p.box, p.labels) for p in people]
        for key, people in data.read_boxes(path, 80, False, report).items()
    }
    box = (0.1, 0.2, 0.3, 0.4)
    assert found == {
        ("a-_b", 902_000_000): [(box, {12, 80}), (box, {7}), ((0.101, *box[1:]), set())],
        ("c", 5_016_949): [((0, 0, 1, 1), {3})],
        ("d", 1_000_000): [],
        ("d", 2_000_000): [],
    }
    assert report == {"rows": 8, "empty boxes dropped": 1}
    for row, text in (
        ("a,1,0,0,1,1,3_,0", "'3_'"),
        ("a,1,0,0,1,1,81", "81 is not in 1..80"),
        ("a,1,0,0,nan,1,3", "'nan'"),
        ("a,1,0,0,1,1", "6 columns"),
        ("a,x,0,0,1,1,3", "'x'"),
        ("a,1,12,10,200,90,3", r"outside \[0, 1\]"),
        ("a,1,0,0,1,1,1.5", "1.5 is not"),
        ("a;1;0;0;1;1;3", "separated by commas"),
        ("a\t1\t0\t0\t1\t1\t3", "separated by commas"),
        ("a,1,0,0,1,1.2,3", r"outside \[0, 1\]"),
        ("a,1,-0.2,0,1,1,3", r"outside \[0, 1\]"),
        ("a,1,0,0,1,1,0", "0 is not in 1..80"),
        ("a,1,0,0,1,1,3,0,0", "9 columns instead of 2, 7 or 8"),
    ):
        write_lines(path, "a,1", "", row)
        with pytest.raises(ValueError, match=f"{path}:3: .*{text}") as error:
            data.read_boxes(path, 80, False, {})
        assert row in str(error.value)


def test_data_box_files_of_spreadsheets(tmp_path):
    """Quoted names and whole numbers with a point are read; a header is called one."""
    path = tmp_path / "a.csv"
    write_lines(path, '"a",1.0,0,0,1,1,12.0', '"b, c",902,0.1,0.1,1,1,80')
    found = data.read_boxes(path, 80, False, {})
    assert [(*key, *people[0].labels) for key, people in found.items()] == [
        ("a", 1_000_000, 12),
        ("b, c", 902_000_000, 80),
    ]
    write_lines(path, "video,second,x1,y1,x2,y2,action", "a,1,0,0,1,1,3")
    with pytest.raises(ValueError, match=r"a.csv:1: 'second' is not a number \(a header\?"):
        data.read_boxes(path, 80, False, {})
    path.write_bytes(b"a,1\n\0\0,2\n")
    with pytest.raises(ValueError, match="a.csv:2: no text"):
        data.read_boxes(path, 80, False, {})
    detected = write_lines(tmp_path / "d.csv", "a,1,0,0,1,1,,0.5", "a,1,0,0,1,1,7,0.75", "a,2")
    (person,), nobody = data.read_boxes(detected, 80, True, {}).values()
    assert nobody == []
    assert person == data.Person((0, 0, 1, 1), {7}, 0.75, annotated=False)
    for row, text in (
        ("a,1,0,0,1,1,3", "7 columns instead of 2 or 8"),
        ("a,1,0,0,1,1,,1.5", "1.5"),
    ):
        write_lines(path, row)
        with pytest.raises(ValueError, match=f"a.csv:1: .*{text}"):
            data.read_boxes(path, 80, True, {})


@pytest.mark.parametrize(
    "line, name, label",
    [
        ("a.mp4 3", "a.mp4", "3"),
        ("b c/d,e.MP4, pick up", "b c/d,e.MP4", "pick up"),
        ("a.mp4\twalk", "a.mp4", "walk"),
        ("air drumming\\x y.mp4 0", "air drumming/x y.mp4", "0"),
        ("run/x.avi", "run/x.avi", "run"),
        ("x.ts.mp4 walk", "x.ts.mp4", "walk"),
        ("run/0001 7", "run/0001", "7"),
        ("0001,walk", "0001", "walk"),
    ],
)
def test_data_rows_of_lists(line, name, label, tmp_path):
    (row,) = data.read_clips(write_lines(tmp_path / "l.txt", line).as_posix(), "train", "")
    assert (row.name, row.label) == (name, label) and row.where == f"{tmp_path}/l.txt:1"


@pytest.mark.parametrize("read", [data.read_clips, formats.read_clips])
@pytest.mark.parametrize(
    "line",
    [
        "v0.mp4 0 -1",
        "v0.mp4 50 0",
        "v0.mp4 1 3",
        "v0.mp4,1,3",
        "v0.mp4,50 0",
        "v0.mp4,0.0,1.2,walk",
        "v0.mp4, 0.0, 1.2, walk",
        "v0.mp4 walk 150",
        "v0.mp4 0.5 walk",
        "v0.mp4,walk,run",
        "v0.mp4;walk;run",
        "v0.mp4\twalk\t3",
        "v0.mp4,0,.1,.1,.5,.9",
        "v0.mp4 0,.1,.1,.5,.9",
        "v0 50 0",
        "v0,0.0,1.2,walk",
        '"v0.mp4","walk",3',
    ],
)
def test_data_lists_of_more_columns_are_refused(read, line, tmp_path):
    """Frame counts, seconds, several labels, boxes: never a class."""
    path = write_lines(tmp_path / "l.txt", "a.mp4 walk", line)
    with pytest.raises(ValueError) as error:
        list(read(str(path), "train", ""))
    assert f"{path}:2: expected `path label`" in str(error.value) and line in str(error.value)


@pytest.mark.parametrize(
    "line", ["a.mp4 3.0", "a.mp4;walk", "a.mp4", 'a.mp4 "gesture 12"', "a.mp4,jump 3 times", "a"]
)
def test_data_alone_refuses_what_it_could_misread(line, tmp_path):
    """What extras/formats.py understands, or nobody."""
    path = write_lines(tmp_path / "l.txt", "a.mp4 walk", line)
    with pytest.raises(ValueError, match="l.txt:2: expected `path label`, .*extras/formats.py"):
        list(data.read_clips(str(path), "train", ""))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("adult+male,0\nair drumming,1\n", {0: "adult+male", 1: "air drumming"}),
        ("1 Archery\n2 Biking\n", {1: "Archery", 2: "Biking"}),
        ("1  a b\n2, c\n", {1: "a b", 2: "c"}),
        ("b b\na 3\n", {0: "b b", 1: "a 3"}),
        ("10 pin bowling\nrun\nwalk\n", ":2:"),
        ("run\n0 walk\n", ":2:"),
        ("id,name\n0,abseiling\n1,air drumming\n", {0: "abseiling", 1: "air drumming"}),
        ("name\nrun\nwalk\n", {0: "run", 1: "walk"}),
        ("index,name,of\n0,abseiling\n", ":1:"),
        ("0: abseiling\n1: air drumming\n", ":1:"),
        ('0,"air drumming"\n', ":1:"),
        ("run\nstand, up\n", ":2:"),
        ("0.0,a\n", ":1:"),
        ('{"0": "run", "1": "walk"}', ":1:"),
    ],
)
def test_data_alone_reads_plain_class_lists(text, expected, tmp_path):
    """A line that is not like the others is never a class."""
    path = tmp_path / "l.txt"
    path.write_text(text)
    if isinstance(expected, dict):
        assert data.read_classes(path) == formats.read_classes(path) == expected
    else:
        with pytest.raises(ValueError, match=f"l.txt{expected} expected a name .*extras/formats"):
            data.read_classes(path)


def test_data_alone_finds_videos_by_path_or_stem(tmp_path):
    names = ["a.mp4", "run/b.mkv", "walk/b.mp4", "x/1.mov", "y/v.1.avi"]
    videos = data.Videos(tmp_path, names)
    for name, files in (
        ("a", ["a.mp4"]),
        ("a.webm", ["a.mp4"]),
        ("b", ["run/b.mkv", "walk/b.mp4"]),
        ("walk/b", ["walk/b.mp4"]),
        ("walk/b.mp4", ["walk/b.mp4"]),
        ("sit/b", []),
        ("v.1", ["y/v.1.avi"]),
        ("1", ["x/1.mov"]),
        ("z/x/1", []),
    ):
        assert videos.find(name) == files, name


def test_data_movies_and_kinetics_clips(tmp_path):
    """One task of both: movies with an offset; clips by the second they start, of several the one
    around the keyframe."""
    first, second = "-a_b-c_00001_000010_000020.mp4", "-a_b-c_00001_000016_000026.webm"
    write_lines(tmp_path / "labels.pbtxt", 'item { name: "x" id: 2 }')
    rows = [
        "movie,0902,0,0,1,1,2",
        *(f"-a_b-c_00001,{time},0,0,1,1,2" for time in ("10.5", "17.010000", "18.7", "25")),
    ]
    options = dict(labels="labels.pbtxt", touch=f"movie.mkv; val/x/{first}; y/{second}")
    dataset = open_written(tmp_path, "box", rows, offset_sec=900.0, **options)
    found = {item.key: (Path(item.path).name, round(item.time_sec, 6)) for item in dataset.items}
    assert found == {
        ("movie", 902_000_000): ("movie.mkv", 2.0),
        ("-a_b-c_00001", 10_500_000): (first, 0.5),
        ("-a_b-c_00001", 17_010_000): (first, 7.01),
        ("-a_b-c_00001", 18_700_000): (second, 2.7),
        ("-a_b-c_00001", 25_000_000): (second, 9.0),
    }
    assert dataset.classes == ["class 1", "x"] and dataset.class_counts() == {1: 0, 2: 5}
    more = [*rows, "gone,3,0,0,1,1,2"]
    message = "1 of 4 videos.*bad_share = 0.05; the first is gone, wanted by .* at 3 s"
    with pytest.raises(FileNotFoundError, match=message):
        open_written(tmp_path, "box", more, **options)
    found = open_written(tmp_path, "box", more, bad_share=0.5, **options)
    assert found.missing.keys() == {"gone"}
    with pytest.raises(ValueError, match="several videos are movie"):
        open_written(tmp_path, "box", rows, labels="labels.pbtxt", touch="cuts/movie.mp4")
    write_lines(tmp_path / "huge.pbtxt", 'item { name: "x" id: 32768 }')
    for kind, lines, message in (
        ("box", rows, "huge.pbtxt: ids 32768 to 32768, expected 1..32767"),
        ("clip", ["a.mp4 99", "b.mp4 20261126"], "class number 20261126"),
    ):
        with pytest.raises(ValueError, match=message):
            open_written(tmp_path, kind, lines, labels="huge.pbtxt" * (kind == "box"))


def test_data_keyframes_are_those_of_the_evaluator(tmp_path):
    """Of times with a seventh decimal, too, where a microsecond is a matter of rounding."""
    seconds = [f"{second}.{decimals:06}5" for second in range(40) for decimals in (39585, 403958)]
    rows = [f"a,{second},0,0,1,1,1" for second in seconds]
    path = write_lines(tmp_path / "val.csv", *rows)
    keys = {}
    ava_eval.load(path, "val.csv", keys, is_truth=True)
    assert list(data.read_boxes(path, 1)) == list(keys) and len(keys) == 80


def test_data_the_first_line_that_wants_a_missing_video_is_named(tmp_path):
    lines = ["gone.mp4 0", "1.mp4 0", "gone.mp4 1"]
    with pytest.raises(FileNotFoundError, match=r"gone.mp4, wanted by \S+:1\b"):
        open_written(tmp_path, "clip", lines, touch="1.mp4")


def test_data_detections(tmp_path):
    write_lines(tmp_path / "labels.pbtxt", 'item { name: "x" id: 2 }')
    write_lines(tmp_path / "skip.csv", "a,0004")
    write_lines(
        tmp_path / "det.csv",
        "a,0001,0,0,0.49,1,,0.95",
        "a,0001,0.2,0,0.9,1,,0.93",
        "a,0001,0,0,1,1,,0.5",
        "a,0006,0,0,1,1,,0.8",
        "a,0006,0,0,1,0.5,,0.99",
        "a,0002,0,0,1,0.9,,0.3",
        "a,0002,0,0,1,0.8,,0.2",
        "a,0003,0,0,1,0.7,,0.99",
        "a,0004,0,0,1,1,,0.99",
        "a,0005,0,0,1,1,2,0.9",
        "other,0001,0,0,1,1,,0.99",
    )
    true = ["a,1,0,0,0.5,1,1,0", "a,1,0.5,0,1,1,2,1", "a,2,0,0,1,1,1,0", "a,3", "a,4,0,0,1,1,2,0"]

    def read(split, **options):
        """{second: [(*box, score, *labels), ...]}"""
        options |= dict(labels="labels.pbtxt", exclude_train="skip.csv", exclude_val="skip.csv")
        dataset = open_written(tmp_path, "box", true, split, touch="a.mp4", **options)
        return {
            item.key[1] // 10**6: [
                (*box.tolist(), round(float(score), 2), *(np.flatnonzero(row) + 1).tolist())
                for box, score, row in zip(item.boxes, item.scores, item.labels, strict=True)
            ]
            for item in dataset.items
        }

    assert read("val", val_boxes="det.csv") == {
        1: [(0, 0, 0.49, 1, 0.95), (0.2, 0, 0.9, 1, 0.93)],
        2: [(0, 0, 1, 0.9, 0.3)],  # keep-best
        3: [(0, 0, 1, 0.7, 0.99)],
        5: [(0, 0, 1, 1, 0.9)],
        6: [(0, 0, 1, 1, 0.8), (0, 0, 1, 0.5, 0.99)],
    }
    assert read("val").keys() == {1, 2}
    assert read("train", train_boxes="det.csv", transfer_iou=0.9) == {
        1: [(0, 0, 0.5, 1, 1, 1), (0.5, 0, 1, 1, 1, 2), (0, 0, 0.49, 1, 0.95, 1)],
        2: [(0, 0, 1, 1, 1, 1)],
    }
    options = dict(labels="labels.pbtxt", touch="a.mp4")
    for more in ({}, dict(train_boxes="det.csv", transfer_iou=0.9), dict(train_boxes="det.csv")):
        dataset = open_written(tmp_path, "box", true, "train", **options | more)
        assert dataset.class_counts() == {1: 2, 2: 2}  # of annotated boxes, with any detections
    found = read("train", train_boxes="det.csv")
    assert found[3] == [(0, 0, 1, 0.7, 0.99)] and found[5] == [(0, 0, 1, 1, 0.9, 2)]
    assert len(found[1]) == 4


@pytest.mark.parametrize("labels", ["", "names.txt"])
def test_data_one_class_is_no_task(tmp_path, labels):
    """Its accuracy would be 1.0 from the first step on."""
    write_lines(tmp_path / "names.txt", "x")
    file = labels or "annotations.csv"
    with pytest.raises(ValueError, match=f"{file}: 1 class, expected two at least"):
        open_written(tmp_path, "clip", ["a.mp4 x", "b.mp4 x"], touch="a.mp4; b.mp4", labels=labels)


def test_data_annotations_are_no_detections(tmp_path):
    """Ids of persons would become scores; real scores beside labels are detections."""
    rows = ["a,1,0,0,0.5,1,,1", "a,1,0,0,0.5,1,1,0", "a,1,0.5,0,1,1,2,1"]
    path = write_lines(tmp_path / "val.csv", *rows)
    with pytest.raises(ValueError, match=r"val.csv:2: an annotation .* expected a detection"):
        data.read_boxes(path, 2, scored=True)
    assert len(data.read_boxes(path, 2)) == 1
    for fine in (rows[:1], [rows[1], "a,1,0,0,0.5,1,2,0.25"], ["a,1,0,0,0.5,1,1,1.0"]):
        assert data.read_boxes(write_lines(path, *fine), 2, scored=True)


@pytest.mark.parametrize(
    "kind, changes, problem",
    [
        ("clip", dict(train=""), "neither `train` nor `val`"),
        ("clip", dict(train="", val="x"), ""),
        ("box", dict(labels=""), "needs `labels`"),
        ("box", dict(mixup=0.1), "mixup is for clip tasks"),
        ("clip", dict(mixup=0.1), ""),
        ("clip", dict(prior=0.1), "prior is for box tasks"),
        ("box", dict(prior=0.1), ""),
        ("clip", dict(val_boxes="x"), "detections are for box tasks"),
        ("clip", dict(train_boxes="x"), "detections are for box tasks"),
        ("box", dict(transfer_iou=0.9), "transfer_iou needs `train_boxes`"),
        ("box", dict(transfer_iou=0.9, train_boxes="x"), ""),
        ("clip", dict(short_side=[320, 256]), "the smaller first"),
        ("clip", dict(short_side=[256]), "is not two numbers"),
        ("clip", dict(short_side=[223, 320]), "less than the crop, size = 224"),
        ("clip", dict(short_side=[224, 224]), ""),
        ("clip", dict(views=[4, 2]), "1 or 3 crops"),
        ("clip", dict(views=[4]), "1 or 3 crops"),
        ("clip", dict(views=[4, 3]), ""),
        ("clip", dict(views=[4, 3], val_fit="full"), '3 crops are for val_fit = "crop"'),
        ("box", dict(views=[2, 1]), "for clip tasks"),
        ("box", dict(flip_swap=[[1, 2, 3]]), "pairs of labels"),
        ("box", dict(flip_swap=[1]), "pairs of labels"),
    ],
)
def test_data_rules_between_settings(kind, changes, problem):
    task = data.Task("a", kind, **dict(train="x", labels="y") | changes)
    problems = data.task_problems(task)
    assert len(problems) == bool(problem) and problem in "".join(problems)
    assert task.val_fit == changes.get("val_fit", {"clip": "crop", "box": "full"}[kind])
    assert data.Task("a", kind, stride=3, fps=30).step_sec == 0.1


def test_data_tasks_report_everything_at_once(tmp_path):
    clip = {"name": "c", "kind": "clip", "train": "x"}
    wrong = {"name": "b", "kind": "box", "train": "x", "mixup": 0.2, "short_side": [100, 320]}
    tables = [
        {"name": "a", "kind": "box", "framse": 3, "size": "big"},
        {"kind": "clip", "train": "x"},
        clip,
        clip,
        wrong,
        clip | {"flip": 2.0},
    ]
    tasks, problems = recipe.make_tasks(tables)
    for text in (
        "task 'a'",
        "'framse', did you mean 'frames'?",
        'size = "big"',
        "task 2: `name` is missing",
        "needs `labels`",
        "mixup is for",
        "flip = 2.0",
        "[100, 320] is less than",
        "task 'c': a second",
    ):
        assert text in "\n".join(problems)


# transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["crop", "full"])
def test_data_boxes_stay_on_their_object(fit, tmp_path):
    """Two painted rectangles, read, cropped, flipped: every box still frames its own, and all of
    it that is visible."""

    def picture(number, width, height):
        image = np.full((height, width, 3), 40, np.uint8)
        image[20:70, 16:48], image[50:90, 130:150] = (230, 30, 30), (30, 30, 230)
        return image

    write_movie(tmp_path / "v/v.mp4", 30, size=(192, 108), picture=picture, crf=4)
    write_lines(tmp_path / "labels.pbtxt", 'item { name: "red" id: 1 } item { name: "blue" id: 2 }')
    rows = [
        f"v,0.5,{x1 / 192},{y1 / 108},{x2 / 192},{y2 / 108},{label}"
        for x1, y1, x2, y2, label in ((16, 20, 48, 70, 1), (130, 50, 150, 90, 2))
    ]
    dataset = open_written(
        tmp_path,
        "box",
        rows,
        frames=2,
        stride=1,
        size=96,
        short_side=[108, 160],
        flip=0.5,
        labels="labels.pbtxt",
        val_fit="full",
    )
    alone = 0
    for seed in range(30):
        sample = data_sample(dataset, 0, None if fit == "full" else seed)
        image = sample.video[0, 1].astype(int)
        height, width = image.shape[:2]
        alone += len(sample.boxes) == 1
        assert len(sample.boxes) >= 1 and sample.boxes.min() >= 0 and sample.boxes.max() <= 1
        for box, labels, kept in zip(sample.boxes, sample.labels, sample.kept, strict=True):
            own, other = (0, 2) if labels[0] else (2, 0)
            y, x = np.nonzero(image[..., own] - image[..., other] > 80)
            seen = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            seen = seen / [width, height, width, height]
            assert np.abs(seen - box).max() < 3.1 / 96 and labels[kept], seed
    assert (alone > 3) == (fit == "crop")


def test_data_crops():
    video, rng = np.zeros((1, 2, 100, 200, 3), np.uint8), np.random.default_rng(0)
    boxes = np.array([[0.0, 0.0, 0.1, 0.2], [0.2, 0.0, 0.6, 1.0]])
    _, inside, share = data.crop(video, boxes, 0, 90, 60)
    assert np.allclose(inside[1], [0, 0, 0.5, 1]) and np.allclose(share, [0, 30 / 60])
    for corner in ([0.97, 0.9, 1.0, 1.0], [0.0, 0.0, 0.03, 0.1]):
        for _ in range(50):  # 30 in 141 * 41 blind crops would see it
            square, inside, visible = data.random_crop(rng, video, np.array([corner]), 60)
            assert square.shape == (1, 2, 60, 60, 3) and visible.tolist() == [0]


def test_data_last_crop_is_centred_on_a_box(monkeypatch):
    """Where blind crops see nothing: the box in the middle, or the crop at the frame's edge."""
    monkeypatch.setattr(data, "CROP_DRAWS", 0)
    rows, columns = np.mgrid[:100, :200].astype(np.uint8)
    video = np.stack([rows, columns, columns], -1)[None]  # (T, H, W, 3), a pixel says where it is
    for box, top, left in (
        ([0.45, 0.4, 0.55, 0.6], 20, 70),
        ([0.3, 0.4, 0.5, 0.8], 30, 50),
        ([0.0, 0.0, 0.1, 0.1], 0, 0),
        ([0.9, 0.9, 1.0, 1.0], 40, 140),
    ):
        square, inside, visible = data.random_crop(
            np.random.default_rng(0), video, np.array([box]), 60
        )
        assert square[0, 0, 0].tolist() == [top, left, left] and visible.tolist() == [0]
        x1, y1, x2, y2 = np.array(box) * [200, 100, 200, 100]
        expected = np.array([x1 - left, y1 - top, x2 - left, y2 - top]) / 60
        assert np.allclose(inside[0], expected)


def test_data_more_crops():
    video, rng = np.zeros((1, 2, 100, 200, 3), np.uint8), np.random.default_rng(0)
    boxes = np.array([[0.0, 0.0, 0.1, 0.2], [0.2, 0.0, 0.6, 1.0]])
    assert data.random_crop(rng, video, np.zeros((0, 4)), 60)[0].shape == (1, 2, 60, 60, 3)
    for height, width, box in ((60, 300, [0, 0, 1, 1]), (300, 60, [0, 0, 1, 1])):
        broad = np.zeros((1, 2, height, width, 3), np.uint8)  # 5 : 1, a person over all of it
        for _ in range(50):
            _, inside, visible = data.random_crop(rng, broad, np.array([box], float), 56)
            assert visible.tolist() == [0] and np.array_equal(inside, [[0, 0, 1, 1]])
    wide = np.arange(200, dtype=np.uint8)[:, None] + np.zeros((1, 2, 100, 1, 3), np.uint8)
    for video, count, lefts in (
        (wide, 3, [0, 50, 100]),
        (wide, 1, [50]),
        (wide.transpose(0, 1, 3, 2, 4), 3, [0, 50, 100]),
    ):
        squares, _ = data.fixed_crops(video, boxes, 100, count)
        assert [int(square[0, 0, 0, 0]) for square in squares] == lefts


def test_data_overlap_of_boxes():
    for a, b, expected in (
        ([0, 0, 4, 2], [2, 1, 6, 5], 2 / (8 + 16 - 2)),
        ([0, 0, 4, 2], [0, 0, 4, 2], 1),
        ([0, 0, 1, 1], [2, 0, 3, 1], 0),
        ([0, 0, 1, 1], [0.5, 1.25, 3, 2], 0),
        ([1, 1, 2, 5], [1, 2, 2, 4], 2 / 4),
    ):
        assert data.iou(a, b) == data.iou(b, a) == pytest.approx(expected)


def test_data_times_of_clips(monkeypatch):
    """Where in a video or a stretch of it the frames of a clip lie: the rule, restated."""
    asked = []

    def decode(path, times_sec, short_side, multiple=1):
        asked.append(times_sec(10.0) if callable(times_sec) else times_sec)
        return np.zeros((len(asked[-1]), 40, 40, 3), np.uint8)

    monkeypatch.setattr(data, "decode_clip", decode)
    nobody = np.zeros((0, 4)), np.zeros((0, 1), bool), np.zeros(0, np.float32)
    sizes = dict(frames=4, stride=5, fps=10.0, size=40, short_side=[40, 40], flip=0.0)
    clips = data.Task("t", "clip", train="x", views=[3, 1], **sizes)  # of 2 sec
    steps = np.array([0.0, 0.5, 1.0, 1.5])
    for (begin, end), starts in (
        ((np.nan, np.nan), [0.0, 4.0, 8.0]),
        ((2.0, 7.0), [2.0, 3.5, 5.0]),
        ((2.0, 3.0), [1.5, 1.5, 1.5]),  # too short: in the middle of a clip
        ((0.2, 1.0), [0.0, 0.0, 0.0]),
    ):
        item = data.Item(("a", 0), "a", begin, 0, *nobody, end)
        data.evaluation_sample(clips, item)
        assert np.allclose(asked[-1].reshape(3, 4), np.array(starts)[:, None] + steps)
        data.evaluation_sample(replace(clips, views=[1, 1]), item)
        assert np.allclose(asked[-1], starts[1] + steps)
        for seed in range(5):
            data.training_sample(clips, item, np.random.default_rng(seed))
            place = np.random.default_rng(seed).random()
            assert np.allclose(asked[-1], starts[0] + place * (starts[2] - starts[0]) + steps)
    boxes = data.Task("t", "box", train="x", labels="y", **sizes)
    item = data.Item(("a", 0), "a", 7.0, -1, *nobody)
    for _ in (data.evaluation_sample(boxes, item), data.training_sample(boxes, item, rng_of(0))):
        assert np.allclose(asked.pop(), [6.0, 6.5, 7.0, 7.5])  # frame T/2 is the keyframe


def rng_of(seed):
    return np.random.default_rng(seed)


def test_data_flip_swaps_labels(data_folder, tmp_path):
    options = dict(flip_swap=[[1, 2]], size=40, short_side=[60, 60])
    still, turned = (data_stream(data_folder, flip=f, **options).datasets for f in (0.0, 1.0))
    for index in range(3):
        a, b = (data_sample(d["clips"], index, index) for d in (still, turned))
        assert np.array_equal(a.video[..., ::-1, :], b.video)
        assert (a.label, b.label) in ((0, 0), (1, 2), (2, 1))
        a, b = (data_sample(d["persons"], index, index) for d in (still, turned))
        assert np.array_equal(a.labels[:, [1, 0, 2, 3]], b.labels)
        mirrored = 1 - a.boxes[:, [2, 1, 0, 3]] * [1, -1, 1, -1] - [0, 1, 0, 1]
        assert np.allclose(b.boxes, mirrored)
    lines = ["1.mp4,Pushing from left to right", "2.mp4,Pushing from right to left"]
    clips = dict(root=tmp_path, kind="clip", lines=lines, flip=0.5, touch="1.mp4; 2.mp4")
    assert len(open_written(**clips, flip_swap=[[1, 0]])) == 2
    write_lines(
        tmp_path / "labels.pbtxt", 'item { name: "go left" id: 1 } item { name: "go right" id: 2 }'
    )
    boxes = clips | dict(kind="box", lines=["1,0,0,0,1,1,2"], labels="labels.pbtxt")
    named = [line.title() for line in lines]
    lone = ["1.mp4,turn left", "2.mp4,walk"]
    for options, message in (
        (clips | dict(lines=named), r"flip = 0.5 .*flip_swap = \[\[0, 1\]\]"),
        (clips, r"flip = 0.5 .*flip_swap = \[\[0, 1\]\]"),
        (boxes, r"flip_swap = \[\[1, 2\]\]"),
        (clips | dict(flip_swap=[[1, 0], [1, 2]]), r"\[1, 2\], but the labels are 0..1"),
        (
            clips | dict(lines=lone),
            r"mirrors 'turn left', of which no .*flip_swap = \[\[0, 0\]\] if",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            open_written(**options)
    assert len(open_written(**clips | dict(lines=lone), flip_swap=[[0, 0]])) == 2
    assert len(open_written(**clips | dict(lines=["1.mp4,upright", "2.mp4,a bright room"]))) == 2


def test_data_colour_and_normalise():
    rng = np.random.default_rng(0)
    video = rng.integers(60, 120, (1, 3, 16, 16, 3), dtype=np.uint8)
    video[0, 2] = video[0, 0]
    assert np.array_equal(data.jitter_colour(rng, video, 0.0), video)
    changed = data.jitter_colour(rng, video, 0.4)
    assert np.array_equal(changed[0, 0], changed[0, 2])
    assert np.abs(changed.astype(int) - video).mean() > 3
    bright, contrast, saturation = np.random.default_rng(7).uniform(0.6, 1.4, 3)
    pixels = video.astype(float)
    luma = pixels @ [0.299, 0.587, 0.114]
    expected = saturation * pixels + (1 - saturation) * luma[..., None]
    expected = contrast * expected + (1 - contrast) * luma[:, ::4, ::8, ::8].mean()
    expected = (bright * expected).clip(0, 255)
    jittered = data.jitter_colour(np.random.default_rng(7), video, 0.4)
    assert np.abs(jittered - expected).max() < 0.51
    grey = np.repeat(video[..., :1], 3, -1)
    assert np.ptp(data.jitter_colour(rng, grey, 0.5), axis=-1).max() == 0
    batch = torch.from_numpy(video).repeat(2, 1, 1, 1, 1)
    out = data.normalise(batch, [0.5, 0.4, 0.3], [0.25, 0.5, 1.0])
    assert out.shape == (2, 3, 3, 16, 16) and out.is_contiguous()
    torch.testing.assert_close(out[1, 1, 2], (batch[1, 2, :, :, 1] / 255 - 0.4) / 0.5)
    out = data.normalise(batch, [], [])
    assert out.mean((2, 3, 4)).abs().max() < 1e-5 and abs(float(out[0].std()) - 1) < 1e-3


# the stream -----------------------------------------------------------------------------------


def test_data_draws_follow_from_the_name_of_a_task(data_folder):
    """Beside whatever other tasks, in whatever order, a task's clips and crops are the same."""
    clips, persons = data_tasks(colour=0.3)
    other = replace(clips, name="other")

    def batches(*tasks):
        datasets = {task.name: data.open_task(task, data_folder) for task in tasks}
        found = data_batches(data.Stream(datasets, seed=5, steps=9), 0, 9)
        return {task.name: [b for b in found if b.task == task.name] for task in tasks}

    alone, two, three = batches(persons), batches(clips, persons), batches(persons, other, clips)
    for found in (two, three):
        count = len(found["persons"])
        assert count >= 3 and data_same(found["persons"], alone["persons"][:count])
    assert data_same(two["clips"][:3], three["clips"])
    assert [b.keys for b in three["other"]] != [b.keys for b in three["clips"]]


def test_data_streams_of_random_numbers_do_not_coincide():
    draws = [
        data.random_numbers(*words).integers(2**60)
        for words in (
            (0, "schedule"),
            (0, "order", "a", 0),
            (0, "order", "a", 1),
            (0, "order", "b", 0),
            (0, "augmentation", "a", 0),
            (0, "augmentation", "a", 1),
            (1, "augmentation", "a", 0),
            (0,),
        )
    ]
    assert len(set(draws)) == len(draws)
    assert data.random_numbers(0, "order", "a", 1).integers(2**60) == draws[2]


def test_data_weights_of_a_schedule(data_folder):
    """Exact shares, by largest remainders; nothing to share is refused."""
    clips, persons = (data.open_task(task, data_folder) for task in data_tasks())
    for weights, steps, expected in (
        ((1, 2), 9, 3),
        ((1, 2), 10, 3),
        ((1, 2), 11, 4),
        ((0, 1), 7, 0),
        ((0.5, 0.5), 3, 2),
    ):
        for dataset, weight in zip((clips, persons), weights, strict=True):
            dataset.task = replace(dataset.task, weight=weight)
        stream = data.Stream({"a": clips, "b": persons}, "weighted", 0, steps)
        assert sum(stream.tasks_at(step) == ["a"] for step in range(steps)) == expected
    persons.task = clips.task = replace(clips.task, weight=0.0)
    with pytest.raises(ValueError, match="all weights are 0"):
        data.Stream({"a": clips, "b": persons}, "weighted", 0, 9)
    with pytest.raises(ValueError, match="'other' is not one of"):
        data.Stream({"a": clips}, "other")


def test_a_label_is_a_name_or_a_number_and_never_two_classes(tmp_path):
    rows = ["a.mp4 1", "b.mp4 two"]
    options = dict(touch="a.mp4; b.mp4", labels="classes.txt")
    for classes, message in (
        (["1 one", "2 two"], None),
        (["1 1", "2 two"], None),  # a class that is called what it is numbered
        (["1 two", "2 1"], r"annotations.csv:1: 1 is the name of one .* number of another, two;"),
    ):
        write_lines(tmp_path / "classes.txt", *classes)
        if message is None:
            dataset = open_written(tmp_path, "clip", rows, **options)
            assert [item.label for item in dataset.items] == [0, 1]
            continue
        with pytest.raises(ValueError, match=message):
            open_written(tmp_path, "clip", rows, **options)
    names = [f"{n:02d}" for n in range(1, 13)]  # of folders; no list numbers them
    rows = [f"a.mp4 {name}" for name in names]
    dataset = open_written(tmp_path, "clip", rows, **options | dict(labels=""))
    assert [dataset.classes[item.label] for item in dataset.items] == names


def test_data_rare_labels_come_more_often(tmp_path):
    """LVIS' repeat factors, by the rarest label: shares of an epoch, the same for every seed; the
    whole part of a factor is certain."""
    write_lines(tmp_path / "l.pbtxt", *(f'item {{ name: "n{i}" id: {i} }}' for i in (1, 2, 3, 4)))
    rows = [f"a,{second},0,0,1,1,1" for second in range(100)]
    rows += [f"a,{second},0,0,1,1,2" for second in range(50)]
    rows += ["a,7,0,0,1,0.5,3"]
    options = dict(labels="l.pbtxt", touch="a.mp4", repeat_rare=0.5)
    dataset = open_written(tmp_path, "box", rows, **options)
    expected = np.ones(100)
    expected[7] = np.sqrt(0.5 / 0.01)  # 7.07
    assert np.allclose(data.repeat_factors(dataset), expected)
    dataset.task.repeat_rare = 0.8
    expected[:50] = np.sqrt(0.8 / 0.5)
    expected[7] = np.sqrt(0.8 / 0.01)
    size = int(expected.sum())
    assert np.allclose(data.repeat_factors(dataset), expected)
    stream = data.Stream({"t": dataset})
    counts = np.zeros(100)
    for epoch in range(40):
        found = [stream.locate("t", epoch * size + place) for place in range(size)]
        assert {e for e, _ in found} == {epoch}
        times = np.bincount([index for _, index in found], minlength=100)
        assert (times >= np.floor(expected * size / expected.sum())).all()
        assert (times <= np.ceil(expected * size / expected.sum())).all()
        counts += times
    assert np.abs(counts / 40 - expected * size / expected.sum()).max() < 0.3
    dataset.task.repeat_rare = 0.0
    assert data.repeat_factors(dataset) is None
    lines = ["1.mp4 a", "2.mp4 a", "3.mp4 a", "4.mp4 b"]
    touch = "; ".join(f"{i}.mp4" for i in range(1, 5))
    clips = open_written(tmp_path, "clip", lines, touch=touch, repeat_rare=1.0)
    assert np.allclose(data.repeat_factors(clips), [*[(4 / 3) ** 0.5] * 3, 2])


def test_data_mixup_is_the_mixture(data_folder):
    plain = data_stream(data_folder, mixup=0.0)
    (a,), (c,) = data_batches(plain, 0, 1), data_batches(plain, 8, 9)  # c: the next epoch
    (b,) = data_batches(data_stream(data_folder, mixup=0.4), 0, 1)
    assert (b.labels.max(1).values < 1).any()
    i, j = next((i, c.keys.index(key)) for i, key in enumerate(a.keys) if key in c.keys)
    assert not torch.equal(a.video[i], c.video[j])  # the same clip, augmented otherwise
    for i in range(4):
        other = (i + 2) % 4
        if a.labels[i] != a.labels[other]:
            share = float(b.labels[i][a.labels[i]])
            pixels = share * a.video[i].float() + (1 - share) * a.video[other].float()
            assert (pixels - b.video[i].float()).abs().max() <= 0.51


def test_data_damaged_videos_in_training_and_evaluation(data_folder, tmp_path):
    """Training goes on with the next item of the epoch and counts; evaluation masks; both stop past
    bad_share."""
    shutil.copytree(data_folder, tmp_path, dirs_exist_ok=True)
    bad = tmp_path / "videos/v4.mp4"
    bad.write_bytes(bad.read_bytes()[:300])
    runs = []
    for workers in (0, 2):
        stream = data_stream(tmp_path, bad_share=0.1, steps=12)
        runs.append(data_batches(stream, 0, 12, workers=workers))
        assert [files.keys() for files in stream.damaged.values()] == [{str(bad)}] * 2
    assert data_same(*runs) and all(len(b.video) == 4 for b in runs[0])
    assert not any(key[0] in ("v4", "v4.mp4") for b in runs[0] for key in b.keys)
    (first,), (second,) = (
        data_batches(data_stream(tmp_path, bad_share=0.1, batch=12), 0, 1, workers=0)
        for _ in range(2)
    )
    twice = [i for i, key in enumerate(first.keys) if first.keys.count(key) == 2]
    assert len(twice) == 2  # the stand-in is itself in the epoch, and cut otherwise
    assert not torch.equal(*(first.video[i] for i in twice)) and data_same([first], [second])
    stream = data_stream(tmp_path, bad_share=0.2)
    stream.add_damaged("clips", {"a": "a: torn"})
    stream.add_damaged("clips", {"a": "a: torn", "b": "b: torn"})  # another rank's
    with pytest.raises(ValueError, match="clips.*c: torn; like it 3 of 12 .*bad_share = 0.2"):
        stream.add_damaged("clips", {"c": "c: torn"})
    message = "task 'clips' .*v4.*like it 1 of 12 videos cannot be used, more than bad_share = 0.05"
    with pytest.raises(ValueError, match=message):
        data_batches(data_stream(tmp_path), 0, 12, workers=1)
    lines = [f"{number}.mp4 {number % 2}" for number in range(30)]  # empty files
    touch = "; ".join(f"{number}.mp4" for number in range(30))
    torn = open_written(tmp_path / "torn", "clip", lines, touch=touch, bad_share=1.0, batch=2)
    with pytest.raises(ValueError, match="task 't': 20 videos in a row fail; .*mp4: Invalid data"):
        next(data.training_batches(data.Stream({"t": torn}), 0, 1))
    for task in data_tasks(bad_share=0.1):
        dataset = data.open_task(task, tmp_path, "val")
        batches = list(data.evaluation_batches(dataset, 4, work=ahead(1)))
        masked = [
            key for b in batches for key, valid in zip(b.keys, b.valid, strict=True) if not valid
        ]
        assert masked == [item.key for item in dataset.items if item.path == str(bad)]
        assert dataset.damaged.keys() == {str(bad)}
        assert sum(len(b.keys) for b in batches) == len(dataset)
        for b in batches if task.kind == "box" else ():
            assert b.valid[b.box_clip].all()


def test_data_missing_items_are_counted(tmp_path):
    """Clips and keyframes, not videos: what evaluation counts as wrong or missed."""
    write_lines(tmp_path / "l.pbtxt", 'item { name: "x" id: 1 }')
    rows = [f"{video},{second},0,0,1,1,1" for video in "ab" for second in range(3)]
    options = dict(touch="a.mp4", bad_share=0.9)
    dataset = open_written(tmp_path, "box", rows, "val", labels="l.pbtxt", **options)
    assert (len(dataset), len(dataset.missing), dataset.missing_items) == (3, 1, 3)
    lines = ["a.mp4 0", "b.mp4 0", "b.mp4 1", "c.mp4 1"]
    dataset = open_written(tmp_path, "clip", lines, "val", **options)
    assert (len(dataset), len(dataset.missing), dataset.missing_items) == (1, 2, 3)


OWN_LOOP = """
import sys, data, numpy, torch
common = dict(videos="videos", size=32, short_side=[40, 48], frames=4, stride=4, batch=4)
tasks = [
    data.Task("clips", "clip", train="list.txt", **common),
    data.Task("persons", "box", train="boxes.csv", labels="actions.pbtxt", **common),
]
root = sys.argv[1]
stream = data.Stream({task.name: data.open_task(task, root) for task in tasks}, steps=6)
encoder = torch.nn.Conv3d(3, 8, 4, 4)
heads = torch.nn.ModuleDict({"clips": torch.nn.Linear(8, 3), "persons": torch.nn.Linear(8, 4)})
optimiser = torch.optim.SGD([*encoder.parameters(), *heads.parameters()], 0.1)
losses = []
for batches in data.training_batches(stream, 0, 6):
    for batch in batches:
        video = data.normalise(batch.video, [0.5] * 3, [0.5] * 3)  # (B, 3, T, H, W)
        features = encoder(video).mean((2, 3, 4))  # (B, D)
        if batch.boxes is None:
            loss = torch.nn.functional.cross_entropy(heads["clips"](features), batch.labels)
        else:
            logits = heads["persons"](features[batch.box_clip])  # (K, C)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        loss.backward()
        losses.append(loss.item())
    optimiser.step()
    optimiser.zero_grad()
assert len(losses) == 6 and numpy.isfinite(losses).all()
(batch,) = data.evaluation_batches(data.open_task(data.Task("clips", "clip", val="list.txt",
    train="list.txt", **common), root, "val"), 12)
assert batch.valid.all() and batch.labels.tolist() == [i % 3 for i in range(12)]
print(data.decode_clip(root + "/videos/v0.mp4", [0.5, 1.25]).shape)
"""


def test_data_alone_in_ones_own_loop(data_folder, tmp_path):
    """The file alone in an empty folder: two datasets, one encoder, a plain loop, an evaluation."""
    shutil.copy(HERE / "data.py", tmp_path)
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    done = run_python("-c", OWN_LOOP, data_folder, cwd=tmp_path, env=environment)
    assert (done.stdout, done.stderr) == ("(2, 64, 96, 3)\n", "")


def test_an_action_list_that_was_cut_off_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.pbtxt", 'item { name: "a" id: 1 }', 'label { name: "b"')
    with pytest.raises(ValueError, match="a.pbtxt: 2 items begin, 1 are whole"):
        data.read_classes(path)


def test_class_folders_with_leading_zeros_are_names(tmp_path):
    lines = ["01/1.mp4 01", "02/2.mp4 02"]
    opened = open_written(tmp_path, "clip", lines, touch="01/1.mp4; 02/2.mp4")
    assert opened.classes == ["01", "02"]
