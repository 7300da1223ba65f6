"""What nvcc makes of the kernels, run without a GPU: PTX translated to C++.

``translate.py`` turns PTX into C++ that calls ``semantics.h``, which says what each instruction does, in the words of
the PTX ISA. Threads are the fibers of ``tests/shim``. Found are: accesses that are not aligned or outside shared
memory,
lanes of a warp that wait at different instructions, and accesses to the same byte of shared memory, one a write, that
no barrier separates.
"""
