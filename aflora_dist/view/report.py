"""What a person reads at the end of a run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ..store.best import LOWER_IS_BETTER


def print_summary(result: dict[str, Any], directory: str, console: Console | None = None) -> None:
    """The result as a table, on this process's standard output unless a console is given."""
    table = Table(title=f"AFLoRA on {result['task']}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in result["metrics"].items():
        best = (min if name in LOWER_IS_BETTER else max)(evaluation[name] for evaluation in result["evaluations"])
        note = f"  (best epoch {best:.4f})" if len(result["evaluations"]) > 1 else ""
        if kept := result.get("best"):
            note = f"  (epoch {kept['epoch']}, kept; last epoch {result['last']['metrics'][name]:.4f})"
        table.add_row(name.replace("_", " "), f"{value:.4f}{note}")
    average, lora = result["avg_trainable_params"], result["lora_r8_trainable_params"]
    table.add_row(
        "trainable parameters",
        f"{average:,.0f} on average; LoRA r=8 has {lora:,}: {lora / max(average, 1):.1f} times as many",
    )
    table.add_row("froze", f"{result['freezable_matrices']} projection matrices in {result['freeze_events']} events")
    seconds, share = result["freeze_seconds_total"], result["freeze_seconds_total"] / result["train_seconds"]
    table.add_row("time spent freezing", f"{seconds:.2f} s, {share:.2%} of training")
    table.add_row(
        "training",
        f"{result['steps']} steps in {result['train_seconds']:.1f} s, {result['samples_per_second']:.1f} examples/s, "
        f"{result['world_size']} x {result['engine']}",
    )
    if result["traces"]:
        names = ", ".join(path.rsplit("/", 1)[-1] for path in result["traces"])
        table.add_row("traces", f"{names}, in {directory}/tensorboard/profile/ (*.json.gz opens in Perfetto)")
    table.add_row("look", f"aflora show {directory}, or tensorboard --logdir {directory}/tensorboard")
    table.add_row("files", f"{directory}/ (adapter/, freeze_log.jsonl, metrics.jsonl, result.json, tensorboard/)")
    (console or Console()).print(table)
