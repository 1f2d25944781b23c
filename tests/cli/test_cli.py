"""The command line: what it calls, and what it says about mistakes."""

import dataclasses
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.cli import evaluate
from dylora.cli.benchmark import BenchmarkCommand
from dylora.cli.config_file import load_run_config, split_overrides
from dylora.cli.export import ExportOptions
from dylora.cli.generate import GenerateOptions
from dylora.cli.hints import ELSEWHERE, WITHOUT, all_keys
from dylora.cli.import_ import ImportOptions
from dylora.cli.main import COMMANDS, main
from dylora.cli.options import read_options
from dylora.evaluation.loading import load_checkpoint
from dylora.fields import field_types
from dylora.run_config import ModelConfig, RunConfig, dump_run_config

ROOT = Path(__file__).parents[2]
SOURCES = "data: {sources: [{name: mbpp}, {name: skill/sql, rows: 5}]}\n"


@pytest.fixture
def fake_module(monkeypatch):
    """Puts a function in the place of a command's module; its calls are recorded."""

    def install(module: str, function: str, result=None, error: BaseException | None = None):
        calls = []

        def record(*arguments):
            calls.append(arguments)
            if error is not None:
                raise error
            return result

        fake = types.ModuleType(module)
        setattr(fake, function, record)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return install


# Mistakes in the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {learning_rat: 1}",
            "configs/x.yaml: unknown key train.learning_rat; did you mean train.learning_rate?",
        ),
        ("trian: {}", "configs/x.yaml: unknown key trian; did you mean train?"),
        (
            "learning_rate: 1",
            "configs/x.yaml: unknown key learning_rate; did you mean train.learning_rate?",
        ),
        (
            "train: {eval_steps: 1}",
            "configs/x.yaml: unknown key train.eval_steps; did you mean eval.eval_steps?",
        ),
        (
            "log: {xyz: 1}",
            "configs/x.yaml: unknown key log.xyz; valid are log.logging_steps, "
            "log.collapse_steps, log.report_to, log.wandb, log.project",
        ),
        (
            "data: {sources: [{name: mbpp}, {name: b, pth: c}]}",
            "configs/x.yaml: unknown key data.sources[1].pth; did you mean data.sources[1].path?",
        ),
        ("data: {sources: [{path: b}]}", "configs/x.yaml: data.sources[0].name is missing"),
        (
            "data: {sources: mbpp}",
            "configs/x.yaml: data.sources[0] is 'mbpp', but must have the fields name, path, "
            "revision, hub_config, hub_split, validation_path, format, instruction_column, "
            "input_column, output_column, messages_column, text_column, split, weight, rows, "
            "stream_rows",
        ),
    ],
)
def test_an_unknown_or_missing_key_names_file_key_and_nearest(config_file, refusal, text, message):
    assert refusal("train", "--config", config_file(text)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rate: fast}", "train.learning_rate is 'fast', but must be a float"),
        ("train: {learning_rate: null}", "train.learning_rate is null, but must be a float"),
        ("train: {batch_size: 1.5}", "train.batch_size is 1.5, but must be an int"),
        ("train: {batch_size: true}", "train.batch_size is True, but must be an int"),
        ("train: {batch_size: 0}", "train.batch_size is 0, but must be at least 1"),
        ("train: {learning_rate: .nan}", "train.learning_rate is nan, but must be finite"),
        ("train: {learning_rate: .inf}", "train.learning_rate is inf, but must be finite"),
        ("train: {max_steps: many}", "train.max_steps is 'many', but must be an int, or null"),
        ("name: 5", "name is 5, but must be a string"),
        ("name: a/b", "name is 'a/b', but must be the name of a folder, without slashes"),
        ("log: {wandb: 3}", "log.wandb is 3, but must be true or false"),
        (
            "model: {dtype: bfloat}",
            "model.dtype is 'bfloat', but must be one of float32, bfloat16, float16; "
            "did you mean 'bfloat16'?",
        ),
        (
            "train: {lr_scheduler_type: cosin}",
            "train.lr_scheduler_type is 'cosin', but must be one of linear, cosine, "
            "cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, "
            "reduce_lr_on_plateau, cosine_with_min_lr, cosine_warmup_with_min_lr, "
            "warmup_stable_decay, greedy; did you mean 'cosine'?",
        ),
        (
            "moe: {num_experts: 1}",
            "moe.num_experts is 1, but must be at least 2 with routing, unless router_scope is "
            "prompt or running_mean",
        ),
        (
            "moe: {maturity_schedule: [1]}",
            "moe.maturity_schedule is [1], but must be a list of 2 items, each a float",
        ),
        (
            "data: {sources: [{name: a, rows: 0}]}",
            "data.sources[0].rows is 0, but must be at least 1",
        ),
        (
            "data: {sources: [{name: a}, {name: a}]}",
            "data.sources is ['a', 'a'], but must be of different names",
        ),
    ],
)
def test_a_bad_value_names_file_key_value_and_rule(config_file, refusal, text, message):
    assert refusal("train", "--config", config_file(text)) == f"configs/x.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  seed: 1\n  seed: 1\n", ":3: duplicate key seed, first in line 2"),
        ("train: {}\nname: a\ntrain: {}\n", ":3: duplicate key train, first in line 1"),
        ("data:\n  sources:\n    - {name: a, name: b}\n", ":3: duplicate key name"),
        ("name: x\ntrain: [1\n", ":3: expected ',' or ']'"),
        ("name: a: b\n", ":1: mapping values are not allowed here"),
        ("train:\n\tseed: 1\n", ":2: found character '\\t'"),
        ("? [a]\n: b\n", ":1: found unhashable key"),
        ("", ": must hold sections such as 'train:', but is empty"),
        ("- a\n", ": must hold sections such as 'train:', but is a list"),
        ("train: 3\n", ": train is 3, but must have the fields epochs"),
    ],
)
def test_broken_yaml_names_file_and_line(config_file, refusal, text, message):
    said = refusal("train", "--config", config_file(text))
    assert said.startswith("configs/x.yaml" + message)


