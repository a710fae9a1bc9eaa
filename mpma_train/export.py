"""`mpma export`: the encoders of a trained model for plain transformers and timm."""

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoTokenizer, BertModel, ViTConfig, ViTModel

from mpma_train.model_card import write_export_card
from mpma_train.models import MpmaConfig, MpmaForPreTraining
from mpma_train.output_paths import require_empty
from mpma_train.weights.files import read_normalisation
from mpma_train.weights.load import load_model
from mpma_train.weights.names import timm_names

# With every size named, any entry of timm's plain family serves.
_TIMM_MODEL = "vit_base_patch16_224"
_TIMM_EPS = 1e-6
_TIMM_CODE = """\
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

folder = Path("DIR")
recipe = json.loads((folder / "timm.json").read_text())
model = timm.create_model(recipe["model"], **recipe["kwargs"])
model.load_state_dict(load_file(folder / "model.safetensors"))
for module in model.modules():
    if isinstance(module, torch.nn.LayerNorm):
        module.eps = recipe.get("layer_norm_eps", module.eps)"""
_TRANSFORMERS_CODE = """\
from transformers import {0}

model = {0}.from_pretrained("DIR", add_pooling_layer=False)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mpma export`."""
    parser.add_argument(
        "--to",
        required=True,
        choices=sorted(_WRITERS),
        help="transformers-vit and timm: the image encoder; transformers-bert: the text encoder",
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="MPMA model directory"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new or empty directory"
    )


def run(args: argparse.Namespace) -> int:
    """Write one encoder.

    Raises:
        FileNotFoundError: there is no model.
        OSError: the output directory holds something, or nothing can be written there.
        ValueError: the directory holds no MPMA model or weights that do not fit it, or the model
            has an encoder that the other library has no name for.
    """
    require_empty("out", args.out)
    model = load_model(args.model)
    print(_WRITERS[args.to](model, args.model, args.out))
    return 0


def _write_vit(model: MpmaForPreTraining, source: Path, out: Path) -> str:
    config = model.config
    if config.image_encoder != "vit":
        raise ValueError(
            f"to: the image encoder is {config.image_encoder}, which transformers has no name for; "
            "use --to timm"
        )
    vit = ViTModel(
        ViTConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
        ),
        add_pooling_layer=False,
    )
    # Both are of transformers, under the same names.
    vit.load_state_dict(model.model.image_encoder.state_dict())
    vit.save_pretrained(out)
    if normalisation := read_normalisation(source):
        preprocessing = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": config.image_size, "width": config.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": normalisation.mean,
            "image_std": normalisation.std,
        }
        _write_json(out / "preprocessor_config.json", preprocessing)
    _write_image_card(config, source, out, "transformers", _TRANSFORMERS_CODE.format("ViTModel"))
    return (
        f"{out}: ViTModel.from_pretrained({str(out)!r}, add_pooling_layer=False) gives the states "
        f"of the image encoder; pooling here is {_pooling(config)}"
    )


def _write_timm(model: MpmaForPreTraining, source: Path, out: Path) -> str:
    config, encoder = model.config, model.model.image_encoder
    kwargs = {"num_classes": 0, "img_size": config.image_size, "in_chans": config.num_channels}
    # As MPMA pools: after the last norm, not before it.
    kwargs |= {"global_pool": "avg" if config.pooling == "mean" else "token", "fc_norm": False}
    recipe = {"model": config.image_encoder.removeprefix("timm/"), "kwargs": kwargs}
    if config.image_encoder == "vit":
        if config.hidden_act != "gelu":
            raise ValueError(f"timm: expected hidden_act gelu, got {config.hidden_act!r}")
        state = timm_names(encoder.state_dict())
        recipe["model"] = _TIMM_MODEL
        kwargs |= {
            "patch_size": config.patch_size,
            "embed_dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "mlp_ratio": config.intermediate_size / config.hidden_size,
        }
        if config.layer_norm_eps != _TIMM_EPS:
            # timm's settings have no place for it.
            recipe["layer_norm_eps"] = config.layer_norm_eps
    else:
        state = encoder.vit.state_dict()
    if normalisation := read_normalisation(source):
        recipe["image_mean"], recipe["image_std"] = normalisation.mean, normalisation.std
    out.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in state.items()}, out / "model.safetensors")
    _write_json(out / "timm.json", recipe)
    _write_image_card(config, source, out, "timm", _TIMM_CODE)
    return (
        f"{out}: model.safetensors for timm.create_model(recipe['model'], **recipe['kwargs']) with "
        f"the recipe in timm.json; pooling is {_pooling(config)}"
    )


def _write_bert(model: MpmaForPreTraining, source: Path, out: Path) -> str:
    bert = BertModel(model.config.bert_config(), add_pooling_layer=False)
    bert.load_state_dict(model.model.text_encoder.bert.state_dict())
    bert.save_pretrained(out)
    if (source / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    mean = model.config.text_pooling == "mean"
    whole = "the mean of the tokens, [CLS] and [SEP] among them" if mean else "[CLS]"
    length = model.config.max_position_embeddings
    facts = {
        "Input": f"ids of at most {length} tokens, of the tokenizer that MPMA was trained with",
        "Pooling": f"{whole}, of the last states",
    }
    code = _TRANSFORMERS_CODE.format("BertModel")
    write_export_card(out, source, library="transformers", encoder="text", facts=facts, code=code)
    return (
        f"{out}: BertModel.from_pretrained({str(out)!r}, add_pooling_layer=False) gives the states "
        f"of the text encoder; pooling here is {whole}"
    )


def _write_image_card(config: MpmaConfig, source: Path, out: Path, library: str, code: str) -> None:
    shape = f"(B, {config.num_channels}, {config.image_size}, {config.image_size})"
    known = read_normalisation(source)
    scaled = f"of mean {known.mean} and deviation {known.std}" if known else "unknown here"
    facts = {
        "Input": f"{shape}, values in [0, 1] normalised; the normalisation is {scaled}",
        "Pooling": f"{_pooling(config)}, after the last norm",
    }
    write_export_card(out, source, library=library, encoder="image", facts=facts, code=code)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _pooling(config: MpmaConfig) -> str:
    return "the mean of the patches" if config.pooling == "mean" else "the class token"


_WRITERS = {"transformers-vit": _write_vit, "timm": _write_timm, "transformers-bert": _write_bert}
