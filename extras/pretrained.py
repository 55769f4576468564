"""Checkpoints of the field, and this project's own, as weights for model.py.

    weights = load("vivit-b-16x2-kinetics400/")           # a file, or a folder of save_pretrained
    model = build(weights)                                # with the head of the file
    model = build(weights, {"ava": Head("box", 80)})      # or with new ones
    load_encoder(model.encoder, weights)                  # into an encoder that exists already

Read are:
    Hugging Face   ViViT, VideoMAE, V-JEPA 2; ViT, SigLIP, SigLIP 2, DINOv2    folder, shards too
    VideoMAE       pretrained, finetuned, Action-Detection                     .pth
    VideoMAE v2    its own, and its Hugging Face folders
    UMT            unmasked teacher: pretrained, finetuned, AVA                .pth
    V-JEPA         1 and 2 (not 2.1)                                           .pth.tar, .pt
    MAE-ST         masked autoencoders as spatiotemporal learners              .pth
    mmaction2      VideoMAE: clip classification, AVA detection                .pth
    DINOv2, timm   plain vision transformers without registers                 .pth, folder
    Google         ViT of vision_transformer and of big_vision                 .npz
    Scenic         ViViT (unfactorised), its flax parameters exported by
                   np.savez("vivit.npz", **flax.traverse_util.flatten_dict(params, sep="/"))
    this project   what cofinetune.py saves                                    .pt

A file is recognised completely or refused (families.py), and loading is strict: a tensor is mapped,
or left out for a reason that is reported, or an error. Nothing in a file is executed
(weight_files.py). Whatever is wrong with a file is a ValueError of one sentence.

`python extras/pretrained.py CHECKPOINT` prints what a file holds. To use this file elsewhere, copy
it and the two named above in a folder `extras`, beside model.py; they need torch and numpy.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # run as a script, Python looks for modules beside this file only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extras.families import (
    ATTENTION_HEADS,
    GELU,
    HEAD_BEHIND,
    V_JEPA_2_HEADS,
    Family,
    Parts,
    from_flax,
    pair,
    read_arguments,
    read_facts,
    recognise,
    rename,
    unwrap,
)
from extras.weight_files import listed, one_line, read
from model import (
    SIZES,
    CoFinetuneModel,
    Head,
    ModelConfig,
    VideoTransformer,
    resize_positions,
    sincos_table,
)


@dataclass
class Weights:
    """A converted checkpoint. `encoder` fits VideoTransformer(config), `head_state` the heads of
    CoFinetuneModel(config, heads). `report`: what was mapped, what was left out and why, and what
    to know about the weights."""

    family: str
    config: ModelConfig
    encoder: dict[str, Tensor]
    heads: dict[str, Head]
    head_state: dict[str, Tensor]
    classes: dict[str, list[str]]  # names of a head's classes, where the file has them
    report: list[str]


OWN = "this project"
LEAVES_INIT = ("frames", "size", "drop_path", "checkpointing")  # of [model]: may differ from a file
MAX_TOKENS, MAX_DEPTH = 1 << 18, 256  # 32 frames of 1024x1024 are a quarter of the former


# ------------------------------------------------------------------------------------------------
# The encoder
# ------------------------------------------------------------------------------------------------


def join_tensors(parts: Parts) -> int:
    """Query, key and value of each block into one, LayerScale into the layer before it; -> depth.
    VideoMAE has no key bias: softmax would not see one, so zero is exact."""
    tensors, width = parts.tensors, len(parts.tensors["patch.weight"])
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    for i in range(depth):
        block = f"blocks.{i}."
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            names = [f"{block}{part}.{kind}" for part in "qkv"]
            if kind == "bias" and names[0] in tensors and names[2] in tensors:
                tensors.setdefault(names[1], torch.zeros(shape))
            if all(name in tensors and tensors[name].shape == shape for name in names):
                tensors[f"{block}qkv.{kind}"] = torch.cat([tensors.pop(name) for name in names])
        for scale, layer in (("ls1", "proj"), ("ls2", "fc2")):
            rows = [tensors.get(f"{block}{layer}.{kind}") for kind in ("weight", "bias")]
            if block + scale in tensors and not any(row is None for row in rows):
                factor = tensors.pop(block + scale)  # (D,)
                tensors[f"{block}{layer}.weight"] = rows[0] * factor[:, None]
                tensors[f"{block}{layer}.bias"] = rows[1] * factor
    if "blocks.0.ls1" in parts.theirs:
        parts.report.append("LayerScale multiplied into the layers before it, which is exact")
    return depth


def inflate_image(tensors: dict[str, Tensor], steps: int, how: str) -> None:
    """Makes an image transformer one for clips: the filter sees the second of a tubelet's two
    frames ("central", as ViViT) or their mean ("average"), the positions repeat in time. A still
    clip then gives the image's features, exactly if there is no class token or one step in time;
    with more steps a class token, as a key, is one among that many times more patches."""
    image = tensors["patch.weight"][:, :, None]  # (D, 3, 1, p, p)
    frames = [image * 0, image] if how == "central" else [image / 2, image / 2]
    tensors["patch.weight"] = torch.cat(frames, 2)
    if "pos" in tensors:
        rows = tensors["pos"].shape[1]
        patches = math.isqrt(rows) ** 2
        first, table = tensors["pos"].split([rows - patches, patches], 1)
        if "cls" in tensors and not first.shape[1]:  # big_vision since 2022: no position for cls
            first = torch.zeros_like(table[:, :1])
        tensors["pos"] = torch.cat([first, table.repeat(1, steps, 1)], 1)  # (1, [1 +] t*h*w, D)


def lay_out(parts: Parts, facts: dict) -> None:
    """The patch embedding as a filter, the positions as one table (1, [1 +] N, D).

    SigLIP 2 (naflex) takes patches as rows of row, column, colour. Hugging Face's SigLIP has a
    table (N, D). MAE-ST has one for space and one for time, which it adds; they tell the frames.
    """
    tensors = parts.tensors
    patch = tensors["patch.weight"]
    if patch.ndim == 2:
        side = math.isqrt(patch.shape[1] // 3)
        tensors["patch.weight"] = patch.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
        parts.report.append("SigLIP 2 smooths its positions for smaller images, here they are not")
    names = ("pos_cls", "pos_time", "pos_space")
    if all(name in tensors for name in names):
        first, time, space = (tensors.pop(name) for name in names)
        table = time[:, :, None] + space[:, None]  # (1, t, h*w, D)
        tensors["pos"] = torch.cat([first, table.flatten(1, 2)], 1)
        facts["num_frames"] = time.shape[1] * patch.shape[2]
    if "pos" in tensors and tensors["pos"].ndim == 2:
        tensors["pos"] = tensors["pos"][None]
    if "pos" in tensors and tensors["pos"].ndim != 3:
        raise ValueError(f"{parts.path}: positions of shape {tuple(tensors['pos'].shape)}")


def native_clip(
    parts: Parts, family: Family, facts: dict, stated: int | None, inflate: str
) -> tuple[int, tuple[int, int]]:
    """Frames and size of the clips that the positions are for; an image filter is inflated."""
    tensors = parts.tensors
    video = tensors["patch.weight"].ndim == 5
    frames = facts.get("num_frames") or family.frames or stated
    if not frames:
        raise ValueError(
            f"{parts.path}: read as {family.name}: nothing in the file says of how many frames its"
            " clips are. Say it: frames=8 in load(), --frames 8 on the command line, frames = 8 in"
            " the recipe's [model] (the published ones have 8)"
        )
    steps = max(frames // (tensors["patch.weight"].shape[2] if video else 2), 1)
    rows = tensors["pos"].shape[1] if "pos" in tensors else 0
    if rows * steps > MAX_TOKENS * 16:
        raise ValueError(f"{parts.path}: {rows} positions for {frames} frames cannot be right")
    side = math.isqrt(rows // (steps if video else 1)) * tensors["patch.weight"].shape[-1]
    height, width = pair(facts.get("image_size", side or family.size))
    if not video:
        inflate_image(tensors, steps, inflate)
        words = f"filter of an image inflated to 2 frames ({inflate}), positions repeated"
        parts.report.append(words)
    elif "num_frames" not in facts or "image_size" not in facts and not rows:
        words = "the file does not say for which clips:"
        parts.report.append(f"{words} {frames} frames of {height}x{width} taken")
    return frames, (height, width)


def choose_norm(parts: Parts, family: Family, facts: dict) -> str:
    """How clips are pooled; the final norm comes under one name, whichever it is in the file."""
    tensors, width = parts.tensors, len(parts.tensors["patch.weight"])
    if "fc_norm.weight" in tensors:
        parts.unexpected += [parts.theirs[name] for name in tensors if name.startswith("norm.")]
        for kind in ("weight", "bias"):
            if f"fc_norm.{kind}" in tensors:
                tensors[f"norm.{kind}"] = tensors.pop(f"fc_norm.{kind}")
        words = "norm is fc_norm, trained on the mean of tokens; box heads see it per token"
        parts.report.append(words)
        return "mean-norm"
    if "norm.weight" not in tensors and family.pos == "sincos":
        tensors |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        parts.report.append("no final norm in the file: a new one")
        return "mean-norm"
    if family.pool == "cls" and ("cls" not in tensors or facts.get("global_pool") == "avg"):
        return "norm-mean"
    return family.pool


def check_table(parts: Parts, family: Family) -> str:
    """Which positions: a fixed sin-cos table is computed here and not kept."""
    tensors = parts.tensors
    if family.pos != "sincos" or "pos" not in tensors:
        return family.pos
    table = sincos_table(tensors["pos"].shape[1], len(tensors["patch.weight"]))[None]
    if table.shape != tensors["pos"].shape or not torch.allclose(tensors["pos"], table, atol=1e-5):
        return "learned"
    parts.leave("pos", "the fixed sin-cos table, computed here")
    return "sincos"


def encoder_config(
    parts: Parts, family: Family, facts: dict, stated: int | None, flax_heads: int, inflate: str
) -> ModelConfig:
    """What the network computes. The tensors get the layout of VideoTransformer."""
    name, tensors, report = family.name, parts.tensors, parts.report
    mean, std = family.scale
    if name == "Hugging Face ViViT" and facts.get("offset", True):
        # What its processor is told contradicts how Scenic trained.
        report.append("input is [-1, 1] as in training; Hugging Face's processor feeds [-3, 1]")
    else:
        mean, std = facts.get("image_mean", mean), facts.get("image_std", std)
    if name == "timm ViT" and "image_mean" not in facts:
        report.append("input assumed to be [-1, 1]; of DeiT and MAE it is ImageNet's mean and std")
    frames, size = native_clip(parts, family, facts, stated, inflate)
    width = len(tensors["patch.weight"])
    special = V_JEPA_2_HEADS if name == "V-JEPA 2" else ATTENTION_HEADS
    attention = facts.get("num_attention_heads", flax_heads) or special.get(width)
    if not attention:
        attention = max(width // 64, 1)
        report.append(f"{attention} attention heads of 64 channels taken, the file does not say")
    if name == "Hugging Face VideoMAE" and (width, attention) == (384, 16):
        attention = 6
        report.append("6 attention heads, as VideoMAE-S was trained; the config.json says 16")
    depth = join_tensors(parts)
    eps = final_eps = facts.get("layer_norm_eps", family.eps)
    if name == "Hugging Face VideoMAE" and "fc_norm.weight" in tensors:
        final_eps = 1e-5
    pool = choose_norm(parts, family, facts)
    hidden = len(tensors["blocks.0.fc1.weight"])
    mlp_ratio = hidden / width
    if int(width * mlp_ratio) != hidden:  # rounded down
        mlp_ratio = (hidden + 0.5) / width
    values = dict(
        frames=frames,
        size=size,
        tubelet=tuple(tensors["patch.weight"].shape[2:]),
        width=width,
        depth=depth,
        heads=attention,
        mlp_ratio=mlp_ratio,
        cls="cls" in tensors,
        pool=pool,
        gelu=GELU[facts["hidden_act"]] if "hidden_act" in facts else family.gelu,
        eps=eps,
        final_eps=final_eps,
        pos=check_table(parts, family),
        pos_resize=family.pos_resize,
        mean=tuple(mean),
        std=tuple(std),
    )
    return make(parts.path, ModelConfig, values)


# ------------------------------------------------------------------------------------------------
# The head
# ------------------------------------------------------------------------------------------------


def take_head(parts: Parts, family: Family, config: ModelConfig) -> tuple[dict, dict]:
    """({name: Head}, its tensors), both empty if the file has none, or one that reads something
    that the network here has not."""
    tensors = parts.tensors
    weight, stem = tensors.get("head.weight"), parts.theirs.get("head.weight", "")
    if weight is None:
        return {}, {}
    detection = stem.startswith("roi_head")
    video_mae = family.name in ("VideoMAE", "UMT")  # whose AVA models norm each token
    box = detection or video_mae and config.pool == "norm-mean"
    reason = ""
    if any(HEAD_BEHIND in why for why in parts.left):
        reason = "it reads what is left out"
    elif weight.ndim == 2 and weight.shape[1] == 2 * config.width:
        reason = "it reads the class token and the mean, one after the other"
    elif family.pos == "sincos" and config.pool == "norm-mean" and not box:
        reason = "it reads the first token alone"
    rows = {}
    for kind in ("weight", "bias"):
        if f"head.{kind}" in tensors and reason:
            parts.leave(f"head.{kind}", reason)
        elif f"head.{kind}" in tensors:
            rows[kind] = tensors.pop(f"head.{kind}")
    if reason:
        return {}, {}
    if detection and weight.shape[:1] != (80,):  # 80: AVA's classes alone
        rows = {kind: tensor[1:] for kind, tensor in rows.items()}
        parts.report.append("row 0 of the box head is mmdetection's background: dropped")
    task = "box" if box else "clip"
    values = dict(kind=task, classes=rows["weight"].shape[:1].numel())
    values["roi_size"] = 8 if detection else 7
    head = make(parts.path, Head, values)
    return {task: head}, {f"{task}.fc.{kind}": tensor for kind, tensor in rows.items()}


def make(path: Path, kind: type, values: dict) -> ModelConfig | Head:
    """A ModelConfig or Head with the values of a file, each of the type of its default."""
    blank = Head("clip", 1) if kind is Head else ModelConfig()
    try:
        for name, value in values.items():
            default = getattr(blank, name)
            types = (list, tuple) if isinstance(default, tuple) else (type(default), int)
            if not isinstance(value, types) or value == math.inf:
                raise TypeError(f"{name} is {value!r}")
        return kind(**values)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no {kind.__name__} for this: {one_line(error)}") from None


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------


def load(path: str | Path, inflate: str = "central", frames: int | None = None) -> Weights:
    """Reads a checkpoint of any family that the docstring of this file lists.

    inflate  "central" or "average": how an image filter becomes one for clips
    frames   of the clips that the checkpoint was trained with, for a file of which neither tensors
             nor settings tell it (UMT); elsewhere not read

    ValueError or FileNotFoundError for whatever is not understood completely.
    """
    if inflate not in ("central", "average"):
        raise ValueError(f"inflate={inflate!r}, expected 'central' or 'average'")
    path, content, settings = read(path)
    if "model_config" in content:
        return load_own(path, content)
    try:
        return convert(path, content, settings or read_arguments(content), inflate, frames)
    except (ArithmeticError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: tensors that do not fit together: {one_line(error)}") from None


def convert(path: Path, content: dict, settings: dict, inflate: str, frames: int | None) -> Weights:
    """Another project's file as ours: its names, then the encoder, then the head."""
    facts, flax_heads = read_facts(path, settings), 0
    predictor = content.get("predictor")
    tensors, wrapping = unwrap(path, content)
    if path.suffix == ".npz":
        tensors, flax_heads = from_flax(tensors)
    parts = rename(path, tensors)
    parts.report += wrapping
    mapped = len(parts.tensors)
    lay_out(parts, facts)
    family = recognise(parts, predictor if isinstance(predictor, dict) else {})
    config = encoder_config(parts, family, facts, frames, flax_heads, inflate)
    heads, head_state = take_head(parts, family, config)
    classes = {}
    names = list(facts.get("id2label", {}).values())
    for task, head in heads.items():
        if len(names) == head.classes and names[0] != "LABEL_0":
            classes[task] = names
    summary = f"mapped: {mapped} tensors, to {len(parts.tensors)} of the encoder"
    if heads:
        summary += f" and {len(head_state)} of a head"
    report = [summary]
    for why, left in parts.left.items():
        report.append(f"left out: {listed(left, 3)}: {why}")
    report += parts.report
    weights = Weights(family.name, config, parts.tensors, heads, head_state, classes, report)
    return check_complete(path, weights, parts.unexpected)


