"""Eq. 1 as a PEFT tuner. Knows nothing of schedules, scores or engines."""

# First and whole: its import ends with that of the modules below (see aflora_dist._registration).
import peft  # noqa: F401

from .adapted import Adapted
from .architectures import ARCHITECTURES, default_targets, kind_of, target_modules
from .config import AFLoRAConfig
from .folding import Folding
from .labels import label_mapping, read_labels
from .layer import AFLoRALayer
from .lora import save_as_lora, write_lora
from .model import AFLoRAModel
from .path import AFLoRAPath, lora_up
from .precision import beyond_float16, check_precision, widen
from .saving import names_to_save, save_peft, state_dict_of

__all__ = [
    "ARCHITECTURES",
    "AFLoRAConfig",
    "AFLoRALayer",
    "AFLoRAModel",
    "AFLoRAPath",
    "Adapted",
    "Folding",
    "beyond_float16",
    "check_precision",
    "default_targets",
    "kind_of",
    "label_mapping",
    "lora_up",
    "names_to_save",
    "read_labels",
    "save_as_lora",
    "save_peft",
    "state_dict_of",
    "target_modules",
    "widen",
    "write_lora",
]
