"""What trains has float32 values over a base in half precision, or is refused with what to load it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from aflora_dist import (
    AdaptiveFreezing,
    AFLoRAConfig,
    DivergedError,
    FreezingCallback,
    FreezingConfig,
    UnsupportedEngineError,
)
from aflora_dist.adapter.precision import check_precision
from aflora_dist.methods.choose import create_method
from aflora_dist.options import ModelConfig
from aflora_dist.tasks.model import load_base
from aflora_dist.training.command_line import parse
from tests.hub_layouts import LAYOUTS

STEPS = 6


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("hub")
    return lambda name: folder / name if (folder / name).is_dir() else LAYOUTS[name](folder / name)


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def draw_head(base: Any) -> None:
    """As transformers 5.23 does it, in float32: 5.3 draws in the checkpoint's dtype, and so other values.

    What is drawn after it is the same, too.
    """
    torch.manual_seed(1)
    for name, parameter in base.named_parameters():
        if name.startswith(("score.", "classifier.", "pooler.")):
            parameter.data.copy_(torch.randn(parameter.shape) * 0.02)


def adapted(folder: Path, kind: Any, dtype: torch.dtype | None = None, **options: Any) -> PeftModel:
    """As a user would: the checkpoint's dtype where none is named."""
    base = kind.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))
    draw_head(base)
    base.config.pad_token_id = base.config.pad_token_id or 0
    task = "SEQ_CLS" if kind is AutoModelForSequenceClassification else "CAUSAL_LM"
    pooler = ["pooler"] if "deberta" in folder.name else None
    return get_peft_model(base, AFLoRAConfig(**{"task_type": task, "modules_to_save": pooler, **options}))


