"""`docs/export.md` says of every form and reader what a run of them gives."""

from pathlib import Path

import pytest

import exports

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.mark.filterwarnings("ignore")  # of the readers, which are not ours
def test_the_document_is_what_a_run_of_all_readers_gives():
    assert DOCUMENT.read_text(encoding="utf-8") == exports.document()


@pytest.mark.filterwarnings("ignore")
def test_arrow_gives_the_same_logits_again(tmp_path):
    exported = exports.write(exports.FORMS[0], tmp_path)
    first, second = (exports.read_by_arrow(exported) for _ in range(2))
    assert first.isfinite().all()
    assert first.equal(second)
