"""Splits of data, whatever the task: from the hub, and no longer than they are wanted."""

from __future__ import annotations

from typing import Any

import datasets

from ..errors import AFLoRAError, one_line
from ..processes import first_on_node


def load_from_hub(*names: str, otherwise: str) -> Any:
    """A data set of the hub, split name -> dataset. A collective.

    Args:
        names: Its own, and that of a configuration.
        otherwise: What to do without a network.

    Raises:
        AFLoRAError: On every rank: it cannot be had.
    """

    def load() -> Any:
        try:
            return datasets.load_dataset(*names)
        except Exception as error:  # offline, a proxy, the hub's own errors
            raise AFLoRAError(
                f"The data set {' '.join(names)!r} could not be loaded from the hub ({one_line(error)}). Without a "
                f"network, {otherwise}."
            ) from error

    return first_on_node(load)


def at_most(number: int | None, dataset: datasets.Dataset, seed: int | None = None) -> datasets.Dataset:
    """So many of the examples: the first ones, or with a seed some that are drawn; None: all, in their order."""
    if number is None:
        return dataset
    drawn = dataset if seed is None else dataset.shuffle(seed=seed)
    return drawn.select(range(min(number, len(drawn))))
