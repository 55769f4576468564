"""compare: methods side by side on the same encoder, data, budget and evaluation."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; beyond, the last one: a little too wide.
T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)
COSTS = {"clips seen": ",.0f", "updates": ",.0f", "minutes": ".1f"}  # columns that are no scores


@dataclass
class Run:
    method: str
    lr: float
    seed: int
    out: Path
    overrides: dict[str, str]  # of the recipe

    def metrics(self) -> dict:
        """metrics.json, which a run lacks until it is finished, and for good if it diverged."""
        path = self.out / "metrics.json"
        return json.loads(path.read_text()) if path.exists() else {"score": -math.inf}


def compare(
    recipe, source: str, overrides: dict[str, str], methods: list[str], seeds: int = 5,
    lrs: list[float] = (), jobs: int = 0, tuning_seeds: int = 2,
) -> None:  # fmt: skip
    """Tune every method's learning rate, run every method with the same seeds, write the tables.

    recipe: what `source` (a file or a name) and `overrides` resolve to. A seed decides on the
    initialisation, the order of the data, the same for all methods, and the world where it is
    generated. The rate is the best of `lrs` (default: half, once, twice the recipe's; a single one
    is taken as it is) by mean mAP over tuning seeds, on data that no reported number is measured
    on: other worlds, or the fifth of the training videos that `hold_out` sets aside. `jobs` runs at
    a time have one thread each (0: a run per core; one in all on a GPU). Finished runs are kept,
    stopped ones resume. A method may carry settings of its own, `finetune@task.ava.lr_scale=2`; one
    that carries `@lr=0.1` is not tuned. Differences are taken to the `finetune` that was tuned
    best. In `out` (runs/compare): compare.md, compare.csv (every run), classes.csv, compare.png,
    and the runs.
    """
    out = Path(overrides.get("out", "runs/compare")).resolve()
    lrs = sorted(set(lrs)) or [recipe.lr / 2, recipe.lr, recipe.lr * 2]
    if jobs < 0:
        raise ValueError(f"compare: --jobs {jobs}, expected 0 (one per core) or more")
    if min(seeds, tuning_seeds) < 1 or len(set(methods)) < len(methods):
        raise ValueError(
            f"compare: {seeds} seeds, {tuning_seeds} tuning seeds, methods "
            f"{', '.join(methods)}; expected one seed or more, each method once"
        )
    if bad := [part for m in methods for part in m.split("@")[1:] if "=" not in part]:
        raise ValueError(f"compare: {bad[0]!r} after @ is not of the form key=value")
    if not any(task.kind == "box" for task in recipe.task):
        raise ValueError(f"compare: {source} has no box task, whose mAP decides")
    if not jobs:
        gpu = recipe.device != "cpu" and torch.cuda.is_available()
        jobs = 1 if gpu else len(os.sched_getaffinity(0))

    def run(phase: str, method: str, lr: float, seed: int, split: dict) -> Run:
        folder = out / phase / f"{method}-lr{lr:g}-seed{seed}"
        name, *changes = method.split("@")
        own = dict(change.split("=", 1) for change in changes)
        own |= {
            "method": name,
            "lr": repr(lr),
            "seed": str(seed),
            "threads": "1",
            "out": str(folder),
        }
        return Run(method, lr, seed, folder, overrides | split | own)

    given = {
        m: float(part.removeprefix("lr="))
        for m in methods
        for part in m.split("@")
        if part.startswith("lr=")
    }
    tuned = [m for m in methods if m not in given] if len(lrs) > 1 else []
    scores, best, tuning, final = {}, dict.fromkeys(methods, lrs[0]) | given, [], []
    if tuned:
        held_out = {} if recipe.world else hold_out(recipe, out / "tuning")
        for seed in range(recipe.seed + 1000, recipe.seed + 1000 + tuning_seeds):
            split = other_world(recipe, seed, out) if recipe.world else held_out
            tuning += [run("tuning", method, lr, seed, split) for method in tuned for lr in lrs]
        launch(tuning, recipe, source, jobs)
        for key in ((method, lr) for method in tuned for lr in lrs):
            scores[key] = np.mean([r.metrics()["score"] for r in tuning if (r.method, r.lr) == key])
        best |= {method: max(lrs, key=lambda lr: scores[method, lr]) for method in tuned}
    for seed in range(recipe.seed, recipe.seed + seeds):
        split = other_world(recipe, seed, out) if recipe.world else {}
        final += [run("final", method, best[method], seed, split) for method in methods]
    launch(final, recipe, source, jobs)
    if diverged := [str(r.out) for r in final if "task" not in r.metrics()]:
        raise ValueError(f"compare: no table, {', '.join(diverged)} diverged; take smaller --lrs")
    write_tables(recipe, source, final, lrs, scores, best, out)


def other_world(recipe, seed: int, out: Path) -> dict[str, str]:
    """Make the recipe's world with another seed -> the overrides that train on it."""
    from extras.world import make_world

    world, folder = recipe.world | {"seed": seed}, out / "worlds" / f"seed{seed}"
    make_world(folder, **world)
    world = ", ".join(f"{key} = {value!r}" for key, value in world.items())
    return {"root": str(folder), "world": "{" + world + "}"}


