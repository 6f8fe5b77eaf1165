"""One training that `profiling.throughput` measures, on one rank: the main job, or Trainer with a method of PEFT.

    accelerate launch -m profiling.trainings FOLDER '{"run": "lora/random", ...}'

writes FOLDER/rank<n>.json: for each optimizer update when it ended, and the examples, real tokens and computed tokens
(padding included) of this rank.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, set_seed
from peft import AdaLoraConfig, LoraConfig, TaskType, VeraConfig, get_peft_model
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from aflora_dist.adapter.architectures import target_modules
from aflora_dist.methods.aflora import AFLoRA
from aflora_dist.methods.autocast import match_autocast
from aflora_dist.notices import quiet_libraries
from aflora_dist.options import Config
from aflora_dist.tasks.data import load_data
from aflora_dist.tasks.model import load_base
from aflora_dist.tasks.tokens import tokenized
from aflora_dist.training.command_line import parse
from aflora_dist.training.loop import train

MAIN_JOB = "main job"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is run.

    Attributes:
        run: "main job", or METHOD/SAMPLING: one of `peft_config`, and one of Trainer's train_sampling_strategy.
        glue: Folder of GLUE's TSV files.
        updates, warmup: Optimizer updates that are measured, and those before.
        batch_size: Examples per update, over all ranks.
        dtype: fp32, or bf16 for autocast.
    """

    run: str
    task: str
    glue: str | None
    model: str
    updates: int
    warmup: int
    batch_size: int
    max_length: int
    dtype: str
    seed: int

    @property
    def total(self) -> int:
        return self.warmup + self.updates

    def config(self, folder: Path) -> tuple[Config, str]:
        """The main job's configuration: all of the freezing schedule lies in the measured updates."""
        chosen = {
            "run.dir": folder / "run",
            "run.save_every": 0,
            "run.log_every": self.total,
            "run.tensorboard": False,
            "model.name": self.model,
            "data.task": self.task,
            "data.max_length": self.max_length,
            "data.max_train_examples": self.total * self.batch_size,
            "data.max_eval_examples": 1,
            "freezing.initial_epochs": (self.warmup + 0.1 * self.updates) / self.total,
            "freezing.final_epochs": 0.7 * self.updates / self.total,
            "train.epochs": 1,
            "train.batch_size": self.batch_size,
            "train.learning_rate": 1e-3,
            "train.head_learning_rate": 1e-3,
            "train.seed": self.seed,
        }
        if self.glue is not None and self.task != "demo":
            chosen["data.path"] = self.glue
        return parse([part for key, value in chosen.items() for part in (f"--{key}", str(value))])


