"""The public operators: argument checks, fake implementations for tracing, and gradients. The only caller of torch.ops."""
