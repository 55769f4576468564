"""A run's folder: what is there already, checkpoints, the log, the stop after a signal.

recipe.toml      what really ran; starts the run again
log.jsonl        an object per step, and one per evaluation; curves.png: the same drawn
last.pt best.pt  checkpoints, whole or not at all
metrics.json     of the end, with detections.csv, preview.png and preview.mp4
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import data
from extras import checkpoints, report
from extras import recipe as recipes
from extras.job import Interrupt, Job

WRITTEN = (
    "last.pt best.pt step-*.pt log.jsonl metrics.json curves.png events.out.tfevents.*".split()
)
DRAWN = ("detections.csv", "preview.png", "preview.mp4")  # by an evaluation, of each box task


def forget(stages: list) -> None:
    """--fresh: delete what earlier runs and their evaluations wrote in the folders of all stages,
    before the first begins: one that is stopped then is not taken for the old run. ValueError,
    with nothing deleted, if the run is to begin with one of these files."""
    old = []
    for recipe in stages:
        drawn = list(DRAWN)
        for task in recipe.task:
            drawn += [name.replace(".", f"-{task.name}.") for name in DRAWN]
        for pattern in WRITTEN + drawn:
            old += Path(recipe.out).glob(pattern)
        for name in ["recipe.toml", "metrics.json", *drawn]:
            old += Path(recipe.out).glob(f"evaluation/{name}")
    init = stages[0].init  # that of a later stage is made by the one before it
    lost = {path.resolve() for path in old} | {path.parent.resolve() for path in old}
    if init and Path(init).resolve() in lost:
        raise ValueError(f"--fresh would delete init = {init}: take another --out")
    for path in old:
        path.unlink()


def launched_by() -> str:
    """The same for all that a launcher starts, over its restarts too."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def again(out: Path) -> bool:
    """Did a launcher start this process anew, after it had emptied the folder?"""
    restarted, mark = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), out / ".fresh"
    return bool(restarted) and mark.exists() and mark.read_text() == launched_by()


