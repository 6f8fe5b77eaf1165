"""Which tokens stand for which part of a text, as far as a tokenizer can be trusted to tell."""

from __future__ import annotations

import copy
import json
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ...errors import AFLoRAError
from ..reading import shown
from .template import Span


def with_whole_offsets(tokenizer: Any) -> Any:
    """The tokenizer; where its offsets leave out the blanks of a token (trim_offsets), a copy whose offsets do not."""
    described = tokenizer.backend_tokenizer.to_str()
    if '"trim_offsets":true' not in described.replace(" ", ""):
        return tokenizer
    found = json.loads(
        described, object_hook=lambda part: part | ({"trim_offsets": False} if "trim_offsets" in part else {})
    )
    found |= {"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}}  # quickly made
    whole = copy.deepcopy(tokenizer)
    quick = type(whole.backend_tokenizer).from_str(json.dumps(found))
    whole.backend_tokenizer.post_processor = quick.post_processor
    return whole


def carried_by(text: str, offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[list[bool], bool]:
    """Which tokens begin in one of the spans, and end there but for blanks; and whether a span begins within a token.

    Args:
        offsets: Of each token, in the text.
        spans: In order, none in another.
    """
    starts = [start for start, _ in spans]
    carries, joined = [], False
    for first, last in offsets:
        at = bisect_right(starts, first) - 1
        end = spans[at][1] if at >= 0 else 0
        carries.append(first < end and not text[end:last].strip())
        if at + 1 < len(spans) and not carries[-1]:
            start, stop = spans[at + 1]
            joined = joined or (first < start < last and bool(text[start : min(last, stop)].strip()))
    return carries, joined


def check_offsets(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[Span], carries: Sequence[bool]
) -> None:
    """Raise an AFLoRAError where tokens are decoded to another text than offsets say, in all but blanks."""
    runs: list[list[int]] = []  # places of tokens one after the other
    for place, chosen in enumerate(carries):
        if chosen and place and carries[place - 1]:
            runs[-1].append(place)
        elif chosen:
            runs.append([place])
    covered = [text[offsets[run[0]][0] : max(offsets[i][1] for i in run)] for run in runs]
    said = _bare(tokenizer.decode([ids[i] for run in runs for i in run]))
    if said == _bare("".join(covered)):
        return
    for run, part in zip(runs, covered, strict=True):  # it may write texts otherwise: in lower case, or <unk>
        alone = tokenizer(part, add_special_tokens=False)["input_ids"]
        said = tokenizer.decode([ids[i] for i in run])
        if _bare(said) != _bare(tokenizer.decode(alone)):
            raise AFLoRAError(
                f"The tokenizer does not tell which tokens stand for what the assistant says: those for "
                f"{shown(part)} would be {shown(said)}. Use data.loss_on=all, or another tokenizer."
            )


def _bare(text: str) -> str:
    return "".join(text.split())
