"""How many greedy texts change with the size of the batch?

Left padding changes sums by rounding, and where two tokens are nearly as likely, rounding decides.
Prompts of MBPP's test split are continued by the embedded base (and by a checkpoint, if one is
given) alone, and in batches of prompts of similar length, as the benchmark makes them. A text
counts as changed when it is not the one of batch size 1, letter for letter, up to its stop.

    python experiments/benchmark/batch_size.py --mbpp mbpp.jsonl [--checkpoint DIR]
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.base_models import load_tokenizer
from dylora.evaluation.passk.generation import generate_in_batches
from dylora.evaluation.passk.problem import answer_of
from dylora.evaluation.passk.suites import read_suite

BASE = "tiny-code-llama"
SIZES = (1, 4, 16)
RESULTS = Path(__file__).parents[1] / "results" / "batch_size.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mbpp", required=True, help="MBPP in its original format")
    parser.add_argument("--checkpoint", help="measure this mixture too")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    options = parser.parse_args()
    problems = read_suite("mbpp", options.mbpp, limit=options.tasks).problems
    tokenizer = load_tokenizer(BASE)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for who in ("base", "checkpoint") if options.checkpoint else ("base",):
            if who == "base":
                config = MoELoraConfig(num_experts=2, r=2)  # fresh: exactly the base
                model = DyLoRA_MoE.from_base(BASE, config, dtype=dtype)
            else:
                model = DyLoRA_MoE.from_pretrained(options.checkpoint, dtype=dtype)
            programs = {}
            for size in SIZES:
                begun = time.perf_counter()
                texts = generate_in_batches(
                    model, tokenizer, problems, size, max_new_tokens=options.max_new_tokens
                )
                pairs = zip(problems, texts, strict=True)
                programs[size] = [answer_of(problem, text) for problem, text in pairs]
                changed = sum(
                    one != other for one, other in zip(programs[1], programs[size], strict=True)
                )
                row = {
                    "model": who,
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch_size": size,
                    "tasks": len(problems),
                    "changed": changed,
                    "share": changed / len(problems),
                    "seconds": round(time.perf_counter() - begun, 1),
                }
                print(row, flush=True)
                rows.append(row)
    report = {
        "question": __doc__.split("\n", 1)[0],
        "base": BASE,
        "max_new_tokens": options.max_new_tokens,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
