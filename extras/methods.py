"""The rivals of co-finetuning, on the same encoder, data and evaluation; and how to compare them.

Self-distillation and SpotTune wrap the model, so one guarded line of the training loop serves both:
`attach` returns an object with
    loss(model, video, features, logits, batch, step)    added to the loss of a micro-batch
    state_dict(), load_state_dict()                      part of a checkpoint
    report()                                             added to a line of log.jsonl
`finetune` and `downstream` are other orders of the same training: `stages` in cofinetune.py.
`finetune+selfdistil` and `finetune+spottune` put the wrapper on the last stage, as their papers do.

To use the two methods alone, copy this file and model.py, where the shapes are declared; torch and
numpy. `compare` belongs to cofinetune.py: it starts runs of it and reads their folders.
"""

import inspect
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import CoFinetuneModel, VideoTransformer


def attach(method: str, model: CoFinetuneModel, options: dict) -> "SelfDistil | SpotTune":
    """Put a method on an initialised model, before its optimisers are made. ValueError."""
    kind = {"selfdistil": SelfDistil, "spottune": SpotTune}[method]
    known = list(inspect.signature(kind).parameters)[1:]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(
            f"method_options of {method}: unknown {', '.join(unknown)}; known: {', '.join(known)}"
        )
    if method == "selfdistil":
        return SelfDistil(model, **options)
    model.encoder = SpotTune(model.encoder, **options)
    return model.encoder


def check(method: str, **options: tuple) -> None:
    """ValueError unless each is one of its choices, (value, [...]), or in (value, low, high)."""
    for name, (value, *allowed) in options.items():
        if isinstance(allowed[0], list):
            good, text = value in allowed[0], "one of " + ", ".join(allowed[0])
        else:
            good = type(value) in (int, float) and allowed[0] <= value <= allowed[1]
            text = "a number from {} to {}".format(*allowed)
        if not good:
            raise ValueError(f"method_options of {method}: {name} = {value!r}; expected {text}")


# ------------------------------------------------------------------------------------------------
# Self-distillation
# ------------------------------------------------------------------------------------------------


