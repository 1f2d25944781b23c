"""Does the estimate of a run's memory hold?

    OMP_NUM_THREADS=1 python -m experiments.speed.memory

For each config: the estimate of `run.py info --estimate`, and the peak resident memory, as Linux
reports it, of a process that trains one step on the longest rows, as `run.py train --check` does.
Both are forks of a process that has imported the libraries and nothing else. The peak is taken
twice: with glibc's malloc as it is, which keeps freed blocks of up to 32 MB in a heap that comes to
have holes, and with blocks from 1 MB on given back when they are freed, as
MALLOC_MMAP_THRESHOLD_=1048576 does it, so that the process has what its tensors hold. Writes
experiments/results/memory.json after each.
"""

import ctypes
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dylora.base_models import load_tokenizer
from dylora.cli.config_file import load_run_config
from dylora.run_config import RunConfig
from dylora.training.check import longest_rows
from dylora.training.memory import estimate
from dylora.training.run import prepare
from dylora.training.step import run_step

RESULTS = Path("experiments/results/memory.json")
ROWS = 40
M_MMAP_THRESHOLD = -3  # of malloc.h
# Name -> layers, width and vocabulary of the base (none: the embedded one), rows and tokens of a
# batch, and settings.
CASES: dict[str, tuple[tuple[int, int, int] | None, tuple[int, int], dict[str, str]]] = {
    "5 M": (None, (2, 512), {}),
    "5 M, eight times the rows": (None, (16, 512), {}),
    "5 M, the same, recomputed": (None, (16, 512), {"train.gradient_checkpointing": "true"}),
    "42 M": ((8, 512, 32000), (4, 256), {}),
    "42 M, 16 experts of rank 32": (
        (8, 512, 32000),
        (4, 256),
        {"moe.num_experts": "16", "moe.r": "32"},
    ),
    "110 M": ((12, 768, 32000), (2, 256), {}),
    "430 M": ((26, 1024, 64000), (1, 256), {}),
}


def main() -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with TemporaryDirectory() as folder:
        for name in sys.argv[1:] or list(CASES):
            config = forked(lambda name=name: make_case(name, Path(folder)))[0]
            config = load_run_config(config)
            parts, _ = forked(lambda config=config: parts_of(config))
            expected = parts["total"]
            found[name] = dict(parts)
            for kind, mapped in (("peak", False), ("peak_mapped", True)):
                work = partial(train_step, config, mapped=mapped)
                seconds, peak = forked(work)
                error = expected / peak - 1
                found[name] |= {kind: peak, f"{kind}_error": error, f"{kind}_cpu_seconds": seconds}
                print(
                    f"{name}, {kind}: {expected:.3f} GB expected, {peak:.3f} ({error:+.1%}), "
                    f"{seconds:.2f} CPU seconds",
                    flush=True,
                )
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")


def parts_of(config: RunConfig) -> dict[str, float]:
    """The estimate in GB."""
    found = estimate(config)
    return {key: size / 1e9 for key, size in (found._asdict() | {"total": found.total}).items()}


def train_step(config: RunConfig, *, mapped: bool) -> float:
    """One step on the longest rows; its CPU seconds."""
    if mapped:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    run = prepare(config, fresh=True)
    with closing(run.log):
        began = time.process_time()
        run_step(run._replace(sampler=longest_rows(run)))  # type: ignore[arg-type]
    return time.process_time() - began


def make_case(name: str, folder: Path) -> str:
    """The config of a case, beside its rows and its base, a Llama of random weights."""
    sizes, (batch, length), own = CASES[name]
    place, base = folder / str(list(CASES).index(name)), "tiny-code-llama"
    place.mkdir()
    tokenizer = load_tokenizer(base)
    if sizes is not None:
        layers, width, vocabulary = sizes
        config = LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=3 * width,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
        )
        base = str(place / "base")
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
        tokenizer.save_pretrained(base)
    each = len(tokenizer("x = 1\n" * 100)["input_ids"]) / 100
    most = int(length / each)  # lines; some rows are too long, and dropped
    rows = [
        {"question": f"Repeat {i}.", "answer": "x = 1\n" * max(most - i, 1)} for i in range(ROWS)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "mine", "path": str(place / "rows.jsonl")}
    source |= {"instruction_column": "question", "output_column": "answer"}
    tree: dict[str, Any] = {
        "output_dir": str(place),
        "model": {"base": base, "dtype": "float32", "device": "cpu"},
        "moe": {"num_experts": 4, "r": 16},
        "data": {"max_length": length, "sources": [source]},
        "train": {"max_steps": 1, "batch_size": batch},
    }
    for key, value in own.items():
        section, field = key.split(".")
        tree[section][field] = json.loads(value)
    (place / "config.yaml").write_text(json.dumps(tree))
    return str(place / "config.yaml")


def forked(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a process of its own gives, and its peak resident memory in GB."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit("the process failed")
    return json.loads(text), usage.ru_maxrss / 1e6


if __name__ == "__main__":
    main()
