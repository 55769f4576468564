"""A generated video world in the formats of the real datasets: the demo's data, made in seconds.

64x64, 16 fps H.264 clips of moving sprites. Upstream: `actions` (one actor, 10 motions),
`templates` (two actors, 8 relations) and, if asked for, `looks` (one actor, 4 ways to change in
place). Downstream: `ava`, 1-3 actors with several labels each. Its 18 classes are of four kinds:
motions, relations and looks, each of which one upstream set teaches, and poses, which none does.
In training a third of each kind is frequent, a third in between, a third rare. Which are frequent
is dealt anew: over three seeds in a row every class is each once.
`make_world(folder)` or `python cofinetune.py world FOLDER` writes

    world.json                         the parameters
    {actions,looks}/{train,val}.txt    Kinetics-style list      videos/train_00017.mp4 5
    {actions,looks}/classes.txt        one name a line; the class is the line, from 0
    templates/{train,validation}.json  Something-Something v2   [{"id": "17", "template": "Push...
    templates/labels.json                                       {"Pushing something with s...": "6"
    ava/{train,val}.csv                AVA                      train_00000,0902,0.14,...,3,0
    ava/val_boxes.csv                  detected persons         val_00000,0902,0.60,...,,0.871867
    ava/action_list.pbtxt              AVA v2.2, with label_type
    */videos/*.mp4                     clips of a second; in `ava` movies of four such scenes

`ava` counts time as AVA does: a file begins 901.5 s into its "movie", second 902 is 0.5 s into the
file. All is a function of (seed, dataset, split, index), whatever the number of processes.
Copy me alone: I need numpy and av, and to use several processes extras/workers.py.
"""

import argparse
import dataclasses
import json
import math
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

VERSION = 2  # to be raised when a World gets other pixels or labels
SIZE, FPS, FRAMES = 64, 16, 16  # px, frames per second, frames per clip or scene
SCENES, FIRST_SEC = 4, 902  # scenes (keyframes) per video of `ava`, time of the first
KEYFRAME = FRAMES // 2
TIME = np.arange(FRAMES) - KEYFRAME  # frames from the keyframe
TRAIN, VAL = 0, 1  # splits
# First in every seed of a generator: no other stream of random numbers of a run begins so.
ACTIONS_TAG, TEMPLATES_TAG, LOOKS_TAG, SCENES_TAG, PLAN_TAG, DETECTOR_TAG, RANKS_TAG = range(
    0x776F726C64, 0x776F726C64 + 7
)  # "world"


@dataclasses.dataclass(frozen=True)
class World:
    """Numbers of clips (`scenes`: keyframes), and what makes the world harder."""

    seed: int = 0
    actions_train: int = 960
    actions_val: int = 240
    templates_train: int = 640
    templates_val: int = 160
    looks_train: int = 0
    looks_val: int = 0
    scenes_train: int = 320
    scenes_val: int = 240
    imbalance: float = 2.2  # boxes of a frequent class over those of one in between, and of that
    # over those of a rare one, in training; validation has equally many
    nuisance: float = 0.0  # 0..1: clutter, pan, contrast, unlabelled small sprites; everywhere


