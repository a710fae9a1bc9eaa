import json

import pytest

from mpma_train.data.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    pretrained_tokenizer,
    train_tokenizer,
)

REPORTS = ["Small left pleural effusion since ___.", "No pneumothorax; ___-year-old man."] * 5


@pytest.fixture
def trained(tmp_path):
    train_tokenizer(REPORTS, 300).save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


def test_special_tokens_and_frame(trained):
    assert trained.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    tokens = trained.convert_ids_to_tokens(trained("Left effusion.").input_ids)
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "left" in tokens
    assert trained.pad_token == "[PAD]" and trained.mask_token_id == 4


@pytest.mark.parametrize("text", ["since ___.", "___-year", "man___;", "___"])
def test_placeholder_is_one_special_token(trained, text):
    tokens = trained.convert_ids_to_tokens(trained(text).input_ids)
    assert tokens.count("___") == 1 and "_" not in tokens and "[UNK]" not in tokens
    assert trained.convert_tokens_to_ids("___") in trained.all_special_ids


def test_training_repeats_itself_and_keeps_to_its_size():
    # The trainer's hash tables are seeded anew each time: a wrong order shows within a few runs.
    trained = {train_tokenizer(REPORTS, 60).to_str() for _ in range(10)}
    assert len(trained) == 1
    assert train_tokenizer(REPORTS, 60).get_vocab_size() <= 60


def test_pretrained_vocabulary_from_a_directory(tmp_path):
    words = [*SPECIAL_TOKENS, "left", "effusion", "##s", "Left"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = pretrained_tokenizer(tmp_path)
    assert tokenizer.encode("Left effusions ___").tokens == [
        *("[CLS]", "left", "effusion", "##s", "___", "[SEP]")
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert pretrained_tokenizer(tmp_path).encode("Left").tokens == ["[CLS]", "Left", "[SEP]"]


def test_pretrained_tokenizer_json_loses_its_padding_and_truncation(tmp_path):
    tokenizer = train_tokenizer(REPORTS, 300)
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = pretrained_tokenizer(tmp_path)
    assert (
        again.encode(REPORTS[0]).tokens == train_tokenizer(REPORTS, 300).encode(REPORTS[0]).tokens
    )


def test_directory_without_a_tokenizer_and_one_without_special_tokens(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a directory with tokenizer\.json or vocab"
    ):
        pretrained_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nleft\n")
    with pytest.raises(ValueError, match=r"lacks \[SEP\], \[MASK\]"):
        pretrained_tokenizer(tmp_path)
