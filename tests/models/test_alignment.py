import math

import pytest
import torch
import torch.nn.functional as F
from small_model import build, make_batch

import mpma_ext
from mpma_train.models import MpmaConfig
from mpma_train.models.alignment import (
    GlobalLocalAlignment,
    local_loss,
    local_similarity,
    report_identities,
)


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def real(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def temperature(value=0.07):
    alignment = GlobalLocalAlignment(MpmaConfig())
    with torch.no_grad():
        alignment.logit_scale.fill_(math.log(1 / value))
    return alignment


def test_global_loss_is_the_symmetric_info_nce():
    image, text = (F.normalize(vectors(5, 8, seed=s), dim=-1) for s in (1, 2))
    logits = image @ text.T / 0.07
    diagonal = torch.arange(5)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    found = temperature().global_loss(image, text, torch.arange(5))
    torch.testing.assert_close(found, expected)


def test_identical_reports_are_positives_of_each_other():
    image = F.normalize(vectors(3, 8), dim=-1)
    text = F.normalize(vectors(3, 8, seed=3), dim=-1)
    logits = image @ text.T / 0.07
    shares = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    both = [-(shares * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T)]
    found = temperature().global_loss(image, text, torch.tensor([4, 9, 4]))
    torch.testing.assert_close(found, sum(both) / 2)


def test_scale_is_clamped_at_100_and_can_come_back():
    alignment = temperature(1e-4)
    scale = alignment.temperature_scale()
    torch.testing.assert_close(scale, torch.tensor(100.0))
    scale.backward()
    assert alignment.logit_scale.grad > 0
    torch.testing.assert_close(temperature(0.07).temperature_scale(), torch.tensor(1 / 0.07))


def test_mean_aggregation_takes_the_length_out_of_the_score():
    config = MpmaConfig(local_aggregation="mean")
    word, patches = vectors(1, 1, 16), vectors(1, 4, 16, seed=1)
    # A report that repeats one word says no more than that word.
    scores = [local_similarity(config, word.expand(1, n, 16), patches, real(n))[0] for n in (1, 30)]
    mask = real(30)
    total = mpma_ext.token_patch_similarity(word.expand(1, 30, 16), patches, token_mask=mask)
    torch.testing.assert_close(scores[1], total - math.log(30))
    # The words' softmax still sees thirty of them; without the correction the gap is log 30.
    assert (scores[1] - scores[0]).abs() < 1.0 < math.log(30)
    summed = local_similarity(MpmaConfig(local_aggregation="sum"), word, patches, real(1))[0]
    torch.testing.assert_close(summed, scores[0])


@pytest.mark.parametrize("kind", ["softmax", "max"])
def test_local_loss_is_the_symmetric_cross_entropy_of_all_pairs(kind):
    config = MpmaConfig(local_alignment=kind)
    tokens, patches, mask = vectors(4, 6, 16), vectors(4, 5, 16, seed=1), real(6, 2, 4, 3)
    if kind == "softmax":
        text = mpma_ext.token_patch_similarity(tokens, patches, token_mask=mask)
        text = text - mask.sum(1, keepdim=True).log()
        image = text
    else:
        products = torch.einsum(
            "jtd,ipd->jitp", F.normalize(tokens, dim=-1), F.normalize(patches, dim=-1)
        ).masked_fill(~mask[:, None, :, None], -torch.inf)
        best = products.amax(dim=3).masked_fill(~mask[:, None], 0)
        text = best.sum(2) / mask.sum(1, keepdim=True)
        image = products.amax(dim=2).mean(dim=2)
    diagonal = torch.arange(4)
    text_loss = F.cross_entropy(10 * text, diagonal)
    image_loss = F.cross_entropy(10 * image.T, diagonal)
    found = local_loss(config, tokens, patches, mask, diagonal, longest=6)
    torch.testing.assert_close(found, (text_loss + image_loss) / 2)


def test_reports_are_told_apart_by_number_else_by_tokens():
    config = MpmaConfig()
    ids = torch.tensor([[2, 7, 8, 3, 0], [2, 8, 7, 3, 0], [2, 7, 8, 3, 0], [2, 7, 8, 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 3 + [[1, 1, 1, 1, 1]])
    by_tokens = report_identities(config, ids, mask, None)
    assert by_tokens[0] == by_tokens[2] and len(by_tokens.unique()) == 3
    narrower = report_identities(config, ids[:3, :4], mask[:3, :4], None)
    assert torch.equal(narrower, by_tokens[:3])
    given = torch.tensor([5, 5, 6, 7])
    assert torch.equal(report_identities(config, ids, mask, given), given)
    apart = report_identities(MpmaConfig(false_negatives="none"), ids, mask, given)
    assert len(apart.unique()) == 4


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 256, "text_hidden_size": 192}])
def test_token_patch_products_start_with_unit_deviation(sizes):
    model = build(**sizes).eval()
    batch = make_batch((20, 25, 30, 18) * 4)
    with torch.no_grad():
        patches = model.get_image_features(batch["pixel_values"]).local_embeds
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    products = torch.einsum("nd,ipd->nip", text.local_embeds[text.local_mask], patches)
    # Not a tolerance but the range in which neither softmax is flat or saturated.
    assert 0.4 < products.std() < 2.0
