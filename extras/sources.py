"""Which files of a folder are annotations, of which kind; and what they say -> Marks."""

import json
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

import data
from extras import annotation_tools, annotations, formats
from extras.annotations import Library, Mark

TEXTS = (".csv", ".tsv", ".txt", ".json", ".xml")
CLASS_LISTS = (".pbtxt", ".names", ".yaml", ".yml")
FRAME_KINDS = ("YOLO", "COCO", "LabelMe", "VIA")  # boxes of single frames, perhaps of each
BOX_KINDS = ("box table", "CVAT", "Label Studio", *FRAME_KINDS)
STRETCH_KINDS = ("table of stretches",)
CLIP_KINDS = ("table of clips", "list of clips")
PART_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",  # Kinetics'
    "dev": "val",
    "eval": "val",
    "test": "test",
    "testing": "test",
}


# ------------------------------------------------------------------------------------------------
# Which files are annotations, and of which kind
# ------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A file with annotations."""

    name: str  # its path, in a zip followed by its name there
    content: bytes
    kind: str = ""
    said: str = ""  # why it is not read, or what for


def find_sources(
    library: Library, given: Path | None, target: Path
) -> tuple[list[Source], list[Source]]:
    """Files with annotations; and all others, with the reason why they are not read.

    Of the kinds that the folder holds the most telling is read: boxes before stretches of time
    before labels of whole clips.
    """
    place = given or library.folder
    files = [place] if place.is_file() else list(_walk_files(place, target))
    sources, others, strange = [], [], []
    for path in files:
        if data.is_video(path.name) and path != given:
            continue
        if path.suffix.lower() not in (*TEXTS, *CLASS_LISTS, ".zip"):
            strange.append(path)
            continue
        try:
            opened = list(_open_source(path))
        except ValueError as error:
            others.append(Source(str(path), b"", said=str(error)))
            continue
        if not opened:
            others.append(Source(str(path), b"", said=f"{path}: a zip without annotations"))
        for source in opened:
            try:
                source.kind = kind_of(source, library)
                sources.append(source)
            except ValueError as error:
                source.said = str(error)
                others.append(source)
    if strange:
        others.append(Source("", b"", said=_name_others(strange)))
    chosen: list[Source] = []
    for kinds in (BOX_KINDS, STRETCH_KINDS, CLIP_KINDS):
        chosen = chosen or [source for source in sources if source.kind in kinds]
    read = {source.kind for source in chosen}
    for source in sources:
        if source.kind not in read:
            source.said = f"{source.name}: a {source.kind}, not read beside a {chosen[0].kind}"
            others.append(source)
    return chosen, others


def _name_others(paths: list[Path]) -> str:
    """A sentence on files of no kind that is known; thousands of pictures by their number."""
    suffixes = Counter(path.suffix for path in paths)
    said = [str(path) for path in paths if suffixes[path.suffix] <= 3]
    said += [f"{count} files {suffix}" for suffix, count in suffixes.items() if count > 3]
    tables = any(suffix in (".xlsx", ".xls", ".ods") for suffix in suffixes)
    return f"not read: {', '.join(said)}" + (" (save tables as csv)" if tables else "")


def _walk_files(folder: Path, target: Path) -> Iterator[Path]:
    """Files below, sorted, also behind links, as videos are found; none that are hidden or the
    result of an import."""
    seen = {target.resolve()}
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent)
        if here.resolve() in seen or {"recipe.toml", "problems.txt"} <= set(names):
            folders.clear()
            continue
        seen.add(here.resolve())  # links can lead in circles
        folders[:] = sorted(x for x in folders if not x.startswith(".") and x != "__MACOSX")
        for name in sorted(names):
            if not name.startswith(".") and name not in ("Thumbs.db", "desktop.ini"):
                yield here / name


