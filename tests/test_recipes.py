"""Each recipe trains and evaluates on a made-up tree of the real layout: none is dead text."""

import dataclasses
import json

import pytest
import torch
from helpers import run_command, tiny_model, write_lines, write_movie

import cofinetune
from extras import checkpoints
from extras import recipe as recipes
from model import Head

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
        # Training may leave out what is annotated; what evaluation did would count as missed.
        second = "0002" if split == "train" else "0003"
        excluded = annotations / f"ava_{split}_excluded_timestamps_v2.2.csv"
        write_lines(excluded, f"{split}a,{second}")
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


def test_a_table_that_is_typed_as_a_setting_is_one_sentence():
    for key, text in (("task", "ava"), ("task", "[1]"), ("model", "tiny")):
        with pytest.raises(ValueError, match=f"--{key}: a table; expected --model.KEY or --task"):
            recipes.read(cofinetune.Recipe, "demo", {key: text, "lr": "0.1", "model.heads": "2"})


def test_a_root_that_is_no_text_is_one_sentence(tmp_path):
    task = ["[[task]]", 'name = "t"', 'kind = "clip"', 'train = "t.csv"']
    path = write_lines(tmp_path / "r.toml", "root = 5", *task)
    with pytest.raises(ValueError, match="r.toml: root = 5 is not a text"):
        recipes.read_tasks(path)


def test_a_recipe_is_where_its_link_leads(tmp_path):
    """Its paths begin there, for training and for the commands that look at data alone."""
    task = ["[[task]]", 'name = "t"', 'kind = "clip"', 'train = "t.csv"', 'videos = "."']
    real = write_lines(tmp_path / "data/recipe.toml", *task)
    write_lines(tmp_path / "data/t.csv", "a.mp4 0")
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    recipe = recipes.read(cofinetune.Recipe, str(link))
    ((_, root),) = recipes.read_tasks(link)
    assert root.resolve() == real.parent and recipe.root == str(real.parent)


def test_sides_that_init_cannot_take_stop_the_run_before_its_first_step(tmp_path):
    """Patches of 14 px and whole frames, whose sides are multiples of 16."""
    shape = dict(frames=4, size=(56, 56), tubelet=(2, 14, 14), width=16, depth=1, heads=2)
    model = tiny_model({"ava": Head("box", 3)}, **shape)
    state = dict(
        model=model.state_dict(),
        model_config=dataclasses.asdict(model.encoder.config),
        heads={"ava": dataclasses.asdict(model.heads["ava"].config)},
        classes={"ava": list("abc")},
        recipe={},
    )
    torch.save(state, tmp_path / "init.pt")
    words = {"init": str(tmp_path / "init.pt"), "model.frames": "4", "model.size": "[56, 56]"}
    for name in ("actions", "templates", "ava"):
        words |= {f"task.{name}.frames": "4", f"task.{name}.size": "56"}
    recipe = recipes.read(cofinetune.Recipe, "demo", words)
    classes = {task.name: list("abc") for task in recipe.task}
    box = next(task for task in recipe.task if task.kind == "box")
    for fit, size, words in (
        ("full", 56, r"task ava: val_fit full makes .* \(2, 14, 14\); take crop"),
        ("crop", 48, r"task ava: 4 frames of 48 px are not a whole number of tubelets"),
    ):
        box.val_fit, box.size = fit, size
        with pytest.raises(ValueError, match=words):
            checkpoints.build_model(recipe, classes, say=lambda words: None)
    box.size = 56
    checkpoints.build_model(recipe, classes, say=lambda words: None)


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
