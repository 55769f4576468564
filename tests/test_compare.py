"""Tests of compare: its protocols, runs, statistics and figures."""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import HERE, TINY, run_command, run_log, toml_table, write_lines

import cofinetune
from extras import charts, compare, methods, tables, world
from extras import recipe as recipes

PROTOCOLS = sorted((HERE / "docs/protocols").glob("*.toml"))
NOTES = HERE / "docs/protocols/README.md"

# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def test_t_quantiles_by_integration():
    for freedom in (1, 2, 4, 9, 30):
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        scale /= math.sqrt(freedom * math.pi)
        width = tables.T975[freedom - 1] / 20000
        t = (np.arange(20000) + 0.5) * width
        inside = ((1 + t**2 / freedom) ** (-(freedom + 1) / 2)).sum() * width
        assert 0.5 + scale * inside == pytest.approx(0.975, abs=2e-5)
    half = 4.303 / 3**0.5
    assert tables.paired(np.array([2.0, 3.0, 4.0])) == pytest.approx((3, 3 - half, 3 + half))


def rows_of(scores, phase="final", column="score", case=""):
    """Rows from {method: [score of each seed]}."""
    rows = []
    for method, values in scores.items():
        for seed, value in enumerate(values):
            rows.append(dict(phase=phase, case=case, method=method, seed=seed, **{column: value}))
    return rows


def test_the_noise_of_a_run_is_pooled_over_methods():
    """And not over phases, nor with the difference between the methods."""
    protocol = compare.Protocol("p", "", method=[compare.Method(name) for name in "ab"])
    protocol.case = [compare.Case()]
    rows = rows_of({"a": [0.5, 0.6, 0.7], "b": [0.1, 0.3]}, "noise") + rows_of({"a": [9.0, 0.0]})
    expected = math.sqrt((0.02 + 0.02) / (2 + 1))
    assert tables.noise_of_a_run(protocol, rows) == pytest.approx(expected)
    assert math.isnan(tables.noise_of_a_run(protocol, rows_of({"a": [0.5]}, "noise")))


@pytest.mark.parametrize("worlds", [5, 10])
def test_the_power_figure_holds_in_comparisons_that_are_drawn(worlds):
    effect = tables.found_four_times_in_five(0.02, worlds)
    draws = np.random.default_rng(7).normal(effect, 0.02, (4000, worlds))
    found = np.mean([tables.paired(draw)[1] > 0 for draw in draws])
    assert found == pytest.approx(0.8, abs=0.02)


def test_differences_are_paired_by_seed_whatever_the_order_of_the_rows():
    protocol = compare.Protocol("p", "", reference="b")
    rows = rows_of({"a": [0.5, 0.7, 0.6], "b": [0.4, 0.8, math.nan]}, column="x")
    method = compare.Method("a")
    more = rows + [dict(rows[0], seed=9)]  # of one method alone
    for these in (rows, rows[::-1], more, [row | {"x": str(row["x"])} for row in rows]):
        values = tables.difference(protocol, these, compare.Case(), method, "x")
        assert values.tolist() == pytest.approx([0.1, -0.1])
    final = rows_of({"a": [0.5, 0.7, 0.6], "b": [0.4, 0.7, 0.8]}, column="x mAP (p)")
    protocol.method = [compare.Method("b"), method]
    table = tables.difference_table(protocol, final, compare.Case())
    assert ", ahead in 1 of 3 |" in table and "| b |" not in table  # a tie is no lead
    zero = rows_of({"a": [0.0, 0.5], "b": [0.0, 0.0]}, column="x")
    assert tables.difference(protocol, zero, compare.Case(), method, "x").tolist() == [0, 0.5]
    assert tables.interval(np.array([0.1, -0.1])) == "+0.0000 [-1.2706, +1.2706]"
    assert tables.interval(np.array([0.25])) == "+0.2500" and tables.interval(np.array([])) == ""


# ------------------------------------------------------------------------------------------------
# Protocols
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_every_run_of_every_protocol_has_a_recipe(path, tmp_path):
    """All cases, methods and points of the grids fit the recipe; the controls are there."""
    protocol = compare.read_protocol(path.stem)
    assert protocol.question and protocol.name == path.stem
    read = lambda source, changes: recipes.read(cofinetune.Recipe, source, changes)  # noqa: E731
    comparison = compare.Comparison(protocol, {"out": str(tmp_path)}, 1, read)
    comparison.place_world = lambda case, seed: {"root": str(tmp_path)}
    chosen = tables.choose(protocol, [])
    updates = {}
    for case in protocol.case:
        assert not case.world.keys() - vars(world.World()).keys()
        for method in protocol.method:
            for point in tables.points_of(method, case.name, chosen):
                run = comparison.make_run("final", case, method, point, 1)
                stages = methods.stages(read(protocol.recipe, run.overrides))
                updates[method.name] = sum(stage.steps for stage in stages)
    whole = protocol.case[0].settings.get("steps", 1200)
    for name, count in updates.items():
        stated = re.search(r"(\d+) updates", name)
        expected = int(stated[1]) if stated else whole
        if name.startswith("downstream, equal clips"):
            expected = whole // 3
        assert count == expected, name
    assert protocol.first_world % 3 == protocol.first_tuning_world % 3 == protocol.worlds % 3 == 0
    notes = NOTES.read_text()
    assert f"| `{path.stem}` |" in notes and f"| {count_runs(protocol)} |" in notes


def test_every_protocol_has_every_control():
    """Both orders, finetuning's two rates, downstream alone at equal updates and at equal clips:
    with the settings that `methods` found for them, as its rows in the csv say."""
    controls = {}
    methods_rows = Runs("methods")
    chosen = tables.choose(methods_rows.protocol, methods_rows.rows)
    for method in methods_rows.protocol.method:
        if method.name not in ("finetuning", "co-finetuning, repeat_rare"):
            controls[method.name] = method.settings | chosen["", method.name]
    assert len(controls) == 5
    for path in PROTOCOLS:
        rows = []
        for method in compare.read_protocol(path.stem).method:
            settings = dict(method.settings)
            if settings.get("train_tasks") == ["actions", "templates", "ava"]:
                settings.pop("train_tasks")  # all that `methods` has
            rows.append(settings)
        if path.stem != "methods":
            assert all(control in rows for control in controls.values()), path.stem


def test_no_world_tunes_what_is_reported_on_it():
    tables_of, tuning = {}, set()
    for path in PROTOCOLS:
        protocol = compare.read_protocol(path.stem)
        first = protocol.first_world
        tables_of[path.stem] = set(range(first, first + protocol.worlds))
        first = protocol.first_tuning_world
        tuning |= set(range(first, first + protocol.tuning_worlds))
    older = {*range(10, 40), *range(90, 102)}
    for worlds in tables_of.values():
        assert not worlds & (tuning | older)


def test_the_page_says_how_the_world_deals_its_boxes():
    page = NOTES.read_text()
    counts = world.count_boxes(world.World(10, scenes_train=64), world.TRAIN)
    for kind, names in world.KINDS.items():
        rare, between, frequent = sorted({counts[name] for name in names})
        third = len(names) // 3
        groups = " | ".join(f"{third} × {count}" for count in (frequent, between, rare))
        assert f"| {kind} | {groups} | {', '.join(names)} |" in page


