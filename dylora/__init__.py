"""dylora: mixtures of LoRA experts with maturity-aware dense-to-sparse routing."""

from dylora.config import MoELoraConfig
from dylora.maturity import ExpertMaturity
from dylora.model import DyLoRA_MoE, DyLoRAOutput, Routing
from dylora.router import DynamicHybridRouter
from dylora.storage.export import export_checkpoint

__all__ = [
    "DyLoRAOutput",
    "DyLoRA_MoE",
    "DynamicHybridRouter",
    "ExpertMaturity",
    "MoELoraConfig",
    "Routing",
    "export_checkpoint",
]
__version__ = "0.1.0"
