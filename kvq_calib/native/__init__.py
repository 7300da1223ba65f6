"""Native kernels for the CPU: shared libraries with a C interface, one per instruction set, and the code to call them.

They are optional. :mod:`kvq_calib.codec` defines what they compute; without them, torch computes the same.
"""
