"""Co-finetuning: one video transformer, trained at once on clip classification and action localisation.

    python cofinetune.py                                      the demo: makes its videos, trains, evaluates
    python cofinetune.py --recipe my.toml --lr 0.05 --task.ava.batch 16        own data; any value overridden
    ./train_ddp.sh --recipe vivit-b                           every GPU of this machine
    python cofinetune.py evaluate runs/demo/last.pt           the metrics of a checkpoint, alone
    python cofinetune.py predict runs/demo/last.pt video.mp4 --boxes boxes.csv
    python cofinetune.py compare                              the method beside its rivals (baselines.py)

The method (Arnab et al., arXiv 2207.03807): instead of pretraining on upstream clip datasets and then
finetuning on the downstream localisation dataset, every step takes a batch of *one* of the datasets, the
shared encoder is updated by all of them, and each head only by its own. The loop is `train`, between the
two rules that fence it; what stands around it makes sure that nothing is lost and nothing is silent.

A run's folder holds recipe.toml (everything resolved; starts the run again), log.jsonl (one object a step),
last.pt and best.pt, detections.csv, metrics.json, and pictures of the curves and of evaluated keyframes.
"""
import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import resource
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ava_eval
import data
from data import Task
from model import SIZES, CoFinetuneModel, Head, ModelConfig, box_loss, clip_loss


# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------

@dataclass
class Recipe:
    """Everything that decides a run. A recipe file is TOML with these keys, [model] and [[task]] tables."""
    name: str = "demo"
    out: str = "runs/demo"          # the run's folder
    root: str = "."                 # data paths are relative to it; itself relative to the recipe's file
    world: dict = field(default_factory=dict)  # demo.make_world's sizes; {} = the videos are on disk already
    init: str = ""                  # checkpoint to start from (any family of pretrained.py); "" = scratch
    method: str = "cofinetune"      # cofinetune | finetune | downstream | selfdistil | spottune
    method_options: dict = field(default_factory=dict)  # of the method's class in baselines.py
    train_tasks: list = field(default_factory=list)     # names of the trained tasks; [] = all of them
    seed: int = 0                   # of the initialisation, the batches and the augmentation
    steps: int = 600                # updates, over all tasks
    schedule: str = "round_robin"   # round_robin | weighted | uniform | accumulate (data.Stream)
    micro_batches: int = 1          # pieces a batch is cut into to fit in memory; the gradient stays the same
    # optimisation
    optimiser: str = "sgd"          # sgd (ViViT) | adamw (VideoMAE) | muon (blocks' matrices; AdamW the rest)
    lr: float = 0.1                 # peak, at the stated batch sizes; for muon the rate of the matrices
    adam_lr: float = 0.003          # muon only: peak rate of what is not a block's matrix
    momentum: float = 0.9           # sgd, muon
    betas: list = field(default_factory=lambda: [0.9, 0.999])   # adamw, and the AdamW part of muon
    weight_decay: float = 0.0       # never on 1-D parameters, cls and positions
    layer_decay: float = 1.0        # rate of block i is lr * layer_decay ** (depth - i); 1 = equal
    warmup: int = 50                # steps of linear warm-up
    final_lr: float = 0.0           # end of the cosine, as a share of the peak
    clip_norm: float = 1.0          # global gradient norm, after the exchange; 0 = off
    ema: float = 0.0                # decay of the averaged weights, evaluated beside the raw ones; 0 = off
    # input scale of the encoder, one for all tasks: checkpoints come with theirs
    mean: list = field(default_factory=lambda: [0.5, 0.5, 0.5])  # [] = each clip by its own mean and std
    std: list = field(default_factory=lambda: [0.5, 0.5, 0.5])
    # machine
    precision: str = "float32"      # float32 | bf16 (autocast; weights, losses and RoIAlign stay float32)
    compile: bool = False           # torch.compile of the encoder; pays on a GPU
    device: str = "auto"            # auto | cpu | cuda
    workers: int = 2                # decoding processes per rank, for all tasks together
    threads: int = 0                # torch threads per rank; 0 = torch's choice
    bad_share: float = 0.05         # tolerated share of damaged videos of a task, in training
    # evaluation and records
    protocol: str = "official-2020"  # of the AVA mAP (ava_eval.py)
    head_above: int = 10_000        # frequency groups by training boxes per class; parameters, because
    tail_below: int = 1_000         # the paper's own thresholds could not be consulted
    log_every: int = 20             # steps per printed line; log.jsonl has every step
    eval_every: int = 0             # steps; 0 = only at the end
    save_every: int = 200           # steps between writes of last.pt
    keep_every: int = 0             # steps between checkpoints that are kept for good; 0 = none
    preview: int = 12               # evaluated keyframes drawn into preview.png and preview.mp4; 0 = none
    model: dict = field(default_factory=dict)       # arch = a size of model.py, and any field of ModelConfig
    task: list = field(default_factory=list)        # data.Task, one per dataset


# Two runs that differ in these alone train the same weights, up to rounding.
FREE = {"name", "out", "root", "micro_batches", "compile", "device", "workers", "threads", "bad_share", "protocol",
        "head_above", "tail_below", "log_every", "eval_every", "save_every", "keep_every", "preview", "precision"}

_AVA = dict(
    name="ava", kind="box", train="ava/annotations/ava_train_v2.2.csv", val="ava/annotations/ava_val_v2.2.csv",
    labels="ava/annotations/ava_action_list_v2.2.pbtxt", videos="ava/videos",
    eval_labels="ava/annotations/ava_action_list_v2.2_for_activitynet_2019.pbtxt",
    exclude_train="ava/annotations/ava_train_excluded_timestamps_v2.2.csv",
    exclude_val="ava/annotations/ava_val_excluded_timestamps_v2.2.csv",
    val_boxes="ava/annotations/ava_val_predicted_boxes.csv", frames=32, stride=2, size=224, val_fit="full",
    batch=64, weight=2.0, dropout=0.5, colour=0.4)
_CLIP = dict(kind="clip", frames=32, stride=2, size=224, batch=64, views=[4, 3], colour=0.8)
_VIDEOS = [
    _AVA,
    dict(_CLIP, name="kinetics400", train="kinetics400/train.csv", val="kinetics400/val.csv",
         videos="kinetics400/train", val_videos="kinetics400/val", weight=8.0),
    dict(_CLIP, name="moments", train="moments/trainingSet.csv", val="moments/validationSet.csv",
         labels="moments/moments_categories.txt", videos="moments/training", val_videos="moments/validation",
         weight=8.0),
    dict(_CLIP, name="ssv2", train="ssv2/something-something-v2-train.json",
         val="ssv2/something-something-v2-validation.json", labels="ssv2/something-something-v2-labels.json",
         videos="ssv2/videos", stride=1, flip=0.0, weight=4.0),
]
# Optimiser, clip length and views follow the public ViViT recipe (Scenic); which ones the co-finetuning
# paper used is unknown. Not run here: the datasets are not at hand.
_VIVIT = dict(root="data", steps=300_000, schedule="weighted", optimiser="sgd", lr=0.1, warmup=15_000,
              precision="bf16", compile=True, workers=12, log_every=50, save_every=1_000, eval_every=20_000,
              task=_VIDEOS)