def count_runs(protocol):
    """Tuning, noise, table."""
    tuning = 0
    for method in protocol.method:
        points = math.prod(len(values) for values in method.grid.values())
        tuning += (points if points > 1 else 0) * protocol.tuning_worlds
    tuning *= sum(not case.tuned_as for case in protocol.case)
    final = protocol.worlds * len(protocol.method) * len(protocol.case)
    return tuning + 2 * protocol.repeats + final


@pytest.mark.parametrize(
    "lines, message",
    [
        (['reference = "x"', "[[method]]", 'name = "a"'], "reference = 'x' is not one of a"),
        (["[[method]]", 'name = "a"', "lr = 1"], "method a: unknown key 'lr'"),
        (["[[method]]"], "method 1: name is missing"),
        (["[[method]]", 'name = "a"', "grid = {lr = 1}"], "grid.lr = 1 is no list of values"),
        (["[[method]]", 'name = "a"', 'like = "b"'], "'a': 'b' does not stand above it"),
        (["[[method]]", 'name = "a"'] * 2, "'a' stands there twice"),
        (['figure = "cake"', "[[method]]", 'name = "a"'], "figure = 'cake' is not one of rows"),
        (["worlds = 0", "[[method]]", 'name = "a"'], "worlds = 0 must be at least 1"),
        (["first_world = 1010", "[[method]]", 'name = "a"'], "worlds of the table among those"),
        (["a = = 1"], "not TOML"),
    ],
)
def test_what_is_wrong_with_a_protocol(lines, message, tmp_path):
    with pytest.raises(ValueError, match="p.toml") as error:
        compare.read_protocol(str(write_lines(tmp_path / "p.toml", *lines)))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="no protocol nothing; expected a file or one of "):
        compare.read_protocol("nothing")


# ------------------------------------------------------------------------------------------------
# Runs, by a trainer that only writes what a run leaves behind
# ------------------------------------------------------------------------------------------------

TRAINER = """
import json, pathlib, sys
a = dict(word.split("=", 1) for word in sys.argv[3:])
out, lr, good = pathlib.Path(a["--out"]), float(a["--lr"]), a.get("--method") != "finetune"
with open(out / "starts", "a") as f: f.write("started\\n")
if lr > 1: (out / "log.jsonl").touch()
if lr > 1: print("x " * 999); sys.exit("error: non-finite loss at step 3")
if a.get("--name") == "fail": print("one", flush=True); sys.exit("error: no such thing")
ap = 0.5 - abs(lr - (0.2 if good else 0.4)) + 0.01 * (int(a["--seed"]) % 7) + 0.05 * good
classes = [dict(id=1, name="tall", ap=ap), dict(id=2, name="left", ap=ap + 0.1 * good),
           dict(id=3, name="right", ap=ap), dict(id=4, name="up", ap=None)]
ava = dict(kind="box", mAP=ap, protocol="p", per_class=classes)
metrics = dict(score=ap, task=dict(up=dict(kind="clip", top1=0.9), ava=ava))
json.dump(metrics, open(out / "metrics.json", "w"))
tasks = ("up", "ava") if good else ("ava", "ava")
steps = [dict(step=i, loss={tasks[i % 2]: 1}, time=dict(unix=60 * i)) for i in range(6)]
(out / "log.jsonl").write_text("".join(json.dumps(step) + "\\n" for step in steps))
"""
BOXES = {1: 30, 2: 10, 3: 2, 4: 10}  # by class


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """Makes a Comparison of two methods on the data of `tmp_path`."""
    monkeypatch.setattr(compare, "HERE", tmp_path)
    sleep = compare.time.sleep  # a run takes less than the time between two looks at it
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(
        compare.data, "open_task", lambda *_: SimpleNamespace(class_counts=lambda: BOXES)
    )
    write_lines(tmp_path / "cofinetune.py", TRAINER)
    rows = [f"video{v},902,0,0,1,1,{label},0\n" for v in range(40) for label in (1, 2)]
    (tmp_path / "train.csv").write_text("".join(rows))
    own = dict(train="train.csv", videos="v", train_boxes="t", exclude_train="e")
    recipe = SimpleNamespace(
        task=[
            SimpleNamespace(name="ava", kind="box", batch=8, **own),
            SimpleNamespace(name="up", kind="clip", batch=2),
        ],
        world={},
        device="cpu",
        root=str(tmp_path),
        head_above=20,
        tail_below=5,
        method="cofinetune",
        method_options={},
    )

    def make(lrs=(0.1, 0.2, 0.4, 2.0), repeats=3, world=None, **overrides):
        finetuning = compare.Method("finetuning", {"method": "finetune"}, {"lr": list(lrs)})
        other = compare.Method("co-finetuning", {}, {"lr": list(lrs)})
        protocol = compare.Protocol(
            "tiny", "Which?", "x", worlds=3, tuning_worlds=2, repeats=repeats,
            reference="finetuning", method=[finetuning, other], case=[compare.Case()],
        )  # fmt: skip
        recipe.world = world or {}
        overrides = {"out": str(tmp_path / "out")} | overrides
        return compare.Comparison(protocol, overrides, 2, lambda *_: recipe)

    return make


def test_tuning_then_noise_then_the_table(comparison, tmp_path, capsys):
    this = comparison()
    rows = this.all_phases()
    count = {phase: sum(row["phase"] == phase for row in rows) for phase in ("tuning", "noise")}
    assert count == {"tuning": 2 * 4 * 2, "noise": 2 * 3} and len(rows) == 16 + 6 + 6
    tables.write_rows(this.out / "compare.csv", rows)
    tables.write_report(this.protocol, rows, this.out)
    text = (tmp_path / "out/compare.md").read_text()
    assert text in capsys.readouterr().out and "(edge)" not in text
    held_out = {row.split(",")[0] for row in open(tmp_path / "out/tuning/ava_val.csv")}
    part = f"ava: {len(held_out)} videos, {len(held_out)} keyframes"
    for words in (
        "The unit is a seed: an initialisation and an order of the clips, always of the same vid",
        f"Tuned on training videos that are held out ({part}), seeds 1010 to 1011, mean mAP",
        "What that allows:\n\n| seeds | 95 % interval",
        "standard deviation over seeds.",
        "paired by seed:",
        "lr = 2.0: -inf | lr = 0.4 |",
        "lr = 2.0: -inf | lr = 0.2 |",
        "+0.0500 [+0.0500, +0.0500], ahead in 3 of 3",  # with every seed
        "Noise of a run: the same videos with another initialisation and order, 0.0100",
        "| 3 (here) | ± 0.0351 |",  # 4.303 * 0.01 * (2 / 3) ** 0.5
        "| untrained | ",
        "| 48 | 6 | 5.0 |",  # clips, updates, minutes
        "| 30 | 6 | 5.0 |",
    ):
        assert words in text, words
    assert "world" not in text
    assert "by kind of class" not in text  # which only a generated world tells
    assert (tmp_path / "out/compare.svg").stat().st_size > 1000
    comparison().all_phases()
    starts = [path.read_text().split() for path in (tmp_path / "out").rglob("starts")]
    assert len(starts) == len(rows) and all(len(words) == 1 for words in starts)
    again = tables.read_rows(tmp_path / "out/compare.csv", "")
    tables.write_rows(tmp_path / "compare.csv", again)
    tables.write_report(this.protocol, again, tmp_path)
    assert (tmp_path / "compare.md").read_text() == text
    with open(tmp_path / "out/compare.csv") as first, open(tmp_path / "compare.csv") as second:
        assert first.read() == second.read()


