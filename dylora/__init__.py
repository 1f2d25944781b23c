"""dylora: mixtures of LoRA experts with maturity-aware dense-to-sparse routing.

The public names are imported when they are first used, so that a command's help and errors come
before torch has been loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dylora.base_models import load_tokenizer
    from dylora.config import MoELoraConfig
    from dylora.data.prompts import format_prompt
    from dylora.evaluation.plots import plot_loss, plot_maturity, plot_usage
    from dylora.experts import ExpertManager
    from dylora.integrations.lora_experts import load_lora_experts, save_lora_experts
    from dylora.integrations.peft_export import export_checkpoint, export_mixture, export_peft
    from dylora.integrations.peft_import import load_peft_experts
    from dylora.model import DyLoRA_MoE
    from dylora.outputs import DyLoRAOutput, Routing
    from dylora.routing.losses import BatchTotals, Observation
    from dylora.routing.maturity import ExpertMaturity
    from dylora.routing.router import DynamicHybridRouter
    from dylora.skills import NoveltyDetector, SkillLibrary

__version__ = "0.1.0"
__all__ = [
    "BatchTotals",
    "DyLoRAOutput",
    "DyLoRA_MoE",
    "DynamicHybridRouter",
    "ExpertManager",
    "ExpertMaturity",
    "MoELoraConfig",
    "NoveltyDetector",
    "Observation",
    "Routing",
    "SkillLibrary",
    "export_checkpoint",
    "export_mixture",
    "export_peft",
    "format_prompt",
    "load_lora_experts",
    "load_peft_experts",
    "load_tokenizer",
    "plot_loss",
    "plot_maturity",
    "plot_usage",
    "save_lora_experts",
]
_NAMES = {  # of each module
    "dylora.base_models": "load_tokenizer",
    "dylora.config": "MoELoraConfig",
    "dylora.data.prompts": "format_prompt",
    "dylora.evaluation.plots": "plot_loss plot_maturity plot_usage",
    "dylora.experts": "ExpertManager",
    "dylora.integrations.lora_experts": "load_lora_experts save_lora_experts",
    "dylora.integrations.peft_export": "export_checkpoint export_mixture export_peft",
    "dylora.integrations.peft_import": "load_peft_experts",
    "dylora.model": "DyLoRA_MoE",
    "dylora.outputs": "DyLoRAOutput Routing",
    "dylora.routing.losses": "BatchTotals Observation",
    "dylora.routing.maturity": "ExpertMaturity",
    "dylora.routing.router": "DynamicHybridRouter",
    "dylora.skills": "NoveltyDetector SkillLibrary",
}


def __getattr__(name: str) -> Any:
    for home, names in _NAMES.items():
        if name in names.split():
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'dylora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
