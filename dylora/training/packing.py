"""Whether a base keeps packed sequences apart, asked of the base itself."""

import torch

from dylora.data.packing import collate_packed
from dylora.kernels.common import evaluation_mode
from dylora.model import DyLoRA_MoE

_LENGTHS = ((5, 3, 4), (7,), (2, 6))  # of the sequences of each row
_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit
_OF_HALVES = 0.1


def is_flash(model: DyLoRA_MoE) -> bool:
    """Whether packed sequences have to lie in one row."""
    return "flash" in str(getattr(model.base.config, "_attn_implementation", ""))


@torch.no_grad()
def require_packing(model: DyLoRA_MoE) -> None:
    """Raises ValueError where a sequence's logits change with what it is packed with.

    So it is for states that pass from token to token (Mamba, linear attention), for position
    biases that take no position ids (ALiBi), and for masks that the base makes in its own way.
    """
    vocabulary = model.base.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    rows = [
        [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in lengths]
        for lengths in _LENGTHS
    ]
    if is_flash(model):
        rows = [[ids for row in rows for ids in row]]
    examples = [[{"input_ids": ids, "labels": ids} for ids in row] for row in rows]
    packed = collate_packed(examples, 0)
    inputs = {name: packed[name].to(model.device) for name in ("input_ids", "position_ids")}
    worst = scale = 0.0
    with evaluation_mode(model), model.disable_adapters():
        try:
            together = model.base(**inputs, use_cache=False).logits
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(_refusal(model, f"cannot be told apart: {error}")) from error
        for row, logits in zip(rows, together, strict=True):
            begin = 0
            for ids in row:
                one = torch.tensor([ids], device=model.device)
                alone = model.base(input_ids=one, use_cache=False).logits[0].float()
                change = (logits[begin : begin + len(ids)].float() - alone).abs().max()
                worst, scale = max(worst, float(change)), max(scale, float(alone.abs().max()))
                begin += len(ids)
    if not worst <= _DIFFERENCE.get(model.base.dtype, _OF_HALVES) * scale:
        raise ValueError(_refusal(model, f"see each other: logits change by {worst:.2g}"))


def _refusal(model: DyLoRA_MoE, why: str) -> str:
    kind = model.base.config.model_type
    return f"data.packing is true, but sequences packed for a {kind} {why}; set it false"
