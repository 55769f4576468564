"""Tests of compare."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import HERE, TINY, run_command, run_log, toml_table, write_lines

from extras import compare


def test_t_quantiles_by_integration():
    for freedom in (1, 2, 4, 9, 30):
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        scale /= math.sqrt(freedom * math.pi)
        width = compare.T975[freedom - 1] / 20000
        t = (np.arange(20000) + 0.5) * width
        inside = ((1 + t**2 / freedom) ** (-(freedom + 1) / 2)).sum() * width
        assert 0.5 + scale * inside == pytest.approx(0.975, abs=2e-5)
    half = 4.303 / 3**0.5
    assert compare.paired(np.array([2.0, 3.0, 4.0])) == pytest.approx((3, 3 - half, 3 + half))


@dataclass
class BaselinesRecipe:
    task: list
    world: dict = field(default_factory=dict)
    seed: int = 0
    lr: float = 0.1
    device: str = "cpu"
    root: str = "."
    head_above: int = 100
    tail_below: int = 25


BASELINES_STUB = """
import json, pathlib, sys
a = dict(word.split("=", 1) for word in sys.argv[3:])
out, lr, good = pathlib.Path(a["--out"]), float(a["--lr"]), a["--method"] == "cofinetune"
with open(out / "starts", "a") as f: f.write("started\\n")
if lr > 1: print("x " * 999); sys.exit("error: non-finite loss at step 3")
if a.get("--fail"): print("one", flush=True); sys.exit("error: no such thing")
ap = 0.5 - abs(lr - (0.2 if good else 0.4)) + 0.01 * int(a["--seed"]) % 7 + 0.05 * good
ava = dict(kind="box", mAP=ap, protocol="p",
           groups={k: dict(mAP=ap) for k in ("head", "mid")} | dict(tail=dict(mAP=None)),
           per_class=[dict(name="sit", ap=ap), dict(name="run", ap=None)])
