"""The command line; the presets against the numbers of their sources, and what trains under them."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, DebertaV2Config

from aflora_dist import FreezingConfig
from aflora_dist.errors import AFLoRAError
from aflora_dist.methods.choose import create_method
from aflora_dist.options import FreezingKeywords, FreezingOptions
from aflora_dist.training.build import create_optimizer, hold
from aflora_dist.training.command_line import OPTIONS, parse

# Paper, Table 5: epochs, the classifier's rate, the learning rate, t_i, t_f; batch 64, length 256.
TABLE_5 = {
    "cola": (20, 4e-2, 1e-2, 1, 14),
    "sst2": (10, 4e-3, 4e-3, 1, 7),
    "mrpc": (20, 8e-2, 1e-2, 1, 14),
    "qnli": (10, 4e-3, 1e-3, 1, 7),
    "stsb": (20, 2e-2, 2e-3, 1, 14),
    "rte": (20, 4e-2, 1e-3, 1, 14),
    "mnli": (10, 4e-3, 1e-3, 1, 7),
    "qqp": (10, 4e-3, 4e-3, 1, 7),
}
# The authors' scripts: rate, the head's, batch over all GPUs, r, best by.
SCRIPTS = {
    "cola": (1e-2, 4e-2, 64, 4, "matthews_correlation"),
    "sst2": (4e-3, 4e-3, 64, 4, "accuracy"),
    "mrpc": (1e-2, 8e-2, 64, 4, "f1"),
    "qnli": (1e-3, 4e-3, 256, 4, "accuracy"),
    "stsb": (2e-2, 2e-2, 64, 4, "pearson"),
    "rte": (1e-2, 4e-2, 64, 4, "accuracy"),
    "mnli": (1e-2, 4e-3, 256, 1024, "accuracy_matched"),
    "qqp": (4e-3, 4e-3, 256, 1024, "accuracy"),
}
HEAD = ["pooler", "classifier"]
ALL_OPTIONS = """
adapter.dropout adapter.freezable adapter.freezing adapter.r adapter.target_modules data.columns data.hold_out
data.label_column data.loss_on data.max_eval_examples data.max_length data.max_new_tokens data.max_train_examples
data.mix data.name data.packing data.pad_to_max_length data.path data.positive_label data.regression data.revision
data.subset data.system data.task data.text_columns data.tokens_per_micro_batch data.train_file data.train_split
data.validation_file data.validation_split freezing.beta1 freezing.beta2 freezing.enabled freezing.every
freezing.final_epochs freezing.freezable freezing.granularity freezing.initial_epochs freezing.pairwise
freezing.prefix freezing.prefix_epochs freezing.rule freezing.score freezing.seed freezing.shape freezing.threshold
freezing.unit method.name method.options model.attn_implementation model.dtype model.name model.quantize
model.revision model.train_new model.trust_remote_code preset profile.enabled profile.memory profile.ranks
profile.starts profile.steps run.dir run.dry_run run.eval_every run.keep run.keep_best run.log_every run.overwrite
run.patience run.resume run.save_every run.tensorboard run.trackers run.verbose train.accumulation train.batch_size
train.decay_biases train.epochs train.eval_batch_size train.gradient_checkpointing train.head_learning_rate
train.label_smoothing train.learning_rate train.loraplus_lr_ratio train.max_grad_norm train.max_steps train.optimizer
train.optimizer_options train.schedule train.schedule_options train.seed train.vector_learning_rate train.warmup_ratio
train.warmup_steps train.weight_decay
"""


def test_a_new_option_is_a_decision() -> None:
    assert sorted(OPTIONS) == ALL_OPTIONS.split()


def test_options_of_freezing_are_the_same_as_keywords() -> None:
    types = get_type_hints(FreezingOptions)
    assert get_type_hints(FreezingKeywords) == {option.name: types[option.name] for option in fields(FreezingOptions)}


def test_a_random_order_is_drawn_anew_for_each_seed_of_the_training() -> None:
    def seed(*words: str) -> int | None:
        method = create_method(parse(["--freezing.score", "random", *words])[0])
        method.check(10)
        return method.freezing.seed

    assert (seed("--train.seed", "3"), seed("--train.seed", "3", "--freezing.seed", "0")) == (3, 0)


def test_a_preset_gives_way_to_files_and_these_to_the_command_line_wherever_they_stand(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("preset: glue/rte\ntrain: {epochs: 30, seed: 4, batch_size: 8}\n")
    other.write_text("train: {seed: 5}\n")
    for said in (
        [str(one), "--config", str(other), "--train.batch_size", "16"],
        ["--train.batch_size=16", f"--config={one}", f"--config={other}"],
    ):
        train = parse(said)[0].train
        assert (train.learning_rate, train.epochs, train.seed, train.batch_size) == (1e-3, 30, 5, 16)
    assert parse([str(one), "--preset", "glue/mnli"])[0].data.task == "mnli"
    assert parse([str(one), "--preset", "null", "--model.name", "m"])[0].data.task == "demo"
    assert parse(["--preset=glue/rte", "--preset=glue/cola"])[0].data.task == "cola"


@pytest.mark.parametrize("task", TABLE_5)
def test_the_papers_presets_are_table_5(task: str) -> None:
    config, _ = parse(["--preset", f"glue/{task}"])
    train, freezing = config.train, config.freezing
    found = (
        train.epochs,
        train.head_learning_rate,
        train.learning_rate,
        freezing.initial_epochs,
        freezing.final_epochs,
    )
    assert found == TABLE_5[task]
    assert (train.batch_size, config.data.max_length, config.adapter.r) == (64, 256, 4)
    assert (train.weight_decay, train.max_grad_norm, train.warmup_ratio) == (0.1, 0.1, 0.06)
    assert (freezing.rule, freezing.every, freezing.beta1, freezing.beta2) == ("rank", 1, 0.85, 0.95)
    assert config.model.train_new is None
    assert train.decay_biases


@pytest.mark.parametrize("task", SCRIPTS)
def test_the_official_presets_are_the_authors_scripts(task: str) -> None:
    config, _ = parse(["--preset", f"official/{task}"])
    train, freezing = config.train, config.freezing
    found = (train.learning_rate, train.head_learning_rate, train.batch_size, config.adapter.r, config.run.keep_best)
    assert found == SCRIPTS[task]
    assert (train.epochs, freezing.initial_epochs, freezing.final_epochs) == (TABLE_5[task][0], 1, TABLE_5[task][4])
    assert (train.weight_decay, train.max_grad_norm, train.warmup_ratio, train.seed) == (0.1, 0.1, 0.06, 42)
    assert (freezing.rule, freezing.every, freezing.beta1, freezing.beta2) == ("quantile", 10, 0.85, 0.95)
    assert (config.data.max_length, config.data.pad_to_max_length, config.adapter.dropout) == (256, True, 0.0)
    assert config.model.train_new == ["classifier"]
    assert not train.decay_biases


def outlined() -> torch.nn.Module:
    """DeBERTaV3-base's shape, without weights."""
    config = DebertaV2Config(
        vocab_size=1000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_biased_input=False,
        pooler_hidden_size=768,
        num_labels=2,
    )
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(
    ("preset", "adapter", "head"),
    [
        ("glue/cola", 83_232 + 368_640, (768 * 768 + 768) + (2 * 768 + 2)),
        ("official/cola", 83_232 + 368_640, 2 * 768 + 2),
        ("glue/mnli", 83_232 + 368_640, (768 * 768 + 768) + (2 * 768 + 2)),
        # r = 1024: s_d of 72 layers is longer, and 24 layers have A and B of (768 + 3072) x 1024.
        ("official/mnli", 83_232 + 72 * 1020 + 24 * (768 + 3072) * 1024, 2 * 768 + 2),
    ],
)
def test_what_trains_by_preset(preset: str, adapter: int, head: int) -> None:
    config, _ = parse(["--preset", preset])
    method = create_method(config)
    model = method.adapt(outlined(), HEAD)
    held = hold(model, HEAD, config.model.train_new, method)
    trains = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(n for name, n in trains.items() if not method.is_head(name)) == adapter
    assert sum(n for name, n in trains.items() if method.is_head(name)) == head
    assert bool(held) == preset.startswith("official")
    assert all(method.saved(name, trains=False) for name in held)


