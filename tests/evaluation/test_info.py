"""`run.py info` tells what a folder is, and of a damaged one what can still be known."""

import shutil
from pathlib import Path

import pytest

from dylora import export_mixture, export_peft
from dylora.cli.main import main
from dylora.storage import schema
from dylora.storage.manifest import MANIFEST


@pytest.fixture
def info(capsys):
    """Runs the command; its lines, and the one on stderr."""

    def run(folder: Path, code: int = 0) -> tuple[list[str], str]:
        assert main(["info", "--checkpoint", str(folder)]) == code
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


@pytest.fixture
def model(mixture):
    """Three experts, one of them retired, one frozen for a skill."""
    model = mixture(expert_ranks=[1, 3, 2], use_rslora=True)
    model.mixture.base_name, model.mixture.base_revision = "some/base", "abc123"
    model.experts.retire(1)
    model.experts.freeze(2)
    model.experts[2].skill = "sql"
    model.experts[2].steps = 70
    source = {"name": "skill/sql", "split_scheme": None, "training_rows": 12}
    model.training_record = {
        "step": 70,
        "targets": 12345,
        "seed": 4,
        "data": {"sources": [source]},
    }
    return model


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "checkpoint-70")
    return tmp_path / "run" / "checkpoint-70"


def test_a_checkpoint_is_told_line_by_line(saved, info):
    (saved.parent / "config.yaml").write_text("")
    lines, _ = info(saved)
    expected = [
        "base        some/base (abc123), not quantised",
        "routing     learned_with_maturity, top 2 of 3, 2 sites, 8 projections",
        "expert_0    active, rank 1, alpha 4, maturity 1.000, trained 0 steps, ",
        "expert_1    retired, rank 3, alpha 4, ",
        "expert_2    frozen, rank 2, alpha 4, maturity 0.600, trained 70 steps, ",
        "trained     70 steps, 12,345 target tokens, seed 4",
        "data        skill/sql: 12 rows, split generated",
        f"run         run, its settings in {saved.parent / 'config.yaml'}",
        "size        ",
    ]
    assert lines[0] == f"{saved}: whole, 0.0 MB, every file as written"
    for line, start in zip(lines[1:], expected, strict=True):
        assert line.startswith(start)
    assert lines[5].endswith(", skill sql")


def test_the_description_of_a_checkpoint_is_read_once(saved, info, monkeypatch):
    read: list[str] = []
    original = schema.read_json
    monkeypatch.setattr(
        schema, "read_json", lambda file, **way: read.append(file.name) or original(file, **way)
    )
    info(saved)
    assert read.count("config.json") == 1


def test_all_damaged_files_are_named_and_the_rest_is_told(saved, info):
    (saved / "router.safetensors").write_bytes(b"")
    (saved / "peft_adapters/expert_0/adapter_model.safetensors").unlink()
    shutil.copy(saved / "config.json", saved / "bias_shifts.safetensors")
    lines, error = info(saved, code=2)
    wrong = [
        "bias_shifts.safetensors is not in manifest.json: it came in later",
        "peft_adapters/expert_0/adapter_model.safetensors is missing",
        "router.safetensors has changed since it was written",
    ]
    assert lines[0].startswith(f"{saved}: DAMAGED")
    assert lines[1:4] == [f"damaged     {text}" for text in wrong]
    assert error == "error: " + "; ".join(f"{saved}/{text}" for text in wrong) + "\n"
    assert any(line.startswith("expert_2    frozen, rank 2") for line in lines)


def test_without_its_description_the_whole_adapters_are_told(saved, info):
    (saved / "config.json").write_text("{}")
    (saved / "peft_adapters/expert_2/adapter_config.json").write_text("{}")
    lines, error = info(saved, code=2)
    assert "expert_0    LORA, rank 1, alpha 4, " in "\n".join(lines)
    assert "expert_2    damaged" in lines
    assert "config.json has changed since it was written" in error


