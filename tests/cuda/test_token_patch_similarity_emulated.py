"""The tests of traps of token-patch similarity, softmax form, with the CUDA kernels."""

from emulated_traps import check_traps

SOFTMAX_FORM = ("-k", "(softmax or not max) and not lowest_index")


def test_traps():
    check_traps("test_token_patch_similarity_kernels.py", *SOFTMAX_FORM)
