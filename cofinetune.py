"""Co-finetuning: one video transformer learns clip classification and action localisation at once.

    python cofinetune.py                              the demo: makes its videos, trains, evaluates
    python cofinetune.py --recipe my.toml --lr 0.05 --task.ava.batch 16    any setting is an option
    python cofinetune.py --help                       the other commands
    ./train_ddp.sh vivit-b                            every GPU of this machine

The method (Arnab et al., arXiv 2207.03807): instead of pretraining on upstream clip datasets and
then finetuning on the downstream localisation dataset, every step takes a batch of *one* of the
datasets; the shared encoder is updated by all of them, each head by its own. Read `train_step` and
`train`, then model.py. What surrounds the method stands in extras/, and is not needed to follow it.
"""

import os
import signal
import sys

if __name__ == "__main__":  # before torch, whose import takes seconds
    if os.name == "nt":
        sys.exit("error: Windows is not supported; its Linux (WSL 2) is")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: silence, not a traceback

import argparse
import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ava_eval
import data
from extras import checkpoints, door, formats, methods, report, workers
from extras import job as jobs
from extras import recipe as recipes
from extras.job import Job
from extras.optimisers import make_optimisers, share_of_peak, take_step
from extras.run import Run
from extras.settings import setting
from model import CoFinetuneModel, box_loss, clip_loss


@dataclass
class Recipe:
    """Everything that decides a run: the keys of a TOML file, with its [model] and [[task]]."""

    name: str = setting("own", "of the run", free=True, group="run")
    out: str = setting("runs/own", "the run's folder", free=True)
    root: str = setting(".", "data paths start here; itself relative to the recipe", free=True)
    world: dict = setting({}, "sizes of a generated world (extras/world.py); {}: videos exist")
    init: str = setting("", "checkpoint of any family of extras/pretrained.py; '': from scratch")
    method: Literal[
        "cofinetune", "finetune", "downstream", "selfdistil", "spottune",
        "finetune+selfdistil", "finetune+spottune",
    ] = setting("cofinetune", "what is trained, in which order; the rest are rivals")  # fmt: skip
    method_options: dict = setting({}, "of self-distillation or SpotTune (extras/methods.py)")
    train_tasks: list[str] = setting([], "names of the trained tasks; []: all")
    seed: int = setting(0, "of initialisation, batches and augmentation", least=0, most=2**63 - 1)
    steps: int = setting(600, "updates, over all tasks", least=1)
    schedule: Literal["round_robin", "weighted", "accumulate"] = setting(
        "round_robin", "which task a step trains: in turn, in shares, or all in one update"
    )
    micro_batches: int = setting(
        1, "pieces of a batch, to fit in memory; the gradient is the same but for the masks of "
        "dropout and drop_path", least=1, free=True,
    )  # fmt: skip
    optimiser: Literal["sgd", "adamw", "muon"] = setting(
        "sgd", "ViViT's, VideoMAE's, or muon for the blocks' matrices and AdamW for the rest",
        group="optimisation",
    )  # fmt: skip
    lr: float = setting(0.1, "peak rate at the stated batch sizes; muon: of the matrices", least=0)
    adam_scale: float = setting(0.075, "muon: rate of all else, as a share of lr", least=0)
    momentum: float = setting(0.9, "sgd, muon", least=0, below=1)
    betas: list[float] = setting([0.9, 0.999], "of AdamW, also beside muon", least=0, below=1)
    weight_decay: float = setting(0.0, "not on 1-D parameters, class token, positions", least=0)
    layer_decay: float = setting(1.0, "block i learns at lr * this ** (depth - i)", least=0)
    warmup: int = setting(50, "steps of linear warm-up", least=0)
    final_lr: float = setting(0.0, "end of the cosine, as a share of the peak", least=0)
    clip_norm: float = setting(
        1.0, "largest norm of the gradient, over all ranks; undoes much of a large loss_weight; 0: "
        "any", least=0,
    )  # fmt: skip
    ema: float = setting(
        0.0, "decay of averaged weights, evaluated beside the last ones; 0: off", least=0, below=1
    )
    precision: Literal["float32", "bf16"] = setting(
        "float32", "float32 (on a GPU TF32) or autocast to bf16 (fast on GPUs, and CPUs with AMX)",
        free=True, group="machine",
    )  # fmt: skip
    compile: bool = setting(False, "torch.compile of the encoder; pays on a GPU", free=True)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute", free=True)
    workers: int = setting(2, "decoding processes per rank", least=0, free=True)
    threads: int = setting(0, "of torch per rank; 0: torch's choice", least=0, free=True)
    protocol: Literal[*ava_eval.PROTOCOLS] = setting(
        "official-2020", "of the AVA mAP (ava_eval.py)", free=True, group="evaluation and records"
    )
    head_above: int = setting(10_000, "training boxes of a head class, more than", free=True)
    tail_below: int = setting(1_000, "training boxes of a tail class, fewer than", free=True)
    log_every: int = setting(20, "steps per printed line; the log has all", least=1, free=True)
    eval_every: int = setting(0, "steps; 0: only at the end", least=0, free=True)
    save_every: int = setting(200, "steps between writes of last.pt", least=1, free=True)
    keep_every: int = setting(0, "steps between checkpoints kept for good", least=0, free=True)
    preview: int = setting(12, "keyframes in preview.png and .mp4; 0: none", least=0, free=True)
    model: dict = setting({}, "arch: a size of model.py; or fields of ModelConfig")
    task: list = setting([], "data.Task, one per dataset")


