"""Which rows a cell is chosen by, and which other ones it is reported on."""

from dataclasses import replace

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.compare.config import is_skill
from dylora.data.prepare import MAX_LENGTH
from dylora.data.rows import Row
from dylora.data.templates import load_template
from dylora.data.tokenize import TokenizedSet, tokenize_rows
from dylora.run_config import DataConfig
from dylora.tasks import generate_tasks


def rows_to_choose_by(validation: list[TokenizedSet]) -> list[TokenizedSet]:
    """The validation rows of embedded skills, and the first of every two rows of other sets.

    Raises ValueError for a set of one row.
    """
    return [rows if is_skill(rows.name) else _every_second(rows, 0) for rows in validation]


def rows_to_report_on(
    validation: list[TokenizedSet],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    count: int,
) -> list[TokenizedSet]:
    """`count` test tasks of each embedded skill, and the second of every two rows of other sets.

    Test tasks share no literal with training and validation, and are the same for every seed.
    """
    return [
        _test_tasks(rows.name, tokenizer, config, count)
        if is_skill(rows.name)
        else _every_second(rows, 1)
        for rows in validation
    ]


def _every_second(rows: TokenizedSet, first: int) -> TokenizedSet:
    if len(rows) < 2:
        raise ValueError(
            f"source {rows.name!r} has {len(rows)} validation row: a comparison needs two, one to "
            "choose by and one to report on"
        )
    half = TokenizedSet(rows.name, rows.split)
    for index in range(first, len(rows), 2):
        half.append(*rows.parts(index))
    return half


def _test_tasks(
    source: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, count: int
) -> TokenizedSet:
    from datasets import Dataset

    tasks = generate_tasks(source.partition("/")[2], "test", count)
    rows = [Row(task.instruction, "", task.answer, f"test/{n}") for n, task in enumerate(tasks)]
    return tokenize_rows(
        TokenizedSet(source, "test"),
        Dataset.from_list([row._asdict() for row in rows]),
        load_template(config.template, tokenizer),
        config=replace(config, max_length=config.max_length or MAX_LENGTH),
    ).examples
