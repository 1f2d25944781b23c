"""The commands on the embedded base, as a user runs them."""

import json
from html import unescape
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from dylora import DyLoRA_MoE
from dylora.base_models import EMBEDDED_BASES, load_tokenizer
from dylora.cli.main import main
from dylora.evaluation import report
from dylora.evaluation.passk.generation import generate_in_batches, pad_left
from dylora.evaluation.passk.skills import skill_problems
from dylora.evaluation.report import SetRow, expert_shares, format_table
from dylora.evaluation.report_text import describe_routing, format_share
from dylora.tasks import generate_tasks

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
    promised += ["routing.json", "report.html"]
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


def test_every_answer_is_kept_with_its_question_a_right_one_and_the_verdict(run_folder):
    results = json.loads((run_folder / "results.json").read_text())
    for skill, answers in results["answers"].items():
        asked = [task.instruction for task in generate_tasks(skill, "test", 2)]
        assert [answer["question"] for answer in answers] == asked
        row = next(row for row in results["sets"] if row["name"] == f"skill/{skill}")
        assert sum(answer["passed"] for answer in answers) == 2 * row["trained_passed"]
    page = (run_folder / "report.html").read_text("utf-8")
    assert results["answers"]["sql"][0]["question"] in unescape(page)


def test_texts_are_kept_with_the_gates_that_the_model_gives(run_folder):
    found = json.loads((run_folder / "routing.json").read_text())
    assert [text["set"] for text in found["texts"]] == ["skill/sql"] * 2 + ["skill/arithmetic"] * 2
    tokenizer = load_tokenizer("tiny-code-llama")
    model = DyLoRA_MoE.from_pretrained(run_folder / "checkpoint-2").eval()
    for text in found["texts"]:
        whole = "".join(text["tokens"])
        assert whole.startswith("<s>### Instruction:")
        ids = tokenizer(whole.removeprefix("<s>").removesuffix("</s>"))["input_ids"]
        if len(ids) + whole.endswith("</s>") != len(text["tokens"]):
            continue  # put together, the answer's first token may merge with the prompt's last
        gates_SNE = model.get_routing_weights(torch.tensor([ids]))[0]
        assert len(text["gates"]) == 1 + gates_SNE.shape[1]
        for layer, expected_SE in zip(
            text["gates"], [gates_SNE.mean(1), *gates_SNE.unbind(1)], strict=True
        ):
            pairs = torch.tensor(layer).view(-1, 2, 2)[: len(ids)]  # [S, top, (expert, percent)]
            given = torch.zeros_like(expected_SE).scatter(1, pairs[..., 0], pairs[..., 1] / 100.0)
            assert (given - expected_SE).abs().max() < 0.006
        break
    else:
        pytest.fail("no text could be compared")


def test_a_prompt_of_ones_own_comes_first_in_the_texts_and_replaces_the_last_one(
    run_folder, capsys
):
    for prompt in ("Count the rows of films.", "Add 3 to 4."):
        out = str(run_folder.parent / "own.html")
        assert main(["report", str(run_folder), "--prompt", prompt, "--out", out]) == 0
    texts = json.loads((run_folder / "routing.json").read_text())["texts"]
    assert [text["set"] for text in texts].count("your prompt") == 1
    assert "Add 3 to 4." in "".join(texts[0]["tokens"])
    assert len(texts[0]["tokens"]) > texts[0]["prompt"]  # it was answered
    assert main(["report", str(run_folder), str(run_folder), "--prompt", "x"]) == 2
    assert "--prompt is for the report of one run" in capsys.readouterr().err


def test_what_goes_wrong_while_drawing_is_said_and_ends_no_run(run_folder, monkeypatch):
    for error, told in (
        (ImportError("No module named 'jinja2'"), "left out (No module named 'jinja2'), then"),
        (OSError("disk full"), "(disk full): free some space, then python run.py report"),
        (KeyError("x"), "(KeyError: 'x'): python run.py report"),
    ):
        lines = []
        monkeypatch.setattr(report, "write_page", Mock(side_effect=error))
        assert report.draw_all(run_folder, ["loss"], lines.append) == []
        assert told in lines[0]
        assert str(run_folder) in lines[0]


def test_the_summary_counts_experts_and_what_is_not_computed():
    found = {"experts": 4, "shared_experts": 1, "active_experts": 2.0}
    found |= {"parameters": 4_000_000, "active_parameters": 1_000_000}
    told = describe_routing(found)
    assert told.startswith("a token uses 2.00 of 4 experts (1 of them for all tokens)")
    assert told.endswith("1.00 of 4.00 million parameters of experts and routers: 75% of these are "
                         "not computed for it")  # fmt: skip
    assert "routing is dense" in describe_routing(found | {"active_experts": 4.0})


def test_a_share_has_wilsons_interval():
    assert format_share(0.44, 50) == "44% [31, 58]"
    assert format_share(None, 50) == "-"


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
    torch.testing.assert_close(expert_shares(usage_NE, 1), torch.tensor([0.0, 0.4, 0.6]))
    torch.testing.assert_close(expert_shares(usage_NE, 0), usage_NE.mean(0))


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