metrics = dict(score=ap, task=dict(up=dict(kind="clip", top1=0.9), ava=ava))
json.dump(metrics, open(out / "metrics.json", "w"))
tasks = ("up", "ava") if good else ("ava", "ava")
steps = [dict(step=i, loss={tasks[i % 2]: 1}, time=dict(unix=60 * i)) for i in range(6)]
(out / "log.jsonl").write_text("".join(json.dumps(step) + "\\n" for step in steps))
"""


def test_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "extras/compare.py"))
    write_lines(tmp_path / "cofinetune.py", BASELINES_STUB)
    rows = [f"video{v},902,0,0,1,1,{label},0\n" for v in range(40) for label in (1, 2)]
    (tmp_path / "train.csv").write_text("".join(rows))
    tasks = [
        SimpleNamespace(
            name="ava",
            kind="box",
            batch=8,
            train="train.csv",
            videos="v",
            train_boxes="",
            exclude_train="",
        ),
        SimpleNamespace(name="up", kind="clip", batch=2),
    ]
    recipe, methods = BaselinesRecipe(tasks, root=str(tmp_path)), ["finetune", "cofinetune"]
    out = tmp_path / "out"

    def run(overrides={}, lrs=(0.4, 0.1, 0.2, 2.0)):
        overrides = {"out": str(out)} | overrides
        compare.compare(recipe, "x", overrides, methods, seeds=3, lrs=lrs, jobs=2)

    run()
    text = (out / "compare.md").read_text()
    assert text in capsys.readouterr().out and "(edge)" not in text
    for words in (
        "| 0.4 |\n",
        "| 0.2 |\n",
        "-inf",
        "+0.0500 [+0.0500, +0.0500]",
        "| ava tail | - |",
        "| 0.9000 ± 0.0000 | 30 | 6 | 5.0",
        "| - | 48 | 6 | 5.0",
    ):
        assert words in text
    tune, final = (
        [json.loads(path.read_text())[1] for path in out.glob(f"{phase}/*/compare.json")]
        for phase in ("tuning", "final")
    )
    assert len(tune) == 2 * 4 * 2 and len(final) == 2 * 3
    assert not {o["seed"] for o in tune} & {o["seed"] for o in final}
    parts = [
        Path(tune[0][f"task.ava.{split}"]).read_text().splitlines(True)
        for split in ("train", "val")
    ]
    videos = [{row.split(",")[0] for row in part} for part in parts]
    assert sorted(parts[0] + parts[1]) == sorted(rows) and not videos[0] & videos[1] and all(videos)
    assert not any("task.ava.val" in overrides for overrides in final)
    assert len(list(csv.reader(open(out / "compare.csv")))) == 7
    classes = list(csv.DictReader(open(out / "classes.csv")))
    assert [(c["class"], c["method"], c["seeds"]) for c in classes] == [
        ("sit", method, "3") for method in methods
    ]
    assert (out / "compare.png").stat().st_size > 1000
    run()
    starts = [p.read_text().split() for p in out.glob("*/*/starts") if "lr2" not in str(p)]
    assert all(len(words) == 1 for words in starts)  # finished runs are not repeated
    run(lrs=[0.05, 0.1])
    assert "| 0.1 (edge) |" in (out / "compare.md").read_text()
    methods.append("cofinetune@weight=[1, 2]@lr=0.3")
    run(lrs=[0.05, 0.1])
    text = (out / "compare.md").read_text()
    assert "| cofinetune@weight=[1, 2]@lr=0.3 | - | - | 0.3 (given) |" in text
    assert len([*out.glob("tuning/*lr=0.3*")]) == 0 and len([*out.glob("final/*lr=0.3*")]) == 3
    with pytest.raises(ValueError, match="has another recipe or other options"):
        run({"steps": "7"})
    with pytest.raises(ValueError, match=r"ended with status 1: one \| error: no such thing$"):
        run({"out": str(tmp_path / "other"), "fail": "1"})


@pytest.mark.slow
def test_compare_for_real(tmp_path):
    """Worlds, two stages, every wrapper, the tables; the methods of a seed start alike, on the same
    files."""
    world = toml_table(TINY | dict(scenes_train=24, scenes_val=24))
    methods = ["finetune", "cofinetune", "selfdistil", "finetune+spottune", "finetune+selfdistil"]
    run_command(
        "compare",
        "--methods",
        ",".join(methods),
        "--world",
        world,
        "--out",
        tmp_path,
        *"--seeds 2 --lrs 0.04 --steps 6 --warmup 2 --preview 0 --device cpu".split(),
    )
    rows = list(csv.DictReader(open(tmp_path / "compare.csv")))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in "01" for m in methods]
    assert {(row["clips seen"], row["updates"]) for row in rows} == {("96.0", "6.0")}
    logs = {m: run_log(tmp_path / f"final/{m}-lr0.04-seed1") for m in methods}
    first = {m: log[0] for m, log in logs.items()}
    assert first["cofinetune"]["loss"] == first["selfdistil"]["loss"]
    assert first["finetune"]["loss"] == first["finetune+selfdistil"]["loss"]
    assert first["selfdistil"]["distillation"] == 0 < logs["selfdistil"][1]["distillation"]
    assert len(first["finetune+spottune"]["finetuned_share"]) == 4
    stage = [
        (tmp_path / f"final/{m}-lr0.04-seed1/upstream/log.jsonl").read_text()
        for m in methods
        if m.startswith("finetune")
    ]
    assert len(set(stage)) == 1  # trained once, as the clock in it says
    worlds = [(tmp_path / f"worlds/seed{s}/ava/train.csv").read_text() for s in "01"]
    assert worlds[0] != worlds[1]


def test_the_page_says_what_the_runs_say():
    """Every interval of docs/comparison.md that assets/compare.csv can give."""
    page = (HERE / "docs/comparison.md").read_text().replace("−", "-")
    scores = {}
    for row in csv.DictReader(open(HERE / "docs/assets/compare.csv")):
        scores.setdefault(row["method"], {})[int(row["seed"])] = float(
            row["ava mAP (official-2020)"]
        )
    finetune = "finetune@task.ava.lr_scale=2"
    one_set = 'cofinetune@train_tasks=["actions","ava"]@steps=800@warmup=64@lr=0.16'
    weighted = "cofinetune@schedule=weighted@task.actions.weight=3@task.templates.weight=2@lr=0.16"

    def difference(one, other, first, last):
        values = [scores[one][s] - scores[other][s] for s in range(first, last + 1)]
        mean, low, high = compare.paired(np.array(values))
        return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"

    for method in [*scores][1:]:
        assert difference(method, finetune, 20, 24) in page, method
    assert difference("cofinetune", finetune, 30, 39) + " | 9 of 10 |" in page
    assert difference(one_set, "cofinetune", 20, 24) in page
    costs = difference(weighted, "cofinetune", 20, 24)
    assert costs == "-0.071 [-0.121, -0.022]" and "0.071 [0.022, 0.121]" in page
    for method, of in scores.items():
        values = [of[seed] for seed in range(20, 25)]
        assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} |" in page, method
