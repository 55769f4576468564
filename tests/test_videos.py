"""Tests of extras/videos.py: check, prepare, show."""

import argparse
import os
import re
import shutil
import unicodedata
from fractions import Fraction

import av
import numpy as np
import pytest
from helpers import H264, MPEG4, movie_number, read_movie, write_lines, write_movie

import cofinetune
import data
from extras import pictures, videos
from extras.recipe import read_tasks

MPEG2 = dict(codec="mpeg2video", g=12, bf=2)


@pytest.fixture
def run(capsys):
    """A command as the door calls it: what it printed; its exit code is `code`."""

    def run(command, *words, code=0):
        parser = argparse.ArgumentParser()
        add_options, run_command = videos.COMMANDS[command]
        add_options(parser)
        options = parser.parse_args([str(word) for word in words])
        assert run_command(options, {}, cofinetune) == code, capsys.readouterr()
        return "".join(capsys.readouterr())

    return run


def numbers(path, times):
    return [int(movie_number(image)) for image in data.decode_clip(path, times)]


def clip_recipe(folder, videos, *lines, val=()):
    write_lines(folder / "train.txt", *lines)
    parts = ['train = "train.txt"']
    if val:
        write_lines(folder / "val.txt", *val)
        parts.append('val = "val.txt"')
    text = ["[[task]]", 'name = "t"', 'kind = "clip"', *parts, f'videos = "{videos}"']
    return write_lines(folder / "recipe.toml", *text)


# the times of frames --------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.mp4", H264),
        ("late.mp4", dict(H264, start=50)),
        ("a.webm", dict(codec="libvpx-vp9", g=24, deadline="realtime")),
        ("b.avi", MPEG4),
        ("nob.avi", dict(H264, bf=0)),
        ("a.ts", H264),
        ("a.vob", MPEG2),
        ("a.h264", H264),
        ("a.m2v", MPEG2),
    ],
)
def test_videos_frame_times(name, codec, decode, tmp_path):
    path = write_movie(tmp_path / name, 40, **codec)
    clock = videos.frame_times(path, decode)
    assert np.allclose(clock.times_sec, np.arange(40) / 25, atol=1e-3)
    assert (clock.width, clock.height) == (96, 64)
    assert clock.end_sec == pytest.approx(1.6, abs=0.002)