def test_the_tuning_sees_no_validation_video(comparison, tmp_path):
    rows = comparison().all_phases(tune_only=True)
    assert {row["phase"] for row in rows} == {"tuning", "noise"}
    comparison().all_phases()
    notes = {}
    for path in (tmp_path / "out").rglob("compare.json"):
        notes.setdefault(path.relative_to(tmp_path / "out").parts[0], []).append(
            json.loads(path.read_text())
        )
    seeds = {phase: {note["seed"] for note in of_phase} for phase, of_phase in notes.items()}
    assert seeds["final"] == {"10", "11", "12"} and seeds["tuning"] == {"1010", "1011"}
    assert not seeds["noise"] & (seeds["final"] | seeds["tuning"])
    assert not any("task.ava.val" in note for note in notes["final"])
    for note in notes["tuning"] + notes["noise"]:
        assert note["task.ava.val_videos"] == "v" and note["task.ava.val_boxes"] == "t"
        assert note["task.ava.exclude_val"] == "e"
        parts = []
        for split in ("train", "val"):
            parts.append(Path(note[f"task.ava.{split}"]).read_text().splitlines(True))
        videos = [{row.split(",")[0] for row in part} for part in parts]
        assert sorted(parts[0] + parts[1]) == sorted(open(tmp_path / "train.csv"))
        assert not videos[0] & videos[1] and 4 <= len(videos[1]) <= 12


def test_a_generated_world_for_every_seed_and_results_by_kind(comparison, tmp_path, monkeypatch):
    made = {}

    def make_world(folder, **sizes):
        assert folder not in made  # once
        made[folder] = sizes

    monkeypatch.setattr(world, "make_world", make_world)
    this = comparison(world={"seed": 5, "scenes_train": 8})
    this.protocol.case = [
        compare.Case("8", 8.0),
        compare.Case("16", 16.0, {"scenes_train": 16}, {"steps": 7}, tuned_as="8"),
    ]
    rows = this.all_phases()
    seeds = {(sizes["seed"], sizes["scenes_train"]) for sizes in made.values()}
    assert seeds == {(s, n) for s in (10, 11, 12) for n in (8, 16)} | {(1010, 8), (1011, 8)}
    assert len(made) == 8
    noise = [row for row in rows if row["phase"] == "noise"]
    note = json.loads((this.out / noise[0]["folder"] / "compare.json").read_text())
    assert note["root"].endswith("seed1010") and note["seed"] == "2010"
    final = [row for row in rows if row["phase"] == "final" and row["method"] == "co-finetuning"]
    for row in final:
        note = json.loads((this.out / row["folder"] / "compare.json").read_text())
        assert note["lr"] == "0.2" and note.get("steps") == {"8": None, "16": "7"}[row["case"]]
        ap = row["ava mAP (p)"]
        assert row["ava head"] == row["ava poses"] == row["ava poses head"] == pytest.approx(ap)
        assert row["ava mid"] == row["ava motions mid"] == pytest.approx(ap + 0.1)
        assert row["ava motions"] == pytest.approx(ap + 0.05)
        assert row["ava tail"] == row["ava motions tail"] == pytest.approx(ap)
        assert row["up top-1"] == 0.9
    for figure in tables.FIGURES:
        this.protocol.figure = figure
        tables.write_report(this.protocol, rows, this.out)
        assert (this.out / "compare.svg").stat().st_size > 1000
        (this.out / "compare.svg").unlink()
    text = (this.out / "compare.md").read_text()
    assert "| motions | +0.1000 [+0.1000, +0.1000] |  | +0.1500" in text and "## 16" in text
    for words in (
        "The unit is a world: generated videos, an initialisation and an order of the clips.",
        "Tuned on worlds 1010 to 1011, mean mAP",
        "if worlds differed in nothing else:\n\n| worlds |",
        "deviation over worlds.",
        "paired by world:",
    ):
        assert words in text, words


def test_an_edge_is_said_and_settings_are_inherited(comparison):
    this = comparison(lrs=(0.05, 0.1))
    this.protocol.method += [
        compare.Method("both", {"steps": 9}, {}, like="co-finetuning"),
        compare.Method("tuned", {"steps": 8}, {"lr": [0.1, 0.15, 2.0]}, like="both"),
    ]
    rows = this.all_phases()
    chosen = tables.choose(this.protocol, rows)
    assert chosen["", "both"] == {"lr": 0.1, "steps": 9}
    assert chosen["", "tuned"] == {"lr": 0.15, "steps": 8}
    tables.write_report(this.protocol, rows, this.out)
    text = (this.out / "compare.md").read_text()
    assert "| lr = 0.1 (edge) |" in text and "| lr = 0.1, steps = 9 |" in text


def test_what_stops_a_comparison(comparison, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"seed10 ended with status 1: one \| error: no such thing$"
    ):
        comparison(lrs=(0.1,), repeats=0, name="fail", out=str(tmp_path / "failed")).all_phases()
    with pytest.raises(ValueError, match="no table, final/all/finetuning/seed10, .* diverged"):
        comparison(lrs=(2.0,), repeats=0).all_phases()
    with pytest.raises(ValueError, match="was run with steps = None, not 7; take another --out"):
        comparison(lrs=(2.0,), repeats=0, steps="7").all_phases()
    monkeypatch.setattr(compare, "current_commit", lambda: "abc")
    with pytest.raises(ValueError, match="was run with commit = , not abc"):
        comparison(lrs=(2.0,), repeats=0).all_phases()
    this = comparison()
    this.recipe.task = this.recipe.task[1:]
    with pytest.raises(ValueError, match="x has no box task"):
        comparison()


@pytest.mark.parametrize(
    "method, case, message",
    [
        (compare.Method("b", {"lrr": 0.1}), {}, "compare: a b: .*unknown key 'lrr', did you mean"),
        (compare.Method("b", {}, {"task.av.batch": [4, 8]}), {}, "a b: .*--task.av.batch: the rec"),
        (compare.Method("b", {}, {"lr": [0.1, "x"]}), {}, 'a b: .*lr = "x" is not'),
        (
            compare.Method("b", {"method_options": {"x": 1}}),
            {},
            "a b: .*method_options of cofinetune: unknown x",
        ),
        (compare.Method("b"), {"settings": {"step": 7}}, "c good: .*unknown key 'step'"),
        (compare.Method("b"), {"world": {"scene_train": 7}}, "c: world: unknown key 'scene_train'"),
    ],
)
def test_every_setting_is_read_before_the_first_run(method, case, message, tmp_path):
    protocol = compare.Protocol("p", "", "demo", reference="good")
    protocol.method = [compare.Method("good", {}, {"lr": [0.1, 0.2]}), method]
    protocol.case = [compare.Case("a"), compare.Case("c", tuned_as="a", **case)]
    read = lambda source, changes: recipes.read(cofinetune.Recipe, source, changes)  # noqa: E731
    this = compare.Comparison(protocol, {"out": str(tmp_path)}, 1, read)
    this.place_world = lambda *_: {}
    this.launch = lambda _: pytest.fail("a run began")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        this.all_phases()


