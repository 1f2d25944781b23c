"""Pages of the site that are made when it is built: every setting of a run, and the notebooks.

mkdocs calls `on_files` (see `hooks` in mkdocs.yml). Nothing of this is committed, so it cannot
differ from the code.
"""

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from dylora import run_config
from dylora.fields import default_of, describe_type, field_docs, field_types

ROOT = Path(__file__).parents[1]
SECTIONS = {
    "The run itself": run_config.RunConfig,
    "model": run_config.ModelConfig,
    "data": run_config.DataConfig,
    "data.sources, each item": run_config.SourceConfig,
    "train": run_config.TrainConfig,
    "eval": run_config.EvalConfig,
    "log": run_config.LogConfig,
    "stages, each item": run_config.StageConfig,
}
OPENING = """\
# Settings of a run

The sections of a config beside `moe`, whose fields are the [options of a mixture](options.md). Each
can be given on the command line as `--section.field VALUE`; `python run.py train --help` says the
same. This page is made from the fields of `dylora/run_config.py`.
"""


def on_files(files: Files, config: Any) -> Files:
    """Add what is made to what lies in docs/."""
    files.append(File.generated(config, "settings.md", content=settings()))
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        page = tutorial(json.loads(path.read_text(encoding="utf-8")), path.name)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=page))
    return files


def settings() -> str:
    """A table for each section: field, meaning, default, type and range."""
    parts = [OPENING]
    for title, cls in SECTIONS.items():
        rows = ["| field | meaning | default | values |", "|---|---|---|---|"]
        docs, types = field_docs(cls), field_types(cls)
        for item in fields(cls):
            if item.name not in docs:
                continue  # a section, which has a table of its own
            rule = item.metadata.get("rule") or str(item.metadata.get("bounds", ""))
            values = f"{describe_type(types[item.name])}{'; ' if rule else ''}{rule}"
            cells = [f"`{item.name}`", docs[item.name], default(item), values]
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append(f"## {title}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def default(item: Any) -> str:
    """A field's default as YAML writes it."""
    value = default_of(item)
    return "required" if value is MISSING else f"`{json.dumps(value)}`"


def tutorial(notebook: dict[str, Any], name: str) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            parts.append(shown(output))
    parts.append(f"This page is `examples/{name}`, as it was run last.")
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """What a cell left behind: an image, HTML, Markdown or text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    for kind in ("text/html", "text/markdown"):
        if kind in data:
            return "".join(data[kind])
    text = "".join(output.get("text", data.get("text/plain", "")))
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return f"```text\n{text}\n```"
