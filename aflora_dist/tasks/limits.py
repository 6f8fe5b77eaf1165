"""What a model can take: how many tokens at a time, and which. Known without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import pyarrow.compute as pc

from ..errors import AFLoRAError


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    Attributes:
        name: What errors call the model.
        positions: Tokens at a time; None: any number.
        rows: Those of its embedding: token ids are below.
        kinds: Token type ids are below; None: it does not look at them.
        end: The token at which an encoder with a decoder (T5, BART) tells what a text is: every text has to have it as
            often. None for other models.
        at_last: It tells what a text is at the last place of a row, whatever stands there (XLNet).
    """

    name: str
    positions: int | None
    rows: int
    kinds: int | None
    end: int | None = None
    at_last: bool = False

    @classmethod
    def of(cls, model: Any, name: str) -> Limits:
        """Those of a model, with or without weights, sharded or not."""
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and positions < 1:  # XLNet's way to have no limit
            positions = None
        for path, module in model.named_modules():
            padding = getattr(module, "padding_idx", None)
            if positions is not None and padding is not None and path.endswith("position_embeddings"):
                # RoBERTa's family counts from the one after the padding's: 514 positions are for 512 tokens.
                positions = config.max_position_embeddings - padding - 1
        return cls(
            name=name,
            positions=positions,
            rows=int(getattr(embedding, "num_embeddings", 0) or config.vocab_size),
            kinds=getattr(config, "type_vocab_size", None) or None,
            end=config.eos_token_id if getattr(config, "is_encoder_decoder", False) else None,
            at_last=getattr(config, "summary_type", None) == "last",
        )

    def without(self, virtual: Any) -> Limits:
        """What is left where an adapter puts so many tokens of its own (prompt learning) before those of a text."""
        taken = virtual if isinstance(virtual, int) else 0
        return self if self.positions is None else replace(self, positions=self.positions - taken)

    def check_length(self, length: int) -> None:
        """Raise an AFLoRAError if texts of so many tokens (data.max_length) are too long."""
        if self.positions is not None and length > self.positions:
            raise AFLoRAError(f"data.max_length={length} is more than the {self.positions} positions of {self.name!r}.")

    def check_room(self, asked: Sequence[int], answer: int, who: Callable[[int], str], then: str) -> None:
        """Raise an AFLoRAError if a prompt of so many tokens leaves no room for an answer.

        Args:
            who: What errors call the prompt at a place.
            then: What to do.
        """
        longest = max(range(len(asked)), key=lambda place: asked[place])
        if self.positions is not None and asked[longest] + answer > self.positions:
            raise AFLoRAError(
                f"{who(longest)} asks with {asked[longest]} tokens: with an answer of data.max_new_tokens={answer} "
                f"that is more than the {self.positions} positions of {self.name!r}. {then}"
            )

    def check_padding(self, tokenizer: Any) -> None:
        """Raise an AFLoRAError if examples cannot be padded."""
        if tokenizer.pad_token_id is None:
            raise AFLoRAError(
                f"The tokenizer of {self.name!r} has no token to pad with, nor one for the end of a text: add a "
                f'"pad_token" to its tokenizer_config.json.'
            )
        self._check_token(tokenizer, tokenizer.pad_token_id, "with which texts are padded")

    def check_tokens(self, tokenizer: Any, tokens: datasets.Dataset, name: str) -> None:
        """Raise an AFLoRAError if there is a token in any example of which the model knows nothing.

        Args:
            tokens: Its columns of token ids are looked at, and of token types.
            name: What errors call the examples.
        """
        for column in {"input_ids", "prompt_ids"} & {*tokens.column_names}:
            largest, place = _largest(tokens, column)
            self._check_token(tokenizer, largest, f"in example {place + 1} of {name}")
        if self.kinds is not None and "token_type_ids" in tokens.column_names:
            largest, place = _largest(tokens, "token_type_ids")
            if largest >= self.kinds:
                raise AFLoRAError(
                    f"Example {place + 1} of {name} has tokens of {largest + 1} types (a text and another), and "
                    f"{self.name!r} knows {self.kinds}: its tokenizer is another model's."
                )

        if self.end is not None:
            ends = [ids.count(self.end) for ids in tokens["input_ids"]]
            odd = next((place for place, number in enumerate(ends) if number != ends[0]), None)
            if odd is not None:
                raise AFLoRAError(
                    f"Example {odd + 1} of {name} has the token {tokenizer.convert_ids_to_tokens(self.end)!r} "
                    f"{ends[odd]} times, and example 1 {ends[0]} times: {self.name!r} tells at it what a text is. Take "
                    f"it out of the texts."
                )

    def _check_token(self, tokenizer: Any, token: int, where: str) -> None:
        if token >= self.rows:
            raise AFLoRAError(
                f"The token {tokenizer.convert_ids_to_tokens(token)!r} {where} has the number {token}, and the "
                f"embedding of {self.name!r} has {self.rows} rows: the tokenizer is another model's, or was added to. "
                f"Save the model with model.resize_token_embeddings({len(tokenizer)}), or take the token out."
            )


def _largest(tokens: datasets.Dataset, column: str) -> tuple[int, int]:
    """The largest number in a column of lists, and the first row that has it."""
    table = tokens.select_columns([column]).with_format("arrow")
    best, place, seen = -1, 0, 0
    for part in table.iter(batch_size=10_000):
        lists = part.column(column).combine_chunks()
        largest = pc.max(lists.flatten()).as_py()
        if largest is not None and largest > best:
            at = pc.index(lists.flatten(), largest).as_py()
            best, place = largest, seen + pc.list_parent_indices(lists)[at].as_py()
        seen += len(lists)
    return best, place
