"""What DeepSpeed's ZeRO stages have in common. With zero12.py and zero3.py the only user of DeepSpeed's
private interface."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import UnsupportedEngineError
from ...freezing import Fragment
from ..base import Engine, Observer, ParameterState, release, split_state


class ZeroEngine(Engine):
    """A DeepSpeedEngine at ZeRO stage 1, 2 or 3.

    ZeRO replaces the parameters of the inner torch optimizer by flat float32 partitions, one per
    param group (stage 3: per sub-group), and calls the inner optimizer once for each, with the
    partition's averaged, unscaled and clipped gradient, and only if the update is not skipped. A
    step pre-hook of the inner optimizer is thus where gradients are seen, one partition a bucket.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        wrapper = accelerator.deepspeed_engine_wrapped
        assert wrapper is not None
        self.ds: Any = wrapper.engine
        super().__init__(self.ds.module)
        self.accelerator = accelerator
        self.kind = f"zero{self.ds.zero_optimization_stage()}"
        self._inner: Optimizer = self.ds.basic_optimizer
        # Whose parameters each param group of the inner optimizer holds, by position: groups that
        # run empty keep their position, since schedulers address them by it.
        self._groups: list[list[str]] = [[] for _ in self._inner.param_groups]
        for index, parameters in self._group_parameters():
            self._groups[index].extend(self.names[p] for p in parameters)
        self._stand_in: Optimizer | None = None
        self._loss_scale = 1.0
        self._observed: list[list[tuple[Fragment, int]]] = []  # per partition: fragment, place in it

    # -- what the stages differ in -----------------------------------------------------------

    @abstractmethod
    def _group_parameters(self) -> list[tuple[int, list[nn.Parameter]]]:
        """(param group of the inner optimizer, its model parameters) for each flat partition."""

    @abstractmethod
    def _partitions(self) -> list[Tensor]:
        """The flat float32 partitions that the inner optimizer updates."""

    @abstractmethod
    def _layout(self) -> list[list[tuple[Fragment, int]]]:
        """For each partition: this rank's fragments and where in the partition each begins."""

    @abstractmethod
    def _combined_scale(self) -> Tensor | float:
        """What DeepSpeed divided the loss-scaled gradient by: the loss scale times the clip factor."""

    @abstractmethod
    def _replace(self, dropped: Sequence[nn.Parameter]) -> None:
        """Make a new ZeRO optimizer over the inner optimizer's params and free the old one."""

    @abstractmethod
    def _publish(self, state: Mapping[str, ParameterState]) -> None:
        """Bring `state`'s values, which the float32 partitions hold, into the model's own weights."""

    # -- shared ------------------------------------------------------------------------------

    def _positions(self) -> list[int]:
        """Where each param group that ZeRO sees stands in the inner optimizer's list."""
        groups = self._inner.param_groups
        return [next(i for i, g in enumerate(groups) if g is group) for group in self.zero.optimizer.param_groups]

    @property
    def zero(self) -> Any:
        return self.ds.optimizer

    @property
    def optimizer(self) -> Optimizer:
        return self._inner

    @property
    def trainable(self) -> list[str]:
        return [name for group in self._groups for name in group]

    def watch(self, observe: Observer, updated: Callable[[], None]) -> None:
        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            partition = next(p for group in optimizer.param_groups for p in group["params"])
            bucket = next(i for i, flat in enumerate(self._partitions()) if flat is partition)
            if not (spans := self._observed[bucket]):
                return
            observe(
                bucket,
                [partition.grad[at : at + f.numel] for f, at in spans],
                lambda: [partition.detach()[at : at + f.numel] for f, at in spans],
                torch.as_tensor(self._combined_scale() / self._loss_scale).to(partition.device),
            )

        original_step = self.ds.step

        def step(*args: Any, **kwargs: Any) -> None:
            # DeepSpeed adjusts its loss scale before it unscales; the gradients have this one.
            self._loss_scale = float(self.zero.loss_scale)
            original_step(*args, **kwargs)
            if self.ds.was_step_applied():
                updated()

        self.ds.step = step
        self._handles.append(lambda: self.ds.__dict__.pop("step"))
        self._handles.append(self._inner.register_step_pre_hook(before).remove)

    def buckets(self, names: Sequence[str]) -> list[list[Fragment]]:
        wanted = set(names)
        self._observed = [[(f, at) for f, at in spans if f.name in wanted] for spans in self._layout()]
        return [[f for f, _ in spans] for spans in self._observed]

    def bucket_devices(self) -> list[torch.device]:
        return [flat.device for flat in self._partitions()]  # the CPU under optimizer offload

    def state(self) -> dict[str, ParameterState]:
        layouts, partitions = self._layout(), self._partitions()
        held = [split_state(self._inner.state.get(flat, {}), flat.numel()) for flat in partitions]
        keys = sorted({key for moments, _ in held for key in moments})
        numels = {name: self.numel(name) for name in self.trainable}
        pieces = []
        for flat, (moments, _), spans in zip(partitions, held, layouts, strict=True):
            rows = torch.stack([flat.detach().float(), *(moments[key].float() for key in keys if key in moments)])
            pieces += [(f, rows[:, at : at + f.numel]) for f, at in spans]
        whole = self.gather(pieces, numels, rows=1 + len(keys))
        states = {name: ParameterState(rows[0], dict(zip(keys, rows[1:], strict=True))) for name, rows in whole.items()}
        for (_, parameters), (_, scalars) in zip(self._group_parameters(), held, strict=True):
            for parameter in parameters:
                states[self.names[parameter]].scalars = scalars
        return states

    @torch.no_grad()
    def rebuild(self, state: Mapping[str, ParameterState]) -> None:
        dropped = [self.parameters[name] for name in self.trainable if name not in state]
        for parameter in dropped:
            release(parameter)
        self._groups = [[name for name in group if name in state] for group in self._groups]
        self._inner.state.clear()
        for group, names in zip(self._inner.param_groups, self._groups, strict=True):
            group["params"] = [self.parameters[name] for name in names]
        self._replace(dropped)
        self._keep_positions()
        for wrapped in self.accelerator._optimizers:
            wrapped.optimizer = self.zero
        for (_, members), flat, spans in zip(self._group_parameters(), self._partitions(), self._layout(), strict=True):
            first = state[self.names[members[0]]]
            moments = {key: torch.zeros_like(flat) for key in first.moments}
            for fragment, at in spans:
                held, whole = state[fragment.name], slice(fragment.start, fragment.start + fragment.numel)
                flat.data[at : at + fragment.numel] = held.value[whole].to(flat.device)
                for key, moment in moments.items():
                    moment[at : at + fragment.numel] = held.moments[key][whole].to(flat.device)
            self._inner.state[flat] = {**copy.deepcopy(first.scalars), **moments}
        self._publish(state)

    def scaling(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self.zero.loss_scaler).items() if isinstance(value, int | float)}

    def restore_scaling(self, scaling: Mapping[str, Any]) -> None:
        vars(self.zero.loss_scaler).update(scaling)

    def moment_bytes(self) -> int:
        total = 0
        for flat, spans in zip(self._partitions(), self._layout(), strict=True):
            moments, _ = split_state(self._inner.state.get(flat, {}), flat.numel())
            total += sum(f.numel for f, _ in spans) * sum(m.element_size() for m in moments.values())
        return total

    def _visible_groups(self) -> Optimizer:
        """The inner optimizer as ZeRO can take it: without the param groups that have run empty.

        The stand-in shares group dicts, state and hooks with the user's optimizer, so learning
        rates set there are seen here. There is one, and it lives as long as the engine: an
        optimizer that owns native memory (CPU Adam) frees it with the first object to go.
        (copy.copy would not do: torch's optimizers leave hooks and extra attributes out.)
        """
        if all(group["params"] for group in self._inner.param_groups):
            return self._inner
        if self._stand_in is None:
            self._stand_in = object.__new__(type(self._inner))
            self._stand_in.__dict__.update(self._inner.__dict__)
            self._stand_in.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the original
        self._stand_in.param_groups = [group for group in self._inner.param_groups if group["params"]]
        return self._stand_in

    def _keep_positions(self) -> None:
        """Have the new ZeRO optimizer show all param groups, empty ones too, to who asks for them.

        The user's handle leads to it, and schedulers address groups by position.
        """
        inner, kind = self._inner, type(self.zero)
        if self.zero.optimizer is not inner:
            shown = property(lambda zero: inner.param_groups)
            self.zero.__class__ = type(kind.__name__, (kind,), {"param_groups": shown})


