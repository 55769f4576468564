"""Tests of extras/export.py."""

import dataclasses
import json

import pytest
import torch
from helpers import run_command

import data
from cofinetune import Recipe
from extras import checkpoints, export
from extras import recipe as recipes

CLASSES = {"actions": ["a", "b", "ü"], "templates": ["c", "d"], "ava": [f"x{i}" for i in range(6)]}


@pytest.fixture
def checkpoint(tmp_path):
    """A run's folder as the demo leaves it, of random weights, and its model."""

    def save(**model):
        model = {"model.depth": "1"} | {f"model.{key}": text for key, text in model.items()}
        recipe = recipes.read(Recipe, "demo", model)
        net = checkpoints.build_model(recipe, CLASSES, say=lambda words: None).eval()
        torch.manual_seed(1)
        for head in net.heads.values():
            torch.nn.init.normal_(head.fc.weight, std=0.1)
        state = dict(
            model=net.state_dict(),
            model_config=dataclasses.asdict(net.encoder.config),
            heads={name: dataclasses.asdict(head.config) for name, head in net.heads.items()},
            classes=CLASSES,
            recipe=dataclasses.asdict(recipe),
            ema={},
        )
        folder = tmp_path / "run"
        folder.mkdir()
        checkpoints.save(folder / "last.pt", state)
        return folder, net

    return save


def inputs(clips, boxes, size=(48, 48)):
    g = torch.Generator().manual_seed(boxes)
    video = torch.randint(256, (clips, 8, *size, 3), generator=g, dtype=torch.uint8)
    box_clip = torch.randint(clips, (boxes,), generator=g)
    return video, torch.rand(boxes, 2, 2, generator=g).sort(1).values.flatten(1), box_clip


@torch.no_grad()
def scores(net, task, video, *boxes):
    """What the project itself says of these clips."""
    logits = net(data.normalise(video, *net.scale), task, *boxes)
    return logits.sigmoid() if boxes else logits.softmax(1)


@pytest.mark.parametrize("suffix, scale", [("onnx", "[]"), ("pt2", "[0.4, 0.5, 0.6]")])
def test_export_of_a_box_head_takes_any_number_of_boxes(checkpoint, tmp_path, suffix, scale):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    folder, net = checkpoint(mean=scale, std=scale)
    out = tmp_path / "new" / f"net.{suffix}"
    said = run_command("export", folder, out, "--task", "ava", "--clips", 2).stdout
    assert "ava: video, boxes, box_clip -> scores, for video [2, 8, 48, 48, 3], 0.125 s" in said
    assert "compared with the model: differs by" in said
    if suffix == "onnx":
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        facts = session.get_modelmeta().custom_metadata_map
    else:
        facts = dict.fromkeys(["task", "kind", "classes", "step_sec"], "")
        module = torch.export.load(out, extra_files=facts).module()
    assert facts["task"] == "ava" and facts["kind"] == "box" and facts["step_sec"] == "0.125"
    assert json.loads(facts["classes"]) == CLASSES["ava"]
    for boxes in (0, 1, 5, 40):
        video, corners, box_clip = some = inputs(2, boxes)
        if suffix == "onnx":
            feed = dict(video=video.numpy(), boxes=corners.numpy(), box_clip=box_clip.numpy())
            found = torch.from_numpy(session.run(["scores"], feed)[0])
        else:
            found = module(video=video, boxes=corners, box_clip=box_clip)
        torch.testing.assert_close(found, scores(net, "ava", *some), atol=1e-5, rtol=0)


def test_export_of_a_clip_head_at_another_size(checkpoint, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, net = checkpoint()
    run_command("export", folder, tmp_path / "x.onnx", "--task", "actions", "--size", 32, 64)
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("video", [1, 8, 32, 64, 3])]
    video = inputs(1, 0, (32, 64))[0]
    (found,) = session.run(["scores"], dict(video=video.numpy()))
    expected = scores(net, "actions", video)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["a", "b", "ü"]


