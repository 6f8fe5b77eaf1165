"""What a chat template makes of a conversation: its text, where in it the assistant speaks, and what ends a turn.

Where the template has {% generation %} marks, they are rendered as characters that the text does not have. (What
transformers tells of them is wrong in macros.) Elsewhere what an assistant's turn adds to the rendered text is looked
up, and must come where it is expected.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from datetime import date
from typing import Any

from ...errors import AFLoRAError, one_line
from ...untrusted import load_json
from ..reading import shown
from .examples import Turn, is_learned

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
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_MACRO = "aflora_generation"
_CLOCK = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
DAY = date(2024, 7, 26)  # on which it is always: what Llama 3.2's template takes where nobody tells it
_UNUSED = [chr(0xFDD0 + i) for i in range(32)]  # code points that Unicode keeps free of characters
Tools = Sequence[Any] | None  # that the assistant may call: JSON schemas
Span = tuple[int, int]  # in the rendered text: the first character, and the one after the last


class Template:
    """The tokenizer's own chat template, or a plain one.

    Args:
        name: What errors call the examples.

    Attributes:
        source: As Jinja reads it. Of today's date it makes `DAY`: an example that another day changes would be another
            one for a run that is gone on with, for what predicts, and for a node that begins after midnight.
        dated: Whether it does.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        if not tokenizer.chat_template and tokenizer.eos_token is None:
            raise AFLoRAError(
                f"{name}: the tokenizer has no chat template, and no token that ends a text, with which turns would "
                f'end: add an "eos_token" to its tokenizer_config.json.'
            )
        own: str = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
        self.source = _CLOCK.sub(lambda call: json.dumps(DAY.strftime(call[2])), own)
        self.dated = self.source != own
        self._marked = _MARK.search(_COMMENT.sub("", self.source)) is not None
        self._text_calls: bool | None = None
        self._forms: dict[str, tuple[bool, bool, bool]] = {}

    def render(self, chat: Sequence[Turn], ask: bool = False, tools: Tools = None) -> str:
        """The text of a conversation, or the template's AFLoRAError; `ask`: up to where the assistant is to speak."""
        return self._apply(self.source, chat, ask, tools)

    def _apply(self, source: str, chat: Sequence[Turn], ask: bool, tools: Tools) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(chat), tools=tools, chat_template=source, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # of the template's own code, which may do anything
            reason = one_line(error)
            raise AFLoRAError(
                f"{self.name}: the chat template refuses an example ({reason}): {shown(chat, 200)}"
            ) from None
        return text

    def spoken(self, chat: Sequence[Turn], tools: Tools, text: str) -> list[Span]:
        """Where in the text of a conversation the assistant says what is to be learned, with the end of its turn.

        Raises:
            AFLoRAError: The template does not tell.
        """
        return (self._between_marks if self._marked else self._added)(chat, tools, text)

    def told(self, chat: Sequence[Turn]) -> int:
        """In how many places at least the assistant speaks that a text of this conversation ought to tell."""
        return 0 if self._marked else sum(map(is_learned, chat))

    def _between_marks(self, chat: Sequence[Turn], tools: Tools, text: str) -> list[Span]:
        start, end = [c for c in _UNUSED if c not in text and c not in self.source][:2]
        spans: list[Span] = []
        rest, open_at = "", []
        marked = self._apply(_with_marks(self.source, start, end), chat, False, tools)
        for piece in re.split(f"([{start}{end}])", marked):
            if piece == start:
                open_at.append(len(rest))
            elif piece == end and open_at:
                begun = open_at.pop()
                if not open_at:  # the outermost
                    spans.append((begun, len(rest)))
            else:
                rest += piece
        if rest != text or open_at:
            raise AFLoRAError(
                f"{self.name}: the chat template changes what it has written between its {{% generation %}} marks, so "
                f"they do not tell what the assistant says. Put them where the text is written, or use "
                f"data.loss_on=all. The example: {shown(chat, 200)}"
            )
        said = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        learned = [i for i in said if is_learned(chat[i])]
        if len(spans) == len(said):
            spans = [span for span, i in zip(spans, said, strict=True) if i in learned]
        elif any(i not in learned and (chat[i].get("content") or "") for i in said):
            # The marks do not tell which turn is given, unless all that is learned comes after it: as after a prompt.
            asked = self.render(chat[: learned[0]], True, tools) if said[-len(learned) :] == learned else ""
            if not asked or not text.startswith(asked):
                return []
            spans = [span for span in spans if span[1] > len(asked)]
        return [(begin, end) for begin, end in spans if begin < end]

    def _added(self, chat: Sequence[Turn], tools: Tools, text: str) -> list[Span]:
        """Of turns that stand in the text as they were written when they were said.

        Some templates write an earlier turn otherwise once others follow (without its thoughts, say): nobody will ask
        for it as it then is, and it is not learned. The last one has to be told.
        """
        spans = []
        last = max((i for i, turn in enumerate(chat) if turn["role"] == "assistant"), default=-1)
        for i, turn in enumerate(chat):
            if not is_learned(turn):
                continue
            before = self.render(chat[:i], True, tools) if i else self._header(turn)
            through = self.render(chat[: i + 1], tools=tools)
            if text.startswith(through) and through.startswith(before):
                spans.append((len(before), len(through)))
            elif i == last:
                raise AFLoRAError(
                    f"{self.name}: the tokenizer's chat template writes earlier turns anew when another is added, or "
                    f"begins a turn otherwise than it asks for it: it does not tell what the assistant says. Use a "
                    f"template with {{% generation %}} markers, or data.loss_on=all. The example: {shown(chat, 200)}"
                )
        return spans

    def _header(self, turn: Turn) -> str:
        """What stands before the words of an assistant that begins, up to where the template would ask for them."""
        one, other = [self.render([self.fitted({**turn, "content": words})]) for words in _UNUSED[:2]]
        pairs = itertools.takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False))
        header = "".join(character for character, _ in pairs)
        asked = [self.fitted({"role": "user", "content": _UNUSED[0]})]
        prompt = self.render(asked, True).removeprefix(self.render(asked))
        return "".join(header.rpartition(prompt)[:2]) if prompt and prompt in header else header

    def fitted(self, turn: Turn) -> Turn:
        """The turn with its content in a form that the template writes: text, or parts.

        Raises:
            ValueError: A part is no text, and the template writes texts alone.
        """
        if turn.get("tool_calls"):
            turn = {**turn, "tool_calls": [self._fitted_call(call) for call in turn["tool_calls"]]}
        content = turn.get("content")
        if not isinstance(content, str | list):
            return turn
        texts, parts, as_json = self._written(turn["role"])
        if isinstance(content, str):
            return turn if texts or not parts else {**turn, "content": [{"type": "text", "text": content}]}
        said = [part.get("text") if isinstance(part, dict) else part for part in content]
        strange = next((part for part, text in zip(content, said, strict=True) if not isinstance(text, str)), None)
        if parts and not (as_json and texts and strange is None):
            return turn
        if strange is not None:
            raise ValueError(f"the chat template writes texts alone, and a turn has the part {shown(strange, 200)}")
        return {**turn, "content": "".join(map(str, said))}

    def _fitted_call(self, call: Any) -> Any:
        """A call whose arguments are an object, or its JSON text (as OpenAI has it), whichever the template writes."""
        function = call.get("function", call) if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if function is None or not isinstance(arguments, str | dict):
            return call
        if isinstance(arguments, str) is self._calls_as_text():
            return call
        if isinstance(arguments, dict):
            meant: Any = json.dumps(arguments, ensure_ascii=False)
        else:
            try:
                meant = load_json(arguments)
            except ValueError:
                return call
        changed = {**function, "arguments": meant}
        return {**call, "function": changed} if "function" in call else changed

    def _calls_as_text(self) -> bool:
        """Whether the template writes the arguments of a call right if they are JSON text, and only then."""
        if self._text_calls is None:
            right = []
            for arguments in ({"x": _UNUSED[0]}, json.dumps({"x": _UNUSED[0]}, ensure_ascii=False)):
                function = {"name": "f", "arguments": arguments}
                turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
                turn["tool_calls"][0]["id"] = "abcdefghi"  # type: ignore[index] # Mistral's want one of nine letters
                try:
                    text = self.render([{"role": "user", "content": "f"}, turn])
                except AFLoRAError:
                    text = ""
                right.append(re.search(rf'(?<!\\)"x": ?"{_UNUSED[0]}', text) is not None)
            self._text_calls = right == [False, True]
        return self._text_calls

    def _written(self, role: str) -> tuple[bool, bool, bool]:
        """Whether the template writes what this role says as text, whether as parts, and these as JSON, unlike text."""
        if role not in self._forms:
            words = _UNUSED[0]
            written = []
            for content in (words, [{"type": "text", "text": words}]):
                turn = {"role": role, "content": content}
                asked, told = {"role": "user", "content": content}, {"role": "assistant", "content": content}
                chat = {"system": [turn, asked], "user": [turn], "assistant": [asked, turn]}
                try:
                    written.append(self.render(chat.get(role, [asked, told, turn])))
                except AFLoRAError:
                    written.append("")
            text, parts = written
            as_json = '"type"' in parts and f'"{words}' not in text  # elsewhere on purpose: what a tool returns
            self._forms[role] = words in text, words in parts and "'type'" not in parts, as_json
        return self._forms[role]

    def after_a_turn(self) -> list[str]:
        """What the template writes behind an assistant's last word: in the end, and before the user speaks again."""
        asked, said, more = _UNUSED[:3]
        turns = [
            self.fitted({"role": role, "content": words})
            for role, words in (("user", asked), ("assistant", said), ("user", more))
        ]
        found = []
        for chat in (turns[:2], turns):
            try:
                found.append(self.render(chat).rpartition(said)[2].partition(more)[0])
            except AFLoRAError:  # it wants other turns, as a tool's
                continue
        return found


def _with_marks(source: str, start: str, end: str) -> str:
    """A template that writes `start` and `end` where it has its marks, and else what it wrote."""

    def call(mark: re.Match[str]) -> str:
        return f"{{%{mark[1]} {'endcall' if mark[2] else f'call {_MACRO}()'} {mark[3]}%}}"

    # The line's end belongs to the macro: templates are rendered with trim_blocks.
    macro = f"{{% macro {_MACRO}() %}}{start}{{{{ caller() }}}}{end}{{% endmacro %}}\n"
    return macro + _MARK.sub(call, source)