def load_own(path: Path, content: dict) -> Weights:
    """A checkpoint of cofinetune.py: nothing to convert, everything to check."""
    kinds = dict(model=dict, model_config=dict, heads=dict, classes=dict)
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise ValueError(f"{path}: a checkpoint of this project without {', '.join(wrong)}")
    config = make(path, ModelConfig, content["model_config"])
    heads = {name: make(path, Head, head) for name, head in content["heads"].items()}
    encoder, head_state, other = {}, {}, []
    averaged = content.get("ema") or {}
    tensors = averaged or content["model"]
    for name, tensor in tensors.items():
        part, _, rest = str(name).partition(".")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {name} is no dense tensor")
        if part in ("encoder", "heads"):
            (encoder if part == "encoder" else head_state)[rest] = tensor
        else:
            other.append(name)
    report = [f"mapped: all {len(tensors)} tensors, of step {content.get('step')}"]
    if averaged:
        report.append("its averaged weights are taken (ema)")
    weights = Weights(OWN, config, encoder, heads, head_state, content["classes"], report)
    return check_complete(path, weights, other)


def check_complete(path: Path, weights: Weights, unexpected: list[str]) -> Weights:
    """The weights, if they are exactly what their configuration asks for; else every difference."""
    tokens, depth = math.prod(weights.config.grid), weights.config.depth
    if tokens > MAX_TOKENS or depth > MAX_DEPTH:
        raise ValueError(f"{path}: {depth} blocks for {tokens} tokens cannot be right")
    state = {f"encoder.{name}": tensor for name, tensor in weights.encoder.items()}
    state |= {f"heads.{name}": tensor for name, tensor in weights.head_state.items()}
    try:
        with torch.device("meta"):  # allocates nothing of what a hostile file claims
            model = CoFinetuneModel(weights.config, weights.heads)
    except RuntimeError as error:
        raise ValueError(f"{path}: no model has these sizes: {one_line(error)}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": [],
        "unexpected": [*unexpected],
        "of another shape": [],
        "not finite": [],
    }
    for name, tensor in state.items():
        if name not in wanted:
            problems["unexpected"].append(name)
        elif tensor.shape != wanted[name]:
            words = f"{name} {tuple(tensor.shape)} for {wanted[name]}"
            problems["of another shape"].append(words)
        elif not tensor.isfinite().all():
            problems["not finite"].append(name)
    problems["missing"] = [name for name in wanted if name not in state]
    text = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
    if text:
        raise ValueError(f"{path}: read as {weights.family}: {text}")
    return weights


