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
In `out`: compare.md, compare.csv (every run), compare.svg, and the runs; finished runs are kept,
stopped ones resume. With a recipe of real data a "world" is a seed, that is an initialisation and
an order of the data, and the tuning is done on a fifth of the training videos that is held out.
"""

import argparse
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
from extras import formats, settings, tables
from extras import recipe as recipes
from extras.settings import setting

HERE = Path(__file__).resolve().parent.parent
FOLDER = HERE / "docs" / "protocols"


# ------------------------------------------------------------------------------------------------
# Protocols
# ------------------------------------------------------------------------------------------------


def core_count() -> int:
    """Cores that this process may use; where the system does not say (macOS), all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class Method:
    """A row of the tables."""

    name: str
    settings: dict = setting({}, "of the recipe")
    grid: dict = setting({}, "setting: values in order; every combination is tried in the tuning")
    like: str = setting("", "a method above, whose tuned settings this one starts from")
    drawn: bool = setting(True, "in the figure too")


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
    figure: str = setting(
        "rows", "rows or kinds: differences | lines: those along x | kept: upstream"
    )
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
    if protocol.figure not in tables.FIGURES:
        problems.append(f"figure = {protocol.figure!r} is not one of {', '.join(tables.FIGURES)}")
    for part in (protocol.method, protocol.case):
        above = []
        for each in part:
            if each.name in above:
                problems.append(f"{each.name!r} stands there twice")
            other = each.like if isinstance(each, Method) else each.tuned_as
            if other and other not in above:
                problems.append(f"{each.name!r}: {other!r} does not stand above it")
            above.append(each.name)
    late = [method.name for method in protocol.method if method.like and method.grid]
    for method in protocol.method:
        if method.like in late:  # what it starts from would be known after its own tuning
            problems.append(f"{method.name!r}: {method.like!r} has a grid and is like another")
        for key, values in method.grid.items():
            if type(values) is not list or not values:
                problems.append(f"{method.name!r}: grid.{key} = {values!r} is no list of values")
    tuning = range(protocol.first_tuning_world, protocol.first_tuning_world + 1000)
    final = range(protocol.first_world, protocol.first_world + protocol.worlds)
    if set(final) & set(tuning):
        problems.append("worlds of the table among those of the tuning")
    return problems


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
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


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
            self.jobs = 1 if gpu else core_count()
        self.commit = current_commit()
        self.held_out, self.held_out_parts = None, []  # of real data, for the tuning
        self.worlds = set()  # that are there
        self.boxes = {}  # (folder, training boxes' file): boxes by class

    def all_phases(self, tune_only: bool = False) -> list[dict]:
        """-> a row for every run."""
        self.check_settings()
        rows = self.launch(self.plan_tuning({}))
        chosen = tables.choose(self.protocol, rows)
        rows += self.launch(self.plan_tuning(chosen))
        chosen = tables.choose(self.protocol, rows)
        rows += self.launch(self.plan_noise(chosen))
        if not tune_only:
            final = self.launch(self.plan_final(chosen))
            diverged = [row["folder"] for row in final if row["score"] == -math.inf]
            if diverged:
                raise ValueError(f"compare: no table, {', '.join(diverged)} diverged")
            rows += final
        return rows

    def check_settings(self) -> None:
        """ValueError, before the first run, for settings that a later one would be refused for."""
        from extras.world import World

        chosen = tables.choose(self.protocol, [])
        for case in self.protocol.case:
            if wrong := settings.misfits(World, case.world):
                raise ValueError(f"compare: {case.name}: world: {'; '.join(wrong.values())}")
            for method in self.protocol.method:
                for point in tables.points_of(method, case.name, chosen):
                    changes = self.settings_of(case, method, point)
                    try:
                        self.read_recipe(self.protocol.recipe, changes)
                    except ValueError as error:
                        where = f"{case.name} {method.name}".strip()
                        raise ValueError(f"compare: {where}: {error}") from None

    def plan_tuning(self, chosen: dict) -> list[Run]:
        """chosen: {}, for the methods by themselves; then, for those that start from another."""
        runs = []
        first = self.protocol.first_tuning_world
        for case in self.protocol.case:
            for method in self.protocol.method:
                if case.tuned_as or bool(method.like) != bool(chosen):
                    continue
                points = tables.points_of(method, case.name, chosen)
                if len(points) == 1:
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
            tuned = chosen[case.name, method.name]
            for seed in range(world + 1000, world + 1000 + self.protocol.repeats):
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
            folder = folder / slug(tables.spell(tuned))
        folder = folder / f"seed{seed}"
        overrides = self.settings_of(case, method, tuned)
        if self.recipe.world:
            overrides |= self.place_world(case, seed if world < 0 else world)
        elif phase != "final":
            overrides |= self.hold_out()
        overrides |= {"seed": str(seed), "threads": "1", "out": str(folder)}
        return Run(phase, case.name, method.name, tuned, seed, folder, overrides)

    def settings_of(self, case: Case, method: Method, tuned: dict) -> dict[str, str]:
        """What was typed, then the case's, the method's and the grid's, as overrides."""
        overrides = dict(self.overrides)
        for key, value in (case.settings | method.settings | tuned).items():
            overrides[key] = value if isinstance(value, str) else settings.show(value)
        return overrides

    def place_world(self, case: Case, seed: int) -> dict[str, str]:
        """Make the recipe's world with another seed -> the overrides that train on it."""
        from extras.world import make_world

        sizes = self.recipe.world | case.world | {"seed": seed}
        name = f"seed{seed}"
        if case.world:
            name += "-" + slug(tables.spell(case.world))
        folder = self.out / "worlds" / name
        if folder not in self.worlds:
            make_world(folder, **sizes)
            self.worlds.add(folder)
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
            keyframes = set()  # that are held out
            for _, row in data.read_lines(Path(self.recipe.root) / task.train):
                keyframe = tuple(row.split(",")[:2])
                part = "train" if zlib.crc32(keyframe[0].encode()) % 5 else "val"
                parts[part].append(f"{row}\n")
                if part == "val":
                    keyframes.add(keyframe)
            videos = {keyframe[0] for keyframe in keyframes}
            self.held_out_parts.append(
                f"{task.name}: {len(videos)} videos, {len(keyframes)} keyframes"
            )
            for split, rows in parts.items():
                path = folder / f"{task.name}_{split}.csv"
                path.write_text("".join(rows), encoding="utf-8")
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
        """Note what the folder is for. ValueError if something else was trained in it."""
        words = {"recipe": self.protocol.recipe, "commit": self.commit} | run.overrides
        note = run.out / "compare.json"
        began = any(run.out.rglob("log.jsonl")) or any(run.out.rglob("last.pt"))
        if not note.exists() or not began:
            run.out.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(words, indent=1), encoding="utf-8")
            return
        there = json.loads(note.read_text(encoding="utf-8"))
        for key in sorted(words.keys() | there.keys()):
            if words.get(key) != there.get(key):
                raise ValueError(
                    f"{run.out} was run with {key} = {there.get(key)}, not {words.get(key)}; "
                    "take another --out"
                )

    def start(self, run: Run) -> subprocess.Popen:
        command = [sys.executable, str(HERE / "cofinetune.py"), "--recipe", self.protocol.recipe]
        command += [f"--{key}={value}" for key, value in run.overrides.items()]
        with open(run.out / "output.txt", "a", encoding="utf-8") as output:
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
            "tuned": tables.spell(run.tuned),
            "seed": run.seed,
            "commit": self.commit,
            "folder": str(run.out.relative_to(self.out)),
            "score": -math.inf,
        }
        if not self.recipe.world:
            self.hold_out()
            row["held_out"] = "; ".join(self.held_out_parts)
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
            from extras.world import KINDS

            for kind, names in KINDS.items():
                kinds |= dict.fromkeys(names, kind)
        source = (recipe.root, task.train)
        if source not in self.boxes:
            dataset = data.open_task(task, recipe.root, "train", formats)
            self.boxes[source] = dataset.class_counts()
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
    return re.sub(r"[^\w.=+-]+", "-", text.replace(" = ", "=")).strip("-") or "all"


