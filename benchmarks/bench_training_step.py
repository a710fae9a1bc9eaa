"""One optimiser step of the whole model, with compiled operators and with their definitions."""

import torch

import mpma_ext
from benchmarks.lengths import prefix_mask, report_lengths
from benchmarks.problem import assert_same
from benchmarks.shapes import Step
from mpma_train.models import MpmaConfig, MpmaForPreTraining
from mpma_train.settings import parse_settings


def bench_training_step(case, backend, device, contest):
    """Forward, backward and AdamW in float32; the data is there already, evaluation is not in it.

    The baseline is `mpma_ext.use_backend(case.baseline)` on the same model.
    """
    config, max_length = _preset(case.shape)
    torch.manual_seed(0)
    model = MpmaForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = _batch(config, case.shape.batch, max_length, device)

    def loss(name):
        with mpma_ext.use_backend(name):
            return model(**batch).loss

    def step(name):
        def run():
            with mpma_ext.use_backend(name):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    losses = []
    for name in (backend, case.baseline):
        torch.manual_seed(0)  # the same dropout for both
        losses.append(loss(name).detach())
    assert_same(losses[:1], losses[1:], case.dtype)
    contest(step(backend), step(case.baseline))


def _preset(shape: Step) -> tuple[MpmaConfig, int]:
    """Configuration and greatest report length in tokens of a preset."""
    settings = parse_settings([shape.preset])
    model = settings.model | {"vocab_size": shape.vocabulary}
    return MpmaConfig(**model), settings.data.max_length


def _batch(config: MpmaConfig, count: int, max_length: int, device: str) -> dict:
    """Random images, and reports of real lengths with [CLS] and [SEP]."""
    lengths = torch.tensor(report_lengths(count)).clamp(3, max_length)
    mask = prefix_mask(lengths, int(lengths.max()))
    special = max(config.unmaskable_token_ids)
    ids = torch.randint(special + 1, config.vocab_size, mask.shape)
    ids[:, 0] = config.cls_token_id
    ids[torch.arange(count), lengths - 1] = config.sep_token_id
    batch = {
        "pixel_values": torch.randn(
            count, config.num_channels, config.target_size, config.target_size
        ),
        "input_ids": ids.masked_fill(~mask, config.pad_token_id),
        "attention_mask": mask.long(),
        "mask_seed": torch.arange(count),
        "report_ids": torch.arange(count),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
