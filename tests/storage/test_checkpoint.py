"""A folder is whole or absent, damage is found and named, and a mixture comes back as it was."""

import copy
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dylora import DyLoRA_MoE, ExpertMaturity, MoELoraConfig
from dylora.model_io import load_model
from dylora.storage import manifest
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.folders import (
    checkpoints,
    latest_checkpoint,
    quarantine,
    recover,
    rotate,
    write_file,
    write_folder,
)
from dylora.storage.manifest import MANIFEST, NOTES, is_intact, verify, write_manifest
from dylora.storage.peft_config import CONFIG_FILE
from harm import seal


def write_text(text):
    """A `write_files` of two files, one of them nested."""

    def write_files(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text * 2)

    return write_files


def write_half(folder):
    """A `write_files` that breaks off."""
    (folder / "b.txt").write_text("half")
    raise OSError("no space left on device")


def content(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in written_files(folder)}


def written_files(folder):
    """All but cards, which anybody may write on."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOTES)


def flip_bit(file, position, bit=0):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(bytes(data))


# Writing


def test_blocks_that_followed_another_router_are_not_trained_further(mixture, tmp_path):
    mixture(router_scope="shared").save_pretrained(tmp_path / "saved")
    checkpoint = Checkpoint.open(tmp_path / "saved")
    checkpoint.description["sites"].reverse()  # as of a base that registers an MLP first
    with pytest.raises(ValueError, match=r"its blocks follow the router at .*cannot be trained fu"):
        load_model(mixture(router_scope="shared").experts, checkpoint)
    load_model(mixture(router_scope="shared").experts, Checkpoint.open(tmp_path / "saved"))


def test_a_written_folder_is_whole(tmp_path):
    write_folder(tmp_path / "new", write_text("one"))
    verify(tmp_path / "new")
    assert content(tmp_path / "new").keys() == {"inner/a.txt", "b.txt", MANIFEST}


def test_nothing_lies_beside_a_written_folder(tmp_path):
    write_folder(tmp_path / "new", write_text("one"))
    write_folder(tmp_path / "new", write_text("two"))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_full_disk_is_an_os_error_also_where_safetensors_meets_it(tmp_path):
    def write(folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=r"could not be written: .*No space left"):
        write_folder(tmp_path / "new", write)
    assert list(tmp_path.iterdir()) == []


def test_missing_parents_are_made(tmp_path):
    folder = tmp_path / "runs" / "first" / "new"
    write_folder(folder, write_text("one"))
    assert is_intact(folder)


def test_an_exception_leaves_no_folder(tmp_path):
    with pytest.raises(OSError, match="no space left"):
        write_folder(tmp_path / "new", write_half)
    assert not (tmp_path / "new").exists()


def test_an_exception_does_not_harm_the_older_folder(tmp_path):
    write_folder(tmp_path / "new", write_text("one"))
    before = content(tmp_path / "new")
    with pytest.raises(OSError, match="no space left"):
        write_folder(tmp_path / "new", write_half)
    assert content(tmp_path / "new") == before


def test_a_broken_write_gives_its_space_back(tmp_path):
    """Else a full disk stays full: no later step writes a folder of the same name."""
    with pytest.raises(OSError, match="no space left"):
        write_folder(tmp_path / "checkpoint-1", write_half)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_an_interrupted_write_are_cleaned_by_the_next(tmp_path):
    write_folder(tmp_path / ".new.replaced", write_text("an older one"))
    (tmp_path / ".new.writing" / "inner").mkdir(parents=True)
    (tmp_path / ".new.writing" / "stale.txt").write_text("stale")
    write_folder(tmp_path / "new", write_text("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert "stale.txt" not in content(tmp_path / "new")


def test_our_own_folder_is_replaced_as_a_whole(tmp_path):
    write_folder(tmp_path / "new", lambda folder: (folder / "old.txt").write_text("old"))
    write_folder(tmp_path / "new", write_text("two"))
    verify(tmp_path / "new")
    assert content(tmp_path / "new").keys() == {"inner/a.txt", "b.txt", MANIFEST}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "new").mkdir()
    write_folder(tmp_path / "new", write_text("one"))
    assert is_intact(tmp_path / "new")


FOREIGN = {
    "no manifest": {"thesis.txt": "years of work"},
    # Web applications, browser extensions and many tools call a file of theirs so.
    "a manifest of its own": {MANIFEST: '{"name": "my app"}', "thesis.txt": "years of work"},
    "a manifest that is no object": {MANIFEST: "[1, 2]", "thesis.txt": "years of work"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_folder_is_refused_and_untouched(kind, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name, text in FOREIGN[kind].items():
        (folder / name).write_text(text)
    before = content(folder)
    with pytest.raises(FileExistsError) as error:
        write_folder(folder, write_text("one"))
    assert str(folder) in str(error.value)
    assert content(folder) == before


def test_a_saved_mixture_is_replaced_only_when_asked(saved, tiny_base, mixture_on):
    _, folder = saved
    before = content(folder)
    model = mixture_on(tiny_base("llama"))
    with pytest.raises(FileExistsError, match=r"holds an earlier result: .*overwrite=True"):
        model.save_pretrained(folder)
    assert content(folder) == before
    model.save_pretrained(folder, overwrite=True)
    assert content(folder) != before


def test_a_training_checkpoint_is_replaced_by_no_result(saved, tiny_base, mixture_on):
    _, folder = saved
    (folder / "trainer_state.json").write_text("{}")
    write_manifest_anew(folder)
    before = content(folder)
    for place in (folder, folder / "mine"):
        with pytest.raises(FileExistsError, match=r"is a checkpoint|lies in the checkpoint"):
            mixture_on(tiny_base("llama")).save_pretrained(place, overwrite=True)
    assert content(folder) == before


def test_a_runs_folder_is_replaced_by_no_result(run_folder, tiny_base, mixture_on):
    with pytest.raises(FileExistsError, match="exists and is no result of ours"):
        mixture_on(tiny_base("llama")).save_pretrained(run_folder, overwrite=True)


def test_a_file_in_the_place_of_the_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "new").write_text("years of work")
    with pytest.raises(FileExistsError) as error:
        write_folder(tmp_path / "new", write_text("one"))
    assert str(tmp_path / "new") in str(error.value)
    assert (tmp_path / "new").read_text() == "years of work"


class Interrupted(BaseException):
    """As KeyboardInterrupt: no `except Exception` sees it."""


@pytest.fixture
def break_at(monkeypatch):
    """Makes the n-th operation on the disk raise, and all the later ones of the same write."""

    def arm(point):
        calls = 0

        def wrap(owner, name):
            original = getattr(owner, name)

            def operation(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= point:
                    raise Interrupted
                return original(*args, **kwargs)

            monkeypatch.setattr(owner, name, operation)

        for owner, name in (
            (Path, "mkdir"),
            (Path, "write_text"),
            (Path, "rename"),
            (os, "fsync"),
            (shutil, "rmtree"),
        ):
            wrap(owner, name)

    return arm


def crash_points(tmp_path, break_at, monkeypatch):
    """A folder `new` as each possible crash of a replacing write leaves it, one after another."""
    point, crashed = 0, True
    while crashed:
        point += 1
        run = tmp_path / str(point)
        write_folder(run / "new", write_text("one"))
        with monkeypatch.context():
            break_at(point)
            try:
                write_folder(run / "new", write_text("two"))
                crashed = False
            except Interrupted:
                pass
            finally:
                monkeypatch.undo()
        yield run / "new"
    assert point > 8, "the operations are not the ones this test knows"


def test_no_crash_and_failure_after_it_lose_the_older_folder(tmp_path, break_at, monkeypatch):
    for folder in crash_points(tmp_path, break_at, monkeypatch):
        with pytest.raises(OSError, match="no space left"):
            write_folder(folder, write_half)
        verify(folder)
        assert content(folder)["inner/a.txt"] in (b"one", b"two")


def test_a_write_after_any_crash_succeeds(tmp_path, break_at, monkeypatch):
    for folder in crash_points(tmp_path, break_at, monkeypatch):
        write_folder(folder, write_text("three"))
        verify(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["new"]


def test_everything_is_on_the_disk_before_the_folder_appears(tmp_path, monkeypatch):
    flushed, appeared = set(), []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(self, target):
        if Path(target) == tmp_path / "new":
            appeared.extend(path.stat().st_ino for path in [self, *self.rglob("*")])
            assert set(appeared) <= flushed
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    write_folder(tmp_path / "new", write_text("one"))
    assert len(appeared) == 5  # the folder, the inner one, two files, the manifest


def test_the_parent_is_flushed_after_the_folder_has_appeared(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(self, target):
        events.append("appeared")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    write_folder(tmp_path / "new", write_text("one"))
    assert tmp_path.stat().st_ino in events[events.index("appeared") :]


# Verifying


@pytest.fixture
def small(tmp_path):
    """A whole folder of two small files."""
    write_folder(tmp_path / "small", write_text("some text"))
    return tmp_path / "small"


@pytest.fixture(scope="session")
def saved_once(tiny_base, mixture_on, tmp_path_factory):
    """A mixture on a tiny llama and the folder it was saved to; not to be changed."""
    mixture = mixture_on(tiny_base("llama"))
    mixture.training_record = {"step": 7, "data": {"max_length": 64}}
    folder = tmp_path_factory.mktemp("saved") / "checkpoint-7"
    mixture.save_pretrained(folder)
    return mixture, folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """The mixture, and a copy of its folder to do harm to."""
    mixture, folder = saved_once
    return mixture, Path(shutil.copytree(folder, tmp_path / folder.name))


def test_the_manifest_lists_every_file_but_the_card_with_its_true_size_and_hash(saved):
    files = json.loads((saved[1] / MANIFEST).read_text())["files"]
    assert files == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content(saved[1]).items()
        if name != MANIFEST
    }


def test_a_checkpoint_has_the_files_of_its_layout(saved):
    experts = [f"peft_adapters/expert_{expert}" for expert in (0, 1)]
    files = ("adapter_config.json", "adapter_model.safetensors")
    adapters = {f"{expert}/{file}" for expert in experts for file in files}
    expected = {"config.json", "manifest.json", "router.safetensors"} | adapters
    assert content(saved[1]).keys() == expected


def test_long_files_are_hashed_whole(tmp_path):
    write_folder(tmp_path / "new", write_text("longer than the buffer of a hash " * 20_000))
    flip_bit(tmp_path / "new" / "b.txt", -1)
    with pytest.raises(ValueError, match=r"b\.txt has changed"):
        verify(tmp_path / "new")


def harm_each_file(folder, harm):
    """Do the harm to each file the manifest lists, and yield its path while it lasts."""
    names = [name for name in content(folder) if name != MANIFEST]
    assert names
    for name in names:
        file = folder / name
        before = file.read_bytes()
        harm(file)
        yield file
        file.write_bytes(before)
    verify(folder)


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(saved):
    for place in (0.0, 0.5, 1.0):

        def flip(file, place=place):
            flip_bit(file, int(place * (file.stat().st_size - 1)), bit=3)

        for file in harm_each_file(saved[1], flip):
            with pytest.raises(ValueError) as error:
                verify(saved[1])
            assert str(file) in str(error.value)


def test_a_truncated_file_is_found_and_named(saved):
    for file in harm_each_file(saved[1], lambda file: os.truncate(file, file.stat().st_size - 1)):
        with pytest.raises(ValueError) as error:
            verify(saved[1])
        assert str(file) in str(error.value)


def test_a_deleted_file_is_found_and_named(saved):
    for file in harm_each_file(saved[1], Path.unlink):
        with pytest.raises(ValueError) as error:
            verify(saved[1])
        assert str(file) in str(error.value)


def test_a_file_with_bytes_appended_is_found_and_named(saved):
    def append(file):
        file.write_bytes(file.read_bytes() + b"\n")

    for file in harm_each_file(saved[1], append):
        with pytest.raises(ValueError) as error:
            verify(saved[1])
        assert str(file) in str(error.value)


def test_a_flipped_bit_in_any_byte_of_the_manifest_itself_is_found(small):
    before = (small / MANIFEST).read_bytes()
    for place in range(len(before)):
        flip_bit(small / MANIFEST, place, bit=place % 7)
        with pytest.raises(ValueError) as error:
            verify(small)
        assert str(small) in str(error.value)
        (small / MANIFEST).write_bytes(before)


BROKEN_MANIFESTS = {
    "empty file": "",
    "a list": "[]",
    "an empty object": "{}",
    "no files": '{"files": {}}',
    "a list of files": '{"files": ["b.txt"]}',
    "no size": '{"files": {"b.txt": {"sha256": "00"}}}',
    "no entry": '{"files": {"b.txt": null}}',
}


@pytest.mark.parametrize("kind", BROKEN_MANIFESTS)
def test_a_folder_whose_manifest_proves_nothing_is_not_whole(kind, small):
    (small / MANIFEST).write_text(BROKEN_MANIFESTS[kind])
    with pytest.raises(ValueError) as error:
        verify(small)
    assert str(small) in str(error.value)


def test_a_folder_without_manifest_is_not_whole(small):
    (small / MANIFEST).unlink()
    with pytest.raises(ValueError, match=MANIFEST):
        verify(small)


def test_extra_files_do_not_spoil_a_checkpoint(saved, tiny_base):
    """A hub adds README.md and .gitattributes, and people add notes; nothing of ours reads them."""
    for name in ("README.md", ".gitattributes", "peft_adapters/expert_0/README.md"):
        (saved[1] / name).write_text("notes")
    assert is_intact(saved[1])
    model = DyLoRA_MoE.from_pretrained(saved[1], base=tiny_base("llama"))
    assert len(model.experts) == len(saved[0].experts)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "inner/../../secret.txt"])
def test_a_manifest_that_points_outside_is_refused(name, small):
    (small.parent / "secret.txt").write_text("years of work")
    entry = {"size": 13, "sha256": hashlib.sha256(b"years of work").hexdigest()}
    (small / MANIFEST).write_text(json.dumps({"files": {name: entry}}))
    with pytest.raises(ValueError, match="lies outside the folder"):
        verify(small)


@pytest.mark.parametrize("name", ["optimizer.pt", "inner/adapter_model.bin"])
def test_a_file_that_a_loader_would_read_must_be_in_the_manifest(name, small):
    (small / "trainer_state.json").write_text("{}")  # a run's checkpoint, whose resume reads more
    write_manifest(small)
    (small / name).write_bytes(b"slipped in")
    with pytest.raises(ValueError, match=rf"{name} is not in manifest\.json"):
        verify(small)


def test_what_a_trainer_puts_beside_a_mixture_does_not_spoil_it(small):
    (small / "optimizer.pt").write_bytes(b"read by nothing of ours")
    assert is_intact(small)


# A run's checkpoints


@pytest.fixture
def run_folder(tmp_path):
    """A run with the whole checkpoints 2, 9, 10 and 100."""
    for step in (9, 100, 2, 10):
        write_folder(tmp_path / f"checkpoint-{step}", write_text(str(step)))
    return tmp_path


def names(paths):
    return [path.name for path in paths]


def test_checkpoints_are_sorted_by_step(run_folder):
    expected = ["checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert names(checkpoints(run_folder)) == expected


def test_age_says_nothing_about_the_order(run_folder):
    os.utime(run_folder / "checkpoint-2", (4e9, 4e9))
    os.utime(run_folder / "checkpoint-100", (0, 0))
    assert latest_checkpoint(run_folder, print)[0].name == "checkpoint-100"


def test_what_is_no_checkpoint_is_not_counted(run_folder):
    for name in (".checkpoint-101.writing", ".checkpoint-102.replaced", "checkpoint-103.tmp"):
        shutil.copytree(run_folder / "checkpoint-100", run_folder / name)
    for name in ("checkpoint-best", "my-checkpoint-104", "checkpoint-", "checkpoint--5"):
        shutil.copytree(run_folder / "checkpoint-100", run_folder / name)
    (run_folder / "checkpoint-105").write_text("a file")
    expected = ["checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert names(checkpoints(run_folder)) == expected


def test_the_latest_checkpoint_is_the_newest_whole_one(run_folder):
    flip_bit(run_folder / "checkpoint-100" / "b.txt", 0)
    (run_folder / "checkpoint-10" / "inner" / "a.txt").unlink()
    assert latest_checkpoint(run_folder, print)[0].name == "checkpoint-9"


def test_skipped_checkpoints_are_told_with_what_is_wrong(run_folder):
    flip_bit(run_folder / "checkpoint-100" / "b.txt", 0)
    (run_folder / "checkpoint-10" / MANIFEST).unlink()
    said = []
    latest_checkpoint(run_folder, said.append)
    assert ["checkpoint-100" in said[0], "checkpoint-10:" in said[1], len(said)] == [True, True, 2]
    assert "b.txt" in said[0]
    assert MANIFEST in said[1]


def test_a_whole_newest_checkpoint_is_taken_in_silence(run_folder):
    said = []
    latest_checkpoint(run_folder, said.append)
    assert said == []


@pytest.mark.parametrize("kind", BROKEN_MANIFESTS)
def test_a_checkpoint_with_a_broken_manifest_is_skipped(kind, run_folder):
    (run_folder / "checkpoint-100" / MANIFEST).write_text(BROKEN_MANIFESTS[kind])
    assert latest_checkpoint(run_folder, print)[0].name == "checkpoint-10"


def test_no_whole_checkpoint_is_an_error_that_names_the_run(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        latest_checkpoint(tmp_path, print)
    assert str(tmp_path) in str(error.value)


def test_pruning_keeps_the_newest_by_step(run_folder):
    rotate(run_folder, keep=2, best=None)
    assert names(checkpoints(run_folder)) == ["checkpoint-10", "checkpoint-100"]


def test_pruning_keeps_the_best(run_folder):
    rotate(run_folder, keep=2, best=run_folder / "checkpoint-2")
    expected = ["checkpoint-2", "checkpoint-10", "checkpoint-100"]
    assert names(checkpoints(run_folder)) == expected


def test_pruning_never_leaves_a_single_checkpoint(run_folder):
    rotate(run_folder, keep=1, best=None)
    assert names(checkpoints(run_folder)) == ["checkpoint-10", "checkpoint-100"]


def test_a_checkpoint_loses_its_name_before_its_files(run_folder, monkeypatch):
    """Else a crash in between leaves half a checkpoint under the name of a whole one."""
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path: removed.append(path.name))
    rotate(run_folder, keep=3, best=None)
    assert removed == [".checkpoint-2.removing"]


def test_pruning_fewer_than_it_keeps_deletes_nothing(run_folder):
    before = content(run_folder)
    rotate(run_folder, keep=5, best=None)
    assert content(run_folder) == before


def test_pruning_leaves_everything_else_alone(run_folder):
    (run_folder / "metrics.jsonl").write_text("{}")
    (run_folder / "checkpoint-best").mkdir()
    (run_folder / ".checkpoint-1.writing").mkdir()
    rotate(run_folder, keep=2, best=None)
    expected = {"metrics.jsonl", "checkpoint-best", ".checkpoint-1.writing"}
    expected |= {"checkpoint-10", "checkpoint-100"}
    assert {path.name for path in run_folder.iterdir()} == expected


def test_pruning_counts_whole_checkpoints_only(run_folder):
    flip_bit(run_folder / "checkpoint-100" / "b.txt", 0)
    rotate(run_folder, keep=2, best=None)
    expected = ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert names(checkpoints(run_folder)) == expected


# Reading back, and settling what crashes leave


@pytest.fixture
def bad_disk(monkeypatch):
    """A disk that changes a bit of b.txt whenever a folder gets its name."""
    rename = Path.rename

    def corrupting(self, target):
        renamed = rename(self, target)
        if (renamed / "b.txt").exists() and self.name.endswith(".writing"):
            flip_bit(renamed / "b.txt", 0)
        return renamed

    monkeypatch.setattr(Path, "rename", corrupting)


def test_a_folder_that_reads_back_wrong_is_an_error_and_set_aside(tmp_path, bad_disk):
    with pytest.raises(ValueError, match=r"b\.txt has changed"):
        write_folder(tmp_path / "checkpoint-1", write_text("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1.damaged"]


def test_a_folder_that_reads_back_wrong_replaces_nothing(tmp_path, monkeypatch, request):
    write_folder(tmp_path / "checkpoint-1", write_text("one"))
    request.getfixturevalue("bad_disk")
    with pytest.raises(ValueError, match=r"b\.txt has changed"):
        write_folder(tmp_path / "checkpoint-1", write_text("two"))
    verify(tmp_path / "checkpoint-1")
    assert content(tmp_path / "checkpoint-1")["inner/a.txt"] == b"one"


def test_tidying_settles_every_kind_of_leftover(run_folder):
    (run_folder / ".checkpoint-3.writing" / "inner").mkdir(parents=True)
    (run_folder / "checkpoint-2").rename(run_folder / ".checkpoint-2.removing")
    (run_folder / "checkpoint-9").rename(run_folder / ".checkpoint-9.replaced")
    shutil.copytree(run_folder / "checkpoint-10", run_folder / ".checkpoint-10.replaced")
    shutil.copytree(run_folder / "checkpoint-100", run_folder / ".checkpoint-100.replaced")
    flip_bit(run_folder / "checkpoint-100" / "b.txt", 0)
    recover(run_folder)
    expected = ["checkpoint-10", "checkpoint-100", "checkpoint-100.damaged", "checkpoint-9"]
    assert sorted(path.name for path in run_folder.iterdir()) == expected
    verify(run_folder / "checkpoint-100")


def test_tidying_takes_no_foreign_folder_for_a_checkpoint(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "thesis.txt").write_text("years of work")
    (tmp_path / ".checkpoint-1.replaced").mkdir()
    recover(tmp_path)
    assert (tmp_path / "checkpoint-1" / "thesis.txt").exists()


def test_a_name_that_is_taken_gets_a_number_when_set_aside(run_folder):
    quarantine(run_folder / "checkpoint-9", "damaged")
    shutil.copytree(run_folder / "checkpoint-10", run_folder / "checkpoint-9")
    assert quarantine(run_folder / "checkpoint-9", "damaged").name == "checkpoint-9.damaged-2"


def test_a_text_file_is_the_old_one_when_the_disk_is_full(tmp_path, monkeypatch):
    write_file(tmp_path / "best.json", "old")

    def full(self, text, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / "best.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_checkpoint_that_cannot_be_read_is_skipped(run_folder, monkeypatch):
    original = manifest.hash_file

    def failing(path):
        if "checkpoint-100" in str(path):
            raise OSError(5, "Input/output error")
        return original(path)

    monkeypatch.setattr(manifest, "hash_file", failing)
    said = []
    assert latest_checkpoint(run_folder, said.append)[0].name == "checkpoint-10"
    assert "Input/output error" in said[0]


# Two hundred flips, thirty truncations, every file deleted once


def damage_is_found(run_folder, file):
    """Whether the newest is refused with the file's name, and the one before it is taken."""
    said = []
    taken, _ = latest_checkpoint(run_folder, said.append)
    return taken.name == "checkpoint-6" and str(file) in said[0]


