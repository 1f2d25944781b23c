"""Every form an expert is exported in, before every reader that can be run or asked here.

The one table of forms and readers: `test_exports.py` holds `docs/export.md` to what a run of it
gives, and writes it anew with

    python tests/helpers/exports.py > docs/export.md
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from dylora import DyLoRA_MoE, MoELoraConfig, export_mixture, export_peft
from dylora.adapters.dora import weight_OD
from dylora.integrations.compatibility import READERS, Incompatibility, find_incompatibilities
from dylora.storage.peft_config import CONFIG_FILE, scaling_of
from dylora.storage.peft_format import WEIGHTS_FILE, PeftAdapter, read_adapter
from dylora.storage.safe_io import read_json
from dylora.storage.tensors import read_tensors
from families import FAMILIES

TOLERANCE = 1e-5
TOKENS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(3))
WEIGHTS = (0.3, 0.2, 0.5)  # of the mixtures
TOP_K, TEMPERATURE = 2, 0.5  # of Arrow


class Form(NamedTuple):
    """One row of the table."""

    title: str
    settings: dict[str, Any]  # of the mixture
    family: str = "llama"
    portable: bool = False
    mixed: bool = False


UNEVEN = {"expert_ranks": [2, 3, 2]}
MIXED_UP = UNEVEN | {"use_rslora": True, "alpha_pattern": {"q_proj": 7.0}}
FORMS = (
    Form("experts", {}),
    Form("experts of different ranks", UNEVEN),
    Form("experts with rslora", {"use_rslora": True}),
    Form("experts with a rank_pattern", {"rank_pattern": {"q_proj": 2}}),
    Form("experts with an alpha_pattern", {"alpha_pattern": {"q_proj": 7.0}}),
    Form("DoRA experts", {"use_dora": True}),
    Form("experts with biases", {"bias": "lora_only"}, "qwen2"),
    Form("experts on GPT-2", {}, "gpt2"),
    Form("--portable of any of ranks, rslora and patterns", MIXED_UP, portable=True),
    Form("--portable on GPT-2", {"use_rslora": True}, "gpt2", portable=True),
    Form("--mixture", MIXED_UP, mixed=True),
    Form("--mixture with biases", {"bias": "lora_only"}, "qwen2", mixed=True),
    Form("--mixture on GPT-2", {}, "gpt2", mixed=True),
)


class Exported(NamedTuple):
    """A form, written."""

    base: PreTrainedModel
    model: DyLoRA_MoE
    folders: list[Path]
    mixed: bool


def write(form: Form, folder: Path) -> Exported:
    """A random mixture of three experts on a tiny base, exported in a form."""
    family = FAMILIES[form.family]
    config = getattr(transformers, family.config_class)(
        **(family.sizes | {"initializer_range": 0.1, "use_cache": False})
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        base = transformers.AutoModelForCausalLM.from_config(config).eval()
    settings = {"r": 3, "lora_alpha": 5, "num_experts": 3} | form.settings
    model = DyLoRA_MoE.from_base(copy.deepcopy(base), MoELoraConfig(**settings)).eval()
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_expert_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=draw))
            if name.endswith("lora_A"):
                parameter[:, 0] *= 4  # a leading direction, which Arrow's few steps find exactly
    if form.mixed:
        folders = [export_mixture(model, folder / "mixture", WEIGHTS)]
    else:
        folders = export_peft(model, folder, portable=form.portable)
    return Exported(base, model, folders, form.mixed)


# What a mixture of adapters computes, written from the formula alone


def by_hand(
    base: PreTrainedModel,
    adapters: list[PeftAdapter],
    gates: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """Logits of y = W x + Σ_e g_e (W_e - W) x; gates(path, x [B, S, D]) -> [B, S, E]."""
    model, handles = copy.deepcopy(base), []
    for path in adapters[0].weights:
        module: Any = model.get_submodule(path)
        weight = weight_OD(module).detach()
        changes = [_change(adapter, path, weight) for adapter in adapters]
        bias = module.bias
        shifts = [
            adapter.biases[path] - bias if path in adapter.biases else None for adapter in adapters
        ]

        def add(module: Any, args: Any, output: Tensor, path=path, changes=changes, shifts=shifts):
            g = gates(path, args[0])
            for expert, (change, shift) in enumerate(zip(changes, shifts, strict=True)):
                output = output + g[..., expert, None] * F.linear(args[0], change, shift)
            return output

        handles.append(module.register_forward_hook(add))
    with torch.no_grad():
        return model(TOKENS).logits


def _change(adapter: PeftAdapter, path: str, weight: Tensor) -> Tensor:
    A, B = adapter.weights[path]
    merged = weight + scaling_of(adapter.config, path) * B @ A
    if adapter.magnitudes:
        merged = adapter.magnitudes[path][:, None] * merged / merged.norm(dim=1, keepdim=True)
    return merged - weight


def arrow_gates(adapters: list[PeftAdapter]) -> Callable[[str, Tensor], Tensor]:
    """Softmax over the K largest |x·v_e|, v_e the first right singular vector of B_e A_e."""

    def gates(path: str, x: Tensor) -> Tensor:
        products = [adapter.weights[path][1] @ adapter.weights[path][0] for adapter in adapters]
        leading = torch.stack([torch.linalg.svd(M).Vh[0] for M in products])
        likeness = (x @ leading.T).abs() / TEMPERATURE
        least = likeness.topk(min(TOP_K, len(adapters)), dim=-1).values[..., -1:]
        return likeness.masked_fill(likeness < least, -torch.inf).softmax(-1)

    return gates


# The readers: what they give, and what they should


def read_by_peft(exported: Exported) -> Tensor:
    model = PeftModel.from_pretrained(copy.deepcopy(exported.base), exported.folders[0]).eval()
    return model(TOKENS).logits


def read_by_transformers(exported: Exported) -> Tensor:
    model = copy.deepcopy(exported.base)
    model.load_adapter(str(exported.folders[0]))
    return model.eval()(TOKENS).logits


def read_by_arrow(exported: Exported) -> Tensor:
    names = [str(folder) for folder in exported.folders]
    settings = ArrowConfig(top_k=min(TOP_K, len(names)), router_temperature=TEMPERATURE, rng_seed=1)
    return create_arrow_model(copy.deepcopy(exported.base), names, settings).eval()(TOKENS).logits


def read_by_xlora(exported: Exported) -> Tensor:
    """With a classifier of zeros, so that its softmax is uniform."""
    names = {str(place): str(folder) for place, folder in enumerate(exported.folders)}
    width = exported.base.config.hidden_size
    settings = XLoraConfig(task_type="CAUSAL_LM", hidden_size=width, adapters=names)
    model: Any = get_peft_model(copy.deepcopy(exported.base), settings).eval()
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        parameter.data.zero_()
    return model(TOKENS).logits


def of_our_own(exported: Exported) -> Tensor:
    """Our mixture, routed to the first folder's expert or by WEIGHTS."""
    weights = torch.tensor(WEIGHTS if exported.mixed else (1.0, 0.0, 0.0))
    return exported.model(TOKENS, routing_weights=weights.expand(len(TOKENS), -1)).logits