def load_encoder(encoder: VideoTransformer, weights: Weights) -> None:
    """Loads the weights into an encoder that exists. If its native clips differ in size or frames,
    learned positions are resized to them, once. ValueError if it computes something else."""
    theirs, ours, state = weights.config, encoder.config, dict(weights.encoder)
    alike = ["tubelet", "width", "depth", "heads", "mlp_ratio", "gelu"]
    if "sincos" in (ours.pos, theirs.pos) or "rope" in (ours.pos, theirs.pos):
        alike.append("pos")
    if ours.pos == "sincos":  # a table made for another grid is another
        alike.append("grid")
    if ours.cls:  # a class token that the encoder lacks is dropped
        alike.append("cls")
    wrong = []
    for name in alike:
        if getattr(ours, name) != getattr(theirs, name):
            wrong.append(f"{name} {getattr(ours, name)} for {getattr(theirs, name)}")
    if wrong:
        raise ValueError(f"{weights.family} weights in an encoder with {', '.join(wrong)}")
    if theirs.cls and not ours.cls:
        del state["cls"]
        state["pos"] = state["pos"][:, 1:]
    if theirs.grid != ours.grid and "pos" in state:
        state["pos"] = resize_positions(state["pos"], theirs.grid, ours.grid, ours.pos_resize)
    encoder.load_state_dict(state)


