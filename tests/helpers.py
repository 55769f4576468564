"""What several test files use."""

import contextlib
import functools
import io
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ava_eval
import cofinetune
import data
import model as M
from cofinetune import Recipe
from extras import checkpoints, door, formats, job, world
from extras import recipe as recipes
from extras.checkpoints import recipe_of
from extras.job import Job
from extras.workers import ahead

# ------------------------------------------------------------------------------------------------
# For every section
# ------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent.parent
SHARED = HERE.parent / "shared" / "data"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def run_python(*words, **options):
    """`python WORDS` in the folder of the project, or in cwd."""
    options = dict(cwd=HERE, env=ENVIRONMENT, timeout=120) | options
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, **options)


def raise_exit(code, sentence=""):
    """What ends a process otherwise, with its tests."""
    print(sentence, file=sys.stderr)
    raise SystemExit(code)


def run_here(script, *words):
    """The same in this process, since importing torch takes seconds. What the script does not
    catch, `run_python` would show as a traceback, is raised."""
    out, error, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    ctrl_c = signal.getsignal(signal.SIGINT)
    words, code = [script, *map(str, words)], 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        contextlib.chdir(HERE),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(job, "leave", raise_exit),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGINT, ctrl_c)
    torch.set_num_threads(threads)
    return subprocess.CompletedProcess(words, code, out.getvalue(), error.getvalue())


def tiny_model(tasks=None, seed=0, **options):
    """4 x 6 x 4 tokens of width 24; every parameter is random, so that no zero hides a mistake."""
    torch.manual_seed(seed)
    tasks = tasks or {"clips": M.Head("clip", 5), "boxes": M.Head("box", 7, roi_size=3)}
    sizes = dict(frames=8, size=(48, 32), tubelet=(2, 8, 8), width=24, depth=3, heads=2)
    net = M.CoFinetuneModel(M.ModelConfig(**sizes | options), tasks)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def tiny_inputs(clips=3, seed=1):
    """Videos, four boxes, their clips."""
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(4, 2, 2, generator=g).sort(1).values.flatten(1)  # x1 < x2, y1 < y2
    return torch.randn(clips, 3, 8, 48, 32, generator=g), boxes, torch.tensor([2, 0, 2, 1])