def test_two_keys_in_one_line_are_a_duplicate_too(config_file, refusal):
    said = refusal("train", "--config", config_file("train: {seed: 1, seed: 2}"))
    assert said == "configs/x.yaml:1: duplicate key seed, first in line 1"


def test_a_file_that_is_not_there_or_not_a_text_is_named(config_file, refusal):
    config_file("")
    assert refusal("train", "--config", "configs/y.yaml") == "configs/y.yaml: no such file"
    assert refusal("train", "--config", "configs") == "configs is a folder, not a file"
    Path("configs/x.yaml").write_bytes(b"name: \xff")
    assert "not a text in UTF-8" in refusal("train", "--config", "configs/x.yaml")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lr", "it is train.learning_rate here"),
        ("num_train_epochs", "it is train.epochs here"),
        ("per_device_train_batch_size", "it is train.batch_size here"),
        ("micro_batch_size", "it is train.batch_size here"),
        ("gradient_accumulation_steps", "did you mean train.gradient_accumulation_steps?"),
        ("lora_r", "it is moe.r here"),
        ("lora_target_modules", "it is moe.target_modules here"),
        ("sequence_len", "it is data.max_length here"),
        ("max_seq_length", "it is data.max_length here"),
        ("base_model", "it is model.base here"),
        ("datasets", "it is data.sources here"),
        ("seed", "did you mean data.seed or train.seed?"),
        ("optim", "did you mean train.optim?"),
        ("bf16", "there is no such setting: set model.dtype to bfloat16"),
        ("fp16", "there is no such setting: set model.dtype to float16"),
        ("chat_template", "it is data.template here"),
        ("eval_strategy", "there is no such setting: set eval.eval_steps"),
        ("warmup_ratio", "there is no such setting: set train.warmup_steps"),
        ("load_in_4bit", "there is no such setting: set model.quantization to bnb-4bit"),
        ("val_set_size", "there is no such setting: set split (such as"),
        ("streaming", "there is no such setting: set stream_rows, beside a validation_path"),
        ("fsdp", "there is no such setting: set train.parallel to ddp or fsdp2"),
        ("peft_type", "it is moe.adapter_type here"),
        ("load_best_model_at_end", "it is eval.load_best_at_end here"),
    ],
)
def test_a_name_of_transformers_peft_or_axolotl_is_translated(config_file, refusal, key, said):
    in_file = refusal("train", "--config", config_file(f"{key}: 1\n"))
    assert in_file.startswith(f"configs/x.yaml: unknown key {key}; {said}")
    in_section = refusal("train", "--config", config_file(f"log: {{{key}: 1}}\n"))
    assert in_section.startswith(f"configs/x.yaml: unknown key log.{key}; {said}")
    flag = refusal("evaluate", "--config", config_file("name: x\n"), f"--{key}", "1")
    assert flag.startswith(f"command line: unknown key {key}; {said}")


