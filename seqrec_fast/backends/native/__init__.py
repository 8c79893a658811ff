"""Operators whose scans of the catalogue are compiled, and whose small parts are PyTorch.

An operator that is compiled as a whole is not here: its kernel is in ``csrc``, registered under its own name.
"""
