"""compare.json as a Markdown table, a figure like the paper's Fig. 3, TensorBoard events, and traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from aflora_dist.watch.traces import named_ranges, write_trace

from .methods import Method

LABELS = {
    "floor": "floor (frozen backbone)",
    "full": "full fine-tuning",
    "lora": "LoRA r=8",
    "adalora": "AdaLoRA",
    "elora": "ELoRA (VeRA r=1024)",
    "miss": "MiSS r=16",
    "lorafa": "LoRA-FA r=8",
    "dora": "DoRA r=8",
    "randlora": "RandLoRA r=32",
    "aflora_training": "AFLoRA r=4, all training",
    "aflora_half": "AFLoRA r=4, half frozen",
    "aflora_frozen": "AFLoRA r=4, all frozen",
    "aflora": "AFLoRA r=4, over its schedule",
}

# Fig. 3, normalised as there: runtime and FLOPs to AFLoRA, parameters to AFLoRA. The text gives 1.86x and
# 2.96x for ELoRA and 9.5x for LoRA, and calls the other bars comparable; Table 1 has 0.16M for ELoRA, 0.14M here.
PAPER = {
    "runtime": {"lora": None, "elora": 1.86, "aflora": 1.0},
    "flops": {"lora": None, "elora": 2.96, "aflora": 1.0},
    "parameters": {"lora": 9.5, "elora": 0.16 / 0.14, "aflora": 1.0},
}


def markdown(report: dict[str, Any]) -> str:
    """The setting in a line, the methods as a table, the paper's three claims in three lines."""
    setting, methods = report["setting"], report["methods"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in setting.items() if value is not None),
        "",
        "| method | step, ms (quartiles) | x floor | x LoRA | x ELoRA | tokens/s | of the chip's peak "
        "| launches a call | GFLOP | adapted layers, GFLOP | trainable | saved for backward, MB "
        "| optimizer state, kB | peak on top, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in methods.items():
        quartiles = ""
        if "step_seconds_quartile_low" in m and name != "aflora":
            quartiles = f" ({m['step_seconds_quartile_low'] * 1e3:.0f} to {m['step_seconds_quartile_high'] * 1e3:.0f})"
        mfu = "-" if m["mfu"] is None else f"{m['mfu']:.1%}"
        peak = "-" if m["peak_memory_bytes"] is None else f"{m['peak_memory_bytes'] / 1e6:.0f}"
        lines.append(
            f"| {LABELS.get(name, name)} | {m['step_seconds_median'] * 1e3:.1f}{quartiles} | {m['ratio_to_floor']:.3f} "
            f"| {m['ratio_to_lora']:.3f} | {m['ratio_to_elora']:.3f} "
            f"| {m['tokens_per_second']:,.0f} | {mfu} | {m['launches_per_call']:.1f} | {m['flops'] / 1e9:.1f} "
            f"| {m['linear_flops'] / 1e9:.1f} | {m['trainable_params']:,.0f} | {m['saved_bytes'] / 1e6:.1f} "
            f"| {m['optimizer_state_bytes'] / 1e3:.0f} | {peak} |"
        )
    elora, lora, aflora = methods["elora"], methods["lora"], methods["aflora"]
    lines += [
        "",
        f"- runtime, ELoRA over AFLoRA: {1 / aflora['ratio_to_elora']:.2f} (paper 1.86); LoRA over AFLoRA: "
        f"{1 / aflora['ratio_to_lora']:.2f} (paper: comparable)",
        f"- FLOPs, ELoRA over AFLoRA: {elora['linear_flops'] / aflora['linear_flops']:.2f} in the adapted layers "
        f"(paper 2.96), {elora['flops'] / aflora['flops']:.2f} in the whole model",
        f"- trainable parameters, LoRA over AFLoRA: {lora['trainable_params'] / aflora['trainable_params']:.2f} "
        "(paper 9.5)",
    ]
    lines += [f"- {LABELS.get(name, name)} left out: {why}" for name, why in report["left_out"].items()]
    if report["outputs_cast"]:
        cast = ", ".join(LABELS.get(name, name) for name in report["outputs_cast"])
        lines.append(
            f"- under autocast PEFT's layers return float32 with {cast}, which DeBERTa-v2's attention cannot take: "
            "here their output is cast to the autocast dtype, a launch more for each call"
        )
    lines.append("")
    return "\n".join(lines)


