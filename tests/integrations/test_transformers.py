"""The transformers drop-in against the same models with transformers' own eager attention."""

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import (
    BertConfig,
    BertModel,
    ConvBertConfig,
    ConvBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from mpma_ext.integrations.transformers import attention, register

register()

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# float64 models: both sides do the same sums in another order, so that only rounding (1e-16 a
# step, some thousand steps deep) may differ.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LENGTHS = (7, 3, 5)


def bert(**changes):
    return BertConfig(vocab_size=50, max_position_embeddings=16, **(SMALL | changes))


def twins(model_class, config):
    """The same random model twice, float64, dropout off: (eager, mpma)."""
    torch.manual_seed(0)
    eager = model_class._from_config(config, attn_implementation="eager").double().eval()
    ours = model_class._from_config(config, attn_implementation="mpma").double().eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def reports(lengths=LENGTHS):
    """Right-padded token numbers (B, S) and the mask that says which are real."""
    torch.manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(1, 50, mask.shape) * mask, mask.long()


def assert_same_gradients(a, b):
    pairs = zip(a.named_parameters(), b.parameters(), strict=True)
    gradients = [(n, p.grad, q.grad) for (n, p), q in pairs]
    assert any(g is not None and g.abs().max() > 0 for _, g, _ in gradients)
    for name, expected, got in gradients:
        if expected is None:
            assert got is None or not got.any(), name
        else:
            torch.testing.assert_close(got, expected, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_padded_bert_equals_eager():
    eager, ours = twins(BertModel, bert())
    ids, mask = reports()
    weight = torch.randn(*ids.shape, 32, dtype=torch.float64) * mask[..., None]
    states = []
    for model in (eager, ours):
        state = model(ids, attention_mask=mask).last_hidden_state
        (state * weight).sum().backward()
        states.append(state[mask.bool()])
    torch.testing.assert_close(states[1], states[0], **CLOSE)
    assert_same_gradients(eager, ours)


def packed_call(model, ids, mask, **changes):
    lengths = mask.sum(1)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    keywords = {
        "input_ids": ids[mask.bool()][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    return model(**(keywords | changes)).last_hidden_state


def test_packed_bert_equals_padded_eager():
    eager, ours = twins(BertModel, bert())
    ids, mask = reports()
    expected = eager(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    got = packed_call(ours, ids, mask)
    assert got.shape == (1, sum(LENGTHS), 32)
    torch.testing.assert_close(got[0], expected, **CLOSE)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got[0] * weight).sum().backward()
    assert_same_gradients(eager, ours)


def test_packed_keys_default_to_the_queries():
    _, ours = twins(BertModel, bert())
    ids, mask = reports()
    short = packed_call(ours, ids, mask, cu_seq_lens_k=None, max_length_k=None)
    assert torch.equal(short, packed_call(ours, ids, mask))


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (ViTModel, ViTConfig(image_size=16, patch_size=4, num_channels=1, **SMALL)),
        (
            ViTMAEModel,
            ViTMAEConfig(image_size=16, patch_size=4, num_channels=1, mask_ratio=0.5, **SMALL),
        ),
    ],
)
def test_vision_encoders_equal_eager(model_class, config):
    eager, ours = twins(model_class, config)
    pixels = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    keywords = {"noise": torch.rand(2, 16)} if model_class is ViTMAEModel else {}
    states = [m(pixels, **keywords).last_hidden_state for m in (eager, ours)]
    torch.testing.assert_close(states[1], states[0], **CLOSE)
    weight = torch.randn_like(states[0])
    for state in states:
        (state * weight).sum().backward()
    assert_same_gradients(eager, ours)


def test_padding_may_hold_anything():
    _, ours = twins(BertModel, bert())
    ids, mask = reports()
    embeds = torch.randn(*ids.shape, 32, dtype=torch.float64)
    clean = ours(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    dirty = embeds.masked_fill(~mask.bool()[..., None], float("nan"))
    got = ours(inputs_embeds=dirty, attention_mask=mask).last_hidden_state
    assert torch.equal(got[mask.bool()], clean[mask.bool()])


def test_attention_dropout_follows_training_mode():
    config = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model = BertModel._from_config(config, attn_implementation="mpma")
    ids, mask = reports()
    with torch.no_grad():
        model.train()
        torch.manual_seed(2)
        first = model(ids, attention_mask=mask).last_hidden_state
        second = model(ids, attention_mask=mask).last_hidden_state
        torch.manual_seed(2)
        again = model(ids, attention_mask=mask).last_hidden_state
        model.eval()
        calm = [model(ids, attention_mask=mask).last_hidden_state for _ in range(2)]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(*calm)


def test_registering_again_changes_nothing():
    register()
    interface = transformers.AttentionInterface()
    assert interface["mpma"] is attention
    assert interface.valid_keys().count("mpma") == 1


def test_mask_values_are_never_read():
    """A fake tensor has no values: any look at them (`.all()`, a Python branch) raises."""
    seen = []

    def spy(module, args):
        seen.append(args[1])

    with FakeTensorMode():
        ids, mask = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long)
        with pytest.raises(DataDependentOutputException):
            bool(mask.all())
        model = BertModel._from_config(bert(), attn_implementation="mpma").eval()
        model.encoder.layer[0].register_forward_pre_hook(spy)
        state = model(ids, attention_mask=mask).last_hidden_state
    assert state.shape == (3, 7, 32)
    assert seen[0].dtype == torch.bool and seen[0].shape == (3, 7)


LLAMA = LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL)


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (BertModel, bert(is_decoder=True), "BertConfig asked for a causal mask"),
        (
            GPT2Model,
            GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16),
            "GPT2Config asked for a causal mask",
        ),
        (LlamaModel, LLAMA, "LlamaConfig asked for a causal mask, grouped-query attention"),
        (
            ModernBertModel,
            ModernBertConfig(vocab_size=50, pad_token_id=0, **SMALL),
            "ModernBertConfig asked for a sliding-window mask",
        ),
    ],
)
@pytest.mark.parametrize("padded", [True, False])
def test_other_patterns_are_refused_by_name(model_class, config, message, padded):
    model = model_class._from_config(config, attn_implementation="mpma")
    ids, mask = reports()
    with pytest.raises(ValueError, match=message):
        model(ids, attention_mask=mask if padded else None)