def test_every_translated_name_leads_to_a_key_that_exists():
    assert set(ELSEWHERE.values()) <= set(all_keys())
    assert not (ELSEWHERE.keys() | WITHOUT.keys()) & set(field_types(RunConfig))
    assert not ELSEWHERE.keys() & WITHOUT.keys()


@pytest.mark.parametrize("key", ["length_window", "bucket_steps"])
def test_a_key_of_an_earlier_version_is_read_as_what_it_is_called_now(config_file, key):
    path = config_file(f"data: {{{key}: 8}}\n")
    assert load_run_config(path).data.bucket_steps == 8
    assert load_run_config(path, ["data.length_window=2"]).data.bucket_steps == 2
    assert load_run_config(path, ["data.bucket_steps=2"]).data.bucket_steps == 2


def test_a_key_twice_under_two_names_is_refused(config_file, refusal):
    path = config_file("data: {length_window: 8, bucket_steps: 4}\n")
    said = refusal("train", "--config", path)
    assert said == "configs/x.yaml: data.bucket_steps appears twice, then as 'bucket_steps'"


def test_a_setting_that_is_gone_is_read_over_in_files_of_older_runs(config_file):
    assert load_run_config(config_file("moe: {r: 4, fan_in_fan_out: null}\n")).moe.r == 4


# Mistakes on the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train.learning_rat 1", "unknown key train.learning_rat; did you mean train.learn"),
        ("--train.learning_rat=1", "unknown key train.learning_rat; did you mean train.learn"),
        ("--weight_decay 1", "unknown key weight_decay; did you mean train.weight_decay?"),
        ("--train.learning_rate fast", "train.learning_rate is 'fast', but must be a float"),
        ("--train.batch_size 0", "train.batch_size is 0, but must be at least 1"),
        ("--train.seed", "--train.seed needs a value"),
        ("--train.seed --train.epochs 1", "--train.seed needs a value"),
        ("--train x.yaml", "train has fields; set one of them: --train.FIELD"),
        ("--train.seed.x 1", "train.seed has no fields"),
        ("--data.sources.2.path x", "data.sources has no item 2, only 0 (mbpp), 1 (skill/sql)"),
        ("--data.sources.mbp.path x", "data.sources has no item mbp, only 0 (mbpp), 1 (skill"),
        ("--data.sources[0].pth x", "unknown key data.sources[0].pth; did you mean data.sources"),
        ("--data.sources.0.rows x", "data.sources[0].rows is 'x', but must be an int, or null"),
        ("--data.sources [x]", "data.sources[0] is 'x', but must have the fields name"),
        ("--resume_from_checkpont latest", "unknown option --resume_from_checkpont; did you mean"),
    ],
)
def test_a_wrong_override_is_one_line_that_blames_the_command_line(
    config_file, refusal, arguments, message
):
    said = refusal("train", "--config", config_file(SOURCES), *arguments.split())
    assert said.startswith("command line: " + message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tarin", "unknown command tarin; did you mean 'train'?"),
        ("--config x.yaml train", "unknown command --config"),
        ("train", "--config is missing"),
        ("train --config x.yaml stray", "command line: stray belongs to no option"),
        ("generate --checkpoint c", "give either --prompt TEXT or --prompts FILE"),
        ("generate --checkpoint c --prompt", "command line: --prompt needs a value"),
        ("generate --checkpoint c --prompt p --promt q", "command line: unknown option --promt"),
        ("generate --checkpoint c --prompt p --max_new_tokens q", "--max_new_tokens is 'q'"),
        ("generate --checkpoint c --prompt p --max_new_tokens 0", "--max_new_tokens is 0"),
        (
            "generate --checkpoint c --prompt p --temperature -1",
            "--temperature is -1, but",
        ),
        ("generate --checkpoint c --prompt p --train.seed 1", "command line: unknown option"),
        ("export --checkpoint c --out o --expert first", "--expert is 'first', but must be all"),
        ("info", "info needs either --checkpoint DIR or --config FILE"),
        ("info --checkpoint c --config x.yaml", "info needs either"),
        (
            "info --config x.yaml --checkpoint_revision r",
            "--checkpoint_revision is of a --checkpoint",
        ),
        ("info --checkpoint c --train.seed 1", "command line: --train.seed changes a config"),
    ],
)
def test_a_wrong_option_is_one_line(refusal, arguments, message):
    assert refusal(*arguments.split()).startswith(message)


