"""The rivals of co-finetuning, on the same encoder, data and evaluation; and the command that compares.

Self-distillation and SpotTune wrap the model, so the training loop has one guarded line for both.
`attach` returns an object with
    loss(model, video, features, logits, batch, step)    what the method adds to a micro-batch's loss
    state_dict(), load_state_dict()                      what it adds to a checkpoint
    report()                                             what it adds to a line of log.jsonl
`finetune` and `downstream` are other orders of the same training (`stages` in cofinetune.py), no wrappers.
A name `finetune+selfdistil` or `finetune+spottune` puts the wrapper on the last stage of a pipeline.

To use the two methods alone, copy this file and model.py (shapes as there); they need torch. `compare`
belongs to cofinetune.py: it starts runs of it and reads their folders.
"""

import csv
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import CoFinetuneModel, VideoTransformer


def attach(method: str, model: CoFinetuneModel, options: dict) -> "SelfDistil | SpotTune":
    """Put a method on an initialised model, before its optimisers are made. ValueError for bad options."""
    kind = {"selfdistil": SelfDistil, "spottune": SpotTune}[method]
    known = list(inspect.signature(kind).parameters)[1:]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"method_options of {method}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    if method == "selfdistil":
        return SelfDistil(model, **options)
    model.encoder = SpotTune(model.encoder, **options)
    return model.encoder


def check(method: str, **options: tuple) -> None:
    """ValueError unless each option is one of its choices (value, {...}) or in its range (value, low, high)."""
    for name, (value, *allowed) in options.items():
        if isinstance(allowed[0], set):
            good, text = value in allowed[0], "one of " + ", ".join(sorted(allowed[0]))
        else:
            good = type(value) in (int, float) and allowed[0] <= value <= allowed[1]
            text = "a number from {} to {}".format(*allowed)
        if not good:
            raise ValueError(f"method_options of {method}: {name} = {value!r}; expected {text}")


# ------------------------------------------------------------------------------------------------
# Self-distillation
# ------------------------------------------------------------------------------------------------


