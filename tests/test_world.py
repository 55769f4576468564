"""Tests of extras/world.py."""

import argparse
import csv
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import read_movie

from extras import world

SIZES = dict(
    actions_train=24,
    actions_val=12,
    templates_train=16,
    templates_val=8,
    scenes_train=64,
    scenes_val=16,
    looks_train=8,
    looks_val=4,
)


@pytest.fixture(scope="module")
def folder_of_world(tmp_path_factory):
    """By the command, in as many processes as there are cores."""
    folder = tmp_path_factory.mktemp("demo") / "world"
    parser = argparse.ArgumentParser()
    world.add_options(parser)
    words = []
    for name, value in SIZES.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    world.run(parser.parse_args([str(folder), *words]), {}, None)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*")}


def draw_alone(pose="round", motion="still"):
    """A sprite drawn on black, and its pixels: (FRAMES, SIZE, SIZE) bool."""
    sprite = world.Sprite(np.random.default_rng(3), [pose], 9.0, 31.0, 33.0)
    sprite.move(motion, np.random.default_rng(4))
    video = np.zeros((world.FRAMES, world.SIZE, world.SIZE, 3), np.float32)
    sprite.draw(video)
    return sprite, video.max(-1) > 0.02


def test_world_does_not_depend_on_processes_and_heals(folder_of_world, tmp_path, capsys):
    """And the command makes that of its options."""
    world.make_world(tmp_path / "w", workers=1, **SIZES)
    expected = contents(folder_of_world)
    assert contents(tmp_path / "w") == expected
    torn, kept = (tmp_path / f"w/ava/videos/train_0000{i}.mp4" for i in (0, 1))
    since = kept.stat().st_mtime_ns
    torn.replace(tmp_path / "torn")
    leftover = tmp_path / f"w/ava/videos/{torn.name}.1.partial"  # of a process that was killed
    leftover.write_bytes(b"half")
    (tmp_path / "w/actions/videos/val_00003.mp4").unlink()
    world.make_world(tmp_path / "w", workers=1, **SIZES)
    leftover.unlink()
    assert contents(tmp_path / "w") == expected and kept.stat().st_mtime_ns == since
    assert "2 made" in capsys.readouterr().out.splitlines()[-1]


def test_annotations_have_the_real_formats(folder_of_world):
    named = set()
    for split in ("train", "val"):
        rows = list(csv.reader((folder_of_world / f"ava/{split}.csv").open()))
        assert {len(row) for row in rows} == {8}
        assert {row[1] for row in rows} == {"0902", "0903", "0904", "0905"}
        boxes = np.array([row[2:6] for row in rows], float)
        assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, :2] < boxes[:, 2:]).all()
        counts = np.bincount([int(row[6]) for row in rows], minlength=len(world.LABELS) + 1)[1:]
        assert split == "val" or counts.min() == 3 and counts.max() == 127
        named |= {f"ava/videos/{row[0]}.mp4" for row in rows}
        for dataset, names in world.UPSTREAM.items():
            text = (folder_of_world / f"{dataset}/{split}.txt").read_text()
            lines = [line.rsplit(None, 1) for line in text.splitlines()]
            assert np.ptp(np.bincount([int(label) for _, label in lines])) <= 1
            named |= {f"{dataset}/{path}" for path, _ in lines}
            classes = (folder_of_world / f"{dataset}/classes.txt").read_text().split()
            assert classes == names
        labels = json.loads((folder_of_world / "templates/labels.json").read_text())
        entries = {"train": "train.json", "val": "validation.json"}[split]
        for entry in json.loads((folder_of_world / "templates" / entries).read_text()):
            assert 0 <= int(labels[entry["template"].replace("[", "").replace("]", "")]) < 8
            named.add(f"templates/videos/{entry['id']}.mp4")
    assert named == {path for path in contents(folder_of_world) if path.endswith(".mp4")}
    found = list(csv.reader((folder_of_world / "ava/val_boxes.csv").open()))
    assert {len(row) for row in found} == {8} and {row[6] for row in found} == {""}