def test_values_of_a_repeated_option_are_all_taken():
    words = ["--adapters", "a", "b", "--out", "o", "--adapters", "c", "d"]
    assert read_options(ImportOptions, words)[0].adapters == ["a", "b", "c", "d"]


def test_values_between_commas_of_a_repeated_option_are_all_taken():
    words = "--config c --checkpoint c --tasks mbpp,skills/sql --tasks humaneval --k 1 --k 2"
    files = "--task_files mbpp=a --task_files humaneval=b --samples 2 --temperature 1"
    options = read_options(BenchmarkCommand, f"{words} {files}".split())[0]
    assert options.tasks == ("mbpp", "skills/sql", "humaneval")
    assert (options.k, options.files) == ((1, 2), {"mbpp": "a", "humaneval": "b"})


@pytest.mark.parametrize(
    "command", ["generate --prompt p", "chat", "benchmark --config c --tasks skills"]
)
def test_top_p_without_a_temperature_is_refused(refusal, command):
    said = refusal(*command.split(), "--checkpoint", "c", "--top_p", "0.9")
    assert said == "--top_p needs a --temperature: at 0 nothing is drawn"


# Precedence and reading


@pytest.mark.parametrize("flag_first", [True, False])
def test_the_command_line_wins_wherever_it_stands(config_file, capsys, flag_first):
    path = config_file("name: file\ntrain: {seed: 1, max_steps: 7}\n")
    flags, config = ["--train.seed", "2", "--name=mine"], ["--config", path]
    assert main(["info", *(flags + config if flag_first else config + flags)]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["name"], tree["train"]["seed"], tree["train"]["max_steps"]) == ("mine", 2, 7)


def test_dashes_are_read_as_underscores_everywhere(config_file, capsys, fake_module):
    path = config_file("name: file\n")
    assert main(["train", "--print-config", "--config", path, "--train.learning-rate=0.5"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["learning_rate"] == 0.5
    tokens = ["--checkpoint", "c", "--prompt", "a-b", "--max-new-tokens", "3", "--show-routing"]
    options, _ = read_options(GenerateOptions, tokens)
    assert (options.prompt, options.max_new_tokens, options.show_routing) == ("a-b", 3, True)


@pytest.mark.parametrize("text", ["q_proj,v_proj", "[q_proj, v_proj]", "q_proj, v_proj"])
def test_a_list_on_the_command_line_has_commas_with_or_without_brackets(config_file, text):
    config = load_run_config(None, [f"moe.target_modules={text}"])
    assert config.moe.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("a, b.jsonl", "a, b.jsonl"),
        ("[ab]*.jsonl", "[ab]*.jsonl"),
    ],
)
def test_a_path_on_the_command_line_is_a_list_in_brackets(config_file, text, path):
    config = load_run_config(config_file(SOURCES), [f"data.sources.0.path={text}"])
    assert config.data.sources[0].path == path


@pytest.mark.parametrize("item", ["0", "mbpp", "[0]"])
def test_an_item_of_a_list_is_overridden_by_index_or_name(config_file, item):
    key = f"data.sources{item}.path" if item.startswith("[") else f"data.sources.{item}.path"
    config = load_run_config(config_file(SOURCES), [f"--{key}", "rows.jsonl"])
    assert [source.path for source in config.data.sources] == ["rows.jsonl", None]
    assert [source.rows for source in config.data.sources] == [None, 5]


def test_a_name_with_a_slash_finds_its_item(config_file):
    config = load_run_config(config_file(SOURCES), ["data.sources.skill/sql.rows=9"])
    assert config.data.sources[1].rows == 9


