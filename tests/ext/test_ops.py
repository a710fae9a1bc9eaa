"""The public operators: choice of backend, and what PyTorch was told of them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from operator_calls import CALLS, backward_arguments, operands, operator_arguments, others, run

import mpma_ext
from mpma_ext import backends, reference

F32 = torch.float32
F64 = torch.float64


def test_every_operator_has_its_call():
    assert list(CALLS) == list(backends.OPERATORS)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("name", CALLS)
def test_reference_backend_is_the_reference(name, dtype):
    expected = run(name, operands(name, dtype), module=reference)
    for got, want in zip(
        run(name, operands(name, dtype), backend="reference"), expected, strict=True
    ):
        assert torch.equal(got, want)
        narrow = dtype not in (F32, F64)
        assert got.dtype == (F32 if name.startswith("token") and narrow else dtype)
        assert got.is_contiguous()


def outputs_and_gradients(function, name, dtype=F64):
    """Of a function of the operands by name, under the sum of squares."""
    leaves = {key: x.requires_grad_() for key, x in operands(name, dtype).items()}
    outputs = function(**leaves)
    sum((o * o).sum() for o in outputs).backward()
    return (*outputs, *(x.grad for x in leaves.values()))


@pytest.mark.parametrize("name", CALLS)
def test_cpu_backend_agrees_with_the_reference(name):
    """Same masks, same dropped elements: float64 results agree but for the order of sums."""
    results = (
        outputs_and_gradients(lambda backend=backend, **x: run(name, x, backend=backend), name)
        for backend in ("cpu", "reference")
    )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_give_shapes(name):
    arguments = others(name) | operands(name)
    elsewhere = {
        key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in arguments.items()
    }
    for got, want in zip(run(name, elsewhere), run(name, arguments), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


@pytest.mark.parametrize("name", CALLS)
def test_compiled_operators_serve_by_default(name):
    """The backward of the default call is that of the compiled kernel."""
    output = run(name, {key: x.requires_grad_() for key, x in operands(name).items()})[0]
    node = output.grad_fn
    while node is not None and "mpma" not in node.name():
        node = node.next_functions[0][0]
    assert node is not None, f"{name} was not served by torch.ops.mpma"


@pytest.mark.parametrize("name", CALLS)
def test_autocast_casts_all_but_float64(name):
    for backend in ("cpu", "reference"):
        narrow = run(name, operands(name, torch.bfloat16), backend=backend)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = run(name, operands(name), backend=backend)[0]
            double = run(name, operands(name, F64), backend=backend)[0]
        assert torch.equal(cast, narrow)
        assert double.dtype == F64


@pytest.mark.parametrize("name", CALLS)
def test_autocast_rule_of_the_operator_itself(name):
    operator = getattr(torch.ops.mpma, name)
    arguments = operator_arguments(name)
    narrow = [
        x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    ]

    def first(arguments):
        result = operator(*arguments)
        return result[0] if isinstance(result, tuple) else result

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first(arguments), first(narrow))
    assert not torch.equal(first(arguments), first(narrow))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    operator, arguments = getattr(torch.ops.mpma, name), operator_arguments(name)
    torch.library.opcheck(operator, arguments)
    leaves = len(CALLS[name].operands)
    with_gradient = [x.detach().requires_grad_() for x in arguments[:leaves]]
    torch.library.opcheck(operator, (*with_gradient, *arguments[leaves:]))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_of_the_backward(name):
    torch.library.opcheck(getattr(torch.ops.mpma, f"{name}_backward"), backward_arguments(name))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Cases share code, and the compiler gives up on code that it met in too many forms."""
    torch.compiler.reset()


