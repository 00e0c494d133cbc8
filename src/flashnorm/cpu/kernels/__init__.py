"""Fused deferred-norm kernels in C++, for the CPU."""
