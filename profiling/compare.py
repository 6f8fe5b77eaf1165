"""The paper's systems claims, measured: methods side by side, interleaved step by step in one process.

    python -m profiling.compare --layers 3 --batch 8 --length 128          # two CPU cores, minutes
    python -m profiling.compare --batch 64 --length 256 --dtype bf16       # the paper's shape, on a GPU

Writes compare.json, compare.md, compare.png and TensorBoard events to --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from aflora_dist.freezing import CubicSchedule
from aflora_dist.processes import launched_accelerator
from aflora_dist.watch.peaks import peak_flops

from . import kernels
from .launches import count_calls, count_launches, per_call
from .methods import MORE_OF_PEFT, REFERENCES, Method, create, freeze_share
from .models import SHAPES, build
from .report import write_report, write_traces


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m profiling.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deberta-v3-base", help=f"{', '.join(SHAPES)}, a hub id, or a folder")
    parser.add_argument("--layers", type=int, help="keep only so many layers of a built-in shape")
    parser.add_argument("--batch", type=int, default=8, help="examples per rank and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per example")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "tf32", "bf16", "fp16"),
        default="fp32",
        help="bf16, fp16: autocast; tf32 and fp16 on GPUs only",
    )
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each method")
    parser.add_argument("--warmup", type=int, default=3, help="steps before measuring")
    parser.add_argument("--methods", nargs="+", help="some of the methods, or any other of PEFT's by name")
    parser.add_argument("--epochs", type=int, default=20, help="of the schedule to average AFLoRA over")
    parser.add_argument("--initial-epochs", type=float, default=1.0, help="t_i")
    parser.add_argument("--final-epochs", type=float, default=14.0, help="t_f")
    parser.add_argument("--steps-per-epoch", type=int, default=57, help="57: MRPC in batches of 64")
    parser.add_argument("--freeze-log", type=Path, help="average trainable parameters over this run's freeze_log.jsonl")
    parser.add_argument("--compile", action="store_true", help="time the steps under torch.compile")
    parser.add_argument("--kernels", action="store_true", help="AFLoRA through the Triton kernels (docs/gpu.md)")
    parser.add_argument("--trace", action="store_true", help="also write a profiler trace of each method")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the report, and return what compare.json holds."""
    args = arguments(argv)
    with kernels.used() if args.kernels else nullcontext():
        return measure(args)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    check_dtype(args.dtype)
    needed = ("aflora_training", "aflora_half", "aflora_frozen", "lora", "elora", "floor")  # the ratios need them
    names = [*REFERENCES, *MORE_OF_PEFT] if args.methods is None else [*args.methods, *needed]
    optional = () if args.methods is not None else MORE_OF_PEFT
    precision = args.dtype if args.dtype in ("bf16", "fp16") else "no"
    accelerator = launched_accelerator(mixed_precision=precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype == "tf32"
    torch.manual_seed(0)
    base = build(args.model, args.layers).to(accelerator.device)
    batch = random_batch(base, args.batch, args.length, accelerator.device)
    methods, left_out = start(names, optional, base, batch, accelerator)
    measured = {method.name: describe(method, batch, accelerator) for method in methods}
    floor = next(method for method in methods if method.name == "floor")
    add_launches(measured, methods, count(floor, batch, accelerator, in_float32=True), batch, accelerator)
    if args.compile:  # after counting: a compiled graph hides its operators from the counters
        for method in methods:
            method.model = torch.compile(method.model)  # type: ignore[assignment]
    time_steps(methods, batch, accelerator, args)
    for method in methods:
        measured[method.name] |= timing(method)
    if args.trace:
        write_traces(methods, batch, accelerator, args.out)
    measured["aflora"] = over_schedule(measured, args)
    add_rates(measured, args, accelerator)
    report = {
        "setting": setting(args, accelerator),
        "methods": measured,
        "left_out": left_out,
        "outputs_cast": [method.name for method in methods if method.casts_outputs],
    }
    if accelerator.is_main_process:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "compare.json").write_text(json.dumps(report, indent=2) + "\n")
        write_report(report, {method.name: method.seconds for method in methods}, args.out)
        print((args.out / "compare.md").read_text())
        print(f"tensorboard --logdir {args.out / 'tensorboard'} shows it{', with traces' if args.trace else ''}.")
    accelerator.end_training()
    return report