class Watch:
    """Takes note of each batch that a model trains on and of each optimizer update, the same way for everybody."""

    def __init__(self, training: Training) -> None:
        self.synchronized = (training.warmup, training.total)  # the window's ends; between them a GPU runs free
        self.updates: list[tuple[float, list[Any]]] = []
        self._batches: list[Any] = []
        register_optimizer_step_post_hook(self._updated)

    def look_at(self, model: Any) -> Any:
        model.register_forward_pre_hook(self._takes, with_kwargs=True)
        return model

    def _takes(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            tokens, mask = kwargs["input_ids"], kwargs["attention_mask"]
            self._batches.append((len(tokens), mask.sum(), tokens.numel()))

    def _updated(self, *_: Any) -> None:
        if not self._batches:
            return  # the optimizer is tried before the training begins
        if torch.cuda.is_available() and len(self.updates) + 1 in self.synchronized:
            torch.cuda.synchronize()
        self.updates.append((time.perf_counter(), self._batches))
        self._batches = []

    def write(self, folder: Path) -> None:
        lines = [[ended, *(int(sum(column)) for column in zip(*seen, strict=True))] for ended, seen in self.updates]
        (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(lines))


class WatchedAFLoRA(AFLoRA):
    """AFLoRA as the main job trains it, watched."""

    def __init__(self, config: Config, watch: Watch) -> None:
        super().__init__(config)
        self.watch = watch

    def adapt(self, model: Any, head: Sequence[str]) -> Any:
        return self.watch.look_at(super().adapt(model, head))


class Allocating(TrainerCallback):
    """AdaLoRA's own step, which Trainer does not take: after the optimizer's, before the gradients go."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)


class SampledTrainer(Trainer):
    """Trainer, on some of an epoch's global batches as its own sampler makes them, even in size."""

    def __init__(self, training: Training, lengths: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.training, self.lengths = training, lengths

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        order = list(super()._get_train_sampler(train_dataset) or ())
        batch, piece, seed = self.training.batch_size, self.args.train_batch_size, self.training.seed
        before, measured = (
            evenly(order, self.lengths, batch, piece, count, seed)
            for count in (self.training.warmup, self.training.updates)
        )
        (chosen,) = broadcast_object_list([before + measured])
        return chosen


def evenly(order: Sequence[int], lengths: Sequence[int], batch: int, piece: int, count: int, seed: int) -> list[int]:
    """The examples of `count` of an epoch's global batches: from the smallest to the largest at even distances.

    Args:
        order: The epoch's examples. `batch` in a row are an update's, `piece` in a row one rank's.
        lengths: Tokens of each example.

    Returns:
        Examples in an order of the same kind, the batches shuffled.
    """
    batches = [order[at : at + batch] for at in range(0, len(order) - batch + 1, batch)]
    if count > len(batches):
        raise SystemExit(f"An epoch has {len(batches)} updates of {batch} examples, fewer than {count}: ask for fewer.")

    def computed(examples: Sequence[int]) -> int:
        return sum(piece * max(lengths[i] for i in examples[at : at + piece]) for at in range(0, batch, piece))

    batches.sort(key=computed)
    chosen = [batches[int((n + 0.5) * len(batches) / count)] for n in range(count)]
    random.Random(seed).shuffle(chosen)
    return [example for examples in chosen for example in examples]


def peft_config(method: str, targets: list[str], head: Sequence[str], total: int) -> Any:
    """The method as its users have it: PEFT's defaults (LoRA r=8, VeRA r=256, AdaLoRA from 12 to 8)."""
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "target_modules": targets,
        "modules_to_save": [name for name in head if name not in SEQ_CLS_HEAD_NAMES] or None,
    }
    if method == "adalora":
        return AdaLoraConfig(total_step=total, tinit=total // 10, tfinal=total // 2, **common)
    return {"lora": LoraConfig, "vera": VeraConfig}[method](**common)


def train_with_trainer(training: Training, folder: Path, watch: Watch) -> None:
    method, _, sampling = training.run.partition("/")
    on_gpu, ranks = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=training.batch_size // ranks,
        max_steps=training.total,
        train_sampling_strategy=sampling,
        bf16=training.dtype == "bf16",
        seed=training.seed,
        use_cpu=not on_gpu,
        ddp_backend="gloo" if ranks > 1 and not on_gpu else None,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    assert arguments.world_size == ranks, "every process believes to be alone"
    config, _ = training.config(folder)
    # All: grouping by length is better the more there are.
    config = replace(config, data=replace(config.data, max_train_examples=None))
    data = load_data(config.data, training.seed)
    set_seed(training.seed)
    base, tokenizer, head = load_base(config.model, data.labels)
    train_set = tokenized(data.train, tokenizer, training.max_length, "the training split")
    targets = target_modules(base)
    model = watch.look_at(get_peft_model(base, peft_config(method, targets, head, training.total)))
    if training.dtype == "bf16":
        match_autocast(model)
    SampledTrainer(
        training,
        [len(tokens) for tokens in train_set["input_ids"]],
        model=model,
        args=arguments,
        train_dataset=train_set,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Allocating(model)] if method == "adalora" else [],
    ).train()


def main(argv: list[str] | None = None) -> None:
    folder, setting = sys.argv[1:] if argv is None else argv
    training = Training(**json.loads(setting))
    quiet_libraries()
    watch = Watch(training)
    if training.run == MAIN_JOB:
        config, resolved = training.config(Path(folder))
        train(config, resolved, method=WatchedAFLoRA(config, watch))
    else:
        train_with_trainer(training, Path(folder), watch)
    watch.write(Path(folder))
    if dist.is_initialized():
        dist.barrier()  # nobody leaves, and ends the others, before all have written


if __name__ == "__main__":
    main()