def test_arbitrary_mask_is_refused_by_name():
    model = BertModel._from_config(bert(), attn_implementation="mpma")
    ids, _ = reports()
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"BertSelfAttention asked for an arbitrary .*3, 1, 7, 7"):
        model(ids, attention_mask=mask)


def test_model_without_the_interface_is_refused_by_name():
    """Unrefused, it would add our bool mask to its scores and attend to padding."""
    config = ConvBertConfig(vocab_size=50, embedding_size=32, **SMALL)
    model = ConvBertModel._from_config(config, attn_implementation="mpma")
    ids, mask = reports()
    with pytest.raises(ValueError, match="ConvBertConfig computes attention by itself"):
        model(ids, attention_mask=mask)


def test_mask_of_another_length_is_refused():
    model = BertModel._from_config(bert(), attn_implementation="mpma")
    ids, _ = reports()
    with pytest.raises(ValueError, match="key"):
        model(ids, attention_mask=torch.ones(3, 6, dtype=torch.long))


class Layer(torch.nn.Module):
    is_causal = False


@pytest.mark.parametrize(
    ("module", "key_heads", "keywords", "message"),
    [
        (Layer(), 2, {}, "Layer asked for grouped-query attention"),
        (Layer(), 4, {"is_causal": True}, "Layer asked for causal attention"),
        (torch.nn.Identity(), 4, {}, "Identity asked for causal attention"),
        (Layer(), 4, {"position_bias": torch.zeros(1, 4, 5, 5)}, "Layer asked for position_bias"),
        (Layer(), 4, {"output_attentions": True}, "Layer asked for output_attentions"),
        (Layer(), 4, {"cu_seq_lens_q": torch.tensor([0, 5])}, "Layer: packed .* max_length_q"),
    ],
)
def test_layers_are_refused_by_name(module, key_heads, keywords, message):
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, key_heads, 5, 8)
    with pytest.raises(ValueError, match=message):
        attention(module, query, key, key, None, **keywords)


@pytest.mark.parametrize("packed", [False, True])
def test_scale_and_other_keys_are_heeded(packed):
    """Cross-attention of 3 queries on 5 keys with a scale of its own, in transformers' layout."""
    query, key, value = (torch.randn(1, 4, n, 8, dtype=torch.float64) for n in (3, 5, 5))
    keywords = {}
    if packed:
        keywords = {f"cu_seq_lens_{x}": torch.tensor([0, n]) for x, n in (("q", 3), ("k", 5))}
        keywords |= {"max_length_q": 3, "max_length_k": 5}
    output, weights = attention(Layer(), query, key, value, None, scaling=0.9, **keywords)
    expected = (0.9 * query @ key.mT).softmax(-1) @ value
    torch.testing.assert_close(output, expected.transpose(1, 2), **CLOSE)
    assert weights is None


def test_packed_rows_take_no_mask():
    _, ours = twins(BertModel, bert())
    ids, mask = reports()
    with pytest.raises(ValueError, match="BertSelfAttention: with cu_seq_lens_q"):
        packed_call(ours, ids, mask, attention_mask=torch.ones(1, sum(LENGTHS), dtype=torch.long))


def test_compiled_bert_equals_eager_mode():
    """fullgraph: no graph break, so nothing on the way looks at a tensor's values."""
    _, ours = twins(BertModel, bert())
    ids, mask = reports()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = ours(ids, attention_mask=mask).last_hidden_state
        got = compiled(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got, expected, **CLOSE)


def test_compiled_packed_bert_needs_no_graph_a_length():
    _, ours = twins(BertModel, bert())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    counts = []
    with torch.no_grad():
        for lengths in (LENGTHS, (4, 6), (9, 2, 8, 5)):
            packed = reports(lengths)
            expected = packed_call(ours, *packed)
            torch.testing.assert_close(packed_call(compiled, *packed), expected, **CLOSE)
            counts.append(len(graphs))
    assert counts == counts[:1] * 3
