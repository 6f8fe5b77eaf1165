"""The model card of what is exported: task, figures, commands, versions."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..store.records import Settings
from ..version import __version__
from ..view.report import figures
from .source import Source

_LOADING = {
    "to-lora": """It is a plain LoRA adapter, which computes what the AFLoRA adapter did, without this package:

```python
model.load_adapter("FOLDER")                     # a model of transformers 5.18 or later
model = PeftModel.from_pretrained(model, "FOLDER")  # or PEFT
```""",
    "lora": """PEFT loads it without this package:

```python
model = PeftModel.from_pretrained(model, "FOLDER")
```""",
    "merge": """The adapter is in the weights; transformers, or a server, loads it like any other model:

```python
model = AutoModel.from_pretrained("FOLDER")  # AutoModelForCausalLM, AutoModelForSequenceClassification, ...
```""",
}


def write_card(folder: Path, source: Source, command: str, run: Path, out: Path, notes: list[str]) -> None:
    """Write README.md, with all that is known of how the adapter came to be.

    Args:
        command: to-lora or merge; lora for an adapter of PEFT's own that nothing was done to.
        notes: Sentences about what to mind.
    """
    base = _name(str(source.config["base_model_name_or_path"]))
    header = {
        "base_model": base,
        "library_name": "transformers" if command == "merge" else "peft",
        "tags": ["aflora"] if command == "merge" else ["aflora", "lora"],
    }
    parts = [
        f"---\n{yaml.safe_dump(header)}---",
        f"# {Path(base).name}, fine-tuned with {'AFLoRA' if source.layers else source.config['peft_type']}",
        _LOADING[command],
        *notes,
        *_labels(source),
        *_training(source),
        "## Versions",
        "\n".join(
            [f"- aflora_dist {__version__}"]
            + [f"- {name} {version(name)}" for name in ("torch", "transformers", "peft", "safetensors")]
        ),
        *(
            [f"Exported with `{shlex.join(['aflora', command, str(run), str(out)])}` from an adapter for `{base}`."]
            if command in ("to-lora", "merge")
            else []
        ),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _name(base: str) -> str:
    """The base model as PEFT's own cards name it, as the adapter does; the id of one that lies in the hub's cache."""
    found = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", base)
    return f"{found[1]}/{found[2]}" if found else base


def _labels(source: Source) -> list[str]:
    labels = source.labels or []
    said = ", ".join(f"{number} {_quoted(label)}" for number, label in enumerate(labels))
    return [f"Labels: {said}."] if labels else []


def _quoted(text: str) -> str:
    """In letters that are no Markdown."""
    return "`" + "".join(c if c.isprintable() and c != "`" else "?" for c in text) + "`"


def _training(source: Source) -> list[str]:
    parts = []
    if (result := source.result) is not None:
        count = "" if result.train_examples is None else f", {result.train_examples:,} training examples"
        said = f"Task: {result.task}{count}. Metrics are those of its evaluation data."
        rows = "".join(f"\n| {name} | {value} |" for name, value in figures(result))
        parts += ["## Figures", said, f"| | |\n|---|---|{rows}"]
    if source.run is not None:
        parts += [
            "## Training",
            "`aflora train config.yaml`, or `accelerate launch -m aflora_dist.training.run config.yaml`, with this "
            "config.yaml:",
            f"```yaml\n{yaml.safe_dump(_settings(source.run), sort_keys=False).strip()}\n```",
        ]
    return parts


def _settings(run: Settings) -> dict[str, Any]:
    """What was trained: neither where it went nor how it was watched."""
    return run.values if run.seed is None else {**run.values, "train": {**run.values["train"], "seed": run.seed}}
