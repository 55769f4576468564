"""Co-finetuning: one video transformer learns clip classification and action localisation at once.

    python cofinetune.py                              the demo: makes its videos, trains, evaluates
    python cofinetune.py --recipe my.toml --lr 0.05 --task.ava.batch 16    any value is an option
    ./train_ddp.sh vivit-b                            every GPU of this machine
    python cofinetune.py evaluate runs/demo/last.pt   the metrics of a checkpoint, alone
    python cofinetune.py predict runs/demo/last.pt video.mp4 --boxes boxes.csv
    python cofinetune.py compare                      the method beside its rivals (baselines.py)

The method (Arnab et al., arXiv 2207.03807): instead of pretraining on upstream clip datasets and
then finetuning on the downstream localisation dataset, every step takes a batch of *one* of the
datasets; the shared encoder is updated by all of them, each head by its own. The loop is `train`;
what stands around it sees to it that nothing is lost and that nothing goes wrong in silence.

A run's folder holds recipe.toml (everything resolved: starts the run again), log.jsonl (an object
per step), last.pt and best.pt, detections.csv, metrics.json, and pictures: curves, keyframes.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
import textwrap
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ava_eval
import data
from data import Task
from extras import pictures, videos
from model import SIZES, CoFinetuneModel, Head, ModelConfig, box_loss, clip_loss

# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """Everything that decides a run: the keys of a TOML file, with its [model] and [[task]]."""

    name: str = "own"
    out: str = "runs/own"  # the run's folder
    root: str = "."  # data paths start here; itself relative to the recipe's file
    world: dict = field(default_factory=dict)  # sizes of world.make_world; {}: the videos exist
    init: str = ""  # checkpoint of any family of pretrained.py; "": from scratch
    method: str = "cofinetune"  # | finetune | downstream | [finetune+](selfdistil | spottune)
    method_options: dict = field(default_factory=dict)  # of the class in baselines.py
    train_tasks: list = field(default_factory=list)  # names of the trained tasks; []: all
    seed: int = 0  # of initialisation, batches and augmentation
    steps: int = 600  # updates, over all tasks
    schedule: str = "round_robin"  # | weighted | accumulate (data.Stream)
    micro_batches: int = 1  # pieces of a batch, to fit in memory; the gradient is the same
    # optimisation
    optimiser: str = "sgd"  # sgd (ViViT) | adamw (VideoMAE) | muon (blocks; AdamW the rest)
    lr: float = 0.1  # peak, at the stated batch sizes; muon: of the blocks' matrices
    adam_scale: float = 0.075  # muon: rate of everything else (by AdamW), as a share of lr
    momentum: float = 0.9  # sgd, muon
    betas: list = field(default_factory=lambda: [0.9, 0.999])  # adamw
    weight_decay: float = 0.0  # never on 1-D parameters, the class token and positions
    layer_decay: float = 1.0  # block i learns at lr * layer_decay ** (depth - i); 1: equally
    warmup: int = 50  # steps of linear warm-up
    final_lr: float = 0.0  # end of the cosine, as a share of the peak
    clip_norm: float = 1.0  # of the gradient, after the exchange; 0: off
    ema: float = 0.0  # decay of averaged weights, evaluated beside the raw; 0: off
    # input scale of the encoder, one for all tasks; an `init` checkpoint brings its own;
    # both []: each clip by its own mean and deviation
    mean: list = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list = field(default_factory=lambda: [0.5, 0.5, 0.5])
    # machine
    precision: str = "float32"  # (GPU: TF32) | bf16 (autocast, but for losses and RoIAlign)
    compile: bool = False  # torch.compile of the encoder; pays on a GPU
    device: str = "auto"  # | cpu | cuda
    workers: int = 2  # decoding processes per rank, for all tasks together
    threads: int = 0  # of torch per rank; 0: torch's choice
    # evaluation and records
    protocol: str = "official-2020"  # of the AVA mAP (ava_eval.py)
    head_above: int = 10_000  # frequency groups by training boxes per class: parameters, for
    tail_below: int = 1_000  # the paper's own thresholds could not be consulted
    log_every: int = 20  # steps per printed line; log.jsonl has every step
    eval_every: int = 0  # steps; 0: only at the end
    save_every: int = 200  # steps between writes of last.pt
    keep_every: int = 0  # steps between checkpoints kept for good; 0: none
    preview: int = 12  # keyframes in preview.png and preview.mp4; 0: none
    model: dict = field(default_factory=dict)  # arch: a size of model.py; or fields of ModelConfig
    task: list = field(default_factory=list)  # data.Task, one per dataset


# Runs that differ only in these train the same weights, up to rounding: they may resume each other.
FREE = {
    "name",
    "out",
    "root",
    "micro_batches",
    "compile",
    "device",
    "workers",
    "threads",
    "precision",
    "protocol",
    "head_above",
    "tail_below",
    "log_every",
    "eval_every",
    "save_every",
    "keep_every",
    "preview",
    "task",
}
FREE_IN_TASK = {
    "val",
    "val_videos",
    "val_boxes",
    "val_box_score",
    "val_fit",
    "views",
    "videos",
    "exclude_val",
    "eval_labels",
    "bad_share",
}

# Optimiser, clip length, augmentation and views follow the public ViViT recipe (Scenic); which ones
# the co-finetuning paper used is unknown. Not run by us: these datasets were not at hand.
_AVA = dict(
    name="ava",
    kind="box",
    train="ava/annotations/ava_train_v2.2.csv",
    videos="ava/videos",
    val="ava/annotations/ava_val_v2.2.csv",
    labels="ava/annotations/ava_action_list_v2.2.pbtxt",
    eval_labels="ava/annotations/ava_action_list_v2.2_for_activitynet_2019.pbtxt",
    exclude_train="ava/annotations/ava_train_excluded_timestamps_v2.2.csv",
    exclude_val="ava/annotations/ava_val_excluded_timestamps_v2.2.csv",
    val_boxes="ava/annotations/ava_val_predicted_boxes.csv",
    batch=64,
    weight=2.0,
    dropout=0.5,
    colour=0.4,
)
_CLIP = dict(kind="clip", batch=64, views=[4, 3], colour=0.4)
_VIVIT = dict(
    root="data",
    steps=300_000,
    schedule="weighted",
    lr=0.1,
    warmup=15_000,
    precision="bf16",
    compile=True,
    workers=12,
    log_every=50,
    save_every=1_000,
    eval_every=20_000,
    task=[
        _AVA,
        dict(
            _CLIP,
            name="kinetics400",
            train="kinetics400/train.csv",
            val="kinetics400/val.csv",
            videos="kinetics400/train",
            val_videos="kinetics400/val",
            weight=8.0,
        ),
        dict(
            _CLIP,
            name="moments",
            train="moments/trainingSet.csv",
            weight=8.0,
            val="moments/validationSet.csv",
            labels="moments/moments_categories.txt",
            videos="moments/training",
            val_videos="moments/validation",
        ),
        dict(
            _CLIP,
            name="ssv2",
            train="ssv2/something-something-v2-train.json",
            stride=1,
            val="ssv2/something-something-v2-validation.json",
            videos="ssv2/videos",
            flip=0.0,
            labels="ssv2/something-something-v2-labels.json",
            weight=4.0,
        ),
    ],
)
_LARGE = dict(arch="L", drop_path=0.1, checkpointing=True)
_SMALL = dict(frames=8, stride=2, fps=16.0, size=48, short_side=[56, 56], batch=16)
_DEMO = dict(
    root="data/demo",
    world={"seed": 0},
    steps=900,
    optimiser="muon",
    lr=0.04,
    betas=[0.9, 0.98],
    weight_decay=0.05,
    warmup=70,
    final_lr=0.01,
    mean=[],
    std=[],
    workers=1,
    threads=1,
    head_above=100,
    tail_below=25,
    log_every=50,
    model=dict(
        arch="tiny",
        frames=8,
        size=[48, 48],
        tubelet=[4, 8, 8],
        pos="learned-axes",
        qk_init="mimetic",
    ),
    task=[
        dict(
            _SMALL,
            name="actions",
            kind="clip",
            videos="actions",
            labels="actions/classes.txt",
            train="actions/train.txt",
            val="actions/val.txt",
            flip_swap=[[1, 2]],
        ),
        dict(
            _SMALL,
            name="templates",
            kind="clip",
            videos="templates/videos",
            labels="templates/labels.json",
            train="templates/train.json",
            val="templates/validation.json",
        ),
        dict(
            _SMALL,
            name="ava",
            kind="box",
            videos="ava/videos",
            offset_sec=901.5,
            labels="ava/action_list.pbtxt",
            train="ava/train.csv",
            val="ava/val.csv",
            val_boxes="ava/val_boxes.csv",
            val_fit="crop",
            flip_swap=[[4, 5]],
            prior=0.07,
            roi_size=3,
        ),
    ],
)
RECIPES = {
    "demo": _DEMO,
    # For `compare`: 64 downstream keyframes against 4000 upstream clips, so that downstream data,
    # not compute, is the bottleneck. Seeds from 10, each a world of its own; tuning from 1010.
    "evidence": _DEMO
    | dict(
        root="data/evidence",
        seed=10,
        steps=1200,
        warmup=96,
        head_above=20,
        tail_below=8,
        preview=0,
        world=dict(
            seed=10,
            scenes_train=64,
            min_positives=3,
            scenes_val=400,
            actions_train=2400,
            templates_train=1600,
        ),
    ),
    "vivit-b": dict(_VIVIT, model=dict(arch="B")),
    "vivit-l": dict(_VIVIT, model=_LARGE),
    "vivit-b-finetune": dict(_VIVIT, method="finetune", model=dict(arch="B")),
    "vivit-l-finetune": dict(_VIVIT, method="finetune", model=_LARGE),
}
CHOICES = {
    "method": (
        "cofinetune",
        "finetune",
        "downstream",
        "selfdistil",
        "spottune",
        "finetune+selfdistil",
        "finetune+spottune",
    ),
    "schedule": ("round_robin", "weighted", "accumulate"),
    "optimiser": ("sgd", "adamw", "muon"),
    "precision": ("float32", "bf16"),
    "device": ("auto", "cpu", "cuda"),
    "protocol": tuple(ava_eval.PROTOCOLS),
}


def read_recipe(source: str, overrides: dict[str, str] | None = None) -> Recipe:
    """A built-in recipe or a TOML file, with values overridden by name, checked as a whole.

    overrides: text by key: "lr", "model.drop_path", "task.NAME.batch". All problems stand in the
    one ValueError: unknown keys, wrong types, missing files, what cannot be trained.
    """
    overrides = overrides or {}
    if source in RECIPES:
        table, base = json.loads(json.dumps(RECIPES[source])), Path(".")
        table = {"name": source, "out": f"runs/{source}"} | table
    elif os.path.exists(source):
        table, base = data.read_recipe(source), Path(source).resolve().parent
        table = {"name": Path(source).stem, "out": f"runs/{Path(source).stem}"} | table
    else:
        raise ValueError(f"recipe {source}: neither a file nor one of {', '.join(RECIPES)}")
    if type(table.setdefault("model", {})) is not dict:
        raise ValueError(f"recipe {source}: model = {table['model']!r} is not a table")
    if type(table.setdefault("task", [])) is not list or {*map(type, table["task"])} - {dict}:
        raise ValueError(f"recipe {source}: task is no list of tables, expected [[task]]")
    problems = []
    for key, text in overrides.items():
        where, _, name = key.rpartition(".")
        target = {"": table, "model": table["model"]}.get(where)
        for task in table["task"]:
            target = task if where == f"task.{task.get('name')}" else target
        if target is None:
            problems.append(f"--{key}: the recipe has no such table")
        else:
            target[name] = _value(text, (Task if key.startswith("task.") else Recipe), name)
    if "root" in overrides:
        base = Path(".")  # what is typed is relative to where it is typed
    for key, problem in data.misfits(Recipe, table).items():
        problems.append(problem)
        del table[key]
    try:
        table["task"] = data.read_tasks(table.get("task", []), source)
    except ValueError as error:
        problems.append(str(error))
        table["task"] = []
    recipe = Recipe(**table)
    recipe.root = str((base / recipe.root).resolve())
    if problems := problems + check(recipe):
        raise ValueError(f"recipe {source} cannot be run:\n  " + "\n  ".join(problems))
    return recipe


def _value(text: str, owner: type, name: str):
    """The TOML value that a text on the command line spells; a bare word is a string."""
    if owner.__annotations__.get(name) is str:
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def out_of_range(recipe: Recipe) -> list[str]:
    """The values that are wrong by themselves, whatever the data."""
    found = [
        f"{key} = {value!r} is not one of {', '.join(allowed)}"
        for key, allowed in CHOICES.items()
        if (value := getattr(recipe, key)) not in allowed
    ]
    for least, keys in {
        1: ("steps", "micro_batches", "log_every", "save_every"),
        0: (
            "seed",
            "workers",
            "threads",
            "lr",
            "weight_decay",
            "clip_norm",
            "ema",
            "momentum",
            "warmup",
            "eval_every",
            "keep_every",
            "preview",
            "layer_decay",
            "final_lr",
            "adam_scale",
        ),
    }.items():
        found += [
            f"{key} = {value} must be at least {least}"
            for key in keys
            if (value := getattr(recipe, key)) < least
        ]
    found += [
        f"{key} = {value} must be below 1"
        for key in ("ema", "momentum")
        if (value := getattr(recipe, key)) >= 1
    ]
    if len(recipe.betas) != 2 or not all(
        type(b) in (int, float) and 0 <= b < 1 for b in recipe.betas
    ):
        found.append(f"betas = {recipe.betas} are not two numbers from 0 to below 1")
    return found


def check(recipe: Recipe) -> list[str]:
    """What would stop the run later on, found before the first video is opened."""
    found = out_of_range(recipe)
    if recipe.schedule == "weighted" and not any(task.weight for task in recipe.task):
        found.append("schedule weighted: all weights are 0")
    if len(recipe.mean) != len(recipe.std) or len(recipe.mean) not in (0, 3):
        found.append("mean and std have three values each, or none for statistics of each clip")
    config = None
    try:
        config = None if recipe.init else model_config(recipe.model)
    except (ValueError, TypeError, ArithmeticError) as error:
        found.append(f"[model]: {error}")
    names = [task.name for task in recipe.task]
    found += [
        f"task name {name!r}: letters, digits, - and _ only"
        for name in names
        if not re.fullmatch(r"[\w-]+", name)
    ]
    if not names:
        found.append("no [[task]] table: at least one dataset is needed")
    found += [
        f"train_tasks: no task is called {name!r}"
        for name in recipe.train_tasks
        if name not in names
    ]
    if recipe.method == "spottune" and not recipe.init:
        found.append(
            "method spottune chooses between pretrained and finetuned blocks: it needs "
            "init, or take finetune+spottune"
        )
    staged = recipe.method.startswith(("finetune", "downstream"))
    if staged and {task.kind for task in recipe.task} != {"clip", "box"}:
        found.append(f"method {recipe.method} needs upstream (clip) and downstream (box) tasks")
    if recipe.schedule == "accumulate" and len({task.lr_scale for task in recipe.task}) > 1:
        found.append(
            "accumulate makes one update for all tasks: lr_scale must be equal; use loss_weight"
        )
    if recipe.init and not any(map(os.path.exists, (recipe.init, f"{recipe.out}/last.pt"))):
        found.append(f"init = {recipe.init} does not exist")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    for task in recipe.task:
        if task.batch % (ranks * max(recipe.micro_batches, 1)):
            found.append(
                f"task {task.name}: batch = {task.batch} is not a multiple of {ranks} "
                f"processes x {recipe.micro_batches} micro batches"
            )
        if config and (task.frames % config.tubelet[0] or task.size % config.tubelet[1]):
            found.append(
                f"task {task.name}: {task.frames} frames of {task.size} px are not a "
                f"whole number of tubelets {tuple(config.tubelet)}"
            )
        if config and task.val_fit == "full" and any(16 % side for side in config.tubelet[1:]):
            found.append(
                f"task {task.name}: val_fit full makes sides multiples of 16, not of the "
                f"tubelet {tuple(config.tubelet)}; take crop or squash"
            )
        for key in (
            "train",
            "val",
            "videos",
            "val_videos",
            "labels",
            "eval_labels",
            "exclude_train",
            "exclude_val",
            "train_boxes",
            "val_boxes",
        ):
            path = os.path.join(recipe.root, getattr(task, key))
            expected = getattr(task, key) and not recipe.world and "*" not in path
            if expected and not os.path.exists(path):
                found.append(f"task {task.name}: {key} = {path} does not exist")
    return found


def model_config(table: dict) -> ModelConfig:
    """The [model] table: `arch` is a size of model.py, every other key a field of ModelConfig."""
    table = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    arch = table.pop("arch", "B")
    if arch not in SIZES:
        raise ValueError(f"arch = {arch!r} is not one of {', '.join(SIZES)}")
    return ModelConfig(**{**SIZES[arch], **table})


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `read_recipe` makes the same recipe of it."""

    def value(v) -> str:
        if isinstance(v, dict):
            return "{" + ", ".join(f"{k} = {value(x)}" for k, x in v.items()) + "}"
        if isinstance(v, (list, tuple)):
            return "[" + ", ".join(map(value, v)) + "]"
        return json.dumps(v, ensure_ascii=False) if isinstance(v, (str, bool)) else repr(v)

    table = dataclasses.asdict(recipe)
    tables = [
        ("", table),
        ("\n[model]\n", table.pop("model")),
        *(("\n[[task]]\n", task) for task in table.pop("task")),
    ]
    return "".join(
        head + "".join(f"{key} = {value(v)}\n" for key, v in table.items())
        for head, table in tables
    )