def test_a_whole_list_and_an_open_mapping_are_overridden(config_file):
    path = config_file("train: {lr_scheduler_kwargs: {last_epoch: -1}}\n" + SOURCES)
    config = load_run_config(
        path, ["data.sources=[{name: x}]", "train.lr_scheduler_kwargs.num_cycles=3"]
    )
    assert [source.name for source in config.data.sources] == ["x"]
    assert config.train.lr_scheduler_kwargs == {"last_epoch": -1, "num_cycles": 3}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_a_float_without_a_dot_is_a_float(config_file, text):
    path = config_file(f"train: {{learning_rate: {text}, lr_scheduler_kwargs: {{x: {text}}}}}")
    config = load_run_config(path)
    assert config.train.learning_rate == 1e-4
    assert config.train.lr_scheduler_kwargs == {"x": 1e-4}
    assert load_run_config(path, [f"train.weight_decay={text}"]).train.weight_decay == 1e-4


def test_words_that_look_like_numbers_stay_words(config_file):
    config = load_run_config(config_file("name: e4\nmodel: {revision: 1e4f}"), ["output_dir=2"])
    assert (config.name, config.model.revision, config.output_dir) == ("e4", "1e4f", "2")


def test_null_unsets_an_optional_setting(config_file):
    path = config_file("train: {max_steps: 5}\n")
    assert load_run_config(path, ["train.max_steps=null"]).train.max_steps is None


def test_an_empty_section_means_its_defaults(config_file):
    assert load_run_config(config_file("name: run\ntrain:\n")) == RunConfig()


def test_every_spelling_of_an_override_is_read():
    expected = [("a.b", "1"), ("c", "2=3"), ("d", "-4")]
    assert split_overrides(["--a.b", "1", "--c=2=3", "d=-4"]) == expected


def test_a_dumped_config_reads_back_as_the_same(config_file):
    first = load_run_config(
        config_file(SOURCES),
        ["moe.fixed_routing_weights=[1, 2, 3, 4]", "moe.router_type=fixed", "name=ä: #1"],
    )
    config_file(dump_run_config(first))
    assert load_run_config("configs/x.yaml") == first