# ------------------------------------------------------------------------------------------------
# The method: every step one task, one shared encoder
# ------------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """What a run trains, the same from its first step to its last."""

    model: CoFinetuneModel
    trunk: nn.Module  # the model's encoder as a step calls it: compiled, in DDP
    criterion: methods.Plain  # the loss of a micro-batch
    optimisers: list[torch.optim.Optimizer]
    tasks: dict[str, data.Task]


def train_step(
    step: int, batches: list[data.Batch], learner: Learner, recipe: Recipe, job: Job
) -> tuple[dict[str, float], float, float]:
    """One update: the encoder by every task of the step, each head by its own.

    batches: micro-batches of the step's task (with `accumulate`, of every task); all ranks train
    the same tasks. -> loss by task, norm of the gradient, share of the peak rate times the task's
    lr_scale (SGD keeps its rate and scales the gradient instead: take_step).
    """
    model, trunk, tasks = learner.model, learner.trunk, learner.tasks
    seed_dropout(recipe.seed, step, job.rank)  # as the data are, so that resuming is exact
    divisors = divisors_of(batches, job)
    losses = dict.fromkeys(divisors, 0.0)
    for number, batch in enumerate(batches, 1):
        batch = batch.to(job.device)
        task, divisor = tasks[batch.task], divisors[batch.task]
        with exchange(trunk, last=number == len(batches)), autocast(recipe, job):
            video = data.normalise(batch.video, *model.scale)  # (B, 3, T, H, W)
            features = trunk(video)  # pooled (B, D), tokens (B, t, h, w, D)
            logits = model.classify(features, batch.task, batch.boxes, batch.box_clip)
            loss = learner.criterion(task, step, video, features, logits, batch, divisor)
        (loss / len(divisors)).backward()  # the mean over this step's tasks
        losses[batch.task] += loss.item()
        report.name_suspects(step, batch, logits, losses[batch.task], job)
    losses = mean_over_ranks(losses, step, job)  # not finite: stops every rank, no weight touched
    average_heads(model, job)  # the encoder's gradients were averaged by DDP
    norm = clip_gradients(model, recipe.clip_norm, step)
    share = share_of_peak(step, recipe)  # of the schedule, warm-up and cosine
    scale = tasks[batches[0].task].lr_scale  # accumulate: all tasks have the same
    take_step(learner.optimisers, share, scale)  # idle heads, whose gradients are None, do not move
    return losses, norm, share * scale


