"""`run.py validate`: does a checkpoint compute what it should, on the machine at hand?

Every check compares two ways to the same numbers. Their worst difference and its tolerance are one
row of a table; time and memory of one pass against N passes follow it.

Shape letters: B batch, S sequence, T real tokens of a batch in row order, N sites, E experts,
D input width, O output width, r rank, V vocabulary.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from dylora.bases import choose_device, load_base, load_tokenizer
from dylora.dora import weight_OD
from dylora.evaluation.cost import Cost, describe_cost, measure_cost, n_passes, one_hot
from dylora.model import DyLoRA_MoE
from dylora.model_files import ADAPTERS, expert_adapter
from dylora.storage.checkpoint import read_description, verify
from dylora.storage.description import named_base
from dylora.storage.peft_format import PeftAdapter, read_adapter, scaling_of

# Differences of logits are relative to the largest logit, and two orders of the same sums always
# differ. How much depends on the precision (a unit of rounding is 1.2e-7, 7.8e-3 or 9.8e-4) and on
# how the base amplifies it, so that is measured (`rounding_of`), and a tolerance is so many times
# as much. On 20 bases of 19 families sound checkpoints differed by 0.6 to 4.5 of it in float32,
# where long sums are rounded as they grow, and by 0.4 to 1.7 in half precision, where sums are kept
# in float32. One number per precision would be too strict for some bases or blind for others.
# An exact claim has the tolerance 0 in any precision.
ROOM = {"float32": 16.0, "bfloat16": 3.0, "float16": 3.0}
# Where two experts tie, rounding may choose the other one, and the gates jump. That is no fault if
# it is rare, if the probabilities agree, and if the logits agree once both ways have equal gates.
TIED_SHARE = 0.05  # of all decisions, at most
TIED_DISTANCE = 0.05  # of probabilities, and the least that counts as a jump of a gate
SEED = 0
MIN_TOKENS = 4
SNIPPET = '''def mean(values):
    """The arithmetic mean of a list of numbers; None when it is empty."""
    if not values:
        return None
    return sum(values) / len(values)


class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
'''


class Check(NamedTuple):
    """One row of the table."""

    name: str
    compared: str
    worst: float  # largest difference found
    tolerance: float | None  # None: reported, not judged

    @property
    def ok(self) -> bool | None:
        """None where nothing is judged; NaN is a failure."""
        return None if self.tolerance is None else self.worst <= self.tolerance


class Report(NamedTuple):
    """All that `validate_checkpoint` found."""

    checks: list[Check]
    tolerance: float | None  # of relative differences, for this base in this precision
    effect: float | None  # how far the adapters move the logits, relative to the largest
    cost: Cost | None  # all are None where numbers were not finite, so nothing could be compared

    @property
    def passed(self) -> bool:
        return all(check.ok is not False for check in self.checks)


class Pass(NamedTuple):
    """What one way through the model gave for every real token."""

    logits: Tensor  # [T, V] float32
    gates: Tensor  # [T, N, E]
    probabilities: Tensor  # [T, N, E]


def validate_checkpoint(
    checkpoint: str,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    tokens: int = 64,
    out: str | None = None,
) -> Report:
    """Check a checkpoint, print the table, and return what was found.

    Args:
        checkpoint: a folder written by training or `save_pretrained`.
        base: the base by name; by default the one the checkpoint names.
        dtype: precision of the base.
        tokens: length of the texts: two of random tokens and, where a tokenizer loads, one of code.
        out: file that gets the report as JSON.

    Raises ValueError or FileNotFoundError for what a user got wrong: a folder that is not whole
    (damaged files are found before anything is loaded), a base that does not load or fit.
    """
    folder = Path(checkpoint)
    if dtype not in ROOM:
        raise ValueError(f"--dtype is {dtype!r}, but must be one of {', '.join(ROOM)}")
    if tokens < MIN_TOKENS:
        raise ValueError(f"--tokens is {tokens}, but must be at least {MIN_TOKENS}")
    if out is not None and (not Path(out).parent.is_dir() or Path(out).is_dir()):
        raise ValueError(f"--out is {out!r}, but must be a file in a folder that exists")
    description = read_description(folder)
    kept = description["base_model_name_or_path"]
    name = base or named_base(folder, description)
    revision = description["base_revision"] if name == kept else None
    try:
        place = choose_device(device)
    except ValueError as error:
        reason = str(error.__cause__ or error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"--device {device} cannot be used ({reason})") from error
    frozen = load_base(
        name,
        revision=revision,
        dtype=getattr(torch, dtype),
        device=place,
        quantization=description["quantization"],
    )
    longest = getattr(frozen.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(f"--tokens is {tokens}, but the base takes at most {longest}")
    ids, texts = sample_texts(frozen, name, revision, tokens)
    before = base_logits(frozen, ids)  # what the base says before anything is added to it
    model = DyLoRA_MoE.from_pretrained(folder, frozen).eval()
    experts, sites = len(model.experts.live), len(model.site_names)
    print(
        f"{folder} on {name}: {dtype}, {ids.device.type}, {experts} experts, {sites} sites; "
        f"{texts}, {tokens} tokens each"
    )
    report = validate_model(model, ids, before, folder, ROOM[dtype])
    print(format_report(report))
    if out is not None:
        about = {
            "checkpoint": str(folder),
            "base": name,
            "dtype": dtype,
            "device": str(ids.device),
            "torch": torch.__version__,
            "texts": list(ids.shape),
        }
        Path(out).write_text(json.dumps(about | as_json(report), indent=2) + "\n")
    return report


@torch.no_grad()
def validate_model(
    model: DyLoRA_MoE, ids: Tensor, before: Tensor, folder: Path, room: float
) -> Report:
    """All checks of a loaded mixture, which is unloaded at the end.

    ids [B, S]; before [B, S, V]: logits of the base before the adapters were added; room: how many
    times what rounding does is tolerated.
    """
    loaded = check_loaded(model, folder)
    first = full_pass(model, ids)
    finite = check_finite(model, first)
    if not finite.ok:  # NaN differs from everything, and says nothing of the cause
        return Report([loaded, finite, check_manifest(folder)], None, None, None)
    tolerance = room * rounding_of(model, ids)
    checks = [
        check_folded(model, ids, first, tolerance),
        check_one_hot(model, ids, tolerance),
        check_n_passes(model, ids, tolerance),
        *report_soft(model, ids),
        check_decoding(model, ids, first, tolerance),
        check_causality(model, ids),
        check_padding(model, ids, tolerance),
        check_batches(model, ids, first, tolerance),
    ]
    cost = measure_cost(model, ids)
    effect = relative_difference(first.logits, before.float().flatten(0, 1))
    checks += [check_disabled(model, ids, before), loaded, finite, check_manifest(folder)]
    return Report(checks, tolerance, effect, cost)


# Texts


def sample_texts(
    base: PreTrainedModel, name: str, revision: str | None, length: int
) -> tuple[Tensor, str]:
    """ids [B, S], the same at every run, and what they are: random tokens, and code if possible."""
    embedding = base.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    draw = torch.Generator().manual_seed(SEED)
    rows = torch.randint(embedding.num_embeddings, (2, length), generator=draw)
    texts = "2 texts of random tokens and 1 of code"
    try:
        code: Any = load_tokenizer(name, revision)(SNIPPET)["input_ids"]
    except ValueError:
        code = []
    if len(code) >= MIN_TOKENS and max(code) < embedding.num_embeddings:
        repeated = (code * math.ceil(length / len(code)))[:length]
        rows = torch.cat([rows, torch.tensor([repeated])])
    else:
        texts = "2 texts of random tokens (no tokenizer of this base loads)"
    return rows.to(embedding.weight.device), texts


# Ways through the model


@torch.no_grad()
def base_logits(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of a base called as the mixture calls it."""
    return base(input_ids=ids, attention_mask=None, use_cache=False).logits


