"""Other formats and libraries: PEFT adapters in and out, merging, static mixtures."""
