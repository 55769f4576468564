"""Rivals of co-finetuning that change the loss or the encoder; the loop stays as it is.

A method enters a run at one place: `wrap_encoder` puts its encoder into the model, if it has one of
its own (SpotTune), and `criterion` returns what computes the loss (self-distillation adds a term).
`finetune` and `downstream` are other orders of the same training, `stages`;
`finetune+selfdistil` and `finetune+spottune` put the method on their last stage, as the papers do.

Copy this file and model.py to use the two methods alone.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import CoFinetuneModel, VideoTransformer

OPTIONS = {  # of a method: its options, each with its choices or its least and largest value
    "selfdistil": {
        "target": ("pooled", "tokens", "logits"),
        "weight": (0, math.inf),
        "refresh": (0, math.inf),
        "ema": (0, 1),
    },
    "spottune": {"temperature": (1e-3, math.inf), "at_test": ("argmax", "sample")},
}


def criterion(recipe, model: CoFinetuneModel, task_loss: Callable) -> "Plain":
    """What computes the loss of a micro-batch, by recipe.method. After wrap_encoder."""
    if recipe.method == "selfdistil":
        options = check_options("selfdistil", recipe.method_options)
        return SelfDistil(task_loss, model, **options)
    if recipe.method == "spottune":
        return Routed(task_loss, model.encoder)
    return Plain(task_loss)


def stages(recipe) -> list:
    """The trainings that make up a method, in order.

    `finetune`: the upstream tasks for as many steps as the schedule gives them, then the downstream
    tasks for theirs, each with a warm-up and a cosine of its own: every dataset is seen as often as
    in co-finetuning, up to a batch. The idle upstream heads stay in the model, so that the second
    stage also tells what is left of the upstream accuracy. `downstream` is the second stage alone.
    ValueError for options that a later stage would refuse, hours from now.
    """
    method, _, wrapper = recipe.method.partition("+")
    check_options(wrapper or method, recipe.method_options)
    if method not in ("finetune", "downstream"):
        return [recipe]
    names = {"clip": [], "box": []}
    weights = {"clip": 0.0, "box": 0.0}
    for task in recipe.task:
        if not recipe.train_tasks or task.name in recipe.train_tasks:
            names[task.kind].append(task.name)
            weights[task.kind] += task.weight if recipe.schedule == "weighted" else 1.0
    steps = {"clip": recipe.steps, "box": recipe.steps}  # accumulate: every task at every step
    if recipe.schedule != "accumulate":
        steps["clip"] = round(recipe.steps * weights["clip"] / sum(weights.values()))
        steps["box"] = recipe.steps - steps["clip"]
    result = []
    for kind in ("clip", "box"):
        if steps[kind] < 1 and (kind == "box" or method == "finetune"):
            raise ValueError(
                f"method {recipe.method}: of {recipe.steps} steps the {kind} tasks get none; more "
                "steps, or other weights"
            )
        warmup = round(recipe.warmup * steps[kind] / recipe.steps)
        stage = dict(steps=steps[kind], train_tasks=names[kind], warmup=warmup)
        result.append(replace(recipe, method="cofinetune", **stage))
    upstream, downstream = result
    if method == "downstream":
        return [downstream]
    upstream = replace(upstream, method_options={}, preview=0, out=f"{recipe.out}/upstream")
    downstream = replace(downstream, method=wrapper or "cofinetune", init=f"{upstream.out}/last.pt")
    return [upstream, downstream]


def wrap_encoder(recipe, model: CoFinetuneModel) -> None:
    """Give the model the encoder of recipe.method, if it has one; before the optimisers exist."""
    if recipe.method == "spottune":
        options = check_options("spottune", recipe.method_options)
        model.encoder = SpotTune(model.encoder, **options)


def check_options(method: str, options: dict) -> dict:
    """The options, if the method has all of them, with values in their ranges. ValueError."""
    known = OPTIONS.get(method, {})
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"method_options of {method}: unknown {', '.join(unknown)}; "
            f"known: {', '.join(known) or 'none'}"
        )
    for name, value in options.items():
        if isinstance(known[name][0], str):
            fits = value in known[name]
            expected = f"one of {', '.join(known[name])}"
        else:
            least, most = known[name]
            fits = type(value) in (int, float) and least <= value <= most
            expected = f"a number from {least} to {most}"
        if not fits:
            raise ValueError(f"method_options: {name} = {value!r}, expected {expected}")
    return options


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


class Plain:
    """The loss of the task alone; what self-distillation and SpotTune add to."""

    def __init__(self, task_loss: Callable):
        self.task_loss = task_loss

    def __call__(
        self, task, step: int, video: Tensor, features: tuple[Tensor, Tensor], logits: Tensor,
        batch, divisor,
    ) -> Tensor:  # fmt: skip
        """task: data.Task. video: normalised (B, 3, T, H, W). features: of the encoder, pooled
        (B, D) and tokens (B, t, h, w, D). logits: (B, C) or (K, C). divisor: of the task in this
        step, cofinetune.Divisor."""
        return self.task_loss(task, logits, batch, divisor)

    def report(self) -> dict:
        """Added to each line of log.jsonl."""
        return {}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


# ------------------------------------------------------------------------------------------------
# Self-distillation
# ------------------------------------------------------------------------------------------------


class SelfDistil(Plain):
    """The encoder of a while ago, frozen, guides that of now (Zhou et al., arXiv 2205.00506).

    What we know of the paper is its abstract: the encoder of the last epoch teaches that of the
    current one, against forgetting. What is compared, how and how strongly are our choices:
        target   pooled (B, D) | tokens (B, t, h, w, D): 1 - cosine, the mean over vectors;
                 logits, by the teacher's copy of the heads: Kullback-Leibler, as in Learning
                 without Forgetting; for boxes the sum over classes, each a yes or no
        weight   of this loss beside the task's
        refresh  steps from one teacher to the next (several datasets have no common epoch);
                 0: never, the initial weights stay
        ema      share of the old teacher that a refresh keeps; a mean teacher: refresh 1, ema 0.999

    The distance is a sum over rows, divided by the clips of the step, so that micro-batches add up
    to that of the whole batch and ranks of equally many clips average to it, however unevenly
    their boxes fall.
    """

    def __init__(
        self, task_loss: Callable, model: CoFinetuneModel, *,
        target: str = "pooled", weight: float = 1.0, refresh: int = 100, ema: float = 0.0,
    ):  # fmt: skip
        super().__init__(task_loss)
        self.model = model
        self.target = target
        self.weight = weight
        self.refresh = refresh
        self.ema = ema
        # Not a deepcopy, which would copy, or share, whatever hooks hang on the model.
        heads = {task: head.config for task, head in model.heads.items()}
        self.teacher = CoFinetuneModel(model.encoder.config, heads)
        self.teacher.load_state_dict(model.state_dict())
        self.teacher.to(device_of(model))
        self.teacher.requires_grad_(False).eval()
        self.step = None  # of the distances
        self.distances = {}  # by task of the step, over its micro-batches so far

    def __call__(self, task, step, video, features, logits, batch, divisor) -> Tensor:
        """The task's loss and weight * distance of the student from the teacher on the same clips.

        Where autocast is on, it is on for the teacher too: it sees the clips as the student did.
        """
        if step != self.step:
            self.begin(step)
        with torch.no_grad():
            taught = self.teacher.encoder(video)  # pooled (B, D), tokens (B, t, h, w, D)
        if self.target == "pooled":
            rows = cosine_distance(features[0], taught[0])  # (B,)
        elif self.target == "tokens":
            rows = cosine_distance(features[1], taught[1])  # (B,)
        else:
            goal = self.teacher.classify(taught, batch.task, batch.boxes, batch.box_clip)
            distance_of = softmax_distance if batch.boxes is None else sigmoid_distance
            rows = distance_of(logits, goal)  # (B,) or (K,)
        distance = rows.sum() / divisor.clips
        before = self.distances.get(batch.task, 0.0)
        self.distances[batch.task] = before + distance.detach()
        return self.task_loss(task, logits, batch, divisor) + self.weight * distance

    def begin(self, step: int) -> None:
        """Before a step's first micro-batch: the refresh that is due.

        The weights it copies are equal on all ranks, so the teachers are too.
        """
        self.step = step
        self.distances = {}
        if self.refresh and step % self.refresh == 0:
            student = self.model.state_dict()
            for name, old in self.teacher.state_dict().items():
                old.lerp_(student[name], 1 - self.ema)

    def report(self) -> dict:
        """Into the log: rank 0's distance of the step, the mean over its tasks, not weighted."""
        if not self.distances:
            return {}
        distances = torch.stack(list(self.distances.values()))
        return {"distillation": distances.mean().item()}

    def state_dict(self) -> dict:
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.teacher.load_state_dict(state)


