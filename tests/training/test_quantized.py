"""QLoRA: AFLoRA over weights that bitsandbytes holds in 4 bits is AFLoRA over those weights dequantised."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from aflora_dist import AFLoRAConfig
from aflora_dist.engines import examine
from aflora_dist.errors import UnsupportedEngineError
from aflora_dist.options import ModelConfig
from aflora_dist.tasks.model import load_language_model
from tests.launch import launch, launch_series
from tests.runs import assert_same_to_the_bit, command_line, freezes, lines, start_all
from tests.small_lm import make_small_language_model, write_problems

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
NF4 = {"model.quantize": "nf4", "model.dtype": "float32"}  # computes in float32, to be compared closely


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, dequantised/ (what nf4 makes of its weights, in float32), train.jsonl and dev.jsonl."""
    folder = tmp_path_factory.mktemp("quantized")
    model = make_small_language_model(folder / "model", hidden_size=64, intermediate_size=96)
    write_problems(folder / "train.jsonl", 40, seed=0)
    write_problems(folder / "dev.jsonl", 13, seed=1)
    four, tokenizer = load_language_model(ModelConfig(name=str(model), quantize="nf4", dtype="float32"))
    dense = AutoModelForCausalLM.from_pretrained(model)
    rounded = 0.0
    for name, layer in four.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = dense.get_submodule(name).weight
            was = weight.detach().clone()
            weight.data = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            rounded = max(rounded, (weight - was).abs().max().item())
    assert rounded > 1e-2
    dense.save_pretrained(folder / "dequantised")
    tokenizer.save_pretrained(folder / "dequantised")
    return folder


def arguments(run: Path, folder: Path, model: str, **more: Any) -> list[str]:
    chosen = {
        "run.dir": run,
        "run.log_every": 1,
        "run.save_every": 0,
        "run.tensorboard": False,
        "model.name": folder / model,
        "data.task": "sft",
        "data.train_file": folder / "train.jsonl",
        "data.validation_file": folder / "dev.jsonl",
        "data.max_length": 96,
        "data.max_new_tokens": 4,
        "train.epochs": 2,
        "train.batch_size": 12,
        "train.eval_batch_size": 4,
        "train.warmup_ratio": 0,
        "train.max_grad_norm": 0.5,
        "freezing.initial_epochs": 0.7,
        "freezing.final_epochs": 0.4,
        **more,
    }
    return command_line(chosen)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run, "metrics.jsonl")]


@pytest.fixture(scope="module")
def dequantised(folder: Path) -> Path:
    """The run of one process over the dequantised weights."""
    run = folder / "run"
    start_all("single", [arguments(run, folder, "dequantised")])
    return run


def test_quantized_values_and_gradients_are_those_of_the_dequantised_model(folder: Path) -> None:
    models: list[Any] = []
    for name, options in (("model", {"quantize": "nf4", "dtype": "float32"}), ("dequantised", {})):
        base, _ = load_language_model(ModelConfig(name=str(folder / name), **options))  # type: ignore[arg-type]
        torch.manual_seed(0)
        config = AFLoRAConfig(r=4, freezing="never", task_type="CAUSAL_LM", init_weights=False)
        models.append(get_peft_model(base, config))
    ids = torch.randint(4, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    for evaluated_first in (False, True):  # an evaluation must leave weights that can be trained through
        ours, expected = ({}, {})
        for model, found in zip(models, (ours, expected), strict=True):
            if evaluated_first:
                model.eval()
                with torch.no_grad():
                    found["evaluated"] = model(input_ids=ids).logits
            model.train()
            model.zero_grad()
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            found["logits"] = out.logits.detach()
            found |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert ours.keys() == expected.keys()
        assert len([name for name in ours if ".aflora." in name]) == 2 * (7 * 2 + 3 * 2)
        for name, value in ours.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "engine", ["single", *(pytest.param(e, marks=pytest.mark.distributed) for e in ("ddp", "zero2", "zero3", "fsdp2"))]
)
def test_quantized_training_is_that_over_the_dequantised_weights(
    engine: str, folder: Path, dequantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, an evaluation between them; ZeRO-3 and FSDP2 shard the packed weights."""
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    start_all(engine, [arguments(tmp_path / "run", folder, "model", **NF4)])
    assert losses(tmp_path / "run") == pytest.approx(losses(dequantised), rel=1e-5)
    assert freezes(tmp_path / "run") == freezes(dequantised)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_quantized_weights_are_sharded_in_half_precision(
    engine: str, folder: Path, dequantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
    job = [*worker, "tests.workers.half", *arguments(tmp_path / "run", folder, "model", **{"model.quantize": "nf4"})]
    launch_series(engine, 2, [job], mixed_precision="bf16")
    assert losses(tmp_path / "run") == pytest.approx(losses(dequantised), rel=2e-2)
    assert [(step, len(names)) for step, names in freezes(tmp_path / "run")] == [
        (step, len(names)) for step, names in freezes(dequantised)
    ]


@pytest.mark.parametrize(
    "engine", ["single", *(pytest.param(e, marks=pytest.mark.distributed) for e in ("ddp", "zero2", "zero3"))]
)
def test_optimizers_of_bitsandbytes_lose_matrices_as_torch_s_do(
    engine: str, folder: Path, dequantised: Path, tmp_path: Path
) -> None:
    """Its AdamW is torch's, its Lion the same on every engine; and from a checkpoint they go on to the bit."""
    paged, lion = ({"train.optimizer": f"bitsandbytes.{name}32bit"} for name in ("PagedAdamW", "PagedLion"))
    lion["train.learning_rate"] = "1e-3"
    saving = {"run.save_every": 3, "run.keep": 10}
    whole, resumed, other, one = (tmp_path / name for name in ("whole", "resumed", "lion", "one"))
    start_all(
        engine,
        [arguments(whole, folder, "dequantised", **paged, **saving), arguments(other, folder, "dequantised", **lion)],
    )
    start_all("single", [arguments(one, folder, "dequantised", **lion)])
    for found, expected in ((whole, dequantised), (other, one)):
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
        assert freezes(found) == freezes(expected) != []
    assert losses(other) != pytest.approx(losses(dequantised), rel=1e-3)
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("adapter", "lora", "result.json"))
    for checkpoint in (resumed / "checkpoints").iterdir():
        if checkpoint.name > "step_00000003":
            shutil.rmtree(checkpoint)
    start_all(engine, [arguments(resumed, folder, "dequantised", **paged, **saving, **{"run.resume": "last"})])
    assert_same_to_the_bit(resumed, whole)


def test_optimizers_of_8_bits_are_refused(tmp_path: Path) -> None:
    """A scale for each 256 elements: pieces of a matrix, as ZeRO and FSDP2 hold it, would have other ones."""
    made = bnb.optim.AdamW8bit([torch.nn.Parameter(torch.ones(64, 72))])
    with pytest.raises(UnsupportedEngineError, match=r"AdamW8bit would not be exact: it keeps 'qmap1'"):
        examine(made, torch.device("cpu"))


@pytest.mark.distributed
def test_optimizers_of_bitsandbytes_are_refused_by_fsdp2(folder: Path, tmp_path: Path) -> None:
    chosen = arguments(tmp_path / "run", folder, "dequantised", **{"train.optimizer": "bitsandbytes.Lion32bit"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
        done = launch("fsdp2", 2, "-m", "profiling.fsdp_on_cpu", "aflora_dist.training.run", *chosen)
    assert done.returncode == 2
    assert "Lion32bit does not update DTensors, in which FSDP2 holds what it shards" in done.stderr
