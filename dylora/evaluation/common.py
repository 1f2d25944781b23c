"""What the evaluations share: evaluation mode, text of tokens in context."""

from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.kernels.common import evaluation_mode as evaluation_mode


def decode_after(
    tokenizer: PreTrainedTokenizerBase, context: Sequence[int], ids: Sequence[int]
) -> str:
    """The text that ids add to that of the context before them.

    The text of ids alone can differ: tokenizers like Llama 2's drop the space that a text begins
    with, which a program's indentation needs.
    """

    def decode(tokens: Sequence[int]) -> str:
        # Spaces before punctuation are part of a program.
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    return decode([*context, *ids])[len(decode(context)) :]
