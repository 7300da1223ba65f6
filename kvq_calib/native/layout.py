"""Sizes of pages that the kernels are written for, equal to those of :mod:`kvq_calib.codec.packing`."""

BLOCK_TOKENS = 32
PAGE_BLOCKS = 8
PAGE_TOKENS = PAGE_BLOCKS * BLOCK_TOKENS