def stages(recipe: Recipe) -> list[Recipe]:
    """The trainings that make up a method, in order.

    `finetune`: the upstream tasks for as many steps as the schedule gives them, then the downstream
    tasks for theirs, each with a warm-up and a cosine of its own: every dataset is seen as often as
    in co-finetuning. The idle upstream heads stay in the model, so that the second stage also tells
    what is left of the upstream accuracy. `downstream` is the second stage alone.
    """
    method, _, wrapper = recipe.method.partition("+")
    if method not in ("finetune", "downstream"):
        return [recipe]
    share = {t.name: t.weight if recipe.schedule == "weighted" else 1.0 for t in recipe.task}
    kinds = {kind: [t.name for t in recipe.task if t.kind == kind] for kind in ("clip", "box")}
    first = round(recipe.steps * sum(share[n] for n in kinds["clip"]) / sum(share.values()))
    steps = {"clip": first, "box": recipe.steps - first}
    upstream, downstream = (
        dataclasses.replace(
            recipe,
            method="cofinetune",
            steps=steps[kind],
            train_tasks=kinds[kind],
            warmup=min(recipe.warmup, steps[kind] // 2),
        )
        for kind in ("clip", "box")
    )
    if method == "downstream":
        return [downstream]
    upstream = dataclasses.replace(
        upstream, method_options={}, preview=0, out=f"{recipe.out}/upstream"
    )
    downstream = dataclasses.replace(
        downstream, method=wrapper or "cofinetune", init=f"{upstream.out}/last.pt"
    )
    return [upstream, downstream]


# ------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------


@dataclass
class World:
    """This process among those of the job. One process takes the same path, without exchange."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise, over the ranks; through the CPU, so that it does not wait for the GPU's
        queue. Every rank waits for it, so it is the barrier as well."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, part) -> list:
        """The parts of all ranks, on rank 0; [] on the others."""
        if self.size == 1:
            return [part]
        parts = [None] * self.size if self.rank == 0 else None
        dist.gather_object(part, parts)
        return parts or []


def setup(recipe: Recipe) -> World:
    """Join the job that torchrun describes in the environment; a plain `python` is a job of one."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    cuda = recipe.device == "cuda" or recipe.device == "auto" and torch.cuda.is_available()
    if cuda and not torch.cuda.is_available():
        raise ValueError("device = cuda, but torch finds no GPU here; --device cpu works anywhere")
    rank, local, size = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if cuda:
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    if size > 1:  # counts, losses and results travel over gloo, a GPU's gradients over NCCL
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return World(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"))


def print0(*words) -> None:
    """Print on the job's first process."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


class Interrupt:
    """SIGINT and SIGTERM ask for a stop after the current step. A second Ctrl-C stops at once; a
    second SIGTERM does not: torchrun sends one to the ranks that are still saving."""

    def __init__(self):
        self.received = 0
        self.previous = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _receive(self, number: int, frame) -> None:
        self.received = number
        signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# Model, optimisers, checkpoints
# ------------------------------------------------------------------------------------------------


def build_model(
    recipe: Recipe, classes: dict[str, list[str]], state: dict | None = None
) -> CoFinetuneModel:
    """The model a run starts with: of the checkpoint `state` > of recipe.init > from scratch."""
    torch.manual_seed(recipe.seed)
    heads = {
        t.name: Head(t.kind, len(classes[t.name]), t.dropout, t.roi_size, t.prior)
        for t in recipe.task
    }
    if state:
        scale = dict(mean=state["mean"], std=state["std"])
        model = CoFinetuneModel(ModelConfig(**state["model_config"] | scale), heads)
    elif recipe.init:
        from extras import pretrained

        found = pretrained.load(recipe.init)
        # The checkpoint decides on the architecture; of [model] count the keys that leave it.
        free = {"frames", "size", "drop_path", "checkpointing"} & recipe.model.keys()
        changes = {key: recipe.model[key] for key in free}
        model = pretrained.build(found, heads, mean=found.mean, std=found.std, **changes)
        print0(f"initialised from {recipe.init} ({found.family})")
    else:
        scale = dict(mean=recipe.mean, std=recipe.std)
        model = CoFinetuneModel(model_config(recipe.model | scale), heads)
        print0("initialised from scratch")
    return model


def make_optimisers(model: CoFinetuneModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One optimiser, or two for muon. A parameter group's `peak` is its rate at the schedule's top.

    Layers for layer_decay as in BEiT and VideoMAE: the embedding is 0, block i is i + 1, the final
    norm and all heads are depth + 1.
    """
    depth, groups = len(model.encoder.blocks), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else depth + 1
        if name.startswith(("encoder.patch", "encoder.cls", "encoder.pos")):
            layer = 0
        matrix = recipe.optimiser == "muon" and block is not None and p.ndim == 2
        decay = 0.0 if p.ndim < 2 or name.endswith((".cls", ".pos")) else recipe.weight_decay
        peak = recipe.lr * recipe.layer_decay ** (depth + 1 - layer)
        if recipe.optimiser == "muon" and not matrix:
            peak *= recipe.adam_scale
        groups.setdefault((matrix, peak, decay), []).append(p)
    tables = {True: [], False: []}
    for (matrix, peak, decay), params in groups.items():
        tables[matrix].append(dict(params=params, lr=peak, peak=peak, weight_decay=decay))
    if recipe.optimiser == "sgd":
        # Not fused: that fails (torch 2.13) when a head gets its first gradient after step 0.
        return [torch.optim.SGD(tables[False], momentum=recipe.momentum)]
    adamw = torch.optim.AdamW(tables[False], betas=tuple(recipe.betas), fused=True)
    return (
        [adamw]
        if recipe.optimiser == "adamw"
        else [Muon(tables[True], momentum=recipe.momentum), adamw]
    )


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, each matrix's step made orthogonal by five Newton-Schulz iterations, so
    that all its directions learn at one rate (Jordan et al. 2024, whose coefficients these are).

    torch.optim.Muon is the same but for two things: it multiplies in bfloat16 everywhere, which
    takes a CPU without such instructions ten times as long, and matrix by matrix.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                grads = torch.stack([p.grad for p in params])  # (P, rows, columns)
                slow = torch.stack(buffers).lerp_(grads, 1 - group["momentum"])
                torch._foreach_copy_(buffers, list(slow))
                change = orthogonal(grads.lerp_(slow, group["momentum"]))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    params,
                    list(change.to(params[0].dtype)),
                    alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5,
                )


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """(P, rows, columns) -> matrices with the same singular vectors and values from 0.7 to 1.2."""
    fast = x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = x.to(torch.bfloat16 if fast else torch.float32)
    wide = x if x.shape[1] <= x.shape[2] else x.mT  # the smaller of the two Gram matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = torch.baddbmm(
            wide, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445
        )
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def lr_at(step: int, recipe: Recipe) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to final_lr."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def save(path: Path, state: dict) -> None:
    """Write a checkpoint whole or not at all: temporary file, fsync, rename, fsync the folder."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:  # the latter: a full disk, by torch's zip writer
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}); the one before it is intact"
        ) from error


def load(path: str | Path) -> dict:
    """A checkpoint of this project: tensors and plain values, nothing is unpickled. ValueError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or "model_config" not in state or "recipe" not in state:
        raise ValueError(f"{path}: not a checkpoint of this project; `--init` reads other families")
    return state


