"""What predicts: the model of a run, of an adapter's folder, or of the hub; loaded as the launch's engine wants it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from torch import Tensor

from ..adapter.precision import widen
from ..adapter.saving import parameters_by_key
from ..compat.deepspeed import assign_sharded, is_sharded, whole_shape
from ..errors import AFLoRAError, one_line
from ..hub import snapshot
from ..methods.autocast import match_autocast
from ..options import Config
from ..serve.source import Source, check_base, read_adapter, refuse_unsound, trained_folder
from ..store.records import CONFIG, read_settings
from ..tasks.limits import Limits
from ..tasks.model import (
    base_head,
    fetch,
    load_classifier,
    load_language_model,
    load_tokenizer,
    resolve_name,
    set_padding,
)
from ..tasks.reading import listed
from ..training.build import shard_by_block
from ..training.command_line import parse, said_options
from ..untrusted import read_object, reading
from ..weights import weight_files

_READ = {f"model.{option}" for option in ("name", "revision", "dtype", "attn_implementation", "quantize")}
_READ |= {"model.trust_remote_code", "data.columns", "data.max_length", "train.eval_batch_size"}
_OF_LABELS = {"data.text_columns", "data.label_column", "data.positive_label", "data.pad_to_max_length"}
_OF_ANSWERS = {"data.max_new_tokens", "data.system"}
_FETCHED = ("*.json", "*.safetensors", "adapter_model.bin", "*.jinja", "*.txt", "*.model", "config.yaml")


@dataclass(frozen=True)
class TrainedModel:
    """What was trained, and how.

    Attributes:
        folder: An adapter's, or a whole model's.
        config: Of the run, where it is known; else what of it predicting needs.
        adapter: What is known of the adapter; None: the folder is a whole model's.
        labels: Class names by number; None where there are no classes.
        says: What it says of a row.
        said: The options that the command line names, as GROUP.KEY.
    """

    folder: Path
    config: Config
    adapter: Source | None
    labels: list[str] | None
    says: Literal["a class", "a number", "an answer"]
    said: frozenset[str] = frozenset()


def find_trained(name: str, options: list[str]) -> TrainedModel:
    """What a run's directory, an adapter's or a model's folder, or an adapter on the hub was trained to say.

    Args:
        options: Of `aflora train`, as `--GROUP.KEY VALUE`: they go before those of the run.

    Raises:
        AFLoRAError: There is none, or it says nothing of texts; or predicting does not read one of the options.
    """
    said = frozenset(said_options(options))
    _refuse_unread(said - _READ - _OF_LABELS - _OF_ANSWERS, "Predicting")
    trained = replace(_found(name, options), said=said)
    answers = trained.says == "an answer"
    _refuse_unread(said & (_OF_LABELS if answers else _OF_ANSWERS), f"A model that says {trained.says}")
    return trained


def _refuse_unread(options: Set[str], who: str) -> None:
    for option in sorted(options):
        raise AFLoRAError(f"{who} does not read {option}. Leave it out; `aflora predict --help` says what is read.")


def _found(name: str, options: list[str]) -> TrainedModel:
    path = Path(name)
    if not path.exists():
        path = _from_hub(name)
    folder = trained_folder(path)
    runs = (at for at in (path, path.parent) if (at / CONFIG).is_file() and read_settings(at) is not None)
    run = next(runs, None)
    if not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        return _whole(folder, run, options)
    source = read_adapter(path, any_method=True)
    kind = source.config["task_type"]
    if kind not in ("SEQ_CLS", "CAUSAL_LM"):
        raise AFLoRAError(
            f"{source.folder} holds an adapter for the task {kind or 'that it does not name'}: what is predicted are "
            f"classes and numbers (SEQ_CLS) and answers (CAUSAL_LM)."
        )
    base = source.config["base_model_name_or_path"]
    config = _config(run, ["--model.name", base] if base else [], kind == "CAUSAL_LM", options)
    if kind == "CAUSAL_LM":
        return TrainedModel(source.folder, config, source, None, "an answer")
    outputs = source.outputs(_weights(source)) or 2
    if outputs == 1:
        return TrainedModel(source.folder, config, source, None, "a number")
    names = source.labels
    if run is None or names is None:  # somebody else's: then the base model's configuration says it
        with _base_moved(config):
            base_names, several = base_head(config.model)
        if several and run is None and len(base_names) == outputs:  # a head of the adapter's own is of one label
            raise _several(config.model.name)
        names = names or base_names
    if len(names) != outputs:
        names = [f"LABEL_{number}" for number in range(outputs)]
    return TrainedModel(source.folder, config, source, names, "a class")


def _whole(folder: Path, run: Path | None, options: list[str]) -> TrainedModel:
    """A model that was trained whole, or that an adapter was merged into."""
    content = read_object(folder / "config.json")
    if not weight_files(folder)[0]:
        raise AFLoRAError(f"{folder} has a config.json and no weights: it is no model's folder.")
    named = " ".join(map(str, content.get("architectures") or ()))
    if "ForSequenceClassification" not in named and "ForCausalLM" not in named and "LMHead" not in named:
        raise AFLoRAError(f"{folder} holds a {named or 'model of no known class'}, which says no class and no answer.")
    answers = "ForSequenceClassification" not in named
    config = _config(run, [], answers, [*options, "--model.name", str(folder)])
    if answers:
        return TrainedModel(folder, config, None, None, "an answer")
    if content.get("problem_type") == "multi_label_classification":
        raise _several(folder)
    names = content.get("id2label")
    names = names if isinstance(names, dict) else dict.fromkeys("01")  # transformers leaves out what is its default
    if len(names) == 1:
        return TrainedModel(folder, config, None, None, "a number")
    labels = [str(names.get(str(number)) or f"LABEL_{number}") for number in range(len(names))]
    return TrainedModel(folder, config, None, labels, "a class")


def _from_hub(name: str) -> Path:
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise AFLoRAError(f"There is no folder {name}. Name a run's directory, an adapter's folder, or OWNER/NAME.")
    return snapshot(name, [*_FETCHED, "adapter/*"])


def _config(run: Path | None, base: list[str], answers: bool, options: list[str]) -> Config:
    """The run's configuration; what is only for training is as a single batch wants it."""
    trains = ["--train.accumulation", "1", "--profile.enabled", "false", "--run.trackers", "[]"]
    if run is None:
        task = "sft" if answers else "files"
        known = [*(base or ["--model.name", "demo"]), "--data.task", task]
        return parse([*known, *trains, *options])[0]
    # What an adapter names is what it was trained on: a run's model.name may be "demo".
    return parse([str(run / CONFIG), *trains, "--run.dir", str(run), "--run.overwrite", "false", *options])[0]


