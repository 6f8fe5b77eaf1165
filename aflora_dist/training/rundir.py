"""A run's directory: what is written where, as a contract that other tools read.

Only the main process writes. JSON lines are flushed line by line, so a run that ends early leaves
whole lines behind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..errors import AFLoRAError
from .config import RunConfig

# Everything that a run writes; `overwrite` deletes these and nothing else.
_FILES = ("config.yaml", "freeze_log.jsonl", "metrics.jsonl", "result.json")
_FOLDERS = ("adapter", "checkpoints", "tensorboard")


class RunDirectory:
    """The directory of one run, claimed for it.

    Args:
        config: Which directory, and whether to replace the run in it.
        resolved: The whole configuration as YAML.

    Raises:
        AFLoRAError: On every rank, if the directory holds a run already or cannot be written.
    """

    def __init__(self, config: RunConfig, resolved: str, accelerator: Accelerator) -> None:
        self.path = Path(config.dir)
        self.writes = accelerator.is_main_process
        if self.path.exists() and not self.path.is_dir():
            raise AFLoRAError(f"run.dir={self.path} is a file. Name a folder.")
        if (self.path / "config.yaml").exists() and not config.overwrite:
            raise AFLoRAError(
                f"{self.path} already holds a run. Name another folder with run.dir, or replace that run with "
                f"run.overwrite=true."
            )
        accelerator.wait_for_everyone()  # all ranks have looked before one of them writes
        if self.writes:
            try:
                self._claim(resolved)
            except OSError as error:
                raise AFLoRAError(f"run.dir={self.path} cannot be written: {error.strerror or error}.") from error

    def _claim(self, resolved: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            if (folder := self.path / name).is_dir():
                shutil.rmtree(folder)
        (self.path / "config.yaml").write_text(resolved, encoding="utf-8")

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line to freeze_log.jsonl or metrics.jsonl."""
        if self.writes:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        if self.writes:
            temporary = self.path / f".{name}.tmp"
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self.path / name)
