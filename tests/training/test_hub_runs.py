"""Every preset trains on the layout that its model has on the hub, on every engine, and in every precision."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.filesize import decimal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from aflora_dist.tasks.glue import TASKS
from aflora_dist.training.presets import PRESETS
from aflora_dist.training.run import main
from tests.hub_layouts import deberta_v3, llama_7b, qwen2_5
from tests.launch import launch_series
from tests.runs import command, command_line, lines, start
from tests.small import WORDS
from tests.small_lm import write_problems

LAYOUT = {"microsoft/deberta-v3-base": deberta_v3, "yahma/llama-7b-hf": llama_7b}
SHORT = {
    "run.log_every": 1,
    "run.trackers": "[]",
    "run.save_every": 0,
    "train.epochs": 1,
    "train.batch_size": 8,
    "data.max_length": 32,
    "freezing.initial_epochs": 0.2,
    "freezing.final_epochs": 0.4,
    "freezing.every": 1,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that presets name, GLUE's files, and a language model's."""
    folder = tmp_path_factory.mktemp("hub")
    for name, make in LAYOUT.items():
        make(folder / name.rpartition("/")[2])
    qwen2_5(folder / "qwen2_5")
    write_problems(folder / "problems.jsonl", 48, seed=0)
    write_glue(folder / "glue")
    return folder


def write_glue(folder: Path) -> None:
    """All of GLUE's tasks, 48 rows of each to train on and 12 to evaluate, in GLUE's own form."""
    for task in TASKS.values():
        chance = random.Random(task.name)
        *texts, label = task.tsv_columns
        labels = task.tsv_labels or (["0", "1"] if task.labels else [str(i / 2) for i in range(11)])
        named = all(isinstance(column, str) for column in task.tsv_columns)
        (folder / task.folder).mkdir(parents=True)
        for split, file in task.files:
            rows = [["\t".join(map(str, task.tsv_columns))]] if named else []
            for i in range(48 if split == "train" else 12):
                said = {c: " ".join(chance.choices(WORDS, k=chance.randint(2, 6))) for c in texts}
                cells: dict[Any, str] = {**said, label: labels[i % len(labels)]}
                order = task.tsv_columns if named else range(4)
                rows.append(["\t".join(cells.get(column, "x") for column in order)])
            (folder / task.folder / file).write_text("\n".join(line for (line,) in rows) + "\n")


def of_preset(preset: str, hub: Path, out: Path, **more: Any) -> list[str]:
    """A short run with a preset's own recipe."""
    settings = PRESETS[preset]
    chosen: dict[str, Any] = {"preset": preset, "run.dir": out, **SHORT}
    chosen["model.name"] = hub / settings["model.name"].rpartition("/")[2]
    if settings["data.task"] == "sft":
        chosen |= {"data.train_file": hub / "problems.jsonl", "data.hold_out": 8, "data.max_length": 96}
        chosen |= {"data.max_new_tokens": 4}
    else:
        chosen["data.path"] = hub / "glue"
    return command_line({**chosen, **more})


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out, "metrics.jsonl")]