def train(recipe: Recipe, job: Job, fresh=()) -> dict:
    """Train to recipe.steps, from where the run's folder stands; evaluate -> the metrics (rank 0).

    fresh: the stages whose folders are emptied first, when nothing stops the first step any more.
    A loss that is not finite, too many damaged videos, a full disk: FloatingPointError, ValueError,
    OSError with one sentence; the last checkpoint stays as it is.
    """
    train_sets, val_sets = open_tasks(recipe, job)
    names = recipe.train_tasks or list(train_sets)
    trained_sets = {name: train_sets[name] for name in names}
    stream = data.Stream(trained_sets, recipe.schedule, recipe.seed, recipe.steps)
    run = Run(recipe, job, stream, train_sets, fresh)  # the folder: last.pt, log, signals
    if run.finished:
        return run.metrics()
    check_evaluation(recipe, val_sets, run.counts)  # what would stop it at the end stops it now
    model = checkpoints.build_model(recipe, run.classes, run.state, job.say).to(job.device)
    methods.wrap_encoder(recipe, model)  # of SpotTune, if that is the method
    criterion = methods.criterion(recipe, model, task_loss)  # self-distillation adds to it
    optimisers = make_optimisers(model, recipe)
    run.resume(model, criterion, optimisers)
    trunk = wrap(model.encoder, recipe, job)
    tasks = {task.name: task for task in recipe.task}
    learner = Learner(model, trunk, criterion, optimisers, tasks)
    work = workers.ahead(recipe.workers)  # in processes that decode
    batches = data.training_batches(
        stream, run.step, recipe.steps, job.rank, job.size, recipe.micro_batches, work
    )
    model.train()
    for step in run.steps():  # after a signal: saves, and leaves the process
        if run.evaluation_due(step):  # of what last.pt may hold: a resumed run makes up for it
            metrics = evaluate(model, recipe, job, val_sets, run.counts, run.ema)
            run.record_evaluation(step, metrics)
            model.train()
        micro_batches = run.next(batches)
        losses, norm, share = train_step(step, micro_batches, learner, recipe, job)
        run.record(step, losses, share, norm, sum(len(batch.video) for batch in micro_batches))
        run.keep(step)
    metrics = evaluate(model, recipe, job, val_sets, run.counts, run.ema, run.out)
    return run.finish(metrics)


# ------------------------------------------------------------------------------------------------
# What the step is made of
# ------------------------------------------------------------------------------------------------


@dataclass
class Divisor:
    """What the parts of a task's loss are divided by, so that they add up to its mean."""

    clips: int = 0  # of this rank, in the step's micro-batches: each rank has as many
    boxes: float = 0.0  # of all ranks, over the number of ranks: each has some, or none


def task_loss(task: data.Task, logits: torch.Tensor, batch: data.Batch, divisor: Divisor):
    """One micro-batch's part of the loss of its task.

    The sum over micro-batches, averaged over the ranks as DDP does, is the loss of one process on
    the whole batch, however unevenly the boxes fall.
    """
    if task.kind == "box":
        return task.loss_weight * box_loss(logits, batch.labels, divisor.boxes)
    share = len(batch.video) / divisor.clips
    return task.loss_weight * clip_loss(logits, batch.labels, task.smoothing) * share


def divisors_of(batches: list[data.Batch], job: Job) -> dict[str, Divisor]:
    """By task of this step."""
    divisors = {}
    for batch in batches:
        divisor = divisors.setdefault(batch.task, Divisor())
        divisor.clips += len(batch.video)
        if batch.boxes is not None:
            divisor.boxes += len(batch.boxes)
    totals = job.sum([divisor.boxes for divisor in divisors.values()])
    for divisor, total in zip(divisors.values(), totals, strict=True):
        divisor.boxes = total / job.size
    return divisors


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout, stochastic depth, SpotTune's draws of a step: the same whenever it is computed."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def exchange(trunk: nn.Module, last: bool):
    """DDP averages the gradients of all micro-batches in the backward of the last: they travel once
    a step. Around the forward, where DDP decides whether the backward that follows exchanges."""
    if last or not hasattr(trunk, "no_sync"):
        return contextlib.nullcontext()
    return trunk.no_sync()