def by_arrows_formula(exported: Exported) -> Tensor:
    adapters = [read_adapter(folder) for folder in exported.folders]
    return by_hand(exported.base, adapters, arrow_gates(adapters))


def evenly_mixed(exported: Exported) -> Tensor:
    if exported.mixed:
        return of_our_own(exported)
    even = torch.full((len(TOKENS), len(exported.folders)), 1 / len(exported.folders))
    return exported.model(TOKENS, routing_weights=even).logits


RUN: Mapping[str, tuple[Callable[[Exported], Tensor], Callable[[Exported], Tensor]]] = {
    "peft": (read_by_peft, of_our_own),
    "transformers": (read_by_transformers, of_our_own),
    "Arrow": (read_by_arrow, by_arrows_formula),
    "X-LoRA": (read_by_xlora, evenly_mixed),
}


class Verdict(NamedTuple):
    """A cell of the table, and why."""

    word: str  # yes, wrong or refuses
    why: str = ""


def verdicts(form: Form) -> dict[str, Verdict]:
    """What each reader makes of a form."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = write(form, Path(folder))
        found = {name: _run(*pair, exported) for name, pair in RUN.items()}
        said = [
            complaint
            for place in exported.folders
            for complaint in find_incompatibilities(
                read_json(place / CONFIG_FILE), read_tensors(place / WEIGHTS_FILE)
            )
        ]
    return found | {name: _rule(name, said) for name in READERS}


@torch.no_grad()
def _run(
    reader: Callable[[Exported], Tensor], expect: Callable[[Exported], Tensor], exported: Exported
) -> Verdict:
    expected = expect(exported)
    moved = (expected - exported.base(TOKENS).logits).abs().max()
    assert moved > 0.1, "an adapter without effect proves nothing"
    try:
        got = reader(exported)
    except (ValueError, RuntimeError) as error:  # what peft 0.21 raises for what it cannot read
        return Verdict("refuses", str(error))
    off = float((got - expected).abs().max())
    return Verdict("yes" if off < TOLERANCE else "wrong", f"{off:.2g}")


def _rule(name: str, said: list[Incompatibility]) -> Verdict:
    for kind, word in (("refuses", "refuses"), ("misreads", "wrong")):
        for complaint in said:
            if complaint.reader == name and complaint.kind == kind:
                return Verdict(word, complaint.what)
    return Verdict("yes")


PROSE_BEFORE = """# Taking experts elsewhere

