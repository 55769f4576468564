"""The rivals of co-finetuning, on the same encoder, data and evaluation; and how to compare them.

Self-distillation and SpotTune wrap the model, so one guarded line of the training loop serves both:
`attach` returns an object with
    loss(model, video, features, logits, batch, step)    added to the loss of a micro-batch
    state_dict(), load_state_dict()                      part of a checkpoint
    report()                                             added to a line of log.jsonl
`finetune` and `downstream` are other orders of the same training: `stages` in cofinetune.py.
`finetune+selfdistil` and `finetune+spottune` put the wrapper on the last stage, as their papers do.

To use the two methods alone, copy this file and model.py, where the shapes are declared; torch and
numpy. `compare` belongs to cofinetune.py: it starts runs of it and reads their folders.
"""

import csv
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import CoFinetuneModel, VideoTransformer


def attach(method: str, model: CoFinetuneModel, options: dict) -> "SelfDistil | SpotTune":
    """Put a method on an initialised model, before its optimisers are made. ValueError."""
    kind = {"selfdistil": SelfDistil, "spottune": SpotTune}[method]
    known = list(inspect.signature(kind).parameters)[1:]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"method_options of {method}: unknown {', '.join(unknown)}; "
                         f"known: {', '.join(known)}")
    if method == "selfdistil":
        return SelfDistil(model, **options)
    model.encoder = SpotTune(model.encoder, **options)
    return model.encoder


def check(method: str, **options: tuple) -> None:
    """ValueError unless each is one of its choices, (value, [...]), or in (value, low, high)."""
    for name, (value, *allowed) in options.items():
        if isinstance(allowed[0], list):
            good, text = value in allowed[0], "one of " + ", ".join(allowed[0])
        else:
            good = type(value) in (int, float) and allowed[0] <= value <= allowed[1]
            text = "a number from {} to {}".format(*allowed)
        if not good:
            raise ValueError(f"method_options of {method}: {name} = {value!r}; expected {text}")


# ------------------------------------------------------------------------------------------------
# Self-distillation
# ------------------------------------------------------------------------------------------------


