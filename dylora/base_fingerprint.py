"""What tells one base from another: sizes, and hashes of a few of its values."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_SAMPLED_TOKENS, _SAMPLED_OUTPUTS = 64, 8  # rows of the weights that are hashed


def fingerprint(base: PreTrainedModel, projections: list[str]) -> dict[str, Any]:
    """What tells a base from another one: sizes, and hashes of a few of its values.

    projections: paths of the adapted ones, of which the first and the last are hashed. Values are
    rounded to bfloat16 first, so that the precision in which a base is loaded does not matter.
    A part that cannot be read (packed, sharded or on no device) is None.
    """
    embedding: Any = base.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    tokens = len(weight) if weight is not None else 0
    rows = torch.linspace(0, max(tokens - 1, 0), _SAMPLED_TOKENS).long().unique()
    ends = [base.get_submodule(path).weight for path in (projections[0], projections[-1])]
    waves = [
        getattr(module, "original_inv_freq", module.inv_freq)
        for module in base.modules()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    config = base.config.get_text_config()
    return {
        "vocabulary": tokens,
        "layers": getattr(config, "num_hidden_layers", None),
        "width": getattr(config, "hidden_size", None),
        "dtype": str(base.dtype).removeprefix("torch."),
        "embedding": _hash([weight], rows),
        "projections": _hash(ends, torch.arange(_SAMPLED_OUTPUTS)),
        "rotary": _hash(waves[:1], None),
        "tokenizer": None,
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary: every token with its number."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(words).encode()).hexdigest()


def base_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What two fingerprints say of two bases, in words; empty where they may be the same.

    What either does not say is not compared. float16 has other roundings than bfloat16, so hashes
    are compared only where both bases are in float16, or neither.
    """
    sizes = ("vocabulary", "layers", "width")
    hashes = ("embedding", "projections", "rotary", "tokenizer")
    halves = [mark.get("dtype") == "float16" for mark in (ours, theirs)]
    if halves[0] != halves[1]:
        hashes = ("tokenizer",)
    found = []
    for key in (*sizes, *hashes):
        here, there = ours.get(key), theirs.get(key)
        if here is not None and there is not None and here != there:
            found.append(f"{key} {there}, here {here}" if key in sizes else f"another {key}")
    return found


def _hash(tensors: Iterable[Any], rows: Tensor | None) -> str | None:
    digest = hashlib.sha256()
    count = 0
    for tensor in tensors:
        plain = isinstance(tensor, Tensor) and type(tensor.data) is Tensor
        if not plain or not tensor.is_floating_point() or tensor.is_meta:
            return None
        chosen = tensor.detach()
        if rows is not None:
            chosen = chosen[rows[rows < len(tensor)].to(tensor.device)]
        digest.update(chosen.float().bfloat16().view(torch.int16).cpu().numpy().tobytes())
        count += 1
    return digest.hexdigest() if count else None
