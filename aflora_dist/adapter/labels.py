"""What a classifier's labels are called, as an adapter's configuration says it.

A model's config.json has id2label and label2id, but cannot lie in an adapter's folder: transformers takes a folder that
has one for that of a whole model. Of a key in adapter_config.json that PEFT does not know it warns. So they stand in
its `auto_mapping`, which is for what the base model is to be, and which PEFT keeps, and does not read where there is a
task_type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def label_mapping(labels: Sequence[str]) -> dict[str, Any]:
    """What `auto_mapping` holds for these class names.

    >>> label_mapping(["no", "yes"])
    {'id2label': {'0': 'no', '1': 'yes'}, 'label2id': {'no': 0, 'yes': 1}}
    """
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def read_labels(config: Mapping[str, Any]) -> list[str] | None:
    """Class names by number, of what adapter_config.json holds; None where it has none, or something else.

    >>> read_labels({"auto_mapping": {"id2label": {"1": "yes", "0": "no"}}}), read_labels({"auto_mapping": None})
    (['no', 'yes'], None)
    """
    mapping = config.get("auto_mapping")
    found = mapping.get("id2label") if isinstance(mapping, dict) else None
    if not isinstance(found, dict) or not found:
        return None
    names = [found.get(str(number)) for number in range(len(found))]
    return [str(name) for name in names] if all(isinstance(name, str) for name in names) else None
