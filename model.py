"""The network of co-finetuning: one video transformer, one small head per task.

A clip is cut into tubelets, each a token; a pre-norm transformer mixes the tokens of all frames
jointly (ViViT, model 1: Arnab et al. 2021, arXiv 2103.15691). A clip head classifies the pooled
feature, a box head each person from the tokens under its box. One class covers ViViT (class token
or mean, learned positions, tanh GELU) and VideoMAE (Tong et al. 2022, arXiv 2203.12602: mean before
the norm, fixed sin-cos table, exact GELU), so that published weights of both fit (pretrained.py).

Shapes, here and in every file of this project:
    B clips   T,H,W frames and pixels   t,h,w tubelet grid   N = t*h*w tokens
    D width   K boxes in the whole batch   C classes
    video     float (B, 3, T, H, W), RGB, normalised as the weights expect
    boxes     float (K, 4): x1, y1, x2, y2 in [0, 1] of the clip as fed to the network
    box_clip  int (K,): the clip of the batch that each box belongs to, in any order

    heads = {"k400": Head("clip", 400), "ava": Head("box", 80)}
    model = CoFinetuneModel(ModelConfig(**SIZES["B"]), heads)
    model(video, "k400")                    # (B, 400) logits
    model(video, "ava", boxes, box_clip)    # (K, 80) logits

To use this file alone, copy it: it needs torch and nothing else.
"""

import math
import operator
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------


def setting(default, help: str, **rules):
    """A field with what `--help` says of it. rules: least, above, below: bounds of a number, or of
    each number of a tuple; free=True: a resumed run may change it."""
    return field(default=default, metadata={"help": help, **rules})


BOUNDS = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "below": (operator.lt, "less than"),
}


def check_settings(config) -> None:
    """ValueError for a value outside of its field's choices or bounds."""
    for item in fields(config):
        value = getattr(config, item.name)
        choices = get_args(item.type)
        if get_origin(item.type) is Literal and value not in choices:
            raise ValueError(f"{item.name} is {value!r}, expected one of {', '.join(choices)}")
        numbers = value if isinstance(value, tuple) else (value,)
        for rule in BOUNDS.keys() & item.metadata.keys():
            (holds, words), bound = BOUNDS[rule], item.metadata[rule]
            if not all(holds(number, bound) for number in numbers):
                raise ValueError(f"{item.name} is {value}, expected {words} {bound}")


