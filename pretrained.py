"""Checkpoints of the field, and this project's own, as weights for model.py.

    pretrained = load("vivit-b-16x2-kinetics400/")    # or a file
    model = build(pretrained)                         # a CoFinetuneModel with the head(s) of the file
    load_encoder(model.encoder, pretrained)           # or into an encoder that exists already

Read are (what each family calls a tensor is in the tables under "Names"):
    Hugging Face   ViViT, VideoMAE, ViT        .safetensors, .bin, or a save_pretrained folder
    VideoMAE       pretrained, finetuned, and its Action-Detection code      .pth
    mmaction2      VideoMAE, clip classification and AVA detection           .pth
    timm           vision transformers without extras                        .pth, .safetensors, folder
    Google         image ViT of vision_transformer and big_vision            .npz
    Scenic         unfactorised ViViT: its checkpoint, a flax tree, exported by
                   np.savez("vivit.npz", **flax.traverse_util.flatten_dict(params, sep="/"))
    this project   last.pt and every other file cofinetune.py writes         .pt
Image weights become video weights: the patch filter is inflated in time, the positions are tiled.

Loading is strict. A tensor is mapped, or left out for a reason named in LEFT_OUT, or an error; nothing
in a file is ever executed (`weights_only=True`, `allow_pickle=False`), and nothing is allocated
because a file says so. Whatever is wrong with a file is a ValueError of one sentence.

`python pretrained.py CHECKPOINT` prints what a file holds. To use this file alone, copy it with
model.py: it needs torch and numpy.
"""

import argparse
import dataclasses
import json
import math
import pickle
import re
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from model import CoFinetuneModel, Head, ModelConfig, VideoTransformer, resize_positions, sincos_table


@dataclass
class Pretrained:
    """A converted checkpoint. `encoder` fits VideoTransformer(config); `head_state` fits the `heads`
    of CoFinetuneModel(config, heads); both are float32. `mean` and `std` are what the weights were
    trained with, for pixels in [0, 1]; empty means standardised per clip."""

    family: str
    config: ModelConfig
    encoder: dict[str, Tensor]
    heads: dict[str, Head]
    head_state: dict[str, Tensor]
    mean: list[float]
    std: list[float]
    classes: dict[str, list[str]]  # head -> class names, where the file has them
    report: list[str]  # what was mapped; what was left out and why; where the weights need care


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

