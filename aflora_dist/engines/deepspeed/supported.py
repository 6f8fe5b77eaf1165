"""Refuses features of DeepSpeed under which freezing would be wrong, each with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer

from ...compat.accelerate import unwrap
from ...errors import UnsupportedEngineError
from ..optimizers import inner_optimizer, name_of_class

CLIPS_BY_ITSELF = (
    "DeepSpeed clips by itself, {at}, and accelerator.clip_grad_norm_(..., {norm:g}) changes nothing under it. Write "
    '"gradient_clipping": {norm:g} into its configuration: for "auto" accelerate takes 1.0.'
)


def check_settings(settings: Any) -> None:
    """Raise an UnsupportedEngineError for what a `DeepSpeedConfig` asks for and freezing would be wrong under."""
    config = settings.zero_config
    offload, offload_param = config.offload_optimizer, config.offload_param
    fp16, bf16 = settings.float16_config, settings.bfloat16_config
    scatters = config.stage > 1 and bool(config.reduce_scatter)
    _refuse(
        {
            "ZeRO stage 0": (config.stage == 0, "use stage 1, 2 or 3, or plain DDP without DeepSpeed"),
            "optimizer offload to NVMe": (offload is not None and offload.device == "nvme", 'set "device": "cpu"'),
            "parameter offload to NVMe": (
                offload_param is not None and offload_param.device == "nvme",
                'set "device": "cpu"',
            ),
            "partial optimizer offload (ratio < 1)": (offload is not None and offload.ratio < 1.0, 'set "ratio": 1.0'),
            "super_offload": (offload is not None and bool(offload.super_offload), "remove it"),
            "ZenFlow": (config.zenflow is not None, "remove zero_optimization.zenflow"),
            "round_robin_gradients": (bool(config.round_robin_gradients), 'set "round_robin_gradients": false'),
            "ZeRO++ (hpz, quantized weights or gradients)": (
                config.zero_hpz_partition_size > 1
                or bool(config.zero_quantized_weights)
                or bool(config.zero_quantized_nontrainable_weights)
                or bool(config.zero_quantized_gradients),
                "remove these keys",
            ),
            "MiCS": (getattr(config, "mics_shard_size", -1) > 0, "remove mics_shard_size"),
            "tensor parallelism": (
                settings.tensor_parallel_config.autotp_size > 1,
                "use data parallelism: remove tensor_parallel",
            ),
            "16-bit master weights or optimizer states": (
                bool(fp16.fp16_master_weights_and_grads)
                or bool(bf16.bf16_master_weights_and_grads)
                or bool(bf16.bf16_optimizer_states),
                "remove these keys",
            ),
            "torch_autocast": (bool(settings.torch_autocast_enabled), 'use "bf16": {"enabled": true}'),
            "gradient_predivide_factor with ZeRO-2 or 3": (
                settings.gradient_predivide_factor != 1.0 and (scatters or config.stage == 3),
                "remove it",
            ),
            "prescale_gradients with ZeRO-2 or 3": (bool(settings.prescale_gradients) and scatters, "remove it"),
            "gradient_allreduce_op: sum": (
                getattr(settings, "gradient_allreduce_op", "mean") != "mean",
                "gradients are means over the ranks: remove it",
            ),
            "managed_gradient_accumulation: false": (
                not getattr(settings, "managed_gradient_accumulation", True),
                "let accelerate manage the accumulation",
            ),
        }
    )


def check_supported(ds: Any) -> None:
    """Raise an UnsupportedEngineError for features of DeepSpeed under which freezing would be wrong."""
    check_settings(ds._config)
    optimizer = name_of_class(ds.basic_optimizer)
    _refuse(
        {
            "mixture-of-experts layers": (bool(ds.has_moe_layers), "train them without DeepSpeed-MoE"),
            "pipeline parallelism": (bool(ds.pipeline_parallelism), "use data parallelism"),
            "sequence parallelism": (ds.sequence_parallel_size > 1, "use data parallelism"),
            f"the {optimizer} optimizer": (
                "Muon" in optimizer or "OneBit" in optimizer or "ZeroOne" in optimizer,
                "use an element-wise optimizer such as AdamW",
            ),
            f"own {name_of_class(getattr(ds.optimizer, 'optimizer', None))} in place of the {optimizer} it was given": (
                getattr(ds.optimizer, "optimizer", ds.basic_optimizer) is not ds.basic_optimizer,
                "use torch.optim.AdamW",
            ),
            f"ZeRO stage {ds.zero_optimization_stage()} as {type(ds.optimizer).__name__}": (
                type(ds.optimizer).__name__ not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"),
                "use ZeRO-2, or remove data_types.grad_accum_dtype",
            ),
        }
    )


def check_prepared(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    """Raise an UnsupportedEngineError unless these are model and optimizer of the accelerator's DeepSpeedEngine."""
    wrapper = accelerator.deepspeed_engine_wrapped
    if wrapper is None:
        raise UnsupportedEngineError("Pass the model through accelerator.prepare() before AdaptiveFreezing.")
    ds, inner = wrapper.engine, inner_optimizer(optimizer)
    ours = unwrap(accelerator, model) is unwrap(accelerator, ds.module)
    if not ours or (inner is not ds.optimizer and inner is not ds.basic_optimizer):
        raise UnsupportedEngineError(
            f"With DeepSpeed an accelerator trains one model, the first that its prepare() was given, and "
            f"AdaptiveFreezing was given another {'optimizer' if ours else 'model'} than that one's. Pass what this "
            f"accelerator's prepare() returned; each further model is trained by an Accelerator of its own."
        )


def check_groups(optimizer: Optimizer, groups: int) -> None:
    """Raise an UnsupportedEngineError for param groups that came after DeepSpeed, which has no place for them."""
    if (added := len(optimizer.param_groups) - groups) > 0:
        raise UnsupportedEngineError(
            f"The optimizer was given {added} more param group{'s' * (added > 1)} (add_param_group), which DeepSpeed "
            f"does not train: it has those that there were at accelerator.prepare(). Create the optimizer with all of "
            f"them before accelerator.prepare()."
        )


def check_one_update(updates: int) -> None:
    """Raise an UnsupportedEngineError for anything but one update of DeepSpeed's for one optimizer.step()."""
    if not updates:
        raise UnsupportedEngineError(
            "optimizer.step() was called, but DeepSpeed has made no update: its update is part of "
            "accelerator.backward(loss). Call that instead of loss.backward()."
        )
    if updates > 1:
        raise UnsupportedEngineError(
            f"DeepSpeed has made {updates} updates for one optimizer.step(), one for each accelerator.backward(): "
            f"accumulate in `with accelerator.accumulate(model):`, or add the losses up before the backward pass."
        )


def _refuse(problems: Mapping[str, tuple[bool, str]]) -> None:
    """Raise for the features that are there, each with its remedy."""
    if found := [f"{feature}: {remedy}" for feature, (present, remedy) in problems.items() if present]:
        raise UnsupportedEngineError(f"Freezing does not support DeepSpeed's {'; nor '.join(found)}.")
