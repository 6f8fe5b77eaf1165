"""The model card of what is exported: task, figures, commands, versions."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from .source import Source

_LOADING = {
    "to-lora": """It is a plain LoRA adapter, which computes what the AFLoRA adapter did, without this package:

```python
model.load_adapter("FOLDER")                     # a model of transformers
model = PeftModel.from_pretrained(model, "FOLDER")  # or PEFT
```""",
    "merge": """The adapter is in the weights; transformers, or a server, loads it like any other model:

```python
model = AutoModel.from_pretrained("FOLDER")  # AutoModelForCausalLM, AutoModelForSequenceClassification, ...
```""",
}


def write_card(folder: Path, source: Source, command: str, run: Path, out: Path, notes: list[str]) -> None:
    """Write README.md, with all that is known of how the adapter came to be.

    Args:
        command: to-lora or merge.
        notes: Sentences about what to mind.
    """
    base = str(source.config.get("base_model_name_or_path"))
    header = {
        "library_name": "peft" if command == "to-lora" else "transformers",
        "tags": ["aflora", "lora"] if command == "to-lora" else ["aflora"],
    }
    if not Path(base).exists():  # a folder of this machine says nothing elsewhere
        header["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(header)}---",
        f"# {Path(base).name}, fine-tuned with AFLoRA",
        _LOADING[command],
        *notes,
        *_training(source),
        "## Versions",
        "\n".join(
            [f"- aflora_dist {__version__}"]
            + [f"- {name} {version(name)}" for name in ("torch", "transformers", "peft", "safetensors")]
        ),
        f"Exported with `{shlex.join(['aflora', command, str(run), str(out)])}` from an adapter for `{base}`.",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _training(source: Source) -> list[str]:
    parts = []
    if (result := source.result) is not None:
        parts += [
            "## Figures",
            f"Task: {result['task']}, {result['train_examples']:,} training examples.",
            _figures(result),
        ]
    if source.run is not None:
        parts += [
            "## Training",
            "`aflora train config.yaml`, or `accelerate launch -m aflora_dist.training.run config.yaml`, with this "
            "config.yaml:",
            f"```yaml\n{yaml.safe_dump(source.run, sort_keys=False).strip()}\n```",
        ]
    return parts


def _figures(result: dict[str, Any]) -> str:
    kept = result.get("best")
    epoch = kept["epoch"] if kept else len(result["evaluations"])
    rows = [
        (f"{name.replace('_', ' ')} (evaluation data)", "not a number" if value is None else f"{value:.4f}")
        for name, value in result["metrics"].items()
    ]
    rows += [
        ("epoch", f"{epoch}, the best by {kept['metric']}" if kept else str(epoch)),
        ("updates", f"{result['steps']:,}"),
        ("trainable parameters of the adapter, average", f"{result['avg_trainable_params']:,.0f}"),
        ("trained on", f"{result['world_size']} x {result['engine']}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
