"""The promises of the method, as executable examples."""

import copy
import heapq
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    AVA_LABELS,
    HERE,
    MODEL_VARIANTS,
    SGD,
    ava_map,
    ava_random,
    data_batches,
    data_same,
    data_stream,
    data_tasks,
    model_oracle,
    run_apart,
    run_command,
    run_log,
    run_metrics,
    run_options,
    run_python,
    run_ranks,
    run_start,
    run_start_weights,
    run_train,
    tiny_inputs,
    tiny_model,
    toml_table,
    write_lines,
)

import ava_eval
import cofinetune
import data
import model as M
from cofinetune import Recipe
from extras import checkpoints, formats, methods, pretrained, world
from extras import recipe as recipes
from extras.checkpoints import recipe_of
from extras.job import Job
from extras.optimisers import Muon, make_optimisers, orthogonal, share_of_peak
from extras.workers import ahead

pytest_plugins = ["helpers"]  # their fixtures
NO_EVALUATION = []  # where only what is trained counts: half of a tiny run
for task in ("actions", "templates", "ava"):
    NO_EVALUATION += [f"--task.{task}.val", ""]
NO_EVALUATION += ["--task.ava.val_boxes", ""]
ONE_EVALUATION = NO_EVALUATION[2:]  # of the actions alone: they are learned soonest
BOX_EVALUATION, CLIP_EVALUATION = NO_EVALUATION[:4], NO_EVALUATION[4:]


def test_demo_from_the_command_line(tiny_world, tiny_run):
    out, printed = tiny_run
    expected = (
        "recipe.toml log.jsonl last.pt best.pt detections.csv metrics.json curves.png "
        "preview.mp4 preview.png"
    )
    assert set(expected.split()) <= {path.name for path in out.iterdir()}
    metrics, world = run_metrics(out), tiny_world / "ava"
    scored = run_python(
        "ava_eval.py",
        "-l",
        world / "action_list.pbtxt",
        "-g",
        world / "val.csv",
        "-d",
        out / "detections.csv",
        "--json",
    )
    for key, value in json.loads(scored.stdout).items():
        if key in ("mAP", "protocol", "per_class"):
            expected = metrics["ava"][key]
            if key == "per_class":
                value, expected = ([c["ap"] for c in classes] for classes in (value, expected))
            assert value == expected
    assert (
        f"{metrics['ava']['mAP']:.4f}" in printed and f"{metrics['actions']['top1']:.4f}" in printed
    )
    assert "official-2020" in printed and str(out) in printed.splitlines()[-1]
    assert [record["step"] for record in run_log(out) if "loss" in record] == list(range(6))


def test_a_finished_run_says_so_and_fresh_starts_over(tiny_world, tiny_run, tmp_path, capsys):
    out, twin = tiny_run[0], tmp_path / "twin"
    before = (out / "last.pt").stat().st_mtime_ns
    cofinetune.main(run_options(tiny_world, out, "--preview", 2))
    assert "done already" in capsys.readouterr().out
    assert (out / "last.pt").stat().st_mtime_ns == before
    only = ["--out", twin, "--preview", 0]
    run_command("--recipe", out / "recipe.toml", *only)  # all that a run needs
    assert run_apart(out, twin) == 0 and run_log(out) == run_log(twin)
    fresh = run_command("--recipe", twin / "recipe.toml", *NO_EVALUATION, "--fresh")
    assert "initialised from scratch" in fresh.stdout and run_apart(out, twin) == 0


def test_evaluate_gives_what_the_run_gave(tiny_world, tiny_run, tmp_path):
    last = tiny_run[0] / "last.pt"
    run_command("evaluate", last, "--out", tmp_path)
    assert run_metrics(tmp_path) == run_metrics(tiny_run[0])
    run_command("evaluate", tiny_run[0], "--out", tmp_path / "folder", *ONE_EVALUATION)
    assert run_metrics(tmp_path / "folder") == {"actions": run_metrics(tiny_run[0])["actions"]}
    text = (tiny_world / "ava/action_list.pbtxt").read_text()
    renamed = tmp_path / "renamed.pbtxt"
    renamed.write_text(text.replace(f'"{world.LABELS[2]}"', '"other"'))
    words = ["evaluate", str(last), "--out", str(tmp_path / "x"), "--task.ava.labels", str(renamed)]
    with pytest.raises(
        ValueError, match=f"ava: its class 'other' was '{world.LABELS[2]}' in .*last"
    ):
        cofinetune.main(words)
    with pytest.raises(ValueError, match="is the folder of a run"):
        cofinetune.main(["evaluate", str(last), "--out", str(last.parent)])
    with pytest.raises(ValueError, match="the network is the checkpoint's"):
        cofinetune.main(["evaluate", str(last), "--model.arch", "B"])
    with pytest.raises(ValueError, match="one word too many: my.toml"):  # a forgotten --recipe
        cofinetune.main(["train", "my.toml"])


@pytest.mark.slow
def test_evaluate_keeps_the_recipe_that_was_used(tiny_world, tmp_path):
    """And trains from it."""
    out = tmp_path / "run"
    run_train(tiny_world, out, "--task.actions.val", "", "--task.templates.val", "", steps=1)
    words = ["evaluate", str(out), "--protocol", "slowfast", "--task.ava.val_box_score", "0.5"]
    for more in ([], ["--recipe", str(out / "recipe.toml")]):
        cofinetune.main([*words, *more])
        used = recipes.read(Recipe, str(out / "evaluation/recipe.toml"))
        assert (used.protocol, used.task[-1].val_box_score) == ("slowfast", 0.5)
        assert run_metrics(out / "evaluation")["ava"]["protocol"] == "slowfast"
        assert (used.out, used.method) == (str(out), "cofinetune")


def test_without_validation_nothing_is_evaluated(tiny_world, tmp_path, capsys):
    run_train(tiny_world, tmp_path, *NO_EVALUATION, steps=1)
    cofinetune.main(["info", str(tmp_path)])
    assert re.search(r"best so far *nothing is validated\n", capsys.readouterr().out)
    with pytest.raises(ValueError, match="nothing to evaluate on, no task has `val`"):
        cofinetune.main(["evaluate", str(tmp_path)])


def test_what_is_not_trained_is_named(tiny_world, tmp_path, capsys):
    """A head, at the start and beside its score; classes without a training clip."""
    few = ["--train_tasks", '["ava"]', "--task.actions.val", "", "--task.ava.val", ""]
    run_train(tiny_world, tmp_path, *few, "--task.ava.val_boxes", "", steps=1)
    printed = capsys.readouterr().out
    assert "\nactions: its head is not trained here\n" in printed
    assert re.search(r"templates: top-1 .*; its head was not trained here\n", printed)
    words = {"schedule": "weighted", "task.templates.weight": "0"}
    recipe = recipes.read(Recipe, "demo", words)
    assert recipes.trained_tasks(recipe) == ["actions", "ava"]
    classes = dict.fromkeys(("actions", "templates", "ava"), ["class 1", *"abcdefg"])
    actions, ava = [1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 1, 1, 1]  # class 1: of no list
    counts = dict(actions=dict(enumerate(actions)), ava=dict(enumerate(ava, 1)))
    assert cofinetune.report.untrained(recipe, classes, counts) == [
        "actions: no training clip of a, b, c, d, e and 2 more",
        "templates: its head is not trained here",
        "ava: no training box of b",
    ]


@pytest.mark.slow
def test_the_loss_falls_and_map_beats_chance(tmp_path):
    """A short demo, fixed seed; the demo itself has four times the data and twice the steps."""
    sizes = dict(
        seed=1,
        actions_train=300,
        actions_val=48,
        templates_train=200,
        templates_val=40,
        scenes_train=200,
        scenes_val=60,
    )
    metrics = cofinetune.train(
        recipes.read(
            Recipe,
            "demo",
            {
                "root": str(tmp_path / "world"),
                "out": str(tmp_path / "run"),
                "steps": "330",
                "world": toml_table(sizes),
                "preview": "0",
            },
        ),
        Job(),
    )["task"]
    losses = {}
    for record in run_log(tmp_path / "run"):
        for task, loss in record.get("loss", {}).items():
            losses.setdefault(task, []).append(loss)
    for task, values in losses.items():
        assert np.mean(values[-10:]) < 0.8 * np.mean(values[:10]), task
    assert metrics["ava"]["mAP"] > 2 * metrics["ava"]["chance"]["mAP"]
    assert metrics["actions"]["top1"] > 3 * metrics["actions"]["chance"]["top1"]


