"""Batches dealt by length over ranks and micro-batches train what the undealt batch trains, on every engine."""

from __future__ import annotations

import csv
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import accuracy_score
from transformers import BertTokenizerFast, set_seed

from aflora_dist import AdaptiveFreezing, FreezingConfig
from aflora_dist.methods.aflora import AFLoRA
from aflora_dist.tasks.model import load_base
from aflora_dist.training.command_line import parse
from tests.launch import ENGINES, launch_series
from tests.runs import command_line, lines, start_all, weights
from tests.small import WORDS

BATCH, EPOCHS, PER_EPOCH = 16, 3, 3
SCHEDULE = FreezingConfig(total_steps=EPOCHS * PER_EPOCH, initial_steps=3, final_steps=2)
RATE, HEAD_RATE, NORM = 1e-2, 2e-2, 0.5
CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": {"data.tokens_per_micro_batch": 100_000},
    "three micro-batches": {"data.tokens_per_micro_batch": 100_000, "train.accumulation": 3},
    "a budget of tokens": {"data.tokens_per_micro_batch": 60},
    "regression": {"data.tokens_per_micro_batch": 100_000, "train.accumulation": 2, "data.label_column": "score"},
}
PLACES = [("single", 1), *((engine, ranks) for engine in (*ENGINES, "fsdp2") for ranks in (2, 3))]


def cases(ranks: int) -> list[str]:
    """Each on every engine, and on an even and an uneven number of ranks."""
    every = list(CASES)
    return {1: every, 2: every[2:], 3: every[:2]}[ranks]


def write_texts(path: Path, rows: int, seed: int) -> None:
    """Texts of 1 to 40 words; the label, which one is wrong in eight, and the score say how good their mood is."""
    chance = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "score"])
        for _ in range(rows):
            words = chance.choices(WORDS, k=chance.choice([1, 2, 3, 5, 8, 13, 21, 40]))
            mood = sum((word in WORDS[:3]) - (word in WORDS[3:6]) for word in words) + chance.gauss(0, 1)
            writer.writerow([" ".join(words), ["bad", "good"][(mood > 0) ^ (chance.random() < 1 / 8)], f"{mood:.3f}"])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv (3 batches and 5 rows) and dev.csv (33 rows: in batches of 8, on 2 ranks one has none at the end)."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder / "train.csv", PER_EPOCH * BATCH + 5, seed=0)
    write_texts(folder / "dev.csv", 33, seed=1)
    return folder


Command = Callable[[Path, str], list[str]]
Dealt = Callable[[str, int], dict[str, Path]]


@pytest.fixture(scope="module")
def command(texts: Path, tiny_model: Path) -> Command:
    def arguments(run: Path, case: str) -> list[str]:
        chosen = {
            "run.dir": run,
            "run.log_every": 1,
            "run.save_every": 0,
            "run.tensorboard": False,
            "model.name": tiny_model,
            "data.task": "files",
            "data.train_file": texts / "train.csv",
            "data.validation_file": texts / "dev.csv",
            "train.epochs": EPOCHS,
            "train.batch_size": BATCH,
            "train.eval_batch_size": 8,
            "train.learning_rate": RATE,
            "train.head_learning_rate": HEAD_RATE,
            "train.warmup_ratio": 0,
            "train.max_grad_norm": NORM,
            "freezing.initial_epochs": SCHEDULE.initial_steps / PER_EPOCH,
            "freezing.final_epochs": SCHEDULE.final_steps / PER_EPOCH,
            **CASES[case],
        }
        return command_line(chosen)

    return arguments


