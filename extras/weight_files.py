"""Files of tensors, read without running anything that stands in them.

torch.save (.pt, .pth, .bin), .safetensors, .npz, and folders of save_pretrained, whole or in
shards. Whatever is wrong with a file is a ValueError of one sentence that begins with its path, or
a FileNotFoundError. To use this file alone, copy it: it needs torch and numpy.
"""

import argparse
import json
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

MAX_UNPACKED = 20  # times the file: weights hardly compress, what grows more than this is a bomb
MAX_HEADER = 100 << 20
FOLDER_FILES = (  # the last two: of a run of this project
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "best.pt", "last.pt",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
PROCESSOR_KEYS = ("image_mean", "image_std", "offset")  # the others repeat config.json's names
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.safetensors|\.bin)")
PLACEHOLDERS = {  # what stands where weights should: how the file begins, what it is
    b"version https://git-lfs": "a Git LFS pointer, the weights were not downloaded: git lfs pull",
    b"/annex/objects/": "a git-annex pointer, the weights were not downloaded: git annex get",
    b"<!doctype html": "a web page, not the file behind it",
    b"<html": "a web page, not the file behind it",
}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Ballast:
    """Stands for an object of somebody's training script. Nothing of the object's own runs."""

    def __init__(self, *state):
        pass

    def __setstate__(self, state):
        pass


def _join_path(*parts: str) -> str:
    return str(PurePosixPath(*map(str, parts)))


def _number(dtype: np.dtype, raw: bytes):
    return np.frombuffer(raw, dtype)[0]  # refuses objects, takes no memory beyond raw


