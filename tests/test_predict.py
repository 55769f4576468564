"""Tests of extras/predict.py and info.py: boxes that move as they should, the three kinds of boxes,
files that belong together."""

import argparse
import csv
import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import H264, movie_number, write_lines, write_movie
from test_persons import decoded_frames, square_at, square_movie, stand_in  # noqa: F401

import cofinetune
import data
from extras import checkpoints, info, persons, pictures, predict
from extras.videos import frame_times
from extras.world import LABELS, UPSTREAM

pytest_plugins = ["helpers"]
ACTIONS = UPSTREAM["actions"]


def film_of(path):
    return predict.Film(persons.Video(path.stem, path, path.name), frame_times(path))


def put(film, second, *boxes, texts=()):
    keyframe = predict.Keyframe(second)
    for box in boxes:
        keyframe.add(box, 1.0)
    for lines, words in zip(keyframe.texts, texts, strict=False):
        lines.extend(words)
    film.keyframes[round(second * 1e6)] = keyframe


def run(module, *words, **overrides):
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    overrides = {key: str(value) for key, value in overrides.items()}
    return module.run(parser.parse_args([*map(str, words)]), overrides, cofinetune)


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


# ------------------------------------------------------------------------------------------------
# Boxes between keyframes
# ------------------------------------------------------------------------------------------------


def black(number, width, height):
    return np.zeros((height, width, 3), np.uint8)


def drawn_boxes(film, path):
    """(time, left, top, right, bottom in [0, 1] of what is amber, or nothing) of each frame."""
    predict.annotate(film, path)
    clock = frame_times(path)
    times, width, height = clock.times_sec, clock.width, clock.height
    seen = []
    for time_sec, picture in zip(times, data.decode_clip(path, times), strict=True):
        amber = picture.astype(int).sum(2) > 250
        y, x = np.nonzero(amber)
        box = () if not len(y) else (x.min(), y.min(), x.max() + 1, y.max() + 1)
        seen.append((time_sec, *np.divide(box, [width, height, width, height][: len(box)])))
    return seen


def test_a_box_moves_straight_from_keyframe_to_keyframe(tmp_path):
    """Pixel by pixel: between 1 and 2 s it is where the line between its two places says, before
    and after it stands for half a step; from 3 s on there is another, far away, without a link."""
    film = film_of(write_movie(tmp_path / "a.mp4", 100, size=(320, 240), picture=black, **H264))
    first, second = np.array([0.1, 0.1, 0.5, 0.6]), np.array([0.3, 0.2, 0.7, 0.8])
    put(film, 1.0, tuple(first))
    put(film, 2.0, tuple(second))
    put(film, 3.0, (0.8, 0.85, 0.95, 0.98))
    seen = drawn_boxes(film, tmp_path / "annotated.mp4")
    assert len(seen) == 100
    for time_sec, *box in seen:
        expected = ()
        if 0.5 <= time_sec < 2.5:
            share = min(max(time_sec - 1, 0), 1)
            expected = first + share * (second - first)
        elif 2.5 <= time_sec < 3.5:
            expected = np.array([0.8, 0.85, 0.95, 0.98])
        assert len(box) == len(expected), time_sec
        if len(box):
            assert np.abs(np.array(box) - expected).max() * 320 < 2.1, time_sec


def test_links_take_the_best_overlaps_first_and_each_box_once():
    one = np.array([[0.0, 0.0, 0.4, 1.0], [0.3, 0.0, 0.7, 1.0]])
    other = np.array([[0.31, 0.0, 0.71, 1.0], [0.1, 0.0, 0.5, 1.0], [0.9, 0.9, 1.0, 1.0]])
    assert predict.link(one, other) == {0: 1, 1: 0}
    assert predict.link(one[:1], other[2:]) == predict.link(one[:0], other) == {}
    walker, a_width_on = np.array([[0.1, 0.2, 0.16, 0.4]]), np.array([[0.16, 0.2, 0.22, 0.4]])
    assert predict.link(walker, a_width_on) == {0: 0} and data.iou(walker[0], a_width_on[0]) == 0
    assert predict.link(walker, a_width_on + [0.06, 0, 0.06, 0]) == {}


