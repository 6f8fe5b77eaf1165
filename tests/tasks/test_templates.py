"""Chat templates with habits: thoughts that are left out later, a turn that the next one ends, calls of many forms."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
import trl.chat_template_utils as trl_templates
from transformers.utils import chat_template_utils

from aflora_dist.tasks.sft.batching import IGNORED
from aflora_dist.tasks.sft.encode import Encoder, Note
from tests.tasks.chats import chat_tokenizer

ASKED = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine"}]
TWICE = [*ASKED, {"role": "user", "content": "the answer"}, {"role": "assistant", "content": "is 6."}]
# GLM's kind: nothing ends a turn but the next speaker's marker.
NEXT_SPEAKER = (
    "{% for m in messages %}{{ {'user': '<|im_start|>', 'assistant': '<|im_end|>'}[m.role] + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{% endif %}"
)


def learned(template: str, chat: list[dict[str, Any]], loss_on: str = "completions") -> tuple[list[str], Note]:
    """What carries loss, stretch by stretch, and what is worth saying."""
    encode = Encoder(chat_tokenizer("bytes", template), 10_000, loss_on, None, "it")
    found = encode({"messages": [chat]})
    stretches: list[list[int]] = [[]]
    for label in found["labels"][0]:
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [encode.tokenizer.decode(part) for part in stretches if part], Note(found["notes"][0])


def test_an_empty_reasoning_part_is_learned_as_it_will_be_asked_for_and_told() -> None:
    told = ["<think>\n\n</think>\n\nfine<|im_end|>\n"], Note.NO_THOUGHT
    assert learned(trl_templates.qwen3_chat_template, ASKED) == told
    begun = ["\n</think>\n\nfine<|im_end|>\n"], Note.NO_THOUGHT  # the generation prompt has begun it
    if (template := getattr(trl_templates, "qwen3_5_think_chat_template", None)) is not None:  # of a later TRL
        assert learned(template, ASKED) == begun
    thought = [ASKED[0], {**ASKED[1], "reasoning_content": "I am."}]
    assert learned(trl_templates.qwen3_chat_template, thought) == (
        ["<think>\nI am.\n</think>\n\nfine<|im_end|>\n"],
        Note(0),
    )


def test_a_turn_that_is_written_otherwise_later_is_not_learned_as_nobody_will_ask_for_it() -> None:
    """Qwen3 leaves thoughts out once another turn follows: what stands there is not what is said in its place."""
    said, note = learned(trl_templates.qwen3_chat_template, TWICE)
    assert said == ["<think>\n\n</think>\n\nis 6.<|im_end|>\n"]
    assert note == Note.REWRITTEN | Note.NO_THOUGHT
    said, note = learned(trl_templates.qwen3_training_chat_template, TWICE)  # with marks, all are
    assert len(said) == 2
    assert not note & Note.REWRITTEN


def test_what_ends_a_turn_is_learned_where_the_next_one_writes_it_and_added_where_none_does() -> None:
    assert learned(NEXT_SPEAKER, TWICE) == (["fine<|im_start|>", "is 6.<|im_start|>"], Note.ENDED)
    open_end = [*ASKED, TWICE[2]]
    assert learned(NEXT_SPEAKER, open_end) == (["fine<|im_start|>"], Note(0))
    (everything,), _ = learned(NEXT_SPEAKER, ASKED, "all")
    assert everything == "how are you?<|im_end|>fine<|im_start|>"


@pytest.mark.parametrize("written", ["strftime_now('%d %b %Y')", 'strftime_now( "%A, %d %B" ) | upper'])
@pytest.mark.parametrize("marked", ["{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"])
def test_what_writes_today_s_date_makes_the_same_examples_on_another_day(
    written: str, marked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is gone on with the day after reads them anew, and so does who predicts (Llama 3.2, gpt-oss)."""
    template = (
        "{% if strftime_now is defined %}{% set today = " + written + " %}{% endif %}{{ today + '\\n' }}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        + marked
        + "{% else %}"
        "{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    encode = Encoder(chat_tokenizer("bytes", template), 10_000, "completions", None, "it")
    rows = {"messages": [ASKED], "answer": [3]}

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now() + timedelta(days=200)

    today = encode(rows)
    assert "26 J" in encode.tokenizer.decode(today["input_ids"][0]).title()
    assert Note.DATED in Note(today["notes"][0])
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert encode(rows) == today


@pytest.mark.parametrize("given", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("written", ["{{ c.arguments | tojson }}", "{{ '' + c.arguments }}"])
def test_arguments_of_a_call_are_written_once_whether_they_are_an_object_or_its_text(given: Any, written: str) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}{% if m.tool_calls %}{% for t in m.tool_calls %}"
        "{% set c = t.function %}{{ c.name + ' ' }}" + written + "{% endfor %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    chat = [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    assert learned(template, chat) == (['f {"x": 1}<|im_end|>'], Note(0))
