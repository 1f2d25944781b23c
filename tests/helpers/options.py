"""The table of every field of MoELoraConfig, as `docs/options.md` holds it:

    python tests/helpers/options.py > docs/options.md

Meanings are the fields' docstrings, which `run.py train --help` shows; ranges are what the config
says when it refuses a value.
"""

import ast
import inspect
import re
import textwrap
import types
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin

from dylora import MoELoraConfig

SECTIONS = {"adapter_type": "Experts", "use_moe_routing": "Routing", "maturity_mode": "Maturity"}

# A value that each field refuses; its error tells the range.
REFUSED: dict[str, Any] = {
    "r": 0,
    "lora_alpha": 0,
    "expert_ranks": [0],
    "expert_alphas": [0.0],
    "rank_pattern": {"q_proj": 0},
    "alpha_pattern": {"q_proj": 0.0},
    "lora_dropout": 1.0,
    "num_experts": 1,
    "shared_experts": -1,
    "top_k_experts": 5,
    "router_hidden_size": 0,
    "router_temperature": 0.0,
    "router_noise": -1.0,
    "fixed_routing_weights": [-1.0],
    "router_aux_loss_coef": -1.0,
    "router_switch_loss_coef": -1.0,
    "router_z_loss_coef": -1.0,
    "expert_capacity_factor": 0.0,
    "expert_dropout": 1.0,
    "maturity_tau": 0.0,
    "maturity_s": 0.0,
    "maturity_fast": 0.0,
    "maturity_slow": 0.0,
    "maturity_threshold": 0.0,
    "maturity_schedule": (0.6, 0.2),
}

PAPERS = {
    "LoRA": "Hu et al. 2021, LoRA, arXiv 2106.09685",
    "rsLoRA": "Kalajdzievski 2023, rsLoRA, arXiv 2312.03732",
    "DoRA": "Liu et al. 2024, DoRA, arXiv 2402.09353",
    "LoHa": "Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098",
    "BitFit": "Zaken et al. 2022, BitFit, arXiv 2106.10199",
    "LoRA-FA": "Zhang et al. 2023, LoRA-FA, arXiv 2308.03303",
    "HydraLoRA": "Tian et al. 2024, HydraLoRA, arXiv 2404.19245",
    "sparse MoE": "Shazeer et al. 2017, sparsely-gated mixtures, arXiv 1701.06538",
    "GShard": "Lepikhin et al. 2020, GShard, arXiv 2006.16668",
    "Switch": "Fedus et al. 2021, Switch Transformer, arXiv 2101.03961",
    "ST-MoE": "Zoph et al. 2022, ST-MoE, arXiv 2202.08906",
    "MoLA": "Gao et al. 2024, MoLA, arXiv 2402.08562",
    "DeepSeekMoE": "Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066",
    "LDA": "Fisher 1936, the use of multiple measurements in taxonomic problems",
    "Arrow": "Ostapenko et al. 2024, Arrow, arXiv 2405.11157",
}
SOURCES = {
    "adapter_type": ["LoRA", "LoHa"],
    "r": ["LoRA"],
    "lora_alpha": ["LoRA"],
    "lora_dropout": ["LoRA"],
    "bias": ["BitFit"],
    "use_rslora": ["rsLoRA"],
    "use_dora": ["DoRA"],
    "freeze_A": ["LoRA-FA"],
    "share_A": ["HydraLoRA"],
    "init_lora_weights": ["LoRA"],
    "top_k_experts": ["sparse MoE"],
    "experts_per_layer": ["MoLA"],
    "shared_experts": ["DeepSeekMoE"],
    "router_scope": ["LDA"],
    "router_logits": ["Arrow"],
    "router_noise": ["sparse MoE"],
    "load_balance_loss_type": ["GShard", "Switch"],
    "router_aux_loss_coef": ["GShard"],
    "router_switch_loss_coef": ["Switch"],
    "router_z_loss_coef": ["ST-MoE"],
    "expert_capacity_factor": ["GShard"],
}

