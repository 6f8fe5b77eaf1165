"""transformers' Trainer, or one of TRL's, on a tiny Llama with grouped attention: what people fine-tune, made small.

Run under `accelerate launch` by tests/test_trainer.py. Every rank writes what it saw to OUT/rank<N>.pt, and Trainer its
model to OUT/model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from aflora_dist import AFLoRAConfig, FreezingCallback

BATCH, BATCHES, LENGTH, VOCABULARY, EPOCHS, RATE = 12, 4, 8, 64, 3, 1e-2
STEPS = EPOCHS * BATCHES


# LoRA's matrices of feed-forward layers freeze, and in the end all of the lowest block.
LORA: dict[str, Any] = {
    "score": "change",
    "unit": "layer",
    "prefix": True,
    "prefix_epochs": 0.0,
    "freezable": r".*\.mlp\..*\.lora_[AB]\.default\.weight",
}


def build_llama(lora: bool = False, **adapter: Any) -> PeftModel:
    """Two layers, four heads that share two keys and values."""
    set_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    if lora:
        layers = ["q_proj", "v_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=layers, init_lora_weights=False)
        return get_peft_model(base, config)
    return get_peft_model(base, AFLoRAConfig(r=4, task_type="CAUSAL_LM", **adapter))


def batch(number: int) -> dict[str, torch.Tensor]:
    """The global batch of an update."""
    generator = torch.Generator().manual_seed(1000 + number % BATCHES)
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def examples() -> list[dict[str, torch.Tensor]]:
    return [{k: v[i] for k, v in batch(number).items()} for number in range(BATCHES) for i in range(BATCH)]


class Examples(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.examples = examples()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.examples[index]


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """The same without a length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(examples())


def settings(out: Path, ranks: int = 1, **options: Any) -> dict[str, Any]:
    """Arguments of TrainingArguments, for the same global batches on any number of ranks."""
    chosen: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": BATCH // ranks,
        "per_device_eval_batch_size": BATCH // ranks,
        "num_train_epochs": EPOCHS,
        "learning_rate": RATE,
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    if ranks > 1:
        chosen["ddp_backend"] = "gloo"
    return chosen | options


def arguments_of(kind: type[TrainingArguments], options: dict[str, Any]) -> Any:
    """TrainingArguments or TRL's; FSDP2 on CPU ranks if the launcher asked for it (profiling/fsdp_on_cpu.py)."""
    made = kind(**options)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # they have made accelerate's state anew
        state: Any = PartialState()
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def values(callback: FreezingCallback) -> dict[str, torch.Tensor]:
    """All of the adapter, whole. A collective."""
    assert callback.freezing is not None
    engine = callback.freezing.engine
    found = engine.values([name for name in engine.parameters if "lora" in name])
    return {name: value.detach().float().cpu().clone() for name, value in found.items()}


class Signal(TrainerCallback):
    """As Slurm sends one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def other_ways(trainer: Trainer, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter in state dicts that other loops save: on the main process. A collective."""
    found = {"get_state_dict": trainer.accelerator.get_state_dict(trainer.model_wrapped)}
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.save_16bit_model(str(out), "model.bin", exclude_frozen_parameters=True)
        if trainer.accelerator.is_main_process:
            found["save_16bit_model"] = torch.load(out / "model.bin")
    return {way: {n: v for n, v in (state or {}).items() if "aflora" in n} for way, state in found.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--options", type=json.loads, default={}, help="of TrainingArguments")
    parser.add_argument("--resume", default=None, help="a checkpoint, or a folder of these, whose last is meant")
    parser.add_argument("--signal", type=int, help="the last rank gets SIGUSR1 before its update of this number")
    parser.add_argument("--again", action="store_true", help="then resume from step 4, and train once more")
    parser.add_argument("--lora", action="store_true", help="LoRA, and what freezes of it: see LORA")
    parser.add_argument("--trl", default=None, help="a trainer of TRL instead, see trl_trainers.py")
    args = parser.parse_args(arguments)
    args.out.mkdir(exist_ok=True)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"  # else get_state_dict refuses
    options = settings(args.out, ranks, **args.options)
    callback = FreezingCallback(**(LORA if args.lora else {}))
    common: dict[str, Any] = {"train_dataset": Examples(), "eval_dataset": Examples(), "callbacks": [callback]}
    if args.trl:
        from tests.workers.trl_trainers import build

        trainer = build(args.trl, options, callback, lora=args.lora)
    else:
        trainer = Trainer(model=build_llama(args.lora), args=arguments_of(TrainingArguments, options), **common)
    if args.signal is not None and int(os.environ.get("RANK", "0")) == ranks - 1:
        trainer.add_callback(Signal(args.signal))
    trainer.train(resume_from_checkpoint=args.resume and (get_last_checkpoint(args.resume) or args.resume))
    assert callback.freezing is not None
    events = [vars(event) for event in callback.freezing.events]
    trainer.save_model(str(args.out / "model"))
    ways = other_ways(trainer, args.out)
    result = {
        "kind": callback.freezing.engine.kind,
        "events": events,
        "values": values(callback),
        "ways": ways if trainer.accelerator.is_main_process else {},
        "steps": trainer.state.global_step,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "rates": [line["learning_rate"] for line in trainer.state.log_history if "loss" in line],
        "best": trainer.state.best_model_checkpoint,
    }
    if args.again:
        trainer.train(resume_from_checkpoint=str(args.out / "checkpoint-4"))
        result["resumed"] = [vars(event) for event in callback.freezing.events], values(callback)
        if not args.lora:  # of which nothing is left to freeze
            trainer.train()
        result["again"] = [vars(event) for event in callback.freezing.events], callback.freezing.step
    torch.save(result, args.out / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
