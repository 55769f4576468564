"""A trained model as a folder that transformers reads."""

import json
from pathlib import Path

from torch import Tensor

from extras.weight_files import write_safetensors
from model import CoFinetuneModel

NAMES = {  # our name: the hub's, of ViViT and of VideoMAE
    "patch": "embeddings.patch_embeddings.projection",
    "cls": "embeddings.cls_token",
    "pos": "embeddings.position_embeddings",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm": "layernorm",
}
QKV = ("query", "key", "value")


def to_hugging_face(
    model: CoFinetuneModel, task: str, folder: str | Path, classes: list[str] | None = None
) -> None:
    """Writes the encoder and the head of a clip task as save_pretrained does: config.json,
    preprocessor_config.json and model.safetensors, which transformers reads as its ViViT or
    VideoMAE for video classification. ValueError for a model that is neither.

    A bias of keys adds one number to all products of a query, which softmax does not see: VideoMAE
    has none, so it is not written. VideoMAE's last norm has eps 1e-5 there.
    """
    config, head = model.encoder.config, model.heads[task].head
    vivit = config.cls and config.pool == "cls" and config.pos.startswith("learned")
    videomae = config.pos == "sincos" and config.pool == "mean-norm" and config.gelu == "none"
    square = config.size[0] == config.size[1] and config.tubelet[1] == config.tubelet[2]
    if head.kind != "clip":
        raise ValueError(f"task {task}: transformers has no box head; name a clip task")
    if not (vivit or videomae) or not square or vivit and config.eps != config.final_eps:
        raise ValueError(
            "transformers has this network as ViViT (class token, learned positions) or VideoMAE"
            " (sincos positions, pool mean-norm, gelu none), of square clips; this is neither:"
            f" cls {config.cls}, pos {config.pos}, pool {config.pool}, gelu {config.gelu},"
            f" size {config.size}, tubelet {config.tubelet}"
        )
    classes = classes or [f"LABEL_{i}" for i in range(head.classes)]
    mean, std = model.scale
    tubelet = config.tubelet
    table = dict(
        architectures=[f"{'Vivit' if vivit else 'VideoMAE'}ForVideoClassification"],
        model_type="vivit" if vivit else "videomae",
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=len(model.encoder.blocks[0].fc1.weight),
        hidden_act="gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",
        layer_norm_eps=config.eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=config.size[0],
        num_frames=config.frames,
        tubelet_size=list(tubelet) if vivit else tubelet[0],
        patch_size=tubelet[1],
        qkv_bias=True,
        use_mean_pooling=True,
        id2label={str(i): name for i, name in enumerate(classes)},
        label2id={name: i for i, name in enumerate(classes)},
    )
    processor = dict(
        image_processor_type="VivitImageProcessor" if vivit else "VideoMAEImageProcessor",
        do_rescale=True,
        rescale_factor=1 / 255,
        offset=False,
        do_normalize=bool(mean),
        image_mean=list(mean),
        image_std=list(std),
        size={"shortest_edge": config.size[0]},
        crop_size={"height": config.size[0], "width": config.size[1]},
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(table, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    write_safetensors(folder / "model.safetensors", hub_tensors(model, task, vivit))


def hub_tensors(model: CoFinetuneModel, task: str, vivit: bool) -> dict[str, Tensor]:
    """The tensors of to_hugging_face by the hub's names."""
    stem = "vivit." if vivit else "videomae."
    tensors = {}
    for kind in ("weight", "bias"):
        tensors[f"classifier.{kind}"] = getattr(model.heads[task].fc, kind)
    for name, tensor in model.encoder.state_dict().items():
        layer, place = name.split("."), stem
        if layer[0] == "blocks":
            place, layer = f"{stem}encoder.layer.{layer[1]}.", layer[2:]
        if layer[0] == "norm" and not vivit:
            tensors[f"fc_norm.{layer[1]}"] = tensor
        elif layer[0] == "qkv":
            for part, rows in zip(QKV, tensor.chunk(3), strict=True):
                if vivit or layer[1] == "weight":
                    tensors[f"{place}attention.attention.{part}.{layer[1]}"] = rows
                elif part != "key":
                    tensors[f"{place}attention.attention.{part[0]}_bias"] = rows
        else:
            tensors[".".join([place + NAMES[layer[0]], *layer[1:]])] = tensor
    return tensors