def figure(methods: dict[str, Any]) -> Any:
    """Fig. 3: runtime, FLOPs and trainable parameters, normalised to AFLoRA; the paper's bars beside ours."""
    ours = {
        "runtime": {n: methods[n]["step_seconds_median"] for n in ("lora", "elora", "aflora")},
        "flops": {n: methods[n]["linear_flops"] for n in ("lora", "elora", "aflora")},
        "parameters": {n: methods[n]["trainable_params"] for n in ("lora", "elora", "aflora")},
    }
    titles = {"runtime": "training runtime", "flops": "FLOPs, adapted layers", "parameters": "trainable parameters"}
    drawn, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for axis, (key, values) in zip(axes, ours.items(), strict=True):
        names = list(values)
        for i, name in enumerate(names):
            value = values[name] / values["aflora"]
            axis.bar(i - 0.2, value, 0.38, color="#1f5a96", label="measured" if i == 0 else None)
            axis.text(i - 0.2, value, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
            paper = PAPER[key][name]
            if paper is not None:
                axis.bar(i + 0.2, paper, 0.38, color="#c9a227", label="paper" if name == "elora" else None)
                axis.text(i + 0.2, paper, f"{paper:.2f}", ha="center", va="bottom", fontsize=8)
            else:
                axis.text(i + 0.2, 0.02, "n/a", ha="center", va="bottom", fontsize=7, color="#777777")
        axis.set_xticks(range(len(names)), ["LoRA r=8", "ELoRA", "AFLoRA"])
        axis.set_title(titles[key], fontsize=10)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("relative to AFLoRA")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    return drawn


def write_report(report: dict[str, Any], seconds: dict[str, list[float]], out: Path) -> None:
    """compare.md, compare.png and one TensorBoard folder in `out`.

    In TensorBoard every method is a run, with its step times, its row in the HPARAMS tab and, where traces
    were asked for, its trace; the table and the figure belong to the run that holds them all.

    Args:
        report: What compare.json holds.
        seconds: Step times of each method, round by round.
    """
    table = markdown(report)
    (out / "compare.md").write_text(table)
    drawn = figure(report["methods"])
    drawn.savefig(out / "compare.png", dpi=150)
    with SummaryWriter(str(out / "tensorboard")) as writer:
        writer.add_text("comparison", table)
        drawn.set_dpi(120)
        writer.add_figure("Fig. 3", drawn)
    setting = report["setting"]
    shape = f"{setting['model']}, {setting['layers'] or 'all'} layers, {setting['batch']} x {setting['length']} tokens"
    shape += (
        f", {setting['dtype']}{', compiled' if setting['compiled'] else ''}, {setting['ranks']} x {setting['device']}"
    )
    columns = ("step_seconds_median", "ratio_to_elora", "ratio_to_lora", "ratio_to_floor", "flops", "trainable_params")
    for name, numbers in report["methods"].items():
        results = {f"result/{key}": float(numbers[key]) for key in columns}
        with SummaryWriter(str(out / "tensorboard" / name)) as writer:
            for number, value in enumerate(seconds.get(name, [])):
                writer.add_scalar("step_seconds", value, number)
            for tag, value in results.items():
                writer.add_scalar(tag, value)
            events: Any = writer.file_writer
            for summary in hparams({"method": LABELS.get(name, name), "setting": shape}, results):
                events.add_summary(summary)
    plt.close(drawn)


def write_traces(methods: list[Method], batch: dict[str, Tensor], accelerator: Accelerator, out: Path) -> None:
    """A profiler trace of three steps of each method, for TensorBoard's profiler tab and Perfetto."""
    for method in methods:
        with (
            named_ranges(accelerator, method.model, method.optimizer),
            torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=0, warmup=1, active=3, repeat=1), record_shapes=True
            ) as profiler,
        ):
            for _ in range(4):
                method.step(batch, accelerator)
                profiler.step()
        write_trace(profiler, out / "tensorboard" / method.name, accelerator.process_index)
