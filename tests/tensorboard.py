"""A real TensorBoard for tests, asked over HTTP."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

PROFILER = "plugin/pytorch_profiler"


class TensorBoard:
    """`with TensorBoard(logdir) as board: board.get("runs")`."""

    def __init__(self, logdir: Path) -> None:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0"], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        self.url = next(m[1] for line in self._process.stderr if (m := re.search(r"(http://127\.0\.0\.1:\d+/)", line)))
        self._reader = threading.Thread(target=self._process.stderr.read, daemon=True)  # a full pipe stops the server
        self._reader.start()

    def get(self, path: str, body: Any = None, **query: str) -> Any:
        """The JSON behind /data/PATH; posts if there is a body."""
        address = f"{self.url}data/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"} if data else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)

    def wait_for_profiles(self, count: int, seconds: float = 90.0) -> list[str]:
        """Names of the profiler's runs, once `count` of them are loaded."""
        deadline = time.monotonic() + seconds
        while True:
            answer = self.get(f"{PROFILER}/runs")
            if len(answer["runs"]) >= count and not answer["loading"]:
                return sorted(answer["runs"])
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count} profiles expected: {answer}")
            time.sleep(0.5)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 60
        while not self.get("runs") and time.monotonic() < deadline:
            time.sleep(0.2)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._reader.join(20)
        assert self._process.stderr is not None
        self._process.stderr.close()
