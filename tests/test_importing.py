"""Tests of import: importing, sources, annotations, annotation_tools; formats.Videos."""

import argparse
import csv
import errno
import json
import os
import re
import shutil
import textwrap
import time
import unicodedata
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import HERE, run_here, write_lines, write_movie

import data
from extras import annotation_tools, annotations, formats, importing, sources
from extras.annotations import Library, Mark
from extras.recipe import read_tasks
from extras.videos import FrameTimes

OWN_VIDEOS = {  # file: (fps, rotation mark, upright width and height)
    "slow.mp4": (12, 0, (96, 72)),
    "pal.mp4": (25, 0, (96, 72)),
    "phone.mp4": (25, -90, (72, 128)),
    "phone2.mp4": (25, 90, (72, 128)),
    "sub/fast.mp4": (60, 0, (96, 72)),
    "ntsc.mkv": (Fraction(30000, 1001), 0, (128, 72)),
}
OWN_TIMES = (0.5, 1.37, 2.0, 3.251)
HEADER = "video,time_sec,x1,y1,x2,y2,label"


def own_box(time_sec: float, size: tuple[int, int]) -> list[float]:
    """Where the square of own_video is, in upright pixels: it crosses in four seconds."""
    x = (size[0] - 24) * time_sec / 4
    return [x, 20, x + 24, 44]


def own_video(path: Path, rate: float, rotation: int, size: tuple[int, int]) -> None:
    """pal.mp4 has the full colour range, fast.mp4 begins at 91/60 s on its clock."""

    def stored(number: int, width: int, height: int) -> np.ndarray:
        upright = np.full((size[1], size[0], 3), 60, np.uint8)
        x = round(own_box(number / rate, size)[0])
        upright[20:44, x : x + 24] = 230, 200, 40
        return np.ascontiguousarray(np.rot90(upright, -rotation // 90))

    write_movie(
        path,
        round(4 * rate),
        rate=rate,
        rotation=rotation,
        picture=stored,
        crf=16,
        size=size if rotation == 0 else size[::-1],
        preset="ultrafast",
        pix_fmt="yuvj420p" if path.stem == "pal" else "yuv420p",
        start=91 * (path.stem == "fast"),
        container={"movie_timescale": "90000"} if path.suffix == ".mp4" else {},
    )


@pytest.fixture(scope="module")
def own_world(tmp_path_factory) -> Path:
    """Videos of many rates and orientations, and a csv in px with mistakes in its last lines."""
    folder = tmp_path_factory.mktemp("own")
    rows = [f"{HEADER},person"]
    for i, (name, (fps, rotation, size)) in enumerate(OWN_VIDEOS.items()):
        own_video(folder / "videos" / name, fps, rotation, size)
        for time_sec in OWN_TIMES:
            corners = ",".join(f"{value:.3f}" for value in own_box(time_sec, size))
            label = ["walk", "pick up"][(i + int(time_sec)) % 2]
            rows.append(f"{Path(name).name},{time_sec},{corners},{label},p{i}")
        rows.append(f"{Path(name).stem},2.0,{corners},{'Pick_Up' if i == 0 else ''},q")
    rows += [
        "nobody.mp4,1,0,0,5,5,walk,",
        "slow.mp4,4.5,0,0,5,5,walk,",
        "slow.mp4,3,200,0,250,50,walk,",
        "slow.mp4,3,-20,0,50,50,jump,",
    ]
    (folder / "labels.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")  # as Excel
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """Two seconds, 50 frames; linked wherever a test needs a video."""
    return write_movie(tmp_path_factory.mktemp("clip") / "clip.mp4", 50, preset="ultrafast")


@pytest.fixture
def place_clips(clip, tmp_path):
    """Links to the clip, in tmp_path / "videos" by default."""

    def place(*names: str, folder: Path = tmp_path / "videos") -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(clip)
        return folder

    return place


@pytest.fixture
def own_import(capsys):
    """`import` as typed; -> what it prints. A refusal is raised."""

    def run(*words) -> str:
        parser = argparse.ArgumentParser()
        importing.add_options(parser)
        importing.run(parser.parse_args([str(word) for word in words]), {}, None)
        return capsys.readouterr().out

    return run


def open_parts(target: Path) -> list[data.Dataset]:
    """train and val of the recipe of an import."""
    ((task, root),) = read_tasks(target / "recipe.toml")
    return [data.open_task(task, root, part, formats) for part in ("train", "val")]


def problems_in(printed: str) -> list[str]:
    """Without those on classes of a single video."""
    lines = [line for line in printed.splitlines() if line.startswith("problem: ")]
    return [line for line in lines if "is only in" not in line]


def videos_of(dataset: data.Dataset, folder: Path) -> set[str]:
    return {os.path.relpath(item.path, folder) for item in dataset.items}


def parts_of(target: Path) -> dict[str, str]:
    """file -> part, of an import."""
    lines = (target / "split.csv").read_text(encoding="utf-8").splitlines()[1:]
    return dict(line.rsplit(",", 1) for line in lines)


# ------------------------------------------------------------------------------------------------
# Own csv
# ------------------------------------------------------------------------------------------------


def yellow_box(picture: np.ndarray) -> list[int]:
    """The box of the yellow square in a picture."""
    y, x = np.nonzero((picture[..., 0] > 150) & (picture[..., 2] < 120))
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_import_of_own_csv_keeps_every_box_on_its_square(own_world, tmp_path, own_import):
    labels = own_world / "labels.csv"
    printed = own_import(own_world / "videos", tmp_path / "own", "--annotations", labels)
    for line, text in (
        (6, r"'Pick_Up' \(1 rows\) is taken as 'pick up'"),
        (33, "time 4.5 s"),
        (32, "no video in .* is called 'nobody.mp4'"),
        (35, r"box \[-20.0"),
        (34, r"box \[200.0, 0.0, 250.0, 50.0\] in a picture of 96 x 72"),
        (35, "'jump' is only in train, 1 videos have it"),
    ):
        assert re.search(f"problem: {labels}:{line}: {text}", printed), text
    table = {line[:32].strip(): line[32:].split() for line in printed.splitlines()[1:4]}
    assert "6 problems" in printed and "boxes in pixels, up to 250" in printed
    counts = {name: [row[0], int(row[1]) + int(row[2])] for name, row in table.items()}
    assert counts == {"jump": ["1", 1], "pick up": ["2", 13], "walk": ["3", 12]}
    parts = open_parts(tmp_path / "own")
    items = [item for part in parts for item in part.items if round(item.time_sec, 6) in OWN_TIMES]
    assert len(items) == len(OWN_VIDEOS) * len(OWN_TIMES)
    for item in items:
        frame = data.decode_clip(item.path, [item.time_sec])[0]
        size = frame.shape[1::-1]
        (fps,) = (fps for name, (fps, *_) in OWN_VIDEOS.items() if item.path.endswith(f"/{name}"))
        moved = size[0] / 4 / fps  # the picture on screen may be up to one frame old
        apart = item.boxes[0] * [*size, *size] - yellow_box(frame)
        assert np.abs(apart).max() < moved + 1.6, item
    texts = [(tmp_path / "own" / f"{part}.csv").read_text() for part in ("train", "val")]
    assert ",-1," in texts[0] and ",-1" not in texts[1]  # no AVA scorer knows -1
    task = parts[0].task
    assert task.val_boxes == "val_boxes.csv"
    small = "--device cpu --steps 3 --threads 1 --workers 0 --model.arch tiny --task.{0}.size 64 "
    small += "--task.{0}.short_side [64,64]"
    done = run_here(
        "cofinetune.py",
        "train",
        "--recipe",
        tmp_path / "own" / "recipe.toml",
        "--out",
        tmp_path / "run",
        *small.format(task.name).split(),
    )  # it trains at once
    assert done.returncode == 0 and "mAP" in done.stdout, done.stdout + done.stderr


ROWS = "a.mp4,.4,.1,.1,.5,.9,walk\nb.mp4,.4,.1,.1,.5,.9,run\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n{ROWS}",
        f"{HEADER}\n{ROWS}".replace(",", ";"),
        f"{HEADER}\n{ROWS}".replace(",", "\t"),
        f"{HEADER}\n{ROWS}".replace(",", ";").replace(".4;", "0,4;"),  # a decimal comma
        f"sep=;\n{HEADER}\n{ROWS}".replace(",", ";"),
        f"{HEADER}\n{ROWS},,,,,,\n\n  \n",
        f"{HEADER},,\n{ROWS}".replace("\n", "\r\n"),
        f"\ufeff{HEADER.title()}\n{ROWS}",
        f'"Video","Time (s)","X1","Y1","X2","Y2","Label"\n{ROWS}'.replace("a.mp4", '"a.mp4"'),
        ROWS,
        ROWS.replace(".mp4", ""),
        ROWS.replace("a.mp4", r"C:\films\a.mp4").replace("b.mp4", "/films/b.mp4"),
        "label,x,y,w,h,video,frame\nwalk,.1,.1,.4,.8,a,10\nrun,.1,.1,.4,.8,b,10.0\n",
        f"{HEADER}\na,0:00.4,9.6,6.4,48,57.6,walk\nb,0:00:00.4,9.6,6.4,48,57.6,run\n",  # px
        # Several columns of one meaning; a column id that counts the rows.
        "id,video,time,x,y,x1,y1,x2,y2,class,action\n"
        "1,a,.4,.3,.5,.1,.1,.5,.9,person,walk\n2,b,.4,.3,.5,.1,.1,.5,.9,person,run\n",
        # A label over two lines, as Alt+Enter makes it, is one of two words: here walk alone.
        f"{HEADER}\n{ROWS}".replace("walk", '"\nwalk"'),
        f"{HEADER},note\n{ROWS}".replace("walk", 'walk,"dark, cold\nand wet, too"'),
    ],
)
def test_import_reads_what_spreadsheets_write(text, place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    (tmp_path / "labels.csv").write_text(text, newline="", encoding="utf-8")
    own_import(videos, tmp_path / "own", "--annotations", tmp_path / "labels.csv")
    found = {}
    for part in open_parts(tmp_path / "own"):
        for item in part.items:
            assert np.allclose(item.boxes, [[0.1, 0.1, 0.5, 0.9]]) and item.time_sec == 0.4
            found[Path(item.path).stem] = part.classes[item.labels[0].argmax()]
    assert found == {"a": "walk", "b": "run"}


def test_import_reads_utf_16(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    text = f"{HEADER}\n{ROWS}".replace(",", "\t")
    (videos / "Unicode text.txt").write_text(text, encoding="utf-16")
    assert problems_in(own_import(videos, tmp_path / "own")) == []


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("video,when,x1,y1,x2,y2,label\npal,1,0,0,2,2,walk\n", (), ":1: no column time, found"),
        (f"{HEADER}\npal,1,0,0,2,x,walk\n", (), ":2: .*'x'.*expected numbers"),
        (
            f"{HEADER}\npal,1,30,20,60,50,walk\n",
            ("--boxes", "norm"),
            "0 of 1 .* --boxes norm: .*:2",
        ),
        (f"{HEADER}\npal,1,.1,.2,.6,.5,walk\n", ("--boxes", "px"), "0 of 1 .* --boxes px: .*:2"),
        (f"{HEADER}\npal,1,.1,.2,.6,.5,pick up, fast\n", (), ":2: 1 columns more than"),
        (f"{HEADER}\npal,1,.1,.2,.6,.5,gr\xfc\xdfen\n", (), "a.csv: byte 53 is not UTF-8"),
        (f"{HEADER}\npal,1,.1,.2,.6,.5,walk\n", (), "1 videos .* with labels, expected two"),
        (f"{HEADER}\n", (), "a.csv: no rows"),
        (f"{HEADER}\n,,,,,,\n", (), "a.csv: no rows"),
        ("\n", (), "a.csv: empty"),
        (f'{HEADER}\npal,1,1,1,9,9,"walk\nslow,1,1,1,9,9,run"\n', (), 'csv:2: a " that no other'),
        (f"{HEADER}\npal,1,9,9,5,5,walk\nslow,1,9,9,5,5,run\n", (), ":2: x2 <= x1.*,x,y,width"),
        ("video,frame,x1,y1,x2,y2,label\npal,1.5,1,1,9,9,walk\n", (), ":2: '1.5' is not a whole"),
        ("video,frame,x1,y1,x2,y2,label\npal,999,1,1,9,9,walk\n", (), "frame 999 .* which has 100"),
        (f"{HEADER}\npal,1,1,1,9,9,\nslow,1,1,1,9,9,\n", (), ":2: 2 rows .* none has a label"),
        ("file,size\nwalk0,3\n", (), ":1: the header file,size, expected video,label or"),
        (
            f"{HEADER},split\npal,1,1,1,9,9,walk,x\n",
            (),
            ":2: split 'x', expected train, val or test",
        ),
        ("My films.\nMade with care.\n", (), "its lines name no video"),
        ("<annotations>\n<image/></annotations>", (), ":2: an <image>, so .* CVAT for images"),
        ("<annotation/>", (), "XML of <annotation>, expected CVAT's"),
        ("<annotations>", (), "not XML: no element"),
        ('{"images": []}', (), "JSON of images; expected that of COCO"),
        ('{"images": [], "annotations": [], "categories": []}', (), "json: nothing is annotated"),
        ('{"images": 3, "annotations": [], "categories": []}', (), "json: not as COCO writes it"),
        ("clip,start,end,label\npal,0,1,walk\n", (), ":1: no column video, found the header clip"),
        (f"{HEADER}\npal,1,.1,.2,.6,.5,walk\n", ("--val-share", "20"), "--val-share 20, expected"),
        (f"{HEADER}\npal,1,.1,.2,.6,.5,walk\n", ("--val-share", "nan"), "--val-share nan, exp"),
        (f"{HEADER}\npal,1,.1,.2,.6,.5,walk\n", ("--every-sec", "-1"), "--every-sec -1, expected"),
        (f"{HEADER}\npal,1,.1,.2,.6,.5,walk\n", ("--group-by", "("), "--group-by '\\(': "),
    ],
)
def test_import_refuses_with_file_and_line(own_world, tmp_path, own_import, text, options, message):
    path = tmp_path / {"<": "a.xml", "{": "a.json"}.get(text[0], "a.csv")
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        own_import(own_world / "videos", tmp_path / "out", "--annotations", path, *options)
    assert sorted(tmp_path.iterdir()) == [path]  # nothing, not even half of it, was written


