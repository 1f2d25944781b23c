"""The bases that configs/ name at the hub, without their weights, and what their runs take.

    PYTHONPATH=. python tests/helpers/full_size.py

prints parameters and memory of each. The sizes are those of each base's config.json at the hub, the
parameters those that the hub, Google's model cards and keras-hub's presets give.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

from dylora.cli.config_file import load_run_config
from dylora.training.memory import Estimate, estimate

CONFIGS = Path(__file__).parents[2] / "configs"


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip


class FullSize(NamedTuple):
    """A base as it is published."""

    parameters: int
    model_type: str
    shape: tuple[int, ...]  # as SHAPE has it
    more: Mapping[str, Any] = MappingProxyType({})


GPT_OSS = {
    "num_local_experts": 32,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},  # read as bfloat16: see its file
}
# Config -> its base.
FULL_SIZE = {
    "code_alpaca_mbpp": FullSize(2_506_172_416, "gemma", (2048, 16384, 18, 8, 1, 256, 256000)),
    "qwen3_0.6b": FullSize(596_049_920, "qwen3", (1024, 3072, 28, 16, 8, 128, 151936)),
    "qwen3_4b": FullSize(4_022_468_096, "qwen3", (2560, 9728, 36, 32, 8, 128, 151936)),
    "llama_3.2_1b": FullSize(1_235_814_400, "llama", (2048, 8192, 16, 32, 8, 64, 128256)),
    "gemma_3_1b": FullSize(
        999_885_952, "gemma3_text", (1152, 6912, 26, 4, 1, 256, 262144), {"sliding_window": 512}
    ),
    "smollm3_3b": FullSize(3_075_098_624, "smollm3", (2048, 11008, 36, 16, 4, 128, 128256)),
    "gpt_oss_20b": FullSize(
        20_914_757_184, "gpt_oss", (2880, 2880, 24, 64, 8, 64, 201088), GPT_OSS
    ),
}


def estimate_full_size(name: str, folder: Path) -> Estimate:
    """Of the run of configs/<name>.yaml as it is on a GPU, whose memory has no process in it; the
    base's configuration is written to a folder in place of its download."""
    base = FULL_SIZE[name]
    shape = dict(zip(SHAPE, base.shape, strict=True))
    written = {"model_type": base.model_type, "tie_word_embeddings": True, **shape, **base.more}
    (folder / "config.json").write_text(json.dumps(written))
    config = load_run_config(CONFIGS / f"{name}.yaml", [f"model.base={folder}"])
    return estimate(config)._replace(process=0)


if __name__ == "__main__":
    for name, base in FULL_SIZE.items():
        with TemporaryDirectory() as folder:
            found = estimate_full_size(name, Path(folder))
        sizes = f"{found.base / 1e9:.1f} GB of base, {found.total / 1e9:.1f} GB in all"
        print(f"{name:18}{base.parameters / 1e9:6.2f} B parameters, {sizes}", flush=True)