class Run:
    """What `train` leans on so that nothing is lost: it begins where last.pt stands, and every
    checkpoint counts on a log that is on the disk."""

    def __init__(self, recipe, job: Job, stream, train_sets: dict, fresh=()):
        """Look into the folder. ValueError if it holds another recipe's run, or one at work.

        fresh: the stages whose folders are emptied by `resume`, when all that it needs is there.
        """
        self.recipe, self.job, self.stream = recipe, job, stream
        self.out = Path(recipe.out)
        self.classes = {name: dataset.classes for name, dataset in train_sets.items()}
        self.counts = {name: dataset.class_counts() for name, dataset in train_sets.items()}
        self.interrupt, self.state, self.ema = Interrupt(), None, {}
        self.shared: set[tuple[str, str]] = set()  # (task, damaged video) that all ranks know
        self.step, self.best, self.best_step = 0, -1.0, 0
        self.truth = truth_of(recipe)
        if job.first:
            folders = {Path(stage.out) for stage in (recipe, *fresh)}
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            self.locks = [lock(folder) for folder in folders]
        to_empty = len(fresh) if job.first and not again(self.out) else 0
        self.fresh = fresh if job.sum([to_empty])[0] else ()
        last = self.out / "last.pt"
        if last.exists() and not self.fresh:
            self.state = checkpoints.load(last)
            saved = checkpoints.recipe_of(self.state, type(recipe))
            self.refuse_another(last, saved)
            self.step, self.best = self.state["step"], self.state["best"]
            self.best_step = self.state["best_step"]
            truth = self.state.get("truth", self.truth)
            if not self.finished and measured_by(saved, truth) != measured_by(recipe, self.truth):
                job.say(
                    f"{last}: its best score was measured otherwise than this recipe measures; "
                    "best.pt will be the best of the evaluations from here on"
                )
                self.best = -1.0
        here = self.step, stream.state()
        for rank, (step, items) in enumerate(job.everywhere(here)):
            if step != self.step:
                raise ValueError(
                    f"the processes start at different steps: {self.out} must lie on a disk that "
                    "all machines share"
                )
            if items != here[1]:
                different = data_differences(here[1], items, f"rank {rank}")
                raise ValueError(
                    f"rank {job.rank} and rank {rank} find different data: {'; '.join(different)}; "
                    "expected the same annotations and videos on all machines"
                )

    def refuse_another(self, last: Path, saved) -> None:
        """ValueError if the checkpoint is of another recipe, other items or other classes."""
        different = recipes.differences(self.recipe, saved)
        now, then = self.stream.state(), self.state["stream"]
        different += data_differences(now, then)
        if now != then and not different:
            different.append("the order of its clips")
        for name in self.classes | self.state["classes"]:
            if self.classes.get(name) != self.state["classes"].get(name):
                different.append(f"the classes of task {name}")
        if different:
            new = [task.name for task in self.recipe.task if task.name not in self.state["classes"]]
            hint = ""
            if new:
                hint = f" (a new task begins from these weights: --init {last} --out ANOTHER)"
            raise ValueError(
                f"{last} is of another recipe: {'; '.join(different)}. Take another --out, or "
                f"--fresh to start over{hint}"
            )

    @property
    def finished(self) -> bool:
        return self.step == self.recipe.steps and (self.out / "metrics.json").exists()

    def metrics(self) -> dict:
        self.interrupt.restore()
        self.job.say(f"{self.out} is done already; --fresh starts over")
        return json.loads((self.out / "metrics.json").read_text(encoding="utf-8"))

    def resume(self, model, criterion, optimisers: list) -> None:
        """Put the checkpoint, if there is one, into what is trained; open the log."""
        self.model, self.criterion, self.optimisers = model, criterion, optimisers
        if self.fresh and self.job.first:
            forget(self.fresh)
            write_text(self.out / ".fresh", launched_by())
        if self.recipe.ema:
            self.ema = {key: value.clone() for key, value in model.state_dict().items()}
        if self.state:
            model.load_state_dict(self.state["model"])
            for optimiser, saved in zip(optimisers, self.state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            criterion.load_state_dict(self.state["method"])
            for key, value in self.state["ema"].items():
                self.ema[key] = value.to(self.job.device)
            self.job.say(
                f"resumed {self.out / 'last.pt'} at step {self.step} of {self.recipe.steps}"
            )
            self.state = None  # twice the model and more, in every process
        # What `init` decided stands in the recipe that is kept, so that it says what ran.
        config = dataclasses.asdict(model.encoder.config)
        self.recipe = dataclasses.replace(self.recipe, model=config)
        if self.job.first:
            write_text(self.out / "recipe.toml", recipes.to_toml(self.recipe))
        self.log = Log(self.out, self.job, self.recipe, self.step)
        self.log.announce(model)
        for line in report.untrained(self.recipe, self.classes, self.counts):
            self.job.say(line)

    def steps(self) -> Iterator[int]:
        """The steps that are left; after a signal to any rank all stop at once, saved."""
        for step in range(self.step, self.recipe.steps):
            if self.share_and_ask():
                self.checkpoint(step, "last.pt")
                self.job.say(
                    f"\nstopped before step {step}; {self.out / 'last.pt'} is complete, and the "
                    "same command resumes it"
                )
                raise SystemExit(128 + (self.interrupt.received or signal.SIGTERM))
            yield step
        self.interrupt.restore()

    def share_and_ask(self) -> bool:
        """Tell the other ranks which videos could not be decoded here: `bad_share` is of the whole
        job. Was any rank asked to stop?"""
        news = {}
        for task, files in self.stream.damaged.items():
            news[task] = {}
            for file, why in files.items():
                if (task, file) not in self.shared:
                    news[task][file] = why
        count = sum(map(len, news.values()))
        stop, count_of_all = self.job.sum([self.interrupt.received, count])
        parts = self.job.everywhere(news) if count_of_all else []
        for part in parts:
            for task, files in part.items():
                self.shared |= {(task, file) for file in files}
                self.stream.add_damaged(task, files)
        return stop > 0

    def next(self, batches: Iterator) -> list:
        """The next micro-batches, with the time that they kept the loop waiting."""
        began = time.monotonic()
        micro_batches = next(batches)
        self.log.waited_sec = time.monotonic() - began
        return micro_batches

    def record(self, step: int, losses: dict, share: float, norm: float, clips: int) -> None:
        """Average the weights, log the step. share: of the peak rate."""
        if self.ema:
            for key, value in self.model.state_dict().items():
                self.ema[key].lerp_(value, 1 - self.recipe.ema)
        extra, lr = self.criterion.report(), self.recipe.lr * share
        damaged = {}
        for files in self.stream.damaged.values():
            damaged |= files
        self.log.step(step, losses, lr, norm, clips * self.job.size, damaged, extra)

    def evaluation_due(self, step: int) -> bool:
        """Before this step, of the weights that a checkpoint of this number holds."""
        return evaluation_due(self.recipe, step)

    def keep(self, step: int) -> None:
        """The checkpoints that are due after this step."""
        recipe, done = self.recipe, step + 1
        if recipe.keep_every and done % recipe.keep_every == 0:
            self.checkpoint(done, f"step-{done}.pt")
        # A signal within an evaluation is answered after it: what it may cost is saved before.
        if done % recipe.save_every == 0 or done == recipe.steps or self.evaluation_due(done):
            self.checkpoint(done, "last.pt")

    def record_evaluation(self, done: int, metrics: dict, **more) -> None:
        """Log an evaluation after `done` steps; the best one is kept. ValueError if it was of other
        annotations than the predicted boxes."""
        for path, content in truth_of(self.recipe).items():
            if content != self.truth.get(path):
                raise ValueError(
                    f"{path} was changed since the run began, so the evaluation after step {done} "
                    "does not count; the same command goes on with the file as it is now"
                )
        self.log.evaluation(done, metrics, **more)
        if metrics["score"] > self.best or not metrics["task"]:  # without validation: the last
            self.best, self.best_step = metrics["score"], done
            self.checkpoint(done, "best.pt")
            self.checkpoint(done, "last.pt")  # a resumed run knows it, whatever its eval_every

    def finish(self, metrics: dict) -> dict:
        """The end: metrics.json, curves.png, and what lies where."""
        self.record_evaluation(self.recipe.steps, metrics, final=True)
        if self.job.first:
            write_text(self.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
            report.draw_log(self.out / "log.jsonl")
            if table := report.class_table(metrics):
                print(table)
            why = "the last: nothing was validated"
            if metrics["task"]:
                why = f"by {metrics['score_is']} {self.best:.4f}"
            print(f"best.pt is of step {self.best_step}, {why}")
            print(report.contents(self.out))
            print(report.next_commands(self.out, self.recipe))
        return metrics

    def checkpoint(self, step: int, name: str) -> None:
        """After `step` steps, on rank 0: everything that a resumed run or a reader needs."""
        if not self.job.first:
            return
        self.log.sync()
        heads = {name: dataclasses.asdict(head.config) for name, head in self.model.heads.items()}
        state = dict(
            model=self.model.state_dict(),
            model_config=dataclasses.asdict(self.model.encoder.config),
            heads=heads,
            mean=list(self.model.scale[0]),
            std=list(self.model.scale[1]),
            classes=self.classes,
            class_counts=self.counts,
            step=step,
            best=self.best,
            best_step=self.best_step,
            truth=self.truth,
            ema=self.ema,
            stream=self.stream.state(),
            optimisers=[optimiser.state_dict() for optimiser in self.optimisers],
            method=self.criterion.state_dict(),
            recipe=dataclasses.asdict(self.recipe),
            torch=str(torch.__version__),
        )
        checkpoints.save(self.out / name, state)


def evaluation_due(recipe, step: int) -> bool:
    return recipe.eval_every > 0 and step > 0 and step % recipe.eval_every == 0


def data_differences(now: dict, saved: dict, where: str = "checkpoint") -> list[str]:
    """What differs between two data.Stream.state that no setting of the recipe tells; where: the
    place of the other one."""
    if now["draws"] != saved.get("draws"):
        return ["the version of this program, which draws other clips from the same seed"]
    different = []
    for name in now["tasks"].keys() & saved["tasks"].keys():
        count, before = now["tasks"][name]["items"], saved["tasks"][name]["items"]
        if count != before:
            different.append(f"task.{name}: {count} training items ({where}: {before})")
        elif now["tasks"][name]["fingerprint"] != saved["tasks"][name]["fingerprint"]:
            different.append(f"task.{name}: other training items, or their annotations changed")
    return sorted(different)


def truth_of(recipe) -> dict[str, str]:
    """The files that boxes are scored by, which an evaluation reads anew -> a digest of each."""
    digests = {}
    for task in recipe.task:
        if task.kind == "box" and task.val:
            for path in data.files_of(Path(recipe.root) / task.val):
                digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return digests


def measured_by(recipe, truth: dict[str, str]) -> list:
    """What decides on a score beside the weights, and a resumed run may change; of files other
    than the boxes' annotations their names."""
    tasks = []
    for task in recipe.task:
        persons = task.exclude_val, task.val_boxes, task.val_box_score
        tasks.append((task.val, task.eval_labels, *persons, task.val_fit, list(task.views)))
    return [recipe.protocol, tasks, sorted(truth.values())]


def lock(folder: Path):
    """Hold a run's folder for this process, until it ends in whatever way. ValueError if it is
    held."""
    import fcntl

    file = open(folder / ".lock", "w")
    try:
        # Not flock, which the loader's forked workers would inherit and keep.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"{folder}: a run is at work in this folder; take another --out") from None
    except OSError as error:  # a disk that knows no locks
        print(f"{folder} cannot be locked ({error}): start no second run in it", file=sys.stderr)
    return file


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def memory_gib(device: torch.device) -> float:
    """The most that this process has held: of a GPU its memory, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, others KiB


class Log:
    """log.jsonl (every step), the progress line, TensorBoard where it is installed. Rank 0 writes.

    What depends on the machine stands under "time", so that two logs can be compared without it.
    """

    def __init__(self, out: Path, job: Job, recipe, start: int):
        self.path, self.job, self.recipe = out / "log.jsonl", job, recipe
        self.tty, self.board = sys.stdout.isatty(), None
        self.waited_sec, self.named = 0.0, set()
        self.since = time.monotonic()  # a clock that is set must not disturb what is measured
        self.steps, self.clips, self.waits, self.losses = 0, 0, 0.0, {}
        self.patience_sec = 10  # of the first line, which has the first estimate
        self.stepped = self.since  # when the last step ended
        if not job.first:
            return
        write_text(self.path, "".join(self.lines_before(start)))
        self.file = open(self.path, "a", encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out), purge_step=start)

    def lines_before(self, start: int) -> list[str]:
        """What the log has of the steps that the checkpoint counts; the later ones come again, as
        an evaluation at this step does that is due."""
        kept, again = [], evaluation_due(self.recipe, start)
        if not self.path.exists():
            return kept
        for line in self.path.read_text(encoding="utf-8").splitlines(True):
            if not line.endswith("}\n"):  # a kill can leave half a line
                continue
            record = json.loads(line)
            counts = record["step"] < start
            if "loss" not in record and record["step"] == start:
                counts = not again
            if counts and "final" not in record:
                kept.append(line)
        return kept

    def announce(self, model) -> None:
        """The first line of a run: what is trained where."""
        device, job, recipe = self.job.device, self.job, self.recipe
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        else:
            where = f"CPU ({torch.get_num_threads()} threads)"
        if job.size > 1:
            where = f"{job.size} processes, each on {where}"
        parameters = sum(p.numel() for p in model.parameters())
        size = f"{parameters / 1e6:.1f} M parameters"
        job.say(f"{size} on {where}, {recipe.steps} steps, {recipe.precision}")
        if device.type == "cpu" and parameters > 2e7:
            job.say("without a GPU this is slow; to see it work: --model.arch tiny")

    def step(
        self, step: int, losses: dict, lr: float, norm: float, clips: int, damaged: dict,
        extra: dict,
    ) -> None:  # fmt: skip
        if not self.job.first:
            return
        for path in sorted(damaged.keys() - self.named):
            self.named.add(path)
            self.show(f"another clip of its task is trained instead: {damaged[path]}")
        now = self.stepped = time.monotonic()
        clock = dict(unix=round(time.time(), 3), waited_sec=round(self.waited_sec, 4))
        record = dict(step=step, loss=losses, lr=lr, grad_norm=norm, **extra, time=clock)
        self.file.write(json.dumps(record) + "\n")
        if self.board:
            for key, value in (losses | dict(lr=lr, grad_norm=norm)).items():
                self.board.add_scalar(f"train/{key}", value, step)
        self.steps += 1
        self.clips += clips
        self.waits += self.waited_sec
        for task, loss in losses.items():
            self.losses.setdefault(task, []).append(loss)
        done, last = step + 1, step + 1 == self.recipe.steps
        seconds = max(now - self.since, 1e-9)
        if done % self.recipe.log_every == 0 or last or seconds > self.patience_sec:
            self.file.flush()
            self.progress(done, lr, seconds, len(damaged))
            self.since, self.steps, self.clips, self.waits, self.losses = now, 0, 0, 0.0, {}
            self.patience_sec = 60

    def progress(self, done: int, lr: float, seconds: float, damaged: int) -> None:
        """One line for people, over the steps since the last one."""
        left = datetime.timedelta(seconds=round((self.recipe.steps - done) * seconds / self.steps))
        words = [f"step {done}/{self.recipe.steps}"]
        for task, losses in self.losses.items():
            words.append(f"{task} {sum(losses) / len(losses):.3f}")
        words += [
            f"lr {lr:.2g}",
            f"{self.clips / seconds:.3g} clips/s",
            f"data wait {self.waits / seconds:.0%}",
            f"{memory_gib(self.job.device):.1f} GiB",
            f"left {left}",
        ]
        if damaged:
            words.append(f"damaged videos {damaged}")
        stays = self.tty and done < self.recipe.steps
        self.show("  ".join(words), end="" if stays else "\n")

    def show(self, text: str, end: str = "\n") -> None:
        over = "\r\x1b[K" if self.tty else ""  # the progress line
        print(over + text, end=end, flush=True)

    def evaluation(self, step: int, metrics: dict, **more) -> None:
        if not self.job.first:
            return
        self.file.write(json.dumps(dict(step=step, metrics=metrics, **more)) + "\n")
        self.file.flush()
        self.show(report.summary(metrics))
        self.since += time.monotonic() - self.stepped  # the steps before it still count
        if self.board:
            for name, measured in metrics["task"].items():
                value = measured["mAP"] if measured["kind"] == "box" else measured["top1"]
                self.board.add_scalar(f"val/{name}", value, step)

    def sync(self) -> None:
        """On the disk, before the checkpoint that counts on it."""
        self.file.flush()
        os.fsync(self.file.fileno())
