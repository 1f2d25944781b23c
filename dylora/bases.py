"""Loading the frozen base and its tokenizer: from the hub, a folder, or the package itself."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

EMBEDDED_BASES = {"tiny-code-llama": Path(__file__).parent / "assets" / "tiny-code-llama"}


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The causal LM called `name`, frozen, in evaluation mode.

    Raises ValueError where it cannot be loaded, with what to do.
    """
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_base(name), revision=revision or "main", dtype=dtype, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load("model", name, error)) from error
    model.to(device=torch.device(device))  # type: ignore[call-arg] - transformers wraps `to`
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `name`. Raises ValueError where it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(resolve_base(name), revision=revision or "main")
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load("tokenizer", name, error)) from error


def resolve_base(name: str) -> str:
    """Embedded names become their folder; all others are transformers' business."""
    return str(EMBEDDED_BASES.get(name, name))


def choose_device(name: str) -> torch.device:
    """auto: cuda when there is one, else cpu. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"model.device is {name!r}, which torch does not know") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"model.device is {name!r}, but torch finds no CUDA device")
    return device


def _cannot_load(what: str, name: str, error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"cannot load the {what} {name!r} ({first_line}); give a hub name that you have access to, "
        f"a folder, or an embedded one: {', '.join(EMBEDDED_BASES)}"
    )