def test_a_folder_in_which_nothing_was_trained_is_claimed_anew(comparison):
    """By the protocol without its mistake; but what was trained is not mixed with it."""
    with pytest.raises(ValueError, match="ended with status 1"):
        comparison(lrs=(0.1,), repeats=0, name="fail").all_phases()
    assert len(comparison(lrs=(0.1,), repeats=0).all_phases()) == 6
    with pytest.raises(ValueError, match="was run with name = None, not fail"):
        comparison(lrs=(0.1,), repeats=0, name="fail").all_phases()


@pytest.mark.slow
def test_compare_for_real(tmp_path):
    """Worlds, two stages, every wrapper, the tables; the methods of a seed start alike, on the same
    files."""
    methods = {
        "finetuning": ('{method = "finetune"}', ""),
        "co-finetuning": ("{}", ""),
        "self-distillation": ('{method = "selfdistil"}', "co-finetuning"),
        "SpotTune": ('{method = "finetune+spottune"}', "finetuning"),
        "both": ('{method = "finetune+selfdistil"}', "finetuning"),
    }
    lines = ['recipe = "demo"', "worlds = 2", "repeats = 0", "first_world = 1"]
    for name, (settings, like) in methods.items():
        lines += ["[[method]]", f'name = "{name}"', f"settings = {settings}", f'like = "{like}"']
        if not like:
            lines.append("grid = {lr = [0.04]}")
    run_command(
        "compare",
        write_lines(tmp_path / "tiny.toml", *lines),
        "--world",
        toml_table(TINY | dict(scenes_train=24, scenes_val=24)),
        "--out",
        tmp_path / "out",
        *"--steps 6 --warmup 2 --preview 0 --device cpu --jobs 2".split(),
    )
    rows = tables.read_rows(tmp_path / "out/compare.csv", "")
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in "12" for m in methods]
    assert {(row["clips seen"], row["updates"]) for row in rows} == {("96", "6")}
    logs = {m: run_log(tmp_path / f"out/final/all/{m}/seed2") for m in methods}
    first = {m: log[0] for m, log in logs.items()}
    assert first["co-finetuning"]["loss"] == first["self-distillation"]["loss"]
    assert first["finetuning"]["loss"] == first["both"]["loss"]
    assert first["self-distillation"]["distillation"] == 0
    assert logs["self-distillation"][1]["distillation"] > 0
    assert len(first["SpotTune"]["finetuned_share"]) == 4
    stages = set()
    for method in ("finetuning", "SpotTune", "both"):
        log = run_log(tmp_path / f"out/final/all/{method}/seed2/upstream")
        stages.add(json.dumps(log))
    assert len(stages) == 1  # the same training
    annotations = [(tmp_path / f"out/worlds/seed{s}/ava/train.csv").read_text() for s in "12"]
    assert annotations[0] != annotations[1]


# ------------------------------------------------------------------------------------------------
# Figures and the page
# ------------------------------------------------------------------------------------------------


def elements_of(drawing, path):
    """(name of the element, its attributes, its text) of an SVG file, as an XML reader finds it."""
    drawing.write(path)
    root = ElementTree.parse(path).getroot()
    return [(one.tag.rpartition("}")[2], one.attrib, one.text) for one in root]


def test_points_lie_where_their_numbers_say(tmp_path):
    points = {"a <&> b": [charts.Point(32.0, 0.1, 0.0, 0.2), charts.Point(512.0, -0.1, -0.2, 0.0)]}
    plane = charts.Plane(points, "x", joined=True)
    left, right = plane.x.px(32), plane.x.px(512)
    assert plane.x.px(128) == pytest.approx((left + right) / 2)  # log2
    assert plane.y.px(0) == pytest.approx((plane.y.px(0.2) + plane.y.px(-0.2)) / 2)
    drawing = charts.draw_points(points, "title", "x", joined=True)
    elements = elements_of(drawing, tmp_path / "a.svg")
    dots = [(float(at["cx"]), float(at["cy"])) for name, at, _ in elements if name == "circle"]
    bars = []
    for name, at, _ in elements:
        if name == "line" and at["stroke"] == charts.COLOURS[0] and at["x1"] == at["x2"]:
            bars.append([float(at[key]) for key in ("x1", "y1", "y2")])
    for point in points["a <&> b"]:
        x, y = plane.x.px(point.x), plane.y.px(point.y)
        assert any(dot == pytest.approx((x, y), abs=0.06) for dot in dots)
        ends = [x, plane.y.px(point.low), plane.y.px(point.high)]
        assert any(bar == pytest.approx(ends, abs=0.06) for bar in bars)
    texts = {text: float(at["x"]) for name, at, text in elements if name == "text"}
    assert {"title", "x", "a <&> b", "+0.2", "0"} <= texts.keys()
    assert texts["512"] == pytest.approx(right, abs=0.06)


def test_rows_lie_where_their_numbers_say(tmp_path):
    """A dot for each world and for the mean, a bar from end to end, numbers under their lines."""
    lines = [("one", [0.5, -0.25], (0.125, -1.0, 1.25)), ("other", [0.0], (0.0, math.nan, 0.0))]
    elements = elements_of(charts.draw_rows({"": lines}, "title"), tmp_path / "a.svg")
    numbers = {}
    for name, at, text in elements:
        if name == "text" and at["text-anchor"] == "middle":
            numbers[float(text)] = float(at["x"])
    unit = (numbers[1.0] - numbers[0.0]) / 1.0

    def value(x):
        return pytest.approx((float(x) - numbers[0.0]) / unit, abs=0.001)

    dots = [at for name, at, _ in elements if name == "circle"]
    assert [0.5, -0.25, 0.125, 0.0, 0.0] == [value(at["cx"]) for at in dots]
    assert len({at["cy"] for at in dots}) == 4  # those of the worlds above the bar
    (bar,) = [at for name, at, _ in elements if name == "line" and at["y1"] == at["y2"]]
    assert -1.0 == value(bar["x1"]) and 1.25 == value(bar["x2"])


def test_panels_stand_side_by_side_on_one_scale(tmp_path):
    one, other = [("a", [0.5], (0.5, -0.75, 0.75))], [("a", [], (math.nan, math.nan, math.nan))]
    panels = {"left": one, "right": one, "empty": other}
    elements = elements_of(charts.draw_rows(panels, "title"), tmp_path / "a.svg")
    texts = [(at, text) for name, at, text in elements if name == "text"]
    assert [text for _, text in texts].count("a") == 1
    zeros = [float(at["x"]) for at, text in texts if text == "0"]
    names = [float(at["x"]) for at, text in texts if text in panels]
    step = zeros[1] - zeros[0]
    assert step > 0 and zeros == pytest.approx([zeros[0] + step * number for number in range(3)])
    assert np.diff(names) == pytest.approx([step, step])
    dots = [float(at["cx"]) for name, at, _ in elements if name == "circle"]
    assert dots[2:] == pytest.approx([x + step for x in dots[:2]]) and len(dots) == 4
    for number, x in enumerate(zeros):  # no number lies in the next panel
        ticks = [float(at["x"]) for at, text in texts if text[0] in "0+-"]
        assert sum(abs(tick - x) < step / 2 for tick in ticks) == len(ticks) / 3, number


