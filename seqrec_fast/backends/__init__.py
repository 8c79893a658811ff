"""Implementations of the operators: reference (PyTorch) and triton. The native one is C++ in csrc/."""
