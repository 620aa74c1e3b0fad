"""Attention through kernels that others wrote and keep: one file per kernel, one row each in `attention.api`.

A file here says what its kernel can do (`refuses`), translates coordinates and masks into the kernel's terms, and hides
what of the kernel is not public. What attention is, and which kernel is taken, is said one room up.
"""
