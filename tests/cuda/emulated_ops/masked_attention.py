"""masked_attention, masked_attention_qkvpacked and masked_attention_varlen on the emulated machine.

As csrc/cuda/masked_attention.cu does with PyTorch's tensors: what it copies is copied here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emulated_ops import device, new_gradients, readable, suffix, wanted


def operands_of(*tensors):
    return [readable(device("masked_attention"), x) for x in tensors]


def rows(tensor, steps=None):
    """Address, and the steps of an item, a row and a head: those of (items, rows, heads, width)."""
    if tensor is None or tensor.numel() == 0:
        return [0, 0, 0, 0]
    if steps is None:
        steps = [0] * (4 - tensor.dim()) + list(tensor.stride()[:-1])
    return [tensor.data_ptr(), *steps]


def of_statistics(tensor):
    """The same of (items, heads, rows), or (heads, rows) of packed sequences."""
    *item, head, row = tensor.stride()
    return rows(tensor, [*item, row, head] if item else [0, row, head])


@dataclass
class Call:
    """A forward or a backward: everything that both are given, in the machine's memory."""

    operands: list[Tensor]  # query, key, value
    scale: float
    p: float
    seed: Tensor | None
    mask: Tensor | None = None
    offsets: tuple[Tensor, Tensor] | None = None
    longest: tuple[int, int] | None = None

    def __post_init__(self):
        machine = device("masked_attention")
        query, key, _ = self.operands
        self.mask = None if self.mask is None else machine.put(self.mask)
        self.seed = machine.put(self.seed) if self.p > 0 else None
        if self.offsets is None:
            self.items, self.longest = query.shape[0], (query.shape[1], key.shape[1])
            return
        self.items = self.offsets[0].shape[0] - 1
        row_counts = (query.shape[0], key.shape[0])
        self.longest = tuple(map(min, self.longest, row_counts))
        clean = [machine.empty(x.shape, torch.int32) for x in self.offsets]
        given = [machine.put(x) for x in self.offsets]
        count, steps = self.items + 1, [x.stride(0) for x in given]
        machine.call("clean_offsets", *given, *clean, count, *steps, *row_counts)
        self.offsets = clean

    def numbers(self):
        query, key, value = self.operands
        mask = [0] * 4 if self.mask is None else rows(self.mask, [*self.mask.stride(), 0])
        offsets = [x.data_ptr() for x in self.offsets or ()] or [0, 0]
        sizes = [self.items, query.shape[-2], *self.longest, query.shape[-3], key.shape[-3]]
        threshold = math.floor(self.p * 2**32)
        seed = 0 if self.seed is None else self.seed.data_ptr()
        return [
            *(*rows(query), *rows(key), *rows(value), *mask),
            *(*offsets, *sizes, query.shape[-1], seed, threshold),
        ]

    def launch(self, name, rest):
        numbers = torch.tensor([*self.numbers(), *rest], dtype=torch.int64)
        function = f"{name}_{suffix(self.operands[0])}"
        device("masked_attention").call(function, numbers, float(self.scale), 1 / (1 - self.p))

    def forward(self):
        query = self.operands[0]
        *outer, row_count, heads, _ = query.shape
        output = device("masked_attention").empty(query.shape, query.dtype)
        statistics = [*outer, heads, row_count]
        logsumexp = device("masked_attention").empty(statistics, torch.float32)
        if output.numel():
            self.launch("forward", [*rows(output), *of_statistics(logsumexp)])
        return output, logsumexp

    def backward(self, grad_output, output, logsumexp, gradients):
        """Fills the gradients of query, key and value; None is one not needed."""
        saved = operands_of(grad_output, output)
        logsumexp = device("masked_attention").put(logsumexp)
        if any(x is not None and x.numel() for x in gradients):
            numbers = [*rows(saved[0]), *rows(saved[1]), *of_statistics(logsumexp)]
            self.launch("backward", [*numbers, *(n for x in gradients for n in rows(x))])


def masked_attention(query, key, value, key_padding_mask, scale, dropout_p, dropout_seed):
    operands = operands_of(query, key, value)
    return Call(operands, scale, dropout_p, dropout_seed, mask=key_padding_mask).forward()


def masked_attention_qkvpacked(qkv, key_padding_mask, scale, dropout_p, dropout_seed):
    operands = list(operands_of(qkv)[0].unbind(2))
    return Call(operands, scale, dropout_p, dropout_seed, mask=key_padding_mask).forward()


def masked_attention_varlen(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    dropout_p,
    dropout_seed,
):
    operands = operands_of(query, key, value)
    offsets, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    call = Call(operands, scale, dropout_p, dropout_seed, offsets=offsets, longest=longest)
    return call.forward()


def masked_attention_backward(
    grad_output,
    query,
    key,
    value,
    output,
    logsumexp,
    key_padding_mask,
    scale,
    dropout_p,
    dropout_seed,
    need_query,
    need_key,
    need_value,
):
    operands = operands_of(query, key, value)
    needs = (need_query, need_key, need_value)
    gradients = new_gradients(device("masked_attention"), operands, needs)
    call = Call(operands, scale, dropout_p, dropout_seed, mask=key_padding_mask)
    call.backward(grad_output, output, logsumexp, wanted(gradients, needs))
    return gradients


def masked_attention_qkvpacked_backward(
    grad_output, qkv, output, logsumexp, key_padding_mask, scale, dropout_p, dropout_seed
):
    operands = list(operands_of(qkv)[0].unbind(2))
    gradient = device("masked_attention").empty(qkv.shape, qkv.dtype)
    call = Call(operands, scale, dropout_p, dropout_seed, mask=key_padding_mask)
    call.backward(grad_output, output, logsumexp, gradient.unbind(2))
    return gradient


def masked_attention_varlen_backward(
    grad_output,
    query,
    key,
    value,
    output,
    logsumexp,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    dropout_p,
    dropout_seed,
    need_query,
    need_key,
    need_value,
):
    operands = operands_of(query, key, value)
    needs = (need_query, need_key, need_value)
    gradients = new_gradients(device("masked_attention"), operands, needs)
    offsets, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    call = Call(operands, scale, dropout_p, dropout_seed, offsets=offsets, longest=longest)
    call.backward(grad_output, output, logsumexp, wanted(gradients, needs))
    return gradients