POSES = ["tall", "flat", "round"]
MOTIONS = ["left", "right", "up", "down", "grow", "shrink", "shake", "hop", "orbit"]
LOOKS = ["blink", "pulse", "recolour"]
RELATIONS = ["give", "hit", "push"]
KINDS = {"poses": POSES, "motions": MOTIONS, "looks": LOOKS, "relations": RELATIONS}
LABELS = POSES + MOTIONS + LOOKS + RELATIONS  # of `ava`; the label id is the position + 1
UPSTREAM = {"actions": ["still", *MOTIONS], "looks": ["still", *LOOKS]}
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
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y is down
DRIFTS = {"approach": (1, 0), "leave": (-1, 0), "meet": (0.8, -0.8), "part": (-0.8, 0.8)}
# Two labels of an actor are of different groups. Others are 0: they displace.
GROUPS = {"grow": 1, "shrink": 1, "pulse": 1, "blink": 2, "recolour": 2}

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
HALF_SIDES = {"tall": (0.6, 1.15), "flat": (1.15, 0.6)}  # of the box, in radii; others (1, 1)
UPSTREAM_SHAPES = list(SHAPES)[2:]
TEXTURES = {
    "split": lambda u, v: np.clip(4 * u + 0.5, 0, 1),
    "striped": lambda u, v: np.clip(2 * np.sin(6 * u) + 0.5, 0, 1),
    "quartered": lambda u, v: np.clip(8 * u * v + 0.5, 0, 1),
    "dotted": lambda u, v: np.clip(6 * (np.hypot(u - 0.35, v) - 0.3), 0, 1),
}


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
        self.shape = str(rng.choice(shapes))
        self.texture = str(rng.choice(list(TEXTURES)))
        self.radius = radius  # px
        self.x = np.full(FRAMES, x)  # px
        self.y = np.full(FRAMES, y)
        self.angle = np.full(FRAMES, rng.uniform(-0.15, 0.15))  # radians
        self.growth = np.zeros(FRAMES)  # logarithm of the scale
        self.alpha = np.ones(FRAMES)
        self.turned = np.zeros(FRAMES)  # share of the third colour

    def move(self, motion: str, rng: np.random.Generator) -> None:
        """Add one of MOTIONS or LOOKS, or "still", to the tracks."""
        phase = rng.uniform(0, 2 * math.pi)
        speed = rng.uniform(0.75, 1.15)
        sign = rng.choice([-1, 1])
        slow = rng.uniform(0.4, 0.55) * TIME
        if motion in HEADINGS:
            dx, dy = HEADINGS[motion]
            self.x += TIME * speed * dx
            self.y += TIME * speed * dy
        elif motion == "pulse":
            self.growth += 0.3 * speed * np.sin(phase + 2 * slow)
        elif motion == "grow":
            self.growth += TIME * speed / 15
        elif motion == "shrink":
            self.growth += TIME * speed / -15
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
        half = np.array(HALF_SIDES.get(self.shape, (1.0, 1.0)))
        half = half * self.radius * math.exp(self.growth[KEYFRAME])
        centre = np.array([self.x[KEYFRAME], self.y[KEYFRAME]])
        return np.clip(np.concatenate([centre - half, centre + half]) / SIZE, 0, 1)

    def draw(self, video: np.ndarray) -> None:
        """Blend into float32 (FRAMES, SIZE, SIZE, 3), computing a window around the sprite."""
        radius = (self.radius * np.exp(self.growth)[:, None, None]).astype(np.float32)
        half = math.ceil(1.2 * radius.max()) + 1
        left = np.floor(self.x).astype(int) - half
        top = np.floor(self.y).astype(int) - half
        side = 2 * half + 2
        window = np.arange(side)
        dx = (left - self.x)[:, None, None] + window  # (T, 1, w)
        dy = (top - self.y)[:, None, None] + window[:, None]  # (T, w, 1)
        cos = np.cos(self.angle)[:, None, None]
        sin = np.sin(self.angle)[:, None, None]
        u = ((cos * dx + sin * dy) / radius).astype(np.float32)  # (T, w, w)
        v = ((cos * dy - sin * dx) / radius).astype(np.float32)
        cover = np.clip((1 - SHAPES[self.shape](u, v)) * radius * 0.7 + 0.5, 0, 1)
        cover = (cover * self.alpha[:, None, None])[..., None].astype(np.float32)
        first, second, third = self.colours.astype(np.float32)
        colour = first + (second - first) * TEXTURES[self.texture](u, v)[..., None]  # (T, w, w, 3)
        colour += (third - colour) * self.turned[:, None, None, None].astype(np.float32)
        for t in range(FRAMES):
            x1, x2 = np.clip([left[t], left[t] + side], 0, SIZE)
            y1, y2 = np.clip([top[t], top[t] + side], 0, SIZE)
            inside = np.s_[t, y1 - top[t] : y2 - top[t], x1 - left[t] : x2 - left[t]]
            place = video[t, y1:y2, x1:x2]
            place += (colour[inside] - place) * cover[inside]