def hold_out(recipe, out: Path) -> dict[str, str]:
    """Set a fifth of each box task's training videos aside -> the overrides that validate on them,
    with the person boxes of training. Upstream tasks stay as they are: downstream mAP decides."""
    overrides = {}
    out.mkdir(parents=True, exist_ok=True)
    for task in (task for task in recipe.task if task.kind == "box"):
        parts = {"train": [], "val": []}
        for row in (Path(recipe.root) / task.train).read_text().splitlines(keepends=True):
            parts["train" if zlib.crc32(row.split(",")[0].encode()) % 5 else "val"].append(row)
        for split, rows in parts.items():
            path = out / f"{task.name}_{split}.csv"
            path.write_text("".join(rows))
            overrides[f"task.{task.name}.{split}"] = str(path)
        for key, value in (
            ("val_videos", task.videos),
            ("val_boxes", task.train_boxes),
            ("exclude_val", task.exclude_train),
        ):
            overrides[f"task.{task.name}.{key}"] = value
    return overrides


def launch(runs: list[Run], recipe, source: str, jobs: int) -> None:
    """Run what is not finished, `jobs` processes at a time. ValueError as soon as one fails; but a
    run that diverges only stays without metrics: in a grid that is an answer. Runs of `finetune`
    and its wrappers that differ in the second stage only share the first: it is copied."""
    waiting, running, began = [], {}, time.time()
    for run in runs:
        identity = json.dumps([source, run.overrides, vars(recipe)], default=vars)
        written = run.out / "compare.json"
        if written.exists() and written.read_text() != identity:
            raise ValueError(f"{run.out} has another recipe or other options; take another --out")
        run.out.mkdir(parents=True, exist_ok=True)
        written.write_text(identity)
        waiting += [] if (run.out / "metrics.json").exists() else [run]
    total, trainer = len(waiting), str(Path(__file__).resolve().parent.parent / "cofinetune.py")
    print(
        f"{runs[0].out.parent}: {len(runs)} runs, {len(runs) - total} done, {jobs} at a time",
        flush=True,
    )
    # SIGTERM and SIGHUP, like Ctrl-C, must not leave runs behind in sessions of their own.
    signals = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        while waiting or running:
            while len(running) < jobs:
                busy = [first_stage(other) for other in running.values()]
                run = next((r for r in waiting if first_stage(r) not in busy), None)
                if run is None:
                    break
                waiting.remove(run)
                take_first_stage(run, runs)
                command = [
                    sys.executable,
                    trainer,
                    "--recipe",
                    source,
                    *(f"--{key}={value}" for key, value in run.overrides.items()),
                ]
                with open(run.out / "output.txt", "a") as output:
                    process = subprocess.Popen(  # in its own session, which Ctrl-C does not reach
                        command,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                    )
                running[process] = run
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                tail = " | ".join((run.out / "output.txt").read_text().split("\n")[-4:-1])
                if (score := run.metrics()["score"]) == -math.inf and "non-finite" not in tail:
                    raise ValueError(f"{run.out} ended with status {process.returncode}: {tail}")
                done = total - len(waiting) - len(running)
                left = (time.time() - began) / done * (total - done) / 60
                print(
                    f"{done}/{total} {run.out.name}: mAP {score:.4f}, {left:.0f} min left",
                    flush=True,
                )
    except KeyboardInterrupt:
        raise SystemExit("compare: stopped; the same command goes on from here") from None
    finally:  # SIGTERM makes a run write its checkpoint and stop
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for number, handler in signals.items():
            signal.signal(number, handler)


