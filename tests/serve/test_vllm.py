"""vLLM's own reader of adapters takes what is exported. Serving itself needs a GPU, or a build of vLLM for CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from aflora_dist import AFLoRAConfig
from aflora_dist.adapter import AFLoRALayer
from aflora_dist.extras import installed
from aflora_dist.serve.main import main as serve
from tests.adapter.test_peft import randomise
from tests.small_lm import make_small_language_model

pytestmark = pytest.mark.skipif(not installed("vllm"), reason="no vLLM, which comes with CUDA")
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForSequenceClassification])
@pytest.mark.parametrize("r", [4, 16])
def test_vllm_reads_the_matrices_that_were_exported(
    kind: Any, r: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # for a GPU that is not there
    base = make_small_language_model(tmp_path / "base")
    task = "CAUSAL_LM" if kind is AutoModelForCausalLM else "SEQ_CLS"
    model: nn.Module = get_peft_model(kind.from_pretrained(base), AFLoRAConfig(r=r, task_type=task))
    randomise(model, 1)
    model.save_pretrained(str(tmp_path / "adapter"))  # type: ignore[operator]
    assert serve("to-lora", [str(tmp_path / "adapter"), str(tmp_path / "lora")]) == 0

    helper = PEFTHelper.from_local_dir(str(tmp_path / "lora"), max_position_embeddings=64)
    helper.validate_legal(LoRAConfig(max_lora_rank=16))
    read = LoRAModel.from_local_checkpoint(
        str(tmp_path / "lora"), PROJECTIONS, helper, device="cpu", dtype=torch.float32
    )
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, AFLoRALayer)
    }
    assert layers.keys() <= read.loras.keys()
    for name, layer in layers.items():
        found = read.loras[name]
        expected = layer.path("default").delta_weight()
        torch.testing.assert_close(found.lora_b @ found.lora_a * found.scaling, expected, rtol=1e-5, atol=1e-6)
