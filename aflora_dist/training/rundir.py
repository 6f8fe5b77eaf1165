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
from accelerate.utils import broadcast_object_list

from ..errors import AFLoRAError
from .config import RunConfig

# Everything that a run writes; `overwrite` deletes these and nothing else.
_FILES = ("config.yaml", "freeze_log.jsonl", "metrics.jsonl", "result.json")
_FOLDERS = ("adapter", "checkpoints", "tensorboard")


class RunDirectory:
    """The directory of one run. Looked at when created; nothing changes in it before `claim`.

    Args:
        config: Which directory, and whether to replace the run in it.

    Raises:
        AFLoRAError: On every rank, if the directory holds (part of) a run already.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self.path = Path(config.dir)
        self.accelerator = accelerator
        self.writes = accelerator.is_main_process
        if self.path.exists() and not self.path.is_dir():
            raise AFLoRAError(f"run.dir={self.path} is a file. Name a folder.")
        held = [name for name in (*_FILES, *_FOLDERS) if (self.path / name).exists()]
        if held and not config.overwrite:
            raise AFLoRAError(
                f"{self.path} already holds a run ({', '.join(held)}). Name another folder with run.dir, or replace "
                f"that run with run.overwrite=true."
            )

    def claim(self, resolved: str) -> None:
        """Delete what an earlier run left and write config.yaml. A collective.

        Args:
            resolved: The whole configuration as YAML.

        Raises:
            AFLoRAError: On every rank, if the directory cannot be written.
        """
        self.accelerator.wait_for_everyone()  # all ranks have looked before one of them writes
        failure = None
        if self.writes:
            try:
                self._prepare(resolved)
            except OSError as error:
                failure = error.strerror or str(error)
        (failure,) = broadcast_object_list([failure])
        if failure is not None:
            raise AFLoRAError(f"run.dir={self.path} cannot be written: {failure}.")

    def _prepare(self, resolved: str) -> None:
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
