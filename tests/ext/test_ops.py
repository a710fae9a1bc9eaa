"""The public operators: errors, choice of backend, and what PyTorch was told of them."""

import pytest
import torch

import mpma_ext
from mpma_ext import reference

F32 = torch.float32


def rand(*shape, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


MASK = torch.tensor([[True, False, True, True], [True] * 4])
CU = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
# name -> floating operands, other positional arguments, keywords
CASES = {
    "masked_attention": (
        lambda dtype=F32: tuple(rand(2, n, 2, 8, dtype=dtype) for n in (3, 4, 4)),
        (),
        {"key_padding_mask": MASK, "dropout_p": 0.3, "dropout_seed": 5},
    ),
    "masked_attention_qkvpacked": (
        lambda dtype=F32: (rand(2, 4, 3, 2, 8, dtype=dtype),),
        (),
        {"key_padding_mask": MASK, "dropout_p": 0.3, "dropout_seed": 5},
    ),
    "masked_attention_varlen": (
        lambda dtype=F32: tuple(rand(6, 2, 8, dtype=dtype, seed=n) for n in range(3)),
        (CU, CU, 3, 4),
        {"dropout_p": 0.3, "dropout_seed": 5},
    ),
    "memory_attention": (
        lambda dtype=F32: (
            rand(2, 3, 2, 8, dtype=dtype),
            *(rand(9, 2, 8, dtype=dtype, seed=n) for n in (1, 2)),
        ),
        (),
        {"topk": 4, "dropout_p": 0.3, "dropout_seed": 5},
    ),
    "token_patch_similarity": (
        lambda dtype=F32: (rand(2, 4, 8, dtype=dtype), rand(3, 5, 8, dtype=dtype)),
        (),
        {"token_mask": MASK},
    ),
    "token_patch_max_similarity": (
        lambda dtype=F32: (rand(2, 4, 8, dtype=dtype), rand(3, 5, 8, dtype=dtype)),
        (),
        {"token_mask": MASK},
    ),
}


def call(name, operands, **overrides):
    _, arguments, keywords = CASES[name]
    result = getattr(mpma_ext, name)(*operands, *arguments, **{**keywords, **overrides})
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_reference_backend_is_the_reference(name, dtype):
    make, arguments, keywords = CASES[name]
    expected = getattr(reference, name)(*make(dtype), *arguments, **keywords)
    for got, want in zip(
        call(name, make(dtype), backend="reference"),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        assert torch.equal(got, want)
        narrow = dtype not in (F32, torch.float64)
        assert got.dtype == (F32 if name.startswith("token") and narrow else dtype)
        assert got.is_contiguous()


@pytest.mark.parametrize("name", CASES)
def test_cpu_backend_agrees_with_the_reference(name):
    """Same masks, same dropped elements: float64 results agree but for the order of sums."""
    make, _, _ = CASES[name]
    results = {}
    for backend in ("cpu", "reference"):
        operands = [x.requires_grad_() for x in make(torch.float64)]
        outputs = call(name, operands, backend=backend)
        sum((o * o).sum() for o in outputs).backward()
        results[backend] = (*outputs, *(x.grad for x in operands))
    for got, want in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_give_shapes(name):
    make, arguments, keywords = CASES[name]
    elsewhere = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    options = {k: x.to("meta") if k.endswith("mask") else x for k, x in keywords.items()}
    results = getattr(mpma_ext, name)(*(x.to("meta") for x in make()), *elsewhere, **options)
    results = results if isinstance(results, tuple) else (results,)
    for got, want in zip(results, call(name, make()), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


@pytest.mark.parametrize("name", CASES)
def test_compiled_operators_serve_by_default(name):
    """The backward of the default call is that of the compiled kernel."""
    make, _, _ = CASES[name]
    operands = [x.requires_grad_() for x in make()]
    output = call(name, operands)[0]
    node = output.grad_fn
    while node is not None and "mpma" not in node.name():
        node = node.next_functions[0][0]
    assert node is not None, f"{name} was not served by torch.ops.mpma"


@pytest.mark.parametrize("name", CASES)
def test_autocast_casts_all_but_float64(name):
    make, _, _ = CASES[name]
    for backend in ("cpu", "reference"):
        narrow = call(name, make(torch.bfloat16), backend=backend)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = call(name, make(), backend=backend)[0]
            double = call(name, make(torch.float64), backend=backend)[0]
        assert torch.equal(cast, narrow)
        assert double.dtype == torch.float64


def test_autocast_rule_of_the_operator_itself():
    tokens, patches = rand(2, 4, 8), rand(3, 5, 8)
    operator = torch.ops.mpma.token_patch_similarity
    narrow = operator(tokens.bfloat16(), patches.bfloat16(), None, None, 4.0, 5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator(tokens, patches, None, None, 4.0, 5.0), narrow)
    assert not torch.equal(operator(tokens, patches, None, None, 4.0, 5.0), narrow)


# Every operator as torch.ops.mpma knows it, forward and backward, on permuted dense operands.
def operator_calls():
    seed = torch.tensor([7])
    attention = [rand(2, 2, n, 8, seed=n).transpose(1, 2) for n in (3, 4, 4)]
    packed = [rand(2, 6, 8, seed=n).transpose(0, 1) for n in range(3)]
    qkv = rand(2, 3, 4, 2, 8).transpose(1, 2)
    bank = [rand(6, 2, 8), rand(9, 2, 8, seed=1), rand(9, 2, 8, seed=2)]
    tokens, patches = rand(4, 2, 8).transpose(0, 1), rand(3, 5, 8)
    return {
        "masked_attention": ((*attention, MASK, 0.3, 0.2, seed), 3),
        "masked_attention_qkvpacked": ((qkv, MASK, 0.3, 0.2, seed), 1),
        "masked_attention_varlen": ((*packed, CU, CU, 3, 3, 0.3, 0.2, seed), 3),
        "memory_attention": ((*bank, 4, 0.3, 0.2, seed), 3),
        "token_patch_similarity": ((tokens, patches, MASK, None, 4.0, 5.0), 2),
        "token_patch_max_similarity": ((tokens, patches, MASK, None), 2),
    }


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    arguments, leaves = operator_calls()[name]
    operator = getattr(torch.ops.mpma, name)
    torch.library.opcheck(operator, arguments)
    with_gradient = [x.detach().requires_grad_() for x in arguments[:leaves]]
    torch.library.opcheck(operator, (*with_gradient, *arguments[leaves:]))


@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_the_backward(name):
    arguments, leaves = operator_calls()[name]
    result = getattr(torch.ops.mpma, name)(*arguments)
    outputs = result if isinstance(result, tuple) else (result,)
    operands, rest = arguments[:leaves], arguments[leaves:]
    if name == "token_patch_similarity":
        arguments = (torch.ones_like(result), *operands, *rest, True, False)
    elif name == "token_patch_max_similarity":
        ones = [torch.ones_like(x) for x in outputs[:2]]
        arguments = (*ones, *operands, *rest, *outputs[2:], False, True)
    elif name == "masked_attention_qkvpacked":
        arguments = (torch.ones_like(outputs[0]), *operands, *outputs, *rest)
    else:
        rest = rest[1:] if name == "memory_attention" else rest  # the backward needs no topk
        arguments = (torch.ones_like(outputs[0]), *operands, *outputs, *rest, True, False, True)
    torch.library.opcheck(getattr(torch.ops.mpma, f"{name}_backward"), arguments)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Cases share code, and the compiler gives up on code that it met in too many forms."""
    torch.compiler.reset()


def compiled(name, backend, compiler):
    _, arguments, keywords = CASES[name]

    def function(*operands):
        return getattr(mpma_ext, name)(*operands, *arguments, **keywords, backend=backend)

    return torch.compile(function, fullgraph=True, backend=compiler)


# Generating code for the references' many small operations takes Inductor long: one stands for all.
@pytest.mark.parametrize(
    ("name", "backend", "compiler"),
    [
        *((name, "cpu", "inductor") for name in CASES),
        *((name, "reference", "aot_eager") for name in CASES),
        ("masked_attention_varlen", "reference", "inductor"),
    ],
)
def test_compiled_equals_eager(name, backend, compiler):
    """fullgraph, forward and backward, in float64 so that only the order of sums differs."""
    make, _, _ = CASES[name]
    results = []
    for function in (lambda *x: call(name, x, backend=backend), compiled(name, backend, compiler)):
        operands = [x.requires_grad_() for x in make(torch.float64)]
        outputs = function(*operands)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum((o * o).sum() for o in outputs).backward()
        results.append((*outputs, *(x.grad for x in operands)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_no_graph_a_length():
    """After the second length, dynamic shapes serve every further one."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    function = torch.compile(
        lambda q, k, m: mpma_ext.masked_attention(q, k, k, key_padding_mask=m),
        fullgraph=True,
        backend=count,
    )
    for length in (5, 7, 8, 11, 13):
        function(rand(2, 3, 2, 8), rand(2, length, 2, 8), torch.ones(2, length, dtype=torch.bool))
    assert len(graphs) <= 2


@pytest.mark.parametrize("name", CASES)
def test_second_derivative_raises(name):
    make, _, _ = CASES[name]
    operands = [x.requires_grad_() for x in make()]
    outputs = call(name, operands, backend="cpu")
    loss = sum((o * o).sum() for o in outputs)
    (gradient,) = torch.autograd.grad(loss, operands[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: the compiled backward has no derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["masked_attention", "memory_attention"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_seed_from_the_default_generator(name, backend):
    """No seed draws one, repeatably under manual_seed; without dropout nothing is drawn."""
    make, _, _ = CASES[name]
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(call(name, make(), backend=backend, dropout_seed=None)[0])
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], call(name, make(), backend=backend, dropout_seed=None)[0])
    before = torch.get_rng_state()
    call(name, make(), backend=backend, dropout_p=0.0, dropout_seed=None)
    assert torch.equal(torch.get_rng_state(), before)
    as_tensor = call(name, make(), backend=backend, dropout_seed=torch.tensor([5]))[0]
    assert torch.equal(as_tensor, call(name, make(), backend=backend, dropout_seed=5)[0])


def test_use_backend_is_the_argument_as_a_context():
    query, key, value = CASES["masked_attention"][0]()
    with mpma_ext.use_backend("torch"):
        with pytest.raises(ValueError, match="dropout_seed stands for"):
            mpma_ext.masked_attention(query, key, value, dropout_p=0.1)
        # An argument is nearer than the context.
        mpma_ext.masked_attention(query, key, value, dropout_p=0.1, backend="reference")
        with mpma_ext.use_backend("reference"):
            mpma_ext.masked_attention(query, key, value, dropout_p=0.1)
        with pytest.raises(ValueError, match="dropout_seed stands for"):
            mpma_ext.masked_attention(query, key, value, dropout_p=0.1)
    mpma_ext.masked_attention(query, key, value, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"backend must be one of .*'fast'"):
        mpma_ext.use_backend("fast").__enter__()


def test_use_backend_under_compile():
    query, key, value = CASES["masked_attention"][0](torch.float64)
    function = torch.compile(mpma_ext.masked_attention, fullgraph=True, backend="aot_eager")
    expected = mpma_ext.masked_attention(query, key, value)
    for backend in ("reference", "cpu"):
        with mpma_ext.use_backend(backend):
            torch.testing.assert_close(function(query, key, value), expected)


def test_torch_backend_is_taken_by_name_only_where_masks_may_hide_nan():
    query, key, value = CASES["masked_attention"][0](torch.float64)
    expected = mpma_ext.masked_attention(query, key, value, key_padding_mask=MASK)
    by_name = mpma_ext.masked_attention(query, key, value, key_padding_mask=MASK, backend="torch")
    torch.testing.assert_close(by_name, expected)
    value[0, 1] = torch.nan
    assert mpma_ext.masked_attention(query, key, value, key_padding_mask=MASK).isfinite().all()


def test_torch_backend_serves_the_dense_memory():
    query, key, value = CASES["memory_attention"][0](torch.float64)
    expected = mpma_ext.memory_attention(query, key, value, backend="reference")
    output = mpma_ext.memory_attention(query, key, value, backend="torch")
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous()
    with pytest.raises(ValueError, match="no fused attention over the topk"):
        mpma_ext.memory_attention(query, key, value, topk=3, backend="torch")


def test_available_backends_and_report():
    available = mpma_ext.available_backends()
    assert {"cpu", "torch", "reference"} <= set(available)
    assert ("cuda" in available) <= torch.cuda.is_available()
    from mpma_ext.env import report

    text = report()
    assert all(name in text for name in (*CASES, torch.__version__, *available))


def test_a_backend_that_is_not_there_says_why():
    for backend, reason in (("cuda", "serves cuda tensors"), ("triton", "no triton")):
        for name, (make, _, _) in CASES.items():
            with pytest.raises(ValueError, match=f'{name}: backend="{backend}".*{reason}'):
                call(name, make(), backend=backend)


q, k = rand(2, 3, 2, 8), rand(2, 4, 2, 8)
packed = rand(6, 2, 8)
bank = rand(9, 2, 8)
tokens, patches = rand(2, 4, 8), rand(3, 5, 8)
BAD = {
    "query must have shape (B, Sq, H, D)": lambda: mpma_ext.masked_attention(packed, k, k),
    "key must have shape (B, Sk, H, D) = (2, any, 2, 8), got (1, 4, 2, 8)": (
        lambda: mpma_ext.masked_attention(q, k[:1], k)
    ),
    "value must have shape (B, Sk, H, D) = (2, 4, 2, 8), got (2, 4, 2, 5)": (
        lambda: mpma_ext.masked_attention(q, k, k[..., :5])
    ),
    "key must have query's dtype torch.float32, got torch.float64": (
        lambda: mpma_ext.masked_attention(q, k.double(), k.double())
    ),
    "query must be float32, bfloat16, float16 or float64, got torch.int64": (
        lambda: mpma_ext.masked_attention(q.long(), k, k)
    ),
    "value must be a tensor, got list": lambda: mpma_ext.masked_attention(q, k, [1.0]),
    "key must be on the device of query, cpu, got meta": (
        lambda: mpma_ext.masked_attention(q, k.to("meta"), k)
    ),
    "key_padding_mask must be a bool tensor (True = attend, real), got torch.float32": (
        lambda: mpma_ext.masked_attention(q, k, k, key_padding_mask=torch.ones(2, 4))
    ),
    "key_padding_mask must have shape (B, Sk) = (2, 4), got (2, 3)": (
        lambda: mpma_ext.masked_attention(q, k, k, key_padding_mask=MASK[:, :3])
    ),
    "dropout_p must be in [0, 1), got 1.0": (
        lambda: mpma_ext.masked_attention(q, k, k, dropout_p=1.0)
    ),
    "dropout_p must be in [0, 1), got -0.5": (
        lambda: mpma_ext.memory_attention(q, bank, bank, dropout_p=-0.5)
    ),
    "dropout_seed must be an int, a one-element int64 tensor or None, got torch.int32": (
        lambda: mpma_ext.masked_attention(
            q, k, k, dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int32)
        )
    ),
    "qkv must have shape (B, S, 3, H, D) = (any, any, 3, any, any), got (2, 4, 2, 8)": (
        lambda: mpma_ext.masked_attention_qkvpacked(k)
    ),
    "cu_seqlens_q must be an int32 tensor of shape (B + 1,), got torch.int64": (
        lambda: mpma_ext.masked_attention_varlen(packed, packed, packed, CU.long(), CU, 3, 3)
    ),
    "cu_seqlens_k must have shape (B + 1,) = (4,), got (3,)": (
        lambda: mpma_ext.masked_attention_varlen(packed, packed, packed, CU, CU[:3], 3, 3)
    ),
    "max_seqlen_k must be an int >= 0, got -1": (
        lambda: mpma_ext.masked_attention_varlen(packed, packed, packed, CU, CU, 3, -1)
    ),
    "query must have shape (..., H, D), got (8,)": (
        lambda: mpma_ext.memory_attention(q[0, 0, 0], bank, bank)
    ),
    "memory_key must have shape (N, H, D) = (any, 2, 8), got (9, 2, 4)": (
        lambda: mpma_ext.memory_attention(q, bank[..., :4], bank)
    ),
    "memory_value must have shape (N, H, D) = (9, 2, 8), got (8, 2, 8)": (
        lambda: mpma_ext.memory_attention(q, bank, bank[:8])
    ),
    "memory_key must hold at least one slot, got 0": (
        lambda: mpma_ext.memory_attention(q, bank[:0], bank[:0])
    ),
    "topk must be an int >= 1 or None, got 0": (
        lambda: mpma_ext.memory_attention(q, bank, bank, topk=0)
    ),
    "topk must be an int >= 1 or None, got 2.0": (
        lambda: mpma_ext.memory_attention(q, bank, bank, topk=2.0)
    ),
    "patches must have shape (Bi, P, D) = (any, any, 8), got (3, 5, 6)": (
        lambda: mpma_ext.token_patch_similarity(tokens, patches[..., :6])
    ),
    "token_mask must have shape (Bt, T) = (2, 4), got (2, 3)": (
        lambda: mpma_ext.token_patch_max_similarity(tokens, patches, token_mask=MASK[:, :3])
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert message in str(error.value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_operands(backend):
    masked = {"backend": backend}
    assert mpma_ext.masked_attention(q[:0], k[:0], k[:0], **masked).shape == (0, 3, 2, 8)
    assert mpma_ext.masked_attention(q[:, :0], k, k, **masked).shape == (2, 0, 2, 8)
    no_keys = mpma_ext.masked_attention(q, k[:, :0], k[:, :0], **masked)
    assert no_keys.shape == q.shape and no_keys.abs().max() == 0
    assert mpma_ext.memory_attention(q[:0], bank, bank, topk=2, **masked).shape == (0, 3, 2, 8)
    for function in (mpma_ext.token_patch_similarity, mpma_ext.token_patch_max_similarity):
        for w, v in ((tokens[:0], patches), (tokens, patches[:0])):
            result = function(w, v, **masked)
            result = result if isinstance(result, tuple) else (result,)
            assert all(x.shape == (len(w), len(v)) for x in result)
        for w, v in ((tokens[:, :0], patches), (tokens, patches[:, :0])):
            result = function(w, v, **masked)
            result = result if isinstance(result, tuple) else (result,)
            assert all(torch.equal(x, torch.zeros(2, 3)) for x in result)