_DEMO = dict(frames=8, stride=2, fps=16.0, size=48, short_side=[48, 56], val_fit="squash", flip=0.0, batch=16)
RECIPES = {
    "demo": dict(
        out="runs/demo", root="data/demo", world={"seed": 0}, seed=0, steps=600, optimiser="muon", lr=0.04,
        adam_lr=0.003, betas=[0.9, 0.98], weight_decay=0.05, warmup=48, final_lr=0.01, mean=[], std=[],
        workers=1, threads=1, head_above=100, tail_below=20,
        model=dict(arch="tiny", frames=8, size=[48, 48], tubelet=[4, 8, 8], qk_init="mimetic"), task=[
            dict(_DEMO, name="actions", kind="clip", train="actions/train.txt", val="actions/val.txt",
                 labels="actions/classes.txt", videos="actions"),
            dict(_DEMO, name="templates", kind="clip", train="templates/train.json", val="templates/validation.json",
                 labels="templates/labels.json", videos="templates/videos"),
            dict(_DEMO, name="ava", kind="box", train="ava/train.csv", val="ava/val.csv",
                 labels="ava/action_list.pbtxt", videos="ava/videos", val_boxes="ava/val_boxes.csv",
                 offset_sec=901.5, roi="mean", prior=0.08)]),
    "vivit-b": dict(_VIVIT, out="runs/vivit-b", model=dict(arch="B")),
    "vivit-l": dict(_VIVIT, out="runs/vivit-l", model=dict(arch="L", drop_path=0.1, checkpointing=True)),
    "vivit-b-finetune": dict(_VIVIT, out="runs/vivit-b-finetune", method="finetune", model=dict(arch="B")),
    "vivit-l-finetune": dict(_VIVIT, out="runs/vivit-l-finetune", method="finetune",
                             model=dict(arch="L", drop_path=0.1, checkpointing=True)),
}


def read_recipe(source: str, overrides: list[str]) -> Recipe:
    """A built-in name or a TOML file, then `--key value` overrides, checked as a whole.

    `--lr 0.1`, `--model.drop_path 0.1` and `--task.NAME.batch 4` set any value. Every problem is listed in
    one ValueError: unknown keys, wrong types, missing files, combinations that cannot be trained.
    """
    if source in RECIPES:
        table, where, base = json.loads(json.dumps(RECIPES[source])), source, Path(".")
        table.setdefault("name", source)
    elif source.endswith(".toml") or os.path.exists(source):
        table, where, base = data.read_recipe(source), source, Path(source).resolve().parent
        table.setdefault("name", Path(source).stem)
    else:
        raise ValueError(f"--recipe {source}: neither a file nor one of {', '.join(RECIPES)}")
    problems = []
    for key, text in zip(overrides[::2], overrides[1::2] + [None] * (len(overrides) % 2)):
        target, name = table, key.removeprefix("--").replace("-", "_")
        if text is None or not key.startswith("--"):
            problems.append(f"{key}: an option needs the form --key value")
            continue
        if name.startswith("task."):
            task_name, _, name = key.removeprefix("--task.").rpartition(".")
            target = next((t for t in table.get("task", []) if t.get("name") == task_name), None)
        elif name.startswith("model."):
            target, name = table.setdefault("model", {}), name.removeprefix("model.")
        if target is None:
            problems.append(f"{key}: the recipe has no task {task_name!r}")
            continue
        target[name] = _value(text, table.get(name) if target is table else None, name)
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    defaults = Recipe()
    for key in list(table):
        if key not in known:
            problems.append(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
            del table[key]
            continue
        wanted = type(getattr(defaults, key))
        if wanted is float and type(table[key]) is int:
            table[key] = float(table[key])
        if type(table[key]) is not wanted:
            problems.append(f"{where}: {key} = {table[key]!r} is not a {wanted.__name__}")
            del table[key]
    try:
        table["task"] = data.read_tasks(table.get("task", []), where)
    except ValueError as error:
        problems.append(str(error))
        table["task"] = []
    recipe = Recipe(**table)
    recipe.root = str((base / recipe.root).resolve())
    problems += [f"{where}: {text}" for text in _problems(recipe)]
    if problems:
        raise ValueError("\n".join(problems))
    return recipe


def _value(text: str, old, name: str):
    """The command line's text as the TOML value it spells; a bare word is a string."""
    import tomllib
    if isinstance(old, str) or isinstance(getattr(Recipe, name, None), str):
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False}.get(text, text)


def _problems(recipe: Recipe) -> list[str]:
    """What would stop the run later, found before the first video is opened."""
    found = []
    choices = {"method": ("cofinetune", "finetune", "downstream", "selfdistil", "spottune"),
               "schedule": ("round_robin", "weighted", "uniform", "accumulate"),
               "optimiser": ("sgd", "adamw", "muon"), "precision": ("float32", "bf16"),
               "device": ("auto", "cpu", "cuda"), "protocol": tuple(ava_eval.PROTOCOLS)}
    for key, allowed in choices.items():
        if getattr(recipe, key) not in allowed:
            found.append(f"{key} = {getattr(recipe, key)!r}; one of {', '.join(allowed)}")
    for key in ("steps", "micro_batches", "log_every", "save_every"):
        if getattr(recipe, key) < 1:
            found.append(f"{key} = {getattr(recipe, key)}; at least 1")
    if len(recipe.mean) != len(recipe.std) or len(recipe.mean) not in (0, 3):
        found.append("mean and std take three values each, or none for per-clip standardisation")
    try:
        config = model_config(recipe.model) if not recipe.init else None
    except ValueError as error:
        found.append(str(error))
        config = None
    names = [task.name for task in recipe.task]
    if not names:
        found.append("no [[task]] table: at least one dataset is needed")
    found += [f"train_tasks names {name!r}, which is no task" for name in recipe.train_tasks if name not in names]
    kinds = {task.kind for task in recipe.task}
    if recipe.method in ("finetune", "downstream") and kinds != {"clip", "box"}:
        found.append(f"method {recipe.method} needs upstream (clip) and downstream (box) tasks")
    if recipe.schedule == "accumulate" and len({task.lr_scale for task in recipe.task}) > 1:
        found.append("accumulate updates once for all tasks: lr_scale must be the same, use loss_weight")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    for task in recipe.task:
        if task.batch % (ranks * recipe.micro_batches):
            found.append(f"task {task.name}: batch = {task.batch} is not a multiple of {ranks} processes x "
                         f"{recipe.micro_batches} micro batches")
        if config and (task.frames % config.tubelet[0] or task.size % config.tubelet[1]):
            found.append(f"task {task.name}: {task.frames} frames of {task.size} px are not whole tubelets "
                         f"of {tuple(config.tubelet)}")
        for key in ("train", "val", "videos", "val_videos", "labels", "eval_labels", "exclude_train",
                    "exclude_val", "train_boxes", "val_boxes"):
            path = getattr(task, key)
            if path and not recipe.world and not (Path(recipe.root) / path).exists():
                found.append(f"task {task.name}: {key} = {Path(recipe.root) / path} does not exist")
    if recipe.init and not Path(recipe.init).exists():
        found.append(f"init = {recipe.init} does not exist")
    return found


