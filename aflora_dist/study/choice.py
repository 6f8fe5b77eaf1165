"""What is chosen of a sweep's values, by what its runs came to. Pure but for the records it is given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AFLoRAError
from ..store.best import LOWER_IS_BETTER

Records = Mapping[str, Mapping[str, Any]]


class NoChoiceError(AFLoRAError):
    """The runs by which something was to be chosen for a method do not allow that; others go on."""


def seconds_of(record: Mapping[str, Any]) -> float:
    """Of training: the processor's where known (on CPUs), which other work beside changes less than the clock's."""
    return float(record.get("train_cpu_seconds") or record["train_seconds"])


def mean_of(where: str, runs: Sequence[str], metric: str, records: Records) -> float | None:
    """Of what these runs, by name, came to; None where one of them broke down.

    Raises a NoChoiceError if a run that ended well has no such metric.
    """
    found = []
    for run in runs:
        record = records[run]
        if "failed" in record:
            return None
        if metric not in record["metrics"]:
            raise NoChoiceError(no_metric(where, metric, record))
        found.append(record["metrics"][metric])
    return None if None in found else statistics.fmean(found)


def no_metric(where: str, metric: str, record: Mapping[str, Any]) -> str:
    return f"{where}: there is no metric {metric!r}, but {', '.join(record['metrics']) or 'none at all'}."


def first_best(means: Mapping[Any, float | None], metric: str) -> Any:
    """The value with the best mean; of equals the smallest."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    there = {value: mean for value, mean in means.items() if mean is not None and math.isfinite(mean)}
    return min(there, key=lambda value: (sign * there[value], number_of(value)), default=None)


def beyond(tried: list[Any], best: Any, whole: bool) -> list[Any] | None:
    """One more value beyond the end at which the best lies, as far as its neighbour; None where it lies inside.

    Args:
        whole: Whether these are whole numbers from 1 on; None, too, where there is no other such number.
    """
    in_order = sorted(tried, key=number_of)
    at = in_order.index(best)
    if 0 < at < len(in_order) - 1 or number_of(best) == 0:
        return None
    neighbour = in_order[1] if at == 0 else in_order[-2]
    further = number_of(best) ** 2 / number_of(neighbour) if number_of(neighbour) else 0.0
    value = round(further) if whole else float(f"{further:.3g}")
    if (whole and value < 1) or value in (0, *map(number_of, tried)):
        return None
    return [*tried, value]


def number_of(value: Any) -> float:
    """YAML takes 1e-3 for a text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise AFLoRAError(f"{value!r} is among a sweep's values and no number.") from None
