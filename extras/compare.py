"""compare: methods side by side on the same encoder, data, budget and evaluation.

A comparison is a protocol, a TOML file of docs/protocols or your own: which methods, on which
worlds, which of their settings are tuned. It goes through three phases:

    tuning   every point of a method's grid on worlds that no reported number is measured on
    noise    two methods again and again on one of those worlds, with another initialisation and
             order: how far apart are two runs that differ in nothing that matters? And how many
             worlds does that ask for?
    final    every method, with what was best for it, on every world of the table

The unit of all statistics is a world. Differences are paired by world; an interval is of one
protocol; another comparison of the same methods stands beside it, never in one sample with it.
In `out`: compare.md, compare.csv (every run), compare.png, and the runs; finished runs are kept,
stopped ones resume. With a recipe of real data a "world" is a seed, that is an initialisation and
an order of the data, and the tuning is done on a fifth of the training videos that is held out.
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from extras import charts, settings
from extras import recipe as recipes
from extras.settings import setting

HERE = Path(__file__).resolve().parent.parent
FOLDER = HERE / "docs" / "protocols"

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; beyond, the last one: a little too wide.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Protocols
# ------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """A row of the tables."""

    name: str
    settings: dict = setting({}, "of the recipe")
    grid: dict = setting({}, "setting: list of values; every combination is tried in the tuning")
    like: str = setting("", "a method above, whose tuned settings this one starts from")


@dataclass
class Case:
    """A point on the question's axis: every method is run in each."""

    name: str = ""
    x: float = setting(0.0, "its place on the figure's axis")
    world: dict = setting({}, "sizes of the generated world")
    settings: dict = setting({}, "of the recipe, for all methods")
    tuned_as: str = setting("", "a case above, whose tuned settings are taken")


@dataclass
class Protocol:
    """A comparison."""

    name: str
    question: str
    recipe: str = setting("evidence", "a recipe's name or file")
    first_world: int = setting(10, "seed of the first world of the table", least=0)
    worlds: int = setting(8, "of the table", least=1)
    first_tuning_world: int = setting(1010, "seed of the first world of the tuning", least=0)
    tuning_worlds: int = setting(3, "per point of a grid", least=1)
    repeats: int = setting(4, "runs of two methods on one world, for the noise", least=0)
    reference: str = setting("", "the method that differences are taken to; '': the first")
    figure: str = setting("rows", "rows: differences | lines: differences along x | kept: upstream")
    axis: str = setting("", "what x is")
    method: list = setting([], "the rows of the tables")
    case: list = setting([], "the points of the axis; []: one")


def read_protocol(source: str) -> Protocol:
    """A file, or the name of one in docs/protocols. ValueError with all that is wrong with it."""
    path = Path(source)
    if not path.is_file():
        path = FOLDER / f"{source}.toml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise ValueError(f"compare: no protocol {source}; expected a file or one of {names}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    table = {"name": path.stem, "question": ""} | table
    problems = list(settings.misfits(Protocol, table).values())
    parts = {"method": [], "case": []}
    for key, kind in (("method", Method), ("case", Case)):
        for number, part in enumerate(table.get(key, []), 1):
            wrong = settings.misfits(kind, part)
            if not part.get("name"):
                wrong["name"] = "name is missing"
            problems += [f"{key} {part.get('name', number)}: {each}" for each in wrong.values()]
            if not wrong:
                parts[key].append(kind(**part))
    if not problems:
        protocol = Protocol(**table | parts)
        protocol.case = protocol.case or [Case()]
        if protocol.method:
            protocol.reference = protocol.reference or protocol.method[0].name
        problems = check(protocol)
    if problems:
        raise ValueError(f"protocol {path}:\n  " + "\n  ".join(problems))
    return protocol