@pytest.fixture
def two_saved(saved_once, tmp_path):
    """A run's folder with a mixture's checkpoints 6 and 7."""
    shutil.copytree(saved_once[1], tmp_path / "checkpoint-6")
    return Path(shutil.copytree(saved_once[1], tmp_path / "checkpoint-7")).parent


def test_two_hundred_flipped_bits_are_all_found_and_the_older_checkpoint_is_used(two_saved):
    draw = random.Random(5)
    files = sorted(
        p for p in (two_saved / "checkpoint-7").rglob("*") if p.is_file() and p.name not in NOTES
    )
    for _ in range(200):
        file = draw.choice(files)
        before = file.read_bytes()
        flip_bit(file, draw.randrange(len(before)), bit=draw.randrange(8))
        # A flip in the manifest may name another file, or another place of the manifest.
        named = file if file.name != MANIFEST else file.parent
        assert damage_is_found(two_saved, named), file
        file.write_bytes(before)
    assert latest_checkpoint(two_saved, print)[0].name == "checkpoint-7"


def test_thirty_truncations_are_all_found_and_the_older_checkpoint_is_used(two_saved):
    draw = random.Random(6)
    files = sorted(
        p for p in (two_saved / "checkpoint-7").rglob("*") if p.is_file() and p.name not in NOTES
    )
    for _ in range(30):
        file = draw.choice(files)
        before = file.read_bytes()
        os.truncate(file, draw.randrange(len(before) - (file.name == MANIFEST)))
        assert damage_is_found(two_saved, file), file
        file.write_bytes(before)


def test_each_deleted_file_is_found_and_the_older_checkpoint_is_used(two_saved):
    for file in sorted(
        p for p in (two_saved / "checkpoint-7").rglob("*") if p.is_file() and p.name not in NOTES
    ):
        before = file.read_bytes()
        file.unlink()
        named = file if file.name != MANIFEST else file.parent
        assert damage_is_found(two_saved, named), file
        file.write_bytes(before)


# Mixtures there and back


MIXTURES = {
    "default": {},
    "two-layer router": {"router_hidden_size": 5},
    "shared router": {"router_scope": "shared"},
    "fixed routing": {"router_type": "fixed", "fixed_routing_weights": [0.25, 0.75]},
    "top-1 of three": {"num_experts": 3, "top_k_experts": 1, "router_type": "learned"},
    "rslora, some layers": {"use_rslora": True, "layers_to_transform": [1]},
    "plain LoRA": {"use_moe_routing": False, "num_experts": 1},
}


@pytest.fixture
def there_and_back(tiny_base, mixture_on, tmp_path):
    """A mixture, and what came back from its folder on a base of its own."""

    def build(family, **settings):
        base = tiny_base(family)
        mixture = mixture_on(base, **settings)
        mixture.save_pretrained(tmp_path / "saved")
        return mixture, DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=base).eval()

    return build


def bits(tensor):
    """A tensor's bytes: unlike `==` they tell NaN from NaN and 0 from -0."""
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize("kind", MIXTURES)
def test_tensors_come_back_bit_for_bit(kind, there_and_back):
    before, after = there_and_back("llama", **MIXTURES[kind])
    expected = {
        n: bits(p) for n, p in [*before.named_expert_parameters(), *before.router_parameters()]
    }
    found = {n: bits(p) for n, p in [*after.named_expert_parameters(), *after.router_parameters()]}
    assert found == expected


@pytest.mark.parametrize("kind", MIXTURES)
def test_logits_come_back_bit_for_bit(kind, there_and_back, tokens):
    before, after = there_and_back("llama", **MIXTURES[kind])
    assert torch.equal(before(tokens).logits, after(tokens).logits)


@pytest.mark.parametrize("family", ["gemma", "qwen3", "gpt2", "gpt_neox", "phi3", "falcon"])
def test_logits_come_back_bit_for_bit_in_every_family(family, there_and_back, tokens):
    before, after = there_and_back(family)
    assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_the_gates_come_back_bit_for_bit(there_and_back, tokens):
    before, after = there_and_back("llama", num_experts=3, top_k_experts=1)
    gates = before.get_routing_weights(tokens)
    assert torch.equal(gates, after.get_routing_weights(tokens))


def test_the_state_of_maturity_comes_back_bit_for_bit(tiny_base, mixture_on, tmp_path):
    base = tiny_base("llama")
    mixture = mixture_on(base)
    unseen = torch.tensor([1.25, torch.nan], dtype=torch.float64)  # as before a first token
    mixture.set_maturity(mixture.maturity._replace(fast=unseen, slow=unseen.clone()))
    mixture.save_pretrained(tmp_path / "saved")
    found = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=base).maturity
    assert list(map(bits, found)) == list(map(bits, mixture.maturity))


def test_routers_follow_the_maturity_that_came_back(there_and_back):
    before, after = there_and_back("llama")
    assert before.mixture.state.maturity_E.min() > 0
    assert torch.equal(after.mixture.state.maturity_E, before.mixture.state.maturity_E)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_configuration_comes_back(kind, there_and_back):
    before, after = there_and_back("llama", **MIXTURES[kind])
    assert after.config == before.config


def test_a_mixture_that_no_reader_would_take_is_not_written(mixture, tmp_path):
    model = mixture()
    model.base_name = "a\u00a0base"
    with pytest.raises(ValueError, match=r"could not be read again .*base_model_name_or_path"):
        model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_the_training_record_comes_back(saved, tiny_base):
    model = DyLoRA_MoE.from_pretrained(saved[1], base=tiny_base("llama"))
    assert model.training_record == {"step": 7, "data": {"max_length": 64}}