class SelfDistil:
    """The encoder of a while ago, frozen, guides the encoder of now (Zhou et al., arXiv 2205.00506).

    Known of the paper is its abstract: the encoder of the last epoch is the teacher of the current
    epoch, against forgetting. What is compared, how, and how strongly are our choices:
        target   pooled (B, D) | tokens (B, t, h, w, D) | logits, by the teacher's own copy of the heads
        form     cosine: 1 - cos, mean over vectors | mse: mean over everything | kl: teacher || student,
                 for logits; of the softmax for clips, of each class's yes and no for boxes, summed
        weight   of this loss beside the task's
        refresh  steps between refreshes (several datasets have no common epoch); 0: never, so that the
                 initial weights stay the teacher
        ema      share of the teacher that a refresh keeps; 0: a copy. A mean teacher is refresh 1, ema .999
    The loss is a sum over rows divided by clips, so micro-batches and ranks of equal numbers of clips
    add up to the loss of one whole batch, however unevenly their boxes fall.
    """

    def __init__(
        self, model: CoFinetuneModel, target: str = "pooled", form: str = "cosine", weight: float = 1.0,
        refresh: int = 100, ema: float = 0.0,
    ):  # fmt: skip
        check("selfdistil", target=(target, {"pooled", "tokens", "logits"}), ema=(ema, 0, 1),
              form=(form, {"cosine", "mse", "kl"}), weight=(weight, 0, math.inf), refresh=(refresh, 0, math.inf))
        if form == "kl" and target != "logits":
            raise ValueError(f"method_options of selfdistil: form kl compares class probabilities, not {target}")
        self.target, self.form, self.weight, self.refresh, self.ema = target, form, weight, refresh, ema
        # Not a deepcopy: that would share or copy whatever hooks and compiled code hang on the model.
        heads = {task: head.head for task, head in model.heads.items()}
        self.teacher = CoFinetuneModel(model.encoder.config, heads)
        self.teacher.load_state_dict(model.state_dict())
        self.teacher.to(next(model.parameters()).device).requires_grad_(False).eval()
        self.refreshed = -1  # the step of the last refresh
        self.latest = torch.zeros(())

    def loss(
        self, model: CoFinetuneModel, video: Tensor, features: tuple[Tensor, Tensor], logits: Tensor, batch, step: int
    ) -> Tensor:
        """Distance of the student (features, logits) from the teacher on the same clips, times weight.

        A refresh that is due at `step` comes first, once, however many micro-batches the step has. It
        copies weights that are equal on all ranks, so the teachers are.
        """
        if self.refresh and step % self.refresh == 0 and step != self.refreshed:
            self.refreshed = step
            for old, new in zip(self.teacher.state_dict().values(), model.state_dict().values(), strict=True):
                old.lerp_(new, 1 - self.ema)
        place = {"pooled": 0, "tokens": 1}.get(self.target)
        with torch.no_grad():
            taught = self.teacher.encoder(video)
            if self.target == "logits":
                goal = self.teacher.classify(taught, batch.task, batch.boxes, batch.box_clip)
            else:
                goal = taught[place]
        ours = logits if self.target == "logits" else features[place]
        rows = self.distance(ours.float(), goal.float(), batch.boxes is not None)  # (B,) or (K,)
        self.latest = rows.detach().sum() / len(video)
        return self.weight * rows.sum() / len(video)

    def distance(self, ours: Tensor, goal: Tensor, boxes: bool) -> Tensor:
        """One number a row, exactly 0 where student and teacher are equal."""
        if self.form == "mse":
            return (ours - goal).square().flatten(1).mean(1)
        if self.form == "cosine":  # 1 - cos is half the squared distance of unit vectors, without its rounding
            apart = F.normalize(ours, dim=-1) - F.normalize(goal, dim=-1)
            return apart.square().sum(-1, keepdim=True).flatten(1).mean(1) / 2
        if boxes:
            ours, goal = (F.logsigmoid(torch.stack([x, -x], 1)) for x in (ours, goal))  # (K, 2, C)
        else:
            ours, goal = ours.log_softmax(1), goal.log_softmax(1)
        return (goal.exp() * (goal - ours)).flatten(1).sum(1)

    def report(self) -> dict:
        return {"distillation": self.latest.item()}

    def state_dict(self) -> dict:
        return {"teacher": self.teacher.state_dict(), "refreshed": self.refreshed}

    def load_state_dict(self, state: dict) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self.refreshed = state["refreshed"]


# ------------------------------------------------------------------------------------------------
# SpotTune
# ------------------------------------------------------------------------------------------------


