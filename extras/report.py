"""What a run shows of its results: on the screen, in curves and in pictures of keyframes."""

import json
import math
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import data
from extras import pictures
from extras import recipe as recipes


def summary(metrics: dict) -> str:
    """The printed form of a metrics.json: every number with its protocol, counts and chance."""
    lines = []
    for name, measured in metrics["task"].items():
        if measured["kind"] == "clip":
            lines.append(clip_line(name, measured))
        else:
            lines += box_lines(name, measured)
    if "ema" in metrics:
        lines += ["with averaged weights", textwrap.indent(summary(metrics["ema"]), "  ")]
    return "\n".join(lines)


def chance(measured: dict, key: str) -> str:
    value = measured["chance"].get(key)
    return "" if value is None else f" (chance {value:.4f})"


def clip_line(name: str, measured: dict) -> str:
    line = f"{name}: top-1 {measured['top1']:.4f}{chance(measured, 'top1')}"
    if measured["classes"] > 5:
        line += f", top-5 {measured['top5']:.4f}{chance(measured, 'top5')}"
    return line + f"; {measured['clips']} clips, {measured['views']} views each" + caveats(measured)


def caveats(measured: dict) -> str:
    line = f", {measured['missing']} missing, {measured['undecodable']} undecodable"
    if not measured.get("trained", True):
        line += "; its head was not trained here"
    return line


def untrained(recipe, classes: dict[str, list[str]], counts: dict[str, dict]) -> list[str]:
    """A line for each task that is not trained, or that has classes without a training box or clip
    (AVA has some): they are scored like the rest. classes, counts: by task."""
    lines = []
    for task in recipe.task:
        if task.name not in recipes.trained_tasks(recipe):
            lines.append(f"{task.name}: its head is not trained here")
            continue
        names = []
        numbered = zip(classes[task.name], counts[task.name].items(), strict=True)
        for name, (number, count) in numbered:
            if count == 0 and name != f"class {number}":  # a number that the list leaves out
                names.append(name)
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            what = "box" if task.kind == "box" else "clip"
            lines.append(f"{task.name}: no training {what} of {', '.join(names[:5])}{more}")
    return lines


def box_lines(name: str, measured: dict) -> list[str]:
    frames = measured["keyframes"]
    if measured["mAP"] is None:
        return [f"{name}: no mAP, none of its classes has a box"]
    lines = [
        f"{name}: mAP {measured['mAP']:.4f}{chance(measured, 'mAP')} by {measured['protocol']}; "
        f"{measured['boxes']} boxes, {frames['matched']} of {frames['ground_truth']} keyframes"
        + caveats(measured)
    ]
    groups = {key: group for key, group in measured["groups"].items() if group["mAP"] is not None}
    if len(groups) > 1:  # one group alone repeats the mAP
        for key, group in groups.items():
            score = f"{group['mAP']:.4f}{chance(measured, key)}"
            lines.append(f"  {key}: mAP {score}, {group['classes']} classes")
    return lines


def class_table(metrics: dict) -> str:
    """AP of each class with the boxes it rests on; of many the ten best and the ten worst."""
    lines = []
    for name, measured in metrics["task"].items():
        scored = [one for one in measured.get("per_class", ()) if one["ap"] is not None]
        scored.sort(key=lambda one: -one["ap"])
        if not scored:
            continue
        rows = [f"  {one['ap']:.4f}  {one['name']} ({one['num_gt']})" for one in scored]
        if len(rows) > 20:
            rows[10:-10] = [f"  ... {len(rows) - 20} more"]
        lines += [f"{name}: AP by class (validation boxes)", *rows]
    return "\n".join(lines)


class Progress:
    """A line every ten seconds for what takes longer."""

    def __init__(self, job, what: str, total: int):
        self.job, self.what, self.total = job, what, total
        self.done, self.began = 0, time.monotonic()
        self.shown = self.began

    def add(self, count: int) -> None:
        self.done = min(self.done + count, self.total)
        now = time.monotonic()
        if now - self.shown > 10 and self.done < self.total:
            self.shown = now
            left = round((now - self.began) * (self.total / self.done - 1))
            self.job.say(f"{self.what}: {self.done} of {self.total}, {left} s left")


