"""Native kernels for the CPU: shared libraries with a C interface, one for each instruction set, and what calls them.

They are optional. What they compute is defined by :mod:`kvq_calib.codec`; where there is none, torch computes the same.
"""
