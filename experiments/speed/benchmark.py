"""What the mixture costs, against what others do; one section or all, JSON and tables.

    python experiments/speed/benchmark.py --section all --out experiments/results/speed_cpu.json
    python experiments/speed/benchmark.py --device cuda --dtype bfloat16 --layers 18 --section all \
        --out experiments/results/speed_gpu.json

Needs dylora's core dependencies alone; contenders whose package is missing are left out, and said.
Every number is a median over interleaved rounds, every ratio is taken within a round.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dylora.evaluation.validate.cost import peak_bytes
from experiments.speed import models
from experiments.speed.models import with_peft
from experiments.speed.prompt_routed import prompt_routed
from experiments.speed.timing import timed
from experiments.speed.updates import projections, sparse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--section", default="all", choices=["all", *SECTIONS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=2, help="of codegemma's shape (18 are whole)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also time compiled contenders")
    parser.add_argument(
        "--fast", action="store_true", help="steps without the contenders that take twice as long"
    )
    parser.add_argument("--dora", action="store_true", help="steps and decode: all with DoRA")
    parser.add_argument("--case", default="", help="of steps, decode, sparse")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step at hidden 512")
    parser.add_argument("--width", type=int, default=512, help="of the projection of sparse")
    parser.add_argument(
        "--sparse_tokens", type=int, nargs="+", help="of sparse, with gradient; default: a table"
    )
    parser.add_argument("--sparse_experts", type=int, nargs="+", default=[2, 8, 16, 64, 256])
    parser.add_argument(
        "--wide_tokens", type=int, default=256, help="of a step at codegemma's width"
    )
    parser.add_argument(
        "--wide_experts",
        type=int,
        nargs="+",
        default=[8],
        help="likewise, one case each",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = torch.device(options.device)
    options.dtype = getattr(torch, options.dtype)
    models.quiet()
    results = {}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text())
    results["about"] = about(options)
    for name in SECTIONS if options.section == "all" else [options.section]:
        results[name] = SECTIONS[name](options)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where the numbers come from."""
    device = options.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(options.dtype),
        "torch": torch.__version__,
        "rounds": options.rounds,
    }


# A whole train step