class SpotTune(VideoTransformer):
    """Each clip chooses, block by block, between the pretrained block and its finetuned twin.

    Guo et al., CVPR 2019, for residual networks; here the unit is a transformer block. A small policy
    network reads the clip and decides by a straight-through Gumbel-softmax, whose temperature stays
    constant; nothing rewards either choice but the task's loss. Both paths are computed, so a step costs
    about two blocks for one and nothing is saved at test. Embedding, final norm and heads are trained.
    As in the authors' code, except: the policy is a one-block transformer and follows the recipe's
    learning rates (theirs: a residual network, with a tenth of the rate); at test it takes the likelier
    path (theirs still samples).

    `blocks` are the trained twins, under the names and with the config of the encoder that is wrapped.
        temperature  of the Gumbel-softmax
        at_test      argmax | sample
        policy       learned | frozen | finetuned: the same path for every clip, without a policy network
    """

    def __init__(
        self, encoder: VideoTransformer, temperature: float = 5.0, at_test: str = "argmax", policy: str = "learned"
    ):
        check("spottune", temperature=(temperature, 1e-3, math.inf), at_test=(at_test, {"argmax", "sample"}),
              policy=(policy, {"learned", "frozen", "finetuned"}))
        super().__init__(encoder.config)
        self.load_state_dict(encoder.state_dict())
        pretrained = VideoTransformer(encoder.config)
        pretrained.load_state_dict(encoder.state_dict())
        self.frozen = pretrained.blocks.requires_grad_(False)
        self.temperature, self.at_test, self.fixed = temperature, at_test, None
        if policy == "learned":
            small = dict(width=64, depth=1, heads=2, cls=False, pool="norm-mean", drop_path=0.0, checkpointing=False)
            self.policy = VideoTransformer(replace(encoder.config, **small))
            self.choice = nn.Linear(64, 2 * encoder.config.depth)
        else:
            self.fixed = float(policy == "finetuned")
        self.usage = torch.zeros(encoder.config.depth)  # share of the last clips on the finetuned path, per block
        self.to(next(encoder.parameters()).device).train(encoder.training)

    def train(self, mode: bool = True) -> "SpotTune":
        super().train(mode)
        self.frozen.eval()  # no stochastic depth in what stands for the pretrained network
        return self

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        route = self.route(video)  # (B, depth), 1 = finetuned
        self.usage = route.detach().mean(0)
        x, grid = self.embed(video)
        for frozen, tuned, gate in zip(self.frozen, self.blocks, route.T, strict=True):
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.mix, frozen, tuned, x, gate, use_reentrant=False)
            else:
                x = self.mix(frozen, tuned, x, gate)
        return self.read_out(x, grid)

    @staticmethod
    def mix(frozen: nn.Module, tuned: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
        gate = gate[:, None, None].to(x.dtype)  # (B, 1, 1), 0 or 1
        return (1 - gate) * frozen(x) + gate * tuned(x)

    def route(self, video: Tensor) -> Tensor:
        """The path of every clip: (B, depth) of exact zeros and ones, with the gradient of the softmax."""
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
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
COSTS = {"clips seen": ",.0f", "updates": ",.0f", "minutes": ".1f"}  # columns that are no scores


@dataclass
class Run:
    method: str
    lr: float
    seed: int
    out: Path
    overrides: dict[str, str]  # of the recipe

    def metrics(self) -> dict:
        """metrics.json; without it the run is not finished, or diverged."""
        path = self.out / "metrics.json"
        return json.loads(path.read_text()) if path.exists() else {"score": -math.inf}


def compare(
    recipe, source: str, overrides: dict[str, str], methods: list[str], seeds: int = 5, lrs: list[float] = (),
    jobs: int = 0, tuning_seeds: int = 2,
) -> None:
    """Tune every method's learning rate, run every method with the same seeds, write the tables.

    recipe: as resolved from `source` (a file or a name) and `overrides`. A seed decides the
    initialisation and the order of the data, the same for all methods; in a generated world also the
    world. The rate is the best of `lrs` (default: half, once and twice the recipe's; a single one is
    taken as it is) by mean mAP over tuning seeds, on data that no reported number is measured on:
    other worlds, or the fifth of the training videos that `hold_out` sets aside. `jobs` runs at a time
    have a thread each (0: one per core; one in all on a GPU). Finished runs are kept, stopped ones
    resume. `out` (runs/compare): compare.md, compare.csv (each run), classes.csv, compare.png.
    """
    out = Path(overrides.get("out", "runs/compare")).resolve()
    lrs = sorted(set(lrs)) or [recipe.lr / 2, recipe.lr, recipe.lr * 2]
    if min(seeds, tuning_seeds) < 1 or len(set(methods)) < len(methods):
        raise ValueError(f"compare: {seeds} seeds, {tuning_seeds} tuning seeds, methods {', '.join(methods)}; "
                         "expected at least one seed of each kind, and each method once")
    if not any(task.kind == "box" for task in recipe.task):
        raise ValueError(f"compare: {source} has no box task, whose mAP decides")
    if not jobs:
        jobs = 1 if recipe.device != "cpu" and torch.cuda.is_available() else len(os.sched_getaffinity(0))

    def run(phase: str, method: str, lr: float, seed: int, split: dict) -> Run:
        folder = out / phase / f"{method}-lr{lr:g}-seed{seed}"
        own = {"method": method, "lr": repr(lr), "seed": str(seed), "threads": "1", "out": str(folder)}
        return Run(method, lr, seed, folder, overrides | split | own)

    scores, best, tuning = {}, dict.fromkeys(methods, lrs[0]), []
    if len(lrs) > 1:
        held_out = {} if recipe.world else hold_out(recipe, out / "tuning")
        for seed in range(recipe.seed + 1000, recipe.seed + 1000 + tuning_seeds):
            split = other_world(recipe, seed, out) if recipe.world else held_out
            tuning += [run("tuning", method, lr, seed, split) for method in methods for lr in lrs]
        launch(tuning, recipe, source, jobs)
        scores = {(method, lr): statistics.fmean(r.metrics()["score"] for r in tuning if (r.method, r.lr) == (method, lr))
                  for method in methods for lr in lrs}
        best = {method: max(lrs, key=lambda lr: scores[method, lr]) for method in methods}
    final = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        split = other_world(recipe, seed, out) if recipe.world else {}
        final += [run("final", method, best[method], seed, split) for method in methods]
    launch(final, recipe, source, jobs)
    if diverged := [str(r.out) for r in final if "task" not in r.metrics()]:
        raise ValueError(f"compare: no table, the loss became infinite in {', '.join(diverged)}; extend --lrs downwards")
    write_tables(recipe, source, final, lrs, scores, best, out)


def other_world(recipe, seed: int, out: Path) -> dict[str, str]:
    """Make the recipe's world with another seed -> the overrides that train on it."""
    import demo

    world, folder = recipe.world | {"seed": seed}, out / "worlds" / f"seed{seed}"
    demo.make_world(folder, **world)
    return {"root": str(folder), "world": "{" + ", ".join(f"{k} = {v!r}" for k, v in world.items()) + "}"}


def hold_out(recipe, out: Path) -> dict[str, str]:
    """Set a fifth of every box task's training videos aside -> the overrides that validate on them, with
    the person boxes that training has. Upstream tasks stay as they are: downstream mAP alone decides."""
    overrides = {}
    out.mkdir(parents=True, exist_ok=True)
    for task in (task for task in recipe.task if task.kind == "box"):
        rows = (Path(recipe.root) / task.train).read_text().splitlines(keepends=True)
        for split in ("train", "val"):
            part = [row for row in rows if (zlib.crc32(row.split(",")[0].encode()) % 5 == 0) == (split == "val")]
            path = out / f"{task.name}_{split}.csv"
            path.write_text("".join(part))
            overrides[f"task.{task.name}.{split}"] = str(path)
        same = {"val_videos": task.videos, "val_boxes": task.train_boxes, "exclude_val": task.exclude_train}
        overrides |= {f"task.{task.name}.{key}": value for key, value in same.items()}
    return overrides


def launch(runs: list[Run], recipe, source: str, jobs: int) -> None:
    """Run what is not finished, `jobs` processes at a time. ValueError as soon as one fails; but a run
    that diverges only stays without metrics, because in a grid that is an answer."""
    waiting, running, began = [], {}, time.time()
    for run in runs:
        identity = json.dumps({"source": source, "overrides": run.overrides, "recipe": vars(recipe)}, default=vars)
        written = run.out / "compare.json"
        if written.exists() and written.read_text() != identity:
            raise ValueError(f"{run.out} is a run of another recipe or with other options; take another --out")
        run.out.mkdir(parents=True, exist_ok=True)
        written.write_text(identity)
        waiting += [] if (run.out / "metrics.json").exists() else [run]
    total, trainer = len(waiting), str(Path(__file__).with_name("cofinetune.py"))
    print(f"{runs[0].out.parent}: {len(runs)} runs, {len(runs) - total} of them done, {jobs} at a time", flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                options = [f"--{key}={value}" for key, value in run.overrides.items()]
                with open(run.out / "output.txt", "a") as output:
                    process = subprocess.Popen([sys.executable, trainer, "--recipe", source, *options], stdout=output,
                                               stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
                running[process] = run
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                tail, score = (run.out / "output.txt").read_text()[-500:], run.metrics()["score"]
                if score == -math.inf and "non-finite loss" not in tail:
                    raise ValueError(f"{run.out} ended with status {process.returncode}: {tail.strip()}")
                done = total - len(waiting) - len(running)
                left = (time.time() - began) / done * (total - done) / 60
                print(f"{done}/{total} {run.out.name}: mAP {score:.4f}, {left:.0f} min left", flush=True)
    finally:  # a failure or Ctrl-C: the others write a checkpoint and stop; the same command resumes them
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def measures(run: Run, recipe) -> dict[str, float]:
    """What the tables show of a finished run, by column; nan for a group without classes."""
    found, batch = {}, {task.name: task.batch for task in recipe.task}
    for name, m in sorted(run.metrics()["task"].items(), key=lambda item: item[1]["kind"]):  # box before clip
        values = {"top-1": m.get("top1")} if m["kind"] == "clip" else {
            f"mAP ({m['protocol']})": m["mAP"], **{group: m["groups"][group]["mAP"] for group in ("head", "mid", "tail")}}
        found |= {f"{name} {key}": math.nan if value is None else value for key, value in values.items()}
    found |= dict.fromkeys(COSTS, 0.0)
    for path in run.out.rglob("log.jsonl"):  # of every stage
        steps = [record for record in map(json.loads, path.read_text().splitlines()) if "loss" in record]
        found["clips seen"] += sum(batch[task] for step in steps for task in step["loss"])
        found["updates"] += len(steps)
        found["minutes"] += (steps[-1]["time"]["unix"] - steps[0]["time"]["unix"]) / 60
    return found


def paired(values: list[float], others: list[float]) -> tuple[float, float, float]:
    """Mean of the differences by seed, and its 95 % t interval (nan for a single seed)."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    half = math.nan
    if count > 1:
        half = T975[min(count - 1, len(T975)) - 1] * statistics.stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def write_tables(recipe, source: str, runs: list[Run], lrs: list, scores: dict, best: dict, out: Path) -> None:
    """compare.md, which is printed too, compare.csv, classes.csv and compare.png."""
    methods, seeds = list(best), sorted({run.seed for run in runs})
    results = {(run.method, run.seed): measures(run, recipe) for run in runs}
    columns = list(results[methods[0], seeds[0]])
    series = {c: {m: [results[m, s][c] for s in seeds] for m in methods} for c in columns}
    reference = "finetune" if "finetune" in methods else methods[0]
    others = [m for m in methods if m != reference]
    differences = {(c, m): paired(series[c][m], series[c][reference]) for c in columns if c not in COSTS for m in others}

    def table(header: list[str], rows: list[list[str]]) -> str:
        return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *rows])

    def spread(column: str, values: list[float]) -> str:
        form, several = COSTS.get(column, ".4f"), len(values) > 1 and column not in ("clips seen", "updates")
        return f"{statistics.fmean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if several else "")

    text = f"Recipe {source}, seeds {seeds[0]} to {seeds[-1]}: each " + ("a world, " if recipe.world else "") + (
        "an initialisation and an order of the clips, the same for all methods.\n\n")
    if scores:
        text += ("Learning rate: mean mAP over tuning seeds, on " + ("other worlds" if recipe.world else "held-out training "
                 "videos") + ". At the edge of the grid, a better one may lie outside.\n\n")
        text += table(["method", *(f"{lr:g}" for lr in lrs), "taken"], [
            [m, *(f"{scores[m, lr]:.4f}" for lr in lrs), f"{best[m]:g}" + " (edge)" * (best[m] in (lrs[0], lrs[-1]))]
            for m in methods])
    else:
        text += f"Learning rate: {lrs[0]:g} for all methods, not tuned.\n"
    text += "\nMean ± standard deviation over seeds; minutes from the first to the last logged step.\n\n"
    text += table(["method", *columns], [[m, *(spread(c, series[c][m]) for c in columns)] for m in methods])
    text += f"\nDifference to {reference} by seed: mean and 95 % t interval. One that contains 0 shows no difference.\n\n"
    text += table(["", *others], [[c, *("{:+.4f} [{:+.4f}, {:+.4f}]".format(*differences[c, m]) for m in others)]
                                  for c in columns if c not in COSTS])
    (out / "compare.md").write_text(text)
    with open(out / "compare.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["method", "lr", "seed", *columns])
        rows.writerows([run.method, run.lr, run.seed, *results[run.method, run.seed].values()] for run in runs)
    ap = {}
    for run in runs:
        for task, m in run.metrics()["task"].items():
            for c in (c for c in m.get("per_class", ()) if c["ap"] is not None and math.isfinite(c["ap"])):
                ap.setdefault((task, c["name"]), {})[run.method, run.seed] = c["ap"]
    with open(out / "classes.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["task", "class", "method", "seeds", "AP", f"difference to {reference}", "low", "high"])
        for (task, name), of in ap.items():
            both = [s for s in seeds if all((m, s) in of for m in methods)]  # with ground truth of the class
            values = {m: [of[m, s] for s in both] for m in methods if both}
            rows.writerows([task, name, m, len(both), statistics.fmean(values[m]), *paired(values[m], values[reference])]
                           for m in values)
    draw_differences(series, differences, reference, out / "compare.png")
    print(text + f"\nin {out}: compare.md, compare.csv, classes.csv, compare.png")


def draw_differences(series: dict, differences: dict, reference: str, path: Path) -> None:
    """A row per measure and method: differences of single seeds as dots, their mean and interval as a bar."""
    import numpy as np

    import data

    names = [f"{column}: {method} - {reference}" for column, method in differences]
    left, height = 6 * max(map(len, names), default=0) + 12, 16 * len(names) + 44
    picture = np.full((height, left + 440, 3), 255, np.uint8)
    dots = {(c, m): np.subtract(series[c][m], series[c][reference]) for c, m in differences}
    every = np.concatenate([np.zeros(1), *dots.values(), *map(np.array, differences.values())])
    reach = np.abs(every[np.isfinite(every)]).max() or 1.0
    column = lambda value: left + 215 + round(200 * value / reach)
    data.draw_text(picture, 6, 4, f"dots: seeds; bar: mean and 95 % t interval; right of 0: above {reference}")
    for tick in (-reach, 0.0, reach):
        picture[18:-16, column(tick)] = 90 if tick == 0 else 225
        data.draw_text(picture, column(tick) - 18, height - 12, f"{tick:+.3f}")
    methods = list(dict.fromkeys(method for _, method in differences))
    for row, (key, (mean, low, high)) in enumerate(differences.items()):
        y, colour = 28 + 16 * row, data.CURVES[methods.index(key[1]) % len(data.CURVES)]
        data.draw_text(picture, 6, y - 4, names[row])
        if math.isfinite(low):
            picture[y : y + 2, column(low) : column(high) + 1] = colour
        for value in dots[key][np.isfinite(dots[key])]:
            picture[y - 5 : y - 2, column(value) - 1 : column(value) + 2] = 120
        if math.isfinite(mean):
            picture[y - 2 : y + 4, column(mean) - 1 : column(mean) + 2] = colour
    data.write_png(path, picture)
