"""Checkpoints: written whole or not at all, read without unpickling anything, and the model that a
run begins with or a checkpoint holds."""

import contextlib
import os
from pathlib import Path

import torch

import data
from extras import methods, pretrained
from extras import recipe as recipes
from extras.weight_files import read_torch
from model import CoFinetuneModel, Head, ModelConfig


def save(path: Path, state: dict) -> None:
    """Write a checkpoint whole or not at all: temporary file, fsync, rename, fsync the folder."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # The RuntimeError is of torch's zip writer, which tells positions in the file.
        why = error if isinstance(error, OSError) else "no space left on the disk?"
        raise OSError(f"{path} could not be written ({why}); the one before it is intact") from None


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, on disks that can."""
    number = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some of a network cannot
        os.fsync(number)
    os.close(number)


def find(path: str | Path) -> Path:
    """A checkpoint's file, by itself or by its run's folder (best.pt, else last.pt). ValueError."""
    path = Path(path)
    if path.is_dir():
        here = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
        if not here:
            raise ValueError(f"{path}: a folder without best.pt or last.pt")
        path = here[0]
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint")
    return path


def load(path: str | Path) -> dict:
    """A checkpoint of this project, found as above: tensors and plain values; nothing is unpickled.
    ValueError in one sentence."""
    path = find(path)
    state = read_torch(path)
    if "model_config" not in state or "recipe" not in state:
        raise ValueError(f"{path}: not a checkpoint of this project; `--init` reads other families")
    return state | {"path": str(path)}


def recipe_of(state: dict, kind: type):
    """The recipe (of class `kind`) that a checkpoint was trained by. ValueError."""
    try:
        tasks = [data.Task(**table) for table in state["recipe"]["task"]]
        return kind(**state["recipe"] | {"task": tasks})
    except (TypeError, LookupError) as error:
        words = str(error).replace(".__init__() got an unexpected keyword argument", "'s key")
        raise ValueError(
            f"{state['path']}: its recipe is not of this version of the program: {words}"
        ) from None


def make_heads(recipe, classes: dict[str, list[str]]) -> dict[str, Head]:
    heads = {}
    for task in recipe.task:
        heads[task.name] = Head(
            task.kind,
            len(classes[task.name]),
            dropout=task.dropout,
            roi_size=task.roi_size,
            prior=task.prior,
        )
    return heads


def build_model(
    recipe, classes: dict[str, list[str]], state: dict | None = None, say=print
) -> CoFinetuneModel:
    """The model a run starts with: of the checkpoint `state` > of recipe.init > from scratch."""
    torch.manual_seed(recipe.seed)
    heads = make_heads(recipe, classes)
    if state:
        return CoFinetuneModel(ModelConfig(**state["model_config"]), heads)
    if not recipe.init:
        say("initialised from scratch")
        return CoFinetuneModel(recipes.model_config(recipe.model), heads)
    model, lines = pretrained.initialise(recipe.init, heads, recipe.model, classes)
    for task in recipe.task:
        if problems := recipes.check_clips(task, model.encoder.config):
            raise ValueError(f"init = {recipe.init}, task {task.name}: {'; '.join(problems)}")
    say("\n  ".join(lines))
    return model


def model_of(state: dict, kind: type, averaged: bool = False) -> CoFinetuneModel:
    """The trained model of a checkpoint, with the network of its method. ValueError.

    averaged: with the weights that `ema` has averaged, in place of the last step's.
    """
    recipe = recipe_of(state, kind)
    weights = state["ema"] if averaged else state["model"]
    if not weights:
        raise ValueError(f"{state['path']}: has no averaged weights; its recipe says ema = 0")
    model = build_model(recipe, state["classes"], state)
    methods.wrap_encoder(recipe, model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise ValueError(f"the checkpoint's weights do not fit its recipe: {words}") from None
    return model