def test_without_a_manifest_nothing_is_trusted(saved, info):
    (saved / MANIFEST).unlink()
    lines, error = info(saved, code=2)
    assert lines[0].startswith(f"{saved}: DAMAGED")
    assert not any(line.startswith("base ") for line in lines)
    assert error == f"error: {saved} is no whole checkpoint: it has no {MANIFEST}\n"


def test_a_damaged_checkpoint_of_another_version_is_not_misread(saved, info):
    from dylora.storage.manifest import write_manifest

    (saved / "config.json").write_text('{"format_version": 1}')
    (saved / MANIFEST).unlink()
    write_manifest(saved)
    (saved / "router.safetensors").unlink()
    lines, error = info(saved, code=2)
    assert not any(line.startswith("base ") for line in lines)
    assert "router.safetensors is missing" in error


def test_an_exported_expert_is_told_with_what_readers_make_of_it(model, info, tmp_path):
    [_, folder] = export_peft(model, tmp_path / "out")
    lines, _ = info(folder)
    assert lines[0] == f"{folder}: whole, 0.0 MB, every file as written"
    assert lines[1:4] == [
        "base        some/base (abc123)",
        "LoRA        rank 2, alpha 4, rslora",
        "targets     8 projections: k_proj, o_proj, q_proj, v_proj",
    ]
    assert [line.split()[:2] for line in lines[4:]] == [
        ["SGLang", "misreads"],
        ["llama.cpp", "misreads"],
    ]


def test_pefts_own_adapter_has_no_manifest_to_verify(model, info, tmp_path):
    [folder, _] = export_peft(model, tmp_path / "out")
    (folder / MANIFEST).unlink()
    lines, _ = info(folder)
    assert lines[0].endswith(f"no {MANIFEST} to verify it by")
    assert lines[2].startswith("LoRA        rank 1, alpha 4")


def test_a_damaged_export_is_an_error(model, info, tmp_path):
    folder, _ = export_peft(model, tmp_path / "out")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    _, error = info(folder, code=2)
    assert "adapter_model.safetensors has changed" in error
    lines, error = info(tmp_path / "out", code=2)
    assert lines[0] == "expert_0    damaged"
    assert lines[1].startswith("expert_2    LORA, rank 2")
    assert "expert_0/adapter_model.safetensors has changed" in error


def test_a_folder_of_experts_is_told_one_by_one(model, info, tmp_path):
    export_peft(model, tmp_path / "out", portable=True)
    lines, _ = info(tmp_path / "out")
    assert [line.partition(", 0.")[0] for line in lines] == [
        "expert_0    LORA, rank 2, alpha 2",
        "expert_2    LORA, rank 2, alpha 2",
    ]


@pytest.mark.parametrize("even", [True, False])
def test_an_exported_mixture_tells_its_weights(even, model, info, tmp_path):
    weights = [[0.5, 0.0, 0.5], [0.5, 0.0, 0.5] if even else [0.1, 0.0, 0.9]]
    comparison = {"file": "f.txt", "kl": 0.25, "routed_loss": 1.0, "static_loss": 1.5}
    export_mixture(model, tmp_path / "out", weights, text=comparison)
    lines, _ = info(tmp_path / "out")
    told = [line for line in lines if line.startswith("weights ")]
    assert told == (
        ["weights     0.500 0.000 0.500, at all 2 sites"]
        if even
        else [
            "weights     0.500 0.000 0.500 at model.layers.0.self_attn",
            "weights     0.100 0.000 0.900 at model.layers.1.self_attn",
        ]
    )
    assert lines[-1] == "routed      KL 0.25000 nats a token on f.txt, loss 1.5000 against 1.0000"


def test_any_other_folder_is_refused(info, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    lines, error = info(tmp_path, code=2)
    assert lines == []
    assert error == f"error: {tmp_path} is no checkpoint, no PEFT adapter and no export of ours\n"
    _, error = info(tmp_path / "nowhere", code=2)
    assert error == f"error: checkpoint {tmp_path / 'nowhere'} does not exist\n"
