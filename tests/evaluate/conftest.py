"""A small hand-made store and a tiny untrained model that fits it."""

import argparse
import functools
import json

import numpy as np
import pandas as pd
import pytest
import torch

from mpma_train.data.store import Store
from mpma_train.data.tokenizer import train_tokenizer
from mpma_train.models import MpmaConfig, MpmaForPreTraining, MpmaProcessor

SIDE = 64
SPLITS = {"train": 40, "validate": 16, "test": 20}  # images
# finding -> the corner it brightens and the sentence that reports it
FINDINGS = {
    "Edema": ((slice(0, 24), slice(0, 24)), "There is mild pulmonary edema."),
    "Fracture": ((slice(40, 64), slice(40, 64)), "An old rib fracture is seen."),
}
PLACES = ("left", "right", "upper", "lower", "middle")


def write_store(path, *, labelled=True):
    """Images whose corners are their findings; every fifth study has two images."""
    rng = np.random.default_rng(0)
    rows, images = [], []
    for split, count in SPLITS.items():
        for i in range(count):
            study = i - 1 if i % 5 == 1 else i  # images 0 and 1, 5 and 6 … share a study
            present = [name for bit, name in enumerate(FINDINGS) if study >> bit & 1]
            image = rng.integers(0, 60, (SIDE, SIDE), dtype=np.uint8)
            sentences = [f"Study of the {PLACES[study % 5]} zone number {study // 4}."]
            for name in present:
                corner, sentence = FINDINGS[name]
                image[corner] += 150
                sentences.append(sentence)
            row = {
                "image_id": f"{split}-{count - i:03d}",
                "study_id": f"{split}-s{study:03d}",
                "patient_id": f"{split}-p{study // 2}",
                "view": "PA",
                "split": split,
                "report": "No acute disease." if study in (8, 12) else " ".join(sentences),
            }
            for name in FINDINGS:
                row[f"label/{name}"] = np.float32(1 if name in present else 0)
            row["label/Pneumonia"] = np.float32(np.nan)
            rows.append(row)
            images.append(image)
    pairs = pd.DataFrame(rows)
    if not labelled:
        pairs = pairs.drop(columns=[c for c in pairs if c.startswith("label/")])
    path.mkdir()
    np.save(path / "images.npy", np.stack(images))
    pairs.to_parquet(path / "pairs.parquet")
    train_tokenizer(pairs["report"], 200).save(str(path / "tokenizer.json"))
    meta = {"format": 1, "side": SIDE, "image_mean": 0.2, "image_std": 0.2}
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def configure(store, **changes):
    tokenizer = store.tokenizer()
    settings = {
        "image_size": SIDE // 2,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "text_hidden_size": 32,
        "text_num_hidden_layers": 1,
        "text_num_attention_heads": 2,
        "text_intermediate_size": 64,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 128,
        "unk_token_id": tokenizer.unk_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "fusion_layers": 1,
        "memory_slots": 16,
        "memory_topk": 4,
        "projection_size": 16,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
    }
    return MpmaConfig(**(settings | changes))


def write_model(path, store, seed=0, **changes):
    config = configure(store, **changes)
    torch.manual_seed(seed)
    MpmaForPreTraining(config).save_pretrained(path)
    MpmaProcessor.from_store(store, config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def store_path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="session")
def unlabelled_path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "store", labelled=False)


@pytest.fixture(scope="session")
def store(store_path):
    return Store(store_path)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, store):
    return write_model(tmp_path_factory.mktemp("model"), store)


@pytest.fixture
def make_store():
    return write_store


@pytest.fixture(scope="session")
def tiny_config(store):
    return functools.partial(configure, store)


@pytest.fixture(scope="session")
def save_model(store):
    """save_model(path, seed=0, **settings) writes an untrained model for the small store."""

    def save(path, **changes):
        return write_model(path, store, **changes)

    return save


@pytest.fixture
def arguments(model_path, store_path):
    """What the command line gives to a task, with changes."""

    def make(**changes):
        values = {
            "model": str(model_path),
            "data": str(store_path),
            "split": "test",
            "seed": 0,
            "batch_size": 6,
            "score": None,
            "draws": 2,
        }
        return argparse.Namespace(**(values | changes))

    return make
