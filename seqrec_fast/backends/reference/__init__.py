"""Plain PyTorch formulas for every operator: any device, any floating dtype, and the truth in fp64.

Each module has ``forward`` and ``backward`` written as differentiable PyTorch, so that one text serves as the opaque reference
operator, as the double backward of every backend, and as what the tests trust.
"""
