import torch
from small_model import CLS, MASK, make_batch

from mpma_train.models.masking import draw_masks


def masks_of(word_ids, seed, patches=20, masked=15, ratio=0.5):
    return draw_masks(word_ids, patches, masked, ratio, seed)


def words_of_length(*lengths):
    return torch.nn.utils.rnn.pad_sequence(
        [torch.arange(n).repeat_interleave(2) for n in lengths], batch_first=True, padding_value=-1
    )


def test_same_seed_same_masks_whatever_the_place_and_the_padding():
    words = words_of_length(8, 5, 11)
    seeds = torch.tensor([5, -(2**63), 2**63 - 1])
    whole = masks_of(words, seeds)
    order = torch.tensor([2, 0, 1])
    moved = masks_of(words[order], seeds[order])
    wider = masks_of(torch.nn.functional.pad(words, (0, 9), value=-1), seeds)
    for name in ("visible_patches", "masked_patches", "masked_tokens"):
        assert torch.equal(getattr(whole, name)[order], getattr(moved, name))
    assert torch.equal(whole.masked_tokens, wider.masked_tokens[:, : words.shape[1]])
    assert not wider.masked_tokens[:, words.shape[1] :].any()
    assert torch.equal(whole.visible_patches, wider.visible_patches)


def test_seeds_that_differ_in_one_bit_give_other_masks():
    words = words_of_length(40).expand(64, -1)
    bits = 2 ** torch.arange(63)
    masks = masks_of(words, torch.cat([bits.new_zeros(1), bits]), patches=100, masked=75)
    rows = torch.cat([masks.masked_patches, masks.masked_tokens.long()], dim=1)
    assert len(rows.unique(dim=0)) == 64


def test_every_patch_is_either_visible_or_masked():
    masks = masks_of(words_of_length(4, 4), torch.tensor([1, 2]))
    both = torch.cat([masks.visible_patches, masks.masked_patches], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(20).expand(2, -1))
    assert masks.masked_patches.shape == (2, 15)
    assert (masks.visible_patches.diff(dim=1) > 0).all()


def test_whole_words_and_their_share():
    words = words_of_length(8, 5, 1, 11)
    masked = masks_of(words, torch.arange(4)).masked_tokens
    for row, report, expected in zip(masked, words, (4, 2, 1, 6), strict=True):
        hidden, shown = set(report[row].tolist()), set(report[~row].tolist())
        assert -1 not in hidden
        assert not hidden & shown
        # Half of the words, rounded half to even, and never none.
        assert len(hidden) == expected


def test_no_word_no_mask_and_ratio_zero_masks_nothing():
    words = torch.full((2, 6), -1)
    assert not masks_of(words, torch.arange(2)).masked_tokens.any()
    assert not masks_of(words_of_length(4, 4), torch.arange(2), ratio=0.0).masked_tokens.any()


def test_word_numbers_need_not_be_consecutive_nor_in_order():
    words = torch.tensor([[9, 9, 400, -1, 400, 3, 3, 70]])
    masked = masks_of(words, torch.tensor([4])).masked_tokens[0]
    for word in (9, 400, 3, 70):
        assert masked[words[0] == word].unique().numel() == 1
    assert len(words[0][masked].unique()) == 2


def test_without_seed_the_default_generator_decides():
    words = words_of_length(30, 30)
    torch.manual_seed(3)
    first, second = masks_of(words, None), masks_of(words, None)
    torch.manual_seed(3)
    again = masks_of(words, None)
    assert torch.equal(first.masked_tokens, again.masked_tokens)
    assert torch.equal(first.masked_patches, again.masked_patches)
    assert not torch.equal(first.masked_tokens, second.masked_tokens)


def test_each_patch_and_each_word_is_masked_as_often_as_any_other():
    draws = 4000
    words = torch.arange(10).expand(draws, -1)
    masks = masks_of(words, torch.arange(draws), patches=8, masked=6)
    patch_share = masks.masked_patches.flatten().bincount(minlength=8) / draws
    word_share = masks.masked_tokens.float().mean(dim=0)
    # Five standard errors of a share over 4000 draws: 5 * sqrt(.75 * .25 / 4000) and with .5.
    assert (patch_share - 0.75).abs().max() < 0.035
    assert (word_share - 0.5).abs().max() < 0.04


def test_special_tokens_are_never_masked_by_the_model(model, monkeypatch):
    seen = {}
    encode = model.model.encode_reports

    def spy(text, whole, masked, states):
        seen.update(whole=text.unpack(whole), masked=text.unpack(masked))
        return encode(text, whole, masked, states)

    monkeypatch.setattr(model.model, "encode_reports", spy)
    inputs = make_batch()
    inputs["input_ids"][:, 2] = 5  # the placeholder, which is special, though it has a word number
    model(**inputs)
    changed = seen["whole"] != seen["masked"]
    assert changed.any(dim=1).all()
    assert (seen["masked"][changed] == MASK).all()
    assert (seen["whole"][changed] > CLS).all() and (seen["whole"][changed] != 5).all()
    assert torch.equal(seen["whole"], inputs["input_ids"])
