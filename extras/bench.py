"""bench: what it costs, each figure beside another one that was measured in turns with it.

Prints Markdown. A cell is the median (quartiles) over the rounds; a ratio is taken within each
round, so that what slows the machine slows both. CPU seconds are blurred less by a busy machine
than wall seconds. Peers that are missing are a row that says so; to have them all,

    pip install transformers decord torchcodec==0.13.0 opencv-python-headless

and FFmpeg's libraries for torchcodec, of which 0.13 is the newest that loads beside a torch 2.13
without CUDA. What it measures on is made once, up to 2 GB, and stays (bench_files.py). Linux only:
memory and cores are read from /proc.
"""

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
import torch.distributed as dist

import data
from extras import bench_files, checkpoints, formats, methods, videos, world
from extras import hugging_face as folders
from extras import job as jobs
from extras import recipe as recipes
from extras.workers import ahead
from model import SIZES, CoFinetuneModel, Head, ModelConfig, box_loss, clip_loss

HERE = Path(__file__).resolve().parent.parent
Table = tuple[str, list[dict]]  # title; rows {column: text, number or array over the rounds}


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__.partition(": ")[2]
    add = parser.add_argument
    words = "; ".join(f"{name}: {line}" for name, (_, line) in SECTIONS.items())
    add("section", nargs="?", choices=list(SECTIONS), help=f"{words} (default: all)")
    add(
        "--quick",
        action="store_true",
        help="tiny sizes, 38 s in all when idle: shows that it runs, gives no figures to quote",
    )
    add("--rounds", type=int, default=0, help="of each pair (default: by table; at least 2)")
    add(
        "--official",
        metavar="PATH",
        help="eval: ActivityNet's get_ava_performance.py, to compare with; takes minutes",
    )
    add(
        "--gpu-rate",
        type=float,
        default=141.0,
        help="data: clips/s of the GPU to feed (default: 141, what one H200 trains of ViT-B,"
        " 32 x 224², bf16, compiled)",
    )


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
    if options.official and not Path(options.official).is_file():
        raise ValueError(f"--official {options.official}: no such file")
    if options.rounds and options.rounds < 2 or not options.gpu_rate > 0:
        raise ValueError("--rounds: expected 2 or more; --gpu-rate: expected more than 0")
    if overrides and options.section != "train":
        raise ValueError(f"--{next(iter(overrides))}: of a recipe's keys only `bench train` takes")
    if options.quick:
        torch.set_num_threads(1)  # several wait for each other where others compute too
    print(machine(), end="\n\n")
    bench_files.CACHE.mkdir(parents=True, exist_ok=True)
    for name in [options.section] if options.section else SECTIONS:
        tables, _ = SECTIONS[name]
        for table in tables(options, overrides, cofinetune):
            print(markdown(*table), flush=True)


def model_tables(options, overrides, cofinetune) -> Iterator[Table]:
    clips, rounds = CLIPS, options.rounds or 4
    if options.quick:
        clips, rounds = TINY_CLIPS, options.rounds or 2
    for clip in clips:
        yield steps_table(clip, rounds, "cpu")
        yield memory_table(clip, "cpu")
    if not torch.cuda.is_available():
        yield "A training step on a GPU", [{"network": "no GPU here: not measured"}]
        return
    for count in (4, 16):
        clip = ("B", 32, 224, count)
        yield steps_table(clip, options.rounds or 10, "cuda")
        yield memory_table(clip, "cuda")