# Generating code for the references' many small operations takes Inductor long: one stands for all.
@pytest.mark.parametrize(
    ("name", "backend", "compiler"),
    [
        *((name, "cpu", "inductor") for name in CALLS),
        *((name, "reference", "aot_eager") for name in CALLS),
        ("masked_attention_varlen", "reference", "inductor"),
    ],
)
def test_compiled_equals_eager(name, backend, compiler):
    """fullgraph, forward and backward, in float64 so that only the order of sums differs."""

    def function(**leaves):
        return run(name, leaves, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    eager = outputs_and_gradients(function, name)
    for got, want in zip(outputs_and_gradients(compiled, name), eager, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


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


@pytest.mark.parametrize("name", CALLS)
def test_second_derivative_raises(name):
    leaves = {key: x.requires_grad_() for key, x in operands(name).items()}
    outputs = run(name, leaves, backend="cpu")
    loss = sum((o * o).sum() for o in outputs)
    (gradient, *_) = torch.autograd.grad(loss, leaves.values(), create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: the kernels.* backward has no derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["masked_attention", "memory_attention"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_seed_from_the_default_generator(name, backend):
    """No seed draws one, repeatably under manual_seed; without dropout nothing is drawn."""
    drawn = operands(name)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(run(name, drawn, backend=backend, dropout_seed=None)[0])
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], run(name, drawn, backend=backend, dropout_seed=None)[0])
    before = torch.get_rng_state()
    run(name, drawn, backend=backend, dropout_p=0.0, dropout_seed=None)
    assert torch.equal(torch.get_rng_state(), before)
    as_tensor = run(name, drawn, backend=backend, dropout_seed=torch.tensor([5]))[0]
    assert torch.equal(as_tensor, run(name, drawn, backend=backend, dropout_seed=5)[0])


def test_use_backend_is_the_argument_as_a_context():
    query, key, value = operands("masked_attention").values()
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
    query, key, value = operands("masked_attention", F64).values()
    function = torch.compile(mpma_ext.masked_attention, fullgraph=True, backend="aot_eager")
    expected = mpma_ext.masked_attention(query, key, value)
    for backend in ("reference", "cpu"):
        with mpma_ext.use_backend(backend):
            torch.testing.assert_close(function(query, key, value), expected)


def test_torch_backend_is_taken_by_name_only_where_masks_may_hide_nan():
    query, key, value = operands("masked_attention", F64).values()
    mask = others("masked_attention")["key_padding_mask"]
    expected = mpma_ext.masked_attention(query, key, value, key_padding_mask=mask)
    by_name = mpma_ext.masked_attention(query, key, value, key_padding_mask=mask, backend="torch")
    torch.testing.assert_close(by_name, expected)
    value[0, 1] = torch.nan
    assert mpma_ext.masked_attention(query, key, value, key_padding_mask=mask).isfinite().all()


def test_torch_backend_serves_the_dense_memory():
    query, key, value = operands("memory_attention", F64).values()
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
    assert all(name in text for name in (*CALLS, torch.__version__, *available))


def instructions(**limits):
    """What the report of a process of its own says it uses under these variables alone."""
    others = {k: v for k, v in os.environ.items() if not k.endswith(("CPU_CAPABILITY", "CPU_ISA"))}
    done = subprocess.run(
        [sys.executable, "-m", "mpma_ext"],
        env=others | limits,
        capture_output=True,
        text=True,
        check=True,
    )
    return re.search(r"^CPU .* threads, (.*)$", done.stdout, re.MULTILINE)[1]


def test_the_report_names_the_instructions_in_use():
    fastest = instructions()
    assert instructions(ATEN_CPU_CAPABILITY="default") == "portable vectors"
    assert instructions(ATEN_CPU_CAPABILITY="avx2") in ("AVX2", "portable vectors")
    without_amx = fastest.removesuffix(" and AMX")
    assert instructions(ONEDNN_MAX_CPU_ISA="avx512_core_bf16") == without_amx
    assert instructions(ONEDNN_MAX_CPU_ISA="avx512_core_amx") == fastest


def test_a_backend_that_is_not_there_says_why():
    reasons = {"cuda": "serves cuda tensors", "triton": "under TRITON_INTERPRET=1"}
    for backend, reason in reasons.items():
        for name in CALLS:
            with pytest.raises(ValueError, match=f'{name}: backend="{backend}".*{reason}'):
                run(name, operands(name), backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_memory_serves_any_leading_dimensions(backend):
    query, key, value = operands("memory_attention").values()
    expected = mpma_ext.memory_attention(query, key, value, backend=backend)
    for shape in ((2, 3, 2, 8), (1, 6, 1, 2, 8)):
        output = mpma_ext.memory_attention(query.view(shape), key, value, backend=backend)
        assert torch.equal(output, expected.view(shape))
    one = mpma_ext.memory_attention(query[0], key, value, backend=backend)
    torch.testing.assert_close(one, expected[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_operands(backend):
    masked = {"backend": backend}
    q, k, bank = rand(2, 3, 2, 8), rand(2, 4, 2, 8), rand(9, 2, 8)
    tokens, patches = rand(2, 4, 8), rand(3, 5, 8)
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
