"""dylora: mixtures of LoRA experts with maturity-aware dense-to-sparse routing.

The public names are imported when they are first used, so that a command's help and errors come
before torch has been loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dylora.config import MoELoraConfig
    from dylora.integrations.folder_export import export_checkpoint
    from dylora.integrations.peft_export import export_mixture, export_peft
    from dylora.integrations.peft_import import load_peft_experts
    from dylora.model import DyLoRA_MoE, DyLoRAOutput, Routing
    from dylora.routing.maturity import ExpertMaturity
    from dylora.routing.router import DynamicHybridRouter

__version__ = "0.1.0"
__all__ = [
    "DyLoRAOutput",
    "DyLoRA_MoE",
    "DynamicHybridRouter",
    "ExpertMaturity",
    "MoELoraConfig",
    "Routing",
    "export_checkpoint",
    "export_mixture",
    "export_peft",
    "load_peft_experts",
]
_HOMES = {
    "DyLoRAOutput": "dylora.model",
    "DyLoRA_MoE": "dylora.model",
    "DynamicHybridRouter": "dylora.routing.router",
    "ExpertMaturity": "dylora.routing.maturity",
    "MoELoraConfig": "dylora.config",
    "Routing": "dylora.model",
    "export_checkpoint": "dylora.integrations.folder_export",
    "export_mixture": "dylora.integrations.peft_export",
    "export_peft": "dylora.integrations.peft_export",
    "load_peft_experts": "dylora.integrations.peft_import",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dylora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