def step_cases(options: argparse.Namespace) -> list[tuple[str, Any, tuple[int, int], int, bool]]:
    """Of each case its name, the base's configuration, rows and tokens, experts, whether mature."""
    rows = (2, options.tokens // 2)
    cases = [
        (f"hidden 512 x 8, T={options.tokens}, E=4", models.small(), rows, 4, False),
        (f"hidden 512 x 8, T={options.tokens}, E=8", models.small(), rows, 8, False),
        (f"hidden 512 x 8, T={options.tokens}, E=64 mature, K=2", models.small(), rows, 64, True),
    ]
    for experts in options.wide_experts:
        for mature in (False, True) if experts >= 64 else (False,):
            key = f"codegemma's width x {options.layers}, T={options.wide_tokens}, E={experts}"
            key += " mature, K=2" if mature else ""
            config = models.codegemma(options.layers, vocabulary=8192)
            cases.append((key, config, (1, options.wide_tokens), experts, mature))
    return [case for case in cases if options.case in case[0]]


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of a whole model, as multiples of the frozen base's."""
    results = {}
    for key, config, shape, experts, mature in step_cases(options):
        base = models.build(config, options.device, options.dtype)
        ids = torch.randint(config.vocab_size, shape, device=options.device)
        ours = models.mixture(base, experts, mature=mature, use_dora=options.dora)
        rank = 16 * experts

        def hf(model: nn.Module, ids: torch.Tensor = ids) -> Callable[[], None]:
            loss = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
            return models.train_step(model, loss)

        def mixed(model: Any, keep: bool, ids: torch.Tensor = ids) -> Callable[[], None]:
            loss = lambda: model(ids, labels=ids, keep_logits=keep).loss  # noqa: E731
            return models.train_step(model, loss)

        @torch.no_grad()
        def forward(base: Any = base, ids: torch.Tensor = ids) -> None:
            base(input_ids=ids, use_cache=False)

        ways = {
            "base, forward alone": forward,
            "floor": models.floor_step(base, ids),
            "ours": mixed(ours, True),
            "ours, loss in chunks": mixed(ours, False),
        }
        if options.compile and not mature:
            compiled = models.mixture(base, experts, routing_mode="dense")
            compiled.base.forward = torch.compile(compiled.base.forward, fullgraph=True)
            ways["ours, compiled"] = mixed(compiled, True)
        others: dict[str, Callable[[], Any]] = {
            "peft LoRA r=16": lambda b=base: models.peft_lora(b, 16, dora=options.dora)
        }
        if not mature:
            others[f"peft LoRA r={rank}"] = lambda b=base, r=rank: models.peft_lora(
                b, r, dora=options.dora
            )
        if not mature and not options.fast:
            others["peft, adapters in a loop"] = lambda b=base, e=experts: models.peft_lora(
                b, 16, e
            )
            others["peft X-LoRA"] = lambda b=base, e=experts: models.peft_xlora(b, 16, e)
            ways["N passes"] = models.train_step(
                ours, lambda m=ours, ids=ids: models.n_pass_step(m, ids)
            )
        ways |= {name: hf(model) for name, model in with_peft(others).items()}
        results[key] = timed(f"train step, {key}", ways, "floor", options)
        # Off CUDA live tensors are counted as operations run, which compiled code does not let.
        seen = [n for n in ways if n != "ours, compiled" or options.device.type == "cuda"]
        memory = {name: peak_bytes(ways[name], options.device) / 1e6 for name in seen}
        for name, value in memory.items():
            results[key][name]["peak_mb"] = value
        print("peak MB:", {name: round(value) for name, value in memory.items()})
    return results


# Prefill and decode


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """A prompt of 512 tokens, and one more token with the cache, dynamic or static."""
    results = {}
    cases = [
        ("hidden 512 x 8, E=8", models.small(), 8, False),
        ("hidden 512 x 8, E=64 mature", models.small(), 64, True),
        ("hidden 512 x 8, E=256 mature", models.small(), 256, True),
        (
            f"codegemma's width x {options.layers}, E=8",
            models.codegemma(options.layers, vocabulary=8192),
            8,
            False,
        ),
    ]
    for key, config, experts, mature in cases:
        if options.case not in key:
            continue
        base = models.build(config, options.device, options.dtype)
        lot = {
            "base": base,
            "ours": models.mixture(base, experts, mature=mature, use_dora=options.dora).base,
        }
        lot |= with_peft(
            {
                f"peft LoRA r={rank}": lambda base=base, rank=rank: models.peft_lora(
                    base, rank, dora=options.dora
                ).eval()
                # The larger reads as many bytes as eight experts of rank 16 that all take part.
                for rank in (16, 128)
            }
        )
        ids = torch.randint(config.vocab_size, (1, 512), device=options.device)
        last = ids[:, -1:]

        @torch.no_grad()
        def prompt(model: Any, ids: torch.Tensor = ids) -> Any:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return output.past_key_values

        caches = {name: prompt(model) for name, model in lot.items()}

        @torch.no_grad()
        def one_more(
            name: str, lot: Any = lot, caches: Any = caches, last: torch.Tensor = last
        ) -> None:
            lot[name](input_ids=last, past_key_values=caches[name], use_cache=True)
            caches[name].crop(-1)

        baseline = "peft LoRA r=16" if "peft LoRA r=16" in lot else "base"
        prefill = {name: (lambda m=model: prompt(m)) for name, model in lot.items()}
        results[f"prefill, {key}"] = timed(f"prefill 512, {key}", prefill, baseline, options)
        token = {name: (lambda n=name: [one_more(n) for _ in range(8)]) for name in lot}
        for name in ("base", "ours", "peft LoRA r=16"):
            if name in lot:
                step = static_token(lot[name], ids, options.device)
                token[f"{name}, static cache"] = lambda step=step: [step() for _ in range(8)]
        results[f"decode, {key}"] = timed(f"decode 8 tokens, {key}", token, baseline, options)
    return results


@torch.no_grad()
def static_token(model: Any, ids: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """One more token in a static cache, always at the same place; on CUDA one graph of it."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 1)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = ids[:, -1:].clone()

    @torch.no_grad()
    def step() -> None:
        model(input_ids=last, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)

    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()  # a capture needs warm kernels, from another stream than its own
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(kept: Any = step) -> None:  # a graph reads the tensors of `step`, and keeps none
        graph.replay()

    return replay


# Memory of a wide vocabulary


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak of a train step with 256,000 words, batch 4 x 512, three quarters of it prompt."""
    config = models.small(layers=2, vocabulary=256_000)
    base = models.build(config, options.device, options.dtype)
    ids = torch.randint(config.vocab_size, (4, 512), device=options.device)
    labels = ids.clone()
    labels[:, :384] = -100
    ours = models.mixture(base, 8)
    ours(ids[:, :8], labels=labels[:, -8:], keep_logits=False)  # the head has been looked for
    step = models.train_step(ours, lambda: ours(ids, labels=labels, keep_logits=False).loss)
    whole = models.train_step(ours, lambda: ours(ids, labels=labels).loss)
    ways = {"ours": step, "ours, logits kept": whole}
    for name, model in with_peft({"peft LoRA r=128": lambda: models.peft_lora(base, 128)}).items():
        loss = lambda model=model: model(input_ids=ids, labels=labels, use_cache=False).loss  # noqa: E731
        ways[name] = models.train_step(model, loss)
    peaks = {name: peak_bytes(way, options.device) / 1e6 for name, way in ways.items()}
    print("\npeak MB at vocabulary 256,000, batch 4 x 512, targets in the last quarter")
    for name, value in peaks.items():
        print(f"{name:34} {value:10.0f}")
    return peaks


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "projections": projections,
    "steps": steps,
    "decode": decode,
    "sparse": sparse,
    "memory": memory,
    "prompt_routed": prompt_routed,
}

if __name__ == "__main__":
    main()
