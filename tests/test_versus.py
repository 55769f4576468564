"""Tests of extras/versus.py."""

import json

import pytest
from helpers import AVA_LABELS, ava_file, ava_map, ava_random, run_here

import ava_eval
from extras import versus


def test_versus_draws_whole_videos(tmp_path):
    truth, found, _ = ava_random(12)
    aps, tables = [], ()
    for some in (("v1",), ("v0",), ("v0", "v1")):
        files, keys = [[x for x in rows if x.startswith(some)] for rows in (truth, found)], {}
        aps.append([one["ap"] for one in ava_map(tmp_path, *files)["per_class"]])
        tables = [ava_eval.load(tmp_path / f"{x}.csv", "", keys, x == "g")[0] for x in "gd"]
    run = ava_eval.score_tables(*tables, [1, 2, 4], ava_eval.PROTOCOLS["official-2020"], [])
    draws = versus.redraw(run, keys, 50)
    for c in range(3):  # of two videos: both, or twice the one, or twice the other
        legal = {round(ap[c], 12) for ap in aps if ap[c] is not None}
        assert legal == {round(ap, 12) for ap in draws[c].tolist() if ap == ap}


@pytest.mark.parametrize("protocol", ["official-2020", "official-2019"])
def test_versus_is_the_difference_of_two_evaluations(tmp_path, protocol):
    truth, found, lines = ava_random(12)
    files = [ava_file(tmp_path / "better", found)]
    files += [ava_file(tmp_path / "worse", [row for row in found if not row.startswith("v0")])]
    exclusions = lines if protocol == "official-2019" else None
    ava_map(tmp_path, truth, [], None, exclusions)  # writes the files
    rest = [tmp_path / "e.csv" if exclusions else None, protocol]
    measured = [ava_eval.evaluate(tmp_path / "g.csv", x, AVA_LABELS, *rest) for x in files]
    result = versus.compare(*files, tmp_path / "g.csv", AVA_LABELS, *rest)["differences"]
    one = result["all"]
    assert [one["ap"], one["other"]] == pytest.approx([x["mAP"] for x in measured])
    assert one["difference"] == one["ap"] - one["other"] > 0.001
    assert one["interval"][0] <= one["difference"] <= one["interval"][1]
    for ours, theirs in zip(*(x["per_class"] for x in measured), strict=True):
        if ours["ap"] is not None:
            one = result[f"{ours['id']} {ours['name']}"]
            assert (one["ap"], one["other"]) == (ours["ap"], theirs["ap"])
    same = versus.compare(files[0], files[0], tmp_path / "g.csv", AVA_LABELS, *rest)
    for one in same["differences"].values():
        assert one["difference"] == 0 and one["interval"] == [0, 0]


def test_versus_from_the_shell(tmp_path):
    truth = ava_file(tmp_path / "g", ["v,902,0,0,1,1,12", "w,902,0,0,1,1,11"])
    ours = ava_file(tmp_path / "ours", ["v,902,0,0,1,1,12,1", "w,902,0,0,1,1,11,1"])
    theirs = ava_file(tmp_path / "theirs", ["w,902,0,0,1,1,11,1"])
    words = ["cofinetune.py", "versus", ours, theirs, "-g", truth]
    lines = run_here(*words).stdout.splitlines()
    assert lines[0].startswith(f"{ours} against {theirs} (official-2020)")
    assert lines[1].startswith("100.00 -  50.00 = +50.00  [ +0.00, +100.00]")
    lines = [line for line in lines if not line.startswith("note: ")]
    assert lines[-2].startswith("100.00 -   0.00 = +100.00") and lines[-2].endswith("12 stand")
    assert lines[-1] == "100.00 - 100.00 =  +0.00  [ +0.00,  +0.00]  11 sit"
    shown = json.loads(run_here(*words, "--json").stdout)
    assert shown == versus.compare(ours, theirs, [truth])
    broken = run_here(*words, "-l", "missing.pbtxt")
    assert broken.returncode and broken.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="no box of any of the 1 classes"):
        versus.compare(ours, theirs, truth, {7: "ride"})


def test_versus_has_the_notes_of_each_evaluation(tmp_path):
    """Classes of one's own without a label map; a file that knows half of the keyframes."""
    truth = ava_file(tmp_path / "g", ["v,902,0,0,1,1,1", "w,902,0,0,1,1,2"])
    ours = ava_file(tmp_path / "ours", ["v,902,0,0,1,1,1,1", "w,902,0,0,1,1,2,1"])
    theirs = ava_file(tmp_path / "theirs", ["w,902,0,0,1,1,2,1"])
    shown = run_here("cofinetune.py", "versus", ours, theirs, "-g", truth).stdout.splitlines()
    expected = []
    for file in (ours, theirs):
        notes = ava_eval.evaluate(truth, file)["notes"]
        expected += [f"note: {file}: {note}" for note in notes]
    assert shown[-len(expected) :] == expected
    assert sum("the labels were taken for AVA's" in line for line in expected) == 2
    assert sum("1 of 1 detected keyframes" in line for line in expected) == 1


@pytest.mark.parametrize("swapped", [False, True])
def test_versus_refuses_a_file_of_other_keyframes(tmp_path, swapped):
    """The mean of the other one would read as a significant lead."""
    truth = ava_file(tmp_path / "g", ["v,902,0,0,1,1,12"])
    files = [ava_file(tmp_path / "ours", ["v,902,0,0,1,1,12,1"])]
    files.insert(swapped, ava_file(tmp_path / "late", ["v,1.5,0,0,1,1,12,1"]))
    done = run_here("cofinetune.py", "versus", *files, "-g", truth)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    late = tmp_path / "late"
    assert f"{late}: no keyframe of it is annotated in {truth}: its first is v,1.5" in done.stderr