@dataclass
class ModelConfig:
    """The encoder, and the colours it expects. `frames` and `size` give the position table its
    native grid; the network takes any clip whose sides are multiples of the tubelet. Defaults:
    ViViT-B/16x2, no class token."""

    frames: int = setting(32, "of the native clip", least=1)
    size: tuple[int, int] = setting((224, 224), "rows and columns of the native clip", least=1)
    tubelet: tuple[int, int, int] = setting((2, 16, 16), "frames, rows, columns a token", least=1)
    width: int = setting(768, "numbers of a token", least=2)
    depth: int = setting(12, "transformer blocks", least=1)
    heads: int = setting(12, "of the attention", least=1)
    mlp_ratio: float = setting(4.0, "width of a block's hidden layer, in widths", above=0)
    cls: bool = setting(False, "a class token in front, with a position of its own")
    pool: Literal["cls", "norm-mean", "mean-norm"] = setting(
        "norm-mean", "for clip heads: class token, mean after the norm, or before it (VideoMAE)"
    )
    gelu: Literal["tanh", "none"] = setting("tanh", "its approximation (ViViT); none (VideoMAE)")
    eps: float = setting(1e-6, "of the blocks' norms", above=0)
    final_eps: float = setting(1e-6, "of the norm after the last block", above=0)
    pos: Literal["learned", "learned-axes", "sincos", "rope"] = setting(
        "learned",
        "positions: learned from noise, from sin-cos tables per axis; fixed (VideoMAE); rotary in"
        " every attention (V-JEPA 2)",
    )
    pos_resize: Literal["bicubic", "bilinear-corners"] = setting(
        "bicubic", "of positions, for other clips than native ones: as VideoMAE, as ViViT (Scenic)"
    )
    qk_init: Literal["xavier", "mimetic"] = setting("xavier", "queries and keys: apart, or alike")
    drop_path: float = setting(
        0.0, "stochastic depth of the last block, rising from 0 at the first", least=0, below=1
    )
    checkpointing: bool = setting(
        False, "compute blocks again in backward: a third more time, less memory", free=True
    )
    mean: tuple[float, ...] = setting(
        (0.5, 0.5, 0.5), "RGB in [0, 1], subtracted from pixels; empty, as std: of each clip"
    )
    std: tuple[float, ...] = setting((0.5, 0.5, 0.5), "RGB, which then divides them", above=0)

    def __post_init__(self):
        for name in ("size", "tubelet", "mean", "std"):  # lists, where they come from TOML
            setattr(self, name, tuple(getattr(self, name)))
        check_settings(self)
        sides = (self.frames, *self.size)
        if any(side % step for side, step in zip(sides, self.tubelet, strict=True)):
            raise ValueError(f"frames and size {sides} are not multiples of tubelet {self.tubelet}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} is odd or no multiple of heads {self.heads}")
        if not self.cls and self.pool == "cls" or self.cls and self.pos in ("sincos", "rope"):
            raise ValueError(f"cls={self.cls} excludes pool {self.pool!r} or pos {self.pos!r}")
        if self.pos == "rope" and self.width // self.heads < 6:
            raise ValueError(
                f"width {self.width} in {self.heads} heads: rope needs 6 numbers of a head"
            )
        if len(self.mean) not in (0, 3) or len(self.mean) != len(self.std):
            raise ValueError(
                f"mean is {self.mean} and std {self.std}, expected three numbers each, or none"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """t, h, w of the native clip."""
        t, h, w = self.tubelet
        return self.frames // t, self.size[0] // h, self.size[1] // w


@dataclass
class Head:
    """One task's classifier. Which loss it is trained with follows from its kind."""

    kind: Literal["clip", "box"]
    classes: int
    dropout: float = setting(0.0, "of the features before the classifier", least=0, below=1)
    roi_size: int = setting(7, "box: bins per side of RoIAlign", least=1)
    prior: float = setting(0.0, "box: first probability of a class; 0: a half", least=0, below=1)

    def __post_init__(self):
        check_settings(self)
        if self.kind == "clip" and self.prior:
            raise ValueError("prior is for box heads, this is a clip head")


SIZES = {  # parameters at tubelet (2, 16, 16), 32 frames of 224 x 224 pixels
    "tiny": dict(width=64, depth=4, heads=2),  # 0.5 M, for tests and the demo
    "small": dict(width=128, depth=4, heads=4),  # 1.4 M
    "S": dict(width=384, depth=12, heads=6),  # 23 M
    "B": dict(width=768, depth=12, heads=12),  # 89 M
    "L": dict(width=1024, depth=24, heads=16),  # 307 M
    "H": dict(width=1280, depth=32, heads=16),  # 636 M
}


# ------------------------------------------------------------------------------------------------
# Tubelets and positions
# ------------------------------------------------------------------------------------------------


class Tubelets(nn.Module):
    """video (B, 3, T, H, W) -> tokens (B, t, h, w, D).

    The weight has the shape of a 3-D convolution, as in every checkpoint. Stride equals kernel, so
    the convolution is one matrix product over the flattened tubelets, and is computed as one.
    """

    def __init__(self, tubelet: tuple[int, int, int], width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, *tubelet))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.view(width, -1))

    def forward(self, video: Tensor) -> Tensor:
        shape, (dt, dh, dw) = tuple(video.shape), self.weight.shape[2:]
        if len(shape) != 5 or shape[1] != 3 or shape[2] % dt or shape[3] % dh or shape[4] % dw:
            raise ValueError(
                f"video is {shape}, expected (B, 3, T, H, W) with T, H, W multiples of"
                f" the tubelet {dt, dh, dw}"
            )
        x = video.unflatten(4, (-1, dw)).unflatten(3, (-1, dh)).unflatten(2, (-1, dt))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, t, h, w, 3*dt*dh*dw)
        return F.linear(x, self.weight.flatten(1), self.bias)  # (B, t, h, w, D)


