"""skill_library.safetensors: sums over the rows of each skill, float64, and a table in its header.

Shape letters: K skills, D hidden width of the base.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dylora.config import LARGEST
from dylora.fields import is_name, is_number, is_whole_number, shown
from dylora.storage.safe_io import parse_json, require_keys
from dylora.storage.tensors import Header, read_headers, read_tensors

LEAST_ROWS = 16  # of a skill; below, neither a threshold nor similar skills can be told
PROMPTS = ("prompt_sum", "prompt_squares")  # [K, D] each, as the others
VECTORS = ("whole_sum", "whole_squares", "held_out_sum", "held_out_squares", *PROMPTS)
SCATTER = "prompt_scatter"  # [D, D], over all skills
_MOST_ROWS = 1 << 40
RECORD = {  # of a skill in the table
    "name": is_name,
    "expert": lambda value: value is None or is_whole_number(value),
    "rows": lambda value: is_whole_number(value, LEAST_ROWS, _MOST_ROWS),
    "held_out": lambda value: is_whole_number(value, LEAST_ROWS, _MOST_ROWS),
    "dimensions": lambda value: is_number(value, 0.999, LARGEST),
    "far_level": lambda value: is_number(value, 1e-30, 1e30),
    "prompt_far_level": lambda value: is_number(value, 1e-30, 1e30),
}


def write_skills(file: Path, table: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """The table, a row of RECORD for each skill, and the tensors of VECTORS and SCATTER."""
    save_file(tensors, file, metadata={"skills": json.dumps(table)})


def read_skills(
    file: Path, widths: tuple[int, int], experts: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What `write_skills` wrote, for vectors of these widths (whole rows, prompts) and a mixture of
    so many experts.

    Raises ValueError naming the file for anything else, before a tensor is read where its header
    shows it; FileNotFoundError when it is missing.
    """
    if file.suffix == ".pt":
        raise ValueError(
            f"{file} is of an older layout, which has no spread within a skill and no held-out "
            "rows, so no threshold can be made of it: add the skills again from their rows"
        )
    headers = read_headers(file)
    table = read_table(file, experts)
    whole, prompt = widths
    shapes = dict.fromkeys(VECTORS, (len(table), whole))
    shapes |= dict.fromkeys(PROMPTS, (len(table), prompt)) | {SCATTER: (prompt, prompt)}
    for name in sorted(shapes.keys() - headers.keys()):
        raise ValueError(f"{file}: {name} is missing")
    for name, header in sorted(headers.items()):
        if name not in shapes:
            raise ValueError(f"{file}: {shown(name)} belongs to no skill library")
        if header != Header("F64", shapes[name]):
            raise ValueError(
                f"{file}: {name} is {header.dtype} {list(header.shape)}, but must be F64 "
                f"{list(shapes[name])}"
            )
    tensors = read_tensors(file)
    _check_values(file, tensors)
    return table, tensors


def read_table(file: Path, experts: int) -> list[dict[str, Any]]:
    """The table in the header of a file that `read_headers` has seen: RECORD of each skill.

    Raises ValueError naming the file for anything else.
    """
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("skills", "")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    table = parse_json(text.encode(), f"{file}: skills")
    if not isinstance(table, list) or not 1 <= len(table) <= LARGEST:
        raise ValueError(f"{file}: skills is {shown(table)}, not a list of 1 to {LARGEST} skills")
    names = set()
    for index, record in enumerate(table):
        require_keys(file, f"skills[{index}].", record, RECORD)
        if record["expert"] is not None and record["expert"] >= experts:
            raise ValueError(
                f"{file}: skills[{index}].expert is {record['expert']}, but there are {experts}"
            )
        if record["name"] in names:
            raise ValueError(f"{file}: the skill {shown(record['name'])} appears twice")
        names.add(record["name"])
    return table


def _check_values(file: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not bool((value.abs() <= 1e100).all()):  # NaN is not either
            raise ValueError(f"{file}: {name} holds values that are not finite, or above 1e100")
    for name in ("whole_squares", "held_out_squares", "prompt_squares"):
        if not bool((tensors[name] >= 0).all() and (tensors[name].sum(-1) > 0).all()):
            raise ValueError(f"{file}: {name} holds no sums of squares")
    scatter = tensors[SCATTER]
    least = float(scatter.diagonal().mean()) * 1e-3  # far less than what it is shrunk towards
    shifted = scatter + least * torch.eye(len(scatter), dtype=scatter.dtype)
    if not scatter.equal(scatter.T) or int(torch.linalg.cholesky_ex(shifted).info) != 0:
        raise ValueError(f"{file}: {SCATTER} is no scatter of rows")
