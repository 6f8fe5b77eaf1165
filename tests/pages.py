"""The pages of the documentation, what is fenced in them, and what their snippets find, for tests that run them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*(ROOT / "docs").glob("*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))]
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: Of its first line of code, from 1.
        remark: The HTML comment above it: "not run: REASON", "run: on its own", or nothing.
    """

    page: Path
    line: int
    language: str
    text: str
    remark: str

    @property
    def code(self) -> str:
        """Its text behind as many empty lines that a traceback names the page's line."""
        return "\n" * (self.line - 1) + self.text


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text(encoding="utf-8")
    for fence in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
        above = text[: fence.start()].rstrip().rsplit("\n", 1)[-1]
        remark = re.fullmatch(r"<!-- *(.*?) *-->", above)
        language = fence[2].split()[0] if fence[2].split() else ""
        line = text.count("\n", 0, fence.start(3)) + 1
        found.append(Block(page, line, language, fence[3], remark[1] if remark else ""))
    return found


def snippets(page: Path) -> list[Block]:
    """The Python blocks that are run."""
    return [b for b in blocks(page) if b.language == "python" and not b.remark.startswith("not run: ")]


def classifier(name: Path) -> dict[str, Any]:
    def model() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)

    tokens = torch.arange(4 * 6).view(4, 6) % 19
    rows = [{"input_ids": tokens[i], "labels": i % 2} for i in range(4)]
    loader = torch.utils.data.DataLoader(rows * 3, batch_size=4)
    return {"torch": torch, "model": model(), "base": model(), "loader": loader}


def plainly(kind: Any, options: dict[str, Any]) -> Any:
    return kind(**options)


def with_trl(decoder: Path, arguments_of: Callable[..., Any] = plainly, **more: Any) -> dict[str, Any]:
    """What a page on TRL finds; `more` are options of SFTConfig, of which `arguments_of` makes one."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import get_peft_model
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(decoder)
    options = {"output_dir": "trained", "max_steps": 4, "report_to": "none", "bf16": False, "save_strategy": "no"}
    args = arguments_of(SFTConfig, options | {"use_cpu": True} | more)
    data = Dataset.from_list([{"input_ids": list(range(3, 12))}] * 8)
    return {"get_peft_model": get_peft_model, "SFTTrainer": SFTTrainer, "base": base, "args": args, "data": data}
