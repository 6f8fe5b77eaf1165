"""What a model is taken to answer ends with its turn, whatever it generates after that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from aflora_dist.tasks.batches import loader
from aflora_dist.tasks.sampler import EvaluationSampler
from aflora_dist.tasks.sft.answers import answer, generate_answers
from aflora_dist.tasks.sft.batching import PromptCollator
from aflora_dist.tasks.sft.encode import Encoder
from tests.small_lm import make_small_language_model
from tests.tasks.chats import TEMPLATES, chat_tokenizer

QUESTIONS = ["0 + 0?", "1 + 2?", "5 + 9?"]
RIGHT = [0, 3, 14]


class KnowsAll(nn.Module):
    """Answers rightly, ends its turn as the template does, and goes on with other numbers where nothing stops it."""

    def __init__(self, tokenizer: Any, after: str, eos: Any) -> None:
        super().__init__()
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        self.tokenizer, self.after, self.stops = tokenizer, after, []

    def generate(self, *, input_ids: torch.Tensor, eos_token_id: list[int], **_: Any) -> torch.Tensor:
        self.stops.append(eos_token_id)
        rows = [self.tokenizer.decode(row) for row in input_ids]
        right = [RIGHT[next(i for i, question in enumerate(QUESTIONS) if question in row)] for row in rows]
        said = [f"The answer is {number}.{self.after}99 and 77" for number in right]
        tokens = self.tokenizer(said, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, tokens], dim=1)


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 1.3},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"max_time": 1e-4},
        {"stop_strings": ["3"]},
        {"return_dict_in_generate": True},
        {"suppress_tokens": [*range(4, 40)]},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_answers_are_greedy_whatever_the_model_says_of_generating(
    own: dict[str, Any], adapted: bool, tmp_path: Path
) -> None:
    """As by the largest logit, one prompt at a time; and the model's settings are afterwards what they were."""
    folder = make_small_language_model(tmp_path / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        torch.nn.init.normal_(model.get_base_model().lm_head.weight)
    config = GenerationConfig(**own, eos_token_id=tokenizer.eos_token_id)
    (model.get_base_model() if adapted else model).generation_config = config
    prompts = [tokenizer(text)["input_ids"] for text in ("3 + 4", "1 2 3 4 5 6", "2")]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            ids = [*prompt]
            while len(ids) < len(prompt) + 6 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    order = EvaluationSampler([len(prompt) for prompt in prompts], 3, rank=0, world_size=1)
    batches = loader([{"prompt_ids": p} for p in prompts], order, PromptCollator(tokenizer.pad_token_id), False)
    end = Encoder(tokenizer, 100, "completions", None, "it").end_of_turn()
    said = generate_answers(model, batches, tokenizer, 6, end, Accelerator(cpu=True))
    assert [text for _, text in sorted(said)] == expected
    assert (model.get_base_model() if adapted else model).generation_config is config


@pytest.mark.parametrize("eos", [3, [3, 2], None])
@pytest.mark.parametrize(
    ("template", "after"),
    [
        ("unmarked", "<|im_end|>\n<|im_start|>user\n"),
        ("plain", "</s>"),
        ("marked, in words", "\nUSER: "),  # whose turns no token ends
    ],
)
def test_numbers_after_the_end_of_the_turn_do_not_count(template: str, after: str, eos: Any) -> None:
    tokenizer = chat_tokenizer("bytes, trimmed", TEMPLATES[template][0])
    encode = Encoder(tokenizer, 100, "completions", None, "it")
    prompts = encode({"prompt": QUESTIONS, "answer": RIGHT})["prompt_ids"]
    order = EvaluationSampler([len(prompt) for prompt in prompts], 2, rank=0, world_size=1)
    rows = [{"prompt_ids": prompt} for prompt in prompts]
    model = KnowsAll(tokenizer, after, eos)
    share, shown = answer(
        model,
        loader(rows, order, PromptCollator(0), False),
        QUESTIONS,
        RIGHT,
        tokenizer,
        20,
        encode.end_of_turn(),
        Accelerator(cpu=True),
    )
    assert share == 1.0
    assert "99" not in shown
    known = {eos} if isinstance(eos, int) else {*(eos or [])}
    token = encode.end_of_turn().token
    assert all(
        {*stops} == {tokenizer.eos_token_id, *known, *([] if token is None else [token])} for stops in model.stops
    )
