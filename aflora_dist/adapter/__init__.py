"""Eq. 1 as a PEFT tuner. Knows nothing of schedules, scores or engines."""

# First and whole: its import ends with that of the modules below (see aflora_dist._registration).
import peft  # noqa: F401

from .adapted import Adapted
from .config import AFLoRAConfig
from .labels import label_mapping, read_labels
from .layer import AFLoRALayer
from .lora import save_as_lora, write_lora
from .model import AFLoRAModel
from .path import AFLoRAPath, lora_up

__all__ = [
    "AFLoRAConfig",
    "AFLoRALayer",
    "AFLoRAModel",
    "AFLoRAPath",
    "Adapted",
    "label_mapping",
    "lora_up",
    "read_labels",
    "save_as_lora",
    "write_lora",
]
