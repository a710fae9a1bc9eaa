"""What the operators are measured against: plain PyTorch, written from the formulas.

A baseline takes an operator's operands by the operator's own names. `field` is how the field's
repositories write it, `eager` and `eager_…` the best we can write without a compiler, `compiled`
torch.compile of `eager`, `sdpa…`, `varlen` and `flex` PyTorch's fused attention, `late_interaction`
and `flash_maxsim` other projects' kernels. What is not installed or refuses raises RefusalError.
"""

from benchmarks.baselines import masked_attention, memory_attention, token_patch_similarity

BASELINES = {
    "masked_attention": masked_attention.BASELINES,
    "masked_attention_qkvpacked": masked_attention.BASELINES,
    "masked_attention_varlen": masked_attention.PACKED_BASELINES,
    "memory_attention": memory_attention.BASELINES,
    "token_patch_similarity": token_patch_similarity.BASELINES,
    "token_patch_max_similarity": token_patch_similarity.MAX_BASELINES,
}
