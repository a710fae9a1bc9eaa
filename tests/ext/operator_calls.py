"""One call of every operator. What PyTorch is told of it, and its errors, are tested on this entry.

Operands, masks and offsets are given by their axes, in the order in which the operator checks them.
An axis of one name has one size in the whole call; a number is that size always.
"""

from dataclasses import dataclass, field

import torch

import mpma_ext

F32 = torch.float32
SIZES = {"B": 2, "S": 4, "Sq": 3, "Sk": 4, "H": 2, "D": 8, "Nq": 6, "Nk": 7, "B + 1": 4}
SIZES |= {"...": 6, "N": 9, "Bt": 2, "T": 4, "Bi": 3, "P": 5}


@dataclass(frozen=True)
class Call:
    """Arguments by the names of the public signature, which the schema shares.

    Attributes:
        operands: floating tensors.
        masks: bool tensors.
        offsets: int32 tensors, where each packed sequence starts.
        settings: everything else.
    """

    operands: dict[str, str]
    masks: dict[str, str] = field(default_factory=dict)
    offsets: dict[str, str] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    def axes(self):
        """name -> axes, of every argument that has some."""
        every = self.operands | self.masks | self.offsets
        return {name: axes.split(", ") for name, axes in every.items()}


DROPOUT = {"scale": 0.3, "dropout_p": 0.3, "dropout_seed": torch.tensor([5])}
CALLS = {
    "masked_attention": Call(
        {"query": "B, Sq, H, D", "key": "B, Sk, H, D", "value": "B, Sk, H, D"},
        masks={"key_padding_mask": "B, Sk"},
        settings=DROPOUT,
    ),
    "masked_attention_qkvpacked": Call(
        {"qkv": "B, S, 3, H, D"}, masks={"key_padding_mask": "B, S"}, settings=DROPOUT
    ),
    "masked_attention_varlen": Call(
        {"query": "Nq, H, D", "key": "Nk, H, D", "value": "Nk, H, D"},
        offsets={"cu_seqlens_q": "B + 1", "cu_seqlens_k": "B + 1"},
        settings={"max_seqlen_q": 3, "max_seqlen_k": 4, **DROPOUT},
    ),
    "memory_attention": Call(
        {"query": "..., H, D", "memory_key": "N, H, D", "memory_value": "N, H, D"},
        settings={"topk": 4, **DROPOUT},
    ),
    "token_patch_similarity": Call(
        {"tokens": "Bt, T, D", "patches": "Bi, P, D"},
        masks={"token_mask": "Bt, T", "patch_mask": "Bi, P"},
        settings={"attention_temperature": 3.0, "pooling_temperature": 6.0},
    ),
    "token_patch_max_similarity": Call(
        {"tokens": "Bt, T, D", "patches": "Bi, P, D"},
        masks={"token_mask": "Bt, T", "patch_mask": "Bi, P"},
    ),
}


def shape_of(axes):
    return [SIZES[axis] if axis in SIZES else int(axis) for axis in axes.split(", ")]


def operands(name, dtype=F32):
    """Floating arguments, drawn anew and always the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = {key: shape_of(axes) for key, axes in CALLS[name].operands.items()}
    return {key: torch.randn(s, generator=generator).to(dtype) for key, s in shapes.items()}


def others(name):
    """The arguments that are no operands."""
    call = CALLS[name]
    masks = {key: torch.ones(shape_of(axes)).bool() for key, axes in call.masks.items()}
    for mask in masks.values():
        mask[0, 1] = False
    offsets = {key: torch.tensor([0, 2, 2, 5], dtype=torch.int32) for key in call.offsets}
    return masks | offsets | call.settings


def run(name, arguments, module=mpma_ext, **overrides):
    """Outputs of the public function, always as a tuple.

    Args:
        arguments: operands, and others that replace the entry's.
        module: `mpma_ext` or its reference.
        overrides: further arguments, such as the backend.
    """
    named = others(name) | arguments | overrides
    first = [named.pop(key) for key in CALLS[name].operands]
    result = getattr(module, name)(*first, **named)
    return result if isinstance(result, tuple) else (result,)


def operator_arguments(name):
    """Arguments of torch.ops.mpma.<name> in the schema's order, operands permuted but dense."""
    permuted = {
        key: tensor.transpose(0, 1).contiguous().transpose(0, 1)
        for key, tensor in operands(name).items()
    }
    return [(others(name) | permuted)[argument] for argument in schema(name)]


def backward_arguments(name):
    """Arguments of the operator's backward: ones as gradients, every other gradient wanted."""
    arguments = operator_arguments(name)
    outputs = getattr(torch.ops.mpma, name)(*arguments)
    return with_outputs(name, arguments, outputs, lambda number: number % 2 == 0)


def with_outputs(name, arguments, outputs, needs):
    """Arguments of the backward after a forward; `needs` says of a gradient if it is wanted.

    The forward returns first what has a gradient and last what is saved for the backward.
    """
    values = dict(zip(schema(name), arguments, strict=True))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    names = schema(f"{name}_backward")
    gradients = [key for key in names if key.startswith("grad_")]
    wanted = [key for key in names if key.startswith("need_")]
    saved = [key for key in names if key not in (*values, *gradients, *wanted)]
    values |= {key: torch.ones_like(out) for key, out in zip(gradients, outputs, strict=False)}
    values |= {key: needs(number) for number, key in enumerate(wanted)}
    values |= dict(zip(saved, outputs[len(outputs) - len(saved) :], strict=True))
    return [values[key] for key in names]


def schema(name):
    """Names of the arguments of torch.ops.mpma.<name>."""
    return [a.name for a in getattr(torch.ops.mpma, name).default._schema.arguments]