KILLER = """
import os, signal, sys
import torch._dynamo  # the optimisers import it at their first step: once for the three
import cofinetune

replace, save = os.replace, cofinetune.torch.save

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def die(when, number):
    count = 0
    def dying_replace(a, b):
        nonlocal count
        count += str(b).endswith("last.pt")
        last = str(b).endswith("last.pt") and count == number
        if last and when == "before rename": kill()
        replace(a, b)
        if last and when == "after rename": kill()
    def dying_save(state, f):
        if when == "half" and state["step"] == number:
            f.write(b"x" * 1000); f.flush(); kill()
        save(state, f)
    os.replace, cofinetune.torch.save = dying_replace, dying_save
    cofinetune.main(sys.argv[1:])

for when, number in (("half", 2), ("before rename", 2), ("after rename", 1)):
    child = os.fork()  # of a process that has imported torch and computed nothing
    if child == 0:
        die(when, number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (when, status)
"""


def test_resume_equals_an_uninterrupted_run(tiny_world, tmp_path):
    """Killed in the middle of a checkpoint's write, before and after its rename, the same command
    goes on to bit-identical weights and the same log."""
    whole, out, more = tmp_path / "a", tmp_path / "b", ["--save-every", 2, "--eval-every", 4]
    more += ONE_EVALUATION
    run_command(*run_options(tiny_world, whole, *more, steps=9))
    options = run_options(tiny_world, out, *more, steps=9)
    died = run_python("-c", KILLER, *options)
    assert died.returncode == 0, died.stderr
    assert "resumed" in run_command(*options).stdout
    assert run_apart(whole, out) == 0 and run_log(whole) == run_log(out)


def test_an_evaluation_that_was_killed_is_made_up_for(tiny_world, tmp_path, monkeypatch):
    """What was trained before it is saved by then, however rarely else."""
    whole, out, more = tmp_path / "a", tmp_path / "b", ["--eval-every", 4, *ONE_EVALUATION]
    run_train(tiny_world, whole, *more, steps=9)
    evaluate, calls = cofinetune.evaluate, []

    def dying(*arguments):
        calls.append(checkpoints.load(out / "last.pt")["step"])
        if len(calls) == 2:
            raise ArithmeticError("in the middle of it")
        return evaluate(*arguments)

    monkeypatch.setattr(cofinetune, "evaluate", dying)
    with pytest.raises(ArithmeticError):
        run_train(tiny_world, out, *more, steps=9)
    run_train(tiny_world, out, *more, steps=9)
    assert calls == [4, 8, 8, 9]
    assert run_apart(whole, out) == 0 and run_log(whole) == run_log(out)
    best = [checkpoints.load(folder / "best.pt") for folder in (whole, out)]
    assert best[0]["step"] == best[1]["step"] and best[0]["best"] == best[1]["best"]


def test_the_best_checkpoint_stays_where_eval_every_is_changed(tiny_world, tmp_path, monkeypatch):
    scores = iter([0.5, 0.3, 0.4])
    measured = dict(kind="clip", top1=0.0, top5=0.0)

    def evaluate(*_):
        return dict(task={"actions": measured}, score=next(scores), score_is="mAP")

    def dying(step, *arguments):
        if step == 3:
            raise ArithmeticError("between two checkpoints")
        return train_step(step, *arguments)

    train_step = cofinetune.train_step
    monkeypatch.setattr(cofinetune, "evaluate", evaluate)
    for name in ("summary", "class_table"):
        monkeypatch.setattr(cofinetune.report, name, lambda metrics: "")
    monkeypatch.setattr(cofinetune, "train_step", dying)
    with pytest.raises(ArithmeticError):
        run_train(tiny_world, tmp_path, "--eval-every", 2, steps=6)
    monkeypatch.setattr(cofinetune, "train_step", train_step)
    run_train(tiny_world, tmp_path, "--eval-every", 4, steps=6)
    best = checkpoints.load(tmp_path / "best.pt")
    assert (best["step"], best["best"]) == (2, 0.5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    evaluations = []
    for line in lines:
        if "metrics" in line:
            evaluations.append((line["step"], line["metrics"]["score"]))
    assert evaluations == [(2, 0.5), (4, 0.3), (6, 0.4)]


def test_the_best_checkpoint_is_that_of_the_trained_tasks(tiny_world, tmp_path, capsys):
    """The head that is not trained has a mAP that never changes; without validation: the last."""
    more = ["--train-tasks", '["actions"]', "--eval-every", 3, "--task.templates.val", ""]
    metrics = run_train(tiny_world, tmp_path / "a", *more, steps=4)
    assert metrics["score_is"] == "top-1"
    assert metrics["score"] == metrics["task"]["actions"]["top1"]
    unseen = []
    for task in ("actions", "templates", "ava"):
        unseen += [f"--task.{task}.val", ""]
    capsys.readouterr()
    run_train(tiny_world, tmp_path / "b", *unseen, "--eval-every", 3, steps=4)
    assert "best.pt is of step 4, the last: nothing was validated" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "b/best.pt")["step"] == 4


def test_fresh_forgets_all_stages_before_the_first(tiny_world, tmp_path, monkeypatch):
    """One that is stopped in its first stage is not taken for the finished run of before."""
    words = [*run_options(tiny_world, tmp_path, *NO_EVALUATION, steps=4), "--method", "finetune"]
    cofinetune.main(words)
    train_step = cofinetune.train_step
    monkeypatch.setattr(cofinetune, "train_step", lambda *_: (_ for _ in ()).throw(OSError("ends")))
    with pytest.raises(OSError, match="ends"):
        cofinetune.main([*words, "--fresh"])
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "last.pt").exists()
    monkeypatch.setattr(cofinetune, "train_step", train_step)
    cofinetune.main(words)
    assert checkpoints.load(tmp_path / "last.pt")["recipe"]["train_tasks"] == ["ava"]


def test_fresh_deletes_last_and_all_that_the_old_run_wrote(tiny_world, tmp_path, monkeypatch):
    """What would stop the new run leaves the old one whole; a restarted process deletes once."""
    root, out = shutil.copytree(tiny_world, tmp_path / "world"), tmp_path / "run"
    (root / "world.json").unlink()
    words = run_options(root, out, "--world", "{}", "--task.ava.val_boxes", "", steps=1)
    few = ["--train_tasks", '["ava"]', "--task.actions.val", "", "--task.templates.val", ""]
    cofinetune.main([*words, *few])
    for name in ("preview.mp4", "detections-ava.csv", "evaluation/detections.csv", "mine.csv"):
        write_lines(out / name, "old")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    text = (root / "ava/val.csv").read_text()
    for init, rows in (("nope.pt", text), ("mine.csv", text), ("", text.replace("\n", ",x\n", 1))):
        (root / "ava/val.csv").write_text(rows)
        with pytest.raises(ValueError):
            cofinetune.main([*words, "--init", str(init and out / init), "--fresh"])
        assert before == {path: before[path] for path in before if path.exists()}
    (root / "ava/val.csv").write_text(text)
    monkeypatch.setattr(cofinetune, "train_step", lambda *_: (_ for _ in ()).throw(OSError("ends")))
    with pytest.raises(OSError, match="ends"):
        cofinetune.main([*words, *few, "--fresh"])
    left = {str(path.relative_to(out)) for path in before if path.exists()}
    assert left == {"recipe.toml", "log.jsonl", "mine.csv", ".lock", ".fresh"} & left
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for kept, parent in ((True, os.getppid()), (False, -1)):  # of this launcher, of another one
        write_lines(out / "metrics.json", "{}")
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        with pytest.raises(OSError, match="ends"):
            cofinetune.main([*words, *few, "--fresh"])
        assert (out / "metrics.json").exists() == kept