def recipe_of(state: dict) -> Recipe:
    try:
        tasks = [Task(**table) for table in state["recipe"]["task"]]
        return Recipe(**state["recipe"] | {"task": tasks})
    except (TypeError, LookupError) as error:
        raise ValueError(f"the checkpoint's recipe is not of this version: {error}") from None


def model_of(state: dict) -> CoFinetuneModel:
    """The trained model of a checkpoint, with the network of its method."""
    recipe = recipe_of(state)
    model = build_model(recipe, state["classes"], state)
    if recipe.method == "spottune":
        from extras import methods

        methods.attach("spottune", model, recipe.method_options)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(
            "the checkpoint's weights do not fit its recipe: " + " ".join(str(error).split())
        ) from None
    return model


def differences(recipe: Recipe, saved: Recipe) -> list[str]:
    """The values in which a recipe contradicts the one of the checkpoint that it would resume."""
    pairs = [("", dataclasses.asdict(recipe), dataclasses.asdict(saved), FREE)]
    tasks = {task.name: vars(task) for task in saved.task}
    pairs += [
        (f"task.{task.name}.", vars(task), tasks.get(task.name, {}), FREE_IN_TASK)
        for task in recipe.task
    ]
    return [
        f"{where}{key} = {new[key]!r} (checkpoint: {old.get(key)!r})"
        for where, new, old, free in pairs
        for key in new
        if key not in free and new[key] != old.get(key)
    ]