def check(protocol: Protocol) -> list[str]:
    """What is wrong across the keys."""
    problems = []
    names = [method.name for method in protocol.method]
    if protocol.reference not in names:
        problems.append(f"reference = {protocol.reference!r} is not one of {', '.join(names)}")
    if protocol.figure not in FIGURES:
        problems.append(f"figure = {protocol.figure!r} is not one of {', '.join(FIGURES)}")
    for part in (protocol.method, protocol.case):
        above = []
        for each in part:
            if each.name in above:
                problems.append(f"{each.name!r} stands there twice")
            other = each.like if isinstance(each, Method) else each.tuned_as
            if other and other not in above:
                problems.append(f"{each.name!r}: {other!r} does not stand above it")
            above.append(each.name)
    for method in protocol.method:
        for key, values in method.grid.items():
            if type(values) is not list or not values:
                problems.append(f"{method.name!r}: grid.{key} = {values!r} is no list of values")
    tuning = range(protocol.first_tuning_world, protocol.first_tuning_world + 1000)
    final = range(protocol.first_world, protocol.first_world + protocol.worlds)
    if set(final) & set(tuning):
        problems.append("worlds of the table among those of the tuning")
    return problems


def grid_points(method: Method) -> list[dict]:
    """Every combination of the grid's values."""
    keys = list(method.grid)
    return [
        dict(zip(keys, values, strict=True)) for values in itertools.product(*method.grid.values())
    ]


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training of one method, in a process of its own."""

    phase: str  # tuning | noise | final
    case: str
    method: str
    tuned: dict  # the point of the grid
    seed: int
    out: Path
    overrides: dict[str, str]  # of the recipe

    def metrics(self) -> dict | None:
        """None: not finished; or it diverged, which is for good."""
        path = self.out / "metrics.json"
        return json.loads(path.read_text()) if path.exists() else None


class Comparison:
    """Plans and starts the runs of a protocol, and reads what they left."""

    def __init__(self, protocol: Protocol, overrides: dict, jobs: int, read_recipe):
        self.protocol, self.overrides, self.read_recipe = protocol, dict(overrides), read_recipe
        self.out = Path(self.overrides.pop("out", f"runs/{protocol.name}")).resolve()
        self.recipe = read_recipe(protocol.recipe, self.overrides)
        if not any(task.kind == "box" for task in self.recipe.task):
            raise ValueError(f"compare: {protocol.recipe} has no box task, whose mAP decides")
        self.jobs = jobs
        if not jobs:
            gpu = self.recipe.device != "cpu" and torch.cuda.is_available()
            self.jobs = 1 if gpu else len(os.sched_getaffinity(0))
        self.commit = current_commit()
        self.held_out = None
        self.boxes = {}  # (training boxes' file): boxes by class

    def all_phases(self, tune_only: bool = False) -> list[dict]:
        """-> a row for every run."""
        rows = self.launch(self.plan_tuning())
        chosen = choose(self.protocol, rows)
        rows += self.launch(self.plan_noise(chosen))
        if not tune_only:
            final = self.launch(self.plan_final(chosen))
            diverged = [row["folder"] for row in final if row["score"] == -math.inf]
            if diverged:
                raise ValueError(f"compare: no table, {', '.join(diverged)} diverged")
            rows += final
        return rows

    def plan_tuning(self) -> list[Run]:
        runs = []
        first = self.protocol.first_tuning_world
        for case in self.protocol.case:
            for method in self.protocol.method:
                points = grid_points(method)
                if case.tuned_as or len(points) == 1:
                    continue
                for point in points:
                    for seed in range(first, first + self.protocol.tuning_worlds):
                        runs.append(self.make_run("tuning", case, method, point, seed))
        return runs

    def plan_noise(self, chosen: dict) -> list[Run]:
        """The reference and the first other method, in the first case."""
        case, world = self.protocol.case[0], self.protocol.first_tuning_world
        others = [m for m in self.protocol.method if m.name != self.protocol.reference]
        pair = [m for m in self.protocol.method if m.name == self.protocol.reference] + others[:1]
        runs = []
        for method in pair:
            for repeat in range(self.protocol.repeats):
                tuned = chosen[case.name, method.name]
                seed = world + 1000 + repeat
                runs.append(self.make_run("noise", case, method, tuned, seed, world))
        return runs

    def plan_final(self, chosen: dict) -> list[Run]:
        runs = []
        first = self.protocol.first_world
        for seed in range(first, first + self.protocol.worlds):
            for case in self.protocol.case:
                for method in self.protocol.method:
                    tuned = chosen[case.name, method.name]
                    runs.append(self.make_run("final", case, method, tuned, seed))
        return runs

    def make_run(
        self, phase: str, case: Case, method: Method, tuned: dict, seed: int, world: int = -1
    ) -> Run:
        """world: the seed of the generated world, if it is not the run's own."""
        folder = self.out / phase / slug(case.name) / slug(method.name)
        if phase == "tuning":
            folder = folder / slug(spell(tuned))
        folder = folder / f"seed{seed}"
        chosen = case.settings | method.settings | tuned
        overrides = dict(self.overrides)
        for key, value in chosen.items():
            overrides[key] = value if isinstance(value, str) else settings.show(value)
        if self.recipe.world:
            overrides |= self.place_world(case, seed if world < 0 else world)
        elif phase != "final":
            overrides |= self.hold_out()
        overrides |= {"seed": str(seed), "threads": "1", "out": str(folder)}
        return Run(phase, case.name, method.name, tuned, seed, folder, overrides)

    def place_world(self, case: Case, seed: int) -> dict[str, str]:
        """Make the recipe's world with another seed -> the overrides that train on it."""
        from extras.world import make_world

        sizes = self.recipe.world | case.world | {"seed": seed}
        name = f"seed{seed}"
        if case.world:
            name += "-" + slug(spell(case.world))
        folder = self.out / "worlds" / name
        make_world(folder, **sizes)
        return {"root": str(folder), "world": settings.show(sizes)}

    def hold_out(self) -> dict[str, str]:
        """Set a fifth of each box task's training videos aside -> the overrides that validate on
        them, with the person boxes of training. Upstream tasks stay: downstream mAP decides."""
        if self.held_out is not None:
            return self.held_out
        self.held_out = {}
        folder = self.out / "tuning"
        folder.mkdir(parents=True, exist_ok=True)
        for task in self.recipe.task:
            if task.kind != "box":
                continue
            parts = {"train": [], "val": []}
            for row in (Path(self.recipe.root) / task.train).read_text().splitlines(keepends=True):
                video = row.split(",")[0]
                parts["train" if zlib.crc32(video.encode()) % 5 else "val"].append(row)
            for split, rows in parts.items():
                path = folder / f"{task.name}_{split}.csv"
                path.write_text("".join(rows))
                self.held_out[f"task.{task.name}.{split}"] = str(path)
            self.held_out[f"task.{task.name}.val_videos"] = task.videos
            self.held_out[f"task.{task.name}.val_boxes"] = task.train_boxes
            self.held_out[f"task.{task.name}.exclude_val"] = task.exclude_train
        return self.held_out

    def launch(self, runs: list[Run]) -> list[dict]:
        """Run what is not finished, `jobs` processes at a time -> a row for each run.

        ValueError as soon as one fails; but a run that diverges only stays without metrics: in a
        grid that is an answer.
        """
        for run in runs:
            self.claim(run)
        waiting = [run for run in runs if run.metrics() is None and not has_diverged(run)]
        total, began, running = len(waiting), time.time(), {}
        if runs:
            done = len(runs) - total
            print(
                f"{runs[0].phase}: {len(runs)} runs, {done} done, {self.jobs} at a time", flush=True
            )
        with signals_as_interrupts():
            try:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        run = waiting.pop(0)
                        running[self.start(run)] = run
                    time.sleep(0.1)
                    for process in list(running):
                        if process.poll() is None:
                            continue
                        run = running.pop(process)
                        score = outcome(run, process.returncode)
                        done = total - len(waiting) - len(running)
                        left = (time.time() - began) / done * (total - done) / 60
                        where = run.out.relative_to(self.out)
                        print(
                            f"{done}/{total} {where}: mAP {score:.4f}, {left:.0f} min left",
                            flush=True,
                        )
            except KeyboardInterrupt:
                raise SystemExit("compare: stopped; the same command goes on from here") from None
            finally:  # SIGTERM makes a run write its checkpoint and stop
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait()
        return [self.row(run) for run in runs]

    def claim(self, run: Run) -> None:
        """Note what the folder is for. ValueError if it was for something else."""
        words = {"recipe": self.protocol.recipe, "commit": self.commit} | run.overrides
        note = run.out / "compare.json"
        if not note.exists():
            run.out.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(words, indent=1))
            return
        there = json.loads(note.read_text())
        for key in sorted(words.keys() | there.keys()):
            if words.get(key) != there.get(key):
                raise ValueError(
                    f"{run.out} was run with {key} = {there.get(key)}, not {words.get(key)}; "
                    "take another --out"
                )

    def start(self, run: Run) -> subprocess.Popen:
        command = [sys.executable, str(HERE / "cofinetune.py"), "--recipe", self.protocol.recipe]
        command += [f"--{key}={value}" for key, value in run.overrides.items()]
        with open(run.out / "output.txt", "a") as output:
            return subprocess.Popen(  # in its own session, which Ctrl-C does not reach
                command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def row(self, run: Run) -> dict:
        """What the tables show of a run; nan for a group without classes and for a task that the
        run never trained."""
        row = {
            "phase": run.phase,
            "case": run.case,
            "method": run.method,
            "tuned": spell(run.tuned),
            "seed": run.seed,
            "commit": self.commit,
            "folder": str(run.out.relative_to(self.out)),
            "score": -math.inf,
        }
        metrics = run.metrics()
        if metrics is None:
            return row
        row["score"] = metrics["score"]
        recipe = self.read_recipe(str(run.out / "recipe.toml"), {})
        trained, costs = read_logs(run.out, {task.name: task.batch for task in recipe.task})
        for task in recipe.task:
            measured = metrics["task"].get(task.name)
            if measured is None:
                continue
            if task.kind == "clip":
                scores = {"top-1": measured["top1"]}
            else:
                scores = {f"mAP ({measured['protocol']})": measured["mAP"]}
                scores |= self.by_kind(recipe, task, measured["per_class"])
            for name, value in scores.items():
                known = value is not None and task.name in trained
                row[f"{task.name} {name}"] = value if known else math.nan
        return row | costs

    def by_kind(self, recipe, task, per_class: list[dict]) -> dict[str, float]:
        """Mean AP of head, mid and tail; of each kind of class; of each kind in each of them."""
        kinds = {}
        if recipe.world:
            from extras.world import KINDS as kinds
        source = (recipe.root, task.train)
        if source not in self.boxes:
            self.boxes[source] = data.open_task(task, recipe.root, "train").class_counts()
        values = {}
        for one in per_class:
            if one["ap"] is None or not math.isfinite(one["ap"]):
                continue
            boxes = self.boxes[source].get(one["id"], 0)
            group = "mid"
            if boxes > recipe.head_above:
                group = "head"
            elif boxes < recipe.tail_below:
                group = "tail"
            values.setdefault(group, []).append(one["ap"])
            if one["name"] in kinds:
                kind = kinds[one["name"]]
                values.setdefault(kind, []).append(one["ap"])
                values.setdefault(f"{kind} {group}", []).append(one["ap"])
        return {name: float(np.mean(aps)) for name, aps in values.items()}


def current_commit() -> str:
    """Of this code; "" where there is no git."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def slug(text: str) -> str:
    """As the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-") or "all"


def spell(table: dict) -> str:
    return ", ".join(f"{key} = {settings.show(value)}" for key, value in table.items())


def has_diverged(run: Run) -> bool:
    output = run.out / "output.txt"
    return output.exists() and "non-finite" in last_words(output)


def last_words(output: Path) -> str:
    return " | ".join(output.read_text().split("\n")[-4:-1])


def outcome(run: Run, status: int) -> float:
    """The score of a run that ended, -inf of one that diverged. ValueError if it failed."""
    metrics = run.metrics()
    if metrics is not None:
        return metrics["score"]
    if has_diverged(run):
        return -math.inf
    raise ValueError(f"{run.out} ended with status {status}: {last_words(run.out / 'output.txt')}")


class signals_as_interrupts:
    """SIGTERM and SIGHUP, like Ctrl-C, must not leave runs behind in sessions of their own."""

    def __enter__(self):
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGHUP):
            self.before[number] = signal.signal(number, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def read_logs(folder: Path, batch: dict[str, int]) -> tuple[set[str], dict[str, float]]:
    """The tasks that a run trained, in whatever stage, and what that took."""
    trained, clips, updates, seconds = set(), 0, 0, 0.0
    for path in folder.rglob("log.jsonl"):
        times = []
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if "loss" not in record:
                continue
            trained |= record["loss"].keys()
            clips += sum(batch[task] for task in record["loss"])
            updates += 1
            times.append(record["time"]["unix"])
        if times:
            seconds += times[-1] - times[0]
    return trained, {"clips seen": clips, "updates": updates, "minutes": seconds / 60}


# ------------------------------------------------------------------------------------------------
# Statistics, all of them of rows
# ------------------------------------------------------------------------------------------------


def choose(protocol: Protocol, rows: list[dict]) -> dict[tuple[str, str], dict]:
    """(case, method) -> the point of its grid with the best mean score over the tuning worlds."""
    chosen = {}
    for case in protocol.case:
        for method in protocol.method:
            key = (case.name, method.name)
            if case.tuned_as:
                chosen[key] = chosen[case.tuned_as, method.name]
                continue
            points = grid_points(method)
            scores = [mean_score(rows, *key, point) for point in points]
            best = points[int(np.argmax(scores))] if len(points) > 1 else points[0]
            if method.like:
                best = chosen[case.name, method.like] | method.settings | best
            chosen[key] = best
    return chosen


def mean_score(rows: list[dict], case: str, method: str, point: dict) -> float:
    """Over the tuning worlds; nan if the point was not tried."""
    wanted = ("tuning", case, method, spell(point))
    scores = []
    for row in rows:
        if (row["phase"], row["case"], row["method"], row["tuned"]) == wanted:
            scores.append(float(row["score"]))
    return float(np.mean(scores)) if scores else math.nan


def series(rows: list[dict], case: str, method: str, column: str, phase: str = "final"):
    """(values by world, in the order of the seeds)."""
    values = {}
    for row in rows:
        if (row["phase"], row["case"], row["method"]) == (phase, case, method):
            values[int(row["seed"])] = float(row.get(column) or "nan")
    return np.array([values[seed] for seed in sorted(values)])


def paired(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of the differences by world, and its 95 % t interval (nan for a single world)."""
    mean, count, half = differences.mean(), len(differences), math.nan
    if count > 1:
        half = t_quantile(count) * differences.std(ddof=1) / math.sqrt(count)
    return mean, mean - half, mean + half


def t_quantile(worlds: int) -> float:
    return T975[min(worlds - 1, len(T975)) - 1]


def noise_of_a_run(protocol: Protocol, rows: list[dict]) -> float:
    """Standard deviation of the score of runs that differ in initialisation and order only; nan
    without such runs. Pooled over the methods that were repeated."""
    squares, freedom = 0.0, 0
    for method in protocol.method:
        scores = series(rows, protocol.case[0].name, method.name, "score", "noise")
        if len(scores) > 1:
            squares += ((scores - scores.mean()) ** 2).sum()
            freedom += len(scores) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def found_four_times_in_five(deviation: float, worlds: int) -> float:
    """The true difference that the interval of so many worlds excludes zero for in 80 % of all
    comparisons, by drawing 20,000 of them."""
    draws = np.random.default_rng(0).standard_normal((20_000, worlds)) * deviation
    half = t_quantile(worlds) * draws.std(1, ddof=1) / math.sqrt(worlds)
    return float(np.quantile(half - draws.mean(1), 0.8))


# ------------------------------------------------------------------------------------------------
# Tables and the figure
# ------------------------------------------------------------------------------------------------


def write_report(protocol: Protocol, rows: list[dict], out: Path) -> None:
    """compare.md, which is printed too, compare.csv and compare.png."""
    write_rows(out / "compare.csv", rows)
    text = [f"# {protocol.name}\n\n{protocol.question}\n"]
    commits = sorted({str(row["commit"]) for row in rows})
    text.append(
        f"Recipe {protocol.recipe}, commit {', '.join(commits) or 'unknown'}. The unit is a world: "
        "generated videos, an initialisation and an order of the clips.\n"
    )
    text += [tuning_table(protocol, rows), noise_table(protocol, rows)]
    finals = [row for row in rows if row["phase"] == "final"]
    for case in protocol.case:
        if finals:
            text.append(f"## {case.name or 'Results'}\n")
            text += [score_table(protocol, finals, case), difference_table(protocol, finals, case)]
            text += kind_tables(protocol, finals, case)
    written = "compare.md, compare.csv"
    if finals:
        FIGURES[protocol.figure](protocol, finals, out / "compare.png")
        written += ", compare.png"
    text = "\n".join(part for part in text if part)
    (out / "compare.md").write_text(text)
    print(text + f"\nin {out}: {written}")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tuning_table(protocol: Protocol, rows: list[dict]) -> str:
    chosen, lines = choose(protocol, rows), []
    for case in protocol.case:
        for method in protocol.method:
            tried = []
            for point in grid_points(method):
                score = mean_score(rows, case.name, method.name, point)
                if math.isfinite(score) or score == -math.inf:
                    tried.append(f"{spell(point)}: {score:.4f}")
            taken = chosen[case.name, method.name]
            edge = " (edge)" if tried and at_an_edge(method, taken) else ""
            lines.append([case.name, method.name, "; ".join(tried), spell(taken) + edge])
    return (
        f"Tuned on worlds {protocol.first_tuning_world} to "
        f"{protocol.first_tuning_world + protocol.tuning_worlds - 1}, mean mAP. At an edge of its "
        "grid, a better value may lie outside.\n\n"
        + table(["case", "method", "tried", "taken"], lines)
    )


def at_an_edge(method: Method, taken: dict) -> bool:
    for key, values in method.grid.items():
        if len(values) > 1 and taken[key] in (min(values), max(values)):
            return True
    return False


def noise_table(protocol: Protocol, rows: list[dict]) -> str:
    """What a difference of two methods can be known to, before the runs of the table."""
    noise = noise_of_a_run(protocol, rows)
    if not math.isfinite(noise):
        return ""
    lines = []
    for worlds in sorted({5, 6, 8, 10, 12, 16, 24, protocol.worlds} - {1}):
        half = t_quantile(worlds) * noise * math.sqrt(2 / worlds)
        found = found_four_times_in_five(noise * math.sqrt(2), worlds)
        mark = " (here)" if worlds == protocol.worlds else ""
        lines.append([f"{worlds}{mark}", f"± {half:.4f}", f"{found:.4f}"])
    return (
        f"Noise of a run: the same world with another initialisation and order, {noise:.4f} (one "
        f"standard deviation); of a difference of two runs {noise * math.sqrt(2):.4f}. What that "
        "allows, if worlds differed in nothing else:\n\n"
        + table(["worlds", "95 % interval of a difference", "found in 4 of 5 comparisons"], lines)
    )


def score_table(protocol: Protocol, rows: list[dict], case: Case) -> str:
    columns = [column for column in main_columns(rows)]
    lines = []
    for method in protocol.method:
        cells = [method.name]
        for column in columns:
            values = series(rows, case.name, method.name, column)
            if column in COSTS:
                cells.append(f"{values.mean():{COSTS[column]}}")
            else:
                cells.append(mean_and_spread(values))
        lines.append(cells)
    return "Mean ± standard deviation over worlds.\n\n" + table(["method", *columns], lines)


COSTS = {"clips seen": ",.0f", "updates": ",.0f", "minutes": ".1f"}  # columns that are no scores
NOT_MEASURED = {"phase", "case", "method", "tuned", "seed", "commit", "folder", "score"}
GROUPS = ("head", "mid", "tail")


def main_columns(rows: list[dict]) -> list[str]:
    """Scores of tasks and of frequency groups, and costs; not those of kinds of classes."""
    columns = []
    for row in rows:
        for column in row:
            known = column.split()[1:2] in (["mAP"], ["top-1"], *([group] for group in GROUPS))
            if column not in columns and (column in COSTS or known):
                columns.append(column)
    return sorted(columns, key=lambda column: column in COSTS)


def mean_and_spread(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return "untrained"
    spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def difference(protocol: Protocol, rows: list[dict], case: Case, method: Method, column: str):
    """By world, to the reference, where both have a value."""
    ours = series(rows, case.name, method.name, column)
    theirs = series(rows, case.name, protocol.reference, column)
    differences = ours - theirs
    return differences[np.isfinite(differences)]


def interval(differences: np.ndarray) -> str:
    if len(differences) == 0:
        return ""
    mean, low, high = paired(differences)
    if math.isnan(low):
        return f"{mean:+.4f}"
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def difference_table(protocol: Protocol, rows: list[dict], case: Case) -> str:
    columns = [column for column in main_columns(rows) if column not in COSTS]
    lines = []
    for method in protocol.method:
        if method.name == protocol.reference:
            continue
        cells = [method.name]
        for column in columns:
            differences = difference(protocol, rows, case, method, column)
            ahead = ""
            if " mAP" in column and len(differences):
                ahead = f", ahead in {(differences > 0).sum()} of {len(differences)}"
            cells.append(interval(differences) + ahead)
        lines.append(cells)
    if not lines:
        return ""
    return (
        f"Difference to {protocol.reference}, paired by world: mean and 95 % t interval.\n\n"
        + table(["method", *columns], lines)
    )


def kind_tables(protocol: Protocol, rows: list[dict], case: Case) -> list[str]:
    """Difference to the reference by kind of class and number of training boxes."""
    kinds = kinds_of(rows)
    tables = []
    for method in protocol.method:
        if method.name == protocol.reference or not kinds:
            continue
        lines = []
        for task, kind in kinds:
            cells = [kind]
            for column in (f"{task} {kind}", *(f"{task} {kind} {group}" for group in GROUPS)):
                cells.append(interval(difference(protocol, rows, case, method, column)))
            lines.append(cells)
        title = f"{method.name} less {protocol.reference}, by kind of class and training boxes:\n\n"
        tables.append(title + table(["kind", "all", *GROUPS], lines))
    return tables


def kinds_of(rows: list[dict]) -> list[tuple[str, str]]:
    """(task, kind) of the columns `TASK KIND`."""
    main, kinds = main_columns(rows), []
    for row in rows:
        for column in row:
            if column in NOT_MEASURED or column in main or column.split()[-1] in GROUPS:
                continue
            task, _, kind = column.partition(" ")
            if (task, kind) not in kinds:
                kinds.append((task, kind))
    return kinds


def score_column(rows: list[dict]) -> str:
    """The first box task's mAP."""
    return next(column for column in main_columns(rows) if " mAP" in column)


def draw_rows(protocol: Protocol, rows: list[dict], path: Path) -> None:
    """A row for each case and method: a dot for each world, a bar for the interval."""
    lines = []
    for case in protocol.case:
        for method in protocol.method:
            if method.name != protocol.reference:
                values = difference(protocol, rows, case, method, score_column(rows))
                label = f"{case.name} {method.name}".strip()
                lines.append((label, values, paired(values)))
    title = f"{score_column(rows)} less {protocol.reference}"
    charts.write(path, charts.draw_rows(lines, title))


def draw_kinds(protocol: Protocol, rows: list[dict], path: Path) -> None:
    """A row for each case, method and kind of class."""
    lines = []
    for case in protocol.case:
        for method in protocol.method:
            if method.name == protocol.reference:
                continue
            for task, kind in kinds_of(rows):
                values = difference(protocol, rows, case, method, f"{task} {kind}")
                label = f"{case.name} {method.name}: {kind}".strip()
                lines.append((label, values, paired(values)))
    title = f"AP by kind of class less {protocol.reference}"
    charts.write(path, charts.draw_rows(lines, title))


def draw_lines(protocol: Protocol, rows: list[dict], path: Path) -> None:
    """The difference to the reference along x, a line for each method."""
    lines = {}
    for method in protocol.method:
        if method.name == protocol.reference:
            continue
        points = []
        for case in protocol.case:
            values = difference(protocol, rows, case, method, score_column(rows))
            points.append(charts.Point(case.x, *paired(values)))
        lines[method.name] = points
    title = f"{score_column(rows)} less {protocol.reference}"
    charts.write(path, charts.draw_points(lines, title, protocol.axis, joined=True))


def draw_kept(protocol: Protocol, rows: list[dict], path: Path) -> None:
    """Downstream mAP above what is left of the upstream accuracy, a point for each method."""
    tops = [column for column in main_columns(rows) if column.endswith(" top-1")]
    points = {}
    for case in protocol.case:
        for method in protocol.method:
            kept = [series(rows, case.name, method.name, column) for column in tops]
            kept = np.mean(kept, axis=0)
            scores = series(rows, case.name, method.name, score_column(rows))
            if np.isfinite(kept).all():
                label = f"{case.name} {method.name}".strip()
                points[label] = [charts.Point(kept.mean(), *paired(scores), *paired(kept)[1:])]
    title = score_column(rows)
    charts.write(path, charts.draw_points(points, title, "mean upstream top-1", joined=False))


FIGURES = {"rows": draw_rows, "kinds": draw_kinds, "lines": draw_lines, "kept": draw_kept}


def write_rows(path: Path, rows: list[dict]) -> None:
    columns = []
    for row in rows:
        columns += [column for column in row if column not in columns]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
    add("protocol", nargs="?", default="methods", help=f"a file or one of {names} (methods)")
    add("--recipe", help="another recipe than the protocol names: a file or a name")
    add("--worlds", type=int, help="of the table, from 1 (default: as the protocol says)")
    add("--jobs", type=int, default=0, help="runs at a time (0: one per core, one on a GPU)")
    add("--tune-only", action="store_true", help="stop before the runs of the table")
    add("--csv", help="no runs: write tables and figure again from a compare.csv")


def run(options: argparse.Namespace, overrides: dict[str, str], method) -> None:
    protocol = read_protocol(options.protocol)
    if options.recipe:
        protocol.recipe = options.recipe
    if options.worlds is not None:
        protocol.worlds = options.worlds
    if options.jobs < 0 or protocol.worlds < 1:
        raise ValueError(
            f"compare: --jobs {options.jobs}, --worlds {protocol.worlds}; expected 0 or more jobs, "
            "one world or more"
        )
    if options.csv:
        write_report(protocol, read_rows(Path(options.csv)), Path(options.csv).parent)
        return

    def read_recipe(source: str, changes: dict):
        return recipes.read(method.Recipe, source, changes)

    comparison = Comparison(protocol, overrides, options.jobs, read_recipe)
    comparison.out.mkdir(parents=True, exist_ok=True)
    rows = comparison.all_phases(options.tune_only)
    write_report(protocol, rows, comparison.out)
