"""evaluate: the metrics of a checkpoint, by the recipe it was trained with or another one."""

import argparse
import dataclasses
import json
from pathlib import Path

from extras import checkpoints, report
from extras import job as jobs
from extras import recipe as recipes
from extras.run import write_text


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a file, or a run's folder (its best.pt, else last.pt)")
    parser.add_argument("--recipe", help="another one than it was trained by: a file or a name")


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
    if any(key.startswith("model.") for key in overrides):
        raise ValueError("evaluate: the network is the checkpoint's, --model.KEY cannot change it")
    state = checkpoints.load(options.checkpoint)
    out = Path(overrides.pop("out", Path(state["path"]).parent / "evaluation"))
    if (out / "last.pt").exists():
        raise ValueError(
            f"--out {out} is the folder of a run, whose recipe.toml and metrics.json would be "
            "overwritten; take another one"
        )
    saved = checkpoints.recipe_of(state, cofinetune.Recipe)
    trained = dict(init="", method="cofinetune", method_options={})
    saved = dataclasses.replace(saved, **trained)
    if options.recipe:
        recipe = recipes.read(cofinetune.Recipe, options.recipe, overrides)
        recipe = dataclasses.replace(recipe, model=saved.model, **trained)
    else:
        table = dataclasses.asdict(saved)
        recipe, problems = recipes.make(cofinetune.Recipe, table, Path(), overrides)
        recipes.refuse(f"of {state['path']}", problems)
    text, there = recipes.to_toml(recipe), out / "recipe.toml"
    if there.exists() and not (out / "metrics.json").exists():
        if there.read_text(encoding="utf-8") != text:  # nor of this evaluation, stopped before
            raise ValueError(f"--out {out} has a recipe.toml of its own; take another one")
    if not any(task.val for task in recipe.task):
        raise ValueError(f"{state['path']}: nothing to evaluate on, no task has `val`")
    out.mkdir(parents=True, exist_ok=True)
    job = jobs.join(recipe)
    model = checkpoints.model_of(state, cofinetune.Recipe).to(job.device)
    datasets = {}
    for task in recipe.task:
        if not task.val:
            continue
        dataset = datasets[task.name] = cofinetune.open_once(task, recipe, "val", job)
        known = state["classes"].get(task.name, [])
        if dataset.classes != known:
            if len(dataset.classes) == len(known):
                pairs = zip(dataset.classes, known, strict=True)
                here, there = next((here, there) for here, there in pairs if here != there)
                raise ValueError(
                    f"task {task.name}: its class {here!r} was {there!r} in {state['path']}"
                )
            heads = {name: len(names) for name, names in state["classes"].items()}
            raise ValueError(
                f"task {task.name} with {len(dataset.classes)} classes has no head in "
                f"{state['path']}, whose heads and numbers of classes are {heads}"
            )
    counts, ema = state["class_counts"], state["ema"]
    cofinetune.check_evaluation(recipe, datasets, counts)
    metrics = cofinetune.evaluate(model, recipe, job, datasets, counts, ema, out)
    if job.first:
        write_text(there, text)
        write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        print(report.summary(metrics), report.class_table(metrics), report.contents(out), sep="\n")
