"""What bench.py measures on: films, detections, lists of a full-size layout.

All are made once, from fixed seeds, up to 2 GB, and stay in the folder cofinetune-bench of the
system's temporary folder; delete it at will.
"""

import json
import os
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

import ava_eval

CACHE = Path(tempfile.gettempdir()) / "cofinetune-bench"


def make_films(folder: Path, seconds: int, size: tuple[int, int] = (640, 360)) -> dict[str, Path]:
    """A film of 16 times so many seconds, the part it repeats, a clip of 10 s; made once.

    A drifting texture at 25 fps, x264 medium, crf 21, a key frame every 2.9 s. Grain of 4.5 grey
    levels brings 640x360 to 0.8 Mbit/s, as real films have; without it decoding is a third of that
    work, and the share of everything else too large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    film, part, clip = folder / "film.mp4", folder / "part.mp4", folder / "clip.mp4"
    films = {f"{seconds * 16 / 60:.3g} minutes": film, "part": part, "10 s": clip}
    if film.is_file():  # it is made last, and appears whole
        return films
    rng, (width, height) = np.random.default_rng(0), size
    grain = rng.normal(0, 4.5, (8, height, width, 1)).astype(np.float32)
    colours = torch.from_numpy(rng.random((1, 3, 30, 50), np.float32) * 255)
    canvas = F.interpolate(colours, (1000, 1800), mode="bicubic")[0].permute(1, 2, 0).numpy()
    coding = dict(crf="21", preset="medium", g="73", bf="3", sc_threshold="0")
    for path, length in ((part, seconds), (clip, 10)):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options=coding)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for i in range(length * 25):
                y, x = int(300 + 290 * np.sin(i / 61)), int(550 + 540 * np.sin(i / 83))
                picture = canvas[y : y + height, x : x + width] + grain[rng.integers(8)]
                picture = picture.clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode(None))
    repeat(part, 16, film)
    return films


def repeat(part: Path, times: int, film: Path) -> None:
    """The packets of a file one time after the other, without decoding."""
    unfinished, turns = film.with_name("unfinished.mp4"), film.with_name("turns.txt")
    turns.write_text(f"file {part.name}\n" * times)
    with av.open(str(turns), format="concat") as source, av.open(str(unfinished), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    os.replace(unfinished, film)


def make_detections(rows: int) -> tuple[str, str]:
    """Seeded ground truth and `rows` detections (a multiple of 180) as a model writes them for AVA:
    3 boxes on a keyframe, each near a true one, with 60 scores; csv with 6 decimals, and arrays."""
    truth_path, path = str(CACHE / f"truth_{rows}.csv"), str(CACHE / f"detections_{rows}.csv")
    if Path(path + ".npz").exists():  # it is made last, and appears whole
        return truth_path, path
    rng, boxes = np.random.default_rng(0), rows // 60
    labels = np.array(sorted(ava_eval.AVA_CLASSES))
    prior = np.array([ava_eval.AVA_TRAIN_COUNTS[i] for i in labels]) / 332353
    frame = np.arange(boxes) // 3
    video, second = np.char.mod("video_%06d", frame // 897), 902 + frame % 897
    corner = rng.random((boxes, 2)) * 0.6
    true = np.hstack((corner, corner + 0.1 + 0.3 * rng.random((boxes, 2))))
    near = np.round(np.clip(true + rng.normal(0, 0.03, true.shape), 0, 1), 6)
    has = rng.random((boxes, 60)) < prior
    has[~has.any(1), 10] = True
    logit = np.log(prior / (1 - prior)) + 3 * has + rng.normal(0, 1, has.shape)
    score = np.round(1 / (1 + np.exp(-logit)), 6)
    with open(truth_path + ".pbtxt", "w") as names:
        for i, name in ava_eval.AVA_CLASSES.items():
            names.write(f'item {{\n  name: "{name}"\n  id: {i}\n}}\n')
    with open(truth_path, "w") as truth, open(path, "w") as detections:
        for k in range(boxes):
            key = f"{video[k]},{second[k]:04d},"
            head = key + "".join(f"{x:.3f}," for x in true[k])
            truth.writelines(f"{head}{i},{k % 3}\n" for i in labels[has[k]])
            head = key + "".join(f"{x:.6f}," for x in near[k])
            for i, s in zip(labels, score[k], strict=True):
                detections.write(f"{head}{i},{s:.6f}\n")
    np.savez(path + ".part.npz", video=video, time=second, boxes=near, labels=labels, score=score)
    os.replace(path + ".part.npz", path + ".npz")
    return truth_path, path


# As many files as Kinetics-400, Moments in Time, Something-Something v2 and AVA have, all empty.

KINETICS, MOMENTS, SSV2, AVA_VIDEOS, AVA_BOXES = 240_000, 800_000, 169_000, 235, 837_000


def make_layout(share: int) -> tuple[Path, int]:
    """The folder with lists and empty files of a share-th of the sizes, and how many files."""
    root = CACHE / f"layout-{share}"
    count = (KINETICS + MOMENTS + SSV2) // share + AVA_VIDEOS
    if (root / "whole").is_file():  # it is made last
        return root, count
    lists, files = {}, []
    rows = ["label,youtube_id,time_start,time_end,split"]
    for i in range(KINETICS // share):
        name, start = f"class {i % 400}", i % 99
        rows.append(f"{name},id_{i:08d},{start},{start + 10},train")
        files.append(f"kinetics/{name}/id_{i:08d}_{start:06d}_{start + 10:06d}.mp4")
    lists["kinetics.csv"] = rows
    rows = []
    for i in range(MOMENTS // share):
        name = f"class{i % 339}"
        path = f"{name}/id-{i:08d}_{i % 60}.mp4"
        rows.append(f"{path},{name},3,0")
        files.append(f"moments/{path}")
    lists["moments.csv"] = rows
    entries = []
    for i in range(SSV2 // share):
        template = f"Doing [something] {i % 174}"
        entries.append({"id": str(i), "template": template, "label": "", "placeholders": []})
        files.append(f"ssv2/{i}.webm")
    lists["ssv2.json"] = [json.dumps(entries)]
    labels = {f"Doing something {i}": str(i) for i in range(174)}
    lists["ssv2-labels.json"] = [json.dumps(labels)]
    rows = []
    for i in range(AVA_BOXES // share):
        name = f"video{i // 3600 % AVA_VIDEOS:04d}"
        second = 902 + i // 4 % 897
        rows.append(f"{name},{second:04d},0.1,0.1,0.5,0.9,{i % 80 + 1},{i % 4}")
    lists["ava.csv"] = rows
    files += [f"ava/video{i:04d}.mp4" for i in range(AVA_VIDEOS)]
    lists["ava.pbtxt"] = [f'item {{ name: "act {i}" id: {i} }}' for i in range(1, 81)]
    for folder in {os.path.dirname(name) for name in files}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in files:
        os.close(os.open(root / name, os.O_CREAT))
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")
    (root / "whole").touch()
    return root, count
