"""Runs the PTX that nvcc makes of the kernels without a GPU, translated to C++.

``translate.py`` translates PTX to C++ calls of ``semantics.h``, which implements each instruction as in the PTX ISA.
Threads are the fibers of ``tests/shim``. It detects accesses that are unaligned or outside shared memory, lanes of a
warp that wait at different instructions, and races: accesses to the same byte of shared memory, at least one of them a
write, without a barrier in between.
"""