def movie_frame(number, width=96, height=64):
    """A picture that says its number: 12 blocks of 8 px, white = 1, over a pattern that moves."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([(x + number * 3) % 256, (y * 2 + number) % 256, (x + y) % 256], -1) // 2
    for bit in range(12):
        image[:16, bit * 8 : bit * 8 + 8] = 235 if number >> bit & 1 else 16
    return image.astype(np.uint8)


def movie_number(image):
    return sum((image[4:12, bit * 8 + 2 : bit * 8 + 6].mean() > 128) << bit for bit in range(12))


def write_movie(
    path,
    frames=90,
    codec="libx264",
    rate=25,
    pix_fmt="yuv420p",
    size=(96, 64),
    picture=movie_frame,
    pts=None,
    start=0,
    rotation=0,
    mirror=(False, False),
    aspect=None,
    container=None,
    **options,
):
    """Frame i, picture(i, *size), is shown at (start + i) / rate, or at pts[i] milliseconds.
    mirror: left to right, upside down, after the rotation; aspect: of a pixel."""
    clock = Fraction(1, 1000) if pts is not None else 1 / Fraction(rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as file:
        options = {key: str(value) for key, value in options.items()}
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        context = stream.codec_context
        context.thread_count, context.time_base = 1, clock
        context.color_range = 2 if "yuvj" in pix_fmt else 1
        if aspect:
            context.sample_aspect_ratio = aspect
        if rotation or any(mirror):
            stream.set_display_rotation(rotation, *mirror)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), "rgb24")
            frame.pts, frame.time_base = start + i if pts is None else pts[i], clock
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def read_movie(path):
    """Everything in it, decoded in order: (times in seconds as fractions, RGB frames)."""
    with av.open(str(path)) as file:
        frames = [
            (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24"))
            for frame in file.decode(video=0)
        ]
    return [time for time, _ in frames], np.stack([image for _, image in frames])


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def open_written(root, kind, lines, split="train", name="annotations.csv", touch="", **options):
    """A task with these annotations, of empty videos."""
    for video in filter(None, touch.split("; ")):
        write_lines(root / "v" / video)
    if lines:
        write_lines(root / name, *lines)
    options = {"flip": 0.0, "videos": "v", split: name} | options
    return data.open_task(data.Task("t", kind, **options), root, split, formats)


H264, MPEG4 = dict(codec="libx264", g=24, bf=3), dict(codec="mpeg4", g=24, bf=2, qscale=3)


def model_oracle(enc, video):
    """The encoder again, from formulas: strided convolution, explicit softmax, erf or tanh."""
    c = enc.config

    def norm(x, layer, eps):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias

    def gelu(x):
        if c.gelu == "none":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = F.conv3d(video, enc.patch.weight, enc.patch.bias, stride=c.tubelet)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([enc.cls.expand(len(x), 1, -1), x], 1) if c.cls else x
    x = x + enc.pos
    for b in enc.blocks:
        q, k, v = (norm(x, b.norm1, c.eps) @ b.qkv.weight.T + b.qkv.bias).chunk(3, -1)
        d = c.width // c.heads
        heads = []
        for s in (slice(i * d, i * d + d) for i in range(c.heads)):
            scores = q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(d)
            heads.append(scores.softmax(-1) @ v[..., s])
        x = x + torch.cat(heads, -1) @ b.proj.weight.T + b.proj.bias
        hidden = gelu(norm(x, b.norm2, c.eps) @ b.fc1.weight.T + b.fc1.bias)
        x = x + hidden @ b.fc2.weight.T + b.fc2.bias
    tokens = norm(x, enc.norm, c.final_eps)
    mean_norm = norm(x.mean(1), enc.norm, c.final_eps)
    patches = tokens[:, int(c.cls) :]
    pooled = {"cls": tokens[:, 0], "norm-mean": patches.mean(1)}
    return pooled.get(c.pool, mean_norm), patches.reshape(len(x), *c.grid, -1)


TINY = dict(
    seed=3,
    actions_train=36,
    actions_val=24,
    templates_train=32,
    templates_val=16,
    scenes_train=32,
    scenes_val=16,
)
SGD = ["--optimiser", "sgd", "--lr", "0.02"]


def toml_table(table):
    return "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"


def run_options(root, out, *more, steps=6):
    """A short run without previews; what comes later on a command line wins."""
    options = {
        "--root": root,
        "--out": out,
        "--world": toml_table(TINY),
        "--steps": steps,
        "--warmup": 2,
        "--workers": 0,
        "--threads": 1,
        "--log-every": 3,
        "--preview": 0,
    }
    options["--device"] = "cpu"  # what is promised bit for bit
    options |= {f"--task.{task}.batch": 4 for task in ("actions", "templates", "ava")}
    return [*(str(word) for pair in options.items() for word in pair), *map(str, more)]


def run_train(root, out, *more, **kinds):
    rest, overrides = door.split_overrides(run_options(root, out, *more, **kinds), Recipe)
    assert not rest
    return cofinetune.train(recipes.read(Recipe, "demo", overrides), Job())


def run_command(*words, code=0, run=run_here, **options):
    """The command as a user types it; its exit code is `code`, and nothing ends in a traceback."""
    done = run("cofinetune.py", *words, **options)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done


def run_ranks(ranks):
    """Like `run_python`, in several processes."""
    return functools.partial(
        run_python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"
    )


def run_start(*words):
    """In a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "cofinetune.py", *words],
        cwd=HERE,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_log(out):
    """The log without what depends on the machine."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def run_metrics(out):
    return json.loads((out / "metrics.json").read_text())["task"]


def run_apart(*folders):
    """The largest difference between the weights of two runs."""
    one, other = (checkpoints.load(out / "last.pt")["model"] for out in folders)
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def run_start_weights(state):
    """What the run of a checkpoint began with."""
    return checkpoints.build_model(recipe_of(state, Recipe), state["classes"]).state_dict()


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds") / "tiny"
    world.make_world(root, workers=1, **TINY)
    return root


@pytest.fixture(scope="session")
def tiny_run(tiny_world, tmp_path_factory):
    """The whole demo at tiny size, through the command line: its folder, what it printed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, run_command(*run_options(tiny_world, out, "--preview", 2), run=run_python).stdout