class SelfDistil:
    """The encoder of a while ago, frozen, guides that of now (Zhou et al., arXiv 2205.00506).

    What we know of the paper is its abstract: the encoder of the last epoch teaches that of the
    current one, against forgetting. What is compared, how and how strongly are our choices:
        target   pooled (B, D) | tokens (B, t, h, w, D) | logits, by the teacher's copy of the heads
        form     cosine: 1 - cos, mean over vectors | mse: mean over all numbers | kl: of logits,
                 teacher || student; for boxes the sum over classes, each a yes or no
        weight   of this loss beside the task's
        refresh  steps from one teacher to the next (several datasets have no common epoch);
                 0: never, the initial weights stay
        ema      share of the old teacher that a refresh keeps; a mean teacher: refresh 1, ema 0.999
    It is a sum over rows divided by clips, so that micro-batches and ranks of equally many clips
    add up to the loss of the whole batch, however unevenly their boxes fall.
    """

    def __init__(
        self, model: CoFinetuneModel, target: str = "pooled", form: str = "cosine",
        weight: float = 1.0, refresh: int = 100, ema: float = 0.0,
    ):  # fmt: skip
        check("selfdistil", target=(target, ["pooled", "tokens", "logits"]),
              form=(form, ["cosine", "mse", "kl"] if target == "logits" else ["cosine", "mse"]),
              weight=(weight, 0, math.inf), refresh=(refresh, 0, math.inf), ema=(ema, 0, 1))
        self.target, self.form, self.weight = target, form, weight
        self.refresh, self.ema = refresh, ema
        # Not a deepcopy, which would copy, or share, whatever hooks hang on the model.
        heads = {task: head.head for task, head in model.heads.items()}
        self.teacher = CoFinetuneModel(model.encoder.config, heads)
        self.teacher.load_state_dict(model.state_dict())
        self.teacher.to(next(model.parameters()).device).requires_grad_(False).eval()
        self.refreshed, self.latest = -1, torch.zeros(())

    def loss(
        self, model: CoFinetuneModel, video: Tensor, features: tuple[Tensor, Tensor],
        logits: Tensor, batch, step: int,
    ) -> Tensor:  # fmt: skip
        """weight * distance of the student (features, logits) from the teacher on the same clips.

        A refresh that is due at `step` comes first, once, however many micro-batches the step has;
        the weights it copies are equal on all ranks, so the teachers are too.
        """
        if self.refresh and step % self.refresh == 0 and step != self.refreshed:
            self.refreshed = step
            new = model.state_dict()
            for name, old in self.teacher.state_dict().items():
                old.lerp_(new[name], 1 - self.ema)
        with torch.no_grad():
            goals = self.teacher.encoder(video)
            if self.target == "logits":
                goals = (self.teacher.classify(goals, batch.task, batch.boxes, batch.box_clip),)
                features = (logits,)
        place = int(self.target == "tokens")
        rows = self.distance(features[place].float(), goals[place].float(), batch.boxes is not None)
        total = rows.sum() / len(video)  # of (B,) or, for logits of boxes, (K,)
        self.latest = total.detach()
        return self.weight * total

    def distance(self, ours: Tensor, goal: Tensor, boxes: bool) -> Tensor:
        """A number for each row, exactly 0 where student and teacher are equal."""
        if self.form == "mse":
            return (ours - goal).square().flatten(1).mean(1)
        if self.form == "cosine":  # half the squared distance of unit vectors: 1 - cos, exact at 0
            apart = F.normalize(ours, dim=-1) - F.normalize(goal, dim=-1)
            return apart.square().sum(-1, keepdim=True).flatten(1).mean(1) / 2
        if boxes:
            ours, goal = (F.logsigmoid(torch.cat([x, -x], 1)) for x in (ours, goal))  # (K, 2C)
        else:
            ours, goal = ours.log_softmax(1), goal.log_softmax(1)
        return (goal.exp() * (goal - ours)).sum(1)

    def report(self) -> dict:
        return {"distillation": self.latest.item()}

    def state_dict(self) -> dict:
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.teacher.load_state_dict(state)


# ------------------------------------------------------------------------------------------------
# SpotTune
# ------------------------------------------------------------------------------------------------