def _open_source(path: Path) -> Iterator[Source]:
    """The file, or what a zip holds."""
    if path.suffix.lower() != ".zip":
        yield Source(str(path), path.read_bytes())
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = PurePosixPath(entry.filename)
                hidden = name.name.startswith(".") or "__MACOSX" in name.parts
                text = name.suffix.lower() in (*TEXTS, *CLASS_LISTS)
                if text and not entry.is_dir() and not hidden:
                    yield Source(f"{path}/{entry.filename}", archive.read(entry))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        # damaged; RuntimeError: with a password, or compressed in another way
        raise ValueError(f"{path}: {error}, expected a zip with annotations") from None


def kind_of(source: Source, library: Library) -> str:
    """A kind above; ValueError with the reason if it is none."""
    suffix = PurePosixPath(source.name).suffix.lower()
    if not source.content.strip():
        raise ValueError(f"{source.name}: empty")
    if suffix == ".xml":
        root = annotation_tools.read_xml(source.name, source.content)
        if root.tag != "annotations":
            raise ValueError(f"{source.name}: XML of <{root.tag}>, expected CVAT's <annotations>")
        return "CVAT"
    if suffix == ".json":
        return _json_kind(source)
    if suffix in CLASS_LISTS:
        raise ValueError(f"{source.name}: names of classes")
    start = source.content[:4096]
    if b"CSV_HEADER" in start or start.removeprefix(b"\xef\xbb\xbf#").startswith(b"filename,file_"):
        return "VIA"
    table = annotations.read_table(source.name, source.content)
    if not table.rows and not table.header:
        raise ValueError(f"{source.name}: no rows")
    if table.header:
        return _header_kind(source, table)
    if any(_is_box_row(cells) for _, cells in table.rows[:50]):
        return "box table"
    lines = annotations.decode_text(source.name, source.content).splitlines()
    lines = [line.strip() for line in lines if line.strip()][:200]
    if suffix == ".txt" and all(_is_yolo_row(line) for line in lines):
        return "YOLO"
    if 2 * sum(_names_video(line, library) for line in lines) >= len(lines):
        return "list of clips"
    raise ValueError(f"{source.name}: its lines name no video of {library.folder}: {lines[0][:60]}")


def _header_kind(source: Source, table: annotations.Table) -> str:
    columns = table.columns
    if "youtube_id" in table.header:
        return "list of clips"  # Kinetics' own csv
    if any(key in columns for key in annotations.BOX):
        return "box table"
    if "start" in columns and "end" in columns and "label" in columns:
        return "table of stretches"
    if "video" in columns and "label" in columns and "time" not in columns:
        return "table of clips"
    raise ValueError(
        f"{source.name}:1: the header {','.join(table.header)}, expected video,label or "
        "video,start,end,label or video,time_sec,x1,y1,x2,y2,label"
    )


def _json_kind(source: Source) -> str:
    try:
        content = json.loads(annotations.decode_text(source.name, source.content))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source.name}: not JSON: {error}") from None
    first = content[0] if isinstance(content, list) and content else content
    keys = first.keys() if isinstance(first, dict) else set()
    for kind, needed in {
        "COCO": {"images", "annotations", "categories"},
        "LabelMe": {"shapes", "imagePath", "imageWidth"},
        "Label Studio": {"data", "annotations"},
        "list of clips": {"id", "template"},  # Something-Something v2
    }.items():
        if needed <= keys:
            return kind
    found = ", ".join(list(keys)[:6]) or type(content).__name__
    raise ValueError(
        f"{source.name}: JSON of {found}; expected that of COCO, LabelMe, Label Studio"
    )


def _is_box_row(cells: list[str]) -> bool:
    """video, time and four numbers."""
    if not 6 <= len(cells) <= 8:
        return False
    try:
        annotations.read_seconds(cells[1])
        for cell in cells[2:6]:
            annotations.read_number(cell)
    except ValueError:
        return False
    return True