def build(
    weights: Weights, heads: dict[str, Head] | None = None, /, **overrides
) -> CoFinetuneModel:
    """A model with these weights and the heads of the file, or with new ones; of those, one of the
    same name and shape in a checkpoint of this project keeps its weights. `overrides` are fields
    of ModelConfig: drop_path, checkpointing, frames, size, pool."""
    config = dataclasses.replace(weights.config, **overrides)
    model = CoFinetuneModel(config, weights.heads if heads is None else heads)
    load_encoder(model.encoder, weights)
    state = model.heads.state_dict()
    kept = kept_heads(weights, model) if heads is not None else weights.heads
    for name, tensor in weights.head_state.items():
        if name.partition(".")[0] in kept:
            state[name] = tensor
    model.heads.load_state_dict(state)
    return model


def kept_heads(weights: Weights, model: CoFinetuneModel) -> list[str]:
    """The heads of a model that a checkpoint of this project has under the same name and shape."""
    state, kept = model.heads.state_dict(), []
    for task in model.heads:
        tensors = {n: t for n, t in weights.head_state.items() if n.partition(".")[0] == task}
        same = all(name in state and state[name].shape == t.shape for name, t in tensors.items())
        if tensors and same and weights.family == OWN:
            kept.append(task)
    return kept


# Of [model]: what may differ from what the weights were trained with.
LEAVES_INIT = ("frames", "size", "drop_path", "checkpointing")