def autocast(recipe: Recipe, job: Job):
    return torch.autocast(job.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


def mean_over_ranks(losses: dict[str, float], step: int, job: Job) -> dict[str, float]:
    """FloatingPointError on every rank at once if a loss of one of them is not finite."""
    sums = job.sum(list(losses.values()))
    means = {}
    for task, total in zip(losses, sums, strict=True):
        means[task] = total / job.size
    if not all(map(math.isfinite, means.values())):
        raise FloatingPointError(
            f"non-finite loss at step {step}: {means}; no weight was changed in this step, and the "
            "last checkpoint is intact"
        )
    return means


def average_heads(model: CoFinetuneModel, job: Job) -> None:
    """Mean over the ranks of the heads' gradients; for the encoder, DDP does it in the backward.

    The heads stay outside of DDP because a step uses only some of them. All ranks train the same
    task, so their gradients are of the same heads; an idle head keeps grad = None.
    """
    if job.size == 1:
        return
    grads = []
    for parameter in model.heads.parameters():
        if parameter.grad is not None:
            grads.append(parameter.grad)
    flat = torch.cat([grad.flatten() for grad in grads])  # one message
    with jobs.errors_of_peers():
        dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    for grad, total in zip(grads, parts, strict=True):
        grad.copy_(total.view_as(grad) / job.size)


def clip_gradients(model: CoFinetuneModel, most: float, step: int) -> float:
    """Their norm before it is made `most` at the most (0: as it is), the same on every rank.
    FloatingPointError if it is not finite, which a finite loss does not exclude."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), most or math.inf).item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"non-finite gradient at step {step}; no weight was changed in this step, and the last "
            "checkpoint is intact"
        )
    return norm


# ------------------------------------------------------------------------------------------------
# Before the first step
# ------------------------------------------------------------------------------------------------


def open_tasks(recipe: Recipe, job: Job) -> tuple[dict, dict]:
    """The training and validation Datasets by task, after rank 0 has made a generated world."""
    if recipe.world and job.first:
        from extras.world import make_world

        make_world(recipe.root, **recipe.world)
    job.barrier()
    train_sets, val_sets = {}, {}
    for task in recipe.task:
        dataset = open_once(task, recipe, "train", job)
        train_sets[task.name] = dataset
        if task.val:
            val_sets[task.name] = open_once(task, recipe, "val", job)
        counted = []
        for what, count in dataset.report.items():
            if count:
                counted.append(f"{count} {what}")
        job.say(f"{task.name}: {len(dataset.classes)} classes, {', '.join(counted)}")
    return train_sets, val_sets


def open_once(task: data.Task, recipe: Recipe, split: str, job: Job) -> data.Dataset:
    """The Dataset; one rank of a machine reads it: a million videos take half a minute."""
    if split == "val" and task.exclude_val and recipe.protocol == "official-2020":
        # It has no exclusions: what nobody looked for there would count as missed.
        job.say(f"{task.name}: official-2020 scores all annotated keyframes, exclude_val or not")
        task = dataclasses.replace(task, exclude_val="")
    return job.read_once(data.open_task, task, recipe.root, split, formats)


def check_evaluation(recipe: Recipe, val_sets: dict, counts: dict) -> None:
    """Evaluate nothing, so that files that cannot be evaluated stop the run before it begins."""
    for name, dataset in val_sets.items():
        if dataset.task.kind == "box":
            nothing = detection_rows({}, len(dataset.classes))
            ava_eval.evaluate(
                detections=nothing, **evaluator_settings(recipe, dataset, counts[name])
            )


def wrap(encoder: nn.Module, recipe: Recipe, job: Job) -> nn.Module:
    """The encoder as the step calls it: compiled, and with the exchange of its gradients."""
    if recipe.compile:
        # Else Dynamo cuts the graph at DDP's buckets, to exchange them during the backward: with
        # checkpointing and a second shape of clips that failed on a GPU (InductorError, submod_1).
        torch._dynamo.config.optimize_ddp = False
        encoder = torch.compile(encoder)
    if job.size > 1:
        encoder = nn.parallel.DistributedDataParallel(encoder, gradient_as_bucket_view=True)
    return encoder


# ------------------------------------------------------------------------------------------------
# Evaluation: rank r of W takes items r, r + W, ...; gathered by key, every key exactly once
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: CoFinetuneModel, recipe: Recipe, job: Job, datasets: dict[str, data.Dataset],
    counts: dict[str, dict], ema: dict | None = None, out: Path | None = None,
) -> dict:  # fmt: skip
    """The metrics of every task on its validation data: collective, complete on rank 0.

    -> {"task": {name: metrics}, "score": what decides on best.pt, "score_is": its name}; with
    averaged weights also "ema": the same of them.
    counts: training boxes per class, for the frequency groups. With `out`, as at a run's end, also
    the chance levels (random scores on the same boxes and clips), detections.csv and the previews.
    """
    model.eval()
    seed_dropout(recipe.seed, 0, job.rank)  # of SpotTune, where it draws at test
    result = {"task": {}, "score": 0.0, "score_is": ""}
    for name, dataset in datasets.items():
        measure = evaluate_boxes if dataset.task.kind == "box" else evaluate_clips
        result["task"][name] = measure(model, recipe, job, dataset, counts[name], out)
        if name not in recipes.trained_tasks(recipe):
            result["task"][name]["trained"] = False
    if job.first:
        trained = [result["task"][name] for name in recipe.train_tasks if name in result["task"]]
        result["score"], result["score_is"] = score_of(trained or result["task"].values())
    if ema:
        raw = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(ema)
        result["ema"] = evaluate(model, recipe, job, datasets, counts)
        model.load_state_dict(raw)
    return result


def score_of(measured) -> tuple[float, str]:
    """What decides on best.pt, and its name. measured: the metrics of each task that counts."""
    scores = [one["mAP"] or 0.0 for one in measured if one["kind"] == "box"]
    name = "mAP"
    if not scores:  # clip tasks alone
        scores = [one["top1"] for one in measured]
        name = "top-1"
    if len(scores) > 1:
        name = f"mean {name}"
    return float(np.mean(scores or [0.0])), name


def predictions(model: CoFinetuneModel, recipe: Recipe, job: Job, dataset: data.Dataset):
    """(batch, logits (B, C) or (K, C)) of this rank's share of a dataset."""
    task = dataset.task
    size = max(1, task.batch // job.size)
    work = workers.ahead(recipe.workers)
    batches = data.evaluation_batches(dataset, size, job.rank, job.size, work)
    progress = report.Progress(job, f"evaluating {task.name}", len(dataset))
    for batch in batches:
        progress.add(len(set(batch.keys)) * job.size)
        batch = batch.to(job.device)
        with autocast(recipe, job):
            video = data.normalise(batch.video, *model.scale)
            logits = model(video, task.name, batch.boxes, batch.box_clip)
        yield batch, logits.float()
    for reason in dataset.damaged.values():
        print(f"task {task.name}, not evaluated: {reason}", file=sys.stderr, flush=True)


def gather_by_key(dataset: data.Dataset, job: Job, results: dict) -> dict | None:
    """All ranks' results on rank 0 in the order of the dataset, None elsewhere.

    RuntimeError for a key that comes twice or is missing, and ValueError if more than bad_share of
    the videos could not be decoded (value None): the number would be wrong. Each rank has seen only
    its own videos, so both are known only here.
    """
    parts = job.gather(results)
    if not job.first:
        return None
    task = dataset.task
    merged, count = {}, 0
    for part in parts:
        merged |= part
        count += len(part)
    if not len(merged) == count == len(dataset):
        raise RuntimeError(
            f"task {task.name}: {len(dataset)} items gave {count} results with {len(merged)} "
            "different keys"
        )
    bad = {key[0] for key, value in merged.items() if value is None}
    if len(bad) > task.bad_share * dataset.videos:
        raise ValueError(
            f"task {task.name} (val): {len(bad)} of {dataset.videos} videos cannot be decoded, "
            f"bad_share = {task.bad_share}"
        )
    # In the order of the dataset: equal scores are ranked by it, for any number of ranks.
    return {item.key: merged[item.key] for item in dataset.items}


def evaluate_clips(model, recipe, job, dataset, counts, out) -> dict:
    """Top-1 and top-5 of the softmax averaged over an item's views, of all clips of the list: one
    that is missing or cannot be decoded is wrong, as a keyframe without detections is missed."""
    sums, labels = {}, {}  # by key; sums: over the views, None if not decodable
    for batch, logits in predictions(model, recipe, job, dataset):
        probabilities = logits.double().softmax(1).cpu()  # (B, C)
        for i, key in enumerate(batch.keys):
            labels[key] = int(batch.labels[i])
            if batch.valid[i]:
                sums[key] = sums.get(key, 0) + probabilities[i]
            else:
                sums[key] = None
    before = {}  # key -> how many classes come before the true one
    for key, scores in sums.items():
        before[key] = None if scores is None else classes_before(labels[key], scores)
    before = gather_by_key(dataset, job, before)
    if before is None:
        return {}
    seen = [count for count in before.values() if count is not None]
    clips = len(before) + dataset.missing_items
    classes = len(dataset.classes)
    return dict(
        kind="clip",
        top1=sum(count < 1 for count in seen) / clips,
        top5=sum(count < 5 for count in seen) / clips,
        clips=clips,
        classes=classes,
        chance=dict(top1=1 / classes, top5=min(5 / classes, 1.0)) if out else {},
        views=math.prod(dataset.task.views),
        missing=dataset.missing_items,
        undecodable=len(before) - len(seen),
    )


def classes_before(label: int, scores: torch.Tensor) -> int:
    """How many other classes come before the true one, by scores (C,). A tie does, so an untrained
    head is never right; nan, of weights that diverged, is behind any number of classes."""
    if scores.isnan().any():
        return len(scores) + 5
    below = int((scores < scores[label]).sum())
    return len(scores) - 1 - below


def evaluate_boxes(model, recipe, job, dataset, counts, out) -> dict:
    """AVA mAP; a row per box and class, whose score is class probability times detector score."""
    task = dataset.task
    detections = {}
    for batch, logits in predictions(model, recipe, job, dataset):
        scores = logits.sigmoid() * batch.scores[:, None]  # (K, C)
        if not scores.isfinite().all():
            raise FloatingPointError(f"task {task.name}: non-finite scores; the weights diverged")
        scores = scores.cpu().numpy()
        box_clip = batch.box_clip.numpy()
        for i, key in enumerate(batch.keys):
            mine = box_clip == i
            detections[key] = None  # not decodable
            if batch.valid[i]:
                detections[key] = batch.boxes_source[mine], scores[mine]
    detections = gather_by_key(dataset, job, detections)
    if detections is None:
        return {}
    rows = detection_rows(detections, len(dataset.classes))
    chosen = evaluator_settings(recipe, dataset, counts)
    result = ava_eval.evaluate(detections=rows, **chosen)
    result["kind"] = "box"
    result["boxes"] = "detected" if task.val_boxes else "annotated"
    result["missing"] = dataset.missing_items
    result["undecodable"] = list(detections.values()).count(None)
    result["chance"] = {}
    if out:
        result["chance"] = chance_of(rows, chosen)
        several = sum(other.kind == "box" for other in recipe.task) > 1
        end = f"-{task.name}" if several else ""
        ava_eval.write_csv(out / f"detections{end}.csv", rows)
        if recipe.preview:
            report.preview(recipe, dataset, detections, out / f"preview{end}")
    return result


def chance_of(rows: ava_eval.Rows, chosen: dict) -> dict[str, float]:
    """mAP, and that of each frequency group, of the same boxes with random scores."""
    scores = np.random.default_rng(0).random(len(rows.score))
    measured = ava_eval.evaluate(detections=dataclasses.replace(rows, score=scores), **chosen)
    result = {"mAP": measured["mAP"]}
    for group, of_group in measured["groups"].items():
        result[group] = of_group["mAP"]
    return result


def evaluator_settings(recipe: Recipe, dataset: data.Dataset, counts: dict) -> dict:
    """What ava_eval.evaluate takes beside the detections."""
    task, root = dataset.task, Path(recipe.root)
    chosen = dict(
        groundtruth=data.files_of(root / task.val),  # several: pooled, and each part
        protocol=recipe.protocol,
        train_counts=counts,
        labelmap=formats.read_classes(root / (task.eval_labels or task.labels)),
        thresholds=(recipe.head_above, recipe.tail_below),
    )
    if task.exclude_val:
        chosen["exclusions"] = root / task.exclude_val
    return chosen


def detection_rows(detections: dict, classes: int) -> ava_eval.Rows:
    """{(video_id, microseconds): (boxes (k, 4), scores (k, C)) | None}: a row per box and class."""
    videos, times = [], []
    boxes, scores = [np.zeros((0, 4))], [np.zeros(0)]
    for (video, stamp), value in detections.items():
        if value is None:
            continue
        boxes_here, scores_here = value
        count = len(boxes_here) * classes
        videos += [video] * count
        times += [stamp / 1e6] * count
        boxes.append(boxes_here)
        scores.append(scores_here.ravel())
    boxes = np.concatenate(boxes)  # (K, 4)
    return ava_eval.Rows(
        video_id=np.array(videos, str),
        time_sec=np.array(times, np.float64),
        boxes=np.repeat(boxes, classes, axis=0),
        label=np.tile(np.arange(1, classes + 1), len(boxes)),
        score=np.concatenate(scores),
    )


# ------------------------------------------------------------------------------------------------
# The one door
# ------------------------------------------------------------------------------------------------

COMMANDS = {  # name: (module of extras, or "" for here; one line)
    "train": ("", "train a recipe, go on where it stood, evaluate (the default: the demo)"),
    "evaluate": ("evaluation", "the metrics of a checkpoint, alone"),
    "predict": ("predict", "videos -> labelled persons, classes, annotated films"),
    "persons": ("persons", "videos -> boxes of the persons in them, by a detector"),
    "import": ("importing", "own videos and labels -> annotations, a split, a recipe"),
    "show": ("videos", "a picture of annotated keyframes, before any training"),
    "check": ("videos", "every annotation and every video: what is missing or damaged"),
    "prepare": ("videos", "re-encode videos once, so that reading a clip costs a fraction"),
    "info": ("info", "what a checkpoint holds, of any family that is read"),
    "export": ("export", "encoder and a head -> ONNX, torch.export, or a Hugging Face folder"),
    "compare": ("compare", "the method beside its rivals, by seeds, with intervals"),
    "versus": ("versus", "two files of AVA detections: is the one better, with intervals"),
    "bench": ("bench", "what it costs, against what one would use instead"),
    "world": ("world", "a generated world of videos and annotations, as the demo's"),
}


def add_train_options(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(recipes.names())
    parser.add_argument("--recipe", default="demo", help=f"a TOML file or one of {known} (demo)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over instead of resuming the run's folder"
    )


def run_train(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
    recipe = recipes.read(Recipe, options.recipe, overrides, options.fresh)
    job = jobs.join(recipe)
    stages = methods.stages(recipe)
    for number, stage in enumerate(stages):
        train(stage, job, stages if options.fresh and number == 0 else ())


def main(words: list[str]) -> int:
    """A command line -> its exit status. Errors of the user: ValueError, OSError, DecodeError."""
    if words and words[0] in ("-h", "--help"):
        print(door.overview(COMMANDS))
        return 0
    here = sys.modules[__name__]  # what commands need of the method: they do not import this file
    run, options, overrides = door.parse(words, COMMANDS, here)
    code = run(options, overrides, here)
    if dist.is_initialized():
        # Wait: gloo may abort when a rank leaves while another still speaks.
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()
    return int(code or 0)


if __name__ == "__main__":
    jobs.run_and_leave(main, sys.argv[1:])
