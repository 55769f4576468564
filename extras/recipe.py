"""Recipes: TOML files that are found by name or path, read, checked as a whole, and written back.

The classes that a recipe fills are the method's own: cofinetune.Recipe, data.Task, and
model.ModelConfig. Which keys exist, their types and bounds follow from their fields (settings.py);
here stand only the rules across fields.
"""

import dataclasses
import os
import re
import tomllib
from pathlib import Path

import torch

import data
from extras import methods, pretrained, settings
from model import SIZES, ModelConfig

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
PATHS = (
    "train val videos val_videos labels eval_labels exclude_train exclude_val train_boxes val_boxes"
).split()


def names() -> list[str]:
    """Of the recipes in the folder `recipes`."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(source: str) -> Path:
    """The file of a recipe that is given by its path or, from anywhere, by its name."""
    if os.path.isfile(source):
        return Path(source)
    named = FOLDER / f"{source}.toml"
    if not named.is_file():
        raise ValueError(f"recipe {source}: neither a file nor one of {', '.join(names())}")
    return named


def load(path: Path) -> dict:
    """The tables of a TOML file; ValueError with its path and line if it is none."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    table.setdefault("model", {})
    table.setdefault("task", [])
    if type(table["model"]) is not dict:
        raise ValueError(f"{path}: model = {table['model']!r} is not a table, expected [model]")
    if type(table["task"]) is not list or any(type(task) is not dict for task in table["task"]):
        raise ValueError(f"{path}: task is no list of tables, expected [[task]] for each dataset")
    if type(table.get("root", "")) is not str:
        raise ValueError(f"{path}: root = {table['root']!r} is not a text")
    return table


def read(kind: type, source: str, overrides: dict[str, str] | None = None, fresh: bool = False):
    """The recipe (of class `kind`) of a file or a name, with values overridden, checked as a whole.

    overrides: text by key: "lr", "model.drop_path", "task.NAME.batch". fresh: what lies in its
    folder does not count. All problems stand in the one ValueError: unknown keys, wrong types,
    missing files, what cannot be trained.
    """
    recipe, problems = resolve(kind, source, overrides, fresh)
    refuse(source, problems)
    return recipe


def refuse(source: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"recipe {source} cannot be run:\n  " + "\n  ".join(problems))


def resolve(
    kind: type, source: str, overrides: dict[str, str] | None = None, fresh: bool = False
) -> tuple:
    """`read`: the recipe as far as it can be made, and its problems."""
    path = find(source)
    table = {"name": path.stem, "out": f"runs/{path.stem}"} | load(path)
    return make(kind, table, path.resolve().parent, overrides or {}, fresh)


def make(
    kind: type, table: dict, base: Path, overrides: dict[str, str], fresh: bool = False
) -> tuple:
    """The same of tables. base: where their `root` starts."""
    if "root" in overrides:
        base = Path.cwd()  # what is typed is relative to where it is typed
    problems = override(kind, table, overrides)
    for key, problem in settings.misfits(kind, table).items():
        problems.append(problem)
        del table[key]
    tasks, wrong = make_tasks(table.pop("task", []))
    recipe = kind(**table, task=tasks)
    recipe.root = str((base / recipe.root).resolve())
    return recipe, problems + wrong + check(recipe, fresh)


def override(kind: type, table: dict, overrides: dict[str, str]) -> list[str]:
    """Put values that were typed into the tables of a recipe; -> what has no table."""
    problems = []
    for key, text in overrides.items():
        where, _, name = key.rpartition(".")
        target, owner = None, kind
        if where == "":
            target = table
        elif where == "model":
            target, owner = table["model"], ModelConfig
        for task in table["task"]:
            if where == f"task.{task.get('name')}":
                target, owner = task, data.Task
        if target is None:
            problems.append(f"--{key}: the recipe has no such table")
        elif key in ("task", "model"):
            problems.append(f"--{key}: a table; expected --model.KEY or --task.NAME.KEY")
        else:
            target[name] = settings.value_of(text, owner, name)
    return problems


