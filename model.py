"""The network of co-finetuning: one video transformer, one small head per task.

A clip is cut into tubelets, each a token; a pre-norm transformer mixes the tokens of all frames
jointly (ViViT, model 1: Arnab et al. 2021, arXiv 2103.15691). A clip head classifies the pooled
feature, a box head each person from the tokens under its box. One class covers ViViT (class token
or mean, learned positions, tanh GELU) and VideoMAE (Tong et al. 2022, arXiv 2203.12602: mean before
the norm, fixed sin-cos table, exact GELU), so that published weights of both fit; rotary positions
make it V-JEPA 2 (arXiv 2506.09985).

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

Grid = tuple[int, int, int]  # t, h, w
Colour = tuple[float, ...]  # R, G, B; or empty
Features = tuple[Tensor, Tensor]  # pooled (B, D), tokens (B, t, h, w, D)

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
        for rule, (holds, words) in BOUNDS.items():
            if rule not in item.metadata:
                continue
            bound = item.metadata[rule]
            for number in numbers:
                if not holds(number, bound):
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
    qk_init: Literal["xavier", "mimetic"] = setting(
        "xavier", "queries and keys: independent, or nearly equal"
    )
    drop_path: float = setting(
        0.0, "stochastic depth of the last block, rising from 0 at the first", least=0, below=1
    )
    checkpointing: bool = setting(
        False, "compute blocks again in backward: a third more time, less memory", free=True
    )
    mean: Colour = setting(
        (0.5, 0.5, 0.5),
        "RGB in [0, 1], subtracted from pixels; with std empty too: each clip by its own",
    )
    std: Colour = setting((0.5, 0.5, 0.5), "RGB, which then divides them", above=0)

    def __post_init__(self):
        for name in ("size", "tubelet", "mean", "std"):  # lists, where they come from TOML
            setattr(self, name, tuple(getattr(self, name)))
        check_settings(self)
        sides = (self.frames, *self.size)
        for side, step in zip(sides, self.tubelet, strict=True):
            if side % step:
                raise ValueError(
                    f"frames and size {sides} are not multiples of tubelet {self.tubelet}"
                )
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} is odd or no multiple of heads {self.heads}")
        if self.pool == "cls" and not self.cls:
            raise ValueError("cls=False excludes pool 'cls'")
        if self.cls and self.pos in ("sincos", "rope"):
            raise ValueError(f"cls=True excludes pos {self.pos!r}")
        if self.pos == "rope" and self.width // self.heads < 6:
            raise ValueError(
                f"width {self.width} in {self.heads} heads: rope needs 6 numbers of a head"
            )
        colours = (len(self.mean), len(self.std))
        if colours not in ((0, 0), (3, 3)):
            raise ValueError(
                f"mean is {self.mean} and std {self.std}, expected three numbers each, or none"
            )

    @property
    def grid(self) -> Grid:
        """t, h, w of the native clip."""
        frames, rows, columns = self.tubelet
        height, width = self.size
        return self.frames // frames, height // rows, width // columns


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
        shape = tuple(video.shape)
        tubelet = tuple(self.weight.shape[2:])
        left_over = [side % step for side, step in zip(shape[2:], tubelet, strict=False)]
        if len(shape) != 5 or shape[1] != 3 or any(left_over):
            raise ValueError(
                f"video is {shape}, expected (B, 3, T, H, W) with T, H, W multiples of"
                f" the tubelet {tubelet}"
            )
        dt, dh, dw = tubelet
        x = video.unflatten(4, (-1, dw))
        x = x.unflatten(3, (-1, dh))
        x = x.unflatten(2, (-1, dt))  # (B, 3, t, dt, h, dh, w, dw)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, t, h, w, 3, dt, dh, dw)
        x = x.flatten(4)  # (B, t, h, w, 3*dt*dh*dw)
        return F.linear(x, self.weight.flatten(1), self.bias)  # (B, t, h, w, D)


def sincos_table(count: int, width: int) -> Tensor:
    """(count, width): sine at even, cosine at odd columns. Computed in float64 like VideoMAE's: a
    float32 table is off by 1e-4."""
    place = torch.arange(count, dtype=torch.float64)[:, None]  # (count, 1)
    column = torch.arange(width, dtype=torch.float64)  # (width,)
    angle = place * 10000.0 ** (-2 * (column // 2) / width)  # (count, width)
    table = torch.where(column % 2 == 0, angle.sin(), angle.cos())
    return table.float()


def sincos_axes(grid: Grid, width: int) -> Tensor:
    """(N, width): about a third of the columns tells the place in time, one the row, one the
    column."""
    t, h, w = grid
    part = width // 6 * 2
    times = sincos_table(t, width - 2 * part)[:, None, None, :]
    rows = sincos_table(h, part)[None, :, None, :]
    columns = sincos_table(w, part)[None, None, :, :]
    parts = []
    for table in (times, rows, columns):
        parts.append(table.expand(t, h, w, -1))
    return torch.cat(parts, 3).flatten(0, 2)


def position_table(config: ModelConfig) -> Tensor:
    """(1, N, D), with one more row in front for the class token."""
    first = int(config.cls)
    cells = math.prod(config.grid)
    if config.pos == "sincos":
        # One axis, along which the tokens follow each other. For another grid this table is
        # resized: one made anew would differ in every row.
        return sincos_table(cells, config.width)[None]
    table = 0.02 * torch.randn(1, first + cells, config.width)
    if config.pos == "learned-axes":
        table[0, first:] = sincos_axes(config.grid, config.width)
    return table


def resize_positions(pos: Tensor, native: Grid, grid: Grid, mode: str) -> Tensor:
    """(1, [1 +] N, D) from the native grid to another; the class token's row is kept.

    "bicubic": each time slice like an image (VideoMAE's detection code), and time linearly.
    "bilinear-corners": linear along every axis, the corner cells fixed (Scenic, for ViViT).
    Both are linear and separable, hence one small matrix per axis: cheap enough for every forward,
    and deterministic in backward, which F.interpolate on a GPU is not.
    """
    if native == grid:
        return pos
    first = pos.shape[1] - math.prod(native)
    table = pos[:, first:].float().unflatten(1, native)  # (1, t, h, w, D)
    corners = mode == "bilinear-corners"
    with torch.autocast(pos.device.type, enabled=False):
        for axis, new in enumerate(grid, start=1):
            kernel = "bicubic" if mode == "bicubic" and axis > 1 else "bilinear"
            # F.interpolate is linear: what it makes of a signal for each cell, 1 there and 0 in
            # the others, is its matrix.
            signals = torch.eye(table.shape[axis], device=pos.device)[None, :, :, None]
            matrix = F.interpolate(signals, (new, 1), mode=kernel, align_corners=corners)
            matrix = matrix[0, :, :, 0]  # (old, new)
            table = torch.tensordot(table, matrix, ([axis], [0]))  # the axis has become the last
            table = table.movedim(-1, axis)
    table = table.flatten(1, 3).to(pos.dtype)  # (1, N, D)
    return torch.cat([pos[:, :first], table], 1)


def rotate(x: Tensor, grid: Grid) -> Tensor:
    """Queries or keys (B, heads, N, d), turned by angles that grow with t, h, w: their products
    then depend on how far apart two tokens are (rotary positions, on three axes as V-JEPA 2).

    A third of the d numbers, rounded down to pairs, belongs to each axis; what is left stays as it
    is. Numbers 2i and 2i+1 make a pair, but their angles are those of frequencies 2i and 2i+1
    (modulo half the third), not of one: a mistake of V-JEPA 2, which its weights were trained with.
    """
    part = x.shape[-1] // 6 * 2  # numbers of an axis
    exponent = torch.arange(part // 2, device=x.device) / (part / 2)
    axes = [torch.arange(count, device=x.device) for count in grid]
    places = torch.cartesian_prod(*axes)  # (N, 3): t, h, w of each token
    angles = places[:, :, None] * 10000.0**-exponent  # (N, 3, part / 2)
    angles = torch.cat([angles, angles], 2).flatten(1)  # (N, 3 * part)
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    turned, rest = x.tensor_split([3 * part], -1)
    first = turned[..., ::2]  # of each pair
    second = turned[..., 1::2]
    across = torch.stack([-second, first], -1)  # each pair, turned by a right angle
    turned = turned * cos + across.flatten(-2) * sin
    return torch.cat([turned, rest], -1)


# ------------------------------------------------------------------------------------------------
# Transformer
# ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): tokens (B, N, D) to the same."""

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        width = config.width
        hidden = int(width * config.mlp_ratio)
        self.heads = config.heads
        self.gelu = config.gelu
        self.rotary = config.pos == "rope"
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, config.eps)
        self.qkv = nn.Linear(width, 3 * width)  # rows q | k | v, each head by head
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, config.eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        q, k, v = self.qkv.weight.chunk(3)
        for weight in (q, k, v):
            nn.init.xavier_uniform_(weight)
        for linear in (self.proj, self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.qkv.bias)
        if config.qk_init == "mimetic":
            # With Wq = Wk tokens begin by attending to their like, as in trained transformers
            # (Trockman and Kolter 2023, arXiv 2305.09828): the demo's model takes off sooner.
            scale = 5 / (width * math.sqrt(width // self.heads))
            with torch.no_grad():
                q.normal_(std=math.sqrt(scale))
                k.copy_(q + 0.02 * torch.randn_like(q))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        mixed = self.attend(self.norm1(x), grid)
        x = x + self.drop(mixed)
        changed = self.mlp(self.norm2(x))
        return x + self.drop(changed)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, d)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
        q, k, v = qkv.unbind(0)
        if self.rotary:
            q = rotate(q, grid)
            k = rotate(k, grid)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        x = x.transpose(1, 2).flatten(2)  # (B, N, D)
        return self.proj(x)

    def mlp(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x), approximate=self.gelu)
        return self.fc2(hidden)

    def drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth: the branch is left out for some clips and scaled up for the others, so
        that its mean is what evaluation uses (timm; Scenic's ViViT does not scale)."""
        if not self.training or self.drop_path == 0:
            return branch
        ones = branch.new_ones(len(branch), 1, 1)  # (B, 1, 1)
        return branch * F.dropout(ones, self.drop_path)


class VideoTransformer(nn.Module):
    """video (B, 3, T, H, W) -> pooled (B, D), tokens (B, t, h, w, D).

    Clip heads read `pooled`, box heads `tokens` (after the final norm, without the class token);
    both depend on every parameter, so that DDP finds none unused. `torch.compile` takes the whole
    forward as one graph.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.patch = Tubelets(config.tubelet, config.width)
        self.cls = None
        if config.cls:
            self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.pos == "rope":  # each block turns its queries and keys
            self.pos = None
        elif config.pos == "sincos":  # follows from the config, so checkpoints do not hold it
            self.register_buffer("pos", position_table(config), persistent=False)
        else:
            self.pos = nn.Parameter(position_table(config))
        self.blocks = nn.ModuleList()
        rise = config.drop_path / max(1, config.depth - 1)
        for i in range(config.depth):
            self.blocks.append(Block(config, rise * i))
        self.norm = nn.LayerNorm(config.width, config.final_eps)

    def forward(self, video: Tensor) -> Features:
        x, grid = self.embed(video)
        for block in self.blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return self.read_out(x, grid)

    def embed(self, video: Tensor) -> tuple[Tensor, Grid]:
        """video -> tokens with their positions (B, [1 +] N, D), and the grid t, h, w."""
        x = self.patch(video)  # (B, t, h, w, D)
        grid = tuple(x.shape[1:4])
        x = x.flatten(1, 3)  # (B, N, D)
        if self.cls is not None:
            cls = self.cls.expand(len(x), 1, -1)
            x = torch.cat([cls.to(x.dtype), x], 1)  # (B, 1 + N, D)
        if self.pos is not None:
            native = self.config.grid
            x = x + resize_positions(self.pos, native, grid, self.config.pos_resize)
        return x, grid

    def read_out(self, x: Tensor, grid: Grid) -> Features:
        """Tokens after the last block (B, [1 +] N, D) -> pooled, tokens."""
        first = int(self.config.cls)
        normed = self.norm(x)
        tokens = normed[:, first:]  # (B, N, D)
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
# RoIAlign (He et al. 2017, arXiv 1703.06870) lays a grid of bins over a box, samples the features
# at a few points of each bin, bilinearly, and takes their mean. How much a cell counts in a bin is
# a product, of a weight for its row and one for its column: two small matrices per box say it all.


def align_weights(start: Tensor, end: Tensor, cells: int, bins: int) -> Tensor:
    """RoIAlign along one axis: sides (K,) in cells, from 0 to `cells` -> weights (K, bins, cells).

    The numbers of torchvision.ops.roi_align(aligned=True): a bin has as many samples as cells,
    rounded up; the centre of cell j is at j + 0.5; a sample beyond the outermost centres takes the
    outermost cell; a box without length gives zeros.
    """
    start = start - 0.5  # from here on the centre of cell j is at j
    end = end - 0.5
    length = ((end - start) / bins)[:, None]  # (K, 1) of a bin
    samples = length.ceil()  # (K, 1) of a bin
    number = torch.arange(bins, device=start.device)
    bin_start = start[:, None] + number * length  # (K, bins)
    cell = torch.arange(cells, device=start.device)  # (cells,)
    weights = start.new_zeros(start.shape[0], bins, cells)
    for i in range(math.ceil(cells / bins)):  # as many as a bin of the longest box has
        sample = bin_start + (i + 0.5) * length / samples  # (K, bins)
        sample = sample.clamp(0, cells - 1)
        apart = (sample[:, :, None] - cell).abs()  # (K, bins, cells)
        share = (1 - apart).clamp(min=0)  # linear: the two cells next to the sample
        exists = (i < samples)[:, :, None]  # (K, 1, 1); of a box without length no sample: 0 / 0
        weights += torch.where(exists, share, 0)
    return weights / samples.clamp(min=1)[:, :, None]


def pool_boxes(features: Tensor, down: Tensor, across: Tensor, box_clip: Tensor) -> Tensor:
    """features (B, h, w, D), weights (K, p, h) and (K, p, w) -> (K, D), the
    maximum over the p x p bins, of each channel by itself.

    Every clip gets as many slots S as the fullest one has boxes; an empty slot has weights of 0.
    So one product serves all boxes, features are not copied for each box, and no gradient is
    scattered: backward is deterministic. Boxes are best left on the CPU: S is a shape here, and a
    GPU would have to be waited for to know it.
    """
    clips, h, w, width = features.shape
    p = down.shape[1]
    slots = box_clip.shape[0]  # all that an exported graph knows
    if not torch.compiler.is_exporting():
        slots = int(torch.bincount(box_clip, minlength=clips).max())
    same_clip = box_clip[:, None] == box_clip  # (K, K)
    earlier = same_clip.tril(-1).sum(1)  # (K,) boxes of its clip that come before a box
    slot = box_clip * slots + earlier  # (K,)
    weights = down.new_zeros(clips * slots, p, h + w)
    weights[slot] = torch.cat([down, across], 2)  # together: one copy to the GPU
    weights = send(weights, features.device)
    down, across = weights.split([h, w], 2)
    weights = torch.einsum("kph,kqw->kpqhw", down, across)  # (B*S, p, p, h, w)
    weights = weights.reshape(clips, slots * p * p, h * w)
    values = weights @ features.flatten(1, 2)  # (B, S*p*p, D) of the bins
    values = values.view(clips * slots, p * p, width)
    best = values.amax(1)  # (B*S, D)
    return best.index_select(0, send(slot, features.device))


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
    low = boxes.min().item()
    high = boxes.max().item()
    if low < -1 or high > 2:  # a whole frame away from the frame
        raise ValueError(f"boxes go from {low:g} to {high:g}, expected 0 to 1: are they pixels?")
    if box_clip.min() < 0 or box_clip.max() >= clips:
        raise ValueError(f"box_clip is {box_clip.tolist()}, for {clips} clips")


class TaskHead(nn.Module):
    """A linear classifier that starts at zero, so a new task does not shake the encoder."""

    def __init__(self, head: Head, width: int):
        super().__init__()
        self.config = head
        self.fc = nn.Linear(width, head.classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        if head.prior:
            odds = head.prior / (1 - head.prior)
            nn.init.constant_(self.fc.bias, math.log(odds))

    def forward(self, pooled: Tensor, tokens: Tensor, boxes: Tensor, box_clip: Tensor) -> Tensor:
        if self.config.kind == "clip":
            x = pooled  # (B, D)
        else:
            x = self.persons(tokens, boxes, box_clip)  # (K, D)
        return self.fc(F.dropout(x, self.config.dropout, self.training))

    def persons(self, tokens: Tensor, boxes: Tensor, box_clip: Tensor) -> Tensor:
        """-> (K, D). The keyframe's box stands for the whole clip: mean over time, then
        RoIAlign of the tokens under the box, clipped to the frame, then the largest of its bins in
        each channel."""
        features = tokens.mean(1)  # (B, h, w, D)
        h, w = features.shape[1:3]
        bins = self.config.roi_size
        x1, y1, x2, y2 = boxes.float().clamp(0, 1).unbind(1)
        down = align_weights(y1 * h, y2 * h, h, bins)  # (K, bins, h)
        across = align_weights(x1 * w, x2 * w, w, bins)  # (K, bins, w)
        return pool_boxes(features, down, across, box_clip)


class CoFinetuneModel(nn.Module):
    """One encoder, one head per task. A head that a step does not use must have `grad = None`, as
    `zero_grad(set_to_none=True)` leaves it: zeros would let momentum and weight decay move it."""

    def __init__(self, config: ModelConfig, heads: dict[str, Head]):
        super().__init__()
        self.encoder = VideoTransformer(config)
        self.heads = nn.ModuleDict()
        for task, head in heads.items():
            self.heads[task] = TaskHead(head, config.width)

    @property
    def scale(self) -> tuple[Colour, Colour]:
        """mean and std of the pixels, as `data.normalise(video, *model.scale)` takes them."""
        return self.encoder.config.mean, self.encoder.config.std

    def forward(
        self, video: Tensor, task: str, boxes: Tensor | None = None, box_clip: Tensor | None = None
    ) -> Tensor:
        return self.classify(self.encoder(video), task, boxes, box_clip)

    def classify(
        self, features: Features, task: str, boxes: Tensor | None = None,
        box_clip: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What the encoder returns -> logits (B, C) of a clip task or (K, C) of a box task, K >= 0.
        float32 also under autocast: heads cost little, and box corners need the digits."""
        pooled, tokens = features
        if task not in self.heads:
            raise ValueError(f"no head for task {task!r}, there are {', '.join(self.heads)}")
        head = self.heads[task]
        if head.config.kind == "box":
            check_boxes(boxes, box_clip, len(tokens))
        elif boxes is not None:
            raise ValueError(f"task {task} classifies clips, but it was given boxes")
        with torch.autocast(tokens.device.type, enabled=False):
            return head(pooled.float(), tokens.float(), boxes, box_clip)


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


def clip_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy, mean over clips; labels (B,) classes, or (B, C) shares after mixup."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def box_loss(logits: Tensor, labels: Tensor, count: float | None = None) -> Tensor:
    """Sigmoid cross-entropy, logits and labels (K, C): sum over classes, mean over boxes.

    The sum over classes has the scale of a softmax loss, so one learning rate serves both kinds of
    task (VideoGLUE, Scenic); most AVA detection code takes the mean, C times smaller.
    `count` divides in place of K: when ranks hold different numbers of boxes, the boxes of all
    ranks over the number of ranks makes the averaged gradient that of one process. No boxes give
    exactly 0, with a gradient of zeros for every parameter.
    """
    if count is None:
        count = len(logits)
    total = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    return total / (count or 1)