class SelfDistil:
    """The encoder of a while ago, frozen, guides that of now (Zhou et al., arXiv 2205.00506).

    What we know of the paper is its abstract: the encoder of the last epoch teaches that of the
    current one, against forgetting. What is compared, how and how strongly are our choices:
        target   pooled (B, D) | tokens (B, t, h, w, D) | logits, by the teacher's copy of the heads
        form     cosine: 1 - cos, mean over vectors | mse: mean over all numbers | kl: of logits,
                 teacher || student; for boxes the sum over classes, each a yes or no
        weight   of this loss beside the task's
        refresh  steps from one teacher to the next (several datasets have no common epoch);
                 0: never, the initial weights stay
        ema      share of the old teacher that a refresh keeps; a mean teacher: refresh 1, ema 0.999
    It is a sum over rows divided by clips, so that micro-batches and ranks of equally many clips
    add up to the loss of the whole batch, however unevenly their boxes fall.
    """

    def __init__(
        self, model: CoFinetuneModel, target: str = "pooled", form: str = "cosine",
        weight: float = 1.0, refresh: int = 100, ema: float = 0.0,
    ):  # fmt: skip
        check(
            "selfdistil",
            target=(target, ["pooled", "tokens", "logits"]),
            form=(form, ["cosine", "mse", "kl"] if target == "logits" else ["cosine", "mse"]),
            weight=(weight, 0, math.inf),
            refresh=(refresh, 0, math.inf),
            ema=(ema, 0, 1),
        )
        self.target, self.form, self.weight = target, form, weight
        self.refresh, self.ema = refresh, ema
        # Not a deepcopy, which would copy, or share, whatever hooks hang on the model.
        heads = {task: head.head for task, head in model.heads.items()}
        self.teacher = CoFinetuneModel(model.encoder.config, heads)
        self.teacher.load_state_dict(model.state_dict())
        self.teacher.to(next(model.parameters()).device).requires_grad_(False).eval()
        self.refreshed, self.latest = -1, torch.zeros(())

    def loss(
        self, model: CoFinetuneModel, video: Tensor, features: tuple[Tensor, Tensor],
        logits: Tensor, batch, step: int,
    ) -> Tensor:  # fmt: skip
        """weight * distance of the student (features, logits) from the teacher on the same clips.

        A refresh that is due at `step` comes first, once, however many micro-batches the step has;
        the weights it copies are equal on all ranks, so the teachers are too.
        """
        if self.refresh and step % self.refresh == 0 and step != self.refreshed:
            self.refreshed = step
            new = model.state_dict()
            for name, old in self.teacher.state_dict().items():
                old.lerp_(new[name], 1 - self.ema)
        with torch.no_grad():
            goals = self.teacher.encoder(video)
            if self.target == "logits":
                goals = (self.teacher.classify(goals, batch.task, batch.boxes, batch.box_clip),)
                features = (logits,)
        place = int(self.target == "tokens")
        rows = self.distance(features[place].float(), goals[place].float(), batch.boxes is not None)
        total = rows.sum() / len(video)  # of (B,) or, for logits of boxes, (K,)
        self.latest = total.detach()
        return self.weight * total

    def distance(self, ours: Tensor, goal: Tensor, boxes: bool) -> Tensor:
        """A number for each row, exactly 0 where student and teacher are equal."""
        if self.form == "mse":
            return (ours - goal).square().flatten(1).mean(1)
        if self.form == "cosine":  # half the squared distance of unit vectors: 1 - cos, exact at 0
            apart = F.normalize(ours, dim=-1) - F.normalize(goal, dim=-1)
            return apart.square().sum(-1, keepdim=True).flatten(1).mean(1) / 2
        if boxes:
            ours, goal = (F.logsigmoid(torch.cat([x, -x], 1)) for x in (ours, goal))  # (K, 2C)
        else:
            ours, goal = ours.log_softmax(1), goal.log_softmax(1)
        return (goal.exp() * (goal - ours)).sum(1)

    def report(self) -> dict:
        return {"distillation": self.latest.item()}

    def state_dict(self) -> dict:
        return self.teacher.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.teacher.load_state_dict(state)


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
        policy       learned | frozen | finetuned: one path for all clips, and no policy network
    """

    def __init__(
        self, encoder: VideoTransformer, temperature: float = 5.0, at_test: str = "argmax",
        policy: str = "learned",
    ):  # fmt: skip
        check(
            "spottune",
            temperature=(temperature, 1e-3, math.inf),
            at_test=(at_test, ["argmax", "sample"]),
            policy=(policy, ["learned", "frozen", "finetuned"]),
        )
        super().__init__(encoder.config)
        self.load_state_dict(encoder.state_dict())
        pretrained = VideoTransformer(encoder.config)
        pretrained.load_state_dict(encoder.state_dict())
        self.frozen = pretrained.blocks.requires_grad_(False)
        self.temperature, self.at_test, self.fixed = temperature, at_test, None
        if policy == "learned":
            small = dict(width=64, depth=1, heads=2, cls=False, pool="norm-mean", drop_path=0.0)
            self.policy = VideoTransformer(replace(encoder.config, **small))
            self.choice = nn.Linear(64, 2 * encoder.config.depth)
        else:
            self.fixed = float(policy == "finetuned")
        self.usage = torch.zeros(encoder.config.depth)
        self.to(next(encoder.parameters()).device).train(encoder.training)

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
                x = checkpoint(self.mix, frozen, tuned, x, gate, use_reentrant=False)
            else:
                x = self.mix(frozen, tuned, x, gate)
        return self.read_out(x, grid)

    @staticmethod
    def mix(frozen: nn.Module, tuned: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
        gate = gate[:, None, None].to(x.dtype)  # (B, 1, 1)
        return (1 - gate) * frozen(x) + gate * tuned(x)

    def route(self, video: Tensor) -> Tensor:
        """(B, depth), exactly 0 (frozen) or 1 (finetuned), with the gradient of the softmax."""
        if self.fixed is not None:
            return video.new_full((len(video), self.config.depth), self.fixed)
        pooled, _ = self.policy(video)
        with torch.autocast(video.device.type, enabled=False):
            logits = self.choice(pooled.float()).unflatten(1, (-1, 2))  # (B, depth, 2)
            if not self.training and self.at_test == "argmax":
                return logits.argmax(2).float()
            soft = F.gumbel_softmax(logits, self.temperature)
        return soft.argmax(2) + (soft - soft.detach())[..., 1]

    def loss(self, model, video, features, logits, batch, step) -> Tensor:
        return logits.new_zeros(())

    def report(self) -> dict:
        return {"finetuned_share": self.usage.tolist()}