def random_batch(base: nn.Module, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    config: Any = base.config
    tokens = torch.randint(1, config.vocab_size, (batch, length))
    labels = torch.randint(0, 2, (batch,))
    batch_ = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return {key: value.to(device) for key, value in batch_.items()}


def check_dtype(dtype: str) -> None:
    """Refuse what this machine would silently compute in float32."""
    if dtype in ("tf32", "fp16") and not torch.cuda.is_available():
        raise SystemExit(f"--dtype {dtype} needs a GPU: a CPU would compute in float32. Use fp32 or bf16 here.")
    if dtype in ("tf32", "bf16") and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise SystemExit(f"--dtype {dtype} needs an Ampere GPU or a newer one, not {torch.cuda.get_device_name()}.")


def start(
    names: list[str], optional: Sequence[str], base: nn.Module, batch: dict[str, Tensor], accelerator: Accelerator
) -> tuple[list[Method], dict[str, str]]:
    """Set everybody up and take one step, so that optimizer state exists; then half and all of the matrices freeze.

    Returns:
        The methods, and those of `optional` that cannot be had here, each with the reason.
    """
    methods, left_out = [], {}
    for name in dict.fromkeys(names):
        try:
            method = create(name, base, accelerator)
            method.step(batch, accelerator)
        except (SystemExit, RuntimeError, ValueError, TypeError) as error:
            if name not in optional:
                raise
            left_out[name] = str(error).splitlines()[0]
            if accelerator.is_main_process:
                print(f"{name} is left out, it does not work on these layers: {left_out[name]}", file=sys.stderr)
            continue
        if name in ("aflora_half", "aflora_frozen"):
            freeze_share(method)
        methods.append(method)
    return methods, left_out


def count(method: Method, batch: dict[str, Tensor], accelerator: Accelerator, in_float32: bool = False) -> Counter[str]:
    """Operators of a forward and backward pass, without what accelerate wraps around the model."""
    model = accelerator.unwrap_model(method.model)
    wrapped = model.__dict__.pop("forward", None)  # autocast, and its outputs back to float32
    autocast = torch.autocast(accelerator.device.type, enabled=False) if in_float32 else accelerator.autocast()

    def step() -> None:
        with autocast:
            loss = model(**batch).loss
        loss.backward()

    counts = count_launches(step)
    model.zero_grad(set_to_none=True)
    if wrapped is not None:
        model.forward = wrapped
    return counts


def add_launches(
    measured: dict[str, dict[str, Any]],
    methods: list[Method],
    floor: Counter[str],
    batch: dict[str, Tensor],
    accelerator: Accelerator,
) -> None:
    """Launches of a step, and how many more than the float32 floor's there are for each call of an adapted layer."""
    for method in methods:
        counts = count(method, batch, accelerator)
        with torch.no_grad():
            calls = count_calls(method.adapted, partial(method.model, **batch))
        measured[method.name] |= {"launches": counts.total(), "launches_per_call": per_call(counts, floor, calls)}


def describe(method: Method, batch: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Any]:
    """What does not need a clock: FLOPs, trainable parameters, bytes."""
    with FlopCounterMode(display=False) as counter:
        method.step(batch, accelerator)
    numbers = {
        "flops": counter.get_total_flops(),
        "linear_flops": linear_flops(method, batch, accelerator),
        "trainable_params": method.trainable_params(),
        "saved_bytes": saved_bytes(method, batch, accelerator),
        "optimizer_state_bytes": method.optimizer_state_bytes(),
        "peak_memory_bytes": None,
    }
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        method.step(batch, accelerator)
        # All methods share one process and the frozen weights: what one step of this one adds to them.
        numbers["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - held
    return numbers


def linear_flops(method: Method, batch: dict[str, Tensor], accelerator: Accelerator) -> int:
    """Forward and backward FLOPs of the adapted linear layers alone, each on its own input's shape."""
    inputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.setdefault(module, arguments[0].detach())

    hooks = [module.register_forward_pre_hook(note) for module in method.adapted]
    with torch.no_grad(), accelerator.autocast():
        method.model(**batch)
    for hook in hooks:
        hook.remove()
    total = 0
    for module, x in inputs.items():
        x = torch.randn_like(x, dtype=torch.float32, requires_grad=True)
        with FlopCounterMode(display=False) as counter, accelerator.autocast():
            y = module(x)
            y.backward(torch.ones_like(y))
        total += counter.get_total_flops()
        module.zero_grad(set_to_none=True)
    return total


def saved_bytes(method: Method, batch: dict[str, Tensor], accelerator: Accelerator) -> int:
    """Bytes kept from forward for backward, weights excluded, each storage once."""
    weights = {t.untyped_storage().data_ptr() for t in (*method.model.parameters(), *method.model.buffers())}
    kept: dict[int, int] = {}
    holders = []  # a storage that is freed could come back under the same address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            holders.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), accelerator.autocast():
        loss = method.model(**batch).loss
    del loss
    return sum(kept.values())


def time_steps(
    methods: list[Method], batch: dict[str, Tensor], accelerator: Accelerator, args: argparse.Namespace
) -> None:
    """Every method takes a step per round, in another order each time: nobody always follows the same one."""
    order = random.Random(0)  # the same on every rank
    rounds = tqdm(range(args.warmup + args.steps), disable=not accelerator.is_main_process, desc="rounds")
    for number in rounds:
        for method in order.sample(methods, len(methods)):
            synchronize(accelerator)
            began = time.perf_counter()
            method.step(batch, accelerator)
            synchronize(accelerator)
            if number >= args.warmup:
                method.seconds.append(time.perf_counter() - began)


def synchronize(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def timing(method: Method) -> dict[str, float]:
    low, _, high = statistics.quantiles(method.seconds, n=4)
    return {
        "step_seconds_median": statistics.median(method.seconds),
        "step_seconds_quartile_low": low,
        "step_seconds_quartile_high": high,
        "step_seconds_min": min(method.seconds),
    }


def over_schedule(measured: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """AFLoRA averaged over the steps of a real schedule.

    Between all, half and no matrices training, what was measured is interpolated linearly in the
    number of matrices that still train.
    """
    per_epoch = args.steps_per_epoch
    schedule = CubicSchedule(
        total_steps=args.epochs * per_epoch,
        initial_steps=round(args.initial_epochs * per_epoch),
        final_steps=round(args.final_epochs * per_epoch),
    )
    matrices, points = 48, (measured["aflora_training"], measured["aflora_half"], measured["aflora_frozen"])
    keys = [key for key, value in points[0].items() if isinstance(value, int | float)]
    totals = dict.fromkeys(keys, 0.0)
    frozen = 0
    for step in range(schedule.total_steps):
        place = 2 * frozen / matrices  # 0: all train, 1: half, 2: none
        left = min(int(place), 1)
        for key in keys:
            first, second = points[left][key], points[left + 1][key]
            totals[key] += first + (second - first) * (place - left)
        frozen = schedule.count(step, matrices)  # what freezes after this step trains in it
    average = {key: total / schedule.total_steps for key, total in totals.items()}
    average["peak_memory_bytes"] = points[0]["peak_memory_bytes"]
    if args.freeze_log is not None:
        average["trainable_params"] = over_freeze_log(
            args.freeze_log, points[0]["trainable_params"], schedule.total_steps
        )
    return average


def over_freeze_log(path: Path, at_start: int, total_steps: int) -> float:
    """Trainable parameters averaged over the steps of a run, from its freeze log."""
    after = {e["step"]: e["trainable_params"] for e in map(json.loads, path.read_text().splitlines())}
    result = path.parent / "result.json"
    head = json.loads(result.read_text())["head_params"] if result.exists() else 0
    total, current = 0, at_start
    for step in range(total_steps):
        total += current
        current = after.get(step, current + head) - head
    return total / total_steps


def add_rates(measured: dict[str, dict[str, Any]], args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Step time over that of ELoRA, LoRA and the floor; tokens per second; the share of the chip's peak.

    The share counts the FLOPs that a method itself makes: it says how well a method uses the chip, not which of two
    is faster.
    """
    on_gpu = accelerator.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(), args.dtype) if on_gpu else None
    tokens = args.batch * args.length * accelerator.num_processes
    for numbers in measured.values():
        seconds = numbers["step_seconds_median"]
        for other in ("elora", "lora", "floor"):
            numbers[f"ratio_to_{other}"] = seconds / measured[other]["step_seconds_median"]
        numbers["tokens_per_second"] = tokens / seconds
        numbers["mfu"] = numbers["flops"] / seconds / peak if peak is not None else None


def setting(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    device = platform.processor() or platform.machine()
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name()
    return {
        "model": args.model,
        "layers": args.layers,
        "batch": args.batch,
        "length": args.length,
        "dtype": args.dtype,
        "compiled": args.compile,
        "ranks": accelerator.num_processes,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "measured_steps": args.steps,
    }


if __name__ == "__main__":
    main()
