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
_HOMES = {
    "BatchTotals": "dylora.routing.losses",
    "DyLoRAOutput": "dylora.outputs",
    "DyLoRA_MoE": "dylora.model",
    "DynamicHybridRouter": "dylora.routing.router",
    "ExpertManager": "dylora.experts",
    "ExpertMaturity": "dylora.routing.maturity",
    "MoELoraConfig": "dylora.config",
    "NoveltyDetector": "dylora.skills",
    "Observation": "dylora.routing.losses",
    "Routing": "dylora.outputs",
    "SkillLibrary": "dylora.skills",
    "export_checkpoint": "dylora.integrations.peft_export",
    "export_mixture": "dylora.integrations.peft_export",
    "export_peft": "dylora.integrations.peft_export",
    "format_prompt": "dylora.data.prompts",
    "load_lora_experts": "dylora.integrations.lora_experts",
    "load_peft_experts": "dylora.integrations.peft_import",
    "load_tokenizer": "dylora.base_models",
    "plot_loss": "dylora.evaluation.plots",
    "plot_maturity": "dylora.evaluation.plots",
    "plot_usage": "dylora.evaluation.plots",
    "save_lora_experts": "dylora.integrations.lora_experts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dylora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