def first_stage(run: Run) -> object:
    """Equal for runs of finetune that share their training on the upstream tasks."""
    if not run.method.startswith("finetune"):
        return run
    return {
        key: value
        for key, value in run.overrides.items()
        if key not in ("out", "method", "method_options")
    }


def take_first_stage(run: Run, runs: list[Run]) -> None:
    """Copy the first stage of a finished run that has the same, unless this one began its own."""
    stage, part = run.out / "upstream", run.out / "upstream.part"
    done = [
        r.out / "upstream"
        for r in runs
        if first_stage(r) == first_stage(run) and (r.out / "metrics.json").exists()
    ]
    if done and not stage.exists():
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(done[0], part)
        part.rename(stage)


def measures(run: Run, recipe) -> dict[str, float]:
    """What the tables show of a finished run, by column; nan for a group without classes and for a
    task that the run never trained."""
    found, batch, trained = {}, {task.name: task.batch for task in recipe.task}, set()
    boxes_first = sorted(run.metrics()["task"].items(), key=lambda item: item[1]["kind"])
    for name, m in boxes_first:
        if m["kind"] == "clip":
            values = {"top-1": m["top1"]}
        else:
            values = {f"mAP ({m['protocol']})": m["mAP"]}
        values |= {group: of["mAP"] for group, of in m.get("groups", {}).items()}
        found |= {f"{name} {key}": math.nan if v is None else v for key, v in values.items()}
    found |= dict.fromkeys(COSTS, 0.0)
    for path in run.out.rglob("log.jsonl"):  # of every stage
        steps = [r for r in map(json.loads, path.read_text().splitlines()) if "loss" in r]
        found["clips seen"] += sum(batch[task] for step in steps for task in step["loss"])
        trained |= {task for step in steps for task in step["loss"]}
        found["updates"] += len(steps)
        found["minutes"] += (steps[-1]["time"]["unix"] - steps[0]["time"]["unix"]) / 60
    return {
        column: value if column in COSTS or column.split()[0] in trained else math.nan
        for column, value in found.items()
    }


