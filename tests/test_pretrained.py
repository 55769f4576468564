"""Tests of pretrained.py."""

import argparse
import dataclasses
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from helpers import model_oracle, tiny_model

import model as M
from extras import pretrained

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
PT_MAE = dict(pos="sincos", pool="mean-norm", gelu="none")
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
            for part, rows in zip("qkv", tensor.chunk(3)):
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
        return net.eval()(video, task, *(boxes if head.head.kind == "box" else ()))


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
    assert found.mean[0] == (0.485 if "MAE" in name else 0.5)
    assert found.heads == {task: head.head for task, head in net.heads.items()}
    assert found.classes == ({"clip": list("abcde")} if "Face" in name else {})
    assert ("mask_token: decoder" in "".join(found.report)) == name.startswith("VideoMAE")


@pytest.mark.parametrize("inflate", ["central", "average"])
@pytest.mark.parametrize("family", ["timm", "hf", "google", "big_vision", "stacked", "gap"])
def test_pretrained_image_weights_answer_a_still_clip_as_the_image(family, inflate, tmp_path):
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
    found = pretrained.load(path, inflate=inflate)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    frames = 8 if family == "gap" else 2  # why 2: inflate_image
    video = image[:, :, None].repeat(1, 1, frames, 1, 1)
    built = pretrained.build(found, frames=frames).eval()
    with torch.no_grad():
        logits = built(video, "clip")
        want = net.heads["clip"].fc(model_oracle(net.encoder, image[:, :, None])[0])
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)
        video[:, :, ::2] = 9.0  # the first frame of every tubelet
        assert torch.equal(built(video, "clip"), logits) == (inflate == "central")


def pt_own(net, path, **edit):
    """Saves what cofinetune.py saves of a model."""
    config = dataclasses.asdict(net.encoder.config)
    heads = {task: dataclasses.asdict(head.head) for task, head in net.heads.items()}
    content = dict(model=net.state_dict(), model_config=config, heads=heads, step=7)
    content |= dict(mean=[0.5] * 3, std=[0.5] * 3, classes={"box": ["run"]})
    torch.save(content | edit, path)


def test_pretrained_own_checkpoint_keeps_heads_of_the_same_name_and_shape(tmp_path):
    net = pt_model("box", 6, pos="learned-axes", drop_path=0.1)
    pt_own(net, path := tmp_path / "x.pt")
    found = pretrained.load(path)
    assert found.config == net.encoder.config and found.classes == {"box": ["run"]}
    assert torch.equal(pt_logits(pretrained.build(found)), pt_logits(net))
    tasks = {"box": M.Head("box", 6), "new": M.Head("clip", 6)}
    built = pretrained.build(found, tasks, drop_path=0.0)
    assert torch.equal(pt_logits(built), pt_logits(net)) and not built.heads["new"].fc.weight.any()
    other = pretrained.build(found, {"box": M.Head("box", 7)})
    assert not other.heads["box"].fc.weight.any()
    config = dataclasses.asdict(net.encoder.config)
    for edit, words in (
        (dict(mean=None), "without mean"),
        (dict(std=[1, 2, 3]), "image_std"),
        (dict(model_config={"widht": 3}), "widht"),
        (dict(model_config={"width": "128"}), "width is '128'"),
        (dict(model_config=config | {"depth": 10**9}), "1000000000 blocks"),
        (dict(model_config=config | {"size": (1 << 20, 1 << 20)}), "tokens cannot be right"),
        (dict(model=net.encoder.state_dict()), "missing: encoder.pos, encoder.patch.weight"),
    ):
        pt_own(net, path, **edit)
        with pytest.raises(ValueError, match=words):
            pretrained.load(path)


def test_pretrained_lists_all_that_is_missing_unexpected_misshapen_or_not_finite(tmp_path):
    state = pt_renamed(pt_model(size=(224, 224), **PT_MAE), PT_VIDEOMAE)
    del state["blocks.1.norm1.bias"]
    state |= {"blocks.0.gamma_1": torch.ones(128), "fc_norm.bias": torch.ones(5)}
    state["head.bias"][0] = float("nan")
    torch.save(state, path := tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        pretrained.load(path)
    assert str(error.value) == (
        f"{path}: read as VideoMAE: missing: encoder.blocks.1.norm1.bias; unexpected:"
        " blocks.0.gamma_1; of another shape: encoder.norm.bias (5,) for (128,);"
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
        ("starts at", dict(data_offsets=[0, 16])),
        ("starts at", dict(data_offsets=[8, 24])),
        ("outside", dict(data_offsets=[24, 40])),
        ("outside", dict(data_offsets=[-16, 0])),
        ("given 16 bytes", dict(shape=[5])),
        ("given 16 bytes", dict(shape=[3])),
        ("outside", dict(shape=[2**62, 4])),
        ("outside", dict(shape=[-4, -1])),
        ("outside", dict(shape=[1.0])),
        ("outside", dict(shape=[1] * 99)),
        ("lacks", dict(dtype="F31")),
        ("lacks", dict(dtype=[])),
        ("lacks", dict(shape=4)),
        ("lacks", dict(data_offsets=[0])),
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
        ("claim", {"a": huge}),
        ("no tensors", {}),
        ("dense", {"a": 3}),
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


def test_pretrained_command_line(tmp_path, capsys):
    state = pt_renamed(pt_model(size=(224, 224), **PT_MAE), PT_VIDEOMAE)
    torch.save({"model": state}, tmp_path / "x.pth")
    assert pretrained.main([str(tmp_path / "x.pth")]) == 0
    shown = capsys.readouterr().out
    for words in ("VideoMAE", "16 frames of 224x224", "0.485", "clip, 5 classes", "does not say"):
        assert words in shown
    assert pretrained.main([str(tmp_path)]) == pretrained.main([str(tmp_path / "y.pth")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"error: {tmp_path}") for line in lines)


def pt_oracle(kind, std=0.1, **settings):
    """A Hugging Face model with random parameters."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
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


@pytest.mark.parametrize("kind", ["Vivit", "VideoMAE"])
@pytest.mark.parametrize("form", ["folder", "in memory", "bin", "old bin"])
def test_pretrained_equals_hugging_face(kind, form, tmp_path):
    oracle = pt_oracle(kind, num_frames=4, image_size=48)
    oracle.save_pretrained(tmp_path)
    saved = tmp_path / "model.safetensors"
    if form == "in memory":
        pt_safetensors(saved, oracle.state_dict())
    elif form != "folder":
        state = oracle.state_dict() if form == "bin" else pretrained.read_safetensors(saved)
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