def test_ticks_are_round_and_inside():
    for low, high in ((-0.07, 0.07), (0.61, 0.69), (0, 1), (-3, 40)):
        scale = charts.Scale([low, high], 0, 400)
        ticks = scale.ticks()
        assert 2 <= len(ticks) <= 9 and scale.first <= min(ticks) and max(ticks) <= scale.last
        assert all(f"{tick:.3g}" == f"{tick:.2g}" for tick in ticks)


RUNS = HERE / "docs/assets/compare.csv"
MAP = "mAP (official-2020)"


def read_page(path):
    """With every run of spaces as one, and signs as Python writes them."""
    return " ".join(path.read_text().replace("\u2212", "-").split())


@pytest.fixture(scope="module")
def page():
    return read_page(HERE / "docs/comparison.md")


@pytest.fixture(scope="module")
def notes():
    """On how the runs of the page were made."""
    return read_page(NOTES)


def spell_interval(values):
    mean, low, high = tables.paired(np.array(values))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def spell_found(spreads, worlds):
    """What so many worlds find four times in five, by the least and the largest deviation."""
    found = [tables.found_four_times_in_five(f(spreads), worlds) for f in (min, max)]
    return "{:.3f} to {:.3f}".format(*found)


def unsigned(interval):
    """As a sentence says "behind by"."""
    return interval.replace("+", "")


def test_the_page_says_what_the_runs_of_version_1_say(page, notes):
    """Every interval that assets/compare.csv can give."""
    scores = {}
    for row in csv.DictReader(open(RUNS)):
        if row["protocol"].startswith("worlds"):
            score = float(row[f"ava {MAP}"])
            scores.setdefault(row["method"], {})[int(row["seed"])] = score
    finetune = "finetune@task.ava.lr_scale=2"
    spottune = "finetune+spottune@task.ava.lr_scale=2"
    weighted = "cofinetune@schedule=weighted@task.actions.weight=3@task.templates.weight=2@lr=0.16"

    def difference(one, other, first, last):
        return spell_interval([scores[one][s] - scores[other][s] for s in range(first, last + 1)])

    assert difference("cofinetune", finetune, 20, 24) + " | 4 of 5 |" in notes
    assert f"finetuning by {difference(spottune, finetune, 20, 24)}" in notes
    assert f"{difference('downstream', finetune, 20, 24)} in the second" in notes
    assert difference("cofinetune", finetune, 30, 39) + " | 9 of 10 |" in notes
    assert unsigned(difference("cofinetune", weighted, 20, 24)) + " to round robin" in notes
    together = "cofinetune@schedule=accumulate@steps=400@warmup=32"
    actions = 'cofinetune@train_tasks=["actions","ava"]@steps=800@warmup=64@lr=0.16'
    assert f"round robin was {difference(together, 'cofinetune', 20, 24)}" in notes
    assert f"`actions` alone {difference(actions, 'cofinetune', 20, 24)}." in notes
    distilled = "finetune+selfdistil@task.ava.lr_scale=2"
    assert f"it lost {unsigned(difference(finetune, distilled, 20, 24))} and kept" in page


class Runs:
    """Those of a protocol that the page tells of."""

    def __init__(self, name):
        self.protocol = compare.read_protocol(name)
        self.rows = tables.read_rows(RUNS, name)
        self.final = [row for row in self.rows if row["phase"] == "final"]
        self.methods = {method.name: method for method in self.protocol.method}
        self.others = [name for name in self.methods if name != self.protocol.reference]
        self.cases = [case.name for case in self.protocol.case if case.name]

    def differences(self, name, other, column, case=""):
        """By world; column: of the box task, or one less another."""
        self.protocol.reference = other
        values = 0
        for sign, part in zip((1, -1), column.split(" less "), strict=False):
            column = part if part.endswith("top-1") else f"ava {part}"
            method = self.methods[name]
            one = tables.difference(self.protocol, self.final, compare.Case(case), method, column)
            values = values + sign * one
        return values

    def spreads(self, name, others, cases):
        """The standard deviations over worlds of the differences of mAP."""
        pairs = [(other, case) for case in cases for other in others]
        return [self.differences(name, other, MAP, case).std(ddof=1) for other, case in pairs]

    def interval(self, *arguments):
        return spell_interval(self.differences(*arguments))

    def ahead(self, *arguments):
        values = self.differences(*arguments)
        return f"{(values > 0).sum()} of {len(values)}"

    def upstream(self, name, case=""):
        """Mean top-1 of the two clip tasks; a dash for one that was never trained."""
        tops = []
        for task in ("actions", "templates"):
            top = tables.series(self.final, case, name, f"{task} top-1").mean()
            tops.append("–" if math.isnan(top) else f"{top:.2f}")
        return "none" if tops == ["–", "–"] else ", ".join(tops)

    def table(self, columns, case=""):
        """Its rows: the reference's mean and, minus that, every other method's interval. `ahead` is
        of the column before it."""
        reference = self.protocol.reference
        title = [f"minus {reference}", *("all" if column == MAP else column for column in columns)]
        lines = [title, ["---"] * len(title)]
        for name in [reference, *self.others]:
            cells = [f"({name})" if name == reference else name]
            for number, column in enumerate(columns):
                if column == "upstream":
                    cells.append(self.upstream(name, case))
                elif name != reference and column == "ahead":
                    cells.append(self.ahead(name, reference, columns[number - 1], case))
                elif name != reference:
                    cells.append(self.interval(name, reference, column, case))
                elif column == "ahead":
                    cells.append("")
                else:
                    mean = tables.series(self.final, case, name, f"ava {column}").mean()
                    cells.append(f"{mean:.3f}")
            lines.append(cells)
        return " ".join(f"| {' | '.join(cells)} |" for cells in lines).replace("|  |", "| |")


def check_said(page, said):
    for words in said:
        assert words in page, words


@pytest.mark.parametrize("path", PROTOCOLS, ids=[path.stem for path in PROTOCOLS])
def test_the_tables_say_what_the_runs_say(path):
    runs = Runs(path.stem)
    text = read_page(HERE / "docs/protocols/tables.md")
    _, _, text = text.partition(f"## `{path.stem}` ")
    text, *_ = text.split(" ## `")
    parts = text.split(" ### ")  # of a single case there is no heading
    assert len(runs.cases) in (0, 1, len(parts) - 1)
    for case, part in zip(runs.cases or [""], parts[-max(1, len(runs.cases)) :], strict=True):
        assert len(parts) == 1 or part.startswith(f"{case} keyframes ")
        assert runs.table([MAP, "ahead", "head", "mid", "tail", "upstream"], case) in part
        assert runs.table(["motions", "relations", "looks", "poses"], case) in part


