"""Conversations become tokens, and which of them carry loss.

A chat template is the tokenizer's own, or a plain one. Where the template marks what the assistant says, transformers
tells; elsewhere what an assistant's turn adds to the rendered text is looked up, and must come where it is expected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from ...errors import AFLoRAError
from ..tokens import Columns
from .batching import IGNORED
from .examples import Turn, turns

# What instruction-tuned models without a template of their own are commonly trained on.
PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n\\n' }}"
    "{% else %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
_MARKED = re.compile(r"\{%-?\s*generation\b")
Marked = tuple[list[int], list[bool]]  # tokens, and which of them carry loss


class Encoder:
    """Makes the tokens of examples.

    Args:
        tokenizer: A fast one: places in its tokens and in its text have to be told of each other.
        max_length: Tokens after which an example is cut.
        loss_on: "completions" or "all".
        system: See `turns`.
        name: What errors call the examples.

    Raises:
        AFLoRAError: The tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, max_length: int, loss_on: str, system: str | None, name: str) -> None:
        if not tokenizer.is_fast:
            raise AFLoRAError(
                "Language models are trained with a fast tokenizer (a tokenizer.json), which this model does not have."
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        self.loss_on, self.system, self.name = loss_on, system, name
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE

    @property
    def settings(self) -> list[Any]:
        """What the tokens depend on besides the examples and the tokenizer."""
        return [self.max_length, self.loss_on, self.system, self.template]

    def __call__(self, examples: Columns) -> Columns:
        """Columns input_ids and labels; count, the tokens that carry loss; cut, whether something was left out.

        Where there are answers, prompt_ids too: what is asked, up to where the assistant is to speak.
        """
        rows = [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
        if "text" in examples:
            marked = self._texts([self._text(row) for row in rows])
        else:
            chats = [self._turns(row) for row in rows]
            marked = self._chats(chats)
        columns: Columns = {name: [] for name in ("input_ids", "labels", "count", "cut")}
        for ids, carries in marked:
            kept = ids[: self.max_length]
            labels = [token if loss else IGNORED for token, loss in zip(kept, carries, strict=False)]
            labels[:1] = [IGNORED] * len(labels[:1])  # nothing before it to say it
            columns["input_ids"].append(kept)
            columns["labels"].append(labels)
            columns["count"].append(sum(label != IGNORED for label in labels))
            columns["cut"].append(len(kept) < len(ids))
        if "answer" in examples:
            columns["prompt_ids"] = self._tokens([self._render(_asked(chat), True) for chat in chats])["input_ids"]
        return columns

    def _text(self, row: Mapping[str, Any]) -> str:
        if not isinstance(row["text"], str):
            raise AFLoRAError(f"{self.name}: an example has {row['text']!r} in column text, which is not text.")
        return row["text"]

    def _texts(self, texts: list[str]) -> list[Marked]:
        """Plain text with its end: it has no completion, so all of it carries loss."""
        end = self.tokenizer.eos_token_id
        found = []
        for ids in self.tokenizer(texts)["input_ids"]:
            ended = ids if end is None or ids[-1:] == [end] else [*ids, end]
            found.append((ended, [True] * len(ended)))
        return found

    def _turns(self, row: Mapping[str, Any]) -> list[Turn]:
        try:
            return turns(row, self.system)
        except ValueError as error:
            raise AFLoRAError(f"{self.name}: {error}: {_shown(row)}") from None

    def _chats(self, chats: list[list[Turn]]) -> list[Marked]:
        if self.loss_on == "completions" and _MARKED.search(self.template):
            return [self._told(chat) for chat in chats]
        texts = [self._render(chat) for chat in chats]
        spans = [
            [(0, len(text))] if self.loss_on == "all" else self._spoken(chat, text)
            for chat, text in zip(chats, texts, strict=True)
        ]
        tokens = self._tokens(texts, return_offsets_mapping=True)
        return [
            (ids, [any(a <= first < b for a, b in said) for first, _ in places])
            for ids, places, said in zip(tokens["input_ids"], tokens["offset_mapping"], spans, strict=True)
        ]

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, **options)  # the template has written them

    def _render(self, chat: Sequence[Turn], ask: bool = False) -> str:
        return self._apply(chat, tokenize=False, add_generation_prompt=ask)

    def _told(self, chat: Sequence[Turn]) -> Marked:
        found = self._apply(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], [bool(spoken) for spoken in found["assistant_masks"]]

    def _apply(self, chat: Sequence[Turn], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(chat), chat_template=self.template, **options)
        except (TemplateError, TypeError, KeyError) as error:
            raise AFLoRAError(
                f"{self.name}: the chat template refuses an example ({str(error).splitlines()[0]}): {_shown(chat)}"
            ) from None

    def _spoken(self, chat: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        """Where in the rendered text the assistant speaks: what each of its turns adds to all before it."""
        spans = []
        for i, turn in enumerate(chat):
            if turn["role"] != "assistant":
                continue
            before, through = self._render(chat[:i], True), self._render(chat[: i + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise AFLoRAError(
                    f"{self.name}: the tokenizer's chat template writes earlier turns anew when another is added, so "
                    f"it does not tell what the assistant says. Use a template with {{% generation %}} markers, or "
                    f"data.loss_on=all. The example: {_shown(chat)}"
                )
            spans.append((len(before), len(through)))
        return spans


def _asked(chat: Sequence[Turn]) -> Sequence[Turn]:
    """A conversation up to where the assistant is to say its last."""
    return chat[:-1] if chat[-1]["role"] == "assistant" else chat


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
