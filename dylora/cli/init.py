"""`dylora init`: a config to begin with, for a base and a file of rows."""

import math
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from dylora.fields import option

LOOKED_AT = 100  # rows of the file, to see its columns
MBPP_COLUMNS = ("task_id", "text", "code", "test_list")
PAIRS = (  # of question and answer, as the sets of others call them
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("input", "output"),
)
TEMPLATE = """\
# See whether it fits:   dylora train --config {file} --check
# Train:                 dylora train --config {file}
# Every setting:         dylora train --help
name: {name}

model:
  base: {base} # a hub name, a folder, or tiny-code-llama, which comes along
  dtype: {dtype} # float32 on a CPU, which multiplies bfloat16 slowly
  # quantization: bnb-4bit # the frozen base in 4 bits: pip install 'dylora[quant]'

moe:
  num_experts: 4
  top_k_experts: 2 # that a token keeps, once experts are mature
  r: 16 # rank of each expert
  lora_alpha: 32

data:
  sources:
    - name: {source}
      path: {path}
{columns}
  max_length: 512 # tokens of an example; longer ones are dropped and counted

train:
  epochs: 1
  batch_size: 2 # rows of a forward pass, on average
  gradient_accumulation_steps: 8 # passes of a step
  learning_rate: 2e-4
  warmup_steps: 10
  save_steps: 200
  save_total_limit: 2

eval:
  eval_steps: 200 # on a tenth of the rows, held out

log:
  logging_steps: 10
"""


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Write a commented config for a base and a file of rows."""

    data: str = option(metavar="FILE")
    """Rows, in a file of any kind that docs/data.md lists."""
    base: str = "tiny-code-llama"
    """A hub name, a folder, or tiny-code-llama (the embedded model)."""
    out: str = option("dylora.yaml", metavar="FILE")
    """The config that is written; an existing file is never replaced."""


def run(options: InitOptions, overrides: list[str]) -> None:
    """Write the config, and say what to do next."""
    out, data = Path(options.out), Path(options.data).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists: give another --out, or remove it")
    if not data.is_file():
        raise FileNotFoundError(f"--data {data}: no such file")
    columns, source = _columns_of(data), data.name.partition(".")[0] or "rows"
    source = "".join(letter if letter.isprintable() else "_" for letter in source)
    is_mbpp = set(MBPP_COLUMNS) <= set(columns)
    if is_mbpp or source == "mbpp":  # that name is of these columns alone
        source = "mbpp" if is_mbpp else "mbpp_rows"
    text = TEMPLATE.format(
        file=out,
        name=_quoted(out.stem),
        base=_quoted(options.base),
        dtype="float32" if options.base == "tiny-code-llama" else "bfloat16",
        source=_quoted(source),
        path=_quoted(str(data)),
        columns="\n".join(f"      {line}" for line in _column_lines(source, columns)),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}: see whether it fits with dylora train --config {out} --check")


def _quoted(text: str) -> str:
    """As YAML has it: JSON is not YAML beyond U+FFFF."""
    dumped = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf)
    return str(dumped).rstrip("\n")


def _columns_of(data: Path) -> list[str]:
    """The columns of the first rows, in their order. Raises ValueError where there are none."""
    from dylora.data.readers import read_records

    found: dict[str, None] = {}
    for record in islice(read_records(str(data), columns=None), LOOKED_AT):
        found |= dict.fromkeys(record.fields)
    if not found:
        raise ValueError(f"--data {data}: its first {LOOKED_AT} rows have no columns")
    return list(found)


def _column_lines(source: str, columns: list[str]) -> list[str]:
    """The lines that say how the rows are written; to be filled in if their columns do not tell."""
    from dylora.data.rows import choose_reader
    from dylora.run_config import SourceConfig

    if source == "mbpp":
        return ["# MBPP as its authors published it, with their split"]
    by_name = {column.lower(): column for column in columns}
    pair = next((pair for pair in PAIRS if by_name.keys() >= set(pair)), None)
    if pair is None:
        with suppress(ValueError):
            found = choose_reader(SourceConfig(name=source), set(columns))
            told_by = ", ".join(found.columns.required or ())
            return [f"format: {found.format} # its rows have {told_by}"]
        listed = ", ".join(_quoted(column) for column in columns)
        return [
            f"# its columns: {listed}",
            "instruction_column: # fill in",
            "output_column: # fill in",
        ]
    lines = [
        f"instruction_column: {_quoted(by_name[pair[0]])}",
        f"output_column: {_quoted(by_name[pair[1]])}",
    ]
    if "input" in by_name and "input" not in pair:
        lines.insert(1, f"input_column: {_quoted(by_name['input'])}")
    return lines
