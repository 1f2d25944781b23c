"""A small byte-level tokenizer, made on the spot, a base with it, and a run of thirty rows."""

import dataclasses
import json
import string
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dylora.config import MoELoraConfig
from dylora.run_config import (
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from runs import STEPS

CORPUS = [
    "### Instruction:\nWrite a function to add two numbers.\n\n### Input:\n3, 5\n\n### Response:\n",
    "def add(a, b):\n    return a + b\n",
]
SPECIAL = ["<pad>", "<s>", "</s>"]


def build_tokenizer(
    *, begins: bool = True, ends: bool = False, pad: str | None = "<pad>", eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `begins` and `ends` say whether it puts BOS and EOS around a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if begins or ends:
        core.post_processor = processors.TemplateProcessing(
            single=" ".join(["<s>"] * begins + ["$A"] + ["</s>"] * ends),
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token=pad
    )


def build_spaced_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: a text of its own begins with a space that is not in it."""
    core = Tokenizer(models.BPE(unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=150,
            special_tokens=SPECIAL,
            initial_alphabet=list(string.printable),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer():
    return build_tokenizer


@pytest.fixture(scope="session")
def spaced_tokenizer():
    return build_spaced_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, llama, tokenizer) -> Path:
    """A random Llama with its tokenizer, saved as transformers saves it."""
    folder = tmp_path_factory.mktemp("base")
    llama(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"question": f"Add {n} and {n + 1}." + " Please." * (n % 3), "answer": f"{2 * n + 1}" * 2}
        for n in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def build_config(
    root: Path, base: Path, rows: Path, name: str = "a", *, moe=None, dtype="float32", **changes
) -> RunConfig:
    """A run of ten steps with every source of randomness on that its routing and its schedule have;
    sections take changes by name."""
    moe = moe or {}
    dropout = {} if moe.get("router_type") == "fixed" else {"expert_dropout": 0.2}
    warm = changes.get("lr_scheduler_type") not in ("constant", "reduce_lr_on_plateau", "greedy")
    train_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    data_changes = {k: changes.pop(k) for k in {"packing"} & changes.keys()}
    log_changes = {k: changes.pop(k) for k in {"wandb"} & changes.keys()}
    eval_changes = {k: v for k, v in changes.items() if k not in train_fields}
    train_changes = {k: v for k, v in changes.items() if k in train_fields}
    return RunConfig(
        name=name,
        output_dir=str(root / "runs"),
        model=ModelConfig(base=str(base), dtype=dtype, device="cpu"),
        moe=MoELoraConfig(**{"r": 2, "num_experts": 3, "lora_dropout": 0.1} | dropout | moe),
        data=DataConfig(
            sources=[
                SourceConfig(
                    name="rows",
                    path=str(rows),
                    instruction_column="question",
                    output_column="answer",
                )
            ],
            max_length=64,
            **data_changes,
        ),
        train=TrainConfig(
            **{
                "max_steps": STEPS,
                "batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "warmup_steps": 2 * warm,
            }
            | train_changes
        ),
        eval=EvalConfig(**{"batch_size": 2} | eval_changes),
        log=LogConfig(logging_steps=1, **log_changes),
    )


@pytest.fixture
def make_config(tmp_path, base_folder, rows_file):
    """`build_config` for runs below the test's own folder."""
    return partial(build_config, tmp_path, base_folder, rows_file)


@pytest.fixture(scope="module")
def shared_config(tmp_path_factory, base_folder, rows_file):
    """The same for runs that several tests of a module look at."""
    return partial(build_config, tmp_path_factory.mktemp("shared"), base_folder, rows_file)
