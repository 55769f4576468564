"""Tests of extras/persons.py: the clock of its pictures, boxes that are known, files that go on."""

import argparse
import csv
import gc
import os
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from helpers import H264, MPEG4, write_lines, write_movie

import cofinetune
import data
from extras import persons
from extras.videos import frame_times

COLOUR = np.array([230, 200, 40])


def square_movie(path, rate=25, rotation=0, size=(96, 72), seconds=3, first=0, **options):
    """A square of 24 px on grey that crosses the upright picture from left to right in 4 s."""

    def stored(number, width, height):
        upright = np.full((size[1], size[0], 3), 60, np.uint8)
        x = round(square_at(number / rate, size)[0])
        upright[20:44, x : x + 24] = COLOUR
        return np.ascontiguousarray(np.rot90(upright, -rotation // 90))

    stored_size = size if rotation % 180 == 0 else size[::-1]
    options = dict(crf=16, preset="ultrafast") | options
    count = round(seconds * rate)
    return write_movie(path, count, rate=rate, rotation=rotation, picture=stored,
                       size=stored_size, start=first, **options)  # fmt: skip


def square_at(second, size=(96, 72)):
    """Its box in pixels."""
    x = (size[0] - 24) * second / 4
    return np.array([x, 20, x + 24, 44])


def stand_in(scores=(0.9,)):
    """A detector that finds the square, once for each score."""

    def detector(picture):
        y, x = np.nonzero(np.abs(picture.astype(int) - COLOUR).max(2) < 60)
        box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        return np.array([box] * len(scores), float), np.array(scores)

    return detector


def video(path):
    return persons.Video(path.stem, path, path.name)


def run(*words):
    parser = argparse.ArgumentParser()
    persons.add_options(parser)
    return persons.run(parser.parse_args([*map(str, words)]), {}, cofinetune)


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize(
    "options",
    [
        dict(H264),
        dict(MPEG4, container={"movflags": "faststart"}),
        dict(H264, start=91),
        dict(H264, rotation=-90),
        dict(H264, rotation=180),
        dict(H264, rate=Fraction(30000, 1001), suffix=".mkv"),
        dict(
            H264,
            pts=[0, 40, 50, 200, 210, 260, 900, 905, 1300] + [1400 + 33 * i for i in range(81)],
        ),
        dict(MPEG4, suffix=".avi"),
        dict(codec="mpeg2video", g=12, bf=2, suffix=".ts"),
    ],
    ids=["b-frames", "mpeg4", "late", "sideways", "upside-down", "mkv", "variable", "avi", "ts"],
)
def test_watch_shows_the_frames_of_decode_clip(tmp_path, options):
    options = dict(options)
    movie = write_movie(tmp_path / f"a{options.pop('suffix', '.mp4')}", **options)
    clock = frame_times(movie)
    end_sec = clock.end_sec
    for times in (clock.times_sec, np.arange(0.3, end_sec, 0.7), [0, 0, 0.5, 0.5, end_sec + 0.5]):
        seen = np.stack(list(persons.watch(movie, times)))
        assert (seen == data.decode_clip(movie, times)).all()


def test_watch_decodes_once_and_not_further_than_needed(tmp_path, decoded_frames):
    movie = write_movie(tmp_path / "a.mp4", 90, **H264)
    assert len(list(persons.watch(movie, np.arange(90) / 25))) == 90
    assert decoded_frames == [90]
    list(persons.watch(movie, [0.1, 1.0]))
    assert decoded_frames[1] < 30


def test_watch_keeps_no_frames(tmp_path):
    """Without the garbage collector: hundreds of 4K frames would wait for it."""
    movie = write_movie(tmp_path / "a.mp4", 90, **H264)
    gc.collect()
    gc.disable()
    try:
        for _ in persons.watch(movie, np.arange(90) / 25):
            pass
        frames = sum(isinstance(one, av.VideoFrame) for one in gc.get_objects())
    finally:
        gc.enable()
    assert frames < 5


def test_watch_names_what_cannot_be_read(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(data.DecodeError, match="a.mp4: Invalid data"):
        next(persons.watch(tmp_path / "a.mp4", [0.0]))


@pytest.mark.parametrize(
    "rate, rotation, size",
    [(25, 0, (96, 72)), (12, 0, (96, 72)), (25, -90, (72, 128)), (25, 90, (72, 128))],
)
def test_boxes_lie_where_the_person_is(tmp_path, rate, rotation, size):
    """Known places in [0, 1] of the upright picture, at the middles of the seconds."""
    movie = square_movie(tmp_path / "a.mp4", rate, rotation, size, first=7)
    rows = persons.find_persons(video(movie), stand_in(), 1.0, 0.5)
    assert [row[:2] for row in rows] == [["a", "0.5"], ["a", "1.5"], ["a", "2.5"]]
    for row in rows:
        shown = np.floor(float(row[1]) * rate) / rate  # the frame on screen began here
        expected = square_at(shown, size) / [*size, *size]
        assert np.abs(np.array(row[2:6], float) - expected).max() < 1.6 / min(size)
        assert row[6:] == ["", "0.9000"]


def test_the_csv_is_what_everything_reads(tmp_path, monkeypatch):
    square_movie(tmp_path / "in/a.mp4")
    square_movie(tmp_path / "in/deep/b, c.mp4", seconds=0.4)
    monkeypatch.setattr(persons, "load_detector", lambda *_: stand_in((0.95, 0.5, 0.49)))
    assert run(tmp_path / "in", tmp_path / "out/boxes.csv", "--every-sec", 0.75) == 0
    rows = read(tmp_path / "out/boxes.csv")
    assert [row[:2] + row[7:] for row in rows] == [
        ["a", second, score]
        for second in ("0.375", "1.125", "1.875", "2.625")
        for score in ("0.9500", "0.5000")
    ] + [["b, c", "0.2", "0.9500"], ["b, c", "0.2", "0.5000"]]
    found = data.read_boxes(write_without(rows, "b, c", tmp_path / "a.csv"), 3, True, {})
    assert [key for key in found] == [("a", t) for t in (375000, 1125000, 1875000, 2625000)]
    assert found["a", 375000][0].score == 0.95


def write_without(rows, name, path):
    path.write_text("".join(",".join(row) + "\n" for row in rows if row[0] != name))
    return path


def test_a_video_without_persons_and_boxes_of_no_extent(tmp_path):
    movie = square_movie(tmp_path / "a.mp4")

    def nobody(picture):
        return np.zeros((0, 4)), np.zeros(0)

    def thin(picture):
        return np.array([[5, 5, 5.4, 60], [-20, -10, 30, 500], [97, 3, 120, 9]]), np.ones(3)

    assert persons.find_persons(video(movie), nobody, 1.0, 0.5) == [["a", "0.5"]]
    rows = persons.find_persons(video(movie), thin, 3.0, 0.5)
    assert rows == [["a", "1.5", "0.0000", "0.0000", "0.3125", "1.0000", "", "1.0000"]]


def test_a_folder_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    for name in "abc":
        square_movie(tmp_path / f"in/{name}.mp4", seconds=1)
    (tmp_path / "in/b.mp4").write_bytes(b"no video")
    looked = []

    def stopping(picture):
        looked.append(1)
        if len(looked) == 2:
            raise KeyboardInterrupt
        return stand_in()(picture)

    monkeypatch.setattr(persons, "load_detector", lambda *_: stopping)
    out = tmp_path / "boxes.csv"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", out)
    before = out.read_bytes()
    assert {row[0] for row in read(out)} == {"a"}
    assert run(tmp_path / "in", out) == 1  # b cannot be read
    assert out.read_bytes().startswith(before) and {row[0] for row in read(out)} == {"a", "c"}
    said = capsys.readouterr()
    assert "1 of 3 videos have rows" in said.out and "left out" in said.err and "b.mp4" in said.err
    (tmp_path / "in/b.mp4").unlink()
    assert run(tmp_path / "in", out) == 0 and len(looked) == 3  # nothing is left to look at


@pytest.mark.parametrize(
    "line, lines",
    [
        (1, ["video,time_sec,x1,y1,x2,y2,label,person", "b,1,0,0,1,1,walk,1"]),
        (1, ["video,second,x1,y1,x2,y2,,score"]),
        (1, ["b,0902,0.1,0.1,0.9,0.9,80,1"]),
        (2, ["b,1,0,0,1,1,,0.9", "b,1,0,0,1,1"]),
        (1, ["only words"]),
    ],
)
def test_a_file_of_others_is_refused_and_kept(tmp_path, monkeypatch, line, lines):
    (tmp_path / "a.mp4").touch()
    out = write_lines(tmp_path / "labels.csv", *lines)
    before = out.read_bytes()
    monkeypatch.setattr(persons, "load_detector", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"labels.csv:{line}: expected a detection, video,"):
        run(tmp_path / "a.mp4", out)
    assert out.read_bytes() == before


def test_a_failing_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "boxes.csv"
    persons.append(out, [["a", "1", "0", "0", "1", "1", "", "1"]])
    before = out.read_bytes()
    write, room = os.write, [9]

    def nearly_full(number, content):
        """As the system does it: what fits is written, then there is no room."""
        if not room:
            raise OSError("No space left on device")
        return write(number, content[: room.pop()])

    monkeypatch.setattr(persons.os, "write", nearly_full)
    with pytest.raises(OSError, match="No space"):
        persons.append(out, [["b", "1", "0", "0", "1", "1", "", "1"]])
    assert out.read_bytes() == before and [*tmp_path.iterdir()] == [out]


def test_a_kill_within_a_write_leaves_whole_videos_to_the_next_run(tmp_path, monkeypatch):
    """Wherever the rows of a video are cut: none of them stays, and it is looked at again."""
    monkeypatch.setattr(persons, "load_detector", lambda *_: stand_in())
    for name in "ab":
        square_movie(tmp_path / f"in/{name}.mp4", seconds=2)
    out = tmp_path / "boxes.csv"
    run(tmp_path / "in/a.mp4", out)
    before = out.read_bytes()
    write = os.write
    for count in (0, 1, 40, 10_000):  # bytes; the last: all of them, and the end is not noted

        def killed(number, content, count=count):
            write(number, content[:count])
            os._exit(9)

        child = os.fork()
        if child == 0:
            persons.os.write = killed
            run(tmp_path / "in", out)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert len(out.read_bytes()) == len(before) + min(count, 84)
        assert run(tmp_path / "in", out) == 0
        rows = read(out)
        assert [row[0] for row in rows] == ["a", "a", "b", "b"]
        assert {len(row) for row in rows} == {8} and out.read_bytes().startswith(before)
        assert {path.name for path in tmp_path.iterdir()} == {"in", "boxes.csv"}
        out.write_bytes(before)


def test_a_video_costs_its_own_rows_however_long_the_csv_is(tmp_path, monkeypatch):
    out, written, write = tmp_path / "boxes.csv", [], os.write
    out.write_text("mine,1,0,0,1,1,,1")  # without an end of line, as some editors leave it

    def counting(number, content):
        written.append(len(content))
        return write(number, content)

    monkeypatch.setattr(persons.os, "write", counting)
    for number in range(50):
        persons.append(out, [[f"v{number}", "1", "0", "0", "1", "1", "", "1"]])
    assert len(read(out)) == 51 and {len(row) for row in read(out)} == {8}
    assert max(written) < 30


def test_names_are_those_of_import(tmp_path):
    for name in ("a.mp4", "x/b.mp4", "y/b.mp4", "y/c.MOV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = persons.find_videos([str(tmp_path)])
    assert {one.name: one.listed for one in found} == {
        "a": "a.mp4", "x/b": "x/b.mp4", "y/b": "y/b.mp4", "c": "y/c.MOV"
    }  # fmt: skip
    assert all(one.file == tmp_path / one.listed for one in found)
    (tmp_path / "z").mkdir()
    for sources, problem in (
        ([str(tmp_path / "z")], "no video in this folder"),
        ([str(tmp_path / "no.mp4")], "no.mp4: no such video"),
        ([str(tmp_path / "x/b.mp4"), str(tmp_path / "y/b.mp4")], "one at a time"),
    ):
        with pytest.raises((ValueError, OSError), match=problem):
            persons.find_videos(sources)


def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch):
    movie = square_movie(tmp_path / "a.mp4", seconds=1)
    out = tmp_path / "boxes.csv"
    for words, problem in (
        ((movie, out, "--every-sec", 0), "--every-sec 0: expected more than 0"),
        ((movie, out, "--every-sec", "nan"), "--every-sec nan: expected more than 0"),
        ((movie, out, "--min-score", 50), "--min-score 50: expected 0 to 1"),
        ((movie, movie), "expected the csv to write"),
    ):
        with pytest.raises(ValueError, match=problem):
            run(*words)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match="pip install torchvision"):
        run(movie, out)
    assert not out.exists()
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="bad.pth: not a readable torch.save file"):
        persons.read_weights(str(bad))


def test_a_detector_of_torchvision(tmp_path):
    """Form, scale and file of weights, without a download: the weights are random."""
    pytest.importorskip("torchvision")
    import torch
    from torchvision.models import get_model

    name = "ssdlite320_mobilenet_v3_large"
    torch.manual_seed(0)
    network = get_model(name, weights=None, weights_backbone=None)
    for layer in network.head.classification_head.module_list:
        layer[1].bias.data.view(-1, 91)[:, [persons.PERSON, 3]] += 3  # else others would win
    torch.save({"model": network.state_dict()}, tmp_path / "weights.pth")
    detector = persons.load_detector(name, str(tmp_path / "weights.pth"), "cpu")
    picture = square_movie(tmp_path / "a.mp4", seconds=1)
    image = data.decode_clip(picture, [0.5])[0]
    boxes, scores = detector(image)
    with torch.no_grad():
        raw = network.eval()([torch.from_numpy(image).permute(2, 0, 1) / 255])[0]
    person = raw["labels"] == 1
    assert not person.all() and np.allclose(boxes, raw["boxes"][person])
    assert boxes.shape == (len(scores), 4) and len(scores) > 0
    assert (boxes >= 0).all() and (boxes <= [96, 72, 96, 72]).all() and boxes.max() > 20
    rows = persons.find_persons(video(picture), detector, 0.5, 0.0)
    assert {row[1] for row in rows} == {"0.25", "0.75"} and len(rows[0]) == 8
    other = "fasterrcnn_mobilenet_v3_large_320_fpn"
    for words, problem in (
        (("nobody", None), "--detector nobody is not one of"),
        ((name, "x.pth"), "x.pth: does not exist"),
        ((other, str(tmp_path / "weights.pth")), f"not those of a {other}, it lacks"),
    ):
        with pytest.raises((ValueError, OSError), match=problem):
            persons.load_detector(*words, "cpu")


@pytest.fixture
def decoded_frames(monkeypatch):
    """How many frames were decoded from each file that was opened."""
    counts, really = [], data.frames_in_order

    def counting(stream):
        counts.append(0)
        for pair in really(stream):
            counts[-1] += 1
            yield pair

    monkeypatch.setattr(data, "frames_in_order", counting)
    return counts