@pytest.mark.slow
def test_the_averaged_weights_are_exported_where_that_is_asked(checkpoint, tmp_path):
    folder, net = checkpoint()
    words = ("export", folder, tmp_path / "net.pt2", "--task", "ava", "--averaged")
    done = run_command(*words, code=2)
    assert "last.pt: has no averaged weights; its recipe says ema = 0" in done.stderr
    state = checkpoints.load(folder)
    state["ema"] = {name: value * 0.5 for name, value in state["model"].items()}
    checkpoints.save(folder / "last.pt", state)
    run_command(*words)
    video, corners, box_clip = some = inputs(1, 3)
    module = torch.export.load(tmp_path / "net.pt2").module()
    found = module(video=video, boxes=corners, box_clip=box_clip)
    assert not torch.allclose(found, scores(net, "ava", *some), atol=1e-3)
    net.load_state_dict(state["ema"])
    torch.testing.assert_close(found, scores(net, "ava", *some), atol=1e-5, rtol=0)


def test_export_to_a_folder_is_read_by_transformers(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = dict(arch="tiny", cls="true", pool="cls", pos="learned", tubelet="[2, 8, 8]")
    folder, net = checkpoint(**shape, mean="[0.5, 0.5, 0.5]", std="[0.5, 0.5, 0.5]")
    run_command("export", folder, tmp_path / "theirs", "--task", "actions")
    theirs = transformers.VivitForVideoClassification.from_pretrained(tmp_path / "theirs").eval()
    assert list(theirs.config.id2label.values()) == CLASSES["actions"]
    video = inputs(1, 0)[0]
    with torch.no_grad():
        pixels = (video / 255 - 0.5).div(0.5).permute(0, 1, 4, 2, 3)
        found = theirs(pixel_values=pixels).logits.softmax(1)
    torch.testing.assert_close(found, scores(net, "actions", video), atol=1e-5, rtol=0)
    said = run_command("export", folder, tmp_path / "alone", "--task", "ava").stdout
    assert "the encoder alone, since transformers has no box head" in said
    assert f"transformers.VivitModel.from_pretrained('{tmp_path}/alone')" in said


def test_export_that_differs_from_the_model_is_an_error(checkpoint, tmp_path, monkeypatch):
    folder, net = checkpoint()

    def write(whole, example, out, facts):
        out.write_text("")
        return lambda **inputs: whole(**inputs) + 2e-4

    monkeypatch.setattr(export, "write_pt2", write)
    done = run_command("export", folder, tmp_path / "x.pt2", "--task", "ava", code=2)
    assert "differs from the model by 2.0e-04" in done.stderr


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["x.tflite"], "expected FILE.onnx, FILE.pt2 or a folder"),
        (["x.pt2"], "--task is needed: one of actions, templates, ava"),
        (["x.pt2", "--task", "k400"], "--task k400 is not one of actions, templates, ava"),
        (["x.pt2", "--task", "ava", "--clips", "0"], "--clips 0: expected 1 or more"),
        (["x.pt2", "--task", "ava", "--frames", "-4"], "--frames -4: expected 1 or more"),
        (["x.pt2", "--task", "ava", "--frames", "0"], "--frames 0: expected 1 or more"),
        (["x.pt2", "--task", "ava", "--size", "16", "0"], "--size 0: expected 1 or more"),
        (["x", "--task", "ava", "--frames", "16"], "--frames and --size are of FILE.onnx"),
        (["x.pt2", "--task", "ava", "--frames", "7"], "T, H, W multiples of the tubelet"),
    ],
)
def test_export_refuses(checkpoint, tmp_path, words, sentence):
    folder, _ = checkpoint()
    done = run_command("export", folder, tmp_path / words[0], *words[1:], code=2)
    assert sentence in done.stderr and not (tmp_path / words[0]).exists()
