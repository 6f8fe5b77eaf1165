"""AFLoRA (ACL 2024) under `accelerate launch`: low-rank adapters whose projection matrices freeze
one by one while training, exactly the same on every rank and on every engine."""

from .adapter import AFLoRAConfig, AFLoRAModel, save_as_lora
from .control import AdaptiveFreezing, FreezeEvent, FreezingConfig
from .errors import AFLoRAError, DivergedError, UnsupportedEngineError
from .trainer import FreezingCallback

__all__ = [
    "AFLoRAConfig",
    "AFLoRAError",
    "AFLoRAModel",
    "AdaptiveFreezing",
    "DivergedError",
    "FreezeEvent",
    "FreezingCallback",
    "FreezingConfig",
    "UnsupportedEngineError",
    "save_as_lora",
]
__version__ = "0.1.0"
