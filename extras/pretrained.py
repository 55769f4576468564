"""Checkpoints of the field, and this project's own, as weights for model.py.

    found = load("vivit-b-16x2-kinetics400/")             # a file, or a folder of save_pretrained
    model = build(found)                                  # with the head of the file
    model = build(found, {"ava": Head("box", 80)})        # or with new ones
    load_encoder(model.encoder, found)                    # into an encoder that exists already

Read are:
    Hugging Face   ViViT, VideoMAE, ViT                              .safetensors, .bin, folder
    VideoMAE       pretrained, finetuned, Action-Detection           .pth
    mmaction2      VideoMAE: clip classification, AVA detection      .pth
    timm           plain vision transformers                         .pth, .safetensors, folder
    Google         ViT of vision_transformer and of big_vision       .npz
    Scenic         ViViT (unfactorised), its flax parameters exported by
                   np.savez("vivit.npz", **flax.traverse_util.flatten_dict(params, sep="/"))
    this project   what cofinetune.py saves                          .pt

Loading is strict: a tensor is mapped, or left out for a reason that LEFT_OUT names, or an error.
Nothing in a file is executed (weights_only, allow_pickle=False), no memory is taken because a file
asks for it. Whatever is wrong with a file is a ValueError of one sentence.

`python pretrained.py CHECKPOINT` prints what a file holds. To use this file alone, copy it with
model.py; it needs torch and numpy.
"""

import argparse
import dataclasses
import json
import math
import pickle
import re
import struct
import sys
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import (
    CoFinetuneModel,
    Head,
    ModelConfig,
    VideoTransformer,
    resize_positions,
    sincos_table,
)


@dataclass
class Pretrained:
    """A converted checkpoint. `encoder` fits VideoTransformer(config), `head_state` the heads of
    CoFinetuneModel(config, heads). `mean` and `std` are what the weights were trained with, for
    pixels in [0, 1] (empty: each clip by its own). `report`: what was mapped, what was left out and
    why, and what to know about the weights."""

    family: str
    config: ModelConfig
    encoder: dict[str, Tensor]
    heads: dict[str, Head]
    head_state: dict[str, Tensor]
    mean: list[float]
    std: list[float]
    classes: dict[str, list[str]]  # names of a head's classes, where the file has them
    report: list[str]


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

MAX_UNPACKED = 20  # times the file: weights hardly compress, what grows more than this is a bomb
MAX_TOKENS, MAX_DEPTH = 1 << 18, 256  # 32 frames of 1024x1024 are a quarter of the former
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What damaged files make torch.load and np.load raise (found by flipping and cutting their bytes).
DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
    MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """8 bytes of header length, a JSON header, and data that the tensors tile without gap or
    overlap (github.com/huggingface/safetensors, "Format")."""
    spans, tensors, end = [], {}, 0
    with open(path, "rb") as file:
        length, room = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
        if not 0 < length <= min(room, 100 << 20):
            raise ValueError(f"{path}: a header of {length} bytes in a file of {room + 8}")
        header, room = read_json(path, file.read(length)), room - length
        header.pop("__metadata__", None)
        for name, entry in header.items():
            try:
                dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
                start, stop = entry["data_offsets"]
                numbers = [start, stop, *shape]
            except (LookupError, TypeError, ValueError):
                raise ValueError(f"{path}: {name!r} lacks a dtype, shape and offsets") from None
            if len(numbers) > 8 or any(type(n) is not int or not 0 <= n <= room for n in numbers):
                raise ValueError(f"{path}: {name!r} lies outside the {room} bytes of data")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path}: {name!r} of shape {shape} is given {stop - start} bytes")
            spans.append((start, stop, name, dtype, shape))
        for start, stop, name, dtype, shape in sorted(spans, key=lambda span: span[:3]):
            if start != end:
                raise ValueError(f"{path}: {name!r} starts at byte {start}, expected {end}")
            raw = bytearray(file.read(stop - start) or dtype.itemsize)  # frombuffer takes no empty
            tensors[name] = torch.frombuffer(raw, dtype=dtype)[: math.prod(shape)].view(shape)
            end = stop
    if end != room:
        raise ValueError(f"{path}: its tensors end at byte {end} of {room} bytes of data")
    return tensors


