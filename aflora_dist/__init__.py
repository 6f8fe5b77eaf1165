"""AFLoRA (ACL 2024) under `accelerate launch`: low-rank adapters whose projection matrices freeze
one by one while training, exactly the same on every rank and on every engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._registration import register_with_peft
from .errors import AFLoRAError, DamagedError, DivergedError, ExistsError, StepError, UnsupportedEngineError
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .adapter import AFLoRAConfig, AFLoRAModel, save_as_lora
    from .control import AdaptiveFreezing, FreezeEvent, FreezingConfig, Progress
    from .trainer import FreezingCallback

__all__ = [
    "AFLoRAConfig",
    "AFLoRAError",
    "AFLoRAModel",
    "AdaptiveFreezing",
    "DamagedError",
    "DivergedError",
    "ExistsError",
    "FreezeEvent",
    "FreezingCallback",
    "FreezingConfig",
    "Progress",
    "StepError",
    "UnsupportedEngineError",
    "save_as_lora",
]

# Imported when first asked for: they need torch and transformers, which take seconds.
_LATER = {
    "AFLoRAConfig": ".adapter",
    "AFLoRAModel": ".adapter",
    "save_as_lora": ".adapter",
    "AdaptiveFreezing": ".control",
    "FreezeEvent": ".control",
    "FreezingConfig": ".control",
    "Progress": ".control",
    "FreezingCallback": ".trainer",
}

if not TYPE_CHECKING:  # a type checker would take any name to be here

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_LATER[name], __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


register_with_peft()
