"""Triton kernels of what designs compute: the kernels, the operators that torch sees, and where they run in a model's place."""
