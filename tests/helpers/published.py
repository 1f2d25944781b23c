"""Where the published rows are: CodeAlpaca and MBPP are not part of this repository.

They are looked for in the folder that DYLORA_PUBLISHED_ROWS names, else in `shared/data` beside the
checkout. CONTRIBUTING.md says where they come from; tests that need them are skipped without them.
"""

import os
from pathlib import Path

import pytest

FOLDER = Path(
    os.environ.get("DYLORA_PUBLISHED_ROWS") or Path(__file__).parents[3] / "shared" / "data"
)
CODE_ALPACA, MBPP = str(FOLDER / "code_alpaca.json"), str(FOLDER / "mbpp.jsonl")
needs_published_rows = pytest.mark.skipif(
    not (Path(CODE_ALPACA).exists() and Path(MBPP).exists()),
    reason="code_alpaca.json and mbpp.jsonl are not here (CONTRIBUTING.md)",
)