# ------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------


class Log:
    """log.jsonl (every step), the progress line, TensorBoard where it is installed. Rank 0 writes.

    What depends on the machine stands under "time", so that two logs can be compared without it.
    """

    def __init__(self, out: Path, world: World, recipe: Recipe, start: int):
        self.path, self.world = out / "log.jsonl", world
        self.steps, self.every = recipe.steps, recipe.log_every
        self.tty, self.board, self.waited = sys.stdout.isatty(), None, 0.0
        self.window, self.since, self.damaged = [], time.time(), set()
        if world.rank:
            return
        kept = []
        for line in self.path.read_text().splitlines(True) if self.path.exists() else ():
            if not line.endswith("}\n"):  # a kill can leave half a line
                continue
            record = json.loads(line)  # what came after the checkpoint will come again
            if "final" not in record and record["step"] < start + ("metrics" in record):
                kept.append(line)
        write_text(self.path, "".join(kept))
        self.file = open(self.path, "a")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out), purge_step=start)

    def next(self, batches):
        """The next batch, with the time that it kept the loop waiting."""
        began = time.time()
        batch = next(batches)
        self.waited = time.time() - began
        return batch

    def step(
        self,
        step: int,
        losses: dict,
        lr: float,
        norm: float,
        clips: int,
        damaged: dict,
        extra: dict,
    ) -> None:
        for path in damaged.keys() - self.damaged:  # on the rank that met it
            self.damaged.add(path)
            self.show(f"{path} cannot be decoded: another clip of its task is trained instead")
        if self.world.rank:
            return
        now = time.time()
        record = dict(
            step=step,
            loss=losses,
            lr=lr,
            grad_norm=norm,
            **extra,
            time=dict(unix=round(now, 3), waited_sec=round(self.waited, 4)),
        )
        self.file.write(json.dumps(record) + "\n")
        if self.board:
            for key, value in (losses | dict(lr=lr, grad_norm=norm)).items():
                self.board.add_scalar(f"train/{key}", value, step)
        self.window.append((losses, clips, self.waited))
        if (step + 1) % self.every and step + 1 < self.steps:
            return
        self.file.flush()
        seconds, by_task = max(now - self.since, 1e-9), {}
        history, seen, waits = zip(*self.window)
        for losses in history:
            for task, loss in losses.items():
                by_task.setdefault(task, []).append(loss)
        memory = (
            torch.cuda.max_memory_allocated() / 2**30
            if self.world.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        )
        left = round((self.steps - step - 1) * seconds / len(history))
        words = [
            f"step {step + 1}/{self.steps}",
            *(f"{task} {np.mean(values):.3f}" for task, values in by_task.items()),
            f"lr {lr:.2g}",
            f"{sum(seen) / seconds:.0f} clips/s",
            f"data wait {sum(waits) / seconds:.0%}",
            f"{memory:.1f} GiB",
            f"left {datetime.timedelta(seconds=left)}",
        ]
        words += [f"damaged videos {len(damaged)}"] if damaged else []
        self.show("  ".join(words), end="" if self.tty and step + 1 < self.steps else "\n")
        self.window, self.since = [], now

    def show(self, text: str, end: str = "\n") -> None:
        over = "\r\x1b[K" if self.tty else ""  # the progress line
        print(over + text, end=end, flush=True)

    def suspects(self, step: int, batch: data.Batch, logits: torch.Tensor) -> None:
        """Name the clips whose logits are not finite; all of the batch if only the loss is not."""
        bad = ~torch.isfinite(logits).all(1).cpu()
        clips = batch.box_clip[bad] if batch.boxes is not None else bad.nonzero()[:, 0]
        keys = [batch.keys[i] for i in sorted(set(clips.tolist()))] or batch.keys
        print(
            f"\nstep {step}, task {batch.task}, rank {self.world.rank}: the loss is not finite; "
            f"clips: {', '.join(map(str, keys))}",
            file=sys.stderr,
            flush=True,
        )

    def evaluation(self, step: int, metrics: dict, **more) -> None:
        if self.world.rank:
            return
        self.file.write(json.dumps(dict(step=step, metrics=metrics, **more)) + "\n")
        self.file.flush()
        self.show(summary(metrics))
        self.since = time.time()
        if not self.board:
            return
        for name, m in metrics["task"].items():
            value = m["mAP"] if m["kind"] == "box" else m["top1"]
            self.board.add_scalar(f"val/{name}", value, step)
        if (picture := self.path.with_name("preview.png")).exists():
            frame = data.decode_clip(picture, [0])[0]
            self.board.add_image("preview", frame, step, dataformats="HWC")

    def sync(self) -> None:
        """On the disk, before the checkpoint that counts on it."""
        self.file.flush()
        os.fsync(self.file.fileno())


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def summary(metrics: dict) -> str:
    """The printed form of a metrics.json: every number with its protocol, counts and chance."""
    lines = []
    for name, m in metrics["task"].items():

        def chance(key: str) -> str:
            value = m["chance"].get(key)
            return "" if value is None else f" (chance {value:.4f})"

        if m["kind"] == "clip":
            lines.append(
                f"{name}: top-1 {m['top1']:.4f}{chance('top1')}, "
                f"top-5 {m['top5']:.4f}{chance('top5')}; {m['clips']} clips, "
                f"{m['views']} views each, {m['undecodable']} undecodable"
            )
            continue
        frames = m["keyframes"]
        lines.append(
            f"{name}: mAP {m['mAP']!r}{chance('mAP')} by {m['protocol']}; {m['boxes']} "
            f"boxes, {frames['matched']} of {frames['ground_truth']} keyframes, "
            f"{m['undecodable']} undecodable"
        )
        lines += [
            f"  {group}: mAP {g['mAP']:.4f}{chance(group)}, {g['classes']} classes"
            for group, g in m["groups"].items()
            if g["mAP"] is not None
        ]
    if "ema" in metrics:
        lines += ["with averaged weights", textwrap.indent(summary(metrics["ema"]), "  ")]
    return "\n".join(lines)


