"""A small byte-level tokenizer, made on the spot: no download."""

import string

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
