"""Checkpoints of the field, and this project's own, as weights for model.py.

    weights = load("vivit-b-16x2-kinetics400/")           # a file, or a folder of save_pretrained
    model = build(weights)                                # with the head of the file
    model = build(weights, {"ava": Head("box", 80)})      # or with new ones
    load_encoder(model.encoder, weights)                  # into an encoder that exists already

Read are (`python cofinetune.py info CHECKPOINT` shows what a file holds):
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

To use this file elsewhere, copy it and the two named above in a folder `extras`, beside model.py;
they need torch and numpy.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from extras import families
from extras.families import Family, Parts
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
    routed: bool = False  # SpotTune's: a second encoder, and what chooses between them


OWN = "this project"
ROUTED = ("frozen", "policy", "choice")  # the parts that SpotTune adds to an encoder
LEAVES_INIT = ("frames", "size", "drop_path", "checkpointing")  # of [model]: may differ from a file
MAX_TOKENS, MAX_DEPTH = 1 << 18, 256  # 32 frames of 1024x1024 are a quarter of the former


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------


def load(path: str | Path, frames: int | None = None) -> Weights:
    """Reads a checkpoint of any family that the docstring of this file lists. `frames` of the clips
    that it was trained with, for a file of which neither tensors nor settings tell it (UMT);
    elsewhere not read. ValueError or FileNotFoundError for what is not understood completely."""
    path, content, settings = read(path)
    try:
        if "model_config" in content:
            return load_own(path, content)
        settings = settings or families.read_arguments(content)
        return convert(path, content, settings, frames)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: tensors that do not fit together: {one_line(error)}") from None


def convert(path: Path, content: dict, settings: dict, frames: int | None) -> Weights:
    """Another project's file as ours: its names, then the encoder, then the head."""
    facts, predictor = families.read_facts(path, settings), content.get("predictor")
    tensors, wrapping = families.unwrap(path, content)
    if path.suffix == ".npz":
        tensors, facts["num_attention_heads"] = families.from_flax(tensors)
    parts = families.rename(path, tensors)
    parts.report += wrapping
    mapped = len(parts.tensors)
    lay_out(parts, facts)
    family = families.recognise(parts, predictor if isinstance(predictor, dict) else {})
    config = encoder_config(parts, family, facts, frames)
    heads, head_state = take_head(parts, family, config)
    names = class_names(facts.get("id2label", {}))
    classes = {}
    for task, head in heads.items():
        if len(names) == head.classes and names[0] != "LABEL_0":
            classes[task] = names
    to = f"{len(parts.tensors)} of the encoder and {len(head_state)} of a head"
    report = [f"mapped: {mapped} tensors, to {to}"]
    for why, left in parts.left.items():
        report.append(f"left out: {listed(left, 3)}: {why}")
    report += parts.report
    weights = Weights(family.name, config, parts.tensors, heads, head_state, classes, report)
    return check_complete(path, weights, parts.unexpected)


def class_names(table: dict) -> list[str]:
    """Of id2label in the order of its numbers, which sorted JSON does not keep; [] without them."""
    if not all(str(key).isdecimal() for key in table):
        return []
    return [str(table[key]) for key in sorted(table, key=int)]


def load_own(path: Path, content: dict) -> Weights:
    """A checkpoint of cofinetune.py: nothing to convert, everything to check."""
    for key in ("model", "heads", "classes"):
        if not isinstance(content.get(key), dict):
            raise ValueError(f"{path}: a checkpoint of this project without {key}")
    config = make(path, ModelConfig, content["model_config"])
    heads = {name: make(path, Head, head) for name, head in content["heads"].items()}
    parts, other = {"encoder": {}, "heads": {}}, []
    averaged = content.get("ema")
    tensors = averaged or content["model"]
    for name, tensor in tensors.items():
        part, _, rest = str(name).partition(".")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {name} is no dense tensor")
        if part in parts:
            parts[part][rest] = tensor
        else:
            other.append(name)
    report = [f"mapped: all {len(tensors)} tensors, of step {content.get('step')}"]
    if averaged:
        report.append("its averaged weights are taken (ema)")
    head_state, encoder = parts["heads"], {}
    for name, tensor in parts["encoder"].items():
        if name.partition(".")[0] not in ROUTED:
            encoder[name] = tensor
    routed = len(encoder) < len(parts["encoder"])
    weights = Weights(OWN, config, encoder, heads, head_state, content["classes"], report, routed)
    return check_complete(path, weights, other)


