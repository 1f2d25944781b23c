"""A folder is opened through one object: verified once, and nothing untrusted is waited for."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from dylora import DyLoRA_MoE, MoELoraConfig, load_peft_experts
from dylora.base_models import EMBEDDED_BASES
from dylora.cli.config_file import load_run_config
from dylora.cli.main import main
from dylora.evaluation.info import print_info
from dylora.storage import manifest
from dylora.storage.checkpoint import AdapterFolder, Checkpoint
from dylora.storage.folders import write_file
from dylora.storage.manifest import MANIFEST, write_manifest
from dylora.storage.peft_format import read_stock_adapter, write_adapter
from peft_folders import make_adapter

BASE = "tiny-code-llama"
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    DyLoRA_MoE.from_base(BASE, MoELoraConfig(num_experts=2, r=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


@pytest.fixture
def in_time():
    """Whatever waits for a pipe fails instead."""

    def hangs(*_):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def rename_base(folder: Path, name: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    (folder / MANIFEST).unlink()
    write_manifest(folder)


def error_of(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    return capsys.readouterr().err


# Which base is loaded

FORMS = {
    "merge": ["--merge", "--expert", "0"],
    "measured": ["--mixture", "--weights", "measured"],
}


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_export_runs_the_code_of_an_untrusted_base(
    form, saved, tmp_path, monkeypatch, capsys
):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    base = Path(shutil.copytree(EMBEDDED_BASES[BASE], tmp_path / "base"))
    auto_map = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "conf.M"}
    (base / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (base / "conf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    rename_base(saved, str(base))
    (tmp_path / "text").write_text("x = 1\n" * 20)
    text = ["--text", str(tmp_path / "text")] if form == "measured" else []
    out = ["--checkpoint", str(saved), "--out", str(tmp_path / "out"), *FORMS[form], *text]
    assert f"'{base}'" in error_of(capsys, "export", *out)
    assert asked == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_export_follows_a_path_that_generate_refuses(form, saved, tmp_path, capsys):
    shutil.copytree(EMBEDDED_BASES[BASE], tmp_path / "base")
    (tmp_path / "x").mkdir()
    rename_base(saved, f"{tmp_path}/x/../base")
    (tmp_path / "text").write_text("x = 1\n" * 20)
    text = ["--text", str(tmp_path / "text")] if form == "measured" else []
    where = ["--checkpoint", str(saved)]
    messages = [
        error_of(capsys, "generate", *where, "--prompt", "x"),
        error_of(capsys, "export", *where, "--out", str(tmp_path / "out"), *FORMS[form], *text),
    ]
    for message in messages:
        assert f"{saved}/config.json names the base" in message
        assert "which is not followed" in message
    assert not (tmp_path / "out").exists()


def test_a_run_that_begins_with_a_checkpoint_does_not_follow_its_path_either(saved, tmp_path):
    rename_base(saved, "../evil")
    file = tmp_path / "run.yaml"
    file.write_text(f"train: {{init_from: {saved}}}\n")
    with pytest.raises(ValueError, match="which is not followed"):
        load_run_config(file)
    file.write_text(f"train: {{init_from: {saved}}}\nmodel: {{base: ../evil}}\n")
    assert load_run_config(file).model.base == "../evil"


# Pipes


def test_a_run_does_not_wait_for_a_pipe_in_the_place_of_what_it_begins_with(
    saved, tmp_path, in_time
):
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    file = tmp_path / "run.yaml"
    file.write_text(f"train: {{init_from: {saved}}}\n")
    with pytest.raises(ValueError, match=r"config\.json is a pipe"):
        load_run_config(file)


@pytest.mark.parametrize("name", ["router.safetensors", "dylo_moe_state/router.pt"])
def test_an_import_does_not_wait_for_a_pipe_in_an_older_mixture(
    name, tiny_base, tmp_path, in_time, capsys
):
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "base")
    for expert in (0, 1):
        folder = tmp_path / "older" / "peft_adapters" / f"expert_{expert}"
        make_adapter(base, folder, seed=expert)
    (tmp_path / "older" / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "older" / name)
    argv = ["--adapters", str(tmp_path / "older"), "--out", str(tmp_path / "out")]
    message = error_of(capsys, "import", *argv, "--base", str(tmp_path / "base"))
    assert f"{tmp_path / 'older' / name}" in message
    assert "is a pipe" in message


# Each file is hashed once


def commands(folder: Path, adapters: Path, out: Path) -> dict[str, list[str]]:
    text = out.parent / "text"
    text.write_text("x = 1\n" * 20)
    export = ["export", "--checkpoint", str(folder), "--out", str(out)]
    measured = ["--weights", "measured", "--text", str(text)]
    prompt = ["--prompt", "x", "--max_new_tokens", "1"]
    return {
        "info": ["info", "--checkpoint", str(folder)],
        "info of an adapter": ["info", "--checkpoint", str(adapters / "expert_0")],
        "export": export,
        "export --mixture": [*export, "--mixture", "--weights", "1,0"],
        "export --mixture measured": [*export, "--mixture", *measured],
        "export --merge": [*export, "--merge", "--expert", "0"],
        "export --merge measured": [*export, "--merge", *measured],
        "generate": ["generate", "--checkpoint", str(folder), *prompt],
        "validate": ["validate", "--checkpoint", str(folder), "--device", "cpu", "--tokens", "8"],
        "import": [
            *("import", "--adapters", str(folder), "--base", BASE, "--out", str(out)),
        ],
    }


@pytest.mark.parametrize("name", commands(Path(), Path(), Path("/tmp/x")))
def test_no_command_hashes_a_file_of_a_folder_twice(name, saved, tmp_path, monkeypatch):
    assert main(["export", "--checkpoint", str(saved), "--out", str(tmp_path / "adapters")]) == 0
    hashed: Counter[str] = Counter()
    original = manifest.hash_file

    def counted(path: Path) -> str:
        hashed[str(path)] += 1
        return original(path)

    monkeypatch.setattr(manifest, "hash_file", counted)
    assert main(commands(saved, tmp_path / "adapters", tmp_path / "out")[name]) == 0
    read = {
        path: count
        for path, count in hashed.items()
        if path.startswith((str(saved), str(tmp_path / "adapters")))
    }
    assert read
    assert set(read.values()) == {1}


# A run's folder


@pytest.fixture
def run_folder(saved, tmp_path) -> Path:
    for step in (3, 20):
        shutil.copytree(saved, tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def test_a_runs_folder_is_its_best_checkpoint(run_folder):
    write_file(run_folder / "best.json", '{"checkpoint": "checkpoint-3", "val_loss": 1.0}')
    said: list[str] = []
    assert Checkpoint.open(run_folder, said.append).path.name == "checkpoint-3"
    assert said == [f"checkpoint: {run_folder / 'checkpoint-3'}, the best of the run"]


def test_a_runs_folder_without_a_best_checkpoint_is_its_newest_that_is_whole(run_folder):
    assert Checkpoint.open(run_folder).path.name == "checkpoint-20"
    (run_folder / "checkpoint-20" / "router.safetensors").write_bytes(b"")
    assert Checkpoint.open(run_folder).path.name == "checkpoint-3"
    DyLoRA_MoE.from_pretrained(run_folder)


def test_a_damaged_best_checkpoint_is_said_and_skipped(run_folder):
    write_file(run_folder / "best.json", '{"checkpoint": "checkpoint-3"}')
    (run_folder / "checkpoint-3" / "router.safetensors").write_bytes(b"")
    said: list[str] = []
    assert Checkpoint.open(run_folder, said.append).path.name == "checkpoint-20"
    assert said[0].startswith(f"skipped {run_folder / 'checkpoint-3'}: ")
    assert "router.safetensors has changed" in said[0]


@pytest.mark.parametrize("name", ["../saved", "/etc", None, "checkpoint-3/x"])
def test_the_best_checkpoint_cannot_lie_elsewhere(name, run_folder):
    write_file(run_folder / "best.json", json.dumps({"checkpoint": name}))
    with pytest.raises(ValueError, match="but must be the name of a checkpoint"):
        Checkpoint.open(run_folder)


def test_files_that_change_after_the_opening_are_seen(saved):
    checkpoint = Checkpoint.open(saved)
    (saved / "notes.txt").write_text("mine")
    assert checkpoint.changed() == []
    (saved / "router.safetensors").unlink()
    (saved / "optimizer.pt").write_bytes(b"")
    assert checkpoint.changed() == ["optimizer.pt", "router.safetensors"]


# Adapters of others: what info tells, import reads, and the other way round

STOCK = {
    "plain": {},
    "a pattern for targets": {"target_modules": r".*\.(q|v)_proj"},
    "a pattern for what is left out": {"exclude_modules": r"lm_head|.*embed.*"},
    "a rank for a whole path": {"rank_pattern": {"^model.layers.0.self_attn.q_proj$": 4}},
    "no targets": {"target_modules": None},
    "values of eva": {"init_lora_weights": "eva"},
    "a new option that is unset": {"some_new_option": None, "another": False},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "Arrow": {"arrow_config": {"top_k": 1}},
    "a bias of B": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "a text for a flag": {"use_rslora": "no"},
    "an option that nobody knows": {"scale_by_norm": 3},
    "a target that is left out": {"exclude_modules": ["q_proj"]},
    "a rank beyond all widths": {"r": 100_000},
}
READ = ("plain", "a pattern", "a rank for", "no targets", "values of eva", "a new option")


@pytest.mark.parametrize("kind", STOCK)
def test_info_and_import_give_one_answer_of_an_adapter(kind, tiny_base, tmp_path, capsys):
    make_adapter(tiny_base("llama"), tmp_path / "a", target_modules=["q_proj", "v_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | STOCK[kind]))

    def answer(read) -> str:
        try:
            read()
        except ValueError as error:
            return str(error)
        return "reads"

    answers = {
        answer(lambda: read_stock_adapter(tmp_path / "a")),
        answer(lambda: print_info(str(tmp_path / "a"))),
        answer(lambda: AdapterFolder.open(tmp_path / "a").adapters()),
    }
    assert len(answers) == 1
    assert (answers == {"reads"}) == kind.startswith(READ)


PLAIN = MoELoraConfig(num_experts=1, use_moe_routing=False)


def test_a_name_that_is_left_out_is_no_missing_projection(tiny_base, tmp_path):
    """peft takes exclude_modules first: nothing of that name is adapted."""
    base = tiny_base("llama")
    left_out = ["layers.0.self_attn.q_proj"]
    make_adapter(base, tmp_path / "a", target_modules=["q_proj"], exclude_modules=left_out)
    model = load_peft_experts(base, [tmp_path / "a"], PLAIN, report=print)
    assert list(model.mixture.adapters) == ["model.layers.1.self_attn.q_proj"]


def test_a_projection_that_is_missing_is_one_whatever_else_is_left_out(tiny_base, tmp_path):
    base = tiny_base("llama")
    make_adapter(base, tmp_path / "a", target_modules=["q_proj", "k_proj"])
    adapter = read_stock_adapter(tmp_path / "a")
    del adapter.weights["model.layers.1.self_attn.k_proj"]
    adapter.config["exclude_modules"] = ["lm_head"]
    write_adapter(tmp_path / "a", adapter)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj, but it has no"):
        load_peft_experts(base, [tmp_path / "a"], PLAIN, report=print)
