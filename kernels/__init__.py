"""Triton kernels of dhns_fast: one file an operator, kernel then launcher; no autograd, no modules."""
