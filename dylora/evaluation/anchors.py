"""Published pass@1 of well-known bases, to hold a base's score against before a gain is believed.

Reports differ by what stands in no table: the prompt to its last newline, the stops, sampling. So
each number goes with who measured it and how. EvalPlus' "MBPP" is its own choice of tasks with the
first tests, not MBPP's test split, and is left out.
"""

from typing import NamedTuple


class Anchor(NamedTuple):
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

ANCHORS: dict[str, dict[str, tuple[Anchor, ...]]] = {
    "google/codegemma-2b": {
        "humaneval": (
            Anchor(31.1, _UNSAID, _CARD),
            Anchor(26.8, _GREEDY, _EVALPLUS),
            Anchor(27.3, _COOL, _BIGCODE),
            Anchor(
                7.8,
                "0-shot, temperature 0.2, 20 samples, prompt stripped",
                "bigcode-evaluation-harness#261",
            ),
        ),
        "humaneval+": (Anchor(20.7, _GREEDY, _EVALPLUS),),
        "mbpp": (Anchor(43.6, _UNSAID, _CARD),),
        "mbpp+": (Anchor(46.6, _GREEDY, _EVALPLUS),),
    },
    "google/codegemma-7b": {
        "humaneval": (
            Anchor(44.5, _UNSAID, _CARD),
            Anchor(44.5, _GREEDY, _EVALPLUS),
            Anchor(40.1, _COOL, _BIGCODE),
        ),
        "humaneval+": (Anchor(41.5, _GREEDY, _EVALPLUS),),
        "mbpp": (Anchor(56.2, _UNSAID, _CARD),),
        "mbpp+": (Anchor(52.4, _GREEDY, _EVALPLUS),),
    },
    "deepseek-ai/deepseek-coder-1.3b-base": {
        "humaneval": (
            Anchor(34.8, _GREEDY, _DEEPSEEK),
            Anchor(28.7, _GREEDY, _EVALPLUS),
            Anchor(32.1, _COOL, _BIGCODE),
        ),
        "humaneval+": (Anchor(25.6, _GREEDY, _EVALPLUS), Anchor(26.8, _UNSAID, _QWEN)),
        "mbpp": (
            Anchor(46.8, "3-shot, greedy", _DEEPSEEK),
            Anchor(46.2, "3-shot", _QWEN),
        ),
        "mbpp+": (Anchor(47.9, _GREEDY, _EVALPLUS), Anchor(46.9, _UNSAID, _QWEN)),
    },
    "bigcode/starcoder2-3b": {
        "humaneval": (Anchor(31.7, _GREEDY, _EVALPLUS),),
        "humaneval+": (
            Anchor(27.4, _GREEDY, _EVALPLUS),
            Anchor(27.4, _UNSAID, "model card, huggingface.co/bigcode/starcoder2-3b"),
        ),
        "mbpp": (Anchor(47.4, "3-shot", _QWEN),),
        "mbpp+": (Anchor(49.1, _UNSAID, _QWEN),),
    },
    "Qwen/Qwen2.5-Coder-1.5B": {
        "humaneval": (Anchor(43.9, _UNSAID, _QWEN),),
        "humaneval+": (Anchor(36.6, _UNSAID, _QWEN),),
        "mbpp": (Anchor(59.2, "3-shot", _QWEN),),
        "mbpp+": (Anchor(58.6, _UNSAID, _QWEN),),
    },
    "codellama/CodeLlama-7b-hf": {
        "humaneval": (
            Anchor(33.5, _GREEDY, _LLAMA),
            Anchor(31.7, _GREEDY, _DEEPSEEK),
            Anchor(37.8, _GREEDY, _EVALPLUS),
        ),
        "humaneval+": (Anchor(35.4, _GREEDY, _EVALPLUS),),
        "mbpp": (
            Anchor(41.4, "3-shot", _LLAMA),
            Anchor(38.6, "3-shot, greedy", _DEEPSEEK),
        ),
        "mbpp+": (Anchor(46.8, _GREEDY, _EVALPLUS),),
    },
}
"""By base and suite."""


def anchors_of(base: str, suite: str) -> tuple[Anchor, ...]:
    """What is published of a base on a suite; nothing for what the table lacks."""
    return ANCHORS.get(base, {}).get(suite, ())


def anchor_lines(base: str, suite: str) -> list[str]:
    """Lines to print beside the base's own score."""
    found = anchors_of(base, suite)
    if not found:
        return [
            f"no published score of {base} on {suite} is known here: before a gain is believed, "
            "find one, and check the base's own score against it"
        ]
    return [f"published for {base}: {one.percent:.1f} % ({one.how}; {one.source})" for one in found]
