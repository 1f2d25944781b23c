"""Hostile adapters, checkpoints and configs are refused in one line: at once, in bounded memory,
with the base as it was and nothing written."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import harm
import hostile
from dylora import DyLoRA_MoE
from dylora.adapters.projection import StackedLoRA
from dylora.cli.config_file import load_run_config
from dylora.cli.main import main
from dylora.experts import Expert
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.manifest import MANIFEST, hash_file
from dylora.storage.peft_format import read_adapter
from dylora.storage.safe_io import check_link, read_json
from dylora.storage.schema import RECORD

ON_CPU = ("--device", "cpu", "--tokens", "16")
COMMANDS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "info": lambda folder, base, out: ["info", "--checkpoint", str(folder)],
    "export": lambda folder, base, out: [
        *("export", "--checkpoint", str(folder), "--out", str(out)),
    ],
    "generate": lambda folder, base, out: [
        *("generate", "--checkpoint", str(folder), "--prompt", "x", "--base", str(base)),
    ],
    "validate": lambda folder, base, out: [
        *("validate", "--checkpoint", str(folder), "--base", str(base), *ON_CPU),
    ],
}
# Which commands come to see what a case harms: info reads no tensor and export no router.
WHO_SEES = {
    "description": ("info", "export", "generate", "validate"),
    "adapter": ("export", "generate", "validate"),
    "model": ("generate", "validate"),
}


def ids(cases: list[hostile.Case]) -> list[str]:
    return [f"{case.file}: {case.name}" for case in cases]


@pytest.fixture(scope="session")
def untrusted(tiny_base, mixture_on, tmp_path_factory) -> Path:
    """What all cases harm a copy of: a base, a checkpoint on it, and a secret beside it."""
    tree = tmp_path_factory.mktemp("untrusted")
    base = tiny_base("llama")
    base.save_pretrained(tree / "base")
    model = mixture_on(base)
    model.base_name = str(tree / "base")
    model.training_record = {"step": 7, "targets": 100, "seed": 0}
    model.save_pretrained(tree / "checkpoint")
    (tree / "secret").write_text(harm.SECRET)
    return tree


@pytest.fixture
def tree(untrusted, tmp_path) -> Path:
    """A fresh copy without the base, which no case changes."""
    shutil.copytree(untrusted / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "secret").write_text(harm.SECRET)
    return tmp_path


@pytest.fixture(scope="session")
def base(tiny_base):
    return tiny_base("llama")


@pytest.fixture(scope="session", autouse=True)
def _imported(untrusted, base, tmp_path_factory):
    """What is imported late is imported before anything is timed; and the good files are good."""
    out = tmp_path_factory.mktemp("out")
    for name in ("info", "export"):
        command = COMMANDS[name](untrusted / "checkpoint", untrusted / "base", out / name)
        assert main(command) == 0
    assert main(["validate", "--checkpoint", str(untrusted / "checkpoint"), *ON_CPU]) == 0
    # generate loads all but a tokenizer, which this base has none of
    assert main(["generate", "--checkpoint", str(untrusted / "checkpoint"), "--prompt", "x"]) == 2


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def one_line(capsys, arguments: list[str]) -> str:
    """What a command says of a user's error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    # info tells of a damaged folder what can still be known, before its error.
    assert out == "" or (arguments[0] == "info" and "DAMAGED" in out.splitlines()[0])
    assert out.replace("\n", "").isprintable()
    *bars, line = err.splitlines()  # of transformers, while it loads a base
    assert line.startswith("error: ")
    assert [text for text in bars if text and "Loading weights" not in text] == []
    raise ValueError(line.removeprefix("error: "))


@pytest.mark.parametrize("case", hostile.ADAPTER, ids=ids(hostile.ADAPTER))
def test_a_hostile_adapter_is_refused(case, tree):
    adapter = tree / "checkpoint" / "peft_adapters" / "expert_1"
    case.damage(adapter / case.file)
    message = harm.refusal(lambda: read_adapter(adapter), tree)
    assert str(adapter / case.file) in message
    assert case.words in message
    assert harm.SECRET not in message


