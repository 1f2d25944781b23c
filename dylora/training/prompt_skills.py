"""The skill library of a run that knows its sources from the start: each of them is a skill."""

from collections.abc import Sequence
from typing import Literal

from dylora.data.prepare import PreparedData
from dylora.data.streamed import TrainingSet
from dylora.model import DyLoRA_MoE
from dylora.skills import SkillLibrary

Split = Literal["train", "validation"]
# Of a skill, at most, of which the library keeps the sums.
LIBRARY_ROWS: dict[Split, int] = {"train": 256, "validation": 128}


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
        rows = evenly([train], LIBRARY_ROWS["train"])
        held_out = evenly([validation], LIBRARY_ROWS["validation"])
        library.add(train.name, rows, held_out, expert=shared + number)
        model.experts[shared + number].skill = train.name


def evenly(sets: Sequence[TrainingSet], most: int) -> list[dict[str, list[int]]]:
    """So many rows of these sets at most, evenly from all of them."""
    places = [(examples, index) for examples in sets for index in range(len(examples))]
    count = min(most, len(places))
    chosen = (places[number * len(places) // count] for number in range(count))
    return [examples[index] for examples, index in chosen]