def next_commands(out: Path, recipe) -> str:
    """What one does with a run that is done."""
    run = shlex.quote(str(out))
    lines = [
        f"python cofinetune.py evaluate {run}",
        f"python cofinetune.py predict {run} VIDEO",
        f"python cofinetune.py info {run}",
    ]
    if any(task.kind == "box" for task in recipe.task):
        lines[1] += " --boxes detect"
    return "next:\n  " + "\n  ".join(lines)


def contents(folder: Path) -> str:
    files = [path.name for path in folder.iterdir() if path.is_file()]
    return f"in {folder}: " + ", ".join(sorted(name for name in files if name[0] != "."))


def draw_log(path: Path) -> None:
    """curves.png beside a log: the loss of every task, each point the mean of nine steps, and the
    scores of the evaluations."""
    losses, scores = {}, {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for task, loss in record.get("loss", {}).items():
            steps, values = losses.setdefault(f"loss {task}", ([], []))
            steps.append(record["step"])
            values.append(loss)
        for task, measured in record.get("metrics", {}).get("task", {}).items():
            name, value = f"top-1 {task}", measured.get("top1")
            if measured["kind"] == "box":
                name, value = f"mAP {task}", measured["mAP"]
            steps, values = scores.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    for _, values in losses.values():
        values[:] = np.convolve(np.pad(values, 4, "edge"), np.ones(9) / 9, "valid")
    panels = [pictures.draw_curves(losses, x_name="step", y_name="loss")]
    if any(len(steps) > 1 for steps, _ in scores.values()):
        panels.append(pictures.draw_curves(scores, x_name="step", y_name="score"))
    pictures.write_png(path.with_name("curves.png"), np.concatenate(panels))


def preview(recipe, dataset: data.Dataset, detections: dict, path: Path) -> None:
    """Some keyframes (path.png) and their clips (path.mp4), with annotated boxes in green and
    detected ones, with the two best labels, in amber."""
    task = dataset.task
    truth = data.read_boxes(os.path.join(recipe.root, task.val), len(dataset.classes))
    items, stills = [], []
    for item in dataset.items:
        if item.key in truth and detections[item.key] is not None:
            items.append(item)
    items = items[:: max(len(items) // recipe.preview, 1)][: recipe.preview]

    def film() -> Iterator[np.ndarray]:  # one clip in memory at a time
        for item in items:
            drawn = draw_clip(task, item, truth[item.key], detections[item.key], dataset.classes)
            stills.append(drawn[task.frames // 2])
            if drawn[0].shape == stills[0].shape:  # a film has frames of one size
                yield from drawn

    if items:
        pictures.write_video(path.with_suffix(".mp4"), film(), 1 / task.step_sec)
        pictures.write_png(path.with_suffix(".png"), pictures.grid(stills))


def draw_clip(task: data.Task, item: data.Item, persons: list, detected: tuple, names) -> list:
    """The frames of an item with all boxes. detected: boxes (k, 4), scores (k, C)."""
    boxes, scores = detected
    texts = [[names[label - 1] for label in sorted(person.labels)] for person in persons]
    texts += [best_labels(names, row, 2) for row in scores]
    colours = [pictures.GREEN] * len(persons) + [pictures.AMBER] * len(boxes)
    boxes = np.concatenate([np.reshape([person.box for person in persons], (-1, 4)), boxes])
    times = data.clip_times(task, item, ())  # the frames that the network saw
    drawn = []
    for frame in data.decode_clip(item.path, times):
        drawn.append(pictures.draw_boxes(frame, boxes, texts, colours))
    return drawn


def best_labels(names: list[str], scores: np.ndarray, top: int) -> list[str]:
    return [f"{names[c]} {scores[c]:.2f}" for c in np.argsort(-scores)[:top]]


def name_suspects(step: int, batch, logits: torch.Tensor, loss: float, job) -> None:
    """Print, if a loss is not finite, the clips whose logits are not; the whole batch if all are
    finite."""
    if math.isfinite(loss):
        return
    bad = ~torch.isfinite(logits).all(1).cpu()
    if batch.boxes is None:
        clips = bad.nonzero()[:, 0]
    else:
        clips = batch.box_clip[bad]
    keys = [batch.keys[clip] for clip in clips.unique().tolist()]
    keys = keys or batch.keys
    print(
        f"\nstep {step}, task {batch.task}, rank {job.rank}: the loss is not finite; "
        f"clips: {', '.join(map(str, keys))}",
        file=sys.stderr,
        flush=True,
    )
