"""The low-rank experts of a base: stacked tensors, hooks, and their life."""