OPENING = """\
# Every option of a mixture

The fields of `MoELoraConfig`: the section `moe` of a config, and what a checkpoint keeps.
Written by `python tests/helpers/options.py`; a test holds it to the code. A field without a source
is plain, or PEFT's, or defined in `docs/architecture.md`. What does not fit together is refused in
one line.
"""

CLOSING = """\
## A mixture of DoRA experts

One DoRA expert replaces a projection's output by `c ∘ ((W + s B A) x) + bias`, where
`c = magnitude / ‖W + s B A‖` has a value for each output (row) and its norm counts as a constant
in the backward pass. Experts are mixed by what each of them *adds to the base*:

    y = base(x) + Σ_e g_e [ (c_e - 1) ∘ W x + c_e ∘ s_e B_e A_e x ]

So a one-hot gate is exactly that DoRA expert, and fresh experts (c = 1, B = 0) change nothing. It
is a mixture of outputs, not of directions: no common magnitude is trained. The update of a DoRA
expert is not of low rank, so two of them cannot be merged. See `adapter.magnitude_ratio`.

## What experts have in common, and frozen experts

A frozen expert serves on and never changes, not by a bit. What it shares with others would change
it, so that stands still with it:

- `bias: lora_only` gives each expert biases of its own, mixed by its gate: they freeze with it.
- `bias: all` adds one shift for every other bias of the base. It belongs to all experts and no
  gate scales it, so it is trained only while every expert is.
- `share_A` gives a projection one A for all experts. While any expert is frozen, or only one takes
  part, A stands still and the others train their B alone.
- `freeze_A` never trains A, frozen expert or not. Then freezing an expert stops its B (with DoRA
  its magnitude, with trained biases its bias) and nothing else.
"""


def meanings() -> dict[str, str]:
    """The docstring under each field, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(MoELoraConfig))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(before.target, ast.Name)
            assert isinstance(after.value, ast.Constant)
            found[before.target.id] = " ".join(str(after.value.value).split())
    return found


def kind(annotation: Any) -> str:
    """A type in words: its choices, or int, float, none …"""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{shown(choice)}`" for choice in get_args(annotation))
    if get_origin(annotation) is types.UnionType:
        return " or ".join(kind(member) for member in get_args(annotation))
    if get_origin(annotation) is not None:
        return str(annotation).replace("tuple[float, float]", "[float, float]")
    return {"NoneType": "none", "bool": "`true`, `false`"}.get(
        annotation.__name__, annotation.__name__
    )


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def refusal(name: str) -> str:
    """What the config says must hold of a field, without the numbers of its other fields."""
    try:
        MoELoraConfig(
            **{name: REFUSED[name], **({"router_type": "fixed"} if "fixed" in name else {})}
        )
    except ValueError as error:
        rule = str(error).partition("but must be ")[2]
        rule = re.sub(r" \(4\)", "", rule)
        return re.sub(r"^4 ", "num_experts ", rule)
    raise AssertionError(f"{name} = {REFUSED[name]} is not refused")


def default_of(item: "Field[Any]") -> Any:
    """Its default, made if it has to be."""
    return item.default if item.default is not MISSING else item.default_factory()  # type: ignore


def document() -> str:
    """The text of docs/options.md."""
    meaning = meanings()
    lines = [OPENING, "| option | meaning | default | values | source |", "|---|---|---|---|---|"]
    for item in fields(MoELoraConfig):
        name = item.name
        if name in SECTIONS:
            lines.append(f"| **{SECTIONS[name]}** | | | | |")
        values = kind(item.type)
        if name in REFUSED:
            values += f"; {refusal(name)}"
        source = ", ".join(SOURCES.get(name, ())) or "–"
        cells = [f"`{name}`", meaning[name], f"`{shown(default_of(item))}`", values, source]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines += [
        "",
        "Sources:",
        "",
        *(f"- {paper}" for paper in PAPERS.values()),
        "",
        CLOSING.rstrip(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