def relate(first: Sprite, second: Sprite, relation: str, rng: np.random.Generator) -> list[Sprite]:
    """Add one of TEMPLATES to the tracks of two sprites; returns what flies between them."""
    axis = np.array([second.x[0] - first.x[0], second.y[0] - first.y[0]])
    gap = np.hypot(*axis)
    speed = TIME * rng.uniform(0.75, 1.0)
    drift = DRIFTS.get(relation, (0, 0))
    near, far = drift[0] * speed, drift[1] * speed  # px along the axis, of first and second
    if relation == "push":  # contact 3 frames before the keyframe
        pushed = 1.3 * (speed - speed[5])
        near = pushed + gap - first.radius - second.radius + 2
        far = np.maximum(pushed, 0)
    elif relation == "hit":  # lunges; the other flashes white
        lunge = np.maximum(np.sin(rng.uniform(0.6, 0.75) * TIME), 0) ** 2
        near = lunge * (gap - first.radius)
        second.colours[2] = 1.0
        second.turned = np.maximum(second.turned, lunge)
    for sprite, shift in ((first, near), (second, far)):
        sprite.x += axis[0] / gap * shift
        sprite.y += axis[1] / gap * shift
    if relation != "throw":
        return []
    ball = Sprite(rng, ["round"], 3.5, 0, 0)
    ball.colours[:] = 1.0
    share = (TIME / rng.uniform(9, 11) + rng.uniform(0.4, 0.6)) % 1.0  # thrown again and again
    ball.x = first.x + axis[0] * share
    ball.y = first.y + axis[1] * share
    return [ball]


# ------------------------------------------------------------------------------------------------
# Clips
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cast:
    """Who plays in a clip; the pixels go on drawing from `rng`."""

    rng: np.random.Generator
    sprites: list[Sprite]  # from back to front
    things: list[str] = dataclasses.field(default_factory=list)  # `templates`: the [something]s
    boxes: np.ndarray | None = None  # `ava`: (actors, 4)


def cast_action(world: World, split: int, index: int, motion: str) -> Cast:
    return cast_one(np.random.default_rng([ACTIONS_TAG, world.seed, split, index]), motion)


def cast_look(world: World, split: int, index: int, look: str) -> Cast:
    return cast_one(np.random.default_rng([LOOKS_TAG, world.seed, split, index]), look)


def cast_one(rng: np.random.Generator, motion: str) -> Cast:
    """One actor, in a quarter of the clips before somebody who stands still."""
    actor = Sprite(rng, UPSTREAM_SHAPES, rng.uniform(8, 12), *rng.uniform(22, 42, 2))
    actor.move(motion, rng)
    still = Sprite(rng, UPSTREAM_SHAPES, rng.uniform(5, 7), *rng.choice([10, SIZE - 10], 2))
    if rng.random() < 0.25:
        return Cast(rng, [still, actor])
    return Cast(rng, [actor])


def cast_template(world: World, split: int, index: int, relation: str) -> Cast:
    rng = np.random.default_rng([TEMPLATES_TAG, world.seed, split, index])
    angle = rng.uniform(0, 2 * math.pi)
    x, y = rng.uniform(28, 36, 2)
    dx, dy = rng.uniform(9.5, 11.5) * np.array([math.cos(angle), math.sin(angle)])
    first = Sprite(rng, UPSTREAM_SHAPES, rng.uniform(7, 9), x - dx, y - dy)
    second = Sprite(rng, UPSTREAM_SHAPES, rng.uniform(7, 9), x + dx, y + dy)
    ball = relate(first, second, relation, rng)
    pair = [first, second]
    if rng.choice([-1, 1]) < 0:
        pair.reverse()  # who is in front
    return Cast(rng, pair + ball, [f"{s.texture} {s.shape}" for s in (first, second)])


def cast_scene(world: World, split: int, index: int, labels: list[list[str]]) -> Cast:
    """labels: of each actor, the pose first, an interaction last (plan_scenes)."""
    rng = np.random.default_rng([SCENES_TAG, world.seed, split, index])
    relation = {"give": "throw", "hit": "hit", "push": "push"}.get(labels[0][-1])
    centres = place_actors(rng, len(labels), paired=relation is not None)
    actors = []
    for (pose, *_), centre in zip(labels, centres, strict=True):
        actors.append(Sprite(rng, [pose], rng.uniform(7, 9.5), *centre))
    for actor, (_, *motions) in zip(actors, labels, strict=True):
        for motion in motions:
            actor.move(motion, rng)
    ball = []
    if relation:
        ball = relate(actors[0], actors[1], relation, rng)
    return Cast(rng, actors + ball, boxes=np.stack([actor.box() for actor in actors]))