def test_the_page_says_what_the_runs_of_methods_say(page, notes):
    runs = Runs("methods")
    one, co, down, rare, two, random, few = runs.methods
    assert len(runs.final) == 63
    again = Runs("again")
    said = [
        f"one rate, which has {tables.series(runs.final, '', one, f'ava {MAP}').mean():.3f}]",
        f"{runs.interval(co, one, MAP)} with one rate for both stages, {runs.ahead(co, one, MAP)}",
        f"{runs.interval(co, two, MAP)} with one for each, {runs.ahead(co, two, MAP)}; again",
        f"again {again.interval(co, one, MAP)} and {again.interval(co, two, MAP)}, "
        f"{again.ahead(co, two, MAP)}.",
        f"equal updates** ({runs.interval(co, down, MAP)}, again {again.interval(co, down, MAP)}; "
        f"tail {runs.interval(co, down, 'tail')})",
        f"finetuning with two rates by {unsigned(runs.interval(down, two, MAP))}",
        f"behind co-finetuning by {unsigned(runs.interval(co, few, MAP))}",
        f"minus round robin is {runs.interval(random, co, MAP)}, again "
        f"{again.interval(random, co, MAP)}, which nobody had named",
        f"leads on them too ({runs.interval(down, two, 'motions')})",
        f"{runs.interval(co, one, 'tail')} over one rate, {runs.ahead(co, one, 'tail')} worlds",
        f"downstream alone gains {runs.interval(down, one, 'tail')}. Tail",
        f"gain** over two rates ({runs.interval(co, two, 'tail')}; again "
        f"{again.interval(co, two, 'tail')}), **or more",
        f"Tail minus head: {runs.interval(co, one, 'tail less head')} over one rate,",
        f"{runs.interval(co, two, 'tail less head')} over two.",
        f"minus co-finetuning {runs.interval(rare, co, MAP)}, tail",
        f"tail {runs.interval(rare, co, 'tail')})",
    ]
    for kind in ("motions", "relations", "looks", "poses"):
        said.append(f"{kind} {runs.interval(co, two, kind)}")
    check_said(page, said)
    said = [f"{tables.noise_of_a_run(runs.protocol, runs.rows):.3f} (three runs of each"]
    for other in (one, two):
        row = runs.interval(co, other, MAP), runs.ahead(co, other, MAP)
        said.append(f"| {' | '.join(row)} |")
    pairs = [(a, b) for a in (co, random) for b in (one, two, down)] + [(two, one), (down, one)]
    spreads = [runs.differences(*pair, MAP).std(ddof=1) for pair in pairs]
    said.append(f"by {min(spreads):.3f} to {max(spreads):.3f}, so that nine")
    for worlds, words, others in (
        (9, "a true difference of", "a true difference of"),
        (6, "six one of", "six of"),
    ):
        found = spell_found(spreads, worlds)
        said.append(f"{words} {found}")
        check_said(page, [f"{others} {found}"])
    check_said(notes, said)
    spreads = [runs.differences(co, other, "tail less head").std(ddof=1) for other in (one, two)]
    check_said(page, [f"of tail minus head nine find {spell_found(spreads, 9)}:"])
    readme = read_page(HERE / "README.md")
    check_said(readme, [f"{runs.interval(co, other, MAP)} with" for other in (one, two)])
    fresh = [again.interval(co, other, MAP) for other in (one, two)]
    check_said(readme, ["on six fresh worlds {} and {};".format(*fresh)])
    check_said(notes, [f"two rates, {fresh[1]}, {again.ahead(co, two, MAP)}."])
    order = again.interval(random, co, MAP), runs.interval(random, co, MAP)
    check_said(notes, ["behind round robin, {}, where {} had been".format(*order)])
    ends = [runs.upstream(name).replace(", ", " and ") for name in (co, one)]
    check_said(readme, ["at a top-1 of {}, finetuning at {}; minus".format(*ends)])
    check_said(readme, [f"{runs.interval(co, down, MAP)} at 64"])


def test_the_page_says_what_the_runs_of_keyframes_say(page, notes):
    runs = Runs("keyframes")
    two, co, down, random, few = runs.methods
    assert runs.cases == ["32", "64", "128", "256", "512"]
    updates = {case: runs.interval(co, down, MAP, case) for case in runs.cases}
    first, last = (Runs(f"again-{n}").interval(co, down, MAP, n) for n in ("32", "256"))
    said = [
        f"at 32 keyframes alone**, {updates['32']} (again {first});",
        f"is shown ({updates['64']})",
        f"is behind**: {updates['128']}, {updates['256']} at 256 (again {last}), {updates['512']} "
        "at 512.",
        f"at 128 no difference is shown ({runs.interval(co, few, MAP, '128')}), then it is behind.",
        f"shown at 32 and 64; at 128 no difference ({runs.interval(co, two, MAP, '128')}); at 256",
        f"finetuning at 32: head {runs.interval(co, two, 'head', '32')}, tail (one box a class)",
        f"box a class) {runs.interval(co, two, 'tail', '32')}. Tail less head,",
        f"{runs.interval(co, down, 'tail less head', '128')} at 128,",
        f"{runs.interval(co, down, 'tail less head', '256')} at 256.",
        f"32 keyframes less, by {unsigned(runs.interval(two, co, 'tail less head', '32'))}.",
    ]
    for other, signs in ((two, "++ --"), (few, "++ --"), (down, "+ ---")):
        for case, sign in zip(runs.cases, signs, strict=True):  # " ": no difference is shown
            _, low, high = tables.paired(runs.differences(co, other, MAP, case))
            assert sign == ("+" if low > 0 else "-" if high < 0 else " "), (other, case)
    check_said(page, said)
    readme = read_page(HERE / "README.md")
    check_said(readme, [f"{updates[case]} at {case}" for case in ("32", "128", "512")])
    found = spell_found(runs.spreads(co, (two, down, few), ("64", "256")), 6)
    check_said(notes, [f"at 64 and 256 keyframes, {found}"])


def test_the_page_says_what_the_runs_of_rates_say(page):
    runs, co = Runs("rates"), "co-finetuning"
    exchanged = {}
    for name in (co, "downstream, equal updates", "downstream, equal clips"):
        rate = "0.16" if name == co else "0.08"
        exchanged[name] = runs.interval(f"{name}, rate {rate}", co, MAP, "256")
    ours, updates, clips = exchanged.values()
    said = f"itself at 0.16 {ours}; downstream alone at 0.08 {updates}, at equal clips {clips}."
    check_said(page, [said])


def test_the_page_says_what_the_runs_of_budget_say(page, notes):
    runs, before = Runs("budget"), Runs("keyframes")
    two, co, down, _, few = runs.methods
    of = (co, down, MAP, "128")
    more = runs.differences(*of) - before.differences(*of)
    assert (runs.differences(*of).size, before.differences(*of).size) == (6, 6)
    said = [
        f"downstream updates {runs.interval(*of)}, which is {spell_interval(more)} more than",
        f"minus finetuning {runs.interval(co, two, MAP, '128')}, where a lead was named",
    ]
    assert tables.paired(runs.differences(co, two, MAP, "128"))[1] < 0  # and is not shown
    _, low, high = tables.paired(runs.differences(*of))
    assert low < 0 < high and tables.paired(more)[1] > 0  # not shown to be behind, and a change
    check_said(page, said)
    check_said(read_page(HERE / "README.md"), [f"twice the updates {runs.interval(*of)})"])
    found = spell_found(before.spreads(co, (two, down, few), ("64", "128")), 6)
    check_said(notes, [f"by those at 64 and 128, {found}"])


def test_the_page_says_what_the_runs_of_share_say(page):
    runs = Runs("share")
    third = runs.protocol.reference
    half, more = "co-finetuning, 1/2", "co-finetuning, 2/3"
    said = [
        f"behind a third**, {runs.interval('co-finetuning, 1/6', third, MAP)}.",
        f"A half minus a third: {runs.interval(half, third, MAP)}, tail",
        f"tail {runs.interval(half, third, 'tail')}; two",
        f"thirds minus a half: {runs.interval(more, half, MAP)}, top-1 on `templates` "
        f"{runs.interval(more, half, 'templates top-1')}.",
        f"(a third, two rates) is {runs.interval(half, 'finetuning, two rates', MAP)}, minus",
        f"downstream alone {runs.interval(half, 'downstream, equal updates', MAP)}.",
    ]
    check_said(page, said)