def read_npz(path: Path) -> dict[str, Tensor]:
    """Every array of an .npz file, in float32."""
    try:
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items()}
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable .npz file: {one_line(error)}") from None


def read_torch(path: Path) -> dict:
    """The dict in a torch.save file: tensors, plain values, and argparse.Namespace, in which
    VideoMAE keeps its arguments (it holds attributes and runs nothing)."""
    try:
        if zipfile.is_zipfile(path):
            check_unpacked(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, expected a dict")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        found = f"holds {found[1]}" if found else "is not a torch.save file"
        raise ValueError(f"{path}: refused: it {found}; only weights are read") from None
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable torch.save file: {one_line(error)}") from None
    return content


def check_unpacked(path: Path) -> None:
    """Raises if the directory of a zip (.npz, torch.save) promises more than the file can hold."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_UNPACKED * path.stat().st_size:
        raise ValueError(f"{path.stat().st_size} bytes would unpack to {unpacked}")


def read_json(path: Path, text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: JSON of a {type(value).__name__}, expected an object")
    return value


def read(path: Path) -> tuple[Path, dict, dict]:
    """(file, content, settings): settings are the .json files of save_pretrained beside it."""
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    if not path.is_file():
        kind = f"holds neither {' nor '.join(FOLDER_FILES)}" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path}: {kind}")
    settings = {}
    if path.name in FOLDER_FILES:
        for beside in (path.with_name("preprocessor_config.json"), path.with_name("config.json")):
            settings |= read_json(beside, beside.read_bytes()) if beside.is_file() else {}
    reader = {".safetensors": read_safetensors, ".npz": read_npz}.get(path.suffix, read_torch)
    return path, reader(path), settings


def one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def listed(names: list, limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    shown = (n if str(n).isprintable() else ascii(n) for n in list(names)[:limit])
    return ", ".join(map(str, shown)) + more


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------

# Our name: what the families call it. Flax names have "." for "/" here (from_flax).
OUTSIDE = {
    "cls": r"cls_token|embeddings\.cls_token|cls",
    "pos": r"pos_embed|embeddings\.position_embeddings|(Transformer.posembed_input.)?pos_embedding",
    "patch": r"patch_embed\.proj(ection)?|embeddings\.patch_embeddings\.projection|embedding",
    "norm": r"norm|layernorm|Transformer\.encoder_norm",
    "fc_norm": r"fc_norm",
    "head": r"head|classifier|output_projection|cls_head\.fc_cls|roi_head\.bbox_head\.fc_cls",
}
BLOCK = r"(?:blocks\.|layers\.|encoder\.layer\.|Transformer\.encoderblock_)([0-9]{1,4})\.(.+)"
ATTENTION = r"(?:attention\.(?:attention\.)?|attn\.|MultiHeadDotProductAttention_[01]\.)"
INSIDE = {
    "norm1": r"norm1|layernorm_before|LayerNorm_0",
    "norm2": r"norm2|layernorm_after|LayerNorm_[12]",
    "qkv": rf"{ATTENTION}qkv",
    "q": rf"{ATTENTION}(q|query|q_proj)",
    "k": rf"{ATTENTION}(key|k_proj)",
    "v": rf"{ATTENTION}(v|value|v_proj)",
    "proj": rf"{ATTENTION}(proj|o_proj|output\.dense|out)",
    "fc1": r"mlp\.fc1|intermediate\.dense|mlp\.layers\.0\.0|MlpBlock_[03]\.Dense_0",
    "fc2": r"mlp\.fc2|output\.dense|mlp\.layers\.1|MlpBlock_[03]\.Dense_1",
}
PREFIX = r"^((module|backbone|vivit|videomae|vit)\.)*(encoder\.(?=blocks|patch|norm))?"
LEFT_OUT = {
    r"decoder\.|encoder_to_decoder\.|(embeddings\.)?mask_token": "decoder of masked pretraining",
    r"pooler\.": "a layer for features that no classifier here reads",
    r"pre_logits\.": "the representation layer of pretraining, with the head behind it",
    r"MAPHead_0\.|attn_pool\.": "attention pooling, with the head behind it",
}


def our_name(name: str) -> str | None:
    """What a tensor is called here, qkv still in parts; None if no family has such a tensor."""
    stem, _, kind = re.sub(r"\.([qv])_bias$", r".\1.bias", name).rpartition(".")
    block = re.fullmatch(BLOCK, stem)
    for ours, theirs in (INSIDE if block else OUTSIDE).items():
        if ours in ("cls", "pos") and re.fullmatch(theirs, name):
            return ours
        if kind in ("weight", "bias") and re.fullmatch(theirs, block[2] if block else stem):
            return f"blocks.{int(block[1])}.{ours}.{kind}" if block else f"{ours}.{kind}"
    return None


def from_flax(path: Path, arrays: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """(tensors laid out as torch does, attention heads). Flax kernels are (in, out); attention
    splits its side by head: (D, heads, d) going in, (heads, d, D) coming out."""
    split, tensors, heads = {}, {}, 0
    for name, array in arrays.items():
        name = re.sub(r"^(params|opt/target|optimizer/target)/", "", name).replace("/", ".")
        stacked = name.removeprefix("Transformer.encoderblock.")  # big_vision: blocks in one array
        if stacked != name and array.ndim:
            split |= {f"Transformer.encoderblock_{i}.{stacked}": a for i, a in enumerate(array)}
        else:
            split[name] = array
    for name, array in split.items():
        stem, _, kind = name.rpartition(".")
        try:
            if re.search(r"\.(query|key|value)$", stem):
                heads, array = array.shape[-2], array.flatten(-2)
            if kind == "kernel" and stem.endswith(".out"):
                array = array.flatten(0, -2)
            if kind == "kernel":  # also the filter: ([t,] h, w, 3, D) -> (D, 3, [t,] h, w)
                array = array.permute(-1, -2, *range(array.ndim - 2))
        except (IndexError, RuntimeError):
            raise ValueError(f"{path}: {name} of shape {tuple(array.shape)} is not flax") from None
        kind = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
        tensors[f"{stem}.{kind}".lstrip(".")] = array
    return tensors, heads


# ------------------------------------------------------------------------------------------------
# What the tensors do not show
# ------------------------------------------------------------------------------------------------

OWN = "this project"
LINEAR = "fc"  # model.py's name for the linear layer of a head
HALF = [0.5] * 3, [0.5] * 3  # pixels in [-1, 1], as Google trains
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FAMILIES = {  # mean and std, frames, fields of ModelConfig: unless a config.json says otherwise
    "Hugging Face ViViT": (HALF, 32, dict(gelu="tanh")),
    "Hugging Face VideoMAE": (IMAGENET, 16, dict(gelu="none", eps=1e-12)),
    "Hugging Face ViT": (HALF, 32, dict(gelu="none", eps=1e-12)),
    "VideoMAE": (IMAGENET, 16, dict(gelu="none")),
    "mmaction2 VideoMAE": (IMAGENET, 16, dict(gelu="none")),
    "timm ViT": (HALF, 32, dict(gelu="none")),
    "Google ViT": (HALF, 32, dict(gelu="tanh", pos_resize="bilinear-corners")),
    "Scenic ViViT": (HALF, 32, dict(gelu="tanh", pos_resize="bilinear-corners")),
}
ATTENTION_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # other widths: 64 channels per head
GELU = {"gelu": "none", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
TRIPLE = ("three numbers from 0 to 1", lambda v: len(v) == 3 and all(0 <= n <= 1 for n in v))
SETTINGS = {  # what is believed of config.json, preprocessor_config.json and VideoMAE's arguments
    "num_attention_heads": ("1 to 256", lambda v: type(v) is int and 1 <= v <= 256),
    "num_frames": ("1 to 1024", lambda v: type(v) is int and 1 <= v <= 1024),
    "image_size": ("1 to 4096, or two such", lambda v: all(1 <= n <= 4096 for n in pair(v))),
    "hidden_act": (f"one of {', '.join(GELU)}", lambda v: v in GELU),
    "layer_norm_eps": ("a small number", lambda v: 0 < v < 0.1),
    "id2label": ("a table of names", lambda v: all(type(name) is str for name in v.values())),
    "image_mean": TRIPLE,
    "image_std": TRIPLE,
}


def pair(value) -> tuple[int, int]:
    height, width = value if isinstance(value, (list, tuple)) else (value, value)
    return int(height), int(width)


def believed(path: Path, settings: dict) -> dict:
    """The entries of SETTINGS that are there; ValueError for one that makes no sense."""
    kept = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    for key, value in kept.items():
        expected, makes_sense = SETTINGS[key]
        try:
            fine = makes_sense(value)
        except (AttributeError, OverflowError, TypeError, ValueError):
            fine = False
        if not fine:
            raise ValueError(f"{path}: {key} is {str(value)[:60]!r}, expected {expected}")
    return kept


def family_of(patch: str, video: bool, cls: bool) -> str:
    """The family, from its name for the patch embedding."""
    if patch.startswith("embeddings"):
        return f"Hugging Face {'ViT' if not video else 'ViViT' if cls else 'VideoMAE'}"
    if patch.startswith("embedding"):
        return "Scenic ViViT" if video else "Google ViT"
    if patch.startswith("patch_embed.projection"):
        return "mmaction2 VideoMAE"
    return "VideoMAE" if video else "timm ViT"


def made(path: Path, blank: ModelConfig | Head, values: dict) -> ModelConfig | Head:
    """A ModelConfig or Head with the values of a file, each of the type it has in `blank`."""
    try:
        for name, value in values.items():
            if not isinstance(value, (type(getattr(blank, name)), int)) or value == math.inf:
                raise TypeError(f"{name} is {value!r}")
        return dataclasses.replace(blank, **values)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no {type(blank).__name__} for this: {one_line(error)}") from None


def finish(path: Path, found: Pretrained, unexpected: list[str]) -> Pretrained:
    """The checkpoint, if it is exactly what its configuration asks for; else every difference."""
    tokens, depth = math.prod(found.config.grid), found.config.depth
    if tokens > MAX_TOKENS or not 0 < depth <= MAX_DEPTH:
        raise ValueError(f"{path}: {depth} blocks for {tokens} tokens cannot be right")
    state = {f"encoder.{name}": tensor for name, tensor in found.encoder.items()}
    state |= {f"heads.{name}": tensor for name, tensor in found.head_state.items()}
    try:
        with torch.device("meta"):  # allocates nothing of what a hostile file claims
            model = CoFinetuneModel(found.config, found.heads)
    except RuntimeError as error:
        raise ValueError(f"{path}: no model has these sizes: {one_line(error)}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shared = {name: state[name] for name in wanted if name in state}
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": unexpected + [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} for {wanted[name]}"
            for name, tensor in shared.items()
            if tensor.shape != wanted[name]
        ],
        "not finite": [name for name, tensor in shared.items() if not tensor.isfinite().all()],
    }
    text = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
    if text:
        raise ValueError(f"{path}: read as {found.family}: {text}")
    return found


# ------------------------------------------------------------------------------------------------
# Conversion
# ------------------------------------------------------------------------------------------------


def check_tensors(path: Path, tensors: dict) -> None:
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path}: no tensors by name where they are expected")
    strange = [n for n, t in tensors.items() if getattr(t, "layout", None) != torch.strided]
    if strange:
        raise ValueError(f"{path}: expected nothing but dense tensors, found {listed(strange)}")
    claimed, room = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if claimed > MAX_UNPACKED * room:  # a tensor of one element can claim any shape
        raise ValueError(f"{path}: its tensors claim {claimed} bytes, the file has {room}")


def fuse_qkv(state: dict[str, Tensor], width: int, depth: int) -> None:
    """Joins query, key and value of each block, in this order. VideoMAE has no key bias: softmax
    would not see one, so zero is exact."""
    for i in range(depth):
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            q, k, v = names = [f"blocks.{i}.{part}.{kind}" for part in "qkv"]
            if kind == "bias" and q in state and v in state:
                state.setdefault(k, torch.zeros(shape))
            if all(name in state and state[name].shape == shape for name in names):
                state[f"blocks.{i}.qkv.{kind}"] = torch.cat([state.pop(name) for name in names])


def inflate_image(state: dict[str, Tensor], steps: int, how: str) -> None:
    """Makes an image transformer one for clips: the filter sees the second of a tubelet's two
    frames ("central", as ViViT) or their mean ("average"), the positions repeat in time. A still
    clip then gives the image's features, exactly if there is no class token or one step in time;
    with more steps a class token, as a key, is one among that many times more patches."""
    image = state["patch.weight"][:, :, None]  # (D, 3, 1, p, p)
    frames = [image * 0, image] if how == "central" else [image / 2, image / 2]
    state["patch.weight"] = torch.cat(frames, 2)
    if "pos" in state and state["pos"].ndim == 3:
        rows = state["pos"].shape[1]
        first, table = state["pos"].split([rows - math.isqrt(rows) ** 2, math.isqrt(rows) ** 2], 1)
        if "cls" in state and not first.shape[1]:  # big_vision since 2022: no position for cls
            first = torch.zeros_like(table[:, :1])
        state["pos"] = torch.cat([first, table.repeat(1, steps, 1)], 1)  # (1, [1 +] t*h*w, D)


def convert(path: Path, tensors: dict, settings: dict, inflate: str) -> Pretrained:
    """Another project's tensors as ours. `settings` is its config.json, or what stands for that."""
    check_tensors(path, tensors)
    facts, report, attention = believed(path, settings), [], 0
    if path.suffix == ".npz":
        tensors, attention = from_flax(path, tensors)
    state, theirs, left, unexpected = {}, {}, {}, []
    for name, tensor in tensors.items():
        plain = re.sub(PREFIX, "", str(name))
        ours, why = our_name(plain), [w for start, w in LEFT_OUT.items() if re.match(start, plain)]
        if why:
            left.setdefault(why[0], []).append(name)
        elif ours is None or ours in state or not tensor.is_floating_point():
            unexpected.append(name)
        else:
            state[ours], theirs[ours] = tensor.float(), plain
    patch, fc1 = (state.get(n, torch.empty(0)) for n in ("patch.weight", "blocks.0.fc1.weight"))
    if patch.ndim not in (4, 5) or fc1.ndim != 2 or not patch.numel():
        raise ValueError(f"{path}: no transformer that is known in {listed(tensors, 4)}")
    video, width = patch.ndim == 5, len(patch)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    family = family_of(theirs["patch.weight"], video, "cls" in state)
    (mean, std), usual_frames, usual = FAMILIES[family]

    # What goes in.
    if family == "Hugging Face ViViT":  # what its processor is told contradicts how Scenic trained
        report.append("input is [-1, 1] as in training; Hugging Face's processor feeds [-3, 1]")
    else:
        mean, std = list(facts.get("image_mean", mean)), list(facts.get("image_std", std))
    if family == "timm ViT" and "image_mean" not in facts:
        report.append("input assumed to be [-1, 1]; of DeiT and MAE it is ImageNet's mean and std")
    frames = facts.get("num_frames", usual_frames)
    steps = frames // (patch.shape[2] if video else 2)
    rows = state["pos"].shape[1] if "pos" in state and state["pos"].ndim == 3 else 0
    side = math.isqrt(rows // max(steps if video else 1, 1)) * patch.shape[-1]
    size = pair(facts.get("image_size", side or 224))
    if not video:
        inflate_image(state, steps, inflate)
        report.append(f"filter of an image inflated to 2 frames ({inflate}), positions repeated")
    elif "num_frames" not in facts or "image_size" not in facts:
        report.append("the file does not say for which clips: the family's usual ones assumed")

    # How it is computed.
    attention = facts.get("num_attention_heads", attention)
    attention = attention or ATTENTION_HEADS.get(width, max(width // 64, 1))
    if family == "Hugging Face VideoMAE" and (width, attention) == (384, 16):
        attention = 6
        report.append("6 attention heads, as VideoMAE-S was trained; the config.json says 16")
    fuse_qkv(state, width, depth)
    eps = final_eps = facts.get("layer_norm_eps", usual.get("eps", 1e-6))
    pool = "cls" if "cls" in state else "norm-mean"
    if "fc_norm.weight" in state:
        pool, final_eps = "mean-norm", 1e-5 if family == "Hugging Face VideoMAE" else eps
        unexpected += [theirs[name] for name in theirs if name.startswith("norm.")]
        state |= {n[3:]: state.pop(n) for n in list(state) if n.startswith("fc_norm.")}
        report.append("norm is fc_norm, trained on the mean of tokens; box heads see it per token")
    elif "norm.weight" not in state and "VideoMAE" in family:
        pool = "mean-norm"
        state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        report.append("no final norm in the file: a new one")
    fixed = "VideoMAE" in family
    if fixed and rows:
        table = sincos_table(rows, width)[None]
        fixed = state["pos"].shape == table.shape and torch.allclose(state["pos"], table, atol=1e-5)
        if fixed:
            left["the fixed sin-cos table, computed here"] = [theirs["pos"]]
            del state["pos"]

    # The head.
    heads, head_state, classes = {}, {}, {}
    weight, stem = state.get("head.weight"), theirs.get("head.weight", "")
    box = stem.startswith("roi_head") or (family == "VideoMAE" and pool == "norm-mean")
    reason = "it reads what is left out" if any("head behind" in why for why in left) else ""
    if fixed and pool == "norm-mean" and not box:
        reason = "it reads the first token alone"
    if weight is not None and reason:
        left[reason] = [stem]
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    elif weight is not None:
        name = "box" if box else "clip"
        rows = {n: state.pop(f"head.{n}") for n in ("weight", "bias") if f"head.{n}" in state}
        if stem.startswith("roi_head") and weight.shape[:1] != (80,):  # 80: AVA's classes alone
            rows = {n: tensor[1:] for n, tensor in rows.items()}
            report.append("row 0 of the box head is mmdetection's background: dropped")
        head = {"kind": name, "classes": rows["weight"].shape[:1].numel()}
        head["roi_size"] = 8 if stem.startswith("roi_head") else 7
        heads[name] = made(path, Head("clip", 1), head)
        head_state = {f"{name}.{LINEAR}.{n}": tensor for n, tensor in rows.items()}
        names = list(facts.get("id2label", {}).values())
        if len(names) == heads[name].classes and names[0] != "LABEL_0":
            classes[name] = names

    config = dict(
        frames=frames, size=size, tubelet=tuple(state["patch.weight"].shape[2:]), width=width,
        depth=depth, heads=attention, mlp_ratio=len(fc1) / width, cls="cls" in state, pool=pool,
        gelu=GELU[facts["hidden_act"]] if "hidden_act" in facts else usual["gelu"],
        eps=eps, final_eps=final_eps, pos="sincos" if fixed else "learned",
        pos_resize=usual.get("pos_resize", "bicubic"),
    )  # fmt: skip
    config = made(path, ModelConfig(), config)
    mapped = f"mapped: {len(theirs)} tensors, to {len(state)} of the encoder"
    mapped += f" and {len(head_state)} of a head" if heads else ""
    report[:0] = [mapped, *(f"left out: {listed(names, 3)}: {why}" for why, names in left.items())]
    found = Pretrained(family, config, state, heads, head_state, mean, std, classes, report)
    return finish(path, found, unexpected)


def own(path: Path, content: dict) -> Pretrained:
    """A checkpoint of cofinetune.py: nothing to convert, everything to check."""
    kinds = dict(model=dict, model_config=dict, heads=dict, classes=dict, mean=list, std=list)
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise ValueError(f"{path}: a checkpoint of this project without {', '.join(wrong)}")
    state, mean, std = content["model"], content["mean"], content["std"]
    check_tensors(path, state)
    believed(path, {"image_mean": mean or None, "image_std": std or None})
    config = made(path, ModelConfig(), content["model_config"])
    heads = {name: made(path, Head("clip", 1), head) for name, head in content["heads"].items()}
    parts = {"encoder": {}, "heads": {}, "": {}}
    for name, tensor in state.items():
        part, _, rest = str(name).partition(".")
        parts[part if part in parts else ""][rest if part in parts else name] = tensor
    report = [f"mapped: all {len(state)} tensors, of step {content.get('step')}"]
    encoder, head_state, other = parts.values()
    found = Pretrained(
        OWN, config, encoder, heads, head_state, mean, std, content["classes"], report
    )
    return finish(path, found, list(other))


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------


def load(path: str | Path, inflate: str = "central") -> Pretrained:
    """Reads a checkpoint of any family that the docstring of this file lists. `inflate`, "central"
    or "average", is how an image filter becomes one for clips. ValueError or FileNotFoundError for
    whatever is not understood completely."""
    if inflate not in ("central", "average"):
        raise ValueError(f"inflate={inflate!r}, expected 'central' or 'average'")
    path, content, settings = read(Path(path))
    if "model_config" in content:
        return own(path, content)
    if isinstance(content.get("args"), argparse.Namespace):
        args = vars(content["args"])
        settings = {"num_frames": args.get("num_frames"), "image_size": args.get("input_size")}
    if isinstance(settings.get("pretrained_cfg"), dict):  # timm
        timm = settings["pretrained_cfg"]
        settings = {"image_mean": timm.get("mean"), "image_std": timm.get("std")}
    inner = [content[key] for key in ("model", "module", "state_dict") if key in content]
    return convert(path, inner[0] if inner else content, settings, inflate)


def load_encoder(encoder: VideoTransformer, found: Pretrained) -> None:
    """Loads the weights into an encoder that exists. If its native clips differ in size or frames,
    learned positions are resized to them, once. ValueError if it computes something else."""
    theirs, ours, state = found.config, encoder.config, dict(found.encoder)
    alike = ["tubelet", "width", "depth", "heads", "mlp_ratio", "gelu"]
    alike += ["pos"] if "sincos" in (ours.pos, theirs.pos) else []
    alike += ["grid"] if ours.pos == "sincos" else []  # a table made for another grid is another
    alike += ["cls"] if ours.cls else []  # a class token that the encoder lacks is dropped
    wrong = [
        f"{name} {getattr(ours, name)} for {getattr(theirs, name)}"
        for name in alike
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if wrong:
        raise ValueError(f"{found.family} weights in an encoder with {', '.join(wrong)}")
    if theirs.cls and not ours.cls:
        del state["cls"]
        state["pos"] = state["pos"][:, 1:]
    if theirs.grid != ours.grid:
        state["pos"] = resize_positions(state["pos"], theirs.grid, ours.grid, ours.pos_resize)
    encoder.load_state_dict(state)


def build(
    found: Pretrained, tasks: dict[str, Head] | None = None, /, **overrides
) -> CoFinetuneModel:
    """A model with these weights and the heads of the file, or with new ones for `tasks`; there,
    one of the same name and shape in a checkpoint of this project keeps its weights. `overrides`
    are fields of ModelConfig: drop_path, checkpointing, frames, size, pool."""
    config = dataclasses.replace(found.config, **overrides)
    model = CoFinetuneModel(config, found.heads if tasks is None else tasks)
    load_encoder(model.encoder, found)
    state = model.heads.state_dict()
    for name, tensor in found.head_state.items() if tasks is None or found.family == OWN else ():
        if name in state and state[name].shape == tensor.shape:
            state[name] = tensor
    model.heads.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def describe(found: Pretrained) -> str:
    config, heads = found.config, found.heads.items()
    size = "x".join(str(side) for side in config.size)
    rows = [
        ("family", found.family),
        ("clips", f"{config.frames} frames of {size}, tubelet {config.tubelet}"),
        ("input", f"(pixels in [0, 1] - {found.mean}) / {found.std}" if found.mean else "by clip"),
        ("encoder", ", ".join(f"{n} {getattr(config, n)}" for n in ("width", "depth", "heads"))),
        ("", ", ".join(f"{n} {getattr(config, n)}" for n in ("pool", "pos", "gelu", "eps"))),
        *((f"head {name}", f"{head.kind}, {head.classes} classes") for name, head in heads),
        *(("report", line) for line in found.report),
    ]
    return "\n".join(f"{name:12} {text}" for name, text in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prints what a checkpoint holds.")
    parser.add_argument("checkpoint", help="a file, or a folder of save_pretrained")
    try:
        print(describe(load(parser.parse_args(arguments).checkpoint)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
