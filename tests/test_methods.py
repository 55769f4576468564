"""Tests of extras/methods.py."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_inputs, tiny_model

import model as M
from extras import methods


def heads_model(seed=0, **options):
    heads = {"clips": M.Head("clip", 3, dropout=0.5), "boxes": M.Head("box", 4, dropout=0.5)}
    return tiny_model(heads, seed, **dict(cls=True, drop_path=0.3) | options)


DIVISOR = SimpleNamespace(clips=3)


def make(method, model, plain=None, **options):
    recipe = SimpleNamespace(method=method, method_options=options)
    methods.wrap_encoder(recipe, model)
    return methods.criterion(recipe, model, plain or nothing)


def nothing(task, logits, batch, divisor):
    return logits.new_zeros(())


def supervised(task, logits, batch, divisor):
    if batch.task == "clips":
        return M.clip_loss(logits, torch.tensor([0, 1, 2]))
    return M.box_loss(logits, torch.eye(4))


def forward(model, task, video=None):
    """The arguments of a criterion from `video` on."""
    inputs, boxes, box_clip = tiny_inputs()
    video = inputs if video is None else video
    batch = SimpleNamespace(task=task, boxes=None, box_clip=None)
    if task == "boxes":
        batch = SimpleNamespace(task=task, boxes=boxes, box_clip=box_clip)
    features = model.encoder(video)
    return video, features, model.classify(features, task, batch.boxes, batch.box_clip), batch


def distance(criterion, model, task, step):
    return criterion(None, step, *forward(model, task), DIVISOR)


def gradients(model, criterion, task, step=0):
    """Of one micro-batch, as the loop makes them."""
    criterion(None, step, *forward(model, task), DIVISOR).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def move(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def test_a_method_that_changes_nothing_is_the_plain_criterion():
    for method in ("cofinetune", "finetune", "downstream"):
        model = heads_model()
        encoder = model.encoder
        criterion = make(method, model, supervised)
        assert type(criterion) is methods.Plain and model.encoder is encoder
        *_, logits, batch = arguments = forward(model, "clips")
        assert criterion(None, 0, *arguments, DIVISOR) == supervised(None, logits, batch, DIVISOR)


# ------------------------------------------------------------------------------------------------
# Self-distillation
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["pooled", "tokens", "logits"])
@pytest.mark.parametrize("task", ["clips", "boxes"])
def test_distillation_is_exactly_zero_after_a_refresh(target, task):
    model = heads_model().eval()
    criterion = make("selfdistil", model, target=target, refresh=10)
    assert distance(criterion, model, task, 0) == 0
    move(model)
    assert distance(criterion, model, task, 9) > 1e-4
    assert distance(criterion, model, task, 10) == 0  # with the gradient of a minimum
    distance(criterion, model, task, 10).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in model.parameters())


@pytest.mark.parametrize("target", ["pooled", "tokens", "logits"])
@pytest.mark.parametrize("task", ["clips", "boxes"])
def test_distillation_distances_against_torch(target, task):
    model, moved = heads_model().eval(), heads_model(seed=1).eval()
    criterion = make("selfdistil", model, supervised, target=target, weight=3.0, refresh=0)
    video, features, logits, batch = forward(moved, task)
    _, taught, goals, _ = forward(model, task)
    if target != "logits":
        place = ["pooled", "tokens"].index(target)
        cosine = torch.cosine_similarity(features[place], taught[place], dim=-1)
        rows = (1 - cosine).reshape(len(video), -1).mean(1)
    elif task == "clips":
        kind = torch.distributions.Categorical
        rows = torch.distributions.kl_divergence(kind(logits=goals), kind(logits=logits))
    else:
        kind = torch.distributions.Bernoulli
        rows = torch.distributions.kl_divergence(kind(logits=goals), kind(logits=logits)).sum(1)
    expected = rows.sum() / len(video)
    loss = criterion(None, 5, video, features, logits, batch, DIVISOR)
    own = supervised(None, logits, batch, DIVISOR)
    torch.testing.assert_close(loss, own + 3.0 * expected, rtol=1e-4, atol=1e-6)
    assert criterion.report()["distillation"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("target", ["pooled", "tokens", "logits"])
def test_distillation_of_pieces_adds_up_to_that_of_the_batch(target):
    """Also where the boxes fall unevenly: 1 in the first clip, 1 in the second, 2 in the third."""
    taught, moved = heads_model().eval(), heads_model(seed=1).eval()
    video, boxes, box_clip = tiny_inputs()
    whole = make("selfdistil", taught, target=target, refresh=0)
    pieces = make("selfdistil", taught, target=target, refresh=0)
    parts = []
    for clip in range(3):
        mine = box_clip == clip
        batch = SimpleNamespace(task="boxes", boxes=boxes[mine], box_clip=box_clip[mine] * 0)
        features = moved.encoder(video[clip : clip + 1])
        logits = moved.classify(features, "boxes", batch.boxes, batch.box_clip)
        parts.append(pieces(None, 0, video[clip : clip + 1], features, logits, batch, DIVISOR))
    expected = distance(whole, moved, "boxes", 0)
    torch.testing.assert_close(sum(parts), expected, rtol=1e-4, atol=1e-6)
    assert pieces.report()["distillation"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("refresh, ema", [(4, 0.0), (1, 0.75), (0, 0.0)])
def test_teacher_schedule_and_resume(refresh, ema):
    """Copies at multiples of `refresh`, from the weights before that step; averages once a step;
    never moves at 0."""
    model, options = heads_model().train(), dict(refresh=refresh, ema=ema)
    criterion = make("selfdistil", model, supervised, **options)
    name = "encoder.blocks.1.fc1.weight"
    expected = model.state_dict()[name].clone()
    for step in range(10):
        if refresh and step % refresh == 0:
            expected = ema * expected + (1 - ema) * model.state_dict()[name]
        for task in ("clips", "boxes"):  # several micro-batches of one step
            grads = gradients(model, criterion, task, step)
        torch.testing.assert_close(criterion.state_dict()[name], expected)
        if step == 6:  # the process is replaced; the new one starts from other weights
            saved = {key: value.clone() for key, value in criterion.state_dict().items()}
            student = model.state_dict()
            model = heads_model(seed=step).train()
            criterion = make("selfdistil", model, supervised, **options)
            model.load_state_dict(student)
            criterion.load_state_dict(saved)
        move(model)
    assert not criterion.teacher.training
    assert not any(p.requires_grad for p in criterion.teacher.parameters())
    for key, grad in grads.items():
        assert grad is not None or not key.startswith("encoder")


def test_a_steps_report_is_the_mean_over_its_tasks():
    model, moved = heads_model().eval(), heads_model(seed=1).eval()
    criterion = make("selfdistil", model, refresh=0)
    assert criterion.report() == {}
    distance(criterion, model, "clips", 0)  # of another step: 0, forgotten
    values = [distance(criterion, moved, task, 1).item() for task in ("clips", "boxes")]
    assert min(values) > 0
    assert criterion.report()["distillation"] == pytest.approx(sum(values) / 2)


def test_the_defaults_of_self_distillation():
    criterion = make("selfdistil", heads_model())
    assert (criterion.target, criterion.weight) == ("pooled", 1.0)
    assert (criterion.refresh, criterion.ema) == (100, 0.0)


# ------------------------------------------------------------------------------------------------
# SpotTune
# ------------------------------------------------------------------------------------------------


def always(encoder, bias):
    """Let the policy choose one path for all clips: finetuned at 1, frozen at -1."""
    torch.nn.init.zeros_(encoder.choice.weight)
    encoder.choice.bias.data = torch.tensor([0.0, bias] * 3)


@pytest.mark.parametrize("config", [{}, dict(cls=False, pos="sincos", pool="mean-norm")])
def test_spottune_between_frozen_and_finetuned(config):
    """One path for all is the pretrained and the finetuned network exactly; a route per clip is a
    mix of blocks."""
    video = tiny_inputs()[0]
    model, plain = heads_model(**config).eval(), heads_model(**config).eval()
    first = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    make("spottune", model)
    move(model)
    moved = model.encoder.state_dict()
    for bias, share in ((1.0, 1.0), (-1.0, 0.0)):
        weights = {}
        for name in first:
            frozen = share == 0 and name.startswith("blocks.")
            weights[name] = first[name] if frozen else moved[name]
        plain.encoder.load_state_dict(weights)
        always(model.encoder, bias)
        for ours, expected in zip(model.encoder(video), plain.encoder(video), strict=True):
            assert torch.equal(ours, expected)
        assert model.encoder.usage.tolist() == [share] * 3
    torch.nn.init.normal_(model.encoder.choice.weight, std=3.0)
    route = model.encoder.route(video)
    assert 0 < route.sum() < route.numel()
    assert torch.equal(route, model.encoder.route(video))  # argmax
    pooled, _ = model.encoder(video)
    for clip in range(3):
        for i in range(3):
            source = (model.encoder.frozen, model.encoder.blocks)[int(route[clip, i])]
            plain.encoder.blocks[i].load_state_dict(source[i].state_dict())
        torch.testing.assert_close(plain.encoder(video[clip : clip + 1])[0][0], pooled[clip])
    torch.testing.assert_close(model.encoder.usage, route.mean(0))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_spottune_gradients(checkpointing):
    """Every trained parameter of the encoder has a gradient on both kinds of step, as DDP demands;
    the frozen blocks have none; recomputation changes nothing; the route is 0 or 1."""
    grads = {}
    for again in (False, checkpointing):
        model = heads_model(checkpointing=again).train()
        criterion = make("spottune", model, supervised)
        encoder = model.encoder
        encoder.train()
        assert not encoder.frozen[2].training and encoder.blocks[2].training
        for task in ("clips", "boxes"):
            torch.manual_seed(3)
            model.zero_grad()
            grads[task, again] = gradients(model, criterion, task)
            of_encoder = {n: g for n, g in grads[task, again].items() if n.startswith("encoder")}
            assert all(grad is not None for grad in of_encoder.values())
            assert any(g.abs().max() > 0 for n, g in of_encoder.items() if ".policy." in n)
        assert all(p.grad is None for p in encoder.frozen.parameters())
    for task in ("clips", "boxes"):
        torch.testing.assert_close(grads[task, checkpointing], grads[task, False])
    torch.manual_seed(5)
    route = encoder.route(tiny_inputs()[0])
    assert set(route.unique().tolist()) <= {0.0, 1.0} and route.requires_grad


def test_spottune_has_the_gradient_of_the_softmax():
    """d route / d logits is that of softmax((logits + Gumbel noise) / temperature)."""
    model = heads_model().train()
    make("spottune", model, temperature=2.0)
    encoder, video = model.encoder, tiny_inputs()[0]
    torch.manual_seed(1)
    route = encoder.route(video)
    weights = torch.randn(route.shape)
    (route * weights).sum().backward()
    ours = encoder.choice.weight.grad.clone()
    encoder.choice.weight.grad = None
    torch.manual_seed(1)
    logits = encoder.choice(encoder.policy(video)[0]).unflatten(1, (-1, 2))
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / 2.0).softmax(2)
    assert torch.equal(route.detach(), (soft[..., 1] > 0.5).float())
    (soft[..., 1] * weights).sum().backward()
    torch.testing.assert_close(ours, encoder.choice.weight.grad, rtol=1e-4, atol=1e-7)


def test_spottune_samples_by_its_policy():
    model = heads_model().train()
    criterion = make("spottune", model)
    encoder = model.encoder
    assert encoder.temperature == 5.0 and len(encoder.policy.blocks) == 1
    torch.nn.init.zeros_(encoder.choice.weight)
    encoder.choice.bias.data = torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, -2.0])
    video = torch.zeros(400, 3, 8, 48, 32)
    torch.manual_seed(0)
    share = encoder.route(video).mean(0)  # Gumbel-max draws from the softmax at any temperature
    expected = torch.tensor([0.0, 2.0, -2.0]).sigmoid()
    torch.testing.assert_close(share, expected, atol=0.06, rtol=0)
    assert encoder.eval().route(video).mean(0).tolist() == [0.0, 1.0, 0.0]
    encoder.at_test = "sample"
    torch.testing.assert_close(encoder.route(video).mean(0), expected, atol=0.06, rtol=0)
    encoder.at_test = "argmax"
    encoder(video[:2])
    assert criterion.report() == {"finetuned_share": [0.0, 1.0, 0.0]}
    copy = methods.SpotTune(heads_model(seed=4).encoder)
    copy.load_state_dict(encoder.state_dict())
    assert torch.equal(copy.eval()(video[:2])[0], encoder(video[:2])[0])


def test_spottunes_criterion_is_the_plain_one():
    model = heads_model().eval()
    criterion = make("spottune", model, supervised, at_test="sample", temperature=3)
    assert (model.encoder.at_test, model.encoder.temperature) == ("sample", 3)
    *_, logits, batch = arguments = forward(model, "clips")
    loss = criterion(None, 0, *arguments, DIVISOR)
    assert torch.equal(loss, supervised(None, logits, batch, DIVISOR))
    assert criterion.state_dict() == {}
    criterion.load_state_dict({})


# ------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("selfdistil", dict(targt="pooled"), "unknown targt; known: target, weight"),
        ("selfdistil", dict(target="token"), "target = 'token', expected one of pooled, tokens"),
        ("selfdistil", dict(weight="1"), "weight = '1', expected a number from 0 to inf"),
        ("selfdistil", dict(weight=True), "weight = True"),
        ("selfdistil", dict(weight=-0.1), "weight = -0.1"),
        ("selfdistil", dict(refresh=-1), "refresh = -1"),
        ("selfdistil", dict(ema=1.5), "ema = 1.5, expected a number from 0 to 1"),
        ("selfdistil", dict(ema=float("nan")), "ema = nan"),
        ("spottune", dict(temperature=0), "temperature = 0"),
        ("spottune", dict(at_test="best"), "at_test = 'best'"),
        ("spottune", dict(weight=1), "unknown weight; known: temperature, at_test"),
    ],
)
def test_bad_method_options(method, options, message):
    """By the method itself, and before the first stage of one that is a second stage's."""
    with pytest.raises(ValueError, match=message) as error:
        make(method, heads_model(), **options)
    assert "\n" not in str(error.value)
    recipe = SimpleNamespace(method=f"finetune+{method}", method_options=options)
    with pytest.raises(ValueError, match=message):
        methods.stages(recipe)


@pytest.mark.parametrize("method", ["cofinetune", "finetune", "downstream"])
def test_options_of_a_method_that_has_none(method):
    recipe = SimpleNamespace(method=method, method_options=dict(weight=1))
    with pytest.raises(
        ValueError, match=f"method_options of {method}: unknown weight; known: none"
    ):
        methods.stages(recipe)


def test_the_ends_of_the_ranges_are_allowed():
    for options in (dict(ema=0), dict(ema=1), dict(weight=0), dict(refresh=0)):
        make("selfdistil", heads_model(), **options)
    make("spottune", heads_model(), temperature=1e-3)
