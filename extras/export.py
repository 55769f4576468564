"""export: the encoder and one head, for programs that have neither this project nor, often, torch.

    python cofinetune.py export runs/demo demo.onnx --task ava      ONNX, for onnxruntime and others
    python cofinetune.py export runs/demo demo.pt2 --task ava       torch.export: torch.export.load
    python cofinetune.py export runs/own folder                     a folder that transformers reads

The last holds a clip task's head, or of a box task the encoder alone. The first two hold the whole
way from decoded pixels to scores:

    video     uint8 (clips, T, H, W, 3), RGB: clips of a fixed size, frames --step-sec apart
    boxes     float32 (K, 4), box tasks only: x1, y1, x2, y2 in [0, 1] of the clip; K is free
    box_clip  int64 (K,), box tasks only: the clip of each box, from 0
    scores    float32 (clips, C), their sum 1, or (K, C), each in [0, 1]

and, as metadata, task, kind, classes (json) and step_sec, the seconds between frames. What is
written is run on random clips where that is possible (ONNX: pip install onnxruntime), beside the
model it was made of; the largest difference of a score is printed, above 1e-4 it is an error.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from extras import checkpoints

TOLERANCE = 1e-4  # rounding is a hundredth of it, and a tenth where logits are large


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__.partition(": ")[2]
    add = parser.add_argument
    add("checkpoint", help="a file, or a run's folder (its best.pt, else last.pt)")
    add("out", help="FILE.onnx, FILE.pt2, or a folder, for Hugging Face transformers")
    add("--task", help="whose head (default: the only task there is)")
    add("--clips", type=int, default=1, help="clips of a call (default: 1, at least 1)")
    add("--frames", type=int, help="of a clip (default: the task's)")
    add(
        "--size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"),
        help="of a frame (default: the task's square)",
    )  # fmt: skip
    add("--averaged", action="store_true", help="the weights that `ema` averaged, not the last")


def run(options: argparse.Namespace, overrides: dict[str, str], cofinetune) -> None:
    out = Path(options.out)
    if out.suffix not in (".onnx", ".pt2", ""):
        raise ValueError(f"{out}: expected FILE.onnx, FILE.pt2 or a folder's name")
    state = checkpoints.load(options.checkpoint)
    task = choose_task(checkpoints.recipe_of(state, cofinetune.Recipe), options)
    model = checkpoints.model_of(state, cofinetune.Recipe, options.averaged).eval()
    classes = state["classes"][task.name]
    if out.suffix == "":
        from extras import hugging_face

        name = hugging_face.to_hugging_face(model, task.name, out, classes)
        what = f"the encoder and the head of {task.name}"
        if task.kind == "box":
            what = "the encoder alone, since transformers has no box head (FILE.onnx keeps it)"
        print(f"{out}: {what}: transformers.{name}.from_pretrained('{out}')")
        return
    facts = {
        "task": task.name,
        "kind": task.kind,
        "classes": json.dumps(classes, ensure_ascii=False),
        "step_sec": repr(task.step_sec),
    }
    whole = Whole(model, task.name)
    inputs = example(options, task, boxes=3)
    out.parent.mkdir(parents=True, exist_ok=True)
    write = write_onnx if out.suffix == ".onnx" else write_pt2
    call = write(whole, inputs, out, facts)
    names = "video" if task.kind == "clip" else "video, boxes, box_clip"
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, task {task.name}: {names} -> scores, for video"
        f" {list(inputs['video'].shape)}, {task.step_sec:.4g} s between frames"
    )
    if call is None:
        print("not compared with the model: pip install onnxruntime")
        return
    print(f"compared with the model: differs by {largest_difference(whole, call, options, task)}")


def choose_task(recipe, options: argparse.Namespace) -> data.Task:
    """The task to export. ValueError for another one, and for a clip that cannot be."""
    tasks = {task.name: task for task in recipe.task}
    name = options.task
    if name is None and len(tasks) == 1:
        (name,) = tasks
    if name not in tasks:
        wrong = f"--task {name} is not" if name else "--task is needed:"
        raise ValueError(f"{wrong} one of {', '.join(tasks)}")
    asked = {"clips": [options.clips], "frames": [options.frames], "size": options.size or []}
    for option, numbers in asked.items():
        for number in numbers:
            if number is not None and number < 1:
                raise ValueError(f"--{option} {number}: expected 1 or more")
    if not Path(options.out).suffix and (options.clips > 1 or options.frames or options.size):
        raise ValueError("--clips, --frames and --size are of FILE.onnx and FILE.pt2")
    return tasks[name]


class Whole(nn.Module):
    """Pixels to scores: what is exported."""

    def __init__(self, model: nn.Module, task: str):
        super().__init__()
        self.encoder, self.head, self.scale = model.encoder, model.heads[task], model.scale

    def forward(
        self, video: Tensor, boxes: Tensor | None = None, box_clip: Tensor | None = None
    ) -> Tensor:
        pooled, tokens = self.encoder(data.normalise(video, *self.scale))
        logits = self.head(pooled, tokens, boxes, box_clip)
        return logits.softmax(1) if boxes is None else logits.sigmoid()


def example(options: argparse.Namespace, task: data.Task, boxes: int) -> dict[str, Tensor]:
    """Random inputs by name; so many boxes, over all clips."""
    rows, columns = options.size or (task.size, task.size)
    shape = (options.clips, options.frames or task.frames, rows, columns, 3)
    inputs = {"video": torch.randint(256, shape, dtype=torch.uint8)}
    if task.kind == "box":
        inputs["boxes"] = torch.rand(boxes, 2, 2).sort(1).values.flatten(1)
        inputs["box_clip"] = torch.arange(boxes) % options.clips
    return inputs


def dynamic_shapes(inputs: dict[str, Tensor]) -> dict[str, dict]:
    """The number of boxes is free, everything else is fixed."""
    boxes = torch.export.Dim("K", min=0)
    return {name: {} if name == "video" else {0: boxes} for name in inputs}


def write_pt2(whole: Whole, inputs: dict[str, Tensor], out: Path, facts: dict[str, str]):
    """Writes the file; -> what runs it."""
    program = torch.export.export(
        whole, (), kwargs=inputs, dynamic_shapes=dynamic_shapes(inputs), strict=False
    )
    torch.export.save(program, out, extra_files=facts)
    return torch.export.load(out).module()


def write_onnx(whole: Whole, inputs: dict[str, Tensor], out: Path, facts: dict[str, str]):
    """Writes the file; -> what runs it, None without onnxruntime."""
    try:
        import onnxscript  # noqa: F401, the import is the test
    except ImportError:
        raise ValueError(
            "to write ONNX: pip install onnx onnxscript (onnxruntime runs it)"
        ) from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            whole, (), kwargs=inputs, dynamo=True, verbose=False, output_names=["scores"],
            dynamic_shapes=dynamic_shapes(inputs),
        )  # fmt: skip
    program.model.metadata_props.update(facts)
    program.save(out)
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])

    def call(**inputs: Tensor) -> Tensor:
        arrays = {name: x.numpy() for name, x in inputs.items()}
        return torch.from_numpy(session.run(["scores"], arrays)[0])

    return call


@torch.no_grad()
def largest_difference(whole: Whole, call, options: argparse.Namespace, task: data.Task) -> str:
    """Of the scores, between the model and its export, for several numbers of boxes. ValueError if
    it is more than rounding."""
    worst = 0.0
    for boxes in (1, 2, 7):
        inputs = example(options, task, boxes)
        worst = max(worst, (whole(**inputs) - call(**inputs)).abs().max().item())
    if not worst <= TOLERANCE:
        raise ValueError(f"the export differs from the model by {worst:.1e}: do not use it")
    return f"{worst:.1e}"
