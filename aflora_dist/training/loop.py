"""The main job: fine-tune, freeze, evaluate, write the run's directory. One function reads as the story."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

from ..adaptive import AdaptiveFreezing, FreezeEvent, FreezingConfig
from ..errors import AFLoRAError, DivergedError
from ..processes import refuse_lonely_processes
from .config import Config
from .data import Data, GlobalBatchSampler, first_on_node, load_data
from .metrics import compute
from .model import add_adapter, load_base, lora_parameters
from .rundir import RunDirectory

Batch = dict[str, Tensor]


def train(config: Config, resolved: str) -> dict[str, Any]:
    """Run the main job on this rank.

    Args:
        resolved: `config` as YAML, to keep beside the results.

    Returns:
        What result.json holds, the same on every rank.

    Raises:
        AFLoRAError: What was asked for cannot be done; on every rank.
        DivergedError: The loss or a freezing score is no longer finite.
    """
    accelerator = create_accelerator(config)
    run = RunDirectory(config.run, accelerator)
    set_seed(config.train.seed)
    data = load_data(config.data, config.train.seed)
    base, tokenizer, head = load_base(config.model, data.labels)
    check_length(config, base)
    model = add_adapter(base, config.adapter, head, config.train.gradient_checkpointing)
    lora_r8 = lora_parameters(model)
    sampler, batches, evaluation = create_loaders(config, data, tokenizer, accelerator)
    total_steps = config.train.epochs * sampler.updates_per_epoch
    optimizer = create_optimizer(config, model)
    head_params = sum(p.numel() for p in optimizer.param_groups[1]["params"])
    freezing_config = create_freezing_config(config, sampler.updates_per_epoch)  # may refuse: before time is spent
    model, optimizer = accelerator.prepare(model, optimizer)

    def log_freeze(event: FreezeEvent) -> None:
        run.append("freeze_log.jsonl", asdict(event))

    freezing = AdaptiveFreezing(accelerator, model, optimizer, freezing_config, on_freeze=log_freeze)
    scheduler = get_linear_schedule_with_warmup(
        freezing.engine.optimizer, round(config.train.warmup_ratio * total_steps), total_steps
    )
    run.claim(resolved)  # all that can be refused has been
    set_seed(config.train.seed, device_specific=True)  # from here on every rank draws its own dropout
    with closing(TrainingLog(config, run, accelerator, freezing, total_steps, head_params)) as log:
        evaluations: list[dict[str, float]] = []
        for epoch in range(config.train.epochs):
            model.train()
            sampler.epoch = epoch
            with log.timed():
                for micro_batches in updates(batches, config.train.accumulation):
                    trained = freezing.trainable_params
                    loss, norm = update(model, optimizer, micro_batches, accelerator, config.train.max_grad_norm)
                    log.update(loss, norm, trained, scheduler.get_last_lr())
                    if not accelerator.optimizer_step_was_skipped:
                        scheduler.step()
            evaluations.append(evaluate(model, evaluation, data, accelerator))
            log.evaluated(evaluations[-1])

    save_adapter(freezing, run)
    result = log.result(evaluations, data, lora_r8)
    run.write("result.json", result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def create_accelerator(config: Config) -> Accelerator:
    """The accelerator that the launcher asks for; DeepSpeed's batch and clipping settings are ours."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    accelerator = Accelerator(
        cpu=several and on_cpu and not with_deepspeed,  # DDP wraps nothing on a CPU unless told
        gradient_accumulation_steps=config.train.accumulation,
        step_scheduler_with_optimizer=False,
        # Without it DeepSpeed's processes on a CPU would not know of each other.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if several and on_cpu else [],
    )
    accelerator.gradient_accumulation_steps = config.train.accumulation  # whatever the environment says
    refuse_lonely_processes()
    per_update = accelerator.num_processes * config.train.accumulation
    if config.train.batch_size % per_update:
        raise AFLoRAError(
            f"train.batch_size={config.train.batch_size} cannot be split evenly: {accelerator.num_processes} processes "
            f"x train.accumulation={config.train.accumulation} = {per_update}. Choose a multiple of {per_update}."
        )
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        ours = {
            "train_micro_batch_size_per_gpu": config.train.batch_size // per_update,
            "gradient_accumulation_steps": config.train.accumulation,
            "gradient_clipping": config.train.max_grad_norm,
        }
        # Where DeepSpeed's file says nothing or "auto", and where the launcher filled in its default.
        plugin.deepspeed_config.update(ours)
        plugin.deepspeed_config.pop("train_batch_size", None)
    return accelerator


