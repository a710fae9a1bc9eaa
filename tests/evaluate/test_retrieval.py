"""Retrieval end to end on a tiny model, and its scores against direct computation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mpma_ext
from mpma_train.evaluate import retrieval
from mpma_train.evaluate.features import load_subject
from mpma_train.evaluate.held_out import held_out_pairs
from mpma_train.evaluate.retrieval import Embeddings, choose_score, embed, similarities

METRICS = {f"{d}_r@{k}" for d in ("i2r", "r2i") for k in (1, 5, 10)}
METRICS |= {"i2r_mean_rank", "r2i_mean_rank", "class_p@5", "same_findings_r@1"}


def test_result_has_the_agreed_names_and_repeats(arguments):
    result = retrieval.evaluate(arguments())
    assert result.task == "retrieval"
    assert result.n == 16
    assert set(result.metrics) == METRICS
    assert set(result.intervals) == METRICS
    assert set(result.baselines) == {"chance", "untrained", "names_oracle"}
    assert all(set(numbers) == METRICS for numbers in result.baselines.values())
    # an untrained model saved with seed 0 is its own untrained baseline
    assert result.metrics == result.baselines["untrained"]
    assert retrieval.evaluate(arguments()) == result
    other = retrieval.evaluate(arguments(seed=1))
    assert other.metrics == result.metrics
    assert other.baselines["untrained"] != result.baselines["untrained"]


def test_baselines_of_the_small_store_by_hand(arguments):
    result = retrieval.evaluate(arguments())
    counts = {"duplicate_reports": 2, "finding_sets": 4, "unlabelled": 0}
    assert (
        result.details == {"split": "test", "score": "both", "same_findings_queries": 16} | counts
    )
    # 14 reports stand once, one twice: of 16 pairs two have two hits
    chance = (14 * 1 / 16 + 2 * 2 / 16) / 16
    assert result.baselines["chance"]["i2r_r@1"] == pytest.approx(chance)
    # the findings of a study are its number's two lowest bits
    sets = [s & 3 for s in (0, 2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19)]
    sizes = {value: sets.count(value) for value in set(sets)}
    # the duplicates (8 and 12) have no findings: two hits of their four candidates
    oracle = sum(1 / sizes[value] for value in sets) / 16 + 2 * (1 / sizes[0]) / 16
    assert result.baselines["names_oracle"]["i2r_r@1"] == pytest.approx(oracle)
    assert result.baselines["chance"]["same_findings_r@1"] == pytest.approx(oracle)
    shares = sum(sizes[value] / 16 for value in sets) / 16
    assert result.baselines["chance"]["class_p@5"] == pytest.approx(shares)


def test_intervals_resample_the_patients_of_the_split(arguments, store, monkeypatch):
    given = []

    def spy(values, patients, *, seed):
        given.append((patients.tolist(), seed))
        return {}

    monkeypatch.setattr(retrieval, "bootstrap_intervals", spy)
    retrieval.evaluate(arguments(seed=3))
    assert given == [(held_out_pairs(store, "test").patients.tolist(), 3)]


def test_unlabelled_store_leaves_class_metrics_out(arguments, unlabelled_path):
    result = retrieval.evaluate(arguments(data=str(unlabelled_path)))
    assert result.metrics["class_p@5"] is None
    assert result.metrics["same_findings_r@1"] is None
    assert result.metrics["i2r_r@1"] is not None
    assert result.details["unlabelled"] == 16
    assert result.details["finding_sets"] == result.details["same_findings_queries"] == 0
    # without names the oracle knows nothing
    assert result.baselines["names_oracle"] == result.baselines["chance"]


def test_aligned_embeddings_are_found(store_path, model_path):
    subject = load_subject(str(model_path), str(store_path), batch_size=4, seed=0)
    embedded = Embeddings(torch.eye(5), torch.eye(5).roll(1, 0), None, None, None)
    image_rows, report_rows = similarities(subject.model, embedded, "global")
    np.testing.assert_array_equal(image_rows.argmax(1), [1, 2, 3, 4, 0])
    np.testing.assert_array_equal(report_rows.argmax(1), [4, 0, 1, 2, 3])


@pytest.fixture(scope="module", params=["softmax", "max"])
def embedded(request, tmp_path_factory, save_model, store, store_path):
    path = save_model(tmp_path_factory.mktemp("m"), local_alignment=request.param)
    subject = load_subject(str(path), str(store_path), batch_size=6, seed=0)
    items = held_out_pairs(store, "test").items
    return subject.model, embed(subject.model, subject.batches("test", items))


def assert_close(found, expected):
    """Equal but for float32 sums of another order, which the scores keep as float64."""
    torch.testing.assert_close(found.astype(np.float32), expected.astype(np.float32))


def test_local_scores_equal_the_operators(embedded):
    model, found = embedded
    image_rows, report_rows = similarities(model, found, "local")
    tokens, mask = found.tokens, found.token_mask
    if model.config.local_alignment == "max":
        unit = (torch.nn.functional.normalize(x, dim=-1) for x in (tokens, found.patches))
        of_tokens, of_patches = mpma_ext.reference.token_patch_max_similarity(
            *unit, token_mask=mask
        )
        expected = of_patches.T, of_tokens  # each side's own vectors are averaged
        with pytest.raises(AssertionError):
            assert_close(image_rows, report_rows.T)
    else:
        summed = mpma_ext.reference.token_patch_similarity(tokens, found.patches, token_mask=mask)
        mean = summed - mask.sum(1, keepdim=True).log()
        expected = mean.T, mean
    for rows, want in zip((image_rows, report_rows), expected, strict=True):
        assert_close(rows, 10 * want.numpy())


def test_chunks_and_padding_change_nothing(embedded, monkeypatch):
    model, found = embedded
    whole = similarities(model, found, "both")
    monkeypatch.setattr(retrieval, "_CHUNK", 3)
    pad = (0, 0, 0, 7)
    padded = Embeddings(
        found.image,
        found.text,
        found.patches,
        torch.nn.functional.pad(found.tokens, pad, value=3.0),
        torch.nn.functional.pad(found.token_mask, (0, 7)),
    )
    for rows, want in zip(similarities(model, padded, "both"), whole, strict=True):
        assert_close(rows, want)


def test_both_sums_the_logits_of_the_losses(embedded):
    model, found = embedded
    both, apart = (
        similarities(model, found, "both"),
        [similarities(model, found, score) for score in ("global", "local")],
    )
    for direction in (0, 1):
        total = apart[0][direction] + apart[1][direction]
        assert_close(both[direction], total)
    scale = 1 / model.config.temperature_init
    cosine = (found.image @ found.text.T).numpy()
    assert_close(apart[0][0], scale * cosine)


def test_score_defaults_to_what_was_trained(tiny_config):
    assert choose_score(tiny_config(), None) == "both"
    assert choose_score(tiny_config(), "local") == "local"
    only_global = tiny_config(local_alignment="none")
    assert choose_score(only_global, None) == "global"
    assert choose_score(tiny_config(global_alignment=False), None) == "local"
    with pytest.raises(ValueError, match=r"trained with \['global'\], got 'both'"):
        choose_score(only_global, "both")
    with pytest.raises(ValueError, match="trained without alignment"):
        choose_score(SimpleNamespace(global_active=False, local_active=False), None)


def test_model_with_one_alignment_only(tmp_path, arguments, save_model):
    path = save_model(tmp_path / "m", global_alignment=False)
    result = retrieval.evaluate(arguments(model=str(path)))
    assert result.details["score"] == "local"
