import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dylora.data.batching import collate
from dylora.data.prepare import load_data
from dylora.data.splits import text_hash
from dylora.data.tokenize import TokenizedSet
from dylora.kernels.cross_entropy import target_positions
from dylora.run_config import DataConfig, SourceConfig
from published import CODE_ALPACA, MBPP, needs_published_rows

BOS, EOS = 1, 2


def source(path: Path, name: str = "own") -> SourceConfig:
    return SourceConfig(
        name=name, path=str(path), instruction_column="question", output_column="answer"
    )


def write_rows(path: Path, answers: list[str]) -> Path:
    lines = (json.dumps({"question": f"Q{i}", "answer": a}) for i, a in enumerate(answers))
    path.write_text("\n".join(lines))
    return path


def config_for(path: Path, **settings) -> DataConfig:
    return DataConfig(sources=[source(path)], **settings)


def targets(example: dict[str, list[int]]) -> list[int]:
    return [label for label in example["labels"] if label != -100]


# Tokens


def test_only_the_answer_and_eos_are_trained_on(tmp_path, tokenizer):
    data = load_data(
        config_for(write_rows(tmp_path / "r.jsonl", ["def f(): pass"] * 10)), tokenizer
    )
    example = data.train[0][0]
    assert example["input_ids"][0] == BOS
    assert tokenizer.decode(targets(example)) == "def f(): pass</s>"
    prompt = len(example["labels"]) - len(targets(example))
    assert example["labels"][:prompt] == [-100] * prompt
    assert example["labels"][prompt:] == example["input_ids"][prompt:]
    assert tokenizer.decode(example["input_ids"][:prompt]).endswith("### Response:\n")


def test_labels_have_exactly_one_eos_with_a_tokenizer_that_appends_its_own(
    tmp_path, make_tokenizer
):
    tokenizer = make_tokenizer(ends=True)
    data = load_data(config_for(write_rows(tmp_path / "r.jsonl", ["abc"] * 10)), tokenizer)
    assert data.train[0][0]["input_ids"].count(EOS) == 1


def test_a_real_eos_is_trained_on_even_when_pad_is_eos(tmp_path, tokenizer):
    file = write_rows(tmp_path / "r.jsonl", ["a", "a rather longer answer than that"] * 10)
    examples = load_data(config_for(file), tokenizer).train[0]
    pair = sorted([examples[0], examples[1]], key=lambda example: len(example["input_ids"]))
    batch = collate(pair, pad_token_id=EOS)
    short = len(pair[0]["input_ids"])
    assert batch["labels"][0, short - 1] == EOS
    assert batch["attention_mask"][0, short - 1] == 1
    assert (batch["labels"][0, short:] == -100).all()
    assert (batch["attention_mask"][0, short:] == 0).all()
    assert (batch["input_ids"][0, short:] == EOS).all()
    assert batch["attention_mask"][1].all()
    positions = batch.pop("target_positions")
    assert torch.equal(positions, target_positions(batch["labels"]))
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"),
        (torch.int64, torch.Size([2, len(pair[1]["input_ids"])])),
    )


def test_over_long_rows_are_dropped_and_counted(tmp_path, tokenizer):
    file = write_rows(tmp_path / "r.jsonl", ["short"] * 20 + ["x y z " * 200] * 20)
    data = load_data(config_for(file, over_long="drop", max_length=64), tokenizer)
    reports = data.reports[0].splits.values()
    assert sum(report.dropped for report in reports) == 20
    assert sum(report.kept for report in reports) == 20
    assert sum(report.truncated for report in reports) == 0
    assert all(targets(examples[i])[-1] == EOS for examples in data.train for i in range(5))


def test_over_long_answers_are_cut_without_eos_and_counted(tmp_path, tokenizer):
    file = write_rows(tmp_path / "r.jsonl", ["short"] * 20 + ["x y z " * 200] * 20)
    data = load_data(config_for(file, over_long="truncate", max_length=64), tokenizer)
    assert sum(report.truncated for report in data.reports[0].splits.values()) == 20
    assert sum(report.dropped for report in data.reports[0].splits.values()) == 0
    examples = data.train[0]
    cut = [examples[i] for i in range(len(examples)) if examples.length(i) == 64]
    assert len(cut) == data.reports[0].splits["train"].truncated
    assert not any(EOS in example["input_ids"] for example in cut)
    assert all(example["input_ids"][0] == BOS for example in cut)


