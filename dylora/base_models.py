"""Which base is loaded, and how: from the hub, a folder, or the package itself.

A base is named by a user or by a checkpoint, which anybody may have written; `BaseSpec.resolve` is
the one place that decides what may be followed. No code that comes with a base is ever run.
"""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import set_tqdm_hook
from transformers.utils.quantization_config import Mxfp4Config

from dylora.config import Quantization
from dylora.storage.safe_io import require_followable

EMBEDDED_BASES = {"tiny-code-llama": Path(__file__).parent / "assets" / "tiny-code-llama"}


class LoadOptions(TypedDict, total=False):
    """How a base is loaded."""

    dtype: torch.dtype | str | None  # of weights and activations; None or "auto": as it is stored
    device: str | torch.device
    device_map: str | dict[str, Any] | None  # transformers' own, over several devices, CPU and disk
    offload_folder: str | Path | None  # for what device_map puts on the disk
    attn_implementation: str | None
    quantization: Quantization


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """A base that may be loaded, and how."""

    name: str  # an embedded name, one of the hub, or the absolute path of a folder
    revision: str | None = None
    dtype: torch.dtype | str | None = torch.float32
    device: str | torch.device | None = None  # None: the CPU, or where device_map says
    device_map: str | dict[str, Any] | None = None
    offload_folder: str | Path | None = None
    attn_implementation: str | None = None
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype == "auto":
            dtype = None
        elif self.dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}, but must be one of torch, as bfloat16")
        object.__setattr__(self, "dtype", dtype)
        if self.device_map is not None and self.device is not None:
            raise ValueError("device and device_map are both given: leave out device")
        if self.device_map is not None and find_spec("accelerate") is None:
            raise ValueError("device_map needs accelerate: pip install 'dylora[quant]'")

    @classmethod
    def resolve(
        cls,
        name: str,
        revision: str | None = None,
        *,
        relative_to: Path | None = None,
        named_by: Path | None = None,
        **options: Unpack[LoadOptions],
    ) -> "BaseSpec":
        """The base called `name`; a folder by its absolute path, whatever the working directory.

        Args:
            relative_to: where a relative path begins; by default the working directory.
            named_by: the file that names the base, where no user does.

        Raises ValueError for an address or a path out of the working directory that a file names.
        """
        if named_by is not None:
            require_followable(name, named_by)
        if name not in EMBEDDED_BASES:
            folder = (relative_to or Path()) / Path(name).expanduser()
            name = str(folder.resolve()) if folder.is_dir() else name
        return cls(name=name, revision=revision, **options)

    @property
    def source(self) -> str:
        """What transformers is asked for: embedded names are folders of this package."""
        return str(EMBEDDED_BASES.get(self.name, self.name))

    def load(self) -> PreTrainedModel:
        """The causal LM, frozen, in evaluation mode.

        Raises ValueError where it cannot be loaded, with what to do, and where its files lack
        weights, which transformers would fill at random.
        """
        dtype = self.dtype or self.config().get_text_config().dtype or torch.float32
        assert isinstance(dtype, torch.dtype)  # a name became one in __post_init__
        options: dict[str, Any] = {}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization != "none":
            options["quantization_config"] = quantization_config(self.quantization, dtype)
            # Packed weights are made where they stay.
            options["device_map"] = {"": self.device or "cpu"}
        elif _stored_method(self.config()) == "mxfp4":
            # Of itself transformers keeps it where the package kernels is installed.
            options["quantization_config"] = Mxfp4Config(dequantize=True)
        if self.device_map is not None:
            options["device_map"] = self.device_map
            options["offload_folder"] = self.offload_folder
        model, found = self._ask(
            "model",
            AutoModelForCausalLM,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are among what is found, and named below
            **options,
        )
        lacking = sorted({str(key) for key in (*found["missing_keys"], *found["mismatched_keys"])})
        if lacking:
            raise ValueError(
                f"the files of the base {self.name!r} lack {len(lacking)} weights, among them "
                f"{lacking[0]}, which would be random: give a base that is whole"
            )
        if self.quantization == "torchao-int8" and not any(
            hasattr(parameter, "__tensor_flatten__") for parameter in model.parameters()
        ):
            raise ValueError(
                f"torchao quantises nn.Linear alone, and the layers of {self.name!r} are none"
            )
        keep_as_stored(model)
        if self.quantization == "none" and self.device_map is None:
            model.to(device=torch.device(self.device or "cpu"))
        return model.eval().requires_grad_(False)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the base. Raises ValueError where it cannot be loaded."""
        tokenizer = self._ask("tokenizer", AutoTokenizer)
        # For a folder without its files transformers may make one without words, and says nothing.
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            reason = "it has no tokens besides the special ones: are its files there?"
            raise ValueError(_cannot_load("tokenizer", self.name, ValueError(reason)))
        return tokenizer

    def config(self) -> Any:
        """The base's configuration alone. Raises ValueError where it cannot be loaded."""
        return self._ask("model", AutoConfig)

    def _ask(self, what: str, loader: Any, **options: Any) -> Any:
        """Raises ValueError for the many errors of what cannot be loaded."""
        # Left out, transformers would ask on the terminal whether to run code that comes with it.
        options |= {"trust_remote_code": False, "revision": self.revision or "main"}
        # Reading weights from a disk takes seconds; the hub's bars of what it fetches stay.
        before = set_tqdm_hook(lambda make, args, given: make(*args, **given | {"disable": True}))
        try:
            return loader.from_pretrained(self.source, **options)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # broken files end in errors of every kind
            raise ValueError(_cannot_load(what, self.name, error)) from error
        finally:
            set_tqdm_hook(before)