MAX_UNPACKED = 20  # weights hardly compress: a file whose tensors are larger than this many times
# the file is a bomb (compressed or overlapping zip entries, tensors expanded from one element)
MAX_TOKENS = 1 << 18  # 32 frames of 1024x1024 in 2x16x16 are a quarter of this
MAX_HEADER = 100 << 20  # bytes of safetensors header, the limit of the format's own library
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What a damaged or hostile file makes torch.load or np.load raise, beyond UnpicklingError.
DAMAGE = (
    RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, MemoryError, ImportError, SyntaxError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file: 8 bytes of header length, a JSON header, then the data, which
    the entries must tile without gap or overlap (github.com/huggingface/safetensors, "Format")."""
    with open(path, "rb") as file:
        room = path.stat().st_size - 8
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(room, MAX_HEADER):
            raise ValueError(f"{path}: not safetensors: a header of {length} bytes in {room + 8}")
        header = parse_json(path, file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    spans = {}
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            numbers = [start, stop, *shape]
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"{path}: tensor {name!r} has no dtype, shape and offsets") from None
        if len(numbers) > 10 or any(type(n) is not int or not 0 <= n <= len(data) for n in numbers):
            raise ValueError(f"{path}: tensor {name!r} lies outside the {len(data)} bytes of data")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: tensor {name!r}: {stop - start} bytes cannot hold {shape}")
        spans[start, stop, name] = dtype, shape
    tensors, end = {}, 0
    for (start, stop, name), (dtype, shape) in sorted(spans.items(), key=lambda item: item[0]):
        if start != end:
            raise ValueError(f"{path}: tensor {name!r} starts at byte {start} of the data, not {end}")
        count = math.prod(shape)
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start) if count else torch.empty(0)
        tensors[name], end = flat.view(shape), stop
    if end != len(data):
        raise ValueError(f"{path}: the tensors end at byte {end} of {len(data)} bytes of data")
    return tensors


def check_unpacked(path: Path) -> None:
    """Raises for a zip (.npz, torch.save) whose directory promises far more than the file holds."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_UNPACKED * path.stat().st_size:
        raise ValueError(f"unpacks to {unpacked} bytes from {path.stat().st_size}")


def read_npz(path: Path) -> dict[str, Tensor]:
    """Every array of an .npz file in float32."""
    try:
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            strange = [n for n, a in arrays.items() if getattr(a, "dtype", np.dtype("V")).kind != "f"]
            if strange:
                raise ValueError(f"not arrays of floats: {listed(strange)}")
            return {n: torch.from_numpy(a.astype(np.float32)) for n, a in arrays.items()}
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable .npz file: {one_line(error)}") from None


def read_torch(path: Path) -> dict:
    """The dict in a torch.save file. Only tensors and plain Python values are unpickled, and
    argparse.Namespace, in which VideoMAE keeps its arguments: it holds attributes and runs nothing."""
    try:
        if zipfile.is_zipfile(path):
            check_unpacked(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global:?) (\S+)", str(error))
        found = f"it holds {named[1]}" if named else "not a torch.save file of tensors"
        raise ValueError(f"{path}: refused: {found}, and only weights are read, never objects") from None
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable torch.save file: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


def parse_json(path: Path, text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: JSON holds a {type(value).__name__}, expected an object")
    return value


def read(path: Path) -> tuple[Path, dict, dict]:
    """(file, content, settings): settings are config.json and the like of a save_pretrained folder."""
    if path.is_dir():
        files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"{path}: the folder holds neither {' nor '.join(FOLDER_FILES)}")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    settings = {}
    if path.name in FOLDER_FILES:
        for beside in (path.with_name("preprocessor_config.json"), path.with_name("config.json")):
            settings |= parse_json(beside, beside.read_bytes()) if beside.is_file() else {}
    readers = {".safetensors": read_safetensors, ".npz": read_npz}
    return path, readers.get(path.suffix, read_torch)(path), settings


def one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def listed(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------

# Our name: what the families call it. Flax names arrive here with "." for "/" (see from_flax).
ENDS = {
    "patch": r"patch_embed\.proj(ection)?|embeddings\.patch_embeddings\.projection|embedding",
    "norm": r"norm|layernorm|Transformer\.encoder_norm",
    "fc_norm": r"fc_norm",
    "head": r"head|classifier|output_projection|cls_head\.fc_cls|roi_head\.bbox_head\.fc_cls",
}
TABLES = {
    "cls": r"cls_token|embeddings\.cls_token|cls",
    "pos": r"pos_embed|embeddings\.position_embeddings|(Transformer\.posembed_input\.)?pos_embedding",
}
BLOCK = r"(?:blocks|layers|encoder\.layer)\.([0-9]+)\.(.+)|Transformer\.encoderblock_([0-9]+)\.(.+)"
ATTENTION = r"attention\.(attention\.)?|attn\.|MultiHeadDotProductAttention_[01]\."
IN_BLOCK = {
    "norm1": r"norm1|layernorm_before|LayerNorm_0",
    "norm2": r"norm2|layernorm_after|LayerNorm_[12]",
    "qkv": rf"({ATTENTION})qkv",
    "q": rf"({ATTENTION})(query|q_proj|q)",
    "k": rf"({ATTENTION})(key|k_proj)",
    "v": rf"({ATTENTION})(value|v_proj|v)",
    "proj": rf"({ATTENTION})(proj|o_proj|output\.dense|out)",
    "fc1": r"mlp\.fc1|intermediate\.dense|mlp\.layers\.0\.0|MlpBlock_[03]\.Dense_0",
    "fc2": r"mlp\.fc2|output\.dense|mlp\.layers\.1|MlpBlock_[03]\.Dense_1",
}
PREFIX = r"(module\.|backbone\.|vivit\.|videomae\.|vit\.)*(encoder\.(?=blocks|patch_embed|norm|pos_embed))?"
LEFT_OUT = {
    r"decoder\.|encoder_to_decoder\.|(embeddings\.)?mask_token": "the decoder of masked pretraining",
    r"pooler\.": "a tanh layer for sentence-like features, which no classifier here reads",
    r"pre_logits\.": "the representation layer of image pretraining; the head behind it goes with it",
    r"MAPHead_0\.|attn_pool\.": "attention pooling; the head behind it goes with it",
}


def our_name(name: str) -> str | None:
    """The name of a tensor here, "qkv" still in parts; None if no family has such a tensor."""
    for ours, theirs in TABLES.items():
        if re.fullmatch(theirs, name):
            return ours
    stem, _, kind = re.sub(r"\.([qv])_bias$", r".\1.bias", name).rpartition(".")
    block = re.fullmatch(BLOCK, stem)
    index, stem = [g for g in block.groups() if g is not None] if block else (None, stem)
    for ours, theirs in (IN_BLOCK if block else ENDS).items():
        if re.fullmatch(theirs, stem) and kind in ("weight", "bias"):
            return f"blocks.{int(index)}.{ours}.{kind}" if block else f"{ours}.{kind}"
    return None


def from_flax(arrays: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """(tensors laid out as torch does, attention heads). Flax kernels are (in, out), the attention's are
    split by head, (D, heads, d) going in and (heads, d, D) coming out."""
    split, heads = {}, 0
    for name, array in arrays.items():
        name = re.sub(r"^(params|opt/target|optimizer/target)/", "", name).replace("/", ".")
        if name.startswith("Transformer.encoderblock."):  # big_vision stacks all blocks in one array
            rest = name.removeprefix("Transformer.encoderblock.")
            split |= {f"Transformer.encoderblock_{i}.{rest}": a for i, a in enumerate(array)}
        else:
            split[name] = array
    tensors = {}
    for name, array in split.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".out") and kind == "kernel":
            array = array.flatten(0, -2)
        elif re.search(r"\.(query|key|value)$", stem):
            heads = array.shape[-2] if array.ndim > 1 else 0
            array = array.flatten(-2) if array.ndim > 1 else array
        if kind == "kernel":  # dense (in, out) -> (out, in); patch ([t,] h, w, 3, D) -> (D, 3, [t,] h, w)
            array = array.permute(-1, -2, *range(array.ndim - 2)) if array.ndim > 1 else array
        kind = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
        tensors[f"{stem}.{kind}" if stem else kind] = array
    return tensors, heads


# ------------------------------------------------------------------------------------------------
# What the tensors do not show
# ------------------------------------------------------------------------------------------------

OWN = "this project"
HALF = [0.5] * 3, [0.5] * 3  # pixels in [-1, 1], as Google trains
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FAMILIES = {  # mean and std, frames, fields of ModelConfig; config.json goes before them
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
    "image_size": ("1 to 4096, or two", lambda v: all(1 <= n <= 4096 for n in pair(v))),
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
    """The entries of SETTINGS that are present; ValueError for one that is not legal."""
    kept = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    for key, value in kept.items():
        expected, legal = SETTINGS[key]
        try:
            fine = legal(value)
        except (TypeError, ValueError, OverflowError, AttributeError):
            fine = False
        if not fine:
            raise ValueError(f"{path}: {key} is {str(value)[:60]!r}, expected {expected}")
    return kept


def family_of(patch: str, video: bool, cls: bool) -> str:
    """The family, by its name for the patch embedding."""
    if patch.startswith("embeddings"):
        return f"Hugging Face {'ViT' if not video else 'ViViT' if cls else 'VideoMAE'}"
    if patch.startswith("embedding"):
        return "Scenic ViViT" if video else "Google ViT"
    if patch.startswith("patch_embed.projection"):
        return "mmaction2 VideoMAE"
    return "VideoMAE" if video else "timm ViT"


def shapes_of(config: ModelConfig, heads: dict[str, Head]) -> dict[str, tuple[int, ...]]:
    """The state dict of CoFinetuneModel(config, heads), as shapes: building it would allocate whatever a
    hostile file claims. `build` loads strictly, so the two cannot drift apart."""
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    block = {
        "norm1": (width,), "qkv": (3 * width, width), "proj": (width, width),
        "norm2": (width,), "fc1": (hidden, width), "fc2": (width, hidden),
    }  # fmt: skip
    weights = {"patch": (width, 3, *config.tubelet), "norm": (width,)}
    weights |= {f"blocks.{i}.{name}": shape for i in range(config.depth) for name, shape in block.items()}
    weights = {f"encoder.{name}": shape for name, shape in weights.items()}
    for name, head in heads.items():
        weights[f"heads.{name}.linear"] = (head.classes, width * (1 + head.context))
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    shapes |= {"encoder.cls": (1, 1, width)} if config.cls else {}
    tokens = math.prod(config.grid) + config.cls
    return shapes | ({"encoder.pos": (1, tokens, width)} if config.pos != "sincos" else {})


# ------------------------------------------------------------------------------------------------
# Conversion
# ------------------------------------------------------------------------------------------------


def finish(path: Path, found: Pretrained, unexpected: list[str]) -> Pretrained:
    """The checkpoint, if it is exactly what its configuration asks for; else every difference."""
    tokens = math.prod(found.config.grid)
    if not 0 < tokens <= MAX_TOKENS or found.config.depth > len(found.encoder):
        raise ValueError(f"{path}: {tokens} tokens and {found.config.depth} blocks cannot be right")
    state = {f"encoder.{n}": t for n, t in found.encoder.items()}
    state |= {f"heads.{n}": t for n, t in found.head_state.items()}
    wanted = shapes_of(found.config, found.heads)
    problems = {
        "missing": [n for n in wanted if n not in state],
        "unexpected": unexpected + [n for n in state if n not in wanted],
        "of another shape": [
            f"{n} {tuple(state[n].shape)} for {shape}"
            for n, shape in wanted.items()
            if n in state and state[n].shape != shape
        ],
        "not finite": [n for n, t in state.items() if not t.isfinite().all()],
    }
    text = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
    if text:
        raise ValueError(f"{path}: read as {found.family}: {text}")
    return found


def record(path: Path, kind: type, values: dict):
    """A ModelConfig or Head from the plain dict in a checkpoint, every field of its declared type."""
    try:
        made = kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {kind.__name__}: {one_line(error)}") from None
    for field in dataclasses.fields(kind):
        value, wanted = getattr(made, field.name), get_origin(field.type) or field.type
        numbers = value if wanted is tuple else [value] if wanted is int else []
        if (
            not isinstance(value, (int, float) if wanted is float else wanted)
            or (wanted is tuple and len(value) != len(get_args(field.type)))
            or any(type(n) is not int or n < 1 for n in numbers)
        ):
            raise ValueError(f"{path}: {kind.__name__}.{field.name} is {str(value)[:60]!r}")
    return made


def own(path: Path, content: dict) -> Pretrained:
    """A checkpoint of cofinetune.py."""
    kinds = {"model": dict, "model_config": dict, "heads": dict, "classes": dict, "mean": list, "std": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise ValueError(f"{path}: a checkpoint of this project without {', '.join(wrong)}")
    config = record(path, ModelConfig, content["model_config"])
    heads = {str(name): record(path, Head, values) for name, values in content["heads"].items()}
    if not all(isinstance(t, Tensor) and t.layout == torch.strided for t in content["model"].values()):
        raise ValueError(f"{path}: model holds something else than tensors")
    for key in ("mean", "std"):
        if content[key]:
            believed(path, {f"image_{key}": content[key]})
    parts, unexpected = {"encoder.": {}, "heads.": {}}, []
    for name, tensor in content["model"].items():
        part = next((part for part in parts if str(name).startswith(part)), None)
        if part:
            parts[part][name.removeprefix(part)] = tensor
        else:
            unexpected.append(str(name))
    found = Pretrained(
        OWN, config, parts["encoder."], heads, parts["heads."], content["mean"], content["std"],
        content["classes"], [f"mapped: all {len(content['model'])} tensors, of step {content.get('step')}"],
    )  # fmt: skip
    return finish(path, found, unexpected)


def fuse_qkv(state: dict[str, Tensor], width: int, depth: int, report: list[str]) -> None:
    """Joins query, key and value of every block, in this order. VideoMAE has no key bias; zero is exact."""
    biases = any(re.search(r"\.(q|k|v|qkv)\.bias$", name) for name in state)
    if not biases:
        report.append("no query, key and value biases in the file: zero")
    for i in range(depth):
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            q, k, v = names = [f"blocks.{i}.{part}.{kind}" for part in "qkv"]
            if kind == "bias" and (not biases or q in state and v in state):
                state.setdefault(k, torch.zeros(shape))
            if not biases:
                state |= {name: torch.zeros(shape) for name in names if kind == "bias"}
            if all(name in state and state[name].shape == shape for name in names):
                state[f"blocks.{i}.qkv.{kind}"] = torch.cat([state.pop(name) for name in names])


def inflate_image(state: dict[str, Tensor], steps: int, how: str) -> None:
    """Makes an image transformer a video transformer with the same answer to a still clip. Its filter
    sees the second of the two frames of a tubelet ("central", as ViViT), or their mean ("average")."""
    image = state["patch.weight"][:, :, None]  # (D, 3, 1, p, p)
    frames = [image * 0, image] if how == "central" else [image / 2, image / 2]
    state["patch.weight"] = torch.cat(frames, 2)
    if "pos" in state and state["pos"].ndim == 3:
        rows = state["pos"].shape[1]
        first, table = state["pos"].split([rows - math.isqrt(rows) ** 2, math.isqrt(rows) ** 2], 1)
        if "cls" in state and not first.shape[1]:  # big_vision since 2022: no position for cls
            first = torch.zeros_like(table[:, :1])
        state["pos"] = torch.cat([first, table.repeat(1, steps, 1)], 1)  # (1, [1 +] t*h*w, D)


def gather(path: Path, tensors: dict) -> tuple[dict, dict, dict, list]:
    """(tensors by our name, their names by ours, names left out by reason, unexpected names)"""
    state, theirs, left, unexpected = {}, {}, {}, []
    for name, tensor in tensors.items():
        plain = re.sub(f"^{PREFIX}", "", str(name))
        ours, why = our_name(plain), [w for start, w in LEFT_OUT.items() if re.match(start, plain)]
        if why:
            left.setdefault(why[0], []).append(str(name))
        elif ours is None or ours in state or not tensor.is_floating_point():
            unexpected.append(str(name))
        else:
            state[ours], theirs[ours] = tensor.float(), plain
    patch, fc1 = (state.get(name, torch.empty(0)) for name in ("patch.weight", "blocks.0.fc1.weight"))
    if patch.ndim not in (4, 5) or fc1.ndim != 2 or not patch.numel():
        raise ValueError(f"{path}: no known transformer in its {len(tensors)} tensors: {listed(tensors, 4)}")
    return state, theirs, left, unexpected


def convert(
    path: Path, tensors: dict, settings: dict, frames: int | None, size: tuple[int, int] | None, inflate: str
) -> Pretrained:
    """Another project's tensors as ours. `settings` is its config.json, or what stands for that."""
    strange = [str(n) for n, t in tensors.items() if not isinstance(t, Tensor) or t.layout != torch.strided]
    if strange or not tensors:
        raise ValueError(f"{path}: expected nothing but tensors, found {listed(strange) or 'none'}")
    claimed, room = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if claimed > MAX_UNPACKED * room:
        raise ValueError(f"{path}: its tensors claim {claimed} bytes, the file has {room}")
    facts, report = believed(path, settings), []
    tensors, attention = from_flax(tensors) if path.suffix == ".npz" else (tensors, 0)
    state, theirs, left, unexpected = gather(path, tensors)
    patch, hidden = state["patch.weight"], len(state["blocks.0.fc1.weight"])
    video, width, depth = patch.ndim == 5, len(patch), len({n.split(".")[1] for n in state if "blocks" in n})
    family = family_of(theirs["patch.weight"], video, "cls" in state)
    (mean, std), usual_frames, usual = FAMILIES[family]

    # What goes in.
    if family == "Hugging Face ViViT":  # the setting of its processor contradicts how Scenic trained
        report.append("input [-1, 1], as trained; Hugging Face's processor feeds [-3, 1]: other logits")
    else:
        mean, std = list(facts.get("image_mean", mean)), list(facts.get("image_std", std))
    told_frames = facts.get("num_frames")
    told_size = pair(facts["image_size"]) if "image_size" in facts else None
    for what, asked, told in (("frames", frames, told_frames), ("size", size, told_size)):
        if asked and told and asked != told:
            raise ValueError(f"{path}: {what}={asked} asked for, but its weights are for {told}")
    frames = told_frames or frames or usual_frames
    steps = frames // (patch.shape[2] if video else 2)
    rows = state["pos"].shape[1] if "pos" in state and state["pos"].ndim == 3 else 0
    side = math.isqrt(rows // max(steps if video else 1, 1)) * patch.shape[-1]
    if video and not (told_frames and told_size):
        report.append("the file does not say for which clips: frames (and size) are the family's usual")
    size = told_size or size or (side or 224,) * 2
    if not video:
        inflate_image(state, steps, inflate)
        report.append(f"image weights: filter inflated to 2 frames ({inflate}), positions repeated in time")

    # How it is computed.
    attention = facts.get("num_attention_heads") or attention or ATTENTION_HEADS.get(width, width // 64)
    if family == "Hugging Face VideoMAE" and (width, attention) == (384, 16):
        attention = 6
        report.append("6 attention heads, as VideoMAE-S was trained; 16 in its Hugging Face config is wrong")
    if not attention or width % attention:
        raise ValueError(f"{path}: cannot split a width of {width} into {attention} attention heads")
    fuse_qkv(state, width, depth, report)
    eps = final_eps = facts.get("layer_norm_eps", usual.get("eps", 1e-6))
    pool = "cls" if "cls" in state else "norm-mean"
    if "fc_norm.weight" in state:
        pool, final_eps = "mean-norm", 1e-5 if family == "Hugging Face VideoMAE" else eps
        renamed = {n.removeprefix("fc_"): state.pop(n) for n in list(state) if n.startswith("fc_norm.")}
        unexpected += [f"fc_{n}" for n in renamed if n in state]
        state |= renamed
        report.append("norm is fc_norm, trained on the mean of all tokens; box heads see it token by token")
    elif "norm.weight" not in state and "VideoMAE" in family:
        pool = "mean-norm"
        state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        report.append("no final norm in the file: a new one")
    fixed = "VideoMAE" in family
    if fixed and rows:
        table = sincos_table(rows, width)[None]
        fixed = state["pos"].shape == table.shape and torch.allclose(state["pos"], table, atol=1e-5)
        if fixed:
            left["fixed sin-cos positions, computed here"] = [theirs["pos"]]
            del state["pos"]

    # The head.
    heads, head_state, classes = {}, {}, {}
    weight, detection = state.get("head.weight"), theirs.get("head.weight", "").startswith("roi_head")
    box = detection or (family == "VideoMAE" and pool == "norm-mean")  # its Action-Detection code
    reason = "it reads what is left out" if any("head behind" in why for why in left) else ""
    reason = reason or ("it reads the first token" if fixed and pool == "norm-mean" and not box else "")
    if weight is not None and reason:
        left[reason] = [theirs[n] for n in list(state) if n.startswith("head.") and state.pop(n).numel()]
    elif weight is not None:
        name = "box" if box else "clip"
        rows = {n: state.pop(n) for n in ("head.weight", "head.bias") if n in state}
        if detection and len(weight) != 80:  # AVA has 80 classes; row 0 is mmdetection's background
            rows = {n: t[1:] for n, t in rows.items()}
            report.append(f"row 0 of the {len(weight)} of the box head is background: dropped")
        heads[name] = Head(name, len(rows["head.weight"]), roi_size=8 if detection else 7)
        head_state = {n.replace("head", f"{name}.linear"): t for n, t in rows.items()}
        names = list(facts.get("id2label", {}).values())
        if len(names) == heads[name].classes and names[0] != "LABEL_0":
            classes[name] = names

    config = ModelConfig(
        frames=frames, size=size, tubelet=tuple(state["patch.weight"].shape[2:]), width=width, depth=depth,
        heads=attention, mlp_ratio=hidden / width, cls="cls" in state, pool=pool, gelu=usual["gelu"],
        eps=eps, final_eps=final_eps, pos="sincos" if fixed else "learned",
        pos_resize=usual.get("pos_resize", "bicubic"),
    )  # fmt: skip
    if "hidden_act" in facts:
        config.gelu = GELU[facts["hidden_act"]]
    report.insert(0, f"mapped: {len(theirs)} tensors to {len(state)} of the encoder, {len(head_state)} of a head")
    report += [f"left out: {listed(names, 3)} ({why})" for why, names in left.items()]
    found = Pretrained(family, config, state, heads, head_state, mean, std, classes, report)
    return finish(path, found, unexpected)


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------


def load(
    path: str | Path, frames: int | None = None, size: tuple[int, int] | None = None, inflate: str = "central"
) -> Pretrained:
    """Reads a checkpoint of any family in the docstring of this file.

    `frames` and `size` (H, W in pixels) say for which clips the weights are where the file does not: an
    image transformer knows no frames (32 by default), a VideoMAE .pth may not tell its size. `inflate` is
    "central" or "average". ValueError or FileNotFoundError for anything that is not exactly understood.
    """
    if inflate not in ("central", "average"):
        raise ValueError(f"inflate={inflate!r}, expected 'central' or 'average'")
    path, content, settings = read(Path(path))
    if "model_config" in content:
        return own(path, content)
    if isinstance(args := content.get("args"), argparse.Namespace):
        settings = {"num_frames": vars(args).get("num_frames"), "image_size": vars(args).get("input_size")}
    if isinstance(timm := settings.get("pretrained_cfg"), dict):
        settings = {"image_mean": timm.get("mean"), "image_std": timm.get("std")}
    for key in ("model", "module", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return convert(path, content, settings, frames, size, inflate)


def load_encoder(encoder: VideoTransformer, pretrained: Pretrained) -> None:
    """Loads the weights into an encoder that exists. Its clips may have another native size or number of
    frames: a learned position table is then resized, once. ValueError if the two compute differently."""
    theirs, ours = pretrained.config, encoder.config
    names = ["tubelet", "width", "depth", "heads", "mlp_ratio", "gelu"]
    names += ["cls"] if ours.cls else []  # a class token that the encoder lacks is dropped
    wrong = [f"{n} {getattr(ours, n)} for {getattr(theirs, n)}" for n in names if getattr(ours, n) != getattr(theirs, n)]
    if (ours.pos == "sincos") != (theirs.pos == "sincos"):
        wrong.append(f"pos {ours.pos} for {theirs.pos}")
    elif ours.pos == "sincos" and ours.grid != theirs.grid:  # another native grid is another table
        wrong.append(f"frames {ours.frames} and size {ours.size} for {theirs.frames} and {theirs.size}")
    if wrong:
        raise ValueError(f"the encoder does not fit these {pretrained.family} weights: {', '.join(wrong)}")
    state = dict(pretrained.encoder)
    if theirs.cls and not ours.cls:
        del state["cls"]
        state["pos"] = state["pos"][:, 1:]
    if theirs.grid != ours.grid:
        state["pos"] = resize_positions(state["pos"], theirs.grid, ours.grid, ours.pos_resize)
    encoder.load_state_dict(state)


def build(pretrained: Pretrained, heads: dict[str, Head] | None = None, **overrides) -> CoFinetuneModel:
    """A model with these weights. Without `heads`, it has those of the checkpoint. With `heads`, they are
    new, except that one of this project's checkpoints gives its weights to a head of the same name and
    shape. `overrides` are fields of ModelConfig: drop_path, checkpointing, frames, size ..."""
    unknown = set(overrides) - {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown:
        raise ValueError(f"no field of ModelConfig: {', '.join(sorted(unknown))}")
    model = CoFinetuneModel(
        dataclasses.replace(pretrained.config, **overrides), pretrained.heads if heads is None else heads
    )
    load_encoder(model.encoder, pretrained)
    known = pretrained.head_state if heads is None or pretrained.family == OWN else {}
    state = model.heads.state_dict()
    state |= {n: t for n, t in known.items() if n in state and state[n].shape == t.shape}
    model.heads.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def describe(found: Pretrained) -> str:
    config = found.config
    size = "x".join(map(str, config.size))
    lines = [
        f"family         {found.family}",
        f"clips          {config.frames} frames of {size}, tubelets of {'x'.join(map(str, config.tubelet))}",
        f"encoder        width {config.width}, depth {config.depth}, {config.heads} attention heads",
        f"               pool {config.pool}, positions {config.pos}, GELU {config.gelu}, eps {config.eps:g}",
        f"normalisation  mean {found.mean}, std {found.std} of pixels in [0, 1]"
        if found.mean else "normalisation  per clip",
    ]  # fmt: skip
    lines += [f"head           {name}: {head.kind}, {head.classes} classes" for name, head in found.heads.items()]
    return "\n".join(lines + [f"report         {line}" for line in found.report])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prints what a checkpoint holds, as model.py will use it.")
    parser.add_argument("checkpoint", help="a file, or a folder of save_pretrained")
    try:
        print(describe(load(parser.parse_args(arguments).checkpoint)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
