"""A model small enough to test everything on, and batches for it."""

import torch

from mpma_train.models import MpmaConfig, MpmaForPreTraining

PAD, UNK, CLS, SEP, MASK, BLANK = range(6)
VOCABULARY = 60
SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "text_hidden_size": 24,
    "text_num_hidden_layers": 2,
    "text_num_attention_heads": 3,
    "text_intermediate_size": 40,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "unk_token_id": UNK,
    "cls_token_id": CLS,
    "sep_token_id": SEP,
    "mask_token_id": MASK,
    "special_token_ids": [BLANK],
    "memory_slots": 20,
    "memory_topk": 5,
    "kv_concat_slots": 3,
    "projection_size": 16,
    "decoder_hidden_size": 28,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 36,
}
NO_DROPOUT = {"text_dropout": 0.0, "fusion_dropout": 0.0}


def build(cls=MpmaForPreTraining, seed=0, **changes):
    torch.manual_seed(seed)
    return cls(MpmaConfig(**(SMALL | changes)))


def make_batch(lengths=(9, 14, 5, 11), seed=0, scale=2, width=None):
    """Random images and reports of the given lengths, [CLS] and [SEP] included, right padded."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = len(lengths), max(lengths) if width is None else width
    place = torch.arange(length)
    real = place < torch.tensor(lengths)[:, None]
    ids = torch.randint(6, VOCABULARY, (batch, length), generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(batch), torch.tensor(lengths) - 1] = SEP
    # Words of two tokens, and one of one token where the number is odd.
    words = ((place - 1) // 2).expand(batch, -1).clone()
    words[(ids == CLS) | (ids == SEP) | ~real] = -1
    return {
        "pixel_values": torch.randn(batch, 1, 16 * scale, 16 * scale, generator=generator),
        "input_ids": ids.masked_fill(~real, PAD),
        "attention_mask": real.long(),
        "word_ids": words,
        "mask_seed": torch.arange(batch) * 7919 + 2**40 + seed,
        "report_ids": torch.arange(batch) + 100 * seed,
    }
