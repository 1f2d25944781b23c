"""Loading the frozen base and its tokenizer: from the hub, a folder, or the package itself."""

import logging
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.config import Quantization
from dylora.fields import shown

EMBEDDED_BASES = {"tiny-code-llama": Path(__file__).parent / "assets" / "tiny-code-llama"}


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    quantization: Quantization = "none",
) -> PreTrainedModel:
    """The causal LM called `name`, frozen, in evaluation mode.

    Raises ValueError where it cannot be loaded, with what to do.
    """
    # Left out, transformers would ask on the terminal whether to run code that comes with a base.
    options: dict[str, Any] = {"trust_remote_code": False}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, dtype)
        options["device_map"] = {"": device}  # packed weights are made where they stay
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_base(name), revision=revision or "main", dtype=dtype, **options
        )
    except (OSError, ValueError, ImportError) as error:  # ImportError: a package is too old
        raise ValueError(_cannot_load("model", name, error)) from error
    if quantization == "torchao-int8" and not any(
        hasattr(parameter, "__tensor_flatten__") for parameter in model.parameters()
    ):
        raise ValueError(f"torchao quantises nn.Linear alone, and the layers of {name!r} are none")
    keep_as_stored(model)
    if quantization == "none":
        model.to(device=torch.device(device))  # type: ignore[call-arg] - transformers wraps `to`
    return model.eval().requires_grad_(False)


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """transformers' object for one of our names; activations are of `dtype`.

    Raises ValueError where a package is missing.
    """
    package = "torchao" if quantization == "torchao-int8" else "bitsandbytes"
    for name in (package, "accelerate"):  # transformers places quantised weights by accelerate
        if find_spec(name) is None:
            raise ValueError(
                f"quantization {quantization!r} needs {name}: pip install 'dylora[quant]'"
            )
    if quantization == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if quantization == "bnb-8bit":
        # It says at every product of every step that activations pass through float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def quantization_of(base: PreTrainedModel) -> Quantization:
    """How a loaded base is stored."""
    method = str(getattr(base, "quantization_method", None) or "none").lower()
    if "torchao" in method:
        return "torchao-int8"
    if "bitsandbytes" in method or "bits_and_bytes" in method:
        return "bnb-4bit" if getattr(base, "is_loaded_in_4bit", False) else "bnb-8bit"
    return "none"


def keep_as_stored(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew.

    On a CPU with instructions for bfloat16 its layers do so at their first pass in evaluation, for
    a product of their own: in bfloat16 whatever was asked for, without a gradient from then on, and
    for widths of whole 32s alone. Raises ValueError where that has happened.
    """
    layers: Any = base.named_modules()
    for path, module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"the weights of {path} were packed for inference by a pass on this CPU, and "
                    "would give no gradient: load the base anew"
                )
            module.support_avx512bf16_for_cpu = False


def stored_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a parameter as it is stored; a torchao tensor is made of several."""
    tensor: Any = parameter
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])
    return parameter.nbytes


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `name`. Raises ValueError where it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_base(name), revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load("tokenizer", name, error)) from error
    # For a folder without its files transformers may make one without words, and says nothing.
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        reason = ValueError("it has no tokens besides the special ones: are its files there?")
        raise ValueError(_cannot_load("tokenizer", name, reason))
    return tokenizer


def resolve_base(name: str) -> str:
    """Embedded names become their folder; all others are transformers' business."""
    return str(EMBEDDED_BASES.get(name, name))


def choose_device(name: str) -> torch.device:
    """auto: cuda when there is one, else cpu. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"model.device is {name!r}, which torch does not know") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"model.device is {name!r}, but torch finds no CUDA device")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"model.device is {name!r}, but there is no such device here") from error
    return device


def _cannot_load(what: str, name: str, error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"cannot load the {what} {name!r} ({first_line}); give a hub name that you have access to, "
        f"a folder, or an embedded one: {', '.join(EMBEDDED_BASES)}"
    )


def named_base(folder: Path, description: dict[str, Any]) -> str:
    """The base that a checkpoint names, where nobody gave another one.

    A stranger may name an embedded base, one of the hub, or a folder of this machine. Raises
    ValueError for an address, for a path out of the working directory, and when none is named.
    """
    name = description["base_model_name_or_path"]
    if name is None:
        raise ValueError(f"{folder}/config.json names no base model: give one as base= or --base")
    if "://" in name or name.startswith("~") or ".." in PurePath(name).parts:
        raise ValueError(
            f"{folder}/config.json names the base {shown(name)}, an address or a path that leads "
            "out of here, which is not followed: if you mean it, give it as base= or --base"
        )
    return name