@pytest.fixture(scope="module")
def dealt(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Dealt:
    """(engine, ranks) -> directory of the main job by case."""

    @functools.cache
    def run(engine: str, ranks: int) -> dict[str, Path]:
        folders = {case: tmp_path_factory.mktemp("dealt") / "run" for case in cases(ranks)}
        jobs = [command(folder, case) for case, folder in folders.items()]
        if engine == "single":
            start_all("single", jobs)
        else:
            worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
            launch_series(engine, ranks, [[*worker, "aflora_dist.training.run", *job] for job in jobs])
        return folders

    return run


@pytest.fixture(scope="module")
def undealt(
    command: Command, texts: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], dict[str, Any]]:
    """The same training in a loop of its own, each global batch whole, as drawn, padded to its longest text."""

    @functools.cache
    def run(regression: bool) -> dict[str, Any]:
        config, _ = parse(command(Path("unused"), "regression" if regression else "one micro-batch"))
        tokenizer = BertTokenizerFast.from_pretrained(tiny_model)

        def read(name: str) -> tuple[list[str], torch.Tensor]:
            with (texts / name).open() as file:
                rows = list(csv.DictReader(file))
            labels = [float(row["score"]) if regression else ["bad", "good"].index(row["label"]) for row in rows]
            return [row["text"] for row in rows], torch.tensor(labels)

        set_seed(0)
        base, _, head = load_base(config.model, None if regression else ["bad", "good"])
        accelerator = Accelerator(cpu=True)
        model = AFLoRA(config).adapt(base, head)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for n, p in trained.items() if "classifier" not in n], "lr": RATE},
            {"params": [p for n, p in trained.items() if "classifier" in n], "lr": HEAD_RATE},
        ]
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, weight_decay=0.1))
        freezing = AdaptiveFreezing(accelerator, model, optimizer, SCHEDULE)
        total = EPOCHS * PER_EPOCH
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda t: (total - t) / total)
        train_texts, labels = read("train.csv")
        losses = []
        for epoch in range(EPOCHS):
            model.train()
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
            for batch in order[: PER_EPOCH * BATCH].split(BATCH):
                inputs = tokenizer([train_texts[i] for i in batch], padding=True, return_tensors="pt")
                loss = model(**inputs, labels=labels[batch]).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), NORM)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.item())
        model.eval()
        dev_texts, dev_labels = read("dev.csv")
        with torch.no_grad():  # one text after the other: nothing is padded, and the order is the file's
            said = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in dev_texts])
        folder = tmp_path_factory.mktemp("undealt")
        model.save_pretrained(str(folder / "adapter"))
        metrics = (
            {"pearson": np.corrcoef(said[:, 0].numpy(), dev_labels.numpy())[0, 1]}
            if regression
            else {"accuracy": accuracy_score(dev_labels.numpy(), said.argmax(-1).numpy())}
        )
        return {"losses": losses, "events": freezing.events, "weights": weights(folder), "metrics": metrics}

    return run


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "ranks"), PLACES)
def test_dealt_batches_train_what_undealt_ones_train(
    engine: str, ranks: int, dealt: Dealt, undealt: Callable[[bool], dict[str, Any]]
) -> None:
    for case, run in dealt(engine, ranks).items():
        expected = undealt(case == "regression")
        result = json.loads((run / "result.json").read_text())
        assert (result["engine"], result["world_size"], result["steps"]) == (engine, ranks, len(expected["losses"]))
        losses = [line["loss"] for line in lines(run, "metrics.jsonl")]
        assert losses == pytest.approx(expected["losses"], abs=1e-5), case
        log = lines(run, "freeze_log.jsonl")
        assert [(e["step"], e["frozen"]) for e in log] == [(e.step, list(e.frozen)) for e in expected["events"]], case
        assert len(log) >= 3
        for mine, event in zip(log, expected["events"], strict=True):
            assert mine["scores"] == pytest.approx(event.scores, rel=1e-4), case
        learned = weights(run)
        assert learned.keys() == expected["weights"].keys()
        for name, value in learned.items():
            torch.testing.assert_close(
                value, expected["weights"][name], rtol=0, atol=1e-5, msg=lambda m, at=f"{case}, {name}": f"{at}: {m}"
            )
        for name, value in expected["metrics"].items():
            assert 0.3 < value < 0.98  # results beside the wrong labels would show
            assert result["metrics"][name] == pytest.approx(value, abs=1e-5), case
