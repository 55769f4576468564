"""Which network a file of weights holds: families by the names of their tensors.

A file is recognised completely or refused: a tensor gets the name that model.py has for it, or is
left out for a reason that LEFT_OUT gives, or is called unexpected; OTHER_NETWORKS says what else is
known by its names. pretrained.py converts what is recognised here.
"""

import argparse
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from extras.weight_files import listed

# ------------------------------------------------------------------------------------------------
# The families
# ------------------------------------------------------------------------------------------------

HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # mean and std of pixels in [0, 1]: [-1, 1], as Google
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
CORNERS = "bilinear-corners"


@dataclass
class Family:
    """What its tensors do not show: the colours it was trained with, and the fields of ModelConfig.
    Frames and side are believed where the file does not say it; 0 frames: it must be said."""

    name: str
    colours: tuple
    frames: int
    side: int
    pool: str  # but mean-norm with an fc_norm
    gelu: str
    eps: float
    pos: str
    pos_resize: str = "bicubic"


# Image transformers are made ones for clips of 32 frames (pretrained.py, inflate_image).
TABLE = (
    ("Hugging Face ViViT",    HALF,     32, 224, "cls",       "tanh", 1e-6,  "learned"),
    ("Hugging Face VideoMAE", IMAGENET, 16, 224, "norm-mean", "none", 1e-12, "sincos"),
    ("mmaction2 VideoMAE",    IMAGENET, 16, 224, "norm-mean", "none", 1e-6,  "sincos"),
    ("VideoMAE",              IMAGENET, 16, 224, "norm-mean", "none", 1e-6,  "sincos"),
    ("UMT",                   IMAGENET,  0, 224, "norm-mean", "none", 1e-6,  "sincos"),
    ("MAE-ST",                GREY,     16, 224, "mean-norm", "none", 1e-6,  "learned"),
    ("V-JEPA",                IMAGENET, 16, 224, "norm-mean", "none", 1e-6,  "learned"),
    ("V-JEPA 2",              IMAGENET, 64, 256, "norm-mean", "none", 1e-6,  "rope"),
    ("Scenic ViViT",          HALF,     32, 224, "cls",       "tanh", 1e-6,  "learned", CORNERS),
    ("Google ViT",            HALF,     32, 224, "cls",       "tanh", 1e-6,  "learned", CORNERS),
    ("Hugging Face ViT",      HALF,     32, 224, "cls",       "none", 1e-12, "learned"),
    ("timm ViT",              HALF,     32, 224, "cls",       "none", 1e-6,  "learned"),
    ("DINOv2",                IMAGENET, 32, 224, "cls",       "none", 1e-6,  "learned"),
    ("MAE",                   IMAGENET, 32, 224, "cls",       "none", 1e-6,  "learned"),
    ("I-JEPA",                IMAGENET, 32, 224, "norm-mean", "none", 1e-6,  "learned"),
    ("SigLIP",                HALF,     32, 224, "norm-mean", "tanh", 1e-6,  "learned"),
)  # fmt: skip
FAMILIES = {row[0]: Family(*row) for row in TABLE}

