"""The skill library of a run that knows its sources from the start: each of them is a skill."""

from dylora.data.prepare import PreparedData
from dylora.data.tokenize import TokenizedSet
from dylora.model import DyLoRA_MoE
from dylora.skills import SkillLibrary

ROWS, HELD_OUT = 256, 128  # of a source, at most, of which the library keeps the sums


def fit_library(model: DyLoRA_MoE, data: PreparedData) -> None:
    """Let each source be a skill: the first expert after the shared ones serves the first source,
    and so on. Prompts are routed by that from the first step on.

    Raises ValueError where there are more or fewer experts than sources, and as `SkillLibrary.add`.
    """
    shared, sources = model.config.shared_experts, len(data.train)
    if len(model.experts) - shared != sources:
        raise ValueError(
            f"moe.num_experts is {len(model.experts)}, {shared} of them shared, but data.sources "
            f"has {sources} sets; with router_scope {model.config.router_scope!r} each has an "
            f"expert of its own: set moe.num_experts {shared + sources}"
        )
    library = SkillLibrary(model)
    for number, (train, validation) in enumerate(zip(data.train, data.validation, strict=True)):
        rows, held_out = evenly(train, ROWS), evenly(validation, HELD_OUT)
        library.add(train.name, rows, held_out, expert=shared + number)
        model.experts[shared + number].skill = train.name


def evenly(rows: TokenizedSet, most: int) -> list[dict[str, list[int]]]:
    """So many of a set at most, evenly from all of it."""
    count = min(most, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]
