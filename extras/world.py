"""A procedural video world in the formats of the real datasets: the demo's data, made in seconds.

64x64, 16 fps H.264 clips of moving sprites. Upstream: `actions` (one actor, 12 motions) and
`templates` (two actors, 8 relations). Downstream: `ava`, 1-3 actors with several labels each and,
in training, a long tail. `make_world(folder)` or `python demo.py FOLDER` writes

    world.json                         the parameters
    actions/{train,val}.txt            Kinetics-style list      videos/train_00017.mp4 5
    actions/classes.txt                one name a line; the class is the line, from 0
    templates/{train,validation}.json  Something-Something v2   [{"id": "17", "template": "Push...
    templates/labels.json                                       {"Pushing something with s...": "6"
    ava/{train,val}.csv                AVA                      train_00000,0902,0.14,...,3,0
    ava/val_boxes.csv                  detected persons         val_00000,0902,0.60,...,,0.871867
    ava/action_list.pbtxt              AVA v2.2, with label_type
    */videos/*.mp4                     clips of a second; in `ava` movies of four such scenes

`ava` counts time as AVA does: a file begins 901.5 s into its "movie", second 902 is 0.5 s into the
file. All is a function of (seed, dataset, split, index), whatever the number of processes.
Copy me alone: I need numpy and av.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np

# ------------------------------------------------------------------------------------------------
# The world: sizes and vocabulary
# ------------------------------------------------------------------------------------------------

VERSION = 1  # to be raised when a World gets other pixels or labels
SIZE, FPS, FRAMES = 64, 16, 16  # px, frames per second, frames per clip or scene
SCENES, FIRST_SEC = 4, 902  # scenes (keyframes) per video of `ava`, time of the first


@dataclasses.dataclass(frozen=True)
class World:
    """Numbers of clips (`scenes`: keyframes), and what makes the world harder."""

    seed: int = 0
    actions_train: int = 960
    actions_val: int = 240
    templates_train: int = 640
    templates_val: int = 160
    scenes_train: int = 320
    scenes_val: int = 240
    zipf: float = 1.2  # exponent of the downstream class counts in training; validation is uniform
    min_positives: int = 8  # fewest training boxes of a class
    nuisance: float = 0.0  # 0..1: clutter, pan, contrast, unlabelled small sprites; everywhere


POSES = ["tall", "flat", "round"]
MOTIONS = "left right up down spin grow shrink blink shake hop orbit recolour".split()
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y is down
GROUPS = {"spin": 1, "grow": 2, "shrink": 2, "blink": 3, "recolour": 3}  # others 0: they displace
LABELS = POSES + MOTIONS + ["give", "take", "hit"]  # of `ava`; the label id is the position + 1
ACTIONS = ["still"] + MOTIONS[:-1]  # upstream knows neither poses nor recolour
TEMPLATES = {
    "approach": "Moving [something] closer to [something]",
    "leave": "Moving [something] away from [something]",
    "meet": "Moving [something] and [something] closer to each other",
    "part": "Moving [something] and [something] away from each other",
    "throw": "Throwing a ball from [something] to [something]",
    "hit": "Hitting [something] with [something]",
    "push": "Pushing [something] with [something]",
    "show": "Showing [something] next to [something]",
}
DRIFTS = {"approach": (1, 0), "leave": (-1, 0), "meet": (0.8, -0.8), "part": (-0.8, 0.8)}
# A shape is where f(u, v) < 1, in radii, v down; a texture is 0..1 between two colours.
SHAPES = {
    "tall": lambda u, v: np.hypot(u / 0.55, v / 1.15),
    "flat": lambda u, v: np.hypot(u / 1.15, v / 0.55),
    "round": lambda u, v: np.hypot(u, v) / 0.9,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) * 1.2,
    "diamond": lambda u, v: abs(u) + abs(v),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.68) / 0.32,
    "star": lambda u, v: np.hypot(u, v) * (1.25 + 0.35 * np.cos(5 * np.arctan2(v, u))),
}
UPSTREAM_SHAPES = list(SHAPES)[2:]
TEXTURES = {
    "split": lambda u, v: np.clip(4 * u + 0.5, 0, 1),
    "striped": lambda u, v: np.clip(2 * np.sin(6 * u) + 0.5, 0, 1),
    "quartered": lambda u, v: np.clip(8 * u * v + 0.5, 0, 1),
    "dotted": lambda u, v: np.clip(6 * (np.hypot(u - 0.35, v) - 0.3), 0, 1),
}
TIME = np.arange(FRAMES) - FRAMES // 2  # frames from the keyframe


# ------------------------------------------------------------------------------------------------
# Sprites
# ------------------------------------------------------------------------------------------------


class Sprite:
    """An actor during a clip: tracks (FRAMES,) around its place at the keyframe."""

    def __init__(self, rng: np.random.Generator, shapes: list, radius: float, x: float, y: float):
        bright = rng.uniform(0.55, 1.0, 3)
        bright[rng.integers(3)] *= rng.uniform(0.3, 1.0)
        dark = bright * rng.uniform(0.4, 0.7) * rng.uniform(0.8, 1.2, 3)
        other = np.roll(bright, rng.integers(1, 3)) * rng.uniform(0.3, 0.5)
        self.colours = np.stack([bright, dark, other])  # two of the texture, one to turn to
        self.shape, self.texture = str(rng.choice(shapes)), str(rng.choice(list(TEXTURES)))
        self.radius, self.x, self.y = radius, np.full(FRAMES, x), np.full(FRAMES, y)  # px
        self.angle = np.full(FRAMES, rng.uniform(-0.15, 0.15))  # radians
        self.growth = np.zeros(FRAMES)  # logarithm of the scale
        self.alpha, self.turned = np.ones(FRAMES), np.zeros(FRAMES)  # shares

    def move(self, motion: str, rng: np.random.Generator) -> None:
        """Add one of MOTIONS, or "still", to the tracks."""
        phase, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.75, 1.15)
        sign, slow = rng.choice([-1, 1]), rng.uniform(0.4, 0.55) * TIME
        if motion in HEADINGS:
            self.x += TIME * speed * HEADINGS[motion][0]
            self.y += TIME * speed * HEADINGS[motion][1]
        elif motion == "spin":
            self.angle += phase + rng.uniform(0.2, 0.35) * sign * TIME
            self.texture = "split"
            self.colours[1] *= 0.4  # a turning disc is seen by its texture only
        elif motion in ("grow", "shrink"):
            self.growth += TIME * speed / (15 if motion == "grow" else -15)
        elif motion == "blink":
            self.alpha *= np.sin(phase + speed * 1.15 * TIME) > -0.1
        elif motion == "recolour":
            self.turned += 1 / (1 + np.exp(-1.5 * (TIME - rng.uniform(-3, 2))))
        elif motion == "shake":
            self.x += 4.5 * speed * np.sin(2 * slow)
        elif motion == "hop":
            self.y -= 7 * speed * abs(np.sin(slow))
        elif motion == "orbit":
            self.x += 5.5 * speed * (np.cos(phase + sign * slow) - math.cos(phase))
            self.y += 5.5 * speed * (np.sin(phase + sign * slow) - math.sin(phase))

    def box(self) -> np.ndarray:
        """x1, y1, x2, y2 at the keyframe, in [0, 1]."""
        t = FRAMES // 2
        half = {"tall": (0.6, 1.15), "flat": (1.15, 0.6)}.get(self.shape, (1.0, 1.0))
        half = np.array(half) * self.radius * math.exp(self.growth[t])
        centre = np.array([self.x[t], self.y[t]])
        return np.clip(np.concatenate([centre - half, centre + half]) / SIZE, 0, 1)

    def draw(self, video: np.ndarray) -> None:
        """Blend into float32 (FRAMES, SIZE, SIZE, 3), computing a window around the sprite."""
        radius = (self.radius * np.exp(self.growth)[:, None, None]).astype(np.float32)
        half = math.ceil(1.2 * radius.max()) + 1
        left, top = (np.floor(track).astype(int) - half for track in (self.x, self.y))
        window = np.arange(2 * half + 2)
        dx = (left - self.x)[:, None, None] + window  # (T, 1, w)
        dy = (top - self.y)[:, None, None] + window[:, None]  # (T, w, 1)
        cos, sin = np.cos(self.angle)[:, None, None], np.sin(self.angle)[:, None, None]
        u = ((cos * dx + sin * dy) / radius).astype(np.float32)  # (T, w, w)
        v = ((cos * dy - sin * dx) / radius).astype(np.float32)
        cover = np.clip((1 - SHAPES[self.shape](u, v)) * radius * 0.7 + 0.5, 0, 1)
        cover = (cover * self.alpha[:, None, None])[..., None].astype(np.float32)
        first, second, third = self.colours.astype(np.float32)
        colour = first + (second - first) * TEXTURES[self.texture](u, v)[..., None]  # (T, w, w, 3)
        colour += (third - colour) * self.turned[:, None, None, None].astype(np.float32)
        for t in range(FRAMES):
            y, x = window + top[t], window + left[t]
            inside = np.ix_((y >= 0) & (y < SIZE), (x >= 0) & (x < SIZE))
            place = video[t, max(y[0], 0) : max(y[-1] + 1, 0), max(x[0], 0) : max(x[-1] + 1, 0)]
            place += (colour[t][inside] - place) * cover[t][inside]


def relate(first: Sprite, second: Sprite, relation: str, rng: np.random.Generator) -> list[Sprite]:
    """Add one of TEMPLATES to the tracks of two sprites; returns what flies between them."""
    axis = np.array([second.x[0] - first.x[0], second.y[0] - first.y[0]])
    gap, speed = np.hypot(*axis), TIME * rng.uniform(0.75, 1.0)
    near, far = (share * speed for share in DRIFTS.get(relation, (0, 0)))  # px along the axis
    if relation == "push":  # contact 3 frames before the keyframe
        near = 1.3 * (speed - speed[5]) + gap - first.radius - second.radius + 2
        far = np.maximum(1.3 * (speed - speed[5]), 0)
    elif relation == "hit":  # lunges; the other flashes white
        lunge = np.maximum(np.sin(rng.uniform(0.6, 0.75) * TIME), 0) ** 2
        near = lunge * (gap - first.radius)
        second.colours[2], second.turned = 1.0, np.maximum(second.turned, lunge)
    for sprite, shift in ((first, near), (second, far)):
        sprite.x += axis[0] / gap * shift
        sprite.y += axis[1] / gap * shift
    if relation != "throw":
        return []
    ball = Sprite(rng, ["round"], 3.5, 0, 0)
    ball.colours[:] = 1.0
    share = (TIME / rng.uniform(9, 11) + rng.uniform(0.4, 0.6)) % 1.0  # thrown again and again
    ball.x, ball.y = first.x + axis[0] * share, first.y + axis[1] * share
    return [ball]


# ------------------------------------------------------------------------------------------------
# Clips
# ------------------------------------------------------------------------------------------------


def cast_action(world: World, split: int, index: int, motion: str) -> tuple:
    """The generator of a clip, its sprites from back to front, and what its annotation needs."""
    rng = np.random.default_rng([world.seed, 1, split, index])
    actor = Sprite(rng, UPSTREAM_SHAPES, rng.uniform(8, 12), *rng.uniform(22, 42, 2))
    actor.move(motion, rng)
    still = Sprite(rng, UPSTREAM_SHAPES, rng.uniform(5, 7), *rng.choice([10, SIZE - 10], 2))
    return rng, [still, actor] if rng.random() < 0.25 else [actor], None


def cast_template(world: World, split: int, index: int, relation: str) -> tuple:
    """As cast_action; the annotation needs what fills [something]."""
    rng = np.random.default_rng([world.seed, 2, split, index])
    angle, (x, y) = rng.uniform(0, 2 * math.pi), rng.uniform(28, 36, 2)
    dx, dy = rng.uniform(9.5, 11.5) * np.array([math.cos(angle), math.sin(angle)])
    pair = [
        Sprite(rng, UPSTREAM_SHAPES, rng.uniform(7, 9), *place)
        for place in ((x - dx, y - dy), (x + dx, y + dy))
    ]
    ball = relate(*pair, relation, rng)
    return rng, pair[:: rng.choice([-1, 1])] + ball, [f"{s.texture} {s.shape}" for s in pair]


def cast_scene(world: World, split: int, index: int, labels: list[list[str]]) -> tuple:
    """As cast_action, from the labels of each actor; the annotation needs the boxes (n, 4)."""
    rng = np.random.default_rng([world.seed, 3, split, index])
    relation = {"give": "throw", "hit": "hit"}.get(labels[0][-1])
    while True:  # a few tries
        centres = rng.uniform(14, SIZE - 14, (len(labels), 2))
        if relation:
            angle, gap = rng.uniform(0, 2 * math.pi), rng.uniform(18, 21)
            centres[1] = centres[0] + gap * np.array([math.cos(angle), math.sin(angle)])
        apart = np.hypot(*(centres[:, None] - centres).T) + 99 * np.eye(len(labels))
        if apart.min() >= 17 and abs(centres - SIZE / 2).max() <= SIZE / 2 - 12:
            break
    actors = [
        Sprite(rng, [names[0]], rng.uniform(7, 9.5), *centre)
        for centre, names in zip(centres, labels)
    ]
    for actor, names in zip(actors, labels):
        for name in names[1:]:
            actor.move(name, rng)
    ball = relate(*actors[:2], relation, rng) if relation else []
    return rng, actors + ball, np.stack([actor.box() for actor in actors])


def background(world: World, dataset: str, rng: np.random.Generator) -> np.ndarray:
    """A textured plane under a panning camera: float32 (FRAMES, SIZE, SIZE, 3)."""
    pan = rng.uniform(-0.35, 0.35, 2) * (1 + world.nuisance)  # px per frame
    margin = math.ceil(abs(pan).max() * FRAMES / 2) + 1
    side = SIZE + 2 * margin + 1
    gratings, patches = (0, rng.integers(6, 14)) if dataset == "ava" else (3, 0)
    row, column = np.arange(side)[:, None, None] / side, np.arange(side)[:, None] / side
    canvas = np.zeros((side, side, 3)) + rng.uniform(0.08, 0.38, 3)
    canvas += (row - 0.5) * rng.uniform(-0.2, 0.2, 3) * (gratings > 0)
    for _ in range(gratings + round(2 * world.nuisance)):
        down, across, phase = rng.uniform(-25, 25, 3)
        canvas += np.sin(down * row + across * column + phase) * rng.uniform(-0.05, 0.05, 3)
    for _ in range(patches + round(world.nuisance * rng.integers(8, 18))):
        (y, x), (h, w) = rng.integers(0, side, 2), rng.integers(6, 28, 2)
        canvas[y : y + h, x : x + w] += (
            rng.uniform(0.05, 0.55, 3) - canvas[y : y + h, x : x + w]
        ) * 0.4
    canvas, video = canvas.astype(np.float32), np.empty((FRAMES, SIZE, SIZE, 3), np.float32)
    for t in range(FRAMES):  # bilinear at a fraction of a pixel
        (fy, y), (fx, x) = (math.modf(margin + shift * TIME[t]) for shift in pan)
        part = canvas[int(y) : int(y) + SIZE + 1, int(x) : int(x) + SIZE + 1]
        part = part[:-1] + (part[1:] - part[:-1]) * np.float32(fy)
        video[t] = part[:, :-1] + (part[:, 1:] - part[:, :-1]) * np.float32(fx)
    return video


CASTS = {"actions": cast_action, "templates": cast_template, "ava": cast_scene}


def render(world: World, dataset: str, split: int, index: int, label) -> np.ndarray:
    """One clip or scene: uint8 (FRAMES, SIZE, SIZE, 3)."""
    rng, sprites, _ = CASTS[dataset](world, split, index, label)
    video = background(world, dataset, rng)
    for _ in range(round(rng.uniform(0, 3) * world.nuisance)):
        small = Sprite(rng, list(SHAPES), rng.uniform(3, 4.5), *rng.uniform(4, SIZE - 4, 2))
        small.move(str(rng.choice(ACTIONS)), rng)
        small.draw(video)
    for sprite in sprites:
        sprite.draw(video)
    video = 0.5 + (video - 0.5) * rng.uniform(1 - 0.4 * world.nuisance, 1)
    return (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


# ------------------------------------------------------------------------------------------------
# Annotations: each function gives the text of every file and the clips of every video
# ------------------------------------------------------------------------------------------------


def annotate_actions(world: World) -> tuple[dict, dict]:
    texts, videos = {"actions/classes.txt": "".join(f"{name}\n" for name in ACTIONS)}, {}
    for split, name in enumerate(("train", "val")):
        total = (world.actions_train, world.actions_val)[split]
        rows = [(f"videos/{name}_{i:05d}.mp4", i % len(ACTIONS)) for i in range(total)]
        texts[f"actions/{name}.txt"] = "".join(f"{path} {label}\n" for path, label in rows)
        videos |= {
            f"actions/{path}": [("actions", split, i, ACTIONS[label])]
            for i, (path, label) in enumerate(rows)
        }
    return texts, videos


def annotate_templates(world: World) -> tuple[dict, dict]:
    plain = [text.replace("[", "").replace("]", "") for text in TEMPLATES.values()]
    labels = {text: str(i) for i, text in enumerate(plain)}
    texts, videos = {"templates/labels.json": json.dumps(labels, indent=1)}, {}
    for split, name in enumerate(("train", "validation")):
        entries = []
        for i in range((world.templates_train, world.templates_val)[split]):
            relation, text = list(TEMPLATES.items())[i % len(TEMPLATES)]
            things = cast_template(world, split, i, relation)[2]
            entries.append(
                {
                    "id": str(len(videos)),
                    "template": text,
                    "placeholders": things,
                    "label": text.replace("[something]", "{}").format(*things),
                }
            )
            videos[f"templates/videos/{len(videos)}.mp4"] = [("templates", split, i, relation)]
        texts[f"templates/{name}.json"] = json.dumps(entries, indent=0)
    return texts, videos


def annotate_ava(world: World) -> tuple[dict, dict]:
    kinds = ["MOVEMENT"] * len(POSES + MOTIONS) + ["INTERACTION"] * 3
    blocks = [
        f'label {{\n  name: "{name}"\n  label_id: {i}\n  label_type: PERSON_{kind}\n}}\n'
        for i, (name, kind) in enumerate(zip(LABELS, kinds), 1)
    ]
    texts, videos = {"ava/action_list.pbtxt": "".join(blocks)}, {}
    for split, name in enumerate(("train", "val")):
        rng, rows, found = np.random.default_rng([world.seed, 5, split]), [], []
        for i, scene in enumerate(plan_scenes(world, split)):
            movie, second = f"{name}_{i // SCENES:05d}", FIRST_SEC + i % SCENES
            videos.setdefault(f"ava/videos/{movie}.mp4", []).append(("ava", split, i, scene))
            boxes = cast_scene(world, split, i, scene)[2]
            rows += [
                row(movie, second, box, LABELS.index(label) + 1, person)
                for person, (box, labels) in enumerate(zip(boxes, scene))
                for label in labels
            ]
            found += [
                row(movie, second, box, "", f"{score:.6f}") for box, score in detect(rng, boxes)
            ]
        texts[f"ava/{name}.csv"] = "".join(rows)
    return texts | {"ava/val_boxes.csv": "".join(found)}, videos  # of the last split


def row(movie: str, second: int, box: np.ndarray, action: int | str, last: int | str) -> str:
    corners = ",".join(f"{value:.3f}" for value in box.clip(0, 1))
    return f"{movie},{second:04d},{corners},{action},{last}\n"


def plan_scenes(world: World, split: int) -> list[list[list[str]]]:
    """The labels of every actor of every scene: the pose first, an interaction last.

    Dealt, not drawn, so that every class has the training boxes its rank says."""
    rng = np.random.default_rng([world.seed, 4, split])
    total, zipf = ((world.scenes_train, world.zipf), (world.scenes_val, 0.0))[split]
    sizes = rng.choice([1, 2, 3], total, p=[0.15, 0.55, 0.3])
    least, scenes = world.min_positives, [[[] for _ in range(n)] for n in sizes]
    pairs = [scene for scene in scenes if len(scene) > 1 and rng.random() < 0.35]
    # The two of an interaction do nothing else: it stays visible, and counts stay exact.
    for scene, kind in zip(pairs, deal(rng, ["give", "hit"], len(pairs), zipf, least)):
        scene[0].append(kind)
        scene[1].append("take" if kind == "give" else "")
    free = [actor for scene in scenes for actor in scene if not actor and rng.random() < 0.9]
    for actor, motion in zip(free, deal(rng, MOTIONS, len(free), zipf, least)):
        other = [name for name in MOTIONS if GROUPS.get(name) != GROUPS.get(motion)]
        actor += [motion] + [str(rng.choice(other))] * (rng.random() < 0.2)
    actors = [actor for scene in scenes for actor in scene]
    poses = deal(rng, POSES, len(actors), min(zipf, 1.0), least)
    for actor, pose in zip(actors, poses):  # turned, tall would be flat
        actor[:] = ["round" if "spin" in actor else pose] + [name for name in actor if name]
    return scenes


def deal(rng: np.random.Generator, names: list[str], total: int, zipf: float, least: int) -> list:
    """`total` names in random order, in exact counts: Zipf over a random ranking, and a minimum."""
    least = min(least, total // len(names))
    share = 1 / np.arange(1, len(names) + 1) ** zipf
    counts = least + (share / share.sum() * (total - least * len(names))).astype(int)
    counts[0] += total - counts.sum()
    return rng.permutation(np.repeat(rng.permutation(names), counts)).tolist()


def detect(rng: np.random.Generator, boxes: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """A person detector: boxes off by 6 % of their sides, 4 % missed, some false ones."""
    found = [
        (box + np.tile(box[2:] - box[:2], 2) * rng.normal(0, 0.06, 4), rng.uniform(0.85, 1))
        for box in boxes
        if rng.random() < 0.96
    ]
    if rng.random() < 0.15:
        corner, score = rng.uniform(0.05, 0.7, 2), rng.uniform(0.5, 0.95)
        found.append((np.concatenate([corner, corner + rng.uniform(0.18, 0.3, 2)]), score))
    return found


# ------------------------------------------------------------------------------------------------
# Files and the command
# ------------------------------------------------------------------------------------------------


def write_video(path: Path, video: np.ndarray) -> None:
    """Encode beside `path` and rename: a file that exists is whole."""
    partial = path.with_name(path.name + ".partial")
    options = {"preset": "ultrafast", "crf": "18"}
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = FRAMES  # every scene begins with a frame to seek to
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, path)


def make_video(job: tuple[Path, World, list[tuple]]) -> None:
    path, world, clips = job
    write_video(path, np.concatenate([render(world, *clip) for clip in clips]))


def make_world(folder: str | Path, seed: int = 0, workers: int = 2, **sizes) -> None:
    """Write World(seed, **sizes) into `folder`. Videos that are there are kept: an interrupted run
    goes on, a complete one is reused. ValueError for a folder that holds another world or other
    files: nothing is ever deleted."""
    known = [field.name for field in dataclasses.fields(World)]
    if unknown := sorted(set(sizes) - set(known)):
        raise ValueError(f"unknown size {unknown[0]!r} of a demo world; known: {', '.join(known)}")
    folder, world, began = Path(folder), World(seed, **sizes), time.monotonic()
    wanted, manifest = {"version": VERSION} | dataclasses.asdict(world), folder / "world.json"
    if manifest.exists():
        found = json.loads(manifest.read_text())
        other = [f"{k} {found.get(k)}, not {v}" for k, v in wanted.items() if found.get(k) != v]
        if other:
            raise ValueError(f"{manifest}: another world ({'; '.join(other)}); use a new folder")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: files but no world.json; expected a new folder or a world")
    texts, jobs = {"world.json": json.dumps(wanted, indent=1)}, []
    for annotate in (annotate_actions, annotate_templates, annotate_ava):
        files, videos = annotate(world)
        texts |= files
        jobs += [(folder / path, world, clips) for path, clips in videos.items()]
    for dataset in CASTS:
        (folder / dataset / "videos").mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        partial, path = folder / f"{path}.partial", folder / path
        if not path.exists() or path.read_text() != text:  # several runs may share a complete world
            partial.write_text(text)
            os.replace(partial, path)
    missing = [job for job in jobs if not job[0].exists()]
    if workers < 2 or len(missing) < 50:
        follow(map(make_video, missing), len(missing))
    else:  # spawn: a forked copy of a process with threads (torch) can hang
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            follow(pool.imap_unordered(make_video, missing, chunksize=10), len(missing))
    done = f"{len(missing)} made in {time.monotonic() - began:.1f} s" if missing else "reused"
    print(f"world {folder}: {len(jobs)} videos, {done}")


def follow(results: Iterable, total: int) -> None:
    for done, _ in enumerate(results, 1):
        if sys.stderr.isatty() and (done % 20 == 0 or done == total):
            end = "\n" if done == total else ""
            print(f"\rmaking videos: {done}/{total}", end=end, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    for field in dataclasses.fields(World):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=field.type, default=field.default)
    try:
        make_world(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