def _harmless() -> list:
    """What training scripts save beside their weights, for torch.serialization.safe_globals: numpy
    numbers (learning rates of a schedule that is an array), paths and arguments. By name, since
    modules move between versions. A number is read from its bytes, a path becomes text; arrays,
    times and histories are replaced by Ballast."""
    core = ("numpy.core.multiarray", "numpy._core.multiarray")
    ballast = [f"{module}._reconstruct" for module in core]
    ballast += ["numpy.ndarray", "numpy._core.numeric._frombuffer", "types.SimpleNamespace"]
    ballast += [f"datetime.{name}" for name in ("datetime", "date", "timedelta")]
    ballast += ["mmengine.logging.history_buffer.HistoryBuffer"]
    allowed = [argparse.Namespace, np.dtype]
    allowed += {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSUMm"}
    allowed += [(_number, f"{module}.scalar") for module in core]
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        allowed += [(_join_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")]
    return allowed + [(Ballast, name) for name in ballast]


def read_torch(path: str | Path) -> dict:
    """The dict in a torch.save file: tensors, plain values, and what _harmless lists."""
    path = Path(path)
    check_file(path)
    try:
        if zipfile.is_zipfile(path):
            check_unpacked(path)
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        with open(path, "rb") as file:  # a text may begin with a letter that is an opcode
            packed = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04")
        if not name or not packed:
            raise ValueError(f"{path}: not a torch.save file of tensors") from None
        raise ValueError(
            f"{path}: refused: it holds {name[1]}, which could run code. Where you trust the file,"
            " load it there with weights_only=False and save its weights alone"
        ) from None
    except Exception as error:  # damaged files make torch.load raise nearly anything
        raise ValueError(f"{path}: not a readable torch.save file: {one_line(error)}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path}: a torch.save file of a {kind}, expected a dict")
    return content


def read_npz(path: Path) -> dict[str, Tensor]:
    """Every array of an .npz file, in float32."""
    check_file(path)
    try:
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name].astype(np.float32) for name in archive.files}
    except Exception as error:  # as above
        raise ValueError(f"{path}: not a readable .npz file: {one_line(error)}") from None
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """8 bytes of header length, a JSON header, and data that the tensors tile without gap or
    overlap (github.com/huggingface/safetensors, "Format")."""
    check_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        room = path.stat().st_size - 8 - length
        if not 0 < length <= MAX_HEADER or room < 0:
            raise ValueError(f"{path}: a header of {length} bytes in a file of {room + 8 + length}")
        header = parse_json(path, file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            start, stop = entry["data_offsets"]
            count = math.prod(shape)
            if (start, stop) != (end, end + count * dtype.itemsize) or stop > room:
                place = f"of {shape} lies at bytes {start} to {stop} of {room}"
                raise ValueError(f"{name!r} {place}, expected {end} on")
            raw = data[start:stop] or bytearray(dtype.itemsize)  # frombuffer takes no empty buffer
            tensors[name] = torch.frombuffer(raw, dtype=dtype)[:count].view(shape)
            end = stop
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors header: {one_line(error)}") from None
    if end != room:
        raise ValueError(f"{path}: its tensors end at byte {end} of {room} bytes of data")
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """float32 tensors in the format that read_safetensors reads."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().float().contiguous().numpy().tobytes())


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index of save_pretrained names, which lie beside it. An
    index among them is refused: it could name itself."""
    table = parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{index}: without a weight_map, which names the shards")
    tensors = {}
    for name in sorted(set(map(str, table.values()))):
        if Path(name).name != name or "\\" in name or name.endswith(".json"):
            raise ValueError(f"{index}: names the shard {name!r}, expected files beside it")
        reader = READERS.get(Path(name).suffix, read_torch)
        tensors |= reader(index.with_name(name))
    differing = sorted(tensors.keys() ^ table.keys())
    if differing:
        raise ValueError(f"{index}: does not name what its shards hold: {listed(differing)}")
    return tensors


READERS = {".safetensors": read_safetensors, ".npz": read_npz, ".json": read_shards}


def read(path: str | Path) -> tuple[Path, dict, dict]:
    """A file, or a folder of save_pretrained or of a run -> (file, content, settings). Settings are
    what the .json files say that save_pretrained writes beside the weights."""
    path = Path(path)
    if path.is_dir():
        here = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not here:
            shards = sorted(file.name for file in path.iterdir() if SHARD.fullmatch(file.name))
            if shards:
                raise ValueError(f"{path}: shards without their index: {listed(shards, 3)}")
            raise FileNotFoundError(f"{path}: a folder without {', '.join(FOLDER_FILES)}")
        path = here[0]
    shard = SHARD.fullmatch(path.name)
    if shard and path.is_file():
        index = f"{shard[1]}{shard[3]}.index.json"
        count = int(shard[2])
        raise ValueError(f"{path}: one of {count} shards; name the folder, or {index} in it")
    check_file(path)
    settings = {}
    if path.name in FOLDER_FILES:
        for name in PROCESSOR_FILES:
            table = json_beside(path, name)
            settings |= {key: table[key] for key in PROCESSOR_KEYS if key in table}
        settings |= json_beside(path, "config.json")
    return path, READERS.get(path.suffix, read_torch)(path), settings


def json_beside(path: Path, name: str) -> dict:
    """{} if there is none."""
    beside = path.with_name(name)
    if not beside.is_file():
        return {}
    check_file(beside)
    return parse_json(beside, beside.read_bytes())


def check_file(path: Path) -> None:
    """Raises if a file is not there, is empty, or only stands for another one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: does not exist")
    with open(path, "rb") as file:
        start = file.read(64).lower()
    if not start:
        raise ValueError(f"{path} is empty")
    for mark, what in PLACEHOLDERS.items():
        if start.startswith(mark):
            raise ValueError(f"{path} is {what}")


def check_unpacked(path: Path) -> None:
    """Raises if the directory of a zip (.npz, torch.save) promises more than the file can hold."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_UNPACKED * path.stat().st_size:
        raise ValueError(f"{path.stat().st_size} bytes would unpack to {unpacked}")


def parse_json(path: Path, text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: JSON of a {type(value).__name__}, expected an object")
    return value


def one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def listed(names: list, limit: int = 12) -> str:
    shown = []
    for name in names[:limit]:
        shown.append(str(name) if str(name).isprintable() else ascii(name))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown) + more
