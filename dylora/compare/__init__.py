"""Methods against each other at equal trainable parameters: the comparison that `compare` runs."""
