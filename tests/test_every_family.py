"""Every causal family of transformers does what its row in `docs/families.md` says."""

import pytest

from every_family import DOCUMENT, NAMES, page, row, rows_of

ROWS = rows_of(DOCUMENT.read_text(encoding="utf-8"))


def test_every_causal_family_that_transformers_knows_has_a_row():
    assert list(ROWS) == list(NAMES)
    assert page(ROWS) == DOCUMENT.read_text(encoding="utf-8")


# Run every time: each holds something else in its blocks.
OFTEN = (
    "llama",
    "gemma2",
    "gpt2",
    "qwen2_moe",
    "qwen3_next",
    "gpt_oss",
    "nemotron_h",
    "deepseek_v3",
)


@pytest.mark.filterwarnings("ignore")  # of transformers and peft, about models and configurations
@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_a_family_does_what_its_row_says(name):
    assert row(name) == ROWS.get(name)
