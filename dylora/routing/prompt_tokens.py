"""Which tokens of a pass are the prompt's.

Shape letters: B batch, S sequence, D hidden width.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def bos_ids(config: Any) -> tuple[int, ...]:
    """The tokens that begin a text, of a transformers config."""
    bos = getattr(config.get_text_config(), "bos_token_id", None)
    return () if bos is None else tuple(bos) if isinstance(bos, (list, tuple)) else (bos,)


class PromptTokens(NamedTuple):
    """What tells the tokens of a prompt from others."""

    bos: Collection[int] = ()  # ids that begin a text
    padding: Collection[int] = ()  # what may fill up a text without a mask at its end
    whole: bool = False  # the prompt goes on beyond the first label, to the end of its text

    @classmethod
    def of(cls, config: Any) -> "PromptTokens":
        """Of a transformers config; lm-evaluation-harness pads with 0."""
        pad = getattr(config.get_text_config(), "pad_token_id", None)
        return cls(bos_ids(config), (0,) if pad is None else (0, pad))

    def mask(
        self,
        ids: Tensor,
        token_mask: Tensor | None,
        labels: Tensor | None,
        sequences: Tensor | None = None,
    ) -> Tensor:
        """1 on the tokens of each prompt, else 0, [B, S] in float32.

        Padding is not of it (without a mask a run of `padding` at the end), nor a BOS that begins
        the text (of embeddings nobody knows which is one), nor anything from the first label on. A
        row that would have none left is a prompt as a whole.

        ids: [B, S], or embeddings [B, S, D]; token_mask [B, S] or longer, of a cache as well: 0 on
        padding; labels [B, S], -100 where nothing is learned; sequences [B, S] of packed rows: what
        is said of a row holds for each of them.
        """
        length = ids.shape[1]
        real = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
        if token_mask is not None:
            real = token_mask[:, -length:].to(ids.device) != 0
        elif ids.ndim == 2 and self.padding:
            ends = _is_one_of(ids, self.padding).flip(-1).cumprod(-1).flip(-1) > 0
            real = real & ~ends | ends.all(-1, keepdim=True)
        own = real
        if ids.ndim == 2 and self.bos:
            begins = real & (since_begin(real.cumsum(-1), real.long(), sequences) == 1)
            own = own & ~(begins & _is_one_of(ids, self.bos))
        if labels is not None and not self.whole:
            learned = (labels.to(ids.device) != -100).long()
            own = own & (since_begin(learned.cumsum(-1), learned, sequences) == 0)
        if sequences is None:
            return torch.where(own.any(-1, keepdim=True), own, real).float()
        counts = torch.zeros(sequences.numel(), device=ids.device)
        counts = counts.index_add(0, sequences.flatten(), own.float().flatten())
        return torch.where(counts[sequences] > 0, own, real).float()


def packed_sequences(position_ids: Tensor | None) -> Tensor | None:
    """Which sequence each token of packed rows is of, counted over the batch, [B, S]: one begins
    where positions do not go on, as in transformers. None where each row is one sequence."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return None
    begins = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True)
    if not bool(begins[:, 1:].any()):
        return None
    return begins.flatten().cumsum(0).view_as(begins) - 1


def since_begin(total: Tensor, own: Tensor, sequences: Tensor | None) -> Tensor:
    """Running sums along S, of each sequence alone: total and own [B, S, ...], the sums over rows
    and what each token adds."""
    if sequences is None:
        return total
    places = torch.arange(sequences.shape[1], device=total.device).expand_as(sequences)
    begins = F.pad(sequences.diff(dim=-1) != 0, (1, 0), value=True).to(total.device)
    first_BS = torch.where(begins, places, 0).cummax(-1).values
    rows_B1 = torch.arange(len(total), device=total.device)[:, None]
    return total - (total - own)[rows_B1, first_BS]


def _is_one_of(ids: Tensor, tokens: Collection[int]) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        found = found | (ids == token)
    return found
