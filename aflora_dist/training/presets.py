"""Hyperparameters of published settings, and of those that this package brings along."""

from __future__ import annotations

from typing import Any

from ..tasks.glue import TASKS

# Table 5: epochs, learning rate of the head, learning rate, t_f in epochs. The rest is the same for
# all tasks and is what the options default to.
_TABLE_5: dict[str, tuple[int, float, float, float]] = {
    "cola": (20, 4e-2, 1e-2, 14),
    "sst2": (10, 4e-3, 4e-3, 7),
    "mrpc": (20, 8e-2, 1e-2, 14),
    "qnli": (10, 4e-3, 1e-3, 7),
    "stsb": (20, 2e-2, 2e-3, 14),
    "rte": (20, 4e-2, 1e-3, 14),
    "mnli": (10, 4e-3, 1e-3, 7),
    "qqp": (10, 4e-3, 4e-3, 7),
}


def _table_5(task: str) -> dict[str, Any]:
    epochs, head_learning_rate, learning_rate, final_epochs = _TABLE_5[task]
    return {
        "model.name": "microsoft/deberta-v3-base",
        "data.task": task,
        "data.max_length": 256,
        "train.epochs": epochs,
        "train.batch_size": 64,
        "train.head_learning_rate": head_learning_rate,
        "train.learning_rate": learning_rate,
        "freezing.initial_epochs": 1.0,
        "freezing.final_epochs": final_epochs,
    }


# The authors' scripts (glue/ipt_deberta_base_TASK.sh, run_glue.py, trainer.py, utils.py): learning rate, the head's,
# and what else differs from Table 5. Batches are of 64 on each GPU; QNLI, MNLI and QQP have four.
_SCRIPTS: dict[str, tuple[float, float, dict[str, Any]]] = {
    "cola": (1e-2, 4e-2, {}),
    "sst2": (4e-3, 4e-3, {}),
    "mrpc": (1e-2, 8e-2, {}),
    "qnli": (1e-3, 4e-3, {"train.batch_size": 256}),
    "stsb": (2e-2, 2e-2, {}),
    "rte": (1e-2, 4e-2, {}),
    "mnli": (1e-2, 4e-3, {"train.batch_size": 256, "adapter.r": 1024}),
    "qqp": (4e-3, 4e-3, {"train.batch_size": 256, "adapter.r": 1024}),
}
# Of the metrics that run.keep_best knows, theirs; accuracy where not named.
_BEST_BY = {"cola": "matthews_correlation", "mrpc": "f1", "stsb": "pearson", "mnli": "accuracy_matched"}


def _scripts(task: str) -> dict[str, Any]:
    learning_rate, head_learning_rate, others = _SCRIPTS[task]
    return {
        **_table_5(task),
        "model.train_new": ["classifier"],
        "data.pad_to_max_length": True,
        "train.learning_rate": learning_rate,
        "train.head_learning_rate": head_learning_rate,
        "train.decay_biases": False,
        "train.seed": 42,
        "freezing.rule": "quantile",
        "freezing.every": 10,
        "run.keep_best": _BEST_BY.get(task, "accuracy"),
        **others,
    }


# Found on the demo itself: 78 updates want larger steps of s_b, which starts at 0, than Table 5's.
_DEMO: dict[str, Any] = {
    "model.name": "demo",
    "data.task": "demo",
    "data.max_length": 128,
    "data.max_train_examples": 4992,
    "train.epochs": 1,
    "train.learning_rate": 4e-2,
    "train.head_learning_rate": 1e-2,
    "train.max_grad_norm": 1.0,
    "freezing.initial_epochs": 0.1,
    "freezing.final_epochs": 0.5,
    "run.dir": "runs/demo",
    "run.log_every": 1,
}

# SmolLM2-135M-Instruct on made-up word problems: small enough for a CPU. The rate is the best of three on real ones
# (docs/accuracy.md).
_SFT_DEMO: dict[str, Any] = {
    "model.name": "demo",
    "data.task": "sft",
    "data.name": "demo",
    "data.max_length": 128,
    "data.max_eval_examples": 32,
    "data.max_new_tokens": 48,
    "train.epochs": 2,
    "train.batch_size": 16,
    "train.learning_rate": 3e-2,
    "train.max_grad_norm": 1.0,
    "train.weight_decay": 0.0,
    "train.eval_batch_size": 16,
    "freezing.initial_epochs": 0.2,
    "freezing.final_epochs": 1.0,
    "run.dir": "runs/sft_demo",
    "run.log_every": 1,
}

# The authors' gsm8k/ scripts for LLaMA-7B (finetune.py, utils.py). They count micro-batches of one example in float16;
# their data, ft-training_set/math_10k.json of LLM-Adapters, is named on the command line: data.train_file.
_MATH_10K: dict[str, Any] = {
    "model.name": "yahma/llama-7b-hf",
    "model.dtype": "float16",
    "data.task": "sft",
    "data.system": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.",
    "data.loss_on": "all",
    "data.max_length": 256,
    "data.hold_out": 120,
    "adapter.r": 32,
    "adapter.target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "adapter.freezable": "all",
    "train.epochs": 3,
    "train.batch_size": 1,
    "train.learning_rate": 2e-3,
    "train.weight_decay": 0.0,
    "train.warmup_ratio": 100 / (3 * 9799),  # their 100 updates
    "train.max_grad_norm": 1.0,
    "freezing.initial_epochs": 0.9,
    "freezing.final_epochs": 0.9,
    "freezing.every": 10,
    "freezing.rule": "quantile",
    "freezing.shape": "quadratic",
}

# What the field reports, with the settings above; solutions end in "#### 1,234", whose number is compared. The model is
# named on the command line.
_GSM8K: dict[str, Any] = {
    **{k: v for k, v in _MATH_10K.items() if k.partition(".")[0] not in ("model", "data")},
    "adapter.target_modules": None,
    "data.task": "sft",
    "data.name": "openai/gsm8k",
    "data.subset": "main",
    "data.validation_split": "test",
    "data.columns": {"prompt": "question", "completion": "answer", "answer": "answer"},
    "data.max_length": 512,
    "data.max_new_tokens": 256,
    "train.batch_size": 16,
    "train.warmup_ratio": 0.03,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": _DEMO,
    "sft/demo": _SFT_DEMO,
    "llm/math10k": _MATH_10K,
    "llm/gsm8k": _GSM8K,
    **{f"glue/{task}": _table_5(task) for task in TASKS},
    **{f"official/{task}": _scripts(task) for task in TASKS},
}
