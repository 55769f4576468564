"""Tests of extras/formats.py, and of what data.py says to them."""

import json
import os
import time

import pytest
from helpers import SHARED, open_written, write_lines

import data
from extras import formats


@pytest.mark.parametrize(
    "line, name, label",
    [
        ("a.mp4 3", "a.mp4", "3"),
        ("a.mp4 3.0", "a.mp4", "3"),
        ("a.mp4,12.00", "a.mp4", "12"),
        ("a.MP4;walk", "a.MP4", "walk"),
        ("b c/d,e.mp4, pick up", "b c/d,e.mp4", "pick up"),
        ("a.mp4,class 1", "a.mp4", "class 1"),
        ("a.mp4 jump 3 times", "a.mp4", "jump 3 times"),
        ('"a, b.mp4","walk, run"', "a, b.mp4", "walk, run"),
        ('a.mp4 "gesture 12"', "a.mp4", "gesture 12"),
        ("air drumming\\x y.mp4 0", "air drumming/x y.mp4", "0"),
        ("C:\\videos\\run\\x.avi", "C:/videos/run/x.avi", "run"),
        ("run/x.avi", "run/x.avi", "run"),
        ("x.ts.mp4 walk", "x.ts.mp4", "walk"),
        ("run/0001 7", "run/0001", "7"),
        ("0001,walk", "0001", "walk"),
        ("0001 walk", "0001", "walk"),
    ],
)
def test_rows_of_lists(line, name, label, tmp_path):
    (row,) = formats.read_clips(write_lines(tmp_path / "l.txt", line).as_posix(), "train", "")
    assert (row.name, row.label) == (name, label) and row.where == f"{tmp_path}/l.txt:1"


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
        ("e.pbtxt", '# don\'t\n# item { name: "c" id: 3 }\nitem { name: "a" id: 1 }', {1: "a"}),
        ("f.pbtxt", "item { name: '# \"id: 3\"' id: 1 }", {1: '# "id: 3"'}),
        ("plain.txt", "b b\na\n", {0: "b b", 1: "a"}),
        ("head.csv", "id,name\n0,abseiling\n1,air drumming\n", {0: "abseiling", 1: "air drumming"}),
        ("head.csv", "name;label_id\nair drumming;1\nrun;0\n", {1: "air drumming", 0: "run"}),
        ("head.csv", "class\nrun\nwalk\n", {0: "run", 1: "walk"}),
        ("map.txt", "0: abseiling\n1: air drumming\n", {0: "abseiling", 1: "air drumming"}),
        ("quoted.csv", '0,"air drumming"\n1,"b, c"\n', {0: "air drumming", 1: "b, c"}),
        ("float.csv", "0.0,a\n1.0,b\n", {0: "a", 1: "b"}),
        ("fb.json", '{"\\"air drumming\\"": 1, "run": 0}', {1: "air drumming", 0: "run"}),
        ("id2label.json", '{"0": "run", "1": "walk"}', {0: "run", 1: "walk"}),
        ("some.txt", "10 pin bowling\nrun\nwalk\n", {0: "10 pin bowling", 1: "run", 2: "walk"}),
        ("torn.txt", "0 run\n1 walk\nsit\n", "torn.txt:3: no number and name, as 2 other"),
        ("wide.csv", "id,name,label\n0,run,x\n", "wide.csv:1: expected a number and a name"),
        ("a.pbtxt", 'item { name: "x" }', "1 entries, 0 numbers"),
        ("empty.txt", "\n", "0 entries"),
        ("twice.txt", "run\nrun\n", "1 names"),
        ("d.json", "[1, 2]", "expected a JSON dict"),
        ("d.json", '{"a": 0,', "not JSON"),
        ("d.json", '{"a": "x"}', "0 numbers"),
    ],
)
def test_class_lists(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    if isinstance(expected, dict):
        assert formats.read_classes(tmp_path / name) == expected
    else:
        with pytest.raises(ValueError, match=f"{name}.*{expected}"):
            formats.read_classes(tmp_path / name)


def test_formats_of_clip_tasks(tmp_path):
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
        dataset = open_written(tmp_path, "clip", lines, touch=videos, **options)
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
        (["label,time_start,time_end,youtube_id", "jump,17,27"], "", "csv:2: no youtube_id"),
    ):
        with pytest.raises(ValueError, match=error):
            read(*lines, labels=labels)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared annotations are not here")
