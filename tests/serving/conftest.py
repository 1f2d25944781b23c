"""A mixture that speaks, on a tiny base with its tokenizer."""

import pytest
from transformers import AutoModelForCausalLM

from dylora.serving.engine import Speaker


@pytest.fixture(scope="session")
def speaker(mixture, base_folder, tokenizer) -> Speaker:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    return Speaker(mixture(base), tokenizer)
