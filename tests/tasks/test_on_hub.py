"""Models and data sets come from a hub, by its protocol and huggingface_hub's own client, and go there again."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.hub import TOKEN, Hub
from tests.hub_layouts import deberta_v3, qwen2_5
from tests.launch import free_port
from tests.ranks import ENVIRONMENT, ROOT
from tests.small import WORDS
from tests.tasks.hub_sets import gsm8k

GATED = "some/gated"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """What the presets name, laid out as there."""
    root = tmp_path_factory.mktemp("hub")
    for name, make in {"microsoft/deberta-v3-base": deberta_v3, "some/talker": qwen2_5, GATED: qwen2_5}.items():
        (folder := root / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        make(folder)
    (root / "datasets" / "openai").mkdir(parents=True)
    gsm8k(root / "datasets" / "openai" / "gsm8k", times=4)
    glue(root / "datasets" / "nyu-mll" / "glue")
    with Hub(root, gated=[GATED]) as served:
        yield served


def glue(folder: Path) -> None:
    """nyu-mll/glue, of which rte: parquet, the labels named in its own metadata, -1 in the test split."""
    (folder / "rte").mkdir(parents=True)
    text, label = datasets.Value("string"), datasets.ClassLabel(names=["entailment", "not_entailment"])
    features = datasets.Features(sentence1=text, sentence2=text, label=label, idx=datasets.Value("int32"))
    chance = random.Random(0)

    def row(number: int, labelled: bool) -> dict[str, Any]:
        first, second = (" ".join(chance.choices(WORDS, k=8)) for _ in range(2))
        kind = chance.randrange(2) if labelled else -1
        return {"sentence1": first, "sentence2": second, "label": kind, "idx": number}

    config = "configs:\n- config_name: rte\n  data_files:\n"
    for split, rows in {"train": 64, "validation": 16, "test": 8}.items():
        table = datasets.Dataset.from_list([row(i, split != "test") for i in range(rows)], features=features)
        table.to_parquet(str(folder / "rte" / f"{split}-00000-of-00001.parquet"))
        config += f"  - split: {split}\n    path: rte/{split}-*\n"
    (folder / "README.md").write_text(f"---\n{config}---\n")


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A command in a process that asks this hub, and has a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")

    def command(*words: Any, token: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment = kept | ENVIRONMENT | own | hub.environment(cache, token) | more
        return subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
        )

    return command


def test_the_first_command_of_all_trains_what_the_hub_has_and_what_was_trained_goes_there(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    """The README's, unchanged; then without a network; merged, uploaded, and asked for where the package is unknown."""
    folder = tmp_path / "rte"
    launched = ["accelerate", "launch", "--config_file", "launch/zero2.yaml", "--main_process_port", free_port()]
    preset = ["-m", "aflora_dist.training.run", "--preset", "glue/rte", "--run.dir", folder]
    done = run(*launched, *preset)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert (result["engine"], result["world_size"], result["steps"]) == ("zero2", 2, 20)
    got = [request for request in hub.asked if request.startswith("GET") and "/resolve/" in request]
    assert len(got) == len({*got}), "something was downloaded twice"

    asked = len(hub.asked)
    (rows := tmp_path / "rows.csv").write_text("sentence1,sentence2\none movie,a film\n")
    done = run("aflora", "predict", folder, rows, "--out", tmp_path / "out.csv", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(hub.asked) == asked
    with (tmp_path / "out.csv").open(newline="") as file:
        predicted = next(csv.DictReader(file))["prediction"]

    assert run("aflora", "merge", folder, tmp_path / "merged").returncode == 0
    refused = run("hf", "upload", "me/rte", tmp_path / "merged")
    assert refused.returncode != 0, "a token is needed"
    for name, what in {"me/rte": tmp_path / "merged", "me/rte-lora": folder / "lora"}.items():
        done = run("hf", "upload", name, what, token=TOKEN)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in (hub.root / "models" / name).iterdir()} == {path.name for path in what.iterdir()}
    stock = (
        "import sys; from peft import PeftConfig; from transformers import pipeline;"
        "print(pipeline('text-classification', 'me/rte')({'text': 'one movie', 'text_pair': 'a film'})['label']);"
        "print(PeftConfig.from_pretrained('me/rte-lora').base_model_name_or_path);"
        "assert not any(name.startswith('aflora') for name in sys.modules)"
    )
    done = run(sys.executable, "-c", stock)
    assert done.returncode == 0, done.stderr
    label, base = done.stdout.split()
    assert label == predicted
    assert label in ("entailment", "not_entailment")
    assert base == "microsoft/deberta-v3-base"


def test_nodes_without_a_network_train_what_another_one_has_fetched(hub: Hub, run: Run, tmp_path: Path) -> None:
    """By the two commands of docs/cluster.md, into a cache of their own."""
    own = hub.environment(tmp_path / "cache", None)
    for fetch in (("hf", "download", "microsoft/deberta-v3-base"), ("aflora", "data", "--preset", "glue/rte")):
        done = run(*fetch, **own)
        assert done.returncode == 0, done.stderr
    asked = len(hub.asked)
    short = ("--train.max_steps", 2, "--freezing.initial_epochs", 0, "--freezing.final_epochs", 1)
    own["HF_HUB_OFFLINE"] = "1"
    done = run("aflora", "train", "--preset", "glue/rte", "--run.dir", tmp_path / "run", *short, **own)
    assert done.returncode == 0, done.stderr
    assert len(hub.asked) == asked


def test_an_adapter_of_the_hub_answers(hub: Hub, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "math"
    short = {"train.epochs": 1, "train.batch_size": 8, "data.max_length": 96, "data.max_new_tokens": 4}
    short |= {"freezing.initial_epochs": 0.2, "freezing.final_epochs": 0.3, "model.revision": "main"}
    options = [word for name, value in short.items() for word in (f"--{name}", value)]
    done = run(
        *("aflora", "train", "--preset", "llm/gsm8k", "--model.name", "some/talker", "--run.dir", folder), *options
    )
    assert done.returncode == 0, done.stderr
    assert run("hf", "upload", "me/math", folder / "adapter", token=TOKEN).returncode == 0
    (questions := tmp_path / "questions.jsonl").write_text('{"prompt": "how many apples ?"}\n')
    done = run("aflora", "predict", "me/math", questions, "--out", tmp_path / "answers.jsonl")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert row.keys() == {"prompt", "prediction"}


def test_what_the_hub_refuses_says_what_to_do(run: Run) -> None:
    expected = {
        GATED: r"it is gated. Accept its licence at https://huggingface.co/some/gated",
        "nobody/nothing": "there is neither a folder nor a repository on the hub of that name. If it is private",
        "some/talker@v2": "it has no such revision. https://huggingface.co/some/talker shows",
    }
    asked = [f"{token}{name}" for token in ("", "hf_of_somebody_else:") for name in expected]
    done = run(sys.executable, "-W", "ignore", "-m", "tests.workers.refused", *asked, f"{TOKEN}:{GATED}")
    assert done.returncode == 0, done.stderr
    told: dict[str, list[str]] = defaultdict(list)
    for name, said in map(json.loads, done.stdout.splitlines()):
        told[name].append(said)
    assert told.pop(f"{TOKEN}:{GATED}") == ["found"] * 4
    assert [*told] == asked
    for ask, answers in told.items():
        name = ask.rpartition(":")[2]
        assert len(answers) == 4
        for said in answers:
            assert expected[name] in said
            assert "Request ID" not in said
            assert name != GATED or ("`hf auth login` on this machine" in said and "HF_TOKEN" in said)