def make_tasks(tables: list[dict]) -> tuple[list[data.Task], list[str]]:
    """`[[task]]` tables -> the tasks that can be made of them, and all that is wrong with them."""
    tasks, problems = [], []
    for number, table in enumerate(tables, 1):
        wrong = [f"`{key}` is missing" for key in ("name", "kind") if key not in table]
        wrong += settings.misfits(data.Task, table).values()
        if not wrong:
            task = data.Task(**table)
            wrong += data.task_problems(task)
            if task.name in [other.name for other in tasks]:
                wrong.append("a second task of this name")
            tasks.append(task)
        problems += [f"task {table.get('name', number)!r}: {problem}" for problem in wrong]
    if not tables:
        problems.append("no [[task]] table: at least one dataset is needed")
    return tasks, problems


def read_tasks(source: str | Path) -> list[tuple[data.Task, Path]]:
    """The tasks of a recipe, each with the folder where its paths start; for commands that look at
    data and not at the rest of it."""
    path = find(str(source))
    table = load(path)
    tasks, problems = make_tasks(table["task"])
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    folder = path.resolve().parent  # of a link, where it leads, as in `read`
    return [(task, folder / table.get("root", ".")) for task in tasks]


def model_config(table: dict) -> ModelConfig:
    """The [model] table: `arch` is a size of model.py, every other key a field of ModelConfig."""
    table = dict(table)
    arch = table.pop("arch", "B")
    if arch not in SIZES:
        raise ValueError(f"arch = {arch!r} is not one of {', '.join(SIZES)}")
    if wrong := settings.misfits(ModelConfig, table):
        raise ValueError("; ".join(wrong.values()))
    return ModelConfig(**SIZES[arch] | table)


def trained_tasks(recipe) -> list[str]:
    """Names of the tasks whose heads learn."""
    names = []
    for task in recipe.task:
        shares = [task.loss_weight, task.lr_scale]
        if recipe.schedule == "weighted":
            shares.append(task.weight)
        chosen = not recipe.train_tasks or task.name in recipe.train_tasks
        if recipe.method == "downstream" and task.kind == "clip":
            chosen = False
        if chosen and all(shares):
            names.append(task.name)
    return names


def check(recipe, fresh: bool = False) -> list[str]:
    """What would stop the run later on, found before the first video is opened. fresh: it begins
    with `init`, not with its last.pt."""
    problems = []
    if not recipe.out:
        problems.append("out is empty: expected the run's folder")
    known = [task.name for task in recipe.task]
    trained = [task for task in recipe.task if task.name in (recipe.train_tasks or known)]
    if recipe.schedule == "weighted" and trained and not any(task.weight for task in trained):
        problems.append("schedule weighted: all weights are 0")
    if len(recipe.betas) != 2:
        problems.append(f"betas = {recipe.betas}: expected two numbers")
    for name in recipe.train_tasks:
        if name not in known:
            problems.append(f"train_tasks: no task is called {name!r}")
    if recipe.method == "spottune" and not recipe.init:
        problems.append(
            "method spottune chooses between pretrained and finetuned blocks: it needs init, or "
            "take finetune+spottune"
        )
    if recipe.method.startswith(("finetune", "downstream")):
        if {task.kind for task in trained} != {"clip", "box"}:
            problems.append(
                f"method {recipe.method} needs upstream (clip) and downstream (box) tasks"
            )
    if recipe.schedule == "accumulate" and len({task.lr_scale for task in recipe.task}) > 1:
        problems.append(
            "accumulate makes one update for all tasks: lr_scale must be equal; use loss_weight"
        )
    resumed = not fresh and os.path.exists(os.path.join(recipe.out, "last.pt"))
    if recipe.init and not os.path.exists(recipe.init) and not resumed:
        problems.append(f"init = {recipe.init} does not exist")
    config = None
    try:
        config = model_config(recipe.model)
    except (ValueError, TypeError, ArithmeticError) as error:
        problems.append(f"[model]: {error}")
    if recipe.init:
        config = None  # the checkpoint decides
    for task in recipe.task:
        problems += [f"task {task.name}: {one}" for one in check_task(task, recipe, config)]
    if not problems:
        try:
            methods.stages(recipe)
        except ValueError as error:
            problems.append(str(error))
    return problems


