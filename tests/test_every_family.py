"""Every causal family of transformers does what its row in `docs/families.md` says."""

import pytest

from every_family import DOCUMENT, NAMES, page, row, rows_of

ROWS = rows_of(DOCUMENT.read_text(encoding="utf-8"))


def test_every_causal_family_that_transformers_knows_has_a_row():
    assert list(ROWS) == list(NAMES)
    assert page(ROWS) == DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and peft, about models and configurations
@pytest.mark.parametrize("name", NAMES)
def test_a_family_does_what_its_row_says(name):
    assert row(name) == ROWS.get(name)