def test_import_never_overwrites_what_it_reads(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    text = "".join(f"{name},1,0.1,0.1,0.5,0.5,1,0\n" for name in "ab")
    path = write_lines(tmp_path / "own" / "train.csv", *text.split())
    with pytest.raises(ValueError, match="train.csv would be overwritten"):
        own_import(videos, tmp_path / "own", "--annotations", path)
    assert path.read_text() == text and [*tmp_path.glob("*own*/*")] == [path]


def test_import_takes_a_split_that_a_spreadsheet_saved(place_clips, tmp_path, own_import):
    videos = place_clips(*(f"{c}/{i}.mp4" for c in "ab" for i in range(4)))
    own_import(videos, tmp_path / "own")
    split = tmp_path / "own" / "split.csv"
    parts = parts_of(tmp_path / "own")
    (moved, *_) = (name for name, part in parts.items() if part == "train")
    rows = list(csv.reader(split.read_text().splitlines()))
    for separator in ",;":
        for row in rows[1:]:
            row[1] = "test" if row[0] == moved else row[1]
        with open(split, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=separator).writerows(rows)
        own_import(videos, tmp_path / "own")
        assert parts_of(tmp_path / "own") == parts | {moved: "test"}


def test_import_to_another_disk_and_through_a_link(place_clips, tmp_path, own_import, monkeypatch):
    videos = place_clips(*(f"{c}/{i}.mp4" for c in "ab" for i in range(2)))
    really = Path.replace

    def replace(path: Path, target: Path) -> None:
        if path.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        really(path, target)

    own_import(videos, tmp_path / "own")
    monkeypatch.setattr(Path, "replace", replace)
    own_import(videos, tmp_path / "mounted")
    names = [sorted(path.name for path in (tmp_path / f).iterdir()) for f in ("own", "mounted")]
    assert names[0] == names[1] and "split.csv" in names[0]
    recipe = tmp_path / "mine.toml"
    shutil.copy(tmp_path / "own" / "recipe.toml", recipe)
    (tmp_path / "link.toml").symlink_to(recipe)
    own_import(videos, tmp_path / "more", "--into", tmp_path / "link.toml")
    assert (tmp_path / "link.toml").is_symlink() and "more" in recipe.read_text()


def test_classes_in_two_spellings_of_unicode_are_one(place_clips, tmp_path, own_import):
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    videos = place_clips(*(f"{name}/{i}.mp4" for i, name in enumerate([*names, "b", "b"])))
    own_import(videos, tmp_path / "own")
    assert [part.classes for part in open_parts(tmp_path / "own")] == [["b", "café"]] * 2


def test_import_never_replaces_files_that_it_did_not_write(place_clips, tmp_path, own_import):
    videos = place_clips(*(f"{c}/{i}.mp4" for c in "ab" for i in range(2)))
    for name in ("train.txt", "split.csv", "problems.txt"):
        path = write_lines(tmp_path / name / name, "mine")
        with pytest.raises(ValueError, match=f"{name} is there and would be replaced, but this"):
            own_import(videos, path.parent)
        assert path.read_text() == "mine\n" and [*path.parent.iterdir()] == [path]
    write_lines(tmp_path / "new" / "notes.txt", "mine")  # nothing that import writes
    own_import(videos, tmp_path / "new")
    (tmp_path / "new" / "split.csv").unlink()  # to draw anew
    own_import(videos, tmp_path / "new")
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine\n"


def test_import_again_leaves_nothing_that_is_out_of_date(place_clips, tmp_path, own_import):
    """No boxes of an import before, and a recipe that is kept is compared with what was written."""
    videos = place_clips(*(f"{i}.mp4" for i in range(6)))
    target = tmp_path / "own"
    recipe = target / "recipe.toml"

    def write(label: str) -> str:
        rows = [f"{i},1,.1,.1,.5,.9,walk\n{i},1,.5,.1,.9,.9,{label}" for i in range(6)]
        write_lines(videos / "labels.csv", HEADER, *rows)
        return own_import(videos, target)

    assert "was kept and" not in write("") + write("")
    assert (target / "val_boxes.csv").exists() and 'val_boxes = "val_boxes' in recipe.read_text()
    printed = write("run")
    assert not (target / "val_boxes.csv").exists() and (target / "val.csv").exists()
    said = f"{recipe} was kept and does not fit what was written: val_boxes = 'val_boxes.csv', now"
    assert said in printed and said in (target / "problems.txt").read_text()
    text = recipe.read_text()
    recipe.write_text(text.replace("val_boxes.csv", "detected.csv"))  # the user's own
    assert "was kept and" not in write("run")
    recipe.write_text(text.replace('val_boxes = "', '# "'))
    assert "was kept and does not fit what was written: val_boxes = '', now" in write("")
    recipe.write_text(text.replace('name = "own"', 'name = "mine"'))
    assert "now 'val_boxes.csv'" not in write("")  # the same task by another name
    write_lines(videos / "labels.csv", "video,label", *(f"{i},{'ab'[i % 2]}" for i in range(6)))
    printed = own_import(videos, target)
    assert "was kept and has no task 'own'" in printed
    recipe.write_text(text)
    printed = own_import(videos, target)
    assert "kind = 'box', now 'clip'; train = 'train.csv', now 'train.txt'; val = " in printed
    recipe.unlink()
    assert "was kept and" not in own_import(videos, target)
    names = "actions.pbtxt problems.txt recipe.toml split.csv train.txt val.txt"
    assert sorted(path.name for path in target.iterdir()) == names.split()


def test_import_never_writes_among_videos(place_clips, tmp_path, own_import):
    videos = place_clips(*(f"{c}/day/{i}.mp4" for c in "ab" for i in range(2)))
    place_clips("x.mp4", folder=tmp_path / "more")
    for target, held in ((videos / "a", "a/day/0.mp4"), (tmp_path / "more", "x.mp4")):
        with pytest.raises(ValueError, match=f"{target}: holds videos .{held}., expected a folder"):
            own_import(videos, target)
    own_import(videos, videos / "own")


def test_import_goes_on_after_one_that_was_killed(place_clips, tmp_path, own_import, monkeypatch):
    """Whatever ends it: the target is as it was, and the next import is undisturbed."""
    videos = place_clips(*(f"{c}/{i}.mp4" for c in "ab" for i in range(3)))
    own_import(videos, tmp_path / "own")
    before = {path: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    place_clips("c/7.mp4", "c/8.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(importing, "_read_back", mock.Mock(side_effect=KeyboardInterrupt))
        patch.setattr(importing.shutil, "rmtree", lambda *_, **__: None)  # killed: nobody tidies
        with pytest.raises(KeyboardInterrupt):
            own_import(videos, tmp_path / "own")
    assert before == {path: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    own_import(videos, tmp_path / "own")
    assert open_parts(tmp_path / "own")[0].classes == ["a", "b", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "videos"]


def test_import_names_boxes_beyond_the_end_and_files_of_unknown_suffix(
    place_clips, tmp_path, own_import
):
    videos = place_clips("a.mp4", "b.mp4", "c.xyz", "d.MTS", ".hidden/e.mp4")
    rows = [f"{name},.4,.1,.1,.5,.9,walk" for name in ("a", "b", "c", "d", "a.mp4", "e")]
    path = write_lines(tmp_path / "labels.csv", HEADER, *rows, "b,2.5,.1,.1,.5,.9,walk")
    printed = own_import(videos, tmp_path / "own", "--annotations", path)
    assert "c.xyz is there, but '.xyz' is no suffix of a video that is known: rename" in printed
    assert f"no video in {videos} is called 'e'" in printed
    assert "time 2.5 s is not within the 2.000 s of b" in printed
    assert "3 problems" in printed and parts_of(tmp_path / "own").keys() == {
        "a.mp4",
        "b.mp4",
        "d.MTS",
    }


# ------------------------------------------------------------------------------------------------
# Names of videos
# ------------------------------------------------------------------------------------------------


def test_videos_are_found_by_what_annotations_call_them(place_clips, tmp_path):
    nfd = unicodedata.normalize("NFD", "café")
    folder = place_clips(
        "cam1/0001.mp4",
        "cam2/0001.mp4",
        "cam2/0002.avi",
        f"{nfd}/x.mp4",
        "a.b.mp4",
        "kitchen.mp4",
        "kitchen.MOV",
        "[1]/y.mp4",
        "Ä 1.Mts",
        ".hidden.mp4",
        "._walk.mp4",
        "__MACOSX/z.mp4",
        ".git/w.mp4",
    )
    (folder / "cam1" / "back").symlink_to(folder)
    (folder / "cam1" / "up").symlink_to(folder.parent)
    (folder / "cam2" / "other").symlink_to(folder / "cam1")
    videos = formats.Videos(folder)
    files = [file for files in videos.stems.values() for file in files]
    assert len(files) == len(set(files)) == 10  # the nine, and cam2/other/0001.mp4
    for name, found in {
        "cam1/0001": ["cam1/0001.mp4"],
        "cam1/0001.mp4": ["cam1/0001.mp4"],
        "other/0001": ["cam2/other/0001.mp4"],
        r"D:\data\cam2\0001.mp4": ["cam2/0001.mp4"],
        "/data/cam2/0002.avi": ["cam2/0002.avi"],
        "0002": ["cam2/0002.avi"],
        "0002.mp4": ["cam2/0002.avi"],  # re-encoded
        "cam3/0002.avi": [],  # of another camera
        "0001": ["cam1/0001.mp4", "cam2/0001.mp4", "cam2/other/0001.mp4"],
        "café/x": [f"{nfd}/x.mp4"],
        f"{nfd}/x.mp4": [f"{nfd}/x.mp4"],
        "a.b": ["a.b.mp4"],
        "a": [],
        "kitchen": ["kitchen.MOV", "kitchen.mp4"],
        "kitchen.mp4": ["kitchen.mp4"],
        "videos/kitchen.MOV": ["kitchen.MOV"],
        "[1]/y": ["[1]/y.mp4"],
        "Ä 1": ["Ä 1.Mts"],
        "z": [],
    }.items():
        assert videos.find(name) == found, name
    names = [videos.name_of(file) for file in files]
    assert len(set(names)) == len(names)
    assert {"cam1/0001", "cam2/0001", "0002", "x", "a.b", "kitchen.mp4", "kitchen.MOV"} <= set(
        names
    )
    assert all(videos.find(name) == [file] for name, file in zip(names, files, strict=True))


def test_import_names_a_video_that_differs_in_case(place_clips, tmp_path, own_import):
    rows = [f"{name},.4,.1,.1,.5,.9,walk" for name in ("Hall.MP4", "b", "b", "c")]
    path = write_lines(tmp_path / "labels.csv", HEADER, *rows)
    words = (place_clips("hall.mp4", "b.mp4", "c.mp4"), tmp_path / "own", "--annotations", path)
    (said,) = problems_in(own_import(*words))
    assert said.endswith(
        f"labels.csv:2: no video in {words[0]} is called 'Hall.MP4', hall.mp4 differs in case"
    )


def test_import_tells_the_same_name_in_two_folders_apart(place_clips, tmp_path, own_import):
    videos = place_clips("cam1/0001.mp4", "cam1/0002.mp4", "cam2/0001.mp4", "cam2/0002.mp4")
    left, right = "0.1,0.1,0.5,0.9", "0.5,0.1,0.9,0.9"
    rows = [f"cam1/000{i}.mp4,.5,{left},walk" for i in (1, 2)]
    rows += [f"cam2\\000{i}.mp4,.5,{right},run" for i in (1, 2)]
    write_lines(videos / "labels.csv", HEADER, *rows)
    assert problems_in(own_import(videos, tmp_path / "own")) == []
    for part in open_parts(tmp_path / "own"):
        for item in part.items:
            cam1 = "cam1" in item.path
            assert np.allclose(item.boxes[0], eval(f"[{left if cam1 else right}]"))
            assert part.classes[item.labels[0].argmax()] == ("walk" if cam1 else "run")
            assert item.key[0] in item.path
    write_lines(videos / "labels.csv", HEADER, *rows, f"0001.mp4,.5,{left},walk")
    printed = own_import(videos, tmp_path / "again")
    assert "labels.csv:6: 2 videos are called '0001.mp4': cam1/0001.mp4, cam2/0001.mp4" in printed


def test_import_meets_nfd_names(place_clips, tmp_path, own_import):
    names = [unicodedata.normalize("NFD", name) for name in ("café.mp4", "Überfall.mp4")]
    videos = place_clips(*names)
    rows = [f"{name},0.5,.1,.1,.5,.9,walk" for name in ("café.mp4", "Überfall.mp4")]
    write_lines(videos / "labels.csv", HEADER, *rows)
    assert problems_in(own_import(videos, tmp_path / "own")) == []
    found = set.union(*(videos_of(part, videos) for part in open_parts(tmp_path / "own")))
    assert found == set(names)
    rows = [f"{name} {label}" for name, label in (("café.mp4", "walk"), ("Überfall.mp4", "run"))]
    path = write_lines(tmp_path / "list.txt", *rows)
    assert problems_in(own_import(videos, tmp_path / "clips", "--annotations", path)) == []


# ------------------------------------------------------------------------------------------------
# Folders per class, lists
# ------------------------------------------------------------------------------------------------


def test_import_of_folders_per_class(place_clips, tmp_path, own_import):
    names = [f"{name}/{name[0]}{i}.mp4" for name in ("turn left", "Turn_Left 2") for i in range(5)]
    videos = place_clips(*names)
    printed = own_import(videos, tmp_path / "out", "--val-share", "0.4")
    train, val = open_parts(tmp_path / "out")
    counts = f"{len(train)} videos to train, {len(val)} to validate; 0 problems"
    assert counts in printed and len(train) + len(val) == 10
    assert train.task.flip == 0 and train.classes == ["turn left", "Turn_Left 2"]
    assert min(train.class_counts().values()) > 0 and min(val.class_counts().values()) > 0
    assert all(train.classes[item.label] in item.path for item in train.items)
    text = (tmp_path / "out" / "recipe.toml").read_text()
    assert "box" not in text and train.task.frames * train.task.step_sec <= 2  # the clips' 2 s


@pytest.mark.parametrize(
    "names, train, val, test",
    [
        ("train/walk/0 train/run/1 val/walk/2 val/run/3", "01", "23", ""),
        ("Train/walk/0 Train/run/1 Validation/walk/2 Validation/run/3", "01", "23", ""),
        ("training/walk/0 training/run/1 test/walk/2 test/run/3", "01", "23", ""),
        ("train/walk/0 train/run/1 val/walk/2 val/run/3 test/walk/4 test/run/5", "01", "23", "45"),
        ("walk/train/0 run/train/1 walk/valid/2 run/valid/3", "01", "23", ""),
        ("set/train/walk/0 set/train/run/1 set/val/walk/2 set/val/run/3", "01", "23", ""),
    ],
)
def test_import_uses_folders_of_parts_as_parts(
    place_clips, tmp_path, own_import, names, train, val, test
):
    videos = place_clips(*(f"{name}.mp4" for name in names.split()))
    printed = own_import(videos, tmp_path / "own")
    found = {part: "" for part in importing.PARTS}
    for file, part in sorted(parts_of(tmp_path / "own").items(), key=lambda row: row[0][-5]):
        found[part] += file[-5]
    assert found == {"train": train, "val": val, "test": test}, printed
    assert open_parts(tmp_path / "own")[0].classes == ["run", "walk"]


def test_import_does_not_guess_whether_test_is_a_class(place_clips, tmp_path, own_import):
    videos = place_clips("walk/0.mp4", "walk/1.mp4", "test/2.mp4", "test/3.mp4")
    with pytest.raises(ValueError, match="test beside others, classes or parts"):
        own_import(videos, tmp_path / "own")


@pytest.mark.parametrize(
    "name, text",
    [
        ("README.txt", "My data set.\nRecorded with two cameras.\nContact me.\n"),
        ("classes.txt", "walk\nrun\n"),
        ("metadata.csv", "file,size,date\nwalk0,3,2024\nwalk1,4,2024\n"),
        ("notes.csv", "walk0.mp4 is the best one of them all\nsome more words\nand more\n"),
        ("info.json", '{"author": "me"}'),
        ("notes.docx", "PK"),
        ("empty.csv", ""),
    ],
)
def test_import_leaves_stray_texts_beside_class_folders(
    place_clips, tmp_path, own_import, name, text
):
    videos = place_clips(
        *(f"{label}/{label}{i}.mp4" for label in ("run", "walk") for i in range(3))
    )
    (videos / name).write_text(text)
    for junk in ("._walk0.mp4", ".DS_Store", "Thumbs.db", "__MACOSX/walk/._walk0.mp4"):
        (videos / junk).parent.mkdir(parents=True, exist_ok=True)
        (videos / junk).write_bytes(b"\0\5\26\7")
    printed = own_import(videos, tmp_path / "own")
    assert len(parts_of(tmp_path / "own")) == 6 and "0 problems" in printed
    assert open_parts(tmp_path / "own")[0].classes == ["run", "walk"]
    assert name in printed and "DS_Store" not in printed  # what is not read is said


def test_import_hints_at_other_annotations_where_no_row_fits(place_clips, tmp_path, own_import):
    videos = place_clips(*(f"{label}/{i}.mp4" for label in ("run", "walk") for i in range(2)))
    write_lines(videos / "labels.csv", "video,label", "x.mp4,run", "y.mp4,walk")
    with pytest.raises(ValueError, match="the folders run, walk are the classes, .*--annotations"):
        own_import(videos, tmp_path / "own")


UCF = {
    "classInd.txt": ["1 HandstandPushups", "2 YoYo"],
    "trainlist01.txt": [
        f"{c}/v_{c}_g08_c01.avi {i}" for i, c in ((1, "HandstandPushups"), (2, "YoYo"))
    ],
    "testlist01.txt": [f"{c}/v_{c}_g01_c01.avi" for c in ("HandstandPushups", "YoYo")],
}


def test_import_of_ucf101_as_downloaded(place_clips, tmp_path, own_import):
    names = [row.split()[0] for key in ("trainlist01.txt", "testlist01.txt") for row in UCF[key]]
    videos = place_clips(*names, folder=tmp_path / "UCF-101")
    for name, rows in UCF.items():
        write_lines(videos / name, *rows)
        if "list" in name:  # the second of its three splits
            write_lines(videos / name.replace("1.", "2."), *rows[::-1])
    printed = own_import(videos, tmp_path / "own")
    train, val = open_parts(tmp_path / "own")
    assert train.classes == val.classes == ["HandstandPushups", "YoYo"] and "0 problems" in printed
    assert videos_of(train, videos) == set(names[:2]) and videos_of(val, videos) == set(names[2:])
    assert "split 1 is taken, not read:" in printed and "testlist02.txt" in printed
    assert "names of the classes" in printed


def test_import_of_hmdb51_lists(place_clips, tmp_path, own_import):
    videos = place_clips(*(f"{c}/{c}{i}.avi" for c in ("run", "walk") for i in range(3)))
    for c in ("run", "walk"):
        rows = [f"{c}{i}.avi {part}" for i, part in enumerate((1, 2, 0))]
        write_lines(tmp_path / "splits" / f"{c}_test_split1.txt", *rows)
        write_lines(tmp_path / "splits" / f"{c}_test_split2.txt", *rows[::-1])
    own_import(videos, tmp_path / "own", "--annotations", tmp_path / "splits")
    train, val = open_parts(tmp_path / "own")
    assert videos_of(train, videos) == {"run/run0.avi", "walk/walk0.avi"}
    assert videos_of(val, videos) == {"run/run1.avi", "walk/walk1.avi"}


def test_patterns_and_videos_below_folders_in_brackets(place_clips, tmp_path, own_import):
    folder = tmp_path / "data [1] *?"
    videos = place_clips("run/a.avi", "walk/b.avi", folder=folder / "v[0]")
    for name in ("run/a", "walk/b"):
        row = f"{Path(name).name}.avi 1"
        write_lines(folder / "s[2]" / f"{Path(name).parent}_test_split1.txt", row)
    task = data.Task("t", "clip", train="s[2]/*_test_split1.txt", videos="v[0]")
    dataset = data.open_task(task, folder, "train", formats)
    assert dataset.classes == ["run", "walk"]
    assert videos_of(dataset, videos) == {"run/a.avi", "walk/b.avi"}
    write_lines(videos / "l.csv", HEADER, *(f"{n},.4,.1,.1,.5,.9,walk" for n in "ab"))
    printed = own_import(videos, folder / "own")
    assert len(open_parts(folder / "own")[0]) == 1
    assert f"--recipe '{folder}/own/recipe.toml'" in printed  # to be pasted
    rows = write_lines(folder / "t.txt", "run/a.avi x", "walk/b.avi y")
    task = data.Task("t", "clip", train=rows, videos="v[0]")
    assert data.open_task(task, folder, "train", formats).classes == ["x", "y"]
    with pytest.raises(ValueError, match=r"o\\nwn': a path that a recipe cannot hold"):
        own_import(videos, folder / "o\nwn")


def test_import_keeps_lists_of_parts_and_never_trains_the_test(place_clips, tmp_path, own_import):
    videos = place_clips(*(f"{i}.mp4" for i in range(8)))
    lists = {"train": "0123", "val": "345", "test": "567"}  # 3 and 5 are in two
    for part, numbers in lists.items():
        rows = [f"{i}.mp4 {['walk', 'run'][int(i) % 2]}" for i in numbers]
        write_lines(videos / f"{part}.txt", *rows)
    printed = own_import(videos, tmp_path / "own")
    parts = parts_of(tmp_path / "own")
    expected = ["train"] * 3 + ["val"] * 2 + ["test"] * 3
    assert [parts[f"{i}.mp4"] for i in range(8)] == expected
    assert "3.mp4 is in train and in val: taken for val" in printed
    assert "5.mp4 is in val and in test: taken for test" in printed
    test = (tmp_path / "own" / "test.txt").read_text().split()[::2]
    assert sorted(test) == ["5.mp4", "6.mp4", "7.mp4"] and "3 to test (test.txt)" in printed


def test_a_file_named_after_its_video_is_no_part(place_clips, tmp_path, own_import):
    videos = place_clips("train_station.mp4", "test drive.mp4", "c.mp4", "d.mp4")
    for name in ("train_station", "test drive", "c", "d"):
        (videos / f"{name}.xml").write_text(cvat_job(f"{name}.mp4", ("a", "select", "walk")))
    own_import(videos, tmp_path / "own")
    assert "test" not in parts_of(tmp_path / "own").values()


def test_import_keeps_parts_that_folders_name(place_clips, tmp_path, own_import):
    """train/labels.csv and val/labels.csv; also in YOLO's labels/train/*.txt."""
    parts = {"train": "01234", "val": "56789"}
    videos = place_clips(*(f"{part}/{i}.mp4" for part in parts for i in parts[part]))
    for part, numbers in parts.items():
        rows = [f"{i},.5,.1,.1,.5,.9,{label}" for i in numbers for label in ("walk", "run")]
        write_lines(videos / part / "labels.csv", HEADER, *rows)
        for i in numbers:
            write_lines(tmp_path / "labels" / part / f"{i}_10.txt", "0 0.3 0.5 0.4 0.8")
    expected = {f"{part}/{i}.mp4": part for part in parts for i in parts[part]}
    own_import(videos, tmp_path / "own")
    assert parts_of(tmp_path / "own") == expected
    own_import(videos, tmp_path / "yolo", "--annotations", tmp_path / "labels")
    assert parts_of(tmp_path / "yolo") == expected
    train = tmp_path / "labels" / "train"  # all from here: the folder says nothing
    own_import(videos, tmp_path / "some", "--annotations", train)
    assert set(parts_of(tmp_path / "some").values()) == {"train", "val"}
    for i in parts["train"]:  # pictures of each video in both
        write_lines(tmp_path / "labels" / "val" / f"{i}_20.txt", "0 0.3 0.5 0.4 0.8")
    with pytest.raises(ValueError, match="none is left to train: .*is in train and in val"):
        own_import(videos, tmp_path / "both", "--annotations", tmp_path / "labels")


def test_import_keeps_the_split_of_kinetics(place_clips, tmp_path, own_import):
    ids = [letter * 11 for letter in "abcdefghij"]
    videos = place_clips(*(f"{name}_000001_000003.mp4" for name in ids))
    stated = ["train"] * 6 + ["validate"] * 2 + ["test"] * 2
    rows = [f"{['run', 'walk'][i % 2]},{name},1,3,{stated[i]}" for i, name in enumerate(ids)]
    write_lines(videos / "kinetics.csv", "label,youtube_id,time_start,time_end,split", *rows)
    own_import(videos, tmp_path / "own")
    parts = list(parts_of(tmp_path / "own").values())
    assert parts == ["train"] * 6 + ["val"] * 2 + ["test"] * 2


@pytest.mark.parametrize("stated", ["train", "val", "test"])
def test_import_keeps_a_split_that_only_some_rows_state(place_clips, tmp_path, own_import, stated):
    videos = place_clips(*(f"{i}.mp4" for i in range(10)))
    rows = [f"{i},{['walk', 'run'][i % 2]},{stated if i < 5 else ''}" for i in range(10)]
    write_lines(videos / "labels.csv", "video,label,split", *rows)
    for seed in range(3):
        own_import(videos, tmp_path / f"own{seed}", "--seed", seed)
        parts = list(parts_of(tmp_path / f"own{seed}").values())
        assert parts[:5] == [stated] * 5 and "train" in parts and "val" in parts
        assert "test" not in parts[5:]


def test_import_honours_a_split_column(place_clips, tmp_path, own_import):
    videos = place_clips(*(f"{i}.mp4" for i in range(6)))
    rows = [
        f"{i},.5,.1,.1,.5,.9,walk,{p}"
        for i, p in enumerate("train Val TRAIN test val train".split())
    ]
    write_lines(videos / "labels.csv", f"{HEADER},Split", *rows)
    own_import(videos, tmp_path / "own")
    assert [*parts_of(tmp_path / "own").values()] == "train val train test val train".split()
    train, _ = open_parts(tmp_path / "own")
    assert videos_of(train, videos) == {"0.mp4", "2.mp4", "5.mp4"}
    assert len((tmp_path / "own" / "test.csv").read_text().splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# The split
# ------------------------------------------------------------------------------------------------


def test_split_keeps_classes_in_both_parts():
    shares = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        videos = {f"v{i}": {f"c{c}" for c in range(12) if rng.random() < 0.25} for i in range(20)}
        videos |= {"only": {"lonely"}}
        parts = importing.draw_split(videos, 0.2, seed, {})
        assert parts == importing.draw_split(dict(reversed(videos.items())), 0.2, seed, {})
        chosen = {name for name, part in parts.items() if part == "val"}
        shares.append(len(chosen) / len(videos))
        for name in set().union(*videos.values()):
            there = {video for video in videos if name in videos[video]}
            assert there - chosen and (len(there) < 2 or there & chosen), (seed, name)
    assert 0.2 < np.mean(shares) < 0.4


def test_split_of_many_videos_has_the_share_and_stays_where_it_was():
    videos = {f"walk/{i}": {"walk"} for i in range(200)} | {f"run/{i}": {"run"} for i in range(9)}
    before = importing.draw_split(videos, 0.2, 0, {})
    assert abs(list(before.values()).count("val") / 209 - 0.2) < 0.06
    assert before != importing.draw_split(videos, 0.2, 1, {})
    moved = 0
    for i in range(100):
        after = importing.draw_split(videos | {f"run/new{i}": {"run"}}, 0.2, 0, {})
        changed = [name for name in videos if before[name] != after[name]]
        assert len(changed) <= 1 and all(name.startswith("run") for name in changed)
        moved += len(changed)
    assert moved <= 25
    fewer = {name: classes for name, classes in videos.items() if name != "walk/0"}
    after = importing.draw_split(fewer, 0.2, 0, {})
    assert all(after[name] == before[name] for name in fewer)


def test_import_again_leaves_every_video_where_it_was(place_clips, tmp_path, own_import):
    names = [f"{label}/{label}{i}.mp4" for label in ("run", "walk") for i in range(4)]
    videos = place_clips(*names)
    own_import(videos, tmp_path / "own")
    first = parts_of(tmp_path / "own")
    for i in range(6):
        place_clips(f"walk/new{i}.mp4", f"jump/new{i}.mp4")
        printed = own_import(videos, tmp_path / "own")
        again = parts_of(tmp_path / "own")
        assert first.items() <= again.items() and len(again) == len(first) + 2
        assert f"{len(first)} of {len(again)} keep their part in split.csv" in printed
        first = again
    split = tmp_path / "own" / "split.csv"  # a user may move a video there
    split.write_text(split.read_text().replace("run/run0.mp4,train", "run/run0.mp4,val"))
    own_import(videos, tmp_path / "own")
    assert parts_of(tmp_path / "own")["run/run0.mp4"] == "val"
    said = r"note: the split changed: (\d+) videos that were trained validate or test now, runs"
    assert not re.search(said, printed)
    before = parts_of(tmp_path / "own")
    printed = own_import(videos, tmp_path / "own", "--seed", 5)
    after = parts_of(tmp_path / "own")
    moved = [name for name in after if before[name] == "train" != after[name]]
    assert moved and re.search(said, printed)[1] == str(len(moved))
    assert "before: seed 0, share 0.2, group-by none" in printed
    fresh = own_import(videos, tmp_path / "fresh", "--seed", 5)
    assert parts_of(tmp_path / "own") == parts_of(tmp_path / "fresh") and "keep" not in fresh


def test_import_again_keeps_what_was_moved_whatever_the_groups_are_called(
    place_clips, tmp_path, own_import
):
    videos = place_clips(*(f"{c}/{i}.mp4" for c in "ab" for i in range(3)))
    words = (videos, tmp_path / "own", "--group-by", 'day"')
    own_import(*words)
    moved = next(file for file, part in parts_of(tmp_path / "own").items() if part == "train")
    split = tmp_path / "own" / "split.csv"
    split.write_text(split.read_text().replace(f"{moved},train", f"{moved},val"))
    own_import(*words)
    assert parts_of(tmp_path / "own")[moved] == "val"


def test_a_group_that_finds_nothing_is_the_video_itself():
    assert importing.group_of("a/x_1.mp4", r"(day\d)?_1") == "a/x_1"
    assert importing.group_of("a/x_1.mp4", "q*") == "a/x_1"


@pytest.mark.parametrize(
    "group_by, groups",
    [
        ("1", {f"day{i}" for i in range(6)}),
        (r"day\d", {f"day{i}" for i in range(6)}),
        (r"_g(\d+)_", {"1", "2", "3"}),
    ],
)
def test_split_keeps_groups_together(place_clips, tmp_path, own_import, group_by, groups):
    names = [f"day{i}/{c}/x_g{k}_.mp4" for i in range(6) for c in ("a", "b") for k in (1, 2, 3)]
    path = write_lines(
        tmp_path / "l.csv", "video,label", *(f"{n},{n.split('/')[1]}" for n in names)
    )
    for seed in range(4):
        printed = own_import(
            place_clips(*names, folder=tmp_path / f"v{seed}"),
            tmp_path / f"own{seed}",
            "--annotations",
            path,
            "--group-by",
            group_by,
            "--seed",
            seed,
        )
        sides: dict[str, set] = {}
        assert "belong together" not in printed
        for file, part in parts_of(tmp_path / f"own{seed}").items():
            sides.setdefault(importing.group_of(file, group_by), set()).add(part)
        assert sides.keys() == groups and all(len(parts) == 1 for parts in sides.values())


@pytest.mark.parametrize("group_by", ["1", "day"])
def test_groups_of_one_video_are_said(place_clips, tmp_path, own_import, group_by):
    rows = [f"{name},.4,.1,.1,.5,.9,walk" for name in "ab"]
    path = write_lines(tmp_path / "labels.csv", HEADER, *rows)
    words = ("--annotations", path, "--group-by", group_by)
    printed = own_import(place_clips("a.mp4", "b.mp4"), tmp_path / "own", *words)
    assert f"note: --group-by {group_by} finds no two videos that belong together" in printed


# ------------------------------------------------------------------------------------------------
# CVAT
# ------------------------------------------------------------------------------------------------


def cvat_box(frame: int, x: int, attributes: str = "", outside: int = 0) -> str:
    return (
        f'<box frame="{frame}" outside="{outside}" xtl="{x}" ytl="40" xbr="{x + 48}" '
        f'ybr="88">{attributes}</box>'
    )


def cvat_marks(path: Path, videos: Path, every_sec=1.0, attributes=(), notes=None) -> list[Mark]:
    library = Library(videos, every_sec)
    notes = [] if notes is None else notes
    marks = annotation_tools.read_cvat(str(path), path.read_bytes(), library, attributes, notes)
    for mark in marks:
        if not mark.wrong:
            assert annotations.place(mark, library.clock(library.find(mark.video)[0])) == ""
    return marks


def test_cvat_interpolates_and_names_lines(own_world, tmp_path):
    ticks = '<attribute name="running">{}</attribute>\n<attribute name="hand">{}</attribute>'
    path, videos = tmp_path / "job.xml", own_world / "videos"
    path.write_text(
        "\n".join(
            [
                "<annotations><meta><task><id>7</id><original_size><width>192</width><height>144</height>",
                "</original_size><source>pal.mp4</source></task></meta>",
                '<track id="0" label="person">',
                cvat_box(0, 0, ticks.format("true", "waving")),
                cvat_box(50, 72, ticks.format("false", "none")),
                cvat_box(60, 80, outside=1),
                "</track>",
                '<track id="1" label="dog">',
                cvat_box(51, 0),
                "</track>",
                '<track id="2" label="dog">',
                cvat_box(25, 0),
                "</track></annotations>",
            ]
        )
    )
    marks = cvat_marks(path, videos)
    assert [(mark.label, mark.time_sec) for mark in marks if not mark.wrong] == [
        ("running", 0),
        ("waving", 0),
        ("running", 1),
        ("waving", 1),
        ("", 2),
        ("dog", 1),
    ]
    between = [36 / 192, 40 / 144, 84 / 192, 88 / 144]  # frame 25 of 0 to 50
    assert np.allclose(marks[2].box, between)
    assert marks[5].where == f"{path}:11" and "smaller --every-sec" in marks[5].wrong
    notes: list[str] = []
    every = cvat_marks(path, videos, 0, ["Hand"], notes)
    assert [mark.label for mark in every] == ["waving", "", "dog", "dog"]
    assert "taken as actions: hand (select); not taken: running (checkbox)" in notes[0]
    assert len(cvat_marks(path, videos, 0.001)) < 200  # a frame once at most
    turned = cvat_box(0, 40).replace("<box", '<box rotation="90"').replace('ybr="88"', 'ybr="60"')
    (node,) = annotation_tools.read_xml(
        "a", f"<annotations>{turned}</annotations>".encode()
    ).children
    assert np.allclose(
        annotation_tools._cvat_corners(node), [54, 26, 74, 74]
    )  # 48 x 20 px about 64, 50


CVAT_SHAPES = {  # an element of a track, the box around it
    '<polygon frame="0" points="10,10;40,12;30,60" outside="0">{}</polygon>': [10, 10, 40, 60],
    '<polyline frame="0" points="10.5,10;40,60" outside="0">{}</polyline>': [10.5, 10, 40, 60],
    '<points frame="0" points="10,20;40,12" outside="0">{}</points>': [10, 12, 40, 20],
    '<ellipse frame="0" cx="40" cy="30" rx="10" ry="20" outside="0">{}</ellipse>': [30, 10, 50, 50],
    '<ellipse frame="0" cx="40" cy="30" rx="10" ry="20" rotation="90" outside="0">{}</ellipse>': [
        20,
        20,
        60,
        40,
    ],
    '<mask frame="0" rle="1" left="5" top="6" width="10" height="20" outside="0">{}</mask>': [
        5,
        6,
        15,
        26,
    ],
    '<cuboid frame="0" xtl1="9" ytl1="9" xbl1="9" ybl1="30" xtr1="20" ytr1="8" xbr1="20" ybr1="30" '
    'xtl2="30" ytl2="9" xbl2="30" ybl2="28" xtr2="22" ytr2="9" xbr2="22" ybr2="28" outside="0">{}'
    "</cuboid>": [9, 8, 30, 30],
    '<skeleton frame="0" keyframe="1">{}<points label="1" outside="0" points="20,20"/>'
    '<points label="2" outside="0" points="30,50"/><points label="3" outside="1" points="0,0"/>'
    "</skeleton>": [20, 20, 30, 50],
}


@pytest.mark.parametrize("shape", CVAT_SHAPES)
def test_cvat_shapes_become_the_boxes_around_them(place_clips, tmp_path, own_import, shape):
    videos = place_clips("a.mp4", "b.mp4")
    action = '<attribute name="action">wave</attribute>'
    for name in "ab":
        write_lines(
            videos / f"{name}.xml",
            "<annotations><meta><task><original_size><width>96</width><height>64</height>",
            f"</original_size><source>{name}.mp4</source></task></meta><track label='person'>",
            shape.format(action).replace('outside="0">', 'outside="0" occluded="0">', 1),
            "</track></annotations>",
        )
    own_import(videos, tmp_path / "own")
    train, val = open_parts(tmp_path / "own")
    for item in (*train.items, *val.items):
        assert np.allclose(item.boxes * [96, 64, 96, 64], [CVAT_SHAPES[shape]], atol=1e-3)
    assert train.classes == ["wave"]


def cvat_job(video: str, *attributes: tuple[str, str, str], label: str = "person") -> str:
    """A track of one box with attributes (name, input type, value)."""
    kinds = "".join(
        f"<attribute><name>{name}</name><input_type>{kind}</input_type></attribute>"
        for name, kind, _ in attributes
    )
    values = "".join(
        f'<attribute name="{name}">{value}</attribute>' for name, _, value in attributes
    )
    return (
        "<annotations><meta><task><id>1</id><labels><label><name>person</name><attributes>"
        f"{kinds}</attributes></label></labels><source>{video}</source></task></meta>"
        f'<track label="{label}">{cvat_box(0, 0, values).replace("88", "60")}</track></annotations>'
    )


def test_cvat_says_which_attributes_are_actions(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    attributes = [
        ("action", "select", "walk"),
        ("hurry", "checkbox", "true"),
        ("mood", "radio", "sad"),
        ("name", "text", "Ann"),
        ("age", "number", "41"),
        ("hat", "checkbox", "false"),
    ]
    for name in "ab":
        (videos / f"{name}.xml").write_text(cvat_job(f"{name}.mp4", *attributes))
    printed = own_import(videos, tmp_path / "own")
    assert open_parts(tmp_path / "own")[0].classes == ["hurry", "sad", "walk"]
    assert (
        "a.xml: attributes taken as actions: action (select), hurry (checkbox), mood (radio), hat "
        "(checkbox); not taken: name (text), age (number); --attribute NAME takes one"
    ) in printed
    own_import(videos, tmp_path / "names", "--attribute", "name", "--attribute", "hat")
    assert open_parts(tmp_path / "names")[0].classes == ["Ann"]
    with pytest.raises(ValueError, match="no attribute gait, found action, hurry, mood, name"):
        own_import(videos, tmp_path / "none", "--attribute", "gait")
    for name in "ab":  # text alone: the label is the action
        job = cvat_job(f"{name}.mp4", ("id", "text", f"p{name}"), label="walk")
        (videos / f"{name}.xml").write_text(job)
    printed = own_import(videos, tmp_path / "label")
    assert (
        open_parts(tmp_path / "label")[0].classes == ["walk"] and "not taken: id (text)" in printed
    )


@pytest.mark.parametrize("form", ["zip", "folder of zips", "task folders", "xml beside"])
def test_cvat_as_it_is_delivered(place_clips, tmp_path, own_import, form):
    videos = place_clips("a.mp4", "b.mp4")
    jobs = [cvat_job(f"{name}.mp4", ("action", "select", "walk")) for name in "ab"]
    place = tmp_path / "annotations"
    place.mkdir()
    if form == "zip":  # of a project: both tasks in one
        place = tmp_path / "project.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for i, job in enumerate(jobs):
                archive.writestr(f"task_{i}/annotations.xml", job)
            archive.writestr("__MACOSX/._annotations.xml", b"\0")
            archive.writestr("images/frame_000000.PNG", b"\x89PNG")
    elif form == "folder of zips":
        for i, job in enumerate(jobs):
            with zipfile.ZipFile(place / f"task {i}.zip", "w") as archive:
                archive.writestr("annotations.xml", job)
    elif form == "task folders":
        for i, job in enumerate(jobs):
            write_lines(place / f"task_{i}" / "annotations.xml", job)
    else:
        place = videos
        for i, job in enumerate(jobs):
            write_lines(videos / f"{i}.xml", job)
    printed = own_import(videos, tmp_path / "own", "--annotations", place)
    assert "0 problems" in printed and len(parts_of(tmp_path / "own")) == 2


@pytest.mark.parametrize(
    "frames, is_wrong",
    [
        ("<size>50</size><start_frame>0</start_frame><stop_frame>49</stop_frame>", False),
        ("<size>51</size>", False),  # some count one more
        ("<size>10</size><stop_frame>45</stop_frame><frame_filter>step=5</frame_filter>", False),
        ("<size>60</size><start_frame>0</start_frame><stop_frame>59</stop_frame>", True),
        ("<size>25</size><stop_frame>24</stop_frame><frame_filter></frame_filter>", True),
        ("<size>60</size>", True),
    ],
)
def test_cvat_of_another_video_is_doubted(place_clips, tmp_path, own_import, frames, is_wrong):
    videos = place_clips("a.mp4", "b.mp4")
    for name in "ab":
        job = cvat_job(f"{name}.mp4", ("action", "select", "walk"))
        write_lines(videos / f"{name}.xml", job.replace("<labels>", f"{frames}<labels>"))
    printed = own_import(videos, tmp_path / "own")
    said = re.findall(r"(\w.xml):1: its task ends with frame (\d+), but (\w.mp4) has 50", printed)
    last = "24" if "25" in frames else "59"
    assert said == [(f"{x}.xml", last, f"{x}.mp4") for x in "ab" if is_wrong]
    if is_wrong and last == "24":  # a job may be of a part
        for path in videos.glob("*.xml"):
            path.write_text(path.read_text().replace("task>", "job>"))
        assert problems_in(own_import(videos, tmp_path / "job")) == []


def test_cvat_without_source_or_tracks(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    job = cvat_job("", ("action", "select", "walk")).replace("<source></source>", "")
    path = write_lines(tmp_path / "nosource.xml", job)
    with pytest.raises(ValueError, match="no <source>, .*name the xml after the video"):
        own_import(videos, tmp_path / "own", "--annotations", path)
    for name in "ab":  # so named
        write_lines(tmp_path / "xml" / f"{name}.xml", job)
    printed = own_import(videos, tmp_path / "own", "--annotations", tmp_path / "xml")
    assert problems_in(printed) == []
    empty = write_lines(tmp_path / "a.xml", "<annotations><track label='x'/></annotations>")
    with pytest.raises(ValueError, match="a.xml: no <track> with a shape in it"):
        own_import(videos, tmp_path / "e", "--annotations", empty)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\3\4broken")
    with pytest.raises(ValueError, match="broken.zip: .*expected a zip with annotations"):
        own_import(videos, tmp_path / "e", "--annotations", broken)


# ------------------------------------------------------------------------------------------------
# Other tools
# ------------------------------------------------------------------------------------------------

PIXELS = [9.6, 6.4, 48.0, 57.6]  # [.1, .1, .5, .9] of 96 x 64


def yolo_files(folder: Path) -> None:
    for name, label in (("a", 0), ("b", 1)):
        write_lines(folder / "labels" / f"{name}_000010.txt", f"{label} 0.3 0.5 0.4 0.8")
    write_lines(folder / "classes.txt", "walk", "run")


def yolo_yaml(folder: Path) -> None:
    for name, label in (("a", 0), ("b", 1)):
        polygon = "0.1 0.1 0.5 0.3 0.2 0.9"
        write_lines(folder / "labels" / name / "frame_10.txt", f"{label} {polygon}")
    write_lines(folder / "data.yaml", "path: x", "names:", "  0: walk", "  1: 'run'", "nc: 2")


def coco(folder: Path) -> None:
    x1, y1, x2, y2 = PIXELS
    sizes = dict(width=96, height=64)
    content = dict(
        categories=[dict(id=3, name="walk"), dict(id=5, name="run")],
        images=[dict(id=i, file_name=f"{v}/000010.jpg", **sizes) for i, v in enumerate("ab")],
        annotations=[
            dict(id=1, image_id=i, category_id=c, bbox=[x1, y1, x2 - x1, y2 - y1])
            for i, c in ((0, 3), (1, 5))
        ],
    )
    write_lines(folder / "instances_default.json", json.dumps(content))


def labelme(folder: Path) -> None:
    x1, y1, x2, y2 = PIXELS
    for name, label in (("a", "walk"), ("b", "run")):
        shape = dict(
            label=label, points=[[x1, y2], [x2, y1]], shape_type="rectangle", group_id=None
        )
        content = dict(shapes=[shape], imagePath="x.jpg", imageWidth=96, imageHeight=64)
        write_lines(folder / f"{name}_10.json", json.dumps(content))


def via_2(folder: Path) -> None:
    x1, y1, x2, y2 = PIXELS
    rect = json.dumps(dict(name="rect", x=x1, y=y1, width=x2 - x1, height=y2 - y1))
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
    folder.mkdir()
    with open(folder / "via.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(f"{header}region_attributes".split(","))
        rows.writerow(["a_0010.jpg", 1, "{}", 1, 0, rect, '{"act": "walk"}'])
        rows.writerow(["b_0010.jpg", 1, "{}", 1, 0, rect, '{"act": {"run": true, "sit": false}}'])


def via_3(folder: Path) -> None:
    x1, y1, x2, y2 = PIXELS
    attribute = {"1": {"aname": "act", "options": {"0": "walk", "1": "run"}}}
    rows = [
        f'"1_{v}","[""{v}.mp4""]",0,"[0.4]","[2,{x1},{y1},{x2 - x1},{y2 - y1}]","{{""1"":""{i}""}}"'
        for i, v in enumerate("ab")
    ]
    write_lines(
        folder / "via3.csv",
        "# Exported using VGG Image Annotator (http://www.robots.ox.ac.uk/~vgg/software/via)",
        "# ATTRIBUTE = " + json.dumps(attribute),
        "# CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,"
        + "spatial_coordinates,metadata",
        *rows,
    )


def label_studio(folder: Path) -> None:
    tasks = []
    for name, label in (("a", "walk"), ("b", "run")):
        box = dict(x=10, y=10, width=40, height=80, rotation=0)
        sequence = [dict(frame=11, time=0.44, enabled=False, **box)]
        result = dict(type="videorectangle", id=name, value=dict(sequence=sequence, labels=[label]))
        address = f"/data/upload/1/0a1b2c3d-{name}.mp4"
        tasks.append(dict(data=dict(video=address), annotations=[dict(result=[result])]))
    write_lines(folder / "project.json", json.dumps(tasks))


@pytest.mark.parametrize(
    "write", [yolo_files, yolo_yaml, coco, labelme, via_2, via_3, label_studio]
)
def test_exports_of_other_tools(place_clips, tmp_path, own_import, write):
    """Each writes the same: at 0.4 s, frame 10, [.1, .1, .5, .9], in a walk, in b run."""
    videos = place_clips("a.mp4", "b.mp4")
    write(tmp_path / "labels")
    words = ("--annotations", tmp_path / "labels", "--every-sec", 0)
    printed = own_import(videos, tmp_path / "own", *words)
    found = {}
    for part in open_parts(tmp_path / "own"):
        for item in part.items:
            assert np.allclose(item.boxes, [[0.1, 0.1, 0.5, 0.9]], atol=1e-6), printed
            assert item.time_sec == pytest.approx(0.4, abs=1e-6)
            found[Path(item.path).stem] = part.classes[item.labels[0].argmax()]
    assert found == {"a": "walk", "b": "run"} and problems_in(printed) == []


def test_frames_of_label_studio_are_those_of_its_project(place_clips):
    """Its frameRate, not the video's 25 a second: 24, its default, or 50."""
    library = Library(place_clips("a.mp4"), 0)
    for rate, expected in ((24, [0, 12, 25, 48]), (50, [0, 12, 25, 49]), (25, [0, 12, 25, 49])):
        frames = [1 + round(rate * time_sec) for time_sec in (0, 0.5, 1, 1.96)]
        box = dict(x=10, y=10, width=40, height=80, enabled=False)
        value = dict(framesCount=2 * rate, duration=2.0, labels=["walk"])
        value["sequence"] = [dict(frame=frame, **box) for frame in frames]
        annotation = dict(result=[dict(type="videorectangle", id="p", value=value)])
        task = dict(data=dict(video="a.mp4"), annotations=[annotation])
        marks = annotation_tools.read_label_studio("p.json", [task], library)
        assert [mark.frame for mark in marks] == expected, rate
    task["annotations"][0]["result"][0]["value"] |= dict(framesCount=240, duration=10)
    value["sequence"][-1]["frame"] = 200  # the export of a longer video
    (mark,) = annotation_tools.read_label_studio("p.json", [task], library)[3:]
    assert "which has 50" in annotations.place(mark, library.clock("a.mp4"))


def label_studio_marks(library: Library, value: dict, *more: dict, **annotation) -> list[Mark]:
    """Of one rectangle r."""
    rectangle = dict(type="videorectangle", id="r", value=dict(labels=["walk"]) | value)
    task = dict(
        data=dict(video="a.mp4"), annotations=[dict(result=[rectangle, *more], **annotation)]
    )
    return annotation_tools.read_label_studio("p.json", [task], library)


def test_label_studio_shows_a_box_until_it_is_switched_off(place_clips):
    """The last box, where nothing ends it, to the end of the video: 50 frames."""
    library = Library(place_clips("a.mp4"), 0.2)  # a keyframe in 5 frames
    box = dict(x=10, y=10, width=40, height=80)
    on, off = dict(frame=41, **box), dict(frame=46, enabled=False, **box)
    for sequence, frames in (
        ([dict(on, frame=36)], [35, 40, 45]),
        ([dict(on, enabled=True), dict(off, frame=41)], [40]),
        ([off, on], [40, 45]),  # in whatever order
        ([dict(off, frame=11), on], [10, 40, 45]),
    ):
        marks = label_studio_marks(library, dict(sequence=sequence))
        assert [mark.frame for mark in marks] == frames


def test_label_studio_turns_boxes_about_their_upper_left_corner(place_clips):
    library = Library(place_clips("a.mp4"), 0)
    box = dict(frame=11, x=50, y=50, width=30, height=20, rotation=90, enabled=False)
    (mark,) = label_studio_marks(library, dict(sequence=[box]))
    clock = library.clock("a.mp4")
    annotations.place(mark, clock)
    width, height = 0.2 * clock.height / clock.width, 0.3 * clock.width / clock.height
    assert mark.box == pytest.approx([0.5 - width, 0.5, 0.5, 0.5 + height])
    box["rotation"] = 180
    (mark,) = label_studio_marks(library, dict(sequence=[box]))
    assert mark.box == pytest.approx([20, 30, 50, 50])


def test_label_studio_takes_choices_for_actions_and_no_skipped_work(place_clips):
    library = Library(place_clips("a.mp4"), 0)
    box = dict(frame=11, x=10, y=10, width=40, height=80, enabled=False)
    chosen = dict(type="choices", id="r", value=dict(choices=["run", "wave"]))
    marks = label_studio_marks(library, dict(sequence=[box]), chosen)
    assert [mark.label for mark in marks] == ["run", "wave"]
    chosen["value"]["sequence"] = [box]  # as per-region choices repeat their region
    marks = label_studio_marks(library, dict(sequence=[box]), chosen)
    assert [(mark.label, mark.person) for mark in marks] == [("run", "r"), ("wave", "r")]
    assert label_studio_marks(library, dict(sequence=[box]), was_cancelled=True) == []
    relation = dict(type="relation", from_id="r", to_id="r")
    stretch = dict(type="timelinelabels", value=dict(ranges=[], timelinelabels=["sit"]))
    _, said = label_studio_marks(library, dict(sequence=[box]), relation, stretch)
    assert "['sit'] of a stretch of time" in said.wrong


def test_label_studio_names_files_of_its_machine_by_their_paths(place_clips):
    library = Library(place_clips("cam1/1.mp4", "cam2/1.mp4", "x y.mp4"), 0)
    for address, name in (
        ("/data/local-files/?d=cam1/1.mp4", "cam1/1.mp4"),
        ("/data/local-files/?d=films/cam2/1.mp4", "cam2/1.mp4"),
        ("/data/local-files/?d=other/x%20y.mp4", "x y.mp4"),
        ("/data/upload/3/0a1b2c3d-x y.mp4", "x y.mp4"),
    ):
        assert library.find(annotation_tools._named_video(["a note", address], library)) == [name]


def test_yolo_rows_are_boxes_polygons_or_poses(place_clips):
    library = Library(place_clips("a.mp4"))
    box = [0.4, 0.3, 0.6, 0.7]
    centre, triangle = "0 .5 .5 .2 .4", "0 .4 .3 .6 .4 .5 .7"

    def read(*rows: str) -> list[Mark]:
        return annotation_tools.read_yolo("a_3.txt", "\n".join(rows).encode(), library, {0: "walk"})

    for rows in (
        [centre],
        [f"{centre} .9"],
        [f"{centre} 3"],
        [f"{centre} .9 3"],  # score and track
        [f"{centre} .9 1", f"{centre} .8 2"],  # the second tells what the first is
        [f"{centre} .9 1", centre],
        [f"{centre} .45 .35 2 .55 .35 2"],  # a pose
        [f"{centre} .45 .35 1 .55 .35 1", f"{centre} .45 .35 1 .55 .35 2"],
        [f"{centre} .45 .35 2 .55 .35 2 .5 .5 0"],
        ["0 .05 .5 .5 .4 .9 2"],  # over the edge
        ["0 .4 .3 .6 .3 .6 .7 .4 .7"],
        ["0 .4 .3 .6 .3 .6 .7 .4 .7 .5 .71"],
        ["0 .4 .3 .6 .4 .5 .7"],
        ["0 .4 .3 .6 .3 .6 .7 .4 .7", f"{triangle[:-2]}1"],  # may be a box, were it alone
    ):
        mark = read(*rows)[0]
        there = [-0.2, 0.3, 0.3, 0.7] if ".05" in rows[0] else box
        assert np.allclose(mark.box, there, atol=0.011), rows
    for rows, message in (
        ([f"{centre} .9 1"], "a_3.txt:1: a box with track and score, or a pose, or a polygon?"),
        ([centre, "", f"{centre} .4 .4 .5"], "a_3.txt:3: 8 columns, expected class cx cy w h"),
        (["0 .5 .5"], "a_3.txt:1: 3 columns"),
        (["0 1.5 .5 .2 .4 .3 .3 .4 .4"], "a_3.txt:1: 9 columns"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(*rows)


@pytest.mark.parametrize(
    "text, names",
    [
        ("names:\n- walk\n- run\nnc: 2\n", {0: "walk", 1: "run"}),
        ("nc: 2\nnames:  # of classes\n  - walk # slow\n\n  - 'pick # up'\n", "walk;pick # up"),
        ("names:\n  1: walk\n  5: run\npath: x\n", {1: "walk", 5: "run"}),
        ("names: {0: walk, 2: 'a, b'}\n", {0: "walk", 2: "a, b"}),
        ('names: [walk, "pick up",\n  don\'t walk]  # c\nnc: 3\n', "walk;pick up;don't walk"),
        ("names:\n  0: don't walk # c\n  1: it's\n", "don't walk;it's"),
        ("names:\n  - walk\n  -  \n  - run\n", "walk;;run"),
        ("train: names\nnc: 2\n", {}),
    ],
)
def test_names_of_a_data_yaml(text, names):
    if isinstance(names, str):
        names = dict(enumerate(names.split(";")))
    assert sources._yolo_classes([sources.Source("data.yaml", text.encode())]) == names


def test_yolo_reads_its_classes_once_and_nothing_else(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    yolo_files(tmp_path / "labels")
    write_lines(tmp_path / "labels" / "labels" / "a_000020.txt", "1 0.3 0.5 0.4 0.8")
    (tmp_path / "labels" / "README.txt").write_bytes("Aufnahmen aus K\xf6ln".encode("latin-1"))
    with mock.patch.object(sources, "_yolo_classes", wraps=sources._yolo_classes) as read:
        printed = own_import(videos, tmp_path / "own", "--annotations", tmp_path / "labels")
    assert read.call_count == 1 and "README.txt: byte 15 is not UTF-8" in printed
    assert open_parts(tmp_path / "own")[0].classes == ["run", "walk"]


def test_numbers_beyond_the_classes_of_yolo_are_problems(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    yolo_files(tmp_path / "yolo")
    write_lines(tmp_path / "yolo" / "labels" / "a_000030.txt", "2 0.3 0.5 0.4 0.8")
    printed = own_import(videos, tmp_path / "own", "--annotations", tmp_path / "yolo")
    (said,) = problems_in(printed)
    assert said.endswith("a_000030.txt:1: class 2, but the list of classes has 0 to 1")
    assert open_parts(tmp_path / "own")[0].classes == ["run", "walk"]


def test_numbers_that_coco_does_not_list_are_problems(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    coco(tmp_path / "coco")
    path = tmp_path / "coco" / "instances_default.json"
    content = json.loads(path.read_text())
    first = content["annotations"][0]
    content["annotations"] += [first | dict(category_id=9), first | dict(image_id=7), first]
    path.write_text(json.dumps(content))
    problems = problems_in(own_import(videos, tmp_path / "more", "--annotations", path))
    assert [said.partition(": annotation ")[2] for said in problems] == [
        "3: category_id 9 is not in categories",
        "4: image_id 7 is not in images",
    ]


def test_labels_that_look_like_several_are_said_to_be_one(place_clips, tmp_path, own_import):
    rows = [f"{name},.4,.1,.1,.5,.9,walk;wave" for name in "ab"]
    path = write_lines(tmp_path / "labels.csv", HEADER, *rows)
    words = (place_clips("a.mp4", "b.mp4"), tmp_path / "own", "--annotations", path)
    assert "note: 'walk;wave' is taken as one class; two actions of a" in own_import(*words)


def test_circles_of_labelme(place_clips):
    shape = dict(label="walk", points=[[50, 40], [53, 44]], shape_type="circle")
    content = dict(shapes=[shape], imageWidth=96, imageHeight=64)
    (mark,) = annotation_tools.read_labelme("a_3.json", content, Library(place_clips("a.mp4")))
    assert mark.box == [45, 35, 55, 45]


def test_via_shapes_become_the_boxes_around_them(place_clips, tmp_path):
    library = Library(place_clips("a.mp4"))
    head = "# CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,"
    shapes = "[2,10,20,30,40]", "[3,25,40,15]", "[4,25,40,15,20]", "[7,10,20,40,60,12,30]"
    boxes = [10, 20, 40, 60], [10, 25, 40, 55], [10, 20, 40, 60], [10, 20, 40, 60]
    for shape, box in zip(shapes, boxes, strict=True):
        row = f'1,"[""a.mp4""]",0,"[0.4]","{shape}","{{""1"":""walk""}}"'
        (mark,) = annotation_tools.read_via("v.csv", f"{head}metadata\n{row}".encode(), library)
        assert mark.box == box and not mark.wrong
    for times, shape, wrong in (("[]", "[]", "without a time"), ("[1]", "[1,3,4]", "shape 1, a p")):
        row = f'1,"[""a.mp4""]",0,"{times}","{shape}","{{""1"":""walk""}}"'
        (mark,) = annotation_tools.read_via("v.csv", f"{head}metadata\n{row}".encode(), library)
        assert wrong in mark.wrong
    for shape, box in (
        (dict(name="circle", cx=25, cy=40, r=15), [10, 25, 40, 55]),
        (dict(name="ellipse", cx=25, cy=40, rx=15, ry=20), [10, 20, 40, 60]),
    ):
        row = dict(filename="a_0010.jpg", region_shape_attributes=json.dumps(shape))
        (mark,) = annotation_tools._via_2(
            "v.csv:2", row | dict(region_attributes='{"x": "walk"}'), library
        )
        assert mark.box == box and mark.frame == 10


def test_via_with_boxes_and_stretches(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    via_3(tmp_path / "labels")
    path = tmp_path / "labels" / "via3.csv"
    rows = [f'"2_{v}","[""{v}.mp4""]",0,"[0.4,1]","[]","{{""1"":""0""}}"' for v in "ab"]
    path.write_text(path.read_text() + "\n".join(rows))
    printed = own_import(videos, tmp_path / "own", "--annotations", path)
    assert "via3.csv:6: 'walk' has no box; left out beside 2 boxes are 2 such rows" in printed
    assert [len(part) for part in open_parts(tmp_path / "own")] == [1, 1]


def test_stretches_of_via_without_label_are_problems(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4", "c.mp4")
    via_3(videos)
    path = videos / "via3.csv"
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    rows = []
    for name, values in ("a", '{""1"":""0""}'), ("b", "{}"), ("c", '{""1"":""1""}'):
        rows.append(f'"2_{name}","[""{name}.mp4""]",0,"[0.4,1]","[]","{values}"')
    write_lines(path, *head, *rows)
    printed = own_import(videos, tmp_path / "own")
    assert f"via3.csv:{len(head) + 2}: no label" in printed
    assert [len(part) for part in open_parts(tmp_path / "own")] == [1, 1]


def test_damaged_zips_beside_videos_are_named(place_clips, tmp_path, own_import):
    videos = place_clips(*(f"{c}/{i}.mp4" for c in "ab" for i in range(2)))
    with zipfile.ZipFile(videos / "old.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.txt", "hello world " * 1000)
    content = bytearray((videos / "old.zip").read_bytes())
    content[40:60] = bytes(20)
    (videos / "old.zip").write_bytes(content)
    (videos / "no.zip").write_bytes(b"PK\3\4 and more")
    with zipfile.ZipFile(videos / "pictures.zip", "w") as archive:
        archive.writestr("x.png", "")
    printed = own_import(videos, tmp_path / "own")
    for name, said in (
        ("old", ".*, expected a zip with annotations"),
        ("no", ".*, expected a zip with annotations"),
        ("pictures", "a zip without annotations"),
    ):
        assert re.search(f"note: .*{name}.zip: {said}", printed)
        with pytest.raises(ValueError, match=f"{name}.zip: {said}"):
            own_import(videos, tmp_path / "e", "--annotations", videos / f"{name}.zip")


def test_annotations_that_are_none_are_refused_by_name(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    (tmp_path / "empty").mkdir()
    for given, said in (
        (tmp_path / "empty", "empty: neither annotations nor videos of .*videos"),
        (videos / "a.mp4", "not read: .*a.mp4"),
    ):
        with pytest.raises(ValueError, match=said):
            own_import(videos, tmp_path / "own", "--annotations", given)


def test_annotations_behind_a_link_are_read_like_the_videos_there(
    place_clips, tmp_path, own_import
):
    for name in ("cam1", "cam2"):
        real = place_clips(f"{name}.mp4", folder=tmp_path / "disk" / name)
        write_lines(real / "labels.csv", HEADER, f"{name},.4,.1,.1,.5,.9,walk")
        (real / "circle").symlink_to(tmp_path / "disk")
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / name).symlink_to(real)
    own_import(tmp_path / "videos", tmp_path / "own")
    assert [part.classes for part in open_parts(tmp_path / "own")] == [["walk"]] * 2


def test_class_folders_below_a_link(place_clips, tmp_path, own_import):
    place_clips(*(f"train/{c}/{i}.mp4" for c in "ab" for i in range(2)))
    (tmp_path / "link").symlink_to(tmp_path / "videos")
    own_import(tmp_path / "link", tmp_path / "own", "--annotations", tmp_path / "link" / "train")
    assert [part.classes for part in open_parts(tmp_path / "own")] == [["a", "b"]] * 2


def test_import_takes_time_in_proportion_to_rows(place_clips):
    """Not to their square, which took half a minute for what takes 0.1 s; in processor time."""
    number = 8000
    library = Library(place_clips("a.mp4"), 0)
    rows = [
        Mark(f"l.csv:{i}", "", "ab"[i % 2], file=f"{'uv'[i % 2]}/{i}.mp4") for i in range(number)
    ]
    both = [
        Mark(f"l.csv:{i}", "", "a", part=p, file="x")
        for p in ("test", "train")
        for i in range(number)
    ]
    shapes = [annotation_tools.Shape("w", i, np.zeros(4), ["x"]) for i in range(4000)]
    files = [
        sources.Source(f"labels/a_{i:06d}.txt", b"0 .5 .5 .2 .4\n", "YOLO") for i in range(number)
    ]
    problems: list[str] = []
    began = time.process_time()
    parts = importing.choose_parts(rows, 0.2, 0, "1", {}, [], [])
    task = importing.ImportedTask(rows, parts, {"a": 1, "b": 2}, library, Path("own"))
    assert importing.clip_length(task) == {"frames": 16, "stride": 4}
    assert importing._stated_parts(both, problems) == {"x": "test"} and len(problems) == 1
    assert (
        len(annotation_tools.sample_track(annotation_tools.Track("a", "0", None, shapes), None))
        == 4000
    )
    assert len(sources.read_marks(files, [], library, None, "", (), [])) == number
    assert time.process_time() - began < 5


def test_frames_of_pictures(place_clips):
    folder = place_clips("a.mp4", "cam1/0001.mp4", "b_2.mp4")
    for name, found in {
        "labels/a_000012.txt": ("a", 12),
        "x/a/frame_000012.png": ("x/a", 12),
        "a.mp4/7.jpg": ("a.mp4", 7),
        "cam1/0001/000003.txt": ("cam1/0001", 3),
        "cam1/0001_3.txt": ("cam1/0001", 3),
        "b_2-img-5.json": ("b_2", 5),
        "x/b_2.zip/obj_train_data/frame_000005.txt": ("b_2", 5),
    }.items():
        for first in (0, 1):
            library = Library(folder, first_frame=first)
            video, frame = annotation_tools.frame_of(name, library)
            assert library.find(video) == library.find(found[0]), name
            assert frame == found[1] - first
    for name, message in {
        "a.txt": "no number of a frame",
        "a/labels/c_12.txt": "no video in .* is called 'c'$",  # a is another video
        "c_12.txt": "no video in .* is called 'c'$",
        "A_12.txt": "no video in .* is called 'A', a.mp4 differs in case",
    }.items():
        with pytest.raises(ValueError, match=message):
            annotation_tools.frame_of(name, Library(folder))


def test_frames_are_thinned_out_and_first_frame_is_asked_for(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    for frame in range(1, 51):
        for name in "ab":
            write_lines(videos / "labels" / f"{name}_{frame}.txt", "0 0.3 0.5 0.4 0.8")
    printed = own_import(videos, tmp_path / "own")
    assert "4 of 100 annotated frames are taken, the first of every 1 s" in printed
    assert [item.time_sec for item in open_parts(tmp_path / "own")[0].items] == [0.04, 1.0]
    printed = own_import(videos, tmp_path / "all", "--every-sec", 0)
    assert "frame 50 of a.mp4, which has 50 from 0 on" in printed and "--first-frame 1" in printed
    own_import(videos, tmp_path / "one", "--every-sec", 0, "--first-frame", 1)
    train, val = open_parts(tmp_path / "one")
    assert len(train) == len(val) == 50 and train.items[0].time_sec == 0


def test_pictures_extracted_at_a_lower_rate_are_doubted_or_given_their_times(
    place_clips, tmp_path, own_import
):
    """Of 50 frames at 25 a second; ffmpeg -vf fps=10 shows of them those of `expected`."""
    videos = place_clips("a.mp4", "b.mp4")
    for picture in range(1, 21):
        for name in "ab":
            label = write_lines(videos / f"{name}_{picture:04d}.txt", "0 0.3 0.5 0.4 0.8")
    said = "a.mp4: pictures numbered 1 to 20, within 0.8 of 2.0 s: were they extracted at a lower"
    assert said in own_import(videos, tmp_path / "own")
    words = ("--every-sec", 0, "--first-frame", 1, "--picture-fps", 10)
    assert problems_in(own_import(videos, tmp_path / "ten", *words)) == []
    expected = np.array(
        [1, 3, 6, 8, 11, 13, 16, 18, 21, 23, 26, 28, 31, 33, 36, 38, 41, 43, 46, 48]
    )
    for part in open_parts(tmp_path / "ten"):
        times = [item.time_sec for item in part.items]
        assert np.allclose(times, expected / 25)
    label.rename(videos / "b_0021.txt")  # one more than there are
    assert "b_0021.txt:1: frame 50 of" in own_import(videos, tmp_path / "more", *words)
    with pytest.raises(ValueError, match="--picture-fps -1, expected pictures a second"):
        own_import(videos, tmp_path / "e", "--picture-fps", -1)
    for path in videos.glob("*.txt"):  # every second frame
        path.rename(path.with_stem(f"{path.stem[:2]}{int(path.stem[2:]) * 2}"))
    assert problems_in(own_import(videos, tmp_path / "sparse")) == []


def test_stretches_are_read():
    boris = (
        "Observation id,Media file name,Total length,Subject,Behavior,Start (s),Stop (s)\n"
        "o1,films/a.mp4,2.0,rat1,Grooming,0.25,1.5\n"
    )
    for text in (boris, "video;start;end;label\na;0:00.25;1,5;Grooming\n"):
        (mark,) = annotations.read_clip_table("b.csv", text.encode())
        assert (mark.label, mark.time_sec, mark.end_sec) == ("Grooming", 0.25, 1.5)
        assert Path(mark.video).stem == "a" and not mark.is_clip


ELAN = """<?xml version="1.0" encoding="UTF-8"?><ANNOTATION_DOCUMENT><TIME_ORDER>
<TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="250"/><TIME_SLOT TIME_SLOT_ID="ts2" TIME_VALUE="1500"/>
</TIME_ORDER><TIER TIER_ID="behaviour"><ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
<ANNOTATION_VALUE>grooming</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION></TIER>
</ANNOTATION_DOCUMENT>"""


def test_the_lines_in_docs_make_the_csv_of_elan(tmp_path, monkeypatch):
    text = (HERE / "docs" / "own_videos.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"ELAN's tier.*?\n\n((?:    .*\n)+)", text)
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rat1.eaf", ELAN)
    exec(compile(textwrap.dedent(block), "own_videos.md", "exec"), {})
    (mark,) = annotations.read_clip_table("labels.csv", Path("labels.csv").read_bytes())
    assert (mark.video, mark.time_sec, mark.end_sec) == ("rat1.mp4", 0.25, 1.5)
    assert mark.label == "grooming"


def test_stretches_are_trained_without_cutting_files(place_clips, tmp_path, own_import):
    """The clips of frames 10 to 39 and 20 to 21 of videos of 50, at 25 a second."""
    videos = place_clips("a.mp4", "sub/b, c.mp4")
    rows = ["a,0.4,1.6,walk", '"sub/b, c.mp4",0.8,0.88,"stand, up"', "a,1.5,9,walk", "a,3,4,walk"]
    write_lines(videos / "labels.csv", "video,start,end,label", *rows, "a,1,1,walk")
    printed = own_import(videos, tmp_path / "own", "--seed", 1)
    assert "labels.csv:4: 1.5 to 9 s of a.mp4, which has 2.000 s: cut off" in printed
    assert "labels.csv:5: 3 to 4 s" in printed and "labels.csv:6: 1 to 1 s" in printed
    assert "stretches" in printed.splitlines()[0]
    seen = {}
    for dataset in open_parts(tmp_path / "own"):
        assert dataset.classes == ["stand, up", "walk"]
        task = replace(dataset.task, frames=8, stride=1, size=64, short_side=[64, 64], flip=0.0)
        for item in dataset.items:
            label = dataset.classes[item.label]
            for seed in range(20):
                rng = np.random.default_rng(seed)
                with mock.patch.object(data, "decode_clip", return_value=np.zeros((8, 64, 96, 3))):
                    data.training_sample(task, item, rng)
                    (_, times), _ = data.decode_clip.call_args
                    seen.setdefault((label, item.time_sec), []).append(times(2.0))
            with mock.patch.object(data, "decode_clip", return_value=np.zeros((8, 64, 96, 3))):
                data.evaluation_sample(task, item)
                times = data.decode_clip.call_args[0][1](2.0)
                middle = (item.time_sec + item.end_sec) / 2
                assert np.mean([times[0], times[-1] + 1 / 25]) == pytest.approx(middle)
    starts = np.array(seen["walk", 0.4])[:, 0]
    assert 0.4 <= starts.min() < 0.55 and 1.1 < starts.max() <= 1.6 - 8 / 25
    short = np.array(seen["stand, up", 0.8])
    assert np.allclose(short[:, 0], 0.84 - 4 / 25)  # longer than the stretch: around it


# ------------------------------------------------------------------------------------------------
# Tables of boxes, for import and predict
# ------------------------------------------------------------------------------------------------


def test_a_label_of_minus_one_is_no_action_and_never_merged(tmp_path):
    path = write_lines(tmp_path / "b.csv", HEADER, "a,1,.1,.1,.5,.9,-1", "a,1,.1,.1,.5,.9,1")
    marks, _ = annotations.read_boxes_table(path)
    assert [mark.label for mark in marks] == ["", "1"]
    clips = [Mark("l:1", "a", "-1"), Mark("l:2", "b", "1"), Mark("l:3", "b", "pick-up")]
    problems: list[str] = []
    assert importing.unify_classes(clips, problems) == {"-1": 1, "1": 2, "pick-up": 3}
    assert problems == []


def test_times_that_are_none_are_refused():
    assert annotations.read_seconds("1:02:03,5") == 3723.5
    assert annotations.read_seconds("75:10") == 4510
    with pytest.raises(ValueError, match="'00:01:10:12' is a time code with frames"):
        annotations.read_seconds("00:01:10:12")
    with pytest.raises(ValueError, match="'-0:05' is not a time"):
        annotations.read_seconds("-0:05")


def test_boxes_table_reads_detections_and_annotations(tmp_path):
    def read(*lines, unit=""):
        return annotations.read_boxes_table(write_lines(tmp_path / "b.csv", *lines), unit)

    marks, said = read("a,1,.1,.1,.5,.9,,0.75", "a,2", "b.mp4,2.5,.1,.1,.5,.9,-1,0.5")
    assert [mark.score for mark in marks] == [0.75, 0.5] and marks[0].size == (1, 1)
    assert "2 boxes in shares of width and height, up to 0.9" in said
    marks, said = read("a,1,10,10,50,90,12,3")  # AVA's, in pixels
    assert marks[0].label == "12" and marks[0].person == "3" and marks[0].size is None
    assert "pixels" in said and marks[0].score == 1
    assert read("a,1,-.02,.1,1.01,.9")[0][0].size == (1, 1)  # a little over the edge
    assert read("a,1,.1,.1,.5,.9", unit="px")[0][0].size is None
    marks, _ = read("score,video,time_sec,x,y,width,height", "0.5,a,1,10,10,20,30")
    assert marks[0].box == [10, 10, 30, 40] and marks[0].score == 0.5
    clock = FrameTimes(np.array([0, 0.5, 1.0]), 1.5, 100, 80)
    assert annotations.place(marks[0], clock) == "" and marks[0].box == [0.1, 0.125, 0.3, 0.5]
    late = Mark("b.csv:1", "a", time_sec=1.5, box=[0, 0, 1, 1])
    assert "time 1.5 s is not within the 1.500 s of a" in annotations.place(late, clock)
    assert late.box == ()
    for rows, message in (
        (["a,1,.1,.1,.5"], ":1: 5 columns, expected 6 to 8"),
        (["a,1,.1,.1,.5,x"], ":1: .*'x'"),
        (["a,1"], "no rows with a box"),
        ([], "no rows"),
        (["video,time_sec,x1,y1,x2", "a,1,2,3,4"], ":1: no column y2, found the header"),
    ):
        with pytest.raises(ValueError, match=message):
            read(*rows)


# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------


def test_import_into_a_recipe_that_is_there(place_clips, tmp_path, own_import):
    videos = place_clips("a.mp4", "b.mp4")
    write_lines(videos / "labels.csv", f"{HEADER}\n{ROWS}".strip())
    own_import(videos, tmp_path / "own")
    path = tmp_path / "own" / "recipe.toml"
    text = "# mine\n" + path.read_text().replace("frames = 16", "frames = 8")
    path.write_text(f"\ufeff{text}", encoding="utf-8")  # as some editors save it
    before = text
    more = place_clips(*(f"{c}/{i}.mp4" for c in "xy" for i in range(3)), folder=tmp_path / "more")
    printed = own_import(more, tmp_path / "clips", "--into", path)
    after = path.read_text()
    assert "was kept" not in printed
    assert after.startswith(before.rstrip()) and not (tmp_path / "clips" / "recipe.toml").exists()
    (first, _), (second, root) = read_tasks(path)
    assert (second.name, second.kind, second.frames) == ("clips", "clip", 8) and first.kind == "box"
    for part in ("train", "val"):
        dataset = data.open_task(second, root, part, formats)
        assert dataset.classes == ["x", "y"]
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    for recipe in (path, link):  # again: it has it
        own_import(more, tmp_path / "clips", "--into", recipe)
        assert path.read_text() == after
    (tmp_path / "deep" / "clips").mkdir(parents=True)
    with pytest.raises(ValueError, match="has a task 'clips' already"):
        own_import(more, tmp_path / "deep" / "clips", "--into", path)
    assert path.read_text() == after and not [*(tmp_path / "deep" / "clips").iterdir()]
    with pytest.raises(ValueError, match="none.toml: no such recipe"):
        own_import(more, tmp_path / "new", "--into", tmp_path / "none.toml")
    assert not (tmp_path / "new").exists() and not [*tmp_path.glob(".*")]


@pytest.mark.parametrize(
    "seconds, frames, stride", [(10, 16, 4), (2, 16, 3), (1, 16, 1), (0.5, 8, 1)]
)
def test_clip_recipes_fit_their_clips(tmp_path, own_import, seconds, frames, stride):
    for name in ("a/1.mp4", "a/2.mp4", "b/3.mp4", "b/4.mp4"):
        write_movie(tmp_path / "v" / name, round(10 * seconds), rate=10, preset="ultrafast")
    own_import(tmp_path / "v", tmp_path / "own")
    task = open_parts(tmp_path / "own")[0].task
    assert (task.frames, task.stride) == (frames, stride)
    assert task.frames * task.step_sec <= seconds