def test_the_page_says_what_the_runs_of_sets_say(page):
    runs = Runs("sets")
    two = runs.protocol.reference
    few = "{}, 800 updates".format
    said = [
        f"minus `actions`, relations {runs.interval(two, 'actions', 'relations')}; three",
        f"three minus two, looks {runs.interval('three sets', two, 'looks')});",
        f"minus `templates`, relations {runs.interval(two, 'templates', 'relations')}.",
        f"minus `actions`: {runs.interval('templates', 'actions', 'relations')} there, as named;",
        f"motions {runs.interval('templates', 'actions', 'motions')}.",
        f"goes with {runs.interval(two, few('actions'), 'relations')} on relations",
        f"{runs.interval(two, few('actions'), MAP)} on all",
        f"{runs.interval(two, few('templates'), 'motions')} on motions; the third",
        f"{runs.interval('three sets, 1600 updates', two, 'looks')} on looks,",
        f"{runs.interval('three sets, 1600 updates', two, 'relations')} on relations.",
    ]
    check_said(page, said)


def test_the_page_says_what_the_runs_of_kept_say(page, notes):
    runs = Runs("kept")
    one, co, down = runs.protocol.reference, "co-finetuning", "downstream, equal updates"
    distilled = " + self-distillation"
    quarter = "finetuning, second rate 1/4"
    gain = unsigned(runs.interval(co + distilled, co, MAP))
    alone = unsigned(runs.interval(down + distilled, down, MAP))
    price = unsigned(runs.interval(one, quarter, MAP))
    one_ends, co_ends = (runs.upstream(name).replace(", ", " and ") for name in (one, co))
    said = [
        f"ends at {one_ends} upstream (top-1",
        f"co-finetuning at {co_ends}.",
        f"ends at {runs.upstream(quarter)} and costs {price} of",
        f"one) at {runs.upstream(one + distilled)}, no price shown",
        f"adds {gain}** (again {unsigned(Runs('again').interval(co + distilled, co, MAP))}), tail "
        f"{runs.interval(co + distilled, co, 'tail')}, for",
        f"to downstream alone {alone}.",
        f"minus downstream alone is {runs.interval(co + distilled, down + distilled, MAP)}, minus",
        f"minus finetuning {runs.interval(co + distilled, one + distilled, MAP)}.",
    ]
    _, low, high = tables.paired(runs.differences(one + distilled, one, MAP))
    assert low < 0 < high  # no price is shown
    for name in (one, quarter, one + distilled, "finetuning + SpotTune"):
        for column in (MAP, "actions top-1", "templates top-1"):
            assert tables.paired(runs.differences(co, name, column))[1] > 0  # it is ahead
    check_said(page, said)
    readme = read_page(HERE / "README.md")
    check_said(readme, [f"gained {gain} more, and downstream alone {alone}."])
    tuned = runs.methods["finetuning + self-distillation"]
    scores = [
        tables.mean_score(runs.rows, "", tuned.name, p) for p in tables.points_of(tuned, "", {})
    ]
    check_said(notes, ["1/4 {:.3f}, 1 {:.3f}, **4** {:.3f}, the **edge**".format(*scores)])


@dataclass
class Named:
    """A difference that a protocol named before its runs, and the protocol that had shown it."""

    words: str
    pair: tuple
    earlier: str
    column: str = MAP
    case: str = ""
    earlier_pair: tuple = ()


CO, DOWN = "co-finetuning", "downstream, equal updates"
UP = "upstream top-1"
THIRD, ACTIONS = "co-finetuning, random order", "actions, 800 updates"
DISTILLED = "co-finetuning + self-distillation"
RELATIONS = "`templates` and 400 updates more, minus `actions` alone, AP of relations, above zero"
NAMED = {
    "again": [
        Named("co-finetuning minus finetuning, mAP, above zero", (CO, "finetuning"), "methods"),
        Named(
            "co-finetuning minus downstream at equal clips, mAP, above zero",
            (CO, "downstream, equal clips"),
            "methods",
        ),
        Named(
            "a sixth of the clips minus a third, mAP, below zero",
            ("co-finetuning, 1/6", THIRD),
            "share",
            earlier_pair=("co-finetuning, 1/6", "co-finetuning, 1/3"),
        ),
        Named(RELATIONS, (THIRD, ACTIONS), "sets", "relations", earlier_pair=("two sets", ACTIONS)),
        Named(
            "co-finetuning with self-distillation minus without, mAP, above zero",
            (DISTILLED, CO),
            "kept",
        ),
        Named(
            "co-finetuning minus finetuning, mean upstream top-1, above zero",
            (CO, "finetuning"),
            "kept",
            UP,
        ),
    ]
}
for keyframes, sign in (("32", "above"), ("256", "below")):
    NAMED[f"again-{keyframes}"] = [
        Named(
            f"co-finetuning minus downstream at equal updates, {sign} zero",
            (CO, DOWN),
            "keyframes",
            case=keyframes,
        ),
        Named(
            f"co-finetuning minus finetuning with two rates, {sign} zero",
            (CO, "finetuning, two rates"),
            "keyframes",
            case=keyframes,
        ),
    ]


@pytest.mark.parametrize("name", NAMED)
def test_what_was_named_beforehand_is_told_as_it_came_out(name, page, notes):
    """The protocol's power figures by the earlier runs; the notes' rows by both."""
    rows = re.findall(r"\| `again[-\d]*` \| .*? \| (yes|no) \|", notes)
    assert len(rows) == sum(map(len, NAMED.values()))
    found = {10: "all ten", 9: "nine of ten"}[rows.count("yes")]
    assert f"[{found}](protocols/README.md#found-again) were found again" in page
    runs = Runs(name)
    question = " ".join(runs.protocol.question.split())
    for named in NAMED[name]:
        earlier = Runs(named.earlier)
        before = named_difference(earlier, named, named.earlier_pair or named.pair)
        found = tables.found_four_times_in_five(before.std(ddof=1), runs.protocol.worlds)
        count = {3: "three", 6: "six"}[runs.protocol.worlds]
        assert f"{named.words}: was {before.mean():+.3f}, {count} find {found:.3f}" in question
        now = named_difference(runs, named, named.pair)
        _, low, high = tables.paired(now)
        shown = low > 0 if named.words.endswith("above zero") else high < 0
        end = "yes" if shown else "no"
        words = f"| {named.words} | {spell_interval(before)} | {spell_interval(now)} | {end} |"
        assert words in notes


def named_difference(runs, named, pair):
    if named.column != UP:
        return runs.differences(*pair, named.column, named.case)
    tops = [runs.differences(*pair, f"{task} top-1") for task in ("actions", "templates")]
    return np.mean(tops, axis=0)


def test_every_row_of_a_table_has_all_its_worlds():
    for path in PROTOCOLS:
        runs = Runs(path.stem)
        for case in runs.cases or [""]:
            for name in runs.methods:
                seeds = tables.by_seed(runs.final, case, name, "score")
                assert len(seeds) == runs.protocol.worlds, (path.stem, case, name)