def test_videos_frame_times_of_variable_rates_joined_and_interrupted_files(tmp_path):
    pts = [0, 40, 200, 210, 900, 960]
    path = write_movie(tmp_path / "gaps.mkv", 6, pts=pts, **H264)
    assert np.allclose(videos.frame_times(path).times_sec, np.array(pts) / 1000)
    gap = write_movie(tmp_path / "gap.avi", 6, pts=[0, 40, 80, 400, 440, 480], codec="mpeg4")
    assert np.allclose(videos.frame_times(gap).times_sec, [0, 0.04, 0.08, 0.4, 0.44, 0.48])
    part = write_movie(tmp_path / "a.ts", 50, **H264)
    for name, count in (("two.ts", 2), ("three.ts", 3)):
        (tmp_path / name).write_bytes(part.read_bytes() * count)
        clock = videos.frame_times(tmp_path / name)
        assert np.allclose(clock.times_sec, np.arange(50 * count) / 25)
        assert clock.end_sec == pytest.approx(2 * count)
    turned = write_movie(tmp_path / "turned.mp4", 6, rotation=90, aspect=Fraction(2, 1), **H264)
    clock = videos.frame_times(turned)  # stored pixels, as annotation tools count
    assert (clock.width, clock.height) == (64, 96)
    whole = write_movie(tmp_path / "whole.mp4", 250, container={"movflags": "faststart"}, **H264)
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[: len(whole.read_bytes()) // 2])
    with pytest.raises(data.DecodeError, match=r"half.mp4: breaks off at \d.\d of 10.0 s"):
        videos.frame_times(tmp_path / "half.mp4")


# check ----------------------------------------------------------------------------------------


def test_videos_check_finds_damage(tmp_path, run):
    folder = tmp_path / "videos"
    good = write_movie(folder / "good.mp4", 250, container={"movflags": "faststart"}, **H264)
    content = good.read_bytes()
    (folder / "half.mp4").write_bytes(content[: len(content) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    middle = len(content) * 2 // 3
    (folder / "zeros.mp4").write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])
    one = write_movie(folder / "one.mkv", 50, **H264)
    (folder / "two.mkv").write_bytes(one.read_bytes() * 2)
    one = write_movie(folder / "one.avi", 50, **MPEG4)
    (folder / "two.avi").write_bytes(one.read_bytes() * 2)
    printed = run("check", folder, code=1)
    assert "8 videos, 5 problems" in printed
    assert "two.avi: lasts 4.0 s, its header says 2.0 s" in printed
    assert "two.mkv: its clock starts anew" in printed and "`prepare`" in printed
    for name in ("half.mp4", "empty.mp4", "zeros.mp4"):
        assert f"{folder / name}: " in printed
    recipe = clip_recipe(tmp_path, folder, "half.mp4 a", "good.mp4 b", "gone.mp4 b")
    found = run("check", recipe, code=1)
    assert re.search("gone.* is missing", found) and f"{folder / 'half.mp4'}: " in found
    assert "2 videos, 2 problems" in found
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: no videos there"):
        videos.check(tmp_path / "none", 1, cofinetune.Recipe)


def test_videos_check_says_what_is_slow(tmp_path, run, monkeypatch):
    for name in ("short.avi", "b.mp4"):
        write_movie(tmp_path / name, 30, **MPEG4)
    for name in ("long.avi", "long.mp4"):
        write_movie(tmp_path / name, 60, **MPEG4)
    monkeypatch.setattr(videos, "LONG_SEC", 2)
    printed = run("check", tmp_path)
    assert "1 long videos are decoded from their start" in printed and "is " in printed
    assert f"the first is {tmp_path / 'long.avi'}" in printed and "0 problems" in printed


def test_videos_check_names_keyframes_outside_and_videos_in_both_parts(tmp_path, run):
    folder = tmp_path / "videos"
    for name in "abc":
        write_movie(folder / f"{name}.mp4", 50, **H264)
    os.symlink("a.mp4", folder / "d.mp4")
    os.link(folder / "a.mp4", folder / "e.mp4")
    train, val = ["a.mp4 x", "b.mp4 y"], ["b.mp4 y", "c.mp4 x", "d.mp4 x", "e.mp4 x"]
    printed = run("check", clip_recipe(tmp_path, folder, *train, val=val), code=1)
    assert re.search(r"t: 2 of the 3 videos .*validat.* train.* the first is .*b.mp4", printed)
    assert "5 videos, 1 problems" in printed
    assert printed == run("check", tmp_path, code=1)  # the folder that import wrote
    assert "0 problems" in run("check", clip_recipe(tmp_path, folder, *train, val=val[1:2]))
    write_lines(tmp_path / "l.pbtxt", 'item { name: "x" id: 1 }')
    box = "0.1,0.1,0.5,0.9,1,0"
    write_lines(tmp_path / "t.csv", f"a,1.9,{box}", f"a,2.5,{box}", f"b,1,{box}")
    text = '[[task]]\nname = "t"\nkind = "box"\ntrain = "t.csv"\nlabels = "l.pbtxt"\nflip = 0.0'
    recipe = write_lines(tmp_path / "r.toml", text, 'videos = "videos"')
    printed = run("check", recipe, code=1)
    assert "a.mp4: 1 keyframes are outside its 2.000 s, the first at 2.500 s" in printed


def test_videos_check_reads_the_whole_recipe(tmp_path, run):
    """What training refuses at once; swapped coordinates; classes that nobody can learn."""
    write_movie(tmp_path / "videos/a.mp4", 50, **H264)
    write_lines(tmp_path / "l.pbtxt", *(f'item {{ name: "c{i}" id: {i} }}' for i in range(1, 9)))
    box, swapped = "0.1,0.1,0.5,0.9,1,0", "0.5,0.1,0.1,0.9,8,0"
    write_lines(tmp_path / "t.csv", f"a,1,{box}", f"a,1.5,{box}")
    text = '[[task]]\nname = "t"\nkind = "box"\ntrain = "t.csv"\nlabels = "l.pbtxt"\nflip = 0.0'
    task = text.split("\n") + ['videos = "videos"']
    for wrong, said in (
        ("step = 2", "unknown key 'step', did you mean"),
        ('model = {arch = "tinny"}', "arch = 'tinny' is not one of"),
        ('method = "selfdistil"\nmethod_options = {refresh = -1}', "refresh = -1, expected"),
    ):
        printed = run("check", write_lines(tmp_path / "r.toml", wrong, *task), code=1)
        assert said in printed and "1 videos, 1 problems" in printed
    recipe = write_lines(tmp_path / "r.toml", *task)
    printed = run("check", recipe)
    assert "t: no training box of c2, c3, c4, c5, c6 and 2 more\n" in printed
    write_lines(tmp_path / "t.csv", f"a,1,{box}", f"a,1.5,{swapped}")
    assert "t.csv: 1 boxes are empty, expected x1 < x2" in run("check", recipe, code=1)
    printed = run("check", write_lines(tmp_path / "r.toml", *task, 'val = "no.csv"'), code=1)
    assert printed.count("no.csv") == 1 and "0 videos, 1 problems" in printed


def test_videos_check_believes_what_training_can_read(tmp_path, run):
    """A gap of an AVI, a raw stream, two broadcasts in one, a name with a colon: no problems."""
    folder = tmp_path / "videos"
    shown = [*range(10), *range(20, 50)]
    write_movie(folder / "gap.avi", 40, pts=[i * 40 for i in shown], codec="mpeg4")
    write_movie(folder / "raw.h264", 50, **H264).rename(folder / "raw.mp4")
    part = write_movie(tmp_path / "a.ts", 50, **H264)
    (folder / "two.ts").write_bytes(part.read_bytes() * 2)
    write_movie(tmp_path / "b.mp4", 50, **H264).rename(folder / "2024-05-01T10:00:00.mp4")
    write_lines(tmp_path / "l.pbtxt", 'item { name: "x" id: 1 }')
    box = "0.1,0.1,0.5,0.9,1,0"
    rows = [f"gap,1.9,{box}", f"raw,1.9,{box}", f"two,3.9,{box}"]
    write_lines(tmp_path / "t.csv", *rows, f"2024-05-01T10:00:00,1.9,{box}")
    text = '[[task]]\nname = "t"\nkind = "box"\ntrain = "t.csv"\nlabels = "l.pbtxt"\nflip = 0.0'
    recipe = write_lines(tmp_path / "r.toml", text, 'videos = "videos"')
    assert "4 videos, 0 problems" in run("check", recipe)
    ((task, root),) = read_tasks(recipe)
    dataset = data.open_task(task, root)
    for index in range(len(dataset)):
        assert data.evaluation_sample(dataset.task, dataset.items[index]).video is not None


# prepare --------------------------------------------------------------------------------------

SOURCES = {
    "slow.mp4": dict(H264, rate=12),
    "phone.mp4": dict(H264, rotation=-90),
    "front.mp4": dict(H264, rotation=90, mirror=(True, False)),
    "full.mp4": dict(H264, pix_fmt="yuvj420p"),
    "sub/fast.mp4": dict(H264, rate=60, start=91, container={"movie_timescale": "90000"}),
    "ntsc.mkv": dict(H264, rate=Fraction(30000, 1001)),
    "drops.avi": dict(codec="mpeg4", pts=[40 * (i + 10 * (i > 20)) for i in range(60)]),
    "raw.h264": dict(H264, rate=30),
    "dvd.vob": dict(MPEG2, aspect=Fraction(3, 2)),
}


def test_videos_prepare_keeps_every_time(tmp_path, run):
    source, target = tmp_path / "videos", tmp_path / "small"
    for name, options in SOURCES.items():
        write_movie(source / name, 60, size=(128, 96), **options)
    if "raw.h264" not in data.list_videos(source):
        (source / "raw.h264").rename(source / "raw.mp4")
    sources = sorted(data.list_videos(source))
    assert len(sources) == len(SOURCES)
    run("prepare", source, target, "--short-side", 48, "--keyframe-sec", 0.5, "--workers", 2)
    for name in sources:
        before, after = source / name, (target / name).with_suffix(".mp4")
        times = videos.frame_times(before).times_sec
        assert np.abs(videos.frame_times(after).times_sec - times).max() < 1e-6, name
        if name in ("slow.mp4", "sub/fast.mp4", "ntsc.mkv"):  # exact fractions, the late start too
            assert read_movie(before)[0] == read_movie(after)[0], name
        with av.open(str(after)) as file:
            stream = file.streams.video[0]
            assert min(stream.width, stream.height) == 48, name
            keys = [frame.time for frame in file.decode(stream) if frame.key_frame]
        assert max(np.diff(keys)) < 0.5 + 0.45, name  # drops.avi has a gap of 0.4 s
        wanted = np.arange(0.05, times[-1], 0.31)
        shape = data.decode_clip(before, wanted, short_side=48).shape
        assert data.decode_clip(after, wanted, short_side=48).shape == shape, name
        old, new = (data.decode_clip(path, wanted, size=(48, 64)) for path in (before, after))
        assert np.abs(old.astype(float) - new).mean((1, 2, 3)).max() < 4, name
    first = {path: path.stat().st_mtime_ns for path in target.rglob("*.mp4")}
    half = source / "half.mp4"
    half.write_bytes((source / "slow.mp4").read_bytes()[:3000])
    again = run("prepare", source, target, code=1)
    assert f"0 prepared, {len(SOURCES)} were there, 1 left out" in again and f"{half}: " in again
    there = [path for path in target.rglob("*") if path.is_file()]
    assert first == {path: path.stat().st_mtime_ns for path in there}


def test_videos_prepare_makes_frames_that_can_be_skipped(tmp_path, run):
    write_movie(tmp_path / "videos/a.mp4", 100, **H264)
    run("prepare", tmp_path / "videos", tmp_path / "out")
    path = tmp_path / "out/a.mp4"
    with data.open_stream(path) as stream:
        stream.codec_context.skip_frame = "NONREF"
        assert sum(1 for _ in stream.container.decode(stream)) < 25
    assert numbers(path, np.arange(100) / 25) == [*range(100)]


def test_videos_prepare_gives_joined_recordings_one_clock(tmp_path, run):
    folder = tmp_path / "videos"
    for suffix, codec in (("ts", H264), ("mkv", H264), ("vob", MPEG2)):
        part = write_movie(tmp_path / f"a.{suffix}", 50, **codec)
        (folder / suffix).mkdir(parents=True)
        (folder / suffix / f"two.{suffix}").write_bytes(part.read_bytes() * 2)
    run("prepare", folder, tmp_path / "out")
    for suffix in ("ts", "mkv", "vob"):
        path = tmp_path / "out" / suffix / "two.mp4"
        assert numbers(path, np.arange(100) / 25) == [*range(50), *range(50)]
    assert "3 videos, 0 problems" in run("check", tmp_path / "out")


def test_videos_prepare_goes_on_after_names_it_cannot_write(tmp_path, run):
    source, target = tmp_path / "videos", tmp_path / "out"
    movie = write_movie(tmp_path / "a.mp4", 5, **H264)
    stream = write_movie(tmp_path / "a.ts", 5, **H264)
    (source / "sub").mkdir(parents=True)
    fine = ["长" * 83 + ".mp4", "x" * 251 + ".mp4", "a:b.mp4", "sub/%d.mp4", "-.mp4"]
    for name in fine:
        shutil.copy(movie, source / name)
    long = "y" * 252  # as .mp4 a byte too many
    shutil.copy(stream, source / f"{long}.ts")
    shutil.copy(movie, source / "same.mp4")
    shutil.copy(stream, source / "same.ts")
    for workers in (1, 2):
        printed = run("prepare", source, target, "--workers", workers, code=1)
        assert "2 left out" in printed and f"{long}.ts: File name too long" in printed
        assert re.search("same.ts: .*same.mp4 becomes .*same.mp4 too", printed)
        there = [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()]
        there = [unicodedata.normalize("NFC", name) for name in there]
        assert sorted(there) == sorted([*fine, "same.mp4"])


def test_videos_prepare_leaves_nothing_half_written(tmp_path, run):
    source = tmp_path / "videos"
    content = write_movie(source / "a.mp4", 90, **H264).read_bytes()
    (source / "a.mp4").write_bytes(content[:-4000] + bytes(4000))
    run("prepare", source, tmp_path / "out", code=1)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    with pytest.raises(ValueError, match="no videos there that are not in"):
        videos.prepare(tmp_path / "out", tmp_path / "more", 320, 1.0, 1)


def test_videos_prepare_blames_the_folder_that_is_wrong(tmp_path, monkeypatch):
    """In one sentence, not each of its videos."""
    movie = write_movie(tmp_path / "videos/a.mp4", 5, **H264)
    target = tmp_path / "out"

    def prepare(source, target):
        return videos.prepare(source, target, 320, 1.0, 1)

    for source, to, message in (
        (tmp_path / "none", target, "none: not there, expected a folder of videos"),
        (movie, target, "a.mp4: a file, expected a folder of videos"),
        (tmp_path / "videos", movie, "a.mp4: a file, expected the folder to write"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(source, to)
    with pytest.raises(OSError, match="Not a directory: .*a.mp4/out"):
        prepare(tmp_path / "videos", movie / "out")
    assert not target.exists()
    assert prepare(tmp_path / "videos", target)
    monkeypatch.setattr(videos.os, "access", lambda *_: False)  # of root, all is writable
    assert prepare(tmp_path / "videos", target)  # nothing is to be written
    with pytest.raises(PermissionError, match="more: nothing can be written into this folder"):
        prepare(tmp_path / "videos", tmp_path / "more")


# show, and the words of the commands ----------------------------------------------------------


def test_videos_show_draws_tasks_and_folders(tmp_path, run):
    folder = tmp_path / "videos"
    for name in "abc":
        write_movie(folder / f"{name}.mp4", 50, **H264)
    write_lines(folder / "damaged.mp4", "no video")
    assert "3 pictures" in run("show", folder, "--out", tmp_path / "a.png")
    assert read_movie(tmp_path / "a.png")[1].shape[0] == 1
    recipe = clip_recipe(tmp_path, folder, "a.mp4 x", "b.mp4 y", "damaged.mp4 y")
    printed = run("show", recipe, "--out", tmp_path / "b.png", "--count", 3)
    assert "2 pictures" in printed and "left out: " in printed
    drawn = read_movie(tmp_path / "b.png")[1][0]
    assert (drawn == pictures.GREEN).all(-1).sum() > 500
    (tmp_path / "none").mkdir()
    for source, message in ((tmp_path / "none", "no videos there"), (folder / "x", "x")):
        with pytest.raises((ValueError, OSError), match=message):
            videos.show(source, tmp_path / "c.png", 3)


@pytest.mark.parametrize(
    "words, message",
    [
        (("check", "r.toml", "--workers", "0"), "--workers 0, expected 1 or more"),
        (("prepare", "a", "b", "--short-side", "1"), "--short-side 1, expected 2 or more"),
        (("prepare", "a", "b", "--keyframe-sec", "nan"), "--keyframe-sec nan, expected"),
        (("show", "r.toml", "--count", "0"), "--count 0, expected 1 or more"),
    ],
)
def test_videos_commands_refuse_what_cannot_be(words, message, run):
    with pytest.raises(ValueError, match=message):
        run(*words)
