"""What annotation tools export -> Marks: CVAT, Label Studio, YOLO, COCO, VIA, LabelMe.

Tools count frames of a video; a Mark keeps the number, `annotations.place` looks up its time.
Where a tool exports frames as pictures, their names tell video and number (`frame_of`).
"""

import csv
import json
import math
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from xml.parsers import expat

import numpy as np

from extras.annotations import Library, Mark, decode_text, read_number, read_whole
from extras.videos import FrameTimes

# ------------------------------------------------------------------------------------------------
# Tracks: boxes at some frames, between which tools interpolate
# ------------------------------------------------------------------------------------------------


@dataclass
class Shape:
    """A box of a track."""

    where: str
    frame: int
    corners: np.ndarray  # (4,)
    actions: list[str]
    outside: bool = False  # the person is not to be seen from here to the next box


@dataclass
class Track:
    """A person through a video."""

    video: str
    person: str
    size: tuple[float, float] | None  # in which corners are measured
    shapes: list[Shape]


def sample_track(track: Track, keyframes: np.ndarray | None) -> list[Mark]:
    """The track at keyframes, or (None) at the frames of its boxes; interpolated between two."""
    shapes = sorted(track.shapes, key=lambda shape: shape.frame)
    frames = np.array([shape.frame for shape in shapes])
    marks = []
    for frame in frames if keyframes is None else keyframes:
        last = int(np.searchsorted(frames, frame, "right")) - 1
        if last < 0 or frame > frames[-1] or shapes[last].outside:
            continue
        shape, corners = shapes[last], shapes[last].corners
        if frame > shape.frame and not shapes[last + 1].outside:
            share = (frame - shape.frame) / (frames[last + 1] - shape.frame)
            corners = corners + share * (shapes[last + 1].corners - corners)
        for action in shape.actions:
            mark = Mark(shape.where, track.video, action, frame=int(frame), person=track.person)
            mark.box, mark.size = corners, track.size
            marks.append(mark)
    if shapes and not marks:
        lost = Mark(shapes[0].where, track.video, box=shapes[0].corners)
        lost.wrong = "no keyframe falls on this track, a smaller --every-sec would find one"
        marks.append(lost)
    return marks


# ------------------------------------------------------------------------------------------------
# CVAT for video 1.1
# ------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """An element of XML that knows its line; ElementTree's do not."""

    tag: str
    values: dict[str, str]
    line: int
    text: str = ""
    children: list["Node"] = field(default_factory=list)

    def below(self, *tags: str) -> Iterator["Node"]:
        """All descendants with one of these tags."""
        for child in self.children:
            if child.tag in tags:
                yield child
            yield from child.below(*tags)

    def text_of(self, tag: str) -> str:
        """The text of the first descendant of that tag, or ""."""
        return next((node.text.strip() for node in self.below(tag)), "")


