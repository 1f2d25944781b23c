"""Rows to batches: readers, sources, prompts, token ids, the order of a run."""
