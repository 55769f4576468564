"""The network of co-finetuning: one video transformer, one small head per task.

A clip is cut into tubelets, each a token; a pre-norm transformer mixes all tokens of all frames jointly
(ViViT model 1, Arnab et al. 2021, arXiv 2103.15691); a clip head classifies the pooled feature, a box head
classifies each person box from the tokens under it. One class covers ViViT (class token or mean, learned
positions, tanh GELU) and VideoMAE (Tong et al. 2022, arXiv 2203.12602: mean before the norm, fixed sin-cos
table, exact GELU), so the published weights of both fit; `pretrained.py` reads them.

Shapes, here and in every file of this project:
    B clips   T,H,W frames and pixels   t,h,w tubelet grid   N = t*h*w tokens
    D width   K boxes in the whole batch   C classes
    video     float (B, 3, T, H, W), RGB, normalised as the weights expect
    boxes     float (K, 4): x1, y1, x2, y2 in [0, 1] of the clip as fed to the network
    box_clip  int (K,): the clip of the batch that each box belongs to, in any order

To use this file alone, copy it: it needs torch and nothing else.

    model = CoFinetuneModel(
        ModelConfig(**SIZES["B"]), {"k400": Head("clip", 400), "ava": Head("box", 80)}
    )
    logits = model(video, "k400")                      # (B, 400)
    logits = model(video, "ava", boxes, box_clip)      # (K, 80)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """What defines the encoder. `frames` and `size` fix the native grid of the position table; the
    network itself takes any clip whose sides are multiples of the tubelet."""

    frames: int = 32
    size: tuple[int, int] = (224, 224)  # H, W
    tubelet: tuple[int, int, int] = (2, 16, 16)  # frames, pixels down, pixels across
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    cls: bool = False  # a class token before the others, with a position of its own
    pool: str = "norm-mean"  # "cls" | "norm-mean" | "norm-max" | "mean-norm" (VideoMAE)
    gelu: str = "tanh"  # "tanh" (flax and ViViT) | "none" (exact: VideoMAE)
    eps: float = 1e-6
    final_eps: float = 1e-6
    pos: str = "learned"  # "learned" | "learned-axes" (starts as sin-cos per axis) | "sincos" (fixed)
    pos_resize: str = "bicubic"  # "bicubic" | "bilinear-corners" (Scenic)
    qk_init: str = "xavier"  # "xavier" | "mimetic"
    drop_path: float = 0.0
    checkpointing: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        sides = (self.frames, *self.size)
        return tuple(side // step for side, step in zip(sides, self.tubelet))


@dataclass
class Head:
    kind: str
    classes: int
    dropout: float = 0.0
    roi: str = "align-max"
    roi_size: int = 7
    context: bool = False
    prior: float = 0.0


SIZES = {
    "tiny": dict(width=64, depth=4, heads=2),
    "small": dict(width=128, depth=4, heads=4),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "H": dict(width=1280, depth=32, heads=16),
}


class Tubelets(nn.Module):
    def __init__(self, tubelet, width):
        super().__init__()
        self.tubelet = tubelet
        self.weight = nn.Parameter(torch.empty(width, 3, *tubelet))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.view(width, -1))

    def forward(self, video):
        dt, dh, dw = self.tubelet
        x = video.unflatten(4, (-1, dw)).unflatten(3, (-1, dh)).unflatten(2, (-1, dt))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return F.linear(x, self.weight.flatten(1), self.bias)


def sincos_table(count, width):
    rate = 10000.0 ** (-2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * rate
    table = angle.sin()
    table[:, 1::2] = angle[:, 1::2].cos()
    return table.float()


def resize_positions(pos, native, grid, mode):
    if native == grid:
        return pos
    extra = pos.shape[1] - math.prod(native)
    table = pos[:, extra:].unflatten(1, native)
    with torch.autocast(pos.device.type, enabled=False):
        for axis, (old, new) in enumerate(zip(native, grid), 1):
            if old == new:
                continue
            corners = mode == "bilinear-corners"
            kernel = "bilinear" if corners or axis == 1 else "bicubic"
            eye = torch.eye(old, device=pos.device)[None, :, :, None]
            weight = F.interpolate(eye, (new, 1), mode=kernel, align_corners=corners)[0, :, :, 0]
            table = torch.tensordot(table, weight, ([axis], [0])).movedim(-1, axis)
    return torch.cat([pos[:, :extra], table.flatten(1, 3)], 1)


class Block(nn.Module):
    def __init__(self, config, drop_path):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.gelu, self.drop_path = config.heads, config.gelu, drop_path
        self.norm1 = nn.LayerNorm(width, config.eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, config.eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def keep(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        mask = torch.rand(len(branch), 1, 1, device=branch.device) < keep
        return branch * (mask / keep)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.keep(self.proj(mixed))
        return x + self.keep(self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate=self.gelu)))


class VideoTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch = Tubelets(config.tubelet, config.width)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width)) if config.cls else None
        tokens = math.prod(config.grid) + config.cls
        if config.pos == "sincos":
            self.register_buffer("pos", sincos_table(tokens, config.width)[None], persistent=False)
        else:
            self.pos = nn.Parameter(0.02 * torch.randn(1, tokens, config.width))
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, config.final_eps)

    def forward(self, video):
        x = self.patch(video)
        grid = x.shape[1:4]
        x = x.flatten(1, 3)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x + resize_positions(self.pos, self.config.grid, tuple(grid), self.config.pos_resize)
        for block in self.blocks:
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        first = int(self.config.cls)
        tokens = self.norm(x)
        if self.config.pool == "cls":
            pooled = tokens[:, 0]
        elif self.config.pool == "norm-mean":
            pooled = tokens[:, first:].mean(1)
        elif self.config.pool == "norm-max":
            pooled = tokens[:, first:].amax(1)
        else:
            pooled = self.norm(x[:, first:].mean(1))
        return pooled, tokens[:, first:].unflatten(1, grid)


def roi_align_weights(start, end, cells, size, sampling=0, aligned=True):
    """One axis: (K,) ends in cell units -> (K, size, cells)."""
    start, end = (start - 0.5, end - 0.5) if aligned else (start, end)
    length = end - start if aligned else (end - start).clamp(min=1)
    step = length / size
    count = torch.full_like(step, sampling) if sampling else step.ceil()
    index = torch.arange(cells, device=start.device)
    bins = torch.arange(size, device=start.device)
    total = start.new_zeros(len(start), size, cells)
    for i in range(int(max(count.tolist(), default=0))):
        at = start[:, None] + bins * step[:, None] + (i + 0.5) * (step / count)[:, None]
        valid = (at >= -1) & (at <= cells) & (i < count)[:, None]
        hat = (1 - (at.clamp(0, cells - 1)[..., None] - index).abs()).clamp(min=0)
        total = total + torch.where(valid[..., None], hat, 0)
    return total / count.clamp(min=1)[:, None, None]


def pool_boxes(features, boxes, box_clip, size):
    """features (B,h,w,D) -> (K,size,size,D)"""
    _, h, w, _ = features.shape
    x1, y1, x2, y2 = boxes.unbind(1)
    down = roi_align_weights(y1 * h, y2 * h, h, size)
    across = roi_align_weights(x1 * w, x2 * w, w, size)
    weights = torch.einsum("kph,kqw->kpqhw", down, across).flatten(3).flatten(1, 2)
    order = box_clip.argsort(stable=True)
    counts = torch.bincount(box_clip, minlength=len(features)).tolist()
    parts = weights[order].split(counts)
    rows = [part @ cells for part, cells in zip(parts, features.flatten(1, 2), strict=True)]
    return torch.cat(rows)[order.argsort()].unflatten(1, (size, size))


class ClipHead(nn.Module):
    def __init__(self, head, width):
        super().__init__()
        self.head = head
        self.fc = nn.Linear(width, head.classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pooled, tokens, boxes=None, box_clip=None):
        return self.fc(F.dropout(pooled, self.head.dropout, self.training))


class BoxHead(nn.Module):
    def __init__(self, head, width):
        super().__init__()
        self.head = head
        self.fc = nn.Linear(width * (1 + head.context), head.classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.constant_(self.fc.bias, math.log(head.prior / (1 - head.prior)) if head.prior else 0.0)

    def forward(self, pooled, tokens, boxes, box_clip):
        x = pool_boxes(tokens.mean(1), boxes.float().clamp(0, 1), box_clip, self.head.roi_size)
        x = x.amax((1, 2))
        if self.head.context:
            x = torch.cat([x, pooled[box_clip]], 1)
        return self.fc(F.dropout(x, self.head.dropout, self.training))


class CoFinetuneModel(nn.Module):
    def __init__(self, config, heads):
        super().__init__()
        self.encoder = VideoTransformer(config)
        kinds = {"clip": ClipHead, "box": BoxHead}
        self.heads = nn.ModuleDict({n: kinds[h.kind](h, config.width) for n, h in heads.items()})

    def classify(self, features, task, boxes=None, box_clip=None):
        pooled, tokens = features
        with torch.autocast(tokens.device.type, enabled=False):
            return self.heads[task](pooled.float(), tokens.float(), boxes, box_clip)

    def forward(self, video, task, boxes=None, box_clip=None):
        return self.classify(self.encoder(video), task, boxes, box_clip)


def clip_loss(logits, labels, smoothing=0.0):
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def box_loss(logits, labels, reduce="sum", count=None):
    total = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    if reduce == "mean":
        total = total / logits.shape[1]
    count = len(logits) if count is None else count
    return total / (count or 1)