@pytest.mark.parametrize("preset", [name for name, chosen in PRESETS.items() if chosen.get("model.name") in LAYOUT])
def test_every_preset_trains_on_the_layout_that_it_names(preset: str, hub: Path, tmp_path: Path) -> None:
    done = start("single", of_preset(preset, hub, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == len(losses(tmp_path / "run")) > 4
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert lines(tmp_path / "run", "freeze_log.jsonl")


@pytest.fixture(scope="module")
def expected(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of one process in which everything is float32."""
    found = {}
    for name, arguments in runs(hub, tmp_path_factory.mktemp("float32"), "float32").items():
        assert main(arguments) == 0
        found[name] = losses(Path(arguments[arguments.index("--run.dir") + 1]))
    return found


def runs(hub: Path, out: Path, dtype: str | None = None) -> dict[str, list[str]]:
    """float16 with a new head and pooler; float16 by name; bfloat16."""
    named: dict[str, Any] = {} if dtype is None else {"model.dtype": dtype}
    rates = {"train.head_learning_rate": 1e-3, "train.learning_rate": 1e-3}  # that do not amplify rounding
    qwen = {"model.name": hub / "qwen2_5", "model.dtype": "null"}
    return {
        "rte": of_preset("glue/rte", hub, out / "rte", **rates, **named),
        "math10k": of_preset("llm/math10k", hub, out / "math10k", **named),
        "qwen": of_preset("llm/math10k", hub, out / "qwen", **{**qwen, **named}),
    }


EVERY = [("single", "bf16"), ("ddp", "no"), ("ddp", "bf16"), ("zero1", "bf16"), ("zero2", "no")]
EVERY += [("zero3", "no"), ("zero3", "bf16"), ("fsdp2", "no"), ("fsdp2", "bf16")]
BLOCKS = {"rte": "DebertaV2Layer", "math10k": "LlamaDecoderLayer", "qwen": "Qwen2DecoderLayer"}


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "precision"), EVERY)
def test_every_engine_and_precision_trains_what_float32_trains(
    engine: str,
    precision: str,
    hub: Path,
    expected: dict[str, list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = runs(hub, tmp_path)
    if engine == "fsdp2":  # one kind of block for a launch
        chosen = {name: chosen[name] for name in [{"no": "rte", "bf16": "qwen"}[precision]]}
        monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", BLOCKS[next(iter(chosen))])
    if engine.startswith("zero") and precision == "no":  # which has no float16 then
        chosen["math10k"] += ["--model.dtype", "float32"]
    worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
    series = [[*worker, "aflora_dist.training.run", *arguments] for arguments in chosen.values()]
    launch_series(engine, 1 if engine == "single" else 2, series, mixed_precision=precision)
    for name in chosen:
        assert losses(tmp_path / name) == pytest.approx(expected[name], rel=2e-2), name
        adapter = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in adapter.values())


def test_half_precision_by_name_is_refused_where_nothing_would_be_held_in_it(hub: Path, tmp_path: Path) -> None:
    arguments = of_preset("glue/rte", hub, tmp_path / "run", **{"method.name": "full", "model.dtype": "bfloat16"})
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    done = start("single", [part for pair in pairs if not pair[0].startswith("--freezing.") for part in pair])
    assert done.returncode == 2
    assert "model.dtype=bfloat16 is what frozen weights are held in, and method.name=full has none" in done.stderr


@pytest.mark.parametrize("preset", ["glue/rte", "llm/math10k"])
def test_a_run_over_pickles_in_float16_is_planned_merged_and_made_lora(
    preset: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged, lora = (tmp_path / name for name in ("run", "merged", "lora"))
    arguments = of_preset(preset, hub, run, **{"train.learning_rate": 1e-1})
    assert main([*arguments, "--dry_run"]) == 0
    assert not run.exists()
    planned = capsys.readouterr().out
    assert main(arguments) == 0
    moments = 8 * json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["trainable_params"]  # all in float32
    assert f"{decimal(moments)} to" in planned
    assert command("merge")([str(run), str(merged)]) == 0
    assert command("to-lora")([str(run), str(lora)]) == 0
    kind = AutoModelForSequenceClassification if preset == "glue/rte" else AutoModelForCausalLM
    base = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    models = [
        PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), path)
        for path in (run / "adapter", lora)
    ]
    models.append(kind.from_pretrained(merged, dtype=torch.float32))
    ids = torch.arange(5, 21).view(2, 8)
    with torch.no_grad():
        ours, as_lora, into = (model.eval()(input_ids=ids).logits for model in models)
        plain = kind.from_pretrained(base, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(as_lora, ours, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(into, ours, atol=2e-3, rtol=2e-3)  # stored in float16
    assert (ours - plain).abs().max() > 1e-2