def _is_yolo_row(line: str) -> bool:
    words = line.split()
    numbers = [word for word in words if re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?", word)]
    return len(words) >= 5 and numbers == words and max(map(float, words[1:5])) <= 1.1


def _names_video(line: str, library: Library) -> bool:
    """Does a row of a list begin with a video, or is it one?"""
    first = re.split(r"[\s,;]", line)[0]
    before_last = re.split(r"[\s,;]+\S+$", line)[0]
    return any(data.is_video(name) or library.find(name) for name in (line, first, before_last))


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def read_marks(
    sources: list[Source],
    others: list[Source],
    library: Library,
    given: Path | None,
    unit: str,
    attributes: Sequence[str],
    notes: list[str],
) -> list[Mark]:
    """What all sources say; `part` as the names of the files say where the rows do not.

    given: the file or folder of annotations, if it is not that of the videos; names of folders
    below say parts too. unit: of the boxes in tables, see read_boxes_table; attributes: see
    read_cvat.
    """
    sources = _one_split(sources, notes)
    folder = given or library.folder
    parts = [_part_of_name(source.name, folder, library) for source in sources]
    if len(set(parts)) == 1:  # a "train.csv" alone, or nothing that tells
        parts = [""] * len(sources)
    yolo = any(source.kind == "YOLO" for source in sources)
    classes = _yolo_classes(others) if yolo else {}
    marks, framed = [], []
    for source, part in zip(sources, parts, strict=True):
        if source.kind == "CVAT":
            read = annotation_tools.read_cvat(
                source.name, source.content, library, attributes, notes
            )
        elif source.kind == "box table":
            first, content = library.first_frame, source.content
            read, said = annotations.read_boxes_table(source.name, unit, first, content)
            notes.append(said)
            name_numbers(read, others, "action {}")
        else:
            read = _read_source(source, classes, library)
        for mark in read:
            mark.part = _part_of_row(mark) or part
        (framed if source.kind in FRAME_KINDS else marks).extend(read)
    name_numbers([mark for mark in marks if mark.is_clip], others, "{}")
    return _drop_stretches(marks + thin_out(framed, library, notes), notes)


def _drop_stretches(marks: list[Mark], notes: list[str]) -> list[Mark]:
    """Without the stretches of time among boxes, as VIA 3 can hold them: a task is one or other."""
    boxes = [mark for mark in marks if len(mark.box)]
    left = [mark for mark in marks if not len(mark.box) and not mark.wrong]
    if not boxes or not left:
        return marks
    notes.append(
        f"{left[0].where}: {left[0].label!r} has no box; left out beside {len(boxes)} boxes are "
        f"{len(left)} such rows"
    )
    return [mark for mark in marks if len(mark.box) or mark.wrong]


def _read_source(source: Source, classes: dict[int, str], library: Library) -> list[Mark]:
    """classes: of YOLO's numbers."""
    name, content = source.name, source.content
    if source.kind == "YOLO":
        return annotation_tools.read_yolo(name, content, library, classes)
    if source.kind in ("table of stretches", "table of clips"):
        return annotations.read_clip_table(name, content)
    if source.kind == "list of clips":
        return _read_list(source, library)
    try:
        if source.kind == "VIA":
            return annotation_tools.read_via(name, content, library)
        parsed = json.loads(annotations.decode_text(name, content))
        if source.kind == "Label Studio":
            return annotation_tools.read_label_studio(name, parsed, library)
        if source.kind == "COCO":
            return annotation_tools.read_coco(name, parsed, library)
        return annotation_tools.read_labelme(name, parsed, library)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__} {error}"
        raise ValueError(f"{name}: not as {source.kind} writes it: {what}") from None


def _one_split(sources: list[Source], notes: list[str]) -> list[Source]:
    """trainlist01, testlist01, trainlist02, ...: the first of several splits of the same videos."""
    numbers = {}
    for source in sources:
        match = re.search(r"(?:list|split)_?0*(\d+)\.\w+$", source.name)
        if match and source.kind in CLIP_KINDS:
            numbers[source.name] = int(match[1])
    first = min(numbers.values(), default=0)
    left = {name for name, number in numbers.items() if number != first}
    if left:
        notes.append(f"split {first} is taken, not read: {', '.join(left)}")
    return [source for source in sources if source.name not in left]


