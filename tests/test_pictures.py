"""Tests of pictures.py."""

import zlib

import numpy as np
import pytest
from helpers import read_movie

import data
from extras import pictures


def test_boxes_and_labels_are_drawn():
    frame, colours = np.full((241, 321, 3), 200, np.uint8), [(0, 255, 0), (255, 0, 0), (0, 0, 255)]
    boxes = [[0.25, 0.5, 0.5, 0.75], [0.25, 0.5, 0.5, 0.75], [0.9, 0.95, 1.0, 1.0]]
    texts = [["true"], ["0.93 walk", "x" * 99], ["corner"]]
    drawn = pictures.draw_boxes(frame, boxes, texts, colours)
    assert (drawn[120:181, [80, 159]] == colours[1]).all()
    assert (drawn[[120, 180], 80:160] == colours[1]).all()
    for colour in colours:  # text of each, although two boxes are the same
        assert (drawn == colour).all(-1).sum() > 20
    assert (frame == 200).all()
    assert pictures.draw_boxes(frame[:48, :64], [], [], pictures.GREEN).shape == (240, 320, 3)
    for box in ([0.2, 0.2, 0.2, 0.2], [0, 0, 0.004, 0.004], [-1, -1, 2, 2], [1, 1, 1, 1]):
        assert pictures.draw_boxes(frame, [box], [["walk"]], pictures.GREEN).shape == frame.shape


@pytest.mark.parametrize("y", [0.0, 0.3, 0.9])
def test_labels_keep_clear_of_small_boxes(y):
    frame = np.full((240, 320, 3), 200, np.uint8)
    boxes = [[0.5, y, 0.54, y + 0.08], [0.5, y + 0.02, 0.54, y + 0.1]]
    drawn = pictures.draw_boxes(frame, boxes, [["talk to (a person)"], ["sit"]], pictures.GREEN)
    top, bottom = round((y + 0.03) * 240), round((y + 0.07) * 240)
    inside = drawn[top:bottom, 162:170]
    assert not (inside == pictures.DARK).all(-1).any()  # no ground of a text in it
    assert (drawn == pictures.DARK).all(-1).sum() > 500


def test_text():
    glyphs = pictures._glyphs()
    assert not glyphs[0].any() and len({glyph.tobytes() for glyph in glyphs}) == 95
    ink = pictures._ink
    assert np.array_equal(ink("caf\u00e9"), ink("cafe")) and np.array_equal(ink("\u8d70"), ink("?"))
    picture = np.full((40, 60, 3), 7, np.uint8)
    lines = ["own val", "a name that is longer than the picture"]
    titled = pictures.add_caption(picture, lines)
    assert titled.shape[0] > 40 + 3 * 10 and titled.shape[1:] == (60, 3)
    assert (titled[-40:] == 7).all() and (titled[:-40] == 255).any()


def test_curves_have_axes_with_names():
    series = {"loss": ([0, 1, 2, 3], [3.0, float("nan"), 1.0, 0.5]), "one": ([2], [2.0])}
    curves = pictures.draw_curves(series | {"none": ([], [])})
    line = (curves[30:] == pictures.CURVES[0]).all(-1)
    rows = [line[:, x].nonzero()[0].mean() for x in (80, 300, 600)]
    assert rows == sorted(rows)  # a falling loss falls
    assert pictures.draw_curves({}).shape == curves.shape
    named = pictures.draw_curves(series, "step", "loss")
    black = (named == 0).all(-1)
    assert black[-20:].sum() == pictures._ink("step").sum()  # below the axis
    assert np.array_equal(black[:, 1:10].sum(), pictures._ink("loss").sum())  # beside it, upright
    assert pictures.draw_curves(series, y_name="x" * 200).shape == curves.shape


def test_files_come_back_as_written(tmp_path):
    frame = np.full((241, 321, 3), 200, np.uint8)
    curves = pictures.draw_curves({"loss": ([0, 1], [2, 1])})
    sheet = pictures.grid([frame, curves, frame])
    pictures.write_png(tmp_path / "a.png", sheet)
    assert np.array_equal(read_movie(tmp_path / "a.png")[1][0], sheet)
    head = (tmp_path / "a.png").read_bytes()[12:33]
    assert zlib.crc32(head[:17]).to_bytes(4, "big") == head[17:]  # browsers look
    pictures.write_video(tmp_path / "a.mp4", (frame for _ in range(5)), 30000 / 1001)
    clip = data.decode_clip(tmp_path / "a.mp4", [0, 0.1])
    assert clip.shape == (2, 242, 322, 3) and np.abs(clip.astype(int) - 200).max() < 4
    with pytest.raises(ValueError, match="no frames"):
        pictures.write_video(tmp_path / "b.mp4", [], 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png"]