def test_second_902_is_half_a_second_into_the_file(folder_of_world):
    sizes = world.World(**SIZES)
    scenes = world.plan_scenes(sizes, world.TRAIN)
    frames = dict(zip(*read_movie(folder_of_world / "ava/videos/train_00001.mp4"), strict=True))
    for k in range(world.SCENES):
        drawn = world.render(sizes, "ava", 0, world.SCENES + k, scenes[world.SCENES + k])
        assert abs(frames[0.5 + k].astype(int) - drawn[world.FRAMES // 2]).mean() < 8


@pytest.mark.parametrize("pose", world.POSES)
def test_boxes_enclose_the_pixels(pose):
    for motion in ("still", "right", "grow"):
        sprite, pixels = draw_alone(pose, motion)
        rows, columns = np.nonzero(pixels[world.FRAMES // 2])
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(sprite.box() * world.SIZE - seen).max() < 2.5


def test_motions_show_in_the_pixels():
    for name, (x, y) in dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1)).items():
        centre = [np.argwhere(frame).mean(0) for frame in draw_alone(motion=name)[1]]
        assert np.sign(np.round(centre[-1] - centre[0])).tolist() == [y, x]
    changing = ("grow", "shrink", "blink", "pulse")
    area = {name: draw_alone(motion=name)[1].sum((1, 2)) for name in changing}
    assert (np.diff(area["grow"]) >= 0).all() and (np.diff(area["shrink"]) <= 0).all()
    assert area["pulse"].max() > 1.3 * area["pulse"].min()
    assert len(set(np.sign(np.diff(area["pulse"])))) >= 2  # there and back
    assert area["blink"].min() == 0 < area["blink"].max()


@pytest.mark.parametrize("scenes", [32, 64, 320, 512])
def test_head_mid_and_tail_hold_the_same_kinds(scenes):
    """In every world, a third of each kind; all kinds with the same numbers of boxes."""
    for seed in range(12):
        sizes = world.World(seed, scenes_train=scenes, scenes_val=40)
        counts = world.count_boxes(sizes, world.TRAIN)
        by_kind = {}
        for kind, names in world.KINDS.items():
            by_kind[kind] = sorted({counts[name] for name in names})
            assert len(by_kind[kind]) == 3  # rare, in between, frequent
            for count in by_kind[kind]:
                assert sum(counts[name] == count for name in names) == len(names) // 3
        rare, between, frequent = by_kind["motions"]
        assert frequent >= 1.7 * between >= 1.7**2 * rare
        assert by_kind["looks"] == by_kind["relations"] == by_kind["motions"]
        assert by_kind["poses"][:2] == [rare, between]  # and all other actors have the third
    groups = [(count > 10) + (count >= 5) for count in counts.values()]
    assert scenes != 64 or groups.count(0) == groups.count(1) == groups.count(2) == 6


def test_the_scenes_hold_what_was_counted():
    for seed in range(6):
        sizes = world.World(seed, scenes_train=64, scenes_val=100)
        for split in (world.TRAIN, world.VAL):
            scenes = world.plan_scenes(sizes, split)
            labels = [name for scene in scenes for actor in scene for name in actor]
            counts = world.count_boxes(sizes, split)
            assert {name: labels.count(name) for name in counts} == counts
            for scene in scenes:
                assert 1 <= len(scene) <= 3
                for number, (pose, *others) in enumerate(scene):
                    assert pose in world.POSES and len(others) <= 2
                    related = [name for name in others if name in world.RELATIONS]
                    if related:  # both do nothing else
                        assert number == 0 and len(others) == 1 and len(scene[1]) == 1
                    elif len(others) == 2:
                        one, other = (world.GROUPS.get(name, 0) for name in others)
                        assert one != other
        counts = world.count_boxes(sizes, world.VAL)
        assert np.ptp([counts[name] for name in world.MOTIONS + world.LOOKS]) <= 1


def test_every_class_is_each_once_in_three_worlds():
    for first in (0, 3, 30):
        ranks = [world.rank_classes(first + i) for i in range(3)]
        for name in world.LABELS:
            assert {ranks[i][name] for i in range(3)} == {0, 1, 2}
    dealt = [world.rank_classes(seed) for seed in range(0, 30, 3)]
    assert len({tuple(ranks[name] for name in world.LABELS) for ranks in dealt}) == 10


def test_the_third_upstream_set_comes_only_if_asked_for(tmp_path):
    few = {name: size for name, size in SIZES.items() if not name.startswith("looks")}
    texts, videos = world.annotate(world.World(**few))
    assert not any("looks" in name for name in [*texts, *videos])
    _, videos = world.annotate(world.World(**SIZES))
    assert sum(name.startswith("looks/videos/train_") for name in videos) == 8
    assert sum(name.startswith("looks/videos/val_") for name in videos) == 4


def test_refuses_what_it_would_spoil(folder_of_world, tmp_path):
    with pytest.raises(ValueError, match="scenes_train 64, not 68"):
        world.make_world(folder_of_world, **SIZES | {"scenes_train": 68})
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="files but no world.json"):
        world.make_world(tmp_path)
    with pytest.raises(ValueError, match="unknown size 'scenes' of a world; known: seed, actions"):
        world.make_world(tmp_path / "new", scenes=3)
    with pytest.raises(ValueError, match="a world of 5 scenes; expected 8 or more"):
        world.make_world(tmp_path / "new", scenes_train=5)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_world_on_a_full_disk_goes_on_when_there_is_room(tmp_path, monkeypatch):
    """Not even its parameters had been written; and the sentence says which file it was."""
    write, folder = Path.write_text, tmp_path / "w"

    def fail(path, text, **options):
        write(path, text[:5], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left on device: .*world.json"):
        world.make_world(folder, **SIZES)
    assert list(folder.iterdir()) == []
    (folder / "world.json.7.partial").touch()  # of a process that was killed
    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.setattr(world, "make_video", lambda _: "enough")
    with pytest.raises(OSError, match="enough"):
        world.make_world(folder, workers=1, **SIZES)
    assert (folder / "world.json").exists()