def check_supported(ds: Any) -> None:
    """Refuse DeepSpeed features under which freezing would be wrong, before any step is taken.

    Raises:
        UnsupportedEngineError: Names the feature and what to use instead.
    """
    zero = ds._config.zero_config
    optimizer = type(ds.basic_optimizer).__name__
    offload = zero.offload_optimizer
    offload_param = zero.offload_param
    problems = {
        "ZeRO stage 0": (ds.zero_optimization_stage() == 0, "use stage 1, 2 or 3, or plain DDP without DeepSpeed"),
        "optimizer offload to NVMe": (offload is not None and offload.device == "nvme", 'set "device": "cpu"'),
        "parameter offload to NVMe": (
            offload_param is not None and offload_param.device == "nvme",
            'set "device": "cpu"',
        ),
        "partial optimizer offload (ratio < 1)": (offload is not None and offload.ratio < 1.0, 'set "ratio": 1.0'),
        "super_offload": (offload is not None and bool(getattr(offload, "super_offload", False)), "remove it"),
        "ZenFlow": (bool(ds.zenflow), "remove zero_optimization.zenflow"),
        "round_robin_gradients": (bool(zero.round_robin_gradients), 'set "round_robin_gradients": false'),
        "ZeRO++ (hpz, quantized weights or gradients)": (
            zero.zero_hpz_partition_size > 1
            or bool(zero.zero_quantized_weights)
            or bool(zero.zero_quantized_nontrainable_weights)
            or bool(zero.zero_quantized_gradients),
            "remove these keys",
        ),
        "MiCS": (getattr(zero, "mics_shard_size", -1) > 0, "remove mics_shard_size"),
        "mixture-of-experts layers": (bool(ds.has_moe_layers), "train them without DeepSpeed-MoE"),
        "pipeline parallelism": (bool(ds.pipeline_parallelism), "use data parallelism"),
        "sequence parallelism": (getattr(ds, "sequence_parallel_size", 1) > 1, "use data parallelism"),
        "16-bit master weights or optimizer states": (
            bool(ds.fp16_master_weights_and_gradients())
            or bool(ds.bf16_master_weights_and_gradients())
            or bool(ds.bf16_optimizer_states()),
            "remove these keys",
        ),
        "torch_autocast": (bool(ds.torch_autocast_enabled()), 'use "bf16": {"enabled": true}'),
        "managed_gradient_accumulation: false": (
            not ds.managed_gradient_accumulation(),
            "let accelerate manage the accumulation",
        ),
        f"the {optimizer} optimizer": (
            "Muon" in optimizer or "OneBit" in optimizer or "ZeroOne" in optimizer,
            "use an element-wise optimizer such as AdamW",
        ),
        f"ZeRO stage {ds.zero_optimization_stage()} as {type(ds.optimizer).__name__}": (
            type(ds.optimizer).__name__ not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"),
            "use ZeRO-2, or remove data_types.grad_accum_dtype",
        ),
    }
    for feature, (present, remedy) in problems.items():
        if present:
            raise UnsupportedEngineError(f"AFLoRA's freezing does not support DeepSpeed's {feature}: {remedy}.")
