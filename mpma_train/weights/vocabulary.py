"""Which tokenizer a converted model is for."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerFast

from mpma_train.data.tokenizer import load_tokenizer, pretrained_tokenizer


def checkpoint_tokenizer(text: Path | None) -> PreTrainedTokenizerFast | None:
    """The tokenizer beside a text checkpoint, `___` added as `mpma prepare` adds it, if any."""
    names = ("tokenizer.json", "vocab.txt")
    if text is None or not any((text / name).is_file() for name in names):
        return None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        pretrained_tokenizer(text).save(str(path))
        return load_tokenizer(path)


def check_same_words(
    theirs: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast, data: Path
) -> None:
    """Every token of a checkpoint must have its number in the store's tokenizer.

    Raises:
        ValueError: one has not.
    """
    numbers = ours.get_vocab()
    moved = [w for w, number in theirs.get_vocab().items() if numbers.get(w) != number]
    if moved:
        raise ValueError(
            f"data: {len(moved)} tokens of the text checkpoint, such as {sorted(moved)[:3]}, have "
            f"another number or none in {data}; prepare it with --tokenizer and the checkpoint's "
            "directory"
        )


def token_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The fields of `MpmaConfig` that a tokenizer decides."""
    named = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("pad", "unk", "cls", "sep", "mask")
    }
    others = [i for i in tokenizer.added_tokens_decoder if i not in named.values()]
    return {"vocab_size": len(tokenizer), "special_token_ids": others, **named}
