"""Tests of model.py."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import MODEL_VARIANTS, tiny_inputs, tiny_model

import model as M


def model_grads(net):
    return {name: p.grad for name, p in net.named_parameters()}


def test_model_sizes_have_the_known_parameter_counts():
    with torch.device("meta"):
        nets = {k: M.VideoTransformer(M.ModelConfig(cls=True, **M.SIZES[k])) for k in "SBLH"}
    count = {k: sum(p.numel() for p in net.parameters()) for k, net in nets.items()}
    assert count["B"] == 88_646_400  # google/vivit-b-16x2 without its classifier
    assert [round(n / 1e6) for n in count.values()] == [23, 89, 307, 636]


def test_model_sincos_table_is_videomaes():
    angle = [[p / np.power(10000, 2 * (j // 2) / 24) for j in range(24)] for p in range(50)]
    table = np.array(angle)
    table[:, 0::2], table[:, 1::2] = np.sin(table[:, 0::2]), np.cos(table[:, 1::2])
    np.testing.assert_allclose(M.sincos_table(50, 24).numpy(), table, atol=1e-7, rtol=0)


@pytest.mark.parametrize("cls", [0, 1])
def test_model_positions_resize_like_interpolation(cls):
    native, grid = (4, 6, 4), (6, 9, 3)
    pos = torch.randn(1, cls + 96, 24)
    volume = pos[0, cls:].unflatten(0, native).permute(0, 3, 1, 2)  # (t, D, h, w)
    space = F.interpolate(volume, grid[1:], mode="bicubic", align_corners=False)
    time = F.interpolate(space.permute(2, 3, 1, 0).flatten(0, 1), grid[0], mode="linear")
    bicubic = time.unflatten(0, grid[1:]).permute(3, 0, 1, 2)  # (t, h, w, D)
    volume = volume.transpose(0, 1)[None]
    corners = F.interpolate(volume, grid, mode="trilinear", align_corners=True)
    for mode, expected in (("bicubic", bicubic), ("bilinear-corners", corners[0].movedim(0, -1))):
        ours = M.resize_positions(pos, native, grid, mode)
        torch.testing.assert_close(ours[0, cls:], expected.flatten(0, 2), atol=3e-6, rtol=1e-5)
        assert torch.equal(ours[:, :cls], pos[:, :cls])
    assert M.resize_positions(pos, native, native, "bicubic") is pos
    net = tiny_model()  # through the network: another size is the native network on a resized table
    video = torch.randn(1, 3, 12, 72, 24)
    sized = tiny_model(frames=12, size=(72, 24))
    state = net.state_dict()
    state["encoder.pos"] = M.resize_positions(state["encoder.pos"], native, grid, "bicubic")
    sized.load_state_dict(state)
    torch.testing.assert_close(net(video, "clips"), sized(video, "clips"))


def test_model_rotary_positions_turn_pairs_axis_by_axis():
    grid, d = (2, 3, 4), 26  # 8 numbers for each axis, 2 are left alone
    x = torch.randn(2, 2, 24, d, dtype=torch.float64)
    ours = M.rotate(x, grid)
    for n, place in enumerate(np.ndindex(*grid)):
        for axis, position in enumerate(place):
            for i in range(4):  # the pair 2i, 2i + 1; its two angles as V-JEPA 2 has them
                one, other = x[..., n, 8 * axis + 2 * i], x[..., n, 8 * axis + 2 * i + 1]
                a, b = (position * 10000.0 ** (-(j % 4) / 4) for j in (2 * i, 2 * i + 1))
                first = one * math.cos(a) - other * math.sin(a)
                second = other * math.cos(b) + one * math.sin(b)
                found = ours[..., n, 8 * axis + 2 * i : 8 * axis + 2 * i + 2]
                torch.testing.assert_close(
                    found, torch.stack([first, second], -1), atol=1e-6, rtol=0
                )
        assert torch.equal(ours[..., n, 24:], x[..., n, 24:])


def test_model_accepts_the_least_and_says_what_it_keeps():
    least = M.ModelConfig(1, (1, 1), (1, 1, 1), 2, 1, 1, drop_path=0.0)
    assert least.grid == (1, 1, 1) and not least.checkpointing
    M.ModelConfig(width=64, heads=16)  # 4 numbers of a head: too few for rope alone
    M.ModelConfig(width=12, heads=2, pos="rope")
    assert M.Head("box", 1, dropout=0.0, roi_size=1, prior=0.0).roi_size == 1
    assert "encoder.pos" not in tiny_model(pos="sincos").state_dict()  # follows from the config
    assert "encoder.pos" in tiny_model().state_dict()


@pytest.mark.parametrize("variant, checkpointing", [("vivit", False), ("videomae", True)])
def test_model_trunk_compiles_as_one_graph(variant, checkpointing):
    options = dict(MODEL_VARIANTS[variant], depth=2, drop_path=0.2, checkpointing=checkpointing)
    enc = tiny_model(**options).encoder
    compiled = torch.compile(enc, backend="eager", fullgraph=True)
    video = torch.randn(2, 3, 12, 72, 24)
    torch.manual_seed(0)
    eager = enc(video)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(video), eager)


def test_model_checkpointing_keeps_gradients_and_saves_memory():
    kept, grads = {False: 0, True: 0}, {}
    for on in (False, True):
        net = tiny_model(drop_path=0.5, checkpointing=on).train()

        def pack(tensor, on=on):
            kept[on] += tensor.numel()
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net(tiny_inputs()[0], "clips").square().sum()
        loss.backward()
        grads[on] = model_grads(net)
    torch.testing.assert_close(grads[True], grads[False])
    assert kept[True] < kept[False] / 3


def test_model_stochastic_depth_drops_whole_clips_and_rescales():
    block, ones = M.Block(M.ModelConfig(width=24, heads=2), 0.25), torch.ones(4000, 5, 2)
    dropped = block.drop(ones)
    per_clip = dropped[:, :1, :1]
    assert torch.equal(dropped, per_clip.expand_as(dropped))
    assert per_clip.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert per_clip.mean().item() == pytest.approx(1, abs=0.05)
    assert block.eval().drop(ones) is ones
    rates = [b.drop_path for b in tiny_model(drop_path=0.4).encoder.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4])


def test_model_starts_as_told():
    config = M.ModelConfig(8, (48, 32), (2, 8, 8), 24, 1, 2, pos="learned-axes", qk_init="mimetic")
    net = M.CoFinetuneModel(config, {"a": M.Head("clip", 5), "b": M.Head("box", 7, prior=0.02)})
    video, boxes, box_clip = tiny_inputs()
    assert torch.equal(net(video, "a"), torch.zeros(3, 5))
    torch.testing.assert_close(net(video, "b", boxes, box_clip).sigmoid(), torch.full((4, 7), 0.02))
    q, k, v = net.encoder.blocks[0].qkv.weight.chunk(3)
    assert (q - k).std().item() == pytest.approx(0.02, rel=0.2) and (q - v).std() > 0.2
    assert q.std().item() == pytest.approx(math.sqrt(5 / (math.sqrt(12) * 24)), rel=0.1)
    table = net.encoder.pos[0].unflatten(0, config.grid)
    for axis in range(3):  # a third of the columns for each axis: moves along it and no other
        part = table[..., 8 * axis : 8 * axis + 8]
        assert [part.std(other).max() > 1e-6 for other in range(3)] == [i == axis for i in range(3)]


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (0, 5, 2), (3, 3, 3), (9, 0, 1)])
def test_model_boxes_in_any_order_and_number_each_meet_their_own_clip(counts):
    """And no clip's gradient depends on the boxes of another."""
    g = torch.Generator().manual_seed(sum(counts))
    box_clip = torch.arange(3).repeat_interleave(torch.tensor(counts))
    box_clip = box_clip[torch.randperm(len(box_clip), generator=g)]
    corners = torch.rand(len(box_clip), 2, 2, generator=g).sort(1).values * torch.tensor([4, 6])
    x1, y1, x2, y2 = corners.flatten(1).unbind(1)
    weights = M.align_weights(y1, y2, 6, 3), M.align_weights(x1, x2, 4, 3)
    features = torch.randn(3, 6, 4, 8, generator=g, requires_grad=True)
    ours = M.pool_boxes(features, *weights, box_clip)
    bins = torch.einsum("kph,khwd,kqw->kpqd", weights[0], features[box_clip], weights[1])
    expected = bins.flatten(1, 2).amax(1)
    torch.testing.assert_close(ours, expected)
    share = torch.randn(ours.shape, generator=g)
    gradients = [torch.autograd.grad((x * share).sum(), features)[0] for x in (ours, expected)]
    torch.testing.assert_close(*gradients)
    assert [grad.abs().sum().item() > 0 for grad in gradients[0]] == [n > 0 for n in counts]