| form | command | what it is |
|---|---|---|
| experts | `run.py export --checkpoint D --out O` | each expert as the checkpoint has it, in PEFT's own terms |
| portable | `run.py export --checkpoint D --out O --portable` | the scale inside B, `lora_alpha` = `r`, one rank for all |
| mixture | `run.py export --checkpoint D --out O --mixture --weights 0.5,0.3,0.2` | a mixture of constant weights as one LoRA of rank Σ r |
| merged | `run.py export --checkpoint D --out O --merge --expert 1` | a plain transformers model, its tokenizer beside it |

`--weights` takes one number an expert, or `measured` with `--text FILE`: the mean gates over the
tokens of a text, a row for each site, as every projection has an A and B of its own. Routing that
depends on the token cannot be exported as one adapter; with `--text` the command says what freezing
it costs on that text (of rows with `instruction` and `output`, on the answers), as the KL divergence
of the static mixture from the routed one and as the difference of their losses. `--merge` takes an expert or weights likewise, adds them up in float32
and rounds once; a quantised base needs `--dequantize`. After each export the command says what
vLLM, SGLang and llama.cpp make of it (`dylora/integrations/compatibility.py`), and
`run.py info --checkpoint O` says what a folder is. `O` is an absent or empty folder; `--overwrite`
replaces all of an earlier export, and nothing replaces a checkpoint.

In Python: `dylora.export_peft(model, folder, expert="all", portable=False)`,
`dylora.export_mixture(model, folder, weights)` and `model.merge_and_unload(expert=1)`.

## Who reads what

*yes*: the logits agree with ours to 1e-5. *refuses*: an error. *wrong*: it loads, and computes
something else without an error. The first four columns are run (peft 0.21.2, transformers 5.23), on
tiny random models of the Llama, Qwen2 (biases) and GPT-2 (Conv1D) families; peft's Arrow is held to
its formula, and its X-LoRA with a uniform classifier to our uniform routing. The last three follow
the rules in `dylora/integrations/compatibility.py`, which were read in those projects' sources. Written by
`python tests/helpers/exports.py`; a test runs it again.
"""  # noqa: E501
PROSE_AFTER = """
- transformers' `load_adapter` looks for DoRA's magnitudes under another name than peft writes, and
  reports them missing; peft's Arrow leaves them out.
- Arrow wants one rank, X-LoRA and Arrow one set of biases. For GPT-2 both look for other names.
- llama.cpp takes alpha over the rank of each tensor, vLLM and SGLang one scale for all of an
  adapter; of rslora only vLLM knows. Its converter transposes A and B of a Conv1D like the weights.
- vLLM takes ranks up to 512, and wants `--max-lora-rank` for more than 16. Its GPT-2 takes no LoRA,
  and SGLang knows no projection of the name `c_attn`. Which other models take LoRA stands in their
  own lists.
- A merged folder is an ordinary model: whatever reads its base reads it.
- `base_model_name_or_path` is what the checkpoint was trained on. The embedded `tiny-code-llama` is
  no name that others could find: give them the model, or export with `--base_name FOLDER`.
"""


def document() -> str:
    """The text of docs/export.md."""
    readers = [*RUN, *READERS]
    lines = [PROSE_BEFORE, f"| form | {' | '.join(readers)} |", "|" + "---|" * (1 + len(readers))]
    for form in FORMS:
        found = verdicts(form)
        lines.append(f"| {form.title} | {' | '.join(found[name].word for name in readers)} |")
    return "\n".join(lines) + "\n" + PROSE_AFTER


if __name__ == "__main__":
    for form in FORMS:
        for name, verdict in verdicts(form).items():
            print(f"{form.title}, {name}: {verdict.word} ({verdict.why[:120]})", file=sys.stderr)
    print(document(), end="")
