"""Files: PEFT's adapter format, checkpoints, exports. Tensors in and out; no modules."""
