"""A procedurally generated video world, written in the formats of the real data sets.

Three data sets of 64x64, 16 fps H.264 clips about moving sprites, made in seconds and read by the same readers and
decoder as real data. Upstream `actions` (one actor, 12 motions) and `templates` (two actors, 8 relations between
them) are clip classification; downstream `ava` (1-3 actors, each with several labels, a long tail of rare classes)
is action localisation. `make_world(folder)` or `python demo.py FOLDER` writes

    world.json                          the parameters; the folder is reused only for the same ones
    actions/classes.txt                 one class name a line; the class index is the line, from 0
    actions/{train,val}.txt             Kinetics style     videos/00017.mp4 5
    templates/labels.json               Something-Something v2 style     {"Pushing something with something": "6", ...}
    templates/{train,validation}.json   [{"id": "17", "label": ..., "template": "Pushing [something] ...", ...}, ...]
    ava/action_list.pbtxt               AVA v2.2 action list with label_type
    ava/{train,val}.csv                 AVA rows: video_id,second,x1,y1,x2,y2,action_id,person_id
    ava/val_boxes.csv                   stand-in for a person detector: video_id,second,x1,y1,x2,y2,,score
    */videos/*.mp4                      one-second clips; a video of `ava` is a "movie" of four one-second scenes

The clock of `ava` is AVA's: annotations count from the start of the movie, files begin 901.5 s later, so that second
902 is 0.5 s into the file (OFFSET_SEC). A scene ends where the next begins: clips longer than one second mix scenes.
Everything is a function of (seed, data set, split, index): the number of processes and their order change nothing.
Copy this file alone: it needs numpy and av.
"""
import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import av
import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# The world: sizes, knobs, vocabulary
# ---------------------------------------------------------------------------------------------------------------------
SIZE, FPS, FRAMES = 64, 16, 16               # px, frames per second, frames per clip or scene
SCENES = 4                                   # scenes (keyframes) per video of `ava`
FIRST_SEC, OFFSET_SEC = 902, 901.5           # AVA's first annotated second; annotation time minus file time
VERSION = 1                                  # raise it when the pixels or labels of a given World change


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes (clips; keyframes for `scenes`) and difficulty. The defaults are the demo; the knobs are for experiments."""
    seed: int = 0
    actions_train: int = 960
    actions_val: int = 240
    templates_train: int = 640
    templates_val: int = 160
    scenes_train: int = 320
    scenes_val: int = 240
    zipf: float = 1.2                # exponent of the downstream class frequencies in training (validation is uniform)
    min_positives: int = 8           # fewest downstream training boxes dealt to a motion or interaction
    clutter: float = 0.0             # 0..1: nuisance shared by all data sets (blended rectangles, camera pan, contrast)
    distractors: int = 0             # most unlabelled small moving sprites in a clip, in all data sets
    polarity: float = 0.0            # probability that a whole clip is inverted, in all data sets


POSES = ["tall", "flat", "round"]
MOTIONS = ["left", "right", "up", "down", "spin", "grow", "shrink", "blink", "shake", "hop", "orbit", "recolour"]
INTERACTIONS = ["give", "take", "hit"]
LABELS = POSES + MOTIONS + INTERACTIONS      # downstream; the label id is the position + 1
ACTIONS = ["still"] + MOTIONS[:-1]           # upstream: no poses and no recolour, these exist downstream only
TEMPLATES = {                                # name -> Something-Something template
    "approach": "Moving [something] closer to [something]",
    "leave": "Moving [something] away from [something]",
    "meet": "Moving [something] and [something] closer to each other",
    "part": "Moving [something] and [something] away from each other",
    "throw": "Throwing a ball from [something] to [something]",
    "hit": "Hitting [something] with [something]",
    "push": "Pushing [something] with [something]",
    "show": "Showing [something] next to [something]",
}
GROUPS = [MOTIONS[:4] + ["shake", "hop", "orbit"], ["spin"], ["grow", "shrink"], ["blink", "recolour"]]   # composable

# A shape is f(u, v) < 1 in units of the radius, v down; a texture is 0..1 between two colours.
SHAPES = {
    "tall": lambda u, v: np.hypot(u / 0.55, v / 1.15),
    "flat": lambda u, v: np.hypot(u / 1.15, v / 0.55),
    "round": lambda u, v: np.hypot(u, v) / 0.9,
    "cross": lambda u, v: np.minimum(np.maximum(abs(u) * 2.6, abs(v)), np.maximum(abs(u), abs(v) * 2.6)),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) * 1.2,
    "diamond": lambda u, v: abs(u) + abs(v),
    "hexagon": lambda u, v: np.maximum(abs(u) * 0.866 + abs(v) * 0.5, abs(v)),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.68) / 0.32,
    "star": lambda u, v: np.hypot(u, v) * (1.25 + 0.35 * np.cos(5 * np.arctan2(v, u))),
}
EXTENT = {"tall": (0.6, 1.15), "flat": (1.15, 0.6)}             # half width and half height of a box, in radii
UPSTREAM_SHAPES = ["square", "diamond", "hexagon", "ring", "star", "round"]
TEXTURES = {
    "split": lambda u, v: np.clip(4 * u + 0.5, 0, 1),
    "striped": lambda u, v: np.clip(2 * np.sin(6 * u) + 0.5, 0, 1),
    "quartered": lambda u, v: np.clip(8 * u * v + 0.5, 0, 1),
    "dotted": lambda u, v: np.clip(6 * (np.hypot(u - 0.35, v) - 0.3), 0, 1),
}
TIME = np.arange(FRAMES, dtype=np.float32) - FRAMES // 2       # frames before (-) and after the keyframe


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Sprite:
    """An actor over the FRAMES of a clip: the tracks (FRAMES,) are written around its place at the keyframe."""
    shape: str
    texture: str
    colours: np.ndarray              # (3, 3): two colours of the texture and the one a recolouring turns to
    radius: float                    # px
    x: np.ndarray
    y: np.ndarray
    grow: np.ndarray                 # natural logarithm of the scale
    angle: np.ndarray                # radians
    alpha: np.ndarray
    mix: np.ndarray                  # share of the third colour


def make_sprite(rng: np.random.Generator, shape: str, radius: float, x: float, y: float) -> Sprite:
    bright = rng.uniform(0.55, 1.0, 3)
    bright[rng.integers(3)] *= rng.uniform(0.3, 1.0)
    dark = bright * rng.uniform(0.4, 0.7) * rng.uniform(0.8, 1.2, 3)
    other = np.roll(bright, rng.integers(1, 3)) * rng.uniform(0.3, 0.5)
    colours = np.stack([bright, dark, other]).astype(np.float32)
    zero = np.zeros(FRAMES, np.float32)
    return Sprite(shape, str(rng.choice(list(TEXTURES))), colours, radius, x + zero, y + zero, zero.copy(),
                  zero + rng.uniform(-0.15, 0.15), zero + 1, zero.copy())


def move(sprite: Sprite, motion: str, rng: np.random.Generator) -> None:
    """Add one of MOTIONS (or "still") to the tracks of a sprite."""
    phase = rng.uniform(0, 2 * math.pi)
    if motion in ("left", "right"):
        sprite.x += TIME * rng.uniform(0.75, 1.15) * (1 if motion == "right" else -1)
    elif motion in ("up", "down"):
        sprite.y += TIME * rng.uniform(0.75, 1.15) * (1 if motion == "down" else -1)
    elif motion == "spin":
        sprite.angle += phase + TIME * rng.uniform(0.2, 0.35) * rng.choice([-1, 1])
        sprite.texture = "split"
        sprite.colours[1] *= 0.4                                   # a turning disc shows by its texture only
    elif motion in ("grow", "shrink"):
        sprite.grow += TIME * rng.uniform(0.05, 0.075) * (1 if motion == "grow" else -1)
    elif motion == "blink":
        sprite.alpha *= np.sin(phase + rng.uniform(0.9, 1.3) * TIME) > -0.1
    elif motion == "recolour":
        sprite.mix += 1 / (1 + np.exp(-(TIME - rng.uniform(-3, 2)) * 1.5))
    elif motion == "shake":
        sprite.x += rng.uniform(3.5, 5) * np.sin(rng.uniform(0.8, 1.1) * TIME)
    elif motion == "hop":
        sprite.y -= rng.uniform(6, 8) * abs(np.sin(rng.uniform(0.4, 0.55) * TIME))
    elif motion == "orbit":
        turn, radius = rng.uniform(0.4, 0.55) * TIME * rng.choice([-1, 1]), rng.uniform(4.5, 6)
        sprite.x += radius * (np.cos(phase + turn) - math.cos(phase))
        sprite.y += radius * (np.sin(phase + turn) - math.sin(phase))


def interact(subject: Sprite, partner: Sprite, kind: str, rng: np.random.Generator) -> list[Sprite]:
    """Add a relation of TEMPLATES to two sprites, already placed on an axis. Returns the ball, where there is one."""
    dx, dy = partner.x[0] - subject.x[0], partner.y[0] - subject.y[0]
    gap = math.hypot(dx, dy)
    dx, dy = dx / gap, dy / gap
    speed = rng.uniform(0.75, 1.0)
    toward, back = np.zeros(FRAMES), np.zeros(FRAMES)              # px along the axis, of subject and partner
    if kind in ("approach", "leave"):
        toward = TIME * speed * (1 if kind == "approach" else -1)
    elif kind in ("meet", "part"):
        toward = TIME * speed * (0.8 if kind == "meet" else -0.8)
        back = -toward
    elif kind == "push":                                           # contact shortly before the keyframe
        toward = (TIME + 3) * speed * 1.3 + gap - subject.radius - partner.radius + 2
        back = np.maximum(TIME + 3, 0) * speed * 1.3
    elif kind == "hit":                                            # lunges; the partner flashes when it is reached
        lunge = np.maximum(np.sin(rng.uniform(0.6, 0.75) * TIME), 0) ** 2
        toward = lunge * (gap - subject.radius)
        partner.colours[2] = 1.0
        partner.mix = np.maximum(partner.mix, lunge).astype(np.float32)
    for sprite, shift in ((subject, toward), (partner, back)):
        sprite.x += (dx * shift).astype(np.float32)
        sprite.y += (dy * shift).astype(np.float32)
    if kind != "throw":
        return []
    share = (TIME / rng.uniform(9, 11) + rng.uniform(0.4, 0.6)) % 1.0       # thrown again when it has arrived
    ball = make_sprite(rng, "round", 3.5, 0, 0)
    ball.colours[:] = 1.0
    ball.x = (subject.x + dx * gap * share).astype(np.float32)
    ball.y = (subject.y + dy * gap * share).astype(np.float32)
    return [ball]


def draw(video: np.ndarray, sprite: Sprite) -> None:
    """Blend a sprite into video, float32 (FRAMES, SIZE, SIZE, 3); only the window around it is computed."""
    radius = sprite.radius * np.exp(sprite.grow)[:, None, None]
    half = math.ceil(1.2 * float(radius.max())) + 1
    left, top = np.floor(sprite.x).astype(int) - half, np.floor(sprite.y).astype(int) - half
    offset = np.arange(2 * half + 2, dtype=np.float32)
    du = (left - sprite.x)[:, None, None] + offset                                   # (T, 1, w)
    dv = (top - sprite.y)[:, None, None] + offset[:, None]                           # (T, w, 1)
    cos, sin = np.cos(sprite.angle)[:, None, None], np.sin(sprite.angle)[:, None, None]
    u, v = ((cos * du + sin * dv) / radius).astype(np.float32), ((cos * dv - sin * du) / radius).astype(np.float32)
    cover = np.clip((1 - SHAPES[sprite.shape](u, v)) * radius * 0.7 + 0.5, 0, 1) * sprite.alpha[:, None, None]
    ink = TEXTURES[sprite.texture](u, v)[..., None]                                  # (T, w, w, 1)
    first, second, third = sprite.colours
    colour = first + (second - first) * ink
    colour += (third - colour) * sprite.mix[:, None, None, None]
    for t in range(FRAMES):
        y0, y1 = max(top[t], 0), min(top[t] + len(offset), SIZE)
        x0, x1 = max(left[t], 0), min(left[t] + len(offset), SIZE)
        if y0 < y1 and x0 < x1:
            window = np.s_[y0 - top[t]:y1 - top[t], x0 - left[t]:x1 - left[t]]
            video[t, y0:y1, x0:x1] += (colour[t][window] - video[t, y0:y1, x0:x1]) * cover[t][window][..., None]


def background(rng: np.random.Generator, dataset: str, world: World) -> np.ndarray:
    """A textured plane under a slowly panning camera: float32 (FRAMES, SIZE, SIZE, 3)."""
    pan = rng.uniform(-1, 1, 2) * (0.35 + 0.35 * world.clutter)
    margin = math.ceil(abs(pan).max() * FRAMES / 2) + 1
    side = SIZE + 2 * margin + 1
    canvas = np.broadcast_to(rng.uniform(0.08, 0.38, 3), (side, side, 3)).astype(np.float32)
    rows, columns = np.mgrid[:side, :side].astype(np.float32) / side
    gratings, patches = (0, int(rng.integers(6, 14))) if dataset == "ava" else (3, 0)
    for _ in range(gratings + round(2 * world.clutter)):
        a, b, phase = rng.uniform(-25, 25), rng.uniform(-25, 25), rng.uniform(0, 6.28)
        canvas += np.sin(a * rows + b * columns + phase)[..., None] * rng.uniform(-0.05, 0.05, 3).astype(np.float32)
    if gratings:
        canvas += (rows[..., None] - 0.5) * rng.uniform(-0.2, 0.2, 3).astype(np.float32)
    for _ in range(patches + round(world.clutter * rng.integers(8, 18))):
        y, x = rng.integers(0, side, 2)
        h, w = rng.integers(6, 28, 2)
        patch = canvas[y:y + h, x:x + w]
        patch += (rng.uniform(0.05, 0.55, 3).astype(np.float32) - patch) * 0.4
    video = np.empty((FRAMES, SIZE, SIZE, 3), np.float32)
    for t in range(FRAMES):
        y, x = margin + pan * TIME[t]
        i, j = int(y), int(x)
        rows2 = canvas[i:i + SIZE + 1, j:j + SIZE + 1]
        rows2 = rows2[:-1] + (rows2[1:] - rows2[:-1]) * np.float32(y - i)
        video[t] = rows2[:, :-1] + (rows2[:, 1:] - rows2[:, :-1]) * np.float32(x - j)
    return video


def finish(video: np.ndarray, sprites: list[Sprite], rng: np.random.Generator, world: World) -> np.ndarray:
    """Draw distractors and sprites, apply the clip's nuisances: uint8 (FRAMES, SIZE, SIZE, 3)."""
    extra = []
    for _ in range(rng.integers(0, world.distractors + 1)):
        extra.append(make_sprite(rng, str(rng.choice(list(SHAPES))), rng.uniform(3, 4.5), *rng.uniform(4, SIZE - 4, 2)))
        move(extra[-1], str(rng.choice(ACTIONS)), rng)
    for sprite in extra + sprites:
        draw(video, sprite)
    if world.clutter:
        video = 0.5 + (video - 0.5) * rng.uniform(1 - 0.4 * world.clutter, 1 + 0.1 * world.clutter)
    if rng.random() < world.polarity:
        video = 1 - video
    return (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Clips of the three data sets
# ---------------------------------------------------------------------------------------------------------------------
def cast_action(world: World, split: int, index: int, label: str) -> tuple:
    """The generator of a clip, its sprites in drawing order, and (here nothing) what its annotation needs."""
    rng = np.random.default_rng([world.seed, 1, split, index])
    actor = make_sprite(rng, str(rng.choice(UPSTREAM_SHAPES)), rng.uniform(8, 12), *rng.uniform(22, 42, 2))
    move(actor, label, rng)
    if rng.random() < 0.75:
        return rng, [actor], None
    corner = rng.choice([10, SIZE - 10], 2)                        # a still bystander
    return rng, [make_sprite(rng, str(rng.choice(UPSTREAM_SHAPES)), rng.uniform(5, 7), *corner), actor], None


def cast_template(world: World, split: int, index: int, label: str) -> tuple:
    """As cast_action; the annotation needs what fills the two [something]."""
    rng = np.random.default_rng([world.seed, 2, split, index])
    axis, gap = rng.uniform(0, 2 * math.pi), rng.uniform(19, 23)
    dx, dy = math.cos(axis) * gap / 2, math.sin(axis) * gap / 2
    x, y = rng.uniform(28, 36, 2)
    pair = [make_sprite(rng, str(rng.choice(UPSTREAM_SHAPES)), rng.uniform(7, 9), x - side * dx, y - side * dy)
            for side in (1, -1)]
    ball = interact(*pair, label, rng)
    names = [f"{sprite.texture} {sprite.shape}" for sprite in pair]
    return rng, (pair if rng.random() < 0.5 else pair[::-1]) + ball, names


@dataclasses.dataclass
class Scene:
    """What happens in a scene of `ava`: label names per actor; an interaction goes from actor 0 to actor 1."""
    labels: list[list[str]]
    interaction: str = ""


def deal(rng: np.random.Generator, names: list[str], total: int, zipf: float, minimum: int) -> list[str]:
    """`total` names in random order with exact counts: Zipf over a random ranking of the names, `minimum` of each."""
    share = 1 / np.arange(1, len(names) + 1) ** zipf
    minimum = min(minimum, total // len(names))
    counts = minimum + np.floor(share / share.sum() * (total - minimum * len(names))).astype(int)
    counts[0] += total - counts.sum()
    return list(rng.permutation(np.repeat(rng.permutation(names), counts)))


def plan_scenes(world: World, split: int) -> list[Scene]:
    """Deal the labels of all scenes of a split: class counts are exact, so that head, middle and tail are too."""
    rng = np.random.default_rng([world.seed, 3, split])
    total, zipf = (world.scenes_train, world.zipf) if split == 0 else (world.scenes_val, 0.0)
    scenes = [Scene([[] for _ in range(n)]) for n in rng.choice([1, 2, 3], total, p=[0.15, 0.55, 0.3])]
    actors = [labels for scene in scenes for labels in scene.labels]
    pairs = [scene for scene in scenes if len(scene.labels) > 1 and rng.random() < 0.35]
    for scene, kind in zip(pairs, deal(rng, ["throw", "hit"], len(pairs), zipf, world.min_positives)):
        scene.interaction = kind
        for labels, name in zip(scene.labels, ["give", "take"] if kind == "throw" else ["hit"]):
            labels.append(name)
    # actors of an interaction keep to motions that leave them in place; the rest of the deal goes to the others
    busy = {id(labels) for scene in pairs for labels in scene.labels[:2]}
    free = [labels for labels in actors if id(labels) not in busy and rng.random() < 0.9]
    for labels, motion in zip(free, deal(rng, MOTIONS, len(free), zipf, world.min_positives)):
        labels.append(str(motion))
        if rng.random() < 0.2:
            own = next(group for group in GROUPS if motion in group)
            labels.append(str(rng.choice([name for group in GROUPS if group is not own for name in group])))
    for labels, pose in zip(actors, deal(rng, POSES, len(actors), min(zipf, 1.0), world.min_positives)):
        if "spin" in labels and pose in ("tall", "flat"):          # a turning tall actor would be flat half the time
            pose = "round"
        labels.insert(0, str(pose))
    return scenes


def cast_scene(world: World, split: int, index: int, scene: Scene) -> tuple:
    """As cast_action; the annotation needs the keyframe boxes (n, 4), normalised x1, y1, x2, y2."""
    rng = np.random.default_rng([world.seed, 4, split, index])
    n = len(scene.labels)
    while True:                                                    # rejection: a few tries
        centres = rng.uniform(14, SIZE - 14, (n, 2))
        if scene.interaction:
            axis = rng.uniform(0, 2 * math.pi)
            centres[1] = centres[0] + rng.uniform(18, 21) * np.array([math.cos(axis), math.sin(axis)])
        apart = [np.hypot(*(centres[i] - centres[j])) for i in range(n) for j in range(i)]
        if min(apart, default=99) >= 17 and centres.min() >= 12 and centres.max() <= SIZE - 12:
            break
    sprites = []
    for (x, y), (pose, *rest) in zip(centres, scene.labels):
        sprites.append(make_sprite(rng, pose, rng.uniform(7, 9.5), x, y))
        for name in set(rest) & set(MOTIONS):
            move(sprites[-1], name, rng)
    ball = interact(sprites[0], sprites[1], scene.interaction, rng) if scene.interaction else []
    key = FRAMES // 2
    halves = [sprite.radius * math.exp(sprite.grow[key]) * np.array(EXTENT.get(sprite.shape, (1, 1)))
              for sprite in sprites]
    centres = [np.array([sprite.x[key], sprite.y[key]]) for sprite in sprites]
    boxes = np.stack([np.concatenate([centre - half, centre + half]) for centre, half in zip(centres, halves)])
    return rng, sprites + ball, np.clip(boxes / SIZE, 0, 1)


CASTS = {"actions": cast_action, "templates": cast_template, "ava": cast_scene}


def render(job: tuple[World, Path, str, int, list[tuple]]) -> None:
    """Write one video: the scenes (index, label) of a data set one after the other. Runs in a worker."""
    world, path, dataset, split, scenes = job
    video = []
    for index, label in scenes:
        rng, sprites, _ = CASTS[dataset](world, split, index, label)
        video.append(finish(background(rng, dataset, world), sprites, rng, world))
    write_clip(path, np.concatenate(video))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def write_clip(path: Path, video: np.ndarray) -> None:
    """Encode uint8 (T, H, W, 3) as H.264 and rename it into place: a file that exists is whole."""
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = FRAMES                     # every scene of a movie begins with a key frame
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def annotate_clips(folder: Path, world: World) -> list[tuple]:
    """Write the annotations of `actions` and `templates`; return the jobs of their videos."""
    jobs, names = [], list(TEMPLATES)
    write_text(folder / "actions" / "classes.txt", "".join(f"{name}\n" for name in ACTIONS))
    plain = [text.replace("[", "").replace("]", "") for text in TEMPLATES.values()]
    write_text(folder / "templates" / "labels.json", json.dumps({t: str(i) for i, t in enumerate(plain)}, indent=1))
    first = 0                                                      # Something-Something numbers its videos through
    for split, (name, clips, pairs) in enumerate([("train", world.actions_train, world.templates_train),
                                                  ("validation", world.actions_val, world.templates_val)]):
        rows, entries = [], []
        for i in range(clips):
            video = f"videos/{name}_{i:05d}.mp4"
            rows.append(f"{video} {i % len(ACTIONS)}\n")
            jobs.append((world, folder / "actions" / video, "actions", split, [(i, ACTIONS[i % len(ACTIONS)])]))
        for i in range(pairs):
            label = names[i % len(names)]
            text, things = TEMPLATES[label], cast_template(world, split, i, label)[2]
            entries.append({"id": str(first + i), "label": text.replace("[something]", "{}").format(*things),
                            "template": text, "placeholders": things})
            video = folder / "templates" / "videos" / f"{first + i}.mp4"
            jobs.append((world, video, "templates", split, [(i, label)]))
        first += pairs
        write_text(folder / "actions" / ("train.txt" if split == 0 else "val.txt"), "".join(rows))
        write_text(folder / "templates" / f"{name}.json", json.dumps(entries, indent=0))
    return jobs


def annotate_scenes(folder: Path, world: World) -> list[tuple]:
    """Write the annotations of `ava`; return the jobs of its videos."""
    kinds = ["PERSON_MOVEMENT"] * len(POSES + MOTIONS) + ["PERSON_INTERACTION"] * len(INTERACTIONS)
    write_text(folder / "ava" / "action_list.pbtxt", "".join(
        f'label {{\n  name: "{name}"\n  label_id: {i}\n  label_type: {kind}\n}}\n'
        for i, (name, kind) in enumerate(zip(LABELS, kinds), 1)))
    jobs = []
    for split, name in enumerate(["train", "val"]):
        scenes, rows, detections = plan_scenes(world, split), [], []
        rng = np.random.default_rng([world.seed, 5, split])
        for first in range(0, len(scenes), SCENES):
            movie = f"{name}_{first // SCENES:05d}"
            part = list(enumerate(scenes[first:first + SCENES], first))
            jobs.append((world, folder / "ava" / "videos" / f"{movie}.mp4", "ava", split, part))
            for index, scene in part:
                key = f"{movie},{FIRST_SEC + index - first:04d}"
                boxes = cast_scene(world, split, index, scene)[2]
                for person, (box, labels) in enumerate(zip(boxes, scene.labels)):
                    text = ",".join(f"{value:.3f}" for value in box)
                    rows += [f"{key},{text},{LABELS.index(label) + 1},{person}\n" for label in labels]
                detections += [f"{key},{','.join(f'{value:.3f}' for value in box)},,{score:.6f}\n"
                               for box, score in detect(boxes, rng)]
        write_text(folder / "ava" / f"{name}.csv", "".join(rows))
        if split == 1:
            write_text(folder / "ava" / "val_boxes.csv", "".join(detections))
    return jobs


def detect(boxes: np.ndarray, rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """A stand-in for a person detector: boxes moved by 6 % of their side, 4 % missed, 0.15 false ones per keyframe."""
    found = []
    for box in boxes:
        if rng.random() < 0.96:
            side = np.tile(box[2:] - box[:2], 2)
            found.append((np.clip(box + side * rng.normal(0, 0.06, 4), 0, 1), rng.uniform(0.85, 0.999)))
    if rng.random() < 0.15:
        corner, side = rng.uniform(0.05, 0.7, 2), rng.uniform(0.18, 0.3, 2)
        found.append((np.concatenate([corner, np.minimum(corner + side, 1)]), rng.uniform(0.5, 0.95)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
def make_world(folder: str | Path, seed: int = 0, workers: int = 2, **sizes) -> None:
    """Write the world of World(seed, **sizes) into `folder`, or complete one that was interrupted.

    Raises ValueError when the folder holds a world of other parameters, or something else: nothing is ever deleted.
    """
    folder, world, began = Path(folder), World(seed, **sizes), time.monotonic()
    parameters = {"version": VERSION, **dataclasses.asdict(world)}
    manifest = folder / "world.json"
    if manifest.exists():
        found = json.loads(manifest.read_text())
        other = [f"{key}={found.get(key)} (wanted {value})" for key, value in parameters.items()
                 if found.get(key) != value]
        if other:
            raise ValueError(f"{manifest}: this world has {', '.join(other)}; remove it or name another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty and without world.json; expected a new folder or a demo world")
    for dataset in CASTS:
        (folder / dataset / "videos").mkdir(parents=True, exist_ok=True)
    write_text(manifest, json.dumps(parameters, indent=1))
    jobs = annotate_clips(folder, world) + annotate_scenes(folder, world)
    missing = [job for job in jobs if not job[1].exists()]
    if not missing:
        print(f"world: {folder}, {len(jobs)} videos, reused")
        return
    if workers > 1 and len(missing) > 50:                          # spawn: no fork of a process that runs torch
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            report(pool.imap_unordered(render, missing, chunksize=10), len(missing), began)
    else:
        report(map(render, missing), len(missing), began)
    print(f"world: {folder}, {len(missing)} of {len(jobs)} videos made in {time.monotonic() - began:.1f} s")


def report(results, total: int, began: float) -> None:
    """Draw the results out of an iterator, with a progress line where somebody watches."""
    for done, _ in enumerate(results, 1):
        if sys.stderr.isatty() and (done % 20 == 0 or done == total):
            left = (time.monotonic() - began) / done * (total - done)
            print(f"\rworld: {done}/{total} videos, {left:.0f} s left ", end="\n" if done == total else "",
                  file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    for field in dataclasses.fields(World):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    arguments = vars(parser.parse_args())
    try:
        make_world(arguments.pop("folder"), **arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
