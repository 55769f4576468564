"""What it costs, in ratios: every figure beside another one that was measured in turns with it.

    python bench.py                     everything, about an hour on two idle cores
    python bench.py model --quick       tiny sizes: shows that it runs, gives no figures to quote
    python bench.py eval --official ActivityNet/Evaluation/get_ava_performance.py --json eval.json

    model   a training step of ViViT-B against Hugging Face's and against the machine's own matmul
    data    decoding against PyAV, OpenCV, decord, torchcodec and the decoder's limit; the loader
    eval    the AVA evaluator over 0.1, 1 and 10 million rows, against merely reading the file
    train   what surrounds forward, backward and optimiser; where the time goes; 1 -> 2 processes

Prints Markdown tables. A cell is the median (quartiles) of the rounds; a ratio is taken within each
round, so that what slows the machine slows both. CPU seconds are blurred less than wall seconds by
a busy machine. `--json` writes the same rows, with every round. Nothing is installed: a peer that
is missing is a row that says so. To have them all,

    pip install transformers decord torchcodec==0.13.0 opencv-python-headless

and FFmpeg's libraries for torchcodec, of which 0.13 is the newest that loads beside a torch 2.13
without CUDA. Films and detection files are made once, up to 1 GB, and stay in the folder
cofinetune-bench of the system's temporary folder; delete it at will. Linux: memory and cores are
read from /proc.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import av
import numpy as np
import torch
import torch.nn.functional as F

import ava_eval
import cofinetune
import data
import model
from extras import formats, pictures, pretrained, world

HERE = Path(__file__).resolve().parent
CACHE = Path(tempfile.gettempdir()) / "cofinetune-bench"
Table = tuple[str, list[dict]]  # title; rows {column: text, number or array over the rounds}


# ------------------------------------------------------------------------------------------------
# Measuring and printing
# ------------------------------------------------------------------------------------------------


def wall() -> float:
    """Seconds, after the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable, clock: Callable[[], float] = time.process_time) -> Callable[[], float]:
    def measure() -> float:
        began = clock()
        run()
        return clock() - began

    return measure


def in_turns(runs: dict[str, Callable], rounds: int, warmup: int = 0) -> dict[str, np.ndarray]:
    """What each run returned, by round. Every second round goes backwards, so that neither a drift
    of the machine nor what a neighbour leaves in the caches favours one of them."""
    found = {name: [] for name in runs}
    for turn in range(-warmup, rounds):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            found[name].append(runs[name]())
    return {name: np.array(values[warmup:]) for name, values in found.items()}


def show(cell) -> str:
    if isinstance(cell, np.ndarray):
        low, middle, high = np.quantile(cell, (0.25, 0.5, 0.75))
        return f"{show(middle)} ({show(low)}-{show(high)})" if len(cell) > 1 else show(middle)
    return cell if isinstance(cell, str) else f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def markdown(title: str, rows: list[dict]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([show(row.get(column, "")) for column in columns] for row in rows),
    ]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(x) + " |" for x in lines), ""])


