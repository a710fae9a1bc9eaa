import pytest
import torch
from small_model import CLS, NO_DROPOUT, SEP, build, make_batch

import mpma_ext

PARTS = ("image", "report", "global", "local")
# A key's bias moves all scores of a query alike, so that nothing depends on it but rounding.
NO_EFFECT = ("key.bias", "k_proj.bias")

SETTINGS = [
    {},
    {"fusion": "kv_concat"},
    {"fusion": "cross_attention"},
    {"fusion": "gap_add"},
    {"fusion_layers": 0},
    {"memory_topk": 1000},
    {"text_hidden_size": 32, "text_num_attention_heads": 2},
    {"local_alignment": "max"},
    {"local_alignment": "none"},
    {"local_aggregation": "sum"},
    {"global_alignment": False},
    {"global_alignment": False, "local_alignment": "none"},
    {"alignment_view": "full"},
    {"false_negatives": "none"},
    {"pooling": "cls"},
    {"text_pooling": "mean"},
    {"mlm_loss_on": "all"},
    {"image_mask_ratio": 0.0},
    {"text_mask_ratio": 0.0},
    {"image_loss_weight": 0.0, "local_loss_weight": 0.0},
    {"report_loss_weight": 0.0, "global_loss_weight": 0.0},
    {"target_scale": 1},
    {"target_scale": 3},
]


def expected_parts(config):
    flags = (config.image_active, config.report_active, config.global_active, config.local_active)
    return {part for part, flag in zip(PARTS, flags, strict=True) if flag}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_setting_trains_every_parameter(settings):
    model = build(**settings).train()
    output = model(**make_batch(scale=settings.get("target_scale", 2)))
    parts = {part: getattr(output, f"loss_{part}") for part in PARTS}
    assert {part for part, loss in parts.items() if loss is not None} == expected_parts(
        model.config
    )
    present = [loss for loss in parts.values() if loss is not None]
    assert all(torch.isfinite(loss) and loss > 0 for loss in present)
    torch.testing.assert_close(output.loss.detach(), sum(present))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert "position" in name
            continue
        unused = not model.config.report_active and "model.fusion." in name
        assert (parameter.grad is None) == unused, name
        if not unused and not name.endswith(NO_EFFECT):
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_the_loss_falls():
    # At this width 0.02 makes all reports alike at first; 0.1 gives BERT-base's gain.
    model = build(**NO_DROPOUT, initializer_range=0.1, text_initializer_range=0.1).train()
    batch = make_batch((9, 14, 5, 11, 20, 17, 6, 8))
    # Noise cannot be reconstructed; smooth images can.
    coarse = torch.nn.functional.adaptive_avg_pool2d(8 * batch["pixel_values"], 4)
    batch["pixel_values"] = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = model(**batch)
        losses.append({part: output[f"loss_{part}"].item() for part in PARTS})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    for part in PARTS:
        assert losses[-1][part] < 0.9 * losses[0][part], part


@pytest.mark.parametrize("local_alignment", ["softmax", "max"])
@torch.no_grad()
def test_permuting_the_batch_permutes_its_losses(batch, local_alignment):
    model = build(local_alignment=local_alignment).eval()
    order = torch.tensor([2, 0, 3, 1])
    first = model(**batch)
    second = model(**{name: value[order] for name, value in batch.items()})
    # Sums of float32 over the batch run in another order.
    close = {"rtol": 1e-5, "atol": 1e-6}
    for name in ("image_loss_per_sample", "report_loss_per_sample"):
        torch.testing.assert_close(second[name], first[name][order], **close)
    for part in PARTS:
        torch.testing.assert_close(second[f"loss_{part}"], first[f"loss_{part}"], **close)


@torch.no_grad()
def test_mask_seed_decides_and_the_default_generator_does_without(model, batch):
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    other = model(**(batch | {"mask_seed": batch["mask_seed"] + 1}))
    assert (other.image_loss_per_sample != model(**batch).image_loss_per_sample).all()
    free = batch | {"mask_seed": None}
    torch.manual_seed(1)
    first, second = model(**free).loss, model(**free).loss
    torch.manual_seed(1)
    assert torch.equal(model(**free).loss, first) and not torch.equal(first, second)


@torch.no_grad()
def test_report_loss_is_the_mean_over_masked_tokens_of_the_batch(model, batch):
    output = model(**batch)
    # Seen from outside: per-report means weighted with their number of masked tokens.
    from mpma_train.models.masking import draw_masks

    _, words = model.model.complete_text(
        batch["input_ids"], batch["attention_mask"], batch["word_ids"]
    )
    counts = draw_masks(words, 16, 12, 0.5, batch["mask_seed"]).masked_tokens.sum(1)
    expected = (output.report_loss_per_sample * counts).sum() / counts.sum()
    torch.testing.assert_close(output.loss_report, expected)
    torch.testing.assert_close(output.loss_image, output.image_loss_per_sample.mean())