def test_an_example_of_exactly_max_length_keeps_its_eos(tmp_path, tokenizer):
    file = write_rows(tmp_path / "r.jsonl", ["an answer"] * 10)
    length = load_data(config_for(file), tokenizer).train[0].length(0)
    for over_long in ("drop", "truncate"):
        data = load_data(config_for(file, max_length=length, over_long=over_long), tokenizer)
        report = data.reports[0].splits["train"]
        assert (report.kept, report.truncated, report.dropped) == (9, 0, 0)
        assert data.train[0][0]["labels"][-1] == EOS
    cut = load_data(config_for(file, max_length=length - 1, over_long="truncate"), tokenizer)
    assert cut.reports[0].splits["train"].truncated == 9
    assert EOS not in cut.train[0][0]["labels"]


def test_a_prompt_that_leaves_no_room_is_dropped_even_when_truncating(tmp_path, tokenizer):
    lines = [{"question": "Q" * 300, "answer": "an answer " * 500}] + [
        {"question": f"Q{i}", "answer": "a"} for i in range(20)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    config = config_for(tmp_path / "r.jsonl", max_length=64, over_long="truncate")
    reports = load_data(config, tokenizer).reports[0].splits
    assert sum(report.dropped for report in reports.values()) == 1


def test_a_split_without_examples_is_an_error(tmp_path, tokenizer):
    file = write_rows(tmp_path / "r.jsonl", ["an answer " * 20] * 10)
    with pytest.raises(
        ValueError, match=r"no train example: 9 rows .* 9 of them over-long at .* 48"
    ):
        load_data(config_for(file, max_length=48), tokenizer)
    with pytest.raises(ValueError, match="no train example: 0 rows"):
        load_data(config_for(write_rows(tmp_path / "one.jsonl", ["a"])), tokenizer)


def test_examples_are_stored_at_four_bytes_a_token():
    examples = TokenizedSet("own", "train")
    for i in range(100):
        examples.append([1, i], [i] * i)
    assert len(examples) == 100
    assert examples[7] == {"input_ids": [1, 7] + [7] * 7, "labels": [-100, -100] + [7] * 7}
    assert (examples.length(7), examples.tokens, examples.mean_targets) == (9, 5150, 49.5)
    assert examples._ids.itemsize == 4
    with pytest.raises(IndexError, match="example 100 of 100"):
        examples[100]


def test_no_sources_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        load_data(DataConfig(), tokenizer)


def test_datasets_is_not_imported_before_it_is_needed():
    code = "import sys, dylora.data.prepare; sys.exit('datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Subsets, reports, provenance


def test_a_subset_is_drawn_with_the_seed_and_full_despite_dropped_rows(tmp_path, tokenizer):
    answers = [f"{i} " * 100 if i % 2 else f"{i}" for i in range(100)]
    file = write_rows(tmp_path / "r.jsonl", answers)

    def questions(seed, count):
        config = config_for(file, seed=seed, max_length=64)
        data = load_data(config, tokenizer, training_subset=count, eval_subset=3)
        assert len(data.validation[0]) == 3
        return [tuple(data.train[0][i]["input_ids"]) for i in range(len(data.train[0]))]

    ten = questions(0, 10)
    assert len(set(ten)) == 10
    assert ten == questions(0, 10)
    assert ten == questions(0, 20)[:10]
    assert set(ten) != set(questions(1, 10))


def test_a_share_of_the_rows_is_a_subset_too(tmp_path, tokenizer):
    rows = [{"question": f"Question {n}?", "answer": str(n)} for n in range(100)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(file)
    whole = len(load_data(config, tokenizer).train[0])
    assert len(load_data(config, tokenizer, training_subset=0.1).train[0]) == round(whole / 10)
    assert len(load_data(config, tokenizer, training_subset=1e-6).train[0]) == 1


@pytest.mark.parametrize("words", [2, 2000])
def test_a_share_of_texts_is_that_share_of_their_windows(words, tmp_path, tokenizer):
    file = tmp_path / "texts.jsonl"
    rows = [{"text": " ".join(f"{n}" for _ in range(words))} for n in range(100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [SourceConfig(name="own", path=str(file))]
    config = DataConfig(sources=sources, max_length=64)
    whole = len(load_data(config, tokenizer).train[0])
    tenth = load_data(config, tokenizer, training_subset=0.1)
    assert len(tenth.train[0]) == pytest.approx(whole / 10, abs=max(1, whole / 100))
    assert tenth.reports[0].splits["train"].rows == 90
    assert len(load_data(config, tokenizer, training_subset=3).train[0]) == 3


def test_a_subset_depends_on_the_seed_where_the_split_does_not(tmp_path, tokenizer):
    tasks = [
        {"task_id": i, "text": f"T{i}", "code": f"c{i}", "test_list": [f"assert {i}"]}
        for i in (*range(601, 641), *range(511, 521))
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(json.dumps(task) for task in tasks))
    mbpp = SourceConfig(name="mbpp", path=str(tmp_path / "mbpp.jsonl"))

    def trained(seed):
        config = DataConfig(sources=[mbpp], seed=seed)
        provenance = load_data(config, tokenizer, training_subset=10).provenance
        return provenance["sources"][0]["task_ids"]

    assert trained(0) == trained(0) != list(range(601, 611))
    assert trained(0) != trained(1)


@needs_published_rows
def test_real_sets_are_read_split_reported_and_recorded(tokenizer):
    config = DataConfig(
        sources=[
            SourceConfig(name="code_alpaca", path=CODE_ALPACA),
            SourceConfig(name="mbpp", path=MBPP),
        ],
        max_length=2048,
    )
    data = load_data(config, tokenizer, training_subset=300, eval_subset=50)
    assert [(s.name, s.split, len(s)) for s in data.train + data.validation] == [
        ("code_alpaca", "train", 300),
        ("mbpp", "train", 300),
        ("code_alpaca", "validation", 50),
        ("mbpp", "validation", 50),
    ]
    provenance = data.provenance
    assert json.loads(json.dumps(provenance)) == provenance
    alpaca, mbpp = provenance["sources"]
    assert (alpaca["split_scheme"], mbpp["split_scheme"]) == ("90/10", "published")
    assert len(mbpp["task_ids"]) == mbpp["training_rows"] == 300
    assert set(mbpp["task_ids"]) <= set(range(601, 975))
    described = data.reports[0].describe()
    assert "6552 rows read, 2 empty, 0 malformed" in described
    assert "the answer is empty" in described
    report = data.reports[0].splits["train"]
    assert report.rows == 5895
    examples = data.train[0]
    assert report.tokens == sum(examples.length(i) for i in range(300))
    assert report.target_tokens == sum(len(targets(examples[i])) for i in range(300))
    assert examples.mean_targets == report.target_tokens / 300


def test_the_provenance_has_a_hash_of_every_question_and_answer_that_was_trained_on(
    tmp_path, tokenizer
):
    rows = [
        {"instruction": f"Add {i}.", "input": "" if i % 2 else "3", "output": f"x + {i}"}
        for i in range(20)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    alpaca = SourceConfig(name="code_alpaca", path=str(tmp_path / "r.jsonl"))
    data = load_data(DataConfig(sources=[alpaca]), tokenizer)
    (source,) = data.provenance["sources"]
    hashes = set(source["text_hashes"].split())
    trained = {tokenizer.decode(targets(example)) for example in data.train[0]}
    found = [row for row in rows if text_hash(row["output"]) in hashes]
    assert {f"{row['output']}</s>" for row in found} == trained
    assert len(found) == source["training_rows"] == 18
    for row in found:
        assert text_hash(row["instruction"]) in hashes
        assert text_hash(f"{row['instruction']}\n{row['input']}") in hashes


def test_generated_rows_need_no_hashes(tokenizer):
    sources = [SourceConfig(name="skill/arithmetic", rows=5)]
    (source,) = load_data(DataConfig(sources=sources), tokenizer, eval_subset=5).provenance[
        "sources"
    ]
    assert "text_hashes" not in source


def test_the_provenance_tells_the_rows_from_their_order(tmp_path, tokenizer):
    def provenance(lines):
        (tmp_path / "r.jsonl").write_text("\n".join(lines))
        return load_data(config_for(tmp_path / "r.jsonl"), tokenizer).provenance["sources"][0]

    lines = [json.dumps({"question": f"Q{i}", "answer": f"A{i}"}) for i in range(20)]
    first = provenance(lines)
    turned = provenance(lines[::-1])
    assert turned["order_sha256"] != first["order_sha256"]
    assert turned | {"order_sha256": first["order_sha256"]} == first
    changed = provenance([line.replace('"A', '"B') for line in lines])
    assert changed["training_sha256"] != first["training_sha256"]
