"""Which tokens of a pass are the prompt's.

Shape letters: B batch, S sequence, D hidden width.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def bos_ids(config: Any) -> tuple[int, ...]:
    """The tokens that begin a text, of a transformers config."""
    bos = getattr(config.get_text_config(), "bos_token_id", None)
    return () if bos is None else tuple(bos) if isinstance(bos, (list, tuple)) else (bos,)


def padding_ids(config: Any) -> tuple[int, ...]:
    """What may fill up a text without a mask at its end; lm-evaluation-harness takes 0."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return (0,) if pad is None else (0, pad)


def prompt_mask(
    ids: Tensor,
    token_mask: Tensor | None,
    labels: Tensor | None,
    bos: Collection[int],
    padding: Collection[int] = (),
) -> Tensor:
    """1 on the tokens of each prompt, else 0, [B, S] in float32.

    Padding is not of it (without a mask a run of `padding` at the end), nor a BOS that begins the
    text (of embeddings nobody knows which is one), nor anything from the first label on. A row that
    would have none left is a prompt as a whole.

    ids: [B, S], or embeddings [B, S, D]; token_mask [B, S] or longer, of a cache as well: 0 on
    padding; labels [B, S], -100 where nothing is learned; bos, padding: ids.
    """
    length = ids.shape[1]
    real = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    if token_mask is not None:
        real = token_mask[:, -length:].to(ids.device) != 0
    elif ids.ndim == 2 and padding:
        ends = _is_one_of(ids, padding).flip(-1).cumprod(-1).flip(-1) > 0
        real = real & ~ends | ends.all(-1, keepdim=True)
    own = real
    if ids.ndim == 2 and bos:
        begins = real & (real.cumsum(-1) == 1)
        own = own & ~(begins & _is_one_of(ids, bos))
    if labels is not None:
        own = own & ((labels.to(ids.device) != -100).cumsum(-1) == 0)
    return torch.where(own.any(-1, keepdim=True), own, real).float()


def _is_one_of(ids: Tensor, tokens: Collection[int]) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        found = found | (ids == token)
    return found