def draw_log(path: Path) -> None:
    """curves.png beside a log: the loss of every task, each point the mean of nine steps."""
    series = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        for task, loss in record.get("loss", {}).items():
            steps, losses = series.setdefault(f"loss {task}", ([], []))
            steps.append(record["step"])
            losses.append(loss)
    for steps, losses in series.values():
        losses[:] = np.convolve(np.pad(losses, 4, "edge"), np.ones(9) / 9, "valid")
    pictures.write_png(path.with_name("curves.png"), pictures.draw_curves(series))


# ------------------------------------------------------------------------------------------------
# Evaluation: rank r takes items r, r + W, ...; results are gathered by key, every key exactly once
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: CoFinetuneModel,
    recipe: Recipe,
    world: World,
    datasets: dict[str, data.Dataset],
    counts: dict[str, dict],
    ema: dict | None = None,
    out: Path | None = None,
) -> dict:
    """The metrics of every task on its validation data: collective, complete on rank 0.

    counts: training boxes per class, for the frequency groups. With `out`, as at a run's end, also
    the chance levels (random scores on the same boxes and clips), detections.csv and the previews.
    """
    model.eval()
    result = {"task": {}}
    for name, dataset in datasets.items():
        measure = evaluate_boxes if dataset.task.kind == "box" else evaluate_clips
        result["task"][name] = measure(model, recipe, world, dataset, counts[name], out)
    measured = [m for m in result["task"].values() if m]
    boxes = [m["mAP"] or 0.0 for m in measured if m["kind"] == "box"]
    scores = boxes or [m["top1"] for m in measured] or [0.0]
    result["score"] = float(np.mean(scores))  # decides on best.pt
    if ema:
        raw = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(ema)
        result["ema"] = evaluate(model, recipe, world, datasets, counts)
        model.load_state_dict(raw)
    return result


