"""Every preset, read from its file, takes a step of its optimiser at its true size."""

from pathlib import Path

import pytest
import torch

import mpma_train
from mpma_train.models import MpmaConfig, MpmaForPreTraining
from mpma_train.models.parameters import get_parameter_groups
from mpma_train.settings import parse_settings

PRESETS = sorted(path.stem for path in Path(mpma_train.__file__).parent.glob("configs/*.yaml"))
PARTS = {
    "tiny": {"image", "report", "global", "local"},
    "mpma_base": {"image", "report", "global", "local"},
    "mrm": {"image", "report"},
}
# A key's bias moves all scores of a query alike: only rounding and weight decay reach it.
NO_EFFECT = ("key.bias", "k_proj.bias")


def make_inputs(config, batch=2):
    """Images as the store holds them, and reports of different lengths."""
    generator = torch.Generator().manual_seed(0)
    side = config.target_size
    ids = torch.randint(200, config.vocab_size, (batch, 40), generator=generator)
    ids[1, 25:] = config.pad_token_id
    return {
        "pixel_values": torch.randn(batch, 1, side, side, generator=generator),
        "input_ids": ids,
        "mask_seed": torch.arange(batch),
    }


def test_every_preset_is_tested():
    assert set(PRESETS) == set(PARTS)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_step_at_true_size(preset):
    settings = parse_settings([preset])
    # The first step of a warmup has a learning rate of zero, so the peak's is taken.
    args = settings.training
    torch.manual_seed(args["seed"])
    model = MpmaForPreTraining(MpmaConfig(**settings.model)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = get_parameter_groups(model, args["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=args["learning_rate"])

    output = model(**make_inputs(model.config))
    found = {name.removeprefix("loss_") for name in output if name.startswith("loss_")}
    assert found == PARTS[preset]
    assert torch.isfinite(output.loss)
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args["max_grad_norm"])
    assert torch.isfinite(norm)
    optimizer.step()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert torch.isfinite(parameter).all(), name
        if not name.endswith(NO_EFFECT):
            assert changed == parameter.requires_grad, name


def test_mpma_base_states_how_it_pools():
    stated = parse_settings(["mpma_base"]).model
    assert (stated["pooling"], stated["text_pooling"]) == ("mean", "cls")