@pytest.mark.parametrize("variant", MODEL_VARIANTS)
def test_model_batched_is_single_and_evaluation_deterministic(variant):
    heads = {"clips": M.Head("clip", 5, dropout=0.5), "boxes": M.Head("box", 7, dropout=0.5)}
    net = tiny_model(heads, drop_path=0.5, **MODEL_VARIANTS[variant]).eval()
    video, boxes, box_clip = tiny_inputs()
    clips, persons = net(video, "clips"), net(video, "boxes", boxes, box_clip)
    assert torch.equal(clips, net(video, "clips"))
    assert torch.equal(persons, net(video, "boxes", boxes, box_clip))
    for b in range(3):
        torch.testing.assert_close(net(video[b : b + 1], "clips")[0], clips[b])
    for k, b in enumerate(box_clip.tolist()):
        alone = net(video[b : b + 1], "boxes", boxes[k : k + 1], torch.tensor([0]))
        torch.testing.assert_close(alone[0], persons[k])
    assert not torch.equal(net.train()(video, "clips"), clips)


@pytest.mark.parametrize("variant", MODEL_VARIANTS)
def test_model_both_kinds_of_head_train_the_whole_encoder(variant):
    net, (video, boxes, box_clip) = tiny_model(**MODEL_VARIANTS[variant]), tiny_inputs()
    for task, rest in (("clips", ()), ("boxes", (boxes, box_clip))):
        net.zero_grad()
        net(video, task, *rest).square().sum().backward()
        for name, grad in model_grads(net).items():
            used = name.startswith(("encoder", f"heads.{task}"))
            assert (grad is not None and grad.abs().max() > 0) if used else grad is None, name