def test_print_config_prints_the_resolved_config_and_stops(config_file, capsys, fake_module):
    calls = fake_module("dylora.training.loop", "train")
    path = config_file("name: file\n")
    assert main(["train", "--print_config", "--config", path, "--train.seed", "3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["seed"] == 3
    assert calls == []


# What the commands call


def test_train_gets_the_config_where_to_resume_and_the_benchmark(config_file, monkeypatch):
    from dylora.evaluation import report
    from dylora.evaluation.passk.callback import Benchmark
    from dylora.training import loop
    from dylora.training.distributed import ALONE

    calls, reports, run = [], [], SimpleNamespace(processes=ALONE)

    def train(config, resume, callbacks):
        calls.append((config, resume, [type(one) for one in callbacks]))
        return run

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(report, "report_run", reports.append)
    path = config_file("name: file\n")
    assert main(["train", "--config", path]) == 0
    assert main(["train", "--config", path, "--resume_from_checkpoint", "latest"]) == 0
    config = RunConfig(name="file")
    assert calls == [(config, None, [Benchmark]), (config, "latest", [Benchmark])]
    assert reports == [run] * 2


def test_a_stream_that_resumes_where_it_can_begins_or_goes_on(config_file, monkeypatch):
    from dylora.evaluation import stream_report
    from dylora.training import curriculum

    resumed = []
    monkeypatch.setattr(
        curriculum, "train_stream", lambda _, resume, **more: resumed.append(resume)
    )
    monkeypatch.setattr(stream_report, "report_stream", lambda stream: None)
    stages = "stages: [{name: sql, sources: [{name: skill/sql}]}]\nmoe: {router_scope: prompt}\n"
    path = config_file(stages)
    assert main(["train", "--config", path, "--resume_from_checkpoint", "auto"]) == 0
    assert resumed == ["latest"]  # which begins a stream that has none


def test_evaluate_gets_the_config_and_the_checkpoint(config_file, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *given: calls.append(given))
    assert main(["evaluate", "--config", config_file("name: f"), "--checkpoint", "c"]) == 0
    assert calls == [(RunConfig(name="f"), "c", {})]


ROUTED = {"evaluate": ["--config", "configs/x.yaml"], "generate": ["--prompt", "p"]}
ROUTED |= {"benchmark": ["--config", "configs/x.yaml", "--tasks", "mbpp"]}


@pytest.mark.parametrize("command", ROUTED)
def test_a_setting_that_the_checkpoint_decides_is_refused_by_name(config_file, refusal, command):
    config_file("name: f")
    words = [command, *ROUTED[command], "--checkpoint", "c", "--moe.r", "4"]
    assert refusal(*words) == (
        "command line: the checkpoint decides --moe.r; can be changed: --routing.top_k_experts, "
        "--routing.router_temperature, --routing.routing_mode, --routing.experts, --routing.weights"
    )


def test_routing_of_a_checkpoint_is_changed_by_the_command_line(config_file, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *given: calls.append(given[2]))
    words = ["evaluate", "--config", config_file("moe: {top_k_experts: 3}"), "--checkpoint", "c"]
    assert main([*words, "--moe.router-temperature", "0.5", "--moe.routing_mode=dense"]) == 0
    assert calls == [{"temperature": 0.5, "mode": "dense"}]


def test_changed_routing_is_in_force_in_a_loaded_checkpoint(tmp_path):
    base = ModelConfig(base="tiny-code-llama", dtype="float32", device="cpu")
    mixture = DyLoRA_MoE.from_base(base.base, MoELoraConfig(num_experts=3, r=2))
    mixture.save_pretrained(tmp_path / "c")
    plain = load_checkpoint(str(tmp_path / "c"), base)
    changed = load_checkpoint(str(tmp_path / "c"), base, {"top_k": 1, "mode": "sparse"})
    used = [
        int((model.get_routing_weights(torch.tensor([[5, 6, 7]])) > 0).sum(-1).max())
        for model in (plain, changed)
    ]
    assert used == [3, 1]


def test_generate_gets_its_options():
    plain = GenerateOptions(checkpoint="c", prompt="say x")
    assert (plain.max_new_tokens, plain.temperature, plain.quantization) == (256, 0.0, None)
    tokens = "--checkpoint c --prompt=--x --base b --max_new_tokens 3 --temperature 0.5 --raw"
    options, _ = read_options(GenerateOptions, [*tokens.split(), "--quantization", "bnb-8bit"])
    expected = {"prompt": "--x", "base": "b", "max_new_tokens": 3, "temperature": 0.5, "raw": True}
    assert options == dataclasses.replace(plain, **expected, quantization="bnb-8bit")


def test_export_gets_its_options():
    def read(words: str) -> ExportOptions:
        return read_options(ExportOptions, ["--checkpoint", "c", "--out", "o", *words.split()])[0]

    plain = read("")
    assert plain == ExportOptions(checkpoint="c", out="o")
    assert plain.form == "experts"
    expert = read("--expert 1 --portable --base_name n")
    assert expert == dataclasses.replace(plain, expert="1", portable=True, base_name="n")
    mixture = read("--mixture --weights 0.5,1 --text t")
    assert mixture == dataclasses.replace(plain, mixture=True, weights=[0.5, 1], text="t")
    assert mixture.form == "mixture"
    merge = "--merge --weights measured --text t --text_tokens 9 --dequantize --base b"
    expected = {"merge": True, "weights": "measured", "text": "t", "text_tokens": 9}
    expected |= {"dequantize": True, "base": "b", "dtype": "bfloat16"}
    merged = read(f"{merge} --dtype bfloat16")
    assert merged == dataclasses.replace(plain, **expected)
    assert merged.form == "merged"
    stored = read("--merge --expert 0 --quantization none")
    assert stored == dataclasses.replace(plain, merge=True, expert="0", quantization="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mixture --merge", "--mixture writes an adapter and --merge a model"),
        ("--weights 1,2", "--weights and --text need --mixture or --merge"),
        ("--text t", "--weights and --text need --mixture or --merge"),
        ("--mixture --expert 1", "--mixture takes all experts"),
        ("--merge --expert all", "--merge takes one --expert"),
        ("--merge --expert 1 --portable", "--portable is a form of adapters"),
        ("--merge --expert 1 --weights 1,2", "--expert and --weights exclude each other"),
        ("--mixture --weights measured", "--weights measured needs a --text FILE"),
        ("--mixture --weights 1,x", "--weights is '1,x', but must be a list, each item a float"),
        ("--dequantize", "--dequantize needs --merge"),
        ("--merge --expert 1 --base_name b", "--base_name is a field of adapters"),
        ("--mixture --weights 1,2 --text t --text_tokens 1", "--text_tokens is 1, but must be"),
        ("--mixture --weights 1,2 --text_tokens 9", "--text_tokens is of a --text FILE"),
        ("--mixture --weights 1,2 --portable", "--portable is a form of single experts"),
        ("--base b", "--base: these experts are written from their files, without a base"),
        (
            "--mixture --weights 1,2 --dtype float16 --quantization none",
            "--dtype, --quantization:",
        ),
    ],
)
def test_options_of_export_that_do_not_go_together_are_refused(refusal, options, message):
    place = ["--checkpoint", "c", "--out", "o"]
    assert refusal("export", *place, *options.split()).startswith(message)


