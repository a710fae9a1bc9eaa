"""Memory attention on the emulated machine."""

import ctypes

import torch

from emulated_ops import device, new_gradients, readable, suffix, wanted


def memory_attention(query, memory_key, memory_value, topk, scale, dropout_p, dropout_seed):
    machine = device("memory_attention")
    output = machine.empty(query.shape, query.dtype)
    logsumexp = machine.empty(query.shape[:2], torch.float32)
    indices = machine.empty((*query.shape[:2], topk), torch.int32)
    problem = arguments(machine, query, memory_key, memory_value, scale, dropout_p, dropout_seed)
    results = (output, logsumexp, indices)
    machine.call(f"forward_{suffix(query)}", *problem, topk, *results)
    return results


def memory_attention_backward(
    grad_output,
    query,
    memory_key,
    memory_value,
    output,
    logsumexp,
    indices,
    scale,
    dropout_p,
    dropout_seed,
    need_query,
    need_memory_key,
    need_memory_value,
):
    machine = device("memory_attention")
    tensors = (query, memory_key, memory_value)
    needed = (need_query, need_memory_key, need_memory_value)
    gradients = new_gradients(machine, tensors, needed)
    problem = (
        *arguments(machine, *tensors, scale, dropout_p, dropout_seed),
        *operand(machine, grad_output),
        *wanted(gradients, needed),
    )
    if indices.shape[2]:
        topk_backward(machine, problem, query, len(memory_key), indices, any(needed[1:]))
    else:
        dense_backward(machine, problem, query, output, logsumexp, memory_key, needed)
    return gradients


def topk_backward(machine, problem, query, slots, indices, need_bank):
    rows, heads, topk = indices.shape
    workspace = [None] * 4
    if need_bank:
        segment = machine.library.topk_segment(ctypes.c_int64(slots), ctypes.c_int64(topk))
        counts = machine.empty((heads, -(-rows // segment), slots), torch.int32)
        starts = machine.empty((heads, slots + 1), torch.int32)
        places = machine.empty(indices.shape, torch.int32)
        entries = machine.empty((heads, rows * topk, 4), torch.int32)
        workspace = [counts, starts, places, entries]
    call = f"topk_backward_{suffix(query)}"
    machine.call(call, *problem, topk, machine.put(indices), *workspace)


def dense_backward(machine, problem, query, output, logsumexp, memory_key, needed):
    need_query, need_key, need_value = needed
    delta = machine.empty(logsumexp.shape, torch.float32) if need_query or need_key else None
    splits = 1 + len(query) // 60  # where there are rows for it, so that the tests have both forms
    parts = [
        machine.empty((splits, *memory_key.shape), torch.float32) if need and splits > 1 else None
        for need in (need_key, need_value)
    ]
    statistics = (*operand(machine, output), machine.put(logsumexp), delta)
    machine.call(f"dense_backward_{suffix(query)}", *problem, *statistics, splits, *parts)


def operand(machine, tensor):
    """A tensor that the kernels can read, and its strides of rows and heads."""
    there = readable(machine, tensor)
    return there, *there.stride()[:2]


def arguments(machine, query, key, value, scale, dropout_p, seed):
    """What a problem is made of, in the order of the launchers' parameters."""
    operands = (x for tensor in (query, key, value) for x in operand(machine, tensor))
    rows, heads, width = query.shape
    there = machine.put(seed) if dropout_p else None
    return *operands, rows, heads, len(key), width, float(scale), float(dropout_p), there
