"""routing.json: how a mixture routes the tokens of some texts, and the shares of experts by set.

A run writes it at its end, so that a report needs no model. Its size is bounded: of each token and
site the TOP largest gates and those of shared experts, of at most MOST_CELLS tokens times sites.

Shape letters: S tokens, N sites, E experts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.prompts import pad_token_id
from dylora.data.templates import question, recorded_template
from dylora.data.tokenize import IGNORED, TokenizedSet
from dylora.evaluation.loading import base_of, decode_after, load_checkpoint, note
from dylora.evaluation.passk.generation import default_generation_config
from dylora.kernels.common import evaluation_mode
from dylora.model import DyLoRA_MoE
from dylora.run_config import RunConfig
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.folders import write_file
from dylora.storage.safe_io import read_json
from dylora.training.prompt_skills import evenly
from dylora.training.validation import SetScore

TOP = 4  # gates kept of a token at a site
MOST_TOKENS = 160  # of a text
MOST_SETS = 12
MOST_CELLS = 40_000
ANSWER_TOKENS = 96  # of a prompt of one's own
OWN = "your prompt"  # stands for the set of such a one


def write_routing(
    file: Path,
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[TokenizedSet],
    scores: Mapping[str, SetScore],
) -> None:
    """Of some validation rows of each set, and what the scores say of each set as a whole."""
    usage = {name: one.usage_NE for name, one in scores.items() if one.usage_NE is not None}
    count = min(len(sets), MOST_SETS)
    chosen = [sets[number * len(sets) // count] for number in range(count)]
    texts = [(one.name, row) for one in chosen for row in evenly([one], 2 if count <= 6 else 1)]
    sites = _kept_sites(model, sum(min(len(row["input_ids"]), MOST_TOKENS) for _, row in texts))
    content = {
        "sites": model.site_names,
        "experts": len(model.experts),
        "usage": {
            name: [[round(share, 4) for share in row] for row in found.tolist()]
            for name, found in usage.items()
        },
        "kept_sites": sites,
        "texts": [_routed(model, tokenizer, name, row, sites) for name, row in texts],
    }
    write_file(file, json.dumps(content, ensure_ascii=False) + "\n")


def route_prompt(
    model: DyLoRA_MoE, tokenizer: PreTrainedTokenizerBase, prompt: str, sites: list[int]
) -> dict[str, Any]:
    """A prompt of one's own in the template of the training, answered greedily, as a text of
    routing.json."""
    template = recorded_template(model.training_record, tokenizer)
    (ids,) = template.prompts([question(template, prompt)])
    given = torch.tensor([ids], device=model.device)
    with default_generation_config(model.base):
        output = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=pad_token_id(tokenizer),
            eos_token_id=template.end_ids,
        )[0].tolist()
    labels = [IGNORED] * len(ids) + output[len(ids) :]
    row = {"input_ids": output, "labels": labels}
    return _routed(model, tokenizer, OWN, row, sites)


def add_prompts(run_folder: Path, config: RunConfig, file: Path, prompts: Sequence[str]) -> None:
    """Answer prompts with a run's best checkpoint, and keep them in its routing.json.

    Raises ValueError or FileNotFoundError where there is no checkpoint that loads.
    """
    opened = Checkpoint.open(run_folder, note)
    tokenizer = opened.tokenizer(base_of(config.model))
    model = load_checkpoint(opened, config.model)
    content = read_json(file) if file.exists() else {"usage": {}, "texts": []}
    sites = content.get("kept_sites") or _kept_sites(model, MOST_TOKENS * len(prompts))
    own = [route_prompt(model, tokenizer, prompt, sites) for prompt in prompts]
    content |= {"sites": model.site_names, "experts": len(model.experts), "kept_sites": sites}
    others = [text for text in content["texts"] if text["set"] != OWN]
    write_file(file, json.dumps(content | {"texts": own + others}, ensure_ascii=False) + "\n")


def _routed(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    row: Mapping[str, Sequence[int]],
    sites: list[int],
) -> dict[str, Any]:
    """One text: its tokens, how many of them are the prompt, and for the mean over all sites and
    each kept one a flat list of as many pairs (expert, gate in percent) for every token."""
    ids, labels = list(row["input_ids"])[:MOST_TOKENS], list(row["labels"])[:MOST_TOKENS]
    with evaluation_mode(model):
        given = torch.tensor([ids], device=model.device)
        known = torch.tensor([labels], device=model.device)
        output = model(given, torch.ones_like(given), known, keep_logits=False)
    assert output.routing is not None
    gates_SNE = output.routing.gates[0].float().cpu()
    layers = [gates_SNE.mean(1), *(gates_SNE[:, site] for site in sites)]
    return {
        "set": name,
        "tokens": [decode_after(tokenizer, ids[:n], ids[n : n + 1]) for n in range(len(ids))],
        "prompt": labels.count(IGNORED),
        "gates": [_largest(gates_SE, TOP + model.config.shared_experts) for gates_SE in layers],
    }


def _largest(gates_SE: Tensor, count: int) -> list[int]:
    found = gates_SE.topk(min(count, gates_SE.shape[-1]), dim=-1)
    percent = (found.values * 100).round().long()
    return torch.stack([found.indices, percent], -1).flatten().tolist()


def _kept_sites(model: DyLoRA_MoE, tokens: int) -> list[int]:
    """All sites, or evenly as many as MOST_CELLS allows for so many tokens."""
    count = len(model.site_names)
    kept = max(1, min(count, MOST_CELLS // max(tokens, 1)))
    return [number * count // kept for number in range(kept)]
