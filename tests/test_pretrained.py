"""Tests of extras/pretrained.py and of the files that it reads (extras/weight_files.py)."""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import model_oracle, run_command, tiny_model

import model as M
from extras import hugging_face, pretrained, weight_files
from extras.methods import SpotTune

PT_TIMM = dict(
    patch="patch_embed.proj",
    cls="cls_token",
    pos="pos_embed",
    norm="norm",
    head="head",
    block="blocks.",
    norm1="norm1",
    norm2="norm2",
    qkv="attn.qkv",
    proj="attn.proj",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
PT_VIDEOMAE = PT_TIMM | dict(norm="fc_norm", bias="attn.{}_bias")
PT_MMACTION = PT_VIDEOMAE | dict(
    patch="backbone.patch_embed.projection",
    block="backbone.blocks.",
    norm="backbone.fc_norm",
    fc1="mlp.layers.0.0",
    fc2="mlp.layers.1",
    head="cls_head.fc_cls",
)
PT_DETECTION = PT_MMACTION | dict(norm="backbone.norm", head="roi_head.bbox_head.fc_cls")
PT_HF = dict(
    patch="embeddings.patch_embeddings.projection",
    cls="embeddings.cls_token",
    norm="layernorm",
    pos="embeddings.position_embeddings",
    block="encoder.layer.",
    norm1="layernorm_before",
    norm2="layernorm_after",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    proj="attention.output.dense",
    fc1="intermediate.dense",
    fc2="output.dense",
    head="classifier",
)
PT_HF_MEMORY = PT_HF | dict(
    block="vivit.layers.",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    proj="attention.o_proj",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
PT_HF_VIDEOMAE = PT_HF | dict(
    patch="videomae.embeddings.patch_embeddings.projection",
    block="videomae.encoder.layer.",
    norm="fc_norm",
)
PT_HF_QV = PT_HF_VIDEOMAE | dict(bias="attention.attention.{}_bias")
PT_FLAX = dict(
    patch="embedding",
    cls="cls",
    pos="Transformer/posembed_input/pos_embedding",
    head="head",
    norm="Transformer/encoder_norm",
    block="Transformer/encoderblock_",
    norm1="LayerNorm_0",
    norm2="LayerNorm_1",
    q="MultiHeadDotProductAttention_0/query",
    fc1="MlpBlock_0/Dense_0",
    k="MultiHeadDotProductAttention_0/key",
    v="MultiHeadDotProductAttention_0/value",
    proj="MultiHeadDotProductAttention_0/out",
    fc2="MlpBlock_0/Dense_1",
)
PT_OLD = {"Norm_1": "Norm_2", "tion_0": "tion_1", "Block_0": "Block_3"}
PT_VIVIT = dict(cls=True, pool="cls")
PT_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PT_MAE = dict(pos="sincos", pool="mean-norm", gelu="none", **PT_IMAGENET)
PT_HF_MAE = PT_MAE | dict(eps=1e-12, final_eps=1e-5)
PT_BOX = PT_MAE | dict(pool="norm-mean")
PT_FAMILIES = {  # test: (names in the file, source model)
    "Hugging Face ViViT": (PT_HF, PT_VIVIT),
    "Hugging Face ViViT in memory": (PT_HF_MEMORY, PT_VIVIT),
    "Hugging Face VideoMAE": (PT_HF_QV, PT_HF_MAE),
    "Hugging Face VideoMAE in memory": (PT_HF_VIDEOMAE, PT_HF_MAE),
    "VideoMAE": (PT_VIDEOMAE, PT_MAE),
    "VideoMAE for detection": (PT_VIDEOMAE | dict(norm="norm"), PT_BOX),
    "mmaction2 VideoMAE": (PT_MMACTION, PT_MAE),
    "mmaction2 VideoMAE for detection": (PT_DETECTION, PT_BOX | dict(roi_size=8)),
    "Scenic ViViT": (
        PT_FLAX | dict(head="output_projection"),
        PT_VIVIT | dict(frames=32, pos_resize="bilinear-corners"),
    ),
}


def pt_model(kind="clip", classes=5, roi_size=7, **config):
    """A small model with random parameters; the key bias is 0 where it is fixed to that."""
    sizes = dict(frames=16, size=(32, 32), tubelet=(2, 16, 16), width=128, depth=2, mlp_ratio=2.0)
    heads = {kind: M.Head(kind, classes, roi_size=roi_size)}
    net = tiny_model(heads, **sizes | config).eval()
    if config.get("pos") == "sincos":
        for block in net.encoder.blocks:
            block.qkv.bias.data.chunk(3)[1].zero_()
    return net


def pt_renamed(net, names, sep="."):
    """The state dict of `net` in another family's names."""
    state = {}
    for name, tensor in net.state_dict().items():
        what, tensor = name.split(".")[1:], tensor.clone()
        what = ["head", what[-1]] if name.startswith("heads") else what
        start = names["block"] + what[1] + sep if what[0] == "blocks" else ""
        what = what[2:] if start else what
        kind = sep + what[1] if len(what) > 1 else ""
        if what[0] == "qkv" and ("q" in names or "bias" in names and kind == sep + "bias"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                if kind != sep + "bias" or "bias" not in names:
                    state[start + names[part] + kind] = rows.clone()
                elif part != "k":
                    state[start + names["bias"].format(part)] = rows.clone()
        else:
            state[start + names[what[0]] + kind] = tensor
    return state


def pt_flax(net, names):
    """The same for flax: (in, out) kernels, attention apart by head, patches (..., h, w, 3, D)."""
    arrays = {}
    for name, tensor in pt_renamed(net, names, "/").items():
        stem, _, kind = name.rpartition("/")
        array, heads = tensor.numpy(), net.encoder.config.heads
        if kind == "weight":
            kind = "scale" if array.ndim == 1 else "kernel"
            array = np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array
        if stem.endswith(("query", "key", "value")):
            array = array.reshape(*array.shape[:-1], heads, -1)
        if stem.endswith("out") and kind == "kernel":
            array = array.reshape(heads, -1, array.shape[-1])
        arrays[f"{stem}/{kind}".lstrip("/")] = array
    return arrays


def pt_safetensors(path, tensors, **edit):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        span = [len(data), len(data) + len(raw)]
        header[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=span) | edit
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def pt_logits(net):
    """Logits of two clips larger than the native ones, so that positions are interpolated."""
    video = torch.randn(2, 3, 16, 32, 48, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0]]), torch.tensor([0, 1])
    task, head = next(iter(net.heads.items()))
    with torch.no_grad():
        return net.eval()(video, task, *(boxes if head.config.kind == "box" else ()))


@pytest.mark.parametrize("name", PT_FAMILIES)
def test_pretrained_reads_every_family_exactly(name, tmp_path):
    (names, config), box = PT_FAMILIES[name], "detection" in name
    net = pt_model("box" if box else "clip", 80 if box else 5, **config)
    state, path = pt_renamed(net, names), tmp_path / "model.safetensors"
    if "Hugging Face" in name:
        if "VideoMAE" in name:
            state = {n: t for n, t in state.items() if not n.endswith("key.bias")}
        pt_safetensors(path, state)
        hub = dict(num_attention_heads=2, num_frames=16, image_size=[32, 32])
        hub |= dict(id2label=dict(enumerate("abcde")))
        (tmp_path / "config.json").write_text(json.dumps(hub))
        path = tmp_path if "memory" in name else path
    elif name == "Scenic ViViT":
        path = tmp_path / "vivit.npz"
        np.savez(path, **{f"optimizer/target/{n}": a for n, a in pt_flax(net, names).items()})
    elif "mmaction2" in name:
        state["backbone.pos_embed"] = M.sincos_table(32, 128)[None]
        for n in [n for n in state if box and "fc_cls" in n]:  # background comes first
            state[n] = torch.cat([torch.randn_like(state[n][:1]), state[n]])
        path = tmp_path / "checkpoint.pth"
        torch.save({"meta": {"epoch": 100}, "state_dict": state}, path)
    else:
        state |= {"decoder.norm.weight": torch.ones(3), "mask_token": torch.ones(1)}
        args = argparse.Namespace(num_frames=16, input_size=32, lr=1e-3)
        torch.save({"module": state, "args": args}, path := tmp_path / "checkpoint.pth")
    found = pretrained.load(path)
    assert found.family == name.removesuffix(" in memory").removesuffix(" for detection")
    assert found.config == net.encoder.config
    assert torch.equal(pt_logits(pretrained.build(found)), pt_logits(net))
    assert found.config.mean[0] == (0.485 if "MAE" in name else 0.5)
    assert found.heads == {task: head.config for task, head in net.heads.items()}
    assert found.classes == ({"clip": list("abcde")} if "Face" in name else {})
    assert ("mask_token: what pre" in "".join(found.report)) == name.startswith("VideoMAE")


@pytest.mark.parametrize("family", ["timm", "hf", "google", "big_vision", "stacked", "gap"])
def test_pretrained_image_weights_answer_a_still_clip_as_the_image(family, tmp_path):
    in_torch, old = family in ("timm", "hf"), family == "google"
    variant = dict(pool="norm-mean") if family == "gap" else PT_VIVIT
    variant = variant | (dict(eps=1e-12, final_eps=1e-12) if family == "hf" else {})
    net = pt_model(frames=1, tubelet=(1, 16, 16), gelu="none" if in_torch else "tanh", **variant)
    if family in ("big_vision", "stacked"):
        net.encoder.pos.data[:, 0] = 0  # there the class token joins after the positions
    if in_torch:
        state = pt_renamed(net, PT_TIMM if family == "timm" else PT_HF)
        state = {n: t[:, :, 0] if t.ndim == 5 else t for n, t in state.items()}
        torch.save(state, path := tmp_path / "vit.pth")
    else:
        arrays = pt_flax(net, PT_FLAX | ({} if old else dict(pos="pos_embedding")))
        arrays["embedding/kernel"] = arrays["embedding/kernel"][0]
        if family in ("big_vision", "stacked"):
            arrays["pos_embedding"] = arrays["pos_embedding"][:, 1:]
        if family == "stacked":
            for n in [n for n in arrays if "encoderblock_0" in n]:
                pair = arrays.pop(n), arrays.pop(n.replace("block_0", "block_1"))
                arrays[n.replace("block_0", "block")] = np.stack(pair)
        for new, name in PT_OLD.items() if old else ():
            arrays = {n.replace(new, name): a for n, a in arrays.items()}
        start = "" if old else "params/"
        np.savez(path := tmp_path / "vit.npz", **{start + n: a for n, a in arrays.items()})
    found = pretrained.load(path)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    frames = 8 if family == "gap" else 2  # why 2: inflate_image
    video = image[:, :, None].repeat(1, 1, frames, 1, 1)
    built = pretrained.build(found, frames=frames).eval()
    with torch.no_grad():
        logits = built(video, "clip")
        want = net.heads["clip"].fc(model_oracle(net.encoder, image[:, :, None])[0])
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)
        video[:, :, ::2] = 9.0  # the first frame of every tubelet
        assert torch.equal(built(video, "clip"), logits)


