"""The hashes of what was trained on have a file of their own, whatever their number."""

import copy
import json
from pathlib import Path

import pytest

from dylora import DyLoRA_MoE
from dylora.integrations.peft_import import load_peft_experts
from dylora.storage import text_hashes
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.manifest import verify
from dylora.storage.text_hashes import HASHES_FILE, hashes_in, without_hashes
from harm import seal


def hashes(begin: int, end: int) -> set[str]:
    return {f"{number:012x}" for number in range(begin, end)}


def record_of(*sources: set[str], **more) -> dict:
    """A training record whose sources have these hashes."""
    named = [
        {"name": f"set {n}", "text_hashes": " ".join(sorted(s))} for n, s in enumerate(sources)
    ]
    return {"step": 1, "data": {"max_length": 8, "sources": named}, **more}


@pytest.fixture
def saved(mixture, tmp_path):
    """A mixture that is saved with a training record, and its folder."""

    def save(record: dict, name: str = "m") -> Path:
        model = mixture()
        model.training_record = record
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_a_set_of_any_size_is_recorded_in_a_checkpoint_that_is_read(saved, llama):
    every = hashes(0, 700_000)
    folder = saved(record_of(every))
    verify(folder)
    assert (folder / HASHES_FILE).stat().st_size == 6 * len(every)
    assert (folder / "config.json").stat().st_size < 100_000
    model = DyLoRA_MoE.from_pretrained(folder, llama())
    assert hashes_in(model.training_record) == every


def test_what_earlier_runs_trained_on_is_kept_once(saved, llama, tmp_path):
    first = record_of(hashes(0, 10), hashes(5, 15))
    folder = saved(record_of(hashes(10, 30), earlier=[first, record_of(hashes(40, 50))]))
    every = hashes(0, 30) | hashes(40, 50)
    assert (folder / HASHES_FILE).stat().st_size == 6 * len(every)
    again = DyLoRA_MoE.from_pretrained(folder, llama())
    again.training_record = record_of(hashes(60, 65), earlier=[again.training_record])
    again.save_pretrained(tmp_path / "again")
    found = Checkpoint.open(tmp_path / "again").description["training"]
    assert hashes_in(found) == every | hashes(60, 65)
    assert "text_hashes" not in (tmp_path / "again" / "config.json").read_text()


def test_hashes_in_config_json_are_read_and_move_to_their_file(saved, llama, tmp_path):
    record = record_of(hashes(0, 4), earlier=[record_of(hashes(7, 9))])
    folder = saved(without_hashes(record))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"training": record}))
    seal(folder)
    model = DyLoRA_MoE.from_pretrained(folder, llama())
    assert model.training_record == record
    model.save_pretrained(tmp_path / "again")
    found = Checkpoint.open(tmp_path / "again").description["training"]
    assert hashes_in(found) == hashes(0, 4) | hashes(7, 9)
    assert without_hashes(found) == without_hashes(record)


def test_a_mixture_that_was_trained_on_nothing_known_has_no_file(saved):
    folder = saved(record_of(set()))
    assert not (folder / HASHES_FILE).exists()
    assert "text_hashes" not in Checkpoint.open(folder).description["training"]


def test_an_import_of_a_mixture_takes_its_hashes_along(saved, llama):
    folder = saved(record_of(hashes(0, 4)))
    imported = load_peft_experts(copy.deepcopy(llama()), [folder], report=lambda line: None)
    assert hashes_in(imported.training_record) == hashes(0, 4)


def test_half_a_hash_and_more_than_may_be_are_refused(saved, monkeypatch):
    folder = saved(record_of(hashes(0, 4)))
    file = folder / HASHES_FILE
    file.write_bytes(file.read_bytes()[:-1])
    seal(folder)
    with pytest.raises(ValueError, match=r"text_hashes.bin has 23 bytes, but must have 6 a hash"):
        Checkpoint.open(folder)
    monkeypatch.setattr("dylora.storage.manifest.MAX_HASHES", 12)
    with pytest.raises(ValueError, match=r"text_hashes.bin has 23 bytes, but may have 12"):
        Checkpoint.open(folder)
    monkeypatch.setattr(text_hashes, "MAX_HASHES", 12)
    with pytest.raises(ValueError, match=r"4 questions and answers .* at most 2: set stream_rows"):
        saved(record_of(hashes(0, 4)), "more")


def test_hashes_that_came_in_later_are_refused(saved):
    folder = saved(record_of(set()))
    (folder / HASHES_FILE).write_bytes(bytes(6))
    with pytest.raises(ValueError, match=r"text_hashes.bin is not in manifest.json"):
        Checkpoint.open(folder)
