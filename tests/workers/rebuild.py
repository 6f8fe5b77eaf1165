"""Looks at a rebuild from inside, by means other than the engine's own. Run under `accelerate launch`."""

from __future__ import annotations

import gc
import os
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aflora_dist import AdaptiveFreezing, FreezingConfig
from aflora_dist.engines import Engine
from tests.workers.tiny import GLOBAL_BATCH, build_model, build_optimizer, global_batch


def moments_by_other_means(engine: Engine) -> dict[str, Tensor]:
    """Adam's exp_avg as torch (DDP) or DeepSpeed's public functions give it."""
    if engine.kind in ("ddp", "fsdp2"):
        state = engine.optimizer.state
        found = {name: state[engine.parameters[name]]["exp_avg"].clone() for name in engine.trainable}
        return {name: m.full_tensor() if isinstance(m, DTensor) else m for name, m in found.items()}
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    zero: Any = engine.zero
    if engine.kind == "zero3":
        get = safe_get_local_optimizer_state
    else:
        get = safe_get_full_optimizer_state
        zero._hp_optimizer_states_linked = False  # links the first group too early by itself
        zero._lazy_init_hp_params_optimizer_state()
    return {name: get(engine.parameters[name], "exp_avg").clone() for name in engine.trainable}


class ReduceScatters(TorchDispatchMode):
    """Counts the elements that go into reduce-scatters, which FSDP2 calls below torch.distributed's functions."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in func.name():
            self.elements += max(t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


class Traffic:
    """Counts the elements that go through torch.distributed's reductions."""

    NAMES = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter")

    def __init__(self, engine: Engine) -> None:
        self.elements = 0
        if engine.kind == "ddp":

            def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations
                self.elements += bucket.buffer().numel()
                future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
                return future.then(lambda f: f.value()[0] / dist.get_world_size())

            engine.ddp.register_comm_hook(None, hook)  # must survive rebuilds
            return
        if engine.kind == "fsdp2":
            return  # counted by ReduceScatters
        import deepspeed.comm

        for module, name in [(dist, name) for name in self.NAMES] + [(deepspeed.comm, "reduce_scatter_fn")]:
            setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            self.elements += max((t.numel() for t in tensors), default=0)
            return original(*args, **kwargs)

        return call


def device_calls() -> Counter[str]:
    """Counts from now on what is asked of DeepSpeed's accelerator: a CPU has no cache, no peak and no streams."""
    from deepspeed.accelerator import get_accelerator

    calls: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(get_accelerator(), name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return original(*args)

        setattr(get_accelerator(), name, call)

    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        counted(name)
    return calls


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # A DTensor has no memory of its own: its local tensor is counted.
        if isinstance(thing, Tensor) and not isinstance(thing, DTensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main(arguments: list[str] | None = None) -> None:
    on_cpu = {"cpu": True} if os.environ.get("ACCELERATE_USE_FSDP") == "true" else {}
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **on_cpu)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH // accelerator.num_processes
        plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = 10_000
    model = build_model()
    calls = device_calls() if plugin is not None else Counter()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
    if plugin is not None and plugin.zero_stage < 3:
        assert calls["empty_cache"], "DeepSpeed flushes the allocator's cache when it makes an optimizer"
        assert calls["reset_peak_memory_stats"], "and starts the peak anew"
    flushed = calls["empty_cache"], calls["reset_peak_memory_stats"]
    freezing = AdaptiveFreezing(
        accelerator, model, optimizer, FreezingConfig(total_steps=1000, initial_steps=900, final_steps=10)
    )
    engine = freezing.engine
    traffic = Traffic(engine)

    def step(number: int) -> int:
        traffic.elements = 0
        share = GLOBAL_BATCH // accelerator.num_processes
        batch = {k: v[accelerator.process_index * share :][:share] for k, v in global_batch(number).items()}
        with ReduceScatters() if engine.kind == "fsdp2" else nullcontext() as scatters:
            accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        return scatters.elements if scatters is not None else traffic.elements

    model.train()
    counted = [step(number) for number in range(3)][-1]

    # survivors' moments, before and after half of the matrices have frozen
    before = moments_by_other_means(engine)
    sizes = freezing.trainable_params
    frozen = freezing.freezable[::2]
    parameters = {id(p) for p in engine.parameters.values()}
    freezing.freeze(list(frozen))
    after = moments_by_other_means(engine)
    assert set(before) - set(after) == set(frozen)
    for name, moment in after.items():
        assert torch.equal(moment, before[name]), name
    assert {id(p) for p in engine.model.parameters()} == parameters, "the model's parameters are not the same objects"
    assert all(not engine.parameters[n].requires_grad and engine.parameters[n].grad is None for n in frozen)

    # a frozen matrix holds memory of its own size, not a view that keeps the old flat buffer alive
    for name in frozen:
        parameter: Any = engine.parameters[name]
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for tensor in (local, getattr(parameter, "ds_tensor", local)):
            assert tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size(), name

    # nothing of a frozen matrix is communicated
    less = step(3)
    for _ in range(2):
        less = min(less, step(4))
    share = sizes - freezing.trainable_params
    assert share == sum(freezing.numels[n] for n in frozen)
    if engine.kind in ("ddp", "fsdp2"):
        assert counted - less == share, (counted, less, share)
    else:  # partitions are padded to the number of ranks
        assert abs(counted - less - share) <= 2 * len(after), (counted, less, share)

    # further rebuilds do not grow memory
    for _ in range(5):
        engine.drop([])
    at_first = tensor_bytes()
    for _ in range(50):
        engine.drop([])
    assert tensor_bytes() <= at_first, (at_first, tensor_bytes())
    again = moments_by_other_means(engine)
    step(5)
    assert again.keys() == after.keys()

    # but for DeepSpeed's own first time, the allocator's cache and its peak were left alone by all of them
    assert (calls["empty_cache"], calls["reset_peak_memory_stats"]) == flushed

    # what was loaded is there before DeepSpeed gathers it on a stream of its own
    waited = calls["synchronize"]
    if engine.kind == "zero3":
        engine.synchronise(engine.trainable)
        assert calls["synchronize"] == waited + 1

    # the state that is held is that of the vectors, the head and the remaining matrices
    moments = [s[key] for s in engine.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    held = sum((m.to_local() if isinstance(m, DTensor) else m).numel() for m in moments)
    total = torch.tensor([held])
    dist.all_reduce(total)
    copies = accelerator.num_processes if engine.kind == "ddp" else 1
    assert 0 <= total.item() - 2 * copies * freezing.trainable_params <= 8 * accelerator.num_processes * len(after)
    print(f"rank {os.environ['RANK']} of {engine.kind} ok\n", end="", flush=True)
    accelerator.end_training()
    os._exit(0)  # gloo's threads may still hold the Python hook above, and abort at a normal exit


if __name__ == "__main__":
    main()