def test_info_of_a_checkpoint_calls_its_module(fake_module):
    calls = fake_module("dylora.evaluation.info", "print_info")
    assert main(["info", "--checkpoint", "c"]) == 0
    assert main(["info", "--checkpoint", "u/c", "--checkpoint_revision", "r"]) == 0
    assert calls == [("c", None), ("u/c", "r")]


# Errors inside commands


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such expert:\n  7"), "no such expert: 7"),
        (FileNotFoundError("c has no config.json"), "c has no config.json"),
        (
            FileNotFoundError(2, "No such file or directory", "c/x"),
            "c/x: No such file or directory",
        ),
        (FileExistsError("runs/a is there already"), "runs/a is there already"),
    ],
)
def test_a_users_error_inside_a_command_is_one_line(fake_module, refusal, error, message):
    fake_module("dylora.evaluation.info", "print_info", error=error)
    assert refusal("info", "--checkpoint", "c") == message


def test_a_fault_of_ours_keeps_its_traceback(fake_module):
    fake_module("dylora.evaluation.info", "print_info", error=KeyError("x"))
    with pytest.raises(KeyError):
        main(["info", "--checkpoint", "c"])


def test_a_users_error_shows_its_traceback_on_request(fake_module, monkeypatch):
    fake_module("dylora.evaluation.info", "print_info", error=ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        main(["info", "--checkpoint", "c", "--traceback"])
    monkeypatch.setenv("DYLORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        main(["info", "--checkpoint", "c"])


def test_a_reader_that_has_enough_ends_a_command_without_a_traceback():
    command = f"{sys.executable} run.py train --help | head -n 1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stderr == ""
    assert result.stdout.startswith("usage: dylora train --config FILE")


def test_an_interrupt_is_one_line_and_exit_code_130(fake_module, capsys):
    fake_module("dylora.evaluation.info", "print_info", error=KeyboardInterrupt())
    assert main(["info", "--checkpoint", "c"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# Help


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", out, re.M) for name in COMMANDS)


def test_no_command_at_all_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "dylora COMMAND" in err


@pytest.mark.parametrize("command", ["train", "info"])
def test_help_explains_every_field_of_a_config(capsys, command):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    tree = yaml.safe_load(dump_run_config(RunConfig()))
    keys = [
        f"{name}.{key}" for name, part in tree.items() if isinstance(part, dict) for key in part
    ]
    keys += ["name", "output_dir", "data.sources.N.path", "data.sources.N.split"]
    for key in keys:
        # an option, then words of its own before "(type:"
        assert re.search(rf"^  --{re.escape(key)} \S+\s+\w[^(]{{5,}}", out, re.M), key
    assert "default: 0.0002" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_of_a_command(capsys, command):
    assert main([command, "--help"]) == 0
    own = capsys.readouterr().out.partition("options:")[2].partition("\n\n")[0]
    for option in re.findall(r"^  (--\S+)", own, re.M):
        assert re.search(rf"^  {option}( \S+)?\s+[a-zA-Z0][^(]{{5,}}", own, re.M), option


# As a program


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "DYLORA_TRACEBACK"}
    return subprocess.run(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_program_refuses_an_unknown_key_in_one_line():
    result = run_program(
        "train", "--config", "configs/quickstart.yaml", "--train.learning_rat", "1"
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: command line: unknown key train.learning_rat; did you mean train.learning_rate?\n"
    )


def test_the_program_prints_a_resolved_config():
    result = run_program("info", "--config", "configs/quickstart.yaml", "--name", "mine")
    assert (result.returncode, result.stderr) == (0, "")
    assert yaml.safe_load(result.stdout)["name"] == "mine"