def make(path: Path, kind: type, values: dict) -> ModelConfig | Head:
    """A ModelConfig or Head with the values of a file, each of the type of its default."""
    blank = Head("clip", 1) if kind is Head else ModelConfig()
    try:
        for name, value in values.items():
            if not has_type_of(value, getattr(blank, name)):
                raise TypeError(f"{name} is {value!r}")
        return kind(**values)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no {kind.__name__} for this: {one_line(error)}") from None


def has_type_of(value, default) -> bool:
    """Is a file's value of the type of the default? Of several, each is a number."""
    if isinstance(default, tuple):
        several = isinstance(value, (list, tuple))
        return several and all(isinstance(one, (int, float)) for one in value)
    return isinstance(value, (type(default), int)) and value != math.inf


def check_complete(path: Path, weights: Weights, unexpected: list[str]) -> Weights:
    """The weights, if they are exactly what their configuration asks for; else every difference."""
    tokens, depth = math.prod(weights.config.grid), weights.config.depth
    if tokens > MAX_TOKENS or depth > MAX_DEPTH:
        raise ValueError(f"{path}: {depth} blocks for {tokens} tokens cannot be right")
    with torch.device("meta"):  # allocates nothing of what a hostile file claims
        wanted = CoFinetuneModel(weights.config, weights.heads).state_dict()
    state = {f"encoder.{name}": tensor for name, tensor in weights.encoder.items()}
    state |= {f"heads.{name}": tensor for name, tensor in weights.head_state.items()}
    unexpected, misshapen, not_finite = [*unexpected], [], []
    for name, tensor in state.items():
        if name not in wanted:
            unexpected.append(name)
        elif tensor.shape != wanted[name].shape:
            misshapen.append(f"{name} {tuple(tensor.shape)} for {tuple(wanted[name].shape)}")
        elif not tensor.isfinite().all():
            not_finite.append(name)
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": unexpected,
        "of another shape": misshapen,
        "not finite": not_finite,
    }
    text = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
    if text:
        raise ValueError(f"{path}: read as {weights.family}: {text}")
    return weights


# ------------------------------------------------------------------------------------------------
# The encoder
# ------------------------------------------------------------------------------------------------


def encoder_config(parts: Parts, family: Family, facts: dict, stated: int | None) -> ModelConfig:
    """What the network computes. The tensors get the layout of VideoTransformer."""
    name, tensors = family.name, parts.tensors
    frames, size = native_clip(parts, family, facts, stated)
    width, hidden = len(tensors["patch.weight"]), len(tensors["blocks.0.fc1.weight"])
    mean, std = colours(parts, family, facts)
    eps = final_eps = facts.get("layer_norm_eps", family.eps)
    if name == "Hugging Face VideoMAE" and "fc_norm.weight" in tensors:
        final_eps = 1e-5  # that of torch
    mlp_ratio = hidden / width
    if int(width * mlp_ratio) != hidden:  # rounded down
        mlp_ratio = (hidden + 0.5) / width
    values = dict(
        frames=frames, size=size, tubelet=tuple(tensors["patch.weight"].shape[2:]), width=width,
        depth=join_tensors(parts), heads=attention_heads(parts, name, facts), mlp_ratio=mlp_ratio,
        cls="cls" in tensors, pool=choose_norm(parts, family, facts), eps=eps, final_eps=final_eps,
        gelu=families.GELU.get(facts.get("hidden_act"), family.gelu),
        pos=check_table(parts, family), pos_resize=family.pos_resize, mean=mean, std=std,
    )  # fmt: skip
    return make(parts.path, ModelConfig, values)


def colours(parts: Parts, family: Family, facts: dict) -> tuple[tuple, tuple]:
    mean, std = family.colours
    if family.name == "Hugging Face ViViT" and facts.get("offset", True):
        # What its processor is told contradicts how Scenic trained.
        parts.report.append("input is [-1, 1] as in training; Hugging Face's feeds [-3, 1]")
        return mean, std
    if family.name == "timm ViT" and "image_mean" not in facts:
        words = "input assumed to be [-1, 1]; of DeiT and MAE it is ImageNet's mean and std"
        parts.report.append(words)
    mean, std = tuple(facts.get("image_mean", mean)), tuple(facts.get("image_std", std))
    if not all(0 <= number <= 1 for number in mean + std):  # some count from 0 to 255
        raise ValueError(f"{parts.path}: image_mean {mean}, image_std {std}: expected 0 to 1")
    return mean, std


