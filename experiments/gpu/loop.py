"""Question: what do the loop's settings for a GPU bring, does the estimate of a run's memory hold
there, and does a run that is resumed there end with the same bits?

Method: dylora's own preparation and steps, on the longest rows. The base has codegemma's width and
random weights and is read from a file, as a user's is; 8 experts of rank 16. Tokens per second are
the median over the second half of --steps steps; the first one of a compiled run compiles. Runs of
the embedded base go to their end, once more, and again from the checkpoint in their middle. All but
decoding needs the package datasets, and says so where it is missing.

    python experiments/gpu/loop.py --device cuda --dtype bfloat16 --layers 18 --plain \
        --out experiments/results/gpu/loop.json
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.base_models import load_tokenizer
from dylora.cli.config_file import load_run_config
from dylora.run_config import RunConfig
from dylora.storage.folders import checkpoints
from dylora.training.check import longest_rows
from dylora.training.compilation import compiled_passes
from dylora.training.environment import tf32_products
from dylora.training.loop import train
from dylora.training.memory import estimate
from dylora.training.run import prepare
from dylora.training.step import run_step
from experiments.speed import models

CASES = {  # settings beside those of every run
    "eager": {},
    "compiled": {"train.compile": "true"},
    "recomputed": {"train.gradient_checkpointing": "true"},
    "four times the rows": {"train.batch_size": "16"},
    "64 experts": {"moe.num_experts": "64"},
    "float32": {"model.dtype": "float32"},
    "float32, tf32": {"model.dtype": "float32", "train.tf32": "true"},
    "float32, tf32, compiled": {
        "model.dtype": "float32",
        "train.tf32": "true",
        "train.compile": "true",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--plain", action="store_true", help="leave out what is compiled")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"device": options.device, "torch": torch.__version__}
    if options.device == "cuda":
        found["device"] = torch.cuda.get_device_name()

    def keep(name: str, result: Any) -> None:
        found[name] = result
        print(name, json.dumps(result), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            keep(name, work())
        except Exception as error:  # the other cases are of use without it
            keep(name, f"{type(error).__name__}: {error}"[:500])
        gc.collect()
        torch.compiler.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()

    with TemporaryDirectory() as place:
        folder = Path(place)
        for dtype, fixed in itertools.product(("float32", "bfloat16"), (False, True)):
            name = f"repeated, {dtype}" + (", deterministic" if fixed else "")
            attempt(name, lambda d=dtype, f=fixed: repeated(folder, d, f, options))
        write_base(folder / "base", options)
        for case in options.cases:
            if options.plain and "train.compile" in CASES[case]:
                continue
            attempt(case, lambda case=case: measure(folder, case, options))
        bases = (("tiny-code-llama", "float32"), (str(folder / "base"), options.dtype))
        for base, dtype in bases:  # last: a recorded graph keeps its memory
            name = f"decoding, {Path(base).name}, {dtype}"
            attempt(name, lambda base=base, dtype=dtype: decoded(base, dtype, options))


def repeated(folder: Path, dtype: str, fixed: bool, options: argparse.Namespace) -> dict[str, Any]:
    """How many of a run's tensors are the same, bit by bit, when it is run again, and when it goes
    on from its middle. fixed: with train.deterministic."""
    changes = {"model.dtype": dtype, "train.max_steps": "8", "train.save_steps": "4"}
    changes |= {"moe.lora_dropout": "0.1", "moe.maturity_mode": "usage"}
    changes |= {"train.deterministic": str(fixed).lower()}
    ends = []
    for name in ("once", "again", "resumed"):
        changes["name"] = f"{name}-{dtype}-{fixed}"
        config = run_config(folder, "tiny-code-llama", changes, options)
        with contextlib.redirect_stdout(io.StringIO()):
            run = train(config)
            if name == "resumed":
                run = train(config, str(checkpoints(run.folder)[0]))
        ends.append({key: p.detach().cpu() for key, p in run.model.own_parameters()})
    once, again, resumed = ends
    return {
        "tensors": len(once),
        "equal when run again": sum(torch.equal(once[key], again[key]) for key in once),
        "equal when resumed": sum(torch.equal(once[key], resumed[key]) for key in once),
    }


def decoded(base: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of `generate` with a cache that grows and with a static one, for which
    transformers compiles the step and records it as a CUDA graph; and whether both say the same."""
    model = DyLoRA_MoE.from_base(
        base,
        MoELoraConfig(num_experts=8, r=16),
        dtype=getattr(torch, dtype),
        device=torch.device(options.device),
    ).eval()
    models.randomise(model)
    ids = torch.randint(10, 4000, (1, 32), device=model.device)
    found: dict[str, Any] = {}
    texts = {}
    for kind in ("dynamic", "static"):
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=128,
                max_new_tokens=128,
                do_sample=False,
                cache_implementation=None if kind == "dynamic" else kind,
                pad_token_id=0,
            )
            texts[kind] = out.tolist()
            seconds.append(time.perf_counter() - begun)
        found[f"{kind}, tokens/s"] = round(128 / min(seconds[1:]), 1)
        found[f"{kind}, first call s"] = round(seconds[0], 2)
    equal = sum(a == b for a, b in zip(texts["dynamic"][0], texts["static"][0], strict=True))
    return found | {"equal tokens": equal - ids.shape[1]}


