"""Tests of pictures.py."""

import zlib

import numpy as np
import pytest
from helpers import read_movie

import data
from extras import pictures


def test_tools_pictures_come_back_as_drawn(tmp_path):
    frame, colours = np.full((241, 321, 3), 200, np.uint8), [(0, 255, 0), (255, 0, 0), (0, 0, 255)]
    boxes = [[0.25, 0.5, 0.5, 0.75], [0.25, 0.5, 0.5, 0.75], [0.9, 0.95, 1.0, 1.0]]
    texts = [["true"], ["0.93 walk", "x" * 99], ["corner"]]
    drawn = pictures.draw_boxes(frame, boxes, texts, colours)
    assert (drawn[120:181, [80, 159]] == colours[1]).all()
    assert (drawn[[120, 180], 80:160] == colours[1]).all()
    assert all((drawn == colour).all(-1).sum() > 20 for colour in colours) and (frame == 200).all()
    assert pictures.draw_boxes(frame[:48, :64], [], [], pictures.GREEN).shape == (240, 320, 3)
    glyphs = pictures._glyphs()
    assert not glyphs[0].any() and len({glyph.tobytes() for glyph in glyphs}) == 95
    series = {"loss": ([0, 1, 2, 3], [3.0, float("nan"), 1.0, 0.5]), "one": ([2], [2.0])}
    curves = pictures.draw_curves(series | {"none": ([], [])}, "run")
    line = (curves[30:] == pictures.CURVES[0]).all(-1)
    rows = [line[:, x].nonzero()[0].mean() for x in (80, 300, 600)]
    assert rows == sorted(rows)  # a falling loss falls
    assert pictures.draw_curves({}).shape == curves.shape
    pictures.write_png(tmp_path / "a.png", sheet := pictures.grid([drawn, curves, frame]))
    assert np.array_equal(read_movie(tmp_path / "a.png")[1][0], sheet)
    head = (tmp_path / "a.png").read_bytes()[12:33]
    assert zlib.crc32(head[:17]).to_bytes(4, "big") == head[17:]  # browsers look
    pictures.write_video(tmp_path / "a.mp4", (frame for _ in range(5)), 30000 / 1001)
    clip = data.decode_clip(tmp_path / "a.mp4", [0, 0.1])
    assert clip.shape == (2, 242, 322, 3) and np.abs(clip.astype(int) - 200).max() < 4
    with pytest.raises(ValueError, match="no frames"):
        pictures.write_video(tmp_path / "b.mp4", [], 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png"]
