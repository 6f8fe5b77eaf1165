"""The model that an adapter is for, as it lies on disk: its tensors by name, and its structure without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ..errors import AFLoRAError
from ..hub import snapshot
from ..store.checkpoint import StoredTensors
from ..untrusted import check_copied, read_object, reading, refuse_endless
from ..weights import DAMAGED, refuse_damaged, weight_files

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_NOT_BESIDE = (
    *("config.json", "*.index.json", "adapter_config.json"),
    # Records of trainings, ours and Trainer's: they tell how another model came to be.
    *("result.json", "manifest.json", "training*.json", "trainer_state.json", "*_results.json", "*metrics.json"),
)


class Shards(Mapping[str, Tensor]):
    """All tensors of a folder of safetensors files, or of pickles; one is read when asked for, whatever they come to.

    Raises:
        AFLoRAError: There are none, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        files, by_tensor = weight_files(folder)
        if not files:
            raise AFLoRAError(
                f"{folder} has no model.safetensors and no pytorch_model.bin, which is what is merged into. Save the "
                f"model (model.save_pretrained), and name its folder with --base."
            )
        for file in files:
            refuse_damaged(file)
        if by_tensor is None:
            with reading(files[0], DAMAGED):
                by_tensor = dict.fromkeys(_opened(files[0]).keys(), files[0])
        self._file = by_tensor
        self._open: tuple[Path, Mapping[str, Tensor]] | None = None

    def __getitem__(self, key: str) -> Tensor:
        path = self._file[key]
        with reading(path, DAMAGED):
            if self._open is None or self._open[0] != path:  # one at a time: what was read is not kept mapped
                self._open = (path, _opened(path))
            return self._open[1][key]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file, key=lambda key: (self._file[key].name, key)))

    def __len__(self) -> int:
        return len(self._file)


def _opened(path: Path) -> Mapping[str, Tensor]:
    """A file of tensors, mapped into memory, each read when it is asked for. A pickle has no code run."""
    if path.suffix == ".safetensors":
        return StoredTensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written before torch 1.6: no zip file to be mapped
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise AFLoRAError(f"{path} holds something else than tensors by name.")
    return found


def find_base(name: str, revision: str | None) -> Path:
    """The folder of a model: a folder, or what the hub has (its safetensors files, or else its pickles, are fetched).

    Raises:
        AFLoRAError: It is not there.
    """
    folder = Path(name)
    if name.endswith(".gguf") or (any(folder.glob("*.gguf")) and not weight_files(folder)[0]):
        raise AFLoRAError(
            f"{name} is a GGUF file, or its folder: it holds weights in a form of its own. Merge into what it was made "
            f"of: name that one's folder, or its name on the hub, with --base."
        )
    if folder.is_dir():
        return folder
    try:
        folder = snapshot(name, ["*.safetensors", *_BESIDE], revision)
        if not any(folder.glob("*.safetensors")):
            snapshot(name, ["pytorch_model*.bin"], revision)
    except AFLoRAError as error:
        raise AFLoRAError(f"{error} Name the base model's folder with --base.") from None
    return folder


def beside_weights(folder: Path) -> list[Path]:
    """Tokenizer, generation configuration, templates, code and licence: all that is copied as it is.

    Raises:
        AFLoRAError: One is a link to a file elsewhere.
    """
    left_out = {path for pattern in _NOT_BESIDE for path in folder.glob(pattern)}
    found = {path for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file()} - left_out
    return [check_copied(path, folder) for path in sorted(found)]


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """config.json, with the plainest attention: that of a hub's kernel would be fetched and run.

    Raises:
        AFLoRAError: There is none, it is no model's, or the model is quantised, or has code of its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise AFLoRAError(f"{folder} has no config.json: it is no folder of a model of transformers.")
    content = read_object(path)
    refuse_endless(content, path)
    known = content.get("model_type") in transformers.CONFIG_MAPPING  # transformers itself has this architecture
    if isinstance(content.get("auto_map"), dict) and not trust_remote_code and not known:
        raise AFLoRAError(
            f"{folder} holds a model with code of its own ({', '.join(map(str, content['auto_map'].values()))[:100]}), "
            f"and only this command line can have it run, whatever the adapter and its run say: read the code, then "
            f"add --trust_remote_code."
        )
    with reading(path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config._attn_implementation = config._experts_implementation = "eager"
    if (how := getattr(config, "quantization_config", None)) is not None:
        method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
        raise AFLoRAError(
            f"{folder} holds quantised weights ({method or 'quantization_config'}): a change as small as an adapter's "
            f"would be lost in rounding. Merge into the model that was quantised: name its folder with --base."
        )
    return config


class Skeleton:
    """The model without memory for its weights: names, layouts, and which parameters are one and the same.

    Args:
        folder: Of the checkpoint.
        config: The model's configuration; the class is that of `task_type`, else the one that it names.

    Attributes:
        model: On the meta device.
        tied: Groups of names of the same parameter.
        shapes: Of the parameters, by name.
        lacking: Parameters that the checkpoint has under no name, nor in another form.

    Raises:
        AFLoRAError: No model can be made of the configuration.
    """

    def __init__(self, folder: Path, config: Any, task_type: str | None, trust_remote_code: bool) -> None:
        named = _CLASSES.get(task_type or "", "") or next(iter(config.architectures or []), "")
        kind: Any = getattr(transformers, str(named), None)
        own = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        auto = kind if own or named in _CLASSES.values() else transformers.AutoModel
        with reading(folder, "Is it the base model?"):
            self.model: nn.Module
            self.model, found = auto.from_pretrained(
                folder,
                config=config,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        self.tied = [names for names in groups.values() if len(names) > 1]
        self.shapes = {n: p.shape for n, p in self.model.named_parameters(remove_duplicate=False)}
        self.names = {*self.shapes, *dict(self.model.named_buffers())}
        self.lacking = {*found["missing_keys"]} & {*self.shapes}

    @property
    def prefix(self) -> str:
        """What names begin with in a model with a head, and not in a checkpoint of the same model without one."""
        return str(getattr(self.model, "base_model_prefix", ""))

    def stored(self, keys: Mapping[str, Tensor]) -> dict[str, str]:
        """The checkpoint's keys by the names that this model has for them.

        A checkpoint of a model without a head lacks the prefix, one of a model with a head may have one too many;
        a key that the model does not know keeps its name.
        """
        prefix = f"{self.prefix}."
        lacks = self.prefix and any(n.startswith(prefix) for n in self.names)
        lacks = lacks and not any(key.startswith(prefix) for key in keys)
        named = {}
        for key in keys:
            if key in self.names:
                name = key
            elif lacks:
                name = prefix + key
            elif self.prefix and key.removeprefix(prefix) in self.names:
                name = key.removeprefix(prefix)
            else:
                name = key
            named[name] = key
        return named
