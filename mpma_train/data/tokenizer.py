"""The store's tokenizer: WordPiece trained on the training reports, or a pretrained one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from .names import PLACEHOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_LENGTH = 100


def train_tokenizer(reports: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a lower-case WordPiece tokenizer of at most `vocab_size` tokens on reports.

    The same reports give the same tokenizer.
    """
    texts = [report.replace(PLACEHOLDER, " ") for report in reports]
    tokenizer = _word_piece(models.WordPiece(unk_token="[UNK]"), lowercase=True)
    # The trainer numbers the letters inside words in the order of a randomly seeded hash table, and
    # equal counts are decided by those numbers. Given as special tokens they are numbered first.
    fixed = [*SPECIAL_TOKENS, PLACEHOLDER, *sorted(_inner_letters(tokenizer, texts))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=fixed,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    model = models.WordPiece(
        vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_LENGTH
    )
    return _finish(_word_piece(model, lowercase=True))


def _inner_letters(tokenizer: Tokenizer, texts: list[str]) -> set[str]:
    """`##x` for every letter x that follows another one in a word."""
    letters: set[str] = set()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            letters.update(word[1:])
    return {f"##{letter}" for letter in letters}


def pretrained_tokenizer(folder: Path | str) -> Tokenizer:
    """Takes the tokenizer of a BERT-like model from a directory: tokenizer.json or vocab.txt.

    Raises FileNotFoundError where there is none, ValueError where it lacks one of BERT's special
    tokens. Only these two files and tokenizer_config.json are read; nothing of the directory is
    run.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    elif (folder / "vocab.txt").is_file():
        config = folder / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        model = models.WordPiece.from_file(
            str(folder / "vocab.txt"),
            unk_token="[UNK]",
            max_input_chars_per_word=MAX_WORD_LENGTH,
        )
        tokenizer = _word_piece(model, lowercase=settings.get("do_lower_case", True))
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: expected a directory with tokenizer.json or vocab.txt"
        )
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"the tokenizer in {folder} lacks {', '.join(missing)}: "
            "expected one with BERT's special tokens"
        )
    return _finish(tokenizer)


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerFast:
    """Opens a store's tokenizer.json for transformers, with `___` among its special tokens."""
    from transformers import PreTrainedTokenizerFast

    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        **dict(zip(names, SPECIAL_TOKENS, strict=True)),
        extra_special_tokens=[PLACEHOLDER],
        clean_up_tokenization_spaces=False,
    )


def _word_piece(model: models.WordPiece, *, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    """Adds `___` as one token and the [CLS] ... [SEP] frame."""
    # A special added token is cut out before the pre-tokenizer would split it into three
    # underscores.
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (*SPECIAL_TOKENS, PLACEHOLDER)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer
