"""Exported experts: the exact form is the checkpoint's own, the portable one suits every reader."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dylora import export_checkpoint, export_mixture
from dylora.storage.manifest import MANIFEST, verify, write_manifest
from dylora.storage.model_card import CARD
from dylora.storage.peft_config import CONFIG_FILE
from dylora.storage.peft_format import WEIGHTS_FILE, read_adapter, write_adapter
from dylora.storage.schema import ADAPTERS

FAMILIES = ("llama", "gemma", "qwen3", "gpt2", "gpt_neox", "phi3", "falcon")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="session")
def saved_once(tiny_base, mixture_on, tmp_path_factory):
    """A mixture of two rslora experts on a tiny llama, saved; not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "saved"
    mixture_on(tiny_base("llama"), use_rslora=True).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy of that folder to do harm to."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def content(folder):
    """Every file below a folder with its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_exact_form_is_the_checkpoints_bit_for_bit(saved, tmp_path):
    for folder in export_checkpoint(saved, tmp_path / "out"):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            source = saved / ADAPTERS / folder.name / name
            assert (folder / name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("portable", [False, True])
def test_an_export_holds_peft_files_a_card_and_a_manifest_alone(portable, saved, tmp_path):
    export_checkpoint(saved, tmp_path / "out", portable=portable)
    files = (CONFIG_FILE, WEIGHTS_FILE, CARD, MANIFEST)
    expected = {f"expert_{expert}/{file}" for expert in (0, 1) for file in files}
    assert content(tmp_path / "out").keys() == expected


def test_an_exported_folder_is_whole(saved, tmp_path):
    for folder in export_checkpoint(saved, tmp_path / "out"):
        verify(folder)


def test_all_experts_are_exported_and_named_in_order(saved, tmp_path):
    folders = export_checkpoint(saved, tmp_path / "out")
    assert folders == [tmp_path / "out" / "expert_0", tmp_path / "out" / "expert_1"]


def test_one_expert_is_exported_alone(saved, tmp_path):
    folders = export_checkpoint(str(saved), str(tmp_path / "out"), expert="1")
    assert folders == [tmp_path / "out" / "expert_1"]
    assert list((tmp_path / "out").iterdir()) == folders
    exported = (folders[0] / WEIGHTS_FILE).read_bytes()
    assert exported == (saved / ADAPTERS / "expert_1" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_export_has_the_logits_of_its_expert_in_peft(
    family, use_rslora, portable, tiny_base, mixture_on, in_peft, one_hot, tokens, tmp_path
):
    base = tiny_base(family)
    mixture = mixture_on(base, use_rslora=use_rslora)
    mixture.save_pretrained(tmp_path / "saved")
    [folder] = export_checkpoint(tmp_path / "saved", tmp_path / "out", "1", portable)
    expected = mixture(tokens, routing_weights=one_hot(1)).logits
    assert (in_peft(base, folder)(tokens).logits - expected).abs().max() < 1e-5


def test_the_portable_form_has_scale_one_for_every_reader(saved, tmp_path):
    """For those that ignore use_rslora and the patterns, too."""
    for folder in export_checkpoint(saved, tmp_path / "out", portable=True):
        config = json.loads((folder / CONFIG_FILE).read_text())
        assert config["lora_alpha"] == config["r"] == 3
        flags = [config[name] for name in ("use_rslora", "use_dora", "bias", "modules_to_save")]
        assert flags == [False, False, "none", None]
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})


def test_the_portable_form_changes_nothing_else_in_the_configuration(saved, tmp_path):
    [folder] = export_checkpoint(saved, tmp_path / "out", "0", portable=True)
    before, after = read_adapter(saved / ADAPTERS / "expert_0").config, read_adapter(folder).config
    changed = {name for name in before | after if before.get(name, ...) != after.get(name, ...)}
    assert changed == {"lora_alpha", "use_rslora"}


def test_exporting_a_portable_form_again_changes_nothing(saved, tmp_path):
    """Its scale is 1 already: multiplied twice it would be another expert."""
    [once] = export_checkpoint(saved, tmp_path / "once", "0", portable=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(once / name, saved / ADAPTERS / "expert_0" / name)
    (saved / MANIFEST).unlink()
    write_manifest(saved)
    [twice] = export_checkpoint(saved, tmp_path / "twice", "0", portable=True)
    assert content(twice) == content(once)


@pytest.mark.parametrize("expert", ["2", "-1", "expert_0", "", "ALL", "../saved"])
def test_an_unknown_expert_is_an_error_that_names_the_others(expert, saved, tmp_path):
    with pytest.raises(ValueError, match="expert_0, expert_1"):
        export_checkpoint(saved, tmp_path / "out", expert=expert)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "router.safetensors", f"{ADAPTERS}/expert_0/{WEIGHTS_FILE}"]
)
def test_a_tampered_checkpoint_is_refused_before_anything_is_written(name, saved, tmp_path):
    data = bytearray((saved / name).read_bytes())
    data[-2] ^= 1
    (saved / name).write_bytes(bytes(data))
    with pytest.raises(ValueError) as error:
        export_checkpoint(saved, tmp_path / "out")
    assert str(saved / name) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_checkpoint_is_refused_with_its_name(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        export_checkpoint(tmp_path / "absent", tmp_path / "out")
    assert str(tmp_path / "absent") in str(error.value)


def test_another_format_version_is_not_exported(saved, tmp_path):
    """`from_pretrained` refuses it as well: its experts may mean something else."""
    config = json.loads((saved / "config.json").read_text()) | {"format_version": 99}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / MANIFEST).unlink()
    write_manifest(saved)
    with pytest.raises(ValueError, match="format_version"):
        export_checkpoint(saved, tmp_path / "out")


def test_a_foreign_folder_in_the_way_is_refused_and_untouched(saved, tmp_path):
    foreign = tmp_path / "out" / "expert_0"
    foreign.mkdir(parents=True)
    (foreign / CONFIG_FILE).write_text("somebody else's")
    with pytest.raises(FileExistsError) as error:
        export_checkpoint(saved, tmp_path / "out")
    assert f"{tmp_path / 'out'} exists and is no result of ours" in str(error.value)
    assert content(tmp_path / "out") == {f"expert_0/{CONFIG_FILE}": b"somebody else's"}


def test_an_earlier_export_is_replaced_when_asked(saved, tmp_path):
    export_checkpoint(saved, tmp_path / "out", portable=True)
    export_checkpoint(saved, tmp_path / "out", portable=False, overwrite=True)
    for expert in ("expert_0", "expert_1"):
        exported = (tmp_path / "out" / expert / WEIGHTS_FILE).read_bytes()
        assert exported == (saved / ADAPTERS / expert / WEIGHTS_FILE).read_bytes()


def test_exporting_leaves_the_checkpoint_as_it_was(saved, tmp_path):
    before = content(saved)
    export_checkpoint(saved, tmp_path / "out", portable=True)
    assert content(saved) == before


def exports(source):
    """Every way to write `source` into a folder."""
    return (
        lambda out, **how: export_checkpoint(source, out, portable=True, **how),
        lambda out, **how: export_mixture(source, out, (0.5, 0.5), **how),
    )


@pytest.mark.parametrize("place", [ADAPTERS, "exported", "."])
def test_an_export_into_a_checkpoint_is_refused(place, saved):
    """It would not verify any more."""
    before = content(saved)
    for export in exports(saved):
        with pytest.raises(FileExistsError, match=r"lies in the checkpoint|is a checkpoint"):
            export(saved / place, overwrite=True)
    assert content(saved) == before


def test_an_export_never_takes_a_checkpoints_place(saved, tmp_path):
    other = Path(shutil.copytree(saved, tmp_path / "other"))
    before = content(other)
    for export in exports(saved):
        with pytest.raises(FileExistsError, match="other is a checkpoint"):
            export(other, overwrite=True)
    assert content(other) == before


@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_two_exports_never_mix_in_one_folder(first, second, saved, tmp_path):
    out = tmp_path / "out"
    exports(saved)[first](out)
    before = content(out)
    with pytest.raises(FileExistsError, match=r"out holds an earlier result: .*--overwrite"):
        exports(saved)[second](out)
    assert content(out) == before
    exports(saved)[second](out, overwrite=True)
    exports(saved)[second](tmp_path / "alone")
    assert content(out) == content(tmp_path / "alone")


def test_one_expert_replaces_all_of_an_earlier_export(saved, tmp_path):
    export_checkpoint(saved, tmp_path / "out")
    export_checkpoint(saved, tmp_path / "out", 1, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["expert_1"]


# All or none


def test_a_foreign_folder_in_the_way_of_the_second_keeps_the_first_back(saved, tmp_path):
    foreign = tmp_path / "out" / "expert_1"
    foreign.mkdir(parents=True)
    (foreign / CONFIG_FILE).write_text("somebody else's")
    with pytest.raises(FileExistsError):
        export_checkpoint(saved, tmp_path / "out")
    assert content(tmp_path / "out") == {f"expert_1/{CONFIG_FILE}": b"somebody else's"}


def test_a_full_disk_at_the_second_leaves_what_was_there(saved, tmp_path, monkeypatch):
    export_checkpoint(saved, tmp_path / "out", "0", portable=True)
    before = content(tmp_path / "out")
    written = []

    def write(folder, adapter):
        written.append(folder)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write_adapter(folder, adapter)

    monkeypatch.setattr("dylora.integrations.peft_export.write_adapter", write)
    with pytest.raises(OSError, match="No space"):
        export_checkpoint(saved, tmp_path / "out", overwrite=True)
    assert len(written) == 2
    assert content(tmp_path / "out") == before


def test_an_expert_without_a_portable_form_keeps_all_back(tiny_base, mixture_on, tmp_path):
    mixture_on(tiny_base("llama"), use_dora=True).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="expert_0: a DoRA expert has no portable form"):
        export_checkpoint(tmp_path / "saved", tmp_path / "out", portable=True)
    assert not (tmp_path / "out").exists()


# What they name and hold


def test_portable_experts_have_one_rank_between_them(tiny_base, mixture_on, tmp_path):
    mixture_on(tiny_base("llama"), expert_ranks=[2, 5]).save_pretrained(tmp_path / "saved")
    folders = export_checkpoint(tmp_path / "saved", tmp_path / "out", portable=True)
    assert [read_adapter(folder).config["r"] for folder in folders] == [5, 5]
    [alone] = export_checkpoint(tmp_path / "saved", tmp_path / "alone", 0, portable=True)
    assert read_adapter(alone).config["r"] == 2


@pytest.mark.parametrize(
    ("told", "named"), [(None, ("its/own", "abc123")), ("some/base", ("some/base", None))]
)
def test_an_export_names_its_base_or_the_one_it_is_told(
    told, named, tiny_base, mixture_on, tmp_path
):
    """A revision belongs to a base."""
    model = mixture_on(tiny_base("llama"))
    model.mixture.base_name, model.mixture.base_revision = "its/own", "abc123"
    model.save_pretrained(tmp_path / "saved")
    [folder] = export_checkpoint(tmp_path / "saved", tmp_path / "out", 0, base_name=told)
    mixed = export_mixture(tmp_path / "saved", tmp_path / "mixed", (0.5, 0.5), told)
    for config in (read_adapter(folder).config, read_adapter(mixed).config):
        assert (config["base_model_name_or_path"], config["revision"]) == named


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_mixture_of_files_has_the_logits_of_its_weights_in_peft(
    family, use_rslora, tiny_base, mixture_on, in_peft, tokens, tmp_path
):
    base = tiny_base(family)
    mixture = mixture_on(base, use_rslora=use_rslora)
    mixture.save_pretrained(tmp_path / "saved")
    folder = export_mixture(tmp_path / "saved", tmp_path / "out", (0.3, 0.6))
    expected = mixture(tokens, routing_weights=torch.tensor([[0.3, 0.6]] * 2)).logits
    assert (expected - base(tokens).logits).abs().max() > 0.1
    assert (in_peft(base, folder)(tokens).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("family", "bias"), [("qwen2", "lora_only"), ("gpt2", "all")])
@torch.no_grad()
def test_a_mixture_of_biases_has_the_logits_of_its_weights_in_peft(
    family, bias, tiny_base, mixture_on, in_peft, tokens, tmp_path
):
    base = tiny_base(family)
    mixture = mixture_on(base, bias=bias)
    mixture.save_pretrained(tmp_path / "saved")
    folder = export_mixture(tmp_path / "saved", tmp_path / "out", (0.3, 0.6))
    expected = mixture(tokens, routing_weights=torch.tensor([[0.3, 0.6]] * 2)).logits
    assert (in_peft(base, folder)(tokens).logits - expected).abs().max() < 1e-5
