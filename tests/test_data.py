"""Tests of data.py."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, write_lines, write_movie

import data
from extras import formats, recipe


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """videos/v0.mp4 .. v11.mp4 of 2 to 3 seconds with annotations for a clip and a box task."""
    root = tmp_path_factory.mktemp("data")
    for i in range(12):
        write_movie(root / f"videos/v{i}.mp4", frames=50 + 2 * i, g=24, bf=3)
    write_lines(root / "list.txt", *(f"v{i}.mp4 {i % 3}" for i in range(12)))
    write_lines(
        root / "boxes.csv",
        *(
            f"v{i},{t:04d},0.1,0.2,0.5,0.9,{1 + (i + t) % 4},0\nv{i},{t}.000000,0.4,0.2,0.9,0.9,2"
            for i in range(12)
            for t in (0, 1, 2)
            if i % 5 or t
        ),
    )
    write_lines(root / "actions.pbtxt", *(f'item {{ name: "a{i}" id: {i} }}' for i in range(1, 5)))
    return root


def data_tasks(**changes):
    common = dict(videos="videos", size=32, short_side=[40, 48], frames=4, stride=4, batch=4)
    common |= changes
    boxes = common | dict(labels="actions.pbtxt", mixup=0.0, views=[1, 1])
    return (
        data.Task("clips", "clip", train="list.txt", val="list.txt", **common),
        data.Task("persons", "box", train="boxes.csv", val="boxes.csv", **boxes),
    )


def data_sample(dataset, index, seed=None):
    """An item as it is trained, or (None) evaluated."""
    if seed is None:
        return data.evaluation_sample(dataset.task, dataset.items[index])
    rng = np.random.default_rng([seed])
    return data.training_sample(dataset.task, dataset.items[index], rng)


def data_stream(root, seed=0, steps=20, **changes):
    datasets = {task.name: data.open_task(task, root) for task in data_tasks(**changes)}
    return data.Stream(datasets, "round_robin", seed, steps)


def data_batches(stream, start, stop, rank=0, world=1, workers=0, micro=1):
    steps = data.training_batches(stream, start, stop, rank, world, workers, micro)
    return [batch for step in steps for batch in step]


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
    ):
        write_lines(path, "a,1", "", row)
        with pytest.raises(ValueError, match=f"{path}:3: .*{text}") as error:
            data.read_boxes(path, 80, False, {})
        assert row in str(error.value)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        (
            "a.pbtxt",
            'label {\n  name: "bend/bow (at the waist)"\n  label_id: 1\n  label_type: X\n}\n'
            'label { name: "b" label_id: 3 }',
            {1: "bend/bow (at the waist)", 3: "b"},
        ),
        (
            "b.pbtxt",
            'item { name: "sit" id: 11 }\nitem {\n  name: "run"\n  id: 10\n}',
            {11: "sit", 10: "run"},
        ),
        ("c.json", '{"Holding something": "0", "Left": "1"}', {0: "Holding something", 1: "Left"}),
        ("mit.txt", "adult+male,0\nair drumming,1\n", {0: "adult+male", 1: "air drumming"}),
        ("ucf.txt", "1 Archery\n2 Biking\n", {1: "Archery", 2: "Biking"}),
        ("d.pbtxt", 'item { name: "a } b" id: 1 }', {1: "a } b"}),
        ("plain.txt", "b b\na\n", {0: "b b", 1: "a"}),
        ("twice.txt", "run\nrun\n", "1 names"),
        ("d.json", "[1, 2]", "expected a JSON dict"),
        ("d.json", '{"a": 0,', "not JSON"),
        ("d.json", '{"a": "x"}', "0 numbers"),
    ],
)
def test_data_class_lists(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    if isinstance(expected, dict):
        assert data.read_classes(tmp_path / name) == expected
    else:
        with pytest.raises(ValueError, match=f"{name}.*{expected}"):
            data.read_classes(tmp_path / name)


def data_open(root, kind, lines, split="train", name="annotations.csv", touch="", **options):
    """A task with these annotations, of empty videos."""
    for video in filter(None, touch.split("; ")):
        write_lines(root / "v" / video)
    if lines:
        write_lines(root / name, *lines)
    options = {"flip": 0.0, "videos": "v", split: name} | options
    return data.open_task(data.Task("t", kind, **options), root, split, formats.read_clips)


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
    dataset = data_open(tmp_path, "box", rows, offset_sec=900.0, **options)
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
        data_open(tmp_path, "box", more, **options)
    found = data_open(tmp_path, "box", more, bad_share=0.5, **options)
    assert found.missing.keys() == {"gone"}
    with pytest.raises(ValueError, match="several videos are movie"):
        data_open(tmp_path, "box", rows, labels="labels.pbtxt", touch="cuts/movie.mp4")
    write_lines(tmp_path / "huge.pbtxt", 'item { name: "x" id: 32768 }')
    for kind, lines, message in (
        ("box", rows, "huge.pbtxt: ids 32768 to 32768, expected 1..32767"),
        ("clip", ["a.mp4 99", "b.mp4 20261126"], "class number 20261126"),
    ):
        with pytest.raises(ValueError, match=message):
            data_open(tmp_path, kind, lines, labels="huge.pbtxt" * (kind == "box"))


def test_data_detections(tmp_path):
    write_lines(tmp_path / "labels.pbtxt", 'item { name: "x" id: 2 }')
    write_lines(tmp_path / "skip.csv", "a,0004")
    write_lines(
        tmp_path / "det.csv",
        "a,0001,0,0,0.49,1,,0.95",
        "a,0001,0.2,0,0.9,1,,0.93",
        "a,0001,0,0,1,1,,0.5",
        "a,0002,0,0,1,0.9,,0.3",
        "a,0002,0,0,1,0.8,,0.2",
        "a,0003,0,0,1,0.7,,0.99",
        "a,0004,0,0,1,1,,0.99",
        "a,0005,0,0,1,1,2,0.99",
        "other,0001,0,0,1,1,,0.99",
    )
    true = ["a,1,0,0,0.5,1,1,0", "a,1,0.5,0,1,1,2,1", "a,2,0,0,1,1,1,0", "a,3", "a,4,0,0,1,1,2,0"]

    def read(split, **options):
        """{second: [(*box, score, *labels), ...]}"""
        options |= dict(labels="labels.pbtxt", exclude_train="skip.csv", exclude_val="skip.csv")
        dataset = data_open(tmp_path, "box", true, split, touch="a.mp4", **options)
        return {
            item.key[1] // 10**6: [
                (*box.tolist(), round(float(score), 2), *(np.flatnonzero(row) + 1).tolist())
                for box, score, row in zip(item.boxes, item.scores, item.labels)
            ]
            for item in dataset.items
        }

    assert read("val", val_boxes="det.csv") == {
        1: [(0, 0, 0.49, 1, 0.95), (0.2, 0, 0.9, 1, 0.93)],
        2: [(0, 0, 1, 0.9, 0.3)],  # keep-best
        3: [(0, 0, 1, 0.7, 0.99)],
        5: [(0, 0, 1, 1, 0.99)],
    }
    assert read("val").keys() == {1, 2}
    assert read("train", train_boxes="det.csv", transfer_iou=0.9) == {
        1: [(0, 0, 0.5, 1, 1, 1), (0.5, 0, 1, 1, 1, 2), (0, 0, 0.49, 1, 0.95, 1)],
        2: [(0, 0, 1, 1, 1, 1)],
    }
    found = read("train", train_boxes="det.csv")
    assert found[3] == [(0, 0, 1, 0.7, 0.99)] and found[5] == [(0, 0, 1, 1, 0.99, 2)]
    assert len(found[1]) == 4


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared annotations are not here")
def test_data_ava_kinetics_in_full(monkeypatch):
    """Counts of the published files; every keyframe of AVA-Kinetics has a Kinetics-700 clip with a
    local time in [1, 9]."""

    def counts(name):
        report = {}
        found = data.read_boxes(SHARED / name, 80, False, report)
        return found, (report["rows"], len(found), sum(map(len, found.values())))

    found, counted = counts("ava_kinetics/kinetics_val_v1.0.csv")
    assert counted == (73_845, 31_272, 32_667)
    assert counts("ava/ava_val_v2.1.csv")[1] == (93_400, 50_029, 93_393)
    kinetics = SHARED / "kinetics/kinetics-700_val.csv"
    clips = [line.split(",") for line in kinetics.read_text().splitlines()[1:]]
    names = [
        f"{label}/{video}_{int(start):06d}_{int(end):06d}.mp4"
        for label, video, start, end, _ in clips
    ]
    monkeypatch.setattr(data, "list_videos", lambda folder: names)
    videos = data.Videos("")
    local = [videos.at(video, stamp / 1e6, 0.0)[1] for video, stamp in found]
    assert 1.0 <= min(local) and max(local) <= 9.0
    rows = list(formats.read_clips(str(kinetics), "val", ""))
    assert [data.find_clip(row, videos) for row in rows] == names
    assert len({row.label for row in rows}) == 700
    classes = data.read_classes(SHARED / "ava/ava_action_list_v2.1_for_activitynet_2018.pbtxt")
    assert len(classes) == 60 and max(classes) == 80


def test_data_clip_formats(tmp_path):
    write_lines(tmp_path / "ssv2.json", '{"Holding something": "0", "Moving A and B": "1"}')
    write_lines(tmp_path / "mit.txt", "adult+female,0", "ball,1")
    write_lines(tmp_path / "ucf.txt", "1 Archery", "2 Biking")
    write_lines(tmp_path / "names.txt", "air drumming", "run")
    videos = (
        "air_drumming/0wR5jVB-WPk_000417_000427.mp4; b_c_000001_000011.mkv; 78687.webm; "
        "air drumming/x y.mp4; ball/2,3.mp4; ball/2.mp4; sub/7.mp4; adult+female/1.mp4; "
        "Archery/v_Archery_g08.avi"
    )

    def read(*lines, **options):
        dataset = data_open(tmp_path, "clip", lines, touch=videos, **options)
        return {
            os.path.relpath(item.path, tmp_path / "v"): dataset.classes[item.label]
            for item in dataset.items
        }

    two = {"air drumming/x y.mp4": "air drumming", "ball/2.mp4": "run"}
    header = "label,youtube_id,time_start,time_end,split,is_cc"
    assert read(header, "air drumming,0wR5jVB-WPk,417,427,val,0", "run,b_c,1,11,val,0") == {
        "air_drumming/0wR5jVB-WPk_000417_000427.mp4": "air drumming",
        "b_c_000001_000011.mkv": "run",
    }
    assert read("air drumming/x y.mp4 0", "ball/2.mp4 1", labels="names.txt") == two
    assert read("ball/2,3.mp4 1", labels="names.txt") == {"ball/2,3.mp4": "run"}
    assert read("air drumming/x y.mp4,air drumming", "ball/2.mp4\trun") == two
    for blank in " ,\t":  # labels of several words
        assert read(f"ball/2.mp4{blank}pick up", f"sub/7.mp4{blank}stand, up") == {
            "ball/2.mp4": "pick up",
            "sub/7.mp4": "stand, up",
        }
    assert read("moved/2.mp4 ball", "ball/2.mp4 ball", "x/7.mp4 b", bad_share=0.5) == {
        "ball/2.mp4": "ball"
    }  # sub/7.mp4 is another video than x/7.mp4
    entries = [
        {"id": "78687", "label": "holding x", "template": "Holding [something]"},
        {"id": "7", "label": "moving", "template": "Moving [A] and [B]"},
    ]
    assert read(json.dumps(entries), name="a.json", labels="ssv2.json") == {
        "78687.webm": "Holding something",
        "sub/7.mp4": "Moving A and B",
    }
    assert read("adult+female/1.mp4,adult+female,4,0", "ball/2.mp4,ball,3,1", labels="mit.txt") == {
        "adult+female/1.mp4": "adult+female",
        "ball/2.mp4": "ball",
    }
    for line in ("Archery/v_Archery_g08.avi 1", "Archery/v_Archery_g08.avi"):
        assert read(line, labels="ucf.txt") == {"Archery/v_Archery_g08.avi": "Archery"}
    for name in ("run/a b.mp4", "sit down/c.mp4", "run/notes.txt"):
        write_lines(tmp_path / "w" / name)
    found = {"../w/run/a b.mp4": "run", "../w/sit down/c.mp4": "sit down"}
    assert read(name="w", videos="w") == found
    write_lines(tmp_path / "run_test_split1.txt", "b_c_000001_000011.avi 1", "7.avi 2", "2.avi 0")
    write_lines(tmp_path / "sit_test_split1.txt", "1.avi 1")
    assert read(name="*_test_split1.txt") == {
        "b_c_000001_000011.mkv": "run",
        "adult+female/1.mp4": "sit",
    }
    for lines, labels, error in (
        (["ball/2.mp4 Biking", "ball/2.mp4 jump"], "ucf.txt", "csv:2: 'jump' is not one of"),
        (["nothing"], "", "csv:1: expected `path"),
        (["2.mp4"], "", "csv:1: expected `path"),
        (["path label", "ball/2.mp4 0"], "", "csv:1: not a video .a header"),
        (["youtube_id,time_start,time_end,split", "--6bJ,17,27,test"], "", "csv:2: no label"),
    ):
        with pytest.raises(ValueError, match=error):
            read(*lines, labels=labels)


@pytest.mark.parametrize(
    "kind, changes, problem",
    [
        ("clip", dict(train=""), "neither `train` nor `val`"),
        ("clip", dict(train="", val="x"), ""),
        ("box", dict(labels=""), "needs `labels`"),
        ("box", dict(mixup=0.1), "mixup is for clip tasks"),
        ("clip", dict(mixup=0.1), ""),
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
    dataset = data_open(
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
        for box, labels, kept in zip(sample.boxes, sample.labels, sample.kept):
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
    corner = np.array([[0.97, 0.9, 1.0, 1.0]])  # 30 in 141 * 41 blind crops would see it
    for _ in range(50):
        square, inside, visible = data.random_crop(rng, video, corner, 60)
        assert square.shape == (1, 2, 60, 60, 3) and visible.tolist() == [0]
    assert data.random_crop(rng, video, np.zeros((0, 4)), 60)[0].shape == (1, 2, 60, 60, 3)
    wide = np.arange(200, dtype=np.uint8)[:, None] + np.zeros((1, 2, 100, 1, 3), np.uint8)
    for video, count, lefts in (
        (wide, 3, [0, 50, 100]),
        (wide, 1, [50]),
        (wide.transpose(0, 1, 3, 2, 4), 3, [0, 50, 100]),
    ):
        squares, _ = data.fixed_crops(video, boxes, 100, count)
        assert [int(square[0, 0, 0, 0]) for square in squares] == lefts


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
    assert len(data_open(**clips, flip_swap=[[1, 0]])) == 2
    write_lines(
        tmp_path / "labels.pbtxt", 'item { name: "go left" id: 1 } item { name: "go right" id: 2 }'
    )
    boxes = clips | dict(kind="box", lines=["1,0,0,0,1,1,2"], labels="labels.pbtxt")
    for options, message in (
        (clips, r"flip = 0.5 .*flip_swap = \[\[0, 1\]\]"),
        (boxes, r"flip_swap = \[\[1, 2\]\]"),
        (clips | dict(flip_swap=[[1, 0], [1, 2]]), r"\[1, 2\], but the labels are 0..1"),
    ):
        with pytest.raises(ValueError, match=message):
            data_open(**options)


def test_data_colour_and_normalise():
    rng = np.random.default_rng(0)
    video = rng.integers(60, 120, (1, 3, 16, 16, 3), dtype=np.uint8)
    video[0, 2] = video[0, 0]
    assert np.array_equal(data.jitter_colour(rng, video, 0.0), video)
    changed = data.jitter_colour(rng, video, 0.4)
    assert np.array_equal(changed[0, 0], changed[0, 2])
    assert np.abs(changed.astype(int) - video).mean() > 3
    grey = np.repeat(video[..., :1], 3, -1)
    assert np.ptp(data.jitter_colour(rng, grey, 0.5), axis=-1).max() == 0
    batch = torch.from_numpy(video).repeat(2, 1, 1, 1, 1)
    out = data.normalise(batch, [0.5, 0.4, 0.3], [0.25, 0.5, 1.0])
    assert out.shape == (2, 3, 3, 16, 16) and out.is_contiguous()
    torch.testing.assert_close(out[1, 1, 2], (batch[1, 2, :, :, 1] / 255 - 0.4) / 0.5)
    out = data.normalise(batch, [], [])
    assert out.mean((2, 3, 4)).abs().max() < 1e-5 and abs(float(out[0].std()) - 1) < 1e-3


# the stream -----------------------------------------------------------------------------------


def data_same(a, b):
    fields = zip(
        *([value for batch in batches for value in vars(batch).values()] for batches in (a, b)),
        strict=True,
    )
    return all(np.array_equal(x, y) for x, y in fields)


def test_data_batches_are_a_function_of_the_step(data_folder):
    """Resumed at a step, with other numbers of workers: the same tensors. Epochs are complete."""
    options = dict(colour=0.3, mixup=0.4, steps=8)
    whole = data_batches(data_stream(data_folder, **options), 0, 8)
    assert [b.task for b in whole] == ["clips", "persons"] * 4
    assert [b.step for b in whole] == list(range(8))
    for workers in (1, 2):
        again = data_batches(data_stream(data_folder, **options), 3, 8, workers=workers)
        assert data_same(again, whole[3:])
    (other,) = data_batches(data_stream(data_folder, seed=1, **options), 0, 1)
    assert not torch.equal(other.video, whole[0].video)
    assert whole[0].labels.shape == (4, 3)
    assert torch.allclose(whole[0].labels.sum(1), torch.ones(4))
    assert whole[1].labels.shape == (len(whole[1].boxes), 4) and whole[1].box_clip.max() <= 3
    assert len({key for b in whole[0::2][:3] for key in b.keys}) == 12  # 3 batches of 4


def test_data_ranks_share_the_global_batch(data_folder):
    """Rank r of W holds clips r, r + W, ... of the one global batch, mixed with the same partners,
    boxes included."""

    def stream():
        return data_stream(data_folder, mixup=0.4, batch=8)

    for step, name in ((0, "clips"), (1, "persons")):
        (whole,) = data_batches(stream(), step, step + 1)
        for world, micro in ((2, 1), (4, 1), (2, 2)):
            parts = [
                (rank + part * world, batch)
                for rank in range(world)
                for part, batch in enumerate(
                    data_batches(stream(), step, step + 1, rank, world, 0, micro)
                )
            ]
            assert len(parts) == world * micro
            for first, batch in parts:
                mine = range(first, 8, world * micro)
                assert batch.task == name and batch.keys == [whole.keys[i] for i in mine]
                assert torch.equal(batch.video, whole.video[list(mine)])
                chosen = list(mine)
                if name == "persons":
                    chosen = [int(b) in mine for b in whole.box_clip]
                    assert torch.equal(batch.boxes, whole.boxes[chosen])
                    assert [mine[b] for b in batch.box_clip] == whole.box_clip[chosen].tolist()
                assert torch.equal(batch.labels, whole.labels[chosen])
    with pytest.raises(ValueError, match="batch = 8 is no multiple of 16"):
        data_batches(stream(), 0, 1, 0, 8)


@pytest.mark.parametrize(
    "schedule, low, high", [("round_robin", 21, 21), ("weighted", 10, 10), ("accumulate", 41, 41)]
)
def test_data_schedules_and_epochs(schedule, low, high, data_folder):
    clips, persons = data_tasks(batch=5)
    clips.weight, persons.weight = 1.0, 3.0
    datasets = {task.name: data.open_task(task, data_folder) for task in (clips, persons)}
    stream = data.Stream(datasets, schedule, 7, 41)
    tasks = [stream.tasks_at(step) for step in range(41)]
    assert low <= sum("clips" in names for names in tasks) <= high
    assert (tasks[0] == ["clips", "persons"]) == (schedule == "accumulate")
    for name, size in (("clips", 12), ("persons", len(datasets["persons"]))):
        steps = [step for step in range(41) if name in stream.tasks_at(step)]
        places = [place for step in steps for place in stream.positions(step, name)]
        assert places == list(range(len(places)))  # consecutive, whatever the schedule
        found = [stream.locate(name, place) for place in places]
        for epoch in range(len(found) // size):
            part = found[epoch * size : (epoch + 1) * size]
            assert sorted(part) == [(epoch, i) for i in range(size)]
        orders = [[i for _, i in found[k * size : (k + 1) * size]] for k in range(2)]
        assert len(found) < 2 * size or orders[0] != orders[1]
        parts = [place for rank in range(3) for place in stream.positions(steps[9], name, rank, 3)]
        assert sorted(parts) == places[45:50]  # every rank's of the tenth batch
    same, longer = (data.Stream(datasets, schedule, 7, steps) for steps in (41, 99))
    assert [same.tasks_at(s) for s in range(41)] == tasks and same.state() == stream.state()
    assert schedule == "weighted" or [longer.tasks_at(s) for s in range(41)] == tasks
    assert data.Stream(datasets, seed=8).state() != data.Stream(datasets, seed=7).state()
    relabelled = data.open_task(clips, data_folder)
    relabelled.items.label[3] = 0 if relabelled.items.label[3] else 1
    states = [data.Stream({"clips": d}).state() for d in (relabelled, datasets["clips"])]
    assert states[0] != states[1]


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


def test_data_evaluation_is_complete(data_folder):
    """Every item once on any number of ranks; V views of an item in a row, each as it is alone."""
    tasks = data_tasks(views=[3, 3], batch=18)
    clips, persons = (data.open_task(task, data_folder, "val") for task in tasks)
    for dataset, views in ((clips, 9), (persons, 1)):
        keys = [
            key
            for rank in range(2)
            for b in data.evaluation_batches(dataset, 18, rank, 2, workers=rank)
            for key in b.keys
        ]
        assert sorted(keys) == sorted([item.key for item in dataset.items] * views)
        assert all(len(set(keys[i : i + views])) == 1 for i in range(0, len(keys), views))
    batch = next(data.evaluation_batches(clips, 18, workers=0))
    assert batch.video.shape == (18, 4, 32, 32, 3) and batch.valid.all()
    assert batch.labels.tolist() == [0] * 9 + [1] * 9
    starts = np.linspace(0, 2.0 - 4 * 0.16, 3)  # v0 lasts 2 s
    for view in range(9):
        times, left = starts[view // 3] + np.arange(4) * 0.16, [0, 14, 28][view % 3]
        full = data.decode_clip(data_folder / "videos/v0.mp4", times, 40)
        assert np.array_equal(batch.video[view], full[:, 4:36, left : left + 32])
    batch = next(data.evaluation_batches(persons, 4, workers=0))
    assert batch.video.shape == (1, 4, 48, 64, 3)
    assert torch.allclose(batch.boxes, torch.from_numpy(batch.boxes_source).float())


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
    message = "task 'clips' .*v4.*like it 1 of 12 videos cannot be used, more than bad_share = 0.05"
    with pytest.raises(ValueError, match=message):
        data_batches(data_stream(tmp_path), 0, 12, workers=1)
    for task in data_tasks(bad_share=0.1):
        dataset = data.open_task(task, tmp_path, "val")
        batches = list(data.evaluation_batches(dataset, 4, workers=1))
        masked = [key for b in batches for key, valid in zip(b.keys, b.valid) if not valid]
        assert masked == [item.key for item in dataset.items if item.path == str(bad)]
        assert dataset.damaged.keys() == {str(bad)}
        assert sum(len(b.keys) for b in batches) == len(dataset)
        for b in batches if task.kind == "box" else ():
            assert b.valid[b.box_clip].all()