MODEL_VARIANTS = {
    "vivit": dict(cls=True, pool="cls"),
    "vivit-mean": dict(),
    "demo": dict(pos="learned-axes", qk_init="mimetic"),
    "videomae": dict(pool="mean-norm", gelu="none", pos="sincos", eps=0.05, final_eps=0.2),
}


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """videos/v0.mp4 .. v11.mp4 of 2 to 3 seconds with annotations for a clip and a box task."""
    root = tmp_path_factory.mktemp("data")
    for i in range(12):
        write_movie(root / f"videos/v{i}.mp4", frames=50 + 2 * i, g=24, bf=3)
    write_lines(root / "list.txt", *(f"v{i}.mp4 {i % 3}" for i in range(12)))
    write_lines(
        root / "boxes.csv",
        *(
            f"v{i},{t:04d},0.1,0.2,0.5,0.9,{1 + (i + t) % 4},0\nv{i},{t}.000000,0.4,0.2,0.9,0.9,2"
            for i in range(12)
            for t in (0, 1, 2)
            if i % 5 or t
        ),
    )
    write_lines(root / "actions.pbtxt", *(f'item {{ name: "a{i}" id: {i} }}' for i in range(1, 5)))
    return root


def data_tasks(**changes):
    common = dict(videos="videos", size=32, short_side=[40, 48], frames=4, stride=4, batch=4)
    common |= changes
    boxes = common | dict(labels="actions.pbtxt", mixup=0.0, views=[1, 1])
    return (
        data.Task("clips", "clip", train="list.txt", val="list.txt", **common),
        data.Task("persons", "box", train="boxes.csv", val="boxes.csv", **boxes),
    )


def data_stream(root, seed=0, steps=20, **changes):
    datasets = {task.name: data.open_task(task, root) for task in data_tasks(**changes)}
    return data.Stream(datasets, "round_robin", seed, steps)


def data_batches(stream, start, stop, rank=0, world=1, workers=0, micro=1):
    steps = data.training_batches(stream, start, stop, rank, world, micro, ahead(workers))
    return [batch for step in steps for batch in step]


def data_same(a, b):
    fields = zip(
        *([value for batch in batches for value in vars(batch).values()] for batches in (a, b)),
        strict=True,
    )
    return all(np.array_equal(x, y) for x, y in fields)


AVA_LABELS = {1: "a", 2: "b", 4: "c"}  # 3 is foreign


def ava_file(path, rows) -> str:
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


def ava_map(folder, truth, found, protocol=None, exclusions=None, **options) -> dict:
    files = [ava_file(folder / name, rows) for name, rows in (("g.csv", truth), ("d.csv", found))]
    if exclusions is not None:
        exclusions = ava_file(folder / "e.csv", exclusions)
    return ava_eval.evaluate(*files, AVA_LABELS, exclusions, protocol, **options)


def ava_random(seed: int, digits: int = 0) -> tuple[list, list, list]:
    """Truth, detections, exclusions: crowded keyframes, duplicates, keyframes without truth,
    foreign labels, inverted boxes, shuffled. Few digits make equal scores, 0 makes none."""
    rng = random.Random(seed)

    def box():
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(11), 2)) for _ in "xy")
        return ",".join(f"{v / 10:.2f}" for v in (x1, y1, x2, y2))

    truth, found = [], []
    for frame in [f"v{i % 3},{902 + i // 3:04d}" for i in range(9)]:
        boxes = [box() for _ in range(rng.randint(1, 4))]
        for one in boxes if rng.random() < 0.8 else ():
            truth += [
                f"{frame},{one},{c}" + rng.choice(["", f",{rng.randrange(3)}"])
                for c in (1, 2, 3, 4)
                if rng.random() < 0.5
            ]
        for _ in range(rng.choice([0, 2, 9, 30])):
            one = rng.choice(boxes) if rng.random() < 0.6 else box()
            if rng.random() < 0.1:
                one = ",".join(one.split(",")[::-1])
            found += [
                f"{frame},{one},{c},"
                + (f"{rng.random():.{digits}f}" if digits else repr(rng.random()))
                for c in (1, 2, 3, 4)
            ]
    if seed % 2:
        rng.shuffle(truth)
        rng.shuffle(found)
    return truth, found, ["v0,0902", "v1,0903"]