def create_loaders(
    config: Config, data: Data, tokenizer: Any, accelerator: Accelerator
) -> tuple[GlobalBatchSampler, DataLoader[Batch], dict[str, DataLoader[Batch]]]:
    """Training batches of this rank (one micro-batch each), and the evaluation splits."""

    def tokenize(examples: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [examples["text"]] + ([examples["text_pair"]] if "text_pair" in examples else [])
        return {**tokenizer(*texts, truncation=True, max_length=config.data.max_length), "labels": examples["label"]}

    def prepared(dataset: Any) -> Any:
        return first_on_node(lambda: dataset.map(tokenize, batched=True, remove_columns=dataset.column_names))

    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    train_set = prepared(data.train)
    if len(train_set) < config.train.batch_size:
        raise AFLoRAError(
            f"The training split has {len(train_set)} examples, fewer than one batch: train.batch_size="
            f"{config.train.batch_size}. Lower it."
        )
    sampler = GlobalBatchSampler(
        len(train_set),
        config.train.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=config.train.seed,
    )
    micro_batch = sampler.share // config.train.accumulation
    batches = DataLoader(train_set, batch_size=micro_batch, sampler=sampler, collate_fn=collate)
    evaluation = {
        split: accelerator.prepare_data_loader(
            DataLoader(prepared(dataset), batch_size=config.train.eval_batch_size, collate_fn=collate)
        )
        for split, dataset in data.evaluation.items()
    }
    return sampler, batches, evaluation


def check_length(config: Config, model: Any) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.data.max_length > longest:
        raise AFLoRAError(
            f"data.max_length={config.data.max_length} is more than the {longest} positions of {config.model.name!r}."
        )


def create_optimizer(config: Config, model: PeftModel) -> torch.optim.Optimizer:
    """AdamW over two param groups: the adapter, and the head with its own learning rate."""
    adapter = [p for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in n]
    return torch.optim.AdamW(
        [
            {"params": adapter, "lr": config.train.learning_rate},
            {"params": head, "lr": config.train.head_learning_rate},
        ],
        weight_decay=config.train.weight_decay,
    )


def create_freezing_config(config: Config, updates_per_epoch: int) -> FreezingConfig:
    t_i, t_f = config.freezing.epochs(config.train.epochs)  # they fit in epochs, and so they do when rounded
    total = config.train.epochs * updates_per_epoch
    adaptive = config.adapter.freezing == "adaptive"
    initial = round(t_i * updates_per_epoch) if adaptive else 0
    return FreezingConfig(
        total_steps=total,
        initial_steps=initial,
        final_steps=min(round(t_f * updates_per_epoch), total - initial) if adaptive else 0,
        beta1=config.freezing.beta1,
        beta2=config.freezing.beta2,
        score=config.freezing.score,
        pairwise=config.freezing.pairwise,
    )


def updates(batches: DataLoader[Batch], accumulation: int) -> Iterator[list[Batch]]:
    """The micro-batches of one update after the other."""
    micro_batches = []
    for batch in batches:
        micro_batches.append(batch)
        if len(micro_batches) == accumulation:
            yield micro_batches
            micro_batches = []


def update(
    model: nn.Module, optimizer: Any, micro_batches: list[Batch], accelerator: Accelerator, max_grad_norm: float
) -> tuple[Tensor, Any]:
    """One optimizer update: the mean loss of this rank's examples, and the gradient norm before clipping.

    Freezing happens inside, by itself: AdaptiveFreezing watches the optimizer.
    """
    total = torch.zeros((), device=accelerator.device)
    norm = None
    for batch in micro_batches:
        with accelerator.accumulate(model):
            loss = model(**move(batch, accelerator.device)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach().float() / len(micro_batches)
    return total, norm


def move(batch: Any, device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module, splits: dict[str, DataLoader[Batch]], data: Data, accelerator: Accelerator
) -> dict[str, float]:
    """The task's metrics, every example counted once on any number of ranks.

    Metrics of several splits carry the split's suffix: accuracy_matched, accuracy_mismatched.
    """
    model.eval()
    metrics = {}
    for split, loader in splits.items():
        predictions, labels = [], []
        for batch in loader:
            logits = model(**batch).logits.float()
            predicted = logits.squeeze(-1) if data.labels is None else logits.argmax(-1)
            gathered = accelerator.gather_for_metrics((predicted, batch["labels"]))
            predictions.append(gathered[0].cpu())
            labels.append(gathered[1].cpu())
        suffix = split.removeprefix("validation")
        values = compute(data.metrics, torch.cat(labels).double().numpy(), torch.cat(predictions).double().numpy())
        metrics.update({f"{name}{suffix}": value for name, value in values.items()})
    return metrics


def save_adapter(freezing: AdaptiveFreezing, run: RunDirectory) -> None:
    """Write adapter/, chosen by name: a frozen A or B was learned like the rest. A collective."""
    engine = freezing.engine
    names = [n for n, p in engine.parameters.items() if ".aflora." in n or ".modules_to_save." in n or p.requires_grad]
    values = engine.values(names)
    if run.writes:
        model: Any = engine.model
        whole = {name: value.contiguous() for name, value in values.items()}
        model.save_pretrained(str(run.adapter), state_dict=whole, save_embedding_layers=False)


class TrainingLog:
    """Counts, times and writes down what happens; knows nothing of how to train."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        accelerator: Accelerator,
        freezing: AdaptiveFreezing,
        total_steps: int,
        head_params: int,
    ) -> None:
        self.config, self.run, self.accelerator, self.freezing = config, run, accelerator, freezing
        self.total_steps, self.head_params = total_steps, head_params
        self.updates_per_epoch = total_steps // config.train.epochs
        self.step = 0
        self.train_seconds = 0.0
        self.trained_sum = 0  # sum over the updates so far of the adapter's trainable elements
        self._losses: list[Tensor] = []
        self._since: tuple[int, float] = (0, 0.0)
        self._started: float | None = None
        self.writer = SummaryWriter(str(run.tensorboard)) if run.writes and config.run.tensorboard else None
        self.bar = tqdm(total=total_steps, disable=not run.writes, desc="training", unit="step", dynamic_ncols=True)

    def timed(self) -> _Timed:
        return _Timed(self)

    def seconds(self) -> float:
        """Training time so far, evaluation excluded."""
        return self.train_seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def update(self, loss: Tensor, norm: Any, trained: int, rates: list[float]) -> None:
        """Take note of one update; every `log_every` of them write a line."""
        self._losses.append(loss)
        self.trained_sum += trained - self.head_params
        self.step += 1
        self.bar.update()
        if self.step % self.config.run.log_every == 0 or self.step == self.total_steps:
            self._write(norm, rates)

    def _write(self, norm: Any, rates: list[float]) -> None:
        mean = self.flush_losses()
        steps, seconds = self.step - self._since[0], self.seconds() - self._since[1]
        self._since = (self.step, self.seconds())
        frozen, freezable = len(self.freezing.frozen), len(self.freezing.freezable)
        line = {
            "step": self.step - 1,
            "epoch": self.step / self.updates_per_epoch,
            "loss": mean,
            "lr": rates[0],
            "head_lr": rates[1],
            "grad_norm": float(norm) if norm is not None and np.isfinite(float(norm)) else None,  # JSON has no NaN
            "trainable_params": self.freezing.trainable_params,
            "frozen": frozen,
            "freezing_fraction": self.freezing.schedule.fraction(self.step - 1) if freezable else 0.0,
            "samples_per_second": steps * self.config.train.batch_size / seconds,
        }
        self.run.append("metrics.jsonl", line)
        if self.writer is not None:
            for key, value in line.items():
                if key != "step" and value is not None:
                    self.writer.add_scalar(f"train/{key}", value, self.step - 1)
        self.bar.set_postfix(
            loss=f"{mean:.3f}", frozen=f"{frozen}/{freezable}", trainable=f"{line['trainable_params']:,}"
        )

    def flush_losses(self) -> float:
        """Mean loss since the last line, over all ranks. A collective.

        Raises:
            DivergedError: On every rank, naming the first update whose loss is not finite.
        """
        losses = self.accelerator.reduce(torch.stack(self._losses), "mean").tolist()
        first = self.step - len(losses)
        self._losses = []
        for offset, loss in enumerate(losses):
            if not np.isfinite(loss):
                raise DivergedError(
                    f"The loss of step {first + offset} is {loss}. Lower train.learning_rate or "
                    f"train.head_learning_rate; what {self.run.path} holds up to there stays valid."
                )
        return float(np.mean(losses))

    def evaluated(self, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(f"eval/{name}", value, self.step - 1)
        self.bar.write(
            "  ".join([f"epoch {self.step / self.updates_per_epoch:g}:"] + [f"{k} {v:.4f}" for k, v in metrics.items()])
        )

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def result(self, evaluations: list[dict[str, float]], data: Data, lora_r8: int) -> dict[str, Any]:
        """What result.json holds. A collective."""
        accelerator, freezing = self.accelerator, self.freezing
        if torch.cuda.is_available() and accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        per_rank = accelerator.gather(
            torch.tensor([[peak, freezing.seconds]], dtype=torch.float64, device=accelerator.device)
        )
        return {
            "task": data.name,
            "metrics": evaluations[-1],
            "evaluations": evaluations,
            "engine": freezing.engine.kind,
            "world_size": accelerator.num_processes,
            "mixed_precision": str(accelerator.mixed_precision),
            "steps": self.step,
            "train_examples": len(data.train),
            "train_seconds": self.train_seconds,
            "samples_per_second": self.step * self.config.train.batch_size / self.train_seconds,
            "avg_trainable_params": self.trained_sum / self.step,
            "lora_r8_trainable_params": lora_r8,
            "head_params": self.head_params,
            "freezable_matrices": len(freezing.freezable),
            "freeze_events": len(freezing.events),
            "freeze_seconds_total": per_rank[:, 1].max().item(),
            "peak_memory_bytes": int(per_rank[:, 0].max().item()),
        }


class _Timed:
    """Adds the time inside to the log's training time."""

    def __init__(self, log: TrainingLog) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.log._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.log.train_seconds = self.log.seconds()
        self.log._started = None


__all__ = ["AFLoRAError", "train"]
