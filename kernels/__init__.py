"""Triton kernels for the layers of svd.py on a GPU: group_norm."""