class SpotTune(VideoTransformer):
    """Each clip takes, block by block, the pretrained block or its finetuned twin.

    Guo et al., CVPR 2019, for residual networks; here the unit is a transformer block. A small
    network, the policy, reads the clip and decides by a straight-through Gumbel-softmax of constant
    temperature; nothing but the task's loss rewards a choice. Both paths are computed: a step costs
    about twice the blocks, and nothing is saved at test. Embedding, final norm and heads are
    trained. Unlike the authors' code, the policy is a one-block transformer with the recipe's
    learning rates (theirs: a residual network at a tenth of the rate), and tests take the likelier
    path (theirs draw).

    `blocks` are the trained twins, by the names they have in the encoder that is wrapped.
        temperature  of the Gumbel-softmax
        at_test      argmax | sample
        policy       learned | frozen | finetuned: one path for all clips, and no policy network
    """

    def __init__(
        self, encoder: VideoTransformer, temperature: float = 5.0, at_test: str = "argmax",
        policy: str = "learned",
    ):  # fmt: skip
        check("spottune", temperature=(temperature, 1e-3, math.inf),
              at_test=(at_test, ["argmax", "sample"]),
              policy=(policy, ["learned", "frozen", "finetuned"]))
        super().__init__(encoder.config)
        self.load_state_dict(encoder.state_dict())
        pretrained = VideoTransformer(encoder.config)
        pretrained.load_state_dict(encoder.state_dict())
        self.frozen = pretrained.blocks.requires_grad_(False)
        self.temperature, self.at_test, self.fixed = temperature, at_test, None
        if policy == "learned":
            small = dict(width=64, depth=1, heads=2, cls=False, pool="norm-mean", drop_path=0.0)
            self.policy = VideoTransformer(replace(encoder.config, **small))
            self.choice = nn.Linear(64, 2 * encoder.config.depth)
        else:
            self.fixed = float(policy == "finetuned")
        self.usage = torch.zeros(encoder.config.depth)
        self.to(next(encoder.parameters()).device).train(encoder.training)

    def train(self, mode: bool = True) -> "SpotTune":
        super().train(mode)
        self.frozen.eval()  # no stochastic depth in what stands for the pretrained network
        return self

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        route = self.route(video)  # (B, depth)
        self.usage = route.detach().mean(0)  # share of these clips on the finetuned path, per block
        x, grid = self.embed(video)
        for frozen, tuned, gate in zip(self.frozen, self.blocks, route.T, strict=True):
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.mix, frozen, tuned, x, gate, use_reentrant=False)
            else:
                x = self.mix(frozen, tuned, x, gate)
        return self.read_out(x, grid)

    @staticmethod
    def mix(frozen: nn.Module, tuned: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
        gate = gate[:, None, None].to(x.dtype)  # (B, 1, 1)
        return (1 - gate) * frozen(x) + gate * tuned(x)

    def route(self, video: Tensor) -> Tensor:
        """(B, depth), exactly 0 (frozen) or 1 (finetuned), with the gradient of the softmax."""
        if self.fixed is not None:
            return video.new_full((len(video), self.config.depth), self.fixed)
        pooled, _ = self.policy(video)
        with torch.autocast(video.device.type, enabled=False):
            logits = self.choice(pooled.float()).unflatten(1, (-1, 2))  # (B, depth, 2)
            if not self.training and self.at_test == "argmax":
                return logits.argmax(2).float()
            soft = F.gumbel_softmax(logits, self.temperature)
        return soft.argmax(2) + (soft - soft.detach())[..., 1]

    def loss(self, model, video, features, logits, batch, step) -> Tensor:
        return logits.new_zeros(())

    def report(self) -> dict:
        return {"finetuned_share": self.usage.tolist()}


# ------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; beyond, the last one: a little too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042)
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
        raise ValueError(f"compare: {seeds} seeds, {tuning_seeds} tuning seeds, methods "
                         f"{', '.join(methods)}; expected one seed or more, each method once")
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
        own |= {"method": name, "lr": repr(lr), "seed": str(seed), "threads": "1",
                "out": str(folder)}
        return Run(method, lr, seed, folder, overrides | split | own)

    given = {m: float(part.removeprefix("lr=")) for m in methods for part in m.split("@")
             if part.startswith("lr=")}
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
    import demo

    world, folder = recipe.world | {"seed": seed}, out / "worlds" / f"seed{seed}"
    demo.make_world(folder, **world)
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
        for key, value in (("val_videos", task.videos), ("val_boxes", task.train_boxes),
                           ("exclude_val", task.exclude_train)):
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
    total, trainer = len(waiting), str(Path(__file__).with_name("cofinetune.py"))
    print(f"{runs[0].out.parent}: {len(runs)} runs, {len(runs) - total} done, {jobs} at a time",
          flush=True)
    # SIGTERM and SIGHUP, like Ctrl-C, must not leave runs behind in sessions of their own.
    signals = {number: signal.signal(number, signal.default_int_handler)
               for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while waiting or running:
            while len(running) < jobs:
                busy = [first_stage(other) for other in running.values()]
                run = next((r for r in waiting if first_stage(r) not in busy), None)
                if run is None:
                    break
                waiting.remove(run)
                take_first_stage(run, runs)
                command = [sys.executable, trainer, "--recipe", source,
                           *(f"--{key}={value}" for key, value in run.overrides.items())]
                with open(run.out / "output.txt", "a") as output:
                    process = subprocess.Popen(  # in its own session, which Ctrl-C does not reach
                        command, stdout=output, stderr=output, start_new_session=True,
                        env=os.environ | {"OMP_NUM_THREADS": "1"})
                running[process] = run
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                tail = " | ".join((run.out / "output.txt").read_text().split("\n")[-4:-1])
                if (score := run.metrics()["score"]) == -math.inf and "non-finite" not in tail:
                    raise ValueError(f"{run.out} ended with status {process.returncode}: {tail}")
                done = total - len(waiting) - len(running)
                left = (time.time() - began) / done * (total - done) / 60
                print(f"{done}/{total} {run.out.name}: mAP {score:.4f}, {left:.0f} min left",
                      flush=True)
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
    return {key: value for key, value in run.overrides.items()
            if key not in ("out", "method", "method_options")}


def take_first_stage(run: Run, runs: list[Run]) -> None:
    """Copy the first stage of a finished run that has the same, unless this one began its own."""
    stage, part = run.out / "upstream", run.out / "upstream.part"
    done = [r.out / "upstream" for r in runs
            if first_stage(r) == first_stage(run) and (r.out / "metrics.json").exists()]
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
    return {column: value if column in COSTS or column.split()[0] in trained else math.nan
            for column, value in found.items()}


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
    text = (f"Recipe {source}, seeds {seeds[0]} to {seeds[-1]}: each {each}an initialisation and "
            "an order of the clips, the same for all methods.\n\n")
    if scores:
        text += (f"Learning rate: mean mAP over tuning seeds, on {other}. At an edge of the grid, "
                 "a better one may lie outside.\n\n")
        taken = {m: f"{best[m]:g}" + " (edge)" * (best[m] in (lrs[0], lrs[-1])) for m in methods}
        text += table(["method", *(f"{lr:g}" for lr in lrs), "taken"],
                      [[m, *(f"{scores.get((m, lr), math.nan):.4f}" for lr in lrs),
                        taken[m] if (m, lrs[0]) in scores else f"{best[m]:g} (given)"]
                       for m in methods])
    else:
        given = ", ".join(f"{best[m]:g} ({m})" for m in methods)
        text += f"Learning rate, not tuned: {given}.\n\n"
    text += ("Mean ± standard deviation over seeds. "
             f"Head: above {recipe.head_above} training boxes, tail: below {recipe.tail_below}. "
             "Minutes: from the first to the last logged step.\n\n")
    text += table(["method", *columns],
                  [[m, *(spread(c, series[c][m]) for c in columns)] for m in methods])
    if others:
        interval = "{:+.4f} [{:+.4f}, {:+.4f}]".format
        text += f"Difference to {reference}, paired by seed: mean and 95 % t interval.\n\n"
        text += table(["", *others], [[c, *(interval(*paired(differences[c, m])) for m in others)]
                                      for c in rates])
    (out / "compare.md").write_text(text)
    write_csv(out / "compare.csv", ["method", "lr", "seed", *columns],
              [[r.method, r.lr, r.seed, *results[r.method, r.seed].values()] for r in runs])

    ap, rows = {}, []
    for run in runs:
        for task, m in run.metrics()["task"].items():
            for c in m.get("per_class", ()):
                if c["ap"] is not None and math.isfinite(c["ap"]):
                    ap.setdefault((task, c["name"]), {})[run.method, run.seed] = c["ap"]
    for (task, name), of in ap.items():
        both = [s for s in seeds if all((m, s) in of for m in methods)]  # which have such a box
        values = {m: np.array([of[m, s] for s in both]) for m in methods if both}
        rows += [[task, name, m, len(both), v.mean(), *paired(v - values[reference])]
                 for m, v in values.items()]
    write_csv(out / "classes.csv", ["task", "class", "method", "seeds", "AP",
                                    f"difference to {reference}", "low", "high"], rows)
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
    import datatools

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
        datatools.draw_text(picture, place, height - 12, f"{tick:+.3f}")
    title = "dots: seeds; bars: mean and 95 % t interval; right of 0: more"
    datatools.draw_text(picture, 6, 4, title)
    for i, ((_, method), (dots, (mean, low, high))) in enumerate(zip(differences, rows)):
        y, colour = 28 + 16 * i, datatools.CURVES[methods.index(method) % len(datatools.CURVES)]
        datatools.draw_text(picture, 6, y - 4, names[i])
        mark(y, y + 2, low, high, 0, colour)
        mark(y - 2, y + 4, mean, mean, 1, colour)
        for value in dots:
            mark(y - 5, y - 2, value, value, 1, 120)
    datatools.write_png(path, picture)