def model_config(table: dict) -> ModelConfig:
    """The [model] table: `arch` names a size of model.py, every other key is a field of ModelConfig."""
    table = dict(table)
    arch = table.pop("arch", "B")
    known = [f.name for f in dataclasses.fields(ModelConfig)]
    unknown = [key for key in table if key not in known]
    if arch not in SIZES or unknown:
        raise ValueError(f"[model] arch = {arch!r}, unknown keys {unknown}; arch is one of {', '.join(SIZES)}, "
                         f"other keys are {', '.join(known)}")
    table = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    return ModelConfig(**{**SIZES[arch], **table})


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `read_recipe` reads back to the same recipe."""
    def value(v):
        if isinstance(v, dict):
            return "{" + ", ".join(f"{k} = {value(x)}" for k, x in v.items()) + "}"
        if isinstance(v, (list, tuple)):
            return "[" + ", ".join(value(x) for x in v) + "]"
        return json.dumps(v) if isinstance(v, (str, bool)) else repr(v)

    table = dataclasses.asdict(recipe)
    tasks, model = table.pop("task"), table.pop("model")
    lines = [f"{key} = {value(v)}" for key, v in table.items()]
    lines += ["", "[model]"] + [f"{key} = {value(v)}" for key, v in model.items()]
    for task in tasks:
        lines += ["", "[[task]]"] + [f"{key} = {value(v)}" for key, v in task.items()]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------

@dataclass
class World:
    """This process among the others of the job. One process is the same path without the exchange."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over the ranks, on the CPU (gloo) so that it never waits for the GPU's queue."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, part) -> list:
        """`part` of every rank, on rank 0; [] on the others."""
        if self.size == 1:
            return [part]
        parts = [None] * self.size if self.rank == 0 else None
        dist.gather_object(part, parts)
        return parts or []

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def setup(recipe: Recipe) -> World:
    """Join the job that torchrun describes in the environment; a plain `python` is a job of one."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    cuda = recipe.device == "cuda" or recipe.device == "auto" and torch.cuda.is_available()
    if cuda and not torch.cuda.is_available():
        raise ValueError("device = cuda, but torch sees no GPU here; use --device cpu")
    local_rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cuda:
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if size > 1 and not dist.is_initialized():
        # Counts, losses and results travel as CPU tensors over gloo, gradients on a GPU over NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=30))
    return World(int(os.environ.get("RANK", 0)), size, torch.device("cuda", local_rank) if cuda else
                 torch.device("cpu"))


def average_heads(model: CoFinetuneModel, world: World) -> None:
    """Mean over the ranks of the heads' gradients; DDP does the same for the encoder, during backward.

    Heads stay outside DDP because each step uses only some of them. All ranks train the same task, so their
    lists of gradients agree, and an idle head keeps grad = None: no decay and no momentum moves it.
    """
    if world.size == 1:
        return
    grads = [p.grad for p in model.heads.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, mean in zip(grads, (flat / world.size).split([g.numel() for g in grads])):
        grad.copy_(mean.view_as(grad))


# ------------------------------------------------------------------------------------------------
# Model, optimiser, checkpoints
# ------------------------------------------------------------------------------------------------

def task_heads(recipe: Recipe, classes: dict[str, list]) -> dict[str, Head]:
    return {t.name: Head(kind=t.kind, classes=len(classes[t.name]), dropout=t.dropout, roi=t.roi,
                         roi_size=t.roi_size, context=t.context, prior=t.prior) for t in recipe.task}


def build_model(recipe: Recipe, classes: dict[str, list]) -> CoFinetuneModel:
    """A new model, from scratch or from recipe.init (which then also decides mean and std)."""
    torch.manual_seed(recipe.seed)
    heads = task_heads(recipe, classes)
    if not recipe.init:
        return CoFinetuneModel(model_config(recipe.model), heads)
    import pretrained
    found = pretrained.load(recipe.init)
    model = pretrained.build(found, heads, **{k: tuple(v) if isinstance(v, list) else v
                                              for k, v in recipe.model.items() if k != "arch"})
    recipe.mean, recipe.std = list(found.mean), list(found.std)
    print0(f"initialised from {recipe.init}: {found.family}; mean {recipe.mean}, std {recipe.std}")
    return model


def make_optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Parameter groups carry `peak`, their rate at the top of the schedule.

    No decay on 1-D parameters, the class token and positions. Layer-wise decay as in BEiT/VideoMAE: the
    embedding is layer 0, block i layer i + 1, the final norm and the heads the last.
    """
    depth = len(model.encoder.blocks)
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        block = re.search(r"blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0 if re.search(r"encoder\.(patch|cls|pos)", name) else depth + 1
        matrix = recipe.optimiser == "muon" and block is not None and p.ndim == 2
        decay = 0.0 if p.ndim < 2 or name.endswith(("cls", "pos")) else recipe.weight_decay
        peak = recipe.adam_lr if recipe.optimiser == "muon" and not matrix else recipe.lr
        groups.setdefault((matrix, decay, peak * recipe.layer_decay ** (depth + 1 - layer)), []).append(p)
    tables = {matrix: [dict(params=params, weight_decay=decay, lr=peak, peak=peak)
                       for (m, decay, peak), params in groups.items() if m is matrix] for matrix in (True, False)}
    if recipe.optimiser == "sgd":
        return [torch.optim.SGD(tables[False], momentum=recipe.momentum)]
    adamw = torch.optim.AdamW(tables[False], betas=tuple(recipe.betas))
    if recipe.optimiser == "adamw":
        return [adamw]
    return [torch.optim.Muon(tables[True], momentum=recipe.momentum), adamw]


def lr_at(step: int, recipe: Recipe) -> float:
    """Share of the peak rate at an update: linear warm-up, then a cosine to `final_lr`."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def save(path: Path, state: dict) -> None:
    """Write a checkpoint whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:   # torch's zip writer turns a full disk into RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); the checkpoint before it is intact") from error


def load(path: str | Path) -> dict:
    """One of this project's checkpoints, read without unpickling anything but tensors and plain values."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError,
            __import__("pickle").UnpicklingError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or "model_config" not in state:
        raise ValueError(f"{path}: not a checkpoint of this project (no model_config)")
    return state


def recipe_of(state: dict) -> Recipe:
    table = dict(state["recipe"])
    return Recipe(**{**table, "task": [Task(**t) for t in table["task"]]})


def model_of(state: dict) -> CoFinetuneModel:
    """The model a checkpoint holds, in evaluation mode."""
    recipe = recipe_of(state)
    model = CoFinetuneModel(ModelConfig(**state["model_config"]),
                            {name: Head(**head) for name, head in state["heads"].items()})
    if recipe.method == "spottune":
        import baselines
        model.encoder = baselines.SpotTune(model.encoder, **recipe.method_options)
    model.load_state_dict(state["model"])
    return model.eval()


def compare_recipes(recipe: Recipe, saved: Recipe) -> list[str]:
    """The fields in which a recipe contradicts the checkpoint it would resume."""
    new, old = dataclasses.asdict(recipe), dataclasses.asdict(saved)
    found = [f"{key} = {new[key]!r} (checkpoint: {old[key]!r})" for key in new
             if key not in FREE | {"task"} and new[key] != old[key]]
    tasks = {task["name"]: task for task in old["task"]}
    for task in new["task"]:
        before = tasks.pop(task["name"], {})
        found += [f"task.{task['name']}.{key} = {v!r} (checkpoint: {before.get(key)!r})"
                  for key, v in task.items() if before.get(key) != v]
    return found + [f"task {name} is missing" for name in tasks]


# ------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------

def print0(*words) -> None:
    """Print on the job's first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


class Interrupt:
    """SIGINT and SIGTERM ask for a stop after the current step; a second one stops at once."""

    def __init__(self):
        self.received = 0
        self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number, frame) -> None:
        self.received = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else "a signal to another process"


