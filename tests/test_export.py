"""`aflora to-lora` and `aflora merge`: the same function, for whoever does not know this package."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import aflora_dist.cli
from aflora_dist import AFLoRAConfig
from aflora_dist.compat.contract import is_older
from aflora_dist.training.run import main as train
from tests.adapter.test_peft import randomise
from tests.runs import options
from tests.small_lm import make_small_language_model

TOKENS = torch.arange(1, 13).view(2, 6)
# Never imports aflora_dist; a line on stdin is kind of model, base, adapter (or - for none), out, how.
READER = """
import json, sys, torch, transformers
from peft import PeftModel
for line in sys.stdin:
    kind, base, adapter, out, how = json.loads(line)
    labels = {"num_labels": 2} if "Sequence" in kind and adapter != "-" else {}
    model = getattr(transformers, kind).from_pretrained(base, **labels)
    if how == "peft":
        model = PeftModel.from_pretrained(model, adapter)
    elif how == "transformers":
        model.load_adapter(adapter)
    with torch.no_grad():
        torch.save(model.eval()(torch.arange(1, 13).view(2, 6)).logits, out)
    assert not [name for name in sys.modules if name.startswith("aflora")], "this process must not know the package"
    print("read", flush=True)
"""

Elsewhere = Callable[[str, Path, Path | str, str, Path], torch.Tensor]

ways = pytest.mark.parametrize(
    "how",
    [
        "peft",
        pytest.param(
            "transformers",
            marks=pytest.mark.skipif(
                is_older("transformers", "5.18"), reason="load_adapter() leaves out values before transformers 5.18"
            ),
        ),
    ],
)


def aflora(*arguments: Any) -> int:
    sys.argv = ["aflora", *map(str, arguments)]
    return aflora_dist.cli.main()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """Loads with a process of its own, away from the sources, which takes seconds to start: one for all."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with (folder / "stderr").open("w") as errors:
        reader = subprocess.Popen(
            [sys.executable, "-c", READER], cwd=folder, stdin=PIPE, stdout=PIPE, stderr=errors, text=True
        )

    def read(kind: str, base: Path, adapter: Path | str, how: str, tmp_path: Path) -> torch.Tensor:
        assert reader.stdin is not None
        assert reader.stdout is not None
        out = tmp_path / "logits.pt"
        with contextlib.suppress(BrokenPipeError):  # stderr says why
            print(json.dumps([kind, str(base), str(adapter), str(out), how]), file=reader.stdin, flush=True)
        assert "read\n" in iter(reader.stdout.readline, ""), (folder / "stderr").read_text()[-3000:]
        return torch.load(out)

    with reader:
        yield read


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_language_model(tmp_path_factory.mktemp("llama"))


