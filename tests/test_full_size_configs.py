"""The configs for bases of the hub, each run small on a random model of the same architecture, and
the memory that each is said to take."""

import json
import re
from pathlib import Path

import pytest
import torch

from dylora.cli.config_file import load_run_config
from dylora.storage.checkpoint import Checkpoint
from dylora.training.loop import train
from families import FAMILIES
from full_size import FULL_SIZE, estimate_full_size

CONFIGS = Path(__file__).parents[1] / "configs"
TABLE = CONFIGS.parent / "docs" / "configs.md"
# Config -> the architecture of its base in the table of families.
ARCHITECTURES = {
    "code_alpaca_mbpp": "gemma",
    "qwen3_0.6b": "qwen3",
    "qwen3_4b": "qwen3",
    "llama_3.2_1b": "llama_tied",
    "gemma_3_1b": "gemma3",
    "smollm3_3b": "smollm3",
    "gpt_oss_20b": "gpt_oss",
}
SMALL = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "data.max_length": "64",
    "train.max_steps": "2",
    "train.batch_size": "2",
    "train.gradient_accumulation_steps": "2",
    "train.warmup_steps": "0",
    "eval.eval_subset": "2",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_config_trains_all_experts_and_routers_of_attention_on_its_architecture(
    name, random_base, tokenizer, rows_file, tmp_path
):
    family = FAMILIES[ARCHITECTURES[name]]
    sizes = family.sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    random_base(family.config_class, **sizes).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    columns = {"instruction_column": "question", "output_column": "answer"}
    sources = json.dumps([{"name": "rows", "path": str(rows_file)} | columns])
    small = SMALL | {"model.base": str(tmp_path / "base"), "output_dir": str(tmp_path)}
    overrides = [f"{key}={value}" for key, value in small.items()]
    config = load_run_config(CONFIGS / f"{name}.yaml", [*overrides, f"data.sources={sources}"])

    run = train(config)

    model = run.model
    assert len(list(model.routers())) == len(family.projections)
    adapted = {path.rpartition(".")[2] for path in model.mixture.adapters}
    assert adapted == {name for block in family.projections for name in block}
    for path, parameter in model.named_expert_parameters():
        if path.endswith("lora_B"):  # begins as zeros
            assert parameter.abs().sum(dim=(1, 2)).min() > 0, path
    assert all(torch.isfinite(p).all() for _, p in model.own_parameters())
    assert Checkpoint.open(tmp_path / name).adapter(config.moe.num_experts - 1)


def test_every_config_whose_base_is_of_the_hub_is_among_them():
    bases = {path.stem: load_run_config(path).model.base for path in CONFIGS.glob("*.yaml")}
    of_the_hub = {name for name, base in bases.items() if "/" in base}
    assert of_the_hub == set(ARCHITECTURES) == set(FULL_SIZE)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_config_and_the_table_tell_the_memory_that_the_estimate_gives_at_full_size(
    name, tmp_path
):
    found = estimate_full_size(name, tmp_path)

    assert found.base / 2 == pytest.approx(FULL_SIZE[name].parameters, rel=1e-4)  # bfloat16
    head = (CONFIGS / f"{name}.yaml").read_text().partition("\nname:")[0].replace("\n# ", " ")
    [told] = re.findall(r"about ([\d.]+ GB)", head)
    # Told to a tenth; what the libraries of a machine keep moves that digit.
    assert float(told.split()[0]) == pytest.approx(found.total / 1e9, rel=0.015)
    assert f"python run.py info --config configs/{name}.yaml --estimate" in head
    row = re.search(rf"^\| `configs/{name}.yaml` .*", TABLE.read_text(encoding="utf-8"), re.M)
    assert row
    assert row[0].split(" | ")[4] == f"{told} (estimate)"