def load_base(
    name: str, *, revision: str | None = None, **options: Unpack[LoadOptions]
) -> PreTrainedModel:
    """The causal LM called `name`, frozen, in evaluation mode; in float32 by default.

    Raises ValueError as `BaseSpec.load`.
    """
    return BaseSpec.resolve(name, revision, **options).load()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `name`. Raises ValueError where it cannot be loaded."""
    return BaseSpec.resolve(name, revision).tokenizer()


def max_positions(config: Any) -> int | None:
    """The longest sequence that a base takes; None where its configuration does not say."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "seq_length")  # the last of MPT and BLOOM
    found = (getattr(text, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def has_position_table(config: Any) -> bool:
    """Whether a longer sequence fails, for want of a row: not with rotary or BLOOM's positions."""
    text = config.get_text_config()
    return getattr(text, "rope_parameters", None) is None and text.model_type != "bloom"


# Quantisation and devices


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


def _stored_method(config: Any) -> str | None:
    """How the files of a base are quantised, by their own word."""
    stored = getattr(config, "quantization_config", None)
    return stored.get("quant_method") if isinstance(stored, dict) else None


def require_gradients(base: PreTrainedModel) -> None:
    """Raises ValueError for a base whose packed weights let no gradient pass."""
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = getattr(quantizer.quantization_config, "quant_method", "packed weights")
        raise ValueError(
            f"the base is quantised as {getattr(method, 'value', method)}, through which no "
            "gradient passes: load it dequantised (from MXFP4 that is what its name does, and "
            "Mxfp4Config(dequantize=True))"
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
    """Bytes of a parameter as it is stored here; a torchao tensor is made of several, and of one
    that lies in parts this process has one."""
    tensor: Any = parameter
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    return parameter.nbytes


def choose_device(name: str, setting: str = "model.device") -> torch.device:
    """auto: cuda when there is one, else cpu. Raises ValueError, which names the setting, for a
    device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{setting} is {name!r}, which torch does not know") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{setting} is {name!r}, but torch finds no CUDA device")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"{setting} is {name!r}, but there is no such device here") from error
    return device


def _cannot_load(what: str, name: str, error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"cannot load the {what} {name!r} ({first_line}); give a hub name that you have access to, "
        f"a folder, or an embedded one: {', '.join(EMBEDDED_BASES)}"
    )