def initialise(
    path: str | Path, heads: dict[str, Head], settings: dict, free: Iterable[str] = LEAVES_INIT
) -> tuple[CoFinetuneModel, list[str]]:
    """The model that a run begins with, and sentences that say what became of the checkpoint.

    `settings` is the recipe's [model]; of it count the keys in LEAVES_INIT, the checkpoint decides
    on the others.
    """
    weights = load(path, frames=settings.get("frames"))
    overrides = {key: value for key, value in settings.items() if key in LEAVES_INIT}
    model = build(weights, heads, **overrides)
    lines = [f"initialised from {path} ({weights.family})", *weights.report]
    native, config = weights.config, model.encoder.config
    if native.grid != config.grid and native.pos == "learned":
        grids = ["x".join(map(str, grid)) for grid in (native.grid, config.grid)]
        lines.append(f"positions resized from a grid of {grids[0]} to {grids[1]}")
    kept = kept_heads(weights, model)
    new = [task for task in heads if task not in kept]
    lost = [task for task in weights.heads if task not in kept]
    for words, tasks in (("head kept", kept), ("head left out", lost), ("new head", new)):
        if tasks:
            lines.append(f"{words}: {', '.join(tasks)}")
    wanted = dict(settings)
    wanted = SIZES.get(wanted.pop("arch", ""), {}) | wanted
    overruled = []
    for key, value in wanted.items():
        value = tuple(value) if isinstance(value, list) else value
        if getattr(config, key, value) != value:
            overruled.append(f"{key} = {getattr(config, key)} (not {value})")
    if overruled:
        lines.append(f"the checkpoint decides, not [model]: {', '.join(overruled)}")
    return model, lines


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def describe(weights: Weights) -> str:
    config = weights.config
    size = "x".join(str(side) for side in config.size)
    scale = f"(pixels in [0, 1] - {list(config.mean)}) / {list(config.std)}"
    rows = [
        ("family", weights.family),
        ("clips", f"{config.frames} frames of {size}, tubelet {config.tubelet}"),
        ("input", scale if config.mean else "each clip by its own mean and deviation"),
        ("encoder", f"width {config.width}, depth {config.depth}, heads {config.heads}"),
        ("", f"pool {config.pool}, pos {config.pos}, gelu {config.gelu}, eps {config.eps}"),
    ]
    for name, head in weights.heads.items():
        rows.append((f"head {name}", f"{head.kind}, {head.classes} classes"))
    for line in weights.report:
        rows.append(("report", line))
    return "\n".join(f"{name:12} {text}" for name, text in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prints what a checkpoint holds.")
    parser.add_argument("checkpoint", help="a file, or a folder of save_pretrained")
    parser.add_argument(
        "--frames", type=int, help="of the checkpoint's clips, where the file does not say it (UMT)"
    )
    options = parser.parse_args(arguments)
    try:
        print(describe(load(options.checkpoint, frames=options.frames)), flush=True)
    except BrokenPipeError:  # of `| head`
        sys.stdout = None
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