def data_tables(options, overrides, cofinetune) -> Iterator[Table]:
    seconds, size, rounds = 58, (640, 360), options.rounds or 12
    if options.quick:
        seconds, size, rounds = 6, (160, 90), options.rounds or 2
    films = bench_files.make_films(bench_files.CACHE / f"films-{seconds}-{size[1]}", seconds, size)
    yield decoding_table(films, rounds)
    yield feeding_table(films, rounds // 2 + 1, options.gpu_rate)
    yield workers_table(films["10 s"], 1 if options.quick else 5, 2 if options.quick else 16)


def eval_tables(options, overrides, cofinetune) -> Iterator[Table]:
    for rows in [9_000] if options.quick else [999_900, 4_999_860]:
        yield evaluation_table(rows, options.rounds or 3, options.official)


def train_tables(options, overrides, cofinetune) -> Iterator[Table]:
    rounds = options.rounds or (2 if options.quick else 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, changes in LOOPS.items():
            if options.quick:
                changes = changes | dict(steps=7)
            if not options.quick or "demo" in title:
                yield loop_table(folder, title, rounds, overrides, cofinetune, **changes)
        yield stages_table(folder, options.quick, overrides, cofinetune)
        yield processes_table(folder, options.quick, overrides, cofinetune)


def open_tables(options, overrides, cofinetune) -> Iterator[Table]:
    yield opening_table(100 if options.quick else 1, options.rounds or (1 if options.quick else 3))


SECTIONS = {
    "data": (data_tables, "decoding and loading clips"),
    "eval": (eval_tables, "the AVA evaluator"),
    "model": (model_tables, "a training step"),
    "train": (train_tables, "the loop around it"),
    "open": (open_tables, "the lists of 1.2 million videos"),
}


# ------------------------------------------------------------------------------------------------
# Measuring and printing
# ------------------------------------------------------------------------------------------------


def wall() -> float:
    """Seconds, after the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable, clock: Callable[[], float] = time.process_time) -> Callable[[], float]:
    """A function that makes the call and returns its seconds."""

    def measure() -> float:
        began = clock()
        call()
        return clock() - began

    return measure


def in_turns(calls: dict[str, Callable], rounds: int, warmup: int = 0) -> dict[str, np.ndarray]:
    """What each call returned, by round. Every second round goes backwards, so that neither a drift
    of the machine nor what a neighbour leaves in the caches favours one of them."""
    results = {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        names = list(calls)
        if turn % 2:
            names.reverse()
        for name in names:
            results[name].append(calls[name]())
    return {name: np.array(values[warmup:]) for name, values in results.items()}


def apart(function: Callable, *arguments, ranks: int = 1) -> list:
    """What a function returns by rank: in new processes, which can join a job. They fork from one
    that has imported this module and done nothing yet, so that their memory is their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    job = dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=str(ranks))
    with ProcessPoolExecutor(ranks, mp_context=context) as pool:
        answers = []
        for rank in range(ranks):
            place = job | dict(RANK=str(rank), LOCAL_RANK=str(rank))
            threads = torch.get_num_threads()
            answers.append(pool.submit(in_rank, place, threads, function, arguments))
        return [answer.result() for answer in answers]


def in_rank(place: dict[str, str], threads: int, function: Callable, arguments: tuple):
    os.environ |= place
    torch.set_num_threads(threads)
    return function(*arguments)


def resident(key: str) -> float:
    """MB of this process: VmRSS now, VmHWM at the worst moment since it was forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(key))


def program(code: str, *arguments) -> list:
    """What a program prints last, as JSON: a process that imports no more than it needs."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def show(cell) -> str:
    if isinstance(cell, np.ndarray):
        low, middle, high = np.quantile(cell, (0.25, 0.5, 0.75))
        return f"{show(middle)} ({show(low)}-{show(high)})" if len(cell) > 1 else show(middle)
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def markdown(title: str, rows: list[dict]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([show(row.get(column, "")) for column in columns])
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def machine() -> str:
    words = [f"python {sys.version.split()[0]}"]
    for name in ("torch", "numpy", "av", "transformers", "decord", "torchcodec"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            words.append(f"{name} {importlib.metadata.version(name)}")
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(": ")[2]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    words += [f"{len(os.sched_getaffinity(0))} cores {cpu}", device]
    words += [f"{torch.get_num_threads()} threads", f"load {os.getloadavg()[0]:.1f}"]
    return ", ".join([*words, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())])


# ------------------------------------------------------------------------------------------------
# model: a training step against Hugging Face's ViViT and against the machine's own matmul
# ------------------------------------------------------------------------------------------------
# ViViT/16x2 with the same weights on both sides, and the same fused AdamW; on a CPU float32 (and
# bf16 where it has units for it), on a GPU bf16 by autocast; nothing compiled unless a row says so.

CLIPS = [("B", 16, 112, 2), ("B", 16, 224, 1), ("B", 32, 224, 1)]  # size, frames, side, clips
TINY_CLIPS = [("tiny", 4, 32, 1)]
HEADS = {"clips": Head("clip", 400), "boxes": Head("box", 80)}
BOXES = 4  # of a clip
HF = "Hugging Face, sdpa"


def vivit(arch: str, frames: int, side: int, **options) -> CoFinetuneModel:
    torch.manual_seed(0)
    config = ModelConfig(frames, (side, side), cls=True, pool="cls", **SIZES[arch], **options)
    model = CoFinetuneModel(config, HEADS)
    torch.nn.init.normal_(model.heads["clips"].fc.weight, std=0.02)  # it starts at zero
    return model


def hugging_face(model: CoFinetuneModel):
    """Their network with our weights and its fastest attention; None without transformers."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import VivitForVideoClassification

    with tempfile.TemporaryDirectory() as folder, quiet():
        folders.to_hugging_face(model, "clips", folder)
        return VivitForVideoClassification.from_pretrained(folder, attn_implementation="sdpa")


def training_step(net, video: torch.Tensor, bf16: bool = False) -> Callable[[], None]:
    """Forward, backward, optimiser on these clips."""
    net.train().to(video.device)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)
    labels = torch.arange(len(video), device=video.device) % 400
    ours = isinstance(net, CoFinetuneModel)
    if not ours:
        video = video.transpose(1, 2).contiguous()  # theirs is (B, T, 3, H, W)

    def step() -> None:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
            logits = net(video, "clips") if ours else net(pixel_values=video).logits
            loss = clip_loss(logits, labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def box_head_step(model: CoFinetuneModel, clips: int, device: str) -> Callable[[], None]:
    """Forward and backward of the box head alone, from the encoder's tokens to their gradient."""
    boxes = torch.rand(BOXES * clips, 2, 2).sort(1).values.flatten(1)
    box_clip = torch.arange(clips).repeat_interleave(BOXES)
    config = model.encoder.config
    tokens = torch.randn(clips, *config.grid, config.width, device=device, requires_grad=True)
    features, labels = (tokens[:, 0, 0, 0], tokens), torch.zeros(len(boxes), 80, device=device)
    return lambda: box_loss(model.classify(features, "boxes", boxes, box_clip), labels).backward()


def flops(config: ModelConfig, clips: int) -> float:
    """Of forward and backward, a multiply-add counted as two. Neither what checkpointing or the
    attention kernel computes a second time is counted, nor the gradient of the pixels."""
    cells, d = math.prod(config.grid), config.width
    n = cells + config.cls
    block = 2 * n * d * d * (4 + 2 * config.mlp_ratio) + 4 * n * n * d
    return clips * (3 * config.depth * block + 2 * 2 * cells * d * 3 * math.prod(config.tubelet))


def matmul(device: str, products: int) -> tuple[Callable[[], None], float]:
    """Products of a good shape for the device, and their operations."""
    rows, d = (8192, 8192) if device == "cuda" else (1536, 768)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(rows, d, device=device, dtype=dtype)
    b = torch.randn(d, 4 * d, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(products):
            a @ b

    return multiply, products * 2 * rows * d * 4 * d


def steps_table(clip: tuple, rounds: int, device: str) -> Table:
    arch, frames, side, count = clip
    gpu = device == "cuda"
    ours = vivit(arch, frames, side)
    theirs = hugging_face(ours)
    video = torch.randn(count, 3, frames, side, side)
    gap = logits_gap(ours, theirs, video[:1]) if theirs else 0.0
    video = video.to(device)
    multiply, operations = matmul(device, products=1 if arch == "tiny" else 8)
    calls = {
        "here": training_step(ours, video, bf16=gpu),
        "the box head alone": box_head_step(ours, count, device),
        "matmul": multiply,
    }
    if theirs:
        calls[HF] = training_step(theirs, video, bf16=gpu)
    if not gpu and "avx512_bf16" in cpu_flags():
        calls["here, bf16"] = training_step(copy.deepcopy(ours), video, bf16=True)
    for name, net in {"here": ours, HF: theirs}.items():
        if gpu and net is not None:
            fast = copy.deepcopy(net)
            getattr(fast, "encoder", fast).compile()
            calls[f"{name}, compiled"] = training_step(fast, video, bf16=True)
    clock = wall if gpu else time.process_time
    calls = {name: timed(call, clock) for name, call in calls.items()}
    seconds = in_turns(calls, rounds, warmup=3 if gpu else 1)
    rate = operations / seconds.pop("matmul")
    work = flops(ours.encoder.config, count)
    rows = []
    for name, s in seconds.items():
        row = {"network": name, f"{'wall' if gpu else 'CPU'} ms": 1e3 * s}
        row["over ours"] = s / seconds["here"]
        if name != "the box head alone":
            row |= {"clips/s": count / s, "of matmul's rate": work / s / rate}
        if name == HF:
            row["logits differ by"] = f"{gap:.0e}"
        rows.append(row)
    if theirs is None:
        rows.append({"network": f"{HF}: transformers is not installed"})
    precision = "GPU, bf16" if gpu else "CPU, float32"
    return f"A training step of ViViT-{arch}, {count} of {frames} x {side}², {precision}", rows


@torch.no_grad()
def logits_gap(ours: CoFinetuneModel, theirs, video: torch.Tensor) -> float:
    expected = theirs.eval()(pixel_values=video.transpose(1, 2)).logits
    return (ours.eval()(video, "clips") - expected).abs().max().item()


def peak_memory(name: str, device: str, clip: tuple) -> float:
    """MiB that three steps add to this process, or take of the GPU, at the worst moment."""

    def make(arch: str, frames: int, side: int, clips: int) -> Callable[[], None]:
        net = vivit(arch, frames, side, checkpointing="checkpointing" in name)
        net = hugging_face(net) if name == HF else net
        video = torch.randn(clips, 3, frames, side, side, device=device)
        return training_step(net, video, bf16=device == "cuda")

    make("tiny", 2, 16, 1)()  # imports and torch's own buffers do not count
    before = resident("VmRSS")
    step = make(*clip)
    for _ in range(3):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resident("VmHWM") - before) * 1e6 / 2**20


def memory_table(clip: tuple, device: str) -> Table:
    arch, frames, side, count = clip
    rows, ours = [], 0.0
    for name in ("here", "here, checkpointing", HF):
        if name == HF and importlib.util.find_spec("transformers") is None:
            rows.append({"network": f"{HF}: transformers is not installed"})
            continue
        (mib,) = apart(peak_memory, name, device, clip)
        ours = ours or mib
        rows.append({"network": name, "MiB": mib, "over ours": mib / ours})
    title = (
        f"Peak memory of that step, {count} of {frames} x {side}², {device}: weights, gradients,"
    )
    return f"{title} AdamW, activations", rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ------------------------------------------------------------------------------------------------
# data: decoding against the decoder's own limit and against other loaders
# ------------------------------------------------------------------------------------------------
# Clips of a 15-minute film (AVA) and of a 10-second video (Kinetics), short side 256, one decoder
# thread; every method gets the same places in the same order.

SAMPLING = {"32x2": (32, 2), "16x4": (16, 4)}  # frames x stride, at 25 fps


def decode_here(path: Path, times: np.ndarray) -> np.ndarray:
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


OURS = "decode_clip, CPU ms"
DECODERS = {
    OURS: decode_here,
    "limit: decode only, unused frames skipped": decode_only,
    "limit: decode only, every frame": lambda path, times: decode_only(path, times, nonref=False),
    "PyAV, to_ndarray": with_pyav,
    "OpenCV": with_opencv,
    "decord": with_decord,
    "torchcodec, approximate": with_torchcodec,
    "torchcodec, exact": lambda path, times: with_torchcodec(path, times, "exact"),
}


def decoding_table(films: dict[str, Path], rounds: int) -> Table:
    rows, usable = {name: {"method": name} for name in DECODERS}, dict(DECODERS)
    for name, decode in DECODERS.items():
        try:
            decode(films["10 s"], np.arange(16) / 25)
        except (ImportError, OSError, RuntimeError) as error:  # torchcodec without FFmpeg: the last
            rows[name]["method"] += ": not installed, " + str(error).split(":")[0].split("\n")[0]
            del usable[name]
    for film, path in films.items():
        if film == "part":
            continue
        with av.open(str(path)) as container:
            seconds = container.duration / 1e6
        for shape, (frames, stride) in SAMPLING.items():
            starts = np.random.default_rng(0).integers(25 * (seconds - 3), size=rounds + 1) / 25
            times = starts[:, None] + np.arange(frames) * stride / 25
            calls = {}
            for name, decode in usable.items():
                turns = iter(times)
                calls[name] = timed(lambda d=decode, p=path, t=turns: d(p, next(t)))
            seconds_of = in_turns(calls, rounds, warmup=1)
            for name, s in seconds_of.items():
                cell = 1e3 * s if name == OURS else s / seconds_of[OURS]
                rows[name][f"{film}, {shape}"] = cell
    return "Clips at short side 256: the others' CPU time over decode_clip's", [*rows.values()]


def clip_stream(film: Path, batch: int, steps: int, colour: float = 0.4) -> data.Stream:
    """Training clips of one film, as a recipe's clip task has them: 32x2, crop 224, colour."""
    film.with_suffix(".txt").write_text(f"{film.name} 0\n{film.name} 1\n" * 32)
    task = data.Task("bench", "clip", train=f"{film.stem}.txt", batch=batch, colour=colour)
    return data.Stream({"bench": data.open_task(task, film.parent)}, steps=steps)


def feeding_table(films: dict[str, Path], rounds: int, gpu_rate: float) -> Table:
    """What a core makes of the whole way from a file to a training clip, and how many of them a GPU
    needs. Prepared: `prepare` with its defaults; plain: without the jitter of colours."""
    clips, paths, calls = 4, {}, {}
    for name, path in {"a film": films["part"], "10 s": films["10 s"]}.items():
        small = path.with_name(f"{path.stem}-prepared.mp4")
        videos.prepare_video(path, small)  # each time: what `prepare` does now
        paths |= {name: path, f"{name}, prepared": small, f"{name}, prepared, plain": small}
    for name, path in paths.items():
        stream = clip_stream(path, clips, rounds + 1, colour=0.0 if "plain" in name else 0.4)
        batches = data.training_batches(stream, 0, rounds + 1)
        calls[name] = timed(lambda batches=batches: next(batches))
    seconds = in_turns(calls, rounds, warmup=1)
    rows = []
    for name, s in seconds.items():
        original = seconds[name.partition(",")[0]]
        row = {"film": name, "MB a minute": size_of(paths[name]), "CPU ms a clip": 1e3 * s / clips}
        row |= {"over the original": s / original, "clips/s of a core": clips / s}
        row[f"cores for {gpu_rate:g} clips/s"] = gpu_rate * s / clips
        rows.append(row)
    return "Feeding a GPU: training clips, 32x2, crop 224, colour", rows


def size_of(film: Path) -> float:
    """MB a minute."""
    with av.open(str(film)) as container:
        return film.stat().st_size / 1e6 / (container.duration / 60e6)


def workers_table(clip: Path, rounds: int, steps: int) -> Table:
    """Two idle cores are needed for clips/s; CPU time shows on a busy machine too whether a second
    worker costs more than it does."""
    stream = clip_stream(clip, 4, steps)

    def measure(workers: int) -> tuple[float, float]:
        cpu, began = children_cpu(), wall()
        clips = 0
        for batch in data.training_batches(stream, 0, steps, work=ahead(workers)):
            clips += sum(len(part.video) for part in batch)
        return clips / (wall() - began), (children_cpu() - cpu) * 1e3 / clips

    one, two = in_turns({"1": lambda: measure(1), "2": lambda: measure(2)}, rounds).values()
    rows = []
    for n, what in enumerate(("clips per wall s", "workers' CPU ms per clip")):
        ratio = two[:, n] / one[:, n]
        rows.append({"": what, "1 worker": one[:, n], "2 workers": two[:, n], "ratio": ratio})
    return "The loader, 32x2, crop 224, batches of 4, from 10-second videos", rows


def children_cpu() -> float:
    """CPU seconds of the child processes that have ended."""
    return sum(os.times()[2:4])


# ------------------------------------------------------------------------------------------------
# eval: the AVA evaluator over the size of the detection file
# ------------------------------------------------------------------------------------------------

# Prints wall seconds, CPU seconds and peak memory in MB (ru_maxrss would begin at the parent's).
COSTS = """
import json, re, sys, time
{prepare}
stdout, sys.stdout = sys.stdout, sys.stderr
wall, cpu = time.perf_counter(), time.process_time()
{measure}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(json.dumps([wall, cpu, int(peak[1]) / 1e3]), file=stdout)
"""
CSV, ARRAYS, OFFICIAL = "ava_eval.py, from csv", "ava_eval.py, from arrays", "official script"
READ_ARRAYS = """
import ava_eval, numpy as np
a = np.load(sys.argv[2] + ".npz")
n, k = a["score"].shape
rows = ava_eval.Rows(np.repeat(a["video"], k), np.repeat(a["time"], k),
                     np.repeat(a["boxes"], k, 0), np.tile(a["labels"], n), a["score"].ravel())
"""
RUN_OFFICIAL = """
import os, runpy
truth, detections, script = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
sys.argv = [script, "-l", truth + ".pbtxt", "-g", truth, "-d", detections]
"""
EVALUATIONS = {  # what is prepared, what is measured
    CSV: ("import ava_eval", "ava_eval.evaluate(sys.argv[1], sys.argv[2])"),
    ARRAYS: (READ_ARRAYS, "ava_eval.evaluate(sys.argv[1], rows)"),
    "reading the file": ("", "for line in open(sys.argv[2], 'rb'): pass"),
    OFFICIAL: (RUN_OFFICIAL, "runpy.run_path(script, run_name='__main__')"),
}


def evaluation_table(size: int, rounds: int, official: str | None) -> Table:
    truth, detections = bench_files.make_detections(size)
    calls = {}
    for name, (prepare, measure) in EVALUATIONS.items():
        code = COSTS.format(prepare=prepare, measure=measure)
        calls[name] = lambda code=code: program(code, truth, detections, official or "")
    last = calls.pop(OFFICIAL)
    costs = in_turns(calls, rounds)
    if official:  # once: minutes, and far from any drift of the machine
        costs[OFFICIAL] = np.array([last()])
    ours, rows = costs[CSV][:, 1], []
    for name, cost in costs.items():
        seconds, cpu, memory = cost.T
        row = {"what": name, "wall s": seconds, "CPU s": cpu, "peak MB": memory}
        row["over ours from csv"] = cpu / ours[: len(cpu)]
        rows.append(row)
    if not official:
        rows.append({"what": f"{OFFICIAL}: not here (--official PATH)"})
    return f"The AVA evaluator on {size:,} rows, 3 boxes a keyframe, 60 scores a box", rows


# ------------------------------------------------------------------------------------------------
# train: the loop around the network
# ------------------------------------------------------------------------------------------------

START = 3  # first steps of a run, in which workers start and caches fill: not counted
VIVIT_B = dict(
    optimiser="adamw", lr=1e-5, threads=0, model_arch="B", model_frames=16, model_size=[112, 112],
    model_tubelet=[2, 16, 16], model_pos="learned", model_cls="true", model_pool="cls",
    task_frames=16, task_stride=1, task_size=112, task_short_side=[112, 112], task_batch=2,
    task_roi_size=7,
)  # fmt: skip
LOOPS = {  # what differs from the demo
    "the demo, 16 clips of 8 x 48²": dict(steps=63),
    "ViViT-B, 2 clips of 16 x 112², AdamW": dict(steps=11) | VIVIT_B,
}


def demo_recipe(cofinetune, overrides: dict[str, str], out: Path, **changes):
    """The demo without its evaluations, in a smaller world; changes: by key, `task_KEY` of each."""
    root = bench_files.CACHE / "train-world"
    with quiet():
        world.make_world(
            root, actions_train=96, actions_val=12, templates_train=64, templates_val=8,
            scenes_train=64, scenes_val=16,
        )  # fmt: skip
    words = dict(root=str(root), out=str(out), world="{}", preview="0", device="cpu", workers="1")
    words["save_every"] = "1000000"
    for task in ("actions", "templates", "ava"):
        words |= {f"task.{task}.val": "", f"task.{task}.val_boxes": ""}
        for key, value in changes.items():
            if key.startswith("task_"):
                words[f"task.{task}.{key.removeprefix('task_')}"] = str(value)
    for key, value in changes.items():
        if not key.startswith("task_"):
            words[key.replace("model_", "model.")] = str(value)
    return recipes.read(cofinetune.Recipe, "demo", words | overrides)


def logged(recipe) -> tuple[np.ndarray, np.ndarray]:
    """Wall seconds of each step after the first START, from the end of the one before it, and of
    its waiting for data."""
    times = []
    for line in (Path(recipe.out) / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "time" in record:
            times.append((record["time"]["unix"], record["time"]["waited_sec"]))
    times = np.array(times)
    return np.diff(times[START - 1 :, 0]), times[START:, 1]


class Steps:
    """The steps of a recipe, apart from the loop of `train`."""

    def __init__(self, cofinetune, recipe):
        self.cofinetune, self.recipe, self.job = cofinetune, recipe, jobs.join(recipe)
        with quiet():
            train_sets, _ = cofinetune.open_tasks(recipe, self.job)
        classes = {name: dataset.classes for name, dataset in train_sets.items()}
        model = checkpoints.build_model(recipe, classes, say=lambda words: None)
        self.model = model.train().to(self.job.device)
        self.learner = cofinetune.Learner(
            model=self.model,
            trunk=cofinetune.wrap(self.model.encoder, recipe, self.job),
            criterion=methods.Plain(cofinetune.task_loss),
            optimisers=cofinetune.make_optimisers(self.model, recipe),
            tasks={task.name: task for task in recipe.task},
        )
        self.stream = data.Stream(train_sets, recipe.schedule, recipe.seed, recipe.steps)

    def batches(self) -> Iterator[list[data.Batch]]:
        return data.training_batches(self.stream, 0, self.recipe.steps, work=ahead(1))

    def take(self, step: int, batches: list[data.Batch]) -> None:
        self.cofinetune.train_step(step, batches, self.learner, self.recipe, self.job)

    def take_bare(self, batch: data.Batch, video: torch.Tensor) -> None:
        """Forward, backward and optimiser alone, of a video that was normalised beforehand."""
        with self.cofinetune.autocast(self.recipe, self.job):
            logits = self.model(video, batch.task, batch.boxes, batch.box_clip)
            loss = clip_loss if batch.boxes is None else box_loss
            loss(logits, batch.labels).backward()
        for optimiser in self.learner.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


def loop_table(
    folder: Path, title: str, rounds: int, overrides: dict, cofinetune, **changes
) -> Table:
    """`train` as it is, loader and log included, against its step on the same batches from memory,
    and that against forward, backward and optimiser alone."""
    recipe = demo_recipe(cofinetune, overrides, folder / "loop", **changes)
    threads = torch.get_num_threads()
    steps = Steps(cofinetune, recipe)
    batches = list(steps.batches())
    videos = []
    for (batch,) in batches:
        batch = batch.to(steps.job.device)
        videos.append((batch, data.normalise(batch.video, *steps.model.scale)))

    def files() -> tuple[float, float]:
        with quiet():
            cofinetune.train(recipe, steps.job, [recipe])
        seconds, waits = logged(recipe)
        return seconds.mean(), waits.mean()

    def memory() -> float:
        return seconds_of(steps.take, enumerate(batches))

    def bare() -> float:
        return seconds_of(steps.take_bare, videos)

    costs = in_turns({"files": files, "memory": memory, "bare": bare}, rounds)
    torch.set_num_threads(threads)
    (whole, wait), step, alone = costs["files"].T, costs["memory"], costs["bare"]
    over = "over the row above"
    rows = [
        {"a step": "forward, backward, optimiser alone", "wall ms": 1e3 * alone},
        {"a step": "`train_step`, batches from memory", "wall ms": 1e3 * step, over: step / alone},
        {"a step": "of `train`, from files", "wall ms": 1e3 * whole, over: whole / step},
        {"a step": "of it, waiting for data", "wall ms": 1e3 * wait, over: wait / whole},
    ]
    return f"The loop: {title}, {recipe.precision} on {recipe.device}, one loader worker", rows


def seconds_of(call: Callable, arguments) -> float:
    """Mean wall seconds of a call after the first START."""
    seconds = []
    for words in arguments:
        began = wall()
        call(*words)
        seconds.append(wall() - began)
    return np.mean(seconds[START:])


def stages_table(folder: Path, quick: bool, overrides: dict, cofinetune) -> Table:
    """Where the time of a step goes, by torch's profiler around `train_step`."""
    recipe = demo_recipe(cofinetune, overrides, folder / "stages", steps=8 if quick else 60)
    threads = torch.get_num_threads()
    steps = Steps(cofinetune, recipe)
    batches, waits, seconds = steps.batches(), [], []
    profiler = torch.profiler.profile()
    for step in range(recipe.steps):
        if step == START:
            profiler.start()
        began = wall()
        parts = next(batches)
        waits.append(wall() - began)
        began = wall()
        with torch.profiler.record_function("train_step"):
            steps.take(step, parts)
        seconds.append(wall() - began)
    profiler.stop()
    torch.set_num_threads(threads)
    whole, wait = 1e3 * np.mean(seconds[START:]), 1e3 * np.mean(waits[START:])
    on_gpu = steps.job.device.type == "cuda"
    stages = {"waiting for data": wait} | stages_of(profiler, recipe.steps - START, on_gpu)
    stages["python, or an idle GPU"] = whole + wait - sum(stages.values())
    rows = [{"stage": "a step and the waiting before it", "wall ms": whole + wait, "share": 1.0}]
    for name, ms in stages.items():
        rows.append({"stage": name, "wall ms": ms, "share": ms / (whole + wait)})
    return f"The demo from files, one loader worker, {recipe.device}, profiled", rows


def stages_of(profiler, steps: int, on_gpu: bool) -> dict[str, float]:
    """ms of a step by kind of operation, of those that `train_step` calls itself; on a GPU, of the
    kernels that they start."""
    names = {
        "autograd::": "backward",
        "Optimizer.": "optimisers",
        "aten::linear": "forward: linear layers",
        "aten::scaled_dot": "forward: attention",
        "aten::layer_norm": "forward: norms",
        "aten::gelu": "forward: GELU",
    }
    stages = dict.fromkeys([*names.values(), "other operations"], 0.0)
    for event in profiler.events():
        if event.cpu_parent is None or event.cpu_parent.name != "train_step":
            continue
        stage = "other operations"
        for start, name in names.items():
            if event.name.startswith(start):
                stage = name
        time_us = event.device_time_total if on_gpu else event.cpu_time_total
        stages[stage] += time_us / 1e3 / steps
    return stages


def processes_table(folder: Path, quick: bool, overrides: dict, cofinetune) -> Table:
    """The same global batches in one process and in two, each with a thread and a loader worker. On
    two cores the workers decode where the networks compute, and the ratio tells of both."""
    recipe = demo_recipe(cofinetune, overrides, folder / "processes", steps=6 if quick else 120)

    def clips_per_sec(ranks: int) -> float:
        apart(train_in_rank, cofinetune.train, recipe, ranks=ranks)
        return recipe.task[0].batch / logged(recipe)[0].mean()

    calls = {"1": lambda: clips_per_sec(1), "2": lambda: clips_per_sec(2)}
    one, two = in_turns(calls, 1 if quick else 4).values()
    row = {"": "clips per wall s", "1 process": one, "2 processes": two, "ratio": two / one}
    if recipe.device == "cuda" and torch.cuda.device_count() == 1:
        row[""] += ", both on one GPU, gradients over gloo"
    return f"Processes on {recipe.device}, the demo, one thread each, the same global batch", [row]


def train_in_rank(train: Callable, recipe) -> None:
    """`train` as a rank of a job. NCCL refuses two ranks on one GPU, and so does `join`; here they
    may share it."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with quiet():
        if recipe.device == "cuda" and size > torch.cuda.device_count():
            dist.init_process_group("gloo")
            job = jobs.Job(rank, size, torch.device("cuda", 0), dist.group.WORLD)
        else:
            job = jobs.join(recipe)
        train(recipe, job, [recipe])
        job.barrier()  # gloo may abort when a rank leaves while another still speaks


# ------------------------------------------------------------------------------------------------
# open: reading the lists of a full-size layout and finding its videos
# ------------------------------------------------------------------------------------------------


def open_layout(root: Path, once: bool) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and MB of a rank; once: it takes what another one has read."""
    job = jobs.join(SimpleNamespace(threads=1, device="cpu"))
    clips = dict(kind="clip", flip=0.0)
    tasks = [
        data.Task("kinetics", train="kinetics.csv", videos="kinetics", **clips),
        data.Task("moments", train="moments.csv", videos="moments", **clips),
        data.Task("ssv2", train="ssv2.json", videos="ssv2", labels="ssv2-labels.json", **clips),
        data.Task("ava", "box", train="ava.csv", videos="ava", labels="ava.pbtxt", flip=0.0),
    ]
    open_task = functools.partial(job.read_once, data.open_task) if once else data.open_task
    job.barrier()
    before, began, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    opened = [open_task(task, root, "train", formats) for task in tasks]
    cost = time.perf_counter() - began, time.process_time() - cpu, resident("VmHWM") - before
    job.barrier()  # who has read stays until the others have taken it
    del opened
    return cost


def opening_table(share: int, rounds: int) -> Table:
    """Wall seconds of the slower rank; CPU seconds and memory of each rank."""
    root, count = bench_files.make_layout(share)
    ways = {
        "one process": (1, False),
        "two, each for itself": (2, False),
        "two, one reads": (2, True),
    }
    calls = {}
    for name, (ranks, once) in ways.items():
        calls[name] = functools.partial(apart, open_layout, root, once, ranks=ranks)
    rows = []
    for name, cost in in_turns(calls, rounds).items():  # (rounds, ranks, 3)
        row = {"processes": name, "wall s": cost[:, :, 0].max(1)}
        for rank in range(cost.shape[1]):
            row |= {
                f"rank {rank}: CPU s": cost[:, rank, 1],
                f"rank {rank}: MB it adds": cost[:, rank, 2],
            }
        rows.append(row)
    return f"Opening the lists of {count:,} videos, Kinetics, Moments, SSv2, AVA", rows
