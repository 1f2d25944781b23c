"""`run.py validate`: does a checkpoint compute what it should on this machine?

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

from dylora.base_models import choose_device, load_tokenizer, max_positions
from dylora.evaluation.loading import note
from dylora.evaluation.validate import checks, reference
from dylora.evaluation.validate.checks import Check
from dylora.evaluation.validate.cost import Cost, describe_cost, measure_cost
from dylora.model import DyLoRA_MoE
from dylora.storage.checkpoint import Checkpoint

# Tolerances as multiples of the base's own `rounding_noise`, relative to the largest logit. On 20
# bases of 19 families correct checkpoints differed by 0.6 to 4.5 times the noise in float32, where
# long sums are rounded as they grow, and by 0.4 to 1.7 times in half precision, where sums are kept
# in float32. An exact claim has the tolerance 0 in any precision.
ROOM = {"float32": 16.0, "bfloat16": 3.0, "float16": 3.0}
MIN_TOKENS = 4
SAMPLE_CODE = Path(__file__).parents[2] / "assets" / "validate" / "code.txt"


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

    base: its name, by default the one the checkpoint names; dtype: its precision; tokens: length of
    the texts; out: file that gets the report as JSON. Raises ValueError or FileNotFoundError for
    wrong options, a damaged folder, and a base that does not load or fit.
    """
    if tokens < MIN_TOKENS:
        raise ValueError(f"--tokens is {tokens}, but must be at least {MIN_TOKENS}")
    if out is not None and (not Path(out).parent.is_dir() or Path(out).is_dir()):
        raise ValueError(f"--out is {out!r}, but must be a file in a folder that exists")
    opened = Checkpoint.open(checkpoint, note)
    try:
        place = choose_device(device)
    except ValueError as error:
        reason = str(error.__cause__ or error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"--device {device} cannot be used ({reason})") from error
    spec = opened.base_spec(base, dtype=getattr(torch, dtype), device=place)
    frozen, folder = spec.load(), opened.path
    longest = max_positions(frozen.config)
    if longest is not None and tokens > longest:
        raise ValueError(f"--tokens is {tokens}, but the base takes at most {longest}")
    ids, texts = sample_texts(frozen, spec.name, spec.revision, tokens)
    before = reference.base_logits(frozen, ids)  # before anything is added to the base
    model = DyLoRA_MoE.from_pretrained(opened, frozen).eval()
    experts, sites = len(model.experts.live), len(model.site_names)
    print(
        f"{folder} on {spec.name}: {dtype}, {ids.device.type}, {experts} experts, {sites} sites; "
        f"{texts}, {tokens} tokens each"
    )
    report = validate_model(model, ids, before, opened, ROOM[dtype])
    print(format_report(report))
    if out is not None:
        about: dict[str, Any] = {"checkpoint": str(folder), "base": spec.name, "dtype": dtype}
        about |= {"device": str(ids.device), "torch": torch.__version__, "texts": list(ids.shape)}
        Path(out).write_text(json.dumps(about | as_json(report), indent=2) + "\n")
    return report


@torch.no_grad()
def validate_model(
    model: DyLoRA_MoE, ids: Tensor, before: Tensor, checkpoint: Checkpoint, room: float
) -> Report:
    """All checks of a loaded mixture, which is unloaded at the end.

    ids [B, S]; before [B, S, V]: the bare base's logits; room: tolerance by rounding noise.
    """
    loaded = checks.check_loaded(model, checkpoint)
    first = reference.full_pass(model, ids)
    finite = checks.check_finite(model, first)
    if not finite.ok:  # NaN would fail every comparison
        return Report([loaded, finite, checks.check_manifest(checkpoint)], None, None, None)
    tolerance = room * reference.rounding_noise(model, ids)
    found = [
        checks.check_folded(model, ids, first, tolerance),
        checks.check_one_hot(model, ids, tolerance),
        checks.check_n_passes(model, ids, tolerance),
        *checks.report_soft(model, ids),
        checks.check_decoding(model, ids, first, tolerance),
        checks.check_causality(model, ids),
        checks.check_padding(model, ids, tolerance),
        checks.check_batches(model, ids, first, tolerance),
    ]
    cost = measure_cost(model, ids)
    effect = reference.relative_difference(first.logits, before.float().flatten(0, 1))
    found += [checks.check_disabled(model, ids, before), loaded, finite]
    return Report([*found, checks.check_manifest(checkpoint)], tolerance, effect, cost)


def sample_texts(
    base: PreTrainedModel, name: str, revision: str | None, length: int
) -> tuple[Tensor, str]:
    """ids [B, S], the same at every run, and a description: random tokens, and code if possible."""
    embedding = base.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    draw = torch.Generator().manual_seed(reference.SEED)
    rows = torch.randint(embedding.num_embeddings, (2, length), generator=draw)
    texts = "2 texts of random tokens and 1 of code"
    try:
        code: Any = load_tokenizer(name, revision)(SAMPLE_CODE.read_text("utf-8"))["input_ids"]
    except ValueError:
        code = []
    if len(code) >= MIN_TOKENS and max(code) < embedding.num_embeddings:
        repeated = (code * math.ceil(length / len(code)))[:length]
        rows = torch.cat([rows, torch.tensor([repeated])])
    else:
        texts = "2 texts of random tokens (no tokenizer of this base loads)"
    return rows.to(embedding.weight.device), texts


def format_report(report: Report) -> str:
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
        lines += [
            "differences of logits are relative to the largest one, except exact and reported;",
            "the tolerance is a multiple of what rounding does to this base in this precision;",
            f"the adapters move the logits by {report.effect:.1e} of the largest one",
        ]
        if report.effect <= report.tolerance:
            lines.append("note: that is within the tolerance, so a wrong mixture would not be seen")
        lines += describe_cost(report.cost)
    failed = [check.name for check in report.checks if check.ok is False]
    lines.append(f"FAILED: {', '.join(failed)}" if failed else "all checks passed")
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values; a NaN becomes null, which JSON has."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    cost = report.cost
    return {
        "passed": report.passed,
        "checks": [c._asdict() | {"worst": number(c.worst), "ok": c.ok} for c in report.checks],
        "tolerance": report.tolerance,
        "effect": report.effect,
        "cost": cost and cost._asdict() | {"ratio": statistics.median(cost.ratios)},
    }
