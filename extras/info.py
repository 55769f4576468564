"""info: what a checkpoint holds, of this project or of another family that `init` reads."""

import argparse
import math
import textwrap
from pathlib import Path

from extras import checkpoints, pretrained

WIDTH = 100  # of a printed line
SHOWN = 12  # classes of a head, unless --classes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
What a checkpoint holds: the network and its input, heads and classes, how far it was trained, by
which recipe and how well, and what `init` would take of it."""
    parser.add_argument(
        "checkpoint", help="a file, the folder of a run, or a folder of save_pretrained"
    )
    parser.add_argument("--classes", action="store_true", help="all classes of every head")
    parser.add_argument(
        "--frames", type=int, help="of the checkpoint's clips, where it does not say it (UMT)"
    )


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
    path = Path(options.checkpoint)
    if (path / "last.pt").exists() or (path / "best.pt").exists():
        path = checkpoints.find(path)
    weights = pretrained.load(path, options.frames)
    shown = None if options.classes else SHOWN
    lines = network_lines(path, weights) + head_lines(weights, shown)
    if weights.family == pretrained.OWN:
        state = checkpoints.load(path)
        try:
            lines += training_lines(state, checkpoints.recipe_of(state, cofinetune.Recipe))
        except ValueError as error:  # an older version's
            lines.append(("recipe", str(error)))
    lines += init_lines(weights)
    for title, text in lines:
        print(textwrap.fill(text, WIDTH, initial_indent=f"{title:12}", subsequent_indent=" " * 12))


def network_lines(path: Path, weights: pretrained.Weights) -> list[tuple[str, str]]:
    config = weights.config
    encoder = sum(tensor.numel() for tensor in weights.encoder.values())
    heads = sum(tensor.numel() for tensor in weights.head_state.values())
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    height, width = config.size
    tubelet = " x ".join(map(str, config.tubelet))
    tokens = math.prod(config.grid)
    if config.mean:
        colours = f"(RGB in [0, 1] - {rounded(config.mean)}) / {rounded(config.std)}"
    else:
        colours = "by each clip's own mean and deviation"
    return [
        ("file", f"{path}, {size:.1f} MB, {weights.family}"),
        (
            "encoder",
            f"{encoder:,} parameters and {heads:,} in heads; width {config.width}, depth "
            f"{config.depth}, {config.heads} heads of attention, positions {config.pos}, pool "
            f"{config.pool}",
        ),
        (
            "input",
            f"{config.frames} frames of {height} x {width} px (h x w), in tubelets of {tubelet}: "
            f"{tokens} tokens; colours {colours}",
        ),
    ]


def rounded(values: list[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def head_lines(weights: pretrained.Weights, shown: int | None) -> list[tuple[str, str]]:
    """shown: at most so many names of classes; None: all."""
    lines = []
    for name, head in weights.heads.items():
        text = f"{name} ({head.kind} task), {head.classes} classes"
        names = weights.classes.get(name, [])
        if names:
            text += ": " + ", ".join(names[:shown])
        if shown is not None and len(names) > shown:
            text += f", ... and {len(names) - shown} more (--classes)"
        lines.append(("head", text))
    return lines or [("head", "none")]


def training_lines(state: dict, recipe) -> list[tuple[str, str]]:
    scored = [task for task in recipe.task if task.val]
    trained = [task for task in scored if task.name in recipe.train_tasks]
    scored = trained or scored  # as cofinetune.evaluate takes its score
    names = [task.name for task in scored if task.kind == "box"]
    by = f"mAP ({recipe.protocol}) of {', '.join(names)}"
    if not names:  # clip tasks alone
        by = f"top-1 of {', '.join(task.name for task in scored)}"
    best = "not evaluated yet"
    if not scored:
        best = "nothing is validated"
    elif state.get("best", -1.0) >= 0:
        best = f"{state['best']:.4f}, {by}"
    lines = [
        ("trained", f"{state['step']} of {recipe.steps} steps, torch {state.get('torch', '?')}"),
        ("best so far", best),
        (
            "recipe",
            f"{recipe.name}: {recipe.method}, {recipe.optimiser} at lr {recipe.lr:g}, "
            f"{recipe.schedule} over {len(recipe.task)} tasks, seed {recipe.seed}"
            + (f", from {recipe.init}" if recipe.init else ""),
        ),
    ]
    for task in recipe.task:
        lines.append(
            (
                "task",
                f"{task.name} ({task.kind}), batch {task.batch}, {task.frames} frames, one every "
                f"{task.step_sec:.3g} s, {task.size} px, {task.train or 'only evaluated'}",
            )
        )
    return lines


def init_lines(weights: pretrained.Weights) -> list[tuple[str, str]]:
    """What a new run takes that names this checkpoint as `init`."""
    if weights.routed:
        return [("init takes", "nothing: SpotTune chooses between two encoders for each clip")]
    text = (
        f"the encoder, {len(weights.encoder)} tensors, as is; of the recipe's [model] count only "
        f"{', '.join(pretrained.LEAVES_INIT)}"
    )
    if weights.family == pretrained.OWN:
        text += "; a head where the recipe has a task of its name, kind and number of classes"
    else:
        text += "; no head, new ones begin untrained"
    lines = [("init takes", text)]
    lines += [("", line) for line in weights.report if not line.startswith("mapped: all")]
    return lines