def test_only_the_heads_bias_is_spared_from_weight_decay() -> None:
    config, _ = parse(["--preset", "official/cola"])
    method = create_method(config)
    model = method.adapt(outlined(), HEAD)
    hold(model, HEAD, config.model.train_new, method)
    groups = create_optimizer(config, model, method).param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups[1:]] == [(4e-2, 0.1, 1), (4e-2, 0.0, 1)]
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (1e-2, 0.1)
    assert groups[2]["params"][0].shape == (2,)


def test_vectors_may_have_a_rate_of_their_own() -> None:
    config, _ = parse(["--preset", "glue/cola", "--train.vector_learning_rate", "0.5"])
    method = create_method(config)
    model = method.adapt(outlined(), HEAD)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = create_optimizer(config, model, method).param_groups
    by_rate = {group["lr"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert [*by_rate] == [1e-2, 0.5, 4e-2]
    assert {name.rpartition(".")[2] for name in by_rate[0.5]} == {"s_d", "s_b"}
    assert {name.rpartition(".")[2] for name in by_rate[1e-2]} == {"A", "B"}
    assert all("modules_to_save" in name for name in by_rate[4e-2])
    with pytest.raises(AFLoRAError, match="is for AFLoRA's vectors"):
        parse(["--preset", "glue/cola", "--method.name", "lora", "--train.vector_learning_rate", "0.5"])


def test_a_module_that_is_not_new_cannot_be_chosen() -> None:
    config, _ = parse(["--preset", "glue/cola", "--model.train_new", '["encoder"]'])
    method = create_method(config)
    with pytest.raises(AFLoRAError, match=r"no new module of this model\. New are: pooler, classifier"):
        hold(method.adapt(outlined(), HEAD), HEAD, config.model.train_new, method)


def test_language_models_have_no_new_modules_to_choose() -> None:
    config, _ = parse(["--preset", "glue/cola"])
    assert replace(config.data, pad_to_max_length=True).pad_to_max_length
    with pytest.raises(AFLoRAError, match=r"model\.train_new is for classifiers"):
        parse(["--preset", "sft/demo", "--model.train_new", '["classifier"]'])
    with pytest.raises(AFLoRAError, match=r"data\.pad_to_max_length is for classifiers"):
        parse(["--preset", "sft/demo", "--data.pad_to_max_length", "true"])


@pytest.mark.parametrize(
    "said", [["--data.text_columns", "a,b"], ["--data.text_columns=a,b"], ["--data.text_columns", "[a, b]"]]
)
def test_lists_need_no_brackets(said: list[str]) -> None:
    assert parse(said)[0].data.text_columns == ["a", "b"]
    assert parse([*said, "--profile.starts", "3"])[0].profile.starts == [3]


@pytest.mark.parametrize("task", ["files", "rte", "sft"])
def test_own_data_need_a_model_s_name(task: str) -> None:
    with pytest.raises(AFLoRAError, match=rf"data.task={task} needs a model: .* --model.name demo\."):
        parse(["--data.task", task, "--train.epochs", "1"])
    assert parse(["--data.task", task, "--model.name", "demo"])[0].model.name == "demo"


def test_the_demo_s_data_come_with_its_model() -> None:
    assert "\n  name: demo\n" in parse([])[1]
    assert parse(["--data.task", "sft", "--data.name", "demo"])[0].model.name == "demo"


def test_numbers_of_numpy_are_python_s_in_what_is_kept() -> None:
    config = FreezingConfig(
        total_steps=np.ceil(9.5), initial_steps=np.int64(1), final_steps=np.int32(2), beta1=np.float32(0.5)
    )
    assert config == FreezingConfig(total_steps=10, initial_steps=1, final_steps=2, beta1=0.5)
    assert {type(value) for value in vars(config).values()} <= {int, float, str, bool, type(None)}


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("total_steps", "10", "a whole number"),
        ("total_steps", 10.5, "a whole number"),
        ("initial_steps", None, "a whole number"),
        ("every", True, "a whole number"),
        ("beta1", "0.5", "a number"),
        ("beta1", np.array([0.5]), "a number"),
        ("prefix", "false", "true or false"),
        ("pairwise", 1, "true or false"),
    ],
)
def test_a_value_of_another_kind_is_refused(option: str, value: Any, wanted: str) -> None:
    options: dict[str, Any] = {"total_steps": 10, "initial_steps": 1, "final_steps": 2, option: value}
    with pytest.raises(AFLoRAError, match=rf"FreezingConfig: {option} must be {wanted}, got {re.escape(repr(value))}"):
        FreezingConfig(**options)
