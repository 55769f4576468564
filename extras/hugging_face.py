"""A trained model as a folder that transformers reads."""

import json
from pathlib import Path

from torch import Tensor

from extras.weight_files import write_safetensors
from model import CoFinetuneModel, ModelConfig

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
) -> str:
    """Writes config.json, preprocessor_config.json and model.safetensors as save_pretrained does;
    -> the class of transformers that reads them. ValueError for a model that none has.

    Of a clip task: VivitForVideoClassification or VideoMAEForVideoClassification, with its head. A
    box head none has: the encoder alone, as VivitModel or VideoMAEModel, whose last_hidden_state
    are the tokens that the box heads pool (ViViT: behind the class token).
    """
    config, head = model.encoder.config, model.heads[task].config
    alone, videomae = head.kind == "box", config.pos == "sincos"
    own = {name.split(".")[0] for name in model.encoder.state_dict()} - NAMES.keys() - {"blocks"}
    if own:
        raise ValueError(f"transformers has no encoder with {', '.join(sorted(own))} (SpotTune)")
    check_fits(config, alone, videomae)
    kind = "VideoMAE" if videomae else "Vivit"
    name = f"{kind}Model" if alone else f"{kind}ForVideoClassification"
    table = dict(
        architectures=[name],
        model_type=kind.lower(),
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
        tubelet_size=config.tubelet[0] if videomae else list(config.tubelet),
        patch_size=config.tubelet[1],
        qkv_bias=True,
        use_mean_pooling=not alone,  # VideoMAE: then its norm is the head's
    )
    tensors = encoder_tensors(model, "" if alone else f"{kind.lower()}.", videomae)
    if not alone:
        classes = classes or [f"LABEL_{i}" for i in range(head.classes)]
        table["id2label"] = {str(i): label for i, label in enumerate(classes)}
        table["label2id"] = {label: i for i, label in enumerate(classes)}
        for part, tensor in model.heads[task].fc.named_parameters():
            tensors[f"classifier.{part}"] = tensor
        if videomae:  # whose final norm is the head's
            for part in ("weight", "bias"):
                tensors[f"fc_norm.{part}"] = tensors.pop(f"videomae.layernorm.{part}")
    mean, std = model.scale
    processor = dict(
        image_processor_type=f"{kind}ImageProcessor",
        do_rescale=True,
        rescale_factor=1 / 255,
        offset=False,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
        size={"shortest_edge": config.size[0]},
        crop_size={"height": config.size[0], "width": config.size[1]},
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(table, indent=2), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    write_safetensors(folder / "model.safetensors", tensors)
    return name


def check_fits(config: ModelConfig, alone: bool, videomae: bool) -> None:
    """ValueError for a network that is neither; alone: without a head, so pooled in any way."""
    if not config.mean:
        raise ValueError(
            "the model standardises each clip by its own mean and deviation (mean = []), which no"
            " processor of transformers does: FILE.onnx and FILE.pt2 keep it"
        )
    square = config.size[0] == config.size[1] and config.tubelet[1] == config.tubelet[2]
    if videomae:
        same = config.gelu == "none" and (alone or config.pool == "mean-norm")
    else:
        same = config.cls and config.pos != "rope" and (alone or config.pool == "cls")
    one_eps = config.eps == config.final_eps or videomae and not alone  # whose fc_norm has 1e-5
    if not (square and same and one_eps):
        raise ValueError(
            "transformers has this network as ViViT (class token, learned positions) or VideoMAE"
            " (sincos positions, pool mean-norm, gelu none), of square clips; this is neither:"
            f" cls {config.cls}, pos {config.pos}, pool {config.pool}, gelu {config.gelu},"
            f" size {config.size}, tubelet {config.tubelet}"
        )


def encoder_tensors(model: CoFinetuneModel, stem: str, videomae: bool) -> dict[str, Tensor]:
    """By the hub's names. VideoMAE has no bias of keys: it adds one number to all products of a
    query, which softmax does not see."""
    tensors = {}
    for name, tensor in model.encoder.state_dict().items():
        place, words = stem, name.split(".")
        if words[0] == "blocks":
            place, words = f"{stem}encoder.layer.{words[1]}.", words[2:]
        layer, *kind = words  # cls and pos have no kind
        if layer != "qkv":
            tensors[".".join([place + NAMES[layer], *kind])] = tensor
            continue
        for part, rows in zip(QKV, tensor.chunk(3), strict=True):
            if kind == ["weight"] or not videomae:
                tensors[f"{place}attention.attention.{part}.{kind[0]}"] = rows
            elif part != "key":
                tensors[f"{place}attention.attention.{part[0]}_bias"] = rows
    return tensors
