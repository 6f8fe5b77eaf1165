"""TRL's trainers on the tiny Llama of tests/workers/trainer.py, and small data for each."""

from __future__ import annotations

from typing import Any

from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from aflora_dist import AFLoRAConfig, FreezingCallback

from .trainer import VOCABULARY, arguments_of, build_llama, examples

# TRL's own defaults are for large models on GPUs.
DEFAULTS = {"bf16": False, "gradient_checkpointing": False}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w63, each a token."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def build_reward_model() -> PeftModel:
    set_seed(0)
    config = build_llama().get_base_model().config
    config.num_labels = 1
    return get_peft_model(LlamaForSequenceClassification(config), AFLoRAConfig(r=4, task_type="SEQ_CLS"))


def texts() -> list[str]:
    return [" ".join(f"w{token}" for token in example["input_ids"].tolist()) for example in examples()]


def build(kind: str, options: dict[str, Any], callback: FreezingCallback, lora: bool = False) -> Trainer:
    """A trainer of TRL: "sft" on the very batches of Trainer, "dpo", "reward" or "grpo" on data like it."""
    # Before any TrainingArguments: under ZeRO-3 a model made after them is sharded as it is made, which takes weights.
    model = build_reward_model() if kind == "reward" else build_llama(lora)
    common: dict[str, Any] = {"model": model, "processing_class": tokenizer(), "callbacks": [callback]}
    if kind == "sft":
        rows = [{"input_ids": example["input_ids"].tolist()} for example in examples()]
        args = arguments_of(SFTConfig, DEFAULTS | options)
        data = Dataset.from_list(rows)
        return SFTTrainer(args=args, train_dataset=data, eval_dataset=data, **common)
    if kind == "grpo":

        def many_small_ones(completions: list[str], **kwargs: Any) -> list[float]:
            return [sum(int(w[1:]) < VOCABULARY / 2 for w in text.split() if w[1:].isdigit()) for text in completions]

        args = arguments_of(GRPOConfig, {**DEFAULTS, "num_generations": 2, "max_completion_length": 4, **options})
        data = Dataset.from_list([{"prompt": text} for text in texts()])
        return GRPOTrainer(reward_funcs=many_small_ones, args=args, train_dataset=data, **common)
    pairs = [{"prompt": text, "chosen": " w5 w6", "rejected": " w7 w8 w9"} for text in texts()]
    data = Dataset.from_list(pairs)
    if kind == "dpo":
        args = arguments_of(DPOConfig, DEFAULTS | options)
        return DPOTrainer(args=args, train_dataset=data, eval_dataset=data, **common)
    assert kind == "reward"
    args = arguments_of(RewardConfig, DEFAULTS | options)
    return RewardTrainer(args=args, train_dataset=data, eval_dataset=data, **common)
