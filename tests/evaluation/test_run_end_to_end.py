"""The commands on the embedded base, as a user runs them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dylora import DyLoRA_MoE
from dylora.base_models import EMBEDDED_BASES, load_tokenizer
from dylora.cli.main import main
from dylora.evaluation.passk.generation import generate_in_batches, pad_left
from dylora.evaluation.passk.skills import skill_problems
from dylora.evaluation.report import SetRow, format_table, routed_shares

CONFIG = """
name: end_to_end
output_dir: {folder}
model: {{base: tiny-code-llama, dtype: float32, device: cpu}}
moe: {{num_experts: 2, r: 2, lora_alpha: 4, top_k_experts: 1}}
data:
  sources:
    - {{name: skill/sql, rows: 12}}
    - {{name: skill/arithmetic, rows: 12}}
train: {{max_steps: 2, batch_size: 2}}
eval: {{eval_subset: 4, skill_answers: 2, batch_size: 4}}
log: {{logging_steps: 1}}
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("end_to_end")
    file = folder / "config.yaml"
    file.write_text(CONFIG.format(folder=folder / "runs"))
    return file


@pytest.fixture(scope="module")
def run_folder(config_file) -> Path:
    """A trained run; made by the command."""
    assert main(["train", "--config", str(config_file)]) == 0
    return config_file.parent / "runs" / "end_to_end"


def test_training_leaves_everything_it_promises(run_folder):
    promised = ["config.yaml", "env.json", "metrics.jsonl", "results.json", "best.json"]
    promised += ["loss.png", "usage.png", "maturity.png", "checkpoint-2/config.json"]
    assert [name for name in promised if not (run_folder / name).stat().st_size] == []


def test_the_report_compares_with_the_base_itself(run_folder):
    rows = {
        row["name"]: row for row in json.loads((run_folder / "results.json").read_text())["sets"]
    }
    assert rows.keys() == {"skill/sql", "skill/arithmetic"}
    for row in rows.values():
        assert 0 < row["trained_loss"] < row["base_loss"]  # two steps help already
        assert row["base_passed"] is not None
        assert row["expert"] in (0, 1)


def test_the_resolved_config_trains_the_same_run_again(run_folder, tmp_path):
    again = ["--config", str(run_folder / "config.yaml"), "--output_dir", str(tmp_path)]
    assert main(["train", *again, "--eval.skill_answers", "0"]) == 0
    one, other = (
        (folder / "checkpoint-2" / "router.safetensors").read_bytes()
        for folder in (run_folder, tmp_path / "end_to_end")
    )
    assert one == other


def test_evaluate_gives_the_validation_loss_of_training(run_folder, config_file, capsys):
    checkpoint = str(run_folder / "checkpoint-2")
    assert main(["evaluate", "--config", str(config_file), "--checkpoint", checkpoint]) == 0
    printed = capsys.readouterr().out
    assert "note:" not in printed
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    loss = next(row["val/loss"] for row in rows if "val/loss" in row)
    assert f"{loss:.4f}" in printed


def test_generate_answers_and_shows_the_routing(run_folder, capsys):
    checkpoint = ["--checkpoint", str(run_folder / "checkpoint-2")]
    prompt = ["--prompt", "import os\n", "--raw", "--max_new_tokens", "4", "--show_routing"]
    assert main(["generate", *checkpoint, *prompt]) == 0
    printed = capsys.readouterr().out
    assert "mean shares:" in printed
    assert "expert" in printed


def test_export_writes_one_adapter_an_expert(run_folder, tmp_path):
    checkpoint = ["--checkpoint", str(run_folder / "checkpoint-2")]
    assert main(["export", *checkpoint, "--out", str(tmp_path / "out"), "--portable"]) == 0
    configs = sorted((tmp_path / "out").glob("expert_*/adapter_config.json"))
    assert len(configs) == 2
    assert json.loads(configs[0].read_text())["lora_alpha"] == 2


def test_info_says_what_a_checkpoint_is(run_folder, capsys):
    assert main(["info", "--checkpoint", str(run_folder / "checkpoint-2")]) == 0
    printed = capsys.readouterr().out
    for part in ("tiny-code-llama", "expert_1", "rank 2", "2 steps", "skill/sql"):
        assert part in printed


def test_info_names_a_file_that_has_changed(run_folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "checkpoint-2"
    shutil.copytree(run_folder / "checkpoint-2", copy)
    (copy / "router.safetensors").write_bytes(b"")
    assert main(["info", "--checkpoint", str(copy)]) == 2
    assert "router.safetensors has changed" in capsys.readouterr().err


def test_a_checkpoint_says_what_it_was_trained_on(run_folder):
    training = json.loads((run_folder / "checkpoint-2" / "config.json").read_text())["training"]
    assert training["step"] == 2
    assert [source["name"] for source in training["data"]["sources"]] == [
        "skill/sql",
        "skill/arithmetic",
    ]
    assert training["data"]["sources"][0]["training_rows"] == 12


def test_answers_do_not_depend_on_the_batch(run_folder):
    model = DyLoRA_MoE.from_pretrained(run_folder / "checkpoint-2")
    tokenizer = load_tokenizer("tiny-code-llama")
    problems = [*skill_problems("skills/sql", 2), *skill_problems("skills/arithmetic", 2)]
    together = generate_in_batches(model, tokenizer, problems, 4, max_new_tokens=12)
    alone = generate_in_batches(model, tokenizer, problems, 1, max_new_tokens=12)
    assert together == alone


def test_prompts_are_padded_in_front():
    ids, mask = pad_left([[5, 6], [7]], pad=0)
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_the_table_names_the_expert_that_routers_gave_most_and_no_shared_one():
    usage_NE = torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.0, 0.5]])
    torch.testing.assert_close(routed_shares(usage_NE, 1), torch.tensor([0.0, 0.4, 0.6]))
    torch.testing.assert_close(routed_shares(usage_NE, 0), usage_NE.mean(0))


def test_sets_without_a_checker_have_no_columns_of_answers():
    row = SetRow("rows", 2.0, 1.0, None, None, 0, 0.5)
    assert "passes" not in format_table([row], 0)
    assert "passes" in format_table([row._replace(trained_passed=0.5, base_passed=0.0)], 4)


def test_the_embedded_base_fits_its_budget():
    folder = EMBEDDED_BASES["tiny-code-llama"]
    stored = sum(f.stat().st_size for f in folder.iterdir() if f.name != "README.md")
    assert stored <= 12e6
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert 3e6 <= sum(tensor.numel() for tensor in tensors.values()) <= 6e6
