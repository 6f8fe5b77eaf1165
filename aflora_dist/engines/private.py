"""torch's and accelerate's private interfaces that the engines use (see aflora_dist/compat/contract.py)."""

from __future__ import annotations

from ..compat.contract import Private

_DDP = "DistributedDataParallel"

REDUCER = [
    Private(_DDP, name, "give DDP a reducer over the parameters that still train", "a public way to rebuild a reducer")
    for name in (
        "_build_params_for_reducer",
        "_build_debug_param_to_name_mapping",
        "_ddp_init_helper",
        "_comm_hooks",
        "static_graph",
        "require_backward_grad_sync",
    )
]
AUTOGRAD = [
    Private(
        "torch.autograd.Variable",
        "_execution_engine",
        "learn when a backward pass has ended (queue_callback)",
        "a public hook at the end of a backward pass",
    )
]
SCALING = [
    Private(
        "torch.optim.AdamW",
        "_step_supports_amp_scaling",
        "have GradScaler unscale a fused optimizer's gradients where they are seen",
        "an option of GradScaler",
    )
]
STORE = [
    Private(
        "torch.distributed.distributed_c10d",
        "_get_default_store",
        "have ranks wait for each other where nothing times out",
        "a public way to a process group's store",
    )
]
ACCELERATOR = [
    Private("Accelerator", "_optimizers", "find the wrapper that knows of skipped updates", "a public list of them"),
    Private("Accelerator", "_models", "number the state of several models as accelerate does", "a public list of them"),
    Private("Accelerator", "_schedulers", "know whether DeepSpeed's schedule was asked for", "a public list of them"),
]
PRIVATE = {"torch": REDUCER + AUTOGRAD + SCALING + STORE, "accelerate": ACCELERATOR}
