"""What has been predicted of a file, kept beside OUT until all of it is: the same command goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import AFLoRAError, writing
from ..store.lock import try_lock
from ..untrusted import load_json

Values = list[Any]  # of one row


class Partial:
    """JSON lines: what is predicted, then the rows part by part. For one process only.

    Args:
        out: The file that will be written in the end.
        identity: Tells what is predicted, and by which model: parts of another prediction are not gone on with.

    Attributes:
        rows: How many are there.

    Raises:
        AFLoRAError: Another process is at work there, what is there is of another prediction, or it cannot be written.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.path = out.with_name(f".{out.name}.partial")
        with writing("What is predicted", self.path):
            self._file: IO[str] = self.path.open("a+", encoding="utf-8")
            if not try_lock(self._file):
                self._file.close()
                raise AFLoRAError(f"Another process is at work at {self.path}. Wait for its end.")
        self.rows, end = 0, 0
        self._file.seek(0)
        if not _is_ours(self._file):
            self._file.close()
            raise AFLoRAError(
                f"{self.path} holds something else than a part of a prediction. Move it, or name another --out."
            )
        self._file.seek(0)
        for number, line in enumerate(iter(self._file.readline, "")):
            try:
                held = load_json(line)
                if not line.endswith("\n") or (number > 0 and not isinstance(held, list)):
                    break
            except ValueError:  # cut: the process was ended while it wrote
                break
            if number == 0 and held != identity:
                self._file.close()
                raise AFLoRAError(
                    f"{self.path} holds a part of another prediction (of another file, by another model, or with other "
                    f"options), which was not ended. Delete it, or name another file with --out."
                )
            self.rows += len(held) if number > 0 else 0
            end = self._file.tell()
        with writing("What is predicted", self.path):
            self._file.truncate(end)
            if end == 0:
                self._write(identity)

    def append(self, rows: Sequence[Values]) -> None:
        """Keep what was predicted of the next rows.

        Raises:
            AFLoRAError: It cannot be written; what was kept before is unharmed.
        """
        with writing("What is predicted", self.path, "Make room; the same command goes on from there."):
            self._write(rows)
        self.rows += len(rows)

    def _write(self, value: Any) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def values(self) -> Iterator[Values]:
        """Those of all rows, in order."""
        self._file.seek(0)
        self._file.readline()
        for line in iter(self._file.readline, ""):
            yield from load_json(line)

    def close(self) -> None:
        """Another process may go on from here."""
        self._file.close()

    def remove(self) -> None:
        """All is written elsewhere."""
        self.path.unlink(missing_ok=True)


def _is_ours(file: IO[str]) -> bool:
    """Whether a file is empty, or begins with what a prediction hangs on, which may be cut."""
    try:
        line = file.readline()
        return not line or (isinstance(load_json(line), str) if line.endswith("\n") else line.startswith('"'))
    except ValueError:  # no JSON, or no text
        return False
