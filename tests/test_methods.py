"""Tests of baselines.py."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_inputs, tiny_model

import model as M
from extras import methods


def baselines_model(seed=0, **options):
    heads = {"clips": M.Head("clip", 3, dropout=0.5), "boxes": M.Head("box", 4, dropout=0.5)}
    return tiny_model(heads, seed, **dict(cls=True, drop_path=0.3) | options)


def baselines_forward(model, task):
    video, boxes, box_clip = tiny_inputs()
    batch = SimpleNamespace(task=task, boxes=None, box_clip=None)
    if task == "boxes":
        batch = SimpleNamespace(task=task, boxes=boxes, box_clip=box_clip)
    features = model.encoder(video)
    return video, features, model.classify(features, task, batch.boxes, batch.box_clip), batch


def baselines_step(model, method, task, step=0):
    """Gradients of one micro-batch, as the loop makes them."""
    video, features, logits, batch = baselines_forward(model, task)
    if task == "clips":
        loss = M.clip_loss(logits, torch.tensor([0, 1, 2]))
    else:
        loss = M.box_loss(logits, torch.eye(4))
    (loss + method.loss(model, video, features, logits, batch, step)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def baselines_move(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


BASELINES_FORMS = [
    ("pooled", "cosine"),
    ("pooled", "mse"),
    ("tokens", "cosine"),
    ("tokens", "mse"),
    ("logits", "mse"),
    ("logits", "cosine"),
    ("logits", "kl"),
]


@pytest.mark.parametrize("target, form", BASELINES_FORMS)
@pytest.mark.parametrize("task", ["clips", "boxes"])
def test_distillation_is_exactly_zero_after_a_refresh(target, form, task):
    model = baselines_model().eval()
    method = methods.attach("selfdistil", model, dict(target=target, form=form, refresh=10))
    loss = lambda step: method.loss(model, *baselines_forward(model, task), step)
    assert loss(0) == 0
    baselines_move(model)
    assert loss(9) > 1e-4
    assert loss(10) == 0  # with the gradient of a minimum
    loss(10).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in model.parameters())


def test_distillation_distances_against_torch():
    model, moved = baselines_model().eval(), baselines_model(seed=1).eval()
    kl = torch.distributions.kl_divergence
    for target, form in BASELINES_FORMS:
        options = dict(target=target, form=form, weight=3.0, refresh=0)
        method = methods.attach("selfdistil", model, options)
        for task in ("clips", "boxes"):
            video, features, logits, batch = baselines_forward(moved, task)
            _, taught, goals, _ = baselines_forward(model, task)
            place = {"pooled": 0, "tokens": 1}.get(target)
            ours, goal = (logits, goals) if place is None else (features[place], taught[place])
            if form == "mse":
                rows = ((ours - goal) ** 2).flatten(1).mean(1)
            elif form == "cosine":
                cosine = torch.cosine_similarity(ours, goal, dim=-1)
                rows = (1 - cosine).reshape(len(ours), -1).mean(1)
            elif task == "clips":
                rows = kl(*(torch.distributions.Categorical(logits=x) for x in (goal, ours)))
            else:
                rows = kl(*(torch.distributions.Bernoulli(logits=x) for x in (goal, ours))).sum(1)
            found = method.loss(moved, video, features, logits, batch, 5).detach()
            expected = 3.0 * rows.sum().detach() / len(video)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            assert method.report()["distillation"] == pytest.approx(found.item() / 3)


@pytest.mark.parametrize("refresh, ema", [(4, 0.0), (1, 0.75), (0, 0.0)])
def test_teacher_schedule_and_resume(refresh, ema):
    """Copies at multiples of `refresh`, from the weights before that step; averages once a step;
    never moves at 0."""
    model, options = baselines_model().train(), dict(refresh=refresh, ema=ema)
    method = methods.attach("selfdistil", model, options)
    name = "encoder.blocks.1.fc1.weight"
    expected = model.state_dict()[name].clone()
    for step in range(10):
        if refresh and step % refresh == 0:
            expected = ema * expected + (1 - ema) * model.state_dict()[name]
        for task in ("clips", "boxes"):  # several micro-batches of one step
            grads = baselines_step(model, method, task, step)
        torch.testing.assert_close(method.state_dict()[name], expected)
        if step == 6:  # the process is replaced; the new one starts from other weights
            saved = method.state_dict()
            method = methods.attach("selfdistil", baselines_model(seed=step), options)
            method.load_state_dict(saved)
        baselines_move(model)
    assert not method.teacher.training
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert all(grads[n] is not None for n in grads if n.startswith("encoder"))


@pytest.mark.parametrize("config", [{}, dict(cls=False, pos="sincos", pool="mean-norm")])
def test_spottune_between_frozen_and_finetuned(config):
    """Fixed policies are the pretrained and the finetuned network exactly; a route per clip is a
    mix of blocks."""
    video = tiny_inputs()[0]
    for policy in ("frozen", "finetuned", "learned"):
        model, plain = (baselines_model(**config).eval() for _ in range(2))
        methods.attach("spottune", model, dict(policy=policy))
        baselines_move(model)
        first, moved = plain.encoder.state_dict(), model.encoder.state_dict()
        plain.encoder.load_state_dict(
            {
                name: first[name]
                if policy == "frozen" and name.startswith("blocks.")
                else moved[name]
                for name in first
            }
        )
        if policy != "learned":
            for a, b in zip(model.encoder(video), plain.encoder(video)):
                assert torch.equal(a, b)
            assert model.encoder.report()["finetuned_share"] == [float(policy == "finetuned")] * 3
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
    share = torch.tensor(model.encoder.report()["finetuned_share"])
    torch.testing.assert_close(share, route.mean(0))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_spottune_gradients(checkpointing):
    """Every trained parameter of the encoder has a gradient on both kinds of step, as DDP demands;
    the frozen blocks have none; recomputation changes nothing; the route is 0 or 1."""
    grads = {}
    for again in (False, checkpointing):
        model = baselines_model(checkpointing=again).train()
        method = methods.attach("spottune", model, {})
        assert not method.frozen[2].training and method.blocks[2].training
        for task in ("clips", "boxes"):
            torch.manual_seed(3)
            model.zero_grad()
            grads[task, again] = baselines_step(model, method, task)
            found = grads[task, again].items()
            assert all(grad is not None for name, grad in found if name.startswith("encoder"))
            assert any(grad.abs().max() > 0 for name, grad in found if ".policy." in name)
        assert all(p.grad is None for p in method.frozen.parameters())
    for task in ("clips", "boxes"):
        torch.testing.assert_close(grads[task, checkpointing], grads[task, False])
    torch.manual_seed(5)
    route = method.route(tiny_inputs()[0])
    assert set(route.unique().tolist()) <= {0.0, 1.0} and route.requires_grad


def test_spottune_samples_by_its_policy():
    model = baselines_model().train()
    method = methods.attach("spottune", model, {})
    torch.nn.init.zeros_(method.choice.weight)
    method.choice.bias.data = torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, -2.0])
    video = torch.zeros(400, 3, 8, 48, 32)
    torch.manual_seed(0)
    share = method.route(video).mean(0)  # Gumbel-max draws from the softmax at any temperature
    torch.testing.assert_close(share, torch.tensor([0.0, 2.0, -2.0]).sigmoid(), atol=0.06, rtol=0)
    assert method.eval().route(video).mean(0).tolist() == [0.0, 1.0, 0.0]
    copy = methods.SpotTune(baselines_model(seed=4).encoder)
    copy.load_state_dict(method.state_dict())
    assert torch.equal(copy.eval()(video[:2])[0], method(video[:2])[0])


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("selfdistil", dict(targt="pooled"), "unknown targt; known: target, form"),
        ("selfdistil", dict(target="token"), "target = 'token'"),
        ("selfdistil", dict(form="kl"), "kl"),
        ("selfdistil", dict(weight="1"), "weight"),
        ("selfdistil", dict(ema=1.5), "ema"),
        ("spottune", dict(temperature=0), "temperature"),
        ("spottune", dict(policy=1), "policy"),
    ],
)
def test_bad_method_options(method, options, message):
    with pytest.raises(ValueError, match=message) as error:
        methods.attach(method, baselines_model(), options)
    assert "\n" not in str(error.value)