def place_actors(rng: np.random.Generator, count: int, paired: bool) -> np.ndarray:
    """Centres (count, 2) in px: apart from each other, not at the edge; of a pair near enough."""
    while True:  # a few tries
        centres = rng.uniform(14, SIZE - 14, (count, 2))
        if paired:
            angle = rng.uniform(0, 2 * math.pi)
            gap = rng.uniform(18, 21)
            centres[1] = centres[0] + gap * np.array([math.cos(angle), math.sin(angle)])
        apart = np.hypot(*(centres[:, None] - centres).T) + 99 * np.eye(count)
        from_middle = abs(centres - SIZE / 2)
        if apart.min() >= 17 and from_middle.max() <= SIZE / 2 - 12:
            return centres


def background(world: World, dataset: str, rng: np.random.Generator) -> np.ndarray:
    """A textured plane under a panning camera: float32 (FRAMES, SIZE, SIZE, 3)."""
    pan = rng.uniform(-0.35, 0.35, 2) * (1 + world.nuisance)  # px per frame
    margin = math.ceil(abs(pan).max() * FRAMES / 2) + 1
    canvas = paint_plane(world, dataset, SIZE + 2 * margin + 1, rng)
    video = np.empty((FRAMES, SIZE, SIZE, 3), np.float32)
    for t in range(FRAMES):  # bilinear at a fraction of a pixel
        fraction_y, y = math.modf(margin + pan[0] * TIME[t])
        fraction_x, x = math.modf(margin + pan[1] * TIME[t])
        part = canvas[int(y) : int(y) + SIZE + 1, int(x) : int(x) + SIZE + 1]
        part = part[:-1] + (part[1:] - part[:-1]) * np.float32(fraction_y)
        video[t] = part[:, :-1] + (part[:, 1:] - part[:, :-1]) * np.float32(fraction_x)
    return video


