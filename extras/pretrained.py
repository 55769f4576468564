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

A file is recognised completely or refused: a tensor is mapped, or left out for a reason that
LEFT_OUT names, or an error; OTHER_NETWORKS says what else is known by its names. Nothing in a file
is executed. Whatever is wrong with a file is a ValueError of one sentence.

`python extras/pretrained.py CHECKPOINT` prints what a file holds. To use this file alone, copy it
with weight_files.py and model.py (in a folder above); it needs torch and numpy.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # run as a script, Python looks for modules beside this file only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extras.weight_files import listed, one_line, read, write_safetensors
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


# ------------------------------------------------------------------------------------------------
# Families
# ------------------------------------------------------------------------------------------------

OWN = "this project"
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # mean and std of pixels in [0, 1]: [-1, 1], as Google
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Family:
    """What the tensors of a family do not show, unless the file says otherwise."""

    scale: tuple = IMAGENET
    frames: int = 16  # of the clips; 0: of its published files some differ, it must be said
    size: int = 224
    pool: str = "norm-mean"  # unless the file has an fc_norm: then mean-norm
    gelu: str = "none"
    eps: float = 1e-6
    pos: str = "learned"
    pos_resize: str = "bicubic"


FAMILIES = {
    "Hugging Face ViViT": Family(HALF, 32, pool="cls", gelu="tanh"),
    "Hugging Face VideoMAE": Family(eps=1e-12, pos="sincos"),
    "VideoMAE": Family(pos="sincos"),
    "mmaction2 VideoMAE": Family(pos="sincos"),
    "UMT": Family(frames=0, pos="sincos"),
    "V-JEPA": Family(),
    "V-JEPA 2": Family(frames=64, size=256, pos="rope"),
    "MAE-ST": Family(((0.45,) * 3, (0.225,) * 3), pool="mean-norm"),
    "Scenic ViViT": Family(HALF, 32, pool="cls", gelu="tanh", pos_resize="bilinear-corners"),
    # Image transformers are made ones for clips of 32 frames (inflate_image).
    "Hugging Face ViT": Family(HALF, 32, pool="cls", eps=1e-12),
    "timm ViT": Family(HALF, 32, pool="cls"),
    "Google ViT": Family(HALF, 32, pool="cls", gelu="tanh", pos_resize="bilinear-corners"),
    "DINOv2": Family(IMAGENET, 32, pool="cls"),
    "SigLIP": Family(HALF, 32, gelu="tanh"),
}

