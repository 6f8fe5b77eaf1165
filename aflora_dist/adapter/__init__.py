"""Eq. 1 as a PEFT tuner. Knows nothing of schedules, scores or engines."""

from .config import AFLoRAConfig
from .layer import AFLoRALayer, AFLoRAPath
from .lora import save_as_lora
from .model import AFLoRAModel, register

register()

__all__ = ["AFLoRAConfig", "AFLoRALayer", "AFLoRAModel", "AFLoRAPath", "save_as_lora"]