def _part_of_name(name: str, folder: Path, library: Library) -> str:
    """train, val or test, if the name of a file (trainlist01.txt) says so or a folder between it
    and `folder`; not train_station.xml beside train_station.mp4."""
    if library.find(PurePosixPath(name).stem):
        return ""
    for word in re.findall(r"[a-z]+", PurePosixPath(name).stem.casefold()):
        for ending in ("list", "set", "split", ""):
            part = PART_WORDS.get(word.removesuffix(ending))
            if part:
                return part
    for parent in reversed(PurePosixPath(os.path.relpath(name, folder)).parts[:-1]):
        part = PART_WORDS.get(parent.casefold())
        if part and not library.find(parent):
            return part
    return ""


def _part_of_row(mark: Mark) -> str:
    if not mark.part:
        return ""
    part = PART_WORDS.get(mark.part.casefold())
    if not part:
        raise ValueError(f"{mark.where}: split {mark.part!r}, expected train, val or test")
    return part


def _read_list(source: Source, library: Library) -> list[Mark]:
    """A list of clips in a format of data.py; HMDB51's say the class in the file's name."""
    if not os.path.isfile(source.name):
        raise ValueError(f"{source.name}: a list of clips in a zip: unpack it")
    marks = []
    parts = _kinetics_parts(source)
    hmdb = re.fullmatch(r"(.+)_test_split\d+", PurePosixPath(source.name).stem)
    for row in formats.read_clips(source.name, "train", str(library.folder)):
        file = library.videos.clip(row)
        label = row.label
        mark = Mark(row.where, file or row.name, label, part=parts.get(row.where, ""))
        if hmdb:  # `x.avi 1`
            mark.label, mark.part = hmdb[1], {"1": "train", "2": "test"}.get(label, "")
            if not mark.part:
                continue  # 0: of another split
        marks.append(mark)
    return marks


def _kinetics_parts(source: Source) -> dict[str, str]:
    """`file:line` -> its cell in Kinetics' column split; {} for other lists."""
    if b"youtube_id" not in source.content.lstrip().partition(b"\n")[0]:
        return {}
    table = annotations.read_table(source.name, source.content)
    column = table.columns.get("part")
    if column is None:
        return {}
    return {where: cells[column] for where, cells in table.rows if column < len(cells)}


def name_numbers(marks: list[Mark], others: list[Source], unnamed: str) -> None:
    """Where classes are numbers, put the names in their place that a list of classes gives them."""
    numbered = [mark for mark in marks if mark.label.isdecimal()]
    names = _names_of({int(mark.label) for mark in numbered}, others)
    for mark in numbered:
        mark.label = names.get(int(mark.label), unnamed.format(mark.label))


def _names_of(numbers: set[int], others: list[Source]) -> dict[int, str]:
    """Of the first list of classes that has all these numbers; {} if none has."""
    if not numbers:
        return {}
    for source in others:
        name = PurePosixPath(source.name).name.casefold()
        hint = re.search(r"class|label|categor|action|names|\.pbtxt$", name)
        if not hint or not os.path.isfile(source.name):
            continue
        try:
            names = formats.read_classes(source.name)
        except ValueError:
            continue
        if numbers <= names.keys():
            source.said = f"{source.name}: names of the classes"
            return names
    return {}


def _yolo_classes(others: list[Source]) -> dict[int, str]:
    """Of classes.txt, obj.names or data.yaml."""
    for source in others:
        path = PurePosixPath(source.name)
        in_yaml = path.suffix in (".yaml", ".yml")
        listed = path.suffix == ".names" or re.search("class|label", path.name.casefold())
        if source.kind or not (in_yaml or listed):
            continue  # what has a kind is annotations, no list of names
        text = annotations.decode_text(source.name, source.content)
        if in_yaml:
            names = _yaml_names(text)
        else:
            names = dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
        if names:
            source.said = f"{source.name}: names of the classes"
            return names
    return {}


QUOTED = r"""(?<![^\s:,{[-])(?:"[^"]*"|'[^']*')"""  # not the apostrophe in a word


