"""Mirrors metrics.jsonl to Weights & Biases, in a process of its own.

`python wandb_mirror.py FILE OFFSET SETTINGS` sends every row beyond OFFSET until its standard input
ends, which happens when the trainer closes it or dies. Whatever wandb does here (hang, crash, fill
the disk) the trainer does not notice. It imports nothing of ours: torch alone takes seconds.
"""

import json
import os
import select
import sys
from pathlib import Path
from typing import Any

POLL_SECONDS = 1.0


def main() -> None:
    """Exit code 1, with the reason as the last line of the output, when wandb refuses."""
    file, offset, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    try:
        mirror(file, offset, settings)
    except Exception as error:
        print(" ".join(str(error).split()), flush=True)
        raise SystemExit(1) from None


def mirror(file: Path, offset: int, settings: dict[str, Any]) -> None:
    """Send rows until standard input ends, then the rest."""
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.api.api_key)
    mode = None if has_key or "WANDB_MODE" in os.environ else "offline"
    run = wandb.init(**settings, mode=mode)
    ended = False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
        lines, offset = whole_lines(file, offset)
        for line in lines:
            row = json.loads(line)
            run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
    run.finish()


def whole_lines(file: Path, offset: int) -> tuple[list[bytes], int]:
    """The lines that have ended since `offset`, and the offset behind them."""
    if not file.exists():
        return [], offset
    with file.open("rb") as content:
        content.seek(offset)
        text = content.read()
    end = text.rfind(b"\n") + 1
    return text[:end].splitlines(), offset + end


if __name__ == "__main__":
    main()