def environment() -> str:
    words = [f"python {sys.version.split()[0]}"]
    for name in "torch numpy av transformers decord torchcodec opencv-python-headless".split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            words.append(f"{name} {importlib.metadata.version(name)}")
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return ", ".join(
        [
            *words,
            f"{len(os.sched_getaffinity(0))} cores {''.join(cpu[:1]).partition(': ')[2]}",
            device,
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        ]
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# ------------------------------------------------------------------------------------------------
# model: a training step against Hugging Face's ViViT and against the machine's own matmul
# ------------------------------------------------------------------------------------------------
# ViViT-B/16x2, the same weights on both sides, the same fused AdamW; on a CPU float32, on a GPU
# bf16 by autocast; nothing compiled unless a row says so.

CLIPS = {"16 x 112²": (16, 112, 2), "16 x 224²": (16, 224, 1), "32 x 224²": (32, 224, 1)}
TINY_CLIPS = {"2 x 32²": (2, 32, 2), "4 x 32²": (4, 32, 1)}  # frames, side, clips
HEADS = {"clips": model.Head("clip", 400), "boxes": model.Head("box", 80)}
HF, BOX_HEAD = "Hugging Face, sdpa", "here, box head alone, 4 boxes a clip"
NO_HF = "transformers is not installed"


def vivit(frames: int, side: int, **options) -> model.CoFinetuneModel:
    options |= dict(model.SIZES["B"], cls=True, pool="cls")
    return model.CoFinetuneModel(model.ModelConfig(frames, (side, side), **options), HEADS)


def hugging_face(frames: int, side: int):
    """Their network with its fastest attention; None where transformers is missing."""
    try:
        from transformers import VivitConfig, VivitForVideoClassification
    except ImportError:
        return None
    return VivitForVideoClassification(
        VivitConfig(image_size=side, num_frames=frames, num_labels=400, attn_implementation="sdpa")
    )


def with_weights_of(theirs, video: torch.Tensor) -> tuple[model.CoFinetuneModel, float]:
    """Our model with their weights, and the largest difference of the logits."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.eval().save_pretrained(folder)
        found = pretrained.load(folder)
        ours = pretrained.build(found).eval()
        gap = ours(video, next(iter(ours.heads))) - theirs(video.transpose(1, 2)).logits
        return pretrained.build(found, HEADS), gap.abs().max().item()


def training_step(net, video: torch.Tensor) -> Callable[[], None]:
    """Forward, backward, optimiser on these clips."""
    net.train().to(video.device)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)
    labels = torch.arange(len(video), device=video.device) % 400
    ours = isinstance(net, model.CoFinetuneModel)
    video = video if ours else video.transpose(1, 2).contiguous()  # theirs is (B, T, 3, H, W)

    def step() -> None:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
            logits = net(video, "clips") if ours else net(pixel_values=video).logits
        F.cross_entropy(logits.float(), labels).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def box_head(net: model.CoFinetuneModel, clips: int, device: str) -> Callable[[], None]:
    """Forward and backward of the box head: RoIAlign, maximum, linear, loss; 4 boxes a clip."""
    boxes = torch.rand(4 * clips, 2, 2).sort(1).values.flatten(1)
    box_clip = torch.arange(clips).repeat_interleave(4)
    grid, width = net.encoder.config.grid, net.encoder.config.width
    tokens = torch.randn(clips, *grid, width, device=device, requires_grad=True)
    features, labels = (tokens[:, 0, 0, 0], tokens), torch.zeros(4 * clips, 80, device=device)
    return lambda: model.box_loss(
        net.classify(features, "boxes", boxes, box_clip), labels
    ).backward()


def flops(config: model.ModelConfig, clips: int) -> float:
    """Of forward and backward, a multiply-add counted as two. Neither what checkpointing or the
    attention kernel computes a second time is counted, nor the gradient of the pixels."""
    cells, d = math.prod(config.grid), config.width
    n = cells + config.cls
    block = 2 * n * d * d * (4 + 2 * config.mlp_ratio) + 4 * n * n * d
    return clips * (3 * config.depth * block + 2 * 2 * cells * d * 3 * math.prod(config.tubelet))


def step_table(clips: dict, rounds: int, device: str) -> Table:
    rows, gpu = [], device == "cuda"
    for name, (frames, side, count) in clips.items():
        torch.manual_seed(0)
        video, theirs = torch.randn(count, 3, frames, side, side), hugging_face(frames, side)
        ours, gap = with_weights_of(theirs, video[:1]) if theirs else (vivit(frames, side), 0.0)
        m, d = (8192, 8192) if gpu else (1536, 768)  # a product of good shape for the device
        a, b = (
            torch.randn(shape, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
            for shape in ((m, d), (d, 4 * d))
        )
        nets = {"here": ours} | ({HF: theirs} if theirs else {})
        for what, net in [*nets.items()] if gpu else ():
            fast = nets[f"{what}, compiled"] = copy.deepcopy(net)
            getattr(fast, "encoder", fast).compile()
        if gpu and theirs and count <= 4:  # it keeps every attention matrix
            nets["Hugging Face, eager attention"] = slow = copy.deepcopy(theirs)
            slow.set_attn_implementation("eager")
        runs = {what: training_step(net, video.to(device)) for what, net in nets.items()}
        runs["matmul"] = lambda: [a @ b for _ in range(8)]
        runs[BOX_HEAD] = box_head(ours, count, device)
        clock = wall if gpu else time.process_time
        seconds = in_turns(
            {what: timed(run, clock) for what, run in runs.items()}, rounds, 3 if gpu else 1
        )
        rate = 8 * 2 * m * d * 4 * d / seconds.pop("matmul")
        work, tokens = flops(ours.encoder.config, count), math.prod(ours.encoder.config.grid) + 1
        about = {"clips": f"{count} of {name}", "tokens": count * tokens}
        for what, s in seconds.items():
            row = about | {
                "network": what,
                f"{'wall' if gpu else 'CPU'} ms": 1e3 * s,
                "over ours": s / seconds["here"],
            }
            rows.append(
                row
                if what == BOX_HEAD
                else row
                | {
                    "µs per token": 1e6 * s / count / tokens,
                    "clips/s": count / s,
                    "of matmul's rate": work / s / rate,
                    "logits differ by": f"{gap:.0e}" if what == HF else "",
                }
            )
        rows += [] if theirs else [about | {"network": HF + ": " + NO_HF}]
    return f"A training step, {'GPU, bf16' if gpu else 'CPU, float32'}, AdamW", rows


def peak_memory(which: str, frames: int, side: int, clips: int) -> float:
    """MiB that three steps add to this process at the worst moment; wants its own process."""

    def status(key: str) -> float:
        with open("/proc/self/status") as lines:  # ru_maxrss would begin at the parent's
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    def step(clips: int, frames: int, side: int) -> Callable[[], None]:
        net = (
            hugging_face(frames, side)
            if which == HF
            else vivit(frames, side, checkpointing="checkpointing" in which)
        )
        return training_step(net, torch.randn(clips, 3, frames, side, side))

    step(1, 2, 16)()  # imports and torch's own buffers do not count
    before = status("VmRSS")
    run = step(clips, frames, side)
    for _ in range(3):
        run()
    return status("VmHWM") - before


def memory_table(clips: dict) -> Table:
    rows, spawn, ours = [], multiprocessing.get_context("spawn"), 0.0
    for name, clip in clips.items():
        for which in ("here", "here, checkpointing", HF):
            row = {"clips": f"{clip[2]} of {name}", "network": which}
            if which == HF and hugging_face(2, 16) is None:
                rows.append(row | {"network": HF + ": " + NO_HF})
                continue
            with spawn.Pool(1) as pool:
                row["MiB"] = pool.apply(peak_memory, (which, *clip))
            ours = row["MiB"] if which == "here" else ours
            rows.append(row | {"over ours": row["MiB"] / ours})
    return "Peak memory of a training step, CPU: weights, gradients, AdamW, activations", rows


def largest_batch(frames: int, side: int, **options) -> int:
    """The clips that a training step takes before the GPU's memory is full, to an eighth."""

    def fits(clips: int) -> bool:
        try:
            step = training_step(
                vivit(frames, side, **options),
                torch.randn(clips, 3, frames, side, side, device="cuda"),
            )
            step()
            step()
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            step = None
            torch.cuda.empty_cache()

    most, many = 0, 1
    while fits(many):
        most, many = many, 2 * many
    while many - most > most // 8 + 1:
        middle = (most + many) // 2
        most, many = (middle, many) if fits(middle) else (most, middle)
    return most


def bench_model(options: argparse.Namespace) -> Iterator[Table]:
    clips, rounds = (TINY_CLIPS, 2) if options.quick else (CLIPS, options.rounds or 4)
    for name, clip in clips.items():
        yield step_table({name: clip}, rounds, "cpu")
        yield memory_table({name: clip})
    if not torch.cuda.is_available():
        yield "A training step, GPU", [{"network": "no GPU here: not measured"}]
        return
    for clips in (4, 16):
        yield step_table({"32 x 224²": (32, 224, clips)}, 10, "cuda")
    yield (
        "Largest batch of 32 x 224² on this GPU, bf16",
        [
            {
                "network": "here, checkpointing" if on else "here",
                "clips": largest_batch(32, 224, checkpointing=on),
            }
            for on in (False, True)
        ],
    )


# ------------------------------------------------------------------------------------------------
# data: decoding against the decoder's own limit and against other loaders
# ------------------------------------------------------------------------------------------------
# Clips of a 15-minute film (AVA) and of a 10-second video (Kinetics), short side 256, one decoder
# thread; every method gets the same places in the same order.

SAMPLING = {"32x2": (32, 2), "16x4": (16, 4)}  # frames x stride, at 25 fps


def make_films(folder: Path, seconds: int) -> tuple[Path, Path, Path]:
    """(film, its sixteenth of so many seconds, 10-second clip), made once: a drifting texture at
    640x360 and 25 fps, x264 medium, crf 21, a keyframe every 2.9 s. Grain of 4.5 grey levels brings
    it to 0.8 Mbit/s, as real films have; without it decoding is a third of that work, and the share
    of everything else too large."""
    film, part, clip = (folder / f"{name}.mp4" for name in ("film", "part", "clip"))
    folder.mkdir(parents=True, exist_ok=True)
    if film.is_file():  # it is made last, and appears whole
        return film, part, clip
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 4.5, (8, 360, 640, 1)).astype(np.float32)
    canvas = (
        F.interpolate(
            torch.from_numpy(rng.random((1, 3, 30, 50), np.float32) * 255),
            (1000, 1800),
            mode="bicubic",
        )[0]
        .permute(1, 2, 0)
        .numpy()
    )
    for path, length in ((part, seconds), (clip, 10)):
        with av.open(str(path), "w") as container:
            stream = container.add_stream(
                "libx264",
                rate=25,
                options={
                    "crf": "21",
                    "preset": "medium",
                    "g": "73",
                    "bf": "3",
                    "sc_threshold": "0",
                },
            )
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for i in range(length * 25):
                y, x = int(300 + 290 * np.sin(i / 61)), int(550 + 540 * np.sin(i / 83))
                picture = canvas[y : y + 360, x : x + 640] + grain[rng.integers(8)]
                picture = picture.clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode(None))
    unfinished, turns = folder / "unfinished.mp4", folder / "turns.txt"
    turns.write_text(f"file {part.name}\n" * 16)
    with av.open(str(turns), format="concat") as source, av.open(str(unfinished), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    os.replace(unfinished, film)
    return film, part, clip


def decode(path: Path, times: np.ndarray) -> np.ndarray:
    return data.decode_clip(path, times, short_side=256)


def decode_only(path: Path, times: np.ndarray, nonref: bool = True) -> None:
    """What no loader can beat: open, seek, decode what is needed, convert nothing."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        decoder = stream.codec_context
        decoder.thread_count, decoder.thread_type = 1, "SLICE"
        wanted = {round(t / stream.time_base) for t in times}
        container.seek(min(wanted), stream=stream)
        left = len(wanted)
        for packet in container.demux(stream):
            decoder.skip_frame = "NONREF" if nonref and packet.pts not in wanted else "DEFAULT"
            left -= sum(frame.pts in wanted for frame in decoder.decode(packet))
            if not left:
                return


def with_pyav(path: Path, times: np.ndarray) -> np.ndarray:
    """As its documentation shows it: decode, keep the wanted frames, let to_ndarray scale."""
    with av.open(str(path)) as container:
        stream, left, out = container.streams.video[0], list(times - 0.001), []
        stream.codec_context.thread_count = 1
        container.seek(int(times[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= left[0]:
                out.append(frame.to_ndarray(width=455, height=256, format="rgb24"))
                if not left[1:]:
                    return np.stack(out)
                left.pop(0)


def with_opencv(path: Path, times: np.ndarray) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    numbers, out = np.rint(times * 25).astype(int), []
    video.set(cv2.CAP_PROP_POS_FRAMES, int(numbers[0]))
    for number in range(numbers[0], numbers[-1] + 1):
        video.grab()
        if number in numbers:
            out.append(cv2.resize(video.retrieve()[1], (455, 256))[..., ::-1])  # BGR -> RGB
    video.release()
    return np.stack(out)


def with_decord(path: Path, times: np.ndarray) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), width=455, height=256, num_threads=1)
    return reader.get_batch(np.rint(times * 25).astype(int)).asnumpy()


def with_torchcodec(path: Path, times: np.ndarray, mode: str = "approximate") -> np.ndarray:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    decoder = VideoDecoder(
        str(path),
        dimension_order="NHWC",
        num_ffmpeg_threads=1,
        seek_mode=mode,
        transforms=[Resize((256, 455))],
    )
    return decoder.get_frames_at(np.rint(times * 25).astype(int).tolist()).data.numpy()


METHODS = {
    "decode_clip, CPU ms": decode,
    "limit: decode only, unused frames skipped": decode_only,
    "limit: decode only, every frame": lambda path, times: decode_only(path, times, nonref=False),
    "PyAV, to_ndarray": with_pyav,
    "OpenCV": with_opencv,
    "decord": with_decord,
    "torchcodec, approximate": with_torchcodec,
    "torchcodec, exact": lambda path, times: with_torchcodec(path, times, "exact"),
}


def decoding(paths: list, methods: list, starts_sec: np.ndarray, frames: int, stride: int) -> dict:
    """CPU ms of every method on every path, at these starts; the first is to warm up."""
    runs = {}
    for path in paths:
        for method in methods:
            turns = iter(starts_sec[:, None] + np.arange(frames) * stride / 25)
            runs[path, method] = timed(lambda p=path, m=method, t=turns: m(p, next(t)))
    return {key: 1e3 * s for key, s in in_turns(runs, len(starts_sec) - 1, warmup=1).items()}


def decoding_table(films: dict[str, tuple[Path, int]], rounds: int) -> Table:
    """films: name -> path, seconds."""
    rows, usable = {name: {"method": name} for name in METHODS}, dict(METHODS)
    for name, method in METHODS.items():
        try:
            method([*films.values()][-1][0], np.arange(16) / 25)
        except (ImportError, OSError, RuntimeError) as error:  # torchcodec without FFmpeg: the last
            rows[name]["method"] += ": not installed, " + str(error).split(":")[0]
            del usable[name]
    for film, (path, seconds) in films.items():
        for shape, (frames, stride) in SAMPLING.items():
            starts = np.random.default_rng(0).integers(25 * (seconds - 3), size=rounds + 1) / 25
            found = decoding([path], [*usable.values()], starts, frames, stride)
            for name, method in usable.items():
                ours, cell = found[path, decode], found[path, method]
                rows[name][f"{film}, {shape}"] = cell if method is decode else cell / ours
    return "Clips at short side 256: the others' CPU time over decode_clip's", [*rows.values()]


def children_cpu() -> float:
    """CPU seconds of the child processes that have ended."""
    return sum(os.times()[2:4])


def loader_table(clip: Path, rounds: int, steps: int) -> Table:
    """Two idle cores are needed for clips/s; CPU time shows on a busy machine too whether a second
    worker costs more than it does."""
    clip.with_name("list.txt").write_text(f"{clip.name} 0\n" * 64)
    task = data.Task("bench", "clip", train="list.txt", batch=4)
    stream = data.Stream({"bench": data.open_task(task, clip.parent)}, steps=steps)

    def measure(workers: int) -> tuple[float, float]:
        cpu, began = children_cpu(), wall()
        clips = sum(4 for _ in data.training_batches(stream, 0, steps, workers=workers))
        return clips / (wall() - began), (children_cpu() - cpu) * 1e3 / clips

    one, two = in_turns({n: lambda n=n: measure(n) for n in (1, 2)}, rounds).values()
    return "The loader, 32x2, crop 224, batches of 4, from 10-second videos", [
        {"": what, "1 worker": one[:, n], "2 workers": two[:, n], "ratio": two[:, n] / one[:, n]}
        for n, what in enumerate(("clips per wall s", "workers' CPU ms per clip"))
    ]


def bench_data(options: argparse.Namespace) -> Iterator[Table]:
    seconds, rounds = (6, 2) if options.quick else (58, options.rounds or 12)
    film, part, clip = make_films(CACHE / f"films-{seconds}", seconds)
    length = f"{seconds * 16 / 60:.0f} minutes"
    yield decoding_table({length: (film, seconds * 16), "10 s": (clip, 10)}, rounds)
    yield loader_table(clip, 2 if options.quick else 5, 4 if options.quick else 16)
    small = part.with_name("prepared.mp4")
    if not small.is_file():
        pictures.prepare_video(part, small, short_side=256, keyframe_sec=1.0)
    starts = np.random.default_rng(0).uniform(0, seconds - 3, rounds + 1)
    before, after = decoding([part, small], [decode], starts, 32, 2).values()
    sizes = [path.stat().st_size / 1e6 for path in (part, small)]
    yield (
        f"{seconds} s of 640x360 before and after `pictures.py prepare` to short side 256",
        [
            {"": "MB", "before": sizes[0], "after": sizes[1], "ratio": sizes[1] / sizes[0]},
            {"": "CPU ms per 32x2 clip", "before": before, "after": after, "ratio": after / before},
        ],
    )


# ------------------------------------------------------------------------------------------------
# eval: the AVA evaluator over the size of the detection file
# ------------------------------------------------------------------------------------------------

OFFICIAL = "official script"
EVALUATIONS = {
    "ava_eval.py, from csv": "ava_eval.evaluate(truth, det)",
    "ava_eval.py, from arrays": "ava_eval.evaluate(truth, rows)",
    "reading the file": "collections.deque(open(det, 'rb'), 0)",
    "reading and splitting it": "collections.deque((x.split(b',') for x in open(det, 'rb')), 0)",
    OFFICIAL: "runpy.run_path(script, run_name='__main__')",
}
# Each in a process of its own, without torch, that prints wall s, CPU s and its peak memory in MB.
EVALUATION = """
import collections, json, os, re, runpy, sys, time
import numpy as np
import ava_eval
truth, det, script = sys.argv[1:]
if "rows" in {body!r}:
    a = np.load(det + ".npz")
    n, k = a["score"].shape
    rows = ava_eval.Rows(np.repeat(a["video"], k), np.repeat(a["time"], k),
                         np.repeat(a["boxes"], k, 0), np.tile(a["labels"], n), a["score"].ravel())
sys.path.insert(0, os.path.dirname(script))
sys.argv = [script, "-l", truth + ".pbtxt", "-g", truth, "-d", det]
wall, cpu, out = time.perf_counter(), time.process_time(), sys.stdout
sys.stdout = sys.stderr
{body}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\\t", " "))
print(json.dumps([wall, cpu, int(peak[1]) / 1e3]), file=out)  # ru_maxrss would have the parent's
"""


def evaluation(what: str, truth: str, det: str, script: str = "") -> list[float]:
    code = EVALUATION.format(body=EVALUATIONS[what])
    out = subprocess.run(
        [sys.executable, "-c", code, truth, det, script], cwd=HERE, capture_output=True, text=True
    )
    if out.returncode:
        raise RuntimeError(f"{what}: {out.stderr.strip().splitlines()[-1]}")
    return json.loads(out.stdout)


def make_detections(rows: int) -> tuple[str, str]:
    """Seeded ground truth and `rows` detections (a multiple of 180) as a model writes them for AVA:
    3 boxes on a keyframe, each near a true one, with 60 scores; csv with 6 decimals, and arrays."""
    CACHE.mkdir(parents=True, exist_ok=True)
    truth_path, path = (str(CACHE / f"{name}_{rows}.csv") for name in ("truth", "detections"))
    if Path(path + ".npz").exists():  # it is made last, and appears whole
        return truth_path, path
    rng, boxes = np.random.default_rng(0), rows // 60
    labels = np.array(sorted(ava_eval.AVA_CLASSES))
    prior = np.array([ava_eval.AVA_TRAIN_COUNTS[i] for i in labels]) / 332353
    frame = np.arange(boxes) // 3
    video, second = np.char.mod("video_%06d", frame // 897), 902 + frame % 897
    corner = rng.random((boxes, 2)) * 0.6
    true = np.hstack((corner, corner + 0.1 + 0.3 * rng.random((boxes, 2))))
    found = np.round(np.clip(true + rng.normal(0, 0.03, true.shape), 0, 1), 6)
    has = rng.random((boxes, 60)) < prior
    has[~has.any(1), 10] = True
    logit = np.log(prior / (1 - prior)) + 3 * has + rng.normal(0, 1, has.shape)
    score = np.round(1 / (1 + np.exp(-logit)), 6)
    Path(truth_path + ".pbtxt").write_text(
        "".join(
            f'item {{\n  name: "{name}"\n  id: {i}\n}}\n'
            for i, name in ava_eval.AVA_CLASSES.items()
        )
    )
    with open(truth_path, "w") as truth, open(path, "w") as detections:
        for k in range(boxes):
            key = f"{video[k]},{second[k]:04d},"
            head = key + "".join(f"{x:.3f}," for x in true[k])
            truth.writelines(f"{head}{i},{k % 3}\n" for i in labels[has[k]])
            head = key + "".join(f"{x:.6f}," for x in found[k])
            detections.writelines(f"{head}{i},{s:.6f}\n" for i, s in zip(labels, score[k]))
    np.savez(path + ".part.npz", video=video, time=second, boxes=found, labels=labels, score=score)
    os.replace(path + ".part.npz", path + ".npz")
    return truth_path, path


def bench_eval(options: argparse.Namespace) -> Iterator[Table]:
    sizes, rounds = [99_900, 999_900, 9_999_900], options.rounds or 3
    if options.quick:
        sizes, rounds = [9_000], 2
    rows = []
    for size in sizes:
        files = make_detections(size)
        found = in_turns(
            {
                what: lambda what=what: evaluation(what, *files)
                for what in EVALUATIONS
                if what != OFFICIAL
            },
            rounds,
        )
        if options.official:  # once: minutes, and far from any drift of the machine
            found[OFFICIAL] = np.array([evaluation(OFFICIAL, *files, options.official)])
        ours = found["ava_eval.py, from csv"][:, 1]
        for what, (seconds, cpu, memory) in ((what, x.T) for what, x in found.items()):
            rows.append(
                {
                    "rows": size,
                    "what": what,
                    "wall s": seconds,
                    "CPU s": cpu,
                    "over ours from csv": cpu / ours[: len(cpu)],
                    "rows per CPU s": size / cpu,
                    "peak MB": memory,
                }
            )
        if not options.official:
            rows.append({"rows": size, "what": f"{OFFICIAL}: not installed (--official PATH)"})
    yield "The AVA evaluator, 3 boxes a keyframe, 60 scores a box", rows


# ------------------------------------------------------------------------------------------------
# train: the loop around the network
# ------------------------------------------------------------------------------------------------

START = 3  # first steps of a run, in which workers start and caches fill: not counted
STAGES = {  # of a step, and what is timed for them; they do not overlap
    "waiting for data": [(cofinetune.Log, "next")],
    "normalise": [(data, "normalise")],
    "encoder, forward": [(model.VideoTransformer, "forward")],
    "head and loss": [(model.CoFinetuneModel, "classify"), (cofinetune, "task_loss")],
    "backward": [(torch.Tensor, "backward")],
    "gradient norm": [(torch.nn.utils, "clip_grad_norm_")],
    "optimisers": [(cofinetune.Muon, "step"), (torch.optim.AdamW, "step")],
    "log": [(cofinetune.Log, "step")],
}


def demo_recipe(out: Path, steps: int, task: dict, **changes) -> cofinetune.Recipe:
    """The demo without its evaluations, in a smaller world; `task` changes each of its tasks."""
    root, few = CACHE / "world", dict(actions_val=12, templates_val=8, scenes_val=16)
    with quiet():
        world.make_world(root, actions_train=96, templates_train=64, scenes_train=64, **few)
    recipe = cofinetune.read_recipe("demo", {"root": str(root), "out": str(out)})
    tasks = [dataclasses.replace(t, val="", val_boxes="", **task) for t in recipe.task]
    changes = dict(steps=steps, save_every=steps, device="cpu", world={}, preview=0) | changes
    return dataclasses.replace(recipe, task=tasks, **changes)


def train(recipe: cofinetune.Recipe) -> None:
    threads = torch.get_num_threads()
    with quiet():
        cofinetune.train(recipe, cofinetune.setup(recipe), fresh=True)
    torch.set_num_threads(threads)


def logged(recipe: cofinetune.Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Wall seconds of each step after the first START, from the end of the one before it, and of
    its waiting for data."""
    records = map(json.loads, (Path(recipe.out) / "log.jsonl").read_text().splitlines())
    times = np.array([(r["time"]["unix"], r["time"]["waited_sec"]) for r in records if "time" in r])
    return np.diff(times[START - 1 :, 0]), times[START:, 1]


def overhead_table(folder: Path, quick: bool) -> Table:
    """The loop as it is, loader and checkpoint included, against forward, backward and optimiser
    alone on the same batches from memory, normalised beforehand."""
    frames, side, arch, steps, rounds = (4, 32, "tiny", 7, 2) if quick else (16, 112, "B", 11, 4)
    crop = dict(frames=frames, stride=1, size=side, short_side=[side, side], batch=2, roi_size=7)
    recipe = demo_recipe(
        folder / "overhead",
        steps,
        crop,
        optimiser="adamw",
        lr=1e-5,
        threads=0,
        save_every=steps - 2,
        model=dict(arch=arch, frames=frames, size=[side, side], cls=True, pool="cls"),
    )
    tasks = {task.name: task for task in recipe.task}
    datasets = {
        name: data.open_task(task, recipe.root, "train", formats.read_clips)
        for name, task in tasks.items()
    }
    stream = data.Stream(datasets, recipe.schedule, recipe.seed, steps)
    with quiet():
        net = cofinetune.build_model(recipe, {name: d.classes for name, d in datasets.items()})
    (optimiser,) = cofinetune.make_optimisers(net, recipe)
    batches = [
        (batch, data.normalise(batch.video, *net.scale))
        for (batch,) in data.training_batches(stream, 0, steps)
    ]

    def loop() -> tuple[float, float, float]:
        train(recipe)
        seconds, waits = logged(recipe)
        saving = steps - 2 - START  # what comes after a step's record counts as the next step's
        step = np.delete(seconds, saving).mean()
        return step, np.delete(waits, saving).mean(), seconds[saving] - step

    def step(batch: data.Batch, video: torch.Tensor) -> None:
        logits = net(video, batch.task, batch.boxes, batch.box_clip)
        boxes = 0 if batch.boxes is None else len(batch.boxes)
        cofinetune.task_loss(tasks[batch.task], logits, batch, len(video), boxes).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    net.train()
    found = in_turns(
        {
            "loop": loop,
            "bare": lambda: [timed(lambda: step(*batch), wall)() for batch in batches][START:],
        },
        rounds,
    )
    (whole, wait, save), bare = found["loop"].T, found["bare"].mean(1)
    saves = cofinetune.Recipe().save_every
    seconds = {
        "forward, backward, optimiser alone": bare,
        "cofinetune.train": whole,
        "of it, waiting for data": wait,
        f"a {saves}th of a checkpoint (save_every)": save / saves,
    }
    return f"The loop around ViViT-{arch}, 2 clips of {frames} x {side}², AdamW, CPU", [
        {"a step": what, "wall ms": 1e3 * s, "over the bare step": s / bare}
        | ({"clips/s": 2 / s} if s is whole else {})
        for what, s in seconds.items()
    ]


def stages_of_a_run(recipe: cofinetune.Recipe) -> dict[str, float]:
    """Seconds of a step and of its stages, means over the run."""
    spent = {name: [] for name in STAGES}

    def watch(calls: list[float], function: Callable) -> Callable:
        def watched(*arguments, **options):
            began = wall()
            result = function(*arguments, **options)
            calls.append(wall() - began)
            return result

        return watched

    with contextlib.ExitStack() as patches:
        for name, functions in STAGES.items():
            for owner, method in functions:
                function = watch(spent[name], getattr(owner, method))
                patches.enter_context(mock.patch.object(owner, method, function))
        cpu = children_cpu()
        train(recipe)
        cpu = children_cpu() - cpu
    seconds, counted = {"a step": logged(recipe)[0].mean()}, recipe.steps - START
    for name, calls in spent.items():
        seconds[name] = sum(calls[len(calls) * START // recipe.steps :]) / counted
    seconds["everything else"] = 2 * seconds["a step"] - sum(seconds.values())
    return seconds | {"at the same time, the worker's CPU": cpu / recipe.steps}


def stage_table(folder: Path, quick: bool) -> Table:
    rows = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            rows.append({"device": device, "stage": "no GPU here: not measured"})
            continue
        recipe = demo_recipe(folder / device, 12 if quick else 120, {}, device=device)
        runs = [stages_of_a_run(recipe) for _ in range(2 if quick else 3)]
        for stage in runs[0]:
            s, whole = (np.array([run[name] for run in runs]) for name in (stage, "a step"))
            rows.append({"device": device, "stage": stage, "wall ms": 1e3 * s, "share": s / whole})
        rows[-len(runs[0])]["clips/s"] = recipe.task[0].batch / whole
    return "Co-finetuning from files, the demo, one loader worker: where a step's time goes", rows


def processes_table(folder: Path, quick: bool) -> Table:
    """The same global batches in one process and in two, each with a thread and a loader worker. On
    two cores the workers decode where the networks compute, and the ratio tells of both."""
    recipe = demo_recipe(folder / "processes", 9 if quick else 120, {})
    toml = folder / "processes.toml"
    toml.write_text(cofinetune.to_toml(recipe))

    def clips_per_sec(count: int) -> float:
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={count}",
                HERE / "cofinetune.py",
                "--recipe",
                toml,
                "--fresh",
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(f"{count} processes: {run.stderr.strip()[-2000:]}")
        return recipe.task[0].batch / logged(recipe)[0].mean()

    runs = {n: lambda n=n: clips_per_sec(n) for n in (1, 2)}
    one, two = in_turns(runs, 2 if quick else 4).values()
    return "Processes on CPU, the demo, one thread each, the same global batch", [
        {"": "clips per wall s", "1 process": one, "2 processes": two, "ratio": two / one}
    ]


def bench_train(options: argparse.Namespace) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as folder:
        for table in (overhead_table, stage_table, processes_table):
            yield table(Path(folder), options.quick)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

SECTIONS = {"model": bench_model, "data": bench_data, "eval": bench_eval, "train": bench_train}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", nargs="?", choices=list(SECTIONS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument(
        "--rounds", type=int, default=0, help="model, data, eval: of each pair (default: 4, 12, 3)"
    )
    parser.add_argument("--json", metavar="FILE", help="the same rows, with every round")
    parser.add_argument(
        "--official",
        default="",
        metavar="PATH",
        help="eval: ActivityNet's get_ava_performance.py; takes minutes",
    )
    options = parser.parse_args()
    if options.official and not Path(options.official).is_file():
        parser.error(f"--official {options.official}: no such file")
    report = {"environment": environment(), "tables": []}
    print(report["environment"], end="\n\n")
    for name in [options.section] if options.section else SECTIONS:
        for title, rows in SECTIONS[name](options):
            print(markdown(title, rows), flush=True)
            report["tables"].append({"section": name, "title": title, "rows": rows})
            if options.json:  # after each table: an interrupted run keeps what it has
                text = json.dumps(report, indent=1, default=np.ndarray.tolist)
                Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