def test_published_files_in_full():
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
    videos = formats.Videos("", names)
    local = [videos.at(video, stamp / 1e6, 0.0)[1] for video, stamp in found]
    assert 1.0 <= min(local) and max(local) <= 9.0
    rows = list(formats.read_clips(str(kinetics), "val", ""))
    assert [videos.clip(row) for row in rows] == names
    assert len({row.label for row in rows}) == 700
    classes = formats.read_classes(SHARED / "ava/ava_action_list_v2.1_for_activitynet_2018.pbtxt")
    assert len(classes) == 60 and max(classes) == 80


@pytest.mark.parametrize(
    "name, lines, error",
    [
        ("a.csv", ["run/1.mp4,run,4,0", "run/2.mp4,walk,4,0"], "a.csv:2: expected `class/file,cla"),
        ("a.csv", ["run/1.mp4,run,4,0", "run/2.mp4 run"], "a.csv:2: expected `class/file,class"),
        ("a.csv", ["label,youtube_id,time_start,time_end", "a,b,1,x"], "a.csv:2: 'x' is not a num"),
        ("a.json", ['[{"id": 1, "template": "x"}]'], "a.json: entry 1 has no id or no template"),
        ("a.csv", ["video,start,end,label", "", 'a,1,2,"x', "b,1,2,y"], "a.csv:3: unexpected end"),
        ("a.json", ['["x"]'], "a.json: entry 1 has no id or no template"),
        ("a.json", ['{"x": 1}'], "a.json: expected a JSON list, found dict"),
        ("a_test_split1.txt", ["x.avi 1", "y.avi 3"], "a_test_split1.txt:2: expected `file.avi 0`"),
    ],
)
def test_formats_say_what_they_miss(name, lines, error, tmp_path):
    write_lines(tmp_path / name, *lines)
    path = tmp_path / ("*_test_split1.txt" if "split" in name else name)
    with pytest.raises(ValueError, match=error):
        list(formats.read_clips(str(path), "train", str(tmp_path)))


def test_formats_hmdb_parts_and_names(tmp_path):
    """Names lose their part and nothing else; 0 is neither part."""
    write_lines(tmp_path / "brush_hair_test_split12.txt", "a b#1.avi 1", "c.avi 2", "d.avi 0")
    pattern = str(tmp_path / "*_test_split12.txt")
    for split, name in (("train", "a b#1.avi"), ("val", "c.avi")):
        (row,) = formats.read_clips(pattern, split, "")
        assert (row.label, row.name) == ("brush_hair", name)


def test_formats_kinetics_under_bare_ids(tmp_path):
    """Files `ID.mp4` as well as `ID_START_END.mp4`, which go first."""
    rows = ["youtube_id,label,time_start,time_end", "a_b,run,1.0,11", "-c,walk,3,13"]
    touch = "a_b.mp4; a_b_000001_000011.mp4; x/-c.webm"
    dataset = open_written(tmp_path, "clip", rows, touch=touch)
    found = [os.path.relpath(item.path, tmp_path / "v") for item in dataset.items]
    assert found == ["a_b_000001_000011.mp4", "x/-c.webm"]


def test_data_alone_names_the_other_formats(tmp_path):
    for name, line in (("a.json", "[]"), ("a_test_split1.txt", "x.avi 1")):
        write_lines(tmp_path / name, line)
        task = data.Task("t", "clip", train=name.replace("a_", "*_"), flip=0.0)
        with pytest.raises(ValueError, match="extras/formats.py"):
            data.open_task(task, tmp_path)


def test_formats_never_guess_between_files_of_one_name():
    videos = formats.Videos("", ["cam1/0001.mp4", "cam2/0001.mp4", "other/0002.mp4"])
    for name, file in (
        ("0001.mp4", None),
        ("cam2/0001.avi", "cam2/0001.mp4"),
        ("cam2/0001", "cam2/0001.mp4"),
        ("old/cam2/0001.mp4", "cam2/0001.mp4"),
        ("0002.avi", "other/0002.mp4"),
    ):
        assert videos.clip(data.ClipRow("a:1", "walk", name)) == file, name


def test_formats_find_one_of_many_files_of_one_name():
    """Of a folder per recording in time that does not grow with their number each."""
    files = [f"{number:05d}/rgb.mp4" for number in range(20_000)]
    videos, began = formats.Videos("", files), time.process_time()
    for number in range(0, 20_000, 10):
        row = data.ClipRow("a:1", "walk", f"old/{number:05d}/rgb.avi")
        assert videos.clip(row) == files[number]
    assert time.process_time() - began < 5  # asking all of them for each took minutes