def read_xml(name: str, content: bytes) -> Node:
    root = Node("", {}, 0)
    stack = [root]
    parser = expat.ParserCreate()

    def start(tag: str, values: dict[str, str]) -> None:
        node = Node(tag, values, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def add_text(text: str) -> None:
        stack[-1].text += text

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda tag: stack.pop()
    parser.CharacterDataHandler = add_text
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(f"{name}: not XML: {error}") from None
    return root.children[0]


def read_cvat(
    name: str, content: bytes, library: Library, attributes: Sequence[str], notes: list[str]
) -> list[Mark]:
    """Tracks of boxes, or of any shape, of which the bounding box is taken.

    The actions of a box are its attributes: a ticked checkbox by its name, a selected value, unless
    it is "none", by itself. Free text and numbers (an id, an age) are actions only if `attributes`
    name them; then nothing else is. Without such attributes the label of the track is the action.
    """
    root = read_xml(name, content)
    image = next(iter(root.below("image")), None)
    if image is not None:
        raise ValueError(
            f"{name}:{image.line}: an <image>, so this is CVAT for images; expected the <track>s "
            "of an export as CVAT for video 1.1"
        )
    taken = _action_attributes(name, root, attributes, notes)
    sources = {task.text_of("id"): task for task in root.below("task", "job")}
    marks = []
    for number, node in enumerate(root.below("track")):
        task = sources.get(node.values.get("task_id", ""))
        if task is None and sources:
            task = list(sources.values())[-1]
        video, size = _cvat_video(name, task, library)
        doubt = _other_video(name, task, video, library)
        if doubt and doubt not in library.doubts:
            library.doubts.append(doubt)
        track = Track(video, str(number), size, [])
        for child in node.children:
            track.shapes.append(_cvat_shape(name, child, node.values.get("label", ""), taken))
        marks += sample_track(track, library.keyframes(video))
    if not marks:
        notes.append(f"{name}: no <track> with a shape in it")
    return marks


def _cvat_video(name: str, task: Node | None, library: Library) -> tuple[str, tuple | None]:
    """The name of a task's video, and the size of its picture if that is stated."""
    source = task.text_of("source") if task else ""
    stem = PurePosixPath(name).stem
    if not source and not library.find(stem):
        raise ValueError(
            f"{name}: no <source>, so its task was made of images, not of a video: name the xml "
            f"after the video that has these frames; no video is called {stem!r}"
        )
    width, height = (task.text_of("width"), task.text_of("height")) if task else ("", "")
    size = (read_number(width), read_number(height)) if width and height else None
    return source or stem, size


def _other_video(name: str, task: Node | None, video: str, library: Library) -> str:
    """A sentence if a task has other frames than the video, re-encoded since, perhaps; or "".

    A job counts those of its part of a task, with steps of the task's frame_filter.
    """
    text = (task.text_of("stop_frame") or task.text_of("size")) if task else ""
    clock = library.clock_of(video) if text.isdecimal() else None
    if clock is None:
        return ""
    step = int((re.findall(r"\d+", task.text_of("frame_filter")) or ["1"])[0])
    count = read_whole(text) + bool(task.text_of("stop_frame"))
    more = count - len(clock.times_sec)
    if more <= 1 and (task.tag == "job" or more >= -step):
        return ""
    return (
        f"{name}:{task.line}: its task ends with frame {count - 1}, but {library.find(video)[0]} "
        f"has {len(clock.times_sec)} from 0 on: if it was re-encoded since, the labels are shifted"
    )


def _action_attributes(name: str, root: Node, wanted: Sequence[str], notes: list[str]) -> set[str]:
    """The names of the attributes that are actions, said in notes."""
    values: dict[str, set[str]] = {}
    for track in root.below("track"):
        for shape in track.children:
            for node in shape.children:
                if node.tag == "attribute":
                    known = values.setdefault(node.values.get("name", ""), set())
                    known.add(node.text.strip().casefold())
    kinds = {}  # of those that are in use
    for node in root.below("attribute"):
        if node.text_of("name") in values:  # a definition, in <labels>
            kinds[node.text_of("name")] = node.text_of("input_type")
    for attribute, texts in values.items():
        if not kinds.get(attribute):
            kinds[attribute] = _guess_kind(texts)
    asked = {attribute.casefold() for attribute in wanted}
    taken = {kind for kind in kinds if kind.casefold() in asked}
    if kinds and wanted and not taken:
        raise ValueError(f"{name}: no attribute {', '.join(wanted)}, found {', '.join(kinds)}")
    if not wanted:
        taken = {key for key, kind in kinds.items() if kind in ("checkbox", "select", "radio")}
    left = [f"{key} ({kind})" for key, kind in kinds.items() if key not in taken]
    if kinds:
        said = ", ".join(f"{key} ({kinds[key]})" for key in kinds if key in taken)
        said = f"attributes taken as actions: {said or 'none, so the labels of the tracks'}"
        if left:
            said += f"; not taken: {', '.join(left)}; --attribute NAME takes one"
        notes.append(f"{name}: {said}")
    return taken


def _guess_kind(texts: set[str]) -> str:
    if texts <= {"true", "false"}:
        return "checkbox"
    for text in texts - {""}:
        try:
            read_number(text)
        except ValueError:
            return "select"
    return "number"


def _cvat_shape(name: str, node: Node, label: str, taken: set[str]) -> Shape:
    where = f"{name}:{node.line}"
    try:
        visible = [node]
        if node.tag == "skeleton":
            visible = [point for point in node.children if point.values.get("outside") == "0"]
        frame = read_whole(node.values["frame"])
        corners = [_cvat_corners(shape) for shape in visible]
        outside = node.values.get("outside") == "1" or not corners
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: {error} in a <{node.tag}>, expected CVAT's") from None
    low, high = np.zeros(2), np.zeros(2)
    if corners:
        low = np.min([corner[:2] for corner in corners], axis=0)
        high = np.max([corner[2:] for corner in corners], axis=0)
    actions, has = [], False
    for attribute in node.children:
        if attribute.tag != "attribute" or attribute.values.get("name", "") not in taken:
            continue
        has, value = True, attribute.text.strip()
        if value.casefold() == "true":
            actions.append(attribute.values["name"])
        elif value.casefold() not in ("", "false", "none", "__undefined__"):
            actions.append(value)
    if not has:
        actions = [label]
    return Shape(where, frame, np.concatenate([low, high]), actions or [""], outside)


def _cvat_corners(node: Node) -> np.ndarray:
    """x1, y1, x2, y2 of the box around a shape."""
    values = node.values
    turn = math.radians(read_number(values.get("rotation", "0")))  # about its centre
    cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
    if node.tag == "box":
        x1, y1, x2, y2 = (read_number(values[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        centre = np.array([x1 + x2, y1 + y2]) / 2
        width, height = x2 - x1, y2 - y1
        half = np.array([cos * width + sin * height, sin * width + cos * height]) / 2
    elif node.tag == "ellipse":
        centre = np.array([read_number(values["cx"]), read_number(values["cy"])])
        rx, ry = read_number(values["rx"]), read_number(values["ry"])
        half = np.array([math.hypot(cos * rx, sin * ry), math.hypot(sin * rx, cos * ry)])
    elif node.tag == "mask":
        left, top = read_number(values["left"]), read_number(values["top"])
        half = np.array([read_number(values["width"]), read_number(values["height"])]) / 2
        centre = half + [left, top]
    else:
        if node.tag == "cuboid":  # xtl1, ytl1, ... of its eight corners
            xs = [read_number(values[key]) for key in values if re.fullmatch(r"x\w\w\d", key)]
            ys = [read_number(values[key]) for key in values if re.fullmatch(r"y\w\w\d", key)]
            points = np.array([xs, ys])
        else:  # polygon, polyline, points: x,y;x,y
            pairs = [pair.split(",") for pair in values["points"].split(";")]
            points = np.array([[read_number(x), read_number(y)] for x, y in pairs]).T
        low, high = points.min(1), points.max(1)
        return np.concatenate([low, high])
    return np.concatenate([centre - half, centre + half])


# ------------------------------------------------------------------------------------------------
# Label Studio, video
# ------------------------------------------------------------------------------------------------


def read_label_studio(name: str, tasks: list, library: Library) -> list[Mark]:
    """The json of a video project: rectangles (in per cent) with their labels, or with the choices
    that were made for them, which then are the actions. Skipped annotations are left out."""
    marks = []
    for number, task in enumerate(tasks, 1):
        where = f"{name}: task {number}"
        addresses = [text for text in task["data"].values() if isinstance(text, str)]
        video = _named_video(addresses, library)
        for annotation in task.get("annotations") or []:
            if annotation.get("was_cancelled"):
                continue
            chosen: dict[str, list[str]] = {}  # id of a rectangle -> choices
            for result in annotation["result"]:
                choices = result.get("value", {}).get("choices", [])
                chosen.setdefault(result.get("id"), []).extend(choices)
            for place, result in enumerate(annotation["result"]):
                value = result.get("value", {})  # relations have none
                if "timelinelabels" in value:
                    wrong = f"{value['timelinelabels']} of a stretch of time, expected rectangles"
                    marks.append(Mark(where, video, wrong=wrong))
                if "sequence" not in value or "choices" in value:
                    continue
                actions = chosen.get(result.get("id")) or value.get("labels") or [""]
                person = result.get("id", str(place))
                track = _labelled_track(where, video, person, value, actions, library)
                marks += sample_track(track, library.keyframes(track.video))
    return marks


def _labelled_track(
    where: str, video: str, person: str, value: dict, actions: list[str], library: Library
) -> Track:
    """A rectangle of Label Studio: shown from each `enabled` box on, the last to the video's end;
    a box that is not enabled is shown, and gone from the next frame on."""
    track = Track(video, person, (100, 100), [])
    clock = library.clock_of(video)
    shown = True
    for box in sorted(value["sequence"], key=lambda box: box["frame"]):
        corners = _turned(box, clock)
        frame, shown = _frame_of_video(box["frame"], value, clock), box.get("enabled", True)
        track.shapes.append(Shape(where, frame, corners, actions))
        if not shown:
            track.shapes.append(Shape(where, frame + 1, corners, [""], True))
    if shown and track.shapes and clock:
        track.shapes.append(Shape(where, len(clock.times_sec), corners, [""], True))
    return track


def _turned(box: dict, clock: FrameTimes | None) -> np.ndarray:
    """Corners (4,) in per cent around a box, which `rotation` turns clockwise about its upper left
    corner, in pixels."""
    picture = np.array([clock.width, clock.height]) if clock else np.ones(2)
    first = np.array([box["x"], box["y"]], float)
    width, height = np.array([box["width"], box["height"]], float) * picture
    turn = math.radians(box.get("rotation") or 0)
    along = np.array([math.cos(turn), math.sin(turn)]) * width  # the upper side
    down = np.array([-math.sin(turn), math.cos(turn)]) * height
    points = first + np.array([[0, 0], along, down, along + down]) / picture  # (4, 2)
    return np.concatenate([points.min(0), points.max(0)])


def _frame_of_video(number: int, value: dict, clock: FrameTimes | None) -> int:
    """Label Studio's frame, from 1 -> the frame of the video that is shown at its time.

    Its frames are those of the project's `frameRate` (24 if none is set), not the video's:
    https://github.com/HumanSignal/label-studio/issues/3315. The export says how many the video
    has of them; where it does not, or has as many as the video (or one more, of a part of a
    frame), they are taken for the video's.
    """
    count, duration_sec = value.get("framesCount"), value.get("duration")
    if not count or not duration_sec or not clock:
        return number - 1
    frames = len(clock.times_sec)
    if abs(count - frames) <= 1:
        return number - 1
    time_sec = (number - 1) * duration_sec / count
    if time_sec >= clock.end_sec:  # none of the video: what is said of it needs a number
        return math.ceil(frames * time_sec / clock.end_sec)
    return int(np.searchsorted(clock.times_sec, time_sec + 1e-3, "right")) - 1


def _named_video(addresses: list[str], library: Library) -> str:
    """/data/upload/1/3f2a9c1b-kitchen.mp4 -> kitchen.mp4, the name before Label Studio's upload;
    /data/local-files/?d=cam1/a%20b.mp4 -> cam1/a b.mp4, or where there is no such path a b.mp4."""
    for address in addresses:
        path = urllib.parse.unquote(address.split("?d=")[-1])
        name = re.sub(r"^[0-9a-f]{8}-", "", path.rsplit("/", 1)[-1])
        if "?d=" in address and library.find(path):
            return path
        if library.find(name):
            return name
    return addresses[0].rsplit("/", 1)[-1]


# ------------------------------------------------------------------------------------------------
# Pictures of frames: YOLO, COCO, LabelMe, VIA 2
# ------------------------------------------------------------------------------------------------


def frame_of(name: str, library: Library) -> tuple[str, int]:
    """kitchen_000012.txt, kitchen/000012.jpg, kitchen.zip/x/frame_000012.txt -> kitchen.mp4, 12.

    Pictures count from library.first_frame. Raises ValueError if the name says no video or number.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    parts = re.fullmatch(r"(?i)(.*?)[ _.-]*(?:frame|img|image)?[ _.-]*(\d+)", path.stem)
    if not parts:
        raise ValueError(
            f"{path.name}: no number of a frame, expected VIDEO_000012 or VIDEO/000012"
        )
    video, number = parts.groups()
    candidates = [str(path.parent / video), video]
    if not video:
        video = path.parent.name
        candidates = [str(path.parent), *(folder.name for folder in list(path.parents)[:3])]
    picture = int(number) - library.first_frame
    for candidate in candidates:
        files = library.find(candidate)
        if len(files) == 1:
            return files[0], library.shown(files[0], picture)
        if files:
            return candidate, picture  # several: said when the mark is fitted
    raise ValueError(library.look(video)[1])


def _framed(where: str, picture: str, library: Library) -> Mark:
    """A mark at the frame that a picture shows."""
    mark = Mark(where, picture)
    try:
        mark.video, mark.frame = frame_of(picture, library)
    except ValueError as error:
        mark.wrong = str(error)
    if mark.frame < 0 and not mark.wrong:
        mark.wrong = "frame 0, but --first-frame 1 says that they begin with 1"
    return mark


def read_yolo(name: str, content: bytes, library: Library, classes: dict[int, str]) -> list[Mark]:
    """A txt for each frame; rows `class x y x y x y ...` (a polygon) or `class cx cy w h` and
    perhaps track, score, or points x y visibility (a pose), of which the box is taken. classes:
    the names of the numbers; {}: without a list, `class 0` is a name."""
    marks, forms = [], []
    for number, line in enumerate(decode_text(name, content).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        mark = _framed(where, name, library)
        try:
            label, *values = [read_number(word) for word in line.split()]
            forms.append(_yolo_forms(values))
        except ValueError as error:
            raise ValueError(f"{where}: {error}: {line}") from None
        mark.box = values
        mark.size = (1.0, 1.0)
        mark.label = classes.get(int(label), f"class {int(label)}")
        if classes and int(label) not in classes:
            known = f"{min(classes)} to {max(classes)}"
            mark.wrong = f"class {int(label)}, but the list of classes has {known}"
        marks.append(mark)
    sure = {form for names in forms if len(names) == 1 for form in names}
    for mark, names in zip(marks, forms, strict=True):
        if len(names) > 1:
            names = sure  # what the other rows of the file are
        if len(names) != 1:
            raise ValueError(
                f"{mark.where}: a box with track and score, or a pose, or a polygon? Expected "
                "class cx cy w h, or a polygon that does not look like one of these"
            )
        mark.box = _yolo_box(mark.box) if "box" in names else _around(mark.box[::2], mark.box[1::2])
    return marks


def _yolo_forms(values: Sequence[float]) -> set[str]:
    """What the numbers after the class can be: "box" (with more behind it), "polygon", or both."""
    count, more = len(values), values[4:]
    if count in (4, 5):
        return {"box"}
    forms = set()
    if count >= 6 and count % 2 == 0 and -0.1 <= min(values) and max(values) <= 1.1:
        forms.add("polygon")
    if count == 6:  # a track is a whole number
        fits = any(value == int(value) for value in more)
    else:
        fits = count > 6 and (count - 4) % 3 == 0 and set(more[2::3]) <= {0, 1, 2}
    if fits:
        corners = _yolo_box(values)
        if not forms or -0.1 <= min(corners) and max(corners) <= 1.1:
            forms.add("box")
    if not forms:
        raise ValueError(
            f"{count + 1} columns, expected class cx cy w h (and track, score, or points x y "
            "visibility), or a polygon in [0, 1]"
        )
    return forms


def _yolo_box(values: Sequence[float]) -> list[float]:
    x, y, width, height = values[:4]
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def read_coco(name: str, content: dict, library: Library) -> list[Mark]:
    """Instances: categories are the actions; pictures are frames by their names."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    marks = []
    for number, annotation in enumerate(content["annotations"], 1):
        where = f"{name}: annotation {number}"
        if annotation["image_id"] not in images:
            wrong = f"image_id {annotation['image_id']} is not in images"
            marks.append(Mark(where, "", wrong=wrong))
            continue
        image = images[annotation["image_id"]]
        picture = f"{PurePosixPath(name).parent}/{image['file_name']}"
        mark = _framed(where, picture, library)
        x, y, width, height = annotation["bbox"]
        mark.box = [x, y, x + width, y + height]
        mark.size = (image["width"], image["height"])
        mark.label = names.get(annotation["category_id"], "")
        if annotation["category_id"] not in names:
            mark.wrong = f"category_id {annotation['category_id']} is not in categories"
        person = annotation.get("track_id", annotation.get("attributes", {}).get("track_id", ""))
        mark.person = str(person)
        marks.append(mark)
    return marks


def read_labelme(name: str, content: dict, library: Library) -> list[Mark]:
    """A json for each frame; the box around each shape."""
    marks = []
    for number, shape in enumerate(content["shapes"], 1):
        picture = str(PurePosixPath(name).parent / PurePosixPath(name).stem)
        mark = _framed(f"{name}: shape {number}", picture, library)
        xs, ys = np.array(shape["points"], float).T
        mark.box = _around(xs, ys)
        if shape.get("shape_type") == "circle":  # its centre, and a point on it
            radius = math.hypot(xs[1] - xs[0], ys[1] - ys[0])
            mark.box = _around_ellipse(xs[0], ys[0], radius, radius)
        mark.size = (content["imageWidth"], content["imageHeight"])
        mark.label, mark.person = shape["label"], str(shape.get("group_id") or "")
        marks.append(mark)
    return marks


def _around(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    return [min(xs), min(ys), max(xs), max(ys)]


# ------------------------------------------------------------------------------------------------
# VIA
# ------------------------------------------------------------------------------------------------


def read_via(name: str, content: bytes, library: Library) -> list[Mark]:
    """The csv of VIA 2 (pictures of frames) or VIA 3 (videos)."""
    text = decode_text(name, content)
    options = {}  # VIA 3: attribute -> its options
    header = ""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# ATTRIBUTE"):
            for key, attribute in json.loads(line.partition("=")[2]).items():
                options[key] = attribute.get("options", {})
        elif line.startswith("# CSV_HEADER"):
            header = line.partition("=")[2].strip()
        elif line.startswith("filename,"):
            header = line.lstrip("#").strip()
        elif line.strip() and not line.startswith("#"):
            rows.append((f"{name}:{number}", line))
    marks = []
    for where, line in rows:
        keys, cells = csv.reader([header, line])
        row = dict(zip(keys, cells, strict=False))
        marks += (
            _via_3(where, row, options)
            if "spatial_coordinates" in row
            else _via_2(where, row, library)
        )
    return marks


def _via_2(where: str, row: dict[str, str], library: Library) -> list[Mark]:
    shape = json.loads(row["region_shape_attributes"] or "{}")
    if not shape:
        return []
    mark = _framed(where, f"{PurePosixPath(where).parent}/{row['filename']}", library)
    if "all_points_x" in shape:
        mark.box = _around(shape["all_points_x"], shape["all_points_y"])
    elif "width" in shape:
        x, y = shape["x"], shape["y"]
        mark.box = [x, y, x + shape["width"], y + shape["height"]]
    elif "r" in shape or "rx" in shape:
        radii = shape.get("rx", shape.get("r")), shape.get("ry", shape.get("r"))
        mark.box = _around_ellipse(shape["cx"], shape["cy"], *radii)
    else:
        mark.wrong = f"a {shape.get('name')}, expected a rect, a circle, an ellipse or a polygon"
    marks = []
    for value in json.loads(row["region_attributes"] or "{}").values():
        ticked = [key for key, on in value.items() if on] if isinstance(value, dict) else [value]
        for label in ticked:
            marks.append(replace(mark, label=label))
    return marks or [mark]


def _around_ellipse(x: float, y: float, across: float, down: float) -> list[float]:
    return [x - across, y - down, x + across, y + down]


def _via_3(where: str, row: dict[str, str], options: dict[str, dict]) -> list[Mark]:
    video = json.loads(row["file_list"])[0]
    times = json.loads(row["temporal_coordinates"])
    spatial = json.loads(row["spatial_coordinates"])
    mark = Mark(where, video)
    if times:
        mark.time_sec = float(times[0])
    else:
        mark.wrong = "without a time, so of the whole file; left out"
    if len(times) == 2:
        mark.end_sec = float(times[1])
    kind, *numbers = spatial or [0]
    if kind == 2:
        x, y, width, height = numbers
        mark.box = [x, y, x + width, y + height]
    elif kind in (3, 4):  # a circle has one radius
        x, y, *radii = numbers
        mark.box = _around_ellipse(x, y, radii[0], radii[-1])
    elif kind in (6, 7):  # a line of several points, a polygon
        mark.box = _around(numbers[::2], numbers[1::2])
    elif kind:
        mark.wrong = f"VIA's shape {kind}, a point or a line, which has no box"
    marks = []
    for key, value in json.loads(row["metadata"]).items():
        for one in value.split(","):
            label = options.get(key, {}).get(one, one)
            marks.append(replace(mark, label=label))
    return marks or [mark]