def sincos_table(count: int, width: int) -> Tensor:
    """(count, width): sine at even, cosine at odd columns. Computed in float64 like VideoMAE's: a
    float32 table is off by 1e-4."""
    rate = 10000.0 ** (-2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * rate
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(config: ModelConfig) -> Tensor:
    """(1, N, D), with one more row in front for the class token."""
    (t, h, w), width = config.grid, config.width
    if config.pos == "sincos":  # one axis: t*h*w flattened. Off the native grid, resize this table:
        return sincos_table(t * h * w, width)[None]  # one made anew would differ in every row
    table = 0.02 * torch.randn(1, t * h * w + config.cls, width)
    if config.pos == "learned-axes":
        part = width // 6 * 2
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        widths = (width - 2 * part, part, part)
        columns = []
        for axis, count in zip(axes, widths, strict=True):
            columns.append(sincos_table(max(t, h, w), count)[axis.flatten()])
        table[0, int(config.cls) :] = torch.cat(columns, 1)
    return table


def resize_positions(pos: Tensor, native: tuple, grid: tuple, mode: str) -> Tensor:
    """(1, [1 +] N, D) from the native grid to another; the class token's row is kept.

    "bicubic": each time slice like an image (VideoMAE's detection code), and time linearly.
    "bilinear-corners": linear along every axis, the corner cells fixed (Scenic, for ViViT).
    Both are linear and separable, hence one small matrix per axis: cheap enough for every forward,
    and deterministic in backward, which F.interpolate on a GPU is not.
    """
    if native == grid:
        return pos
    cls = pos.shape[1] - math.prod(native)
    table = pos[:, cls:].float().unflatten(1, native)  # (1, t, h, w, D)
    corners = mode == "bilinear-corners"
    with torch.autocast(pos.device.type, enabled=False):
        for axis, (old, new) in enumerate(zip(native, grid, strict=True), start=1):
            kernel = "bicubic" if mode == "bicubic" and axis > 1 else "bilinear"
            basis = torch.eye(old, device=pos.device)[None, :, :, None]  # one column image per cell
            weight = F.interpolate(basis, (new, 1), mode=kernel, align_corners=corners)
            table = torch.tensordot(table, weight[0, :, :, 0], ([axis], [0])).movedim(-1, axis)
    return torch.cat([pos[:, :cls], table.flatten(1, 3).to(pos.dtype)], 1)


def rotate(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Queries or keys (B, heads, t*h*w, d), turned by angles that grow with t, h, w: their products
    then depend on how far apart two tokens are (rotary positions, on three axes as V-JEPA 2).

    A third of the d numbers, rounded down to pairs, belongs to each axis; what is left stays as it
    is. Numbers 2i and 2i+1 make a pair, but their angles are those of frequencies 2i and 2i+1
    (modulo half the third), not of one: a mistake of V-JEPA 2, which its weights were trained with.
    """
    part = x.shape[-1] // 6 * 2
    rate = 10000.0 ** (-torch.arange(part // 2, device=x.device) / (part / 2))
    axes = (torch.arange(count, device=x.device) for count in grid)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3, 1)  # (N, 3, 1)
    angles = (places * rate).repeat(1, 1, 2).flatten(1)  # (N, 3 * part)
    turned, rest = x.split([3 * part, x.shape[-1] - 3 * part], -1)
    swapped = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    turned = turned * angles.cos().to(x.dtype) + swapped * angles.sin().to(x.dtype)
    return torch.cat([turned, rest], -1)


# ------------------------------------------------------------------------------------------------
# Transformer
# ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): tokens (B, N, D) to the same."""

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.gelu, self.drop_path = config.heads, config.gelu, drop_path
        self.rotary = config.pos == "rope"
        self.norm1 = nn.LayerNorm(width, config.eps)
        self.qkv = nn.Linear(width, 3 * width)  # rows q | k | v, each head by head
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, config.eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.zeros_(linear.bias)
            for weight in linear.weight.chunk(3) if linear is self.qkv else [linear.weight]:
                nn.init.xavier_uniform_(weight)
        if config.qk_init == "mimetic":
            # With Wq = Wk tokens begin by attending to their like, as in trained transformers
            # (Trockman and Kolter 2023, arXiv 2305.09828): the demo's model takes off sooner.
            q, k, _ = self.qkv.weight.detach().chunk(3)
            nn.init.normal_(q, std=math.sqrt(5 / (width * math.sqrt(width // self.heads))))
            k.copy_(q + 0.02 * torch.randn_like(q))

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x = x + self.drop(self.attend(self.norm1(x), grid))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate=self.gelu)))

    def attend(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, d)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
        if qkv.device.type == "cpu":  # whose kernel takes an eighth longer over rows far apart
            qkv = qkv.contiguous()
        q, k, v = qkv.unbind(0)
        if self.rotary:
            q, k = rotate(q, grid), rotate(k, grid)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)

    def drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth: the branch is left out for some clips and scaled up for the others, so
        that its mean is what evaluation uses (timm; Scenic's ViViT does not scale)."""
        if not self.training or self.drop_path == 0:
            return branch
        return branch * F.dropout(branch.new_ones(len(branch), 1, 1), self.drop_path)


class VideoTransformer(nn.Module):
    """video (B, 3, T, H, W) -> pooled (B, D), tokens (B, t, h, w, D).

    Clip heads read `pooled`, box heads `tokens` (after the final norm, without the class token);
    both depend on every parameter. `torch.compile` takes the whole forward as one graph.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.patch = Tubelets(config.tubelet, config.width)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width)) if config.cls else None
        if config.pos == "rope":  # each block turns its queries and keys
            self.pos = None
        elif config.pos == "sincos":  # follows from the config, so checkpoints do not hold it
            self.register_buffer("pos", position_table(config), persistent=False)
        else:
            self.pos = nn.Parameter(position_table(config))
        rise = config.drop_path / max(1, config.depth - 1)
        self.blocks = nn.ModuleList(Block(config, rise * i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.final_eps)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        x, grid = self.embed(video)
        for block in self.blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return self.read_out(x, grid)

    def embed(self, video: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """video -> tokens with their positions (B, [1 +] N, D), and the grid t, h, w."""
        x = self.patch(video)
        grid = tuple(x.shape[1:4])
        x = x.flatten(1, 3)  # (B, N, D), t-major
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1).to(x.dtype), x], 1)  # (B, 1 + N, D)
        if self.pos is not None:
            x = x + resize_positions(self.pos, self.config.grid, grid, self.config.pos_resize)
        return x, grid

    def read_out(self, x: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Tokens after the last block -> pooled (B, D), tokens (B, t, h, w, D)."""
        first = int(self.config.cls)
        normed = self.norm(x)
        tokens = normed[:, first:]
        match self.config.pool:
            case "cls":
                pooled = normed[:, 0]
            case "norm-mean":
                pooled = tokens.mean(1)
            case "mean-norm":  # VideoMAE's fc_norm; box heads then read tokens under the same norm
                pooled = self.norm(x[:, first:].mean(1))
        return pooled, tokens.unflatten(1, grid)


# ------------------------------------------------------------------------------------------------
# Boxes to features
# ------------------------------------------------------------------------------------------------
#
# RoIAlign (He et al. 2017, arXiv 1703.06870) samples a box on a regular grid, bilinearly, and takes
# the mean of each bin's samples. How the four neighbours of a sample weigh factors into a part for
# its row and one for its column: two small matrices per box say it all.


def align_weights(start: Tensor, end: Tensor, cells: int, bins: int) -> Tensor:
    """RoIAlign along one axis: sides (K,) in cells, from 0 to `cells` -> weights (K, bins, cells).

    The numbers of torchvision.ops.roi_align(aligned=True): a bin has as many samples as cells,
    rounded up; the centre of cell j is at j + 0.5; a sample beyond the outermost centres takes the
    outermost cell; a box without length gives zeros.
    """
    start, end = start - 0.5, end - 0.5
    step = ((end - start) / bins)[:, None]  # (K, 1)
    count = step.ceil()  # samples per bin
    bin_start = start[:, None] + torch.arange(bins, device=start.device) * step  # (K, bins)
    cell = torch.arange(cells, device=start.device)
    weights = start.new_zeros(start.shape[0], bins, cells)
    for i in range(math.ceil(cells / bins)):  # as many as the longest box has
        at = bin_start + (i + 0.5) * step / count
        hat = 1 - (at.clamp(0, cells - 1)[..., None] - cell).abs()  # (K, bins, cells)
        weights += torch.where((i < count)[..., None], hat.clamp(min=0), 0)
    return weights / count.clamp(min=1)[..., None]


def pool_boxes(features: Tensor, down: Tensor, across: Tensor, box_clip: Tensor) -> Tensor:
    """features (B, h, w, D), weights (K, p, h) and (K, p, w) -> the best of the bins, (K, D).

    One product for all boxes: every clip has room for as many as the fullest one holds. Features
    are not copied for each box and no gradient is scattered, so backward is deterministic. Boxes
    are best left on the CPU: a number of them is a shape here, for which a GPU would be waited for.
    """
    (clips, h, w, width), p = features.shape, down.shape[1]
    room = box_clip.shape[0]  # all that an exported graph knows
    if not torch.compiler.is_exporting():
        room = int(torch.bincount(box_clip, minlength=clips).max())
    earlier = (box_clip[:, None] == box_clip).tril(-1).sum(1)  # (K,) boxes of the clip before it
    place = box_clip * room + earlier  # (K,) of each box among clips * room
    weights = down.new_zeros(clips * room, p, h + w)
    weights[place] = torch.cat([down, across], 2)  # together: one copy to the GPU
    down, across = send(weights, features.device).split([h, w], 2)
    weights = torch.einsum("kph,kqw->kpqhw", down, across)
    weights = weights.reshape(clips, room * p * p, h * w)
    bins = weights @ features.flatten(1, 2)  # (B, room*p*p, D)
    best = bins.view(clips * room, p * p, width).amax(1)  # (B*room, D)
    return best.index_select(0, send(place, features.device))


def send(x: Tensor, device: torch.device) -> Tensor:
    """To the device; a GPU is not waited for, since the copy starts in pinned memory."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------
# Heads and the model
# ------------------------------------------------------------------------------------------------


def check_boxes(boxes: Tensor | None, box_clip: Tensor | None, clips: int) -> None:
    """ValueError for what are not boxes of so many clips. On a GPU only shapes are looked at: the
    numbers would have to be waited for."""
    if boxes is None or box_clip is None:
        raise ValueError("a box task needs boxes and box_clip, found none")
    if box_clip.ndim != 1 or boxes.shape != (len(box_clip), 4):
        shapes = f"{tuple(boxes.shape)} and {tuple(box_clip.shape)}"
        raise ValueError(f"boxes and box_clip are {shapes}, expected (K, 4) and (K,)")
    if boxes.device.type != "cpu" or len(boxes) == 0:
        return
    if not (boxes[:, :2] <= boxes[:, 2:]).all():  # not a number is not either
        raise ValueError(f"a box among {boxes.tolist()} is not x1 <= x2, y1 <= y2")
    low, high = boxes.min().item(), boxes.max().item()
    if low < -1 or high > 2:  # a whole frame away from the frame
        raise ValueError(f"boxes go from {low:g} to {high:g}, expected 0 to 1: are they pixels?")
    if box_clip.min() < 0 or box_clip.max() >= clips:
        raise ValueError(f"box_clip is {box_clip.tolist()}, for {clips} clips")


class TaskHead(nn.Module):
    """A linear classifier that starts at zero, so a new task does not shake the encoder."""

    def __init__(self, head: Head, width: int):
        super().__init__()
        self.head = head
        self.fc = nn.Linear(width, head.classes)
        nn.init.zeros_(self.fc.weight)
        bias = math.log(head.prior / (1 - head.prior)) if head.prior else 0.0
        nn.init.constant_(self.fc.bias, bias)

    def forward(self, pooled: Tensor, tokens: Tensor, boxes: Tensor, box_clip: Tensor) -> Tensor:
        x = pooled if self.head.kind == "clip" else self.persons(tokens, boxes, box_clip)
        return self.fc(F.dropout(x, self.head.dropout, self.training))

    def persons(self, tokens: Tensor, boxes: Tensor, box_clip: Tensor) -> Tensor:
        """-> (K, D). The keyframe's box stands for the whole clip: mean over time, then the best
        bin of RoIAlign of the tokens under the box, clipped to the frame."""
        features = tokens.mean(1)  # (B, h, w, D)
        h, w = features.shape[1:3]
        x1, y1, x2, y2 = boxes.float().clamp(0, 1).unbind(1)
        down = align_weights(y1 * h, y2 * h, h, self.head.roi_size)
        across = align_weights(x1 * w, x2 * w, w, self.head.roi_size)
        return pool_boxes(features, down, across, box_clip)


class CoFinetuneModel(nn.Module):
    """One encoder, one head per task. A head that a step does not use must have `grad = None`, as
    `zero_grad(set_to_none=True)` leaves it: zeros would let momentum and weight decay move it."""

    def __init__(self, config: ModelConfig, heads: dict[str, Head]):
        super().__init__()
        self.encoder = VideoTransformer(config)
        self.heads = nn.ModuleDict({t: TaskHead(head, config.width) for t, head in heads.items()})

    @property
    def scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """mean and std of the pixels, as `data.normalise(video, *model.scale)` takes them."""
        return self.encoder.config.mean, self.encoder.config.std

    def forward(
        self, video: Tensor, task: str, boxes: Tensor | None = None, box_clip: Tensor | None = None
    ) -> Tensor:
        return self.classify(self.encoder(video), task, boxes, box_clip)

    def classify(
        self,
        features: tuple[Tensor, Tensor],
        task: str,
        boxes: Tensor | None = None,
        box_clip: Tensor | None = None,
    ) -> Tensor:
        """What the encoder returns -> logits (B, C) of a clip task or (K, C) of a box task, K >= 0.
        float32 also under autocast: heads cost little, and box corners need the digits."""
        pooled, tokens = features
        if task not in self.heads:
            raise ValueError(f"no head for task {task!r}, there are {', '.join(self.heads)}")
        if self.heads[task].head.kind == "box":
            check_boxes(boxes, box_clip, len(tokens))
        elif boxes is not None:
            raise ValueError(f"task {task} classifies clips, but it was given boxes")
        with torch.autocast(tokens.device.type, enabled=False):
            return self.heads[task](pooled.float(), tokens.float(), boxes, box_clip)


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


def clip_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy, mean over clips; labels (B,) classes, or (B, C) shares after mixup."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def box_loss(logits: Tensor, labels: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Sigmoid cross-entropy, logits and labels (K, C): sum over classes, mean over boxes.

    The sum over classes has the scale of a softmax loss, so one learning rate serves both kinds of
    task (VideoGLUE, Scenic); most AVA detection code takes the mean, C times smaller.
    `count` divides in place of K: when ranks hold different numbers of boxes, the boxes of all
    ranks over the number of ranks makes the averaged gradient that of one process. No boxes give
    exactly 0, with a gradient of zeros for every parameter.
    """
    total = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    return total / ((len(logits) if count is None else count) or 1)