def check_task(task: data.Task, recipe, config: ModelConfig | None) -> list[str]:
    """The rules between a task, the recipe, the network and the disk."""
    problems = []
    if not re.fullmatch(r"[\w-]+", task.name):
        problems.append("a name has letters, digits, - and _ only")
    if hasattr(torch.nn.ModuleDict(), task.name):  # "train", "items"
        problems.append("torch has this name for something else; take another")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if task.batch % (ranks * recipe.micro_batches):
        problems.append(
            f"batch = {task.batch} is not a multiple of {ranks} processes x "
            f"{recipe.micro_batches} micro batches"
        )
    if config:
        problems += check_clips(task, config)
    for key in PATHS:
        value = getattr(task, key)
        path = os.path.join(recipe.root, value)
        # A generated world comes later, and a pattern is looked up where it is read.
        if value and not recipe.world and "*" not in value and not os.path.exists(path):
            problems.append(f"{key} = {path} does not exist")
    return problems


def check_clips(task: data.Task, config: ModelConfig) -> list[str]:
    """Can the network take the clips? After `init` it is known when the checkpoint is read."""
    problems = []
    frames, side = config.tubelet[:2]
    if task.frames % frames or task.size % side:
        problems.append(
            f"{task.frames} frames of {task.size} px are not a whole number of tubelets "
            f"{tuple(config.tubelet)}"
        )
    if task.val_fit == "full" and any(16 % side for side in config.tubelet[1:]):
        problems.append(
            "val_fit full makes sides multiples of 16, not of the tubelet "
            f"{tuple(config.tubelet)}; take crop"
        )
    return problems


def to_toml(recipe) -> str:
    """The resolved recipe as TOML; `read` makes the same recipe of it."""
    table = dataclasses.asdict(recipe)
    model, tasks = table.pop("model"), table.pop("task")
    lines = [f"{key} = {settings.show(value)}\n" for key, value in table.items()]
    lines.append("\n[model]\n")
    lines += [f"{key} = {settings.show(value)}\n" for key, value in model.items()]
    for task in tasks:
        lines.append("\n[[task]]\n")
        lines += [f"{key} = {settings.show(value)}\n" for key, value in task.items()]
    return "".join(lines)


def differences(recipe, saved) -> list[str]:
    """The values in which a recipe contradicts the one of the checkpoint that it would resume."""
    free = settings.free_keys(type(recipe)) | {"task", "model"}
    if draws_masks(saved):  # other pieces, or compiled code, draw other masks
        free -= {"micro_batches", "compile"}
    if place_of_init(recipe) == place_of_init(saved):
        free |= {"init"}
    pairs = [("", vars(recipe), vars(saved), free)]
    saved_tasks = {task.name: vars(task) for task in saved.task}
    for task in recipe.task:
        old = saved_tasks.get(task.name, {})
        pairs.append((f"task.{task.name}.", vars(task), old, settings.free_keys(data.Task)))
    pairs.append(("model.", *model_tables(recipe, saved), settings.free_keys(ModelConfig)))
    different = []
    for where, new, old, free in pairs:
        for key, value in new.items():
            if key not in free and plain(value) != plain(old.get(key)):
                different.append(f"{where}{key} = {value!r} (checkpoint: {old.get(key)!r})")
    return different


def place_of_init(recipe) -> Path:
    """From the run's folder, if `init` lies in it: a folder may be moved or called otherwise."""
    init, out = (Path(os.path.abspath(path)) for path in (recipe.init, recipe.out))
    return init.relative_to(out) if init.is_relative_to(out) else init


def draws_masks(recipe) -> bool:
    """Are there draws that depend on how a batch is cut: masks of dropout or stochastic depth,
    SpotTune's paths?"""
    masks = recipe.model.get("drop_path") or any(task.dropout for task in recipe.task)
    return bool(masks) or recipe.method.endswith("spottune")


def model_tables(recipe, saved) -> tuple[dict, dict]:
    """The networks of two recipes, in full; after `init` only the keys that may leave it."""
    if not recipe.init:
        return vars(model_config(recipe.model)), vars(model_config(saved.model))
    new = {key: value for key, value in recipe.model.items() if key in pretrained.LEAVES_INIT}
    return new, saved.model


def plain(value):
    """Tuples as lists, as TOML and checkpoints keep them."""
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
