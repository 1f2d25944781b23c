"""Published pass@1 of well-known bases, to hold a base's score against before a gain is believed.

Reports differ by what stands in no table: the prompt to its last newline, the stops, sampling. So
each number goes with who measured it and how. EvalPlus' "MBPP" is its own choice of tasks with the
first tests, not MBPP's test split, and is left out.
"""

from typing import NamedTuple


class PublishedScore(NamedTuple):
    """One published number."""

    percent: float  # pass@1
    how: str  # shots, decoding
    source: str


_CARD = "model card, ai.google.dev/gemma/docs/codegemma/model_card"
_EVALPLUS = "EvalPlus leaderboard, evalplus.github.io/results.json of 2024-12-26"
_BIGCODE = "bigcode-models-leaderboard, community_results"
_DEEPSEEK = "github.com/deepseek-ai/DeepSeek-Coder, Evaluation"
_QWEN = "Qwen2.5-Coder report, arXiv:2409.12186, table 5"
_LLAMA = "Code Llama paper, arXiv:2308.12950, table 2"
_GREEDY = "0-shot, greedy"
_UNSAID = "as reported, settings not given"
_COOL = "0-shot, temperature 0.2, 50 samples"

PUBLISHED: dict[str, dict[str, tuple[PublishedScore, ...]]] = {
    "google/codegemma-2b": {
        "humaneval": (
            PublishedScore(31.1, _UNSAID, _CARD),
            PublishedScore(26.8, _GREEDY, _EVALPLUS),
            PublishedScore(27.3, _COOL, _BIGCODE),
            PublishedScore(
                7.8,
                "0-shot, temperature 0.2, 20 samples, prompt stripped",
                "bigcode-evaluation-harness#261",
            ),
        ),
        "humaneval+": (PublishedScore(20.7, _GREEDY, _EVALPLUS),),
        "mbpp": (PublishedScore(43.6, _UNSAID, _CARD),),
        "mbpp+": (PublishedScore(46.6, _GREEDY, _EVALPLUS),),
    },
    "google/codegemma-7b": {
        "humaneval": (
            PublishedScore(44.5, _UNSAID, _CARD),
            PublishedScore(44.5, _GREEDY, _EVALPLUS),
            PublishedScore(40.1, _COOL, _BIGCODE),
        ),
        "humaneval+": (PublishedScore(41.5, _GREEDY, _EVALPLUS),),
        "mbpp": (PublishedScore(56.2, _UNSAID, _CARD),),
        "mbpp+": (PublishedScore(52.4, _GREEDY, _EVALPLUS),),
    },
    "deepseek-ai/deepseek-coder-1.3b-base": {
        "humaneval": (
            PublishedScore(34.8, _GREEDY, _DEEPSEEK),
            PublishedScore(28.7, _GREEDY, _EVALPLUS),
            PublishedScore(32.1, _COOL, _BIGCODE),
        ),
        "humaneval+": (
            PublishedScore(25.6, _GREEDY, _EVALPLUS),
            PublishedScore(26.8, _UNSAID, _QWEN),
        ),
        "mbpp": (
            PublishedScore(46.8, "3-shot, greedy", _DEEPSEEK),
            PublishedScore(46.2, "3-shot", _QWEN),
        ),
        "mbpp+": (PublishedScore(47.9, _GREEDY, _EVALPLUS), PublishedScore(46.9, _UNSAID, _QWEN)),
    },
    "bigcode/starcoder2-3b": {
        "humaneval": (PublishedScore(31.7, _GREEDY, _EVALPLUS),),
        "humaneval+": (
            PublishedScore(27.4, _GREEDY, _EVALPLUS),
            PublishedScore(27.4, _UNSAID, "model card, huggingface.co/bigcode/starcoder2-3b"),
        ),
        "mbpp": (PublishedScore(47.4, "3-shot", _QWEN),),
        "mbpp+": (PublishedScore(49.1, _UNSAID, _QWEN),),
    },
    "Qwen/Qwen2.5-Coder-1.5B": {
        "humaneval": (PublishedScore(43.9, _UNSAID, _QWEN),),
        "humaneval+": (PublishedScore(36.6, _UNSAID, _QWEN),),
        "mbpp": (PublishedScore(59.2, "3-shot", _QWEN),),
        "mbpp+": (PublishedScore(58.6, _UNSAID, _QWEN),),
    },
    "codellama/CodeLlama-7b-hf": {
        "humaneval": (
            PublishedScore(33.5, _GREEDY, _LLAMA),
            PublishedScore(31.7, _GREEDY, _DEEPSEEK),
            PublishedScore(37.8, _GREEDY, _EVALPLUS),
        ),
        "humaneval+": (PublishedScore(35.4, _GREEDY, _EVALPLUS),),
        "mbpp": (
            PublishedScore(41.4, "3-shot", _LLAMA),
            PublishedScore(38.6, "3-shot, greedy", _DEEPSEEK),
        ),
        "mbpp+": (PublishedScore(46.8, _GREEDY, _EVALPLUS),),
    },
}
"""By base and suite."""


def published_of(base: str, suite: str) -> tuple[PublishedScore, ...]:
    """What is published of a base on a suite; nothing for what the table lacks."""
    return PUBLISHED.get(base, {}).get(suite, ())


def published_lines(base: str, suite: str) -> list[str]:
    """Lines to print beside the base's own score."""
    found = published_of(base, suite)
    if not found:
        return [
            f"no published score of {base} on {suite} is known here: before a gain is believed, "
            "find one, and check the base's own score against it"
        ]
    return [f"published for {base}: {one.percent:.1f} % ({one.how}; {one.source})" for one in found]