ADAPTERS = [case._replace(file=f"peft_adapters/expert_1/{case.file}") for case in hostile.ADAPTER]
CHECKPOINTS = [*ADAPTERS, *hostile.CHECKPOINT, *hostile.MANIFESTS]


@pytest.mark.parametrize(("number", "case"), list(enumerate(CHECKPOINTS)), ids=ids(CHECKPOINTS))
def test_a_hostile_checkpoint_is_refused_by_python_and_by_a_command(
    number, case, tree, untrusted, base, capsys
):
    checkpoint = tree / "checkpoint"
    case.damage(checkpoint / case.file)
    if case not in hostile.MANIFESTS:
        harm.seal(checkpoint)
    before = weights_hash(base)
    messages = [harm.refusal(lambda: DyLoRA_MoE.from_pretrained(checkpoint, base=base), tree)]
    assert weights_hash(base) == before
    command = WHO_SEES[case.where][number % len(WHO_SEES[case.where])]
    arguments = COMMANDS[command](checkpoint, untrusted / "base", tree / "out")
    messages.append(harm.refusal(lambda: one_line(capsys, arguments), tree))
    for message in messages:
        assert str(checkpoint) in message
        assert case.file in message
        assert harm.SECRET not in message
        # Of an adapter's pipe or link `verify` speaks before `read_adapter` could.
        assert case.words in message or case in ADAPTERS


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_meets_many_kinds_of_harm(command):
    met = [
        case
        for number, case in enumerate(CHECKPOINTS)
        if WHO_SEES[case.where][number % len(WHO_SEES[case.where])] == command
    ]
    assert len(met) >= 15


def test_files_behind_a_link_are_found_where_the_manifest_leaves_them_out(tree):
    checkpoint = tree / "checkpoint"
    harm.moved_out(checkpoint / "peft_adapters")
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    kept = {name: entry for name, entry in listed.items() if "peft_adapters" not in name}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": kept}))
    message = harm.refusal(lambda: Checkpoint.open(checkpoint), tree)
    assert f"{checkpoint}/peft_adapters is a link that leads out" in message


def test_a_file_that_no_loader_reads_is_not_hashed_through_a_link(tree):
    checkpoint = tree / "checkpoint"
    (checkpoint / "notes.txt").symlink_to(tree / "secret")
    files = {"notes.txt": {"size": 9, "sha256": hash_file(tree / "secret")}}
    harm.in_json("files", to=lambda old: old | files)(checkpoint / MANIFEST)
    message = harm.refusal(lambda: Checkpoint.open(checkpoint), tree)
    assert f"{checkpoint}/notes.txt is a link that leads out" in message


# The base that an untrusted file names


@pytest.mark.parametrize("name", hostile.BASES)
@pytest.mark.parametrize("entry", ["python", "generate", "validate"])
def test_a_base_out_of_here_is_not_followed(name, entry, tree, capsys):
    checkpoint = tree / "checkpoint"
    harm.in_json("base_model_name_or_path", to=name)(checkpoint / "config.json")
    harm.seal(checkpoint)
    calls = {
        "python": lambda: DyLoRA_MoE.from_pretrained(checkpoint),
        "generate": lambda: one_line(
            capsys, ["generate", "--checkpoint", str(checkpoint), "--prompt", "x"]
        ),
        "validate": lambda: one_line(capsys, ["validate", "--checkpoint", str(checkpoint)]),
    }
    message = harm.refusal(calls[entry], tree)
    assert f"{checkpoint}/config.json names the base '{name}'" in message