def test_saving_what_came_back_gives_the_same_files(there_and_back, tmp_path):
    there_and_back("llama")[1].save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "saved")


def test_the_base_is_found_by_the_name_that_was_kept(tiny_base, mixture_on, tokens, tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    mixture = DyLoRA_MoE.from_base(str(tmp_path / "base"), MoELoraConfig(r=3, num_experts=2))
    with torch.no_grad():
        for _, parameter in mixture.named_expert_parameters():
            parameter.normal_(std=0.15)
    mixture.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved")
    assert torch.equal(mixture(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize(("name", "revision"), [(None, "v2"), ("hub/llama", "v2"), ("other", None)])
def test_the_kept_revision_is_asked_of_the_kept_base_alone(
    name, revision, tiny_base, mixture_on, monkeypatch, tmp_path
):
    base, asked = tiny_base("llama"), {}
    mixture = mixture_on(base)
    mixture.base_name, mixture.base_revision = "hub/llama", "v2"
    mixture.save_pretrained(tmp_path / "saved")

    def load(spec):
        asked[spec.name] = spec.revision
        return base

    monkeypatch.setattr("dylora.base_models.BaseSpec.load", load)
    DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=name)
    assert asked == {name or "hub/llama": revision}


def test_a_checkpoint_that_names_no_base_asks_for_one(saved):
    with pytest.raises(ValueError, match="base="):
        DyLoRA_MoE.from_pretrained(saved[1])


def test_no_tensor_on_the_disk_has_the_name_or_content_of_a_base_weight(saved, tiny_base):
    base = tiny_base("llama").state_dict()
    contents = {bits(weight.flatten()) for weight in base.values()}
    files = list(saved[1].rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        for name, tensor in load_file(file).items():
            assert not any(name.endswith(weight) for weight in base), name
            assert bits(tensor.flatten()) not in contents, name


def test_tensors_on_the_disk_weigh_no_more_than_the_parameters(saved):
    mixture, folder = saved
    ours, _ = mixture.count_parameters()
    tensors = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    assert tensors < 4 * ours + 10_000  # headers


def base_weights(model):
    """Hashes of a base's own weights, whatever has been added to it."""
    return {
        name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if "dylora" not in name
    }


def test_loading_does_not_change_the_base(saved, tiny_base):
    base = tiny_base("llama")
    before = base_weights(base)
    DyLoRA_MoE.from_pretrained(saved[1], base=base)
    assert base_weights(base) == before


def test_saving_does_not_change_the_model(tiny_base, mixture_on, tmp_path):
    mixture = mixture_on(tiny_base("llama"))
    before = {name: bits(tensor) for name, tensor in mixture.state_dict().items()}
    mixture.save_pretrained(tmp_path / "saved")
    assert {name: bits(tensor) for name, tensor in mixture.state_dict().items()} == before


# Mixtures that do not fit


def rewrite(folder, **changes):
    """Change config.json and let the manifest agree."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    write_manifest_anew(folder)


def write_manifest_anew(folder):
    (folder / MANIFEST).unlink()
    write_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn"),
        ({"num_hidden_layers": 3}, "another base (layers 2, here 3"),
        ({"hidden_size": 48}, "model.layers.0.self_attn"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj"),
    ],
)
def test_a_base_of_other_size_is_refused_with_the_projection_that_does_not_fit(
    changes, named, saved, tiny_base
):
    with pytest.raises(ValueError) as error:
        DyLoRA_MoE.from_pretrained(saved[1], base=tiny_base("llama", **changes))
    assert named in str(error.value)


def test_a_base_of_another_family_is_refused_with_what_does_not_fit(saved, tiny_base):
    with pytest.raises(
        ValueError, match=r"config\.json lists .*q_proj, which is no projection of GPT"
    ):
        DyLoRA_MoE.from_pretrained(saved[1], base=tiny_base("gpt2"))


def test_a_base_that_was_refused_a_checkpoint_is_as_it_was(saved, tiny_base):
    """Else it `already carries adapters` when the right checkpoint comes."""
    base = tiny_base("llama", num_hidden_layers=1)
    before = set(base.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1"):
        DyLoRA_MoE.from_pretrained(saved[1], base=base)
    assert set(base.state_dict()) == before


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version_is_refused(version, saved, tiny_base):
    rewrite(saved[1], format_version=version)
    with pytest.raises(ValueError, match="format_version") as error:
        DyLoRA_MoE.from_pretrained(saved[1], base=tiny_base("llama"))
    assert str(saved[1]) in str(error.value)


def test_damage_is_found_before_anything_is_loaded(saved, tiny_base):
    base = tiny_base("llama")
    before = set(base.state_dict())
    file = saved[1] / "peft_adapters" / "expert_1" / "adapter_model.safetensors"
    flip_bit(file, -1)
    with pytest.raises(ValueError) as error:
        DyLoRA_MoE.from_pretrained(saved[1], base=base)
    assert str(file) in str(error.value)
    assert set(base.state_dict()) == before


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        DyLoRA_MoE.from_pretrained(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(error.value)


BROKEN_ROUTERS = {
    "missing tensor": lambda t: t.pop("router.model.layers.1.self_attn.outer.bias"),
    "unknown tensor": lambda t: t.update({"router.other": torch.ones(2)}),
    "other shape": lambda t: t.update(
        {"router.model.layers.1.self_attn.outer.bias": torch.ones(3)}
    ),
    "one value for all": lambda t: t.update(
        {"router.model.layers.1.self_attn.outer.bias": torch.ones(1)}
    ),
    "NaN": lambda t: t["router.model.layers.1.self_attn.outer.bias"].fill_(torch.nan),
    "maturity of other shape": lambda t: t.update(
        {"maturity.maturity": torch.ones(1, dtype=torch.float64)}
    ),
    "maturity above 1": lambda t: t["maturity.maturity"].fill_(1.5),
}


@pytest.mark.parametrize("kind", BROKEN_ROUTERS)
def test_a_router_file_that_does_not_fit_is_refused_with_its_name(kind, saved, tiny_base):
    file = saved[1] / "router.safetensors"
    tensors = load_file(file)
    BROKEN_ROUTERS[kind](tensors)
    save_file(tensors, file)
    write_manifest_anew(saved[1])
    with pytest.raises(ValueError) as error:
        DyLoRA_MoE.from_pretrained(saved[1], base=tiny_base("llama"))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("changes", [{"lora_alpha": 10}, {"use_rslora": True}])
def test_an_expert_of_another_scale_than_the_checkpoints_is_refused(changes, saved, tiny_base):
    """peft would follow the expert's file and we config.json: two models from one folder."""
    file = saved[1] / "peft_adapters" / "expert_1" / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    write_manifest_anew(saved[1])
    with pytest.raises(ValueError) as error:
        DyLoRA_MoE.from_pretrained(saved[1], base=tiny_base("llama"))
    assert str(file.parent) in str(error.value)


@pytest.mark.parametrize("key", ["moe", "base_revision", "training"])
def test_a_configuration_that_lacks_a_part_is_refused_with_its_name(key, saved, tiny_base):
    file = saved[1] / "config.json"
    description = json.loads(file.read_text())
    del description[key]
    file.write_text(json.dumps(description))
    write_manifest_anew(saved[1])
    with pytest.raises(ValueError) as error:
        DyLoRA_MoE.from_pretrained(saved[1], base=tiny_base("llama"))
    assert str(file) in str(error.value)


def test_transformers_own_save_writes_the_mixture(saved_once, tiny_base, tmp_path):
    """Its own files would reload with weights drawn afresh."""
    saved_once[0].base.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=tiny_base("llama"))
    for (_, mine), (_, other) in zip(
        saved_once[0].mixture.own_parameters(), again.mixture.own_parameters(), strict=True
    ):
        assert torch.equal(mine, other)


def test_a_base_saves_as_before_after_unloading(tiny_base, mixture_on, tmp_path):
    base = tiny_base("llama")
    mixture_on(base).unload().save_pretrained(tmp_path / "base")
    saved = load_file(tmp_path / "base" / "model.safetensors")
    assert saved.keys() == copy.deepcopy(base).state_dict().keys()


def test_a_mixture_without_its_routers_is_not_saved(tmp_path):
    from dylora import DyLoRA_MoE, MoELoraConfig

    model = DyLoRA_MoE.from_base("tiny-code-llama", MoELoraConfig(r=1, num_experts=2))
    routers = model.detach_router()
    with pytest.raises(ValueError, match="routers are detached"):
        model.save_pretrained(tmp_path / "mixture")
    model.attach_router(routers)
    model.save_pretrained(tmp_path / "mixture")


def test_the_maturity_of_an_earlier_version_is_read(mixture, ids, tmp_path):
    """Five fields, `born` among them; what it did not keep begins afresh."""
    model = mixture()
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "router.safetensors"
    tensors = load_file(file)
    tensors["maturity.born"] = tensors.pop("maturity.start_progress")
    for name in ("first", "change", "expected"):
        del tensors[f"maturity.{name}"]
    save_file(tensors, file)
    seal(tmp_path / "a")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "a", base=copy.deepcopy(mixture().unload()))
    fresh, old, new = ExpertMaturity.create(3), model.maturity, again.maturity
    for name in ("maturity", "evidence", "fast", "slow", "start_progress"):
        torch.testing.assert_close(getattr(new, name), getattr(old, name), equal_nan=True)
    for name in ("first", "change", "expected"):
        torch.testing.assert_close(getattr(new, name), getattr(fresh, name), equal_nan=True)
    output = again.train()(ids, labels=ids)
    again.observe(output, ids, steps=10)
    assert again.maturity.expected.isfinite().all()


def test_a_table_of_experts_of_an_earlier_version_is_read(mixture, ids, tmp_path):
    """`enabled` was called takes_part."""
    model = mixture()
    model.experts.set_active_expert(0, 2)
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    file.write_text(file.read_text().replace('"enabled"', '"takes_part"'))
    seal(tmp_path / "a")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "a", base=copy.deepcopy(mixture().unload()))
    assert [row.enabled for row in again.experts.table] == [True, False, True]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    records = json.loads(file.read_text())["experts"]
    again.experts.activate_all_experts()
    again.experts.load_state_dict(records)
    assert [row.enabled for row in again.experts.table] == [True, False, True]


def test_a_mixture_of_an_earlier_version_keeps_the_scale_of_its_gates(mixture, ids, tmp_path):
    """Its config.json has no gate_scale: mature gates summed to 1."""
    model = mixture(gate_scale="sum_to_one", maturity=[1.0] * 3)
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    description = json.loads(file.read_text())
    del description["moe"]["gate_scale"]
    file.write_text(json.dumps(description))
    seal(tmp_path / "a")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "a", base=copy.deepcopy(mixture().unload()))
    assert again.config == model.config
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
