"""The text encoder: transformers' BERT on packed reports, whole and masked ones in one call."""

import math

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers import initialization as init
from transformers.models.bert.modeling_bert import BertEmbeddings

from mpma_train.models.configuration_mpma import MpmaConfig
from mpma_train.models.packing import PackedText


class _Bert(BertModel):
    """BertModel whose positions start as sines and cosines. Parameters keep BertModel's names."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BertEmbeddings):
            table = module.position_embeddings.weight
            # Half the deviation of the words: they are what a report is told by.
            init.copy_(table, initial_positions(*table.shape, self.config.initializer_range / 2))


class TextEncoder(nn.Module):
    """BERT (Devlin et al., NAACL 2019) without its pooler, which knows one sequence only."""

    def __init__(self, config: MpmaConfig):
        super().__init__()
        self.bert = _Bert(config.bert_config(), add_pooling_layer=False)

    def forward(
        self,
        text: PackedText,
        copies: list[Tensor],
        shift: Tensor | None = None,
    ) -> list[Tensor]:
        """States of several copies of the same reports, which do not see one another.

        Args:
            text: where the tokens lie.
            copies: token ids (N,) int64 of each copy: the whole report, the masked one.
            shift: (B, Dt) added to every token embedding of the last copy (the `gap_add` fusion);
                the other copies do not see it.

        Returns:
            For each copy, (N, Dt).
        """
        count = len(copies)
        starts = [text.cu_seqlens[:-1] + i * len(text.rows) for i in range(count)]
        end = text.cu_seqlens[-1:] + (count - 1) * len(text.rows)
        ids = torch.cat(copies).unsqueeze(0)
        words: dict[str, Tensor] = {"input_ids": ids}
        if shift is not None:
            embeddings = self.bert.get_input_embeddings()(ids)
            own = shift.index_select(0, text.rows // text.length)
            others = own.new_zeros((count - 1) * len(own), own.shape[1])
            words = {"inputs_embeds": embeddings + torch.cat([others, own]).to(embeddings.dtype)}
        states = self.bert(
            **words,
            position_ids=text.position_ids.repeat(count).unsqueeze(0),
            cu_seq_lens_q=torch.cat([*starts, end]),
            max_length_q=text.length,
        ).last_hidden_state
        return list(states.squeeze(0).chunk(count))


def initial_positions(length: int, width: int, std: float) -> torch.Tensor:
    """Sines and cosines of a report's places, of deviation `std`: (length, width).

    Learned from there on, like BERT's. From random values a small encoder on a few thousand reports
    stays long at word frequencies: that places are neighbours it would first have to find out.
    """
    rate = torch.exp(-math.log(1000) * torch.arange(0, width, 2) / width)
    angle = torch.arange(length).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width] * (std * 2**0.5)
