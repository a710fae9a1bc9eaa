"""What the tests of training share: a small store and model, runs in processes of their own."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import torch

from mpma_train.data.tokenizer import train_tokenizer

SIDE = 32
STUDIES = 64
FINDINGS = ("effusion", "opacity", "nodule", "pneumothorax", "device", "edema")
SIDES = ("left", "right")


def write_store(path, *, side=SIDE, studies=STUDIES, extra_images=8, vocab_size=200):
    """A store of `studies` training studies, some with two images, and 16 validation studies."""
    rng = np.random.default_rng(0)
    path.mkdir()
    rows = []
    for number in range(studies + 16):
        finding, where = FINDINGS[number % len(FINDINGS)], SIDES[number // 6 % 2]
        report = f"There is {where} {finding} number {number}. Heart is normal. No fracture ___."
        for image in range(2 if number < extra_images else 1):
            rows.append(
                {
                    "image_id": f"i{number:03}-{image}",
                    "study_id": f"s{number:03}",
                    "patient_id": f"p{number:03}",
                    "view": "PA",
                    "split": "train" if number < studies else "validate",
                    "report": report,
                    "label/Edema": np.float32(finding == "edema"),
                }
            )
    pairs = pd.DataFrame(rows)
    np.save(path / "images.npy", rng.integers(0, 256, (len(rows), side, side), dtype=np.uint8))
    pairs.to_parquet(path / "pairs.parquet", index=False)
    tokenizer = train_tokenizer(pairs["report"], vocab_size)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    meta = {
        "format": 1,
        "source": "made by hand",
        "side": side,
        "image_mean": 0.5,
        "image_std": 0.29,
        "hashes": {"split": "0123abcd"},
        "data_use": None,
    }
    (path / "meta.json").write_text(json.dumps(meta))
    return path


# As small as every part of the model can be: one layer each, 16 patches.
SETTINGS = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "text_hidden_size": 32,
    "text_num_hidden_layers": 1,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 64,
    "max_position_embeddings": 64,
    "image_mask_ratio": 0.5,
    "fusion_layers": 1,
    "memory_slots": 16,
    "memory_topk": 4,
    "projection_size": 16,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "max_length": 48,
    "shuffle_sentences": True,
    "augment": True,
    "max_steps": 4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
}


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pretrain_in_child(argv, kill_at=None):
    """Run `mpma pretrain` in a fresh process; returns its exit code.

    `kill_at`, an event of transformers' callbacks and a step, is where it kills itself.
    """
    # A forkserver imports torch and transformers once for all runs, and nothing of this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mpma_train.pretrain"])
    child = context.Process(target=_pretrain, args=(argv, kill_at))
    child.start()
    child.join()
    return child.exitcode


def _pretrain(argv, kill_at):
    from transformers import TrainerCallback

    from mpma_train import cli, pretrain
    from mpma_train.trainer import MpmaTrainer

    torch.set_num_threads(1)
    # A child takes over how it was started, and would start a forkserver for its data workers.
    multiprocessing.set_start_method("fork", force=True)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if ("on_step_end", state.global_step) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def on_epoch_end(self, args, state, control, **kwargs):
            if ("on_epoch_end", state.global_step) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    class Killed(MpmaTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(Kill())

    pretrain.MpmaTrainer = Killed
    raise SystemExit(cli.main(["pretrain", *argv]))
