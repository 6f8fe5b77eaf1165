"""The DeepSpeed configuration that a launcher names: read in one place, and refused where it cannot be honoured.

Looked at before processes talk, data are read or a model is loaded. DeepSpeed itself ignores a key that it does not
know, sets learning rates by a scheduler of its own, and tells of other mistakes when the model is there.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .. import untrusted
from ..compat.contract import is_older
from ..errors import AFLoRAError
from ..extras import require
from ..options import Config

_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"

# Sections that say what train.* says.
_OURS = {
    "scheduler": "train.schedule, train.warmup_ratio and the learning rates are the schedule",
    "optimizer": "train.optimizer, train.learning_rate, train.head_learning_rate and train.weight_decay say which",
}
_UNUSED = {  # features of DeepSpeed's own data loader and model, which `aflora train` does not use
    "data_efficiency": "data.* says what is trained on",
    "hybrid_engine": "it is for generating while training",
    "expert_parallel": "train mixture-of-experts layers without DeepSpeed-MoE",
    "autotuning": "the launcher `deepspeed --autotuning` alone reads it",
}
_UNUSED_KEYS = {  # which DeepSpeed passes over here, or fails at
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"} for it',
    "sequence_parallel_size": "ranks share the data alone",
    "pipeline.stages": "ranks share the data alone",
    "compile.deepcompile": "it would compile before matrices freeze",
}
_SECTIONS = ("zero_optimization", "fp16", "bf16")
# What accelerate fills in; with "auto" anywhere else it ends in an error of its own.
_FILLED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
    "zero_optimization.stage",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
}
# Top-level keys that DeepSpeed or accelerate reads.
_KNOWN = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("managed_gradient_accumulation", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
    *("communication_data_type", "seq_parallel_communication_data_type", "sequence_parallel_size"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather"),
    *("fp16", "bf16", "torch_autocast", "data_types", "optimizer", "scheduler"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc"),
    *("flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "timers", "vocabulary_size"),
    *("activation_checkpointing", "aio", "checkpoint", "datastates_ckpt", "dataloader_drop_last", "compile"),
    *("pipeline", "tensor_parallel", "expert_parallel", "use_data_before_expert_parallelism"),
    *("autotuning", "data_efficiency", "hybrid_engine", "weight_quantization"),
}
_SINCE = {"managed_gradient_accumulation": "0.19.5", "gradient_allreduce_op": "0.19.6", "disable_python_gc": "0.19.8"}


def in_use() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def check_file(config: Config, processes: int) -> None:
    """Raise an AFLoRAError if DeepSpeed is asked for what cannot be done, or for something else than `config` says.

    Args:
        processes: How many there are; more may be needed later (see `contradicted`).
    """
    if not in_use():
        return
    require("deepspeed", "ZeRO, which the launcher asks for,")
    where, settings = _asked_for()
    for section in _SECTIONS:
        if not isinstance(settings.get(section, {}), dict):
            raise AFLoRAError(f'{where}: {section} must be an object, as in "{section}": {{...}}.')
    _raise_all(
        where,
        [
            *_keys(settings),
            *_contradictions(config, processes, config.train.accumulation, settings),
            *_precision(settings),
            *_taken_by_deepspeed(settings),
        ],
    )


@contextmanager
def told_of_refusals() -> Iterator[None]:
    """Turn what DeepSpeed refuses only when it is given the model into an error that names the file."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        if isinstance(error, AFLoRAError) or not in_use():
            raise
        _raise_all(_asked_for()[0], _complaints(error))


