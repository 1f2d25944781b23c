"""`run.py validate`: does a checkpoint compute what it should on this machine?

Every check (checks.py) computes the same numbers in two ways (reference.py). Their largest
difference and its tolerance are one row of a table; time and memory of one pass against N passes
(cost.py) follow it.

Shape letters: B batch, S sequence, V vocabulary.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora.base_models import BaseSpec, choose_device, load_tokenizer, max_positions
from dylora.evaluation.loading import note
from dylora.evaluation.validate.checks import (
    Check,
    check_batches,
    check_causality,
    check_decoding,
    check_disabled,
    check_finite,
    check_folded,
    check_loaded,
    check_manifest,
    check_n_passes,
    check_one_hot,
    check_padding,
    report_soft,
)
from dylora.evaluation.validate.cost import Cost, describe_cost, measure_cost
from dylora.evaluation.validate.reference import (
    SEED,
    base_logits,
    full_pass,
    relative_difference,
    rounding_noise,
)
from dylora.model import DyLoRA_MoE
from dylora.storage.checkpoint import Checkpoint

# Differences of logits are relative to the largest logit. Two orders of the same sums differ, and
# how much depends on the precision (a unit of rounding is 1.2e-7, 7.8e-3 or 9.8e-4) and on how the
# base amplifies it, so that noise is measured (`rounding_noise`), and a tolerance is a multiple of
# it. On 20 bases of 19 families correct checkpoints differed by 0.6 to 4.5 times the noise in
# float32, where long sums are rounded as they grow, and by 0.4 to 1.7 times in half precision,
# where sums are kept in float32. One tolerance per precision would be too strict for some bases and
# too lax for others. An exact claim has the tolerance 0 in any precision.
ROOM = {"float32": 16.0, "bfloat16": 3.0, "float16": 3.0}
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


class Report(NamedTuple):
    """The findings of `validate_checkpoint`."""

    checks: list[Check]
    tolerance: float | None  # of relative differences, for this base in this precision
    effect: float | None  # how far the adapters move the logits, relative to the largest
    cost: Cost | None  # all three are None where numbers were not finite, so nothing was compared

    @property
    def passed(self) -> bool:
        return all(check.ok is not False for check in self.checks)


def validate_checkpoint(
    checkpoint: str | Checkpoint,
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

    Raises ValueError or FileNotFoundError for wrong options, a damaged folder (found before
    anything is loaded), and a base that does not load or fit.
    """
    if dtype not in ROOM:
        raise ValueError(f"--dtype is {dtype!r}, but must be one of {', '.join(ROOM)}")
    if tokens < MIN_TOKENS:
        raise ValueError(f"--tokens is {tokens}, but must be at least {MIN_TOKENS}")
    if out is not None and (not Path(out).parent.is_dir() or Path(out).is_dir()):
        raise ValueError(f"--out is {out!r}, but must be a file in a folder that exists")
    opened = Checkpoint.open(checkpoint, note)
    spec = _base_of(opened, base, device, dtype)
    frozen, folder = spec.load(), opened.path
    longest = max_positions(frozen.config)
    if longest is not None and tokens > longest:
        raise ValueError(f"--tokens is {tokens}, but the base takes at most {longest}")
    ids, texts = sample_texts(frozen, spec.name, spec.revision, tokens)
    before = base_logits(frozen, ids)  # before anything is added to the base
    model = DyLoRA_MoE.from_pretrained(opened, frozen).eval()
    experts, sites = len(model.experts.live), len(model.site_names)
    print(
        f"{folder} on {spec.name}: {dtype}, {ids.device.type}, {experts} experts, {sites} sites; "
        f"{texts}, {tokens} tokens each"
    )
    report = validate_model(model, ids, before, opened, ROOM[dtype])
    print(format_report(report))
    if out is not None:
        about = {
            "checkpoint": str(folder),
            "base": spec.name,
            "dtype": dtype,
            "device": str(ids.device),
            "torch": torch.__version__,
            "texts": list(ids.shape),
        }
        Path(out).write_text(json.dumps(about | as_json(report), indent=2) + "\n")
    return report


def _base_of(checkpoint: Checkpoint, base: str | None, device: str, dtype: str) -> BaseSpec:
    try:
        place = choose_device(device)
    except ValueError as error:
        reason = str(error.__cause__ or error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"--device {device} cannot be used ({reason})") from error
    return checkpoint.base_spec(base, dtype=getattr(torch, dtype), device=place)


@torch.no_grad()
def validate_model(
    model: DyLoRA_MoE, ids: Tensor, before: Tensor, checkpoint: Checkpoint, room: float
) -> Report:
    """All checks of a loaded mixture, which is unloaded at the end.

    ids [B, S]; before [B, S, V]: logits of the base before the adapters were added; room: the
    tolerance as a multiple of the rounding noise.
    """
    loaded = check_loaded(model, checkpoint)
    first = full_pass(model, ids)
    finite = check_finite(model, first)
    if not finite.ok:  # NaN would fail every comparison
        return Report([loaded, finite, check_manifest(checkpoint)], None, None, None)
    tolerance = room * rounding_noise(model, ids)
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
    checks += [check_disabled(model, ids, before), loaded, finite, check_manifest(checkpoint)]
    return Report(checks, tolerance, effect, cost)


# Texts


def sample_texts(
    base: PreTrainedModel, name: str, revision: str | None, length: int
) -> tuple[Tensor, str]:
    """ids [B, S], the same at every run, and a description: random tokens, and code if possible."""
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


# Output


def format_report(report: Report) -> str:
    """The table, then time and memory, then the verdict."""
    name = max(len(check.name) for check in report.checks)
    compared = max(len(check.compared) for check in report.checks)
    lines = [f"{'check':{name}}  {'compared':{compared}}  {'worst':>8}  {'tolerance':>9}"]
    lines.append("-" * (len(lines[0]) + 10))
    verdicts = {True: "ok", False: "FAILED", None: "reported"}
    for check in report.checks:
        tolerance = "-" if check.tolerance is None else f"{check.tolerance:.1e}"
        lines.append(
            f"{check.name:{name}}  {check.compared:{compared}}  {check.worst:8.1e}  "
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