def test_excluded_keyframes_never_count_as_missed(tiny_world, tiny_run, tmp_path):
    """official-2020 has no exclusions and scores them; official-2019 leaves them out."""
    video, second = (tiny_world / "ava/val.csv").read_text().split(",")[:2]
    write_lines(tmp_path / "excluded.csv", f"{video},{second}")
    words = ["evaluate", tiny_run[0] / "last.pt", "--out", tmp_path / "out", *BOX_EVALUATION]
    words += ["--task.ava.exclude_val", tmp_path / "excluded.csv"]
    assert "official-2020 scores all annotated" in run_command(*words).stdout
    whole, same = run_metrics(tiny_run[0])["ava"], run_metrics(tmp_path / "out")["ava"]
    assert (same["mAP"], same["keyframes"]) == (whole["mAP"], whole["keyframes"])
    run_command(*words, "--protocol", "official-2019")
    less = run_metrics(tmp_path / "out")["ava"]
    for count in ("ground_truth", "matched"):
        assert less["keyframes"][count] == whole["keyframes"][count] - 1


def test_sigterm_saves_and_a_full_disk_keeps_the_checkpoint(tiny_world, tmp_path):
    options = run_options(
        tiny_world, tmp_path, "--log-every", 1, "--save-every", 1000, "--workers", 1, steps=400
    )
    process, last = run_start(*options), tmp_path / "last.pt"
    for line in process.stdout:
        if line.startswith("step 3/"):  # loader workers get it too; two, as torchrun sends them
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert 3 <= checkpoints.load(last)["step"] < 400
    whole = last.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, hard))
    try:
        full = run_command(*options, "--save-every", 1, "--workers", 0, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "last.pt could not be written" in full.stderr and last.read_bytes() == whole
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_killed_at_random_moments(tiny_world, tmp_path):
    """Twenty kills, each a few steps after the resumption, or before its first step."""
    whole, out = tmp_path / "a", tmp_path / "b"
    more = ["--save-every", 2, "--workers", 1, "--log-every", 1]
    run_command(*run_options(tiny_world, whole, *more, steps=150))
    rng = np.random.default_rng(0)
    for _ in range(20):
        process = run_start(*run_options(tiny_world, out, *more, steps=150))
        for _ in range(rng.integers(1, 20)):  # lines: five before the first step
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert "is done already" not in process.communicate()[0]
    run_command(*run_options(tiny_world, out, *more, steps=150))
    assert run_apart(whole, out) == 0 and run_log(whole) == run_log(out)


def plain_losses(model, batch, tasks):
    """The loss of a task's whole batch, from its formula."""
    video = batch.video.permute(0, 4, 1, 2, 3).float()
    video = video - video.mean((2, 3, 4), keepdim=True)  # each clip by its own colour and deviation
    flat = video.flatten(1)
    video = video / (flat.square().sum(1) / (flat.shape[1] - 1)).sqrt().view(-1, 1, 1, 1, 1)
    task = tasks[batch.task]
    logits = model(video, batch.task, batch.boxes, batch.box_clip)
    if task.kind == "box":
        p = logits.sigmoid()
        one = -(batch.labels * p.log() + (1 - batch.labels) * (1 - p).log())
        return task.loss_weight * one.sum() / len(logits)
    target = F.one_hot(batch.labels, logits.shape[1]).float()
    target = target * (1 - task.smoothing) + task.smoothing / logits.shape[1]
    return task.loss_weight * -(target * logits.log_softmax(1)).sum(1).mean()


def plain_update(p, g, state, rate, recipe, decay):
    """SGD with momentum, or AdamW, of one tensor, as their papers have them."""
    if recipe.optimiser == "sgd":
        state["buffer"] = recipe.momentum * state.get("buffer", 0) + g + decay * p
        return p - rate * state["buffer"]
    one, two = recipe.betas
    state["t"] = state.get("t", 0) + 1
    state["m"] = one * state.get("m", 0) + (1 - one) * g
    state["v"] = two * state.get("v", 0) + (1 - two) * g * g
    p = p * (1 - rate * decay)
    mean, square = state["m"] / (1 - one ** state["t"]), state["v"] / (1 - two ** state["t"])
    return p - rate * mean / (square.sqrt() + 1e-8)


PLAIN = {
    "sgd": ["--optimiser", "sgd", "--lr", 0.05, "--clip-norm", 1.0, "--task.ava.loss_weight", 0.5],
    "adamw": ["--optimiser", "adamw", "--lr", 0.003, "--clip-norm", 0, "--layer-decay", 0.8,
              "--task.actions.smoothing", 0.2],
    "scaled": ["--optimiser", "sgd", "--lr", 0.02, "--task.ava.lr_scale", 3],
    "scaled-adamw": ["--optimiser", "adamw", "--lr", 0.002, "--task.ava.lr_scale", 3],
    "accumulate": ["--optimiser", "sgd", "--lr", 0.05, "--schedule", "accumulate", "--ema", 0.7],
    "weighted": ["--optimiser", "sgd", "--lr", 0.02, "--schedule", "weighted", "--momentum", 0.5,
                 "--task.ava.weight", 3],
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_train_is_a_plain_loop(tiny_world, tmp_path, case):
    """Losses, norms, rates, weights and averages against another loop that shares only the batches,
    the network and its first weights: absolute values, not one configuration against another."""
    more = ["--weight-decay", 0.1, "--final-lr", 0.2, "--micro-batches", 2, *PLAIN[case]]
    run_train(tiny_world, tmp_path, *NO_EVALUATION, *more, steps=4 if case == "accumulate" else 7)
    state = checkpoints.load(tmp_path / "last.pt")
    recipe, records = recipe_of(state, Recipe), [r for r in run_log(tmp_path) if "loss" in r]
    tasks = {task.name: task for task in recipe.task}
    sets = {}
    for name, task in tasks.items():
        sets[name] = data.open_task(task, recipe.root, "train", formats)
    model = checkpoints.build_model(recipe, state["classes"])
    stream = data.Stream(sets, recipe.schedule, recipe.seed, recipe.steps)
    memory = {name: {} for name, _ in model.named_parameters()}
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    depth = len(model.encoder.blocks)
    for step, batches in enumerate(data.training_batches(stream, 0, recipe.steps)):
        model.zero_grad(set_to_none=True)
        losses = {batch.task: plain_losses(model, batch, tasks) for batch in batches}
        (sum(losses.values()) / len(losses)).backward()
        norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt()
        shrink = 1.0
        if recipe.clip_norm and norm > recipe.clip_norm:
            shrink = recipe.clip_norm / norm
        own = tasks[batches[0].task].lr_scale
        done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
        share = (step + 1) / recipe.warmup
        if step >= recipe.warmup:
            share = 0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2
        for name, p in model.named_parameters():
            if p.grad is None:
                continue
            layer = depth + 1
            if name.startswith("encoder.blocks."):
                layer = int(name.split(".")[2]) + 1
            elif name.startswith(("encoder.patch", "encoder.pos")):
                layer = 0
            rate, scale = recipe.lr * share * recipe.layer_decay ** (depth + 1 - layer), own
            if recipe.optimiser != "sgd":
                rate, scale = rate * own, 1.0
            decay = 0.1 if p.ndim > 1 and name != "encoder.pos" else 0.0
            p.data = plain_update(
                p.data, p.grad * shrink * scale, memory[name], rate, recipe, decay
            )
        for name, p in model.named_parameters():
            average[name] = 0.7 * average[name] + 0.3 * p.data
        record = records[step]
        assert record["loss"] == pytest.approx({k: v.item() for k, v in losses.items()}, rel=1e-4)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert record["lr"] == pytest.approx(recipe.lr * share * own, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(state["model"][name], p.data, atol=2e-5, rtol=1e-3)
        if recipe.ema:
            torch.testing.assert_close(state["ema"][name], average[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("ranks, pieces", [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_several_processes_equal_one(tiny_world, tmp_path, ranks, pieces):
    """Parameters after 10 steps to 1e-6, with uneven boxes, also in two pieces a batch: DDP may
    exchange the gradients of the last one alone."""
    one, several = tmp_path / "one", tmp_path / "several"
    run_train(tiny_world, one, *SGD, steps=10)
    words = [*SGD, "--workers", 1, "--micro-batches", pieces]
    run_command(*run_options(tiny_world, several, *words, steps=10), run=run_ranks(ranks))
    state = checkpoints.load(one / "last.pt")
    start = run_start_weights(state)
    assert run_apart(one, several) < 1e-6  # and it did train:
    assert max((state["model"][k] - start[k]).abs().max().item() for k in start) > 1e-2
    found = [run_metrics(out)["ava"]["mAP"] for out in (one, several)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("optimiser, lr", [("sgd", 0.05), ("muon", 0.02)])  # heads: AdamW
def test_idle_heads_stay_bit_identical(tiny_world, tmp_path, monkeypatch, optimiser, lr):
    """At each step the head of its task moves and no other, although all have momentum by then."""
    moves, train_step = [], cofinetune.train_step

    def step_between_two_looks(step, batches, learner, *rest):
        before = copy.deepcopy(learner.model.heads.state_dict())
        result = train_step(step, batches, learner, *rest)
        moved = set()
        for key, value in learner.model.heads.state_dict().items():
            if not torch.equal(before[key], value):
                moved.add(key.partition(".")[0])
        moves.append((batches[0].task, moved))
        return result

    monkeypatch.setattr(cofinetune, "train_step", step_between_two_looks)
    more = ["--optimiser", optimiser, "--lr", lr, "--weight-decay", 0.1]
    run_train(tiny_world, tmp_path, *NO_EVALUATION, *more, steps=9)
    assert moves == 3 * [(name, {name}) for name in ("actions", "templates", "ava")]


def test_a_head_that_is_never_trained_is_never_right(tiny_world, tmp_path):
    """All classes tie under it, and a tie is no hit."""
    words = ["--train-tasks", '["actions", "ava"]', *CLIP_EVALUATION]
    metrics = run_train(tiny_world, tmp_path, *words)
    measured = metrics["task"]["templates"]
    assert measured["top1"] == measured["top5"] == 0 < metrics["task"]["actions"]["top1"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("words", [[], ["--precision", "bf16", "--compile", "true"]])
def test_a_gpu_learns_as_a_cpu_does(tiny_world, tmp_path, words):
    losses = []
    for device, more in ("cpu", []), ("cuda", words):
        options = [*SGD, "--device", device, *more]
        run_command(*run_options(tiny_world, tmp_path / device, *options), run=run_python)
        losses.append(
            [
                loss
                for record in run_log(tmp_path / device)
                for loss in record.get("loss", {}).values()
            ]
        )
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    again = run_options(tiny_world, tmp_path / "cuda", *SGD, "--device", "cuda", *words)
    assert "done already" in run_command(*again, run=run_python).stdout


@pytest.mark.slow
def test_a_dying_rank_takes_the_job_down(tiny_world, tmp_path):
    script = write_lines(
        tmp_path / "crash.py",
        """
import sys
import cofinetune
from extras.run import Log
step = Log.step
def dying(self, number, *rest):
    if self.job.rank == 1 and number == 3: raise ArithmeticError("rank one dies here")
    step(self, number, *rest)
Log.step = dying
cofinetune.main(sys.argv[1:])""",
    )
    began = time.time()
    died = run_ranks(2)(script, *run_options(tiny_world, tmp_path / "run", steps=3000))
    assert died.returncode != 0 and time.time() - began < 60
    assert "rank one dies here" in died.stderr and "Traceback" in died.stderr


def test_non_finite_loss_names_task_step_and_clips(tiny_world, tmp_path, capfd):
    with pytest.raises(FloatingPointError, match="step 1"):
        run_train(
            tiny_world,
            tmp_path,
            "--optimiser",
            "sgd",
            "--lr",
            "1e30",
            "--clip-norm",
            0,
            "--save-every",
            1,
            "--warmup",
            1,
        )
    error = capfd.readouterr().err
    assert "step 1, task templates" in error and "mp4" in error
    assert checkpoints.load(tmp_path / "last.pt")["step"] == 1 and len(run_log(tmp_path)) == 1
    net = tiny_model()
    net.encoder.pos.grad = torch.full_like(net.encoder.pos, 1e30)  # its norm is infinite
    with pytest.raises(FloatingPointError, match="non-finite gradient at step 7"):
        cofinetune.clip_gradients(net, 1.0, 7)


def test_boxes_of_a_diverged_model_stop_the_evaluation(tiny_world):
    recipe = recipes.read(Recipe, "demo", {"root": str(tiny_world), "workers": "0"})
    (task,) = [task for task in recipe.task if task.kind == "box"]
    dataset = data.open_task(task, tiny_world, "val")
    model = checkpoints.build_model(recipe, {task.name: dataset.classes for task in recipe.task})
    torch.nn.init.constant_(model.heads["ava"].fc.weight, math.nan)
    with pytest.raises(FloatingPointError, match="task ava: non-finite scores; the weights"):
        cofinetune.evaluate_boxes(model, recipe, Job(), dataset, {}, None)


def test_a_diverged_model_is_never_right(tiny_world, tmp_path):
    recipe = recipes.read(Recipe, "demo", {"root": str(tiny_world), "workers": "0"})
    dataset = data.open_task(recipe.task[0], tiny_world, "val")
    model = checkpoints.build_model(recipe, {task.name: dataset.classes for task in recipe.task})
    torch.nn.init.constant_(model.heads["actions"].fc.weight, math.nan)
    found = cofinetune.evaluate_clips(model, recipe, Job(), dataset, {}, None)
    assert found["top1"] == found["top5"] == 0
    for classes in (1, 4):  # nor where nan is among the first five
        assert cofinetune.classes_before(0, torch.full((classes,), math.nan)) >= 5


def test_missing_and_undecodable_clips_are_wrong(tiny_world, monkeypatch):
    """As keyframes are missed: a model that is right wherever it sees something, 2 of 24 not."""
    recipe = recipes.read(Recipe, "demo", {"root": str(tiny_world)})
    dataset = data.open_task(recipe.task[0], tiny_world, "val")
    dataset.missing_items, recipe.task[0].bad_share = 6, 1.0

    def right(model, recipe, job, dataset):
        (batch,) = data.evaluation_batches(dataset, len(dataset))
        batch.valid[:2] = False
        yield batch, torch.nn.functional.one_hot(batch.labels, len(dataset.classes)).float()

    monkeypatch.setattr(cofinetune, "predictions", right)
    found = cofinetune.evaluate_clips(None, recipe, Job(), dataset, {}, None)
    assert found["top1"] == found["top5"] == pytest.approx(22 / 30)
    assert (found["clips"], found["missing"], found["undecodable"]) == (30, 6, 2)


def test_evaluation_is_complete_or_an_error(tiny_world):
    recipe = recipes.read(Recipe, "demo", {"root": str(tiny_world)})
    dataset, one = data.open_task(recipe.task[0], tiny_world, "val"), Job()
    found = {item.key: 0 for item in dataset.items}
    assert cofinetune.gather_by_key(dataset, one, found) == found
    with pytest.raises(RuntimeError, match="24 items gave 23 results"):
        cofinetune.gather_by_key(dataset, one, dict([*found.items()][1:]))
    for n, key in enumerate(found):
        found[key] = None if n < 2 else 0  # of 24, bad_share 0.05
    with pytest.raises(ValueError, match="2 of 24 videos cannot be decoded, bad_share = 0.05"):
        cofinetune.gather_by_key(dataset, one, found)


def test_what_a_run_still_needs_is_not_deleted_or_needed(tiny_world, tmp_path):
    """--fresh and `init`; `evaluate` without the file of `init`; names beyond ASCII."""
    out = tmp_path / "run \N{CLAPPER BOARD}"
    run_train(tiny_world, out, *NO_EVALUATION, steps=1)
    shutil.copy(out / "last.pt", out / "mine.pt")
    words = [*run_options(tiny_world, out, *ONE_EVALUATION, steps=1), "--fresh", "--init"]
    for init in (out / "last.pt", out):
        with pytest.raises(ValueError, match="--fresh would delete init"):
            cofinetune.main([*words, str(init)])
    cofinetune.main([*words, str(out / "mine.pt")])
    assert checkpoints.load(out / "last.pt")["recipe"]["init"] == str(out / "mine.pt")
    (out / "mine.pt").unlink()
    cofinetune.main(["evaluate", str(out / "last.pt"), "--out", str(tmp_path / "again")])
    assert run_metrics(tmp_path / "again") == run_metrics(out)
    assert recipes.read(Recipe, str(tmp_path / "again/recipe.toml")).out == str(out)


def test_what_would_stop_the_evaluation_stops_the_start(tiny_world, tmp_path, capsys):
    """And an evaluation list may lack any of the trained classes; by another the best is found
    anew."""
    root = shutil.copytree(tiny_world, tmp_path / "world")
    (root / "world.json").unlink()
    few = "".join(f'item {{ name: "{world.LABELS[i - 1]}" id: {i} }}\n' for i in (1, 2, 3, 5))
    write_lines(root / "few.pbtxt", few)
    more = ["--world", "{}", "--task.ava.eval_labels", "few.pbtxt", *BOX_EVALUATION]
    found = run_train(root, tmp_path / "run", *more, steps=2)["task"]["ava"]
    assert [c["id"] for c in found["per_class"]] == [1, 2, 3, 5]
    best = checkpoints.load(tmp_path / "run/best.pt")
    checkpoints.save(tmp_path / "run/last.pt", best | {"best": 1.0})
    for options, score in ((more, 1.0), (more[:2] + more[4:], None)):
        (tmp_path / "run/metrics.json").unlink()
        found = run_train(root, tmp_path / "run", *options, steps=2)["task"]["ava"]
        said = "measured otherwise" in capsys.readouterr().out
        assert said == (score is None)
        best = checkpoints.load(tmp_path / "run/last.pt")["best"]
        assert best == (score or pytest.approx(found["mAP"]))
    text = (root / "ava/val.csv").read_text()
    (root / "ava/val.csv").write_text(text.replace("\n", ",x,y\n", 1))
    with pytest.raises(ValueError, match="val.csv:1: "):
        run_train(root, tmp_path / "other", *more, steps=2)
    assert not (tmp_path / "other/log.jsonl").exists()


def test_ema_accumulate_and_micro_batches(tiny_world, tmp_path):
    metrics = run_train(tiny_world, tmp_path / "ema", "--ema", 0.5, *NO_EVALUATION[2:4], steps=3)
    state = checkpoints.load(tmp_path / "ema/last.pt")
    assert metrics["ema"]["task"].keys() == metrics["task"].keys()
    assert all(torch.isfinite(value).all() for value in state["ema"].values())
    assert any(not torch.equal(state["ema"][key], state["model"][key]) for key in state["ema"])
    begun = pretrained.load(tmp_path / "ema/last.pt").encoder  # what a second stage begins with
    assert all(torch.equal(value, state["ema"][f"encoder.{key}"]) for key, value in begun.items())
    joint = [*NO_EVALUATION, "--schedule", "accumulate", "--precision", "bf16"]
    run_train(tiny_world, tmp_path / "joint", *joint, steps=3)
    losses = [record["loss"] for record in run_log(tmp_path / "joint") if "loss" in record]
    assert all(set(loss) == {"actions", "templates", "ava"} for loss in losses)
    sgd = [*NO_EVALUATION, *SGD]
    run_train(tiny_world, tmp_path / "one", *sgd, steps=3)
    run_train(tiny_world, tmp_path / "four", *sgd, "--micro-batches", 4, steps=3)
    run_train(tiny_world, tmp_path / "one", *sgd, "--micro-batches", 2, steps=3)  # free: it is done
    masks = [*sgd, "--model.drop_path", 0.2]
    run_train(tiny_world, tmp_path / "masks", *masks, steps=1)
    with pytest.raises(ValueError, match="micro_batches = 2 "):  # not free: other masks
        run_train(tiny_world, tmp_path / "masks", *masks, "--micro-batches", 2, steps=1)
    assert run_apart(tmp_path / "one", tmp_path / "four") < 1e-6


def test_finetuning_is_two_stages_of_the_same_loop(tiny_world, tmp_path):
    run_command(*run_options(tiny_world, tmp_path, "--method", "finetune", *ONE_EVALUATION))
    first, second = (checkpoints.load(tmp_path / name) for name in ("upstream/last.pt", "last.pt"))
    assert (first["step"], second["step"]) == (4, 2)
    idle = [key for key in second["model"] if key.startswith(("heads.actions", "heads.templates"))]
    assert idle and all(torch.equal(first["model"][key], second["model"][key]) for key in idle)
    losses = [list(record["loss"]) for record in run_log(tmp_path) if "loss" in record]
    assert losses == [["ava"], ["ava"]] and "top1" in run_metrics(tmp_path)["actions"]


def test_stages_see_every_dataset_as_often_as_cofinetuning():
    """By schedule; only the trained tasks; warm-up in proportion."""
    words = {"method": "finetune", "steps": "300", "warmup": "30"}
    weights = {"task.actions.weight": "3", "task.templates.weight": "1", "task.ava.weight": "1"}
    for schedule, more, expected in (
        ("round_robin", {}, (200, 100)),
        ("weighted", weights, (240, 60)),
        ("accumulate", {}, (300, 300)),  # every task at every step
        ("round_robin", {"train_tasks": '["actions", "ava"]'}, (150, 150)),
    ):
        recipe = recipes.read(Recipe, "demo", words | more | {"schedule": schedule})
        first, second = methods.stages(recipe)
        assert (first.steps, second.steps) == expected
        assert (first.warmup, second.warmup) == tuple(steps // 10 for steps in expected)
        assert second.train_tasks == ["ava"] and "ava" not in first.train_tasks
        assert set(first.train_tasks) <= set(recipe.train_tasks or ["actions", "templates"])
        assert second.init == f"{first.out}/last.pt"


@pytest.mark.parametrize(
    "words, problem",
    [
        ("--recipe nothing", "nothing"),
        ("--stpes 3", "did you mean --steps"),
        ("train o/my.toml", r"too many: o/my.toml, did you mean --recipe o/my.toml\?"),
        ("o/my.toml", r"no command 'o/my.toml', did you mean --recipe o/my.toml\?"),
        ("--epochs 3", "a run's length is --steps"),
        ("--steps", "--steps"),
        ("--task.ava.btach 3", "btach"),
        ("--task.avx.batch 3", "avx"),
        ("--steps many", "many"),
        ("--task.ava.name a.b", "letters"),
        ("--task.ava.name train", "torch has this name"),
        ("--seed 9223372036854775808", "at most 9223372036854775807"),
        ("--task.ava.offset_sec inf", "offset_sec = inf is not a number"),
        ("--method finetune --steps 1", "of 1 steps the (clip|box) tasks get none"),
        (
            "--schedule weighted --train_tasks=['ava'] --task.ava.weight 0",
            "all weights are 0",
        ),
        ("--task.ava.batch=3 --micro-batches=2", "multiple"),
        ("--xyz 3", "unknown option --xyz$"),
        ("evaluate nowhere.pt", "nowhere.pt"),
        ("--micro-batches 0", "at least 1"),
        ("--clip-norm -1", "at least 0"),
        ("--ema 1.5", "below 1"),
        ("--layer-decay -1", "layer_decay = -1 must be at least 0"),
        ("--betas [0.9]", "betas"),
        ("--model.heads 0", "model"),
        ("--model 3", "--model"),
        ("--model.tubelet [4,6,6] --task.ava.val_fit full", "multiples of 16"),
        ("--task.ava.flip_swap [4,5]", "flip_swap"),
        ("compare --jobs -1", "--jobs -1"),
        ("predict x.pt x.mp4", "x.pt: no such checkpoint"),
    ],
)
def test_words_are_refused(words, problem):
    with pytest.raises(ValueError, match=problem):
        cofinetune.main(words.split())


def test_recipes_are_refused_with_every_problem_at_once(tiny_world, tmp_path):
    task = ["[[task]]", 'name = "a"', 'kind = "clip"', 'train = "no.txt"']
    bad = tmp_path / "bad.toml"
    write_lines(
        bad,
        "stpes = 3",
        "xyz = 3",
        'lr = "fast"',
        'optimiser = "adm"',
        "[model]",
        'arch = "XXL"',
        *task,
        "batchs = 3",
    )
    with pytest.raises(ValueError) as error:
        recipes.read(Recipe, str(bad))
    for word in ("'stpes', did you mean 'steps'", "'xyz'\n", "lr", "adm", "XXL", "batchs"):
        assert word in str(error.value)
    write_lines(bad, *task, 'videos = "nowhere"', "batch = 3")
    with pytest.raises(ValueError, match="(?s)out is empty.*no.txt does.*nowhere does not exist"):
        recipes.read(Recipe, str(bad), {"out": ""})
    done = run_command("--stpes", "3", code=2)
    assert done.stderr == "error: train: unknown option --stpes, did you mean --steps?\n"
    last = tmp_path / "run/last.pt"
    run_train(tiny_world, last.parent, *NO_EVALUATION, steps=1)
    with pytest.raises(ValueError, match=r"seed = 5 \(checkpoint: 0\)"):
        run_train(tiny_world, last.parent, *NO_EVALUATION, "--seed", "5", steps=1)
    recipe = recipe_of(checkpoints.load(last), Recipe)
    recipe.task = recipe.task[:2]
    with pytest.raises(ValueError, match="the classes of task ava"):
        cofinetune.train(recipe, Job())
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable torch.save file"):
        checkpoints.load(last)


def test_damaged_videos_are_replaced_counted_and_bounded(tiny_world, tmp_path):
    root = shutil.copytree(tiny_world, tmp_path / "world")
    (root / "world.json").unlink()  # a generated world mends itself; a user's disk does not
    broken, missing, *others = sorted((root / "actions/videos").glob("train*"))
    broken.write_bytes(broken.read_bytes()[:300])
    missing.unlink()
    unseen = min((root / "actions/videos").glob("val*"))  # in evaluation: named, never replaced
    unseen.write_bytes(b"")
    more = ["--world", "{}", "--task.actions.bad_share", "0.1", "--train_tasks", '["actions"]']
    options = run_options(root, tmp_path / "run", *more, *ONE_EVALUATION, steps=10)
    done = run_command(*options)
    assert "1 missing videos" in done.stdout and "damaged videos 1" in done.stdout
    assert done.stdout.count(f"is trained instead: {broken}") == 1
    assert f"not evaluated: {unseen}" in done.stderr and "1 undecodable" in done.stdout
    for video in others[:7]:
        video.write_bytes(b"")
    assert "videos cannot be used" in run_command(*options, "--fresh", code=2).stderr
    assert (tmp_path / "run/recipe.toml").exists()


@pytest.mark.slow
def test_damaged_videos_are_counted_over_all_ranks(tiny_world, tmp_path):
    """Each rank meets its own: together they are too many, and all ranks stop in one sentence."""
    root = shutil.copytree(tiny_world, tmp_path / "world")
    (root / "world.json").unlink()
    videos = sorted((root / "actions/videos").glob("train*"))
    for video in videos[:4]:  # of 36: more than a tenth, and no rank alone need meet them all
        video.write_bytes(b"")
    options = ("--world", "{}", "--train_tasks", '["actions"]', "--task.actions.bad_share", "0.1")
    words = run_options(root, tmp_path / "run", *options, steps=9)
    done = run_ranks(2)("cofinetune.py", *words)
    assert done.returncode
    assert "like it 4 of 36 videos cannot be used, more than bad_share = 0.1" in done.stderr
    assert "another process of the job is gone" not in done.stderr


def test_schedule_of_the_rate():
    recipe = recipes.read(Recipe, "demo", {"steps": "100", "warmup": "10", "final_lr": "0.1"})
    shares = [share_of_peak(step, recipe) for step in range(101)]
    assert shares[9] == shares[10] == 1.0
    assert [shares[i] for i in (0, 55, 100)] == pytest.approx([0.1, 0.55, 0.1])
    assert all(a >= b for a, b in itertools.pairwise(shares[10:]))


def test_parameter_groups():
    recipe = recipes.read(Recipe, "demo")
    model = checkpoints.build_model(recipe, {task.name: ["x"] * 5 for task in recipe.task})
    recipe.optimiser, recipe.layer_decay, recipe.lr, recipe.weight_decay = "adamw", 0.5, 1.0, 0.1
    groups = {
        id(p): (g["peak"], g["weight_decay"])
        for optimiser in make_optimisers(model, recipe)
        for g in optimiser.param_groups
        for p in g["params"]
    }
    assert len(groups) == len(list(model.parameters()))
    encoder, lowest = model.encoder, 0.5 ** (len(model.encoder.blocks) + 1)
    for parameter, expected in (
        (encoder.patch.weight, (lowest, 0.1)),
        (encoder.pos, (lowest, 0.0)),
        (encoder.blocks[-1].qkv.weight, (0.5, 0.1)),
        (encoder.norm.weight, (1.0, 0.0)),
        (model.heads["ava"].fc.weight, (1.0, 0.1)),
    ):
        assert groups[id(parameter)] == expected


def test_muon_is_torchs_up_to_its_bfloat16():
    """And its steps have the singular vectors of the momentum, and values near one."""
    torch.manual_seed(0)
    shapes = [(192, 64), (64, 64), (64, 192), (64, 64)]
    ours, theirs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    groups = [[dict(params=p, lr=0.02, weight_decay=0.1)] for p in (ours, theirs)]
    one = Muon(groups[0], momentum=0.9)
    other = torch.optim.Muon(groups[1], momentum=0.9)
    for _ in range(3):
        for p, q in zip(ours[:3], theirs[:3], strict=True):  # the last one idles
            p.grad = q.grad = torch.randn_like(p)
        one.step()
        other.step()
    for p, q in zip(ours[:3], theirs[:3], strict=True):
        assert 0 < (p - q).norm() < 0.03 * q.norm()  # bfloat16 has 8 bits
    assert not ours[3].any() and ours[3] not in one.state
    x = torch.randn(3, 40, 60)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ orthogonal(x) @ v.mT
    values = core.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(core, torch.diag_embed(values), atol=1e-4, rtol=0)
    assert 0.6 < values.min() and values.max() < 1.25
    torch.testing.assert_close(orthogonal(x.mT), orthogonal(x).mT)
    torch.testing.assert_close(orthogonal(x[1:2])[0], orthogonal(x)[1])


def test_recipes_survive_their_text(tmp_path):
    recipe = recipes.read(Recipe, "demo", {"lr": "0.3", "model.drop_path": "0.1"})
    path = write_lines(tmp_path / "recipe.toml", recipes.to_toml(recipe))
    assert recipes.read(Recipe, str(path)) == recipe


def test_the_loop_of_the_readme_trains(tiny_world, tmp_path):
    """The leaves in a plain PyTorch loop, as README prints it, without cofinetune.py or extras."""
    text = (HERE / "README.md").read_text()
    code = text[text.index("```python\n") + 10 :]
    code = code[: code.index("```")].replace("data/demo", str(tiny_world))
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) == {"torch", "data", "model"}
    names = {}
    exec(code, names)
    assert 0 < names["loss"].item() < 20 and names["frames"].shape == (2, 64, 64, 3)


# ------------------------------------------------------------------------------------------------
# Oracles: the network
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MODEL_VARIANTS)
def test_model_encoder_is_the_textbook_formula(variant):
    enc, (video, _, _) = tiny_model(**MODEL_VARIANTS[variant]).encoder, tiny_inputs()
    for ours, oracle in zip(enc(video), model_oracle(enc, video), strict=True):
        torch.testing.assert_close(ours, oracle, atol=5e-6, rtol=1e-5)


def model_roi_oracle(features, box, bins):
    """torchvision's C++ kernel with aligned=True and sampling_ratio=0, sample by sample: features
    (h, w), box (4,) in cells, one dtype -> (bins, bins)."""
    h, w = features.shape
    x1, y1, x2, y2 = (c - 0.5 for c in box)
    bin_h, bin_w = (y2 - y1) / bins, (x2 - x1) / bins
    ny, nx = math.ceil(bin_h), math.ceil(bin_w)

    def bilinear(y, x):
        y, x = max(y, 0.0), max(x, 0.0)
        top, left = min(int(y), h - 1), min(int(x), w - 1)
        dy, dx = (y - top if top < h - 1 else 0.0), (x - left if left < w - 1 else 0.0)
        low, right = min(top + 1, h - 1), min(left + 1, w - 1)
        upper = features[top, left] * (1 - dx) + features[top, right] * dx
        return upper * (1 - dy) + (features[low, left] * (1 - dx) + features[low, right] * dx) * dy

    out = np.zeros((bins, bins), features.dtype)
    for p in range(bins):
        for q in range(bins):
            for i in range(ny):
                for j in range(nx):
                    y = y1 + p * bin_h + (i + 0.5) * bin_h / ny
                    x = x1 + q * bin_w + (j + 0.5) * bin_w / nx
                    out[p, q] += bilinear(y, x) / (ny * nx)
    return out


MODEL_BOXES = [  # x1, y1, x2, y2 in cells of a map of 9 rows and 13 columns
    (1.3, 2.1, 6.7, 7.9),
    (0, 0, 13, 9),
    (4.2, 3.3, 4.9, 3.8),  # inside, whole, below one cell
    (0, 0, 5.1, 4.4),
    (8.2, 5.3, 13, 9),  # at the border
    (0, 1, 0, 4),
    (3, 9, 8, 9),
    (0, 0, 0.4, 0.3),  # on the border, in a corner
    (5, 5, 5, 5),
    (2.5, 1.5, 2.5, 6),
    (13, 9, 13, 9),  # empty, line
    (0, 3, 13, 3.001),
]


@pytest.mark.parametrize("bins", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_model_roi_align_is_torchvisions_kernel(dtype, tolerance, bins):
    maps = np.random.default_rng(0).uniform(-1, 1, (2, 9, 13)).astype(dtype)
    box_clip = torch.arange(len(MODEL_BOXES)) * 7 % 2
    boxes = np.array(MODEL_BOXES, dtype)
    x1, y1, x2, y2 = torch.from_numpy(boxes).unbind(1)
    down, across = M.align_weights(y1, y2, 9, bins), M.align_weights(x1, x2, 13, bins)
    ours = down @ torch.from_numpy(maps)[box_clip] @ across.mT  # (K, bins, bins)
    features = torch.from_numpy(maps)[..., None]  # (2, 9, 13, 1)
    best = M.pool_boxes(features, down, across, box_clip)[:, 0]
    for k, box in enumerate(boxes):
        oracle = model_roi_oracle(maps[box_clip[k]], box, bins)
        np.testing.assert_allclose(ours[k].numpy(), oracle, 0, tolerance, err_msg=str(box))
        assert abs(best[k].item() - oracle.max()) < tolerance, box


def test_model_box_head_is_time_mean_then_roi_align_then_max():
    heads = {"boxes": M.Head("box", 7, roi_size=3)}
    net, (_, boxes, box_clip) = tiny_model(heads).double(), tiny_inputs()
    boxes[0] += torch.tensor([-0.5, 0.0, 0.0, 0.7])  # beyond the frame: clipped
    pooled, tokens = torch.randn(3, 24).double(), torch.randn(3, 4, 6, 4, 24).double()
    cells = (boxes.clamp(0, 1) * torch.tensor([4, 6, 4, 6])).numpy()
    net.heads["boxes"].float()  # the head computes in float32
    ours = net.classify((pooled, tokens), "boxes", boxes, box_clip)
    for k, b in enumerate(box_clip.tolist()):
        maps = tokens[b].mean(0).numpy()
        bins = [model_roi_oracle(maps[..., d], cells[k], 3).max() for d in range(24)]
        x = torch.from_numpy(np.array(bins, np.float32))
        torch.testing.assert_close(ours[k], net.heads["boxes"].fc(x))


def test_model_losses_are_their_formulas():
    logits, target = torch.randn(4, 7), (torch.rand(4, 7) < 0.3).float()
    p = logits.sigmoid()
    bce = -(target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(M.box_loss(logits, target), bce.sum() / 4)
    torch.testing.assert_close(M.box_loss(logits, target, 8), bce.sum() / 8)
    labels = torch.tensor([3, 0, 6, 3])
    shares = F.one_hot(labels, 7).float()
    ce = -(shares * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(M.clip_loss(logits, labels), ce)
    torch.testing.assert_close(M.clip_loss(logits, shares), ce)
    smooth = -((0.9 * shares + 0.1 / 7) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(M.clip_loss(logits, labels, 0.1), smooth)


# ------------------------------------------------------------------------------------------------
# Oracles: the stream
# ------------------------------------------------------------------------------------------------


def test_data_batches_are_a_function_of_the_step(data_folder):
    """Resumed at a step, with other numbers of workers: the same tensors. Epochs are complete."""
    options = dict(colour=0.3, mixup=0.4, steps=8)
    whole = data_batches(data_stream(data_folder, **options), 0, 8)
    assert [b.task for b in whole] == ["clips", "persons"] * 4
    for workers in (1, 2):
        again = data_batches(data_stream(data_folder, **options), 3, 8, workers=workers)
        assert data_same(again, whole[3:])
    assert data_batches(data_stream(data_folder, **options), 8, 8) == []  # of a finished run
    (other,) = data_batches(data_stream(data_folder, seed=1, **options), 0, 1)
    assert not torch.equal(other.video, whole[0].video)
    assert whole[0].labels.shape == (4, 3)
    assert torch.allclose(whole[0].labels.sum(1), torch.ones(4))
    assert whole[1].labels.shape == (len(whole[1].boxes), 4) and whole[1].box_clip.max() <= 3
    assert len({key for b in whole[0::2][:3] for key in b.keys}) == 12  # 3 batches of 4


def test_data_ranks_share_the_global_batch(data_folder):
    """Rank r of W holds clips r, r + W, ... of the one global batch, mixed with the same partners,
    boxes included."""

    def stream():
        return data_stream(data_folder, mixup=0.4, batch=8)

    for step, name in ((0, "clips"), (1, "persons")):
        (whole,) = data_batches(stream(), step, step + 1)
        for ranks, micro in ((2, 1), (4, 1), (2, 2)):
            parts = [
                (rank + part * ranks, batch)
                for rank in range(ranks)
                for part, batch in enumerate(
                    data_batches(stream(), step, step + 1, rank, ranks, 0, micro)
                )
            ]
            assert len(parts) == ranks * micro
            for first, batch in parts:
                mine = range(first, 8, ranks * micro)
                assert batch.task == name and batch.keys == [whole.keys[i] for i in mine]
                assert torch.equal(batch.video, whole.video[list(mine)])
                chosen = list(mine)
                if name == "persons":
                    chosen = [int(b) in mine for b in whole.box_clip]
                    assert torch.equal(batch.boxes, whole.boxes[chosen])
                    assert [mine[b] for b in batch.box_clip] == whole.box_clip[chosen].tolist()
                assert torch.equal(batch.labels, whole.labels[chosen])
    with pytest.raises(ValueError, match="batch = 8 is no multiple of 16"):
        data_batches(stream(), 0, 1, 0, 8)


@pytest.mark.parametrize(
    "schedule, low, high", [("round_robin", 21, 21), ("weighted", 10, 10), ("accumulate", 41, 41)]
)
def test_data_schedules_and_epochs(schedule, low, high, data_folder):
    clips, persons = data_tasks(batch=5)
    clips.weight, persons.weight = 1.0, 3.0
    datasets = {task.name: data.open_task(task, data_folder) for task in (clips, persons)}
    stream = data.Stream(datasets, schedule, 7, 41)
    tasks = [stream.tasks_at(step) for step in range(41)]
    assert low <= sum("clips" in names for names in tasks) <= high
    assert (tasks[0] == ["clips", "persons"]) == (schedule == "accumulate")
    for name, size in (("clips", 12), ("persons", len(datasets["persons"]))):
        steps = [step for step in range(41) if name in stream.tasks_at(step)]
        places = [place for step in steps for place in stream.positions(step, name)]
        assert places == list(range(len(places)))  # consecutive, whatever the schedule
        found = [stream.locate(name, place) for place in places]
        for epoch in range(len(found) // size):
            part = found[epoch * size : (epoch + 1) * size]
            assert sorted(part) == [(epoch, i) for i in range(size)]
        orders = [[i for _, i in found[k * size : (k + 1) * size]] for k in range(2)]
        assert len(found) < 2 * size or orders[0] != orders[1]
        parts = [place for rank in range(3) for place in stream.positions(steps[9], name, rank, 3)]
        assert sorted(parts) == places[45:50]  # every rank's of the tenth batch
    same, longer = (data.Stream(datasets, schedule, 7, steps) for steps in (41, 99))
    assert [same.tasks_at(s) for s in range(41)] == tasks and same.state() == stream.state()
    assert schedule == "weighted" or [longer.tasks_at(s) for s in range(41)] == tasks
    assert data.Stream(datasets, seed=8).state() != data.Stream(datasets, seed=7).state()
    relabelled = data.open_task(clips, data_folder)
    relabelled.items.label[3] = 0 if relabelled.items.label[3] else 1
    states = [data.Stream({"clips": d}).state() for d in (relabelled, datasets["clips"])]
    assert states[0] != states[1]


def test_data_evaluation_is_complete(data_folder):
    """Every item once on any number of ranks; V views of an item in a row, each as it is alone."""
    tasks = data_tasks(views=[3, 3], batch=18)
    clips, persons = (data.open_task(task, data_folder, "val") for task in tasks)
    for dataset, views in ((clips, 9), (persons, 1)):
        keys = [
            key
            for rank in range(2)
            for b in data.evaluation_batches(dataset, 18, rank, 2, ahead(rank))
            for key in b.keys
        ]
        assert sorted(keys) == sorted([item.key for item in dataset.items] * views)
        assert all(len(set(keys[i : i + views])) == 1 for i in range(0, len(keys), views))
    batch = next(data.evaluation_batches(clips, 18))
    assert batch.video.shape == (18, 4, 32, 32, 3) and batch.valid.all()
    assert batch.labels.tolist() == [0] * 9 + [1] * 9
    starts = np.linspace(0, 2.0 - 4 * 0.16, 3)  # v0 lasts 2 s
    for view in range(9):
        times, left = starts[view // 3] + np.arange(4) * 0.16, [0, 14, 28][view % 3]
        full = data.decode_clip(data_folder / "videos/v0.mp4", times, 40)
        assert np.array_equal(batch.video[view], full[:, 4:36, left : left + 32])
    batch = next(data.evaluation_batches(persons, 4))
    assert batch.video.shape == (1, 4, 48, 64, 3)
    assert torch.allclose(batch.boxes, torch.from_numpy(batch.boxes_source).float())


# ------------------------------------------------------------------------------------------------
# Oracles: the metric
# ------------------------------------------------------------------------------------------------


def ava_oracle(truth_lines, found_lines, excluded, protocol) -> dict:
    """{class: AP} by the rules, one keyframe, one class, one box at a time."""
    official, mmaction2 = protocol in ("official-2019", "official-2020"), protocol == "mmaction2"

    def parse(lines, cap) -> dict:
        frames = defaultdict(list)
        for line in lines:
            video, time, x1, y1, x2, y2, label, *score = line.split(",")
            rows = frames[video, int(time)]
            row = (float(score[0]) if score else 1.0, int(label), *map(float, (y1, x1, y2, x2)))
            if int(label) not in AVA_LABELS:
                continue
            elif not official:
                rows.append(row)
            elif not cap or len(rows) < cap:
                heapq.heappush(rows, row)
            elif row[0] > rows[0][0]:
                heapq.heapreplace(rows, row)
        return {
            key: sorted(rows, key=lambda row: -row[0]) if official or mmaction2 else rows
            for key, rows in frames.items()
        }

    truth, found = parse(truth_lines, 0), parse(found_lines, 50)
    seen = (line.split(",") for line in (truth_lines if mmaction2 else found_lines))
    order = dict.fromkeys((row[0], int(row[1])) for row in seen if int(row[6]) in AVA_LABELS)
    known = {key for key, rows in truth.items() if rows} if mmaction2 else truth
    if protocol in ("official-2020", "mmaction2"):
        order = [key for key in order if key in known]
    real, result = np.float32 if mmaction2 else float, {}
    for c in AVA_LABELS:
        scores, hits = [], []
        positives = sum(
            row[1] == c
            for key, rows in truth.items()
            for row in rows
            if mmaction2 or key not in excluded
        )
        for key in order:
            if key in excluded or key not in found:
                continue
            boxes = [row[2:] for row in truth.get(key, ()) if row[1] == c]
            boxes = np.array(boxes, real).reshape(-1, 4)
            rows = [r for r in found[key] if r[1] == c and r[2] < r[4] and r[3] < r[5]]
            if protocol == "official-2018":
                rows = [rows[i] for i in np.argsort([row[0] for row in rows])[::-1]]
            taken = set()
            for row in rows:
                box = np.array(row[2:], real)
                inner = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
                inner = np.maximum(inner.astype(float), 0).prod(1)
                area = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
                overlap = inner / (area - inner)
                best = int(np.argmax(overlap)) if len(boxes) else -1
                scores.append(row[0])
                hits.append(best >= 0 and overlap[best] >= 0.5 and best not in taken)
                taken |= {best} if hits[-1] else set()
        if positives and (scores or not mmaction2):
            hits = np.array(hits, bool)[np.argsort(np.array(scores, real))[::-1]]
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            result[c] = sum(precision[i:].max() for i in np.flatnonzero(hits)) / positives
    return result


@pytest.mark.parametrize("protocol", ava_eval.PROTOCOLS)
def test_ava_agrees_with_a_plain_evaluator(tmp_path, protocol):
    for seed in range(30):
        truth, found, lines = ava_random(seed, digits=seed % 3)
        lines = None if protocol == "official-2020" else lines
        expected = ava_oracle(truth, found, {("v0", 902), ("v1", 903)} if lines else (), protocol)
        result = ava_map(tmp_path, truth, found, protocol, lines)
        for one in result["per_class"]:
            want = expected.get(one["id"])
            assert one["ap"] == (want if want is None else pytest.approx(want, abs=1e-9)), seed
        assert result["mAP"] == pytest.approx(np.mean(list(expected.values())), abs=1e-9)
        assert result["protocol"] == protocol


def test_ava_by_hand(tmp_path):
    truth = ["v,902,0,0,1,1,1", "v,903,0,0,1,1,1", "v,902,0,0,1,1,2"]
    found = [
        "v,902,0,0,1,0.5,1,0.9",  # IoU exactly 0.5: found, precision 1 at recall 1/2
        "v,902,0,0,1,1,1,0.8",  # better placed, but the box is taken
        "v,903,0,0,1,0.49,1,0.7",  # IoU 0.49
        "v,903,0,0,1,1,1,0.6",
    ]  # found, precision 1/2 at recall 1
    result = ava_map(tmp_path, truth, found)
    assert [one["ap"] for one in result["per_class"]] == [0.75, 0.0, None]
    assert [one["recall"] for one in result["per_class"]] == [1.0, 0.0, 0.0]
    assert result["mAP"] == 0.375 and result["classes"] == 2
    truth = ["v,902,0,0,1,1,1", "v,902,0,0,1,0.9,1"]  # no second choice, though it covers the other
    found = ["v,902,0,0,1,1,1,0.9", "v,902,0,0,1,0.96,1,0.8"]
    assert ava_map(tmp_path, truth, found)["mAP"] == 0.5
    found = ["v,902,.125,0,.875,1,1,.9", "v,902,0,0,.75,1,1,.8"]  # the first is as near to both:
    for ids, official, slowfast in (
        ((1, 2), 1, 0.5),
        ((2, 1), 0.5, 0.5),
    ):  # the higher person id first
        truth = [f"v,902,0,0,.75,1,1,{ids[0]}", f"v,902,.25,0,1,1,1,{ids[1]}"]
        assert ava_map(tmp_path, truth, found)["mAP"] == official
        assert ava_map(tmp_path, truth, found, "slowfast")["mAP"] == slowfast
        first = ["u,902,0,0,.1,.1,1"]  # on another keyframe: one more box, nowhere near
        result = ava_map(tmp_path, first + truth, found, "mmaction2")
        assert result["mAP"] == pytest.approx(official * 2 / 3)
