"""The instruction template, and the token ids of prompts and answers.

A prompt ends in a newline and the answer starts on the line after it, so the boundary between the
two is the boundary between tokens.
"""

from collections.abc import Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def format_prompt(instruction: str, input: str = "") -> str:
    """The text a model is given, without BOS; an empty `input` has no section."""
    if input:
        return PROMPT_WITH_INPUT.format(instruction=instruction, input=input)
    return PROMPT.format(instruction=instruction)


def mbpp_instruction(text: str, test: str) -> str:
    """MBPP's request with its first test, which alone tells the name of the function."""
    return f"{text.strip()}\nYour code should satisfy this test: {test.strip()}"


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt, begun as the tokenizer wants it (BOS or not), never ended by EOS.

    Text that reads like a special token stays text: `<s>` is HTML in a question about HTML.
    """
    eos = tokenizer.eos_token_id
    encoded = encode(tokenizer, prompts, add_special_tokens=True)
    # Some tokenizers close every text with EOS: a model that sees it has nothing left to answer.
    return [ids[:-1] if ids and ids[-1] == eos else ids for ids in encoded]


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Ids of each answer as it continues a prompt, without BOS and EOS."""
    # Sentencepiece puts a space before a text of its own. After the prompt's newline there is none,
    # and in code it would be an indentation error.
    newline = encode(tokenizer, ["\n"], add_special_tokens=False)[0]
    continued = encode(tokenizer, ["\n" + answer for answer in answers], add_special_tokens=False)
    # Where the newline merges with the answer (it begins with white space), it is encoded alone.
    merged = [i for i, ids in enumerate(continued) if ids[: len(newline)] != newline]
    alone = encode(tokenizer, [answers[i] for i in merged], add_special_tokens=False)
    ids_of_merged = dict(zip(merged, alone, strict=True))
    return [ids_of_merged.get(i, ids[len(newline) :]) for i, ids in enumerate(continued)]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Raises ValueError where the tokenizer has none: an answer could not end."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so answers could not end; "
            "set tokenizer.eos_token"
        )
    return eos


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; EOS stands in for a missing one, which is safe as masks go by position.

    Raises ValueError where there is neither.
    """
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else eos_token_id(tokenizer)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    add_special_tokens: bool,
    split_special_tokens: bool = True,
) -> list[list[int]]:
    """Ids of each text. Split, what reads like a special token is text."""
    if not texts:
        return []
    encoded: Any = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        split_special_tokens=split_special_tokens,
        verbose=False,
    )
    return encoded["input_ids"]