def cosine_distance(ours: Tensor, goal: Tensor) -> Tensor:
    """(B, ..., D) twice -> (B,): 1 - cosine, the mean over all vectors of a row.

    By half the squared distance of the unit vectors, which is exactly 0 where both are equal.
    """
    ours = F.normalize(ours.float(), dim=-1)
    goal = F.normalize(goal.float(), dim=-1)
    squares = (ours - goal).square().sum(-1)  # (B, ...)
    return squares.reshape(len(squares), -1).mean(1) / 2


def softmax_distance(ours: Tensor, goal: Tensor) -> Tensor:
    """(B, C) logits twice -> (B,): Kullback-Leibler, goal || ours, of the classes."""
    ours = ours.float().log_softmax(1)
    goal = goal.float().log_softmax(1)
    distance = goal.exp() * (goal - ours)  # (B, C)
    return distance.sum(1)


def sigmoid_distance(ours: Tensor, goal: Tensor) -> Tensor:
    """(K, C) logits twice -> (K,): Kullback-Leibler, goal || ours, summed over yes or no of C."""
    ours, goal = ours.float(), goal.float()
    yes = goal.sigmoid() * (F.logsigmoid(goal) - F.logsigmoid(ours))
    no = (-goal).sigmoid() * (F.logsigmoid(-goal) - F.logsigmoid(-ours))
    return (yes + no).sum(1)