def trained(model: PeftModel, precision: str = "no") -> tuple[list[float], list[str]]:
    """Losses of a user's own loop, and what froze."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    classifies = model.get_base_model().get_output_embeddings() is None
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    config = FreezingConfig(total_steps=STEPS, initial_steps=1, final_steps=2)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        ids = torch.randint(5, 100, (4, 8), generator=generator)
        labels = (ids[:, 0] > 50).long() if classifies else ids
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, sorted(freezing.frozen)


CLASSIFIERS = [("deberta_v3", AutoModelForSequenceClassification), ("opt", AutoModelForSequenceClassification)]
CLASSIFIERS += [("qwen2_5", AutoModelForSequenceClassification), ("llama_7b", AutoModelForCausalLM)]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("name", "kind"), CLASSIFIERS)
def test_an_own_loop_over_half_precision_trains_as_over_float32(
    name: str, kind: Any, precision: str, lying: Callable[[str], Path]
) -> None:
    expected, frozen = trained(adapted(lying(name), kind, torch.float32))
    model = adapted(lying(name), kind)
    held = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert held & {torch.float16, torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if precision == "bf16" and name in ("deberta_v3", "opt"):
        with pytest.raises(UnsupportedEngineError, match=r"no LayerNorm for that under bf16.*dtype=torch.bfloat16"):
            trained(model, precision)
        model = adapted(lying(name), kind, torch.bfloat16)
    losses, froze = trained(model, precision)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert froze == frozen


def test_what_trains_in_float16_is_refused(lying: Callable[[str], Path]) -> None:
    model = adapted(lying("opt"), AutoModelForSequenceClassification, bias="all")
    with pytest.raises(
        UnsupportedEngineError, match=r"bias would train in float16.*dtype=torch.float32.*modules_to_save"
    ):
        trained(model)
    model = adapted(lying("opt"), AutoModelForCausalLM)
    model.get_base_model().model.decoder.embed_tokens.requires_grad_(True)
    with pytest.raises(UnsupportedEngineError, match=r"embed_tokens.weight would train in float16"):
        trained(model)


@pytest.mark.parametrize("whole", [["embed_tokens"], ["norm"], ["lm_head"], ["q_proj"], ["embed_tokens", "lm_head"]])
def test_modules_that_train_whole_fit_in_between_those_in_half_precision(
    whole: list[str], lying: Callable[[str], Path]
) -> None:
    targets = ["up_proj", "down_proj"]
    models = [
        adapted(lying("llama_7b"), AutoModelForCausalLM, dtype, modules_to_save=whole, target_modules=targets)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    (expected, frozen), (losses, froze) = map(trained, models)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert froze == frozen
    moved = [n for n, p in models[1].named_parameters() if "modules_to_save" in n and p.dtype == torch.float32]
    assert len(moved) >= len(whole)


def test_a_head_keeps_float32_when_it_is_saved_and_loaded(lying: Callable[[str], Path], tmp_path: Path) -> None:
    folder = lying("qwen2_5")
    model = adapted(folder, AutoModelForSequenceClassification)
    trained(model)
    model.save_pretrained(str(tmp_path))
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    base.config.pad_token_id = 0
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    heads = [m.base_model.model.score.modules_to_save["default"].weight for m in (model, loaded)]
    assert heads[0].dtype == heads[1].dtype == torch.float32
    assert torch.equal(*heads)
    ids = torch.arange(5, 21).view(2, 8)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
        merged = loaded.merge_and_unload()
        assert merged(input_ids=ids).logits.dtype == torch.float32


def test_a_base_in_float32_is_left_as_it_is(lying: Callable[[str], Path]) -> None:
    model = adapted(lying("bert"), AutoModelForSequenceClassification)
    heads = [m for n, m in model.named_modules() if ".modules_to_save." in n]
    assert heads
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in heads)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT, of norms
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", '{"r": 2}'),
        ("lora", '{"r": 2, "modules_to_save": ["embed_tokens"]}'),
        ("ln_tuning", "{}"),
        ("vera", '{"r": 16}'),
        ("ia3", "{}"),
        ("adalora", '{"init_r": 6, "target_r": 3}'),
        ("full", "{}"),
    ],
)
def test_every_method_trains_in_float32(
    method: str, options: str, autocast: bool, lying: Callable[[str], Path]
) -> None:
    arguments = ["--data.task=files", "--data.train_file=x", "--method.name", method, "--method.options", options]
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = str(lying("qwen2_5"))
        config, _ = parse([*arguments, "--model.name", folder])
        loading = ModelConfig(name=folder, dtype="float32" if dtype == torch.float32 else None)
        base, _, head = load_base(loading, ["no", "yes"])
        draw_head(base)
        model = create_method(config).adapt(base, head)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        check_precision(model, Accelerator(cpu=True))
        ids = torch.arange(5, 21).view(2, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1])).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_a_trained_bias_beside_a_weight_in_half_precision_is_refused(lying: Callable[[str], Path]) -> None:
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    layer.bias = nn.Parameter(layer.bias.float())
    with pytest.raises(UnsupportedEngineError, match=r"bias trains in float32 beside a weight in bfloat16.*bf16"):
        check_precision(nn.Sequential(layer), Accelerator(cpu=True))
    AcceleratorState._reset_state(True)
    check_precision(nn.Sequential(layer), Accelerator(cpu=True, mixed_precision="bf16"))


def test_float16_is_named_where_a_number_is_not_finite(lying: Callable[[str], Path]) -> None:
    model = adapted(lying("llama_7b"), AutoModelForCausalLM)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(6e4)
    with pytest.raises(DivergedError, match=r"held in float16.*load it with dtype=torch.bfloat16 or torch.float32"):
        trained(model)


@pytest.mark.parametrize("name", ["deberta_v3", "qwen2_5"])
def test_trainer_over_half_precision_trains_as_over_float32(
    name: str, lying: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"input_ids": list(range(i, i + 8)), "labels": i % 2} for i in range(5, 37)]
    losses = []
    for dtype in (torch.float32, None):
        model = adapted(lying(name), AutoModelForSequenceClassification, dtype)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        freezing = FreezingCallback(initial_epochs=0.25, final_epochs=0.25)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[freezing])
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
