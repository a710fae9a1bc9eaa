import numpy as np
import pytest
import torch
from PIL import Image
from small_model import build
from transformers import AutoProcessor, PreTrainedTokenizerFast

from mpma_train.data.tokenizer import load_tokenizer, train_tokenizer
from mpma_train.models import MpmaImageProcessor, MpmaProcessor

REPORTS = ["The heart is enlarged.", "Small left effusion, no pneumothorax.", "Compared to ___."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(REPORTS, 60).save(str(path))
    return load_tokenizer(path)


@pytest.fixture
def processor(tokenizer):
    tokenizer.model_max_length = 32
    return MpmaProcessor(MpmaImageProcessor(32, 0.4, 0.2), tokenizer)


def test_text_inputs_and_their_words(processor, tokenizer):
    inputs = processor(text=REPORTS)
    assert {name: value.dtype for name, value in inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "word_ids"), torch.int64
    )
    for row, report in enumerate(REPORTS):
        length = int(inputs["attention_mask"][row].sum())
        tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][row])
        words = inputs["word_ids"][row].tolist()
        assert tokens[0] == "[CLS]" and tokens[length - 1] == "[SEP]"
        assert set(tokens[length:]) <= {"[PAD]"}
        for place, (token, word) in enumerate(zip(tokens, words, strict=True)):
            special = token in ("[CLS]", "[SEP]", "[PAD]", "___", "[UNK]")
            assert (word == -1) == special, (report, token)
            if token.startswith("##"):
                assert word == words[place - 1]
            elif not special and place > 1:
                assert word != words[place - 1]
    assert "___" in tokenizer.convert_ids_to_tokens(inputs["input_ids"][2])


def test_max_length_cuts_the_end_and_defaults_to_the_limit(processor):
    inputs = processor(text=REPORTS[1], max_length=6)
    assert inputs["input_ids"].shape == (1, 6)
    assert inputs["input_ids"][0, -1] == processor.tokenizer.sep_token_id
    assert processor(text="effusion " * 100)["input_ids"].shape == (1, 32)


def test_images_of_every_kind_agree(processor):
    grey = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    expected = (torch.from_numpy(grey) / 255 - 0.4) / 0.2
    kinds = [
        grey,
        grey[None],
        [grey],
        torch.from_numpy(grey),
        grey.astype(np.float32) / 255,
        Image.fromarray(grey),
        Image.fromarray(grey).convert("RGB"),
    ]
    for kind in kinds:
        pixels = processor(images=kind)["pixel_values"]
        assert pixels.shape == (1, 1, 32, 32) and pixels.dtype == torch.float32
        torch.testing.assert_close(pixels[0, 0], expected)
    for batch in (np.stack([grey, grey]), np.stack([grey, grey])[:, None], [grey, grey[None]]):
        assert processor(images=batch)["pixel_values"].shape == (2, 1, 32, 32)


def test_other_sizes_are_padded_to_a_square_not_squeezed(processor):
    white = np.full((40, 20), 255, dtype=np.uint8)
    pixels = processor(images=white)["pixel_values"][0, 0]
    black, full = -2.0, 3.0
    torch.testing.assert_close(pixels[:, :8], torch.full((32, 8), black))
    torch.testing.assert_close(pixels[:, 8:24], torch.full((32, 16), full))


def test_sixteen_bits_are_windowed_not_clipped(processor):
    values = np.linspace(0, 4000, 32 * 32).astype(np.uint16).reshape(32, 32)
    pixels = processor(images=Image.fromarray(values))["pixel_values"][0, 0]
    # The full range, in 256 steps: 1 / 255 of grey is 0.02 after division by 0.2.
    expected = (torch.from_numpy(values.astype(np.float32)) / 4000 - 0.4) / 0.2
    assert (pixels - expected).abs().max() < 0.02


def test_saved_beside_the_model_and_loaded(processor, tmp_path):
    build().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = np.random.default_rng(1).integers(0, 256, (50, 40), dtype=np.uint8)
    expected = processor(images=image, text=REPORTS)
    for loaded in (
        MpmaProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded.tokenizer, PreTrainedTokenizerFast)
        found = loaded(images=image, text=REPORTS)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_in_nothing_out(processor):
    assert processor(images=[], text=[])["pixel_values"].shape == (0, 1, 32, 32)
    with pytest.raises(ValueError, match="at least one of them"):
        processor()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((31, 32), dtype=np.float32), r"got float32 \(31, 32\)"),
        (np.zeros((32, 32), dtype=np.int64), "got int64"),
        (np.zeros((2, 3, 32, 32), dtype=np.uint8), r"got uint8 \(3, 32, 32\)"),
        (np.zeros((0, 5), dtype=np.uint8), r"\(0, 5\)"),
        (["no_such_file.jpg"], "got a str"),
    ],
)
def test_images_that_do_not_fit_are_named(processor, images, message):
    with pytest.raises(ValueError, match=f"images: each must be .*{message}"):
        processor(images=images)


def test_text_that_is_no_text_is_named(processor):
    with pytest.raises(ValueError, match=r"text: must be a string .* got float"):
        processor(text=["fine", float("nan")])