# ------------------------------------------------------------------------------------------------
# SpotTune
# ------------------------------------------------------------------------------------------------


class SpotTune(VideoTransformer):
    """Each clip takes, block by block, the pretrained block or its finetuned twin.

    Guo et al., CVPR 2019, for residual networks; here the unit is a transformer block. A small
    network, the policy, reads the clip and decides by a straight-through Gumbel-softmax of constant
    temperature; nothing but the task's loss rewards a choice. Both paths are computed: a step costs
    about twice the blocks, and nothing is saved at test. Embedding, final norm and heads are
    trained. Unlike the authors' code, the policy is a one-block transformer with the recipe's
    learning rates (theirs: a residual network at a tenth of the rate), and tests take the likelier
    path (theirs draw).

    `blocks` are the trained twins, by the names they have in the encoder that is wrapped.
        temperature  of the Gumbel-softmax
        at_test      argmax | sample
    """

    def __init__(
        self, encoder: VideoTransformer, *, temperature: float = 5.0, at_test: str = "argmax"
    ):  # fmt: skip
        super().__init__(encoder.config)
        self.load_state_dict(encoder.state_dict())
        pretrained = VideoTransformer(encoder.config)
        pretrained.load_state_dict(encoder.state_dict())
        self.frozen = pretrained.blocks.requires_grad_(False)
        self.temperature, self.at_test = temperature, at_test
        depth = encoder.config.depth
        small = dict(width=64, depth=1, heads=2, cls=False, pool="norm-mean", drop_path=0.0)
        self.policy = VideoTransformer(replace(encoder.config, **small))
        self.choice = nn.Linear(64, 2 * depth)  # frozen, finetuned for each block
        self.usage = torch.zeros(depth)
        self.to(device_of(encoder))
        self.train(encoder.training)

    def train(self, mode: bool = True) -> "SpotTune":
        super().train(mode)
        self.frozen.eval()  # no stochastic depth in what stands for the pretrained network
        return self

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        route = self.route(video)  # (B, depth)
        self.usage = route.detach().mean(0)  # share of these clips on the finetuned path, per block
        x, grid = self.embed(video)
        for frozen, tuned, gate in zip(self.frozen, self.blocks, route.T, strict=True):
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.mix, frozen, tuned, x, grid, gate, use_reentrant=False)
            else:
                x = self.mix(frozen, tuned, x, grid, gate)
        return self.read_out(x, grid)

    @staticmethod
    def mix(frozen: nn.Module, tuned: nn.Module, x: Tensor, grid: tuple, gate: Tensor) -> Tensor:
        gate = gate[:, None, None].to(x.dtype)  # (B, 1, 1)
        return (1 - gate) * frozen(x, grid) + gate * tuned(x, grid)

    def route(self, video: Tensor) -> Tensor:
        """(B, depth), exactly 0 (frozen) or 1 (finetuned), with the gradient of the softmax."""
        pooled, _ = self.policy(video)
        with torch.autocast(video.device.type, enabled=False):
            logits = self.choice(pooled.float()).unflatten(1, (-1, 2))  # (B, depth, 2)
            if not self.training and self.at_test == "argmax":
                return logits.argmax(2).float()
            soft = F.gumbel_softmax(logits, self.temperature)
        finetuned = soft[..., 1]  # (B, depth)
        return soft.argmax(2) + (finetuned - finetuned.detach())


class Routed(Plain):
    """The loss of the task; into the log SpotTune's choices, of rank 0's last micro-batch."""

    def __init__(self, task_loss: Callable, encoder: SpotTune):
        super().__init__(task_loss)
        self.encoder = encoder

    def report(self) -> dict:
        return {"finetuned_share": self.encoder.usage.tolist()}