def test_model_heads_stay_float32_under_autocast():
    net, (video, boxes, box_clip) = tiny_model(), tiny_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        features = net.encoder(video)
        logits = net.classify(features, "boxes", boxes, box_clip)
        assert net.classify(features, "clips").dtype == torch.float32
    assert logits.dtype == torch.float32
    features = tuple(f.float() for f in features)
    assert torch.equal(logits, net.classify(features, "boxes", boxes, box_clip))


def test_model_no_boxes_is_an_exact_zero_with_zero_gradients():
    net, (video, _, _) = tiny_model(), tiny_inputs()
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    for count in (None, 0, 0.5):
        net.zero_grad()
        loss = M.box_loss(net(video, "boxes", *none), torch.zeros(0, 7), count)
        loss.backward()
        assert loss.item() == 0
        for name, grad in model_grads(net).items():
            used = not name.startswith("heads.clips")
            assert (grad is not None and not grad.any()) if used else grad is None, name


MODEL_BOX = [[0.2, 0.3, 0.5, 0.9]]


def model_call(task, boxes=None, box_clip=None):
    boxes = None if boxes is None else torch.tensor(boxes, dtype=torch.float32)
    box_clip = None if box_clip is None else torch.tensor(box_clip)
    return tiny_model()(tiny_inputs()[0], task, boxes, box_clip)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: M.ModelConfig(pool="max"), "pool is 'max', expected one of cls, norm-mean"),
        (lambda: M.ModelConfig(pool="cls"), "cls=False excludes pool 'cls'"),
        (lambda: M.ModelConfig(size=(200, 224)), "not multiples of tubelet"),
        (lambda: M.ModelConfig(heads=7), "no multiple of heads 7"),
        (lambda: M.ModelConfig(width=15, heads=5), "width 15 is odd"),
        (lambda: M.ModelConfig(heads=0), "heads is 0, expected at least 1"),
        (lambda: M.ModelConfig(depth=0), "depth is 0, expected at least 1"),
        (lambda: M.ModelConfig(width=10, heads=2, pos="rope"), "rope needs 6 numbers"),
        (lambda: M.ModelConfig(cls=True, pos="rope"), "cls=True excludes pos 'rope'"),
        (lambda: M.ModelConfig(cls=True, pos="sincos"), "cls=True excludes pos 'sincos'"),
        (lambda: M.Head("box", 3, roi_size=0), "roi_size is 0, expected at least 1"),
        (lambda: M.Head("box", 3, dropout=1), "dropout is 1, expected less than 1"),
        (lambda: M.ModelConfig(drop_path=1.0), "drop_path is 1.0, expected less than 1"),
        (lambda: M.ModelConfig(drop_path=-0.1), "drop_path is -0.1, expected at least 0"),
        (lambda: M.ModelConfig(tubelet=(2, 0, 16)), "tubelet is .2, 0, 16., expected at least 1"),
        (lambda: M.ModelConfig(std=[0.5, 0, 0.5]), "std is .*, expected more than 0"),
        (lambda: M.ModelConfig(mean=[]), "expected three numbers each, or none"),
        (lambda: M.ModelConfig(mean=[0.5], std=[0.5]), "expected three numbers each, or none"),
        (lambda: M.ModelConfig(size=(16, 24)), "not multiples of tubelet"),
        (lambda: M.Head("frame", 3), "kind is 'frame', expected one of clip, box"),
        (lambda: M.Head("clip", 3, prior=0.1), "for box heads"),
        (lambda: M.Head("box", 3, prior=1), "prior is 1, expected less than 1"),
        (lambda: model_call("nothing"), "no head for task 'nothing', there are clips, boxes"),
        (lambda: model_call("clips", MODEL_BOX, [0]), "task clips classifies clips"),
        (lambda: model_call("boxes"), "a box task needs boxes and box_clip"),
        (lambda: model_call("boxes", MODEL_BOX), "a box task needs boxes and box_clip"),
        (lambda: model_call("boxes", MODEL_BOX[0], [0]), r"are \(4,\) and \(1,\), expected"),
        (lambda: model_call("boxes", MODEL_BOX, [0, 1]), r"are \(1, 4\) and \(2,\), expected"),
        (lambda: model_call("boxes", MODEL_BOX, [[0]]), r"are \(1, 4\) and \(1, 1\), expected"),
        (lambda: model_call("boxes", [[3, 2, 90, 64]], [0]), "from 2 to 90, .*pixels"),
        (lambda: model_call("boxes", [[-3, 0, 1, 1]], [0]), "from -3 to 1, expected 0 to 1"),
        (lambda: model_call("boxes", [[0.6, 0, 0.5, 1]], [0]), "not x1 <= x2, y1 <= y2"),
        (lambda: model_call("boxes", [[0, 0.6, 1, 0.5]], [0]), "not x1 <= x2, y1 <= y2"),
        (lambda: model_call("boxes", [[0, 0, math.nan, 1]], [0]), "not x1 <= x2, y1 <= y2"),
        (lambda: model_call("boxes", MODEL_BOX, [3]), r"box_clip is \[3\], for 3 clips"),
        (lambda: model_call("boxes", MODEL_BOX, [-1]), r"box_clip is \[-1\], for 3 clips"),
        *(
            (
                lambda s=shape: tiny_model()(torch.zeros(s), "clips"),
                "expected .B, 3, T, H, W. with T",
            )
            for shape in (
                (1, 3, 8, 48, 30),
                (1, 3, 8, 44, 32),
                (1, 3, 7, 48, 32),
                (1, 4, 8, 48, 32),
                (1, 8, 48, 32, 3),
                (3, 8, 48, 32),
            )
        ),
    ],
)
def test_model_refuses(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_model_config_survives_toml_and_dict():
    config = M.ModelConfig(size=[64, 32], tubelet=[2, 16, 16], mean=[], std=[])  # as TOML gives it
    same = M.ModelConfig(size=(64, 32), tubelet=(2, 16, 16), mean=(), std=())
    assert config == same and config.grid == (16, 4, 2)
    assert M.ModelConfig(**dataclasses.asdict(config)) == config


def test_model_carries_the_scale_of_its_pixels():
    assert tiny_model(mean=[0.1, 0.2, 0.3], std=[1, 2, 3]).scale == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert tiny_model().scale == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert tiny_model(mean=(), std=()).scale == ((), ())