def test_the_page_counts_its_intervals(page):
    text = page + read_page(HERE / "docs/protocols/tables.md")
    ends = re.findall(r"\[([+-]?0\.\d{3}), ([+-]?0\.\d{3})\]", text)
    apart = sum(low.startswith("-") == high.startswith("-") for low, high in ends)
    said = (
        f"about {round(len(ends) / 20)} of the {len(ends)} intervals here and in the tables would"
    )
    assert f"{said} exclude zero ({apart} do)" in page


def test_the_notes_say_how_the_rates_of_methods_were_tuned(notes):
    runs = Runs("methods")
    *_, two, random, few = runs.methods.values()
    means = {}
    for method in (two, random, few):
        for point in tables.points_of(method, "", {}):
            score = tables.mean_score(runs.rows, "", method.name, point)
            means.setdefault(method.name, []).append(f"{score:.3f}")
    for name, values in means.items():
        title = "finetuning, second stage" if name == two.name else name
        place = notes.index(f"171–179, {title}")
        found = re.findall(r"0\.\d{3}", notes[place:])[: len(values)]
        assert found == values, name
    best = tables.choose(runs.protocol, runs.rows)["", two.name]
    assert best == {"lr": 0.04, "task.ava.lr_scale": 4} and tables.at_an_edge(two, best)


@pytest.mark.parametrize("name", ["methods", "keyframes", "share", "sets", "kept"])
def test_the_figures_of_the_page_are_drawn_from_its_runs(name, tmp_path):
    runs = Runs(name)
    tables.FIGURES[runs.protocol.figure](runs.protocol, runs.final, tmp_path / "now.svg")
    assert (tmp_path / "now.svg").read_text() == (HERE / f"docs/assets/{name}.svg").read_text()


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def test_tables_can_be_written_again_from_the_runs(comparison, tmp_path, capsys):
    this = comparison()
    tables.write_rows(tmp_path / "compare.csv", this.all_phases())
    lines = ['recipe = "x"', "first_world = 10", "tuning_worlds = 2", "worlds = 3", "repeats = 3"]
    for method in this.protocol.method:
        lines += ["[[method]]", f'name = "{method.name}"', "grid = {lr = [0.1, 0.2, 0.4, 2.0]}"]
    path = write_lines(tmp_path / "tiny.toml", *lines)
    before = (tmp_path / "compare.csv").read_bytes()
    run_command("compare", path, "--csv", tmp_path / "compare.csv")
    assert (tmp_path / "compare.csv").read_bytes() == before  # it may be of several protocols
    text = (tmp_path / "compare.md").read_text()
    assert "co-finetuning | +0.0500 [+0.0500, +0.0500], ahead in 3 of 3" in text


def test_the_command_refuses_in_one_sentence(tmp_path):
    for words, message in (
        (["nothing"], "compare: no protocol nothing; expected a file or one of "),
        (["methods", "--worlds", "0"], "compare: --jobs 0, --worlds 0; expected 0 or more jobs"),
        (["methods", "--jobs", "-1"], "compare: --jobs -1, --worlds 9; expected 0 or more jobs"),
        (["methods", "--recipe", "nothing"], "recipe nothing: neither a file nor one of"),
    ):
        done = run_command("compare", *words, "--out", tmp_path / "out", code=2)
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "header, missing",
    [
        ("video,time_sec,x1,y1,x2,y2,label", "phase, case, method, tuned, seed, commit, score, TA"),
        ("phase,case,method,tuned,commit,score,ava mAP (p)", "seed; expected a compare.csv"),
        ("phase,case,method,tuned,seed,commit,score,ava head", "TASK mAP; expected a compare.csv"),
    ],
)
def test_a_csv_that_is_of_no_comparison_is_one_sentence(header, missing, tmp_path):
    path = write_lines(tmp_path / "labels.csv", header, header)
    protocol = write_lines(tmp_path / "tiny.toml", "[[method]]", 'name = "a"')
    done = run_command("compare", protocol, "--csv", path, code=2)
    assert done.stderr.startswith(f"error: {path}: no column {missing}")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "compare.md").exists()


def test_the_best_of_what_was_tried_is_taken():
    """A point without runs is no answer; where none has any, the first."""
    method = compare.Method("a", {}, {"lr": [1, 2, 3]})
    protocol = SimpleNamespace(method=[method], case=[compare.Case()])

    def row(lr, score):
        return dict(phase="tuning", case="", method="a", tuned=f"lr = {lr}", seed=1, score=score)

    for rows, lr in (
        ([row(1, 0.5), row(2, 0.7)], 2),
        ([row(2, 0.5), row(3, 0.2)], 2),
        ([row(3, -math.inf)], 3),
        ([], 1),
    ):
        assert tables.choose(protocol, rows) == {("", "a"): {"lr": lr}}


def test_a_method_is_like_one_that_is_tuned_before_it(tmp_path):
    lines = []
    for name, start in (("a", ""), ("b", "a"), ("c", "b")):
        lines += ["[[method]]", f'name = "{name}"', "grid = {lr = [1, 2]}", f'like = "{start}"']
    with pytest.raises(ValueError, match="'c': 'b' has a grid and is like another"):
        compare.read_protocol(str(write_lines(tmp_path / "p.toml", *lines)))
    lines[6] = "grid = {}"  # of b: it takes a's settings, which are known in time
    compare.read_protocol(str(write_lines(tmp_path / "p.toml", *lines)))


def test_intervals_are_cut_where_an_axis_has_no_logarithm(tmp_path):
    near, far = charts.Point(0.1, 0.5, 0.4, 0.6, -0.01, 0.21), charts.Point(0.9, 0.5, 0.4, 0.6)
    lines = {"near": [near], "far": [far]}
    plane = charts.Plane(lines, "x", joined=False)
    elements = elements_of(charts.draw_points(lines, "t", "x", joined=False), tmp_path / "a.svg")
    flat = []
    for name, at, _ in elements:
        if name == "line" and at["stroke"] == charts.COLOURS[0] and at["y1"] == at["y2"]:
            flat.append((float(at["x1"]), float(at["x2"])))
    assert flat == [pytest.approx((plane.left, plane.x.px(0.21)), abs=0.06)]
    assert plane.x.px(0.3) == pytest.approx((plane.x.px(0.1) + plane.x.px(0.9)) / 2)  # log2


def test_the_tables_do_not_wait_for_the_figure(comparison, monkeypatch, capsys):
    """Without upstream tasks nothing can be kept; and whatever a drawing raises."""
    this = comparison(lrs=(0.1,), repeats=0)
    rows = this.all_phases()
    for row in rows:
        row.pop("up top-1")
    this.out.mkdir(exist_ok=True)
    (this.out / "compare.svg").write_text("of another time")
    this.protocol.figure = "kept"
    tables.write_report(this.protocol, rows, this.out)
    said = capsys.readouterr().out
    assert "no figure of what is kept" in said and said.endswith("compare.md\n")
    text = (this.out / "compare.md").read_text()
    assert "## Results" in text and not (this.out / "compare.svg").exists()

    def broken(*_):
        raise ZeroDivisionError

    (this.out / "compare.md").unlink()
    monkeypatch.setitem(tables.FIGURES, "kept", broken)
    with pytest.raises(ZeroDivisionError):
        tables.write_report(this.protocol, rows, this.out)
    assert (this.out / "compare.md").read_text() == text