def pt_own(net, path, **edit):
    """Saves what cofinetune.py saves of a model."""
    config = dataclasses.asdict(net.encoder.config)
    heads = {task: dataclasses.asdict(head.config) for task, head in net.heads.items()}
    content = dict(model=net.state_dict(), model_config=config, heads=heads, step=7)
    content |= dict(classes={"box": ["run"]})
    torch.save(content | edit, path)


def test_pretrained_own_checkpoint_keeps_heads_of_the_same_name_kind_and_shape(tmp_path):
    net = pt_model("box", 6, pos="learned-axes", drop_path=0.1)
    pt_own(net, path := tmp_path / "x.pt")
    found = pretrained.load(path)
    pt_own(net, tmp_path / "last.pt")
    assert pretrained.load(tmp_path).config == found.config  # a run's folder
    assert found.config == net.encoder.config and found.classes == {"box": ["run"]}
    assert torch.equal(pt_logits(pretrained.build(found)), pt_logits(net))
    tasks = {"box": M.Head("box", 6), "new": M.Head("clip", 6)}
    built = pretrained.build(found, tasks, drop_path=0.0)
    assert torch.equal(pt_logits(built), pt_logits(net)) and not built.heads["new"].fc.weight.any()
    for head in (M.Head("box", 7), M.Head("clip", 6)):
        assert not pretrained.build(found, {"box": head}).heads["box"].fc.weight.any()
    config = dataclasses.asdict(net.encoder.config)
    for edit, words in (
        (dict(heads=None), "without heads"),
        (dict(model_config=config | {"std": (1, 2)}), "std"),
        (dict(model_config={"widht": 3}), "widht"),
        (dict(model_config={"width": "128"}), "width is '128'"),
        (dict(model_config=config | {"depth": 10**9}), "1000000000 blocks"),
        (dict(model_config=config | {"size": (1 << 20, 1 << 20)}), "tokens cannot be right"),
        (dict(model=net.encoder.state_dict()), "missing: encoder.pos, encoder.patch.weight"),
    ):
        pt_own(net, path, **edit)
        with pytest.raises(ValueError, match=words):
            pretrained.load(path)


def test_a_run_of_spottune_can_be_looked_at_and_not_begun_with(tmp_path):
    net = pt_model("box", 6)
    net.encoder = SpotTune(net.encoder)
    pt_own(net, path := tmp_path / "x.pt", recipe={})
    found = pretrained.load(path)
    assert found.routed and found.encoder.keys() == pt_model().encoder.state_dict().keys()
    with pytest.raises(ValueError, match="a run of SpotTune, .* expected a run of another method"):
        pretrained.initialise(path, {"box": M.Head("box", 6)}, {})
    said = " ".join(run_command("info", path).stdout.split())
    assert "box (box task), 6 classes" in said and "init takes nothing: SpotTune" in said


