"""What it means when a pretrained model, or its tokenizer, cannot be loaded, and what to do, in words for people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from ..errors import AFLoRAError, one_line
from ..extras import installed
from ..hub import refusal
from ..options import ModelConfig
from ..untrusted import read_object

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module

# Beside what is missing, what a configuration with values of other types leads to.
_NOT_LOADED: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, ImportError, StrictDataclassError)
_NOT_LOADED += (AttributeError, TypeError, RecursionError, MemoryError)


_NO_CLASS = re.compile(r"Unrecognized configuration class <class '.*\.(\w+)'> for this kind of AutoModel: (\w+)\.")
# Of a RuntimeError: sizes that no tensor has, or not these weights. Others are memory's, or another rank's.
_OF_SIZES = re.compile(r"^Storage size|size mismatch|negative dimension|invalid shape|overflow", re.IGNORECASE)


@contextmanager
def readable(config: ModelConfig, *more: type[Exception]) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into an AFLoRAError.

    Args:
        more: What else is raised for such a model only.
    """
    try:
        yield
    except AFLoRAError:
        raise
    except Exception as error:
        known = isinstance(error, (*_NOT_LOADED, *more)) or _is_of_tokenizers(error)
        if not known and not (isinstance(error, RuntimeError) and _OF_SIZES.search(str(error))):
            raise
        said = (refusal(error, config.name), _unread_tokenizer(error), _own_code(error), _of_no_kind(error))
        reason = next(filter(None, said), None) or _cut_json(error, config.name) or one_line(error)
        raise AFLoRAError(
            f"The model {config.name!r} could not be loaded: {reason} (model.name is a folder, a hub id, a "
            f'.gguf file, or "demo".)'
        ) from error


def _unread_tokenizer(error: BaseException) -> str | None:
    """What is missing where transformers, which cannot read a SentencePiece model, takes it for one of tiktoken."""
    missing = [package for package, module in _SENTENCEPIECE.items() if not installed(module)]
    if "tiktoken" not in str(error):
        return None
    if not missing:
        return (
            "it has no tokenizer that can be read: no tokenizer.json, and no SentencePiece model (spm.model, "
            "tokenizer.model) that is whole. Fetch or save the tokenizer again. (A tokenizer.model of tiktoken's wants "
            "pip install tiktoken.)"
        )
    return (
        f"its tokenizer is a SentencePiece model (spm.model, tokenizer.model), which transformers reads by the "
        f"packages {' and '.join(_SENTENCEPIECE)}. Not installed here: pip install {' '.join(missing)}."
    )


def _of_no_kind(error: BaseException) -> str | None:
    """What a model cannot do for which transformers has no such class; it lists those for which it has one."""
    found = _NO_CLASS.match(str(error))
    if found is None:
        return None
    wanted = "language model that goes on with a text" if "CausalLM" in found[2] else "classifier of texts"
    return f"transformers has no {wanted} of this kind of model ({found[1]}): {found[2]} does not know it."


def _is_of_tokenizers(error: BaseException) -> bool:
    """The library tokenizers has no kind of error of its own, which transformers 5.3 lets through."""
    return type(error) is Exception


def _cut_json(error: BaseException, name: str) -> str | None:
    """Which file of a model's folder a complaint over JSON is about."""
    if not isinstance(error, json.JSONDecodeError) and not _is_of_tokenizers(error):
        return None
    for file in sorted(Path(name).glob("*.json")):
        try:
            read_object(file)
        except AFLoRAError as complaint:
            return f"{complaint} Fetch or save it again."
    return None


def _own_code(error: BaseException) -> str | None:
    """What to do where transformers does not load a model whose code nobody has said may run."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        "it comes with code of its own, and only the command line can have code of others run. Read that code, then "
        "add --model.trust_remote_code true."
    )