def _yaml_names(text: str) -> dict[int, str]:
    """number -> name, of `names` in a data.yaml: a list or a map, a line each or in brackets."""
    text = re.sub(rf"({QUOTED})|(?:^|(?<=\s))#.*", lambda match: match[1] or "", text, flags=re.M)
    start = re.search(r"^names\s*:", text, re.M)
    block = text[start.end() :] if start else ""
    in_brackets = re.match(rf"\s*[\[{{]((?:{QUOTED}|[^\]}}])*)[\]}}]", block)
    if in_brackets:
        items = re.findall(rf"\s*(?:(\d+)\s*:)?\s*({QUOTED}|[^,\s][^,]*)", in_brackets[1])
    else:
        items = []
        for line in block.splitlines()[1:]:
            if re.match(r"[^\s-]", line):
                break  # the next key
            items += re.findall(r"^\s*(?:-\s|['\"]?(\d+)['\"]?\s*:)\s*(.+)", line)
    names = {}
    for count, (number, name) in enumerate(items):
        name = name.strip()
        if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
            name = name[1:-1].replace("''", "'")
        names[int(number) if number else count] = name
    return names


def thin_out(marks: list[Mark], library: Library, notes: list[str]) -> list[Mark]:
    """Of marks at single frames, those of the first annotated frame in each every_sec, of each
    part: so that a video in two parts is still seen to be in both."""
    frames: dict[tuple[str, str], set[int]] = {}
    for mark in marks:
        if mark.frame >= 0:
            frames.setdefault((mark.video, mark.part), set()).add(mark.frame)
    taken: dict[tuple[str, str], set[int]] = {}
    for (video, part), there in frames.items():
        keyframes = library.keyframes(video)
        if keyframes is None:
            taken[video, part] = there
            continue
        first: dict[int, int] = {}
        for frame in sorted(there):
            first.setdefault(int(np.searchsorted(keyframes, frame, "right")), frame)
        taken[video, part] = set(first.values())
    count = sum(map(len, frames.values()))
    left = sum(map(len, taken.values()))
    if left < count:
        notes.append(
            f"{left} of {count} annotated frames are taken, the first of every "
            f"{library.every_sec:g} s (--every-sec 0: all)"
        )
    return [mark for mark in marks if mark.frame < 0 or mark.frame in taken[mark.video, mark.part]]


def read_class_folders(
    library: Library, given: Path | None, others: list[Source], notes: list[str]
) -> list[Mark]:
    """Clips in a folder per class; train/CLASS, val/CLASS or CLASS/train say the part as well.

    given: the folder of the classes, if it is not that of all videos; others: for the message.
    """
    said = "".join(f"{source.said}; " for source in others[:4])
    paths = {}
    for file in library.files:
        if given:  # not the file itself, which may be a link
            folder = (library.folder / file).parent.resolve()
        if given is None or folder.is_relative_to(given.resolve()):
            paths[file] = list(PurePosixPath(file.replace(os.sep, "/")).parts[:-1])
    if not paths:
        raise ValueError(f"{said}{given}: neither annotations nor videos of {library.folder}")
    while min(map(len, paths.values())) > 1:
        tops = {folders[0] for folders in paths.values()}
        if len(tops) > 1 or tops <= PART_WORDS.keys():
            break  # else all lie in one folder, as UCF-101/CLASS
        for folders in paths.values():
            folders.pop(0)
    part_level = -1
    for level in (0, 1):
        if all(len(f) > level and f[level].casefold() in PART_WORDS for f in paths.values()):
            part_level = level
            break
    marks = []
    for file, folders in paths.items():
        mark = Mark(str(library.folder / file), file)
        if part_level >= 0:
            mark.part = PART_WORDS[folders.pop(part_level).casefold()]
        if not folders:
            raise ValueError(
                f"{said}{library.folder}: neither annotations nor a folder per class: {file} is in "
                "none"
            )
        mark.label = folders[0]
        marks.append(mark)
    parts = {mark.part for mark in marks} - {""}
    if parts:
        notes.append(f"the folders {', '.join(sorted(parts))} are parts of the data, not classes")
    mixed = {mark.label for mark in marks} & PART_WORDS.keys()
    if mixed and part_level < 0:
        raise ValueError(
            f"{library.folder}: {', '.join(sorted(mixed))} beside others, classes or parts? "
            "Expected CLASS/*, or train/CLASS/* and val/CLASS/* alone"
        )
    return marks