# Our name: what the families call it. Flax names have "." for "/" here (from_flax).
OUTSIDE = {
    "cls": r"cls_token|embeddings\.cls_token|cls",
    "pos": r"pos_embed|embeddings\.position_embeddings?(\.weight)?"
    r"|(Transformer.posembed_input.)?pos_embedding",
    "pos_space": r"pos_embed_spatial",
    "pos_time": r"pos_embed_temporal",
    "pos_cls": r"pos_embed_class",
    "patch": r"patch_embed\.proj(ection)?|embeddings\.patch_embeddings\.proj(ection)?"
    r"|embeddings\.patch_embedding|embedding",
    "norm": r"norm|layernorm|post_layernorm|Transformer\.encoder_norm",
    "fc_norm": r"fc_norm",
    "head": r"head|classifier|output_projection|cls_head\.fc_cls|roi_head\.bbox_head\.fc_cls",
}
TABLES = ("cls", "pos", "pos_space", "pos_time", "pos_cls")  # tensors by themselves
BLOCK = r"(?:blocks\.|layers?\.|Transformer\.encoderblock_)([0-9]{1,4})\.(.+)"
ATTENTION = r"(?:attention\.(?:attention\.)?|(?:self_)?attn\.|MultiHeadDotProductAttention_[01]\.)"
INSIDE = {
    "norm1": r"norm1|layer_norm1|layernorm_before|LayerNorm_0",
    "norm2": r"norm2|layer_norm2|layernorm_after|LayerNorm_[12]",
    "qkv": rf"{ATTENTION}qkv",
    "q": rf"{ATTENTION}(q|query|q_proj)",
    "k": rf"{ATTENTION}(k|key|k_proj)",
    "v": rf"{ATTENTION}(v|value|v_proj)",
    "proj": rf"{ATTENTION}(proj|o_proj|out_proj|output\.dense|out)",
    "fc1": r"mlp\.fc1|intermediate\.dense|mlp\.layers\.0\.0|MlpBlock_[03]\.Dense_0",
    "fc2": r"mlp\.fc2|output\.dense|mlp\.layers\.1|MlpBlock_[03]\.Dense_1",
    "ls1": r"ls1\.gamma|layer_scale1\.lambda1",
    "ls2": r"ls2\.gamma|layer_scale2\.lambda1",
}
# What wraps the network: compilers, trainers, parallel modules, other networks around it.
PREFIX = re.compile(
    r"^((module|_orig_mod|model|net|network|backbone|encoder|vivit|videomae|vit|dinov2|vjepa2"
    r"|vision_model)\.)+"
)
WRAPPERS = (
    "target_encoder", "model", "module", "state_dict", "model_state_dict", "model_state",
    "encoder", "net", "params", "weights",
    "model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema",
)  # fmt: skip
HEAD_BEHIND = ", with the head behind it"
LEFT_OUT = {
    r"(clip_)?decoder(_\w+)?\.|decoder_\w+$|encoder_to_decoder\.|(embeddings\.)?mask_token$"
    r"|predictor\.": "what pretraining predicts with",
    r"pooler\.(query_tokens|\w+_attention_layer)|MAPHead_0\.|attn_pool\.": "attention pooling"
    + HEAD_BEHIND,
    r"head\.(probe|attention|layernorm|mlp)\b": "attention pooling, which no classifier here reads",
    r"pooler\.": "a layer for features that no classifier here reads",
    r"pre_logits\.": "the representation layer of pretraining" + HEAD_BEHIND,
    r"text_model\.|logit_(scale|bias)$": "the text's side",
    r"embeddings\.position_ids$": "numbers of positions",
}
# Names of networks that share some names with the ones above and compute something else.
OTHER_NETWORKS = {
    r"patch_embed_img\.|norms_block\.|(img|video)_mod_embed": "V-JEPA 2.1, whose features come from"
    " four norms and an embedding of the kind of input",
    r"temporal_attn|temporal_attention|time_embed": "TimeSformer, which attends to time and space"
    " apart",
    r"\bpool_[qkv]\.|rel_pos_[hwt]$": "MViT, a hierarchy that pools inside its attention",
    r"^blocks\.\d+\.proj\.|stages\.\d+\.layers|unroll|mask_unit": "Hiera, a hierarchy of windows",
    r"[sS]patial_?([eE]ncoder|[tT]ransformer|layers)|[tT]emporal_?([eE]ncoder|[tT]ransformer"
    r"|layers)": "a network with one encoder for space and one for time (VideoPrism, factorised"
    " ViViT)",
    r"rope|storage_tokens": "a network with other rotary positions (DINOv3, EVA-02)",
    r"\b[qk]_norm\.": "a network that norms queries and keys (InternVideo2)",
    r"attn\.scale$": "cosine attention (VideoMAE v2's cos_attn)",
    r"reg_token|register_tokens": "a network with register tokens (DINOv2 with registers)",
    r"dist(illation)?_token|head_dist": "DeiT with its distillation token",
    r"relative_position|rel_pos": "attention with a bias by relative position (BEiT, Swin)",
    r"\b(gamma|lambda)_[12]$": "BEiT, EVA or another network with gamma_1 and gamma_2",
    r"mlp\.(w1|w2|w12|w3|weights_in|gate_proj|up_proj|fc1_g|fc3)\b": "a network with SwiGLU layers"
    " (DINOv2 giant, DINOv3)",
    r"norm_pre|pre_layrnorm|class_embedding|ln_pre": "CLIP, which norms before its blocks",
}
MODEL_TYPES = (  # of a config.json
    "vivit", "videomae", "vjepa2", "vit", "vit_mae", "vit_msn", "ijepa", "dinov2", "siglip",
    "siglip_vision_model", "siglip2", "siglip2_vision_model",
)  # fmt: skip
ATTENTION_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # other widths: 64 channels per head
V_JEPA_2_HEADS = {1408: 22}
GELU = {"gelu": "none", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
MAX_TOKENS, MAX_DEPTH = 1 << 18, 256  # 32 frames of 1024x1024 are a quarter of the former


# ------------------------------------------------------------------------------------------------
# What a file says of itself
# ------------------------------------------------------------------------------------------------

TRIPLE = ("three numbers from 0 to 1", lambda v: len(v) == 3 and all(0 <= n <= 1 for n in v))
FACTS = {  # what is believed of config.json, preprocessor_config.json and VideoMAE's arguments
    "num_attention_heads": ("1 to 256", lambda v: type(v) is int and 1 <= v <= 256),
    "num_frames": ("1 to 1024", lambda v: type(v) is int and 1 <= v <= 1024),
    "image_size": ("1 to 4096, or two such", lambda v: all(1 <= n <= 4096 for n in pair(v))),
    "hidden_act": (f"one of {', '.join(GELU)}", lambda v: v in GELU),
    "layer_norm_eps": ("a small number", lambda v: 0 < v < 0.1),
    "id2label": ("a table of names", lambda v: all(type(name) is str for name in v.values())),
    "global_pool": ("a name", lambda v: type(v) is str),
    "image_mean": TRIPLE,
    "image_std": TRIPLE,
    # Nothing but these values is computed here.
    "cos_attn": ("false", lambda v: v is False),
    "qk_scale": ("null", lambda v: v is None),
    "use_rel_pos": ("false", lambda v: v is False),
    "offset": ("true or false", lambda v: type(v) is bool),
}
SAME_FACT = {  # other words for one of these
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "crop_size": "image_size",
    "frames_per_clip": "num_frames",
}


def pair(value) -> tuple[int, int]:
    height, width = value if isinstance(value, (list, tuple)) else (value, value)
    return int(height), int(width)


def read_facts(path: Path, settings: dict) -> dict:
    """The entries of FACTS that are there. ValueError for one that makes no sense, and for a
    config.json of a network that is not read."""
    kind = settings.get("model_type")
    if kind is not None and kind not in MODEL_TYPES and not str(kind).startswith("VideoMAEv2"):
        raise ValueError(f"{path}: config.json says {str(kind)[:60]!r}, a network that is not read")
    if "quickgelu" in str(settings.get("architecture")):
        raise ValueError(f"{path}: {settings['architecture']}: its activation is not a GELU")
    for inner in ("model_config", "vision_config"):  # VideoMAE v2, SigLIP
        if isinstance(settings.get(inner), dict):
            settings = settings | settings[inner]
    if isinstance(timm := settings.get("pretrained_cfg"), dict):
        settings = settings | {"image_mean": timm.get("mean"), "image_std": timm.get("std")}
    facts = {}
    for key, value in settings.items():
        key = SAME_FACT.get(key, key)
        if key not in FACTS or value is None:
            continue
        expected, makes_sense = FACTS[key]
        try:
            fine = makes_sense(value)
        except (AttributeError, OverflowError, TypeError, ValueError):
            fine = False
        if not fine:
            raise ValueError(f"{path}: {key} is {str(value)[:60]!r}, expected {expected}")
        facts[key] = value
    return facts


def read_arguments(content: dict) -> dict:
    """The clip that a training script's arguments (VideoMAE, UMT) speak of."""
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        return {}
    frames, segments = args.get("num_frames"), args.get("num_segments")
    if type(frames) is int and type(segments) is int:
        frames *= segments
    return {"num_frames": frames, "image_size": args.get("input_size")}


def unwrap(path: Path, content: dict) -> tuple[dict, list[str]]:
    """The tensors by name inside what trainers put around them, and what to report of it."""
    report = []
    for _ in range(4):
        if any(isinstance(value, Tensor) for value in content.values()):
            return content, report
        inner = [key for key, value in content.items() if isinstance(value, dict) and value]
        named = [key for key in WRAPPERS if key in inner]
        key = (named or inner or [None])[0]
        if key is None or not named and len(inner) > 1:
            names = listed([*content]) or "nothing"
            raise ValueError(f"{path}: no tensors by a name that is known, but {names}")
        averages = [name for name in named[1:] if "ema" in name]
        if averages:
            report.append(f"read: {key}; not its running average in {averages[0]}")
        content = content[key]
    raise ValueError(f"{path}: no tensors by name, however deep one looks")


# ------------------------------------------------------------------------------------------------
# First: names
# ------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """A foreign file under way: its tensors by our names, and what became of the others."""

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by our names, queries apart
    theirs: dict[str, str] = field(default_factory=dict)  # our name: what it is called in the file
    left: dict[str, list[str]] = field(default_factory=dict)  # why: their names
    unexpected: list[str] = field(default_factory=list)
    report: list[str] = field(default_factory=list)

    def leave(self, name: str, why: str) -> None:
        self.tensors.pop(name)
        self.left.setdefault(why, []).append(self.theirs[name])

    def left_any(self, word: str) -> bool:
        """Whether a tensor was left out that has the word in its name."""
        return any(word in str(name) for names in self.left.values() for name in names)


def our_name(name: str) -> str | None:
    """What a tensor is called here, qkv still in parts; None if no family has such a tensor."""
    for table in TABLES:
        if re.fullmatch(OUTSIDE[table], name):
            return table
    stem, _, kind = re.sub(r"\.([qv])_bias$", r".\1.bias", name).rpartition(".")
    block = re.fullmatch(BLOCK, stem)
    if block and re.fullmatch(r"ls[12]\.gamma|layer_scale[12]\.lambda1", f"{block[2]}.{kind}"):
        return f"blocks.{int(block[1])}.ls{re.search('[12]', block[2])[0]}"
    if kind not in ("weight", "bias"):
        return None
    for ours, theirs in (INSIDE if block else OUTSIDE).items():
        if re.fullmatch(theirs, block[2] if block else stem):
            return f"blocks.{int(block[1])}.{ours}.{kind}" if block else f"{ours}.{kind}"
    return None


def rename(path: Path, tensors: dict) -> Parts:
    """Gives every tensor our name, or a reason to leave it out, or calls it unexpected."""
    if not tensors:
        raise ValueError(f"{path}: no tensors by name where they are expected")
    strange = []
    for name, tensor in tensors.items():
        if getattr(tensor, "layout", None) != torch.strided:
            strange.append(name)
        elif tensor.nbytes > tensor.untyped_storage().nbytes():  # one element can claim any shape
            raise ValueError(f"{path}: {name!r} claims {tensor.nbytes} bytes, which it has not")
    if strange:
        raise ValueError(f"{path}: expected nothing but dense tensors, found {listed(strange)}")
    parts = Parts(path)
    roots = {str(name).split(".")[0] for name in tensors}
    shared = f"{roots.pop()}." if len(roots) == 1 else ""  # what all names begin with says nothing
    for name, tensor in tensors.items():
        plain = PREFIX.sub("", str(name).removeprefix(shared))
        reasons = [why for start, why in LEFT_OUT.items() if re.match(start, plain)]
        ours = our_name(plain)
        if reasons:
            parts.left.setdefault(reasons[0], []).append(name)
            continue
        for pattern, what in OTHER_NETWORKS.items():
            if re.search(pattern, plain):
                raise ValueError(f"{path}: refused: {what}, by its {name}")
        if ours is None or ours in parts.tensors or not tensor.is_floating_point():
            parts.unexpected.append(name)
        else:
            parts.tensors[ours], parts.theirs[ours] = tensor.float(), plain
    patch = parts.tensors.get("patch.weight", torch.empty(0))
    if (
        patch.ndim not in (2, 4, 5)
        or not patch.numel()
        or "blocks.0.fc1.weight" not in parts.theirs
    ):
        raise ValueError(f"{path}: no transformer that is known in {listed([*tensors], 4)}")
    return parts


def from_flax(path: Path, arrays: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """(tensors laid out as torch does, attention heads). Flax kernels are (in, out); attention
    splits its side by head: (D, heads, d) going in, (heads, d, D) coming out."""
    split, tensors, heads = {}, {}, 0
    for name, array in arrays.items():
        name = re.sub(r"^(params|opt/target|optimizer/target)/", "", name).replace("/", ".")
        stacked = name.removeprefix("Transformer.encoderblock.")  # big_vision: blocks in one array
        if stacked == name or not array.ndim:
            split[name] = array
            continue
        for i, part in enumerate(array):
            split[f"Transformer.encoderblock_{i}.{stacked}"] = part
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


def recognise(parts: Parts, predictor: dict) -> str:
    """The family, from what it calls the patch embedding, and from what else it has. `predictor`:
    the tensors beside a V-JEPA encoder."""
    tensors, patch = parts.tensors, parts.theirs["patch.weight"]
    video, cls = tensors["patch.weight"].ndim == 5, "cls" in tensors
    no_key_bias = "blocks.0.q.bias" in tensors and "blocks.0.k.bias" not in tensors
    if patch.startswith("embeddings.patch_embedding."):
        return "SigLIP"
    if patch.startswith("embedding."):
        return "Scenic ViViT" if video else "Google ViT"
    if not video:
        if parts.left_any("attn_pool") and not cls:
            return "SigLIP"
        if "blocks.0.ls1" in tensors and (parts.left_any("mask_token") or "embeddings" in patch):
            return "DINOv2"
        return "Hugging Face ViT" if patch.startswith("embeddings") else "timm ViT"
    if patch.startswith("embeddings.patch_embeddings.proj."):
        return "V-JEPA 2"
    if patch.startswith("embeddings") and cls:
        return "Hugging Face ViViT"
    if "pos_space" in parts.theirs and cls:
        return "MAE-ST"
    if no_key_bias and not cls:
        if patch.startswith("embeddings"):
            return "Hugging Face VideoMAE"
        if patch.startswith("patch_embed.projection"):
            return "mmaction2 VideoMAE"
        return "UMT" if tensors["patch.weight"].shape[2] == 1 else "VideoMAE"
    if patch.startswith("patch_embed.proj.") and "blocks.0.qkv.bias" in tensors and not cls:
        return which_v_jepa(parts, predictor)
    raise ValueError(
        f"{parts.path}: a video transformer of no family that is known (VideoMAE has q_bias and"
        " v_bias, ViViT and MAE-ST a class token, V-JEPA neither)"
    )


def which_v_jepa(parts: Parts, predictor: dict) -> str:
    """V-JEPA adds a fixed table to its patches and V-JEPA 2 turns queries and keys: the same names,
    but for the table, and some files of V-JEPA 2 hold one that it does not read."""
    tensors = parts.tensors
    if "head.weight" in tensors or "fc_norm.weight" in tensors or "norm.weight" not in tensors:
        raise ValueError(
            f"{parts.path}: a bias of attn.qkv without VideoMAE's q_bias and v_bias, and not what"
            " V-JEPA consists of (norm, no head): of no family that is known"
        )
    if "pos" not in tensors:
        return "V-JEPA 2"
    width, _, _, *patch = tensors["patch.weight"].shape
    kinds = sum("mask_tokens." in str(name) for name in predictor)  # V-JEPA has two
    if width in V_JEPA_2_HEADS or kinds > 2:
        parts.leave("pos", "a table that V-JEPA 2 does not read")
        return "V-JEPA 2"
    for side in (224, 384):  # the published sizes, 16 frames
        table = v_jepa_table((8, side // patch[0], side // patch[1]), width)
        if table.shape == tensors["pos"].shape and torch.allclose(table, tensors["pos"], atol=1e-4):
            return "V-JEPA"
    raise ValueError(
        f"{parts.path}: its {tensors['pos'].shape[1]} positions are not V-JEPA's (16 frames of 224"
        " or 384); V-JEPA 2 would not read them: the encoder may be either"
    )


def v_jepa_table(grid: tuple[int, int, int], width: int) -> Tensor:
    """(1, t*h*w, width): for each axis the sines, then the cosines (jepa, get_3d_sincos_pos_embed
    with uniform_power)."""
    part = math.ceil(width / 6) * 2
    rate = 10000.0 ** (-torch.arange(part // 2, dtype=torch.float64) / (part / 2))
    columns = []
    for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"):
        angle = axis.reshape(-1, 1) * rate
        columns += [angle.sin(), angle.cos()]
    return torch.cat(columns, 1)[None, :, :width].float()


# ------------------------------------------------------------------------------------------------
# Second: the encoder
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
            if block + scale in tensors and all(r is not None and len(r) == width for r in rows):
                factor = tensors.pop(block + scale)
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
    if "pos" in tensors and tensors["pos"].ndim == 3:
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
    patch, pos = tensors["patch.weight"], tensors.get("pos")
    if patch.ndim == 2:
        side = math.isqrt(patch.shape[1] // 3)
        if patch.shape[1] != 3 * side**2:
            raise ValueError(f"{parts.path}: a patch embedding of {patch.shape[1]} numbers a patch")
        tensors["patch.weight"] = patch.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
        parts.report.append("SigLIP 2 smooths its positions for smaller images, here they are not")
    if pos is not None and pos.ndim == 2:
        tensors["pos"] = pos[None]
    names = ("pos_cls", "pos_time", "pos_space")
    if not all(name in tensors for name in names):
        return
    first, time, space = (tensors.pop(name) for name in names)
    if not first.ndim == time.ndim == space.ndim == 3 or patch.ndim != 5:
        raise ValueError(f"{parts.path}: positions of space and time of an unknown shape")
    try:
        table = time[:, :, None] + space[:, None]  # (1, t, h*w, D)
        tensors["pos"] = torch.cat([first, table.flatten(1, 2)], 1)
    except RuntimeError:
        raise ValueError(f"{parts.path}: positions of space and time that do not add up") from None
    facts["num_frames"] = time.shape[1] * patch.shape[2]


def native_clip(
    parts: Parts, name: str, facts: dict, stated: int | None, inflate: str
) -> tuple[int, tuple[int, int]]:
    """Frames and size of the clips that the positions are for; an image filter is inflated."""
    tensors, family = parts.tensors, FAMILIES[name]
    video = tensors["patch.weight"].ndim == 5
    frames = facts.get("num_frames") or family.frames or stated
    if not frames:
        raise ValueError(
            f"{parts.path}: read as {name}: nothing in the file says of how many frames its clips"
            " are. Say it: frames=8 in load(), --frames 8 on the command line, frames = 8 in the"
            " recipe's [model] (the published ones have 8)"
        )
    steps = max(frames // (tensors["patch.weight"].shape[2] if video else 2), 1)
    rows = tensors["pos"].shape[1] if "pos" in tensors and tensors["pos"].ndim == 3 else 0
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
    parts: Parts, name: str, facts: dict, stated: int | None, flax_heads: int, inflate: str
) -> ModelConfig:
    """What the network computes. The tensors get the layout of VideoTransformer."""
    family, tensors, report = FAMILIES[name], parts.tensors, parts.report
    mean, std = family.scale
    if name == "Hugging Face ViViT" and facts.get("offset", True):
        # What its processor is told contradicts how Scenic trained.
        report.append("input is [-1, 1] as in training; Hugging Face's processor feeds [-3, 1]")
    else:
        mean, std = facts.get("image_mean", mean), facts.get("image_std", std)
    if name == "timm ViT" and "image_mean" not in facts:
        report.append("input assumed to be [-1, 1]; of DeiT and MAE it is ImageNet's mean and std")
    frames, size = native_clip(parts, name, facts, stated, inflate)
    width = len(tensors["patch.weight"])
    special = V_JEPA_2_HEADS if name == "V-JEPA 2" else ATTENTION_HEADS
    attention = facts.get("num_attention_heads", flax_heads) or special.get(width)
    if not attention:
        attention = max(width // 64, 1)
        report.append(f"{attention} attention heads taken, 64 channels each: no file says it")
    if name == "Hugging Face VideoMAE" and (width, attention) == (384, 16):
        attention = 6
        report.append("6 attention heads, as VideoMAE-S was trained; the config.json says 16")
    depth = join_tensors(parts)
    eps = final_eps = facts.get("layer_norm_eps", family.eps)
    if name == "Hugging Face VideoMAE" and "fc_norm.weight" in tensors:
        final_eps = 1e-5
    pool = choose_norm(parts, family, facts)
    values = dict(
        frames=frames,
        size=size,
        tubelet=tuple(tensors["patch.weight"].shape[2:]),
        width=width,
        depth=depth,
        heads=attention,
        mlp_ratio=len(tensors["blocks.0.fc1.weight"]) / width,
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
# Third: the head
# ------------------------------------------------------------------------------------------------


def take_head(parts: Parts, name: str, config: ModelConfig) -> tuple[dict, dict]:
    """({name: Head}, its tensors), both empty if the file has none, or one that reads something
    that the network here has not."""
    tensors = parts.tensors
    weight, stem = tensors.get("head.weight"), parts.theirs.get("head.weight", "")
    if weight is None:
        return {}, {}
    detection = stem.startswith("roi_head")
    video_mae = name in ("VideoMAE", "UMT")  # whose AVA models norm each token
    box = detection or video_mae and config.pool == "norm-mean"
    reason = ""
    if any(HEAD_BEHIND in why for why in parts.left):
        reason = "it reads what is left out"
    elif weight.ndim == 2 and weight.shape[1] == 2 * config.width:
        reason = "it reads the class token and the mean, one after the other"
    elif FAMILIES[name].pos == "sincos" and config.pool == "norm-mean" and not box:
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
    predictor = content.get("predictor")
    settings = settings or read_arguments(content)
    tensors, wrapping = unwrap(path, content)
    facts, flax_heads = read_facts(path, settings), 0
    if path.suffix == ".npz":
        tensors, flax_heads = from_flax(path, tensors)
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
    weights = Weights(family, config, parts.tensors, heads, head_state, classes, report)
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
    for name, tensor in content["model"].items():
        part, _, rest = str(name).partition(".")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {name} is no dense tensor")
        if part in ("encoder", "heads"):
            (encoder if part == "encoder" else head_state)[rest] = tensor
        else:
            other.append(name)
    report = [f"mapped: all {len(content['model'])} tensors, of step {content.get('step')}"]
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


def initialise(
    path: str | Path, heads: dict[str, Head], settings: dict
) -> tuple[CoFinetuneModel, list[str]]:
    """The model that a run begins with, and sentences that say what became of the checkpoint.

    `settings` is the recipe's [model]: of it count the keys that leave the network as it is,
    frames, size, drop_path and checkpointing; the checkpoint decides on the others.
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


LEAVES_INIT = ("frames", "size", "drop_path", "checkpointing")


# ------------------------------------------------------------------------------------------------
# Back to Hugging Face
# ------------------------------------------------------------------------------------------------

HUB = {  # our name: the hub's, of ViViT and of VideoMAE
    "patch": "embeddings.patch_embeddings.projection",
    "cls": "embeddings.cls_token",
    "pos": "embeddings.position_embeddings",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm": "layernorm",
}
QKV = ("query", "key", "value")


def to_hugging_face(
    model: CoFinetuneModel, task: str, folder: str | Path, classes: list[str] | None = None
) -> None:
    """Writes the encoder and the head of a clip task as save_pretrained does: config.json,
    preprocessor_config.json and model.safetensors, which transformers reads as its ViViT or
    VideoMAE for video classification. ValueError for a model that is neither.

    A bias of keys adds one number to all products of a query, which softmax does not see: VideoMAE
    has none, so it is not written. VideoMAE's last norm has eps 1e-5 there.
    """
    config, head = model.encoder.config, model.heads[task].head
    vivit = config.cls and config.pool == "cls" and config.pos.startswith("learned")
    videomae = config.pos == "sincos" and config.pool == "mean-norm" and config.gelu == "none"
    square = config.size[0] == config.size[1] and config.tubelet[1] == config.tubelet[2]
    if head.kind != "clip":
        raise ValueError(f"task {task}: transformers has no box head; name a clip task")
    if not (vivit or videomae) or not square or vivit and config.eps != config.final_eps:
        raise ValueError(
            "transformers has this network as ViViT (class token, learned positions) or VideoMAE"
            " (sincos positions, pool mean-norm, gelu none), of square clips; this is neither:"
            f" cls {config.cls}, pos {config.pos}, pool {config.pool}, gelu {config.gelu},"
            f" size {config.size}, tubelet {config.tubelet}"
        )
    classes = classes or [f"LABEL_{i}" for i in range(head.classes)]
    mean, std = model.scale
    tubelet = config.tubelet
    table = dict(
        architectures=[f"{'Vivit' if vivit else 'VideoMAE'}ForVideoClassification"],
        model_type="vivit" if vivit else "videomae",
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=len(model.encoder.blocks[0].fc1.weight),
        hidden_act="gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",
        layer_norm_eps=config.eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=config.size[0],
        num_frames=config.frames,
        tubelet_size=list(tubelet) if vivit else tubelet[0],
        patch_size=tubelet[1],
        qkv_bias=True,
        use_mean_pooling=True,
        id2label={str(i): name for i, name in enumerate(classes)},
        label2id={name: i for i, name in enumerate(classes)},
    )
    processor = dict(
        image_processor_type="VivitImageProcessor" if vivit else "VideoMAEImageProcessor",
        do_rescale=True,
        rescale_factor=1 / 255,
        offset=False,
        do_normalize=bool(mean),
        image_mean=list(mean),
        image_std=list(std),
        size={"shortest_edge": config.size[0]},
        crop_size={"height": config.size[0], "width": config.size[1]},
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(table, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    write_safetensors(folder / "model.safetensors", hub_tensors(model, task, vivit))


def hub_tensors(model: CoFinetuneModel, task: str, vivit: bool) -> dict[str, Tensor]:
    """The tensors of to_hugging_face by the hub's names."""
    stem = "vivit." if vivit else "videomae."
    tensors = {}
    for kind in ("weight", "bias"):
        tensors[f"classifier.{kind}"] = getattr(model.heads[task].fc, kind)
    for name, tensor in model.encoder.state_dict().items():
        layer, place = name.split("."), stem
        if layer[0] == "blocks":
            place, layer = f"{stem}encoder.layer.{layer[1]}.", layer[2:]
        if layer[0] == "norm" and not vivit:
            tensors[f"fc_norm.{layer[1]}"] = tensor
        elif layer[0] == "qkv":
            for part, rows in zip(QKV, tensor.chunk(3), strict=True):
                if vivit or layer[1] == "weight":
                    tensors[f"{place}attention.attention.{part}.{layer[1]}"] = rows
                elif part != "key":
                    tensors[f"{place}attention.attention.{part[0]}_bias"] = rows
        else:
            tensors[".".join([place + HUB[layer[0]], *layer[1:]])] = tensor
    return tensors


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
        print(describe(load(options.checkpoint, frames=options.frames)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