class Log:
    """log.jsonl (every step), the progress line, TensorBoard where it is installed. Rank 0 writes.

    What depends on the machine stands under "time", so that the rest of two logs can be compared.
    """

    def __init__(self, out: Path, world: World, start: int, recipe: Recipe):
        self.out, self.steps, self.every, self.world = out, recipe.steps, recipe.log_every, world
        self.tty = sys.stdout.isatty()
        self.file = self.board = None
        self.waited, self.window, self.began = 0.0, deque(maxlen=recipe.log_every), time.time()
        if world.rank:
            return
        path, kept = out / "log.jsonl", []
        for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
            # What was logged after the checkpoint will be logged again; a kill can leave half a line.
            if line.endswith("}\n") and (record := json.loads(line))["step"] < start + ("metrics" in record):
                if not record.get("final"):
                    kept.append(line)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = open(path, "a")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out), purge_step=start)

    def timed(self, function, *arguments):
        began = time.time()
        result = function(*arguments)
        self.waited += time.time() - began
        return result

    def step(self, step: int, losses: dict, lr: float, norm: float, clips: int, damaged: dict) -> None:
        if self.world.rank:
            return
        now = time.time()
        self.window.append((losses, clips, self.waited, now))
        record = dict(step=step, loss=losses, lr=lr, grad_norm=norm, time=dict(unix=now, waited_sec=self.waited))
        self.waited = 0.0
        self.file.write(json.dumps(record) + "\n")
        if self.board:
            for name, value in [*((f"loss/{k}", v) for k, v in losses.items()), ("lr", lr), ("grad_norm", norm)]:
                self.board.add_scalar(name, value, step)
        if (step + 1) % self.every and step + 1 < self.steps:
            return
        self.file.flush()
        seconds = max(now - self.began, 1e-9)
        mean = {}
        for losses, *_ in self.window:
            for name, value in losses.items():
                mean.setdefault(name, []).append(value)
        left = datetime.timedelta(seconds=round((self.steps - step - 1) * seconds / len(self.window)))
        memory = (torch.cuda.max_memory_allocated() / 2 ** 30 if self.world.device.type == "cuda"
                  else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
        broken = f"  damaged {sum(damaged.values())}" if damaged else ""
        line = (f"step {step + 1}/{self.steps}  " + "  ".join(f"{k} {np.mean(v):.3f}" for k, v in mean.items())
                + f"  lr {lr:.2g}  {sum(w[1] for w in self.window) / seconds:.0f} clips/s  "
                f"wait {sum(w[2] for w in self.window) / seconds:.0%}  {memory:.1f} GiB  left {left}{broken}")
        print("\r\x1b[K" * self.tty + line, end="" if self.tty and step + 1 < self.steps else "\n", flush=True)
        self.window.clear()
        self.began = now

    def suspects(self, step: int, batch: data.Batch, logits: torch.Tensor) -> None:
        """Name the clips whose logits are not finite; all of the batch's if only the loss is not."""
        bad = ~torch.isfinite(logits).all(1)
        clips = range(len(batch.keys)) if not bad.any() else sorted(
            set((batch.box_clip[bad] if batch.boxes is not None else bad.nonzero()[:, 0]).tolist()))
        print(f"\nstep {step}, task {batch.task}, rank {self.world.rank}: non-finite loss from "
              + ", ".join(str(batch.keys[i]) for i in clips), file=sys.stderr, flush=True)

    def evaluation(self, step: int, metrics: dict, final: bool = False) -> None:
        if self.world.rank:
            return
        record = dict(step=step, metrics=metrics)
        self.file.write(json.dumps(record | dict(final=True) if final else record) + "\n")
        self.file.flush()
        print("\r\x1b[K" * self.tty + summary(metrics), flush=True)
        for name, m in metrics["task"].items() if self.board else ():
            for key in ("mAP", "top1"):
                if key in m:
                    self.board.add_scalar(f"{key}/{name}", m[key], step)
        self.began = time.time()

    def sync(self) -> None:
        """The log reaches the disk before the checkpoint that counts on it."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, metrics: dict) -> None:
        """metrics.json, the curves, and the last lines on screen."""
        if self.world.rank:
            return
        write_text(self.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        draw_log(self.out)
        if self.board:
            self.board.close()
        self.evaluation(self.steps, metrics, final=True)
        self.file.close()
        print("in " + str(self.out) + ": " + ", ".join(sorted(p.name for p in self.out.iterdir() if p.is_file())))


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def summary(metrics: dict) -> str:
    """The lines that are printed of a metrics.json; every mAP with its protocol, its boxes and its chance."""
    lines = []
    for name, m in metrics["task"].items():
        chance = m.get("chance", {})
        beside = lambda key: f" (chance {chance[key]:.4f})" if chance.get(key) is not None else ""
        if m["kind"] == "clip":
            lines.append(f"{name}: top-1 {m['top1']:.4f}{beside('top1')}, top-5 {m['top5']:.4f}{beside('top5')}, "
                         f"{m['clips']} clips of {m['views']} views, {m['undecodable']} undecodable")
        else:
            lines.append(f"{name}: mAP {m['mAP']!r}{beside('mAP')}, {m['protocol']}, {m['boxes']} boxes, "
                         f"{m['keyframes']['ground_truth']} keyframes, {m['undecodable']} undecodable")
            for group in ("head", "mid", "tail"):
                g = m["groups"][group]
                if g["mAP"] is not None:
                    lines.append(f"  {group}: mAP {g['mAP']:.4f}{beside(group)} over {g['classes']} classes")
    if "ema" in metrics:
        lines += ["averaged weights:"] + ["  " + line for line in summary(metrics["ema"]).splitlines()]
    return "\n".join(lines)


def draw_log(out: Path) -> None:
    """curves.png: the smoothed loss of every task, and what was evaluated on the way."""
    series = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, loss in record.get("loss", {}).items():
            series.setdefault(f"loss {name}", ([], []))[0].append(record["step"])
            series[f"loss {name}"][1].append(loss)
    width = 9   # records per smoothed point, odd
    series = {k: (x, np.convolve(np.pad(y, width // 2, "edge"), np.ones(width) / width, "valid"))
              for k, (x, y) in series.items()}
    data.write_png(out / "curves.png", data.draw_curves(series))


# ------------------------------------------------------------------------------------------------
# Evaluation: rank r takes items r, r + W, ...; results are gathered by key, every key exactly once
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model: CoFinetuneModel, recipe: Recipe, world: World, datasets: dict[str, data.Dataset], counts: dict,
             ema: dict | None = None, out: Path | None = None) -> dict:
    """The metrics of every task on its validation data; collective, complete on rank 0.

    With `out`, as at the end of a run, also the chance levels (the same boxes and clips with random scores),
    and the files: detections.csv, preview.png, preview.mp4.
    """
    model.eval()
    result = {"task": {}}
    for name, dataset in datasets.items():
        measure = evaluate_boxes if dataset.task.kind == "box" else evaluate_clips
        result["task"][name] = measure(model, recipe, world, dataset, counts[name], out)
    boxes = [m["mAP"] for m in result["task"].values() if m.get("kind") == "box"]
    result["score"] = float(np.mean(boxes or [m["top1"] for m in result["task"].values() if m] or [0.0]))
    if ema:
        raw = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(ema)
        result["ema"] = evaluate(model, recipe, world, datasets, counts)
        model.load_state_dict(raw)
    return result


def predictions(model, recipe: Recipe, world: World, dataset: data.Dataset):
    """(batch, logits (K, C) or (B, C) in float32) for this rank's share of a validation set."""
    for batch in data.evaluation_batches(dataset, dataset.task.batch, world.rank, world.size, recipe.workers):
        batch = batch.to(world.device)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            video = data.normalise(batch.video, recipe.mean, recipe.std)
            yield batch, model(video, dataset.task.name, batch.boxes, batch.box_clip).float()


def complete(dataset: data.Dataset, parts: list[dict]) -> dict:
    """The ranks' results by key in one dict, or an error: a key twice or missing is a wrong number."""
    merged = {key: value for part in parts for key, value in part.items()}
    if len(merged) != len(dataset) or sum(map(len, parts)) != len(dataset):
        raise RuntimeError(f"task {dataset.task.name}: {sum(map(len, parts))} results with {len(merged)} keys "
                           f"for {len(dataset)} items")
    return merged


def evaluate_clips(model, recipe: Recipe, world: World, dataset: data.Dataset, counts: dict,
                   out: Path | None) -> dict:
    """Top-1 and top-5 of the mean softmax over an item's views."""
    sums, labels = {}, {}
    for batch, logits in predictions(model, recipe, world, dataset):
        for key, p, label, valid in zip(batch.keys, logits.softmax(1).cpu().double(), batch.labels.tolist(),
                                        batch.valid.tolist()):
            sums[key] = sums.get(key, 0) + p if valid else None
            labels[key] = label
    hits = {key: None if p is None else int((p > p[labels[key]]).sum()) for key, p in sums.items()}
    parts = world.gather(hits)
    if world.rank:
        return {}
    ranks = [rank for rank in complete(dataset, parts).values() if rank is not None]
    classes, views = len(dataset.classes), math.prod(dataset.task.views)
    return dict(kind="clip", top1=float(np.mean([r < 1 for r in ranks])), top5=float(np.mean([r < 5 for r in ranks])),
                chance=dict(top1=1 / classes, top5=min(5 / classes, 1.0)) if out else {}, clips=len(ranks), views=views,
                undecodable=len(dataset) - len(ranks))


def evaluate_boxes(model, recipe: Recipe, world: World, dataset: data.Dataset, counts: dict,
                   out: Path | None) -> dict:
    """AVA mAP of class probability times detector score, one row per box and class."""
    task, found = dataset.task, {}
    for batch, logits in predictions(model, recipe, world, dataset):
        p = (logits.sigmoid() * batch.scores[:, None]).cpu().numpy()
        owner = batch.box_clip.cpu().numpy()
        for i, (key, valid) in enumerate(zip(batch.keys, batch.valid.tolist())):
            found[key] = (batch.boxes_source[owner == i], p[owner == i]) if valid else None
    parts = world.gather(found)
    if world.rank:
        return {}
    found = complete(dataset, parts)
    rows = detection_rows({key: value for key, value in found.items() if value is not None}, len(dataset.classes))
    root = Path(recipe.root)
    settings = dict(labelmap=root / (task.eval_labels or task.labels) if task.eval_labels or task.labels else None,
                    protocol=recipe.protocol, train_counts=counts, head_above=recipe.head_above,
                    tail_below=recipe.tail_below)
    if task.exclude_val and recipe.protocol != "official-2020":   # 2020 ignores keyframes without a row instead
        settings["exclusions"] = root / task.exclude_val
    result = ava_eval.evaluate(root / task.val, rows, **settings)
    result |= dict(kind="box", boxes="detector" if task.val_boxes else "annotated", chance={},
                   undecodable=sum(value is None for value in found.values()))
    if out:
        shuffled = dataclasses.replace(rows, score=np.random.default_rng(0).random(len(rows.score)))
        chance = ava_eval.evaluate(root / task.val, shuffled, **settings)
        result["chance"] = dict(mAP=chance["mAP"], **{k: g["mAP"] for k, g in chance["groups"].items()})
        several = sum(t.kind == "box" for t in recipe.task) > 1
        ava_eval.write_csv(out / (f"detections-{task.name}.csv" if several else "detections.csv"), rows)
        if recipe.preview:
            preview(recipe, dataset, found, out)
    return result


def detection_rows(found: dict, classes: int) -> ava_eval.Rows:
    """{(video_id, microseconds): (boxes (k, 4), scores (k, C))} as one row per box and class."""
    ids = [key[0] for key, (boxes, _) in found.items() for _ in range(len(boxes) * classes)]
    seconds = [key[1] / 1e6 for key, (boxes, _) in found.items() for _ in range(len(boxes) * classes)]
    boxes = np.concatenate([np.zeros((0, 4)), *(np.repeat(b, classes, axis=0) for b, _ in found.values())])
    scores = np.concatenate([np.zeros(0), *(s.ravel() for _, s in found.values())])
    return ava_eval.Rows(np.array(ids, dtype=str), np.array(seconds, dtype=np.float64), boxes,
                         np.tile(np.arange(1, classes + 1), len(boxes) // classes), scores.astype(np.float64))


def preview(recipe: Recipe, dataset: data.Dataset, found: dict, out: Path) -> None:
    """preview.png: keyframes with annotated (green) and predicted (amber) boxes and labels; .mp4: their clips."""
    task = dataset.task
    truth = data.read_boxes(Path(recipe.root) / task.val, len(dataset.classes), False, {})
    items = {item.key: item for item in dataset.items}
    keys = [key for key, value in found.items() if value is not None and len(value[0]) and key in truth]
    keys = keys[::max(len(keys) // recipe.preview, 1)][:recipe.preview]
    stills, film = [], []
    for key in keys:
        times = items[key].time_sec + (np.arange(task.frames) - task.frames // 2) * task.step_sec
        frames = data.decode_clip(items[key].path, times)
        boxes, scores = found[key]
        best = [np.argsort(-s)[:2] for s in scores]
        texts = [[f"{dataset.classes[c]} {s[c]:.2f}" for c in top] for s, top in zip(scores, best)]
        labels = [[dataset.classes[c - 1] for c in sorted(person.labels)] for person in truth[key]]
        everything = np.concatenate([[person.box for person in truth[key]], boxes])
        drawn = [data.draw_boxes(frame, everything, labels + texts, [GREEN] * len(labels) + [AMBER] * len(texts))
                 for frame in frames]
        stills.append(drawn[task.frames // 2])
        film += drawn
    if stills:
        data.write_png(out / "preview.png", data.grid(stills))
        data.write_video(out / "preview.mp4", film, task.fps / task.stride)


GREEN, AMBER = (90, 220, 120), (255, 190, 60)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

def train(recipe: Recipe, world: World, fresh: bool = False) -> dict | None:
    """Train to `recipe.steps`, resuming what the run's folder holds; then evaluate and write the records.

    Returns the metrics on rank 0. Non-finite losses, too many damaged videos and a full disk end the run
    with one sentence and leave the last checkpoint as it was.
    """
    out = Path(recipe.out)
    tasks = {task.name: task for task in recipe.task}
    trained = recipe.train_tasks or list(tasks)
    if recipe.world:
        make_world(recipe, world)
    datasets = {name: data.open_task(tasks[name], recipe.root, "train") for name in tasks}
    report_datasets(datasets, trained)
    validation = {name: data.open_task(task, recipe.root, "val") for name, task in tasks.items() if task.val}
    stream = data.Stream({name: datasets[name] for name in trained}, recipe.schedule, recipe.seed, recipe.steps)
    classes = {name: datasets[name].classes for name in tasks}
    counts = {name: datasets[name].class_counts() for name in tasks}

    # Initialisation, in this order: resume > init checkpoint > scratch.
    model = build_model(recipe, classes).to(world.device)
    method = None
    if recipe.method in ("spottune", "selfdistil"):
        import baselines
        method = baselines.attach(recipe.method, model, recipe.method_options)
    optimisers = make_optimisers(model, recipe)
    ema = {k: v.clone() for k, v in model.state_dict().items()} if recipe.ema else {}
    start, best = 0, -1.0
    if fresh and world.rank == 0:
        for old in (*out.glob("*.pt"), *out.glob("*.tmp"), out / "log.jsonl", out / "metrics.json"):
            old.unlink(missing_ok=True)
    world.wait()
    if (out / "last.pt").exists():
        state = load(out / "last.pt")
        different = compare_recipes(recipe, recipe_of(state))
        if different or state["stream"] != stream.state():
            different = different or ["the datasets' lengths or batch sizes"]
            raise ValueError(f"{out / 'last.pt'} is a run of another recipe; take another --out, or --fresh to "
                             f"start over. Different: " + "; ".join(different))
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        if method:
            method.load_state_dict(state["method"])
        ema = {k: v.to(world.device) for k, v in state["ema"].items()}
        start, best = state["step"], state["best"]
        print0(f"resumed {out / 'last.pt'} at step {start} of {recipe.steps}")
        if start == recipe.steps and (out / "metrics.json").exists():
            print0(f"{out}: done already; --fresh starts over")
            return json.loads((out / "metrics.json").read_text()) if world.rank == 0 else None
    elif not recipe.init:
        print0("initialised from scratch")
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.toml").write_text(to_toml(recipe))
    log = Log(out, world, start, recipe)

    trunk = torch.compile(model.encoder) if recipe.compile else model.encoder
    if world.size > 1:   # the heads are exchanged by average_heads; so no unused parameters in here
        trunk = nn.parallel.DistributedDataParallel(trunk, gradient_as_bucket_view=True)

    def checkpoint(step: int, *names: str) -> None:
        if world.rank == 0:
            log.sync()
            state = dict(model=model.state_dict(), model_config=dataclasses.asdict(model.encoder.config),
                         heads={k: dataclasses.asdict(v) for k, v in task_heads(recipe, classes).items()},
                         classes=classes, class_counts=counts, mean=recipe.mean, std=recipe.std, step=step, best=best, ema=ema,
                         recipe=dataclasses.asdict(recipe), optimisers=[o.state_dict() for o in optimisers],
                         method=method.state_dict() if method else {}, stream=stream.state(),
                         torch=torch.__version__)
            for name in names:
                save(out / name, state)

    batches = data.training_batches(stream, start, recipe.steps, world.rank, world.size, recipe.workers,
                                    recipe.micro_batches)
    interrupt = Interrupt()
    model.train()
    # ------------------------------ the method: one task a step, one shared encoder ------------------------------
    for step in range(start, recipe.steps):
        micro_batches = log.timed(next, batches)    # one batch of one task; `accumulate`: one batch of every task
        clips, boxes, stop = agree(micro_batches, world, interrupt)
        if stop:
            break
        # Dropout and stochastic depth, like the data, are a function of (seed, step): resuming is exact.
        torch.manual_seed(hash((recipe.seed, step, world.rank)) % 2 ** 63)
        losses = dict.fromkeys(clips, 0.0)
        for i, batch in enumerate(micro_batches):
            task, batch = tasks[batch.task], batch.to(world.device)
            last = world.size == 1 or i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else trunk.no_sync():    # gradients travel once a step
                with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    video = data.normalise(batch.video, recipe.mean, recipe.std)     # (B, 3, T, H, W)
                    features = trunk(video)                                           # (B, D), (B, t, h, w, D)
                    logits = model.classify(features, task.name, batch.boxes, batch.box_clip)   # (B | K, C)
                loss = task_loss(task, logits, batch, clips[task.name], boxes[task.name] / world.size)
                if method:
                    loss = loss + method.loss(model, video, features, logits, task.name, step) / len(micro_batches)
                (loss / len(clips)).backward()
            losses[task.name] += loss.item()
            if not math.isfinite(losses[task.name]):
                log.suspects(step, batch, logits)
        losses = mean_losses(losses, world, step)    # raises on every rank alike, before a weight is touched
        average_heads(model, world)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm or math.inf)
        rate = lr_at(step, recipe) * task.lr_scale
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)    # None, not zero: an optimiser moves a head of zero gradient
        # ------------------------------ what follows is averaging, records and safety ------------------------------
        for key, value in (model.state_dict().items() if ema else ()):
            ema[key].lerp_(value, 1 - recipe.ema) if value.is_floating_point() else ema[key].copy_(value)
        done = step + 1
        log.step(step, losses, recipe.lr * rate, float(norm), sum(clips.values()) * world.size, stream.damaged)
        if recipe.eval_every and done % recipe.eval_every == 0 and done < recipe.steps:
            metrics = evaluate(model, recipe, world, validation, counts, ema)
            log.evaluation(done, metrics)
            model.train()
            if world.rank == 0 and metrics["score"] > best:
                best = metrics["score"]
                checkpoint(done, "best.pt")
        if done % recipe.save_every == 0 or done == recipe.steps:
            checkpoint(done, "last.pt")
        if recipe.keep_every and done % recipe.keep_every == 0:
            checkpoint(done, f"step-{done}.pt")
    else:
        step = recipe.steps
    if step < recipe.steps:
        checkpoint(step, "last.pt")
        print0(f"stopped by {interrupt.name} at step {step}; {out / 'last.pt'} is complete, the same command resumes")
        raise SystemExit(128 + interrupt.received if interrupt.received else 130)
    interrupt.restore()
    metrics = evaluate(model, recipe, world, validation, counts, ema, out)
    if world.rank == 0 and metrics["score"] > best:
        best = metrics["score"]
        checkpoint(recipe.steps, "best.pt")
    log.finish(metrics)
    return metrics if world.rank == 0 else None


def agree(micro_batches: list[data.Batch], world: World, interrupt: "Interrupt") -> tuple[dict, dict, bool]:
    """Per task of this step: clips of this rank and boxes of all ranks; and whether any rank was asked to stop."""
    clips, boxes = {}, {}
    for batch in micro_batches:
        clips[batch.task] = clips.get(batch.task, 0) + len(batch.video)
        boxes[batch.task] = boxes.get(batch.task, 0) + (0 if batch.boxes is None else len(batch.boxes))
    *totals, stop = world.sum([*boxes.values(), float(interrupt.received)])
    return clips, dict(zip(boxes, totals)), stop > 0


def task_loss(task: Task, logits: torch.Tensor, batch: data.Batch, clips: int, boxes: float) -> torch.Tensor:
    """One micro-batch's part of its task's loss.

    clips: of the step on this rank; boxes: of the step on all ranks, divided by the number of ranks. With these
    normalisers the sum over micro-batches, averaged over ranks as DDP does, is the loss of one process on the
    whole batch, however unevenly the boxes fall on the ranks.
    """
    if task.kind == "box":
        part = box_loss(logits, batch.labels, task.reduce, max(boxes, 1e-6))
    else:
        part = clip_loss(logits, batch.labels, task.smoothing) * (len(batch.video) / clips)
    return part * task.loss_weight


def mean_losses(losses: dict[str, float], world: World, step: int) -> dict[str, float]:
    """The losses over all ranks; FloatingPointError, on every rank at once, if one is not finite."""
    means = dict(zip(losses, (value / world.size for value in world.sum(list(losses.values())))))
    if not all(map(math.isfinite, means.values())):
        raise FloatingPointError(f"non-finite loss at step {step}: {means}; no weight was changed in this step")
    return means


def make_world(recipe: Recipe, world: World) -> None:
    """Rank 0 generates the recipe's videos (or finds them complete); the others wait for it."""
    if world.rank == 0:
        import demo
        demo.make_world(recipe.root, **recipe.world)
    world.wait()


def report_datasets(datasets: dict[str, data.Dataset], trained: list[str]) -> None:
    for name, dataset in datasets.items():
        counts = ", ".join(f"{count} {what}" for what, count in dataset.report.items() if count)
        print0(f"{name}{'' if name in trained else ' (not trained)'}: {len(dataset.classes)} classes, {counts}")


def stages(recipe: Recipe) -> list[Recipe]:
    """The trainings of a method, in order, with equal examples per dataset for all methods but `downstream`.

    `finetune`: the upstream tasks for the steps the schedule would give them, then the downstream tasks for
    the rest, each with a warm-up and cosine of its own. The idle heads stay in the model, so that the second
    stage also shows what is left of the upstream accuracy. `downstream` is the second stage alone.
    """
    if recipe.method not in ("finetune", "downstream"):
        return [recipe]
    upstream = [t for t in recipe.task if t.kind == "clip"]
    downstream = [t for t in recipe.task if t.kind == "box"]
    share = lambda t: t.weight if recipe.schedule == "weighted" else 1.0
    first = round(recipe.steps * sum(map(share, upstream)) / sum(map(share, recipe.task)))
    before = dataclasses.replace(recipe, out=str(Path(recipe.out) / "upstream"), steps=first, preview=0,
                                 warmup=min(recipe.warmup, first), train_tasks=[t.name for t in upstream])
    after = dataclasses.replace(recipe, steps=recipe.steps - first, warmup=min(recipe.warmup, recipe.steps - first),
                                train_tasks=[t.name for t in downstream])
    if recipe.method == "downstream":
        return [after]
    return [before, dataclasses.replace(after, init=str(Path(before.out) / "last.pt"), model={})]


# ------------------------------------------------------------------------------------------------
# Using a model
# ------------------------------------------------------------------------------------------------

def evaluate_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`evaluate CHECKPOINT`: the metrics again, from the recipe in the checkpoint or another one."""
    state = load(arguments.checkpoint)
    recipe = read_recipe(arguments.recipe, overrides) if arguments.recipe else recipe_of(state)
    recipe.mean, recipe.std = state["mean"], state["std"]
    world = setup(recipe)
    model = model_of(state).to(world.device)
    datasets = {t.name: data.open_task(t, recipe.root, "val") for t in recipe.task if t.val}
    for name, dataset in datasets.items():
        if name not in state["classes"] or len(dataset.classes) != len(state["classes"][name]):
            raise ValueError(f"{arguments.checkpoint} has no head for task {name} with {len(dataset.classes)} classes; "
                             f"its heads: { {k: len(v) for k, v in state['classes'].items()} }")
    out = Path(arguments.out or Path(arguments.checkpoint).parent / "evaluate")
    out.mkdir(parents=True, exist_ok=True)
    metrics = evaluate(model, recipe, world, datasets, state["class_counts"], state["ema"], out)
    if world.rank == 0:
        write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        print(summary(metrics), f"in {out}: metrics.json, detections, pictures", sep="\n")


@torch.no_grad()
def predict_command(arguments: argparse.Namespace) -> None:
    """`predict CHECKPOINT VIDEO`: with person boxes a detections csv, without the clip tasks' classes; and a video."""
    state = load(arguments.checkpoint)
    recipe, model = recipe_of(state), model_of(state)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    kind = "box" if arguments.boxes else "clip"
    tasks = [t for t in recipe.task if t.kind == kind]
    if not tasks:
        raise ValueError(f"{arguments.checkpoint} has no {kind} task; its tasks: "
                         + ", ".join(f"{t.name} ({t.kind})" for t in recipe.task))
    video = Path(arguments.video)
    duration_sec, video_fps = data.video_length(video)
    persons = data.person_boxes(arguments.boxes, video.stem) if arguments.boxes else {
        round(s * 1e6): (np.zeros((0, 4)), np.zeros(0)) for s in np.arange(arguments.every_sec / 2, duration_sec,
                                                                          arguments.every_sec)}
    if not persons:
        raise ValueError(f"{arguments.boxes}: no boxes of video {video.stem!r}")
    out = Path(arguments.out or f"predictions/{video.stem}")
    out.mkdir(parents=True, exist_ok=True)
    found, shown = {}, {}
    for microseconds, (boxes, confidence) in sorted(persons.items()):
        lines = []
        for task in tasks:
            clip, seen = data.clip_around(video, microseconds / 1e6, task, boxes)
            clip = data.normalise(torch.from_numpy(clip)[None].to(device), state["mean"], state["std"])
            seen = torch.as_tensor(seen, dtype=torch.float32, device=device)
            logits = model(clip, task.name, seen, torch.zeros(len(seen), dtype=torch.long, device=device)).float()
            names = state["classes"][task.name]
            if kind == "box":
                scores = (logits.sigmoid().cpu().numpy() * confidence[:, None])
                if task is tasks[0]:
                    found[video.stem, microseconds] = (boxes, scores)
            else:
                scores = logits.softmax(1).cpu().numpy()
            for row, s in enumerate(scores):
                top = [f"{names[c]} {s[c]:.2f}" for c in np.argsort(-s)[:arguments.top]]
                lines.append((row, top))
                print(f"{video.name} {microseconds / 1e6:.3f} s {task.name}"
                      + (f" box {row}" if kind == "box" else "") + ": " + ", ".join(top))
        shown[microseconds / 1e6] = (boxes, lines)
    if kind == "box":
        ava_eval.write_csv(out / "detections.csv", detection_rows(found, len(state["classes"][tasks[0].name])))
    data.write_video(out / "annotated.mp4", annotate(video, shown, duration_sec, video_fps), video_fps)
    print(f"in {out}: annotated.mp4" + (", detections.csv" if kind == "box" else ""))


def annotate(video: Path, shown: dict, duration_sec: float, fps: float):
    """Frames of the whole video, a second at a time, each with the boxes and labels of the nearest keyframe."""
    times = np.arange(0, duration_sec, 1 / fps)
    keyframes = np.array(sorted(shown))
    for second in np.split(times, np.arange(round(fps), len(times), round(fps))):
        for at, frame in zip(second, data.decode_clip(video, second)):
            boxes, lines = shown[keyframes[np.abs(keyframes - at).argmin()]]
            if len(boxes):
                yield data.draw_boxes(frame, boxes, [[text for row, top in lines if row == i for text in top]
                                                     for i in range(len(boxes))], AMBER)
            else:
                yield data.draw_boxes(frame, np.array([[0, 0, 1, 1]]), [[t for _, top in lines for t in top]], AMBER)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("command", nargs="?", default="train", choices=["train", "evaluate", "predict", "compare"])
    parser.add_argument("checkpoint", nargs="?", help="evaluate, predict")
    parser.add_argument("video", nargs="?", help="predict")
    parser.add_argument("--recipe", help=f"a TOML file or one of {', '.join(RECIPES)} (default: demo)")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming the run's folder")
    parser.add_argument("--boxes", help="predict: csv of person boxes, `video,second,x1,y1,x2,y2[,,score]`")
    parser.add_argument("--every-sec", type=float, default=1.0, help="predict without boxes: one clip every so often")
    parser.add_argument("--top", type=int, default=3, help="predict: labels shown per box or clip")
    parser.add_argument("--methods", default="finetune,cofinetune", help="compare: comma-separated")
    parser.add_argument("--seeds", type=int, default=5, help="compare: runs per method")
    settings = parser.add_argument_group("any key of the recipe, of [model] as --model.KEY, of a [[task]] as "
                                         "--task.NAME.KEY")
    for f in dataclasses.fields(Recipe):
        if f.name not in ("task", "model"):
            settings.add_argument(f"--{f.name.replace('_', '-')}", dest=f"recipe_{f.name}", metavar="VALUE",
                                  help=argparse.SUPPRESS)
    known, overrides = parser.parse_known_args(arguments)
    for f in dataclasses.fields(Recipe):
        if getattr(known, f"recipe_{f.name}", None) is not None:
            overrides += [f"--{f.name}", getattr(known, f"recipe_{f.name}")]
    known.out = known.recipe_out
    for text in overrides[::2]:
        if not re.match(r"--(task\.|model\.|[a-z_]+$)", text) or text.removeprefix("--").split(".")[0] not in (
                {"task", "model"} | {f.name for f in dataclasses.fields(Recipe)}):
            raise ValueError(f"unknown option {text}; --help lists them, recipe keys are "
                             + ", ".join(f.name for f in dataclasses.fields(Recipe)))
    if known.command in ("evaluate", "predict") and not known.checkpoint or known.command == "predict" and not known.video:
        raise ValueError(f"{known.command} needs a checkpoint" + " and a video" * (known.command == "predict"))
    if known.command == "predict":
        predict_command(known)
    elif known.command == "evaluate":
        evaluate_command(known, overrides)
    elif known.command == "compare":
        import baselines
        baselines.compare(known.recipe or "demo", overrides, known.methods.split(","), known.seeds)
    else:
        recipe = read_recipe(known.recipe or "demo", overrides)
        world = setup(recipe)
        for stage in stages(recipe):
            train(stage, world, known.fresh)
        if world.size > 1:
            world.wait()    # gloo aborts now and then when a rank leaves while another still speaks
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError, data.DecodeError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2)