def measure(folder: Path, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Speed and peak memory of one case, and the estimate of the latter."""
    config = run_config(folder, str(folder / "base"), CASES[case] | {"name": "case"}, options)
    cuda = options.device == "cuda"
    expected = estimate(config)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run = prepare(config, fresh=True)
    prepared = time.perf_counter() - begun
    run = run._replace(sampler=longest_rows(run))  # type: ignore[arg-type]
    with (
        closing(run.log),
        tf32_products(config.train.tf32, run.model.device),
        compiled_passes(run.model, config.train.compile),
    ):
        steps = [run_step(run) for _ in range(options.steps)]
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "tokens/s": round(
            statistics.median(step.tokens / step.seconds for step in steps[len(steps) // 2 :])
        ),
        "tokens a step": steps[-1].tokens,
        "seconds to prepare": round(prepared, 2),
        "seconds of the first step": round(steps[0].seconds, 2),
        "losses": [steps[0].loss, steps[-1].loss],
        "estimated GB": (expected.total - expected.process) / 1e9,
        "peak GB": None if peak is None else peak / 1e9,
        "estimate / peak": None if peak is None else (expected.total - expected.process) / peak,
    }


def run_config(
    folder: Path, base: str, changes: dict[str, str], options: argparse.Namespace
) -> RunConfig:
    """The run of a case: rows of a file, of up to --length tokens."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        most = options.length // 5 - 12  # lines of five tokens
        lines = [
            json.dumps({"question": f"Repeat {i}.", "answer": "x = 1\n" * max(most - i % 8, 1)})
            for i in range(128)
        ]
        rows.write_text("\n".join(lines) + "\n")
    source = {"name": "mine", "path": str(rows)}
    source |= {"instruction_column": "question", "output_column": "answer"}
    tree: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "model": {"base": base, "dtype": options.dtype, "device": options.device},
        "moe": {"num_experts": 8, "r": 16, "maturity_mode": "manual"},
        "data": {"max_length": options.length, "sources": [source]},
        "train": {"max_steps": 1000, "batch_size": 4, "learning_rate": 1e-3},
    }
    for key, value in changes.items():
        section, _, field = key.rpartition(".")
        (tree[section] if section else tree)[field] = value
    file = folder / "config.yaml"
    file.write_text(json.dumps(tree))
    return load_run_config(str(file))


def write_base(folder: Path, options: argparse.Namespace) -> None:
    """A random base in a folder, with the embedded tokenizer."""
    if options.device == "cuda":
        config, device = models.codegemma(options.layers, vocabulary=8192), torch.device("cuda")
    else:
        config, device = models.small(options.layers), torch.device("cpu")
    base = models.build(config, device, getattr(torch, options.dtype))
    base.save_pretrained(folder)
    load_tokenizer("tiny-code-llama").save_pretrained(folder)


if __name__ == "__main__":
    main()
