"""What the frozen base alone says of rows, as vectors: two means of states over tokens.

Shape letters: B rows, S tokens, D hidden width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dylora.adapters.trace import decoder_of
from dylora.kernels.common import evaluation_mode
from dylora.mixture import Mixture
from dylora.routing.prompt_tokens import bos_ids

_ROWS_AT_ONCE = 16

Row = Sequence[int] | Tensor | Mapping[str, Any]
"""Token ids without padding, all of them a prompt; or a mapping with `input_ids` and, if there are,
`labels` (the prompt ends at the first that is not -100) and `attention_mask` (0 on padding)."""


class Features(NamedTuple):
    """Of rows, float64 on the CPU. Padding and a leading BOS count in neither mean."""

    whole: Tensor  # [B, D]: the mean of the last layer's states over prompt and answer
    prompt: Tensor  # [B, D]: the mean of what enters the first routed block over the prompt


def embed(mixture: Mixture, rows: Sequence[Row]) -> Features:
    """Features of rows, with the adapters off and the base in evaluation mode.

    Not for while another thread runs the same model. Raises ValueError for a row that has no token
    besides BOS in its prompt.
    """
    mine = mixture.state.mine
    before, mine.disabled = mine.disabled, True
    try:
        with evaluation_mode(mixture.base):
            return _embed(mixture, [split_row(row) for row in rows])
    finally:
        mine.disabled = before


def widths_of(mixture: Mixture) -> tuple[int, int]:
    """D of `whole` and of `prompt`; they differ where OPT projects its layers' output down."""
    embedding: Any = mixture.base.get_input_embeddings()
    return embedding.weight.shape[-1], mixture.blocks[0].width


def split_row(row: Row) -> tuple[list[int], int]:
    """Token ids of a row, padding left out, and how many of them are its prompt."""
    parts = row if isinstance(row, Mapping) else {"input_ids": row}
    ids = _flat(parts["input_ids"])
    labels = _flat(parts.get("labels", [-100] * len(ids)))
    mask = _flat(parts.get("attention_mask", [1] * len(ids)))
    kept = [(i, label) for i, label, real in zip(ids, labels, mask, strict=True) if real]
    prompt = next((place for place, (_, label) in enumerate(kept) if label != -100), len(kept))
    return [i for i, _ in kept], prompt


def _flat(values: Any) -> list[int]:
    return values.flatten().tolist() if isinstance(values, Tensor) else list(values)


def _embed(mixture: Mixture, rows: list[tuple[list[int], int]]) -> Features:
    bos = bos_ids(mixture.base.config)
    begins = [int(bool(ids) and ids[0] in bos) for ids, _ in rows]
    for number, (begin, (_, prompt)) in enumerate(zip(begins, rows, strict=True)):
        if prompt <= begin:
            raise ValueError(f"row {number} has no token in its prompt")
    widths = widths_of(mixture)
    features = Features(*(torch.zeros(len(rows), w, dtype=torch.float64) for w in widths))
    places = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    for start in range(0, len(places), _ROWS_AT_ONCE):
        chunk = places[start : start + _ROWS_AT_ONCE]
        ids_BS = pad_sequence([torch.tensor(rows[i][0]) for i in chunk], batch_first=True)
        at_S = torch.arange(ids_BS.shape[1])
        begun_BS = at_S >= torch.tensor([[begins[i]] for i in chunk])
        real_BS = at_S < torch.tensor([[len(rows[i][0])] for i in chunk])
        asked_BS = at_S < torch.tensor([[rows[i][1]] for i in chunk])
        last, first = _states(mixture, ids_BS, real_BS.long())
        features.whole[chunk] = _means(last, (begun_BS & real_BS).float())
        features.prompt[chunk] = _means(first, (begun_BS & asked_BS).float())
    return features


def _states(mixture: Mixture, ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The last layer's states and what enters the first routed block, [B, S, D] each."""
    base, seen = mixture.base, []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    first: Any = base.get_submodule(mixture.site_names[0])
    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        decoder = decoder_of(base, mixture.site_names)
        inputs: Any = {"input_ids": ids_BS, "attention_mask": mask_BS}
        inputs = {name: value.to(base.device) for name, value in inputs.items()}
        if decoder is base:  # some hold their layers themselves
            last = decoder(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
        else:
            last = decoder(**inputs, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    return last, seen[0].reshape(*ids_BS.shape, -1)


def _means(states_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Over the tokens of the mask, [B, D] in float64 on the CPU."""
    mask_BS = (mask_BS / mask_BS.sum(-1, keepdim=True)).to(states_BSD.device)
    return torch.einsum("bsd,bs->bd", states_BSD.float(), mask_BS).cpu().double()