def predictions(model: CoFinetuneModel, recipe: Recipe, world: World, dataset: data.Dataset):
    """(batch, logits (B, C) or (K, C)) of this rank's share of a dataset."""
    task, bf16 = dataset.task, recipe.precision == "bf16"
    for batch in data.evaluation_batches(
        dataset, max(1, task.batch // world.size), world.rank, world.size, recipe.workers
    ):
        batch = batch.to(world.device)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            video = data.normalise(batch.video, *model.scale)
            logits = model(video, task.name, batch.boxes, batch.box_clip)
        yield batch, logits.float()
    for reason in dataset.damaged.values():
        print(f"task {task.name}, not evaluated: {reason}", file=sys.stderr, flush=True)


def gather_by_key(dataset: data.Dataset, world: World, found: dict) -> dict | None:
    """All ranks' results on rank 0, None elsewhere. A key twice or missing: a wrong number. So are
    more than bad_share undecodable videos (value None), of which each rank has seen its own."""
    parts = world.gather(found)
    if world.rank:
        return None
    merged = {key: value for part in parts for key, value in part.items()}
    count = sum(map(len, parts))
    if not len(merged) == count == len(dataset):
        raise RuntimeError(
            f"task {dataset.task.name}: {len(dataset)} items gave {count} results "
            f"with {len(merged)} different keys"
        )
    bad = {key[0] for key, value in merged.items() if value is None}
    if len(bad) > dataset.task.bad_share * dataset.videos:
        raise ValueError(
            f"task {dataset.task.name} (val): {len(bad)} of {dataset.videos} videos "
            f"cannot be decoded, bad_share = {dataset.task.bad_share}"
        )
    return merged


def evaluate_clips(model, recipe, world, dataset, counts, out) -> dict:
    """Top-1 and top-5 of the softmax averaged over an item's views."""
    sums, labels = {}, {}
    for batch, logits in predictions(model, recipe, world, dataset):
        for i, (key, p) in enumerate(zip(batch.keys, logits.double().softmax(1).cpu())):
            labels[key] = int(batch.labels[i])
            sums[key] = sums.get(key, 0) + p if batch.valid[i] else None
    # A class that ties with the true one ranks before it: an untrained head is never right.
    # So is one whose weights diverged: nan ranks last.
    ranks = {
        key: None if p is None else int((~(p < p[labels[key]])).sum()) - 1
        for key, p in sums.items()
    }
    ranks = gather_by_key(dataset, world, ranks)
    if ranks is None:
        return {}
    seen, classes = [rank for rank in ranks.values() if rank is not None], len(dataset.classes)
    return dict(
        kind="clip",
        top1=float(np.mean([r < 1 for r in seen])),
        top5=float(np.mean([r < 5 for r in seen])),
        clips=len(seen),
        chance=dict(top1=1 / classes, top5=min(5 / classes, 1.0)) if out else {},
        views=math.prod(dataset.task.views),
        undecodable=len(ranks) - len(seen),
    )


def evaluate_boxes(model, recipe, world, dataset, counts, out) -> dict:
    """AVA mAP; a row per box and class, whose score is class probability times detector score."""
    task, found = dataset.task, {}
    for batch, logits in predictions(model, recipe, world, dataset):
        scores = (logits.sigmoid() * batch.scores[:, None]).cpu().numpy()
        owner = batch.box_clip.numpy()
        for i, (key, valid) in enumerate(zip(batch.keys, batch.valid)):
            mine = owner == i
            found[key] = (batch.boxes_source[mine], scores[mine]) if valid else None
    found = gather_by_key(dataset, world, found)
    if found is None:
        return {}
    rows = detection_rows(found, len(dataset.classes))
    settings = map_settings(recipe, dataset, counts)
    result = ava_eval.evaluate(detections=rows, **settings)
    result |= dict(
        kind="box",
        boxes="detected" if task.val_boxes else "annotated",
        chance={},
        undecodable=sum(value is None for value in found.values()),
    )
    if out:
        rows.score, scores = np.random.default_rng(0).random(len(rows.score)), rows.score
        chance = ava_eval.evaluate(detections=rows, **settings)
        groups = {group: g["mAP"] for group, g in chance["groups"].items()}
        result["chance"] = {"mAP": chance["mAP"]} | groups
        rows.score = scores
        several = sum(t.kind == "box" for t in recipe.task) > 1
        end = f"-{task.name}" * several
        ava_eval.write_csv(out / f"detections{end}.csv", rows)
        if recipe.preview:
            preview(recipe, dataset, found, out / f"preview{end}")
    return result


def map_settings(recipe: Recipe, dataset: data.Dataset, counts: dict) -> dict:
    """What ava_eval.evaluate takes beside the detections."""
    task, root = dataset.task, Path(recipe.root)
    settings = dict(
        groundtruth=root / task.val,
        protocol=recipe.protocol,
        train_counts=counts,
        labelmap=data.read_classes(root / (task.eval_labels or task.labels)),
        thresholds=(recipe.head_above, recipe.tail_below),
        top=len(dataset.classes),
    )
    if task.exclude_val and recipe.protocol != "official-2020":  # whose rows leave them out
        settings["exclusions"] = root / task.exclude_val
    return settings


def detection_rows(found: dict, classes: int) -> ava_eval.Rows:
    """{(video_id, microseconds): (boxes (k, 4), scores (k, C)) | None}: a row per box and class."""
    found = {key: value for key, value in found.items() if value is not None}
    rows = np.array([len(boxes) * classes for boxes, _ in found.values()], int)
    boxes = np.concatenate([np.zeros((0, 4)), *(boxes for boxes, _ in found.values())])  # (K, 4)
    return ava_eval.Rows(
        video_id=np.repeat([video for video, _ in found], rows),
        time_sec=np.repeat(np.array([stamp / 1e6 for _, stamp in found]), rows),
        boxes=np.repeat(boxes, classes, axis=0),
        label=np.tile(np.arange(1, classes + 1), len(boxes)),
        score=np.concatenate([np.zeros(0), *(scores.ravel() for _, scores in found.values())]),
    )


def preview(recipe: Recipe, dataset: data.Dataset, found: dict, path: Path) -> None:
    """Some keyframes (path.png) and their clips (path.mp4), with annotated boxes in green and
    detected ones, with the two best labels, in amber."""
    task = dataset.task
    truth = data.read_boxes(os.path.join(recipe.root, task.val), len(dataset.classes), False, {})
    items = [item for item in dataset.items if item.key in truth and found[item.key] is not None]
    stills, film = [], []
    for item in items[:: max(len(items) // recipe.preview, 1)][: recipe.preview]:
        boxes, scores = found[item.key]
        texts = [[dataset.classes[c - 1] for c in sorted(p.labels)] for p in truth[item.key]]
        colours = [pictures.GREEN] * len(texts) + [pictures.AMBER] * len(boxes)
        texts += [best_labels(dataset.classes, s, 2) for s in scores]
        boxes = np.concatenate([np.array([p.box for p in truth[item.key]]).reshape(-1, 4), boxes])
        times = item.time_sec + (np.arange(task.frames) - task.frames // 2) * task.step_sec
        drawn = [
            pictures.draw_boxes(frame, boxes, texts, colours)
            for frame in data.decode_clip(item.path, times)
        ]
        stills.append(drawn[task.frames // 2])
        film += [drawn] if not film or drawn[0].shape == film[0][0].shape else []
    if stills:
        pictures.write_png(path.with_suffix(".png"), pictures.grid(stills))
        frames = [frame for clip in film for frame in clip]
        pictures.write_video(path.with_suffix(".mp4"), frames, 1 / task.step_sec)


def best_labels(names: list[str], scores: np.ndarray, top: int) -> list[str]:
    return [f"{names[c]} {scores[c]:.2f}" for c in np.argsort(-scores)[:top]]


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def agree(
    micro_batches: list[data.Batch], world: World, interrupt: Interrupt
) -> tuple[dict[str, int], dict[str, float], bool]:
    """By task of this step: clips of this rank, boxes of all. And: was any rank asked to stop?"""
    clips, boxes = {}, {}
    for batch in micro_batches:
        found = 0 if batch.boxes is None else len(batch.boxes)
        clips[batch.task] = clips.get(batch.task, 0) + len(batch.video)
        boxes[batch.task] = boxes.get(batch.task, 0) + found
    *totals, stop = world.sum([*boxes.values(), interrupt.received])
    return clips, dict(zip(boxes, totals)), stop > 0


def task_loss(
    task: Task, logits: torch.Tensor, batch: data.Batch, clips: int, boxes: float
) -> torch.Tensor:
    """One micro-batch's part of the loss of its task.

    clips: of the step on this rank; boxes: of the step on all ranks, over the number of ranks. So
    the sum over micro-batches, averaged over the ranks as DDP does, is the loss of one process on
    the whole batch, however unevenly the boxes fall.
    """
    if task.kind == "box":
        return task.loss_weight * box_loss(logits, batch.labels, boxes)
    share = len(batch.video) / clips
    return task.loss_weight * clip_loss(logits, batch.labels, task.smoothing) * share


def mean_losses(losses: dict[str, float], world: World, step: int) -> dict[str, float]:
    """Over the ranks. FloatingPointError on every rank at once if one of them is not finite."""
    sums = world.sum(list(losses.values()))
    means = {task: total / world.size for task, total in zip(losses, sums)}
    if not all(map(math.isfinite, means.values())):
        raise FloatingPointError(
            f"non-finite loss at step {step}: {means}; no weight was changed "
            "in this step, and the last checkpoint is intact"
        )
    return means


def clip_gradients(model: CoFinetuneModel, most: float, step: int) -> float:
    """Their norm before it is made `most` at the most (0: as it is), the same on every rank.
    FloatingPointError if it is not finite, which a finite loss does not exclude."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), most or math.inf).item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"non-finite gradient at step {step}; no weight was changed in "
            "this step, and the last checkpoint is intact"
        )
    return norm


def average_heads(model: CoFinetuneModel, world: World) -> None:
    """Mean over the ranks of the heads' gradients; for the encoder, DDP does it in the backward.

    The heads stay outside of DDP because a step uses only some of them. All ranks train the same
    task, so their gradients are of the same heads; an idle head keeps grad = None.
    """
    if world.size == 1:
        return
    grads = [p.grad for p in model.heads.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(total.view_as(grad) / world.size)


def train(recipe: Recipe, world: World, fresh: bool = False) -> dict:
    """Train to recipe.steps, from where the run's folder stands; evaluate -> the metrics (rank 0).

    A loss that is not finite, too many damaged videos, a full disk: FloatingPointError, ValueError,
    OSError with one sentence; the last checkpoint stays as it is.
    """
    out, tasks = Path(recipe.out), {task.name: task for task in recipe.task}
    if recipe.world and world.rank == 0:
        from extras.world import make_world

        make_world(recipe.root, **recipe.world)
    world.sum([0])
    datasets = {name: data.open_task(task, recipe.root, "train") for name, task in tasks.items()}
    validation = {
        name: data.open_task(task, recipe.root, "val") for name, task in tasks.items() if task.val
    }
    for name, dataset in datasets.items():
        counted = [f"{count} {what}" for what, count in dataset.report.items() if count]
        print0(f"{name}: {len(dataset.classes)} classes, {', '.join(counted)}")
    trained = {name: datasets[name] for name in recipe.train_tasks or tasks}
    stream = data.Stream(trained, recipe.schedule, recipe.seed, recipe.steps)
    classes = {name: dataset.classes for name, dataset in datasets.items()}
    counts = {name: dataset.class_counts() for name, dataset in datasets.items()}
    for name, dataset in validation.items():  # what would stop the evaluation, now
        if dataset.task.kind == "box":
            nothing = detection_rows({}, len(dataset.classes))
            ava_eval.evaluate(detections=nothing, **map_settings(recipe, dataset, counts[name]))

    if fresh and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and world.rank == 0:
        own = [out / "last.pt", out / "best.pt", *out.glob("step-*.pt")]
        if recipe.init and Path(recipe.init).resolve() in [path.resolve() for path in own]:
            raise ValueError(f"--fresh would delete init = {recipe.init}: take another --out")
        for old in (*own, out / "log.jsonl", out / "metrics.json"):
            old.unlink(missing_ok=True)
    world.sum([0])
    state = load(out / "last.pt") if (out / "last.pt").exists() else None
    if state:
        different = differences(recipe, recipe_of(state))
        if state["stream"] != stream.state():
            different += ["the items of the datasets"]
        different += [
            f"the classes of task {name}"
            for name in classes | state["classes"]
            if classes.get(name) != state["classes"].get(name)
        ]
        if different:
            raise ValueError(
                f"{out / 'last.pt'} is of another recipe: {'; '.join(different)}. "
                "Take another --out, or --fresh to start over"
            )
    model = build_model(recipe, classes, state).to(world.device)
    method = None
    if recipe.method in ("selfdistil", "spottune"):
        from extras import methods

        method = methods.attach(recipe.method, model, recipe.method_options)
    optimisers = make_optimisers(model, recipe)
    ema = {key: value.clone() for key, value in model.state_dict().items()} if recipe.ema else {}
    start, best = 0, -1.0
    if state:
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        if method:
            method.load_state_dict(state["method"])
        ema = {key: value.to(world.device) for key, value in state["ema"].items()}
        start, best = state["step"], state["best"]
    if world.sum([start]) != [start * world.size]:
        raise ValueError(
            f"the processes start at different steps: {out} must lie on a disk that "
            "all machines share"
        )
    if state:
        print0(f"resumed {out / 'last.pt'} at step {start} of {recipe.steps}")
        if start == recipe.steps and (out / "metrics.json").exists():
            print0(f"{out} is done already; --fresh starts over")
            return json.loads((out / "metrics.json").read_text())
    del state  # twice the model and more, in every process
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "recipe.toml", to_toml(recipe))
    log = Log(out, world, recipe, start)

    def checkpoint(step: int, name: str) -> None:
        if world.rank == 0:
            log.sync()
            save(
                out / name,
                dict(
                    model=model.state_dict(),
                    model_config=dataclasses.asdict(model.encoder.config),
                    heads={
                        name: dataclasses.asdict(head.head) for name, head in model.heads.items()
                    },
                    mean=list(model.scale[0]),
                    std=list(model.scale[1]),
                    classes=classes,
                    class_counts=counts,
                    step=step,
                    best=best,
                    ema=ema,
                    stream=stream.state(),
                    optimisers=[optimiser.state_dict() for optimiser in optimisers],
                    method=method.state_dict() if method else {},
                    recipe=dataclasses.asdict(recipe),
                    torch=str(torch.__version__),
                ),
            )

    trunk = model.encoder
    if recipe.compile:
        # Else Dynamo cuts the graph at DDP's buckets, to exchange them during the backward: with
        # checkpointing and a second shape of clips that failed on a GPU (InductorError, submod_1).
        torch._dynamo.config.optimize_ddp = False
        trunk = torch.compile(trunk)
    if world.size > 1:
        trunk = nn.parallel.DistributedDataParallel(trunk, gradient_as_bucket_view=True)
    batches = data.training_batches(
        stream, start, recipe.steps, world.rank, world.size, recipe.workers, recipe.micro_batches
    )
    bf16, interrupt, stop = recipe.precision == "bf16", Interrupt(), False
    model.train()
    # --------------------- the method: one task a step, one shared encoder ---------------------
    for step in range(start, recipe.steps):
        micro_batches = log.next(batches)  # of one task; with `accumulate` of every task
        clips, boxes, stop = agree(micro_batches, world, interrupt)
        if stop:
            break
        # Dropout and stochastic depth, like the data, follow from (seed, step): resuming is exact.
        torch.manual_seed(hash((recipe.seed, step, world.rank)) % 2**63)
        losses = dict.fromkeys(clips, 0.0)
        for i, batch in enumerate(micro_batches):
            task, batch = tasks[batch.task], batch.to(world.device)
            more = world.size > 1 and i < len(micro_batches) - 1  # gradients travel once a step
            with trunk.no_sync() if more else contextlib.nullcontext():
                with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                    video = data.normalise(batch.video, *model.scale)  # (B, 3, T, H, W)
                    features = trunk(video)  # (B, D), (B, t, h, w, D)
                    logits = model.classify(features, task.name, batch.boxes, batch.box_clip)
                    extra = 0.0
                    if method:
                        extra = method.loss(model, video, features, logits, batch, step)
                loss = task_loss(
                    task, logits, batch, clips[task.name], boxes[task.name] / world.size
                )
                loss = loss + extra * (len(batch.video) / clips[task.name])
                (loss / len(clips)).backward()  # the mean over the tasks of this step
            losses[task.name] += loss.item()
            if not math.isfinite(losses[task.name]):
                log.suspects(step, batch, logits)
        losses = mean_losses(losses, world, step)  # stops every rank, before a weight is touched
        average_heads(model, world)
        norm = clip_gradients(model, recipe.clip_norm, step)
        rate = lr_at(step, recipe) * task.lr_scale  # equal for all tasks with `accumulate`
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)  # None: zeros would still move idle heads
        # --------------------- what follows is averaging, records and safety ---------------------
        for key, value in (model.state_dict() if ema else {}).items():
            ema[key].lerp_(value, 1 - recipe.ema)
        done = step + 1
        log.step(
            step,
            losses,
            recipe.lr * rate,
            norm,
            sum(clips.values()) * world.size,
            stream.damaged,
            method.report() if method else {},
        )
        if recipe.eval_every and done % recipe.eval_every == 0 and done < recipe.steps:
            metrics = evaluate(model, recipe, world, validation, counts, ema)
            log.evaluation(done, metrics)
            if metrics["score"] > best:
                best = metrics["score"]
                checkpoint(done, "best.pt")
            model.train()
        if recipe.keep_every and done % recipe.keep_every == 0:
            checkpoint(done, f"step-{done}.pt")
        if done % recipe.save_every == 0 or done == recipe.steps:
            checkpoint(done, "last.pt")
    if stop:
        checkpoint(step, "last.pt")
        print0(
            f"\nstopped before step {step}; {out / 'last.pt'} is complete, and the same command "
            "resumes it"
        )
        raise SystemExit(128 + (interrupt.received or signal.SIGTERM))
    interrupt.restore()
    metrics = evaluate(model, recipe, world, validation, counts, ema, out)
    if metrics["score"] > best:
        best = metrics["score"]
        checkpoint(recipe.steps, "best.pt")
    log.evaluation(recipe.steps, metrics, final=True)
    if world.rank == 0:
        write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        draw_log(log.path)
        print(contents(out))
    return metrics


# ------------------------------------------------------------------------------------------------
# Using a model
# ------------------------------------------------------------------------------------------------


def evaluate_command(checkpoint: str, source: str | None, overrides: dict[str, str]) -> None:
    """`evaluate CHECKPOINT`: its metrics, with the recipe it was trained by or another one."""
    state = load(checkpoint)
    out = Path(overrides.pop("out", Path(checkpoint).parent / "evaluation"))
    if (out / "last.pt").exists():
        raise ValueError(
            f"--out {out} is the folder of a run, whose recipe.toml and metrics.json "
            "would be overwritten; take another one"
        )
    out.mkdir(parents=True, exist_ok=True)
    saved = dataclasses.replace(recipe_of(state), init="", method="cofinetune")  # trained by now
    write_text(out / "recipe.toml", to_toml(saved))
    recipe = read_recipe(source or str(out / "recipe.toml"), overrides)
    world = setup(recipe)
    model = model_of(state).to(world.device)
    datasets = {t.name: data.open_task(t, recipe.root, "val") for t in recipe.task if t.val}
    for name, dataset in datasets.items():
        if dataset.classes != state["classes"].get(name):
            heads = {name: len(names) for name, names in state["classes"].items()}
            raise ValueError(
                f"task {name} with {len(dataset.classes)} classes has no head in "
                f"{checkpoint}, whose heads and numbers of classes are {heads}"
            )
    metrics = evaluate(model, recipe, world, datasets, state["class_counts"], state["ema"], out)
    if world.rank == 0:
        write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        print(summary(metrics), contents(out), sep="\n")


def contents(folder: Path) -> str:
    return f"in {folder}: " + ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file()))


@torch.no_grad()
def predict_command(
    checkpoint: str,
    path: str,
    boxes_path: str | None,
    every_sec: float,
    top: int,
    overrides: dict[str, str],
) -> None:
    """`predict CHECKPOINT VIDEO`: with person boxes, their labels (detections.csv); without, the
    clip tasks' classes along the video. And the video itself, with the labels drawn into it."""
    state, video = load(checkpoint), Path(path)
    free = ("out", "device", "precision", "workers", "threads")
    if unused := overrides.keys() - set(free):
        raise ValueError(
            f"predict takes --{', --'.join(free)} of the recipe's keys, not "
            f"--{', --'.join(sorted(unused))}"
        )
    values = {key: _value(text, Recipe, key) for key, text in overrides.items()}
    recipe = dataclasses.replace(recipe_of(state), **values)
    if bad := [*data.misfits(Recipe, values).values()] or out_of_range(recipe):
        raise ValueError("predict: " + "; ".join(bad))
    if not every_sec > 0 or top < 1:
        raise ValueError(f"--every-sec {every_sec}, --top {top}: expected more than 0")
    out = Path(values.get("out", f"predictions/{video.stem}"))
    world = setup(recipe)
    model = model_of(state).eval().to(world.device)
    kind = "box" if boxes_path else "clip"
    tasks = [dataclasses.replace(task, views=[1, 1]) for task in recipe.task if task.kind == kind]
    if not tasks:
        raise ValueError(
            f"{checkpoint} has no {kind} task, its tasks are "
            + ", ".join(f"{task.name} ({task.kind})" for task in recipe.task)
            + "; with --boxes box tasks are predicted, without clip tasks"
        )
    times, end_sec, *_ = videos.frame_times(video)
    if boxes_path:
        scored = any(line.count(",") == 7 for _, line in data._lines(boxes_path))
        found = data.read_boxes(boxes_path, 1 << 30, scored, {})
        if scored and any(person.labels for people in found.values() for person in people):
            raise ValueError(
                f"{boxes_path}: actions in column 7, expected none: then column 8 is "
                "a person's number, not a score"
            )
        for person in (person for people in found.values() for person in people):
            person.labels = set()
        persons = {
            stamp: people
            for (name, stamp), people in sorted(found.items())
            if name == video.stem and people
        }
        if not persons:
            raise ValueError(f"{boxes_path}: no box of a video called {video.stem!r}")
    else:
        centres = np.arange(min(every_sec, end_sec) / 2, end_sec, every_sec)
        persons = {round(second * 1e6): [] for second in centres}
    out.mkdir(parents=True, exist_ok=True)
    shown = {}  # by second: boxes and the labels drawn at them; without boxes, the whole frame
    for stamp, people in persons.items():
        boxes = np.array([person.box for person in people] or [[0, 0, 1, 1]])
        shown[stamp / 1e6] = boxes, [[] for _ in boxes]
    for task in tasks:
        names, detections = state["classes"][task.name], {}
        rows = [
            ((video.stem, stamp), video.name, stamp / 1e6, 0, people)
            for stamp, people in persons.items()
        ]
        items = data.Items(str(video.parent), rows, len(names))
        dataset = data.Dataset(task, "val", names, items, {})
        for batch, logits in predictions(model, recipe, world, dataset):
            owner, scores = torch.arange(len(logits)), logits.softmax(1)
            if kind == "box":
                owner, scores = batch.box_clip, logits.sigmoid() * batch.scores[:, None]
            owner, scores = owner.numpy(), scores.cpu().numpy()
            for i, key in enumerate(batch.keys):
                mine, second = owner == i, key[1] / 1e6
                if kind == "box":
                    detections[key] = (batch.boxes_source[mine], scores[mine])
                for box, s in enumerate(scores[mine]):
                    best = best_labels(names, s, top)
                    shown[second][1][box].extend(best)
                    what = f"{task.name}  box {box}" if kind == "box" else task.name
                    print(f"{video.name}  {second:.3f} s  {what}:  {', '.join(best)}")
        if detections:
            name = "detections.csv" if len(tasks) == 1 else f"detections-{task.name}.csv"
            ava_eval.write_csv(out / name, detection_rows(detections, len(names)))

    def annotated():
        keyframes = np.array(list(shown))
        for part in np.array_split(times, math.ceil(len(times) / 32)):  # a second or so in memory
            for at, frame in zip(part, data.decode_clip(video, part)):
                nearest = keyframes[np.abs(keyframes - at).argmin()]
                yield pictures.draw_boxes(frame, *shown[nearest], pictures.AMBER)

    pictures.write_video(out / "annotated.mp4", annotated(), len(times) / end_sec)
    print(contents(out))


def split_overrides(
    arguments: list[str], options: set[str] = frozenset()
) -> tuple[list[str], dict[str, str]]:
    """The arguments without the recipe's own keys (`--key value`, `--key=value`), and those."""
    rest, overrides, known = [], {}, vars(Recipe())
    arguments = iter(arguments)
    for word in arguments:
        option, equals, text = word.partition("=")
        key = option.removeprefix("--")
        key = key if "." in key else key.replace("-", "_")
        if not word.startswith("--") or option in options:
            rest.append(word)
        elif key in known or key.startswith(("task.", "model.")):
            overrides[key] = text if equals else next(arguments, None)
            if overrides[key] is None:
                raise ValueError(f"{option}: a value is expected after it")
        else:
            names = [*known, *(name.removeprefix("--") for name in options)]
            near = difflib.get_close_matches(key, names, 1)
            raise ValueError(
                f"unknown option {option}"
                + "".join(f", did you mean --{name.replace('_', '-')}?" for name in near)
            )
    return rest, overrides


def main(arguments: list[str]) -> None:
    keys = ", ".join(
        f"--{key.replace('_', '-')} ({value!r})"
        for key, value in vars(Recipe()).items()
        if key not in ("model", "task")
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"every key of the recipe is an option too: {keys}; and "
        "--model.KEY, --task.NAME.KEY",
    )
    add = parser.add_argument
    add("command", nargs="?", default="train", choices=["train", "evaluate", "predict", "compare"])
    add("checkpoint", nargs="?", help="evaluate, predict")
    add("video", nargs="?", help="predict")
    add("--recipe", help=f"a TOML file or one of {', '.join(RECIPES)} (default: demo)")
    add("--fresh", action="store_true", help="start over instead of resuming the run's folder")
    add("--boxes", help="predict: csv of person boxes, video,second,x1,y1,x2,y2,,score")
    add("--every-sec", type=float, default=1.0, help="predict without boxes: seconds between clips")
    add("--top", type=int, default=3, help="predict: labels shown per box or clip")
    add("--methods", default="finetune,cofinetune", help="compare: comma-separated")
    add("--seeds", type=int, default=5, help="compare: final runs per method")
    add(
        "--lrs",
        default="",
        help="compare: learning rates, comma-separated (default: half, once, twice the recipe's)",
    )
    add("--tuning-seeds", type=int, default=2, help="compare: runs per learning rate of the grid")
    add("--jobs", type=int, default=0, help="compare: runs at a time (default: one per core)")
    options = {"--help", *re.findall(r"--[a-z-]+", parser.format_usage())}
    rest, overrides = split_overrides(arguments, options)
    known = parser.parse_args(rest)
    if known.command in ("evaluate", "predict") and not known.checkpoint:
        parser.error(f"{known.command} needs a checkpoint")
    if known.command == "predict" and not known.video:
        parser.error("predict needs a video")
    stray = known.video if known.command == "evaluate" else known.checkpoint
    if stray and known.command != "predict":
        parser.error(f"{known.command}: {stray} is one word too many; a recipe follows --recipe")
    if known.command == "evaluate":
        evaluate_command(known.checkpoint, known.recipe, overrides)
    elif known.command == "predict":
        predict_command(
            known.checkpoint, known.video, known.boxes, known.every_sec, known.top, overrides
        )
    elif known.command == "compare":
        from extras import compare

        source, lrs = known.recipe or "demo", [float(lr) for lr in known.lrs.split(",") if lr]
        compare.compare(
            read_recipe(source, overrides),
            source,
            overrides,
            re.split(r",(?![^\[]*\])", known.methods),
            known.seeds,
            lrs,
            known.jobs,
            known.tuning_seeds,
        )
    else:
        recipe = read_recipe(known.recipe or "demo", overrides)
        world = setup(recipe)
        for stage in stages(recipe):
            train(stage, world, known.fresh)
    if dist.is_initialized():
        # Wait: gloo may abort when a rank leaves while another still speaks.
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError, data.DecodeError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on or starts again", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT)