@torch.no_grad()
def test_mlm_loss_on_all_counts_every_real_token(batch):
    masked, every = build().eval(), build(mlm_loss_on="all").eval()
    found = every(**batch)
    longer = {name: batch[name] for name in ("input_ids", "attention_mask", "word_ids")}
    longer = {
        name: torch.nn.functional.pad(value, (0, 6), value=-1 if name == "word_ids" else 0)
        for name, value in longer.items()
    }
    padded = every(**(batch | longer))
    torch.testing.assert_close(found.loss_report, padded.loss_report)
    counts = batch["attention_mask"].sum(1)
    expected = (found.report_loss_per_sample * counts).sum() / counts.sum()
    torch.testing.assert_close(found.loss_report, expected)
    assert not torch.equal(found.loss_report, masked(**batch).loss_report)


@torch.no_grad()
def test_reports_without_words_cost_nothing(model):
    batch = make_batch((5, 9, 4, 2))
    batch["word_ids"][3] = -1
    output = model(**batch)
    assert output.report_loss_per_sample[3] == 0 and torch.isfinite(output.loss)
    nothing = batch | {"word_ids": torch.full_like(batch["word_ids"], -1)}
    output = model(**nothing)
    assert output.loss_report == 0 and torch.isfinite(output.loss)


@torch.no_grad()
def test_identical_reports_are_recognised(batch):
    model = build(report_loss_weight=0.0, image_loss_weight=0.0).eval()
    same = batch | {"report_ids": torch.tensor([1, 2, 1, 3])}
    apart = batch | {"report_ids": None}
    assert not torch.equal(model(**same).loss_global, model(**batch).loss_global)
    assert torch.equal(model(**apart).loss_global, model(**batch).loss_global)
    for name in ("input_ids", "attention_mask", "word_ids"):
        apart[name] = batch[name][[0, 1, 0, 3]]
        same[name] = batch[name][[0, 1, 0, 3]]
    assert torch.equal(model(**apart).loss_global, model(**same).loss_global)


@torch.no_grad()
def test_without_word_ids_every_token_that_is_not_special_is_a_word(model, batch):
    ids = batch["input_ids"]
    words = torch.arange(ids.shape[1]).expand_as(ids).clone()
    words[(ids == CLS) | (ids == SEP) | (ids == 0)] = -1
    output = model(**(batch | {"word_ids": words}))
    assert torch.equal(model(**(batch | {"word_ids": None})).loss, output.loss)
    assert torch.equal(
        model(**(batch | {"word_ids": None, "attention_mask": None})).loss, output.loss
    )


@torch.no_grad()
def test_output_as_a_tuple(model, batch):
    output = model(**batch)
    plain = model(**batch, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(output)
    assert torch.equal(plain[0], output.loss)


def losses_and_gradient(batch, dtype=torch.float32, autocast=False):
    """The four losses and all gradients in a row, both in float64."""
    model = build(**NO_DROPOUT).train().to(dtype)
    pixels = {"pixel_values": batch["pixel_values"].to(dtype)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(**(batch | pixels))
    assert output.loss.dtype == dtype
    output.loss.backward()
    losses = torch.stack([output[f"loss_{part}"] for part in PARTS]).double()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.requires_grad]
    return losses, torch.cat(gradients)


def test_bfloat16_autocast_is_as_near_as_the_definition_under_it(batch):
    """The rule for kernels: twice the error of plain PyTorch, three times for gradients."""
    exact = losses_and_gradient(batch, torch.float64)
    ours = losses_and_gradient(batch, autocast=True)
    with mpma_ext.use_backend("reference"):
        plain = losses_and_gradient(batch, autocast=True)
    linear = sum(isinstance(module, torch.nn.Linear) for module in build().modules())
    for found, definition, expected, factor in zip(ours, plain, exact, (2, 3), strict=True):
        error, allowed = ((x - expected).norm() / expected.norm() for x in (found, definition))
        assert 0 < error <= factor * allowed
        # Eight bits: 2**-9 a rounding, one a linear layer forward and one backward.
        assert error < linear * 2 * 2**-9


def test_gradient_checkpointing_changes_nothing(batch):
    plain, saving = build(**NO_DROPOUT).train(), build(**NO_DROPOUT).train()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        model(**batch).loss.backward()
    for (name, first), second in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if first.requires_grad and not name.endswith(NO_EFFECT):
            torch.testing.assert_close(second.grad, first.grad, msg=name)