def test_two_persons_cross_and_one_is_lost_for_a_keyframe():
    def keyframe(second, **boxes):
        made = predict.Keyframe(second)
        for number, (name, box) in enumerate(boxes.items()):
            made.add(box, 1.0)
            made.texts[number].append(name)
        return made

    left, right, low = (0.0, 0.0, 0.3, 0.5), (0.6, 0.0, 0.9, 0.5), (0.5, 0.6, 0.9, 1.0)
    moved = (0.1, 0.0, 0.4, 0.5)
    motion = predict.Motion(
        [
            keyframe(4.0, a=left, d=right),
            keyframe(0.0, a=left, b=right, c=low),
            keyframe(1.0, b=right, A=moved),
            keyframe(2.0, b=right),
        ]
    )

    def names(second):
        return [lines[0] for lines in motion.at(second)[1]]

    assert names(-0.5) == names(0.2) == ["a", "b", "c"] and names(-0.6) == []
    assert names(0.7) == ["A", "b"]  # the labels of the nearer keyframe, one person one box
    assert np.allclose(motion.at(0.25)[0][0], [0.025, 0, 0.325, 0.5])
    assert names(1.3) == ["b", "A"] and names(1.7) == ["b"]
    assert names(2.4) == ["b"] and names(2.6) == names(3.4) == []  # nothing links over two steps
    assert names(3.6) == names(4.4) == ["a", "d"] and names(4.6) == []
    assert predict.Motion([]).at(1.0) == ([], [])


@pytest.mark.parametrize(
    "options",
    [
        dict(rate=25),
        dict(rate=12),
        dict(rate=Fraction(30000, 1001)),
        dict(rate=60, start=91),
        dict(rate=Fraction(30000, 1001), suffix=".mkv"),
        dict(pts=[0, 40, 50, 200, 210, 260, 900, 905, 1300] + [1400 + 33 * i for i in range(81)]),
    ],
    ids=["25", "12", "29.97", "60-late", "mkv", "variable"],
)
def test_the_annotated_video_keeps_every_time(tmp_path, options, decoded_frames):  # noqa: F811
    """At any moment it shows the frame that the video shows; of a steady one each, once."""
    options = dict(options)
    suffix = options.pop("suffix", ".mp4")
    film = film_of(write_movie(tmp_path / f"a{suffix}", 90, crf=10, **H264, **options))
    put(film, 1.0, (0.5, 0.5, 0.9, 0.9))
    decoded_frames.clear()
    predict.annotate(film, tmp_path / "annotated.mp4")
    assert decoded_frames == [90]  # once, from start to end
    clock = frame_times(tmp_path / "annotated.mp4")
    assert abs(clock.end_sec - film.end_sec) < 0.02
    times = clock.times_sec
    pictured = data.decode_clip(tmp_path / "annotated.mp4", times)[:, 1::3, 1::3]
    numbers = [movie_number(picture) for picture in pictured]
    assert numbers == [movie_number(frame) for frame in data.decode_clip(film.file, times)]
    if "pts" not in options:
        assert numbers == [*range(90)]


def test_labels_keep_clear_of_small_boxes():
    """Its own and the neighbour's: every pixel inside the frames of both is what it was."""
    picture = np.full((300, 400, 3), 90, np.uint8)
    boxes = np.array([[0.1, 0.0, 0.2, 0.1], [0.1, 0.14, 0.2, 0.24], [0.0, 0.5, 0.6, 1.0]])
    texts = [["stand 0.9", "talk to 0.4"], ["walk 0.8", "carry 0.1"], ["sit 0.5"]]
    drawn = pictures.draw_boxes(picture, boxes, texts, pictures.AMBER)
    for x1, y1, x2, y2 in (boxes[:2] * [400, 300, 400, 300]).astype(int):
        assert (drawn[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] == 90).all()
    assert (drawn == 25).all(2).sum() > 2000  # the labels are there


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_run):
    return tiny_run[0] / "last.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two videos of 3 and 2 s, one of them filmed sideways."""
    folder = tmp_path_factory.mktemp("films")
    square_movie(folder / "a.mp4", seconds=3)
    square_movie(folder / "sub/b.mp4", rotation=-90, size=(72, 128), seconds=2)
    return folder