@contextmanager
def _base_moved(config: Config) -> Iterator[None]:
    """Add to an error over a base model that is not there how it is named: its path was one of then."""
    try:
        yield
    except AFLoRAError as error:
        name = config.model.name
        if name == "demo" or Path(name).exists():
            raise
        raise AFLoRAError(f"{error} If {name} was a folder, name where it is now: --model.name FOLDER.") from None


def _several(model: object) -> AFLoRAError:
    return AFLoRAError(
        f"{model} gives a text any number of labels (problem_type=multi_label_classification in its config.json), and "
        f"what is predicted here is one class. transformers' pipeline('text-classification', ..., top_k=None) has a "
        f"probability for each."
    )


def _weights(source: Source) -> Mapping[str, Tensor]:
    if source.layers:
        return source.tensors
    with reading(source.folder, "Is the adapter whole?"):
        return load_peft_weights(str(source.folder), device="cpu", local_files_only=True)


def load_trained(trained: TrainedModel, accelerator: Accelerator) -> tuple[Any, Any, Limits]:
    """The model, prepared to predict on this launch's engine, its tokenizer, and what it takes. A collective.

    Raises:
        AFLoRAError: On every rank: something of it is not there, or does not fit.
    """
    config = trained.config
    answers = trained.says == "an answer"
    if trained.adapter is not None:
        for key, tensor in _weights(trained.adapter).items():
            if tensor.is_floating_point():
                refuse_unsound(trained.adapter.folder, key, tensor)
    with _base_moved(config):
        fetch(config.model, language_model=answers)
    if trained.adapter is not None and "model.name" not in trained.said:
        found = Path(resolve_name(config.model.name, answers))
        notes = check_base(trained.adapter, config.model.name, found, "--model.name", config.model.revision)
        if accelerator.is_main_process:
            print(*(f"aflora: note: {sentence}\n" for sentence in notes), sep="", end="", flush=True)
    if answers:
        model, tokenizer = load_language_model(config.model, accelerator)
    else:
        model, tokenizer, missing = load_classifier(config.model, trained.labels, accelerator)
        _check_learned({name for name, _ in model.named_parameters()} & missing, trained)
    if (trained.folder / "tokenizer_config.json").is_file():
        with reading(trained.folder):
            tokenizer = load_tokenizer(replace(config.model, name=str(trained.folder), revision="main"))
        set_padding(model, tokenizer)
    limits = Limits.of(model, config.model.name)
    if trained.adapter is not None:
        limits = limits.without(trained.adapter.config.get("num_virtual_tokens"))
    limits.check_length(config.data.max_length)
    if trained.adapter is not None:
        model = _adapted(model, trained.adapter)
    elif not any(map(is_sharded, model.parameters())):  # of shards one rank alone would know
        odd = next(
            (name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()), ""
        )
        if odd:
            raise AFLoRAError(f"{trained.folder}: {odd} holds values that are not finite: the training diverged.")
    model.eval().requires_grad_(False)
    return _prepared(model, accelerator), tokenizer, limits