def paired(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of the differences by seed, and its 95 % t interval (nan for a single seed)."""
    mean, count, half = differences.mean(), len(differences), math.nan
    if count > 1:
        half = T975[min(count - 1, len(T975)) - 1] * differences.std(ddof=1) / math.sqrt(count)
    return mean, mean - half, mean + half


def write_tables(
    recipe, source: str, runs: list[Run], lrs: list, scores: dict, best: dict, out: Path
) -> None:
    """compare.md, which is printed too, compare.csv, classes.csv and compare.png."""
    methods, seeds = list(best), sorted({run.seed for run in runs})
    results = {(run.method, run.seed): measures(run, recipe) for run in runs}
    columns = list(results[methods[0], seeds[0]])
    rates = [c for c in columns if c not in COSTS]
    series = {c: {m: np.array([results[m, s][c] for s in seeds]) for m in methods} for c in columns}
    finetuned = [m for m in methods if m.partition("@")[0] == "finetune"]
    reference = max(finetuned or methods[:1], key=lambda m: scores.get((m, best[m]), 0.0))
    others = [m for m in methods if m != reference]
    differences = {(c, m): series[c][m] - series[c][reference] for c in rates for m in others}

    def table(header: list[str], rows: list[list[str]]) -> str:
        rows = [header, ["---"] * len(header), *rows]
        text = "".join("| " + " | ".join(row) + " |\n" for row in rows) + "\n"
        for missing, shown in ((" [+nan, +nan]", ""), (" ± nan", ""), ("+nan", "-"), ("nan", "-")):
            text = text.replace(missing, shown)
        return text

    def spread(column: str, values: np.ndarray) -> str:
        form = COSTS.get(column, ".4f")
        several = len(values) > 1 and column not in ("clips seen", "updates")
        return f"{values.mean():{form}}" + (f" ± {values.std(ddof=1):{form}}" if several else "")

    each, other = "", "held-out training videos"
    if recipe.world:
        each, other = "a world, ", "other worlds"
    text = (
        f"Recipe {source}, seeds {seeds[0]} to {seeds[-1]}: each {each}an initialisation and "
        "an order of the clips, the same for all methods.\n\n"
    )
    if scores:
        text += (
            f"Learning rate: mean mAP over tuning seeds, on {other}. At an edge of the grid, "
            "a better one may lie outside.\n\n"
        )
        taken = {m: f"{best[m]:g}" + " (edge)" * (best[m] in (lrs[0], lrs[-1])) for m in methods}
        text += table(
            ["method", *(f"{lr:g}" for lr in lrs), "taken"],
            [
                [
                    m,
                    *(f"{scores.get((m, lr), math.nan):.4f}" for lr in lrs),
                    taken[m] if (m, lrs[0]) in scores else f"{best[m]:g} (given)",
                ]
                for m in methods
            ],
        )
    else:
        given = ", ".join(f"{best[m]:g} ({m})" for m in methods)
        text += f"Learning rate, not tuned: {given}.\n\n"
    text += (
        "Mean ± standard deviation over seeds. "
        f"Head: above {recipe.head_above} training boxes, tail: below {recipe.tail_below}. "
        "Minutes: from the first to the last logged step.\n\n"
    )
    text += table(
        ["method", *columns], [[m, *(spread(c, series[c][m]) for c in columns)] for m in methods]
    )
    if others:
        interval = "{:+.4f} [{:+.4f}, {:+.4f}]".format
        text += f"Difference to {reference}, paired by seed: mean and 95 % t interval.\n\n"
        text += table(
            ["", *others],
            [[c, *(interval(*paired(differences[c, m])) for m in others)] for c in rates],
        )
    (out / "compare.md").write_text(text)
    write_csv(
        out / "compare.csv",
        ["method", "lr", "seed", *columns],
        [[r.method, r.lr, r.seed, *results[r.method, r.seed].values()] for r in runs],
    )

    ap, rows = {}, []
    for run in runs:
        for task, m in run.metrics()["task"].items():
            for c in m.get("per_class", ()):
                if c["ap"] is not None and math.isfinite(c["ap"]):
                    ap.setdefault((task, c["name"]), {})[run.method, run.seed] = c["ap"]
    for (task, name), of in ap.items():
        both = [s for s in seeds if all((m, s) in of for m in methods)]  # which have such a box
        values = {m: np.array([of[m, s] for s in both]) for m in methods if both}
        rows += [
            [task, name, m, len(both), v.mean(), *paired(v - values[reference])]
            for m, v in values.items()
        ]
    write_csv(
        out / "classes.csv",
        ["task", "class", "method", "seeds", "AP", f"difference to {reference}", "low", "high"],
        rows,
    )
    shown = {key: values for key, values in differences.items() if not key[0].endswith("top-1")}
    draw_differences(shown, reference, out / "compare.png")
    print(text + f"in {out}: compare.md, compare.csv, classes.csv, compare.png")


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


def draw_differences(
    differences: dict[tuple[str, str], np.ndarray], reference: str, path: Path
) -> None:
    """A row per column and method: a dot for each seed's difference, a bar for the interval."""
    from extras import pictures

    names = [f"{column}: {method} - {reference}" for column, method in differences]
    methods = list(dict.fromkeys(method for _, method in differences))
    left, height = 6 * max(map(len, names), default=0) + 12, 16 * len(names) + 44
    picture = np.full((height, left + 440, 3), 255, np.uint8)
    rows = [(dots, paired(dots)) for dots in differences.values()]
    every = np.concatenate([np.zeros(1), *(np.append(*row) for row in rows)])
    reach = np.abs(every[np.isfinite(every)]).max() or 1.0

    def mark(top: int, bottom: int, first: float, last: float, width: int, colour) -> None:
        if math.isfinite(first + last):
            a, b = (left + 215 + round(200 * value / reach) for value in (first, last))
            picture[top:bottom, a - width : b + width + 1] = colour

    for tick in (-reach, 0.0, reach):
        mark(18, height - 16, tick, tick, 0, 225 if tick else 90)
        place = left + 197 + round(200 * tick / reach)
        pictures.draw_text(picture, place, height - 12, f"{tick:+.3f}")
    title = "dots: seeds; bars: mean and 95 % t interval; right of 0: more"
    pictures.draw_text(picture, 6, 4, title)
    for i, ((_, method), (dots, (mean, low, high))) in enumerate(zip(differences, rows)):
        y, colour = 28 + 16 * i, pictures.CURVES[methods.index(method) % len(pictures.CURVES)]
        pictures.draw_text(picture, 6, y - 4, names[i])
        mark(y, y + 2, low, high, 0, colour)
        mark(y - 2, y + 4, mean, mean, 1, colour)
        for value in dots:
            mark(y - 5, y - 2, value, value, 1, 120)
    pictures.write_png(path, picture)
