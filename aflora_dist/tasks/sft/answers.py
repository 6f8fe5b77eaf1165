"""Answers that a language model gives: generated on every engine, compared by their last number."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from ...compat.accelerate import unwrap
from ...compat.patch import patch
from ..batches import Batch, move
from .encode import End

# A minus after a digit stands between two numbers.
_NUMBER = re.compile(
    r"(?:(?<![\d.])-)?(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?!\w))?"
)
_SHOWN = 3
_LARGEST = 400  # a number's exponent: beyond, whole numbers would fill the memory


def last_number(text: Any) -> Decimal | None:
    """The last number in a text, as it is written; None if there is none, or one beyond 1e±400.

    Commas are thousands' in 1,234 and 1,00,000 alone.

    >>> last_number("So 3 * 4 = 12. The answer is $1,012.50."), last_number("None."), last_number(7)
    (Decimal('1012.50'), None, Decimal('7'))
    >>> last_number("It is 5e-05."), last_number("from 3-5"), last_number("\N{MINUS SIGN}12 degrees")
    (Decimal('0.00005'), Decimal('5'), Decimal('-12'))
    >>> last_number("1,2"), last_number("1000001")
    (Decimal('2'), Decimal('1000001'))
    """
    found = _NUMBER.findall(str(text).replace("\N{MINUS SIGN}", "-"))
    try:
        number = Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:  # an exponent of twenty digits
        return None
    return number if number is None or abs(number.adjusted()) < _LARGEST else None


@dataclass(frozen=True)
class Answer:
    """What was said to one example, at a place in the data, and what would be right."""

    place: int
    said: str
    right: Any

    @property
    def correct(self) -> bool:
        said, right = last_number(self.said), last_number(self.right)
        if said is None or right is None:
            return False
        if said == right or all(number == number.to_integral_value() for number in (said, right)):
            return said == right
        return math.isclose(said, right, rel_tol=1e-6)  # 0.333333 is a third


def answer(
    model: nn.Module,
    batches: DataLoader[Batch],
    asked: Sequence[str],
    answers: Sequence[Any],
    tokenizer: Any,
    max_new_tokens: int,
    end: End,
    accelerator: Accelerator,
) -> tuple[float, str]:
    """Have every prompt answered greedily, up to the end of the turn. A collective.

    Every rank has as many batches, and generates for as long as any other does, for sharded engines compute together.

    Args:
        batches: Prompts, with an `EvaluationSampler` as batch sampler.
        asked: What is asked last, for people to read, in the data's order.
        answers: What is right.

    Returns:
        The share that is right, and a few answers as Markdown.
    """
    said = generate_answers(model, batches, tokenizer, max_new_tokens, end, accelerator)
    given = [Answer(place, text, answers[place]) for place, text in said]
    right = torch.tensor(float(sum(one.correct for one in given)), device=accelerator.device)
    share = accelerator.reduce(right, "sum").item() / len(answers)
    shown = sorted(gather_object([one for one in given if one.place < _SHOWN]), key=lambda one: one.place)
    return share, "\n\n".join(
        f"**{asked[one.place]}**\n\n{one.said}\n\n_{'right' if one.correct else f'wrong: {one.right}'}_"
        for one in shown
    )


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    batches: DataLoader[Batch],
    tokenizer: Any,
    max_new_tokens: int,
    end: End,
    accelerator: Accelerator,
    done: Callable[[int], Any] = lambda _: None,
) -> list[tuple[int, str]]:
    """What is said to this rank's share of the prompts, with their places in the data. A collective.

    `done` is told how many more prompts the ranks have answered together.
    """
    model.eval()
    generator: Any = unwrap(accelerator, model)
    if "generate" not in vars(generator):
        register_fsdp_forward_method(generator, "generate")  # a no-op on other engines
    order: Any = batches.batch_sampler
    known = generator.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, end.token, *(known if isinstance(known, list) else [known])} - {None}
    given = []
    for together, mine, batch in zip(order.rounds, order.shares(), batches, strict=True):
        prompts = move(batch, accelerator.device)
        with accelerator.autocast(), _greedy(generator):
            tokens = generator.generate(
                **prompts,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(stops) or None,
                synced_gpus=accelerator.num_processes > 1,
            )
        for place, row in zip(mine, tokens[:, batch["input_ids"].shape[1] :], strict=False):  # mine may be none
            ids = list(itertools.takewhile(lambda token: token not in stops, row.tolist()))
            said = tokenizer.decode(ids, skip_special_tokens=True)
            said = (said.partition(end.text)[0] if end.text else said).strip()
            given.append((place, said))
        done(len(together))
    return given


@contextmanager
def _greedy(generator: Any) -> Iterator[None]:
    """Without what a model's own settings say of generating, as penalties, beams or texts to stop at."""
    # PEFT's model hands its settings on to the model below, where they would stay.
    owners = {id(one): one for one in (generator, getattr(generator, "get_base_model", lambda: generator)())}.values()
    plain = GenerationConfig(bos_token_id=getattr(generator.generation_config, "bos_token_id", None))
    with ExitStack() as stack:
        for one in owners:
            stack.callback(patch(one, "generation_config", plain))
        yield