def adapter_for(base: Path, folder: Path, **config: Any) -> tuple[Path, torch.Tensor]:
    """A random adapter of a language model, and what the adapted model says."""
    base_model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(base_model, AFLoRAConfig(task_type="CAUSAL_LM", **config))
    randomise(model, 1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return folder, logits(again)


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A finished run of a classifier whose base lacks the head; what it says, with the adapter's paths and without."""
    folder = tmp_path_factory.mktemp("run") / "run"
    more = {"train.learning_rate": 0.1, "train.head_learning_rate": 0.1, "train.max_grad_norm": 0}
    assert train(options(folder, tiny_model, reviews, **more)) == 0
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    expected = logits(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".s_b"):
            parameter.data.zero_()
    return folder, expected, logits(model)


@ways
def test_a_run_s_lora_computes_the_same_where_the_package_is_unknown(
    elsewhere: Elsewhere, how: str, run: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected, untrained = run
    assert aflora("to-lora", folder, tmp_path / "lora") == 0
    assert "vLLM does since August 2026" in capsys.readouterr().out
    found = elsewhere("AutoModelForSequenceClassification", tiny_model, tmp_path / "lora", how, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - untrained).abs().max() > 0.1


@ways
def test_a_language_model_s_lora_computes_the_same(
    elsewhere: Elsewhere, how: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, expected = adapter_for(llama, tmp_path / "adapter")
    assert aflora("to-lora", adapter, tmp_path / "lora") == 0
    assert "vLLM" not in capsys.readouterr().out
    found = elsewhere("AutoModelForCausalLM", llama, tmp_path / "lora", how, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - logits(AutoModelForCausalLM.from_pretrained(llama))).abs().max() > 0.1


def test_trained_biases_come_along(elsewhere: Elsewhere, llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)).save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), AFLoRAConfig(task_type="CAUSAL_LM", bias="all"))
    randomise(model, 1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = logits(model)
    assert aflora("to-lora", tmp_path / "adapter", tmp_path / "lora") == 0
    found = elsewhere("AutoModelForCausalLM", base, tmp_path / "lora", "peft", tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged") == 0
    found = elsewhere("AutoModelForCausalLM", tmp_path / "merged", "-", "", tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# -- merge ---------------------------------------------------------------------------------------------------


def test_a_merged_run_is_a_classifier_of_its_own(elsewhere: Elsewhere, run: Any, tmp_path: Path) -> None:
    folder, expected, _ = run
    assert aflora("merge", folder, tmp_path / "merged", "--max-shard-size", "10KB") == 0
    found = elsewhere("AutoModelForSequenceClassification", tmp_path / "merged", "-", "", tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.architectures == ["BertForSequenceClassification"]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("good film")["input_ids"]
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 5
    assert all(path.stat().st_size < 10_000 + 4_000 or len(load_file(path)) == 1 for path in shards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["q_proj", "up_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["layers", "adapted-head", "trained-embedding", "trained-head", "both"],
)
def test_tied_weights_are_merged_right(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_small_language_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    assert "lm_head.weight" not in load_file(base / "model.safetensors"), "not a case: it is stored apart"
    adapter, expected = adapter_for(base, tmp_path / "adapter", **config)
    assert aflora("merge", adapter, tmp_path / "merged") == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == dtype
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}
    assert model.config.tie_word_embeddings == (config == {})
    # Every merged weight is rounded to bfloat16; a head that trained gives float32 logits before.
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(logits(model).float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_a_merged_weight_is_the_float32_sum_rounded_once(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(base)
    adapter, _ = adapter_for(base, tmp_path / "adapter")
    assert aflora("merge", adapter, tmp_path / "merged") == 0
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    A, B, s_d, s_b = (tensors[f"base_model.model.{name}.aflora.{key}"] for key in ("A", "B", "s_d", "s_b"))
    expected = (old[f"{name}.weight"].double() + (s_b.diag() @ B @ s_d.diag() @ A).double()).to(torch.bfloat16)
    assert (new[f"{name}.weight"] != expected).float().mean() < 0.01  # ties of rounding
    assert torch.equal(new["model.norm.weight"], old["model.norm.weight"])


def test_conv1d_layers_of_a_checkpoint_without_prefix_are_merged(elsewhere: Elsewhere, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))
    whole.transformer.save_pretrained(tmp_path / "base")  # as gpt2 on the hub
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "base" / "model.safetensors")
    adapter, expected = adapter_for(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "c_proj"])
    assert aflora("merge", adapter, tmp_path / "merged") == 0
    found = elsewhere("AutoModelForCausalLM", tmp_path / "merged", "-", "", tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_merging_holds_one_shard_at_a_time(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aflora_dist.serve import merge

    adapter, _ = adapter_for(llama, tmp_path / "adapter")
    written = []
    monkeypatch.setattr(
        merge,
        "save_file",
        lambda tensors, *a, **k: (written.append(sum(t.nbytes for t in tensors.values())), save_file(tensors, *a, **k)),
    )
    assert aflora("merge", adapter, tmp_path / "merged", "--max-shard-size", "20KB") == 0
    assert len(written) > 3
    assert max(written) <= 20_000
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(written)


# -- the card, and what is refused -----------------------------------------------------------------------------


def test_the_card_tells_task_figures_command_and_versions(run: Any, tmp_path: Path) -> None:
    folder, _, _ = run
    assert aflora("to-lora", folder, tmp_path / "lora") == 0
    card = (tmp_path / "lora" / "README.md").read_text()
    accuracy = json.loads((folder / "result.json").read_text())["metrics"]["accuracy"]
    for said in (
        "Task: files, 100 training examples",
        f"| accuracy | {accuracy:.4f}  (best epoch ",
        f"aflora to-lora {folder} {tmp_path / 'lora'}",
        "batch_size: 16",
        "- peft ",
        "its pull request 53555",
        "Labels: 0 `negative`, 1 `positive`.",
        "library_name: peft",
    ):
        assert said in card


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert aflora(*arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["to-lora", "merge"])
def test_nothing_is_overwritten(command: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, _ = adapter_for(llama, tmp_path / "adapter")
    out = tmp_path / "out"
    out.mkdir()
    assert aflora(command, adapter, out) == 0  # empty
    before = sorted(out.iterdir())
    assert "nothing is overwritten" in refused(capsys, command, adapter, out)
    assert sorted(out.iterdir()) == before
    assert "is a whole model, and no adapter" in refused(capsys, command, llama, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    assert "neither a run's directory" in refused(capsys, command, tmp_path / "empty", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_cannot_be_merged_exactly_is_refused_with_the_reason(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = adapter_for(llama, tmp_path / "adapter")
    out = tmp_path / "out"

    quantised = make_small_language_model(tmp_path / "quantised")
    change_json(
        quantised / "config.json",
        lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    )
    assert "holds quantised weights (bitsandbytes)" in refused(capsys, "merge", adapter, out, "--base", quantised)

    renamed = make_small_language_model(tmp_path / "renamed")
    stored = load_file(renamed / "model.safetensors")
    stored = {key.replace("up_proj", "w1"): tensor for key, tensor in stored.items()}
    save_file(stored, renamed / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj.weight is adapted, but" in refused(capsys, "merge", adapter, out, "--base", renamed)

    wider = make_small_language_model(tmp_path / "wider", intermediate_size=64)
    assert "trained on another model" in refused(capsys, "merge", adapter, out, "--base", wider)

    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.up_proj.base_layer.bias"] = torch.zeros(48)  # Llama has none
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "trained bias" in refused(capsys, "merge", adapter, out)

    assert "is a GGUF file" in refused(capsys, "merge", adapter, out, "--base", tmp_path / "smol.gguf")

    change_json(adapter / "adapter_config.json", lambda c: c.update(peft_type="LORA"))
    assert "of the method LORA" in refused(capsys, "to-lora", adapter, out)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_headless_base_keeps_its_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    ).save_pretrained(tmp_path / "base")
    model = get_peft_model(BertModel.from_pretrained(tmp_path / "base"), AFLoRAConfig())
    randomise(model, 1)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged") == 0
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys()
        == load_file(tmp_path / "base" / "model.safetensors").keys()
    )
    with torch.no_grad():
        found, expected = (
            m.eval()(TOKENS).last_hidden_state for m in (BertModel.from_pretrained(tmp_path / "merged"), model)
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