def compiled_ops() -> list[str]:
    """The ops that DeepSpeed compiles, at their first use on a machine, for this job."""
    if not in_use():
        return []
    from deepspeed.accelerator import get_accelerator

    _, settings = _asked_for()
    device = (settings.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    ops = {"deepspeed_shm_comm": get_accelerator().device_name() == "cpu", "cpu_adam": device not in ("none", "auto")}
    return [op for op, needed in ops.items() if needed]


def values(config: Config, processes: int, micro_batches: int) -> dict[str, float]:
    """What `config` comes to in DeepSpeed's words."""
    return {
        # Micro-batches differ in size; DeepSpeed only reports this number.
        "train_micro_batch_size_per_gpu": max(config.train.batch_size // (processes * micro_batches), 1),
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": config.train.max_grad_norm,
    }


def contradicted(config: Config, processes: int, micro_batches: int) -> None:
    """Raise an AFLoRAError if the file gives a number that is not what the configuration comes to.

    Args:
        micro_batches: Of an update, on each rank; the data decide, so it is looked at again when they are known.
    """
    where, settings = _asked_for()
    _raise_all(where, _contradictions(config, processes, micro_batches, settings))


def _contradictions(config: Config, processes: int, micro_batches: int, settings: Mapping[str, Any]) -> Iterator[str]:
    ours = {**values(config, processes, micro_batches), "train_batch_size": config.train.batch_size}
    option = {"gradient_clipping": "train.max_grad_norm comes", "train_batch_size": "train.batch_size comes"}
    for key, value in ours.items():
        if settings.get(key, "auto") not in ("auto", value):
            yield (
                f"it says {key}={json.dumps(settings[key])}, but {option.get(key, 'train.* and data.* come')} to "
                f'{value}. Write "auto" there, or leave it out.'
            )


def _asked_for() -> tuple[str, dict[str, Any]]:
    """Where the settings stand, for messages, and what they are."""
    source = os.environ.get(_FILE)
    if source and source != "none":
        return _read(source)
    said = {
        "zero_optimization": {
            "stage": _number("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
            "offload_optimizer": {"device": os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")},
            "offload_param": {"device": os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")},
        }
    }
    for key, default in (("gradient_clipping", None), ("gradient_accumulation_steps", 1)):
        number = _number(f"ACCELERATE_{key.upper()}", "auto")
        if number not in ("auto", "none", default):  # 1 is what accelerate's questionnaire suggests
            said[key] = number
    return "The launcher's DeepSpeed configuration", said


def _number(variable: str, default: str) -> Any:
    text = os.environ.get(variable, default)
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _read(source: str) -> tuple[str, dict[str, Any]]:
    """The settings in a file; accelerate takes JSON, or JSON in base64, in place of a file's name, too."""
    where = f"DeepSpeed's file {source}"
    if not os.path.exists(source):
        from accelerate.utils.deepspeed import HfDeepSpeedConfig

        try:
            return f"DeepSpeed's configuration in {_FILE}", HfDeepSpeedConfig(source).config
        except ValueError:
            raise AFLoRAError(
                f"There is no file {source}, which the launcher names as DeepSpeed's (deepspeed_config_file). A "
                f"relative name starts at the folder that the job is started in, here {Path.cwd()}."
            ) from None
    try:
        settings = untrusted.load_json(Path(source).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise AFLoRAError(f"{where} could not be read: {error.strerror or error}.") from None
    except ValueError as error:  # no UTF-8, or no JSON
        raise AFLoRAError(f"{where} cannot be taken as JSON: {str(error)[:100]}.") from None
    if not isinstance(settings, dict):
        raise AFLoRAError(f"{where} must hold an object, {{...}}, not {json.dumps(settings)[:40]}.")
    return where, settings


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that stands twice, accelerate would take the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'it gives "{key}" twice: keep one')
        found[key] = value
    return found


def _raise_all(where: str, complaints: Iterable[str]) -> None:
    """Raise for all of them at once: a file is corrected in one go."""
    if found := list(complaints):
        raise AFLoRAError(f"{where}: {found[0]}" if len(found) == 1 else "\n  - ".join([f"{where}:", *found]))


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _known() -> set[str]:
    """The keys that the installed DeepSpeed reads."""
    return _KNOWN - {key for key, release in _SINCE.items() if is_older("deepspeed", release)}


def _keys(settings: Mapping[str, Any]) -> Iterator[str]:
    """What has to go, or to change, whatever it stands beside."""
    for section, instead in _OURS.items():
        if section in settings:
            yield f'it has a section "{section}": remove it; {instead}.'
    for key in settings:
        if key not in _known():
            close = get_close_matches(key, _known(), n=1) if key[:1] != "_" else []  # "_comment"
            hint = f'did you mean "{close[0]}"?' if close else "remove it."
            yield f'DeepSpeed does not know "{key}", and may ignore it: {hint}'
    for section, instead in _UNUSED.items():
        asked = settings.get(section)
        if isinstance(asked, dict) and asked.get("enabled", False) is not False:
            yield f'"{section}" cannot be honoured: remove it; {instead}.'
    for key, value in _leaves(settings):
        if key in _UNUSED_KEYS and value not in (False, None, 0, "auto") and (value is True or value != 1):
            yield f"{key}={json.dumps(value)} cannot be honoured: remove it; {_UNUSED_KEYS[key]}."
        if value == "auto" and key not in _FILLED and key.partition(".")[0] not in _OURS:
            yield f'nothing can be filled in for {key}="auto". Give a value, or remove the key.'


def _mixed_precision(settings: Mapping[str, Any]) -> dict[str, bool]:
    """Whether fp16 and bf16 are asked for, by the file or by --mixed_precision."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    asked = {kind: settings.get(kind, {}).get("enabled", kind not in settings and "auto") for kind in ("fp16", "bf16")}
    return {kind: launched == kind if enabled == "auto" else enabled for kind, enabled in asked.items()}


def _precision(settings: Mapping[str, Any]) -> Iterator[str]:
    """What accelerate and DeepSpeed take silently, or refuse when the model is there; that both agree they see to."""
    from deepspeed.accelerator import get_accelerator  # takes seconds; needed in a moment anyhow

    launched, device = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower(), get_accelerator()
    supported = {"fp16": device.is_fp16_supported, "bf16": device.is_bf16_supported}
    for kind, enabled in _mixed_precision(settings).items():
        if not isinstance(enabled, bool):
            yield f'{kind}.enabled must be true, false or "auto", not {json.dumps(enabled)}.'
        elif launched == kind and not enabled:
            yield f'it switches {kind} off, but --mixed_precision {kind} asks for it: write "auto".'
        elif enabled and not supported[kind]():
            yield (
                f"it, or --mixed_precision, asks for {kind}, which DeepSpeed does not do on this device "
                f"({device.device_name()}). Use --mixed_precision {'bf16' if kind == 'fp16' else 'no'}."
            )


def _taken_by_deepspeed(settings: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed itself has against them, which it would say later, or else the engines."""
    from deepspeed import DeepSpeedConfig

    from ..engines.deepspeed import check_settings

    stage = settings.get("zero_optimization", {}).get("stage")
    if stage == "auto":
        stage = _number("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if isinstance(stage, bool) or stage not in (1, 2, 3):  # DeepSpeed takes "3", which to accelerate is none
        yield (
            f"zero_optimization.stage is {json.dumps(stage)}; it must be 1, 2 or 3. Without DeepSpeed: launch/ddp.yaml."
        )
        return
    filled = _without_autos({key: value for key, value in settings.items() if key in _KNOWN - _OURS.keys()})
    filled["zero_optimization"]["stage"] = stage
    # Without train_batch_size: it would have to be that of all ranks, once DeepSpeed knows of them.
    filled |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    filled.pop("train_batch_size", None)
    for kind, enabled in _mixed_precision(settings).items():
        filled[kind] = {**filled.get(kind, {}), "enabled": enabled}
    try:
        check_settings(DeepSpeedConfig(filled))
    except AFLoRAError as error:
        yield str(error)
    except Exception as error:  # pydantic's, DeepSpeed's own, AssertionError, TypeError, ...
        yield from _complaints(error)


def _without_autos(settings: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in settings.items():
        if value != "auto":
            result[key] = _without_autos(value) if isinstance(value, dict) else copy.deepcopy(value)
    return result


def _complaints(error: Any) -> Iterator[str]:
    """What DeepSpeed has against a configuration, each in a line."""
    if not hasattr(error, "errors"):  # pydantic's ValidationError has them
        yield f"DeepSpeed cannot take it: {(str(error) or type(error).__name__).splitlines()[0].rstrip('.')}."
        return
    sections = {
        "DeepSpeedZeroConfig": "zero_optimization",
        "DeepSpeedFP16Config": "fp16",
        "DeepSpeedBF16Config": "bf16",
    }
    refused: Any = error
    for found in refused.errors():
        place = ".".join([sections.get(refused.title, refused.title), *map(str, found["loc"])])
        yield f"{place}={json.dumps(found['input'], default=str)[:40]}: {found['msg'].rstrip('.')}."