def has_diverged(run: Run) -> bool:
    output = run.out / "output.txt"
    return output.exists() and "non-finite" in last_words(output)


def last_words(output: Path) -> str:
    return " | ".join(output.read_text(encoding="utf-8").split("\n")[-4:-1])


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
        for line in path.read_text(encoding="utf-8").splitlines():
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
# The command
# ------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
    add("protocol", nargs="?", default="methods", help=f"a file or one of {names} (methods)")
    add("--recipe", help="another recipe than the protocol names: a file or a name")
    add("--worlds", type=int, help="how many, from 1 (default: as the protocol says)")
    add("--jobs", type=int, default=0, help="runs at a time (0: one per core, one on a GPU)")
    add("--tune-only", action="store_true", help="stop before the runs of the table")
    add("--csv", help="no runs: tables and figure again, from a compare.csv")


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
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
        rows = tables.read_rows(Path(options.csv), protocol.name)
        if not rows:
            raise ValueError(f"compare: {options.csv} has no rows of protocol {protocol.name}")
        out = Path(overrides.get("out", Path(options.csv).parent))
        out.mkdir(parents=True, exist_ok=True)
        tables.write_report(protocol, rows, out)
        return

    def read_recipe(source: str, changes: dict):
        return recipes.read(cofinetune.Recipe, source, changes)

    comparison = Comparison(protocol, overrides, options.jobs, read_recipe)
    comparison.out.mkdir(parents=True, exist_ok=True)
    rows = comparison.all_phases(options.tune_only)
    tables.write_rows(comparison.out / "compare.csv", rows)
    tables.write_report(protocol, rows, comparison.out)
