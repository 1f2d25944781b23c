"""What each of PEFT's adapter types keeps on disk, a row each.

Shape letters: O output width, D input width, r rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class PeftType(NamedTuple):
    """The tensors of one adapter type and the keys of its adapter_config.json."""

    matrices: dict[str, str]  # name -> its axes, "r d" or "o r"
    suffix: str  # after a name in the file
    alpha: str  # key of the scale's numerator
    settings: dict[str, Any]  # keys that only this type has, as they are by default
    product: Callable[..., Tensor]  # the matrices, in order -> the update [O, D] before its scale


PEFT_TYPES = {
    "LORA": PeftType(
        matrices={"lora_A": "r d", "lora_B": "o r"},
        suffix=".weight",
        alpha="lora_alpha",
        settings={
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
            "use_dora": False,
            "use_rslora": False,
        },
        product=lambda A, B: B @ A,
    ),
    "LOHA": PeftType(
        matrices={"hada_w1_a": "o r", "hada_w1_b": "r d", "hada_w2_a": "o r", "hada_w2_b": "r d"},
        suffix="",
        alpha="alpha",
        settings={
            "init_weights": True,
            "module_dropout": 0.0,
            "rank_dropout": 0.0,
            "use_effective_conv2d": False,
        },
        product=lambda w1_a, w1_b, w2_a, w2_b: (w1_a @ w1_b) * (w2_a @ w2_b),
    ),
}