def test_the_three_kinds_of_boxes(trained, folder, tmp_path, monkeypatch, capsys):
    boxes = write_lines(
        tmp_path / "boxes.csv",
        "a,0.5,0.1,0.1,0.5,0.6,,0.9",
        "a,2.25,0.3,0.2,0.9,0.8,,0.5",
        "other,1,0,0,1,1,,1",
    )
    monkeypatch.setattr(persons, "load_detector", lambda *_: stand_in((0.9, 0.2)))
    film = folder / "a.mp4"
    expected = {
        "whole": [(second, 0.0, 0.0, 1.0, 1.0) for second in (0.5, 1.5, 2.5)],
        boxes: [(0.5, 0.1, 0.1, 0.5, 0.6), (2.25, 0.3, 0.2, 0.9, 0.8)],
        "detect": [
            (second, *square_at(second - second % 0.04) / [96, 72, 96, 72])
            for second in (0.5, 1.5, 2.5)
        ],
    }
    for kind, keyframes in expected.items():
        out = tmp_path / f"to-{Path(kind).stem}"
        assert run(predict, trained, film, "--boxes", kind, "--top", 2, out=out) == 0
        said = capsys.readouterr().out.splitlines()
        rows = read(out / "detections.csv")
        assert len(rows) == len(keyframes) * len(LABELS) and {row[0] for row in rows} == {"a"}
        places = sorted({tuple(map(float, row[1:6])) for row in rows})
        assert np.abs(np.array(places) - keyframes).max() < 0.02
        assert sum("ava  box 0:" in line for line in said) == len(keyframes)
        assert all(line.count(",") == 1 for line in said if "box 0:" in line)  # --top 2
        assert sum("  actions:  " in line for line in said) == 3
        names = "detections.csv, clips-actions.csv, clips-templates.csv, annotated.mp4"
        assert said[-1].startswith(f"in {out}: ") and said[-1].endswith(names)
        assert {path.name for path in out.iterdir()} - {"boxes.csv", "predict.json"} == {
            *names.split(", ")
        }
        clips = read(out / "clips-actions.csv")
        assert clips[0] == ["video", "start", "end", "label", "score"]
        assert len(clips) == 1 + 3 * len(ACTIONS) and {row[0] for row in clips[1:]} == {"a"}
        assert {tuple(row[1:3]) for row in clips[1:]} == {
            ("0.000", "1.000"), ("1.000", "2.000"), ("2.000", "3.000")
        }  # fmt: skip
        assert abs(sum(float(row[4]) for row in clips[1 : 1 + len(ACTIONS)]) - 1) < 1e-4
    scores = {row[7] for row in read(out / "boxes.csv")}
    assert scores == {"0.9000"}  # the detector's file is kept; --min-score 0.5


def test_the_scores_are_those_of_evaluation(tiny_world, trained, tmp_path, monkeypatch):
    """The boxes of the validation, in seconds of the movie, give the rows of detections.csv."""
    boxes = tiny_world / "ava/val_boxes.csv"
    rows = read(trained.parent / "detections.csv")
    films = sorted({row[0] for row in rows})[:3]
    files = [tiny_world / f"ava/videos/{name}.mp4" for name in films]
    run(predict, trained, *files, "--boxes", boxes, out=tmp_path / "p")
    keep = {}
    for row in read(tmp_path / "p/detections.csv"):
        keep[tuple(row[:7])] = float(row[7])
    evaluated = {tuple(row[:7]): float(row[7]) for row in rows if row[0] in films}
    assert evaluated and evaluated.keys() <= keep.keys()
    assert max(abs(keep[key] - score) for key, score in evaluated.items()) < 1e-6


