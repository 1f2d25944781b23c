"""Question: does one GPU compute the mixture that the formula says, and how often does it wait?

Method: logits and gradients of a small mixture on the device, in float32, bfloat16 and float16,
against the slow float64 oracle on the CPU (tests/helpers/oracles.py). The yardstick is what the
frozen base alone differs by in the same precision: a ratio of about 1 is rounding alone.
Then decoding against one pass, and how often a step waits for the device
(`torch.cuda.set_sync_debug_mode`).

    python experiments/gpu/correctness.py --device cuda \
        --out experiments/results/gpu/correctness.json
"""

import argparse
import copy
import json
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
from dylora import DyLoRA_MoE, MoELoraConfig
from oracles import OracleSite, logits_with_experts

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
CASES: dict[str, tuple[int, float]] = {  # experts, and the maturity of each
    "dense, E=8": (8, 0.0),
    "mixed, E=8": (8, 0.5),
    "sparse, E=64, K=2": (64, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    for name, (experts, maturity) in CASES.items():
        results[name] = compare(experts, maturity, options.hidden, device)
        print(name, json.dumps(results[name], indent=1))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    worst = max(
        found["ratio"]
        for name in CASES
        for precision, found in results[name].items()
        if isinstance(found, dict) and "ratio" in found
    )
    print(f"largest error relative to the base's own rounding: {worst:.2f}")


def build(experts: int, maturity: float, hidden: int) -> DyLoRA_MoE:
    """A random mixture in float32 whose B and routers are not zero."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).requires_grad_(False)
    config = MoELoraConfig(num_experts=experts, r=8, lora_alpha=16, expert_capacity_factor=None)
    model = DyLoRA_MoE.from_base(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_expert_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
        for _, parameter in model.router_parameters():
            parameter.normal_(std=0.5)
    mature = torch.full((experts,), maturity, dtype=torch.float64)
    model.set_maturity(model.maturity._replace(maturity=mature))
    return model


def compare(experts: int, maturity: float, hidden: int, device: torch.device) -> dict[str, Any]:
    """Errors of logits and gradients by precision; decoding; waits of a step."""
    reference = build(experts, maturity, hidden)
    ids = torch.randint(3, 256, (2, 24))
    exact, exact_gradients, bare = oracle(reference, ids, maturity, experts)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if device.type == "cpu" and dtype == torch.float16:
            continue
        model = copy.deepcopy(reference)
        model.base.to(device)
        own = {id(p) for _, p in model.own_parameters()}
        for parameter in model.base.parameters():
            if id(parameter) not in own:
                parameter.data = parameter.data.to(dtype)
        there = ids.to(device)
        with torch.no_grad(), model.disable_adapters():
            yardstick = relative(model(there).logits, bare)
        output = model(there, labels=there)
        model.zero_grad()
        output.lm_loss.backward()
        gradients = {name: p.grad for name, p in model.own_parameters() if p.grad is not None}
        errors = {
            kind: relative(
                torch.cat([g.double().cpu().flatten() for n, g in gradients.items() if kind in n]),
                torch.cat([exact_gradients[n].flatten() for n in gradients if kind in n]),
            )
            for kind in ("lora_A", "lora_B", "outer")
        }
        error = relative(output.logits, exact)
        entry: dict[str, Any] = {
            "base": yardstick,
            "logits": error,
            "ratio": error / max(yardstick, 1e-9),
            "gradients": errors,
            "decode": relative(decoded(model, there), output.logits.detach().double().cpu()),
        }
        if device.type == "cuda":
            entry["waits"] = waits(model, there)
        found[str(dtype).removeprefix("torch.")] = entry
    return found


def oracle(
    model: DyLoRA_MoE, ids: Tensor, maturity: float, experts: int
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits [B, S, V], gradients by name, and the base's own logits, all in float64."""
    model = copy.deepcopy(model)
    own = dict(model.own_parameters())
    leaves = {name: p.detach().double().requires_grad_() for name, p in own.items()}
    sites = []
    for block in model.site_names:
        mine = {name: leaf for name, leaf in leaves.items() if name.startswith(f"{block}.")}

        def pick(*parts: str, mine: dict[str, Tensor] = mine) -> Tensor:
            return next(v for n, v in mine.items() if all(part in n for part in parts))

        router = pick("outer.weight"), pick("outer.bias")
        pairs = {
            f"{block}.{p}": (pick(f".{p}.", "lora_A"), pick(f".{p}.", "lora_B"))
            for p in PROJECTIONS
        }
        sites.append(OracleSite(block, *router, pairs))
    base = model.unload().double()
    config = model.config
    logits = logits_with_experts(
        base,
        sites,
        ids,
        scaling=config.lora_alpha / config.r,
        temperature=config.router_temperature,
        maturity_E=torch.full((experts,), maturity, dtype=torch.float64),
        k=config.top_k_experts,
    )
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    with torch.no_grad():
        bare = base(input_ids=ids, use_cache=False).logits
    return logits.detach(), gradients, bare


@torch.no_grad()
def decoded(model: DyLoRA_MoE, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of one token at a time with a cache."""
    cache = DynamicCache(config=model.base.config)
    steps = [
        model.base(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        for t in range(ids.shape[1])
    ]
    return torch.cat(steps, 1)


def waits(model: DyLoRA_MoE, ids: Tensor) -> dict[str, int]:
    """How often the host waits for the device in a pass and its gradients, by place in the code."""
    model(ids, labels=ids).loss.backward()  # whatever is only done once
    torch.cuda.synchronize()
    found: Counter[str] = Counter()

    def note(*args: Any, **kwargs: Any) -> None:
        frames = [f for f in traceback.extract_stack() if "dylora" in f.filename]
        frames += [f for f in traceback.extract_stack() if "transformers" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "backward"
        found[place] += 1

    torch.cuda.set_sync_debug_mode("warn")
    shown, warnings.showwarning = warnings.showwarning, note
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            model(ids, labels=ids, keep_logits=False).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = shown
    return dict(found)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    found, expected = found.detach().double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
