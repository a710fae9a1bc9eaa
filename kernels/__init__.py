"""Triton kernels, one operator a file; installed as mpma_ext.kernels."""
