"""A GGUF file, as llama.cpp's tools write it: its weights are unpacked, and then it is a model like others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from aflora_dist.errors import AFLoRAError
from aflora_dist.options import ModelConfig
from aflora_dist.serve.merge import merge
from aflora_dist.tasks.model import load_language_model
from aflora_dist.training.run import main as run_main

gguf = pytest.importorskip("gguf", reason="pip install gguf")
WIDTH, INNER, BLOCKS = 32, 64, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A Llama in 8 bits, whose tokens are bytes."""
    path, random = tmp_path / "tiny.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])  # unknown, control, bytes, normal
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for block in range(BLOCKS):
        of_block = {f"attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        of_block |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        of_block |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in of_block.items()}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            values = (random.standard_normal(shape) * 0.05).astype(np.float32)
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def job(file: Path, method: str, run: Path) -> list[str]:
    rows = run.with_suffix(".jsonl")
    rows.write_text("".join(json.dumps({"prompt": a + b, "completion": b + a}) + "\n" for a in "xyz" for b in "uvw"))
    options = {
        **{"model.name": file, "data.task": "sft", "data.train_file": rows, "data.validation_file": rows},
        **{"data.max_length": 96, "data.max_new_tokens": 4, "method.name": method, "train.epochs": 1},
        **{"train.batch_size": 4, "train.learning_rate": 1e-2, "run.dir": run},
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_its_weights_are_those_of_the_file_and_none_stays_packed(file: Path) -> None:
    model, _ = load_language_model(ModelConfig(name=str(file)))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}["blk.1.ffn_down.weight"]
    expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    down = model.model.layers[1].mlp.down_proj
    assert type(down) is nn.Linear
    torch.testing.assert_close(down.weight.detach().float(), expected, rtol=0, atol=0)


def test_all_of_it_is_trained_and_saved(file: Path, tmp_path: Path) -> None:
    """transformers calls it quantised still, and refused to save it when it had been trained."""
    assert run_main(job(file, "full", tmp_path / "run")) == 0
    before, _ = load_language_model(ModelConfig(name=str(file)))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after.get_parameter(name), before.get_parameter(name))


def test_an_adapter_of_it_is_merged_into_what_it_was_made_from(file: Path, tmp_path: Path) -> None:
    assert run_main(job(file, "aflora", tmp_path / "run")) == 0
    with pytest.raises(AFLoRAError, match=r"Merge into what it was made of: .* with --base"):
        merge(tmp_path / "run", tmp_path / "merged")