def attention_heads(parts: Parts, name: str, facts: dict) -> int:
    width = len(parts.tensors["patch.weight"])
    heads = facts.get("num_attention_heads")
    if name == "Hugging Face VideoMAE" and (width, heads) == (384, 16):
        parts.report.append("6 attention heads, as VideoMAE-S was trained; the config.json says 16")
        return 6
    known = families.V_JEPA_2_HEADS if name == "V-JEPA 2" else families.ATTENTION_HEADS
    if heads is None:
        heads = known.get(width)
    if heads is None:
        heads = max(width // 64, 1)
        parts.report.append(f"{heads} attention heads of 64 channels taken, the file does not say")
    return heads


def join_tensors(parts: Parts) -> int:
    """Query, key and value of each block into one, LayerScale into the layer before it; -> depth.
    VideoMAE has no key bias: softmax would not see one, so zero is exact."""
    tensors = parts.tensors
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    for block in [f"blocks.{i}." for i in range(depth)]:
        if f"{block}q.bias" in tensors:
            tensors.setdefault(f"{block}k.bias", torch.zeros_like(tensors[f"{block}q.bias"]))
        for kind in ("weight", "bias"):
            names = [f"{block}{part}.{kind}" for part in "qkv"]
            if all(name in tensors for name in names):
                rows = [tensors.pop(name) for name in names]
                if not rows[0].shape == rows[1].shape == rows[2].shape:
                    raise ValueError(f"{parts.path}: {block}q, k and v are of different shapes")
                tensors[f"{block}qkv.{kind}"] = torch.cat(rows)
        for scale, layer in (("ls1", "proj"), ("ls2", "fc2")):
            factor = tensors.pop(block + scale, None)  # (D,)
            if factor is not None:
                for kind, shape in (("weight", (-1, 1)), ("bias", (-1,))):
                    name = f"{block}{layer}.{kind}"
                    tensors[name] = tensors[name] * factor.view(shape)
    return depth


def inflate_image(tensors: dict[str, Tensor], steps: int) -> None:
    """Makes an image transformer one for clips: the filter sees the second of a tubelet's two
    frames ("central" in ViViT), the positions repeat in time. A still clip then gives the image's
    features, exactly if there is no class token or one step in time; with more steps a class token,
    as a key, is one among that many times more patches."""
    image = tensors["patch.weight"][:, :, None]  # (D, 3, 1, p, p)
    tensors["patch.weight"] = torch.cat([torch.zeros_like(image), image], 2)
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
    parts: Parts, family: Family, facts: dict, stated: int | None
) -> tuple[int, tuple[int, int]]:
    """Frames and size of the clips that the positions are for; an image filter is inflated."""
    tensors, patch = parts.tensors, parts.tensors["patch.weight"]
    video = patch.ndim == 5
    frames = facts.get("num_frames") or family.frames or stated
    if not frames:
        raise ValueError(
            f"{parts.path}: read as {family.name}: nothing in the file says of how many frames its"
            " clips are. Say it: frames=8 in load(), --frames 8 on the command line, frames = 8 in"
            " the recipe's [model] (the published ones have 8)"
        )
    tubelet = patch.shape[2] if video else 2  # of an image: as inflate_image makes it
    steps = max(frames // tubelet, 1)
    rows = tensors["pos"].shape[1] if "pos" in tensors else 0
    if rows * steps > MAX_TOKENS * 16:
        raise ValueError(f"{parts.path}: {rows} positions for {frames} frames cannot be right")
    rows_of_step = rows // steps if video else rows
    side = math.isqrt(rows_of_step) * patch.shape[-1]
    size = facts.get("image_size", side or family.side)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if not video:
        inflate_image(tensors, steps)
        parts.report.append("filter of an image inflated to 2 frames, positions repeated")
    elif "num_frames" not in facts or "image_size" not in facts and not rows:
        clips = f"{frames} frames of {'x'.join(map(str, size))} taken"
        parts.report.append(f"the file does not say for which clips: {clips}")
    return frames, size


def choose_norm(parts: Parts, family: Family, facts: dict) -> str:
    """How clips are pooled; the final norm comes under one name, whichever it is in the file."""
    tensors, width = parts.tensors, len(parts.tensors["patch.weight"])
    if "fc_norm.weight" in tensors:
        for kind in ("weight", "bias"):
            if f"norm.{kind}" in tensors:
                parts.unexpected.append(parts.theirs[f"norm.{kind}"])
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


# ------------------------------------------------------------------------------------------------
# The head
# ------------------------------------------------------------------------------------------------


def take_head(parts: Parts, family: Family, config: ModelConfig) -> tuple[dict, dict]:
    """({name: Head}, its tensors), both empty if the file has none, or one that reads something
    that the network here has not."""
    weight, stem = parts.tensors.get("head.weight"), parts.theirs.get("head.weight", "")
    if weight is None:
        return {}, {}
    detection = stem.startswith("roi_head")  # mmaction2's
    per_token = config.pool == "norm-mean"
    box = detection or per_token and family.name in ("VideoMAE", "UMT")  # their AVA models
    reason = ""
    if any(families.HEAD_BEHIND in why for why in parts.left):
        reason = "it reads what is left out"
    elif weight.ndim == 2 and weight.shape[1] == 2 * config.width:
        reason = "it reads the class token and the mean, one after the other"
    elif family.pos == "sincos" and per_token and not box:
        reason = "it reads the first token alone"
    kinds = [kind for kind in ("weight", "bias") if f"head.{kind}" in parts.tensors]
    if reason:
        for kind in kinds:
            parts.leave(f"head.{kind}", reason)
        return {}, {}
    task, rows = "box" if box else "clip", {}
    for kind in kinds:
        rows[f"{task}.fc.{kind}"] = parts.tensors.pop(f"head.{kind}")
    if detection and len(weight) != 80:  # 80: AVA's classes alone
        rows = {name: tensor[1:] for name, tensor in rows.items()}
        parts.report.append("row 0 of the box head is mmdetection's background: dropped")
    values = dict(kind=task, classes=len(rows[f"{task}.fc.weight"]), roi_size=8 if detection else 7)
    return {task: make(parts.path, Head, values)}, rows


# ------------------------------------------------------------------------------------------------
# Into a model
# ------------------------------------------------------------------------------------------------


def load_encoder(encoder: VideoTransformer, weights: Weights) -> None:
    """Loads the weights into an encoder that exists. If its native clips differ in size or frames,
    learned positions are resized to them, once. ValueError if it computes something else."""
    if weights.routed:
        raise ValueError(
            "a run of SpotTune, which chooses between two encoders for each clip, is no encoder "
            "to begin with; expected a run of another method"
        )
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
    kept = weights.heads if heads is None else kept_heads(weights, model)
    state = model.heads.state_dict()
    for name, tensor in weights.head_state.items():
        if name.partition(".")[0] in kept:
            state[name] = tensor
    model.heads.load_state_dict(state)
    return model


def kept_heads(weights: Weights, model: CoFinetuneModel) -> list[str]:
    """The heads of a model that a checkpoint of this project has by name, kind and shape."""
    if weights.family != OWN:
        return []
    kept = []
    for task, head in model.heads.items():
        if task in weights.heads and weights.heads[task].kind != head.config.kind:
            continue  # of the same shape, but learned otherwise
        ours = {f"{task}.{name}": tensor.shape for name, tensor in head.state_dict().items()}
        theirs = {}
        for name, tensor in weights.head_state.items():
            if name.startswith(f"{task}."):
                theirs[name] = tensor.shape
        if theirs == ours:
            kept.append(task)
    return kept


def initialise(
    path: str | Path,
    heads: dict[str, Head],
    settings: dict,
    classes: dict[str, list[str]] | None = None,
) -> tuple[CoFinetuneModel, list[str]]:
    """The model that a run begins with, and sentences that say what became of the checkpoint.

    `settings` is the recipe's [model]; of it count the keys in LEAVES_INIT, the checkpoint decides
    on the others. A head whose `classes` are others now, or in another order, begins anew.
    """
    weights = load(path, frames=settings.get("frames"))
    for name in list(weights.head_state):
        task = name.partition(".")[0]
        theirs = weights.classes.get(task)
        if theirs and classes and classes.get(task, theirs) != theirs:
            del weights.head_state[name]
    overrides = {key: value for key, value in settings.items() if key in LEAVES_INIT}
    model = build(weights, heads, **overrides)
    lines = [f"initialised from {path} ({weights.family})", *weights.report]
    native, config = weights.config, model.encoder.config
    if native.grid != config.grid and native.pos == "learned":
        before, now = "x".join(map(str, native.grid)), "x".join(map(str, config.grid))
        lines.append(f"positions resized from a grid of {before} to {now}")
    kept = kept_heads(weights, model)
    lost = [task for task in weights.heads if task not in kept]
    new = [task for task in heads if task not in kept]
    for words, tasks in (("head kept", kept), ("head left out", lost), ("new head", new)):
        if tasks:
            lines.append(f"{words}: {', '.join(tasks)}")
    wanted = SIZES.get(settings.get("arch", ""), {}) | settings
    overruled = []
    for key, value in wanted.items():
        value = tuple(value) if isinstance(value, list) else value
        if getattr(config, key, value) != value:
            overruled.append(f"{key} = {getattr(config, key)} (not {value})")
    if overruled:
        lines.append(f"the checkpoint decides, not [model]: {', '.join(overruled)}")
    return model, lines