def test_a_folder_and_a_damaged_video(trained, folder, tmp_path, capsys):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    words = (trained, folder, bad, "--boxes", "whole")
    assert run(predict, *words, out=tmp_path / "p") == 1
    assert "left out" in (said := capsys.readouterr()).err and "bad.mp4" in said.err
    assert "annotated/ (2 videos)" in said.out
    assert {row[0] for row in read(tmp_path / "p/detections.csv")} == {"a", "b"}
    for name, count, size in (("a", 75, (288, 216)), ("b", 50, (216, 384))):
        clock = frame_times(tmp_path / f"p/annotated/{name}.mp4")
        assert (len(clock.times_sec), (clock.width, clock.height)) == (count, size)
    with pytest.raises(data.DecodeError, match="bad.mp4"):
        run(predict, trained, bad, "--boxes", "whole", out=tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_nothing_old_is_shown_as_a_result(trained, folder, tmp_path, capsys):
    """Another video into the same folder: what the first left is gone, what is not ours is kept."""
    out = tmp_path / "p"
    run(predict, trained, folder, "--boxes", "whole", out=out)
    own = write_lines(out / "notes.txt", "mine")
    run(predict, trained, folder / "a.mp4", out=out)  # without boxes: the clip tasks alone
    assert "task ava labels persons and is left out" in capsys.readouterr().out
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {str(path.relative_to(out)) for path in files} == {
        "notes.txt", "predict.json", "clips-actions.csv", "clips-templates.csv", "annotated.mp4"
    }  # fmt: skip
    assert own.read_text() == "mine\n"
    record = json.loads((out / "predict.json").read_text())
    assert record["boxes"] is None and record["checkpoint"] == str(trained)
    with pytest.raises(ValueError, match="is the folder of a run"):
        run(predict, trained, folder / "a.mp4", out=trained.parent)
    outside = [write_lines(tmp_path / name, "mine") for name in ("one.csv", "two.csv")]
    record["files"] += ["../one.csv", str(outside[1])]  # a record that somebody changed
    (out / "predict.json").write_text(json.dumps(record))
    run(predict, trained, folder / "a.mp4", out=out)
    assert all(path.exists() for path in outside)
    (out / "predict.json").write_text("[]")
    with pytest.raises(ValueError, match="not written by predict"):
        run(predict, trained, folder / "a.mp4", out=out)


def test_the_results_of_another_checkpoint_are_refused_and_kept(folder, tmp_path, monkeypatch):
    """Of several videos they lie under the name of the run: recipes of imports have one name."""
    monkeypatch.chdir(tmp_path)
    films = [folder / "a.mp4", folder / "sub/b.mp4"]
    for name in ("one", "two"):
        assert predict.folder_for(films, f"{name}/best.pt") == f"predictions/{name}"
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert predict.folder_for(films, "best.pt") == "predictions/one"

    def write(checkpoint, out):
        options = argparse.Namespace(boxes=None, averaged=False, videos=["a.mp4"])
        return predict.Written(out, options, {"path": str(checkpoint)}, ["clips.csv"])

    out = tmp_path / "p"
    write_lines(write("best.pt", out).add("clips.csv"), "of one")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="p has the results of .*one/best.pt, not of .*two/best.p"):
        write(tmp_path / "two/best.pt", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    write(tmp_path / "one/best.pt", out)  # the same, from elsewhere
    assert not (out / "clips.csv").exists()
    write(tmp_path / "two/best.pt", out)  # nothing is lost


def test_files_of_others_are_refused_and_kept(trained, folder, tmp_path, monkeypatch):
    """What predict did not write, and what --boxes reads, though predict wrote it."""
    monkeypatch.setattr(persons, "load_detector", lambda *_: stand_in((0.9,)))
    film, out = folder / "a.mp4", tmp_path / "p"
    run(predict, trained, film, "--boxes", "detect", out=out)
    boxes, detections = (out / "boxes.csv").read_text(), (out / "detections.csv").read_text()
    run(predict, trained, film, "--boxes", out / "boxes.csv", out=out)  # reads it, keeps it
    assert (out / "boxes.csv").read_text() == boxes
    run(predict, trained, film, "--boxes", "detect", out=out)  # it is predict's still
    read_too = (out / "detections.csv", "--boxes reads")
    for name, (given, problem) in {
        "detections.csv": read_too,
        "clips-actions.csv": ("whole", "clips-actions.csv was not written by predict"),
        "annotated.mp4": ("whole", "annotated.mp4 was not written by predict"),
        "boxes.csv": ("detect", "boxes.csv was not written by predict"),
    }.items():
        if given in ("whole", "detect"):
            out = tmp_path / name
            write_lines(out / name, "mine")
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(ValueError, match=problem):
            run(predict, trained, film, "--boxes", given, out=out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert (tmp_path / "p/detections.csv").read_text() == detections


@pytest.mark.parametrize(
    "lines, places, said",
    [
        (["a.mp4,0.5,0.1,0.1,0.5,0.9,,0.95"], 1, ""),
        (['"a",0.5,0.1,0.1,0.5,0.9,,0.95'], 1, ""),
        (["a,0.5,0.1,0.1,0.5,0.9"], 1, ""),
        (["a,0.5,0.1,0.1,0.5,0.9,"], 1, ""),
        (["a;0,5;0,1;0,1;0,5;0,9;;0,95"], 1, ""),
        (["films\\a.mp4,0.5,0.1,0.1,0.5,0.9,,0.95"], 1, ""),
        (["video,second,x1,y1,x2,y2,label,score", "a,0.5,0.1,0.1,0.5,0.9,,0.95"], 1, ""),
        (["Video,Frame,X1,Y1,X2,Y2", "a,12,9.6,7.2,48,64.8"], 1, "pixels"),
        (["a,0.5,0.1,0.1,0.5,0.9,,0.9", "a,30,0.1,0.1,0.5,0.9,,0.9"], 1, "csv:2: time 30 s is not"),
        (["a,0.5,0.1,0.1,0.5,0.9,1,7", "a,0.5,0.1,0.1,0.5,0.9,4,7"], 1, ""),  # AVA's annotation
        (["a,0.5,0.1,0.1,0.5,0.9,,0.9", "a,1.5"], 1, ""),
        (["a,0.5,-0.3,0.1,0.5,0.9,,0.9"], 1, "reaches over the edge"),
        (
            ["a,0.5,0.1,0.1,0.5,0.9,,0.9", "b.mp4,1,0.1,0.1,0.5,0.9,,0.9"],
            1,
            "1 boxes of other videos, left out: 'b.mp4'",
        ),
    ],
)
def test_boxes_as_people_write_them(folder, tmp_path, capsys, lines, places, said):
    film = film_of(folder / "a.mp4")
    predict.read_boxes([film], write_lines(tmp_path / "boxes.csv", *lines), {0.0})
    (keyframe,) = film.keyframes.values()
    assert len(keyframe.people) == places and said in "".join(capsys.readouterr())
    left = 0.0 if "-0.3" in lines[0] else 0.1
    assert np.allclose(keyframe.people[0].box, [left, 0.1, 0.5, 0.9], atol=1e-6)
    assert abs(keyframe.time_sec - 0.5) < 0.03


def test_boxes_of_a_movie_meet_its_clips_as_in_training(folder, tmp_path):
    """AVA-Kinetics: the csv names the movie and its second, the file is ID_START_END."""
    rows = ["x_y,11.5,0.1,0.1,0.5,0.9,,0.9", "x_y,30,0.1,0.1,0.5,0.9,,0.9"]
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("x_y_000010_000013.mp4", "x_y_000100_000103.mp4"):
        (clips / name).symlink_to(folder / "a.mp4")
    films = [film_of(path) for path in sorted(clips.iterdir())]
    predict.read_boxes(films, write_lines(tmp_path / "boxes.csv", *rows), {0.0, 901.5})
    ((stamp, keyframe),) = films[0].keyframes.items()
    assert stamp == 11_500_000 and abs(keyframe.time_sec - 1.5) < 0.03 and not films[1].keyframes
    batch = SimpleNamespace(keys=[], boxes_source=np.zeros((1, 4)), scores=torch.ones(1))
    batch.box_clip, batch.valid = torch.zeros(1, dtype=torch.long), torch.ones(1)

    def model(dataset):
        batch.keys = [item.key for item in dataset.items]
        yield batch, torch.zeros(1, 2)

    task = data.Task("t", "box", train="t.csv", flip=0.0)
    found = predict.label_persons(model, task, ["p", "q"], films, 1, False)
    assert list(found) == [("x_y", 11_500_000)]  # as the annotations have it: it can be scored


def test_each_row_of_clips_is_of_its_own_stretch(tmp_path):
    """A film that brightens by 3 a frame: a clip's mean tells which frames the model saw."""

    def brighter(number, width, height):
        return np.full((height, width, 3), 3 * number, np.uint8)

    film = film_of(write_movie(tmp_path / "a.mp4", 80, rate=10, picture=brighter, **H264))
    task = data.Task("t", "clip", train="t.csv", frames=8, fps=10.0, stride=1, size=48, batch=4)
    task = dataclasses.replace(task, short_side=[48, 48], views=[1, 1])

    def brightness(dataset):
        for batch in data.evaluation_batches(dataset, 4):
            mean = batch.video.float().mean((1, 2, 3, 4)) / 100
            yield batch, torch.stack([mean, torch.zeros(len(mean))], 1)

    options = SimpleNamespace(every_sec=1.0, top=1)
    rows = predict.label_clips(brightness, task, ["p", "q"], [film], options, False)[::2]
    starts = np.array([float(row[1]) for row in rows])
    assert np.allclose(starts, np.arange(8) + 0.1)  # frame 4 of the 8 is in the middle of a second
    score = np.array([float(row[4]) for row in rows])
    seen = 100 * np.log(score / (1 - score)) / 3  # the mean number of its frames
    assert np.abs(seen - (10 * starts + 3.5)).max() < 0.6
    options.every_sec = 0.5  # the first and the last clip do not fit around their moments
    rows = predict.label_clips(brightness, task, ["p", "q"], [film], options, False)[::2]
    assert rows[0][1:3] == ["0.000", "0.800"] and rows[-1][1:3] == ["7.200", "8.000"]
    score = np.array([float(row[4]) for row in rows])
    seen = 100 * np.log(score / (1 - score)) / 3
    assert np.abs(seen[[0, -1]] - [3.5, 75.5]).max() < 0.6


def test_help_names_the_settings_that_count(capsys):
    with pytest.raises(SystemExit):
        cofinetune.main(["predict", "--help"])
    said = capsys.readouterr().out
    assert "too: --out, --device, --precision, --workers, --threads" in said
    assert "predictions/VIDEO; of several videos predictions/RUN" in said
    assert "train --help" not in said


@pytest.mark.parametrize(
    "lines, problem",
    [
        (["c.mp4,0.5,0.1,0.1,0.5,0.9,,0.95"], "no box of 'a', these are of 'c.mp4'"),
        (["a,30,0.1,0.1,0.5,0.9,,0.95"], "none of 1 boxes can be used: .*time 30 s is not within"),
        (["a,0.5,0.3,0.3,0.2,0.2", "a,1,0.3,0.3,0.2,0.2"], "x2 <= x1 or y2 <= y1 in 2 of 2"),
        (["video,time,x1,y1,x2,y2,score", "a,0.5,0.1,0.1,0.5,0.9,95"], "score 95 is not in"),
        (["a,0.5,0.1,0.1,0.5,word"], "csv:1: "),
        (["a,0.5,0.1"], "csv:1: 3 columns"),
        ([""], "no rows"),
    ],
)
def test_boxes_that_cannot_be_used_are_one_sentence(folder, tmp_path, lines, problem):
    film = film_of(folder / "a.mp4")
    with pytest.raises(ValueError, match=problem):
        predict.read_boxes([film], write_lines(tmp_path / "boxes.csv", *lines), {0.0})


def test_what_is_wrong_with_the_words_is_one_sentence(trained, folder, tmp_path, monkeypatch):
    film = folder / "a.mp4"
    out = dict(out=tmp_path / "p")
    for words, overrides, problem in (
        ((), dict(precision="fp16"), 'precision = "fp16" is not one of'),
        ((), dict(workers="x"), 'workers = "x" is not'),
        ((), {"task.ava.batch": 3}, "not --task.ava.batch"),
        (("--every-sec", 0), {}, "--every-sec 0: expected more than 0"),
        (("--top", 0), {}, "--top 0: expected 1 or more"),
        (("--boxes", tmp_path / "none.csv"), {}, "none.csv"),
        (("--averaged",), {}, "has no averaged weights; its recipe says ema = 0"),
    ):
        with pytest.raises((ValueError, OSError), match=problem):
            run(predict, trained, film, *words, **out, **overrides)
    with pytest.raises(OSError, match="none.mp4: no such video"):
        run(predict, trained, tmp_path / "none.mp4", **out)
    monkeypatch.setattr(
        persons, "load_detector", lambda *_: lambda picture: (np.zeros((0, 4)), np.zeros(0))
    )
    with pytest.raises(ValueError, match="the detector found nobody"):
        run(predict, trained, film, "--boxes", "detect", **out)


def test_a_box_model_says_the_three_ways(trained):
    recipe = checkpoints.recipe_of(checkpoints.load(trained), cofinetune.Recipe)
    clips = [task for task in recipe.task if task.kind == "clip"]
    recipe.task = [task for task in recipe.task if task.kind == "box"]
    with pytest.raises(ValueError, match="--boxes FILE.csv .* --boxes detect .* --boxes whole"):
        predict.tasks_of(recipe, None)
    recipe.task = clips
    with pytest.raises(ValueError, match="clip tasks only .*need no --boxes"):
        predict.tasks_of(recipe, "whole")


# ------------------------------------------------------------------------------------------------
# info
# ------------------------------------------------------------------------------------------------


def test_info_of_a_checkpoint(trained, capsys):
    run(info, trained)
    said = capsys.readouterr().out
    for words in (
        "this project",
        "8 frames of 48 x 48 px",
        f"actions (clip task), {len(ACTIONS)} classes",
    ):
        assert words in said
    assert "still, left, right" in said and "more (--classes)" in said
    run(info, trained.parent, "--classes")
    said = " ".join(capsys.readouterr().out.split())
    assert ", ".join(LABELS) in said
    with pytest.raises((ValueError, OSError)):
        run(info, trained.parent / "none.pt")


def test_info_of_another_family(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.VivitConfig(
        image_size=32,
        num_frames=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        id2label={0: "walk", 1: "run", 2: "jump"},
        label2id={"walk": 0, "run": 1, "jump": 2},
    )
    transformers.VivitForVideoClassification(config).save_pretrained(tmp_path / "vivit")
    capsys.readouterr()
    run(info, tmp_path / "vivit")
    said = " ".join(capsys.readouterr().out.split())
    assert "Hugging Face ViViT" in said and "8 frames of 32 x 32 px" in said
    assert "3 classes: walk, run, jump" in said and "no head, new ones begin untrained" in said
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        run(info, tmp_path)
