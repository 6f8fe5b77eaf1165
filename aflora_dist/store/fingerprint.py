"""What a training's outcome depends on besides its configuration, as short texts to compare: tokens and base weights.

Tokens are read whole, for a changed template, tokenizer or reader shows in them. Of the weights each tensor is read by
its name, type, shape and some of its bytes: enough to tell a base that was trained on, little enough for any size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..weights import local_weight_files

_WHOLE, _PIECE, _PIECES, _READS = 64 * 1024, 4 * 1024, 16, 8192
_IDLE = {"transformers_version", "_name_or_path", "architectures"}  # change nothing that a model computes


def of_examples(parts: Iterable[Any]) -> str:
    """Of datasets, with numbers or lists of them in their columns, and of lists of answers."""
    content = hashlib.sha256()
    for part in parts:
        if not hasattr(part, "column_names"):
            content.update(json.dumps(part, default=str).encode())  # Decimal, of parquet
            continue
        names = sorted(part.column_names)
        content.update(json.dumps([names, len(part)]).encode())
        for table in part.with_format("arrow").iter(batch_size=10_000):
            for name in names:
                _add(content, table.column(name).combine_chunks())
    return content.hexdigest()[:16]


def _add(content: Any, column: Any) -> None:
    import numpy as np  # which `of_weights`, of the core, has no need of

    while hasattr(column, "value_lengths"):
        content.update(column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind in "iubf":
        content.update(values.astype(np.int64 if values.dtype.kind in "iub" else np.float64).tobytes())
    else:
        content.update(json.dumps(column.to_pylist(), default=str).encode())


def of_weights(name: str, revision: str | None) -> str | None:
    """Of a pretrained model, by its folder, GGUF file, or hub id; None where its files are not on this machine.

    How a checkpoint is cut into files does not matter.
    """
    files = local_weight_files(name, revision)
    if not files:
        return None
    found: dict[str, str] = {}
    headers = {file: _header(file) for file in files}
    reads = max(1, _READS // max(1, sum(map(len, headers.values()))))
    for file, tensors in headers.items():
        with file.open("rb") as opened:
            for tensor, (described, start, stop) in tensors.items():
                found[tensor] = f"{described} {_sampled(opened, start, stop, min(reads, _PIECES))}"
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def of_settings(name: str, revision: str | None) -> str | None:
    """Of what a pretrained model's config.json says: the same weights compute otherwise with another one."""
    files = local_weight_files(name, revision)
    file = files[0].with_name("config.json") if files else None
    if file is None or not file.is_file():
        return None
    said = json.loads(file.read_text(encoding="utf-8"))
    told = sorted((key, value) for key, value in said.items() if key not in _IDLE)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _header(file: Path) -> dict[str, tuple[str, int, int]]:
    """Of each tensor of a safetensors file its type and shape, and where it lies; other files are taken for one."""
    if file.suffix != ".safetensors":
        size = file.stat().st_size
        return {file.name: (str(size), 0, size)}
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    start = 8 + length
    return {
        name: (f"{entry['dtype']} {entry['shape']}", *(start + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _sampled(file: Any, start: int, stop: int, pieces: int) -> str:
    places: Sequence[tuple[int, int]] = [(start, stop - start)]
    if stop - start > _WHOLE:
        last = stop - _PIECE
        places = [(start + (last - start) * i // max(1, pieces - 1), _PIECE) for i in range(pieces)]
    content = hashlib.sha256()
    for at, size in places:
        file.seek(at)
        content.update(file.read(size))
    return content.hexdigest()