def test_a_base_that_is_given_is_used_whatever_the_checkpoint_names(tree, base):
    harm.in_json("base_model_name_or_path", to="../evil")(tree / "checkpoint" / "config.json")
    harm.seal(tree / "checkpoint")
    model = DyLoRA_MoE.from_pretrained(tree / "checkpoint", base=base)
    assert model.unload() is base


def test_the_code_that_comes_with_a_base_is_never_run(untrusted, tree, monkeypatch):
    """Nor is anybody asked whether it may: transformers would, on the terminal."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    base = Path(shutil.copytree(untrusted / "base", tree / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["Evil"]}
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Evil"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tree / 'owned')!r}, 'w')\n")
    harm.in_json("base_model_name_or_path", to=str(base))(tree / "checkpoint" / "config.json")
    harm.seal(tree / "checkpoint")
    message = harm.refusal(lambda: DyLoRA_MoE.from_pretrained(tree / "checkpoint"), tree)
    assert f"cannot load the model {str(base)!r}" in message
    assert asked == []


def test_info_says_what_there_is_of_a_record_that_says_little(tree, capsys):
    harm.in_json("training", to={"step": 1, "data": {"sources": [{"name": "mine"}]}})(
        tree / "checkpoint" / "config.json"
    )
    harm.in_json("moe", to={"num_experts": 2})(tree / "checkpoint" / "config.json")
    harm.seal(tree / "checkpoint")
    assert main(["info", "--checkpoint", str(tree / "checkpoint")]) == 0
    assert "mine: ? rows, split generated" in capsys.readouterr().out


# What is not refused takes no more than its files


def test_a_vast_rank_for_new_experts_costs_nothing_until_one_comes(tree, base, monkeypatch):
    """Every expert may have been merged to a rank below that of the configuration."""
    harm.in_json("moe", "r", to=65_536)(tree / "checkpoint" / "config.json")
    harm.seal(tree / "checkpoint")
    made = []

    def create_stack(self, first, rank, *rest, **options):
        made.append(rank)
        return original(self, first, rank, *rest, **options)

    original = StackedLoRA.create_stack
    monkeypatch.setattr(StackedLoRA, "create_stack", create_stack)
    DyLoRA_MoE.from_pretrained(tree / "checkpoint", base=base).unload()
    assert set(made) == {3}


def test_the_table_that_is_checked_is_the_one_that_is_written():
    assert {item.name for item in fields(Expert)} | {"maturity"} == RECORD.keys()


def test_a_checkpoint_in_the_cache_of_the_hub_is_read(tree):
    """There every file is a link into a folder of blobs."""
    blobs = tree / "hub" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = tree / "hub" / "snapshots" / "0123abc"
    shutil.copytree(tree / "checkpoint", snapshot)
    for number, file in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert Checkpoint.open(snapshot).experts[0]["name"] == "expert_0"


def test_a_link_beside_the_blobs_of_the_hub_is_refused(tree):
    snapshot = tree / "hub" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(tree / "secret")
    with pytest.raises(ValueError, match="leads out of its folder"):
        check_link(snapshot / "config.json", snapshot)


def test_infinity_is_read_only_where_it_is_expected(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"best": Infinity}')
    assert read_json(file, infinite=True) == {"best": float("inf")}
    with pytest.raises(ValueError, match="Infinity is no number"):
        read_json(file)


# Configs


@pytest.mark.parametrize("case", hostile.CONFIGS, ids=ids(hostile.CONFIGS))
@pytest.mark.parametrize("entry", ["python", "info"])
def test_a_hostile_config_is_refused(case, entry, tmp_path, capsys):
    file = tmp_path / case.file
    file.write_text("name: a\n")
    assert load_run_config(file).name == "a"
    case.damage(file)
    calls = {
        "python": lambda: load_run_config(file),
        "info": lambda: one_line(capsys, ["info", "--config", str(file)]),
    }
    message = harm.refusal(calls[entry], tmp_path)
    assert str(file) in message
    assert case.words in message