# How they are told: what they call the patch embedding, and what they have or lack (-): tensors of
# block 0 and outside of blocks by our names, words of names left out. The first that fits is taken.
HUB, TIMM, FLAX = "embeddings.patch_embeddings.projection", "patch_embed.proj", "embedding"
TOLD_BY = (
    ("Hugging Face ViViT", HUB, "video cls"),
    ("Hugging Face VideoMAE", HUB, "video q.bias -cls -k.bias"),
    ("mmaction2 VideoMAE", "patch_embed.projection", "video q.bias -cls -k.bias"),
    ("UMT", TIMM, "one-frame q.bias -cls -k.bias"),
    ("VideoMAE", TIMM, "video q.bias -cls -k.bias"),
    ("MAE-ST", TIMM, "video cls pos_space"),
    # What V-JEPA adds to its patches V-JEPA 2 lacks, or has and does not read (check_v_jepa).
    ("V-JEPA", TIMM, "video qkv.bias norm pos -cls -head"),
    ("V-JEPA 2", TIMM, "video qkv.bias norm -cls -head -fc_norm"),
    ("V-JEPA 2", "embeddings.patch_embeddings.proj", "video -cls -pos"),
    ("Scenic ViViT", FLAX, "video"),
    ("DINOv2", HUB, "ls1 -video"),
    ("DINOv2", TIMM, "ls1 mask_token -video"),
    ("SigLIP", "embeddings.patch_embedding", "-video -cls"),
    ("SigLIP", TIMM, "attn_pool -video -cls"),
    ("MAE", TIMM, "decoder_embed mask_token -video"),
    ("I-JEPA", TIMM, "predictor -video -cls"),
    ("Hugging Face ViT", HUB, "-video"),
    ("timm ViT", TIMM, "-video"),
    ("Google ViT", FLAX, "-video"),
)

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
# What wraps layers (compilers, parallel modules), the network (also trainers), the tensors.
INNER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIX = re.compile(
    r"^((module|model|net|network|backbone|encoder|vivit|videomae|vit|dinov2|vjepa2"
    r"|vision_model)\.)+"
)
WRAPPERS = (
    "target_encoder", "model", "module", "state_dict", "model_state_dict", "model_state",
    "encoder", "net", "params", "weights",
    "model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema",
)  # fmt: skip
HEAD_BEHIND = ", with the head behind it"
ATTENTION_POOL = f"attention pooling{HEAD_BEHIND}"
LEFT_OUT = {  # how names begin: why they are not needed
    r"^((clip_)?decoder(_\w+)?\.|decoder_\w+$|encoder_to_decoder\.|predictor\."
    r"|(embeddings\.)?mask_token$)": "what pretraining predicts with",
    r"^(MAPHead_0|attn_pool|pooler\.(query_tokens|\w+_attention_layer))\b": ATTENTION_POOL,
    r"^head\.(probe|attention|layernorm|mlp)\b": "attention pooling, of no classifier here",
    r"^pooler\.": "a layer for features that no classifier here reads",
    r"^pre_logits\.": f"the representation layer of pretraining{HEAD_BEHIND}",
    r"^(text_model\.|logit_(scale|bias)$)": "the side of text",
    r"^(embeddings\.position_ids|n_averaged)$": "numbers that count",
}
OTHER_NETWORKS = {  # which share names with the ones above: what else they have, what they are
    r"patch_embed_img\.|norms_block\.|(img|video)_mod_embed": "V-JEPA 2.1: its features come from"
    " four norms and know images from clips",
    r"temporal_attn|temporal_attention|time_embed": "TimeSformer, whose attention is divided",
    r"\bpool_[qkv]\.|rel_pos_[hwt]$": "MViT, a hierarchy that pools inside its attention",
    r"^blocks\.\d+\.proj\.|stages\.\d+\.layers|unroll|mask_unit": "Hiera, a hierarchy",
    r"(spatial|temporal)_?(encoder|transformer|layers)": "a network with one encoder for space and"
    " one for time (VideoPrism, factorised ViViT)",
    r"rope|storage_tokens": "a network with other rotary positions (DINOv3, EVA-02)",
    r"\b[qk]_norm\.": "a network that norms queries and keys (InternVideo2)",
    r"attn\.scale$": "cosine attention (cos_attn of VideoMAE v2)",
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
# By width, where a file does not say it; other widths: 64 channels per head.
ATTENTION_HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 16, 1664: 16}
V_JEPA_2_HEADS = {1408: 22}
GELU = {"gelu": "none", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


# ------------------------------------------------------------------------------------------------
# What a file says of itself
# ------------------------------------------------------------------------------------------------

FACTS = {  # what is believed of config.json, preprocessor_config.json and VideoMAE's arguments
    "num_attention_heads": int,
    "num_frames": int,
    "image_size": (int, list, tuple),
    "hidden_act": str,
    "layer_norm_eps": float,
    "id2label": dict,
    "global_pool": str,
    "image_mean": list,
    "image_std": list,
    "offset": bool,  # of ViViT's pixels
}
SAME_FACT = {  # other words for one of these
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "crop_size": "image_size",
    "frames_per_clip": "num_frames",
}


def read_facts(path: Path, settings: dict) -> dict:
    """The entries of FACTS that are there; whether sizes make sense is seen with the network (make
    in pretrained.py). ValueError for one of another type, and for a network that is not read."""
    kind = settings.get("model_type")
    if kind is not None and kind not in MODEL_TYPES and not str(kind).startswith("VideoMAEv2"):
        raise ValueError(f"{path}: config.json says {str(kind)[:60]!r}, a network that is not read")
    for inner in ("model_config", "vision_config"):  # VideoMAE v2, SigLIP
        if isinstance(settings.get(inner), dict):
            settings = settings | settings[inner]
    if isinstance(timm := settings.get("pretrained_cfg"), dict):
        settings = settings | {"image_mean": timm.get("mean"), "image_std": timm.get("std")}
    if "quickgelu" in str(settings.get("architecture")):
        raise ValueError(f"{path}: {settings['architecture']}: its activation is not a GELU")
    for key in ("cos_attn", "qk_scale"):  # of VideoMAE v2
        if settings.get(key):
            raise ValueError(f"{path}: {key} is {settings[key]!r}, which is not computed here")
    facts = {}
    for key, value in settings.items():
        key = SAME_FACT.get(key, key)
        if key not in FACTS or value is None:
            continue
        if not isinstance(value, FACTS[key]):
            raise ValueError(f"{path}: {key} is {str(value)[:60]!r}, of another type than expected")
        facts[key] = value
    if facts.get("hidden_act", "gelu") not in GELU:
        raise ValueError(f"{path}: hidden_act is {facts['hidden_act'][:60]!r}, expected a GELU")
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
# Names, and the family that has them
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


def our_name(name: str) -> str | None:
    """What a tensor is called here, qkv still in parts; None if no family has such a tensor."""
    for table in TABLES:
        if re.fullmatch(OUTSIDE[table], name):
            return table
    stem, _, kind = re.sub(r"\.([qv])_bias$", r".\1.bias", name).rpartition(".")
    prefix, patterns = "", OUTSIDE
    if block := re.fullmatch(BLOCK, stem):
        prefix, stem, patterns = f"blocks.{int(block[1])}.", block[2], INSIDE
        for scale in ("ls1", "ls2"):  # tensors by themselves
            if re.fullmatch(INSIDE[scale], f"{stem}.{kind}"):
                return prefix + scale
    if kind not in ("weight", "bias"):
        return None
    for ours, theirs in patterns.items():
        if re.fullmatch(theirs, stem):
            return f"{prefix}{ours}.{kind}"
    return None


def rename(path: Path, tensors: dict) -> Parts:
    """Gives every tensor our name, or a reason to leave it out, or calls it unexpected."""
    for name, tensor in tensors.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        # One stored number can claim to be a tensor of any shape.
        if not dense or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: expected dense tensors alone, {listed([name])} is none")
    parts = Parts(path)
    names = {name: INNER.sub("", str(name)) for name in tensors}
    roots = {plain.split(".")[0] for plain in names.values()}
    shared = f"{roots.pop()}." if len(roots) == 1 else ""  # what all names begin with says nothing
    for name, tensor in tensors.items():
        plain = PREFIX.sub("", names[name].removeprefix(shared))
        reason, ours = first_match(LEFT_OUT, plain), our_name(plain)
        if reason:
            parts.left.setdefault(reason, []).append(name)
        elif other := first_match(OTHER_NETWORKS, plain.lower()):
            raise ValueError(f"{path}: refused: {other}, by its {name}")
        elif ours is None or ours in parts.tensors or not tensor.is_floating_point():
            parts.unexpected.append(name)
        else:
            parts.tensors[ours], parts.theirs[ours] = tensor.float(), plain
    patch = parts.tensors.get("patch.weight", torch.empty(0))
    known = patch.ndim in (2, 4, 5) and patch.numel() and "blocks.0.fc1.weight" in parts.theirs
    if not known:
        raise ValueError(f"{path}: no transformer that is known in {listed([*tensors], 4) or 'it'}")
    return parts


def first_match(patterns: dict[str, str], name: str) -> str:
    """What is said of the first pattern found in a name; "" if none is."""
    for pattern, words in patterns.items():
        if re.search(pattern, name):
            return words
    return ""


def from_flax(arrays: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
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
        if re.search(r"\.(query|key|value)$", stem):
            heads, array = array.shape[-2], array.flatten(-2)
        if kind == "kernel" and stem.endswith(".out"):
            array = array.flatten(0, -2)
        if kind == "kernel":  # also the filter: ([t,] h, w, 3, D) -> (D, 3, [t,] h, w)
            array = array.permute(-1, -2, *range(array.ndim - 2))
        kind = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
        tensors[f"{stem}.{kind}".lstrip(".")] = array
    return tensors, heads


def recognise(parts: Parts, predictor: dict) -> Family:
    """The family by TOLD_BY. `predictor`: the tensors beside a V-JEPA encoder. ValueError."""
    patch, called = parts.tensors["patch.weight"], parts.theirs["patch.weight"]
    signs = {name.removeprefix("blocks.0.").removesuffix(".weight") for name in parts.theirs}
    for names in parts.left.values():
        for name in names:
            signs |= set(str(name).split("."))
    if predictor:
        signs.add("predictor")
    if patch.ndim == 5:
        signs.add("video")
        if patch.shape[2] == 1:
            signs.add("one-frame")
    for name, embedding, expected in TOLD_BY:
        if called == f"{embedding}.weight" and has_signs(signs, expected):
            return check_v_jepa(parts, predictor) if name == "V-JEPA" else FAMILIES[name]
    raise ValueError(
        f"{parts.path}: a transformer of no family that is known, by the names of its tensors: of"
        " those for clips VideoMAE has q_bias and v_bias, ViViT and MAE-ST have a class token,"
        " V-JEPA has a bias of attn.qkv and no head"
    )


def has_signs(signs: set[str], expected: str) -> bool:
    """Are the words of `expected` there, but for those with a "-", which must not be?"""
    for word in expected.split():
        wanted = not word.startswith("-")
        if (word.removeprefix("-") in signs) != wanted:
            return False
    return True


def check_v_jepa(parts: Parts, predictor: dict) -> Family:
    """Which of the two: some files of V-JEPA 2 hold a table that it does not read."""
    pos, patch = parts.tensors["pos"], parts.tensors["patch.weight"]
    kinds = sum("mask_tokens." in str(name) for name in predictor)  # V-JEPA has two
    if len(patch) in V_JEPA_2_HEADS or kinds > 2:
        parts.leave("pos", "a table that V-JEPA 2 does not read")
        return FAMILIES["V-JEPA 2"]
    for side in (224, 384):  # the published sizes, 16 frames
        table = v_jepa_table((8, side // patch.shape[3], side // patch.shape[4]), len(patch))
        if table.shape == pos.shape and torch.allclose(table, pos, atol=1e-4):
            return FAMILIES["V-JEPA"]
    raise ValueError(
        f"{parts.path}: its {pos.shape[1]} positions are not V-JEPA's (16 frames of 224 or 384);"
        " V-JEPA 2 would not read them: the encoder may be either"
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
