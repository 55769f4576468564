"""Each recipe trains and evaluates on a made-up tree of the real layout: none is dead text."""

import json

import pytest
from helpers import run_command, write_lines, write_movie

from extras import recipe as recipes

BOX = "0.100,0.200,0.500,0.900"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Tiny videos and annotations where docs/data.md says."""
    root = tmp_path_factory.mktemp("tree")
    movie = write_movie(root / "movie.mp4", frames=75)

    def place(name):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(movie.read_bytes())

    annotations = root / "ava/annotations"
    annotations.mkdir(parents=True)
    label = 'label {{\n  name: "{}"\n  label_id: {}\n  label_type: PERSON_MOVEMENT\n}}'
    for name in ("v2.2", "v2.2_for_activitynet_2019"):
        path = annotations / f"ava_action_list_{name}.pbtxt"
        write_lines(path, label.format("sit", 1), label.format("stand", 2))
    for split in ("train", "val"):
        rows = []
        for video in ("a", "b"):
            place(f"ava/videos/{split}{video}.mkv")
            place(f"ava_kinetics/videos/{split}{video}.mkv")
            rows += [
                f"{split}{video},0001,{BOX},{1 + (video == 'b')},0",
                f"{split}{video},0002,{BOX},2,0",
            ]
        write_lines(annotations / f"ava_{split}_v2.2.csv", *rows)
        write_lines(annotations / f"ava_{split}_excluded_timestamps_v2.2.csv", f"{split}a,0002")
        write_lines(root / f"ava_kinetics/ava_{split}_v2.2.csv", *rows)
        place(f"ava_kinetics/videos/k{split}_000010_000013.mp4")
        kinetics = [f"k{split},11.000000,{BOX},1,0", f"k{split},12.000000"]
        write_lines(root / f"ava_kinetics/kinetics_{split}_v1.0.csv", *kinetics)
    boxes = [f"val{video},000{second},{BOX},,0.9" for video in "ab" for second in (1, 2)]
    write_lines(annotations / "ava_val_predicted_boxes.csv", *boxes)

    header = "label,youtube_id,time_start,time_end,split"
    templates = {"train": [], "validation": []}
    moments = {"training": [], "validation": []}
    for number in range(8):
        split, name = ("val", "dancing") if number > 3 else ("train", "dancing")
        name = ("dancing", "abseiling")[number % 2]
        place(f"kinetics400/{split}/{name}/id{number}_000000_000003.mp4")
        part = "validation" if split == "val" else "training"
        place(f"moments/{part}/{name}/clip{number}.mp4")
        moments[part].append(f"{name}/clip{number}.mp4,{name},4,0")
        place(f"ssv2/videos/{number}.webm")
        template = ("Holding [something]", "Pushing [something]")[number % 2]
        part = "validation" if split == "val" else "train"
        templates[part].append({"id": str(number), "template": template})
    for split, numbers in (("train", range(4)), ("val", range(4, 8))):
        rows = [f"{('dancing', 'abseiling')[n % 2]},id{n},0,3,{split}" for n in numbers]
        write_lines(root / f"kinetics400/{split}.csv", header, *rows)
    write_lines(root / "moments/moments_categories.txt", "abseiling,0", "dancing,1")
    write_lines(root / "moments/trainingSet.csv", *moments["training"])
    write_lines(root / "moments/validationSet.csv", *moments["validation"])
    for part, entries in templates.items():
        path = root / f"ssv2/something-something-v2-{part}.json"
        path.write_text(json.dumps(entries))
    labels = {"Holding something": "0", "Pushing something": "1"}
    (root / "ssv2/something-something-v2-labels.json").write_text(json.dumps(labels))
    return root


REAL = [name for name in recipes.names() if "world" not in recipes.load(recipes.find(name))]


@pytest.mark.parametrize("name", REAL)
def test_recipes_start(tree, tmp_path, name):
    table = recipes.load(recipes.find(name))
    words = ["--recipe", name, "--root", tree, "--out", tmp_path / "run", "--steps", 4]
    words += [
        "--warmup",
        1,
        "--workers",
        0,
        "--threads",
        1,
        "--device",
        "cpu",
        "--compile",
        "false",
    ]
    words += [
        "--eval-every",
        0,
        "--preview",
        0,
        "--precision",
        "float32",
        "--schedule",
        "round_robin",
    ]
    words += ["--model.arch", "tiny", "--model.frames", 4, "--model.size", "[32,32]"]
    for task in table["task"]:
        name_of = f"--task.{task['name']}."
        words += [f"{name_of}frames", 4, f"{name_of}size", 32, f"{name_of}short_side", "[40,48]"]
        words += [f"{name_of}batch", 2]
        if task["kind"] == "clip":
            words += [f"{name_of}views", "[2,3]"]
    done = run_command(*words)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["task"]
    assert set(metrics) == {task["name"] for task in table["task"]}
    if name == "ava-kinetics":
        parts = metrics["ava-kinetics"]["parts"]
        assert len(parts) == 2 and all("val_v" in part for part in parts), done.stdout