def test_pretrained_lists_all_that_is_missing_unexpected_misshapen_or_not_finite(tmp_path):
    state = pt_renamed(pt_model(size=(224, 224), **PT_MAE), PT_VIDEOMAE)
    del state["blocks.1.norm1.bias"]
    state |= {"blocks.0.gamma": torch.ones(128), "fc_norm.bias": torch.ones(5)}
    state["head.bias"][0] = float("nan")
    torch.save(state, path := tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        pretrained.load(path)
    assert str(error.value) == (
        f"{path}: read as VideoMAE: missing: encoder.blocks.1.norm1.bias; unexpected:"
        " blocks.0.gamma; of another shape: encoder.norm.bias (5,) for (128,);"
        " not finite: heads.clip.fc.bias"
    )


def test_pretrained_knows_the_attention_heads_of_videomae_small(tmp_path):
    net = pt_model(width=384, depth=1, heads=6, **PT_MAE)
    pt_safetensors(tmp_path / "model.safetensors", pt_renamed(net, PT_HF_QV))
    config = dict(num_attention_heads=16, num_frames=16, image_size=32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pretrained.load(tmp_path).config.heads == 6


def test_pretrained_leaves_out_a_head_that_reads_something_else(tmp_path):
    names = PT_HF_QV | dict(norm="videomae.layernorm")  # then the classifier reads token 0
    net = pt_model(size=(224, 224), **PT_BOX)
    pt_safetensors(tmp_path / "a.safetensors", pt_renamed(net, names))
    arrays = pt_flax(pt_model(frames=1, tubelet=(1, 16, 16), **PT_VIVIT), PT_FLAX)
    arrays["embedding/kernel"] = arrays["embedding/kernel"][0]
    np.savez(tmp_path / "b.npz", **arrays, **{"pre_logits/bias": np.zeros(9, np.float32)})
    for name, reason in (("a.safetensors", "the first token"), ("b.npz", "what is left out")):
        found = pretrained.load(tmp_path / name)
        assert not found.heads and not found.head_state and reason in "".join(found.report)


def test_pretrained_load_encoder_resizes_learned_positions_and_refuses_other_kinds(tmp_path):
    net = pt_model(**PT_VIVIT)
    pt_own(net, tmp_path / "x.pt")
    found = pretrained.load(tmp_path / "x.pt")
    larger = pretrained.build(found, frames=8, size=(48, 64)).encoder
    want = M.resize_positions(net.encoder.pos, (8, 2, 2), (4, 3, 4), "bicubic")
    assert torch.equal(larger.pos, want)
    bare = pretrained.build(found, cls=False, pool="norm-mean").encoder
    assert torch.equal(bare.pos, net.encoder.pos[:, 1:])
    for wrong in (dict(heads=4), dict(gelu="none"), dict(depth=1), PT_MAE | dict(cls=False)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pretrained.build(found, **wrong)
    torch.save(pt_renamed(pt_model(size=(224, 224), **PT_MAE), PT_VIDEOMAE), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="grid"):  # a sin-cos table is never made for another grid
        pretrained.build(pretrained.load(tmp_path / "x.pth"), size=(112, 112))


class PtEvil:
    def __reduce__(self):
        return os.system, ("touch pt_evil_was_here",)


def pt_hostile(folder):
    """Writes hostile files one by one; yields path and a word of the reason to refuse it."""
    path, tensors = folder / "x.safetensors", {"a": torch.zeros(4), "b": torch.zeros(2, 2)}
    for words, edit in (
        ("expected 16 on", dict(data_offsets=[0, 16])),
        ("expected 0 on", dict(data_offsets=[8, 24])),
        ("expected 0 on", dict(data_offsets=[24, 40])),
        ("header", dict(data_offsets=[-16, 0])),
        ("header", dict(shape=[5])),
        ("header", dict(shape=[3])),
        ("header", dict(shape=[2**62, 4])),
        ("header", dict(shape=[-4, -1])),
        ("header", dict(shape=[1.0])),
        ("header", dict(shape=[1] * 99)),
        ("header", dict(dtype="F31")),
        ("header", dict(dtype=[])),
        ("header", dict(shape=4)),
        ("header", dict(data_offsets=[0])),
    ):
        pt_safetensors(path, tensors, **edit)
        yield path, words
    for words, length, rest in (
        ("header of 0", 0, b""),
        ("header of", 2**63, b"{}"),
        ("header of 1000", 1000, b"{}"),
        ("not JSON", 200000, b"[" * 200000),
        ("not JSON", 2, b"\xff}"),
        ("of a list", 2, b"[]"),
        ("end at byte 0 of 1", 2, b"{}x"),
        ("no tensors", 2, b"{}"),
    ):
        path.write_bytes(struct.pack("<Q", length) + rest)
        yield path, words
    path, huge = folder / "x.pth", torch.zeros(1).expand(10**6, 10**6)
    for words, content in (
        ("holds posix.system", {"model": PtEvil()}),
        ("dense", {"a": huge}),
        ("no tensors", {}),
        ("but epoch, optimizer", {"epoch": 3, "optimizer": {}}),
        ("no tensors", {"a": 3}),
        ("no tensors", {"a": {"b": {"c": {"d": {"e": {"f": 3}}}}}}),
        ("dense", {"a": torch.zeros(3).to_sparse()}),
        ("a list", [1]),
        ("no transformer", {"a": torch.zeros(3)}),
    ):
        torch.save(content, path)
        yield path, words
    path.write_bytes(pickle.dumps({"model": PtEvil()}, protocol=2))
    yield path, "holds posix.system"
    np.savez(folder / "x.npz", a=np.array([PtEvil()], dtype=object))
    yield folder / "x.npz", "allow_pickle=False"
    np.savez(folder / "x.npz", a=np.array(["text"]))
    yield folder / "x.npz", "could not convert"
    for path in (folder / "x.npz", folder / "x.pth"):  # 30 MB of zeros in 30 kB
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy" if path.suffix == ".npz" else "x/data.pkl", bytes(30 << 20))
        yield path, "would unpack to"


def test_pretrained_refuses_hostile_files_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, words in pt_hostile(tmp_path):
        with pytest.raises(ValueError) as error:
            pretrained.load(path)
        text = str(error.value)
        assert text.startswith(f"{path}: ") and words in text and "\n" not in text, text
    assert not (tmp_path / "pt_evil_was_here").exists()


def test_pretrained_refuses_settings_that_make_no_sense(tmp_path):
    pt_safetensors(tmp_path / "model.safetensors", pt_renamed(pt_model(**PT_HF_MAE), PT_HF_QV))
    good = dict(num_attention_heads=2, num_frames=16, image_size=32, model_type="videomae")
    for edit, words in (
        (dict(image_size=[32] * 3), "no ModelConfig"),
        (dict(image_size=["a", "b"]), "no ModelConfig"),
        (dict(image_size=10**9), "cannot be right"),
        (dict(num_frames=10**400), "cannot be right"),
        (dict(num_frames=-2), "frames is -2"),
        (dict(num_attention_heads=0), "heads is 0"),
        (dict(num_attention_heads="2"), "num_attention_heads is '2'"),
        (dict(hidden_act="relu"), "hidden_act is 'relu'"),
        (dict(layer_norm_eps=-1.0), "eps is -1.0"),
        (dict(id2label=["x"]), "id2label"),
        (dict(image_mean=[123.7, 116.3, 103.5]), "expected 0 to 1"),
        (dict(image_mean=["a"] * 3), "do not fit together"),
        (dict(image_std=[0.1] * 2), "three numbers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(good | edit))
        with pytest.raises(ValueError, match=words) as error:
            pretrained.load(tmp_path)
        assert str(error.value).startswith(f"{tmp_path}/") and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_pretrained_damaged_files_load_or_raise_one_sentence(suffix, tmp_path):
    net = pt_model(frames=32, width=64, depth=1, **PT_VIVIT)
    path, rng = tmp_path / f"x{suffix}", np.random.default_rng(0)
    if suffix == ".npz":
        np.savez(path, **pt_flax(net, PT_FLAX))
    elif suffix == ".pth":
        torch.save(pt_renamed(net, PT_HF), path)
    else:
        pt_safetensors(path, pt_renamed(net, PT_HF))
    whole = path.read_bytes()
    pretrained.load(path)
    for trial in range(60):
        damaged = bytearray(whole[: rng.integers(len(whole))] if trial % 3 == 0 else whole)
        edge = min(3000, len(damaged))  # the directories are at both ends
        for at in (*rng.integers(-edge, edge, 4), rng.integers(len(damaged))) if edge else ():
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            pretrained.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_pretrained_is_shown_by_info(tmp_path):
    state = pt_renamed(pt_model(size=(224, 224), **PT_MAE), PT_VIDEOMAE)
    torch.save({"model": state}, path := tmp_path / "x.pth")
    shown = run_command("info", path).stdout
    for words in ("VideoMAE", "16 frames of 224 x 224", "0.485", "clip task), 5", "does not say"):
        assert words in shown
    umt = state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"][:, :, :1]}
    torch.save({"module": umt}, path)
    assert "--frames 8" in run_command("info", path, code=2).stderr
    assert "UMT" in run_command("info", path, "--frames", 8).stdout
    for path in (tmp_path, tmp_path / "y.pth"):
        lines = run_command("info", path, code=2).stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"error: {tmp_path}")


def pt_oracle(kind, std=0.1, **settings):
    """A Hugging Face model with random parameters."""
    transformers = pt_transformers()
    task = "ForImageClassification" if kind == "ViT" else "ForVideoClassification"
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    config = getattr(transformers, f"{kind}Config")(**sizes | dict(num_labels=5) | settings)
    torch.manual_seed(0)
    oracle = getattr(transformers, kind + task)(config).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return oracle


def pt_parity(oracle, folder, video, **options):
    """The oracle and build(load(folder)) give the same logits for video (B, T, 3, H, W); an image
    model sees the first frame."""
    image = oracle.config.model_type == "vit"
    net = pretrained.build(pretrained.load(folder), **(dict(frames=2) if image else {})).eval()
    with torch.no_grad():
        want = oracle(video[:, 0] if image else video, **options).logits
        got = net(video.transpose(1, 2), "clip")
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Families that transformers does not have, or not as published: their forward, restated plainly
# from their repositories, reads the file's own tensors
# ------------------------------------------------------------------------------------------------


def pt_published(state, video, pos, start="", heads=1):
    """Tokens before the last norm, (B, [1 +] N, D), by the names of timm: VideoMAE, UMT, MAE-ST,
    V-JEPA. `pos`: what is added to the patches (MAE-ST: to the class token too)."""
    s = {name.removeprefix(start): tensor for name, tensor in state.items()}
    weight = s["patch_embed.proj.weight"]
    x = F.conv3d(video, weight, s["patch_embed.proj.bias"], stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    if "cls_token" in s:
        x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + pos
    width, depth = x.shape[-1], sum(name.endswith("norm1.weight") for name in s)
    for i in range(depth):
        b = {n.removeprefix(f"blocks.{i}."): t for n, t in s.items() if f"blocks.{i}." in n}
        y = F.layer_norm(x, (width,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        if "attn.q.weight" in b:
            qkv = [F.linear(y, b[f"attn.{n}.weight"], b[f"attn.{n}.bias"]) for n in "qkv"]
        else:
            bias = b.get("attn.qkv.bias")
            if bias is None:
                q, v = b["attn.q_bias"], b["attn.v_bias"]
                bias = torch.cat([q, torch.zeros_like(v), v])
            qkv = F.linear(y, b["attn.qkv.weight"], bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        share = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1)
        y = (share @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (width,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return x


def pt_sinusoid(rows, width):
    """get_sinusoid_encoding_table of VideoMAE and UMT."""
    table = np.array(
        [[row / np.power(10000, 2 * (j // 2) / width) for j in range(width)] for row in range(rows)]
    )
    table[:, 0::2], table[:, 1::2] = np.sin(table[:, 0::2]), np.cos(table[:, 1::2])
    return torch.tensor(table, dtype=torch.float)[None]


def pt_jepa_table(depth, side, width):
    """get_3d_sincos_pos_embed of V-JEPA, with uniform_power."""
    part = int(np.ceil(width / 6) * 2)
    h, d, w = np.meshgrid(np.arange(side), np.arange(depth), np.arange(side))
    omega = 1 / 10000 ** (np.arange(part // 2) / (part / 2))
    parts = []
    for axis in (d, h, w):
        angle = np.einsum("m,d->md", axis.reshape(-1), omega)
        parts.append(np.concatenate([np.sin(angle), np.cos(angle)], 1))
    return torch.tensor(np.concatenate(parts, 1)[:, :width], dtype=torch.float)[None]


def pt_clips(frames, size, count=2):
    return torch.randn(count, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


def pt_close(got, want):
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def pt_normed(x, state, name, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


PT_SMALL = dict(width=64, depth=2, heads=1)


def test_pretrained_reads_videomae_v2_from_hugging_face(tmp_path):
    """`model.` before the names, settings nested in model_config; 1408 wide it has 16 heads."""
    net = pt_model(frames=4, size=(32, 32), **PT_SMALL, **PT_MAE)
    state = {f"model.{n}": t for n, t in pt_renamed(net, PT_VIDEOMAE).items() if "head" not in n}
    pt_safetensors(tmp_path / "model.safetensors", state)
    inner = dict(img_size=32, patch_size=16, num_classes=0, embed_dim=64, depth=2, num_heads=1)
    inner |= dict(qkv_bias=True, qk_scale=None, layer_norm_eps=1e-6, init_values=0.0, num_frames=4)
    inner |= dict(use_mean_pooling=True, tubelet_size=2, cos_attn=False)
    outer = dict(model_type="VideoMAEv2_Base", architectures=["VideoMAEv2_Base"])
    config = tmp_path / "config.json"
    config.write_text(json.dumps(outer | dict(model_config=inner)))
    processor = dict(crop_size={"height": 9, "width": 9}, image_mean=PT_IMAGENET["mean"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = pretrained.load(tmp_path)
    video = pt_clips(4, 32)
    want = pt_published(state, video, pt_sinusoid(8, 64), "model.")
    with torch.no_grad():
        pooled, tokens = pretrained.build(found).eval().encoder(video)
    pt_close(pooled, pt_normed(want.mean(1), state, "model.fc_norm"))
    pt_close(tokens.flatten(1, 3), pt_normed(want, state, "model.fc_norm"))
    assert found.family == "VideoMAE" and found.config.mean == PT_IMAGENET["mean"]
    for edit, words in ((dict(cos_attn=True), "cos_attn"), (dict(qk_scale=0.1), "qk_scale")):
        config.write_text(json.dumps(outer | dict(model_config=inner | edit)))
        with pytest.raises(ValueError, match=words):
            pretrained.load(tmp_path)


@pytest.mark.parametrize("kind", ["pretrained", "finetuned", "AVA", "finetuned, 16 frames"])
def test_pretrained_reads_umt(kind, tmp_path):
    """One frame a tubelet, 8 frames of 224: nothing in a finetuned file says so, and positions of
    16 frames would be off by half their size."""
    net = pt_model(
        "box" if kind == "AVA" else "clip",
        80 if kind == "AVA" else 5,
        frames=8,
        size=(64, 64),
        tubelet=(1, 16, 16),
        **PT_SMALL,
        **(PT_MAE if "fine" in kind else PT_BOX),
    )
    names = PT_VIDEOMAE if "fine" in kind else PT_VIDEOMAE | dict(norm="norm")
    state, pos, start = pt_renamed(net, names), pt_sinusoid(8 * 16, 64), ""
    content = {"module": state, "args": argparse.Namespace(input_size=64)}
    if kind == "pretrained":
        start = "encoder."
        state = {start + name: tensor for name, tensor in state.items() if "head" not in name}
        state |= {f"clip_decoder.0.{n}.weight": torch.ones(3) for n in ("head", "norm")}
        content |= {"module": state}
    if "16" in kind:  # then the repository makes the positions a parameter
        pos = state["pos_embed"] = F.interpolate(pos.mT, 256, mode="linear").mT
    torch.save(content, path := tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"read as UMT: .* frames = 8 in the recipe's \[model\]"):
        pretrained.load(path)
    frames = 16 if "16" in kind else 8
    found = pretrained.load(path, frames=frames)
    video = pt_clips(frames, 64)
    want = pt_published(state, video, pos, start)
    built = pretrained.build(found).eval()
    with torch.no_grad():
        pooled, tokens = built.encoder(video)
    norm = start + ("fc_norm" if "fine" in kind else "norm")
    pt_close(tokens.flatten(1, 3), pt_normed(want, state, norm))
    assert found.family == "UMT" and list(found.heads) == {"pretrained": [], "AVA": ["box"]}.get(
        kind, ["clip"]
    )
    if "fine" in kind:
        pooled = pt_normed(want.mean(1), state, norm)
        with torch.no_grad():
            logits = F.linear(pooled, state["head.weight"], state["head.bias"])
            pt_close(built(video, "clip"), logits)
    content["args"] = argparse.Namespace(num_frames=frames, num_segments=1, input_size=64)
    torch.save(content, path)
    assert pretrained.load(path).config == found.config
    assert pretrained.load(path, frames=4).config == found.config  # what the file says goes first


def pt_v_jepa(pos):
    """{name: tensor} of a V-JEPA encoder, of width 64."""
    net = pt_model(frames=16, size=(224, 224), gelu="none", **PT_SMALL | dict(depth=1))
    state = pt_renamed(net, PT_TIMM)
    state = {n: t for n, t in state.items() if not n.startswith("head")}
    return state | {"pos_embed": pos}


def pt_predictor(kinds):
    return {f"module.backbone.mask_tokens.{i}": torch.zeros(1, 1, 8) for i in range(kinds)}


@pytest.mark.parametrize("wrapped", [True, False])
def test_pretrained_reads_v_jepa(wrapped, tmp_path):
    state = pt_v_jepa(pt_jepa_table(8, 14, 64))
    content, path = state, tmp_path / "vitl16.pth.tar"
    if wrapped:
        names = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
        other = {name: tensor + 1 for name, tensor in names.items()}
        content = {"encoder": other, "predictor": pt_predictor(2), "target_encoder": names}
        content |= {"opt": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 300, "lr": 1e-3}
    torch.save(content, path)
    found = pretrained.load(path)
    video = pt_clips(16, 224, 1)
    want = pt_normed(pt_published(state, video, state["pos_embed"]), state, "norm")
    with torch.no_grad():
        pooled, tokens = pretrained.build(found).eval().encoder(video)
    pt_close(tokens.flatten(1, 3), want)
    pt_close(pooled, want.mean(1))
    assert found.family == "V-JEPA" and found.config.mean == PT_IMAGENET["mean"]
    assert (found.config.frames, found.config.size) == (16, (224, 224))


def pt_mae_st():
    """({name: tensor} of MAE-ST, its positions)."""
    net = pt_model(frames=8, size=(48, 48), **PT_SMALL, **PT_VIVIT | dict(pool="mean-norm"))
    names = PT_TIMM | dict(q="attn.q", k="attn.k", v="attn.v")
    state = pt_renamed(net, names)
    del state["pos_embed"]
    state["pos_embed_spatial"] = torch.randn(1, 9, 64)
    state["pos_embed_temporal"] = torch.randn(1, 4, 64)
    state["pos_embed_class"] = torch.randn(1, 1, 64)
    space = state["pos_embed_spatial"].repeat(1, 4, 1)
    table = space + torch.repeat_interleave(state["pos_embed_temporal"], 9, dim=1)
    return state, torch.cat([state["pos_embed_class"], table], 1)


@pytest.mark.parametrize("kind", ["finetuned", "pretrained"])
def test_pretrained_reads_mae_st(kind, tmp_path):
    state, pos = pt_mae_st()
    if kind == "pretrained":
        state = {n: t for n, t in state.items() if not n.startswith("head")}
        for name in ("decoder_cls_token", "mask_token", "decoder_embed.weight"):
            state[name] = torch.zeros(2, 2)
        state["decoder_pos_embed_spatial"] = state["decoder_blocks.0.attn.q.bias"] = torch.ones(3)
    torch.save({"model_state": state, "epoch": 1}, path := tmp_path / "x.pth")
    found, video = pretrained.load(path), pt_clips(8, 48)
    want = pt_published(state, video, pos)
    built = pretrained.build(found).eval()
    with torch.no_grad():
        pooled, tokens = built.encoder(video)
        pt_close(pooled, pt_normed(want[:, 1:].mean(1), state, "norm"))
        pt_close(tokens.flatten(1, 3), pt_normed(want[:, 1:], state, "norm"))
        if kind == "finetuned":
            pt_close(
                built(video, "clip"), F.linear(pooled, state["head.weight"], state["head.bias"])
            )
    assert found.family == "MAE-ST" and found.config.std == (0.225,) * 3
    del state["pos_embed_class"]
    torch.save({"model_state": state}, path)
    with pytest.raises(ValueError, match="unexpected: .*pos_space"):
        pretrained.load(path)


# ------------------------------------------------------------------------------------------------
# V-JEPA 2
# ------------------------------------------------------------------------------------------------


def pt_transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def pt_random(oracle, std=0.1):
    torch.manual_seed(0)
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return oracle.eval()


def pt_v_jepa_2(size=32, std=0.1, name="VJEPA2Model", **settings):
    """transformers' V-JEPA 2 with random parameters, for frames of size x size pixels."""
    transformers = pt_transformers()
    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1)
    sizes |= dict(crop_size=size, frames_per_clip=8, num_pooler_layers=1) | settings
    return pt_random(getattr(transformers, name)(transformers.VJEPA2Config(**sizes)), std)


def pt_same_tokens(oracle, encoder, video):
    with torch.no_grad():
        want = oracle(video.transpose(1, 2), skip_predictor=True).last_hidden_state
        pooled, tokens = encoder.eval()(video)
    pt_close(tokens.flatten(1, 3), want)
    pt_close(pooled, want.mean(1))


@pytest.mark.parametrize("name", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
def test_pretrained_v_jepa_2_equals_transformers(name, tmp_path):
    oracle = pt_v_jepa_2(name=name)
    oracle.save_pretrained(tmp_path)
    found = pretrained.load(tmp_path)
    config = found.config
    assert (found.family, config.pos, config.frames, config.size) == (
        "V-JEPA 2", "rope", 8, (32, 32)
    )  # fmt: skip
    assert not found.heads and "predictor" in "".join(found.report)
    oracle = oracle if name == "VJEPA2Model" else oracle.vjepa2
    pt_same_tokens(oracle, pretrained.build(found).encoder, pt_clips(8, 32))
    pt_same_tokens(oracle, pretrained.build(found).encoder, pt_clips(12, 32))  # longer clips
    larger = pt_v_jepa_2(64)  # transformers takes the rows and columns from its configuration
    larger.load_state_dict(oracle.state_dict())
    pt_same_tokens(larger, pretrained.build(found).encoder, pt_clips(4, 64))
    heads = {"k400": M.Head("clip", 4), "ava": M.Head("box", 3)}
    other = pretrained.build(found, heads, frames=4, size=(64, 64), drop_path=0.1)
    pt_same_tokens(larger, other.encoder, pt_clips(4, 64))
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9]])
    loss = other(pt_clips(4, 64), "ava", boxes, torch.tensor([1])).sum()
    (loss + other(pt_clips(4, 64), "k400").sum()).backward()  # heads begin at zero
    assert other.heads["ava"].fc.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_pretrained_v_jepa_2_equals_transformers_at_full_size(tmp_path):
    """The released ViT-L, for clips of 8 frames."""
    oracle = pt_v_jepa_2(
        256,
        0.02,
        frames_per_clip=64,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
    )
    oracle.save_pretrained(tmp_path)
    pt_same_tokens(oracle, pretrained.build(pretrained.load(tmp_path)).encoder, pt_clips(8, 256, 1))


@pytest.mark.parametrize("form", ["hub", "bare", "with a table"])
def test_pretrained_v_jepa_2_from_its_own_files(form, tmp_path):
    """Some of which hold the table of V-JEPA, that V-JEPA 2 does not read."""
    oracle = pt_v_jepa_2()
    state = {}
    for name, tensor in oracle.encoder.state_dict().items():
        name = name.replace("embeddings.patch_embeddings", "patch_embed")
        name = name.replace("layer.", "blocks.").replace("layernorm", "norm")
        state[name.replace("attention", "attn")] = tensor
    for name in [name for name in state if ".query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(parts)
    if form == "with a table":
        state["pos_embed"] = pt_jepa_table(4, 2, 128)
    names = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
    content = state if form == "bare" else {"encoder": names, "predictor": pt_predictor(10)}
    torch.save(content, path := tmp_path / "vitl.pt")
    found = pretrained.load(path)
    assert found.family == "V-JEPA 2" and found.config.pos == "rope"
    pt_same_tokens(oracle, pretrained.build(found).encoder, pt_clips(8, 32))
    assert ("does not read" in "".join(found.report)) == (form == "with a table")
    with pytest.raises(ValueError, match="pos learned for rope"):
        pretrained.build(found, pos="learned")
    if form == "with a table":  # and nothing beside it tells which of the two it is
        torch.save(state, path)
        with pytest.raises(ValueError, match="16 positions are not V-JEPA's .* may be either"):
            pretrained.load(path)


@pytest.mark.slow
def test_rotary_positions_of_oblong_clips_and_under_compile():
    """Frequencies and pairs as in V-JEPA 2's rotate_queries_or_keys; rows and columns differ."""
    t, h, w, d = 2, 3, 4, 20  # 6 numbers for an axis, 2 stay
    x = torch.randn(1, 2, t * h * w, d)
    want = x.clone()
    for n in range(t * h * w):
        place = n // (h * w), n // w % h, n % w
        for axis in range(3):
            for j in range(6):
                angle = place[axis] / 10000 ** ((j % 3) / 3)  # not j // 2: V-JEPA 2's mistake
                column = 6 * axis + j
                mate = column + 1 if j % 2 == 0 else column - 1
                sign = -1 if j % 2 == 0 else 1
                turned = x[..., n, column] * math.cos(angle)
                want[..., n, column] = turned + sign * x[..., n, mate] * math.sin(angle)
    torch.testing.assert_close(M.rotate(x, (t, h, w)), want, rtol=0, atol=1e-6)
    net = tiny_model(pos="rope", depth=2).eval()
    video = torch.randn(2, 3, 8, 48, 32)
    graph = torch.compile(net.encoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(graph(video)[0], net.encoder(video)[0])
        assert net.encoder(video[:, :, :4, :24])[1].shape[1:4] == (2, 3, 4)
    with pytest.raises(ValueError, match="rope needs 6"):
        M.ModelConfig(width=16, heads=4, pos="rope")


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def pt_still(oracle, encoder, image, **inputs):
    """A still clip of two frames gives the tokens of the image."""
    inputs = inputs or dict(pixel_values=image)
    with torch.no_grad():
        want = oracle(**inputs).last_hidden_state
        _, tokens = encoder.eval()(image[:, :, None].repeat(1, 1, 2, 1, 1))
    tokens = tokens.flatten(1, 3)
    pt_close(tokens, want[:, want.shape[1] - tokens.shape[1] :])
    return want


PT_SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)


@pytest.mark.parametrize("kind", ["vision", "both sides", "classifier", "siglip 2"])
def test_pretrained_reads_siglip_of_hugging_face(kind, tmp_path):
    transformers = pt_transformers()
    vision, text = PT_SIZES | dict(image_size=64), PT_SIZES | dict(vocab_size=9)
    both = dict(vision_config=vision, text_config=text)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    inputs = {}
    if kind == "siglip 2":
        config = transformers.Siglip2VisionConfig(**PT_SIZES, num_patches=16)
        oracle = pt_random(transformers.Siglip2VisionModel(config))
        rows = image.unflatten(3, (4, 16)).unflatten(2, (4, 16)).permute(0, 2, 4, 3, 5, 1)
        inputs = dict(pixel_values=rows.flatten(3).flatten(1, 2))  # (2, 16, 16 * 16 * 3)
        inputs |= dict(spatial_shapes=torch.tensor([[4, 4]] * 2))
        inputs |= dict(pixel_attention_mask=torch.ones(2, 16))
    elif kind == "vision":
        config = transformers.SiglipVisionConfig(**vision)
        oracle = pt_random(transformers.SiglipVisionModel(config))
    elif kind == "both sides":
        oracle = pt_random(transformers.SiglipModel(transformers.SiglipConfig(**both)))
    else:
        config = transformers.SiglipConfig(**both, num_labels=5)
        oracle = pt_random(transformers.SiglipForImageClassification(config))
    oracle.save_pretrained(tmp_path)
    found = pretrained.load(tmp_path)
    assert found.family == "SigLIP" and not found.config.cls and found.config.gelu == "tanh"
    built = pretrained.build(found, frames=2)
    part = oracle.vision_model if kind in ("both sides", "classifier") else oracle
    pt_still(part, built.encoder, image, **inputs)
    assert list(found.heads) == (["clip"] if kind == "classifier" else [])
    if kind == "classifier":
        with torch.no_grad():
            video = image[:, :, None].repeat(1, 1, 2, 1, 1)
            pt_close(built.eval()(video, "clip"), oracle(pixel_values=image).logits)


def pt_dinov2(**settings):
    transformers = pt_transformers()
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=14)
    config = transformers.Dinov2Config(**sizes | dict(image_size=56) | settings)
    return pt_random(transformers.Dinov2Model(config), 0.3)


def pt_dinov2_original(state):
    """dinov2's own names."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks."),
            ("attention.output.dense", "attn.proj"),
            ("attention.attention", "attn"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("mlp.weights_in", "mlp.w12"),
            ("mlp.weights_out", "mlp.w3"),
            ("layernorm", "norm"),
        ):
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in [name for name in renamed if ".query." in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("query", "qkv")] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("form", ["folder", "in memory", "original"])
def test_pretrained_reads_dinov2_with_layer_scale_folded(form, tmp_path):
    oracle = pt_dinov2()
    oracle.save_pretrained(path := tmp_path)
    if form == "in memory":
        pt_safetensors(tmp_path / "model.safetensors", oracle.state_dict())
    elif form == "original":
        state = weight_files.read_safetensors(tmp_path / "model.safetensors")
        torch.save(pt_dinov2_original(state), path := tmp_path / "dinov2_vits14_pretrain.pth")
    found = pretrained.load(path)
    assert found.family == "DINOv2" and found.config.mean == PT_IMAGENET["mean"]
    image = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    encoder = pretrained.build(found, frames=2).encoder
    want = pt_still(oracle, encoder, image)
    with torch.no_grad():
        pt_close(encoder(image[:, :, None].repeat(1, 1, 2, 1, 1))[0], want[:, 0])


# ------------------------------------------------------------------------------------------------
# Other networks: refused by name, though they share names with the ones above
# ------------------------------------------------------------------------------------------------

PT_ADDED = {  # what a file has beside V-JEPA 2's or a timm ViT's names: words of the refusal
    "V-JEPA 2.1": ("video", "patch_embed_img.proj.weight norms_block.0.weight video_mod_embed"),
    "factorised": ("video", "SpatialTransformer.norm.weight TemporalTransformer.norm.weight"),
    "InternVideo2": ("video", "blocks.0.attn.q_norm.weight blocks.0.attn.k_norm.weight"),
    "MViT": ("video", "blocks.0.attn.pool_q.weight blocks.0.attn.rel_pos_h"),
    "Hiera": ("video", "pos_embed_spatial pos_embed_temporal blocks.1.proj.weight"),
    "cosine attention": ("video", "blocks.0.attn.scale"),
    "TimeSformer": ("image", "time_embed blocks.0.temporal_attn.qkv.weight"),
    "register tokens": ("image", "reg_token"),
    "with registers": ("image", "register_tokens mask_token"),
    "DINOv3": ("image", "storage_tokens rope_embed.periods blocks.0.ls1.gamma"),
    "distillation": ("image", "dist_token head_dist.weight"),
    "BEiT, Swin": ("image", "blocks.0.attn.relative_position_bias_table"),
    "gamma_1": ("image", "blocks.0.gamma_1 blocks.0.gamma_2"),
    "SwiGLU": ("image", "blocks.0.mlp.w12.weight blocks.0.mlp.w3.weight"),
    "EVA-02": ("image", "rope.freqs_cos"),
    "CLIP": ("image", "norm_pre.weight"),
}


@pytest.mark.parametrize("what", PT_ADDED)
def test_pretrained_refuses_what_shares_names_and_computes_something_else(what, tmp_path):
    kind, added = PT_ADDED[what]
    net = pt_model(frames=2, size=(32, 32), gelu="none", **PT_SMALL, **PT_VIVIT)
    state = pt_renamed(net, PT_TIMM)
    if kind == "video":
        state = {n: t for n, t in state.items() if n not in ("pos_embed", "cls_token")}
        state = {n: t for n, t in state.items() if not n.startswith("head")}
    else:
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    torch.save(state, path := tmp_path / "x.pth")
    assert pretrained.load(path).family == {"video": "V-JEPA 2", "image": "timm ViT"}[kind]
    for start in ("", "module."):
        new = state | {name: torch.ones(1, 1, 64) for name in added.split()}
        torch.save({"model": {start + name: t for name, t in new.items()}}, path)
        with pytest.raises(ValueError) as error:
            pretrained.load(path)
        assert "refused: " in str(error.value) and what in str(error.value)


@pytest.mark.parametrize(
    "edit, words",
    [
        ("q_bias", "no family that is known"),  # a head, and no table: not V-JEPA 2
        ("no bias", "no family that is known"),  # as timm's networks that norm after the layers
        ("learned", "positions are not V-JEPA's"),
        ("beit", "no family that is known"),  # a class token and VideoMAE's biases
    ],
)
def test_pretrained_refuses_clips_of_no_family_that_is_known(edit, words, tmp_path):
    net = pt_model(frames=2, size=(32, 32), gelu="none", **PT_SMALL)
    state = pt_renamed(net, PT_VIDEOMAE | dict(norm="norm") if edit == "beit" else PT_TIMM)
    if edit == "learned":
        state = {n: t for n, t in state.items() if not n.startswith("head")}
    else:
        del state["pos_embed"]
    if edit == "no bias":
        state = {n: t for n, t in state.items() if not n.endswith("qkv.bias")}
    if edit == "beit":
        state["cls_token"] = torch.ones(1, 1, 64)
    torch.save(state, path := tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words):
        pretrained.load(path)


PT_REAL = {  # class of transformers: settings, words of the refusal
    "TimesformerModel": (dict(image_size=32, num_frames=4) | PT_SIZES, "'timesformer'", "TimeSf"),
    "CLIPVisionModel": (dict(image_size=32) | PT_SIZES, "'clip_vision_model'", "CLIP"),
    "BeitModel": (dict(image_size=32) | PT_SIZES, "'beit'", "BEiT|relative|gamma"),
    "DeiTModel": (dict(image_size=32) | PT_SIZES, "'deit'", "DeiT"),
    "DINOv3ViTModel": (dict(image_size=32) | PT_SIZES, "'dinov3_vit'", "register|rotary"),
    "Dinov2WithRegistersModel": (
        dict(image_size=28, hidden_size=64, num_hidden_layers=2, num_attention_heads=2),
        "'dinov2_with_registers'",
        "registers",
    ),
    "HieraModel": (dict(embed_dim=16, depths=[1] * 4, num_heads=[1] * 4), "'hiera'", "Hiera"),
    "VideoPrismVisionModel": (
        dict(num_spatial_layers=1, num_temporal_layers=1, image_size=36, num_frames=4)
        | dict(hidden_size=64, num_attention_heads=4, intermediate_size=128),
        "'videoprism_vision_model'",
        "VideoPrism",
    ),
}


@pytest.mark.parametrize("name", PT_REAL)
def test_pretrained_refuses_other_networks_of_transformers_by_name(name, tmp_path):
    transformers = pt_transformers()
    settings, by_config, by_names = PT_REAL[name]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    model = getattr(transformers, name)
    model(model.config_class(**settings)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"config.json says {by_config}"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=f"refused: .*({by_names})"):
        pretrained.load(tmp_path)


def test_pretrained_refuses_swiglu_and_quickgelu(tmp_path):
    pt_dinov2(use_swiglu_ffn=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SwiGLU"):
        pretrained.load(tmp_path)
    state = weight_files.read_safetensors(tmp_path / "model.safetensors")
    torch.save(pt_dinov2_original(state), path := tmp_path / "dinov2_vitg14_pretrain.pth")
    with pytest.raises(ValueError, match="SwiGLU"):
        pretrained.load(path)
    config = dict(architecture="vit_base_patch16_clip_quickgelu_224")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not a GELU"):
        pretrained.load(tmp_path)


# ------------------------------------------------------------------------------------------------
# Files as trainings leave them
# ------------------------------------------------------------------------------------------------


def pt_state():
    """A small VideoMAE's tensors."""
    return pt_renamed(pt_model(size=(224, 224), **PT_SMALL | dict(depth=1), **PT_MAE), PT_VIDEOMAE)


def pt_same(path, state, **options):
    found = pretrained.load(path, **options)
    assert torch.equal(found.encoder["blocks.0.fc1.weight"], state["blocks.0.mlp.fc1.weight"])
    return found


@pytest.mark.parametrize("zipped", [True, False])
def test_pretrained_reads_what_training_scripts_save_beside_weights(zipped, tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    history = module.HistoryBuffer()
    history.log = np.arange(3.0)
    monkeypatch.setitem(sys.modules, "mmengine.logging.history_buffer", module)
    monkeypatch.setitem(sys.modules, "mmengine.logging", types.ModuleType("mmengine.logging"))
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    content = {
        "model": pt_state(),
        "lr": [np.float64(1e-3), np.float32(2), np.int64(3), np.bool_(True), np.str_("four")],
        "loss": np.linspace(0, 1, 5),
        "args": argparse.Namespace(out=pathlib.Path("/a/b"), lr=np.float64(1e-3), num_frames=16),
        "path": pathlib.PurePosixPath("c/d"),
        "windows": pathlib.PureWindowsPath("c/d"),
        "message_hub": {"log": history},
    }
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        monkeypatch.delitem(sys.modules, name)
    pt_same(path, content["model"])
    read = weight_files.read_torch(path)
    assert read["lr"] == [1e-3, 2, 3, True, "four"] and read["args"].lr == 1e-3
    assert read["args"].out == "/a/b" and read["path"] == "c/d"


def test_pretrained_reads_numbers_that_another_numpy_saved(tmp_path):
    """numpy moved multiarray from core to _core."""
    torch.save({"model": pt_state(), "lr": np.float64(0.5)}, path := tmp_path / "x.pth")
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in parts.items():
            if entry.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            archive.writestr(entry, data)
    assert weight_files.read_torch(path)["lr"] == 0.5


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "model._orig_mod.",
        "module.model.backbone.",
        "student.",
        "_fsdp_wrapped_module.",
    ],
)
@pytest.mark.parametrize(
    "wrapper",
    ["", "model_state_dict", "model_state", "state_dict", "params", "model_ema", "net.model", "my"],
)
def test_pretrained_strips_prefixes_and_wrappers(prefix, wrapper, tmp_path):
    state = pt_state()
    content = {prefix + name: tensor for name, tensor in state.items()}
    if prefix == "_orig_mod.":  # also of single blocks, as of a wrapped one
        content = {name.replace("s.0.", "s.0._orig_mod."): t for name, t in content.items()}
    if prefix == "module.":  # torch.optim.swa_utils.AveragedModel
        content["n_averaged"] = torch.tensor(3)
    for key in wrapper.split(".")[::-1] if wrapper else ():
        content = {key: content, "epoch": 3}
    torch.save(content, path := tmp_path / "x.pt")
    pt_same(path, state)


def test_pretrained_takes_the_weights_not_their_average_and_says_so(tmp_path):
    state = pt_state()
    average = {name: tensor + 1 for name, tensor in state.items()}
    optimiser = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}
    content = {"model_ema": average, "optimizer": optimiser, "model": state}
    torch.save(content, path := tmp_path / "x.pt")
    assert "not its running average in model_ema" in "".join(pt_same(path, state).report)
    torch.save({"one": state, "two": average}, path)
    with pytest.raises(ValueError, match="but one, two"):
        pretrained.load(path)


def pt_sharded(folder, suffix):
    """A VideoMAE as save_pretrained leaves it above its max_shard_size; -> the index, the state."""
    net = pt_model(frames=16, size=(32, 32), **PT_SMALL, **PT_HF_MAE)
    state = pt_renamed(net, PT_HF_QV)
    stem, table = ("model" if suffix == "safetensors" else "pytorch_model"), {}
    for i in (1, 2):
        part = {name: state[name] for name in list(state)[i % 2 :: 2]}
        shard = f"{stem}-{i:05}-of-00002.{suffix}"
        table |= dict.fromkeys(part, shard)
        write = pt_safetensors if suffix == "safetensors" else lambda p, t: torch.save(t, p)
        write(folder / shard, part)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    config = dict(num_attention_heads=1, num_frames=16, image_size=32, model_type="videomae")
    (folder / "config.json").write_text(json.dumps(config))
    return index, net, shard


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_pretrained_reads_shards_by_their_index(suffix, tmp_path):
    index, net, shard = pt_sharded(tmp_path, suffix)
    for path in (tmp_path, index):
        assert torch.equal(pt_logits(pretrained.build(pretrained.load(path))), pt_logits(net))
    with pytest.raises(ValueError, match="one of 2 shards; name the folder, or .*index.json"):
        pretrained.load(tmp_path / shard)
    text = index.read_text()
    for edit, words in (
        (text.replace(shard, "../" + shard), "expected files beside it"),
        (text.replace(shard, index.name), "index.json', expected files beside it"),
        (text.replace(shard, "other.bin"), "other.bin: does not exist"),
        (text.replace("fc_norm.bias", "fc_norm.bios"), "fc_norm.bias, fc_norm.bios"),
        ("{}", "without a weight_map"),
    ):
        index.write_text(edit)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            pretrained.load(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match="shards without their index"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize(
    "start, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"/annex/objects/SHA256E-s9--0.pth\n", "git-annex pointer"),
        (b"<!DOCTYPE html><html><head>", "web page"),
        (b"", "is empty"),
    ],
)
def test_pretrained_names_files_that_only_stand_for_weights(start, words, tmp_path):
    for name in ("x.pth", "x.npz", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ValueError, match=words):
            pretrained.load(tmp_path / name)
    pt_safetensors(tmp_path / "model.safetensors", pt_state())
    (tmp_path / "config.json").write_bytes(start)
    with pytest.raises(ValueError, match=words):
        pretrained.load(tmp_path)


# ------------------------------------------------------------------------------------------------
# Into a run, and back to Hugging Face
# ------------------------------------------------------------------------------------------------


def test_pretrained_initialise_says_what_became_of_the_checkpoint_and_the_recipe(tmp_path):
    net = pt_model(frames=8, **PT_VIVIT)
    pt_own(net, path := tmp_path / "x.pt")
    heads = {"clip": M.Head("clip", 5), "ava": M.Head("box", 3)}
    settings = dict(arch="tiny", frames=16, size=[32, 64], pool="norm-mean", drop_path=0.1)
    model, lines = pretrained.initialise(path, heads, settings)
    config = model.encoder.config
    assert (config.frames, config.size, config.drop_path, config.pool) == (16, (32, 64), 0.1, "cls")
    assert torch.equal(model.heads["clip"].fc.weight, net.heads["clip"].fc.weight)
    assert lines == [
        f"initialised from {path} (this project)",
        f"mapped: all {len(net.state_dict())} tensors, of step 7",
        "positions resized from a grid of 4x2x2 to 8x2x4",
        "head kept: clip",
        "new head: ava",
        "the checkpoint decides, not [model]: width = 128 (not 64), depth = 2 (not 4),"
        " pool = cls (not norm-mean)",
    ]
    names = list("abcde")
    torch.save(torch.load(path) | {"classes": {"clip": names}}, path)
    for classes, said in ((names, "head kept: clip"), (names[::-1], "head left out: clip")):
        kept, lines = pretrained.initialise(path, heads, settings, {"clip": classes})
        same = torch.equal(kept.heads["clip"].fc.weight, net.heads["clip"].fc.weight)
        assert said in lines and same == ("kept" in said)
    torch.save(pt_state(), path := tmp_path / "x.pth")
    _, lines = pretrained.initialise(path, {"clip": M.Head("clip", 5)}, {})
    assert lines[-2:] == ["head left out: clip", "new head: clip"]  # of another family


@pytest.mark.parametrize("kind", ["Vivit", "VideoMAE"])
def test_pretrained_goes_back_to_hugging_face(kind, tmp_path):
    transformers = pt_transformers()
    net = pt_model(frames=4, size=(48, 48), **PT_VIVIT if kind == "Vivit" else PT_MAE)
    if kind == "VideoMAE":  # a bias of keys changes nothing
        net.encoder.blocks[0].qkv.bias.data[128:256] = 3.0
    folder = tmp_path / "out"
    hugging_face.to_hugging_face(net, "clip", folder, list("abcde"))
    theirs = getattr(transformers, f"{kind}ForVideoClassification")
    oracle, loading = theirs.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()) and oracle.config.id2label[4] == "e"
    video = pt_clips(4, 48)
    with torch.no_grad():
        logits = net(video, "clip")
        pt_close(oracle.eval()(video.transpose(1, 2)).logits, logits)
        pt_close(pretrained.build(pretrained.load(folder)).eval()(video, "clip"), logits)
    back = pretrained.load(folder)
    assert back.config.mean == net.encoder.config.mean and back.classes["clip"] == list("abcde")
    routed = pt_model(**PT_VIVIT)
    routed.encoder = SpotTune(routed.encoder)
    for other, words in (
        (pt_model(**PT_BOX), "this is neither"),
        (pt_model("box"), "this is neither"),
        (pt_model(size=(32, 48), **PT_VIVIT), "square"),
        (pt_model(mean=(), std=(), **PT_VIVIT), "each clip by its own mean"),
        (routed, "no encoder with choice, frozen, policy"),
    ):
        with pytest.raises(ValueError, match=words):
            hugging_face.to_hugging_face(other, next(iter(other.heads)), folder)


def test_pretrained_files_of_a_folder_in_another_order_or_number(tmp_path):
    """Sorted JSON has class 10 before class 2; a second processor file need not repeat the first's
    colours."""
    names = [f"class {i}" for i in range(12)]
    net = pt_model(classes=12, **PT_VIVIT)
    hugging_face.to_hugging_face(net, "clip", tmp_path, names)
    config, processor = tmp_path / "config.json", tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), sort_keys=True))
    colours = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.2, 0.3, 0.4])
    processor.write_text(json.dumps(json.loads(processor.read_text()) | colours))
    second = tmp_path / "video_preprocessor_config.json"
    second.write_text(json.dumps(dict(do_resize=True, image_std=[0.5, 0.6, 0.7])))
    found = pretrained.load(tmp_path)
    assert found.classes["clip"] == names
    assert found.config.mean == (0.1, 0.2, 0.3) and found.config.std == (0.5, 0.6, 0.7)
    table = json.loads(config.read_text())
    table["id2label"] = {f"x{i}": name for i, name in enumerate(names)}
    config.write_text(json.dumps(table))
    assert pretrained.load(tmp_path).classes == {}


@pytest.mark.parametrize("kind", ["Vivit", "VideoMAE"])
def test_pretrained_goes_back_to_hugging_face_without_a_box_head(kind, tmp_path):
    transformers = pt_transformers()
    net = pt_model("box", frames=4, size=(48, 48), **PT_VIVIT if kind == "Vivit" else PT_BOX)
    name = hugging_face.to_hugging_face(net, "box", tmp_path)
    assert name == f"{kind}Model"
    oracle, loading = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True
    )
    new = {f"pooler.dense.{part}" for part in ("weight", "bias")} if kind == "Vivit" else set()
    assert loading.pop("missing_keys") == new and not any(loading.values())
    video = pt_clips(4, 48)
    with torch.no_grad():
        tokens = net.encoder(video)[1].flatten(1, 3)
        theirs = oracle.eval()(video.transpose(1, 2)).last_hidden_state
    pt_close(theirs[:, theirs.shape[1] - tokens.shape[1] :], tokens)
    back = pretrained.load(tmp_path)
    assert not back.heads and set(back.encoder) == set(net.encoder.state_dict())


# ------------------------------------------------------------------------------------------------
# What transformers has
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Vivit", "VideoMAE"])
@pytest.mark.parametrize("form", ["folder", "in memory", "bin", "old bin"])
def test_pretrained_equals_hugging_face(kind, form, tmp_path):
    oracle = pt_oracle(kind, num_frames=4, image_size=48)
    oracle.save_pretrained(tmp_path)
    saved = tmp_path / "model.safetensors"
    if form == "in memory":
        pt_safetensors(saved, oracle.state_dict())
    elif form != "folder":
        state = oracle.state_dict() if form == "bin" else weight_files.read_safetensors(saved)
        torch.save(state, tmp_path / "pytorch_model.bin")  # the file's names are the hub's
        saved.unlink()
    pt_parity(oracle, tmp_path, torch.randn(2, 4, 3, 48, 48))


@pytest.mark.slow
@pytest.mark.parametrize("kind, frames", [("Vivit", 32), ("VideoMAE", 16)])
def test_pretrained_equals_hugging_face_at_full_size(kind, frames, tmp_path):
    oracle = pt_oracle(
        kind,
        0.02,
        num_frames=frames,
        image_size=224,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    )
    oracle.save_pretrained(tmp_path)
    pt_parity(oracle, tmp_path, torch.randn(1, frames, 3, 224, 224))


@pytest.mark.parametrize("kind", ["Vivit", "ViT"])
def test_pretrained_equals_hugging_face_through_interpolated_positions(kind, tmp_path):
    """Where Hugging Face interpolates rightly: one step in time. (It takes the table of a longer
    ViViT for one of a square image, and never interpolates VideoMAE's.)"""
    oracle = pt_oracle(kind, image_size=64, **(dict(num_frames=2) if kind == "Vivit" else {}))
    oracle.save_pretrained(tmp_path)
    video = torch.randn(2, 1, 3, 96, 48).repeat(1, 2, 1, 1, 1)
    pt_parity(oracle, tmp_path, video, interpolate_pos_encoding=True)


def test_pretrained_says_of_a_text_only_that_it_is_no_checkpoint(tmp_path):
    """A text may begin with "c", the pickle opcode that names what would be run."""
    text = tmp_path / "train.csv"
    text.write_text("cam1,0.5,0.3,0.5,0.6,0.9,1\ncam1,1.5,0.3,0.5,0.6,0.9,1\n")
    with pytest.raises(ValueError, match="not a torch.save file of tensors$"):
        weight_files.read_torch(text)