def paint_plane(world: World, dataset: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Upstream waves over a slope, downstream patches: float32 (side, side, 3)."""
    downstream = dataset == "ava"
    waves, patches = 3, 0
    if downstream:
        waves, patches = 0, rng.integers(6, 14)
    row = np.arange(side)[:, None, None] / side
    column = np.arange(side)[:, None] / side
    canvas = np.zeros((side, side, 3)) + rng.uniform(0.08, 0.38, 3)
    slope = rng.uniform(-0.2, 0.2, 3)
    if not downstream:
        canvas += (row - 0.5) * slope
    for _ in range(waves + round(2 * world.nuisance)):
        down, across, phase = rng.uniform(-25, 25, 3)
        canvas += np.sin(down * row + across * column + phase) * rng.uniform(-0.05, 0.05, 3)
    for _ in range(patches + round(world.nuisance * rng.integers(8, 18))):
        y, x = rng.integers(0, side, 2)
        height, width = rng.integers(6, 28, 2)
        patch = canvas[y : y + height, x : x + width]
        patch += (rng.uniform(0.05, 0.55, 3) - patch) * 0.4
    return canvas.astype(np.float32)


CASTS = {
    "actions": cast_action,
    "templates": cast_template,
    "looks": cast_look,
    "ava": cast_scene,
}


def render(world: World, dataset: str, split: int, index: int, label) -> np.ndarray:
    """One clip or scene: uint8 (FRAMES, SIZE, SIZE, 3)."""
    cast = CASTS[dataset](world, split, index, label)
    rng = cast.rng
    video = background(world, dataset, rng)
    for _ in range(round(rng.uniform(0, 3) * world.nuisance)):
        small = Sprite(rng, list(SHAPES), rng.uniform(3, 4.5), *rng.uniform(4, SIZE - 4, 2))
        small.move(str(rng.choice(["still", *MOTIONS, *LOOKS])), rng)
        small.draw(video)
    for sprite in cast.sprites:
        sprite.draw(video)
    contrast = rng.uniform(1 - 0.4 * world.nuisance, 1)
    video = 0.5 + (video - 0.5) * contrast
    return (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


# ------------------------------------------------------------------------------------------------
# Annotations: the text of every file, and the clips of every video
# ------------------------------------------------------------------------------------------------


def annotate(world: World) -> tuple[dict, dict]:
    texts, videos = {}, {}
    for more_texts, more_videos in (
        annotate_list("actions", world.actions_train, world.actions_val),
        annotate_templates(world),
        annotate_list("looks", world.looks_train, world.looks_val),
        annotate_ava(world),
    ):
        texts |= more_texts
        videos |= more_videos
    return texts, videos


def annotate_list(dataset: str, train: int, val: int) -> tuple[dict, dict]:
    if not train + val:
        return {}, {}
    names = UPSTREAM[dataset]
    texts = {f"{dataset}/classes.txt": "\n".join([*names, ""])}
    videos = {}
    for split, part, total in ((TRAIN, "train", train), (VAL, "val", val)):
        lines = []
        for i in range(total):
            path = f"videos/{part}_{i:05d}.mp4"
            label = i % len(names)
            lines.append(f"{path} {label}\n")
            videos[f"{dataset}/{path}"] = [(dataset, split, i, names[label])]
        texts[f"{dataset}/{part}.txt"] = "".join(lines)
    return texts, videos


def annotate_templates(world: World) -> tuple[dict, dict]:
    labels = {}
    for template in TEMPLATES.values():
        labels[template.replace("[", "").replace("]", "")] = str(len(labels))
    texts = {"templates/labels.json": json.dumps(labels, indent=1)}
    videos = {}
    relations = list(TEMPLATES)
    train, val = world.templates_train, world.templates_val
    for split, name, total in ((TRAIN, "train", train), (VAL, "validation", val)):
        entries = []
        for i in range(total):
            relation = relations[i % len(relations)]
            template = TEMPLATES[relation]
            things = cast_template(world, split, i, relation).things
            entry = {
                "id": str(len(videos)),
                "template": template,
                "placeholders": things,
                "label": template.replace("[something]", "{}").format(*things),
            }
            entries.append(entry)
            videos[f"templates/videos/{entry['id']}.mp4"] = [("templates", split, i, relation)]
        texts[f"templates/{name}.json"] = json.dumps(entries, indent=0)
    return texts, videos


def annotate_ava(world: World) -> tuple[dict, dict]:
    blocks = []
    for i, name in enumerate(LABELS, 1):
        kind = "INTERACTION" if name in RELATIONS else "MOVEMENT"
        blocks.append(
            f'label {{\n  name: "{name}"\n  label_id: {i}\n  label_type: PERSON_{kind}\n}}\n'
        )
    texts = {"ava/action_list.pbtxt": "".join(blocks)}
    videos = {}
    for split, name in ((TRAIN, "train"), (VAL, "val")):
        rng = np.random.default_rng([DETECTOR_TAG, world.seed, split])
        annotated, detected = [], []
        for i, scene in enumerate(plan_scenes(world, split)):
            movie, second = f"{name}_{i // SCENES:05d}", FIRST_SEC + i % SCENES
            videos.setdefault(f"ava/videos/{movie}.mp4", []).append(("ava", split, i, scene))
            boxes = cast_scene(world, split, i, scene).boxes
            for person, (box, labels) in enumerate(zip(boxes, scene, strict=True)):
                for label in labels:
                    annotated.append(row(movie, second, box, LABELS.index(label) + 1, person))
            for box, score in detect(rng, boxes):
                detected.append(row(movie, second, box, "", f"{score:.6f}"))
        texts[f"ava/{name}.csv"] = "".join(annotated)
        if split == VAL:
            texts["ava/val_boxes.csv"] = "".join(detected)
    return texts, videos


def row(movie: str, second: int, box: np.ndarray, action: int | str, last: int | str) -> str:
    corners = ",".join(f"{value:.3f}" for value in box.clip(0, 1))
    return f"{movie},{second:04d},{corners},{action},{last}\n"


def plan_scenes(world: World, split: int) -> list[list[list[str]]]:
    """The labels of every actor of every scene: the pose first, a relation last.

    Dealt, not drawn: every class has exactly the boxes that `count_boxes` says.
    """
    rng = np.random.default_rng([PLAN_TAG, world.seed, split])
    counts = count_boxes(world, split)
    scenes = []
    for actors in rng.permutation(scene_sizes(world, split)):
        scenes.append([[] for _ in range(actors)])
    # The two of a relation do nothing else: it stays visible.
    relations = shuffle(rng, RELATIONS, counts)
    several = [scene for scene in scenes if len(scene) > 1]
    chosen = rng.permutation(len(several))[: len(relations)]
    busy = set()
    for number, relation in zip(chosen, relations, strict=True):
        first, second, *_ = several[number]
        first.append(relation)
        busy |= {id(first), id(second)}
    actors = [actor for scene in scenes for actor in scene]
    free = [actor for actor in actors if id(actor) not in busy]
    deal_motions(rng, free, shuffle(rng, MOTIONS + LOOKS, counts))
    for actor, pose in zip(actors, shuffle(rng, POSES, counts), strict=True):
        actor.insert(0, pose)
    return scenes


def deal_motions(rng: np.random.Generator, actors: list[list[str]], motions: list[str]) -> None:
    """One to nine in ten of the actors, then a second one, of another group, to some of them."""
    actors = [actors[number] for number in rng.permutation(len(actors))]
    moving = actors[: round(0.9 * len(actors))]
    for actor, motion in zip(moving, motions, strict=False):
        actor.append(motion)
    for motion in motions[len(moving) :]:
        for actor in moving:
            if len(actor) == 1 and GROUPS.get(actor[0], 0) != GROUPS.get(motion, 0):
                actor.append(motion)
                break
        else:
            raise ValueError("a world of so few scenes has no actor left for a second motion")


def shuffle(rng: np.random.Generator, names: list[str], counts: dict[str, int]) -> list[str]:
    return rng.permutation(np.repeat(names, [counts[name] for name in names])).tolist()


def scene_sizes(world: World, split: int) -> list[int]:
    """Actors of each scene: 15 % one, 55 % two, 30 % three."""
    total = world.scenes_val if split == VAL else world.scenes_train
    if 0 < total < 8:
        raise ValueError(f"a world of {total} scenes; expected 8 or more")
    one, three = round(0.15 * total), round(0.3 * total)
    return [1] * one + [2] * (total - one - three) + [3] * three


def count_boxes(world: World, split: int) -> dict[str, int]:
    """Of every class of `ava`. The same numbers for every kind, but that every actor has a pose:
    the frequent one takes what is left."""
    sizes = scene_sizes(world, split)
    actors, others = sum(sizes), round(0.39 * len(sizes))
    if split == VAL:
        of_pose, of_other = group_counts(actors, 1.0), group_counts(others, 1.0)
    else:
        of_other = group_counts(others, world.imbalance)
        _, between, rare = of_other
        of_pose = actors - between - rare, between, rare
    counts = {}
    for name, rank in rank_classes(world.seed).items():
        counts[name] = of_pose[rank] if name in POSES else of_other[rank]
    return counts


def group_counts(total: int, imbalance: float) -> tuple[int, int, int]:
    """`total` boxes to a frequent class, one in between and a rare one."""
    parts = imbalance**2 + imbalance + 1
    between = max(1, round(total * imbalance / parts))
    rare = max(1, round(total / parts))
    return total - between - rare, between, rare


def rank_classes(seed: int) -> dict[str, int]:
    """0 frequent, 1 in between, 2 rare: a third of every kind each; of three worlds in a row
    every class is each once."""
    ranks = {}
    for number, names in enumerate(KINDS.values()):
        rng = np.random.default_rng([RANKS_TAG, seed // 3, number])
        for place, name in enumerate(rng.permutation(names).tolist()):
            ranks[name] = (place * 3 // len(names) + seed) % 3
    return ranks


def detect(rng: np.random.Generator, boxes: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """A person detector: boxes off by 6 % of their sides, 4 % missed, some false ones."""
    persons = []
    for box in boxes:
        if rng.random() < 0.96:
            sides = np.tile(box[2:] - box[:2], 2)
            persons.append((box + sides * rng.normal(0, 0.06, 4), rng.uniform(0.85, 1)))
    if rng.random() < 0.15:
        corner = rng.uniform(0.05, 0.7, 2)
        score = rng.uniform(0.5, 0.95)
        persons.append((np.concatenate([corner, corner + rng.uniform(0.18, 0.3, 2)]), score))
    return persons


# ------------------------------------------------------------------------------------------------
# Files and the command
# ------------------------------------------------------------------------------------------------


def make_world(folder: str | Path, seed: int = 0, workers: int = 2, **sizes) -> None:
    """Write World(seed, **sizes) into `folder`. Videos that are there are kept: an interrupted run
    goes on, a complete one is reused. ValueError for a folder that holds another world or other
    files: nothing is ever deleted."""
    known = [field.name for field in dataclasses.fields(World)]
    unknown = sorted(set(sizes) - set(known))
    if unknown:
        raise ValueError(f"unknown size {unknown[0]!r} of a world; known: {', '.join(known)}")
    began = time.monotonic()
    folder, world = Path(folder), World(seed, **sizes)
    parameters = {"version": VERSION} | dataclasses.asdict(world)
    refuse_other_contents(folder, parameters)
    texts, videos = annotate(world)
    texts = {"world.json": json.dumps(parameters, indent=1)} | texts  # first: then a run goes on
    for name, text in texts.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue  # several runs may share a complete world
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    for name in videos:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    missing = []
    for name, clips in videos.items():
        if not (folder / name).exists():
            missing.append((folder / name, world, clips))
    problems = map(make_video, missing)
    if workers > 1 and len(missing) >= 50:
        from extras.workers import ahead

        problems = ahead(workers)(make_video, missing)
    show_progress(problems, len(missing))
    done = "reused"
    if missing:
        done = f"{len(missing)} made in {time.monotonic() - began:.1f} s"
    print(f"world {folder}: {len(videos)} videos, {done}")


def refuse_other_contents(folder: Path, parameters: dict) -> None:
    """ValueError unless `folder` is new, empty, or a world of these parameters."""
    manifest = folder / "world.json"
    if manifest.exists():
        there = json.loads(manifest.read_text(encoding="utf-8"))
        other = []
        for name, value in parameters.items():
            if there.get(name) != value:
                other.append(f"{name} {there.get(name)}, not {value}")
        if other:
            raise ValueError(f"{manifest}: another world ({'; '.join(other)}); use a new folder")
    elif folder.exists() and any(path.suffix != ".partial" for path in folder.iterdir()):
        raise ValueError(f"{folder}: files but no world.json; expected a new folder or a world")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. OSError names the file, which a full disk's does not."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def make_video(work: tuple[Path, World, list[tuple]]) -> str:
    """-> what the system refused, which one sentence says: an error of a worker process is many."""
    path, world, clips = work
    try:
        write_video(path, np.concatenate([render(world, *clip) for clip in clips]))
    except OSError as error:
        return str(error)
    return ""


def write_video(path: Path, video: np.ndarray) -> None:
    """Encode uint8 (T, H, W, 3) beside `path` and rename: a file that exists is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    options = {"preset": "ultrafast", "crf": "18"}
    with av.open(f"file:{partial}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = FRAMES  # every scene begins with a frame to seek to
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, path)


def show_progress(problems: Iterable[str], total: int) -> None:
    for done, problem in enumerate(problems, 1):
        if problem:
            raise OSError(problem)
        if sys.stderr.isatty() and (done % 20 == 0 or done == total):
            end = "\n" if done == total else ""
            print(f"\rmaking videos: {done}/{total}", end=end, file=sys.stderr, flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="where the world is written")
    parser.add_argument("--processes", type=int, default=2, help="that render (default: 2)")
    sizes = parser.add_argument_group("the world", World.__doc__)
    for field in dataclasses.fields(World):
        option = f"--{field.name.replace('_', '-')}"
        what = f"default: {field.default}"
        sizes.add_argument(option, type=field.type, default=field.default, help=what)


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
    sizes = {field.name: getattr(options, field.name) for field in dataclasses.fields(World)}
    make_world(options.folder, workers=options.processes, **sizes)