def _check_learned(missing: set[str], trained: TrainedModel) -> None:
    """Raise if what the base model's checkpoint lacks is not in the adapter either: its values would be random."""
    kept = [] if trained.adapter is None or not missing else [f".{key}" for key in _weights(trained.adapter)]
    unknown = {name for name in missing if not any(key.endswith(f".{name}") for key in kept)}
    if not unknown:
        return
    modules = listed(sorted({name.rpartition(".")[0] for name in unknown}))
    base = trained.config.model.name
    if trained.adapter is None:
        raise AFLoRAError(f"{trained.folder} lacks weights of {modules}, or has them for other classes: save it again.")
    raise AFLoRAError(
        f"Neither the adapter in {trained.folder} nor its base model {base} has (for so many classes) the weights of "
        f"{modules}, which would be random. Train again with these in modules_to_save, or name the model that the "
        f"adapter was trained on: --model.name."
    )


def _adapted(model: Any, source: Source) -> PeftModel:
    """The model with its adapter, also where ZeRO-3 has sharded the model."""
    try:
        if not any(map(is_sharded, model.parameters())):
            adapted = PeftModel.from_pretrained(model, str(source.folder))
        else:
            config = PeftConfig.from_pretrained(str(source.folder))
            config.base_model_name_or_path = model.config.name_or_path  # it may have been elsewhere then
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
            _fill(adapted, _weights(source), source.folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, AFLoRAError):
            raise
        name = model.config.name_or_path
        raise AFLoRAError(
            f"The adapter in {source.folder} does not fit {name}, its base model: {one_line(error)}"
        ) from error
    if source.config.get("peft_type") != "AFLORA":
        _widen_trained(adapted, _weights(source))
        match_autocast(adapted)
    return adapted


@torch.no_grad()
def _widen_trained(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Have what trained in float32 beside an adapter of PEFT's so: PEFT takes a head in the base model's dtype.

    Where ZeRO-3 has sharded the model nothing changes, as in training.
    """
    places = parameters_by_key(model)
    rounded = {
        key: p for key, p in places.items() if key in tensors and not is_sharded(p) and p.dtype != tensors[key].dtype
    }
    widen(model.get_base_model(), rounded.values())
    for key, parameter in rounded.items():
        parameter.copy_(tensors[key])


@torch.no_grad()
def _fill(model: PeftModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give an adapter's parameters the values of its file."""
    places = parameters_by_key(model)
    if missing := sorted(places.keys() ^ {*tensors}):
        raise AFLoRAError(
            f"The adapter in {folder} cannot be loaded into a model that ZeRO-3 shards ({missing[0]}): use "
            f"launch/ddp.yaml."
        )
    for key, parameter in places.items():
        if whole_shape(parameter) != tensors[key].shape:
            raise AFLoRAError(f"The adapter in {folder} is of another model: {key} is {tuple(tensors[key].shape)}.")
        assign_sharded(parameter, tensors[key])


def _prepared(model: Any, accelerator: Accelerator) -> Any:
    """The model on its device. Only engines that shard what is frozen need to know of it: others have it whole."""
    plugin = accelerator.state.deepspeed_plugin
    sharded = plugin.zero_stage == 3 if plugin is not None else accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        shard_by_block(accelerator, model)
        if plugin is not None:
            return accelerator.prepare(model)
        # For FSDP2 accelerate wants an optimizer, too: one that has no state, and does no step.
        return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))[0]
    if plugin is not None:  # it would compute in this dtype
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return model.to(accelerator.device, kinds.get(str(accelerator.mixed_precision)))
    return accelerator.prepare_model(model, evaluation_mode=True)


def for_ranks(config: Config, processes: int) -> Config:
    """A configuration that so many processes may have: nothing is trained, and no batch is split."""
    return replace(config, train=replace(config.train, batch_size=max(config.train.batch_size, processes)))