def full_pass(model: DyLoRA_MoE, ids: Tensor, gates: Tensor | None = None) -> Pass:
    """One pass over ids [B, S]; with gates [B, S, N, E] instead of the routers' own."""
    return masked_pass(model, ids, None, gates)


def masked_pass(
    model: DyLoRA_MoE, ids: Tensor, mask: Tensor | None, gates: Tensor | None = None
) -> Pass:
    """One pass over ids [B, S]; of its outcome, the tokens where mask [B, S] is 1."""
    options = {}
    if mask is not None and "position_ids" in signature(model.base.forward).parameters:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    output = model(ids, mask, routing_weights=gates, **options)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    routing = output.routing
    assert routing is not None
    return Pass(output.logits[real].float(), routing.gates[real], routing.probabilities[real])


def loop_logits(
    model: DyLoRA_MoE, ids: Tensor, gates: Tensor, experts: Iterable[int] | None = None
) -> Tensor:
    """Logits [B, S, V] from the formula, one expert and one product after another.

        y = base(x) + Σ_e g_e u_e(x),    u_e(x) = s_e B_e A_e x
        with DoRA u_e(x) = c ∘ (s_e B_e A_e x) + (c - 1) ∘ W x,    c = magnitude / ‖W + s_e B_e A_e‖
        with trained biases u_e is larger by bias_e - bias

    It shares no code with the adapters, which are disabled, and works with what each expert's files
    hold. gates [B, S, N, E]; experts: those in the sum, by default all.
    """
    chosen = model.experts.live if experts is None else experts
    parts = {expert: expert_adapter(model, expert) for expert in chosen}
    sites = model.site_names

    def hook(path: str) -> Callable[..., Tensor]:
        site = sites.index(path.rpartition(".")[0])

        def add_experts(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            x = args[0].float()  # [B, S, D]; the formula's own sums are not to be rounded
            update = torch.zeros_like(output, dtype=torch.float32)  # [B, S, O]
            for expert, adapter in parts.items():
                A, B = (matrix.float() for matrix in adapter.weights[path])  # [r, D], [O, r]
                scale = scaling_of(adapter.config, path)
                own = scale * (x @ A.T @ B.T)
                if path in adapter.magnitudes:
                    W_OD = weight_OD(module).float()
                    c = adapter.magnitudes[path] / (W_OD + scale * B @ A).norm(dim=1)
                    own = c * own + (c - 1) * (x @ W_OD.T)
                if path in adapter.biases:
                    own = own + shift_of(adapter, path, module)
                update += gates[:, :, site, expert, None].to(x) * own  # g is [B, S, 1]
            return output + update.to(output.dtype)

        return add_experts

    handles = [
        model.base.get_submodule(path).register_forward_hook(hook(path))
        for path in model.injection.adapters
    ]
    common = next(iter(parts.values()))  # biases outside the projections are the same for all
    for path in common.biases.keys() - common.weights.keys():
        module = model.base.get_submodule(path)
        shift = shift_of(common, path, module)

        def add_shift(
            module: nn.Module, args: Any, output: Tensor, shift: Tensor = shift
        ) -> Tensor:
            return output + shift.to(output.dtype)

        handles.append(module.register_forward_hook(add_shift))
    try:
        with model.disable_adapters():
            return model(ids).logits
    finally:
        for handle in handles:
            handle.remove()


def shift_of(adapter: PeftAdapter, path: str, module: nn.Module) -> Tensor:
    """What a trained bias adds to the base's, [O]."""
    bias: Any = module.bias
    return adapter.biases[path].to(bias.device) - bias.float()


def rounding_of(model: DyLoRA_MoE, ids: Tensor) -> float:
    """How far one unit of rounding, up or down, at every adapted projection moves the logits.

    Relative to the largest logit. Measured with the adapters off: a faulty mixture must not widen
    its own tolerance.
    """
    draw = torch.Generator().manual_seed(SEED)

    def add_rounding(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        sign = 2 * torch.randint(2, output.shape, generator=draw).to(output.device) - 1
        return (output.float() * (1 + torch.finfo(output.dtype).eps * sign)).to(output.dtype)

    paths = model.injection.adapters
    hooks = [model.base.get_submodule(p).register_forward_hook(add_rounding) for p in paths]
    try:
        with model.disable_adapters():
            rounded = model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()
    with model.disable_adapters():
        return relative_difference(rounded, model(ids).logits)


# Checks


def check_folded(model: DyLoRA_MoE, ids: Tensor, first: Pass, tolerance: float) -> Check:
    """The one-pass mixture against the formula, with the gates that it really chose."""
    gates = first.gates.unflatten(0, ids.shape)  # [B, S, N, E]
    worst = relative_difference(first.logits, loop_logits(model, ids, gates).flatten(0, 1))
    return Check("folded = loop", "one pass, a loop over experts, same gates", worst, tolerance)


def check_one_hot(model: DyLoRA_MoE, ids: Tensor, tolerance: float) -> Check:
    """Every expert alone: as a one-hot mixture, and as the only LoRA there is."""
    ones = torch.ones(*ids.shape, len(model.site_names), len(model.experts), device=ids.device)
    worst = []
    for expert in model.experts.live:
        mixture = model(ids, routing_weights=one_hot(model, expert, len(ids), ids.device)).logits
        worst.append(relative_difference(mixture, loop_logits(model, ids, ones, [expert])))
    text = "one-hot weights, that expert's LoRA alone"
    return Check("one-hot = single expert", text, largest(worst), tolerance)


def check_n_passes(model: DyLoRA_MoE, ids: Tensor, tolerance: float) -> Check:
    """One text under E one-hot weights: E rows of one pass, and E passes mixed by the weights."""
    weights_EE = torch.eye(len(model.experts), device=ids.device)[model.experts.live]
    text_ES = ids[-1:].expand(len(weights_EE), -1)
    single = model(text_ES, routing_weights=weights_EE).logits
    worst = relative_difference(single, n_passes(model, text_ES, weights_EE[:, None]))
    return Check("one pass = N passes", "one-hot weights, another in every row", worst, tolerance)


def report_soft(model: DyLoRA_MoE, ids: Tensor) -> list[Check]:
    """Mixing updates is another model than mixing logits: how far apart they are is no fault."""
    gates = model.get_routing_weights(ids)  # [B, S, N, E]
    weights_BSE = gates.mean(2)
    single = model(ids, routing_weights=weights_BSE).logits.float()
    mixed = n_passes(model, ids, weights_BSE)
    p, q = single.log_softmax(-1), mixed.log_softmax(-1)
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    return [
        Check("one pass ~ N passes", "soft weights: mean KL in nats", float(divergence), None),
        Check("", "soft weights: largest difference of logits", largest_gap(single, mixed), None),
    ]


def check_decoding(model: DyLoRA_MoE, ids: Tensor, first: Pass, tolerance: float) -> Check:
    """One token at a time with the KV cache, as generation runs, against the whole text at once."""

    def step_by_step(gates_T: Tensor | None) -> Pass:
        gates = None if gates_T is None else gates_T.unflatten(0, ids.shape)  # [B, S, N, E]
        cache = DynamicCache(config=model.base.config)
        steps = []
        for t in range(ids.shape[1]):
            output = model(
                ids[:, t : t + 1],
                routing_weights=None if gates is None else gates[:, t : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            routing = output.routing
            assert routing is not None
            steps.append((output.logits, routing.gates, routing.probabilities))
        logits, chosen, probabilities = (
            torch.cat(parts, 1).flatten(0, 1) for parts in zip(*steps, strict=True)
        )
        return Pass(logits.float(), chosen, probabilities)

    worst, ties = compare_routed(first, step_by_step, tolerance)
    return Check(
        "decode = prefill", f"token by token with a cache, one pass{ties}", worst, tolerance
    )


def check_causality(model: DyLoRA_MoE, ids: Tensor) -> Check:
    """Another token at t; exact, because the sums of earlier tokens are the same ones."""
    t = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, t] = (changed[:, t] - 1).abs()  # 0 becomes 1: any other token that there is
    worst = largest_gap(model(ids).logits[:, :t], model(changed).logits[:, :t])
    return Check("causality", f"logits before token {t}, when it changes", worst, 0.0)


def check_padding(model: DyLoRA_MoE, ids: Tensor, tolerance: float) -> Check:
    """Texts of unequal length in one batch, padded behind and in front."""
    length = ids.shape[1]
    ends = [length - row * (length // len(ids)) for row in range(len(ids))]
    right, left = torch.zeros_like(ids), torch.zeros_like(ids)
    right_mask, left_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, end in enumerate(ends):
        right[row, :end], right_mask[row, :end] = ids[row, :end], 1
        left[row, length - end :], left_mask[row, length - end :] = ids[row, :end], 1

    def in_front(gates_T: Tensor | None) -> Pass:
        gates = None
        if gates_T is not None:
            gates = gates_T.new_zeros(*ids.shape, *gates_T.shape[1:])  # [B, S, N, E]
            gates[left_mask.bool()] = gates_T
        return masked_pass(model, left, left_mask, gates)

    behind = masked_pass(model, right, right_mask)
    worst, ties = compare_routed(behind, in_front, tolerance)
    text = f"texts of {', '.join(map(str, ends))} tokens{ties}"
    return Check("left padding = right padding", text, worst, tolerance)


def check_batches(model: DyLoRA_MoE, ids: Tensor, first: Pass, tolerance: float) -> Check:
    """What a text gives does not depend on the texts beside it."""

    def row_by_row(gates_T: Tensor | None) -> Pass:
        gates = None if gates_T is None else gates_T.unflatten(0, ids.shape)
        rows = [
            full_pass(model, ids[row : row + 1], None if gates is None else gates[row : row + 1])
            for row in range(len(ids))
        ]
        return Pass(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    worst, ties = compare_routed(first, row_by_row, tolerance)
    text = f"a batch of {len(ids)}, {len(ids)} batches of 1{ties}"
    return Check("batch = its rows", text, worst, tolerance)


def check_disabled(model: DyLoRA_MoE, ids: Tensor, before: Tensor) -> Check:
    """Exact: disabled, unloaded and never injected run the same products. Unloads the model."""
    with model.disable_adapters():
        disabled = model(ids).logits
    after = base_logits(model.unload(), ids)
    worst = largest([largest_gap(disabled, before), largest_gap(disabled, after)])
    return Check("disabled = base", "adapters off, never added, taken off", worst, 0.0)


def check_loaded(model: DyLoRA_MoE, folder: Path) -> Check:
    """What the loop above takes from memory is what the files hold."""
    worst = []
    for expert in model.experts.live:
        on_disk = read_adapter(folder / ADAPTERS / f"expert_{expert}")
        for path, pair in model.expert_weights(expert).items():
            for loaded, kept in zip(pair, on_disk.weights[path], strict=True):
                worst.append(largest_gap(loaded.cpu(), kept.to(loaded.dtype)))
    return Check("experts = their files", "weights in memory, on disk", largest(worst), 0.0)


def check_finite(model: DyLoRA_MoE, first: Pass) -> Check:
    """Parameters of base, experts and routers, and what a pass makes of them (half overflows)."""
    values = [*model.base.parameters(), *first]
    bad = sum(int((~value.isfinite()).sum()) for value in values)
    text = "parameters, logits and gates that are not"
    return Check("all is finite", text, float(bad), 0.0)


def check_manifest(folder: Path) -> Check:
    """Loading verifies it as well; here it shows that the files are still the ones validated."""
    try:
        verify(folder)
    except ValueError as error:
        return Check("manifest", str(error), 1.0, 0.0)
    return Check("manifest", "files that are not as they were written", 0.0, 0.0)


def compare_routed(
    first: Pass, second: Callable[[Tensor | None], Pass], tolerance: float
) -> tuple[float, str]:
    """Worst relative difference of two ways that each route for themselves, and a word on ties.

    second: the other way, given the gates [T, N, E] to use or None.
    """
    free = second(None)
    worst = relative_difference(free.logits, first.logits)
    jumped_TN = (free.gates - first.gates).abs().amax(-1) > TIED_DISTANCE
    apart = largest_gap(free.probabilities, first.probabilities)
    explained = jumped_TN.any() and jumped_TN.float().mean() <= TIED_SHARE
    if worst <= tolerance or not (explained and apart <= TIED_DISTANCE):
        return worst, ""
    held = second(first.gates)
    ties = f" ({int(jumped_TN.sum())} of {jumped_TN.numel()} decisions tie)"
    return relative_difference(held.logits, first.logits), ties


def largest_gap(a: Tensor, b: Tensor) -> float:
    """max |a - b|; NaN where either holds one, 0 where both hold the same infinity."""
    return float((a - b).float().abs().masked_fill(a == b, 0.0).max())


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|, in float32."""
    size = float(b.float().abs().max())
    return largest_gap(a.float(), b.float()) / size if size else largest_gap(a, b)


def largest(values: Iterable[float]) -> float:
    """The maximum, NaN if any is: Python's own `max` would pass over it."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


# What is shown


def format_report(report: Report) -> str:
    """The table, then time and memory, then the verdict."""
    wide = [
        max(len(text) for text in column)
        for column in zip(*((check.name, check.compared) for check in report.checks), strict=True)
    ]
    lines = [f"{'check':{wide[0]}}  {'compared':{wide[1]}}  {'worst':>8}  {'tolerance':>9}"]
    lines.append("-" * (len(lines[0]) + 10))
    verdicts = {True: "ok", False: "FAILED", None: "reported"}
    for check in report.checks:
        tolerance = "-" if check.tolerance is None else f"{check.tolerance:.1e}"
        lines.append(
            f"{check.name:{wide[0]}}  {check.compared:{wide[1]}}  {check.worst:8.1e}  "
            f"{'exact' if check.tolerance == 0 else tolerance:>9}  {verdicts[check.ok]}"
        )
    if report.tolerance is None or report.effect is None or report.cost is None:
        lines.append("the other checks compare numbers, so they need finite ones: not made")
    else:
        lines += _describe_effect(report.effect, report.tolerance) + describe_cost(report.cost)
    failed = [check.name for check in report.checks if check.ok is False]
    lines.append(f"FAILED: {', '.join(failed)}" if failed else "all checks passed")
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values; a NaN becomes null, which JSON has."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    checks = [
        check._asdict() | {"worst": number(check.worst), "ok": check.ok} for check in report.checks
    ]
    cost = report.cost
    return {
        "passed": report.passed,
        "checks": checks,
        "tolerance": report.tolerance,
        "effect": report.effect,
        "cost": cost and cost._asdict() | {"ratio": statistics.median(cost.ratios)},
    }


def _describe_effect(effect: float, tolerance: float) -> list[str]:
    lines = [
        "differences of logits are relative to the largest one, except exact and reported;",
        "the tolerance is a multiple of what rounding does to this base in this precision;",
        f"the adapters move the logits by {effect:.1e} of the largest one",
    ]
    if effect <= tolerance:
        lines.append("note: that is within the tolerance, so a wrong mixture would not be seen")
    return lines
