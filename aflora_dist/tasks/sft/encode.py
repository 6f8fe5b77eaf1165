"""Conversations become tokens, and which of them carry loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property
from typing import Any

from ...errors import AFLoRAError
from ..reading import shown
from ..tokens import Columns
from .batching import IGNORED
from .examples import THOUGHTS, Turn, is_learned, tools, turns
from .offsets import carried_by, check_offsets, with_whole_offsets
from .template import DAY, Template, Tools


class Note(IntFlag):
    """What is worth saying of an example."""

    JOINED = 1
    WRITTEN = 2
    TWICE = 4
    LEFT_OUT = 8
    REWRITTEN = 16
    NO_THOUGHT = 32
    ENDED = 64
    GIVEN = 128
    DATED = 256


@dataclass(frozen=True)
class End:
    """What ends the assistant's turn.

    Attributes:
        token: One that stands for that, or for what comes next.
        text: Where there is none, what is written between its last word and the user's next one; may be empty.
    """

    token: int | None
    text: str


Marked = tuple[list[int], list[bool], Note]  # tokens, which of them carry loss, and what is worth saying
SAID = {
    Note.JOINED: "in which the assistant's first word is one token with what stands before it, and is not learned "
    "(does the generation prompt end in a blank?)",
    Note.WRITTEN: "in whose messages special tokens are written, which are taken for such",
    Note.TWICE: "that begin or end with a special token twice: in the text, and as the tokenizer adds it",
    Note.REWRITTEN: "of which only the assistant's last words are learned: the chat template writes earlier ones "
    "otherwise once others follow",
    Note.NO_THOUGHT: "in which the chat template begins what the assistant says with an empty reasoning part, which is "
    "learned",
    Note.ENDED: "to which the end of the assistant's turn is added, which the chat template leaves to the next turn",
    Note.GIVEN: "in which a turn of the assistant is not learned: it says nothing, is of a prompt, or has weight 0 or "
    "train false",
    Note.DATED: f"in which the chat template writes today's date: it is {DAY} in all, on whatever day they are read",
    Note.LEFT_OUT: "of which the chat template leaves something out (a turn, thoughts, a tool), or writes it otherwise",
}


_STRETCH = 1_000_000  # characters that are made into tokens at once: a token takes some hundred bytes meanwhile
# An assistant that thinks nothing: <think></think>, or its end alone where the generation prompt has begun it.
_NO_THOUGHT = re.compile(r"\s*(<[^<>]*think[^<>]*>)?\s*</[^<>]*think[^<>]*>")


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
        self.tokenizer, self.max_length = with_whole_offsets(tokenizer), max_length
        self.loss_on, self.system, self.name = loss_on, system, name
        self.template = Template(tokenizer, name)
        special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(special) or r"(?!)")

    @property
    def settings(self) -> list[Any]:
        """What the tokens depend on besides the examples and the tokenizer."""
        return [self.max_length, self.loss_on, self.system, self.template.source]

    def __call__(self, examples: Columns) -> Columns:
        """Columns input_ids and labels; count, the tokens that carry loss; cut, whether something was left out; notes.

        Where there are answers, prompt_ids too: what is asked, up to where the assistant is to speak.
        """
        rows = [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
        if "text" in examples:
            marked = self._texts([self._text(row) for row in rows])
        else:
            chats, may_call = zip(*map(self._turns, rows), strict=True)
            marked = self._chats(chats, may_call)
        columns: Columns = {name: [] for name in ("input_ids", "labels", "count", "cut", "notes")}
        for ids, carries, note in marked:
            kept = ids[: self.max_length]
            labels = [token if loss else IGNORED for token, loss in zip(kept, carries, strict=False)]
            labels[:1] = [IGNORED] * len(labels[:1])  # nothing before it to say it
            columns["input_ids"].append(kept)
            columns["labels"].append(labels)
            columns["count"].append(sum(label != IGNORED for label in labels))
            columns["cut"].append(len(kept) < len(ids))
            columns["notes"].append(int(note))
        if "answer" in examples:
            each = zip(chats, may_call, examples["answer"], strict=True)
            asked = [self.template.render(self._asked(chat, right), True, named) for chat, named, right in each]
            columns["prompt_ids"] = self._tokens(asked)["input_ids"]
        return columns

    def _text(self, row: Mapping[str, Any]) -> str:
        if not isinstance(row["text"], str):
            raise AFLoRAError(f"{self.name}: an example has {row['text']!r} in column text, which is not text.")
        return row["text"]

    def _texts(self, texts: list[str]) -> list[Marked]:
        """Plain text with its end: it has no completion, so all of it carries loss.

        A long one becomes several examples, each of which begins with the last token of the one before it.
        """
        end, special = self.tokenizer.eos_token_id, {*self.tokenizer.all_special_ids}
        found = []
        for ids in map(self._ids, texts):
            ended = ids if end is None or ids[-1:] == [end] else [*ids, end]
            twice = any(len(two) == 2 and two[0] == two[1] in special for two in (ended[:2], ended[-2:]))
            for start in range(0, max(len(ended) - 1, 1), max(self.max_length - 1, 1)):
                piece = ended[start : start + self.max_length]
                found.append((piece, [True] * len(piece), Note.TWICE if twice and not start else Note(0)))
        return found

    def _ids(self, text: str) -> list[int]:
        """A text's tokens; of a long text's, stretch by stretch, cut before blanks, where no token goes on."""
        stretches, start = [], 0
        while len(text) - start > _STRETCH:
            last = start + _STRETCH
            at = next((i for i in range(last, start, -1) if text[i].isspace() and not text[i - 1].isspace()), last)
            stretches.append(text[start:at])
            start = at
        whole: list[int] = self.tokenizer(text[start:])["input_ids"]
        if not stretches:
            return whole
        plain = self._tokens([text[start:]])["input_ids"][0]
        before = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
        ids = [token for stretch in stretches for token in self._tokens([stretch])["input_ids"][0]]
        return [*whole[:before], *ids, *whole[before:]]

    def _turns(self, row: Mapping[str, Any]) -> tuple[list[Turn], Tools]:
        try:
            return [self.template.fitted(turn) for turn in turns(row, self.system)], tools(row)
        except ValueError as error:
            raise AFLoRAError(f"{self.name}: {error}: {shown(row, 200)}") from None

    def _chats(self, chats: Sequence[list[Turn]], may_call: Sequence[Tools]) -> list[Marked]:
        texts = [self.template.render(chat, tools=named) for chat, named in zip(chats, may_call, strict=True)]
        tokens = self._tokens(texts, return_offsets_mapping=True)
        found = []
        for chat, named, text, ids, offsets in zip(
            chats, may_call, texts, tokens["input_ids"], tokens["offset_mapping"], strict=True
        ):
            carries, note = [True] * len(ids), self._noted(chat, named, text)
            if self.loss_on == "completions":
                spans = self.template.spoken(chat, named, text)
                carries, joined = carried_by(text, offsets, spans)
                check_offsets(self.tokenizer, text, ids, offsets, carries)
                note |= Note.JOINED if joined else Note(0)
                note |= Note.GIVEN if any(t["role"] == "assistant" and not is_learned(t) for t in chat) else Note(0)
                note |= Note.REWRITTEN if len(spans) < self.template.told(chat) else Note(0)
                note |= Note.NO_THOUGHT if any(_NO_THOUGHT.match(text, *span) for span in spans) else Note(0)
            found.append(self._ended(chat, ids, carries, note))
        return found

    def _ended(self, chat: Sequence[Turn], ids: list[int], carries: list[bool], note: Note) -> Marked:
        """With the end of the assistant's turns, which some templates leave to the next; it has to be learned."""
        end = self._left_to_the_next
        if end is None:
            return ids, carries, note
        carries = [now or (i > 0 and carries[i - 1] and ids[i] == end) for i, now in enumerate(carries)]
        if chat[-1]["role"] == "assistant" and ids[-1] != end and (self.loss_on == "all" or is_learned(chat[-1])):
            return [*ids, end], [*carries, True], note | Note.ENDED
        return ids, carries, note

    @cached_property
    def _left_to_the_next(self) -> int | None:
        """The token that ends the assistant's turn, where that stands there only if somebody else speaks next."""
        after = self.template.after_a_turn()
        if len(after) < 2 or self._first_added(after[0]) is not None:
            return None
        return self._first_added(after[1])

    def _first_added(self, text: str) -> int | None:
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        return next((token for token in self._tokens([text])["input_ids"][0] if token in added), None) if text else None

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, **options)  # the template has written them

    def _noted(self, chat: Sequence[Turn], tools: Tools, text: str) -> Note:
        contents = [turn.get("content") for turn in chat]
        parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
        said = [part.get("text") if isinstance(part, dict) else part for part in parts]
        texts = [said for said in said if isinstance(said, str)]
        called = [call for turn in chat for call in turn.get("tool_calls") or ()]
        thought = [turn.get(key) for turn in chat for key in THOUGHTS]
        names = [call.get("function", call).get("name") for call in (*called, *(tools or ()))]
        note = Note.WRITTEN if any(map(self._special.search, texts)) else Note(0)
        note |= Note.DATED if self.template.dated else Note(0)
        whole = "".join(text.split())
        meant = [*texts, *(name for name in (*thought, *names) if isinstance(name, str))]
        return note if all("".join(part.split()) in whole for part in meant) else note | Note.LEFT_OUT

    def _asked(self, chat: Sequence[Turn], right: Any) -> Sequence[Turn]:
        """A conversation up to where the assistant is to say its last; whole where it is not asked for that."""
        asked = chat[:-1] if chat[-1]["role"] == "assistant" else chat
        if not asked and right not in (None, ""):
            raise AFLoRAError(f"{self.name}: an example asks nothing that could be answered: {shown(chat, 200)}")
        return asked or chat

    def end_of_turn(self) -> End:
        """What ends the assistant's turn."""
        after = self.template.after_a_turn()
        token = next((token for text in after if (token := self._first_added(text)) is not None), None)
        return End(None, after[-1].strip() if after else "") if token is None else End(token, "")
