"""What measures must be able to fail: slow contestants, wrong ones, and sets that miss a goal."""

import time

import pytest
import torch

from benchmarks import flops
from benchmarks.__main__ import SCRIPTS
from benchmarks.baselines import BASELINES
from benchmarks.flops import Work
from benchmarks.goals import GOALS
from benchmarks.lengths import padding_mask, report_lengths
from benchmarks.machine import gemm_gflops, slug
from benchmarks.peak_memory import peak_extra_bytes
from benchmarks.problem import assert_same
from benchmarks.sets import SETS
from benchmarks.shapes import TRAINING
from benchmarks.timing import paired, wall_clock


def sleeper(seconds):
    return lambda: time.sleep(seconds)


@pytest.mark.parametrize(("ours", "baseline"), [(0.03, 0.003), (0.003, 0.03)])
def test_the_ratio_tells_the_slow_from_the_fast(benchmark, ours, baseline):
    pairs = paired(benchmark, wall_clock, sleeper(ours), sleeper(baseline), seconds=0.1)
    assert len(pairs.ours) == len(pairs.baseline) >= 1
    # Sleeping may take longer than asked for, hence not ten times.
    assert ((pairs.ratios < 0.5) if ours > baseline else (pairs.ratios > 2)).all()


def test_the_same_results_pass_and_others_do_not():
    right = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    assert_same([right + 1e-5], [right], "float32")
    one_flip = right.clone()
    one_flip[3, 5] = 9.0
    assert_same([one_flip], [right], "float32")
    one_row = right.clone()
    one_row[7] = 0.0  # 2 % of the entries
    for wrong in (one_row, right * 1.01, torch.full_like(right, torch.nan)):
        with pytest.raises(AssertionError, match="result 0"):
            assert_same([wrong], [right], "float32")
    assert_same([right * 1.01], [right], "bfloat16")
    with pytest.raises(AssertionError, match="result 0"):
        assert_same([right], [torch.full_like(right, torch.nan)], "bfloat16")


@pytest.mark.skipif(
    peak_extra_bytes(lambda: None, "cpu") is None, reason="the platform does not tell"
)
def test_peak_memory_counts_what_is_freed_again():
    count = 2**24
    peak = peak_extra_bytes(lambda: torch.ones(count).sum(), "cpu")
    assert 0.9 * 4 * count < peak < 1.5 * 4 * count
    assert peak_extra_bytes(lambda: torch.ones(8).sum(), "cpu") < 0.1 * 4 * count


def test_names_of_devices():
    assert slug("AMD EPYC 7B13 64-Core Processor, 2 threads") == (
        "amd-epyc-7b13-64-core-processor-2-threads"
    )
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("Intel(R) Xeon(R) @ 2.20GHz") == "intel-r-xeon-r-2-20ghz"


def test_the_quick_set_is_what_the_goals_need():
    cases = list(SETS["quick"]())
    assert len(set(cases)) == len(cases)
    assert {(case.dtype, case.mode) for case in cases} == {("float32", TRAINING)}
    needed = {(goal.operator, goal.shape, name) for goal in GOALS for name in goal.against}
    assert {(case.operator, case.shape, case.baseline) for case in cases} == needed


@pytest.mark.parametrize("name", SETS)
def test_every_case_has_a_script_and_a_baseline(name):
    cases = list(SETS[name]())
    assert len(set(map(str, cases))) <= len(cases) == len(set(cases))
    for case in cases:
        assert case.operator in SCRIPTS
        assert case.operator == "training_step" or case.baseline in BASELINES[case.operator]


def test_operations_counted_by_hand():
    # 3 queries on 2 real keys, 1 head of width 5: 6 pairs, 2·5 for a score and as much for a sum.
    assert flops.attention(6, 1, 5, backward=False) == Work(6 * 20, 6 * 20)
    # Four gradients more, and the scores again.
    assert flops.attention(6, 1, 5, backward=True) == Work(3 * 6 * 20, 7 * 6 * 10)
    # 4 rows, 9 slots, 2 kept.
    assert flops.memory(4, 1, 5, 9, 2, backward=False) == Work(4 * 10 * (9 + 2), 4 * 10 * (9 + 2))
    kept = Work(4 * 10 * (9 + 2 + 8), 4 * 10 * (9 + 2 + 10))
    assert flops.memory(4, 1, 5, 9, 2, backward=True) == kept
    # Dense: a backward of twice the forward.
    dense = [flops.memory(4, 1, 5, 9, None, backward=backward) for backward in (False, True)]
    assert dense == [Work(4 * 10 * 18, 4 * 10 * 18), Work(3 * 4 * 10 * 18, 4 * 10 * 7 * 9)]
    # 6 tokens, 2 images of 5 patches of width 2: c by itself, u = 2·6·2·5·2 operations a product.
    u = 240
    assert flops.similarity(6, 2, 5, 2, backward=False) == Work(2 * u, 2 * u)
    assert flops.similarity(6, 2, 5, 2, backward=True) == Work(6 * u, 8 * u)
    # Of width 12, by the Gram matrix: 2·6·2·5·5 for a product with it, 2·2·5·5·12 to form it.
    u, gram, matrix = 1440, 600, 1200
    forward = u + gram // 2 + matrix // 2
    assert flops.similarity(6, 2, 5, 12, backward=False) == Work(forward, forward)
    # The scores, the product and the matrix again; the product's and the matrix's gradients.
    done = 4 * u + 2 * gram + 2 * matrix
    assert flops.similarity(6, 2, 5, 12, backward=True) == Work(
        3 * u + 3 * gram // 2 + 3 * matrix // 2, done
    )
    every = [(t, p, d) for t in (8, 64) for p in (49, 196, 361) for d in (64, 128, 768)]
    for tokens, patches, width in every:
        for backward in (False, True):
            work = flops.similarity(16 * tokens, 16, patches, width, backward=backward)
            assert work.needed <= work.done
    # 2 reports of 6 tokens in all: 12 maxima over patches, 12 over tokens.
    most = 36 * 10 + 4 * 24 * 5
    assert flops.max_similarity(2, 6, 2, 3, 5, backward=True) == Work(most, most)


def test_lengths_of_reports_are_those_of_open_i():
    lengths = torch.tensor(report_lengths(4000)).double()
    median, high = lengths.quantile(0.5).item(), lengths.quantile(0.95).item()
    # Standard errors of the two quantiles of 4,000 draws are 0.4 and 1.5 tokens.
    assert abs(median - 41) < 2 and abs(high - 91) < 6
    assert lengths.min() >= 1 and lengths.max() <= 256
    assert report_lengths(4000) == report_lengths(4000)


def test_padding_leaves_at_least_half():
    mask = padding_mask(500, 9)
    lengths = mask.sum(1)
    assert mask.shape == (500, 9) and lengths.min() == 5 and lengths.max() == 9
    assert torch.equal(mask, torch.arange(9) < lengths[:, None])


def test_the_gemm_rate_is_that_of_the_fastest_way(monkeypatch):
    monkeypatch.setitem(gemm_gflops.__globals__["GEMM_SIDE"], "cpu", 64)
    for dtype in (torch.float32, torch.bfloat16):
        assert gemm_gflops("cpu", dtype, wall_clock) > 0
